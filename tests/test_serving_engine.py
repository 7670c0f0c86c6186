"""The engine with a tiny model, alone and behind the application."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RESPONSE_FIELDS, assert_error, wait_for
from fastapi.testclient import TestClient

from common import InputError, add_adapters
from distil import scoring
from distil.creditmix.model import CreditModel
from distil.models import model_fingerprint, resolve
from distil.scoring import FastLabelScorer
from distil.serving.app import create_app
from distil.serving.engine import VARIANTS, Engine, EngineOptions, Refusal
from distil.serving.metrics import Metrics
from distil.tasks import default_task
from distil.testing import load_named, save_adapter
from serve_creditmix import build_parser, engine_options

pytestmark = pytest.mark.usefixtures("own_server_log")
LABELS = default_task().labels


@pytest.fixture(scope="module")
def folders(model_dir, tmp_path_factory) -> dict[str, str]:
    """Save adapters of the tiny model that answer differently."""
    made = {}
    for seed, variant in enumerate(VARIANTS[1:], 1):
        folder = tmp_path_factory.mktemp("serve") / f"creditmix_{variant}"
        save_adapter(folder, model_dir, seed)
        made[variant] = str(folder)
    return made


def arguments(model_dir: str, folders: dict[str, str], *flags: str) -> EngineOptions:
    flags_of_folders = [
        "--base",
        model_dir,
        "--quantization",
        "none",
        "--compute_dtype",
        "float32",
        "--gather_ms",
        "5",
    ]
    for variant in VARIANTS[1:]:
        flags_of_folders += [f"--{variant}", folders.get(variant, "none")]
    return engine_options(build_parser().parse_args([*flags_of_folders, *flags]))


async def when_ready(engine: Engine) -> None:
    while not engine.ready and not engine.failure:
        await asyncio.sleep(0.01)
    assert engine.ready


def with_engine(options: EngineOptions, use):
    """Run `await use(engine)` against a started engine."""

    async def run():
        engine = Engine(options)
        await engine.start()
        try:
            await when_ready(engine)
            return await use(engine)
        finally:
            await engine.stop()

    return asyncio.run(run())


TEXTS = [f"Age: {20 + i}, Outstanding Debt: {37 * i}, Occupation: {'Doctor' * (i % 5)}" for i in range(24)]


def alone(name: str, options: EngineOptions) -> list[dict]:
    """Return what infer_creditmix.py answers."""
    model = CreditModel.load(resolve(name), options.scoring)
    return model.responses(model.raw_scores(TEXTS))


def assert_same_answers(observed: list[dict], wanted: list[dict], atol: float = 1e-4) -> None:
    assert [answer["model_name"] for answer in observed] == [answer["model_name"] for answer in wanted]
    for kind in ("scores", "raw_scores", "prior", "probabilities"):
        values = [[[answer[kind][label] for label in LABELS] for answer in answers] for answers in (observed, wanted)]
        np.testing.assert_allclose(*values, atol=atol)


@pytest.mark.parametrize(("quantization", "atol"), [("none", 1e-4), ("nf4", 0.01)])
def test_mixed_batches_answer_as_infer_does(quantization, atol, model_dir, folders):
    """4-bit kernels round by the form of the batch."""
    args = arguments(model_dir, folders, "--batch_size", "7", "--quantization", quantization)

    async def use(engine):
        requests = [(text, variant) for text in TEXTS for variant in VARIANTS]
        answers = await asyncio.gather(*(engine.score(variant, [text]) for text, variant in requests))
        return {v: [a[0] for a, (_, w) in zip(answers, requests, strict=True) if w == v] for v in VARIANTS}

    observed = with_engine(args, use)
    wanted = {variant: alone(folders.get(variant, model_dir), args) for variant in VARIANTS}
    for variant in VARIANTS:
        assert_same_answers(observed[variant], wanted[variant], atol)
    raw = [[a["raw_scores"]["Good"] for a in wanted[variant]] for variant in VARIANTS]
    assert min(np.abs(np.subtract(raw[i], raw[j])).max() for i in range(4) for j in range(i)) > 0.01


def test_rows_of_a_customer_share_a_beginning_by_variant(model_dir, folders, monkeypatch):
    """What such rows share is run once for each variant of a mixed batch."""
    texts = [f"Age: 30, Occupation: {'Doctor' * 9}, Outstanding Debt: {n}" for n in range(4)]
    lengths, stem = [], FastLabelScorer._stem
    monkeypatch.setattr(FastLabelScorer, "_stem", lambda self, *rest: lengths.append(stem(self, *rest)) or lengths[-1])
    args = arguments(model_dir, folders, "--batch_size", "16", "--gather_ms", "500")

    async def use(engine):
        answers = await asyncio.gather(*(engine.score(variant, texts) for variant in VARIANTS))
        return dict(zip(VARIANTS, answers, strict=True)), len(engine.models["base"].scorer.prefix)

    monkeypatch.setattr(scoring, "STEM_TOKENS", 10**9)
    apart, prefix = with_engine(args, use)
    assert max(length for length, _ in lengths) == prefix
    monkeypatch.setattr(scoring, "STEM_TOKENS", 0)
    together, prefix = with_engine(args, use)
    assert max(length for length, _ in lengths) > prefix + 20
    for variant in VARIANTS:
        assert_same_answers(together[variant], apart[variant])


def test_rows_of_many_requests_share_batches(model_dir, folders, monkeypatch):
    sizes = []
    original = Engine._score
    monkeypatch.setattr(Engine, "_score", lambda self, rows: sizes.append(len(rows)) or original(self, rows))

    async def use(engine):
        await asyncio.gather(*(engine.score(VARIANTS[i % 4], [text]) for i, text in enumerate(TEXTS)))

    with_engine(arguments(model_dir, folders, "--batch_size", "8", "--gather_ms", "500"), use)
    assert sizes == [8, 8, 8]


def test_a_missing_adapter_answers_503_with_its_command(model_dir, folders):
    async def use(engine):
        with pytest.raises(Refusal) as observed:
            await engine.score("dpo", ["Age: 3"])
        return observed.value, await engine.score("kd", ["Age: 3"])

    refusal, answers = with_engine(arguments(model_dir, {"kd": folders["kd"], "dpo": "runs/creditmix_dpo"}), use)
    assert (refusal.status, refusal.code) == (503, "adapter_missing")
    assert "python dpo_train.py --adapter runs/creditmix_sft" in refusal.hint and model_dir not in refusal.hint
    assert answers[0]["prediction"] in LABELS


def test_an_endpoint_that_was_left_out_says_so(model_dir, folders):
    async def use(engine):
        with pytest.raises(Refusal) as observed:
            await engine.score("dpo", ["Age: 3"])
        return observed.value

    assert (
        with_engine(arguments(model_dir, folders | {"dpo": "none"}), use).hint
        == "the server was started with --dpo none"
    )


def test_an_adapter_of_another_base_is_refused_at_once(model_dir, folders, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folders["sft"], other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/model"}))
    with pytest.raises(InputError, match="belongs to some/model, not to --base"):
        arguments(model_dir, folders | {"sft": str(other)})


def test_a_base_may_be_named_by_any_path_to_it(model_dir, folders, monkeypatch):
    monkeypatch.chdir(Path(model_dir).parent)
    assert set(arguments(Path(model_dir).name, folders).refs) == {"base", *folders}


def test_adapters_without_a_calibration_are_named_in_the_log(model_dir, folders, caplog):
    Engine(arguments(model_dir, folders))
    logged = [record.fields["variant"] for record in caplog.records if record.message == "not calibrated"]
    assert logged == list(folders)


def test_adapters_trained_in_another_quantization_are_named_in_the_log(model_dir, folders, tmp_path, caplog):
    own = shutil.copytree(folders["kd"], tmp_path / "kd")
    (own / "run.json").write_text(json.dumps({"flags": {"quantization": "nf4"}}))
    Engine(arguments(model_dir, folders | {"kd": str(own)}))
    (fields,) = (record.fields for record in caplog.records if record.message == "other quantization")
    assert fields["variant"] == "kd" and "trained with --quantization nf4 and is used with none" in fields["hint"]


def test_what_is_described_is_what_was_loaded(model_dir, folders, tmp_path, monkeypatch):
    """An adapter that is trained again under a running server is not the one that answers."""
    own = shutil.copytree(folders["kd"], tmp_path / "kd")
    args, loading = arguments(model_dir, folders | {"kd": str(own)}), CreditModel.load_variants
    loaded = model_fingerprint(args.refs["kd"])

    def replaced(*rest):
        models = loading(*rest)
        save_adapter(own, model_dir, seed=9)
        return models

    monkeypatch.setattr(CreditModel, "load_variants", replaced)

    async def use(engine):
        return engine.description["kd"]["fingerprint"]

    assert with_engine(args, use) == loaded != model_fingerprint(args.refs["kd"])


def test_a_calibration_goes_with_the_weights_that_are_loaded(model_dir, folders, tmp_path):
    """The adapter is replaced between the check at the start and the load: its old calibration is not used."""
    own = shutil.copytree(folders["kd"], tmp_path / "kd")
    args = arguments(model_dir, folders | {"kd": str(own)})
    stored = {"calibration": "fitted", "temperature": 2.0, "prior": dict.fromkeys(LABELS, -0.5)}
    stored |= {"bias": dict.fromkeys(LABELS, 1.0), "model": model_fingerprint(args.refs["kd"])}
    (own / "calibration.json").write_text(json.dumps(stored | args.scoring.raw_settings()))
    engine = Engine(args)
    save_adapter(own, model_dir, seed=9)
    with pytest.raises(InputError, match="fitted with another model"):
        engine._load()


def test_a_folder_that_was_named_must_have_an_adapter(model_dir, tmp_path):
    with pytest.raises(InputError, match="no adapter there; 'none' leaves this endpoint without one"):
        arguments(model_dir, {"kd": str(tmp_path)})
    unnamed = engine_options(build_parser().parse_args(["--base", model_dir]))  # adapters under runs/ are optional
    assert set(unnamed.refs) == {"base"} and set(Engine(unnamed).missing()) == {"sft", "kd", "dpo"}


def test_a_calibration_of_another_model_is_refused_before_anything_loads(model_dir, folders, tmp_path):
    other = save_adapter(tmp_path / "sft", model_dir, 5)
    (tmp_path / "sft" / "calibration.json").write_text(json.dumps({"model": "another"}))
    with pytest.raises(InputError, match="fitted with another"):
        Engine(arguments(model_dir, folders | {"sft": other}))


def test_one_bad_row_does_not_fail_its_neighbours(model_dir, folders, monkeypatch):
    original = FastLabelScorer.score

    def failing(self, rows, *rest, **named):
        if any("poison" in self.encoder.tokenizer.decode(row) for row in rows):
            raise ValueError("poison")
        return original(self, rows, *rest, **named)

    monkeypatch.setattr(FastLabelScorer, "score", failing)

    async def use(engine):
        requests = [engine.score("sft", [text]) for text in ("Age: 1", "poison", "Age: 2", "Age: 3")]
        return await asyncio.gather(*requests, return_exceptions=True)

    answers = with_engine(arguments(model_dir, folders), use)
    assert isinstance(answers[1], Refusal) and (answers[1].status, answers[1].code) == (500, "failed")
    assert all(answers[i][0]["prediction"] in LABELS for i in (0, 2, 3))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_that_does_not_fit_runs_in_parts(error, model_dir, folders, monkeypatch):
    args = arguments(model_dir, folders)
    wanted = alone(folders["sft"], args)
    original = FastLabelScorer.score

    def small_only(self, rows, *rest, **named):
        if len(rows) > 8:  # the prior has 7
            raise error
        return original(self, rows, *rest, **named)

    monkeypatch.setattr(FastLabelScorer, "score", small_only)

    async def use(engine):
        return await engine.score("sft", TEXTS)

    assert_same_answers(with_engine(args, use), wanted)


def test_a_full_queue_refuses_and_a_long_wait_ends(model_dir, folders, monkeypatch):
    gate = threading.Event()
    original = Engine._score
    monkeypatch.setattr(Engine, "_score", lambda self, rows: gate.wait(20) and original(self, rows))

    async def use(engine):
        first = asyncio.create_task(engine.score("sft", ["Age: 1"]))
        await asyncio.sleep(0.1)  # now it is in the worker, behind the gate
        with pytest.raises(Refusal) as busy:
            await engine.score("sft", TEXTS * 11)
        late = await asyncio.gather(first, engine.score("sft", ["Age: 2"]), return_exceptions=True)
        gate.set()
        return busy.value, late, await engine.score("sft", ["Age: 3"])

    flags = ("--queue_rows", "256", "--timeout", "1.5")
    busy, late, after = with_engine(arguments(model_dir, folders, *flags), use)
    assert (busy.status, busy.code, busy.retry_after) == (503, "busy", 1)
    assert [(refusal.status, refusal.code) for refusal in late] == [(504, "timeout")] * 2  # while the worker was busy
    assert after[0]["prediction"] in LABELS


def test_rows_of_batch_requests_count_against_the_limit(model_dir, folders):
    async def use(engine):
        requests = [engine.score("sft", (TEXTS * 11)[:200]) for _ in range(3)]
        replies = await asyncio.gather(*requests, return_exceptions=True)
        return replies, await engine.score("sft", (TEXTS * 11)[:200])

    (first, *others), again = with_engine(arguments(model_dir, folders, "--queue_rows", "256"), use)
    assert len(first) == len(again) == 200
    assert [(refusal.status, refusal.code) for refusal in others] == [(503, "busy")] * 2


def waiting_row(variant: str = "base", enqueued: float = 0.0, **more) -> Namespace:
    return Namespace(variant=variant, enqueued=enqueued, future=Namespace(done=lambda: False), **more)


def test_a_batch_is_of_few_variants_and_has_the_row_that_waited_longest(model_dir):
    engine = Engine(arguments(model_dir, {}, "--batch_size", "4"))
    engine._single.extend(waiting_row(VARIANTS[i % 4], i) for i in range(16))
    engine._single[1].future.done = lambda: True  # the first of sft was cancelled
    batches = []
    for start in range(16, 32, 4):  # each time there are others that would fill the next batch
        batches.append([(row.variant, row.enqueued) for row in engine._take()])
        engine._single.extend(waiting_row("base", i) for i in range(start, start + 4))
    assert batches[0] == [("base", i) for i in (0, 4, 8, 12)]
    assert batches[1] == [("kd", i) for i in (2, 6, 10, 14)]
    assert batches[2] == [("dpo", i) for i in (3, 7, 11, 15)]
    assert batches[3] == [("sft", 5), ("sft", 9), ("sft", 13), ("base", 16)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 32])
def test_neither_kind_of_request_starves(size, model_dir):
    """A quarter of the places are for rows of batch requests as long as both wait, at every batch size."""
    engine = Engine(arguments(model_dir, {}, "--batch_size", str(size)))
    for queue, name in ((engine._single, "single"), (engine._bulk, "bulk")):
        queue.extend(waiting_row(kind=name) for _ in range(20 * size))
    taken = [engine._take() for _ in range(16)]
    assert [len(batch) for batch in taken] == [size] * 16
    assert sum(row.kind == "bulk" for batch in taken for row in batch) == 4 * size
    engine._single.clear()
    assert [row.kind for row in engine._take()] == ["bulk"] * size


def test_a_failure_in_the_loop_is_said_to_all_who_wait(model_dir, folders, monkeypatch):
    async def use(engine):
        monkeypatch.setattr(Engine, "_take", lambda self: 1 / 0)
        observed = await asyncio.gather(engine.score("sft", ["Age: 1"]), return_exceptions=True)
        late = await asyncio.gather(engine.score("sft", ["Age: 1"]), return_exceptions=True)
        return [(refusal.status, refusal.code) for refusal in observed + late], engine.ready

    assert with_engine(arguments(model_dir, folders), use) == ([(503, "stopped")] * 2, False)


def test_texts_are_tokenised_outside_the_event_loop(model_dir, folders, monkeypatch):
    threads = []
    original = CreditModel.prompt
    monkeypatch.setattr(
        CreditModel, "prompt", lambda *a: threads.append(threading.current_thread().name) or original(*a)
    )

    async def use(engine):
        await engine.score("sft", TEXTS)

    with_engine(arguments(model_dir, folders), use)
    assert len(threads) == len(TEXTS) and {name.partition("_")[0] for name in threads} == {"tokenizer"}


def test_each_variant_has_its_own_calibration(model_dir, folders, tmp_path):
    args = arguments(model_dir, folders)
    own = {}
    for number, (variant, folder) in enumerate(folders.items(), 1):
        own[variant] = str(shutil.copytree(folder, tmp_path / variant))
        prior = dict.fromkeys(LABELS, -0.5)
        stored = {"calibration": "fitted", "prior": prior, "temperature": 1.0 + number}
        stored["bias"] = dict.fromkeys(LABELS, float(number))
        stored |= args.scoring.raw_settings() | {"model": model_fingerprint(resolve(own[variant]))}
        (tmp_path / variant / "calibration.json").write_text(json.dumps(stored))
    args = arguments(model_dir, own)

    async def use(engine):
        described = {variant: model["calibration"] for variant, model in engine.description.items()}
        return {variant: await engine.score(variant, TEXTS) for variant in VARIANTS}, described

    observed, described = with_engine(args, use)
    for variant in VARIANTS:
        assert_same_answers(observed[variant], alone(own.get(variant, model_dir), args))
    assert [described[v]["temperature"] for v in VARIANTS] == [1, 2, 3, 4]
    assert [described[v]["method"] for v in VARIANTS] == ["contextual", "fitted", "fitted", "fitted"]
    assert described["kd"]["bias"] == dict.fromkeys(LABELS, 2.0)


def test_unsure_rows_are_referred_where_the_server_is_told_to(model_dir, folders):
    args = arguments(model_dir, folders, "--abstain_below", "0.999")
    metrics = Metrics()
    with TestClient(create_app(Engine(args, metrics), metrics)) as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.02)
        one = client.post("/infer/sft", json={"features": "Age: 3"}).json()
        many = client.post("/infer/sft/batch", json={"features": ["Age: 3", "Age: 4"]}).json()["results"]
    assert [list(answer) for answer in (one, *many)] == [[*RESPONSE_FIELDS, "extra"]] * 3
    assert one["extra"] == {"refer": True}


def test_adapters_take_the_type_of_computation(model_dir, folders):
    """In float32, as they were trained, they would need twice the memory."""
    model, _ = load_named(model_dir, "nf4", "bfloat16")
    weights = [p for n, p in add_adapters(model, folders).named_parameters() if "lora_" in n]
    assert len(weights) == 2 * 2 * 7 * len(folders) and {p.dtype for p in weights} == {torch.bfloat16}


def test_single_requests_do_not_wait_for_a_whole_batch_request(model_dir, folders):
    async def use(engine):
        order = []

        async def ask(name, texts):
            await engine.score("sft", texts)
            order.append(name)

        bulk = asyncio.create_task(ask("bulk", TEXTS * 4))
        await asyncio.sleep(0)
        await asyncio.gather(bulk, *(ask(i, ["Age: 3"]) for i in range(4)))
        return order

    assert with_engine(arguments(model_dir, folders, "--batch_size", "8"), use)[-1] == "bulk"


def test_rows_of_a_caller_that_left_are_not_scored(model_dir, folders, monkeypatch):
    scored = []
    original = Engine._score
    monkeypatch.setattr(
        Engine, "_score", lambda self, rows: scored.extend(r.prompt for r in rows) or original(self, rows)
    )

    async def use(engine):
        task = asyncio.create_task(engine.score("sft", ["gone"]))
        while not engine._single:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await engine.score("sft", ["Age: 3"])
        return engine.models["sft"].prompt("Age: 3")

    args = arguments(model_dir, folders, "--gather_ms", "200")
    assert [with_engine(args, use)] == scored


def test_text_longer_than_the_context_is_refused(model_dir, folders):
    async def use(engine):
        with pytest.raises(Refusal) as observed:
            await engine.score("sft", ["Age: 1", "x y " * 400])
        return observed.value

    refusal = with_engine(arguments(model_dir, folders), use)
    assert (refusal.status, refusal.code) == (422, "too_long") and "features[1]" in refusal.message


def test_features_that_are_doubtful_get_notes_under_extra(model_dir, folders):
    """Clean ones get the fields of before; a field that is there twice is refused."""
    clean, named = (
        "Age: 23, Outstanding_Debt: 809.98",
        "Age: 23, Payment Behavior: Low_spent, Wage: 3, Annual Income: x",
    )
    with TestClient(
        create_app(Engine(arguments(model_dir, folders, "--abstain_below", "0.999")), Metrics())
    ) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        answers = client.post("/infer/sft/batch", json={"features": [clean, named]}).json()["results"]
        one = client.post("/infer/sft", json={"features": named}).json()
        reply = client.post("/infer/sft/batch", json={"features": [clean, "Age: 23, Occupation: Lawyer, Age: 50"]})
    assert answers[0]["extra"] == {"refer": True} and answers[1]["extra"] == one["extra"]
    assert list(one) == [*RESPONSE_FIELDS, "extra"] and list(one["extra"]) == ["refer", "notes"]
    unread, near, other = one["extra"]["notes"]
    assert unread.startswith("Annual Income: not a number") and near == "Payment Behavior: taken as Payment Behaviour"
    assert other.startswith("Wage is not a field (Age, ")
    message = assert_error(reply, 422, "repeated_field")["message"]
    assert message == "features[1]: Age occurs twice in one feature string; keep one"


def test_fields_are_answered_as_their_feature_string(model_dir, folders):
    """Values are text or numbers, by name or nearly; what is no field is named, and a value never becomes one."""
    values = {"Age": 23, "annual_income": "19,114.12", "Occupation": "Lawyer, Age: 50", "Wage": 3.5, "Debt": None}
    text = "Age: 23, Occupation: Lawyer, Age 50, Annual Income: 19100"
    with TestClient(create_app(Engine(arguments(model_dir, folders)), Metrics())) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        one = client.post("/infer/sft", json={"fields": values}).json()
        batch = client.post("/infer/sft/batch", json={"fields": [{"Age": 23}, values]}).json()["results"]
        plain = client.post("/infer/sft", json={"features": text}).json()
        extra = client.post("/infer/sft", json={"features": f"{text}, Wage: 3.5, Debt: "}).json()
        comma = client.post("/infer/sft", json={"fields": {"Annual Income": "809,981"}}).json()["extra"]["notes"]
        twice = client.post("/infer/sft/batch", json={"fields": [{"Age": 1}, {"Age": 23, " age": 50}]})
    assert_same_answers([one, batch[1]], [extra, extra])
    assert [note.partition(" (")[0] for note in one["extra"]["notes"]] == [
        "Wage is not a field",
        "Debt is not a field",
    ]
    assert "extra" not in plain and "extra" not in batch[0]
    assert len(comma) == 1 and comma[0].startswith("Annual Income: a comma before three digits is read as mark of")
    message = assert_error(twice, 422, "repeated_field")["message"]
    assert message == "fields[1]: Age occurs twice in one feature string; keep one"


TOPICS = {"name": "topics", "instruction": "Give the topic.", "label_column": "topic", "text_column": "text"}
TOPICS |= {"labels": ["sport", "the arts", "the economy"]}


def of_task(folder: Path, source: str, task: dict) -> str:
    """Return a copy of an adapter that belongs to a task."""
    copied = shutil.copytree(source, folder)
    (copied / "task.json").write_text(json.dumps(task))
    return str(copied)


def test_the_adapters_task_is_the_servers(model_dir, folders, tmp_path):
    options = arguments(model_dir, {"kd": of_task(tmp_path / "kd", folders["kd"], TOPICS)})
    with TestClient(create_app(Engine(options), Metrics(), task=options.scoring.task)) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        bodies = {"features": "Who won?"}, {"fields": {"text": "Who won?"}}, {"fields": {"Text": "Who won?", "id": 7}}
        one, *others = [client.post("/infer/kd", json=body).json() for body in bodies]
        wrong = client.post("/infer/kd", json={"fields": {"id": 7}})
        empty = client.post("/infer/kd/batch", json={"fields": [{"text": "a"}, {"text": " "}]})
        hint = client.post("/infer/sft", json=bodies[0]).json()["error"]["hint"]
    assert list(one["probabilities"]) == TOPICS["labels"] and others == [one, one]
    assert assert_error(wrong, 422, "invalid")["message"] == "fields: one field text is needed, found id"
    assert assert_error(empty, 422, "invalid")["message"] == "fields[1]: empty"
    assert hint == "the server was started with --sft none"


def test_adapters_of_different_tasks_are_refused_at_the_start(model_dir, folders, tmp_path):
    sft = of_task(tmp_path / "sft", folders["sft"], TOPICS)
    kd = of_task(tmp_path / "kd", folders["kd"], TOPICS | {"labels": ["sport", "arts"]})
    with pytest.raises(InputError, match=r"was trained for another task .*labels"):
        arguments(model_dir, {"sft": sft, "kd": kd})
    (other := tmp_path / "other.json").write_text(json.dumps(TOPICS | {"instruction": "Topic?"}))
    with pytest.raises(InputError, match=r"was trained for another task than --task .*instruction"):
        arguments(model_dir, {"sft": sft}, "--task", str(other))


def test_default_folders_follow_the_task(model_dir, folders, tmp_path, monkeypatch):
    """That of --task (or $CREDITMIX_TASK), or of an adapter that is given; a base alone serves any task."""
    (path := tmp_path / "topics.json").write_text(json.dumps(TOPICS))

    def options(*flags: str) -> EngineOptions:
        return engine_options(build_parser().parse_args(["--base", model_dir, *flags]))

    alone = options("--task", str(path))
    assert set(alone.refs) == {"base"} and list(alone.scoring.labels) == TOPICS["labels"]
    missing = Engine(alone).missing()
    assert missing["kd"] == ("python kd_train.py --student BASE --save_dir runs/topics_kd --data data/topics_kd.jsonl")
    of_task(Path("runs/topics_kd"), folders["kd"], TOPICS)
    shutil.copytree(folders["dpo"], "runs/creditmix_dpo")
    monkeypatch.setenv("CREDITMIX_TASK", str(path))
    assert set(options().refs) == {"base", "kd"}
    monkeypatch.delenv("CREDITMIX_TASK")
    assert set(options().refs) == {"base", "dpo"} and options().scoring.task == default_task()
    assert set(options("--sft", of_task(tmp_path / "own", folders["sft"], TOPICS)).refs) == {"base", "sft", "kd"}


def test_a_stop_answers_the_batch_that_is_running(model_dir, folders, monkeypatch):
    gate = threading.Event()
    original = Engine._score
    monkeypatch.setattr(Engine, "_score", lambda self, rows: gate.wait(20) and original(self, rows))

    async def run():
        engine = Engine(arguments(model_dir, folders, "--batch_size", "1"))
        await engine.start()
        await when_ready(engine)
        running = asyncio.create_task(engine.score("sft", ["Age: 1"]))
        await asyncio.sleep(0.1)  # in the worker, behind the gate
        waiting = asyncio.create_task(engine.score("sft", ["Age: 2"]))
        await asyncio.sleep(0.1)
        stopping = asyncio.create_task(engine.stop())
        await asyncio.sleep(0.1)
        gate.set()
        await stopping
        return await asyncio.gather(running, waiting, return_exceptions=True)

    answer, refusal = asyncio.run(run())
    assert answer[0]["prediction"] in LABELS
    assert (refusal.status, refusal.code) == (503, "shutting_down")


def test_until_the_model_is_loaded_requests_get_503_and_health_checks_an_answer(model_dir, folders, monkeypatch):
    gate = threading.Event()
    original = Engine._load
    monkeypatch.setattr(Engine, "_load", lambda self: gate.wait(20) and original(self))
    args = arguments(model_dir, folders)
    with TestClient(create_app(Engine(args), Metrics())) as client:
        for reply in (client.post("/infer/sft", json={"features": "Age: 3"}), client.get("/readyz")):
            assert_error(reply, 503, "loading")
            assert reply.headers["retry-after"] == "5"
        assert client.get("/healthz").status_code == 200
        gate.set()
        while client.get("/readyz").status_code != 200:
            time.sleep(0.02)
        assert client.post("/infer/sft", json={"features": "Age: 3"}).status_code == 200


def test_a_stop_does_not_wait_for_a_load(model_dir, folders, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(Engine, "_load", lambda self: gate.wait(20))

    async def run() -> float:
        engine = Engine(arguments(model_dir, folders))
        await engine.start()
        await asyncio.sleep(0.1)
        start = time.monotonic()
        await engine.stop()
        return time.monotonic() - start

    try:
        assert asyncio.run(run()) < 5
    finally:
        gate.set()


def test_a_failed_load_is_said_and_does_not_hang(model_dir, folders, monkeypatch):
    monkeypatch.setattr(CreditModel, "load_variants", lambda *rest: 1 / 0)

    async def run():
        engine = Engine(arguments(model_dir, folders))
        await engine.start()
        while not engine.failure:
            await asyncio.sleep(0.01)
        with pytest.raises(Refusal) as observed:
            await engine.score("sft", ["Age: 1"])
        await engine.stop()
        return observed.value

    assert asyncio.run(run()).code == "load_failed"


def test_priors_come_from_disk_at_the_next_start(model_dir, folders, monkeypatch):
    scored = []
    original = FastLabelScorer.score
    monkeypatch.setattr(
        FastLabelScorer, "score", lambda self, rows, *a, **k: scored.extend(rows) or original(self, rows, *a, **k)
    )

    async def use(engine):
        return {variant: model.calibration.prior.tolist() for variant, model in engine.models.items()}

    args = arguments(model_dir, folders)
    first, count = with_engine(args, use), len(scored)
    scored.clear()
    assert with_engine(args, use) == first
    assert count - len(scored) == 4 * args.scoring.null_prompts
    assert first["sft"] != first["kd"]


# ---------------------------------------------------------------------------------------------------- both together


def test_many_clients_at_once(model_dir, folders):
    args = arguments(model_dir, folders)
    metrics = Metrics()
    wanted = {variant: alone(folders.get(variant, model_dir), args) for variant in VARIANTS}
    with TestClient(create_app(Engine(args, metrics), metrics)) as client:
        assert client.get("/readyz").status_code in (200, 503)
        deadline = time.monotonic() + 60
        while client.get("/readyz").status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        jobs = [(variant, number) for number in range(len(TEXTS)) for variant in VARIANTS] * 2
        with ThreadPoolExecutor(16) as pool:
            replies = list(
                pool.map(lambda job: client.post(f"/infer/{job[0]}", json={"features": TEXTS[job[1]]}).json(), jobs)
            )
        assert_same_answers(replies, [wanted[variant][number] for variant, number in jobs])
        listed = client.get("/models").json()
        assert listed["ready"] and listed["models"].keys() == set(VARIANTS) and not listed["missing"]
        assert len({model["fingerprint"] for model in listed["models"].values()}) == 4
        text = client.get("/metrics").text
        assert f'creditmix_predictions_total{{label="{replies[0]["prediction"]}",variant="base"}}' in text
        assert text.count("creditmix_model_info{") == 4 and "creditmix_batch_rows_count" in text
