"""The command line: parse, call one function, print. A command's module is imported only when it is called."""

from __future__ import annotations

import importlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from quantize import __version__
from quantize.errors import QuantizeError

INTERRUPTED, TERMINATED = 130, 143
GOES_ON = "nothing half-written counts as built; the same build goes on where this one was"

# Command -> (module, one line for --help). Help must not import the modules.
COMMANDS: dict[str, tuple[str, str]] = {
    "plan": ("plan", "Show what a recipe would build: sizes, disk, what is built already. Writes nothing."),
    "build": ("build", "Build every variant of a recipe that is not up to date."),
    "lock": ("lock", "Pin what a recipe's build is made of, for `build --locked`."),
    "estimate": ("estimate", "Memory of a model at contexts and concurrencies; whether it fits a card."),
    "fit": ("fit", "What to build so that it fits a card, a size or bits a weight. Builds nothing."),
    "eval": ("eval", "Measure artifacts against their source, and hold the gates."),
    "list": ("list", "List artifacts, recipes or formats."),
    "show": ("show", "Show one artifact: its manifest and what was measured."),
    "sign": ("sign", "Write an artifact's provenance and bill of materials, and sign it."),
    "verify": ("verify", "Check an artifact: hashes, tensors, and that it runs."),
    "rebuild": ("rebuild", "Build an artifact again from its manifest alone, and compare."),
    "bench": ("bench", "Load a server, or an artifact's own, and time its answers."),
    "report": ("report", "Write a page about a recipe's artifacts, and the production decision."),
    "serve": ("serve", "Serve artifacts over HTTP, as OpenAI's API does."),
    "publish": ("publish", "Publish artifacts to a folder, a registry, the hub or a bucket, and pin them."),
    "pull": ("pull", "Get published artifacts into the store; every hash is checked first."),
    "diff": ("diff", "Compare two artifacts: settings, files, tensor types, sizes."),
    "gc": ("gc", "Remove superseded artifacts and leftovers; shows them only, unless told to."),
    "calibration": ("calibration", "Show the text that calibrated formats see."),
    "doctor": ("doctor", "What this machine has, whether its engines run, which formats it can build and serve."),
    "schema": ("schema", "Print the JSON Schema of recipes or manifests."),
}


class LazyGroup(click.Group):
    """Finds commands in COMMANDS and turns every error into a message and an exit code, in one place."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order of use."""
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"quantize.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[Any, Any, list[str]]:
        """As click does, and suggest the nearest command for an unknown one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            extra = f" Did you mean `{near[0]}`?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{extra}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; map errors to exit codes."""
        try:
            with _terminable():
                return super().invoke(ctx)
        except QuantizeError as exc:
            _fail(ctx, f"error: {exc}", exc)
            ctx.exit(exc.exit_code)
        except KeyboardInterrupt:
            click.echo(f"interrupted; {GOES_ON}", err=True)
            ctx.exit(INTERRUPTED)
        except Terminated:
            click.echo(f"terminated; {GOES_ON}", err=True)
            ctx.exit(TERMINATED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as exc:  # noqa: BLE001 - the last place that can keep a traceback from a user
            _fail(
                ctx, f"internal error: {type(exc).__name__}: {exc}\n  run again with -v and report what it prints", exc
            )
            ctx.exit(1)


class Terminated(BaseException):
    """SIGTERM: what was begun is ended as after Ctrl-C, and at once."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Have SIGTERM unwind the stack; a command that must do otherwise (the gateway drains) sets its own handler."""

    def stop(_signal: int, _frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(ctx: click.Context, message: str, exc: BaseException) -> None:
    if ctx.meta.get("quantize.verbose"):
        click.echo("".join(traceback.format_exception(exc)), err=True)
    click.echo(message, err=True)


def set_verbose(ctx: click.Context, _parameter: click.Parameter, value: bool) -> bool:
    """Remember -v for the error handler, wherever on the line it stands."""
    if value:
        ctx.meta["quantize.verbose"] = True
    return value


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="quantize")
@click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=set_verbose, help="Show tracebacks.")
def main() -> None:
    """make for quantized models: one recipe in; pinned, verified, measured artifacts out."""


if __name__ == "__main__":
    sys.exit(main())
