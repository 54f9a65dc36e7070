"""What a kernel leaves unwritten must show: outputs that are poisoned before it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that a launcher allocates starts as NaN, or as 77 where it holds integers."""
    real = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = real(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
