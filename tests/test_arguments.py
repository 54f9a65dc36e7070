"""Lists on command lines, and how a command ends."""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable

import pytest

from compress import arguments
from compress.errors import EnvironmentProblem


def test_lists_are_read_and_named_once() -> None:
    """Oracle: by hand."""
    assert arguments.numbers("16,1,16") == [16, 1]
    assert arguments.shapes("4096x128,64x32,4096x128") == [(4096, 128), (64, 32)]
    assert arguments.names(["a", "b"])("b,a,b") == ["b", "a"]


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        *[(arguments.numbers, text, "numbers from 1 on") for text in ("", "x", "1,", "0", "4,-1", "1.5")],
        *[(arguments.shapes, text, "N x K") for text in ("", "4096", "1x2x3", "axb", "0x64", "64x64,")],
        (arguments.names(["a", "b"]), "a,c,d", "c,d: known are a, b"),
        (arguments.names(["a", "b"]), "", "known are a, b"),
    ],
)
def test_other_texts_are_refused(read: Callable[[str], object], text: str, message: str) -> None:
    """Oracle: the message, which quotes the text and shows the form."""
    with pytest.raises(ArgumentTypeError) as raised:
        read(text)
    assert message in str(raised.value)


def test_an_error_for_the_user_ends_a_command_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the exit code of the error's class, its text as one line; any other error passes."""

    def fails() -> None:
        raise EnvironmentProblem("no GPU; take one")

    with pytest.raises(SystemExit) as ended:
        arguments.run_command(fails)
    assert ended.value.code == EnvironmentProblem.exit_code and capsys.readouterr().err == "error: no GPU; take one\n"
    with pytest.raises(ZeroDivisionError):
        arguments.run_command(lambda: print(1 // 0))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["compress.kernels.bench", "--ms", "x"], "argument --ms/--tokens: 'x' is no list of numbers from 1 on"),
        (["compress.kernels.codegen", "--shapes", "4096"], "argument --shapes: '4096' is no list of N x K"),
        (["compress.eval.decode", "--batches", "0"], "argument --batches: '0' is no list of numbers from 1 on"),
        (["compress.eval.scale", "--methods", "gptq5"], "argument --methods: gptq5: known are"),
    ],
)
def test_commands_refuse_what_they_cannot_read(command: list[str], message: str) -> None:
    """Oracle: argparse's exit code 2 of the process, and its last line, without a traceback."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
