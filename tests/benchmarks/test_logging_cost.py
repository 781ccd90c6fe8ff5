"""What logging a row costs the training process: `pytest -m slow tests/benchmarks/test_logging_cost.py -s`."""

import statistics
import time
from pathlib import Path

import pytest
import wandb
from servers import Server

from explaind_track import open_run
from explaind_track.record.history import AXIS
from explaind_track.wandb_io.panels import Panels

KEYS, ROWS = 60, 400


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_row_beside_a_bare_run_log(mode: str, server: Server, tmp_path: Path) -> None:
    """Both in turns in one process and one run, so that whatever else the machine does meets both."""
    run = open_run("project", tmp_path, mode=mode)
    panels = Panels(run, tmp_path)
    spent: dict[str, list[float]] = {"bare": [], "ours": []}
    for number in range(ROWS):
        row = {AXIS: number, **{f"kernel/group{key}": number * 0.1 + key for key in range(KEYS - 1)}}
        for name, log in (("bare", run.log), ("ours", panels.log)):
            time.sleep(0.002)  # a step: back to back, one call pays for the other
            started = time.perf_counter()
            log(dict(row))
            spent[name].append(time.perf_counter() - started)
    bare, ours = (statistics.median(spent[name]) for name in ("bare", "ours"))
    print(f"\n{mode}: bare run.log {bare * 1e3:.3f} ms, ours {ours * 1e3:.3f} ms, ratio {ours / bare:.2f}")
    wandb.finish()
