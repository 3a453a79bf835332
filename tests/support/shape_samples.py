"""Sample calls for the probe of the table of operations: shapes and images."""

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
        ((3, 4, 5), (12, 5)),
        ((3, 4, 5), (3, 20)),
        ((12, 5), (3, 4, 5)),
        ((3, 20), (3, 4, 5)),
        ((3, 8, 5), (3, 2, 4, 5)),
        ((2, 12, 3), (2, 3, 4, 3)),
        ((4, 6), (6, 4)),
        ((4, 6), (8, 3)),
        ((1, 4, 1), (4,)),
        ((4,), (1, 4, 1)),
        ((5, 1), (1, 5)),
        ((), (1, 1)),
        ((1, 1), ()),
        ((0, 4, 3), (0, 12)),
        ((0, 12), (0, 4, 3)),
        ((0, 4), (0,)),
        ((0, 4), (4, 0)),
        ((60,), (3, 4, 5)),
        ((3, 4, 4), (3, 4, 4)),
        ((3, 4, 4), (12, 4)),
        ((4, 4, 4), (4, 16)),
    ]
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
    ]
    for kind in ("reflection", "replication"):
        for dims in (1, 2, 3):
            pads = [1, 2, 1, 0, 0, 1][: 2 * dims]
            found += [
                Sample(
                    f"aten.{kind}_pad{dims}d",
                    lambda x, _, k=kind, p=pads: functional.pad(x, p, mode=_MODES[k]),
                    [(3, 4, 5, 6, 7)[:n]],
                )
                for n in (dims + 1, dims + 2)
            ]
    for shape in ((2, 12, 3, 4), (12, 3, 4), (4, 3, 4)):
        found.append(Sample("aten.pixel_shuffle", lambda x, _: functional.pixel_shuffle(x, 2), [shape]))
    for shape in ((2, 3, 4, 6), (3, 4, 6)):
        found.append(Sample("aten.pixel_unshuffle", lambda x, _: functional.pixel_unshuffle(x, 2), [shape]))
        found.append(Sample("aten.im2col", lambda x, _: functional.unfold(x, (2, 3)), [shape]))
    for shape in ((2, 12, 6), (12, 6)):
        found.append(Sample("aten.col2im", lambda x, _: functional.fold(x, (3, 4), 2), [shape]))
    for name in ("channel_shuffle", "native_channel_shuffle"):
        for groups in (2, 3, 6):
            found.append(Sample(f"aten.{name}", lambda x, _, n=name, g=groups: getattr(aten, n)(x, g), [(2, 6, 3, 4)]))
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
            Sample(
                "aten.split", lambda x, s, d=dim: x.split(s.shape[1], d), [(3, 8, 5)], [(3, 3, 5), (3, 3, 5), (3, 2, 5)]
            ),
            Sample(
                "aten.unsafe_split",
                lambda x, s, d=dim: aten.unsafe_split(x, s.shape[1], d),
                [(3, 8, 5)],
                [(3, 4, 5)] * 2,
            ),
            *(
                Sample(
                    f"aten.{n}",
                    lambda x, s, n=n, d=dim: getattr(aten, n)(x, [t[1] for t in s.shapes], d),
                    [(3, 8, 5)],
                    [(3, 5, 5), (3, 3, 5)],
                )
                for n in ("split_with_sizes", "unsafe_split_with_sizes")
            ),
            Sample("aten.chunk", lambda x, s, d=dim: aten.chunk(x, 2, d), [(3, 8, 5)]),
            Sample("aten.chunk", lambda x, s, d=dim: aten.chunk(x, 3, d), [(3, 8, 5)]),
            Sample("aten.slice", lambda x, s, d=dim: aten.slice(x, d, s.at(1, 2), s.at(1, 5)), [(3, 8, 5)]),
            Sample(
                "aten.slice",
                lambda x, s, d=dim: aten.slice(x, d, s.at(1, 6) - s.at(1, 8), s.at(1, 7) - s.at(1, 8)),
                [(3, 8, 5)],
            ),
            Sample("aten.slice", lambda x, s, d=dim: aten.slice(x, d, 0, 2**63 - 1), [(3, 8, 5)]),
            Sample("aten.slice", lambda x, s, d=dim: aten.slice(x, d, 0, 8, 2), [(3, 8, 5)]),
            Sample("aten.slice", lambda x, s, d=dim: aten.slice(x, d, s.at(1, 5), s.at(1, 2)), [(3, 8, 5)]),
        ]
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
        found += [
            Sample(
                f"aten._upsample_{kind}2d_aa",
                lambda x, _, k=kind: functional.interpolate(x, scale_factor=0.5, mode=k, antialias=True),
                [sizes[2]],
            )
        ]
    boxes = torch.tensor([[0, 0.0, 0.0, 4.0, 4.0], [2, 1.0, 1.0, 5.0, 3.0]], dtype=torch.float64)
    return [
        *found,
        Sample(
            "aten.upsample_bicubic2d",
            lambda x, _: functional.interpolate(x, scale_factor=2, mode="bicubic"),
            [sizes[2]],
        ),
        Sample("aten.avg_pool1d", lambda x, _: aten.avg_pool1d(x, 2), [sizes[1]]),
        Sample("aten.max_pool1d", lambda x, _: aten.max_pool1d(x, 2), [sizes[1]]),
        Sample("aten.adaptive_avg_pool1d", lambda x, _: aten.adaptive_avg_pool1d(x, 2), [sizes[1]]),
        Sample(
            "aten.grid_sampler_2d",
            lambda x, g, _: functional.grid_sample(x, g, align_corners=False),
            [sizes[2], (3, 5, 7, 2)],
        ),
        Sample(
            "aten.grid_sampler_3d",
            lambda x, g, _: functional.grid_sample(x, g, align_corners=False),
            [sizes[3], (3, 5, 2, 7, 3)],
        ),
        *(
            Sample(
                f"torchvision.roi_{n}",
                lambda x, b, _, n=n: getattr(torch.ops.torchvision, f"roi_{n}")(x, b, 1.0, 2, 2, *_MORE[n]),
                [sizes[2], boxes],
            )
            for n in ("align", "pool")
        ),
    ]


_MORE: dict[str, list[Any]] = {"align": [1, False], "pool": []}


def _unpooled(x: Tensor, places: Tensor, _: Any) -> Tensor:
    made: Tensor = (
        functional.max_unpool2d(x, places, 2) if x.ndim == 3 else functional.max_unpool3d(x, places, (1, 2, 2))
    )
    return made
