"""Turn documents into JSON that validates against a schema: one document, or a JSONL file of them.

Departures from prompting for JSON: the schema is checked before a model loads, every token is chosen among those the
schema allows, the document is closed before the token budget ends, and jsonschema checks the result. Only JSON that
validates is written.

    python infer_idp.py --model_dir runs/idp_sft --schema data/idp_schema.json --document invoice.txt
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys

from distil.batch import add_file_flags, answer_file, check_one_or_file, parse_line
from distil.cli import InputError, new_parser, refuse_unused, run_script, unused_engine
from distil.files import read_text
from distil.idp.extractor import ExtractOptions, Extractor, add_extraction_flags, extract_options
from distil.models import ModelRef, resolve

SUFFIXES = "txt|text|md|log|json|jsonl|csv|tsv|pdf|html?|xml|eml|rtf|docx?|odt|xlsx?|png|jpe?g|tiff?"


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument_group("model").add_argument
    add("--model_dir", required=True, help="base model id, model folder or adapter folder")
    add = parser.add_argument_group("documents").add_argument
    add("--document", help="a text, a file's name, or - for standard input")
    source = 'JSONL of {"document"} (or {"input"}, which may be a complete user turn)'
    add_file_flags(add, source, 'JSONL to write: each input object with "json" and "truncated" added, in order')
    add_extraction_flags(parser)
    return parser


def read_document(name: str) -> str:
    """Return the text of --document: standard input, a file, or the text itself.
    Raises InputError, also for what looks like the name of a missing file: taken as a text it would get an answer."""
    if name != "-" and os.path.isdir(name):
        raise InputError(f"--document {name}: is a folder; give one file, or a JSONL file of documents to --input")
    is_file = os.path.isfile(name)
    if name != "-" and not is_file and looks_like_path(name):
        raise InputError(f"--document {name}: no such file (if it is the text itself, give --document - and pipe it)")
    text = sys.stdin.read() if name == "-" else read_text(name) if is_file else name
    if not text.strip():
        raise InputError("--document is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # Python's form of bytes on a command line
        raise InputError("--document is not UTF-8 text")
    return text


def looks_like_path(text: str) -> bool:
    """Return whether a text is one line that ends like a file's name, begins like a path, is one word with a slash, or
    is in a folder that exists."""
    if "\n" in text or len(text) >= 1000:
        return False
    one_word = re.fullmatch(r"\S+", text) and re.search(r"[^\W\d_]", text)
    if re.search(rf"\.({SUFFIXES})$", text, re.IGNORECASE) or re.match(r"(~|\.{0,2})/\S", text):
        return True
    if one_word and re.search(r"/|\w\.[A-Za-z]\w{0,5}$", text):
        return True
    return "/" in text and os.path.isdir(os.path.dirname(text))


def work_lines(extractor: Extractor, lines: list[str]) -> list[dict]:
    """Return the output object of each input line, in order."""
    results = [parse_line(line, ("document", "input")) for line in lines]
    good = [i for i, (_, document) in enumerate(results) if document is not None]
    documents = [extractor.options.prompt.document_of(results[i][1]) for i in good]
    for i, answer in zip(good, extractor.extract(documents), strict=True):
        results[i][0].update(answer)
    return [row for row, _ in results]


def start(options: ExtractOptions, ref: ModelRef) -> tuple:
    """Return what `answer_file` needs of a model: lines between two writes, work, contents behind the flags."""
    work = functools.partial(work_lines, Extractor.load(ref, options))
    return 4 * options.batch_size, work, {"schema_sha256": options.schema_sha256}


def print_answer(answer: dict) -> int:
    """Print the answer to one document; return the exit status."""
    if "error" in answer:
        print(f"infer_idp.py: error: {answer['error']['message']}", file=sys.stderr)
        return 2 if answer["error"]["code"] == "too_long" else 1
    if answer["truncated"]:
        print("the answer was closed early: raise --max_new_tokens", file=sys.stderr)
    print(json.dumps(answer["json"], ensure_ascii=False, indent=2))
    return 0


def main(argv: list[str] | None = None) -> int:
    args = (parser := build_parser()).parse_args(argv)
    flags = vars(args)
    check_one_or_file(flags, "document")
    unused = {"only for retries, and --retries is 0": [] if args.retries else ["seed"]}
    refuse_unused(parser, argv, unused | unused_engine(flags))
    if args.document is not None:
        document, options = read_document(args.document), extract_options(flags)
        extractor = Extractor.load(resolve(args.model_dir), options)
        return print_answer(*extractor.extract([extractor.options.prompt.document_of(document)]))
    return answer_file(flags, functools.partial(start, extract_options(flags)))


if __name__ == "__main__":
    run_script(main)
