"""Slims one model by half of its open channels: equality, sizes, times, memory, and what stayed."""

import copy
import re
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.groups import Group, channel_groups
from sparse_callbacks.channels.slim import slim
from zoo_parts.entries import Entry, call
from zoo_parts.memory import forget_peak, peak
from zoo_parts.outputs import equality

Row = dict[str, Any]


def slimmed(entry: Entry, imports: int) -> Row:
    """What slimming does to one model.

    Args:
        entry: the model and its inputs.
        imports: bytes that the process held before it made the model.
    """
    model, example = entry.model, entry.inputs(torch.Generator().manual_seed(0), 1)
    begun = time.process_time()
    groups = channel_groups(model, example)
    row: Row = {"groups_seconds": time.process_time() - begun, "groups": len(groups)}
    opened = [g for g in groups if not g.reason]
    if not opened:
        return row | {"stays": what_stays(model, groups, {g.name: g.reason for g in groups})}
    masks = consumer_masks(model, opened, half_kept(opened))
    masked = masked_copy(model, masks)
    forget_peak()
    begun = time.process_time()
    small, proof = slim(masked, masks, example)
    row["seconds"] = time.process_time() - begun
    row |= {"peak": peak() - imports, "double": 8 * sum(t.numel() for t in [*model.parameters(), *model.buffers()])}
    row |= {"cut": sum(r.units > 0 for r in proof.rows), "latency": [proof.before.latency, proof.after.latency]}
    row |= equality(model, masked, small, entry)
    row |= what_is_left(masked, small, entry, example, (proof.before.flops, proof.after.flops))
    # what was open and lost nothing has its reason in the proof alone
    reasons = {r.name: r.reason or "was masked, and stays without a reason" for r in proof.rows if not r.units}
    return row | {"stays": what_stays(model, groups, reasons)}


def half_kept(groups: Sequence[Group]) -> list[Tensor]:
    """For each group the units that stay, bool [size]: half of them, drawn with seed 0."""
    generator = torch.Generator().manual_seed(0)
    keeps = []
    for group in groups:
        keep = torch.ones(group.size, dtype=torch.bool)
        keep[torch.randperm(group.size, generator=generator)[: group.size // 2]] = False
        keeps.append(keep)
    return keeps


def consumer_masks(model: nn.Module, groups: Sequence[Group], keeps: Sequence[Tensor]) -> dict[str, Tensor]:
    """Bool masks of the consumers of the groups, by parameter name; a layer that reads several has those of all."""
    masks: dict[str, Tensor] = {}
    for group, keep in zip(groups, keeps, strict=True):
        for name, mask in group.masks(model, keep).items():
            masks[name] = masks[name] & mask if name in masks else mask
    return masks


@torch.no_grad()
def masked_copy(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with zeros where masks are False."""
    masked = copy.deepcopy(model)
    for name, mask in masks.items():
        masked.get_parameter(name).mul_(mask)
    return masked


# ---------------------------------------------------------------------- what is left


def is_outer(name: str, entry: Entry) -> bool:
    """Whether a parameter belongs to an embedding or to a head; what does not is the core of the model."""
    globs = [*entry.embeddings, *entry.heads, *(f"{h}.*" for h in entry.heads)]
    return any(fnmatchcase(name, glob) for glob in globs)


def what_is_left(masked: nn.Module, small: nn.Module, entry: Entry, example: Any, flops: tuple[int, int]) -> Row:
    """Shares of parameters and FLOPs that are left, of the whole model and of its core.

    Args:
        masked, small: the model before and after.
        entry: what belongs to the core.
        example: the inputs of one pass.
        flops: FLOPs of one pass before and after.
    """
    counts = [{n: p.numel() for n, p in m.named_parameters()} for m in (masked, small)]
    total = [sum(found.values()) for found in counts]
    core = [sum(count for n, count in found.items() if not is_outer(n, entry)) for found in counts]
    outer = [outer_flops(m, entry, example) for m in (masked, small)]
    return {
        "parameters": total, "parameters_left": total[1] / total[0], "core_left": core[1] / max(1, core[0]),
        "flops_left": flops[1] / max(1, flops[0]), "core_flops_left": (flops[1] - outer[1]) / max(1, flops[0] - outer[0]),
    }  # fmt: skip


@torch.no_grad()
def outer_flops(model: nn.Module, entry: Entry, example: Any) -> int:
    """FLOPs of the linear layers and convolutions of embeddings and heads in one pass; a multiply-add is two."""
    found: list[int] = []

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        weight: Tensor = module.weight  # of a parametrized layer it is no parameter
        found.append(2 * weight[0].numel() * output.numel())

    handles = [
        module.register_forward_hook(count)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and is_outer(f"{name}.weight", entry)
    ]
    call(model, example)
    for handle in handles:
        handle.remove()
    return sum(found)


# ---------------------------------------------------------------------- what stays


def what_stays(model: nn.Module, groups: Sequence[Group], reasons: Mapping[str, str]) -> list[Row]:
    """For each kind of reason its groups, and the weights of their producers as a share of the model's parameters.

    Args:
        model: the model before it was slimmed.
        groups: all of its groups.
        reasons: the reason of each group that stayed whole, by its name.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    total = sum(p.numel() for p in model.parameters())
    names = {*parameters, *(n for n, _ in model.named_modules())}
    found: dict[str, Row] = {}
    for group in groups:
        if group.name not in reasons:
            continue
        kind = kind_of(reasons[group.name], names)
        row = found.setdefault(kind, {"reason": kind, "groups": 0, "share": 0.0, "first": group.name})
        row["groups"] += 1
        # layers that no trace has found have no members
        weights = {m.parameter for m in group.producers} or {f"{group.name}.weight"}
        row["share"] += sum(parameters[n].numel() for n in weights if n in parameters) / max(1, total)
    return sorted(found.values(), key=lambda row: -row["share"])


def kind_of(reason: str, names: set[str]) -> str:
    """A reason without names of the model's modules and parameters, numbers and what an error says, so that like ones meet."""
    reason = re.sub(r"\((\w+): .*", r"(\1)", reason, flags=re.DOTALL)
    words = re.split(r"([\s,;:()\[\]`']+)", reason)
    kind = "".join("…" if word and word.rstrip(".") in names else word for word in words)
    return re.sub(r"(?<![A-Za-z_])\d[\d.,]*(e[-+]?\d+)?", "#", kind)[:160]
