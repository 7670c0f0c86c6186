"""The text layer of PDFs, page by page, through pypdf."""

from __future__ import annotations

import logging
from pathlib import Path

from common import InputError
from distil.processes import print_note


def is_pdf(path: str | Path) -> bool:
    """Return whether a file is a PDF by its name or its first bytes."""
    with open(path, "rb") as file:
        return str(path).lower().endswith(".pdf") or b"%PDF-" in file.read(1024)


def pdf_text(path: str | Path) -> str:
    """Return the text of a PDF with its lines and columns as printed, a form feed between pages.
    Raises InputError for a damaged or encrypted file and for a scan without text."""
    from pypdf import PdfReader
    from pypdf.errors import DependencyError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it logs what it repairs
    try:
        reader = PdfReader(path)
        locked = reader.is_encrypted and not reader.decrypt("")
        # Layout mode keeps columns apart and in reading order, and leaves out text that is turned.
        all_pages = () if locked else reader.pages
        pages = [page.extract_text(extraction_mode="layout") or page.extract_text() for page in all_pages]
    except DependencyError:  # AES needs a package that is not required
        locked, pages = True, []
    except Exception as error:  # damaged files raise nearly anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise InputError(f"{path}: cannot be read as a PDF ({reason})") from None
    if locked:
        raise InputError(f"{path}: is encrypted; remove the password first, such as with qpdf --decrypt")
    pages = [page.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\f", "\n") for page in pages]
    blank = [number for number, page in enumerate(pages, 1) if not any(map(str.isalnum, page))]
    if len(blank) == len(pages):
        raise InputError(f"{path}: has no text layer, it is a scan or empty; run OCR first, such as ocrmypdf")
    print_note(f"{path}: no text on {len(blank)} of {len(pages)} pages, first page {blank[0]}" if blank else None)
    return "\f".join(pages)
