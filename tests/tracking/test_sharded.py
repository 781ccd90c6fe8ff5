"""Parameters in pieces, in real processes (`fully_shard`, tensor parallelism), against one that has them whole."""

import json
import os
import signal
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xarray as xr
from jobs import child_environment, in_ranks
from sharded_jobs import (
    CASES,
    LENGTH,
    STEPS,
    WORDS,
    ids_of,
    loss_of,
    make_model,
    make_tracker,
    place,
    places,
    shard,
    train,
)
from sharded_jobs import queries as queries_of
from torch import nn

from explaind_track import Influence, Quadrature, Query, Tracker, Trajectory
from explaind_track.errors import NonFiniteError, ResumeWarning, TrajectoryError
from explaind_track.record.history import read_rows

EVERY = 2
"""Keyframes lie so many steps apart."""

KEEPS = (("step", "group"), ("query", "output"))


def made(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    case = CASES[name]
    model = make_model(case)
    if dist.is_initialized():
        shard(model, case)
    return model, case.optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {name: getattr(value, "full_tensor", value.clone)() for name, value in found.items()}


def main(rank: int, out: Path) -> None:
    """What a user's loop does in each process: once to the end, or killed on the way, or gone on with."""
    task = json.loads((out / "task.json").read_text())
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=task["ranks"])
    torch.set_num_threads(1)
    if task["refuses"]:
        refusals(rank, out)
    for name in task["cases"]:
        case, directory = CASES[name], out / name
        model, optimizer = made(name)
        options = {"trajectory": directory, "keyframe_every": EVERY, "resume": bool(task["resume"])}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", ResumeWarning)
            tracker = make_tracker(model, optimizer, case, **options)
        if rank == 0:
            assert any(task["resume"] in str(warning.message) for warning in told) or not task["resume"]
        if task["killed_at"] is not None:
            train(model, tracker, optimizer, case, [place(case, rank)], task["killed_at"])
            os.kill(os.getpid(), signal.SIGKILL)
        assert tracker.number == (EVERY if task["resume"] else 0)

        train(model, tracker, optimizer, case, [place(case, rank)], STEPS)
        tracker.finish()
        parameters = whole(model)
        if rank == 0:
            torch.save(parameters, directory / "parameters.pt")
            if not task["resume"]:
                save_influences(tracker, directory)
            with pytest.raises(TrajectoryError, match=r"were in pieces.*no gradients"):
                Trajectory.open(directory)
    dist.destroy_process_group()


def refusals(rank: int, out: Path) -> None:
    """Every process raises, so that none waits for the others, and before anything is changed."""
    from torch.distributed.fsdp import fully_shard

    x = torch.randint(WORDS, (3, LENGTH))
    answers = Query.function(x, lambda output: output[:, -1])
    scalar = {"queries": queries_of(CASES["plain"])}
    for options, message in (
        ({"queries": {"all": answers}}, r"queries\['all'\] has 3 targets.*a scalar query is needed, because"),
        ({"queries": {"mean": answers.mean()}}, r"has 11 outputs.*a scalar query is needed"),
        ({"queries": {"none": Query.function(x, lambda output: output.detach()[:, 0, 0]).mean()}}, "no parameter"),
        (scalar | {"sample_loss": lambda model, batch: batch}, "sample_loss= asks for gradients of single samples"),
        (scalar | {"auxiliary": {"l1": lambda model: 0}}, "auxiliary= asks for the gradient of one term"),
        (scalar | {"scores": "near"}, "scores= sums up"),
        (scalar | {"audit_every": 2}, "audit_every= computes a step again"),
        (scalar | {"record": "batches", "trajectory": out / "no"}, 'record="batches" keeps batches'),
        (scalar | {"quadrature": Quadrature.fixed(2)}, r"Quadrature.trapezoid\(\)"),
        (scalar | {"trajectory": out}, "is not empty"),
        (scalar | {"resume": True}, "say which with trajectory="),
    ):
        model, optimizer = made("plain")
        with pytest.raises((ValueError, FileExistsError, RuntimeError), match=message):
            Tracker(model, optimizer, **options)

    model, _ = made("plain")
    with pytest.raises(ValueError, match="Muon's step turns whole matrices"):
        Tracker(model, torch.optim.Muon([model.head.weight]), **scalar)

    # parameters whose gradients nobody adds up; processes with different models
    model = make_model(CASES["plain"])
    for block in model.blocks:
        fully_shard(block)
    with pytest.raises(ValueError, match=r"embedding.weight.*left out of fully_shard"):
        Tracker(model, torch.optim.AdamW(model.parameters()), **scalar)
    model = nn.Sequential(OrderedDict({f"stage{rank}": nn.Linear(4, 4)}))
    fully_shard(model)
    with pytest.raises(ValueError, match="pipeline parallelism"):
        Tracker(model, torch.optim.AdamW(model.parameters()), **scalar)

    # what happens to the pieces of one process alone
    model, optimizer = made("plain")
    tracker = make_tracker(model, optimizer, CASES["plain"])
    train(model, tracker, optimizer, CASES["plain"], [rank], 1)
    before = whole(model)
    with pytest.raises(NonFiniteError, match=r"head\.weight"), tracker.step():
        loss_of(model, ids_of(1, 0, rank)).backward()
        if rank == 1:
            model.head.weight.grad.to_local().fill_(torch.nan)
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in whole(model).items())
    optimizer.zero_grad()
    if rank == 0:
        with torch.no_grad():
            model.head.weight.to_local().clamp_(-0.1, 0.1)
    with (
        pytest.raises(RuntimeError, match=r"something other than the optimizer has changed head\.weight"),
        tracker.step(),
    ):
        loss_of(model, ids_of(1, 0, rank)).backward()
        optimizer.step()

    model = nn.Sequential(nn.Embedding(WORDS, 4), nn.Flatten(), nn.Linear(4 * LENGTH, 3), nn.BatchNorm1d(3))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    tracker = Tracker(model, optimizer, queries={"one": Query.function(x, lambda output: output[:, 0]).mean()})
    with pytest.raises(RuntimeError, match=r"3\.running_mean.*batch norms in eval mode"), tracker.step():
        model(x).sum().backward()
        optimizer.step()


def save_influences(tracker: Tracker, directory: Path) -> None:
    for query in ("near", "far"):
        for keep in KEEPS:
            tracker.influence(query, keep).save(directory / f"{query}-{keep[0]}.safetensors")


def write_task(out: Path, cases: list[str], ranks: int, **more: Any) -> None:
    out.mkdir(exist_ok=True)
    task = {"cases": cases, "ranks": ranks, "resume": "", "killed_at": None, "refuses": False, **more}
    (out / "task.json").write_text(json.dumps(task))


def in_one_process(name: str, ranks: int, out: Path) -> dict[str, torch.Tensor]:
    case = CASES[name]
    model, optimizer = made(name)
    tracker = make_tracker(model, optimizer, case, trajectory=out, quadrature=Quadrature.trapezoid())
    train(model, tracker, optimizer, case, list(range(places(case, ranks))), STEPS)
    tracker.finish()
    save_influences(tracker, out)
    return whole(model)


def compare(name: str, ranks: int, out: Path, tmp_path: Path) -> None:
    """Parameters, influences of both queries, residuals and rows: as one process has them."""
    alone = tmp_path / f"{name}_alone"
    parameters = in_one_process(name, ranks, alone)
    for parameter, value in torch.load(out / name / "parameters.pt").items():
        torch.testing.assert_close(value, parameters[parameter], rtol=1e-9, atol=1e-12)

    for file in ("near-step", "near-query", "far-step", "far-query"):
        found, wanted = (Influence.load(place / f"{file}.safetensors").data for place in (out / name, alone))
        assert found.sizes == wanted.sizes
        for variable in ("influence", "importance", "total_importance", "change", "final", "residual"):
            if variable in wanted:
                xr.testing.assert_allclose(found[variable], wanted[variable], rtol=1e-9, atol=1e-11)

    for one, other in zip(read_rows(out / name), read_rows(alone), strict=True):
        assert one.keys() == other.keys()
        for key in (key for key in one if not key.startswith("cost/")):
            assert one[key] == pytest.approx(other[key], rel=1e-8, abs=1e-11), key


def test_two_processes_are_one(tmp_path: Path) -> None:
    write_task(tmp_path, ["tied"], 2)
    in_ranks(__file__, tmp_path, 2)
    compare("tied", 2, tmp_path, tmp_path)


@pytest.mark.slow
def test_what_pieces_cannot_tell_is_refused_everywhere(tmp_path: Path) -> None:
    write_task(tmp_path, [], 2, refuses=True)
    in_ranks(__file__, tmp_path, 2)


@pytest.mark.slow
def test_bfloat16_is_as_exact_as_its_digits(tmp_path: Path) -> None:
    """Beside float32: sums over the run within a hundredth, and a residual that tells."""
    write_task(tmp_path, ["bf16"], 2)
    in_ranks(__file__, tmp_path, 2)
    in_one_process("bf16", 2, tmp_path / "alone")
    found, wanted = (
        Influence.load(place / "near-query.safetensors").data for place in (tmp_path / "bf16", tmp_path / "alone")
    )
    largest = float(abs(wanted["influence"]).max())
    assert float(abs(found["influence"] - wanted["influence"]).max()) < 0.01 * largest
    assert float(found["residual_floor"]) > 100 * float(wanted["residual_floor"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_all_kinds_of_training(ranks: int, tmp_path: Path) -> None:
    names = [name for name, case in CASES.items() if name != "bf16" and places(case, ranks) * (case.how == "tp") < 2]
    names = [name for name in names if ranks == 4 or "+" not in name]
    write_task(tmp_path, names, ranks)
    in_ranks(__file__, tmp_path, ranks)
    for name in names:
        compare(name, ranks, tmp_path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("others", [2, 4])
def test_killed_and_gone_on_with(others: int, tmp_path: Path) -> None:
    """By as many processes as were killed, or by others, among whom the pieces are cut anew: as if never killed."""
    killed, never = tmp_path / "killed", tmp_path / "never"
    write_task(killed, ["accumulated"], 2, killed_at=3)
    command = [sys.executable, __file__]
    processes = [subprocess.Popen([*command, str(rank), str(killed)], env=child_environment()) for rank in range(2)]
    assert {process.wait() for process in processes} == {-signal.SIGKILL}

    (killed / "meeting").unlink()
    write_task(
        killed, ["accumulated"], others, resume="from the last keyframe" if others == 2 else "2 processes, and 4"
    )
    in_ranks(__file__, killed, others)
    write_task(never, ["accumulated"], 2)
    in_ranks(__file__, never, 2)
    found, wanted = (read_rows(directory / "accumulated") for directory in (killed, never))
    assert [row["train/step"] for row in found] == list(range(STEPS))
    if others == 2:  # else batches are others, too
        ends = [torch.load(directory / "accumulated" / "parameters.pt") for directory in (killed, never)]
        assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    same = [row for row in wanted if others == 2 or row["train/step"] < EVERY]
    for one, other in zip(found, same, strict=False):
        for key in (key for key in other if not key.startswith("cost/")):
            assert one[key] == pytest.approx(other[key], rel=1e-9, abs=1e-12), key


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
