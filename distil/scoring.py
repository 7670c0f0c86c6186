"""Score labels fast: the same numbers as common.LabelScorer, with work that rows share done once.

Departures from the plain driver: the beginning that all prompts share is run once and its key/value cache reused; rows
of a batch that begin alike (those of one customer do) run that beginning once; labels of several tokens run in one
forward (distil/trie.py), as do rows of several adapters (PEFT's mixed batches); the batch size can be searched for;
priors are cached on disk. Each scorer first compares itself with the model's own logits, and uses them if they differ.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import InputError, PromptEncoder, dtype_name, right_padded, token_log_probs
from distil.files import cache_dir, read_json, write_json
from distil.models import LoadOptions
from distil.processes import print_note
from distil.support import TAKE, context_length, recurrent
from distil.trie import TreeScorer, Trie

if TYPE_CHECKING:
    import numpy as np
    import torch

METHODS = ("none", "contextual", "batch", "fitted", "auto")  # --calibration; distil/calibration.py explains them
STEM_TOKENS = 256  # another forward has to save at least this many tokens: about what starting one costs
# Largest difference in nats between the fast way and the model's own logits, which bf16 has in steps of 1/16 to 1/4.
TOLERANCE = {"torch.float32": 1e-3, "torch.bfloat16": 0.4}
BASE = "__base__"  # PEFT's name for no adapter in a mixed batch
_print_once = functools.cache(print_note)  # once for all scorers
Adapters = Sequence[str | None]  # name of each row's adapter, or None for the model as it is


@dataclass(frozen=True)
class ScoringOptions:
    """How labels are scored and calibrated, as `distil.cli.add_scoring_flags` reads it.
    forms: {label: surface forms}; bias, class_shares: number by label in the same order (None: no shares given)."""

    forms: dict[str, list[str]]
    bias: tuple[float, ...]
    calibration: str = "auto"
    class_shares: tuple[float, ...] | None = None
    abstain_below: float | None = None
    null_prompts: int = 7
    aggregate: str = "max"
    batch_size: int | str = 32
    load: LoadOptions = field(default_factory=LoadOptions)
    label_tokens: str = "all"

    @property
    def labels(self) -> list[str]:
        """Return the labels in the order of all arrays."""
        return list(self.forms)

    def raw_settings(self) -> dict[str, Any]:
        """Return what decides raw scores and priors besides the model: a calibration fits no other settings."""
        settings = {"forms": self.forms, "aggregate": self.aggregate, "null_prompts": self.null_prompts}
        if server := self.load.server:
            settings |= {"quantization": "of the engine", "compute_dtype": None, "served_model": server.model}
        else:
            settings |= {"quantization": self.load.quantization, "compute_dtype": dtype_name(self.load.compute_dtype)}
        return settings | {"label_tokens": None if self.label_tokens == "all" else self.label_tokens}  # of old ones


def read_verbalizers(path: str | Path | None, labels: Sequence[str]) -> dict[str, list[str]]:
    """Return {label: surface forms} of a JSON file such as {"Standard": ["Standard", "Average"]}.
    A label that the file does not name has itself as its form. Raises InputError."""
    forms = {label: [label] for label in labels}
    if path:
        table = read_json(path)
        for label, words in table.items() if isinstance(table, dict) else [("", None)]:
            strings = isinstance(words, list) and all(isinstance(word, str) and word.strip() for word in words)
            if label not in forms or not strings or not words:
                raise InputError(f"{path}: expected an object of label: [words] with labels {', '.join(labels)}")
        forms |= table
        every = [word for words in forms.values() for word in words]
        if twice := sorted({word for word in every if every.count(word) > 1}):
            raise InputError(f"{path}: {', '.join(twice)} occurs twice; each word belongs to one label")
    return forms


def common_beginning(rows: Sequence[list[int]]) -> list[int]:
    """Return the token ids that all rows start with."""
    return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False))]


class FastLabelScorer(TreeScorer):
    """`common.LabelScorer` with shared beginnings, mixed adapters and a search for the batch size.

    batch_size: rows a forward; 'auto' finds the fastest in the first call with 256 rows, and is 32 before.
    shared_by: user turns whose common beginning is run once and its key/value cache reused (none: no cache).
    adapters: of a PEFT model, those that rows may use, `BASE` for none; without them the model scores as it is."""

    def __init__(
        self,
        model: Any,
        encoder: PromptEncoder,
        forms: dict[str, list[str]],
        aggregate: str = "max",
        batch_size: int | str = 32,
        shared_by: Sequence[str] = (),
        adapters: Sequence[str] = (),
        label_tokens: str = "all",
    ):
        import torch

        super().__init__(model, encoder, forms, aggregate, batch_size, label_tokens)
        self.context = context_length(self.body.config.get_text_config())
        self.prefix = common_beginning([encoder.prompt(turn) for turn in shared_by]) if shared_by else []
        self._prefix_caches: dict[str | None, list[tuple[Any, Any]]] = {}
        self.plain = False  # by the model's own logits
        self._shares = self.trees = not recurrent(self.body.config.get_text_config())  # beginnings; masks hide nodes
        with torch.inference_mode():
            self._check(adapters or [None])

    def _check(self, adapters: Adapters) -> None:
        """Score a padded pair both ways; where they differ, the plain way stays, with a note.
        The short row begins the long one, so that one forward gives the model's own logits of both, and the cache of
        the shared beginning. Raises InputError where later tokens or other rows change a row's own logits."""
        import numpy as np
        import torch
        from transformers import DynamicCache

        beginning, word = self.prefix or self.encoder.prompt("-"), self.form_ids[0]
        pair, first = [beginning + word, beginning + 4 * word], [[ids[0] for ids in self.form_ids]]
        self.check_length(pair)
        kind, limit = self.model.config.model_type, TOLERANCE[str(self.head.weight.dtype)]
        own: list[np.ndarray] = []
        plain, heads = not isinstance(self.head, torch.nn.Linear), []  # LoRA makes it another class
        hook = self.head.register_forward_hook(lambda module, inputs, output: heads.append(output))
        for adapter in adapters:  # each computes other keys and values
            cache = DynamicCache() if self._shares else None  # with the configuration windows would keep less
            try:
                with self._using([adapter]):
                    logits = self.logits(pair[1:], 3 * len(word) + 1, cache)
                plain |= not torch.allclose(heads.pop().float(), logits, 0, 0, equal_nan=True)  # rescaled
                own += list(logits.log_softmax(dim=-1)[0, [0, -1]][:, first[0]].double().cpu().numpy())
            except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError) as error:
                raise InputError(f"{kind} models cannot be scored on text alone ({error}); {TAKE}") from None
            filled = cache.layers if cache else ()
            layers = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in filled]
            full = [keys is not None and keys.shape[-2] == len(pair[1]) for keys, _ in layers]
            self._shares &= bool(layers) and all(full)
            if self._shares:
                kept = [(keys[:, :, : len(self.prefix)], values[:, :, : len(self.prefix)]) for keys, values in layers]
                self._prefix_caches[adapter] = kept
        hook.remove()
        names, rows = [name for name in adapters for _ in pair], pair * len(adapters)
        self.prefix = self.prefix if self._shares else []
        with contextlib.suppress(RuntimeError):  # where what stands before the head also changes the width
            gap = np.abs(self.log_probs(rows, [first] * len(rows), names)[:, 0] - own).max()
            if not plain and not gap > limit:  # also with NaN, which `joined` reports
                if not self.check_tree(rows, limit, adapters=names):
                    _print_once(f"this {kind} model takes a forward for each label of several tokens, which is slower")
                return
        self.plain, self._shares, self.prefix = True, False, []
        alone = [self.log_probs([row], [first], [name])[0, 0] for row, name in zip(rows, names, strict=True)]
        together = self.log_probs(rows, [first] * len(rows), names)[:, 0]
        if np.abs([together - alone, own - np.array(alone)]).max() > limit:
            raise InputError(f"{kind}: what follows a token, or other rows of a batch, change its score; {TAKE}")
        note = f"this {kind} model is scored by its own logits, which the fast way of scoring misses"
        _print_once(f"{note}: slower, and rounded where it computes in bfloat16")

    def _using(self, adapters: Adapters) -> contextlib.AbstractContextManager:
        """Return PEFT's mixed batches: row i of each forward inside goes through adapter i (PeftModel.forward)."""
        if adapters[0] is None:
            return contextlib.nullcontext()
        return self.model.base_model._enable_peft_forward_hooks(adapter_names=list(adapters))

    def score(self, rows: Sequence[list[int]], progress: str | None = None, adapters: Adapters = ()) -> np.ndarray:
        """Return raw scores [N, labels] as `LabelScorer.score`; adapters: [N] names of each row's adapter."""
        import numpy as np
        import torch
        from tqdm import tqdm

        self.check_length(rows)
        names = list(adapters) if adapters else [None] * len(rows)
        scores = np.empty((len(rows), len(self.form_ids)))
        bar = tqdm(total=len(rows), desc=progress, unit="row", disable=progress is None, file=sys.stderr)
        with torch.inference_mode(), bar:
            self.settled_batch_size(rows, names)
            for chosen in self._batches(rows, names):
                scores[chosen] = self._score_batch([rows[i] for i in chosen], [names[i] for i in chosen])
                bar.update(len(chosen))
        return self.joined(scores)

    def _score_batch(self, rows: list[list[int]], adapters: list[str | None]) -> np.ndarray:
        """Return scores [rows, forms]."""
        return self.form_scores(rows, adapters=adapters)

    def log_probs(self, rows: list[list[int]], targets: list, adapters: Adapters = ()) -> np.ndarray:
        """Return log-probabilities [rows, positions, k] as `LabelScorer.log_probs`, by the way that `_check` chose."""
        adapters = list(adapters) or [None] * len(rows)
        if not self.plain:
            return token_log_probs(self.hidden(rows, len(targets[0]), adapters), self.head, targets)
        with self._using(adapters):
            return super().log_probs(rows, targets)

    def settled_batch_size(self, rows: Sequence[list[int]], adapters: Adapters = ()) -> int:
        """Return the rows a forward; `auto` becomes the fastest number for these rows, and is 32 for under 256."""
        import torch

        if self.batch_size == "auto" and len(rows) >= 256:
            with torch.inference_mode():
                self.batch_size = self._fastest_batch_size(rows, adapters or [None] * len(rows))
            print(f"--batch_size auto: {self.batch_size} rows a forward", file=sys.stderr)
        elif self.batch_size == "auto" and len(rows) > 8:  # fewer are one batch at any size
            self.batch_size = 32  # from now on: an evaluation scores all its rows alike
        return 32 if self.batch_size == "auto" else self.batch_size

    def _fastest_batch_size(self, rows: Sequence[list[int]], adapters: Adapters) -> int:
        """Double the size from 8 as long as a row gets at least a twentieth faster and the longest rows fit."""
        import torch

        longest = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        best, seconds, size = 8, float("inf"), 8
        self._score_batch([rows[i] for i in longest[:8]], [adapters[i] for i in longest[:8]])  # warm-up
        while size <= min(len(rows), 256):
            batch = [rows[i] for i in longest[:size]], [adapters[i] for i in longest[:size]]
            start = time.perf_counter()
            try:
                self._score_batch(*batch)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            taken = (time.perf_counter() - start) / size
            if taken > 0.95 * seconds:
                break
            best, seconds, size = size, taken, 2 * size
        return best

    def _batches(self, rows: Sequence[list[int]], adapters: Adapters) -> list[list[int]]:
        """Return row numbers in batches: rows of like length together, or of like beginning where that runs less."""
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        size = self.settled_batch_size([])
        if len(rows) <= size:  # as always in the server: nothing to choose
            return [by_length] if rows else []
        by_beginning = sorted(range(len(rows)), key=lambda i: (adapters[i] or "", rows[i]))
        plans = [[order[i : i + size] for i in range(0, len(rows), size)] for order in (by_length, by_beginning)]

        def tokens(batch: list[int]) -> int:
            return self._stem([rows[i] for i in batch], [adapters[i] for i in batch], len(self.prefix), 1)[1]

        return min(plans, key=lambda plan: sum(map(tokens, plan)))

    def _stem(self, rows: Sequence[list[int]], adapters: Adapters, start: int, positions: int) -> tuple[int, int]:
        """Return (length, tokens to run): up to which length rows that begin alike run once for all of them.
        Then the fewest tokens beyond the first `start` are run; `start` itself where another forward would not pay."""
        longest, most = max(map(len, rows)), min(map(len, rows)) - positions if self._shares else 0
        alone = len(rows) * (longest - start)
        best, fewest = start, min(0.8 * alone, alone - STEM_TOKENS)
        neighbours = pairwise(sorted(zip((adapter or "" for adapter in adapters), rows, strict=True)))
        alike = [-1 if a != b else len(common_beginning([one, other])) for (a, one), (b, other) in neighbours]
        for length in range(start + 1, most + 1):
            stems = 1 + sum(common < length for common in alike)
            tokens = stems * (length - start) + len(rows) * (longest - length)
            if tokens < fewest:
                best, fewest = length, tokens
        return best, int(fewest) if best > start else alone

    def hidden(self, rows: list, positions: int, adapters: list, trie: Trie | None = None) -> torch.Tensor:
        """Return final hidden states [rows, positions, hidden] of the last tokens of each row, then of the nodes."""
        import torch

        start = len(self.prefix)
        if any(row[:start] != self.prefix or len(row) - start < positions for row in rows):
            start = 0
        length, _ = self._stem(rows, adapters, start, positions)
        layers = self._prefix_layers(adapters) if start else None
        if length > start:
            keys = [(adapter, tuple(row[:length])) for adapter, row in zip(adapters, rows, strict=True)]
            stems = list(dict.fromkeys(keys))
            names = [adapter for adapter, _ in stems]
            before = self._prefix_layers(names) if start else []
            _, cache = self._forward([list(ids) for _, ids in stems], start, before, names, 1)
            index = torch.tensor([stems.index(key) for key in keys], device=self.device)
            layers = [[layer.keys[index], layer.values[index]] for layer in cache.layers]
        return self._forward(rows, length, layers, adapters, positions, trie)[0]

    def _prefix_layers(self, adapters: list[str | None]) -> list[list[torch.Tensor]]:
        """Return keys and values of the shared beginning for rows of these adapters, layer by layer."""
        import torch

        caches = [self._prefix_caches[adapter] for adapter in adapters]
        if len(set(adapters)) == 1:  # one cache for all rows, without copies
            return [[part.expand(len(adapters), -1, -1, -1) for part in layer] for layer in caches[0]]
        return [[torch.cat(parts) for parts in zip(*layer, strict=True)] for layer in zip(*caches, strict=True)]

    def _forward(
        self, rows: list, start: int, layers: list | None, adapters: Adapters, positions: int, trie: Trie | None = None
    ) -> tuple[torch.Tensor, Any]:
        """Return hidden states [rows, positions, hidden] of each row's last positions, then of nodes, and the cache.
        layers: keys and values of the first `start` tokens, which are not run; None for no cache."""
        from transformers import DynamicCache

        rows = [row[start:] for row in rows]
        ids, last = right_padded(rows, positions, self.encoder.tokenizer.pad_token_id, self.device)
        inputs = {"input_ids": ids}
        if trie:
            inputs, last = trie.inputs(ids, last, start, self.body.dtype)
        cache = DynamicCache([tuple(layer) for layer in layers] or None) if layers is not None else None
        with self._using(adapters):
            output = self.body(**inputs, cache=cache, use_cache=cache is not None)
        return output.last_hidden_state[last], cache


def label_prior(
    scorer: FastLabelScorer, fingerprint: str, turns: Sequence[str], adapter: str | None = None, verify: bool = False
) -> np.ndarray:
    """Return the mean raw score [labels] over content-free user turns, cached on disk under everything it depends on.
    fingerprint: of the model and how it was loaded. Source: whitepaper section 4.3; Zhao et al. 2021."""
    import numpy as np

    prompts = [scorer.encoder.prompt(turn) for turn in turns]
    key = [fingerprint, prompts, scorer.forms, scorer.aggregate] + ([scorer.join] if scorer.join != "mean" else [])
    digest, stored = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32], None
    path = cache_dir() / "priors" / f"{digest}.json"
    with contextlib.suppress(InputError, ValueError, KeyError, TypeError):
        stored = np.array([float(read_json(path)["prior"][label]) for label in scorer.labels])
        if not verify:  # a server may have other weights under the same name the next time
            return stored
    prior = scorer.score(prompts, adapters=[adapter] * len(turns)).mean(axis=0)
    prior = stored if stored is not None and np.abs(stored - prior).max() < 0.02 else prior
    with contextlib.suppress(OSError):  # a read-only cache costs time, not the answer
        write_json(path, {"prior": dict(zip(scorer.labels, prior.tolist(), strict=True))})
    return prior
