"""Target sparsities of a run that begins, once what they follow from was looked for."""

from collections.abc import Sequence

from torch import nn

from sparse_callbacks.core.awaited import for_targets
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.found_shares import find_shares
from sparse_callbacks.core.initial_masks import brings_counts, find_masks
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.selection import Entry


def planned_targets(
    method: Method, model: nn.Module, entries: Sequence[Entry], saved: SavedRun | None, together: bool = False
) -> dict[str, float]:
    """Target sparsity of every layer, after the method has looked for what its targets follow from.

    Args:
        method, model, entries, saved, together: see :func:`~sparse_callbacks.core.initial_masks.find_masks` and
            :func:`~sparse_callbacks.core.found_shares.find_shares`.

    Raises:
        ValueError: as they do.
    """
    find_masks(method, model, entries, saved, together)
    if brings_counts(method):
        method.attachment.shares = {}  # the masks that were found have their own counts
    else:
        find_shares(method, model, entries, saved, together)
    return method.share_out(entries)


def sharing_entries(method: Method, entries: Sequence[Entry]) -> Sequence[Entry]:
    """``entries`` as a distribution sees them, for a run that is only described: found masks need no share for a layer
    that waits to be trained, and the file that holds its mask may be gone."""
    return entries if brings_counts(method) else for_targets(entries)
