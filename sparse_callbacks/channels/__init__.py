"""Channels: which of them belong together, what they cost, and how they are cut out of a network."""

from sparse_callbacks.channels.groups import Group, channel_groups

__all__ = ["Group", "channel_groups"]
