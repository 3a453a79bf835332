"""Reinforcement learning: a deep Q-network that stays 80 % sparse under one random mask (Static).

    python examples/dqn.py

The environment is a pole on a cart, written here in a few lines. The target network is copied after `sparsify`, so it is as
sparse as the network that it follows.
"""

import copy
import math
import random
from collections import deque

import torch
from torch import Tensor, nn

from sparse_callbacks import sparsify
from sparse_callbacks.methods import Static


class Pole:
    """A pole on a cart (Barto, Sutton and Anderson, 1983): each step that it stands gives a reward of 1."""

    def reset(self) -> Tensor:
        self.state = [random.uniform(-0.05, 0.05) for _ in range(4)]
        self.steps = 0
        return torch.tensor(self.state)

    def step(self, action: int) -> tuple[Tensor, bool]:
        place, speed, angle, turn = self.state
        push = (10.0 if action else -10.0) + 0.05 * turn**2 * math.sin(angle)
        bend = (9.8 * math.sin(angle) - math.cos(angle) * push / 1.1) / (
            0.5 * (4 / 3 - 0.1 * math.cos(angle) ** 2 / 1.1)
        )
        pull = (push - 0.05 * bend * math.cos(angle)) / 1.1
        self.state = [place + 0.02 * speed, speed + 0.02 * pull, angle + 0.02 * turn, turn + 0.02 * bend]
        self.steps += 1
        return torch.tensor(self.state), abs(self.state[0]) > 2.4 or abs(self.state[2]) > 0.21


def main(steps: int = 15000) -> float:
    """Train, and give the mean length of the last 20 episodes (200 at most)."""
    torch.manual_seed(0)
    random.seed(0)
    network = nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    run = sparsify(Static(0.8, keep_dense="both"), network, optimizer, steps)

    target = copy.deepcopy(network)  # after sparsify: it holds the same zeros
    memory: deque[tuple[Tensor, int, Tensor, bool]] = deque(maxlen=10_000)
    lengths: deque[int] = deque([0], maxlen=20)
    pole = Pole()
    state = pole.reset()
    for step in range(steps):
        explore = random.random() < max(0.05, 1 - step / (0.3 * steps))
        action = random.randrange(2) if explore else int(network(state).argmax())
        following, fell = pole.step(action)
        memory.append((state, action, following, fell))
        state = following
        if fell or pole.steps >= 200:
            lengths.append(pole.steps)
            state = pole.reset()
        batch = random.sample(memory, min(64, len(memory)))
        states, actions, followings, ends = (list(column) for column in zip(*batch, strict=True))
        with torch.no_grad():
            best = target(torch.stack(followings)).max(1).values
        wanted = 1 + 0.99 * best * ~torch.tensor(ends)
        values = network(torch.stack(states)).gather(1, torch.tensor(actions)[:, None])[:, 0]
        nn.functional.smooth_l1_loss(values, wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            target.load_state_dict(network.state_dict())
    run.close()
    length = sum(lengths) / len(lengths)
    zeros = run.measured_sparsity()["sparsity/total"]
    print(f"mean length of the last episodes: {length:.0f} of 200, with {zeros:.1%} of the weights at zero")
    return length


if __name__ == "__main__":
    main()
