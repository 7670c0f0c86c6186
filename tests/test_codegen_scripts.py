"""infer_codegen.py, eval_codegen.py and codegen_prepare.py as users run them."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
from conftest import HUMANEVAL, MBPP, OURS, read_lines, write_lines

import codegen_prepare
import eval_codegen
import infer_codegen
from common import InputError
from distil.codegen.coder import CodegenOptions
from distil.codegen.tasks import codegen_prompt, parses
from distil.splits import preparation
from distil.testing import run_cli


def test_intervals_are_those_of_a_sample_of_tasks():
    """100 tasks, one answer each, 30 right: the standard error is 0.0458."""
    lines = [{"passed": number < 30, "parses": number < 50, "tokens": 7} for number in range(100)]
    result = eval_codegen.measure(lines, 1, (1,), 2000)
    assert (result["parse_rate"], result["tokens"], result["tasks"]) == (0.5, 7, 100)
    assert result["pass@1"] == pytest.approx(0.3)
    assert result["pass@1_interval_95"] == pytest.approx([0.3 - 1.96 * 0.0458, 0.3 + 1.96 * 0.0458], abs=0.015)


def test_without_tests_an_answer_that_parses_is_kept():
    answers = [{"code": text, "parses": parses(text)} for text in ("def f(:", "x = 1", "y = 2")]
    coder = SimpleNamespace(answers=lambda prompts, plan: answers, options=CodegenOptions(n=3))
    assert infer_codegen.solve(coder, [("Write x.", [])], False, 5.0) == [answers[1]]


def test_a_prompt_prints_code_only_and_reports_what_does_not_parse(model_dir, capsys):
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
    lines = [{"prompt": "Add.", "id": 1}, "broken", {"input": "Sub."}, {"id": 4}, {"prompt": "word " * 2000}]
    lines += [{"prompt": "x", "tests": 3}, {"prompt": "x", "tests": "def test_x():\n    assert x()"}]
    write_lines(source, lines)
    argv = ["--model_dir", model_dir, "--input", source, "--output", output, "--max_new_tokens", "8"]
    assert infer_codegen.main([*map(str, argv), "--plan_then_code"]) == 1
    rows = read_lines(output)
    codes = [None, "not_json", None, "no_prompt", "too_long", "bad_tests", "bad_tests"]
    assert [row.get("error", {}).get("code") for row in rows] == codes
    assert set(rows[0]) == {"prompt", "id", "code", "plan", "parses"}


def test_evaluation_measures_both_modes(model_dir, tmp_path, capsys):
    data = write_lines(tmp_path / "tasks.jsonl", [HUMANEVAL, MBPP, OURS])
    argv = ["--model_dir", model_dir, "--data", data, "--n", "2", "--k", "1", "2", "--max_new_tokens", "8", "--json"]
    assert eval_codegen.main([*map(str, argv), "--report_dir", str(tmp_path / "report")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [model["mode"] for model in summary["models"]] == ["direct", "plan"]
    assert all(model["pass@2"] == 0 and model["tasks"] == 3 for model in summary["models"])
    answers = read_lines(next((tmp_path / "report").glob("0_*direct.jsonl")))
    assert len(answers) == 6 and all(answer["problem"] for answer in answers)


def test_references_are_checked(tmp_path, capsys):
    data = write_lines(tmp_path / "tasks.jsonl", [HUMANEVAL, MBPP, OURS])
    assert eval_codegen.main(["--references", "--data", data]) == 0
    assert "3 of 3" in capsys.readouterr().out
    write_lines(data, [OURS | {"solution": "def half(n): return n"}])
    assert eval_codegen.main(["--references", "--data", data]) == 1
    assert "test 1 fails" in capsys.readouterr().out


def test_prepare_leaves_out_what_fails_and_splits_by_task(tmp_path):
    rows = [OURS | {"task_id": i, "solution": f"def half(n): return n / {2 if i else 3}"} for i in range(20)]
    source = write_lines(tmp_path / "tasks.jsonl", rows)
    assert codegen_prepare.main(["--src", source, "--outdir", str(tmp_path / "out")]) == 0
    sft, validation = (read_lines(tmp_path / "out" / f"codegen_{part}.jsonl") for part in ("sft", "validation"))
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


@pytest.mark.parametrize("flags", [["--overwrite"], ["--seed", "1"], ["--seconds", "3"]])
def test_flags_without_effect_are_refused(flags, model_dir):
    with pytest.raises(InputError, match=f"{flags[0]}: only"):
        infer_codegen.main(["--model_dir", model_dir, "--prompt", "Add.", *flags])
