"""How a model writes tool calls, told from its chat template's text: the family's name, or nothing.

In: the template. Out: one of FAMILIES, or "". What a family's text looks like is known to who reads it: the gateway.
"""

from __future__ import annotations

FAMILIES = ("hermes", "mistral", "llama3")
OTHER_SYNTAX = ("<function=", "<arg_key>", "[ARGS]")  # Qwen3-Coder, GLM, Mistral since 2025: marks without JSON


def tool_style(template: str) -> str:
    """The family that a chat template is of; "" where it knows no tools, or writes calls in another way."""
    if "tools" not in template or any(mark in template for mark in OTHER_SYNTAX):
        return ""
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template and "arguments" in template:
        return "hermes"
    return "llama3" if '"parameters": ' in template and '"name": ' in template else ""
