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
# # A first sparse network
#
# An ordinary `LightningModule`, ten kinds of handwritten digits, and one callback that trains it with nineteen weights in twenty at zero,
# from the first step to the last. At the end we look at what the callback did: the curves, and which pixels the first layer kept.
#
# Needs the extra `train` (scikit-learn brings the data, matplotlib the pictures). Runs in well under a minute.

# %%
import logging
import warnings

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import RigL, Static
from sparse_callbacks.reporting.style import colour

for name in ("pytorch_lightning", "lightning.pytorch"):
    logging.getLogger(name).setLevel(logging.ERROR)
# At 95 % an output of the first layer keeps 3 or 4 inputs, and in the last epochs gradients are mostly noise. Both are warned
# of; this network learns all the same, so the warnings are left out here.
warnings.filterwarnings("ignore", module="pytorch_lightning|torch|sparse_callbacks")

# %% [markdown]
# ## An ordinary module
#
# Nothing in it knows of sparsity.

# %%
images, labels = load_digits(return_X_y=True)
split = train_test_split(
    torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels), stratify=labels, random_state=0
)
train_x, test_x, train_y, test_y = split


class Digits(pl.LightningModule):
    def __init__(self, epochs: int = 40) -> None:
        super().__init__()
        self.epochs = epochs
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


class Recorder(pl.Callback):
    """Test accuracy after every epoch."""

    def __init__(self) -> None:
        self.accuracy = []

    def on_train_epoch_end(self, trainer, pl_module):
        with torch.no_grad():
            self.accuracy.append((pl_module.net(test_x).argmax(1) == test_y).float().mean().item())


def train(*callbacks: pl.Callback, epochs: int = 40) -> tuple[Digits, list[float]]:
    pl.seed_everything(0, verbose=False)
    module, recorder = Digits(epochs), Recorder()
    loader = DataLoader(TensorDataset(train_x, train_y), batch_size=64, shuffle=True)
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[*callbacks, recorder], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return module, recorder.accuracy


# %% [markdown]
# ## What a callback is going to do
#
# `plan` answers before anything is trained: every parameter, its target, and for each dense one why it stays dense.

# %%
print(RigL(sparsity=0.95, every=20).plan(Digits()))

# %% [markdown]
# ## Three runs
#
# Dense; a random mask that stays (`Static`); and RigL, which every 20 steps drops the smallest weights and grows as many where the
# gradient is largest. We keep RigL's masks of every epoch to look at them later.


# %%
class MaskRecorder(pl.Callback):
    """The first layer's mask at the start and after every epoch, and the sparsity of all layers."""

    def __init__(self, sparsity_callback) -> None:
        self.of = sparsity_callback
        self.masks, self.sparsity = [], []

    def on_train_start(self, trainer, pl_module):
        self.masks.append(self.of.masks["net.0.weight"])

    def on_train_epoch_end(self, trainer, pl_module):
        self.masks.append(self.of.masks["net.0.weight"])
        self.sparsity.append(self.of.measured_sparsity())


_, dense = train()
_, static = train(Static(sparsity=0.95, print_plan=False))
rigl_callback = RigL(sparsity=0.95, every=20, print_plan=False)
masks = MaskRecorder(rigl_callback)
network, rigl = train(rigl_callback, masks)

for name, accuracy in (("dense", dense), ("static 95 %", static), ("RigL 95 %", rigl)):
    print(f"{name:12} test accuracy {100 * accuracy[-1]:.1f} %")

# %% [markdown]
# ## The curves

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for name, accuracy, method in (
    ("dense", dense, "dense"),
    ("static 95 %", static, "Static"),
    ("RigL 95 %", rigl, "RigL"),
):
    left.plot(range(1, len(accuracy) + 1), [100 * a for a in accuracy], color=colour(method), label=name)
left.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(0, 100), title="Accuracy")
left.legend(loc="lower right")
explored, ever = [], torch.zeros_like(masks.masks[0])
for mask in masks.masks:
    ever = ever | mask
    explored.append(100 * ever.float().mean().item())
right.plot([100 - 100 * masks.sparsity[0]["sparsity/net.0.weight"]] * len(explored), "k--", label="active at any time")
right.plot(explored, color=colour("RigL"), label="ever active so far")
right.set(
    xlabel="epoch",
    ylabel="weights of the first layer (%)",
    ylim=(0, None),
    title="RigL explores, its count never changes",
)
right.legend(loc="center right")
plt.show()

# %% [markdown]
# ## The mask before and after
#
# How many units of the first layer look at each of the 8 x 8 pixels. At the start the mask is random; at the end RigL has moved the
# connections to where digits have ink, and thinned them out at the edges.

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
pictures = (
    ("connections at the start", masks.masks[0].sum(0).view(8, 8), "viridis"),
    ("connections at the end", masks.masks[-1].sum(0).view(8, 8), "viridis"),
    ("mean digit", train_x.mean(0).view(8, 8), "gray"),
)
top = int(max(p.max() for _, p, _ in pictures[:2]))
for axis, (title, picture, colours) in zip(axes, pictures, strict=True):
    image = axis.imshow(picture, cmap=colours, vmin=0, vmax=top if colours == "viridis" else None)
    axis.set(title=title, xticks=[], yticks=[])
    figure.colorbar(image, ax=axis, shrink=0.8)
plt.show()

# %% [markdown]
# ## The network is an ordinary one
#
# Its keys never changed, so a plain module loads its weights strictly, and pruned weights are exactly zero.

# %%
plain = Digits()
plain.load_state_dict(network.state_dict())
weights = [p for n, p in plain.named_parameters() if "weight" in n]
print(f"{sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights):.4f} of the weights are zero")
