"""quantize serve ARTIFACT…"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantize.cli.common import store_option, trust_options, verbose_option
from quantize.cli.serving_options import serving_options, take_serving
from quantize.errors import MissingExtraError, SignatureError, UsageError
from quantize.events import SilentReporter
from quantize.runtimes.served import Serving
from quantize.store.store import PINS_NAME, Store
from quantize.system.sizes import parse_size

if TYPE_CHECKING:
    from quantize.provenance.signature import Trust
    from quantize.runtimes.devices import Accelerator
    from quantize.serve.router import Rules
    from quantize.serve.targets import LocalTarget, UpstreamTarget

RUNTIMES = ("vllm", "sglang", "docker", "ollama", "llama-server", "mlx", "compose")


@dataclass(frozen=True, kw_only=True)
class ServeFlags:
    """What the command was told, as it is used: each flag by its name, those that runtimes take in `serving`."""

    host: str
    port: int
    grace: int
    log_level: str
    log_format: str
    settings: tuple[str, ...]
    default: str | None
    fallback: str | None
    canary: str | None
    root_path: str
    cors: tuple[str, ...]
    serving: Serving
    force: bool
    queue: int
    timeout: float
    max_input_tokens: int | None
    max_output_tokens: int | None
    max_body: str
    rate: int
    keys: Path | None
    no_auth: bool
    require_signature: bool
    public_key: Path | None
    identity: str | None
    issuer: str | None


@click.command("serve")
@click.argument("artifacts", nargs=-1, metavar="[NAME=]ARTIFACT...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--default", "default", metavar="NAME", help="Model of requests that name none.  [default: the first]")
@click.option("--fallback", metavar="NAME", help="Model that answers when another times out, is out of memory or dies.")
@click.option("--canary", metavar="NAME=PERCENT%", help="Send this share of the default model's requests to NAME.")
@serving_options(Serving)
@click.option("--queue", type=click.IntRange(min=0), default=16, show_default=True, help="Requests that may wait.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=120.0, show_default=True, help="Seconds a request.")
@click.option("--grace", type=click.IntRange(min=0), default=30, show_default=True, help="Seconds to drain on SIGTERM.")
@click.option("--max-input-tokens", type=click.IntRange(min=1), help="Longest input.  [default: the context]")
@click.option("--max-output-tokens", type=click.IntRange(min=1), help="Longest answer.  [default: the context]")
@click.option("--max-body", default="4MiB", show_default=True, metavar="SIZE", help="Largest body of a request.")
@click.option("--rate", type=click.IntRange(min=0), default=0, help="Requests a minute for each key; 0: no limit.")
@click.option("--keys", type=click.Path(path_type=Path, dir_okay=False), help="File of hashed API keys, one a line.")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Let pages of ORIGIN ask: https://host, or *.")
@click.option("--root-path", default="", metavar="PREFIX", help="Path prefix that a proxy in front has for it.")
@click.option("--no-auth", is_flag=True, help="Listen beyond this machine without API keys.")
@click.option("--new-key", metavar="NAME", help="Print a new API key and its line for --keys, and end.")
@click.option("--force", is_flag=True, help="Load even what does not fit the free memory.")
@click.option("--require-signature", is_flag=True, help="Serve only what the given key or identity has signed.")
@trust_options
@click.option("--print", "hand_over", type=click.Choice(RUNTIMES), help="Print how to run it elsewhere, and end.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Of the container that --print prints.")
@click.option("--locked", is_flag=True, help="Serve what the lock file pins: all of it, or those named.")
@click.option("--lock", type=click.Path(path_type=Path), default=PINS_NAME, show_default=True, help="File of pins.")
@click.option("--log-level", type=click.Choice(("debug", "info", "warning", "error")), default="info", help="[info]")
@click.option("--log-format", type=click.Choice(("json", "text")), default="json", help="Lines of the log.  [json]")
@store_option
@verbose_option
def command(
    artifacts: tuple[str, ...], store: Store, new_key: str | None, hand_over: str | None, locked: bool, lock: Path,
    **flags: Any,
) -> None:  # fmt: skip
    """Serve each ARTIFACT over HTTP, as OpenAI's API does.

    An ARTIFACT is one of the store, a .gguf file, a folder with safetensors, or the address of an OpenAI-compatible
    server: http://HOST:PORT/v1#MODEL, its key in QUANTIZE_UPSTREAM_KEY. API keys: --keys, or QUANTIZE_API_KEYS.
    """
    told = ServeFlags(serving=take_serving(Serving, flags), **flags)
    if new_key is not None:
        _print_new_key(new_key)
        return
    if locked:
        from quantize.publish.pins import locked_words

        artifacts = locked_words(artifacts, lock, store, SilentReporter())
    if not artifacts:
        raise UsageError("no artifact to serve", hint="name one; `quantize list artifacts` shows them")
    if hand_over is not None:
        _print_hand_over(hand_over, artifacts, store, told)
        return
    _serve(artifacts, store, told)


def _print_new_key(name: str) -> None:
    from quantize.serve.limits import key_line, new_key

    key = new_key()
    line = key_line(name, key)
    click.echo(f"key (shown once): {key}")
    click.echo(f"line for --keys:  {line}")


def _print_hand_over(runtime: str, artifacts: tuple[str, ...], store: Store, flags: ServeFlags) -> None:
    from quantize.serve.handover import ContainerSettings, HandOver, render
    from quantize.serve.targets import LocalTarget, resolve

    targets = []
    for text in artifacts:
        target = resolve(text, store)
        if not isinstance(target, LocalTarget):
            raise UsageError(f"{text}: already runs elsewhere")
        targets.append(target)
    serving = flags.serving
    container = ContainerSettings.of(flags.settings)
    wanted = HandOver(flags.host, flags.port, serving.device, serving.context or None, serving.slots,
                      serving.kv_bits, container)  # fmt: skip
    click.echo(render(runtime, targets, wanted))


def _serve(artifacts: tuple[str, ...], store: Store, flags: ServeFlags) -> None:
    from quantize.runtimes.devices import ON_CPU
    from quantize.runtimes.looking import find_gpus
    from quantize.serve.limits import load_keys
    from quantize.serve.preflight import engine_target, place
    from quantize.serve.targets import UpstreamTarget, resolve
    from quantize.system.machine import detect

    try:
        from quantize.serve.address import Address, is_loopback
        from quantize.serve.engines.base import EngineTarget
        from quantize.serve.front import Front
        from quantize.serve.server import run
        from quantize.serve.service import RequestLimits
    except ImportError as exc:
        raise MissingExtraError("serving", "serve") from exc

    keys = load_keys(flags.keys, os.environ)
    front = Front.of(flags.root_path, flags.cors)
    if not keys and not flags.no_auth and not is_loopback(flags.host):
        hint = "make one with --new-key and give it with --keys, or say --no-auth"
        raise UsageError(f"--host {flags.host} would let anyone in: there are no API keys", hint=hint)
    wanted = flags.serving
    trust = _trust(flags)
    machine = detect()
    targets: list[EngineTarget | UpstreamTarget] = []
    seen: dict[str, tuple[Accelerator, ...]] = {}  # by a runtime; nothing is loaded before all have a place
    for text in artifacts:
        found = resolve(text, store)
        if trust is not None:
            _check_signature(found, trust)
        if isinstance(found, UpstreamTarget):
            targets.append(found)
            continue
        if found.kind.name not in seen:
            seen[found.kind.name] = find_gpus(found.kind, wanted.device)
        placement = place(found, wanted, machine, seen[found.kind.name], store, force=flags.force)
        click.echo(f"{found.name}: {placement.verdict.word}: {placement.verdict.reason}", err=True)
        if placement.where != ON_CPU and found.kind.first_load:
            click.echo(f"{found.name}: {found.kind.first_load}", err=True)
        if placement.note:
            click.echo(f"{found.name}: {placement.note}", err=True)
        targets.append(engine_target(found, wanted, placement))
    names = [target.name for target in targets]
    if len(set(names)) < len(names):
        raise UsageError("two models have the same name", hint="give them names: NAME=ARTIFACT")
    limits = RequestLimits(
        parse_size(flags.max_body), flags.max_input_tokens, flags.max_output_tokens,
        flags.timeout, requests_per_minute=flags.rate, concurrency=wanted.slots,
        queue=flags.queue,
    )  # fmt: skip
    address = Address(flags.host, flags.port, flags.grace)
    run(targets, _rules(names, flags), limits, keys, address, front, flags.log_level, flags.log_format)


def _trust(flags: ServeFlags) -> Trust | None:
    """Whose signature counts; None if none is required. Raises UsageError: required, and of nobody."""
    from quantize.provenance.signature import Trust

    trust = Trust.of(flags.public_key, flags.identity, flags.issuer)
    if (trust is not None) != flags.require_signature:
        hint = "give --require-signature with --public-key FILE, or with --identity and --issuer"
        raise UsageError("--require-signature and whose signature it is go together", hint=hint)
    return trust


def _check_signature(target: LocalTarget | UpstreamTarget, trust: Trust) -> None:
    """Raises SignatureError: not signed by whom it must be, or nothing that can be signed."""
    from quantize.serve.targets import LocalTarget

    if not isinstance(target, LocalTarget):
        hint = "leave it out, or serve it from another gateway"
        raise SignatureError(f"{target.name}: runs on another server, whose files can't be checked here", hint=hint)
    if target.path.is_file() and target.artifact is None:
        hint = "name the artifact that it is in: a signature is of its whole folder"
        raise SignatureError(f"{target.name}: a single file is not signed", hint=hint)
    trust.check(target.folder)
    click.echo(f"{target.name}: signature good", err=True)


def _rules(names: list[str], flags: ServeFlags) -> Rules:
    from quantize.serve.router import Rules

    canary = None
    if flags.canary:
        name, _, percent = flags.canary.rpartition("=")
        number = percent.removesuffix("%")
        try:
            share = float(number) / 100
        except ValueError:
            share = -1.0
        if not name or not 0 <= share <= 1:
            raise UsageError(f"--canary {flags.canary!r} is not NAME=PERCENT%", hint="such as --canary new=5%")
        canary = (name, share)
    return Rules(flags.default or names[0], flags.fallback, canary)
