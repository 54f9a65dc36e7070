"""Benchmark and roofline. Oracles: counting forward calls, closed-form byte and operation counts of a known model,
and a second model whose every call is slower by a known time. No test compares two measured times."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.config import BenchConfig
from compress.errors import ConfigError, UnsupportedModel
from compress.eval import roofline, session, speed
from compress.eval.memory import resident_bytes
from compress.eval.roofline import Machine, StepShape, count_work, measure_machine, record_linear_calls
from compress.qlinear import QuantLinear
from compress.quant import QuantScheme, choose_qparams, quantize

CONFIG = BenchConfig(batch_sizes=[1, 2], prompt_tokens=16, decode_tokens=4, repeats=2, warmup=1)
# the figures of the tiny model in conftest.py
HIDDEN, FFN, VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 128, 256, 2, 4, 2, 16
LINEAR_WEIGHTS = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_HEADS * HEAD_DIM + 3 * HIDDEN * FFN)
HEAD_WEIGHTS = VOCAB * HIDDEN
NORM_WEIGHTS = (2 * LAYERS + 1) * HIDDEN


@pytest.fixture
def model(tiny_model_dir: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The roofline probes take seconds; tests of the benchmark itself use a machine with round figures."""
    machine = Machine(bandwidth_bytes_per_s=1e10, flops_per_s=1e11)
    monkeypatch.setattr(speed, "measure_machine", lambda device, dtype: machine)
    return machine


def test_report_is_complete_and_consistent(model: nn.Module, quick_machine: Machine) -> None:
    """Oracle: the definitions in SpeedRow's docstring, recomputed from the row's own fields."""
    report = speed.benchmark_pair(model, copy.deepcopy(model), CONFIG, "cpu")
    assert [(r.phase, r.batch) for r in report.rows] == [("prefill", 1), ("decode", 1), ("prefill", 2), ("decode", 2)]
    for r in report.rows:
        assert 0 < r.p50_ms <= r.p95_ms <= r.p99_ms
        assert 0 < r.reference_p50_ms <= r.reference_p95_ms <= r.reference_p99_ms
        assert r.speedup == pytest.approx(r.reference_p50_ms / r.p50_ms)
        assert r.intensity == pytest.approx(r.flops / r.bytes_moved)
        least_ms = 1e3 * max(r.bytes_moved / 1e10, r.flops / 1e11)
        assert r.roofline_fraction == pytest.approx(least_ms / r.p50_ms)
        # a copy moves what the original moves
        assert r.reference_bytes_moved == r.bytes_moved
        assert r.n_samples == report.n_samples[r.phase] == {"prefill": 2, "decode": 8}[r.phase]
        slowest_rate = r.batch * (16 if r.phase == "prefill" else 1) / r.p99_ms * 1e3
        assert r.tokens_per_s >= slowest_rate
        assert r.mode == report.mode == "eager"
    plain = report.to_plain()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert "threads" in plain["backend"] and "float32" in plain["backend"]


def test_models_take_turns(model: nn.Module, quick_machine: Machine) -> None:
    """Oracle: the sequence of prompts that forward hooks saw, and the announced sequence."""
    other = copy.deepcopy(model)
    seen: list[str] = []
    for name, m in (("reference", model), ("quantized", other)):

        def note(module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
            if kwargs["input_ids"].shape[1] > 1:
                seen.append(name)

        m.register_forward_pre_hook(note, with_kwargs=True)
    announced: list[str] = []
    speed.benchmark_pair(model, other, replace_batches(1), "cpu", announced.append)
    counting_pass, timed = seen[:2], seen[2:]
    assert counting_pass == ["reference", "quantized"]
    assert timed == ["reference", "quantized"] * 3
    turns = [line.rpartition(": ")[2] for line in announced if line.startswith("batch")]
    assert turns == timed
    assert [("warm-up" in line) for line in announced[-6:]] == [True, True, False, False, False, False]


def replace_batches(*batch_sizes: int) -> BenchConfig:
    return replace(CONFIG, batch_sizes=list(batch_sizes))


def test_times_belong_to_their_model(model: nn.Module, quick_machine: Machine) -> None:
    """Oracle: a pause of known length in every call of one model: its median cannot be shorter than the pause, and
    swapped columns would show."""
    slow = copy.deepcopy(model)
    slow.register_forward_pre_hook(lambda module, args: time.sleep(0.05))
    report = speed.benchmark_pair(slow, model, replace_batches(1), "cpu")
    for r in report.rows:
        assert r.reference_p50_ms >= 50
        assert r.reference_tokens_per_s <= (16 if r.phase == "prefill" else 1) / 0.05


def test_decode_runs_on_a_growing_cache(model: nn.Module, quick_machine: Machine) -> None:
    """Oracle: logits of the last decode step equal those of one pass over all tokens."""
    timed = session.Session(model, 2, CONFIG, torch.device("cpu"))
    last: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, args, output: last.append(output.logits))
    with torch.inference_mode():
        timed.run(keep=True)
        decoded = last[-1][:, -1]
        whole = model(timed.ids).logits[:, -1]
    torch.testing.assert_close(decoded, whole, rtol=1e-4, atol=1e-4)


def test_engine_decodes_what_transformers_would(model: nn.Module) -> None:
    """Oracle: logits of the engine's last step equal those of one pass over all tokens, run after run."""
    timed = session.Session(model, 2, CONFIG, torch.device("cpu"))
    with torch.inference_mode():
        timed.count()
        timed.use_engine()
        assert timed.decoder is not None
        for _ in range(2):
            timed.run(keep=True)
            whole = model(timed.ids).logits[:, -1]
            torch.testing.assert_close(timed.decoder.logits, whole, rtol=1e-4, atol=1e-4)
    assert len(timed.ms["prefill"]) == 2 and len(timed.ms["decode"]) == 8


def test_weights_are_fused_once_for_all_batch_sizes(
    model: nn.Module, quick_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: how often each model is read by three batch sizes that all run on the engine; one that cannot be read
    raises at every call, so that a reason is never forgotten."""
    real, read, shared = session.read_model, [], []

    def counted(m: nn.Module) -> Any:
        read.append(m)
        return real(m)

    def engine(sessions: list[session.Session]) -> str:
        for timed in sessions:
            timed.use_engine()
        shared.append([timed.decoder.model for timed in sessions if timed.decoder is not None])
        return session.ENGINE

    monkeypatch.setattr(session, "read_model", counted)
    monkeypatch.setattr(speed, "choose_launch", engine)
    other = copy.deepcopy(model)
    report = speed.benchmark_pair(model, other, replace_batches(1, 2, 3), "cpu")
    assert report.mode == session.ENGINE and len(report.rows) == 6
    assert [id(m) for m in read] == [id(model), id(other)]
    assert all(a is b for later in shared[1:] for a, b in zip(later, shared[0], strict=True)) and len(shared) == 3
    assert shared[0][0] is not shared[0][1]
    model.register_forward_hook(lambda *args: None)
    unreadable = session.weights_of(model)
    for _ in range(2):
        with pytest.raises(UnsupportedModel, match="hooks"):
            unreadable()


def test_random_state_is_left_alone(model: nn.Module) -> None:
    """Oracle: torch's generator state before and after, roofline probes included."""
    before = torch.get_rng_state()
    measure_machine(torch.device("cpu"), torch.float32, seconds=0.01)
    session.Session(model, 1, CONFIG, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch", [1, 3])
def test_work_of_a_known_model(model: nn.Module, batch: int) -> None:
    """Oracle: bytes and operations of the tiny Llama, written out by hand."""
    timed = session.Session(model, batch, CONFIG, torch.device("cpu"))
    with torch.inference_mode():
        timed.count()
    rope = sum(b.numel() * b.element_size() for b in model.buffers())
    fixed = 4 * (LINEAR_WEIGHTS + HEAD_WEIGHTS + NORM_WEIGHTS) + rope
    kv_token = 2 * LAYERS * KV_HEADS * HEAD_DIM * 4

    prefill = timed.work["prefill"]
    assert prefill.weight_bytes == fixed + batch * 16 * HIDDEN * 4
    assert prefill.kv_bytes == batch * kv_token * (16 + 16)
    attention = batch * 4 * HEADS * HEAD_DIM * LAYERS * (16 * 17 / 2)
    assert prefill.flops == 2 * batch * (16 * LINEAR_WEIGHTS + HEAD_WEIGHTS) + attention

    decode = timed.work["decode"]
    context = 16 + (4 + 1) / 2  # 17, 18, 19, 20 tokens attended to
    assert decode.weight_bytes == fixed + batch * HIDDEN * 4
    assert decode.kv_bytes == batch * kv_token * (context + 1)
    attention = batch * 4 * HEADS * HEAD_DIM * LAYERS * context
    assert decode.flops == 2 * batch * (LINEAR_WEIGHTS + HEAD_WEIGHTS) + attention
    assert decode.intensity == decode.flops / decode.bytes_moved


class CodedLinear(nn.Module):
    """Stands for a quantized layer: it says what it reads, and keeps its codes in a buffer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("codes", linear.weight.detach().clone())
        self.weight_bytes = linear.weight.numel() // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.codes.T


def test_quantized_layers_count_what_they_say(model: nn.Module, quick_machine: Machine) -> None:
    """Oracle: two down projections at half a byte a weight instead of four; operations unchanged."""
    quantized = copy.deepcopy(model)
    for layer in quantized.model.layers:
        layer.mlp.down_proj = CodedLinear(layer.mlp.down_proj)
    report = speed.benchmark_pair(model, quantized, replace_batches(1), "cpu")
    for r in report.rows:
        assert r.reference_bytes_moved - r.bytes_moved == LAYERS * HIDDEN * FFN * 3.5
    plain = speed.benchmark_pair(model, model, replace_batches(1), "cpu")
    assert [r.flops for r in report.rows] == [r.flops for r in plain.rows]


def test_rows_name_the_kernels_that_ran(model: nn.Module, quick_machine: Machine) -> None:
    """Oracle: QuantLinear's own choice at the row counts of each phase; bytes fall by what its tensors hold less."""
    scheme = QuantScheme(bits=4, group_size=32)
    quantized = copy.deepcopy(model)
    saved = 0
    for layer in quantized.model.layers:
        dense = layer.mlp.up_proj.weight.detach()
        coded = QuantLinear.from_quantized(quantize(dense, *choose_qparams(dense, scheme), scheme))
        layer.mlp.up_proj = coded
        coded.prepare()
        saved += dense.numel() * 4 - coded.weight_bytes
    report = speed.benchmark_pair(model, quantized, replace_batches(3), "cpu")
    prefill, decode = report.rows
    assert prefill.kernels == {coded.backend_for(3 * 16, torch.float32).value: LAYERS}
    assert decode.kernels == {coded.backend_for(3, torch.float32).value: LAYERS}
    assert decode.reference_bytes_moved - decode.bytes_moved == saved


def test_tied_head_is_read_once_and_its_rows_gathered() -> None:
    """Oracle: a model with tied embeddings reads the matrix as head, and the gathered rows as embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    tied = LlamaForCausalLM(config).eval()
    timed = session.Session(tied, 1, CONFIG, torch.device("cpu"))
    with torch.inference_mode():
        timed.count()
    every_parameter = 4 * sum(p.numel() for p in tied.parameters())  # the shared one counts once
    buffers = sum(b.numel() * b.element_size() for b in tied.buffers())
    assert timed.work["decode"].weight_bytes == every_parameter + buffers + 32 * 4
    assert resident_bytes(tied) == every_parameter + buffers


def test_fused_experts_count_by_the_experts_that_tokens_reach() -> None:
    """Oracle: two of eight experts a token: two experts' bytes for one token, all eight for sixteen."""
    model = nn.Module()
    model.experts = nn.Parameter(torch.zeros(8, 4, 6))

    class Config:
        num_experts_per_tok = 2

    assert roofline._fused_experts(model, Config, 1) == (2 * 24 * 4, 2 * 24 * 2)
    assert roofline._fused_experts(model, Config, 16) == (8 * 24 * 4, 2 * 24 * 2 * 16)


def test_cache_without_keys_is_refused(model: nn.Module) -> None:
    """Oracle: a cache of another kind raises instead of counting as no traffic."""

    class OtherCache:
        layers = (object(),)

    with pytest.raises(UnsupportedModel, match="OtherCache"):
        count_work(model, {}, OtherCache(), StepShape.prefill(1, 4))


def test_hooks_are_removed(model: nn.Module) -> None:
    """Oracle: the hook tables of all modules are empty afterwards, also after an exception."""
    with pytest.raises(RuntimeError, match="stop"), record_linear_calls(model):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks for m in model.modules())


def test_too_many_tokens_are_refused(model: nn.Module) -> None:
    """Oracle: the tiny model has 512 positions; 512 pass and 513 do not."""
    speed.check_positions(model, BenchConfig(prompt_tokens=500, decode_tokens=12))
    with pytest.raises(ConfigError, match=r"513 exceeds the model's 512"):
        speed.check_positions(model, BenchConfig(prompt_tokens=500, decode_tokens=13))


def test_training_mode_is_refused(model: nn.Module) -> None:
    """Oracle: dropout would be timed in training mode, so the benchmark raises."""
    with pytest.raises(ValueError, match="training mode"):
        speed.benchmark_pair(model, copy.deepcopy(model).train(), CONFIG, "cpu")


def test_percentiles_are_samples() -> None:
    """Oracle: nearest-rank percentiles of 1..200, and of fewer samples than a percentile needs."""
    assert speed._percentiles([float(i) for i in range(200, 0, -1)]) == (100.5, 190.0, 198.0)
    assert speed._percentiles([3.0, 1.0, 2.0]) == (2.0, 3.0, 3.0)


_PROBED_ALLOCATION = """
import torch
from compress.eval.memory import MemoryProbe
probe = MemoryProbe(torch.device("cpu"))
probe.start()
block = torch.ones(64 * 2**20, dtype=torch.uint8)
print(probe.growth())
"""


def test_memory_probe_sees_an_allocation() -> None:
    """Oracle: 64 MiB written between start and growth, on Linux; within page accounting.

    In a process of its own: what earlier tests left, given back meanwhile, would be subtracted.
    """
    process = subprocess.run(
        [sys.executable, "-c", _PROBED_ALLOCATION], capture_output=True, text=True, check=True, timeout=120
    )
    growth = int(process.stdout)
    assert 0.9 * 64 * 2**20 <= growth <= 2 * 64 * 2**20


def test_machine_figures_hold_together() -> None:
    """Oracle: a roofline of this machine bounds its own probe: the product of two matrices that the peak came from,
    timed again here, cannot beat it by more than noise."""
    device = torch.device("cpu")
    machine = measure_machine(device, torch.float32, seconds=0.2)
    assert machine.bandwidth_bytes_per_s > 1e8 and machine.flops_per_s > 1e8
    n = 1024
    a = torch.ones(n, n)
    start = time.perf_counter()
    a @ a
    seconds = time.perf_counter() - start
    assert machine.least_seconds(3 * n * n * 4, 2 * n**3) / seconds <= 1.5
    assert machine.least_seconds(machine.bandwidth_bytes_per_s, 0) == pytest.approx(1.0)
    assert machine.least_seconds(0, machine.flops_per_s * 2) == pytest.approx(2.0)


@pytest.mark.gpu
def test_graph_decode_computes_what_eager_computes(model: nn.Module) -> None:
    """Oracle: logits of the last replayed step equal those of one eager pass over all tokens."""
    timed = session.Session(model.cuda(), 2, CONFIG, torch.device("cuda"))
    with torch.inference_mode():
        timed.count()
        assert session.choose_launch([timed]) == session.GRAPH
        for _ in range(2):  # the second run starts from a cache that was reset
            timed.run(keep=True)
            whole = timed.model(timed.ids).logits[:, -1]
            torch.testing.assert_close(timed.logits[:, -1], whole, rtol=1e-3, atol=1e-3)
    assert len(timed.ms["decode"]) == 8


@pytest.mark.gpu
def test_engine_is_used_where_it_knows_both_models(model: nn.Module) -> None:
    """Oracle: the mode, and logits of the last replayed step against one eager pass in float16; one model that it does
    not know, here for its hook, sends both to transformers."""
    models = [copy.deepcopy(model).half().cuda() for _ in range(2)]
    with torch.inference_mode():
        sessions = [session.Session(m, 2, CONFIG, torch.device("cuda")) for m in models]
        assert session.choose_launch(sessions) == session.ENGINE
        for timed in sessions:
            timed.run(keep=True)
            whole = timed.model(timed.ids).logits[:, -1]
            torch.testing.assert_close(timed.decoder.logits, whole, rtol=2e-2, atol=2e-2)
        models[1].register_forward_hook(lambda *args: None)
        sessions = [session.Session(m, 2, CONFIG, torch.device("cuda")) for m in models]
        assert session.choose_launch(sessions) == session.GRAPH
        assert all(timed.decoder is None for timed in sessions)


@pytest.mark.gpu
def test_capture_failure_is_reported(model: nn.Module) -> None:
    """Oracle: a model that synchronizes in its forward cannot be captured; both run eagerly, and the mode says why."""
    other = copy.deepcopy(model).cuda()

    def read_back(module: nn.Module, args: tuple, output: Any) -> None:
        output.logits.sum().item()

    other.register_forward_hook(read_back)
    report = speed.benchmark_pair(model.cuda(), other, replace_batches(1), "cuda")
    assert report.mode.startswith("eager (CUDA graph capture failed: ")
    assert all(r.p50_ms > 0 and r.peak_memory_bytes for r in report.rows)


@pytest.mark.gpu
def test_report_on_cuda(model: nn.Module) -> None:
    """Oracle: the roofline bounds what was measured; peak memory holds the weights."""
    report = speed.benchmark_pair(model.cuda(), copy.deepcopy(model), CONFIG, "cuda")
    assert report.mode == session.GRAPH
    for r in report.rows:
        assert 0 < r.roofline_fraction <= 1.2
        assert r.peak_memory_bytes is not None and r.peak_memory_bytes > resident_bytes(model)
