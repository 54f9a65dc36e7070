"""What the weight kernels share: where they can run, the checks of their operands, and small pieces of Triton.

All of them compute y^T = W x^T with W as the left operand of the tensor cores (why: `w4a16`), in programs that own one
[BLOCK_N, BLOCK_M] tile of y^T over one split of K. Partial sums of the splits go to a workspace [SPLIT, M, N] and a
second kernel adds them in order of s: the same bits every run, no atomics.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.errors import ConfigError, EnvironmentProblem

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
MIN_CAPABILITY = (8, 0)
ACTIVATIONS = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Machine:
    """What launches ask of a GPU: compute capability, multiprocessors, shared memory a block may use."""

    capability: tuple[int, int]
    n_sms: int
    shared_bytes: int


HOPPER_BYTES = 232448  # of shared memory that a program may have on Hopper
_CPU = Machine((0, 0), 4, HOPPER_BYTES)  # few multiprocessors, so that the interpreter runs split kernels too
_cpu_as: Machine = _CPU


@contextmanager
def cpu_as(machine: Machine) -> Iterator[None]:
    """Operands on the CPU stand for some on such a GPU: their launches are for a compiler, not to be run."""
    global _cpu_as
    _cpu_as, before = machine, _cpu_as
    device_problem.cache_clear()
    try:
        yield
    finally:
        _cpu_as = before
        device_problem.cache_clear()


@cache
def device_problem(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, or None."""
    if INTERPRETED or (device.type == "cpu" and _cpu_as is not _CPU):
        return None
    if device.type != "cuda":
        return f"device {device} is not a CUDA GPU (set TRITON_INTERPRET=1 to run the kernel in Triton's interpreter)"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return None


def n_sms(device: torch.device) -> int:
    """Multiprocessors of the GPU; 4 in the interpreter."""
    return _gpu_sms(device) if device.type == "cuda" else _cpu_as.n_sms


@cache
def _gpu_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def shared_bytes(device: torch.device) -> int:
    """Shared memory a block may use; an H100's in the interpreter."""
    return _gpu_shared_bytes(device) if device.type == "cuda" else _cpu_as.shared_bytes


@cache
def _gpu_shared_bytes(device: torch.device) -> int:
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


Function = TypeVar("Function", bound=Callable[..., Any])


def on_operand_device(function: Function) -> Function:
    """The same with the GPU of its first argument, a tensor, as the current one: Triton launches there, wherever the
    operands are, and a model spread over GPUs has them on several."""

    @wraps(function)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return function(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return function(first, *args, **kwargs)

    return run  # type: ignore[return-value]


def aligned(x: Tensor, weight: Any) -> bool:
    """Whether bulk copies, which take whole 16 bytes, can begin where x and a weight's words do."""
    return not (x.data_ptr() % 16 or weight.words.data_ptr() % 16)


def row_units(scale: Tensor) -> Tensor:
    """The power of two at or above each row of scales [N', G], in their dtype: [N']; 1 for a row of zeros."""
    exponent = torch.frexp(scale.float().amax(1)).exponent
    if scale.dtype is torch.float16:  # the largest and smallest that it has; a scale of 65504 is as good over 32768
        exponent = exponent.clamp(-24, 15)
    return torch.ldexp(torch.ones_like(scale[:, 0]), exponent)


def settle(device: torch.device) -> None:
    """Wait for what made a weight's layout: the Hopper kernels read weights before they wait for the kernel that
    precedes them, which may be one of those."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def check_device(kernel: str, device: torch.device) -> None:
    problem = device_problem(device)
    if problem:
        raise EnvironmentProblem(f"the {kernel} kernel cannot run: {problem}; use backend=auto")


def check_activations(kernel: str, x: Tensor, k: int | None = None) -> None:
    if x.dtype not in ACTIVATIONS:
        raise ConfigError(f"x is {x.dtype}; the {kernel} kernel takes float16 or bfloat16, use backend=auto for others")
    if x.dim() != 2:
        raise ConfigError(f"x is {tuple(x.shape)}; the {kernel} kernel takes [M, K], reshape it first")
    if k is not None and x.shape[1] != k:
        raise ConfigError(f"x is {tuple(x.shape)}, but the weight has K={k}")


def check_operands(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    rows_behind_scales: int = 0,
) -> None:
    """With N = words.shape[-2], scale and zero must be [G, N], scale with so many rows more, and bias [N]; all
    contiguous and on x's device.

    G = K / group_size, or 1 where a group holds the whole row and its padding.
    """
    n, k = words.shape[-2], x.shape[1]
    if group_size <= 0 or group_size % 32:
        raise ConfigError(f"group_size={group_size} must be a multiple of 32")
    if group_size < k and k % group_size:
        raise ConfigError(f"group_size={group_size} does not divide K={k}; build the weight with this kernel's pack")
    groups = -(-k // group_size)
    shapes = (("scale", scale, (groups + rows_behind_scales, n)), ("zero", zero, (groups, n)), ("bias", bias, (n,)))
    for name, t, shape in shapes:
        if t is not None and tuple(t.shape) != shape:
            raise ConfigError(f"{name} is {tuple(t.shape)}, expected {shape} for group size {group_size}")
        if t is not None and t.dtype not in ((torch.uint8,) if name == "zero" else _FLOATS):
            wanted = "uint8" if name == "zero" else "float16, bfloat16 or float32"
            raise ConfigError(f"{name} is {t.dtype}, expected {wanted}; build the weight with this kernel's pack")
    for name, t in (("x", x), ("words", words), ("scale", scale), ("zero", zero), ("bias", bias)):
        if t is not None and not t.is_contiguous():
            raise ConfigError(f"{name} with strides {t.stride()} is not contiguous; call .contiguous() first")
        if t is not None and t.device != x.device:
            raise ConfigError(f"{name} is on {t.device} and x on {x.device}; move them to one device")


@triton.jit
def tile_of_program(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tile (of N, of M) of a program: GROUP_N tiles of N share their x tiles in the L2 before the next M tile."""
    m_tiles, n_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_n = pid // (GROUP_N * m_tiles) * GROUP_N
    width = min(n_tiles - first_n, GROUP_N)
    within = pid % (GROUP_N * m_tiles)
    return first_n + within % width, within // width


@triton.jit
def load_column(ptr, rn, g, N, EVEN_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row g of a [G, N] array at columns rn, as float32 [BN, 1]."""
    offsets = ptr + (tl.zeros((), tl.int64) + N) * g + rn
    if EVEN_N:
        column = tl.load(offsets, eviction_policy="evict_last")
    else:
        column = tl.load(offsets, mask=rn < N, other=0, eviction_policy="evict_last")
    return column.to(tl.float32)[:, None]


@triton.jit
def field_to_float(words, zero, SHIFT: tl.constexpr, MASK: tl.constexpr, DTYPE: tl.constexpr, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(words >> SHIFT & MASK) - zero, words int16 [BN, S] and zero [BN, 1] float32: exact small integers in DTYPE.

    The field becomes the low mantissa bits of 1024 (float16) or 128 (bfloat16: fields of 7 bits at most) and an exact
    subtraction removes them again. MODE 0: plain Triton. MODE 1: inline PTX, two weights a register, two or three
    instructions. MODE 2: float32, because the interpreter has no bfloat16 arithmetic.
    """
    half: tl.constexpr = tl.float16 == DTYPE
    one_plus: tl.constexpr = 1024.0 if half else 128.0
    if MODE == 2:
        w = ((words >> SHIFT) & MASK).to(tl.float32) - zero
    elif MODE == 0:
        biased = ((words >> SHIFT) & MASK) | (0x6400 if half else 0x4300)
        w = biased.to(DTYPE, bitcast=True) - (zero + one_plus).to(DTYPE)
    else:
        shift: tl.constexpr = "" if SHIFT == 0 else f"shr.b32 t, t, {SHIFT}; "
        both: tl.constexpr = MASK * 0x10001
        # t * 1 - base: sub.bf16x2 needs sm_90, fma.bf16x2 only sm_80
        unbias: tl.constexpr = (
            f"lop3.b32 t, t, {both}, 0x64006400, 0xea; add.rn.f16x2 $0, t, $2;}}"
            if half
            else f"lop3.b32 t, t, {both}, 0x43004300, 0xea; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, t, one, $2;}}"
        )
        asm: tl.constexpr = "{.reg .b32 t, one; mov.b32 t, $1; " + shift + unbias
        minus_base = (-one_plus - zero).to(DTYPE)
        # `dtype` must be a literal: the call does not unwrap a constexpr
        if half:
            w = tl.inline_asm_elementwise(asm, "=r,r,r", [words, minus_base], dtype=tl.float16, is_pure=True, pack=2)
        else:
            w = tl.inline_asm_elementwise(asm, "=r,r,r", [words, minus_base], dtype=tl.bfloat16, is_pure=True, pack=2)
    return w


@triton.jit(do_not_specialize=["size", "N"])
def _sum_splits_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, bias_ptr, out_ptr, size, N, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):
    """out [M, N] = sum over s of partial [SPLIT, M, N] float32, in order of s (+ bias)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLIT):
        total += tl.load(partial_ptr + (tl.zeros((), tl.int64) + size) * s + i, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + i % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=mask)


def sum_splits(partial: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y [M, N] = partial [SPLIT, M, N] float32 summed over its splits in order, + bias [N]."""
    block = 256
    _sum_splits_kernel[(-(-y.numel() // block),)](
        partial, bias, y, y.numel(), y.shape[1], HAS_BIAS=bias is not None, SPLIT=partial.shape[0], BLOCK=block,
        num_warps=2,
    )  # fmt: skip
