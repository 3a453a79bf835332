"""Latency tables: how long the layers of a network take on one machine, measured once and looked up in training."""
