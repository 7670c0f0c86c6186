"""Thoughts that models write before an answer, so that nothing reads them as the answer."""

from __future__ import annotations

import re

FRAME = r"(?:<\|start\|>assistant)?<\|channel\|>"  # of gpt-oss
MARKERS = (  # where published models begin a thought, and where they end it
    (r"(?i:<(?:\w+[:_])?think(?:ing)?>)", r"(?i:</(?:\w+[:_])?think(?:ing)?>)"),  # DeepSeek, Qwen, Seed-OSS, LongCat
    ("<thought>", "</thought>"),  # EXAONE Deep, Gemini
    (r"\[THINK\]", r"\[/THINK\]"),  # Magistral
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    (r"<\|open\|>think<\|sep\|>", r"<\|close\|>think<\|sep\|>"),  # Kimi K3
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Command A
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),  # Sky-T1, OpenThinker
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),  # Apertus
    (r"\[unused16\]", r"\[unused17\]"),  # Pangu
    (r"<\|channel>thought\b", r"<channel\|>"),  # Gemma 4
    (rf"{FRAME}(?:analysis|commentary)[^<]*<\|message\|>", r"<\|end\|>"),
    (r"analysis(?=[A-Z])", "assistantfinal"),  # gpt-oss where its control tokens are left out
    ("Here(?:'s| is) my thought process:", "Here(?:'s| is) my response:"),  # Granite 3.2
)
WORDS = ("think", "thought", "channel", "inner_prefix", "unused16", "analysis", "response", "solution")  # in each mark
OPENING = "|".join(f"({opening})" for opening, _ in MARKERS)
# A template may have opened the thought in the prompt. An end within quotes is one that the answer is about.
LONE_END = re.compile(f"(?<![\"'`])(?:{'|'.join(end for _, end in MARKERS if 'think' in end.lower())})(?![\"'`])")
ENDS = r"<\|return\|>|<\|END_RESPONSE\|>|<\|end_of_solution\|>|<\|close\|>response<\|sep\|>"
BEGINNINGS = rf"{FRAME}final<\|message\|>|<\|START_RESPONSE\|>|<\|begin_of_solution\|>|<\|open\|>response<\|sep\|>"


def after_thoughts(text: str) -> str | None:
    """Return the answer after a model's thoughts, without the marks around it; a text without thoughts as it is.
    None where a thought has no end, or comes after a part of the answer."""
    lower, rest, thought = text.lower(), text, False
    if not any(word in lower for word in WORDS):  # a text is looked at once for each token that is written
        return text
    while opened := re.match(rf"\s*(?:{OPENING})", rest):
        end = re.compile(MARKERS[opened.lastindex - 1][1]).search(rest, opened.end())
        if not end:
            return None
        rest, thought = rest[end.end() :], True
    end = LONE_END.search(rest)
    if end and not re.match(r"\s*(?:[{\"`]|\[(?!/))", rest) and not re.search(OPENING, rest[: end.start()]):
        rest, thought = rest[end.end() :], True
    if re.search(rf"^[^\S\n]*(?:{OPENING})", rest, re.MULTILINE):
        return None
    begun, ended = (BEGINNINGS, ENDS) if not thought else (f"{BEGINNINGS}|<answer>|<response>", f"{ENDS}|</\\w+>")
    if begun := re.match(rf"\s*(?:{begun})", rest):
        rest = re.sub(rf"(?:{ended})\s*\Z", "", rest[begun.end() :])
    return re.sub(r"\A(?:[^\S\n]*\n)+", "", rest) if thought or begun else text
