"""G.1, Fig. 7: influences summed to training samples, as forecasts of models trained on subsets of them.

    python -m recipes.data_attribution [preset=cifar2] [key=value …]

The linear datamodeling score, beside TracIn's and TRAK's. `out` receives summary.json, config.yaml, figures/lds.png
and the trajectory.
"""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from explaind_track import Quadrature, Query, explain
from explaind_track.core.tables import table
from recipes import images
from recipes.common import Run, configure, output_directory, save_figures, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESAMPLES = 30
"""The number of times that subsets and queries are drawn again for the error of a score."""

PAPER_CIFAR2 = {"path kernel": 0.06, "TracIn": 0.05, "TRAK": 0.05}
"""The paper's scores on CIFAR-2 for the fraction 0.5; those on MNIST it only draws."""


def log_odds(output: Tensor, y: Tensor) -> Tensor:
    """The log-odds log p_y / (1 − p_y) of each row, (X, 1): the prediction that all methods attribute."""
    right = output.gather(1, y[:, None])
    rest = output.scatter(1, y[:, None], float("-inf"))
    return right - rest.logsumexp(1, keepdim=True)


def path_kernel(run: Run, x: Tensor, y: Tensor, nodes: int) -> Tensor:
    """−Ψ(x_k, x), which each training sample added to each prediction, (samples, queries)."""
    influence = explain(
        run.trajectory,
        run.model,
        Query.function(x, log_odds, y),
        keep=("sample", "query"),
        quadrature=Quadrature.fixed(nodes),
        sample_loss=images.sample_loss,
        data=run.data.training_batch,
    )
    return -torch.from_numpy(influence.data["influence"].transpose("sample", "query").values)


def baselines(config: DictConfig, run: Run, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    """TracIn and single-model TRAK, by `dattri`: (samples, queries) each."""
    from dattri.algorithm import TracInAttributor, TRAKAttributor
    from dattri.task import AttributionTask

    def target(parameters: Any, sample: tuple[Tensor, Tensor]) -> Tensor:
        image, label = sample
        return log_odds(functional_call(run.model, parameters, (image[None],)), label.reshape(1)).sum()

    def loss(parameters: Any, sample: tuple[Tensor, Tensor]) -> Tensor:
        image, label = sample
        return F.cross_entropy(functional_call(run.model, parameters, (image[None],)), label.reshape(1))

    def probability(parameters: Any, sample: tuple[Tensor, Tensor]) -> Tensor:
        return torch.exp(-loss(parameters, sample))

    samples = DataLoader(TensorDataset(run.data.x_train, run.data.y_train), batch_size=config.gradients)
    queries = DataLoader(TensorDataset(x, y), batch_size=config.gradients)
    options = {"projector_kwargs": {"proj_dim": config.projection, "device": config.device}, "device": config.device}
    steps = [round(len(run.trajectory) * (place + 1) / config.checkpoints) for place in range(config.checkpoints)]
    states = [run.trajectory.state_dict(step) for step in steps]

    def tracin() -> Tensor:
        task = AttributionTask(loss, run.model, states, target_func=target)
        weights = torch.full((len(states),), float(config.optimizer.lr))
        scores: Tensor = TracInAttributor(task, weights, normalized_grad=False, **options).attribute(samples, queries)
        return -scores  # a step on the sample moves the target by −lr ⟨∇loss, ∇target⟩

    def trak() -> Tensor:
        task = AttributionTask(target, run.model, states[-1], target_func=target)
        attributor = TRAKAttributor(task, probability, regularization=1e-3, **options)
        attributor.cache(samples)
        scores: Tensor = attributor.attribute(queries)
        return scores

    return {"TracIn": tracin, "TRAK": trak}


def retrain(config: DictConfig, run: Run, x: Tensor, y: Tensor, subsets: Sequence[Tensor]) -> Tensor:
    """The predictions of a model trained on each subset, (subsets, queries): each has another start and order.

    One after the other: stacked by `torch.func.stack_module_state`, 16 CNNs took 1.6 times as long on a CPU.
    """
    values = []
    for number, subset in enumerate(tqdm(subsets, "train again", unit="model")):
        seed = config.seed + 1 + number
        model = images.build(config, run.data, seed)
        images.fit(config, model, *run.data.training_batch(subset), seed)
        values.append(log_odds(images.log_probabilities(model, x), y)[:, 0])
    return torch.stack(values)


def datamodeling_score(
    scores: Tensor, truth: Tensor, subsets: Tensor, generator: torch.Generator
) -> tuple[float, float]:
    """The linear datamodeling score, a mean over the queries, and its standard error.

    The error is that of `RESAMPLES` resamplings of the subsets and of the queries: all queries share the subsets'
    models.

    Args:
        scores: (samples, queries).
        truth: the predictions of the subsets' models, (subsets, queries).
        subsets: the samples in each, (subsets, size).
        generator: draws the resamplings.
    """
    foretold = torch.stack([scores[subset].sum(0) for subset in subsets]).double()  # as the correlations then are
    count, queries = truth.shape
    score = rank_correlations(foretold, truth, torch.arange(count)).mean()

    means = []
    for _ in range(RESAMPLES):
        rows, columns = (torch.randint(size, (size,), generator=generator) for size in (count, queries))
        means.append(rank_correlations(foretold, truth, rows)[columns].mean())
    return float(score), float(torch.stack(means).std())


def rank_correlations(foretold: Tensor, truth: Tensor, rows: Tensor) -> Tensor:
    """Spearman's of forecast and truth over these subsets, (queries,); 0 where nothing differs between them."""
    from dattri.metric import lds
    from scipy.stats import ConstantInputWarning

    # the sums over the samples are taken once, and not again for each resampling: a subset is its own only member
    members = rows[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        correlations: Tensor = lds(foretold, (truth[rows], members))[0]
    return correlations.nan_to_num()


def draw(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> "Figure":
    """Fig. 7: scores by the fraction that the models are trained on, with their standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    places = range(len(rows))
    for name in methods:
        errors = [row[f"± {name}"] for row in rows]
        axis.errorbar(places, [row[name] for row in rows], errors, marker="o", capsize=3, label=name)

    axis.axhline(0, color="gray", linewidth=0.5)
    axis.set_xticks(places, [f"{row['fraction']:g}" for row in rows])
    axis.set_xlabel("fraction of the training samples that the models are trained on again")
    axis.set_ylabel("linear datamodeling score\n(rank correlation ± standard error)")
    axis.legend()
    axis.grid(alpha=0.2)
    return figure


def main(arguments: list[str]) -> None:
    config = configure("data_attribution", arguments)
    data = images.load(config)
    out = output_directory(config, "data_attribution")
    run = images.obtain(config, data, config.seed, out / "trajectory")
    x, y = data.x_test[: config.queries], data.y_test[: config.queries]

    scores: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    methods = {"path kernel": lambda: path_kernel(run, x, y, config.nodes), **baselines(config, run, x, y)}
    for name, attribute in methods.items():
        started = perf_counter()
        scores[name] = attribute().detach().cpu()
        seconds[name] = round(perf_counter() - started, 1)

    head: dict[str, Any] = {
        "accuracy": images.accuracy(run.model, data.x_test, data.y_test),
        "queries": len(y),
        "subsets": config.subsets,
        "seconds": seconds,
        "paper": PAPER_CIFAR2 if config.data.name == "cifar2" else None,
    }
    generator = torch.Generator().manual_seed(config.seed)
    size = len(data.y_train)
    rows: list[dict[str, Any]] = []
    for fraction in config.fractions:
        draws = [torch.randperm(size, generator=generator)[: round(fraction * size)] for _ in range(config.subsets)]
        subsets = torch.stack(draws)
        truth = retrain(config, run, x, y, subsets.unbind()).cpu()
        row: dict[str, Any] = {"fraction": fraction}
        for name, score in scores.items():
            row[name], row[f"± {name}"] = datamodeling_score(score, truth, subsets, generator)
        rows.append(row)
        write_json(out / "summary.json", {**head, "rows": rows})  # after each: a fraction takes minutes

    save_figures(out / "figures", {"lds": draw(rows, list(scores))})
    print(f"\nlinear datamodeling score of {config.subsets} models for each fraction, {len(y)} queries\n{table(rows)}")
    print(f"seconds: {seconds} (the paper, on a GPU: path kernel 170, TRAK 114, TracIn 100)")
    print(f"{out / 'summary.json'}\n{out / 'figures' / 'lds.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
