"""Which storage each layer gets, and the exchange of dense layers for sparse ones."""
