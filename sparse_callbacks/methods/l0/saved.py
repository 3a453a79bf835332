"""What a saved run of constrained L0 may hold."""

from collections.abc import Collection, Iterator, Mapping

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from sparse_callbacks.core.awaited import why_never
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.state_claims import Kept, Zeros, copied_names, expected_aux, possible_zeros
from sparse_callbacks.methods.l0 import gates
from sparse_callbacks.methods.l0.l0 import ConstrainedL0


@why_never.register
def _(method: ConstrainedL0) -> str:
    return "the gates of ConstrainedL0 share multipliers that are made when a fit starts"


@possible_zeros.register
def _(method: ConstrainedL0, saved: SavedRun, planned: Mapping[str, int]) -> Iterator[Zeros]:
    for name, mask in saved.masks.items():
        log_alpha = saved.aux.get(f"log_alpha/{name}")
        if log_alpha is not None and name in saved.dense:
            # in the weights' precision, in which a gate that is almost closed may be 0
            closed = int((gates.trained(log_alpha).to(saved.dense[name].dtype) == 0).sum())
            yield Zeros((name,), (closed * (mask.numel() // log_alpha.numel()),))


@copied_names.register
def _(method: ConstrainedL0, saved: SavedRun) -> Collection[str]:
    return saved.masks


@expected_aux.register
def _(method: ConstrainedL0, saved: SavedRun, model: nn.Module) -> Mapping[str, Kept]:
    kept: dict[str, Kept] = {}
    moved = method.gate_optimizer == "adam" and min(saved.progress["steps"].values(), default=0) > 0
    kernels = {
        name: mask.shape for name, mask in saved.masks.items() if mask.ndim > 1
    }  # the others are biases and norms
    for kernel, whole in kernels.items():
        transposed = isinstance(model.get_submodule(kernel.rpartition(".")[0]), _ConvTransposeNd)
        shape = tuple(whole if method.unit == "weight" else gates.channel_shape(whole, transposed))
        kept[f"log_alpha/{kernel}"] = Kept(shape, required=True)
        kept |= {f"{moment}/{kernel}": Kept(shape, required=moved) for moment in ("exp_avg", "exp_avg_sq")}
        kept[f"gate_steps/{kernel}"] = Kept(low=0, required=moved)
        # one for each layer, or one under the name of the first kernel of each optimizer
        lost = method.constraint == "layer" or not any(key.startswith("multiplier/") for key in saved.aux)
        kept[f"multiplier/{kernel}"] = Kept(low=0, required=lost)
    return kept
