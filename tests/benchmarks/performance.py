"""Writes `docs/performance.md`: what watching, recording and explaining cost, and what other packages take.

    PYTHONPATH=. python tests/benchmarks/performance.py

Ratios are of blocks that take turns in one process; beside each median stands the range that half of them lie in. Peak
memory is that of a process of its own. About ten minutes on an idle machine of two cores.
"""

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

import torch
from other_tools import GRADIENTS, QUERIES, SAMPLES, SCORES, Race
from tqdm import tqdm
from workloads import Workload, workloads

from explaind_track import Quadrature, Tracker, Trajectory, explain

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
BLOCK, TURNS = 6, 7
"""Steps in a block, and how often the blocks take turns."""

INTRODUCTION = """# What it costs, measured

Written by `PYTHONPATH=. python tests/benchmarks/performance.py`, on {machine}, {threads} threads, torch {torch}, {day}.
Ratios are of blocks of work that take turns in one process; beside each median, in brackets, is the range in which half
of the blocks lie. They depend on the machine: `cost/seconds_influence` beside `cost/seconds_training` is yours.
[What to turn](guides/cost.md) when it is too much.
"""


# -------------------------------------------------------------------------------------------------------- live steps


class Loop:
    """A training loop of a workload, watched or not."""

    def __init__(self, workload: Workload, **watched: Any) -> None:
        """watched: the arguments of its Tracker; none at all: there is no Tracker."""
        self.workload = workload
        self.model, self.optimizer = workload.start()
        watched = {"queries": {}, "groups": workload.groups, **watched} if watched else {}
        self.tracker = Tracker(self.model, self.optimizer, **watched) if watched else None

    def step(self) -> None:
        if self.tracker is None:
            self._train()
            return
        with self.tracker.step():
            self._train()

    def _train(self) -> None:
        self.optimizer.zero_grad()
        if self.tracker is not None:
            self.tracker.batch(self.workload.data, index=range(len(self.workload.data[1])))
        self.workload.losses(self.model, self.workload.data).mean().backward()
        self.optimizer.step()

    def block(self) -> None:
        for _ in range(BLOCK):
            self.step()


def loops(workload: Workload, directory: Path) -> dict[str, Loop]:
    """The plain loop first, then one that records, and one for each query."""
    found = {"plain": Loop(workload), "record": Loop(workload, trajectory=directory / "trajectory")}
    for name, query in workload.queries.items():
        found[name] = Loop(workload, queries={"query": query})
    return found


def in_turns(contenders: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """The seconds of each, turn by turn; a first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, work in contenders.items():
            started = perf_counter()
            work()
            if turn:
                seconds[name].append(perf_counter() - started)
    return seconds


def spread(values: Sequence[float], digits: str = ".2f") -> str:
    """The median, and the range of the middle half."""
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return f"{middle:{digits}} ({low:{digits}} to {high:{digits}})"


def relative(seconds: Sequence[float], to: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(seconds, to, strict=True)]


def live_rows(workload: Workload) -> list[list[str]]:
    """For each way to watch: how much longer a step takes than a plain one, in plain steps, and its memory."""
    with tempfile.TemporaryDirectory() as directory:
        watched = loops(workload, Path(directory))
        seconds = in_turns({name: loop.block for name, loop in watched.items()}, TURNS)
        plain, alone = seconds["plain"], peak(workload.name, "plain")
        size = sum(value.nbytes for value in watched["plain"].model.parameters()) / 1e6

        rows = []
        for name in (name for name in watched if name != "plain"):
            extra = [ratio - 1 for ratio in relative(seconds[name], plain)]
            more = max(0.0, peak(workload.name, name) - alone)
            what = "record alone" if name == "record" else name
            rows.append([workload.name, f"{1e3 * min(plain) / BLOCK:.1f} ms", what, spread(extra), f"{more:.0f} MB"])
        tracker = watched["record"].tracker
        assert tracker is not None
        tracker.finish()
        files = (path for path in (Path(directory) / "trajectory").rglob("*") if path.is_file())
        recorded = sum(path.stat().st_size for path in files) / 1e6 / tracker.number
        rows[0][2] += f": {recorded:.2f} MB a step ({recorded / size:.1f} of the parameters)"
    return rows


def peak(workload: str, loop: str) -> float:
    """The largest memory of a process that takes two blocks of this loop, in MB."""
    command = [sys.executable, __file__, workload, loop]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PAGE.parents[1])
    return float(done.stdout.split()[-1])


def print_peak(workload: str, loop: str) -> None:
    """The child's part in `peak`."""
    chosen = next(one for one in workloads() if one.name == workload)
    wanted = chosen if loop in ("plain", "record") else replace(chosen, queries={loop: chosen.queries[loop]})
    with tempfile.TemporaryDirectory() as directory:
        if loop == "plain":
            run = Loop(wanted)
        elif loop == "record":
            run = Loop(wanted, trajectory=Path(directory) / "trajectory")
        else:
            run = Loop(wanted, queries={"query": wanted.queries[loop]})
        run.block()
        run.block()
    lines = Path("/proc/self/status").read_text().splitlines()
    print(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024)


# ---------------------------------------------------------------------------------------------------------- afterwards


def offline_rows(workload: Workload) -> list[list[str]]:
    """What `explain` takes for each step of a record, in plain training steps."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "trajectory"
        plain, recorded = Loop(workload), Loop(workload, trajectory=directory)
        recorded.block()
        assert recorded.tracker is not None
        recorded.tracker.finish()
        trajectory = Trajectory.open(directory)

        def explained(query: Any, **options: Any) -> Callable[[], Any]:
            settings = {"groups": workload.groups, "quadrature": Quadrature.fixed(1), "progress": False, **options}
            return lambda: explain(trajectory, plain.model, query, **settings)

        inputs, labels = workload.data
        samples = {
            "keep": ("sample",), "sample_loss": workload.losses, "data": lambda index: (inputs[index], labels[index])
        }  # fmt: skip
        contenders = {"plain": plain.block, **{name: explained(query) for name, query in workload.queries.items()}}
        scalar = next(query for query in workload.queries.values() if query.reduction is not None)
        contenders["every sample, on the mean loss"] = explained(scalar, **samples)
        seconds = in_turns(contenders, 3)
        del contenders["plain"]
        return [[workload.name, name, spread(relative(seconds[name], seconds["plain"]))] for name in contenders]


# ---------------------------------------------------------------------------------------------------- other packages


def race_rows(
    ways: Mapping[str, tuple[Callable[[Race], Callable[[], Any]], str]], race: Race, turns: int, to: str | None
) -> list[list[str]]:
    """What each way takes, in seconds, or as a ratio to the way `to`; those that are not installed are named."""
    ready, rows = {}, {}
    for name, (prepare, what) in ways.items():
        try:
            ready[name] = prepare(race)
        except ImportError as error:
            rows[name] = [name, f"not installed where this was measured ({error.name})", what]

    seconds = in_turns(ready, turns)
    for name, own in seconds.items():
        figure = f"{spread(own)} s" if to is None else spread(relative(own, seconds[to]))
        rows[name] = [name, figure, ways[name][1]]
    return [rows[name] for name in ways]


# ------------------------------------------------------------------------------------------------------------ the page


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores ({names[0] if names else platform.processor()})"


def page() -> str:
    shown = workloads()
    with tempfile.TemporaryDirectory() as directory, tqdm(total=2 * len(shown) + 2, unit="table") as bar:

        def done(rows: list[list[str]]) -> list[list[str]]:
            bar.update()
            return rows

        live = [row for workload in shown for row in done(live_rows(workload))]
        offline = [row for workload in shown for row in done(offline_rows(workload))]
        race = Race.prepare(Path(directory) / "trajectory")
        gradients = done(race_rows(GRADIENTS, race, 20, next(iter(GRADIENTS))))
        scores = done(race_rows(SCORES, race, 3, None))

    head = INTRODUCTION.format(
        machine=processor(), threads=torch.get_num_threads(), torch=torch.__version__, day=date.today()
    )
    return "\n".join(
        [
            head,
            "## While it trains\n",
            "What a watched step takes beside its training, in training steps on the same batch (0.50: half as long",
            "again). One node a step, no tables of samples. Memory is the difference of the processes' peaks.\n",
            table(["model", "plain step", "watched", "extra time", "extra memory"], live),
            "\n## Afterwards\n",
            "`explain` of a record, one node a step, by groups: as a ratio to training the same steps.\n",
            table(["model", "explained", "time"], offline),
            "\n## Gradients of samples, beside other packages\n",
            "A CNN of 31k parameters, 128 images: as a ratio to the plain backward pass.\n",
            table(["way", "time", "what it gives"], gradients),
            "\n## Scores of samples, beside other packages\n",
            f"The same CNN, trained for 20 steps: scores of {SAMPLES:,} samples on the losses of {QUERIES} held-out",
            "images. They answer different questions, and only the first two are exact: see the column.\n",
            table(["way", "time", "what it gives"], scores),
            "\nTheir agreement with training again is in the [results](recipes/index.md), and the comparison with the",
            "paper's own package, which explains the same numbers, in `tests/benchmarks/test_against_explaind.py`.\n",
        ]
    )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print_peak(*sys.argv[1:])
    else:
        PAGE.write_text(page())
        print(f"wrote {PAGE}")
