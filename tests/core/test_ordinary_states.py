"""States and files that are not damaged, though they look unusual: none of them is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sparse_callbacks import DPF, RigL, sparsify
from sparse_callbacks.core.checkpoint_file import read_mapping


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_mapping(tmp_path / "x.pt", "Give another.")["a"], torch.ones(3))


def test_the_type_of_a_number_is_not_compared() -> None:
    with_numpy = RigL(np.float64(0.5), every=np.int64(2), print_plan=False)
    assert with_numpy.arguments == RigL(0.5, every=2, print_plan=False).arguments


def test_excluding_nothing_is_as_the_default() -> None:
    assert RigL(0.5, exclude=[], print_plan=False).arguments == RigL(0.5, print_plan=False).arguments
    with pytest.raises(ValueError, match="include="):
        RigL(0.5, include=[])


@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_filters_may_be_whole_while_few_weights_are_due(distribution: str) -> None:
    """The state of each step of the curve is taken, also where less than a filter is due."""

    def begin(state: dict | None = None) -> tuple:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        method = DPF(0.5, unit="filter", distribution=distribution, every=1, stop=40, print_plan=False)
        return model, optimizer, sparsify(method, model, optimizer, 40, state=state)

    model, optimizer, run = begin()
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(4, 1, 4, 4)).square().sum().backward()
        optimizer.step()
        state, weights = run.state_dict(), {n: t.clone() for n, t in model.state_dict().items()}
        other, _, again = begin()
        other.load_state_dict(weights)
        again.load_state_dict(state)
        with pytest.warns(UserWarning, match="before its target"):
            again.close()
