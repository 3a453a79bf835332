"""Figures and messages of constrained L0: its expected densities against their targets."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from sparse_callbacks.methods.l0.constraint import Constraint


def labels_of(constraints: Sequence[Constraint], by_layer: bool) -> list[str]:
    """What the constraints are called in figures.

    Args:
        constraints: all constraints.
        by_layer: whether each layer has a constraint of its own; otherwise each optimizer has one.
    """
    if by_layer:
        return [c.names[0] for c in constraints]
    # most runs have one optimizer, and its figure has no index
    return [f"total_{index}" if index else "total" for index in range(len(constraints))]


def densities_in_words(densities: Sequence[tuple[Constraint, float]], by_layer: bool) -> str:
    """A line for each constraint.

    Args:
        densities: each constraint with its expected density.
        by_layer: whether each layer has a constraint of its own.
    """
    labels = labels_of([c for c, _ in densities], by_layer)
    found = [(label, f"{d:.4f} (target {c.target:g})") for label, (c, d) in zip(labels, densities, strict=True)]
    # a single constraint needs no label: it is that of everything with gates
    return "\n".join(f"{label} {text}" if len(found) > 1 else text for label, text in found)


def missed_in_words(method: str, densities: Sequence[tuple[Constraint, float]], by_layer: bool, dual_lr: float) -> str:
    """Why a run ended above a target, and what to do, by the constraint that is farthest from its own.

    Args:
        method: the name of the method's class.
        densities: each constraint with its expected density.
        by_layer: whether each layer has a constraint of its own.
        dual_lr: learning rate of the multipliers.
    """
    worst, density = max(densities, key=lambda pair: pair[1] - pair[0].target)
    where = worst.names[0] if by_layer else "the model"
    return (
        f"{method} ended at an expected density of {density:.4f} in {where}, above its target of {worst.target:.4f}: "
        f"the multipliers had too little time. Train longer, or raise dual_lr= (now {dual_lr:g})."
    )


def gate_figures(
    multipliers: Mapping[str, Tensor],
    expected: Mapping[str, float],
    purged: Mapping[str, float],
    shares: Mapping[str, float],
) -> dict[str, float]:
    """Figures for the log, by their full names.

    Args:
        multipliers: the multiplier of each constraint by label.
        expected: share of a kernel's parameters that is expected behind open gates, by kernel.
        purged: share of a kernel's parameters that is left without those whose median gate is closed, by kernel.
        shares: the share of each kernel in the parameters of all kernels.
    """
    found = {f"l0/multiplier/{label}": float(multiplier) for label, multiplier in multipliers.items()}
    for kind, values in (("expected", expected), ("purged", purged)):
        found |= {f"l0/{kind}/{kernel}": value for kernel, value in values.items()}
        found[f"l0/{kind}/total"] = total_of(values, shares)
    return found


def total_of(values: Mapping[str, float], shares: Mapping[str, float]) -> float:
    """The value of all kernels together, of one by kernel and the share of each in the parameters of all."""
    return sum(value * shares[kernel] for kernel, value in values.items())
