"""Tiny random checkpoints of models that read images beside text, as transformers saves them.

In: a kind. Out: a folder with config.json, bfloat16 weights of a decoder and a tower, tokenizer and
preprocessor_config.json. The same kind gives the same bytes.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.testing import write_json
from tests.families import VOCABULARY, Tokenizer, write_family_tokenizer

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
    "vision_use_head": False,
}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}


@dataclass(frozen=True)
class Wrapper:
    """A class of transformers that reads images, its config class, and a tiny config's settings.

    towers: how names of tensors begin that text does not pass. modules: those that loaders are told to leave alone.
    """

    architecture: str
    config: str
    settings: dict[str, Any]
    tokenizer: Tokenizer
    towers: tuple[str, ...]
    modules: tuple[str, ...]
    processor: str

    @property
    def pre_tokenizer(self) -> dict[str, Any]:
        """What a recipe must say of the tokenizer: a tiny vocabulary has none of the hashes that are known."""
        return {"pre_tokenizer": "qwen2"} if self.tokenizer == "qwen2" else {}


GEMMA_3 = Wrapper(
    "Gemma3ForConditionalGeneration",
    "Gemma3Config",
    {
        "text_config": {**_TEXT, "head_dim": 64, "sliding_window": 8, "query_pre_attn_scalar": 64},
        "vision_config": _SIGLIP, "mm_tokens_per_image": 4, "boi_token_index": 5, "eoi_token_index": 6,
        "image_token_index": 7, "tie_word_embeddings": True,
    },
    "sentencepiece",
    ("vision_tower.", "multi_modal_projector."),
    ("vision_tower", "multi_modal_projector"),
    "Gemma3ImageProcessor",
)  # fmt: skip
QWEN_2_5_VL = Wrapper(
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen2_5_VLConfig",
    {
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
        "vision_config": {
            "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 256,
            "fullatt_block_indexes": [1], "window_size": 56,
        },
        "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8,
        "tie_word_embeddings": False,
    },
    "qwen2",
    ("visual.",),
    ("visual",),
    "Qwen2VLImageProcessor",
)  # fmt: skip


def make_wrapper(kind: Wrapper, folder: Path) -> None:
    """Write the tiny checkpoint into a new folder."""
    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, kind.config)(**kind.settings)
        torch.manual_seed(1)
        model = getattr(transformers, kind.architecture)._from_config(config, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() == 1:
                    parameter.add_(noise * 0.1)
                else:
                    parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            if config.tie_word_embeddings:
                model.get_decoder().norm.weight.add_(3)
            else:
                model.get_output_embeddings().weight.mul_(2)
        model.to(torch.bfloat16).save_pretrained(folder)
    write_family_tokenizer(kind.tokenizer, folder)
    if kind.tokenizer == "sentencepiece":
        _without_space_before(folder)
    write_json(
        folder / "preprocessor_config.json",
        {"image_processor_type": kind.processor, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
         "image_seq_length": 4, "min_pixels": 3136, "max_pixels": 12544, "patch_size": 14, "merge_size": 2,
         "temporal_patch_size": 2},
    )  # fmt: skip


def _without_space_before(folder: Path) -> None:
    """As Gemma has it: a text's first word is read as it stands."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    settings["decoder"]["decoders"] = [item for item in settings["decoder"]["decoders"] if item["type"] != "Strip"]
    write_json(path, settings)
    model = proto.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
