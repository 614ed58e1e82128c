"""A toy output format for `quantize`: matrices as INT8 with a scale a row, all in one .npz. Real, and of no use."""
