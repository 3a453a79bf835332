"""One short fit of a model with a channel method, and what comes of its masks: slim, saved, loaded, exported."""

import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sparse_callbacks import SMCP, ChannelPruning, ConstrainedL0
from sparse_callbacks.channels.attention_exchange import put_slim_attention
from sparse_callbacks.channels.attention_heads import has_heads
from sparse_callbacks.channels.compact import load_compact, save_compact
from sparse_callbacks.channels.groups import Group, channel_groups
from sparse_callbacks.channels.module_sizes import is_conv1d
from sparse_callbacks.channels.onnx import export_onnx
from sparse_callbacks.channels.slim import slim
from zoo_parts.entries import Entry, call
from zoo_parts.outputs import FRESH, equality, gap, tensors_of

Row = dict[str, Any]
Make = Callable[[], Entry]
STEPS, BATCH = 20, 4
ONNX_TOLERANCE = 1e-4
"""Largest difference of the ONNX file's outputs that counts as equal, relative to the largest output of a tensor."""
KINDS = ("channels", "MLP units", "heads")
BUDGETED: Mapping[str, Any] = {"cost": "parameters", "start": 1, "stop": 16, "prune_stem": True, "print_plan": False}
SIDES: Mapping[str, Callable[[], Any]] = {
    "smcp": lambda: SMCP(0.6, every=2, **BUDGETED),
    "pruning": lambda: ChannelPruning(0.6, criterion="taylor_fo", every=2, **BUDGETED),
    # learning rates at which gates close within the few steps that there are
    "l0": lambda: ConstrainedL0(0.5, gate_lr=0.3, dual_lr=0.1, print_plan=False),
}
"""What makes each callback, by the name that its rows have it under."""


def fits(make: Make, sides: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """Each of ``sides`` with its row, which says under ``failed`` what was raised.

    Args:
        make: makes the model, with the same random weights at every call.
        sides: of :data:`SIDES`.
    """
    for side in sides:
        begun = time.perf_counter()
        try:
            row = fitted(make, side)
        except Exception as error:  # of a step that the model does not go through
            row = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        yield side, row | {"wall": time.perf_counter() - begun}


def fitted(make: Make, side: str) -> Row:
    """The row of one fit.

    Args:
        make: makes the model.
        side: of :data:`SIDES`.
    """
    entry, row = make(), Row()
    example = entry.inputs(torch.Generator().manual_seed(0), 1)
    with timed(row, "fit_seconds"):
        masks = trained_masks(entry, side)
    with timed(row, "slim_seconds"):
        small, proof = slim(entry.model, masks, example)
    row["units"] = units_by_kind(entry.model, example, {r.name: r.units for r in proof.rows})
    row["parameters"] = [proof.before.parameters, proof.after.parameters]
    row["foreign"] = proof.cut
    row |= equality(make().model, entry.model, small, entry)
    with tempfile.TemporaryDirectory() as folder:
        with timed(row, "files_seconds"):
            save_compact(small, Path(folder) / "slim.safetensors")
            loaded = load_compact(make().model, Path(folder) / "slim.safetensors").eval()
        row["loaded"] = apart(small, loaded, entry)
        with timed(row, "onnx_seconds"):
            row |= exported(loaded, entry, example, Path(folder) / "slim.onnx")
    right = row["equal"] and not row["foreign"] and row["loaded"] == 0 and row["onnx"] <= ONNX_TOLERANCE
    return row | {"right": right}


@contextmanager
def timed(row: Row, key: str) -> Iterator[None]:
    """Writes the seconds of what is done inside into ``row`` under ``key``."""
    begun = time.perf_counter()
    yield
    row[key] = time.perf_counter() - begun


# ---------------------------------------------------------------------- the fit


class Task(pl.LightningModule):
    """Learns to give ones for random inputs, with any network of the zoo."""

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        self.network = entry.model
        self.example_input_array = entry.inputs(torch.Generator().manual_seed(0), 1)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.network(*inputs, **named)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return (tensors_of(call(self, batch))[0] - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Batches(Dataset[Any]):
    """One batch of random inputs for each step."""

    def __init__(self, entry: Entry) -> None:
        self.inputs = entry.inputs

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> Any:
        return self.inputs(torch.Generator().manual_seed(index), BATCH)


def trained_masks(entry: Entry, side: str) -> dict[str, Tensor]:
    """Train the model of ``entry`` under a callback; it ends in eval mode.

    Returns:
        the callback's masks, by the names of the model's parameters.
    """
    pl.seed_everything(0, verbose=False)
    task, callback = Task(entry).train(), SIDES[side]()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet)
    trainer.fit(task, DataLoader(Batches(entry), batch_size=None))
    entry.model.eval()
    return {name.removeprefix("network."): mask for name, mask in callback.masks.items()}


# ---------------------------------------------------------------------- what it says


def units_by_kind(model: nn.Module, example: Any, removed: Mapping[str, int]) -> dict[str, list[int]]:
    """For each of :data:`KINDS` the units that were removed, and those that there were in groups that may lose some.

    Args:
        model: the model before it was slimmed.
        example: inputs of one sample.
        removed: the number of units that each of its groups lost, by name.
    """
    found = {kind: [0, 0] for kind in KINDS}
    model = copy.deepcopy(model)
    put_slim_attention(model)  # as slimming does
    for group in channel_groups(model, example):
        gone = removed.get(group.name, 0)
        if gone or not group.reason:
            kind = kind_of_units(model, group)
            found[kind] = [found[kind][0] + gone, found[kind][1] + group.size]
    return found


def kind_of_units(model: nn.Module, group: Group) -> str:
    """Which of :data:`KINDS` the units of ``group`` are."""
    makers = [p.module for p in group.producers]
    around = {name.rsplit(".", depth)[0] for name in makers for depth in range(name.count(".") + 1)}
    if any(has_heads(m) for m in map(model.get_submodule, around)):
        return "heads"
    layers = [model.get_submodule(name) for name in makers]
    return "MLP units" if all(isinstance(m, nn.Linear) or is_conv1d(m) for m in layers) else "channels"


@torch.no_grad()
def apart(one: nn.Module, other: nn.Module, entry: Entry) -> float:
    """How far the outputs of two models are apart on fresh inputs; see :func:`~zoo_parts.outputs.gap`."""
    inputs = entry.inputs(torch.Generator().manual_seed(FRESH), 3)
    return gap(tensors_of(call(one.eval(), inputs)), tensors_of(call(other.eval(), inputs)))


@torch.no_grad()
def exported(model: nn.Module, entry: Entry, example: Any, path: Path) -> Row:
    """Export ``model``, and run the file on fresh inputs: of another batch size, where it takes any.

    Returns:
        ``onnx``, the difference of the outputs; ``batch``, the batch that they were compared on; and ``fixed``, why the
        file takes no batch but that of the example.
    """
    import onnxruntime

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        export_onnx(model, path, example)
    fixed = next((str(w.message) for w in said if "takes batches of the size" in str(w.message)), "")
    batch = 1 if fixed else 3
    inputs = entry.inputs(torch.Generator().manual_seed(FRESH), batch)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    slots = [slot.name for slot in session.get_inputs()]
    fed = dict(zip(slots, (t.numpy() for t in tensors_of(inputs)), strict=True))
    found = [torch.from_numpy(array) for array in session.run(None, fed)]
    expected = tensors_of(call(model, inputs))
    return {"onnx": gap(expected, found), "batch": batch, "fixed": fixed.partition("another size: ")[2][:200]}
