"""The Trainer of transformers as people set it up: training is the same with a callback and without, bit for bit, and
samples make up the gradient of every step by the weights that were found."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_hf import FAMILIES, ROWS
from torch import Tensor, nn

from explaind_track import Query, Trajectory, explain

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.usefixtures("closing_wandb"),
    pytest.mark.filterwarnings("ignore", "error::explaind_track.errors.SampleMismatchWarning"),  # of our hosts
]

TOKENS = {name: value for name, value in FAMILIES[0].data().items() if name != "index"}
TEXT = {name: value for name, value in TOKENS.items() if name != "labels"}
CLASSES = {**TEXT, "labels": torch.arange(ROWS) % 3}


def classifier(kind: str = "BertForSequenceClassification", **settings: Any) -> nn.Module:
    config = transformers.BertConfig(
        **{
            "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 8, "max_position_embeddings": 8, "hidden_dropout_prob": 0.1, **settings,
        }
    )  # fmt: skip
    made: nn.Module = getattr(transformers, kind)(config)
    return made


def seq2seq() -> nn.Module:
    """An encoder-decoder, which makes its decoder's inputs of the labels."""
    config = transformers.T5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.1, decoder_start_token_id=0
    )
    made: nn.Module = transformers.T5ForConditionalGeneration(config)
    return made


def partly_frozen() -> nn.Module:
    model: Any = FAMILIES[0].make()
    for frozen in (model.transformer.wpe, model.transformer.h[0]):
        frozen.requires_grad_(False)
    return model  # type: ignore[no-any-return]


def by_token(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)


def mean_of_tokens(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean over a sample's tokens instead of their sum."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return by_token(output, batch["labels"]).sum(1) / (batch["labels"][:, 1:] != -100).sum(1)


class TwoPasses(transformers.Trainer):  # type: ignore[misc,name-defined]
    """Two forward passes under dropout for each batch, and labels that no model sees."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        labels = inputs.pop("labels")
        return sum(
            (F.cross_entropy(model(**inputs).logits, labels) for _ in range(2)), torch.zeros((), dtype=torch.float64)
        )


def two_passes(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    inputs = {name: batch[name] for name in TEXT}
    both = [F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none") for _ in range(2)]
    return both[0] + both[1]


class Streamed(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Without a length: what is left over at an epoch's end goes into the first step of the next."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(rows_of(TOKENS))


def rows_of(data: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: value[k] for name, value in data.items()} for k in range(ROWS)]


@dataclass(frozen=True)
class Kind:
    id: str
    model: Callable[[], nn.Module] = FAMILIES[0].make
    data: Mapping[str, Tensor] = field(default_factory=lambda: TOKENS)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the Trainer."""
    callback: Mapping[str, Any] = field(default_factory=dict)
    trainer: type[Any] = transformers.Trainer
    slow: bool = False


ACCUMULATED = {"gradient_accumulation_steps": 3}
EVALUATED = {
    "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
    "load_best_model_at_end": True, "metric_for_best_model": "a_loss",
}  # fmt: skip
KINDS = [
    Kind("clipped, accumulated, short last batch", arguments={**ACCUMULATED, "max_grad_norm": 0.01}),
    Kind("not clipped, last batch dropped", arguments={"max_grad_norm": 0.0, "dataloader_drop_last": True}, slow=True),
    Kind(
        "compute_loss_func by items", arguments=ACCUMULATED,
        options={"compute_loss_func": lambda out, y, num_items_in_batch: by_token(out, y).sum() / num_items_in_batch},
    ),
    Kind(
        "compute_loss_func by batch", arguments=ACCUMULATED,
        options={
            "compute_loss_func": lambda out, y, num_items_in_batch: by_token(out, y).sum() / (y[:, 1:] >= 0).sum()
        }, slow=True,
    ),
    Kind("sample_loss by mean", arguments=ACCUMULATED, callback={"sample_loss": mean_of_tokens}),
    Kind(
        "weights by hand", arguments=ACCUMULATED,
        callback={"weight": lambda batch: 1.0 / float(batch["num_items_in_batch"])}, slow=True,
    ),
    Kind("partly frozen", partly_frozen),
    Kind(
        "evaluated, saved, best at the end", arguments=EVALUATED,
        options={"eval_dataset": {"a": rows_of(TOKENS)[:2], "b": rows_of(TOKENS)[2:]}}
    ),
    Kind("streamed", arguments={**ACCUMULATED, "max_steps": 4}, options={"train_dataset": Streamed()}),
    Kind("noise on embeddings", arguments={"neftune_noise_alpha": 5.0}),
    Kind("schedule", arguments={"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1}, slow=True),
    Kind("fused optimizer", arguments={"optim": "adamw_torch_fused"}, slow=True),
    Kind("workers", arguments={"dataloader_num_workers": 1}, slow=True),
    Kind("classes", lambda: classifier(num_labels=3), CLASSES, ACCUMULATED),
    Kind("classes, smoothed", lambda: classifier(num_labels=3), CLASSES,
         {**ACCUMULATED, "label_smoothing_factor": 0.1}, slow=True),
    Kind("two passes", lambda: classifier(num_labels=3), CLASSES, ACCUMULATED, trainer=TwoPasses,
         callback={"sample_loss": two_passes}),
    Kind("regression", lambda: classifier(num_labels=1), {**TEXT, "labels": torch.arange(ROWS) / 7}, slow=True),
    Kind("several classes at once", lambda: classifier(num_labels=3),
         {**TEXT, "labels": (torch.arange(3 * ROWS) % 2.0).reshape(ROWS, 3)}, slow=True),
    Kind("classes of tokens", lambda: classifier("BertForTokenClassification", num_labels=3),
         {**TEXT, "labels": torch.where(TOKENS["labels"] < 0, -100, TOKENS["labels"] % 3)}, ACCUMULATED, slow=True),
    Kind("question answering", lambda: classifier("BertForQuestionAnswering"),
         {**TEXT, "start_positions": torch.arange(ROWS) % 6, "end_positions": torch.arange(ROWS) // 2}, ACCUMULATED),
    Kind("encoder-decoder", seq2seq, TOKENS, ACCUMULATED, slow=True),
]  # fmt: skip


def train(kind: Kind, out: Path, *callbacks: Any) -> nn.Module:
    torch.manual_seed(0)
    model = kind.model().double()
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(out), "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
            "learning_rate": 0.01, "num_train_epochs": 2, "per_device_train_batch_size": 2, **kind.arguments,
        }
    )  # fmt: skip
    options = {"train_dataset": rows_of(kind.data), **kind.options}
    kind.trainer(model, arguments, callbacks=list(callbacks), **options).train()
    return model.train()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=kind.id, marks=[pytest.mark.slow] * kind.slow) for kind in KINDS]
)
def test_a_trainer_is_explained_and_not_changed(kind: Kind, tmp_path: Path) -> None:
    from explaind_track.callbacks.transformers import TrackerCallback, sample_losses

    inputs = {name: kind.data[name][:2] for name in TEXT}
    if kind.model is seq2seq:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    query = Query.function(inputs, lambda output: output[0].flatten(1)[:, :2])
    options = {"sample_loss": sample_losses, "index": lambda batch: batch["input_ids"][:, 0] - 1, **kind.callback}
    callback = TrackerCallback(queries={"test": query}, groups=3, trajectory=tmp_path / "t", **options)
    model = train(kind, tmp_path / "a", callback)

    alone = train(kind, tmp_path / "b")
    for name, value in alone.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    trajectory = Trajectory.open(tmp_path / "t")
    assert callback.tracker.number == len(trajectory) > 2
    if "neftune_noise_alpha" in kind.arguments:  # the noise is gone with the training
        return

    loss = options["sample_loss"]
    if loss is sample_losses:

        def loss(model: nn.Module, batch: Any) -> Tensor:
            return sample_losses(model, batch, label_smoothing=kind.arguments.get("label_smoothing_factor", 0.0))

    found = explain(
        trajectory, model, query, groups=3, keep=("group", "query", "sample"), sample_loss=loss, progress=False,
        data=lambda index: {name: value[index] for name, value in kind.data.items()},
    )  # fmt: skip
    assert float(found.data["mismatch"].max()) < 1e-5


def test_a_record_goes_on_where_the_checkpoint_does(tmp_path: Path) -> None:
    from explaind_track.callbacks.transformers import TrackerCallback, sample_losses

    query = Query.function({name: value[:2] for name, value in TEXT.items()}, lambda output: output.logits[:, 2, :2])

    def callback(directory: str, **options: Any) -> Any:
        return TrackerCallback(
            queries={"test": query}, sample_loss=sample_losses, trajectory=tmp_path / directory, **options
        )

    kind = Kind("saved", arguments={"save_strategy": "steps", "save_steps": 3, "max_steps": 5})
    train(kind, tmp_path / "out", callback("t"))
    whole = callback("whole")
    expected = train(Kind("whole", arguments={"max_steps": 5}), tmp_path / "other", whole)

    torch.manual_seed(1)
    model = kind.model().double()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=0.01,
        max_steps=5, per_device_train_batch_size=2, save_strategy="no",
    )  # fmt: skip
    resumed = callback("t", resume=True)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows_of(TOKENS), callbacks=[resumed])
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert len(Trajectory.open(tmp_path / "t")) == resumed.tracker.number == 5
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    one, other = (own.tracker.influence("test").data["influence"] for own in (resumed, whole))
    assert math.isclose(float(abs(one - other).max()), 0.0)


def test_samples_of_another_loop_are_refused() -> None:
    """Whose batches the callback does not see."""
    from explaind_track.callbacks.transformers import TrackerCallback, sample_losses

    model = FAMILIES[0].make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    query = Query.function({name: value[:2] for name, value in TEXT.items()}, lambda output: output.logits[:, 2, :2])
    arguments = transformers.TrainingArguments(use_cpu=True, report_to=[])
    state = transformers.TrainerState()
    around = {"model": model, "optimizer": optimizer}

    callback = TrackerCallback(queries={"test": query}, sample_loss=sample_losses)
    with pytest.raises(ValueError, match="use a Tracker in that loop"):
        callback.on_train_begin(arguments, state, transformers.TrainerControl(), **around)
    groups_only = TrackerCallback(queries={"test": query})
    groups_only.on_train_begin(arguments, state, transformers.TrainerControl(), **around)
    groups_only.tracker.finish()


def test_sample_losses_needs_labels() -> None:
    from explaind_track.callbacks.transformers import sample_losses

    model = FAMILIES[0].make()
    with pytest.raises(ValueError, match="labels by the name 'labels'; it has input_ids, attention_mask"):
        sample_losses(model, TEXT)
    with pytest.raises(ValueError, match="a label for each row of logits"):
        sample_losses(model, {**TEXT, "labels": torch.zeros(ROWS, dtype=torch.long)})
