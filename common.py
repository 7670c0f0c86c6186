"""What turns text into scores, for all models and tasks alike: prompts, label scoring, calibration.

A function is here because two scripts use it and two versions that disagree would give a wrong number without an
error. Values in, values out: nothing here reads the command line, keeps global state or does work at import, and
heavy libraries are imported inside the functions that need them, so that `--help` is instant.

Departures from the textbook:
- user text is tokenised with control tokens switched off, so `<|im_end|>` in a document stays plain text;
- the softmax over the vocabulary is taken in float32 from the hidden state, since bf16 logits come in steps of 1/16;
- the part of a prompt that all rows share is run once and its key/value cache reused.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files import InputError, cache_dir, read_json, write_json

if TYPE_CHECKING:
    import numpy as np
    import torch

SCORING_TILE = 16384  # columns of the vocabulary that scoring has in float32 at a time
STEM_TOKENS = 256  # a further forward has to save so many: about what starting one costs
BASE = "__base__"  # PEFT's name for no adapter in a mixed batch
SYSTEM_PROMPT = "Follow the instruction and answer with nothing else."


# ---------------------------------------------------------------------------------------------------------- prompts


def plain_text_tokenizer(tokenizer: Any) -> Any:
    """A copy of a tokenizer's backend to which every added token is plain text. `split_special_tokens` alone leaves
    those in force that are not marked as special, such as Qwen's <tool_call>. Raises InputError without a backend."""
    from tokenizers import Tokenizer

    if not hasattr(tokenizer, "backend_tokenizer"):
        raise InputError(f"{tokenizer.name_or_path}: a tokenizer.json is needed; this tokenizer has none")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in described["added_tokens"]:
        token["special"] = True
    plain = Tokenizer.from_str(json.dumps(described))
    plain.encode_special_tokens = True
    plain.no_truncation()
    plain.no_padding()
    return plain


class PromptEncoder:
    """Turns a user turn into the token ids of the model's own chat template, ending at the assistant start.

    Each stretch of text between control tokens is tokenised as a whole, with control tokens in it read as plain
    text, so the ids equal the template's own for ordinary text and no user text can become a control token.
    A tokenizer without a chat template gets the text and a newline.
    """

    _SLOT = "\ue000"

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._plain = plain_text_tokenizer(tokenizer)
        self.end_of_turn = tokenizer.eos_token
        self._parts: list[int | str] | None = None
        if tokenizer.chat_template is None:
            return
        rendered = self._render([{"role": "user", "content": self._SLOT}], add_generation_prompt=True)
        special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        pattern = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
        self._parts = [special.get(piece, piece) for piece in pattern.split(rendered) if piece]
        answered = self._render([{"role": "user", "content": "-"}, {"role": "assistant", "content": self._SLOT}])
        after = pattern.search(answered.rpartition(self._SLOT)[2])
        self.end_of_turn = after[0] if after else tokenizer.eos_token

    def _render(self, messages: list[dict], **kwargs: Any) -> str:
        from jinja2 import TemplateError

        system = {"role": "system", "content": SYSTEM_PROMPT}
        try:
            return self.tokenizer.apply_chat_template([system, *messages], tokenize=False, **kwargs)
        except TemplateError:  # some templates (Gemma's) refuse a system turn: its text then opens the user turn
            first = {"role": "user", "content": f"{SYSTEM_PROMPT}\n\n{messages[0]['content']}"}
            return self.tokenizer.apply_chat_template([first, *messages[1:]], tokenize=False, **kwargs)

    def text(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of plain text; control tokens in it stay text."""
        return self._plain.encode(text, add_special_tokens=add_special_tokens).ids

    def prompt(self, user_turn: str) -> list[int]:
        """Token ids of system turn, user turn and assistant start."""
        if self._parts is None:
            return self.text(user_turn + "\n", add_special_tokens=True)
        ids: list[int] = []
        for part in self._parts:
            ids += [part] if isinstance(part, int) else self.text(part.replace(self._SLOT, user_turn))
        return ids

    def completion(self, text: str) -> list[int]:
        """Token ids of an answer with the end-of-turn token that training teaches and scoring leaves out."""
        return [*self.text(text), self.tokenizer.convert_tokens_to_ids(self.end_of_turn)]

    def label(self, text: str) -> list[int]:
        """Token ids of a label. Raises InputError where they would merge with the assistant start before them."""
        alone = self.text(text)
        joint = self.text("\n" + text)
        if joint[-len(alone) :] != alone or not alone:
            raise InputError(f"label {text!r} has no stable tokens after the assistant start; choose another word")
        return alone


# ---------------------------------------------------------------------------------------------------------- scoring


def read_verbalizers(path: str | Path | None, labels: Sequence[str]) -> dict[str, list[str]]:
    """{label: surface forms} of a JSON file such as {"Standard": ["Standard", "Average"]}; itself where not named."""
    forms = {label: [label] for label in labels}
    if path:
        given = read_json(path)
        for label, words in given.items() if isinstance(given, dict) else [("", None)]:
            strings = isinstance(words, list) and all(isinstance(word, str) and word.strip() for word in words)
            if label not in forms or not strings or not words:
                raise InputError(f"{path}: expected an object of label: [words] with labels {', '.join(labels)}")
        forms |= given
        every = [word for words in forms.values() for word in words]
        twice = sorted({word for word in every if every.count(word) > 1})
        if twice:
            raise InputError(f"{path}: {', '.join(twice)} stands there twice; each word belongs to one label")
    return forms


def common_beginning(rows: Sequence[list[int]]) -> list[int]:
    return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False))]


class LabelScorer:
    """Length-normalised log-likelihood of each label at the assistant start (whitepaper, section 4.3).

    forms: {label: surface forms}; several forms are joined by `aggregate` ('max', 'mean' or 'logsumexp').
    batch_size: rows a forward; 'auto' finds the fastest in the first call with 256 rows, and is 32 before.
    shared_by: user turns whose common beginning is run once and its key/value cache reused (none: no cache).
    adapters: names of a PEFT model's adapters that rows may ask for, `BASE` for none; without them all rows are
    scored by the model as it is.
    Rows are sorted by length and batched, or by their beginning where rows of a batch share more of it (those of one
    customer do): it is then run once for all that share it. Labels of one token need one forward for all; only scored
    positions go through the output head, in float32.
    """

    def __init__(
        self,
        model: Any,
        encoder: PromptEncoder,
        forms: dict[str, list[str]],
        aggregate: str = "max",
        batch_size: int | str = 32,
        shared_by: Sequence[str] = (),
        adapters: Sequence[str] = (),
    ):
        self.model, self.encoder, self.forms, self.aggregate = model, encoder, forms, aggregate
        self.batch_size = batch_size
        self.labels = list(forms)
        self._form_ids = [encoder.label(word) for words in forms.values() for word in words]
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        text_config = causal.config.get_text_config()
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
            if getattr(text_config, name, None) not in (None, 1.0):
                raise InputError(f"{causal.config.model_type} models rescale their logits ({name}): not supported")
        self._body, self._head = getattr(causal, causal.base_model_prefix), causal.get_output_embeddings()
        self._device = next(self._body.parameters()).device
        self._context = text_config.max_position_embeddings
        self.prefix: list[int] = []
        self._prefix_caches: dict[str | None, list[tuple[Any, Any]]] = {}
        if shared_by:
            self._run_prefix(shared_by, adapters or [None])

    def _run_prefix(self, user_turns: Sequence[str], adapters: Sequence[str | None]) -> None:
        """Each adapter has keys and values of its own for the shared beginning."""
        import torch

        self.prefix = common_beginning([self.encoder.prompt(turn) for turn in user_turns])
        for adapter in adapters if self.prefix else []:
            with torch.inference_mode(), self._using([adapter]):
                ids = torch.tensor([self.prefix], device=self._device)
                cache = self._body(input_ids=ids, use_cache=True).cache
            self._prefix_caches[adapter] = [(layer.keys, layer.values) for layer in cache.layers]

    def _using(self, adapters: Sequence[str | None]) -> contextlib.AbstractContextManager:
        """PEFT's mixed batches: row i of each forward inside goes through adapter i (as in PeftModel.forward)."""
        if adapters[0] is None:
            return contextlib.nullcontext()
        return self.model.base_model._enable_peft_forward_hooks(adapter_names=list(adapters))

    def fits(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt of these token ids and the longest label fit the model's context."""
        return len(prompt) + max(map(len, self._form_ids)) <= self._context

    def raw_scores(
        self, user_turns: Sequence[str], progress: str | None = None, adapters: Sequence[str | None] | None = None
    ) -> np.ndarray:
        """`score` of user turns."""
        return self.score([self.encoder.prompt(turn) for turn in user_turns], progress, adapters)

    def score(
        self, rows: Sequence[list[int]], progress: str | None = None, adapters: Sequence[str | None] | None = None
    ) -> np.ndarray:
        """Mean log-probability [N, labels] (float64, natural log) of each label's tokens after each prompt.

        rows: [N] token ids of prompts. adapters: [N] names of each row's adapter. `progress` names a progress bar on
        stderr. Raises InputError for a prompt longer than the model's context, FloatingPointError where the model
        computes no numbers.
        """
        import numpy as np
        import torch
        from tqdm import tqdm

        if not all(map(self.fits, rows)):
            longest = max(map(len, rows))
            raise InputError(f"a text has {longest} tokens; the model's context is {self._context}: shorten it")
        names = list(adapters) if adapters else [None] * len(rows)
        scores = np.empty((len(rows), len(self._form_ids)))
        bar = tqdm(total=len(rows), desc=progress, unit="row", disable=progress is None, file=sys.stderr)
        with torch.inference_mode(), bar:
            if self.batch_size == "auto" and len(rows) >= 256:
                self.batch_size = self._fastest_batch_size(rows, names)
                print(f"--batch_size auto: {self.batch_size} rows a forward", file=sys.stderr)
            for chosen in self._batches(rows, names):
                scores[chosen] = self._score_batch([rows[i] for i in chosen], [names[i] for i in chosen])
                bar.update(len(chosen))
        if np.isnan(scores).any():
            raise FloatingPointError("the model's scores are no numbers (NaN); try --compute_dtype float32")
        return self._join_forms(scores)

    def _join_forms(self, scores: np.ndarray) -> np.ndarray:
        """[N, forms] -> [N, labels]; logsumexp adds probabilities, as the forms are different answers."""
        import numpy as np

        join = {"max": np.max, "mean": np.mean, "logsumexp": np.logaddexp.reduce}[self.aggregate]
        ends = np.cumsum([len(words) for words in self.forms.values()])
        return np.stack([join(part, axis=1) for part in np.split(scores, ends[:-1], axis=1)], axis=1)

    def _score_batch(self, rows: list[list[int]], adapters: list[str | None]) -> np.ndarray:
        """[rows, forms] mean log-probabilities; one forward for all single-token forms, one for each longer form."""
        import numpy as np

        scores = np.empty((len(rows), len(self._form_ids)))
        single = [i for i, ids in enumerate(self._form_ids) if len(ids) == 1]
        if single:
            targets = [[[self._form_ids[i][0] for i in single]]] * len(rows)
            scores[:, single] = self._log_probs(self._hidden(rows, 1, adapters), targets)[:, 0]
        for i, ids in enumerate(self._form_ids):
            if len(ids) > 1:
                hidden = self._hidden([row + ids[:-1] for row in rows], len(ids), adapters)
                scores[:, i] = self._log_probs(hidden, [[[token] for token in ids]] * len(rows))[:, :, 0].mean(axis=1)
        return scores

    def _fastest_batch_size(self, rows: Sequence[list[int]], adapters: Sequence[str | None]) -> int:
        """Doubled from 8 for as long as that makes a row at least a twentieth faster and the longest rows fit."""
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

    def _batches(self, rows: Sequence[list[int]], adapters: Sequence[str | None]) -> list[list[int]]:
        """Row numbers in batches: rows of like length together, or of like beginning where that is less to run."""
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        size = 32 if self.batch_size == "auto" else self.batch_size
        if len(rows) <= size:  # as always in the server: nothing to choose
            return [by_length] if rows else []
        by_beginning = sorted(range(len(rows)), key=lambda i: (adapters[i] or "", rows[i]))
        plans = [[order[i : i + size] for i in range(0, len(rows), size)] for order in (by_length, by_beginning)]

        def tokens(batch: list[int]) -> int:
            return self._stem([rows[i] for i in batch], [adapters[i] for i in batch], len(self.prefix), 1)[1]

        return min(plans, key=lambda plan: sum(map(tokens, plan)))

    def _stem(
        self, rows: Sequence[list[int]], adapters: Sequence[str | None], start: int, positions: int
    ) -> tuple[int, int]:
        """(length, tokens to run): up to which length rows that begin alike run once for all of them, so that fewest
        tokens are run beyond the first `start`; `start` itself where a forward more would not pay."""
        longest, most = max(map(len, rows)), min(map(len, rows)) - positions
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

    def _hidden(self, rows: list[list[int]], positions: int, adapters: list[str | None]) -> torch.Tensor:
        """Final hidden states [rows, positions, hidden] of the last `positions` tokens of each row."""
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
            known = self._prefix_layers(names) if start else None
            cache = self._forward([list(ids) for _, ids in stems], start, known, names, True).cache
            index = torch.tensor([stems.index(key) for key in keys], device=self._device)
            layers = [[layer.keys[index], layer.values[index]] for layer in cache.layers]
        return self._forward(rows, length, layers, adapters).last_hidden_state[:, -positions:]

    def _prefix_layers(self, adapters: list[str | None]) -> list[list[torch.Tensor]]:
        """Keys and values of the shared beginning for rows of these adapters, layer by layer."""
        import torch

        caches = [self._prefix_caches[adapter] for adapter in adapters]
        if len(set(adapters)) == 1:  # one cache for all rows, without copies
            return [[part.expand(len(adapters), -1, -1, -1) for part in layer] for layer in caches[0]]
        return [[torch.cat(parts) for parts in zip(*layer, strict=True)] for layer in zip(*caches, strict=True)]

    def _forward(
        self,
        rows: list[list[int]],
        start: int,
        layers: list[list[torch.Tensor]] | None,
        adapters: list[str | None],
        keep_cache: bool = False,
    ) -> Any:
        """The body's output for the tokens of each row from `start` on; `layers` are keys and values of those before.
        Padding is on the left, between the two."""
        import torch
        from transformers import DynamicCache

        width = max(map(len, rows)) - start
        pads = [width + start - len(row) for row in rows]
        tensor = functools.partial(torch.tensor, device=self._device)
        filler = self.encoder.tokenizer.pad_token_id
        with self._using(adapters):
            return self._body(
                input_ids=tensor([[filler] * pad + row[start:] for pad, row in zip(pads, rows, strict=True)]),
                attention_mask=tensor([[1] * start + [0] * pad + [1] * (width - pad) for pad in pads]),
                position_ids=tensor([[0] * pad + list(range(start, start + width - pad)) for pad in pads]),
                cache=DynamicCache([tuple(layer) for layer in layers]) if layers else None,
                use_cache=keep_cache or bool(layers),
            )

    def _log_probs(self, hidden: torch.Tensor, targets: list[list[list[int]]]) -> np.ndarray:
        """Log-probabilities [rows, positions, k] of `targets` given hidden states [rows, positions, hidden].

        The head runs in float32 and in slices of the vocabulary, so its full width never exists in float32.
        """
        import torch

        weight, bias = self._head.weight, getattr(self._head, "bias", None)
        hidden = hidden.to(weight.device).float()
        total = torch.full(hidden.shape[:2], -torch.inf, device=hidden.device)
        for start in range(0, weight.shape[0], SCORING_TILE):
            part = hidden @ weight[start : start + SCORING_TILE].float().T
            if bias is not None:
                part = part + bias[start : start + SCORING_TILE].float()
            total = torch.logaddexp(total, part.logsumexp(dim=-1))
        wanted = torch.tensor(targets, device=hidden.device)
        logits = torch.einsum("bph,bpkh->bpk", hidden, weight[wanted].float())
        if bias is not None:
            logits = logits + bias[wanted].float()
        return (logits - total[..., None]).double().cpu().numpy()


def label_prior(scorer: LabelScorer, fingerprint: str, turns: Sequence[str], adapter: str | None = None) -> np.ndarray:
    """Mean raw score [labels] over content-free user turns, kept on disk under everything it depends on.

    fingerprint: of the model and how it was loaded. Source: whitepaper section 4.3; Zhao et al. 2021.
    """
    import numpy as np

    prompts = [scorer.encoder.prompt(turn) for turn in turns]
    key = json.dumps([fingerprint, prompts, scorer.forms, scorer.aggregate], sort_keys=True)
    path = cache_dir() / "priors" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(InputError, ValueError, KeyError, TypeError):
        stored = read_json(path)["prior"]
        return np.array([float(stored[label]) for label in scorer.labels])
    prior = scorer.raw_scores(turns, adapters=[adapter] * len(turns)).mean(axis=0)
    with contextlib.suppress(OSError):  # a read-only cache costs time, not the answer
        write_json(path, {"prior": dict(zip(scorer.labels, prior.tolist(), strict=True))})
    return prior


# ------------------------------------------------------------------------------------------------------ calibration


@dataclass(frozen=True)
class Calibration:
    """calibrated = raw - prior + bias; probabilities = softmax(calibrated / temperature). Arrays are [labels]."""

    method: str
    prior: np.ndarray
    bias: np.ndarray
    temperature: float = 1.0

    def scores(self, raw: np.ndarray) -> np.ndarray:
        """Calibrated scores [N, labels] of raw scores [N, labels]."""
        return raw - self.prior + self.bias

    def probabilities(self, raw: np.ndarray) -> np.ndarray:
        """Probabilities [N, labels] of raw scores [N, labels]."""
        from scipy.special import softmax

        return softmax(self.scores(raw) / self.temperature, axis=1)


def with_shares(calibration: Calibration, shares: np.ndarray) -> Calibration:
    """The calibration for a field where the labels have these shares [labels], not equal ones: the odds of each label
    change by its share (Saerens et al. 2002), scores and probabilities alike."""
    import numpy as np

    shift = calibration.temperature * np.log(shares * len(shares))
    return Calibration(calibration.method, calibration.prior, calibration.bias + shift, calibration.temperature)


def fit_calibration(raw: np.ndarray, prior: np.ndarray, answers: np.ndarray) -> Calibration:
    """Bias per label and temperature that minimise the negative log-likelihood of the right answers.

    raw: [N, labels]; prior: [labels]; answers: [N] label indices. Convex in (bias / T, 1 / T), so the start does not
    matter; the biases are centred, since a common shift changes nothing. Temperatures stay within 1/20 to 20 and
    biases within 50, for rows that a model answers all right or all alike. Source: Guo et al. 2017, with biases.
    """
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    centred = raw - prior

    def loss(parameters: np.ndarray) -> float:
        logits = centred * np.exp(parameters[0]) + np.append(parameters[1:], 0.0)
        return -log_softmax(logits, axis=1)[np.arange(len(answers)), answers].mean()

    bounds = [(-np.log(20), np.log(20)), *[(-50, 50)] * (raw.shape[1] - 1)]
    found = minimize(loss, np.zeros(raw.shape[1]), method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-12}).x
    temperature = float(np.exp(-found[0]))
    bias = np.append(found[1:], 0.0) * temperature
    return Calibration("fitted", prior, bias - bias.mean(), temperature)


def fit_shares(raw: np.ndarray, prior: np.ndarray, answers: np.ndarray, way: float = 1.0) -> Calibration:
    """`fit_calibration`, its biases then moved until each label is predicted as often as it is right on these rows,
    or only part of that `way` (0 to 1).

    The likelihood alone lets a label that is often second best be predicted too rarely: its recall falls below its
    precision. Matching the shares has one answer and less noise than a search for the best F1 on few rows.
    """
    import numpy as np

    found = fit_calibration(raw, prior, answers)
    actual = np.bincount(answers, minlength=raw.shape[1])
    best = bias = found.bias
    least = np.inf
    for _ in range(300):
        predicted = np.bincount((raw - prior + bias).argmax(axis=1), minlength=raw.shape[1])
        if (gap := np.abs(actual - predicted).sum()) < least:
            best, least = bias, gap
        bias = bias + 0.05 * found.temperature * np.log((actual + 1) / (predicted + 1))
    bias = found.bias + way * (best - found.bias)
    return Calibration("fitted", prior, bias - bias.mean(), found.temperature)


def cross_fitted_probabilities(
    raw: np.ndarray,
    prior: np.ndarray,
    answers: np.ndarray,
    groups: Sequence[str],
    fit: Callable[..., Calibration] = fit_calibration,
) -> np.ndarray:
    """Probabilities [N, labels] by fitted calibrations that did not see the row's group, in five folds: so that a fit
    can be compared with calibrators that have nothing to fit."""
    import numpy as np
    from sklearn.model_selection import GroupKFold

    probabilities = np.empty_like(raw)
    for train, test in GroupKFold(5).split(raw, answers, groups):
        probabilities[test] = fit(raw[train], prior, answers[train]).probabilities(raw[test])
    return probabilities


def row_losses(probabilities: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Negative log-likelihood (natural log) of each row, [N]."""
    import numpy as np

    return -np.log(probabilities[np.arange(len(answers)), answers].clip(1e-12))


def likeliest(losses: dict[str, np.ndarray], groups: Sequence[str]) -> str:
    """The simplest calibrator that is not less likely than the likeliest by more than one standard error of the
    difference, over groups of rows (customers): what few rows seem to gain is mostly noise (the one-standard-error
    rule, Breiman et al. 1984). losses: {method: negative log-likelihoods [N]}, the simplest first; at least two
    groups."""
    import numpy as np

    best = min(losses.values(), key=np.mean)
    _, whose = np.unique(groups, return_inverse=True)

    def about_best(loss: np.ndarray) -> bool:
        lost = np.bincount(whose, loss - best)
        return lost.sum() <= lost.std(ddof=1) * np.sqrt(len(lost))

    return next(name for name, loss in losses.items() if about_best(loss))
