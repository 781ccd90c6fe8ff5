"""What each training sample does to predictions, by the methods that `data_attribution` compares: (samples, queries)
each, more of it where more of the sample makes the prediction larger."""

import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from explaind_track import Quadrature, Query, counterfactual, explain
from recipes import images
from recipes.common import Run


def log_odds(output: Tensor, y: Tensor) -> Tensor:
    """The log-odds log p_y / (1 − p_y) of each row, (X, 1): the prediction that all methods attribute."""
    right = output.gather(1, y[:, None])
    rest = output.scatter(1, y[:, None], float("-inf"))
    return right - rest.logsumexp(1, keepdim=True)


def methods(config: DictConfig, run: Run, x: Tensor, y: Tensor, mean: bool = False) -> dict[str, Callable[[], Tensor]]:
    """By name. mean: of the mean prediction of all queries, (samples, 1), which ours find at the price of one."""
    query = Query.function(x, log_odds, y)
    if mean:
        query = query.mean()
    found: dict[str, Callable[[], Tensor]] = {
        "path kernel": partial(path_kernel, run, query, config.nodes),
        "metagradient": partial(metagradient, run, query),
    }
    for name, scores in baselines(config, run, x, y).items():
        found[name] = partial(averaged, scores) if mean else scores
    if config.magic and find_spec("bergson") is not None:
        found["MAGIC"] = partial(magic, config, run, x, y, mean)
    return found


def averaged(scores: Callable[[], Tensor]) -> Tensor:
    """The scores' mean over the queries, (samples, 1)."""
    return scores().mean(1, keepdim=True)


def path_kernel(run: Run, query: Query, nodes: int) -> Tensor:
    """−Ψ(x_k, x), which each training sample added to each prediction in the run."""
    influence = explain(
        run.trajectory,
        run.model,
        query,
        keep=("sample", "query"),
        quadrature=Quadrature.fixed(nodes),
        sample_loss=images.sample_loss,
        data=run.data.training_batch,
    )
    return -torch.from_numpy(influence.data["influence"].transpose("sample", "query").values)


def metagradient(run: Run, query: Query) -> Tensor:
    """∂f(θ_N)/∂w_k, through the whole run."""
    options: Any = {"sample_loss": images.sample_loss, "data": run.data.training_batch}
    effect = counterfactual(run.trajectory, run.model, query, **options).data["effect"]
    return torch.from_numpy(effect.transpose("sample", "query").values)


def baselines(config: DictConfig, run: Run, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    """TracIn and single-model TRAK, by `dattri`."""
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


# ------------------------------------------------------------------ bergson's MAGIC, where it is installed


class Losses(nn.Module):
    """A model that gives a batch's loss, as bergson's trainer asks for it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor, example_weight: Tensor, shift_loss_mask: Tensor) -> Tensor:
        losses = images.sample_loss(self.model, (x, y))
        return (losses * example_weight).sum() / len(losses)


class Stream:
    """The batches of a run, with a weight for each training sample, as bergson's trainer asks for them."""

    def __init__(self, config: DictConfig, run: Run, seed: int) -> None:
        size = len(run.data.y_train)
        self._data, self._batches = run.data, list(images.batches(size, config, seed))
        self.weights, self.device = nn.Parameter(torch.ones(size)), torch.device(config.device)
        self.requires_grad = True

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        index = self._batches[place]
        x, y = self._data.training_batch(index)
        return {"x": x, "y": y, "example_weight": self.weights[index], "shift_loss_mask": torch.ones(len(index), 1)}


def magic(config: DictConfig, run: Run, x: Tensor, y: Tensor, mean: bool) -> Tensor:
    """The metagradient by bergson, which trains the run again and goes back over it for one target after the other."""
    import torchopt
    from bergson.magic.trainer import BackwardState, Trainer

    # without eps_root, parameters whose gradients have always been 0 give NaN
    own = config.optimizer
    optimizer = torchopt.adamw(own.lr, tuple(own.betas), own.eps or 1e-8, own.weight_decay, eps_root=1e-30)
    trainer, state = Trainer.initialize(Losses(images.build(config, run.data, config.seed)), optimizer)
    stream, found = Stream(config, run, config.seed), []

    with tempfile.TemporaryDirectory() as directory:
        end = trainer.train(state, stream, save_dir=directory, save_mode="all")
        for rows in [slice(0, len(y))] if mean else [slice(row, row + 1) for row in range(len(y))]:
            state = end.to(config.device).detach_()
            state.requires_grad = True

            # ∂f/∂θ_N, and nothing of the optimizer's state
            parameters = {name.removeprefix("model."): value for name, value in state.params.items()}
            value = log_odds(functional_call(run.model, parameters, (x[rows],)), y[rows]).mean()
            gradients = torch.autograd.grad(value, list(state.params.values()))
            beginning = BackwardState(
                dict(zip(state.params, gradients, strict=True)),
                [torch.zeros_like(tensor) for tensor in state.differentiable_tensors()[len(state.params) :]],
                torch.zeros_like(stream.weights),
            )
            ended = trainer.backward(directory, stream, beginning, state, save_mode="all", cleanup=False)
            found.append(ended.weight_grads.detach())
    return torch.stack(found, 1)
