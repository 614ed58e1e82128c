"""How well builds spread over a Ray cluster: nodes of one core each, in processes of this machine.

    python -m benchmarks.scale pass [RECIPE] [--workers 1 2] [--repeat 1] [--trace FOLDER]
    python -m benchmarks.scale recipes [--count 10] [--nodes 2]
    python -m benchmarks.scale model

`pass` runs the calibration pass of a recipe (of the demo, if none is given), with its solves and shards, with each
number of workers, and prints JSON: seconds of the pass from its first task to its last write, of the step with its
start-up, efficiency against the first number, how long forward passes and solves were under way at once, the seconds of
each kind of work. Every file is compared with those of a pass without Ray. `recipes` builds many small recipes side by
side, and holds the time against the bound: the sum of all work over the number of nodes. `model` measures nothing: it
prints the tables of docs/scale.md from the cost model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.build.calibrate import run_pass
from quantize.build.execution import RunOptions
from quantize.build.plan import make_plan
from quantize.build.spread.cost import BlockCost, block_costs
from quantize.build.spread.trace import Span, read_trace
from quantize.calibration.spread import PassSpread
from quantize.cluster.units import ClusterOptions, execute_on_cluster
from quantize.events import SilentReporter
from quantize.formats import builders, option_models
from quantize.formats.base import Context, RunLimits
from quantize.model.source import open_source, pin_source
from quantize.recipe.model import Recipe, load_recipe
from quantize.store.staging import RESUME_NAME
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache, default_cache_root, hash_file
from quantize.testing import TinyModel, make_checkpoint, write_recipe

DEMO = Path(__file__).resolve().parents[1] / "recipes" / "smollm2-135m.yaml"
STORE_BYTES = 512 << 20
LLAMAS = {"8B": (4096, 14336, 32, 32, 8), "70B": (8192, 28672, 80, 64, 8), "405B": (16384, 53248, 126, 128, 8)}
TOKENS = 128 * 2048
SHARES = 2 * (128 // 32)  # a sequence of 2048 tokens is a batch
GPUS_A_NODE = 8


@dataclass(frozen=True)
class Rates:
    """What a GPU and its surroundings are taken to reach, per second. Assumptions, not measurements.

    bf16, fp32: operations of matrix products. elementwise: weights of a clip search, with all its candidates. network:
    bytes out of or into a node. store: bytes between a GPU and its node's object store. storage: bytes of shared
    storage, for the whole cluster.
    """

    bf16: float = 400e12  # of 989 on paper
    fp32: float = 40e12  # of 67
    elementwise: float = 2.4e9  # a hundred operations that read and write 10 bytes each, at 2.4 of 3.35 TB/s
    network: float = 40e9  # of 50: 400 Gbit/s
    store: float = 10e9
    storage: float = 5e9


def overlap_seconds(one: Sequence[Span], other: Sequence[Span]) -> float:
    """Time in which at least one span of each kind was under way."""
    moments = [(span.start, 0, 1) for span in one] + [(span.end, 0, -1) for span in one]
    moments += [(span.start, 1, 1) for span in other] + [(span.end, 1, -1) for span in other]
    running, before, total = [0, 0], 0.0, 0.0
    for moment, which, change in sorted(moments):
        if min(running) > 0:
            total += moment - before
        running[which] += change
        before = moment
    return total


@contextlib.contextmanager
def cluster_of(count: int) -> Iterator[str]:
    """Nodes of one core each; the address of the head."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # as nice as a build without Ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=node)
    for _ in range(count - 1):
        made.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    try:
        yield made.address
    finally:
        made.shutdown()


def one_pass(recipe: Recipe, work: Path, workers: int | None, trace: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The calibration pass of a recipe with its solves and shards; workers None: without Ray, on one thread."""
    cache, reporter = Cache(default_cache_root()), SilentReporter()
    source = pin_source(recipe, cache, reporter)
    checkpoint = open_source(source, cache, reporter)
    with contextlib.ExitStack() as held:
        root = Path(held.enter_context(tempfile.TemporaryDirectory(dir=work)))
        spread = None
        if workers is not None:
            spread = PassSpread(held.enter_context(cluster_of(workers)), workers, 1, trace=trace)
        variants = []
        for item in recipe.variants:
            if builders()[item.format].needs_calibration(item.options):
                folders = [root / item.name, root / f"{item.name}.scratch"]
                for folder in (*folders, root / "pass"):
                    folder.mkdir(exist_ok=True)
                limits = RunLimits(1, spread=spread)
                context = Context(item.name, item.options, source, checkpoint, cache, *folders, limits)
                variants.append((item.format, context))
        started = time.perf_counter()
        passed = run_pass(recipe, variants, root / "pass", reporter)
        seconds = time.perf_counter() - started
        if passed.errors:
            sys.exit(str(passed.errors))
        files = [path for path in sorted(root.glob("*/*")) if path.parent.name != "pass" and path.name != RESUME_NAME]
        found = {f"{path.parent.name}/{path.name}": hash_file(path) for path in files}
    result: dict[str, Any] = {"workers": workers, "step_seconds": round(seconds, 1)}
    return (result | timeline(read_trace(trace)) if spread else result), found


def timeline(spans: list[Span]) -> dict[str, Any]:
    """What a trace says."""
    by_kind: dict[str, list[Span]] = {}
    for span in spans:
        by_kind.setdefault(span.kind, []).append(span)
    length = max(span.end for span in spans) - min(span.start for span in spans)
    workers = {span.worker for span in spans if span.worker != "writer"}
    busy = sum(span.seconds for span in spans if span.worker != "writer")
    return {
        "pass_seconds": round(length, 2),
        "overlap_seconds": round(overlap_seconds(by_kind["forward"], by_kind["solve"]), 2),
        "busy": round(busy / length / len(workers), 3),
        **{f"{kind}_seconds": round(sum(span.seconds for span in found), 2) for kind, found in by_kind.items()},
    }


def measure_pass(asked: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every number of workers, the best of some repeats each."""
    recipe = load_recipe(asked.recipe, option_models())
    alone, expected = one_pass(recipe, work, None, work)
    runs: list[dict[str, Any]] = []
    for workers in asked.workers:
        found = []
        for number in range(asked.repeat):
            trace = (asked.trace or work) / f"scale-{workers}-{number}.json"
            result, got = one_pass(recipe, work, workers, trace)
            found.append(result | {"files_equal": got == expected})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
        runs.append(min(found, key=lambda item: item["pass_seconds"]))
    for key in ("pass", "step"):
        for item in runs:
            first = runs[0]
            ideal = first[f"{key}_seconds"] * first["workers"] / item["workers"]
            item[f"{key}_efficiency"] = round(ideal / item[f"{key}_seconds"], 3)
    return {"without_ray_seconds": alone["step_seconds"], "runs": runs}


def measure_recipes(asked: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Many recipes; the bound is what no schedule on so many nodes can beat."""
    (work / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 600)
    calibration = {"dataset": "text.txt", "samples": 32, "sequence_length": 64, "minimum_tokens": 16}
    variants = [{"format": "gguf", "type": "Q4_K_M", "imatrix": True}]
    recipes = []
    for number in range(asked.count):
        model = TinyModel(hidden=512, intermediate=1024, blocks=1 + number % 4, seed=number)
        checkpoint = make_checkpoint(work / f"model-{number}", model)
        path = write_recipe(work / f"model-{number}.yaml", checkpoint, variants, calibration=calibration)
        recipes.append(load_recipe(path, option_models()))
    trace = work / "recipes.json"
    with cluster_of(asked.nodes) as address:
        started = time.time()
        options = ClusterOptions(address, trace=trace)
        workspace = Workspace(Store(work / "store"), Cache(work / "cache"), SilentReporter())
        plans = [make_plan(recipe, workspace, evaluate=False) for recipe in recipes]
        pairs = execute_on_cluster(plans, workspace, RunOptions(), options)
        command = time.time() - started
    failed = [str(outcome.error) for _, outcome in pairs if outcome.error is not None]
    if failed:
        sys.exit("\n".join(failed))
    spans = read_trace(trace)
    total = max(span.end for span in spans) - min(span.start for span in spans)
    bound = sum(span.seconds for span in spans) / asked.nodes
    return {
        "builds": len(spans), "nodes": asked.nodes, "seconds": round(total, 1), "bound_seconds": round(bound, 1),
        "over_bound": round(total / bound, 3), "command_seconds": round(command, 1),
        "longest_idle_seconds": round(longest_idle(spans), 2),
    }  # fmt: skip


def llama(hidden: int, intermediate: int, _blocks: int, heads: int, kv_heads: int) -> BlockCost:
    """The cost of one block of a Llama."""
    config = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": hidden,
        "intermediate_size": intermediate, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
    }  # fmt: skip
    narrow = hidden // heads * kv_heads
    linears = {"q": (hidden, hidden), "k": (narrow, hidden), "v": (narrow, hidden), "o": (hidden, hidden)}
    shapes = {f"self_attn.{name}_proj": shape for name, shape in linears.items()}
    shapes |= {f"mlp.{name}_proj": (intermediate, hidden) for name in ("gate", "up")}
    shapes["mlp.down_proj"] = (hidden, intermediate)
    return block_costs(config, {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}, TOKENS)[0]


def model_table() -> str:
    """Markdown: what a block costs, and what that takes on GPUs that do as Rates says."""
    rates, rows = Rates(), []
    for name, shape in LLAMAS.items():
        cost, blocks = llama(*shape), shape[2]
        weights = cost.weight_bytes / 4
        solve = {
            "gptq": cost.clip_weights / rates.elementwise + cost.gptq_products / rates.fp32,
            "awq": cost.clip_weights / rates.elementwise + cost.awq_products / rates.fp32,
        }
        cells = [
            f"{cost.forward / 1e15:.2f}", f"{cost.gram / 1e15:.2f}", f"{cost.gptq_products / 1e15:.3f}",
            f"{cost.awq_products / 1e15:.3f}", f"{weights / 1e9:.2f}", f"{cost.gram_bytes / 1e9:.2f}",
            f"{cost.state_bytes / 1e9:.1f}",
        ]  # fmt: skip
        rows.append((name, blocks, cells, cost, solve))
    lines = ["| a block of | forward | Gram | GPTQ | AWQ | weights | Gram, GB | states, GB |", "|---|" + "---:|" * 7]
    lines += [f"| {name} ({blocks} blocks) | {' | '.join(cells)} |" for name, blocks, cells, _, _ in rows]
    lines += ["", "| minutes of a pass (bound by) | 1 GPU | a node of 8 | 64 nodes of 8 |", "|---|" + "---:|" * 3]
    for name, blocks, _, cost, solve in rows:
        times = [pass_seconds(cost, solve, gpus, rates) for gpus in (1, 8, 64 * GPUS_A_NODE)]
        cells = [f"{blocks * seconds / 60:.1f} ({bound})" for seconds, bound in times]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pass_seconds(cost: BlockCost, solve: dict[str, float], gpus: int, rates: Rates) -> tuple[float, str]:
    """Seconds a block of a pass for GPTQ and AWQ, and what bounds it: its stages overlap, the slowest one decides."""
    forward = min(gpus, SHARES)
    through = cost.forward / rates.bf16 + cost.gram / rates.fp32 + cost.gram_bytes * SHARES / rates.store
    work = (through + sum(solve.values())) / gpus
    chain = through / forward
    collect = cost.gram_bytes * SHARES / (rates.network if gpus > GPUS_A_NODE else rates.store)
    readers = 1 if gpus <= GPUS_A_NODE else SHARES + len(solve)  # nodes that read a block's weights, of two bytes each
    storage = (cost.state_bytes + readers * cost.weight_bytes / 2) / rates.storage
    stages = {
        "all work": work, "the forward pass of a share": chain, "collecting the sums": collect,
        "shared storage": storage,
    }  # fmt: skip
    worst = max(stages, key=lambda name: stages[name])
    return stages[worst], worst


def longest_idle(spans: list[Span]) -> float:
    """The longest time for which a node had nothing to do while a build had not begun."""
    last_start, longest = max(span.start for span in spans), 0.0
    for node in {span.node for span in spans}:
        own = sorted((span for span in spans if span.node == node), key=lambda span: span.start)
        ends = [min(span.start for span in spans), *(span.end for span in own)]
        starts = [*(span.start for span in own), last_start]
        gaps = [min(start, last_start) - end for end, start in zip(ends, starts, strict=True)]
        longest = max(longest, *gaps)
    return longest


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("pass")
    one.add_argument("recipe", type=Path, nargs="?", default=DEMO)
    one.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    one.add_argument("--repeat", type=int, default=1)
    one.add_argument("--trace", type=Path, help="folder to keep the timelines in")
    many = kinds.add_parser("recipes")
    many.add_argument("--count", type=int, default=10)
    many.add_argument("--nodes", type=int, default=2)
    kinds.add_parser("model")
    asked = parser.parse_args()
    if asked.kind == "model":
        print(model_table())
        return
    with tempfile.TemporaryDirectory(prefix="quantize-scale-") as folder:
        measure = measure_pass if asked.kind == "pass" else measure_recipes
        print(json.dumps(measure(asked, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
