"""Accounting: what a sparse run costs."""


def training_flops(sparse: float, dense: float, every: int) -> float:
    """FLOPs of RigL per gradient step and sample, one dense gradient in `every` steps included.

    `(3 f_S dT + 2 f_S + f_D) / (dT + 1)` (Evci et al. 2020, section 3), to be compared with `3 f_D` of dense training.

    Args:
        sparse: f_S, FLOPs of the sparse forward pass (any unit; the result has the same).
        dense: f_D, FLOPs of the dense forward pass.
        every: dT, steps between two updates, at least 1.

    Raises:
        ValueError: `every` is below 1.

    >>> round(training_flops(0.2, 1.0, every=100), 6)
    0.607921
    """
    if every < 1:
        raise ValueError(f"every={every} is no interval: give the number of steps between two updates, 1 or more.")
    return (3 * sparse * every + 2 * sparse + dense) / (every + 1)
