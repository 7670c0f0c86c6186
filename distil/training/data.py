"""Training data: rows with their origin, token ids with the labels that the loss supervises, batches.
Nothing heavy is imported at the top: trainers read their data before they import PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import InputError, PromptEncoder
from distil.files import hashed, read_jsonl
from distil.scoring import common_beginning
from distil.splits import Provenance, check_no_validation, joined, preparation, provenance, recorded
from distil.support import check_tokens
from distil.token_probs import TokenProbs
from distil.training.validation import Validation
from distil.trie import check_distinct

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

NODE_COLUMNS = ("node_positions", "child_ids", "child_probs")


@dataclass(frozen=True)
class TrainingData:
    """Rows of a data file, the file's hash, the note of its preparation ({} without one), the provenance of the model
    that training starts from, a base or an adapter, and what the training is measured on."""

    file: str
    rows: list[dict]
    sha256: str
    note: dict[str, Any]
    start: Provenance | None = None
    validation: Validation | None = None

    def for_model(self, name: str) -> TrainingData:
        """Return the data with the model to start from, after `resolve`: it may not change from then on."""
        return replace(self, start=provenance(name))

    def origin(self) -> Provenance:
        """Return the provenance of the data and the model to start from together."""
        own = recorded(self.file, self.note)
        return joined(own, self.start) if self.start else own

    def split_seed(self, flag: int | None, adapter: str | None = None) -> int | None:
        """Return the split that the data was prepared with, from --split_seed or the note, or else that of the model
        to start from; None if unknown. adapter: the model, if it is one. Raises InputError where note, flag and model
        differ: validation rows could have been trained on."""
        if flag is None and "changed" in self.note:
            changed = f"{self.file}: changed since {self.note['changed']} was written"
            raise InputError(f"{changed}; prepare it again, or specify with --split_seed how its rows were split")
        noted, before = recorded(self.file, self.note).split_seed, self.start.split_seed if self.start else None
        seed = noted if flag is None else flag
        if noted not in (None, seed):
            raise InputError(f"--split_seed {seed}: {self.file} was prepared with {noted}; leave the flag out")
        if None not in (before, seed) and before != seed:
            model = f"--{'adapter' if adapter else 'student'} {self.start.name}"
            trained = f"{model} was trained with --split_seed {before}"
            raise InputError(f"{trained}, {self.file} has {seed}; prepare the data with the model's")
        return before if seed is None else seed


def read_data(path: str, required: Sequence[str]) -> TrainingData:
    """Return a JSONL file's rows with the `required` fields. Raises InputError."""
    rows, sha256 = hashed(path, lambda: read_jsonl(path, required))
    check_no_validation(path, note := preparation(path, sha256))
    return TrainingData(path, rows, sha256, note)


@dataclass(frozen=True)
class RowSizes:
    """What the memory of a step depends on in its rows. lengths: tokens of each row's sequence; answer: tokens of the
    longest answer; shared: tokens that all rows begin with; pairs: two sequences a row; prompt_once: they share the
    prompt in one; label_probs: the loss has a KL term of labels; token_probs: it has one of every token."""

    lengths: tuple[int, ...]
    answer: int
    shared: int = 0
    pairs: bool = False
    prompt_once: bool = False
    label_probs: bool = False
    token_probs: bool = False


def load_tokenizer(path: str) -> Any:
    """Return a base model's tokenizer. Raises InputError as `check_tokens`, before weights are read."""
    from transformers import AutoTokenizer

    check_tokens(path)
    return AutoTokenizer.from_pretrained(path)


def completion_dataset(
    data: TrainingData, answer: str, encoder: PromptEncoder, max_length: int
) -> tuple[Dataset, RowSizes]:
    """Return token ids and labels (-100 on the prompt) of rows with `input` and `answer`, tokenised as scoring does,
    and their sizes. Raises InputError for rows longer than `max_length` (cutting them would cut the answer) and for an
    answer whose tokens are not all supervised, its end-of-turn token included."""
    from datasets import Dataset

    examples, too_long = [], []
    end = encoder.tokenizer.convert_tokens_to_ids(encoder.end_of_turn)
    for number, row in enumerate(data.rows, 1):
        prompt, completion = encoder.prompt(row["input"]), encoder.completion(row[answer])
        ids, labels = prompt + completion, [-100] * len(prompt) + completion
        count = len(supervised(labels))
        if len(ids) > max_length:
            too_long.append((len(ids), number))
        elif not 1 < count < len(labels) or labels[-1] != end:
            raise InputError(f"{data.file}: row {number}: {count} of {len(labels)} tokens supervised")
        examples.append({"input_ids": ids, "labels": labels})
    if too_long:
        length, number = max(too_long)
        problem = f"{len(too_long)} rows are longer than --max_length {max_length} tokens (row {number}: {length})"
        raise InputError(f"{data.file}: {problem}; raise --max_length or shorten them")
    dataset = Dataset.from_list(examples)
    return dataset, row_sizes(dataset)


def label_probabilities(data: TrainingData) -> tuple[list[str], list[list[float]]]:
    """Return (labels, [rows, labels] probabilities) of the rows' `label_probs`; both are empty where no row has them.
    Raises InputError where only some rows have them, labels differ, or values are not probabilities."""
    if not any("label_probs" in row for row in data.rows):
        return [], []
    labels, probabilities = list(data.rows[0].get("label_probs") or {}), []
    for number, row in enumerate(data.rows, 1):
        probs, place = row.get("label_probs"), f'{data.file}: row {number}: "label_probs"'
        if not isinstance(probs, dict) or len(labels) < 2 or set(probs) != set(labels):
            raise InputError(f"{place} with labels {labels} needed in every row or in none")
        values = [probs[label] for label in labels]
        if any(type(p) not in (int, float) or not 0 <= p <= 1 for p in values) or abs(sum(values) - 1) > 0.01:
            raise InputError(f"{place} are not probabilities that add up to 1: {probs}")
        probabilities.append([float(p) for p in values])
    return labels, probabilities


def answer_nodes(
    forms: Sequence[list[int]], answer: Sequence[int], probabilities: Sequence[float]
) -> list[tuple[int, list, list]]:
    """Return (position in the answer, token ids and probabilities of the children) of the nodes with several children
    in the tree of the labels' token ids, as far as the answer's follow it. forms end with the end-of-turn token, so
    that a label that begins another one has a separate branch. A child has the sum of the `probabilities` [labels]
    below it, divided by the node's own sum. Below a node that the teacher gives nothing its choice is unknown: none is
    there."""
    nodes, mass = [], 1.0
    for position, token in enumerate(answer):
        below: dict[int, list[float]] = {}
        for ids, probability in zip(forms, probabilities, strict=True):
            if len(ids) > position and ids[:position] == answer[:position]:
                below.setdefault(ids[position], []).append(probability)
        sums = {child: sum(parts) for child, parts in below.items()}
        if mass and len(sums) > 1:
            nodes.append((position, list(sums), [child_sum / mass for child_sum in sums.values()]))
        if not (mass := sums.get(token, 0.0)):
            break
    return nodes


def with_label_nodes(
    dataset: Dataset, encoder: PromptEncoder, labels: Sequence[str], probabilities: Sequence[Sequence[float]]
) -> Dataset:
    """Return a completion dataset with each row's `answer_nodes` in NODE_COLUMNS. probabilities: [rows, labels].
    Raises InputError as `check_distinct` and `PromptEncoder.label`."""
    forms = [encoder.label(label) + encoder.completion(label)[-1:] for label in labels]
    check_distinct(labels, forms)
    rows = [answer_nodes(forms, *row) for row in zip(map(supervised, dataset["labels"]), probabilities, strict=True)]
    for i, name in enumerate(NODE_COLUMNS):
        dataset = dataset.add_column(name, [[node[i] for node in nodes] for nodes in rows])
    return dataset


def with_token_probs(dataset: Dataset, data: TrainingData) -> tuple[Dataset, TokenProbs]:
    """Return a completion dataset with its rows' references to their token probabilities, and their reader.
    Raises InputError where rows have none, and as `TokenProbs.row`."""
    references, reader = [row.get("token_probs") for row in data.rows], TokenProbs(Path(data.file).parent)
    if missing := references.count(None):
        fix = "prepare them with kd_prepare.py --top_k, or leave them out"
        raise InputError(f'{data.file}: {missing} of {len(references)} rows have no "token_probs": {fix}')
    for number, (reference, labels) in enumerate(zip(references, dataset["labels"], strict=True), 1):
        try:
            reader.row(reference, supervised(labels))
        except InputError as error:
            raise InputError(f"{data.file}: row {number}: {error}") from None
    return dataset.add_column("token_probs", references), reader


def supervised(labels: Sequence[int]) -> list[int]:
    """Return those of a row's labels that the loss supervises: the tokens of its answer."""
    return [label for label in labels if label != -100]


def row_sizes(dataset: Dataset) -> RowSizes:
    """Return the sizes of a completion dataset."""
    ids, labels = list(dataset["input_ids"]), list(dataset["labels"])
    lengths, answer = tuple(map(len, ids)), max(len(supervised(row)) for row in labels)
    shared = len(common_beginning([min(ids), max(ids)]))  # a beginning that these two share is shared by all
    return RowSizes(lengths, answer, min(shared, max(lengths) - answer - 1))


def completion_collator(
    pad_token_id: int, token_probs: TokenProbs | None = None
) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
    """Return a function that makes right-padded batches: under causal attention no real token sees the padding.
    Rows with NODE_COLUMNS add the nodes of all rows: nodes [nodes], where each is among the batch's supervised tokens,
    row after row; child_ids, padded with -1, and child_probs [nodes, children]. token_probs: reads what
    `with_token_probs` refers to: token_ids [tokens, K], int32, padded with -1, token_log_probs [tokens, K], float16,
    and token_rest [tokens], float32, of the supervised tokens row after row."""
    import torch

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
        ids, labels = ([example[name] for example in examples] for name in ("input_ids", "labels"))
        batch = {"input_ids": padded(ids, pad_token_id), "labels": padded(labels, -100)}
        batch["attention_mask"] = padded([[1] * len(row) for row in ids], 0)
        if NODE_COLUMNS[0] in examples[0]:
            starts = accumulate((len(supervised(row)) for row in labels), initial=0)
            rows = [zip(*(example[name] for name in NODE_COLUMNS), strict=True) for example in examples]
            nodes = [(start + i, *children) for start, row in zip(starts, rows, strict=False) for i, *children in row]
            batch["nodes"] = torch.tensor([node[0] for node in nodes], dtype=torch.long)
            batch["child_ids"] = padded([node[1] for node in nodes] or [[-1]], -1)[: len(nodes)]
            batch["child_probs"] = padded([node[2] for node in nodes] or [[0.0]], 0.0)[: len(nodes)]
        if token_probs:
            rows = [token_probs.row(example["token_probs"], supervised(example["labels"])) for example in examples]
            most, pad = max(row.ids.shape[1] for row in rows), torch.nn.functional.pad
            for name, value in {"ids": -1, "log_probs": -math.inf}.items():
                parts = [torch.tensor(getattr(row, name)) for row in rows]
                batch[f"token_{name}"] = torch.cat([pad(p, (0, most - p.shape[1]), value=value) for p in parts])
            batch["token_rest"] = torch.cat([torch.tensor(row.rest) for row in rows])
        return batch

    return collate


def batch_order(lengths: Sequence[int]) -> str:
    """Return how the Trainer's sampler orders rows of these lengths (tokens): at random, or rows of similar length
    together where random batches would be mostly padding: sorting rows of one length could sort them by content."""
    return "group_by_length" if max(lengths) > 1.5 * sum(lengths) / len(lengths) else "random"
