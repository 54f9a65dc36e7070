"""Models of real shapes with random weights, made on the device: a 4-bit one, and the dense one that computes the same.

Every linear of the blocks gets random codes and scales; the dense model holds the same weights, dequantized and rounded
to its dtype. So one forward pass of the dense model is the oracle of both. Embeddings, norms and head are shared.

The logits must tell a right step from a wrong one. Codes are drawn from 1..15, of mean zero beside the zero point 8:
another mean is a matrix of rank one that swallows all else. Embeddings are as large as what a block adds, or all tokens
would become alike. Queries and keys are enlarged so that attention prefers some tokens, values and outputs so that what
it finds counts. Then, at the depth of both large shapes, width 256 and 400 tokens, rounding to bfloat16 changes the
logits by 0.013 at most (relative), a rotary embedding off by one position by 0.11, and heads that change places or 64
forgotten tokens by 0.25 or more.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.qlinear import QuantLinear
from compress.quant import QuantizedWeight, QuantScheme

SCHEME = QuantScheme(bits=4, group_size=128)
_STD_OF_CODES = (224 / 12) ** 0.5  # of a uniform choice among 15
_GAIN = {"q_proj": 1.5, "k_proj": 1.5, "v_proj": 2.0, "o_proj": 2.0}  # of an output's std over its input's


@dataclass(frozen=True)
class Shape:
    """A transformers model type and the fields of its config."""

    model_type: str
    config: dict[str, Any]


SHAPES = {
    "llama-3-8b": Shape("llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "tie_word_embeddings": False,
    }),
    "qwen3-1.7b": Shape("qwen3", {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True,
    }),
    "qwen3-14b": Shape("qwen3", {
        "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": False,
    }),
    "tiny": Shape("llama", {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }),
}  # fmt: skip


def random_pair(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """(dense, quantized) in eval mode; no weight is ever anywhere else than on `device`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(shape.model_type, **shape.config)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.device(device):
        torch.manual_seed(0)
        dense = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    dense.requires_grad_(False)
    dense.get_input_embeddings().weight.div_(config.initializer_range)
    generator = torch.Generator(device).manual_seed(1)
    # the same tensors in other modules: those that the loop below does not replace stay shared
    quantized = copy.deepcopy(dense, {id(t): t for t in (*dense.parameters(), *dense.buffers())})
    for name, parameter in dense.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.fill_(_GAIN["q_proj"])  # a norm of q undoes the gain of its projection
    for block, packed in zip(dense.model.layers, quantized.model.layers, strict=True):
        for name, linear in block.named_modules():
            if isinstance(linear, nn.Linear):
                q = random_weight(linear.weight, _GAIN.get(name.rpartition(".")[2], 1.0), dtype, generator)
                linear.weight.data.copy_(q.dequantize(dtype))
                layer = QuantLinear.from_quantized(q, linear.bias, dtype=dtype)
                layer.prepare()
                packed.set_submodule(name, layer)
    return dense, quantized.eval()


def random_weight(like: Tensor, gain: float, dtype: torch.dtype, generator: torch.Generator) -> QuantizedWeight:
    """Uniform codes of `like`'s shape [N, K], and scales that spread by a factor of two, for outputs of std `gain`."""
    n, k = like.shape
    device = like.device
    codes = torch.randint(1, 16, (n, k), dtype=torch.uint8, device=device, generator=generator)
    groups = SCHEME.n_groups(k)
    spread = torch.rand(n, groups, device=device, generator=generator) * (2 / 3) + 2 / 3
    scale = (spread * (gain / _STD_OF_CODES / k**0.5)).to(dtype)
    return QuantizedWeight(codes, scale, torch.full((n, groups), 8, dtype=torch.uint8, device=device), SCHEME)
