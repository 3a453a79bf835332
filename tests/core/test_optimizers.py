"""What the package does to the state of torch optimizers."""

import pytest
import torch

from sparse_callbacks.core import optimizers
from sparse_callbacks.core.fresh_state import FreshState


def trained(make, lift, steps=150):
    """Parameter and optimizer after `steps` with masked gradients; pruned state lifted after every tenth step, or
    never."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(40, 30, generator=generator) < 0.3
    weight = torch.nn.Parameter(torch.randn(40, 30, generator=generator) * mask)
    optimizer = make([weight])
    for step in range(steps):
        weight.grad = torch.randn(40, 30, generator=generator) * mask
        optimizer.step()
        if lift and step % 10 == 1:
            optimizers.avoid_slow_square_roots(optimizer, FreshState(optimizer), weight, ~mask)
        with torch.no_grad():
            weight.mul_(mask)
    return weight.detach(), mask, {k: v for k, v in optimizer.state[weight].items() if v.shape == weight.shape}


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adagrad,
        torch.optim.Adamax,
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ],
)
def test_lifted_roots_leave_weights_and_active_state_bitwise_alone(make):
    plain, mask, plain_state = trained(make, lift=False)
    lifted, _, lifted_state = trained(make, lift=True)
    assert torch.equal(plain, lifted)
    for key, value in plain_state.items():
        assert torch.equal(value[mask], lifted_state[key][mask])


@pytest.mark.parametrize(
    ("make", "lifts"), [(torch.optim.AdamW, True), (lambda p: torch.optim.AdamW(p, fused=True), False)]
)
def test_roots_are_lifted_where_the_root_is_slow(make, lifts):
    _, mask, state = trained(make, lift=True)
    assert bool((state["exp_avg_sq"][~mask] > torch.finfo(torch.float32).tiny).all()) == lifts
