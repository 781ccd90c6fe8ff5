"""A rerun is the run bit for bit, and with something changed, it is training by hand with that change."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import some_of
from jobs import Job, make_job, sample_loss
from loops import LOOPS, Loop
from low_precision_loops import LOW_PRECISION_LOOPS
from models import frozen_norm
from outside_loops import OUTSIDE_LOOPS
from torch import Tensor, nn

from explaind_track import Quadrature, Query, Rerun, Tracker, Trajectory, explain, rerun
from explaind_track.errors import RerunWarning
from explaind_track.what_if import Change, Frozen, Reweighted, Settings, SwitchedOff, Transplanted

STEPS = 9
BY_NAME = {loop.id: loop for loop in (*LOOPS, *LOW_PRECISION_LOOPS, *OUTSIDE_LOOPS)}


def rerun_of(loop: Loop, directory: Path, **options: Any) -> tuple[Rerun, Trajectory]:
    live = loop.run(trajectory=directory / "t", keyframe_every=4, queries={})
    trajectory = Trajectory.open(directory / "t")

    def data(index: Tensor | list[str]) -> Any:
        if isinstance(index, list):
            index = torch.tensor([int(name.removeprefix("id")) for name in index])
        return loop.data(live.x[index], live.y[index])

    options = {"auxiliary": loop.options.get("auxiliary"), "progress": False, **options}
    return rerun(trajectory, loop.make(), loop.sample_loss, data, **options), trajectory


QUICK = ("weighted samples", "class weights", "auxiliary loss (L1)", "gradient accumulation", "clipping by norm",
         "clipping by value", "OneCycle, Adam's betas", "warm start", "frozen later, zero gradients kept",
         "parameter group added later", "bfloat16 autocast", "GradScaler with a skipped step", "dropout", "batch norm",
         "activation checkpointing", "tied weights", "samples named by words", "float32", "bfloat16 weights, fused",
         "bfloat16 weights and batch norm", "weights clamped between steps", "target network copied every other step",
         "averaged weights copied in at the end", "batch-norm statistics reset", "embedding with max_norm")  # fmt: skip


@pytest.mark.parametrize("name", some_of(BY_NAME, QUICK))
def test_a_rerun_with_nothing_changed_is_the_run_bit_for_bit(name: str, tmp_path: Path) -> None:
    found, trajectory = rerun_of(BY_NAME[name], tmp_path)
    assert found.proof.exact
    assert found.proof.keyframes == [0, 4, len(trajectory)]
    wanted = trajectory.state_dict(len(trajectory))
    assert all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize("name", ["clipping by norm", "batch norm", "weights clamped between steps", "tied weights"])
@pytest.mark.parametrize("start", [0, 3])
def test_the_record_of_a_rerun_is_a_whole_one(name: str, start: int, tmp_path: Path) -> None:
    found, trajectory = rerun_of(BY_NAME[name], tmp_path, start=start, out=tmp_path / "again")
    own = found.trajectory
    assert own is not None
    assert own.manifest.head["lineage"]["run"] == trajectory.fingerprint
    assert own.manifest.head["lineage"]["start"] == start
    for number in range(len(trajectory) + 1):
        wanted = trajectory.state_dict(number)
        assert all(torch.equal(value, wanted[name]) for name, value in own.state_dict(number).items())
    for one, other in zip(trajectory.steps(), own.steps(), strict=True):
        for part, values in one.parts.items():
            assert all(torch.equal(value, other.parts[part][name]) for name, value in values.items())


# ------------------------------------------------------------- changes, against training by hand


@dataclass
class ByHand:
    """What is done otherwise, in a loop of plain torch. Each takes the step's number and the job."""

    weights: Callable[[int, Tensor], Tensor] = lambda number, index: torch.ones(len(index), dtype=torch.float64)
    before: Callable[[int, Job], None] = lambda number, job: None
    gradient: Callable[[int, Job], None] = lambda number, job: None
    behind: Callable[[int, Job, dict[str, Tensor]], None] = lambda number, job, before: None


def indices() -> Iterator[Tensor]:
    """Those of `Job.run`."""
    generator = torch.Generator().manual_seed(0)
    for number in range(STEPS):
        yield torch.randperm(24, generator=generator)[: 5 if number % 3 == 2 else 8]


def by_hand(optimizer: str, how: ByHand) -> dict[str, Tensor]:
    job = make_job(optimizer)
    for number, index in enumerate(indices()):
        how.before(number, job)
        job.optimizer.zero_grad()
        losses = sample_loss(job.model, (job.x[index], job.y[index]))
        (losses * how.weights(number, index) / len(index)).sum().backward()
        how.gradient(number, job)
        before = {name: p.detach().clone() for name, p in job.model.named_parameters()}
        job.optimizer.step()
        how.behind(number, job, before)
        job.schedule.step()
    return {name: value.clone() for name, value in job.model.state_dict().items()}


def changed(optimizer: str, change: Any, directory: Path, **options: Any) -> Rerun:
    job = make_job(optimizer)
    tracker = job.tracker(trajectory=directory / "t", keyframe_every=4)
    job.run(tracker, STEPS)
    tracker.finish()
    trajectory, data = Trajectory.open(directory / "t"), lambda index: (job.x[index], job.y[index])
    return rerun(trajectory, make_job().model, sample_loss, data, change=change, progress=False, **options)


def drop(number: int, index: Tensor) -> Tensor:
    return torch.where(torch.isin(index, torch.tensor([3, 7])), 0.0, 1.0).double()


def halve(number: int, index: Tensor) -> Tensor:
    return torch.where((index == 5) & torch.tensor(2 <= number < 6), 0.5, 1.0).double()


def freeze(number: int, job: Job) -> None:
    if 2 <= number < 5:
        job.model[0].weight.grad = job.model[0].bias.grad = None  # type: ignore[index,union-attr]


def slower(number: int, job: Job) -> None:
    job.optimizer.param_groups[0]["lr"] *= 0.5 if number == 0 else 1.0


def no_decay(number: int, job: Job) -> None:
    job.optimizer.param_groups[0]["weight_decay"] = 0.0 if 1 <= number < 4 else 0.1


OTHER = {name: value * 0.5 for name, value in make_job().model.state_dict().items()}


def transplant(number: int, job: Job) -> None:
    if number == 4:
        with torch.no_grad():
            job.model[2].weight.copy_(OTHER["2.weight"])  # type: ignore[index]


def decay_alone(number: int, job: Job, before: dict[str, Tensor]) -> None:
    if 3 <= number < 6:
        rate = job.optimizer.param_groups[0]["lr"]
        with torch.no_grad():
            job.model[2].weight.copy_(before["2.weight"] * (1 - rate * 0.1))  # type: ignore[index]


@dataclass(frozen=True)
class Shrunk(Change):
    """One of one's own."""

    def begin(self, number: int, parameters: Any) -> None:
        parameters["0.bias"].mul_(0.9)


def shrink(number: int, job: Job) -> None:
    with torch.no_grad():
        job.model[0].bias.mul_(0.9)  # type: ignore[index,union-attr]


CHANGES: dict[str, tuple[str, Any, ByHand]] = {
    "samples left out": ("adamw", Reweighted.without([3, 7]), ByHand(weights=drop)),
    "samples left out, SGD": ("sgd", Reweighted.without([3, 7]), ByHand(weights=drop)),
    "a sample weighted in a window": ("adam", Reweighted({5: 0.5}, window=(2, 6)), ByHand(weights=halve)),
    "frozen in a window": ("adamw", Frozen("0.*", window=(2, 5)), ByHand(gradient=freeze)),
    "decay switched off": ("adam", SwitchedOff("regularization", window=(1, 4)), ByHand(before=no_decay)),
    "decay alone": ("adamw", SwitchedOff("kernel", "2.weight", window=(3, 6)), ByHand(behind=decay_alone)),
    "another rate": ("adamw", Settings(times={"lr": 0.5}), ByHand(before=slower)),
    "transplanted": ("sgd", Transplanted(OTHER, at=4, parameters="2.weight"), ByHand(before=transplant)),
    "one of one's own": ("adamw", Shrunk(), ByHand(before=shrink)),
    "two at once": (
        "adamw", [Reweighted.without([3, 7]), Frozen("0.*", window=(2, 5))], ByHand(weights=drop, gradient=freeze)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_that_change_by_hand(name: str, tmp_path: Path) -> None:
    optimizer, change, how = CHANGES[name]
    found, wanted = changed(optimizer, change, tmp_path).state_dict(), by_hand(optimizer, how)
    plain = by_hand(optimizer, ByHand())
    assert max(float((plain[n] - value).abs().max()) for n, value in wanted.items()) > 1e-5
    for n, value in wanted.items():
        torch.testing.assert_close(found[n], value, rtol=0, atol=1e-14)


def test_the_record_of_a_changed_run_is_explained_and_compared(tmp_path: Path) -> None:
    change = SwitchedOff("kernel", "2.weight", window=(3, 6))
    found = changed("adamw", change, tmp_path, start=2, out=tmp_path / "again")
    own, job = found.trajectory, make_job()
    assert own is not None
    assert "SwitchedOff" in own.manifest.head["lineage"]["changes"][0]
    query = Query.outputs(job.x[:5], job.y[:5])
    influence = explain(own, job.model, query, keep=("query", "output"), quadrature=Quadrature(1e-9), progress=False)
    assert float(influence.residual) < 1e-6

    # what was undone of the steps is a part of its own; without it, the sum would miss
    compared = found.compare(query, steps=[2, 4, STEPS])
    assert "outside" in influence.data["part"].values
    assert compared["distance"].sel(group="2").values[0] == 0
    assert (compared["distance"].sel(group="2").values[1:] > 0).all()
    torch.testing.assert_close(
        torch.from_numpy(influence.prediction().values), torch.from_numpy(compared["value"].values[-1, 1])
    )
    assert 0 <= float(compared["agreement"][-1]) <= 1
    assert float(compared["kl"][0]) == 0 < float(compared["kl"][-1])
    assert compared["loss"].dims == ("step", "run")


def test_where_a_rerun_is_another_run_it_says_from_which_step_on(tmp_path: Path) -> None:
    job = make_job()
    tracker = job.tracker(trajectory=tmp_path / "t", keyframe_every=4)
    job.run(tracker, 3)
    job.run(tracker, 3, other_bits=True)
    tracker.finish()
    trajectory = Trajectory.open(tmp_path / "t")
    with pytest.warns(RerunWarning, match="other bits from step 3 on"):
        found = rerun(trajectory, job.model, sample_loss, lambda index: (job.x[index], job.y[index]), progress=False)
    assert found.proof.first_other == 3
    assert 0 < found.proof.off < 1e-12


def test_what_cannot_be_taken_again_is_refused(tmp_path: Path) -> None:
    def refused(name: str, match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            rerun_of(BY_NAME[name], tmp_path / str(hash((name, match))), **options)

    refused("auxiliary loss (L1)", "pass auxiliary=", auxiliary=None)
    refused("weights clamped between steps", "changed the model before", change=Frozen())
    refused("dropout", "no step saw the samples", change=Reweighted.without([99]))
    refused("dropout", "no parameter is called 'decoder", change=Frozen("decoder.*"))
    refused("dropout", "the record has the steps 0 to 6", start=6)
    refused("dropout", "would change none of the steps 0 to 5", change=Frozen(window=(7, 9)))
    refused("dropout", "would change none of the steps 3 to 5", start=3, change=Transplanted({}, at=2, parameters=()))
    refused("dropout", r"'0.weight' is of shape \(2,\)", change=Transplanted({"0.weight": torch.ones(2)}, at=1))

    job = make_job()
    tracker = Tracker(job.model, job.optimizer, queries={}, trajectory=tmp_path / "altered")
    with tracker.step():
        tracker.batch((job.x, job.y), index=torch.arange(24))
        sample_loss(job.model, (job.x, job.y)).mean().backward()
        for parameter in job.model.parameters():
            nn.init.zeros_(parameter.grad)  # type: ignore[arg-type]
        tracker.gradient_altered()
        job.optimizer.step()
    tracker.finish()
    with pytest.raises(ValueError, match="in a way that is not recorded"):
        rerun(Trajectory.open(tmp_path / "altered"), job.model, sample_loss, lambda index: (job.x[index], job.y[index]))


def test_a_model_in_another_mode_is_noticed(tmp_path: Path) -> None:
    live = BY_NAME["module in eval mode"].run(trajectory=tmp_path / "t", queries={})
    model = frozen_norm().double().train()
    with pytest.warns(RerunWarning, match="mode are not those of the run"):
        rerun(
            Trajectory.open(tmp_path / "t"), model, live.sample_loss, lambda i: (live.x[i], live.y[i]), progress=False
        )
