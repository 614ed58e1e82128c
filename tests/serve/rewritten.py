"""GGUF files of the suite's tiny model with another chat template, or with more blocks than it has."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter

TEMPLATE = "tokenizer.chat_template"


def rewritten(
    source: Path, target: Path, *, template: str | None = None, blocks: int | None = None, pre: str | None = None
) -> Path:
    """Write a copy. blocks: so many, each the first one's weights again. pre: the name of a pre-tokenizer."""
    reader = GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    changed = {TEMPLATE: template, f"{architecture}.block_count": blocks, "tokenizer.ggml.pre": pre}
    writer = GGUFWriter(target, architecture)
    for name, item in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = item.contents() if changed.get(name) is None else changed[name]
        is_list = item.types[0] is GGUFValueType.ARRAY
        writer.add_key_value(name, value, item.types[0], item.types[-1] if is_list else None)
    tensors = [
        (tensor.name, tensor) for tensor in reader.tensors if blocks is None or not tensor.name.startswith("blk.")
    ]
    for block in range(blocks or 0):
        first = [tensor for tensor in reader.tensors if tensor.name.startswith("blk.0.")]
        tensors += [(tensor.name.replace("blk.0.", f"blk.{block}."), tensor) for tensor in first]
    for name, tensor in tensors:
        writer.add_tensor(name, tensor.data, raw_shape=tensor.data.shape, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
