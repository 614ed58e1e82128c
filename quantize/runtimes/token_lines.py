"""A few thousand lines of text of every kind, to hold one tokenizer against another.

In: the special tokens of a model, texts that its chat template makes. Out: lines, the same ones for each call on one
version of Python. The prose and the code are CPython's own; everything else is made here. All lines are in Unicode's
composed form (NFC), and words are small, capitalized or in capitals: llama.cpp normalizes nothing and tells the case of
letters beyond ASCII coarsely, so that text as nobody writes it would speak against tokenizers that are right.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from random import Random

SEED = 0
PROSE, CODE, DRAWN, SPECIALS = 700, 700, 200, 160
CODE_MODULES = ("textwrap", "argparse", "fractions", "statistics", "ast", "shlex", "difflib", "zipfile")

ONSETS = "b c ch d đ g gh gi h k kh l m n ng ngh nh ph qu r s t th tr v x"
RHYMES = (
    "a ai am an ang anh ao au ay ăm ăn ăng ân âm âng âu ây e em en eng eo ê êm ên ênh êu i ia im in inh iêm iên iêng "
    "o oa oan oang oi om on ong oe ô ôi ôm ôn ông ơ ơi ơm ơn u ua ui um un ung uôi uôn uông uy uyên ư ưa ưi ưng ươi "
    "ươm ươn ương ươu"
)
TONES = ("", "\u0300", "\u0301", "\u0303", "\u0309", "\u0323")
VOWELS = "aăâeêioôơuưy"

SCRIPTS = {
    "Latin with marks": (0x00C0, 0x017F), "Greek": (0x0391, 0x03C9), "Cyrillic": (0x0410, 0x044F),
    "Hebrew": (0x05D0, 0x05EA), "Arabic": (0x0627, 0x064A), "Devanagari": (0x0905, 0x0939), "Thai": (0x0E01, 0x0E2E),
    "Georgian": (0x10D0, 0x10F0), "Hiragana": (0x3041, 0x3096), "Katakana": (0x30A1, 0x30FA),
    "Han": (0x4E00, 0x9FA5), "Hangul": (0xAC00, 0xD7A3),
}  # fmt: skip
EMOJI = "😀 😂 🤔 👍 👍🏽 🎉 🚀 ❤️ ❤️‍🔥 👨‍👩‍👧‍👦 👩🏿‍💻 🏳️‍🌈 🇻🇳 🇩🇪 🇯🇵 1️⃣ #️⃣ ☕ ✅ ⚠️ ™ © ∑ ≠ → € £ ¥ ½ ² 𝔘 𝟙 ﷽ 🀄 🧑‍🚀"
PUNCTUATION = ". , ; : ! ? … - – — ' \" ’ “ ” ( ) [ ] { } < > / \\ | @ # $ % ^ & * _ + = ~ `"
SPACES = (
    " ",
    "  ",
    "   ",
    "    ",
    "        ",
    "\t",
    "\t\t",
    "\n",
    "\n\n",
    "\n\n\n",
    "\r\n",
    " \n",
    "\n ",
    "\t\n",
    "\u00a0",
    "\u3000",
)
SUFFIXES = ("'s", "'S", "'t", "'T", "'re", "'RE", "'ve", "'m", "'ll", "'LL", "'d", "'D", "’s", "’re", "'x", "''")
WORDS = ("the", "The", "THE", "don", "HTTPServer", "snake_case", "camelCase", "naïve", "straße", "ﬁx", "x", "I", "2nd")


def token_lines(specials: Sequence[str] = (), chats: Sequence[str] = ()) -> list[str]:
    """The lines. specials: added tokens, put alone and between words. chats: whole texts, as they are."""
    random = Random(SEED)
    lines = [*_prose(), *_code(), *_vietnamese(random), *_scripts(random), *_digits(random)]
    lines += [*_emoji(random), *_spaces(random), *_suffixes()]
    lines += [*_with_specials(specials[:: -(-len(specials) // SPECIALS) or 1], random), *chats]
    return list(dict.fromkeys(unicodedata.normalize("NFC", line) for line in lines))


def _prose() -> Iterator[str]:
    from pydoc_data.topics import topics

    lines = [line for _, text in sorted(topics.items()) for line in text.splitlines() if line.strip()]
    return islice(lines[:: max(1, len(lines) // PROSE)], PROSE)


def _code() -> Iterator[str]:
    lines: list[str] = []
    for name in CODE_MODULES:
        spec = find_spec(name)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            lines += Path(spec.origin).read_text(encoding="utf-8").splitlines()
    return islice(lines[:: max(1, len(lines) // CODE)], CODE)


def _vietnamese(random: Random) -> Iterator[str]:
    for _ in range(DRAWN):
        yield " ".join(_syllable(random) for _ in range(random.randint(3, 12))) + random.choice(".,;:!?")


def _syllable(random: Random) -> str:
    rhyme = random.choice(RHYMES.split())
    at = next(place for place, letter in enumerate(rhyme) if letter in VOWELS)
    text = random.choice(ONSETS.split()) + rhyme[: at + 1] + random.choice(TONES) + rhyme[at + 1 :]
    return text.capitalize() if random.random() < 0.2 else text


def _scripts(random: Random) -> Iterator[str]:
    for first, last in SCRIPTS.values():
        letters = [chr(code) for code in range(first, last + 1) if unicodedata.category(chr(code)) != "Cn"]
        for _ in range(DRAWN // 4):
            words = (_cased("".join(random.choices(letters, k=random.randint(1, 6))), random) for _ in range(6))
            joints = (" ", " ", "-") if letters[-1].upper() != letters[-1] else (" ", "", "，", "、", "-")
            yield random.choice(joints).join(words) + random.choice(("", "。", ".", "！"))


def _cased(word: str, random: Random) -> str:
    """A word as people write it: all small, with a capital, or all capitals. Other mixtures no text has."""
    return random.choice((str.lower, str.lower, str.capitalize, str.upper))(word)


def _digits(random: Random) -> Iterator[str]:
    for width in range(1, 21):
        number = "".join(random.choice("0123456789") for _ in range(width))
        yield from (number, f" {number}", f"x{number}y", f"-{number}.{number}", f"{number},{number}%", f"({number}) ")
    for _ in range(DRAWN // 2):
        a, b = random.randint(0, 10**6), random.random() * 1000
        yield from (f"{a:,} × {b:.3f} = {a * b:.2e}", f"{a % 24:02}:{a % 60:02} 0x{a:X} v{a % 9}.{a % 31}", f"٣{a}３")


def _emoji(random: Random) -> Iterator[str]:
    signs = EMOJI.split()
    yield from signs
    for _ in range(DRAWN // 2):
        yield " ".join(random.choice([*signs, *PUNCTUATION.split(), *WORDS]) for _ in range(random.randint(2, 8)))
        yield "".join(random.choice(signs) for _ in range(random.randint(2, 6)))


def _spaces(random: Random) -> Iterator[str]:
    yield from SPACES
    for _ in range(DRAWN):
        parts = [random.choice(SPACES) + random.choice((*WORDS, "", "42", "!")) for _ in range(random.randint(1, 6))]
        yield "".join(parts) + random.choice(("", *SPACES))


def _suffixes() -> Iterator[str]:
    for word in WORDS:
        yield from (f"{word}{suffix} {word.upper()}{suffix}" for suffix in SUFFIXES)


def _with_specials(specials: Sequence[str], random: Random) -> Iterator[str]:
    for text in specials:
        yield from (
            text,
            f"{random.choice(WORDS)} {text}{random.choice(WORDS)}",
            f"{text}\n{random.choice(WORDS)} {text}",
        )
