"""When the main job memorises and generalises: unselected seeds, precisions and thread counts side by side.

    python -m recipes.grokking_seeds [key=value …]

Trains without a Tracker, which changes no number of a training. `out` receives runs/, a file for each run that has
ended, summary.json and the table that is printed. Called again with the same `out`, it goes on.
"""

import json
import sys
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from explaind_track.core.tables import table
from recipes.common import configure, output_directory, write_json
from recipes.modulo_addition import accuracies, build, make_optimizer

EVALUATE_EVERY = 20


def flat(model: nn.Module) -> Tensor:
    """All parameters as one vector, (D,)."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def train(settings: DictConfig, steps: int, compare: list[int]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Trains on the full batch until both accuracies are 1.

    Returns:
        The row of the run, and its weights (D,) by the step at which it is compared, "0" first.
    """
    started = perf_counter()
    model, data = build(settings)
    optimizer = make_optimizer(settings, model)
    weights = {"0": flat(model)}
    row: dict[str, Any] = {"memorised": None, "test_then": None, "generalised": None, "train": 0.0, "test": 0.0}

    for step in range(1, steps + 1):
        optimizer.zero_grad()
        F.nll_loss(model(data.x_train), data.y_train).backward()
        optimizer.step()
        if step in compare:
            weights[str(step)] = flat(model)
        if step % EVALUATE_EVERY:
            continue

        on_train, on_test = accuracies(model, data)
        row |= {"train": on_train, "test": on_test}
        if row["memorised"] is None and on_train >= 0.99:
            row |= {"memorised": step, "test_then": on_test}
        if on_train == on_test == 1.0:
            row["generalised"] = step
            break
    return row | {"steps": step, "seconds": round(perf_counter() - started, 1)}, weights


def run(config: DictConfig, out: Path, variant: str, seed: int, threads: int) -> None:
    """Trains one of the runs, unless it has ended already."""
    name = f"{variant}-{seed}-{threads}"
    if (out / f"{name}.json").is_file():
        return
    preset = [] if variant == "default" else [f"preset={variant}"]
    settings = configure("modulo_addition", [*preset, f"seed={seed}"])

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        row, weights = train(settings, config.steps, list(config.compare))
    finally:
        torch.set_num_threads(before)
    save_file(weights, out / f"{name}.safetensors")
    write_json(out / f"{name}.json", {"variant": variant, "seed": seed, "threads": threads, **row})


def apart(out: Path, variant: str, seed: int, threads: list[int]) -> dict[str, float]:
    """How far the runs of one seed with the first and the last number of threads are from each other, by step: relative
    to the way that the first has gone from its beginning, ‖θ − θ'‖ / ‖θ − θ_0‖."""
    one, other = (load_file(out / f"{variant}-{seed}-{count}.safetensors") for count in (threads[0], threads[-1]))
    start = one.pop("0")
    return {
        step: float((weights - other[step]).norm() / (weights - start).norm())
        for step, weights in one.items()
        if step in other
    }


def summarize(config: DictConfig, out: Path) -> list[dict[str, Any]]:
    """A row for each variant and number of threads: how many of the seeds do what, and by when."""
    summary = []
    for variant, threads in product(config.variants, config.threads):
        rows = [json.loads((out / f"{variant}-{seed}-{threads}.json").read_text()) for seed in config.seeds]
        generalised = sorted(row["generalised"] for row in rows if row["generalised"])
        memorised = [row for row in rows if row["memorised"]]
        summary.append(
            {
                "variant": variant,
                "threads": threads,
                "runs": len(rows),
                "at 99% of train": len(memorised),
                "of these below 50% of test": sum(row["test_then"] < 0.5 for row in memorised),
                "at 100%": len(generalised),
                "first at": generalised[0] if generalised else None,
                "last at": generalised[-1] if generalised else None,
            }
        )
    return summary


def main(arguments: list[str]) -> None:
    config = configure("grokking_seeds", arguments)
    out = output_directory(config, "grokking_seeds", resumable=True)
    directory = out / "runs"
    directory.mkdir(exist_ok=True)

    every = list(product(config.variants, config.seeds, config.threads))
    for variant, seed, threads in tqdm(every, desc="runs", unit="run"):
        run(config, directory, variant, seed, threads)

    rows = [json.loads((directory / f"{v}-{s}-{t}.json").read_text()) for v, s, t in every]
    summary = summarize(config, directory)
    distances = {
        variant: {str(seed): apart(directory, variant, seed, list(config.threads)) for seed in config.seeds}
        for variant in config.variants
    }
    write_json(out / "summary.json", {"summary": summary, "runs": rows, "apart": distances})
    print(table(rows), table(summary), sep="\n\n")
    for variant, seeds in distances.items():
        print(f"{variant}: apart by step {seeds}")


if __name__ == "__main__":
    main(sys.argv[1:])
