"""Parameters in pieces, one for each process (`fully_shard`, tensor parallelism): what of each this process holds.

How an optimizer moves a number follows from that number, its gradient and its state alone. So every process explains
its own pieces, and what is summed over parameters is added up over the processes, pieces that several hold once.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track.core import distributed
from explaind_track.core.modules import parameters_of
from explaind_track.core.tensors import Tensors


def known(module: str, name: str) -> tuple[type, ...]:
    """A module's class, for isinstance; none where nobody has imported the module, which would take half a second."""
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()


def is_piece(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which this process holds a piece."""
    return isinstance(tensor, known("torch.distributed.tensor", "DTensor"))


def in_pieces(model: nn.Module) -> bool:
    """Whether any of the model's parameters is in pieces."""
    return any(map(is_piece, model.parameters()))


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory: its piece, or the tensor itself where it is whole."""
    if not is_piece(tensor):
        return tensor
    with torch.no_grad():
        piece: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return piece.wait() if hasattr(piece, "wait") else piece  # of a collective that goes on


def local_gradient(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter's gradient, cut as the parameter is; the parameter has one."""
    assert parameter.grad is not None  # as said
    return local_like(parameter.grad, parameter)


def local_like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """What this process holds of a gradient, cut as the parameter is."""
    if is_piece(gradient):
        found: Any = gradient
        cut: Any = parameter
        if found.placements != cut.placements:  # as tensor parallelism leaves sums that are not added up yet
            gradient = found.redistribute(cut.device_mesh, cut.placements)
    return local(gradient).detach()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor; every process that holds a piece has to ask for it."""
    found: Tensor = tensor.full_tensor() if is_piece(tensor) else tensor  # type: ignore[attr-defined]
    return found


class Pieces(Mapping[str, Tensor]):
    """What this process holds of the parameters, by name, as they are when it is asked for."""

    def __init__(self, parameters: Tensors) -> None:
        self._parameters = parameters

    def __getitem__(self, name: str) -> Tensor:
        return local(self._parameters[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


@dataclass(frozen=True)
class Shards:
    """How the processes share out the parameters in pieces, and a query's rows."""

    counted: frozenset[str]
    """The parameters whose piece is counted here: of pieces that several processes hold, the first one's."""
    place: int
    """Which rows are this process's: those of a place among `places`, as in data parallelism."""
    places: int
    counts_rows: bool
    """Whether what these rows say is counted here: of processes of the same place, by the first."""
    divisor: float
    """What the sum of the processes' gradients is divided by."""
    computed_in: frozenset[torch.dtype]
    """The types that mixed precision computes in."""
    device: torch.device
    """Where the model computes; with CPU offload, its parameters lie elsewhere."""

    @classmethod
    def of(cls, model: nn.Module) -> "Shards | None":
        """Those of a model; None where its parameters are whole.

        Raises ValueError where the processes do not hold the same model, all pieces of it, with all gradients summed.
        """
        if not in_pieces(model):
            return None

        parameters = parameters_of(model)
        groups = _groups_of(model)
        place, places, divisor = _data_parallel(groups)
        _refuse_unshared(parameters, bool(places))
        every = distributed.gather(({name: _place_of(value) for name, value in parameters.items()}, place))
        _refuse_missing([pieces for pieces, _ in every], parameters)

        # the first of those that hold the same
        rank = distributed.rank()
        earlier = every[:rank]
        own, _ = every[rank]
        counted = {name for name, piece in own.items() if all(other[name] != piece for other, _ in earlier)}
        counts_rows = all(other != place for _, other in earlier)

        types = {group.mp_policy.param_dtype for group in groups} - {None}
        device = groups[0].device if groups else next(model.parameters()).device
        return cls(frozenset(counted), place, max(1, places), counts_rows, divisor, frozenset(types), device)

    def rows(self, size: int, most: int) -> list[tuple[int, int]]:
        """The rows, start and stop, of each pass that this process runs of `size` rows, at most so many at a time.

        Every process runs as many passes; one without rows left has (0, 0) there.
        """
        share = -(-size // self.places)
        start = min(size, self.place * share)
        stop = min(size, start + share)
        cuts = [(low, min(stop, low + most)) for low in range(start, start + share, most)]
        return [(low, high) if low < high else (0, 0) for low, high in cuts]


def _place_of(parameter: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where this process's piece begins in the parameter, and its size."""
    if not is_piece(parameter):
        return (0,) * parameter.ndim, tuple(parameter.shape)
    (chunk,) = parameter.__create_chunk_list__()  # type: ignore[attr-defined]  # the protocol of distributed checkpoints
    return tuple(chunk.offsets), tuple(chunk.sizes)


def _refuse_unshared(parameters: Tensors, is_data_parallel: bool) -> None:
    """Raises ValueError for parameters of which every process has a gradient of its own."""
    alone = [name for name, value in parameters.items() if value.requires_grad and not is_piece(value)]
    if alone and is_data_parallel:
        raise ValueError(
            f"{', '.join(alone[:5])} learn, but are left out of fully_shard, so that nobody adds their gradients up "
            "over the processes: call fully_shard(model) on the whole model too, without them in ignored_params, or "
            "freeze them"
        )


def _refuse_missing(every: list[dict[str, Any]], parameters: Tensors) -> None:
    """Raises ValueError unless the processes hold the same parameters, and together all of each."""
    names = [sorted(pieces) for pieces in every]
    if any(other != names[0] for other in names):
        raise ValueError(
            "the processes hold different parameters, as in pipeline parallelism, where no process can run the queries "
            "through the whole model: shard by fully_shard or tensor parallelism alone"
        )
    for name, parameter in parameters.items():
        pieces = {pieces[name] for pieces in every}
        held = sum(torch.Size(size).numel() for _, size in pieces)
        if held != parameter.numel():
            raise ValueError(
                f"the processes hold {held} of the {parameter.numel()} numbers of '{name}' together: a Tracker has to "
                "be made in every process that holds a piece of the model, and all have to train the same one"
            )


def _data_parallel(groups: list[Any]) -> tuple[int, int, float]:
    """This process's place among those that `fully_shard` gives different batches, how many these are (0: none), and
    what it divides the sum of their gradients by. Raises ValueError where its modules differ in that."""
    found = {_mesh_of(group) for group in groups}
    if len(found) > 1:
        raise ValueError(
            "modules are sharded over different processes, or divide their gradients by different factors "
            "(set_gradient_divide_factor): one number for all of them is needed"
        )
    return found.pop() if found else (0, 0, 1.0)


def _groups_of(model: nn.Module) -> list[Any]:
    """What `fully_shard` keeps of the parameters of each of its modules; it has no public name."""
    sharded = known("torch.distributed.fsdp", "FSDPModule")
    modules: list[Any] = [module for module in model.modules() if isinstance(module, sharded)]
    found: list[Any] = []
    for state in (module._get_fsdp_state() for module in modules):
        groups = getattr(state, "_fsdp_param_groups", None)
        found += [state._fsdp_param_group] if groups is None else groups
    return [group for group in found if group is not None]


def _mesh_of(group: Any) -> tuple[int, int, float]:
    mesh = group.mesh_info
    place, places = mesh.shard_mesh_rank, mesh.shard_mesh_size
    if hasattr(mesh, "replicate_mesh_size"):
        place, places = mesh.replicate_mesh_rank * places + place, mesh.replicate_mesh_size * places
    return place, places, float(group.gradient_divide_factor or places)


def reshard(model: nn.Module) -> None:
    """Lets the model have its parameters in pieces where a forward pass has put them together."""
    sharded = known("torch.distributed.fsdp", "FSDPModule")
    modules: list[Any] = [module for module in model.modules() if isinstance(module, sharded)]
    for module in modules:
        module.reshard()
