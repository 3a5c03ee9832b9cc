"""The page in a real browser: at the width of a desk and of a phone, in both colour schemes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import histories
import pytest
from browser import Browser
from test_report_facts import facts_of

from distckpt.report import render

pytestmark = pytest.mark.browser

# The least contrast of any text with what it stands on, and where; colours are read back from a canvas, which knows
# every notation. Text that is not seen does not count.
LEAST_CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const read = (colour) => {
    if (!known.has(colour)) known.set(colour, draw(colour));
    return known.get(colour);
  };
  const draw = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const over = ([r, g, b, a], [x, y, z]) => [r, g, b].map((c, i) => (c * a + [x, y, z][i] * (255 - a)) / 255);
  const ground = (node) => {
    if (!node) return [255, 255, 255];
    const own = read(getComputedStyle(node).backgroundColor);
    return own[3] === 255 ? own.slice(0, 3) : over(own, ground(node.parentElement));
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let least = [99, ""];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const holder = node.parentElement;
    const hidden = holder.closest("script, style, [hidden], .unseen") || !holder.checkVisibility();
    if (!node.textContent.trim() || hidden) continue;
    const below = ground(holder), own = over(read(getComputedStyle(holder).color), below);
    const [dark, bright] = [light(own), light(below)].sort((a, b) => a - b);
    const contrast = (bright + 0.05) / (dark + 0.05);
    if (contrast < least[0]) least = [contrast, `${holder.className} ${node.textContent.trim()}`];
  }
  return least;
})()"""

BEYOND = """[...document.querySelectorAll("body *")]
  .filter((one) => one.getBoundingClientRect().right > innerWidth + 1 && !one.closest(".scroll, .unseen, [hidden]"))
  .map((one) => `${one.tagName} ${one.className.baseVal ?? one.className}`)"""

EMPTY_CHARTS = """[...document.querySelectorAll(".chart")].filter((chart) => {
  const drawn = [...chart.querySelectorAll(".plot path:not(.grid):not(.rule)")];
  return !drawn.some((path) => path.getTotalLength() > 0 && path.getBBox().width + path.getBBox().height > 0);
}).map((chart) => chart.querySelector("h3").textContent)"""

SIZES = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browsed")
    histories.write_history(folder / "run-7")
    (folder / "page.html").write_text(render(facts_of(folder / "run-7")))
    return folder / "page.html"


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the page of a run whose names and numbers are long, and that was restarted often."""
    folder = tmp_path_factory.mktemp("crowded")
    run = folder / ("a-run-with-a-name-that-no-line-can-hold" * 4)
    reason = "StorageError:" + "/a/path/without/a/place/to/break" * 8
    jobs = [histories.Job(90 * n, 90 * n + 90, "failed", {"reason": reason}) for n in range(25)]
    histories.write_history(run, jobs, every=30, keep=40)
    classes = [f"a class that is called number {index}" for index in range(25)]
    (run / "evaluation.json").write_text(json.dumps(histories.evaluation(9, classes=classes)))
    (folder / "page.html").write_text(render(facts_of(run)))
    return folder / "page.html"


@pytest.mark.parametrize(("which", "width", "scheme"), [*(("page", *size) for size in SIZES), ("crowded", 390, "dark")])
def test_the_page_fits_is_quiet_and_legible(
    browser: Browser, request: pytest.FixtureRequest, which: str, width: int, scheme: str
) -> None:
    browser.show(request.getfixturevalue(which), width=width, scheme=scheme)
    assert (browser.complaints(), browser.requests()) == ([], [])
    assert browser.ask("document.documentElement.scrollWidth <= innerWidth")
    assert browser.ask(BEYOND) == []
    assert browser.ask("document.querySelectorAll('.chart').length") == 8
    assert browser.ask(EMPTY_CHARTS) == []
    contrast, where = browser.ask(LEAST_CONTRAST)
    assert contrast >= 4.5, where


def test_the_schemes_differ_and_the_button_switches(browser: Browser, page: Path) -> None:
    def ground() -> Any:
        return browser.ask("getComputedStyle(document.body).backgroundColor")

    browser.show(page, width=1280, scheme="dark")
    dark = ground()
    browser.ask("document.querySelector('.theme').click()")
    switched = ground()
    browser.show(page, width=1280, scheme="light")
    assert dark != switched == ground()


def test_a_pointer_brings_up_the_values_at_its_place(browser: Browser, page: Path) -> None:
    browser.show(page, width=1280)
    left, top, width = browser.ask(
        "(() => { const box = document.querySelector('.plot').getBoundingClientRect();"
        " return [box.left, box.top, box.width]; })()"
    )
    assert browser.ask("document.querySelector('.tip').hidden")
    browser.point(left + width * 360 / 900, top + 50)
    shown = browser.ask("document.querySelector('.tip').innerText")
    assert shown.startswith("step 360")
    assert re.search(r"training\s+0\.\d+", shown)
    assert "job 4 went on from here; job 3 was killed" in shown
    browser.point(5, 5)
    assert browser.ask("document.querySelector('.tip').hidden")


def test_the_arrow_keys_read_a_chart(browser: Browser, page: Path) -> None:
    browser.show(page, width=390)
    browser.ask("document.querySelector('.frame').focus()")

    def said_after(key: str) -> str:
        browser.press(key)
        return str(browser.ask("document.activeElement.getAttribute('aria-valuetext')"))

    assert browser.ask("document.activeElement.getAttribute('role')") == "slider"
    assert said_after("Home").startswith("step 10, training ")
    assert said_after("ArrowRight").startswith("step 20, training ")
    assert said_after("ArrowLeft").startswith("step 10, training ")
    assert said_after("End").startswith("step 900, training ")
    assert browser.ask("document.querySelector('.tip').getBoundingClientRect().right <= innerWidth")
    browser.press("Escape")
    assert browser.ask("document.querySelector('.tip').hidden")


def test_everything_that_acts_is_reached_by_the_keyboard(browser: Browser, page: Path) -> None:
    browser.show(page, width=1280)
    acting = browser.ask("document.querySelectorAll('button, summary, .frame').length")
    focusable = browser.ask(
        "[...document.querySelectorAll('button, summary, .frame')].filter((one) => (one.focus(),"
        " document.activeElement === one)).length"
    )
    assert acting == focusable == 1 + 2 + 8


def test_names_that_look_like_script_do_nothing(browser: Browser, tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=document.title='caught'><script>document.title='caught'</script>"
    folder = tmp_path / "run-7"
    histories.write_history(folder)
    histories.checkpoint(folder, 960, config={"seed": hostile}, versions={"torch": hostile}, metrics={hostile: 1.0})
    (tmp_path / "page.html").write_text(render(facts_of(folder)))
    browser.show(tmp_path / "page.html", width=1280)
    assert browser.ask("document.title") == "run-7: complete"
    assert (browser.complaints(), browser.requests()) == ([], [])


def test_a_page_of_100000_steps_is_drawn_at_once(browser: Browser, tmp_path: Path) -> None:
    folder = tmp_path / "run-7"
    histories.write_history(folder)
    histories.write_lines(folder / "log.jsonl", histories.log_lines(100_000))
    (tmp_path / "page.html").write_text(render(facts_of(folder)))
    browser.show(tmp_path / "page.html", width=1280)
    assert browser.ask(EMPTY_CHARTS) == []
    assert browser.ask("document.querySelectorAll('*').length") < 2_000


@pytest.fixture
def printed(browser: Browser, page: Path) -> Callable[[], str]:
    def look() -> str:
        browser.call("Emulation.setEmulatedMedia", media="print")
        colour = str(browser.ask("getComputedStyle(document.body).backgroundColor"))
        browser.call("Emulation.setEmulatedMedia", media="")
        return colour

    browser.show(page, width=1280, scheme="dark")
    return look


def test_paper_is_light(browser: Browser, printed: Callable[[], str]) -> None:
    assert printed() == "rgb(251, 251, 250)"
    assert len(browser.call("Page.printToPDF")["data"]) > 10_000
