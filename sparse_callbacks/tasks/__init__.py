"""The parts of `train.py` that a user of the library does not need: models, data, checkpoints.

Nothing in the other packages imports from here.
"""
