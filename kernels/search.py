"""The search for a kernel's configuration: one cell of `tune`, and one miss of `dispatch` within a budget of seconds.

Each configuration is timed by a short graph, one round of weight copies; then the FINALISTS fastest by longer graphs,
replayed in turns, so that a drifting clock does not choose. A configuration whose relative error against float64 passes
the kernel's limit is reported as wrong, one that cannot run with its problem: no figure of either.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from compress.kernels import dispatch, table_file, timing
from compress.kernels.bench import one_line
from compress.kernels.choose import hopper_kernels
from compress.kernels.dispatch import Choice, Entry, Key
from compress.kernels.problem import Problem, Scheme
from compress.kernels.reference import relative_error
from compress.kernels.tunables import TUNABLES, Tunable, usable

log = logging.getLogger(__name__)

SEARCH_BUDGET_S = 10.0
FINALISTS = 4
_SHORT_MS, _SHORT_REPLAYS = 0.3, 3
_FINAL_MS, _FINAL_REPLAYS = 2.0, 11


@cache
def known_configs(kernel: str) -> frozenset[Any]:
    """Every configuration of a kernel in the tables of this GPU and Triton version."""
    table = table_file.load(dispatch.normalise_gpu(torch.cuda.get_device_name()), dispatch.triton_version())
    found = (dispatch.as_config(entry.choice, kernel, TUNABLES[kernel].config) for entry in table.values())
    return frozenset(config for config in found if config is not None)


Chosen = list[tuple[str, Any]]  # kernels and configurations


def allowed(
    tunable: Tunable, m: int, n: int, k: int, weight: Any, known: bool = False, only: Chosen | None = None
) -> list[Any]:
    """Configurations to try: the whole grid, what of it is known, or those that were named."""
    if only:  # one that does not fit is to be seen to fail
        return [config for name, config in only if name == tunable.name]
    every = [full for config in tunable.grid(m) for full in tunable.expand(m, n, k, config)]
    if known:
        every = [config for config in every if config in known_configs(tunable.name)]
    return [config for config in every if tunable.fits(weight, config)]


def candidates(
    tunable: Tunable, m: int, n: int, k: int, weight: Any, known: bool = False, only: Chosen | None = None
) -> list[Any]:
    """The kernel's own rule first, then the others, the fewer fields they change the earlier."""
    default = tunable.default(m, weight)
    every = allowed(tunable, m, n, k, weight, known, only)
    if default is None:
        return every
    changed = sorted(every, key=lambda c: sum(v != getattr(default, f) for f, v in vars(c).items()))
    return [default, *(c for c in changed if c != default)]


def best_within(
    tried: Iterable[tuple[str, Any]],
    measure: Callable[[str, Any], float | None],
    budget_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[str, Any, float] | None:
    """The fastest of (kernel, configuration) pairs, tried in order while the budget lasts.

    The first is always tried; none after it is begun that would pass the budget if it took as long as the longest yet.
    measure: microseconds, or None for a wrong result or a configuration that cannot run.
    """
    began, longest, best = clock(), 0.0, None
    for i, (kernel, config) in enumerate(tried):
        at = clock()
        if i and at - began + longest > budget_s:
            break
        us = measure(kernel, config)
        longest = max(longest, clock() - at)
        if us is not None and (best is None or us < best[2]):
            best = (kernel, config, us)
    return best


@dataclass
class Weights:
    """One problem in one dtype: the copies that each kernel rotates over, packed when first asked for."""

    p: Problem
    dtype: torch.dtype
    tunables: list[Tunable]
    known: bool = False
    only: Chosen = field(default_factory=list)
    _packed: dict[Any, list[Any]] = field(default_factory=dict)

    def copies(self, tunable: Tunable) -> list[Any]:
        """Kernels of one layout share theirs."""
        if tunable.pack not in self._packed:
            self._packed[tunable.pack] = timing.rotating_copies(tunable.pack(self.p, self.dtype))
        return self._packed[tunable.pack]

    def candidates(self, m: int) -> list[tuple[Tunable, Any]]:
        """What this machine's tables answer, then every kernel's candidates at M = m, the kernels in turns.

        A table's answer comes first because a new entry takes its place, however few the budget allows to be tried.
        """
        n, k = self.p.n, self.p.k
        every = [
            [(t, c) for c in candidates(t, m, n, k, self.copies(t)[0], self.known, self.only)]
            for t in self.tunables
            if t.takes(n, k)
        ]
        pairs = [pair for pairs in itertools.zip_longest(*every) for pair in pairs if pair is not None]
        present = self._present(m)
        return pairs if present is None else [present, *(pair for pair in pairs if pair != present)]

    def _present(self, m: int) -> tuple[Tunable, Any] | None:
        p, device = self.p, torch.device(self.p.device)
        int8 = self.tunables[0].int8
        key = dispatch.key_of((device, self.dtype, p.bits, p.group, p.symmetric, p.n, p.k, dispatch.m_bucket(m), int8))
        choice = dispatch.lookup(key)
        for tunable in self.tunables:
            config: Any = dispatch.as_config(choice, tunable.name, tunable.config)
            if config is not None and tunable.takes(p.n, p.k) and tunable.fits(self.copies(tunable)[0], config):
                return tunable, config
        return None


def tune_cell(weights: Weights, x: Tensor, reference: Tensor, budget_s: float = math.inf) -> list[dict[str, Any]]:
    """Every configuration that the budget allowed at x [M, K], the finalists first and the fastest of them ahead.

    Each is {"kernel", "config", "us", "error", "problem", "rule", "final"}: us is None where it is wrong or cannot run,
    rule says whether the kernel's own rule takes it, final whether it was timed in turns with the other finalists.
    """
    pairs = weights.candidates(x.shape[0])
    cells: list[dict[str, Any]] = []

    def measure(_: str, pair: tuple[Tunable, Any]) -> float | None:
        tunable, config = pair
        copies = weights.copies(tunable)
        cell = {"kernel": tunable.name, "config": vars(config), "final": False}
        cell["rule"] = config == tunable.default(x.shape[0], copies[0])
        cells.append(cell | _short_time(tunable, copies, config, x, reference))
        return cells[-1]["us"]

    best_within(((tunable.name, (tunable, config)) for tunable, config in pairs), measure, budget_s)
    right = sorted((i for i, c in enumerate(cells) if c["us"] is not None), key=lambda i: cells[i]["us"])
    right = right if weights.only else right[:FINALISTS]
    captured = []
    for i in right:
        tunable, config = pairs[i]
        call = _call(tunable, config, x)
        captured.append(timing.capture(call, weights.copies(tunable), _FINAL_MS))
    for i, samples in zip(right, timing.take_turns(captured, _FINAL_REPLAYS), strict=True):
        cells[i] |= {"us": statistics.median(samples), "final": True}
    return sorted(cells, key=lambda c: (not c["final"], c["us"] or math.inf))


def _call(tunable: Tunable, config: Any, x: Tensor) -> Callable[[Any], Tensor]:
    return lambda weight: tunable.launch(x, weight, config)


def _short_time(tunable: Tunable, copies: list[Any], config: Any, x: Tensor, reference: Tensor) -> dict[str, Any]:
    """{"us", "error", "problem"} of one configuration; us is None if it is wrong or cannot run."""
    call = _call(tunable, config, x)
    try:
        error = relative_error(call(copies[-1]), reference)
        if not error < tunable.max_error:
            return {"us": None, "error": None, "problem": "wrong"}
        us = timing.time_gpu(call, copies, graph_ms=_SHORT_MS, replays=_SHORT_REPLAYS)
        return {"us": us, "error": error, "problem": None}
    except Exception as problem:  # an invalid configuration is a result of the search: reported, not hidden
        return {"us": None, "error": None, "problem": one_line(problem)}


def entry_of(cell: dict[str, Any]) -> Entry:
    tunable = TUNABLES[cell["kernel"]]
    return Entry(Choice(tunable.name, cell["config"]), cell["us"], tunable.n_multiple, tunable.k_multiple)


# -- the bounded search -----------------------------------------------------------------------------------


def search(key: Key, device: torch.device, budget_s: float = SEARCH_BUDGET_S) -> Choice | None:
    """Time configurations for `key` on this GPU for about `budget_s` and keep the fastest in this machine's table.

    Takes memory for weights of that shape, 256 MB or two copies, while it lasts. None if nothing ran right.
    """
    bits, group, symmetric, int8 = dispatch.parse_scheme(key.scheme, key.k)
    log.info("searching a kernel configuration for %s, about %.0f s", key, budget_s)
    dtype = getattr(torch, key.dtype)
    with torch.cuda.device(device):
        p = Problem(key.n, key.k, "cuda", group, symmetric, bits)
        x = p.x(key.m)
        names = usable(hopper_kernels(device), Scheme(bits, group, symmetric, int8))
        weights = Weights(p, dtype, [TUNABLES[name] for name in names])
        best = tune_cell(weights, x.to(dtype), p.reference(x), budget_s)[:1]
    if not best or best[0]["us"] is None:
        log.warning("no kernel configuration ran right for %s; the kernel's own rule stays", key)
        return None
    entry = entry_of(best[0])
    table_file.remember({key: entry}, {"made_by": "search", "gpu": torch.cuda.get_device_name(device)})
    dispatch.forget()
    return entry.choice
