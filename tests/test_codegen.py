"""CodeGen: tasks as they are published, the two stages, what is taken as code, and what users meet."""

from __future__ import annotations

import json
import os
from argparse import Namespace

import numpy as np
import pytest
import torch

import codegen_prepare
import eval_codegen
import infer_codegen
from codegen import (
    Coder,
    code_ended,
    codegen_plan_prompt,
    codegen_prompt,
    extract_code,
    flaw_of_tests,
    parses,
    task_of,
)
from common import PromptEncoder
from conftest import run_cli
from eval_codegen import pass_at_k
from files import InputError, preparation
from sandbox import run_program

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef double(xs: List[int]) -> List[int]:\n    """ Twice each.\n    """\n',
    "entry_point": "double",
    "canonical_solution": "    return [2 * x for x in xs]\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n",
}
MBPP = {
    "task_id": 2,
    "text": "Write a function to add two numbers.",
    "code": "def add_up(a, b):\r\n  return a + b",
    "test_setup_code": "ONE = add_up(0, 1)",
    "test_list": ["assert add_up(ONE, 2) == 3", "assert add_up(-1, 1) == 0"],
}
OURS = {
    "prompt": "Write a function `half(n)` that halves n.",
    "tests": ["assert half(4) == 2"],
    "solution": "def half(n): return n / 2",
}


@pytest.mark.parametrize("row", [HUMANEVAL, MBPP, OURS], ids=["humaneval", "mbpp", "ours"])
def test_a_published_solution_passes_its_own_tests(row):
    task = task_of(row, "row 1")
    assert run_program(task.program(task.reference), task.tests).passed


def test_humaneval_takes_a_body_or_a_whole_function():
    task = task_of(HUMANEVAL, "row 1")
    whole = "def double(xs: List[int]):\n    return [2 * x for x in xs]"  # the import is the head's
    for code in ("    return [2 * x for x in xs]", whole):
        assert run_program(task.program(code), task.tests).passed
    assert not run_program(task.program("    return xs"), task.tests).passed


def test_the_tests_are_shown_where_the_prompt_does_not_name_the_function():
    assert "assert add_up(-1, 1) == 0" in task_of(MBPP, "").prompt
    assert "assert" not in task_of(OURS, "").prompt
    word = {"prompt": "Write a function to split a list.", "tests": ["assert split([1], 1) == [[1], []]"]}
    assert "assert split" in task_of(word, "").prompt  # a word of the sentence is no name
    assert "assert" not in task_of(word | {"prompt": "Write a function `split(a, n)`."}, "").prompt


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "x"},
        {"tests": ["assert 1"]},
        {"prompt": "x", "tests": [1]},
        {"prompt": "x", "tests": []},
        {"entry_point": "f", "test": "x"},
        MBPP | {"test_imports": "import math"},
        MBPP | {"test_setup_code": 5},
        {"prompt": "x", "tests": "def test_x(): assert x()"},
    ],
)
def test_a_line_without_task_or_tests_is_named(row):
    with pytest.raises(InputError, match="row 7"):
        task_of(row, "file: row 7")


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("def f():\n    return 1\n", "def f():\n    return 1"),
        ("Here:\n\n```python\nx = 1\n\ny = 2\n```\nIt works.", "x = 1\n\ny = 2"),
        ("```\nx = 1", "x = 1"),
        ("<PLAN>\nadd\n</PLAN>\n<CODE>\nx = 1\n</CODE>", "x = 1"),
        ("<CODE>\n```python\nx = 1\n```\n</CODE>", "x = 1"),
        ("x = 1\n```\ntext", "x = 1"),
        ("    return x\n```\ntext", "    return x"),
        ("Answer\n```python\ndef f(): return 1\n```", "def f(): return 1"),
        (
            "def f():\n    '''\n    ```\n    ex\n    ```\n    '''",
            "def f():\n    '''\n    ```\n    ex\n    ```\n    '''",
        ),
        ("```py3\r\nx = 1\r\n```", "x = 1"),
        ("First:\n```sh\npip install x y\n```\nThen:\n```\nx = 1\n```", "x = 1"),
        ("", ""),
    ],
)
def test_code_is_found_in_an_answer(answer, code):
    assert extract_code(answer) == code


@pytest.mark.parametrize(
    ("written", "ended"),
    [
        ("```\n", False),  # an opening fence
        ("Here:\n```python\nx = 1\n", False),
        ("Answer\n```python\n", False),  # a heading is Python too
        ("```\nx = 1\n```", True),
        ("x = 1\n```", True),
        ("    return 1\n```", True),  # the body of a function
        ("x = '```'\n", False),
        ("x = 1\n</CODE>", True),
    ],
)
def test_where_code_ends(written, ended):
    assert code_ended(written) is ended


def test_a_fence_after_the_prompt_ends_nothing(coder, monkeypatch):
    """What is written is looked at alone: the prompt's last line break and an opening fence are no closing fence."""
    from transformers import StoppingCriteriaList

    seen = []
    call = StoppingCriteriaList.__call__

    def watched(self, input_ids, scores, **kwargs):
        text = torch.tensor([coder.encoder.prompt("x") + coder.encoder.text("```\n")])
        ends = [c for c in self if type(c).__name__ == "Ended"]
        seen.append(ends[0](text, scores).item())
        return call(self, input_ids, scores, **kwargs)

    monkeypatch.setattr(StoppingCriteriaList, "__call__", watched)
    coder.generate([coder.encoder.prompt("x")], code_ended)
    assert seen and not any(seen)


def test_what_parses():
    assert parses("x = 1") and not parses("x = ") and not parses("") and not parses("# only a note")
    assert not parses("x\0") and not parses("(" * 5000)


def test_pass_at_k_is_the_unbiased_estimator():
    assert pass_at_k(10, 0, 1) == 0 and pass_at_k(10, 10, 3) == 1
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)  # of 6 pairs one has no right answer


def test_intervals_are_those_of_a_sample_of_tasks():
    """100 tasks, one answer each, 30 right: the standard error is 0.0458."""
    right = np.arange(100)[:, None] < 30
    found = eval_codegen.measure(right, right, 0 * right, Namespace(k=[1], bootstrap=2000))
    assert found["pass@1"] == pytest.approx(0.3)
    assert found["pass@1_interval_95"] == pytest.approx([0.3 - 1.96 * 0.0458, 0.3 + 1.96 * 0.0458], abs=0.015)


# ---------------------------------------------------------------------------------------------------------- generation


def flags(**given):
    args = infer_codegen.build_parser().parse_args(["--model_dir", "x", "--prompt", "x"])
    args.quantization, args.compute_dtype, args.max_new_tokens, args.temperature = "none", "float32", 24, 0.0
    for name, value in given.items():
        setattr(args, name, value)
    return args


@pytest.fixture(scope="module")
def coder(model_dir):
    return Coder.load(model_dir, flags())


def test_the_second_stage_goes_on_after_the_plan(coder, monkeypatch):
    asked = []
    generate = Coder.generate

    def watched(self, starts, ended, progress=None):
        asked.append((starts, ended))
        return generate(self, starts, ended, progress)

    monkeypatch.setattr(Coder, "generate", watched)
    (answer,) = coder.answers(["Add two numbers."], plan=True)
    (first, first_ended), (second, second_ended) = asked
    decode = coder.tokenizer.decode
    turn = coder.encoder.prompt(codegen_plan_prompt("Add two numbers."))
    assert first[0][: len(turn)] == second[0][: len(turn)] == turn
    assert decode(first[0][len(turn) :]) == "<PLAN>\n" and first_ended("add\n</PLAN>")
    assert decode(second[0][len(turn) :]) == f"<PLAN>\n{answer['plan']}\n</PLAN>\n<CODE>\n"
    assert second_ended("x = 1\n</CODE>") and not second_ended("x = 1\n")


def test_the_direct_prompt_is_that_of_training(coder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        Coder, "generate", lambda self, starts, ended, progress=None: asked.extend(starts) or [("x", 1)]
    )
    coder.answers(["Add."], plan=False)
    assert asked == [coder.encoder.prompt(codegen_prompt("Add."))]


def test_a_model_without_a_chat_template_gets_an_open_code_block(coder, tokenizer):
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    base = Coder(coder.model, plain, flags())
    starts = []
    base.generate = lambda s, ended, progress=None: starts.extend(s) or [("x = 1\n```", 3)]
    assert base.answers(["Add."], plan=False)[0]["code"] == "x = 1"
    assert plain.decode(starts[0]).endswith("Add.\n```python\n")


def test_every_end_token_of_chat_and_base_models_ends_an_answer(coder, tokenizer):
    ends = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert ends <= set(coder.ends)


def test_batches_do_not_change_greedy_answers(coder):
    prompts = [f"Write f{i}. " + "It is long. " * (i % 3) for i in range(5)]
    together = coder.answers(prompts, plan=False)
    coder.args.batch_size = 1
    try:
        assert coder.answers(prompts, plan=False) == together
    finally:
        coder.args.batch_size = 16


def test_samples_differ_and_come_back_with_the_same_seed(coder):
    coder.args.temperature = 1.0
    try:
        first = coder.answers(["Add."] * 4, plan=False)
        assert len({answer["code"] for answer in first}) > 1
        assert coder.answers(["Add."] * 4, plan=False) == first
    finally:
        coder.args.temperature = 0.0


def test_control_tokens_in_a_task_stay_text(coder, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt = PromptEncoder(tokenizer).prompt(codegen_prompt("say <|im_end|>"))
    assert prompt.count(end) == PromptEncoder(tokenizer).prompt(codegen_prompt("say")).count(end)
    with pytest.raises(InputError, match="exceed the context"):
        coder.answers(["word " * 2000], plan=False)


# -------------------------------------------------------------------------------------------------------- scripts


def test_the_first_answer_that_passes_is_kept():
    answers = [{"code": f"def f(): return {i}", "parses": True} for i in range(4)]
    assert infer_codegen.choose(answers, ["assert f() == 2"], 5)["passed"] == 3
    none = infer_codegen.choose(answers, ["assert f() == 9"], 5)
    assert none["passed"] is None and len(none["problems"]) == 4


def test_without_tests_an_answer_that_parses_is_kept():
    answers = [{"code": text, "parses": parses(text)} for text in ("def f(:", "x = 1", "y = 2")]
    coder = Namespace(answers=lambda prompts, plan_then_code: answers)
    assert infer_codegen.solve(coder, [("Write x.", [])], Namespace(n=3, plan_then_code=False)) == [answers[1]]


@pytest.mark.parametrize(
    ("tests", "problem"),
    [
        ("assert f(1)", None),
        ("def check(g):\n    assert g(1)\ncheck(f)", None),
        ("for i in range(3):\n    if f(i) != i:\n        raise ValueError(i)", None),
        ("", "can fail"),
        ("# later\n", "can fail"),
        ("assert True", "can fail"),
        ("import math\ndef test_f():\n    assert f(1) == 2", "can fail"),
        ("@mark.each([1])\ndef test_f(x=one()):\n    assert f(1) == 2", "can fail"),
        ("class TestF(Case):\n    def test_f(self):\n        assert f(1)", "can fail"),
        ("assert f(1", "not Python"),
    ],
)
def test_tests_that_cannot_fail_are_refused(tests, problem):
    found = flaw_of_tests([tests])
    assert found is None if problem is None else problem in found
    assert flaw_of_tests(["import math", tests]) == found


def test_a_prompt_prints_code_only_and_says_when_it_does_not_parse(model_dir, capsys):
    assert infer_codegen.main(["--model_dir", model_dir, "--prompt", "Add.", "--max_new_tokens", "16"]) == 0
    shown = capsys.readouterr()
    assert parses(shown.out) or "does not parse" in shown.err


def test_no_code_is_printed_where_no_answer_passes(model_dir, tmp_path, capsys):
    tests = tmp_path / "tests.py"
    tests.write_text("assert add(1, 2) == 3")
    argv = ["--model_dir", model_dir, "--prompt", "Add.", "--n", "2", "--tests", tests, "--max_new_tokens", "8"]
    assert infer_codegen.main([str(part) for part in argv]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "none of 2 answers passed" in shown.err


def test_a_file_keeps_order_and_marks_lines_that_cannot_be_done(model_dir, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"prompt": "Add.", "id": 1}), "broken", json.dumps({"input": "Sub."}), json.dumps({"id": 4})]
    lines += [json.dumps({"prompt": "word " * 2000}), json.dumps({"prompt": "x", "tests": 3})]
    lines += [json.dumps({"prompt": "x", "tests": "def test_x():\n    assert x()"})]
    source.write_text("\n".join(lines) + "\n")
    argv = [
        "--model_dir",
        model_dir,
        "--input",
        source,
        "--output",
        output,
        "--max_new_tokens",
        "8",
        "--plan_then_code",
    ]
    assert infer_codegen.main([str(part) for part in argv]) == 1
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row.get("error", {}).get("code") for row in rows] == [
        None,
        "not_json",
        None,
        "no_prompt",
        "too_long",
        "bad_tests",
        "bad_tests",
    ]
    assert set(rows[0]) == {"prompt", "id", "code", "plan", "parses"}


def test_evaluation_measures_both_modes(model_dir, tmp_path, capsys):
    data = tmp_path / "tasks.jsonl"
    data.write_text("\n".join(map(json.dumps, (HUMANEVAL, MBPP, OURS))))
    argv = ["--model_dir", model_dir, "--data", data, "--n", "2", "--k", "1", "2", "--max_new_tokens", "8", "--json"]
    assert eval_codegen.main([*map(str, argv), "--report_dir", str(tmp_path / "report")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [model["mode"] for model in summary["models"]] == ["direct", "plan"]
    assert all(model["pass@2"] == 0 and model["tasks"] == 3 for model in summary["models"])
    answers = [
        json.loads(line) for line in (tmp_path / "report").glob("0_*direct.jsonl").__next__().read_text().splitlines()
    ]
    assert len(answers) == 6 and all(answer["problem"] for answer in answers)


def test_references_are_checked(tmp_path, capsys):
    data = tmp_path / "tasks.jsonl"
    data.write_text("\n".join(map(json.dumps, (HUMANEVAL, MBPP, OURS))))
    assert eval_codegen.main(["--references", "--data", str(data)]) == 0
    assert "3 of 3" in capsys.readouterr().out
    data.write_text(json.dumps(OURS | {"solution": "def half(n): return n"}))
    assert eval_codegen.main(["--references", "--data", str(data)]) == 1


def test_prepare_leaves_out_what_fails_and_splits_by_task(tmp_path):
    rows = [OURS | {"task_id": i, "solution": f"def half(n): return n / {2 if i else 3}"} for i in range(20)]
    source = tmp_path / "tasks.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    assert codegen_prepare.main(["--src", str(source), "--outdir", str(tmp_path / "out")]) == 0
    sft, validation = (
        [json.loads(line) for line in (tmp_path / "out" / f"codegen_{part}.jsonl").read_text().splitlines()]
        for part in ("sft", "validation")
    )
    assert len(sft) + len(validation) == 19 and sft and validation
    assert sft[0] == {"input": codegen_prompt(OURS["prompt"]), "output": "def half(n): return n / 2"}
    assert preparation(str(tmp_path / "out" / "codegen_sft.jsonl"))["split_seed"] == 0


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        ("infer_codegen.py", ["--model_dir", "x"], "give either --prompt"),
        ("infer_codegen.py", ["--model_dir", "x", "--prompt", " "], "--prompt is empty"),
        ("infer_codegen.py", ["--model_dir", "x", "--prompt", "x", "--n", "2", "--temperature", "0"], "same answer"),
        ("infer_codegen.py", ["--model_dir", "x", "--prompt", "x", "--tests", "no.py"], "no.py"),
        ("infer_codegen.py", ["--model_dir", "x", "--prompt", "x", "--tests", os.devnull], "can fail"),
        ("eval_codegen.py", ["--model_dir", "x", "--k", "2"], "--k"),
        ("eval_codegen.py", [], "--references"),
        ("eval_codegen.py", ["--model_dir", "x", "--data", "no.jsonl"], "no.jsonl"),
        ("codegen_prepare.py", ["--src", "no.jsonl", "--outdir", "x"], "no.jsonl"),
    ],
)
def test_wrong_input_ends_with_status_2_and_one_line(script, argv, message, tmp_path):
    done = run_cli(script, *argv, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
