"""The model card of an artifact: README.md with the metadata that the Hugging Face Hub reads.

In: a manifest. Out: Markdown. Only what the manifest pins; measured figures are added by reports.
"""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from quantize.manifest import Manifest

USAGE: Mapping[str, str] = {
    "gguf": "llama-server -m {file}",
    "awq": "vllm serve <this folder>",
    "gptq": "vllm serve <this folder>",
    "bitsandbytes": "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('.')\"",
}
REASONS_SHOWN = 8


def render_card(manifest: Manifest) -> str:
    """README.md of an artifact, front matter included; the same manifest gives the same text."""
    title = f"{manifest.source.name} {manifest.variant}"
    parts = [_front_matter(manifest), f"# {title}", _summary(manifest), _files(manifest), _usage(manifest)]
    parts += [_kept(manifest), _provenance(manifest)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(manifest: Manifest) -> str:
    data: dict[str, object] = {"base_model_relation": "quantized", "tags": [manifest.format, "quantize"]}
    if manifest.source.base_model:
        data["base_model"] = manifest.source.base_model
    if manifest.source.license:
        data["license"] = manifest.source.license
    return f"---\n{yaml.safe_dump(data, sort_keys=True, allow_unicode=True)}---"


def _summary(manifest: Manifest) -> str:
    lines = [
        f"{manifest.source.name}, quantized to **{manifest.variant}** ({manifest.format}, "
        f"{manifest.bits_per_weight:.2f} bits per weight, {manifest.size_bytes / 1e6:,.1f} MB)."
    ]
    before = manifest.source.quantized_before
    if before:
        lines.append(
            f"The source was quantized before: its weights come from a {before} file and were dequantized to FP16. "
            "They can't be better than that file."
        )
    risk = manifest.accepted_risk
    if risk is not None:
        lines.append(f"**Refused by its gates ({', '.join(risk.gates)}) and taken all the same:** {risk.reason}")
    return "\n\n".join(lines)


def _files(manifest: Manifest) -> str:
    rows = [f"| {item.path} | {item.size_bytes:,} | `{item.sha256[:16]}…` |" for item in manifest.files]
    return "\n".join(["| file | bytes | sha256 |", "|---|---:|---|", *rows])


def _usage(manifest: Manifest) -> str:
    command = USAGE.get(manifest.format)
    if command is None:
        return ""
    main = next((item.path for item in manifest.files if item.path.endswith(".gguf")), "")
    return f"## Run it\n\n```\n{command.format(file=main)}\n```"


def _kept(manifest: Manifest) -> str:
    reasons: dict[str, int] = {}
    for item in manifest.kept_in_high_precision:
        key = f"{item.type}: {item.reason}"
        reasons[key] = reasons.get(key, 0) + 1
    if not reasons:
        return ""
    rows = [f"- {count} tensors in {reason}" for reason, count in sorted(reasons.items())[:REASONS_SHOWN]]
    return "## Kept in higher precision\n\n" + "\n".join(rows)


def _provenance(manifest: Manifest) -> str:
    lines = [
        f"- source: `{manifest.source.uri}`",
        f"- build key: `{manifest.build_key}`",
        *(f"- {name} {version}" for name, version in manifest.tools.items()),
    ]
    if manifest.calibration is not None:
        entry = manifest.calibration
        lines.insert(
            1, f"- calibration: {entry.sequences} sequences, {entry.tokens:,} tokens, hash `{entry.hash[:16]}…`"
        )
    return "## Made from\n\n" + "\n".join(lines)
