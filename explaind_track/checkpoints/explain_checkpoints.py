"""Explains a run that nobody watched: what a step from each of its checkpoints does to the loss of unseen data (§6)."""

import math
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from time import perf_counter
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn
from tqdm import tqdm

from explaind_track.checkpoints.checkpoint import Checkpoint
from explaind_track.checkpoints.checkpoint_result import Answers, by_grouping
from explaind_track.checkpoints.series import CheckpointSeries
from explaind_track.checkpoints.simulated_step import SimulatedStep, adjoints_of, guess_second_moment, moves_of
from explaind_track.checkpoints.training_batch import TrainingBatch
from explaind_track.core import distributed
from explaind_track.core.checks import (
    plain_number,
    require_callable,
    require_instance,
    require_int,
    require_mapping,
    require_number,
    require_positive,
)
from explaind_track.core.groups import GroupSpec, resolve_groups
from explaind_track.core.influence import Influence
from explaind_track.core.modules import parameters_of
from explaind_track.core.queries import Query, require_query
from explaind_track.core.tensors import low_precision
from explaind_track.engine.batch_losses import SampleLoss
from explaind_track.engine.integrator import Integrator
from explaind_track.engine.path_integral import Terms
from explaind_track.engine.renormalizing import renormalizing
from explaind_track.engine.targets import fitted_query, output_count
from explaind_track.explanation.digests import Digest, model_digest, query_digest, told_apart

SMALLEST = 1e-7
"""A residual that is small enough, whatever the change is: what float32 leaves of a loss of a few nats."""

FEWEST_NODES, MOST_NODES = 2, 64
"""The midpoint alone is seldom enough, and what it takes is lost where it is not."""

BY_TENSOR: Mapping[str, GroupSpec] = {"tensor": "tensor"}


def explain_checkpoints(
    series: CheckpointSeries,
    model: nn.Module,
    *,
    train: Any,
    loss: SampleLoss,
    query: Query,
    groups: Mapping[str, GroupSpec] = BY_TENSOR,
    microbatch: int = 8,
    clip: float | None = None,
    sources: Sequence[Any] | None = None,
    extrapolate: bool = False,
    tolerance: float = 1e-4,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    out: str | PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Influence]:
    """Explains what one step from each checkpoint of a run does to a scalar, such as the mean loss of unseen data.

    At each checkpoint the real optimizer takes one step on `train` (§6 of the paper), whose parts are `kernel` (what
    this batch did), `past` (what the first moment had gathered before) and `regularization`. It takes the memory of a
    training step: four copies of the parameters and the activations of a micro-batch. The model holds the checkpoint's
    weights all the time. Under `torchrun`, each process takes some of the checkpoints, and all get the whole result.

    Args:
        series: The checkpoints.
        model: Of their architecture, in float32 or float64; its weights are written over. Afterwards it holds those of
            the checkpoint that came last.
        train: A batch of the training mixture, N samples: tensors, or a mapping, tuple or dataclass of them, of which
            the mean of the losses is trained on; or a `Batch` with a weight of each sample's loss.
        loss: `(model, samples)` → their unreduced losses (n,); in training mode, as training had it.
        query: One target, such as `Query.loss(x, y).mean()`; in eval mode, its target in float64.
        groups: Groupings by their names, each as `resolve_groups` takes it: `{"type": "type", "layer": "layer"}`. All
            come from the same passes.
        microbatch: How many samples, and how many of the query's inputs, go through the model at a time.
        clip: The norm that training clipped its gradients to.
        sources: The source (a language, say) of each sample, N labels: then `by_source` splits the part `kernel` by
            their own gradients (Cor. F.2). With a label for each sample, it is split by sample. Takes the gradient a
            second time, a backward pass for each source of a micro-batch, and one more copy of the parameters.
        extrapolate: Beside it all, `extrapolated`: what the batch would do over the K steps up to the next checkpoint
            by staying in the first moment, Ψ · Σ_{j<K} β₁ʲ (Remark F.3); an estimate, as if the model stood still over
            these steps. The last checkpoint's K is that of the one before.
        tolerance: How much of the change of the scalar may be left over (or 1e-7, if that is more): Gauss–Legendre
            nodes are doubled, up to 64, until it is no more, or until only rounding is left, which `residual` tells.
        optimizer: From the model to its optimizer, for checkpoints with weights alone: the step has no part `past`
            then, and the batch's part is an estimate (`estimated` is 1), for which Adam's second moment is taken to be
            the square of this batch's gradient. Groups compare well with each other (cosine 0.99 with those of the real
            state, on a Llama of 150,000 parameters), sizes do not (a quarter).
        out: A directory where each checkpoint's numbers are kept: an interrupted call goes on when it is made again.
        progress: False: show no bar.

    Returns:
        An `Influence` for each grouping, over part, step (how many steps the run had taken) and group. Beside its
        variables there are, by step, `loss_before` and `loss_after` (of the query), `gradient_norm` (before clipping),
        `estimated`, `seconds` and `peak_mb` (the most memory that this process has held so far); and `by_source` (step,
        source, group) and `extrapolated` (step, group) if asked for.

    Raises:
        ValueError: Before any work, for a query with more than one target, a model in low precision, groups that are no
            partition, and labels that are not one for each sample; for a checkpoint without an optimizer's state, if
            there is no `optimizer`.
        CheckpointError: A checkpoint is torn, or not this model's.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from explaind_track import CheckpointSeries, Query, explain_checkpoints
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     (Path(directory) / "step100").mkdir()
        ...     save_file(model.state_dict(), f"{directory}/step100/model.safetensors")
        ...     influences = explain_checkpoints(
        ...         CheckpointSeries.open(directory), model, groups={"layer": None}, progress=False,
        ...         train=(x, y), loss=loss, query=Query.loss(x, y).mean(),
        ...         optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01),
        ...     )
        >>> dict(influences["layer"].data["influence"].sizes)
        {'part': 2, 'step': 1, 'group': 2}
        >>> bool(influences["layer"].residual[0] < 1e-4)
        True
    """
    require_instance("the series", series, CheckpointSeries, "write CheckpointSeries.open(directory)")
    require_mapping("groups=", groups, '{"type": "type", "layer": "layer"}')
    if not groups:
        raise ValueError('groups= asks for nothing: name at least one, such as {"layer": "layer"}')
    groupings = {name: resolve_groups(spec, model) for name, spec in groups.items()}
    if extrapolate and len(series) < 2:
        raise ValueError("extrapolate= needs the steps from one checkpoint to the next, and there is one checkpoint")

    study = _Study.of(model, train, loss, query, microbatch, clip, sources, tolerance, optimizer)
    answers = Answers(out, study.request(train) if out is not None else {})
    mine = distributed.share(series.checkpoints)
    with tqdm(total=len(mine), desc="checkpoints", unit="checkpoint", disable=not progress) as bar:
        found = []
        for checkpoint in mine:
            known = answers.known(checkpoint)
            if known is None:
                try:
                    known = answers.keep(checkpoint, study.explain(checkpoint, bar))
                finally:
                    model.zero_grad()
            found.append(known)
            bar.update()

    rows = sorted((row for share in distributed.gather(found) for row in share), key=lambda row: int(row.attrs["step"]))
    return {name: by_grouping(rows, members, extrapolate) for name, members in groupings.items()}


@dataclass(frozen=True)
class _Study:
    """A question about single checkpoints."""

    model: nn.Module
    batch: TrainingBatch
    integrator: Integrator
    labels: tuple[str, ...]
    """Of the sources; none where the batch is not split."""
    source_of: Tensor
    """The source of each sample, (N,)."""
    tolerance: float
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        train: Any,
        loss: SampleLoss,
        query: Query,
        microbatch: int,
        clip: float | None,
        sources: Sequence[Any] | None,
        tolerance: float,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None,
    ) -> "_Study":
        """Raises TypeError and ValueError for what `explain_checkpoints` refuses."""
        coarse = low_precision(parameters_of(model))
        if coarse is not None:
            raise ValueError(
                f"the model's parameters are in {coarse}, in which a step's parts are lost: pass it in float32, "
                "model.float(), which the checkpoints' numbers are read into as they are"
            )
        if renormalizing(model):
            raise ValueError(
                "the model has an embedding with max_norm, which shortens rows of its weight in the forward pass: the "
                "step from a checkpoint would not be training's; train it with a Tracker instead"
            )
        require_callable("loss=", loss, "(model, samples) → unreduced losses (n,)")
        if optimizer is not None:
            require_callable("optimizer=", optimizer, "of the model, which makes its optimizer")
        microbatch = require_int("microbatch=", microbatch, 1)
        tolerance = require_number("tolerance=", tolerance, least=0)
        batch = TrainingBatch(train, loss, microbatch, None if clip is None else require_positive("clip=", clip))

        require_query(query)
        query = fitted_query(model, query)
        if query.reduction is None or output_count(model, query) != 1:
            raise ValueError(
                "query= has more than one target: checkpoints are explained by a scalar, such as "
                "Query.loss(x, y).mean()"
            )
        names = resolve_groups("tensor", model)
        integrator = Integrator(model, query, names, memory=1, microbatch=microbatch)  # so little that it streams

        labels = [] if sources is None else [str(plain_number(source)) for source in sources]
        if sources is not None and len(labels) != batch.size:
            raise ValueError(f"sources= has {len(labels)} labels for the {batch.size} samples of train=")
        known = tuple(dict.fromkeys(labels))
        places = torch.tensor([known.index(label) for label in labels], dtype=torch.long)
        return cls(model, batch, integrator, known, places, tolerance, optimizer)

    def request(self, train: Any) -> dict[str, str]:
        """What tells this question from others."""
        digests = {
            "the model": model_digest(self.model),
            "query=": query_digest(self.integrator.query),
            "train= and loss=": Digest().add(train, "train=").add(self.batch.loss, "loss="),
            "the settings": Digest().add((self.batch.settings, self.labels, self.tolerance), "the settings"),
            "sources=": Digest().add(self.source_of, "sources="),
            "optimizer=": Digest().add(self.optimizer, "optimizer="),
        }
        return told_apart(digests)

    def explain(self, checkpoint: Checkpoint, bar: tqdm) -> xr.Dataset:
        """The numbers of one checkpoint, by tensor of the model."""
        started = perf_counter()
        checkpoint.load(self.model)
        found = checkpoint.optimizer(self.model)
        if found is None and self.optimizer is None:
            raise ValueError(
                f"{checkpoint} holds weights alone, which tell nothing of the step that training took from there: pass "
                "optimizer=, which makes an optimizer of the model (with training's rate and decay), for an estimate "
                "of the batch's part; of the first moment there is none"
            )
        norm = self.batch.backward(self.model)
        optimizer = found or self._estimated(checkpoint)
        moves = moves_of(optimizer, self.model)
        is_estimated = found is None
        del optimizer, found  # whose state has become the moves
        step = SimulatedStep.of(checkpoint.step, self.model, moves)

        nodes, terms = self._refined(step, bar)
        betas = [moves[name].beta if name in moves else 0.0 for name in self.integrator.groups]
        values = {
            "influence": (("part", "tensor"), terms.influence[:, :, 0, 0].cpu().numpy()),
            "beta": ("tensor", torch.tensor(betas, dtype=torch.float64).numpy()),
            **{name: ((), getattr(terms, name).cpu().numpy()[0, 0]) for name in ("rounding", "change", "remainder")},
            "loss_after": ((), terms.after.cpu().numpy()[0, 0]),
            "nodes": ((), nodes),
            "floor": ((), 4 * terms.eps),
            "gradient_norm": ((), norm),
            "estimated": ((), int(is_estimated)),
        }
        labels = {"part": list(terms.parts), "tensor": list(self.integrator.groups)}

        if self.labels:
            feature = self.integrator.feature(step, nodes)
            del moves, step
            values["by_source"] = (("source", "tensor"), self._by_source(checkpoint, feature).numpy())
            labels["source"] = list(self.labels)
        values["seconds"] = ((), perf_counter() - started)
        values["peak_mb"] = ((), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return xr.Dataset(values, labels, {"step": checkpoint.step})

    def _estimated(self, checkpoint: Checkpoint) -> torch.optim.Optimizer:
        """An optimizer for a checkpoint without one, made with the gradients in place."""
        assert self.optimizer is not None  # looked at before
        optimizer = self.optimizer(self.model)
        if isinstance(optimizer, torch.optim.Adam):
            guess_second_moment(optimizer, max(1, checkpoint.step))
        return optimizer

    def _refined(self, step: SimulatedStep, bar: tqdm) -> tuple[int, Terms]:
        """With 2, 4, 8 … nodes, the first terms of the step that leave no more than is tolerated; and their nodes. More
        nodes than have settled the sum do not help against what float arithmetic leaves of the change."""
        nodes, before = FEWEST_NODES, math.inf
        while True:
            bar.set_postfix(step=step.number, nodes=nodes)
            ((_, terms),) = self.integrator.terms(step, nodes)
            left, change = float(terms.remainder), float(terms.change)
            if not math.isfinite(change):
                raise ValueError(
                    f"the query is {float(terms.after) - change} at the checkpoint of step {step.number}, and "
                    f"{float(terms.after)} behind the step: its target has to be finite"
                )

            limit = max(self.tolerance * abs(change), SMALLEST)
            if abs(left) <= limit or abs(left - before) <= limit / 4 or nodes >= MOST_NODES:
                return nodes, terms
            nodes, before = 2 * nodes, left

    def _by_source(self, checkpoint: Checkpoint, feature: dict[str, Tensor]) -> Tensor:
        """Ψ of each source's samples through the step, by tensor, (sources, tensors): the optimizer takes the same step
        again, and gives the way back through it."""
        self.batch.backward(self.model, again=True)
        optimizer = checkpoint.optimizer(self.model) or self._estimated(checkpoint)
        adjoints = adjoints_of(optimizer, self.model, feature)
        del optimizer
        return self.batch.products(self.model, adjoints, self.source_of, len(self.labels))
