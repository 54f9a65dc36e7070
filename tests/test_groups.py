"""Blocks, linears, groups and producers of many architectures, and the whole engine on each of them.

`architectures.ARCHITECTURES` says what is true of each; the search by experiment must find exactly that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, build, save, token_ids
from torch import Tensor, nn

from compress.awq_pass import AwqJob, apply_awq
from compress.blocks import EngineInputs, apply_state, compress_blocks
from compress.checkpoint import BlockState, load_block
from compress.config_quant import AwqConfig, GptqConfig, QuantConfig, Rounding, SchemeConfig, Transform
from compress.errors import UnsupportedModel
from compress.groups import Fold, ScaleGroup, common_scope, find_scale_groups, scale_producer, shared_input_groups
from compress.methods.stats import InputStats
from compress.models import Block, LoadedModel, find_blocks, find_linears, linear_weight, load_model
from compress.plan import make_plan
from compress.streams import HiddenStream, open_stream, tail_logits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directories: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in directories:
            directories[name] = save(name, tmp_path_factory.mktemp(name))
        return directories[name]

    return directory


def opened(directory: Path, ids: Tensor, batch_size: int, dtype: torch.dtype) -> tuple[LoadedModel, HiddenStream]:
    loaded = load_model(str(directory))
    return loaded, open_stream(loaded, ids, batch_size, CPU, CPU, dtype)


IN_BFLOAT16 = ("llama-bias-tied", "qwen3", "gemma", "gemma3", "opt", "gpt2")  # what a GPU run computes in


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((n, torch.float32) for n in ARCHITECTURES), *((n, torch.bfloat16) for n in IN_BFLOAT16)],
    ids=str,
)
def test_groups_and_producers_are_those_of_the_architecture(name: str, dtype: torch.dtype, saved: Any) -> None:
    """Oracle: the table, written from the architectures' definitions; the weights afterwards equal those before."""
    architecture = ARCHITECTURES[name]
    loaded, stream = opened(saved(name), token_ids(4, 32), 4, dtype)
    assert [b.name for b in loaded.blocks] == [f"{architecture.blocks}.{i}" for i in range(2)]
    for index, block in enumerate(loaded.blocks):
        loaded.materialize(block.name, CPU, dtype)
        before = {n: p.clone() for n, p in block.module.named_parameters()}
        assert set(block.linears) == {n for group in architecture.groups for n in group}
        with torch.no_grad():
            groups = find_scale_groups(
                block, lambda m, index=index: stream.forward(m, index, 0) - stream.hidden[0]
            )  # fmt: skip
            stream.advance(block, index)
        assert {tuple(g.linears): g.producer for g in groups} == architecture.groups
        folds = {g.fold.value for g in groups if g.fold is not None}
        assert folds <= {"linear", architecture.gain}
        assert all(torch.equal(p, before[n]) for n, p in block.module.named_parameters())


def test_channel_map_of_grouped_query_attention(saved: Any) -> None:
    """Oracle: how attention repeats heads: with 4 heads on 2 KV heads of 16 channels, output channel c reads value
    channel 16 * (c // 32) + c % 16; a norm and an up projection feed channel c from channel c."""
    loaded, stream = opened(saved("qwen3"), token_ids(4, 32), 4, torch.float32)
    block = loaded.blocks[0]
    loaded.materialize(block.name, CPU, torch.float32)
    with torch.no_grad():
        groups = find_scale_groups(block, lambda m: stream.forward(m, 0, 0) - stream.hidden[0])
    maps = {g.producer: g.channel_map for g in groups}
    expected = torch.tensor([16 * (c // 32) + c % 16 for c in range(64)])
    assert torch.equal(maps["self_attn.v_proj"], expected)  # type: ignore[arg-type]
    assert torch.equal(maps["input_layernorm"], torch.arange(64))  # type: ignore[arg-type]
    assert torch.equal(maps["mlp.up_proj"], torch.arange(96))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streamed_blocks_compute_what_the_model_computes(name: str, saved: Any) -> None:
    """Oracle: `model(input_ids).logits` of transformers, bit for bit, from the reloaded checkpoint; five sequences in
    batches of two, so that the last batch is smaller."""
    from transformers import AutoModelForCausalLM

    ids = token_ids(5, 24, seed=1)
    loaded, stream = opened(saved(name), ids, 2, torch.float32)
    with torch.no_grad():
        for index, block in enumerate(loaded.blocks):
            loaded.materialize(block.name, CPU, torch.float32)
            stream.advance(block, index)
            loaded.release(block.name)
        logits = tail_logits(loaded, stream, torch.float32)
        model = AutoModelForCausalLM.from_pretrained(saved(name)).eval()
        expected = torch.cat([model(batch, use_cache=False).logits for batch in ids.split(2)])
    assert torch.equal(logits, expected)
    assert all(p.device.type == "meta" for p in loaded.model.parameters())


def quick_config() -> QuantConfig:
    return QuantConfig(
        transform=Transform.awq,
        rounding=Rounding.gptq,
        scheme=SchemeConfig(bits=8, group_size=32),
        awq=AwqConfig(n_grid=2, search_tokens=64),
        gptq=GptqConfig(block_size=32),
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_engine_result_is_the_model_with_those_weights(name: str, saved: Any, tmp_path: Path) -> None:
    """Oracles: transformers' own model of the original checkpoint with the dequantized weights and folded norms of the
    block files put in gives the engine's verify logits; at 8 bits those are close to the original's, so no fold
    changed the function."""
    from transformers import AutoModelForCausalLM

    loaded = load_model(str(saved(name)))
    ids = token_ids(2, 24, seed=2)
    inputs = EngineInputs(
        loaded, make_plan(loaded, quick_config()), token_ids(4, 32, seed=3), ids, 4, CPU, torch.float32, tmp_path
    )  # fmt: skip
    result = compress_blocks(inputs, lambda _done, _total: None)
    model = AutoModelForCausalLM.from_pretrained(saved(name)).eval()
    blocks = find_blocks(model)
    with torch.no_grad():
        original = model(ids, use_cache=False).logits
        for index, block in enumerate(blocks):
            state = load_block(tmp_path, index)
            assert state is not None and set(state.quantized) == set(block.linears)
            apply_state(block, state)
        assert torch.equal(model(ids, use_cache=False).logits, result.verify_logits)
    assert float((result.verify_logits - original).norm() / original.norm()) < 0.05
    reports = {r.name: r for r in result.layers}
    assert len(reports) == len(result.layers) == sum(len(b.linears) for b in blocks)
    producers = {n: p for group, p in ARCHITECTURES[name].groups.items() for n in group}
    for report in reports.values():
        local = next(report.name.removeprefix(b.name + ".") for b in blocks if report.name.startswith(b.name + "."))
        assert report.status == "quantized" and report.error is not None and report.error < 1e-3
        assert report.awq is not None and report.awq["producer"] == producers[local]
        assert report.awq["loss_ratio"] <= 1.0
    assert any(r.awq is not None and r.awq["scales"] not in ("identity", "no producer") for r in reports.values())


@pytest.mark.parametrize("name", ["llama-bias-tied", "qwen3", "gemma2", "phi", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_awq_folding_leaves_the_function_as_it_was(name: str, dtype: torch.dtype, saved: Any) -> None:
    """Oracle: the block's own output before. Folding (norm -> qkv, v -> o across repeated heads, up -> down, gains of
    1 + g, biases) with no rounding at all may only move float32 rounding; with a checkpoint in bfloat16, only what
    biases lose when they are stored."""
    loaded, stream = opened(saved(name), token_ids(4, 32), 4, torch.float32)
    block = loaded.blocks[0]
    loaded.materialize(block.name, CPU, torch.float32)
    if dtype is torch.bfloat16:
        for parameter in block.module.parameters():
            parameter.copy_(parameter.to(dtype).float())
    config = quick_config()
    config.scheme.bits = 3
    plan = make_plan(loaded, config)
    with torch.no_grad():
        before = stream.forward(block.module, 0, 0)
        groups = find_scale_groups(block, lambda m: stream.forward(m, 0, 0) - stream.hidden[0])
        weights = {n: linear_weight(m).float().clone().contiguous() for n, m in block.linears.items()}
        stats = input_stats(block, groups, stream)
        state = BlockState({}, {}, [])
        job = AwqJob(block, 0, groups, stream, weights, plan.block(0), stats, state, config.awq, dtype, clip=False)
        notes = apply_awq(job)
        after = stream.forward(block.module, 0, 0)
        fresh = input_stats(block, groups, stream)
    assert any(bool((note.input_scales != 1).any()) for note in notes.values())
    relative = float((after - before).norm() / (before - stream.hidden[0]).norm())
    assert relative < (1e-5 if dtype is torch.float32 else 5e-3)
    for key, seen in fresh.items():  # statistics were rescaled instead of gathered again
        torch.testing.assert_close(stats[key].hessian, seen.hessian, rtol=2e-2, atol=float(seen.hessian.max()) * 1e-2)
    assert all(value.dtype is dtype for value in state.changed.values())


def input_stats(block: Block, groups: list[ScaleGroup], stream: HiddenStream) -> dict[str, InputStats]:
    stats = {g.linears[0]: InputStats.empty(linear_weight(block.linears[g.linears[0]]).shape[1], CPU) for g in groups}
    handles = [
        block.linears[n].register_forward_pre_hook(lambda _m, args, s=s: s.update(args[0])) for n, s in stats.items()
    ]
    stream.forward(block.module, 0, 0)
    for handle in handles:
        handle.remove()
    return stats


@pytest.mark.parametrize(
    ("fold", "stored", "expected"),
    [(Fold.GAIN, [1.0, 3.0], [2.0, 1.5]), (Fold.GAIN_PLUS_ONE, [0.5, 1.0], [2.0, 0.0])],
)
def test_gain_folds(fold: Fold, stored: list[float], expected: list[float]) -> None:
    """Oracle: by hand: a gain g becomes f g; a gain kept as 1 + g becomes f (1 + g) - 1; a bias is multiplied too."""
    norm = nn.LayerNorm(2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(stored))
        norm.bias.copy_(torch.tensor([1.0, 1.0]))
    scale_producer(norm, fold, torch.tensor([2.0, 0.5]))
    assert norm.weight.tolist() == expected and norm.bias.tolist() == [2.0, 0.5]


def test_a_producer_with_a_second_reader_is_refused() -> None:
    """Oracle: a block whose norm also feeds the residual stream: scaling the linear's columns alone would not undo a
    changed norm, so there must be no producer; without the second reader there is one."""

    class Toy(nn.Module):
        def __init__(self, leaks: bool) -> None:
            super().__init__()
            self.norm, self.linear, self.leaks = nn.LayerNorm(8), nn.Linear(8, 8), leaks

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return x + self.linear(h) + (1e-3 * h if self.leaks else 0)

    x = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    for leaks in (False, True):
        toy = Toy(leaks)
        with torch.no_grad():
            (group,) = find_scale_groups(Block("toy", toy, find_linears(toy)), lambda m: m(x) - x)
        assert group.producer == (None if leaks else "norm")


def test_a_linear_that_never_runs_is_refused() -> None:
    """Oracle: the documented error for an expert that gets no tokens."""

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    toy = Toy()
    with pytest.raises(UnsupportedModel, match=r"toy\.0 never calls its linear idle"):
        shared_input_groups(Block("toy.0", toy, find_linears(toy)), lambda m: m(torch.ones(1, 2, 8)))


def test_common_scope() -> None:
    """Oracle: by hand."""
    assert common_scope(["self_attn.q_proj", "self_attn.k_proj"]) == "self_attn"
    assert common_scope(["self_attn.q_proj", "mlp.fc1"]) == ""
    assert common_scope(["a.b.c", "a.b.d.e"]) == "a.b"
    assert common_scope(["mlp.down_proj"]) == "mlp.down_proj"


def test_table_is_about_random_models_with_living_norms() -> None:
    """Oracle: a norm of ones and a bias of zeros would hide a fold that forgets them."""
    for name in ("llama-bias-tied", "gpt2"):
        for parameter_name, parameter in build(name).named_parameters():
            if parameter.ndim == 1:
                assert float(parameter.detach().std()) > 0.05, parameter_name
