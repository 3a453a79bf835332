"""The inputs that a model is run with in order to look at it."""

import inspect
from collections.abc import Generator
from typing import Any

from torch import Tensor, nn

from sparse_callbacks.core.data_pass import NoPassError
from sparse_callbacks.core.error_text import with_class
from sparse_callbacks.core.inspection import map_tensors, quiet, run, tensors_in


def example_inputs(model: nn.Module, batches: Generator[Any, None, None]) -> Any:
    """Inputs that the model's forward takes.

    They are the model's ``example_input_array`` as it is, or else what its forward gets from the first of ``batches``: its
    first sample, where all tensors have one first size and the forward takes a single sample, otherwise the whole batch.

    Args:
        model: the model that is trained.
        batches: passes over data that call the model, one batch at a time; closed at the end.

    Raises:
        ValueError: neither gives any, or the forward does not take the ``example_input_array``. What the data itself raises
            goes through as it is.
    """
    example = getattr(model, "example_input_array", None)
    seen: list[Any] = [] if example is None else [example]

    def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        # under one mapping by name where any argument is named, as run() takes positional or named arguments, not both
        seen.append(dict(inspect.signature(module.forward).bind(*inputs, **named).arguments) if named else inputs)

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        if not seen:
            # one batch is enough: the hook sees the inputs before the forward pass begins
            next(batches)
    # such as where there is no train loader; its advice is for other callers and is left out
    except NoPassError as error:
        raise ValueError(
            "the model is looked at with one sample, and there is none: the module has no example_input_array, and "
            f"{str(error).partition('. ')[0]}. Set example_input_array to what its forward takes of one sample (or, in a "
            "loop of your own, give sparsify(..., data=) one batch); the forward must run the network that is to be pruned."
        ) from error
    finally:
        batches.close()
        handle.remove()
    like = next((p for p in model.parameters() if p.is_floating_point()), next(model.parameters()))

    def in_place(tensor: Tensor) -> Tensor:
        # an example may be float32 where the model is float64; whole numbers, such as tokens, must stay whole
        return tensor.detach().to(like if tensor.is_floating_point() else like.device)

    found = map_tensors(in_place, seen[0])
    if example is not None:
        if problem := why_not_taken(model, found):
            raise ValueError(
                f"{type(model).__name__} is looked at with its example_input_array, which its forward does not take "
                f"({problem}). Set example_input_array to what forward takes: a tensor, a tuple of positional or a mapping "
                "of named arguments."
            )
        return found
    if len({t.shape[0] for t in tensors_in(found) if t.ndim}) != 1:  # no common size that would be that of the batch
        return found
    single = map_tensors(lambda t: t[:1] if t.ndim else t, found)
    return found if why_not_taken(model, single) else single


def why_not_taken(model: nn.Module, inputs: Any) -> str:
    """The error of a forward pass on ``inputs``; empty where there is none."""
    try:
        with quiet(model):
            run(model, inputs)
    except Exception as error:  # whatever the user's forward raises
        return with_class(error)
    return ""
