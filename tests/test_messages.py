"""Wrong arguments are refused where they enter, before any work and any file, in words that say what to do."""

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import make_job, sample_loss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from explaind_track import Quadrature, Query, Tracker, Trajectory, explain, resolve_groups
from explaind_track.analysis import (
    extrapolate_first_moment,
    kernel_machine,
    parameter_scores,
    plots,
    prune_masks,
    pruned,
    similarity,
    sparse_prediction,
    step_scores,
)
from explaind_track.analysis.step_ranking import top_steps
from explaind_track.callbacks.base import TrackerCallbackBase
from explaind_track.core import checks
from explaind_track.wandb_io.workspace import make_workspace

STEPS = 8
QUERY = Query.outputs(torch.zeros(2, 4, dtype=torch.float64))
LOSS = Query.loss(torch.zeros(2, 4, dtype=torch.float64), torch.tensor([0, 1]))

OF_THE_TRACKER: list[tuple[dict[str, Any], str]] = [
    ({"every": 0}, "every= is at least 1, not 0"),
    ({"every": -3}, "every= is at least 1, not -3"),
    ({"every": 2.0}, r"every= is a whole number, not 2\.0 \(float\)"),
    ({"every": True}, r"every= is a whole number, not True \(bool\)"),
    ({"samples_every": 0}, r"samples_every= \(None: no tables\) is at least 1"),
    ({"samples_every": "5"}, "samples_every= .* is a whole number, not '5'"),
    ({"audit_every": 0}, "audit_every= is at least 1"),
    ({"keyframe_every": 0}, "keyframe_every= is at least 1"),
    ({"keyframe_every": np.float64(5)}, "keyframe_every= is a whole number"),
    ({"map_queries": -1}, "map_queries= is at least 0"),
    ({"memory": 0}, r"memory= \(bytes\) is at least 1"),
    ({"memory": 2.0**28}, r"memory= \(bytes\) is a whole number"),
    ({"resume": -2}, "resume= .* is at least 0"),
    ({"resume": "yes"}, "resume= .* is a whole number, not 'yes'"),
    ({"quadrature": 3}, r"Quadrature\.fixed\(3\)"),
    ({"quadrature": "fixed"}, r"quadrature= is a Quadrature, not 'fixed'"),
    ({"on_nonfinite": "ignore"}, "on_nonfinite= is one of 'raise', 'mark', not 'ignore'"),
    ({"on_nonfinite": None}, "on_nonfinite= is one of 'raise', 'mark', not None"),
    ({"run": "my-project"}, r"open_run\('my-project'\)"),
    ({"trajectory": 3}, "trajectory= is the path of a directory, not 3"),
    ({"render": "image"}, "render= is a function"),
    ({"sample_loss": "mean"}, r"sample_loss= is a function \(model, batch\)"),
    ({"scores": "querry"}, r"no query 'querry'; there are: 'query', 'loss' \(did you mean 'query'\?\)"),
    ({"queries": [QUERY]}, "queries= is a mapping"),
    ({"queries": QUERY}, "queries= is a mapping of queries by their names"),
    ({"queries": {"a": torch.zeros(3, 4)}}, r"queries\['a'\] is a Query, not .*Query\.outputs"),
    ({"queries": {1: QUERY}}, "names that are strings"),
    *(
        ({"queries": {"query": LOSS, name: QUERY}}, f"a query cannot be called '{name}'")
        for name in (
            *("loss", "kernel", "reg", "past", "D", "residual", "cost", "train", "samples"),
            *("", "a/b", "a:b", "nodes", "nonfinite"),
        )
    ),
    ({"queries": {"query": LOSS, "loss": LOSS}}, "a query cannot be called 'loss'"),
    *(
        ({"auxiliary": {name: lambda model: model[0].weight.sum()}}, f"an auxiliary loss cannot be called '{name}'")
        for name in ("kernel", "regularization", "momentum", "rounding", "reg", "loss", "D", "query", "", "a/b", "l1:x")
    ),
    ({"auxiliary": [lambda model: model[0].weight.sum()]}, "auxiliary= is a mapping"),
    ({"auxiliary": {"l1": 0.1}}, r"auxiliary\['l1'\] is a function model → scalar, not 0\.1"),
    ({"groups": ["0.*", "2.*"]}, "groups= is a mapping, such as .*or a depth, not "),
    ({"groups": {"all": 3}}, r"groups\['all'\] is a pattern"),
    ({"groups": True}, "groups= .* is a whole number, not True"),
    ({"groups": 1.5}, "groups= is a mapping"),
    ({"groups": {"total": "*"}}, "a group cannot be called 'total'"),
    ({"groups": {"a/b": "*"}}, "a group cannot be called 'a/b'"),
]


@pytest.mark.parametrize(("options", "message"), OF_THE_TRACKER)
def test_of_the_tracker(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    new = tmp_path / "t"
    with pytest.raises((TypeError, ValueError), match=message):
        make_job().tracker(**{"trajectory": new, **options})
    assert not new.exists()


def test_names_that_share_no_key_stay() -> None:
    job = make_job()
    tracker = job.tracker(queries={"loss": LOSS, "total": QUERY}, every=np.int64(2), memory=np.int32(2**28))
    job.run(tracker, 2)
    assert {type(tracker.every), tracker.every} == {int, 2}


X = torch.zeros(4, 4, dtype=torch.float64)
Y = torch.zeros(4, dtype=torch.int64)

OF_A_BATCH: list[tuple[dict[str, Any], str]] = [
    ({"index": torch.arange(4.0)}, "whole numbers, not by torch.float32"),
    ({"index": Y.bool()}, "whole numbers, not by torch.bool"),
    ({"index": np.arange(4.0)}, "whole numbers, not by torch.float64"),
    ({"index": [True, False, True, True]}, "whole numbers, not by torch.bool"),
    ({"index": torch.arange(3)}, r"the batch's 4 samples, \(4,\), not \(3,\)"),
    ({"index": torch.zeros(4, 1, dtype=torch.int64)}, r"not \(4, 1\)"),
    ({"index": {"a": 1}}, "index= is a tensor, an array or a list"),
    ({"weight": "avg"}, "weight= .* is one of 'mean', 'sum', not 'avg'"),
    ({"weight": float("nan")}, "weight= is nan: it has to be finite"),
    ({"weight": float("-inf")}, "weight= is -inf"),
    ({"weight": True}, "weight= is a number, not True"),
    ({"weight": None}, "weight= is a number, not None"),
    ({"weight": torch.tensor([1.0, float("nan"), 1.0, 1.0])}, r"weight= holds 1 number\(s\) that are not finite"),
    ({"weight": [1.0, float("inf"), 1.0, 1.0]}, "weight= holds 1"),
    ({"weight": torch.ones(3)}, r"one number for each of the 4 samples, not \(3,\)"),
    ({"weight": torch.ones(4, dtype=torch.complex64)}, "real numbers"),
    ({"weight": ["a", "b", "c", "d"]}, "weight= is a tensor, an array or a list of numbers"),
]


@pytest.mark.parametrize(("options", "message"), OF_A_BATCH)
def test_of_a_batch(options: dict[str, Any], message: str) -> None:
    tracker = make_job().tracker()
    with tracker.step(), pytest.raises((TypeError, ValueError), match=message):
        tracker.batch((X, Y), **options)


OF_A_STEP: list[tuple[Callable[[Any], Any], str]] = [
    (lambda t: t.clip_grad_norm_(float("nan")), "max_norm is a number above 0, not nan"),
    (lambda t: t.clip_grad_norm_(-1), "max_norm is a number above 0"),
    (lambda t: t.clip_grad_value_("1"), "clip_value is a number, not '1'"),
    (lambda t: t.gradient_scaled("half"), "factor is a number, not 'half'"),
    (lambda t: (t.gradient_scaled(float("nan")), t.optimizer.step()), "scaled by nan"),
    (lambda t: (t.optimizer.param_groups[0].update(lr=float("nan")), t.optimizer.step()), "optimizer's lr is nan"),
    (lambda t: (t.optimizer.param_groups[0].update(lr=np.float32("inf")), t.optimizer.step()), "lr is inf"),
    (lambda t: (t.optimizer.param_groups[0].update(lr=np.float32(0.1)), t.optimizer.step()), r"set lr to float\(lr\)"),
    (lambda t: (t.optimizer.param_groups[0].update(lr=torch.tensor(np.nan)), t.optimizer.step()), "lr is nan"),
    (lambda t: t.log({"kernel/0": 1.0}), "'kernel/0', which is a key of the Tracker's own"),
    (lambda t: t.log({"train/step": 1.0}), "'train/step'"),
    (lambda t: t.log([1.0]), "is a mapping"),
    (lambda t: t.log({"a": torch.ones(2)}), r"'a' is a tensor of shape \(2,\)"),
    (lambda t: t.influence("Query"), r"no query 'Query'; there are: 'query', 'loss' \(did you mean"),
    (lambda t: t.parts("x"), "no query 'x'; there are: 'query', 'loss'"),
    (lambda t: t.residual("x"), "no query 'x'"),
    (lambda t: t.influence("query", ("sample",)), r"explain\(\) the rest"),
]


@pytest.mark.parametrize(("action", "message"), OF_A_STEP)
def test_of_a_step(action: Callable[[Any], Any], message: str) -> None:
    job = make_job()
    tracker = job.tracker()
    with tracker.step(), pytest.raises((TypeError, ValueError), match=message):
        tracker.batch((job.x, job.y))
        sample_loss(job.model, (job.x, job.y)).mean().backward()
        before = job.model[0].weight.detach().clone()
        try:
            action(tracker)
        finally:
            assert torch.equal(job.model[0].weight, before)


NAN = float("nan")
OF_A_FUNCTION: list[tuple[Callable[[], Any], str]] = [
    (lambda: Quadrature(tolerance=NAN), "tolerance= is nan: it has to be finite"),
    (lambda: Quadrature(tolerance=-1e-3), r"tolerance= is at least 0, not -0\.001"),
    (lambda: Quadrature(tolerance="small"), "tolerance= is a number, not 'small'"),  # type: ignore[arg-type]
    (lambda: Quadrature.fixed(0), "nodes= is at least 1"),
    (lambda: Quadrature.fixed(2.5), "nodes= is a whole number"),  # type: ignore[arg-type]
    (lambda: Quadrature(nodes=8, max_nodes=4), "nodes <= max_nodes"),
    (lambda: resolve_groups(0, ["a"]), "at least 1, not 0"),
    (
        lambda: resolve_groups("a.*", ["a.b"]),
        r"groups= .*is one of 'type', 'layer', 'layer.type', 'tensor', not 'a\.\*'",
    ),
    (lambda: resolve_groups("types", ["a.b"]), "did you mean 'type'"),
    (lambda: resolve_groups(["a.*"], ["a.b"]), "groups= is a mapping"),  # type: ignore[arg-type]
    (lambda: prune_masks({"a": torch.ones(3)}, NAN), "keep= .* is nan"),
    (lambda: prune_masks({"a": torch.ones(3)}, True), "keep= .* is a number, not True"),
    (lambda: prune_masks({"a": torch.tensor([1.0, NAN])}, 0.5), "not finite"),
    (lambda: prune_masks({"a": torch.ones(3)}, 0.5, by="layers"), "did you mean 'layer'"),  # type: ignore[arg-type]
    (lambda: prune_masks({"a": torch.ones(3)}, 0.5, unit="filters"), "'filters'"),  # type: ignore[arg-type]
    (lambda: prune_masks({"a": torch.ones(3)}, 0.5, exclude="a*"), r"write exclude=\('a\*',\)"),
    (lambda: prune_masks([torch.ones(3)], 0.5), "the scores is a mapping"),  # type: ignore[arg-type]
    (lambda: extrapolate_first_moment(None, 0.5, 2.5), "steps is a whole number"),  # type: ignore[arg-type]
    (lambda: extrapolate_first_moment(None, NAN, 2), "beta is nan"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("action", "message"), OF_A_FUNCTION)
def test_of_a_function(action: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        action()


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.float64])
def test_masks_that_are_not_boolean_change_nothing(kind: torch.dtype) -> None:
    job = make_job()
    before = job.model[0].weight.detach().clone()
    mask = torch.zeros_like(before).to(kind)
    with (
        pytest.raises(TypeError, match=r"masks are boolean.*0\.weight.*mask\.bool\(\)"),
        pruned(job.model, {"0.weight": mask}),
    ):
        pass
    assert torch.equal(job.model[0].weight, before)


# ------------------------------------------------------------------------------- of a recorded run


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    job = make_job()
    directory = tmp_path_factory.mktemp("run") / "t"
    tracker = job.tracker(trajectory=directory, keyframe_every=4)
    job.run(tracker, STEPS)
    tracker.finish()
    return job, Trajectory.open(directory)


def data(index: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("work has begun")


SAMPLES = {"keep": ("sample",), "sample_loss": sample_loss, "data": data}

OF_EXPLAIN: list[tuple[dict[str, Any], str]] = [
    ({"quadrature": 3}, r"Quadrature\.fixed\(3\)"),
    ({"parts": ()}, r"parts=\(\) asks for nothing"),
    ({"parts": "kernel"}, r"write parts=\('kernel',\)"),
    ({"parts": ("kernel", "kernel")}, "parts= names kernel twice"),
    ({"parts": ("kernal",)}, r"not \['kernal'\]"),
    ({"parts": ("kernel", 3)}, "tuple of names of parts"),
    ({"keep": "step"}, r"write keep=\('step',\)"),
    ({"keep": ("step", "layer")}, "keep takes some of"),
    ({"keep": 3}, "keep= is a tuple of names"),
    ({"groups": ["0.*"]}, "groups= is a mapping"),
    ({"memory": 0}, "memory= .* is at least 1"),
    ({"memory": "1GB"}, "memory= .* is a whole number"),
    ({"window": 3}, r"window= is \(first, last\)"),
    ({"window": (1, 2, 3)}, r"window= is \(first, last\)"),
    ({"window": (0.0, 3.0)}, r"each is a whole number, not 0\.0"),
    ({"window": (False, True)}, "each is a whole number, not False"),
    ({"window": (3, 3)}, "the run has 8 steps"),
    ({**SAMPLES, "samples": []}, "samples= is empty"),
    ({**SAMPLES, "samples": [0.5]}, r"samples=: each is a whole number, not 0\.5"),
    ({**SAMPLES, "samples": torch.zeros(24, dtype=torch.bool)}, "each is a whole number, not False"),
    ({**SAMPLES, "samples": 3}, "samples= is a sequence of whole numbers, not 3"),
    ({**SAMPLES, "samples": [1, 1]}, r"samples= names some numbers twice: \[1\]"),
    ({**SAMPLES, "samples": [99]}, r"saw the samples \[99\]"),
    ({**SAMPLES, "sample_loss": "mean"}, "sample_loss= is a function"),
]


@pytest.mark.parametrize(("options", "message"), OF_EXPLAIN)
def test_of_explain(recorded: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    job, trajectory = recorded
    out = tmp_path / "result"
    with pytest.raises((TypeError, ValueError), match=message):
        explain(trajectory, job.model, job.queries["query"], progress=False, **{"out": out, **options})
    assert not out.exists()


def test_of_what_is_explained(recorded: Any) -> None:
    job, trajectory = recorded
    query = job.queries["query"]
    for action, message in (
        (lambda: explain(str(trajectory.directory), job.model, query), r"write Trajectory\.open\("),
        (lambda: explain(3, job.model, query), "a Trajectory, or an iterable of Step, not 3"),
        (lambda: explain(trajectory, query, job.model), "the model is a Module"),
        (lambda: explain(trajectory, job.model, job.x), r"the query is a Query, not .*Query\.outputs"),
        (lambda: explain(trajectory, job.model, query, grups={"all": "*"}), "grups"),
        (lambda: step_scores(trajectory, job.model, query, by="losses"), "did you mean 'loss'"),
        (lambda: parameter_scores(trajectory, job.model, query, window=(3, 3)), "the run has 8 steps"),
        (lambda: parameter_scores(trajectory, job.model, query, part="kernal"), "'kernal'"),
        (lambda: parameter_scores(trajectory, job.model, query, quadrature=2), r"Quadrature\.fixed\(2\)"),
        (lambda: similarity(trajectory, job.model, query, sample_loss=sample_loss, quadrature=1), "Quadrature"),
        (lambda: kernel_machine(trajectory, job.model, job.x, outputs=data, loss=data), "the query is a Query"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            action()


def test_a_part_that_the_run_does_not_have_scores_nothing(recorded: Any) -> None:
    job, trajectory = recorded
    scores = parameter_scores(trajectory, job.model, job.queries["query"], part="past", progress=False)
    assert not any(bool(score.any()) for score in scores.values())


@pytest.mark.parametrize("step", [99, -1, STEPS + 1, 4.0, True, "4", None])
def test_steps_that_there_are_not(recorded: Any, step: Any) -> None:
    _, trajectory = recorded
    for ask in (trajectory.state_dict, trajectory.batches, trajectory.replay, trajectory.steps):
        with pytest.raises((TypeError, ValueError), match=re.escape(repr(step))):
            ask(step)
    assert torch.equal(trajectory.state_dict(np.int64(4))["0.bias"], trajectory.state_dict(4)["0.bias"])


def test_of_rankings(recorded: Any) -> None:
    job, trajectory = recorded
    found = explain(trajectory, job.model, job.queries["query"], keep=("step", "query", "output"), progress=False)
    for steps, message in (([0, 0], "twice"), ([0.5], "whole number"), ([99], r"\[99\]"), ("all", "sequence")):
        with pytest.raises((TypeError, ValueError), match=message):
            sparse_prediction(found, steps)
    scores = step_scores(trajectory, job.model, by="size", progress=False)
    with pytest.raises(ValueError, match="not finite"):
        top_steps(scores * NAN, 0.5)
    with pytest.raises(ValueError, match="fraction is nan"):
        top_steps(scores, NAN)


# ------------------------------------------------------------------------------- of what cannot be had


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self[0], x, use_reentrant=False)
        return self[1](hidden.tanh())


def test_gradients_of_samples_that_cannot_be_taken_one_by_one(tmp_path: Path) -> None:
    model = Checkpointed(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = Tracker(model, optimizer, queries={}, trajectory=tmp_path / "t", sample_loss=sample_loss)
    with tracker.step():
        tracker.batch((X, Y))
        with pytest.raises(RuntimeError, match=r"use loss\.backward\(\) in its place.*saved tensor hooks"):
            tracker.backward()
    tracker.finish()

    wrong = Tracker(model, optimizer, queries={}, trajectory=tmp_path / "u", sample_loss=lambda model, batch: model(3))
    with wrong.step():
        wrong.batch((X, Y))
        with pytest.raises(TypeError, match="must be Tensor"):
            wrong.backward()


@pytest.mark.parametrize(
    ("module", "action", "message"),
    [
        ("matplotlib", lambda: make_job().tracker(map_queries=1, samples_every=1), r"explaind_track\[plots\]"),
        ("matplotlib", lambda: plots.cosine_map(np.eye(2)), r"explaind_track\[plots\]"),
        ("wandb_workspaces", lambda: make_workspace("me", "grokking"), r"explaind_track\[workspace\]"),
    ],
)
def test_packages_that_are_not_installed(
    module: str, action: Callable[[], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == module else find_spec(name))
    with pytest.raises(ModuleNotFoundError, match=message):
        action()


def test_options_of_a_callback_are_the_trackers() -> None:
    with pytest.raises(TypeError, match=r"no option 'qeries' \(did you mean 'queries'\?\); there are: queries, groups"):
        TrackerCallbackBase(qeries={"query": QUERY})
