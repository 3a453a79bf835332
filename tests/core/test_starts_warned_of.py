"""Random masks over weights that are not fresh are warned about; fresh weights and other starts are not."""

import warnings

import pytest
import torch
from support import loops
from support.loops import net
from torch import nn

from sparse_callbacks import GMP, RigL, SparsityCallback, Static


def begin(method: SparsityCallback, model: nn.Module) -> None:
    loops.begin(method, model, loops.sgd(model))


def pruned(model: nn.Module, share: float = 0.5) -> None:
    for p in model.parameters():
        if p.ndim > 1:
            p.data *= torch.rand(p.shape, generator=torch.Generator().manual_seed(0)) >= share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_random_mask_over_a_pruned_model_is_warned_about(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    pruned(model, 0.2)
    with pytest.warns(
        UserWarning, match=r"RigL draws its masks at random, and 2.\..% of the weights are zero already.*'nonzero'"
    ):
        begin(RigL(0.5, print_plan=False), model)


def test_a_random_mask_over_a_trained_norm_is_warned_about() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    model(torch.randn(6, 12))
    with pytest.warns(
        UserWarning, match=r"the network was trained before: 1 has counted batches. Give initial_mask='magnitude'"
    ):
        begin(RigL(0.5, print_plan=False), model)


def test_a_frozen_backbone_says_nothing_of_a_fresh_head() -> None:
    backbone = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8))
    backbone(torch.randn(6, 12))
    model = nn.Sequential(backbone.requires_grad_(False), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin(RigL(0.5, rescale="fan_in", print_plan=False), model)


class Words(nn.Module):
    """Zeros that mean nothing: a padding row, and a layer that begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 16, padding_idx=0)
        self.inner, self.last = nn.Linear(16, 64), nn.Linear(64, 4)
        nn.init.zeros_(self.last.weight)


def test_zeros_that_half_precision_draws_are_not_warned_about() -> None:
    model = nn.Linear(32, 32, dtype=torch.bfloat16)
    model.weight.data[0, :4] = 0  # uniform numbers have 256 values there
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin(Static(0.5, print_plan=False), model)


def test_a_zero_that_a_large_layer_was_drawn_with_is_not_spoken_of() -> None:
    model = nn.Linear(100, 100)
    model.weight.data[0, 0] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin(Static(0.5, rescale="fan_in", print_plan=False), model)


def test_fresh_weights_and_other_starts_are_not_warned_about() -> None:
    model, trained = Words(), nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    trained(torch.randn(6, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin(Static(0.5, include=["words.weight", "inner*", "last*"], print_plan=False), model)
        begin(RigL(0.5, initial_mask="magnitude", print_plan=False), trained)
        begin(GMP(0.5, print_plan=False), net())


def test_a_layer_without_active_weights_is_warned_about() -> None:
    model = net()
    pruned(model)
    nn.init.zeros_(model[2].weight)
    with pytest.warns(
        UserWarning, match=r"2\.weight has no active weight in initial_mask='nonzero', and so never trains"
    ):
        begin(RigL(initial_mask="nonzero", print_plan=False), model)
