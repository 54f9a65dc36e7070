"""A Llama-like causal LM taken apart for `compress.decoder`: norms, and linears fused into four matmuls a block.

    input_layernorm -> [q | k | v] -> attention -> o -> post_attention_layernorm -> [gate | up] -> silu * -> down

Known are the blocks of Llama, Mistral, Qwen2 and Qwen3 (biases, tied heads and RMSNorm of q and k included), by the
class that computes them: a block of another class may look the same and compute something else. Linears may be
nn.Linear or QuantLinear.

Fusing concatenates rows. Of nn.Linear the model's own parameters become views of the fused weight, so nothing is held
twice and the model goes on working. The kernel layout of a packed weight has its rows inside tiles of K, where rows of
a part are no view: a fused packed weight is a copy, and the originals go when the model goes. Linears that do not fit
each other (a part quantized to other bits) stay apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.errors import UnsupportedModel
from compress.kernels.decode_reference import HeadShape, interleave
from compress.qlinear import QuantLinear

if TYPE_CHECKING:
    from compress.kernels.w4a16 import KernelWeight
    from compress.kernels.wna16_layout import PackedWeight

BLOCKS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
# tables that do not depend on the length of the text
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Dense:
    """weight [N, K], bias [N] or None."""

    weight: Tensor
    bias: Tensor | None

    @property
    def weight_bytes(self) -> int:
        return _nbytes(self.weight, self.bias)


@dataclass(frozen=True)
class Packed:
    """A weight in the layout of the W4A16 kernel, or of the WnA16 one for other bits; bias [N] or None."""

    weight: KernelWeight | PackedWeight
    bias: Tensor | None

    @property
    def weight_bytes(self) -> int:
        return _nbytes(self.weight.words, self.weight.scale, self.weight.zero, self.bias)


# a QuantLinear computes by itself what no weight-only kernel can
Part = Dense | Packed | QuantLinear
Join = Callable[[list[Tensor], int], Tensor]


@dataclass(frozen=True)
class FusedLinear:
    """Rows of several linears that read one tensor, in their order; one part where all of them fit each other.

    interleaved: the one part holds the rows of two linears in turns of 8 (`decode_reference.interleave`).
    """

    parts: tuple[Part, ...]
    interleaved: bool = False

    @property
    def weight_bytes(self) -> int:
        return sum(part.weight_bytes for part in self.parts)


@dataclass(frozen=True)
class Layer:
    """One block. qk_norms: weights [D] of the RMSNorm of each head of q and of k, or None."""

    norm_in: Tensor
    qkv: FusedLinear
    qk_norms: tuple[Tensor, Tensor] | None
    out: FusedLinear
    norm_mid: Tensor
    gate_up: FusedLinear
    down: FusedLinear


@dataclass(frozen=True)
class DecodeModel:
    """What a decode step needs of a model.

    embedding: [V, hidden]; norm: [hidden]; eps: of all norms. rotary: the model's own rotary embedding.
    window: tokens that attention is limited to, or None.
    """

    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    eps: float
    head: FusedLinear
    heads: HeadShape
    rotary: nn.Module
    window: int | None

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def rope_tables(self, capacity: int) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [capacity, D / 2], by position.

        Raises:
            UnsupportedModel: only a part of each head is rotated.
        """
        positions = torch.arange(capacity, device=self.device)[None]
        tables = self.rotary(torch.empty(1, dtype=torch.float32, device=self.device), positions)
        half = self.heads.head_dim // 2
        for table in tables:
            if table.shape[-1] != 2 * half:
                raise UnsupportedModel(
                    f"the rotary embedding covers {table.shape[-1]} of {2 * half} dimensions of a head, and the decode "
                    "engine rotates all; run the model itself"
                )
        cos, sin = (table[0, :, :half].float().contiguous() for table in tables)
        return cos, sin

    def step_bytes(self, batch: int, cached_tokens: float) -> float:
        """The least that one step moves: weights once, gathered embedding rows, the cache read and appended to."""
        linears = [self.head, *(w for y in self.layers for w in (y.qkv, y.out, y.gate_up, y.down))]
        norms = [self.norm, *(n for y in self.layers for n in (y.norm_in, y.norm_mid, *(y.qk_norms or ())))]
        weights = sum(w.weight_bytes for w in linears) + _nbytes(*norms)
        rows = batch * self.embedding.shape[1] * self.embedding.element_size()
        token = 2 * len(self.layers) * self.heads.n_kv_heads * self.heads.head_dim * self.embedding.element_size()
        return weights + rows + batch * token * (cached_tokens + 1)


def read_model(model: nn.Module) -> DecodeModel:
    """Takes a transformers causal LM apart. Its nn.Linear weights become views of fused ones; see the module docstring.

    Raises:
        UnsupportedModel: a family, rotary embedding, activation or layer that the engine would compute otherwise.
        EnvironmentProblem: from `QuantLinear.prepare`.
    """
    config: Any = model.config
    blocks = _find_blocks(model)
    body: Any = model.model
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModel(f"hidden_act={config.hidden_act}: the decode engine computes SiLU; run the model itself")
    rope_type = getattr(body.rotary_emb, "rope_type", "unknown")
    if rope_type not in _ROPE_TYPES:
        raise UnsupportedModel(f"rope type {rope_type}: the decode engine knows {', '.join(_ROPE_TYPES)}")
    _refuse_hooks(model)
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        names = sorted(map(str, devices))
        raise UnsupportedModel(f"the model lies on {names}; the decode engine needs it whole on one device")
    attention = blocks[0].self_attn
    heads = HeadShape(
        config.num_attention_heads,
        config.num_key_value_heads,
        attention.head_dim,
        attention.scaling,
        config.rms_norm_eps,
    )
    # tensors made in inference mode could not become parameters of the model
    with torch.inference_mode(False), torch.no_grad():
        return DecodeModel(
            embedding=body.embed_tokens.weight.detach(),
            layers=tuple(_read_block(block) for block in blocks),
            norm=body.norm.weight.detach(),
            eps=config.rms_norm_eps,
            head=fuse([model.lm_head]),  # type: ignore[list-item]
            heads=heads,
            rotary=body.rotary_emb,
            window=_window(config),
        )


def _find_blocks(model: nn.Module) -> list[Any]:
    blocks = list(getattr(getattr(model, "model", None), "layers", []))
    kinds = {type(block).__name__ for block in blocks}
    if not blocks or not kinds <= set(BLOCKS):
        found = ", ".join(sorted(kinds)) or "no model.layers"
        raise UnsupportedModel(
            f"{type(model).__name__} has {found}; the decode engine knows {', '.join(BLOCKS)}: run the model itself"
        )
    return blocks


def _refuse_hooks(model: nn.Module) -> None:
    """The engine never calls the modules: what hooks or a replaced forward would do could get lost."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise UnsupportedModel(
                f"{name or type(model).__name__} has hooks or a replaced forward, which the decode engine would leave "
                "out; remove them or run the model itself"
            )


def _window(config: Any) -> int | None:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    return window if window and (kinds is None or "sliding_attention" in kinds) else None


def _read_block(block: Any) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return Layer(
        norm_in=block.input_layernorm.weight.detach(),
        qkv=fuse([attention.q_proj, attention.k_proj, attention.v_proj]),
        qk_norms=(norms[0].weight.detach(), norms[1].weight.detach()) if all(norms) else None,  # type: ignore[union-attr]
        out=fuse([attention.o_proj]),
        norm_mid=block.post_attention_layernorm.weight.detach(),
        gate_up=fuse_gate_up(mlp.gate_proj, mlp.up_proj),
        down=fuse([mlp.down_proj]),
    )


def fuse(linears: Sequence[nn.Module]) -> FusedLinear:
    """Concatenates the rows of neighbours that fit each other.

    Raises:
        UnsupportedModel: a module that is neither an nn.Linear nor a QuantLinear.
    """
    parts: list[Part] = []
    for kind, run in groupby(linears, key=_kind):
        members: list[Any] = list(run)
        if kind == ("dense",):
            parts.append(_fuse_dense(members))
        elif kind == ("alone",):
            parts += members
        else:
            parts.append(_fuse_packed(members))
    return FusedLinear(tuple(parts))


def fuse_gate_up(gate: Any, up: Any) -> FusedLinear:
    """As `fuse`; packed weights that fit each other are interleaved, so that a kernel has both of a pair at hand."""
    kind = _kind(gate)
    if kind[0] != "packed" or kind != _kind(up):
        return fuse([gate, up])
    if gate.out_features != up.out_features or up.out_features % 8:
        return fuse([gate, up])
    return FusedLinear((_fuse_packed([gate, up], _in_turns),), interleaved=True)


def _in_turns(tensors: list[Tensor], dim: int) -> Tensor:
    gate, up = tensors
    return interleave(gate, up, dim)


def _kind(module: Any) -> tuple[Any, ...]:
    """Neighbours of one kind can be fused, other than ("alone",)."""
    if type(module) is nn.Linear:
        return ("dense",)
    if not isinstance(module, QuantLinear):
        raise UnsupportedModel(
            f"a projection is a {type(module).__name__}; the decode engine knows nn.Linear and QuantLinear"
        )
    weight = module.kernel_weight()
    if weight is None:
        return ("alone",)
    return ("packed", module.scheme.bits, weight.group_size, weight.zero is None, weight.scale.dtype)


def _fuse_dense(linears: list[Any]) -> Dense:
    weights = [linear.weight.detach() for linear in linears]
    if not _are_neighbours(weights):
        fused = torch.cat(weights)
        at = 0
        for linear in linears:
            linear.weight.data = fused[at : at + linear.out_features]
            at += linear.out_features
        weights = [linear.weight.detach() for linear in linears]
    rows = sum(w.shape[0] for w in weights)
    whole = weights[0].as_strided((rows, weights[0].shape[1]), (weights[0].shape[1], 1))
    return Dense(whole, _fuse_biases(linears, whole.dtype))


def _are_neighbours(weights: list[Tensor]) -> bool:
    """Whether they lie one after the other in one storage, as an earlier fusion left them."""
    if any(w.untyped_storage().data_ptr() != weights[0].untyped_storage().data_ptr() for w in weights):
        return False
    if not all(w.is_contiguous() for w in weights):
        return False
    ends = [w.data_ptr() + w.nbytes for w in weights]
    return ends[:-1] == [w.data_ptr() for w in weights[1:]]


def _fuse_packed(linears: list[QuantLinear], join: Join = torch.cat) -> Packed:
    """One weight with the rows of all; join(tensors, dim) says in which order."""
    weights: list[Any] = [linear.kernel_weight() for linear in linears]
    first = weights[0]
    bias = _fuse_biases(linears, linears[0].dtype, join)
    if len(weights) == 1:
        return Packed(first, bias)
    fused = replace(
        first,
        words=join([w.words for w in weights], 1),
        scale=join([w.scale for w in weights], 1),
        zero=None if first.zero is None else join([w.zero for w in weights], 1),
        n=sum(w.n for w in weights),
    )
    return Packed(fused, bias)


def _fuse_biases(linears: Iterable[Any], dtype: torch.dtype, join: Join = torch.cat) -> Tensor | None:
    linears = list(linears)
    device = next((m.bias.device for m in linears if m.bias is not None), None)
    if device is None:
        return None
    biases = [torch.zeros(m.out_features, device=device) if m.bias is None else m.bias.detach() for m in linears]
    return join([b.to(dtype) for b in biases], 0)


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)
