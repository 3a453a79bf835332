"""SET: drop small weights, grow at random."""

from torch import Tensor

from sparse_callbacks.core.growth import uniform_numbers
from sparse_callbacks.core.sparse_layers.drawn_places import drawn_units
from sparse_callbacks.core.step import Step
from sparse_callbacks.methods.drop_and_grow import DropAndGrow
from sparse_callbacks.methods.unit_updates import grown_units


class SET(DropAndGrow):
    """SET: drop small weights, grow at random (Mocanu et al., 2018).

    After the gradient step of every ``every`` steps, layer by layer, with k = int(drop_fraction(t) * active)::

        keep  the active weights with the largest |w|, all but k
        grow  k positions drawn uniformly from all others, those just dropped included

    Grown weights start at zero with zero optimizer state; a weight dropped and drawn again keeps both. Updates come
    after steps 1, 1 + every, ... (counted from 1, as in the reference code of RigL).

    Differs from the paper: the smallest magnitudes are dropped, where the paper drops the smallest positive and the
    largest negative weights (the same for symmetric weights); grown weights start at zero and not at random; the drop
    fraction falls by a cosine, where the paper holds it constant (``drop_fraction="constant(0.3)"``); the interval is
    in steps and not epochs.

    Args:
        sparsity, distribution, every, start, stop, drop_fraction, initial_mask, rescale, pattern, storage, group, rows, include, exclude,
            seed, **options: as in :class:`~sparse_callbacks.RigL`.

    Raises:
        ValueError: arguments out of range, or a model, optimizer or checkpoint that does not fit; before the first
            batch.

    Example:
        >>> from sparse_callbacks import SET
        >>> SET(sparsity=0.95, drop_fraction="constant(0.3)").target_sparsity
        0.95

    Reference: Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta: Scalable training of artificial neural networks with
    adaptive sparse connectivity inspired by network science. Nature Communications 9, 2018, algorithm 1.
    """

    def grow_scores(self, step: Step, name: str) -> Tensor:
        return uniform_numbers(self, name, step.number)


@grown_units.register
def _(method: SET, step: Step, name: str, kept: Tensor, count: int) -> Tensor:
    layer = method.weights.layers_stored[name]
    shape, source = (layer.block_rows, layer.in_features), method.generator(name, step.number)
    return drawn_units(shape, kept, count, source, per_block=layer.storage == "grouped")
