"""Slimming: what is put back and named, what is refused, and how outputs are compared."""

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.channel_nets import IMAGE, OUTPUTS, Residual, Shuffled, Transformer, grouped, made, masked, outputs
from torch import Tensor, nn

from sparse_callbacks.channels.comparison import Difference, compare, why_not_equal
from sparse_callbacks.channels.slim import slim, slimmable_groups
from sparse_callbacks.testing.comparison import differences, structure

# masks are made for dense networks here
pytestmark = pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")


def test_a_group_that_changes_the_outputs_is_put_back_and_named() -> None:
    net, x = made(Shuffled).double(), torch.randn(IMAGE, dtype=torch.float64)
    masks = {"inner.weight": torch.tensor([1, 1, 0, 1, 0, 0, 1, 0]).bool(), "last.weight": torch.arange(6) < 3}
    small, proof = slim(net, masks, x)
    assert (small.first.out_channels, small.inner.out_channels) == (8, 3)
    # what a view makes of eight channels: two blocks, none of which is dead, and four places in each
    assert set(proof.left_out) == {"first", "first, part 2", "last"}
    assert proof.left_out["first, part 2"].startswith("without them the ")
    assert torch.equal(small.first.weight, net.first.weight)
    torch.testing.assert_close(
        outputs(small, x),
        outputs(
            masked(
                net,
                {
                    "inner.weight": masks["inner.weight"].view(1, -1, 1, 1),
                    "last.weight": masks["last.weight"].view(1, -1, 1, 1),
                },
            ),
            x,
        ),
    )


def test_groups_are_tried_out_and_the_model_put_back() -> None:
    net = made(Shuffled).train()
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    before = structure(net)
    found = {g.name: g.reason for g in slimmable_groups(net, torch.randn(IMAGE))}
    assert found["first"].startswith("without them the ")
    assert not found["inner"]
    assert {**dict(net.named_parameters()), **dict(net.named_buffers())} == tensors  # by identity
    assert differences(before, structure(net)) == []
    assert all(not g.reason for g in slimmable_groups(made(grouped), torch.randn(IMAGE))[:-1])


def test_a_transformer_loses_units_of_its_mlp() -> None:
    net, x = made(Transformer).double(), torch.randn(2, 4, 6, dtype=torch.float64)
    mask = torch.arange(12) % 3 == 0
    small, proof = slim(net, {"down.weight": mask}, x)
    assert (small.up.out_features, small.down.in_features) == (4, 4)
    torch.testing.assert_close(outputs(small, x), outputs(masked(net, {"down.weight": mask}), x))
    assert proof.left_out["attention.out_proj"] == "shares channels with the network's input"


def test_excluded_groups_stay() -> None:
    small, proof = slim(made(Residual), {"outer.weight": torch.arange(6) < 3}, torch.randn(IMAGE), exclude="inner")
    assert small.inner.out_channels == 6
    assert proof.left_out["inner"] == "inner is excluded"


def test_masks_that_do_not_fit_are_refused() -> None:
    net, x = made(Residual), torch.randn(IMAGE)
    with pytest.raises(
        ValueError, match=r"masks names 'foo.weight', and the model has no such parameter. There are for example stem.w"
    ):
        slim(net, {"foo.weight": torch.ones(3)}, x)
    with pytest.raises(
        ValueError, match=r"mask of outer.weight has shape \[1, 5, 1, 1\] and the parameter \[8, 6, 3, 3\]"
    ):
        slim(net, {"outer.weight": torch.ones(5)}, x)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, "masks= is empty, so no channel is dead"),
        ({"outer.weight": torch.rand(6)}, r"not of bool but of torch.float32.*Give `mask != 0`"),
        ({"outer.weight": torch.ones(6, dtype=torch.int64)}, r"not of bool but of torch.int64"),
    ],
)
def test_what_is_not_a_bool_mask_is_refused(masks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slim(made(Residual), masks, torch.randn(IMAGE))


def test_a_mask_that_is_not_a_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match=r"masks=.*Give a mapping from a text to a tensor"):
        slim(made(Residual), {"outer.weight": [True] * 6}, torch.randn(IMAGE))


@pytest.mark.parametrize("zeroed", [False, True])
def test_masks_that_cut_weights_are_spoken_of(zeroed: bool) -> None:
    """The proof is about the masked model, which is not the given one where other weights were loaded since."""
    net, mask = made(Residual), torch.arange(6) < 3
    if zeroed:
        with torch.no_grad():
            net.outer.weight.mul_(mask[:, None, None])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _, proof = slim(net, {"outer.weight": mask}, torch.randn(IMAGE))
    words = [str(w.message) for w in seen if "cut weights" in str(w.message)]
    assert len(words) == (not zeroed)
    assert zeroed or "are not zero (216 of outer.weight)" in words[0]
    assert proof.cut == (0 if zeroed else 216)
    assert ("216 weights that were not zero" in str(proof)) == (not zeroed)


def test_outputs_that_are_not_finite_prove_nothing() -> None:
    net = made(Residual)
    with torch.no_grad():
        net.head.bias[0] = float("nan")
    with pytest.raises(ValueError, match="gives NaN, or no finite outputs, in eval mode"):
        slim(net, {"outer.weight": torch.arange(6) < 3}, torch.randn(IMAGE))


def test_outputs_that_never_change_prove_nothing() -> None:
    with pytest.raises(ValueError, match="gives the same outputs for different random inputs"):
        slim(made(Residual), {"head.weight": torch.zeros(1, dtype=torch.bool)}, torch.randn(IMAGE))


def test_a_network_that_does_not_run_in_float64_is_compared_in_its_own_precision() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise TypeError("float32 alone")
            return self.last(self.first(x))

    small, proof = slim(Single(), {"last.weight": torch.arange(6) < 3}, torch.randn(2, 4))
    assert small.first.out_features == 3
    assert proof.precision == torch.float32
    assert "outputs in float32:" in str(proof)
    assert 0 <= proof.checked.relative < 1e-5


@dataclass
class Found:
    label: Tensor
    logits: Tensor


class Counted(nn.Module):
    """A factor that depends on the number of channels, which no trace sees; labels first, and a copy of the channels if
    asked."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.inner, self.last = nn.Linear(6, 32), nn.Linear(32, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> object:
        h = self.first(x)
        z = self.last(self.inner(h * h.shape[1] if self.kind != "record" else h).relu())
        label = z.argmax(1)
        if self.kind == "record":
            return label, Found(z, h)
        return (label, z) if self.kind == "integer" else (z.half(), z)


@pytest.mark.parametrize("kind", ["integer", "half", "record"])
def test_every_output_is_compared_in_float64(kind: str) -> None:
    torch.manual_seed(0)
    mask = torch.ones(32, dtype=torch.bool)
    mask[[3, 7]] = False
    _, proof = slim(Counted(kind), {"inner.weight": mask}, torch.randn(4, 6))
    assert proof.removed == 0
    assert proof.precision == torch.float64
    assert proof.left_out["first"].startswith("without them the outputs differ by" if kind != "record" else OUTPUTS)


def test_mismatches_are_judged_tensor_by_tensor() -> None:
    one, whole = torch.tensor([1.0, 2.0]), torch.tensor([100, 1])
    assert why_not_equal([one], [one + 1e-5]) == ""
    assert why_not_equal([one.half()], [one.half() + 0.01]) == ""
    assert why_not_equal([one], [one + 1e-3]) == "outputs differ by 5.0e-04 (relative)"
    assert why_not_equal([one.double()], [one.double() + 1e-5]).startswith("outputs differ by 5")
    assert why_not_equal([one.half(), whole], [one.half(), whole + 1]) == "outputs differ by 1.0e-02 (relative)"
    assert why_not_equal([one.half(), one], [one.half(), one + 0.01]) == "outputs differ by 5.0e-03 (relative)"
    assert why_not_equal([one], [one, one]) == "outputs are 2 in the place of 1"
    assert why_not_equal([one], [one + 1e-3], tolerance=1e-2) == ""
    assert why_not_equal([whole], [whole + 1], tolerance=1.0) != ""
    assert why_not_equal([one * 1j], [one * 1j + 1]) == "outputs differ by 5.0e-01 (relative)"


def test_a_fill_is_no_scale() -> None:
    logits = torch.tensor([0.1, -0.2, -1e9, 0.05], dtype=torch.float64)
    assert why_not_equal([logits], [logits + torch.tensor([1e-3, 0, 0, 0])]).startswith("outputs differ by 5")
    assert why_not_equal([logits], [logits + torch.tensor([0, 0, 1e3, 0])]) != ""
    assert why_not_equal([logits], [logits.clone()]) == ""


class Raw(nn.Module):
    """Parameters of its own in the place of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shift = nn.Parameter(torch.randn(16, 4)), nn.Parameter(torch.randn(16))
        self.last = nn.Parameter(torch.randn(3, 16))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.first, self.shift).relu(), self.last)


def test_units_that_nothing_makes_stay_where_no_layer_reads_them() -> None:
    net, x, half = made(Raw), torch.randn(5, 4), torch.arange(16) % 2 == 0
    _, proof = slim(net, {"first": half[:, None].expand(16, 4)}, x)
    assert proof.left_out["first"].startswith(
        "8 units that nothing makes stay: last (Raw) reads them, and constants go into"
    )
    small, proof = slim(net, {"last": half.expand(3, 16)}, x)
    assert (proof.removed, small.first.shape) == (8, (8, 4))


class Barred(nn.Module):
    """One of four classes is impossible."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu()).masked_fill(torch.arange(4) == 1, float("-inf"))


def test_outputs_may_be_infinite_where_they_always_are() -> None:
    _, proof = slim(Barred(), {"last.weight": torch.arange(8) < 5}, torch.randn(2, 6))
    assert proof.removed == 3
    assert proof.checked.relative < 1e-12


def test_groups_that_are_right_are_compared_together_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    net, x = made(Residual), torch.randn(5, *IMAGE[1:])
    original = Residual.forward

    def counted(self: Residual, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            sizes.append(len(x))
        return original(self, x)

    monkeypatch.setattr(Residual, "forward", counted)
    masks = {
        "inner.weight": torch.arange(8) < 6,
        "head.weight": torch.arange(8) < 6,
        "outer.weight": torch.arange(6) < 3,
    }
    assert slim(net, masks, x)[1].removed == 5
    assert sizes.count(1) == 1  # whether one is taken; it is asked only where the whole batch shows a difference
    # whether float64 is taken, and on that sample the first outputs; two more samples; and three with all groups cut
    assert sizes.count(5) == 6


def test_given_inputs_are_compared_too() -> None:
    """A switch that only real data throws: on it a channel is read that is dead otherwise."""

    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(h) + (h.sum(1, keepdim=True) if x[0, 0] > 50 else 0)

    mask, x = {"last.weight": torch.arange(6) < 3}, torch.zeros(1, 4)
    torch.manual_seed(0)
    net = Switch()
    assert slim(net, mask, x)[1].removed == 3
    assert slim(net, mask, x, inputs=[x + 99])[1].removed == 0


def test_differences_of_outputs() -> None:
    one = [torch.tensor([1.0, -4.0])]
    assert compare(one, [torch.tensor([1.5, -4.0])]) == Difference(0.5, 0.125)
    assert compare(one, [torch.tensor([1.0, float("nan")])]).relative == float("inf")
    assert compare(one, [torch.zeros(3)]).relative == float("inf")
    assert compare([torch.zeros(2)], [torch.zeros(2)]) == Difference(0.0, 0.0)
    endless = [torch.tensor([1.0, float("-inf"), float("nan")])]
    assert compare(endless, [torch.tensor([1.5, float("-inf"), float("nan")])]) == Difference(0.5, 0.5)
    assert compare(endless, [torch.tensor([1.0, float("inf"), float("nan")])]).relative == float("inf")
    assert compare([endless[0][1:]], [endless[0][1:]]) == Difference(0.0, 0.0)
