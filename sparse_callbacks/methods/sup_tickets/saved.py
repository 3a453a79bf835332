"""What a saved run of Sup-tickets may hold."""

from collections.abc import Mapping

from torch import nn

from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.state_claims import Kept, Zeros, expected_aux, possible_zeros
from sparse_callbacks.methods.sup_tickets.phase import OF_RUN
from sparse_callbacks.methods.sup_tickets.sup_tickets import SupTickets
from sparse_callbacks.methods.sup_tickets.tickets import MERGED, keeps_shares


@possible_zeros.register
def _(method: SupTickets, saved: SavedRun, planned: Mapping[str, int]) -> list[Zeros]:
    claims = list(possible_zeros.dispatch(type(method.base))(method, saved, planned))
    if _number(saved, "tickets") < 2 or not claims or keeps_shares(method):
        return claims
    # after the first merge the total is planned: the merged ticket shares it out otherwise
    least, most = (sum(pick(claim.allowed) for claim in claims) for pick in (min, max))
    return [Zeros(tuple(name for claim in claims for name in claim.names), range(least, most + 1))]


@expected_aux.register
def _(method: SupTickets, saved: SavedRun, model: nn.Module) -> Mapping[str, Kept]:
    tickets, installed = _number(saved, "tickets"), _number(saved, "installed")
    count = Kept(dtype="int", low=0)
    found = {OF_RUN + name: count for name in ("tickets", "explored", "installed")}
    found |= {f"{OF_RUN}bounds": Kept((method.cycles + 1,), "int", low=1)}
    found |= {f"{OF_RUN}steps": Kept(dtype="int", low=0, required=True), f"{OF_RUN}rates": Kept(None)}
    found |= {f"{OF_RUN}peak": Kept(low=0)}
    waits = tickets > 0 and not installed  # for its place in the network
    # a layer may be trained since the last ticket alone, but not all of them
    waits = waits and not any(key.startswith(MERGED) for key in saved.aux)
    merged = {
        MERGED + name: Kept(tuple(p.shape), required=waits and name in saved.masks, finite=False)
        for name, p in model.named_parameters()
    }
    return {**expected_aux.dispatch(type(method.base))(method, saved, model), **found, **merged}


def _number(saved: SavedRun, name: str) -> int:
    found = saved.aux.get(OF_RUN + name)
    return 0 if found is None or found.numel() != 1 else int(found)
