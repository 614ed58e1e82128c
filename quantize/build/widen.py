"""Whether FP16 is too narrow for the source of a calibration pass, before its variants store anything in it.

In: the variants of a pass. Out: the same, with a checkpoint that says so. How far activations reach is found out in
calibration/reach.py; what is stored then is the formats'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from quantize.events import Reporter
from quantize.formats import builders
from quantize.formats.base import Context

Variants = Sequence[tuple[str, Context]]


def widened_all(variants: Variants, reporter: Reporter) -> list[tuple[str, Context]]:
    """(format, context) pairs whose checkpoint is `wide` where it is and one of them needs to know. In a worker."""
    from quantize.calibration.reach import widened

    if not any(builders()[name].computes_in_half for name, _ in variants):
        return list(variants)
    first = variants[0][1]
    checkpoint = widened(first.checkpoint, first.source, first.cache, reporter, first.limits.own_device)
    return [(name, replace(context, checkpoint=checkpoint)) for name, context in variants]
