"""Exchanged layers of a model, and their masks, which are made when somebody asks for them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear, weight_name


def exchanged_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The exchanged layers of a model, by the name of their weight in ``named_parameters``."""
    return {weight_name(name): module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


class MasksOnDemand(Mapping[str, Tensor]):
    """Masks by parameter name; those of exchanged layers are made when they are asked for, one at a time.

    Args:
        names: names of all parameters, in order.
        held: masks that exist, by name.
        layers: exchanged layers by the name of their weight.
    """

    def __init__(self, names: Iterable[str], held: Mapping[str, Tensor], layers: Mapping[str, SparseLinear]) -> None:
        self._names, self._held, self._layers = list(names), held, layers

    def __getitem__(self, name: str) -> Tensor:
        return self._layers[name].mask if name in self._layers else self._held[name]

    def __contains__(self, name: object) -> bool:
        return name in self._layers or name in self._held

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Tensor]:
        return {name: mask.clone() for name, mask in self.items()}  # as they are now
