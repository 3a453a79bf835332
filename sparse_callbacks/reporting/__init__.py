"""Reports of recorded runs: pages that open offline, tables, and comparisons of several runs. Reads files alone."""
