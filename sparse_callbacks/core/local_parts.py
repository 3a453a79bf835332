"""This process's parts of parameters that torch shards, as ordinary tensors over the same memory."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_callbacks.core.shards import WHOLE, Shards, layout_of, lie_as


class LocalPart(nn.Parameter):
    """This process's part of a sharded parameter: its values and its gradient are those of the parameter.

    Methods and masks see these, optimizers and the model know the whole parameter, whose memory they share.
    """

    whole: Any
    """The sharded parameter, a ``DTensor``."""

    def __new__(cls, whole: Any) -> "LocalPart":
        made: LocalPart = super().__new__(cls, local(whole), whole.requires_grad)
        made.whole = whole
        lie_as(made, layout_for(whole))
        return made

    def __init__(self, whole: Any) -> None:
        pass

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        # an ordinary tensor: a sharded parameter has one process group with all others, and is copied with its model alone
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(), self.requires_grad)
            lie_as(memo[id(self)], layout_of(self))
        copied: nn.Parameter = memo[id(self)]
        return copied

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        return None if self.whole.grad is None else local(self.whole.grad)

    @property
    def _version(self) -> int:  # type: ignore[override]
        # what torch writes through the sharded parameter is counted there alone
        version: int = self.whole._version
        return version

    def follow(self) -> None:
        """Share the memory of the parameter where that was moved, as its first forward pass may do."""
        now = local(self.whole)
        if now.data_ptr() != self.data_ptr():
            self.data = now


class MeshProcesses:
    """The processes of a one-dimensional mesh of torch's.

    Args:
        mesh: the ``DeviceMesh``.
    """

    def __init__(self, mesh: Any) -> None:
        self.rank: int = mesh.get_local_rank()
        self.size: int = mesh.size()
        self._group, self._device = mesh.get_group(), mesh.device_type

    def sum(self, numbers: Tensor) -> Tensor:
        """See :meth:`~sparse_callbacks.core.shards.Processes.sum`."""
        summed = numbers.to(self._device, copy=True).contiguous()
        dist.all_reduce(summed, group=self._group)
        return summed.cpu()

    def collect(self, part: Tensor) -> list[Tensor]:
        """See :meth:`~sparse_callbacks.core.shards.Processes.collect`."""
        part = part.contiguous()
        found = [torch.empty_like(part) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(part, found, dst=dist.get_global_rank(self._group, 0), group=self._group)
        return found or []


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is one of torch's ``DTensor``."""
    # by its attributes: the class is in a module that takes long to import, and that not every build of torch has
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def why_not_in_parts(parameter: Any) -> str:
    """Why the parts of a sharded parameter are not slices along one dimension; empty where they are."""
    mesh, placements = parameter.device_mesh, parameter.placements
    if mesh.ndim != 1:
        return f"it lies over a mesh of {mesh.ndim} dimensions"
    if type(placements[0]).__name__ != "Shard":
        return f"it is placed as {placements[0]}"
    layout = layout_for(parameter)
    if local(parameter).shape[layout.dim] != layout.length:
        return f"its slices are not those of torch.chunk ({list(local(parameter).shape)} of {list(parameter.shape)})"
    return ""


def layout_for(parameter: Any) -> Shards:
    """The layout of a parameter that is cut along one dimension."""
    mesh, dim = parameter.device_mesh, parameter.placements[0].dim % parameter.ndim
    size = parameter.shape[dim]
    longest = -(-size // mesh.size())
    offset = min(mesh.get_local_rank() * longest, size)
    return Shards(parameter.shape, dim, offset, min(longest, size - offset), MeshProcesses(mesh))


@torch.no_grad()  # with gradients torch would give another view each time
def local(tensor: Any) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is."""
    found: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return found


def local_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """This process's part of a parameter, which is the parameter itself where it is not sharded."""
    return LocalPart(parameter) if is_sharded(parameter) else parameter


def whole_of(parameter: Any) -> Any:
    """The parameter that an optimizer knows: of this process's part the whole one."""
    return parameter.whole if isinstance(parameter, LocalPart) else parameter


def follow(params: Iterable[Tensor]) -> None:
    """Let parts share the memory of their parameters where that was moved."""
    for part in params:
        if isinstance(part, LocalPart):
            part.follow()


def laid_out(tensor: Tensor, parameter: Any) -> Tensor:
    """A tensor of the whole shape of ``parameter``, as it lies: where that is sharded, this process's part of it."""
    if not is_sharded(parameter):
        return tensor.to(parameter.device)
    mine = layout_for(parameter).part(tensor).to(local(parameter).device, copy=True).contiguous()
    made: Tensor = type(parameter).from_local(
        mine,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return made


def whole_tensors(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copies of tensors, of sharded ones as a whole and on the first of their processes alone; one after the other."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layout = layout_for(tensor) if is_sharded(tensor) else WHOLE
        if (whole := layout.collected(local(tensor))) is not None:
            found[name] = whole
    return found
