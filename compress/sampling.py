"""Tokens drawn from a causal LM's own next-token distribution, many sequences at a time.

Two ways to the same tokens, up to how logits round:

Dynamic: the model as it is called by everyone, keys and values growing with each token. On a CPU, and for models whose
cache cannot stay in its place (`has_static_step`).

Static, on CUDA: keys and values [B, KV, T, D] of a layer have their place before the first token, and the step of one
token - the model, the draw, writing the token down - is a CUDA graph. All that it reads lies on the GPU, the position
too, so that one graph serves every position and nothing is copied between replays. Attention reads a static cache to
its end, whatever is in there, so the model is shown a part of it that grows in stages, each with a graph of its own:

    0           P                 128               256               384      T
    | prompt    | stage 1         | stage 2         | stage 3         | stage 4|     T = 512, P = 32: 5/8 of the reads
    |-- shown in stage 1 ---------|                 |                 |        |     of showing all from the start
    |-- shown in stage 2 ---------------------------|                 |        |

In a static step attention is two batched matrix products over the keys and values as they lie (`_attend`). With sdpa,
transformers 5.17 copies them for every query head of a group first, and the kernel behind it computes 64 queries where
there are two: 34 ms a step with 2048 sequences of 512 tokens in float32 on an H100, of which 32 are attention. Two
products take 5.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress import replay
from compress.errors import NumericalError, UnsupportedModel

SWITCH = "calibration.generated_graphs"
_STAGE_TOKENS = 128
_STEPS_BETWEEN_CHECKS = 32
_ATTENTION = "compress_one_token"  # the name of `_attend` among transformers' implementations

OnToken = Callable[[int], None]


def continue_sequences(
    model: nn.Module,
    begin: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    on_step: OnToken | None = None,
    graphs: bool = True,
) -> Tensor:
    """Draw tokens from a causal LM until every sequence has as many as its uniforms; an end-of-text token ends nothing.

    Args:
        model: HF causal LM with a KV cache, on the device of `begin`.
        begin: int64 [B, P], P >= 1. uniforms: float64 [B, T - P], each in [0, 1).
        on_step: called with the number of tokens drawn so far for each sequence; with graphs, of those launched.
        graphs: take the static way on CUDA, for models that have one.

    Returns:
        int64 [B, T] on the device of `begin`, columns 0 .. P-1 = begin.

    Raises:
        UnsupportedModel: a model without a KV cache.
        NumericalError: logits that are not finite.
        EnvironmentProblem: a step that cannot be captured.
    """
    uniforms, on_step = uniforms.to(begin.device), on_step or (lambda _: None)
    with torch.inference_mode():
        if graphs and uniforms.shape[1] > 1 and replay.can_capture(begin.device) and has_static_step(model):
            return continue_static(model, begin, uniforms, temperature, on_step, captured=True)
        return _continue_dynamic(model, begin, uniforms, temperature, on_step)


def has_static_step(model: nn.Module) -> bool:
    """Whether one graph can stand for the step of every token.

    Two things must hold. transformers says of the class that it can be compiled as one graph with a static cache (no
    remote code does). And every layer keeps each token at its position: a sliding window or a recurrent state is told
    by a number on the host where it stands, which a graph would take for that of its capture.
    """
    from transformers.cache_utils import StaticCache, StaticLayer

    if not getattr(model, "_can_compile_fullgraph", False):
        return False
    return all(type(layer) is StaticLayer for layer in StaticCache(config=model.config, max_cache_len=1).layers)


def draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """One id a row by inversion of the cumulative distribution: [B, V], float64 [B, 1] -> int64 [B, 1].

    Raises:
        NumericalError: a row without a distribution.
    """
    cdf = _cumulative(logits, temperature)
    _check_finite(_is_finite(cdf))
    return _inverted(cdf, uniform)


def _cumulative(logits: Tensor, temperature: float) -> Tensor:
    """float64 [B, V]: of 2^13 and more summands, float32 loses the tail."""
    return torch.softmax(logits.double() / temperature, dim=-1).cumsum(-1)


def _is_finite(cdf: Tensor) -> Tensor:
    """bool [], on the device: NaN anywhere in a row has come to its end."""
    return cdf[:, -1].isfinite().all()


def _check_finite(finite: Tensor) -> None:
    if not finite:  # waits for the device
        raise NumericalError(
            "the model gives NaN or infinite logits while sampling calibration sequences; use compute_dtype=float32 or "
            "bfloat16, or calibration.generated=0"
        )


def _inverted(cdf: Tensor, uniform: Tensor) -> Tensor:
    """int64 [B, 1], an id even where the row is not finite."""
    # right=True: the first id whose cdf exceeds u, so an id of probability 0 is never drawn
    return torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True).clamp_(max=cdf.shape[-1] - 1)


def _options(model: nn.Module) -> dict[str, Any]:
    """For the call of a model: all logits of a whole prompt are large."""
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"use_cache": True} | ({"logits_to_keep": 1} if keeps else {})


def _with_room(begin: Tensor, uniforms: Tensor) -> Tensor:
    return torch.cat([begin, begin.new_zeros(uniforms.shape)], dim=1)


def _continue_dynamic(
    model: nn.Module, begin: Tensor, uniforms: Tensor, temperature: float, on_step: OnToken
) -> Tensor:
    options, tokens = _options(model), _with_room(begin, uniforms)
    cache, fed = None, begin
    for t in range(uniforms.shape[1]):
        out = model(input_ids=fed, past_key_values=cache, **options)
        cache = getattr(out, "past_key_values", None)
        if cache is None:  # the next step would see its last token alone
            raise UnsupportedModel(
                f"{type(model).__name__} gives no KV cache to go on sampling from; set calibration.generated=0"
            )
        fed = draw(out.logits[:, -1], uniforms[:, t : t + 1], temperature)
        tokens[:, begin.shape[1] + t] = fed.squeeze(-1)
        on_step(t + 1)
    return tokens


@torch.inference_mode()
def continue_static(
    model: nn.Module, begin: Tensor, uniforms: Tensor, temperature: float, on_step: OnToken, captured: bool
) -> Tensor:
    """The static way of `continue_sequences`, for at least one token and a model with `has_static_step`.

    Args:
        uniforms: on the device of `begin`.
        captured: False: every step is launched by itself, on any device, with the same kernels.
    """
    step = _StaticStep(model, begin, uniforms, temperature)
    n_begin, length = begin.shape[1], step.tokens.shape[1]
    on_step(1)
    with _own_attention(model):
        for end in range(_STAGE_TOKENS, length - 1 + _STAGE_TOKENS, _STAGE_TOKENS):
            step.show(min(end, length))
            with replay.Replay(step, [], begin.device, captured, SWITCH) as replayed:
                for fed in range(max(end - _STAGE_TOKENS, n_begin), min(end, length - 1)):
                    replayed()
                    n_drawn = fed - n_begin + 2
                    on_step(n_drawn)
                    if n_drawn % _STEPS_BETWEEN_CHECKS == 0:  # also keeps the host from running far ahead
                        _check_finite(step.finite)
    _check_finite(step.finite)
    return step.tokens


@contextmanager
def _own_attention(model: Any) -> Iterator[None]:
    """`_attend` instead of sdpa. What else a model was made with (flash attention, eager for a softcap) stays."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    model.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface for one query token a sequence: query [B, H, 1, D], key and value
    [B, KV, T, D], mask bool [B or 1, 1, 1, T] -> [B, 1, H, D], and no weights.

    The queries of a group of heads are rows of one matrix. What this does not know (more tokens, a position bias)
    goes to sdpa.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, heads, n_tokens, width = query.shape
    if n_tokens != 1 or options.get("position_bias") is not None or options.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling")
    rows = query.view(batch, key.shape[1], heads // key.shape[1], width)
    scores = (rows * (width**-0.5 if scale is None else scale)) @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    out = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
    return out.reshape(batch, 1, heads, value.shape[-1]), None


class _StaticStep:
    """Feeds the last token of each sequence and appends the next; all state in tensors that keep their place.

    tokens: int64 [B, T]. last: int64 [1], the position of the last known token. finite: bool [], whether logits were so
    far, since a captured step cannot stop: what is drawn from others is some id, and found out later.
    """

    def __init__(self, model: nn.Module, begin: Tensor, uniforms: Tensor, temperature: float) -> None:
        """Reads the prompts and draws the first token."""
        from transformers.cache_utils import StaticCache

        self.model, self.uniforms, self.temperature = model, uniforms, temperature
        self.n_begin, self.options = begin.shape[1], _options(model)
        self.tokens = _with_room(begin, uniforms)
        self.last = torch.tensor([self.n_begin - 1], device=begin.device)
        self.finite = torch.tensor(True, device=begin.device)
        self.cache: Any = StaticCache(config=model.config, max_cache_len=self.tokens.shape[1])
        self._append(begin)
        self.whole = [(layer.keys, layer.values) for layer in self.cache.layers]

    def show(self, length: int) -> None:
        """Let the model see the cache as one of `length` tokens: a view, nothing is copied."""
        for layer, (keys, values) in zip(self.cache.layers, self.whole, strict=True):
            layer.keys, layer.values, layer.max_cache_len = keys[:, :, :length], values[:, :, :length], length

    def __call__(self) -> None:
        self._append(self.tokens.index_select(1, self.last))

    def _append(self, fed: Tensor) -> None:
        logits = self.model(input_ids=fed, past_key_values=self.cache, **self.options).logits[:, -1]
        cdf = _cumulative(logits, self.temperature)
        self.finite.logical_and_(_is_finite(cdf))
        self.last.add_(1)
        uniform = self.uniforms.index_select(1, self.last - self.n_begin)
        self.tokens.index_copy_(1, self.last, _inverted(cdf, uniform))
