"""Lightning's modules as people write them: training is the same with a callback and without, bit for bit, and samples
make up the gradient of every step by the weights that were found."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track import Query, Trajectory, explain

lightning: Any = pytest.importorskip("lightning.pytorch")
pytestmark = [
    pytest.mark.usefixtures("closing_wandb"),
    pytest.mark.filterwarnings("ignore", "error::explaind_track.errors.SampleMismatchWarning"),  # of our hosts
]

ROWS = 22
X, Y = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(5)), torch.arange(ROWS) % 3


def losses(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Plain(lightning.LightningModule):  # type: ignore[misc,name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Any:
        return self.network(x)

    def training_step(self, batch: Any, number: int) -> Any:
        return losses(self, batch).mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


class Normalized(Plain):
    """With statistics that averaging weights resets."""

    def __init__(self) -> None:
        super().__init__()
        self.network.insert(1, nn.BatchNorm1d(6))


class Summed(Plain):
    def training_step(self, batch: Any, number: int) -> Any:
        return losses(self, batch).sum()


class Skipping(Plain):
    """Passes over every other batch, whose index it takes out."""

    def training_step(self, batch: Any, number: int) -> Any:
        batch.pop(2)
        return None if number % 2 else losses(self, batch).mean()


class Stopping(Plain):
    def on_train_batch_start(self, batch: Any, number: int) -> Any:
        return -1 if number == 3 else None


class Clipping(Plain):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, 0.02, "norm")


class Manual(Plain):
    """Takes its steps itself, every second batch, and clips before them."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, number: int) -> Any:
        optimizer = self.optimizers()
        self.manual_backward(losses(self, batch).mean() / 2)
        if number % 2:
            self.clip_gradients(optimizer, 0.02, "norm")
            optimizer.step()
            optimizer.zero_grad()


@dataclass(frozen=True)
class Kind:
    id: str
    module: Callable[[], Any] = Plain
    options: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Any]] = list


KINDS = [
    Kind("accumulated, clipped, short last batch", options={"accumulate_grad_batches": 4, "gradient_clip_val": 0.01}),
    Kind("accumulated more and more",
         callbacks=lambda: [lightning.callbacks.GradientAccumulationScheduler({0: 1, 1: 3})]),
    Kind("summed, accumulated", Summed, {"accumulate_grad_batches": 4}),
    Kind("batches passed over", Skipping),
    Kind("batches passed over, accumulated", Skipping, {"accumulate_grad_batches": 3}),
    Kind("epoch broken off", Stopping),
    Kind("its own clipping", Clipping),
    Kind("manual optimization", Manual),
]  # fmt: skip


def fit(kind: Kind, *callbacks: Any, checkpoint_path: Path | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    module = kind.module()
    data = torch.utils.data.TensorDataset(X, Y, torch.arange(ROWS))
    trainer = lightning.Trainer(
        **{
            "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "precision": "64-true",
            **kind.options, **options,
        },
        callbacks=[*callbacks, *kind.callbacks()],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=checkpoint_path, weights_only=False)
    return module.train()


def tracked(directory: Path, **options: Any) -> Any:
    from explaind_track.callbacks.lightning import TrackerCallback

    return TrackerCallback(
        queries={"test": Query.outputs(X[:3])}, sample_loss=losses, index=lambda batch: batch[2], trajectory=directory,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.id)
def test_a_module_is_explained_and_not_changed(kind: Kind, tmp_path: Path) -> None:
    callback = tracked(tmp_path / "t")
    module = fit(kind, callback)

    alone = fit(kind)
    for name, value in alone.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name
    trajectory = Trajectory.open(tmp_path / "t")
    assert callback.tracker.number == len(trajectory) > 2

    found = explain(
        trajectory, module, Query.outputs(X[:3]), keep=("group", "query", "sample"), sample_loss=losses, progress=False,
        data=lambda index: (X[index].double(), Y[index]),
    )  # fmt: skip
    assert float(found.data["mismatch"].max()) < 1e-9


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_averaged_weights_are_predicted(precision: str, tmp_path: Path) -> None:
    """Their schedule begins after `fit` has, they are copied in behind the last epoch, and statistics are made anew."""
    callback = tracked(tmp_path / "t")
    averaging = lightning.callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=2)
    module = fit(Kind("averaged", Normalized), callback, averaging, precision=precision, max_epochs=4).eval()

    predicted = callback.tracker.influence("test", ("query", "output")).prediction().values
    assert float(callback.tracker.influence("test").residual.max()) < 0.1
    x = X[:3].double() if precision == "64-true" else X[:3]
    assert abs(module.float()(x.float()).detach().numpy() - predicted).max() < 0.01
    trajectory = Trajectory.open(tmp_path / "t")
    last = trajectory.state_dict(len(trajectory))
    assert torch.allclose(last["network.1.running_mean"].float(), module.network[1].running_mean)


def test_a_record_goes_on_where_the_checkpoint_does(tmp_path: Path) -> None:
    kind, single = Kind("saved"), {"precision": "32-true"}  # a checkpoint is loaded into a module of float32
    checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=5)
    fit(kind, tracked(tmp_path / "t"), checkpoint, enable_checkpointing=True, max_epochs=1, **single)

    (path,) = tmp_path.glob("*step=5.ckpt")
    resumed = tracked(tmp_path / "t", resume=True)
    fit(kind, resumed, checkpoint_path=path, **single)
    assert len(Trajectory.open(tmp_path / "t")) == resumed.tracker.number == 12
