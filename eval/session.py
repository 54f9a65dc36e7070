"""One model at one batch size, timed pass by pass: its token ids, its KV cache and its decode step.

On CUDA a decode step over a static KV cache is recorded once as a CUDA graph and replayed: launched one by one, the
kernels of a small step wait for Python. The step is that of `compress.decoder` where it knows the model, otherwise that
of transformers. `choose_launch` decides for all models of a comparison together.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from compress.config import BenchConfig
from compress.decode_weights import DecodeModel, read_model
from compress.decoder import Decoder
from compress.errors import ConfigError, EnvironmentProblem, UnsupportedModel
from compress.eval.memory import MemoryProbe, resident_bytes
from compress.eval.roofline import StepShape, Work, count_work, record_linear_calls, synchronize
from compress.qlinear import QuantLinear

log = logging.getLogger(__name__)

PHASES = ("prefill", "decode")
EAGER = "eager"
GRAPH = "decode in a CUDA graph, prefill eager"
ENGINE = "decode by compress.decoder in a CUDA graph, prefill eager"


def weights_of(model: nn.Module) -> Callable[[], DecodeModel]:
    """Reads the engine's weights of a model at the first call and gives the same ones at every other.

    What cannot be read raises at every call. Packed weights are fused into copies, as large as the model's own: they
    live as long as this function.
    """
    return cache(partial(read_model, model))


class Session:
    """One model at one batch size: its token ids, its KV cache, its decode graph and what was measured."""

    def __init__(
        self,
        model: nn.Module,
        batch: int,
        config: BenchConfig,
        device: torch.device,
        read_weights: Callable[[], DecodeModel] | None = None,
    ) -> None:
        """read_weights: the engine's weights of `model`, asked for when the engine is (see `weights_of`). Sessions that
        are given the same one share them; without it a session fuses its own."""
        self.model, self.batch, self.config, self.device = model, batch, config, device
        self.read_weights = read_weights or weights_of(model)
        self.ms: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.growth_bytes: dict[str, list[int | None]] = {phase: [] for phase in PHASES}
        self.work: dict[str, Work] = {}
        self.memory = MemoryProbe(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.decoder: Decoder | None = None
        vocab = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        shape = (batch, config.prompt_tokens + config.decode_tokens)
        self.ids = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(0)).to(device)
        # serving computes the logits of a prompt's last token alone; older models cannot
        accepted = inspect.signature(model.forward).parameters
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def forward(self, ids: Tensor, cache: Any) -> Tensor:
        """ids [B, T] -> logits [B, 1, V] (or [B, T, V] of models without `logits_to_keep`)."""
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True, **self.options).logits

    @property
    def prompt(self) -> Tensor:
        return self.ids[:, : self.config.prompt_tokens]

    def kernels(self, phase: str, dtype: torch.dtype) -> dict[str, int]:
        """Which path computes the quantized layers at this phase's number of rows: {path: number of layers}."""
        rows = self.batch * (self.config.prompt_tokens if phase == "prefill" else 1)
        layers = [m for m in self.model.modules() if isinstance(m, QuantLinear)]
        return dict(Counter(layer.backend_for(rows, dtype).value for layer in layers))

    def count(self) -> None:
        """One untimed pass that fills `work`. It also pages in weights that are mapped from a file."""
        cache = DynamicCache(config=self.model.config)
        shapes = {
            "prefill": StepShape.prefill(self.batch, self.config.prompt_tokens),
            "decode": StepShape.decode(self.batch, self.config.prompt_tokens, self.config.decode_tokens),
        }
        for phase, ids in (("prefill", self.prompt), ("decode", self.ids[:, -1:])):
            with record_linear_calls(self.model) as calls:
                self.forward(ids, cache)
            self.work[phase] = count_work(self.model, calls, cache, shapes[phase])

    def use_engine(self) -> None:
        """Let `compress.decoder` take the decode steps, recorded as a CUDA graph on CUDA.

        Its fused copies of packed weights do not count as growth: without a comparison, the originals need not stay.

        Raises:
            UnsupportedModel, ConfigError: a model, length or dtype that the engine does not know.
        """
        weights = self.read_weights()
        self.memory.start()
        self.decoder = Decoder(weights, self.batch, self.ids.shape[1])
        if self.device.type == "cuda":
            self.decoder.capture()
        self._note_growth("decode", 0)

    def capture(self) -> None:
        """Record one decode step of transformers over a static cache as a CUDA graph, which `run` then replays.

        The static cache keeps its length in a tensor that the step itself increments, so each replay writes the
        next position.
        """
        n_warm = 2
        capacity = self.config.prompt_tokens + max(self.config.decode_tokens, n_warm)
        self.cache = StaticCache(self.model.config, capacity)
        self.forward(self.prompt, self.cache)
        self.token = self.ids[:, -1:].clone()
        self.memory.start()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(n_warm):  # kernels compile and libraries allocate before the capture, which forbids both
                self.forward(self.token, self.cache)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.logits = self.forward(self.token, self.cache)
        self._note_growth("decode", _cache_bytes(self.cache))
        self.graph = graph

    def run(self, keep: bool) -> None:
        """A prompt and all decode steps, timed; with `keep` the times become samples, without they warm up."""
        captured = self.graph is not None
        cache = self.cache if captured else DynamicCache(config=self.model.config)
        if captured:
            cache.reset()
        held_bytes = _cache_bytes(cache) if captured else 0
        self.memory.start()
        prefill_ms = self._timed(lambda: self.forward(self.prompt, cache))
        self._note_growth("prefill", held_bytes)
        if self.decoder is not None:
            self.decoder.load_cache(cache)
        self.memory.forget_peak()
        decode_ms = []
        for i in range(self.config.prompt_tokens, self.ids.shape[1]):
            token = self.ids[:, i : i + 1]
            decode_ms.append(self._timed(lambda token=token: self._decode(token, cache)))  # type: ignore[misc]
        if not captured and self.decoder is None:  # a replay allocates nothing: its making saw what the graph holds
            self._note_growth("decode", 0)
        if keep:
            self.ms["prefill"].append(prefill_ms)
            self.ms["decode"] += decode_ms

    def _decode(self, token: Tensor, cache: Any) -> None:
        if self.decoder is not None:
            self.decoder.step(token[:, 0])
        elif self.graph is None:
            self.forward(token, cache)
        else:
            self.token.copy_(token)
            self.graph.replay()

    def _timed(self, call: Callable[[], object]) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        call()
        synchronize(self.device)
        return (time.perf_counter() - start) * 1e3

    def _note_growth(self, phase: str, held_bytes: int) -> None:
        growth = self.memory.growth()
        self.growth_bytes[phase].append(None if growth is None else growth + held_bytes)

    def peak_bytes(self, phase: str) -> int | None:
        known = [g for g in self.growth_bytes[phase] if g is not None]
        return resident_bytes(self.model) + max(known) if known else None


def _cache_bytes(cache: Any) -> int:
    states = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in states)


def choose_launch(sessions: list[Session]) -> str:
    """Gives every session the engine, or a graph of transformers' decode step, or none of them, and says which."""
    if sessions[0].device.type != "cuda":
        return EAGER
    try:
        for session in sessions:
            session.use_engine()
        return ENGINE
    except (UnsupportedModel, ConfigError, EnvironmentProblem) as error:
        for session in sessions:
            session.decoder = None
        log.warning("transformers takes the decode steps of both models: %s", error)
    try:
        for session in sessions:
            session.capture()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        for session in sessions:
            session.graph = None
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        log.warning("the decode step cannot be captured in a CUDA graph, both models run eagerly: %s", reason)
        return f"{EAGER} (CUDA graph capture failed: {reason})"
    return GRAPH
