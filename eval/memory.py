"""How much memory a stretch of work adds, on a CUDA device or a CPU."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import nn

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK_RSS = "5"  # proc(5)


def resident_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers, shared storages counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class MemoryProbe:
    """Growth of memory over what was in use at `start`.

    CUDA: torch's allocator, exact. CPU: the resident set of this process, from Linux's /proc. Pages that the
    allocator had kept from earlier work do not count, so a CPU figure is a lower limit; without /proc it is None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.base: int | None = None

    def start(self) -> None:
        """Take what is in use now as the base, and forget earlier peaks.

        Garbage is collected first: a collection that falls between start and growth would hide as much growth.
        """
        gc.collect()
        self.forget_peak()
        if self.device.type == "cuda":
            self.base = torch.cuda.memory_allocated(self.device)
        else:
            self.base = _status_bytes("VmRSS")

    def forget_peak(self) -> None:
        """Let the next `growth` see only what comes from here on; the base stays."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _CLEAR_REFS.exists():
            _CLEAR_REFS.write_text(_RESET_PEAK_RSS)

    def growth(self) -> int | None:
        """Bytes at the peak, less the base; None where the system does not tell."""
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status_bytes("VmHWM")
        if peak is None or self.base is None:
            return None
        return max(peak - self.base, 0)


def _status_bytes(key: str) -> int | None:
    if not (_STATUS.exists() and _CLEAR_REFS.exists()):
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024  # the file says kB and means KiB
    return None
