"""Names by content: what a digest looks like, what is meant by a part of one, and how one is computed."""

from __future__ import annotations

import hashlib

import pytest

from quantize.system.digest import (
    canonical_hash,
    canonical_json,
    digest_of,
    digits,
    document_digest,
    is_pin,
    is_short,
    is_start,
    is_whole,
    short,
    starts,
)

DIGITS = hashlib.sha256(b"abc").hexdigest()
DIGEST = f"sha256:{DIGITS}"


def test_the_text_of_a_digest() -> None:
    assert digest_of(b"abc") == DIGEST
    assert (digits(DIGEST), digits(DIGITS), short(DIGEST)) == (DIGITS, DIGITS, DIGITS[:12])


@pytest.mark.parametrize(
    ("text", "whole", "pin"),
    [
        (DIGEST, True, True), (DIGEST[:19], False, True), (DIGEST[:18], False, False), (DIGITS, False, False),
        (DIGEST + "0", False, False), (DIGEST + "\n", False, False), (DIGEST.upper(), False, False), ("", False, False),
    ],
)  # fmt: skip
def test_a_whole_one_and_one_that_may_be_pinned(text: str, whole: bool, pin: bool) -> None:
    assert (is_whole(text), is_pin(text)) == (whole, pin)


def test_a_folder_s_name_and_what_people_type() -> None:
    assert is_short(short(DIGEST))
    assert not any(map(is_short, (DIGITS[:11], DIGITS[:13], f"{DIGITS[:12]}\n", "current")))
    assert all(map(is_start, (DIGITS[:4], DIGITS, DIGEST)))
    assert not any(map(is_start, (DIGITS[:3], "demo/int8", "", "sha256:")))
    assert starts(DIGEST, DIGITS[:4])
    assert starts(DIGEST, DIGEST[:11])
    assert not starts(DIGEST, DIGITS[1:5])


def test_a_document_s_own_digest_is_of_everything_else() -> None:
    document = {"b": 1.0, "a": ["é"], "digest": "whatever it states"}
    assert canonical_json({"b": 1.0, "a": ["é"]}) == '{"a":["é"],"b":1}'.encode()
    assert document_digest(document) == digest_of('{"a":["é"],"b":1}'.encode())
    assert document_digest(document) != f"sha256:{canonical_hash(document)}"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 2**60])
def test_a_number_that_json_has_no_exact_words_for(number: float) -> None:
    with pytest.raises(ValueError, match=r".+"):
        document_digest({"n": number})
