"""The report: read in a real browser, alone, on any screen; and whatever a record says, no script of it runs."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from jobs import make_job

from explaind_track.cli.main import main
from explaind_track.cli.report import make_report
from explaind_track.cli.report_figures import POINTS, Figure, drawing
from explaind_track.record.history import append_row
from explaind_track.record.media import Table

BAD = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'--><svg onload=alert(3)>{{ 7 * 7 }}&lt;b>"


def report(run: Path) -> Path:
    done = CliRunner().invoke(main, ["report", str(run), "--json"])
    assert done.exit_code == 0, done.output
    return Path(json.loads(done.stdout)["report"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 9 steps without W&B, in `one/trajectory`."""
    job, place = make_job(), tmp_path_factory.mktemp("runs") / "one"
    tracker = job.tracker(trajectory=place / "trajectory", keyframe_every=4, samples_every=8, map_queries=2)
    job.run(tracker, 9)
    tracker.finish()
    return place


@pytest.fixture(scope="module")
def browser() -> Any:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield made
        made.close()


class Opened:
    """A page in the browser, and all that it asked for and complained of."""

    def __init__(self, browser: Any, target: Path, width: int = 1280, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda said: self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.goto(target.as_uri())
        self.page.wait_for_function("document.querySelectorAll('.u-over').length === figures.length")
        self.outside = [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_report_opens_alone_and_can_be_read_off(run: Path, browser: Any, width: int, scheme: str) -> None:
    opened = Opened(browser, report(run), width, scheme)
    page = opened.page
    assert (opened.outside, opened.complaints) == ([], [])
    assert page.locator("h1").inner_text() == "one"
    headings = page.locator("h2").all_inner_texts()
    assert (headings[0], headings[-1]) == ("What the groups did, over all steps", "Training samples")
    assert page.locator("nav a").count() == len(headings)
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0 && image.alt)")
    assert page.evaluate("document.documentElement.scrollWidth") == width  # tables scroll in themselves
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 21, 28)")

    # the curves are told of to who cannot see them
    alternatives = page.evaluate("[...document.querySelectorAll('.plot')].map(plot => plot.ariaLabel)")
    assert len(alternatives) > 5
    assert all(re.search(r" from \S+ to \S+, between ", words) for words in alternatives)

    # values under the mouse, then a stretch of the steps, then all of it again
    over = page.locator(".u-over").first
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    assert page.locator(".u-legend .u-value").first.inner_text() == "4"
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, middle, steps=5)
    page.mouse.up()
    zoomed = page.evaluate("[...plots.values()][0].scales.x.max - [...plots.values()][0].scales.x.min")
    assert 0 < zoomed < 4

    with page.expect_download() as waited:
        page.locator(".download").first.click()
    assert waited.value.suggested_filename == "loss.png"
    assert waited.value.path().read_bytes().startswith(b"\x89PNG")
    assert opened.complaints == []


def test_a_policy_lets_no_script_run_but_the_pages(run: Path, browser: Any) -> None:
    opened = Opened(browser, report(run))
    before = len(opened.complaints)
    opened.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.broken=1\">')")
    opened.page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'broken = 2'}))")
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate("window.broken") is None
    assert any("Content Security Policy" in text for text in opened.complaints[before:])


def hostile(directory: Path) -> Path:
    """A run in which everything that has a name, or is a word, is HTML."""
    table = Table([BAD, "picture"], [[BAD, b"\x89PNG" + BAD.encode()], [None, 0.5]])
    rows = [
        {f"kernel/{BAD}": 1.0, "kernel/total": 1.0, f"{BAD}/loss": 2.0, f"residual/{BAD}": 1e-3, f"D/{BAD}": 0.5},
        {f"reg/{BAD}": 1.0, f"loss/kernel/{BAD}": 1.0, "train/note": BAD, "samples/most_influential": table},
    ]
    place = directory / BAD.replace("/", "")
    place.mkdir()
    for step, row in enumerate(rows):
        append_row(place, {"train/step": step, **row})
    tie = {"entity": "<b>me<b>", "project": "<i>", "id": "<img src=x onerror=alert(4)>", "name": BAD}
    more = {"offline": True, "directory": BAD, "config": {BAD: [BAD, {BAD: BAD}], "explaind_track": {BAD: BAD}}}
    (place / "run.json").write_text(json.dumps({**tie, **more}))
    return place


def test_no_script_of_a_record_runs(tmp_path: Path, browser: Any) -> None:
    opened = Opened(browser, report(hostile(tmp_path)))
    opened.page.wait_for_timeout(200)
    assert (opened.outside, opened.complaints) == ([], [])
    assert opened.page.evaluate("document.scripts.length") == 3
    assert opened.page.evaluate("document.querySelectorAll('svg, b, [onerror], [onload]').length") == 0
    assert BAD in opened.page.locator("td").first.inner_text()
    assert BAD in opened.page.locator(".u-legend").all_inner_texts()[2]


def test_what_a_record_says_is_escaped(tmp_path: Path) -> None:
    html = report(hostile(tmp_path)).read_text()
    assert BAD not in html
    assert not re.search(r"<(script|link|img|svg)[^>]+(src|href|onload)=['\"]?(http|//|x|alert)", html)
    assert html.count("<script") == 3
    assert "{{ 7 * 7 }}" in html
    with pytest.raises(ValueError, match="no rows yet"):
        make_report([], {}, "empty")


@given(st.integers(1, 4000), st.integers(0, 2**32))
def test_a_long_figure_keeps_the_lowest_and_the_highest_of_every_curve(length: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(-99, 99, (length, 3)).tolist()
    rows = [{"train/step": step, **dict(zip("abc", line, strict=True))} for step, line in enumerate(values)]
    drawn = drawing(Figure("f", {"a": "a", "b": "b", "c": "c"}), rows)
    assert drawn["steps"] == sorted({*drawn["steps"]})
    assert len(drawn["steps"]) <= POINTS + 2
    for place, curve in enumerate(drawn["curves"]):
        assert curve["values"] == [values[step][place] for step in drawn["steps"]]
        assert {min(curve["values"]), max(curve["values"])} == {f(line[place] for line in values) for f in (min, max)}


def test_the_report_of_a_long_run_is_small() -> None:
    keys = [
        f"{section}/layer{number}.weight" for section in ("kernel", "reg", "D", "loss/kernel") for number in range(20)
    ]
    rows = [{"train/step": step, **dict.fromkeys(keys, step * 7919 % 104729 / 104729)} for step in range(5000)]
    html = make_report(rows, {}, "long")
    assert "Of so many, figures have the rows in which a curve is lowest or highest" in html
    assert len(html.encode()) < 2_000_000
