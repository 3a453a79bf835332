"""Arguments of ChannelPruning that do not go together."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparse_callbacks.core.calendar import Time, check_time_of_one_update
from sparse_callbacks.methods.channels.budgeted import START, STOP
from sparse_callbacks.methods.channels.criteria import CRITERIA, Criterion

if TYPE_CHECKING:
    from sparse_callbacks.methods.channels.channel_pruning import ChannelPruning


def refuse_combinations(method: "ChannelPruning", rule: Criterion, usual: Mapping[str, object]) -> None:
    """Refuse times, a ranking and arguments that the criterion cannot have.

    Args:
        method: the method, whose arguments are known.
        rule: its criterion.
        usual: the defaults of ``penalty``, ``batches`` and ``loss``.

    Raises:
        ValueError: says which.
    """
    name = method.criterion
    if method.ranking not in rule.rankings:
        raise ValueError(
            f"ranking={method.ranking!r} cannot be used with criterion={name!r}, {rule.why_rankings}. Give "
            f"ranking={' or '.join(map(repr, rule.rankings))}."
        )
    for argument, default in usual.items():
        given = getattr(method, argument)
        same = given is default or (isinstance(given, int | float) and given == default)
        if argument not in rule.arguments and not same:
            readers = " or ".join(repr(known) for known in sorted(CRITERIA) if argument in CRITERIA[known].arguments)
            raise ValueError(
                f"{argument}={given!r} says nothing to criterion={name!r}, which does not read it. Leave {argument}= "
                f"out, or give criterion={readers}."
            )
    if rule.one_shot and not method.is_one_shot:
        raise ValueError(
            f"criterion={name!r} prunes once, and start={method.start!r} and stop={method.stop!r} are a ramp. Give the "
            "same start= and stop=, such as start=0, stop=0 for a network that is trained already."
        )
    if rule.needs_steps and method.is_before_training:
        raise ValueError(
            f"criterion={name!r} scores channels by the gradients of training steps, and with start=0, stop=0 there "
            "are none before the pruning. Give a later start= and stop=, such as start=100, stop=100."
        )


def refuse_when(when: object, every: Time | None, start: Time, stop: Time) -> None:
    """Refuse a ``when`` that is not known, or that is given beside the times of a ramp.

    Raises:
        ValueError: says which.
    """
    if isinstance(when, str) and when not in ("start", "distance"):
        raise ValueError(
            f"when={when!r} is not known. Give 'start', 'distance', a time in optimizer steps (int) or as a fraction of the "
            "run (float), or None for a ramp from start= to stop=."
        )
    if not isinstance(when, str):
        check_time_of_one_update(when, "when")  # type: ignore[arg-type]  # refuses what is not a time
    given = {"every": every is not None, "start": start != START, "stop": stop != STOP and when != "distance"}
    if wrong := [f"{name}=" for name, is_given in given.items() if is_given]:
        raise ValueError(
            f"{' and '.join(wrong)} beside when={when!r}, which says already when channels go. Leave {'it' if len(wrong) == 1 else 'them'} "
            "out, or when=."
        )
