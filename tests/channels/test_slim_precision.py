"""Slimming: models that cast in their forward pass are compared in float64 all the same."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_callbacks.channels.double_precision import everything_in_double
from sparse_callbacks.channels.slim import slim, slimmable_groups

# masks are made for dense networks here
pytestmark = pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")


class Casting(nn.Module):
    """A network that computes in shorter types; ``small_error``: a factor that grows by 1 % with the number of channels."""

    def __init__(self, kind: str, small_error: bool = False) -> None:
        super().__init__()
        self.kind, self.small_error = kind, small_error
        self.first, self.last = nn.Linear(6, 32), nn.Linear(32, 3)
        self.scale = torch.tensor(2.0)  # no buffer

    def forward(self, x: Tensor) -> Any:
        if self.kind == "checked" and x.dtype != torch.float32:
            raise TypeError("float32 alone")
        h = self.first(x) * self.scale
        h = h * (1 + h.shape[1] / 3200) if self.small_error else h
        if self.kind == "weights":
            h = functional.linear(h.bfloat16(), self.last.weight.bfloat16(), self.last.bias.bfloat16())
            return h.to(x.dtype)
        if self.kind == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.last(h)
        if self.kind == "made":
            made = torch.zeros(len(x), 3, dtype=torch.float16)
            made += self.last(h)
            return made * torch.tensor([1.0, 2.0, 3.0])
        if self.kind == "reduced":
            return self.last(h).sum(0, dtype=torch.float16), self.last(h.float()).softmax(1, dtype=torch.float32)
        return self.last(h).half()


KINDS = ["weights", "autocast", "made", "reduced", "half"]


def mask() -> dict[str, Tensor]:
    return {"last.weight": torch.arange(32) >= 8}


@pytest.mark.parametrize("kind", KINDS)
def test_casts_do_not_coarsen_the_comparison(kind: str) -> None:
    torch.manual_seed(0)
    net, x = Casting(kind), torch.randn(4, 6)
    dtypes = [t.dtype for t in (net(x) if kind == "reduced" else [net(x)])]
    small, proof = slim(net, mask(), x)
    assert (small.first.out_features, proof.removed, proof.precision) == (24, 8, torch.float64)
    assert proof.checked.relative < 1e-12
    assert not proof.is_coarse
    # only the proof ran in float64
    assert [t.dtype for t in (small(x) if kind == "reduced" else [small(x)])] == dtypes


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_that_rounding_would_hide_is_found(kind: str) -> None:
    torch.manual_seed(0)
    _, proof = slim(Casting(kind, small_error=True), mask(), torch.randn(4, 6))
    assert proof.removed == 0
    assert proof.left_out["first"].startswith("without them the outputs differ by")


def test_groups_of_a_model_with_outputs_in_half_precision_are_tried_in_float64() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    assert not slimmable_groups(Casting("half"), x)[0].reason
    assert slimmable_groups(Casting("half", small_error=True), x)[0].reason.startswith(
        "without them the outputs differ"
    )


def test_a_proof_in_half_precision_says_so() -> None:
    _, proof = slim(Casting("checked"), mask(), torch.randn(4, 6))
    assert (proof.removed, proof.precision, proof.is_coarse) == (8, torch.float16, True)
    assert "compared in half precision alone, where differences up to 5% count as rounding" in str(proof)


def test_bits_of_numbers_are_not_read_in_another_type() -> None:
    with everything_in_double(), pytest.raises(TypeError, match="reads the bits of numbers"):
        torch.ones(3, dtype=torch.float64).view(torch.float32)
    assert torch.get_default_dtype() == torch.float32


def test_what_is_written_to_stays_the_same_memory() -> None:
    held = torch.zeros(2, 3)
    with everything_in_double():
        held[0] = torch.ones(3, dtype=torch.float16)
        held.view(-1)[3:].add_(2.0)
        assert torch.mm(held, torch.ones(3, 1)).dtype == torch.float64
    assert held.tolist() == [[1.0] * 3, [2.0] * 3]
    assert held.dtype == torch.float32
