"""The streaming reverse plan: against the oracle, against the forward plan, and what it leaves behind."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import Case
from helpers import AXES, cases, check, fixed, parts_of, wanted_influence
from models_hf import Family, gpt2, llama
from torch import Tensor, nn

from explaind_track import Explainer, Influence, Quadrature, Query, Step, StepObserver, explain, plan_explanation
from explaind_track.engine import plan_choice, targets
from explaind_track.engine.integrator import Integrator
from explaind_track.engine.streaming import inner_product, streamed


@cases()
def test_sums_are_the_oracles(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_choice, "REVERSE_COST", 0)
    query = case.query()
    query = query if query.reduction else query.sum()
    parts = parts_of(case)
    explainer = Explainer(case.make(9), query, case.resolved_groups(), [AXES], memory=1, **fixed(1, parts))
    assert explainer.integrator.streams
    for step in case.steps():
        explainer.add(step)
    data = explainer.results()[0].data

    oracle = case.reference(1)
    check(data["influence"], wanted_influence(oracle, case.resolved_groups(), parts).sum(3, keepdims=True))
    change = (oracle.between - oracle.before).sum(1, keepdim=True)
    check(data["change"], change, float(oracle.influence(oracle.moved).sum(1).abs().max()))


# --------------------------------------------------- language models

TOKENS = torch.randint(1, 11, (4, 6), generator=torch.Generator().manual_seed(3))


def token_losses(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output[:, :-1].movedim(-1, 1), labels[:, 1:], reduction="none").mean(1)


QUERY = Query.loss({"input_ids": TOKENS}, TOKENS, lambda output, y: token_losses(output.logits, y)).mean()


def checkpointed() -> nn.Module:
    model = gpt2()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def adapted() -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True))


def training_steps(model: nn.Module, count: int = 2) -> Iterator[Step]:
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(learning.values(), lr=1e-2, weight_decay=0.1)
    observer = StepObserver(optimizer, dict(model.named_parameters()))
    data = Family("", llama, ()).data()
    for number in range(count):
        optimizer.zero_grad()
        token_losses(model(data["input_ids"]).logits, data["input_ids"]).mean().backward()
        observer.before({})
        optimizer.step()
        yield observer.after(number, {})
        observer.settle()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore::explaind_track.errors.ForwardModeFallbackWarning")  # of the forward plan
@pytest.mark.parametrize(
    ("make", "dtype", "tolerance"),
    [
        (gpt2, torch.float64, 1e-10),
        (checkpointed, torch.float64, 1e-10),
        (adapted, torch.float64, 1e-10),
        (llama, torch.float32, 1e-6),  # whose norms are in float32 anyway
        (adapted, torch.float32, 1e-6),
    ],
)
def test_language_models_have_the_sums_of_the_forward_plan(
    make: Callable[[], nn.Module], dtype: torch.dtype, tolerance: float
) -> None:
    pytest.importorskip("transformers")

    def explained(memory: int) -> Influence:
        torch.manual_seed(0)
        model = make().to(dtype)
        asked = {"groups": {"everything": "*"}, "quadrature": Quadrature.fixed(2), "progress": False}
        return explain(training_steps(model), model, QUERY, memory=memory, **asked)

    streaming, forward = explained(1).data, explained(2**28).data
    scale = float(abs(forward["influence"]).max())
    check(streaming["influence"], forward["influence"], scale, tolerance)
    check(streaming["rounding"], forward["rounding"], scale, tolerance)
    assert streaming["influence"].dtype == "float64"


def test_the_change_of_a_loss_is_not_lost_in_float32s_softmax() -> None:
    """As of the model's own outputs, which are float32, and all that is behind them in float64."""
    torch.manual_seed(0)
    model = nn.Linear(4, 50)
    x, y = torch.randn(64, 4), torch.randint(50, (64,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    observer = StepObserver(optimizer, dict(model.named_parameters()))

    def loss() -> float:  # row by row, as it is asked for with so little memory
        rows = [F.cross_entropy(model(x[k : k + 1]).double(), y[k : k + 1]) for k in range(64)]
        return float(torch.stack(rows).mean().detach())

    F.cross_entropy(model(x), y).backward()
    observer.before({})
    before = loss()
    optimizer.step()
    change = loss() - before

    asked = {"quadrature": Quadrature.fixed(2), "progress": False, "groups": {"all": "*"}}
    step = observer.after(0, {})
    streaming = explain([step], model, Query.loss(x, y).mean(), memory=1, **asked)
    plain = explain([step], model, Query.loss(x, y).mean(), **asked)
    error, lost = (abs(float(one.data["change"][0]) - change) for one in (streaming, plain))
    assert error < 1e-13
    assert lost > 10 * error
    assert float(streaming.residual[0]) < float(plain.residual[0])
    assert float(streaming.data["residual_floor"][0]) > 1e-9  # outputs are known to float32 alone


def test_rows_of_large_outputs_go_through_the_target_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, sizes = nn.Linear(4, 50).double(), []
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randint(50, (7,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = StepObserver(optimizer, dict(model.named_parameters()))
    F.cross_entropy(model(x), y).backward()
    observer.before({})
    optimizer.step()

    def target(output: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(output))
        return F.cross_entropy(output, y, reduction="none")

    step, query = observer.after(0, {}), Query.loss(x, y, target).mean()
    integrator = Integrator(model, query, {"all": ["weight", "bias"]}, memory=1, microbatch=7)
    ((_, whole),) = integrator.terms(step, 1)
    monkeypatch.setattr(targets, "FLOAT64_BYTES", 3 * 51 * 8)
    sizes.clear()
    ((_, cut),) = integrator.terms(step, 1)
    assert set(sizes) == {3, 1}
    check(cut.influence, whole.influence, tolerance=1e-14)


def test_a_target_that_cannot_be_computed_in_float64_stays_in_float32() -> None:
    torch.manual_seed(0)
    model, x, matrix = nn.Linear(3, 2), torch.randn(5, 3), torch.randn(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = StepObserver(optimizer, dict(model.named_parameters()))
    model(x).square().mean().backward()
    observer.before({})
    optimizer.step()
    step = observer.after(0, {})
    query = Query.function(x, lambda output: output @ matrix).mean()
    streaming, plain = (explain([step], model, query, memory=memory, progress=False) for memory in (1, 2**28))
    check(streaming.data["influence"], plain.data["influence"], tolerance=1e-6)
    assert streaming.data["influence"].dtype == "float32"


def test_refinement_finds_its_nodes_by_streaming_too() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    observer = StepObserver(optimizer, dict(model.named_parameters()))
    model(x).square().mean().backward()
    observer.before({})
    optimizer.step()
    step = observer.after(0, {})
    query = Query.function(x, lambda output: output.square().sum(1)).mean()
    streaming, forward = (
        explain([step], model, query, memory=memory, quadrature=Quadrature(1e-9), progress=False)
        for memory in (1, 2**28)
    )
    assert streaming.data["nodes"].values.tolist() == forward.data["nodes"].values.tolist()
    assert int(streaming.data["nodes"][0]) > 1
    check(streaming.data["influence"], forward.data["influence"], tolerance=1e-12)


def test_describe_names_the_plan() -> None:
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = StepObserver(optimizer, dict(model.named_parameters()))
    model(x).mean().backward()
    observer.before({})
    optimizer.step()
    step, query = observer.lasting(observer.after(0, {})), Query.function(x, lambda output: output.mean(1)).mean()
    assert "streaming" in plan_explanation([step], model, query, memory=1).describe()
    assert "streaming" not in plan_explanation([step], model, query).describe()
    assert "streaming" not in plan_explanation([step], model, Query.outputs(x), memory=1).describe()


# --------------------------------------------------- the hooks


def test_gradients_are_taken_once_each_and_kept_by_nobody() -> None:
    tied = nn.Parameter(torch.tensor([2.0, 3.0]))
    other, unused = nn.Parameter(torch.tensor(5.0)), nn.Parameter(torch.tensor(1.0))
    found: list[tuple[str, list[float]]] = []
    leaves = {"tied": tied, "other": other, "unused": unused}
    with streamed(leaves, lambda name, gradient: found.append((name, gradient.flatten().tolist()))):
        (tied.sum() * other + tied.square().sum()).backward()
        assert all(leaf.grad is None for leaf in leaves.values())
    assert sorted(found) == [("other", [5.0]), ("tied", [9.0, 11.0])]

    (tied.sum() * other).backward()
    assert len(found) == 2
    assert tied.grad is not None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_pass_leaves_no_hook_and_no_gradient(error: type[BaseException]) -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def interrupted(name: str, gradient: Tensor) -> None:
        raise error

    with pytest.raises(error), streamed({"first": first, "second": second}, interrupted):
        (first * second).sum().backward()
    assert first.grad is None
    assert second.grad is None
    (first * second).sum().backward()
    assert first.grad is not None


def test_products_are_in_float64() -> None:
    one, other = torch.full((3_000_001,), 1.0), torch.full((3_000_001,), 1 + 2**-20)
    assert inner_product(one, other).item() == 3_000_001 * (1 + 2**-20)
    assert inner_product(torch.zeros(0), torch.zeros(0)).item() == 0
