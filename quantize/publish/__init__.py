"""Artifacts out of one store and into another: a folder, an OCI registry, the Hugging Face Hub, any fsspec URL.

In: artifacts of a store, or references. Out: a publication that is complete before its tag names it, or an artifact of
which every hash was checked before the store shows it. `send` and `receive` are the two ways, `places` finds targets.
"""
