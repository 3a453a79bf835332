"""Groups that are tried together: nothing is hidden by a signal that dies, or by errors that cancel."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks.channels import joint_trials
from sparse_callbacks.channels.slim import slimmable_groups


class PerChannel(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h / h.shape[1]


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def chain(width: int, depth: int, first: int = 8, last: int = 3) -> Iterator[nn.Module]:
    torch.manual_seed(0)
    yield from (nn.Linear(first, width), nn.ReLU(), PerChannel())
    for _ in range(depth):
        yield from (nn.Linear(width, width), nn.ReLU())
    yield nn.Linear(width, last)


def narrow(*layers: nn.Module) -> nn.Sequential:
    net = nn.Sequential(*layers)
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net.eval()


def wire(*layers: nn.Module) -> nn.Sequential:
    """The layers, of which all but the first read only the first unit, so that a mask of it leaves nothing of the signal."""
    net = nn.Sequential(*layers)
    with torch.no_grad():
        for place, layer in enumerate(m for m in net.modules() if isinstance(m, nn.Linear)):
            layer.weight.abs_()
            layer.bias.zero_()
            if place:
                layer.weight.zero_()[:, 0] = 1
    return net.eval()


class Cancelling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 12), nn.Linear(8, 12)
        self.reads_a, self.reads_b, self.last = nn.Linear(12, 3), nn.Linear(12, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).relu(), self.b(x).relu()
        return self.last((self.reads_a(a) / a.shape[1]) * (self.reads_b(b) * b.shape[1]))


NETS = {
    "narrow": lambda: narrow(*chain(4, 6)),
    "deep": lambda: nn.Sequential(*chain(12, 7)).eval(),
    "dead branch": lambda: narrow(Residual(*chain(4, 6, 8, 8))),
    "wire": lambda: wire(*chain(12, 6)),
    "wire in a branch": lambda: wire(Residual(*chain(12, 6, 8, 8))),
    "cancelling": lambda: Cancelling().eval(),
}


@pytest.mark.parametrize("kind", NETS)
def test_what_one_at_a_time_shows_is_found_together(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = NETS[kind](), torch.randn(16, 8)
    together = [(g.name, bool(g.reason)) for g in slimmable_groups(net, x)]
    monkeypatch.setattr(joint_trials, "TRIED_TOGETHER", 1)
    assert together == [(g.name, bool(g.reason)) for g in slimmable_groups(net, x)]
    assert together[0][1]


def test_sound_groups_take_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    blocks = [Residual(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(8)]
    net = nn.Sequential(nn.Linear(8, 32), *blocks, nn.Linear(32, 4)).eval()
    passes: list[None] = []
    # hooks run on the copies too
    net.register_forward_hook(lambda *_: passes.append(None))
    counts = []
    for together in (8, 1):
        monkeypatch.setattr(joint_trials, "TRIED_TOGETHER", together)
        assert [g.reason == "" for g in slimmable_groups(net, torch.randn(16, 8))].count(True) == 9
        counts.append(len(passes))
        passes.clear()
    # three passes for each of two trials, and three to begin with, in the place of two for each of nine groups
    assert counts[0] <= counts[1] - 9
