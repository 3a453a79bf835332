"""Runs of `train.py` that are killed without warning, resumed and compared with a run that was never stopped."""
