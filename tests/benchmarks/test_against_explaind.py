"""Against `explaind` 0.1.0, the package of the paper's authors: time, error and group sums on the very same steps.

    python -m pytest tests/benchmarks/test_against_explaind.py -m slow --benchmark-only -s

The modulo-113 Transformer takes a few steps while both packages keep their records of them. What is compared:

- `explaind.epk_model`, the only part of theirs that explains every output of every query. It has the sums over training
  samples only by way of each sample's kernel, and walks from the first step on with a momentum buffer for each sample;
- `explaind.accelerated.StepExplainer`, which needs no kernel per sample, but explains one number at a time. So it is
  compared on the mean test loss, and its cost for all outputs is that of one output, 115 times.

The record starts after a warm-up, with a fresh optimizer. At initialization the last token attends to itself alone, and
all queries get the same prediction to 1e-7: errors measured there would be those of one query.

Times are of the best step, for both. Theirs leave out one-off setup and the training samples' features, which they
compute at each step for each chunk of queries ("s per step and chunk"). Nothing is asserted about time.

Both integrate with the same number of nodes: they at midpoints, we at Gauss–Legendre nodes. A ReLU network's gradient
jumps along the path, and there midpoints are the better by a little. So what is asserted is: at their nodes we get
their numbers; at as many of our own our error is of the same size; and with the nodes that we take by default, it is
smaller.
"""

import resource
from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from explaind_track import Explainer, Quadrature, Query, Step, StepObserver, resolve_groups
from explaind_track.core.groups import Groups
from recipes.data import Split, modulo_addition
from recipes.models import ModuloTransformer

epk_model = pytest.importorskip("explaind.epk_model")

# their vmap over `scaled_dot_product_attention` falls back to a loop; with the kernel that has a rule it is no faster
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:There is a performance drop")]

ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.98), "weight_decay": 4.0}
OUTPUTS, TRAIN, TEST = 115, 4000, 200
WARM_UP, STEPS, NODES = 300, 3, 10
CHUNK = 8
"""Queries that they explain at once; their memory peaks at 7 GB then."""

KEEP = ("step", "group", "query", "output")
PARTS = ("kernel", "regularization")


def midpoints(nodes: int) -> tuple[tuple[float, float], ...]:
    """Their nodes and weights, in the form of our `gauss_legendre`."""
    return tuple(((i + 0.5) / nodes, 1 / nodes) for i in range(nodes))


@dataclass
class Ours:
    """One of our explainers, and the seconds that it took for each step."""

    query: Query
    groups: Groups
    model: nn.Module
    quadrature: Quadrature
    parts: tuple[str, ...] = PARTS
    at_midpoints: bool = False
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.explainer = self.fresh()

    def fresh(self) -> Explainer:
        return Explainer(self.model, self.query, self.groups, [KEEP], self.parts, self.quadrature)

    def add(self, step: Step) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if self.at_midpoints:
                patch.setattr("explaind_track.engine.integrator.gauss_legendre", midpoints)
            start = perf_counter()
            self.explainer.add(step)
            self.seconds.append(perf_counter() - start)

    def influence(self) -> Tensor:
        """Ψ, (parts, steps, groups, queries, outputs)."""
        return torch.from_numpy(self.explainer.results()[0].data["influence"].values)

    def nodes(self) -> list[int]:
        return [int(nodes) for nodes in self.explainer.results()[0].data["nodes"]]


@dataclass
class Run:
    """A few recorded steps: the last of ours, what our explainers made of all, and their three records of the same."""

    split: Split
    groups: Groups
    last: Step
    ours: Mapping[str, Ours]
    model_path: Any
    optimizer_path: Any
    data_path: Any

    def predictions(self, x: Tensor) -> Tensor:
        """Before the first step and after each, (steps + 1, queries, outputs)."""
        with torch.no_grad():
            return torch.stack([self.model_path.forward(x, step=number) for number in range(STEPS + 1)])


@pytest.fixture(scope="module")
def run() -> Run:
    from explaind.data_paths import DataPath
    from explaind.model_paths import ModelPath
    from explaind.modulo_model.data import ClassificationDataset
    from explaind.optimizer_paths import AdamWOptimizerPath

    torch.manual_seed(0)
    split = modulo_addition(113, TRAIN, TEST, seed=0)
    model = ModuloTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for _ in range(WARM_UP):
        optimizer.zero_grad()
        F.nll_loss(model(split.x_train), split.y_train).backward()
        optimizer.step()

    model_path = ModelPath(model, device="cpu")
    optimizer_path = AdamWOptimizerPath(model_path, **ADAMW, checkpoints=[], device="cpu")
    samples = ClassificationDataset(split.x_train.tolist(), split.y_train.tolist())
    data_path = DataPath(DataLoader(samples, batch_size=TRAIN))

    parameters = dict(model.named_parameters())
    groups = resolve_groups(2, parameters)
    assert len(groups) == 6
    observer = StepObserver(optimizer_path.optimizer, parameters)
    outputs, loss = Query.outputs(split.x_test), Query.loss(split.x_test, split.y_test).mean()
    fixed, shares = Quadrature.fixed(NODES), (*PARTS, "momentum")
    ours = {
        "outputs": Ours(outputs, groups, model, fixed),
        "outputs at midpoints": Ours(outputs, groups, model, fixed, at_midpoints=True),
        "outputs by default": Ours(outputs, groups, model, Quadrature()),
        "loss": Ours(loss, groups, model, fixed, shares),
        "loss at midpoints": Ours(loss, groups, model, fixed, shares, at_midpoints=True),
    }
    for number in range(STEPS):
        for batch in data_path.dataloader:
            x, y = data_path.get_batch(batch)
            optimizer_path.zero_grad()
            F.nll_loss(model(x), y).backward()
            observer.before({})
            optimizer_path.step()
            step = observer.after(number, {})
            model_path.log_checkpoint()
            optimizer_path.log_checkpoint()
            for one in ours.values():
                one.add(step)
    model_path.model = deepcopy(model)  # it loads its checkpoints into it; the last of our steps lives in `model`
    return Run(split, groups, step, ours, model_path, optimizer_path, data_path)


class Stopwatch:
    """Takes the time of every call of the methods that it watches."""

    def __init__(self) -> None:
        self.laps: dict[str, list[float]] = defaultdict(list)

    def watch(self, owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            result = method(*args, **kwargs)
            self.laps[name].append(perf_counter() - start)
            return result

        setattr(owner, name, timed)


def error(change: Tensor, influence: Tensor) -> float:
    """‖change + ΣΨ‖ / ‖change‖ over steps × queries × outputs; influence: (parts, steps, groups, queries, outputs)."""
    return float((change + influence.sum((0, 2))).norm() / change.norm())


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest of all parts' and groups' ‖ours − theirs‖ / ‖theirs‖; both (parts, steps, groups, …)."""
    axes = (1, *range(3, theirs.ndim))
    return float(((ours - theirs).square().sum(axes) / theirs.square().sum(axes)).max().sqrt())


def peak_memory() -> float:
    """Of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def report(benchmark: Any, figures: Mapping[str, Any]) -> None:
    benchmark.extra_info.update(figures)
    print()
    for name, value in figures.items():
        values = value if isinstance(value, list) else [value]
        print(f"{name:>52}  {' '.join(f'{number:.3g}' for number in values)}")


def walk_their_path(run: Run, x: Tensor, watch: Stopwatch) -> Tensor:
    """Their Ψ of every output of the queries `x`, (parts, steps, groups, queries, outputs).

    Makes the calls that their `predict` makes, which itself fails at step 0 unless it also keeps kernels per parameter.
    They add up gradients of log p and divide by the batch size afterwards; Ψ is subtracted from a prediction.
    """
    model, optimizer = run.model_path, run.optimizer_path
    epk = epk_model.ExactPathKernelModel(model, optimizer, nn.CrossEntropyLoss(), run.data_path, device="cpu")
    for owner, name in (
        (model, "step_gradient_feature_map"),
        (optimizer, "train_feature_map"),
        (model, "gradient_step_integral"),
        (optimizer, "get_step_kernel"),
    ):
        watch.watch(owner, name)
    momentum, rows, start = None, [], perf_counter()
    for number, nodes in epk.get_integral_steps(1 / NODES, early_steps=0):
        assert nodes == pytest.approx([node for node, _ in midpoints(NODES)])
        batch = run.data_path.get_checkpoint(number)
        kernel, momentum, features, _ = epk.exact_path_kernel_step_test(
            x,
            batch["X"],
            batch["y"],
            momentum,
            number,
            pred_target=torch.eye(OUTPUTS),
            pred_steps=nodes,
            ids=batch["indices"],
            prev_eval={},
        )
        scale = -optimizer.get_learning_rate(number + 1) / len(batch["indices"])
        groups = run.groups.values()
        kernels = [scale * torch.stack([kernel[name].sum((1, 3)) for name in names]).sum(0) for names in groups]
        decays = [
            -optimizer.get_reg_term({name: features[name] for name in names}, None, number)[0] for names in groups
        ]
        rows.append(torch.stack([torch.stack(kernels), torch.stack(decays)]).detach())
        watch.laps["step"].append(perf_counter() - start)
        start = perf_counter()
    return torch.stack(rows, dim=1)


def test_influences_on_all_outputs_agree_with_the_authors_kernel(benchmark: Any, run: Run) -> None:
    ours = run.ours["outputs"]
    benchmark.pedantic(lambda: ours.fresh().add(run.last), rounds=STEPS)
    memory = peak_memory()
    watch = Stopwatch()
    x = run.split.x_test[:CHUNK]
    theirs = walk_their_path(run, x, watch)
    change = run.predictions(x).diff(dim=0)

    influence = {name: one.influence()[..., :CHUNK, :] for name, one in run.ours.items() if name.startswith("outputs")}
    errors = {name: error(change, value) for name, value in influence.items()}
    laps = watch.laps
    once = [sum(pair) for pair in zip(laps["step_gradient_feature_map"], laps["train_feature_map"], strict=True)]
    each = min(step - features for step, features in zip(laps["step"], once, strict=True)) / CHUNK
    integral = min(laps["gradient_step_integral"]) / CHUNK
    own = min(ours.seconds) / TEST
    default = run.ours["outputs by default"]
    report(
        benchmark,
        {
            "theirs: s per (step, query)": each,
            "theirs: of which the integral": integral,
            "theirs: of which the kernel": min(laps["get_step_kernel"]) / CHUNK,
            "theirs: s per step and chunk, beside that": min(once),
            "theirs: s per (step, query), all included": min(laps["step"]) / CHUNK,
            "theirs: GB at the peak": peak_memory(),
            "ours: s per (step, query)": own,
            "ours by default: s per (step, query)": min(default.seconds) / TEST,
            "ours by default: nodes": default.nodes(),
            "ours: GB at the peak, training included": memory,
            "ratio of seconds": each / own,
            "ratio of seconds, their integral only": integral / own,
            "ratio of seconds, all included": min(laps["step"]) / CHUNK / own,
            "ratio of seconds, ours by default": each * TEST / min(default.seconds),
            "theirs: error": error(change, theirs),
            "theirs: error of each step": [error(change[[s]], theirs[:, [s]]) for s in range(STEPS)],
            **{f"ours: error, {name}": value for name, value in errors.items()},
            "ours: error of each step": [error(change[[s]], influence["outputs"][:, [s]]) for s in range(STEPS)],
            **{f"group sums' difference, {name}": difference(value, theirs) for name, value in influence.items()},
        },
    )
    assert difference(influence["outputs at midpoints"], theirs) < 1e-3  # float32, and sums in another order
    assert errors["outputs at midpoints"] == pytest.approx(error(change, theirs), rel=0.01)
    assert errors["outputs"] < 2 * error(change, theirs)
    assert errors["outputs by default"] < error(change, theirs)


class WeightedSum(nn.Module):
    """The model with a weighted sum of its outputs for a loss: what `StepExplainer` takes as a model and explains."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, weight: Tensor, all_outs: bool = True) -> tuple[Tensor, Tensor]:
        output = self.model(tokens)
        return (output * weight).sum(), output


def mean_loss(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The arguments with which a `WeightedSum` is the mean negative log-likelihood."""
    return {"tokens": x, "weight": F.one_hot(y, OUTPUTS) / -len(x)}


def single_output(x: Tensor, output: int) -> dict[str, Tensor]:
    """The arguments with which a `WeightedSum` is one output of the one query `x`."""
    return {"tokens": x[None], "weight": F.one_hot(torch.tensor([output]), OUTPUTS).float()}


def explain_with_step_explainer(
    run: Run, number: int, target: dict[str, Tensor], folder: Path, watch: Stopwatch
) -> Tensor:
    """Their Ψ of one target: kernel, regularization and the share of earlier steps in the kernel, (3, groups).

    One target for each explainer: from its second on, its first node lies beyond the step's end, since it is reset
    without moving its interpolated model back to the start.
    """
    from explaind.accelerated.explainer import StepExplainer

    def model_at(step: int) -> nn.Module:
        model = WeightedSum(deepcopy(run.model_path.model))
        model.model.load_state_dict(run.model_path.checkpoints[step])
        return model

    def optimizer_at(step: int, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(model.named_parameters(), **ADAMW)
        for name, parameter in model.named_parameters():
            moments = {key: run.optimizer_path.checkpoints[step][key][name] for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
        return optimizer

    class RecordedStep(StepExplainer):  # type: ignore[misc]
        def load_checkpoint(self, path: str | None = None) -> None:
            self.model, self.model_after = model_at(number), model_at(number + 1)
            self.optimizer_pre = optimizer_at(number, self.model)
            self.optimizer = optimizer_at(number + 1, self.model)
            self.step_id = number
            self.gradient_scaling = self.train_grad_scaling = self.test_grad_scaling = 1.0
            self.accelerator = SimpleNamespace(backward=lambda value: value.backward())
            self.train_instances = {"train": mean_loss(run.split.x_train, run.split.y_train)}

        def compute_step_model(self) -> None:
            self.wrapped_model = self._wrap_model("", self.model, self.model_after)

    explainer = RecordedStep(str(folder), test_instances={"test": target}, expl_type="loss", num_steps=NODES)
    watch.watch(explainer, "compute_influence_scores")
    watch.watch(explainer, "compute_test_integral")
    explainer.compute_influence_scores()

    def of_groups(source: str) -> Tensor:
        """They score the change, Ψ is its negative."""
        scores = explainer.acc_scores[source, "test", "loss"]
        return -torch.tensor([sum(scores[f"model.{name}"]["sum"] for name in names) for names in run.groups.values()])

    past = of_groups("first_moment")
    return torch.stack([of_groups("train") + past, of_groups("regularization"), past])


def test_influences_on_the_loss_agree_with_the_authors_step_explainer(benchmark: Any, run: Run, tmp_path: Path) -> None:
    pytest.importorskip("explaind.accelerated.explainer")  # needs `tensordict`
    ours = run.ours["loss"]
    benchmark.pedantic(lambda: ours.fresh().add(run.last), rounds=10)
    x, y = run.split.x_test, run.split.y_test
    watch, watch_outputs = Stopwatch(), Stopwatch()
    rows = [explain_with_step_explainer(run, number, mean_loss(x, y), tmp_path, watch) for number in range(STEPS)]
    theirs = torch.stack(rows, dim=1)[..., None, None]
    singles = [
        explain_with_step_explainer(run, STEPS - 1, single_output(x[0], output), tmp_path, watch_outputs)
        for output in range(4)
    ]

    change = -run.predictions(x)[:, range(TEST), y].mean(1).diff()[:, None, None]
    influence = {name: one.influence() for name, one in run.ours.items() if name.startswith("loss")}
    errors = {name: error(change, value[:2]) for name, value in influence.items()}
    seconds = min(watch.laps["compute_influence_scores"])
    one_output = min(watch_outputs.laps["compute_test_integral"])
    all_outputs = min(run.ours["outputs"].seconds) / TEST
    report(
        benchmark,
        {
            "theirs: s per step": seconds,
            "theirs: of which the integral": min(watch.laps["compute_test_integral"]),
            "ours: s per step": min(ours.seconds),
            "ratio of seconds": seconds / min(ours.seconds),
            "ratio of seconds, their integral only": min(watch.laps["compute_test_integral"]) / min(ours.seconds),
            "theirs: s per (step, query), all outputs": one_output * OUTPUTS,
            "ours: s per (step, query), all outputs": all_outputs,
            "ratio of seconds, all outputs": one_output * OUTPUTS / all_outputs,
            "theirs: error": error(change, theirs[:2]),
            **{f"ours: error, {name}": value for name, value in errors.items()},
            **{f"group sums' difference, {name}": difference(i[:2], theirs[:2]) for name, i in influence.items()},
        },
    )
    kernel, decay, past = (influence["loss at midpoints"][part] for part in range(3))
    assert difference(torch.stack([kernel, decay]), theirs[:2]) < 1e-3
    torch.testing.assert_close(past, theirs[2], rtol=1e-3, atol=1e-6)
    assert errors["loss at midpoints"] == pytest.approx(error(change, theirs[:2]), rel=0.01, abs=1e-4)
    same = run.ours["outputs at midpoints"].influence()[:, -1:, :, 0]
    for output, single in enumerate(singles):
        assert difference(same[..., output], single[:2, None]) < 1e-3
