"""compress: turn a Hugging Face causal LM into a measured, verified, publishable compressed artifact.

Importing this package imports neither torch nor transformers; `load` pulls them in when it is called.
"""

from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout `kernels/`, `eval/` and `recipes/` lie beside this folder and are imported as
# `compress.kernels`, ... In an installed wheel they lie inside it and this adds nothing. They have no
# `__init__.py`: a regular top-level package `kernels` would shadow the Hugging Face package of that name.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "recipes" / "config.yaml").is_file():
    __path__.append(str(_checkout))

if TYPE_CHECKING:
    from compress.loading import load as load


def __getattr__(name: str) -> Any:
    if name == "load":
        from compress.loading import load

        return load
    raise AttributeError(f"module 'compress' has no attribute {name!r}")


__all__ = ["__version__", "load"]
