"""W4A16 kernels of other packages as contenders of `bench`: gemlite (Triton) and Humming (CUDA, compiled when called).

Both are optional (`pip install 'compress-llm[peers]'`). Each is called as its own documentation says, with its own
choice of tiles; what that choice is, and where it is not the default, stands in the class. TESTED names the versions
whose calls these are; another version is used too, and its number is in the record.
"""

from __future__ import annotations

import json
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.kernels import timing
from compress.kernels.contenders import Call, Contender, quantized_bits
from compress.kernels.problem import Problem

TESTED = {"gemlite": "0.6.0.post2", "humming-kernels": "0.1.19"}
NOT_INSTALLED = "not installed"


class Peer(Protocol):
    """Built once a run, before any timing; raises whatever the package raises where it cannot run."""

    def contender(self, p: Problem, dtype: torch.dtype, ms: list[int]) -> Contender: ...


def versions() -> dict[str, str]:
    """Each peer's installed version, or NOT_INSTALLED."""
    found = {}
    for name in TESTED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = NOT_INSTALLED
    return found


def pack_along_k(codes: Tensor) -> Tensor:
    """uint8 [N, K] below 16 -> int32 [N, K/8], input k in bits 4 (k mod 8) and up."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32, device=codes.device)
    for i in range(8):
        words |= codes[:, i::8].to(torch.int32) << (4 * i)
    return words


class Gemlite:
    """gemlite with the configurations that it ships for the H100; a shape that those lack takes the closest one's.

    Without that its autotuner would compile some 20 kernels, 10 s, at each new shape and M. Where two of its kernels
    take an M, both are tried: its own rule takes GEMV_REVSPLITK up to M = 4, GEMM_SPLITK below 64 and GEMM from there.
    """

    def __init__(self) -> None:
        import gemlite  # type: ignore[import-not-found]
        import gemlite.core  # type: ignore[import-not-found]

        self.package, self.core = gemlite, gemlite.core
        if not self.core.GEMLITE_TRITON_CONFIG_CACHE:  # it loads them by the GPU's name; H200 has none of its own
            gemlite.load_config(str(Path(gemlite.__file__).parent / "configs" / "h100.json"))

    def contender(self, p: Problem, dtype: torch.dtype, ms: list[int]) -> Contender:
        self._fill_configs(p, ms)
        kind = self.package.DType.FP16 if dtype is torch.float16 else self.package.DType.BF16
        layer = self.package.GemLiteLinear(
            4, group_size=p.group, in_features=p.k, out_features=p.n, input_dtype=kind, output_dtype=kind
        )
        layer.pack(p.codes, p.scale.to(dtype), 8, None)
        words, scale, *rest = layer.get_tensor_args()
        meta = layer.get_meta_args()

        def call_of(kernel: str) -> Call:
            number = self.core.GEMLITE_MATMUL_TYPES_MAPPING[kernel]
            return lambda w, x: self.package.forward_functional(x, None, [*w, *rest], meta, number)

        copies = timing.rotating_copies((words.data, scale.data))
        return Contender(
            dtype, copies, lambda m: [(kernel, call_of(kernel)) for kernel in kernels_at(m)], "peer", quantized_bits(p)
        )

    def _fill_configs(self, p: Problem, ms: list[int]) -> None:
        """Give this shape the closest shipped configuration, so that nothing is tuned at the first call."""
        import gemlite.triton_kernels.utils as utils  # type: ignore[import-not-found]

        buckets = [utils.get_closest_m(m) for m in ms]
        for kernel, known in self.core.GEMLITE_TRITON_CONFIG_CACHE.items():
            fill_configs(known, kernel, p.n, p.k, p.group, buckets)


def kernels_at(m: int) -> list[str]:
    """gemlite's kernels that take M rows: the one of its own rule, and its neighbour at an edge."""
    if m <= 4:
        return ["GEMV_REVSPLITK", "GEMM_SPLITK"]
    return ["GEMM_SPLITK"] if m < 64 else (["GEMM_SPLITK", "GEMM"] if m == 64 else ["GEMM"])


def fill_configs(known: dict[str, Any], kernel: str, n: int, k: int, group: int, ms: list[int]) -> None:
    """Add to one kernel's table (M, N, K, group, 8 codes a word, 4-bit in 16-bit) what it lacks for [n, k] at `ms`.

    Closest: in the logarithms of N and K, then of M.
    """
    shipped = {_signature(text): config for text, config in known.items()}
    usable = {s: config for s, config in shipped.items() if s[3:] == (group, 8, 104)}
    for m in ms:
        if kernel not in kernels_at(m) or (m, n, k, group, 8, 104) in shipped or not usable:
            continue
        near = min(usable, key=lambda s: (_ratio(s[1], n) * _ratio(s[2], k), _ratio(s[0], m)))
        known[str((m, n, k, group, 8, 104))] = dict(usable[near])


def _signature(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.strip("()").split(","))


def _ratio(a: int, b: int) -> float:
    return max(a, b) / min(a, b)


class Humming:
    """humming-kernels with the tiles that its heuristics choose for each M; the kernels compile at the first call.

    With nvcc where there is one: NVRTC, its default, needs headers that not every machine has.
    """

    def __init__(self) -> None:
        if shutil.which("nvcc"):
            os.environ.setdefault("HUMMING_COMPILER", "nvcc")
        no_builders = "HUMMING_DISABLE_PARALLEL_BUILD"  # its import starts processes that would run beside the timing
        set_before = os.environ.get(no_builders)
        os.environ[no_builders] = "1"
        try:
            from humming.forward import humming_forward  # type: ignore[import-not-found]
            from humming.layer import HummingLayer  # type: ignore[import-not-found]
            from humming.tune import get_heuristics_config  # type: ignore[import-not-found]
        finally:
            del os.environ[no_builders]  # it would also compile one kernel at a time
            if set_before is not None:
                os.environ[no_builders] = set_before
        self.forward, self.layer, self.heuristics = humming_forward, HummingLayer, get_heuristics_config

    def contender(self, p: Problem, dtype: torch.dtype, ms: list[int]) -> Contender:
        layer = self.layer(
            shape_n=p.n, shape_k=p.k, weight_config={"dtype": "int4", "group_size": p.group}, torch_dtype=dtype
        ).to(p.device)
        layer.load_from_tensors({"weight": pack_along_k(p.codes), "weight_scale": p.scale.to(dtype)})
        layer.transform()
        config, locks = layer.humming_config, layer.locks
        tuning = self._tuning(config, ms)

        def call(w: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
            return self.forward(config, inputs=x, weight=w[0], weight_scale=w[1], locks=locks, tuning_config=tuning)

        copies = timing.rotating_copies((layer.weight.data, layer.weight_scale.data))
        return Contender.of(dtype, copies, call, "peer", quantized_bits(p))

    def _tuning(self, config: Any, ms: list[int]) -> str:
        """Its tuning format, [[above M, up to M, configuration], ...]: one call compiles all kernels together."""
        edges = [0, *sorted(ms)[:-1], 1 << 30]
        chosen = [self.heuristics(config, shape_m=m) for m in sorted(ms)]
        ranges = [[low, high, one] for low, high, one in zip(edges[:-1], edges[1:], chosen, strict=True)]
        return json.dumps(ranges, default=lambda value: value.item() if hasattr(value, "item") else str(value))


PEERS: dict[str, type[Peer]] = {"gemlite": Gemlite, "humming-kernels": Humming}
