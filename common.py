"""The ground floor: 4-bit NF4 loading, LoRA configuration, prompts and calibrated label scoring.

Read it from top to bottom to see how a label gets its score. It imports nothing of this project and nothing heavy at
import, keeps no state and reads no command line. Faster variants live in distil/ and compose the same functions:
distil/scoring.py scores with shared prompt beginnings, distil/models.py turns a user's model name into a path.

Departures from the textbook:
- user text is tokenised with control tokens switched off, so `<|im_end|>` in a document stays plain text;
- scoring pads on the right: no token sees what follows it, and attention windows hold the row alone;
- the fast driver's softmax is in float32 from the hidden state, since bf16 logits come in steps of 1/16.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import secrets
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from peft import LoraConfig

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SYSTEM_PROMPT = "Follow the instruction and answer with nothing else."
PROBE = 'Age: 23, a_b: "1.5"\n<x> & {y}:  7\t-\n\n# \\ **b**\u00a0c' + "word " * 700 + "end."  # a user's text
TEMPLATE_DATE = datetime.date(2024, 7, 26)  # of chat templates that write one: else scores would change every day
_FORMS = re.findall("-?.", "aAbBcd-dDeFHIjm-mMpSUwWxXyYZ")  # after a % each
_DATES = "".join(f"|replace('%{form}', '{TEMPLATE_DATE:%{form}}')" for form in _FORMS)
FIXED_DATE = "{% macro strftime_now(format) %}{{ format" + _DATES + " }}{% endmacro %}\n"  # put before a template
THINKING_OFF = {"enable_thinking": False, "thinking": False}  # names that chat templates have for it
SCORING_TILE = 16384  # columns of the vocabulary that scoring has in float32 at a time


class InputError(Exception):
    """Wrong input (flag, file, data, model). distil.cli.run_script prints it as one line and exits with status 2."""


def compute_dtype(name: str = "auto") -> torch.dtype:
    """Return the type of computation; 'auto' is bfloat16 where the device computes fast in it, else float32."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def dtype_name(name: str = "auto") -> str:
    """Return 'bfloat16' or 'float32': what `compute_dtype(name)` is on this machine."""
    return str(compute_dtype(name)).removeprefix("torch.")


def load_model(
    path: str,
    adapter: str | None = None,
    quantization: str = "nf4",
    dtype: str = "auto",
    offload_folder: str | None = None,
    trainable: bool = False,
) -> tuple[Any, Any]:
    """Load a base model, with an adapter folder on top if given; return (model, tokenizer).

    path: local folder or hub id, as `distil.models.resolve` returns it. quantization: 'nf4' (4 bits with double
    quantisation, QLoRA paper section 3) or 'none'. dtype: 'auto', 'bfloat16' or 'float32', the type of computation
    and of everything that is not quantised. The model is placed on this process's GPU, else on the CPU; with
    `offload_folder`, what does not fit the GPU is offloaded unquantised (inference only). trainable: load the adapter
    so that its training can continue.
    Raises InputError where weights are missing or the adapter does not belong to this base.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    tokenizer = AutoTokenizer.from_pretrained(path)
    end_of_turn = PromptEncoder(tokenizer).end_of_turn  # refuses some templates: before the weights are loaded
    compute, cuda = compute_dtype(dtype), torch.cuda.is_available()
    device_map: Any = {"": int(os.environ.get("LOCAL_RANK", 0))} if cuda else None
    offload = bool(offload_folder) and cuda and not trainable
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        # bitsandbytes refuses a device map that is partly on the CPU without it; offloaded parts stay unquantised.
        llm_int8_enable_fp32_cpu_offload=offload,
    )
    model, report = AutoModelForCausalLM.from_pretrained(
        path,
        output_loading_info=True,
        dtype=compute,
        device_map="auto" if offload else device_map,
        use_safetensors=True,
        **({"quantization_config": nf4} if quantization == "nf4" else {}),  # None would undo the base's own
        **({"offload_folder": offload_folder} if offload else {}),
    )
    if surplus := sorted(report["unexpected_keys"]):
        unused = f"the weights have {len(surplus)} tensors that its config.json does not use, such as {surplus[0]}"
        print(f"note: {path}: {unused}", file=sys.stderr)
    if missing := sorted(report["missing_keys"]):  # transformers would fill them with random numbers
        raise InputError(f"{path}: the weights lack {len(missing)} tensors, such as {missing[0]}; copy it again")
    for module in model.modules():
        # bitsandbytes' packed AVX512-BF16 kernel has no gradient: one evaluation would make all later training steps
        # wrong without an error (measured: cosine 0.18 to the true gradient). distil/workarounds.py has the details.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    align_special_tokens(model, tokenizer, end_of_turn)
    if adapter:
        model = add_adapters(model, {"default": adapter}, trainable)
        # PEFT looks the base up at each save, on the hub if the name is not a path.
        model.active_peft_config.base_model_name_or_path = path
    return model.train(trainable), tokenizer


def add_adapters(model: Any, folders: dict[str, str], trainable: bool = False) -> Any:
    """Return a PEFT model of a loaded base with the adapters {name: folder} on top, the first of them active.

    For inference the adapter weights, trained in float32, take the base's type of computation: half the memory, and
    faster. Raises InputError where an adapter's weights do not match its configuration and the base.
    """
    from peft import PeftModel

    dtype = model.dtype
    for number, (name, folder) in enumerate(folders.items()):
        try:
            with warnings.catch_warnings():
                # PEFT only warns, and would continue with an adapter that changes nothing.
                warnings.filterwarnings("error", message="Found missing adapter keys")
                if number:
                    model.load_adapter(folder, name)
                else:
                    model = PeftModel.from_pretrained(model, folder, name, is_trainable=trainable)
        except (UserWarning, RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"{folder}: not an adapter for this base ({reason}); train or copy it again") from None
    if not trainable:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    return model.train(trainable)


def align_special_tokens(model: Any, tokenizer: Any, end_of_turn: str) -> None:
    """Set EOS to end-of-turn, PAD to another token (pad = eos would mask the stop token), and generation to greedy.
    Raises InputError as `padding_token`."""
    from transformers import GenerationConfig

    size = model.config.get_text_config().vocab_size
    tokenizer.eos_token, tokenizer.pad_token = end_of_turn, padding_token(tokenizer, end_of_turn, size)
    tokenizer.padding_side = "left"
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.config.update({name: token for name, token in ids.items() if token is not None})
    model.generation_config = GenerationConfig(do_sample=False, repetition_penalty=1.0, **ids)


def padding_token(tokenizer: Any, end_of_turn: str, size: int) -> str:
    """Return a token for padding, below `size`. `end_of_turn` is the last resort, and safe: nothing here derives what
    is masked or supervised from token ids. Raises InputError where there is none."""
    others = ("<|endoftext|>", "<pad>", "<|pad|>", "<|finetune_right_pad_id|>", tokenizer.unk_token)
    special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    tokens, vocabulary = (tokenizer.pad_token, *others, *special), tokenizer.get_vocab()
    for token in (*(token for token in tokens if token != end_of_turn), end_of_turn):
        if vocabulary.get(token, size) < size:
            return token
    raise InputError(f"{tokenizer.name_or_path}: no token below the model's {size} can serve as padding: they differ")


def lora_config(r: int = 16, alpha: int = 32, dropout: float = 0.05, targets: Any = LORA_TARGETS) -> LoraConfig:
    """Return LoRA as the whitepaper's section 3 sets it; targets: names of layers, or a pattern of full names."""
    from peft import LoraConfig

    modules = targets if isinstance(targets, str) else list(targets)
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules, task_type="CAUSAL_LM")


# ---------------------------------------------------------------------------------------------------------- prompts


def text_tokenizer(tokenizer: Any) -> tuple[Any, dict[str, str]]:
    """Return a copy of a tokenizer's backend whose added tokens have names drawn at random, and {token: name}.
    No text of a user's has such a name, so control tokens in it are plain text, special or not, also for a vocabulary
    that would find them by itself. Runs of blanks (Gemma, GPT-NeoX) and signs that are added are text and keep theirs.
    Raises InputError for a tokenizer without a backend."""
    from tokenizers import Tokenizer

    if not hasattr(tokenizer, "backend_tokenizer"):
        raise InputError(f"{tokenizer.name_or_path}: a tokenizer.json is needed; this tokenizer has none")
    description, names, draw = json.loads(tokenizer.backend_tokenizer.to_str()), {}, secrets.token_hex(8)
    for number, token in enumerate(description["added_tokens"]):
        letters = len((text := token["content"]).replace("\u2581", " ").strip())
        if letters > 1 or (letters and token["special"]):  # without its name a sign could not be written at all
            names[text] = token["content"] = f"<{draw}-{number}>"
    model = description["model"]
    vocabulary = model["vocab"]  # {token: number}; a list of [token, score] in Unigram models
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else vocabulary
    model["vocab"] = type(vocabulary)([names.get(token, token), value] for token, value in pairs)
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if names.keys().isdisjoint((*pair, "".join(pair)))]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    plain = Tokenizer.from_str(json.dumps(description))
    plain.no_truncation()
    plain.no_padding()
    return plain, names


class PromptEncoder:
    """Turns a user turn into the token ids of the model's own chat template, ending at the assistant start.

    The template is rendered once. What it writes keeps its tokens, special or not; the user's text between is plain.
    Both are tokenised in one piece, so the ids are the template's own. Its date is TEMPLATE_DATE, thinking is off, and
    an empty thought that it then writes belongs to the prompt. Without a template: the text and a newline.
    """

    _SLOT, _ANSWER = "\ue000", "\ue001"

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.end_of_turn, self._trim = tokenizer, tokenizer.eos_token, str
        self._templated = tokenizer.chat_template is not None
        before, after, start, rest = "", "\n", "\n", ""
        if self._templated:
            before, after = self._render(self._SLOT).split(self._SLOT)
            blank = self._render(f"\n {self._SLOT} \n")
            kept = blank.startswith(f"{before}\n "), blank.endswith(f" \n{after}")
            self._trim = {(1, 1): str, (0, 1): str.lstrip, (1, 0): str.rstrip, (0, 0): str.strip}[kept]
            answered = self._render(self._SLOT, self._ANSWER).rpartition(self._SLOT)[2]
            start, found, rest = answered.partition(self._ANSWER)
            # Up to the answer: some templates write no assistant start, or can end a thought only before an answer.
            start = start if found and start.startswith(after) else after
        self._plain, names = text_tokenizer(tokenizer)
        control = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
        self.end_of_turn = ended[0] if (ended := control.search(rest)) else tokenizer.eos_token
        # Blanks before an answer are a part of its first token, as after Mistral's [/INST].
        start, self._gap = start.rstrip(" "), start[len(start.rstrip(" ")) :]
        self._before, self._start = (control.sub(lambda token: names[token[0]], text) for text in (before, start))
        for turn in (PROBE, " \n\t x\n\n ") if self._templated else ():
            ids, rendered = self.prompt(turn), self._render(turn).removesuffix(after) + start
            wanted = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
            if ids != wanted:
                i = next(i for i in range(len(ids) + len(wanted)) if ids[: i + 1] != wanted[: i + 1])
                ours, theirs = (tokenizer.decode(row[i : i + 1]) for row in (ids, wanted))
                what = f"token {i} of a prompt is {theirs!r} by the chat template, and {ours!r} with text kept as text"
                raise InputError(f"{tokenizer.name_or_path}: {what}; take another model")

    def _render(self, user: str, answer: str | None = None) -> str:
        """Return what the template writes for a user turn up to the assistant start, or with an answer."""
        turns = [{"role": "user", "content": user}] + ([{"role": "assistant", "content": answer}] if answer else [])
        system = {"role": "system", "content": SYSTEM_PROMPT}
        first = {"role": "user", "content": f"{SYSTEM_PROMPT}\n\n{user}"}  # Gemma has no system turn
        how = {"tokenize": False, "chat_template": FIXED_DATE + self.tokenizer.get_chat_template()}
        how |= {"add_generation_prompt": not answer} | THINKING_OFF
        for messages in ([system, *turns], [first, *turns[1:]]):
            try:
                text = self.tokenizer.apply_chat_template(messages, **how)
            except Exception as error:  # a template is a program
                fails = f"its chat template fails ({' '.join(str(error).split())[:120]})"
                continue
            if SYSTEM_PROMPT in text and text.count(self._SLOT) == user.count(self._SLOT):  # Phi-3's first left it out
                return text
            fails = "its chat template has not the user's text once"
        raise InputError(f"{self.tokenizer.name_or_path}: {fails}; take another model")

    def _ids(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def _following(self, text: str) -> list[int] | None:
        """Return the token ids of a text after the assistant start, None where the two merge."""
        start, joint = self._ids("-" + self._start), self._ids(f"-{self._start}{self._gap}{text}")
        return (joint[len(start) :] if joint[: len(start)] == start else None) if text else []

    def prompt(self, user_turn: str) -> list[int]:
        """Return the token ids of system turn, user turn and assistant start."""
        text = f"{self._before}{self._trim(user_turn)}{self._start}"
        if self._templated:
            return self._ids(text)
        ids = self._plain.encode(text).ids
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids  # some end every text

    def text(self, text: str) -> list[int]:
        """Return the token ids of a text as it follows a prompt; control tokens in it stay text."""
        return self._ids(text) if (ids := self._following(text)) is None else ids

    def completion(self, text: str) -> list[int]:
        """Return the token ids of an answer with the end-of-turn token that training teaches and scoring omits.
        Raises InputError where no token ends a turn."""
        if self.end_of_turn is None:
            raise InputError(f"{self.tokenizer.name_or_path}: no token ends an answer; set eos_token")
        return [*self.text(text), self.tokenizer.convert_tokens_to_ids(self.end_of_turn)]

    def label(self, text: str) -> list[int]:
        """Return the token ids of a label. Raises InputError where they would merge with the assistant start, or stand
        for words that the tokenizer does not know."""
        if (ids := self._following(text)) and self.tokenizer.unk_token_id not in ids:
            return ids
        raise InputError(f"label {text!r} has no stable tokens after the assistant start; choose another word")


# ---------------------------------------------------------------------------------------------------- label scoring


def token_log_probs(hidden: torch.Tensor, head: Any, targets: Sequence, at: Sequence[int] | None = None) -> np.ndarray:
    """Return log-probabilities [rows, positions, k] (float64, natural log) of `targets` [rows, positions, k].

    hidden: final hidden states [rows, positions, hidden]; head: the model's output embedding, which runs in float32
    and in slices of the vocabulary. at: the number of the position of each target (none: they are of all in order)."""
    import torch

    weight, bias = head.weight, getattr(head, "bias", None)
    hidden = hidden.to(weight.device).float()
    total = torch.full(hidden.shape[:2], -torch.inf, device=hidden.device)
    for start in range(0, weight.shape[0], SCORING_TILE):
        part = hidden @ weight[start : start + SCORING_TILE].float().T
        if bias is not None:
            part = part + bias[start : start + SCORING_TILE].float()
        total = torch.logaddexp(total, part.logsumexp(dim=-1))
    hidden, total = (hidden, total) if at is None else (hidden[:, at], total[:, at])
    wanted = torch.tensor(targets, device=hidden.device)
    logits = torch.einsum("bph,bpkh->bpk", hidden, weight[wanted].float())
    if bias is not None:
        logits = logits + bias[wanted].float()
    return (logits - total[..., None]).double().cpu().numpy()


def distinct_beginnings(forms: list[list[int]], end: int) -> list[list[int]]:
    """Return each form's tokens up to the first that tells it from all others; for a form that begins another, `end`.
    Their probabilities are those of the forms in decoding that is constrained to them, but for a common factor."""
    closed = [(*ids, end) for ids in forms]
    uses = Counter(ids[:size] for ids in closed for size in range(1, len(ids) + 1))
    return [list(next((ids[:n] for n in range(1, len(ids)) if uses[ids[:n]] == 1), ids)) for ids in closed]


def right_padded(rows: Sequence[list[int]], positions: int, filler: int, device: Any) -> tuple[torch.Tensor, tuple]:
    """Return token ids [rows, tokens] of a forward that scores, and the index of each row's last `positions` in it.
    Under causal attention no token sees what comes after it, so padding on the right needs no mask, and it uses up
    no attention window and no position, as it would between a cached beginning and the row."""
    import torch

    width, ends = max(map(len, rows)), torch.tensor([[len(row)] for row in rows])
    ids = torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=device)
    return ids, (torch.arange(len(rows))[:, None], ends + torch.arange(-positions, 0))


def join_forms(scores: np.ndarray, sizes: Sequence[int], aggregate: str = "max") -> np.ndarray:
    """Join scores of surface forms [N, forms] to scores of labels [N, labels] of `sizes` forms each, in order.
    aggregate: 'max', 'mean' or 'logsumexp', which adds the forms' probabilities."""
    import numpy as np

    join = {"max": np.max, "mean": np.mean, "logsumexp": np.logaddexp.reduce}[aggregate]
    return np.stack([join(part, axis=1) for part in np.split(scores, np.cumsum(sizes)[:-1], axis=1)], axis=1)


class LabelScorer:
    """Log-probability of each label at the assistant start (whitepaper, section 4.3).
    forms: {label: surface forms}; several forms of a label are joined by `aggregate`. label_tokens: 'all' for the mean
    over a form's tokens, 'distinct' for the sum over `distinct_beginnings`. This is the plain driver: sort by length,
    pad, one forward, log-probabilities by the model's own logits, whatever it does to them.
    distil.scoring.FastLabelScorer gives the same scores faster, and unrounded in bf16."""

    def __init__(
        self,
        model: Any,
        encoder: PromptEncoder,
        forms: dict[str, list[str]],
        aggregate: str = "max",
        batch_size: int | str = 32,
        label_tokens: str = "all",
    ):
        self.model, self.encoder, self.forms, self.aggregate = model, encoder, forms, aggregate
        self.batch_size, self.labels = batch_size, list(forms)
        self.form_ids = [encoder.label(word) for words in forms.values() for word in words]
        self.join = {"all": "mean", "distinct": "sum"}[label_tokens]
        if self.join == "sum":
            self.form_ids = distinct_beginnings(self.form_ids, encoder.completion("")[-1])
        if model is None:  # an engine runs it (distil/engine.py)
            return
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.body, self.head = getattr(causal, causal.base_model_prefix), causal.get_output_embeddings()
        self.device = next(self.body.parameters()).device
        self.context = causal.config.get_text_config().max_position_embeddings

    def fits(self, prompt: Sequence[int]) -> bool:
        """Return whether a prompt of these token ids and the longest label fit the model's context."""
        return len(prompt) + max(map(len, self.form_ids)) <= self.context

    def raw_scores(self, user_turns: Sequence[str], progress: str | None = None, **more: Any) -> np.ndarray:
        """Return `score` of user turns."""
        return self.score([self.encoder.prompt(turn) for turn in user_turns], progress, **more)

    def score(self, rows: Sequence[list[int]], progress: str | None = None) -> np.ndarray:
        """Return the log-probability [N, labels] (float64, natural log; mean or sum) of each label after each prompt.
        rows: [N] token ids of prompts. progress: title of a progress bar on stderr. Raises InputError for a prompt
        longer than the model's context, FloatingPointError where the model returns NaN."""
        import numpy as np
        import torch
        from tqdm import tqdm

        self.check_length(rows)
        scores = np.empty((len(rows), len(self.form_ids)))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        starts = range(0, len(rows), int(self.batch_size))
        with torch.inference_mode():
            for start in tqdm(starts, desc=progress, disable=progress is None, file=sys.stderr):
                chosen = order[start : start + int(self.batch_size)]
                scores[chosen] = self.form_scores([rows[i] for i in chosen])
        return self.joined(scores)

    def form_scores(self, rows: list[list[int]], **how: Any) -> np.ndarray:
        """Return scores [rows, forms]; all forms of one token share a forward, each longer form takes another."""
        import numpy as np

        scores, forms = np.empty((len(rows), len(self.form_ids))), self.form_ids
        groups = [[i for i, ids in enumerate(forms) if not ids[1:]], *([i] for i, ids in enumerate(forms) if ids[1:])]
        for group in filter(None, groups):
            tokens = list(zip(*(forms[i] for i in group), strict=True))  # [positions][forms]
            run = [row + forms[group[0]][:-1] for row in rows]
            scores[:, group] = getattr(self.log_probs(run, [tokens] * len(rows), **how), self.join)(axis=1)
        return scores

    def log_probs(self, rows: list[list[int]], targets: list) -> np.ndarray:
        """Return log-probabilities [rows, positions, k] of `targets`, of this shape, at each row's last positions."""
        import torch

        logits = self.logits(rows, len(targets[0]))
        wanted = torch.tensor(targets, device=logits.device).expand(*logits.shape[:2], -1)
        return torch.log_softmax(logits, dim=-1).gather(2, wanted).double().cpu().numpy()

    def logits(self, rows: list[list[int]], positions: int, cache: Any = None) -> torch.Tensor:
        """Return the model's own logits [rows, positions, vocabulary], float32, at each row's last positions, the only
        ones to go through the output head. cache: an empty one to fill with keys and values."""
        ids, last = right_padded(rows, positions, self.encoder.tokenizer.pad_token_id, self.device)
        hook = self.head.register_forward_pre_hook(lambda module, inputs: (inputs[0][last],))
        try:
            return self.model(input_ids=ids, cache=cache, use_cache=cache is not None).logits.float()
        finally:
            hook.remove()

    def check_length(self, rows: Sequence[list[int]]) -> None:
        """Raise InputError where a prompt and a label exceed the context."""
        if not all(map(self.fits, rows)):
            size = f"a text has {max(map(len, rows))} tokens"
            raise InputError(f"{size}; the model's context is {self.context}: shorten it")

    def joined(self, scores: np.ndarray) -> np.ndarray:
        """Return scores of labels [N, labels] from those of forms [N, forms]. NaN raises FloatingPointError."""
        if (scores != scores).any():
            raise FloatingPointError("the model's scores are NaN; try --compute_dtype float32")
        return join_forms(scores, [len(words) for words in self.forms.values()], self.aggregate)


@dataclass(frozen=True)
class Calibration:
    """calibrated = raw - prior + bias; probabilities = softmax(calibrated / temperature). Arrays are [labels]."""

    method: str
    prior: np.ndarray
    bias: np.ndarray
    temperature: float = 1.0

    def scores(self, raw: np.ndarray) -> np.ndarray:
        """Return calibrated scores [N, labels] of raw scores [N, labels]."""
        return raw - self.prior + self.bias

    def probabilities(self, raw: np.ndarray) -> np.ndarray:
        """Return probabilities [N, labels] of raw scores [N, labels]."""
        from scipy.special import softmax

        return softmax(self.scores(raw) / self.temperature, axis=1)
