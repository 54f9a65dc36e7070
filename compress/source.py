"""The source checkpoint: where it lies, whether it is whole, and its tensors by mmap.

Only safetensors is read; a pickle is never opened. A tensor is checked for NaN and Inf when it is first
read, and files whose hash is known (hub blobs, manifests, SHA256SUMS) are checked against it, because a
flipped bit in a weight is otherwise a number like any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.config import EMBEDDED_MODEL
from compress.errors import CompressError, ConfigError, EnvironmentProblem, ModelFileError

_INDEX = "model.safetensors.index.json"
# Copied to the artifact byte for byte when present.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
)


def resolve(model: str, revision: str | None = None) -> Path:
    """Local directory of a model named by `reference`, a directory or a hub id.

    Raises:
        ConfigError: neither a directory nor the form of a hub id.
        EnvironmentProblem: the hub cannot be reached or has no such model.
    """
    if model == EMBEDDED_MODEL:
        from compress.reference import model_path

        return model_path()
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ConfigError(f"model={model} is a file; give the directory that holds config.json and *.safetensors")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise ConfigError(f"model={model} is no directory here and not the form of a hub id (org/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    # a failed connection raises the HTTP library's own errors, whichever library this version of the client uses
    unreachable: tuple[type[Exception], ...] = (LocalEntryNotFoundError, OSError, *HfHubHTTPError.__bases__)
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py"],
            )
        )
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"model={model} is neither a local directory nor a model on the hub (or it needs `hf auth login`)"
        ) from error
    except unreachable as error:
        raise EnvironmentProblem(
            f"model={model} is no local directory and cannot be fetched from the hub: {error}; "
            "give a local directory, or leave `model` out for the embedded model, which needs no network"
        ) from error


def sha256_file(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@dataclass
class SourceCheckpoint:
    """Tensors of a safetensors checkpoint, by name.

    >>> source = SourceCheckpoint.open(path)
    >>> source.tensor("model.embed_tokens.weight").shape
    """

    path: Path
    files: dict[str, Path]  # tensor name -> shard
    config: dict[str, Any]
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False)
    _checked: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def open(cls, path: Path) -> SourceCheckpoint:
        """Index a model directory and check that every shard is there and readable.

        Raises:
            ModelFileError: config or weights missing, a shard missing, truncated or not safetensors.
        """
        config = read_json_object(path / "config.json")
        index = path / _INDEX
        if index.is_file():
            weight_map = read_json_object(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ModelFileError(f"{index} has no weight_map; fetch the checkpoint again")
            files = {name: path / file for name, file in weight_map.items()}
        else:
            # a repository may hold the same weights a second time, as consolidated.safetensors in another naming
            whole = path / "model.safetensors"
            shards = [whole] if whole.is_file() else sorted(path.glob("*.safetensors"))
            if not shards:
                pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
                why = f"only pickled weights ({pickles[0]}), which are never opened" if pickles else "no weights"
                raise ModelFileError(f"{path} holds {why}; it must hold *.safetensors (save_pretrained writes them)")
            files = {}
            for shard in shards:
                for name in _names(shard):
                    if name in files:
                        raise ModelFileError(
                            f"tensor {name} is in both {files[name].name} and {shard.name} and no {_INDEX} says which "
                            "counts; leave one of them in the directory"
                        )
                    files[name] = shard
        for shard in sorted(set(files.values())):
            if not shard.is_file():
                raise ModelFileError(f"shard {shard.name} is named in {_INDEX} but is missing from {path}")
            present = set(_names(shard))
            lost = [n for n, f in files.items() if f == shard and n not in present]
            if lost:
                raise ModelFileError(f"{shard.name} lacks tensor {lost[0]}, which {_INDEX} places there")
        return cls(path, files, config)

    def names(self) -> Iterable[str]:
        return self.files.keys()

    def raw(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU, backed by the mapped file, not checked."""
        try:
            return self._handle(name).get_tensor(name)
        except SafetensorError as error:
            raise ModelFileError(f"{self.files[name].name}: cannot read tensor {name}: {error}") from error

    def tensor(self, name: str) -> Tensor:
        """Like `raw`, checked once for NaN and Inf.

        Raises:
            ModelFileError: a value is not finite.
        """
        value = self.raw(name)
        if name not in self._checked:
            if value.is_floating_point() and not torch.isfinite(value).all():
                bad = int((~torch.isfinite(value)).sum())
                raise ModelFileError(
                    f"tensor {name} in {self.files[name].name} has {bad} NaN or Inf values of {value.numel()}; "
                    "the checkpoint is damaged or diverged in training; fetch it again"
                )
            self._checked.add(name)
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle(name).get_slice(name).get_shape())

    def stored_dtype(self, name: str) -> str:
        """As safetensors names it: F32, BF16, I8, F8_E4M3, ..."""
        return str(self._handle(name).get_slice(name).get_dtype())

    def _handle(self, name: str) -> Any:
        file = self.files[name]
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        return self._handles[file]

    def sha256(self) -> str:
        """One hash over config and weights; checks every file whose hash is already known.

        Raises:
            ModelFileError: a file differs from the hash recorded for it.
        """
        shards = sorted(set(self.files.values()))
        known = _known_hashes(self.path, shards)
        others = [self.path / n for n in known if self.path / n not in shards and (self.path / n).is_file()]
        files = [*shards, *others]
        with ThreadPoolExecutor(max_workers=4) as pool:
            digests = dict(zip(files, pool.map(sha256_file, files), strict=True))
        for file, digest in digests.items():
            expected = known.get(file.name)
            if expected and expected != digest:
                raise ModelFileError(
                    f"{file.name} has sha256 {digest[:12]}..., but {expected[:12]}... was recorded for it: "
                    "the file changed on disk; fetch it again"
                )
        total = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for shard in shards:
            total.update(f"{shard.name}:{digests[shard]}\n".encode())
        return total.hexdigest()


def _known_hashes(path: Path, shards: list[Path]) -> dict[str, str]:
    """Recorded sha256 by file name: a SHA256SUMS file, or the hub cache, which names blobs by their hash."""
    known = {}
    sums = path / "SHA256SUMS"
    if sums.is_file():
        for line in filter(str.strip, sums.read_text(encoding="utf-8").splitlines()):
            match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line.strip())
            if match is None:
                raise ModelFileError(
                    f"{sums}: cannot read the line {line[:80]!r}; write it with sha256sum, or remove it"
                )
            known[Path(match[2]).as_posix()] = match[1].lower()
    for shard in shards:
        blob = shard.resolve().name
        if re.fullmatch(r"[0-9a-f]{64}", blob):
            known[shard.name] = blob
    return known


def _names(shard: Path) -> list[str]:
    try:
        with safe_open(shard, framework="pt") as f:
            return list(f.keys())
    except (SafetensorError, OSError) as error:
        head = b""
        if shard.is_file():
            with shard.open("rb") as f:
                head = f.read(4)
        if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"PK"):
            raise ModelFileError(f"{shard.name} is a pickle under another name; pickles are never opened") from error
        raise ModelFileError(
            f"{shard.name} is truncated or not a safetensors file ({error}); fetch it again"
        ) from error


def read_json_object(path: Path, error: type[CompressError] = ModelFileError) -> dict[str, Any]:
    """The JSON object in a file; `error` is raised when it is missing, not UTF-8 JSON, or not an object."""
    if not path.is_file():
        raise error(f"{path} is missing; is {path.parent} the right directory?")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as cause:
        raise error(f"{path} is not valid JSON ({cause}); fetch or copy it again") from cause
    if not isinstance(value, dict):
        raise error(f"{path} holds {type(value).__name__}, not an object")
    return value
