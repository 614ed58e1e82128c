"""What GGUF makes of every decoder family: plan, convert, quantize, load, and llama.cpp's logits against transformers'.

In: a family of tests/families.py and an empty folder. Out: its row of docs/architectures.md. `python -m tests.canary`
writes the page, or with names of families their rows of it; tests/test_families.py measures each row again.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantize.errors import PlanError, QuantizeError
from quantize.events import Reporter, SilentReporter
from quantize.runtimes.llama_cpp.convert import ConvertRequest, convert
from quantize.runtimes.llama_cpp.model import BatchToken, ModelSettings, OpenModel
from quantize.runtimes.llama_cpp.quantize import QuantizeSettings, convert_and_size, quantize
from quantize.system.process import run_step
from tests.families import FAMILIES, Family, make_family

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
PROMPT = [12 + (7 * place * place + 11 * place + 5) % 370 for place in range(16)]  # none of them a special token
EXACT_KL, Q8_KL = 0.002, 0.01
STAGES = ("plan", "convert", "quantize", "load")


@dataclass(frozen=True)
class Row:
    """How far a family comes, and how far llama.cpp's answers are from transformers' then.

    stage: the one that failed, or None. reason: its first line. exact, kl: mean divergence in nats over the prompt's
    places, of the converted file and of its Q8_0. top: whether Q8_0 has the same most likely token after the prompt.
    """

    family: Family
    stage: str | None = None
    reason: str = ""
    exact: float = float("nan")
    kl: float = float("nan")
    top: bool = False

    @property
    def right(self) -> bool:
        """Whether an artifact of this family answers as the model does."""
        return self.stage is None and self.exact < EXACT_KL and self.kl < Q8_KL and self.top

    @property
    def refused(self) -> bool:
        """Whether `quantize plan` says that it can't be built."""
        return self.stage == "plan"

    def cells(self) -> list[str]:
        """The row's cells in the page."""
        stages = STAGES if self.stage is None else STAGES[: STAGES.index(self.stage)]
        done = ["yes" if stage in stages else "" for stage in STAGES]
        if self.stage is not None:
            done[STAGES.index(self.stage)] = "refused" if self.refused else "no"
        figures = ["", "", ""]
        if self.stage is None:
            figures = [f"{self.exact:.4f}", f"{self.kl:.4f}", "same" if self.top else "another"]
        return [self.family.name, f"`{self.family.architecture}`", *done, *figures, self.reason]


def measure(family: Family, folder: Path) -> Row:
    """Take the family's tiny checkpoint through the whole way, in a new folder."""
    import torch

    model = make_family(family, folder / "checkpoint")
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPT])).logits[0].numpy()
    reporter, stage = SilentReporter(), "plan"
    request = ConvertRequest(folder / "checkpoint", "F32", {"general.name": "tiny"}, family.pre_tokenizer)
    files = folder / "tiny-F32.gguf", folder / "tiny-Q8_0.gguf"
    job = QuantizeSettings("Q8_0")
    try:
        (sized,) = convert_and_size(reporter, request, folder / "headers.gguf", [job])
        if isinstance(sized, QuantizeError):
            raise sized
        stage = "convert"
        convert(reporter, request, files[0])
        stage = "quantize"
        quantize(reporter, files[0], files[1], job)
        assert abs(files[1].stat().st_size - sized.file_bytes) <= 32, "the plan's size is not the file's"
        stage = "load"
        plain, packed = run_step("running", reporter, logits_of, files)
    except PlanError as exc:
        return Row(family, stage, exc.message)
    except QuantizeError as exc:
        return Row(family, "convert" if stage == "plan" else stage, exc.message)  # no refusal, whenever it comes
    top = bool(packed[-1].argmax() == wanted[-1].argmax())
    return Row(family, exact=divergence(wanted, plain), kl=divergence(wanted, packed), top=top)


def logits_of(reporter: Reporter, files: Iterable[Path]) -> list[Any]:
    """llama.cpp's logits of the prompt, float32 [places, vocabulary], of each file. For a worker: it may abort."""
    found = []
    for file in files:
        model = OpenModel(file, ModelSettings(context=64, threads=1))
        model.decode(BatchToken(token, place, 0, True) for place, token in enumerate(PROMPT))
        found.append(model.logits(len(PROMPT)).copy())
        model.close()
    return found


def divergence(wanted: Any, found: Any) -> float:
    """Mean over rows of KL(wanted, found) in nats, of two [rows, vocabulary] of logits."""
    first, second = (_log_softmax(np.asarray(logits, np.float64)) for logits in (wanted, found))
    return float((np.exp(first) * (first - second)).sum(axis=1).mean())


def _log_softmax(logits: Any) -> Any:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def rows_of_page(text: str) -> dict[str, list[str]]:
    """The cells of each row of the page, by family."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and "`" in line]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row for row in rows}


def main(names: Collection[str] = ()) -> None:
    """Measure every family, or those named, and write the table of docs/architectures.md; the text before it stays."""
    text = PAGE.read_text(encoding="utf-8")
    rows = rows_of_page(text)
    for family in FAMILIES:
        if not names or family.name in names or family.name not in rows:
            with tempfile.TemporaryDirectory() as folder:
                rows[family.name] = measure(family, Path(folder)).cells()
            print(" | ".join(rows[family.name]), flush=True)
    header = ["family", "architecture", *STAGES, "KL of the conversion", "KL of Q8_0", "top token", "why not"]
    table = [header, ["---"] * len(header), *(rows[family.name] for family in FAMILIES)]
    before = text.partition("| family |")[0]
    PAGE.write_text(before + "".join(f"| {' | '.join(row)} |\n" for row in table), encoding="utf-8")


if __name__ == "__main__":
    from tests import canary  # a worker finds no function of the module __main__

    canary.main(sys.argv[1:])
