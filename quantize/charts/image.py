"""A PNG of a chart: resvg draws it, with a font that comes from a package, so that no machine's fonts matter.

In: an SVG file as text. Out: bytes; the same text and versions of resvg-py and font-roboto give the same ones.
"""

from __future__ import annotations

from pathlib import Path

from quantize.errors import MissingExtraError

ZOOM = 2.0  # pixels of the image for one of the chart
FONTS = ("Roboto-Regular.ttf", "Roboto-Medium.ttf", "Roboto-Bold.ttf")


def png(svg: str) -> bytes:
    """The chart as a PNG, twice as large. Raises MissingExtraError: what draws it is not installed."""
    try:
        import font_roboto
        import resvg_py
    except ImportError as exc:
        raise MissingExtraError("a PNG of the chart", "report") from exc
    fonts = [str(Path(font_roboto.font_directory) / name) for name in FONTS]
    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=svg, zoom=ZOOM, skip_system_fonts=True, font_files=fonts, font_family="Roboto",
            sans_serif_family="Roboto",
        )
    )  # fmt: skip
