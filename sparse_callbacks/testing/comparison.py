"""What a run left, and where two runs differ."""

import copy
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks.core.live.live_masks import exchanged_layers
from sparse_callbacks.lightning.callback import SparsityCallback


def snapshot(trainer: pl.Trainer, module: nn.Module, *callbacks: SparsityCallback) -> dict[str, Any]:
    """Copies of everything that a resumed run must share with one that never stopped."""
    return copy.deepcopy(
        {
            "weights": module.state_dict(),
            "masks": [c.masks for c in callbacks],
            "callbacks": [c.state_dict() for c in callbacks],
            "aux": [c.aux for c in callbacks],
            "counts": [(c.step, c.updates, c.at_target) for c in callbacks],
            "optimizers": [o.state_dict() for o in trainer.optimizers],
            "rates": [[group["lr"] for group in o.param_groups] for o in trainer.optimizers],
            "global_step": trainer.global_step,
        }
    )


def lasting(state: Any) -> Any:
    """A state without what belongs to one run: when its phases and epochs began."""
    if not isinstance(state, Mapping):
        return state
    own = ("phase/", "workers/offset", "trigger/looked", "trigger/distances")
    return {k: lasting(v) for k, v in state.items() if not str(k).startswith(own)}


def differences(first: Any, second: Any, where: str = "", bitwise: bool = True) -> list[str]:
    """Where two nests of dicts, sequences, numbers and tensors differ; tensors bit by bit, or else by value (-0.0
    equals 0.0)."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        if set(first) != set(second):
            return [f"{where}: keys {sorted(map(str, set(first) ^ set(second)))}"]
        return [d for key in first for d in differences(first[key], second[key], f"{where}/{key}", bitwise)]
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        if len(first) != len(second):
            return [f"{where}: lengths {len(first)} and {len(second)}"]
        pairs = enumerate(zip(first, second, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}/{i}", bitwise)]
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        alike = first.dtype == second.dtype and first.shape == second.shape
        return [] if alike and (_bits(first) == _bits(second) if bitwise else torch.equal(first, second)) else [where]
    return [] if type(first) is type(second) and first == second else [f"{where}: {first!r} and {second!r}"]


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def sparse_weights(module: nn.Module, *callbacks: SparsityCallback) -> dict[str, tuple[Tensor, Tensor]]:
    """(weight, mask) by name, of layers with live values alone their whole matrix."""
    weights = {n: p.detach() for n, p in module.named_parameters()}
    weights |= {n: layer.places.dense(layer.values.detach()) for n, layer in exchanged_layers(module).items()}
    return {n: (weights[n], m) for c in callbacks for n, m in c.masks.items()}


def assert_effective(module: nn.Module, *callbacks: SparsityCallback) -> None:
    """Every sparse weight is what its mask leaves of it."""
    found = sparse_weights(module, *callbacks)
    assert found
    for name, (weight, mask) in found.items():
        assert mask.dtype == torch.bool, name
        assert mask.shape == weight.shape, name
        assert not weight[~mask].any(), f"{name}: {int(weight[~mask].count_nonzero())} pruned weights are not zero"


def assert_counts(callback: SparsityCallback) -> None:
    """Exactly the zeros that ``plan()`` announces, in every parameter, or over all where they share a threshold."""
    plan = callback.plan()
    assert sum(int((~m).sum()) for m in callback.masks.values()) == plan.zeros
    if plan.joint is not None:
        assert set(callback.masks) == plan.selected
        return
    assert {n: int((~m).sum()) for n, m in callback.masks.items()} == {
        r.name: r.zeros for r in plan if r.name in plan.selected
    }


def per_element_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The optimizer's state tensors that have one element for each weight."""
    return {k: v for k, v in optimizer.state[parameter].items() if isinstance(v, Tensor) and v.shape == parameter.shape}


def structure(module: nn.Module) -> dict[str, Any]:
    """Everything that is in a model besides the values of its tensors: keys, buffers, types, attributes and hooks."""
    hooks = {
        f"{name}.{kind}": len(value)
        for name, child in module.named_modules()
        for kind, value in vars(child).items()
        if kind.endswith("_hooks") and isinstance(value, dict)
    }
    return {
        "keys": list(module.state_dict()),
        "buffers": [n for n, _ in module.named_buffers()],
        "parameters": {
            n: (type(p).__name__, id(p), p.requires_grad, tuple(p.shape)) for n, p in module.named_parameters()
        },
        "types": {n: type(m).__name__ for n, m in module.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in module.named_modules() if n},
        "hooks": hooks,
        "gradient hooks": [
            n for n, p in module.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks
        ],
        "on the tensors": {n: sorted(vars(p)) for n, p in module.named_parameters()},
    }
