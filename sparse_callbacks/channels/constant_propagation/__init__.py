"""Constant propagation: which channels hold one number whatever the inputs of a network and their sizes are."""
