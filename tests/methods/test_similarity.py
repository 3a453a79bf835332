"""Cosines of activations, and their sums over batches, dtypes and geometries."""

import math
from typing import Any

import pytest
import torch
from oracles.ctre import COSINE, COSINE_SOFTMAX_OUTPUT
from support.similarities import close, similarities
from torch import Tensor, nn

from sparse_callbacks.methods.ctre.similarity import (
    CosineSums,
    add_batch,
    as_probabilities,
    cosine_similarity,
    empty_sums,
)


def test_cosines_as_in_the_reference() -> None:
    source = torch.tensor(COSINE["source_activations"], dtype=torch.float64)
    target = torch.tensor(COSINE["target_activations"], dtype=torch.float64)
    layer = nn.Linear(4, 3).double()
    sums = empty_sums(layer, layer.weight)
    add_batch(sums, layer, source, target)
    assert cosine_similarity(sums).T.tolist() == [
        pytest.approx(row, abs=1e-11) for row in COSINE["similarity"]
    ]  # 12 digits are given


def test_the_output_layer_counts_with_probabilities_as_in_the_reference() -> None:
    source = torch.tensor(COSINE_SOFTMAX_OUTPUT["source_activations"], dtype=torch.float64)
    target = torch.tensor(COSINE_SOFTMAX_OUTPUT["target_logits"], dtype=torch.float64)
    layer = nn.Linear(2, 2, bias=False).double()
    layer.weight.data = torch.linalg.lstsq(source, target).solution.T  # not exact: so the logits are given by hand
    expected = [pytest.approx(row, abs=1e-9) for row in COSINE_SOFTMAX_OUTPUT["similarity"]]  # 10 digits are given
    sums = empty_sums(layer, layer.weight)
    add_batch(sums, layer, source, as_probabilities(target, 1))
    assert cosine_similarity(sums).T.tolist() == expected

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).copy_(target)

    assert similarities(Given(), source)["layer.weight"].T.tolist() == expected


def test_two_halves_sum_up_to_the_whole_and_their_cosines_do_not() -> None:
    torch.manual_seed(0)
    layer, x, a = nn.Linear(5, 4), torch.randn(20, 5), torch.randn(20, 4)
    whole, halves = empty_sums(layer, layer.weight), [empty_sums(layer, layer.weight) for _ in range(2)]
    add_batch(whole, layer, x, a)
    for half, part in zip(halves, (slice(0, 7), slice(7, 20)), strict=True):
        add_batch(half, layer, x[part], a[part])
    merged = CosineSums(*(sum(pair) for pair in zip(*(h.tensors() for h in halves), strict=True)))
    averaged = sum(cosine_similarity(h) for h in halves) / 2
    expected = cosine_similarity(whole)
    assert close(cosine_similarity(merged), expected)
    assert not close(averaged, expected)


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_a_neuron_without_a_signal_is_like_no_other(bad: float) -> None:
    layer = nn.Linear(3, 2)
    sums = empty_sums(layer, layer.weight)
    x = torch.ones(4, 3)
    x[:, 1] = bad
    add_batch(sums, layer, x, torch.ones(4, 2))
    assert cosine_similarity(sums).tolist() == [pytest.approx([1, 0, 1])] * 2


def test_a_tiny_activation_counts_with_the_smallest_norm() -> None:
    layer = nn.Linear(2, 1).double()
    sums = empty_sums(layer, layer.weight)
    add_batch(sums, layer, torch.tensor([[1e-8, 1.0]] * 4), torch.ones(4, 1))
    assert cosine_similarity(sums).tolist() == [pytest.approx([4e-8 / (1e-6 * 2), 1.0])]  # and not 1 for both
    sums = empty_sums(layer, layer.weight)
    add_batch(sums, layer, torch.ones(4, 2), torch.full((4, 1), 1e-8))
    assert cosine_similarity(sums).tolist() == [pytest.approx([4e-8 / (1e-6 * 2)] * 2)]


def test_sums_are_as_wide_as_they_must_be() -> None:
    for dtype, wide in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        layer = nn.Linear(3, 2).to(dtype)
        sums = empty_sums(layer, layer.weight)
        add_batch(sums, layer, torch.full((4096, 3), 2.0, dtype=dtype), torch.ones(4096, 2, dtype=dtype))
        assert sums.dots.dtype == wide
        assert sums.rows.dtype == sums.columns.dtype == torch.float64
        assert sums.dots.tolist() == [[8192.0] * 3] * 2
        assert sums.columns.tolist() == [[16384.0] * 3]


CONVOLUTIONS: list[tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = [
    (nn.Conv1d, (9,), {"kernel_size": 3}),
    (nn.Conv2d, (7, 6), {"kernel_size": 3, "padding": 1}),
    (nn.Conv2d, (8, 7), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 0), "dilation": (1, 2)}),
    (nn.Conv2d, (7, 7), {"kernel_size": 3, "stride": 2, "groups": 2}),
    (nn.Conv2d, (7, 7), {"kernel_size": 3, "padding": "same"}),
    (nn.Conv2d, (6, 7), {"kernel_size": 2, "padding": "same", "padding_mode": "reflect"}),
    (nn.Conv2d, (7, 7), {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    (nn.Conv3d, (4, 5, 4), {"kernel_size": 2}),
    (nn.ConvTranspose1d, (5,), {"kernel_size": 3}),
    (nn.ConvTranspose2d, (4, 5), {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "groups": 2}),
]


def pairs(layer: nn.Module, x: Tensor, a: Tensor) -> Tensor:
    """Similarity of a kernel, one weight at a time: its samples are found by a layer with that weight alone."""
    found = torch.zeros_like(layer.weight)
    for index in torch.cartesian_prod(*(torch.arange(s) for s in found.shape)):
        at = tuple(index.tolist())
        with torch.no_grad():
            layer.weight.zero_()[at] = 1
        seen = layer(x)  # what this weight alone passes on, at every position of the output
        row = next(o for o in range(seen.shape[1]) if seen[:, o].any())
        one, other = seen[:, row].flatten(), a[:, row].flatten()
        if isinstance(
            layer, nn.ConvTranspose1d | nn.ConvTranspose2d
        ):  # positions that it does not reach are no samples
            reached = layer(torch.ones_like(x))[:, row].flatten() != 0
            one, other = x[:, at[0]].flatten(), other[reached]
            if one.shape != other.shape:
                found[at] = math.nan  # at the border some inputs reach nothing
                continue
        found[at] = (one @ other).abs() / (one.norm() * other.norm())
    return found


@pytest.mark.parametrize(("kind", "space", "options"), CONVOLUTIONS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_positions_are_the_samples_of_a_kernel(kind: Any, space: tuple[int, ...], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = kind(4, 6, bias=False, **options).double()
    x = torch.rand(3, 4, *space, dtype=torch.float64) + 0.1
    a = torch.randn_like(layer(x).detach())
    sums = empty_sums(layer, layer.weight)
    for part in (slice(0, 1), slice(1, 3)):
        add_batch(sums, layer, x[part], a[part])
    found, expected = cosine_similarity(sums), pairs(layer, x, a).detach()
    known = expected.isfinite()
    assert known.any()
    assert found.shape == layer.weight.shape
    assert torch.allclose(found[known], expected[known], atol=1e-12)


def test_one_image_without_a_batch_dimension() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(2, 3, 3), torch.randn(2, 6, 6)
    one, other = empty_sums(layer, layer.weight), empty_sums(layer, layer.weight)
    a = layer(x).detach()
    add_batch(one, layer, x, a)
    add_batch(other, layer, x[None], a[None])
    assert torch.equal(cosine_similarity(one), cosine_similarity(other))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([[1.0, 2.0], [0.0, 0.0]], torch.tensor([[1.0, 2.0], [0.0, 0.0]]).softmax(1).tolist()),
        ([[0.25, 0.75], [1.0, 0.0]], [[0.25, 0.75], [1.0, 0.0]]),
        ([[3.0], [-2.0]], [[3.0], [-2.0]]),
        (
            [[-1.0, 2.0], [0.5, 0.5]],
            torch.tensor([[-1.0, 2.0], [0.5, 0.5]]).softmax(1).tolist(),
        ),  # sums of one, but a negative
    ],
)
def test_probabilities_stay_and_logits_become_some(given: list[list[float]], expected: list[list[float]]) -> None:
    assert as_probabilities(torch.tensor(given), 1).tolist() == [pytest.approx(row) for row in expected]
