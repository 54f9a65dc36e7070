"""Text -> CalibrationSet: a fixed block of token ids with a hash, so that a run can be repeated exactly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import CalibrationError, ConfigError, EnvironmentProblem


@dataclass
class CalibrationSet:
    """input_ids int64 [S, T] on the CPU, where they came from, and their sha256."""

    input_ids: Tensor
    source: str

    @property
    def sha256(self) -> str:
        shape = str(tuple(self.input_ids.shape)).encode()
        return hashlib.sha256(shape + self.input_ids.contiguous().numpy().tobytes()).hexdigest()

    @property
    def n_tokens(self) -> int:
        return self.input_ids.numel()


@dataclass
class TextSource:
    """Where token windows come from; the part that calibration and evaluation share."""

    what: str  # "calibration" or "eval": the config section that error messages name
    path: str | None
    dataset: str | None
    dataset_config: str | None
    split: str
    text_column: str
    n_sequences: int
    sequence_length: int


def token_windows(source: TextSource, tokenizer: Any, embedded: Tensor | None) -> CalibrationSet:
    """The first n_sequences windows of sequence_length tokens, without overlap.

    Documents are joined and cut as one stream, so that every window is full. Without a path or data set the
    `embedded` token ids [S, T] are used, if given; they only mean something to the embedded model's tokenizer.

    Raises:
        CalibrationError: unreadable or too short.
        ConfigError: a shape the embedded texts do not have, or no source at all.
    """
    need = source.n_sequences * source.sequence_length
    if source.path:
        text = read_text(Path(source.path).expanduser(), source.what, source.text_column)
        ids, label = _encode(tokenizer, text, need), f"{Path(source.path).name}"
    elif source.dataset:
        ids, label = _hub_tokens(source, tokenizer, need)
    elif embedded is not None:
        return _embedded_windows(source, embedded)
    else:
        raise ConfigError(f"nothing to take {source.what} text from; set {source.what}.path or {source.what}.dataset")
    if ids.numel() < need:
        raise CalibrationError(
            f"{source.what} text {label} has {ids.numel()} tokens, but {source.what}.n_sequences="
            f"{source.n_sequences} x sequence_length={source.sequence_length} needs {need}; "
            f"give more text or lower {source.what}.n_sequences"
        )
    return CalibrationSet(ids[:need].view(source.n_sequences, source.sequence_length).clone(), label)


def read_text(path: Path, what: str, column: str = "text") -> str:
    """Text of a .txt/.md file, or the `column` of a .jsonl file's rows joined by blank lines.

    Raises:
        CalibrationError: missing, empty, not UTF-8, or a row without the column.
    """
    if not path.is_file():
        raise CalibrationError(f"{what}.path={path} is not a file; give a UTF-8 text or .jsonl file")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"{what}.path={path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{what}.path={path} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    if path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
            if not line.strip():
                continue
            try:
                rows.append(_text_field(json.loads(line), column))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise CalibrationError(
                    f"{path}:{number} is not a JSON object with text in {column!r}; set {what}.text_column"
                ) from error
        text = "\n\n".join(rows)
    if not text.strip():
        raise CalibrationError(f"{what}.path={path} holds no text")
    return text


def _encode(tokenizer: Any, text: str, need: int) -> Tensor:
    # The start of the text is enough: at least one character a token, and encoding is linear in length.
    ids: list[int] = []
    for chars in (need * 8, len(text)):
        ids = tokenizer(text[:chars], add_special_tokens=False, verbose=False)["input_ids"]
        if chars >= len(text) or len(ids) > need + 16:
            break
    return torch.tensor(ids, dtype=torch.int64)


def _text_field(row: Any, column: str) -> str:
    """row[column], when it is a string; KeyError or TypeError otherwise."""
    if not isinstance(row[column], str):
        raise TypeError(f"{column} holds {type(row[column]).__name__}, not a string")
    return row[column]


def _hub_rows(source: TextSource, label: str) -> Iterator[Any]:
    """Rows of a hub data set, streamed.

    Raises:
        EnvironmentProblem: whatever the data set library and the network below it raise, at the start or later.
    """
    from datasets import load_dataset

    try:
        yield from load_dataset(source.dataset, source.dataset_config, split=source.split, streaming=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentProblem(
            f"{source.what}.dataset={label} cannot be read ({reason}); check its name, {source.what}.dataset_config "
            f"and {source.what}.split, or use {source.what}.path=<local file>"
        ) from error


def _hub_tokens(source: TextSource, tokenizer: Any, need: int) -> tuple[Tensor, str]:
    label = f"{source.dataset}{'/' + source.dataset_config if source.dataset_config else ''}:{source.split}"
    parts: list[Tensor] = []
    have = 0
    for row in _hub_rows(source, label):
        try:
            text = _text_field(row, source.text_column)
        except (KeyError, TypeError) as error:
            raise CalibrationError(
                f"{label} has columns {sorted(row)}, no text in {source.text_column!r}; set {source.what}.text_column"
            ) from error
        ids = tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        parts.append(torch.tensor(ids, dtype=torch.int64))
        have += len(ids)
        if have >= need:
            break
    return (torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)), label


def _embedded_windows(source: TextSource, embedded: Tensor) -> CalibrationSet:
    n, t = embedded.shape
    if source.n_sequences > n or source.sequence_length > t:
        raise ConfigError(
            f"{source.what}.n_sequences={source.n_sequences} x sequence_length={source.sequence_length} asks for more "
            f"than the embedded texts hold ({n} x {t}); give {source.what}.path or {source.what}.dataset"
        )
    ids = embedded[: source.n_sequences, : source.sequence_length].to(torch.int64).clone()
    return CalibrationSet(ids, f"embedded {source.what} texts")
