"""Writes tests/README.md: what is exact, measured on the cases and loops of the tests, and what is refused.

python tests/exactness.py
"""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, OPTIMIZERS, Case
from helpers import AXES, SAMPLE_AXES, of_samples, run, wanted_influence, wanted_samples
from loops import LOOPS, Loop
from low_precision_loops import LOW_PRECISION_LOOPS
from models import MODELS
from outside_loops import OUTSIDE_LOOPS
from torch import Tensor, nn

from explaind_track import Quadrature, Trajectory, audit, explain
from explaind_track.errors import ForwardModeFallbackWarning, SampleMismatchWarning

PAGE = Path(__file__).with_name("README.md")
HEAD = """# What is exact

Written by `python tests/exactness.py` from the cases and loops that the tests run over (float64 unless said; the
largest error of all steps, relative to the largest number). *Oracle*: the plain loops of `reference.py`, at equal
nodes. *Residual*: what the refined split of a step leaves of the change of the prediction (1e-9 asked of the loops).
Models of transformers have [a table of their own](callbacks/README.md).

"""
REFUSED = {
    "LBFGS": "evaluates the loss many times in one step, which has no parts",
    "an optimizer without a rule": "no update rule for the optimizer …; register one",
    "optimizer.step(closure)": "call the closure before it",
    "complex or integer parameters": "only parameters of real numbers can be explained",
    "sparse gradients": "the gradient of '…' is sparse; use sparse=False in its module",
    "optimizer state loaded on the way": "load first, then make the Tracker",
    "tracker.backward() under batch norm": "normalises with the statistics of its batch, so no sample has a gradient",
    "activation checkpointing with use_reentrant=True": "use use_reentrant=False (torch recommends it; …)",
    "a model that draws random numbers in eval mode": "its prediction is no function of its parameters",
    "a model that writes to its tensors in eval mode": "what it says depends on how often it was asked",
    "float16 weights with a fused Adam, whose second moments vanish": "squared gradients below 6e-8 vanish …",
    "bfloat16 weights, where the model casts to bfloat16 by name": "let it cast to that of the parameters",
    "samples of a step clipped by value": "what is left of it is no sum over samples",
    "FSDP, tensor parallelism": "parameters are in pieces …; train with DistributedDataParallel instead",
    "DistributedDataParallel.join()": "give all ranks as many batches (a DistributedSampler does), of any size",
    "DistributedDataParallel of some of the processes": "a Tracker needs a DistributedDataParallel of all of them",
    "samples under SyncBatchNorm": "leave sample_loss= out, or use BatchNorm without convert_sync_batchnorm",
    "samples across moments of the optimizer that were reset": (
        "a warning: something other than its steps has changed that state; explain a window= before that, or one so "
        "long after it that momentum has forgotten it"
    ),
    "samples in transformers' callback, called by another loop than a Trainer": "use a Tracker in that loop",
    "samples of a model that Fabric runs in another precision": "pass the module itself, fabric_model.module",
    "a callback whose package is missing": "pip install 'explaind_track[callbacks]'",
    "resume=True in several processes": "load your own checkpoint in every process, and pass the number of its step",
    "samples in several processes, in a callback that does not see the DistributedDataParallel": (
        "use a Tracker of the DistributedDataParallel in your own loop"
    ),
    "arguments that are no numbers or words that there are (see test_messages.py)": "every= is at least 1, not 0; …",
    "float or boolean indices": "index= names the batch's training samples by whole numbers, not by torch.float32",
    "weights, factors, settings of the optimizer that are NaN or infinite": "weight= is nan: it has to be finite",
    "settings of the optimizer in NumPy's single precision": "set lr to float(lr)",
    "names of queries, groups and auxiliary losses that share a key with others": (
        "a query cannot be called 'kernel': rows have something else of that name"
    ),
    "queries with NaN in them": "the query's inputs hold 8 number(s) that are NaN",
    "masks that are not boolean": "masks are boolean tensors, True for what is kept",
    "batches without an index that no record can hold": "pass index=, the numbers or names of its samples",
    "tracker.backward() where samples' gradients cannot be taken one by one": "use loss.backward() in its place",
}
REFINED = Quadrature(tolerance=1e-9, nodes=4, max_nodes=64)
TWO = {"quadrature": Quadrature.fixed(2), "progress": False}


@dataclass(frozen=True)
class Measured:
    """What is exact about a loop, as fractions of the largest number."""

    residual: float
    """The largest of all steps, refined; in float32 its part above the rounding floor."""
    prediction: float
    """By how much the sum of all parts misses the trained model's outputs."""
    offline: float
    """By how much the influences of the replayed record differ from the live ones."""
    samples: float
    """By how much the influences of single samples miss their sum, which is known without them."""
    audit: str = ""
    """Of the last step: what differs from a plain recomputation, if anything does."""
    refusal: str = ""


def explained(model: nn.Module) -> nn.Module:
    """The model in the precision that it is explained in."""
    is_low = any(value.dtype in (torch.bfloat16, torch.float16) for value in model.parameters())
    return deepcopy(model).float() if is_low else model


def measure(loop: Loop, directory: Path) -> Measured:
    """Trains and takes apart; whatever else warns is an error in the tests."""
    with warnings.catch_warnings():
        if loop.slower:
            warnings.simplefilter("ignore", ForwardModeFallbackWarning)
        return _measure(loop, directory)


def _measure(loop: Loop, directory: Path) -> Measured:
    live = loop.run(trajectory=directory, quadrature=REFINED, keyframe_every=4)
    by_step, by_output = (live.tracker.influence("query", keep) for keep in (("step", "group"), ("query", "output")))
    trained = {name: value.clone() for name, value in live.model.state_dict().items()}  # max_norm writes when it is run
    floor = 4 * by_step.data["residual_floor"] * (loop.dtype is not torch.float64)
    query = live.query.in_precision_of(next(live.model.parameters()))
    final = query(explained(live.model.eval())).detach()
    if live.query.reduction == "sum":
        final = final.sum(0, keepdim=True)
    missing = (torch.from_numpy(by_output.prediction().values) - final).abs().max() / final.abs().max()

    trajectory, model = Trajectory.open(directory), loop.make()
    parts = live.tracker.parts("query")
    offline = explain(trajectory, model, live.query, parts=parts, quadrature=REFINED, progress=False)
    last = trajectory.state_dict(len(trajectory))
    assert all(torch.equal(value, last[name]) for name, value in trained.items())
    assert offline.data["influence"].sizes == by_step.data["influence"].sizes

    def data(index: Tensor | list[str]) -> Any:
        if isinstance(index, list):  # of words
            index = torch.tensor([int(name.removeprefix("id")) for name in index])
        return loop.data(live.x[index], live.y[index])

    found = audit(trajectory, model, live.query, sample_loss=None if loop.refused else loop.sample_loss, data=data)
    refusal, error = "", float("nan")
    try:
        keep = ("group", "query", "output", "sample")
        with pytest.warns(SampleMismatchWarning) if loop.rounded else nullcontext():
            samples = explain(trajectory, model, live.query, keep=keep, sample_loss=loop.sample_loss, data=data, **TWO)
        kernel = explain(trajectory, model, live.query, keep=keep[:-1], **TWO).data["influence"].sel(part="kernel")
        error = float(abs(samples.data["influence"].sum("sample") - kernel).max() / abs(kernel).max())
    except ValueError as raised:
        refusal = str(raised)
    return Measured(
        float((by_step.residual - floor).clip(0).max()),
        float(missing),
        float(abs(offline.data["influence"] - by_step.data["influence"]).max()),
        error,
        "" if found.ok else str(found),
        refusal,
    )


def against_oracle(cases: list[Case]) -> tuple[float, float]:
    """The largest error of group sums and of samples over these cases."""
    groups = samples = 0.0
    for case in cases:
        found = run(case, AXES, quadrature=Quadrature.fixed(1), parts=("kernel", "regularization"))
        expected = wanted_influence(case.reference(1), case.resolved_groups(), ("kernel", "regularization"))
        groups = max(groups, float(abs(found.data["influence"].values - expected).max() / abs(expected).max()))
        data = of_samples(case, SAMPLE_AXES)
        terms = wanted_samples(case, data["sample"].values.tolist())[:, data["seen"].values.tolist()]
        error = (torch.from_numpy(data["influence"].values) - terms).abs().max() / terms.abs().max()
        samples = max(samples, float(error))
    return groups, samples


def residual(case: Case) -> float:
    """The largest residual, refined to 1e-9 or at most 64 nodes."""
    found = run(case, ("step", "group"), quadrature=Quadrature(1e-9, 4, 64))
    return float(found.residual.max())


def optimizer_rows() -> Iterator[str]:
    names = {case.id: case for case in CASES}
    for name in (*OPTIMIZERS, "muon", "muon-plain"):
        cases = [case for key, case in names.items() if key == name or key.startswith(f"{name}-")]
        own = [case for case in cases if case.optimizer is names[name].optimizer]
        groups, samples = against_oracle(own)
        yield f"| {name} | {len(own)} | exact, {groups:.0e} | exact, {samples:.0e} | {residual(names[name]):.0e} |"


def model_rows() -> Iterator[str]:
    for name in MODELS:
        cases = [case for case in CASES if case.id in (f"{name}-adamw", f"{name}-nesterov-loss")]
        groups, samples = against_oracle(cases)
        yield f"| {name} | {len(cases)} | exact, {groups:.0e} | exact, {samples:.0e} | {residual(cases[0]):.0e} |"


def loop_rows() -> Iterator[str]:
    for loop in (*LOOPS, *LOW_PRECISION_LOOPS, *OUTSIDE_LOOPS):
        with tempfile.TemporaryDirectory() as directory:
            found = measure(loop, Path(directory) / "t")
        kind = "exact" if loop.dtype is torch.float64 else "float32"
        samples = f"refused: {loop.refused}" if loop.refused else f"{kind}, {found.samples:.0e}"
        if loop.is_low_precision:
            samples = f"float32; {found.samples:.0e} of it is training's rounding"
        if loop.rounded:
            samples = f"bfloat16, {found.samples:.0e}, with a warning"
        whole = "to its residual (the derivative jumps)" if loop.jumps else kind
        yield f"| {loop.id} | {whole}, {found.prediction:.0e} | {samples} | {found.residual:.0e} |"


def table(*columns: str) -> str:
    return f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def page() -> str:
    oracle = ("cases", "group sums: error against the oracle", "sample sums: the same", "residual")
    lines = [
        HEAD.rstrip(),
        table("optimizer", *oracle),
        *optimizer_rows(),
        "\nMuon's own arithmetic is bfloat16; what it does to the step is its part `rounding`.",
        table("model", *oracle),
        *model_rows(),
        "\nReLU and max-pooling keep a residual at 64 nodes: the derivative jumps along the path.",
        table("loop or feature", "group sums: error of f₀ − ΣΨ", "sample sums: error of Σ_k Ψ", "residual"),
        *loop_rows(),
        "\nbfloat16 and float16 weights are explained in float32: the parts, rounding among them, add up to the change "
        "of the upcast model; samples are those of gradients in float32, and miss what training rounded of them.",
        table("refused", "with the message"),
        *(f"| {what} | {message} |" for what, message in REFUSED.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ForwardModeFallbackWarning)
    PAGE.write_text(page())
    print(PAGE)
