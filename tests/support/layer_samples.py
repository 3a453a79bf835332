"""Sample calls for the probe of the table of operations: shapes, images, products and norms."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from support.operation_probe import Sample

aten = torch.ops.aten
SHAPE = (3, 4, 5)


def reshaping() -> list[Sample]:
    """Of operations that give a tensor another shape; where sizes come out of those of the input, ``sizes`` has them."""
    views: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((3, 4, 5), (12, 5)), ((3, 4, 5), (3, 20)), ((12, 5), (3, 4, 5)), ((3, 20), (3, 4, 5)), ((3, 8, 5), (3, 2, 4, 5)),
        ((2, 12, 3), (2, 3, 4, 3)), ((4, 6), (6, 4)), ((4, 6), (8, 3)), ((1, 4, 1), (4,)), ((4,), (1, 4, 1)), ((5, 1), (1, 5)),
        ((), (1, 1)), ((1, 1), ()), ((0, 4, 3), (0, 12)), ((0, 12), (0, 4, 3)), ((0, 4), (0,)), ((0, 4), (4, 0)), ((60,), (3, 4, 5)),
        ((3, 4, 4), (3, 4, 4)), ((3, 4, 4), (12, 4)), ((4, 4, 4), (4, 16)),
    ]  # fmt: skip
    found = [Sample("aten.view", lambda x, s: x.view(s.shape), [a], b) for a, b in views]
    for name in ("_unsafe_view", "view_copy", "_reshape_alias", "_reshape_copy", "reshape"):
        if name == "_reshape_alias":
            found.append(
                Sample(
                    "aten._reshape_alias",
                    lambda x, s: aten._reshape_alias(x, s.shape, [s.shape[1], 1]),
                    [SHAPE],
                    (3, 20),
                )
            )
        else:
            found.append(
                Sample(
                    f"aten.{name}",
                    lambda x, s, n=name: getattr(aten, n)(x, s.shape),
                    [SHAPE],
                    (12, 5),
                )
            )
    # several branches flattened into one axis
    found += [
        Sample("aten.view", lambda x, y, s: torch.cat([x, y], 1).view(s.shape), [(3, 4, 5), (3, 6, 5)], (3, 50)),
        Sample("aten.view", lambda x, y, s: torch.cat([x, y], 1).view(s.shape), [(3, 4, 5), (3, 6, 5)], (3, 2, 5, 5)),
        Sample("aten.view", lambda x, s: x.view(torch.float32), [SHAPE]),
        Sample("aten.flatten", lambda x, _: aten.flatten(x, 1, 2), [SHAPE]),
        Sample("aten.unflatten", lambda x, s: aten.unflatten(x, 1, s.shape[1:3]), [(3, 6, 5)], (3, 2, 3, 5)),
    ]
    for dim in (0, 1, -1, -2):
        found.append(Sample("aten.unsqueeze", lambda x, _, d=dim: x.unsqueeze(d), [SHAPE]))
        found.append(Sample("aten.unsqueeze", lambda x, _, d=dim: x.clone().unsqueeze_(d), [SHAPE]))
        found.append(Sample("aten.squeeze", lambda x, _, d=dim: x.squeeze(d), [(6, 1, 5)]))
        found.append(Sample("aten.squeeze", lambda x, _, d=dim: x.clone().squeeze_(d), [(6, 1, 5)]))
        found.append(Sample("aten.transpose", lambda x, _, d=dim: x.transpose(d, 1), [SHAPE]))
        found.append(Sample("aten.transpose", lambda x, _, d=dim: x.clone().transpose_(d, 1), [SHAPE]))
        found.append(Sample("aten.transpose", lambda x, _, d=dim: x.clone().transpose_(d, 1), [(4, 4, 4)]))
    found += [
        Sample("aten.squeeze", lambda x, _: x.squeeze(), [(5, 1, 6, 1)]),
        Sample("aten.squeeze", lambda x, _: x.squeeze((1, 3)), [(5, 1, 6, 1)]),
        Sample("aten.permute", lambda x, _: x.permute(1, -1, 0), [SHAPE]),
        Sample("aten.permute", lambda x, _: x.permute(2, 0, 1), [(4, 4, 4)]),
        Sample("aten.transpose", lambda x, _: x.mT, [SHAPE]),
        Sample("aten.t", lambda x, _: x.t(), [(3, 4)]),
        Sample("aten.t", lambda x, _: x.t(), [(4,)]),
        Sample("aten.t", lambda x, _: x.clone().t_(), [(3, 4)]),
        Sample("aten.numpy_T", lambda x, _: aten.numpy_T(x), [SHAPE]),
        Sample("aten.expand", lambda x, s: x.expand(s.shape), [(3, 1, 5)], (3, 4, 5)),
        Sample("aten.expand", lambda x, s: x.expand(s.shape), [(4, 1)], (3, 4, 5)),
        Sample("aten.expand", lambda x, s: x.expand(-1, 4, -1), [(3, 1, 5)]),
        Sample("aten.repeat", lambda x, s: x.repeat(2, 1, 3), [SHAPE]),
        Sample("aten.repeat", lambda x, s: x.repeat(2, 3, 1, 1), [SHAPE]),
        Sample("aten.repeat", lambda x, s: x.repeat(1, 2), [(4,)]),
        Sample("aten.constant_pad_nd", lambda x, _: functional.pad(x, (1, 2)), [SHAPE]),
        Sample("aten.constant_pad_nd", lambda x, _: functional.pad(x, (0, 0, 2, 0)), [SHAPE]),
        Sample("aten.constant_pad_nd", lambda x, _: functional.pad(x, (0, 0, -1, 2)), [SHAPE]),
        Sample("aten.constant_pad_nd", lambda x, _: functional.pad(x, (0, -1)), [SHAPE]),
        Sample("aten.constant_pad_nd", lambda x, _: functional.pad(x, (0, 0, 0, 0, 1, 1)), [SHAPE]),
    ]  # fmt: skip
    for kind in ("reflection", "replication"):
        for dims in (1, 2, 3):
            pads = [1, 2, 1, 0, 0, 1][: 2 * dims]
            found += [
                Sample(f"aten.{kind}_pad{dims}d", lambda x, _, k=kind, p=pads: functional.pad(x, p, mode=_MODES[k]), [(3, 4, 5, 6, 7)[:n]])
                for n in (dims + 1, dims + 2)
            ]  # fmt: skip
    for shape in ((2, 12, 3, 4), (12, 3, 4), (4, 3, 4)):
        found.append(Sample("aten.pixel_shuffle", lambda x, _: functional.pixel_shuffle(x, 2), [shape]))
    for shape in ((2, 3, 4, 6), (3, 4, 6)):
        found.append(Sample("aten.pixel_unshuffle", lambda x, _: functional.pixel_unshuffle(x, 2), [shape]))
        found.append(Sample("aten.im2col", lambda x, _: functional.unfold(x, (2, 3)), [shape]))
    for dim in (1, -1):
        found.append(Sample("aten.unfold", lambda x, _, d=dim: x.unfold(d, 2, 1), [SHAPE]))
    for dims in ((0, 1), (-1, 1), (2, 0)):
        found.append(Sample("aten.diagonal", lambda x, _, d=dims: x.diagonal(1, *d), [SHAPE]))
    for name in ("tril", "triu"):
        found.append(Sample(f"aten.{name}", lambda x, _, n=name: getattr(torch, n)(x), [SHAPE]))
    return found


_MODES = {"reflection": "reflect", "replication": "replicate"}


def joining() -> list[Sample]:
    """Of operations that put tensors together and take them apart."""
    found = []
    for dim in (1, -2):
        found += [
            Sample("aten.cat", lambda x, y, _, d=dim: torch.cat([x, y], d), [(3, 4, 5), (3, 2, 5)]),
            Sample("aten.cat", lambda x, y, z, _, d=dim: torch.cat([x, y, z, x], d), [(3, 4, 5), (3, 2, 5), (3, 1, 5)]),
            Sample("aten.cat", lambda x, y, z, _, d=dim: torch.cat([x, z, y], d), [(3, 4, 5), (3, 2, 5), (0,)]),
            Sample("aten.cat", lambda x, y, z, _, d=dim: torch.cat([x, z, y], d), [(3, 4, 5), (3, 2, 5), (3, 0, 5)]),
            Sample("aten.stack", lambda x, y, _, d=dim: torch.stack([x, y], d), [SHAPE, SHAPE]),
            Sample("aten.select", lambda x, _, d=dim: x.select(d, -1), [SHAPE]),
            Sample("aten.unbind", lambda x, _, d=dim: x.unbind(d), [SHAPE]),
            Sample("aten.split", lambda x, s, d=dim: x.split(s.shape[1], d), [(3, 8, 5)], [(3, 4, 5)] * 2),
            Sample("aten.split", lambda x, s, d=dim: x.split(s.shape[1], d), [(3, 8, 5)], [(3, 3, 5), (3, 3, 5), (3, 2, 5)]),
            Sample("aten.unsafe_split", lambda x, s, d=dim: aten.unsafe_split(x, s.shape[1], d), [(3, 8, 5)], [(3, 4, 5)] * 2),
            *(
                Sample(f"aten.{n}", lambda x, s, n=n, d=dim: getattr(aten, n)(x, [t[1] for t in s.shapes], d), [(3, 8, 5)], [(3, 5, 5), (3, 3, 5)])
                for n in ("split_with_sizes", "unsafe_split_with_sizes")
            ),
            Sample("aten.chunk", lambda x, s, d=dim: aten.chunk(x, 2, d), [(3, 8, 5)]),
            Sample("aten.chunk", lambda x, s, d=dim: aten.chunk(x, 3, d), [(3, 8, 5)]),
            Sample("aten.slice", lambda x, s, d=dim: aten.slice(x, d, s.at(1, 2), s.at(1, 5)), [(3, 8, 5)]),
            Sample("aten.slice", lambda x, s, d=dim: aten.slice(x, d, s.at(1, 6) - s.at(1, 8), s.at(1, 7) - s.at(1, 8)), [(3, 8, 5)]),
            Sample("aten.slice", lambda x, s, d=dim: aten.slice(x, d, 0, 2**63 - 1), [(3, 8, 5)]),
            Sample("aten.slice", lambda x, s, d=dim: aten.slice(x, d, 0, 8, 2), [(3, 8, 5)]),
            Sample("aten.slice", lambda x, s, d=dim: aten.slice(x, d, s.at(1, 5), s.at(1, 2)), [(3, 8, 5)]),
        ]  # fmt: skip
    return [
        *found,
        Sample("aten.stack", lambda x, y, _: torch.stack([x, y], -1), [SHAPE, SHAPE]),
        Sample("aten.stack", lambda x, y, _: torch.stack([x, y]), [(), ()]),
        Sample("aten.split", lambda x, s: x.chunk(2, 1), [(3, 8, 5)]),
    ]


def images() -> list[Sample]:
    """Of pooling, resizing and sampling."""
    sizes = {1: (3, 4, 8), 2: (3, 4, 8, 6), 3: (3, 4, 8, 6, 4)}
    found = []
    for dims, shape in sizes.items():
        for given in (shape, shape[1:]):
            if dims > 1:
                found.append(
                    Sample(
                        f"aten.avg_pool{dims}d",
                        lambda x, _, n=dims: getattr(aten, f"avg_pool{n}d")(x, [2] * n),
                        [given],
                    )
                )
                found.append(
                    Sample(
                        f"aten.max_pool{dims}d_with_indices",
                        lambda x, _, n=dims: getattr(aten, f"max_pool{n}d_with_indices")(x, [2] * n),
                        [given],
                    )
                )
                found.append(
                    Sample(
                        f"aten._adaptive_avg_pool{dims}d",
                        lambda x, _, n=dims: getattr(aten, f"_adaptive_avg_pool{n}d")(x, [2] * n),
                        [given],
                    )
                )
                found.append(
                    Sample(
                        f"aten.adaptive_max_pool{dims}d",
                        lambda x, _, n=dims: getattr(aten, f"adaptive_max_pool{n}d")(x, [2] * n),
                        [given],
                    )
                )
                places = (
                    torch.arange(24).view(4, 3, 2).flip(1) if dims == 2 else torch.arange(12).view(4, 1, 3, 1).flip(2)
                )
                values = [4, *places.shape[1:]]
                found.append(Sample(f"aten.max_unpool{dims}d", _unpooled, [values, places % places[0].numel()]))
        found.append(
            Sample(f"aten.upsample_nearest{dims}d", lambda x, _: functional.interpolate(x, scale_factor=2), [shape])
        )
        found.append(
            Sample(
                f"aten._upsample_nearest_exact{dims}d",
                lambda x, _: functional.interpolate(x, scale_factor=2, mode="nearest-exact"),
                [shape],
            )
        )
        kind = {1: "linear", 2: "bilinear", 3: "trilinear"}[dims]
        found.append(
            Sample(
                f"aten.upsample_{kind}{dims}d",
                lambda x, _, k=kind: functional.interpolate(x, scale_factor=2, mode=k),
                [shape],
            )
        )
    for kind in ("bilinear", "bicubic"):
        found.append(
            Sample(
                f"aten._upsample_{kind}2d_aa",
                lambda x, _, k=kind: functional.interpolate(x, scale_factor=0.5, mode=k, antialias=True),
                [sizes[2]],
            )
        )
    boxes = torch.tensor([[0, 0.0, 0.0, 4.0, 4.0], [2, 1.0, 1.0, 5.0, 3.0]], dtype=torch.float64)
    return [
        *found,
        Sample("aten.upsample_bicubic2d", lambda x, _: functional.interpolate(x, scale_factor=2, mode="bicubic"), [sizes[2]]),
        Sample("aten.avg_pool1d", lambda x, _: aten.avg_pool1d(x, 2), [sizes[1]]),
        Sample("aten.max_pool1d", lambda x, _: aten.max_pool1d(x, 2), [sizes[1]]),
        Sample("aten.adaptive_avg_pool1d", lambda x, _: aten.adaptive_avg_pool1d(x, 2), [sizes[1]]),
        Sample("aten.grid_sampler_2d", lambda x, g, _: functional.grid_sample(x, g, align_corners=False), [sizes[2], (3, 5, 7, 2)]),
        Sample("aten.grid_sampler_3d", lambda x, g, _: functional.grid_sample(x, g, align_corners=False), [sizes[3], (3, 5, 2, 7, 3)]),
        *(Sample(f"torchvision.roi_{n}", lambda x, b, _, n=n: getattr(torch.ops.torchvision, f"roi_{n}")(x, b, 1.0, 2, 2, *_MORE[n]), [sizes[2], boxes]) for n in ("align", "pool")),
    ]  # fmt: skip


_MORE: dict[str, list[Any]] = {"align": [1, False], "pool": []}


def _unpooled(x: Tensor, places: Tensor, _: Any) -> Tensor:
    made: Tensor = (
        functional.max_unpool2d(x, places, 2) if x.ndim == 3 else functional.max_unpool3d(x, places, (1, 2, 2))
    )
    return made


def convolutions() -> list[Sample]:
    """Of convolutions, transposed ones and those without a batch too."""
    found = []
    for dims in (1, 2, 3):
        places = (5, 4, 3)[:dims]
        plain = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[dims]
        turned = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}[dims]
        for batch in ((2,), ()):
            for inputs, outputs, groups in (
                (6, 4, 1),
                (1, 4, 1),
                (6, 1, 1),
                (6, 8, 2),
                (6, 4, 2),
                (4, 4, 4),
                (4, 8, 4),
                (4, 4, 2),
                (6, 3, 3),
            ):
                x = (*batch, inputs, *places)
                kernel = (2,) * dims
                for shapes, call in (
                    ([x, (outputs, inputs // groups, *kernel)], plain),
                    ([x, (inputs, outputs // groups, *kernel)], turned),
                ):
                    # a depthwise convolution has as many groups as it is given channels
                    fixed = None if groups == inputs == outputs else groups
                    found.append(
                        Sample(
                            "aten.convolution", lambda x, w, _, c=call, g=fixed: c(x, w, groups=g or w.shape[0]), shapes
                        )
                    )
                    found.append(
                        Sample(
                            "aten.convolution",
                            lambda x, w, b, _, c=call, g=fixed: c(x, w, b, groups=g or w.shape[0]),
                            [*shapes, (outputs,)],
                        )
                    )
    for name, dims in (("conv1d", 1), ("conv2d", 2), ("conv3d", 3)):
        found.append(
            Sample(
                f"aten.{name}",
                lambda x, w, b, _, n=name: getattr(aten, n)(x, w, b),
                [(2, 3, *(5, 4, 6)[:dims]), (4, 3, *[2] * dims), (4,)],
            )
        )
    found.append(
        Sample(
            "aten._convolution",
            lambda x, w, b, _: torch._convolution(
                x, w, b, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, False, False, False, False
            ),
            [(2, 3, 5, 4), (4, 3, 2, 2), (4,)],
        )
    )
    if torch.backends.mkldnn.is_available():
        found.append(
            Sample(
                "aten.mkldnn_convolution",
                lambda x, w, b, _: aten.mkldnn_convolution(x, w, b, [0, 0], [1, 1], [1, 1], 1),
                [(2, 3, 5, 4), (4, 3, 2, 2), (4,)],
                dtype=torch.float32,
            )
        )
    return found


def products() -> list[Sample]:
    """Of products of matrices, and of attention."""
    found = [
        Sample("aten.mm", lambda x, y, _: x @ y, [(3, 4), (4, 5)]),
        Sample("aten.mm", lambda x, w, _: functional.linear(x, w), [(3, 4), (5, 4)]),
        Sample("aten.bmm", lambda x, y, _: torch.bmm(x, y), [(2, 3, 4), (2, 4, 5)]),
        Sample("aten.bmm", lambda x, y, _: x @ y, [(2, 3, 4), (2, 4, 5)]),
        Sample("aten.mv", lambda x, y, _: torch.mv(x, y), [(3, 4), (4,)]),
        Sample("aten.dot", lambda x, y, _: torch.dot(x, y), [(4,), (4,)]),
        Sample("aten.addmm", lambda x, w, b, _: functional.linear(x, w, b), [(3, 4), (5, 4), (5,)]),
        *(Sample("aten.addmm", lambda b, x, y, _: torch.addmm(b, x, y, beta=0.5, alpha=2), [s, (3, 4), (4, 5)]) for s in ((5,), (3, 5), (3, 1), (1, 5), (1,), ())),
        *(Sample("aten.addmm", lambda b, x, y, _: torch.addmm(b, x, y), [s, (4, 4), (4, 4)]) for s in ((4,), (4, 1))),
        *(Sample("aten._addmm_activation", lambda b, x, y, _: aten._addmm_activation(b, x, y), [s, (3, 4), (4, 5)]) for s in ((5,), (3, 5))),
        *(Sample("aten.addmv", lambda b, x, y, _: torch.addmv(b, x, y), [s, (3, 4), (4,)]) for s in ((3,), (1,))),
        *(Sample("aten.baddbmm", lambda b, x, y, _: torch.baddbmm(b, x, y), [s, (2, 3, 4), (2, 4, 5)]) for s in ((2, 3, 5), (5,), (1, 3, 1), (2, 1, 1), ())),
        Sample("aten.addbmm", lambda b, x, y, _: torch.addbmm(b, x, y), [(3, 5), (2, 3, 4), (2, 4, 5)]),
        *(Sample("aten.matmul", lambda x, y, _: aten.matmul(x, y), s) for s in ([(3, 4), (4, 5)], [(4,), (4,)], [(2, 3, 4), (4, 5)], [(2, 3, 4), (2, 4, 5)], [(2, 1, 3, 4), (2, 6, 4, 5)], [(2, 6, 3, 4), (1, 6, 4, 5)])),
    ]  # fmt: skip
    query, grouped = (2, 4, 3, 8), (2, 2, 5, 8)
    masks: list[tuple[int, ...]] = [(3, 5), (2, 1, 3, 5), (1, 4, 3, 5), (2, 4, 1, 5), (1, 1, 3, 5)]
    attention = functional.scaled_dot_product_attention
    for mask in masks:
        found.append(
            Sample(
                "aten._scaled_dot_product_flash_attention_for_cpu",
                lambda q, k, v, m, _: attention(q, k, v, m),
                [query, (2, 4, 5, 8), (2, 4, 5, 8), mask],
            )
        )
        found.append(
            Sample(
                "aten._scaled_dot_product_attention_math",
                lambda q, k, v, m, _: aten._scaled_dot_product_attention_math(q, k, v, m),
                [query, (2, 4, 5, 8), (2, 4, 5, 8), mask],
            )
        )
        found.append(
            Sample(
                "aten.scaled_dot_product_attention",
                lambda q, k, v, m, _: attention(q, k, v, m),
                [query, (2, 4, 5, 8), (2, 4, 5, 8), mask],
            )
        )
        found.append(
            Sample(
                "aten._scaled_dot_product_attention_math",
                lambda q, k, v, m, _: aten._scaled_dot_product_attention_math(q, k, v, m, enable_gqa=True),
                [query, grouped, grouped, mask],
            )
        )
    found += [
        Sample("aten._scaled_dot_product_flash_attention_for_cpu", lambda q, k, v, _: attention(q, k, v, is_causal=True), [query, query, query]),
        Sample("aten._scaled_dot_product_attention_math", lambda q, k, v, _: aten._scaled_dot_product_attention_math(q, k, v), [query, (2, 1, 5, 8), (2, 1, 5, 8)]),
        Sample("aten._scaled_dot_product_attention_math", lambda q, k, v, _: aten._scaled_dot_product_attention_math(q, k, v), [(2, 1, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)]),
        Sample("aten._scaled_dot_product_attention_math", lambda q, k, v, _: aten._scaled_dot_product_attention_math(q, k, v), [(4, 3, 8), (4, 5, 8), (4, 5, 8)]),
    ]  # fmt: skip
    return found


def norms() -> list[Sample]:
    """Of norms, in both modes."""
    found = []
    for shape in ((3, 4), (3, 4, 5), (3, 4, 5, 6), (3, 1, 5)):
        count = (shape[1],)
        spread = torch.rand(count, dtype=torch.float64) + 0.5
        for training in (False, True):
            found += [
                Sample("aten.native_batch_norm", lambda x, m, v, w, b, _, t=training: functional.batch_norm(x, m.clone(), v.clone(), w, b, t), [shape, count, spread, count, count]),
                Sample("aten.native_batch_norm", lambda x, m, v, _, t=training: functional.batch_norm(x, m.clone(), v.clone(), training=t), [shape, count, spread]),
                Sample("aten._native_batch_norm_legit", lambda x, m, v, w, b, _, t=training: aten._native_batch_norm_legit(x, w, b, m.clone(), v.clone(), t, 0.1, 1e-5), [shape, count, spread, count, count]),
            ]  # fmt: skip
        found += [
            Sample("aten.native_batch_norm", lambda x, w, b, _: functional.batch_norm(x, None, None, w, b, True), [shape, count, count]),
            Sample("aten._native_batch_norm_legit", lambda x, w, b, _: aten._native_batch_norm_legit.no_stats(x, w, b, True, 0.1, 1e-5), [shape, count, count]),
            Sample("aten._native_batch_norm_legit_no_training", lambda x, m, v, w, b, _: aten._native_batch_norm_legit_no_training(x, w, b, m, v, 0.1, 1e-5), [shape, count, spread, count, count]),
            Sample("aten._batch_norm_with_update", lambda x, m, v, w, b, _: aten._batch_norm_with_update(x, w, b, m.clone(), v.clone(), 0.1, 1e-5), [shape, count, spread, count, count]),
            Sample("aten._batch_norm_no_update", lambda x, m, v, w, b, _: aten._batch_norm_no_update(x, w, b, m, v, 0.1, 1e-5), [shape, count, spread, count, count]),
        ]  # fmt: skip
        if len(shape) > 2 and shape[1] > 1:
            found.append(
                Sample(
                    "aten.native_batch_norm",
                    lambda x, w, b, _: functional.instance_norm(x, weight=w, bias=b),
                    [shape, count, count],
                )
            )
            found.append(
                Sample(
                    "aten.native_group_norm",
                    lambda x, w, b, _: functional.group_norm(x, 2, w, b),
                    [shape, count, count],
                )
            )
            found.append(
                Sample(
                    "aten.group_norm",
                    lambda x, w, b, _: aten.group_norm(x, 2, w, b),
                    [shape, count, count],
                )
            )
    for over in ((5,), (4, 5)):
        found += [
            Sample("aten.native_layer_norm", lambda x, w, b, _: functional.layer_norm(x, w.shape, w, b), [SHAPE, over, over]),
            Sample("aten.native_layer_norm", lambda x, _, o=over: functional.layer_norm(x, o), [SHAPE]),
            Sample("aten.layer_norm", lambda x, w, b, _: aten.layer_norm(x, w.shape, w, b), [SHAPE, over, over]),
            Sample("aten.rms_norm", lambda x, w, _: aten.rms_norm(x, w.shape, w), [SHAPE, over]),
        ]  # fmt: skip
        if hasattr(aten, "_fused_rms_norm"):
            by_number = "normalized_shape_ndim" in str(aten._fused_rms_norm.default._schema)
            given: Any = len(over) if by_number else over
            found.append(
                Sample(
                    "aten._fused_rms_norm",
                    lambda x, w, _, n=given: aten._fused_rms_norm(x, n, w, 1e-5),
                    [SHAPE, over],
                )
            )
    return found
