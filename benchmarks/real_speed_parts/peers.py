"""Other packages that train truly sparse networks: SparseLab as layers, and the public SET-MLP code as it is."""

import contextlib
import hashlib
import importlib
import importlib.util
import io
import itertools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from interleaved_runs import Net, Run, Workload, clock, lightning_run
from torch import Tensor, nn

from real_speed_parts.networks import CLASSES, TrainedNet, mlp, quartiles, rounds_of, sparse_layers
from sparse_callbacks import Static

PEER = "SparseLab 0.2.2"
FILE = "set_mlp_sequential.py"


def peer_net(module: Net, sparsity: float) -> Net | None:
    """The module with SparseLab's layers at the same sparsity; None where SparseLab is not installed."""
    if importlib.util.find_spec("sparselab") is None:
        return None
    import sparselab

    if f"SparseLab {sparselab.__version__}" != PEER:
        raise ValueError(f"the table compares with {PEER}, and {sparselab.__version__} is installed")
    for name, layer in list(sparse_layers(module.net)):
        parent, _, last = name.rpartition(".")
        peer = sparselab.SparseLinear(layer.in_features, layer.out_features, sparsity=sparsity)
        setattr(module.net.get_submodule(parent), last, peer)
    return module


# ---------------------------------------------------------------------- SET-MLP

WARM_UP = 2
DECAY, MOMENTUM, RATE = 0.0002, 0.9, 0.01  # the settings of its own script
ABOUT = (
    'The public code of "Truly Sparse Neural Networks at Scale" (github.com/SelimaC/large-scale-sparse-neural-networks: scipy, numba, '
    "float64, batch 128), from a checkout that `--set-mlp FOLDER` names, with its script's settings and a dropout of 0, for which "
    "its `fit` draws numbers all the same. Ours train on its random pattern, under a Trainer; the head is dense."
)
SET_MLP_NETWORKS = {
    "784-1000x3-10": (784, 1000, 1000, 1000, CLASSES),
    "784-4000x3-10": (784, 4000, 4000, 4000, CLASSES),
}
BATCH, EPSILON = 128, 20  # the density of its Erdos-Renyi pattern is that of its script, too


def version_of(folder: Path) -> str:
    """The version of a checkout: its commit, or a checksum of the file where it is not a git checkout."""
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return f"commit {done.stdout.strip()[:12]}"
    return f"sha256 {hashlib.sha256((folder / FILE).read_bytes()).hexdigest()[:12]} of {FILE}"


def set_mlp_modules(folder: Path) -> tuple[ModuleType, ModuleType]:
    """The network and its functions, imported from the user's checkout.

    Args:
        folder: a checkout of github.com/SelimaC/large-scale-sparse-neural-networks.

    Raises:
        FileNotFoundError: the folder is another one.
    """
    if not (folder / FILE).is_file():
        raise FileNotFoundError(
            f"--set-mlp {folder}: it has no {FILE}. Give a checkout of github.com/SelimaC/large-scale-sparse-neural-networks."
        )
    # its loaders of data and its monitor ask for keras and psutil, and no step needs them
    unneeded = {"utils.load_data": "load_fashion_mnist_data", "wasap_sgd.train.monitor": "Monitor"}
    for name, what in unneeded.items():
        sys.modules[name] = ModuleType(name)
        setattr(sys.modules[name], what, None)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(FILE.removesuffix(".py")), importlib.import_module("utils.nn_functions")
    finally:
        sys.path.remove(str(folder))
        for name in unneeded:
            del sys.modules[name]


class SetMlp:
    """A network of the public SET-MLP code, which is trained step by step.

    Args:
        folder: the user's checkout.
        widths: the widths of all layers.
    """

    def __init__(self, folder: Path, widths: Sequence[int]) -> None:
        code, functions = set_mlp_modules(folder)
        np.random.seed(0)
        activations = [functions.Relu] * (len(widths) - 2) + [functions.Softmax]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the density of each layer
            self.net = code.SET_MLP(tuple(widths), activations, epsilon=EPSILON)
        # what its `fit` sets before the first step
        self.net.loss = functions.CrossEntropy()
        self.net.learning_rate, self.net.momentum, self.net.weight_decay = RATE, MOMENTUM, DECAY

    def masks(self) -> list[Tensor]:
        """Where weights live in each layer, ``[outputs, inputs]``."""
        return [torch.tensor((self.net.w[i + 1] != 0).toarray().T) for i in range(len(self.net.w))]

    def run(self, workload: Workload, rounds: Sequence[int]) -> Run:
        """Steps on the workload's batches as its `fit` takes them, round by round."""
        batches = [(x.numpy(), np.eye(CLASSES, dtype=np.float32)[y.numpy()]) for x, y in workload.data()]
        turn = itertools.cycle(batches)
        for length in rounds:
            steps = []
            for _ in range(length):
                began = clock()
                x, y = next(turn)
                z, a, keep = self.net._feed_forward(x, True)
                self.net._back_prop(z, a, keep, y)
                steps.append((clock() - began, False))
            yield steps


def measure_set_mlp(folder: Path, rounds: int, steps: int = 5) -> Iterator[dict[str, Any]]:
    """One row for each network and run: dense, masked, sparse, and SET-MLP; ours have SET-MLP's pattern."""
    if "numba" in sys.modules or importlib.util.find_spec("numba") is not None:
        import numba

        numba.set_num_threads(1)
    lengths = [WARM_UP, *[steps] * rounds]
    for name, widths in SET_MLP_NETWORKS.items():
        peer = SetMlp(folder, widths)
        masks = peer.masks()
        workload = Workload(name, lambda widths=widths: mlp(*widths[:-1]), (BATCH, widths[0]), decayed_sgd)
        runs = {"dense": lightning_run(workload, lengths, TrainedNet(workload))}
        for storage in ("masked", "sparse"):
            module = with_zeros(TrainedNet(workload), masks)
            callback = Static(initial_mask="nonzero", keep_dense="last", print_plan=False, storage=storage, rows=BATCH)
            runs[storage] = lightning_run(workload, lengths, module, callback)
        runs["SET-MLP"] = peer.run(workload, lengths)
        times = rounds_of(runs, rounds)
        density = sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
        for label, each in times.items():
            ratios = [a / b for a, b in zip(each, times["SET-MLP"], strict=True)]
            yield {
                "network": name, "run": label, "sparsity": round(1 - density, 4), "ms": quartiles(each),
                "ratio": quartiles(ratios), "version": version_of(folder),
            }  # fmt: skip


def decayed_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)


def with_zeros(module: Net, masks: Sequence[Tensor]) -> Net:
    """The module with zeros where the masks have none of its weights."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer, mask in zip(layers, masks, strict=True):
            layer.weight.mul_(mask)
    return module


def set_mlp_table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of each run, and its time over SET-MLP's."""
    lines = ["| network, sparsity | run | ms a step | over SET-MLP |", "| --- | --- | --- | --- |"]
    for row in rows:
        low, middle, high = row["ratio"]
        lines.append(
            f"| {row['network']}, {row['sparsity']:.3f} | {row['run']} | {row['ms'][1]:.3g} | {middle:.2f} ({low:.2f} to {high:.2f}) |"
        )
    found = [row["ratio"][1] for row in rows if row["run"] == "sparse"]
    reached = ", ".join(f"{ratio:.2f}" for ratio in found)
    verdict = "met" if all(ratio <= 1 / 3 for ratio in found) else "**missed**"
    return "\n".join(
        [
            *lines,
            "",
            f"Goal for sparse: at most a third of SET-MLP's time. Reached: {reached}, {verdict}. Version: {rows[0]['version']}.",
        ]
    )
