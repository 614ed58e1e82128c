"""The calibration text, and the pass that streams it through the model block by block."""
