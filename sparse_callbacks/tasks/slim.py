"""`slim=true`: the trained network without its dead channels, compared with the masked one, tested and saved."""

from itertools import islice
from pathlib import Path

import pytorch_lightning as pl
from torchmetrics.classification import MulticlassAccuracy

from sparse_callbacks.channels.compact import save_compact
from sparse_callbacks.channels.proof import Proof
from sparse_callbacks.channels.slim import slim
from sparse_callbacks.core.inspection import extra, quiet
from sparse_callbacks.lightning.callback import SparsityCallback
from sparse_callbacks.tasks.classifier import Classifier
from sparse_callbacks.tasks.data.module import MemoryData

FILE = "slim.safetensors"
BATCH = 8  # images that outputs are compared on and that are timed; the whole test set is compared by its accuracy


def check(method: SparsityCallback | None) -> None:
    """Refuse what cannot end in a slim network.

    Raises:
        ValueError: a dense run.
        ImportError: the extra `channels` is missing.
    """
    if method is None:
        raise ValueError("slim=true, but method=none has no masks to remove channels by. Choose a method, e.g. method=smcp.")
    for module in ("torch_pruning", "safetensors.torch"):
        extra(module, "channels")


def slimmed(
    trainer: pl.Trainer, module: Classifier, data: MemoryData, method: SparsityCallback, folder: Path
) -> tuple[dict[str, float], Proof]:
    """Slim the network that was tested, save it as slim.safetensors and slim.json, and test it again.

    A channel is dead where weights are zero, which after `test=best` are those of another epoch than the method's masks.

    Returns:
        slim/parameters, slim/flops and slim/latency (milliseconds for a batch of 8), each also as a share of the masked network's
        (slim/parameters_share), slim/removed (channels), slim/difference (of outputs, relative) and slim/test/acc; and the proof.
    """
    parameters = dict(module.named_parameters())
    masks = {n.removeprefix("model."): parameters[n].detach() != 0 for n in method.masks}
    images, _ = next(iter(data.test_dataloader()))
    small, proof = slim(module.model, masks, images[:BATCH].to(module.device))
    save_compact(small, folder / FILE)
    found = {"slim/removed": float(proof.removed), "slim/difference": max(proof.given.relative, proof.random.relative)}
    for what in ("parameters", "flops", "latency"):
        before, after = (float(getattr(cost, what)) for cost in (proof.before, proof.after))
        found |= {f"slim/{what}": after, f"slim/{what}_share": after / before}
    if trainer.limit_test_batches != 0:
        accuracy = MulticlassAccuracy(data.num_classes, average="micro").to(module.device)
        batches = int(sum(trainer.num_test_batches)) * trainer.world_size
        with quiet(small):
            for images, labels in islice(data.test_dataloader(), batches):
                accuracy.update(small(images.to(module.device)), labels.to(module.device))
        found["slim/test/acc"] = float(accuracy.compute())
    return found, proof
