"""The tables of the short fits, as Markdown."""

from collections.abc import Sequence

from zoo_parts.fits import BATCH, KINDS, ONNX_TOLERANCE, STEPS, Row
from zoo_parts.tables import table

PACKAGES = (
    "torch", "pytorch-lightning", "torchvision", "timm", "transformers", "segmentation-models-pytorch", "safetensors", "onnx",
    "onnxscript", "onnxruntime",
)  # fmt: skip
TITLES = {
    "smcp": "SMCP, 0.6 of the parameters",
    "pruning": "ChannelPruning by taylor_fo, 0.6 of the parameters",
    "l0": "ConstrainedL0, density 0.5",
}
ABOUT = f"""# Short fits on models of other packages

{STEPS} steps with batches of {BATCH} random inputs, from random weights; then the masks of the callback go to `slim`, the slim
network through `save_compact` and `load_compact` into a new instance, and that one through `export_onnx`.

- **removed**: units that are gone, of those in groups that may lose some. A head of attention is one unit. The gates
  of ConstrainedL0 close single inputs of the output projection, so a head goes only where all of its inputs are closed.
- **masked - slim**: difference of the trained model and the slim one on fresh inputs in batches of one and of three, relative to the
  largest output of a tensor, in the precision that is given; right are 1e-8 in float64 and 1e-4 in float32, with outputs that move
  with the inputs and differ from those before the fit.
- **slim - loaded**: the same for the loaded one, in float32; right is 0.
- **loaded - ONNX**: the same for the file in onnxruntime, in float32; right is {ONNX_TOLERANCE:g}. **batch** is the size of the batch,
  while the example of the export was one sample.
- **seconds** are wall time on one thread: a hint only where other programs run.
"""


def text(rows: Sequence[Row], source: str) -> str:
    """The whole page."""
    parts = [ABOUT, f"{source}\n"]
    for side, title in TITLES.items():
        parts += [f"## {title}\n", _table(rows, side), ""]
    notes = [f"- {row['name']}, {side}: {why}" for row in rows for side in TITLES for why in [_note(row[side])] if why]
    return "\n".join([*parts, "## What failed, or takes one batch size only\n", "\n".join(notes) or "None.", ""])


def _table(rows: Sequence[Row], side: str) -> str:
    heads = [
        "model", *(f"{kind} removed" for kind in KINDS), "parameters before", "after", "left", "masked - slim", "slim - loaded",
        "loaded - ONNX", "batch", "fit, seconds", "slim", "files", "ONNX",
    ]  # fmt: skip
    return table(heads, [[row["name"], *_cells(row[side])] for row in rows])


def _cells(found: Row) -> list[str]:
    if "failed" in found:
        return ["failed"]
    before, after = found["parameters"]
    units = [f"{gone:,} of {all_units:,}" if all_units else "-" for gone, all_units in found["units"].values()]
    seconds = [f"{found[f'{part}_seconds']:.1f}" for part in ("fit", "slim", "files", "onnx")]
    return [
        *units, f"{before:,}", f"{after:,}", f"{after / before:.3f}", f"{found['difference']:.1e} ({found['precision']})",
        f"{found['loaded']:g}", f"{found['onnx']:.1e}", str(found["batch"]), *seconds,
    ]  # fmt: skip


def _note(found: Row) -> str:
    """What a reader has to know of a fit that failed, is wrong, or ended in a file for one batch size; else empty."""
    if "failed" in found:
        return found["failed"]
    foreign = f"masks cut {found['foreign']:,} weights that are not zero" if found["foreign"] else ""
    return "; ".join(filter(None, [found["why"], foreign, found["fixed"] and f"one batch size: {found['fixed']}"]))
