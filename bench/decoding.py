"""Compare the time to decode invoices under a schema with plain generation of as many tokens by the same model.

Three ways take turns over the same batches: our loop (tokens that the schema forces cost no forward each), `generate`
without a constraint, and `generate` with llguidance as a logits processor, the obvious implementation.

    python -m bench.decoding --model_dir runs/idp_sft
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench.report import report
from common import PromptEncoder
from distil.cli import new_parser, run_script
from distil.files import read_json, read_jsonl
from distil.generation import left_padded
from distil.idp.decoder import JsonDecoder
from distil.idp.documents import idp_prompt
from distil.idp.schema import SchemaGrammar, compile_schema
from distil.testing import ROOT, load_named


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--model_dir", default="smollm2-135m", help="base model or adapter (%(default)s)")
    add("--data", default=str(ROOT / "data/idp_validation.jsonl"), help="documents (%(default)s)")
    add("--schema", default=str(ROOT / "data/idp_schema.json"), help="(%(default)s)")
    add("--documents", type=int, default=32, help="(%(default)s)")
    add("--batch_size", type=int, nargs="+", default=[1, 8], help="(%(default)s)")
    add("--max_new_tokens", type=int, default=256, help="(%(default)s)")
    add("--json", action="store_true", help="print one JSON object on standard output")
    return parser


class GrammarProcessor:
    """Applies llguidance as a logits processor: a mask for every row and step."""

    def __init__(self, decoder: JsonDecoder, grammar: SchemaGrammar, rows: int, start: int):
        from llguidance import LLMatcher

        self.matchers = [LLMatcher(decoder.grammar_tokenizer, grammar.grammar) for _ in range(rows)]
        self.start, self.vocabulary = start, decoder.vocabulary

    def __call__(self, input_ids, scores):
        import numpy as np
        import torch

        for i, matcher in enumerate(self.matchers):
            if input_ids.shape[1] > self.start and not matcher.is_stopped():
                matcher.consume_token(int(input_ids[i, -1]))
            if matcher.is_stopped():
                continue
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            allowed = torch.from_numpy(bits[: self.vocabulary].astype(bool)).to(scores.device)
            scores[i].masked_fill_(~allowed, -torch.inf)
        return scores


def generate_freely(
    decoder: JsonDecoder, prompts: list[list[int]], max_new_tokens: int, min_new_tokens: int = 0, processor=None
) -> None:
    """Run `generate` greedily over the prompts, with a logits processor where there is one."""
    import torch
    from transformers import GenerationConfig

    inputs = left_padded(prompts, decoder.tokenizer.pad_token_id, decoder.model.device)
    config = GenerationConfig(
        min_new_tokens=min_new_tokens or None,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        pad_token_id=decoder.tokenizer.pad_token_id,
        eos_token_id=decoder.tokenizer.eos_token_id,
    )
    with torch.inference_mode():
        decoder.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            generation_config=config,
            logits_processor=[processor] if processor else [],
        )


def seconds(work: Callable, *args) -> tuple[float, Any]:
    """Return (seconds, result) of work(*args)."""
    start = time.perf_counter()
    result = work(*args)
    return time.perf_counter() - start, result


def compare(
    decoder: JsonDecoder, grammar: SchemaGrammar, prompts: list[list[int]], size: int, max_new_tokens: int
) -> dict[str, object]:
    """Return the figures of batches of `size`: seconds of our loop relative to the two other ways, tokens a second."""
    free, processed, written, ours_total = [], [], 0, 0.0
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        ours, drafts = seconds(decoder.generate, batch, [grammar] * len(batch), max_new_tokens)
        tokens = max(len(draft.tokens) for draft in drafts)
        written += sum(len(draft.tokens) for draft in drafts)
        ours_total += ours
        free.append(ours / seconds(generate_freely, decoder, batch, tokens, tokens)[0])
        mask = GrammarProcessor(decoder, grammar, len(batch), max(map(len, batch)))
        processed.append(ours / seconds(generate_freely, decoder, batch, max_new_tokens, 0, mask)[0])
    result: dict[str, object] = {}
    for name, ratios in (("unconstrained", free), ("logits_processor", processed)):
        low, high = (statistics.quantiles(ratios, n=10)[i] for i in (0, -1)) if len(ratios) > 1 else ratios * 2
        result[f"batch_{size}_seconds_vs_{name}"] = round(statistics.median(ratios), 3)
        result[f"batch_{size}_seconds_vs_{name}_p10_p90"] = [round(low, 3), round(high, 3)]
    result[f"batch_{size}_tokens_per_second"] = round(written / ours_total, 1)
    return result


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    decoder = JsonDecoder(*load_named(args.model_dir))
    encoder = PromptEncoder(decoder.tokenizer)
    grammar = compile_schema(read_json(args.schema), decoder.grammar_tokenizer)
    rows = read_jsonl(args.data, ("document",))[: args.documents]
    prompts = sorted((encoder.prompt(idp_prompt(row["document"])) for row in rows), key=len)
    result: dict[str, object] = {"model": args.model_dir, "documents": len(prompts)}
    decoder.generate(prompts[:1], [grammar], 32)  # first calls pack weights and build tables
    for size in args.batch_size:
        result |= compare(decoder, grammar, prompts, size, args.max_new_tokens)
    report(result, args.json)
    return 0


if __name__ == "__main__":
    run_script(main)
