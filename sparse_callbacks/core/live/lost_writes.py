"""Warns of values that are written into a dense copy of a weight, which changes nothing."""

from sparse_callbacks.core.method import Method


class LostWrites:
    """Looks at each step of a run, and at its end, whether such a copy was written into.

    Args:
        method: the method of the run.
    """

    def __init__(self, method: Method) -> None:
        self._method, self._named = method, set[str]()

    def look(self) -> None:
        """Warn, once in a run, of each layer whose copies were written into since the last look."""
        layers = self._method.weights.layers_stored
        written = [name for name, layer in layers.items() if layer.handed_out.were_written()]
        new = [name for name in written if name not in self._named]
        if not new or self._method.attachment.host is None:
            return
        self._named.update(new)
        self._method.host.warn(
            f"something has written into {', '.join(new)} and changed nothing: layer.weight and the state_dict of a SparseLinear are "
            "copies, a dense matrix that is made of the live values each time. Write into layer.values, as in "
            "layer.values.data.clamp_(-1, 1), or give storage='masked'."
        )
