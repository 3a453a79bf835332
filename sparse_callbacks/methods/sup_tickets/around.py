"""Sup-tickets around another method: its class, and what it refuses."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sparse_callbacks.core import distributed
from sparse_callbacks.core.arguments import refuse_outside, refuse_unknown
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.optimizer_modes import is_schedule_free
from sparse_callbacks.core.passing_rates import why_no_rate
from sparse_callbacks.core.state_layout import shown_short
from sparse_callbacks.core.step import MeasuresSimilarity
from sparse_callbacks.methods.drop_and_grow import DropAndGrow

# one class for each pair, so that objects around the same class have the same
_made: dict[tuple[type, type], type] = {}
AVERAGES = ("cumulative", "moving")


def class_around(outer: type, inner: type) -> type:
    """The class of an ``outer`` method around an ``inner`` one, which is a subclass of both.

    So it has every rule of the inner method, and what others ask of its class or register for it holds.

    Args:
        outer: the method around.
        inner: the class of the method that it takes.
    """
    if (outer, inner) not in _made:
        namespace: dict[str, Any] = {name: getattr(outer, name) for name in ("__doc__", "__module__", "__qualname__")}
        namespace["figure_prefix"] = getattr(inner, "figure_prefix", "") or inner.__name__.lower()
        namespace["outer"] = outer
        _made[outer, inner] = type(outer.__name__, (outer, inner), namespace)
    return _made[outer, inner]


def copy_around(outer: type, inner: type) -> Any:
    """An object of :func:`class_around` without any attributes, for pickle and deepcopy."""
    made = class_around(outer, inner)
    return object.__new__(made)


def check_base(base: object) -> None:
    """Refuse methods that Sup-tickets cannot be around.

    Raises:
        ValueError: says which, why, and what to give.
    """
    name = type(base).__name__ if isinstance(base, Method) else shown_short(base)
    if not isinstance(base, DropAndGrow) or hasattr(base, "outer"):
        raise ValueError(
            f"base={name} is not a method that drops weights and grows as many elsewhere, as each cycle does once. Give SET, "
            "RigL, SNFS or another DropAndGrow, made for this call: SupTickets(RigL(0.9))."
        )
    if isinstance(base, MeasuresSimilarity) or base.keeps_dense:
        raise ValueError(
            f"base={name} looks at the data, or at dense weights, ahead of the updates of its calendar, and cycles begin at times "
            "of their own. Give SET, RigL or SNFS."
        )
    if base.attachment.model is not None or base.masks:
        raise ValueError(
            f"base={name} has trained a model already, and its masks would not go along. Give a new one: SupTickets({name}(...))."
        )
    if base.pattern is not None:
        raise ValueError(
            f"base={name}(pattern={base.pattern!r}) keeps masks of a pattern, and merged weights are pruned by their magnitudes "
            "one by one. Leave pattern= out."
        )


def check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse values that no run can use.

    Args:
        given: share, cycles, low_lr, high_lr, drop_fraction and average by name.

    Raises:
        ValueError: names the argument.
    """
    share, cycles, drop_fraction = given["share"], given["cycles"], given["drop_fraction"]
    if not _is_number(share) or not 0.0 < share < 1.0:
        raise ValueError(
            f"share={share!r} is not a share of the run in (0, 1): it is the last part, in which the cycles lie. The published "
            "value is 0.1."
        )
    if isinstance(cycles, bool) or not isinstance(cycles, int) or cycles < 1:
        raise ValueError(f"cycles={cycles!r} is not a number of cycles. Give 1 or more; each ends in a ticket.")
    if not _is_number(drop_fraction) or not 0.0 <= drop_fraction <= 1.0:
        raise ValueError(
            f"drop_fraction={drop_fraction!r} leaves [0, 1]: it is the fraction of a layer's active weights that the "
            "update at the beginning of a cycle replaces. The published value is 0.5."
        )
    low, high = given["low_lr"], given["high_lr"]
    for name in ("low_lr", "high_lr"):
        if given[name] is not None:
            refuse_outside(given[name], name, 0.0, float("inf"))
    if high is not None and not high:
        raise ValueError(
            f"high_lr={high!r} trains nothing in the cycles, whose tickets would be one network. Give a rate above 0, or None for "
            "five times low_lr."
        )
    if low is not None and high is not None and high < low:
        raise ValueError(
            f"low_lr={low!r} is above high_lr={high!r}: a cycle rises from the low rate to the high one and falls back, and "
            "its ticket is taken at the low one. Exchange the two."
        )
    refuse_unknown(given, {"average": AVERAGES})


def refuse_optimizers(method: str, optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers whose learning rate cannot be set for a cycle, or that keep weights of their own.

    Args:
        method: name of the method, for the errors.
        optimizers: the optimizers of the run.

    Raises:
        ValueError: several optimizers, one without a learning rate, or one that averages.
    """
    instead = "or the base method alone"
    if len(optimizers) > 1:
        raise ValueError(
            f"{len(optimizers)} optimizers step this model, and {method} sets the learning rate of one, whose steps are counted "
            f"for the cycles. Use one optimizer with groups of parameters, {instead}."
        )
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if why := why_no_rate(optimizer):
            raise ValueError(
                f"{name} has no learning rate that a cycle could set: {why}. Use an optimizer with a number as lr=, such as "
                f"torch.optim.SGD, {instead}."
            )
        if is_schedule_free(optimizer):
            raise ValueError(
                f"{name} evaluates averages of its own in place of the weights, and would write them over the merged ticket. "
                f"Use an optimizer without averages, such as torch.optim.SGD, {instead}."
            )


def refuse_synchronized(norms: Sequence[nn.Module]) -> None:
    """Refuse norms that wait for other ranks in every batch, where ranks may pass over different numbers of batches.

    Raises:
        ValueError: SyncBatchNorm in several processes.
    """
    if distributed.world_size() > 1 and any(isinstance(n, nn.SyncBatchNorm) for n in norms):
        raise ValueError(
            "SyncBatchNorm waits for all ranks in every batch, and in the pass that estimates its statistics for the merged "
            "ticket ranks may have different numbers of batches. Leave sync_batchnorm= out: the ranks share their estimates."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
