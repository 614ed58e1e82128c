"""Time and memory of the largest and worst files that each reader takes, or refuses only after it has read them.

    python benchmarks/hostile_sizes.py [CASE ...]

Each case runs in a process of its own; what that process has before it reads is taken off. Prints a table: the size of
the file, seconds of processor time, peak memory, and how it ended.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)

from quantize.errors import QuantizeError  # noqa: E402
from quantize.evaluate.golden import load_golden  # noqa: E402
from quantize.files.gguf import read_gguf  # noqa: E402
from quantize.files.safetensors import INDEX_NAME, read_header  # noqa: E402 - from the folder above
from quantize.model.checkpoint import read_json, tensor_table  # noqa: E402 - from the folder above
from quantize.recipe.yaml import read_document  # noqa: E402
from quantize.store.manifest import read_manifest  # noqa: E402
from tests.fuzz import seeds  # noqa: E402

MIB = 1 << 20
NAME = struct.pack("<Q", 1) + b"a"  # of a GGUF field


def framed(header: bytes, data: int = 0) -> bytes:
    """A safetensors file."""
    return struct.pack("<Q", len(header)) + header + bytes(data)


def tensors(count: int) -> bytes:
    """A header of so many tensors of one byte."""
    entry = '"model.layers.{0}.mlp.weight":{{"dtype":"U8","shape":[1,1],"data_offsets":[{0},{1}]}}'
    return framed(("{" + ",".join(entry.format(n, n + 1) for n in range(count)) + "}").encode(), count)


def with_index(path: Path, count: int = 500_000) -> None:
    """A shard of so many tensors, and the index of it."""
    (path.parent / "a.safetensors").write_bytes(tensors(count))
    names = {f"model.layers.{n}.mlp.weight": "a.safetensors" for n in range(count)}
    path.write_bytes(json.dumps({"weight_map": names}).encode())


def gguf(fields: int = 0, count: int = 0, body: bytes = b"") -> bytes:
    """A GGUF file with this between the counts and the end."""
    return b"GGUF" + struct.pack("<IQQ", 3, count, fields) + body + bytes(64)


def gguf_tensors(count: int) -> bytes:
    """So many empty tensors."""
    names = (f"blk.{n:06}.weight".encode() for n in range(count))
    return gguf(count=count, body=b"".join(struct.pack("<Q", 17) + n + struct.pack("<IQIQ", 1, 0, 0, 0) for n in names))


def gguf_fields(count: int) -> bytes:
    """So many fields with an array of 15 numbers each, which are read."""
    array = struct.pack("<IIQ", 9, 10, 15) + bytes(range(1, 121))
    return gguf(fields=count, body=b"".join(struct.pack("<Q", 6) + f"{n:06}".encode() + array for n in range(count)))


def manifest(count: int) -> bytes:
    """A manifest that names so many files."""
    data = json.loads(seeds.manifest())
    return json.dumps(
        {**data, "files": [{"path": f"{n}", "size_bytes": 1, "sha256": "a"} for n in range(count)]}
    ).encode()


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
SLOW = "(?i)" + "[a-\U0010ffff]" * 20
GOLDEN = "name: a\nprompts:\n" + "".join(
    f"  - {{id: a{n}, prompt: b, grade: {{kind: regex, pattern: '{SLOW}{n}'}}}}\n" for n in range(1000)
)

Case = tuple[Callable[[Path], object], Callable[[Path], object]]


def written(data: Callable[[], bytes]) -> Callable[[Path], object]:
    """A case whose file has these bytes."""
    return lambda path: path.write_bytes(data())


CASES: dict[str, Case] = {
    "safetensors header, 1,000,000 tensors": (written(lambda: tensors(1_000_000)), read_header),
    "safetensors header, empty lists": (written(lambda: framed(b"[" + b"[]," * 4_900_000 + b"[]]")), read_header),
    "safetensors header, 100 MB of lists": (written(lambda: framed(b"[" * 99_000_000)), read_header),
    "index and shard, 500,000 tensors": (with_index, lambda path: tensor_table(path.parent)),
    "tokenizer.json, 10,000,000 texts": (
        written(lambda: b"[" + b",".join(b'"%07x"' % n for n in range(9_900_000)) + b"]"),
        read_json,
    ),
    "tokenizer.json, nested 250 MB": (written(lambda: b'{"a":' * 15_000_000), read_json),
    "GGUF, 100,000 tensors": (written(lambda: gguf_tensors(100_000)), read_gguf),
    "GGUF, 65,536 fields of arrays": (written(lambda: gguf_fields(65_536)), read_gguf),
    "GGUF, 5,000,000 tokens": (
        written(lambda: gguf(1, 0, NAME + struct.pack("<IIQ", 9, 8, 5_000_000) + bytes(40_000_000))),
        read_gguf,
    ),
    "GGUF, a text of 120 MB": (
        written(lambda: gguf(1, 0, NAME + struct.pack("<IQ", 8, 120 * MIB) + b"x" * (120 * MIB))),
        read_gguf,
    ),
    "YAML, 1 MB of values": (written(lambda: b"[" + b"1," * 520_000 + b"]"), read_document),
    "YAML, 50,000 values": (written(lambda: b"- {a: b}\n" * 16_000), read_document),
    "YAML, 1 MB of text": (written(lambda: b"a: " + b"x y " * 262_000), read_document),
    "YAML, 1 MB of brackets": (written(lambda: b"[" * 1_048_000), read_document),
    "YAML, billion laughs": (written(BOMB.encode), read_document),
    "golden prompts, slow patterns": (written(GOLDEN.encode), lambda path: load_golden([path])),
    "manifest.json, 16 MB of files": (written(lambda: manifest(300_000)), read_manifest),
}  # fmt: skip


def measure(pipe: Connection, read: Callable[[Path], object], path: Path) -> None:
    """In a process of its own: read, and tell what it took."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        read(path)
        end = "read"
    except QuantizeError as exc:
        end = f"{type(exc).__name__}: {exc.message.splitlines()[0]}"
    seconds, peak = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send((seconds, (peak - before) / 1024, end))


def main() -> None:
    """Measure the cases that are named, or all."""
    context = multiprocessing.get_context("fork")
    print(f"{'case':40}{'file':>12}{'processor':>12}{'memory':>12}  end")
    for name, (write, read) in CASES.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / (INDEX_NAME if "index" in name else "file")
            writer = context.Process(target=write, args=(path,))  # whose memory goes with it
            writer.start()
            writer.join()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(theirs, read, path))
            process.start()
            seconds, peak, end = ours.recv()
            process.join()
            size = sum(item.stat().st_size for item in Path(folder).iterdir()) / MIB
        print(
            f"{name:40}{size:8.1f} MiB{seconds:10.2f} s{peak:8.0f} MiB  {end.replace(str(path), path.name)[:90]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
