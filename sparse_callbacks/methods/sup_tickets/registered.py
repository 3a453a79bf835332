"""What others ask of Sup-tickets: sparse storage, and runs in which no mask would move."""

from collections.abc import Sequence

from sparse_callbacks.core.constructors import argument_names, where_argument_belongs
from sparse_callbacks.core.first_mask_arguments import why_no_first_mask
from sparse_callbacks.core.idle_run import why_idle
from sparse_callbacks.core.method import Method, Options
from sparse_callbacks.core.neighbours import why_no_neighbour
from sparse_callbacks.core.step import ReplacesSteps
from sparse_callbacks.core.storages.storage import storages_of, why_no_exchange
from sparse_callbacks.methods.drop_and_grow import DropAndGrow
from sparse_callbacks.methods.sup_tickets.sup_tickets import SupTickets


@why_no_exchange.register
def _(method: SupTickets) -> str:
    return "merges networks whose layers end with other counts of live weights than they have, so its layers are masked"


@why_no_first_mask.register
def _(method: SupTickets) -> str:
    return "begins with the masks of base=, as in SupTickets(RigL(0.9, initial_mask='snip'))"


@why_no_neighbour.register
def _(method: SupTickets, other: Method) -> str:
    moves = other.start is not None or other.keeps_dense
    if not moves and storages_of(other) <= {"masked"}:
        return ""
    name, beside = type(method).__name__, type(other).__name__
    has = "masks that move" if moves else "layers that hold their active weights alone"
    return (
        f"{name} merges the weights of the whole model at the end of the run, and {beside} has {has}, into which no merged values "
        f"fit. Let {name} have these layers too (with include=, exclude= or distribution= of the method in it), give them masks "
        "that stay, such as those of Static, or train with its base method alone."
    )


@where_argument_belongs.register
def _(method: SupTickets, argument: str, given: Sequence[object]) -> str:
    base = next((type(value) for value in given if isinstance(value, DropAndGrow)), None)
    if base is None or argument not in argument_names(base, Options):
        return ""
    return f" It is one of the method in base=, as in SupTickets({base.__name__}({argument}=...))."


@why_idle.register
def _(method: SupTickets, length: float) -> str:
    if not method.bounds:  # a trial run
        return why_idle.dispatch(DropAndGrow)(method, length)
    # the cycles have updates of their own, whatever the calendar says
    name, replaces = f"{type(method).__name__}, before its cycles,", isinstance(method, ReplacesSteps)
    return method.progress.why_idle(method.times, method.bounds[0], name, replaces=replaces)
