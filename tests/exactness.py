"""Writes tests/README.md: what is exact, measured on the cases and loops of the tests, and what is refused.

python tests/exactness.py
"""

import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from cases import CASES, MODELS, OPTIMIZERS, Case
from loops import LOOPS

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("engine", "explanation", "tracking")]
from test_exactness import AXES, run, wanted_influence  # noqa: E402
from test_loops import measure  # noqa: E402
from test_sample_axis import AXES as SAMPLE_AXES  # noqa: E402
from test_sample_axis import of_samples, wanted  # noqa: E402

from explaind_track import Quadrature  # noqa: E402
from explaind_track.errors import ForwardModeFallbackWarning  # noqa: E402

PAGE = Path(__file__).with_name("README.md")
HEAD = """# What is exact

Written by `python tests/exactness.py` from the cases and loops that the tests run over (float64 unless said; the
largest error of all steps, relative to the largest number). *Oracle*: the plain loops of `reference.py`, at equal
nodes. *Residual*: what the refined split of a step leaves of the change of the prediction (1e-9 asked of the loops).

"""
REFUSED = {
    "LBFGS": "evaluates the loss many times in one step, which has no parts",
    "an optimizer without a rule": "no update rule for the optimizer …; register one",
    "optimizer.step(closure)": "call the closure before it",
    "complex or integer parameters": "only parameters of real numbers can be explained",
    "sparse gradients": "the gradient of '…' is sparse; use sparse=False in its module",
    "optimizer state loaded on the way": "load first, then make the Tracker",
    "tracker.backward() under batch norm": "normalises with the statistics of its batch, so no sample has a gradient",
    "samples of a step clipped by value": "what is left of it is no sum over samples",
    "FSDP, tensor parallelism": "parameters are in pieces …; train with DistributedDataParallel instead",
    "DistributedDataParallel.join()": "give all ranks as many batches (a DistributedSampler does), of any size",
    "DistributedDataParallel of some of the processes": "a Tracker needs a DistributedDataParallel of all of them",
    "samples under SyncBatchNorm": "leave sample_loss= out, or use BatchNorm without convert_sync_batchnorm",
    "resume=True in several processes": "load your own checkpoint in every process, and pass the number of its step",
    "samples in several processes, in a callback that does not see the DistributedDataParallel": (
        "use a Tracker of the DistributedDataParallel in your own loop"
    ),
}


def against_oracle(cases: list[Case]) -> tuple[float, float]:
    """The largest error of group sums and of samples over these cases."""
    groups = samples = 0.0
    for case in cases:
        found = run(case, AXES, quadrature=Quadrature.fixed(1), parts=("kernel", "regularization"))
        expected = wanted_influence(case.reference(1), case.resolved_groups(), ("kernel", "regularization"))
        groups = max(groups, float(abs(found.data["influence"].values - expected).max() / abs(expected).max()))
        data = of_samples(case, SAMPLE_AXES)
        terms = wanted(case, data["sample"].values.tolist())[:, data["seen"].values.tolist()]
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
    for loop in LOOPS:
        with tempfile.TemporaryDirectory() as directory:
            found = measure(loop, Path(directory) / "t")
        kind = "exact" if loop.dtype is torch.float64 else "float32"
        samples = f"refused: {loop.refused}" if loop.refused else f"{kind}, {found.samples:.0e}"
        if loop.rounded:
            samples = f"bfloat16, {found.samples:.0e}, with a warning"
        yield f"| {loop.id} | {kind}, {found.prediction:.0e} | {samples} | {found.residual:.0e} |"


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
        table("refused", "with the message"),
        *(f"| {what} | {message} |" for what, message in REFUSED.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ForwardModeFallbackWarning)
    PAGE.write_text(page())
    print(PAGE)
