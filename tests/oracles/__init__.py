"""Tables that were worked by hand or computed by independent code, by method."""
