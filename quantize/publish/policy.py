"""What may be published: what its gates took, or what the recipe says may go out without that, and says why.

In: an artifact and the `publish` section of its recipe. Out: what its card must say, or GateError.
"""

from __future__ import annotations

from pathlib import Path

from quantize.errors import GateError
from quantize.evaluate.decision import Verdict
from quantize.evaluate.metrics import Summary
from quantize.recipe.model import PublishPolicy
from quantize.recipe.yaml import read_document, validate
from quantize.store.artifact import REFUSED, Artifact
from quantize.store.manifest import RECIPE_NAME


def read_policy(path: Path) -> PublishPolicy:
    """The `publish` section of a recipe file; the strictest policy where it has none. Raises RecipeError."""
    document = read_document(path)
    if not isinstance(document.data, dict) or "publish" not in document.data:
        return PublishPolicy()
    return validate(PublishPolicy, document, at=("publish",))


def own_policy(artifact: Artifact) -> PublishPolicy:
    """The policy in the recipe that an artifact carries."""
    path = artifact.folder / RECIPE_NAME
    return read_policy(path) if path.is_file() else PublishPolicy()


def required_notice(artifact: Artifact, policy: PublishPolicy) -> str:
    """What the card of an artifact has to say about its gates; "" if nothing. Raises GateError: it may not go out."""
    if artifact.manifest.accepted_risk is not None:
        return ""  # the manifest says so, and the card that is made from it
    verdict = Summary.of(artifact.measurements()).verdict
    if artifact.folder.parent.name == REFUSED or verdict is Verdict.REFUSED:
        if policy.refused is None:
            raise GateError(
                f"{artifact.ref} was refused by its gates, so it is not published",
                hint="build it with --accept-risk, or say why in the recipe: `publish: {refused: REASON}`",
            )
        return f"> **Published although its gates refused it:** {policy.refused}"
    if verdict is Verdict.NOT_EVALUATED:
        if policy.unevaluated is None:
            raise GateError(
                f"{artifact.ref} was never evaluated, so it is not published",
                hint="measure it with `quantize eval`, or say why in the recipe: `publish: {unevaluated: REASON}`",
            )
        return f"> **Published without having been evaluated:** {policy.unevaluated}"
    return ""
