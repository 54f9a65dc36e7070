"""The artifact: a compressed-tensors `pack-quantized` checkpoint beside its tokenizer and a manifest.

    config.json            the source's, plus quantization_config
    model.safetensors      or shards and an index: packed linears, everything else as in the source, or rotated
    manifest.json          source model and hash, recipe, calibration hash, versions, per-tensor sha256, what
                           became of every source tensor, layer reports; no clock, so equal runs give equal bytes
    tokenizer, chat template, generation config: copied byte for byte

transformers (with the compressed-tensors package), vLLM and SGLang read it. A model whose linears are GPT-2's
transposed Conv1D has no place in that format, whose readers would silently start such layers from random
numbers, so its artifact names `compress` as its quantization method and other readers refuse it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.atomic import disk_errors, sync_directory, write_json
from compress.checkpoint import encode, load_block, load_head, load_tuned
from compress.errors import ArtifactError
from compress.models import LoadedModel, is_transposed
from compress.quant import Granularity, QuantScheme
from compress.source import COMPANION_FILES, read_json_object, sha256_file

MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
CT_METHOD, OWN_METHOD = "compressed-tensors", "compress"


@dataclass
class ArtifactFacts:
    """What the manifest says beyond the tensors themselves; JSON values."""

    model: str
    source_sha256: str
    recipe: dict[str, Any]
    calibration: dict[str, Any] | None
    versions: dict[str, str]
    layers: list[dict[str, Any]]


def save_artifact(loaded: LoadedModel, checkpoints: Path, out: Path, facts: ArtifactFacts) -> dict[str, Any]:
    """Assemble the artifact from block checkpoints and untouched source tensors; returns the manifest.

    Written beside `out` and renamed, so `out` is whole or absent; an older artifact there is replaced.

    Raises:
        ArtifactError: a source tensor that is neither quantized, kept, folded, tuned, rotated, tied nor unused.
        EnvironmentProblem: the disk is full or read-only.
    """
    temporary = out.with_name(f".{out.name}.tmp")
    with disk_errors(out):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        accounting: dict[str, dict[str, Any]] = {}
        schemes: dict[str, QuantScheme] = {}
        tensors = _write_shards(_artifact_tensors(loaded, checkpoints, accounting, schemes), temporary)
        _account(loaded, accounting)
        config = _untied(loaded.source.config) if loaded.untied else dict(loaded.source.config)
        transposed = any(is_transposed(m) for b in loaded.blocks for m in b.linears.values())
        config["quantization_config"] = quantization_config(loaded, schemes, OWN_METHOD if transposed else CT_METHOD)
        write_json(temporary / "config.json", config)
        for name in COMPANION_FILES:
            if (loaded.source.path / name).is_file():
                shutil.copyfile(loaded.source.path / name, temporary / name)
        manifest = {
            "schema": 1,
            "model": facts.model,
            "source_sha256": facts.source_sha256,
            "recipe": facts.recipe,
            "calibration": facts.calibration,
            "versions": facts.versions,
            "tensors": tensors,
            "source_tensors": accounting,
            "layers": facts.layers,
            "files": {p.name: sha256_file(p) for p in sorted(temporary.iterdir()) if p.suffix != ".safetensors"},
        }
        write_json(temporary / MANIFEST, manifest)
        replace_directory(temporary, out)
    return manifest


def replace_directory(new: Path, target: Path) -> None:
    """Put directory `new` at `target`; an older `target` is moved aside first and removed after."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _artifact_tensors(
    loaded: LoadedModel, checkpoints: Path, accounting: dict[str, dict[str, Any]], schemes: dict[str, QuantScheme]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the artifact under its on-disk name, one block in memory at a time."""
    replaced: dict[str, str] = {}
    tuned = load_tuned(checkpoints)
    changed_status = "folded" if tuned is None else "tuned"
    for index, block in enumerate(loaded.blocks):
        state = load_block(checkpoints, index)
        if state is None:
            raise ArtifactError(f"the checkpoint of {block.name} is gone from {checkpoints}; run again, it is redone")
        for local, quantized in state.quantized.items():
            source = loaded.source_names[f"{block.name}.{local}.weight"]
            stem = source.removesuffix("weight")
            parts = {f"{stem}{suffix}": value for suffix, value in encode(quantized).items()}
            accounting[source] = {"status": "quantized", "as": sorted(parts)}
            schemes[f"{block.name}.{local}"] = quantized.scheme
            replaced[source] = "quantized"
            yield from parts.items()
        for local, value in state.changed.items():
            source = loaded.source_names[f"{block.name}.{local}"]
            accounting[source] = {"status": changed_status, "as": [source]}
            replaced[source] = changed_status
            yield source, value
    head_parts: list[str] = []
    head = load_head(checkpoints)
    for name, quantized in head.quantized.items() if head is not None else ():
        parameter = f"{name}.weight"
        source = loaded.source_names.get(parameter, parameter)
        parts = {f"{source.removesuffix('weight')}{suffix}": value for suffix, value in encode(quantized).items()}
        head_parts = sorted(parts)
        schemes[name] = quantized.scheme
        replaced[source] = "quantized"
        if parameter in loaded.source_names:
            accounting[source] = {"status": "quantized", "as": head_parts}
        yield from parts.items()
    for parameter, value in (tuned[0] if tuned is not None else {}).items():
        source = loaded.source_names[parameter]
        accounting[source] = {"status": changed_status, "as": [source]}
        replaced[source] = changed_status
        yield source, value
    for parameter, source in loaded.source_names.items():
        if source in replaced:
            continue
        if parameter in loaded.tied:
            accounting[source] = {"status": "tied", "as": [loaded.source_names[loaded.tied[parameter]]]}
            continue
        status = loaded.rotation.status(parameter) if loaded.rotation is not None else None
        accounting[source] = {"status": status or "kept", "as": [source]}
        yield source, loaded.tensor(parameter) if status else loaded.source.tensor(source)
    for parameter, holder in loaded.untied.items():
        if parameter not in loaded.source_names:  # one tensor of the source became two
            quantized_too = parameter in replaced
            accounting[loaded.source_names[holder]]["as"] += head_parts if quantized_too else [parameter]
            if not quantized_too:
                yield parameter, loaded.tensor(parameter)


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json whose readers give the head a tensor of its own."""
    nested = {key: value | {"tie_word_embeddings": False} for key, value in config.items()
              if isinstance(value, dict) and "tie_word_embeddings" in value}  # fmt: skip
    return {**config, **nested, "tie_word_embeddings": False}


def _account(loaded: LoadedModel, accounting: dict[str, dict[str, Any]]) -> None:
    for name, why in loaded.unused.items():
        accounting[name] = {"status": "unused", "why": why}
    lost = sorted(set(loaded.source.names()) - set(accounting))
    if lost:
        raise ArtifactError(f"{len(lost)} source tensors are unaccounted for, first {lost[0]}; this is a bug")


def _write_shards(stream: Iterator[tuple[str, Tensor]], folder: Path) -> dict[str, dict[str, Any]]:
    """Write tensors in shards of at most MAX_SHARD_BYTES; returns sha256, dtype and shape by name."""
    described: dict[str, dict[str, Any]] = {}
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        shards.append(sorted(pending))
        save_file(pending, folder / f"shard-{len(shards):05d}", metadata={"format": "pt"})
        pending, pending_bytes = {}, 0

    for name, value in stream:
        value = value.detach().cpu().contiguous()
        if pending and pending_bytes + value.nbytes > MAX_SHARD_BYTES:
            flush()
        pending[name] = value
        pending_bytes += value.nbytes
        total += value.nbytes
        described[name] = {
            "sha256": tensor_sha256(value),
            **_dtype_and_shape(value),
        }
    flush()
    if len(shards) == 1:
        os.replace(folder / "shard-00001", folder / "model.safetensors")
        return described
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"shard-{i:05d}", folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return described


def quantization_config(loaded: LoadedModel, schemes: dict[str, QuantScheme], method: str) -> dict[str, Any]:
    """The `quantization_config` section of config.json for linears by full name.

    The most frequent scheme targets the class Linear; other schemes name their linears one by one.
    """
    import compressed_tensors

    by_scheme: dict[QuantScheme, list[str]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(name)
    ordered = sorted(by_scheme.items(), key=lambda item: -len(item[1]))
    groups: dict[str, Any] = {}
    for i, (scheme, names) in enumerate(ordered):
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(ordered) == 1 else sorted(names),
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": scheme.granularity.value,
                "group_size": scheme.group_size if scheme.granularity is Granularity.GROUP else None,
                "dynamic": False,
                "actorder": None,
                "observer": "minmax",
                "observer_kwargs": {},
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    linears = [n for n, m in loaded.model.named_modules() if isinstance(m, nn.Linear)]
    return {
        "quant_method": method,
        "version": compressed_tensors.__version__,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "ignore": sorted(n for n in linears if n not in schemes),
        "config_groups": groups,
    }


def check_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest and check every tensor and companion file against it.

    Raises:
        ArtifactError: no manifest, a file or tensor missing or changed, or a tensor added.
    """
    manifest = read_manifest(path)
    described = manifest["tensors"]
    for name, digest in manifest["files"].items():
        if not (path / name).is_file():
            raise ArtifactError(f"{path / name} is in the manifest but missing; copy the artifact again")
        if sha256_file(path / name) != digest:
            raise ArtifactError(f"{path / name} differs from the manifest's sha256; copy the artifact again")
    seen = set()
    with ThreadPoolExecutor(max_workers=4) as pool:
        for shard in sorted(path.glob("*.safetensors")):
            tensors = read_shard(shard)
            digests = pool.map(tensor_sha256, tensors.values())
            for name, digest in zip(tensors, digests, strict=True):
                if name not in described:
                    raise ArtifactError(f"{shard.name} holds {name}, which the manifest does not know")
                as_stored = {"sha256": digest, **_dtype_and_shape(tensors[name])}
                if any(described[name].get(key) != value for key, value in as_stored.items()):
                    raise ArtifactError(
                        f"tensor {name} in {shard.name} differs from the manifest's sha256: the file was damaged "
                        "or edited after it was saved; copy or build the artifact again"
                    )
                seen.add(name)
    lost = sorted(set(described) - seen)
    if lost:
        raise ArtifactError(f"{path} lacks tensor {lost[0]} ({len(lost)} missing); copy the artifact again")
    return manifest


def read_shard(shard: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, mapped."""
    try:
        with safe_open(shard, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{shard} is truncated or not a safetensors file ({error})") from error


def tensor_sha256(value: Tensor) -> str:
    return hashlib.sha256(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def _dtype_and_shape(value: Tensor) -> dict[str, Any]:
    """As the manifest has them; the sha256 is of the bytes alone and would not notice another reading of them."""
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest as it stands; the files it describes are not looked at.

    Raises:
        ArtifactError: it is missing, not JSON, or lacks a section.
    """
    manifest = read_json_object(path / MANIFEST, ArtifactError)
    for key in ("tensors", "source_tensors", "files"):
        section = manifest.get(key)
        if not isinstance(section, dict) or (key != "files" and not all(isinstance(v, dict) for v in section.values())):
            raise ArtifactError(f"{path / MANIFEST} has no usable {key!r} section; copy or build the artifact again")
    return manifest


def manifest_sha256(path: Path) -> str:
    """One hash for the whole artifact: the manifest holds the hash of everything else."""
    return sha256_file(path / MANIFEST)
