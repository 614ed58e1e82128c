"""Charts as SVG, drawn by hand: numbers and names in, text out. No script; in a page, no colors of their own.

svg.py has what all are drawn with, quality.py size against loss, plots.py the others, labels.py finds places for names,
image.py makes a file of one, and a PNG.
"""
