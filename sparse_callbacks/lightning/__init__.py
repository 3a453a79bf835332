"""The Trainer's side of sparse training.

Besides ``tasks`` this is the only package that imports Lightning or uses its private names.
"""
