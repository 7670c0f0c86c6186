"""What a user meets at the command line: help at once, one line and the right exit status for what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import all_files

import creditmix_prepare
import dpo_prepare
import eval_codegen
import eval_creditmix
import eval_idp
import kd_prepare
import sft_train
from common import InputError
from distil.cli import label_numbers, new_parser, refuse_unused, run_script
from distil.teachers import tabular
from distil.testing import ROOT, credit_rows, run_cli

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "run_script(main)" in path.read_text())
ENTRY_POINTS = sorted(path.name for path in ROOT.glob("*.py") if 'if __name__ == "__main__"' in path.read_text())
GOOD_ROW = {"question": "Age: 30, Occupation: Lawyer", "answer": "Good", "customer_id": "C1"}


# ---------------------------------------------------------------------------------------------------------------- help


def test_every_entry_point_maps_its_exit_status():
    assert {"creditmix_prepare.py", "eval_creditmix.py", "infer_creditmix.py", "sft_train.py"} <= set(SCRIPTS)
    assert SCRIPTS == ENTRY_POINTS


HELP = """
import runpy, sys
heavy = {"torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "sklearn", "pandas", "matplotlib"}
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    print("STATUS", stop.code, "HEAVY", *sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_comes_without_a_heavy_import(script):
    command = [sys.executable, "-c", HELP, str(ROOT / script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    *shown, last = done.stdout.splitlines()
    assert last == "STATUS 0 HEAVY", done.stderr
    text = "\n".join(shown)
    assert text.startswith("usage: ") and script in text
    assert f"python {script} " in text  # one command that works
    assert "None)" not in text and "%(default)" not in text  # defaults are in words


# ------------------------------------------------------------------------------------------- exit status and one line


def test_an_output_that_nobody_reads_on_is_one_line(here, credit_file):
    command = [sys.executable, str(ROOT / "creditmix_prepare.py"), "--src", credit_file, "--outdir", "data"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == "creditmix_prepare.py: stopped: stdout was closed (`| head`)\n"


def status_of(monkeypatch, main, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["/somewhere/script.py", *flags])
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    return stop.value.code


def raising(error: BaseException):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "status", "line"),
    [
        (lambda argv: 0, 0, ""),
        (lambda argv: None, 0, ""),
        (lambda argv: 1, 1, ""),
        (raising(InputError("x.json: no such file")), 2, "script.py: error: x.json: no such file\n"),
        (
            raising(RuntimeError("two\n  lines")),
            1,
            "script.py: failed: RuntimeError: two lines (--debug shows the traceback)\n",
        ),
        (
            raising(OSError(28, "No space left on device")),
            1,
            "script.py: failed: OSError: the disk is full; free some space, then resume (trainers: --resume, others: "
            "the same command) (--debug shows the traceback)\n",
        ),
        (
            raising(ModuleNotFoundError("No module named 'sklearn'", name="sklearn")),
            2,
            "script.py: error: the package sklearn is missing: source .venv/bin/activate (`make demo` makes it), or "
            "pip install -r requirements.txt\n",
        ),
        (raising(KeyboardInterrupt()), 130, "script.py: interrupted\n"),
    ],
    ids=["done", "none", "failed lines", "wrong input", "failure", "full disk", "no package", "ctrl-c"],
)
def test_exit_status(monkeypatch, capsys, main, status, line):
    assert status_of(monkeypatch, main) == status
    assert capsys.readouterr().err == line


def test_debug_shows_the_traceback_of_a_failure_but_not_of_wrong_input(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "--debug"])
    with pytest.raises(RuntimeError, match="inside"):
        run_script(raising(RuntimeError("inside")))
    assert status_of(monkeypatch, raising(InputError("wrong")), "--debug") == 2
    assert capsys.readouterr().err == "script.py: error: wrong\n"


# A handful as a user types them; all of them end before torch is imported.
WRONG = {
    "missing raw file": (
        ["creditmix_prepare.py", "--src", "missing.json", "--outdir", "out"],
        "creditmix_prepare.py: error: missing.json: no such file",
    ),
    "broken JSONL line": (
        ["creditmix_prepare.py", "--src", "broken.jsonl", "--outdir", "out"],
        "creditmix_prepare.py: error: broken.jsonl: line 3 is not JSON (",
    ),
    "missing adapter folder": (
        ["infer_creditmix.py", "--model_dir", "runs/nothing", "--features", "Age: 30"],
        "infer_creditmix.py: error: runs/nothing: no such model folder; under runs/ there are: runs/killed",
    ),
    "nothing to do": (
        ["infer_creditmix.py", "--model_dir", "smollm2-135m"],
        "infer_creditmix.py: error: give either --features, or --input and --output",
    ),
    "a killed run": (
        ["eval_creditmix.py", "--model_dir", "runs/killed", "--data", "good.jsonl", "--report_dir", "out"],
        "eval_creditmix.py: error: runs/killed: this run did not finish (no run.json); resume it with --resume",
    ),
    "a report inside a file": (
        ["eval_creditmix.py", "--model_dir", "smollm2-135m", "--data", "good.jsonl", "--report_dir", "plain/report"],
        "eval_creditmix.py: error: plain: is a file, a folder is needed",
    ),
    "an output inside a file": (
        ["infer_creditmix.py", "--model_dir", "m", "--input", "good.jsonl", "--output", "plain/out.jsonl"],
        "infer_creditmix.py: error: plain: is a file, a folder is needed",
    ),
    "an adapter inside a file": (
        ["sft_train.py", "--data", "sft.jsonl", "--save_dir", "plain/run"],
        "sft_train.py: error: plain: is a file, a folder is needed",
    ),
    "a CSV where JSONL is needed": (
        ["infer_codegen.py", "--model_dir", "m", "--input", "open.csv", "--output", "out.jsonl"],
        "infer_codegen.py: error: open.csv: JSONL is needed, one object a line",
    ),
    "a document that is not there": (
        ["infer_idp.py", "--model_dir", "m", "--document", "invoice.txt"],
        "infer_idp.py: error: --document invoice.txt: no such file",
    ),
    "the input as output": (
        ["infer_creditmix.py", "--model_dir", "m", "--input", "good.jsonl", "--output", "./good.jsonl", "--overwrite"],
        "infer_creditmix.py: error: good.jsonl: is the --input; choose another --output",
    ),
    "half a character": (
        ["creditmix_prepare.py", "--src", "half.jsonl", "--outdir", "out"],
        "creditmix_prepare.py: error: half.jsonl: line 1 is not JSON (",
    ),
    "nested too deep": (
        ["creditmix_prepare.py", "--src", "deep.json", "--outdir", "out"],
        "creditmix_prepare.py: error: deep.json: not a JSON list (nested too deep)",
    ),
    "a cell that does not end": (
        ["creditmix_prepare.py", "--src", "open.csv", "--outdir", "out"],
        "creditmix_prepare.py: error: open.csv: row 2: field larger than field limit",
    ),
    "a number with two readings": (
        ["creditmix_prepare.py", "--src", "two.csv", "--outdir", "out"],
        'creditmix_prepare.py: error: two.csv: row 2, column Annual_Income: "19.114" has two readings and no other '
        "value of the column decides: --decimal . reads 19.114, --decimal , reads 19114\n",
    ),
    "a training file without its field": (
        ["sft_train.py", "--data", "good.jsonl", "--save_dir", "out"],
        'sft_train.py: error: good.jsonl: line 1 needs "input" as a non-empty string, found fields [',
    ),
}


@pytest.mark.parametrize(("command", "line"), WRONG.values(), ids=WRONG)
def test_wrong_input_ends_with_status_2_and_one_line(here, command, line):
    Path("good.jsonl").write_text(json.dumps(GOOD_ROW) + "\n")
    Path("broken.jsonl").write_text(json.dumps(GOOD_ROW) + "\n\n{oops\n")
    Path("sft.jsonl").write_text('{"input": "a", "output": "b"}\n')
    Path("half.jsonl").write_text('{"question": "Age: \\ud800", "answer": "Good"}\n')
    Path("deep.json").write_text("[" * 100_000 + "]" * 100_000)
    columns = "Customer_ID,Age,Occupation,Annual_Income,Outstanding_Debt,Credit_Utilization_Ratio,Payment_Behaviour"
    Path("open.csv").write_text(f'{columns},Credit_Mix\nC1,30,"' + "x\n" * 100_000)
    Path("two.csv").write_text(f'{columns},Credit_Mix\nC1,30,x,"19.114","809,981",5,y,Good\n')
    killed = here / "runs/killed"
    (killed / "checkpoints/checkpoint-2").mkdir(parents=True)
    (killed / "adapter_config.json").write_text('{"base_model_name_or_path": "smollm2-135m", "peft_type": "LORA"}')
    (killed / "adapter_model.safetensors").touch()
    Path("plain").touch()
    before = all_files(here)
    done = run_cli(*command, cwd=here)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1
    assert all_files(here) == before


def test_every_reader_of_raw_tables_has_decimal(here, monkeypatch, model_dir):
    for script, reader, flags in (
        (creditmix_prepare, creditmix_prepare, ["--src", "x.csv", "--outdir", "out"]),
        (eval_creditmix, eval_creditmix, ["--model_dir", model_dir, "--data", "x.csv"]),
        (kd_prepare, tabular, ["--teacher", "tabular", "--src", "x.csv", "--output", "out.jsonl"]),
    ):
        monkeypatch.setattr(reader, "read_rows", lambda path, *more: pytest.fail(f"{path} {more}"))
        with pytest.raises(pytest.fail.Exception, match=r"^x\.csv .*','"):
            script.main([*flags, "--decimal", ","])


def test_a_finished_command_has_status_0_and_its_files(here):
    Path("raw.json").write_text(json.dumps(credit_rows(customers=90)))
    done = run_cli("creditmix_prepare.py", "--src", "raw.json", "--outdir", "data", cwd=here)
    assert done.returncode == 0, done.stderr
    assert "wrote " in done.stdout
    assert all_files(here / "data") == [
        f"creditmix_{name}" for name in ("dpo.jsonl", "kd.jsonl", "prepared.json", "sft.jsonl", "val.jsonl")
    ]


def test_failed_lines_end_a_batch_with_status_1(here, model_dir):
    Path("in.jsonl").write_text('{"features": "Age: 30"}\n{}\n')
    flags = ["--model_dir", model_dir, "--quantization", "none", "--null_prompts", "1"]
    done = run_cli("infer_creditmix.py", *flags, "--input", "in.jsonl", "--output", "out.jsonl", cwd=here)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "out.jsonl: 1 of 2 lines carry an error"
    assert all_files(here) == ["in.jsonl", "out.jsonl"]


def test_a_response_is_the_only_thing_on_standard_output(here, model_dir):
    done = run_cli("infer_creditmix.py", "--model_dir", model_dir, "--features", "Age: 30", cwd=here)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model_name"] == model_dir


def test_a_path_of_the_wrong_kind_ends_with_status_2(capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        run_script(lambda _: tmp_path.read_text() and 0)
    assert "Is a directory; check the path" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", str(2**32), "x"])
def test_seeds_that_generators_do_not_take_are_refused(capsys, seed):
    for main in (creditmix_prepare.main, eval_creditmix.main, sft_train.main):
        with pytest.raises(SystemExit) as stop:
            main(["--model_dir", "m", "--seed", seed] if main is eval_creditmix.main else ["--seed", seed])
        assert stop.value.code == 2 and "--seed" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["0", "1.5", "nan", "x"])
def test_shares_of_gold_labels_out_of_range_are_refused(capsys, share):
    needed = {eval_creditmix.main: ["--model_dir", "m"], kd_prepare.main: ["--teacher", "tabular", "--output", "o"]}
    for main in (creditmix_prepare.main, *needed):
        with pytest.raises(SystemExit) as stop:
            main([*needed.get(main, []), "--gold_share", share])
        assert stop.value.code == 2 and "--gold_share" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--a", "5", "--b", "--c", "x"], "--a, --b: only with --d; --c: for nothing; leave out what has no effect"),
        (["--a", "1"], "--a: only with --d; leave out"),  # its default
        (["--d", "2", "--c", "late"], "--c: for nothing; leave out"),  # a default of set_defaults
        (["--d", "2"], None),
        ([], None),
    ],
)
def test_flags_that_would_be_ignored_are_named(argv, message):
    parser = new_parser("")
    parser.add_argument("--a", type=int, default=1)
    parser.add_argument("--b", action="store_true")
    parser.add_argument("--c")
    parser.add_argument("--d")
    parser.set_defaults(c="late")
    unused = {"only with --d": [] if "--d" in argv else ["a", "b"], "for nothing": ["c"]}
    if message is None:
        return refuse_unused(parser, argv, unused)
    with pytest.raises(InputError, match=message):
        refuse_unused(parser, argv, unused)


IGNORED = {
    eval_creditmix.main: [
        ("--model_dir m --fit_bias likelihood --fit_per_class 9 --keep_base", "--fit_bias, --fit_per_class, --keep_b"),
        ("--model_dir m --reference m", "--reference: only with several models or --baselines"),
        ("--model_dir m --calibration none --null_prompts 3", "--null_prompts: --calibration none uses no prior"),
        ("--model_dir m --aggregate mean", "--aggregate: only with --verbalizers"),
    ],
    eval_idp.main: [("--model_dir m --retries 0 --seed 0", "--seed: only for retries")],
    eval_codegen.main: [
        ("--references --temperature 0.5 --report_dir r --k 1", "--k, --report_dir, --temperature: only for answers"),
        ("--model_dir m --seed 0", "--seed: only with --temperature above 0"),
    ],
    dpo_prepare.main: [
        ("--task label --n 4 --gold --temperature 0.8", "--n, --gold, --temperature: only for --task json or code"),
        ("--task label --schema s --seconds 1", "--schema: only for --task json; --seconds: only for --task code"),
        ("--task json --seconds 5", "--seconds: only for --task code"),
        ("--task code --schema s", "--schema: only for --task json"),
    ],
}


@pytest.mark.parametrize(("main", "flags", "message"), [(m, *case) for m, cases in IGNORED.items() for case in cases])
def test_flags_without_effect_are_refused_by_evaluations_and_pairs(here, main, flags, message, model_dir):
    files = ["--model_dir", model_dir, "--input", "in.jsonl", "--output", "out.jsonl"]
    with pytest.raises(InputError, match=message):
        main([*(files if main is dpo_prepare.main else []), *flags.split()])
    assert not list(here.iterdir())


# ----------------------------------------------------------------------------------------------------- files that fail


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows; one JSON object a line with input, output is expected"),
        ("\n  \n", "no rows"),
        (
            '{"input": "a", "output": "b"}\n{"input": "a"}\n',
            'line 2 needs "output" as a non-empty string, found fields',
        ),
        ('{"input": "a", "output": 5}\n', 'line 1 needs "output" as a non-empty string, found 5'),
        ('{"input": "a", "output": " "}\n', 'line 1 needs "output" as a non-empty string, found " "'),
        ('{"input": "a", "output": "b"}\n{"input": \n', "line 2 is not JSON ("),
        ('"text"\n', "line 1 is str, not an object"),
        ("{}\n{}\n", 'line 1 needs "input" as a non-empty string, found fields [] (and 3 more problems)'),
    ],
)
def test_training_files_are_checked_before_a_model_loads(here, text, message):
    Path("train.jsonl").write_text(text)
    with pytest.raises(InputError) as caught:
        sft_train.main(["--data", "train.jsonl", "--save_dir", "out", "--student", "runs/nothing"])
    assert str(caught.value).startswith(f"train.jsonl: {message}")
    assert all_files(here) == ["train.jsonl"]


@pytest.mark.parametrize("kind", ["file", "old run"])
def test_prepare_leaves_what_it_must_not_touch(here, data, kind):
    if kind == "file":
        Path("out").write_text("precious")
        with pytest.raises(InputError, match="out: is a file, a folder is needed"):
            creditmix_prepare.main(["--src", data, "--outdir", "out"])
        assert Path("out").read_text() == "precious"
        return
    Path("out").mkdir()
    Path("out/creditmix_sft.jsonl").write_text("old\n")
    Path("bad.jsonl").write_text(json.dumps(GOOD_ROW | {"answer": "Fair"}) + "\n")
    with pytest.raises(InputError, match=r"unknown label 'Fair' \(1\); expected Good, Standard, Bad or _"):
        creditmix_prepare.main(["--src", "bad.jsonl", "--outdir", "out"])
    assert all_files(here / "out") == ["creditmix_sft.jsonl"]
    assert Path("out/creditmix_sft.jsonl").read_text() == "old\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hard_standard", "2"], "--hard_standard is a share from 0 to 1"),
        (["--per_class", "-1"], "--per_class 0 or more"),
        (["--per_class", "5000"], "5000 rows a class requested, but only"),
    ],
)
def test_prepare_refuses_wrong_flags(here, data, flags, message):
    with pytest.raises(InputError, match=message):
        creditmix_prepare.main(["--src", data, "--outdir", "out", *flags])
    assert all_files(here) == ["raw.json"]


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py") if path.stem != "common"))
def test_help_needs_no_package(script):
    """So that a script started outside the environment can say that it is outside."""
    done = subprocess.run([sys.executable, "-S", str(ROOT / script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--debug" in done.stdout, done.stderr


def test_a_label_may_have_an_equals_sign():
    assert label_numbers("<=50K=0.5,>50K=-1", "--bias", ["<=50K", ">50K"]) == {"<=50K": 0.5, ">50K": -1.0}
