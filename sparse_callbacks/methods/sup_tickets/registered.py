"""What others ask of Sup-tickets: sparse storage, and runs in which no mask would move."""

from sparse_callbacks.core.constructors import argument_names, where_argument_belongs
from sparse_callbacks.core.first_mask_arguments import why_no_first_mask
from sparse_callbacks.core.idle_run import why_idle
from sparse_callbacks.core.method import Options
from sparse_callbacks.core.step import ReplacesSteps
from sparse_callbacks.core.storages.storage import why_no_exchange
from sparse_callbacks.methods.drop_and_grow import DropAndGrow
from sparse_callbacks.methods.sup_tickets.sup_tickets import SupTickets


@why_no_exchange.register
def _(method: SupTickets) -> str:
    return "merges networks whose layers end with other counts of live weights than they have, so its layers are masked"


@why_no_first_mask.register
def _(method: SupTickets) -> str:
    return "begins with the masks of base=, as in SupTickets(RigL(0.9, initial_mask='snip'))"


@where_argument_belongs.register
def _(method: SupTickets, argument: str) -> str:
    of_base = argument in argument_names(DropAndGrow, Options)
    return f" It is one of the method in base=, as in SupTickets(RigL({argument}=...))." if of_base else ""


@why_idle.register
def _(method: SupTickets, length: float) -> str:
    if not method.bounds:  # a trial run
        return why_idle.dispatch(DropAndGrow)(method, length)
    # the cycles have updates of their own, whatever the calendar says
    name, replaces = f"{type(method).__name__}, before its cycles,", isinstance(method, ReplacesSteps)
    return method.progress.why_idle(method.times, method.bounds[0], name, replaces=replaces)
