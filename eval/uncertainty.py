"""Standard errors of aggregated scores, alone and paired, from per-sample values.

An aggregate A(v_1..v_n) is linearised (delta method): A is close to a constant plus the mean of influences

    mean                 I_i = v_i
    perplexity           A = exp(-mean(l)),            I_i = -A * l_i
    weighted perplexity  A = exp(-sum(l) / sum(w)),    I_i = -A * (l_i - r * w_i) / mean(w),      r = sum(l) / sum(w)
    bits per byte        A = -sum(l) / sum(w) / ln 2,  I_i = -(l_i - r * w_i) / mean(w) / ln 2

with l a log-likelihood in nats and w a number of words or bytes. Then stderr = sd(I) / sqrt(n), and the error of
a difference between two models on the same samples is sd(I - I') / sqrt(n), in which whatever the two have in
common (hard and easy samples) cancels: usually several times smaller than combining the two errors. Aggregates
without a formula here are bootstrapped over samples, with the same resamples for both models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

BOOTSTRAP_RESAMPLES = 200

Values = Sequence[Any]
Aggregation = Callable[[Values], float]


class Aggregate(Enum):
    """Aggregates with a formula; the values are the names lm-eval gives them."""

    MEAN = "mean"
    PERPLEXITY = "perplexity"
    WEIGHTED_PERPLEXITY = "weighted_perplexity"
    BITS_PER_BYTE = "bits_per_byte"


def mean_stderr(values: NDArray[np.float64]) -> float | None:
    """Standard error of the mean of [n] independent values; None for fewer than two."""
    n = len(values)
    return float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else None


def influences(values: Values, aggregate: Aggregate) -> NDArray[np.float64]:
    """[n] linearised contributions of each sample; see the module docstring.

    Args:
        values: numbers, or (log-likelihood, weight) pairs for the weighted aggregates.
    """
    v = np.asarray(values, dtype=np.float64)
    if aggregate is Aggregate.MEAN:
        return v
    if aggregate is Aggregate.PERPLEXITY:
        return -math.exp(-float(v.mean())) * v
    log_likelihood, weight = v[:, 0], v[:, 1]
    rate = float(log_likelihood.sum() / weight.sum())
    slope = 1 / math.log(2) if aggregate is Aggregate.BITS_PER_BYTE else math.exp(-rate)
    return -slope * (log_likelihood - rate * weight) / weight.mean()


def stderr(values: Values, aggregation: Aggregation) -> float | None:
    """Standard error of `aggregation(values)`; None for fewer than two samples.

    Args:
        aggregation: one of lm-eval's aggregation functions, known by name, or any other function of the samples.
    """
    known = _known(aggregation)
    if len(values) < 2:
        return None
    return mean_stderr(influences(values, known)) if known else _bootstrap(aggregation, values, None)


def paired_stderr(values: Values, reference: Values, aggregation: Aggregation) -> float | None:
    """Standard error of aggregation(values) - aggregation(reference), sample i of both being the same document.

    Raises:
        ValueError: the two differ in length, so that they cannot be paired.
    """
    if len(values) != len(reference):
        raise ValueError(f"{len(values)} values cannot be paired with {len(reference)} of the reference")
    if len(values) < 2:
        return None
    known = _known(aggregation)
    if known:
        return mean_stderr(influences(values, known) - influences(reference, known))
    return _bootstrap(aggregation, values, reference)


def _known(aggregation: Aggregation) -> Aggregate | None:
    # by module as well as by name: a user's own function may be called `mean`
    if getattr(aggregation, "__module__", "") != "lm_eval.api.metrics":
        return None
    names = {a.value: a for a in Aggregate}
    return names.get(getattr(aggregation, "__name__", ""))


def _bootstrap(aggregation: Aggregation, values: Values, reference: Values | None) -> float:
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(BOOTSTRAP_RESAMPLES):
        rows = rng.integers(len(values), size=len(values)).tolist()
        draw = aggregation([values[i] for i in rows])
        draws.append(draw if reference is None else draw - aggregation([reference[i] for i in rows]))
    return float(np.std(draws, ddof=1))
