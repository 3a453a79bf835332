"""A loop of your own: RigL trains a small network 90 % sparse on two spirals.

    python examples/plain_loop.py

One line before the loop, `sparsify(...)`; the loop itself is an ordinary one.
"""

import math

import torch
from torch import Tensor, nn

from sparse_callbacks import sparsify
from sparse_callbacks.methods import RigL


def spirals(points: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points [points, 2] on two spirals with a little noise, and which spiral each lies on [points]."""
    source = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (points,), generator=source)
    turn = 3 * math.pi * torch.rand(points, generator=source).sqrt()
    angle = turn + math.pi * label
    place = torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1) / 10
    return place + 0.02 * torch.randn(points, 2, generator=source), label


def main(steps: int = 2000) -> float:
    """Train, and give the accuracy on points that were not seen in training."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    run = sparsify(RigL(0.9, keep_dense="both"), model, optimizer, steps)

    x, y = spirals(2000, seed=1)
    for step in range(steps):
        batch = torch.randint(0, len(x), (128,))
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 500 == 0:
            print(f"step {step}: {run.figures()['sparsity/total']:.1%} zeros, {run.updates} updates")
    run.close()

    x, y = spirals(2000, seed=2)
    accuracy = float((model(x).argmax(1) == y).float().mean())
    print(f"accuracy {accuracy:.1%} with {run.measured_sparsity()['sparsity/total']:.1%} of the weights at zero")
    return accuracy


if __name__ == "__main__":
    main()
