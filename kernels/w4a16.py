"""W4A16 matmul in Triton: y[M, N] = x[M, K] W[N, K]^T (+ bias), W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g].

Layout. K is cut into tiles of 128 inputs, a tile into 4 slices of 32. A tile of a row is 32 int16 words, and nibble p
of word j holds the code of k = 128 * tile + 32 * p + j:

    words[tile, n, j]   int16:  | code[96 + j] | code[64 + j] | code[32 + j] | code[j] |        (+ 128 * tile)
                        bit      15          12             8              4         0

    words [T, N, 32] int16, T = ceil(K / 128)      one program's rows of one tile are contiguous: 64 bytes a row
    scale [G + 1, N] float16/bfloat16/float32      zero [G, N] uint8, or None for a symmetric grid (zero = 8)

The last row of scale is not one: it holds the power of two at or above each row's scales, a unit for `w4a16_tiled`.

Extracting nibble p of all words of a tile gives W[n, 128 t + 32 p : + 32] in order, so it meets a contiguous slice of x
in `tl.dot`: a permutation of K shared by both operands is free, and no join, interleave or transposition is needed. Two
neighbouring words are one 32-bit register, so one `lop3` dequantizes two weights. Every group size that is a multiple
of 32 has one scale a slice; from 128 on, one a tile, applied to the float32 accumulator of the tile: weights stay exact
small integers in the tensor cores, and there is no rounding of scale * code. K beyond the last tile is padded with zero
codes and x is masked there.

On Hopper two kernels with this layout take over, by shape (`configuration`): `w4a16_decode` for a few tokens and
`w4a16_tiled` above. The kernel here runs everywhere else, and in the interpreter.

Work split. W is the *left* operand, so a dequantized tile goes from registers straight into the MMA, and M is the MMA's
N dimension, padded to 16 at least. Program (tile of N, tile of M, split s) reads tiles t = s * per .. of K. With
SPLIT > 1 partial sums go to a float32 workspace [SPLIT, M, N] and a second kernel adds them in order: the same bits
every run, no atomics.

            M (BLOCK_M)
          +-------------+         x^T  [32, BLOCK_M] per slice
      N   |  acc fp32   |   +=    W    [BLOCK_N, 32] per slice, 4 slices a tile
          +-------------+

Twin: `compress.kernels.reference.w4a16_linear`. Runs under TRITON_INTERPRET=1 on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.errors import ConfigError
from compress.kernels import common, dispatch
from compress.kernels.choose import hopper_kernels, hopper_takes
from compress.kernels.common import field_to_float, load_column, tile_of_program

TILE_K = tl.constexpr(128)
SLICE_K = tl.constexpr(32)


@dataclass(frozen=True)
class KernelWeight:
    """A weight in the layout above. group_size counts inputs; for one group a row it is K padded to whole tiles."""

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    n: int
    k: int
    group_size: int
    bits: ClassVar[int] = 4

    @property
    def fields(self) -> int:
        """Scales and zeros of a row and a tile of K."""
        return max(1, TILE_K.value // self.group_size) * (1 if self.zero is None else 2)


@dataclass(frozen=True)
class Config:
    """Tile sizes and pipeline of one launch. use_asm: inline PTX dequantization instead of plain Triton."""

    block_m: int
    block_n: int
    split_k: int
    num_warps: int
    num_stages: int
    use_asm: bool = True


def pack_kernel_layout(codes: Tensor, scale: Tensor, zero: Tensor | None) -> KernelWeight:
    """Codes uint8 [N, K], scale float [N', G], zero uint8 [N', G] or None (symmetric) -> KernelWeight, on their device.

    Raises:
        ConfigError: a code above 15, or a group size that is not a multiple of 32 (unless G = 1, where any K will do).
    """
    n, k = codes.shape
    groups = scale.shape[1]
    if codes.dtype is not torch.uint8 or (codes.numel() and int(codes.max()) > 15):
        raise ConfigError(f"codes are {codes.dtype} with values up to {int(codes.max())}; W4A16 takes uint8 below 16")
    if groups == 0 or k % groups or (groups > 1 and (k // groups) % SLICE_K.value):
        raise ConfigError(
            f"K={k} in {groups} groups: the W4A16 kernel takes groups of a multiple of {SLICE_K.value} inputs, "
            "or one group a row; use another group_size or backend=auto"
        )
    tiles = -(-k // TILE_K.value)
    padded = torch.nn.functional.pad(codes, (0, tiles * TILE_K.value - k))
    fields = padded.view(n, tiles, 4, 32).transpose(0, 1).to(torch.int16)  # [T, N, nibble, word]
    words = fields[:, :, 0] | fields[:, :, 1] << 4 | fields[:, :, 2] << 8 | fields[:, :, 3] << 12
    group_size = k // groups if groups > 1 else tiles * TILE_K.value

    def columns(t: Tensor) -> Tensor:
        return t.expand(n, groups).t().contiguous()

    scales = torch.cat([columns(scale), common.row_units(scale).expand(n)[None]])
    weight = KernelWeight(words.contiguous(), scales, None if zero is None else columns(zero), n, k, group_size)
    common.settle(codes.device)
    return weight


def unpack_kernel_layout(weight: KernelWeight) -> Tensor:
    """The inverse: codes uint8 [N, K]."""
    fields = torch.stack([(weight.words >> (4 * p)) & 15 for p in range(4)], dim=2)
    return fields.to(torch.uint8).transpose(0, 1).reshape(weight.n, -1)[:, : weight.k]


@triton.jit(do_not_specialize=["M", "tiles", "tiles_per_split"])
def _w4a16_kernel(  # type: ignore[no-untyped-def]
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, K, tiles, tiles_per_split, out_split_stride,
    GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_N: tl.constexpr, STAGES: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_N, BLOCK_M] tile of y^T over one split of K; see the module docstring."""
    pid, split = tl.program_id(0), tl.program_id(1)
    pid_n, pid_m = tile_of_program(pid, M, N, BLOCK_M, BLOCK_N, GROUP_N)
    rn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rj = tl.arange(0, 32)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    dot_dtype: tl.constexpr = tl.float32 if MODE == 2 else dtype
    x_tile = x_ptr + rm.to(tl.int64)[None, :] * K + rj[:, None]  # [32, BM], x^T
    w_step = (tl.zeros((), tl.int64) + N) * 32
    w_tile = words_ptr + rn.to(tl.int64)[:, None] * 32 + rj[None, :]  # [BN, 32]
    m_mask = rm[None, :] < M
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    zero = tl.full((BLOCK_N, 1), 8.0, tl.float32)

    first = split * tiles_per_split
    for t in tl.range(first, min(first + tiles_per_split, tiles), num_stages=STAGES):
        w_at = w_tile + w_step * t
        if EVEN_N:
            words = tl.load(w_at, eviction_policy="evict_first")
        else:
            words = tl.load(w_at, mask=rn[:, None] < N, other=0, eviction_policy="evict_first")
        if GROUP % 128 == 0:
            g = t // (GROUP // 128)
            scale = load_column(scale_ptr, rn, g, N, EVEN_N)
            if HAS_ZERO:
                zero = load_column(zero_ptr, rn, g, N, EVEN_N)
            part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for p in tl.static_range(4):
            k = t * 128 + p * 32
            if EVEN_K:
                x = tl.load(x_tile + k, mask=m_mask, other=0.0, eviction_policy="evict_last")
            else:
                x = tl.load(x_tile + k, mask=m_mask & (k + rj[:, None] < K), other=0.0, eviction_policy="evict_last")
            if GROUP % 128 != 0:
                g = min(k, K - 1) // GROUP  # slices beyond K hold x = 0; any scale in range will do
                scale = load_column(scale_ptr, rn, g, N, EVEN_N)
                if HAS_ZERO:
                    zero = load_column(zero_ptr, rn, g, N, EVEN_N)
            w = field_to_float(words, zero, 4 * p, 15, dtype, MODE)
            if GROUP % 128 == 0:
                part = tl.dot(w, x.to(dot_dtype), part)
            else:
                acc += tl.dot(w, x.to(dot_dtype)) * scale
        if GROUP % 128 == 0:
            acc += part * scale

    if HAS_BIAS:
        acc += load_column(bias_ptr, rn, 0, N, EVEN_N)
    out = out_ptr + split.to(tl.int64) * out_split_stride + rm.to(tl.int64)[None, :] * N + rn[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=m_mask & (rn[:, None] < N))


def choose_config(m: int, n: int, k: int, n_sms: int) -> Config:
    """Tiles, split and pipeline for y[m, n]; pure, so that a table of it can be printed and tested.

    Up to 16 rows the kernel is bound by reading W: narrow tiles of N, and K split until every multiprocessor has about
    seven programs of four tiles of K or more. Beyond, two warpgroups share a wider tile and two programs a
    multiprocessor are enough. Measured on an H100 by `compress.kernels.tune` (NOTES.md).
    """
    if m <= 16:
        block_m, block_n, warps, programs_per_sm, min_tiles = 16, 64, 4, 7, 4
    else:
        block_m = 32 if m <= 32 else (64 if m <= 256 else 128)
        block_n, warps, programs_per_sm, min_tiles = 128, 8, 2, 8
    programs = -(-n // block_n) * -(-m // block_m)
    tiles = -(-k // TILE_K.value)
    split = max(1, min(programs_per_sm * n_sms // max(programs, 1), tiles // min_tiles, 16))
    return Config(block_m, block_n, 1 << (split.bit_length() - 1), warps, num_stages=3)


def _check(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int) -> None:
    common.check_device("W4A16", x.device)
    common.check_activations("W4A16", x)
    tiles = words.shape[0]
    if words.dtype is not torch.int16 or words.dim() != 3 or words.shape[2] != 32:
        raise ConfigError(f"words are {words.dtype} {tuple(words.shape)}; build them with pack_kernel_layout")
    if -(-x.shape[1] // TILE_K.value) != tiles:
        raise ConfigError(f"x is {tuple(x.shape)}, but the weight has {tiles} tiles of {TILE_K.value} inputs")
    common.check_operands(x, words, scale, zero, bias, group_size, rows_behind_scales=1)


def launch(x: Tensor, weight: KernelWeight, bias: Tensor | None = None, config: Any = None, pdl: bool = True) -> Tensor:
    """y [M, N] = x [M, K] W^T + bias in x's dtype; float32 accumulation. Twin: `reference.w4a16_linear`.

    Args:
        x: float16 or bfloat16 [M, K], contiguous, on the weight's device. M = 0 gives an empty result.
        bias: [N] or None.
        config: a Config, DecodeConfig or TiledConfig instead of the measured choice.
        pdl: programmatic dependent launch of the Hopper kernels (`pdl`); the portable kernel has none.

    Raises:
        ConfigError: a dtype, shape, stride or device that does not fit.
        EnvironmentProblem: the device cannot run the kernel.
    """
    _check(x, weight.words, weight.scale, weight.zero, bias, weight.group_size)
    if x.shape[0] == 0 or weight.n == 0:
        return torch.empty(x.shape[0], weight.n, dtype=x.dtype, device=x.device)
    if config is None:
        config = configuration(x, weight)
    if isinstance(config, Config):
        return _launch(x, weight, bias, config)
    from compress.kernels import w4a16_decode, w4a16_tiled

    kernel = w4a16_decode if isinstance(config, w4a16_decode.DecodeConfig) else w4a16_tiled
    return kernel.launch(x, weight, bias, config, pdl)


def configuration(x: Tensor, weight: KernelWeight) -> Any:
    """The measured choice for this GPU and shape, or the rule of the kernel that takes it."""
    m, n, k = x.shape[0], weight.n, weight.k
    hopper = hopper_kernels(x.device)
    if not x.is_cuda or (hopper and not (common.aligned(x, weight) and hopper_takes(n, k, weight.group_size))):
        return choose_config(m, n, k, common.n_sms(x.device))
    choice = dispatch.choose(x.device, x.dtype, 4, weight.group_size, weight.zero is None, n, k, m)
    if not hopper:
        return dispatch.as_config(choice, "w4a16", Config) or choose_config(m, n, k, common.n_sms(x.device))
    from compress.kernels import w4a16_decode, w4a16_tiled

    decode = dispatch.as_config(choice, "w4a16_decode", w4a16_decode.DecodeConfig)
    if decode is not None and m <= decode.block_m and k % TILE_K.value == 0:
        return decode
    tiled = dispatch.as_config(choice, "w4a16_tiled", w4a16_tiled.TiledConfig)
    if tiled is not None and w4a16_tiled.suits(tiled, m):
        return tiled
    sms, shared = common.n_sms(x.device), common.shared_bytes(x.device)
    if m <= w4a16_decode.RULE_MAX_TOKENS and k % TILE_K.value == 0:
        return w4a16_decode.choose_config(m, n, k, sms)
    return w4a16_tiled.choose_config(m, n, k, sms, shared, fields=weight.fields)


def _launch(x: Tensor, weight: KernelWeight, bias: Tensor | None, config: Config) -> Tensor:
    m, k, n = x.shape[0], weight.k, weight.n
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    tiles = weight.words.shape[0]
    per_split = -(-tiles // config.split_k)
    split = -(-tiles // per_split)
    out = y if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=x.device)
    mode = (2 if x.dtype is torch.bfloat16 else 0) if common.INTERPRETED else int(config.use_asm)
    grid = (-(-n // config.block_n) * -(-m // config.block_m), split)
    _w4a16_kernel[grid](
        x, weight.words, weight.scale, weight.zero, bias if split == 1 else None, out, m, n, k, tiles, per_split, m * n,
        GROUP=weight.group_size, HAS_ZERO=weight.zero is not None, HAS_BIAS=bias is not None and split == 1,
        EVEN_N=n % config.block_n == 0, EVEN_K=k % TILE_K.value == 0, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        GROUP_N=8, STAGES=config.num_stages, MODE=mode, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if split > 1:
        common.sum_splits(out, bias, y)
    return y


torch.library.define(
    "compress::w4a16",
    "(Tensor x, Tensor words, Tensor scale, Tensor? zero, Tensor? bias, int group_size, bool pdl=True) -> Tensor",
)


@torch.library.impl("compress::w4a16", ["CUDA", "CPU"])
@common.on_operand_device
def _w4a16_impl(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int, pdl: bool = True
) -> Tensor:
    return launch(x, KernelWeight(words, scale, zero, words.shape[1], x.shape[1], group_size), bias, pdl=pdl)


@torch.library.register_fake("compress::w4a16")
def _w4a16_fake(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int, pdl: bool = True
) -> Tensor:
    return x.new_empty(x.shape[0], words.shape[1])


def matmul(x: Tensor, weight: KernelWeight, bias: Tensor | None = None, pdl: bool = True) -> Tensor:
    """`launch` as the PyTorch operator `compress::w4a16`, which torch.compile and CUDA graphs take as it is."""
    if x.shape[-1] != weight.k:
        raise ConfigError(f"x is {tuple(x.shape)}, but the weight has K={weight.k}")
    return torch.ops.compress.w4a16(x, weight.words, weight.scale, weight.zero, bias, weight.group_size, pdl)
