"""Queries: what their constructors compute, in plain torch; and what is refused, with the remedy in the message."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import TARGETS, Case, Target
from helpers import AXES, check, fixed, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from explaind_track import Explainer, Quadrature, Query, Tracker, explain

CASE = Case("query")
X, Y = CASE.data(4, 3)
MODEL = CASE.make()


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_a_target_is_what_its_constructor_says(target: Target) -> None:
    query, wanted = target.query(X, Y), target.plain(MODEL, X, Y).detach()
    rows = query(MODEL).detach()
    assert query.size == len(rows) == 4
    if query.reduction is None:
        assert len(query) == 4
        check(rows, wanted)
    else:
        assert len(query) == 1
        check(rows.mean(0)[None] if query.reduction == "mean" else rows.sum(0)[None], wanted)


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_rows_of_a_query_are_a_query(target: Target) -> None:
    query = target.query(X, Y)
    check(query.rows(1, 3, X.device)(MODEL).detach(), query(MODEL)[1:3].detach())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return self.second(torch.tanh(self.first(x if shift is None else x + shift))) * scale


SHIFT = torch.arange(12, dtype=torch.float64).reshape(4, 3) / 10
EVERY_KIND_OF_INPUTS = {
    "tuple": (X, SHIFT, 2.0),
    "mapping": {"x": X, "shift": SHIFT, "scale": 2.0},
    "missing": {"x": X + SHIFT, "shift": None, "scale": 2.0},
}


@pytest.mark.parametrize("inputs", EVERY_KIND_OF_INPUTS.values(), ids=list(EVERY_KIND_OF_INPUTS))
@pytest.mark.parametrize("constructor", [lambda inputs: Query.outputs(inputs), lambda inputs: Query.loss(inputs, Y)])
def test_models_may_take_several_inputs(inputs: Any, constructor: Any) -> None:
    """Those of a tuple by position, those of a mapping by name, with values that are no tensors."""
    case = replace(CASE, model=TwoInputs)
    results = [
        explain(case.steps(), case.make(), constructor(each), quadrature=Quadrature.fixed(1), progress=False)
        for each in (inputs, (X + SHIFT, None, 2.0))
    ]
    check(results[0].data["influence"], results[1].data["influence"])


class Output(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Output:
        hidden = torch.tanh(self.first(x))
        return Output(self.second(hidden), hidden)


def test_outputs_that_are_no_tensor_need_a_function() -> None:
    model = Structured().double()
    with pytest.raises(TypeError, match=r"Output, not a tensor.*Query\.function"):
        explain([], model, Query.outputs(X))
    check(Query.function(X, lambda output: output.logits)(model).detach(), model(X).logits.detach())


@pytest.mark.parametrize("reduce", [lambda query: query, Query.mean, Query.sum], ids=["rows", "mean", "sum"])
@pytest.mark.parametrize("memory", [1, 2**28])
def test_the_loss_and_accuracy_of_a_query_are_told(reduce: Any, memory: int) -> None:
    explainers = [
        Explainer(MODEL, query, CASE.resolved_groups(), [("step",)], memory=memory)
        for query in (reduce(Query.loss(X, Y)), Query.outputs(X, Y))
    ]
    for step in CASE.steps():
        model = CASE.make()
        for explainer in explainers:
            explainer.add(step)
        model.load_state_dict(dict(step.after.parameters))
        loss, accuracy = F.cross_entropy(model(X), Y), (model(X).argmax(1) == Y).double().mean()
        check(explainers[0].metrics["loss"], loss.detach())
        check([explainers[1].metrics[name] for name in ("loss", "accuracy")], [loss.detach(), accuracy], 1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Query.outputs(X[:0]),
        lambda: Query.outputs(()),
        lambda: Query.outputs({"scale": 2.0}),
        lambda: Query.loss(X, Y[:3]),
        lambda: Query.outputs((X, SHIFT[:2])),
        lambda: Query.margin(X, Y, Y[:1]),
        lambda: Query.outputs(torch.tensor(1.0)),
    ],
)
def test_inputs_and_labels_need_rows_and_as_many(make: Any) -> None:
    words = r"a query's inputs and labels: (.* same, positive number of rows|found no tensor)"
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda output: output.argmax(1), "torch.int64"),
        (lambda output: output > 0, "torch.bool"),
        (lambda output: output.detach(), "differentiably"),
        (lambda output: (output > 0).double(), "differentiably"),
        (lambda output: torch.from_numpy(output.detach().numpy() ** 2), "differentiably"),
    ],
    ids=["argmax", "boolean", "detach", "comparison", "numpy"],
)
def test_targets_without_a_derivative_are_refused_before_any_work(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(CASE.steps(), MODEL, Query.function(X, function))


@pytest.mark.parametrize("function", [lambda output: output.sum(), lambda output: output.sum(0), lambda _: 1.0])
def test_targets_must_keep_the_rows(function: Any) -> None:
    with pytest.raises(ValueError, match=r"one row for each of its \d inputs.*Query\.mean\(\)"):
        explain(CASE.steps(), MODEL, Query.function(X[:2], function), quadrature=Quadrature.fixed(1), progress=False)


def test_an_unknown_submodule_is_told_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no submodule 'third'; it has first, second"):
        explain(CASE.steps(), MODEL, Query.activation(X, "third"))


def test_a_submodule_has_to_run_once() -> None:
    twice = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    twice.append(twice[0])
    twice.append(nn.ModuleDict({"idle": nn.Linear(3, 3)})["idle"])
    with pytest.raises(ValueError, match="'0' ran 2 times"):
        explain([], twice.double(), Query.activation(X, "0"))


def test_activations_do_not_depend_on_what_comes_after_them() -> None:
    influence = run(Case("activation", target=TARGETS["activation"]), AXES, **fixed(1)).data["influence"]
    assert float(abs(influence.sel(group="second")).max()) == 0
    assert float(abs(influence.sel(group="first")).max()) > 0


def test_axes_and_parts_that_there_are_not_are_refused() -> None:
    with pytest.raises(ValueError, match="sample"):
        explain(CASE.steps(), MODEL, Query.outputs(X), keep=("step", "sample"))
    with pytest.raises(ValueError, match="kernels"):
        explain(CASE.steps(), MODEL, Query.outputs(X), parts=("kernels",))
    with pytest.raises(ValueError, match="no step"):
        explain([], MODEL, Query.outputs(X), progress=False)
    with pytest.raises(ValueError, match="window"):
        explain(CASE.steps(), MODEL, Query.outputs(X), window=(0, 2))


class Refused(nn.Module):
    """A model that is no differentiable function of its parameters, of some kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(3, 3), kind
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "random":
            return self.linear(x) + torch.rand(())
        if self.kind == "writing":
            self.calls += 1
            return self.linear(x) * self.calls
        return checkpoint(self.linear, self.linear(x), use_reentrant=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("random", "draws random numbers in eval mode"),
        ("writing", "writes to its own calls"),
        ("reentrant", "use use_reentrant=False"),
    ],
)
def test_models_that_are_no_function_of_their_parameters_are_refused(kind: str, message: str) -> None:
    model, before = Refused(kind), torch.get_rng_state()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        Tracker(model, optimizer, queries={"q": Query.outputs(torch.randn(2, 3, generator=torch.Generator()))})
    assert torch.equal(torch.get_rng_state(), before)
    assert float(model.calls) == 0
