"""A file system without locks between processes: said at once, nothing begun, what is there can be read."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from quantize.errors import StoreError
from quantize.system.cache import Cache
from quantize.testing import FakeBuilder, write_recipe
from tests.conftest import Run

NONE = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP]
pytestmark = pytest.mark.timeout(60)  # where an error is taken for a lock that somebody else has, nothing ends


def without_locks(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(_file: object, _how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("code", NONE)
def test_a_build_is_refused_and_leaves_nothing(
    code: int, tiny: Path, tmp_path: Path, run: Run, fake: FakeBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path / "demo.yaml", tiny, [{"format": "fake"}])
    without_locks(monkeypatch, code)
    result = run("build", path, "--no-eval")
    assert result.exit_code == 1
    assert "no locks between processes: choose a folder on a local disk" in result.stderr
    assert fake.built == []
    assert not [*(tmp_path / "artifacts").rglob("*.safetensors")]


def test_what_is_there_can_be_listed(
    tiny: Path, tmp_path: Path, run: Run, fake: FakeBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path / "demo.yaml", tiny, [{"format": "fake"}])
    assert run("build", path, "--no-eval").exit_code == 0
    without_locks(monkeypatch, errno.ENOLCK)
    assert run("list", "artifacts").exit_code == 0
    assert run("gc").exit_code == 0
    assert "up to date" in run("build", path, "--no-eval").stdout
    assert fake.built == ["int8"]


@pytest.mark.parametrize("code", NONE)
def test_a_cache_says_so(code: int, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.make("kind", "there", lambda _: None)
    without_locks(monkeypatch, code)
    with pytest.raises(StoreError, match=r"^cache ") as caught:
        cache.make("kind", "new", lambda _: None)
    assert "no locks between processes" in str(caught.value.hint)
    with pytest.raises(StoreError), cache.using("kind", "there", lambda _: None):
        pass
    with pytest.raises(StoreError):
        cache.remove_unused("kind", "there")
    assert cache.entry("kind", "there").is_dir()
