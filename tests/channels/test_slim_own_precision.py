"""Models whose forward pass goes by the type of its tensors: what float64 shows is not what they compute."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks.channels import own_precision
from sparse_callbacks.channels.own_precision import exceeded_limit, refuse_differing
from sparse_callbacks.channels.proof import Compared
from sparse_callbacks.channels.slim import slim

# masks are made for dense networks here
pytestmark = pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")

ROWS = (torch.arange(12) % 2 == 0)[:, None]


def half_flush(h: Tensor) -> Tensor:
    return (h.half() * 1e-9).to(h.dtype) * 1e9


def by_width_in_float32(h: Tensor) -> Tensor:
    return h / h.shape[1] if h.dtype == torch.float32 else h


CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "eps": lambda h: torch.log(h.clamp_min(torch.finfo(h.dtype).eps)),
    "tiny": lambda h: torch.log(h + torch.finfo(h.dtype).tiny),
    "half": half_flush,
}


class Net(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor], low: float = -1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.skip = nn.Linear(8, 12), nn.Linear(12, 4), nn.Linear(8, 4)
        self.between = between
        nn.init.uniform_(self.first.bias, low, low + 0.8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x).relu())) + self.skip(x)


def masked(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        net.first.weight.mul_(ROWS)
    return net.eval()


@pytest.mark.parametrize("kind", CONSTANTS)
def test_constants_are_those_of_the_models_own_precision(kind: str) -> None:
    net, x = masked(Net(CONSTANTS[kind], low=0.2 if kind == "half" else -1.0)), torch.randn(4, 8)
    small, proof = slim(net, {"first.weight": ROWS}, x)
    assert (small(x) - net(x)).abs().max() <= 1e-5 * net(x).abs().max()
    assert proof.given.relative < 1e-5
    assert proof.precision == torch.float32
    if kind != "half":
        assert proof.removed == 6


def test_a_group_that_only_counts_in_the_models_own_precision_stays() -> None:
    net, x = Net(by_width_in_float32).eval(), torch.randn(4, 8)
    small, proof = slim(net, {"last.weight": ROWS.T}, x)
    assert proof.removed == 0
    assert "outputs differ" in proof.left_out["first"]
    assert small.first.out_features == 12


def test_rounding_is_told_from_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Net(lambda h: h).eval(), torch.randn(4, 8)
    y = net(x).detach()
    large = Compared(([y], [y * 1.001]), ([y], [y]))
    assert exceeded_limit(net, [x], large) == {torch.float32: 1e-4}
    # a model that computes in half precision inside rounds by more than that
    assert exceeded_limit(Net(lambda h: h.bfloat16().float()).eval(), [x], large) is None
    # what is equal costs no pass
    monkeypatch.setattr(own_precision, "_effect_of_rounding", lambda *_: pytest.fail("a pass that nothing asks for"))
    assert exceeded_limit(net, [x], Compared(([y], [y * 1.00001]), ([y], [y]))) is None


def test_labels_on_the_edge_are_no_error() -> None:
    net, x = Net(lambda h: h).eval(), torch.randn(4, 8)
    assert exceeded_limit(net, [x], Compared(([torch.tensor([1])], [torch.tensor([2])]), ([], []))) is None


def test_what_still_differs_is_refused() -> None:
    y = torch.ones(3)
    with pytest.raises(ValueError, match=r"In the precision of the model the outputs differ .*torch.finfo"):
        refuse_differing(Compared(([y], [y]), ([y], [y + 1])), {torch.float32: 1e-4})
    refuse_differing(Compared(([y], [y]), ([y], [y])), {torch.float32: 1e-4})
