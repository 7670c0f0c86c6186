"""A model that an engine serves (llama.cpp, vLLM), in place of one that is loaded here: label scores and texts.

Prompts are the token ids that a loaded model would get, by the tokenizer of the model's folder. Where a server takes
no ids they go as text if that has the same tokens, and as a chat where there is nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from common import SYSTEM_PROMPT, THINKING_OFF, InputError, LabelScorer, PromptEncoder
from distil.endpoint import Client, NoAnswer, Refused, Server
from distil.generation import Written
from distil.processes import print_note
from distil.quirks import Reply, first_tokens, is_log_prob, read_reply
from distil.support import context_length

if TYPE_CHECKING:
    import numpy as np

# Most probable tokens to request: the next size where a label is not among them. vLLM's limit is 20, others' is 5.
SIZES = (5, 20, 400, 8000, 1_000_000)
FORMS = {"ids": "token ids", "text": "text", "chat": "a chat, by the server's own template"}


class ServedModel:
    """A client of a served model. path: folder or hub id of its tokenizer and configuration.
    Raises InputError where the server takes no prompts, or has another model or tokenizer; NoAnswer."""

    def __init__(self, server: Server, path: str):
        from transformers import AutoConfig, AutoTokenizer

        self.client, self.model = Client(server), server.model
        self.url = self.client.url
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.encoder = PromptEncoder(self.tokenizer)
        self.context = context_length(AutoConfig.from_pretrained(path).get_text_config())
        self._level, self._most = 1, len(SIZES) - 1  # of SIZES: where to begin, and what is not refused
        self._texts: dict[str, int] = {}  # tokens whose text is no other's
        first = self.encoder.text("x")  # SentencePiece begins an answer with a blank, which its decoder cuts off
        piece = self.tokenizer.convert_ids_to_tokens(first)[0]
        cut = piece.startswith("\u2581") and self.tokenizer.decode(first) == "x"
        self._blank = " " if cut else ""
        problems = []
        for self.form in FORMS:
            try:
                self.complete(self.encoder.prompt("-"), max_tokens=1)
                break
            except NoAnswer as error:
                fix = "start the server, or check the address, which usually ends in /v1"
                raise InputError(f"{error}; {fix}") from None
            except (Refused, InputError) as error:
                problems.append(str(error).removeprefix(f"{self.url} "))
        else:
            raise InputError(f"{self.url} {'; '.join(dict.fromkeys(problems))}")
        if problems:
            print_note(f"{self.url} {'; '.join(problems)}: prompts go as {FORMS[self.form]}")
        self._check_model()

    def _check_model(self) -> None:
        """Raise InputError where the server has another model or tokenizer by its own word; lower `context` to its."""
        models = {one.get("id"): one for one in self._fact("/models").get("data") or [] if isinstance(one, dict)}
        model = models.get(self.model) or models.get(f"{self.model}:latest") or {}
        if models and not model:
            names = ", ".join(map(str, models))[:200]
            raise InputError(f"{self.url} serves {names}, not {self.model}: --served_model")
        sizes = model.get("max_model_len"), (model.get("meta") or {}).get("n_ctx")  # vLLM, llama.cpp
        self.context = min([self.context, *filter(None, sizes)])
        text = self.tokenizer.decode(self.encoder.prompt("-"))
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}  # vLLM
        body |= {"content": text, "add_special": False, "parse_special": True}  # llama.cpp
        address = str(self.client.client.base_url).rstrip("/").removesuffix("/v1")
        tokens = self._fact(f"{address}/tokenize", body).get("tokens")
        if isinstance(tokens, list) and tokens != self._tokens(text):
            other = f"has another tokenizer than {self.tokenizer.name_or_path}"
            raise InputError(f"{self.url}: {self.model} {other}; give the folder that it serves as --model_dir")

    def _fact(self, path: str, body: dict | None = None) -> dict:
        """Return what a server says of itself, {} where it does not."""
        try:
            return self.client.tried(lambda: self.client.sent(path, body))
        except (Refused, InputError, NoAnswer):
            return {}

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def complete(self, ids: list[int], **how: Any) -> Reply:
        """Return what follows these token ids. how: fields of the request. Raises Refused, InputError where the
        server reads another prompt, NoAnswer."""
        path, body = "/completions", {"model": self.model, "prompt": ids} | how
        if self.form != "ids":
            body["prompt"] = self.tokenizer.decode(ids)
            if self._tokens(body["prompt"]) != ids:  # also where the server would read control tokens in it
                raise InputError(f"{self.url} takes no token ids, and a prompt has other tokens as text")
        if self.form == "chat":
            path, body = "/chat/completions", self._chat(body, ids)

        def answer() -> Reply:
            reply = read_reply(self.client.sent(path, body))
            if (count := reply.read or len(ids)) != len(ids):
                read = f"{self.url} reads {count} tokens of a prompt of {len(ids)}"
                if self.form != "chat":
                    raise InputError(f"{read}: its context is too small, or it is not the model of --model_dir")
                self.client.report(f"note: {read}: its chat template is not that of --model_dir")
            return reply

        return self.client.tried(answer)

    def _chat(self, body: dict, ids: list[int]) -> dict:
        """Return the chat of a request. Raises InputError for a prompt that is not one user turn."""
        before, _, after = self.tokenizer.decode(self.encoder.prompt("\ue000")).partition("\ue000")
        turn = body.pop("prompt").removeprefix(before).removesuffix(after)
        if self.encoder.prompt(turn) != ids or body.pop("echo", None):
            raise InputError(f"{self.url} has chats alone, in which an answer cannot be begun")
        if size := body.pop("logprobs", None):
            body |= {"logprobs": True, "top_logprobs": size}
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": turn}]
        if "thinking" in str(self.tokenizer.chat_template):  # vLLM, llama.cpp
            body |= {"chat_template_kwargs": THINKING_OFF}
        return body | {"messages": messages}

    def log_probs(self, ids: list[int], wanted: set[int]) -> dict[int, float]:
        """Return {token: log-probability} after these token ids, of all that the server tells; those of `wanted` that
        it does not tell however many are requested are missing. Raises InputError where it tells none."""
        level, known = self._level, {}
        while True:
            level = min(level, self._most)
            try:
                known |= (sent := self._top(ids, min(SIZES[level], len(self.tokenizer)), wanted))
            except Refused as refusal:
                if "logprob" not in refusal.words or not level:
                    raise InputError(f"{self.url} {refusal}") from None
                self._most = min(self._most, level - 1)
                if not known:
                    continue
            if wanted <= known.keys() or level >= self._most or len(sent) < SIZES[level] // 2:
                return known
            level += 1
            self._level = max(self._level, min(level, 2))  # a larger one is slow to send for every row

    def _top(self, ids: list[int], size: int, wanted: set[int]) -> dict[int, float]:
        """Return {token: log-probability} of the `size` most probable next tokens, of fewer if the server sends fewer;
        those that have no id but a text that is no wanted token's get numbers below 0."""
        how = {"max_tokens": 1, "logprobs": size, "n_probs": size, "return_tokens_as_token_ids": True}
        how |= {"temperature": 1, "top_p": 1}  # some servers tell log-probabilities as changed by these
        for _ in range(4):  # llama.cpp sends none with half a character, so another token is drawn then
            logprobs = self.complete(ids, **how).logprobs
            entries = first_tokens(logprobs)
            if content := logprobs.get("content"):  # llama.cpp, and chats: the token itself may not be among them
                entries.append(content[0])
            pairs = [(one.get("id", one["token"]), one["logprob"]) for one in entries if is_log_prob(one["logprob"])]
            if pairs:
                return {self._id(token, wanted, -number): value for number, (token, value) in enumerate(pairs, 1)}
        raise InputError(f"{self.url} sends no log-probabilities, which label scores are")

    def _id(self, token: int | str, wanted: set[int], other: int) -> int:
        """Return a token's id; of a text that of the wanted token which has it, `other` where none has."""
        if isinstance(token, int):
            return token
        if token.startswith("token_id:"):  # vLLM
            return int(token.removeprefix("token_id:"))
        if missing := wanted - set(self._texts.values()):
            texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
            if shared := [texts[i] for i in missing if texts.count(texts[i]) > 1]:
                fix = "another server is needed, such as llama.cpp's or vLLM"
                raise InputError(f"{self.url} sends no token ids, and several are {shared[0]!r}: {fix}")
            self._texts |= {texts[i]: i for i in missing}
        return self._texts.get(token, other)

    def echoed(self, ids: list[int], form: list[int]) -> list[float]:
        """Return the log-probabilities of the tokens `form` after `ids`, as those of a prompt that the server repeats.
        Raises InputError where it does not."""
        how = {"max_tokens": 1, "logprobs": 1, "echo": True, "return_tokens_as_token_ids": True}
        try:
            logprobs = self.complete([*ids, *form], **how).logprobs
            part = slice(len(ids), len(ids) + len(form))
            tokens = [self._id(token, set(form), -1) for token in logprobs["tokens"][part]]
            if tokens == form and all(map(is_log_prob, values := logprobs["token_logprobs"][part])):
                return values
        except (Refused, TypeError, LookupError):
            pass
        why = f"the label {self.tokenizer.decode(form)!r} is not among the most probable tokens that it sends"
        raise InputError(f"{self.url}: {why}, nor does it echo prompts with log-probabilities")

    def write(
        self,
        starts: Sequence[list[int]],
        budget: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Callable[[str], bool] = lambda text: False,
        progress: str | None = None,
        **how: Any,
    ) -> list[Written]:
        """Return what follows each start (token ids), in order, as `distil.generation.generate`. budget: tokens of
        each; how: more fields of the requests. Raises InputError, NoAnswer."""
        named = (self.encoder.end_of_turn, self.tokenizer.eos_token, self.tokenizer.pad_token)
        ends = list(dict.fromkeys(filter(None, named)))
        how |= {"stop_token_ids": self.tokenizer.convert_tokens_to_ids(ends)}  # vLLM: texts lack them
        how |= {"max_tokens": budget, "temperature": temperature, "stop": ends}

        def one(item: tuple[int, list[int]]) -> Written:
            sampled = {"seed": seed + item[0]} if temperature else {}  # another one for each sample of a prompt
            try:
                reply = self.complete(item[1], **how, **sampled)
            except Refused as refusal:
                raise InputError(f"{self.url} {refusal}") from None
            text = reply.text.removeprefix(self._blank)
            text = next((text[:size] for size in range(len(text)) if stop(text[:size])), text)
            return Written(text, reply.written or 0, not reply.cut)

        return self.client.all(list(enumerate(starts)), one, progress)


class ServedScorer(LabelScorer):
    """`common.LabelScorer` by the log-probabilities of an engine: the same scores of the same weights.
    The tree of the labels' tokens is walked, one request for each beginning that labels share."""

    def __init__(
        self, engine: ServedModel, forms: dict[str, list[str]], aggregate: str = "max", label_tokens: str = "all"
    ):
        super().__init__(None, engine.encoder, forms, aggregate, label_tokens=label_tokens)
        self.engine, self.context = engine, engine.context
        self.after: dict[tuple[int, ...], set[int]] = {}  # the tokens that follow each beginning
        for ids in self.form_ids:
            for size, token in enumerate(ids):
                self.after.setdefault(tuple(ids[:size]), set()).add(token)

    def score(self, rows: Sequence[list[int]], progress: str | None = None, adapters: Sequence = ()) -> np.ndarray:
        """Return raw scores [N, labels] as `LabelScorer.score`. Raises InputError where the server does not tell the
        log-probability of each label, NoAnswer where it ends."""
        import numpy as np

        self.check_length(rows)
        scores = self.engine.client.all(rows, self._row, progress)
        return self.joined(np.array(scores, dtype=float).reshape(len(rows), len(self.form_ids)))

    def _row(self, prompt: list[int]) -> list[float]:
        """Return the scores [forms] of one prompt."""
        known: dict[tuple[int, ...], float] = {}  # log-probability of a beginning's last token
        for beginning, tokens in self.after.items():
            sent = self.engine.log_probs([*prompt, *beginning], tokens)
            known |= {(*beginning, token): sent[token] for token in tokens & sent.keys()}
        scores = []
        for ids in self.form_ids:
            edges = [tuple(ids[: size + 1]) for size in range(len(ids))]
            if any(edge not in known for edge in edges):
                known |= zip(edges, self.engine.echoed(prompt, ids), strict=True)
            total = math.fsum(known[edge] for edge in edges)
            scores.append(total / len(edges) if self.join == "mean" else total)
        return scores
