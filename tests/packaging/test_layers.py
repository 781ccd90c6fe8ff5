"""The contracts of `pyproject.toml` on what a file may import: they hold, and they notice what breaks them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import ROOT

UPWARDS = "from explaind_track.tracking.tracker import Tracker\n"
FOR_TYPES = f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {UPWARDS}"
FRONT = "from explaind_track import Tracker\n"
CIRCLE = "from explaind_track.core import observer\n"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its settings, to be broken."""
    shutil.copytree(ROOT / "explaind_track", tmp_path / "explaind_track")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(directory: Path) -> tuple[int, str]:
    """Exit status and output of `lint-imports`, which analyses the package of the directory that it runs in."""
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", program, "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_contracts_hold(copy: Path) -> None:
    status, output = lint(copy)
    assert status == 0, output


@pytest.mark.parametrize(
    ("file", "imports", "told"),
    [
        ("core/step.py", UPWARDS, "explaind_track.core.step -> explaind_track.tracking.tracker"),
        ("core/step.py", FOR_TYPES, "explaind_track.core.step -> explaind_track.tracking.tracker"),
        ("callbacks/base.py", FRONT, "explaind_track.callbacks.base is not allowed to import explaind_track"),
        ("core/rules.py", CIRCLE, "No cycles are allowed in explaind_track.core"),
    ],
    ids=["upwards", "upwards-for-types", "front", "circle"],
)
def test_an_import_against_the_layers_is_told(copy: Path, file: str, imports: str, told: str) -> None:
    path = copy / "explaind_track" / file
    path.write_text(path.read_text() + imports)
    status, output = lint(copy)
    assert status == 1
    assert told in output


def test_a_new_folder_has_to_name_its_layer(copy: Path) -> None:
    (copy / "explaind_track" / "attic").mkdir()
    (copy / "explaind_track" / "attic" / "__init__.py").touch()
    status, output = lint(copy)
    assert status == 1
    assert "attic" in output
