"""Bytes that a run holds: weights, masks, dense copies and the state of optimizers."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks.core.local_parts import local
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.optimizer_state import state_tensors


def byte_counts(model: nn.Module, optimizers: Sequence[Optimizer], methods: Sequence[Method] = ()) -> dict[str, int]:
    """Bytes that this process holds, counted from the tensors that exist; memory that several of them share counts once.

    Args:
        model: the model of the run.
        optimizers: its optimizers.
        methods: its methods; none of a dense run.

    Returns:
        ``bytes/weights``: all parameters of the model (of exchanged layers the live values). ``bytes/masks``: masks with
        the integers that cut weights by them, gates, and the patterns of exchanged layers. ``bytes/dense_copies``: dense
        values of pruned weights that learn on. ``bytes/optimizer``: what optimizers keep of each parameter.
    """
    parameters = [local(p) for p in model.parameters()]
    stores = [method.weights for method in methods]
    return {
        "bytes/weights": _bytes(parameters),
        "bytes/masks": _bytes(tensor for weights in stores for tensor in weights.mask_tensors()),
        # exchanged with the parameters for the time of a step, but there are always as many
        "bytes/dense_copies": sum(
            w.dense_values(n).numel() * w.params[n].element_size() for w in stores for n in w.copied
        ),
        "bytes/optimizer": _bytes(t for o in optimizers for p in model.parameters() for _, t in state_tensors(o, p)),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors; each piece of memory counts once, however many are views of it."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())
