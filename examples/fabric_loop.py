"""Fabric: DPF trains a classifier of handwritten digits 95 % sparse, on one process or several.

    python examples/fabric_loop.py
    fabric run --devices 2 examples/fabric_loop.py

`sparsify` takes what `fabric.setup` returns (or what it is given), and clips inside the step, in every precision.
"""

from lightning_fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn, optim, tensor
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import sparsify
from sparse_callbacks.methods import DPF


def clip(parameters: list[nn.Parameter]) -> None:
    """Called inside the step, when gradients are unscaled and masked."""
    nn.utils.clip_grad_norm_(parameters, 1.0)


def main(epochs: int = 20, fabric: Fabric | None = None) -> float:
    """Train, and give the accuracy on images that were not seen in training."""
    fabric = fabric or Fabric()
    fabric.seed_everything(0)
    digits = load_digits()
    images, labels = tensor(digits.data / 16).float(), tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    model, optimizer = fabric.setup(model, optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    train = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=32, shuffle=True)
    train = fabric.setup_dataloaders(train)
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(train))

    run = sparsify(DPF(0.95, print_plan=False), model, optimizer, steps=epochs * len(train), clip=clip)

    for _ in range(epochs):
        for batch, target in train:
            fabric.backward(nn.functional.cross_entropy(model(batch), target))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        run.epoch_end()
    run.close()

    guess = model(images[1400:].to(fabric.device)).argmax(1).cpu()
    accuracy = float((guess == labels[1400:]).float().mean())
    fabric.print(f"accuracy {accuracy:.1%}, sparsity {run.measured_sparsity()['sparsity/total']:.4f}")
    return accuracy


if __name__ == "__main__":
    main()
