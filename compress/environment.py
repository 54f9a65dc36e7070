"""The machine and the versions behind a figure."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

import compress

_PACKAGES = ("torch", "transformers", "triton", "compressed-tensors", "safetensors", "lm_eval")


def versions() -> dict[str, str]:
    """Versions of this package and of those that decide its results."""
    found = {"compress": compress.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package.replace("-", "_")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package.replace("-", "_")] = "not installed"
    return found


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The `environment` section of a run record."""
    return {
        "device": str(device),
        "device_name": device_name(device),
        "compute_dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        **versions(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            model = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), "")
    except OSError:
        model = ""
    return f"{model or platform.processor() or platform.machine()} ({os.cpu_count()} cores)"
