"""Training with parameters in pieces, in real processes, and the same in one: what tests of it train and compare."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from explaind_track import Query, Tracker

WORDS, WIDTH, LENGTH = 11, 6, 5
STEPS = 4


class Block(nn.Module):
    def __init__(self, checkpointed: bool, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self.inner, x, use_reentrant=False)
        return self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Adapted(nn.Module):
    """A frozen layer, and a matrix of low rank beside it that learns."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a, self.b = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.b(self.a(x))


class Words(nn.Module):
    """A small language model of rows of ids; no dimension is a multiple of the processes."""

    def __init__(self, tied: bool = False, checkpointed: bool = False, adapted: bool = False, inner: int = 7) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(checkpointed, inner) for _ in range(2)])
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        if adapted:
            self.requires_grad_(False)
            for block in self.blocks:
                block.up = Adapted(block.up)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass(frozen=True)
class Case:
    """One way to train."""

    model: dict[str, Any]
    micro: int = 1
    """Micro-batches to a step."""
    clip: float | None = None
    rows: int = 7
    """Of the query."""
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda parameters: torch.optim.AdamW(
        parameters, lr=0.02, weight_decay=0.1
    )
    dtype: torch.dtype = torch.float64
    policy: dict[str, Any] | None = None
    """Of `fully_shard`'s mixed precision."""
    how: str = "fsdp"
    """Or "hsdp", "tp", "fsdp+tp"."""


CASES = {
    "plain": Case({}),
    "accumulated": Case({}, micro=2, clip=0.3),
    "tied": Case({"tied": True}, clip=0.3),
    "frozen": Case({"adapted": True}),
    "checkpointed": Case({"checkpointed": True}),
    "few_rows": Case({}, rows=1),
    "adam": Case({}, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02, weight_decay=0.1)),
    "sgd": Case({}, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)),
    "tp": Case({"inner": 8}, how="tp"),
    "hsdp": Case({}, how="hsdp"),
    "fsdp+tp": Case({"inner": 8}, how="fsdp+tp"),
    "bf16": Case({}, dtype=torch.float32, policy={"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}),
}


def make_model(case: Case) -> Words:
    torch.manual_seed(0)
    return Words(**case.model).to(case.dtype)


def ids_of(number: int, micro: int, rank: int, rows: int = 3) -> Tensor:
    """A micro-batch of one process."""
    generator = torch.Generator().manual_seed(1000 * number + 10 * micro + rank)
    return torch.randint(WORDS, (rows, LENGTH), generator=generator)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    scores = model(ids)[:, :-1].reshape(-1, WORDS)
    return F.cross_entropy(scores.float() if scores.dtype is torch.bfloat16 else scores, ids[:, 1:].reshape(-1))


def queries(case: Case) -> dict[str, Query]:
    return {
        "near": Query.tokens(ids_of(99, 0, 0, case.rows)).mean(),
        "far": Query.tokens(ids_of(98, 0, 0, case.rows + 2)).sum(),
    }


GROUPS = {"embedding": "embedding.*", "blocks": "blocks.*", "head": "head.*"}


def groups_of(case: Case) -> Any:
    return {name: rule for name, rule in GROUPS.items() if not (name == "head" and case.model.get("tied"))}


def shard(model: Words, case: Case, device: str = "cpu", **options: Any) -> None:
    """Cuts the model into pieces, as a user does. options: further ones of `fully_shard`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    count = dist.get_world_size()
    shape, names = {
        "fsdp": ((count,), ("shard",)),
        "tp": ((count,), ("tensor",)),
        "hsdp": ((2, count // 2), ("copy", "shard")),
        "fsdp+tp": ((count // 2, 2), ("shard", "tensor")),
    }[case.how]
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    if "tensor" in names:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        for block in model.blocks:
            parallelize_module(block, mesh["tensor"], plan)
    if "shard" in names:
        over = mesh if case.how in ("fsdp", "hsdp") else mesh["shard"]
        options |= {"mesh": over, "mp_policy": MixedPrecisionPolicy(**(case.policy or {}))}
        for block in model.blocks:
            fully_shard(block, **options)
        fully_shard(model, **options)


def places(case: Case, count: int) -> int:
    """How many processes are given batches of their own."""
    return {"fsdp": count, "hsdp": count, "tp": 1, "fsdp+tp": count // 2}[case.how]


def place(case: Case, rank: int) -> int:
    """Whose batches a process is given."""
    return {"fsdp": rank, "hsdp": rank, "tp": 0, "fsdp+tp": rank // 2}[case.how]


def train(
    model: Any,
    tracker: Tracker,
    optimizer: torch.optim.Optimizer,
    case: Case,
    own: list[int],
    upto: int,
    device: str = "cpu",
) -> None:
    """Trains on, with the micro-batches of these places: of one in each of several processes, or of all in one."""
    while tracker.number < upto:
        number = tracker.number
        with tracker.step():
            optimizer.zero_grad()
            for micro in range(case.micro):
                if hasattr(model, "set_requires_gradient_sync"):
                    model.set_requires_gradient_sync(micro == case.micro - 1)
                for one in own:
                    loss = loss_of(model, ids_of(number, micro, one, 3 + one % 2).to(device))
                    (loss / case.micro / len(own)).backward()
            if case.clip is not None:
                tracker.clip_grad_norm_(case.clip)
            optimizer.step()


def make_tracker(model: nn.Module, optimizer: torch.optim.Optimizer, case: Case, **options: Any) -> Tracker:
    return Tracker(model, optimizer, **{"queries": queries(case), "groups": groups_of(case), **options})
