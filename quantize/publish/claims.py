"""Whose turn it is to move a tag in a registry: it can put a tag and list all, but not compare one and set it at once.

A publisher first puts a tag of its own, its claim, that says from what to what it means to move the tag; then it looks
who else has. Of two that publish at the same time at least one sees the other, and waits for what becomes of the tag.
In: what to ask. Out: go on, there is nothing left to do, or RefusedError. It holds as long as a request takes less than
SETTLE_SECONDS; a claim of somebody who was killed costs that time twice, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from quantize.errors import RefusedError
from quantize.publish.base import moved_meanwhile

SETTLE_SECONDS = 5.0
LOOKS = 20  # at the tag, while it settles


@dataclass(frozen=True)
class Turn:
    """A tag that is to be moved. claim: our own; seen: those of others that were there before we began.

    digest: what the tag is to mean; move_from: what it meant.
    """

    name: str
    claim: str
    seen: Collection[str]
    digest: str
    move_from: str | None


def may_move(
    turn: Turn, claims: Callable[[], set[str]], meant: Callable[[], str | None], pause: Callable[[float], object]
) -> bool:
    """Whether to put the tag now; False where it means the publication already. Call it with the claim in place.

    claims: those that are there to move the tag from what it meant. meant: what it means. Raises RefusedError:
    somebody else has moved it, or goes first.
    """
    others = claims() - {turn.claim}
    now = meant()
    patience = SETTLE_SECONDS * (2 if others & set(turn.seen) else 1) if others else 0.0
    for _ in range(LOOKS if others else 0):
        if now != turn.move_from:
            break
        pause(patience / LOOKS)
        now = meant()
    if now == turn.digest:
        return False
    if now != turn.move_from:
        raise moved_meanwhile(turn.name, turn.move_from, now)
    if min(others - set(turn.seen), default=turn.claim) < turn.claim:
        raise RefusedError(
            f"{turn.name}: somebody else publishes there at the same time, and goes first",
            hint="see what it means then, and run the same command again",
        )
    return True
