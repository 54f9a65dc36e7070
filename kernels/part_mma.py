"""Warpgroup MMAs of any number of tokens, in PTX: Triton has them of powers of two.

160 tokens, say, could be a `wgmma` of 128 and one of 32. But however few its tokens, an MMA with its left operand in
registers takes some 20 cycles, and a warp is held until all but two are done (`tile_product`), which leaves it little
time where those are small. It is one of 160 instead, whose sums are tensors of a part of the tokens each
(`tile_shape.part_tokens`), one behind the other in the registers of the instruction:

    sums [ROWS, 160]         | part 0 [ROWS, 32] | part 1 [ROWS, 32] | ... | part 4 |
    d of a thread            | 0 .. 15           | 16 .. 31          | ... | .. 79  |

A lane of a warp has of 16 rows and 8 tokens what it has of 16 rows and 8 inputs of the left operand, which therefore is
tensors [ROWS, tokens of a part], too: PTX that Triton lets one write takes tensors of one layout.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from compress.kernels.gluon_parts import columns_part
from compress.kernels.tile_shape import mma_layout, n_parts, part_tokens


@gluon.jit
def _registers_of(w, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """A left operand [ROWS, 64] as tensors [ROWS, tokens of a part]."""
    PARTS: gl.constexpr = 64 // part_tokens(T)
    found = ()
    for p in gl.static_range(PARTS):
        found = found + (columns_part(w, p, PARTS, mma_layout(T)),)
    return found


@gluon.constexpr_function
def _each(n):  # type: ignore[no-untyped-def]
    """Values of a thread in a tensor [ROWS, n]."""
    return n // 2


@gluon.constexpr_function
def _multiply_constraints(t):  # type: ignore[no-untyped-def]
    n = _each(t.block_m)
    tied = [str(i) for i in range(n)]
    return ",".join(["=f"] * n + tied + ["r"] * (16 + _each(part_tokens(t))))


@gluon.constexpr_function
def _multiply_asm(t):  # type: ignore[no-untyped-def]
    """Four MMAs of 16 inputs each, and a group of them. The address of x, in swizzled rows of 128 bytes, 8 of which are
    a kilobyte, is an offset in shared memory."""
    n = _each(t.block_m)
    kind = "f16.f16" if t.dtype == gl.float16 else "bf16.bf16"
    sums = ", ".join(f"${i}" for i in range(n))
    code = (
        "{.reg .b32 a, b; .reg .b64 d; .reg .pred p; setp.eq.u32 p, 0, 0; mov.b32 a, global_smem; "
        f"add.u32 a, a, ${2 * n + 16}; shr.u32 a, a, 4; and.b32 a, a, 0x3fff; "
        "mov.b32 b, 0x40000040; mov.b64 d, {a, b};\n"
        "wgmma.fence.sync.aligned;\n"
    )
    for k in range(4):
        left = ", ".join(f"${2 * n + 4 * k + i}" for i in range(4))
        code += f" wgmma.mma_async.sync.aligned.m64n{t.block_m}k16.f32.{kind} {{{sums}}}, {{{left}}}, d, p, 1, 1, 0;\n"
        code += "add.s64 d, d, 2;\n" if k < 3 else ""
    return code + "wgmma.commit_group.sync.aligned;}"


@gluon.constexpr_function
def _dtypes(t, operands):  # type: ignore[no-untyped-def]
    """Of sums, and of so many left operands behind them."""
    return (gl.float32,) * n_parts(t) + (t.dtype,) * (operands * 64 // part_tokens(t))


@gluon.jit
def multiply_parts(left, x_offset, accs, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Start a group of MMAs: accs, [ROWS, tokens] of each part, and the products of a left operand [ROWS, 64] with x
    [tokens of all parts, 64] at an offset of shared memory."""
    asm: gl.constexpr = _multiply_asm(T)
    constraints: gl.constexpr = _multiply_constraints(T)
    DTYPES: gl.constexpr = _dtypes(T, 0)
    PACK: gl.constexpr = part_tokens(T) // 2
    return gl.inline_asm_elementwise(
        asm,
        constraints,
        accs + _registers_of(left, T) + (gl.to_tensor(x_offset),),
        dtype=DTYPES,
        is_pure=False,
        pack=PACK,
    )


@gluon.constexpr_function
def _wait_constraints(t, operands):  # type: ignore[no-untyped-def]
    n, registers = _each(t.block_m), 16 * operands
    tied = [str(i) for i in range(n + registers)]
    return ",".join(["=f"] * n + ["=r"] * registers + tied)


@gluon.constexpr_function
def _wait_asm(groups):  # type: ignore[no-untyped-def]
    return f"wgmma.wait_group.sync.aligned {groups};"


@gluon.jit
def wait_for_parts(groups: gl.constexpr, accs, operands, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """accs, [ROWS, tokens] of each part, when all but so many groups are done. Operands [ROWS, 64] go through the wait
    as accs do: they are in registers up to there, which may be written behind it."""
    asm: gl.constexpr = _wait_asm(groups)
    OPERANDS: gl.constexpr = len(operands)
    constraints: gl.constexpr = _wait_constraints(T, OPERANDS)
    DTYPES: gl.constexpr = _dtypes(T, OPERANDS)
    PACK: gl.constexpr = part_tokens(T) // 2
    given = accs
    for i in gl.static_range(OPERANDS):
        given = given + _registers_of(operands[i], T)
    there = gl.inline_asm_elementwise(asm, constraints, given, dtype=DTYPES, is_pure=False, pack=PACK)
    sums = ()
    for p in gl.static_range(n_parts(T)):
        sums = sums + (there[p],)
    return sums
