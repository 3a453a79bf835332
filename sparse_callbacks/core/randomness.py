"""Random generators: made from (seed, step, name), and their states kept and put back."""

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparse_callbacks.core.shards import layout_of


def generator(seed: int, step: int, name: str) -> torch.Generator:
    """A CPU generator that derives from (seed, step, name): the same on every rank, device and resume."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)  # seeds are signed: 63 bits fit


def uniform_like(parameter: Tensor, source: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1) of the shape and on the device of ``parameter``.

    In float64, because float32 draws tie in large layers, and ties would favour low indices.
    """
    whole = torch.rand(parameter.shape, dtype=torch.float64, generator=source)
    return layout_of(parameter).part(whole).to(parameter.device)


def seed_everything(seed: int) -> None:
    """Seed torch on all devices, Python and, where it is imported, numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Put every random generator (torch's, Python's and, where it is imported, numpy's) and ``training`` flag back at the end."""
    flags = [(m, m.training) for m in module.modules()]
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    states = torch.get_rng_state(), random.getstate()
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        for m, training in flags:
            m.training = training
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if numpy is not None:
            numpy.random.set_state(drawn)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
