"""Two networks whose training costs were worked by hand, and the methods that were counted on them."""

from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks import DPF, GMP, SET, SNFS, ConstrainedL0, GaP, RigL, SparsityCallback, Static

STEPS = 12
# per sample; 12 steps at sparsity 0.9, updates of RigL before steps 3, 7 and 11 (from 0), phases of GaP of 4 steps
POSITIONS = {
    "conv": {"conv1.weight": 64, "conv2.weight": 9, "fc1.weight": 1, "fc2.weight": 1},
    "mlp": {"fc1.weight": 1, "fc2.weight": 1},
}
SIZES = {
    "conv": {"conv1.weight": 36, "conv2.weight": 108, "fc1.weight": 918, "fc2.weight": 204},
    "mlp": {"fc1.weight": 693, "fc2.weight": 396},
}
KEPT = {
    "conv": {"conv1.weight": 4, "conv2.weight": 11, "fc1.weight": 92, "fc2.weight": 21},
    "mlp": {"fc1.weight": 70, "fc2.weight": 40},
}
FORWARD = {"conv": (4398, 468), "mlp": (1089, 110)}
TOTALS = {
    "conv": {
        "dense": 158328,
        "static": 16848,
        "set": 16848,
        "rigl": 28638,
        "snfs": 64008,
        "gmp": 58911,
        "dpf": 64008,
        "dpf_cubic": 106152,
        "gap": 64008,
        "gap_finetuned": 69624,
        "l0": 158328,
    },
    "mlp": {
        "dense": 39204,
        "static": 3960,
        "set": 3960,
        "rigl": 6897,
        "snfs": 15708,
        "gmp": 14313,
        "dpf": 15708,
        "dpf_cubic": 26156,
        "gap": 14388,
        "gap_finetuned": 15708,
        "l0": 39204,
    },
}
GMP_FORWARD = {
    "conv": [4398, 3521, 2781, 2159, 1668, 1296, 959, 732, 606, 566, 482, 469],
    "mlp": [1089, 865, 677, 523, 401, 305, 233, 181, 146, 126, 115, 110],
}
GAP_STEPS = {"conv": [7548, 4023, 4431], "mlp": [2199, 1398]}
NETS = list(TOTALS)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, groups=2)
        self.fc1, self.fc2 = nn.Linear(54, 17), nn.Linear(17, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x).relu()).relu().flatten(1)
        return self.fc2(self.fc1(x).relu())


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(21, 33), nn.Linear(33, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


def network(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    return (ConvNet(), (1, 8, 8)) if kind == "conv" else (MLP(), (21,))


def method_for(kind: str, name: str) -> SparsityCallback:
    common: dict[str, Any] = {"distribution": "uniform", "print_plan": False}
    # after steps that were taken: those that an update replaces do not count
    moves = {**common, "every": 3, "start": 3, "stop": 1000, "drop_fraction": "constant(0.3)"}
    partitions = {"conv": [["conv1*"], ["conv2*"], ["fc*"]], "mlp": [["fc1*"], ["fc2*"]]}[kind]
    made = {
        "static": lambda: Static(0.9, **common),
        "set": lambda: SET(0.9, **moves),
        "rigl": lambda: RigL(0.9, **moves),
        "snfs": lambda: SNFS(0.9, **moves),
        "gmp": lambda: GMP(0.9, every=1, start=0, stop=STEPS, **common),
        "dpf": lambda: DPF("constant(0.9)", every=4, stop=STEPS, **common),
        "dpf_cubic": lambda: DPF(0.9, every=4, start=0, stop=STEPS, **common),
        "gap": lambda: GaP(0.9, partitions=partitions, every=4, restart=False, **common),
        "gap_finetuned": lambda: GaP(0.9, partitions=partitions, every=4, restart=False, **common),
        "l0": lambda: ConstrainedL0(density=0.5, print_plan=False),
    }
    return made[name]()
