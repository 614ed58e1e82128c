"""The chart of size against loss: right by its shapes, readable by itself in a browser, the same bytes as a PNG."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from quantize.charts.image import png
from quantize.charts.quality import Mark, QualityChart, State, draw, draw_file
from quantize.errors import MissingExtraError
from tests.browser import Browser

ROOT = Path(__file__).parent.parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def mark(name: str, size: float, loss: float, state: State = State.FRONT, **changes: Any) -> Mark:
    """One with an interval of a tenth on either side, and a worst kind of text; size in MB."""
    fields = {
        "low": loss * 0.9, "high": loss * 1.1, "worst": loss * 1.5, "kind": "code", "is_taken": False, "colour": 0,
        **changes,
    }  # fmt: skip
    return Mark(name=name, size_bytes=int(size * 1e6), loss=loss, state=state, **fields)


def chart(*marks: Mark, limit: float | None = 0.1) -> QualityChart:
    return QualityChart(marks, "KL divergence, nats", limit, "limit: 0.1 nats")


DEMO = chart(
    mark("q4_k_m", 105.5, 0.0682, State.BEATEN, colour=0),
    mark("q4_k_m-imatrix", 106.1, 0.0445, is_taken=True, colour=1),
    mark("q5_k_m", 112.1, 0.0898, State.BEATEN, colour=2),
    mark("awq-int4-g64", 117.5, 0.1698, State.REFUSED, colour=3),
    mark("gptq-int4-g64", 118.1, 0.1375, State.REFUSED, colour=4),
    mark("q8_0", 144.8, 0.0051, colour=5),
    mark("bnb-int8", 167.1, 0.0263, State.BEATEN, colour=6),
)
CLOSE = [mark(f"variant-{n}", 4000 + 9 * n, 0.05 + 0.0007 * n, colour=n) for n in range(7)]
CROWD = chart(*CLOSE, mark("f16", 16000, 0.0))


def groups(text: str) -> dict[str, ElementTree.Element]:
    """The drawing of each artifact, by its name."""
    found = ElementTree.fromstring(text.encode()).iter(f"{SVG}g")
    named = [(item.findtext(f"{SVG}title"), item) for item in found]
    return {title.partition(":")[0]: item for title, item in named if title is not None}


def dot(group: ElementTree.Element) -> tuple[float, float]:
    item = next(item for item in group.iter(f"{SVG}circle") if item.get("class") in ("dot", "open"))
    return float(item.attrib["cx"]), float(item.attrib["cy"])


def test_what_is_smaller_is_left_and_what_is_better_is_low() -> None:
    found = groups(draw(chart(mark("a", 100, 0.05), mark("b", 200, 0.02), mark("c", 400, 0.001))))
    places = {name: dot(item) for name, item in found.items()}
    assert sorted(places, key=lambda name: places[name][0]) == ["a", "b", "c"]
    assert sorted(places, key=lambda name: places[name][1]) == ["a", "b", "c"]  # pixels go down
    across = (places["c"][0] - places["b"][0]) / (places["b"][0] - places["a"][0])
    assert across == pytest.approx(2, rel=0.01)  # sizes are linear
    up = (places["c"][1] - places["b"][1]) / (places["b"][1] - places["a"][1])
    assert up == pytest.approx(math.log(20) / math.log(2.5), rel=0.01)  # losses logarithmic


def test_the_bar_is_the_interval_and_the_diamond_the_worst_kind() -> None:
    shown = groups(draw(chart(mark("a", 100, 0.02, low=0.01, high=0.04, worst=0.08), limit=0.02)))["a"]
    _, middle = dot(shown)
    upright = next(item for item in shown.iter(f"{SVG}line") if item.get("class") == "whisker")
    low, high = float(upright.attrib["y1"]), float(upright.attrib["y2"])
    assert low - middle == pytest.approx(middle - high, abs=0.11)  # half and twice the loss
    worst = next(item for item in shown.iter(f"{SVG}path") if item.get("class") == "worst")
    top = float(worst.attrib["d"].split()[1].partition("l")[0]) + 5
    assert middle - top == pytest.approx(2 * (middle - high), abs=0.2)


def test_the_limit_lies_at_the_loss_that_it_is() -> None:
    text = draw(chart(mark("a", 100, 0.1), mark("b", 120, 0.01), limit=0.1))
    line = next(item for item in ElementTree.fromstring(text).iter(f"{SVG}line") if item.get("class") == "limit")
    assert float(line.attrib["y1"]) == dot(groups(text)["a"])[1]
    assert 'class="limit"' not in draw(chart(mark("a", 100, 0.1), limit=None))


def test_a_limit_far_above_leaves_the_figures_their_room() -> None:
    none, far = (draw(chart(mark("a", 100, 0.1), mark("b", 120, 0.01), limit=limit)) for limit in (None, 100))
    assert "above the scale" in far
    assert [dot(item) for item in groups(far).values()] == [dot(item) for item in groups(none).values()]


def test_shapes_tell_what_colors_tell() -> None:
    shapes = {
        name: {str(item.get("class")) for item in group.iter() if item.get("class") in ("dot", "open", "cross", "ring")}
        for name, group in groups(draw(DEMO)).items()
    }
    assert shapes["q4_k_m-imatrix"] == {"ring", "dot"}
    assert shapes["q8_0"] == {"dot"}
    assert shapes["q5_k_m"] == {"open"}
    assert shapes["awq-int4-g64"] == {"cross"}
    words = [item.text for item in ElementTree.fromstring(draw(DEMO)).iter(f"{SVG}text")]
    for meaning in ("take this one", "on the front", "95 % interval", *(state.value for state in State)):
        assert meaning in words
    assert "95 % interval" not in draw(chart(mark("a", 1, 0.1, low=None, high=None)))


def test_the_front_line_goes_through_the_front() -> None:
    line = next(ElementTree.fromstring(draw(DEMO)).iter(f"{SVG}polyline"))
    found = groups(draw(DEMO))
    ends = [tuple(float(part) for part in point.split(",")) for point in line.attrib["points"].split()]
    assert ends == [dot(found["q4_k_m-imatrix"]), dot(found["q8_0"])]


def test_axes_have_units_that_fit() -> None:
    for size, unit in ((0.3, "kB"), (300, "MB"), (70_000, "GB")):
        assert f">size, {unit}<" in draw(chart(mark("a", size, 0.1), mark("b", size / 2, 0.2)))


def test_it_says_in_words_what_it_shows() -> None:
    root = ElementTree.fromstring(draw(DEMO))
    assert (root.get("role"), root.get("aria-labelledby"), root.get("aria-describedby")) == (
        "img", "quality-title", "quality-desc",
    )  # fmt: skip
    assert root.findtext(f"{SVG}title") == "KL divergence, nats against size"
    told = str(root.findtext(f"{SVG}desc"))
    figures = "106.1 MB, 0.0445 (between 0.04005 and 0.04895), at worst 0.06675 on code"
    assert f"q4_k_m-imatrix: {figures}, the one to take." in told


def test_what_is_far_below_the_others_is_said() -> None:
    assert "f16: 0, below the scale" in draw(CROWD)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=6), st.integers(0, 10**13), st.floats(0, 1e6) | st.just(math.inf)), max_size=9),
    st.floats(1e-9, 1e3) | st.none(),
)
def test_any_figures_can_be_drawn(values: list[tuple[str, int, float]], limit: float | None) -> None:
    marks = [
        mark("".join(letter for letter in name if letter.isprintable()), size / 1e6, loss, colour=index)
        for index, (name, size, loss) in enumerate(values)
    ]
    for text in (draw(chart(*marks, limit=limit)), draw_file(chart(*marks, limit=limit), "<a>", "&")):
        assert bool(text) == any(math.isfinite(item.loss) for item in marks)
        assert "nan" not in text.replace("nanb", "")
        if text:
            ElementTree.fromstring(text.encode())


# --- as whoever looks at it sees it -----------------------------------------------------------------------------------

OVERLAPS = """
const boxes = [...document.querySelectorAll('text')].map(item => [item.textContent, item.getBoundingClientRect()]);
const found = [];
for (const [a, one] of boxes) for (const [b, other] of boxes) if (a < b
  && Math.min(one.right, other.right) - Math.max(one.left, other.left) > 1
  && Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top) > 3) found.push([a, b]);
return found;"""
OUTSIDE = """
const all = document.documentElement.getBoundingClientRect();
return [...document.querySelectorAll('text')].filter(item => { const box = item.getBoundingClientRect();
  return box.left < all.left || box.right > all.right || box.top < all.top || box.bottom > all.bottom; })
  .map(item => item.textContent);"""
# The least contrast (WCAG 2) of text with the ground, and of what is drawn in an artifact's color.
CONTRAST = """
const light = text => { const [r, g, b] = text.match(/[0-9.]+/g).map(Number)
    .map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; };
const ground = light(getComputedStyle(document.querySelector('.ground')).fill);
const least = colors => Math.min(...colors.map(light)
  .map(item => (Math.max(item, ground) + .05) / (Math.min(item, ground) + .05)));
const of = (query, what) => [...document.querySelectorAll(query)].map(item => getComputedStyle(item)[what]);
return [least(of('text', 'fill')), least(of('g', 'color'))];"""


@pytest.mark.parametrize("drawn", [DEMO, CROWD], ids=["demo", "crowd"])
def test_a_browser_shows_it_by_itself(drawn: QualityChart, tmp_path: Path, browser: Browser) -> None:
    path = tmp_path / "quality.svg"
    path.write_text(draw_file(drawn, "A model, quantized: size against loss", "Take one. " * 3), encoding="utf-8")
    browser.open(path.as_uri())
    assert browser.console() == []
    assert browser.requests() == [path.as_uri()]
    assert browser.run(OVERLAPS) == []
    assert browser.run(OUTSIDE) == []
    grounds = set()
    for scheme in ("light", "dark"):
        browser.media(scheme=scheme)
        grounds.add(browser.run("return getComputedStyle(document.querySelector('.ground')).fill"))
        texts, colors = browser.run(CONTRAST)
        assert texts >= 4.5
        assert colors >= 3
    assert len(grounds) == 2
    browser.media()


def test_long_titles_are_cut() -> None:
    text = draw_file(DEMO, "long " * 60, "remark " * 60)
    texts = ElementTree.fromstring(text.encode()).iter(f"{SVG}text")
    head = next(item for item in texts if item.get("class") == "head")
    assert str(head.text).startswith("long long")
    assert str(head.text).endswith("…")


def test_the_png_is_the_same_every_time_and_shows_text() -> None:
    text = draw_file(DEMO, "A model", "Take one.")
    image = png(text)
    assert png(text) == image
    program = "import sys; from quantize.charts.image import png; sys.stdout.buffer.write(png(sys.stdin.read()))"
    done = subprocess.run(
        [sys.executable, "-c", program], input=text.encode(), capture_output=True, check=True, cwd=ROOT,
        env={"HOME": "/nonexistent", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout == image, "in another process, with other fonts at hand"
    shown = Image.open(io.BytesIO(image)).convert("L")
    assert shown.size == (2000, 964)
    title = shown.crop((40, 20, 300, 70))
    dark = sum(title.histogram()[:128])
    assert dark > 300  # letters; without a font there is none
    assert shown.getpixel((5, 5)) == 255


def test_without_what_draws_it_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(MissingExtraError, match="a PNG of the chart") as caught:
        png(draw(DEMO))
    assert "quantize-models[report]" in str(caught.value.hint)
