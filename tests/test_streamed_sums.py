"""Which stages of which tiles each program of a persistent launch computes, and what it gives to others: the functions
that the kernels run, with plain integers. `test_hopper` has what comes out.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when the kernels are decorated, at import

from compress.kernels import streamed_sums
from compress.kernels.tile_shape import TiledConfig
from compress.kernels.w4a16_producer import rounds

BY_ALL = TiledConfig(128, 128, 2, 8, 4, 1, True, 1, 2, 1, 0, True)
MEMORY = 232448


class Integers:
    """As much of Triton's language as these functions ask for."""

    constexpr = int
    cdiv = staticmethod(lambda a, b: -(-a // b))
    maximum = staticmethod(max)
    minimum = staticmethod(min)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The functions of the kernels, by name, and `at` to set the program that runs them."""
    at = SimpleNamespace(program=0, programs=0, tiles=0)
    monkeypatch.setattr(streamed_sums, "gl", Integers)
    monkeypatch.setattr(streamed_sums, "_program", lambda T: (at.program, at.programs))
    monkeypatch.setattr(streamed_sums, "all_tiles", lambda M, N, T: at.tiles)
    names = ("_streamed", "turns_of", "turn")
    for name in names:
        monkeypatch.setattr(streamed_sums, name, getattr(streamed_sums, name).fn)
    return SimpleNamespace(at=at, **{name: getattr(streamed_sums, name) for name in names})


@pytest.mark.parametrize("unroll", [1, 2, 4])
@pytest.mark.parametrize("n_sms", [7, 66, 132])
@pytest.mark.parametrize("cluster", [1, 2])
def test_every_stage_is_computed_once(kernel: Any, n_sms: int, unroll: int, cluster: int) -> None:
    """Oracle: counting. Every stage of every tile is computed once, in whole lines; of a tile that is left one program
    computes the last stages and adds what those between the first giver and itself give, once in a launch each."""
    for tiles, stages in itertools.product((1, 3, 7, 45, 96, 131, 132, 133, 192, 264, 300), (4, 8, 28, 32, 112)):
        config = replace(BY_ALL, unroll=unroll, cluster=cluster).within(stages)
        how = rounds(config, tiles, stages, n_sms, MEMORY)
        ctas, found = how.config.ctas, how.shares
        T = SimpleNamespace(streams=True, slices=1)
        kernel.at.programs, kernel.at.tiles = how.clusters * ctas, tiles
        computed: dict[int, list[tuple[int, int, int]]] = {}
        keepers: dict[int, range] = {}
        given: dict[int, int] = {}
        for program in range(kernel.at.programs):
            kernel.at.program = program
            shared = (found.whole, stages, found.part, 0, 0, T)
            alone, turns = kernel.turns_of(*shared)
            for i in range(turns):
                tile, first, last, giver = kernel.turn(i, alone, *shared)
                assert 0 <= first < last <= stages and (last - first) % unroll in (0, stages % unroll)
                computed.setdefault(tile, []).append((first, last, program))
                if ctas == 1 and last == stages:
                    keepers[tile] = range(giver, program)
                elif ctas == 1:
                    assert program not in given and i == alone
                    given[program] = tile
        assert sorted(computed) == list(range(tiles))
        for pieces in computed.values():
            ends = sorted(pieces)
            assert ends[0][0] == 0 and ends[-1][1] == stages
            assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
        for tile, givers in keepers.items():
            assert [p for p, of in sorted(given.items()) if of == tile] == list(givers)
