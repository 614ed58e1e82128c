"""The command line: quick help, exit codes, results on stdout and the rest on stderr, no traceback unless asked."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import click
import click.testing
import pytest

from quantize import __version__
from quantize.build.outcome import Outcome, OutcomeState
from quantize.cli import COMMANDS, main
from quantize.cli.build import summary
from quantize.errors import GateError, PlanError, QuantizeError, RefusedError, StoreError, UsageError, WorkerDied
from quantize.formats import option_models
from quantize.recipe.model import load_recipe
from quantize.system.sizes import memory_text
from quantize.testing import write_recipe
from tests.conftest import Built, Run

ROOT = Path(__file__).parent.parent
HEAVY = [
    "torch",
    "transformers",
    "pydantic",
    "fastapi",
    "numpy",
    "gguf",
    "llama_cpp",
    "rich",
    "yaml",
    "huggingface_hub",
]


def fresh(*args: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python, or the command line, in a process of its own."""
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "quantize", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["import quantize", "import quantize.cli", "HELP"])
def test_start_imports_nothing_heavy(start: str) -> None:
    if start == "HELP":
        start = "from quantize.cli import main\ntry:\n  main(['--help'])\nexcept SystemExit:\n  pass"
    code = f"import sys\n{start}\nprint('MODULES', *sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = fresh(code=code)
    assert result.returncode == 0, result.stderr
    modules = result.stdout.rpartition("MODULES ")[2].split()
    assert "quantize" in modules
    assert sorted(set(modules) & set(HEAVY)) == []


def test_no_command_needs_torch_to_say_up_to_date(tmp_path: Path) -> None:
    """Planning modules, the store and the GGUF builder: all that a second build goes through."""
    code = (
        "import sys, quantize.build.execute, quantize.store.store, quantize.formats as b\n"
        "print(*(builder.name for builder in b.builders().values()), file=sys.stderr)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'gguf', 'llama_cpp'}\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & heavy))"
    )
    result = fresh(code=code)
    assert (result.stdout, result.returncode) == ("\n", 0), result.stderr


def test_a_list_of_artifacts_needs_no_builder_and_no_other_format(built: Built) -> None:
    listing = ["list", "artifacts", "--store", str(built.store.root)]
    code = (
        f"import sys\nfrom quantize.cli import main\nmain({listing}, standalone_mode=False)\n"
        "print('MODULES', *sorted(name for name in sys.modules if name.startswith('quantize.formats.')))"
    )
    result = fresh(code=code)
    assert result.returncode == 0, result.stderr
    modules = result.stdout.rpartition("MODULES ")[2].split()
    assert "quantize.formats.gguf.layout" in modules
    assert not {"quantize.formats.gguf.build", "quantize.formats.base", "quantize.formats.packed.format"} & {*modules}


def commands() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    context = click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        found.append((name,))
        if isinstance(command, click.Group):
            found += [(name, inner) for inner in command.list_commands(context)]
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_has_help_and_it_is_in_the_docs(command: tuple[str, ...], run: Run) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert f"Usage: quantize {' '.join(command)}" in result.stdout
    assert len(result.stdout.splitlines()) > 4
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert re.search(rf"^#+ quantize {' '.join(command)}$", text, re.MULTILINE)


def test_the_help_in_the_docs_is_the_current_one() -> None:
    render = runpy.run_path(str(ROOT / "docs" / "make_commands.py"))["render"]
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert text == render(), "run: python docs/make_commands.py"


def test_help_lists_every_command(run: Run) -> None:
    text = run("--help").stdout
    for name, (_, line) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line.split()[0])}", text, re.MULTILINE), name
    assert run("-h").stdout == text


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"quantize, version {__version__}\n"


def test_python_m_is_the_same_command() -> None:
    result = fresh("--version")
    assert (result.returncode, result.stdout) == (0, f"quantize, version {__version__}\n")


# --- wrong usage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["biuld"], "No such command 'biuld'. Did you mean `build`?"),
        (["zzzzz"], "No such command 'zzzzz'."),
        (["build"], "Missing argument 'RECIPE...'"),
        (["build", "x.yaml", "--frce"], "No such option '--frce'"),
        (["build", "x.yaml", "--threads", "0"], "0 is not in the range x>=1"),
        (["schema", "artifact"], "'artifact' is not one of 'recipe', 'manifest'"),
        (["build", "no-such-recipe.yaml"], "error: no-such-recipe.yaml: no such file"),
        (["show", "nothing"], "error: no artifact 'nothing'"),
        (["build", "recipes/smollm2-135m.yaml", "--memory-budget", "lots"], "error: 'lots' is no size"),
        (["build", "recipes/smollm2-135m.yaml", "--only", "q9"], "error: the recipe has no variant 'q9'"),
        (["list", "recipes", "no-such-folder"], "no-such-folder"),
    ],
)
def test_wrong_usage_exits_2(args: list[str], message: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = run(*args)
    assert message in result.output
    assert result.exit_code == 2
    assert "Traceback" not in result.output


# --- errors -----------------------------------------------------------------------------------------------------------


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Have `quantize show` raise an error."""

    def find(*_: object) -> None:
        raise error

    monkeypatch.setattr("quantize.store.store.Store.matches", find)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (QuantizeError("it failed"), 1, "error: it failed\n"),
        (StoreError("no lock", hint="wait"), 1, "error: no lock\n  wait\n"),
        (UsageError("wrong"), 2, "error: wrong\n"),
        (RefusedError("no"), 3, "error: no\n"),
        (ZeroDivisionError("a bug"), 1, "internal error: ZeroDivisionError: a bug\n  run again with -v"),
        (
            KeyboardInterrupt(),
            130,
            "interrupted; nothing half-written counts as built; the same build goes on where this one was\n",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, message: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(monkeypatch, error)
    result = run("show", "x")
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("args", [["-v", "show", "x"], ["show", "x", "-v"], ["show", "-v", "x"]])
def test_v_shows_the_traceback_wherever_it_stands(args: list[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, RefusedError("no"))
    result = run(*args)
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("error: no\n")
    assert result.exit_code == 3


def test_a_reader_that_goes_away_is_no_error() -> None:
    result = subprocess.run(
        f"{sys.executable} -m quantize schema | head -c 10", shell=True, capture_output=True, text=True, cwd=ROOT,
        check=False,
    )  # fmt: skip
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr


def test_an_interrupt_ends_a_real_process_with_130(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from quantize.cli import main\n"
        "from quantize.store.store import Store\n"
        "Store.matches = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "main(['show', 'x'], prog_name='quantize')\n"
    )
    result = fresh(code=code)
    assert (result.returncode, result.stdout) == (130, "")
    assert (
        result.stderr
        == "interrupted; nothing half-written counts as built; the same build goes on where this one was\n"
    )


# --- a build ----------------------------------------------------------------------------------------------------------

FAKE = [{"format": "fake"}, {"format": "fake", "bits": 4}]


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "demo.yaml", tiny, FAKE)


@pytest.mark.usefixtures("fake")
def test_build_and_build_again(recipe: Path, run: Run) -> None:
    first = run("build", recipe)
    assert first.exit_code == 0
    assert [line.split()[:2] for line in first.stdout.splitlines() if line.startswith("int")] == [
        ["int8", "built"], ["int4", "built"],
    ]  # fmt: skip
    assert "int8: hashing and writing the manifest\n" in first.stderr
    again = run("build", recipe, "--json")
    assert [item["state"] for item in json.loads(again.stdout)] == ["up to date", "up to date"]
    assert again.stderr == ""


@pytest.mark.usefixtures("fake")
def test_quiet_says_only_what_is_wrong(recipe: Path, run: Run) -> None:
    assert run("build", recipe, "--quiet").stderr == ""


@pytest.mark.parametrize(("step", "code"), [("check", 3), ("build", 1), ("verify", 3)])
@pytest.mark.usefixtures("fake")
def test_a_failed_variant_is_told_by_the_exit_code(step: str, code: int, tiny: Path, tmp_path: Path, run: Run) -> None:
    path = write_recipe(tmp_path / "demo.yaml", tiny, [{"format": "fake", "fail": step}, *FAKE])
    result = run("build", path, "--quiet", "--json")
    assert result.exit_code == code
    states = [(item["variant"], item["state"], bool(item["error"])) for item in json.loads(result.stdout)]
    state = "refused" if step == "verify" else "failed"
    assert states == [(f"int8-{step}", state, True), ("int8", "built", False), ("int4", "built", False)]
    assert f"1 of 3 variants {state}: " in result.stderr
    assert result.stderr.rstrip().endswith("\nbuilt: int8, int4")


def died(step: str, reason: str = "the process was ended by SIGILL: so it is", had: str = "") -> WorkerDied:
    return WorkerDied(f"{step}: {reason}{had}", reason=reason, hint="reinstall it with: pip install it")


@pytest.mark.usefixtures("fake")
def test_the_summary_names_each_reason_once_with_what_it_hit_and_what_was_built(recipe: Path) -> None:
    parsed = load_recipe(recipe, option_models())
    found = [
        *((name, "failed", died("loading in llama.cpp")) for name in ("q4_k_m", "q5_k_m", "q8_0")),
        ("gptq", "refused", GateError("gptq: perplexity is 1.4 times the source's", hint="accept the risk")),
        ("awq", "failed", PlanError("no such group size")),
        ("int8", "built", None),
        ("f16", "up to date", None),
        ("nf4", "built", None),
    ]
    outcomes = [(parsed, Outcome(name, OutcomeState(state), error=error)) for name, state, error in found]
    assert summary(outcomes, several=False).splitlines() == [
        "3 of 8 variants failed: loading in llama.cpp: the process was ended by SIGILL: so it is "
        "(q4_k_m, q5_k_m, q8_0)",
        "  reinstall it with: pip install it",
        "1 of 8 variants refused: gptq: perplexity is 1.4 times the source's (gptq)",
        "  accept the risk",
        "1 of 8 variants failed: no such group size (awq)",
        "built: int8, nf4",
        "up to date: f16",
    ]
    assert "demo/q4_k_m, demo/q5_k_m" in summary(outcomes, several=True)


@pytest.mark.usefixtures("fake")
def test_one_reason_in_several_steps_is_one_reason(recipe: Path) -> None:
    """Whatever memory each had; only a step that all share is named."""
    parsed = load_recipe(recipe, option_models())
    errors = [died("quantizing to Q4_0", had="; it had 1 MiB"), died("quantizing to Q8_0", had="; it had 2 MiB")]
    outcomes = [
        (parsed, Outcome(f"v{number}", OutcomeState.FAILED, error=error)) for number, error in enumerate(errors)
    ]
    first, _ = summary(outcomes, several=False).splitlines()
    assert first == "2 of 2 variants failed: the process was ended by SIGILL: so it is (v0, v1)"
    alone = summary(outcomes[:1], several=False).splitlines()[0]
    assert alone == "the variant failed: quantizing to Q4_0: the process was ended by SIGILL: so it is (v0)"


@pytest.mark.usefixtures("fake")
def test_v_shows_where_a_variant_failed(tiny: Path, tmp_path: Path, run: Run) -> None:
    path = write_recipe(tmp_path / "demo.yaml", tiny, [{"format": "fake", "fail": "build"}])
    assert "Traceback" not in run("build", path, "--no-eval").stderr
    assert "in build\n" in run("build", path, "--no-eval", "-v").stderr


@pytest.mark.usefixtures("fake")
def test_store_option_and_variable(recipe: Path, run: Run, tmp_path: Path) -> None:
    assert run("build", recipe, "--only", "int8", "--store", tmp_path / "other").exit_code == 0
    assert (tmp_path / "other" / "demo" / "int8" / "current").exists()
    assert not (tmp_path / "artifacts").exists()
    run("build", recipe, "--only", "int8")
    assert (tmp_path / "artifacts" / "demo" / "int8" / "current").exists()


def test_without_a_variable_the_store_is_artifacts_here(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QUANTIZE_STORE")
    monkeypatch.chdir(tmp_path)
    assert run("list", "artifacts").stdout == "no artifacts in artifacts/; see `quantize build`\n"


@pytest.mark.usefixtures("fake")
def test_list_recipes_and_formats(recipe: Path, run: Run) -> None:
    (recipe.parent / "bad.yaml").write_text("name: x\n")
    rows = {Path(row["path"]).name: row for row in json.loads(run("list", "recipes", recipe.parent, "--json").stdout)}
    assert rows["demo.yaml"]["variants"] == ["int8", "int4"]
    assert rows["bad.yaml"]["error"].endswith("bad.yaml:1:1: key `source` is missing")
    assert [row["format"] for row in json.loads(run("list", "formats", "--json").stdout)] == ["fake"]
    assert "demo.yaml" in run("list", "recipes", recipe.parent).stdout
    assert "bits, fail" in run("list", "formats").stdout


def test_output_of_a_real_process_is_clean(recipe: Path, tmp_path: Path) -> None:
    """Machine-readable where asked for: what libraries print must not get in between."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = (
        "from quantize.testing import FakeBuilder, installed_formats, plain_format\n"
        "from quantize.cli import main\n"
        "with installed_formats(plain_format(FakeBuilder())):\n"
        f"  main(['build', {str(recipe)!r}, '--json'], prog_name='quantize')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert [item["state"] for item in json.loads(result.stdout)] == ["built", "built"]


@pytest.mark.usefixtures("fake")
def test_a_table_cuts_nothing_and_reads_no_markup(tiny: Path, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "[bold]" / ("long-" * 40)
    folder.mkdir(parents=True)
    write_recipe(folder / "demo.yaml", tiny, FAKE)
    assert f"{folder}/demo.yaml" in run("list", "recipes", folder).stdout


# --- small things -----------------------------------------------------------------------------------------------------


def test_memory_is_written_in_binary_units() -> None:
    assert memory_text(3 << 29) == "1.50 GiB"
