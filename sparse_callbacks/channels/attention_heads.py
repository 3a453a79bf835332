"""Numbers of heads that attention modules state of themselves, and what they are after heads were cut."""

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

from torch import nn

from sparse_callbacks.channels.known_classes import Shape, inner_shape, known_as, modules_around
from sparse_callbacks.channels.slim_attention import SlimAttention


@dataclass(frozen=True)
class _Heads:
    """Attributes of a module that follow from the number of heads in one of its weights.

    Attributes:
        weight: name of a parameter inside the module.
        dim: its dimension that has ``size`` entries for each head.
        size: the attribute that holds the channels of a head, which never change; empty for one entry a head.
        counts: attributes that hold the number of heads.
        widths: attributes that hold the channels of all heads, and the attribute with those of one head for each.
    """

    weight: str
    dim: int
    size: str
    counts: tuple[str, ...]
    widths: tuple[tuple[str, str], ...] = ()


_BERT = (
    _Heads(
        "query.weight", 0, "attention_head_size", ("num_attention_heads",), (("all_head_size", "attention_head_size"),)
    ),
)
_VIT = (_Heads("q_proj.weight", 0, "head_dim", ("num_attention_heads",)),)
_BART = (_Heads("q_proj.weight", 0, "head_dim", ("num_heads",), (("embed_dim", "head_dim"),)),)
# Those of today state the number of query heads for each key-value head alone, which stays as it is, as a unit is a
# key-value head with its query heads. Older ones state the rest too.
_LLAMA = (
    _Heads("q_proj.weight", 0, "head_dim", ("num_heads",)),
    _Heads("k_proj.weight", 0, "head_dim", ("num_key_value_heads",)),
)
_LEVIT = (
    _Heads("attention_biases", 0, "", ("num_heads",), (("key_attn_dim", "key_dim"), ("val_attn_dim", "val_dim"))),
)
KNOWN: dict[str, tuple[_Heads, ...]] = {
    "timm.layers.attention.Attention": (
        _Heads("proj.weight", 1, "head_dim", ("num_heads",), (("attn_dim", "head_dim"),)),
    ),
    "timm.layers.attention.AttentionRope": (
        _Heads(
            "proj.weight",
            1,
            "head_dim",
            ("num_heads", "num_kv_heads"),
            (("attn_dim", "head_dim"), ("kv_dim", "head_dim")),
        ),
        # of grouped-query attention, which has no fused projection
        _Heads("k_proj.weight", 0, "head_dim", ("num_kv_heads",), (("kv_dim", "head_dim"),)),
    ),
    "timm.layers.attention2d.MultiQueryAttention2d": (_Heads("output.proj.weight", 1, "value_dim", ("num_heads",)),),
    "timm.models.levit.Attention": _LEVIT,
    "timm.models.levit.AttentionDownsample": _LEVIT,
    "timm.models.swin_transformer.WindowAttention": (_Heads("relative_position_bias_table", 1, "", ("num_heads",)),),
    "timm.models.tiny_vit.Attention": (_Heads("attention_biases", 0, "", ("num_heads",), (("out_dim", "val_dim"),)),),
    "timm.models.visformer.Attention": (_Heads("proj.weight", 1, "head_dim", ("num_heads",)),),
    "timm.models.vision_transformer_sam.Attention": (_Heads("proj.weight", 1, "head_dim", ("num_heads",)),),
    **{
        f"transformers.models.{model}.modeling_{model}.{prefix}{kind}Attention": _BERT
        for model, prefix in (("bert", "Bert"), ("roberta", "Roberta"), ("electra", "Electra"))
        for kind in ("Self", "Cross")
    },
    "transformers.models.distilbert.modeling_distilbert.DistilBertSelfAttention": (
        _Heads("q_lin.weight", 0, "attention_head_size", ("n_heads",), (("dim", "attention_head_size"),)),
    ),
    **{
        f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}Attention": table
        for names, table in (
            (("ViT", "DeiT", "Swin", "Segformer"), _VIT),
            (("CLIP", "OPT", "Bart", "Whisper", "Wav2Vec2"), _BART),
            (("Llama", "Mistral", "Qwen2", "Gemma2", "Phi"), _LLAMA),
        )
        for name in names
    },
    "transformers.models.gpt2.modeling_gpt2.GPT2Attention": (
        _Heads("c_proj.weight", 0, "head_dim", ("num_heads",), (("embed_dim", "head_dim"), ("split_size", "head_dim"))),
    ),
    "transformers.models.t5.modeling_t5.T5Attention": (
        _Heads("q.weight", 0, "key_value_proj_dim", ("n_heads",), (("inner_dim", "key_value_proj_dim"),)),
    ),
}
"""Classes that work with fewer heads, by their qualified names."""
_CACHES = ("attention_bias_cache",)
"""Attributes that keep tensors with one entry for each head between calls, which a cut makes wrong."""
_INPUT_WIDTH = "{name} gives its heads the width of its input, or divides that by their number, so none of them can go"
STAYING = {
    f"timm.models.{name}": _INPUT_WIDTH
    for name in (
        "beit.Attention",
        "cait.ClassAttn",
        "cait.TalkingHeadAttn",
        "coat.FactorAttnConvRelPosEnc",
        "convit.GPSA",
        "convit.MHSA",
        "crossvit.CrossAttention",
        "davit.ChannelAttention",
        "davit.ChannelAttentionV2",
        "davit.WindowAttention",
        "edgenext.CrossCovarianceAttn",
        "eva.EvaAttention",
        "fastvit.Attention",
        "gcvit.WindowAttentionGlobal",
        "metaformer.Attention",
        "nest.Attention",
        "nextvit.EfficientAttention",
        "pvt_v2.Attention",
        "swin_transformer_v2.WindowAttention",
        "swin_transformer_v2_cr.WindowMultiHeadAttention",
        "twins.GlobalSubSampleAttn",
        "twins.LocallyGroupedAttn",
        "vision_transformer_relpos.RelPosAttention",
        "volo.Attention",
        "volo.OutlookAttention",
        "xcit.XCA",
    )
} | {
    f"timm.layers.{name}": _INPUT_WIDTH
    for name in (
        "attention_pool.AttentionPoolLatent",
        "attention_pool.AttentionPoolPrr",
        "diff_attention.DiffAttention",
    )
}
"""Classes that do not, and why."""


def has_heads(module: nn.Module) -> bool:
    """Whether ``module`` is an attention that works with fewer heads of the same size, once it states their number."""
    return isinstance(module, SlimAttention) or known_as(module, KNOWN) != ""


def why_heads_stay(module: nn.Module) -> str:
    """Why no head of ``module`` can go; empty where heads can, and for modules that are not known to be an attention."""
    if has_heads(module):
        return ""
    if isinstance(module, nn.MultiheadAttention):
        what = "nn.MultiheadAttention" if type(module) is nn.MultiheadAttention else type(module).__name__
        return (
            f"{what} divides its width by the number of heads, so it cannot lose one; a SlimAttention in its place can"
        )
    known = known_as(module, STAYING)
    return STAYING[known].format(name=type(module).__name__) if known else ""


def shares_keys(model: nn.Module, parameters: Container[str]) -> bool:
    """Whether queries of a grouped-query attention are among ``parameters`` and the keys that they share are not.

    Such an attention states how many queries each key has, which stays as it is.
    """
    prefixes = [f"{n}." if n else "" for n, m in model.named_modules() if KNOWN.get(known_as(m, KNOWN)) is _LLAMA]
    return any(f"{p}q_proj.weight" in parameters and f"{p}k_proj.weight" not in parameters for p in prefixes)


def head_sizes(module: nn.Module, shape_of: Callable[[str], Shape | None] | None = None) -> dict[str, int]:
    """What the attributes of ``module`` that state numbers of heads and their channels must be for its weights.

    A weight whose channels are not those of whole heads says nothing.

    Args:
        module: any module; for one without heads the result is empty.
        shape_of: the shape of a parameter by its name inside the module, None where there is none; by default that of
            the module's own.
    """
    shape_of = shape_of or (lambda name: inner_shape(module, name))
    found: dict[str, int] = {}
    for entry in KNOWN.get(known_as(module, KNOWN), ()):
        shape, size = shape_of(entry.weight), getattr(module, entry.size) if entry.size else 1
        if shape is None or shape[entry.dim] % size:
            continue
        heads = shape[entry.dim] // size
        found |= dict.fromkeys(entry.counts, heads)
        found |= {name: heads * int(getattr(module, one)) for name, one in entry.widths}
    # which of them there are differs between releases
    return {name: value for name, value in found.items() if name in vars(module)}


def update_heads(module: nn.Module) -> None:
    """Let ``module`` state the numbers of heads that its weights have now; nothing happens to one without heads.

    It may be called at any time, also when the weights are the first ones again. Config objects, which layers share, are
    left as they are: none of the known classes reads the number of heads from one in its forward.
    """
    for name, value in head_sizes(module).items():
        setattr(module, name, value)
    if has_heads(module):
        for name in _CACHES:
            if name in vars(module):
                setattr(module, name, type(vars(module)[name])())


def update_heads_around(model: nn.Module, names: Iterable[str]) -> None:
    """:func:`update_heads` for the modules of these names and every module that they are inside of."""
    for module in modules_around(model, names):
        update_heads(module)
