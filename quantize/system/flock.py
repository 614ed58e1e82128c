"""Locks between processes, on file systems that have them.

In: the path of a lock's file. Out: a lock that is not taken yet. All use flock(2); a file system without it (NFS
without its lock daemon, some FUSE mounts) is refused: two builds at once would write into one folder.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import FileLock

NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})
NO_LOCKS_HINT = "its file system has no locks between processes: choose a folder on a local disk, or on NFS with locks"


def file_lock(path: Path, *, timeout: float = -1, poll_seconds: float = 0.05) -> FileLock:
    """A lock by this file. timeout: seconds to wait, -1 for ever. `acquire` raises OSError, and filelock's Timeout."""
    from filelock import FileLock

    return FileLock(path, timeout=timeout, poll_interval=poll_seconds, fallback_to_soft=False)
