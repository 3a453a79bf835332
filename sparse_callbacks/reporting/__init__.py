"""Reports of recorded runs, and comparisons of several: pages that open offline, and tables."""
