# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A smaller network
#
# Zeros inside a matrix make a network neither smaller nor faster on most machines; channels that are gone do. Here `SMCP` trains a
# convolutional network under half of its FLOPs: a knapsack decides which channels may stay. `slim` then removes the others, proves that
# the outputs are the same, and the result is an ordinary module that goes into an ONNX file.
#
# Needs the extras `train`, `channels` and `onnx`. Runs in about a minute.

# %%
import logging
import warnings
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import matplotlib.pyplot as plt
import numpy as np
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import SMCP, channel_groups, export_onnx, load_compact, save_compact, slim
from sparse_callbacks.reporting.style import PALETTE, colour

for name in ("pytorch_lightning", "lightning.pytorch"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pytorch_lightning|torch|onnx")
torch.set_num_threads(1)
folder = Path(mkdtemp())

# %% [markdown]
# ## A network with a residual sum
#
# Channels that are added to each other can only go together. Which ones these are is read off one forward pass.

# %%
images, labels = load_digits(return_X_y=True)
split = train_test_split(
    torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8),
    torch.tensor(labels),
    stratify=labels,
    random_state=0,
)
train_x, test_x, train_y, test_y = split


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))


class Digits(pl.LightningModule):
    def __init__(self, epochs: int = 16) -> None:
        super().__init__()
        self.epochs = epochs
        self.stem = convolution(1, 16)
        self.first, self.second = convolution(16, 32), convolution(32, 16)
        self.down, self.last = convolution(16, 32, stride=2), convolution(32, 64)
        self.head = nn.Linear(64, 10)
        self.example_input_array = torch.zeros(1, 1, 8, 8)  # costs are counted for an input of this size

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.second(self.first(x).relu())).relu()
        x = self.last(self.down(x).relu()).relu()
        return self.head(x.mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


for group in channel_groups(Digits(), torch.zeros(1, 1, 8, 8)):
    print(f"{group.name:14} {group.size:3} channels  {group.reason or 'may go'}")

# %% [markdown]
# ## Two runs: dense, and under half of the FLOPs
#
# The budget falls from all to a half between the second and the twelfth of 16 epochs. Pruned channels learn on in a dense copy, and
# may come back at the next solve.


# %%
# masks lie on the weights that read a channel: by layer, the weight that reads its channels
READERS = {"stem": "first.0.weight", "first": "second.0.weight", "down": "last.0.weight", "last": "head.weight"}


class Recorder(pl.Callback):
    """After every epoch: test accuracy, and which channels of each layer are read."""

    def __init__(self, method=None) -> None:
        self.method, self.accuracy, self.active = method, [], []

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.eval()
        with torch.no_grad():
            self.accuracy.append(100 * (pl_module(test_x).argmax(1) == test_y).float().mean().item())
        pl_module.train()
        if self.method is not None:
            masks = {layer: self.method.masks[reader] for layer, reader in READERS.items()}
            self.active.append({layer: mask.transpose(0, 1).flatten(1).any(1) for layer, mask in masks.items()})


def train(*methods) -> tuple[Digits, Recorder]:
    pl.seed_everything(0, verbose=False)
    module, recorder = Digits(), Recorder(*methods)
    trainer = pl.Trainer(
        max_epochs=module.epochs, callbacks=[*methods, recorder], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(train_x, train_y), batch_size=64, shuffle=True))
    return module.eval(), recorder


smcp = SMCP(budget=0.5, cost="flops", every=11, round_to=1, print_plan=False)
dense, dense_run = train()
network, run = train(smcp)
print(
    f"dense: {dense_run.accuracy[-1]:.1f} % of the test images are right, under half of the FLOPs: {run.accuracy[-1]:.1f} %"
)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", width_ratios=(1, 1.5))
epochs = range(1, dense.epochs + 1)
left.plot(epochs, dense_run.accuracy, color=colour("dense"), label="dense")
left.plot(epochs, run.accuracy, color=colour("SMCP"), label="SMCP, half of the FLOPs")
left.set(title="Test accuracy (%)", xlabel="epoch", ylim=(50, 101))
left.legend(loc="lower right")
over_time = {layer: torch.stack([each[layer] for each in run.active], 1) for layer in READERS}
rows = torch.cat([alive[alive.sum(1).argsort(descending=True)] for alive in over_time.values()])
right.imshow(
    np.where(rows, 1.0, 0.0),
    aspect="auto",
    cmap="Blues",
    vmin=0,
    vmax=1.4,
    extent=(0.5, dense.epochs + 0.5, len(rows), 0),
)
ends = np.cumsum([len(alive) for alive in over_time.values()])
for end in ends[:-1]:
    right.axhline(end, color=PALETTE[1], linewidth=1.2)
right.set_yticks([end - len(a) / 2 for end, a in zip(ends, over_time.values(), strict=True)], list(READERS))
right.set(title="Channels of each layer: dark while they are active", xlabel="epoch")
plt.show()

# %% [markdown]
# ## Remove them
#
# `slim` returns a new module and the proof: outputs compared in float64 on given and on random inputs, and what the network costs now.

# %%
small, proof = slim(network, smcp.masks, test_x[:64])
proof = replace(proof, samples=64)  # FLOPs for one image
# the measured latency is left out: it depends on what else the machine does
print("\n".join(line for line in str(proof).splitlines() if not line.startswith("latency")))

# %%
print(small.first, small.second, small.last, sep="\n")
with torch.no_grad():
    difference = (small(test_x) - network(test_x)).abs().max().item()
    same = torch.equal(small(test_x).argmax(1), network(test_x).argmax(1))
print(f"largest difference of an output on {len(test_x)} test images: {difference:.1e}; the same classes: {same}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
before, after = proof.before, proof.after
bars = (("Parameters", before.parameters, after.parameters), ("FLOPs of an image", before.flops / 64, after.flops / 64))
for axis, (title, dense_value, small_value) in zip(axes, bars, strict=True):
    drawn = axis.barh(["slim", "dense"], [small_value, dense_value], color=[colour("SMCP"), "#999999"])
    axis.bar_label(
        drawn, [f"{small_value:,.0f} ({100 * small_value / dense_value:.0f} %)", f"{dense_value:,.0f}"], padding=4
    )
    axis.set(title=title, xlim=(0, 1.35 * dense_value), xticks=[])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Take it away
#
# As a file without pickle, which loads into an instance of the original class, and as ONNX, run in onnxruntime and compared.

# %%
save_compact(small, folder / "small.safetensors")
again = load_compact(Digits(), folder / "small.safetensors").eval()
with torch.no_grad():
    print("loaded again, the same outputs:", torch.equal(again(test_x), small(test_x)))
found = export_onnx(small, folder / "small.onnx", test_x[:8])
print(f"largest relative difference of onnxruntime's outputs: {found.relative:.0e}")
for file in ("small.safetensors", "small.onnx"):
    print(f"{file:18} {(folder / file).stat().st_size / 1000:.0f} kB")
