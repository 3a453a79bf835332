"""A trained network is converted to N:M: masks by magnitude, weights refitted layer by layer."""
