"""Counts the operations of a training step that go over as many numbers as a layer has weights."""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_callbacks import sparsify

WIDTHS = (40, 48, 56, 44)
"""Of a network with three weights, each larger than any activation or bias in it."""
WEIGHTS = sum(a * b for a, b in itertools.pairwise(WIDTHS))
SMALLEST = min(a * b for a, b in itertools.pairwise(WIDTHS))

_OF_ONE_ELEMENT = ("gather", "scatter", "index_select")  # as they are used here: of one gate or one row of gates
Passes = dict[tuple[str, str], float]
"""Numbers that an operation reads or writes in a step, as a multiple of the weights of the network, by the name of the
operation and ``"in place"`` (it writes into memory that was there) or ``"fresh"`` (it allocates its result) or ``"reads"``
(its result is small)."""


class OverWeights(TorchDispatchMode):
    """Records each operation on tensors that are as large as a layer's weights; views cost nothing and do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        schema, name = func._schema, func._schema.name.removeprefix("aten::").rstrip("_")
        aliases = [r.alias_info for r in schema.returns]
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        is_view = not writes and any(a is not None for a in aliases)
        if max(sizes, default=0) < SMALLEST or is_view or name in _OF_ONE_ELEMENT:
            return result
        large = any(isinstance(t, Tensor) and t.numel() >= SMALLEST for t in tree_leaves(result))
        kind = "in place" if writes else "fresh" if large else "reads"
        self.seen[name, kind, max(sizes)] += 1
        return result


def network() -> nn.Module:
    """A network of :data:`WIDTHS`."""
    torch.manual_seed(0)
    layers = (nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(WIDTHS))
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))


def passes_of_step(make: Callable[[], Any] | None, number: int = 43) -> Counter[tuple[str, str, int]]:
    """The operations over weights in one step of SGD, in a run of a method or of none.

    Args:
        make: makes the method; None for a plain run.
        number: the number of the step, from 0; one without an update, and late enough that no look for signs of trouble is
            left from the first steps.
    """
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    example = [torch.randn(4, WIDTHS[0])] * 20  # the length of an epoch, at whose end EarlyCroP looks at the weights
    run = None if make is None else sparsify(make(), model, optimizer, 1000, data=example, forward=lambda m, x: m(x))
    for step in range(number + 1):
        batch = torch.randn(4, WIDTHS[0])
        with OverWeights() as found:
            if run is None:
                _take(model, optimizer, batch)
            else:
                with run.batch():
                    _take(model, optimizer, batch)
        if step == number:
            return found.seen
    raise AssertionError


def _take(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def added_passes(make: Callable[[], Any]) -> Passes:
    """What a method adds to a plain step."""
    with_method, plain = passes_of_step(make), passes_of_step(None)
    assert not plain - with_method, "a step under a method does all that a plain one does"
    found: Counter[tuple[str, str]] = Counter()
    for (name, kind, size), count in (with_method - plain).items():
        found[name, kind] += count * size
    return {key: round(size / WEIGHTS, 3) for key, size in sorted(found.items())}
