"""Slims torchvision's classifiers with half of all channels masked, and compares the outputs.

Run ``python benchmarks/slim_torchvision.py``; it writes benchmarks/results/slim_torchvision.md, again after each
model. With names of models as arguments it measures only those and prints their rows. Needs the extras ``train`` and
``channels``.

Weights are random, and norms and layer scales get random values, so that a wrong cut shows in the outputs. Masks are
drawn for every group of :func:`sparse_callbacks.channels.groups.channel_groups`, half of its units in multiples of 8
where the group's size allows.
"""

import argparse
import platform
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from sparse_callbacks.channels.groups import Group, channel_groups
from sparse_callbacks.channels.proof import Proof
from sparse_callbacks.channels.slim import slim

MODELS = {
    "resnet18": 64, "resnet50": 64, "wide_resnet50_2": 64, "resnext50_32x4d": 64, "vgg16_bn": 64, "mobilenet_v2": 64,
    "mobilenet_v3_small": 64, "densenet121": 64, "efficientnet_b0": 64, "regnet_y_400mf": 64, "shufflenet_v2_x1_0": 64,
    "mnasnet1_0": 64, "squeezenet1_1": 64, "googlenet": 64, "inception_v3": 96, "convnext_tiny": 64, "vit_b_16": 224, "swin_t": 64,
}  # fmt: skip
"""Side of the square images by name; vit_b_16 takes no other, inception_v3 no smaller."""
EQUAL = (1e-4, 1e-8)  # relative, in float32 and in float64
RESULTS = Path(__file__).parent / "results" / "slim_torchvision.md"
HEAD = """# Half of all channels, over torchvision's classifiers

Every group of channels that the graph offers is masked at random: half of its units, in multiples of 8 where its size allows.
Differences are the largest over outputs, relative to the largest output; parameters and FLOPs are shares of the dense model's;
latency is the median of three passes of one image on one thread, and only a hint where
other programs run at the same time; time is that of `slim` with its checks. googlenet and inception_v3 count their auxiliary heads:
googlenet's lose channels as the others do, inception_v3's takes no images of this size and stays dense. How `slim` works and why
channels stay is explained in [slimming](../../docs/slimming.md). Written by `python benchmarks/slim_torchvision.py` on {where}.

| model | image | groups cut | channels removed of masked | parameters | FLOPs | latency | float32 | float64 | time |
|---|---|---|---|---|---|---|---|---|---|
"""
NOTES = """
## What stays

Groups of the models above that keep all their channels. A refusal names the first layer of the group. Channels that
are outputs of the network stay in every model, and are not listed.

| model | groups | first of them | reason |
|---|---|---|---|
"""


def shaken(model: nn.Module) -> nn.Module:
    """Random norms, statistics, layer scales and heads in place of ones and zeros."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
        for name, p in model.named_parameters():
            if name.endswith("layer_scale"):
                p.uniform_(0.5, 1.5)
            if p.ndim > 1 and not p.any():  # the head of a vision transformer
                p.normal_(0, 0.02)
    return model


def half_masks(model: nn.Module, groups: list[Group]) -> tuple[dict[str, Tensor], int]:
    """Masks of half of the units of every group, and how many channels of the first producers they mean."""
    masks: dict[str, Tensor] = {}
    channels = 0
    for group in groups:
        multiple = 8 if group.size % 16 == 0 else 1
        keep = torch.ones(group.size, dtype=torch.bool)
        keep[torch.randperm(group.size)[: group.size // 2 // multiple * multiple]] = False
        units = group.producers[0].units
        channels += int((~keep[units[units >= 0]]).sum())
        for name, mask in group.masks(model, keep).items():
            masks[name] = masks[name] & mask if name in masks else mask
    return masks, channels


def measure(name: str, side: int) -> tuple[str, list[str]]:
    """Rows of the two tables."""
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = shaken(torchvision.models.get_model(name, weights=None, **options)).eval()
    image = torch.randn(1, 3, side, side)
    groups = [g for g in channel_groups(model, image) if not g.reason]
    masks, channels = half_masks(model, groups)
    begin = time.perf_counter()
    _, proof = slim(model, masks, image)
    return row(name, side, proof, channels, time.perf_counter() - begin), refusals(name, proof)


def row(name: str, side: int, proof: Proof, masked: int, seconds: float) -> str:
    before, after = proof.before, proof.after
    single = max(proof.given.relative, proof.random.relative)
    cut = sum(r.units > 0 for r in proof.rows)
    equal = single <= EQUAL[0] and proof.checked.relative <= EQUAL[1]
    cells = [
        name, str(side), f"{cut} of {len(proof.rows)}", f"{proof.removed} of {masked}", f"{after.parameters / before.parameters:.3f}",
        f"{after.flops / before.flops:.3f}", f"{before.latency:.1f} → {after.latency:.1f} ms",
        f"{single:.0e}{'' if equal else ' **not equal**'}", f"{proof.checked.relative:.0e}", f"{seconds:.0f} s",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def refusals(name: str, proof: Proof) -> list[str]:
    """A row for each kind of reason; numbers in it are those of the first group."""
    kinds: Counter[str] = Counter()
    first: dict[str, tuple[str, str]] = {}
    for group, reason in proof.left_out.items():
        kind = kind_of(reason)
        kinds[kind] += 1
        first.setdefault(kind, (group, reason))
    reported = {k: n for k, n in kinds.items() if "outputs of the network" not in k}
    return [f"| {name} | {n} | `{first[kind][0]}` | {first[kind][1]} |" for kind, n in reported.items()]


def kind_of(reason: str) -> str:
    """The kind of a reason: what it says apart from the numbers and names in it."""
    for words in ("differ by", "fails", "LayerNorm"):
        if words in reason:
            return words
    return reason


def where() -> str:
    cpu = platform.processor() or platform.machine()
    return (
        f"{cpu}, Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="measure only these and print the rows")
    chosen = parser.parse_args().models
    torch.set_num_threads(1)
    rows, left = [], []
    for name in chosen or MODELS:
        found, reasons = measure(name, MODELS[name])
        print("\n".join([found, *reasons]), file=sys.stdout, flush=True)
        rows, left = [*rows, found], [*left, *reasons]
        if not chosen:
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(HEAD.format(where=where()) + "\n".join(rows) + "\n" + NOTES + "\n".join(left) + "\n")


if __name__ == "__main__":
    main()
