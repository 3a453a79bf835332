"""Zeros that stay zeros whatever Python code decides by values that it has read."""

LASTING = frozenset(
    f"aten.{name}" if "." not in name else name
    for name in (
        # functions of single entries that give 0 for 0, whatever their numbers
        *("relu", "gelu", "silu", "mish", "tanh", "hardswish", "hardtanh", "leaky_relu", "elu", "prelu", "softshrink"),
        *("abs", "neg", "sin", "erf", "sign", "floor", "ceil", "round", "trunc", "sqrt", "mul", "div", "where", "glu"),
        *("add", "sub", "mean", "sum", "amax", "amin", "cumsum"),
        *("max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices", "mkldnn_max_pool2d"),
        *("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
        *("adaptive_avg_pool1d", "mkldnn_adaptive_avg_pool2d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d"),
        *("upsample_trilinear3d", "upsample_bicubic2d", "grid_sampler_2d", "grid_sampler_3d", "constant_pad_nd"),
        *("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"),
        *("torchvision.roi_align", "torchvision.roi_pool"),
        # sums and products with parameters
        *("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "mm", "bmm", "addmm", "baddbmm"),
        *("_addmm_activation", "embedding", "native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"),
        *("_native_batch_norm_legit_no_training", "_batch_norm_with_update", "_batch_norm_no_update"),
        *("miopen_batch_norm", "native_group_norm", "group_norm", "native_layer_norm", "layer_norm"),
        *("_fused_rms_norm", "rms_norm", "_scaled_dot_product_flash_attention_for_cpu"),
        *("_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention"),
        *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_attention_math"),
        "scaled_dot_product_attention",
        # other shapes
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy", "unsqueeze", "squeeze"),
        *("permute", "transpose", "t", "numpy_T", "flip", "roll", "expand", "repeat", "cat", "stack", "slice"),
        *("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "select", "unbind"),
        *("index", "index_select", "clone", "contiguous", "detach", "alias", "_to_copy", "lift_fresh"),
    )
)
"""Operations that give zeros where a rule of the table finds constants, all constants that it is told of being zeros.

Tensors that are made, such as by ``full`` and ``zeros``, and sums with a number do not: that number may be one that was read,
and be 0 by chance. The numbers of ``hardtanh`` and of padding are taken to be those of the code.
"""


def is_lasting(name: str, numbers: bool) -> bool:
    """Whether the zeros of an operation last.

    Args:
        name: name of the operation, such as ``"aten.add"``.
        numbers: whether a number of Python is one of its two operands.
    """
    return name in LASTING and not (numbers and name in ("aten.add", "aten.sub", "aten.where"))
