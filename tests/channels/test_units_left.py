"""Parameters, FLOPs and units of a network without some of its units, beside those of the network that is cut."""

import pytest
import torch
from torch import nn

from sparse_callbacks import slim
from sparse_callbacks.channels.groups import channel_groups
from sparse_callbacks.channels.units_left import flops_network, live_units, parameters_left, shapes_of, without_units
from sparse_callbacks.core.units_left import UnitsLeft


class Residual(nn.Module):
    """Two convolutions that share channels with a third, a depthwise one, norms, and a linear layer behind flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.depthwise = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.back = nn.Conv2d(12, 8, 3, padding=1, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.head = nn.Linear(6 * 5 * 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.back(self.depthwise(self.inner(x)).relu())
        return self.head(self.up(x).relu().flatten(1))


NETWORKS = {
    "residual": (Residual, (2, 4, 4)),
    "mlp": (lambda: nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 2)), (7,)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("lost", [0, 1, 3])
def test_what_is_left_is_what_slim_leaves(name: str, lost: int) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model, x = make().eval(), torch.randn(1, *shape)
    groups = [group for group in channel_groups(model, x) if not group.reason]
    live = [torch.arange(group.size) >= min(lost, group.size - 1) for group in groups]
    masks: dict[str, torch.Tensor] = {}
    for group, keep in zip(groups, live, strict=True):
        for parameter, mask in group.masks(model, keep).items():
            masks[parameter] = (masks.get(parameter, torch.tensor(True)) & mask).expand_as(
                model.get_parameter(parameter)
            )
    left = without_units(shapes_of(model), groups, live, flops_network(model, x, groups))
    _, proof = slim(model, masks, x)
    assert (left.dense_parameters, left.parameters) == (proof.before.parameters, proof.after.parameters)
    assert (left.dense_flops, left.flops) == (proof.before.flops, proof.after.flops)
    assert left.units == {g.name: (g.size - r.units, g.size) for g in groups for r in proof.rows if r.name == g.name}
    assert left.shares["flops"] == proof.after.flops / proof.before.flops
    assert (left.shares["parameters"] < 1) == (lost > 0)
    assert all(torch.equal(live_units(group, masks), keep) for group, keep in zip(groups, live, strict=True))


def test_a_unit_that_nothing_makes_is_not_live() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    (group,) = (g for g in channel_groups(model, torch.zeros(1, 3)) if not g.reason)
    rows, columns = torch.ones(4, 3, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    rows[0], columns[:, 2], columns[0, 3] = False, False, False
    assert live_units(group, {"0.weight": rows, "2.weight": columns}).tolist() == [False, True, False, True]
    assert live_units(group, {"2.weight": columns}).tolist() == [True, True, False, True]
    assert live_units(group, {}).all()
    live = live_units(group, {"0.weight": rows, "2.weight": columns})
    assert parameters_left(shapes_of(model), [group], [live]) == 2 * 3 + 2 + 2 * 2 + 2


def test_a_network_without_products_has_all_of_its_flops() -> None:
    assert UnitsLeft(1, 2, 0.0, 0.0, {}).shares == {"parameters": 0.5, "flops": 1.0}
