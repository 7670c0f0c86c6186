"""README, docs and data/README.md: size, line length, fenced code, links, commands that the parsers accept."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from distil.tasks import default_task
from distil.testing import ROOT

README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "results"
PAGES = [README, ROOT / "data" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = {path.name: path.stem for path in ROOT.glob("*.py") if path.stem != "common"}
SHA256 = re.compile(r"`[0-9a-f]{64}`")
AVOID = ("mends?", "likeliest", "to be had", "go(es|ne)? on", "asked anew", "earlier version", "to the byte")
AVOID += ("of (its|their) own", "beside", "stands? in", "so many", "nobody reads", "told", "likelihood of the labels?")
SOURCES = [path for folder in ("", "distil/**/", "bench/", "data/", "tests/") for path in ROOT.glob(f"{folder}*.py")]
ALLOWED = {"tests/test_docs.py": AVOID}  # file: phrases of AVOID that it may contain
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str) -> list[tuple[str, list[str]]]:
    """Return (language, lines) of every fenced block; a block that is never closed fails."""
    fenced: list[tuple[str, list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            if not inside:
                fenced.append((line.strip().removeprefix("```"), []))
            inside = not inside
        elif inside:
            fenced[-1][1].append(line)
    assert not inside, "a code block is not closed"
    return fenced


def prose(text: str) -> str:
    """Return the text without fenced blocks."""
    return re.sub(r"(?ms)^ *```.*?^ *```$", "", text)


def commands(text: str) -> list[list[str]]:
    """Return the shell words of each command in fenced bash blocks and in inline code that starts like one."""
    shell = "\n".join("\n".join(lines) for language, lines in blocks(text) if language == "bash")
    shell = shell.replace("\\\n", "")
    inline = re.findall(r"`((?:python |make )?[\w./]+[^`\n]*)`", prose(text).replace("\n", " "))
    starts = ("python ", "make ", *SCRIPTS)
    lines = shell.splitlines() + [code for code in inline if code.startswith(starts)]
    return [shlex.split(line, comments=True) for line in lines]


def anchors(page: Path) -> set[str]:
    """Return GitHub's anchors of a page."""
    headings = re.findall(r"(?m)^#+ (.+)$", prose(page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_flags(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Fail for a flag that the parser does not know, or a value that is not among its choices."""
    for number, word in enumerate(words):
        if not word.startswith("--"):
            continue
        flag, _, inline = word.partition("=")
        assert flag in parser._option_string_actions, f"{flag} is not a flag"
        choices = parser._option_string_actions[flag].choices
        value = inline or "".join(words[number + 1 : number + 2])
        if choices and value and not value.startswith("--"):
            assert set(value.split("|")) <= set(choices), f"{flag} {value}"


def test_readme_is_short_and_linked():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180 and len(text.split()) <= 1300 and text.count("](") >= 12


@each_page
def test_lines_and_blocks(page):
    """Lines of at most 100 characters, but for rows with a SHA-256; a language for every block; short pages."""
    text = page.read_text(encoding="utf-8")
    long = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 100 and not SHA256.search(line)]
    assert not long and all(language for language, _ in blocks(text)), f"long lines: {long}; or an unnamed block"
    if page.is_relative_to(ROOT / "docs") and not page.is_relative_to(RESULTS):
        assert len(text.splitlines()) <= 100


@each_page
def test_links_lead_somewhere(page):
    text = prose(page.read_text(encoding="utf-8"))
    defined = dict(re.findall(r"(?m)^\[([^\]]+)\]: (\S+)$", text))
    assert set(re.findall(r"\]\[([^\]]+)\]", text)) <= set(defined)
    targets = [*re.findall(r"\]\(([^)\s]+)\)", text), *defined.values()]
    for target in (t for t in targets if not t.startswith(("https://", "http://"))):
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"dead link: {target}"
        assert not anchor or anchor in anchors(file), f"dead anchor: {target}"


@each_page
def test_commands_are_accepted(page):
    """Every script with its flags, every module of bench and data with flags in its source, every make target."""
    targets = re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"))
    for words in commands(page.read_text(encoding="utf-8")):
        ends = [i for i, word in enumerate(words) if word in ("|", ">", "<", "&&", ";")]
        words = words[: min(ends, default=None)]
        script = next((i for i, word in enumerate(words) if word in SCRIPTS), None)
        if script is not None:
            parser = importlib.import_module(SCRIPTS[words[script]]).build_parser()
            check_flags(parser, words[script + 1 :])
        elif words[:1] == ["make"]:
            assert all(word in targets for word in words[1:] if "=" not in word), words
        elif words[:2] == ["python", "-m"] and re.fullmatch(r"(bench|data)\.\w+", words[2]):
            source = (ROOT / f"{words[2].replace('.', '/')}.py").read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in words[3:] if word.startswith("--")), words


@each_page
def test_plain_english(page):
    text = page.read_text(encoding="utf-8")
    assert not phrases(text), phrases(text)
    assert "TODO" not in text


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_plain_english_in_code(path):
    """The same phrases in comments, docstrings and messages."""
    allowed = ALLOWED.get(str(path.relative_to(ROOT)), ())
    assert not set(phrases(path.read_text(encoding="utf-8"))) - set(allowed)


def phrases(text: str) -> list[str]:
    """Return the phrases of AVOID that a text contains, also over a line break."""
    text = " ".join(text.lower().replace("#", " ").split())
    return [phrase for phrase in AVOID if re.search(rf"\b{phrase}\b", text)]


@each_page
def test_every_file_that_a_page_mentions_is_linked(page):
    """Once on the page; names in commands do not count."""
    text = prose(page.read_text(encoding="utf-8"))
    linked = {(page.parent / target.partition("#")[0]).resolve() for target in re.findall(r"\]\(([^)\s]+)\)", text)}
    linked |= {(page.parent / target).resolve() for target in re.findall(r"(?m)^\[[^\]]+\]: ([^#\s]+)", text)}
    rest = re.sub(r"(?m)^\[[^\]]+\]: .*$|\[[^\]]*\]\([^)]*\)|`(?:python|make) [^`]*`", " ", text)
    names = set(re.findall(r"(?<![\w/*.-])(\w[\w./-]*\.(?:py|md|jsonl?|ya?ml|txt|png|html))\b", rest))
    files = {name: next((f for f in (ROOT / name, page.parent / name) if f.is_file()), None) for name in names}
    assert not [name for name, file in files.items() if file and file.resolve() not in linked]


def test_architecture_names_are_defined_in_the_linked_files():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| [^|]+ \| \[[^\]]+\]\(([^)]+)\) \| ((?:`\w+`(?:, )?)+) \|$", text)
    assert len(rows) >= 16
    for path, names in rows:
        source = (ROOT / "docs" / path).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names):
            assert re.search(rf"(?m)^\s*(?:def|class) {name}\b|^{name}\b.*=", source), f"{path}: {name}"


def test_your_data_explains_every_key_of_a_task_file():
    section = (ROOT / "docs" / "your-data.md").read_text(encoding="utf-8").partition("## The task file")[2]
    rows = re.findall(r"(?m)^\| (`[^|]+) \| ([^|]+) \|$", section.partition("\n## ")[0])
    assert {key for keys, _ in rows for key in re.findall(r"`(\w+)`", keys)} == set(default_task().record)
    (own,) = [meaning for keys, meaning in rows if keys == "`fields`"]
    assert re.findall(r"`(\w+)`", own) == list(default_task().record["fields"][0])


def test_every_page_can_be_reached_from_the_readme():
    seen, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        for target in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8")):
            file = (page.parent / target).resolve()
            if file not in seen and file.is_file():
                seen.add(file)
                waiting.append(file)
    assert set(PAGES[1:]) <= seen
