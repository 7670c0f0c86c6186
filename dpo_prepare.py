"""Preference pairs from the student itself: its answers, judged by the task's own check, the best against the worst.

Departures from pairing a gold answer with a random one: both answers are what this student says, so the pair lies
where its probability lies. For label tasks the rejected label is the student's most likely wrong one. Pairs without
contrast are dropped and counted.

    python dpo_prepare.py --task label --model_dir runs/creditmix_sft --input data/creditmix_sft.jsonl --output a.jsonl
    python dpo_prepare.py --task json --model_dir runs/idp_sft --input data/idp_sft.jsonl --output b.jsonl
    python dpo_prepare.py --task code --model_dir runs/codegen_sft --input tasks.jsonl --output c.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any

from batch_files import AnswerFile, check_output
from files import (
    InputError,
    file_sha256,
    note_preparation,
    parse_json,
    read_json,
    read_jsonl,
    run_script,
    seed_number,
    unchanged_preparation,
    write_jsonl,
)
from models import add_loading_flags, check_model_name, model_fingerprint
from processes import only_one


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("student and prompts").add_argument
    add("--model_dir", required=True, help="the student: adapter folder, model folder or base model")
    add("--task", choices=("label", "json", "code"), required=True, help="how answers are judged")
    add("--input", required=True, help='JSONL of {"input", "output"} with the right answer; code: tasks with tests')
    add("--output", required=True, help='JSONL to write: {"prompt", "chosen", "rejected"}')
    add("--overwrite", action="store_true", help="replace --output and forget an interrupted run's answers")
    add("--schema", default="data/idp_schema.json", help="JSON Schema of the answers, for --task json (%(default)s)")
    add = parser.add_argument_group("answers").add_argument
    add("--n", type=int, default=4, help="answers sampled for each prompt, not for --task label (%(default)s)")
    add("--gold", action="store_true", help="let the right answer be one of those to choose from")
    add("--temperature", type=float, default=0.8, help="of the samples (%(default)s)")
    add("--max_new_tokens", type=int, default=384, help="of an answer (%(default)s)")
    add("--batch_size", type=int, default=16, help="answers written together (%(default)s)")
    add("--seconds", type=float, default=5.0, help="code and its tests may run (%(default)s)")
    add("--seed", type=seed_number, default=0, help="of the samples (%(default)s)")
    add_loading_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError."""
    if min(args.max_new_tokens, args.batch_size) < 1 or not all(0 < x < inf for x in (args.temperature, args.seconds)):
        raise InputError(
            "--max_new_tokens and --batch_size are at least 1, --temperature and --seconds finite and above 0"
        )
    if args.n + args.gold < 2 and args.task != "label":
        raise InputError("--n is at least 2, or 1 with --gold: a pair needs two answers")
    check_output(Path(args.output), args.overwrite)
    check_model_name(args.model_dir)


# ------------------------------------------------------------------------------------------------------- the judges


def json_judge(rows: Sequence[dict], source: str, schema: Any, where: str) -> Callable[[int, str], float]:
    """judge(number, answer): -1 for what is no JSON or breaks the schema, else the F1 of its fields (see eval_idp)."""
    from decoding import broken_rule, checked_validator
    from eval_idp import count_fields, f1_of_all

    validator = checked_validator(schema, where)
    expected = []
    for number, row in enumerate(rows, 1):
        try:
            expected.append(parse_json(row["output"]))
        except ValueError:
            raise InputError(f'{source}: row {number}: "output" is not JSON, which --task json needs') from None

    def judge(number: int, answer: str) -> float:
        try:
            found = parse_json(answer)
        except ValueError:
            return -1.0
        if broken_rule(validator, found):
            return -1.0
        counts: Counter = Counter()
        count_fields(found, expected[number], counts)
        return f1_of_all(counts)

    return judge


def code_scores(tasks: Sequence[Any], answers: Sequence[Sequence[str]], seconds: float) -> list[list[float]]:
    """For each answer 1 where it passes its tests, 0 where it fails them, -1 where it does not parse."""
    from codegen import extract_code, parses
    from sandbox import run_programs

    jobs, scores = [], [[-1.0] * len(texts) for texts in answers]
    for i, (task, texts) in enumerate(zip(tasks, answers, strict=True)):
        for j, text in enumerate(texts):
            if parses(code := extract_code(text)):
                jobs.append((i, j, (task.program(code), task.tests)))
    for (i, j, _), outcome in zip(jobs, run_programs([job for *_, job in jobs], seconds), strict=True):
        scores[i][j] = float(outcome.passed)
    return scores


def best_and_worst(texts: Sequence[str], scores: list[float]) -> tuple[str, str] | None:
    """The pair, the first answer where scores are equal: a choice by length would be learnt as a preference. None
    where no answer has anything right (a score above 0) or none is better than another."""
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    return (texts[best], texts[worst]) if scores[best] > max(scores[worst], 0) else None


# ------------------------------------------------------------------------------------------------------- the student


def label_pairs(args: argparse.Namespace, rows: Sequence[dict]) -> list[tuple[str, str] | None]:
    """(right label, the student's most likely wrong one) of each row."""
    from common import LabelScorer, PromptEncoder
    from models import load_model

    labels = sorted({row["output"] for row in rows})
    if not 2 <= len(labels) <= 10:
        raise InputError(f"{args.input}: {len(labels)} different outputs; label tasks have 2 to 10")
    model, tokenizer = load_model(args.model_dir, args.quantization, args.compute_dtype, args.offload_folder)
    forms = {label: [label] for label in labels}
    scorer = LabelScorer(model, PromptEncoder(tokenizer), forms, batch_size=args.batch_size)
    raw = scorer.raw_scores([row["input"] for row in rows], args.model_dir)
    pairs: list[tuple[str, str] | None] = []
    for row, scores in zip(rows, raw, strict=True):
        scores[labels.index(row["output"])] = -float("inf")
        pairs.append((row["output"], labels[int(scores.argmax())]))
    return pairs


def sampled(args: argparse.Namespace, prompts: Sequence[str]) -> tuple[AnswerFile, list[list[str]]]:
    """The answer file and --n answers to each prompt; an interrupted run goes on."""
    from teachers import ModelTeacher

    deciding = ("task", "n", "temperature", "max_new_tokens", "seed", "quantization", "compute_dtype", "batch_size")
    settings = {key: getattr(args, key) for key in deciding}
    settings |= {"model": model_fingerprint(args.model_dir), "input": file_sha256(args.input)}
    file = AnswerFile(args.output, settings, args.overwrite, args.batch_size)
    waiting = {i * args.n + k: prompt for i, prompt in enumerate(prompts) for k in range(args.n)}
    waiting = {number: prompt for number, prompt in waiting.items() if number not in file.answers}
    if waiting:
        student = ModelTeacher(args.model_dir, args)  # no labels are scored, so no shift is estimated
        file.collect(student.answers(waiting, []), len(prompts) * args.n, args.model_dir)
    texts = [file.answers[number]["teacher_output"] for number in range(len(prompts) * args.n)]
    return file, [texts[i * args.n : (i + 1) * args.n] for i in range(len(prompts))]


def judged(args: argparse.Namespace, rows: Sequence[dict]) -> tuple[AnswerFile, list[str], list]:
    """(answer file, prompts, pair or None of each) of --task json and code."""
    if args.task == "code":
        from codegen import codegen_prompt, task_of

        tasks = [task_of(row, f"{args.input}: row {number}") for number, row in enumerate(rows, 1)]
        prompts = [codegen_prompt(task.prompt) for task in tasks]
        gold = [task.reference for task in tasks]
    else:
        schema = read_json(args.schema)
        judge = json_judge(rows, args.input, schema, args.schema)
        prompts, gold = [row["input"] for row in rows], [row["output"] for row in rows]
    file, answers = sampled(args, prompts)
    if args.gold:
        answers = [texts + ([right] if right else []) for texts, right in zip(answers, gold, strict=True)]
    if args.task == "code":
        scores = code_scores(tasks, answers, args.seconds)
    else:
        scores = [[judge(i, text) for text in texts] for i, texts in enumerate(answers)]
    return file, prompts, [best_and_worst(t, s) for t, s in zip(answers, scores, strict=True)]


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    only_one("making pairs")
    check_flags(args)
    note = unchanged_preparation(args.input)
    rows = read_jsonl(args.input, () if args.task == "code" else ("input", "output"))
    if args.task == "label":
        file, prompts, pairs = None, [row["input"] for row in rows], label_pairs(args, rows)
    else:
        file, prompts, pairs = judged(args, rows)
    lines = [
        {"prompt": prompt, "chosen": pair[0], "rejected": pair[1]}
        for prompt, pair in zip(prompts, pairs, strict=True)
        if pair and pair[0].strip() and pair[1].strip()
    ]
    dropped = len(rows) - len(lines)
    print(
        f"{dropped} of {len(rows)} prompts dropped: no answer of theirs is right, or better than another",
        file=sys.stderr,
    )
    if not lines:
        raise InputError("no pair has contrast; raise --n or --temperature, or add --gold")
    write_jsonl(args.output, lines)
    note_preparation(args.output, note, student=model_fingerprint(args.model_dir))
    if file:
        file.remove()
    print(f"wrote {len(lines)} pairs to {args.output}")
    return 0


if __name__ == "__main__":
    run_script(main)
