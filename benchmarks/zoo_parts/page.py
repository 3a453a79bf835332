"""The tables of the zoo, as Markdown, and the file of its figures."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparse_callbacks.core.machine import processor
from zoo_parts import tables
from zoo_parts.tables import Row

PACKAGES = ("torch", "torchvision", "timm", "transformers", "segmentation-models-pytorch", "torch-pruning")
ABOUT = """# Half of the open channels, over a zoo of models

`channel_groups` offers groups of channels; half of the units of each open group, drawn with seed 0, are masked at their consumers,
and `slim` removes them. Weights are random, norms and scales too.

- **equal**: the masked and the slim model agree on fresh inputs, in batches of one and of three, in float64 (to 1e-8 of the largest
  output of a tensor), and outputs move with the inputs and with the masks.
- **left**: shares of the model before. The *core* is the model without embeddings and output layers. In medians, models that could
  not be slimmed count as 1.
- **torch-pruning** is its `MagnitudePruner` at a ratio of 0.5, with the output layers ignored. Its network *runs* if a forward pass
  ends with outputs of the same shapes; whether it computes what it should is not asked.
- **time** is CPU time of `slim`, with its search for groups and its comparisons; *ratio* is that over torch-pruning's, on one thread.
- **memory** is the peak over what the imports hold, in sizes of the model in float64; of models below {smallest} MiB in float64 it is
  not given, since what they compute takes more.
- **latency** is that of one sample, and only a hint where other programs run at the same time.
"""


def text(rows: Sequence[Row], source: str) -> str:
    """The whole page."""
    parts = [
        ABOUT.format(smallest=tables.SMALLEST >> 20), f"{source}\n", "## In the median\n", tables.summary(rows), "", tables.both(rows),
        "\n## Models above their goal\n", tables.above(rows), "\n## What stays, and why\n", tables.reasons(rows),
        "\n## Every model\n", tables.models(rows), "\n## Where torch-pruning gives no network\n", tables.failures(rows, "peer"),
        "\n## Where `slim` gives none\n", tables.failures(rows, "ours"),
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def write(rows: Sequence[Row], source: str, file: Path, page: Callable[[Sequence[Row], str], str] = text) -> None:
    """Write the figures, one model a line, and the page of what they say, which ``page`` makes of them."""
    rows = [rounded(row) for row in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".md").write_text(page(rows, source))
    lines = ",\n    ".join(json.dumps(row) for row in rows)
    file.with_suffix(".json").write_text(f'{{"source": {json.dumps(source)}, "rows": [\n    {lines}\n]}}\n')


def rounded(value: Any) -> Any:
    """Numbers with four digits, in lists and mappings too; more are not measured. What is infinite becomes a word."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value


# ---------------------------------------------------------------------- where the figures come from


def source(arguments: Sequence[str], script: str = "zoo.py", packages: Sequence[str] = PACKAGES) -> str:
    """The command without the file that it writes, the machine, and the versions.

    Args:
        arguments: those of the command.
        script: its file in ``benchmarks``.
        packages: whose versions to name.
    """
    words = list(arguments)
    if "--out" in words:
        place = words.index("--out")
        del words[place : place + 2]
    return f"Written by `{' '.join([f'python benchmarks/{script}', *words])}` on {processor()}, {platform.machine()}; {versions(packages)}."


def versions(packages: Sequence[str] = PACKAGES) -> str:
    """Versions of Python and of the packages that the figures depend on."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)
