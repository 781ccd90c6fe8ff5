"""A small Llama, trained by the Trainer of transformers, whose checkpoints are kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from explaind_track.checkpoints.sequences import Sequences

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


def make_model(config: DictConfig, tokens: int) -> "LlamaForCausalLM":
    """The Llama of these settings, at random; embedding and output head are two parameters, as in EuroLLM.

    tokens: of its tokenizer.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    model = config.model
    settings = LlamaConfig(
        vocab_size=tokens,
        hidden_size=model.width,
        intermediate_size=model.hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=max(1, model.heads // 2),
        max_position_embeddings=config.length,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=False,
    )
    return LlamaForCausalLM(settings)


def train(
    config: DictConfig, sequences: Sequences, tokenizer: "PreTrainedTokenizerBase", seed: int, directory: Path
) -> None:
    """Trains, or goes on from the last checkpoint in `directory`; keeps the checkpoints of `config.checkpoints`.

    Args:
        config: The recipe's settings.
        sequences: What the batches are drawn from, in proportion to the mixture already.
        tokenizer: Saved with each checkpoint.
        seed: Of the model and of the data's order.
        directory: Where the Trainer keeps its checkpoints, `checkpoint-<step>`.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()  # of single files; the Trainer's own stays
    done = last_checkpoint(directory)
    if done is not None and done.name == f"checkpoint-{config.steps}":
        return

    transformers.set_seed(seed)
    trainer = transformers.Trainer(
        make_model(config, len(tokenizer)),
        trainer_arguments(config, seed, directory),
        train_dataset=Rows(sequences.input_ids),
        processing_class=tokenizer,
        callbacks=[keep_at((*config.checkpoints, config.steps))],
    )
    trainer.train(resume_from_checkpoint=None if done is None else str(done))


def last_checkpoint(directory: Path) -> Path | None:
    """The last of the Trainer's checkpoints that is whole: it writes trainer_state.json last."""
    whole = [path.parent for path in directory.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def trainer_arguments(config: DictConfig, seed: int, directory: Path) -> Any:
    """The Trainer's settings: AdamW, a constant rate after the warmup, clipped gradients."""
    from transformers import TrainingArguments

    optimizer = config.optimizer
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch,
        learning_rate=optimizer.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=optimizer.warmup,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.clip,
        seed=seed,
        use_cpu=config.device == "cpu",
        save_strategy="no",  # `keep_at` says when
        logging_steps=50,
        report_to=[],
        dataloader_pin_memory=False,
    )


def keep_at(steps: Sequence[int]) -> Any:
    """A callback that saves a checkpoint after each of these steps."""
    from transformers import TrainerCallback

    wanted = frozenset(steps)

    class KeepAt(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = state.global_step in wanted

    return KeepAt()


class Rows(torch.utils.data.Dataset[Mapping[str, Tensor]]):
    """Sequences as the Trainer takes them: every token is predicted from those before it."""

    def __init__(self, input_ids: Tensor) -> None:
        self._input_ids = input_ids

    def __len__(self) -> int:
        return len(self._input_ids)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        tokens = self._input_ids[index]
        return {"input_ids": tokens, "labels": tokens}
