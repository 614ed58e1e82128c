"""What the copies of a test's process do: echo, count processor time, take memory, crash, or never come back."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection

import orjson

from quantize.system import forks


def set_up(options: bytes) -> tuple[forks.Serve, bytes]:
    """Answers b"pid" and b"ppid", and obeys b"hang", b"sleep", b"crash", b"memory"; all else comes back as it was."""

    def serve(pipe: Connection) -> None:
        while True:
            asked = pipe.recv_bytes()
            if asked == b"hang":
                with forks.seconds(0.3):
                    while True:
                        pass
            if asked == b"sleep":
                time.sleep(60)
            if asked == b"crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            if asked == b"leave":
                return
            if asked == b"memory":
                forks.more_memory(64 << 20)
                try:
                    bytearray(1 << 30)
                except MemoryError:
                    asked = b"none left"
            numbers = {b"pid": os.getpid(), b"ppid": os.getppid()}
            pipe.send_bytes(str(numbers[asked]).encode() if asked in numbers else asked)

    return serve, options


def broken(options: bytes) -> tuple[forks.Serve, bytes]:
    """Does not come up."""
    raise OSError("no")


def dying_desk(options: bytes) -> tuple[forks.Serve, bytes]:
    """A desk: it dies in the stage that the prompt names, or at the first mask."""

    def serve(pipe: Connection) -> None:
        order = orjson.loads(pipe.recv_bytes())
        pipe.send_bytes(orjson.dumps({"stage": order["prompt"]}))
        if order["prompt"] != "mask":
            os.kill(os.getpid(), signal.SIGSEGV)
        pipe.send_bytes(orjson.dumps({"tokens": [1, 2]}))
        with forks.seconds(0.2):
            while True:
                pass

    return serve, b'{"warning": "watch out"}'
