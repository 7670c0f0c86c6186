"""Prompts, labels and answers have the tokens that published chat templates give them, whatever kind of tokenizer.

The templates are rebuilt from the published ones without their tools, with small tokenizers of the same kind."""

# ruff: noqa: RUF001 - DeepSeek writes its tokens with wide bars

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from common import SYSTEM_PROMPT, InputError, PromptEncoder
from distil.scoring import FastLabelScorer
from distil.support import check_tokens
from distil.testing import CHATML, byte_tokenizer, load_named, save_random_model, sentencepiece_tokenizer
from distil.training.data import TrainingData, completion_collator, completion_dataset

LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
OLD_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token}}{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
OLD_PHI_3 = (  # writes no system turn, and an assistant start after every user turn
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' + '\n' + "
    "message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}{% elif (message['role'] == 'assistant') %}"
    "{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}"
)
QWEN_3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n') %}
            {%- set reasoning_content = reasoning_content.split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
            {{- '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
ALWAYS_THINKS = re.sub(r"{%- if enable_thinking.*?endif %}", "{{- '<think>\\\\n' }}", QWEN_3, flags=re.DOTALL)
DEEPSEEK_R1 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}"
    "{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
GRANITE = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = "Knowledge Cutoff Date: April 2024.\\nToday's Date: " + strftime_now('%B %d, %Y') + "." %}
    {%- if thinking %}
        {%- set system_message = system_message + "\\nRespond to every user query in a comprehensive way." %}
    {%- endif %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}
{%- for message in loop_messages %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}"""
SMOLLM_3 = """{%- if enable_thinking is not defined -%}
{%- set enable_thinking = true -%}
{%- endif -%}
{%- if enable_thinking -%}
  {%- set reasoning_mode = "/think" -%}
{%- else -%}
  {%- set reasoning_mode = "/no_think" -%}
{%- endif -%}
{{- "<|im_start|>system\\n" -}}
{%- if messages[0].role == "system" -%}
  {%- set system_message = messages[0].content -%}
  {%- if "/no_think" in system_message -%}
    {%- set reasoning_mode = "/no_think" -%}
  {%- elif "/think" in system_message -%}
    {%- set reasoning_mode = "/think" -%}
  {%- endif -%}
  {%- set custom_instructions = system_message.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{{- "## Metadata\\n\\n" -}}
{{- "Knowledge Cutoff Date: June 2025\\n" -}}
{%- set today = strftime_now("%d %B %Y") -%}
{{- "Today Date: " ~ today ~ "\\n" -}}
{{- "Reasoning Mode: " + reasoning_mode + "\\n\\n" -}}
{{- "## Custom Instructions\\n\\n" -}}
{%- if custom_instructions -%}
  {{- custom_instructions + "\\n\\n" -}}
{%- endif -%}
{{- "<|im_end|>\\n" -}}
{%- for message in messages -%}
  {%- set content = message.content if message.content is string else "" -%}
  {%- if message.role == "user" -%}
    {{ "<|im_start|>" + message.role + "\\n"  + content + "<|im_end|>\\n" }}
  {%- elif message.role == "assistant" -%}
    {% generation %}
    {%- if reasoning_mode == "/think" -%}
      {{ "<|im_start|>assistant\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
    {%- else -%}
      {{ "<|im_start|>assistant\\n" + "<think>\\n\\n</think>\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
    {%- endif -%}
    {% endgeneration %}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {%- if reasoning_mode == "/think" -%}
    {{ "<|im_start|>assistant\\n" }}
  {%- else -%}
    {{ "<|im_start|>assistant\\n" + "<think>\\n\\n</think>\\n"  }}
  {%- endif -%}
{%- endif -%}"""
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}"
    "\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


def plain(*contents: str) -> list[AddedToken]:
    return [AddedToken(content, special=False, normalized=False) for content in contents]


@dataclass(frozen=True)
class Published:
    """A template with the kind of its tokenizer ('bytes' or what `sentencepiece_tokenizer` takes), the tokens that it
    adds, its end of turn, and what a template of the same words has where this one writes the date."""

    template: str
    kind: str
    added: list[Any]
    end: str
    system_turn: bool = True
    eos: str | None = None
    names: dict[str, str] = field(default_factory=dict)
    answer_start: str = ""  # what only the answer's own prompt has

    def tokenizer(self) -> Any:
        names = {"eos_token": self.eos or self.end, "chat_template": self.template, **self.names}
        if self.kind == "bytes":
            return byte_tokenizer(self.added, **names)
        return sentencepiece_tokenizer(self.kind, self.added, **names)


IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = plain("<tool_call>", "</tool_call>", "<think>", "</think>")
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
RUNS = plain("\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "<table>", "</table>")
STRIPS = [AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("assistant", "system", "end", "user")]
R1 = plain("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
TEMPLATES = {
    "ChatML": Published(CHATML, "bytes", IM, "<|im_end|>"),
    "ChatML, end of turn not special": Published(CHATML, "bytes", [*IM[:2], *plain(IM[2])], "<|im_end|>"),
    "Llama 3": Published(LLAMA_3, "bytes", HEADERS, "<|eot_id|>", names={"bos_token": HEADERS[0]}),
    "Gemma": Published(GEMMA, "never", ["<pad>", "<start_of_turn>", "<end_of_turn>", *RUNS], "<end_of_turn>", False),
    "Mistral": Published(MISTRAL, "first", ["[INST]", "[/INST]"], "</s>", False),
    "Mistral, always a blank": Published(MISTRAL, "always", ["[INST]", "[/INST]"], "</s>", False),
    "Mistral 0.1": Published(OLD_MISTRAL, "prepend", [], "</s>", False),
    "Phi-3": Published(PHI_3, "prepend", ["<|endoftext|>", *STRIPS], "<|end|>", eos="<|endoftext|>"),
    "Phi-3, first": Published(OLD_PHI_3, "prepend", ["<|endoftext|>", *STRIPS], "<|end|>", False, "<|endoftext|>"),
    "Qwen3": Published(QWEN_3, "bytes", [*IM, *THINK], "<|im_end|>"),
    "DeepSeek-R1-Distill": Published(
        DEEPSEEK_R1,
        "bytes",
        ["<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", *R1],
        "<｜end▁of▁sentence｜>",
        names={"bos_token": "<｜begin▁of▁sentence｜>"},
        answer_start="<think>\n",
    ),
    "Granite": Published(
        GRANITE, "bytes", ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"], "<|end_of_text|>"
    ),
    "SmolLM3": Published(SMOLLM_3, "bytes", [*HEADERS[:2], *IM[1:], *THINK], "<|im_end|>"),
    "Zephyr": Published(ZEPHYR, "prepend", [], "</s>"),
}
TEXTS = [
    "x",
    "Age: 23, Occupation: Scientist, a_b: 1.5",
    "one line\nanother\n\n\nand  blanks   inside",
    "Grüße, 信用 \U0001f600\ttab\r\nend",
    "  blanks around  ",
    "\n\nline ends around\n",
    "\ttabs\t",
    " ",
    "",
]


@pytest.fixture(scope="module", params=TEMPLATES)
def case(request) -> tuple[Published, Any, PromptEncoder]:
    published = TEMPLATES[request.param]
    tokenizer = published.tokenizer()
    return published, tokenizer, PromptEncoder(tokenizer)


def rendered(published: Published, tokenizer: Any, user: str, answer: str | None = None) -> str:
    """Return what the template writes, dates as on the day that prompts have."""
    turns = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": user}]
    if not published.system_turn:
        turns = [{"role": "user", "content": f"{SYSTEM_PROMPT}\n\n{user}"}]
    turns += [{"role": "assistant", "content": answer}] if answer else []
    day = re.sub(r"strftime_now\(.*?\)", "'26 July 2024'", published.template)
    return tokenizer.apply_chat_template(
        turns,
        tokenize=False,
        add_generation_prompt=not answer,
        enable_thinking=False,
        date_string="26 Jul 2024",
        chat_template=day,
    )


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_have_the_tokens_of_the_template(case, text):
    published, tokenizer, encoder = case
    if published.template == GEMMA and not text.strip():
        pytest.skip("it would trim the line ends after the instruction, which is the text's neighbour there")
    wanted = tokenizer(rendered(published, tokenizer, text), add_special_tokens=False)["input_ids"]
    assert encoder.prompt(text) == wanted
    assert set(wanted) & set(tokenizer.added_tokens_decoder)  # the comparison sees real control tokens


@pytest.mark.parametrize("answer", ["Good", "Standard", "very good", '{"a": 1}', "two\nlines"])
def test_answers_have_the_tokens_that_follow_the_prompt(case, answer):
    published, tokenizer, encoder = case
    text = rendered(published, tokenizer, "Age: 23", answer)
    if published.answer_start:
        text = text.replace(answer, published.answer_start + answer)
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = encoder.prompt("Age: 23") + encoder.completion(answer)
    assert wanted[: len(ids)] == ids
    assert encoder.completion(answer) == [*encoder.label(answer), tokenizer.convert_tokens_to_ids(published.end)]
    assert answer in tokenizer.decode(encoder.label(answer))


def test_control_tokens_in_the_users_text_are_text(case):
    published, tokenizer, encoder = case
    control = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip("▁\n")}
    turn = "a " + " b ".join(control.values()) + " c"
    ordinary, attacked = encoder.prompt("a b c"), encoder.prompt(turn)
    for number, token in control.items():
        assert attacked.count(number) == ordinary.count(number), token
        assert number not in encoder.label(f"Good {token}")
    assert published.end in control.values()
    assert turn in tokenizer.decode(attacked)


def test_a_sign_that_is_an_added_token_is_not_lost_in_a_text():
    """Without that token the vocabulary has no way to write it."""
    added = [*IM, *plain("$")]
    tokenizer = byte_tokenizer(added, eos_token=IM[2], chat_template=CHATML)
    text = "Income: $5 and 7 $"
    ids = PromptEncoder(tokenizer).prompt(text)
    assert ids == tokenizer(rendered(TEMPLATES["ChatML"], tokenizer, text), add_special_tokens=False)["input_ids"]
    assert text in tokenizer.decode(ids)


def test_labels_and_answers_without_tokens_are_refused():
    """A word that the tokenizer does not know would have the score of all such words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<unk>", "Good", "x"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = PromptEncoder(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))
    assert encoder.label("Good") == [1]
    with pytest.raises(InputError, match="label 'Bad' has no stable tokens"):
        encoder.label("Bad")
    with pytest.raises(InputError, match="no token ends an answer; set eos_token"):
        encoder.completion("Good")


def test_a_thought_that_the_template_opens_ends_where_it_can():
    """As with Qwen3's thinking models, which have no switch but close a thought before an answer."""
    published = TEMPLATES["Qwen3"]
    tokenizer = byte_tokenizer(published.added, eos_token="<|im_end|>", chat_template=ALWAYS_THINKS)
    prompt = tokenizer.decode(PromptEncoder(tokenizer).prompt("x"))
    assert prompt == tokenizer.decode(PromptEncoder(published.tokenizer()).prompt("x"))
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_template_without_an_assistant_start_gets_its_own():
    silent = CHATML.split("{% if add_generation_prompt")[0]
    one, other = (byte_tokenizer(IM, eos_token=IM[2], chat_template=template) for template in (silent, CHATML))
    assert PromptEncoder(one).prompt("x") == PromptEncoder(other).prompt("x")


def test_blanks_at_the_end_of_a_prompt_begin_the_answer():
    """ "Answer: Good" has the token " Good"; a prompt that ends with the blank would never be followed by it."""
    named = CHATML.replace("'assistant\n'", "'Answer: '").replace("<|im_start|>assistant\n", "<|im_start|>Answer: ")
    named = named.replace("message['role'] + '\n'", "(message['role'] + '\n')|replace('assistant\n', 'Answer: ')")
    tokenizer = byte_tokenizer(IM, eos_token=IM[2], chat_template=named)
    encoder = PromptEncoder(tokenizer)
    assert [tokenizer.decode(token) for token in encoder.label("Good")] == [" Good"]
    assert tokenizer.decode(encoder.prompt("x")).endswith("<|im_start|>Answer:")


@pytest.mark.parametrize(
    "content",
    [
        "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}",
        "{% for part in message['content'] %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}",
        "{{ message['content'][0]['text'] }}",
    ],
)
def test_a_template_of_content_parts_is_refused(content):
    template = CHATML.replace("message['content'] + '<|im_end|>\n' }}", f"'' }}}}{content}{{{{ '<|im_end|>\n' }}}}")
    tokenizer = byte_tokenizer(IM, eos_token=IM[2], chat_template=template)
    with pytest.raises(InputError, match="its chat template has not the user's text once; take another model"):
        PromptEncoder(tokenizer)


def test_control_tokens_that_the_vocabulary_finds_by_itself_are_text():
    """A Unigram model takes `</s>` for its piece of that name, a BPE where merges make it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted({*"".join(TEXTS[:2]), *SYSTEM_PROMPT, *"</s>|user assistant", "\u2581", "\n"})
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in letters), ("Good", -1.0)]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = ["<unk>", "<s>", "</s>", *letters, "</", "s>"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(parts)}, merges, unk_token="<unk>"))
    for raw in (unigram, bpe):
        raw.add_special_tokens(["<unk>", "<s>", "</s>"])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=raw, unk_token="<unk>", eos_token="</s>", chat_template=ZEPHYR
        )
        raw.encode_special_tokens = True
        assert 2 in raw.encode("a</s>b").ids  # the library alone
        encoder = PromptEncoder(tokenizer)
        assert encoder.prompt("a</s>b").count(2) == encoder.prompt("ab").count(2) == 2
        assert 2 not in encoder.label("a</s>b") and encoder.completion("x")[-1] == 2
        assert "".join(tokenizer.convert_ids_to_tokens(encoder.label("</s>"))).endswith("</s>")


@pytest.mark.parametrize(
    "name", ["Mistral 0.1", "Mistral", "Phi-3", "DeepSeek-R1-Distill", "ChatML, end of turn not special"]
)
def test_labels_are_scored_where_the_template_has_them(tmp_path, name):
    import torch

    published = TEMPLATES[name]
    folder = save_random_model(tmp_path, published.tokenizer(), "llama")
    model, tokenizer = load_named(folder, "none", "float32")
    turns, forms = ["Age: 23", "Debt: 1200, Age: 40"], {label: [label] for label in ("Good", "Standard", "Bad")}
    scores = FastLabelScorer(model, PromptEncoder(tokenizer), forms, label_tokens="all").raw_scores(turns)
    for turn, row in zip(turns, scores, strict=True):
        start = tokenizer(rendered(published, tokenizer, turn), add_special_tokens=False)["input_ids"]
        for label, score in zip(forms, row, strict=True):
            text = rendered(published, tokenizer, turn, label).rpartition(label)[0] + label
            if published.answer_start:
                text = text.removesuffix(label) + published.answer_start + label
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            assert ids[0, : len(start)].tolist() == start
            with torch.no_grad():
                log_probs = torch.log_softmax(model(ids).logits[0, :-1].float(), dim=-1)
            own = log_probs.gather(1, ids[0, 1:, None])[len(start) - 1 :, 0]
            assert score == pytest.approx(own.mean().item(), abs=1e-4)


def test_a_tokenizer_whose_end_of_turn_is_its_only_special_token_is_used(tmp_path):
    """Padding is the end of turn then; it changes no score and no gradient, since no mask follows from it."""
    tokenizer = byte_tokenizer(["<|im_end|>"], eos_token="<|im_end|>", chat_template=CHATML)
    folder = save_random_model(tmp_path, tokenizer, "llama")
    check_tokens(folder)
    model, loaded = load_named(folder, "none", "float32")
    assert loaded.pad_token == loaded.eos_token == "<|im_end|>"
    encoder, forms = PromptEncoder(loaded), {label: [label] for label in ("Good", "Standard", "Bad")}
    prompts = [encoder.prompt(turn) for turn in ("x", "a longer text " * 5)]
    together = FastLabelScorer(model, encoder, forms).score(prompts)
    alone = [FastLabelScorer(model, encoder, forms).score([prompt])[0] for prompt in prompts]
    assert together == pytest.approx(np.array(alone), abs=1e-4)
    rows = [{"input": "x", "output": "Good"}, {"input": "a longer text", "output": "Standard and more"}]
    examples, _ = completion_dataset(TrainingData("rows", rows, "", {}), "output", encoder, 512)
    batch = completion_collator(loaded.pad_token_id)(list(examples))
    assert (batch["labels"] == loaded.eos_token_id).sum() == 2  # each answer's own end is still taught
    assert batch["attention_mask"].sum() == sum(map(len, examples["input_ids"]))


def test_words_beyond_the_models_vocabulary_are_refused(tmp_path):
    tokenizer = byte_tokenizer(IM, eos_token=IM[2], chat_template=CHATML)
    folder = save_random_model(tmp_path, tokenizer, "llama")
    other = sentencepiece_tokenizer("first", eos_token="</s>", chat_template=ZEPHYR)
    assert len(other) > len(tokenizer)
    other.save_pretrained(folder)
    with pytest.raises(InputError, match=r"its token .* has number \d+, the model has \d+: they differ"):
        check_tokens(folder)
