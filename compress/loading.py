"""`compress.load`: an artifact on disk -> a transformers model whose linears compute from packed weights.

It reads any compressed-tensors `pack-quantized` checkpoint, not only this project's; where a manifest is
there, every tensor is checked against it first.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.artifact import CT_METHOD, MANIFEST, OWN_METHOD, check_manifest
from compress.checkpoint import decode
from compress.errors import ArtifactError, ModelFileError
from compress.models import choose_device, empty_network, iter_meta, retie, set_parameter
from compress.naming import current_names
from compress.qlinear import Backend, QuantLinear
from compress.quant import Granularity, QuantScheme
from compress.source import SourceCheckpoint

_SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def load(
    artifact: str | Path,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    backend: Backend = Backend.AUTO,
    trust_remote_code: bool = False,
) -> Any:
    """Load a compressed checkpoint for inference.

    Args:
        artifact: directory with config.json and *.safetensors.
        device: auto, cpu, cuda or cuda:<index>.
        dtype: of activations and unquantized weights; default the checkpoint's own.
        backend: how quantized linears compute; see `compress.qlinear`.

    Returns:
        A transformers causal LM in eval mode: `model.generate(...)` works.

    Raises:
        ArtifactError: a damaged or foreign artifact, or one that does not match its manifest.
        EnvironmentProblem: the device is not there.
    """
    path = Path(artifact)
    place = choose_device(device)
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a directory; give the artifact folder a run printed")
    try:
        source = SourceCheckpoint.open(path)
    except ModelFileError as error:
        raise ArtifactError(str(error)) from error
    if (path / MANIFEST).is_file():
        check_manifest(path)
    config = source.config.get("quantization_config")
    if not config or config.get("quant_method") not in (CT_METHOD, OWN_METHOD):
        raise ArtifactError(f"{path / 'config.json'} describes no compressed-tensors or compress quantization")
    network, stored_dtype = empty_network(path, trust_remote_code)
    dtype = dtype or stored_dtype
    stems = {n.removesuffix("weight_packed"): n for n in source.names() if n.endswith(".weight_packed")}
    names = _parameter_names(network, source, stems)
    for stem in stems:
        module_name = names[stem + "weight"].removesuffix(".weight")
        tensors = {s: source.tensor(stem + s) for s in _SUFFIXES if stem + s in source.files}
        # words are unpacked where they are used; the shape is read on the host
        tensors = {s: t if s == "weight_shape" else t.to(place) for s, t in tensors.items()}
        bias = source.tensor(stem + "bias").to(dtype) if stem + "bias" in source.files else None
        quantized = decode(tensors, scheme_of(module_name, network.get_submodule(module_name), config))
        linear = QuantLinear.from_quantized(quantized, bias.to(place) if bias is not None else None,
                                            backend=backend, dtype=dtype)  # fmt: skip
        network.set_submodule(module_name, linear)
    own = {p: s for s, p in names.items()}
    state = network.state_dict(keep_vars=True)
    for parameter, stored in own.items():
        if parameter in state and stored in source.files:
            if isinstance(state[parameter], nn.Parameter):
                value = source.tensor(stored)
                set_parameter(
                    network, parameter, value.to(place, dtype if value.is_floating_point() else None, copy=True)
                )
            else:
                network.get_buffer(parameter).copy_(source.tensor(stored))
    tied = getattr(network, "all_tied_weights_keys", None) or {}
    retie(network, {n: h for n, h in tied.items() if h in own})
    retie(network, {h: n for n, h in tied.items() if n in own and h not in own})
    left = list(iter_meta(network))
    if left:
        raise ArtifactError(f"{path} has no tensor for {left[0]} ({len(left)} missing); copy the artifact again")
    network.to(place)
    return network.eval()


def _parameter_names(network: nn.Module, source: SourceCheckpoint, stems: dict[str, str]) -> dict[str, str]:
    """Tensor name on disk (with `weight` for a packed one) -> parameter name, across a missing base-model prefix."""
    prefix = getattr(network, "base_model_prefix", "")
    parameters = set(network.state_dict(keep_vars=True))
    stored = [n for n in source.names() if not n.endswith(tuple("." + s for s in _SUFFIXES))]
    stored += [stem + "weight" for stem in stems]
    names = {}
    for name, now in current_names(network, stored).items():
        candidates = [c for n in (name, now) for c in (n, f"{prefix}.{n}", n.removeprefix(prefix + "."))]
        found = next((c for c in candidates if c in parameters), None)
        if found is not None:
            names[name] = found
        elif name.endswith(".weight") and name.removesuffix("weight") in stems:
            raise ArtifactError(f"packed tensor {name} has no place in {type(network).__name__}")
    return names


def scheme_of(name: str, module: nn.Module, config: dict[str, Any]) -> QuantScheme:
    """Scheme of one linear by the targets of config_groups: an exact name, `re:` pattern or class name.

    Raises:
        ArtifactError: no group targets it, or one that is not integer weight-only quantization.
    """
    kind = type(module).__name__
    groups = config.get("config_groups", {}).values()
    by_name = [g for g in groups if any(_targets(t, name) for t in g["targets"])]
    by_class = [g for g in groups if kind in g["targets"] or "Linear" in g["targets"]]
    for group in by_name or by_class:
        weights = group["weights"]
        strategy = weights.get("strategy") or "tensor"
        if (
            weights.get("type") != "int"
            or strategy not in ("tensor", "channel", "group")
            or group.get("input_activations")
        ):
            raise ArtifactError(f"{name} is quantized as {weights.get('type')}/{strategy}, which is not supported")
        return QuantScheme(
            bits=int(weights["num_bits"]),
            granularity=Granularity(strategy),
            group_size=int(weights.get("group_size") or 128),
            symmetric=bool(weights["symmetric"]),
        )
    raise ArtifactError(f"no group of quantization_config targets {name}, but it is stored packed")


def _targets(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target == name or fnmatch.fnmatchcase(name, target)
