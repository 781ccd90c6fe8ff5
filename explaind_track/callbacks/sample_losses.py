"""A `sample_loss` for the models of transformers, in any loop: what their own losses are made of, sample by sample."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track.core.tokens import IGNORED, logits_of


def sample_losses(model: nn.Module, batch: Mapping[str, Tensor], *, label_smoothing: float = 0.0) -> Tensor:
    """The losses of the batch's samples by its labels, (N,), as the models of transformers and their Trainer have them.

    Where there is a label for each token (causal and masked language models, token classification), a sample's loss is
    the sum over its tokens: in a loss that is the mean over a step's tokens, each sample weighs as much as any other,
    1 / the number of tokens. Otherwise it is the loss of its label (classification, multiple choice), the mean over its
    labels (regression, several labels at once), or that over its start and end (question answering).

    Args:
        model: One of transformers, or a PEFT model around one.
        batch: Its keyword arguments and labels; what the model does not take is left out.
        label_smoothing: As `TrainingArguments(label_smoothing_factor=…)`. The callback for the Trainer passes it; in
            other loops, pass `functools.partial(sample_losses, label_smoothing=0.1)`.

    Raises:
        ValueError: For a batch without labels, or labels that do not fit the model's output.

    Example:
        >>> import torch, transformers
        >>> from explaind_track.callbacks.sample_losses import sample_losses
        >>> config = transformers.GPT2Config(vocab_size=7, n_embd=4, n_layer=1, n_head=1, n_positions=8)
        >>> model = transformers.GPT2LMHeadModel(config).eval()
        >>> tokens = torch.arange(12).reshape(2, 6) % 7
        >>> losses = sample_losses(model, {"input_ids": tokens, "labels": tokens})
        >>> torch.allclose(losses.sum() / 10, model(tokens, labels=tokens).loss)  # two samples of five next tokens
        True
    """
    base = _without_adapters(model)
    output = model(**_inputs(base, batch))
    if "start_positions" in batch:
        return _ends(output, batch)

    labels = batch.get("labels", batch.get("label"))
    if labels is None:
        raise ValueError(f"sample_losses needs the batch's labels by the name 'labels'; it has {', '.join(batch)}")
    logits = logits_of(output)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if _predicts_next_token(base) and labels.ndim == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]

    problem = _problem(base, logits, labels)
    if problem == "regression":
        return _mean_by_sample((logits.reshape(labels.shape) - labels).square())
    if problem == "multi_label_classification":
        return _mean_by_sample(F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none"))
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"sample_losses expects a label for each row of logits {tuple(logits.shape)}, (N,) or (N, tokens), not "
            f"{tuple(labels.shape)}: write a sample_loss for this model"
        )
    losses = F.cross_entropy(
        logits.movedim(-1, 1), labels, ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing
    )
    return losses.reshape(len(losses), -1).sum(1)


def _without_adapters(model: Any) -> Any:
    """The model of transformers, whose forward pass and loss a PEFT model runs."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _inputs(base: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model takes of the batch; of labels, only an encoder-decoder makes its inputs."""
    taken = set(inspect.signature(base.forward).parameters)
    if not _is_encoder_decoder(base) or "decoder_input_ids" in batch:
        taken -= {"labels", "label", "start_positions", "end_positions"}
    return {name: value for name, value in batch.items() if name in taken}


def _predicts_next_token(base: Any) -> bool:
    """Whether its logits at a token are scores of the next one, as the Trainer tells."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    by_loss = LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss
    return (named or by_loss) and not _is_encoder_decoder(base)


def _is_encoder_decoder(base: Any) -> bool:
    return bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))


def _problem(base: Any, logits: Tensor, labels: Tensor) -> str:
    """The kind of loss of a model that classifies sequences, by its configuration or, as it does, by its labels."""
    if "SequenceClassification" not in type(base).__name__:
        return "single_label_classification"
    given: str | None = base.config.problem_type
    if given is not None:
        return given
    if logits.shape[-1] == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def _mean_by_sample(losses: Tensor) -> Tensor:
    return losses.reshape(len(losses), -1).mean(1)


def _ends(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Question answering: the mean of the losses of start and end; positions behind the input are none."""
    both = []
    for name in ("start", "end"):
        logits, position = output[f"{name}_logits"], batch[f"{name}_positions"]
        length = logits.shape[1]
        both.append(F.cross_entropy(logits, position.clamp(0, length), ignore_index=length, reduction="none"))
    return (both[0] + both[1]) / 2
