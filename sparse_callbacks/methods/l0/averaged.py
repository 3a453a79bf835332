"""What an average of the weights of constrained L0 is taken of."""

from contextlib import AbstractContextManager

from sparse_callbacks.core.averages import between_batches
from sparse_callbacks.methods.l0.l0 import ConstrainedL0


@between_batches.register
def _(method: ConstrainedL0) -> AbstractContextManager[None]:
    return method.gated.between_batches()
