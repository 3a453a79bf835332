"""Reference numbers for criteria of channels: norms of filters, gates, momentum over prunings, what removal leaves."""

from typing import Any

# filters [out, in, height, width], number to prune; their norms, and which go
FILTERS: Any = {
    "weight": [[[[1.0, -1.0], [0.0, 2.0]]], [[[0.5, 0.5], [0.5, -0.5]]], [[[0.0, 0.0], [3.0, 0.0]]], [[[-1.0, 0.0], [0.0, 0.1]]]],
    "prune": 2,
    "l1": [4.0, 2.0, 3.0, 1.1],
    "pruned": [1, 3],
}  # fmt: skip

# two linear layers without biases around a ReLU, and the loss 0.5 * (z - y)^2, mean over the batch
GATES: Any = {
    "x": [[1.0, 1.0], [2.0, -1.0], [0.5, 2.0]],
    "y": [[1.0], [0.0], [-0.5]],
    "first": [[1.0, 0.5], [-0.5, 1.0]],
    "second": [[0.8, -0.4]],
    "by_sample": [[0.0, 0.0], [1.44, 0.0], [1.2, -0.7]],
    "squared_batch": [0.7744, 0.0544444444],
    "squared_samples": [1.1712, 0.1633333333],
    "squared_products": [0.6094222222, 0.0722222222],
}

# gradients at gates of one by batch and unit of two layers; scores of two prunings of two units each, of those that are left
PRUNINGS: Any = {
    "before_first": [
        [[-0.27, 0.17, 0.83, -0.49], [0.75, 0.89, 0.52, -0.14], [-0.24, 0.6, 0.84, 0.18]],
        [[0.52, 0.38, 0.63], [0.41, -0.61, -0.14], [0.06, 0.37, -0.19]],
    ],
    "before_second": [[[-0.43, 0.46, 0.14, 0.0], [0.79, 0.42, 0.17, 0.0]], [[0.0, 0.66, -0.74], [0.0, 0.29, 0.19]]],
    "first": [[0.231, 0.3936666667, 0.5549666667, 0.0973666667], [0.1473666667, 0.2178, 0.1508666667]],
    "pruned_first": [(0, 3), (1, 0)],
    "second": [[0.24835, 0.3737, 0.501895, 0.0], [0.0, 0.222005, 0.164965]],
    "pruned_second": [(1, 1), (1, 2)],
    "pruned_second_without_momentum": [(0, 1), (0, 2)],
}

# convolution (3 to 4, 3x3, no bias), batch norm, ReLU, convolution (4 to 2, 3x3, bias), flattening (2x5x5), linear layer (50 to 3):
# parameters before and after channels of the first convolution go, and inputs of the linear layer that one channel of the second has
REMOVAL: Any = {"channels": [1, 3], "before": 343, "after": 249, "columns_of_channel_0": range(25)}
