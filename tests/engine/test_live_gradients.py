"""A query's gradient, parameter by parameter: of chunks, at a state and of the model as it stands."""

from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track import Query, State
from explaind_track.engine.functional import Functional, evaluation
from explaind_track.engine.live_gradients import gradient_at, gradient_in_place


class Routed(nn.Module):
    """The second expert is used where a row's first number is positive; the third never is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(3, 2).double() for _ in range(3))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 0
        out = self.dropout(self.first(x))
        return out.index_add(0, chosen.nonzero()[:, 0], self.second(x[chosen])) if chosen.any() else out


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("size", [2, 7])
def test_chunks_add_up_to_the_gradient_and_training_keeps_its_own(in_place: bool, size: int) -> None:
    model, x = Routed(), torch.arange(21, dtype=torch.float64).reshape(7, 3) - 6.5
    query = Query.loss(x, torch.tensor([0, 1, 1, 0, 1, 0, 0])).mean()
    parameters = dict(model.named_parameters())
    mine = torch.ones_like(model.first.weight)
    model.first.weight.grad = mine

    with evaluation(model):
        loss = F.cross_entropy(model(x), query.labels[0])
    plain = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    expected = {name: value for name, value in zip(parameters, plain, strict=True) if value is not None}
    model.second.bias.register_hook(lambda gradient: gradient * 0)  # training's own

    found: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    last = []

    def take(name: str, gradient: Tensor, is_last: bool) -> None:
        found[name] = found[name] + gradient
        last.append((name, is_last))

    chunks = [query.rows(start, start + size, torch.device("cpu")) for start in range(0, 7, size)]
    with evaluation(model):
        if in_place:
            value = gradient_in_place(model, query, parameters, chunks, take)
        else:
            state = State({name: p.detach() for name, p in parameters.items()}, {})
            value = gradient_at(Functional(model), query, state, list(parameters), chunks, take)

    assert abs(float(value) - float(loss.detach())) < 1e-14
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        wrong = name == "second.bias" and in_place  # the hook of training's own acts there
        assert torch.allclose(found[name], gradient * (0 if wrong else 1), atol=1e-14), name
    assert ("first.weight", True) in last
    assert (("first.weight", False) in last) == (size == 2)
    assert model.first.weight.grad is mine
    assert all(p.grad is None for name, p in parameters.items() if name != "first.weight")
    assert model.training


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_pass_gives_training_its_gradients_back(error: type[BaseException]) -> None:
    model, x = Routed(), torch.ones(4, 3, dtype=torch.float64)
    query = Query.function(x, lambda output: output.sum(1)).sum()
    mine = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = mine[name]

    def take(name: str, gradient: Tensor, is_last: bool) -> None:
        raise error

    with pytest.raises(error), evaluation(model):
        gradient_in_place(model, query, dict(model.named_parameters()), [query], take)
    assert all(p.grad is mine[name] for name, p in model.named_parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
