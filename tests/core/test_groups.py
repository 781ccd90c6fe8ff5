"""Every parameter is in exactly one group, and how the parameters are grouped changes no sum."""

from math import inf

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from cases import Case
from helpers import AXES, cases, check, fixed, run, wanted_influence
from hypothesis import Phase, given, settings
from torch import nn

from explaind_track import explain, resolve_groups
from explaind_track.engine import plan_choice

NAMES = ["embedding.weight", "blocks.0.first.weight", "blocks.0.first.bias", "blocks.1.first.weight", "scale"]


def test_by_depth() -> None:
    whole = {"embedding": ("embedding.weight",), "blocks": tuple(NAMES[1:4]), "scale": ("scale",)}
    assert resolve_groups(None, NAMES) == resolve_groups(1, NAMES) == whole
    assert list(resolve_groups(2, NAMES)) == ["embedding", "blocks.0", "blocks.1", "scale"]
    assert list(resolve_groups(9, NAMES)) == ["embedding", "blocks.0.first", "blocks.1.first", "scale"]
    with pytest.raises(ValueError, match="at least 1, not 0"):
        resolve_groups(0, NAMES)


DEFAULTS: dict[str, tuple[list[str], list[str]]] = {
    "several": (["conv1.weight", "layer1.0.conv.weight", "fc.weight"], ["conv1", "layer1", "fc"]),
    "one of the model's own": (["scale", "net.0.weight", "net.2.weight"], ["scale", "net.0", "net.2"]),
    "one layer": (["fc.weight", "fc.bias"], ["fc"]),
    "no module": (["weight", "bias"], ["weight", "bias"]),
    "an only child": (["layers.0.a.weight", "layers.1.a.weight"], ["layers.0", "layers.1"]),
    "a wrapper": (["net.0.weight", "net.2.weight"], ["0", "2"]),
    "wrappers in each other": (["module._orig_mod.model.a.w", "module._orig_mod.model.b.w"], ["a", "b"]),
    "a wrapper beside a head": (["model.embed.w", "model.layers.0.w", "lm_head.w"], ["embed", "layers", "lm_head"]),
    "a wrapper whose modules are called alike": (["model.head.w", "head.w"], ["model", "head"]),
    "a wrapper that is a layer": (["model.weight", "model.bias", "head.weight"], ["model", "head"]),
    "numbers beside a head": (["net.0.weight", "net.2.weight", "head.weight"], ["net.0", "net.2", "head"]),
    "in a Sequential": (["0.0.weight", "0.2.weight"], ["0.0", "0.2"]),
}


@pytest.mark.parametrize("names", DEFAULTS)
def test_the_default_shows_something(names: str, caplog: pytest.LogCaptureFixture) -> None:
    parameters, expected = DEFAULTS[names]
    with caplog.at_level("INFO", logger="explaind_track"):
        groups = resolve_groups(None, parameters)
    assert list(groups) == expected
    assert [name for members in groups.values() for name in members] == parameters
    assert caplog.messages == [f"groups= was not given: the groups are {', '.join(expected)}"]


def test_wrapped_and_compiled_models_have_the_groups_of_the_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.net = model

    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    for wrapped in (model, Wrapper(model), nn.DataParallel(model), torch.compile(model), Wrapper(torch.compile(model))):
        assert list(resolve_groups(None, wrapped)) == ["0", "2"]
    assert list(resolve_groups(1, Wrapper(model))) == ["net"]
    assert list(resolve_groups(2, Wrapper(model))) == ["net.0", "net.2"]


def test_by_patterns() -> None:
    groups = resolve_groups({"in": "embed*", "bias": ["*.bias"], "rest": ("*first.weight", "scale")}, NAMES)
    assert groups == {
        "in": ("embedding.weight",),
        "bias": ("blocks.0.first.bias",),
        "rest": ("blocks.0.first.weight", "blocks.1.first.weight", "scale"),
    }
    assert list(groups) == ["in", "bias", "rest"]


def test_parameters_in_no_group_are_named() -> None:
    with pytest.raises(ValueError, match=r"parameters in no group: blocks\.0\.first\.bias, scale\."):
        resolve_groups({"weights": "*.weight"}, NAMES)


def test_parameters_in_two_groups_are_named_with_both() -> None:
    with pytest.raises(ValueError, match=r"more than one group: embedding\.weight \(all, in\)"):
        resolve_groups({"all": "*", "in": "embedding.*"}, NAMES)


def test_groups_without_parameters_are_named_with_their_patterns() -> None:
    with pytest.raises(ValueError, match=r"groups without parameters: typo \(embeding\.\*\)"):
        resolve_groups({"all": "*", "typo": "embeding.*"}, NAMES)


@cases("adamw")
def test_groups_are_checked_before_any_work(case: Case) -> None:
    with pytest.raises(ValueError, match=r"second\.weight"):
        explain(iter([]), case.make(), case.query(), groups={"first": "first.*"})


@given(data=st.data(), memory=st.integers(1, 6_000), cost=st.sampled_from([0, 5, inf]))
@settings(max_examples=20, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
@cases("adamw-weighted", "sgd-dampening-decay-late", "target-loss", "target-mean-loss")
def test_any_partition_gives_the_same_sums(case: Case, data: st.DataObject, memory: int, cost: float) -> None:
    names = list(dict(case.make().named_parameters()))
    members = data.draw(st.lists(st.integers(0, 2), min_size=len(names), max_size=len(names)))
    groups = {
        f"group {g}": [name for name, member in zip(names, members, strict=True) if member == g]
        for g in sorted(set(members))
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_choice, "REVERSE_COST", cost)
        full, by_query = run(case, AXES, ("step", "query"), groups=groups, memory=memory, **fixed(1))
    wanted = wanted_influence(case.reference(1), groups)
    check(full.data["influence"], wanted)
    check(by_query.data["influence"], wanted.sum((2, 4)), np.abs(wanted).max())
