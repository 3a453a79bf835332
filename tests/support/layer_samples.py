"""Sample calls for the probe of the table of operations: convolutions, products and norms."""

import torch
from torch.nn import functional

from support.operation_probe import Sample

aten = torch.ops.aten
SHAPE = (3, 4, 5)
HAS_FUSED_RMS_NORM = hasattr(aten, "_fused_rms_norm") and "_ndim" not in str(aten._fused_rms_norm.default._schema)
"""Whether it runs on CPUs; the first versions, which take the number of dimensions, do not."""


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
                (2, 6, 2),
                (4, 4, 2),
                (6, 3, 3),
            ):
                x = (*batch, inputs, *places)
                kernel = (2,) * dims
                for shapes, call in (
                    ([x, (outputs, inputs // groups, *kernel)], plain),
                    ([x, (inputs, outputs // groups, *kernel)], turned),
                ):
                    # a depthwise convolution has as many groups as it is given channels, also with several outputs of each
                    is_depthwise = groups == inputs and (call is plain or inputs == outputs)
                    fixed = None if is_depthwise else groups
                    found.append(
                        Sample(
                            "aten.convolution",
                            lambda x, w, _, c=call, g=fixed, d=dims: c(x, w, groups=g or x.shape[-1 - d]),
                            shapes,
                        )
                    )
                    found.append(
                        Sample(
                            "aten.convolution",
                            lambda x, w, b, _, c=call, g=fixed, d=dims: c(x, w, b, groups=g or x.shape[-1 - d]),
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
        *(
            Sample("aten.addmm", lambda b, x, y, _: torch.addmm(b, x, y, beta=0.5, alpha=2), [s, (3, 4), (4, 5)])
            for s in ((5,), (3, 5), (3, 1), (1, 5), (1,), ())
        ),
        *(Sample("aten.addmm", lambda b, x, y, _: torch.addmm(b, x, y), [s, (4, 4), (4, 4)]) for s in ((4,), (4, 1))),
        *(
            Sample("aten._addmm_activation", lambda b, x, y, _: aten._addmm_activation(b, x, y), [s, (3, 4), (4, 5)])
            for s in ((5,), (3, 5))
        ),
        *(Sample("aten.addmv", lambda b, x, y, _: torch.addmv(b, x, y), [s, (3, 4), (4,)]) for s in ((3,), (1,))),
        *(
            Sample("aten.baddbmm", lambda b, x, y, _: torch.baddbmm(b, x, y), [s, (2, 3, 4), (2, 4, 5)])
            for s in ((2, 3, 5), (5,), (1, 3, 1), (2, 1, 1), ())
        ),
        Sample("aten.addbmm", lambda b, x, y, _: torch.addbmm(b, x, y), [(3, 5), (2, 3, 4), (2, 4, 5)]),
        *(
            Sample("aten.matmul", lambda x, y, _: aten.matmul(x, y), s)
            for s in (
                [(3, 4), (4, 5)],
                [(4,), (4,)],
                [(2, 3, 4), (4, 5)],
                [(2, 3, 4), (2, 4, 5)],
                [(2, 1, 3, 4), (2, 6, 4, 5)],
                [(2, 6, 3, 4), (1, 6, 4, 5)],
            )
        ),
    ]
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
        Sample(
            "aten._scaled_dot_product_flash_attention_for_cpu",
            lambda q, k, v, _: attention(q, k, v, is_causal=True),
            [query, query, query],
        ),
        Sample(
            "aten._scaled_dot_product_attention_math",
            lambda q, k, v, _: aten._scaled_dot_product_attention_math(q, k, v),
            [query, (2, 1, 5, 8), (2, 1, 5, 8)],
        ),
        Sample(
            "aten._scaled_dot_product_attention_math",
            lambda q, k, v, _: aten._scaled_dot_product_attention_math(q, k, v),
            [(2, 1, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)],
        ),
        Sample(
            "aten._scaled_dot_product_attention_math",
            lambda q, k, v, _: aten._scaled_dot_product_attention_math(q, k, v),
            [(4, 3, 8), (4, 5, 8), (4, 5, 8)],
        ),
    ]
    return found


def norms() -> list[Sample]:
    """Of norms, in both modes."""
    found = []
    for shape in ((3, 4), (3, 4, 5), (3, 4, 5, 6), (3, 1, 5)):
        count = (shape[1],)
        spread = torch.rand(count, dtype=torch.float64) + 0.5
        for training in (False, True):
            found += [
                Sample(
                    "aten.native_batch_norm",
                    lambda x, m, v, w, b, _, t=training: functional.batch_norm(x, m.clone(), v.clone(), w, b, t),
                    [shape, count, spread, count, count],
                ),
                Sample(
                    "aten.native_batch_norm",
                    lambda x, m, v, _, t=training: functional.batch_norm(x, m.clone(), v.clone(), training=t),
                    [shape, count, spread],
                ),
                Sample(
                    "aten._native_batch_norm_legit",
                    lambda x, m, v, w, b, _, t=training: aten._native_batch_norm_legit(
                        x, w, b, m.clone(), v.clone(), t, 0.1, 1e-5
                    ),
                    [shape, count, spread, count, count],
                ),
            ]
        found += [
            Sample(
                "aten.native_batch_norm",
                lambda x, w, b, _: functional.batch_norm(x, None, None, w, b, True),
                [shape, count, count],
            ),
            Sample(
                "aten._native_batch_norm_legit",
                lambda x, w, b, _: aten._native_batch_norm_legit.no_stats(x, w, b, True, 0.1, 1e-5),
                [shape, count, count],
            ),
            Sample(
                "aten._native_batch_norm_legit_no_training",
                lambda x, m, v, w, b, _: aten._native_batch_norm_legit_no_training(x, w, b, m, v, 0.1, 1e-5),
                [shape, count, spread, count, count],
            ),
            Sample(
                "aten._batch_norm_with_update",
                lambda x, m, v, w, b, _: aten._batch_norm_with_update(x, w, b, m.clone(), v.clone(), 0.1, 1e-5),
                [shape, count, spread, count, count],
            ),
            Sample(
                "aten._batch_norm_no_update",
                lambda x, m, v, w, b, _: aten._batch_norm_no_update(x, w, b, m, v, 0.1, 1e-5),
                [shape, count, spread, count, count],
            ),
        ]
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
            Sample(
                "aten.native_layer_norm",
                lambda x, w, b, _: functional.layer_norm(x, w.shape, w, b),
                [SHAPE, over, over],
            ),
            Sample("aten.native_layer_norm", lambda x, _, o=over: functional.layer_norm(x, o), [SHAPE]),
            Sample("aten.layer_norm", lambda x, w, b, _: aten.layer_norm(x, w.shape, w, b), [SHAPE, over, over]),
            Sample("aten.rms_norm", lambda x, w, _: aten.rms_norm(x, w.shape, w), [SHAPE, over]),
        ]
        if HAS_FUSED_RMS_NORM:
            found.append(
                Sample("aten._fused_rms_norm", lambda x, w, _: aten._fused_rms_norm(x, w.shape, w, 1e-5), [SHAPE, over])
            )
    return found


def recurrent() -> list[Sample]:
    """Of recurrent layers that run as one operation, bilinear ones, and packed sequences."""
    lengths = torch.tensor([4, 3, 1])
    four = [(24, 5), (24, 6), (24,), (24,)]
    return [
        Sample(
            "aten.mkldnn_rnn_layer",
            lambda x, w, u, a, b, h, c, _: aten.mkldnn_rnn_layer(
                *(x, w, u, a, b, h, c), False, [], 2, 6, 1, True, False, False, False
            )[:3],
            [(4, 3, 5), *four, (1, 3, 6), (1, 3, 6)],
            dtype=torch.float32,
        ),
        Sample("aten._trilinear", lambda x, y, w, _: torch.bilinear(x, y, w), [(3, 4), (3, 5), (6, 4, 5)]),
        Sample("aten._trilinear", lambda x, y, w, _: torch.bilinear(x, y, w), [(2, 3, 4), (2, 3, 5), (6, 4, 5)]),
        Sample("aten._trilinear", lambda x, y, w, _: aten._trilinear(x, w, y, [], [], [], [0]), [SHAPE, SHAPE, SHAPE]),
        *(
            Sample(
                "aten._pack_padded_sequence",
                lambda x, n, _, f=first: aten._pack_padded_sequence(x, n, f),
                [(3, 4, 5) if first else (4, 3, 5), lengths],
            )
            for first in (True, False)
        ),
        *(
            Sample(
                "aten._pad_packed_sequence",
                lambda x, n, _, f=first: aten._pad_packed_sequence(x, n, f, 0.0, 4),
                [(8, 5), torch.tensor([3, 2, 2, 1])],
            )
            for first in (True, False)
        ),
    ]
