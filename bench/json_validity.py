"""Whether what leaves the decoder validates: many schemas, several token budgets, any model or a random one.

    python bench/json_validity.py --schemas schemas.jsonl --model_dir smollm2-135m random --budgets 16 128 512

reads one {"id", "schema"} a line, such as a sample of JSONSchemaBench. For each budget it counts documents, refusals
to close within it, and answers that jsonschema rejects after the retries.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import PromptEncoder
from decoding import JsonDecoder, compile_schema
from files import InputError, read_jsonl, run_script
from idp import Extractor, idp_prompt
from infer_idp import build_parser as infer_parser
from models import load_model

PROMPT = "Order 1042 of 3 May 2024, Jane Doe, 12 Elm Street, jane@example.com: 2 lamps at 19.90, paid by card."


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--schemas", required=True, help='JSONL of {"id", "schema"}')
    add("--model_dir", nargs="+", default=["smollm2-135m"], help="models, or `random` for a tiny one (%(default)s)")
    add("--budgets", type=int, nargs="+", default=[16, 128, 512], help="tokens of an answer (%(default)s)")
    add("--batch_size", type=int, default=16, help="(%(default)s)")
    add("--limit", type=int, help="only the first so many schemas")
    add("--refusals", action="store_true", help="print why each schema was refused")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def random_model(folder: str) -> str:
    """A tiny random model with the embedded model's tokenizer."""
    from transformers import AutoTokenizer

    from conftest import save_random_model
    from models import embedded_model_dir

    save_random_model(Path(folder), AutoTokenizer.from_pretrained(embedded_model_dir()), "llama")
    config = Path(folder) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 4096}))
    return folder


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    rows = read_jsonl(args.schemas, ())[: args.limit]
    with tempfile.TemporaryDirectory() as folder:
        for name in args.model_dir:
            decoder = JsonDecoder(*load_model(random_model(folder) if name == "random" else name))
            grammars, refused = [], []
            for row in rows:
                try:
                    grammars.append((row["id"], compile_schema(row["schema"], decoder.grammar_tokenizer, row["id"])))
                except InputError as error:
                    refused.append(str(error))
            print(f"{name}: {len(grammars)} of {len(rows)} schemas accepted")
            for line in refused if args.refusals else []:
                print(f"  refused {line}")
            prompt = PromptEncoder(decoder.tokenizer).prompt(idp_prompt(PROMPT))
            for budget in args.budgets:
                flags = infer_parser().parse_args(["--model_dir", name, "--max_new_tokens", str(budget)])
                start, kinds = time.perf_counter(), Counter()
                for first in range(0, len(grammars), args.batch_size):
                    part = grammars[first : first + args.batch_size]
                    drafts = decoder.generate([prompt] * len(part), [grammar for _, grammar in part], budget)
                    for (schema, grammar), draft in zip(part, drafts, strict=True):
                        extractor = Extractor(decoder, grammar, flags)
                        answer = extractor.checked(draft.text, draft.truncated)
                        if answer.get("error", {}).get("code") == "invalid":
                            kinds["retried"] += 1
                            (answer,) = extractor.extract([PROMPT])
                        kind = answer.get("error", {}).get("code", "document")
                        kinds[kind] += 1
                        kinds["truncated"] += bool(answer.get("truncated"))
                        if kind == "invalid":
                            print(f"  {schema}: {answer['error']['message']}")
                        if kind == "document":  # the last word again, apart from the script's own
                            grammar.validator.validate(json.loads(json.dumps(answer["json"], allow_nan=False)))
                share = kinds["document"] / len(grammars)
                print(f"  {budget} tokens: {share:.3f} documents, {dict(kinds)}, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    run_script(main)
