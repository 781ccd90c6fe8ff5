"""What MkDocs does beside rendering pages: brings in pages that live with the code, and looks for names without one."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

PAGES = {
    "changelog.md": "CHANGELOG.md",
    "exactness.md": "tests/README.md",
    "recipes/index.md": "recipes/README.md",
}
"""Pages of the site, by the file of the source that they are."""


def on_files(files: Files, config: Any) -> Files:
    """Adds pages and pictures of the source. Raises PluginError for a public name that no page of the reference has."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=_within_site((ROOT / source).read_text(), page)))
    for picture in sorted((ROOT / "recipes").glob("**/*.png")):
        place = f"recipes/{picture.relative_to(ROOT / 'recipes')}"
        files.append(File.generated(config, place, abs_src_path=str(picture)))

    shown = {name for path in (ROOT / "docs" / "reference").glob("*.md") for name in named_in(path.read_text())}
    if missing := sorted(public_names() - shown):
        raise PluginError(f"no page of docs/reference has a `:::` for the public name(s) {', '.join(missing)}")
    if unknown := sorted(name for name in shown - public_names() if not name.startswith("explaind_track.callbacks.")):
        raise PluginError(f"docs/reference has a `:::` for {', '.join(unknown)}, which is no public name")
    return files


def named_in(page: str) -> list[str]:
    """The names that a page of the reference describes."""
    return re.findall(r"^::: (\S+)", page, flags=re.MULTILINE)


def public_names() -> set[str]:
    """The dotted names that the package exports, its namespaces' names included."""
    import explaind_track

    names: set[str] = set()
    for module in (explaind_track, explaind_track.analysis, explaind_track.errors, explaind_track.what_if):
        names |= {f"{module.__name__}.{name}" for name in module.__all__}
    return names - {f"explaind_track.{name}" for name in ("analysis", "errors", "what_if")}


def _within_site(text: str, page: str) -> str:
    """The text of a file of the source, its links to files that the site does not have made plain words."""
    up = "../" * page.count("/")
    text = text.replace("](recipes/README.md)", f"]({up}recipes/index.md)")
    return re.sub(r"\[([^\]]+)\]\((?!http|#|figures/|[\w/]*index\.md)[^)]*\)", r"\1", text)
