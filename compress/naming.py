"""Which source tensor every parameter is: across a missing base-model prefix, tied pairs and unused leftovers.

Every parameter must find its tensor and every tensor its parameter, or a reason why not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn

from compress.errors import ModelFileError, UnsupportedModel
from compress.source import SourceCheckpoint

# safetensors' names of the dtypes a weight can have without being quantized already
_FLOATS = ("F64", "F32", "F16", "BF16")


def match_names(network: nn.Module, source: SourceCheckpoint) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Pair parameters and persistent buffers with source tensors; say what is tied and what is unused.

    Returns:
        source tensor by parameter or buffer; the parameter that holds the storage by tied parameter; the reason by
        source tensor that the architecture does not read.

    Raises:
        ModelFileError: a tensor is missing, has another shape than config.json makes it, or contradicts a tie.
        UnsupportedModel: a tensor has no place in the architecture, or a weight is stored in a quantized dtype.
    """
    prefix = getattr(network, "base_model_prefix", "")
    state = network.state_dict(keep_vars=True)
    available = {new: old for old, new in current_names(network, source.names()).items()}
    available |= {name: name for name in source.names()}
    names: dict[str, str] = {}
    missing = []
    for name in state:
        candidates = [name, name.removeprefix(prefix + "."), f"{prefix}.{name}"]
        found = next((available[c] for c in candidates if c in available), None)
        if found is None:
            missing.append(name)
        else:
            names[name] = found

    tied = {}
    by_identity: dict[int, str] = {id(state[n]): n for n in names}
    tied_keys = dict(getattr(network, "all_tied_weights_keys", None) or {})
    held_by = {holder: name for name, holder in tied_keys.items()}  # only the head may be stored
    for name in list(missing):
        holder = by_identity.get(id(state[name])) or tied_keys.get(name) or held_by.get(name)
        if holder in names:
            tied[name] = holder
            missing.remove(name)
    if missing:
        raise ModelFileError(
            f"{source.path} has no tensor for {missing[0]} ({len(missing)} missing in all): the checkpoint is "
            "incomplete, or this architecture stores its weights in a form that is not supported"
        )
    for name, found in names.items():
        _check_form(source, found, state[name])
    # a head stored beside the embedding it is tied to is one tensor to the architecture
    if getattr(network.config, "tie_word_embeddings", False):
        for name, holder in tied_keys.items():
            if name in names and holder in names:
                _check_tie(source, names[name], names[holder])
                tied[name] = holder
    return names, tied, _unused(network, set(source.names()) - set(names.values()))


def current_names(network: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Today's name of every stored tensor, where transformers renamed the parameters of an architecture
    (GPT-NeoX's head: embed_out -> lm_head).

    Conversions that compute new tensors are left out: what they would make is then missing, and said to be.
    """
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    rules = [r for r in conversion_mapping.get_model_conversion_mapping(network) if isinstance(r, WeightRenaming)]
    names = {}
    for old in sorted(stored):
        new = old
        for rule in rules:
            new, _ = rule.rename_source_key(new)
        names[old] = new
    return names


def _check_form(source: SourceCheckpoint, tensor: str, parameter: torch.Tensor) -> None:
    if source.shape(tensor) != tuple(parameter.shape):
        raise ModelFileError(
            f"tensor {tensor} has shape {list(source.shape(tensor))}, but config.json makes it "
            f"{list(parameter.shape)}; weights and config.json do not belong together"
        )
    stored = source.stored_dtype(tensor)
    if parameter.is_floating_point() and stored not in _FLOATS:
        raise UnsupportedModel(
            f"tensor {tensor} is stored as {stored}, not as a float of 16 bits or more: it looks quantized already; "
            "start from the original weights"
        )


def _check_tie(source: SourceCheckpoint, tensor: str, holder: str) -> None:
    if tensor != holder and not torch.equal(source.tensor(tensor), source.tensor(holder)):
        raise ModelFileError(
            f"config.json ties {tensor} to {holder}, but the checkpoint holds two different tensors; "
            "set tie_word_embeddings to false in config.json if both are meant"
        )


def _unused(network: nn.Module, extra: set[str]) -> dict[str, str]:
    """Why the architecture reads none of the `extra` tensors; raises for one without a reason."""
    patterns = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or []
    buffers = {name for name, _ in network.named_buffers()}
    prefix = getattr(network, "base_model_prefix", "")
    unused = {}
    for name in sorted(extra):
        if any(re.search(p, name) for p in patterns):
            unused[name] = "ignored by the architecture"
        elif name in buffers or f"{prefix}.{name}" in buffers or name.endswith(("rotary_emb.inv_freq", ".attn.bias")):
            unused[name] = "a constant the architecture computes itself"
        else:
            raise UnsupportedModel(
                f"source tensor {name} has no place in {type(network).__name__}; dropping it could change the model"
            )
    return unused
