"""Artifacts on disk: the manifest, the way from staging to their place, finding and checking them."""
