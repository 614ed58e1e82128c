"""bitsandbytes: INT8 rows and NF4 blocks."""
