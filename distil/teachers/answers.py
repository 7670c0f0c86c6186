"""What a teacher gets and how its answers are read: options, prompts, labels, probabilities and their calibration.

A teacher yields (number, answer) as answers come, in any order. An answer is {"teacher_output"}, with "label_probs"
where the teacher's probabilities can be read, and with "left_out", the reason why it must not be trained on. A reply
of an endpoint has "usage": tokens read and written, None where it does not tell.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from common import Calibration, InputError
from distil.batch import AnswerFile
from distil.calibration import choose_method, row_losses, uncalibrated
from distil.cli import loading_options, server_of
from distil.codegen.tasks import Task, task_of
from distil.endpoint import Server, shown_url
from distil.files import read_jsonl
from distil.models import LoadOptions, ModelRef, model_fingerprint
from distil.processes import gather, own_share, print_note, rank_and_world
from distil.runs import conditions
from distil.thoughts import after_thoughts

if TYPE_CHECKING:
    import numpy as np

RATIONALE = "Answer with the label first, then give the reason in one short sentence."
PROMPT_VERSION = 1  # of RATIONALE and SYSTEM_PROMPT; stored with every answer
GOLD_FIELDS = ("output", "chosen", "answer")
GUESSED_LABELS = 10  # more different gold answers are free text, unless --labels or a task has them as labels
CUT = "cut off at --max_new_tokens"
MARKS = "*\"'`#-_ \n"  # an answer may open with them
DENIED = r"not|no|never|\w+n't|cannot|below|above|than"  # words that take a label back
FEW_PROMPTS = 32  # the mean score of fewer prompts depends more on them than on the model
UNCALIBRATED = "token probabilities are the teacher's own, without the calibration that chose its labels"
UNCALIBRATED += "; --calibration none chooses labels by the same scores"
MIN_SHARE = 1e-4  # of a label that is not among an endpoint's most probable tokens


@dataclass(frozen=True)
class TeacherOptions:
    """Which prompts a teacher answers and how; the fields are named after the flags that explain them.
    labels: of a label task, empty for free text; server: None for a local model; extra_body: more fields of its
    requests."""

    input: str = ""
    input_sha256: str = ""
    output: str = ""
    overwrite: bool = False
    labels: tuple[str, ...] = ()
    label_tokens: str = "all"
    rationale: bool = False
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 16
    calibration: str = "auto"
    top_k: int = 0
    answers: str = "teacher"
    tokenizer: str | None = None
    load: LoadOptions = field(default_factory=LoadOptions)
    server: Server | None = None
    extra_body: Mapping[str, Any] = field(default_factory=dict)


def teacher_options(
    flags: Mapping[str, Any], input_sha256: str, kind: type = TeacherOptions, labels: Sequence[str] = ()
) -> Any:
    """Return options of this `kind` from a script's flags. input_sha256: of --input; labels: of the prompts."""
    flags = {**flags, "labels": tuple(labels), "input_sha256": input_sha256}
    flags["load"] = loading_options(flags)
    if flags.get("teacher_url"):
        flags["server"] = server_of(flags, "teacher_url", "teacher_model", flags["retries"])
    return kind(**{field.name: flags[field.name] for field in fields(kind) if field.name in flags})


@dataclass(frozen=True)
class Prompts:
    """texts [N]; gold [N]: right answers, None where unknown; tasks [N]: tests of code, None for other rows; labels:
    of a label task, empty for free text."""

    texts: list[str]
    gold: list[str | None]
    tasks: list[Task | None]
    labels: list[str]

    def turns(self, rationale: bool) -> list[str]:
        """Return the teacher's user turns: the student's prompts, with RATIONALE where a reason is wanted."""
        return [f"{text}\n{RATIONALE}" if rationale else text for text in self.texts]


def read_prompts(path: str, labels: str | None) -> Prompts:
    """Return the prompts of a JSONL file. labels: --labels, or else up to GUESSED_LABELS gold answers are the labels.
    Raises InputError."""
    rows = read_jsonl(path, ("input|prompt",))
    texts = [row.get("input", row.get("prompt")) for row in rows]
    gold = [next((row[name] for name in GOLD_FIELDS if isinstance(row.get(name), str)), None) for row in rows]
    tasks = [
        task_of(row | {"prompt": text}, f"{path}: row {number}") if isinstance(row.get("tests"), list) else None
        for number, (row, text) in enumerate(zip(rows, texts, strict=True), 1)
    ]
    if labels:
        names = [label.strip() for label in labels.split(",")]
        if len(names) < 2 or len(set(names)) < len(names) or not all(names):
            raise InputError(f"--labels {labels}: at least two labels are needed, each once")
        return Prompts(texts, gold, tasks, names)
    names = sorted({answer for answer in gold if answer is not None})
    few = 2 <= len(names) <= min(GUESSED_LABELS, len(texts) - 1)
    is_label_task = few and all(len(name) <= 40 for name in names)
    return Prompts(texts, gold, tasks, names if is_label_task else [])


def answer_file(ref: ModelRef | None, options: TeacherOptions, **more: Any) -> AnswerFile:
    """Open the answers to the prompts of options.input, also those of an interrupted run.
    Raises InputError where that run had another model `ref` (None: endpoint), options, or settings `more`."""
    settings = {"teacher": ref.name if ref else None, "prompt": PROMPT_VERSION, "input": options.input_sha256}
    names = ["rationale", "max_new_tokens", "temperature", "seed"]
    names += ["top_k", "answers", "tokenizer"] if options.top_k else []
    names += ["batch_size", "calibration"] if ref else []
    names += ["extra_body"] if options.extra_body else []
    settings["teacher_model"] = options.server.model if options.server else None
    if url := options.server and options.server.url:
        # Of a query's values, which may hold a key, 16 bits: enough to see that they differ.
        query = hashlib.sha256(urlsplit(url).query.encode()).hexdigest()[:4]
        settings |= {"teacher_url": shown_url(url), "teacher_query": query}
    settings |= {name: getattr(options, name) for name in names} | {"labels": list(options.labels), **more}
    settings["label_tokens"] = options.label_tokens
    settings |= {"quantization": options.load.quantization, "compute_dtype": options.load.compute_dtype}
    if ref:
        settings |= {"model": model_fingerprint(ref), **conditions(options.load.compute_dtype)}
    return AnswerFile(options.output, settings, options.overwrite, options.batch_size if ref else 1)


def collect_answers(file: AnswerFile, turns: Sequence[str], name: str, start: Callable[[], Any]) -> None:
    """Send the user turns without an answer to the teacher that start() loads; join all processes' file.answers."""
    mine = own_share(len(turns))
    if waiting := {number: turns[number] for number in mine if number not in file.answers}:
        file.collect(start().answers(waiting), len(mine), name)
    for others in gather(file.answers):
        file.answers |= others


def bare_text(answer: str) -> str | None:
    """Return the text that a student gets of an answer: what comes after thoughts, None where they do not end."""
    text = after_thoughts(answer)
    return text.strip() if text and text != answer else text


def spent(answers: Iterable[Mapping[str, Any]], price_in: float, price_out: float) -> dict[str, Any]:
    """Return and print the tokens that an endpoint read and wrote for its answers, left out ones too, and their cost.
    Prices are of a million tokens; answers that came without an account are not in it."""
    usage = [answer["usage"] for answer in answers if answer.get("usage")]
    read, written = (sum(counts[i] for counts in usage) for i in (0, 1))
    report = {"tokens_in": read, "tokens_out": written, "answers_with_tokens": len(usage)}
    if price_in or price_out:
        report["cost"] = round((read * price_in + written * price_out) / 1e6, 6)
    if usage and rank_and_world()[0] == 0:
        cost = f"; cost {report['cost']:.4f}" if "cost" in report else ""
        print(f"tokens: {read} in, {written} out, reported with {len(usage)} answers{cost}")
    return report


@functools.lru_cache(maxsize=8)
def _label_patterns(labels: tuple[str, ...]) -> tuple[dict[str, str | None], re.Pattern, re.Pattern, re.Pattern]:
    """Return {casefolded label: label, or None of several}, and patterns of casefolded text: a label at the start; the
    longest label that starts at a word, letters not taken; what takes a label back that comes before it."""
    by_text: dict[str, str | None] = {}
    for label in labels:
        by_text[label.casefold()] = None if label.casefold() in by_text else label
    # The longest first, since "card" may begin "card lost". Marks are skipped one by one, since "-1" may be a label.
    words = "|".join(re.escape(text) for text in sorted(by_text, key=len, reverse=True))
    start = rf"[{re.escape(MARKS)}\s]*?({words})(?!\w)"
    unsure = rf"[\s,/|]*(or\b|and\b)?\s*(?<!\w)({words})(?!\w)|\s*\?|\s+(\w+\s+)?({DENIED})\b"
    return by_text, re.compile(start), re.compile(rf"(?<!\w)(?=({words})(?!\w))"), re.compile(unsure)


def label_of(answer: str, labels: Sequence[str]) -> str | None:
    """Return the label that an answer begins with, or else the only one in it.
    None where there is no such label, and where the answer repeats the choice ("Good, Standard or Bad") or denies its
    label ("not good"). A label that is part of a longer one ("card" in "virtual card") does not count."""
    if (text := (after_thoughts(answer) or "").strip()) in labels:
        return text
    text, (by_text, start, inside, unsure) = text.casefold(), _label_patterns(tuple(labels))
    if first := start.match(text):
        return None if unsure.match(text, first.end()) else by_text[first[1]]
    found, end, text = set(), 0, text.lstrip(MARKS)
    for match in inside.finditer(text):
        if match.end(1) > end:
            end = match.end(1)
            if re.search(rf"\b({DENIED})\s+(\w+\s+){{0,5}}\Z", text[: match.start()]):
                return None
            found.add(match[1])
    return by_text[found.pop()] if len(found) == 1 else None


def label_first(answer: str, label: str, rationale: bool) -> str:
    """Return the answer with its label first, where a student's labels are scored; only the label without a reason."""
    if not rationale:
        return label
    text = answer.lstrip()
    bare = text.lstrip(MARKS)
    return next((words for words in (text, bare) if words.startswith(label)), f"{label}. {bare}")


def answer_of_probabilities(labels: Sequence[str], probabilities: np.ndarray) -> dict[str, Any]:
    """Return the most probable label as an answer, with the probabilities [labels]."""
    label_probs = {label: round(p, 4) for label, p in zip(labels, probabilities.tolist(), strict=True)}
    return {"teacher_output": labels[int(probabilities.argmax())], "label_probs": label_probs}


def teacher_calibration(
    method: str, raw: np.ndarray, prompts: Sequence[str], gold: Sequence[str | None], labels: Sequence[str], least: str
) -> Calibration:
    """Return the calibration that --calibration specifies for raw label scores [prompts, labels].
    'batch' subtracts their mean (Zhou et al. 2023); 'auto' takes the method with the lower NLL of the gold answers,
    or `least` where fewer than FEW_PROMPTS have one."""
    import numpy as np
    from tqdm import tqdm

    zero = np.zeros(len(labels))
    methods = {"none": uncalibrated(len(labels)), "batch": Calibration("batch", raw.mean(axis=0), zero)}
    if method != "auto":
        return methods[method]
    rows = [i for i, answer in enumerate(gold) if answer in labels]
    if len(rows) >= FEW_PROMPTS:
        answers = np.array([labels.index(gold[i]) for i in rows])
        losses = {name: row_losses(c.probabilities(raw[rows]), answers) for name, c in methods.items()}
        least = choose_method(losses, [prompts[i] for i in rows])
    tqdm.write(f"calibration of the teacher: {least}", file=sys.stderr)  # above the progress bar
    return methods[least]


def calibrate_answers(answers: list[dict[str, Any]], prompts: Prompts, method: str) -> list[dict[str, Any]]:
    """Return an endpoint's answers with calibrated label_probs (see `teacher_calibration`) and their best label.
    Answers without label_probs stay, and all do for the method 'none', which 'auto' takes without gold answers."""
    import numpy as np

    labels, scored = prompts.labels, [i for i, answer in enumerate(answers) if "label_probs" in answer]
    if not scored and method == "batch":
        print_note("--calibration batch has no effect: the answers came without probabilities")
    if not scored or method == "none":
        return answers
    raw = np.log(np.maximum([[answers[i]["label_probs"][label] for label in labels] for i in scored], MIN_SHARE))
    texts, gold = [prompts.texts[i] for i in scored], [prompts.gold[i] for i in scored]
    calibration = teacher_calibration(method, raw, texts, gold, labels, least="none")
    if calibration.method == "none":
        return answers
    if any("token_probs" in answer for answer in answers):
        print_note(UNCALIBRATED)
    result = list(answers)
    for i, row in zip(scored, calibration.probabilities(raw), strict=True):
        result[i] = answers[i] | answer_of_probabilities(labels, row)
        if result[i]["teacher_output"] != answers[i]["teacher_output"]:
            result[i].pop("token_probs", None)  # they are of the other text
    return result
