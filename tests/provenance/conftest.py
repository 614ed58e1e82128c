"""An artifact to write papers about and to sign, made without any engine, and a pair of keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from quantize.events import ListReporter
from quantize.formats import option_models
from quantize.recipe.model import load_recipe
from quantize.store.artifact import Artifact, write_measurements
from quantize.store.manifest import FILE_NAME, CalibrationEntry
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.system.files import write_text
from quantize.testing import FakeBuilder, write_recipe
from tests.conftest import build
from tests.records import evaluation_record

MEASURED = {
    "built_at": "2026-11-21T10:00:10+00:00",
    "build_seconds": 10.5,
    "evaluation": evaluation_record(
        verdict="accepted with flags",
        findings=[
            {"gate": "max_kl", "outcome": "passed", "reason": "0.0302 nats, at most 0.05"},
            {"gate": "max_gain", "outcome": "flagged", "reason": "perplexity is 7 % better than the source's"},
        ],
        quality={
            "perplexity": 10.77, "source_perplexity": 10.36, "perplexity_ratio": 1.0396, "mean_kl": 0.0302,
            "p99_kl": 0.2, "top_token_agreement": 0.91, "predictions": 4516, "windows": 9, "window_tokens": 512,
            "kl_is_exact": False, "windows_hash": "cd" * 32,
            "text_name": "python-docs", "text_hash": "ab" * 32, "runtime": "llama.cpp", "runtime_version": "0.3.36",
            "source_runtime": "transformers", "source_runtime_version": "5.23.0",
        },
        golden={
            "hash": "ef" * 32, "context": 1024, "prompts": 23, "source_passed": 14, "artifact_passed": 13, "lost": 2,
            "results": [],
        },
    ),
}  # fmt: skip


@pytest.fixture
def artifact(fake: FakeBuilder, tiny: Path, store: Store, cache: Cache, tmp_path: Path) -> Artifact:
    """One build of the fake format, in the test's own store."""
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny, [{"format": "fake"}])
    outcome = build(load_recipe(recipe, option_models()), Workspace(store, cache, ListReporter()), evaluate=False)[0]
    assert outcome.artifact is not None
    return outcome.artifact


Changed = Callable[..., Artifact]


@pytest.fixture
def changed(artifact: Artifact) -> Changed:
    """The artifact with another manifest: changed(license=…) sets fields of the source, the others by their names."""

    def change(
        measurements: Mapping[str, Any] | None = None, texts: Mapping[str, str] | None = None, **fields: Any
    ) -> Artifact:
        manifest = artifact.manifest
        inner = {key: fields.pop(key) for key in list(fields) if key in type(manifest.source).model_fields}
        source = manifest.source.model_copy(update=inner)
        manifest = manifest.model_copy(update={"source": source, **fields}).sealed()
        for name, text in (texts or {}).items():
            (artifact.folder / name).write_text(text, encoding="utf-8")
        if measurements is not None:
            write_measurements(artifact.folder, measurements)
        write_text(artifact.folder / FILE_NAME, manifest.to_json())
        return Artifact(artifact.folder, manifest)

    return change


CALIBRATED = CalibrationEntry(spec={"dataset": "python-docs"}, hash="cd" * 32, sequences=32, tokens=15_000, seed=0)


@dataclass(frozen=True)
class Keys:
    """A private key and its public half, as files."""

    private: Path
    public: Path


def make_keys(folder: Path, name: str = "sign") -> Keys:
    """A new pair on the curve P-256."""
    key = ec.generate_private_key(ec.SECP256R1())
    keys = Keys(folder / f"{name}.key", folder / f"{name}.pub")
    keys.private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    keys.public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return keys


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """The publisher's."""
    return make_keys(tmp_path)
