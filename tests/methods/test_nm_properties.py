"""Random layers under N:M: after every update each group has exactly N, and nothing else moves."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import loops
from torch import Tensor, nn

from sparse_callbacks import SET, SNFS, RigL
from sparse_callbacks.core.nm_masks import in_groups

METHODS = {"set": SET, "signed": SET, "rigl": RigL, "snfs": SNFS}


@st.composite
def layers(draw: st.DrawFn, m: int, transposable: bool) -> tuple[nn.Module, Tensor, int]:
    """A layer whose inputs, and under tiles outputs, divide into groups of ``m``; an input of it, and the axis of its inputs."""
    groups, dims = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([0, 1, 2]))
    inputs, outputs = (m * draw(st.integers(1, 3)) for _ in range(2))
    if not transposable:
        outputs = draw(st.integers(1, 9))
    if not dims:
        return nn.Linear(inputs, outputs), torch.randn(5, inputs), 1
    transposed, kernel = draw(st.booleans()), draw(st.integers(1, 3))
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d) if transposed else (nn.Conv1d, nn.Conv2d)
    made = kinds[dims - 1](groups * inputs, groups * outputs, kernel, groups=groups)
    return made, torch.randn(3, groups * inputs, *[5] * dims), 0 if transposed else 1


@st.composite
def runs(draw: st.DrawFn) -> tuple[Any, nn.Module, Tensor, int, str]:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    m = draw(st.integers(2, 6))
    n, transposable = draw(st.integers(1, m - 1)), draw(st.booleans())
    layer, x, axis = draw(layers(m, transposable))
    name, pattern = draw(st.sampled_from(sorted(METHODS))), f"{'transposable ' if transposable else ''}{n}:{m}"
    method = METHODS[name](
        pattern=pattern,
        every=1,
        stop=20,
        drop_fraction=f"constant({draw(st.sampled_from([0.1, 0.3, 0.7, 1.0]))})",
        initial_mask=draw(st.sampled_from(["random", "magnitude"])),
        seed=draw(st.integers(0, 99)),
        print_plan=False,
        **({"drop": "signed", "new_weights": "uniform"} if name == "signed" else {}),
    )
    return method, layer, x, axis, pattern


@given(run=runs())
@settings(max_examples=60, deadline=None)
def test_every_group_has_exactly_n_after_every_update(run: tuple[Any, nn.Module, Tensor, int, str]) -> None:
    method, layer, x, axis, pattern = run
    n, m = map(int, pattern.split(" ")[-1].split(":"))
    optimizer = loops.sgd(layer)
    sparse = loops.begin(method, layer, optimizer)
    planned = method.plan()["weight"].zeros
    for _ in range(4):
        mask = sparse.masks["weight"].clone()
        assert bool((in_groups(mask, m, axis).sum(-1) == n).all())
        if pattern.startswith("transposable"):
            assert bool((in_groups(mask, m, 1 - axis).sum(-1) == n).all())
        assert int((~mask).sum()) == planned == mask.numel() // m * (m - n)
        assert not bool(layer.get_parameter("weight")[~mask].any())
        with sparse.batch():
            layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    # RigL takes a gradient step where no weight would move
    assert method.updates > 0 or method.fraction * (layer.get_parameter("weight").numel() - planned) < 1
    sparse.close()
