"""FLOPs of one forward pass: attention under every kernel, its fast paths, recurrent layers. All counts are worked by
hand."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pack_padded_sequence

from sparse_callbacks.channels.forward_flops import ATTENTION, attention, forward_flops


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any], **settings: Any) -> None:
        super().__init__()
        self.function, self.settings = function, settings

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, **self.settings)


Case = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], dict[str, Any], int]
# shapes of queries, keys and values, settings, FLOPs: 2 x (products of the scores + products of the sums)
CASES: dict[str, Case] = {
    "4-d": ((2, 3, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8), {}, 2 * (1200 + 1200)),
    "3-d": ((2, 5, 8), (2, 5, 8), (2, 5, 8), {}, 2 * (400 + 400)),
    "2-d": ((5, 8), (7, 8), (7, 8), {}, 2 * (280 + 280)),
    "5-d": ((2, 2, 3, 5, 8), (2, 2, 3, 5, 8), (2, 2, 3, 5, 8), {}, 2 * (2400 + 2400)),
    "other length": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), {}, 2 * (1680 + 1680)),
    "other width of values": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4), {}, 2 * (1680 + 840)),
    "odd width": ((2, 3, 5, 7), (2, 3, 5, 7), (2, 3, 5, 7), {}, 2 * (1050 + 1050)),
    "shared by all": ((2, 3, 5, 8), (1, 1, 7, 8), (1, 1, 7, 8), {}, 2 * (1680 + 1680)),
    "grouped queries": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), {"enable_gqa": True}, 2 * (2240 + 2240)),
    "causal": ((2, 3, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8), {"is_causal": True}, 2 * (1200 + 1200)),
    "mask": (
        (2, 3, 5, 8),
        (2, 3, 5, 8),
        (2, 3, 5, 8),
        {"attn_mask": torch.ones(5, 5).tril().bool()},
        2 * (1200 + 1200),
    ),
    "dropout": ((2, 3, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8), {"dropout_p": 0.5}, 2 * (1200 + 1200)),
}


def inputs_of(case: str, **made: Any) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, **made) for shape in CASES[case][:3])


@pytest.mark.parametrize("around", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_both_products_of_attention_count(
    case: str, dtype: torch.dtype, around: Callable[[], AbstractContextManager[Any]]
) -> None:
    settings, expected = CASES[case][3:]
    with around():
        assert forward_flops(Calls(scaled_dot_product_attention, **settings), inputs_of(case, dtype=dtype)) == expected


@pytest.mark.parametrize(
    "kernels", [[SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]], ids=["math", "flash"]
)
@pytest.mark.parametrize("case", CASES)
def test_the_count_is_the_same_with_any_kernel(case: str, kernels: list[SDPBackend]) -> None:
    settings, expected = CASES[case][3:]
    with sdpa_kernel(kernels):
        assert forward_flops(Calls(scaled_dot_product_attention, **settings), inputs_of(case)) == expected


SETTINGS = {
    "_scaled_dot_product_efficient_attention": (None, False),
    "_scaled_dot_product_cudnn_attention": (None, False),
}
ON_META = [
    name
    for name in ATTENTION
    if name.endswith(("cudnn_attention", "efficient_attention", "flash_attention", "for_cpu"))
]


@pytest.mark.parametrize("case", ["4-d", "other length", "grouped queries"])
@pytest.mark.parametrize("name", ON_META)
def test_kernels_of_other_devices_count_too(name: str, case: str) -> None:
    kernel, expected = getattr(torch.ops.aten, name), CASES[case][4]
    net = Calls(lambda q, k, v: kernel(q, k, v, *SETTINGS.get(name, ())))
    assert forward_flops(net, inputs_of(case, device="meta")) == expected


def test_the_formula_takes_every_shape_that_is_not_broadcast() -> None:
    for case, (query, key, value, _, expected) in CASES.items():
        if case != "shared by all":  # whose leading dimensions torch makes equal before any kernel is called
            assert attention(query, key, value) == expected, case


def test_every_kernel_of_this_version_of_torch_is_known() -> None:
    names = {schema.name.removeprefix("aten::") for schema in torch._C._jit_get_all_schemas()}
    found = {n for n in names if re.fullmatch(r"_scaled_dot_product_\w*(?<!_backward)", n)}
    assert "_scaled_dot_product_flash_attention_for_cpu" in found
    assert found - {"_scaled_dot_product_attention_math"} <= set(ATTENTION)  # which torch takes apart into two products


@pytest.mark.parametrize("around", [torch.no_grad, torch.enable_grad], ids=lambda f: f.__name__)
@pytest.mark.parametrize("need_weights", [False, True])
def test_the_fast_path_of_attention_counts_as_the_slow_one(
    need_weights: bool, around: Callable[[], AbstractContextManager[Any]]
) -> None:
    net = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8)
    for mode in (True, False):
        with around():
            attended = Calls(net.train(mode), need_weights=need_weights)
            assert forward_flops(attended, (x, x, x)) == 2 * (3 * 5 * 4 * 8 * 8 + 2 * 3 * 5 * 5 * 8)
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_fast_path_of_an_encoder_counts_as_the_slow_one() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(3, 5, 8)
    each = 2 * (3 * 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 3 * 5 * 5 * 8)
    padded = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    with torch.no_grad():
        assert forward_flops(layer.eval(), x) == each
        assert forward_flops(net, x) == 2 * each
        assert (
            forward_flops(net, {"src": x, "src_key_padding_mask": padded}) == 2 * each
        )  # padding counts as any other token
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_fast_path_is_as_before_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        forward_flops(Calls(lambda x: 1 / 0), torch.zeros(1))
    assert torch.backends.mha.get_fastpath_enabled()


RECURRENT: dict[str, tuple[nn.Module, int]] = {
    "rnn": (nn.RNN(6, 4, batch_first=True), 4 * (6 + 4)),
    "gru": (nn.GRU(6, 4, batch_first=True), 3 * 4 * (6 + 4)),
    "lstm": (nn.LSTM(6, 4, batch_first=True), 4 * 4 * (6 + 4)),
    "lstm, two layers": (nn.LSTM(6, 4, 2, batch_first=True), 4 * 4 * (6 + 4) + 4 * 4 * (4 + 4)),
    "lstm, both directions": (
        nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True),
        2 * (4 * 4 * (6 + 4) + 4 * 4 * (8 + 4)),
    ),
    "lstm, projected": (nn.LSTM(6, 4, batch_first=True, proj_size=3), 4 * 4 * (6 + 3) + 4 * 3),
}


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_count_their_weights_at_each_step(
    name: str, dtype: torch.dtype, around: Callable[[], AbstractContextManager[Any]]
) -> None:
    layer, weights = RECURRENT[name]
    layer, x = layer.to(dtype), torch.randn(3, 5, 6, dtype=dtype)
    with around():
        assert forward_flops(layer, x) == 2 * 3 * 5 * weights
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(4, 4)
            self.same = self.layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.same(x)[0])[0]

    for x in (torch.randn(5, 3, 4), torch.randn(5, 3, 4, dtype=torch.float64)):
        assert forward_flops(Twice().to(x.dtype), x) == 2 * 2 * 5 * 3 * 4 * 4 * (4 + 4)


def test_of_packed_sequences_the_steps_that_they_have_count() -> None:
    packed = pack_padded_sequence(torch.randn(3, 5, 6), torch.tensor([5, 3, 2]), batch_first=True)
    assert forward_flops(nn.LSTM(6, 4), {"input": packed}) == 2 * (5 + 3 + 2) * 4 * 4 * (6 + 4)


class Queries(nn.Module):
    """A module that is called with a view of a parameter, as decoders with learnt queries are."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.layer = nn.Parameter(torch.zeros(1, 5, 4)), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.queries.expand(len(x), -1, -1))


def test_modules_may_take_views_of_parameters() -> None:
    assert forward_flops(Queries(), torch.zeros(2, 1)) == 2 * (2 * 5) * 4 * 3
