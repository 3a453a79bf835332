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
# # When sparse is faster
#
# A mask simulates sparsity: the layer costs what a dense one costs. With `storage=` a linear layer has its live weights alone. We
# train the same network dense, masked and in two sparse storages, and look at time, memory and accuracy.
#
# Needs the extra `train` (scikit-learn brings the data, matplotlib the pictures). Runs in about a minute.

# %%
import logging
import time
import warnings

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import RigL, SparseLinear, to_dense

for name in ("pytorch_lightning", "lightning.pytorch"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pytorch_lightning|torch")
torch.set_num_threads(1)

# %% [markdown]
# ## A wide network
#
# Truly sparse layers pay where layers are wide: three hidden layers of 1024.

# %%
images, labels = load_digits(return_X_y=True)
split = train_test_split(
    torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels), stratify=labels, random_state=0
)
train_x, test_x, train_y, test_y = split


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
            nn.Linear(1024, 10),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, fused=True)


# %% [markdown]
# ## Four runs
#
# One argument decides. RigL trains with nineteen weights in twenty at zero; the first and the last layer are small and stay dense.


# %%
def train(storage: str | None) -> tuple[Digits, float]:
    """The trained module, and the CPU seconds of its fit."""
    pl.seed_everything(0, verbose=False)
    module = Digits()
    options = {"rescale": "layer", "every": 20, "keep_dense": "both", "print_plan": False}
    callbacks = [] if storage is None else [RigL(0.95, distribution="uniform", storage=storage, **options)]
    trainer = pl.Trainer(
        max_epochs=12, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(train_x, train_y), batch_size=64, shuffle=True)
    began = time.process_time()
    trainer.fit(module, loader)
    return module, time.process_time() - began


def accuracy(module: Digits) -> float:
    with torch.no_grad():
        return (module.net(test_x).argmax(1) == test_y).float().mean().item()


names = {"dense": None, "masked": "masked", "sparse": "sparse", "grouped": "grouped"}
found = {name: train(storage) for name, storage in names.items()}
for name, (module, seconds) in found.items():
    weights = sum(p.numel() for p in module.parameters())
    print(f"{name:8} {seconds:5.1f} s, {weights:9,} weights held, test accuracy {100 * accuracy(module):.1f} %")

# %% [markdown]
# Masked and sparse storage draw the same masks and train alike; their sums are taken in another order, which shows in single images. Groups
# of 64 rows that read the same inputs are another pattern, faster and here less accurate. What stands in the network now:

# %%
print(found["sparse"][0].net)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
left.bar(list(found), [seconds for _, seconds in found.values()], color=["#999999", "#555555", "#0072B2", "#D55E00"])
left.set(ylabel="CPU seconds of the fit", title="Time")
held = [sum(p.numel() for p in module.parameters()) / 1e6 for module, _ in found.values()]
right.bar(list(found), held, color=["#999999", "#555555", "#0072B2", "#D55E00"])
right.set(ylabel="weights held (millions)", title="Weights that exist")
plt.show()

# %% [markdown]
# ## Over density
#
# A layer alone, without any callback: `SparseLinear.random` never makes the dense matrix. Where a line crosses 1 it begins to gain.


# %%
def milliseconds(layer: nn.Module, steps: int = 8) -> float:
    """A forward and a backward pass with 128 rows: the fastest of some."""
    x, times = torch.randn(128, 1024, requires_grad=True), []
    for _ in range(steps):
        began = time.process_time()
        layer(x).sum().backward()
        times.append(1e3 * (time.process_time() - began))
    return min(times)


densities = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
base = milliseconds(nn.Linear(1024, 1024))
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for storage, colour in (("sparse", "#0072B2"), ("grouped", "#D55E00")):
    layers = [SparseLinear.random(1024, 1024, round(1024 * d), storage=storage) for d in densities]
    axes.plot(densities, [milliseconds(layer) / base for layer in layers], "o-", color=colour, label=storage)
axes.axhline(1, color="#999999", linestyle="--")
axes.set(xscale="log", xlabel="density", ylabel="time over nn.Linear", ylim=(0, None))
axes.set_xticks(densities, [f"{100 * d:g} %" for d in densities])
axes.minorticks_off()
axes.legend()
plt.show()

# %% [markdown]
# ## An ordinary network again
#
# The `state_dict` was an ordinary one all the time; `to_dense` puts `nn.Linear` back.

# %%
plain = Digits()
plain.load_state_dict(found["sparse"][0].state_dict())
network = to_dense(found["sparse"][0])
print(type(network.net[2]).__name__, "with", f"{(network.net[2].weight == 0).float().mean():.4f}", "zeros")
assert torch.equal(network.net[2].weight, plain.net[2].weight)
