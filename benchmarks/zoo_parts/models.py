"""The models of the zoo: which ones, of which size, on which inputs."""

import random
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn

from zoo_parts.entries import Entry, Inputs, attended, image_lists, images, named, numbers, settle, shake, tokens

# ---------------------------------------------------------------------- timm

TIMM: Mapping[str, Mapping[str, Any]] = {
    "resnet18": {}, "resnet26d": {}, "resnet33ts": {},
    "res2net50_14w_8s": {}, "res2next50": {}, "resnest14d": {},
    "efficientnet_b0": {}, "efficientnet_lite0": {}, "tf_efficientnetv2_b0": {}, "efficientnetv2_rw_t": {},
    "mobilenetv3_small_100": {}, "mobilenetv3_large_100": {}, "mobilenetv4_conv_small": {}, "mobilenetv4_hybrid_medium": {},
    "mobileone_s0": {}, "repvgg_a0": {}, "ghostnet_100": {}, "ghostnetv2_100": {},
    "convnext_atto": {}, "convnextv2_atto": {},
    "regnetx_002": {}, "regnety_002": {}, "regnetz_005": {},
    "dla34": {}, "dla46_c": {}, "hrnet_w18_small": {}, "densenet121": {},
    "ese_vovnet19b_dw": {}, "ese_vovnet39b": {}, "nf_resnet26": {}, "eca_nfnet_l0": {}, "mixnet_s": {},
    "levit_128s": {"img_size": 64}, "deit_tiny_patch16_224": {"img_size": 64},
    "deit_tiny_distilled_patch16_224": {"img_size": 64}, "swin_tiny_patch4_window7_224": {"img_size": 64},
    "mobilevit_xxs": {}, "mobilevitv2_050": {}, "edgenext_xx_small": {}, "fastvit_t8": {}, "poolformer_s12": {},
}  # fmt: skip
"""Options by name; images are 64 x 64, and all classifiers have 1000 classes."""


def timm_entry(name: str) -> Entry:
    import timm

    model = timm.create_model(name, **TIMM[name])
    classifiers = model.get_classifier()
    classifiers = classifiers if isinstance(classifiers, tuple | list) else (classifiers,)
    heads = [n for n, m in model.named_modules() if any(m is c for c in classifiers)]
    return Entry(model, images(64), tuple(heads))


# ---------------------------------------------------------------------- transformers

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
TEXT = {**SIZES, "vocab_size": 100, "max_position_embeddings": 64}
PICTURES = {**SIZES, "image_size": 64, "patch_size": 16}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**TEXT, **SPECIAL, "use_cache": False}
BOTH_SIDES = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "vocab_size": 100, "use_cache": False, **SPECIAL, "decoder_start_token_id": 1,
}  # fmt: skip

PADDED = named(input_ids=tokens(16), attention_mask=attended(16))
"""Rows with padding, for those whose key-value heads several queries share: where the mask meets the repeated heads."""

TRANSFORMERS: Mapping[str, tuple[str, Mapping[str, Any], Inputs]] = {
    "bert": ("BertForSequenceClassification", TEXT, named(input_ids=tokens(16))),
    "roberta": ("RobertaForSequenceClassification", {**TEXT, **SPECIAL}, named(input_ids=tokens(16))),
    "electra": ("ElectraForSequenceClassification", {**TEXT, "embedding_size": 64}, named(input_ids=tokens(16))),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 256, "vocab_size": 100, "max_position_embeddings": 64},
        named(input_ids=tokens(16)),
    ),
    "vit": ("ViTForImageClassification", PICTURES, named(pixel_values=images(64))),
    "deit": ("DeiTForImageClassification", PICTURES, named(pixel_values=images(64))),
    "swin": (
        "SwinForImageClassification",
        {"embed_dim": 64, "depths": [2, 2], "num_heads": [4, 8], "window_size": 4, "image_size": 32, "patch_size": 4},
        named(pixel_values=images(32)),
    ),
    "clip": (
        "CLIPModel",
        {"text_config": {**TEXT, **SPECIAL}, "vision_config": PICTURES, "projection_dim": 64},
        named(input_ids=tokens(16), pixel_values=images(64)),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64, "use_cache": False, **SPECIAL},
        named(input_ids=tokens(16)),
    ),
    "opt": (
        "OPTForCausalLM",
        {**DECODER, "ffn_dim": 256, "word_embed_proj_dim": 64},
        named(input_ids=tokens(16)),
    ),
    "llama": ("LlamaForCausalLM", {**DECODER, "num_key_value_heads": 4}, PADDED),
    "mistral": ("MistralForCausalLM", {**DECODER, "num_key_value_heads": 2}, PADDED),
    "qwen2": ("Qwen2ForCausalLM", {**DECODER, "num_key_value_heads": 2}, PADDED),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**DECODER, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16},
        PADDED,
    ),
    "phi": ("PhiForCausalLM", {**DECODER, "num_key_value_heads": 4}, named(input_ids=tokens(16))),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_heads": 4, "vocab_size": 100, "use_cache": False,
            "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
        },
        named(input_ids=tokens(16), decoder_input_ids=tokens(8)),
    ),
    "bart": (
        "BartForConditionalGeneration",
        {**BOTH_SIDES, "max_position_embeddings": 64},
        named(input_ids=tokens(16), decoder_input_ids=tokens(8)),
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**BOTH_SIDES, "max_source_positions": 32, "max_target_positions": 32, "num_mel_bins": 16},
        named(input_features=numbers(16, 64), decoder_input_ids=tokens(8)),
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        {
            **SIZES, "vocab_size": 100, "conv_dim": (64, 64, 64), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2),
            "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
        },
        named(input_values=numbers(1000)),
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {
            "num_encoder_blocks": 2, "depths": [2, 2], "sr_ratios": [2, 1], "hidden_sizes": [64, 64], "patch_sizes": [7, 3],
            "strides": [4, 2], "num_attention_heads": [4, 4], "mlp_ratios": [4, 4], "decoder_hidden_size": 64,
        },
        named(pixel_values=images(64)),
    ),
}  # fmt: skip
"""By name: the class, its configuration, and its inputs."""
TRANSFORMER_HEADS = (
    "lm_head", "classifier", "pre_classifier", "cls_classifier", "distillation_classifier", "proj_out", "*pooler",
    "visual_projection", "text_projection", "decode_head",
)  # fmt: skip
TRANSFORMER_EMBEDDINGS = ("*embed*", "*.wte.*", "*.wpe.*", "shared.*", "*relative_attention_bias*")


def transformers_entry(name: str) -> Entry:
    import transformers

    kind, options, inputs = TRANSFORMERS[name]
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**options))
    return Entry(model, inputs, TRANSFORMER_HEADS, TRANSFORMER_EMBEDDINGS)


# ---------------------------------------------------------------------- segmentation-models-pytorch

SMP = {
    "unet-resnet18": ("Unet", "resnet18"),
    "unetplusplus-mobilenet_v2": ("UnetPlusPlus", "mobilenet_v2"),
    "deeplabv3plus-resnet18": ("DeepLabV3Plus", "resnet18"),
    "fpn-efficientnet-b0": ("FPN", "efficientnet-b0"),
}
"""Architecture and encoder by name."""


def smp_entry(name: str) -> Entry:
    import segmentation_models_pytorch as smp

    architecture, encoder = SMP[name]
    model = getattr(smp, architecture)(encoder_name=encoder, encoder_weights=None, classes=5)
    return Entry(model, images(64), ("segmentation_head",))


# ---------------------------------------------------------------------- torchvision

TORCHVISION: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "resnet18": (64, {}), "resnet50": (64, {}), "wide_resnet50_2": (64, {}), "resnext50_32x4d": (64, {}), "vgg16_bn": (64, {}),
    "mobilenet_v2": (64, {}), "mobilenet_v3_small": (64, {}), "densenet121": (64, {}), "efficientnet_b0": (64, {}),
    "regnet_y_400mf": (64, {}), "shufflenet_v2_x1_0": (64, {}), "mnasnet1_0": (64, {}), "squeezenet1_1": (64, {}),
    "googlenet": (64, {"init_weights": False}), "inception_v3": (96, {"init_weights": False}), "convnext_tiny": (64, {}),
    "vit_b_16": (64, {"image_size": 64}), "swin_t": (64, {}),
}  # fmt: skip
"""Side of the images and options by name."""
DETECTORS: Mapping[str, tuple[int, Mapping[str, Any], tuple[str, ...]]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": (128, {"min_size": 128, "max_size": 128}, ("rpn.head", "roi_heads.box_predictor")),
    "retinanet_resnet50_fpn": (128, {"min_size": 128, "max_size": 128}, ("head.*.cls_logits", "head.*.bbox_reg")),
    "ssdlite320_mobilenet_v3_large": (320, {}, ("head.*",)),
}  # fmt: skip
"""Side of the images, options and heads by name; with five classes, so that random scores are above their thresholds."""


def torchvision_entry(name: str) -> Entry:
    import torchvision

    side, options = TORCHVISION[name]
    model = torchvision.models.get_model(name, weights=None, **options)
    last = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    return Entry(model, images(side), (last, "aux?.fc2", "AuxLogits.fc"))


def detector_entry(name: str) -> Entry:
    """A detector; the norms of the RetinaNet's backbone are frozen, as they are under pretrained weights."""
    import torchvision

    side, options, heads = DETECTORS[name]
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **options)
    if name.startswith("retinanet"):
        for parent in list(model.backbone.modules()):
            for key, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, key, torchvision.ops.FrozenBatchNorm2d(child.num_features))
    return Entry(model, image_lists(side), heads)


# ---------------------------------------------------------------------- all of them

MAKERS: dict[str, Callable[[], Entry]] = {
    **{f"timm/{n}": partial(timm_entry, n) for n in TIMM},
    **{f"transformers/{n}": partial(transformers_entry, n) for n in TRANSFORMERS},
    **{f"smp/{n}": partial(smp_entry, n) for n in SMP},
    **{f"torchvision/{n}": partial(torchvision_entry, n) for n in TORCHVISION},
    **{f"detection/{n}": partial(detector_entry, n) for n in DETECTORS},
}
"""What makes each model, by its name with its library in front."""


def chosen(globs: list[str]) -> list[str]:
    """Names of the models that match any of ``globs``, in the order of the zoo.

    Raises:
        ValueError: a glob matches no model.
    """
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in MAKERS):
            raise ValueError(f"{glob!r} matches no model. They are: {', '.join(MAKERS)}")
    return [name for name in MAKERS if any(fnmatchcase(name, glob) for glob in globs)]


def built(name: str) -> Entry:
    """A model of the zoo with random weights, the same in every process."""
    random.seed(0)
    torch.manual_seed(0)
    entry = MAKERS[name]()
    shake(entry.model.eval())
    settle(entry)
    return entry
