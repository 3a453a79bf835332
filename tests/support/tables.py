"""Tables of features and labels that tests of tabular data read and write."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_callbacks.tasks.data.module import MemoryData


def table(count: int = 60, width: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Features that tell the rows apart, and labels 1, 2, 3 in blocks."""
    features = np.random.default_rng(0).normal(5.0, 3.0, (count, width))
    return features, np.repeat([1, 2, 3], count // 3)


def whole(data: MemoryData) -> tuple[torch.Tensor, torch.Tensor]:
    """All samples of the three parts, sorted by their first feature."""
    parts = (data.train, data.val, data.test)
    inputs, labels = torch.cat([p.inputs for p in parts]), torch.cat([p.labels for p in parts])
    order = inputs[:, 0].argsort()
    return inputs[order], labels[order]


def write_csv(path: Path, features: Any, labels: Any, head: str | None = None, position: int = -1) -> Path:
    rows = [[repr(float(x)) for x in row] for row in features]
    for row, label in zip(rows, labels, strict=True):
        row.insert(position % (len(row) + 1), str(label))
    path.write_text("\n".join([*([head] if head else []), *(",".join(row) for row in rows)]) + "\n")
    return path
