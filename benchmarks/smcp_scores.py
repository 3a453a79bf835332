"""Measures what SMCP's correction for norms and its hysteresis do, on a small ResNet-20.

    python benchmarks/smcp_scores.py --root FOLDER

FOLDER holds torchvision's files of Fashion-MNIST. Images are pooled to 14 x 14, and each run takes 500 steps of 64 images,
about 45 seconds on one core. Writes benchmarks/results/smcp_scores.md.
"""

import argparse
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hard_masks import HardSMCP, UncorrectedSMCP
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import FashionMNIST

from sparse_callbacks import SMCP
from sparse_callbacks.tasks.models import resnet20

SHAPE, STEPS, BATCH, BUDGET = (1, 14, 14), 500, 64, 0.3
RESULTS = Path(__file__).parent / "results" / "smcp_scores.md"
ROWS: dict[str, Callable[..., SMCP] | None] = {
    "as in version 0.1": UncorrectedSMCP,
    "corrected, `hysteresis=1`": lambda *a, **k: SMCP(*a, hysteresis=1.0, **k),
    "corrected, 0.5": lambda *a, **k: SMCP(*a, hysteresis=0.5, **k),
    "corrected, 0.25 (the default)": SMCP,
    "hard masks": HardSMCP,
    "dense": None,
}
Result = tuple[float, int]
"""Test accuracy in percent, and how many channels came back."""


class Net(pl.LightningModule):
    """ResNet-20 with SGD whose learning rate falls along a cosine."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.net, self.steps = resnet20(SHAPE, 10), steps
        self.example_input_array = torch.zeros(1, *SHAPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, self.steps)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


class Returned(pl.Callback):
    """Counts channels that are kept and were not kept a step before."""

    def __init__(self, method: SMCP) -> None:
        self.method, self.count = method, 0
        self.before: list[Tensor] = []

    def on_train_batch_end(self, *_: Any) -> None:
        now = [kept.clone() for kept in self.method.live]
        if self.before:
            self.count += sum(int((a & ~b).sum()) for a, b in zip(now, self.before, strict=True))
        self.before = now


def images(root: str, train: bool) -> tuple[Tensor, Tensor]:
    data = FashionMNIST(root, train=train)
    pooled = nn.functional.avg_pool2d(data.data[:, None].float() / 255, 2)
    return (pooled - 0.286) / 0.33, data.targets


def trained(build: Callable[..., SMCP] | None, seed: int, root: str, steps: int) -> Result:
    """One run."""
    torch.manual_seed(seed)
    x, y = images(root, train=True)
    net, source = Net(steps), torch.Generator().manual_seed(100 + seed)
    order = torch.cat([torch.randperm(len(x), generator=source) for _ in range(2)])[: steps * BATCH]
    callbacks: list[pl.Callback] = []
    returned: Returned | None = None
    if build is not None:
        method = build(BUDGET, cost="flops", round_to=4, every=max(1, 30 * steps // STEPS), print_plan=False)
        returned = Returned(method)
        callbacks = [method, returned]
    trainer = pl.Trainer(
        max_epochs=1, callbacks=callbacks, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(net, DataLoader(TensorDataset(x[order], y[order]), batch_size=BATCH))
    net.eval()
    tested, labels = images(root, train=False)
    with torch.inference_mode():
        right = sum(
            int((net(a).argmax(1) == b).sum()) for a, b in zip(tested.split(500), labels.split(500), strict=True)
        )
    return 100 * right / len(tested), returned.count if returned else 0


def text(found: dict[str, list[Result]], steps: int) -> str:
    """The whole file."""
    lines = ["| scores | test accuracy, mean | each seed | channels that came back |", "| --- | --- | --- | --- |"]
    for name, runs in found.items():
        each = ", ".join(f"{accuracy:.2f}" for accuracy, _ in runs)
        back = ", ".join(str(count) for _, count in runs) if ROWS[name] else ""
        lines.append(f"| {name} | {statistics.mean(a for a, _ in runs):.2f} % | {each} | {back} |")
    return f"""# Scores of SMCP behind norms

Written by `python benchmarks/smcp_scores.py --root FOLDER`. Python {platform.python_version()}, torch
{torch.__version__}, {platform.machine()}, one thread.

ResNet-20 on Fashion-MNIST pooled to 14 x 14, {steps} steps of batch {BATCH}, SGD with Nesterov momentum (0.1, cosine), {BUDGET:g} of
the FLOPs, `round_to=4`, seeds from 0; the masked network after the last step is tested. Channels that came back are counted over
all groups and solves.

{chr(10).join(lines)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of torchvision's files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[Result]] = {name: [] for name in ROWS}
    for seed in range(given.seeds):
        for name, build in ROWS.items():
            found[name].append(trained(build, seed, given.root, given.steps))
            print(f"{name}, seed {seed}: {found[name][-1]}", flush=True)
    given.out.write_text(text(found, given.steps))


if __name__ == "__main__":
    main()
