"""Greedy-decoding engine: one-token steps of a Llama-like model over a static KV cache, recorded as one CUDA graph.

    weights = read_model(model)                      # a transformers model; its linears may be QuantLinear
    decoder = Decoder(weights, batch=4, capacity=1024)
    logits = decoder.prefill(model, prompt_ids)      # the prompt is read by transformers
    decoder.capture()                                # on CUDA; before or after a prefill
    ids = decoder.generate(logits.argmax(-1), 100)

A step of a block is eight launches: norm (with the residual sum), q/k/v matmul, rotary embedding + cache + attention,
output matmul, norm, gate/up matmul, SiLU, down matmul. On Hopper, with packed weights and up to 8 sequences, the
matmuls take over norms, sums and SiLU, and five are left. Kernels: `compress.kernels.decode_ops`, `decode_attention`,
`w4a16`, `w4a16_decode`, `wna16`, and cuBLAS for dense weights. Token ids and positions lie in tensors of the device, so
the recorded graph is replayed at every position. Elsewhere than on CUDA the step runs on the kernels' PyTorch twins:
right, not fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.decode_weights import DecodeModel, Dense, FusedLinear, Layer, Packed, Part
from compress.errors import ConfigError
from compress.kernels import decode_reference
from compress.kernels.decode_reference import Around

_KERNEL_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StepTiles:
    """What kernels of a step take instead of their rules; None, or a product that is not there: the rule.

    attention: an `AttentionConfig`. products: `DecodeConfig`s by N, K, for steps whose products do their neighbours'
    work. head: a `DenseConfig`, for the head of one sequence.
    """

    attention: Any = None
    products: Mapping[tuple[int, int], Any] = field(default_factory=dict)
    head: Any = None


class Decoder:
    """The state of one batch: KV cache, positions, and the recorded step.

    keys, values: [L, B, KV, C, D]. positions: int32 [B], tokens in the cache, on the device; `length` is the same
    number on the host. tokens: int64 [B], input of the step. logits: [B, V], its output, overwritten by the next step.
    """

    def __init__(
        self,
        model: DecodeModel,
        batch: int,
        capacity: int,
        pdl: bool | None = None,
        use_kernels: bool | None = None,
        tiles: StepTiles = StepTiles(),
    ) -> None:
        """
        Args:
            capacity: tokens of each sequence that the cache holds.
            pdl: programmatic dependent launch; None: where the device has it (sm_90 and later).
            use_kernels: Triton kernels instead of their twins; None: on CUDA.
            tiles: for the kernels.

        Raises:
            ConfigError: a batch, capacity or dtype that cannot be run.
            UnsupportedModel: see `DecodeModel.rope_tables`.
        """
        device, heads = model.device, model.heads
        use_kernels = device.type == "cuda" if use_kernels is None else use_kernels
        if batch < 1 or capacity < 1:
            raise ConfigError(f"batch={batch} and capacity={capacity} must both be at least 1")
        if model.window is not None and capacity > model.window:
            raise ConfigError(
                f"capacity={capacity} exceeds the model's attention window of {model.window} tokens, and the decode "
                "engine attends to all; use a smaller capacity"
            )
        if use_kernels and model.dtype not in _KERNEL_DTYPES:
            raise ConfigError(f"the model is {model.dtype}; the decode kernels take float16 or bfloat16")
        self.model, self.batch, self.capacity, self.length = model, batch, capacity, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        shape = (len(model.layers), batch, heads.n_kv_heads, capacity, heads.head_dim)
        with torch.inference_mode(False):  # these are written inside and outside of inference mode
            self.keys = torch.zeros(shape, dtype=model.dtype, device=device)
            self.values = torch.zeros_like(self.keys)
            self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
            self.positions = torch.zeros(batch, dtype=torch.int32, device=device)
            self.rope = model.rope_tables(capacity)
        self.logits = torch.empty(batch, 0, dtype=model.dtype, device=device)
        self.ops: Any = _Kernels(self, tiles, pdl) if use_kernels else decode_reference
        self.pdl = bool(getattr(self.ops, "pdl", False))
        self.fused = use_kernels and self._can_fuse()

    def _can_fuse(self) -> bool:
        """Whether every product of the layers is one that does its neighbours' work: 4 bits, few tokens, on Hopper."""
        from compress.kernels import w4a16_decode
        from compress.kernels.w4a16 import KernelWeight

        linears = [w for y in self.model.layers for w in (y.qkv, y.out, y.gate_up, y.down)]
        parts = [part for w in linears for part in w.parts]
        packed = [p.weight for p in parts if isinstance(p, Packed) and isinstance(p.weight, KernelWeight)]
        if not len(linears) == len(parts) == len(packed):
            return False
        if self.batch > w4a16_decode.RULE_MAX_TOKENS:
            return False
        interleaved = all(layer.gate_up.interleaved for layer in self.model.layers)
        return interleaved and all(w4a16_decode.takes(weight) for weight in packed)

    def has_own_head(self) -> bool:
        """Whether the head of a step is `dense_behind_norm`, which advances positions, too: a dense one, for one
        sequence, behind fused products."""
        parts = self.model.head.parts
        alone = self.fused and self.batch == len(parts) == 1
        return alone and isinstance(parts[0], Dense) and parts[0].bias is None

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Appends token ids [B] and returns the logits [B, V] of what follows them, in the model's dtype.

        Raises:
            ConfigError: the cache is full, or ids of another shape.
        """
        if self.length >= self.capacity:
            raise ConfigError(
                f"the cache holds {self.capacity} tokens and is full; make the decoder with more capacity"
            )
        if tokens.shape != self.tokens.shape:
            raise ConfigError(f"tokens are {tuple(tokens.shape)}, expected one for each of {self.batch} sequences")
        self.tokens.copy_(tokens)
        if self.graph is None:
            self.logits = self._forward()
        else:
            self.graph.replay()
        self.length += 1
        return self.logits

    def _forward(self) -> Tensor:
        """One step from `tokens` at `positions`, which it advances."""
        model = self.model
        # no PDL: the launch before may be a copy, and kernels behind this one read positions before they wait
        x, stream = self.ops.rms_norm(model.embedding, model.layers[0].norm_in, model.eps, ids=self.tokens)
        logits = self._fused_layers(x, stream) if self.fused else self._project(model.head, self._layers(x, stream))
        if not self.has_own_head():
            self.positions.add_(1)
        return logits

    def _layers(self, x: Tensor, stream: Tensor) -> Tensor:
        """Eight launches a layer. x: normed [B, hidden]; stream: the residual. Returns the last norm's output."""
        model, ops = self.model, self.ops
        norms = [layer.norm_in for layer in model.layers[1:]] + [model.norm]
        for i, (layer, norm) in enumerate(zip(model.layers, norms, strict=True)):
            attended = self._attention(i, layer, self._project(layer.qkv, x))
            x, stream = ops.rms_norm(
                self._project(layer.out, attended), layer.norm_mid, model.eps, residual=stream, pdl=self.pdl
            )
            hidden = ops.silu_mul(self._project(layer.gate_up, x), layer.gate_up.interleaved, pdl=self.pdl)
            x, stream = ops.rms_norm(self._project(layer.down, hidden), norm, model.eps, residual=stream, pdl=self.pdl)
        return x

    def _fused_layers(self, x: Tensor, stream: Tensor) -> Tensor:
        """Five launches a layer: products take over norms, residual sums and SiLU (`decode_reference.Around`). Returns
        the logits."""
        model, eps = self.model, self.model.eps
        norms = [layer.norm_in for layer in model.layers[1:]] + [model.norm]
        squares = None
        for i, (layer, norm) in enumerate(zip(model.layers, norms, strict=True)):
            attended = self._attention(i, layer, self._around(layer.qkv, x, Around(squares, eps)))
            middle = self._around(layer.out, attended, Around(residual=stream, norm=layer.norm_mid))
            hidden = self._around(layer.gate_up, middle.normed, Around(middle.squares, eps, silu=True))
            stream, x, squares = self._around(layer.down, hidden, Around(residual=middle.h, norm=norm))
        if self.has_own_head():
            weight = model.head.parts[0].weight
            return self.ops.dense_behind_norm(x, weight, squares, eps, self.positions, pdl=self.pdl)
        return self._project(model.head, self.ops.rms_norm(stream, model.norm, eps, pdl=self.pdl)[0])

    def _around(self, linear: FusedLinear, x: Tensor, around: Around) -> Any:
        (part,) = linear.parts
        return self.ops.linear_around(x, part.weight, part.bias, around, pdl=self.pdl)

    def _attention(self, i: int, layer: Layer, qkv: Tensor) -> Tensor:
        cache = (self.keys[i], self.values[i])
        return self.ops.attention(qkv, self.rope, self.positions, cache, self.model.heads, layer.qk_norms)

    def _project(self, linear: FusedLinear, x: Tensor) -> Tensor:
        """x [B, K] -> [B, N]."""
        outputs = [self._matmul(part, x) for part in linear.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _matmul(self, part: Part, x: Tensor) -> Tensor:
        """Every matmul of a step, bias included."""
        if isinstance(part, Dense):
            return F.linear(x, part.weight, part.bias)
        if isinstance(part, Packed):
            from compress.kernels import w4a16, wna16

            if isinstance(part.weight, w4a16.KernelWeight):
                return w4a16.matmul(x, part.weight, part.bias, self.pdl)
            return wna16.matmul(x, part.weight, part.bias, self.pdl)
        return part(x)

    @torch.no_grad()
    def prefill(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Reads prompts [B, T] with the transformers model these weights are of; logits [B, V] of what follows."""
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        self.load_cache(cache)
        return logits

    @torch.no_grad()
    def load_cache(self, cache: Any, length: int | None = None) -> None:
        """Takes over the first `length` tokens (None: all) of a transformers cache, static or dynamic.

        Raises:
            ConfigError: a cache of another shape, or more tokens than capacity.
        """
        held = int(cache.get_seq_length())
        length = held if length is None else length
        if not 0 <= length <= min(held, self.capacity):
            raise ConfigError(f"{length} tokens of a cache of {held} do not fit a capacity of {self.capacity}")
        wanted = (self.batch, self.keys.shape[2], self.keys.shape[4])
        for i, layer in enumerate(cache.layers):
            for mine, theirs in ((self.keys[i], layer.keys), (self.values[i], layer.values)):
                found = (theirs.shape[0], theirs.shape[1], theirs.shape[3])
                if found != wanted or theirs.shape[2] < length:
                    raise ConfigError(
                        f"layer {i} of the cache is {tuple(theirs.shape)}; expected sequences, KV heads and head size "
                        f"{wanted} and at least {length} tokens"
                    )
                mine[:, :, :length].copy_(theirs[:, :, :length])
        self.seek(length)

    def seek(self, length: int) -> None:
        """The cache counts as holding `length` tokens from here on."""
        if not 0 <= length <= self.capacity:
            raise ConfigError(f"length={length} must lie between 0 and the capacity of {self.capacity}")
        self.positions.fill_(length)
        self.length = length

    @torch.no_grad()
    def capture(self) -> None:
        """Records the step as a CUDA graph, which `step` then replays.

        Tokens and cached states stay as they are, but for the free row of the cache after them.

        Raises:
            ConfigError: not on CUDA, or the cache is full.
        """
        if self.positions.device.type != "cuda":
            raise ConfigError(f"the decoder is on {self.positions.device}; a CUDA graph needs a CUDA device")
        if self.length >= self.capacity:
            raise ConfigError("the cache is full, and recording a step writes one row; seek back first")
        stream = torch.cuda.Stream(self.positions.device)
        stream.wait_stream(torch.cuda.current_stream(self.positions.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels compile and libraries allocate before the capture, which forbids both
                self._forward()
                self.positions.fill_(self.length)
        torch.cuda.current_stream(self.positions.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.logits = self._forward()
        self.graph = graph

    def generate(self, tokens: Tensor, n_tokens: int) -> Tensor:
        """The `n_tokens` most likely tokens after `tokens` [B], each fed back: int64 [B, n_tokens]."""
        chosen: list[Tensor] = []
        for _ in range(n_tokens):
            tokens = self.step(tokens).argmax(dim=-1)
            chosen.append(tokens)
        return torch.stack(chosen, dim=1) if chosen else tokens.new_empty(self.batch, 0)


class _Kernels:
    """The Triton kernels with what they need besides a step's operands, under the names of their twins."""

    def __init__(self, decoder: Decoder, tiles: StepTiles, pdl: bool | None) -> None:
        from compress.kernels import common, decode_attention, decode_ops, dense_decode, w4a16_decode
        from compress.kernels import pdl as pdl_launch

        device, heads = decoder.positions.device, decoder.model.heads
        n_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self.config = tiles.attention or decode_attention.choose_attention(
            decoder.batch, heads.n_kv_heads, heads.head_dim, decoder.capacity, n_sms, common.shared_bytes(device)
        )
        self.workspace = decode_attention.make_workspace(decoder.batch, heads, self.config.splits, device)
        self.pdl = pdl_launch.supported(device) if pdl is None else pdl
        self.rms_norm, self.silu_mul = decode_ops.rms_norm, decode_ops.silu_mul
        self.linear_around = partial(w4a16_decode.linear_around, configs=tiles.products)
        head = tiles.head or dense_decode.DenseConfig()
        self.dense_behind_norm = partial(dense_decode.dense_behind_norm, config=head)
        self.attention = partial(decode_attention.attention, config=self.config, workspace=self.workspace, pdl=self.pdl)
