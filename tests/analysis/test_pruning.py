"""Masks from scores, their application without a copy, and what they cost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from explaind_track.analysis.pruning import evaluate_pruning, prune_masks, pruned, sparsity


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))


def scores_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.randn_like(value) for name, value in model.named_parameters()}


@given(keep=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_largest_scores_are_kept(keep: float, seed: int) -> None:
    torch.manual_seed(seed)
    scores = {"a": torch.randint(5, (4, 3)).float(), "b": torch.randn(7), "head": torch.randn(2, 2)}
    masks = prune_masks(scores, keep, exclude=["head"])
    assert masks.keys() == {"a", "b"}

    kept = torch.cat([scores[name][mask] for name, mask in masks.items()])
    gone = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    assert abs(len(kept) - keep * 19) <= 0.5
    if len(kept) and len(gone):
        assert kept.min() >= gone.max()
    assert sparsity(masks) == pytest.approx(len(gone) / 19)

    by_layer = prune_masks(scores, keep, by="layer")
    for name, mask in by_layer.items():
        assert abs(int(mask.sum()) - keep * mask.numel()) <= 0.5
        if 0 < int(mask.sum()) < mask.numel():
            assert scores[name][mask].min() >= scores[name][~mask].max()


@pytest.mark.parametrize("by", ["global", "layer"])
def test_filters_go_as_a_whole(by: str) -> None:
    model = network()
    scores = scores_of(model)
    masks = prune_masks(scores, 0.5, by=by, exclude=["5.*"], unit="filter")  # type: ignore[arg-type]
    units = 0
    for layer in ("0", "3"):
        weight, bias = masks[f"{layer}.weight"], masks[f"{layer}.bias"]
        assert all(row.all() or not row.any() for row in weight.flatten(1))
        assert torch.equal(weight.flatten(1)[:, 0], bias)
        units += int(bias.sum())
        own = scores[f"{layer}.weight"].flatten(1).sum(1) + scores[f"{layer}.bias"]
        if 0 < int(bias.sum()) < len(bias):
            assert own[bias].min() >= own[~bias].max()
    assert units == 5
    with pruned(model, masks):
        output = model[0](torch.randn(2, 1, 4, 4))
        assert not output[:, ~masks["0.bias"]].any()


def test_pruning_leaves_no_trace_even_after_an_error() -> None:
    model, x = network(), torch.randn(5, 1, 4, 4)
    before = {name: (value.data_ptr(), value.detach().clone()) for name, value in model.named_parameters()}
    masks = prune_masks({name: value.detach().abs() for name, value in model.named_parameters()}, 0.3)
    with pytest.raises(RuntimeError, match="inside"), pruned(model, masks):
        for name, value in model.named_parameters():
            assert value.data_ptr() == before[name][0]
            assert torch.equal(value, before[name][1] * masks[name])
        raise RuntimeError("inside")
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name][1])
    assert model(x).shape == (5, 3)


def test_evaluation_compares_with_the_whole_model() -> None:
    model, x, y = network(), torch.randn(50, 1, 4, 4), torch.randint(0, 3, (50,))
    model.train()
    scores = {name: value.detach().abs() for name, value in model.named_parameters()}
    whole = evaluate_pruning(model, prune_masks(scores, 1.0), x, y)
    assert whole == {"accuracy": whole["accuracy"], "agreement": 1.0, "kl": 0.0, "sparsity": 0.0}

    masks = prune_masks(scores, 0.2)
    found = evaluate_pruning(model, masks, x, y)
    assert model.training

    chances = model(x).detach().double().softmax(1)
    with pruned(model, masks), torch.no_grad():
        logits = model(x).double()
    expected = nn.functional.kl_div(logits.log_softmax(1), chances, reduction="batchmean")
    assert found["kl"] == pytest.approx(float(expected))
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == y).double().mean()))
    assert found["agreement"] == pytest.approx(float((logits.argmax(1) == chances.argmax(1)).double().mean()))
    assert found["kl"] > 0

    nothing = evaluate_pruning(model, prune_masks(scores, 0.0), x, y)
    assert nothing["kl"] > found["kl"]


def test_errors_say_what_to_do() -> None:
    model = network()
    scores = scores_of(model)
    with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.5"):
        prune_masks(scores, 1.5)
    with pytest.raises(ValueError, match=r"\['head'\] matches no parameter; there are 0.weight"):
        prune_masks(scores, 0.5, exclude=["head"])
    with pytest.raises(ValueError, match="leaves nothing"):
        prune_masks(scores, 0.5, exclude=["*"])
    with pytest.raises(ValueError, match=r"0\.weight.*not finite"):
        prune_masks({**scores, "0.weight": torch.full((4, 1, 3, 3), float("nan"))}, 0.5)
    with pytest.raises(ValueError, match="by= is one of 'global', 'layer', not 'layers'"):
        prune_masks(scores, 0.5, by="layers")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unit= is one of 'parameter', 'filter', not 'filters'"):
        prune_masks(scores, 0.5, unit="filters")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="first axis"):
        prune_masks({"scale": torch.tensor(1.0)}, 0.5, unit="filter")
    with (
        pytest.raises(ValueError, match=r"0\.weight: mask \(2,\), parameter \(4, 1, 3, 3\)"),
        pruned(model, {"0.weight": torch.ones(2, dtype=torch.bool)}),
    ):
        pass
