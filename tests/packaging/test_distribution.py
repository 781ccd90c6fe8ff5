"""The distributions that a release consists of: what they hold, and that they work away from the source tree."""

import os
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from jobs import ROOT

NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "wandb")

TYPED = """\
from typing import assert_type
import explaind_track
assert_type(explaind_track.Quadrature.fixed(2), explaind_track.Quadrature)
assert_type(explaind_track.Trajectory.open("runs/first").state_dict("last"), int)
"""
"""The last line is wrong twice: a number is asked for, and tensors come."""


@dataclass
class Built:
    """The two files of a release."""

    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A copy of the source, built as for a release: the wheel from what the sdist holds."""
    directory = tmp_path_factory.mktemp("release")
    shutil.copytree(ROOT, directory / "source", ignore=NOT_SOURCE)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", directory / "dist", within=directory / "source")
    (sdist,) = (directory / "dist").glob("*.tar.gz")
    (wheel,) = (directory / "dist").glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment with the wheel in it, and this interpreter's other packages behind it."""
    environment = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", environment, within=environment)
    python = environment / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        built.wheel,
        within=environment,
    )

    # Plain paths: what these directories' own .pth files add, such as an editable explaind_track, stays away.
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    return environment / "bin"


@pytest.fixture
def unpacked(built: Built, tmp_path: Path) -> Path:
    """The sdist without the package, which has to come from elsewhere."""
    with tarfile.open(built.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (directory,) = tmp_path.glob("explaind_track-*")
    shutil.rmtree(directory / "explaind_track")
    return directory


def run(*command: str | Path, within: Path, fails: bool = False) -> str:
    """What the command prints, where nothing points to the source tree."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=within, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout


def files_of(*folders: str) -> set[str]:
    """All that these folders of the source hold, and what is no rest of a run of theirs."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in paths if "__pycache__" not in path.parts}


def test_the_distributions_are_whole(built: Built) -> None:
    """Sdist: all that it takes to test and to develop. Wheel: the modules, their types, and nothing else."""
    with tarfile.open(built.sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    papers = {"README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "constraints.txt"}
    assert in_sdist >= files_of("explaind_track", "recipes", "tests") | papers | {"pyproject.toml"}

    with zipfile.ZipFile(built.wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {name for name in files_of("explaind_track") if name.endswith(".py")}
    assert in_wheel == modules | files_of("explaind_track/cli/page") | {"explaind_track/py.typed"}


def test_one_version_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")]
    number, date = headings[0].removeprefix("## [").split("] - ")
    citation = (ROOT / "CITATION.cff").read_text()
    assert number == version
    assert f"\nversion: {version}\n" in citation
    assert f"\ndate-released: {date}\n" in citation


@pytest.mark.slow
def test_an_installed_wheel_is_imported_and_has_its_command(built: Built, installed: Path, tmp_path: Path) -> None:
    told = run(
        installed / "python", "-c", "import explaind_track as e; print(e.__version__, e.__file__)", within=tmp_path
    )
    version, file = told.split()
    assert f"-{version}-" in built.wheel.name
    assert Path(file).is_relative_to(installed.parent)
    assert "explain" in run(installed / "explaind-track", "--help", within=tmp_path)


@pytest.mark.slow
def test_an_installed_wheel_is_typed(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TYPED)
    checker = [sys.executable, "-m", "mypy", "--strict", "--python-executable", installed / "python"]
    told = run(*checker, "script.py", within=tmp_path, fails=True)
    assert "untyped" not in told
    assert {line.split(":")[1] for line in told.splitlines() if "error" in line and ":" in line} == {"4"}
    assert "[arg-type]" in told
    assert "[assert-type]" in told


@pytest.mark.slow
def test_the_tests_of_an_sdist_run_against_an_installed_wheel(installed: Path, unpacked: Path) -> None:
    told = run(installed / "python", "-m", "pytest", "-q", "tests/core", within=unpacked)
    assert " passed" in told
