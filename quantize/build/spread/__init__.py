"""One calibration pass over the machines of a Ray cluster."""
