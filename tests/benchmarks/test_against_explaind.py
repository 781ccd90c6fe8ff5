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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from authors_package import (
    CHUNK,
    OUTPUTS,
    STEPS,
    TEST,
    Run,
    Stopwatch,
    explain_with_step_explainer,
    mean_loss,
    record,
    single_output,
    walk_their_path,
)
from torch import Tensor

pytest.importorskip("explaind.epk_model")

# their vmap over `scaled_dot_product_attention` falls back to a loop; with the kernel that has a rule it is no faster
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:There is a performance drop")]


@pytest.fixture(scope="module")
def run() -> Run:
    return record()


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
