"""Check schemas as people write them: which are accepted, what decoding can write, whether decoded JSON validates.

The file has one {"id", "schema"} a line, with "tests": [{"data", "valid"}], such as a sample of JSONSchemaBench.
Counted are accepted schemas; the valid instances that can be written in the layout and key order of all outputs, by
the grammar of the schema as it is and by the one in use, which has no keys but those that the schema names; and for
each budget documents, answers that could not be closed within it, and answers that jsonschema rejects after retries.

    python -m bench.json_validity --schemas schemas.jsonl --model_dir smollm2-135m random --budgets 16 128 512
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import InputError, PromptEncoder
from distil.cli import new_parser, run_script
from distil.files import read_jsonl
from distil.idp.decoder import JsonDecoder
from distil.idp.documents import compact_json, idp_prompt
from distil.idp.extractor import ExtractOptions, Extractor
from distil.idp.schema import SchemaGrammar, closed, compile_schema
from distil.idp.validation import checked_validator
from distil.testing import load_named
from idp_prepare import in_schema_form

PROMPT = "Order 1042 of 3 May 2024, Jane Doe, 12 Elm Street, jane@example.com: 2 lamps at 19.90, paid by card."


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--schemas", required=True, help='JSONL of {"id", "schema", "tests"}')
    add("--model_dir", nargs="+", default=["smollm2-135m"], help="models, or `random` for a tiny one (%(default)s)")
    add("--budgets", type=int, nargs="+", default=[16, 128, 512], help="tokens of an answer (%(default)s)")
    add("--batch_size", type=int, default=16, help="(%(default)s)")
    add("--limit", type=int, help="only the first LIMIT schemas")
    add("--refusals", action="store_true", help="print why each schema was refused, and what cannot be written")
    return parser


def random_model(folder: str) -> str:
    """Save a tiny random model with the embedded model's tokenizer; return its folder."""
    from transformers import AutoTokenizer

    from distil.models import embedded_model_dir
    from distil.testing import save_random_model

    save_random_model(Path(folder), AutoTokenizer.from_pretrained(embedded_model_dir()), "llama")
    config = Path(folder) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 4096}))
    return folder


@dataclass
class Schemas:
    """Compiled schemas. grammars: (id, grammar in use) of the accepted ones; refused: why others were; unwritable:
    instances that no grammar can write; instances, written, written_closed: numbers of valid instances; slowest:
    CPU seconds and id of the schema that took longest to compile."""

    grammars: list[tuple[str, SchemaGrammar]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    unwritable: list[str] = field(default_factory=list)
    instances: int = 0
    written: int = 0
    written_closed: int = 0
    slowest: tuple[float, str] = (0.0, "")


def compiled(rows: list[dict], decoder: JsonDecoder) -> Schemas:
    """Compile the schemas and count the valid instances that can be written, of those that jsonschema finds valid."""
    schemas, tokens = Schemas(), decoder.grammar_tokenizer
    for row in rows:
        name, start = row["id"], time.process_time()
        valid = [test["data"] for test in row.get("tests", ()) if test["valid"]]
        try:
            validator = checked_validator(row["schema"], name)
            valid = [value for value in valid if validator.is_valid(value)]
            grammar = compile_schema(closed(validator.schema)[0], tokens, name, validator)
            schemas.slowest = max(schemas.slowest, (time.process_time() - start, name))
            schemas.grammars.append((name, grammar))
            as_it_is = compile_schema(validator.schema, tokens, name, validator)
            schemas.written_closed += sum(writes(grammar, value) for value in valid)
            unwritable = [value for value in valid if not writes(as_it_is, value)]
            schemas.written += len(valid) - len(unwritable)
            schemas.unwritable += [f"{name}: {compact_json(value)[:300]}" for value in unwritable]
        except InputError as error:
            schemas.refused.append(str(error))
        schemas.instances += len(valid)
    return schemas


def writes(grammar: SchemaGrammar, value: Any) -> bool:
    """Return whether a grammar allows the value in the layout and key order of all outputs."""
    validator = checked_validator(grammar.schema, "schema")
    return grammar.writes(compact_json(in_schema_form(value, validator.schema, validator)))


def count_kinds(
    decoder: JsonDecoder, grammars: list[tuple[str, SchemaGrammar]], budget: int, batch_size: int
) -> Counter:
    """Return how often each kind of answer to PROMPT occurred: "document" or an error code, "retried", "truncated"."""
    prompt, kinds = PromptEncoder(decoder.tokenizer).prompt(idp_prompt(PROMPT)), Counter()
    for first in range(0, len(grammars), batch_size):
        batch = grammars[first : first + batch_size]
        drafts = decoder.generate([prompt] * len(batch), [grammar for _, grammar in batch], budget)
        for (schema, grammar), draft in zip(batch, drafts, strict=True):
            extractor = Extractor(decoder, grammar, ExtractOptions(grammar.validator.schema, max_new_tokens=budget))
            answer = extractor.checked(draft.text, draft.truncated)
            if answer.get("error", {}).get("code") == "invalid":
                kinds["retried"] += 1
                (answer,) = extractor.extract([PROMPT])
            kind = answer.get("error", {}).get("code", "document")
            kinds[kind] += 1
            kinds["truncated"] += bool(answer.get("truncated"))
            if kind == "invalid":
                print(f"  {schema}: {answer['error']['message']}")
            if kind == "document":  # validated once more, independently of the extractor
                grammar.validator.validate(json.loads(json.dumps(answer["json"], allow_nan=False)))
    return kinds


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    rows = read_jsonl(args.schemas, ())[: args.limit]
    with tempfile.TemporaryDirectory() as folder:
        for name in args.model_dir:
            decoder = JsonDecoder(*load_named(random_model(folder) if name == "random" else name))
            schemas = compiled(rows, decoder)
            grammars, (seconds, slowest) = schemas.grammars, schemas.slowest
            accepted = f"{len(grammars)} of {len(rows)} schemas accepted"
            print(f"{name}: {accepted}, slowest {seconds:.1f} s of CPU ({slowest})")
            print(f"  of {schemas.instances} valid instances {schemas.written} can be written,")
            print(f"  {schemas.written_closed} without keys that their schema does not name")
            for kind in ("refused", "unwritable") if args.refusals else ():
                for line in getattr(schemas, kind):
                    print(f"  {kind} {line}")
            for budget in args.budgets:
                start = time.perf_counter()
                kinds = count_kinds(decoder, grammars, budget, args.batch_size)
                share = kinds["document"] / max(len(grammars), 1)
                print(f"  {budget} tokens: {share:.3f} documents, {dict(kinds)}, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    run_script(main)
