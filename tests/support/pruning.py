"""Short runs of ChannelPruning, and a network as a criterion sees it."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks import ChannelPruning
from sparse_callbacks.channels.groups import Group
from sparse_callbacks.channels.norms import norm_behind
from sparse_callbacks.channels.slim import slimmable_groups
from sparse_callbacks.core.optimizers import Ownership
from sparse_callbacks.methods.channels.criteria import ScoredNetwork


def pruning(budget: float = 0.5, **options: Any) -> ChannelPruning:
    """With several prunings in a run of 16 steps."""
    short = {"every": 3, "start": 2, "stop": 14, "round_to": 4, "prune_stem": True, "print_plan": False}
    return ChannelPruning(budget, **(short | options))


def at_once(budget: float = 0.5, step: int = 0, **options: Any) -> ChannelPruning:
    """With one pruning, by default before the first step."""
    return pruning(budget, **({"every": None, "start": step, "stop": step, "round_to": 1} | options))


def scored(
    model: nn.Module, x: Tensor | None = None, groups: Sequence[Group] | None = None, **more: Any
) -> ScoredNetwork:
    """A network with the groups of a pass over ``x``, or given ones, and one optimizer for all parameters."""
    found = [g for g in slimmable_groups(model, x) if not g.reason] if groups is None else groups
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fields: dict[str, Any] = {
        "method": "ChannelPruning",
        "model": model,
        "groups": found,
        "live": [torch.ones(g.size, dtype=torch.bool) for g in found],
        "norm_behind": {} if x is None else norm_behind(model, x),
        "optimizer_of": [0] * len(found),
        "owners": Ownership([optimizer], {n: p for n, p in model.named_parameters() if p.ndim > 1}),
        "host": None,
        "aux": {},
        "saved": None,
        "generator": lambda name, number: torch.Generator().manual_seed(hash((name, number)) % 2**32),
        "penalty": 1e-4,
        "batches": 8,
        "loss": None,
    }
    return ScoredNetwork(**(fields | more))


def announced(network: ScoredNetwork, index: int = 0, finite: bool = True) -> Any:
    """A step of an optimizer, as far as criteria read it."""
    return SimpleNamespace(index=index, optimizer=network.owners.optimizers[index], finite_flag=finite)


def nested(keeps: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether what is masked once stays masked."""
    from itertools import pairwise

    return all(not (later[n] & ~earlier[n]).any() for earlier, later in pairwise(keeps) for n in later)
