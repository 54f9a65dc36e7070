"""What a rotation makes of a model's tensors, by name: computed from the mapped originals whenever one is asked for.

`rotation` finds the changes; `models.LoadedModel.tensor` asks for them. The mathematics: `methods.hadamard`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.methods.hadamard import Turn

_CHUNK = 2**24  # elements of an embedding in float64 at a time


@dataclass
class Change:
    """What a rotation does to one parameter [N, K] or [N]: its columns are multiplied by the gain of a norm (and its
    offset) and turned, its rows are turned, or all of it becomes a constant (a norm whose gain went elsewhere)."""

    gain: tuple[str, float] | None = None
    columns: Turn | None = None
    rows: Turn | None = None
    constant: float | None = None


@dataclass
class Rotation:
    """Changes by parameter name. rounded: those stored unquantized, which are given in the checkpoint's dtype as they
    will be saved; the others are given in float32, so that they are rounded once, by the quantizer."""

    device: torch.device
    changes: dict[str, Change] = field(default_factory=dict)
    rounded: set[str] = field(default_factory=set)

    def tensor(self, name: str, original: Callable[[str], Tensor], transposed: bool) -> Tensor:
        """The rotated tensor of a parameter in `changes`, on the CPU.

        original: source tensors by name. transposed: its module keeps [K, N].
        """
        change, source = self.changes[name], original(name)
        dtype = source.dtype if name in self.rounded else torch.float32
        if change.constant is not None:
            return torch.full_like(source, change.constant, dtype=dtype)
        if source.ndim == 1:
            assert change.rows is not None
            return change.rows.apply(source).to(dtype)
        weight = source.t() if transposed else source
        gain = None
        if change.gain is not None:
            norm, offset = change.gain
            gain = original(norm).to(self.device).double() + offset
        out = torch.empty(weight.shape, dtype=dtype)
        # rows turn together, so a chunk is then all of them
        n_rows = weight.shape[0] if change.rows is not None else max(1, _CHUNK // weight.shape[1])
        for start in range(0, weight.shape[0], n_rows):
            part = weight[start : start + n_rows].to(self.device).double()
            if gain is not None:
                part = part * gain
            if change.columns is not None:
                part = change.columns.apply(part)
            if change.rows is not None:
                part = change.rows.apply(part.t()).t()
            out[start : start + n_rows] = part
        return out.t().contiguous() if transposed else out

    def status(self, name: str) -> str | None:
        """For the manifest: a norm's gain is folded into what reads it, other changes rotate; None if there is none."""
        if name not in self.changes:
            return None
        return "folded" if self.changes[name].constant is not None else "rotated"

    def change(self, name: str) -> Change:
        return self.changes.setdefault(name, Change())
