"""A network whose layers take as many milliseconds as they have weights, so that tables need no clock."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sparse_callbacks.channels.latency import measure as measuring


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c, self.d = nn.Conv2d(8, 12, 3, stride=2, groups=4), nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.e = nn.Linear(6, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.e(self.d(self.c(self.b(self.a(x)))).mean((2, 3)))


def by_weights(monkeypatch: pytest.MonkeyPatch, whole: Callable[[float], float] = lambda ms: ms) -> list[list[int]]:
    """A layer takes as many milliseconds as it has weights, biases aside, and a :class:`Net` what ``whole`` makes of
    that; gives the list of what was measured together."""
    seen: list[list[int]] = []

    def count(calls: Any, repeats: int, devices: Any) -> list[float]:
        seen.append([])
        times = []
        for call in calls:
            call()  # it must run
            module = next(c.cell_contents for c in call.__closure__ if isinstance(c.cell_contents, nn.Module))
            seen[-1].append(
                sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd))
            )
            times.append(whole(seen[-1][-1]) if isinstance(module, Net) else float(seen[-1][-1]))
        return times

    monkeypatch.setattr(measuring, "milliseconds", count)
    return seen
