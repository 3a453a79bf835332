"""Refusing arguments that no run can use."""

from numbers import Integral, Real


def check_sparsity(sparsity: object) -> None:
    """Refuse what is not a fraction of zeros in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real):
        raise ValueError(f"sparsity={sparsity!r} is not a number. It is the fraction of zeros: for 90 % zeros write 0.9.")
    if not 0.0 <= float(sparsity) < 1.0:
        raise ValueError(f"sparsity={sparsity!r} is not in [0, 1): it is the fraction of zeros. For 90 % zeros write 0.9.")


def check_seed(seed: object) -> None:
    """Refuse what is not a whole number."""
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise ValueError(f"seed={seed!r} is not a whole number. Give for example seed=0.")
