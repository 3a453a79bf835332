"""Why channels have to stay: layers that must not be cut, and models of which none can be."""

from collections.abc import Container, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from sparse_callbacks.channels.module_sizes import is_layer
from sparse_callbacks.core.selection import why_not_ranked

NEVER_CALLED = "not found in the trace: never called there. It keeps its sizes, so an input that calls it may make the slim network fail"
CUT_TYPES = "lose no channels, only those in float16, bfloat16, float32 and float64 do"


def why_layers_stay(model: nn.Module, globs: Sequence[str]) -> dict[str, str]:
    """The modules and parameters that must not be cut: reasons by their names.

    Args:
        model: the model.
        globs: globs of module or parameter names that the user excludes.
    """
    found: dict[str, str] = {}
    first_names: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        if remedy := _way_to_plain_weights(module):
            reason = f"{name} is parametrized: its weight is computed from others; {remedy} makes it a plain one"
            found |= {
                f"{name}{'.' if name and inner else ''}{inner}": reason
                for inner, _ in module.named_modules()
                if not inner or "parametrizations" in inner
            }
        for local, p in module._parameters.items():
            full = f"{name}.{local}" if name else local
            if p is not None and why_not_ranked(p):
                found[name] = found[full] = (
                    f"{name or full}: weights in {str(p.dtype).removeprefix('torch.')} {CUT_TYPES}"
                )
            # a parameter of two modules would lose the same slices in both, and other channels arrive at each
            other = full if p is None else first_names.setdefault(p, full)
            if other != full:
                reason = f"{full} and {other} are one parameter"
                found[name] = found[other.rpartition(".")[0]] = reason
            if any(fnmatchcase(full, g) or fnmatchcase(name, g) for g in globs):
                found[name] = found[full] = f"{name or full} is excluded"
    return found


def why_excluded(names: Iterable[str], reasons: Mapping[str, str]) -> str:
    """Why a module or parameter of a group must not be cut; empty where all may be.

    Args:
        names: names of the group's modules and parameters.
        reasons: from :func:`why_layers_stay`.
    """
    return next((reasons[name] for name in names if name in reasons), "")


def uncalled_layers(model: nn.Module, called: Container[str], reasons: Mapping[str, str]) -> dict[str, tuple[int, str]]:
    """The layers whose weights a pass has not read, by name: number of outputs, and why they stay.

    Args:
        model: the model.
        called: names of the parameters that the pass has read.
        reasons: from :func:`why_layers_stay`.
    """
    layers = [(n, m) for n, m in model.named_modules() if is_layer(m) and f"{n}.weight" not in called]
    sizes = {n: int(m.out_features if isinstance(m, nn.Linear) else m.out_channels) for n, m in layers}
    return {n: (sizes[n], reasons.get(n, NEVER_CALLED)) for n, _ in layers}


def layer_of(parameter: str) -> str:
    """The name of the layer that a parameter belongs to, or its own where it is not the weight of one."""
    layer, found, computed = parameter.rpartition("parametrizations.")
    return layer.rstrip(".") or computed.partition(".")[0] if found else parameter.removesuffix(".weight")


def _way_to_plain_weights(module: nn.Module) -> str:
    """The function of torch after which no parameter of ``module`` itself is computed from others; empty where none is."""
    if parametrize.is_parametrized(module):
        return "torch.nn.utils.parametrize.remove_parametrizations"
    if any(name.endswith("_g") for name in module._parameters):
        return "torch.nn.utils.remove_weight_norm"
    if any(name.endswith("_orig") for name in module._parameters):
        return "torch.nn.utils.prune.remove (or remove_spectral_norm)"
    return ""


def refuse_unmatched_globs(globs: Sequence[str], model: nn.Module) -> None:
    """Refuse globs that match nothing, as typing errors do.

    Raises:
        ValueError: names some modules and parameters that there are.
    """
    names = [n for n, _ in model.named_modules()] + [n for n, _ in model.named_parameters()]
    for glob in globs:
        if not any(fnmatchcase(n, glob) for n in names):
            examples = ", ".join(filter(None, names[:6]))
            raise ValueError(f"exclude={glob!r} matches no module and no parameter. There are for example {examples}.")


def refuse_uncuttable(model: nn.Module) -> None:
    """Refuse models whose layers cannot be replaced, or have no sizes yet.

    Raises:
        ValueError: names a module that was scripted or traced, or a layer without sizes.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{f'{name} is' if name else 'This is'} a ScriptModule, made by torch.jit.script or torch.jit.trace, whose layers "
                "cannot be replaced. Give the model with the module that it was scripted from, and script the slim one."
            )
        local = next(
            (n for n, t in [*module._parameters.items(), *module._buffers.items()] if t is not None and is_lazy(t)), ""
        )
        if local:
            raise ValueError(
                f"{name}{'.' if name else ''}{local} has no shape yet, as {type(module).__name__} learns its sizes in the first "
                "forward pass, so it is not known which channels belong together. Call the model on an input first."
            )


def refuse_without_values(model: nn.Module) -> None:
    """Refuse models on the meta device, whose tensors have shapes and no values.

    Raises:
        ValueError: names a tensor of them.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device and has no values, so outputs before and after a cut cannot be compared. Load the "
                "weights first: model.to_empty(device='cpu') and load_state_dict, or load_state_dict(..., assign=True)."
            )
