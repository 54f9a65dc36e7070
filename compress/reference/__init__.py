"""The embedded reference model and its texts: what a run uses when it is given neither a model nor data.

    model/   a Llama of 8.4 M parameters with its tokenizer (see model/README.md)
    texts/   token ids sampled from that model: 128 calibration and 64 held-out sequences of 512

Why the texts are the model's own. For x drawn from the original model p and any quantized model q,

    E[log p(x_t | x_<t) - log q(x_t | x_<t)]  =  E[KL(p(. | x_<t) || q(. | x_<t))],

so on these texts the rise in NLL is an unbiased estimate of the KL divergence, two measurements of one number.
On other people's text a quantized model can lower the NLL by accident; here it cannot in expectation.

Position 0 of every sequence is <|endoftext|> (id 0), given and not sampled: its NLL is not counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import EnvironmentProblem

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["calibration_tokens", "heldout_tokens", "model_path", "texts_path"]

_HERE = Path(__file__).resolve().parent


def model_path() -> Path:
    """Directory of the reference model, ready for `from_pretrained`.

    Raises:
        EnvironmentProblem: the installation lacks the weights.
    """
    return _require(_HERE / "model" / "model.safetensors").parent


def texts_path(name: str) -> Path:
    """File of the sampled texts `calibration` or `heldout`.

    Raises:
        EnvironmentProblem: the installation lacks it.
    """
    return _require(_HERE / "texts" / f"{name}.safetensors")


def calibration_tokens() -> Tensor:
    """int64 [128, 512] on the CPU: the texts to calibrate on."""
    return _read_tokens("calibration")


def heldout_tokens() -> Tensor:
    """int64 [64, 512] on the CPU: the texts to measure on, disjoint from the calibration texts."""
    return _read_tokens("heldout")


def _read_tokens(name: str) -> Tensor:
    from safetensors.torch import load_file

    return load_file(texts_path(name))["tokens"].long()


def _require(path: Path) -> Path:
    if not path.is_file():
        raise EnvironmentProblem(
            f"{path} is missing: the embedded model and its texts are part of the package; reinstall it"
            " (from a checkout, make sure that package data is included)"
        )
    return path
