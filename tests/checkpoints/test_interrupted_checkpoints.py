"""What explanations of checkpoints leave behind when they are interrupted, how they go on, and what they refuse."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from cases import OPTIMIZERS
from held_checkpoints import SMALL, X, Y, learning, small
from helpers import check
from jobs import child_environment
from torch import Tensor, nn

from explaind_track import (
    Influence,
    Query,
    explain_checkpoints,
)
from explaind_track.checkpoints import explain_checkpoints as explain_module

COST = ["seconds", "peak_mb"]

# ------------------------------------------------------------ what it leaves behind


class Raising:
    """Raises at its n-th call."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == self.at and self.error is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)  # as Ctrl-C does
        if self.calls == self.at:
            raise self.error


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["loss", "query", "within the optimizer", "behind the optimizer", "backward"])
def test_the_model_has_the_checkpoints_bits_wherever_it_is_interrupted(
    where: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in (1, 2, 5, 8):
        torch.manual_seed(1)
        raising = Raising(at + (2 if where == "query" else 0), error)  # two calls look at the query beforehand
        series, model = small(tmp_path, learning(OPTIMIZERS["adamw"]), 1)
        asked = {**SMALL, "sources": range(6), "microbatch": 1, "tolerance": 0.0}
        series[0].load(model)  # what it has before the checkpoint is loaded does not matter
        step = torch.optim.AdamW.step

        def stepping(self: Any, raising: Raising = raising, step: Any = step) -> None:
            if where == "within the optimizer":
                raising()
            step(self)
            if where == "behind the optimizer":
                raising()

        def loss(model: nn.Module, batch: Any, raising: Raising = raising) -> Tensor:
            if where == "loss":
                raising()
            return SMALL["loss"](model, batch)

        def target(output: Tensor, y: Tensor, raising: Raising = raising) -> Tensor:
            if where == "query":
                raising()
            if where == "backward" and output.requires_grad:
                output.register_hook(raising)
            return F.cross_entropy(output, y, reduction="none")

        with monkeypatch.context() as patched:
            patched.setattr(torch.optim.AdamW, "step", stepping)
            asked |= {"loss": loss, "query": Query.loss(X[6:], Y[6:], target).mean()}
            with pytest.raises(error):
                explain_checkpoints(series, model, **asked)

        for name, value in series[0].parameters.items():
            assert torch.equal(model.state_dict()[name], value), (name, at)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
        assert all(module.training for module in model.modules())


def test_the_model_has_the_checkpoints_bits_at_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain_module, "SMALLEST", 0.0)
    series, model = small(tmp_path, learning(OPTIMIZERS["adam-decay"]), 1)
    seen, parameters = [], dict(model.named_parameters())

    def target(output: Tensor, y: Tensor) -> Tensor:
        if series[0].loaded:
            seen.append(all(torch.equal(p, series[0].parameters[name]) for name, p in parameters.items()))
        return F.cross_entropy(output, y, reduction="none")

    explain_checkpoints(series, model, **{**SMALL, "query": Query.loss(X[6:], Y[6:], target).mean(), "tolerance": 0.0})
    assert len(seen) > 20
    assert all(seen)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, series[0].parameters[name])
        assert parameter.grad is None


# ------------------------------------------------------------ going on, and refusals


def test_it_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    make = learning(OPTIMIZERS["adamw"])
    series, model = small(tmp_path / "run", make)
    model.drop.p = 0.0
    wanted = explain_checkpoints(series, model, sources=range(6), **SMALL)["tensor"].data
    asked = {**SMALL, "sources": range(6), "out": tmp_path / "out"}

    broken = series.checkpoints[1]
    broken.load = Raising(1, KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        explain_checkpoints(series, model, **asked)
    del broken.load
    loaded = [checkpoint.loaded for checkpoint in series]
    found = explain_checkpoints(series, model, **asked)["tensor"].data
    assert [checkpoint.loaded - was for checkpoint, was in zip(series, loaded, strict=True)] == [0, 1, 1]
    xr.testing.assert_identical(found.drop_vars(COST), wanted.drop_vars(COST))

    again = explain_checkpoints(series, model, **asked, groups={"layer": None})["layer"]
    assert series[0].loaded == loaded[0]
    check(again.data["influence"].sum("group"), wanted["influence"].sum("group"))
    again.save(tmp_path / "influence.safetensors")
    xr.testing.assert_identical(Influence.load(tmp_path / "influence.safetensors").data, again.data)

    for other, named in (
        ({"clip": 1.0}, "the settings"), ({"train": (X[:6] + 1, Y[:6])}, "train="), ({"sources": None}, "sources="),
        ({"query": Query.loss(X[:6], Y[:6]).mean()}, "query="),
    ):  # fmt: skip
        with pytest.raises(FileExistsError, match=rf"answers another question, which differs in .*{named}"):
            explain_checkpoints(series, model, **{**asked, **other})
    (tmp_path / "run" / "new").write_text("")
    with pytest.raises(FileExistsError, match="the checkpoint"):
        explain_checkpoints(series, model, **asked)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"query": Query.loss(X[6:], Y[6:])}, r"more than one target.*Query\.loss\(x, y\)\.mean\(\)"),
        ({"query": Query.outputs(X[6:]).mean()}, "more than one target"),
        ({"sources": ["en", "de"]}, "2 labels for the 6 samples"),
        ({"groups": "type"}, r"groups= is a mapping, such as"),
        ({"groups": {"mine": {"first": "first.*"}}}, r"parameters in no group: frozen, second\.weight"),
        ({"groups": {}}, "groups= asks for nothing"),
        ({"microbatch": 0}, "microbatch= is at least 1"),
        ({"train": (X[:6] / 0, Y[:6])}, "the gradient of the training batch is nan"),
        ({"query": Query.function(X[6:], lambda output: output.sum(1) / 0).mean()}, "its target has to be finite"),
        ({"clip": 0}, "clip= is a number above 0"),
        ({"tolerance": float("nan")}, "tolerance= is nan"),
        ({"loss": None}, r"loss= is a function \(model, samples\)"),
        ({"optimizer": 3}, "optimizer= is a function of the model"),
        ({"loss": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])}, r"loss= must return the unreduced"),
    ],
)
def test_what_is_wrong_is_refused_in_words(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    series, model = small(tmp_path, learning(OPTIMIZERS["adamw"]), 1)
    with pytest.raises((ValueError, TypeError), match=message):
        explain_checkpoints(series, model, **{**SMALL, **wrong})


def test_a_model_that_shortens_rows_in_its_forward_pass_is_refused(tmp_path: Path) -> None:
    series, model = small(tmp_path, learning(OPTIMIZERS["adamw"]), 1)
    model.rows = nn.Embedding(3, 4, max_norm=1.0)
    with pytest.raises(ValueError, match=r"max_norm.*Tracker"):
        explain_checkpoints(series, model, **SMALL)


def test_a_model_in_low_precision_is_refused(tmp_path: Path) -> None:
    series, model = small(tmp_path, learning(OPTIMIZERS["adamw"]), 1)
    with pytest.raises(ValueError, match=r"bfloat16.*model\.float\(\)"):
        explain_checkpoints(series, model.bfloat16(), **SMALL)


SCRIPT = """
import sys
import torch
import torch.distributed as dist
sys.path.append("tests")
from pathlib import Path
from held_checkpoints import OPTIMIZERS, SMALL, learning, small
from explaind_track import explain_checkpoints

dist.init_process_group("gloo")
series, model = small(Path(sys.argv[1]), learning(OPTIMIZERS["adamw"]))
model.drop.p = 0.0
found = explain_checkpoints(series, model, **SMALL)["tensor"]
assert sum(checkpoint.loaded for checkpoint in series) < 3
found.save(f"{sys.argv[1]}/{dist.get_rank()}.safetensors")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_the_checkpoints(tmp_path: Path) -> None:
    series, model = small(tmp_path, learning(OPTIMIZERS["adamw"]))
    model.drop.p = 0.0
    wanted = explain_checkpoints(series, model, **SMALL)["tensor"].data
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path)],
        capture_output=True, text=True, check=False, env=child_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = Influence.load(tmp_path / f"{rank}.safetensors").data
        xr.testing.assert_allclose(found.drop_vars(COST), wanted.drop_vars(COST), rtol=1e-12)
