"""The projections of torch's attention as layers with a cost.

``nn.MultiheadAttention`` reads their weights and never calls a layer, so no hook of a layer sees them.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sparse_callbacks.channels.costs import Layer, samples_in
from sparse_callbacks.channels.slim_attention import SlimAttention
from sparse_callbacks.core.inspection import quiet, run

_SEPARATE = (("q_proj_weight", "query"), ("k_proj_weight", "key"), ("v_proj_weight", "value"))


def projections(model: nn.Module, example_input: Any) -> dict[str, Layer]:
    """The projections of every ``nn.MultiheadAttention`` or `SlimAttention` that a forward pass uses, by name.

    The output projection has the name of its module, ``attention.out_proj``; the others, which have no module, that of
    their parameter: ``attention.in_proj_weight``, or ``attention.q_proj_weight`` and so on. The products of queries with
    keys, and of their softmax with values, belong to none of them.

    Args:
        model: the network; it runs in eval mode, and is left as it was.
        example_input: a tensor, a tuple of positional arguments or a mapping of named arguments.
    """
    found: dict[str, Layer] = {}
    # a subclass, which may take other arguments and compute anything, loses no heads
    attentions = [(n, m) for n, m in model.named_modules() if type(m) in (nn.MultiheadAttention, SlimAttention)]
    if not attentions:
        return found
    samples = samples_in(example_input)
    with ExitStack() as hooks, quiet(model):
        for name, module in attentions:
            hooks.enter_context(module.register_forward_hook(_recorder(name, found, samples), with_kwargs=True))
        run(model, example_input)
    return found


def _recorder(name: str, found: dict[str, Layer], samples: int) -> Callable[..., None]:
    """A forward hook that puts the projections of an attention into ``found``, or adds one more use of them."""

    def record(module: nn.MultiheadAttention, arguments: Any, named: Any, _: Any) -> None:
        given = inspect.signature(module.forward).bind(*arguments, **named).arguments
        for use in _in_use(f"{name}." if name else "", module, given, samples):
            seen = found.get(use.name)
            if seen is not None:
                use = replace(seen, maps=seen.maps + use.maps, positions=seen.positions + use.positions)
            found[use.name] = use

    return record


def _in_use(prefix: str, module: nn.MultiheadAttention, given: Mapping[str, Tensor], samples: int) -> Iterator[Layer]:
    """The projections of an attention in one call.

    Args:
        prefix: what stands before the names of its parameters.
        module: the attention.
        given: its arguments by name.
        samples: number of samples that the network ran on.
    """
    rows = {which: given[which].numel() // given[which].shape[-1] // samples for _, which in _SEPARATE}
    weights: list[tuple[str, Tensor, int]]
    if module.in_proj_weight is None:
        weights = [(local, getattr(module, local), rows[which]) for local, which in _SEPARATE]
    else:  # queries, keys and values have a third of the weight each
        weights = [("in_proj_weight", module.in_proj_weight, round(sum(rows.values()) / 3))]
    weights.append(("out_proj", module.out_proj.weight, rows["query"]))
    for local, weight, number in weights:
        outputs, inputs = weight.shape
        yield Layer(prefix + local, inputs, outputs, maps=((number,),), positions=(number,))
