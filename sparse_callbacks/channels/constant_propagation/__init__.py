"""Constant propagation: which channels hold one number for all inputs and sizes."""
