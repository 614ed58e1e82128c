"""Guided statistics: what each token counts, against autograd over transformers' whole model with the same labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from quantize.calibration.block_runner import ROUND_BATCHES
from quantize.calibration.guide import Text, find_weights
from quantize.calibration.hidden_states import Batch
from quantize.calibration.stream import Precision, arranged, stream_blocks
from quantize.calibration.token_weights import BlockWeights, TokenWeights, WeightTable
from quantize.errors import BuildError, CheckpointError, Stopped
from quantize.events import ListReporter
from quantize.model.anatomy.build import take_plain_experts
from quantize.model.architecture import anatomy_of, block_layouts, check_gradient
from quantize.numerics.guidance import draw_labels, uniform_draws
from tests.architectures import SavedCheckpoint, save, tiny_model, token_ids
from tests.families import family_named, make_family

pytestmark = pytest.mark.filterwarnings("ignore")

SEED = 7
TOKENS = 60  # a batch
LENGTHS = (24, 17, 24, 31, 84)  # the last one's attention goes in pieces


def text_of(ids: list[list[int]]) -> Text:
    batches, sequences = arranged(ids, TOKENS)
    return Text(batches, sequences, uniform_draws(sum(map(len, ids)), SEED))


def weights(checkpoint: SavedCheckpoint, ids: list[list[int]], folder: Path, **options: Any) -> WeightTable:
    settings: dict[str, Any] = {"device": "cpu", "precision": "float32", "reporter": ListReporter(), **options}
    return find_weights(checkpoint, text_of(ids), folder, {"of": "a test"}, **settings)


# --- against the whole model ------------------------------------------------------------------------------------------


@dataclass
class Products(TorchFunctionMode):
    """Every product of a linear that a model computes, by the address of its weight: what it read and gave."""

    found: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            self.found.setdefault(args[1].data_ptr(), []).append((args[0], result))
        return result


def labels_of(logits: Tensor, draws: Tensor) -> Tensor:
    """By the definition: the first token up to which the probabilities sum to more than what was drawn."""
    sums = torch.softmax(logits.double(), -1).cumsum(-1)
    return (sums <= draws.double()[:, None] * sums[:, -1:]).sum(-1)


def oracle(model: Any, config: Any, text: Text) -> dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]]:
    """For each block and input: its tokens among all, what they read, and the sum of squares of the gradients at the
    outputs of its readers.
    """
    found: dict[tuple[int, str], list[tuple[Tensor, Tensor, Tensor]]] = {}
    places = [
        (batch, batch.start + number * batch.length) for batch in text.batches for number in range(len(batch.members))
    ]
    model.requires_grad_(False)
    blocks = model.get_submodule(anatomy_of(config).blocks)
    states: dict[int, Tensor] = {}  # that the routed experts of a block read

    def keep(index: int, _module: Any, inputs: Any) -> None:
        states[index] = inputs[0].detach().reshape(-1, inputs[0].shape[-1])

    for layout in block_layouts(config):
        if layout.experts is not None:
            routed = blocks[layout.index].get_submodule(layout.experts.module)
            routed.register_forward_pre_hook(partial(keep, layout.index))
    for sequence, (_, start) in zip(text.sequences, places, strict=True):
        embedded = model.get_input_embeddings()(sequence[None]).requires_grad_()
        with Products() as products:
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
        labels = labels_of(logits.detach(), text.draws[start : start + len(sequence)])
        outputs = [output for parts in products.found.values() for _, output in parts if output.requires_grad]
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
        squares = {
            id(output): gradient.detach().double().square().reshape(-1, gradient.shape[-1]).sum(-1)
            for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None
        }  # fmt: skip
        for layout in block_layouts(config):
            of_block(layout, blocks[layout.index], products, squares, states, start, found)
    return {
        where: tuple(torch.cat(column) for column in zip(*parts, strict=True)) for where, parts in found.items()
    }  # type: ignore[misc]


def of_block(
    layout: Any, block: Any, products: Products, squares: dict[int, Tensor], states: dict[int, Tensor], start: int,
    found: Any,
) -> None:  # fmt: skip
    every: dict[str, tuple[Tensor, Tensor]] = {}

    def read(module_weight: Tensor) -> tuple[Tensor, Tensor] | None:
        parts = products.found.get(module_weight.data_ptr())
        if parts is None:
            return None
        x, output = parts[0]
        return x.detach().reshape(-1, x.shape[-1]).double(), squares[id(output)]

    def add(key: str, x: Tensor, of_x: Tensor) -> None:
        every[key] = (x, every[key][1] + of_x if key in every else of_x)

    for key, readers in layout.inputs.items():
        for linear in readers:
            if linear.expert is None:
                path = layout.module_path(linear.tensor).removesuffix(".weight")
                add(key, *read(block.get_submodule(path).weight))  # type: ignore[misc]
    experts = layout.experts
    if experts is not None:
        fused, mixed = block.get_submodule(experts.module), states[layout.index].double()
        for expert in range(experts.count):
            inner, outer = read(fused.gate_up_proj[expert]), read(fused.down_proj[expert])
            if inner is None or outer is None:
                continue  # nobody chose it
            rows = (inner[0][:, None] == mixed[None]).all(-1).int().argmax(-1)
            add(experts.input, mixed, torch.zeros(len(mixed)).double().index_add(0, rows, inner[1]))
            keys = experts.expert_input.format(expert=expert), experts.output.format(expert=expert)
            for key, (x, of_x) in zip(keys, (inner, outer), strict=True):
                found.setdefault((layout.index, key), []).append((rows + start, x, of_x))
    for key, (x, of_x) in every.items():
        found.setdefault((layout.index, key), []).append((torch.arange(len(x)) + start, x, of_x))


def checkpoint_of(name: str, folder: Path) -> tuple[Any, SavedCheckpoint]:
    """A tiny model, in memory and on disk."""
    if name.endswith("ForCausalLM"):
        model = tiny_model(name)
        return model, save(model, folder)
    from transformers import AutoModelForCausalLM

    make_family(family_named(name), folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), SavedCheckpoint(folder)


MODELS = ("LlamaForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM", "LFM2")


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_weighted_gram_matrices_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    """Dense, with norms of 1 + w and capped logits, mixtures without and with a shared expert, a hybrid."""
    model, checkpoint = checkpoint_of(name, tmp_path)
    take_plain_experts(model)
    ids = token_ids(LENGTHS)
    text = text_of(ids)
    expected = oracle(model, checkpoint.config, text)
    table = weights(checkpoint, ids, tmp_path / "guide")
    guide, blocks = TokenWeights(table, (table,)), {}
    everything = Batch((0,), sum(LENGTHS), 0)
    for (block, key), (rows, _, squares) in expected.items():
        if block not in blocks:
            blocks[block] = guide.block(block, torch.device("cpu")).batch(everything)
        own = blocks[block][key]
        wanted = squares.sqrt()
        torch.testing.assert_close(own[rows].double(), wanted / wanted.mean(), rtol=2e-3, atol=2e-4)
        assert int(own.isfinite().sum()) == len(rows)
    assert set(blocks[0]) == {key for block, key in expected if block == 0}
    for found in stream_blocks(checkpoint, ids, tokens_per_batch=TOKENS, guide=guide):
        for key in set(found.inputs.values()):
            if (found.index, key) not in expected or "expert" in key:
                continue  # what experts lean on is looked at elsewhere
            _, x, squares = expected[found.index, key]
            w = squares.sqrt() / squares.sqrt().mean()
            gram = found.grams[key]
            scale = float(gram.matrix.abs().max())
            torch.testing.assert_close(gram.matrix.double(), (x * w[:, None]).T @ x, rtol=2e-3, atol=1e-4 * scale)
            assert gram.tokens == len(x)


def test_an_experts_gram_matrix_is_weighted_by_its_own_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.calibration.block_runner.SURE_TOKENS", 1)
    model = tiny_model("MixtralForCausalLM")
    checkpoint, ids = save(model, tmp_path), token_ids(LENGTHS)
    take_plain_experts(model)
    expected = oracle(model, checkpoint.config, text_of(ids))
    table = weights(checkpoint, ids, tmp_path / "guide")
    seen = 0
    for found in stream_blocks(checkpoint, ids, tokens_per_batch=TOKENS, guide=TokenWeights(table, (table,))):
        for key, gram in found.grams.items():
            if "expert" in key:
                _, x, squares = expected[found.index, key]
                w = squares.sqrt() / squares.sqrt().mean()
                scale = float(gram.matrix.abs().max())
                torch.testing.assert_close(gram.matrix.double(), (x * w[:, None]).T @ x, rtol=2e-3, atol=1e-4 * scale)
                seen += 1
    assert seen == 3 * 4 * 2


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_are_drawn_from_the_distribution() -> None:
    chances = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3])
    labels = draw_labels(chances.expand(20_000, 5), uniform_draws(20_000, 0))
    shares = torch.bincount(labels, minlength=5) / 20_000
    assert torch.allclose(shares, chances, atol=0.015)
    assert shares[0] == shares[3] == 0


def test_draws_are_the_seeds() -> None:
    assert torch.equal(uniform_draws(100, 3), uniform_draws(100, 3))
    assert not torch.equal(uniform_draws(100, 3), uniform_draws(100, 4))


# --- the same numbers, however they come about ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SavedCheckpoint:
    return save(tiny_model("LlamaForCausalLM"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def undisturbed(llama: SavedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    return dict(weights(llama, token_ids(), tmp_path_factory.mktemp("undisturbed")).sha256)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_number_of_threads_changes_no_bit(llama: SavedCheckpoint, tmp_path: Path, precision: Precision) -> None:
    before, ids = torch.get_num_threads(), token_ids() * 16
    assert len(text_of(ids).batches) > ROUND_BATCHES
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(weights(llama, ids, tmp_path / str(threads), precision=precision).sha256)
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def stopping(at: int) -> Callable[[], None]:
    """Raises when it is called the `at`-th time."""
    calls = iter(range(1, 1000))

    def after_block() -> None:
        if next(calls) == at:
            raise Stopped("stopped")

    return after_block


@pytest.mark.parametrize("kept_bytes", [1 << 40, 0])
def test_stopped_after_every_step_it_ends_with_the_same_weights(
    llama: SavedCheckpoint, tmp_path: Path, undisturbed: dict[int, str], kept_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also where inputs of blocks are not all kept, but computed again on the way back."""
    monkeypatch.setattr("quantize.calibration.budget.KEPT_BYTES", kept_bytes)
    stops = 0
    for _ in range(30):
        try:
            found = weights(llama, token_ids(), tmp_path, after_block=stopping(1))
            break
        except Stopped:
            stops += 1
    assert found.sha256 == undisturbed
    assert stops >= 2 * 3 + 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] + 4 * [".safetensors"]  # and the head's


@pytest.mark.parametrize("kind", ["inputs", "gradients", "weights"])
def test_what_is_damaged_is_made_again(
    llama: SavedCheckpoint, tmp_path: Path, undisturbed: dict[int, str], kind: str
) -> None:
    with pytest.raises(Stopped):
        weights(llama, token_ids(), tmp_path, after_block=stopping(3 + 1 + 2))
    damaged = sorted(tmp_path.glob(f"{kind}.*"))
    assert damaged
    for path in damaged:
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    assert weights(llama, token_ids(), tmp_path).sha256 == undisturbed


def test_another_pass_starts_over_and_says_why(llama: SavedCheckpoint, tmp_path: Path) -> None:
    weights(llama, token_ids(), tmp_path)
    said, options = ListReporter(), {"device": "cpu", "precision": "float32"}
    find_weights(llama, text_of(token_ids()), tmp_path, {"of": "another"}, reporter=said, **options)  # type: ignore[arg-type]
    assert 'of was "a test", is "another"' in "\n".join(event.text for event in said.events)


def test_fewer_inputs_are_kept_where_all_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setitem(__import__("tests.architectures").architectures._COMMON, "num_hidden_layers", 9)
    checkpoint = save(tiny_model("LlamaForCausalLM"), tmp_path / "deep")
    most: list[int] = []

    def count(folder: Path) -> Callable[[], None]:
        return lambda: most.append(len([*folder.glob("inputs.*")]))

    everything = weights(checkpoint, token_ids(), tmp_path / "all", after_block=count(tmp_path / "all"))
    assert max(most) == 9 + 1
    most.clear()
    monkeypatch.setattr("quantize.calibration.budget.KEPT_BYTES", 0)
    few = weights(checkpoint, token_ids(), tmp_path / "few", after_block=count(tmp_path / "few"))
    assert max(most) <= 3 + 3
    assert few.sha256 == everything.sha256


def test_a_share_has_the_weights_that_it_has_among_all(llama: SavedCheckpoint, tmp_path: Path) -> None:
    """What a cluster does: the means are over all shares, whoever found them."""
    ids = token_ids()
    whole = weights(llama, ids, tmp_path / "whole")
    text = text_of(ids)
    parts = []
    for number, batch in enumerate(text.batches):
        before = sum(len(other.members) for other in text.batches[:number])
        own = Text(
            [Batch(batch.members, batch.length, 0)], text.sequences[before : before + len(batch.members)],
            text.draws[batch.start : batch.start + batch.rows],
        )  # fmt: skip
        options: dict[str, Any] = {"device": "cpu", "precision": "float32", "reporter": ListReporter()}
        parts.append(find_weights(llama, own, tmp_path / str(number), {}, **options))
    device = torch.device("cpu")
    for block in range(3):
        expected: BlockWeights = TokenWeights(whole, (whole,)).block(block, device)
        for batch, part in zip(text.batches, parts, strict=True):
            found = TokenWeights(part, parts).block(block, device).batch(Batch(batch.members, batch.length, 0))
            for key, values in expected.batch(batch).items():
                assert torch.equal(found[key], values)


# --- what does not work, and says so ----------------------------------------------------------------------------------


def test_damage_after_the_weights_were_found_is_an_error(llama: SavedCheckpoint, tmp_path: Path) -> None:
    table = weights(llama, token_ids(), tmp_path)
    (tmp_path / "weights.00001.safetensors").write_bytes(b"")
    with pytest.raises(BuildError, match="damaged or gone"):
        TokenWeights(table, (table,)).block(1, torch.device("cpu"))


@pytest.fixture
def no_gradient() -> Iterator[None]:
    """A Llama whose attention nobody can train."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    before = LlamaAttention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return before(self, *args, **kwargs)

    LlamaAttention.forward = forward  # type: ignore[method-assign]
    yield
    LlamaAttention.forward = before  # type: ignore[method-assign]


def test_a_class_that_no_gradient_gets_through_is_refused(no_gradient: None, llama: SavedCheckpoint) -> None:
    config = {**llama.config, "rope_theta": 12_345.0}  # of which nothing is remembered
    with pytest.raises(CheckpointError, match=r"gives no guided statistics: no gradient gets to self_attn\.\w_proj"):
        check_gradient(config)


def test_classes_that_can_be_trained_are_not(llama: SavedCheckpoint) -> None:
    check_gradient(llama.config)


def losses_of(model: Any, text: Text) -> Iterator[tuple[Tensor, Tensor, Products, Tensor]]:
    """Of each sequence: its ids, what comes out of the embedding, all products of the model, and the loss that a guided
    pass has, over the whole model.
    """
    places = [batch.start + number * batch.length for batch in text.batches for number in range(len(batch.members))]
    for sequence, start in zip(text.sequences, places, strict=True):
        embedded = model.get_input_embeddings()(sequence[None]).requires_grad_()
        with Products() as products:
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
        labels = labels_of(logits.detach(), text.draws[start : start + len(sequence)])
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        yield sequence, embedded, products, loss


def squares_by_output(model: Any, config: Any, text: Text) -> dict[str, Tensor]:
    """For each linear outside of experts, by autograd over the whole model: sums over all tokens of the squared
    gradient at each output.
    """
    blocks, found = model.get_submodule(anatomy_of(config).blocks), dict[str, Tensor]()
    for _, _, products, loss in losses_of(model, text):
        for layout in block_layouts(config):
            for linear in layout.linears:
                if linear.expert is None:
                    path = layout.module_path(linear.tensor).removesuffix(".weight")
                    output = products.found[blocks[layout.index].get_submodule(path).weight.data_ptr()][0][1]
                    (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
                    sums = gradient.double().square().reshape(-1, gradient.shape[-1]).sum(0)
                    found[linear.tensor] = found.get(linear.tensor, torch.zeros(1).double()) + sums
    return found


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_how_much_each_output_matters_is_that_of_the_whole_model(name: str, tmp_path: Path) -> None:
    """Also from two parts of the sequences, as on a cluster; an expert's is its own tokens' part of all of them."""
    model, checkpoint = checkpoint_of(name, tmp_path)
    take_plain_experts(model)
    model.requires_grad_(False)
    ids = token_ids(LENGTHS)
    expected = squares_by_output(model, checkpoint.config, text_of(ids))
    table = weights(checkpoint, ids, tmp_path / "guide")
    total = sum(LENGTHS)
    for layout in block_layouts(checkpoint.config):
        found = TokenWeights(table, (table,)).outputs(layout)
        for linear in layout.linears:
            if linear.expert is None:
                own = found[linear.tensor].double() * total * total
                torch.testing.assert_close(own, expected[linear.tensor], rtol=5e-3, atol=1e-8)
            elif linear.tensor in found:
                assert bool((found[linear.tensor] >= 0).all())
        if layout.experts is None:
            assert len(found) == len(layout.linears)
        else:  # the sum over what the experts' outputs matter, of all outputs of one matrix, is finite and not 0
            routed = [found[linear.tensor] for linear in layout.linears if linear.expert is not None]
            assert len(routed) > 3
            assert all(float(each.sum()) > 0 for each in routed)


def test_what_head_and_embedding_must_get_right_is_that_of_the_whole_model(tmp_path: Path) -> None:
    """By autograd, also from the sums of two parts of the text."""
    model, checkpoint = checkpoint_of("LlamaForCausalLM", tmp_path)
    ids = token_ids(LENGTHS)
    text, blocks = text_of(ids), len(list(block_layouts(checkpoint.config)))
    table = weights(checkpoint, ids, tmp_path / "guide")
    found = TokenWeights(table, (table,)).vocabulary(blocks)
    model.requires_grad_(False)
    read, above, below, total = [], [], [], sum(LENGTHS)
    for sequence, embedded, products, loss in losses_of(model, text):
        states, output = products.found[model.get_output_embeddings().weight.data_ptr()][0]
        read.append(states.detach().reshape(len(sequence), -1).double())
        for gradient, parts in zip(torch.autograd.grad(loss, (output, embedded)), (above, below), strict=True):
            parts.append(gradient.reshape(len(sequence), -1).double())
    x, g, e = torch.cat(read), torch.cat(above), torch.cat(below)
    w = g.square().sum(1).sqrt()
    gram = (x * (w / w.mean())[:, None]).T @ x
    torch.testing.assert_close(found.gram.double(), gram, rtol=2e-3, atol=1e-4 * float(gram.abs().max()))
    for own, wanted in ((found.outputs, g), (found.channels, e)):
        torch.testing.assert_close(own.double() * total**2, wanted.square().sum(0), rtol=5e-3, atol=1e-7)
    counts = torch.bincount(torch.cat(list(text.sequences)), minlength=len(found.counts))
    assert torch.equal(found.counts, counts)
    lengths = model.get_input_embeddings().weight[torch.cat(list(text.sequences))].double().square().sum(1)
    assert found.length == pytest.approx(float(lengths.mean()), rel=1e-4)
    parts = []
    for number, members in enumerate(([0, 1, 2], [3, 4])):
        parts.append(weights(checkpoint, [ids[member] for member in members], tmp_path / str(number)))
    assert int(TokenWeights(parts[0], parts).vocabulary(blocks).counts.sum()) == total
