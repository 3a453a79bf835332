"""Constants in pooling, resizing, sums and norms."""

import torch
from torch import Tensor

from sparse_callbacks.channels.constant_propagation.table import Step, alike_along, constant_rule, returned, varying


def reduced(known: Tensor, dims: list[int], keep: bool) -> Tensor:
    """Where all entries along ``dims`` are, those dimensions being kept with size 1 or dropped."""
    for dim in sorted(dims, reverse=True):
        known = known.all(dim, keepdim=keep)
    return known


def _dims(step: Step) -> list[int]:
    given, count = step.named.get("dim"), step.named["self"].ndim
    if not count:
        return []
    return [d % count for d in ([given] if isinstance(given, int) else given or range(count))]


@constant_rule("mean", "amax", "amin", "nanmean")
def _one_of_all(step: Step) -> list[Tensor]:
    dims, keep = _dims(step), bool(step.named.get("keepdim"))
    # along a dimension whose entries differ the result hangs on how many there are of each
    known = step.constant() if alike_along(step.constant(), dims) else step.zero()
    return [reduced(known, dims, keep)]


@constant_rule("max", "min", "median")
def _extreme(step: Step) -> list[Tensor]:
    if isinstance(other := step.named.get("other"), Tensor):
        both = step.constant() & step.known(other).constant
        return [both.reshape([1] * (step.output.ndim - both.ndim) + [*both.shape])]
    # where the largest one lies is another question
    return [*_one_of_all(step), *(varying(t) for t in returned(step)[1:])]


@constant_rule("sum", "nansum", "linalg_vector_norm", "norm", "cumsum")
def _sums(step: Step) -> list[Tensor]:
    if step.name == "aten.cumsum":
        return [step.zero()]
    return [reduced(step.zero(), _dims(step), bool(step.named.get("keepdim")))]


def _places(step: Step) -> int:
    """How many dimensions at the end are places in an image."""
    digits = [c for c in step.name if c in "123"]
    return int(digits[0])


def _through_image(step: Step, known: Tensor) -> list[Tensor]:
    places = _places(step)
    if not alike_along(known, range(-places, 0)):
        known = reduced(step.zero(), [*range(known.ndim - places, known.ndim)], keep=True)
    return [known, *(varying(t) for t in returned(step)[1:])]


@constant_rule(
    *("max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices", "mkldnn_max_pool2d"),
    *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "mkldnn_adaptive_avg_pool2d"),
    *("adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d"),
    *("upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa"),
    *("_upsample_bicubic2d_aa", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
    *("replication_pad1d", "replication_pad2d", "replication_pad3d"),
)
def _weighted_mean(step: Step) -> list[Tensor]:
    """Each place is the largest of some places, or their mean with weights that sum to 1: padding never counts."""
    return _through_image(step, step.constant())


@constant_rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _average(step: Step) -> list[Tensor]:
    padding = step.named.get("padding") or 0
    padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    with_zeros = padded and step.named.get("count_include_pad", True)
    by_number = step.named.get("divisor_override") is not None
    return _through_image(step, step.zero() if with_zeros or by_number else step.constant())


@constant_rule("grid_sampler_2d", "grid_sampler_3d")
def _sampled(step: Step) -> list[Tensor]:
    known = step.zero("input")
    return [reduced(known, [*range(2, known.ndim)], keep=True)]


@constant_rule("torchvision.roi_align", "torchvision.roi_pool")
def _regions(step: Step) -> list[Tensor]:
    known = reduced(step.zero("input"), [0, 2, 3], keep=True)
    return [known, *(varying(t) for t in returned(step)[1:])]


@constant_rule("constant_pad_nd")
def _padded(step: Step) -> list[Tensor]:
    """The widths may go by the size, also where they are 0 here, so the number that is put in must be the constant itself."""
    x, widths, value = step.named["self"], step.named["pad"], step.named.get("value") or 0
    known = step.zero()
    if value != 0:
        return [varying(step.output)]
    for number in range(len(widths) // 2):
        dim, ends = x.ndim - 1 - number, (widths[2 * number], widths[2 * number + 1])
        if known.shape[dim] == 1 or not any(ends):
            continue
        if min(ends) < 0:
            return [varying(step.output)]
        ends_known = [torch.ones_like(known.narrow(dim, 0, 1)).repeat_interleave(end, dim) for end in ends]
        known = torch.cat([ends_known[0], known, ends_known[1]], dim)
    return [known]


# ---------------------------------------------------------------------- norms


def _by_channel(step: Step, name: str, ndim: int) -> Tensor | None:
    """Where a vector of one entry for each channel is 0, for tensors of ``ndim`` dimensions; None without the vector."""
    if not isinstance(step.named.get(name), Tensor):
        return None
    return step.zero(name).view([1, -1] + [1] * (ndim - 2))


@constant_rule(
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"),
    *("_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm"),
)
def _batch_normed(step: Step) -> list[Tensor]:
    known, gain = step.constant("input"), _by_channel(step, "weight", step.named["input"].ndim)
    if not alike_along(known, [d for d in range(known.ndim) if d != 1]):
        known = reduced(step.zero("input"), [d for d in range(known.ndim) if d != 1], keep=True)
    return [known if gain is None else known | gain, *(varying(t) for t in returned(step)[1:])]


@constant_rule("native_group_norm", "group_norm")
def _group_normed(step: Step) -> list[Tensor]:
    x = step.named.get("input", step.named.get("self"))
    gain = _by_channel(step, "weight", x.ndim)
    return [varying(t) if gain is None or n else gain for n, t in enumerate(returned(step))]


@constant_rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def _layer_normed(step: Step) -> list[Tensor]:
    made = returned(step)
    if not isinstance(weight := step.named.get("weight"), Tensor):
        return [varying(t) for t in made]
    known = step.known(weight).zero
    return [known.view([1] * (made[0].ndim - known.ndim) + [*known.shape]), *(varying(t) for t in made[1:])]
