"""Constants that are proved: on inputs of other sizes, and with other masks and lengths, the slim network is the masked one."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.channel_nets import dead_rows, made, masked
from torch import Tensor, nn
from torch.nn import functional

from sparse_callbacks.channels.constant_propagation.other_sizes import other_sizes
from sparse_callbacks.channels.constant_propagation.propagation import arriving_constants
from sparse_callbacks.channels.slim import slim
from sparse_callbacks.core.inspection import map_tensors, quiet, run

pytestmark = pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")
KEEP = torch.arange(8) % 2 == 0


class Between(nn.Module):
    """A norm of which half of the gains are masked, an operation, and a reader."""

    def __init__(self, between: Callable[..., Tensor], reader: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.between, self.reader = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            between,
            reader,
        )

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.reader(self.between(self.norm(self.first(x)), *others))


def between(how: Callable[..., Tensor], reader: Callable[[], nn.Module]) -> nn.Module:
    net = made(lambda: Between(how, reader())).double()
    with torch.no_grad():
        net.norm.bias.uniform_(0.3, 1, generator=torch.Generator().manual_seed(0))
    return net


def slimmed(net: nn.Module, example: Any, *others: Any, mask: str = "norm.weight") -> tuple[int, str]:
    """How many channels go, the slim network being right on all inputs, and why others stay."""
    example, *others = (
        map_tensors(lambda t: t.double() if t.is_floating_point() else t, x) for x in (example, *others)
    )
    small, proof = slim(net, {mask: KEEP}, example)
    full = masked(net, {mask: KEEP})
    with torch.no_grad():
        for x in (example, *others):
            torch.testing.assert_close(run(small, x), run(full, x), rtol=1e-9, atol=1e-9)
    return proof.removed, proof.rows[0].reason


class Same(nn.Conv2d):
    """Padding that goes by the size, of which the module states nothing."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, (0, -x.shape[3] % 2, 0, -x.shape[2] % 2))
        return functional.conv2d(x, self.weight, self.bias, self.stride)


def padded_where_needed(x: Tensor) -> Tensor:
    return functional.pad(x, (0, 1, 0, 1)) if x.shape[3] % 2 else x


def linear() -> nn.Module:
    return nn.Linear(8, 3)


def conv() -> nn.Module:
    return nn.Conv2d(8, 3, 1)


IMAGES = (torch.randn(2, 3, 8, 8), torch.randn(3, 3, 9, 9), torch.randn(1, 3, 10, 9))
VARY: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], nn.Module], str]] = {
    "padding that goes by the size": (functional.silu, lambda: Same(8, 3, 2, 2), "constant_pad_nd in reader (Same)"),
    "padding by the size, left out where there is none": (padded_where_needed, conv, "constant_pad_nd in the forward"),
    "sum": (lambda x: x.sum((2, 3)), linear, "sum in the forward (Between)"),
    "logsumexp": (lambda x: x.flatten(2).logsumexp(2), linear, "logsumexp"),
    "norm": (lambda x: x.flatten(2).norm(dim=2), linear, "linalg_vector_norm"),
    "softmax over places": (lambda x: x.flatten(2).softmax(2).amax(2), linear, "_softmax"),
    "a number that is a size": (lambda x: x * x.shape[2], conv, "another number at another size"),
    "a number that is the batch": (lambda x: x / x.shape[0], conv, "another number at another size"),
    "a pool that counts its padding": (lambda x: functional.avg_pool2d(x, 3, 1, 1), conv, "avg_pool2d"),
    "samples outside of the image": (
        lambda x: functional.grid_sample(x, x.new_zeros(len(x), 2, 2, 2) + x.shape[2] / 9, align_corners=True),
        conv,
        "grid_sampler_2d",
    ),
    "places told apart": (lambda x: x + torch.arange(x.shape[3]) // 99, conv, "add"),
}  # fmt: skip


@pytest.mark.parametrize("kind", VARY)
def test_what_may_be_another_number_elsewhere_stays(kind: str) -> None:
    how, reader, reason = VARY[kind]
    removed, why = slimmed(between(how, reader), *IMAGES)
    assert removed == 0
    assert why.startswith("4 units stay: ")
    assert reason in why


KEPT: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], nn.Module]]] = {
    "relu, hardswish, clamp": (lambda x: functional.hardswish(x.relu()).clamp(0, 6) * 0.5 + 1, conv),
    "means over places": (lambda x: x.mean((2, 3)), linear),
    "largest over places": (lambda x: x.flatten(2).max(2).values, linear),
    "pools": (lambda x: functional.avg_pool2d(functional.max_pool2d(x, 3, 2, 1), 2, ceil_mode=True), conv),
    "a pool that leaves its padding out": (lambda x: functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False), conv),
    "adaptive pools": (lambda x: functional.adaptive_avg_pool2d(x, 2) + functional.adaptive_max_pool2d(x, 2), conv),
    "resizing": (lambda x: functional.interpolate(functional.interpolate(x, scale_factor=2, mode="bilinear"), size=5), conv),
    "places as tokens": (lambda x: x.flatten(2).transpose(1, 2), linear),
    "turned, and a part of the places": (lambda x: x.flip(3)[:, :, 1:].roll(1, 2), conv),
    "padding by reflection": (lambda x: functional.pad(x, (1, 1, 1, 1), mode="reflect"), conv),
    "in place": (lambda x: nn.functional.relu(x, inplace=True).add_(1), conv),
}  # fmt: skip


@pytest.mark.parametrize("kind", KEPT)
def test_what_stays_one_number_goes_into_the_bias(kind: str) -> None:
    assert slimmed(between(*KEPT[kind]), *IMAGES) == (4, "")


WITH_NUMBER: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "a factor": (lambda x, n: x * n.abs().amax().clamp(1, 1.0), "mul in the forward"),
    "a choice": (lambda x, n: torch.where(n.amax() > 9, x + 1, x), "where in the forward"),
    "code that reads a number": (lambda x, n: x + 1 if n.amax() > 9 else x, "_local_scalar_dense in the forward"),
    "code that reads a list": (lambda x, n: x + 1 if max(n.tolist()) > 9 else x, "tolist in the forward"),
    "code that asks for places": (lambda x, n: x + 1 if len((n > 9).nonzero()) else x, "nonzero in the forward"),
    "written in place": (lambda x, n: x.copy_(x.relu() * n[0]), "mul in the forward"),
    "written to a view": (lambda x, n: (x[:, :, 1:].mul_(n[0]), x)[1], ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", WITH_NUMBER)
def test_what_another_input_may_change_stays(kind: str) -> None:
    how, reason = WITH_NUMBER[kind]
    numbers = torch.tensor([1.0, 1.0]), torch.tensor([20.0, -3.0])
    example, other = ((IMAGES[0], n) for n in numbers)
    removed, why = slimmed(between(how, conv), example, other)
    assert removed == 0
    assert why.startswith("4 units stay: ")
    assert reason in why


def ones_and_others() -> tuple[Tensor, Tensor]:
    there = torch.ones(2, 1, 8, 8, dtype=torch.long)
    other = there.clone()
    other[:, :, 3:] = 0
    return there, other


def test_a_mask_of_ones_is_an_input_all_the_same() -> None:
    there, other = ones_and_others()
    net = between(lambda x, there: (x * there.to(x)).mean((2, 3)), linear)
    removed, reason = slimmed(net, (IMAGES[0], there), (IMAGES[0], other))
    assert (removed, "mul in the forward (Between)" in reason) == (0, True)


def test_lengths_that_are_all_full_are_inputs() -> None:
    def within(x: Tensor, lengths: Tensor) -> Tensor:
        return x.masked_fill(torch.arange(x.shape[3]) >= lengths.view(-1, 1, 1, 1), 0.0)

    removed, reason = slimmed(
        between(within, conv), (IMAGES[0], torch.tensor([8, 8])), (IMAGES[0], torch.tensor([3, 1]))
    )
    assert (removed, "masked_fill in the forward (Between)" in reason) == (0, True)


def test_sums_over_the_neighbours_of_a_ring() -> None:
    def summed(x: Tensor, to: Tensor, source: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return torch.zeros_like(x).index_add(0, to, x[source])

    ring = torch.arange(2), torch.tensor([1, 0])
    removed, reason = slimmed(
        between(summed, linear), (IMAGES[0], *ring), (IMAGES[0], torch.tensor([0, 0]), torch.tensor([1, 0]))
    )
    assert (removed, "index_add in the forward (Between)" in reason) == (0, True)


def test_one_time_step_for_one_image() -> None:
    removed, reason = slimmed(
        between(lambda x, t: x * t.to(x).view(-1, 1, 1, 1) / 10, conv),
        (IMAGES[0][:1], torch.tensor([7])),
        (IMAGES[0], torch.tensor([3, 9])),
    )
    assert (removed, "mul in the forward (Between)" in reason) == (0, True)


def test_a_sum_over_places_with_a_part_of_a_weight_goes_by_the_size() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(200, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2) @ self.weight[: x.shape[2] * x.shape[3]]

    net = between(Mixed(), lambda: nn.Conv1d(8, 3, 1)).double()
    with torch.no_grad():
        net.first.weight.zero_()
        found = arriving_constants(net, ["reader.weight"], [IMAGES[0].double()])
    assert not found["reader.weight"].proved.any()


def test_a_sum_is_a_constant_where_all_its_parts_are() -> None:
    class Sum(Between):
        def forward(self, x: Tensor, *others: Tensor) -> Tensor:
            x = self.norm(self.first(x))
            return self.reader(x.relu() + functional.max_pool2d(x, 3, 1, 1) + self.scale)

    net = between(lambda x: x, conv)
    net.__class__, net.scale = Sum, nn.Parameter(torch.ones(8, 1, 1).double())
    assert slimmed(net, *IMAGES) == (4, "")


def test_a_layer_that_is_used_twice_gets_two_constants() -> None:
    class Twice(Between):
        def forward(self, x: Tensor, *others: Tensor) -> Tensor:
            x = self.norm(self.first(x))
            return self.reader(x) * self.reader(x.exp())

    net = between(lambda x: x, conv)
    net.__class__ = Twice
    removed, reason = slimmed(net, *IMAGES)
    assert (removed, "where the layer is used again" in reason) == (0, True)


def test_zeros_pass_through_sums_products_and_padding() -> None:
    """Of a channel without weights and bias, that is; whatever it is multiplied with."""
    net = between(lambda x, there: functional.pad((x * there.to(x)), (0, 1, 2, 0)).sum((2, 3)), linear)
    there, other = ones_and_others()
    with torch.no_grad():
        net.norm.bias[~KEEP] = 0
    assert slimmed(net, (IMAGES[0], there), (IMAGES[0], other), (IMAGES[1], torch.ones(1))) == (4, "")


def test_a_buffer_that_the_forward_pass_writes_to_is_no_constant() -> None:
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
            self.register_buffer("factor", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            y = self.last((self.first(x) + 1) * self.factor)
            self.factor.copy_(x.mean())
            return y

    net = made(Moving).double()
    with torch.no_grad():
        net.first.weight.zero_()
        net.first.bias.zero_()
        found = arriving_constants(net, ["last.weight"], [torch.randn(2, 3).double()])
    assert not found["last.weight"].proved.any()


def test_inputs_of_other_sizes() -> None:
    x, ids = torch.randn(2, 3, 8, 8), torch.arange(10).view(2, 5)
    shapes = [[tuple(t.shape for t in sample) for sample in alternatives] for alternatives in other_sizes((x, ids))]
    assert shapes[:2] == [[((3, 3, 8, 8), (3, 5)), ((4, 3, 8, 8), (4, 5))], [((1, 3, 8, 8), (1, 5))]]
    assert shapes[2] == [((2, 3, 9, 9), (2, 5)), ((2, 3, 16, 16), (2, 5))]
    assert shapes[3:5] == [[((2, 3, 4, 4), (2, 5))], [((2, 3, 1, 1), (2, 5))]]
    assert shapes[5] == [((2, 3, 8, 8), (2, 6)), ((2, 3, 8, 8), (2, 10))]
    assert shapes[6:8] == [[((2, 3, 8, 8), (2, 2))], [((2, 3, 8, 8), (2, 1))]]
    assert len(shapes) == 10


class Places(nn.Module):
    """Divides by the length, of which it has places for 16 at most."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.places = nn.Embedding(50, 8), nn.Embedding(16, 8)
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.entry(ids) + self.places.weight[:length]
        return self.last(torch.relu(self.first(x)) / math.sqrt(length))


def test_a_number_that_is_another_one_at_smaller_sizes() -> None:
    torch.manual_seed(0)
    net, rows = Places().eval(), torch.arange(12) % 2 == 0
    nn.init.uniform_(net.first.bias, 0.2, 1)
    ids = torch.randint(50, (3, 16))
    _, proof = slim(net, {"first.weight": rows[:, None].expand(12, 8)}, ids)
    [why] = [row.reason for row in proof.rows if row.name == "first"]
    assert (proof.removed, "another number at another size" in why) == (0, True)
    removed, reason = slimmed(between(lambda x: x / 2 if len(x) < 2 else x, conv), IMAGES[0], IMAGES[2])
    assert (removed, "another number at another size" in reason) == (0, True)


# ---------------------------------------------------------------------- random networks

SAFE: list[Callable[[Tensor], Tensor]] = [
    functional.silu,
    torch.relu,
    lambda x: x * 2 - 1,
    lambda x: functional.max_pool2d(x, 3, 1, 1),
    lambda x: functional.avg_pool2d(x, 2, 1),
    lambda x: functional.interpolate(x, scale_factor=1.5),
    lambda x: x + x.square(),
    lambda x: torch.cat([x.relu(), x.tanh()], 1),
    lambda x: x.unflatten(1, (2, -1)).flip(4).flatten(1, 2),
    lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    lambda x: x.repeat(1, 1, 1, 2),
    lambda x: x.chunk(2, 1)[0] + x.chunk(2, 1)[1],
]
UNSAFE: list[Callable[[Tensor], Tensor]] = [
    lambda x: functional.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4)),
    lambda x: x / (x.norm(dim=(2, 3), keepdim=True) + 1),
    lambda x: x.cumsum(3),
    lambda x: x * x.softmax(3),
    lambda x: x + torch.linspace(0, 1, x.shape[3]),
    lambda x: x / x.shape[0],
    lambda x: x + x.logsumexp((2, 3), keepdim=True),
    lambda x: x - 0.1 * x.sum((2, 3), keepdim=True),
    lambda x: functional.avg_pool2d(x, 3, 1, 1),
    lambda x: x.flatten(0, 1).unsqueeze(1).relu().view_as(x),
    lambda x: torch.cat([x, x.new_ones(*x.shape[:3], 1)], 3),
    lambda x: torch.cat([x[:, :, 1:], x[:, :, :1] * 2], 2),
    lambda x: x.index_add(3, torch.arange(x.shape[3]) % 12, x.detach()),
]


class Chain(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)

        def draw(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        every = SAFE + (UNSAFE if draw(2) else [])
        self.chain = [every[draw(len(every))] for _ in range(1 + draw(4))]
        self.is_safe = all(step in SAFE for step in self.chain)
        width = self._between(torch.zeros(1, 3, 12, 12)).shape[1]
        self.padded = draw(3) == 0
        self.reader = nn.Conv2d(width, 3, 3, padding=1) if self.padded else nn.Conv2d(width, 3, 1)
        with torch.no_grad():
            self.norm.bias.uniform_(-1, 1)
            self.norm.bias[1::4] = 0

    def _between(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        for step in self.chain:
            x = step(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self._between(x))


@pytest.mark.parametrize("seed", range(60))
def test_random_networks_at_other_sizes(seed: int) -> None:
    try:
        net = Chain(seed).double().eval()
    except RuntimeError:
        pytest.skip("the drawn operations do not fit")
    slimmed(
        net, torch.randn(2, 3, 14, 14), torch.randn(1, 3, 14, 14), torch.randn(3, 3, 15, 17), torch.randn(2, 3, 19, 16)
    )


def test_what_arrives_at_layers_is_what_was_proved() -> None:
    """Also of channels that no mask has made: constants that are computed from constants."""
    net = made(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 2))
    ).double()  # fmt: skip
    x = torch.randn(2, 3, 6, 6).double()
    with torch.no_grad():
        net[0].weight[:4] = 0
        net[3].weight[:2, 4:] = 0  # two channels read constants alone
        expected = net[:3](2 * x)
        with quiet(net):
            found = arriving_constants(net, ["3.weight", "5.weight"], [x])
    assert found["3.weight"].proved.tolist() == [True] * 4 + [False] * 4
    torch.testing.assert_close(found["3.weight"].value[:4], expected[0, :4, 2, 3])
    assert found["5.weight"].proved.tolist() == [True] * 32 + [False] * 64


def test_dead_rows_behind_attention() -> None:
    """Heads of which values are zero give zeros; those whose values are constants give these, where no mask rules tokens out."""

    class Attention(nn.Module):
        def __init__(self, with_mask: bool) -> None:
            super().__init__()
            self.qkv, self.out, self.with_mask = nn.Linear(6, 48), nn.Linear(16, 3), with_mask

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
            mask = x.mean(2)[:, None, None] > -9 if self.with_mask else None
            x = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.out(x.transpose(1, 2).flatten(2))

    rows = dead_rows(8, 16).flatten()
    for with_mask, bias, expected in ((False, 1.0, 8), (True, 1.0, 0), (True, 0.0, 8)):
        net = made(lambda: Attention(with_mask)).double()  # noqa: B023
        with torch.no_grad():
            net.qkv.weight[32:][~rows] = 0
            net.qkv.bias[32:][~rows] = bias
            found = arriving_constants(net, ["out.weight"], [torch.randn(2, 5, 6).double()])
        assert int(found["out.weight"].proved.sum()) == expected


class Silent(nn.Module):
    """Units that read nothing, of which zeros are left behind a ReLU, and code that reads the input."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.skip, self.change = nn.Linear(8, 12), nn.Linear(12, 4), nn.Linear(8, 4), change

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.change(torch.relu(self.first(x)), x)) + self.skip(x)


def is_large(x: Tensor) -> bool:
    return bool(x.abs().max() > 80)


READ: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "factor": lambda h, x: (h + 1) * float(is_large(x)),
    "summand": lambda h, x: h + 0.1 * int(is_large(x)),
    "alpha": lambda h, x: torch.add(h, torch.ones(()), alpha=int(is_large(x))),
    "made tensor": lambda h, x: h + torch.full(h.shape, float(is_large(x))),
    "product with a made tensor": lambda h, x: (h + 1) * torch.full(h.shape, float(is_large(x))),
    "branch": lambda h, x: h + 1 if is_large(x) else h,
    "branch by numpy": lambda h, x: h + 1 if x.numpy().max() > 80 else h,
    "branch by dlpack": lambda h, x: h + 1 if np.from_dlpack(x).max() > 80 else h,
    "branch by a list": lambda h, x: h + 1 if max(map(max, x.tolist())) > 80 else h,
    "fill": lambda h, x: h.masked_fill(h <= 0, float(is_large(x))),
    "clamp": lambda h, x: h.clamp_min(float(is_large(x))),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_what_is_zero_by_chance_behind_values_that_were_read_stays(kind: str) -> None:
    torch.manual_seed(0)
    net, rows = Silent(READ[kind]).eval(), torch.arange(12) % 2 == 0
    nn.init.uniform_(net.first.bias, -1, -0.2)
    _, proof = slim(net, {"first.weight": rows[:, None].expand(12, 8)}, torch.randn(4, 8))
    assert (proof.removed, "runs into" in proof.rows[0].reason) == (0, True)


LAST: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a factor": lambda h, x: h * float(is_large(x)),
    "functions, products and sums of two": lambda h, x: functional.silu(h * x.mean() if is_large(x) + 1 else h) + h / 2,
    "other shapes": lambda h, x: h[: 99 - is_large(x)].unsqueeze(1).mT.contiguous().flatten(1),
}


@pytest.mark.parametrize("kind", LAST)
def test_zeros_of_parameters_last_behind_values_that_were_read(kind: str) -> None:
    torch.manual_seed(0)
    net, rows = Silent(LAST[kind]).double().eval(), torch.arange(12) % 2 == 0
    with torch.no_grad():
        net.first.bias[~rows] = 0
    masks = {"first.weight": rows[:, None].expand(12, 8)}
    x = torch.randn(4, 8).double()
    small, proof = slim(net, masks, x)
    assert proof.removed == 6
    full = masked(net, masks)
    for each in (x, 100 * x):
        torch.testing.assert_close(small(each), full(each))


def test_memory_that_code_may_write_to_is_no_constant() -> None:
    def written(h: Tensor, x: Tensor) -> Tensor:
        factor = torch.ones(12)
        factor.numpy()[:] = 1 + (len(x) > 99)
        return h * factor

    net, x = Silent(written), torch.randn(4, 8)
    with torch.no_grad():
        net.first.weight.zero_()
        net.first.bias.fill_(1)
        found = arriving_constants(net, ["last.weight"], [x])
    assert not found["last.weight"].proved.any()
