"""Random parts of samples, in which every class has its share."""

import math

import numpy as np

from sparse_callbacks.tasks.data.table_files import Array


def drawn_part(
    remaining: Array, labels: Array, share: float, key: str, where: str, seed: int, other: str = ""
) -> tuple[Array, Array]:
    """A part that is drawn from samples, and what it leaves of them, both in random order.

    Args:
        remaining: indices [m] of the samples that are drawn from.
        labels: numbers of the classes [n] of all samples.
        share: the size of the part as a share of all n samples.
        key: the key of the share, for messages.
        where: the file or folder of the samples, for messages.
        seed: the seed of the draw, which is always the same.
        other: what a user may do in place of another share, for messages; empty for nothing.

    Returns:
        The indices that are left, and those of the part.

    Raises:
        ValueError: the part, or what is left, is smaller than the number of classes.
    """
    from sklearn.model_selection import train_test_split

    # a count and not a fraction: scikit-learn rounds up, so a fraction that is off by one bit would move a sample
    count, classes = round(share * len(labels)), len(np.unique(labels))
    if count < classes:
        least = math.ceil(100 * classes / len(labels)) / 100
        raise ValueError(
            f"{where}: {key}={share} of {len(labels)} samples is {count}, fewer than the {classes} classes, of which each needs one in "
            f"every part. Give {key}={least:g} or more{f', or {other}' if other else ''}."
        )
    try:
        left, drawn = train_test_split(remaining, test_size=count, stratify=labels[remaining], random_state=seed)
    except ValueError as error:
        raise ValueError(
            f"{where}: {len(labels)} samples cannot be split by class with {key}={share}: {error}. Change the fractions"
            f"{f', or {other}' if other else ''}."
        ) from None
    return left, drawn
