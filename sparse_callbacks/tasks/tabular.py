"""Import path of ``tasks.data.tabular`` in configurations saved by version 0.1."""

from sparse_callbacks.tasks.data.tabular import madelon as madelon
from sparse_callbacks.tasks.data.tabular import tabular as tabular
