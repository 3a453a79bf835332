"""The parts of real_speed.py: what each measures, the tables of its figures, and the page with the picture."""
