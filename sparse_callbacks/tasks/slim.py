"""The option `slim=true`, which makes the trained network smaller, and `onnx=true`, which exports it."""

import logging
from collections import OrderedDict
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytorch_lightning as pl
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from sparse_callbacks.channels.compact import save_compact
from sparse_callbacks.channels.onnx import export_onnx
from sparse_callbacks.channels.proof import Proof
from sparse_callbacks.channels.slim import slim
from sparse_callbacks.core.inspection import copied, extra, quiet
from sparse_callbacks.lightning.callback import SparsityCallback
from sparse_callbacks.tasks.classifier import Classifier

FILE = "slim.safetensors"
ONNX_FILE = "slim.onnx"
# outputs are compared, and forward passes timed, on a batch of this size; the whole test set is compared by accuracy
BATCH = 8


def check(method: SparsityCallback | None, onnx: bool = False) -> None:
    """Refuse a run that cannot end in a slim network, before it is trained.

    Args:
        method: the sparsity callback; None for a dense run.
        onnx: whether the slim network is exported.

    Raises:
        ValueError: a dense run.
        ImportError: the extra `channels`, or `onnx`, is missing.
    """
    if method is None:
        raise ValueError(
            "slim=true, but method=none has no masks to remove channels by. Choose a method, e.g. method=smcp."
        )
    extra("safetensors.torch", "channels")
    for module in ("onnx", "onnxscript", "onnxruntime") if onnx else ():
        extra(module, "onnx")


def slimmed(
    trainer: pl.Trainer, module: Classifier, data: pl.LightningDataModule, method: SparsityCallback, folder: Path
) -> tuple[dict[str, float], Proof, nn.Module]:
    """Slim the network that was tested, save it as slim.safetensors and slim.json, and test it again.

    Args:
        trainer: the trainer that has tested `module`.
        module: the trained network; it is not changed.
        data: the data set; its test images are used.
        method: the sparsity callback, whose masks are those of the network.
        folder: the folder of the run, which the files are written into.

    Returns:
        The metrics, the proof and the slim network. The metrics are slim/parameters, slim/flops (of a forward pass for one image; a
        multiply-add is two) and slim/latency (milliseconds for a batch of 8), each also as a share of the masked network's
        (slim/parameters_share, ...), slim/removed (channels), slim/difference (of the outputs, relative) and
        slim/test/acc.
    """
    images, _ = next(iter(data.test_dataloader()))
    sample = images[:BATCH].to(module.device)
    # layers have the names of the plan and the final table, in the reasons too, where the network is `model` of something
    named = nn.Sequential(OrderedDict(model=module.model))
    # after `test=best` the masks are those of that checkpoint, as the weights are
    slim_named, proof = slim(named, method.masks, sample)
    small = slim_named.get_submodule("model")
    proof = replace(proof, samples=len(sample))
    save_compact(small, folder / FILE)
    metrics = {
        "slim/removed": float(proof.removed),
        "slim/difference": max(proof.given.relative, proof.random.relative),
    }
    for cost in ("parameters", "flops", "latency"):
        before, after = float(getattr(proof.before, cost)), float(getattr(proof.after, cost))
        shown = after / len(sample) if cost == "flops" else after  # the proof counts those of the whole sample
        metrics |= {f"slim/{cost}": shown, f"slim/{cost}_share": after / before}
    if trainer.limit_test_batches != 0:
        metrics["slim/test/acc"] = _test_accuracy(small, trainer, data, module)
    return metrics, proof, small


def exported(small: nn.Module, data: pl.LightningDataModule, folder: Path) -> dict[str, float]:
    """Export a slim network as slim.onnx, and compare what onnxruntime computes on test images.

    Args:
        small: the slim network; it is not changed.
        data: the data set; its test images are used.
        folder: the folder of the run, which the file is written into.

    Returns:
        slim/onnx_difference, the largest difference of the outputs, relative.
    """
    for library in ("onnx_ir", "onnxscript"):  # they would tell of every step of theirs
        logging.getLogger(library).setLevel(logging.WARNING)
    images, _ = next(iter(data.test_dataloader()))
    found = export_onnx(copied(small).cpu(), folder / ONNX_FILE, images[:BATCH].cpu())
    return {"slim/onnx_difference": found.relative}


def _test_accuracy(small: nn.Module, trainer: pl.Trainer, data: pl.LightningDataModule, module: Classifier) -> float:
    """Accuracy of a network over as many test images as `trainer` has tested with all its processes together."""
    device = module.device
    accuracy = MulticlassAccuracy(module.num_classes, average="micro").to(device)
    batches = int(sum(trainer.num_test_batches)) * trainer.world_size
    with quiet(small):
        for images, labels in islice(data.test_dataloader(), batches):
            accuracy.update(small(images.to(device)), labels.to(device))
    return float(accuracy.compute())
