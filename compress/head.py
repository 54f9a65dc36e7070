"""The output head, quantized: by far the widest linear of a model, and after the last block.

It is rounded to nearest, which at its usual 8 bits no method improves on by more than evaluation can tell.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compress.methods.rtn import rtn_quantize
from compress.quant import Granularity, Observer, QuantizedWeight, QuantScheme

# Elements in float32 on the device at a time
_CHUNK_ELEMENTS = 2**26


def quantize_head(
    weight: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, device: torch.device
) -> tuple[QuantizedWeight, float, float]:
    """Round weight [V, H] on `device`, some rows at a time where rows have ranges of their own.

    Returns:
        The quantized weight on the CPU, and ||Wq - W||^2 / ||W||^2 of it and of plain rounding with absmax ranges.
    """
    step = len(weight) if scheme.granularity is Granularity.TENSOR else max(1, _CHUNK_ELEMENTS // weight.shape[1])
    error = error_plain = norm = 0.0
    parts: list[QuantizedWeight] = []
    for rows in weight.split(step):
        source = rows.to(device).float()
        part = rtn_quantize(source, scheme, scale_dtype=scale_dtype)
        plain = part
        if scheme.observer is not Observer.ABSMAX:
            plain = rtn_quantize(source, replace(scheme, observer=Observer.ABSMAX), scale_dtype=scale_dtype)
        error += float((part.dequantize() - source).square().sum())
        error_plain += float((plain.dequantize() - source).square().sum())
        norm += float(source.square().sum())
        parts.append(part.to("cpu"))
    codes, scale, zero = (torch.cat([getattr(p, name) for p in parts]) for name in ("codes", "scale", "zero"))
    norm = max(norm, 1e-30)
    return QuantizedWeight(codes, scale, zero, scheme), error / norm, error_plain / norm
