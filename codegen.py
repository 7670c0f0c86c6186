"""CodeGen: how a Python task is put to a model, in one stage or as plan and then code, and how its code is read.

Apart from common.py because it knows one task. Everything that turns a task into what the model sees is here once, so
that inference and evaluation ask as training did.
"""

from __future__ import annotations

import ast
import builtins
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import PromptEncoder
from files import InputError, read_jsonl, seed_number
from models import add_loading_flags, check_model_name, load_model, pack_for_decoding

if TYPE_CHECKING:
    import argparse


def codegen_prompt(task: str) -> str:
    """The user turn of the plain form; the answer is Python text and nothing else, without a Markdown fence."""
    return f"Write Python code for this task. Answer with the code only.\n{task.strip()}"


def codegen_plan_prompt(task: str) -> str:
    """The user turn of the plan form; the answer is that of `plan_answer`."""
    return (
        "Write Python code for this task. First give a short plan between <PLAN> and </PLAN>, "
        f"then the code between <CODE> and </CODE>.\n{task.strip()}"
    )


def plan_answer(plan: str, code: str) -> str:
    """The answer of the plan form: each tag on a line of its own."""
    return f"<PLAN>\n{plan.strip()}\n</PLAN>\n<CODE>\n{code.strip()}\n</CODE>"


def extract_code(answer: str) -> str:
    """The code in an answer: between its <CODE> tags, and there in the first Markdown fence, if there are any."""
    inside = re.search(r"<CODE>\n?(.*?)(?:</CODE>|\Z)", answer, re.DOTALL)
    answer = inside[1] if inside else answer.split("</CODE>")[0]
    before, fence, _ = answer.partition("```")
    if fence and not parses(answer):  # a fence in a text of the code itself is none
        if _bare_code(before):
            answer = before
        else:
            blocks = re.findall(r"```[^\S\n]*[\w+.-]*[^\S\n]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
            answer = next((block for block in blocks if parses(block)), blocks[0] if blocks else before)
    return answer.strip("\r\n").rstrip()


def _bare_code(before: str) -> bool:
    """Whether what stands before a fence is the answer's code, whole or as the body of a function. A bare word, which
    is Python too, is a heading."""
    heading = re.fullmatch(r"\s*\w+[:.]?\s*", before)
    return not heading and (parses(before) or parses(f"if True:\n{before}"))


def plan_ended(written: str) -> bool:
    """Whether nothing of what a model writes after <PLAN> belongs to the plan any more."""
    return "</PLAN>" in written or "<CODE>" in written


def code_ended(written: str) -> bool:
    """Whether an answer's code is complete: its tag or Markdown fence is closed, or a fence follows bare code. An
    opening fence, whatever stands before it, ends nothing."""
    before, *fences = re.split(r"^```", written, flags=re.MULTILINE)
    return "</CODE>" in written or len(fences) > 1 or (bool(fences) and _bare_code(before))


def parses(code: str) -> bool:
    """Whether the code is Python with at least one statement."""
    try:
        return bool(ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def flaw_of_tests(tests: Sequence[str]) -> str | None:
    """Why tests would say nothing of an answer, if so: no Python, or no assert, raise or call outside of functions."""
    able = False
    for test in tests:
        try:
            waiting: list[ast.AST] = [ast.parse(test)]
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return f"the tests are not Python: {error}"
        while waiting:
            node = waiting.pop()
            asserts = isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant)
            able |= asserts or isinstance(node, (ast.Raise, ast.Call))
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                waiting += ast.iter_child_nodes(node)
    return None if able else "nothing in the tests can fail (functions such as test_x must be called)"


# ------------------------------------------------------------------------------------------------------------ tasks


@dataclass(frozen=True)
class Task:
    """A task with what checks an answer. tests: statements that raise where they fail; setup: code before them;
    prefix: code that an answer may leave out, as HumanEval's function head."""

    name: str
    prompt: str
    tests: tuple[str, ...]
    setup: str = ""
    prefix: str = ""
    reference: str | None = None

    def program(self, code: str) -> str:
        """The program that the tests follow."""
        head = re.search(r"^(?:async )?def \w+", self.prefix, re.MULTILINE)
        if head and not re.search(rf"^{re.escape(head[0])}\b", code, re.MULTILINE):
            code = self.prefix + code  # a completion of the body
        elif head:
            code = self.prefix[: head.start()] + code  # its imports and helpers
        return f"{code}\n{self.setup}\n"


def _names(prompt: str, name: str) -> bool:
    """Whether a prompt names a function or class; a plain word ("split") only where it stands as a name."""
    as_name = rf"(?:`|\b(?:function|class|generator|named|called) ){name}\b|\b{name}\("
    return bool(re.search(as_name if name.isalpha() and name.islower() else rf"\b{name}\b", prompt))


def task_of(row: dict, where: str) -> Task:
    """A task from a line of HumanEval or MBPP as they are published, or of ours: {"prompt", "tests"}.

    Raises InputError. Where a prompt names none of the functions that the tests call, as in MBPP, the tests are shown
    with it; a name that is a plain word of the prompt ("split") counts where it stands as code: `split` or split(."""
    published = ("entry_point", "test")
    if all(name in row for name in published):
        for name in (*published, "prompt"):
            if not isinstance(row.get(name), str):
                raise InputError(f'{where}: "{name}" is a string in HumanEval\'s form')
        text = f"Complete this function.\n{row['prompt']}"
        tests = (f"{row['test']}\ncheck({row['entry_point']})",)
        reference = row["prompt"] + row["canonical_solution"] if "canonical_solution" in row else None
        return Task(str(row.get("task_id", where)), text, tests, "", row["prompt"], reference)
    prompt = row.get("prompt", row.get("text"))
    tests = row.get("tests", row.get("test_list"))
    if isinstance(tests, str):
        tests = [tests]
    if not isinstance(prompt, str) or not prompt.strip() or not isinstance(tests, list) or not tests:
        raise InputError(f'{where}: needs "prompt" (or "text") and "tests" (or "test_list"), or HumanEval\'s fields')
    if not all(isinstance(test, str) for test in tests):
        raise InputError(f'{where}: "tests" is a list of strings or one string')
    if problem := flaw_of_tests(tests):
        raise InputError(f"{where}: {problem}")
    imports, code = row.get("test_imports") or [], row.get("test_setup_code") or ""
    if not isinstance(imports, list) or not all(isinstance(text, str) for text in (*imports, code)):
        raise InputError(f'{where}: "test_imports" is a list of strings, "test_setup_code" a string')
    setup = "\n".join([*imports, code]).strip()
    reference = next((row[key] for key in ("reference", "solution", "code") if isinstance(row.get(key), str)), None)
    called = set(re.findall(r"\b([A-Za-z_]\w*)\s*\(", " ".join(tests))) - set(dir(builtins)) - {"assert"}
    if not any(_names(prompt, name) for name in called):
        prompt = "\n".join([prompt.strip(), "It must pass these tests:", *tests])
    return Task(str(row.get("task_id", where)), prompt, tuple(tests), setup, "", reference)


def read_tasks(path: str | Path) -> list[Task]:
    """Tasks of a JSONL file. Raises InputError with the line and what is wrong."""
    return [task_of(row, f"{path}: row {number}") for number, row in enumerate(read_jsonl(path, ()), 1)]


# ---------------------------------------------------------------------------------------------------- using a model


def add_codegen_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every script that lets a model write code."""
    add = parser.add_argument_group("generation").add_argument
    add("--max_new_tokens", type=int, default=384, help="budget of a plan, and of the code (%(default)s)")
    add("--temperature", type=float, help="0 is greedy (default: 0 for one sample, 0.8 for several)")
    add("--seed", type=seed_number, default=0, help="of the samples (%(default)s)")
    add("--batch_size", type=int, default=16, help="answers written together (%(default)s)")
    add_loading_flags(parser)


def check_codegen_flags(args: argparse.Namespace) -> None:
    """Raises InputError for flags out of range."""
    if args.max_new_tokens < 1 or args.batch_size < 1 or args.n < 1:
        raise InputError("--max_new_tokens, --batch_size and --n are at least 1")
    if args.temperature is not None and not 0 <= args.temperature <= 5:
        raise InputError("--temperature is from 0 to 5")
    if args.temperature is None:
        args.temperature = 0.0 if args.n == 1 else 0.8
    if args.n > 1 and args.temperature == 0:
        raise InputError("--n above 1 with --temperature 0 would give the same answer each time")


class Coder:
    """A loaded model that writes code. The plan form has two stages: the plan, then the code after `</PLAN>`."""

    def __init__(self, model: Any, tokenizer: Any, args: argparse.Namespace):
        pack_for_decoding(model)
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.encoder = PromptEncoder(tokenizer)
        configured = model.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        named = [tokenizer.eos_token, self.encoder.end_of_turn, tokenizer.pad_token, "<|endoftext|>", "<|im_end|>"]
        known = tokenizer.get_added_vocab()
        ends += [known[token] for token in named if token in known]
        self.ends = sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})
        # A model without a chat template is no assistant: an open code block tells it where it is.
        self.opening = "" if tokenizer.chat_template else "```python\n"

    @classmethod
    def load(cls, model_dir: str, args: argparse.Namespace) -> Coder:
        """Load a base, folder or adapter with the flags of `add_codegen_flags`. Raises InputError."""
        check_model_name(model_dir)
        return cls(*load_model(model_dir, args.quantization, args.compute_dtype, args.offload_folder), args)

    def fits(self, prompt: str, plan: bool) -> bool:
        """Whether a prompt and the code, with `plan` a plan before it too, fit the context."""
        context = self.model.config.get_text_config().max_position_embeddings
        turn = codegen_plan_prompt(prompt) if plan else codegen_prompt(prompt)
        room = (2 if plan else 1) * self.args.max_new_tokens + 32  # 32: tags or an opening fence
        return len(self.encoder.prompt(turn)) + room <= context

    def answers(self, prompts: Sequence[str], plan: bool, progress: str | None = None) -> list[dict[str, Any]]:
        """{"code", "parses", "tokens", with plan also "plan"} for each prompt, in order. Repeat a prompt for samples.

        tokens: how many the model wrote, plan included. Raises InputError for a prompt that does not fit."""
        encode = self.encoder.text
        if not plan:
            starts = [self.encoder.prompt(codegen_prompt(prompt)) + encode(self.opening) for prompt in prompts]
            written = self.generate(starts, lambda text: code_ended(self.opening + text), progress)
            return [_answer(extract_code(self.opening + text), tokens) for text, tokens in written]
        starts = [self.encoder.prompt(codegen_plan_prompt(prompt)) + encode("<PLAN>\n") for prompt in prompts]
        plans = self.generate(starts, plan_ended, progress and f"{progress}: plans")
        texts = [re.split(r"</?PLAN>|</?CODE>", text)[0].strip() for text, _ in plans]
        starts = [
            self.encoder.prompt(codegen_plan_prompt(prompt)) + encode(f"<PLAN>\n{text}\n</PLAN>\n<CODE>\n")
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        written = self.generate(starts, code_ended, progress and f"{progress}: code")
        return [
            _answer(extract_code(f"<CODE>\n{code}"), tokens + plan_tokens) | {"plan": text}
            for (code, tokens), text, (_, plan_tokens) in zip(written, texts, plans, strict=True)
        ]

    def generate(
        self, starts: Sequence[list[int]], ended: Callable[[str], bool], progress: str | None = None
    ) -> list[tuple[str, int]]:
        """(text, tokens written) that follows each start (token ids), to an end token, the token with which `ended` is
        true of the text, or the budget. Raises InputError for a start that does not fit the context."""
        import torch
        from tqdm import tqdm
        from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

        class Ended(StoppingCriteria):
            """Looks at what was written alone: transformers' stop strings may begin in the prompt."""

            def __call__(self, input_ids, scores, **kwargs):
                texts = decode(input_ids[:, width:])
                return torch.tensor([ended(text) for text in texts], device=input_ids.device)

        decode = functools.partial(self.tokenizer.batch_decode, clean_up_tokenization_spaces=False)

        context = self.model.config.get_text_config().max_position_embeddings
        longest = max(len(start) for start in starts)
        if longest + self.args.max_new_tokens > context:
            raise InputError(
                f"a prompt of {longest} tokens and --max_new_tokens {self.args.max_new_tokens} exceed the context of "
                f"{context}; shorten the prompt or lower --max_new_tokens"
            )
        sampling = {"do_sample": True, "temperature": self.args.temperature, "top_k": 0, "top_p": 0.95}
        config = GenerationConfig(
            max_new_tokens=self.args.max_new_tokens,
            eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id,
            repetition_penalty=1.0,
            **(sampling if self.args.temperature else {"do_sample": False}),
        )
        torch.manual_seed(self.args.seed)
        order = sorted(range(len(starts)), key=lambda i: len(starts[i]))
        results: list[tuple[str, int]] = [("", 0)] * len(starts)
        size = self.args.batch_size
        for first in tqdm(range(0, len(order), size), desc=progress, unit="batch", disable=progress is None):
            chosen = order[first : first + size]
            width = max(len(starts[i]) for i in chosen)
            pads = [width - len(starts[i]) for i in chosen]
            filler = self.tokenizer.pad_token_id
            ids = torch.tensor([[filler] * p + starts[i] for p, i in zip(pads, chosen, strict=True)])
            mask = torch.tensor([[0] * p + [1] * (width - p) for p in pads])
            with torch.inference_mode():
                made = self.model.generate(
                    input_ids=ids.to(self.model.device),
                    attention_mask=mask.to(self.model.device),
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList([Ended()]),
                )
            for i, row in zip(chosen, made[:, width:].tolist(), strict=True):
                end = next((k for k, token in enumerate(row) if token in self.ends), len(row))
                text = self.tokenizer.decode(row[:end], clean_up_tokenization_spaces=False)
                results[i] = (text, min(end + 1, len(row)))
        return results


def _answer(code: str, tokens: int) -> dict[str, Any]:
    return {"code": code, "parses": parses(code), "tokens": tokens}
