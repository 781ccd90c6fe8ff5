"""Runs the Python of a page as its reader would: block after block, in one process, in an empty directory.

python snippets.py PAGE
"""

import re
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def blocks_of(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text())


def names_of_readme() -> dict[str, Any]:
    """What the README's blocks take for granted: a model, data, a loss and a loop's batches."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    x, y = torch.randn(40, 4), torch.randint(0, 3, (40,))
    model = torch.nn.Sequential()
    model.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh())
    model.head = torch.nn.Linear(8, 3)
    indices = [torch.arange(start, start + 10) for start in range(0, 40, 10)]

    def sample_loss(model: Any, batch: Any) -> Any:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    return {
        "torch": torch,
        "F": F,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01),
        "sample_loss": sample_loss,
        "data": lambda index: (x[index], y[index]),
        "x": x[:5],
        "y": y[:5],
        "x_train": x,
        "y_train": y,
        "x_test": x[:5],
        "y_test": y[:5],
        "loader": [((x[index], y[index]), index) for index in indices],
    }


def run(page: Path) -> int:
    """Runs the blocks; returns how many there were."""
    names: dict[str, Any] = {"__name__": "__main__"}
    if page.name == "README.md":
        names |= names_of_readme()
    for number, block in enumerate(blocks_of(page)):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    return number + 1
