"""Text to tokens: what is read is what was written, in order, and what cannot be read says so."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from compress.calibration import CalibrationSet, TextSource, read_text, token_windows
from compress.config import CalibrationConfig, EvalConfig
from compress.errors import CalibrationError, ConfigError, EnvironmentProblem
from compress.models import LoadedModel, load_model
from compress.texts import calibration_set, default_tasks, evaluation_set, has_embedded_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Path) -> LoadedModel:
    return load_model(str(tiny_model_dir))


@pytest.fixture(scope="module")
def embedded() -> LoadedModel:
    return load_model("reference")


def source(path: Path | None = None, n: int = 2, length: int = 8, **changes: Any) -> TextSource:
    base = TextSource("calibration", str(path) if path else None, None, None, "train", "text", n, length)
    return replace(base, **changes)


def test_windows_are_the_text_in_order(tmp_path: Path, tokenizer: Any) -> None:
    """Oracle: the bytes of the file: the tiny tokenizer has one token a byte."""
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz")
    found = token_windows(source(path, 3, 8), tokenizer, None)
    assert found.input_ids.shape == (3, 8) and found.input_ids.dtype == torch.int64
    assert [tokenizer.decode(row) for row in found.input_ids] == ["abcdefgh", "ijklmnop", "qrstuvwx"]
    assert (found.source, found.n_tokens) == ("text.txt", 24)


def test_long_text_is_cut_as_if_it_were_encoded_whole(tmp_path: Path) -> None:
    """Oracle: the embedded model's BPE over the whole text; the reader encodes only as much as it needs."""
    from compress.reference import model_path

    bpe = AutoTokenizer.from_pretrained(model_path())
    path = tmp_path / "text.txt"
    path.write_text("The keys to the cabinet are on the table, and nobody knows why. " * 300)
    whole = bpe(path.read_text(), add_special_tokens=False)["input_ids"]
    found = token_windows(source(path, 4, 16), bpe, None)
    assert found.input_ids.flatten().tolist() == whole[:64] and len(whole) > 1000


def test_hash_is_of_shape_and_tokens() -> None:
    """Oracle: hashlib on the same bytes; another shape of the same tokens is another set."""
    ids = torch.arange(12, dtype=torch.int64)
    expected = hashlib.sha256(b"(3, 4)" + ids.numpy().tobytes()).hexdigest()
    assert CalibrationSet(ids.view(3, 4), "x").sha256 == expected
    assert CalibrationSet(ids.view(4, 3), "x").sha256 != expected
    assert CalibrationSet(ids.view(4, 3).t(), "x").sha256 != expected


def test_jsonl_rows_are_joined(tmp_path: Path) -> None:
    """Oracle: json: every row's text as written, also with a line separator that JSON leaves unescaped."""
    texts = ["one", "two\nlines", "U+2028:\u2028 and U+0085:\x85"]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"body": t}, ensure_ascii=False) for t in texts) + "\n\n", encoding="utf-8")
    assert read_text(path, "calibration", "body") == "\n\n".join(texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t ", "holds no text"),
        ("a.txt", b"abc\xff\xfe", "is not UTF-8 text .* at byte 3"),
        ("a.txt", b"short", r"has 5 tokens, .*n_sequences=2 x sequence_length=8 needs 16"),
        ("a.jsonl", b'{"text": "fine"}\n{broken\n', r"a.jsonl:2 is not a JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl:1 .*'text'; set calibration.text_column"),
        ("a.jsonl", b'{"text": null}\n', r"a.jsonl:1 .*'text'"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1 .*'text'"),
        ("a.jsonl", b'["text"]\n', r"a.jsonl:1 "),
        ("a.jsonl", b'"text"\n', r"a.jsonl:1 "),
        ("a.jsonl", b"\n\n", "holds no text"),
    ],
)
def test_text_that_cannot_be_used(name: str, content: bytes, message: str, tmp_path: Path, tokenizer: Any) -> None:
    """Oracle: the defect put into the file; the message names file, line or rule."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        token_windows(source(path), tokenizer, None)


def test_path_that_is_not_a_file(tmp_path: Path, tokenizer: Any) -> None:
    """Oracle: a missing file and a directory."""
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(CalibrationError, match=r"is not a file; give a UTF-8 text or .jsonl file"):
            token_windows(source(path), tokenizer, None)


def test_hub_data_set_offline(tokenizer: Any) -> None:
    """Oracle: the tests' own HF_HUB_OFFLINE; the message names the setting and the way out."""
    with pytest.raises(EnvironmentProblem, match=r"calibration.dataset=some/set:train .*calibration.path=<local file>"):
        token_windows(source(dataset="some/set"), tokenizer, None)


def _serve(monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
    """`datasets.load_dataset` gives these rows."""
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)


def test_hub_rows_become_windows(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the rows joined by blank lines; no row is read beyond what is needed."""
    read = []

    def rows() -> Any:
        for text in ("abcdef", "ghijkl", "never read"):
            read.append(text)
            yield {"text": text}

    _serve(monkeypatch, rows())
    found = token_windows(source(dataset="some/set", dataset_config="v1"), tokenizer, None)
    assert tokenizer.decode(found.input_ids.flatten()) == "abcdef\n\nghijkl\n\n"
    assert found.source == "some/set/v1:train" and len(read) == 2


def test_hub_data_set_that_breaks_off(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: an error in the middle of the stream, of a type no one declared."""

    class Dropped(Exception):
        pass

    def rows() -> Any:
        yield {"text": "abc"}
        raise Dropped("connection reset")

    _serve(monkeypatch, rows())
    with pytest.raises(EnvironmentProblem, match="connection reset") as caught:
        token_windows(source(dataset="some/set"), tokenizer, None)
    assert isinstance(caught.value.__cause__, Dropped)


@pytest.mark.parametrize("row", [{"body": "x"}, {"text": None, "id": 1}])
def test_hub_data_set_without_the_column(row: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the columns there are; an error about content is not mistaken for one of the network."""
    _serve(monkeypatch, [row])
    with pytest.raises(CalibrationError, match=rf"{sorted(row)[0]}.*set calibration.text_column"):
        token_windows(source(dataset="some/set"), tokenizer, None)


def test_embedded_texts_and_their_limits(embedded: LoadedModel) -> None:
    """Oracle: the shipped token ids; calibration and evaluation share no sequence."""
    from compress.reference import calibration_tokens, heldout_tokens

    calibration = calibration_set(CalibrationConfig(n_sequences=5, sequence_length=16), embedded, None)
    heldout = evaluation_set(EvalConfig(n_sequences=5, sequence_length=16), embedded, None)
    assert torch.equal(calibration.input_ids, calibration_tokens()[:5, :16].long())
    assert torch.equal(heldout.input_ids, heldout_tokens()[:5, :16].long())
    assert calibration.sha256 != heldout.sha256
    with pytest.raises(ConfigError, match=r"calibration.n_sequences=9999"):
        calibration_set(CalibrationConfig(n_sequences=9999), embedded, None)


def test_another_tokenizer_never_gets_the_embedded_ids(tiny: LoadedModel, embedded: LoadedModel) -> None:
    """Oracle: the tiny model has a tokenizer of its own: its default text is on the hub, which tests cannot reach,
    and its default tasks leave out the texts that are token ids."""
    assert has_embedded_tokenizer(embedded) and not has_embedded_tokenizer(tiny)
    with pytest.raises(EnvironmentProblem, match="wikitext"):
        calibration_set(CalibrationConfig(), tiny, None)
    assert default_tasks(EvalConfig(), tiny) == ["compress_minimal_pairs"]
    assert default_tasks(EvalConfig(), embedded) == ["compress_minimal_pairs", "compress_heldout"]
    assert default_tasks(EvalConfig(tasks=[]), embedded) == []


def test_no_source_at_all(tokenizer: Any) -> None:
    """Oracle: the settings that would name one."""
    with pytest.raises(ConfigError, match=r"set calibration.path or calibration.dataset"):
        token_windows(source(), tokenizer, None)
