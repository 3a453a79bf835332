"""A hundred million neurons on one machine: truly sparse layers of a million neurons, each reading five.

    python examples/hundred_million_neurons.py --neurons 100000000     # 500 million weights, within 20 GiB
    python examples/hundred_million_neurons.py --neurons 1000000 --width 20000

No dense matrix is ever made: a hidden layer of a million neurons would have 10^12 entries. One step of SGD with momentum and
one update of SET are taken under a Trainer, and the peak of the process's memory is printed (Linux).

Steps and updates take one layer after the other, and what they need in passing is about as much as all that a layer holds. So few
layers are the worst case: with a million neurons a layer, 64 bytes a live weight in a network of one hidden layer, 40 in one of
four, 29 in one of a hundred.
"""

# ruff: noqa: E402
import os
import sys

# glibc reads it when a process starts: buffers of 200 kB and more go back to the system when they are freed, and the
# peak is a fifth lower. So the script starts itself once more, before torch is imported
THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
if __name__ == "__main__" and THRESHOLD not in os.environ:
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {THRESHOLD: "200000"})

import argparse
import time

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import SET, SparseLinear

FEATURES, FAN_IN, CLASSES, BATCH = 64, 5, 10, 4


def peak() -> int:
    """The largest memory that the process has held so far, in bytes."""
    with open("/proc/self/status") as lines:
        (kilobytes,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return 1024 * kilobytes


class Wide(pl.LightningModule):
    """Hidden layers in which each neuron reads five of the layer before, and a sparse head.

    Args:
        neurons: the number of hidden neurons.
        width: the number of neurons of a hidden layer.
    """

    def __init__(self, neurons: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = FEATURES
        for _ in range(neurons // width):
            layers += [SparseLinear.random(inputs, width, FAN_IN), nn.ReLU(inplace=True)]
            inputs = width
        self.net = nn.Sequential(*layers, SparseLinear.random(width, CLASSES, width // 100))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def main(neurons: int, width: int) -> float:
    """Build, take one step and one update, and give the bytes a live weight above the process's start."""
    topology = SET(storage="sparse", drop_fraction="constant(0.3)", every=1, stop=1, print_plan=False)
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[topology], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(BATCH, FEATURES), torch.randint(0, CLASSES, (BATCH,)))  # one step an epoch
    began, start = time.perf_counter(), peak()
    module = Wide(neurons, width)
    live = sum(layer.live for layer in module.net if isinstance(layer, SparseLinear))
    built = time.perf_counter() - began
    print(f"{neurons:,} neurons, {live:,} live weights, built in {built:.0f} s: {(peak() - start) / 2**30:.2f} GiB")
    began = time.perf_counter()
    trainer.fit(module, DataLoader(data, batch_size=BATCH))
    bytes_a_weight = (peak() - start) / live
    print(
        f"one step and {topology.updates} update of SET in {time.perf_counter() - began:.0f} s: peak "
        f"{(peak() - start) / 2**30:.2f} GiB above the start, {bytes_a_weight:.1f} bytes a live weight"
    )
    return bytes_a_weight


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=10_000_000)
    parser.add_argument("--width", type=int, default=1_000_000, help="neurons of a hidden layer")
    torch.set_num_threads(1)
    main(**vars(parser.parse_args()))
