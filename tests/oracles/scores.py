"""Reference numbers for the scores of weights at the start of training."""

# a linear layer, 0.5 * mean over samples of the sum over outputs of squares
LINEAR = {
    "inputs": [[1.0, 2.0], [0.0, -1.0], [3.0, 1.0]],
    "targets": [[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]],
    "weight": [[0.5, -0.2], [0.1, 0.4]],
    "gradient": [[-1.0, -0.9], [2.0, 1.6333333333]],
    "snip": [[0.5, 0.18], [0.2, 0.6533333333]],
    "snip_normalised": [[0.3260869565, 0.1173913043], [0.1304347826, 0.4260869565]],
    "snip_mask": [[1, 0], [0, 1]],
    "product": [[-4.8333333333, -3.4666666667], [9.3888888889, 6.6]],
    # of the paper, which removes the largest
    "grasp": [[2.4166666667, -0.6933333333], [-0.9388888889, -2.64]],
    "grasp_mask": [[0, 0], [1, 1]],
    "crop": [[2.4166666667, 0.6933333333], [0.9388888889, 2.64]],
    "crop_mask": [[1, 0], [0, 1]],
}

# gradients of two batches of equal size
TWO_BATCHES = {
    "gradients": [[0.5, -0.2, 0.1], [-0.5, -0.1, 0.3]],
    "weight": [1.0, 1.5, 0.5],
    "abs_of_mean": [0.0, 0.225, 0.1],
    "kept": 1,
}

SYNFLOW = {
    "first": [[-2.5, 3.0, 0.5], [2.5, 0.0, -1.0], [1.5, -0.5, -3.0]],
    "second": [[-2.0, 1.0, 0.5], [0.5, -3.0, -1.0]],
    "sum": 36.5,
    "first_scores": [[6.25, 7.5, 1.25], [10.0, 0.0, 4.0], [2.25, 0.75, 4.5]],
    "second_scores": [[12.0, 3.5, 2.5], [3.0, 10.5, 5.0]],
    "sparsity": 0.6,
    # masks by the number of rounds
    "first_mask": {4: [[1, 1, 0], [1, 0, 1], [0, 0, 0]], 1: [[1, 1, 0], [1, 0, 0], [0, 0, 0]]},
    "second_mask": {4: [[1, 0, 0], [0, 1, 0]], 1: [[1, 0, 0], [0, 1, 1]]},
}
