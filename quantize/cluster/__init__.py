"""Builds on a Ray cluster: recipes side by side on its nodes, and one calibration pass spread over several of them.

In: recipes, a cluster's address. Out: the same artifacts, to the bit, that a build on one machine makes.
spread and what it uses (pool, passwork, schedule) are about one pass; units is about many recipes.
"""
