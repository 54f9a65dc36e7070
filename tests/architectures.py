"""Tiny random models of many architectures, and what is known of their blocks: an oracle for the search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 128
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_FULL_HEADS = {**_LLAMA, "num_key_value_heads": 4}
_GEMMA = {**_LLAMA, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
_GPT2 = {**_COMMON, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
del _GPT2["max_position_embeddings"]

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
OUT, DOWN = ("self_attn.o_proj",), ("mlp.down_proj",)
NORM_1, NORM_2 = "input_layernorm", "post_attention_layernorm"


@dataclass(frozen=True)
class Architecture:
    """kind: transformers model type; groups: linears that read one tensor -> the module that feeds them linearly."""

    kind: str
    config: dict[str, Any]
    groups: dict[tuple[str, ...], str | None]
    gain: str = "gain"  # how this architecture's norms store their gain
    blocks: str = "model.layers"


_LLAMA_GROUPS: dict[tuple[str, ...], str | None] = {
    QKV: NORM_1,
    OUT: "self_attn.v_proj",
    GATE_UP: NORM_2,
    DOWN: "mlp.up_proj",
}
_POST_NORM_GROUPS: dict[tuple[str, ...], str | None] = {  # norms after attention and MLP: the stream itself is read
    QKV: None,
    OUT: "self_attn.v_proj",
    GATE_UP: None,
    DOWN: "mlp.up_proj",
}
_SANDWICH_GROUPS: dict[tuple[str, ...], str | None] = {
    QKV: NORM_1,
    OUT: "self_attn.v_proj",
    GATE_UP: "pre_feedforward_layernorm",
    DOWN: "mlp.up_proj",
}

ARCHITECTURES: dict[str, Architecture] = {}


def _add(name: str, *args: Any, **kwargs: Any) -> None:
    ARCHITECTURES[name] = Architecture(*args, **kwargs)


_add("llama", "llama", _LLAMA, _LLAMA_GROUPS)
_add("llama-bias-tied", "llama",
     {**_LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, _LLAMA_GROUPS)  # fmt: skip
_add("mistral", "mistral", {**_LLAMA, "sliding_window": 8}, _LLAMA_GROUPS)
_add("qwen2", "qwen2", _LLAMA, _LLAMA_GROUPS)
_add("qwen3", "qwen3", {**_LLAMA, "head_dim": 16}, _LLAMA_GROUPS)
_add("granite", "granite", {**_LLAMA, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}, _LLAMA_GROUPS)
_add("smollm3", "smollm3", {**_LLAMA, "no_rope_layer_interval": 2}, _LLAMA_GROUPS)
_add("gemma", "gemma", {**_LLAMA, "head_dim": 16}, _LLAMA_GROUPS, gain="gain_plus_one")
_add("gemma2", "gemma2", _GEMMA, _SANDWICH_GROUPS, gain="gain_plus_one")
_add("gemma3", "gemma3_text", {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]}, _SANDWICH_GROUPS,
     gain="gain_plus_one")  # fmt: skip
_add("olmo2", "olmo2", _LLAMA, _POST_NORM_GROUPS)
# attention and MLP of a parallel block read one tensor
_add("cohere", "cohere", _LLAMA, {QKV + GATE_UP: NORM_1, OUT: "self_attn.v_proj", DOWN: "mlp.up_proj"})
_add("starcoder2", "starcoder2", _LLAMA,
     {QKV: NORM_1, OUT: "self_attn.v_proj", ("mlp.c_fc",): NORM_2, ("mlp.c_proj",): None})  # fmt: skip
_add("stablelm", "stablelm", _LLAMA, _LLAMA_GROUPS)
# fused projections: a factor on the rows of q or of the gate does not pass through a softmax or a SiLU
_add("phi3", "phi3", _LLAMA,
     {("self_attn.qkv_proj",): NORM_1, OUT: None, ("mlp.gate_up_proj",): NORM_2, DOWN: None})  # fmt: skip
_add("phi", "phi", _FULL_HEADS,
     {(*QKV, "mlp.fc1"): NORM_1, ("self_attn.dense",): "self_attn.v_proj", ("mlp.fc2",): None})  # fmt: skip
_add("gpt2", "gpt2", _GPT2,
     {("attn.c_attn",): "ln_1", ("attn.c_proj",): None, ("mlp.c_fc",): "ln_2", ("mlp.c_proj",): None},
     blocks="transformer.h")  # fmt: skip
_add("opt", "opt",
     {**_COMMON, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
      "word_embed_proj_dim": 32},
     # fc2 reads a ReLU, which passes positive factors
     {QKV: "self_attn_layer_norm", ("self_attn.out_proj",): "self_attn.v_proj", ("fc1",): "final_layer_norm",
      ("fc2",): "fc1"}, blocks="model.decoder.layers")  # fmt: skip
_add("gpt-neox", "gpt_neox",
     {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
     {("attention.query_key_value",): NORM_1, ("attention.dense",): None, ("mlp.dense_h_to_4h",): NORM_2,
      ("mlp.dense_4h_to_h",): None}, blocks="gpt_neox.layers")  # fmt: skip
_add("falcon", "falcon",
     {**_COMMON, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True},
     {("self_attention.query_key_value", "mlp.dense_h_to_4h"): NORM_1, ("self_attention.dense",): None,
      ("mlp.dense_4h_to_h",): None}, blocks="transformer.h")  # fmt: skip
_add("gptj", "gptj", {**_GPT2, "rotary_dim": 8},
     {("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"): "ln_1", ("attn.out_proj",): "attn.v_proj",
      ("mlp.fc_out",): None}, blocks="transformer.h")  # fmt: skip


@cache
def build(name: str) -> nn.Module:
    """A random float32 model in eval mode; norms and biases random too, or a wrong fold of them would not show."""
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture.kind, **architecture.config))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                else:
                    parameter.mul_(4)  # initial weights of 0.02 leave softmax and activations nearly linear
            for module_name, module in model.named_modules():
                if name == "opt" and module_name.endswith("fc1"):
                    module.bias.add_(3)  # a ReLU that is off for every token would hide what feeds it
    return model.eval()


def save(name: str, directory: Path) -> Path:
    build(name).save_pretrained(directory)
    return directory


def token_ids(n: int, t: int, seed: int = 0) -> Tensor:
    """int64 [n, t], without the special ids."""
    return torch.randint(3, VOCABULARY, (n, t), generator=torch.Generator().manual_seed(seed))
