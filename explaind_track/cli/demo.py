"""The main job in small, for somebody who has installed the package and nothing else: a model that groks, explained."""

import shutil
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track.cli.common import AS_JSON, report_errors, tell
from explaind_track.core.queries import Query
from explaind_track.explanation.task import Task

MODULUS = 23
TRAINED = 0.8
"""The share of all pairs that is trained on."""

STEPS = 1000
"""At most; it ends soon after 99% of the held-out pairs are right."""

RIGHT = 0.99
GO_ON = 50
EVALUATE_EVERY = 10


class Adder(nn.Module):
    """Pairs of numbers (N, 2) → scores of their sum modulo `MODULUS`, (N, MODULUS)."""

    def __init__(self, width: int = 32, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(MODULUS, width)
        self.hidden = nn.Linear(2 * width, hidden)
        self.decoder = nn.Linear(hidden, MODULUS)

    def forward(self, pairs: Tensor) -> Tensor:
        scores: Tensor = self.decoder(F.relu(self.hidden(self.embedding(pairs).flatten(1))))
        return scores


def sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of each pair, (N,)."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Pairs and their sums: those to train on, and those held out."""
    numbers = torch.arange(MODULUS)
    pairs = torch.cartesian_prod(numbers, numbers)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    cut = int(TRAINED * len(pairs))
    (train, held_out), sums = (pairs[order[:cut]], pairs[order[cut:]]), pairs.sum(1) % MODULUS
    return (train, sums[order[:cut]]), (held_out, sums[order[cut:]])


def make_model() -> Adder:
    """The model before training, in float64: its course depends on no machine's rounding."""
    torch.manual_seed(0)
    return Adder().double()


def task(run: str) -> Task:
    """The job behind the demo, for commands that need one: `explaind-track audit RUN explaind_track.cli.demo:task`."""
    (x, y), held_out = make_data()
    return Task(make_model(), Query.outputs(*held_out), 1, sample_loss, lambda index: (x[index], y[index]))


def train(directory: Path, steps: int, progress: bool) -> dict[str, Any]:
    """Trains, with every step explained and recorded; returns what has happened."""
    from tqdm import tqdm

    from explaind_track.tracking.tracker import Tracker

    train_set, held_out = make_data()
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=2.0)
    tracker = Tracker(
        model,
        optimizer,
        queries={"test": Query.outputs(*held_out), "test_loss": Query.loss(*held_out).mean()},
        sample_loss=sample_loss,
        trajectory=directory,
        samples_every=50,
    )

    found: dict[str, Any] = {"memorised_at": None, "generalised_at": None}
    last = steps
    with tqdm(total=steps, desc="train", unit="step", disable=not progress) as bar:
        while tracker.number < last:
            with tracker.step():
                optimizer.zero_grad()
                tracker.batch(train_set, index=torch.arange(len(train_set[0])))
                if tracker.samples_due:
                    tracker.backward()  # from per-sample gradients, whose norms the table of samples shows
                else:
                    loss = sample_loss(model, train_set).mean()
                    loss.backward()
                    tracker.log({"train/loss": loss.item()})
                optimizer.step()
            bar.update()
            if tracker.number % EVALUATE_EVERY and tracker.number < last:
                continue

            on_train, on_test = (_accuracy(model, pairs) for pairs in (train_set, held_out))
            tracker.log({"train/accuracy": on_train})
            bar.set_postfix(train=f"{on_train:.3f}", held_out=f"{on_test:.3f}")
            found |= {"train_accuracy": on_train, "test_accuracy": on_test}
            if on_train >= RIGHT and found["memorised_at"] is None:
                found["memorised_at"] = tracker.number
            if on_test >= RIGHT and found["generalised_at"] is None:
                found["generalised_at"] = tracker.number
                last = min(last, tracker.number + GO_ON)
    tracker.finish()

    whole = tracker.influence("test", ("query", "output")).faithfulness()
    return {
        "steps": tracker.number,
        **found,
        "agreement": whole["agreement"],
        "residual_median": float(tracker.influence("test").residual.median()),
        "seconds": {name: round(value, 1) for name, value in tracker.seconds.items()},
    }


@torch.no_grad()
def _accuracy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    return float((model(batch[0]).argmax(1) == batch[1]).float().mean())


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False), default=Path("explaind_track_demo"))
@click.option("--steps", type=click.IntRange(min=1), default=STEPS, show_default=True, help="At most so many.")
@AS_JSON
@report_errors
def demo(directory: Path, steps: int, as_json: bool) -> None:
    """Train and explain a small model, and write its report.

    A network learns to add modulo 23: it knows all training pairs by heart long before it gets pairs right that it has
    not seen. Every step is explained and recorded in DIRECTORY, a new one (explaind_track_demo if not given). It takes
    a minute or two on one core, and no network, account or file of yours.
    """
    from explaind_track.cli.report_command import write_report_of

    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty; name a new directory: explaind-track demo DIRECTORY")
    _require_room(directory)

    started = perf_counter()
    found = train(directory / "trajectory", steps, progress=not as_json)
    report = write_report_of(str(directory))
    found |= {"run": str(directory), "report": str(report), "seconds_total": round(perf_counter() - started, 1)}
    tell(as_json, found, _told(found))


def _require_room(directory: Path) -> None:
    """Raises OSError for a disk that is all but full, before any work."""
    place = next(parent for parent in (directory.absolute(), *directory.absolute().parents) if parent.exists())
    if (free := shutil.disk_usage(place).free) < 3e8:
        raise OSError(f"{place} has {free / 1e6:.0f} MB left, and the record takes up to 300 MB: name another place")


def _told(found: dict[str, Any]) -> str:
    def at(key: str) -> str:
        return "never" if found[key] is None else f"at step {found[key]}"

    run = found["run"]
    return f"""
{found["steps"]} steps in {found["seconds_total"]:.0f} s, every one explained.
  99% of the training pairs right {at("memorised_at")}, 99% of the held-out pairs {at("generalised_at")}
  the sum of all influences decides as the model does on {found["agreement"]:.1%} of the held-out pairs
  half of the steps leave less than {found["residual_median"]:.1e} of the change over

Open {found["report"]} in a browser. Then, of the same run:
  explaind-track show {run} --once
  explaind-track explain {run} explaind_track.cli.demo:task
  explaind-track audit {run} explaind_track.cli.demo:task
A loop of your own takes fifteen lines more: python -c "import explaind_track; help(explaind_track.Tracker)\""""
