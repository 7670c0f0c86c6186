"""Training data: token ids and labels by hand, prompts as scoring has them, refused rows, origin of the data."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import METHODS, refused, row_of, run_json, write_lines
from datasets import Dataset

import common
import kd_train
from common import InputError, PromptEncoder
from distil import files, splits
from distil.files import file_sha256
from distil.training import data


def test_labels_by_hand(tokenizer):
    encoder = PromptEncoder(tokenizer)
    rows = [{"input": "-", "output": "Good"}, {"input": "Age", "output": "Bad Bad"}]
    dataset, _ = data.completion_dataset(data.TrainingData("rows", rows, "", {}), "output", encoder, 512)
    batch = data.completion_collator(tokenizer.pad_token_id)(list(dataset))
    shown = [[tokenizer.decode([i]) if i != -100 else None for i in row] for row in batch["labels"].tolist()]
    first, second = ([token for token in row if token is not None] for row in shown)
    # The answer's one token and the end of turn; the prompt has no label.
    assert first == ["Good", "<|im_end|>"]
    # All tokens of a longer answer, and the end of turn.
    assert "".join(second) == "Bad Bad<|im_end|>" and second[0] == "Bad"
    for row, ids, text in zip(shown, batch["input_ids"].tolist(), ("-", "Age"), strict=True):
        # Before an answer is the prompt, its last token the assistant start; after it comes only padding.
        start = next(i for i, token in enumerate(row) if token is not None)
        end = next((i for i in range(start, len(row)) if row[i] is None), len(row))
        assert set(row[end:]) <= {None} and set(ids[end:]) <= {tokenizer.pad_token_id}
        turns = f"<|im_start|>system\n{common.SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n"
        assert tokenizer.decode(ids[:start]) == f"{turns}<|im_start|>assistant\n"
    for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
        assert mask == [int(token != tokenizer.pad_token_id) for token in ids]
    assert batch["attention_mask"].min() == 0


@pytest.mark.parametrize("method", METHODS)
def test_training_prompts_are_the_scoring_prompts(method, built, model_dir, tmp_path):
    """Token for token, in the batches that reach the model, control tokens in user text included."""
    turns = ["Debt: 12", "text with <|im_end|>\n<|im_start|>system\nin it", " spaces  and\nlines ", "Schulden: 5 €"]
    names = {"sft": ("input", "output"), "kd": ("input", "teacher_output"), "dpo": ("prompt", "chosen")}[method]
    rows = [dict(zip(names, (turn, "Good"), strict=True)) | {"rejected": "Bad"} for turn in turns]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    trainer = built(method, "--student", model_dir, "--data", path, "--save_dir", "never", "--batch_size", 4)
    encoder = PromptEncoder(trainer.processing_class)
    batch = next(iter(trainer.get_train_dataloader()))
    prompts = set()
    for number, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        completion = batch["completion_mask"] == 1 if method == "dpo" else batch["labels"] != -100
        answer = completion[number]
        text = "Bad" if number >= len(turns) else "Good"  # TRL puts the rejected ones below the chosen ones
        assert ids[answer].tolist() == encoder.completion(text)
        prompts.add(tuple(ids[mask.bool() & ~answer].tolist()))
    assert prompts == {tuple(encoder.prompt(turn)) for turn in turns}


@pytest.mark.parametrize("method", METHODS)
def test_rows_too_long_are_refused_by_number(method, tmp_path, model_dir):
    rows = [row_of(method), row_of(method), row_of(method, "Debt: 1" * 300), row_of(method)]
    message = refused(method, rows, tmp_path, model_dir)
    assert "row 3" in message and "--max_length" in message and "1024" in message


@pytest.mark.parametrize("method", METHODS)
def test_rows_without_a_field_are_refused_by_line(method, tmp_path, model_dir):
    row = row_of(method)
    missing = list(row)[-1]
    message = refused(method, [row, {k: v for k, v in row.items() if k != missing}], tmp_path, model_dir)
    assert "line 2" in message and missing in message


@pytest.mark.parametrize(
    ("probs", "expected"),
    [
        ([{"Good": 0.5, "Bad": 0.5}, None], "row 2.*in every row or in none"),
        ([None, {"Good": 0.5, "Bad": 0.5}], "row 1.*in every row or in none"),
        ([{"Good": 0.5, "Bad": 0.5}, {"Good": 0.5, "Standard": 0.5}], "row 2"),
        ([{"Good": 0.5, "Bad": 0.5}, {"Good": 0.5, "Bad": 0.3}], "row 2.*add up to 1"),
        ([{"Good": 1.5, "Bad": -0.5}], "row 1.*not probabilities"),
        ([{"Good": float("nan"), "Bad": 0.5}], "line 1 is not JSON"),
        ([{"Good": "0.5", "Bad": 0.5}], "row 1.*not probabilities"),
        ([{"Good": 1.0}], "row 1"),
        ([[0.5, 0.5]], "row 1"),
    ],
)
def test_label_probs_that_cannot_be_used_are_refused(probs, expected, tmp_path, model_dir):
    rows = [row_of("kd") | ({} if p is None else {"label_probs": p}) for p in probs]
    message = refused("kd", rows, tmp_path, model_dir)
    assert re.search(expected, message), message


class Spelt:
    """An encoder of one token a letter, with 0 at the end of a turn; capital letters have the tokens of small ones."""

    def label(self, text: str) -> list[int]:
        return [ord(letter) for letter in text.lower()]

    def completion(self, text: str) -> list[int]:
        return [*self.label(text), 0]


def test_nodes_of_labels_along_answers_by_hand():
    a, b, c, x = map(ord, "abcx")
    encoder, labels, probabilities = Spelt(), ["a", "ab", "acb", "xa", "xab"], [0.5, 0.25, 0.125, 0.125, 0.0]
    forms = [encoder.completion(label) for label in labels]
    start = (0, [a, x], [0.875, 0.125])
    second = (1, [0, b, c], [0.5 / 0.875, 0.25 / 0.875, 0.125 / 0.875])
    nodes = {
        "a": [start, second],
        "ab": [start, second],  # after "ab" and after "ac" there is one way to continue
        "acb": [start, second],
        "xa": [start, (2, [0, b], [1.0, 0.0])],
        "xab": [start, (2, [0, b], [1.0, 0.0])],
        "ac": [start, second],  # stops short of a label
        "a. b": [start, second],  # a label and a reason
        "b": [start],
        "": [start],
    }
    for answer, expected in nodes.items():
        assert data.answer_nodes(forms, encoder.completion(answer), probabilities) == expected, answer
    # The teacher gives nothing to what begins with x: which of these it would take is not known.
    none = [0.5, 0.25, 0.25, 0.0, 0.0]
    assert data.answer_nodes(forms, encoder.completion("xa"), none) == [(0, [a, x], [1.0, 0.0])]
    # All labels begin alike: the first token is no choice.
    assert data.answer_nodes([[x, a, 0], [x, b, 0]], [x, a, 0], [0.9, 0.1]) == [(1, [a, b], [0.9, 0.1])]
    dataset = Dataset.from_list([{"labels": [-100, a, 0]}])
    with pytest.raises(InputError, match="labels 'a' and 'A' have the same tokens; rename one"):
        data.with_label_nodes(dataset, encoder, ["a", "b", "A"], [[1.0, 0.0, 0.0]])


def test_batches_with_nodes_of_labels():
    rows = [([5, 6, 7], [8, 9, 0]), ([5], [8, 0]), ([5, 6], [4, 0])]
    dataset = Dataset.from_list([{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in rows])
    nodes = {"node_positions": [[0, 1], [0], []], "child_ids": [[[8, 3, 4], [9, 2]], [[8, 3, 4]], []]}
    nodes["child_probs"] = [[[0.5, 0.25, 0.25], [0.75, 0.25]], [[1.0, 0.0, 0.0]], []]
    for name, column in nodes.items():
        dataset = dataset.add_column(name, column)
    batch = data.completion_collator(1)(list(dataset))
    assert batch["nodes"].tolist() == [0, 1, 3]
    assert batch["child_ids"].tolist() == [[8, 3, 4], [9, 2, -1], [8, 3, 4]]
    assert batch["child_probs"].tolist() == [[0.5, 0.25, 0.25], [0.75, 0.25, 0], [1.0, 0, 0]]
    for rows in ([1, 2], [2, 1]):  # the order of the rows decides where an answer starts
        assert data.completion_collator(1)([dataset[i] for i in rows])["nodes"].tolist() == [0 if rows[0] == 1 else 2]
    empty = data.completion_collator(1)([dataset[2]])  # no row follows any label
    assert [len(empty[name]) for name in ("nodes", "child_ids", "child_probs")] == [0, 0, 0]
    logits = torch.zeros(2, 10, requires_grad=True)
    value = kd_train.distillation_loss_sum(logits, empty | {"labels": torch.tensor([4, 0])}, 1.0, 1.0)
    value.backward()
    assert value == 0 and logits.grad.count_nonzero() == 0


def test_a_pair_without_contrast_is_refused(tmp_path, model_dir):
    rows = [row_of("dpo"), row_of("dpo") | {"rejected": "Good"}]
    assert "row 2: chosen and rejected are the same" in refused("dpo", rows, tmp_path, model_dir)


@pytest.mark.parametrize(("prompt", "answer"), [([1, 2], []), ([1, 2], [7]), ([], [5, 7])])
def test_rows_with_nothing_or_everything_to_learn_are_refused(prompt, answer, model_dir):
    """An encoder that omits the answer, its text or the prompt must not train."""

    class Encoder:
        tokenizer = data.load_tokenizer(model_dir)
        end_of_turn = "<|im_end|>"

        def prompt(self, turn):
            return prompt

        def completion(self, text):
            return answer

    with pytest.raises(InputError, match=r"rows: row 1: . of . tokens supervised"):
        rows = data.TrainingData("rows", [{"input": "a", "output": "b"}], "", {})
        data.completion_dataset(rows, "output", Encoder(), 10)


def test_rows_are_grouped_by_length_only_where_lengths_differ():
    assert data.batch_order([92, 98, 95]) == "random"
    assert data.batch_order([100, 120, 500]) == "group_by_length"


@pytest.fixture
def noted_data(tmp_path, training_files) -> Path:
    """Write data with a note of its preparation, with split seed 7."""
    for method in METHODS:
        shutil.copy(training_files[method], tmp_path / f"{method}.jsonl")
    files = {f"{method}.jsonl": file_sha256(training_files[method]) for method in METHODS}
    note = {"split_seed": 7, "gold_share": 0.2, "source": {"file": "raw.csv", "sha256": "abc"}, "files": files}
    (tmp_path / "creditmix_prepared.json").write_text(json.dumps(note))
    return tmp_path


@pytest.mark.parametrize("method", METHODS)
def test_the_split_of_the_data_is_recorded(method, train, noted_data):
    """Evaluation refuses an adapter of another split, so a wrong record would let training rows into validation."""
    recorded = json.loads((train(method, "run", "--data", noted_data / f"{method}.jsonl") / "run.json").read_text())
    assert recorded["split_seed"] == recorded["flags"]["split_seed"] == 7
    assert recorded["sources"] == [{"file": "raw.csv", "sha256": "abc"}]
    assert recorded["gold_share"] == 0.2
    with pytest.raises(InputError, match=r"--split_seed 0: .* was prepared with 7; leave the flag out"):
        train(method, "other", "--data", noted_data / f"{method}.jsonl", "--split_seed", 0)


def test_the_sources_of_the_adapter_to_continue_from_are_recorded(train, noted_data):
    """A student that was trained in two steps has seen the rows of both."""
    first = train("sft", "first", "--data", noted_data / "sft.jsonl")
    note = json.loads((noted_data / "creditmix_prepared.json").read_text())
    note |= {"source": {"file": "other.csv", "sha256": "def"}, "gold_share": 0.1}
    (noted_data / "creditmix_prepared.json").write_text(json.dumps(note))
    flags = ("--adapter", first, "--data", noted_data / "dpo.jsonl")
    recorded = json.loads((train("dpo", "second", *flags, base=False) / "run.json").read_text())
    assert [source["file"] for source in recorded["sources"]] == ["other.csv", "raw.csv"]
    assert recorded["gold_share"] == 0.2  # the larger: the first step saw these labels


def test_renamed_data_keep_their_note(train, noted_data):
    renamed = (noted_data / "sft.jsonl").rename(noted_data / "mine.jsonl")
    recorded = run_json(train("sft", "run", "--data", renamed))
    assert (recorded["split_seed"], recorded["gold_share"]) == (7, 0.2)


def test_the_note_of_other_data_is_not_used(train, noted_data):
    with open(noted_data / "sft.jsonl", "a") as out:
        out.write('{"input": "Debt: 1", "output": "Good"}\n')
    with pytest.raises(InputError, match=r"sft\.jsonl: changed since .*creditmix_prepared\.json was written"):
        train("sft", "run", "--data", noted_data / "sft.jsonl")
    saved = train("sft", "run", "--data", noted_data / "sft.jsonl", "--split_seed", 3)
    recorded = run_json(saved)
    assert (recorded["split_seed"], recorded["sources"], recorded["gold_share"]) == (3, [None], None)


@pytest.mark.parametrize("method", ["kd", "dpo"])
def test_training_does_not_continue_from_an_adapter_of_another_split(method, train, noted_data, sft_adapter, tmp_path):
    sft_adapter = shutil.copytree(sft_adapter, tmp_path / "sft")
    record = run_json(sft_adapter)
    (sft_adapter / "run.json").write_text(json.dumps(record | {"split_seed": 0}))
    with pytest.raises(InputError, match=r"--adapter .* was trained with --split_seed 0, .* has 7"):
        train(method, "run", "--adapter", sft_adapter, "--data", noted_data / f"{method}.jsonl", base=False)


@pytest.mark.parametrize("method", METHODS)
def test_a_training_on_top_of_an_export_inherits_what_that_was_trained_on(method, train, noted_data, model_dir):
    export = shutil.copytree(model_dir, noted_data / "export")
    record = {"split_seed": 7, "sources": [{"file": "other.csv", "sha256": "def"}], "gold_share": 0.5}
    (export / "export.json").write_text(json.dumps(record))
    flags = ("--student", export, "--data", noted_data / f"{method}.jsonl")
    recorded = run_json(train(method, "run", *flags))
    assert [source["file"] for source in recorded["sources"]] == ["raw.csv", "other.csv"]
    assert (recorded["split_seed"], recorded["gold_share"]) == (7, 0.5)
    (export / "export.json").write_text(json.dumps(record | {"split_seed": 0}))
    with pytest.raises(InputError, match=r"--student .*export was trained with --split_seed 0, .* has 7"):
        train(method, "other", *flags)


def test_rows_of_an_unknown_split_keep_that_of_the_model_to_start_from(train, training_files, sft_adapter, tmp_path):
    """Else an evaluation under another split would take the student for one of unknown customers."""
    start = shutil.copytree(sft_adapter, tmp_path / "start")
    record = {"split_seed": 7, "sources": [{"file": "raw.csv", "sha256": "abc"}], "gold_share": 0.2}
    (start / "run.json").write_text(json.dumps(run_json(start) | record))
    recorded = run_json(train("kd", "run", "--adapter", start, base=False))
    assert (recorded["split_seed"], recorded["gold_share"]) == (7, None)
    assert recorded["sources"] == [None, *record["sources"]]


def test_the_data_file_is_hashed_once_in_a_run(train, noted_data, monkeypatch):
    paths = []

    def counted(path):
        paths.append(Path(path).name)
        return file_sha256(path)

    for module in (splits, files):
        monkeypatch.setattr(module, "file_sha256", counted)
    train("sft", "run", "--data", noted_data / "sft.jsonl")
    assert paths == ["sft.jsonl"]


def test_row_sizes_by_hand():
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, -100, 4, 5]},
        {"input_ids": [1, 2, 9, 4, 5, 6], "labels": [-100, -100, -100, 4, 5, 6]},
        {"input_ids": [1, 2, 3, 7], "labels": [-100, -100, 3, 7]},
    ]
    sizes = data.row_sizes(Dataset.from_list(rows))
    assert sizes == data.RowSizes((5, 6, 4), answer=3, shared=2)
    # A single row shares all with itself; what its answer needs is not run separately.
    assert data.row_sizes(Dataset.from_list(rows[:1])) == data.RowSizes((5,), answer=2, shared=2)
