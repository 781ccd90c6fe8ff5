"""The house keeps its order: where files lie, what they import, how long they are; and bodies have paragraphs."""

import ast
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
from jobs import ROOT, TESTS

PACKAGE = ROOT / "explaind_track"
FOLDERS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
FRAMEWORKS = ("lightning", "transformers")
MOST_LINES = 400
LONG_BODY = 15
MOST_SOLID = 0.25
"""The share of long bodies that may be without a blank line or a comment."""


def python_files(*roots: Path) -> Iterator[Path]:
    return (path for root in roots for path in sorted(root.rglob("*.py")) if path.name != "wandb_standin.py")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_module_imports_alone(tmp_path: Path) -> None:
    """Where nothing else of the package is imported yet, not even its `__init__.py`. The callbacks for frameworks,
    which may be missing and take half a minute to import, have tests of their own."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in python_files(*FOLDERS) if path.stem not in FRAMEWORKS]
    modules = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    failed = []
    for module in modules:
        child = os.fork()
        if not child:
            import_alone(module, tmp_path)
        if os.waitpid(child, 0)[1]:
            failed.append(module)
    assert failed == []


def import_alone(module: str, compiled: Path) -> NoReturn:
    """Ends the process; with 0 if the module could be imported."""
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(compiled)
    for name in [name for name in sys.modules if name.partition(".")[0] == "explaind_track"]:
        del sys.modules[name]
    bare = ModuleType("explaind_track")
    bare.__path__ = [str(PACKAGE)]
    sys.modules["explaind_track"] = bare

    code = 1
    try:
        importlib.import_module(module)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:  # never back into the test, whatever happens
        os._exit(code)


def test_the_package_holds_folders_that_say_what_lives_in_them() -> None:
    here = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert here == {"__init__.py", "__main__.py", "py.typed", *(folder.name for folder in FOLDERS)}
    assert [folder.name for folder in FOLDERS if not (folder / "README.md").is_file()] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folders_page_names_every_file(folder: Path) -> None:
    page = (folder / "README.md").read_text()
    names = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert [name for name in names if name not in page and f"`{name.removesuffix('.py')}`" not in page] == []


def test_no_test_imports_another() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in python_files(TESTS)
        for module in imported(path)
        if module == "conftest" or module.startswith("test_")
    ]
    assert found == []


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in python_files(PACKAGE, TESTS, ROOT / "recipes")}
    assert {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def long_bodies(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The functions whose bodies, docstrings not counted, are `LONG_BODY` lines and more, with these lines."""
    lines = path.read_text().splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef):
            code = node.body[1:] if ast.get_docstring(node) else node.body
            body = lines[code[0].lineno - 1 : node.end_lineno] if code else []
            if len(body) >= LONG_BODY:
                yield f"{path.relative_to(ROOT)}: {node.name}", body


def test_long_bodies_have_paragraphs() -> None:
    bodies = dict(found for path in python_files(PACKAGE) for found in long_bodies(path))
    solid = [name for name, body in bodies.items() if not any(not line.strip() or "# " in line for line in body)]
    assert len(solid) <= MOST_SOLID * len(bodies), "\n".join(solid)
