"""One seed of the main job, trained and explained: all series that the claims of §5 are tested on, in a small file.

The record of the training (1 to 1.5 GB) is made, walked over once, and deleted when the summary is complete. Both the
training and the walk go on, or begin again, where they were interrupted.
"""

import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from omegaconf import DictConfig
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

from explaind_track import Quadrature, Query, Step, Tracker, Trajectory, explain
from explaind_track.engine.features import Features
from explaind_track.engine.functional import Functional
from explaind_track.engine.memory import MEMORY
from explaind_track.engine.path_integral import gauss_legendre
from explaind_track.record.history import AXIS, read_rows
from recipes.common import Run, configure
from recipes.data import sums_of
from recipes.grokking_maps import maps
from recipes.modulo_addition import GROUPS, accuracies, build, make_optimizer

Series = dict[str, np.ndarray]

PARTS = ("kernel", "regularization")

TARGETS = ("outputs", "loss", "margin")
"""All log-probabilities; minus that of the right answer; that one minus the largest other, as at the node."""

HEADS = 4


def series_of(config: DictConfig, seed: int, directory: Path) -> Series:
    """The series of a seed over steps and windows, trained and walked over unless its file is there already.

    Series are named `what/of what`, over (step, …) or (window, …); `layers` of the parameters in their order.
    """
    path = directory / f"series-{seed}.safetensors"
    if not path.is_file():
        record = directory / f"record-{seed}"
        run = train(config, seed, record)
        _save(curves(record) | walk(config, run), path)
    return load_file(path)


def maps_of(config: DictConfig, seed: int, directory: Path) -> Series:
    """The sample × query maps of a seed, unless their file is there already; its record is needed, and deleted."""
    path = directory / f"maps-{seed}.safetensors"
    record = directory / f"record-{seed}"
    if not path.is_file():
        _save(maps(config, train(config, seed, record)), path)
    shutil.rmtree(record, ignore_errors=True)
    return load_file(path)


def _save(series: Series, path: Path) -> None:
    part = path.with_suffix(".part")
    save_file({name: np.ascontiguousarray(values) for name, values in series.items()}, part)
    part.rename(path)


# ------------------------------------------------------------------ training


def train(config: DictConfig, seed: int, record: Path) -> Run:
    """Trains until both accuracies are 1, as the paper's run does, or `config.steps` steps; goes on where it was
    interrupted."""
    preset = [] if config.variant == "default" else [f"preset={config.variant}"]
    settings = configure("modulo_addition", [*preset, f"seed={seed}"])
    model, data = build(settings)
    optimizer = make_optimizer(settings, model)
    batch, index = (data.x_train, data.y_train), torch.arange(len(data.y_train))

    tracker = Tracker(
        model,
        optimizer,
        queries={},
        groups=GROUPS,
        trajectory=record,
        keyframe_every=settings.keyframe_every,
        resume=True,
    )
    with tqdm(desc=f"seed {seed}: train", total=config.steps, initial=tracker.number, unit="step") as bar:
        perfect = _is_perfect(record)
        while tracker.number < config.steps and not perfect:
            with tracker.step():
                optimizer.zero_grad()
                tracker.batch(batch, index=index)
                loss = F.nll_loss(model(data.x_train), data.y_train)
                loss.backward()
                tracker.log({"train/loss": loss.item()})
                optimizer.step()
            if tracker.number % config.evaluate_every == 0:
                on_train, on_test = accuracies(model, data)
                tracker.log({"train/accuracy": on_train, "test/accuracy": on_test})
                perfect = on_train == on_test == 1.0
            bar.update()
    tracker.finish()
    return Run(model, data, Trajectory.open(record))


def _is_perfect(record: Path) -> bool:
    """Whether the last evaluation found no error."""
    rows = [row for row in read_rows(record)[-2:] if "test/accuracy" in row]
    return bool(rows) and rows[-1]["train/accuracy"] == rows[-1]["test/accuracy"] == 1.0


def curves(record: Path) -> Series:
    """The accuracies where they were taken, and the loss at every step."""
    rows = read_rows(record)
    evaluated = [row for row in rows if "test/accuracy" in row]
    return {
        "evaluated": np.array([row[AXIS] for row in evaluated]),
        "accuracy/train": np.array([row["train/accuracy"] for row in evaluated]),
        "accuracy/test": np.array([row["test/accuracy"] for row in evaluated]),
        "loss/train": np.array([row["train/loss"] for row in rows if "train/loss" in row]),
    }


# ------------------------------------------------------------------ one walk over the record


def walk(config: DictConfig, run: Run) -> Series:
    """The series over steps, and those over windows of `config.window` steps, the last of which may be shorter."""
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    sums = Sums()
    parameters = WindowOfParameters(config, run)
    starts = range(0, len(run.trajectory), config.window)
    for start in tqdm(starts, "walk", unit="window"):
        window = (start, min(start + config.window, len(run.trajectory)))
        rivals = torch.stack([parameters.add(step) for step in run.trajectory.steps(*window)])
        of_steps = sums.add(_influences(config, run, window), run.data.y_test[: config.queries], rivals)
        for name, values in (*of_steps.items(), *((name, value[None]) for name, value in parameters.close().items())):
            found[name].append(values)

    series = {name: np.concatenate(values) for name, values in found.items()}
    series["cosine_sums"] = sums_of(run.data.x_test[: config.parameter_queries])
    return series


def _influences(config: DictConfig, run: Run, window: tuple[int, int]) -> xr.DataArray:
    """ψ of every step: (step, group, part, query, output)."""
    influence = explain(
        run.trajectory,
        run.model,
        Query.outputs(run.data.x_test[: config.queries]),
        groups=GROUPS,
        keep=("step", "group", "query", "output"),
        parts=PARTS,
        window=window,
        quadrature=Quadrature.fixed(1),
        progress=False,
    )
    return influence.data["influence"].transpose("step", "group", "part", "query", "output")


class Sums:
    """The sums over queries and outputs of the influences ψ of steps, and what has accumulated by each of them."""

    def __init__(self) -> None:
        self._accumulated: np.ndarray | None = None

    def add(self, influence: xr.DataArray, labels: Tensor, rivals: Tensor) -> Series:
        """Takes ψ (step, group, part, query, output) in; gives its sums, by `what/target`, over (step, group, part), in
        `total/target` over (step, part), all groups together.

        rivals: of each step and query, (step, query), the output whose log-probability is the largest wrong one.
        """
        psi = influence.values
        right = np.take_along_axis(psi, labels.numpy()[None, None, None, :, None], -1)[..., 0]
        other = np.take_along_axis(psi, rivals.numpy()[:, None, None, :, None], -1)[..., 0]
        targets = {"outputs": psi, "loss": -right[..., None], "margin": (right - other)[..., None]}

        found: Series = {}
        for name, values in targets.items():
            found[f"importance/{name}"] = np.abs(values).sum((-2, -1))
            found[f"influence/{name}"] = values.sum((-2, -1))
            found[f"total/{name}"] = np.abs(values.sum(1)).sum((-2, -1))

        # Σ_{x,j} |Σ_{s' ≤ s} ψ_{s'}|, whose differences the authors draw
        before = 0 if self._accumulated is None else self._accumulated
        accumulated = before + psi.cumsum(0)
        self._accumulated = accumulated[-1:]
        found["accumulated/outputs"] = np.abs(accumulated).sum((-2, -1))
        found["accumulated/outputs summed"] = np.abs(accumulated.sum(-1)).sum(-1)
        return found


class WindowOfParameters:
    """Ψ_S(θ, x) and Ψ^reg_S(θ, x) of every parameter over a window S of steps, the outputs summed first, as in the
    authors' scripts."""

    def __init__(self, config: DictConfig, run: Run) -> None:
        self._model, self._data, self._config = run.model, run.data, config
        x = run.data.x_test[: config.parameter_queries]
        summed = Query(x, lambda output: output.sum(1, keepdim=True))
        self._features = Features(Functional(run.model), summed, MEMORY)
        self._rows: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
        self._embedding = torch.zeros(0)

    @torch.no_grad()
    def add(self, step: Step) -> Tensor:
        """Takes a step in; gives the largest wrong output of each query at the middle of its path."""
        for name, feature in self._features.of(step, gauss_legendre(1)).items():
            for part, rows in self._rows.items():
                product = feature * step.parts[part][name]
                rows[name] = rows[name] + product if name in rows else product
        self._embedding = step.after.parameters["embedding.weight"].clone()

        x, y = self._data.x_test[: self._config.queries], self._data.y_test[: self._config.queries]
        output: Tensor = functional_call(self._model, dict(step.point(0.5).parameters), (x,))
        return output.scatter(1, y[:, None], float("-inf")).argmax(1)

    def close(self) -> Series:
        """The window's Σ_x |Ψ| by parameter tensor (heads apart), by group, its cosines over parameters, and the
        embedding's Fourier norms; the next window begins."""
        kernel, decay = (self._rows[part] for part in PARTS)
        tensors, groups, cosines = [], [], []
        for layer in GROUPS.values():
            names = [name for name in kernel if name.startswith(layer.removesuffix("*"))]
            for name in names:
                heads = HEADS if name.startswith("attention") else 1
                axis = (
                    2 if "decoder" in name else 1
                )  # a head writes to rows of the encoder, and is columns of the decoder
                for one, other in zip(kernel[name].chunk(heads, axis), decay[name].chunk(heads, axis), strict=True):
                    tensors.append([float(one.abs().sum()), float(other.abs().sum())])

            flat = torch.cat([kernel[name].flatten(1) for name in names], 1)
            decayed = torch.cat([decay[name].flatten(1) for name in names], 1)
            groups.append([float(flat.sum(1).abs().sum()), float(decayed.sum(1).abs().sum())])
            rows = F.normalize(flat)
            cosines.append(rows @ rows.T)

        self._rows = {part: {} for part in PARTS}
        return {
            "parameters/tensors": np.array(tensors),
            "parameters/groups": np.array(groups),
            "cosines/parameters": torch.stack(cosines).numpy().astype(np.float32),
            "fourier/embedding": fourier_norms(self._embedding[: self._config.modulus]),
        }


def fourier_norms(embedding: Tensor) -> np.ndarray:
    """‖Σ_a e^{−2πika/p} W_a‖² of an embedding W (p, width) for the frequencies k = 0 … (p − 1)/2 (Nanda et al.)."""
    norms: np.ndarray = torch.fft.rfft(embedding.double(), dim=0).abs().square().sum(1).numpy()
    return norms
