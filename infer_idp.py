"""Turn documents into JSON that validates against a schema: one document, or a JSONL file of them.

Departures from prompting for JSON: the schema is checked before a model loads, every token is chosen among those the
schema allows, the document is closed before the token budget ends, and jsonschema has the last word. What does not
validate does not leave this script.

    python infer_idp.py --model_dir runs/idp_sft --schema data/idp_schema.json --document invoice.txt
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

from batch_files import check_files, parse_line, run_file
from files import InputError, file_sha256, read_text, run_script
from idp import Extractor, add_extraction_flags, check_extraction_flags, document_of
from models import model_fingerprint
from processes import only_one

SUFFIXES = "txt|text|md|log|json|jsonl|csv|tsv|pdf|html?|xml|eml|rtf|docx?|odt|xlsx?|png|jpe?g|tiff?"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--model_dir", required=True, help="base model id, model folder or adapter folder")
    add = parser.add_argument_group("documents").add_argument
    add("--document", help="a text, a file's name, or - for standard input")
    add("--input", help='JSONL of {"document"} (or {"input"}, which may be a whole user turn)')
    add("--output", help='JSONL to write: each input object with "json" and "truncated" added, in the same order')
    add("--overwrite", action="store_true", help="replace --output and forget an interrupted run's .part file")
    add_extraction_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def read_document(given: str) -> str:
    """The text of --document: standard input, a file, or the text itself. Raises InputError, also for what looks like
    the name of a file that is not there: taken as a text it would get an answer, and a wrong one."""
    if given == "-":
        text = sys.stdin.read()
    elif os.path.isfile(given):
        text = read_text(given)
    elif os.path.isdir(given):
        raise InputError(f"--document {given}: is a folder; give one file, or a JSONL file of documents to --input")
    elif looks_like_path(given):
        raise InputError(f"--document {given}: no such file (if it is the text itself, give --document - and pipe it)")
    else:
        text = given
    if not text.strip():
        raise InputError("--document is empty")
    return text


def looks_like_path(given: str) -> bool:
    """One line that ends like a file's name, begins like a path, is one word with a slash, or is in a folder there."""
    if "\n" in given or len(given) >= 1000:
        return False
    one_word = re.fullmatch(r"\S+", given) and re.search(r"[^\W\d_]", given)
    return bool(
        re.search(rf"\.({SUFFIXES})$", given, re.IGNORECASE)
        or re.match(r"(~|\.{0,2})/\S", given)
        or (one_word and ("/" in given or re.search(r"\w\.[A-Za-z]\w{0,5}$", given)))
        or ("/" in given and os.path.isdir(os.path.dirname(given)))
    )


def work_lines(extractor: Extractor, lines: list[str]) -> list[dict]:
    """The output object of each input line, in order."""
    results = [parse_line(line, ("document", "input")) for line in lines]
    good = [i for i, (_, document) in enumerate(results) if document is not None]
    for i, answer in zip(good, extractor.extract([document_of(results[i][1]) for i in good]), strict=True):
        results[i][0].update(answer)
    return [row for row, _ in results]


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if (args.document is None) == (args.input is None) or (args.input is None) != (args.output is None):
        raise InputError("give either --document, or --input and --output")
    check_extraction_flags(args)
    if args.document is not None:
        only_one("--document")
    document = read_document(args.document) if args.document is not None else None
    source, output = Path(args.input or ""), Path(args.output or "")
    total = check_files(source, output, args.overwrite) if args.input else 0
    extractor = Extractor.load(args.model_dir, args)
    if document is not None:
        (answer,) = work_lines(extractor, [json.dumps({"document": document})])
        if "error" in answer:
            print(f"infer_idp.py: error: {answer['error']['message']}", file=sys.stderr)
            return 2 if answer["error"]["code"] == "too_long" else 1
        if answer["truncated"]:
            print("the answer was closed early: raise --max_new_tokens", file=sys.stderr)
        print(json.dumps(answer["json"], ensure_ascii=False, indent=2))
        return 0
    settings = {name: value for name, value in vars(args).items() if name not in ("overwrite", "debug")}
    settings |= {"model": model_fingerprint(args.model_dir), "schema_sha256": file_sha256(args.schema)}
    failed = run_file(source, output, total, settings, 4 * args.batch_size, lambda lines: work_lines(extractor, lines))
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
