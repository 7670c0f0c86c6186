"""Ask a teacher for answers to distil: a model, an OpenAI-compatible endpoint, or gradient boosting for CreditMix.

Departures from storing a teacher's answers as they are: its accuracy against gold labels is measured and compared with
simple baselines before a single training step, each row records its teacher, and after an interruption only prompts
without an answer are sent. --top_k keeps the teacher's token probabilities too (distil/token_probs.py).

    python kd_prepare.py --teacher tabular --output data/creditmix_tabular_kd.jsonl
    python kd_prepare.py --teacher smollm2-135m --input data/creditmix_sft.jsonl --output data/creditmix_llm_kd.jsonl
    python kd_prepare.py --teacher runs/idp_sft --top_k 32 --answers gold --input data/idp_sft.jsonl --output kd.jsonl
    python kd_prepare.py --teacher_url http://127.0.0.1:8000/v1 --teacher_model NAME --input a.jsonl --output kd.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path

from distil import cli
from distil.batch import check_output, stored_token_probs
from distil.endpoint import shown_url
from distil.files import InputError, hashed, hold, write_jsonl
from distil.models import resolve
from distil.processes import gather, only_one, rank_and_world
from distil.splits import Provenance, check_note, joined, note_preparation, provenance, recorded, unchanged_preparation
from distil.tasks import Task, chosen_task, data_task, shared_task
from distil.teachers import answers as asking
from distil.teachers.endpoint import HttpTeacher, extra_fields
from distil.teachers.gate import checked_rows
from distil.teachers.local import ModelTeacher
from distil.teachers.tabular import TABULAR, tabular_rows, teacher_name
from distil.token_probs import unpacked, write_token_probs


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    add = parser.add_argument_group("teacher").add_argument
    model = f"base model, model folder, adapter folder, or '{TABULAR}': gradient boosting (texts: TF-IDF)"
    add("--teacher", help=model)
    add("--teacher_url", help="or: an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1")
    add("--teacher_model", help="name of the model there")
    cli.add_connection_flags(add)
    add("--retries", type=int, default=6, help="further tries where it is busy or unreachable (%(default)s)")
    extra = 'more fields of its requests, such as {"reasoning_effort": "low"}; stored with the answers, so no keys'
    add("--extra_body", default="{}", metavar="JSON", help=extra)
    add("--price_in", type=float, default=0.0, help="of a million tokens of prompts, for the cost in the note")
    add("--price_out", type=float, default=0.0, help="of a million tokens of answers (%(default)s)")
    add = parser.add_argument_group("prompts").add_argument
    add("--input", help='JSONL with "input" or "prompt", and "output" where a right answer is known')
    add("--src", default="data/creditmix_dataset.json", help=f"raw rows for the {TABULAR} teacher (%(default)s)")
    cli.add_decimal_flag(add)
    cli.add_task_flag(add)
    add("--output", required=True, help='JSONL to write: {"input", "teacher_output"}, "label_probs" if there are any')
    add("--overwrite", action="store_true", help="replace --output and forget an interrupted run's answers")
    labels = "comma-separated, if the answers are labels (default: the task's, or up to 10 gold answers)"
    add("--labels", help=labels)
    add = parser.add_argument_group("answers").add_argument
    add("--rationale", action="store_true", help="label first, then a short reason")
    add("--max_new_tokens", type=int, default=256, help="of an answer (%(default)s)")
    likely = "keep the K most probable tokens for each token of an answer, for kd_train.py; 0: off (%(default)s)"
    add("--top_k", type=int, default=0, help=likely)
    add("--answers", choices=("teacher", "gold"), default="teacher", help="of which --top_k is kept (%(default)s)")
    add("--tokenizer", help="with --top_k of --teacher_url: the student's base model, whose tokenizer the teacher has")
    add("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    add("--seed", type=cli.seed_number, default=0, help="of a local teacher's samples and tabular rows (%(default)s)")
    add("--batch_size", type=int, default=16, help="prompts a model answers together (%(default)s)")
    calibration = "of label probabilities; batch: less their mean over prompts; auto, the default: the lower NLL of "
    calibration += "gold answers, or without these batch for a local base model, else none"
    add("--calibration", choices=("auto", "none", "batch"), default="auto", help=calibration)
    keep = "keep answers that agree with gold or pass their tests, or whose label has --min_confidence (%(default)s)"
    add("--filter", choices=("agree", "confident", "none"), default="none", help=keep)
    add("--min_confidence", type=float, default=0.6, help="of the label, for --filter confident (%(default)s)")
    add("--partial", action="store_true", help="write the rows there are where prompts got no answer in all tries")
    add = parser.add_argument_group(f"{TABULAR} teacher").add_argument
    add("--per_class", type=int, default=0, help="rows a class; 0: as many as the rarest has (%(default)s)")
    add("--gold_share", type=cli.gold_share, default=1.0, help="share of customers with a known label (%(default)s)")
    add("--split_seed", type=int, default=0, help="of the split by customer; the same in every script (%(default)s)")
    cli.add_loading_flags(parser)
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raise InputError for flags that contradict each other or are out of range."""
    if bool(args.teacher) == bool(args.teacher_url):
        raise InputError("give either --teacher or --teacher_url")
    if args.teacher_url:
        cli.server_of(vars(args), "teacher_url", "teacher_model", args.retries)
    extra_fields(args.extra_body)
    if args.teacher != TABULAR and not args.input:
        raise InputError("--input is needed: JSONL with the prompts")
    if args.teacher_url and args.top_k and not args.tokenizer:
        raise InputError("--top_k with --teacher_url needs --tokenizer, the student's base model")
    if args.teacher_url and args.answers == "gold":
        raise InputError("--answers gold: an endpoint scores only what it writes; take a local teacher")
    least = {"top_k": 0, "max_new_tokens": 1, "batch_size": 1, "per_class": 0, "temperature": 0}
    least |= {"price_in": 0, "price_out": 0}
    problems = [f"--{name} is at least {low}" for name, low in least.items() if not getattr(args, name) >= low]
    if not 0 <= args.min_confidence <= 1:
        problems.append("--min_confidence is from 0 to 1")
    if inf in (args.temperature, args.price_in, args.price_out):
        problems.append("--temperature, --price_in and --price_out are finite numbers")
    if problems:
        raise InputError("; ".join(problems))
    check_output(Path(args.output), args.overwrite)
    check_note(args.output)


def unused_flags(args: argparse.Namespace, is_label_task: bool) -> dict[str, list[str]]:
    """Return the flags that have no effect with the teacher, the answers and the other flags, by reason."""
    tabular, endpoint = args.teacher == TABULAR, bool(args.teacher_url)
    local, gold = not (tabular or endpoint), args.answers == "gold"
    writes = args.rationale or not (is_label_task or gold)
    scores = is_label_task and not (tabular or (endpoint and args.rationale))
    connection = ["teacher_model", "api_key_env", "concurrency", "retries", "timeout"]
    connection += ["extra_body", "price_in", "price_out"]
    answers, samples = ["max_new_tokens", "temperature"], local and writes and args.temperature > 0
    checks = [
        ("only with --teacher_url", endpoint, connection),
        ("only with --teacher_url, which can fail for some prompts", endpoint, ["partial"]),
        (f"only for the {TABULAR} teacher", tabular, ["src", "decimal", "per_class", "gold_share", "split_seed"]),
        ("only for a model that runs here", local, ["batch_size", "quantization", "compute_dtype", "offload_folder"]),
        (f"not for the {TABULAR} teacher, which has --src", not tabular, ["input", "labels", "rationale", "top_k"]),
        ("only with --top_k", args.top_k > 0, ["answers", "tokenizer"]),
        ("only with --teacher_url: a local teacher has its own", endpoint, ["tokenizer"]),
        ("only with --answers teacher", not gold, ["rationale"]),
        ("only for labels and with --answers teacher", is_label_task or not gold, ["filter"]),
        ("only where the teacher writes text, not a label alone", endpoint or (local and writes), answers),
        (f"only for the {TABULAR} teacher and samples of a local one (--temperature)", tabular or samples, ["seed"]),
        ("only where a teacher's label probabilities are used", scores, ["calibration"]),
        ("only with --filter confident", args.filter == "confident", ["min_confidence"]),
    ]
    return {reason: names for reason, used, names in checks if not used}


def main(argv: list[str] | None = None) -> int:
    args = (parser := build_parser()).parse_args(argv)
    with hold(args.output):
        check_flags(args)
        prompts, sha256, task = None, "", chosen_task([], args.task)
        if args.teacher != TABULAR:
            if not Path(args.input).is_file():
                raise InputError(f"{args.input}: no such file")
            task = data_task(args.input, args.task)
            prompts, sha256 = hashed(args.input, lambda: asking.read_prompts(args.input, args.labels))
            task = shared_task([resolve(args.teacher)] if args.teacher else [], task, args.input)
            if task and not args.labels:
                prompts = replace(prompts, labels=list(task.labels))
            elif task and set(prompts.labels) != set(task.labels):
                raise InputError(f"--labels {args.labels}: the task {task.name} has other labels; leave it out")
        cli.refuse_unused(parser, argv, unused_flags(args, prompts is None or bool(prompts.labels)))
        if args.answers == "gold" and (without := sum(not one for one in prompts.gold)):
            raise InputError(f"{args.input}: {without} rows have no right answer (--answers gold)")
        return write_answers(args, prompts, sha256, task)


def write_answers(args: argparse.Namespace, prompts: asking.Prompts | None, sha256: str, task: Task | None) -> int:
    """Write the rows and the note of their preparation; return the exit status. prompts: None for TABULAR; sha256: of
    their file; task: None for prompts of no label task that is described."""
    if prompts is None:
        only_one("the tabular teacher")
        drawn = {name: getattr(args, name) for name in ("split_seed", "seed", "per_class", "gold_share")}
        (prompts, answers), sha256 = hashed(
            args.src, lambda: tabular_rows(args.src, task, **drawn, decimal=args.decimal)
        )
        file, name, origin = None, teacher_name(task), {}
        note = drawn | {"source": {"file": args.src, "sha256": sha256}, "task": task.record}
        learnt = recorded(args.src, note)
    else:
        more = {"label_tokens": task.label_tokens} if task else {}
        more["extra_body"] = extra_fields(args.extra_body)
        options = asking.teacher_options(vars(args) | more, sha256, labels=prompts.labels)
        ref = resolve(args.teacher) if args.teacher else None  # it may not change from here on
        task = shared_task([ref], task, args.input) if ref and task else task
        note = unchanged_preparation(args.input, options.input_sha256) | ({"task": task.record} if task else {})
        # What an endpoint's model was trained on cannot be seen: evaluation says so.
        unseen = {"file": f"the teacher {args.teacher_model} at {(url := shown_url(args.teacher_url or ''))}"}
        learnt = provenance(args.teacher) if args.teacher else Provenance(url, None, (unseen,), None)
        learnt = joined(recorded(args.input, note), learnt)
        file = asking.answer_file(ref, options)
        turns = prompts.turns(args.rationale)
        if ref:
            teacher = partial(ModelTeacher, ref, options, turns, prompts.gold)
        else:
            answered = any("left_out" not in one for one in file.answers.values())
            teacher = partial(HttpTeacher, options, answered, resolve(args.tokenizer).path if args.top_k else None)
        asking.collect_answers(file, turns, name := args.teacher or args.teacher_model, teacher)
        origin = {"model": file.settings["model"]} if ref else {"url": url}
        origin |= {"extra_body": options.extra_body} if options.extra_body else {}
        origin |= {} if ref else asking.spent(file.answers.values(), args.price_in, args.price_out)
        if missing := len(turns) - len(file.answers):
            print(f"{missing} of {len(turns)} prompts got no answer; {file.path} has the others", file=sys.stderr)
            if not args.partial or missing == len(turns):
                print("run the same command again, or with --partial to do without", file=sys.stderr)
                return 1
        if rank_and_world()[0]:  # of several processes the first writes; the others keep their answers until it has
            gather(None)
            file.remove()
            return 0
        answers = [file.answers.get(i, {"teacher_output": "", "left_out": "none"}) for i in range(len(turns))]
        if prompts.labels and args.teacher_url and not args.rationale:
            answers = asking.calibrate_answers(answers, prompts, args.calibration)
    how = args.rationale, args.filter, args.min_confidence, task, args.answers == "gold"
    rows, report = checked_rows(prompts, answers, name, *how)
    if args.top_k:
        rows = with_token_probs(rows, Path(args.output))
    if not rows:
        reasons = Counter(answer["left_out"] for answer in answers if "left_out" in answer).most_common(1)
        why = "; ".join(f"{count} answers: {reason}" for reason, count in reasons) or f"--filter {args.filter}"
        raise InputError(f"no row is left ({why})")
    write_jsonl(args.output, rows)
    origin |= {"top_k": args.top_k, "answers": args.answers} if args.top_k else {}
    note_preparation(args.output, note, learnt, teacher={"name": name, **origin, **report})
    if file:
        gather(None)
        file.remove()
    print(f"wrote {len(rows)} of {len(prompts.texts)} rows to {args.output} (--filter {args.filter})")
    return 0


def with_token_probs(rows: list[dict], output: Path) -> list[dict]:
    """Return the rows that have token probabilities, which are written next to the output; the others are left out."""
    if without := sum("token_probs" not in row for row in rows):
        why = "which are of the text before its label was read or calibrated"
        print(f"{without} answers without token probabilities, {why}, are left out", file=sys.stderr)
    rows = [row for row in rows if "token_probs" in row]
    if places := [row["token_probs"] for row in rows]:
        arrays = (unpacked(stored_token_probs(place)) for place in places)
        name = write_token_probs(output, arrays, [place["tokens"] for place in places], places[0]["k"])
        for number, row in enumerate(rows):
            row["token_probs"] = {"file": name, "row": number}
    return rows


if __name__ == "__main__":
    cli.run_script(main)
