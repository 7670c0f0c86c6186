"""What people check: PDFs as documents, values to review, the review page (in a headless Chromium if there is one)."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from conftest import read_lines, write_lines
from test_serving_page import CHROMIUM, DRIVER, browser, downloads  # noqa: F401

import infer_idp
from common import InputError
from distil.idp.pdf import pdf_text
from distil.idp.review import write_page

LINES = [["Müller & Co", "Invoice 7"], ["Pen", "2.00", "4.00"], ["Total", "4.00"]]


def write_pdf(path, pages: list[list[list[str]]], password: str | None = None, turned: int = 0) -> str:
    """Write pages of lines of cells 100 points apart, the cells in an order that is not that of reading."""
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    def names(**entries):
        return DictionaryObject(
            {NameObject(f"/{key}"): NameObject(f"/{v}") if isinstance(v, str) else v for key, v in entries.items()}
        )

    writer = PdfWriter()
    font = names(Type="Font", Subtype="Type1", BaseFont="Helvetica", Encoding="WinAnsiEncoding")
    for lines in pages:
        page, stream = writer.add_blank_page(400, 400), DecodedStreamObject()
        cells = [(10 + 100 * x, 380 - 20 * y, cell) for y, line in enumerate(lines) for x, cell in enumerate(line)]
        drawn = [f"BT /F 10 Tf {x} {y} Td ({cell}) Tj ET" for x, y, cell in reversed(cells)]
        stream.set_data("\n".join(drawn).encode("cp1252"))
        page[NameObject("/Resources")] = names(Font=names(F=font))
        page[NameObject("/Contents")] = writer._add_object(stream)
        page.rotate(turned)
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    writer.write(path)
    return str(path)


def test_a_pdf_is_read_in_lines_and_columns_page_by_page(tmp_path, capsys):
    text = infer_idp.read_document(write_pdf(tmp_path / "a.pdf", [LINES, [], [["Page three"]]]))
    first, second, third = text.split("\f")
    assert [line.split() for line in first.splitlines() if line] == [
        ["Müller", "&", "Co", "Invoice", "7"], ["Pen", "2.00", "4.00"], ["Total", "4.00"],
    ]  # fmt: skip
    assert "  " in first and second == "" and third == "Page three"
    assert "no text on 1 of 3 pages, first page 2" in capsys.readouterr().err
    assert "Total" in pdf_text(write_pdf(tmp_path / "turned.pdf", [LINES], turned=90))


def test_pdfs_that_cannot_be_read_are_refused_in_one_line(tmp_path):
    good = write_pdf(tmp_path / "good.pdf", [LINES])
    data = (tmp_path / "good.pdf").read_bytes()
    (tmp_path / "cut.pdf").write_bytes(data[:200])
    (tmp_path / "text.pdf").write_text("Total 5")
    (tmp_path / "empty.pdf").write_bytes(b"")
    (tmp_path / "renamed.txt").write_bytes(data)
    cases = {"cut": "cannot be read as a PDF", "text": "cannot be read as a PDF", "empty": "cannot be read as a PDF"}
    cases |= {"scan": "no text layer.*run OCR", "locked": "encrypted"}
    write_pdf(tmp_path / "scan.pdf", [[], []])
    write_pdf(tmp_path / "locked.pdf", [LINES], password="secret")
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as error:
            infer_idp.read_document(str(tmp_path / f"{name}.pdf"))
        assert "\n" not in str(error.value) and f"{name}.pdf" in str(error.value)
    assert infer_idp.read_document(str(tmp_path / "renamed.txt")) == infer_idp.read_document(good)


def test_one_document_with_evidence_and_its_page(model_dir, schema_file, tmp_path, capsys):
    page = tmp_path / "page.html"
    document = write_pdf(tmp_path / "a.pdf", [LINES, LINES])
    argv = ["--model_dir", model_dir, "--schema", schema_file, "--document", document, "--max_new_tokens", "200"]
    argv += ["--show_schema", "off"]  # the context is small
    assert infer_idp.main([*map(str, argv), "--review_below", "1", "--review_page", str(page)]) == 0
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert answer.keys() == {"json", "evidence"}
    flagged = sum("review" in row for row in answer["evidence"])
    assert f"to check: {flagged} of {len(answer['evidence'])} values" in shown.err and flagged
    assert "confidence is not calibrated" in shown.err and "<h2>Document 1</h2>" in page.read_text()
    assert infer_idp.main([*map(str, argv), "--evidence"]) == 0
    assert json.loads(capsys.readouterr().out)["json"] == answer["json"]


def test_a_file_with_a_page_of_all_documents(model_dir, schema_file, tmp_path, capsys):
    output, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    rows = [{"document": "A 1"}, {"id": 2}, {"input": "B <b>2</b>"}]
    source = write_lines(tmp_path / "in.jsonl", rows)
    argv = ["--model_dir", model_dir, "--schema", schema_file, "--input", source, "--output", output]
    argv += ["--max_new_tokens", "200", "--review_page", page, "--review_below", "0.5"]
    assert infer_idp.main([*map(str, argv)]) == 1
    first, second, third = read_lines(output)
    assert "evidence" not in second and all("review" in e or e["confidence"] >= 0.5 for e in first["evidence"])
    text = page.read_text()
    assert text.count("<h2>") == 2 and "Document 1" in text and "Document 3" in text and "<b>" not in text
    total = len(first["evidence"]) + len(third["evidence"])
    assert f"of {total} values" in capsys.readouterr().err
    with pytest.raises(InputError, match="is a file, a folder is needed"):
        infer_idp.main([*map(str, argv), "--review_page", f"{source}/page.html"])


@pytest.fixture
def page(tmp_path):
    """Write a page of two documents with hostile text and overlapping places."""
    evil = 'Total <script>alert(1)</script> 4.00 & "Pen"\n\f<img src=//x.test/a onerror=alert(2)>'
    at = evil.index("4.00")
    evidence = [
        {"path": "/total", "confidence": 0.97, "span": [at, at + 4]},
        {"path": "/items/0/<i>", "confidence": 0.41, "span": [at, at + 4], "review": True},
        {"path": "/note", "confidence": 0.8, "span": [at + 2, at + 12]},
        {"path": "/tag", "confidence": 0.7, "span": [evil.index("<img"), len(evil)], "page": 2},
        {"path": "/paid", "confidence": None, "span": None},
    ]
    answer = {"json": {"total": 4, "items": [{"<i>": 4}], "note": "00", "tag": "<img>", "paid": None}}
    sure = {"json": {"a": "x"}, "evidence": [{"path": "/a", "confidence": 0.99, "span": [0, 1]}]}
    write_page(str(tmp_path / "page.html"), {1: ("x", sure), 2: (evil, answer | {"evidence": evidence})})
    return tmp_path / "page.html", evil


def test_text_of_documents_is_text_in_the_page(page):
    tags, texts = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append((tag, dict(attributes)))

        def handle_data(self, data):
            texts.append(data)

    reader = Reader()
    reader.feed(page[0].read_text())
    assert not {"script", "img", "i"} & {tag for tag, _ in tags} and page[1] in "".join(texts)
    assert all("src" not in attributes and "http" not in attributes.get("href", "") for _, attributes in tags)
    policy = next(a["content"] for tag, a in tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no browser: apt install chromium chromium-driver runs this")
def test_the_page_leads_from_the_least_sure_value_to_its_place(page, browser):  # noqa: F811
    path, evil = page
    browser.set_window_size(1200, 700)
    browser.get(f"file://{path}")
    titles = [title.text for title in browser.find_elements("tag name", "h2")]
    assert titles == ["Document 2", "Document 1"]
    rows = [row.text.split() for row in browser.find_elements("css selector", "section:first-of-type tr")][1:]
    assert [row[0] for row in rows] == ["?", "41%", "70%", "80%", "97%"] and rows[0][-3:] == ["in", "the", "document"]
    browser.find_element("link text", "<img>").click()
    target = browser.find_element("css selector", "mark:target")
    assert target.text == evil[evil.index("<img") :] and target.is_displayed()
    marked = browser.find_elements("css selector", "mark.review")
    assert "".join(mark.text for mark in marked) == "4.00"
    assert browser.find_element("tag name", "pre").get_attribute("textContent") == evil
    assert browser.get_log("browser") == []
