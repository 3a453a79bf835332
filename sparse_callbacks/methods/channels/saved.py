"""What a saved run under a budget of channels may hold."""

from collections.abc import Mapping

from torch import nn

from sparse_callbacks.core.awaited import why_never
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.distance_trigger import expected_of_trigger
from sparse_callbacks.core.state_claims import Kept, Zeros, expected_aux, possible_zeros
from sparse_callbacks.methods.channels.budgeted import BudgetedChannels
from sparse_callbacks.methods.channels.channel_pruning import ChannelPruning


@why_never.register
def _(method: BudgetedChannels) -> str:
    return f"{type(method).__name__} forms its groups of channels, and prices them, when a fit starts"


@possible_zeros.register
def _(method: BudgetedChannels, saved: SavedRun, planned: Mapping[str, int]) -> list[Zeros]:
    # no choice takes the last channel of a group
    claims = [Zeros((name,), range(mask.numel())) for name, mask in saved.masks.items()]
    # Every choice has a budget below the dense cost. Of several optimizers each moves its own layers only, and its
    # choice may save in those of the others, so that none prunes anything.
    solved = len(saved.progress["steps"]) == 1 and bool(saved.progress["done"])
    size = sum(mask.numel() for mask in saved.masks.values())
    return [*claims, Zeros(tuple(saved.masks), range(int(solved), size))]


@expected_aux.register
def _(method: ChannelPruning, saved: SavedRun, model: nn.Module) -> Mapping[str, Kept]:
    of_trigger = expected_of_trigger(saved) if method.when == "distance" else {}
    return of_trigger | {
        "scores.*": Kept(None, low=0),
        "former.*": Kept(None, low=0),
        "steps.*": Kept(dtype="int", low=0),
    }
