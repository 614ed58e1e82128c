"""Signatures: the real `model_signing` command accepts ours and we accept its; each kind of tampering is told apart."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat, PublicFormat

from quantize.errors import LicenceError, QuantizeError, SignatureError, UsageError
from quantize.provenance.documents import Signing, prepare, write_documents
from quantize.provenance.signature import Identity, Trust, check_signature, sign
from quantize.provenance.statement import RunDetails
from quantize.store.artifact import Artifact, write_measurements
from quantize.store.manifest import MEASUREMENTS_NAME, SIGNATURE_NAME
from tests.conftest import Built, Run
from tests.provenance.conftest import MEASURED, Changed, Keys, make_keys


def model_signing(*args: object) -> subprocess.CompletedProcess[str]:
    """The library's own command, in a process of its own."""
    command = [sys.executable, "-m", "model_signing", *(str(arg) for arg in args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def signed(artifact: Artifact, keys: Keys) -> Path:
    """The folder of a signed artifact with all its papers."""
    write_documents(artifact)
    assert sign(artifact.folder, keys.private)
    return artifact.folder


def test_the_real_command_accepts_ours_and_sees_tampering(signed: Path, keys: Keys) -> None:
    command = ("verify", "key", signed, "--signature", signed / SIGNATURE_NAME, "--public_key", keys.public)
    assert model_signing(*command).returncode == 0
    write_measurements(signed, {"bench": "anew"})  # outside of what is signed
    assert model_signing(*command).returncode == 0
    (signed / "provenance.json").write_text("{}")
    assert model_signing(*command).returncode != 0


def test_we_accept_the_real_commands(artifact: Artifact, keys: Keys) -> None:
    path = artifact.folder / SIGNATURE_NAME
    done = model_signing("sign", "key", artifact.folder, "--signature", path, "--private_key", keys.private)
    assert done.returncode == 0, done.stderr
    check_signature(artifact.folder, keys.public)
    (artifact.folder / MEASUREMENTS_NAME).write_text("{}")  # theirs covers it
    with pytest.raises(SignatureError, match=r"measurements\.json was changed after it was signed"):
        check_signature(artifact.folder, keys.public)


def test_a_signature_that_leaves_out_the_weights_is_not_enough(artifact: Artifact, keys: Keys) -> None:
    path, weights = artifact.folder / SIGNATURE_NAME, artifact.folder / "model.safetensors"
    command = ("sign", "key", artifact.folder, "--signature", path, "--private_key", keys.private)
    assert model_signing(*command, "--ignore-paths", weights).returncode == 0
    with pytest.raises(SignatureError, match=r"the signature does not cover model\.safetensors"):
        check_signature(artifact.folder, keys.public)


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def link_outside(folder: Path) -> None:
    (folder / "extra.json").symlink_to("/etc/hostname")


ODD = base64.b64encode(b'{"predicate": {"resources": [], "serialization": {"ignore_paths": 7}}}').decode()


def alter(folder: Path, **fields: object) -> None:
    bundle = json.loads((folder / SIGNATURE_NAME).read_text())
    (folder / SIGNATURE_NAME).write_text(json.dumps({**bundle, **fields}))


def alter_payload(folder: Path) -> None:
    """A changed file, and the list of the signature changed with it."""
    path = folder / SIGNATURE_NAME
    bundle = json.loads(path.read_text())
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload["predicate"]["resources"] = [
        item for item in payload["predicate"]["resources"] if item["name"] != "recipe.yaml"
    ]
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    path.write_text(json.dumps(bundle))
    (folder / "recipe.yaml").unlink()


TAMPERING: dict[str, tuple[Callable[[Path], object], str]] = {
    "a changed byte": (flip_a_byte, r"model\.safetensors was changed after it was signed"),
    "a changed paper": (lambda folder: (folder / "README.md").write_text("x"), r"README\.md was changed"),
    "an added file": (lambda folder: (folder / "extra.json").write_text("{}"), r"extra\.json was added after"),
    "a hidden one": (lambda folder: (folder / ".extra").write_text("{}"), r"\.extra was added after"),
    "a link": (link_outside, r"extra\.json is a symbolic link"),
    "a missing file": (lambda folder: (folder / "LICENSE").unlink(), "LICENSE is missing: it was signed"),
    "no signature": (lambda folder: (folder / SIGNATURE_NAME).unlink(), r"not signed: there is no model\.sig"),
    "no JSON": (lambda folder: (folder / SIGNATURE_NAME).write_text("{"), r"model\.sig is no signature bundle"),
    "no bundle": (lambda folder: (folder / SIGNATURE_NAME).write_text("[]"), r"model\.sig is no signature bundle"),
    "odd material": (lambda folder: alter(folder, verificationMaterial={"publicKey": "x"}), "by Sigstore or an older"),
    "no payload": (lambda folder: alter(folder, dsseEnvelope={}), r"model\.sig lists no files"),
    "an odd payload": (lambda folder: alter(folder, dsseEnvelope={"payload": ODD}), r"model\.sig lists no files"),
    "an altered list": (alter_payload, r"model\.sig is not valid: it was altered"),
}


@pytest.mark.parametrize("case", TAMPERING)
def test_each_kind_of_tampering_has_its_own_message(signed: Path, keys: Keys, case: str) -> None:
    spoil, message = TAMPERING[case]
    check_signature(signed, keys.public)
    spoil(signed)
    with pytest.raises(SignatureError, match=message) as caught:
        check_signature(signed, keys.public)
    assert caught.value.exit_code == 3


def test_another_key_is_named(signed: Path, tmp_path: Path) -> None:
    other = make_keys(tmp_path, "other")
    with pytest.raises(SignatureError, match=r"was made with the key [0-9a-f]{16}…, not with .*other\.pub"):
        check_signature(signed, other.public)


def test_a_forged_hint_does_not_help(signed: Path, keys: Keys, tmp_path: Path) -> None:
    other = make_keys(tmp_path, "other")
    ours = json.loads((signed / SIGNATURE_NAME).read_text())
    assert sign(signed, other.private)
    forged = json.loads((signed / SIGNATURE_NAME).read_text())
    forged["verificationMaterial"] = ours["verificationMaterial"]
    (signed / SIGNATURE_NAME).write_text(json.dumps(forged))
    with pytest.raises(SignatureError, match="is not valid"):
        check_signature(signed, keys.public)


def test_a_good_signature_stays_as_it_is(signed: Path, keys: Keys, tmp_path: Path) -> None:
    before = (signed / SIGNATURE_NAME).read_bytes()
    assert sign(signed, keys.private) is False
    assert (signed / SIGNATURE_NAME).read_bytes() == before
    assert sign(signed, make_keys(tmp_path, "other").private) is True
    (signed / "README.md").write_text("new")
    assert sign(signed, keys.private) is True
    check_signature(signed, keys.public)


def test_a_key_with_a_password(artifact: Artifact, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    private, public = tmp_path / "locked.key", tmp_path / "locked.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"open sesame")))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(UsageError, match="can't be used"):
        sign(artifact.folder, private)
    assert sign(artifact.folder, private, "open sesame")
    assert sign(artifact.folder, private, "open sesame") is False
    check_signature(artifact.folder, public)


def test_what_is_no_key(signed: Path, keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        check_signature(signed, tmp_path / "nothing.pub")
    with pytest.raises(UsageError, match="can't be used"):
        check_signature(signed, keys.private)
    other = tmp_path / "ed25519.pub"
    public = ed25519.Ed25519PrivateKey.generate().public_key()
    other.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(UsageError, match="P-256"):
        check_signature(signed, other)


def test_trust_is_a_key_or_an_identity(keys: Keys) -> None:
    assert Trust.of(None, None, None) is None
    assert Trust.of(keys.public, None, None) == Trust(keys.public)
    assert Trust.of(None, "me@x.org", "https://x") == Trust(identity=Identity("me@x.org", "https://x"))
    with pytest.raises(UsageError, match="go together"):
        Trust.of(None, "me@x.org", None)
    with pytest.raises(UsageError, match="exclude each other"):
        Trust.of(keys.public, "me@x.org", "https://x")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every request goes to a port where nothing listens, and no earlier run's trust root is found."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_sigstore_says_that_it_needs_the_network(signed: Path, no_network: None) -> None:
    with pytest.raises(QuantizeError, match="Sigstore could not be used") as caught:
        Trust(identity=Identity("me@x.org", "https://accounts.google.com")).check(signed)
    assert caught.value.exit_code == 1
    assert "needs the network" in str(caught.value)


def test_sign_and_verify_by_hand(artifact: Artifact, keys: Keys, run: Run) -> None:
    ref = artifact.ref
    assert run("verify", ref, "--hashes-only", "--public-key", keys.public).exit_code == 3
    assert run("sign", ref, "--key", keys.private).stdout == f"{ref}: signed\n"
    assert run("sign", ref, "--key", keys.private).stdout == f"{ref}: signed already by this key\n"
    done = run("verify", ref, "--hashes-only", "--public-key", keys.public)
    assert (done.exit_code, done.stdout) == (0, f"{ref}: good, signature too\n")
    found = json.loads(run("verify", ref, "--hashes-only", "--json", "--public-key", keys.public).stdout)
    assert found[0]["signature"] == "good"
    flip_a_byte(artifact.folder)
    assert run("verify", ref, "--hashes-only", "--public-key", keys.public).exit_code == 3


def test_sign_needs_to_know_by_what(artifact: Artifact, keys: Keys, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "give --key FILE, or --sigstore" in run("sign", artifact.ref).stderr
    assert run("sign", artifact.ref, "--key", keys.private, "--sigstore").exit_code == 2
    for name in ("GITHUB_ACTIONS", "GITLAB_CI"):
        monkeypatch.delenv(name, raising=False)
    assert (
        "GitHub Actions and GitLab CI only" in run("sign", artifact.ref, "--key", keys.private, "--run-details").stderr
    )


@pytest.fixture
def served(built: Built, keys: Keys, tmp_path: Path) -> Artifact:
    """A signed GGUF artifact in a store of its own."""
    artifact = built.copy(tmp_path / "served").find("tiny/q8_0")
    assert sign(artifact.folder, keys.private)
    return artifact


def test_serve_refuses_what_is_not_signed_by_whom_it_must_be(
    served: Artifact, keys: Keys, run: Run, tmp_path: Path
) -> None:
    required = ("--require-signature", "--public-key")
    refused = run("serve", served.folder, *required, make_keys(tmp_path, "other").public)
    assert refused.exit_code == 3
    assert "was made with the key" in refused.stderr
    (served.folder / SIGNATURE_NAME).unlink()
    assert "not signed" in run("serve", served.folder, *required, keys.public).stderr
    file = next(served.folder.glob("*.gguf"))
    assert "single file is not signed" in run("serve", file, *required, keys.public).stderr
    assert "on another server" in run("serve", "http://127.0.0.1:9/v1", *required, keys.public).stderr
    assert "go together" in run("serve", served.folder, "--require-signature").stderr
    assert "go together" in run("serve", served.folder, "--public-key", keys.public).stderr


def test_serve_goes_on_with_a_good_signature(
    served: Artifact, keys: Keys, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr("quantize.serve.server.run", lambda targets, *_: started.extend(item.name for item in targets))
    done = run("serve", f"m={served.folder}", "--require-signature", "--public-key", keys.public, "--force")
    assert (done.exit_code, started) == (0, ["m"])
    assert "m: signature good" in done.stderr


def test_what_was_signed_is_not_rewritten_without_the_key(changed: Changed, keys: Keys) -> None:
    artifact = changed({})
    prepare(artifact, signing=Signing(keys.private))
    prepare(artifact)  # says the same
    check_signature(artifact.folder, keys.public)
    write_measurements(artifact.folder, MEASURED)
    with pytest.raises(SignatureError, match=r"it was signed, and README\.md, sbom\.cdx\.json would no longer be"):
        prepare(artifact)
    check_signature(artifact.folder, keys.public)
    prepare(artifact, signing=Signing(keys.private))
    check_signature(artifact.folder, keys.public)


def test_nothing_of_an_unknown_licence_is_prepared(changed: Changed, keys: Keys) -> None:
    artifact = changed(license=None)
    with pytest.raises(LicenceError, match="is not known"):
        prepare(artifact, signing=Signing(keys.private))
    assert not (artifact.folder / SIGNATURE_NAME).exists()


def test_run_details_stay_until_another_build(changed: Changed, keys: Keys) -> None:
    artifact, run = changed({}), RunDetails("https://ci.example.org/job", "https://ci.example.org/job/7")
    prepare(artifact, signing=Signing(keys.private, run=run))
    prepare(artifact)
    assert "https://ci.example.org/job/7" in (artifact.folder / "provenance.json").read_text()
    other = changed(build_key="another")
    prepare(other, signing=Signing(keys.private))
    assert "ci.example.org" not in (artifact.folder / "provenance.json").read_text()
