"""First masks of every kind of layer that may be sparse, layer by layer, in every type of numbers."""

from typing import Any

import pytest
import torch
from support import loops
from torch import nn

from sparse_callbacks import RigL


class Kinds(nn.Module):
    """Every kind of layer that may be sparse, tied and stacked ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.words.weight
        self.lstm, self.attention = nn.LSTM(8, 6), nn.MultiheadAttention(8, 2)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("start", ["magnitude", "nonzero", "mapping"])
def test_every_kind_of_layer_starts_by_its_layers(start: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Kinds().to(dtype)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    given: Any = start
    if start != "magnitude":
        for p in model.parameters():
            p.data *= torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) >= 0.7
        given = {n: p.clone() for n, p in model.named_parameters()} if start == "mapping" else start
    sparsity = 0.7 if start == "magnitude" else None
    method = RigL(sparsity, initial_mask=given, include="*weight*", distribution="uniform", print_plan=False)
    run = loops.begin(method, model, loops.sgd(model))
    kinds = "words.weight lstm.weight_ih_l0 attention.in_proj_weight grouped.weight up.weight"
    assert set(kinds.split()) <= run.masks.keys()
    for name, mask in run.masks.items():
        assert int((~mask).sum()) == run.plan()[name].zeros
        if start != "magnitude":
            assert torch.equal(mask, model.get_parameter(name) != 0)
            continue
        for part, w in zip(*(method.weights.entries[name].split(t) for t in (mask, weights[name])), strict=True):
            assert w[part].abs().min() >= w[~part].abs().max()
            assert int((~part).sum()) == int(0.7 * part.numel())
