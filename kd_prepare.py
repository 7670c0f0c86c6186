"""Ask a teacher for answers to distil: a model, an OpenAI-compatible endpoint, or gradient boosting for CreditMix.

Departures from saving what the teacher says: its accuracy against gold labels is measured and compared with simple
baselines before a single training step, each row keeps which teacher said it, and nothing that was answered is asked
again after an interruption.

    python kd_prepare.py --teacher tabular --output data/creditmix_tabular_kd.jsonl
    python kd_prepare.py --teacher smollm2-135m --input data/creditmix_sft.jsonl --output data/creditmix_llm_kd.jsonl
    python kd_prepare.py --teacher_url http://127.0.0.1:8000/v1 --teacher_model NAME --input a.jsonl --output kd.jsonl
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from batch_files import AnswerFile, check_output
from codegen import Task, task_of
from creditmix import gold_share
from files import (
    InputError,
    file_sha256,
    note_preparation,
    parse_json,
    read_jsonl,
    run_script,
    seed_number,
    split_of,
    unchanged_preparation,
    write_jsonl,
)
from models import add_loading_flags, check_model_name, model_fingerprint
from processes import gather, only_one, own_share, rank_and_world

GOLD_FIELDS = ("output", "chosen", "answer")
TABULAR = "tabular"
MAX_TIMEOUT = 86400.0
TEST_SECONDS = 5.0  # for an answer's code and the row's tests
FEW_WITHOUT = 0.1  # of the answers that may lack likelihoods before those of the others are given up


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher", help=f"base model, model folder, adapter folder, or '{TABULAR}': gradient boosting for CreditMix")
    add("--teacher_url", help="or: an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1")
    add("--teacher_model", help="name of the model there")
    add("--api_key_env", default="OPENAI_API_KEY", help="environment variable with the endpoint's key (%(default)s)")
    add("--concurrency", type=int, default=8, help="requests under way at the endpoint (%(default)s)")
    add("--retries", type=int, default=6, help="further tries where it is busy or unreachable (%(default)s)")
    add("--timeout", type=float, default=120.0, help="seconds without a sign of the endpoint (%(default)s)")
    add = parser.add_argument_group("prompts").add_argument
    add("--input", help='JSONL with "input" or "prompt", and "output" where a right answer is known')
    add("--src", default="data/creditmix_dataset.json", help=f"raw rows for the {TABULAR} teacher (%(default)s)")
    add(
        "--output",
        required=True,
        help='JSONL to write: {"input", "teacher_output"}, "label_probs" if there are any',
    )
    add("--overwrite", action="store_true", help="replace --output and forget an interrupted run's answers")
    add("--labels", help="comma-separated, if the answers are labels (default: the gold answers, up to 10 different)")
    add = parser.add_argument_group("answers").add_argument
    add("--rationale", action="store_true", help="label first, then a short reason")
    add("--max_new_tokens", type=int, default=256, help="of an answer (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    help_seed = "of what is drawn: a local teacher's answers, a tabular teacher's rows (%(default)s)"
    add("--seed", type=seed_number, default=0, help=help_seed)
    add("--batch_size", type=int, default=16, help="prompts a model answers together (%(default)s)")
    add(
        "--calibration",
        choices=("auto", "none", "batch"),
        default="auto",
        help="of a model's label scores, or of an endpoint's likelihoods where no reason is asked for; batch: less "
        "their mean over prompts; auto, the default: what makes the gold answers likelier, without these batch for a "
        "local model without adapter, else none",
    )
    add(
        "--filter",
        choices=("agree", "confident", "none"),
        default="none",
        help="keep only answers that agree with gold (labels, JSON values or texts) or pass the row's tests, or whose "
        "label has --min_confidence (%(default)s)",
    )
    add(
        "--min_confidence",
        type=float,
        default=0.6,
        help="of the label, for --filter confident (%(default)s)",
    )
    add("--partial", action="store_true", help="write what there is, though some prompts got no answer in all tries")
    add = parser.add_argument_group(f"{TABULAR} teacher").add_argument
    add("--per_class", type=int, default=0, help="rows a class; 0: as many as the rarest has (%(default)s)")
    add("--gold_share", type=gold_share, default=1.0, help="share of customers whose label it may know (%(default)s)")
    add("--split_seed", type=int, default=0, help="of the split by customer; the same in every script (%(default)s)")
    add_loading_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError for flags that contradict each other or are out of range."""
    if bool(args.teacher) == bool(args.teacher_url):
        raise InputError("give either --teacher or --teacher_url")
    if args.teacher_url and not args.teacher_model:
        raise InputError("--teacher_url needs --teacher_model")
    if args.teacher_url and not is_http(args.teacher_url):
        raise InputError(f"--teacher_url {args.teacher_url}: an address such as http://127.0.0.1:8000/v1 is needed")
    if args.teacher != TABULAR and not args.input:
        raise InputError("--input is needed: JSONL with the prompts")
    if args.teacher == TABULAR:
        unused = {"input": args.input, "labels": args.labels, "rationale": args.rationale}
        for name in (name for name, given in unused.items() if given):
            raise InputError(f"--{name} is not for the {TABULAR} teacher, which labels the rows of --src")
    least = {"concurrency": 1, "retries": 0, "max_new_tokens": 1, "batch_size": 1, "per_class": 0, "temperature": 0}
    problems = [f"--{name} is at least {low}" for name, low in least.items() if not getattr(args, name) >= low]
    if not 0 <= args.min_confidence <= 1:
        problems.append("--min_confidence is from 0 to 1")
    if not 0 < args.timeout <= MAX_TIMEOUT:
        problems.append(f"--timeout is above 0 and at most {MAX_TIMEOUT:g}")
    if args.temperature == math.inf:
        problems.append("--temperature is a finite number")
    if problems:
        raise InputError("; ".join(problems))
    check_output(Path(args.output), args.overwrite)


def is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no port
        return False


def read_prompts(path: str, labels: str | None) -> tuple[list[str], list[str | None], list[Task | None], list[str]]:
    """(prompts [N], gold answers [N] or None, tasks [N] with tests of code or None, labels of the task, empty for
    free text). Raises InputError."""
    prompts: list[str] = []
    gold: list[str | None] = []
    tasks: list[Task | None] = []
    for number, row in enumerate(read_jsonl(path, ()), 1):
        prompt = row.get("input", row.get("prompt"))
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f'{path}: row {number} needs "input" or "prompt" as a non-empty string')
        prompts.append(prompt)
        gold.append(next((row[field] for field in GOLD_FIELDS if isinstance(row.get(field), str)), None))
        has_tests = isinstance(row.get("tests"), list)
        tasks.append(task_of(row | {"prompt": prompt}, f"{path}: row {number}") if has_tests else None)
    if labels:
        names = [label.strip() for label in labels.split(",")]
        if len(names) < 2 or len(set(names)) < len(names) or not all(names):
            raise InputError(f"--labels {labels}: at least two labels are needed, each once")
        return prompts, gold, tasks, names
    known = list(dict.fromkeys(answer for answer in gold if answer is not None))
    is_label_task = 2 <= len(known) <= 10 and len(known) < len(prompts) and all(len(x) <= 40 for x in known)
    return prompts, gold, tasks, sorted(known) if is_label_task else []


def ask(
    args: argparse.Namespace, prompts: Sequence[str], gold: Sequence[str | None], labels: Sequence[str]
) -> tuple[AnswerFile, str]:
    """All prompts that have no answer yet, to the teacher; returns the answers and the teacher's name."""
    from teachers import PROMPT_VERSION, HttpTeacher, ModelTeacher, user_turn

    name = args.teacher or args.teacher_model
    deciding = ("teacher", "teacher_url", "teacher_model", "rationale", "max_new_tokens", "temperature", "seed")
    settings = {key: getattr(args, key) for key in (*deciding, "quantization", "compute_dtype")}
    if args.teacher:
        check_model_name(args.teacher)
        settings |= {"model": model_fingerprint(args.teacher), "batch_size": args.batch_size}
        settings |= {"calibration": args.calibration}
    settings |= {"labels": list(labels), "input": file_sha256(args.input), "prompt": PROMPT_VERSION}
    file = AnswerFile(args.output, settings, args.overwrite, args.batch_size if args.teacher else 1)
    mine, turns = own_share(len(prompts)), [user_turn(prompt, args.rationale) for prompt in prompts]
    waiting = {number: turns[number] for number in mine if number not in file.answers}
    if waiting:
        if args.teacher:
            teacher: ModelTeacher | HttpTeacher = ModelTeacher(args.teacher, args, turns, gold)
        else:
            teacher = HttpTeacher(args, any(answer["teacher_output"] for answer in file.answers.values()))
        file.collect(teacher.answers(waiting, labels), len(mine), name)
    for answers in gather(file.answers):
        file.answers |= answers
    return file, name


# --------------------------------------------------------------------------------------------------------- the gate


def gate(
    said: Sequence[str | None], gold: Sequence[str | None], labels: Sequence[str], prompts: Sequence[str]
) -> dict:
    """Print and return how often the teacher is right, for each label, beside the majority and a logistic regression
    on the same rows (CreditMix), and warn of a teacher that is worse than one of them. said: the teacher's labels
    (see `free_gate` for other answers)."""
    known = [i for i, answer in enumerate(gold) if answer is not None]
    if not known:
        print("no gold answers: the teacher cannot be checked before training", file=sys.stderr)
        return {}
    truth = [gold[i] for i in known]
    given = [said[i] or "(none)" for i in known]
    from sklearn.metrics import accuracy_score, classification_report

    from creditmix import simple_baselines

    report = {"rows": len(known), "teacher": accuracy_score(truth, given)}
    report |= simple_baselines([prompts[i] for i in known], truth)
    print(classification_report(truth, given, labels=list(labels), digits=4, zero_division=0))
    for name in ("teacher", "majority", "logistic regression"):
        if name in report:
            print(f"{name:<20} accuracy {report[name]:.4f} on {len(known)} rows with a gold answer")
    better = [name for name in ("majority", "logistic regression") if report.get(name, 0) > report["teacher"]]
    if better:
        print(
            f"WARNING: the teacher is weaker than {' and '.join(better)}; a student of it will learn its mistakes. "
            "Use --filter agree, another teacher, or --teacher tabular for CreditMix",
            file=sys.stderr,
        )
    return report


def same_answer(one: str, other: str) -> bool:
    """Whether two texts are equal, or JSON of equal value."""
    try:
        return parse_json(one) == parse_json(other)
    except ValueError:
        return one.strip() == other.strip()


def right_answers(
    said: Sequence[str | None], gold: Sequence[str | None], tasks: Sequence[Task | None]
) -> list[bool | None]:
    """Whether each answer passes the row's tests, or else equals the gold answer; None where the row has neither."""
    from dpo_prepare import code_scores

    coded = [i for i, task in enumerate(tasks) if task]
    passed = code_scores([tasks[i] for i in coded], [[said[i] or ""] for i in coded], TEST_SECONDS)
    right = [None if wanted is None else same_answer(a or "", wanted) for a, wanted in zip(said, gold, strict=True)]
    for i, (score,) in zip(coded, passed, strict=True):
        right[i] = score == 1
    return right


def free_gate(right: Sequence[bool | None], tested: bool) -> dict[str, Any]:
    """`gate` of answers that are no labels."""
    known = [one for one in right if one is not None]
    if not known:
        print("no gold answers: the teacher cannot be checked before training", file=sys.stderr)
        return {}
    what = "passes its tests" if tested else "is the gold answer"
    print(f"the teacher's answer {what} in {sum(known)} of {len(known)} rows")
    return {"rows": len(known), "teacher": sum(known) / len(known)}


def kept(answer: dict[str, Any], said: str, right: bool | None, args: argparse.Namespace) -> bool:
    """Whether --filter keeps the answer, of which `said` is the label, or all."""
    if args.filter == "agree":
        return right is True
    if args.filter == "confident":
        return answer.get("label_probs", {}).get(said, 0.0) >= args.min_confidence
    return True


# ---------------------------------------------------------------------------------------------------------- the rows


def kd_row(prompt: str, answer: dict[str, Any], said: str, name: str, asked: str) -> dict[str, Any]:
    """A training row with its provenance: which teacher, which version of the prompt it was `asked` with, which
    probability it gave to the label that it `said`."""
    teacher = {"name": name, "prompt": asked}
    if probabilities := answer.get("label_probs"):
        teacher["probability"] = probabilities[said]
    return {"input": prompt, **answer, "teacher": teacher}


def likelihoods_or_none(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trainer takes label_probs from all rows or from none: a few rows without them are left out, with more the
    probabilities of all are."""
    without = sum("label_probs" not in row for row in rows)
    if without in (0, len(rows)):
        return rows
    said = f"{without} of {len(rows)} answers came without likelihoods"
    if without <= FEW_WITHOUT * len(rows):
        print(f"{said} and are left out", file=sys.stderr)
        return [row for row in rows if "label_probs" in row]
    print(f"{said}: label_probs are left out", file=sys.stderr)
    for row in rows:
        row.pop("label_probs", None)
        row["teacher"].pop("probability", None)
    return rows


def tabular_rows(args: argparse.Namespace) -> tuple[list[str], list[str | None], list[dict[str, Any]], list[str]]:
    """(prompts, gold answers or None, answers, labels) of CreditMix training rows by gradient boosting, each row's by
    a model that never saw its customer. With --gold_share the labels of the other customers are not used at all."""
    from creditmix import LABELS, balanced_sample, creditmix_prompt, gold_known, read_creditmix, tabular_teacher
    from teachers import answer_of_probabilities

    rows, _ = read_creditmix(args.src)
    pool = [row for row in rows if split_of(row.customer, args.split_seed) == "train"]
    known = [gold_known(row, args) for row in pool]
    probabilities = tabular_teacher(pool, known, args.seed)
    answers = [answer_of_probabilities(dict(zip(LABELS, row.tolist(), strict=True))) for row in probabilities]
    # Classes are balanced by gold where all of it is known, else by what the teacher says.
    labelled = [
        row if args.gold_share == 1 else replace(row, label=answer["teacher_output"])
        for row, answer in zip(pool, answers, strict=True)
    ]
    index = {id(row): i for i, row in enumerate(labelled)}
    per_class = args.per_class or min(Counter(row.label for row in labelled).values())
    chosen = [index[id(row)] for row in balanced_sample(labelled, per_class, args.seed)]
    prompts = [creditmix_prompt(pool[i].features) for i in chosen]
    gold = [pool[i].label if known[i] else None for i in chosen]
    return prompts, gold, [answers[i] for i in chosen], list(LABELS)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_flags(args)
    from teachers import PROMPT_VERSION, calibrate_answers, label_first, label_of

    if args.teacher == TABULAR:
        only_one("the tabular teacher")
        prompts, gold, answers, labels = tabular_rows(args)
        name, file, tasks = TABULAR, None, [None] * len(prompts)
        note = {name: getattr(args, name) for name in ("split_seed", "seed", "per_class", "gold_share")}
        note |= {"source": {"file": args.src, "sha256": file_sha256(args.src)}}
    else:
        note = unchanged_preparation(args.input)
        prompts, gold, tasks, labels = read_prompts(args.input, args.labels)
        file, name = ask(args, prompts, gold, labels)
        missing = [number for number in range(len(prompts)) if number not in file.answers]
        if missing:
            print(
                f"{len(missing)} of {len(prompts)} prompts got no answer; what others got is kept in {file.path}: run "
                "the same command again" + ("" if args.partial else ", or with --partial to do without"),
                file=sys.stderr,
            )
            if not args.partial or len(missing) == len(prompts):
                return 1
        if rank_and_world()[0]:  # of several processes the first writes; the others keep their answers until it has
            gather(None)
            file.remove()
            return 0
        answers = [file.answers.get(i, {"teacher_output": "", "left_out": "none"}) for i in range(len(prompts))]
        if labels and args.teacher_url and not args.rationale:
            answers = calibrate_answers(answers, prompts, gold, labels, args.calibration)
    said = [label_of(a["teacher_output"], labels) if labels else a["teacher_output"].strip() for a in answers]
    for reason, count in Counter(a["left_out"] for a in answers if "left_out" in a).most_common(5):
        print(f"{count} prompts are left out, their answer: {reason}", file=sys.stderr)
    nothing = sum(label is None and "left_out" not in a for label, a in zip(said, answers, strict=True))
    if nothing:
        print(f"{nothing} answers name none or several of {', '.join(labels)} and are left out", file=sys.stderr)
    right = right_answers(said, gold, tasks)
    if args.filter == "agree" and None in right:
        print(f"{right.count(None)} rows without a gold answer are left out (--filter agree)", file=sys.stderr)
    report = gate(said, gold, labels, prompts) if labels else free_gate(right, any(tasks))
    if labels:
        for answer, label in zip(answers, said, strict=True):
            answer["teacher_output"] = label_first(answer["teacher_output"], label or "", args.rationale)
    asked = f"{PROMPT_VERSION}, for a reason" if args.rationale else str(PROMPT_VERSION)
    rows = [
        kd_row(prompt, answer, label, name, asked)
        for prompt, answer, label, is_right in zip(prompts, answers, said, right, strict=True)
        if label is not None and "left_out" not in answer and kept(answer, label, is_right, args)
    ]
    if not rows:
        raise InputError(f"no row is left (--filter {args.filter})")
    rows = likelihoods_or_none(rows)
    write_jsonl(args.output, rows)
    origin = {"url": args.teacher_url} if args.teacher_url else {"model": file.settings["model"]} if file else {}
    note_preparation(args.output, note, teacher={"name": name, **origin, **report})
    if file:
        gather(None)
        file.remove()
    print(f"wrote {len(rows)} of {len(prompts)} rows to {args.output} (--filter {args.filter})")
    return 0


if __name__ == "__main__":
    run_script(main)
