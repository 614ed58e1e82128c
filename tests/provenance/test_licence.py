"""Licences: which text is whose, what is not known, what contradicts, and which name a licence asks for."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from quantize.errors import LicenceError
from quantize.provenance.licence import KNOWN, Licence, artifact_licence, check_licence, recognise
from tests.provenance.conftest import Changed

DEBIAN = Path("/usr/share/common-licenses")
LLAMA = "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2 Version Release Date: September 25, 2024\n"
EXPECTED = {
    "Apache-2.0": "apache-2.0", "GPL-2": "gpl-2.0", "GPL-3": "gpl-3.0", "LGPL-2.1": "lgpl-2.1", "LGPL-3": "lgpl-3.0",
    "MPL-2.0": "mpl-2.0", "CC0-1.0": "cc0-1.0", "BSD": "bsd-3-clause",
}  # fmt: skip


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's licence texts are not here")
def test_the_texts_that_debian_carries() -> None:
    found = {path.name: recognise(path.read_text("utf-8", "replace")) for path in DEBIAN.iterdir() if path.is_file()}
    assert {name: found[name] for name in EXPECTED} == {name: (id_,) for name, id_ in EXPECTED.items()}
    assert found["Artistic"] == () == found["GFDL-1.3"]


def test_the_texts_of_installed_packages_are_what_their_metadata_says() -> None:
    by_spdx = {spdx: name for name, spdx in KNOWN.items() if spdx}
    right, wrong = set(), {}
    for item in metadata.distributions():
        said = by_spdx.get(item.metadata.get("License-Expression", ""))
        names = item.metadata.get_all("License-File") or []
        text = item.read_text(f"licenses/{names[0]}") if len(names) == 1 else None
        found = recognise(text or "")
        if said is not None and found == (said,):
            right.add(item.metadata["Name"])
        elif said is not None and found and said not in found:  # some carry the texts of others along
            wrong[item.metadata["Name"]] = (said, found)
    assert wrong == {}
    assert len(right) >= 20


def test_the_model_licences_that_have_no_spdx_id() -> None:
    assert recognise(LLAMA) == ("llama3.2",)
    assert recognise("META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n") == ("llama3",)
    assert recognise("Qwen LICENSE AGREEMENT\n\nQwen LICENSE AGREEMENT Release Date: September 19, 2024") == ("qwen",)
    assert recognise("The licence of a tiny model.") == ()


def test_a_licence_is_read_from_the_base_models_card(changed: Changed) -> None:
    assert check_licence(changed()) == Licence("apache-2.0", "apache-2.0")
    assert check_licence(changed(license="BSD-3-Clause")).spdx == "BSD-3-Clause"


def test_or_from_its_text(changed: Changed) -> None:
    found = artifact_licence(changed(license=None, texts={"LICENSE": LLAMA}))
    assert found == Licence("llama3.2", "llama3.2")


@pytest.mark.parametrize("stated", [None, "other", "unknown"])
def test_an_unknown_one_stops_with_what_to_write(changed: Changed, stated: str | None) -> None:
    with pytest.raises(LicenceError, match=r"is not known: neither its card nor a LICENSE file says") as caught:
        check_licence(changed(license=stated))
    assert "`source: {license: …}`" in str(caught.value)
    assert caught.value.exit_code == 3


def test_several_texts_in_one_file_are_not_guessed_between(changed: Changed) -> None:
    text = LLAMA + "\nAttribution 4.0 International\n"
    with pytest.raises(LicenceError, match=r"it could be cc-by-4\.0 or llama3\.2"):
        check_licence(changed(license=None, texts={"LICENSE": text}))


def test_a_card_that_contradicts_the_text_is_refused(changed: Changed) -> None:
    with pytest.raises(LicenceError, match=r"said to be apache-2\.0, and its LICENSE file is the text of llama3\.2"):
        check_licence(changed(texts={"LICENSE": LLAMA}))


def test_a_family_name_agrees_with_its_members(changed: Changed) -> None:
    text = "Attribution 4.0 International\n"
    assert check_licence(changed(license="cc", texts={"LICENSE": f"Creative Commons\n{text}"})).id == "cc"
    with pytest.raises(LicenceError, match=r"the text of cc-by-4\.0"):
        check_licence(changed(license="mit", texts={"LICENSE": text}))


def test_a_llama_must_be_called_one(changed: Changed) -> None:
    llama = changed(license="llama3.2", name="Llama-3.2-3B-Instruct")
    check_licence(llama, "me/Llama-3.2-3B-Instruct-AWQ")
    with pytest.raises(
        LicenceError, match=r"the name 'me/My-3B' does not begin with 'Llama'.*llama3_2/license"
    ) as caught:
        check_licence(llama, "me/My-3B")
    assert "source: {name: …}" in str(caught.value)
    with pytest.raises(LicenceError, match="the name 'tiny' does not begin"):
        check_licence(llama)  # the recipe's own name, where no other is given
    with pytest.raises(LicenceError, match="'Meta-Llama-3-8B' does not begin with 'Llama 3'"):
        check_licence(changed(license="llama3", name="Meta-Llama-3-8B"), "hf://me/Llama-3-8B")


def test_a_licence_that_the_hub_does_not_list_gets_a_name_and_a_link() -> None:
    assert Licence("apache-2.0", "apache-2.0").hub_metadata([]) == {"license": "apache-2.0"}
    assert Licence("qwen-research", "qwen-research").hub_metadata(["LICENSE", "config.json"]) == {
        "license": "other",
        "license_name": "qwen-research",
        "license_link": "LICENSE",
    }


def test_every_recipe_of_this_project_could_be_published_as_it_is_named() -> None:
    from quantize.formats import option_models
    from quantize.recipe.model import load_recipe

    for path in sorted(Path("recipes").glob("*.yaml")):
        recipe = load_recipe(path, option_models())
        licence = Licence(str(recipe.source.license), recipe.source.license)
        rule = licence.rule
        assert rule is None or rule.prefix is None or recipe.name.lower().startswith(rule.prefix.lower()), path
