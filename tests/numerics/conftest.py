"""Hypothesis without deadlines: first calls of kernels and busy machines are not what these tests are about."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("numerics", deadline=None)
settings.load_profile("numerics")
