"""A GGUF and an AWQ artifact on their whole way: built, published, deleted, pulled by digest, verified, served."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from quantize.testing import write_recipe
from tests.conftest import Run
from tests.publish.conftest import Registry
from tests.serving import ask, serving

pytest.importorskip("llama_cpp")
pytest.importorskip("gptqmodel", reason="needs the gptqmodel extra")
VARIANTS = [{"format": "gguf", "type": "Q8_0"}, {"format": "awq", "group_size": 64}]
CALIBRATION = {
    "dataset": "text.txt", "samples": 4, "sequence_length": 64, "minimum_tokens": 16, "precision": "float32",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import
def test_built_published_deleted_pulled_verified_served(
    tiny: Path, registry: Registry, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(f"Line {n}: the quick brown fox jumps. " * 5 for n in range(6)))
    recipe = write_recipe(
        tmp_path / "tiny.yaml", tiny, VARIANTS, calibration=CALIBRATION, publish={"unevaluated": "tests its way only"}
    )
    assert run("build", recipe, "--no-eval").exit_code == 0
    names = ["tiny/q8_0", "tiny/awq-int4-g64"]
    result = run("publish", *names, "--to", f"oci://127.0.0.1:{registry.port}/e2e", "--json")
    assert result.exit_code == 0, result.stderr
    published = json.loads(result.stdout)
    shutil.rmtree(tmp_path / "artifacts")
    result = run("pull", *(item["reference"] for item in published))
    assert result.exit_code == 0, result.stderr
    assert "bytes" not in result.stdout
    result = run("verify", *names)
    assert (result.exit_code, result.stdout.count(": good")) == (0, 2), result.stderr
    again = json.loads(run("publish", *names, "--to", f"oci://127.0.0.1:{registry.port}/e2e", "--json").stdout)
    assert [item["sent_bytes"] for item in again] == [0, 0], "what came back is what went out"
    shutil.rmtree(tmp_path / "artifacts")
    assert run("pull", "--locked").exit_code == 0
    with serving(tmp_path, "--locked", "--store", os.environ["QUANTIZE_STORE"]) as url:
        for name in names:
            assert ask(url, name)["usage"]["completion_tokens"] == 4
