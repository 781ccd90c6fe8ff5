"""The trapezoid: against plain loops, for every optimizer, and with its gradient carried from step to step."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import OPTIMIZERS
from helpers import check
from models_hf import gpt2
from torch import Tensor, nn

from explaind_track import Explainer, Quadrature, Query, Step, StepObserver, explain
from explaind_track.core import proof, update
from explaind_track.errors import UnexplainedUpdateError

PARTS = ("kernel", "momentum", "regularization", "l1")
GROUPS = {"first": ["0.weight"], "middle": ["0.bias", "2.weight"], "last": ["2.bias"]}


def small(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(7, 4, dtype=torch.float64).to(dtype), torch.randint(3, (7,))


def l1(model: nn.Module) -> Tensor:
    return 0.01 * sum(p.abs().sum() for p in model.parameters())  # type: ignore[no-any-return]


def steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    count: int = 4,
    between: Callable[[int], object] = lambda _: None,
) -> Iterator[Step]:
    observer, parameters = StepObserver(optimizer, dict(model.named_parameters())), dict(model.named_parameters())
    x, y = data(next(model.parameters()).dtype)
    for number in range(count):
        optimizer.zero_grad()
        auxiliary = dict(zip(parameters, torch.autograd.grad(l1(model), list(parameters.values())), strict=True))
        (F.cross_entropy(model(x), y) + l1(model)).backward()
        observer.before({}, {"l1": auxiliary})
        optimizer.step()
        yield observer.after(number, {})
        observer.settle()
        between(number)


def plain(
    step: Step, query: Query, model: nn.Module, groups: Mapping[str, list[str]] = GROUPS
) -> tuple[Tensor, Tensor]:
    """½ ⟨∇f_{θ_s} + ∇f_{θ_{s+1}}, part⟩ by part and group, and what all parts leave over of the step."""
    total = dict.fromkeys(step.updates, torch.zeros(()))
    for state in (step.before, step.after):
        model.load_state_dict(dict(state.parameters))
        names, own = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(query(model).mean(), own)
        total |= {name: total[name] + gradient / 2 for name, gradient in zip(names, gradients, strict=True)}

    def over(part: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([sum((total[n] * part[n]).sum() for n in names) for names in groups.values()])  # type: ignore

    return torch.stack([over(step.parts[part]) for part in PARTS]), over(step.parts["rounding"]).sum()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_carried_sums_are_those_of_plain_loops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "CPU_PIECE", 7)
    model, (x, y) = small(), data()
    query = Query.loss(x, y).mean()
    some = Explainer(model, query, GROUPS, [("step", "group")], PARTS, Quadrature.trapezoid(), memory=1)
    every = Explainer(model, query, GROUPS, [("step", "group")], None, Quadrature.trapezoid(), memory=1)
    wanted, rounding = [], []
    for step in steps(model, OPTIMIZERS[name](model), 3):
        some.add(step)
        every.add(step)
        found, left = plain(step, query, small())
        wanted.append(found)
        rounding.append(left)

    assert some.integrator.carries
    data_of_some, data_of_all = some.results()[0].data, every.results()[0].data
    check(data_of_some["influence"], torch.stack(wanted, 1).numpy(), tolerance=1e-12)
    check(data_of_all["rounding"], torch.stack(rounding).numpy(), scale=float(wanted[0].abs().max()), tolerance=1e-12)
    assert data_of_some["nodes"].values.tolist() == [2] * 3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_carried_or_not_the_sums_are_the_same(dtype: torch.dtype, tolerance: float) -> None:
    """Forward, and by streaming with the gradient carried; and where an outside change comes between, too."""
    x, y = data(dtype)
    query = Query.loss(x, y).mean()

    def explained(memory: int) -> Any:
        model = small(dtype)

        def clamp(number: int) -> None:
            if number == 1:
                model[0].weight.data.clamp_(-0.1, 0.1)

        observed = steps(model, torch.optim.AdamW(model.parameters(), lr=0.05), between=clamp)
        rule = Quadrature.trapezoid()
        return explain(observed, model, query, groups=GROUPS, quadrature=rule, memory=memory, progress=False).data

    carried, forward = explained(1), explained(2**28)
    assert "outside" in carried["part"].values
    scale = float(abs(forward["influence"]).max())
    # in float32 the forward plan knows a loss to float32 alone
    for name in ("influence", *(["change", "rounding", "remainder"] if dtype is torch.float64 else [])):
        check(carried[name], forward[name], scale, tolerance)


def test_a_step_takes_one_pass_and_another_where_none_leads_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = small(), data()
    explainer = Explainer(
        model, Query.loss(x, y).mean(), GROUPS, [("step", "group")], ("kernel",), Quadrature.trapezoid(), memory=2**28
    )
    monkeypatch.setattr(type(explainer.integrator), "streams", True)
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1) if torch.is_grad_enabled() else None)
    counts = []
    for step in steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 6):
        if step.number in (2, 3):  # these are passed by
            continue
        passes.clear()
        explainer.add(step)
        counts.append(len(passes))
    # the first step measures the model, beside the passes at both of its ends
    assert counts[1:] == [1, 2, 1]


class Routed(nn.Module):
    """Every other pass goes through another expert, as the model's own weight says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Parameter(torch.tensor(0.05, dtype=torch.float64))
        self.experts = nn.ModuleList(nn.Linear(4, 3).double() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(self.gate > 0)](x) + self.gate  # type: ignore[no-any-return]


@pytest.mark.parametrize("memory", [1, 2**28])
def test_what_only_one_of_the_ends_depends_on(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = Routed(), data()
    query, groups = Query.loss(x, y).mean(), {"all": [name for name, _ in model.named_parameters()]}
    explainer = Explainer(model, query, groups, [("step", "group")], ("kernel",), Quadrature.trapezoid(), memory=memory)
    monkeypatch.setattr(type(explainer.integrator), "streams", True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    observer, parameters = StepObserver(optimizer, dict(model.named_parameters())), dict(model.named_parameters())
    for number in range(4):
        optimizer.zero_grad(set_to_none=False)
        (model.gate * (-1) ** number + sum(p.square().sum() for p in model.parameters())).backward()
        observer.before({})
        optimizer.step()
        step = observer.after(number, {})
        (row,) = explainer.add(step)
        total = 0.0
        for state in (step.before, step.after):
            other = Routed()
            other.load_state_dict(dict(state.parameters))
            found = torch.autograd.grad(query(other).mean(), list(other.parameters()), allow_unused=True)
            pairs = zip(parameters, found, strict=True)
            total += sum(float((g * step.parts["kernel"][n]).sum()) / 2 for n, g in pairs if g is not None)
        assert abs(float(row["influence"]) - total) < 1e-13
        observer.settle()


def test_a_language_model_with_tied_weights() -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, tokens = gpt2().double(), torch.randint(1, 11, (3, 6))
    query = Query.tokens(tokens).mean()
    groups = {"all": [name for name, _ in model.named_parameters()]}
    explainers = [
        Explainer(model, query, groups, [("step", "group")], None, Quadrature.trapezoid(), close, memory=1)
        for close in (False, True)  # closed, every node is on its own
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    observer = StepObserver(optimizer, dict(model.named_parameters()))
    for number in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        observer.before({})
        optimizer.step()
        step = observer.after(number, {})
        rows = [explainer.add(step)[0] for explainer in explainers]
        assert abs(float(rows[0]["remainder"] - rows[1]["remainder"])) < 1e-12
        assert abs(float(rows[1]["change"] + rows[1]["influence"].sum() + rows[1]["rounding"])) < 1e-12
        observer.settle()


def test_a_rule_is_proven_in_part_and_each_entry_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "CPU_PIECE", 3)
    model, looked = small(), []
    observer = StepObserver(torch.optim.SGD(model.parameters(), lr=0.1), dict(model.named_parameters()))
    observer.spare()
    above = proof._above
    monkeypatch.setattr(proof, "_above", lambda piece, dtype: looked.append(len(piece.before)) or above(piece, dtype))
    for number in range(proof.WHOLLY_PROVEN + proof.SHARE):
        model(data()[0]).sum().backward()
        observer.before({})
        observer.optimizer.step()
        if number == proof.WHOLLY_PROVEN:
            looked.clear()
        step = observer.after(number, {})
        observer.settle()
    assert sum(looked) == sum(p.numel() for p in model.parameters())

    with torch.no_grad():
        step.after.parameters["0.weight"][0, 0] += 1
    with pytest.raises(UnexplainedUpdateError, match=r"0\.weight"):
        observer.proof.prove(step.number, step.updates, wholly=True)
