"""Which path computes y = x W^T: the rules of QuantLinear's Backend.AUTO, as pure functions.

    CUDA, group a multiple of 32 or one scale a row, float16/bfloat16 activations:
        TRITON up to `triton_max_tokens` rows of x; above, DEQUANT (one kernel, then cuBLAS). On Hopper 4 bits have no
        limit where its own kernels take the shape (`hopper_takes`): they keep up with cuBLAS
    CPU, 4 bits, groups of 32/64/128/256 inputs (or one scale a row), N a multiple of 16, bfloat16 activations:
        CPU_INT4 up to CPU_INT4_MAX_TOKENS rows of x; above, DEQUANT
    everything else: DEQUANT

ATen's int4 matmul takes float32 and float16 activations too, but is scalar code there and slower than dequantizing, so
AUTO never takes it; named explicitly it runs. So does W8A8, which AUTO never takes because it rounds activations.
NOTES.md has the measurements behind the limits.
"""

from __future__ import annotations

import logging
from enum import Enum
from functools import cache

import torch

from compress.kernels import cpu_int4
from compress.quant import Granularity, QuantScheme

log = logging.getLogger(__name__)

CPU_INT4_MAX_TOKENS = 64
# by bits; of 4 bits the portable kernel's
TRITON_MAX_TOKENS = {8: 512, 4: 512, 3: 128, 2: 512}
HOPPER_BITS = (8, 4)
# Gluon is an experimental language, whose names change from one Triton to the next.
GLUON_TRITON = "3.6"
NO_LIMIT = 1 << 30


class Backend(Enum):
    """How y = x W^T is computed.

    AUTO: the rules above. REFERENCE: unpack, dequantize in float32, F.linear; the twin of all others.
    DEQUANT: dense rows in x's dtype from the held form, then a dense matmul. CPU_INT4: ATen's packed int4 matmul.
    TRITON: the weight-only kernel, W4A16 or WnA16. W8A8: 8-bit weights, activations rounded to 8 bits a row.
    Any but AUTO is used at every M or raises.
    """

    AUTO = "auto"
    REFERENCE = "reference"
    DEQUANT = "dequant"
    CPU_INT4 = "cpu_int4"
    TRITON = "triton"
    W8A8 = "w8a8"


def hopper_problem(capability: tuple[int, int], triton_version: str) -> str | None:
    """Why the Hopper kernels cannot run with a compute capability and a Triton; None where they can."""
    if capability[0] != 9:
        return f"compute capability {capability[0]}.{capability[1]} is not 9.0"
    if triton_version != GLUON_TRITON:
        return f"Triton {triton_version} is not {GLUON_TRITON}, in whose Gluon they are written"
    return None


@cache
def hopper_kernels(device: torch.device) -> bool:
    """Whether the Hopper kernels run on a device. Once, a warning where nothing but another Triton is missing."""
    if device.type != "cuda":
        return False
    from compress.kernels.dispatch import triton_version

    capability = torch.cuda.get_device_capability(device)
    problem = hopper_problem(capability, triton_version())
    if problem is not None and capability[0] == 9 and not torch.compiler.is_compiling():  # which cannot log
        log.warning(
            "the kernels for Hopper cannot run (%s); the portable ones, which are slower, compute instead: install a "
            "torch that brings Triton %s", problem, GLUON_TRITON,
        )  # fmt: skip
    return problem is None


def hopper_takes(n: int, k: int, group_size: int, bits: int = 4) -> bool:
    """Whether the Hopper kernels take a weight [n, k]: 8 or 4 bits, copies in rows of 16 bytes, scale groups that tile
    128 inputs or are tiled by them, fewer than 2^31 scales. A group_size of k or more is one scale a row. A byte's 64
    inputs are dequantized at once, so of 8 bits no groups of 32."""
    if bits not in HOPPER_BITS:
        return False
    groups_fit = group_size in ((32, 64) if bits == 4 else (64,)) or group_size % 128 == 0 or group_size >= k
    return n % 8 == 0 and k % 8 == 0 and groups_fit and n * -(-k // group_size) < 2**31


def triton_max_tokens(bits: int, hopper: bool = False) -> int:
    """Rows of x up to which AUTO runs the weight-only kernel on a GPU; hopper: one of its own kernels will run."""
    return NO_LIMIT if hopper and bits == 4 else TRITON_MAX_TOKENS[bits]


def backend_problem(
    backend: Backend, device_type: str, dtype: torch.dtype, scheme: QuantScheme, n: int, k: int
) -> str | None:
    """Why `backend` cannot compute x of `dtype` with an [n, k] weight of `scheme` there; None if it can."""
    if backend not in (Backend.CPU_INT4, Backend.TRITON, Backend.W8A8):
        return None
    width = {Backend.CPU_INT4: 4, Backend.W8A8: 8}.get(backend, scheme.bits)
    if scheme.bits != width:
        return f"it takes {width}-bit weights, not {scheme.bits}"
    grouped = scheme.granularity is Granularity.GROUP
    if backend is Backend.CPU_INT4:
        if device_type != "cpu":
            return f"it runs on a CPU, not on {device_type}"
        if n % 16:
            return f"it needs N a multiple of 16, not {n}"
        if int4_group(scheme, k) is None:
            return (
                f"it needs groups of {sorted(cpu_int4.GROUP_SIZES)} inputs, not {scheme.group_size if grouped else k}"
            )
        return None
    if grouped and scheme.group_size % 32:
        return f"it needs a group size that is a multiple of 32, not {scheme.group_size}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 or bfloat16 activations, not {dtype}"
    return None


def choose_backend(
    device_type: str,
    dtype: torch.dtype,
    scheme: QuantScheme,
    shape: tuple[int, int],
    m: int,
    hopper: bool = False,
) -> Backend:
    """What AUTO runs for x [m, K] of `dtype` and a weight of `shape` [N, K]; never AUTO or REFERENCE.

    hopper: of the device, as `hopper_kernels` has it.
    """
    if device_type == "cuda":
        group_size = scheme.group_size if scheme.granularity is Granularity.GROUP else shape[1]
        fused = Backend.TRITON
        limit = triton_max_tokens(scheme.bits, hopper and hopper_takes(*shape, group_size, scheme.bits))
    elif device_type == "cpu" and dtype is torch.bfloat16:
        fused, limit = Backend.CPU_INT4, CPU_INT4_MAX_TOKENS
    else:
        return Backend.DEQUANT
    fits = m <= limit and backend_problem(fused, device_type, dtype, scheme, *shape) is None
    return fused if fits else Backend.DEQUANT


def int4_group(scheme: QuantScheme, k: int) -> int | None:
    """Group size the CPU int4 matmul can use: the scheme's own, or any divisor of K when a row has one scale."""
    sizes = (scheme.group_size,) if scheme.granularity is Granularity.GROUP else cpu_int4.GROUP_SIZES
    return next((g for g in sizes if g in cpu_int4.GROUP_SIZES and k % g == 0), None)
