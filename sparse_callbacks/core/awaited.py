"""Layers that could be sparse and are not trained yet: they stay dense until they are."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import singledispatch

from sparse_callbacks.core.pattern_layers import fitting
from sparse_callbacks.core.selection import NOT_TRAINED, Entry

_UNTIL = "dense until it is trained: "
# of a layer that a run finds trained at its very beginning, before the curve that it joins is known
_FROM_FIRST_BATCH = f"{_UNTIL}from the first batch on"
AWAITED = (*(f"{_UNTIL}{why}" for why in NOT_TRAINED), _FROM_FIRST_BATCH)
"""Reasons of a parameter that becomes sparse once it is trained."""


@singledispatch
def why_never(method: object) -> str:
    """Why ``method`` takes up no layer after its run has begun, as a clause; empty where it does. A method registers a
    function of its own."""
    return ""


def waits(entry: Entry) -> bool:
    """The parameter is dense now, and becomes sparse once it is trained."""
    return entry.reason in AWAITED


def names_awaited(entries: Iterable[Entry]) -> list[str]:
    """Names of the parameters that become sparse once they are trained."""
    return [e.name for e in entries if waits(e)]


def with_awaited(
    method: object,
    entries: Sequence[Entry],
    masked: Collection[str] = (),
    awaited: Collection[str] = (),
    admits: bool = False,
) -> list[Entry]:
    """``entries`` of :func:`~sparse_callbacks.core.selection.select`, with what follows from who is trained when, and from
    a pattern that not every layer can have.

    Args:
        method: the method of the run.
        entries: all parameters of the model.
        masked: names of the parameters that have a mask from the run that goes on; those that are frozen again keep it.
        awaited: names of the parameters that the run which goes on has awaited.
        admits: what was awaited and is trained now becomes sparse; otherwise it waits for the first batch.

    Raises:
        ValueError: no layer can have the pattern.
    """
    never = why_never(method)

    def reason(entry: Entry) -> str:
        if entry.reason in NOT_TRAINED:
            if never:
                return f"{entry.reason}; {never}"
            return "" if entry.name in masked else f"{_UNTIL}{entry.reason}"
        late = not entry.reason and entry.name in awaited and entry.name not in masked
        return _FROM_FIRST_BATCH if late and not admits else entry.reason

    return [replace(e, reason=reason(e)) for e in fitting(method, entries)]


def for_targets(entries: Sequence[Entry]) -> list[Entry]:
    """``entries`` as distributions see them: what is awaited has its share of the target from the beginning, so that no
    layer's target changes when another one joins."""
    return [replace(e, reason="") if waits(e) else e for e in entries]
