"""What the machine code (SASS) of a kernel shows and nobody says: registers written while running MMAs still use them.

A warpgroup MMA (`HGMMA`) runs on after it is issued: it reads its left operand from registers and sums into others
until a wait (`WARPGROUP.DEPBAR.LE gsb0, n`) leaves no more than n younger groups. ptxas gives an operand's registers to
others as soon as the code lets it, and whether that is behind the wait is up to whoever wrote that; results that are
wrong now and then are all that tells. So every path through the code is followed here, with the groups that may run on
it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import NamedTuple

import triton

from compress.errors import EnvironmentProblem

_LINE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@(!?U?P[0-9T]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_REGISTER = re.compile(r"R(\d+)")
_PREDICATE = re.compile(r"!?U?P[0-9T]")
_TARGET = re.compile(r"0x([0-9a-f]+)$")
_WAIT = re.compile(r"gsb0, 0x([0-9a-f]+)")
_MMAS = ("HGMMA", "IGMMA", "QGMMA")
# whose first operand is one that they read
_WRITE_NONE = ("ST", "RED", "BAR", "BRA", "UTMA", "SYNCS", "MEMBAR", "R2UR", "R2P", "CCTL", "WARPSYNC", "NANOSLEEP")
_MOST_STATES = 200_000
_MOST_GROUPS = 8  # that are kept apart: more than any wait leaves


@dataclass(frozen=True)
class Instruction:
    """registers: those it writes, or of an MMA those that it uses while it runs."""

    address: int
    opcode: str
    operands: str
    predicated: bool
    registers: frozenset[int]

    @property
    def is_mma(self) -> bool:
        return self.opcode.startswith(_MMAS)


class Running(NamedTuple):
    """Registers that MMAs may use: of groups, the oldest first, and of those issued since the last one was closed."""

    groups: tuple[frozenset[int], ...] = ()
    issued: frozenset[int] = frozenset()

    def after(self, here: Instruction) -> Running:
        if here.is_mma:
            issued = self.issued | here.registers
            if "gsb0" not in here.operands:
                return Running(self.groups, issued)
            groups = (*self.groups, issued)
            if len(groups) > _MOST_GROUPS:  # of a loop that never waits for them
                groups = (groups[0] | groups[1], *groups[2:])
            return Running(groups)
        if here.opcode == "WARPGROUP.DEPBAR.LE":
            (left,) = _WAIT.findall(here.operands)
            return Running(self.groups[max(0, len(self.groups) - int(left, 16)) :], self.issued)
        return self


def disassemble(cubin: bytes) -> str:
    """SASS of a compiled kernel.

    Raises:
        EnvironmentProblem: Triton brings no disassembler, or it does not read this.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, RuntimeError, subprocess.CalledProcessError) as problem:
            raise EnvironmentProblem(
                f"cuobjdump, which comes with Triton, shows no machine code: {problem}"
            ) from problem


def read(sass: str) -> list[Instruction]:
    """The instructions of one kernel."""
    found = []
    for match in filter(None, map(_LINE.match, sass.splitlines())):
        address, predicate, opcode, operands = match.groups()
        registers = _used(opcode, operands) if opcode.startswith(_MMAS) else _written(opcode, operands)
        found.append(Instruction(int(address, 16), opcode, operands, predicate not in (None, "PT"), registers))
    return found


def _several(first: str, count: int) -> frozenset[int]:
    match = _REGISTER.match(first)
    return frozenset() if match is None else frozenset(range(int(match[1]), int(match[1]) + count))


def _used(opcode: str, operands: str) -> frozenset[int]:
    """Of an MMA: float32 or int32 sums, and the left operand where it is one of registers."""
    sums, left = (part.strip() for part in operands.split(",")[:2])
    rows, columns, depth = map(int, opcode.split(".")[1].split("x"))
    bits = 8 if depth == 32 else 16
    return _several(sums, rows * columns // 128) | _several(left, rows * depth * bits // (128 * 32))


def _written(opcode: str, operands: str) -> frozenset[int]:
    """The first operand behind predicates; how many registers that is, the opcode says."""
    if opcode.startswith(_WRITE_NONE) or "SETP" in opcode:
        return frozenset()
    parts = [part.strip() for part in operands.split(",")]
    first = next((part for part in parts if not _PREDICATE.match(part)), "")
    kinds = set(opcode.split("."))
    if opcode.startswith("LDSM"):
        width = next((int(kind) for kind in ("4", "2") if kind in kinds), 1)
    elif opcode.startswith("CS2R"):
        width = 1 if "32" in kinds else 2
    else:
        width = 4 if "128" in kinds else 2 if {"64", "WIDE"} & kinds else 1
    return _several(first, width)


def overwritten(instructions: list[Instruction]) -> list[str]:
    """Instructions that, on some path, write a register while an MMA before them may use it.

    Raises:
        EnvironmentProblem: more paths than can be followed.
    """
    at = {instruction.address: i for i, instruction in enumerate(instructions)}
    found: dict[int, str] = {}
    seen: set[tuple[int, Running]] = set()
    paths = [(0, Running())] if instructions else []
    while paths:
        i, running = paths.pop()
        while i < len(instructions) and (i, running) not in seen:
            seen.add((i, running))
            if len(seen) > _MOST_STATES:
                raise EnvironmentProblem(f"more than {_MOST_STATES} states of {len(instructions)} instructions")
            here = instructions[i]
            if not here.is_mma and here.registers & running.issued.union(*running.groups):
                found[here.address] = f"{here.address:#x} {here.opcode} {here.operands}"
            running = running.after(here)
            if here.opcode == "EXIT" and not here.predicated:
                break
            target = _TARGET.search(here.operands) if here.opcode.startswith("BRA") else None
            i += 1
            if target is not None:
                jump = at[int(target[1], 16)]
                if here.predicated or "," in here.operands:
                    paths.append((jump, running))
                else:
                    i = jump
    return [found[address] for address in sorted(found)]
