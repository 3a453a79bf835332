"""Layers that have begun to be trained since their run began: who they are, and their first masks."""

from collections.abc import Collection, Iterator, Sequence
from functools import singledispatch

from torch import Tensor
from torch.optim import Optimizer

from sparse_callbacks.core.awaited import names_awaited
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.ops import keep_largest
from sparse_callbacks.core.optimizers import Ownership


def thawed_names(method: Method, trained: Collection[int]) -> list[str]:
    """Names of the parameters that the run of ``method`` awaits and that are trained now.

    Args:
        method: the method of the run.
        trained: ``id`` of every parameter that some optimizer steps.
    """
    awaited = names_awaited(method.entries)
    if not awaited:
        return []
    parameters = dict(method.model.named_parameters())
    found = ((name, parameters.get(name)) for name in awaited)
    return [name for name, p in found if p is not None and p.requires_grad and id(p) in trained]


def have_moved(method: Method, optimizers: Sequence[Optimizer]) -> bool:
    """Whether sparse parameters are in other optimizers than those that the engine has taken hold of."""
    known = method.owners
    if list(map(id, optimizers)) != list(map(id, known.optimizers)):
        return True
    return Ownership(optimizers, method.params).steps != known.steps


@singledispatch
def masks_by_magnitude(method: Method, names: Sequence[str]) -> dict[str, Tensor]:
    """First masks of layers that join a run: the largest magnitudes, as many as planned. A method whose counts follow a
    curve or a phase registers a function of its own.

    Args:
        method: the method of the run; its parameters and owners are those with the new layers.
        names: names of the parameters that join.
    """

    def largest(layer: str, weight: Tensor) -> Tensor:
        return keep_largest(weight, weight.numel() - method.planned_zeros(layer, weight.numel()))

    return {n: method.weights.by_layer(n, largest, method.params[n].detach()) for n in names}


def first_masks(method: Method, names: Sequence[str]) -> dict[str, Tensor]:
    """Masks of the layers that join the run now; an optimizer that has had no sparse parameter before goes on at the step
    of the others.

    Args:
        method: the method of the run; its parameters and owners are those with the new layers.
        names: names of the parameters that join.
    """
    if not names:
        return {}
    progress = method.progress
    progress.begin(len(method.owners.optimizers))
    for index, owned in enumerate(method.owners.owns):
        if owned and set(owned) <= set(names):
            progress.join(index)
    return masks_by_magnitude(method, names)


def by_step(method: Method, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Gradient steps that each optimizer has taken, with those of ``names`` that belong to it."""
    for index, owned in enumerate(method.owners.owns):
        if mine := [n for n in owned if n in names]:
            yield method.progress.counts[index].read(), mine
