"""A Tracker in the loops of Lightning and transformers: the same influences, to the bit, as in a loop of our own."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from servers import Server
from torch import nn

from explaind_track import Query, Tracker, Trajectory, open_run

pytestmark = [
    pytest.mark.usefixtures("closing_wandb"),
    pytest.mark.filterwarnings("ignore", "error::explaind_track.errors.SampleMismatchWarning"),  # of our hosts
]


def compare(found: Tracker, expected: Tracker, query: str) -> None:
    assert found.number == expected.number > 2
    for keep in (("step", "group"), ("query", "output")):
        xr.testing.assert_allclose(
            found.influence(query, keep).data, expected.influence(query, keep).data, rtol=1e-10, atol=1e-12
        )


# ------------------------------------------------------------------ lightning

X, Y = torch.randn(20, 4, generator=torch.Generator().manual_seed(3)).double(), torch.arange(20) % 3


def sample_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize(("accumulated", "clip"), [(1, None), (2, 0.02)])
def test_lightning(accumulated: int, clip: float | None, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from explaind_track.callbacks.lightning import TrackerCallback

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.first(x)))

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return sample_loss(self, batch).mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}]

    torch.manual_seed(0)
    module = Module()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y, torch.arange(20)), batch_size=5)
    queries = {"test": Query.outputs(X[:4]), "loss": Query.loss(X[:6], Y[:6]).mean()}

    callback = TrackerCallback(
        queries=queries, trajectory=tmp_path / "t", sample_loss=sample_loss, samples_every=1, index=lambda b: b[2]
    )
    trainer = lightning.Trainer(
        max_epochs=2 * accumulated, callbacks=[callback], accumulate_grad_batches=accumulated, gradient_clip_val=clip,
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, data)

    module.load_state_dict(start)
    module.trainer = None
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    own = Tracker(module, optimizer, queries=queries)
    batches = [batch for _ in range(2 * accumulated) for batch in data]
    for first in range(0, len(batches), accumulated):
        with own.step():
            optimizer.zero_grad()
            for batch in batches[first : first + accumulated]:
                (sample_loss(module, batch).mean() / accumulated).backward()
            if clip is not None:
                assert own.clip_grad_norm_(clip) > clip
            optimizer.step()
        schedule.step()
    compare(callback.tracker, own, "test")
    recorded = Trajectory.open(tmp_path / "t")
    assert len(recorded) == own.number
    assert [batch.index.tolist() for batch in recorded.batches(0)] == [list(range(5)), list(range(5, 10))][:accumulated]
    own.finish()
    trainer.optimizers[0].step()  # nothing of ours is left


@pytest.mark.parametrize("trainer_options", [{"precision": "bf16-mixed"}, {"gradient_clip_algorithm": "value"}])
def test_lightning_samples_are_those_of_its_precision(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    """They add up to the gradient that bfloat16 gave, which others miss by 0.4%; where values are clipped, they are
    refused."""
    lightning = pytest.importorskip("lightning.pytorch")
    from explaind_track.callbacks.lightning import TrackerCallback

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.first(x)))

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return sample_loss(self, batch).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X.float(), Y), batch_size=5)
    callback = TrackerCallback(
        queries={"test": Query.outputs(X[:4].float())}, sample_loss=sample_loss, trajectory=tmp_path / "t"
    )
    clip = 0.01 if "gradient_clip_algorithm" in trainer_options else None
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, gradient_clip_val=clip,
        **trainer_options,
    )  # fmt: skip
    trainer.fit(Module(), data)
    assert float(callback.tracker.influence("test").residual.max()) < 1e-3
    assert [batch.clipped for batch in Trajectory.open(tmp_path / "t").batches(0)] == [clip is not None]


@pytest.mark.parametrize("package", ["lightning", "transformers"])
def test_a_missing_package_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"explaind_track.callbacks.{package}", raising=False)
    needed = f"needs {package}, which is not installed: pip install 'explaind_track\\[callbacks\\]'"
    with pytest.raises(ModuleNotFoundError, match=needed):
        import_module(f"explaind_track.callbacks.{package}")


def test_several_processes_have_samples_of_their_own() -> None:
    pytest.importorskip("lightning.pytorch")
    from explaind_track.callbacks.lightning import TrackerCallback

    TrackerCallback(queries={"test": Query.outputs(X[:4])}).refuse_samples_in(2)
    with pytest.raises(ValueError, match="samples of the main one alone; leave sample_loss= out"):
        TrackerCallback(queries={"test": Query.outputs(X[:4])}, sample_loss=sample_loss).refuse_samples_in(2)


def test_lightning_reuses_its_run(server: Server, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.demos.boring_classes import BoringModel
    from lightning.pytorch.loggers import WandbLogger

    from explaind_track.callbacks.lightning import TrackerCallback

    logger = WandbLogger(project="project", save_dir=tmp_path)
    callback = TrackerCallback(queries={"test": Query.outputs(torch.ones(2, 32))})
    trainer = lightning.Trainer(
        max_steps=4, callbacks=[callback], logger=logger, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, limit_val_batches=0, default_root_dir=tmp_path, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(BoringModel())
    run = logger.experiment
    path = f"{run.entity}/project/{run.id}"
    run.finish()
    found = [row["train/step"] for row in server.history(path) if "train/step" in row]
    assert found == [0, 1, 2, 3]


# --------------------------------------------------------------- transformers


@pytest.mark.parametrize(("accumulated", "clip"), [(1, 0.02), (2, 0.0)])
def test_transformers(accumulated: int, clip: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from explaind_track.callbacks.transformers import TrackerCallback

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=8,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).double()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    tokens, labels = torch.randint(11, (24, 6)), torch.randint(3, (24,))
    rows = [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]
    queries = {"test": Query.function({"input_ids": tokens[:3]}, lambda output: output.logits)}
    run = open_run("project", tmp_path, mode="offline")

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch["input_ids"]).logits, batch["labels"], reduction="none")

    callback = TrackerCallback(queries=queries, groups=3, trajectory=tmp_path / "t", sample_loss=loss)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, num_train_epochs=accumulated, report_to=[],
        gradient_accumulation_steps=accumulated, max_grad_norm=clip, learning_rate=0.01, weight_decay=0.1, use_cpu=True,
        optim="adamw_torch", lr_scheduler_type="linear", save_strategy="no", disable_tqdm=True, seed=1,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    assert callback.tracker.run is run

    recorded = Trajectory.open(tmp_path / "t")
    model.load_state_dict(start)
    model.train()
    optimizer, count = torch.optim.AdamW(_groups(model), lr=0.01), len(recorded)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (count - step) / count))
    own = Tracker(model, optimizer, queries=queries, groups=3)
    for number in range(count):
        with own.step():
            optimizer.zero_grad()
            for batch in recorded.batches(number):
                model(**batch.data).loss.backward()  # the Trainer leaves it undivided for this model
            if clip:
                assert own.clip_grad_norm_(clip) > clip
            optimizer.step()
        schedule.step()
    assert count == 6
    compare(callback.tracker, own, "test")


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """As the Trainer makes them: no decay for biases and layer norms."""
    bare = [name.endswith("bias") or "LayerNorm" in name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())
    return [
        {"params": [p for p, no in zip(parameters, bare, strict=True) if not no], "weight_decay": 0.1},
        {"params": [p for p, no in zip(parameters, bare, strict=True) if no], "weight_decay": 0.0},
    ]
