"""All samples for the probe of the table of operations, and the rows that have none here.

``PYTHONPATH=tests:. python -m support.operation_table`` prints the axes that a rule keeps although the operation keeps them
apart, and the rows that were not probed, with the reason.
"""

import torch
import torchvision  # noqa: F401 - brings operations of its own

from sparse_callbacks.channels import trace  # noqa: F401 - fills the table
from sparse_callbacks.channels.operations.table import RULES
from support import along_samples, entry_samples, layer_samples, shape_samples
from support.operation_probe import Sample, probed, stricter_than_needed

_GPU = "runs on GPUs alone"
OTHER_DEVICES = {
    "aten.cudnn_convolution": _GPU,
    "aten.cudnn_batch_norm": _GPU,
    "aten.miopen_batch_norm": _GPU,
    "aten._cudnn_rnn": _GPU,
    "aten._scaled_dot_product_flash_attention": _GPU,
    "aten._scaled_dot_product_cudnn_attention": _GPU,
    "aten._scaled_dot_product_efficient_attention": _GPU,
    "aten.mkldnn_adaptive_avg_pool2d": "takes tensors in MKL-DNN's own layout",
    "aten.mkldnn_max_pool2d": "takes tensors in MKL-DNN's own layout",
}
"""Rows that no sample reaches on a CPU, with the reason."""
if hasattr(torch.ops.aten, "_fused_rms_norm") and not layer_samples.HAS_FUSED_RMS_NORM:
    OTHER_DEVICES["aten._fused_rms_norm"] = "this torch has it on GPUs alone"

SAMPLES: list[Sample] = [
    *entry_samples.entrywise(),
    *entry_samples.makers(),
    *entry_samples.readers(),
    *along_samples.along(),
    *along_samples.picking(),
    *shape_samples.reshaping(),
    *shape_samples.joining(),
    *shape_samples.images(),
    *layer_samples.convolutions(),
    *layer_samples.products(),
    *layer_samples.norms(),
    *layer_samples.recurrent(),
]


def missing_here(name: str) -> bool:
    """Whether the installed torch has no operation of this name."""
    package, _, local = name.partition(".")
    operations = getattr(torch.ops, package)
    return not any(hasattr(operations, n) for n in (local, f"{local}_"))


def main() -> None:
    """Print what the rules keep without need."""
    print(f"torch {torch.__version__}: {len(RULES)} rows, {len(SAMPLES)} samples")
    for name in sorted(RULES):
        if reason := OTHER_DEVICES.get(name) or (missing_here(name) and "this torch does not have it"):
            print(f"not probed: {name}: {reason}")
    for line in dict.fromkeys(line for s in SAMPLES for line in stricter_than_needed(probed(s))):
        print(f"stricter than needed: {line}")


if __name__ == "__main__":
    main()
