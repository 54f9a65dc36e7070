"""Registers that running MMAs use, as `machine_code` finds them in machine code written here by hand."""

from __future__ import annotations

import pytest

from compress.kernels.machine_code import overwritten, read

MMA = "HGMMA.64x64x16.F32 R24, R{left}, gdesc[UR16], R24{end} ;"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, {left} ;"


def code(*lines: str) -> str:
    """As cuobjdump prints it: an address, the instruction, and its bits in two comments."""
    return "\n".join(
        f"        /*{16 * i:04x}*/    {line}    /* 0x00000000000079c5 */\n    /* 0x000fea0000000000 */"
        for i, line in enumerate(lines)
    )


def mma(left: int, end: bool = True) -> str:
    return MMA.format(left=left, end=", gsb0" if end else "")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([mma(8), WAIT.format(left="0x0"), "HADD2 R8, R1, R2 ;", "EXIT ;"], []),
        ([mma(8), "HADD2 R11, R1, R2 ;", WAIT.format(left="0x0"), "EXIT ;"], ["0x10"]),  # R8 .. R11 are the operand
        ([mma(8), "HADD2 R12, R8, R2 ;", WAIT.format(left="0x0"), "EXIT ;"], []),
        ([mma(8), "HADD2 R55, R1, R2 ;", "HADD2 R56, R1, R2 ;", "EXIT ;"], ["0x10"]),  # 32 sums from R24 on
        ([mma(8), mma(12), WAIT.format(left="0x1"), "HADD2 R8, R1, R2 ;", "HADD2 R12, R1, R2 ;", "EXIT ;"], ["0x40"]),
        ([mma(8, end=False), mma(12), WAIT.format(left="0x1"), "HADD2 R8, R1, R2 ;", "EXIT ;"], ["0x30"]),  # one group
        ([mma(8), "LDS.128 R5, [R1] ;", "LDS.64 R6, [R1] ;", "LDS.64 R7, [R1] ;", "EXIT ;"], ["0x10", "0x30"]),
        ([mma(8), "LDSM.16.M88.4 R6, [R1] ;", "IMAD.WIDE R7, R1, R2, R4 ;", "CS2R R10, SRZ ;", "EXIT ;"],
         ["0x10", "0x20", "0x30"]),
        ([mma(8), "STS.128 [R1], R8 ;", "ISETP.GE.AND P0, PT, R8, R9, PT ;", "BAR.SYNC.DEFER_BLOCKING R8, 0xa0 ;",
          "R2UR UR4, R8 ;", "EXIT ;"], []),
        ([mma(8), "SHFL.IDX PT, R9, R1, RZ, 0x1f ;", "EXIT ;"], ["0x10"]),
        # around a loop: what is written at its begin while the MMA of its end runs
        (["HADD2 R8, R1, R2 ;", mma(8), "@!P0 BRA 0x0 ;", "EXIT ;"], ["0x0"]),
        (["HADD2 R8, R1, R2 ;", mma(8), WAIT.format(left="0x0"), "@!P0 BRA 0x0 ;", "EXIT ;"], []),
        # on one of two paths
        ([mma(8), "@P0 BRA 0x30 ;", WAIT.format(left="0x0"), "HADD2 R8, R1, R2 ;", "EXIT ;"], ["0x30"]),
        ([mma(8), "BRA 0x30 ;", "HADD2 R8, R1, R2 ;", WAIT.format(left="0x0"), "HADD2 R8, R1, R2 ;", "EXIT ;"], []),
        # an operand in shared memory has no registers
        (["HGMMA.64x64x16.F32 R24, gdesc[UR4], R24, gsb0 ;", "HADD2 R8, R1, R2 ;", "EXIT ;"], []),
        (["IGMMA.64x64x32.S8.S8 R24, R8, gdesc[UR4], R24, gsb0 ;", "IADD3 R11, R1, R2, RZ ;", "EXIT ;"], ["0x10"]),
        ([], []),
    ],
)  # fmt: skip
def test_registers_of_running_mmas(lines: list[str], expected: list[str]) -> None:
    """Oracle: by hand, with the widths that the opcodes have."""
    assert [found.split()[0] for found in overwritten(read(code(*lines)))] == expected
