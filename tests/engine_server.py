"""A server that answers as llama.cpp, vLLM and others do, from a real model, so that its scores can be compared."""

from __future__ import annotations

import json
from typing import Any

from common import SYSTEM_PROMPT, PromptEncoder
from distil.testing import LoopbackServer

NAME = "credit-q8"
REFUSALS = {"400": "not now", "422": "not now", "401": "no key", "404": "no such model"}


class ModelServer(LoopbackServer):
    """kind: 'llama' (ids in replies, any number of log-probabilities, no echo), 'vllm' (at most 20, echo), 'text' (no
    ids, echo), 'chat' (chats alone). faults: played before the answers. change(reply): edits each reply in place.
    tokenizer: of the server, by default the model's; context: in tokens, prompts beyond are cut silently."""

    def __init__(
        self, model: Any, tokenizer: Any, kind: str = "llama", faults: tuple[str, ...] = (), change: Any = None
    ):
        self.model, self.tokenizer, self.kind, self.faults, self.change = model, tokenizer, kind, list(faults), change
        self.encoder = PromptEncoder(tokenizer)
        self.most = 20 if kind == "vllm" else 10**6
        self.capped, self.context = 10**6, 10**6
        self.refuses: Any = lambda body: ""  # why a request is refused
        self.grammar: Any = None  # of the one schema of the requests
        self.tempered = False  # log-probabilities are sent as temperature changes them
        self.decoder: Any = None  # writes JSON where a request has a schema
        self.cut: int | None = None  # letters of it that are sent
        self.requests: list[dict] = []
        super().__init__()

    def get(self, request: Any) -> None:
        request.reply(200, {"data": [{"id": NAME}]})

    def post(self, request: Any, body: bytes) -> None:
        with self.lock:  # one model
            status, content = self.answer(request.path, json.loads(body))
        half, headers = status == 1, {"retry-after": "0"}
        request.reply(200 if half else status, content[: len(content) // 2] if half else content, headers)

    def answer(self, path: str, body: dict) -> tuple[int, bytes]:
        """Return status (1: half a reply) and content."""
        if path == "/tokenize":
            text = body["content" if self.kind == "llama" else "prompt"]
            known = self.kind in ("llama", "vllm")
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return (200, json.dumps({"tokens": tokens}).encode()) if known else (404, b"{}")
        self.requests.append(body)
        fault = self.faults.pop(0) if self.faults else ""
        if fault.isdigit():
            return int(fault), json.dumps({"error": {"message": REFUSALS.get(fault, "busy")}}).encode()
        chat = path == "/v1/chat/completions"
        if chat != (self.kind == "chat"):
            return 404, b'{"error": {"message": "no such path"}}'
        if refusal := self.refuses(body):
            return 400, json.dumps({"error": {"message": refusal}}).encode()
        body = {"max_tokens": body.get("max_completion_tokens")} | body
        refusal, reply = self.reply_to(body, chat)
        if refusal:
            return 400, json.dumps({"error": {"message": refusal}}).encode()
        if self.change:
            self.change(reply)
        return 1 if fault == "half json" else 200, json.dumps(reply).encode()

    def reply_to(self, body: dict, chat: bool) -> tuple[str, dict]:
        """Return (why a request is refused, the reply)."""
        import torch

        if chat:
            assert body["messages"][0] == {"role": "system", "content": SYSTEM_PROMPT}
            how = {"tokenize": True, "add_generation_prompt": True}
            ids = self.tokenizer.apply_chat_template(body["messages"], **how)["input_ids"]
            size = body.get("top_logprobs", 0)
        else:
            ids, size = body["prompt"], body.get("logprobs", 0)
            if isinstance(ids, str) != (self.kind == "text"):
                return "prompt: a string is expected" if self.kind == "text" else "prompt: ids are expected", {}
            if isinstance(ids, str):
                ids = self.tokenizer(ids, add_special_tokens=False)["input_ids"]
        if size > self.most:
            return f"Requested sample logprobs of {size}, which is greater than max allowed: {self.most}", {}
        if body.get("echo") and self.kind == "llama":
            return "Only no echo is supported", {}
        ids, size = ids[-self.context :], min(size, self.capped)
        text, written, ended = self.write(ids, body)
        with torch.inference_mode():
            rows = self.model(input_ids=torch.tensor([ids + written])).logits[0].float().log_softmax(-1)
        first = rows[len(ids) - 1]
        if self.tempered:
            first = (first / max(body.get("temperature", 1), 0.01)).log_softmax(-1)
        top = first.topk(min(size, len(self.tokenizer))) if size else None
        best = list(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if size else []
        logprobs: dict | None = None
        if size and self.kind in ("llama", "chat"):
            tops = [{"token": self.tokenizer.decode([i]), "logprob": value} for i, value in best]
            tops = [one | ({"id": i} if self.kind == "llama" else {}) for one, (i, _) in zip(tops, best, strict=True)]
            logprobs = {"content": [tops[0] | {"top_logprobs": tops}]}
        elif size:
            as_ids = self.kind == "vllm" and body.get("return_tokens_as_token_ids")
            name = (lambda i: f"token_id:{i}") if as_ids else lambda i: self.tokenizer.decode([i])
            logprobs = {"top_logprobs": [{name(i): value for i, value in best}], "tokens": [name(written[0])]}
            if body.get("echo"):
                values = [None, *(rows[i, token].item() for i, token in enumerate(ids[1:]))]
                logprobs = {"tokens": [name(i) for i in ids], "token_logprobs": values, "top_logprobs": [None]}
        choice = {"index": 0, "finish_reason": "stop" if ended else "length", "logprobs": logprobs}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return "", {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": len(written)}}

    def write(self, ids: list[int], body: dict) -> tuple[str, list[int], bool]:
        """Return text, its tokens, and whether it ended within the budget."""
        from distil.generation import generate
        from distil.idp.schema import compile_schema

        if self.decoder and "response_format" in body:
            schema = body["response_format"]["json_schema"]["schema"]
            self.grammar = self.grammar or compile_schema(schema, self.decoder.grammar_tokenizer)
            how = body["max_tokens"], body["temperature"], body.get("seed", 0)
            (draft,) = self.decoder.generate([ids], [self.grammar], *how)
            text = draft.text[: self.cut].replace(",", ", ") if self.cut else draft.text
            return text, self.encoder.text(text), not self.cut
        end = self.tokenizer.eos_token_id
        ends = self.tokenizer.convert_tokens_to_ids(body.get("stop", [])) or [end]
        how = body["max_tokens"], ends, 1, 0.0 if body["max_tokens"] == 1 else body["temperature"]
        (written,) = generate(self.model, self.tokenizer, [ids], *how)
        return written.text, self.encoder.text(written.text) or [end], written.ended
