"""Transfer learning: the head of a ResNet-18 is trained first, then all of it, and it ends 90 % sparse everywhere.

    python examples/transfer_learning.py

Lightning's BackboneFinetuning freezes the backbone and thaws it after an epoch; from then on its layers are sparse too, with
the largest of the weights that they come with. Here these are random and the images small, so that it runs in half a minute;
give resnet18(weights="DEFAULT") and your own images.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import sparse_callbacks

CLASSES = 4


class Transfer(pl.LightningModule):
    """An ordinary module for transfer learning: the optimizer begins with the head alone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = resnet18(weights=None)
        self.head = nn.Linear(self.backbone.fc.in_features, CLASSES)
        self.backbone.fc = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def images(count: int, seed: int) -> TensorDataset:
    """Images [count, 3, 32, 32] of stripes in noise, and which of four ways the stripes run [count]."""
    source = torch.Generator().manual_seed(seed)
    label = torch.randint(0, CLASSES, (count,), generator=source)
    angle = label[:, None, None] * torch.pi / CLASSES
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    stripes = torch.sin((x * angle.cos() + y * angle.sin()) * 1.2 + 6 * torch.rand(count, 1, 1, generator=source))
    return TensorDataset(stripes[:, None] + 0.5 * torch.randn(count, 3, 32, 32, generator=source), label)


def main(epochs: int = 4, samples: int = 640) -> dict[str, float]:
    """Train, and give the sparsity of every layer."""
    pl.seed_everything(0, verbose=False)
    module, callback = Transfer(), sparse_callbacks.RigL(0.9, distribution="uniform", every=0.1, print_plan=False)
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda _: 1.5)
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[callback, thaw], accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(module, DataLoader(images(samples, seed=1), batch_size=32, shuffle=True))
    module.eval()
    x, label = images(256, seed=2).tensors
    with torch.no_grad():
        accuracy = float((module(x).argmax(1) == label).float().mean())
    layers = callback.measured_sparsity()
    total = layers.pop("sparsity/total"), layers.pop("sparsity/model")
    print(f"accuracy {accuracy:.1%} with {total[0]:.1%} of the weights of {len(layers)} layers at zero")
    return layers


if __name__ == "__main__":
    main()
