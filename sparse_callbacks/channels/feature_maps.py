"""Feature maps as layers read them, recorded while a network runs."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sparse_callbacks.channels.attention_exchange import put_back_attention, put_slim_attention
from sparse_callbacks.channels.groups import Member

T = TypeVar("T")

# for each function that multiplies inputs with weights: where its input and its weight are, and spatial dimensions
_READERS: Mapping[Any, tuple[int, int, int]] = {
    functional.linear: (0, 1, 0),
    torch.matmul: (0, 1, 0),
    torch.Tensor.matmul: (0, 1, 0),
    torch.Tensor.__matmul__: (0, 1, 0),
    torch.mm: (0, 1, 0),
    torch.addmm: (1, 2, 0),
    functional.conv1d: (0, 1, 1),
    functional.conv2d: (0, 1, 2),
    functional.conv3d: (0, 1, 3),
    functional.conv_transpose1d: (0, 1, 1),
    functional.conv_transpose2d: (0, 1, 2),
    functional.conv_transpose3d: (0, 1, 3),
}


@dataclass(frozen=True)
class FeatureMap:
    """What a layer has read in one call.

    Attributes:
        parameter: name of the layer's weight.
        values: the layer's input, at a node of its own in autograd's graph: a derivative by it is that by this input of
            this layer alone, also where others read the same tensor.
        spatial: the number of dimensions behind that of the channels.
    """

    parameter: str
    values: Tensor
    spatial: int

    @property
    def axis(self) -> int:
        """The dimension of the channels, from the end."""
        return -1 - self.spatial


class FeatureMaps(TorchFunctionMode):
    """Records the inputs of layers in forward passes that run within it.

    A layer is known by its weight: whoever multiplies with it, a module or a function, reads the map. Attention of torch's
    runs as a :class:`~sparse_callbacks.channels.slim_attention.SlimAttention` meanwhile, whose products can be seen.

    Args:
        model: the model that runs.
        parameters: names of the weights of the layers.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[str]) -> None:
        super().__init__()
        self._model = model
        self._names = {id(model.get_parameter(name)): name for name in parameters}
        self._found: list[FeatureMap] = []

    def take(self) -> list[FeatureMap]:
        """The maps that were read since the last call, which are forgotten."""
        found, self._found = self._found, []
        return found

    def __enter__(self) -> "FeatureMaps":
        put_slim_attention(self._model)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        put_back_attention(self._model)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _READERS:
            return func(*args, **kwargs)
        at, weight_at, spatial = _READERS[func]
        weight = args[weight_at] if len(args) > weight_at else kwargs.get("weight")
        name = self._names.get(id(weight))
        if name is None or len(args) <= at:
            return func(*args, **kwargs)
        x = args[at]
        # a node of its own; where nothing before it learns (a frozen beginning of the network), the graph starts here
        own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_(torch.is_grad_enabled())
        self._found.append(FeatureMap(name, own, spatial))
        return func(*args[:at], own, *args[at + 1 :], **kwargs)


def maps_read(model: nn.Module, parameters: Iterable[str], losses: Iterable[T]) -> Iterator[tuple[T, list[FeatureMap]]]:
    """Each of ``losses``, which are computed when they are asked for, with the maps that layers have read for it.

    Args:
        model: the model that computes them.
        parameters: names of the weights of the layers.
        losses: the losses of batches.
    """
    maps, iterator = FeatureMaps(model, parameters), iter(losses)
    while True:
        with maps:
            try:
                found = next(iterator)
            except StopIteration:
                return
        yield found, maps.take()


def unit_sums(products: Tensor, spatial: int, member: Member, size: int, samples: int | None) -> tuple[Tensor, int]:
    """Sums over positions and slices of each unit, [samples, size], and how many entries there are in each of them.

    The dimension of the samples is the first, or else the first one of the length ``samples``. Where the first is a
    multiple of it, as of the windows of an image, what belongs to one sample is taken to be neighbours.

    Args:
        products: a tensor of the shape of a :class:`FeatureMap`'s values.
        spatial: see there.
        member: the consumer that has read it.
        size: the number of units of the group.
        samples: samples of the batch; None where they are not known.

    Raises:
        ValueError: the channels are not those of the consumer's slices.
    """
    x = products if products.ndim > 1 + spatial else products.unsqueeze(0)
    x = x.movedim(-1 - spatial, -1)
    if samples and x.shape[0] != samples and x.ndim > 2 and not spatial:
        x = x.movedim(next((d for d in range(1, x.ndim - 1) if x.shape[d] == samples), 0), 0)
    if samples and x.shape[0] % samples == 0:
        x = x.reshape(samples, -1, x.shape[-1])
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    # a grouped convolution has the slices of its weight in each of its groups
    groups, left = divmod(x.shape[2], len(member.units))
    if left:
        raise ValueError(
            f"{member.parameter} reads {x.shape[2]} channels, and its channels are known as {len(member.units)}. Leave its "
            "module out with exclude=, or give a criterion of weights, such as 'l1'."
        )
    units = member.units.to(x.device).repeat(groups)
    owned = units >= 0
    sums = x.new_zeros(len(x), size).index_add(1, units[owned], x.sum(1)[:, owned])
    return sums, x.shape[1] * int(owned.sum()) // size
