"""Latency tables: how long the layers of a network take on one machine."""
