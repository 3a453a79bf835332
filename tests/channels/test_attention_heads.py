"""Attention modules state as many heads as their weights have: stand-ins by name, and the real classes where there are any."""

import copy
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks import SlimAttention
from sparse_callbacks.channels.attention_heads import (
    KNOWN,
    STAYING,
    has_heads,
    head_sizes,
    update_heads,
    update_heads_around,
    why_heads_stay,
)
from sparse_callbacks.channels.cuts import Cuts, Surgery
from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.channels.module_sizes import update_sizes

WIDTH, HEADS, SIZE = 32, 4, 8
EXACT = {"rtol": 0, "atol": 1e-12}  # float64; fewer terms are added in another order


class Part(NamedTuple):
    """A parameter with entries for each head: along ``dim``, ``parts`` times, with ``size`` entries a head."""

    name: str
    dim: int
    parts: int = 1
    size: int = SIZE


class Case(NamedTuple):
    """One attention: how it is made and called, which parts a head has, and the parameter that reads the heads."""

    make: Callable[[], nn.Module]
    call: Callable[[nn.Module, Tensor], Any]
    parts: list[Part]
    reader: Part
    stated: dict[str, int]  # of the module or one inside it, when 3 of the 4 heads are left
    inside: str = ""


def linear(name: str, dim: int, parts: int = 1, size: int = SIZE, bias: bool = True) -> list[Part]:
    return [Part(f"{name}.weight", dim, parts, size), *([Part(f"{name}.bias", 0, parts, size)] if bias else [])]


def kept(part: Part, heads: int, gone: int) -> Tensor:
    """Indices of the entries along the dimension of a part that stay."""
    index = torch.arange(part.parts * heads * part.size).view(part.parts, heads, part.size)
    return index[:, [h for h in range(heads) if h != gone]].flatten()


def check(case: Case, gone: int = 1, heads: int = HEADS) -> None:
    """A head that is cut gives what a head that is masked gives, and everything is undone with the weights."""
    torch.manual_seed(0)
    module = case.make().double()
    module.eval()  # by itself, as some of timm's return nothing
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    attention = module.get_submodule(case.inside)
    assert has_heads(attention)
    assert not why_heads_stay(attention)
    x = torch.randn(2, 9, WIDTH).double()
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    attributes = dict(vars(attention))
    with torch.no_grad():
        dense = case.call(module, x)
        masked = copy.deepcopy(module)
        reader = masked.get_parameter(case.reader.name).movedim(case.reader.dim, 0)
        reader[[i for i in range(len(reader)) if i not in kept(case.reader, heads, gone)]] = 0
        expected = case.call(masked, x)
        assert (expected - dense).abs().max() > 1e-3
        for part in [*case.parts, case.reader]:
            if part.name in tensors or not part.name.endswith("bias"):
                put(module, part.name, tensors[part.name].detach().index_select(part.dim, kept(part, heads, gone)))
        names = {part.name.rpartition(".")[0] for part in case.parts}
        for _ in range(2):  # the second call changes nothing
            update_heads_around(module, names)
            assert {name: getattr(attention, name) for name in case.stated} == case.stated
            torch.testing.assert_close(case.call(module, x), expected, **EXACT)
        for name, tensor in tensors.items():
            put(module, name, tensor)
        update_heads_around(module, names)
        assert {n: v for n, v in vars(attention).items() if isinstance(v, int)} == {
            n: v for n, v in attributes.items() if isinstance(v, int)
        }
        assert torch.equal(case.call(module, x), dense)


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer, with the size that a Conv1D of transformers states."""
    owner, _, local = name.rpartition(".")
    inner = module.get_submodule(owner)
    if local in inner._buffers:
        inner._buffers[local] = tensor
        return
    inner.register_parameter(local, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
    if type(inner).__name__ == "Conv1D" and local == "weight":
        inner.nx, inner.nf = tensor.shape


# ---------------------------------------------------------------------- stand-ins, which need no package


class Fused(nn.Module):
    """As timm's ``Attention``, with a gain for each head and a cache of it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = HEADS, SIZE, HEADS * SIZE
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(HEADS))
        self.attention_bias_cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        gain = self.attention_bias_cache.setdefault("cpu", self.gain.view(1, -1, 1, 1))
        out = nn.functional.scaled_dot_product_attention(q, k, v) * gain
        return self.proj(out.transpose(1, 2).reshape(n, length, self.attn_dim))


def named(kind: type, qualified: str) -> type:
    """A subclass of ``kind`` with its forward and another name."""
    module, _, name = qualified.rpartition(".")
    return type(name, (kind,), {"__module__": module, "__qualname__": name, "forward": kind.forward})


STAND_IN = Case(
    lambda: named(Fused, "timm.layers.attention.Attention")(),
    lambda module, x: module(x),
    [*linear("qkv", 0, 3), Part("gain", 0, 1, 1)],
    Part("proj.weight", 1),
    {"num_heads": 3, "attn_dim": 24},
)


def test_a_class_is_known_by_its_name() -> None:
    check(STAND_IN)
    assert not has_heads(Fused())
    assert head_sizes(Fused()) == {}


def test_a_subclass_counts_while_it_has_the_forward_of_the_known_class() -> None:
    known = named(Fused, "timm.layers.attention.Attention")
    plain = type("Plain", (known,), {})
    other = type("Other", (known,), {"forward": lambda self, x: x})
    assert has_heads(plain())
    assert not has_heads(other())


def test_channels_that_are_not_whole_heads_change_nothing() -> None:
    module = named(Fused, "timm.layers.attention.Attention")()
    module.proj = nn.Linear(27, WIDTH)
    update_heads(module)
    assert (module.num_heads, module.attn_dim) == (4, 32)


class Grouped(nn.Module):
    """As an older ``LlamaAttention``, which states its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.num_heads, self.num_key_value_heads, self.num_key_value_groups = SIZE, 8, 4, 2
        self.config = SimpleNamespace(num_attention_heads=8)
        self.q_proj, self.o_proj = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.k_proj, self.v_proj = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
        k, v = (
            layer(x).view(*x.shape[:2], self.num_key_value_heads, self.head_dim).transpose(1, 2)
            for layer in (self.k_proj, self.v_proj)
        )
        k, v = (t.repeat_interleave(self.num_key_value_groups, 1) for t in (k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def test_grouped_query_attention_and_a_shared_config() -> None:
    case = Case(
        lambda: named(Grouped, "transformers.models.llama.modeling_llama.LlamaAttention")(),
        lambda module, x: (module(x), module.config.num_attention_heads)[0],
        [*linear("q_proj", 0, 1, 2 * SIZE), *linear("k_proj", 0), *linear("v_proj", 0)],
        Part("o_proj.weight", 1, 1, 2 * SIZE),
        {"num_heads": 6, "num_key_value_heads": 3, "num_key_value_groups": 2},
    )
    check(case)
    module = case.make()
    module.q_proj = nn.Linear(WIDTH, 48)
    update_heads(module)
    assert (module.num_heads, module.config.num_attention_heads) == (6, 8)


def test_why_heads_stay() -> None:
    fast = named(Fused, "timm.models.fastvit.Attention")()
    assert why_heads_stay(fast).startswith("Attention gives its heads the width of its input")
    assert not has_heads(fast)
    assert "a SlimAttention in its place can" in why_heads_stay(nn.MultiheadAttention(8, 2))
    assert why_heads_stay(SlimAttention(8, 2)) == ""
    assert has_heads(SlimAttention(8, 2))
    assert why_heads_stay(nn.Linear(2, 2)) == ""


def test_a_cut_updates_the_attention_around_the_cut_layers() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), STAND_IN.make()).double()
    x = torch.randn(2, 5, WIDTH).double()
    units = torch.arange(HEADS).repeat_interleave(SIZE)
    members = [
        Member("1.qkv", "1.qkv.weight", 0, "out", units.repeat(3)),
        Member("1.proj", "1.proj.weight", 1, "in", units),
        Member("1", "1.gain", 0, "both", torch.arange(HEADS)),
    ]
    group = Group("1.qkv", HEADS, (members[0],), (members[1],), (members[2],))
    keep = torch.tensor([True, False, True, True])
    dense, surgery = model(x), Surgery(model)
    surgery.mask(members[1], keep)
    surgery.cut(Cuts(), group.consumers)
    expected = model(x)
    surgery.cut(Cuts().with_group(group, keep), group.members)
    assert (model[1].num_heads, model[1].attn_dim, model[1].qkv.out_features) == (3, 24, 72)
    torch.testing.assert_close(model(x), expected, **EXACT)
    surgery.restore()
    assert (model[1].num_heads, model[1].attn_dim) == (4, 32)
    assert torch.equal(model(x), dense)


def test_tables_and_layers_of_other_packages_state_their_sizes() -> None:
    class Conv1D(nn.Module):
        nx, nf = 5, 6

    Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"
    conv, table = Conv1D(), nn.Embedding(5, 6)
    for module in (conv, table):
        module.weight = nn.Parameter(torch.zeros(5, 4))
        update_sizes(module, None)
    assert (conv.nx, conv.nf, table.num_embeddings, table.embedding_dim) == (5, 4, 5, 4)


# ---------------------------------------------------------------------- timm


def timm_class(path: str) -> Any:
    pytest.importorskip("timm")
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"timm.{module}"), name)


def plain(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def as_image(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.transpose(1, 2).unflatten(-1, (3, 3)).contiguous())


QKV = [*linear("qkv", 0, 3)]
SPLIT = [*linear("q_proj", 0), *linear("k_proj", 0), *linear("v_proj", 0)]
BIASED = Part("attention_biases", 0, 1, 1)
PROJ = Part("proj.weight", 1)


def norm(name: str, size: int) -> list[Part]:
    return [Part(f"{name}.{t}", 0, 1, size) for t in ("weight", "bias", "running_mean", "running_var")]


TIMM = {
    "attention": Case(
        lambda: timm_class("layers.attention.Attention")(
            WIDTH, HEADS, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm
        ),
        plain,
        QKV,
        PROJ,
        {"num_heads": 3, "attn_dim": 24},
    ),
    "gated": Case(
        lambda: timm_class("layers.attention.Attention")(WIDTH, HEADS, attn_head_dim=SIZE, gated=True),
        plain,
        [*QKV, *linear("gate", 0)],
        PROJ,
        {"num_heads": 3, "attn_dim": 24},
    ),
    "rope": Case(
        lambda: timm_class("layers.attention.AttentionRope")(WIDTH, HEADS),
        plain,
        QKV,
        PROJ,
        {"num_heads": 3, "attn_dim": 24, "num_kv_heads": 3, "kv_dim": 24},
    ),
    "grouped rope": Case(
        lambda: timm_class("layers.attention.AttentionRope")(
            WIDTH, 8, attn_head_dim=SIZE, qkv_fused=False, num_kv_heads=4
        ),
        plain,
        [*linear("q_proj", 0, 1, 16), *linear("k_proj", 0), *linear("v_proj", 0)],
        Part("proj.weight", 1, 1, 16),
        {"num_heads": 6, "attn_dim": 48, "num_kv_heads": 3, "kv_dim": 24, "num_kv_groups": 2},
    ),
    "swin": Case(
        lambda: timm_class("models.swin_transformer.WindowAttention")(WIDTH, HEADS, window_size=3),
        lambda module, x: module(x, torch.zeros(2, 9, 9).double().index_fill(2, torch.tensor(4), -3.0)),
        [*QKV, Part("relative_position_bias_table", 1, 1, 1)],
        PROJ,
        {"num_heads": 3},
    ),
    "levit": Case(
        lambda: timm_class("models.levit.Attention")(WIDTH, 4, HEADS, attn_ratio=2, resolution=3),
        plain,
        [Part("qkv.linear.weight", 0, 1, 16), *norm("qkv.bn", 16), BIASED],
        Part("proj.ln.linear.weight", 1),
        {"num_heads": 3, "key_attn_dim": 12, "val_attn_dim": 24},
    ),
    "levit in images": Case(
        lambda: timm_class("models.levit.Attention")(WIDTH, 4, HEADS, attn_ratio=2, resolution=3, use_conv=True),
        as_image,
        [Part("qkv.linear.weight", 0, 1, 16), *norm("qkv.bn", 16), BIASED],
        Part("proj.ln.linear.weight", 1),
        {"num_heads": 3, "key_attn_dim": 12, "val_attn_dim": 24},
    ),
    "levit down": Case(
        lambda: timm_class("models.levit.AttentionDownsample")(WIDTH, 20, 4, HEADS, attn_ratio=2, resolution=3),
        plain,
        [
            Part("kv.linear.weight", 0, 1, 12),
            *norm("kv.bn", 12),
            Part("q.ln.linear.weight", 0, 1, 4),
            *norm("q.ln.bn", 4),
            BIASED,
        ],
        Part("proj.ln.linear.weight", 1),
        {"num_heads": 3, "key_attn_dim": 12, "val_attn_dim": 24},
    ),
    "tiny_vit": Case(
        lambda: timm_class("models.tiny_vit.Attention")(WIDTH, 4, HEADS, attn_ratio=2, resolution=(3, 3)),
        plain,
        [*linear("qkv", 0, 1, 16), BIASED],
        PROJ,
        {"num_heads": 3, "out_dim": 24},
    ),
    "multi-query": Case(
        lambda: timm_class("layers.attention2d.MultiQueryAttention2d")(WIDTH, num_heads=HEADS, key_dim=4, value_dim=6),
        as_image,
        [Part("query.proj.weight", 0, 1, 4)],
        Part("output.proj.weight", 1, 1, 6),
        {"num_heads": 3},
    ),
    "visformer": Case(
        lambda: timm_class("models.visformer.Attention")(WIDTH, HEADS),
        as_image,
        linear("qkv", 0, 3, bias=False),
        PROJ,
        {"num_heads": 3},
    ),
    "sam": Case(
        lambda: timm_class("models.vision_transformer_sam.Attention")(
            WIDTH, HEADS, use_rel_pos=True, input_size=(3, 3)
        ),
        lambda module, x: module(x.unflatten(1, (3, 3))),
        QKV,
        PROJ,
        {"num_heads": 3},
    ),
}


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.filterwarnings("ignore")
def test_attention_of_timm(name: str) -> None:
    check(TIMM[name])


# ---------------------------------------------------------------------- transformers


def of(model: str, name: str, config: str, *args: Any, implementation: str = "sdpa", **options: Any) -> nn.Module:
    """An attention of transformers by its class, with a config of the same model."""
    pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    settings = getattr(importlib.import_module(f"transformers.models.{model}"), config)(**options)
    settings._attn_implementation = implementation
    return getattr(module, name)(*(settings if a is CONFIG else a for a in args))


CONFIG = object()
SMALL = {"hidden_size": WIDTH, "num_attention_heads": HEADS}
ROTATIONS = tuple(torch.randn(2, 1, 9, SIZE, generator=torch.Generator().manual_seed(1)).double())


def first(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)[0]


def rotary(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, position_embeddings=ROTATIONS, attention_mask=None)[0]


def bert(model: str, prefix: str, implementation: str) -> Case:
    def block() -> nn.Module:
        return of(model, f"{prefix}Attention", f"{prefix}Config", CONFIG, implementation=implementation, **SMALL)

    parts = [p for name in ("query", "key", "value") for p in linear(f"self.{name}", 0)]
    stated = {"num_attention_heads": 3, "all_head_size": 24}
    return Case(block, first, parts, Part("output.dense.weight", 1), stated, "self")


def llama(prefix: str, implementation: str, reader: str = "o_proj", **more: Any) -> Case:
    model = prefix.lower()
    options = {"hidden_size": WIDTH, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": SIZE, **more}
    return Case(
        lambda: of(model, f"{prefix}Attention", f"{prefix}Config", CONFIG, 0, implementation=implementation, **options),
        rotary,
        [*linear("q_proj", 0, 1, 16), *linear("k_proj", 0), *linear("v_proj", 0)],
        Part(f"{reader}.weight", 1, 1, 16),
        {"num_key_value_groups": 2},
    )


def transformers_cases(implementation: str) -> dict[str, Case]:
    def case(model: str, name: str, config: str, args: list[Any], **more: Any) -> Case:
        made = {"call": first, "parts": SPLIT, "reader": Part("o_proj.weight", 1), "stated": {"num_attention_heads": 3}}
        options = {**SMALL, **more.pop("options", {})}
        return Case(lambda: of(model, name, config, *args, implementation=implementation, **options), **made | more)

    inner = {"num_heads": 3, "embed_dim": 24}
    out = Part("out_proj.weight", 1)
    return {
        "bert": bert("bert", "Bert", implementation),
        "roberta": bert("roberta", "Roberta", implementation),
        "electra": bert("electra", "Electra", implementation),
        "distilbert": case(
            "distilbert",
            "DistilBertSelfAttention",
            "DistilBertConfig",
            [CONFIG],
            parts=[p for name in ("q_lin", "k_lin", "v_lin") for p in linear(name, 0)],
            reader=Part("out_lin.weight", 1),
            stated={"n_heads": 3, "dim": 24},
            options={"dim": WIDTH, "n_heads": HEADS},
        ),
        "vit": case("vit", "ViTAttention", "ViTConfig", [CONFIG]),
        "deit": case("deit", "DeiTAttention", "DeiTConfig", [CONFIG]),
        "swin": case(
            "swin",
            "SwinAttention",
            "SwinConfig",
            [CONFIG, WIDTH, HEADS, 3],
            parts=[*SPLIT, Part("relative_position_bias.relative_position_bias_table", 1, 1, 1)],
            options={"num_heads": [HEADS] * 4, "embed_dim": WIDTH},
        ),
        "clip": case("clip", "CLIPAttention", "CLIPTextConfig", [CONFIG], reader=out, stated=inner),
        "gpt2": case(
            "gpt2",
            "GPT2Attention",
            "GPT2Config",
            [CONFIG, False, 0],
            parts=[Part("c_attn.weight", 1, 3), Part("c_attn.bias", 0, 3)],
            reader=Part("c_proj.weight", 0),
            stated={**inner, "split_size": 24},
            options={"n_embd": WIDTH, "n_head": HEADS},
        ),
        "opt": case("opt", "OPTAttention", "OPTConfig", [CONFIG, 0], reader=out, stated=inner),
        "llama": llama("Llama", implementation),
        "mistral": llama("Mistral", implementation),
        "qwen2": llama("Qwen2", implementation),
        "gemma2": llama("Gemma2", "eager"),
        "phi": llama(
            "Phi",
            implementation,
            "dense",
            rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 1.0},
        ),
        "t5": case(
            "t5",
            "T5Attention",
            "T5Config",
            [CONFIG, True, 0],
            parts=[
                *(Part(f"{n}.weight", 0) for n in "qkv"),
                Part("relative_attention_bias.weight", 1, 1, 1),
            ],
            reader=Part("o.weight", 1),
            stated={"n_heads": 3, "inner_dim": 24},
            options={"d_model": WIDTH, "d_kv": SIZE, "num_heads": HEADS},
        ),
        "t5 without a table": case(
            "t5",
            "T5Attention",
            "T5Config",
            [CONFIG, False, 0],
            parts=[Part(f"{n}.weight", 0) for n in "qkv"],
            reader=Part("o.weight", 1),
            stated={"n_heads": 3, "inner_dim": 24},
            options={"d_model": WIDTH, "d_kv": SIZE, "num_heads": HEADS},
        ),
        "segformer": case(
            "segformer",
            "SegformerAttention",
            "SegformerConfig",
            [CONFIG, WIDTH, HEADS, 3],
            call=lambda module, x: module(x, 3, 3)[0],
            options={"num_attention_heads": [HEADS] * 4},
        ),
        **{
            name.lower(): case(
                name.lower(),
                f"{name}Attention",
                f"{name}Config",
                # by position: width, heads, dropout, whether in a decoder, bias, whether causal, then the config
                [WIDTH, HEADS, 0.0, False, True, False, *([0] if name == "Whisper" else []), CONFIG],
                reader=out,
                stated=inner,
            )
            for name in ("Bart", "Whisper", "Wav2Vec2")
        },
    }


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", transformers_cases(""))
def test_attention_of_transformers(name: str, implementation: str) -> None:
    check(transformers_cases(implementation)[name])


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_the_named_classes_exist(package: str) -> None:
    pytest.importorskip(package)
    for qualified in [*KNOWN, *STAYING]:
        module, _, name = qualified.rpartition(".")
        if module.startswith(package):
            assert issubclass(getattr(importlib.import_module(module), name), nn.Module)
