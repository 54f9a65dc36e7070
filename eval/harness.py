"""lm-eval's Hugging Face adapter around a model that is already in memory, and the quiet it runs in.

Imports lm-eval, transformers and accelerate (seconds): import this module inside functions. Differs from plain HFLM:
  - the model is not re-tied, moved, or left in another mode, and the tokenizer is not given a pad token: they are
    the ones that get saved and measured elsewhere (HFLM does all of that to what it is handed);
  - log-softmax in float32, not in the model's dtype: in bfloat16 close choices tie, and a tie goes to the first;
  - NaN logits raise instead of scoring as a choice of the first answer;
  - the batch shrinks for long requests, so that logits take bounded memory.
"""

from __future__ import annotations

import copy
import logging
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import groupby
from types import ModuleType
from typing import Any

import datasets
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from tqdm import tqdm

from compress.errors import NumericalError

log = logging.getLogger(__name__)

# Largest batch of logits, in elements: 0.5 GB in float32, twice with its log-softmax.
MAX_LOGITS = 2**27

# Warnings that say nothing about the results, by how they start.
_CHATTER = (
    "`pretrained` model kwarg is not of type",
    "Passed an already-initialized model",
)
_CHATTER_INSIDE = "Custom kwargs can be passed to"


class _CausalLM:
    """What HFLM needs of a causal LM. Not an nn.Module: HFLM re-ties the weights of modules it is given."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.config = copy.copy(model.config)
        # HFLM would parse it to load weights; these are loaded
        if hasattr(self.config, "quantization_config"):
            del self.config.quantization_config
        self.device = next(iter([*model.parameters(), *model.buffers()])).device

    def __call__(self, input_ids: Tensor) -> Any:
        output = self._model(input_ids=input_ids, use_cache=False)
        # the maximum of a row is NaN or infinite if any entry is; -inf entries (masked vocabulary) are allowed
        if not torch.isfinite(output.logits.amax(-1)).all():
            raise NumericalError(
                "the model returned NaN or infinite logits on a task; its weights or compute dtype overflow."
                " Use compute_dtype=float32 or bfloat16, or check the layer report for the layer that broke"
            )
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.generate(*args, **kwargs)  # type: ignore[operator]


class InMemoryLM(HFLM):
    """HFLM over a model in memory.

    Args:
        model: HF-like causal LM with a `config`, in eval mode, on its device.
        tokenizer: its fast tokenizer; copied, not changed.
        batch_size: largest number of requests in a batch.
        max_length: longest request in tokens; None for the model's own limit.
    """

    batch_size_per_gpu: int  # HFLM's name for the batch size it uses

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int, max_length: int | None = None) -> None:
        super().__init__(
            pretrained=_CausalLM(model),
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            max_length=max_length,
            softmax_dtype="float32",
        )

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Score (_, context ids, continuation ids) requests in bands of similar length, each with its batch size."""
        limit = self.batch_size_per_gpu
        order = sorted(range(len(requests)), key=lambda i: self._fitting_batch(requests[i], limit))
        results: list[Any] = [None] * len(requests)
        try:
            for size, members in groupby(order, key=lambda i: self._fitting_batch(requests[i], limit)):
                self.batch_size_per_gpu = size
                rows = list(members)
                scored = super()._loglikelihood_tokens([requests[i] for i in rows], *args, **kwargs)
                for i, score in zip(rows, scored, strict=True):
                    results[i] = score
        finally:
            self.batch_size_per_gpu = limit
        return results

    def _fitting_batch(self, request: Any, limit: int) -> int:
        tokens = min(len(request[1]) + len(request[2]), self.max_length)
        fitting = max(1, MAX_LOGITS // (tokens * self.vocab_size))
        # powers of two: few bands, so that batches stay full
        return min(limit, 2 ** (fitting.bit_length() - 1))


class _SilentTqdm(tqdm):  # type: ignore[type-arg]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


class _WarningCounter(logging.Handler):
    """Counts warnings, those that differ only in numbers as one."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.first: dict[str, str] = {}
        self.counts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith(_CHATTER) or _CHATTER_INSIDE in message:
            return
        kind = re.sub(r"\d+", "#", message)
        self.first.setdefault(kind, message)
        self.counts[kind] += 1

    def report(self) -> None:
        for kind, message in self.first.items():
            times = f" ({self.counts[kind]} such warnings)" if self.counts[kind] > 1 else ""
            log.warning("lm-eval: %s%s", message, times)


@contextmanager
def _silent_bars(*modules: ModuleType) -> Iterator[None]:
    """No tqdm bars from these modules (some pass disable=False, so TQDM_DISABLE would not do)."""
    try:
        for module in modules:
            module.tqdm = _SilentTqdm  # type: ignore[attr-defined]
        yield
    finally:
        for module in modules:
            module.tqdm = tqdm  # type: ignore[attr-defined]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and nothing on stdout; lm-eval's warnings come out once each, through this module's logger."""
    logger, counter = logging.getLogger("lm_eval"), _WarningCounter()
    bars = datasets.are_progress_bars_disabled()
    propagate, handlers = logger.propagate, logger.handlers[:]
    noisy = (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface)
    with redirect_stdout(sys.stderr), _silent_bars(*noisy):
        datasets.disable_progress_bars()
        logger.propagate, logger.handlers = False, [counter]
        try:
            yield
        finally:
            logger.propagate, logger.handlers = propagate, handlers
            if not bars:
                datasets.enable_progress_bars()
            counter.report()


@contextmanager
def own_random_state(seed: int = 1234) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global generators inside, and give the caller's states back after."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
