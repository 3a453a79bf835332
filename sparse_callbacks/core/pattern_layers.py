"""Layers that the pattern of a method fits, whichever it is, and why others stay dense under it."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from sparse_callbacks.core.fan_in_layers import ablation_of, has_fan_in, shared_group, why_no_shared_rows
from sparse_callbacks.core.nm_layers import LIVE_ALONE, why_no_groups
from sparse_callbacks.core.pattern_names import asked_nm, asked_pattern
from sparse_callbacks.core.selection import NOT_TRAINED, Entry


def why_dense(method: object, entry: Entry) -> str:
    """The reason why a parameter that could be sparse stays dense under the pattern of a method; empty where it does not.

    Args:
        method: the method of the run.
        entry: the parameter; what else keeps it dense does not matter.
    """
    asked, group = asked_nm(method), shared_group(method)
    why = "" if asked is None else why_no_groups(entry, asked)
    if group is not None:
        why = why_no_shared_rows(entry, group)
        if not why and entry.live_alone and (not entry.rows_together or entry.rows_together % group):
            why = LIVE_ALONE
    if has_fan_in(method) and entry.live_alone and (entry.rows_together != 1 or ablation_of(method) is not None):
        why = LIVE_ALONE
    return f"not {asked_pattern(method)}: {why}" if why else ""


def fitting(method: object, entries: Iterable[Entry]) -> list[Entry]:
    """``entries`` with the reason of those that stay dense because they cannot have the pattern of a method.

    Args:
        method: the method of the run.
        entries: all parameters; those without a reason could be sparse without the pattern.

    Raises:
        ValueError: none of them can have it, nor one that is not trained yet.
    """
    listed = list(entries)
    _refuse_no_layer(method, listed)
    could = ("", *NOT_TRAINED)
    return [replace(e, reason=why_dense(method, e) or e.reason) if e.reason in could else e for e in listed]


def _refuse_no_layer(method: object, entries: Sequence[Entry]) -> None:
    kept = {e.name: why_dense(method, e) for e in entries if not e.reason}
    later = any(not why_dense(method, e) for e in entries if e.reason in NOT_TRAINED)
    if kept and all(kept.values()) and not later:
        reasons = ", ".join(f"{name} ({reason})" for name, reason in kept.items())
        raise ValueError(
            f"pattern='{asked_pattern(method)}' fits no layer, so nothing would be sparse: {reasons}. Give another pattern=, or "
            "leave it out."
        )
