"""Fixtures: a tokenizer and a random two-layer Qwen2, so that no test needs a network or a downloaded model."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distil.testing import (
    ROOT,
    Endpoint,
    build_tokenizer,
    completion,
    credit_rows,
    load_named,
    save_adapter,
    save_random_model,
)

os.environ["HF_HUB_OFFLINE"] = "1"


def read_lines(path: str | Path) -> list[dict]:
    """Return the objects of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_lines(path: str | Path, rows: list) -> str:
    """Write objects (or lines, as they are) to a JSONL file and return its path."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(path).write_text("".join(line + "\n" for line in lines))
    return str(path)


def all_files(folder: Path) -> list[str]:
    """Return the paths of everything in a folder, relative to it, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@contextlib.contextmanager
def other_process(code: str, *arguments: object) -> Iterator[subprocess.Popen]:
    """Run Python code in another process, from its first line of output on, and kill it at the end."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout.readline()
            yield process
        finally:
            process.kill()


# Holds sys.argv[1] until it is killed.
HOLD = """
import sys, time
from distil.files import hold
with hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(100)
"""


def in_two_processes(script: str | Path, *flags: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run a script in two processes on the CPU, as torchrun starts them; text output captured."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(ROOT / script), *map(str, flags)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=110, env=environment)


INVOICE_SCHEMA = {  # small enough that a random model's answer fits some 200 tokens
    "type": "object",
    "properties": {
        "number": {"type": "string", "minLength": 1, "maxLength": 12},
        "date": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
        "total": {"type": "number", "minimum": 0},
        "paid": {"type": ["boolean", "null"]},
        "currency": {"enum": ["EUR", "USD"]},
        "items": {
            "type": "array",
            "minItems": 1,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": 8}, "qty": {"type": "integer"}},
                "required": ["name", "qty"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["number", "date", "total", "paid", "currency", "items"],
    "additionalProperties": False,
}


def labelled_rows(customers: int = 400) -> list[Any]:
    """Return CreditRows of customers with one to three months each."""
    from distil.creditmix.rows import CreditRow
    from distil.tasks import default_task

    return [
        CreditRow(f"C{number}", f"Age: {18 + number % 60}, Month: {month}", default_task().labels[number % 3])
        for number in range(customers)
        for month in range(1 + number % 3)
    ]


def assert_error(reply: Any, status: int, code: str) -> dict:
    """Check status, shape and code of a server's error reply, and return the error."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert reply.json().keys() == {"error"} and error.keys() == {"code", "message", "hint"}
    assert error["code"] == code
    return error


# Flags of a tiny model and of its scoring: unquantised float32, two content-free prompts.
FLOAT32 = ["--quantization", "none", "--compute_dtype", "float32"]
PLAIN = [*FLOAT32, "--null_prompts", "2"]


def plain(flags: tuple[str, ...]) -> list[str]:
    """Return PLAIN as far as it has an effect: --calibration none uses no prior."""
    return FLOAT32 if "--calibration none" in " ".join(flags) else PLAIN


CREDIT_TEXT = (  # the example of the whitepaper
    "Age: 23.0, Occupation: Scientist, Annual Income: 19114.12, Outstanding Debt: 809.98, "
    "Credit Utilization Ratio: 35.03, Payment Behaviour: Low_spent_Small_value_payments"
)
RESPONSE_FIELDS = ["model_name", "prediction", "scores", "raw_scores", "prior", "probabilities", "top2_margin"]


def stored_priors() -> list[Path]:
    """Return the files of the priors in the cache."""
    from distil.files import cache_dir

    return sorted((cache_dir() / "priors").glob("*"))


def wait_for(check: Callable[[], Any], seconds: float = 60) -> Any:
    """Return the first true result of check(). Fails where there is none within the seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := check():
            return result
        time.sleep(0.05)
    raise AssertionError("nothing within the time")


def infer_one(capsys: Any, model: str, *flags: str) -> dict:
    """Return infer_creditmix's response to CREDIT_TEXT."""
    import infer_creditmix

    capsys.readouterr()
    assert infer_creditmix.main(["--model_dir", model, *plain(flags), "--features", CREDIT_TEXT, *flags]) == 0
    return json.loads(capsys.readouterr().out)


def evaluate(model: str, data: str, *flags: str) -> int:
    """Return the exit status of eval_creditmix on 20 validation rows a class, with few resamples."""
    import eval_creditmix

    small = [] if "--val_per_class" in flags else ["--val_per_class", "20"]
    prior = FLOAT32 if "--fit" not in flags and "--calibration none" in " ".join(flags) else PLAIN
    return eval_creditmix.main(["--model_dir", model, "--data", data, *prior, "--bootstrap", "50", *small, *flags])


def evaluate_json(capsys: Any, model: str, data: str, *flags: str) -> dict:
    """Return the object that `evaluate` prints with --json, alone on standard output."""
    capsys.readouterr()
    assert evaluate(model, data, "--json", *flags) == 0
    return json.loads(capsys.readouterr().out)


METHODS = ("sft", "kd", "dpo")
# SGD, since Adam hides a gradient of the wrong scale.
SGD = ("--optimizer", "sgd", "--learning_rate", "0.5", "--lora_dropout", 0, "--quantization", "none")
EXACT = (*SGD, "--compute_dtype", "float32", "--epochs", 2, "--max_steps", 0)
# Answers of one to many tokens, so that a mean over the wrong set of tokens shows.
ANSWERS = ("Good", "Standard, after a long and careful look at it", "Bad", "Typical debt")


def trainer(method: str) -> Any:
    """Return the module of a trainer's script."""
    import importlib

    return importlib.import_module(f"{method}_train")


def row_of(method: str, turn: str = "Debt: 1") -> dict:
    """Return one row as a trainer takes it."""
    return {
        "sft": {"input": turn, "output": "Good"},
        "kd": {"input": turn, "teacher_output": "Good"},
        "dpo": {"prompt": turn, "chosen": "Good", "rejected": "Bad"},
    }[method]


def refused(method: str, rows: list[dict], folder: Path, model_dir: str, *flags: object) -> str:
    """Return the error with which a trainer refuses rows or flags; it has written nothing."""
    import pytest

    from common import InputError

    path, save_dir = write_lines(folder / "rows.jsonl", rows), folder / "never"
    argv = ["--student", model_dir, "--data", path, "--save_dir", save_dir, *flags]
    with pytest.raises(InputError) as error:
        trainer(method).main([str(flag) for flag in argv])
    assert not save_dir.exists()
    return str(error.value)


def adapter_tensors(save_dir: Path | str) -> dict[str, Any]:
    """Return the tensors of a saved adapter by name."""
    from safetensors.torch import load_file

    return load_file(Path(save_dir) / "adapter_model.safetensors")


def first_step(save_dir: Path) -> dict:
    """Return the first entry of a run's training curve."""
    return json.loads((save_dir / "training_curve.json").read_text())[0]


def run_json(save_dir: Path) -> dict:
    """Return the record of a finished run."""
    return json.loads((save_dir / "run.json").read_text())


def assert_same_tensors(one: dict[str, Any], other: dict[str, Any], atol: float) -> None:
    """Fail where two sets of tensors differ in names or, by more than `atol`, in values."""
    import torch

    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def gold_rows(count: int) -> list[dict]:
    """Return CreditMix prompts with right answers."""
    from distil.tasks import default_task

    rows = credit_rows(customers=count, months=1)
    task = default_task()
    return [{"input": task.prompt(row["question"]), "output": task.labels[i % 3]} for i, row in enumerate(rows)]


def answer_in_turn(server: Endpoint, texts: list[str]) -> None:
    """Let an endpoint answer a prompt that ends with the digit n with the n-th text."""
    server.reply_to = lambda prompt: completion(texts[int(prompt[-1])], {})


def change_replies(server: Endpoint, change: Any) -> None:
    """Let change(prompt, choice) edit the choice in each reply of an endpoint."""
    reply_to = server.reply_to

    def reply(prompt: str) -> dict:
        answer = reply_to(prompt)
        change(prompt, answer["choices"][0])
        return answer

    server.reply_to = reply


def ask_endpoint(url: str, *flags: object, source: str = "in.jsonl") -> int:
    """Run kd_prepare.py with an endpoint as teacher, from `source` to kd.jsonl; return its exit status."""
    import kd_prepare

    argv = ["--teacher_url", url, "--teacher_model", "m", "--input", source, "--output", "kd.jsonl", *flags]
    return kd_prepare.main([str(flag) for flag in argv])


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


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer) -> str:
    return save_random_model(tmp_path_factory.mktemp("model") / "tiny-qwen2", tokenizer, "qwen2")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch, request):
    """Give each test a separate cache of priors; slow tests keep the user's cache, where the converted model is."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setenv("DISTIL_SLM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def credit_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("raw") / "credit.json"
    path.write_text(json.dumps(credit_rows()))
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """Make an empty folder the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def data(here) -> str:
    """Write a raw CreditMix file of 60 customers in the working directory."""
    path = here / "raw.json"
    path.write_text(json.dumps(credit_rows(customers=60)))
    return str(path)


@pytest.fixture(scope="session")
def decoder(model_dir):
    """Return a JSON decoder of the tiny model."""
    from distil.idp.decoder import JsonDecoder

    return JsonDecoder(*load_named(model_dir, "none", "float32"))


@pytest.fixture
def schema_file(tmp_path) -> Path:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(INVOICE_SCHEMA))
    return path


@pytest.fixture
def own_server_log(here):
    """Reset the server's log handlers after a test, and run it in an empty folder.

    A handler of one test must not write to its closed output in the next, and adapters in runs/ of the starting
    folder would be used."""
    yield
    log = logging.getLogger("serve_creditmix")
    log.handlers, log.propagate = [], True


@pytest.fixture(scope="session")
def credit_adapter(tmp_path_factory, model_dir) -> str:
    """Save a CreditMix adapter with random weights; copy it before anything is written next to it."""
    return save_adapter(tmp_path_factory.mktemp("adapter") / "creditmix_sft", model_dir)


# ------------------------------------------------------------------------------------------------- tests of trainers


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory, tokenizer) -> str:
    """Save a random Llama: its projections have no bias, as the embedded model's."""
    return save_random_model(tmp_path_factory.mktemp("model") / "tiny-llama", tokenizer, "llama")


@pytest.fixture(scope="session")
def training_files(tmp_path_factory) -> dict[str, str]:
    """Write ten rows for each trainer: not a multiple of 4, so the last step of an epoch is a small one."""
    folder = tmp_path_factory.mktemp("rows")
    turns = [f"Debt: {37 * number}, Age: {20 + number}" for number in range(10)]
    pairs = [(turn, ANSWERS[number % len(ANSWERS)]) for number, turn in enumerate(turns)]
    teacher = [{"input": turn, "teacher_output": answer} for turn, answer in pairs]
    good = [(1 + number % 7) / 10 for number in range(10)]
    rows = {
        "sft": [{"input": turn, "output": answer} for turn, answer in pairs],
        "kd": [
            row | {"label_probs": {"Good": share, "Standard": 0.9 - share, "Bad": 0.1}}
            for row, share in zip(teacher, good, strict=True)
        ],
        "kd_hard": teacher,
        "dpo": [
            {"prompt": turn, "chosen": answer, "rejected": ANSWERS[(number + 1) % len(ANSWERS)]}
            for number, (turn, answer) in enumerate(pairs)
        ],
    }
    return {name: write_lines(folder / f"{name}.jsonl", lines) for name, lines in rows.items()}


@pytest.fixture
def train(model_dir, training_files, tmp_path):
    """Train in this process and return the run folder. Later flags win over the ones here."""

    def train(method: str, name: str, *flags, rows: str | None = None, base: bool = True) -> Path:
        save_dir = tmp_path / name
        argv = ["--data", training_files[rows or method], "--save_dir", save_dir, "--warmup_steps", 0]
        argv += ["--max_steps", 4, *(["--student", model_dir] if base else [])]
        assert trainer(method).main([str(flag) for flag in [*argv, *flags]]) == 0
        return save_dir

    return train


@pytest.fixture(scope="session")
def sft_adapter(model_dir, training_files, tmp_path_factory) -> str:
    """Train an adapter far enough from its start that rounding it to bf16 would show."""
    save_dir = str(tmp_path_factory.mktemp("adapters") / "sft")
    flags = ["--max_steps", "6", "--warmup_steps", "0", "--learning_rate", "3e-3", "--lora_dropout", "0.1"]
    trainer("sft").main(["--student", model_dir, "--data", training_files["sft"], "--save_dir", save_dir, *flags])
    return save_dir


@pytest.fixture
def built(monkeypatch, tmp_path):
    """Build the trainer of a script's flags without running it."""
    from distil.training import run

    monkeypatch.chdir(tmp_path)

    def built(method: str, *flags):
        trainers = []
        with monkeypatch.context() as patch:
            patch.setattr(run, "train_and_save", lambda trainer, *rest: trainers.append(trainer))
            trainer(method).main([str(flag) for flag in flags])
        return trainers[0]

    return built


@pytest.fixture
def endpoint(monkeypatch):
    """Make fake endpoints of a teacher, without the long pauses between retries."""
    from distil.teachers.endpoint import HttpTeacher

    monkeypatch.setattr(HttpTeacher, "_pause", lambda self, seconds: self._stopped.wait(min(seconds, 0.02)))
    servers = []

    def make(*args, **kwargs) -> Endpoint:
        servers.append(Endpoint(*args, **kwargs))
        return servers[-1]

    yield make
    for server in servers:
        server.close()
