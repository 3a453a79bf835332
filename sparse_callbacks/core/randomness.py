"""Random generators: made from (seed, step, name), and their states kept and put back."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
