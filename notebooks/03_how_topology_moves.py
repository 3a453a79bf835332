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
# # How the topology moves
#
# Three methods train the same network at the same sparsity, and differ in what grows in the place of the smallest weights: `RigL` takes
# the connections with the largest gradient, `SET` takes them at random, and `CTRE` connects neurons that fire alike. We watch which
# pixels the first layer reads, how much moves at a time, and what remains of the first mask.
#
# Needs the extra `train` (scikit-learn brings the data, matplotlib the pictures). Runs in well under a minute.
#
# The first cell has the network, a training that keeps the masks of every epoch, and the drawing of the animation. Programs that can fold
# code show it folded: nothing in it is about the methods.

# %% jupyter={"source_hidden": true}
import base64
import logging
import warnings
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
from IPython.display import HTML
from matplotlib.animation import FuncAnimation, PillowWriter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import CTRE, SET, RigL
from sparse_callbacks.reporting.style import colour

for name in ("pytorch_lightning", "lightning.pytorch"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pytorch_lightning|torch")

EPOCHS, SPARSITY = 30, 0.95
images, labels = load_digits(return_X_y=True)
split = train_test_split(
    torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels), stratify=labels, random_state=0
)
train_x, test_x, train_y, test_y = split


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


class Recorder(pl.Callback):
    """All masks at the start and after every epoch, and the test accuracy."""

    def __init__(self, method) -> None:
        self.method, self.masks, self.accuracy = method, [], []

    def keep(self) -> None:
        self.masks.append({name: mask.clone() for name, mask in self.method.masks.items()})

    def on_train_start(self, trainer, pl_module):
        self.keep()

    def on_train_epoch_end(self, trainer, pl_module):
        self.keep()
        with torch.no_grad():
            self.accuracy.append((pl_module(test_x).argmax(1) == test_y).float().mean().item())


def train(method) -> Recorder:
    pl.seed_everything(0, verbose=False)
    recorder = Recorder(method)
    trainer = pl.Trainer(
        max_epochs=EPOCHS, callbacks=[method, recorder], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Digits(), DataLoader(TensorDataset(train_x, train_y), batch_size=64, shuffle=True))
    return recorder


def connections(run: Recorder, epoch: int) -> torch.Tensor:
    """How many units of the first layer read each pixel: [8, 8]."""
    return run.masks[epoch]["net.0.weight"].sum(0).view(8, 8)


def animated(runs: dict[str, Recorder]) -> HTML:
    """The connections of each pixel over the epochs, beside the mean digit."""
    figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.9), layout="constrained", width_ratios=(1, 1, 1, 1))
    top = max(int(connections(run, EPOCHS).max()) for run in runs.values())
    shown = {}
    for axis, (name, run) in zip(axes, runs.items(), strict=False):
        shown[name] = axis.imshow(connections(run, 0), cmap="viridis", vmin=0, vmax=top)
        axis.set(title=name, xticks=[], yticks=[])
    figure.colorbar(shown["CTRE"], ax=axes[:3], shrink=0.8, pad=0.01, label="connections")
    axes[3].imshow(train_x.mean(0).view(8, 8), cmap="gray_r")
    axes[3].set(title="mean digit", xticks=[], yticks=[])
    time = figure.suptitle("epoch 0")

    def draw(epoch: int) -> list:
        epoch = min(epoch, EPOCHS)  # the last picture stays for a while
        for name, run in runs.items():
            shown[name].set_data(connections(run, epoch))
        time.set_text(f"epoch {epoch}")
        return [*shown.values(), time]

    file = Path(mkdtemp()) / "topology.gif"
    FuncAnimation(figure, draw, frames=EPOCHS + 12).save(file, writer=PillowWriter(fps=6), dpi=75)
    plt.close(figure)
    alt = "Heat maps of 8 x 8 pixels over 30 epochs: connections of each pixel under RigL, SET and CTRE, and the mean digit"
    return HTML(f'<img alt="{alt}" src="data:image/gif;base64,{base64.b64encode(file.read_bytes()).decode()}">')


# %% [markdown]
# ## Connections of each input pixel, epoch by epoch
#
# All three begin with the same random mask. One update falls in each epoch of 22 steps, until three quarters of the run are over; it
# replaces a fraction of the active weights that falls from 0.3 to 0 along a cosine. `rescale` makes the first weights larger, as each unit
# has few of them. Digits have no ink in the first and the last column, and hardly any in the corners.

# %%
options = {
    "sparsity": SPARSITY, "distribution": "erdos_renyi", "drop_fraction": "cosine(0.3)",
    "stop": 0.75, "rescale": "fan_in", "print_plan": False,
}  # fmt: skip
methods = {
    "RigL": RigL(every=21, **options),  # an update of RigL takes the place of a step
    "SET": SET(every=22, **options),
    "CTRE": CTRE(every=22, **options),
}
runs = {name: train(method) for name, method in methods.items()}
animated(runs)

# %%
for name, run in runs.items():
    print(f"{name:5} {methods[name].updates} updates, test accuracy {100 * run.accuracy[-1]:.1f} %")

# %% [markdown]
# The picture at the end, beside the start, for those who read this on paper:

# %%
figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.7), layout="constrained")
top = max(int(connections(run, EPOCHS).max()) for run in runs.values())
pictures = {"start, all three": connections(runs["RigL"], 0)} | {
    f"{n}, end": connections(r, EPOCHS) for n, r in runs.items()
}
for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
    image = axis.imshow(picture, cmap="viridis", vmin=0, vmax=top)
    axis.set(title=title, xticks=[], yticks=[])
figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01, label="connections")
plt.show()

# %% [markdown]
# ## How much moves, and what remains
#
# Left: the share of the active weights that an epoch has replaced. Middle: the share of the first mask that is still active; a network
# whose masks are drawn anew would have 5 % left. Right: the share of all weights that were active at any time, which is how much of the
# dense network a sparse run has tried.


# %%
def flat(masks: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([mask.flatten() for mask in masks.values()])


figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
for name, run in runs.items():
    masks = [flat(each) for each in run.masks]
    active = int(masks[0].sum())
    replaced = [100 * int((after & ~before).sum()) / active for before, after in pairwise(masks)]
    remains = [100 * int((mask & masks[0]).sum()) / active for mask in masks]
    ever, tried = masks[0], []
    for mask in masks:
        ever = ever | mask
        tried.append(100 * ever.float().mean().item())
    left.plot(range(1, EPOCHS + 1), replaced, color=colour(name), label=name)
    middle.plot(remains, color=colour(name), label=name)
    right.plot(tried, color=colour(name), label=name)
left.set(title="replaced in an epoch", ylabel="active weights (%)", ylim=(0, None), xlabel="epoch")
middle.set(title="left of the first mask", ylabel="weights of the first mask (%)", ylim=(0, 100), xlabel="epoch")
middle.axhline(100 * (1 - SPARSITY), color="#999999", linestyle="--")
middle.text(EPOCHS, 100 * (1 - SPARSITY) + 1, "by chance", ha="right", va="bottom", color="#666666")
right.set(title="active at any time so far", ylabel="all weights (%)", ylim=(0, 100), xlabel="epoch")
right.legend(loc="upper left")
plt.show()

# %% [markdown]
# ## Where the connections went
#
# The sum of all connections is the same at every time; what changes is their place. The share that reads the two outer columns of the
# image, which are almost empty:

# %%
for name, run in runs.items():
    first, last = ((c := connections(run, epoch).float())[:, [0, 7]].sum() / c.sum() for epoch in (0, EPOCHS))
    print(f"{name:5} {100 * first:.0f} % of the connections at the start, {100 * last:.0f} % at the end")
