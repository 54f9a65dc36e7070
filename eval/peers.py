"""Other quantizers beside ours: on the same model and calibration windows, judged by the same evaluator.

Each runs in a process of its own, under its own interpreter where one is named (`eval/peer_worker.py` imports nothing
of this package), and leaves dense, dequantized weights. Those are put into the original model, and KL, perplexity and
top-1 are measured exactly as for our own artifacts. Sizes are what its scheme stores: codes, 16-bit scales and zero
points; everything else as in the source.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.calibration import CalibrationSet
from compress.errors import ConfigError, EnvironmentProblem
from compress.eval.quality import kl_quality
from compress.models import LoadedModel, linear_weight, load_dense, load_model, set_parameter
from compress.quant import QuantScheme

WORKER = Path(__file__).with_name("peer_worker.py")


@dataclass(frozen=True)
class Peer:
    """One method of another package at one scheme. zero_bits: what it stores for a zero point."""

    package: str
    method: str
    scheme: QuantScheme
    zero_bits: int = 0

    @property
    def name(self) -> str:
        return f"{self.package}-{self.scheme.bits}g{self.scheme.group_size}"

    def weight_bits(self, n: int, k: int) -> float:
        """Stored bits of an [n, k] weight."""
        return n * k * (self.scheme.bits + (16 + self.zero_bits) / self.scheme.group_size)


@dataclass(frozen=True)
class PeerTask:
    """What all peers of one table share. pythons: interpreter by package, this one where none is named."""

    model: Path
    windows: CalibrationSet
    evaluation: CalibrationSet
    device: torch.device
    dtype: torch.dtype
    folder: Path
    iterations: int
    batch_size: int
    pythons: dict[str, str]
    trust_remote_code: bool = False


# package -> what it is asked for at a number of bits and a group size
PEERS: dict[str, Callable[[int, int], list[Peer]]] = {
    "llmcompressor": lambda bits, group: [
        Peer("llmcompressor", "GPTQ, act-order with static groups", QuantScheme(bits, group_size=group))
    ],
    "auto-round": lambda bits, group: [Peer("auto-round", "AutoRound", QuantScheme(bits, group_size=group))],
    "hqq": lambda bits, group: [
        Peer("hqq", "HQQ", QuantScheme(bits, group_size=size, symmetric=False), zero_bits=16)
        for size in sorted({64, group})
    ],
}


def wanted_peers(packages: list[str], schemes: list[str]) -> list[Peer]:
    """Peers of the named packages at schemes written as 4g128, without repetition.

    Raises:
        ConfigError: a package or scheme that is none.
    """
    found: dict[str, Peer] = {}
    for text in schemes:
        bits, _, group = text.partition("g")
        if not (bits.isdigit() and group.isdigit()):
            raise ConfigError(f"--peer-schemes has {text!r}; write <bits>g<group size>, as in 4g128")
        for package in packages:
            if package not in PEERS:
                raise ConfigError(f"--peers has {package!r}; known are {', '.join(PEERS)}, all and none")
            found |= {peer.name: peer for peer in PEERS[package](int(bits), int(group))}
    return list(found.values())


def installed_version(package: str, python: str) -> str | None:
    """Version under an interpreter; None where it is not installed.

    Raises:
        EnvironmentProblem: the interpreter cannot be run.
    """
    done = _call([python, "-P", str(WORKER), "--version", package])
    if done.returncode:
        raise EnvironmentProblem(f"--peer-python {package}={python} cannot run: {_tail(done.stderr)}")
    version = json.loads(done.stdout.splitlines()[-1])["version"]
    return None if version is None else str(version)


def run_peer(peer: Peer, task: PeerTask) -> dict[str, Any]:
    """Quantize with a peer and evaluate: a row of the comparison table, JSON-ready.

    Raises:
        EnvironmentProblem: its process failed; the message ends with its own last words, and its whole log is kept.
        ConfigError: it left linears of the blocks as they were, so that there is nothing like to compare with.
    """
    task.folder.mkdir(parents=True, exist_ok=True)
    tokens, weights = task.folder / "windows.safetensors", task.folder / f"{peer.name}.safetensors"
    save_file({"input_ids": task.windows.input_ids.contiguous()}, tokens)
    job = {
        "peer": peer.package, "model": str(task.model), "tokens": str(tokens), "out": str(weights),
        "device": str(task.device), "dtype": str(task.dtype).removeprefix("torch."), "bits": peer.scheme.bits,
        "group_size": peer.scheme.group_size, "symmetric": peer.scheme.symmetric, "iterations": task.iterations,
        "trust_remote_code": task.trust_remote_code,
    }  # fmt: skip
    job_file, log = task.folder / f"{peer.name}.json", task.folder / f"{peer.name}.log"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    # some of them take a GPU that is there, whatever they are told
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if task.device.type == "cpu" else {}
    done = _call([task.pythons.get(peer.package, sys.executable), "-P", str(WORKER), str(job_file)], hidden)
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        raise EnvironmentProblem(f"{peer.name} failed (exit {done.returncode}, log {log}): {_tail(done.stderr)}")
    facts = json.loads(done.stdout.splitlines()[-1])
    row = _evaluated(peer, task, load_file(weights), facts)
    weights.unlink()  # as large as the model; what it was is in the row
    return row


def _evaluated(peer: Peer, task: PeerTask, weights: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Any]:
    def original() -> LoadedModel:
        return load_model(str(task.model), None, task.trust_remote_code)

    loaded = original()
    shapes = {f"{b.name}.{n}": tuple(linear_weight(m).shape) for b in loaded.blocks for n, m in b.linears.items()}
    left = sorted(set(shapes) - set(facts["changed"]))
    if left:
        raise ConfigError(f"{peer.name} left {len(left)} of {len(shapes)} linears as they were, first {left[0]}")
    size = _weight_bytes(loaded, sum(peer.weight_bits(*shape) for shape in shapes.values()), set(shapes))
    reference = load_dense(loaded, task.device, task.dtype)
    changed = original()
    model = load_dense(changed, task.device, task.dtype)
    put_weights(model, weights)
    quality = asdict(kl_quality(reference, model, task.evaluation.input_ids, task.batch_size))
    kept = ("kl", "kl_stderr", "ppl", "ppl_stderr", "ppl_reference", "top1", "top1_stderr")
    n_weights = sum(n * k for n, k in shapes.values())
    return {
        "name": f"{peer.package} {facts['version']}: {peer.method}",
        "scheme": peer.scheme.label(),
        **{key: quality[key] for key in kept},
        "weight_bytes": size,
        "bits_per_weight": sum(peer.weight_bits(*shape) for shape in shapes.values()) / n_weights,
        "decode_p50_ms": None,
        "speedup": None,
        "quantize_s": facts["seconds"],
        "peer": {"package": peer.package, **facts, "changed": len(facts["changed"])},
    }


def put_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Replace parameters by name.

    Raises:
        ConfigError: a name or shape that the model does not have.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            raise ConfigError(f"{name} {tuple(value.shape)} has no place in {type(model).__name__}")
        set_parameter(model, name, value.to(own[name].device, own[name].dtype))


def _weight_bytes(loaded: LoadedModel, quantized_bits: float, linears: set[str]) -> int:
    """Bytes of the whole checkpoint with the linears at `quantized_bits` in all."""
    quantized = {loaded.source_names[f"{name}.weight"] for name in linears}
    tied = {loaded.source_names[n] for n in loaded.tied if n in loaded.source_names}
    others = set(loaded.source_names.values()) - quantized - tied
    return round(quantized_bits / 8) + sum(loaded.source.raw(n).nbytes for n in others)


def _call(command: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | (environment or {}))
    except OSError as error:
        raise EnvironmentProblem(f"{command[0]} cannot be run: {error.strerror or error}") from error


def _tail(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return " | ".join(lines[-3:]) or "no message; was it killed for memory?"
