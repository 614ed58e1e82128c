"""A tiny random checkpoint of every decoder family in docs/architectures.md, as transformers saves it.

In: a family. Out: a folder with config.json, float32 weights of two blocks (or as many as have each kind of layer), and
a tokenizer of the family's kind that really works. The same family gives the same bytes. Weights are spread widely
enough, norms far enough from one and biases from zero, for a wrong rotation, norm or bias to change the answer.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from quantize.testing import CHAT_TEMPLATE, TOKENIZER_TEXT, write_json, write_tokenizer

VOCABULARY = 384
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL_SPECIALS = (
    "<|endoftext|>", "<|startoftext|>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "[gMASK]", "<|pad|>", "<unk>",
)  # fmt: skip
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
Tokenizer = Literal["llama", "sentencepiece", "qwen2"]


@dataclass(frozen=True)
class Family:
    """One row: the class of transformers, its config class, and what its tiny config adds to the common one.

    tokenizer: `llama` is byte-fallback BPE in tokenizer.json; `sentencepiece` has the same as tokenizer.model too;
    `qwen2` is byte-level BPE with Qwen2's rules.
    seed: of the weights; chosen where another one puts two experts so near each other that a rounding swaps them.
    gain: of every matrix; below one where a family's blocks would else amplify the error of Q8_0 beyond what is judged.
    """

    name: str
    architecture: str
    config: str
    extra: dict[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer = "qwen2"
    seed: int = 0
    gain: float = 1.0

    @property
    def pre_tokenizer(self) -> str | None:
        """What must be said to the converter: a tiny vocabulary has none of the hashes that it knows."""
        return "qwen2" if self.tokenizer == "qwen2" else None


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SHARED = {"shared_expert_intermediate_size": 96, "decoder_sparse_step": 1}
_LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
    "v_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_DELTA = {
    "num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 16,
}  # fmt: skip
_WINDOW = {"head_dim": 32, "sliding_window": 8}
ROWS: tuple[Family, ...] = (
    Family("Llama", "LlamaForCausalLM", "LlamaConfig", {"attention_bias": False}, "llama"),
    Family("Mistral", "MistralForCausalLM", "MistralConfig", {"head_dim": 32, "sliding_window": None}, "llama"),
    Family("Ministral", "MinistralForCausalLM", "MinistralConfig", {**_WINDOW}, "llama"),
    Family("Ministral 3", "Ministral3ForCausalLM", "Ministral3Config", {"head_dim": 32}, "llama"),
    Family(
        "Mistral 3",
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": {**_COMMON, "model_type": "mistral", "head_dim": 32, "sliding_window": None},
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 64,
                "patch_size": 16,
                "head_dim": 32,
            },
            "image_token_index": 11,
            "tie_word_embeddings": False,
            "spatial_merge_size": 2,
        },
        "llama",
    ),
    Family("Mixtral", "MixtralForCausalLM", "MixtralConfig", {**_LOCAL_EXPERTS}, "llama"),
    Family("Qwen2", "Qwen2ForCausalLM", "Qwen2Config", {}),
    Family("Qwen2-MoE", "Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**_EXPERTS, **_SHARED}),
    Family("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 32}),
    Family("Qwen3-MoE", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    Family("Qwen3-Next", "Qwen3NextForCausalLM", "Qwen3NextConfig", {**_EXPERTS, **_SHARED, **_DELTA}),
    Family("Qwen3.5", "Qwen3_5ForCausalLM", "Qwen3_5TextConfig", {**_DELTA}),
    Family("Qwen3.5-MoE", "Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", {**_EXPERTS, **_SHARED, **_DELTA}),
    Family("Gemma", "GemmaForCausalLM", "GemmaConfig", {"head_dim": 32, "tie_word_embeddings": True}, "sentencepiece"),
    Family(
        "Gemma 2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_WINDOW, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
        "sentencepiece",
    ),
    Family(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_WINDOW, "query_pre_attn_scalar": 32, "tie_word_embeddings": True, "num_hidden_layers": 6},
        "sentencepiece",
    ),
    Family(
        "Gemma 3n",
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            **_WINDOW,
            "tie_word_embeddings": True,
            "num_hidden_layers": 5,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 256,
            "num_kv_shared_layers": 0,
            "laurel_rank": 64,
            "intermediate_size": 192,
            "activation_sparsity_pattern": [0.95] * 5,
        },
        "sentencepiece",
    ),
    Family(
        "Gemma 4",
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            **_WINDOW,
            "tie_word_embeddings": True,
            "num_hidden_layers": 6,
            "global_head_dim": 64,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 32,
        },
        "sentencepiece",
    ),
    Family("Phi-3", "Phi3ForCausalLM", "Phi3Config", {}, "sentencepiece"),
    Family("gpt-oss", "GptOssForCausalLM", "GptOssConfig", {**_LOCAL_EXPERTS, **_WINDOW}),
    Family("DeepSeek V2", "DeepseekV2ForCausalLM", "DeepseekV2Config", {**_LATENT}),
    Family("DeepSeek V3", "DeepseekV3ForCausalLM", "DeepseekV3Config", {**_LATENT, "n_group": 1, "topk_group": 1}),
    Family("GLM", "GlmForCausalLM", "GlmConfig", {"head_dim": 32}),
    Family("GLM 4", "Glm4ForCausalLM", "Glm4Config", {"head_dim": 32}),
    Family(
        "GLM-4-MoE",
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {
            "head_dim": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    Family("OLMo", "OlmoForCausalLM", "OlmoConfig", {}),
    Family("OLMo 2", "Olmo2ForCausalLM", "Olmo2Config", {}),
    Family("OLMo 3", "Olmo3ForCausalLM", "Olmo3Config", {"sliding_window": 8, "num_hidden_layers": 4}),
    Family(
        "OLMoE",
        "OlmoeForCausalLM",
        "OlmoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    ),
    Family("Granite", "GraniteForCausalLM", "GraniteConfig", {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
    Family("Granite-MoE", "GraniteMoeForCausalLM", "GraniteMoeConfig", {**_LOCAL_EXPERTS}),
    Family(
        "Granite hybrid",
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {**_LOCAL_EXPERTS, **_MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 96},
    ),
    Family("Cohere", "CohereForCausalLM", "CohereConfig", {"tie_word_embeddings": True, "logit_scale": 1.0}),
    Family(
        "Cohere 2",
        "Cohere2ForCausalLM",
        "Cohere2Config",
        {**_WINDOW, "num_hidden_layers": 4, "tie_word_embeddings": True, "logit_scale": 1.0},
    ),
    Family(
        "Falcon",
        "FalconForCausalLM",
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False},
    ),
    Family("Falcon-H1", "FalconH1ForCausalLM", "FalconH1Config", {**_MAMBA, "mamba_d_ssm": 256, "head_dim": 32}),
    Family("StableLM", "StableLmForCausalLM", "StableLmConfig", {"use_qkv_bias": True}),
    Family("SmolLM3", "SmolLM3ForCausalLM", "SmolLM3Config", {"num_hidden_layers": 4}),
    Family("StarCoder2", "Starcoder2ForCausalLM", "Starcoder2Config", {}),
    Family(
        "EXAONE 4",
        "Exaone4ForCausalLM",
        "Exaone4Config",
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    ),
    Family("ERNIE 4.5", "Ernie4_5ForCausalLM", "Ernie4_5Config", {"head_dim": 32}, "sentencepiece"),
    Family(
        "ERNIE 4.5-MoE",
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 96,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
        "sentencepiece",
    ),
    Family("Hunyuan", "HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", {"head_dim": 32}),
    Family("LFM2", "Lfm2ForCausalLM", "Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    Family(
        "LFM2-MoE",
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {**_EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "tie_word_embeddings": True},
    ),
    Family("Nemotron", "NemotronForCausalLM", "NemotronConfig", {"head_dim": 32}, "sentencepiece"),
    Family(
        "MiniMax",
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        {**_LOCAL_EXPERTS, "head_dim": 32, "layer_types": ["linear_attention", "full_attention"]},
    ),
    Family(
        "MiniMax-M2", "MiniMaxM2ForCausalLM", "MiniMaxM2Config", {**_LOCAL_EXPERTS, "head_dim": 32, "rotary_dim": 16}
    ),
    Family("Bamba", "BambaForCausalLM", "BambaConfig", {**_MAMBA, "attn_layer_indices": [1]}),
    Family("Seed-OSS", "SeedOssForCausalLM", "SeedOssConfig", {"head_dim": 32}),
    Family("Arcee", "ArceeForCausalLM", "ArceeConfig", {}, "llama"),
    Family("Apertus", "ApertusForCausalLM", "ApertusConfig", {}, "llama"),
    Family("GPT-2", "GPT2LMHeadModel", "GPT2Config", {"n_positions": 256, "tie_word_embeddings": True}),
    Family("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
    Family("BLOOM", "BloomForCausalLM", "BloomConfig", {"tie_word_embeddings": True}),
    Family("StarCoder", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", {"n_positions": 256, "tie_word_embeddings": True}),
    Family("Phi-2", "PhiForCausalLM", "PhiConfig", {"num_key_value_heads": 4, "intermediate_size": 512}),
    Family(
        "Phi-3.5-MoE",
        "PhimoeForCausalLM",
        "PhimoeConfig",
        {**_LOCAL_EXPERTS, "original_max_position_embeddings": 256, "lm_head_bias": True, "attention_bias": True},
        "sentencepiece",
    ),
    Family("Mamba", "MambaForCausalLM", "MambaConfig", {"state_size": 16, "intermediate_size": 256}),
    Family(
        "Mamba 2",
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {"intermediate_size": 256, "state_size": 16, "num_heads": 8, "head_dim": 32, "n_groups": 1, "chunk_size": 16},
    ),
    Family("Falcon-Mamba", "FalconMambaForCausalLM", "FalconMambaConfig", {"state_size": 16, "intermediate_size": 256}),
    Family(
        "Jamba",
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_EXPERTS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
        "llama",
    ),
    Family("Nemotron-H", "NemotronHForCausalLM", "NemotronHConfig", {"head_dim": 32}),
    Family(
        "Dots 1",
        "Dots1ForCausalLM",
        "Dots1Config",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 32,
            "num_key_value_heads": 4,
        },
    ),
    Family(
        "Llama 4",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**_LOCAL_EXPERTS, "head_dim": 32, "num_hidden_layers": 4, "intermediate_size_mlp": 192},
    ),
    Family(
        "Hunyuan-MoE",
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        {"num_experts": 4, "moe_topk": 2, "head_dim": 32},
    ),
    Family(
        "Granite-MoE shared",
        "GraniteMoeSharedForCausalLM",
        "GraniteMoeSharedConfig",
        {**_LOCAL_EXPERTS, "shared_intermediate_size": 96},
    ),
    Family("GLM-4-MoE lite", "Glm4MoeLiteForCausalLM", "Glm4MoeLiteConfig", {**_LATENT, "n_group": 1, "topk_group": 1}),
    Family(
        "MiniCPM 3",
        "MiniCPM3ForCausalLM",
        "MiniCPM3Config",
        {
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
            "num_key_value_heads": 4,
        },
        "sentencepiece",
    ),
    Family(
        "Youtu",
        "YoutuForCausalLM",
        "YoutuConfig",
        {
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
            "num_key_value_heads": 4,
        },
    ),
    Family(
        "Solar Open",
        "SolarOpenForCausalLM",
        "SolarOpenConfig",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 32,
        },
    ),
    Family("Jais 2", "Jais2ForCausalLM", "Jais2Config", {"head_dim": 32}),
    Family(
        "AFMoE",
        "AfmoeForCausalLM",
        "AfmoeConfig",
        {**_EXPERTS, "mup_enabled": True, "head_dim": 32, "num_hidden_layers": 4},
    ),
    Family("EXAONE MoE", "ExaoneMoeForCausalLM", "ExaoneMoeConfig", {**_EXPERTS, "head_dim": 32}),
    Family("MiMo V2 Flash", "MiMoV2FlashForCausalLM", "MiMoV2FlashConfig", {"head_dim": 32}),
    Family(
        "MPT", "MptForCausalLM", "MptConfig", {"tie_word_embeddings": True, "d_model": 128, "n_heads": 4, "n_layers": 2}
    ),
    Family("DeepSeek V3.2", "DeepseekV32ForCausalLM", "DeepseekV32Config", {**_LATENT, "n_group": 1, "topk_group": 1}),
    Family("OPT", "OPTForCausalLM", "OPTConfig", {"ffn_dim": 192, "word_embed_proj_dim": 128}),
    Family("Helium", "HeliumForCausalLM", "HeliumConfig", {"head_dim": 32}),
    Family("Cohere 2 MoE", "Cohere2MoeForCausalLM", "Cohere2MoeConfig", {"head_dim": 32}),
)


# Seeds other than 0, and gains other than 1.
SEEDS = {
    "Llama": 1,
    "Mistral": 1,
    "Qwen2": 2,
    "Qwen2-MoE": 3,
    "Qwen3-MoE": 2,
    "Qwen3-Next": 9,
    "Qwen3.5": 1,
    "Qwen3.5-MoE": 1,
    "Gemma 2": 1,
    "Gemma 3": 3,
    "DeepSeek V2": 1,
    "Granite": 1,
    "Granite-MoE": 2,
    "Granite hybrid": 7,
    "Cohere": 1,
    "ERNIE 4.5": 1,
    "LFM2": 2,
    "Nemotron": 1,
    "Seed-OSS": 2,
    "Apertus": 1,
    "Phi-2": 1,
    "Mamba 2": 1,
    "Granite-MoE shared": 2,
    "GLM-4-MoE lite": 1,
    "Solar Open": 8,
    "AFMoE": 2,
    "MPT": 1,
}
GAINS = dict.fromkeys(("Gemma 3n", "Gemma 4", "Qwen3-Next", "Qwen3.5", "Qwen3.5-MoE"), 0.4)
FAMILIES = tuple(replace(row, seed=SEEDS.get(row.name, 0), gain=GAINS.get(row.name, 1.0)) for row in ROWS)


def family_named(name: str) -> Family:
    """The row of that name."""
    return next(family for family in FAMILIES if family.name == name)


def make_family(family: Family, folder: Path) -> Any:
    """Write the family's tiny checkpoint into a new folder; returns the float32 model that was saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers and its plugins warn on import
        model = tiny_model(family)
        model.save_pretrained(folder)
    write_family_tokenizer(family.tokenizer, folder)
    return model


def tiny_model(family: Family) -> Any:
    """The seeded random model, float32, with every weight drawn anew so that it counts."""
    import torch
    import transformers

    config = getattr(transformers, family.config)(**({} if "text_config" in family.extra else _COMMON) | family.extra)
    torch.manual_seed(family.seed)
    model = getattr(transformers, family.architecture)._from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(family.seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(noise * 0.2)
            else:
                parameter.copy_(noise * (family.gain / math.sqrt(parameter.shape[-1])))
        for name, parameter in model.named_parameters():
            if family.config.startswith("Gemma") and name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.mul_(family.gain)  # without a scale of its own, attention is else so sharp that errors grow
        # A tied head would else answer with the token that it has just read.
        model.get_input_embeddings().weight.mul_(0.5 / family.gain)
        if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
            model.get_output_embeddings().weight.mul_(2 / family.gain)
        else:
            _final_norm(model).add_(3)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model


def _final_norm(model: Any) -> Any:
    """The weight of the norm before the head."""
    names = ("norm", "norm_f", "ln_f", "final_layernorm", "embedding_norm")
    (found,) = [
        parameter
        for name, parameter in model.named_parameters()
        if name.endswith(".weight") and name.split(".")[-2] in names and not any(map(str.isdecimal, name.split(".")))
    ]
    return found


def write_family_tokenizer(kind: Tokenizer, folder: Path) -> None:
    """Write the files of one kind of tokenizer, with at most VOCABULARY tokens and a chat template."""
    if kind == "qwen2":
        write_byte_level_tokenizer(folder)
        return
    write_tokenizer(folder, VOCABULARY)
    if kind == "sentencepiece":
        write_sentencepiece(folder)


def write_byte_level_tokenizer(folder: Path) -> None:
    """Byte-level BPE that splits a text as Qwen2 does."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(BYTE_LEVEL_SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TOKENIZER_TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|im_start|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_sentencepiece(folder: Path) -> None:
    """The vocabulary of tokenizer.json as tokenizer.model of SentencePiece: the earlier, the higher the score."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    model = proto.ModelProto()
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(vocabulary)
    kinds = {0: proto.ModelProto.SentencePiece.UNKNOWN, 1: proto.ModelProto.SentencePiece.CONTROL}
    kinds[2] = kinds[1]
    for number, piece in enumerate(sorted(vocabulary, key=vocabulary.__getitem__)):
        kind = proto.ModelProto.SentencePiece.BYTE if piece.startswith("<0x") else proto.ModelProto.SentencePiece.NORMAL
        model.pieces.add(piece=piece, score=-float(number), type=kinds.get(number, kind))
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
