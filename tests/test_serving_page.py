"""The page at `/`, used in a real headless Chromium (Debian: apt install chromium chromium-driver)."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
import uvicorn
from conftest import CREDIT_TEXT, FLOAT32, wait_for

from distil.serving.app import create_app
from distil.serving.engine import Engine
from distil.serving.metrics import Metrics
from distil.testing import TinyEngine, save_adapter
from serve_creditmix import build_parser, engine_options

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no browser: apt install chromium chromium-driver runs these tests"
)
LOANS = {
    "name": "loans",
    "instruction": "Is this loan good or bad?",
    "labels": ["good", "bad"],
    "label_column": "status",
    "fields": [
        {"name": "Amount", "column": "amount_eur", "kind": "number", "range": [0, 100000], "digits": 4},
        {"name": "Purpose", "column": "purpose"},
    ],
}
INTENTS = {
    "name": "intents",
    "instruction": "Give the intent of this text.",
    "labels": [f"intent_{number}_of_<b>many</b>" for number in range(77)],
    "label_column": "intent",
    "text_column": "text",
}


@contextlib.contextmanager
def served(app, **how):
    """Serve an application on loopback and give its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", **how))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def address():
    """Serve an engine that answers CreditMix by rule; dpo has no adapter."""
    with served(create_app(TinyEngine(missing=("dpo",)), Metrics())) as address:
        yield address


@contextlib.contextmanager
def behind_prefix(address: str, prefix: str):
    """Forward requests below a prefix, without it, and give the address of a proxy."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.removeprefix(prefix)
            if path == self.path:
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("content-length", 0))) or None
            kind = {"content-type": self.headers.get("content-type", "text/plain")}
            with urllib.request.urlopen(urllib.request.Request(address + path.lstrip("/"), body, kind)) as reply:
                content = reply.read()
                self.send_response(reply.status)
                for name in ("content-type", "content-security-policy"):
                    if reply.headers[name]:
                        self.send_header(name, reply.headers[name])
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{proxy.server_address[1]}"
    proxy.shutdown()
    proxy.server_close()


@pytest.mark.parametrize("end", ["", "/"])
def test_the_page_works_behind_a_prefix(browser, end):
    app = create_app(TinyEngine(), Metrics())
    with served(app, root_path="/credit") as address, behind_prefix(address, "/credit") as proxy:
        browser.get(f"{proxy}/credit{end}")
        wait_for(lambda: browser.title == "creditmix")
        by_id(browser, "example").click()
        by_id(browser, "compare").click()
        wait_for(lambda: "Standard" in by_id(browser, "status").text)
        assert len(browser.find_elements("css selector", "#cards .verdict")) == 4


@pytest.fixture(params=[LOANS, INTENTS], ids=["loans", "intents"])
def other_task(request, browser, model_dir, tmp_path, own_server_log):
    """Serve a tiny model and an adapter of another task, open the page and return (page, task)."""
    adapter = save_adapter(tmp_path / "sft", model_dir)
    (tmp_path / "sft" / "task.json").write_text(json.dumps(request.param))
    options = engine_options(build_parser().parse_args(["--base", model_dir, "--sft", adapter, *FLOAT32]))
    engine = Engine(options)
    with served(create_app(engine, Metrics(), task=options.scoring.task)) as address:
        wait_for(lambda: engine.ready)
        browser.get(address)
        wait_for(lambda: browser.title == request.param["name"])
        yield browser, request.param


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads, tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-component-update", "disable-sync", "disable-quic", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, address):
    browser.set_window_size(1200, 900)
    browser.get(address)
    wait_for(lambda: browser.title == "creditmix")
    return browser


def by_id(page, name: str):
    return page.find_element("id", name)


def cards(page) -> dict[str, str]:
    return {card.text.split("\n")[0].lower(): card.text for card in page.find_elements("css selector", ".card")}


def scored_files(downloads) -> list:
    """Return the rows of the file that was downloaded last, and remove it."""
    target = wait_for(lambda: list(downloads.glob("*_scored*.csv")))[0]
    with open(target, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    target.unlink()
    return rows


def send(page, path, message: str) -> None:
    """Choose a file and wait for a message about it."""
    by_id(page, "file").send_keys(str(path))
    wait_for(lambda: message in by_id(page, "filestatus").text)


def test_four_models_side_by_side(page):
    by_id(page, "features").send_keys(CREDIT_TEXT)
    by_id(page, "compare").click()
    shown = wait_for(lambda: len(cards(page)) == 4 and cards(page))
    assert list(shown) == ["base", "sft", "kd", "dpo"]
    for part in ("Standard", "84.0 %", "-0.28", "-1.49", "1.22", "margin 2.12", " ms"):
        assert part in shown["sft"]
    assert "no adapter is loaded for dpo" in shown["dpo"] and "python dpo_train.py" in shown["dpo"]
    fill = page.find_element("css selector", ".bar.best .fill")
    assert fill.size["width"] == pytest.approx(0.84 * fill.find_element("xpath", "..").size["width"], abs=1.5)


def test_the_form_and_the_text_clear_each_other(page):
    by_id(page, "example").click()
    assert by_id(page, "f_Age").get_attribute("value") == "23"
    by_id(page, "features").send_keys("Age: 41")
    assert by_id(page, "f_Age").get_attribute("value") == ""
    by_id(page, "f_Outstanding Debt").send_keys("1200.5")
    assert by_id(page, "features").get_attribute("value") == ""
    by_id(page, "f_Occupation").send_keys("Lawyer, Age: 50")
    body = page.execute_script("return JSON.stringify(rowOfForm())")
    assert json.loads(body) == {"fields": {"Occupation": "Lawyer, Age: 50", "Outstanding Debt": "1200.5"}}


def test_all_of_it_works_from_the_keyboard(page):
    from selenium.webdriver import ActionChains, Keys

    by_id(page, "features").send_keys("Age: 23")
    seen = []
    for _ in range(12):
        ActionChains(page).send_keys(Keys.TAB).perform()
        seen.append(page.switch_to.active_element.get_attribute("id"))
        if seen[-1] == "compare":
            break
    assert seen[-1] == "compare"
    outline = page.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    ActionChains(page).send_keys(Keys.ENTER).perform()
    wait_for(lambda: len(cards(page)) == 4)
    assert "Standard" in by_id(page, "status").text  # announced to screen readers too


def test_every_control_has_a_name(page):
    nameless = page.execute_script(
        "return [...document.querySelectorAll('input, select, textarea, progress')]"
        ".filter((e) => !e.labels.length && !e.ariaLabel).map((e) => e.id)"
    )
    assert nameless == []


@pytest.mark.parametrize("width", [360, 768, 1200])
def test_nothing_is_wider_than_the_window(page, width):
    page.set_window_size(width, 800)
    by_id(page, "example").click()
    by_id(page, "compare").click()
    wait_for(lambda: len(cards(page)) == 4)
    # Headless Chromium has a least window width, so the page is squeezed into a frame.
    wide = page.execute_script(
        "document.body.style.width = arguments[0] + 'px';"
        "const over = [...document.body.querySelectorAll('*')].filter((e) => e.getClientRects().length"
        " && e.getBoundingClientRect().right > arguments[0] + 1).map((e) => e.outerHTML.slice(0, 80));"
        "document.body.style.width = ''; return over;",
        width,
    )
    assert wide == []
    spilling = page.execute_script(
        "return [...document.querySelectorAll('.card table')].filter((t) => t.getBoundingClientRect().right"
        " > t.parentElement.getBoundingClientRect().right - 8).length"
    )
    assert spilling == 0


def test_light_and_dark(page):
    def background():
        return page.execute_script("return getComputedStyle(document.body).backgroundColor")

    before = background()
    by_id(page, "theme").click()
    assert background() != before
    by_id(page, "theme").click()
    assert background() == before


def test_a_csv_is_scored_and_downloaded(page, downloads, tmp_path):
    """What the file has is kept, formulas too."""
    source = tmp_path / "rows.csv"
    header = ["Name", "Age", "Occupation", "Annual_Income", "Outstanding_Debt"]
    rows = [[f"=Row, {i}", str(20 + i), 'Doctor "GP"', "", f"{10 * i}.5"] for i in range(70)]
    with open(source, "w", newline="", encoding="utf-8-sig") as out:
        csv.writer(out).writerows([header, *rows])
    send(page, source, "All 70 rows scored")
    assert "column Payment_Behaviour missing: Unknown in all rows" in by_id(page, "notes").text
    by_id(page, "download").click()
    scored = scored_files(downloads)
    assert list(scored[0]) == [*header, "prediction", "p_Good", "p_Standard", "p_Bad", "top2_margin"]
    assert [row["Name"] for row in scored] == [f"=Row, {i}" for i in range(70)]
    assert scored[3]["Occupation"] == 'Doctor "GP"' and scored[3]["prediction"] == "Standard"
    assert float(scored[3]["p_Standard"]) == 0.84 and scored[3]["top2_margin"] == "2.12"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "missing; found a, b"),
        ("features\n", "no rows below the header"),
        ("features\n" + "Age: 1\n" * 1001, "1,001 rows; the page takes 1,000"),
        ("features\nAge: 1\nraise ValueError\n", "After 0 rows: something went wrong"),
        ("features\n" + "x" * 1_000_001, "more than 1 MB"),
    ],
)
def test_bad_files_are_explained(page, tmp_path, text, message):
    source = tmp_path / "rows.csv"
    source.write_text(text)
    send(page, source, message)
    assert not by_id(page, "download").is_displayed()


def test_rows_that_cannot_be_scored_are_shown(page, downloads, tmp_path):
    """Their lines are named, and the others are scored; text of the file is neither markup nor a new formula."""
    source = tmp_path / "rows.csv"
    source.write_text('features,x\nAge: 1,\n"",y\n"=1+1: 2, =1+1: 3",<b>z</b>\n')
    send(page, source, "1 of 3 rows scored, 2 could not be.")
    lines = by_id(page, "notes").text.split("\n")
    assert lines == ["row 3: no features", "row 4: =1+1 occurs twice in one feature string; keep one"]
    by_id(page, "download").click()
    scored = scored_files(downloads)
    assert [row["prediction"] for row in scored] == ["Standard", "", ""] and scored[2]["x"] == "<b>z</b>"
    assert scored[2]["error"] == "'=1+1 occurs twice in one feature string; keep one"
    assert scored[2]["features"] == "=1+1: 2, =1+1: 3"


def test_batches_that_take_too_long_are_halved(browser, tmp_path):
    from distil.serving.engine import Refusal

    sizes = []

    class Slow(TinyEngine):
        async def score(self, variant, features):
            sizes.append(len(features))
            if len(features) > 8:
                raise Refusal(504, "timeout", "no answer within 30 s")
            return await super().score(variant, features)

    source = tmp_path / "rows.csv"
    source.write_text("Age\n" + "30\n" * 20)
    with served(create_app(Slow(), Metrics())) as address:
        browser.get(address)
        wait_for(lambda: browser.title == "creditmix")
        send(browser, source, "All 20 rows scored")
    assert sizes == [20, 10, 5, 5, 10, 5, 5]


def test_the_decimal_mark_can_be_chosen(page, tmp_path):
    from selenium.webdriver.support.select import Select

    source = tmp_path / "rows.csv"
    source.write_text("Age,Annual_Income\n23,19.114\n")
    send(page, source, '"19.114" has two readings and no other value of the column decides')
    assert "decimal mark , reads 19114" in by_id(page, "filestatus").text
    assert page.switch_to.active_element.get_attribute("id") == "decimal"
    Select(by_id(page, "decimal")).select_by_value(",")
    wait_for(lambda: "All 1 rows scored" in by_id(page, "filestatus").text)


def test_a_key_is_asked_for(browser):
    from selenium.webdriver import Keys

    with served(create_app(TinyEngine(), Metrics(), api_key="s3cret")) as address:
        browser.get(address)
        wait_for(lambda: by_id(browser, "status").text == "Enter the API key.")
        assert browser.find_elements("css selector", "#fields input") == []
        by_id(browser, "key").send_keys("s3cret" + Keys.TAB)
        wait_for(lambda: browser.title == "creditmix")
        assert len(browser.find_elements("css selector", "#fields input")) == 6


def test_a_page_of_another_task(other_task, downloads, tmp_path):
    """Form, labels, files and download follow the task, with a real model."""
    page, task = other_task
    table = "fields" in task
    assert by_id(page, "instruction").text == task["instruction"]
    names = [label.text for label in page.find_elements("css selector", "#form label") if label.text]
    assert names[:3] == (["Amount", "Purpose", "All fields as one text"] if table else ["text"])
    assert by_id(page, "columns").text.startswith("Columns amount_eur, purpose" if table else "A column text")
    by_id(page, "example").click()
    by_id(page, "compare").click()
    shown = wait_for(lambda: len(cards(page)) == 4 and cards(page))
    bars = page.find_elements("css selector", ".card:nth-child(2) .bar")
    assert len(bars) == (2 if table else 5) and "margin" in shown["sft"]
    assert ("and 72 labels less probable" in shown["sft"]) != table
    assert f"python kd_train.py --student BASE --save_dir runs/{task['name']}_kd" in shown["kd"]
    assert page.find_elements("css selector", "#cards b") == []  # a label is text
    source = tmp_path / "rows.xlsx"
    rows = {"id": [1, 2], "amount_eur": [1500, 20.5], "purpose": ["car, Amount: 9", "trip"]}
    pd.DataFrame(rows | {"text": ["where is <b>my</b> card?", "Hello"]}).to_excel(source, index=False)
    send(page, source, "All 2 rows scored")
    by_id(page, "download").click()
    scored = scored_files(downloads)
    assert [row["id"] for row in scored] == ["1", "2"] and scored[0]["purpose"] == "car, Amount: 9"
    assert {row["prediction"] for row in scored} <= set(task["labels"])
    assert sum(float(scored[0][f"p_{label}"]) for label in task["labels"]) == pytest.approx(1, abs=1e-3)


def test_no_other_host_is_asked(page, address):
    by_id(page, "example").click()
    by_id(page, "compare").click()
    wait_for(lambda: len(cards(page)) == 4)
    requested = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert requested and all(name.startswith(address) for name in requested)
    problems = [entry for entry in page.get_log("browser") if entry["source"] != "network"]  # scripts and policy
    assert problems == []
