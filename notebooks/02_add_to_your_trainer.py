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
# # Add it to your own Trainer
#
# You have a `LightningModule`, a `Trainer` and data. One callback more makes the network train sparse; the module stays as it is. This
# notebook reads the plan before training, draws the curves of the run, resumes it from a checkpoint, and reads the masks afterwards.
#
# Needs the extra `train` (scikit-learn brings the data, matplotlib the pictures). Runs in well under a minute.

# %%
# %matplotlib inline
import logging
import warnings
from pathlib import Path
from tempfile import mkdtemp

import pytorch_lightning as pl
import torch
from IPython.display import display
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sparse_callbacks import RigL, SparsityReport, saved_masks
from sparse_callbacks.core.record.record_file import read_record
from sparse_callbacks.reporting.page import figures

for name in ("pytorch_lightning", "lightning.pytorch"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pytorch_lightning|torch")
folder = Path(mkdtemp())

# %% [markdown]
# ## What you have already
#
# A small convolutional network for 8 x 8 digits, as anyone might write it. Nothing in it knows of sparsity.

# %%
images, labels = load_digits(return_X_y=True)
split = train_test_split(
    torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8),
    torch.tensor(labels),
    stratify=labels,
    random_state=0,
)
train_x, test_x, train_y, test_y = split


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=1e-2)


def train_loader() -> DataLoader:
    """Batches in an order that follows from the epoch, so that a resumed run sees those of one that was never stopped."""
    data = TensorDataset(train_x, train_y)
    return DataLoader(data, batch_size=64, sampler=DistributedSampler(data, num_replicas=1, rank=0))


test_loader = DataLoader(TensorDataset(test_x, test_y), batch_size=450)

# %% [markdown]
# ## What the callback will do to it
#
# `plan` answers before training: every parameter with its target, and for those that stay dense the reason. Here we leave the first and
# the last layer dense, as they are small and see the image and the classes.


# %%
def method() -> RigL:
    return RigL(sparsity=0.9, every=20, keep_dense="both", print_plan=False)


print(method().plan(Digits()))

# %% [markdown]
# ## One callback more
#
# `RigL(...)` in the list of callbacks is the whole change. `SparsityReport` beside it is optional: it keeps a record of the run, which
# the curves below are drawn from. `ModelCheckpoint` is Lightning's own, and keeps the end of the tenth epoch.


# %%
def trainer_with(*callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=20, callbacks=list(callbacks), accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=20,
    )  # fmt: skip


pl.seed_everything(0, verbose=False)
network, rigl = Digits(), method()
keep = ModelCheckpoint(folder, "{epoch}", auto_insert_metric_name=True, every_n_epochs=10, save_top_k=-1)
trainer = trainer_with(rigl, keep, SparsityReport(folder / "run", page=False))
trainer.fit(network, train_loader(), test_loader)
print(f"test accuracy {100 * trainer.callback_metrics['val/acc']:.1f} %, ", end="")
print(f"sparsity {rigl.measured_sparsity()['sparsity/total']:.4f}, {rigl.updates} updates of the topology")

# %% [markdown]
# ## The curves
#
# The same pictures stand in the page that `SparsityReport("folder")` writes, `report.html`. With a logger in your Trainer, such as W&B or
# TensorBoard, they are there too.

# %%
drawn = figures(read_record(folder / "run"))
for name in ("sparsity", "accuracy", "layers_churn"):
    display(drawn[name])

# %% [markdown]
# ## Resume from a checkpoint
#
# A new module, a new callback, a new Trainer, and the file of the tenth epoch. Masks are in the checkpoint, under the callback's key.
# `Watch` keeps the masks with which the resumed run begins.


# %%
class Watch(pl.Callback):
    """The masks when training begins."""

    def on_train_start(self, trainer, pl_module):
        self.masks = {name: mask.clone() for name, mask in resumed.masks.items()}


checkpoint = folder / "epoch=9.ckpt"
in_file = saved_masks(checkpoint)  # reads no module and no callback
pl.seed_everything(1, verbose=False)
network_again, resumed, watch = Digits(), method(), Watch()
trainer_with(resumed, watch).fit(network_again, train_loader(), test_loader, ckpt_path=checkpoint)

same = {name: torch.equal(in_file[name], watch.masks[name]) for name in in_file}
print("masks of the file and of the resumed run at its start are equal:", same)
print("masks at the end are those of the run that was never stopped:", all(
    torch.equal(mask, resumed.masks[name]) for name, mask in rigl.masks.items()
))  # fmt: skip
print("and so are all weights:", all(
    torch.equal(a, b) for a, b in zip(network.state_dict().values(), network_again.state_dict().values(), strict=True)
))  # fmt: skip

# %% [markdown]
# The resumed run had another seed, and still ends with the same masks and the same weights, bit by bit: random numbers of a method follow
# from its own `seed` and the step, and the state of the optimizer is in the file.
#
# ## Read the masks afterwards
#
# `callback.masks` has a bool tensor for each sparse weight; where it is False the weight is zero. Nothing was added to the module, so
# that its `state_dict` has the keys that it always had.

# %%
for name, mask in rigl.masks.items():
    weight = network.get_parameter(name)
    assert bool((weight[~mask] == 0).all())
    print(f"{name:14} {tuple(mask.shape)!s:16} {int(mask.sum()):6,} of {mask.numel():6,} active")
plain = Digits()
plain.load_state_dict(network.state_dict())
print("keys of the state_dict are those of a dense module:", list(network.state_dict()) == list(Digits().state_dict()))
