"""Randomized Hadamard rotations (QuaRot, arXiv 2404.00456; the names R1 and R2 are those of SpinQuant, 2405.16406).

An orthonormal Q mixes all channels with weights of one size, so an outlier channel is spread over all of them and the
range that a group of weights must cover shrinks. Q and its inverse are folded into neighbouring weights, offline: the
model computes what it did, and nothing runs at inference that did not run before. Rows are tokens, h' = h Q:

    embedding E -> E Q            residual stream h -> h Q            RMSNorm gain g -> 1, and norm(h Q) = norm(h) Q
    reads the norm:      W -> W diag(g) Q          q, k, v, gate, up, head
    writes the stream:   W -> Q^T W, b -> b Q      o, down
                                                                      R1 = Q, one matrix for the whole model
    v -> its rows of each head by D^T;  o -> its columns of each head by D: attention mixes tokens, not channels
                                                                      R2 = D, a matrix for each block

All arithmetic here is float64, and signs come from a generator of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_LARGEST_SYLVESTER = 64  # two products with 64 x 64 instead of twelve passes over a row of 4096


@dataclass(frozen=True)
class Turn:
    """x -> x Q over the last axis, with Q = diag(signs) (I ⊗ H), H the orthonormal Hadamard matrix of order `size`.

    signs: float64 [n] of +1 and -1; size divides n.
    """

    signs: Tensor
    size: int

    def apply(self, x: Tensor) -> Tensor:
        """x Q as float64, for x [..., n] of any float dtype."""
        n = self.signs.numel()
        mixed = (x.double() * self.signs.to(x.device)).unflatten(-1, (n // self.size, self.size))
        return apply_hadamard(mixed).flatten(-2)


def random_turn(n: int, seed: int, size: int | None = None) -> Turn:
    """A Hadamard rotation of n channels in blocks of `size` (all of them by default) with signs drawn from `seed`.

    A size that no construction here reaches is turned in blocks of `hadamard_order(size)` instead.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
    return Turn(signs, hadamard_order(size or n))


def hadamard_order(n: int) -> int:
    """n where a Hadamard matrix of order n can be built here, otherwise the largest power of two that divides n."""
    return n if _factors(n) is not None else n & -n


def hadamard_matrix(n: int) -> Tensor:
    """Orthonormal matrix float64 [n, n]: a Hadamard matrix of order n over sqrt(n), or, where none can be built here,
    block-diagonal of those of order `hadamard_order(n)`."""
    order = hadamard_order(n)
    return apply_hadamard(torch.eye(n, dtype=torch.float64).unflatten(-1, (n // order, order))).flatten(-2)


def apply_hadamard(x: Tensor) -> Tensor:
    """x H over the last axis, for float64 x [..., n] with n = hadamard_order(n): the Kronecker factors one by one."""
    n = x.shape[-1]
    factors = _factors(n)
    assert factors is not None
    y = x.reshape(-1, *(len(f) for f in factors))
    for axis, factor in enumerate(factors, 1):
        y = (y.movedim(axis, -1) @ factor.to(x.device)).movedim(-1, axis)
    return y.reshape(x.shape) / n**0.5


@cache
def _factors(n: int) -> list[Tensor] | None:
    """Matrices of ±1 whose Kronecker product is a Hadamard matrix of order n: powers of two by Sylvester, and for
    n = 2^k m with m odd the smallest 2^j m that Paley's constructions reach. None where they reach none."""
    if n < 1:
        return None
    power = n & -n
    odd = n // power
    if odd == 1:
        return _sylvester(power)
    order = 4 * odd
    while n % order == 0:
        dense = _paley(order)
        if dense is not None:
            return [*_sylvester(n // order), dense]
        order *= 2
    return None


def _sylvester(n: int) -> list[Tensor]:
    factors = []
    while n > 1:
        size = min(n, _LARGEST_SYLVESTER)
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        factors.append(matrix)
        n //= size
    return factors or [torch.ones(1, 1, dtype=torch.float64)]


def _paley(order: int) -> Tensor | None:
    """Hadamard matrix of ±1 of this order by Paley's first construction (order = q + 1, q a prime that is 3 modulo 4)
    or his second (order = 2 (q + 1), q a prime that is 1 modulo 4)."""
    if _is_prime(order - 1) and order % 4 == 0:
        skew = _bordered(order - 1, corner=-1.0)
        return skew + torch.eye(order, dtype=torch.float64)
    q = order // 2 - 1
    if order % 4 == 0 and q % 4 == 1 and _is_prime(q):
        conference = _bordered(q, corner=1.0)
        ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, ones) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)
    return None


def _bordered(q: int, corner: float) -> Tensor:
    """[q + 1, q + 1]: the Jacobsthal matrix chi(i - j) of the prime q, bordered by a row of ones and a column of
    `corner`; zero on the diagonal."""
    chi = -torch.ones(q, dtype=torch.float64)
    chi[torch.arange(q).square() % q] = 1.0  # squares modulo q
    chi[0] = 0.0
    i = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = corner
    matrix[1:, 1:] = chi[(i[:, None] - i[None, :]) % q]
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
