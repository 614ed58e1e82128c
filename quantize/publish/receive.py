"""A reference to an artifact in the store: every hash is checked before the store shows anything.

In: a reference, or a pin. Out: an Artifact whose files are those that its manifest names, which is the one that the
publication's manifest names, which has the digest that was asked for. What was fetched before a break is kept.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from quantize.errors import RefusedError, StoreError, TransferError, UsageError, VerifyError, some_of
from quantize.evaluate.decision import Verdict
from quantize.evaluate.metrics import Summary
from quantize.evaluate.record import NAME
from quantize.events import Reporter, note, status, warn
from quantize.publish.base import Count, Found, Place, size_of
from quantize.publish.pack import Blob, Pack, check_config, check_contents, manifest_blob, read_pack
from quantize.publish.pins import Pin
from quantize.publish.places import find_place
from quantize.publish.transfer import Progress, Session, run_all
from quantize.store.artifact import (
    MAX_MEASUREMENTS_BYTES,
    Artifact,
    commit,
    point_current,
    read_measurements,
    when_built,
)
from quantize.store.manifest import MAX_BYTES, MEASUREMENTS_NAME, Manifest, read_manifest
from quantize.store.staging import STAGING, store_errors, variant_lock
from quantize.store.store import Store
from quantize.store.verify import check_files
from quantize.system.cache import hash_file
from quantize.system.digest import digest_of

MOST_NAMED = 20  # references, in a hint


@dataclass(frozen=True)
class Pulled:
    """An artifact of the store. reference: pinned. fetched_bytes: 0 if it was there already."""

    artifact: Artifact
    reference: str
    digest: str
    fetched_bytes: int


def pull(reference: str, store: Store, session: Session, pin: Pin | None = None, *, replace: bool = False) -> Pulled:
    """Get what a reference means. pin: it must be this artifact. replace: have it be current, whatever is there.

    Raises UsageError, TransferError, StoreError; RefusedError: a newer build of this store is the current one;
    VerifyError: something is not what its digest says, and the store has not seen it.
    """
    found = find_place(reference, session.retry)
    place = found.place
    try:
        pack = _resolve(found, reference, session.reporter)
        with _about(place.pinned(pack.digest)):
            manifest = _own_manifest(place, pack)
            check_contents(pack, manifest)
            if pin is not None and (not pin.means(manifest.digest) or pin.key != f"{manifest.name}/{manifest.variant}"):
                raise VerifyError(
                    f"it is {manifest.name}/{manifest.variant} {manifest.digest}; {pin.key} is pinned as {pin.digest}"
                )
            return _into_store(place, pack, manifest, store, session, replace=replace)
    finally:
        place.close()


def pull_pinned(pin: Pin, store: Store, session: Session, *, replace: bool = False) -> Pulled:
    """Get a pinned artifact from the first of its places that answers. Raises as `pull` does."""
    if not pin.published:
        raise UsageError(f"{pin.key} has no `published` places in the pins", hint="publish it, or add a reference")
    for reference in pin.published[:-1]:
        try:
            return pull(reference, store, session, pin, replace=replace)
        except TransferError as exc:
            warn(session.reporter, pin.variant, f"{exc.message}; the next place is tried")
    return pull(pin.published[-1], store, session, pin, replace=replace)


def _resolve(found: Found, reference: str, reporter: Reporter) -> Pack:
    place, wanted = found.place, found.digest
    status(reporter, place.name, "asking what it means")
    named = place.tagged() if found.and_name or wanted is None else None
    if found.and_name and named != wanted:
        hint = f"pull {place.pinned(str(wanted))} if that is meant all the same"
        raise VerifyError(f"{place.name} was moved: it means {named or 'nothing'} now, not {wanted}", hint=hint)
    digest = wanted or named
    if digest is None:
        raise VerifyError(f"{place.name}: nothing is published there", hint=_what_there_is(place))
    if not wanted:
        note(reporter, place.name, f"means {digest}; pull {place.pinned(digest)} to have the same again")
    document = place.manifest(digest)
    if digest_of(document) != digest:
        raise VerifyError(
            f"{reference}: another manifest came than the one with that digest ({digest_of(document)})",
            hint="nothing of it was kept; whoever holds that place, or the way to it, has altered it",
        )
    with _about(place.pinned(digest)):
        return read_pack(document)


def _what_there_is(place: Place) -> str:
    known = place.known()
    return f"there are: {some_of(known, MOST_NAMED)}" if known else "check the name, and that you may read it"


@contextmanager
def _about(reference: str) -> Iterator[None]:
    """Say of which publication something is wrong."""
    try:
        yield
    except VerifyError as exc:
        exc.message = f"{reference}: {exc.message}"
        exc.hint = exc.hint or "nothing of it is in the store"
        raise


def _own_manifest(place: Place, pack: Pack) -> Manifest:
    """The artifact's manifest.json, checked by both of its digests."""
    with tempfile.TemporaryDirectory(prefix="quantize-pull-") as folder:
        for blob, most in ((manifest_blob(pack), MAX_BYTES), (pack.config, MAX_BYTES)):
            if blob.size_bytes > most:
                raise VerifyError(f"{blob.path} is said to have {blob.size_bytes:,} bytes: too many")
            path = Path(folder) / Path(blob.path).name
            _fetch(place, pack, blob, path, lambda _: None)
        check_config(pack, (Path(folder) / pack.config.path).read_bytes())
        return read_manifest(Path(folder) / manifest_blob(pack).path)


def _fetch(place: Place, pack: Pack, blob: Blob, path: Path, count: Count) -> None:
    """Have one file whole and checked. A file that is not what it should be does not stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = size_of(path)
    count(kept)
    try:
        place.fetch(blob, path, pack, count)
        _check(blob, path)
    except VerifyError:
        count(-size_of(path))
        path.unlink(missing_ok=True)
        if not kept:
            raise
        _fetch(place, pack, blob, path, count)  # what an earlier pull left was no beginning of it


def _check(blob: Blob, path: Path) -> None:
    if size_of(path) != blob.size_bytes:
        raise VerifyError(
            f"{blob.path} has {size_of(path):,} bytes, and should have {blob.size_bytes:,}: it is cut off"
        )
    if hash_file(path) != blob.sha256:
        raise VerifyError(f"{blob.path} was altered: its sha256 is not the one in the manifest")


def _into_store(
    place: Place, pack: Pack, manifest: Manifest, store: Store, session: Session, *, replace: bool
) -> Pulled:
    name, variant, reference = manifest.name, manifest.variant, place.pinned(pack.digest)
    with variant_lock(store.root, name, variant), store_errors(store.root):
        known = _intact(store, manifest, session.reporter)
        if known is not None:
            note(session.reporter, variant, f"{known.ref} is in the store already, and intact")
            _make_current(store, known, session.reporter, replace=replace)
            return Pulled(known, reference, pack.digest, 0)
        if not replace:
            _check_older(store, place, pack, manifest)
        folder = store.root / STAGING / f"{name}--{variant}.pull-{pack.short_digest}"
        folder.mkdir(parents=True, exist_ok=True)
        kept = _clean(folder, pack)
        _check_room(folder, pack.size_bytes - kept)
        status(session.reporter, variant, "fetching" if not kept else "fetching what is missing yet")
        counter = Progress(session, variant, "fetching bytes", pack.size_bytes - pack.config.size_bytes)
        tasks = [partial(_fetch, place, pack, blob, folder / blob.path, counter.count) for blob in pack.files]
        run_all(tasks, session)
        verdict = _verdict(folder)
        artifact = commit(store.root, folder, manifest, pulled_from=reference)
        _warn_of_gates(artifact, verdict, session.reporter)
        return Pulled(artifact, reference, pack.digest, pack.size_bytes - kept)


def _make_current(store: Store, known: Artifact, reporter: Reporter, *, replace: bool) -> None:
    """What is there already becomes current only where that is asked for; that it is not is said."""
    if store.is_current(known):
        return
    if replace:
        point_current(known.folder)
        return
    current = store.current(known.manifest.name, known.manifest.variant)
    there = f"{current.ref} is" if current is not None else "none is"
    warn(reporter, known.manifest.variant, f"{known.ref} is not the current build: {there}; --replace makes it so")


def _check_older(store: Store, place: Place, pack: Pack, manifest: Manifest) -> None:
    """Raises RefusedError: the current build was made here, and after the one that would replace it."""
    current = store.current(manifest.name, manifest.variant)
    if current is None or current.is_pulled:
        return
    theirs, ours = _when_built(place, pack), current.built_at
    if theirs is not None and ours is not None and theirs >= ours:
        return
    raise RefusedError(
        f"{current.ref} is the current build: it was built here {_day(ours)}, what is to be pulled {_day(theirs)}",
        hint="--replace makes what is pulled the current one; your build stays, and `quantize list artifacts --all` "
        "shows it",
    )


def _day(time: datetime | None) -> str:
    return "at a time that nobody says" if time is None else f"{time:%Y-%m-%d %H:%M}"


def _when_built(place: Place, pack: Pack) -> datetime | None:
    """When a publication was built, by its own figures."""
    blob = next((item for item in pack.files if item.path == MEASUREMENTS_NAME), None)
    if blob is None or blob.size_bytes > MAX_MEASUREMENTS_BYTES:
        return None
    with tempfile.TemporaryDirectory(prefix="quantize-pull-") as folder:
        _fetch(place, pack, blob, Path(folder) / MEASUREMENTS_NAME, lambda _: None)
        return when_built(read_measurements(Path(folder)))


def _intact(store: Store, manifest: Manifest, reporter: Reporter) -> Artifact | None:
    """The artifact with this digest, if it is in the store and its files are what they should be."""
    try:
        found = store.find(f"{manifest.name}/{manifest.variant}@{manifest.digest}")
        check_files(found, reporter)
    except (UsageError, VerifyError):
        return None
    return found


def _clean(folder: Path, pack: Pack) -> int:
    """Remove what does not belong into a folder that an earlier pull left; bytes that are there already."""
    wanted = {blob.path for blob in pack.files}
    kept = 0
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or (path.is_file() and path.relative_to(folder).as_posix() not in wanted):
            path.unlink()
        elif path.is_file():
            kept += path.stat().st_size
    return kept


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StoreError(
            f"{folder}: {needed:,} bytes are still to come, {free:,} are free",
            hint="free some space and run the same command again",
        )


def _verdict(folder: Path) -> Verdict:
    """What its measurements say of its gates. Raises VerifyError: they would break whoever reads them."""
    measured = read_measurements(folder)
    summary = Summary.of(measured)
    if NAME in measured and summary.record is None:
        raise VerifyError("its measurements.json is not of the form it must have")
    return summary.verdict


def _warn_of_gates(artifact: Artifact, verdict: Verdict, reporter: Reporter) -> None:
    risk = artifact.manifest.accepted_risk
    if risk is not None:
        warn(reporter, artifact.manifest.variant, f"its gates refused it; taken all the same, because: {risk.reason}")
    elif verdict in (Verdict.REFUSED, Verdict.NOT_EVALUATED):
        warn(reporter, artifact.manifest.variant, f"{verdict}: its card says why it was published")
