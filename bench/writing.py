"""Compare the speed at which documents are turned into JSON here and by llama.cpp's server, on the same weights.

All ways take turns over the same documents, one at a time and several together, under the same schema, so that a busy
machine is as busy for each. Measured for each way: wall and CPU seconds a document (of the process that computes, the
prompt included), tokens written a CPU second, and the share of documents with the same JSON as the first way.

    OMP_NUM_THREADS=1 python -m bench.writing --model_dir runs/idp_merged --gguf runs/idp_merged/*.gguf \\
        --server "llama-server -m {file} --port {port} -c 16384 -np 8 -t 1 -tb 1"
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from bench.engine import cpu_seconds, served
from bench.report import report
from common import PromptEncoder
from distil.cli import new_parser, run_script
from distil.endpoint import Server
from distil.engine import ServedModel
from distil.files import read_json, read_jsonl
from distil.generation import load_to_write
from distil.idp.copying import CopyGrammar, Vocabulary
from distil.idp.decoder import JsonDecoder
from distil.idp.documents import task_of_model
from distil.idp.extractor import ServedDecoder
from distil.idp.schema import compile_schema
from distil.models import LoadOptions, load, resolve
from distil.testing import ROOT

# How a model runs here: with the layers that it was loaded with, or as infer_idp.py has it; without and with guesses.
HERE = {
    "nf4 as loaded": (load, "nf4", False),
    "float32 as loaded": (load, "none", False),
    "nf4": (load_to_write, "nf4", True),
    "float32": (load_to_write, "none", True),
    "float32 without guesses": (load_to_write, "none", False),
}


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--model_dir", required=True, help="merged folder of a student of documents")
    add("--gguf", nargs="*", default=[], help="GGUF files of it")
    server = "llama-server -m {file} --port {port} -c 16384 -np 8"
    add("--server", default=server, help="command that serves {file} at {port} (%(default)s)")
    add("--here", nargs="+", choices=HERE, default=["float32", "nf4"], help="(%(default)s)")
    add("--data", default=str(ROOT / "data/idp_validation.jsonl"), help="documents (%(default)s)")
    add("--schema", default=str(ROOT / "data/idp_schema.json"), help="(%(default)s)")
    add("--copy", nargs="+", default=[], help="also write here with these fields copied")
    add("--documents", type=int, default=16, help="(%(default)s)")
    add("--batch_size", type=int, nargs="+", default=[1, 8], help="(%(default)s)")
    add("--max_new_tokens", type=int, default=256, help="(%(default)s)")
    add("--json", action="store_true", help="print one JSON object on standard output")
    return parser


def written(decoder: JsonDecoder, budget: int, grammar_of: Any, prompts: list, documents: list) -> list:
    """Return [(text, tokens)] of answers to documents. grammar_of: the grammar of a document."""
    drafts = decoder.generate(prompts, [grammar_of(document) for document in documents], budget)
    return [(draft.text or "", len(draft.tokens)) for draft in drafts]


def local_ways(args: argparse.Namespace) -> dict[str, tuple[Any, psutil.Process]]:
    """Return {way: (function of prompts and documents that returns [(text, tokens)], process)} of models here."""
    ways: dict[str, tuple[Any, psutil.Process]] = {}
    for name in args.here:
        loading, quantization, guesses = HERE[name]
        decoder: Any = JsonDecoder(*loading(resolve(args.model_dir), LoadOptions(quantization, "float32")))
        if not guesses:
            decoder._guess = lambda draft, most: []
        grammar = compile_schema(read_json(args.schema), decoder.grammar_tokenizer)
        write = partial(written, decoder, args.max_new_tokens)
        ways[name] = partial(write, lambda _, grammar=grammar: grammar), psutil.Process()
        if args.copy:
            copied = partial(CopyGrammar, grammar, Vocabulary(decoder.grammar_tokenizer), fields=tuple(args.copy))
            ways[f"{name}, copied"] = partial(write, copied), psutil.Process()
    return ways


def served_way(args: argparse.Namespace, url: str, size: int) -> Any:
    """Return a function as those of `local_ways`, by a server."""
    import httpx2

    name = httpx2.get(f"{url}/v1/models").json()["data"][0]["id"]
    engine = ServedModel(Server(f"{url}/v1", name, concurrency=size, timeout=3600), args.model_dir)
    how = ServedDecoder(engine, read_json(args.schema)).how | {"cache_prompt": False}  # each turn reads its prompts

    def write(prompts: list, documents: list) -> list:
        return [(one.text, one.tokens) for one in engine.write(prompts, args.max_new_tokens, **how)]

    return write


def value_of(text: str) -> Any:
    """Return the JSON value of a text, the text where it is cut."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    rows, schema = read_jsonl(args.data, ("document",))[: args.documents], read_json(args.schema)
    with contextlib.ExitStack() as stack:
        ways = local_ways(args)
        for file in args.gguf:
            url, process = stack.enter_context(served(args.server, file))
            ways[Path(file).name] = served_way(args, url, max(args.batch_size)), process
        from transformers import AutoTokenizer

        ref = resolve(args.model_dir)
        encoder, turn = PromptEncoder(AutoTokenizer.from_pretrained(ref.path)), task_of_model(ref).prompt(schema).turn
        prompts = [encoder.prompt(turn(row["document"])) for row in rows]
        result: dict[str, Any] = {"documents": len(rows), "prompt_tokens": statistics.mean(map(len, prompts))}
        for write, _ in ways.values():
            write([encoder.prompt(turn("Pen 1.00"))], ["Pen 1.00"])  # first calls build tables
        for size in args.batch_size:
            answers: dict[str, list] = {way: [] for way in ways}
            wall, used = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
            for start in range(0, len(rows), size):
                documents = [row["document"] for row in rows[start : start + size]]
                for way, (write, process) in ways.items():
                    began, cpu = time.perf_counter(), cpu_seconds(process)
                    answers[way] += write(prompts[start : start + size], documents)
                    wall[way] += time.perf_counter() - began
                    used[way] += cpu_seconds(process) - cpu
                print(f"{size} at a time: {start + len(documents)} of {len(rows)} documents", file=sys.stderr)
            first = [value_of(text) for text, _ in answers[next(iter(ways))]]
            for way, pairs in answers.items():
                same = sum(value_of(text) == other for (text, _), other in zip(pairs, first, strict=True))
                result[f"{way}, {size} at a time"] = {
                    "tokens_a_document": round(statistics.mean(tokens for _, tokens in pairs), 1),
                    "wall_seconds_a_document": round(wall[way] / len(rows), 3),
                    "cpu_seconds_a_document": round(used[way] / len(rows), 3),
                    "tokens_a_cpu_second": round(sum(tokens for _, tokens in pairs) / used[way], 2),
                    "same_json": round(same / len(rows), 3),
                }
    report(result, args.json)
    return 0


if __name__ == "__main__":
    run_script(main)
