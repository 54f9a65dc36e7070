"""The two limits of a machine, measured, and the least that one step of a model must move and compute.

A step that moves `bytes` and computes `flops` cannot take less than

    max(bytes / bandwidth, flops / peak)            (the roofline; Williams, Waterman, Patterson 2009)

and the fraction of it reached is that time over the measured one. Bandwidth and peak are the best this process
gets here, with torch, from buffers that no cache holds: not the vendor's figures. A fraction above 1 means that
weights came out of a cache; nothing is clamped.

What a step must move: every weight that it uses once, the embedding rows that it gathers, and the KV cache, read
once and appended to. Activations are left out: they are small beside these and mostly stay in caches. What it
must compute: two operations for each weight and token in linear layers, and the two products of attention.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UnsupportedModel

_GIB = 2**30
_CACHE_INFO = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Machine:
    """Best read-or-copy bandwidth, and best matrix product in the dtype that models compute in."""

    bandwidth_bytes_per_s: float
    flops_per_s: float

    def least_seconds(self, bytes_moved: float, flops: float) -> float:
        """The roofline's lower limit for a step."""
        return max(bytes_moved / self.bandwidth_bytes_per_s, flops / self.flops_per_s)


def measure_machine(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> Machine:
    """Bandwidth and matrix-product peak of `device`; each of three probes runs for about `seconds`.

    Copies count bytes read and bytes written. The random state of the process is left as it was.
    """
    bandwidth = _measure_bandwidth(device, seconds)
    n = 8192 if device.type == "cuda" else 1024
    # random numbers, not zeros: a chip that toggles fewer bits clocks higher
    generator = torch.Generator(device=device).manual_seed(0)
    a = torch.randn(n, n, generator=generator, device=device).to(dtype)
    b = torch.randn(n, n, generator=generator, device=device).to(dtype)
    out = torch.empty(n, n, dtype=dtype, device=device)
    product_s = _best_seconds(lambda: torch.mm(a, b, out=out), device, seconds)
    return Machine(bandwidth, 2 * n**3 / product_s)


def _measure_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes a second of a read (sum) or a copy, whichever is faster; the buffers are freed on return."""
    n_bytes = _buffer_bytes(device)
    source = torch.ones(n_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy_s = _best_seconds(lambda: target.copy_(source), device, seconds)
    read_s = _best_seconds(lambda: source.sum(), device, seconds)
    return max(2 * n_bytes / copy_s, n_bytes / read_s)


def _best_seconds(call: Callable[[], Any], device: torch.device, budget_s: float) -> float:
    """Shortest time of one call. On CUDA a few are queued at a time, so that a launch hides behind the one before."""
    n_queued = 8 if device.type == "cuda" else 1
    call()
    synchronize(device)
    best = float("inf")
    deadline = time.perf_counter() + budget_s
    while True:
        start = time.perf_counter()
        for _ in range(n_queued):
            call()
        synchronize(device)
        now = time.perf_counter()
        best = min(best, (now - start) / n_queued)
        if now >= deadline:
            return best


def _buffer_bytes(device: torch.device) -> int:
    """A size that overflows the last-level cache several times and fits memory beside two loaded models."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return min(_GIB, free // 4) // 4 * 4
    return min(max(4 * _last_level_cache_bytes(), 128 * 2**20), _GIB)


def _last_level_cache_bytes() -> int:
    """As Linux reports it; 32 MiB where it does not (containers, other systems)."""
    units = {"K": 2**10, "M": 2**20}
    sizes = [p.read_text().strip() for p in _CACHE_INFO.glob("index*/size")]
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s and s[-1] in units), default=32 * 2**20)


def synchronize(device: torch.device) -> None:
    """Wait for work queued on a CUDA device; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Work:
    """The least that one step moves and computes."""

    weight_bytes: float
    kv_bytes: float
    flops: float

    @property
    def bytes_moved(self) -> float:
        return self.weight_bytes + self.kv_bytes

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes_moved


@dataclass(frozen=True)
class StepShape:
    """One forward pass: `query_tokens` new tokens in each of `batch` sequences, `context_tokens` in the KV cache
    afterwards, `pairs` (query, key) pairs that attention scores in each sequence."""

    batch: int
    query_tokens: int
    context_tokens: float
    pairs: float

    @classmethod
    def prefill(cls, batch: int, prompt_tokens: int) -> StepShape:
        return cls(batch, prompt_tokens, prompt_tokens, prompt_tokens * (prompt_tokens + 1) / 2)

    @classmethod
    def decode(cls, batch: int, prompt_tokens: int, decode_tokens: int) -> StepShape:
        """The mean over `decode_tokens` steps that follow a prompt."""
        context = prompt_tokens + (decode_tokens + 1) / 2
        return cls(batch, 1, context, context)


LinearCalls = dict[nn.Module, tuple[int, float]]


@contextmanager
def record_linear_calls(model: nn.Module) -> Iterator[LinearCalls]:
    """Inside: which linear layers ran, each with (calls, operations). Counting what runs, instead of what the
    config promises, gets heads that see one token of a prompt and experts that see some of the tokens right."""
    calls: LinearCalls = {}

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        n_calls, flops = calls.get(module, (0, 0.0))
        calls[module] = (n_calls + 1, flops + 2.0 * x.numel() * output.shape[-1])

    handles = [m.register_forward_hook(count) for m in model.modules() if _is_linear(m)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _is_linear(module: nn.Module) -> bool:
    """nn.Linear, or a quantized linear layer, which says what it reads in `weight_bytes`."""
    return isinstance(module, nn.Linear) or hasattr(module, "weight_bytes")


def count_work(model: nn.Module, calls: LinearCalls, cache: Any, shape: StepShape) -> Work:
    """Bytes and operations of one step of `model`.

    Args:
        calls: from `record_linear_calls` around exactly one such step.
        cache: the KV cache which that step used (its dtype and heads are read off).

    Raises:
        UnsupportedModel: the cache holds no keys and values, so its traffic is unknown here.
    """
    text_config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    tokens = shape.batch * shape.query_tokens
    expert_bytes, expert_flops = _fused_experts(model, text_config, tokens)
    weight_bytes = _linear_bytes(calls) + _other_bytes(model, tokens) + expert_bytes
    linear_flops = sum(flops for _, flops in calls.values()) + expert_flops

    token_bytes, n_layers = _kv_token_bytes(cache)
    kv_bytes = shape.batch * token_bytes * (shape.context_tokens + shape.query_tokens)
    heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    attention_flops = shape.batch * 4.0 * heads * head_dim * shape.pairs * n_layers
    return Work(weight_bytes, kv_bytes, linear_flops + attention_flops)


def _linear_bytes(calls: LinearCalls) -> int:
    """Weights and biases of the linear layers that ran, each storage once."""
    seen: set[int] = set()
    total = 0
    for module in calls:
        total += int(getattr(module, "weight_bytes", 0))  # codes and scales; the bias is a parameter
        for p in module.parameters(recurse=False):
            if p.data_ptr() not in seen:
                seen.add(p.data_ptr())
                total += p.numel() * p.element_size()
    return total


def _other_bytes(model: nn.Module, tokens: int) -> int:
    """Gathered embedding rows, and norms and other small tensors in full."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            weight = module.weight
            total += min(tokens, weight.shape[0]) * weight.shape[1] * weight.element_size()
        elif not _is_linear(module):
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            total += sum(t.numel() * t.element_size() for t in tensors if t.dim() < 3)
    return total


def _fused_experts(model: nn.Module, text_config: Any, tokens: int) -> tuple[float, float]:
    """(bytes, operations) of expert weights kept as one [E, N, K] tensor, from the config's experts a token.

    Bytes are an upper limit: no two tokens are assumed to share an expert until all experts are read.
    """
    experts = [p for m in model.modules() if not _is_linear(m) for p in m.parameters(recurse=False) if p.dim() == 3]
    n_bytes = flops = 0.0
    for p in experts:
        n_experts = p.shape[0]
        per_token = getattr(text_config, "num_experts_per_tok", None) or n_experts
        one_expert = p[0].numel()
        n_bytes += min(n_experts, tokens * per_token) * one_expert * p.element_size()
        flops += 2.0 * one_expert * per_token * tokens
    return n_bytes, flops


def _kv_token_bytes(cache: Any) -> tuple[int, int]:
    """(bytes of keys and values of one token of one sequence over all layers, number of those layers)."""
    layers = [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), Tensor)]
    if not layers:
        raise UnsupportedModel(
            f"the cache {type(cache).__name__} holds no keys and values, so its traffic cannot be counted; "
            "set bench.enabled=false for this model"
        )
    total = 0
    for layer in layers:
        for states in (layer.keys, layer.values):  # [B, heads, T, head_dim]
            total += states.shape[1] * states.shape[3] * states.element_size()
    return total, len(layers)
