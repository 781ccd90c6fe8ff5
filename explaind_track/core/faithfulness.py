"""Faithfulness: how well some outputs stand for a model's (Table 1)."""

from torch import Tensor


def faithfulness(model: Tensor, other: Tensor) -> dict[str, float]:
    """Compares `other`, outputs that stand for the model's, with the model's, in float64.

    Args:
        model: Logits or log-probabilities of the model, (X, O).
        other: The same of what stands for it, (X, O).

    Returns:
        `agreement`, the fraction of the X decisions that are the same, and `kl`, the mean KL(model ‖ other) in nats.
    """
    log_p = model.double().log_softmax(-1)
    log_q = other.double().log_softmax(-1)

    agreement = (log_q.argmax(-1) == log_p.argmax(-1)).double().mean()
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return {"agreement": float(agreement), "kl": float(divergence)}
