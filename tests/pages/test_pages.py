"""The pages: right in a browser, in print and in Markdown, whatever a model answered and whatever was not measured."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from quantize.charts.plots import Range, heatmap, ranges
from quantize.evaluate.decision import GateThresholds
from quantize.report.collect import collect
from quantize.report.golden import pieces
from quantize.report.render import CHART, DECISION, HTML, IMAGE, MARKDOWN, render
from quantize.store.store import Store
from tests.browser import Browser
from tests.conftest import Built, Run
from tests.pages.measured import HOSTILE, bench, evaluation, keep, layers, prompt

NAMES = ["q4_0", "q8_0", "f16"]


@pytest.fixture(scope="module")
def measured(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The tiny model with everything measured of three variants; one answers with HTML."""
    store = built.copy(tmp_path_factory.mktemp("pages") / "artifacts")
    hostile = [prompt(n, artifact=n > 1, text=HOSTILE if n < 2 else "") for n in range(12)]
    hostile.append(prompt(12, kind="json"))
    keep(store, store.find("tiny/q4_0"), found=evaluation(kl=0.09, ratio=1.2, prompts=hostile), load=bench())
    keep(store, store.find("tiny/q8_0"), found=evaluation(prompts=hostile[2:]), load=bench(latency=0.7))
    keep(store, store.find("tiny/f16"), found=evaluation(kl=0.0001, prompts=hostile[2:]), layers=layers())
    return store


@pytest.fixture(scope="module")
def pages(measured: Store) -> dict[str, str]:
    """The text of each page."""
    return render(collect(measured, "tiny"))


@pytest.fixture
def opened(pages: dict[str, str], tmp_path: Path, browser: Browser) -> str:
    """The page, open in a browser; its URL."""
    path = tmp_path / HTML
    path.write_text(pages[HTML], encoding="utf-8")
    browser.open(path.as_uri())
    return path.as_uri()


def test_the_page_opens_without_errors_or_requests(opened: str, browser: Browser) -> None:
    assert browser.console() == []
    assert browser.requests() == [opened]
    assert browser.driver.title == "tiny, quantized · tiny"
    assert browser.run("return document.querySelectorAll('script, link[rel=stylesheet], img').length") == 0
    assert browser.run("return document.querySelectorAll('svg.plot').length") == 3


def test_answers_are_text_whatever_they_hold(opened: str, browser: Browser) -> None:
    shown = browser.run("return [...document.querySelectorAll('.answer')].map(item => item.textContent)")
    assert HOSTILE in shown
    assert "The answer to 0 is Paris." in shown
    assert browser.run("return document.querySelectorAll('details.diff').length") == 2
    marked = browser.run("return [...document.querySelectorAll('.answer mark')].map(item => item.textContent).join('')")
    assert "taken" in marked


def test_light_dark_paper_and_telephone(opened: str, browser: Browser) -> None:
    def background() -> str:
        return str(browser.run("return getComputedStyle(document.body).backgroundColor"))

    seen = set()
    for scheme in ("light", "dark"):
        browser.media(scheme=scheme)
        seen.add(background())
        assert browser.run(CONTRAST) >= 4.5
    assert len(seen) == 2
    browser.media(scheme="dark", kind="print")
    assert background() == "rgb(255, 255, 255)"
    assert browser.run(FOLDED) == 0  # what is folded on a screen is printed
    assert len(browser.command("Page.printToPDF", printBackground=True)["data"]) > 10_000
    browser.media()
    assert browser.run(CUT_OFF) == []
    for width in (1240, 390):
        browser.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False
        )
        assert browser.run("return document.documentElement.scrollWidth") <= width
    browser.command("Emulation.clearDeviceMetricsOverride")
    assert browser.console() == []


FOLDED = """return [...document.querySelectorAll('details > :not(summary)')]
  .filter(item => !item.checkVisibility({contentVisibilityAuto: true})).length"""

CUT_OFF = """return [...document.querySelectorAll('svg.plot text')].filter(item => {
    const box = item.getBoundingClientRect(), all = item.ownerSVGElement.getBoundingClientRect();
    return box.left < all.left || box.right > all.right || box.top < all.top || box.bottom > all.bottom; })
  .map(item => item.textContent)"""

# The least contrast between the text of an element and the nearest background behind it (WCAG 2).
CONTRAST = """
const light = text => { const [r, g, b] = text.match(/[0-9.]+/g).map(Number)
    .map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; };
const behind = item => { for (; item; item = item.parentElement) { const c = getComputedStyle(item).backgroundColor;
  if (c !== 'rgba(0, 0, 0, 0)') return c; } return 'rgb(255, 255, 255)'; };
return Math.min(...[...document.querySelectorAll('h1, h2, h3, p, td, th, dt, dd, li, a, .chip, mark')]
  .filter(item => item.textContent.trim() && item.checkVisibility())
  .map(item => { const a = light(getComputedStyle(item).color), b = light(behind(item));
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); }));
"""


def test_the_figures_are_on_the_page(opened: str, browser: Browser) -> None:
    rows = browser.run("return [...document.querySelectorAll('.glance tbody tr')].map(r => r.innerText.split('\\t'))")
    table = {row[0]: row for row in rows}
    assert table["q4_0"][4:11] == ["12.43", "1.2000", "0.0900", "0.4500", "95.0%", "11 of 13", "refused"]
    assert table["q8_0"][10] == "accepted"
    assert table["f16"][10] == "accepted"
    assert table["iq4_xs"][4:10] == ["not measured"] * 6
    assert table["source"][4] == "10.36"
    matrix = browser.run("return [...document.querySelectorAll('.matrix td.lost')].map(item => item.textContent)")
    assert matrix == ["LOST", "LOST"]
    text = browser.run("return document.body.innerText")
    for expected in ("python-docs", "12,345 predicted tokens", "llama_cpp.server on A processor", "Median 0.40%"):
        assert expected in text


def test_plots_show_what_they_should(pages: dict[str, str]) -> None:
    plots = [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", pages[HTML], re.DOTALL)]
    name = "{http://www.w3.org/2000/svg}"
    assert plots[0].findtext(f"{name}title") == "KL divergence, mean, nats against size"
    assert all(f"{variant}: " in str(plots[0].findtext(f"{name}desc")) for variant in NAMES)
    titles = [item.text for item in plots[1].iter(f"{name}title")]
    assert titles == ["q4_0: 0.500 s, 0.500 s, 0.500 s", "q8_0: 0.700 s, 0.700 s, 0.700 s"] * 2
    cells = list(plots[2].iter(f"{name}rect"))
    assert len(cells) == 16
    assert {item.attrib["class"] for item in cells} >= {"h0", "h9"}


def test_markdown_is_tables_and_text(pages: dict[str, str]) -> None:
    reader = MarkdownIt("commonmark", {"html": True}).enable("table")
    for name in (MARKDOWN, DECISION):
        tokens = reader.parse(pages[name])
        flat = [inner for token in tokens for inner in (token, *(token.children or ()))]
        assert not [token.content for token in flat if token.type in ("html_block", "html_inline", "image")]
        rows, widths = [], []
        for token in tokens:
            if token.type == "tr_open":
                rows.append(0)
            elif token.type in ("td_open", "th_open"):
                rows[-1] += 1
            elif token.type == "table_close":
                widths.append(set(rows))
                rows = []
        assert len(widths) >= 7
        assert all(len(width) == 1 for width in widths)  # a stray `|` would add a column
    code = [token.content for token in reader.parse(pages[MARKDOWN]) if token.type == "code_block"]
    assert f"{HOSTILE}\n" in code


def test_the_decision_is_the_same_on_each_page(pages: dict[str, str]) -> None:
    assert "**Serve q8_0.**" in pages[DECISION]
    assert "**Serve q8_0.**" in pages[MARKDOWN]
    assert "Serve q8_0." in pages[HTML]
    for part in ("## Context", "## Quality", "## Load", "## Findings", "## Decision", "## Conditions", "## Rollback"):
        assert part in pages[DECISION]
    assert "KL divergence | refused | mean 0.0900 nats is over the limit of 0.05" in pages[DECISION]
    assert "insufficient evidence" in pages[DECISION]


def test_the_same_measurements_give_the_same_pages(measured: Store, pages: dict[str, str]) -> None:
    assert render(collect(measured, None)) == pages


def test_nothing_measured_is_said(built: Built) -> None:
    texts = render(collect(built.store, "tiny"))
    for text in texts.values():
        assert "Insufficient evidence." in text
        assert "nan" not in text.lower().split()
    assert "not measured" in texts[HTML]
    assert "No latency was measured" in texts[MARKDOWN]
    assert "No golden prompts were asked" in texts[MARKDOWN]


def test_figures_that_are_not_finite_are_shown(built: Built, tmp_path: Path) -> None:
    store = built.copy(tmp_path / "own")
    keep(store, store.find("tiny/q8_0"), found=evaluation(kl=float("inf"), ratio=float("nan")))
    texts = render(collect(store, "tiny/q8_0"))
    assert "mean inf nats is over the limit" in texts[DECISION]
    assert "<svg" not in texts[HTML]  # there is no place for it on a plot


def test_the_command(measured: Store, tmp_path: Path, run: Run) -> None:
    result = run("report", "--store", measured.root, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    files = [DECISION, IMAGE, CHART, HTML, MARKDOWN]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    lines = result.stdout.splitlines()
    assert any(line.split()[:2] == ["q4_0", "refused"] for line in lines if line.strip())
    assert any(line.startswith("serve: tiny/q8_0@") for line in lines)
    assert "why: It is the smallest of the 2 artifacts that keep every limit." in lines  # f16 was not loaded
    assert "front: q8_0, f16" in lines
    assert lines[-5:] == [str(tmp_path / "out" / name) for name in (HTML, MARKDOWN, DECISION, CHART, IMAGE)]


def test_without_what_draws_a_png_the_rest_is_written(
    measured: Store, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("report", "--store", measured.root, "--output", tmp_path).exit_code == 0
    assert (tmp_path / IMAGE).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    result = run("report", "--store", measured.root, "--output", tmp_path)
    assert result.exit_code == 0
    assert "no quality.png was written: a PNG of the chart needs an extra that is not installed" in result.stderr
    assert "quantize-models[report]" in result.stderr
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == [DECISION, CHART, HTML, MARKDOWN], "an old one is not left either"


def test_the_answer_is_on_the_pages(built: Built, tmp_path: Path, run: Run, browser: Browser) -> None:
    store = built.copy(tmp_path / "own")
    kinds = ("prose", "code", "chat")
    for variant, kl in (("q4_0", 0.03), ("q4_k_m", 0.04), ("q5_k_s", 0.02), ("q8_0", 0.001), ("f16", 0.2)):
        keep(store, store.find(f"tiny/{variant}"), found=evaluation(kl=kl, kinds=kinds))
    texts = render(collect(store, "tiny"))
    take = "Take q4_0, because it is the smallest of the 4 artifacts that keep every limit. The next better one is"
    front = "On the Pareto front, where nothing that is no larger is better beyond the noise: q4_0, q5_k_s, q8_0."
    for name in (HTML, MARKDOWN):
        assert take in texts[name]
        assert front in texts[name]
    assert f"**{0.03 * 1.2:.4f} ± " in texts[MARKDOWN]  # the last kind is the worst
    path = tmp_path / HTML
    path.write_text(texts[HTML], encoding="utf-8")
    browser.open(path.as_uri())
    rows = browser.run("return [...document.querySelector('.kinds').rows].map(r => [...r.cells].map(c => c.innerText))")
    assert rows[0] == ["variant", "size", "mean KL", "prose", "code", "chat", "front", "gates"]
    table = {row[0]: row for row in rows[1:]}
    assert table["q4_k_m"][2:] == [
        "0.0400 ± 0.0040", "0.0400 ± 0.0040", "0.0440 ± 0.0044", "0.0480 ± 0.0048", "beaten by q4_0",
        "accepted with flags",
    ]  # fmt: skip
    assert table["q8_0"][6:] == ["on it", "accepted"]
    assert table["iq4_xs"][2] == "not measured"
    marked = browser.run("return [...document.querySelectorAll('.kinds td.marked')].map(cell => cell.cellIndex)")
    assert marked == [5] * 5
    data = json.loads(run("report", "tiny", "--store", store.root, "--output", tmp_path / "out", "--json").stdout)
    assert {row["artifact"].split("@")[0]: row["beaten_by"] for row in data["artifacts"]}["tiny/q4_k_m"] == "q4_0"


def test_quality_without_a_load_ends_with_an_answer(built: Built, tmp_path: Path, run: Run) -> None:
    """As after `make demo`: nothing was served, and no limit asks for it."""
    store = built.copy(tmp_path / "own")
    for variant in NAMES:
        keep(store, store.find(f"tiny/{variant}"), found=evaluation(kl=0.06 if variant == "q4_0" else 0.004))
    result = run("report", "--store", store.root, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "serve: tiny/q8_0@" in result.stdout
    assert "Latency, error rate and memory were not measured (`quantize bench tiny/q8_0`)" in result.stdout
    for name in (HTML, MARKDOWN, DECISION):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "Serve q8_0." in text
        assert "quantize bench tiny/q8_0" in text
    assert "keeps every limit; not measured: latency, error rate, memory" in (tmp_path / "out" / HTML).read_text()


def test_nothing_to_serve_is_no_failure_of_the_command(built: Built, tmp_path: Path, run: Run) -> None:
    result = run("report", "--store", built.store.root, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["serve"] is None
    assert "no evidence of: KL divergence" in data["why"]


def test_the_command_for_programs_and_one_artifact(
    measured: Store, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("report", "tiny/q8_0", "--store", measured.root, "--json")
    data = json.loads(result.stdout)
    assert data["serve"].startswith("tiny/q8_0@")
    assert [item["verdict"] for item in data["artifacts"]] == ["accepted"]
    assert (data["why"], data["artifacts"][0]["not_measured"]) == (
        "It is the only artifact that keeps every limit.",
        [],
    )
    assert data["artifacts"][0]["figures"]["mean_kl"] == 0.004
    assert (data["artifacts"][0]["on_front"], data["artifacts"][0]["beaten_by"]) == (True, None)
    assert data["files"] == [f"reports/tiny/q8_0/{name}" for name in (HTML, MARKDOWN, DECISION, CHART, IMAGE)]
    assert all(Path(name).is_file() for name in data["files"])


def test_wrong_use_is_said(measured: Store, tmp_path: Path, run: Run) -> None:
    none = run("report", "--store", tmp_path / "none")
    assert (none.exit_code, none.stdout) == (2, "")
    assert "no artifacts in" in none.stderr
    unknown = run("report", "other", "--store", measured.root)
    assert unknown.exit_code == 2
    assert "no artifact 'other'" in unknown.stderr
    (tmp_path / "file").write_text("")
    taken = run("report", "tiny", "--store", measured.root, "--output", tmp_path / "file" / "inner")
    assert taken.exit_code == 2
    assert f"the report can't be written to {tmp_path / 'file' / 'inner'}: Not a directory" in taken.stderr
    assert "choose a folder with --output" in taken.stderr


def test_several_recipes_need_a_name(built: Built, tmp_path: Path, run: Run) -> None:
    store = built.copy(tmp_path / "own")
    artifact = store.find("tiny/q8_0")
    other = artifact.manifest.model_copy(update={"name": "other"}).sealed()
    folder = store.root / "other" / "q8_0" / other.short_digest
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(other.to_json(), encoding="utf-8")
    (folder.parent / "current").symlink_to(folder.name)
    result = run("report", "--store", store.root)
    assert result.exit_code == 2
    assert "name one: other, tiny" in result.stderr


@given(st.text(max_size=80), st.text(max_size=80))
def test_pieces_are_the_text(one: str, other: str) -> None:
    found = pieces(one, other)
    assert "".join(piece.text for piece in found) == one
    if one == other:
        assert not any(piece.changed for piece in found)


@given(
    st.lists(st.tuples(st.text(max_size=6), st.floats(0, 1e6)), max_size=9)
)
def test_any_figures_can_be_drawn(values: list[tuple[str, float]]) -> None:
    names = ["".join(letter for letter in name if letter.isprintable()) for name, _ in values]
    spans = [Range(name, n, y, y * 2, y * 3) for n, (name, (_, y)) in enumerate(zip(names, values, strict=True))]
    drawn = [
        ranges([("a", spans), ("b", [])], title="t", y_title="y"),
        heatmap(names, ["0", "1"], [[y, None] for _, y in values], "t"),
    ]
    for text in filter(None, drawn):
        assert "nan" not in text
        ElementTree.fromstring(text)


def test_limits_of_the_recipe_are_drawn(built: Built, tmp_path: Path) -> None:
    store = built.copy(tmp_path / "own")
    keep(store, store.find("tiny/q8_0"), found=evaluation(kl=0.2), limits=GateThresholds(max_kl=0.3))
    assert "limit: 0.3 nats<" in render(collect(store, "tiny/q8_0"))[HTML]


def test_figures_of_different_prompts_are_not_compared_silently(built: Built, tmp_path: Path) -> None:
    store = built.copy(tmp_path / "own")
    for variant in ("q8_0", "f16"):
        keep(store, store.find(f"tiny/{variant}"), found=evaluation())
    assert "Not all were measured" not in render(collect(store, "tiny"))[HTML]
    path = store.find("tiny/f16").folder / "measurements.json"
    path.write_text(path.read_text(encoding="utf-8").replace("ef" * 32, "00" * 32), encoding="utf-8")
    assert "Not all were measured on the same golden prompts" in render(collect(store, "tiny"))[HTML]
