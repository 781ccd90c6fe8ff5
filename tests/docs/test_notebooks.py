"""The tutorials run from their first cell to the last, in a kernel of their own, and show tables and figures."""

from pathlib import Path

import pytest
from jobs import ROOT, child_environment

NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_tutorial_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for name, value in child_environment(WANDB_MODE="offline", PYTHONWARNINGS="error::UserWarning").items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    kinds = {kind for output in shown for kind in output["data"]}
    assert "text/html" in kinds
    text = "\n".join(str(output["data"].get("text/plain")) for output in shown)
    assert "tensor(" not in text.replace("tensor([[", "")
    if "plot()" in "".join(cell.source for cell in notebook.cells):
        assert "image/png" in kinds, "the figure is not drawn"
