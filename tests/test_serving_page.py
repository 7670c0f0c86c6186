"""The page at `/`, used in a real headless Chromium (Debian: apt install chromium chromium-driver)."""

from __future__ import annotations

import csv
import shutil
import threading
import time

import pytest
import uvicorn
from conftest import wait_for

from distil.serving.app import create_app
from distil.serving.metrics import Metrics
from distil.testing import TinyEngine

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no browser: apt install chromium chromium-driver runs these tests"
)


@pytest.fixture(scope="module")
def address():
    """Serve on loopback an engine that answers by rule; dpo has no adapter."""
    app = create_app(TinyEngine(missing=("dpo",)), Metrics())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


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
    return browser


def by_id(page, name: str):
    return page.find_element("id", name)


def cards(page) -> dict[str, str]:
    return {card.text.split("\n")[0].lower(): card.text for card in page.find_elements("css selector", ".card")}


def test_four_models_side_by_side(page):
    by_id(page, "example").click()
    assert (
        by_id(page, "features").get_attribute("value").startswith("Age: 23.0, Occupation: Scientist, Annual Income:")
    )
    by_id(page, "compare").click()
    shown = wait_for(lambda: len(cards(page)) == 4 and cards(page))
    assert list(shown) == ["base", "sft", "kd", "dpo"]
    for part in ("Standard", "84.0 %", "-0.28", "-1.49", "1.22", "margin 2.12", " ms"):
        assert part in shown["sft"]
    assert "no adapter is loaded for dpo" in shown["dpo"] and "python dpo_train.py" in shown["dpo"]
    fill = page.find_element("css selector", ".track.Standard .fill")
    assert fill.size["width"] == pytest.approx(0.84 * fill.find_element("xpath", "..").size["width"], abs=1.5)


def test_the_form_fills_the_text(page):
    page.find_element("css selector", "details summary").click()
    by_id(page, "f_Age").send_keys("41")
    by_id(page, "f_Outstanding Debt").send_keys("1200.5")
    assert by_id(page, "features").get_attribute("value") == "Age: 41, Outstanding Debt: 1200.5"


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
    source = tmp_path / "rows.csv"
    header = ["Name", "Age", "Occupation", "Annual_Income", "Outstanding_Debt"]
    rows = [[f"Row, {i}", str(20 + i), 'Doctor "GP"', "", f"{10 * i}.5"] for i in range(70)]
    with open(source, "w", newline="", encoding="utf-8-sig") as out:
        csv.writer(out).writerows([header, *rows])
    by_id(page, "file").send_keys(str(source))
    wait_for(lambda: "All 70 rows scored" in by_id(page, "csvstatus").text)
    by_id(page, "download").click()
    target = wait_for(lambda: list(downloads.glob("creditmix_scored*.csv")))[0]
    with open(target, newline="", encoding="utf-8") as handle:
        scored = list(csv.DictReader(handle))
    assert len(scored) == 70
    assert [row["Name"] for row in scored] == [f"Row, {i}" for i in range(70)]
    assert scored[3]["Occupation"] == 'Doctor "GP"' and scored[3]["prediction"] == "Standard"
    assert float(scored[3]["probability_Standard"]) == 0.84 and scored[3]["top2_margin"] == "2.12"


def test_a_cell_does_not_become_another_field(page):
    cells = 'return featuresOf(["age", "occupation"], ["40", "Lawyer, Age: 50;\\nAge: 51"])'
    assert page.execute_script(cells) == "Age: 40, Occupation: Lawyer, Age  50 Age  51"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "names no known column"),
        ("features\n", "has no rows"),
        ("features\n" + "Age: 1\n" * 1001, "1001 rows; 1000 at most"),
        ('features,x\nAge: 1,\n"",y\n', "Row 3 has no features"),
        ("features\nAge: 1\nraise ValueError\n", "After 0 rows: something went wrong"),
    ],
)
def test_bad_csv_files_are_explained(page, tmp_path, text, message):
    source = tmp_path / "rows.csv"
    source.write_text(text)
    by_id(page, "file").send_keys(str(source))
    wait_for(lambda: message in by_id(page, "csvstatus").text)
    assert not by_id(page, "download").is_displayed()


def test_no_other_host_is_asked(page, address):
    by_id(page, "example").click()
    by_id(page, "compare").click()
    wait_for(lambda: len(cards(page)) == 4)
    requested = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert requested and all(name.startswith(address) for name in requested)
    problems = [entry for entry in page.get_log("browser") if entry["source"] != "network"]  # scripts and policy
    assert problems == []
