"""What is measured of one model: slimming by half of its open channels, and torch-pruning's pruner beside it."""

import copy
import re
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.groups import Group, channel_groups
from sparse_callbacks.channels.slim import slim
from zoo_parts.models import Entry

Row = dict[str, Any]
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Largest difference of outputs that counts as equal, relative to the largest output of the same tensor."""
BATCHES = (1, 3)
"""Sizes of the batches of fresh inputs on which the masked and the slim model are compared."""
FRESH = 1234
"""Seed of the fresh inputs; the example is drawn with seed 0."""


def call(model: nn.Module, inputs: Any) -> Any:
    """The outputs of ``model`` for a tensor, a tuple of positional arguments or a mapping of named arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def tensors_of(nest: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and mappings, in order."""
    if isinstance(nest, Tensor):
        return [nest]
    parts = nest.values() if isinstance(nest, Mapping) else nest if isinstance(nest, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def in_double(nest: Any) -> Any:
    """Inputs with their floating-point tensors in float64."""
    if isinstance(nest, Tensor):
        return nest.double() if nest.is_floating_point() else nest
    if isinstance(nest, Mapping):
        return {key: in_double(part) for key, part in nest.items()}
    return type(nest)(in_double(part) for part in nest)


def peak() -> int:
    """The largest memory of the process since :func:`forget_peak`, in bytes (Linux; elsewhere since its beginning)."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Let the peak be what the process holds now, where the system can."""
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5")


# ---------------------------------------------------------------------- our side


def half_kept(groups: list[Group]) -> dict[str, Tensor]:
    """For each open group the units that stay, bool [size]: half of them, drawn with seed 0."""
    generator = torch.Generator().manual_seed(0)
    keeps = {}
    for group in groups:
        keep = torch.ones(group.size, dtype=torch.bool)
        keep[torch.randperm(group.size, generator=generator)[: group.size // 2]] = False
        keeps[group.name] = keep
    return keeps


def consumer_masks(model: nn.Module, groups: list[Group], keeps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bool masks of the consumers of the groups, by parameter name; a layer that reads several has those of all."""
    masks: dict[str, Tensor] = {}
    for group in groups:
        for name, mask in group.masks(model, keeps[group.name]).items():
            masks[name] = masks[name] & mask if name in masks else mask
    return masks


@torch.no_grad()
def masked_copy(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with zeros where masks are False."""
    masked = copy.deepcopy(model)
    for name, mask in masks.items():
        masked.get_parameter(name).mul_(mask)
    return masked


def slimmed(entry: Entry, imports: int) -> Row:
    """One model slimmed: equality, sizes, times, memory, and what stayed.

    Args:
        entry: the model and its inputs.
        imports: bytes that the process held before it made the model.
    """
    model, example = entry.model, entry.inputs(torch.Generator().manual_seed(0), 1)
    begun = time.process_time()
    groups = channel_groups(model, example)
    row: Row = {"groups_seconds": time.process_time() - begun, "groups": len(groups)}
    opened = [g for g in groups if not g.reason]
    row |= {"open": len(opened)}
    if not opened:
        return row | {"stays": what_stays(model, groups, {g.name: g.reason for g in groups})}
    masks = consumer_masks(model, opened, half_kept(opened))
    masked = masked_copy(model, masks)
    forget_peak()
    begun = time.process_time()
    small, proof = slim(masked, masks, example)
    row["seconds"] = time.process_time() - begun
    double = 8 * sum(t.numel() for t in [*model.parameters(), *model.buffers()])
    row |= {"peak": peak() - imports, "double": double, "peak_ratio": (peak() - imports) / double}
    row |= equality(masked, small, entry)
    row |= sizes(masked, small, entry, example)
    row |= {
        "flops_left": proof.after.flops / max(1, proof.before.flops),
        "latency": [proof.before.latency, proof.after.latency],
        "cut": sum(r.units > 0 for r in proof.rows),
        "proof": proof.checked.relative,
    }
    outer = [outer_flops(m, entry, example) for m in (masked, small)]
    row["core_flops_left"] = (proof.after.flops - outer[1]) / max(1, proof.before.flops - outer[0])
    # what was open and lost nothing has its reason in the proof alone
    reasons = {r.name: r.reason or "no reason given" for r in proof.rows if not r.units}
    return row | {"stays": what_stays(model, groups, reasons)}


def equality(masked: nn.Module, small: nn.Module, entry: Entry) -> Row:
    """The largest relative difference of outputs on fresh inputs, in float64 where the masked model runs in it."""
    generator = torch.Generator().manual_seed(FRESH)
    batches = [entry.inputs(generator, size) for size in BATCHES]
    first, second = copy.deepcopy(masked).double(), copy.deepcopy(small).double()
    precision = torch.float64
    with torch.no_grad():
        try:
            call(first, in_double(batches[0]))
            batches = in_double(batches)
        except Exception:  # models may make float32 tensors themselves
            first, second, precision = masked, small, torch.float32
        worst, empty = 0.0, True
        for inputs in batches:
            expected, found = tensors_of(call(first, inputs)), tensors_of(call(second, inputs))
            empty &= not any(t.numel() for t in expected)
            worst = max(worst, gap(expected, found))
    return {"difference": worst, "equal": worst <= TOLERANCES[precision] and not empty, "precision": str(precision)[6:]}


def gap(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest difference of two lists of tensors, relative to the largest number of the same tensor.

    Infinite where shapes differ, or values that are not finite.
    """
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.numel() == 0 or torch.equal(a, b):
            continue
        a, b = a.double(), b.double()
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite], b[~finite]):
            return float("inf")
        worst = max(worst, float((a - b)[finite].abs().max() / a[finite].abs().max().clamp(min=1e-300)))
    return worst


# ---------------------------------------------------------------------- sizes


def is_outer(name: str, entry: Entry) -> bool:
    """Whether a parameter belongs to an embedding or to a head."""
    globs = [*entry.embeddings, *entry.heads, *(f"{h}.*" for h in entry.heads)]
    return any(fnmatchcase(name, glob) for glob in globs)


def sizes(masked: nn.Module, small: nn.Module, entry: Entry, example: Any) -> Row:
    """Parameters before and after, in all and without embeddings and heads."""
    counts = [{n: p.numel() for n, p in m.named_parameters()} for m in (masked, small)]
    core = [sum(count for n, count in c.items() if not is_outer(n, entry)) for c in counts]
    total = [sum(c.values()) for c in counts]
    return {
        "parameters": total, "parameters_left": total[1] / total[0], "core": core, "core_left": core[1] / max(1, core[0]),
    }  # fmt: skip


@torch.no_grad()
def outer_flops(model: nn.Module, entry: Entry, example: Any) -> int:
    """FLOPs of the linear layers and convolutions of embeddings and heads in one pass."""
    total = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        total += 2 * module.weight[0].numel() * output.numel()  # type: ignore[operator]

    handles = [
        module.register_forward_hook(count)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and is_outer(f"{name}.weight", entry)
    ]
    call(model, example)
    for handle in handles:
        handle.remove()
    return total


# ---------------------------------------------------------------------- what stays


def what_stays(model: nn.Module, groups: list[Group], reasons: Mapping[str, str]) -> list[Row]:
    """For each kind of reason: groups, weights of their producers as a share of the model's parameters, an example."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    total = sum(p.numel() for p in model.parameters())
    names = sorted({*parameters, *(n for n, _ in model.named_modules() if n)}, key=len, reverse=True)
    found: dict[str, Row] = {}
    for group in groups:
        reason = reasons.get(group.name)
        if reason:
            members = group.producers or ()
            weights = {m.parameter for m in members} or {f"{group.name}.weight"}
            kind = kind_of(reason, names)
            row = found.setdefault(kind, {"reason": kind, "groups": 0, "share": 0.0, "first": group.name, "said": reason})
            row["groups"] += 1
            row["share"] += sum(parameters[n].numel() for n in weights if n in parameters) / max(1, total)
    return sorted(found.values(), key=lambda row: -row["share"])


def kind_of(reason: str, names: list[str]) -> str:
    """A reason without the names of layers and the numbers in it.

    Args:
        reason: the reason.
        names: names of the model's modules and parameters, the longest first.
    """
    words = re.split(r"([\s,;:()\[\]`']+)", reason)
    known = set(names)
    kind = "".join("…" if word.rstrip(".") in known else word for word in words)
    return re.sub(r"-?\d[\d,.]*(e[-+]?\d+)?", "#", kind)[:160]


# ---------------------------------------------------------------------- torch-pruning


def pruned_by_peer(entry: Entry) -> Row:
    """torch-pruning's ``MagnitudePruner`` at a ratio of 0.5: whether it ends, whether its network runs, what is left."""
    import torch_pruning

    model, example = copy.deepcopy(entry.model), entry.inputs(torch.Generator().manual_seed(0), 1)
    with torch.no_grad():
        shapes = [t.shape for t in tensors_of(call(model, example))]
    total = sum(p.numel() for p in model.parameters())
    heads = [
        m for n, m in model.named_modules() if any(fnmatchcase(n, g) or fnmatchcase(n, f"{g}.*") for g in entry.heads)
    ]
    begun = time.process_time()
    pruner = torch_pruning.pruner.MagnitudePruner(
        model, example, importance=torch_pruning.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
        ignored_layers=heads, output_transform=lambda out: [t for t in tensors_of(out) if t.grad_fn is not None],
        forward_fn=call,
    )  # fmt: skip
    pruner.step()
    left = sum(p.numel() for p in model.parameters())
    row: Row = {"seconds": time.process_time() - begun, "ends": True, "parameters_left": left / total, "runs": False}
    try:
        with torch.no_grad():
            found = [t.shape for t in tensors_of(call(model.eval(), example))]
    except Exception as error:
        return row | {"why": f"{type(error).__name__}: {str(error)[:200]}"}
    if [s[-1:] for s in found] != [s[-1:] for s in shapes] and [s[1:] for s in found] != [s[1:] for s in shapes]:
        return row | {"why": f"outputs have other shapes: {[tuple(s) for s in found][:3]}"}
    return row | {"runs": True}


# ---------------------------------------------------------------------- stages


def small_entry() -> Entry:
    """A small network."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    return Entry(net, lambda generator, batch: torch.randn(batch, 3, 8, 8, generator=generator), ("3",))


def stages(make: Callable[[], Entry], names: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """Each of the stages ``names`` (``ours``, ``peer``) with its row, which says under ``failed`` what was raised.

    A small network goes first, so that what is imported on the way counts in no time and no memory.
    """
    for name in names:
        stage(name, small_entry(), 0)
    forget_peak()
    imports = peak()
    entry = make()
    for name in names:
        yield name, stage(name, entry, imports)


def stage(name: str, entry: Entry, imports: int) -> Row:
    """One stage; ``imports`` are the bytes that the process held before it made the model."""
    begun = time.perf_counter()
    try:
        row = slimmed(entry, imports) if name == "ours" else pruned_by_peer(entry)
    except Exception as error:  # of a model that one of the two sides cannot take
        row = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    return row | {"wall": time.perf_counter() - begun}
