"""Round to nearest: the baseline every other method must beat.

With `Observer.MSE` and input statistics the range of each group minimises the error weighted by the mean
squared activation of each input, a diagonal approximation of the layer's output error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quant import QuantizedWeight, QuantScheme, choose_qparams, quantize


def rtn_quantize(
    weight: Tensor, scheme: QuantScheme, importance: Tensor | None = None, scale_dtype: torch.dtype = torch.float32
) -> QuantizedWeight:
    """Quantize weight [N, K]; importance [K] is used by the MSE observer only.

    Raises:
        NumericalError: the weight is not finite.
        ConfigError: the group size does not divide K.
    """
    scale, zero = choose_qparams(weight, scheme, importance, scale_dtype)
    return quantize(weight, scale, zero, scheme)
