"""The examples in docstrings give what they show, and the README's Python compiles and imports names that exist."""

import ast
import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import ROOT

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS | doctest.REPORT_NDIFF
NEEDS = {"lightning.py": "lightning", "transformers.py": "transformers", "sample_losses.py": "transformers"}
"""The package that a file's examples need, where the development extra lacks it."""
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def examples() -> Iterator[doctest.DocTest]:
    """Every docstring with a `>>>`. None of the names in its module is known to it: a reader who pastes it has none."""
    for path in sorted((ROOT / "explaind_track").rglob("*.py")):
        for name, node in documented(ast.parse(path.read_text())):
            text = ast.get_docstring(node, clean=False) or ""
            if ">>>" in text:
                where = f"{path.relative_to(ROOT / 'explaind_track')}{name}"
                yield doctest.DocTestParser().get_doctest(text, {}, where, str(path), node.body[0].lineno - 1)


def documented(
    node: ast.Module | ast.ClassDef | ast.FunctionDef, name: str = ""
) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]]:
    """Module, classes, functions and methods, with their names."""
    yield name, node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from documented(child, f"{name}.{child.name}")


@pytest.mark.usefixtures("closing_wandb")
@pytest.mark.parametrize("example", list(examples()), ids=lambda example: example.name)
def test_an_example_gives_what_it_shows(
    example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = NEEDS.get(Path(str(example.filename)).name)
    if needed is not None:
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    failed = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=told.append).failed
    assert not failed, "".join(told)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_readme_imports_what_there_is(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and "callbacks" not in str(node.module):
            module = importlib.import_module(str(node.module))
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {', '.join(missing)}"
