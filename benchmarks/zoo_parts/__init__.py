"""The parts of zoo.py: its models, what is measured of each, and the tables."""
