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
from compress.kernels.tile_layouts import sums_layout


@gluon.jit
def _registers_of(w, PART: gl.constexpr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """A left operand [rows, 64] as tensors [rows, PART]."""
    PARTS: gl.constexpr = 64 // PART
    found = ()
    for p in gl.static_range(PARTS):
        found = found + (columns_part(w, p, PARTS, sums_layout(T, PART)),)
    return found


@gluon.constexpr_function
def _each(n):  # type: ignore[no-untyped-def]
    """Values of a thread in a tensor [rows, n], of 16 rows a warp."""
    return n // 2


@gluon.constexpr_function
def _multiply_constraints(tokens, part):  # type: ignore[no-untyped-def]
    n = _each(tokens)
    tied = [str(i) for i in range(n)]
    return ",".join(["=f"] * n + tied + ["r"] * (16 + _each(part)))


@gluon.constexpr_function
def _multiply_asm(t, tokens):  # type: ignore[no-untyped-def]
    """Four MMAs of 16 inputs each, and a group of them. The address of x, in swizzled rows of 128 bytes, 8 of which are
    a kilobyte, is an offset in shared memory."""
    n = _each(tokens)
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
        code += f" wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{kind} {{{sums}}}, {{{left}}}, d, p, 1, 1, 0;\n"
        code += "add.s64 d, d, 2;\n" if k < 3 else ""
    return code + "wgmma.commit_group.sync.aligned;}"


@gluon.constexpr_function
def _dtypes(t, tokens, part, operands):  # type: ignore[no-untyped-def]
    """Of sums, and of so many left operands behind them."""
    return (gl.float32,) * (tokens // part) + (t.dtype,) * (operands * 64 // part)


@gluon.jit
def multiply_parts(left, x_offset, accs, TOKENS: gl.constexpr, PART: gl.constexpr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Start a group of MMAs: accs, [rows, PART] of each part of TOKENS, and the products of a left operand [rows, 64]
    with x [TOKENS, 64] at an offset of shared memory, which may differ between warpgroups."""
    asm: gl.constexpr = _multiply_asm(T, TOKENS)
    constraints: gl.constexpr = _multiply_constraints(TOKENS, PART)
    DTYPES: gl.constexpr = _dtypes(T, TOKENS, PART, 0)
    PACK: gl.constexpr = PART // 2
    return gl.inline_asm_elementwise(
        asm,
        constraints,
        accs + _registers_of(left, PART, T) + (gl.to_tensor(x_offset),),
        dtype=DTYPES,
        is_pure=False,
        pack=PACK,
    )


@gluon.constexpr_function
def _wait_constraints(tokens, operands):  # type: ignore[no-untyped-def]
    n, registers = _each(tokens), 16 * operands
    tied = [str(i) for i in range(n + registers)]
    return ",".join(["=f"] * n + ["=r"] * registers + tied)


@gluon.constexpr_function
def _wait_asm(groups):  # type: ignore[no-untyped-def]
    return f"wgmma.wait_group.sync.aligned {groups};"


@gluon.jit
def wait_for_parts(groups: gl.constexpr, accs, operands, PART: gl.constexpr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """accs, [rows, PART] of each part, when all but so many groups are done. Operands [rows, 64] go through the wait
    as accs do: they are in registers up to there, which may be written behind it."""
    asm: gl.constexpr = _wait_asm(groups)
    OPERANDS: gl.constexpr = len(operands)
    TOKENS: gl.constexpr = PART * len(accs)
    constraints: gl.constexpr = _wait_constraints(TOKENS, OPERANDS)
    DTYPES: gl.constexpr = _dtypes(T, TOKENS, PART, OPERANDS)
    PACK: gl.constexpr = PART // 2
    given = accs
    for i in gl.static_range(OPERANDS):
        given = given + _registers_of(operands[i], PART, T)
    there = gl.inline_asm_elementwise(asm, constraints, given, dtype=DTYPES, is_pure=False, pack=PACK)
    sums = ()
    for p in gl.static_range(len(accs)):
        sums = sums + (there[p],)
    return sums
