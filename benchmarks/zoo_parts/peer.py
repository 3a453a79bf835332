"""torch-pruning's ``MagnitudePruner`` on one model, as its documentation uses it."""

import copy
import time
from fnmatch import fnmatchcase
from typing import Any

import torch

from zoo_parts.entries import Entry, call
from zoo_parts.outputs import tensors_of

RATIO = 0.5


def pruned(entry: Entry) -> dict[str, Any]:
    """Whether the pruner's network runs, and why not; the share of parameters that is left; CPU seconds of pruning.

    It is told which layers make the outputs, and to trace from every output that has a graph. A network runs if a pass on
    the example ends with outputs of the same shapes, apart from their first dimension: detectors may find more boxes.
    """
    import torch_pruning

    model, example = copy.deepcopy(entry.model), entry.inputs(torch.Generator().manual_seed(0), 1)
    with torch.no_grad():
        shapes = [t.shape[1:] for t in tensors_of(call(model, example))]
    total = sum(p.numel() for p in model.parameters())
    heads = [
        m for n, m in model.named_modules() if any(fnmatchcase(n, h) or fnmatchcase(n, f"{h}.*") for h in entry.heads)
    ]
    begun = time.process_time()
    pruner = torch_pruning.pruner.MagnitudePruner(
        model, example, importance=torch_pruning.importance.MagnitudeImportance(p=2), pruning_ratio=RATIO, ignored_layers=heads,
        forward_fn=call, output_transform=lambda outputs: [t for t in tensors_of(outputs) if t.grad_fn is not None],
    )  # fmt: skip
    pruner.step()
    seconds = time.process_time() - begun
    left = sum(p.numel() for p in model.parameters())
    row: dict[str, Any] = {"seconds": seconds, "parameters_left": left / total, "runs": False}
    try:
        with torch.no_grad():
            found = [t.shape[1:] for t in tensors_of(call(model.eval(), example))]
    except Exception as error:  # whatever a network with wrong sizes raises
        return row | {"why": f"its network fails: {type(error).__name__}: {str(error)[:200]}"}
    return row | ({"runs": True} if found == shapes else {"why": "its network gives outputs of other shapes"})
