"""Programmatic dependent launch (PDL, sm_90 and later): a kernel is put on the chip while the one before it drains.

A kernel launched so must call `gdc_wait` before it touches anything that an earlier kernel of the step wrote or still
reads; what no kernel of the step writes (weights, the cache of earlier tokens) may be loaded before. Every such kernel
waits before it ends, so that what is finished for one is finished for all that follow. `gdc_launch_dependents` lets the
next kernel in; with a wait in each, it may come first. A kernel without any of this takes part as it is: it starts when
its predecessor has ended, and its successor starts when it has.

Off for the first kernel of a step, which may follow a copy, and always under the interpreter. So whatever a step wrote
is there for all of the next, also before a wait: positions, which the head of a step counts up behind its own.
"""

from __future__ import annotations

from functools import cache

import torch

from compress.errors import EnvironmentProblem
from compress.kernels.common import INTERPRETED

MIN_CAPABILITY = (9, 0)


@cache
def supported(device: torch.device) -> bool:
    """Whether kernels may be launched so on this device."""
    if INTERPRETED or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def options(pdl: bool, device: torch.device) -> dict[str, bool]:
    """Keyword arguments of a Triton launch: the kernel's PDL switch, and the launch attribute where it is on.

    Raises:
        EnvironmentProblem: it is asked for where it does not exist.
    """
    if not pdl:
        return {"PDL": False}
    if not supported(device):
        raise EnvironmentProblem(
            f"pdl=True needs a CUDA GPU of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or later, "
            f"not {device}; use pdl=False"
        )
    return {"PDL": True, "launch_pdl": True}
