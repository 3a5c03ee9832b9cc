"""The page: whole, small, and safe whatever a log says."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import histories
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report_facts import NOW, facts_of

from distckpt.logfolder import EVALUATION_NAME, EVENTS_NAME, LOG_NAME
from distckpt.report import Facts, Logs, gather, render
from distckpt.report.markup import Markup, data, escape, tag

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u202e\x00\ud800"


class Elements(HTMLParser):
    """Collects the elements of a page, and complains about one that is not closed."""

    VOID = frozenset({"img", "meta"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag == name]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("paged") / "run-7"
    histories.write_history(folder)
    return render(facts_of(folder))


def test_every_section_is_there(page: str) -> None:
    sections = [attributes["id"] for attributes in Elements(page).of("section")]
    assert sections == ["progress", "saves", "checkpoints", "jobs", "classes", "settings"]


def test_every_picture_has_a_text_alternative(page: str) -> None:
    elements = Elements(page)
    assert len(elements.of("img")) == 12
    assert all(image["alt"] for image in elements.of("img"))
    shown = [image for image in elements.of("svg") if image.get("aria-hidden") != "true"]
    assert len(shown) == 8
    assert all(image["role"] == "img" and len(image["aria-label"] or "") > 30 for image in shown)


def test_the_page_forbids_all_but_its_own_script(page: str) -> None:
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    [digest] = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_nothing_on_the_page_is_somewhere_else(page: str) -> None:
    for name, attributes in Elements(page).found:
        assert name not in {"link", "iframe", "object", "embed", "base", "form", "a"}
        assert not any(key.startswith("on") for key in attributes)
        assert (attributes.get("src") or "data:").startswith("data:")
    assert "http" not in page.replace("http-equiv", "")
    assert "url(" not in page


def test_hostile_text_is_text(tmp_path: Path) -> None:
    folder = tmp_path / "run-7"
    histories.write_history(folder)
    config = {"checkpoint": {"keep": 3}, HOSTILE: [HOSTILE], "seed": HOSTILE}
    versions = {"torch": HOSTILE, HOSTILE[:-1]: "1"}
    histories.checkpoint(folder, 960, config=config, versions=versions, run=HOSTILE, metrics={HOSTILE: 1.0})
    with (folder / EVENTS_NAME).open("a") as file:
        for kind in ("quarantined", "save_failed", "started", "preempted", "ended"):
            texts = dict.fromkeys(("reason", "error", "host", "signal", "choice", "version"), HOSTILE)
            line = {"time": NOW, "job": HOSTILE, "kind": kind, "step": 960, "ending": "failed", **texts}
            file.write(json.dumps(line) + "\n")
    with (folder / LOG_NAME).open("a") as file:
        file.write(json.dumps({"kind": HOSTILE, "step": 3, HOSTILE: 1.5}) + "\n")
    (folder / EVALUATION_NAME).write_text(json.dumps(histories.evaluation(9, classes=[HOSTILE, "b", "c"])))
    page = render(facts_of(folder))
    elements = Elements(page)
    scripts = elements.of("script")
    assert len(scripts) - len([one for one in scripts if one.get("type") == "application/json"]) == 1
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in elements.of("img"))
    assert "alert(1)" in elements.text
    assert not {"\u202e", "\x00", "\ud800"} & set(page)
    page.encode()


def test_a_run_named_like_a_script_is_named_like_that(tmp_path: Path) -> None:
    facts = gather([], None, Logs(folder=tmp_path), url=f"s3://bucket/{HOSTILE}", now=NOW)
    assert Elements(render(facts)).of("h1") == [{}]


@pytest.mark.parametrize("created", [0.0, 1e11, 1e300])
@pytest.mark.parametrize("value", [0.0, 5e-324, -1e300, 1.7e308, float("inf"), float("nan")])
def test_numbers_beyond_all_reason_are_shown_somehow(tmp_path: Path, created: float, value: float) -> None:
    timings = {"stage_s": value, "write_s": value} if math.isfinite(value) else {}
    odd = {"metrics": {"val/loss": value, "val/top1": value}, "timings": timings, "world_size": 10**17}
    histories.checkpoint(tmp_path, 10)
    histories.checkpoint(tmp_path, 10**12 - 1, created=created, config={"a": [[[]]] * 9, "b": {"c": None}}, **odd)
    assert "999,999,999,999" in Elements(render(facts_of(tmp_path))).text


def test_an_empty_run_still_has_a_page() -> None:
    elements = Elements(render(Facts(name="n", url="u", made=NOW, state="unknown")))
    assert elements.of("section") == []
    assert "unknown" in elements.text


@given(text=st.text(max_size=30))
def test_text_comes_back_from_markup_as_it_went_in(text: str) -> None:
    plain = "".join(letter for letter in text if escape(letter) != "\ufffd" and not 0xD800 <= ord(letter) < 0xE000)
    elements = Elements(tag("p", plain.replace("\r", ""), title=plain))
    assert elements.text == plain.replace("\r", "")
    assert elements.of("p") == [{"title": plain}]
    assert json.loads(re.sub("<.*?>", "", data([plain]))) == [plain]


def test_markup_is_not_escaped_twice() -> None:
    assert tag("b", tag("i", "<"), "&", None, hidden=True, title=None) == "<b hidden><i>&lt;</i>&amp;</b>"
    assert isinstance(escape(Markup("<b>")), Markup)


def test_a_log_of_100000_steps_stays_a_small_page(tmp_path: Path) -> None:
    folder = tmp_path / "run-7"
    jobs = [histories.Job(50 * number, 50 * number + 50, None) for number in range(40)]
    histories.write_history(folder, jobs, every=1, keep=3)
    histories.write_lines(folder / LOG_NAME, histories.log_lines(100_000))
    page = render(facts_of(folder))
    assert len(page.encode()) < 2_000_000
    assert max(len(path["d"] or "") for path in Elements(page).of("path")) < 60_000


@pytest.mark.parametrize("num_classes", [1, 2, 13, 31, 1000])
def test_any_number_of_classes_has_figures_that_are_small(tmp_path: Path, num_classes: int) -> None:
    histories.checkpoint(tmp_path, 10)
    record = histories.evaluation(10, classes=[f"class {index}" for index in range(num_classes)])
    (tmp_path / EVALUATION_NAME).write_text(json.dumps(record))
    page = render(facts_of(tmp_path))
    assert ('class="matrix' in page) == (num_classes <= 30)
    assert len(page.encode()) < 300_000


def test_without_counts_of_pairs_there_is_no_matrix(tmp_path: Path) -> None:
    histories.checkpoint(tmp_path, 10)
    (tmp_path / EVALUATION_NAME).write_text(json.dumps(histories.evaluation(10, confusion=None, samples=[])))
    elements = Elements(render(facts_of(tmp_path)))
    assert "Confusion" not in elements.text
    assert "Accuracy by class" in elements.text
