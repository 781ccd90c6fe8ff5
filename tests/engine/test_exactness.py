"""The engine against the oracle, for every case: sums of the influence tensor, parts of a step, the remainder."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from gc import get_referents
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from cases import FIRST, OPTIMIZERS, WEIGHTED, Case, mean
from helpers import AXES, OWN_PARTS, WARM_PARTS, cases, check, fixed, full, influences, parts_of, run, wanted_influence
from reference import Reference
from torch import nn

from explaind_track import Influence, Quadrature, Query, Rule, StepObserver, explain, update_rule
from explaind_track.engine.path_integral import gauss_legendre
from explaind_track.errors import UnexplainedUpdateError

EVERY_KEEP = [keep for count in range(5) for keep in combinations(AXES, count)]


@pytest.mark.parametrize("nodes", [1, 3])
@cases()
def test_sums_are_those_of_the_influence_tensor(case: Case, nodes: int) -> None:
    groups, oracle = case.resolved_groups(), case.reference(nodes)
    psi, psi_reg = oracle.psi(), oracle.psi_reg()  # N D M X O and N D X O
    kernel, decay = oracle.over(groups, psi.sum(2)), oracle.over(groups, psi_reg)  # N G X O
    momentum = oracle.over(groups, oracle.influence(oracle.parts()["momentum"]))
    data, scale = full(case, nodes).data["influence"], float(kernel.abs().max())
    check(data.sel(part="kernel"), kernel)
    check(data.sel(part="regularization"), decay)
    check(data.sel(part="momentum"), momentum, scale)
    if case.auxiliary is not None:
        check(data.sel(part="auxiliary"), oracle.over(groups, oracle.influence(oracle.parts()["auxiliary"])))
    difference = oracle.over(groups, psi.sum((2, 3, 4)) - psi_reg.sum((2, 3)))  # N G

    _, by_step, by_group = influences(case, nodes)
    check(by_step.relative_regularization(), difference)
    check(by_group.relative_regularization(), difference.sum(0), float(difference.abs().max()))
    for part, terms in {"kernel": kernel, "regularization": decay}.items():
        check(by_step.importance().sel(part=part), terms.abs().sum((2, 3)))
        check(by_group.importance().sel(part=part), terms.sum(0).abs().sum((1, 2)))
        check(by_step.total_importance().sel(part=part), terms.sum(1).abs().sum((1, 2)))
        check(by_group.total_importance().sel(part=part), terms.sum((0, 1)).abs().sum())


@pytest.mark.parametrize("nodes", [1, 3])
@cases()
def test_what_the_split_leaves_over_is_told(case: Case, nodes: int) -> None:
    oracle, influence = case.reference(nodes), run(case, AXES, quadrature=Quadrature.fixed(nodes))
    change, whole = oracle.between - oracle.before, oracle.influence(oracle.moved).sum(1)
    remainder, scale, data = change + whole, float(whole.abs().max()), influence.data
    check(data["initial"], oracle.before[0])
    check(data["final"], oracle.after[-1])
    check(data["change"], change, scale)
    check(data["buffers"], oracle.after - oracle.between, scale)
    check(data["remainder"], remainder, scale)
    check(data["rounding"], oracle.influence(oracle.parts()["rounding"]).sum(1), scale)
    check(influence.total(), whole, scale)
    check(influence.prediction(), oracle.after[-1] - remainder.sum(0), float(oracle.after.abs().max()))
    sizes = change.flatten(1).norm(dim=1)
    check(influence.residual, remainder.flatten(1).norm(dim=1) / torch.where(sizes > 0, sizes, 1.0), 1.0)
    assert (data["nodes"] == nodes).all()


@cases()
def test_parts_are_those_of_the_theorem_and_add_up_to_the_step(case: Case) -> None:
    oracle = case.reference(1)
    check_steps(case, oracle, 0, parts_of(case))
    assert all("past" not in step.parts for step in case.steps())


def check_steps(case: Case, oracle: Reference, first: int, parts: Sequence[str]) -> None:
    wanted, scale = oracle.parts(first), float(oracle.moved.abs().max())
    for step in case.steps(first):
        for name, update in step.updates.items():
            found = {part: values[name].flatten() for part, values in step.parts.items()}
            for part in parts:
                check(found[part], wanted[part][step.number, oracle.places[name]], scale)
            lowest = 0.5 * scale if update.rule.precision is torch.bfloat16 else 1e-14
            assert float(found["rounding"].abs().max()) <= lowest * max(1.0, float(update.before.abs().max()))
            whole = sum(values for part, values in found.items() if part != "momentum")
            check(whole, (update.before - update.after).flatten(), tolerance=1e-13)


@cases()
def test_every_choice_of_axes_is_a_sum_of_the_full_array(case: Case) -> None:
    everything = full(case, 1).data
    scale = float(abs(everything["influence"]).max())

    for keep, influence in zip(EVERY_KEEP, run(case, *EVERY_KEEP, **fixed(1, parts_of(case))), strict=True):
        data, gone = influence.data, [axis for axis in AXES if axis not in keep]
        steps, cells = (["step"] if "step" in gone else []), [axis for axis in gone if axis != "group"]
        across = ["output"] if "query" in keep else ["query", "output"]

        assert influence.kept == keep
        check(data["influence"], everything["influence"].sum(gone), scale)
        signed = everything["influence"].sum([axis for axis in gone if axis in ("step", "group")])
        check(influence.importance(), abs(signed).sum(across), scale)
        check(influence.total_importance(), abs(everything["influence"].sum(["group", *steps])).sum(across), scale)

        for name in ("rounding", "buffers", "change", "remainder"):
            check(data[name], everything[name].sum(cells), scale)
        remainder, change = (
            (everything[name].sum(steps) ** 2).sum(("query", "output")) for name in ("remainder", "change")
        )
        check(influence.residual, (remainder / xr.where(change > 0, change, 1)) ** 0.5, 1.0)


@pytest.mark.parametrize("nodes", [1, 2])
@cases()
def test_closing_makes_sums_exact_and_hides_nothing(case: Case, nodes: int) -> None:
    oracle, groups, plain = case.reference(nodes), case.resolved_groups(), full(case, nodes)
    closed: Influence = run(case, AXES, close=True, **fixed(nodes, parts_of(case)))
    check(closed.total(), -closed.data["change"], float(abs(plain.data["influence"]).max()))
    check(closed.prediction(), oracle.after[-1], float(oracle.after.abs().max()))
    for name in ("residual", "remainder", "change", "rounding"):
        check(closed.data[name], plain.data[name], tolerance=0)
    check(closed.data["influence"].sel(part="momentum"), plain.data["influence"].sel(part="momentum"), tolerance=0)

    own = parts_of(case, OWN_PARTS)
    terms = wanted_influence(oracle, groups, own)
    sizes = np.abs(terms)
    if nodes == 2:
        single = [case.reference_by(((time, 1.0),)) for time in (0.5 - 12**-0.5, 0.5 + 12**-0.5)]
        variance = np.var([wanted_influence(one, groups, own) for one in single], axis=0)
        curved = variance.sum((0, 2), keepdims=True) > 1e-14 * (terms**2).sum((0, 2), keepdims=True)
        sizes = np.where(curved, variance, sizes)
    total = sizes.sum((0, 2), keepdims=True)
    shares = np.divide(sizes, total, out=np.zeros_like(sizes), where=total > 0)
    remainder = plain.data["remainder"].values[None, :, None]
    check(closed.data["influence"].sel(part=list(own)), terms - shares * remainder)


@cases("target-outputs", "target-loss", "target-mean-loss", "target-summed-outputs", "adamw-thawed")
def test_closing_does_not_depend_on_chunks(case: Case) -> None:
    whole, cut = (run(case, AXES, close=True, memory=memory, **fixed(2)) for memory in (2**28, 1))
    check(cut.data["influence"], whole.data["influence"])


def test_closing_is_exact_where_no_node_sees_a_derivative() -> None:
    """ReLU(w·x) with w from −3 to 1: the one node lies where the unit is off."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU()).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    observer, weight = StepObserver(optimizer, dict(model.named_parameters())), model.get_parameter("0.weight")
    weight.data.fill_(-3.0)
    weight.grad = torch.full_like(weight, -4.0)
    observer.before({})
    optimizer.step()
    step = observer.after(0, {})

    query = Query.outputs(torch.ones(1, 1, dtype=torch.float64))
    influence = explain([step], model, query, keep=AXES, close=True, quadrature=Quadrature.fixed(1), progress=False)
    check(influence.data["change"], [[[1.0]]])
    check(influence.total(), [[[-1.0]]])


@cases(*(name for name in OPTIMIZERS if name != "sgd-groups"), "adamw-weighted", "sgd-dampening-decay-weighted")
def test_the_order_within_a_batch_does_not_matter(case: Case) -> None:
    turned = replace(case, loop=tuple(replace(t, index=t.index[::-1], weights=t.weights[::-1]) for t in case.loop))
    check(run(turned, AXES, **fixed(1, parts_of(case))).data["influence"], full(case, 1).data["influence"])


@cases("adamw", "attention-adamw", "tied-adamw", "attention-nesterov-loss", "target-mean-loss")
def test_refinement_doubles_the_nodes_until_smooth_models_reach_the_tolerance(case: Case) -> None:
    influence = run(case, AXES, quadrature=Quadrature(1e-9, 1, 64))
    nodes = influence.data["nodes"].values
    assert set(nodes) <= {1, 2, 4, 8, 16, 32}
    assert nodes.max() > 1
    assert (influence.residual <= 1e-9).all()
    for count in set(nodes) - {1}:
        before = run(case, AXES, **fixed(int(count) // 2)).residual.values
        assert (before[nodes == count] > 1e-9).all()
    check(influence.total(), -influence.data["change"])


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 7, 8, 10, 13, 64])
def test_nodes_come_in_even_panels_of_high_order(nodes: int) -> None:
    times, weights = np.array(gauss_legendre(nodes)).T
    assert len(times) == nodes
    assert (np.diff([0, *times, 1]) > 0).all()
    assert max(weights) <= 2.5 / nodes
    fewest = nodes // -(-nodes // 4)
    for degree in range(2 * fewest):
        check(weights @ times**degree, 1 / (degree + 1), tolerance=1e-14)


@cases("adamw", "encoder-nesterov-loss")
def test_sums_are_exact_for_many_nodes_too(case: Case) -> None:
    oracle = case.reference_by(gauss_legendre(10))
    check(full(case, 10).data["influence"], wanted_influence(oracle, case.resolved_groups()))


@cases("relu-adamw")
def test_refinement_stops_at_the_most_nodes_allowed(case: Case) -> None:
    influence = run(case, AXES, quadrature=Quadrature(1e-14, 3, 10))
    assert set(influence.data["nodes"].values) <= {3, 6, 10}
    assert influence.data["nodes"].max() == 10
    with pytest.raises(ValueError, match="nodes"):
        Quadrature(nodes=8, max_nodes=4)


@cases("adamw", "sgd-nesterov-decay", "attention-nesterov-loss", "target-mean-loss")
def test_float32_stops_at_its_floor(case: Case) -> None:
    influence = run(replace(case, dtype=torch.float32), AXES, quadrature=Quadrature(0.0, 1, 64))
    assert influence.data["nodes"].max() <= 8
    assert (influence.residual <= 4 * influence.data["residual_floor"]).all()
    check(influence.total(), -influence.data["change"], tolerance=1e-4)


@cases("sgd")
def test_rounding_is_a_part_where_float32_loses_the_update(case: Case) -> None:
    """Weights near 1000, where an update of 1e-4 is close to the last digit."""

    def far() -> nn.Module:
        model = case.model()
        for parameter in model.parameters():
            parameter.data += 1000
        return model

    lost = 0.0
    shifted = replace(
        case, model=far, dtype=torch.float32, optimizer=lambda model: torch.optim.SGD(model.parameters(), 1e-4)
    )
    for step in shifted.steps():
        for name, update in step.updates.items():
            kernel = update.gradient.double() * 1e-4
            wanted = update.before.double() - update.after.double() - kernel
            check(step.parts["rounding"][name], wanted, float(kernel.abs().max()), tolerance=1e-6)
            lost = max(lost, float(wanted.abs().max() / kernel.abs().max()))
    assert lost > 0.1


@pytest.mark.parametrize("keep", EVERY_KEEP, ids="+".join)
@cases("adamw")
def test_influences_survive_being_saved(case: Case, keep: Sequence[str], tmp_path: Path) -> None:
    influence: Influence = run(case, keep)
    influence.save(tmp_path / "influence.safetensors")
    loaded = Influence.load(tmp_path / "influence.safetensors")
    xr.testing.assert_identical(loaded.data, influence.data)
    for name, array in influence.data.variables.items():
        assert loaded.data[name].dtype == array.dtype


@cases("muon", "lion", "nadam", "radam", "rmsprop-momentum", "rmsprop-momentum-clipped",
       "adamw", "adamw-groups", "adamw-amsgrad", "adamw-maximize", "adam-decay", "adam-betas", "sgd-momentum-decay",
       "sgd-dampening-decay", "sgd-nesterov-decay", "sgd-nesterov-maximize", "adamw-thawed", "adamw-late")  # fmt: skip
def test_a_warm_start_has_the_past_as_a_part(case: Case) -> None:
    oracle, groups = case.reference(1), case.resolved_groups()
    check_steps(case, oracle, 2, (*WARM_PARTS, "momentum"))
    influence = run(case, AXES, first=2, **fixed(1, WARM_PARTS))
    assert list(influence.data["step"]) == list(range(2, len(case.loop)))
    wanted = wanted_influence(oracle, groups, WARM_PARTS, first=2)
    check(influence.data["influence"].sel(part=list(WARM_PARTS)), wanted)
    owned = sum(part for name, part in oracle.parts(2).items() if name not in ("momentum", "rounding"))
    check(influence.total(), oracle.influence(owned).sum(1)[2:])


def test_a_warm_start_whose_past_rests_for_a_step() -> None:
    """The only parameters with a past get no gradient at step 2."""
    second = ("second.weight", "second.bias")
    case = Case("resting", loop=(mean(0, 1, without=FIRST), mean(2, 3), mean(4, without=second), mean(5, 6)))
    influence = run(case, AXES, first=1, quadrature=Quadrature.fixed(1))
    parts = list(influence.data["part"].values)
    check(influence.data["influence"], wanted_influence(case.reference(1), case.resolved_groups(), parts, first=1))


@pytest.mark.parametrize("cls", [torch.optim.Adamax, torch.optim.Rprop, torch.optim.ASGD])
def test_an_unknown_optimizer_is_refused_with_the_remedy(cls: type[torch.optim.Optimizer]) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=rf"(?s){cls.__name__}.*Adam.*SGD.*@explaind_track\.update_rule\.register"):
        StepObserver(cls(model.parameters(), lr=0.1), dict(model.named_parameters()))


def test_closures_that_evaluate_many_times_are_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"LBFGS.*many times"):
        StepObserver(torch.optim.LBFGS(model.parameters()), dict(model.named_parameters()))


def test_parameters_that_are_no_real_numbers_are_refused() -> None:
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"real numbers.*weight \(torch.complex64\)"):
        StepObserver(torch.optim.SGD(model.parameters()), dict(model.named_parameters()))


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 parameter\(s\).*\(2, 2\)"):
        StepObserver(torch.optim.SGD(nn.Linear(2, 2).parameters()), dict(nn.Linear(2, 2).named_parameters()))


class Halved(torch.optim.SGD):
    """Its step is not what its class says."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data *= 0.5


@pytest.fixture
def halved_rule() -> Iterator[None]:
    @update_rule.register
    def _(optimizer: Halved, settings: Any, state: Any, first: bool) -> Rule:
        rate = settings["lr"]
        return Rule(buffer=None, beta=0.0, b=1.0, e=0.0, d=rate / 2, decoupled=0.5)

    yield
    get_referents(update_rule.registry)[0].pop(Halved)  # singledispatch has no way to unregister
    update_rule._clear_cache()


HALVED = Case("halved", optimizer=lambda model: Halved(model.parameters(), lr=0.2), loop=WEIGHTED)


def test_a_step_that_its_rule_does_not_explain_is_refused() -> None:
    with pytest.raises(UnexplainedUpdateError, match=r"Halved.*first\.\w+.*register"):
        next(HALVED.steps())


@pytest.mark.usefixtures("halved_rule")
def test_a_registered_rule_is_used() -> None:
    plain = replace(HALVED, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.2))
    (step, wanted), update = (next(case.steps()) for case in (HALVED, plain)), "first.weight"
    check(step.parts["kernel"][update], wanted.parts["kernel"][update] / 2)
    check(step.parts["regularization"][update], step.before.parameters[update] / 2)
    check(run(HALVED, AXES, quadrature=Quadrature()).residual, np.zeros(4), 1.0, tolerance=1e-3)
