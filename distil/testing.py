"""What tests and benches share: a tokenizer and tiny random models built here, raw rows, adapters, a fake engine.

No network and no downloaded model is needed.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


LINES = [  # that tokenizers are trained on
    "system\n\nFollow the instruction and answer with nothing else.\n\nuser\n\nAge: 23, a_b: Good Standard Bad",
    "Good\nStandard\n\nBad\nassistant model instruction answer nothing Occupation Annual Income Debt",
] * 20


def build_tokenizer():
    """Return a byte-level BPE with ChatML: Good, Standard and Bad are one token each, Typical several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from common import SYSTEM_PROMPT
    from distil.tasks import default_task

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = ["Good", "Standard", "Bad", "system\n", "user\n", "assistant\n", *default_task().by_name, SYSTEM_PROMPT]
    raw.train_from_iterator([" ".join(words), "\n".join(["Good", "Standard", "Bad"])] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def byte_tokenizer(added: Sequence[Any], **names: Any):
    """Return a byte-level BPE that cuts text as Llama 3's and Qwen's do: line ends merge with those that follow.
    added: names of special tokens, or AddedTokens. names: eos_token and others, chat_template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    cut = pre_tokenizers.Split(Regex(words), behavior="isolated")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False))
    raw.add_special_tokens([token for token in added if isinstance(token, str)])
    raw.add_tokens([token for token in added if not isinstance(token, str)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def sentencepiece_tokenizer(blank: str, added: Sequence[Any] = (), **names: Any):
    """Return a BPE with byte fallback, as converted from SentencePiece. blank: how a text gets a blank in front:
    'prepend' (Llama 2, Phi-3, Zephyr), 'first' or 'always' (Metaspace), or not at all, 'never' (Gemma).
    added, names: as for `byte_tokenizer`; <unk>, <s> and </s> are there."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted({*learned["vocab"], "\u2581"} - {"\n"})
    merges = [pair for pair in map(tuple, learned["merges"]) if "\n" not in "".join(pair)]
    tokens, how = [token for token in tokens if token == token.strip("\n")], {"unk_token": "<unk>", "fuse_unk": True}
    vocabulary = {token: number for number, token in enumerate(tokens)}
    raw = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, **how))
    if blank in ("first", "always"):
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=blank, split=False)
    else:
        before = [normalizers.Prepend("\u2581")] if blank == "prepend" else []
        raw.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence(parts + ([] if blank == "never" else [decoders.Strip(" ", 1, 0)]))
    raw.add_special_tokens(["<unk>", "<s>", "</s>", *(token for token in added if isinstance(token, str))])
    raw.add_tokens([token for token in added if not isinstance(token, str)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", **names)


def save_random_model(folder: Path, tokenizer, architecture: str) -> str:
    """Save a two-layer model ('qwen2' or 'llama') and return its folder; widths as the 4-bit CPU kernel needs them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=architecture == "qwen2",
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def credit_rows(customers: int = 240, months: int = 2, seed: int = 0) -> list[dict]:
    """Return raw CreditMix rows with the published data's damage; debt decides the label, so models can learn it."""
    rng = random.Random(seed)
    rows = []
    for number in range(customers):
        label = ("Good", "Standard", "Bad")[number % 3]
        debt = {"Good": 500, "Standard": 1200, "Bad": 2600}[label] * rng.uniform(0.6, 1.4)
        for _ in range(months):
            fields = {
                "Age": rng.choice([f"{rng.randint(18, 60)}.0", "-500", "31_"]),
                "Occupation": rng.choice(["Lawyer", "Teacher", "_______"]),
                "Annual Income": f"{rng.uniform(1e4, 1e5):.2f}",
                "Outstanding Debt": f"{debt:.2f}",
                "Credit Utilization Ratio": f"{rng.uniform(20, 45):.4f}",
                "Payment Behaviour": rng.choice(["Low_spent_Small_value_payments", "!@9#%8"]),
            }
            question = ", ".join(f"{field}: {value}" for field, value in fields.items())
            answer = label if rng.random() > 0.1 else "_"
            rows.append({"question": question, "answer": answer, "customer_id": f"C{number}"})
    return rows


def run_cli(script: str, *flags: str, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a script of the project as a user would; text output captured."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def load_named(name: str, quantization: str = "nf4", dtype: str = "auto", trainable: bool = False) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a model name, as scripts load it."""
    from distil.models import LoadOptions, load, resolve

    return load(resolve(name), LoadOptions(quantization, dtype), trainable)


def save_adapter(folder: Path, model_dir: str, seed: int = 0, split_seed: int = 0) -> str:
    """Write a finished CreditMix adapter folder with random LoRA weights (both matrices) and return its path."""
    import torch
    from peft import get_peft_model

    from common import lora_config
    from distil.files import write_json

    model, tokenizer = load_named(model_dir, "none", "float32")
    model = get_peft_model(model, lora_config(r=4, alpha=8, dropout=0.0))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(Path(folder) / "run.json", {"method": "sft", "base_model": model_dir, "split_seed": split_seed})
    return str(folder)


class TinyEngine:
    """Has the methods of serving.engine.Engine and answers the whitepaper's example; 'raise X' in a text raises X."""

    ready, failure, description = True, None, {"base": {"model_name": "base"}}

    def __init__(self, missing: tuple[str, ...] = ()):
        self._missing = missing

    def missing(self) -> dict[str, str]:
        return {variant: f"python {variant}_train.py" for variant in self._missing}

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def score(self, variant: str, features: list[str]) -> list[dict]:
        from distil.serving.engine import Refusal

        if variant in self._missing:
            raise Refusal(503, "adapter_missing", f"no adapter is loaded for {variant}", self.missing()[variant])
        if "raise Refusal" in features:
            raise Refusal(503, "busy", "too many rows are waiting", "try again", retry_after=7)
        if "raise ValueError" in features:
            raise ValueError("/root/secret/path")
        response = {
            "model_name": variant,
            "prediction": "Standard",
            "scores": {"Good": -1.34, "Standard": 1.22, "Bad": -0.9},
            "raw_scores": {"Good": -3.78, "Standard": -0.28, "Bad": -1.52},
            "prior": {"Good": -2.44, "Standard": -1.49, "Bad": -0.62},
            "probabilities": {"Good": 0.09, "Standard": 0.84, "Bad": 0.07},
            "top2_margin": 2.12,
        }
        return [response for _ in features]


class LoopbackServer:
    """An HTTP server of this machine. A subclass has `post(request, body)` and, where needed, `get(request)`, which
    call request.reply."""

    def __init__(self) -> None:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                owner.get(self)

            def do_POST(self):
                owner.post(self, self.rfile.read(int(self.headers["content-length"])))

            def reply(self, status, content, headers=None, length=None):
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in ({"content-type": "application/json"} | (headers or {})).items():
                    self.send_header(name, value)
                self.send_header("content-length", str(length or len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.root = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.url = f"{self.root}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def get(self, request: Any) -> None:
        request.reply(404, {"error": {"message": "no such path"}})

    def post(self, request: Any, body: bytes) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Endpoint(LoopbackServer):
    """An OpenAI-compatible server that answers by rule; `faults` are played before the answers.

    It records the requests, how often each prompt was answered, and the keys and paths that were sent.
    rule(body): status, content and headers of a reply that is sent instead, None for the usual one."""

    def __init__(self, faults: tuple[str, ...] = (), logprobs: bool = False, seconds: float = 0.0):
        self.faults, self.logprobs, self.seconds = list(faults), logprobs, seconds
        self.answered: Counter[str] = Counter()
        self.requests: list[dict] = []
        self.keys: set[str] = set()
        self.paths: set[str] = set()
        self.refusal = b'{"error": {"message": "not now"}}'
        self.rule: Any = lambda body: None
        super().__init__()

    def post(self, request: Any, body: bytes) -> None:
        wanted = json.loads(body)
        with self.lock:
            self.requests.append(wanted)
            self.keys.add(request.headers["authorization"])
            self.paths.add(request.path)
            fault = self.faults.pop(0) if self.faults else None
        time.sleep(self.seconds)
        if fault == "drop":
            request.close_connection = True
            return
        if fault and fault.isdigit():
            request.reply(int(fault), self.refusal, {"retry-after": "1"})
            return
        if reply := self.rule(wanted):
            request.reply(*reply)
            return
        prompt = wanted["messages"][-1]["content"]
        content = json.dumps(self.reply_to(prompt)).encode()
        if fault == "half json":
            request.reply(200, content[: len(content) // 2])
            return
        if fault == "half body":
            request.reply(200, content[: len(content) // 2], length=len(content))
            request.close_connection = True
            return
        if fault == "empty":
            content = json.dumps(self.reply_to(prompt) | {"choices": []}).encode()
        else:
            self.answered[prompt] += 1
        request.reply(200, content)

    def reply_to(self, prompt: str) -> dict:
        """Return a chat completion: right for two rows of three, with a reason where one is wanted."""
        from distil.tasks import default_task
        from distil.teachers.answers import RATIONALE

        text = default_task().labels[len(prompt) % 3] + (" because of the debt." if RATIONALE in prompt else "")
        shares = {"Good": 0.5, " Good": 0.1, "Stand": 0.2, "Bad": 0.1, "x": 0.05}
        return completion(text, shares if self.logprobs else {})


def completion(text: str, *shares: dict[str, float]) -> dict:
    """Return a chat completion. shares: of each token, or of the first alone, itself and its alternatives as {token:
    probability}; none or empty for no log-probabilities."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    tops = [[{"token": token, "logprob": math.log(p), "bytes": None} for token, p in one.items()] for one in shares]
    if any(tops):
        choice["logprobs"] = {"content": [top[0] | {"top_logprobs": top} for top in tops]}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def with_token_probs(rows: list[dict], folder: Path, tokenizer: Any, k: int = 4, seed: int = 0) -> list[dict]:
    """Return rows with references to a random teacher's probabilities, which are written to the folder."""
    import torch

    from common import PromptEncoder
    from distil.token_probs import TokenRow, write_token_probs

    encoder, generator, cached = PromptEncoder(tokenizer), torch.Generator().manual_seed(seed), []
    for row in rows:
        answer = torch.tensor(encoder.completion(row["teacher_output"]), dtype=torch.int32)
        scores = 3 * torch.randn(len(answer), len(tokenizer), generator=generator)
        log_probs, ids = scores.log_softmax(dim=-1).topk(k)
        rest = torch.log((1 - log_probs.exp().sum(dim=-1)).clamp(min=0))
        cached.append(TokenRow(*(t.numpy() for t in (answer, ids.int(), log_probs.half(), rest.half()))))
    name = write_token_probs(folder / "kd.jsonl", iter(cached), [len(row.answer_ids) for row in cached], k)
    return [row | {"token_probs": {"file": name, "row": number}} for number, row in enumerate(rows)]
