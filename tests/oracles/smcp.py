"""Reference numbers for SMCP: schedules, knapsacks, importance, costs, and a network of three convolutions."""

# curve, reduction, epochs, warm-up, epochs at full reduction: reduction by epoch (executed in float32)
SCHEDULES: dict[tuple[str, float, int, int, int], dict[int, float]] = {
    ("exp", 0.5, 90, 10, 25): {
        0: 0.0, 9: 0.0, 10: 0.0259642, 11: 0.050662, 20: 0.2252208, 30: 0.346076, 40: 0.4193785, 50: 0.4638386, 60: 0.4908051,
        63: 0.4965953, 64: 0.4983402, 65: 0.5, 89: 0.5,
    },
    ("exp", 0.7, 10, 2, 3): {
        0: 0.0, 1: 0.0, 2: 0.1317198, 3: 0.2570157, 4: 0.3762008, 5: 0.4895732, 6: 0.5974163, 7: 0.7, 8: 0.7, 9: 0.7,
    },
    ("exp2", 0.5, 90, 10, 25): {
        0: 0.0, 9: 0.0, 10: 0.0123013, 11: 0.0244514, 20: 0.1272917, 30: 0.2288946, 40: 0.3186686, 50: 0.3979909, 60: 0.4680783,
        63: 0.4874679, 64: 0.4937727, 65: 0.5, 89: 0.5,
    },
    ("exp2", 0.7, 10, 2, 3): {
        0: 0.0, 1: 0.0, 2: 0.1818112, 3: 0.3305671, 4: 0.4522774, 5: 0.5518595, 6: 0.6333364, 7: 0.7, 8: 0.7, 9: 0.7,
    },
    ("linear", 0.5, 90, 10, 25): {
        0: 0.0, 9: 0.0, 10: 0.0089286, 11: 0.0178571, 20: 0.0982143, 30: 0.1875, 40: 0.2767857, 50: 0.3660714, 60: 0.4553571,
        63: 0.4821429, 64: 0.4910714, 65: 0.5, 89: 0.5,
    },
    ("linear", 0.7, 10, 2, 3): {
        0: 0.0, 1: 0.0, 2: 0.1166667, 3: 0.2333333, 4: 0.35, 5: 0.4666667, 6: 0.5833333, 7: 0.7, 8: 0.7, 9: 0.7,
    },
}  # fmt: skip

VALUES: list[list[float]] = [[3.0, 5.0, 6.0], [2.0, 7.0, 8.0], [4.0, 4.5, 9.0]]
COSTS: list[list[float]] = [[1, 2, 3], [1, 3, 4], [2, 3, 5]]
# capacity: best value, cost, all optimal choices
BEST: dict[float, tuple[float, float, list[tuple[int, ...]]]] = {
    4: (9.0, 4, [(0, 0, 0)]),
    6: (14.0, 6, [(0, 1, 0)]),
    7: (16.0, 7, [(1, 1, 0)]),
    8: (17.0, 8, [(1, 2, 0), (2, 1, 0)]),
    9: (19.0, 9, [(0, 1, 2)]),
    12: (23.0, 12, [(2, 2, 2)]),
}

# values, costs, capacity, indices that are kept
CONDENSED = ([0.0, 3.0, 5.0, 5.0, 4.0, 9.0], [0.0, 2.0, 3.0, 4.0, 5.0, 20.0], 10, [0, 1, 2])

SCORES = [0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.4, 0.6, 0.05, 0.8, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65]
ORDER = [2, 9, 4, 15, 7, 14, 0, 13, 6, 12, 3, 11, 5, 10, 1, 8]
CUMULATIVE = [0.9, 1.7, 2.4, 3.05, 3.65, 4.2, 4.7, 5.15, 5.55, 5.9, 6.2, 6.45, 6.65, 6.8, 6.9, 6.95]
# multiples of 8: units, values; the mask of the best 8
BY_8 = ([8, 16], [5.15, 6.95], [1, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 1, 1])
# four neighbours ranked together: their sums, order, values of the multiples of 8, units kept of 8
BY_4 = ([1.8, 1.9, 1.25, 2.0], [3, 1, 0, 2], [3.9, 6.95], [4, 5, 6, 7, 12, 13, 14, 15])

# weight and gradient [out, in, kernel]
WEIGHT = [[[1.0, 2.0], [0.5, -1.0], [-2.0, 0.0]], [[0.0, 1.0], [1.0, 1.0], [3.0, -1.0]]]
GRADIENT = [[[0.1, -0.2], [0.3, 0.1], [0.2, 0.5]], [[0.4, 0.1], [-0.2, 0.1], [0.1, 0.2]]]
TAYLOR_OUT_IN = [[0.3, -0.05, 0.4], [-0.1, 0.1, -0.1]]
# active outputs, importance of the inputs
TAYLOR = [([1, 1], [0.2, 0.05, 0.3]), ([1, 0], [0.3, 0.05, 0.4])]
MAGNITUDE = [4.0, 3.5, 6.0]

# weight, mask, input, loss 2 * sum(mask * weight * input), gradient of the effective weight
SOFT_MASK = ([1, -2, 3], [1, 0, 1], [1, 5, 2], 14.0, [2.0, 10.0, 4.0])
# weight, mask, coefficient, what is added to the gradient
PRUNED_DECAY = ([1, -2, 3], [1, 0, 1], 0.1, [0.0, -0.2, 0.0])
# gamma, scaling, gradient of the effective gamma, effective gamma, gradient of gamma
NORM_SCALING = ([2, 4], [0.5, 0.0], [3, 7], [1.0, 0.0], [6.0, 0.0])

# Conv2d(64, 128, 3, stride=2, padding=1) on 64x56x56: inputs: millions of weights, billions of multiply-adds
CONVOLUTION = {64: (0.073728, 0.057802752), 32: (0.036864, 0.028901376)}

# inputs, outputs: tables asked in turn, with channels rounded up to multiples of 8
FALLBACK = {
    (61, 128): [(61, 128), (64, 128)],
    (61, 100): [(61, 100), (64, 100), (61, 104), (64, 104)],
    (64, 100): [(64, 100), (64, 104)],
}

# three 3x3 convolutions and a linear layer without biases: their (out, in)
TINY = {"conv1": (16, 3), "conv2": (16, 16), "conv3": (32, 16), "fc": (10, 32)}
TINY_TOTAL = 7664
# budget of weights: inputs kept, cost estimated with all outputs, cost of the network that results
TINY_SOLVED = {0.7: ({"conv2": 16, "conv3": 8, "fc": 32}, 5360, 4208)}
# budget: smallest cost with all outputs
TINY_INFEASIBLE = {0.4: 3968}
