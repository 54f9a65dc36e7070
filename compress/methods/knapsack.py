"""One choice for every unit, exactly: the multiple-choice knapsack as an integer program.

    min  sum_uc cost[u][c] z_uc    subject to  sum_uc weight[u][c] z_uc <= limit,  sum_c z_uc = 1,  z binary

solved by branch and cut (HiGHS through scipy.optimize.milp) to a gap of 0. Costs and weights are whole numbers, so
that a sum is exact, an equality is an equality and the same problem has the same answer on every machine; callers
round what they have (KL to a billionth of the worst total; sizes are bits or bytes).

Choosing bits per layer by an integer program over measured sensitivities: HAWQ-V3 (arXiv 2011.10680, section 3.4).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np


class Infeasible(Exception):
    """No choice keeps the limit; `least` is the smallest total weight that can be reached."""

    def __init__(self, least: int) -> None:
        super().__init__(f"the least total is {least}")
        self.least = least


def choose(costs: Sequence[Sequence[int]], weights: Sequence[Sequence[int]], limit: int) -> list[int]:
    """Index of the choice for each unit: least total cost with total weight <= limit.

    Of equally good answers the one of least weight is taken.

    Args:
        costs, weights: for each unit the numbers of its choices; rows may differ in length, none is empty.

    Raises:
        Infeasible: even the lightest choices exceed the limit.
    """
    least = sum(min(row) for row in weights)
    if least > limit:
        raise Infeasible(least)
    kept = [_undominated(c, w) for c, w in zip(costs, weights, strict=True)]
    costs = [[row[i] for i in keep] for row, keep in zip(costs, kept, strict=True)]
    weights = [[row[i] for i in keep] for row, keep in zip(weights, kept, strict=True)]
    picked = _solve(costs, weights, limit)
    # HiGHS stops at the first optimum it proves. A second pass makes the lightest of them: its limit on cost is met
    # by the first answer, so a failure to do better only means that this one stays.
    lighter = _solve(weights, costs, _total(costs, picked))
    if _total(costs, lighter) == _total(costs, picked) and _total(weights, lighter) < _total(weights, picked):
        picked = lighter
    return [keep[i] for keep, i in zip(kept, picked, strict=True)]


def _total(table: Sequence[Sequence[int]], picked: Sequence[int]) -> int:
    return sum(row[i] for row, i in zip(table, picked, strict=True))


def _undominated(costs: Sequence[int], weights: Sequence[int]) -> list[int]:
    """Choices that no other one beats in both, by rising weight; of equal ones the first."""
    order = sorted(range(len(costs)), key=lambda i: (weights[i], costs[i], i))
    kept: list[int] = []
    for i in order:
        if not kept or costs[i] < costs[kept[-1]]:
            kept.append(i)
    return kept


def _solve(costs: Sequence[Sequence[int]], weights: Sequence[Sequence[int]], limit: int) -> list[int]:
    """As `choose`, for a limit that can be kept."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    cost, weight = _excess(costs), _excess(weights)
    slack = limit - sum(min(row) for row in weights)
    # whole numbers stay whole and get small, so that the solver's tolerances lie far below one step
    step = math.gcd(*(v for row in weight for v in row)) or 1
    weight, slack = [[v // step for v in row] for row in weight], slack // step
    step = math.gcd(*(v for row in cost for v in row)) or 1
    cost = [[v // step for v in row] for row in cost]
    lightest = [row.index(0) for row in weight]
    slack = min(slack, sum(max(row) for row in weight))

    sizes = [len(row) for row in cost]
    n = sum(sizes)
    unit_of = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_array((np.ones(n), (unit_of, np.arange(n))), shape=(len(sizes), n))
    c = np.array([v for row in cost for v in row], dtype=np.float64)
    a = np.array([[v for row in weight for v in row]], dtype=np.float64)
    upper = slack
    while upper >= 0:
        constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(a, -np.inf, upper)]
        with _stdout_on_stderr():
            found = milp(c, integrality=np.ones(n), bounds=Bounds(0, 1), constraints=constraints,
                         options={"mip_rel_gap": 0.0})  # fmt: skip
        if found.x is None:
            break
        parts = np.split(found.x, np.cumsum(sizes)[:-1])
        picked = [int(part.argmax()) for part in parts]
        total = _total(weight, picked)
        if total <= slack:
            return picked
        upper -= total - slack  # the solver's tolerance let it through; whole numbers do not
    return lightest


@contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """HiGHS 1.12 leaves a debugging line on the process's stdout now and then, which is for results."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of them is closed: nothing to keep clean
        yield
        return
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _excess(table: Sequence[Sequence[int]]) -> list[list[int]]:
    """Each row less its least value: what every answer has in common decides nothing."""
    return [[v - min(row) for v in row] for row in table]
