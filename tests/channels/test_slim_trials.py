"""Groups that are cut together: the same is found as one after the other would find."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from support.channel_nets import IMAGE, made, times_channels
from torch import Tensor, nn

from sparse_callbacks.channels.comparison import RANDOM, Reference
from sparse_callbacks.channels.constant_propagation.propagation import arriving_constants
from sparse_callbacks.channels.cuts import Cuts, Surgery
from sparse_callbacks.channels.dead_units import with_dead_units
from sparse_callbacks.channels.groups import Group, channel_groups
from sparse_callbacks.channels.masked_model import under_masks
from sparse_callbacks.channels.proof import GroupChange
from sparse_callbacks.channels.slim import slim
from sparse_callbacks.channels.trials import Trials
from sparse_callbacks.core.inspection import copied, quiet

# masks are made for dense networks here
pytestmark = pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")


class Block(nn.Module):
    """Two convolutions; between them the number of channels counts where ``counted``, which the trace does not see."""

    def __init__(self, counted: bool) -> None:
        super().__init__()
        self.counted = counted
        self.first, self.norm, self.last = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).relu()
        if self.counted:
            h = times_channels(h)
        return x + self.last(h)


class Blocks(nn.Module):
    def __init__(self, counted: Sequence[bool]) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 1), nn.Sequential(*(Block(s) for s in counted))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def drawn(seed: int, blocks: int = 9) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network with up to three blocks that only look as if their channels could go, and masks of makers, readers and
    gains of some units."""
    generator = torch.Generator().manual_seed(seed)
    bad = set(torch.randperm(blocks, generator=generator)[: seed % 4].tolist())
    net = made(partial(Blocks, [n in bad for n in range(blocks)]), seed).double()
    masks: dict[str, Tensor] = {}
    for n in range(blocks):
        dead = (torch.arange(8) % 4 < 1 + torch.randint(3, (1,), generator=generator)) if n not in bad else None
        # three of eight make no pairs, so that some of the bad groups fail and others differ
        live = torch.randperm(8, generator=generator) >= 3 + int(torch.randint(2, (1,), generator=generator))
        kind = torch.randint(4, (1,), generator=generator).item()
        keep = live if dead is None or kind == 0 else ~dead
        if kind == 0:
            continue  # nothing is masked here
        name, shape = {1: ("last", [1, 8, 1, 1]), 2: ("first", [8, 1, 1, 1]), 3: ("norm", [8])}[int(kind)]
        masks[f"blocks.{n}.{name}.weight"] = keep.view(shape)
    masks.setdefault("head.weight", torch.ones(1, 8, 1, 1).bool())
    return net, masks


def one_after_the_other(
    groups: Sequence[Group], surgery: Surgery, masks: dict[str, Tensor], samples: Sequence[Any], reference: Reference
) -> tuple[Cuts, list[GroupChange]]:
    """The same, by one comparison after each group."""
    readers = {m.parameter for g in groups if not g.reason for m in g.consumers}
    arriving = arriving_constants(surgery.model, readers, samples)
    cuts, rows = Cuts(), []
    for group in reversed(groups):
        row = GroupChange(group.name, group.size, reason=group.reason)
        if not group.reason:
            row, trial = with_dead_units(
                group,
                surgery,
                cuts,
                masks,
                lambda: arriving,
            )
            surgery.cut(trial, group.members)
            problem = reference.why_changed() if row.units else ""
            if problem:
                surgery.cut(cuts, group.members)
                row, trial = replace(row, units=0, channels=0, reason=problem), cuts
            cuts = trial
        rows.append(row)
    return cuts, rows[::-1]


def both(net: nn.Module, masks: dict[str, Tensor], x: Tensor) -> list[tuple[Cuts, list[GroupChange], nn.Module, int]]:
    """Cuts, rows, the network and the number of comparisons: of :class:`Trials`, and of one group after the other."""
    groups = channel_groups(net, x)
    found = []
    for together in (True, False):
        model, masked_by, _ = under_masks(net, masks)
        running = copied(model)
        with quiet(running):
            surgery, reference = Surgery(running), Reference(running, [x, 2 * x])
            looks: list[None] = []
            running.register_forward_hook(lambda *_, looks=looks: looks.append(None))
            if together:
                trials = Trials(groups, surgery, masked_by, [x, 2 * x])
                problem = trials.cut_all(reference)
                if problem:
                    trials.cut(reference, problem)
                cuts, rows = trials.cuts, trials.rows
            else:
                cuts, rows = one_after_the_other(groups, surgery, masked_by, [x, 2 * x], reference)
        found.append((cuts, rows, running, len(looks)))
    return found


@pytest.mark.parametrize("seed", range(24))
def test_groups_that_are_cut_together_end_as_one_after_the_other(seed: int) -> None:
    net, masks = drawn(seed)
    (cuts, rows, together, _), (others, expected, single, _) = both(net, masks, torch.randn(IMAGE).double())
    assert rows == expected
    for key in cuts.kept.keys() | others.kept.keys():
        whole = torch.ones(1, dtype=torch.bool)
        assert torch.equal(cuts.kept.get(key, whole).expand(8), others.kept.get(key, whole).expand(8)), key
    for (name, a), (_, b) in zip(together.state_dict().items(), single.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_the_drawn_networks_have_groups_of_every_fate() -> None:
    reasons = [r for seed in range(24) for r in both_rows(seed)]
    for part in ("without them the outputs differ", "without them the network fails"):
        assert sum(part in r.reason for r in reasons) >= 3, part
    assert sum(r.units > 0 for r in reasons) >= 30


def both_rows(seed: int) -> list[GroupChange]:
    net, masks = drawn(seed)
    return slim(net, masks, torch.randn(IMAGE).double())[1].rows


def test_few_comparisons_find_one_bad_group_among_many() -> None:
    net = made(lambda: Blocks([n == 11 for n in range(32)])).double()
    masks = {f"blocks.{n}.last.weight": torch.arange(8) < 4 for n in range(32)}
    (_, rows, _, together), (_, _, _, single) = both(net, masks, torch.randn(IMAGE).double())
    assert sum(r.units > 0 for r in rows) == 31
    # two samples each; one comparison of all, and at most two for each halving, instead of one for each group
    assert single >= 2 * 32
    assert together <= 2 * (1 + 2 * 5 + 1) + 2


class Sampled(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.rand_like(x))


def test_a_random_model_is_looked_at_once() -> None:
    net = made(lambda: Sampled([False] * 16)).double()
    masks = {f"blocks.{n}.last.weight": torch.arange(8) < 4 for n in range(0, 16, 2)}
    (_, rows, _, looks), _ = both(net, masks, torch.randn(IMAGE).double())
    assert [r.reason for r in rows if "blocks" in r.name and r.reason == RANDOM] == [RANDOM] * 8
    assert looks <= 2 * 2 + 2


class Chain(nn.Module):
    """Four convolutions, with a factor behind the second that depends on the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        sizes = zip((3, 4, 8, 6), (4, 8, 6, 4), strict=True)
        self.first, self.second, self.third, self.last = (nn.Conv2d(a, b, 1) for a, b in sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        x = times_channels(x)
        return self.last(self.third(x).relu())


def test_constants_are_looked_for_without_cuts_also_when_some_are_made() -> None:
    """A unit of the first layer is read by three units of the second alone. These seem dead, so what it holds does not
    matter, until their group is put back; the third layer has lost units by then."""
    read = torch.ones(8, 4, 1, 1, dtype=torch.bool)
    read[3:, 0] = False
    masks = {
        "first.weight": (torch.arange(4) > 0).view(4, 1, 1, 1),
        "second.weight": read,
        "third.weight": torch.arange(8) > 2,
        "last.weight": torch.arange(6) < 3,
    }
    (_, rows, _, _), (_, expected, _, _) = both(made(Chain).double(), masks, torch.randn(IMAGE).double())
    assert rows == expected
    assert [(r.name, r.units) for r in rows] == [("first", 1), ("second", 0), ("third", 3), ("last", 0)]
