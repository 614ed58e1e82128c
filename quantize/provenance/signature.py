"""OpenSSF Model Signing: model.sig, made and checked by the library `model_signing`, so that its own command agrees.

In: an artifact's folder and a key. Out: model.sig in the folder; or nothing, or SignatureError with its own message for
each way in which the files are not what was signed. A signature covers every file but itself and UNSIGNED.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import MissingExtraError, QuantizeError, SignatureError, UsageError, first_line
from quantize.store.manifest import EVALUATION_NAME, MEASUREMENTS_NAME, SIGNATURE_NAME
from quantize.system.cache import hash_file

UNSIGNED = (MEASUREMENTS_NAME, EVALUATION_NAME)  # grow with every evaluation and load test, wherever the artifact is
GIT_PATHS = (".git", ".gitattributes", ".github", ".gitignore")  # model_signing leaves them out, too
PASSWORD_VARIABLE = "QUANTIZE_SIGN_PASSWORD"
KEY_HINT = (
    "keys are PEM files on the curve P-256, P-384 or P-521: `openssl ecparam -name prime256v1 -genkey -noout -out "
    "sign.key` makes one, `openssl ec -in sign.key -pubout -out sign.pub` its public half"
)
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Identity:
    """Who signed by Sigstore: an e-mail address or the URI of a workflow, and who vouches for it."""

    name: str
    issuer: str


@dataclass(frozen=True)
class Trust:
    """Whose signature counts: a public key's, or an identity's."""

    public_key: Path | None = None
    identity: Identity | None = None

    @classmethod
    def of(cls, public_key: Path | None, identity: str | None, issuer: str | None) -> Trust | None:
        """From the options of a command; None if none was given. Raises UsageError: they don't go together."""
        if (identity is None) != (issuer is None):
            raise UsageError("--identity and --issuer go together", hint="who signed, and who vouches for that name")
        if public_key is not None and identity is not None:
            raise UsageError("--public-key and --identity exclude each other", hint="a signature is by one of the two")
        if identity is not None and issuer is not None:
            return cls(identity=Identity(identity, issuer))
        return cls(public_key) if public_key is not None else None

    def check(self, folder: Path) -> None:
        """Have the signature in a folder checked. Raises SignatureError, UsageError, QuantizeError (no network)."""
        if self.public_key is not None:
            check_signature(folder, self.public_key)
        elif self.identity is not None:
            check_identity(folder, self.identity)


def sign(folder: Path, key: Path, password: str | None = None) -> bool:
    """Write model.sig with a private key. False: a valid one by the same key is there, and stays.

    Raises UsageError: the key can't be read. SignatureError: the folder holds what can't be signed.
    """
    folder = folder.resolve()
    secret = password.encode() if password else None  # 1.1.1 says str, and passes it on to what takes bytes
    with _key_errors(key):
        signer = _library("signing").Config().use_elliptic_key_signer(private_key=key, password=secret)
    if (folder / SIGNATURE_NAME).is_file():
        with _public_half(key, secret) as public, contextlib.suppress(SignatureError):
            check_signature(folder, public)
            return False
    _write(folder, signer)
    return True


def sign_with_sigstore(folder: Path, *, ambient: bool) -> None:
    """Write model.sig by Sigstore: no key, but an identity, a certificate and a public log; needs the network.

    ambient: take the identity that CI provides, instead of asking in a browser. Raises QuantizeError: not reachable.
    """
    with _network_errors():
        signer = _library("signing").Config().use_sigstore_signer(use_ambient_credentials=ambient)
        _write(folder.resolve(), signer)


def check_signature(folder: Path, public_key: Path) -> None:
    """Have model.sig checked against a public key and every file. Raises SignatureError, UsageError."""
    folder = folder.resolve()
    bundle = _read_bundle(folder)
    with _key_errors(public_key):
        verifier = _library("verifying").Config().use_elliptic_key_verifier(public_key=public_key)
        ours = _fingerprint(public_key)
    named = bundle["verificationMaterial"].get("publicKey")
    theirs = named.get("hint") if isinstance(named, dict) else None
    if theirs != ours:
        said = f"with the key {str(theirs)[:16]}…" if theirs else "by Sigstore or an older program"
        raise SignatureError(
            f"{folder.name}: {SIGNATURE_NAME} was made {said}, not with {public_key} ({ours[:16]}…)",
            hint="trust it only if you know that key; then give its public half",
        )
    _check(folder, bundle, verifier.verify)


def check_identity(folder: Path, identity: Identity) -> None:
    """Have a model.sig by Sigstore checked; its trust root is fetched. Raises SignatureError, QuantizeError."""
    folder = folder.resolve()
    bundle = _read_bundle(folder)
    with _network_errors():
        verifier = (
            _library("verifying").Config().use_sigstore_verifier(identity=identity.name, oidc_issuer=identity.issuer)
        )
    _check(folder, bundle, verifier.verify)


def _check(folder: Path, bundle: Mapping[str, Any], verify: Callable[[Path, Path], None]) -> None:
    """The library's own check of signature and files, then that nothing was left out of what is signed."""
    statement = _statement(folder, bundle)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            verify(folder, folder / SIGNATURE_NAME)
    except Exception as exc:  # the library raises what its parts raise
        _explain(folder, statement)
        raise SignatureError(
            f"{folder.name}: {SIGNATURE_NAME} is not valid: it was altered, or made by another ({first_line(exc)})",
            hint="get the artifact again from where it was published",
        ) from exc
    left_out = sorted(set(_files(folder)) - set(_signed(statement)))
    if left_out:
        raise SignatureError(
            f"{folder.name}: the signature does not cover {left_out[0]}",
            hint="ask for a signature over every file: `quantize sign` makes one",
        )


def _explain(folder: Path, statement: Mapping[str, Any]) -> None:
    """Say which file is not what the signature's own list says; nothing if the files agree with it."""
    signed, there, ignored = _signed(statement), _files(folder), _ignored(statement)
    for name, path in there.items():
        if path.is_symlink():
            raise SignatureError(f"{folder.name}: {name} is a symbolic link", hint="only files can be signed")
        if name not in signed and name not in ignored:
            hint = "move it out of the folder"
            raise SignatureError(f"{folder.name}: {name} was added after it was signed", hint=hint)
    for name, digest in signed.items():
        if not (folder / name).is_file():
            raise SignatureError(f"{folder.name}: {name} is missing: it was signed, and is not there")
        if digest is not None and hash_file(folder / name) != digest:
            raise SignatureError(f"{folder.name}: {name} was changed after it was signed")


def _read_bundle(folder: Path) -> Mapping[str, Any]:
    path = folder / SIGNATURE_NAME
    if not path.is_file():
        raise SignatureError(
            f"{folder.name}: not signed: there is no {SIGNATURE_NAME} in it",
            hint="whoever publishes it signs it with `quantize publish --sign-key`, or `quantize sign`",
        )
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        bundle = json.loads(path.read_bytes())
        if not isinstance(bundle["verificationMaterial"], dict):
            raise TypeError("no material")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise SignatureError(f"{folder.name}: {SIGNATURE_NAME} is no signature bundle ({first_line(exc)})") from exc
    return dict(bundle)


def _statement(folder: Path, bundle: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the signature lists; not to be believed before the library has checked it."""
    try:
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True))
        lists = (statement["predicate"]["resources"], _ignored(statement))
        if not all(isinstance(item, list) for item in lists):
            raise TypeError("no list of files")
        _signed(statement)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise SignatureError(f"{folder.name}: {SIGNATURE_NAME} lists no files ({first_line(exc)})") from exc
    return dict(statement)


def _signed(statement: Mapping[str, Any]) -> dict[str, str | None]:
    """Name -> sha256 of what a signature lists; None where it has another kind of hash."""
    return {
        str(item["name"]): str(item["digest"]) if item["algorithm"] == "sha256" else None
        for item in statement["predicate"]["resources"]
    }


def _ignored(statement: Mapping[str, Any]) -> Any:
    """The paths that a signature says it leaves out."""
    return statement["predicate"].get("serialization", {}).get("ignore_paths", [])


def _files(folder: Path) -> dict[str, Path]:
    """Every file that a signature must cover, by its name in the folder."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
    return {
        name: path
        for name, path in found.items()
        if name not in (SIGNATURE_NAME, *UNSIGNED) and name.partition("/")[0] not in GIT_PATHS
    }


def _write(folder: Path, signer: Any) -> None:
    ignored = [folder / name for name in (SIGNATURE_NAME, *UNSIGNED)]
    hashing = _library("hashing").Config().set_ignored_paths(paths=ignored, ignore_git_paths=True)
    scratch = folder.parent / f".{SIGNATURE_NAME}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        signer.set_hashing_config(hashing).sign(folder, scratch)
        scratch.replace(folder / SIGNATURE_NAME)
    except ValueError as exc:
        raise SignatureError(f"{folder.name}: can't be signed: {first_line(exc)}") from exc
    finally:
        scratch.unlink(missing_ok=True)


def _fingerprint(public_key: Path) -> str:
    """sha256 of the key's PEM form, as bundles name it."""
    from cryptography.hazmat.primitives import serialization

    return hashlib.sha256(_pem(serialization.load_pem_public_key(public_key.read_bytes()))).hexdigest()


def _pem(public: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


@contextlib.contextmanager
def _public_half(key: Path, password: bytes | None) -> Iterator[Path]:
    """The public half of a private key, as a file for a while."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    private = load_pem_private_key(key.read_bytes(), password)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "key.pub"
        path.write_bytes(_pem(private.public_key()))
        yield path


@contextlib.contextmanager
def _key_errors(key: Path) -> Iterator[None]:
    try:
        yield
    except QuantizeError:
        raise
    except OSError as exc:
        raise UsageError(f"key {key}: {exc.strerror}", hint=KEY_HINT) from exc
    except Exception as exc:  # cryptography's errors for what is no key are of many kinds
        raise UsageError(f"key {key}: can't be used ({first_line(exc)})", hint=KEY_HINT) from exc


@contextlib.contextmanager
def _network_errors() -> Iterator[None]:
    """Sigstore asks an identity provider, a certificate authority and a log: any of them can be out of reach."""
    try:
        yield
    except QuantizeError:
        raise
    except Exception as exc:  # sigstore, requests and tuf each have their own
        raise QuantizeError(
            f"Sigstore could not be used ({first_line(exc)})",
            hint="it needs the network and an identity; a key needs neither: --key, --public-key",
        ) from exc


def _library(module: str) -> Any:
    """model_signing.<module>."""
    import importlib

    try:
        return importlib.import_module(f"model_signing.{module}")
    except ImportError as exc:
        raise MissingExtraError("signatures", "publish") from exc
