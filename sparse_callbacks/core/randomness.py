"""Random generators: made from (seed, step, name), and their states kept and put back."""

import hashlib
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_callbacks.core.shards import layout_of


def generator(seed: int, number: int, name: str) -> torch.Generator:
    """A CPU generator that derives from (seed, number of a step, name): the same on every rank, device and resume."""
    digest = hashlib.blake2b(f"{seed}/{number}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)  # seeds are signed: 63 bits fit


def uniform_like(parameter: Tensor, source: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1) of the shape and on the device of ``parameter``.

    In float64, because float32 draws tie in large layers, and ties would favour low indices.
    """
    # drawn on the CPU for the whole parameter and cut afterwards, so that device and shards do not change the numbers
    layout = layout_of(parameter)
    whole = torch.rand(layout.whole_shape(parameter), dtype=torch.float64, generator=source)
    return layout.part(whole).to(parameter.device)


def seed_everything(seed: int) -> None:
    """Seed torch on all devices, Python and, where it is imported, numpy."""
    torch.manual_seed(seed)
    seed_restorable(seed)


def seed_restorable(seed: int) -> None:
    """Seed every generator whose state :func:`random_states` takes now, and no other."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    # only where somebody has imported it: this package does not need numpy
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)  # numpy refuses seeds of more than 32 bits


def random_states() -> dict[str, Any]:
    """State of every random generator: torch's, Python's, numpy's where it is imported, and one for each CUDA device in
    use.

    Returns:
        "torch", "python" and "numpy" as the generators give them, and "cuda" as states by device index.
    """
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate(), "cuda": {}}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states["numpy"] = numpy.random.get_state()
    # asking an unused CUDA for a state would initialize it, which must not happen before worker processes are forked
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = {device: torch.cuda.get_rng_state(device) for device in range(torch.cuda.device_count())}
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` took; a generator that was not there then is left alone."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "numpy" in states:
        sys.modules["numpy"].random.set_state(states["numpy"])
    for device, state in states["cuda"].items():
        torch.cuda.set_rng_state(state, device)
