"""What the commands beside `python -m compress` share: lists on their command lines, errors without a traceback.

parser.add_argument("--tokens", type=numbers, default="1,16,64")
if __name__ == "__main__":
    run_command(main)
"""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable
from typing import Any

from compress.errors import CompressError


def numbers(text: str) -> list[int]:
    """1,16,64 -> [1, 16, 64], each once, in order of the text.

    Raises:
        ArgumentTypeError: anything but numbers from 1 on.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ArgumentTypeError(f"{text!r} is no list of numbers from 1 on, with commas, like 1,16,256")
    return list(dict.fromkeys(found))


def shapes(text: str) -> list[tuple[int, int]]:
    """4096x14336,28672x4096 -> [(4096, 14336), (28672, 4096)].

    Raises:
        ArgumentTypeError: anything but pairs of numbers from 1 on.
    """
    try:
        found = [(int(n), int(k)) for n, k in (pair.split("x") for pair in text.split(","))]
    except ValueError:
        found = []
    if not found or min(map(min, found)) < 1:
        raise ArgumentTypeError(f"{text!r} is no list of N x K, with commas, like 4096x14336,28672x4096")
    return list(dict.fromkeys(found))


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A list of some of `known`."""
    allowed = list(known)

    def read(text: str) -> list[str]:
        found = text.split(",")
        if wrong := [name for name in found if name not in allowed]:
            raise ArgumentTypeError(f"{','.join(wrong)}: known are {', '.join(allowed)}")
        return list(dict.fromkeys(found))

    return read


def in_order(kind: type, text: str) -> Any:
    """64,128,1 -> a dataclass of numbers and booleans, of its fields in order; later ones have their defaults.

    Raises:
        TypeError, ValueError: too few, too many, or no numbers.
    """
    kinds = kind.__annotations__.values()
    given = [int(part) for part in text.split(",")]
    if len(given) > len(kinds):
        raise TypeError(f"{len(given)} values")
    return kind(*(bool(v) if of in (bool, "bool") else v for v, of in zip(given, kinds, strict=False)))


def run_command(main: Callable[[], None]) -> None:
    """A command: an error that its user can act on ends it with a line on stderr and that error's exit code."""
    try:
        main()
    except CompressError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
