"""What a run that prunes whole units leaves of its network."""

import torch

from sparse_callbacks.core.units_left import UnitsLeft, units_left
from sparse_callbacks.lightning.callback import SparsityCallback
from sparse_callbacks.tasks.classifier import Classifier
from sparse_callbacks.tasks.data.given_module import describe
from sparse_callbacks.tasks.data.module import MemoryData


def left_of(method: SparsityCallback | None, module: Classifier, data: MemoryData) -> UnitsLeft | None:
    """Parameters, FLOPs and units of the network that was trained; None where its sparsity says what is left.

    Args:
        method: the sparsity callback after training; None for a dense run.
        module: the trained network.
        data: its data, one sample of which the network is looked at with.
    """
    if method is None:
        return None
    sample = torch.zeros(1, *describe(data, {"num_classes": module.num_classes})[0], device=module.device)
    try:
        return units_left(method, sample)
    except (
        ValueError,
        TimeoutError,
    ):  # of a network whose units cannot be found nothing better than its zeros is known
        return None
