"""A new flag of serve is a field of Serving: the command has it by that alone, and it comes to the model's process."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from quantize.cli.serving_options import serving_options, take_serving
from quantize.runtimes.devices import Accelerator
from quantize.runtimes.served import Serving, flag
from quantize.serve.preflight import engine_target, place
from quantize.serve.targets import LocalTarget, resolve
from quantize.system.machine import Machine
from tests.conftest import Built

GIB = 2**30


@dataclass(frozen=True)
class NewServing(Serving):
    """As the field would stand in Serving itself."""

    prompt_piece: int = flag(512, "Tokens of a prompt in one step.", least=1)
    order: str = flag("turns", "Who is next.", choices=("turns", "shortest"))
    eager: bool = flag(False, "Without waiting.")
    pool: int | None = flag(None, "Of all.", least=0, name="shared_pool")


def told(*words: str) -> tuple[NewServing, dict[str, object]]:
    """What a command with these flags makes of words, and what is left for others."""
    seen: list[tuple[NewServing, dict[str, object]]] = []

    @click.command()
    @click.option("--port", type=int, default=1)
    @serving_options(NewServing)
    def command(**flags: object) -> None:
        seen.append((take_serving(NewServing, flags), flags))

    done = CliRunner().invoke(command, [*words], catch_exceptions=False)
    if done.exit_code:
        raise click.UsageError(done.output)
    return seen[0]


def test_it_is_an_option_with_its_default() -> None:
    assert told() == (NewServing(device="auto"), {"port": 1})
    given, rest = told("--prompt-piece", "7", "--order", "shortest", "--eager", "--shared-pool", "0", "--threads", "3")
    assert given == NewServing(device="auto", threads=3, prompt_piece=7, order="shortest", eager=True, pool=0)
    assert rest == {"port": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt-piece", "0"], "0 is not in the range x>=1"),
        (["--order", "longest"], "'longest' is not one of 'turns', 'shortest'"),
        (["--concurrency", "0"], "0 is not in the range x>=1"),
    ],
)
def test_what_it_can_not_be_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(click.UsageError, match=message):
        told(*words)


@pytest.mark.parametrize("name", ["tiny/q8_0", "folder"])
def test_it_comes_to_the_process_of_either_runtime(built: Built, tiny: Path, name: str) -> None:
    target = resolve(str(tiny) if name == "folder" else name, built.store)
    assert isinstance(target, LocalTarget)
    wanted, _ = told("--prompt-piece", "7", "--eager")
    card = Accelerator("cuda:0", "a card", 8 * GIB, 7 * GIB)
    placement = place(target, wanted, Machine((), 16 * GIB, 15 * GIB, 4), [card], built.store)
    sent = pickle.loads(pickle.dumps(engine_target(target, wanted, placement)))
    assert (sent.serving.prompt_piece, sent.serving.eager, sent.serving.device) == (7, True, "cuda:0")
