"""The report of tokens, in a browser: coloured text that can be read on any screen, and stays text."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner

from explaind_track import Influence
from explaind_track.cli.main import main

TOKENS = [
    " the",
    " cat",
    "</span><script>alert(1)</script>",
    "\x1b[31m",
    " sat\n",
    "' onclick='x",
    " {{ 7 * 7 }}",
    " end",
]

CONTRASTS = """() => [...document.querySelectorAll('.text span')].map(span => {
    const bright = color => color.match(/[\\d.]+/g).slice(0, 3).map(part => {
        const share = part / 255;
        return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    }).reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0.05);
    const own = getComputedStyle(span), page = getComputedStyle(document.body).backgroundColor;
    const below = own.backgroundColor === 'rgba(0, 0, 0, 0)' ? page : own.backgroundColor;
    const both = [bright(own.color), bright(below)];
    return Math.max(...both) / Math.min(...both);
})"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).normal(size=(2, 2, len(TOKENS)))
    labels = {"part": ["kernel", "regularization"], "group": ["<b>mlp", "head"], "token": np.array(TOKENS, object)}
    data = {"influence": (("part", "group", "token"), values), "input": ("token", [0] * 5 + [1] * 3)}
    Influence(xr.Dataset(data, labels)).save(tmp_path / "tokens.safetensors")
    return tmp_path / "tokens.safetensors"


def report(*arguments: str) -> Path:
    done = CliRunner().invoke(main, ["report", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    return Path(json.loads(done.stdout)["report"])


def test_what_tokens_say_is_escaped_and_the_rest_refused(file: Path, tmp_path: Path) -> None:
    page = report(str(file)).read_text()
    assert page.count("<script") == 3
    assert "<b>mlp" not in page
    assert "\x1b" not in page
    assert "{{ 7 * 7 }}" in page
    Influence(xr.Dataset({"influence": ("part", [1.0])}, {"part": ["kernel"]})).save(tmp_path / "other.safetensors")
    done = CliRunner().invoke(main, ["report", str(tmp_path / "other.safetensors")])
    assert done.exit_code == 1
    assert "keep=('group', 'token')" in done.output


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_coloured_text_can_be_read(file: Path, width: int, scheme: Any) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        complaints: list[str] = []
        page.on("console", lambda said: complaints.append(said.text))
        page.goto(report(str(file)).as_uri())

        assert page.evaluate("document.documentElement.scrollWidth") == width
        shown = page.locator(".colored").first.locator(".text")
        assert shown.count() == 2
        assert shown.first.inner_text().startswith(" the cat</span><script>alert(1)</script>\\x1b[31m")
        assert min(page.evaluate(CONTRASTS)) > 4.5
        assert page.locator(".text span").first.get_attribute("title").endswith(" nats")
        assert page.locator("details.more .colored").count() == 2
        assert complaints == []
        browser.close()
