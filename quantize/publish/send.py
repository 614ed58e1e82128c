"""Artifacts of a store to a target: all that may stop one is looked at before the first byte goes out.

In: artifacts, a target, a policy. Out: one Published each, when its publication is complete and its tag names it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quantize.errors import RefusedError, UsageError
from quantize.events import status
from quantize.provenance.documents import Signing, prepare
from quantize.publish.base import Place, moved_meanwhile
from quantize.publish.pack import Blob, Pack, make_pack
from quantize.publish.places import place_for
from quantize.publish.policy import required_notice
from quantize.publish.transfer import Progress, Session, run_all
from quantize.recipe.model import PublishPolicy
from quantize.store.artifact import Artifact, artifact_lock
from quantize.store.staging import store_errors
from quantize.store.store import Store
from quantize.store.verify import check_files
from quantize.system.sizes import size_text


@dataclass(frozen=True)
class Published:
    """A publication. name: the reference that moves; reference: the one that never does; sent: bytes that went out."""

    artifact: Artifact
    name: str
    reference: str
    digest: str
    size_bytes: int
    sent_bytes: int
    sent_files: int
    moved_from: str | None


@dataclass(frozen=True)
class Wanted:
    """An artifact to publish, and the policy that holds for it."""

    artifact: Artifact
    policy: PublishPolicy


@dataclass(frozen=True)
class _Job:
    """One publication to make. meant: what the place's name means before it. absent: what has to be sent."""

    artifact: Artifact
    place: Place
    pack: Pack
    config: bytes
    meant: str | None
    absent: list[Blob]


def publish(
    wanted: Sequence[Wanted],
    target: str,
    store: Path,
    session: Session,
    *,
    move_tag: bool = False,
    signing: Signing | None = None,
) -> Iterator[Published]:
    """Publish each artifact: papers are written and signed first, then everything goes out.

    Raises GateError, LicenceError, VerifyError, RefusedError, UsageError before anything is sent; TransferError.
    """
    artifacts = [item.artifact for item in wanted]
    notices = [required_notice(item.artifact, item.policy) for item in wanted]
    places: list[Place] = []
    try:
        for item in artifacts:
            places.append(place_for(target, item, session.retry))
        _check_apart(artifacts, places)
        jobs = []
        for item, place, notice in zip(artifacts, places, notices, strict=True):
            status(session.reporter, item.manifest.variant, "checking hashes")
            check_files(item, session.reporter)
            _prepare(store, item, place.title, notice, signing, anew=move_tag)
            pack, config = make_pack(item)
            meant = _may_take(place, pack, move_tag=move_tag)
            status(session.reporter, item.manifest.variant, "asking what is there")
            jobs.append(_Job(item, place, pack, config, meant, _absent(place, pack, session)))
        _check_room(jobs)
        for job in jobs:
            yield _publish_one(job, session)
    finally:
        for place in places:
            place.close()


def _prepare(store: Path, artifact: Artifact, title: str, notice: str, signing: Signing | None, *, anew: bool) -> None:
    """Have the licence checked, and the papers written and signed, while no evaluation writes beside them."""
    with artifact_lock(store, artifact), store_errors(store):
        names = (artifact.manifest.name, title)
        prepare(artifact, *names, store=Store(store), anew=anew, remark=notice, signing=signing)


def _check_apart(artifacts: Sequence[Artifact], places: Sequence[Place]) -> None:
    taken: dict[str, str] = {}
    for item, place in zip(artifacts, places, strict=True):
        other = taken.setdefault(place.name, item.ref)
        if other != item.ref:
            hint = "name a target that has room for more than one: without a tag, or without the hub repository"
            raise UsageError(f"{other} and {item.ref} would both be {place.name}", hint=hint)


def _may_take(place: Place, pack: Pack, *, move_tag: bool) -> str | None:
    """What the place's tag means now. Raises RefusedError: something else, and it may not be moved."""
    meant = place.tagged()
    if meant not in (None, pack.digest) and not move_tag:
        raise RefusedError(
            f"{place.name} already means {meant}; this publication is {pack.digest}",
            hint="say --move-tag to have it mean this one; whoever pulls by digest notices nothing",
        )
    return meant


def _publish_one(job: _Job, session: Session) -> Published:
    artifact, place, pack, meant, absent = job.artifact, job.place, job.pack, job.meant, job.absent
    subject = artifact.manifest.variant
    total = sum(blob.size_bytes for blob in absent)
    with tempfile.TemporaryDirectory(prefix="quantize-publish-") as scratch:
        config = Path(scratch) / "config"
        config.write_bytes(job.config)
        paths = {blob.path: artifact.folder / blob.path for blob in pack.files} | {pack.config.path: config}
        status(session.reporter, subject, "sending" if absent else "everything is there already; nothing is sent")
        count = Progress(session, subject, "sending bytes", total).count
        run_all([partial(place.send, blob, paths[blob.path], pack, count) for blob in absent], session)
        now = place.tagged()
        if now not in (meant, pack.digest):
            raise moved_meanwhile(place.name, meant, now)
        reference = place.seal(pack, move_from=meant)
    moved = meant if meant not in (None, pack.digest) else None
    return Published(artifact, place.name, reference, pack.digest, pack.size_bytes, total, len(absent), moved)


def _absent(place: Place, pack: Pack, session: Session) -> list[Blob]:
    """What has to be sent, the largest first."""
    blobs = list({blob.digest if place.by_content else blob.path: blob for blob in pack.blobs}.values())
    there: dict[str, bool] = {}

    def look(blob: Blob) -> None:
        there[blob.path] = place.has(blob, pack)

    run_all([partial(look, blob) for blob in blobs], session)
    return sorted((blob for blob in blobs if not there[blob.path]), key=lambda blob: -blob.size_bytes)


def _check_room(jobs: Sequence[_Job]) -> None:
    """Raises RefusedError: it would not all go in."""
    free = min((free for job in jobs if (free := job.place.free_bytes()) is not None), default=None)
    if free is None or sum(blob.size_bytes for job in jobs for blob in job.absent) <= free:
        return
    needed = sum(job.place.takes(blob, job.pack) for job in jobs for blob in job.absent)
    if needed > free:
        raise RefusedError(
            f"{jobs[0].place.name}: {size_text(needed)} are to be sent, {size_text(free)} are free, "
            f"{needed - free:,} bytes are missing",
            hint="free some space there, or publish fewer artifacts; nothing was written",
        )
