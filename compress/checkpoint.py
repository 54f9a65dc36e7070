"""Finished blocks on disk: what a killed run goes on from, and what the artifact is assembled from.

One safetensors file a block, written atomically, holding exactly the tensors the artifact will hold for it
(packed codes, scales, zero points, folded norms) under block-relative names, so that nothing is computed
twice and a resumed run ends with the same bytes; beside them what end-to-end tuning needs to go on from there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.atomic import write_atomically
from compress.errors import ArtifactError
from compress.packing import pack_rows, unpack_rows
from compress.quant import Granularity, Observer, QuantizedWeight, QuantScheme

_TUNED = "tuned.safetensors"
_HEAD = "head.safetensors"
_OFFSETS = ".cell_offsets"


@dataclass
class BlockState:
    """One finished block: quantized weights by linear, other parameters that changed, layer reports, and where the
    recipe goes on training the codes, by linear where the real weights lie in their rounding cells (int8 [N, K] of
    `signround.pack_offsets`)."""

    quantized: dict[str, QuantizedWeight]
    changed: dict[str, Tensor]
    reports: list[dict[str, Any]]
    offsets: dict[str, Tensor] = field(default_factory=dict)


def checkpoint_path(folder: Path, index: int) -> Path:
    return folder / f"block_{index:04d}.safetensors"


def save_block(folder: Path, index: int, state: BlockState) -> None:
    _save_state(checkpoint_path(folder, index), state)


def save_head(folder: Path, state: BlockState) -> None:
    """The quantized output head, as the one linear of a block, by its full name."""
    _save_state(folder / _HEAD, state)


def _save_state(path: Path, state: BlockState) -> None:
    tensors: dict[str, Tensor] = {}
    for name, quantized in state.quantized.items():
        for suffix, value in encode(quantized).items():
            tensors[f"{name}.{suffix}"] = value.cpu().contiguous()
    tensors |= {name: value.cpu().contiguous() for name, value in state.changed.items()}
    tensors |= {f"{name}{_OFFSETS}": value.cpu().contiguous() for name, value in state.offsets.items()}
    meta = {
        "schemes": json.dumps({n: scheme_to_dict(q.scheme) for n, q in state.quantized.items()}, sort_keys=True),
        "changed": json.dumps(sorted(state.changed)),
        "reports": json.dumps(state.reports),
    }
    meta["sha256"] = _content_sha256(tensors, meta)
    write_atomically(path, lambda p: save_file(tensors, p, metadata=meta))


def load_block(folder: Path, index: int) -> BlockState | None:
    """A finished block, or None when it is not there. A file that is damaged counts as not there: it is redone."""
    return _load_state(checkpoint_path(folder, index))


def load_head(folder: Path) -> BlockState | None:
    """What `save_head` was given, or None as for `load_block`."""
    return _load_state(folder / _HEAD)


def _load_state(path: Path) -> BlockState | None:
    read = _read(path)
    if read is None:
        return None
    tensors, meta = read
    schemes = json.loads(meta["schemes"])
    quantized = {}
    for name, values in schemes.items():
        own = {key.removeprefix(name + "."): t for key, t in tensors.items() if key.startswith(name + ".")}
        quantized[name] = decode(own, scheme_from_dict(values))
    changed = {name: tensors[name] for name in json.loads(meta["changed"])}
    offsets = {name: tensors[name + _OFFSETS] for name in schemes if name + _OFFSETS in tensors}
    return BlockState(quantized, changed, json.loads(meta["reports"]), offsets)


def save_tuned(folder: Path, outside: dict[str, Tensor], verify_logits: Tensor, note: dict[str, Any]) -> None:
    """What end-to-end tuning leaves besides blocks: changed parameters outside them by name, the tuned model's logits
    on the verify tokens, and its report. Written last: where it is, the folder is complete."""
    tensors = {f"outside.{name}": value.cpu().contiguous() for name, value in outside.items()}
    tensors["verify_logits"] = verify_logits.cpu().contiguous()
    meta = {"note": json.dumps(note)}
    meta["sha256"] = _content_sha256(tensors, meta)
    write_atomically(folder / _TUNED, lambda p: save_file(tensors, p, metadata=meta))


def load_tuned(folder: Path) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]] | None:
    """The arguments of `save_tuned`, or None when they are not there or damaged."""
    read = _read(folder / _TUNED)
    if read is None:
        return None
    tensors, meta = read
    logits = tensors.pop("verify_logits")
    return {n.removeprefix("outside."): t for n, t in tensors.items()}, logits, json.loads(meta["note"])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata of a checkpoint file; a file that is damaged is removed and counts as not there."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as f:
            meta = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
        if meta.pop("sha256", None) != _content_sha256(tensors, meta):
            raise ArtifactError(f"{path} differs from the hash it was written with")
    except (SafetensorError, ArtifactError):
        path.unlink()
        return None
    return tensors, meta


def _content_sha256(tensors: dict[str, Tensor], meta: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def encode(q: QuantizedWeight) -> dict[str, Tensor]:
    """compressed-tensors `pack-quantized` tensors of one weight, by suffix."""
    n, k = q.shape
    whole = q.scheme.granularity is Granularity.TENSOR
    tensors = {
        "weight_packed": pack_rows(q.codes, q.scheme.bits),
        "weight_scale": q.scale.reshape(1) if whole else q.scale,
        "weight_shape": torch.tensor([n, k], dtype=torch.int64),
    }
    if not q.scheme.symmetric:
        signed = q.zero.to(torch.int16) - q.scheme.mid_code
        packed = pack_rows(q.zero.t().contiguous(), q.scheme.bits).t().contiguous()
        tensors["weight_zero_point"] = signed.to(torch.int8).reshape(1) if whole else packed
    return tensors


def decode(tensors: dict[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
    """The inverse of `encode`.

    Raises:
        ArtifactError: packed shapes that do not fit the weight's shape.
    """
    n, k = (int(v) for v in tensors["weight_shape"].tolist())
    rows = 1 if scheme.granularity is Granularity.TENSOR else n
    groups = scheme.n_groups(k)
    codes = unpack_rows(tensors["weight_packed"], scheme.bits, k)
    scale = tensors["weight_scale"].reshape(rows, groups)
    if scheme.symmetric:
        zero = torch.full((rows, groups), scheme.mid_code, dtype=torch.uint8, device=codes.device)
    elif scheme.granularity is Granularity.TENSOR:
        zero = (tensors["weight_zero_point"].to(torch.int16) + scheme.mid_code).to(torch.uint8).reshape(1, 1)
    else:
        packed = tensors["weight_zero_point"].t().contiguous()
        zero = unpack_rows(packed, scheme.bits, n).t().contiguous()
    return QuantizedWeight(codes, scale, zero, scheme)


def scheme_to_dict(scheme: QuantScheme) -> dict[str, Any]:
    return {
        "bits": scheme.bits,
        "granularity": scheme.granularity.value,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "observer": scheme.observer.value,
    }


def scheme_from_dict(values: dict[str, Any]) -> QuantScheme:
    return QuantScheme(
        bits=values["bits"],
        granularity=Granularity(values["granularity"]),
        group_size=values["group_size"],
        symmetric=values["symmetric"],
        observer=Observer(values["observer"]),
    )
