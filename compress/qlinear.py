"""QuantLinear: a linear layer that computes from packed codes. With `decoder`, the only importer of `compress.kernels`.

One packed form of the weight is held at a time; dense weights exist only while a matmul runs.

    form     codes buffer                      scale, zero buffers                                 where
    PLANAR   uint8 [N, row_bytes]              scale [N', G], zero uint8 [N', G]                   any device, any bits
    INT4     uint8 [N, K/2], ATen's own order  (scale, (8 - zero) * scale) [G, N, 2], activation   CPU, 4 bits, bfloat16
                                               dtype; no zero
    KERNEL   int16 [tiles of K, N, words]      scale [G, N], zero uint8 [G, N] unless symmetric;    CUDA, any bits
                                               at 4 bits scale has a row of units more
    INT8     int8 [N, K padded to 128]         scale [G, N], zero uint8 [G, N] unless symmetric    CUDA, W8A8 by name

A layer is built PLANAR, may move between devices, and takes its final form in `prepare` (the first forward calls it).

Which path computes, AUTO above all, is decided by the pure functions of `compress.kernels.choose`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import ConfigError, EnvironmentProblem
from compress.kernels import cpu_int4, planar, reference
from compress.kernels.choose import (
    CPU_INT4_MAX_TOKENS,
    Backend,
    backend_problem,
    choose_backend,
    hopper_kernels,
    int4_group,
    triton_max_tokens,
)
from compress.quant import Granularity, QuantizedWeight, QuantScheme


class Form(Enum):
    PLANAR = "planar"
    INT4 = "int4"
    KERNEL = "kernel"
    INT8 = "int8"


_FORM_OF = {Backend.CPU_INT4: Form.INT4, Backend.TRITON: Form.KERNEL, Backend.W8A8: Form.INT8}
_DEVICE_OF = {Backend.CPU_INT4: "cpu", Backend.TRITON: "cuda", Backend.W8A8: "cuda"}


def _weight_only(bits: int) -> tuple[Any, Any]:
    """(matmul, dense) of the weight-only kernel for a width."""
    if bits == 4:
        from compress.kernels import dequant, w4a16

        return w4a16.matmul, dequant.dense
    from compress.kernels import wna16

    return wna16.matmul, wna16.dense


def _machine_problem(backend: Backend, device: torch.device) -> str | None:
    """What this machine lacks for a backend that its scheme and shape would fit."""
    if backend is Backend.CPU_INT4:
        if not cpu_int4.has_op():
            return "this torch has no _weight_int4pack_mm_for_cpu"
        return None if cpu_int4.block_rows() else "its packed order on this CPU is unknown"
    if backend in (Backend.TRITON, Backend.W8A8):
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        from compress.kernels import common

        return common.device_problem(device)
    return None


class QuantLinear(nn.Module):
    """y = x W^T + bias from codes: x [..., K] float -> [..., N] in x's dtype. Build it with `from_quantized`.

    Scales keep their stored dtype: `.to(dtype)` and `.half()` move nothing but the device. There is no `weight`; for a
    dense copy call `dense_weight`.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, shape: tuple[int, int], scheme: QuantScheme, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.scheme, self.backend, self.dtype = scheme, backend, dtype
        self.form, self.prepared = Form.PLANAR, False

    @classmethod
    def from_quantized(
        cls,
        q: QuantizedWeight,
        bias: Tensor | None = None,
        backend: Backend = Backend.AUTO,
        dtype: torch.dtype = torch.float32,
    ) -> QuantLinear:
        """Build from codes [N, K] with scale and zero [N', G]; the tensors' device is the layer's first device.

        Args:
            bias: [N] or None.
            dtype: of the activations to come. It decides the form on a CPU; elsewhere any float dtype may follow.

        Raises:
            ConfigError: shapes that contradict each other, or a named backend that the scheme or shape does not fit.
        """
        n, k = q.shape
        rows = 1 if q.scheme.granularity is Granularity.TENSOR else n
        expected = (rows, q.scheme.n_groups(k))
        if tuple(q.scale.shape) != expected or tuple(q.zero.shape) != expected:
            raise ConfigError(
                f"scale {tuple(q.scale.shape)} and zero {tuple(q.zero.shape)} must both be {expected} for codes "
                f"{(n, k)} of {q.scheme.label()}"
            )
        if bias is not None and tuple(bias.shape) != (n,):
            raise ConfigError(f"bias {tuple(bias.shape)} must be ({n},)")
        native = {Backend.CPU_INT4: "cpu", Backend.TRITON: "cuda", Backend.W8A8: "cuda"}.get(
            backend, q.codes.device.type
        )
        problem = backend_problem(backend, native, dtype, q.scheme, n, k)
        if problem:
            raise ConfigError(f"backend={backend.value} cannot run a {n}x{k} {q.scheme.label()} weight: {problem}")
        layer = cls((n, k), q.scheme, backend, dtype)
        layer.register_buffer("codes", planar.pack(q.codes, q.scheme.bits))
        layer.register_buffer("scale", q.scale.clone())
        layer.register_buffer("zero", q.zero.clone())
        parameter = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        layer.register_parameter("bias", parameter)
        return layer

    def prepare(self) -> None:
        """Take the form of the device the layer is on. Idempotent; the first forward calls it.

        Raises:
            EnvironmentProblem: the named backend cannot run on this machine or device.
        """
        if self.prepared:
            return
        form = self._choose_form()
        if form is Form.INT4:
            self._take_int4_form()
        elif form is not Form.PLANAR:
            self._take_gpu_form(form)
        self.form, self.prepared = form, True

    def _take_int4_form(self) -> None:
        group_size = int4_group(self.scheme, self.in_features)
        assert group_size is not None and self.zero is not None  # `_choose_form` checked; PLANAR holds zeros
        repeat = self.in_features // group_size // self.scale.shape[1]
        scale, zero = (
            t.expand(self.out_features, -1).repeat_interleave(repeat, dim=1) for t in (self.scale, self.zero)
        )
        codes = planar.unpack(self.codes, self.scheme.bits, self.in_features)
        packed = cpu_int4.pack(codes, scale, zero, self.dtype)
        self.codes, self.scale, self.zero = packed.packed, packed.scale_offset, None

    def _take_gpu_form(self, form: Form) -> None:
        codes = planar.unpack(self.codes, self.scheme.bits, self.in_features)
        zero = None if self.scheme.symmetric else self.zero
        if form is Form.INT8:
            from compress.kernels import w8a8

            int8 = w8a8.pack(codes, self.scale, zero)
            self.codes, self.scale, self.zero = int8.codes, int8.scale, int8.zero
        elif self.scheme.bits == 4:
            from compress.kernels import w4a16

            w4 = w4a16.pack_kernel_layout(codes, self.scale, zero)
            self.codes, self.scale, self.zero = w4.words, w4.scale, w4.zero
        else:
            from compress.kernels import wna16_layout

            wn = wna16_layout.pack(codes, self.scale, zero, self.scheme.bits)
            self.codes, self.scale, self.zero = wn.words, wn.scale, wn.zero

    def _choose_form(self) -> Form:
        device, n, k = self.codes.device, self.out_features, self.in_features
        if self.backend is not Backend.AUTO:
            problem = backend_problem(self.backend, device.type, self.dtype, self.scheme, n, k)
            problem = problem or _machine_problem(self.backend, device)
            if problem:
                raise EnvironmentProblem(
                    f"backend={self.backend.value} cannot run on {device}: {problem}; use backend=auto"
                )
            return _FORM_OF.get(self.backend, Form.PLANAR)
        # on a GPU the kernel layout also serves float32 activations, through the dequantization kernel
        dtype = torch.float16 if device.type == "cuda" else self.dtype
        fused = choose_backend(device.type, dtype, self.scheme, (n, k), 1)
        return Form.PLANAR if _machine_problem(fused, device) else _FORM_OF.get(fused, Form.PLANAR)

    def backend_for(self, m: int, dtype: torch.dtype | None = None) -> Backend:
        """The path that computes x of m rows here; `prepare` must have run on the final device, or runs now."""
        self.prepare()
        if self.backend is not Backend.AUTO:
            return self.backend
        if self.form is Form.PLANAR:
            return Backend.DEQUANT
        shape = (self.out_features, self.in_features)
        device = self.codes.device
        return choose_backend(device.type, dtype or self.dtype, self.scheme, shape, m, hopper_kernels(device))

    def describe(self) -> str:
        """One line for reports: scheme, shape, bytes held, path at few and at many rows."""
        few, many = self.backend_for(1), self.backend_for(1 << 20)
        limit = triton_max_tokens(self.scheme.bits) if few is Backend.TRITON else CPU_INT4_MAX_TOKENS
        path = few.value if few is many else f"{few.value} up to {limit} rows, {many.value} above"
        shape = f"{self.out_features}x{self.in_features}"
        return f"{self.scheme.label()} {shape}, {self.weight_bytes} bytes, {self.codes.device.type}: {path}"

    @property
    def weight_bytes(self) -> int:
        """Bytes held for the weight in its present form: codes, scales and zeros, without the bias."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.zero) if t is not None)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float -> [..., N] in x's dtype.

        Raises:
            ConfigError: x's last dimension or dtype does not fit the layer.
            EnvironmentProblem: see `prepare`.
        """
        if x.shape[-1] != self.in_features:
            raise ConfigError(f"x is {tuple(x.shape)}, but the layer has K={self.in_features}")
        rows = x.reshape(-1, self.in_features).contiguous()
        y = self._matmul(rows, self.backend_for(rows.shape[0], x.dtype))
        return y.view(*x.shape[:-1], self.out_features)

    def _matmul(self, x: Tensor, backend: Backend) -> Tensor:
        """x [M, K] -> [M, N], bias included."""
        if self.form is Form.INT4 and x.dtype is not self.dtype:
            raise ConfigError(
                f"x is {x.dtype}, but this layer was built for {self.dtype} (its scales are rounded to it)"
            )
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if backend is Backend.TRITON:
            matmul, _ = _weight_only(self.scheme.bits)
            return matmul(x, self._kernel_weight(), bias)
        if backend is Backend.W8A8:
            from compress.kernels import w8a8

            return w8a8.matmul(x, self._int8_weight(), bias)
        if backend is Backend.CPU_INT4:
            y = cpu_int4.int4_matmul(x, self._int4_weight())
            return y if bias is None else y.add_(bias)
        if self.form is Form.KERNEL or backend is Backend.REFERENCE:
            return F.linear(x, self.dense_weight(x.dtype), bias)
        return planar.linear_by_blocks(x, self.out_features, self._dense_blocks(x.dtype), bias)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A new dense [N, K], computed in float32 from the held form and rounded once to `dtype`."""
        if self.backend is Backend.REFERENCE:
            assert self.zero is not None
            codes = planar.unpack(self.codes, self.scheme.bits, self.in_features)
            return reference.dequantize_weight(codes, self.scale, self.zero).to(dtype)
        if self.form is Form.KERNEL:
            _, dense = _weight_only(self.scheme.bits)
            return dense(self._kernel_weight(), dtype)
        if self.form is Form.INT8:
            from compress.kernels import w8a8

            return w8a8.dense(self._int8_weight(), dtype)
        return torch.cat([w for _, w in self._dense_blocks(dtype)])

    def _dense_blocks(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        if self.form is Form.INT4:
            return cpu_int4.dense_blocks(self._int4_weight(), dtype)
        assert self.zero is not None
        return planar.dense_blocks(self.codes, self.scale, self.zero, self.scheme.bits, self.in_features, dtype)

    def kernel_weight(self) -> Any:
        """The `w4a16.KernelWeight` that this layer holds, sharing its buffers; None in another form."""
        self.prepare()
        return self._kernel_weight() if self.form is Form.KERNEL else None

    def _kernel_weight(self) -> Any:
        n, k = self.out_features, self.in_features
        if self.scheme.bits == 4:
            from compress.kernels import w4a16

            groups = self.scale.shape[0] - 1  # the last row holds units
            group_size = k // groups if groups > 1 else self.codes.shape[0] * w4a16.TILE_K.value
            return w4a16.KernelWeight(self.codes, self.scale, self.zero, n, k, group_size)
        from compress.kernels import wna16_layout

        group_size = wna16_layout.group_size_of(self.codes, self.scale, self.scheme.bits, k)
        return wna16_layout.PackedWeight(self.codes, self.scale, self.zero, self.scheme.bits, n, k, group_size)

    def _int8_weight(self) -> Any:
        from compress.kernels import w8a8

        groups, k = self.scale.shape[0], self.in_features
        group_size = k // groups if groups > 1 else self.codes.shape[1]
        return w8a8.Int8Weight(self.codes, self.scale, self.zero, self.out_features, k, group_size)

    def _int4_weight(self) -> cpu_int4.CpuInt4Weight:
        group_size = self.in_features // self.scale.shape[0]
        return cpu_int4.CpuInt4Weight(self.codes, self.scale, self.out_features, self.in_features, group_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Devices move, dtypes stay: rounding stored scales to another dtype would change the weight in silence."""

        def device_only(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype is t.dtype else t.to(moved.device)

        target = fn(torch.empty(0, device=self.codes.device)).device
        if self.prepared and target.type != self.codes.device.type:
            raise ConfigError(
                f"this layer already holds its {self.codes.device.type} form ({self.form.value}) and cannot move to "
                f"{target}; move the model before its first forward, or load the artifact again"
            )
        return super()._apply(device_only, recurse)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.scheme.label()}, backend={self.backend.value}"
