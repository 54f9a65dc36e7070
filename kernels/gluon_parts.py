"""What the Hopper kernels share: programmatic dependent launch, clusters, and the dequantization of a slice of words.

Gluon is Triton's lower level: layouts, shared memory and asynchronous copies are spelled out. It has no interpreter, so
these kernels are tested on a GPU, and the plain Triton kernel of `w4a16` computes everywhere else.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

SCALED_UNIT: gl.constexpr = gl.constexpr(2.0**9)  # what sums over `scaled_slice` are to be multiplied by


@gluon.jit
def instruction(ptx: gl.constexpr):  # type: ignore[no-untyped-def]
    """PTX without operands or result, run by every thread."""
    asm: gl.constexpr = ptx + "; // $0"
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pdl_launch_next():  # type: ignore[no-untyped-def]
    """Let the next kernel of the stream start; it waits in `pdl_wait` before it touches what this one writes."""
    instruction("griddepcontrol.launch_dependents")


@gluon.jit
def pdl_wait():  # type: ignore[no-untyped-def]
    """Wait until the kernel before this one is complete and its writes are visible."""
    instruction("griddepcontrol.wait")


@gluon.jit
def fetch_first_descriptor(kernel: gl.constexpr):  # type: ignore[no-untyped-def]
    """Bring the tensor descriptor that is the first parameter of the kernel of that name to where copies look for it:
    copies that may only start late should not wait for memory twice."""
    asm: gl.constexpr = (
        "{.reg .pred p; .reg .b32 t; .reg .b64 a; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; mov.b64 a, "
        + kernel
        + "_param_0; cvta.param.u64 a, a; @p prefetch.tensormap [a]; mov.b32 $0, 0;}"
    )
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def cluster_bases(ctas, rank):  # type: ignore[no-untyped-def]
    """Bases of a layout over a cluster whose programs each hold a tensor of their own: the program's number moves
    nothing. Triton calls the cluster one program with `num_ctas`; what differs between its members is theirs to say."""
    return [[0] * rank for _ in range(ctas.bit_length() - 1)]


@gluon.constexpr_function
def cluster_shares(split, sharers):  # type: ignore[no-untyped-def]
    """Bases of a layout that deals a tensor [tokens, sharers * columns] out to a cluster: each `sharers` neighbours get
    the same tokens of columns of their own."""
    columns = [[0, 1 << b] for b in range(sharers.bit_length() - 1)]
    return columns + [[1 << b, 0] for b in range(split.bit_length() - 1)]


@gluon.jit
def cluster_rank():  # type: ignore[no-untyped-def]
    """Number of this program within its cluster, int32."""
    return gl.inline_asm_elementwise("mov.u32 $0, %cluster_ctarank;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _minus_base(zero, p: gl.constexpr, DTYPE: gl.constexpr):  # type: ignore[no-untyped-def]
    """What to add to what `slice_weights` finds a code above: minus that and minus the zero point."""
    base: gl.constexpr = 128.0 if gl.float16 != DTYPE else (64.0 if p % 2 else 1024.0)
    return (-base - zero).to(DTYPE)


@gluon.constexpr_function
def _within_reach(p, half):  # type: ignore[no-untyped-def]
    """PTX that shifts two int16 words in t so that nibble p is lowest, or in float16 the second lowest for odd p."""
    bits = p // 2 * 8 if half else p * 4
    return "shr.b32 t, t, " + str(bits) + "; " if bits else ""


@gluon.jit
def slice_weights(words, zero, p: gl.constexpr, DTYPE: gl.constexpr):  # type: ignore[no-untyped-def]
    """Nibble p of int16 words minus the zero point: exact small integers in DTYPE (float16 or bfloat16).

    One lop3 makes two nibbles mantissa bits of 1024 (float16) or 128 (bfloat16). float16 has room for them four bits
    further up: nibbles 1 and 3 stay there and are divided by 16 in the subtraction; both steps are exact, and half of
    the shifts are gone. zero: float32, broadcasts against words.
    """
    half: gl.constexpr = gl.float16 == DTYPE
    unbias: gl.constexpr = (
        (
            "lop3.b32 t, t, 0x00f000f0, 0x64006400, 0xea; mov.b32 k, 0x2c002c00; fma.rn.f16x2 $0, t, k, $2;}"
            if p % 2
            else "lop3.b32 t, t, 0x000f000f, 0x64006400, 0xea; add.rn.f16x2 $0, t, $2;}"
        )
        if half
        else "lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; mov.b32 k, 0x3f803f80; fma.rn.bf16x2 $0, t, k, $2;}"
    )
    asm: gl.constexpr = "{.reg .b32 t, k; mov.b32 t, $1; " + _within_reach(p, half) + unbias
    minus_base = _minus_base(zero, p, DTYPE)
    # `dtype` must be a literal: the call does not unwrap a constexpr
    if half:
        w = gl.inline_asm_elementwise(asm, "=r,r,r", [words, minus_base], dtype=gl.float16, is_pure=True, pack=2)
    else:
        w = gl.inline_asm_elementwise(asm, "=r,r,r", [words, minus_base], dtype=gl.bfloat16, is_pure=True, pack=2)
    return w


@gluon.jit
def byte_weights(words, zero, p: gl.constexpr, DTYPE: gl.constexpr):  # type: ignore[no-untyped-def]
    """Byte p of int16 words minus the zero point: exact small integers in DTYPE (float16 or bfloat16).

    A byte becomes mantissa bits of 1024 in float16. bfloat16 has 7 of them, so there it goes through those of float32:
    2^23 + byte, and one instruction that rounds two differences, which are exact up to 255. zero: float32, broadcasts
    against words.
    """
    if gl.float16 == DTYPE:
        take: gl.constexpr = "prmt.b32 t, $1, 0x64646464, " + ("0x4341" if p else "0x4240") + "; "
        asm: gl.constexpr = "{.reg .b32 t; " + take + "add.rn.f16x2 $0, t, $2;}"
        minus_base = (-1024.0 - zero).to(gl.float16)
        w = gl.inline_asm_elementwise(asm, "=r,r,r", [words, minus_base], dtype=gl.float16, is_pure=True, pack=2)
    else:
        first: gl.constexpr = "prmt.b32 a, $1, 0x4b000000, " + ("0x7651" if p else "0x7650") + "; "
        second: gl.constexpr = "prmt.b32 b, $1, 0x4b000000, " + ("0x7653" if p else "0x7652") + "; "
        round2: gl.constexpr = "add.rn.f32 a, a, $2; add.rn.f32 b, b, $3; cvt.rn.bf16x2.f32 $0, b, a;}"
        wide: gl.constexpr = "{.reg .b32 a, b; " + first + second + round2
        minus_wide = -8388608.0 - zero
        w = gl.inline_asm_elementwise(wide, "=r,r,r,r", [words, minus_wide], dtype=gl.bfloat16, is_pure=True, pack=2)
    return w


@gluon.jit
def scaled_slice(words, scale, p: gl.constexpr):  # type: ignore[no-untyped-def]
    """(nibble p of int16 words - 8) * scale / SCALED_UNIT in float16, rounded once: two instructions for two weights.

    The nibble alone in a float16 is a subnormal number, code * 2^-24, and 16 times that four bits further up. One fused
    multiply-add brings it to size, scales it and subtracts the zero point, whose product with the scale is exact, being
    a shift. scale: float16, at most 1, so that 2^15 of it is a float16; broadcasts against words. The same in bfloat16
    came out wrong on an H100, as if its multiply-add took subnormal numbers for zero.
    """
    by = scale * (2048.0 if p % 2 else 32768.0)
    minus = scale * -0.015625
    mask: gl.constexpr = "and.b32 t, t, 0x00f000f0; " if p % 2 else "and.b32 t, t, 0x000f000f; "
    take: gl.constexpr = _within_reach(p, True) + mask + "fma.rn.f16x2 $0, t, $2, $3;}"
    asm: gl.constexpr = "{.reg .b32 t; mov.b32 t, $1; " + take
    return gl.inline_asm_elementwise(asm, "=r,r,r,r", [words, by, minus], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def scaled_byte(words, scale, p: gl.constexpr):  # type: ignore[no-untyped-def]
    """(byte p of int16 words - 128) * scale / SCALED_UNIT in float16, rounded once: as `scaled_slice`."""
    by = scale * 32768.0
    minus = scale * -0.25
    take: gl.constexpr = "prmt.b32 t, $1, 0, 0x4341; " if p else "and.b32 t, $1, 0x00ff00ff; "
    asm: gl.constexpr = "{.reg .b32 t; " + take + "fma.rn.f16x2 $0, t, $2, $3;}"
    return gl.inline_asm_elementwise(asm, "=r,r,r,r", [words, by, minus], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def bare_codes(words, p: gl.constexpr, DTYPE: gl.constexpr):  # type: ignore[no-untyped-def]
    """Nibble p of int16 words as numbers for an MMA, which takes what a multiply-add would lose or cost: in float16 the
    code alone, a subnormal number (16 times that for odd p), in bfloat16 128 + code. `without_zero` makes weights of
    the sums."""
    half: gl.constexpr = gl.float16 == DTYPE
    take: gl.constexpr = (
        ("and.b32 $0, t, 0x00f000f0;}" if p % 2 else "and.b32 $0, t, 0x000f000f;}")
        if half
        else "lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea;}"
    )
    asm: gl.constexpr = "{.reg .b32 t; mov.b32 t, $1; " + _within_reach(p, half) + take
    if half:
        codes = gl.inline_asm_elementwise(asm, "=r,r", [words], dtype=gl.float16, is_pure=True, pack=2)
    else:
        codes = gl.inline_asm_elementwise(asm, "=r,r", [words], dtype=gl.bfloat16, is_pure=True, pack=2)
    return codes


@gluon.constexpr_function
def codes_unit(dtype):  # type: ignore[no-untyped-def]
    """What sums of `without_zero` are to be multiplied by."""
    return 2.0**24 if dtype == gl.float16 else 1.0


@gluon.jit
def without_zero(even, odd, x_sums, zero, DTYPE: gl.constexpr):  # type: ignore[no-untyped-def]
    """float32 sums of x times (code - zero) / `codes_unit` from those of x times `bare_codes`, in float16 of even and
    odd p apart, and from sums of x. These are taken away zero times, in bfloat16 128 times more: at most 8 of float32's
    24 bits."""
    if gl.float16 == DTYPE:
        part = even + odd * 0.0625 - x_sums * (zero * 2.0**-24)
    else:
        part = even - x_sums * (zero + 128.0)
    return part


@gluon.jit
def columns_part(t, part: gl.constexpr, PARTS: gl.constexpr, L: gl.constexpr):  # type: ignore[no-untyped-def]
    """One of PARTS equal parts of the columns of t, in layout L: only renames registers."""
    if PARTS == 1:
        t = gl.convert_layout(t, L, assert_trivial=True)
    else:
        halves = gl.split(t.reshape([t.shape[0], 2, t.shape[1] // 2]).permute(0, 2, 1))
        t = columns_part(halves[part // (PARTS // 2)], part % (PARTS // 2), PARTS // 2, L)
    return t


@gluon.constexpr_function
def parts_of(group):  # type: ignore[no-untyped-def]
    """Scale groups in a tile of K."""
    return 1 if group >= 128 else 128 // group


@gluon.constexpr_function
def fields_of(group, has_zero):  # type: ignore[no-untyped-def]
    """Scales of a tile and a row, and zeros behind them where there are any."""
    return parts_of(group) * (2 if has_zero else 1)


@gluon.jit
def load_row(ptr, g, n, N, EVEN_N: gl.constexpr):  # type: ignore[no-untyped-def]
    """Row g of a [G, N] array at columns n; zero beyond N."""
    at = ptr + g.to(gl.int64) * N + n
    if EVEN_N:
        return gl.load(at, eviction_policy="evict_last")
    return gl.load(at, mask=n < N, other=0, eviction_policy="evict_last")


@gluon.jit
def scale_group(t, s: gl.constexpr, tiles, K, GROUP: gl.constexpr):  # type: ignore[no-untyped-def]
    """Scale group of part s of tile t (parts are groups below 128). Beyond the end, where x is zero, any will do."""
    if GROUP >= 128:
        return gl.minimum(t, tiles - 1) // (GROUP // 128)
    return gl.minimum(t * (128 // GROUP) + s, (K - 1) // GROUP)
