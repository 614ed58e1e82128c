"""Numbers between two bounds as grammar rules, digit by digit.

In: bounds as exact fractions. Out: rules that write only numbers within them, without exponents where there is a bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

from quantize.runtimes.llama_cpp.schema.grammar import EMPTY, Grammar, Item, literal

MAX_DECIMALS = 60
FREE_DIGITS = 16  # of a number without a bound: more than a double tells apart
DIGIT, FIRST_DIGIT = "[0-9]", "[1-9]"


@dataclass(frozen=True)
class Bounds:
    """Between low and high; None: no bound. open: the bound itself is not meant."""

    low: Fraction | None = None
    high: Fraction | None = None
    low_open: bool = False
    high_open: bool = False

    def within(self, other: Bounds) -> Bounds:
        """What both allow."""
        low = max((self, other), key=lambda item: (item.low is not None, item.low or 0, item.low_open))
        high = min((self, other), key=lambda item: (item.high is None, item.high or 0, not item.high_open))
        return Bounds(low.low, high.high, low.low_open, high.high_open)

    def has(self, value: Fraction) -> bool:
        """Whether a number is between them."""
        above = self.low is None or (value > self.low if self.low_open else value >= self.low)
        below = self.high is None or (value < self.high if self.high_open else value <= self.high)
        return above and below

    def apart(self, other: Bounds) -> bool:
        """Whether no number is between both."""
        both = self.within(other)
        if both.low is None or both.high is None:
            return False
        return both.low > both.high or (both.low == both.high and (both.low_open or both.high_open))

    def integers(self) -> tuple[int | None, int | None]:
        """The least and the greatest integer."""
        low = None if self.low is None else floor(self.low) + 1 if self.low_open else ceil(self.low)
        high = None if self.high is None else ceil(self.high) - 1 if self.high_open else floor(self.high)
        return low, high


def integer(grammar: Grammar, bounds: Bounds) -> Item:
    """Integers between bounds."""
    low, high = bounds.integers()
    alternatives: list[tuple[Item, ...]] = []
    if high is None or high >= 0:
        alternatives.append((_naturals(grammar, max(low or 0, 0), high),))
    if low is None or low < 0:
        least = 1 if high is None or high >= 0 else -high
        alternatives.append((literal("-"), _naturals(grammar, least, None if low is None else -low)))
    return grammar.rule(*alternatives)


def number(grammar: Grammar, bounds: Bounds) -> Item:
    """Numbers between bounds, with a fraction or without."""
    if bounds.low is None and bounds.high is None:
        whole = grammar.rule((grammar.optional(literal("-")), _naturals(grammar, 0, None)))
        sign = grammar.rule((literal("+"),), (literal("-"),), EMPTY)
        exponent = grammar.rule(("[eE]", sign, grammar.repeat(DIGIT, 1, 2)), EMPTY)
        return grammar.rule((whole, grammar.optional(_any_fraction(grammar)), exponent))
    closed, decimals = _closed(bounds)
    if closed.low is not None and closed.high is not None and closed.low > closed.high:
        return grammar.rule()
    zero = Fraction(0)
    alternatives: list[tuple[Item, ...]] = []
    if closed.high is None or closed.high >= 0:
        least = closed.low if closed.low is not None and closed.low > 0 else zero
        alternatives.append((_positive(grammar, least, closed.high, decimals),))
    if closed.low is None or closed.low < 0:
        least = -closed.high if closed.high is not None and closed.high < 0 else zero
        most = None if closed.low is None else -closed.low
        alternatives.append((literal("-"), _positive(grammar, least, most, decimals)))
    return grammar.rule(*alternatives)


def decimals_of(value: Fraction) -> int | None:
    """How many decimals write it exactly; None: more than MAX_DECIMALS."""
    for count in range(MAX_DECIMALS + 1):
        if (value * 10**count).denominator == 1:
            return count
    return None


def _closed(bounds: Bounds) -> tuple[Bounds, int]:
    """The same with its ends inside, and how many decimals its ends have."""
    decimals = max(decimals_of(end) or 0 for end in (bounds.low, bounds.high) if end is not None)
    if bounds.low_open or bounds.high_open:
        decimals += 1
    step = Fraction(1, 10**decimals)
    low = bounds.low + step if bounds.low is not None and bounds.low_open else bounds.low
    high = bounds.high - step if bounds.high is not None and bounds.high_open else bounds.high
    return Bounds(low, high), max(decimals, 1)


def _positive(grammar: Grammar, low: Fraction, high: Fraction | None, decimals: int) -> Item:
    """From low, at least 0, to high: integers, whole parts that may have any fraction, and the two ends."""
    scale = 10**decimals
    least, most = ceil(low), None if high is None else floor(high)
    alternatives: list[tuple[Item, ...]] = []
    if most is None or most >= least:
        alternatives.append((_naturals(grammar, least, most),))
    if most is None or most - 1 >= least:
        alternatives.append((_naturals(grammar, least, None if most is None else most - 1), _any_fraction(grammar)))

    def end(whole: int, first: int, last: int) -> None:
        width = (str(first).zfill(decimals), str(last).zfill(decimals))
        alternatives.append((literal(f"{whole}."), _between(grammar, *width)))

    low_part = int((low - floor(low)) * scale)
    high_part = scale - 1 if high is None or most is None or most > floor(low) else int((high - most) * scale)
    if low_part and low_part <= high_part:
        end(floor(low), low_part, high_part)
    if high is not None and most is not None and most >= least and high > most:
        end(most, 0, int((high - most) * scale))
    return grammar.rule(*alternatives)


def _naturals(grammar: Grammar, low: int, high: int | None) -> Item:
    """From low, at least 0, to high."""
    first = str(low)
    if high is None:
        longer = grammar.rule((FIRST_DIGIT, grammar.repeat(DIGIT, len(first), max(FREE_DIGITS, len(first) + 1) - 1)))
        return grammar.rule((_between(grammar, first, "9" * len(first)),), (longer,))
    if high < low:
        return grammar.rule()
    last = str(high)
    if len(first) == len(last):
        return _between(grammar, first, last)
    alternatives: list[tuple[Item, ...]] = [
        (_between(grammar, first, "9" * len(first)),),
        (_between(grammar, "1" + "0" * (len(last) - 1), last),),
    ]
    if len(last) - len(first) > 1:
        alternatives.append((FIRST_DIGIT, grammar.repeat(DIGIT, len(first), len(last) - 2)))
    return grammar.rule(*alternatives)


def _between(grammar: Grammar, low: str, high: str) -> Item:
    """Texts of digits as long as both, from low to high."""
    if low > high:
        return grammar.rule()
    if low == high:
        return literal(low)
    same = next(at for at in range(len(low)) if low[at] != high[at])
    if same:
        return grammar.rule((literal(low[:same]), _between(grammar, low[same:], high[same:])))
    rest = len(low) - 1
    if low.strip("0") == "" and high.strip("9") == "":
        return grammar.repeat(DIGIT, rest + 1, rest + 1)
    if not rest:
        return f"[{low}-{high}]"
    first, last, alternatives = int(low[0]), int(high[0]), []
    if low[1:].strip("0") == "":
        first -= 1  # all that follows it is meant
    else:
        alternatives.append((literal(low[0]), _between(grammar, low[1:], "9" * rest)))
    if high[1:].strip("9") == "":
        last += 1
    else:
        alternatives.append((literal(high[0]), _between(grammar, "0" * rest, high[1:])))
    if last - first > 1:
        alternatives.append((f"[{first + 1}-{last - 1}]", grammar.repeat(DIGIT, rest, rest)))
    return grammar.rule(*alternatives)


def _any_fraction(grammar: Grammar) -> Item:
    return grammar.rule((literal("."), grammar.repeat(DIGIT, 1, FREE_DIGITS)))
