"""What can be said of a run before its first step: it ends too early, or its optimizer is slow."""

from collections.abc import Sequence

from torch.optim import SGD, Adam, AdamW, Optimizer

from sparse_callbacks.core.method import Method
from sparse_callbacks.core.ops import drop_count

FUSED_ON_CPU = (SGD, Adam, AdamW)
MANY_WEIGHTS = 1_000_000
"""Weights of an optimizer from which on its steps are worth looking at."""


def why_too_short(method: Method, length: float) -> str:
    """Why a run ends before its target, as the beginning of a sentence; empty where it does not, or nobody knows.

    Args:
        method: the method of the run, with its calendar.
        length: optimizer steps of this run.
    """
    calendar = method.calendar
    if calendar is None or not method.arrives_at_stop or method.at_target:
        return ""
    ends = method.progress.most() + length
    if calendar.stop <= ends:
        return ""
    return f"the target is due at step {calendar.stop}, and this run ends at step {ends:g}: its network will be denser than asked for"


def why_too_small(method: Method) -> str:
    """Why no update can replace a weight, as the beginning of a sentence; empty where one can, or the method replaces none.

    Args:
        method: the method of the run, with its calendar and its masks. One that replaces a share of the active weights has
            ``fraction_at(number of steps)``.
    """
    fraction_at, calendar = getattr(method, "fraction_at", None), method.calendar
    if fraction_at is None or calendar is None:
        return ""
    fraction = max(fraction_at(calendar.start), fraction_at(calendar.stop))
    largest = max(method.weights.active_counts.values(), default=0)
    if not fraction or drop_count(largest, fraction):
        return ""
    return (
        f"no update will replace a weight: drop_fraction={fraction:.3g} of the {largest} active weights of the largest layer is "
        "less than one"
    )


def why_slow(optimizers: Sequence[Optimizer]) -> str:
    """Which optimizer takes several times as long as it needs, as the beginning of a sentence; empty where none does.

    On the CPU the plain SGD, Adam and AdamW of torch pass over the memory of all weights once for each operation, and the fused
    ones once in all: measured on 25 million weights, the default of SGD takes 2.5 times as long as a copy of them, that with
    ``foreach=True`` 5 times, and the fused one 1.3 times; fused AdamW takes a fifth of the default's time. On a GPU torch
    chooses a fast variant by itself.
    """
    for optimizer in optimizers:
        weights = [p for group in optimizer.param_groups if not group.get("fused") for p in group["params"]]
        size = sum(p.numel() for p in weights)
        # subclasses may do without, and not every group of others knows the argument
        if type(optimizer) not in FUSED_ON_CPU or size < MANY_WEIGHTS:
            continue
        if any(
            p.device.type != "cpu" or not p.is_floating_point() or (type(p.grad) is not type(None) and p.grad.is_sparse)
            for p in weights
        ):
            continue
        return (
            f"{type(optimizer).__name__} steps {size:,} weights on the CPU, and goes through all of their memory once for each of "
            "its operations"
        )
    return ""
