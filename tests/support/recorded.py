"""Records of runs that nobody has trained: for tests of what is read from them."""

import math
from pathlib import Path
from typing import Any

import torch

from sparse_callbacks.core.record.record_file import LayerRecord, RunRecord, append_rows, write_masks, write_run

SHAPES = {"net.0.weight": (30, 64), "net.2.weight": (20, 30), "net.4.weight": (10, 20)}


def recorded(
    folder: Path, method: str = "RigL", sparsity: float = 0.9, seed: int = 0, steps: int = 200, **said: Any
) -> Path:
    """Write the record of a run of a network of three layers to ``folder``, which is given back.

    Args:
        folder: the folder of the run.
        method, sparsity, seed: what the run is said to have been; ``"dense"`` has no masks.
        steps: its optimizer steps, of 64 samples; one in 20 has a row.
        said: other fields of RunRecord.
    """
    dense = method == "dense"
    kept = 1.0 if dense else 1.0 - sparsity
    layers = [LayerRecord(n, s, not dense, None if dense else sparsity, "", 1) for n, s in SHAPES.items()]
    layers += [LayerRecord(n.replace("weight", "bias"), s[:1], False, None, "a vector", 0) for n, s in SHAPES.items()]
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    active = {name: math.ceil(kept * size) for name, size in sizes.items()}
    whole, left = sum(sizes.values()), sum(active.values())
    rows = []
    for step in range(0, steps + 1, 20):
        done = step / steps
        row: dict[str, Any] = {
            "step": step, "epoch": 10 * done, "samples": 64 * step, "seconds": 3 * done, "event": "update" if step else "start",
            "sparsity/total": 1 - left / whole, "sparsity/model": 1 - left / (whole + 60),
            "flops/inference": 2 * left, "flops/inference_dense": 2 * whole,
            "flops/inference_sparse_layers": 2 * left, "flops/inference_sparse_layers_dense": 2 * whole,
            "flops/training": 6 * left * 64 * step, "flops/training_dense": 6 * whole * 64 * step,
            "active/mean": float(left), "bytes/weights": 4 * (whole + 60), "bytes/masks": 0 if dense else whole,
            "bytes/dense_copies": 0, "bytes/optimizer": 4 * (whole + 60),
            "val/acc": 0.5 + 0.4 * done - 0.02 * (1 - kept) + 0.003 * seed, "train/loss": 2.3 - 2 * done, "lr": 0.1,
            "grad_norm": 1 - 0.5 * done,
            "layers": {n: {"active": active[n], "churn": 0.3 * (1 - done), "dead_in": 0, "dead_out": 1} for n in sizes},
        }  # fmt: skip
        if not dense:
            row |= {
                "topology/churn": 0.3 * (1 - done), "topology/distance_previous": 0.4 * (1 - done),
                "topology/distance_first": 0.6 * done, "topology/ever_active": kept + 0.2 * done,
                "topology/dead_units": 3, "topology/mean_age": 20.0 * step / steps,
            }  # fmt: skip
        rows.append(row)
    source = torch.Generator().manual_seed(seed)
    last = rows[-1]["val/acc"]
    run = RunRecord(
        method, {} if dense else {"sparsity": str(sparsity)}, layers, "2026-01-01T00:00:00+00:00", {"torch": "2.14.1"},
        {"device": "cpu", "threads": "1", "processes": "1"}, seed, 64, steps, {} if dense else {"start": 0, "stop": 150, "every": 20},
        list(sizes), "", {"seed": seed, "model": {"_target_": "mlp"}}, f"python train.py method={method.lower()}", "the plan", "finished",
        {"test/acc": last - 0.01, "val/acc": last},
    )  # fmt: skip
    write_run(folder, RunRecord(**{**vars(run), **said}))
    append_rows(folder, rows)
    if not dense:
        masks = {n: {t: torch.rand(s, generator=source) < kept for t in ("first", "last")} for n, s in SHAPES.items()}
        write_masks(folder, masks)
    return folder
