"""AWQ: 4-bit linears with scales folded into their neighbours."""
