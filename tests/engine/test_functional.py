"""Forward and reverse mode, whole and in chunks, with and without the derivatives that an operation lacks."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from cases import ADAMW, LATE, QUERIES, RAGGED, TARGETS, Case, Target, mean
from helpers import AXES, OWN_PARTS, cases, check, fixed, parts_of, run, wanted_influence
from models import MLP, encoder
from reference import flat
from torch import Tensor, nn

from explaind_track import Quadrature, Query, State, explain
from explaind_track.engine import plan_choice
from explaind_track.engine.features import Features
from explaind_track.engine.functional import Functional, evaluation
from explaind_track.engine.memory import activation_bytes
from explaind_track.engine.path_integral import gauss_legendre
from explaind_track.engine.per_sample import sample_gradients
from explaind_track.errors import ForwardModeFallbackWarning

either_plan = pytest.mark.parametrize("cost", [0, inf], ids=["reverse", "forward"])


@pytest.mark.parametrize(("cost", "memory"), [(0, 1), (0, 10_000), (inf, 1), (inf, 10_000)])
@cases()
def test_plans_and_chunks_do_not_matter(case: Case, cost: float, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_choice, "REVERSE_COST", cost)
    oracle, groups, parts = case.reference(1), case.resolved_groups(), parts_of(case)
    full, by_group = run(case, AXES, ("group",), memory=memory, **fixed(1, parts))
    wanted = wanted_influence(oracle, groups, parts)
    check(full.data["influence"], wanted)
    check(by_group.data["influence"], wanted.sum((1, 3, 4)), np.abs(wanted).max())
    check(full.data["initial"], oracle.before[0])
    owned = sum(part for name, part in oracle.parts().items() if name not in ("momentum", "rounding"))
    check(full.data["remainder"], oracle.between - oracle.before + oracle.influence(owned).sum(1), 1.0)


@either_plan
@cases("adamw-thawed", "adamw-late")
def test_chunks_may_differ_from_step_to_step(case: Case, cost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that leaves some parameters alone needs less memory, and so takes larger chunks of queries."""
    monkeypatch.setattr(plan_choice, "REVERSE_COST", cost)
    wanted = wanted_influence(case.reference(1), case.resolved_groups()).sum((1, 2))
    for memory in range(500, 6_000, 250):
        influence = run(case, ("query", "output"), memory=memory, **fixed(1))
        check(influence.data["influence"], wanted)
        check(influence.data["initial"], case.reference(1).before[0])


@either_plan
@pytest.mark.parametrize("quadrature", [Quadrature.fixed(1), Quadrature()], ids=["fixed", "adaptive"])
def test_a_step_that_moves_nothing_explains_nothing(
    cost: float, quadrature: Quadrature, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_choice, "REVERSE_COST", cost)
    every = tuple(dict(MLP().named_parameters()))
    case = Case("pause", loop=(mean(0, 1), mean(2, without=every), mean(3, 4)))
    influence = run(case, AXES, quadrature=quadrature)
    assert float(abs(influence.data["influence"][:, 1]).max()) == 0
    assert float(influence.residual[1]) == 0
    if quadrature.max_nodes == 1:
        check(influence.data["influence"], wanted_influence(case.reference(1), case.resolved_groups(), OWN_PARTS))


@pytest.mark.parametrize("memory", [1, 2**28])
@pytest.mark.parametrize("id", ["adamw", "sgd-nesterov-decay"])
def test_the_query_feature_is_the_integrated_gradient(id: str, memory: int) -> None:  # noqa: A002
    case = Case(id, target=TARGETS["mean-loss"])
    features = Features(Functional(case.make(9)), case.query(), memory)
    for s, step in enumerate(case.steps()):
        check(flat(features.of(step, gauss_legendre(3))), case.reference(3).test[s, 0, 0])


class Cube(torch.autograd.Function):
    """Has a derivative in reverse mode alone, which can be differentiated again."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class VmapCube(Cube):
    """The same with a rule for vmap."""

    generate_vmap_rule = True


class OnceCube(VmapCube):
    """The same with a reverse derivative that cannot be differentiated again."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class SilentCube(VmapCube):
    """The same, but it does not say so, like many a kernel of one's own."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (3 * x**2 * gradient).detach()


class OldCube(torch.autograd.Function):
    """The same in the style from before torch.func."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    backward = Cube.backward


CUBES = [Cube, VmapCube, OnceCube, SilentCube, OldCube]


def cubed(function: type[torch.autograd.Function], target: str) -> Case:
    """In a model with a way around the operation."""
    return Case(target, model=lambda: MLP(lambda x: x + function.apply(x)), target=TARGETS[target], loop=RAGGED[:3])


@pytest.mark.parametrize("function", CUBES)
def test_an_operation_without_forward_rule_falls_back_and_says_so_once(function: type[torch.autograd.Function]) -> None:
    case = cubed(function, "outputs")
    with pytest.warns(ForwardModeFallbackWarning, match="influences are computed in reverse mode") as told:
        influence = run(case, AXES, **fixed(1))
    assert len(told) == 1
    check(influence.data["influence"], wanted_influence(case.reference(1), case.resolved_groups()))


class CubeModule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x)


@pytest.mark.filterwarnings("ignore::explaind_track.errors.ForwardModeFallbackWarning")
@either_plan
def test_a_fallback_may_meet_parameters_that_the_target_does_not_know(
    cost: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_choice, "REVERSE_COST", cost)
    target = Target(lambda x, _: Query.activation(x, "activation"), lambda f, x, _: f.activation(f.first(x)))
    case = Case("early", model=lambda: MLP(CubeModule()), target=target, loop=LATE)
    influence = run(case, AXES, memory=1, **fixed(1))
    check(influence.data["influence"], wanted_influence(case.reference(1), case.resolved_groups()))


@pytest.mark.filterwarnings("ignore::explaind_track.errors.ForwardModeFallbackWarning")
@pytest.mark.parametrize("target", ["loss", "mean-loss"])
@pytest.mark.parametrize("function", CUBES)
def test_the_reverse_plan_does_without_special_rules(function: type[torch.autograd.Function], target: str) -> None:
    case = cubed(function, target)
    influence = run(case, AXES, **fixed(1))
    check(influence.data["influence"], wanted_influence(case.reference(1), case.resolved_groups()))


@pytest.mark.filterwarnings("ignore::explaind_track.errors.ForwardModeFallbackWarning")
@pytest.mark.parametrize("function", CUBES)
def test_directional_derivatives_of_a_loss_vector(function: type[torch.autograd.Function]) -> None:
    """⟨μ, ∇L_k⟩ for every sample k and several directions μ."""
    case = cubed(function, "loss")
    model, (x, y) = case.make(), case.data(5, 1)
    parameters = dict(model.named_parameters())
    directions = {name: torch.randn(2, *value.shape, dtype=torch.float64) for name, value in parameters.items()}
    functional = Functional(model)
    losses = functional.at(state_of(model), lambda model: case.sample_loss(model, x, y))
    found = functional.jvp(losses, {name: value.detach() for name, value in parameters.items()}, directions)
    wanted = torch.zeros(2, 5, dtype=torch.float64)
    for k in range(5):
        gradient = torch.autograd.grad(case.sample_loss(model, x, y)[k], list(parameters.values()))
        for row in range(2):
            wanted[row, k] = sum((g * d[row]).sum() for g, d in zip(gradient, directions.values(), strict=True))
    check(found, wanted)


@cases("target-outputs")
def test_an_error_of_the_target_is_told_as_it_is(case: Case) -> None:
    def target(output: Tensor) -> Tensor:
        if len(output) > 1:
            raise RuntimeError("nothing to do with derivatives")
        return output

    query = Query.function(case.data(QUERIES, 2)[0], target)
    with pytest.raises(RuntimeError, match="nothing to do with derivatives"):
        explain(case.steps(), case.make(), query, progress=False)


@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_gives_every_module_its_own_mode_back(fails: bool) -> None:
    model = nn.Sequential(encoder(), nn.Dropout(), nn.BatchNorm1d(3))
    model[0].eval()
    model[0][0].dropout.train()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2

    try:
        with evaluation(model):
            assert not any(module.training for module in model.modules())
            assert not torch.backends.mha.get_fastpath_enabled()
            if fails:
                raise KeyError("something")
    except KeyError:
        assert fails

    assert modes == [module.training for module in model.modules()]
    assert torch.backends.mha.get_fastpath_enabled()


@cases("adamw-thawed", "relu-adamw", "encoder-adamw", "normalized-adamw")
def test_a_model_is_left_as_it_was(case: Case) -> None:
    model = case.make(9)
    next(model.children()).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    explain(case.steps(), model, case.query(), quadrature=Quadrature.fixed(1), progress=False)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def state_of(model: nn.Module) -> State:
    return State(dict(model.named_parameters()), dict(model.named_buffers()))


@pytest.mark.parametrize("make", [MLP, lambda: MLP(torch.relu)])
def test_activation_bytes_grow_with_rows(make: Callable[[], nn.Module]) -> None:
    model = make()
    small, large = (
        activation_bytes(Functional(model), state_of(model), Query.outputs(torch.randn(rows, 3))) for rows in (10, 1000)
    )
    assert small >= 10 * 4 * (3 + 4 + 3)  # input, hidden and output, at least
    assert 50 * small < large <= 100 * small


def test_measuring_activations_leaves_none_of_them() -> None:
    """A softmax keeps its output for its backward pass, which a hook that returns it as it is would hold for good."""
    model, alive = nn.Sequential(nn.Linear(3, 4), nn.Softmax(1)), []
    model.register_forward_hook(lambda _module, _inputs, output: alive.append(weakref.ref(output)))
    activation_bytes(Functional(model), state_of(model), Query.outputs(torch.randn(5, 3)))
    assert len(alive) == 1
    assert alive[0]() is None


@cases("adamw", "attention-adamw", "convolution-adamw", "tied-adamw", "encoder-adamw")
def test_sample_gradients_are_those_of_each_sample_alone(case: Case) -> None:
    model = case.make()
    x, y = case.data(5, 1)
    gradients, losses = sample_gradients(
        Functional(model),
        lambda m, batch: case.sample_loss(m, batch["x"], batch["y"]),
        state_of(model),
        {"x": x, "y": y},
    )
    for k in range(5):
        loss = case.sample_loss(model, x[k : k + 1], y[k : k + 1])[0]
        check(losses[k].detach(), loss.detach())
        wanted = torch.autograd.grad(loss, list(model.parameters()))
        check(flat({name: value[k].detach() for name, value in gradients.items()}), flat(dict(enumerate(wanted))))


def test_a_model_is_explained_in_its_own_precision() -> None:
    case = replace(Case("half", optimizer=ADAMW), dtype=torch.float32)
    influence = run(case, AXES, **fixed(1))
    assert influence.data["influence"].dtype == np.float32
    check(influence.data["influence"], run(Case("double"), AXES, **fixed(1)).data["influence"], tolerance=1e-4)
