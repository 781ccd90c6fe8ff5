"""A short run that both packages record, and what `explaind`, the package of the paper's authors, makes of it."""

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


def record() -> Run:
    """Trains, and lets both packages take down the last steps."""
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

    # Their records.
    model_path = ModelPath(model, device="cpu")
    optimizer_path = AdamWOptimizerPath(model_path, **ADAMW, checkpoints=[], device="cpu")
    samples = ClassificationDataset(split.x_train.tolist(), split.y_train.tolist())
    data_path = DataPath(DataLoader(samples, batch_size=TRAIN))

    # Our explainers.
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
            for explainer in ours.values():
                explainer.add(step)

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


def walk_their_path(run: Run, x: Tensor, watch: Stopwatch) -> Tensor:
    """Their Ψ of every output of the queries `x`, (parts, steps, groups, queries, outputs).

    Makes the calls that their `predict` makes, which itself fails at step 0 unless it also keeps kernels per parameter.
    They add up gradients of log p and divide by the batch size afterwards; Ψ is subtracted from a prediction.
    """
    from explaind import epk_model

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
