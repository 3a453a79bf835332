"""Layers whose place in a model others have taken, and which somebody may hold elsewhere."""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from types import FunctionType, MethodType
from typing import Any, NoReturn

from torch import Tensor, nn

DEPTH = 4  # of lists within lists that are looked into
MOST_ENTRIES = 1000  # entries of a list that are looked at: longer ones hold data
KEPT_ARGUMENTS = "_hparams"  # of a LightningModule, which nobody calls


class FormerLinear(nn.Linear):
    """An `nn.Linear` that a `SparseLinear` has replaced in its model: to compute with it is refused.

    Whoever still calls it, from a list or as a stored method, would compute with weights that nobody trains. The class of the
    replaced layer itself is set, as nothing that is set on the instance is seen by a stored ``layer.forward``.
    """

    def forward(self, input: Tensor) -> Tensor:  # the name that it has in torch
        self._refuse("calls")

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """Refused; the dense Parameter is in ``_parameters`` still."""
        self._refuse("reads the weight of")

    def _refuse(self, what: str) -> NoReturn:
        name = vars(self)["place"]
        weight = f"{name}.weight"
        raise RuntimeError(
            f"something {what} the nn.Linear that {name} was before storage= put a SparseLinear in its place: it is held elsewhere, "
            "for example in a list or as a stored method, and would not be trained there. Call the layer as an attribute of its "
            f"module or hold it in an nn.ModuleList; or make the model anew and leave the layer out with exclude=[{weight!r}] or "
            f"storage={{{weight!r}: 'masked', '*': 'sparse'}}."
        )


def retire(linear: nn.Module, name: str) -> None:
    """Refuse from here on to compute with a layer that was replaced.

    Args:
        linear: an ``nn.Linear``.
        name: its name in the model.
    """
    vars(linear)["place"] = name
    linear.__class__ = FormerLinear


def reinstate(linear: nn.Module) -> None:
    """Undo `retire`."""
    linear.__class__ = nn.Linear
    del vars(linear)["place"]


def held_elsewhere(model: nn.Module) -> dict[int, str]:
    """By ``id`` each linear layer of a model that an attribute holds which is not a submodule, and the name of the attribute.

    Looked into are lists, tuples, sets, mappings, partial functions, bound methods, closures, and modules that are not
    registered, of the attributes that users have set on modules.
    """
    usual, registered = vars(nn.Module()).keys(), {id(module) for module in model.modules()}
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in usual and not key.startswith(KEPT_ARGUMENTS):
                for layer in _layers_in(value, registered, DEPTH):
                    found.setdefault(id(layer), f"{name}.{key}" if name else key)
    return found


def _layers_in(value: Any, registered: set[int], depth: int) -> Iterator[nn.Linear]:
    if isinstance(value, nn.Linear):
        yield value
    elif isinstance(value, nn.Module) and id(value) in registered:
        return  # its layers are exchanged within it
    elif depth:
        for inner in islice(_entries(value), MOST_ENTRIES):
            yield from _layers_in(inner, registered, depth - 1)


def _entries(value: Any) -> Iterator[Any]:
    """What a value holds that may be called through it."""
    if isinstance(value, nn.Module):
        yield from value._modules.values()
    elif isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield value.__self__
    elif isinstance(value, FunctionType):
        cells = (cell for cell in value.__closure__ or ())
        yield from _contents(cells)
        yield from value.__defaults__ or ()


def _contents(cells: Iterator[Any]) -> Iterator[Any]:
    for cell in cells:
        try:
            yield cell.cell_contents
        except ValueError:  # a name that is not bound yet
            continue
