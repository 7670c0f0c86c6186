"""Check that decoded JSON validates: many schemas, several token budgets, any model or a random one.

The file has one {"id", "schema"} a line, such as a sample of JSONSchemaBench. Counted are, for each budget, documents,
answers that could not be closed within it, and answers that jsonschema rejects after the retries.

    python -m bench.json_validity --schemas schemas.jsonl --model_dir smollm2-135m random --budgets 16 128 512
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import InputError, PromptEncoder
from distil.cli import new_parser, run_script
from distil.files import read_jsonl
from distil.idp.decoder import JsonDecoder
from distil.idp.documents import idp_prompt
from distil.idp.extractor import ExtractOptions, Extractor
from distil.idp.schema import SchemaGrammar, compile_schema
from distil.testing import load_named

PROMPT = "Order 1042 of 3 May 2024, Jane Doe, 12 Elm Street, jane@example.com: 2 lamps at 19.90, paid by card."


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--schemas", required=True, help='JSONL of {"id", "schema"}')
    add("--model_dir", nargs="+", default=["smollm2-135m"], help="models, or `random` for a tiny one (%(default)s)")
    add("--budgets", type=int, nargs="+", default=[16, 128, 512], help="tokens of an answer (%(default)s)")
    add("--batch_size", type=int, default=16, help="(%(default)s)")
    add("--limit", type=int, help="only the first LIMIT schemas")
    add("--refusals", action="store_true", help="print why each schema was refused")
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


def compiled(rows: list[dict], decoder: JsonDecoder) -> tuple[list[tuple[str, SchemaGrammar]], list[str]]:
    """Return ((id, grammar) of the accepted schemas, why each other one was refused)."""
    grammars, refused = [], []
    for row in rows:
        try:
            grammars.append((row["id"], compile_schema(row["schema"], decoder.grammar_tokenizer, row["id"])))
        except InputError as error:
            refused.append(str(error))
    return grammars, refused


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
            grammars, refused = compiled(rows, decoder)
            print(f"{name}: {len(grammars)} of {len(rows)} schemas accepted")
            for line in refused if args.refusals else []:
                print(f"  refused {line}")
            for budget in args.budgets:
                start = time.perf_counter()
                kinds = count_kinds(decoder, grammars, budget, args.batch_size)
                share = kinds["document"] / len(grammars)
                print(f"  {budget} tokens: {share:.3f} documents, {dict(kinds)}, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    run_script(main)
