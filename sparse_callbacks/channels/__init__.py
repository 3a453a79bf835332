"""Channels: which of them belong together, what they cost, and how they are cut out of a network."""

from sparse_callbacks.channels.groups import Group as Group
from sparse_callbacks.channels.groups import channel_groups as channel_groups
