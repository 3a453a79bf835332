"""Channels: which of them belong together, what they cost, and how they are cut out of a network."""
