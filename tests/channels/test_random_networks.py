"""Networks out of random blocks: every group that is offered loses a random half, and the outputs stay."""

import copy
import os

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from support.random_networks import BLOCKS, FIXED, RandomNetwork

from sparse_callbacks.channels.groups import channel_groups
from sparse_callbacks.channels.slim import slim

# masks are made for dense networks here
pytestmark = pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "12"))
BLOCK = st.tuples(st.integers(0, len(BLOCKS) - 1), st.integers(3, 6))


def check(blocks: list[tuple[int, int]], seed: int) -> list[str] | None:
    """Cut a network, compare it, and give the groups that had to be put back; None for a network with constant outputs."""
    net = RandomNetwork(blocks, seed).double().eval()
    draw = torch.Generator().manual_seed(seed)
    x, other = (torch.randn(n, 3, 6, 6, generator=draw, dtype=torch.float64) for n in (2, 3))
    open_ones = [g for g in channel_groups(net, x) if not g.reason]
    assert "stem.0" in {g.name for g in open_ones}
    masks: dict[str, torch.Tensor] = {}
    for group in open_ones:
        keep = torch.randperm(group.size, generator=draw) < max(group.size // 2, 1)
        for name, mask in group.masks(net, keep).items():
            masks[name] = masks.get(name, torch.ones_like(mask)) & mask
    masked = copy.deepcopy(net)
    with torch.no_grad():
        for name, mask in masks.items():
            masked.get_parameter(name).mul_(mask)
        if len(masked(x).unique(dim=0)) == 1:  # activations have left nothing of the images
            return None
        small, proof = slim(net, masks, x)
        for images in (x, other):
            torch.testing.assert_close(small(images), masked(images), rtol=1e-9, atol=1e-9)
    back = [n for n, why in proof.left_out.items() if n in {g.name for g in open_ones}]
    removed = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in small.parameters())
    assert removed > 0 or back
    return back


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(st.lists(BLOCK, min_size=1, max_size=3), st.integers(0, 1000))
def test_half_of_every_group_goes_and_only_what_code_fixes_is_put_back(
    blocks: list[tuple[int, int]], seed: int
) -> None:
    back = check(blocks, seed)
    assume(back is not None)
    event(f"put back: {back}")
    assert not back or any(BLOCKS[number] in FIXED for number, _ in blocks), back


@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=lambda n: BLOCKS[n].__name__)
def test_a_block_of_each_kind_alone(number: int) -> None:
    back = check([(number, 8)], 0)
    assert back is not None
    assert bool(back) == (BLOCKS[number] in FIXED)
