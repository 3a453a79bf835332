"""SlimAttention computes what nn.MultiheadAttention does, with any number of heads, and takes its place in networks."""

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks import SlimAttention
from sparse_callbacks.channels.attention_exchange import put_back_attention, put_slim_attention

N, L, S, EMBED, HEADS = 2, 5, 4, 16, 4
EXACT = {"rtol": 0, "atol": 1e-12}  # float64; torch adds in another order in its fused kernels
ARGUMENTS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True, "dropout": 0.3},
    "kdim": {"kdim": 7, "vdim": 10},
    "dropout": {"dropout": 0.4},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def filled(module: nn.Module) -> nn.Module:
    """In float64 and with biases that are not zero."""
    module = module.double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    return module


def masks_for(shapes: tuple[int, int, int], kind: str, batched: bool) -> dict[str, Tensor | bool]:
    n, length, keys = shapes
    padding = torch.zeros(n, keys, dtype=torch.bool)
    padding[0, -1] = True
    causal = torch.triu(torch.ones(length, keys, dtype=torch.bool), 1)
    padding = padding if batched else padding[0]
    heads = (n if batched else 1) * HEADS
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn_like(padding, dtype=torch.float64)},
        "pairs": {"attn_mask": causal},
        "float pairs": {"attn_mask": torch.randn(length, keys).double()},
        "each head": {"attn_mask": torch.randn(heads, length, keys).double()},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal and padding": {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding},
    }[kind]


MASKS = [
    "none",
    "padding",
    "float padding",
    "pairs",
    "float pairs",
    "each head",
    "both",
    "causal",
    "causal and padding",
]


@pytest.mark.combinations
@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_it_computes_what_torchs_attention_does(arguments: str, kind: str, itself: bool) -> None:
    made = ARGUMENTS[arguments]
    for batch_first, training, need_weights, average, batched in itertools.product([True, False], repeat=5):
        if (itself and "kdim" in made) or (average and not need_weights):
            continue
        reference = filled(nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first, **made)).train(training)
        slim = SlimAttention.from_attention(reference)
        keys = L if itself else S
        sizes = [(L, EMBED), (keys, reference.kdim), (keys, reference.vdim)]
        query, key, value = (torch.randn(N, *size).double() for size in sizes)
        if itself:
            key = value = query
        inputs = [query, key, value] if batched else [x[0] for x in (query, key, value)]
        if batched and not batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        if itself:
            inputs = [inputs[0]] * 3
        options = masks_for((N, L, keys), kind, batched)
        results = []
        # without gradients torch takes its fast path where there is one
        for module, mode in [(reference, torch.no_grad()), (reference, nullcontext()), (slim, nullcontext())]:
            torch.manual_seed(1)  # dropout draws the same numbers in the same order
            with mode:
                results.append(module(*inputs, need_weights=need_weights, average_attn_weights=average, **options))
        for expected in results[:2]:
            for wanted, found in zip(expected, results[2], strict=True):
                assert (wanted is None) == (found is None) == (wanted is not expected[0] and not need_weights)
                if wanted is not None:
                    torch.testing.assert_close(found, wanted, **EXACT)


def test_it_shares_the_very_parameters() -> None:
    for made in ARGUMENTS.values():
        attention = nn.MultiheadAttention(EMBED, HEADS, **made).eval()
        slim = SlimAttention.from_attention(attention)
        before, after = dict(attention.named_parameters()), dict(slim.named_parameters())
        assert list(before) == list(after)
        assert all(before[n] is after[n] for n in before)
        assert not slim.training
        assert slim.num_heads == HEADS
        assert slim.dropout == attention.dropout
        # and loads its state
        fresh = SlimAttention(EMBED, HEADS, **made)
        fresh.load_state_dict(attention.state_dict())
        assert torch.equal(fresh.out_proj.weight, attention.out_proj.weight)


def test_initial_weights_have_the_distribution_of_torchs() -> None:
    for made in ({}, {"kdim": 7, "add_bias_kv": True}):
        torch.manual_seed(3)
        reference = nn.MultiheadAttention(60, 3, **made)
        torch.manual_seed(3)
        slim = SlimAttention(60, 3, **made)
        for name, p in slim.named_parameters():
            other = reference.get_parameter(name)
            assert p.shape == other.shape
            torch.testing.assert_close(p.std(), other.std(), rtol=0.2, atol=0.0)


def without_head(slim: SlimAttention, head: int) -> None:
    """Cut one head out of all of its weights."""
    size, heads = slim.head_dim, slim.num_heads
    keep = (torch.arange(heads * size) // size) != head
    for name, p in list(slim.named_parameters(recurse=False)):
        dim = p.ndim - 1 if name.startswith("bias_") else 0
        kept = keep.repeat(p.shape[dim] // len(keep))
        slim.register_parameter(name, nn.Parameter(p.detach().index_select(dim, kept.nonzero()[:, 0])))
    slim.out_proj.weight = nn.Parameter(slim.out_proj.weight.detach()[:, keep])


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_a_head_that_is_cut_is_a_head_that_is_masked(arguments: str) -> None:
    attention = filled(nn.MultiheadAttention(EMBED, HEADS, **ARGUMENTS[arguments])).eval()
    query, key, value = (torch.randn(L, N, size).double() for size in (EMBED, attention.kdim, attention.vdim))
    cut = SlimAttention.from_attention(attention)
    with torch.no_grad():
        attention.out_proj.weight[:, 4:8] = 0
    expected, every = attention(query, key, value, average_attn_weights=False)
    without_head(cut, 1)
    found, weights = cut(query, key, value, average_attn_weights=False)
    assert "num_heads=3, head_dim=4" in repr(cut)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(weights, every[:, [0, 2, 3]], **EXACT)
    torch.testing.assert_close(cut(query, key, value, need_weights=False)[0], expected, **EXACT)
    # copies and pickles keep the heads
    torch.testing.assert_close(copy.deepcopy(cut)(query, key, value)[0], expected, **EXACT)


LEFT = [0, 2, 3]
OPTIONS = {
    "plain": {},
    "no weights": {"need_weights": False},
    "every head's weights": {"average_attn_weights": False},
    "bool padding": {"key_padding_mask": torch.arange(S) >= torch.tensor([[4], [2]])},
    "float padding": {"key_padding_mask": torch.linspace(-2, 1, N * S).double().view(N, S)},
    "bool pairs": {"attn_mask": torch.arange(S) > torch.arange(L).view(L, 1)},
    "float pairs": {"attn_mask": torch.linspace(-1, 1, L * S).double().view(L, S)},
    "each head": {"attn_mask": torch.linspace(-1, 1, N * HEADS * L * S).double().sin().view(N * HEADS, L, S)},
    "bool each head": {"attn_mask": (torch.arange(N * HEADS * L * S) % 3 == 1).view(N * HEADS, L, S)},
    "causal": {"attn_mask": torch.arange(S) > torch.arange(L).view(L, 1), "is_causal": True, "need_weights": False},
    "both": {
        "attn_mask": torch.arange(S) > torch.arange(L).view(L, 1),
        "key_padding_mask": torch.arange(S) >= torch.tensor([[4], [2]]),
        "need_weights": False,
    },
}


@pytest.mark.combinations
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("arguments", [a for a in ARGUMENTS if "dropout" not in ARGUMENTS[a]], ids=str)
def test_heads_that_are_left_learn_what_they_learn_beside_a_masked_one(
    arguments: str, options: str, training: bool
) -> None:
    for batch_first, batched in itertools.product([True, False], repeat=2):
        torch.manual_seed(0)
        whole = filled(nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first, **ARGUMENTS[arguments])).train(
            training
        )
        with torch.no_grad():
            whole.out_proj.weight[:, 4:8] = 0
        cut = SlimAttention.from_attention(copy.deepcopy(whole))
        without_head(cut, 1)
        given = dict(OPTIONS[options])
        inputs = [torch.randn(N, n, c).double() for n, c in ((L, EMBED), (S, whole.kdim), (S, whole.vdim))]
        if not batched:
            inputs = [x[0] for x in inputs]
            if "key_padding_mask" in given:
                given["key_padding_mask"] = given["key_padding_mask"][0]
        elif not batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        results = []
        for module in (whole, cut):
            mine, own = dict(given), [x.clone().requires_grad_() for x in inputs]
            if given.get("attn_mask", inputs[0][0]).ndim == 3:  # one matrix for each head that there is
                mask = given["attn_mask"].view(N, HEADS, L, S)[: N if batched else 1]
                mine["attn_mask"] = (mask if module is whole else mask[:, LEFT]).flatten(0, 1)
            out, weights = module(*own, **mine)
            out.sin().sum().backward()
            results.append((out, weights, [x.grad for x in own], module))
        (expected, every, of_inputs, _), (out, weights, found, _) = results
        torch.testing.assert_close(out, expected, **EXACT)
        torch.testing.assert_close(found, of_inputs, **EXACT)
        if every is None:
            assert weights is None
        elif given.get("average_attn_weights", True):
            # the mean over the heads that there are, not over those that there were
            again = whole(*inputs, **{**_of_whole(given, batched), "average_attn_weights": False})[1]
            torch.testing.assert_close(weights, again[..., LEFT, :, :].mean(-3), **EXACT)
        else:
            torch.testing.assert_close(weights, every[..., LEFT, :, :], **EXACT)
        rows = torch.cat([torch.arange(4), torch.arange(8, 16)])
        torch.testing.assert_close(cut.out_proj.weight.grad, whole.out_proj.weight.grad[:, rows], **EXACT)
        for name, parameter in cut.named_parameters(recurse=False):
            dim = parameter.ndim - 1 if name.startswith("bias_") else 0
            times = whole.get_parameter(name).shape[dim] // EMBED
            kept = torch.cat([rows + EMBED * time for time in range(times)])
            wanted = whole.get_parameter(name).grad.index_select(dim, kept)
            torch.testing.assert_close(parameter.grad, wanted, **EXACT)


def _of_whole(given: dict[str, object], batched: bool) -> dict[str, object]:
    mask = given.get("attn_mask")
    if mask is None or mask.ndim == 2:
        return given
    return {**given, "attn_mask": mask if batched else mask[:HEADS]}


@pytest.mark.parametrize("arguments", ["plain", "bias_kv", "zero_attn"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_queries_without_any_key_give_what_torch_gives(need_weights: bool, arguments: str) -> None:
    """NaN with weights and numbers without; only torch's kernel of eval mode without gradients gives NaN in both cases."""
    attention = filled(nn.MultiheadAttention(EMBED, HEADS, batch_first=True, **ARGUMENTS[arguments])).eval()
    slim, x = SlimAttention.from_attention(attention), torch.randn(3, L, EMBED).double()
    padding, pairs = torch.zeros(3, L, dtype=torch.bool), torch.zeros(L, L, dtype=torch.bool)
    padding[1], pairs[2] = True, True
    masks = [{"key_padding_mask": padding}, {"attn_mask": pairs}, {"attn_mask": pairs, "key_padding_mask": padding}]
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for options, grad in itertools.product(masks, [True, False]):
            with torch.set_grad_enabled(grad):
                expected, weights = attention(x, x, x, need_weights=need_weights, **options)
                found, own = slim(x, x, x, need_weights=need_weights, **options)
            assert expected.isnan().any() == (need_weights and arguments == "plain")
            torch.testing.assert_close(found, expected, equal_nan=True, **EXACT)
            if need_weights:
                torch.testing.assert_close(own, weights, equal_nan=True, **EXACT)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_torch_jit_script_is_refused_with_a_word() -> None:
    for model in (SlimAttention(8, 3, head_dim=4), nn.Sequential(SlimAttention(8, 3, head_dim=4))):
        with pytest.raises(NotImplementedError, match=r"torch.jit.script does not take a SlimAttention.*torch.export"):
            torch.jit.script(model)


def test_it_is_exported_with_any_batch() -> None:
    model = SlimAttention(16, 3, head_dim=4, batch_first=True, add_bias_kv=True).eval()
    inputs = [torch.randn(n, 5, 16) for n in (2, 7)]
    batch = torch.export.Dim("batch")
    exported = torch.export.export(
        _Padded(model), (inputs[0], torch.zeros(2, 5, dtype=torch.bool)), dynamic_shapes=({0: batch}, {0: batch})
    )
    padding = torch.arange(5).expand(7, 5) > 3
    torch.testing.assert_close(exported.module()(inputs[1], padding), _Padded(model)(inputs[1], padding))


class _Padded(nn.Module):
    def __init__(self, attention: SlimAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]


# ---------------------------------------------------------------------- inside torch's transformer layers


def encoder(**more: bool) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True, **more)
    return filled(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not more)).eval()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("more", [{}, {"norm_first": True}])
@pytest.mark.parametrize("padded", [True, False])
def test_it_works_in_an_encoder(padded: bool, more: dict[str, bool], grad: bool) -> None:
    model = encoder(**more)
    x, padding = torch.randn(3, 6, 8).double(), torch.arange(6) >= torch.tensor([[6], [4], [2]])
    options = {"src_key_padding_mask": padding} if padded else {}
    with torch.set_grad_enabled(grad):
        expected = model(x, **options)  # in no_grad with padding: nested tensors and fused kernels
        put_slim_attention(model)
        assert all(type(layer.self_attn) is SlimAttention for layer in model.layers)
        torch.testing.assert_close(model(x, **options), expected, **EXACT)
        # one layer loses two heads of four: fused kernels, which want an even number, would read the weights wrongly
        masked = copy.deepcopy(model)
        with torch.no_grad():
            masked.layers[0].self_attn.out_proj.weight[:, :4] = 0
        for _ in range(2):
            without_head(model.layers[0].self_attn, 0)
        torch.testing.assert_close(model(x, **options), masked(x, **options), **EXACT)
        assert torch.equal(model(x, **options)[0] != expected[0], torch.ones(6, 8, dtype=torch.bool))


def test_nested_tensors_reach_it_in_an_encoder() -> None:
    model, seen = encoder(), []
    put_slim_attention(model)
    model.layers[1].norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_nested))
    padding = torch.arange(6) >= torch.tensor([[6], [4], [2]])
    with torch.no_grad():
        out = model(torch.randn(3, 6, 8).double(), src_key_padding_mask=padding)
    assert seen == [True]
    assert torch.equal(out[padding], torch.zeros_like(out[padding]))


def test_it_works_in_a_decoder() -> None:
    model = filled(nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2)).eval()
    target, memory = torch.randn(5, 3, 8).double(), torch.randn(4, 3, 8).double()
    options = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5).double(),
        "tgt_is_causal": True,
        "memory_key_padding_mask": torch.zeros(3, 4).double().index_fill(1, torch.tensor([3]), -torch.inf),
    }
    expected = model(target, memory, **options)
    put_slim_attention(model)
    assert sum(type(m) is SlimAttention for m in model.modules()) == 4
    torch.testing.assert_close(model(target, memory, **options), expected, **EXACT)


# ---------------------------------------------------------------------- put in, and put back


class _Own(nn.MultiheadAttention):
    pass


def test_modules_are_exchanged_and_put_back_with_hooks() -> None:
    model = nn.ModuleDict(
        {"a": nn.MultiheadAttention(8, 2), "own": _Own(8, 2), "b": nn.MultiheadAttention(8, 2, kdim=6)}
    )
    model["again"], calls = model["a"], []
    before = dict(model.items())
    states = {name: dict(vars(module)) for name, module in model.items()}
    handle = model["a"].register_forward_hook(lambda *_: calls.append(1))
    put_slim_attention(model)
    assert [type(m) for m in model.values()] == [SlimAttention, _Own, SlimAttention, SlimAttention]
    x = torch.randn(3, 1, 8)
    model["a"](x, x, x)
    assert calls == [1]
    small = copy.deepcopy(model)
    without_head(small["b"], 0)
    put_back_attention(small)
    assert type(small["b"]) is SlimAttention
    assert type(small["a"]) is nn.MultiheadAttention
    assert small["a"] is small["again"]
    put_back_attention(model)
    handle.remove()
    for name, module in model.items():
        assert module is before[name]
        assert type(module) is (_Own if name == "own" else nn.MultiheadAttention)
        assert vars(module).keys() == states[name].keys()
        assert (module.num_heads, module._qkv_same_embed_dim) == (2, name != "b")
    model["a"](x, x, x)
    assert calls == [1]


def test_a_slim_attention_of_the_user_is_never_put_back() -> None:
    model = nn.Sequential(SlimAttention(8, 2))
    put_slim_attention(model)
    put_back_attention(model)
    assert type(model[0]) is SlimAttention


# ---------------------------------------------------------------------- refusals


def test_what_is_refused() -> None:
    x = torch.randn(3, 2, 8)
    attention = SlimAttention(8, 3, head_dim=4)
    with pytest.raises(ValueError, match=r"of a subclass of nn.MultiheadAttention"):
        SlimAttention.from_attention(_Own(8, 2))
    with pytest.raises(ValueError, match=r"embed_dim=8, num_heads=0"):
        SlimAttention(8, 0)
    with pytest.raises(ValueError, match=r"head_dim=0, kdim=8, vdim=8: attention has"):
        SlimAttention(8, 16)
    with pytest.raises(ValueError, match=r"dropout=1.5 is not a probability"):
        SlimAttention(8, 2, dropout=1.5)
    with pytest.raises(ValueError, match=r"device='nowhere', dtype=None: torch cannot make these weights"):
        SlimAttention(8, 2, device="nowhere")
    with pytest.raises(ValueError, match=r"query, key and value have shapes \[3, 2, 8\], \[3, 2, 8\], \[2, 2, 8\]"):
        attention(x, x, x[:2])
    with pytest.raises(ValueError, match=r"attn_mask is None"):
        attention(x, x, x, is_causal=True)
    # a mask for each of the heads that there were
    with pytest.raises(ValueError, match=r"attn_mask has shape \[8, 3, 3\].* Give \[3, 3\] or \[6, 3, 3\]"):
        attention(x, x, x, attn_mask=torch.zeros(8, 3, 3))
    with pytest.raises(ValueError, match=r"key_padding_mask is of torch.int64"):
        attention(x, x, x, key_padding_mask=torch.zeros(2, 3, dtype=torch.int64))
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)])
    with pytest.raises(ValueError, match=r"nested inputs are for"):
        attention(nested, nested, nested)
