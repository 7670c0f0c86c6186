"""A loaded model that writes code, directly or as a plan and then the code."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from common import InputError, PromptEncoder
from distil.cli import add_engine_flags, add_loading_flags, loading_options, seed_number
from distil.codegen import tasks
from distil.engine import ServedModel
from distil.generation import Written, generate
from distil.models import LoadOptions, ModelRef, load
from distil.support import context_length
from distil.workarounds import pack_for_decoding

FENCE = "```python\n"
TAG_TOKENS = 32  # room in the context for tags or an opening fence


@dataclass(frozen=True)
class CodegenOptions:
    """How code is written. n: answers to each task; max_new_tokens: budget of a plan, and of the code."""

    n: int = 1
    max_new_tokens: int = 384
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 16
    load: LoadOptions = field(default_factory=LoadOptions)


def add_codegen_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every script that lets a model write code; `codegen_options` reads them."""
    add = parser.add_argument_group("generation").add_argument
    add("--max_new_tokens", type=int, default=384, help="budget of a plan, and of the code (%(default)s)")
    add("--temperature", type=float, help="0 is greedy (default: 0 for one sample, 0.8 for several)")
    add("--seed", type=seed_number, default=0, help="of the samples (%(default)s)")
    add("--batch_size", type=int, default=16, help="answers written together (%(default)s)")
    add_loading_flags(parser)
    add_engine_flags(parser)


def codegen_options(flags: Mapping[str, Any]) -> CodegenOptions:
    """Return the checked options of `add_codegen_flags` and --n; --seconds is checked too. Raises InputError."""
    values = {name: flags[name] for name in ("n", "max_new_tokens", "temperature", "seed", "batch_size")}
    if min(values["n"], values["max_new_tokens"], values["batch_size"]) < 1:
        raise InputError("--max_new_tokens, --batch_size and --n are at least 1")
    if flags["seconds"] <= 0:
        raise InputError("--seconds is above 0")
    if values["temperature"] is None:
        values["temperature"] = 0.0 if values["n"] == 1 else 0.8
    if not 0 <= values["temperature"] <= 5:
        raise InputError("--temperature is from 0 to 5")
    if values["n"] > 1 and values["temperature"] == 0:
        raise InputError("--n above 1 with --temperature 0 would give the same answer each time")
    return CodegenOptions(**values, load=loading_options(flags))


class Coder:
    """A loaded model that writes code. The plan form has two stages: the plan, then the code after `</PLAN>`."""

    def __init__(self, model: Any, tokenizer: Any, options: CodegenOptions):
        pack_for_decoding(model)
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.context = context_length(model.config.get_text_config())
        self.encoder = PromptEncoder(tokenizer)
        configured, vocabulary = model.generation_config.eos_token_id, tokenizer.get_added_vocab()
        ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
        named = [tokenizer.eos_token, self.encoder.end_of_turn, tokenizer.pad_token, "<|endoftext|>", "<|im_end|>"]
        self.ends = sorted((ends | {vocabulary.get(token) for token in named}) - {None})
        # A model without a chat template is not an assistant: an open code block shows it what to write.
        self.opening = "" if tokenizer.chat_template else FENCE

    @classmethod
    def load(cls, ref: ModelRef, options: CodegenOptions) -> Self:
        """Load a resolved model, or use that of an engine. Raises InputError."""
        if server := options.load.server:
            return ServedCoder(ServedModel(server, ref.path), options)
        return cls(*load(ref, options.load), options)

    def fits(self, prompt: str, plan: bool) -> bool:
        """Return whether a prompt and the code, with `plan` a plan before it too, fit the context."""
        turn = tasks.codegen_plan_prompt(prompt) if plan else tasks.codegen_prompt(prompt)
        room = (2 if plan else 1) * self.options.max_new_tokens + TAG_TOKENS
        return len(self.encoder.prompt(turn)) + room <= self.context

    def answers(self, prompts: Sequence[str], plan: bool, progress: str | None = None) -> list[dict[str, Any]]:
        """Return {"code", "parses", "tokens", with plan also "plan"} for each prompt, in order.
        Repeat a prompt for samples. tokens: written, plan included. Raises InputError for too long a prompt."""
        encode, turn_of = self.encoder.text, self.encoder.prompt
        if not plan:
            starts = [turn_of(tasks.codegen_prompt(prompt)) + encode(self.opening) for prompt in prompts]
            results = self.write(starts, lambda text: tasks.code_ended(self.opening + text), progress)
            return [_answer(self.opening + written.text, written.tokens) for written in results]
        turns = [turn_of(tasks.codegen_plan_prompt(prompt)) for prompt in prompts]
        starts = [turn + encode("<PLAN>\n") for turn in turns]
        plans = self.write(starts, tasks.plan_ended, progress and f"{progress}: plans")
        texts = [re.split(r"</?PLAN>|</?CODE>", written.text)[0].strip() for written in plans]
        starts = [turn + encode(f"<PLAN>\n{text}\n</PLAN>\n<CODE>\n") for turn, text in zip(turns, texts, strict=True)]
        codes = self.write(starts, tasks.code_ended, progress and f"{progress}: code")
        return [
            _answer(f"<CODE>\n{code.text}", code.tokens + first.tokens) | {"plan": text}
            for code, text, first in zip(codes, texts, plans, strict=True)
        ]

    def write(self, starts: Sequence[list], stop: Callable[[str], bool], progress: str | None = None) -> list[Written]:
        """Return what follows each start (token ids), to an end token, to where stop(text) is true, or the budget.
        Raises InputError for a start that does not fit the context."""
        import torch

        options = self.options
        torch.manual_seed(options.seed)
        how = (options.max_new_tokens, self.ends, options.batch_size, options.temperature, stop, progress)
        return generate(self.model, self.tokenizer, starts, *how, top_k=0, top_p=0.95)


class ServedCoder(Coder):
    """A Coder whose texts an engine writes."""

    def __init__(self, engine: ServedModel, options: CodegenOptions):
        self.engine, self.options, self.encoder, self.context = engine, options, engine.encoder, engine.context
        self.opening = "" if engine.tokenizer.chat_template else FENCE

    def write(self, starts: Sequence[list], stop: Callable[[str], bool], progress: str | None = None) -> list[Written]:
        """Return what follows each start, as `Coder.write`."""
        how = self.options.max_new_tokens, self.options.temperature, self.options.seed, stop, progress
        return self.engine.write(starts, *how, **({"top_p": 0.95} if self.options.temperature else {}))


def _answer(text: str, tokens: int) -> dict[str, Any]:
    code = tasks.extract_code(text)
    return {"code": code, "parses": tasks.parses(code), "tokens": tokens}
