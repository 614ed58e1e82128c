"""Graphics cards by name: how much memory the one that somebody writes has.

In: a card's name as people write it ("RTX 4060 8GB"), or a size ("8GiB"). Out: a GraphicsCard. No GPU is asked.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from quantize.errors import UsageError
from quantize.system.sizes import GIB, parse_size

# GiB as the makers print it; a "24 GB" card has 24 x 2^30 bytes, less what its driver keeps.
_CARDS_GIB: dict[str, int] = {
    "GTX 1060": 6, "GTX 1070": 8, "GTX 1080": 8, "GTX 1080 Ti": 11, "GTX 1650": 4, "GTX 1660": 6, "GTX 1660 Super": 6,
    "RTX 2060": 6, "RTX 2060 12GB": 12, "RTX 2070": 8, "RTX 2080": 8, "RTX 2080 Ti": 11,
    "RTX 3050": 8, "RTX 3050 6GB": 6, "RTX 3060": 12, "RTX 3060 8GB": 8, "RTX 3060 Ti": 8, "RTX 3060 Laptop": 6,
    "RTX 3070": 8, "RTX 3070 Ti": 8, "RTX 3070 Laptop": 8, "RTX 3080": 10, "RTX 3080 12GB": 12, "RTX 3080 Ti": 12,
    "RTX 3090": 24, "RTX 3090 Ti": 24,
    "RTX 4050 Laptop": 6, "RTX 4060": 8, "RTX 4060 Laptop": 8, "RTX 4060 Ti": 8, "RTX 4060 Ti 16GB": 16,
    "RTX 4070": 12, "RTX 4070 Laptop": 8, "RTX 4070 Super": 12, "RTX 4070 Ti": 12, "RTX 4070 Ti Super": 16,
    "RTX 4080": 16, "RTX 4080 Laptop": 12, "RTX 4080 Super": 16, "RTX 4090": 24, "RTX 4090 Laptop": 16,
    "RTX 5050": 8, "RTX 5060": 8, "RTX 5060 Ti": 8, "RTX 5060 Ti 16GB": 16, "RTX 5070": 12, "RTX 5070 Ti": 16,
    "RTX 5080": 16, "RTX 5090": 32, "RTX 5090 Laptop": 24,
    "RTX A2000": 6, "RTX A2000 12GB": 12, "RTX A4000": 16, "RTX A5000": 24, "RTX A6000": 48,
    "RTX 2000 Ada": 16, "RTX 4000 Ada": 20, "RTX 5000 Ada": 32, "RTX 6000 Ada": 48, "RTX PRO 6000 Blackwell": 96,
    "Tesla P4": 8, "Tesla P40": 24, "Tesla P100": 16, "Tesla T4": 16, "Tesla V100": 16, "Tesla V100 32GB": 32,
    "A2": 16, "A10": 24, "A10G": 24, "A16": 16, "A30": 24, "A40": 48, "A100": 40, "A100 80GB": 80,
    "L4": 24, "L40": 48, "L40S": 48, "H100": 80, "H100 NVL": 94, "H200": 141, "B200": 180, "GH200": 96,
    "RX 6600": 8, "RX 6700 XT": 12, "RX 6800": 16, "RX 7600": 8, "RX 7600 XT": 16, "RX 7700 XT": 12, "RX 7800 XT": 16,
    "RX 7900 XT": 20, "RX 7900 XTX": 24, "RX 9070 XT": 16, "Instinct MI250X": 128, "Instinct MI300X": 192,
    "Arc A750": 8, "Arc A770": 16, "Arc B580": 12,
    "Jetson Orin Nano": 8, "Jetson Orin NX": 16, "Jetson AGX Orin": 64,
}  # fmt: skip


@dataclass(frozen=True)
class GraphicsCard:
    """A graphics card, or a plain size. known: found in the table or on this machine, not just a number of bytes."""

    name: str
    vram_bytes: int
    known: bool = True


def find_card(name: str) -> GraphicsCard:
    """The card that `name` means, whatever the case, spaces, maker's name or "8GB" behind it.

    Raises UsageError with the nearest names, and where the size in the name is not one that the card was sold with.
    """
    wanted, size = _split_size(name)
    matches = [known for known in _CARDS_GIB if _split_size(known)[0] == wanted]
    if not matches:
        raise UsageError(f"unknown card {name!r}", hint=_card_hint(wanted))
    if size is None:
        best = min(matches, key=lambda known: ("GB" in known, _CARDS_GIB[known]))
        return GraphicsCard(best, _CARDS_GIB[best] * GIB)
    for known in matches:
        if _CARDS_GIB[known] == size:
            return GraphicsCard(known, size * GIB)
    sizes = " or ".join(f"{_CARDS_GIB[known]} GB" for known in matches)
    raise UsageError(f"{matches[0]} has {sizes}, not {size} GB", hint="give the memory itself with --vram")


def card_of(gpu: str | None = None, vram: str | None = None) -> GraphicsCard | None:
    """The card of the options --gpu and --vram; --vram alone is an unnamed card, both together a card cut to that."""
    if vram is None:
        return None if gpu is None else find_card(gpu)
    size = parse_size(vram)
    return GraphicsCard(vram.strip() if gpu is None else f"{gpu} ({vram.strip()})", size, known=False)


def _split_size(name: str) -> tuple[str, int | None]:
    """("rtx4060ti", 16) of "NVIDIA GeForce RTX 4060 Ti 16GB"; letters and digits only, no maker's name."""
    text = name.lower()
    size = re.search(r"(?<![\d.])(\d+)\s*gi?b\b", text)
    if size:
        text = text[: size.start()] + text[size.end() :]
    text = re.sub(r"\b(mobile|max-?q)\b", "laptop", text)
    text = re.sub(r"\b(nvidia|geforce|amd|radeon|intel|tesla|gpu|graphics|pcie|sxm\d?|hbm\w*|generation)\b", "", text)
    return re.sub(r"[^a-z0-9]", "", text), int(size.group(1)) if size else None


def _card_hint(wanted: str) -> str:
    short = {_split_size(known)[0]: known for known in reversed(_CARDS_GIB)}
    near = difflib.get_close_matches(wanted, short, n=3, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(short[name] for name in near)}? Any size works too: --vram 8GiB"
    return "give the memory itself with --vram, for example --vram 8GiB"
