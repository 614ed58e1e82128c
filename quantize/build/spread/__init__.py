"""One calibration pass over the machines of a cluster."""
