"""The documentation: its snippets run, its tables are complete, its links lead somewhere, and the site can be built."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import util
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from jobs import ROOT, make_job
from snippets import blocks_of, run

from explaind_track.cli.main import main
from explaind_track.record.history import read_rows

DOCS = ROOT / "docs"
SLOW = {"transformers.md": "transformers", "lightning.md": "lightning", "accelerate.md": "accelerate"}
SLOW["language_models.md"] = "transformers"
"""Pages that need a framework, which may be missing and takes long to import."""

PAGES = [page for page in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))] if blocks_of(page)]


OF_FRAMEWORKS = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]
"""They warn of themselves."""

FIRST = ("README.md", "index.md", "loop.md", "wandb.md")
"""What newcomers copy: run in every run of the tests."""


def marks_of(page: Path) -> list[pytest.MarkDecorator]:
    if page.name in SLOW:
        return OF_FRAMEWORKS
    return [] if page.name in FIRST else [pytest.mark.slow]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=marks_of(page)) for page in PAGES],
    ids=lambda page: page.stem,
)
@pytest.mark.usefixtures("closing_wandb")
@pytest.mark.filterwarnings("ignore::explaind_track.errors.RerunWarning")  # tracker.backward() rounds otherwise
def test_the_snippets_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name in SLOW:
        pytest.importorskip(SLOW[page.name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run(page) == len(blocks_of(page))


def test_every_key_of_a_row_is_on_the_page_of_panels(tmp_path: Path) -> None:
    """Of a run with two queries and two losses, an auxiliary loss, a change from outside, and tables of samples."""
    job = make_job()
    queries = {**job.queries, "other": job.queries["query"], "far_loss": job.queries["loss"]}
    l1 = {"l1": lambda model: 1e-3 * sum(p.abs().sum() for p in model.parameters())}
    tracker = job.tracker(trajectory=tmp_path / "t", samples_every=1, map_queries=2, queries=queries, auxiliary=l1)
    for number in range(3):
        if number == 2:
            job.model[0].bias.data.mul_(0.5)
        with tracker.step():
            job.optimizer.zero_grad()
            tracker.batch((job.x, job.y), index=range(24))
            (tracker.backward() * 0 + l1["l1"](job.model)).backward()
            job.optimizer.step()
    tracker.finish()

    page = (DOCS / "panels.md").read_text()
    described = set(re.findall(r"`([^`\s]+/[^`\s]+)`", page))
    sections = {"l1": "<auxiliary>", "loss": "loss"}

    def pattern(key: str) -> str:
        """The key as the page has it: without the name of another query, with placeholders for names of ours."""
        first, _, rest = key.partition("/")
        if first in ("residual", "cost", "samples", "train"):
            return f"{first}/<query>" if first == "residual" and rest in queries else key
        if rest in ("loss", "accuracy"):
            return f"<query>/{rest}"
        parts = [part for part in key.split("/") if part not in ("query", "other", "far_loss")]
        if first == "far_loss":
            parts.insert(0, "loss")
        if parts[-1] in ("0", "2") or (parts[-1] == "total" and "momentum" not in parts):
            parts[-1] = "<group>"
        return "/".join(sections.get(part, part) for part in parts)

    found = {pattern(key) for row in read_rows(tmp_path / "t") for key in row} - {"train/step"}
    assert {"outside/<group>", "loss/kernel/<group>", "<auxiliary>/<group>", "samples/map"} <= found
    assert found - described == {"loss/<auxiliary>/<group>"} & found


def test_every_public_name_is_on_a_page_of_the_reference() -> None:
    """As the site's build asks for, which is slow to run: `docs/hooks.py`."""
    pytest.importorskip("mkdocs")
    spec = util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    shown = {name for page in (DOCS / "reference").glob("*.md") for name in hooks.named_in(page.read_text())}
    assert sorted(hooks.public_names() - shown) == []


def test_every_command_is_on_the_page_of_the_command_line() -> None:
    page = (DOCS / "guides" / "command_line.md").read_text()
    assert [name for name in main.commands if not re.search(rf"`{name}\b", page)] == []


def test_links_between_files_of_the_source_lead_somewhere() -> None:
    lost = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "explaind_track").rglob("*.md"), ROOT / "recipes" / "README.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if not urlsplit(target).scheme and not (page.parent / unquote(target)).exists():
                lost.append(f"{page.relative_to(ROOT)}: {target}")
    assert lost == []


# ------------------------------------------------------------------------------------------------------ the site


class Page(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        elif tag in ("img", "script") and found.get("src"):
            self.fetched.append(str(found["src"]))
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon"):
            self.fetched.append(str(found["href"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if util.find_spec("mkdocs") is None:
        pytest.skip("the site is built with the extra docs")
    directory = tmp_path_factory.mktemp("site")
    build(directory)
    return directory


def build(directory: Path, source: Path = ROOT, fails: bool = False) -> str:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(source),
        "NO_MKDOCS_2_WARNING": "1",
        "DISABLE_MKDOCS_2_WARNING": "true",
    }
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_its_links_lead_somewhere(site: Path) -> None:
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    lost = []
    for path, page in pages.items():
        for link in (*page.links, *page.fetched):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchored = not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].anchors
            if path.name != "404.html" and (not target.exists() or not anchored):
                lost.append(f"{path.relative_to(site.resolve())}: {link}")
    assert lost == []


@pytest.mark.slow
def test_the_site_fetches_nothing(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert [link for link in Page(path).fetched if urlsplit(link).netloc] == [], path


@pytest.mark.slow
def test_a_public_name_without_a_page_is_refused(tmp_path: Path) -> None:
    if util.find_spec("mkdocs") is None:
        pytest.skip("the site is built with the extra docs")
    for name in ("docs", "explaind_track", "recipes", "tests", "mkdocs.yml", "CHANGELOG.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").unlink()
    shutil.copytree(DOCS, tmp_path / "docs")
    page = tmp_path / "docs" / "reference" / "ask.md"
    page.write_text(page.read_text().replace("::: explaind_track.Quadrature\n", ""))
    assert "public name(s) explaind_track.Quadrature" in build(tmp_path / "site", tmp_path, fails=True)
