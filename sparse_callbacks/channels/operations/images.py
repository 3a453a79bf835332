"""Pooling, resizing and convolutions."""

from collections.abc import Sequence

from torch import Tensor

from sparse_callbacks.channels.axes import AnyAxis, MisfitError, Product, Run, factored
from sparse_callbacks.channels.operations.table import Axes, outputs, rule
from sparse_callbacks.channels.recorded_call import Call


def _of_image(call: Call, name: str = "self") -> int:
    """How many dimensions at the end are places in an image."""
    digits = [c for c in call.name.replace("im2col", "") if c in "123"]
    return int(digits[0]) if digits else call.named[name].ndim - 2


_PLACE_BY_PLACE = """
avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d_with_indices max_pool3d_with_indices _adaptive_avg_pool2d
_adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d adaptive_max_pool3d mkldnn_adaptive_avg_pool2d
mkldnn_max_pool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d
upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa max_unpool2d max_unpool3d
"""


@rule(_PLACE_BY_PLACE)
def _place_by_place(call: Call) -> list[Axes]:
    places = _of_image(call)
    axes = call.axes_of(call.named["self"])
    call.block(axes[-places:])
    if isinstance(indices := call.named.get("indices"), Tensor):
        for axis, other in zip(axes[:-places], call.axes_of(indices)[:-places], strict=True):
            call.join(axis, other)
        call.block(call.axes_of(indices)[-places:])
    return [[*axes[:-places], *(Run(s) for s in t.shape[-places:])] for t in outputs(call)]


@rule("grid_sampler_2d", "grid_sampler_3d")
def _sampled(call: Call) -> list[Axes]:
    axes, grid = call.axes_of(call.named["input"]), call.axes_of(call.named["grid"])
    call.block([*axes[2:], *grid[1:]])
    return [[call.join(axes[0], grid[0]), axes[1], *(Run(s) for s in call.output.shape[2:])]]


@rule("torchvision.roi_align", "torchvision.roi_pool")
def _regions(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["input"])
    call.block([axes[0], *axes[2:], *call.axes_of(call.named["rois"])])
    return [[Run(t.shape[0]), axes[1], *(Run(s) for s in t.shape[2:])] for t in outputs(call)]


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "conv2d", "conv1d", "conv3d")
def _convolved(call: Call) -> list[Axes]:
    x, weight, groups = call.named.get("input", call.named.get("self")), call.named["weight"], call.named["groups"]
    bias = call.named.get("bias")
    transposed = call.named.get("transposed", False)
    places = weight.ndim - 2
    axes, of_weight = call.axes_of(x), call.axes_of(weight)
    given = len(axes) - places - 1  # an image may come without a batch
    reads, makes = (of_weight[0], of_weight[1]) if transposed else (of_weight[1], of_weight[0])
    channels = axes[given]
    call.block([*axes[given + 1 :], *of_weight[2:]])
    made: AnyAxis
    if groups == 1:
        channels = call.join(channels, reads)
        made = makes
        call.note_product(weight, [reads], [makes])
    elif groups == x.shape[given] == call.output.shape[given]:
        made = call.join(channels, of_weight[0])  # each channel by itself: the weight has an entry for each
    else:
        try:
            made = _in_groups(call, channels, of_weight, groups, transposed)
        except MisfitError:
            call.block([channels, *of_weight[:2]])
            made = Run(call.output.shape[given])
        call.note_product(weight, [reads], [makes])
    if bias is not None:
        call.join(made, call.axes_of(bias)[0])
    return [[*axes[:given], made, *(Run(s) for s in call.output.shape[given + 1 :])]]


def _in_groups(call: Call, channels: AnyAxis, weight: Sequence[AnyAxis], groups: int, transposed: bool) -> AnyAxis:
    """The outputs of a grouped convolution, whose groups all have the same places: what goes in one goes in all."""
    held, place = factored(weight[0], groups)
    if channels.size == groups and not transposed:  # depthwise, with several outputs of each input
        return Product([call.join(channels, held), place])
    outer, inner = factored(channels, groups)
    call.join(outer, held)
    call.block([outer], f"{call.module[0] or 'a convolution'}: its groups must stay as many as they are")
    call.join(inner, place if transposed else weight[1])
    return Product([outer, weight[1] if transposed else place])
