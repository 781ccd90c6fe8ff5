"""Parameters in pieces, in real processes (`fully_shard`, tensor parallelism), against one that has them whole."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import child_environment, in_ranks
from sharded_jobs import CASES, STEPS, make_model, make_tracker, place, places, shard, train
from torch import nn

from explaind_track import Trajectory
from explaind_track.errors import TrajectoryError

EVERY = 2
"""Keyframes lie so many steps apart."""


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
    for name in task["cases"]:
        case, directory = CASES[name], out / name
        model, optimizer = made(name)
        options = {"resume": True} if task["resume"] else {}
        tracker = make_tracker(
            model, optimizer, case, queries={}, trajectory=directory, keyframe_every=EVERY, **options
        )
        if task["killed_at"] is not None:
            train(model, tracker, optimizer, case, [place(case, rank)], task["killed_at"])
            os.kill(os.getpid(), signal.SIGKILL)
        assert tracker.number == (EVERY if task["resume"] else 0)

        train(model, tracker, optimizer, case, [place(case, rank)], STEPS)
        tracker.finish()
        parameters = whole(model)
        if rank == 0:
            torch.save(parameters, directory / "parameters.pt")
            with pytest.raises(TrajectoryError, match=r"were in pieces.*no gradients"):
                Trajectory.open(directory)
    dist.destroy_process_group()


def write_task(out: Path, cases: list[str], ranks: int, **more: Any) -> None:
    out.mkdir(exist_ok=True)
    task = {"cases": cases, "ranks": ranks, "resume": False, "killed_at": None, **more}
    (out / "task.json").write_text(json.dumps(task))


def in_one_process(name: str, ranks: int, out: Path) -> dict[str, torch.Tensor]:
    case = CASES[name]
    model, optimizer = made(name)
    tracker = make_tracker(model, optimizer, case, trajectory=out)
    train(model, tracker, optimizer, case, list(range(places(case, ranks))), STEPS)
    tracker.finish()
    return whole(model)


def compare(name: str, ranks: int, out: Path, tmp_path: Path) -> None:
    alone = in_one_process(name, ranks, tmp_path / f"{name}_alone")
    for parameter, value in torch.load(out / name / "parameters.pt").items():
        torch.testing.assert_close(value, alone[parameter], rtol=1e-9, atol=1e-12)


def test_two_processes_are_one(tmp_path: Path) -> None:
    write_task(tmp_path, ["tied"], 2)
    in_ranks(__file__, tmp_path, 2)
    compare("tied", 2, tmp_path, tmp_path)


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
@pytest.mark.parametrize("ranks", [2, 4])
def test_killed_and_gone_on_with(ranks: int, tmp_path: Path) -> None:
    """By as many processes, or by others than it was begun by: the pieces are cut anew."""
    killed = tmp_path / "killed"
    write_task(killed, ["tied"], ranks, killed_at=3)
    command = [sys.executable, __file__]
    processes = [subprocess.Popen([*command, str(rank), str(killed)], env=child_environment()) for rank in range(ranks)]
    assert {process.wait() for process in processes} == {-signal.SIGKILL}

    (killed / "meeting").unlink()
    write_task(killed, ["tied"], 2, resume=True)
    in_ranks(__file__, killed, 2)
    never = tmp_path / "never"
    write_task(never, ["tied"], 2)
    in_ranks(__file__, never, 2)
    ends = [torch.load(directory / "tied" / "parameters.pt") for directory in (killed, never)]
    if ranks == 2:
        assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
