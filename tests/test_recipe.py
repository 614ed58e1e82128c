"""Recipes that are right: defaults, short forms, names, paths, and a schema that agrees with the parser."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from quantize.calibration.mix import CalibrationText
from quantize.errors import RecipeError
from quantize.formats import option_models
from quantize.recipe.model import PackageFile, Recipe, load_recipe, recipe_schema
from quantize.recipe.yaml import parse_document, read_document, suggest
from quantize.system.lookup import is_path_text
from tests.conftest import Run

ROOT = Path(__file__).parent.parent
BAD = Path(__file__).parent / "bad_recipes"
HEAD = "name: demo\nsource: {model: ./model}\n"


def parse(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, option_models())


def test_types_make_one_variant_each(tmp_path: Path) -> None:
    recipe = parse(tmp_path, HEAD + "variants:\n  - {format: gguf, types: [Q4_K_M, Q8_0], pure: true}\n")
    assert [item.name for item in recipe.variants] == ["q4_k_m-pure", "q8_0-pure"]
    assert [item.normalized()["type"] for item in recipe.variants] == ["Q4_K_M", "Q8_0"]


def test_defaults_fill_in_and_give_way(tmp_path: Path) -> None:
    text = HEAD + "defaults: {format: gguf, pure: true, type: Q8_0}\nvariants:\n  - {}\n  - {pure: false, type: Q4_0}\n"
    first, second = parse(tmp_path, text).variants
    assert (first.format, first.normalized()["type"], first.normalized()["pure"]) == ("gguf", "Q8_0", True)
    assert (second.normalized()["type"], second.normalized()["pure"]) == ("Q4_0", False)


def test_a_variant_may_have_a_name(tmp_path: Path) -> None:
    (variant,) = parse(tmp_path, HEAD + "variants:\n  - {format: gguf, type: Q8_0, name: small.v1}\n").variants
    assert variant.name == "small.v1"


def test_names_differ_wherever_options_do(tmp_path: Path) -> None:
    options = ["", ", pure: true", ", output_type: F16", ", embedding_type: F16", ", overrides: {attn_v: Q6_K}"]
    options += [", overrides: {attn_v: Q5_K}", ", imatrix: true"]
    text = HEAD + "variants:\n" + "".join(f"  - {{format: gguf, type: Q8_0{item}}}\n" for item in options)
    names = [item.name for item in parse(tmp_path, text).variants]
    assert len(set(names)) == len(options)


def test_a_recipe_keeps_its_text_to_the_byte(tmp_path: Path) -> None:
    text = HEAD.replace("\n", "\r\n") + "variants:\r\n  - {format: gguf, type: Q8_0}  # é, and no newline at the end"
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode())
    assert load_recipe(path, option_models()).text.encode() == path.read_bytes()


def test_calibration_may_be_a_file_beside_or_above(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "own.yaml").write_text("{dataset: python-docs, samples: 3}")
    text = HEAD + "calibration: calibration/own.yaml\nvariants:\n  - {format: gguf, type: Q8_0}\n"
    recipe = parse(tmp_path / "recipes", text)
    assert recipe.calibration is not None
    assert (recipe.calibration.samples, recipe.calibration.sequence_length) == (3, 2048)


@pytest.mark.parametrize("text", ["dataset: python-docs, samples: 3", "mix: [{dataset: python-docs, samples: 3}]"])
def test_guided_statistics_are_said_only_where_they_are_asked_for(tmp_path: Path, text: str) -> None:
    """So that build keys, locks and manifests of all other recipes are what they were."""
    found = {}
    for guided in ("", ", guided: false", ", guided: true"):
        variants = "variants:\n  - {format: gptq, bits: 4}\n"
        recipe = parse(tmp_path, HEAD + f"calibration: {{{text}{guided}}}\n" + variants)
        assert recipe.calibration is not None
        assert recipe.calibration.guided == ("true" in guided)
        assert [part.guided for part in recipe.calibration.parts] == [recipe.calibration.guided]
        material = CalibrationText(recipe.calibration, tmp_path)
        found[guided] = (recipe.calibration.model_dump(), material.stated(), material.identify())
    assert found[""] == found[", guided: false"]
    for without, asked in zip(found[""], found[", guided: true"], strict=True):
        assert "guided" not in without
        assert asked == {**without, "guided": True}


def test_guided_in_a_part_of_a_mix_is_refused(tmp_path: Path) -> None:
    text = "calibration: {mix: [{dataset: python-docs, samples: 3, guided: true}]}\n"
    with pytest.raises(RecipeError, match=r"`guided` in a part of a mix(.|\n)*beside `mix`"):
        parse(tmp_path, HEAD + text + "variants:\n  - {format: gguf, type: Q8_0}\n")


def test_an_error_in_a_calibration_file_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("dataset: python-docs\nsample: 3\n")
    with pytest.raises(RecipeError, match=r"own\.yaml:2:1: unknown key `sample`") as caught:
        parse(tmp_path, HEAD + "calibration: own.yaml\nvariants:\n  - {format: gguf, type: Q8_0}\n")
    assert caught.value.hint == "did you mean `samples`?"


def test_a_packaged_source(tmp_path: Path) -> None:
    text = (
        "name: demo\nsource:\n  model: {package: some.package, file: a/b.gguf}\nvariants: [{format: gguf, type: F16}]\n"
    )
    assert parse(tmp_path, text).source.model == PackageFile(package="some.package", file="a/b.gguf")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", False),
        ("./name", True),
        ("/name", True),
        ("~/name", True),
        ("name.gguf", True),
        ("a/b.jsonl", True),
    ],
)
def test_what_can_only_be_a_path(text: str, expected: bool) -> None:
    assert is_path_text(text) is expected


def test_a_misspelt_file_name_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("{}")
    with pytest.raises(RecipeError, match=r"demo\.yml: no such file") as caught:
        read_document(tmp_path / "demo.yml")
    assert caught.value.hint == f"did you mean {tmp_path / 'demo.yaml'}?"


def test_a_folder_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="this is a folder, not a file"):
        read_document(tmp_path)
    (tmp_path / "huge.yaml").write_text("# " + "x" * (1 << 20))
    with pytest.raises(RecipeError, match="1,048,578 bytes is too large"):
        read_document(tmp_path / "huge.yaml")


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused_with_a_place(text: str) -> None:
    message = "x.yaml:"
    with contextlib.suppress(RecipeError):
        try:
            parse_document(text, "x.yaml")
        except RecipeError as exc:
            message = exc.message
            raise
    assert message.startswith("x.yaml:")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=6), inner, max_size=3),
        max_leaves=8,
    )
)
def test_data_comes_back_as_pyyaml_reads_it(data: Any) -> None:
    text = yaml.safe_dump({"data": data})
    assert parse_document(text, "x.yaml").data == yaml.safe_load(text) == {"data": data}


def test_every_value_has_its_place() -> None:
    document = parse_document("a:\n  - b: 1\n    c: [x, y]\n", "x.yaml")
    assert document.values["a", 0, "c", 1] == (2, 11)
    assert document.keys["a", 0, "c"] == (2, 4)
    assert document.error(("a", 0, "c", 1), "no").message.startswith("x.yaml:3:12: no\n     3 |     c: [x, y]\n")


def test_suggestions() -> None:
    assert suggest("q4_k_m", ["Q4_K_M", "Q8_0"]) == "did you mean `Q4_K_M`?"
    assert suggest("zzz", ["one", "two"]) == "known: one, two"
    assert suggest("zzz", []) is None


# --- the schema, read by an independent validator -------------------------------------------------------------------


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = recipe_schema(option_models())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_our_recipes_load_and_fit_the_schema(path: Path, validator: jsonschema.Draft202012Validator) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema="), "editors complete recipes by this line"
    assert [error.message for error in validator.iter_errors(yaml.safe_load(text))] == []
    assert load_recipe(path, option_models()).variants


ONLY_THE_PARSER_KNOWS = {  # what JSON Schema can't say: files, places, other values, the YAML itself
    "anchor_contains_itself", "asks_for_an_object", "bad_regular_expression", "calibration_file_missing",
    "control_character", "duplicate_key", "duplicate_variants", "empty", "impossible_date", "key_is_a_list",
    "merge_key", "missing_format",
    "model_is_empty", "name_is_a_date", "nested_too_deeply", "not_utf8", "not_yaml", "one_name_for_several_types",
    "only_comments", "package_file_is_no_gguf", "package_file_leaves_the_package", "package_not_installed",
    "regular_expression_with_braces",
    "mix_too_many_samples", "package_without_that_file", "revision_of_a_local_path", "source_is_a_text_file",
    "source_is_missing",
    "source_is_no_model", "tabs", "two_documents", "type_and_types", "anchors_multiply", "missing_type",
    "unknown_output_type", "unknown_tensor_type", "variant_name_leaves_the_store",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in BAD.glob("*.yaml") if path.stem not in ONLY_THE_PARSER_KNOWS)
)
def test_bad_recipes_do_not_fit_the_schema(name: str, validator: jsonschema.Draft202012Validator) -> None:
    assert not validator.is_valid(yaml.safe_load((BAD / f"{name}.yaml").read_text(encoding="utf-8")))


def test_the_command_prints_the_schema(run: Run) -> None:
    result = run("schema")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == recipe_schema(option_models())


def test_the_schema_in_docs_is_the_current_one() -> None:
    path = ROOT / "docs" / "recipe.schema.json"
    if not path.is_file():
        pytest.skip("not written yet")
    assert json.loads(path.read_text(encoding="utf-8")) == recipe_schema(option_models()), (
        "run `quantize schema > " + str(path)
    )
