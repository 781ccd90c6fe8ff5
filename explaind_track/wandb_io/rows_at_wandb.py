"""Which rows of a run W&B has."""

import time
from collections import Counter
from typing import Any

from explaind_track.errors import TrajectoryError
from explaind_track.record.history import AXIS

SETTLE_SECONDS = 120.0
"""How long W&B may take until its history shows the rows that it has received."""


def find_run(path: str) -> Any:
    """The run at W&B, or None."""
    import wandb

    try:
        return wandb.Api().run(path)
    except (wandb.errors.Error, ValueError) as error:
        if "not find" in str(error) or "not found" in str(error):
            return None
        raise


def steps_at_wandb(path: str, expected: int) -> Counter[int]:
    """How often each training step is in the run's history, once that shows all the rows that W&B has received.

    expected: the `_step` that comes next. Raises TrajectoryError if W&B does not get there, since rows that are not
    shown yet would be sent twice.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        run = find_run(path)
        steps = [row["_step"] for row in run.scan_history(keys=["_step"])] if run is not None else []
        if max(steps, default=-1) + 1 >= expected:
            return Counter(int(row[AXIS]) for row in run.scan_history(keys=[AXIS])) if steps else Counter()
        if time.monotonic() > deadline:
            raise TrajectoryError(f"W&B does not show all the rows of {path} that it has received; try again later")
        time.sleep(0.5)


def missing_rows(rows: list[dict[str, Any]], at_wandb: Counter[int]) -> list[dict[str, Any]]:
    """The rows that W&B lacks; of several rows of a step, the last."""
    found, missing = Counter(at_wandb), []
    for row in rows:
        if found[row[AXIS]]:
            found[row[AXIS]] -= 1
        else:
            missing.append(row)
    return missing
