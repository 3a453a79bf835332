"""The masks that a record keeps as pictures: of small layers, and of those that read the input."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from sparse_callbacks.core.method import Method
from sparse_callbacks.core.shards import WHOLE, layout_of

SMALL_LAYER = 1 << 16  # weights of a layer whose masks are kept
READS_INPUT = 1 << 22  # the same for the first layer of the network
MOST = 12  # layers


def kept_masks(methods: Sequence[Method], order: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the current masks of the layers that pictures are made of, on the CPU.

    Args:
        methods: the methods of the run.
        order: names of weights in the order in which their layers are called; the first reads the input.
    """
    sizes = {name: m.weights.size(name) for m in methods for name in m.params if layout_of(m.params[name]) is WHOLE}
    called = [name for name in order if name in sizes] or list(sizes)
    chosen = [n for n in called if sizes[n] <= (READS_INPUT if n == called[0] else SMALL_LAYER)][:MOST]
    of: Mapping[str, Method] = {name: m for m in methods for name in m.params}
    return {name: of[name].weights.masks[name].cpu().clone() for name in chosen}
