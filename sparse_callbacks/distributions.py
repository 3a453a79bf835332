"""Ways to share a target sparsity out over layers, from their home in ``core``."""

from sparse_callbacks.core.distributions import *  # noqa: F403
