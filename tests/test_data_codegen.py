"""CodeGen data: committed files, forms, splits, examples in the prompts, and what the checker refuses."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from common import InputError
from data import make_codegen
from data.make_codegen import KINDS, Task, build_files, check_tasks, is_held_out, job, parses, read_tasks, run_jobs
from distil.codegen.tasks import codegen_plan_prompt, codegen_prompt
from distil.files import read_jsonl
from distil.testing import ROOT

TASKS = read_tasks(ROOT / "data" / "codegen_tasks")
FILES = build_files(TASKS)

DOUBLE = Task(
    topic="test",
    name="double",
    prompt="Write a function `double(x)` that returns twice a number.",
    plan="Multiply by two.",
    code="def double(x):\n    return 2 * x",
    tests=("assert double(1) == 2", "assert double(0) == 0", "assert double(-2) == -4", "assert double(5) == 10"),
    kind="fails",
    why="fails: squares the number",
    rejected="def double(x):\n    return x**2",
    big="",
)
BLOCK = """=== double
Write a function `double(x)` that returns twice a number.
--- plan
Multiply by two.
--- code
def double(x):
    return 2 * x
--- tests
assert double(1) == 2
assert double(0) == 0
assert double(-2) == -4
assert double(5) == 10
--- fails: squares the number
def double(x):
    return x**2
"""


# ------------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("name", FILES)
def test_committed_files_are_what_the_task_files_give(name):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in FILES[name])
    assert (ROOT / "data" / name).read_text(encoding="utf-8") == text


def test_readme_states_the_hashes_and_counts():
    from hashlib import sha256

    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    for name, rows in FILES.items():
        digest = sha256((ROOT / "data" / name).read_bytes()).hexdigest()
        assert re.search(rf"\| \[{name}\]\({name}\) \| {len(rows)} \|.*`{digest}`", text), name
    for topic, count in Counter(task.topic for task in TASKS).items():
        assert re.search(rf"\| {topic} \| {count} \|", text), topic


def test_there_are_300_training_tasks_and_tasks_of_all_kinds():
    for name in ("codegen_sft.jsonl", "codegen_kd.jsonl", "codegen_dpo.jsonl"):
        assert len({row["task_id"] for row in FILES[name]}) >= 310, name
    kinds = Counter(task.kind for task in TASKS)
    assert set(kinds) == set(KINDS)
    assert kinds["fails"] > 0.7 * len(TASKS) and min(kinds.values()) > 0.05 * len(TASKS)


def test_names_prompts_and_solutions_are_unique():
    for field in ("name", "task_id", "prompt", "code"):
        assert len({getattr(task, field) for task in TASKS}) == len(TASKS), field


def test_splits_are_disjoint_and_a_tenth_is_held_out():
    ids = {name: {row["task_id"] for row in rows} for name, rows in FILES.items()}
    train, validation = ids["codegen_sft.jsonl"], ids["codegen_validation.jsonl"]
    assert train == ids["codegen_kd.jsonl"] == ids["codegen_dpo.jsonl"]
    assert not train & validation and len(train | validation) == len(TASKS)
    assert all(is_held_out(task.task_id) == (task.task_id in validation) for task in TASKS)
    assert len(FILES["codegen_validation.jsonl"]) == len(validation) >= 30
    assert len({task_id.partition("/")[0] for task_id in validation}) >= 15
    assert 0.09 < sum(is_held_out(f"topic/{number}") for number in range(10_000)) / 10_000 < 0.11
    assert {row["task_id"] for row in build_files(TASKS, split_seed=1)["codegen_sft.jsonl"]} != train


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("codegen_sft.jsonl", ("input", "output")),
        ("codegen_kd.jsonl", ("input", "teacher_output")),
        ("codegen_dpo.jsonl", ("prompt", "chosen", "rejected", "why")),
        ("codegen_validation.jsonl", ("prompt", "solution", "task_id")),
    ],
)
def test_files_have_the_fields_of_their_kind(name, fields):
    for row in read_jsonl(ROOT / "data" / name, fields):
        assert set(row) == {*fields, "task_id", "tests"}
        assert len(row["tests"]) >= 4


# ------------------------------------------------------------------------------------------------------- the forms


def code_of(answer: str) -> str:
    """Return the code of an answer in the plan form, after a check of its structure, or of a plain one."""
    if "<PLAN>" not in answer:
        return answer
    match = re.fullmatch(r"<PLAN>\n(.+?)\n</PLAN>\n<CODE>\n(.+)\n</CODE>", answer, flags=re.DOTALL)
    assert match and 1 <= len(match[1].split("\n")) <= 4
    assert not re.search(r"</?(PLAN|CODE)>", match[1] + match[2])
    return match[2]


def test_outputs_parse_and_define_what_prompt_and_tests_name():
    by_id = {task.task_id: task for task in TASKS}
    answers = [(row, row["output"]) for row in FILES["codegen_sft.jsonl"]]
    answers += [(row, row["teacher_output"]) for row in FILES["codegen_kd.jsonl"]]
    answers += [(row, row["chosen"]) for row in FILES["codegen_dpo.jsonl"]]
    answers += [(row, row["solution"]) for row in FILES["codegen_validation.jsonl"]]
    for row, answer in answers:
        name = by_id[row["task_id"]].name
        assert name in [getattr(node, "name", "") for node in ast.parse(code_of(answer)).body]
        assert f"`{name}" in (row.get("input") or row["prompt"])
        assert all(re.search(rf"\b{name}\b", test) for test in row["tests"])
        assert "```" not in answer


def test_sft_has_both_forms_of_every_task_and_kd_the_plan_form():
    sft, kd = FILES["codegen_sft.jsonl"], FILES["codegen_kd.jsonl"]
    for plain, planned, taught in zip(sft[::2], sft[1::2], kd, strict=True):
        prompt = next(task.prompt for task in TASKS if task.task_id == plain["task_id"])
        assert plain["input"] == codegen_prompt(prompt)
        assert planned["input"] == taught["input"] == codegen_plan_prompt(prompt)
        assert planned["output"] == taught["teacher_output"]
        assert code_of(planned["output"]) == plain["output"]


def test_only_syntax_rejects_do_not_parse():
    for row in FILES["codegen_dpo.jsonl"]:
        kind = row["why"].partition(":")[0]
        assert kind in KINDS
        assert parses(row["rejected"]) == (kind != "syntax")
        assert row["rejected"] != row["chosen"]


# --------------------------------------------------------------------------------------------------------- running


def test_examples_in_the_prompts_are_true():
    """`call` is `value`, or a number, as the prompts write it."""
    jobs, names = [], []
    for task in TASKS:
        calls = re.findall(rf"`(\b{task.name}\([^`]*)` is (?:`([^`]+)`|(-?\d+(?:\.\d+)?))", task.prompt)
        if calls:
            examples = [f"assert {call} == {value or number}" for call, value, number in calls]
            jobs.append(job(task.code, examples))
            names.append(task.task_id)
    assert len(jobs) > 250
    assert {name: r["problem"] for name, r in zip(names, run_jobs(jobs), strict=True) if r["problem"]} == {}


def test_a_sample_of_tasks_passes_the_checker():
    sample = [*TASKS[::25], *[task for task in TASKS if task.kind == "slow"][::8]]
    assert len(sample) >= 18
    assert {task.kind for task in sample} == set(KINDS)
    check_tasks(sample)


SLOW = (
    "def double(x):\n    total = 0\n    for _ in range(x):\n        total += 2\n    return total if x > 0 else 2 * x"
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code": "def double(x):\n    return x + 1"}, "reference fails: AssertionError in assert double(0) == 0"),
        ({"code": "def double(x):\n    while True: pass"}, "reference fails: TooLong in assert double(1) == 2"),
        ({"code": "import os\nos._exit(0)"}, "reference fails: it ended the process"),
        ({"code": "def double(x):\n    return ' ' * 2**33"}, "reference fails: MemoryError"),
        ({"code": "with open('file', 'w') as out:\n    out.write('x')"}, "reference fails: OSError"),
        ({"rejected": "def double(x):\n    return x + x"}, "the fails answer passes all tests"),
        ({"kind": "syntax"}, "the syntax answer parses"),
        ({"kind": "slow", "big": "assert double(3) == 6"}, "the slow answer is wrong"),
        ({"kind": "slow", "big": "assert double(3) == 6", "rejected": SLOW}, "not 20 times as long"),
        (  # both take long: only the ratio counts
            {"kind": "slow", "big": "assert double(10**6) == 2 * 10**6", "rejected": SLOW, "code": SLOW + "\n"},
            "not 20 times as long",
        ),
    ],
)
def test_the_checker_refuses(change, message, monkeypatch):
    monkeypatch.setattr(make_codegen, "SECONDS_PER_JOB", 1)
    with pytest.raises(InputError, match=r"task test/double: .*" + re.escape(message)):
        check_tasks([replace(DOUBLE, **change)])


def test_the_checker_accepts_what_is_as_it_claims():
    check_tasks(
        [
            DOUBLE,
            replace(DOUBLE, kind="slow", big="assert double(4_000_000) == 8_000_000", rejected=SLOW),
            replace(DOUBLE, kind="syntax", rejected="def double(x)\n    return 2 * x"),
        ]
    )


@pytest.mark.parametrize("clock", ["real() / 10", "real() // 0.01 * 0.01"], ids=["ten times faster", "steps of 10 ms"])
def test_slow_is_judged_alike_by_other_clocks(clock, monkeypatch):
    """Some 0.2 ms against less than a microsecond, and twice the same: neither depends on machine or clock."""
    patched = f"import time\nreal = time.process_time\ntime.process_time = lambda: {clock}\n"
    monkeypatch.setattr(make_codegen, "WORKER", patched + make_codegen.WORKER)
    slow = replace(DOUBLE, kind="slow", big="assert double(5000) == 10_000", rejected=SLOW)
    check_tasks([slow])
    with pytest.raises(InputError, match="not 20 times as long"):
        check_tasks([replace(slow, code=SLOW + "\n")])


def test_what_an_answer_remembers_between_calls_does_not_make_it_fast():
    remembers = "from functools import cache\n\n\n@cache\n" + SLOW
    first, again = run_jobs([job(code, [], "assert double(100_000) == 200_000") for code in (SLOW, remembers)])
    assert again["seconds"] > first["seconds"] / 3


def test_jobs_continue_after_one_that_ends_the_process_or_prints():
    good = job(DOUBLE.code, DOUBLE.tests)
    noisy = job("import os\nprint('x')\nos.write(1, b'y')\n" + DOUBLE.code, DOUBLE.tests)
    results = run_jobs([good, job("import os\nos._exit(3)", []), noisy, good])
    assert [bool(result["problem"]) for result in results] == [False, True, False, False]


def test_answers_see_no_environment():
    code = "import os\nassert not set(os.environ) - {'LC_CTYPE'}, sorted(os.environ)\nassert os.listdir() == []"
    assert run_jobs([job(code, [])])[0]["problem"] is None


# ------------------------------------------------------------------------------------------------------ the script


def run_script(tmp_path, block: str) -> subprocess.CompletedProcess:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "tasks" / "test.txt").write_text(block, encoding="utf-8")
    command = [sys.executable, "-m", "data.make_codegen", "--tasks", tmp_path / "tasks"]
    return subprocess.run([*command, "--outdir", tmp_path / "out"], capture_output=True, text=True, cwd=ROOT)


def test_the_script_writes_four_files(tmp_path):
    done = run_script(tmp_path, BLOCK)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("return 2 * x", "return 3 * x", "task test/double: the reference fails"),
        ("return x**2", "return x * 2", "task test/double: the fails answer passes all tests"),
        ("--- fails: squares", "--- syntax: squares", "task double: the syntax answer parses"),
        ("--- plan\nMultiply by two.\n", "", "task double: parts ['code', 'prompt', 'rejected', 'tests']"),
        ("`double(x)`", "`twice(x)`", "task double: the prompt does not name the function"),
        ("assert double(5) == 10\n", "", "task double: 3 tests, at least 4"),
        ("def double(x):\n    return 2 * x", "def twice(x):\n    return 2 * x", "task double: the reference defines"),
        ("return x**2\n", "return x**2\n" + BLOCK, "task double: name, prompt or code is that of test/double"),
    ],
)
def test_the_script_writes_nothing_for_a_bad_task(tmp_path, old, new, message):
    assert old in BLOCK
    done = run_script(tmp_path, BLOCK.replace(old, new))
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []
