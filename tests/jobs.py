"""What tests train: a small job, in this process or in several; and one short run of the main recipe."""

import atexit
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track import Quadrature, Query, Tracker

torch.set_num_threads(1)

TESTS = Path(__file__).parent
ROOT = TESTS.parent


@dataclass
class Job:
    """An MLP on three classes in float64, trained on mini-batches of a data set of 24 samples."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    x: Tensor
    y: Tensor
    schedule: Any
    seed: int = 0

    @property
    def queries(self) -> dict[str, Query]:
        return {
            "query": Query.outputs(self.x[:5], self.y[:5]),
            "loss": Query.loss(self.x[5:9], self.y[5:9]).mean(),
        }

    def tracker(self, **options: Any) -> Tracker:
        options = {"queries": self.queries, "sample_loss": sample_loss, **options}
        return Tracker(self.model, self.optimizer, **options)

    def run(self, tracker: Tracker, steps: int, other_bits: bool = False) -> None:
        """Trains on with ragged batches: of 8, 8 and 5 samples. other_bits: round the loss otherwise."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(steps):
            size = 5 if tracker.number % 3 == 2 else 8
            index = torch.randperm(24, generator=generator)[:size]
            batch = (self.x[index], self.y[index])
            with tracker.step():
                self.optimizer.zero_grad()
                tracker.batch(batch, index=index)
                loss = sample_loss(self.model, batch).mean()
                (loss * 49 / 49 if other_bits else loss).backward()
                self.optimizer.step()
            self.schedule.step()


def sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "maximize": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, maximize=True),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
}


def make_job(optimizer: str = "adamw", dtype: torch.dtype = torch.float64) -> Job:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    x = torch.randn(24, 4, dtype=dtype)
    y = torch.randint(0, 3, (24,))
    made = OPTIMIZERS[optimizer](model.parameters())
    return Job(model, made, x, y, torch.optim.lr_scheduler.StepLR(made, 2, 0.8))


KEEPS = [
    ("step", "group"),
    ("step", "group", "query", "output"),
    ("query", "output"),
    ("seen", "group", "query", "sample"),
    ("step", "query", "output", "sample"),
    ("sample",),
]
"""Choices of axes that take the different ways through an explanation."""


def options_of(job: Job, keep: tuple[str, ...]) -> dict[str, Any]:
    """What `explain` needs for these axes of a job's steps 1 to 8; a sum per class where only samples are kept."""
    options: dict[str, Any] = {"keep": keep, "window": (1, 9), "quadrature": Quadrature.fixed(1)}
    if "sample" in keep:
        options |= {"sample_loss": sample_loss, "data": lambda index: (job.x[index], job.y[index])}
    if keep == ("sample",):
        options["partition"] = job.y
    return options


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a process that a test starts: it finds the package and this module, computes in one thread,
    and does not take part in the W&B service of this process."""
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return {**own, "PYTHONPATH": f"{ROOT}:{TESTS}", "OMP_NUM_THREADS": "1", **more}


def in_ranks(script: str, directory: Path, count: int) -> None:
    """Runs `script RANK DIRECTORY` in so many processes at once; what one of them raises is shown."""
    command = [sys.executable, "-W", "error::UserWarning", script]
    with ExitStack() as stack:
        running = []
        for rank in range(count):
            errors = stack.enter_context((directory / f"{rank}.txt").open("w"))
            arguments = [str(rank), str(directory)]
            process = subprocess.Popen([*command, *arguments], stderr=errors, env=child_environment())
            stack.callback(process.wait)
            stack.callback(process.kill)
            running.append(process)

        # Until all are done or one has failed, for which the others would wait.
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running):
                break
            time.sleep(0.05)

        for rank, process in enumerate(running):
            assert process.poll() in (0, None), (directory / f"{rank}.txt").read_text()[-3000:]


def in_child(action: Callable[[], Any]) -> int:
    """Runs the action in a process of its own, with the handlers of an exit that are its own; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        atexit._clear()  # neither this nor the run of the handlers below has a public name
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(60)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with suppress(SystemExit):
            action()
        code = 0
    finally:  # never back into the test, whatever happens
        try:
            atexit._run_exitfuncs()
        finally:
            os._exit(code)


@dataclass(frozen=True)
class MainJob:
    """A finished run of `recipes.modulo_addition`, too short to learn anything."""

    out: Path
    stdout: str
    stderr: str
