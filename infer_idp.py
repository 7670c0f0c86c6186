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
from collections.abc import Iterable

from distil.batch import add_file_flags, answer_file, check_one_or_file, parse_line
from distil.cli import InputError, gold_share, new_parser, refuse_unused, run_script, unused_engine
from distil.files import check_writable, read_text
from distil.idp.documents import DocumentPrompt
from distil.idp.extractor import ExtractOptions, Extractor, add_extraction_flags, extract_options
from distil.idp.pdf import is_pdf, pdf_text
from distil.idp.review import marked, write_page
from distil.models import ModelRef, resolve
from distil.processes import rank_and_world

SUFFIXES = "txt|text|md|log|json|jsonl|csv|tsv|pdf|html?|xml|eml|rtf|docx?|odt|xlsx?|png|jpe?g|tiff?"


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument_group("model").add_argument
    add("--model_dir", required=True, help="base model id, model folder or adapter folder")
    add = parser.add_argument_group("documents").add_argument
    add("--document", help="a text, a file's name (text or PDF), or - for standard input")
    source = 'JSONL of {"document"} (or {"input"}, which may be a complete user turn)'
    add_file_flags(add, source, 'JSONL to write: each input object with "json" and "truncated" added, in order')
    add = parser.add_argument_group("review, which includes --evidence").add_argument
    add("--review_below", type=gold_share, metavar="P", help='values with less confidence get "review": true')
    add("--review_page", metavar="FILE.html", help="page to write: the documents with their values, least sure first")
    add_extraction_flags(parser)
    return parser


def read_document(name: str) -> str:
    """Return the text of --document: standard input, a file (of a PDF its text layer), or the text itself.
    Raises InputError, also for what looks like the name of a missing file: taken as a text it would get an answer."""
    if name != "-" and os.path.isdir(name):
        raise InputError(f"--document {name}: is a folder; give one file, or a JSONL file of documents to --input")
    is_file = os.path.isfile(name)
    if name != "-" and not is_file and looks_like_path(name):
        raise InputError(f"--document {name}: no such file (if it is the text itself, give --document - and pipe it)")
    read = pdf_text if is_file and is_pdf(name) else read_text
    text = sys.stdin.read() if name == "-" else read(name) if is_file else name
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


def work_lines(extractor: Extractor, lines: list[str], below: float | None = None) -> list[dict]:
    """Return the output object of each input line, in order; values with a confidence `below` are marked."""
    results = [parse_line(line, ("document", "input")) for line in lines]
    for row, _ in results:
        for name in ("json", "truncated", "evidence"):  # of an earlier run
            row.pop(name, None)
    good = [i for i, (_, document) in enumerate(results) if document is not None]
    documents = [extractor.options.prompt.document_of(results[i][1]) for i in good]
    for i, answer in zip(good, extractor.extract(documents), strict=True):
        results[i][0].update(marked(answer, below))
    return [row for row, _ in results]


def start(options: ExtractOptions, below: float | None, ref: ModelRef) -> tuple:
    """Return what `answer_file` needs of a model: lines between two writes, work, contents behind the flags."""
    extractor = Extractor.load(ref, options)
    contents = {"schema_sha256": options.schema_sha256} | ({"confidence": w} if (w := extractor.weights) else {})
    return 4 * options.batch_size, functools.partial(work_lines, extractor, below=below), contents


def review(answers: Iterable[dict], prompt: DocumentPrompt, below: float | None, page: str | None) -> None:
    """Write the page of answers, objects with "document" (or "input"), and report how many values to check."""
    shown, values, flagged = {}, 0, 0
    for number, row in enumerate(answers, 1):
        values += len(evidence := row.get("evidence", ()))
        flagged += sum("review" in one for one in evidence)
        if page and "json" in row:
            shown[number] = prompt.document_of(row.get("document") or row["input"]), row
    if page:
        write_page(page, shown)
    if below is not None:
        print(f"to check: {flagged} of {values} values, those with a confidence below {below:g}", file=sys.stderr)


def print_answer(answer: dict) -> int:
    """Print the answer to one document, with its evidence if it has some; return the exit status."""
    if "error" in answer:
        print(f"infer_idp.py: error: {answer['error']['message']}", file=sys.stderr)
        return 2 if answer["error"]["code"] == "too_long" else 1
    if answer["truncated"]:
        print("the answer was closed early: raise --max_new_tokens", file=sys.stderr)
    shown = {name: answer[name] for name in ("json", "evidence")} if "evidence" in answer else answer["json"]
    print(json.dumps(shown, ensure_ascii=False, indent=2))
    return 0


def main(argv: list[str] | None = None) -> int:
    args = (parser := build_parser()).parse_args(argv)
    below, page = args.review_below, args.review_page
    flags = vars(args) | {"evidence": args.evidence or below is not None or page is not None}
    check_one_or_file(flags, "document")
    unused = {"only for retries, and --retries is 0": [] if args.retries else ["seed"]}
    unused |= {"--url gives no log-probabilities": ["review_below"] if args.url else []}
    refuse_unused(parser, argv, unused | unused_engine(flags))
    if page:
        check_writable(page)
        used = {name: os.path.realpath(flags[name]) for name in ("document", "input", "output") if flags[name]}
        if same := [name for name, path in used.items() if path == os.path.realpath(page)]:
            raise InputError(f"--review_page {page}: is the --{same[0]}; choose another name")
    if args.document is not None:
        document, options = read_document(args.document), extract_options(flags)
        extractor = Extractor.load(resolve(args.model_dir), options)
        prompt = extractor.options.prompt
        (answer,) = extractor.extract([document := prompt.document_of(document)])
        review([{"document": document} | marked(answer, below)], prompt, below, page)
        return print_answer(answer)
    options = extract_options(flags)
    status = answer_file(flags, functools.partial(start, options, below))
    if (page or below is not None) and rank_and_world()[0] == 0:
        with open(args.output, encoding="utf-8") as lines:
            review(map(json.loads, lines), options.for_model(resolve(args.model_dir)).prompt, below, page)
    return status


if __name__ == "__main__":
    run_script(main)
