"""Which kernel, with which tile sizes, computes y = x W^T: a look-up in tables of measurements.

    Key      GPU, Triton version, dtype of x, weight scheme, N, K, bucket of M
    Choice   the name of a kernel and its configuration, a mapping of integers

`nearest` is the pure function from a key and a table to a choice. In this order it takes

    1. the entry of that very key;
    2. the same N and K, measured at the next larger bucket of M, at most MAX_BUCKET_RATIO times larger;
    3. the closest N and K, each within a factor of MAX_SHAPE_RATIO, at the bucket of M or the next larger one, if the
       kernel's multiples divide the asked N and K.

Entries of the kernels in _FILL_THE_MACHINE answer for their own scheme, N, K and bucket alone: how many programs a
shape has, beside how many places there are, decides what is fastest, and those kernels' rules count both
(`w4a16_decode.choose_config`, `batch_rule`, `tile_rule`); a neighbour's entry was up to three times as slow. An entry
is what a shape was found to like better.

At equal distance an entry of the asked scheme comes before one of another group size or with zero points, and then one
of the asked dtype before another's: what is fastest hangs on the shape first.

Nothing else is guessed: another GPU, another Triton version (a kernel may not compile there) or another number of bits
gives None, and the caller's own rule, which needs no table, decides. An H200 reads the H100's table where it has none:
the two have the same chip and different memory.

`choose` is the hot path: microseconds, because answers are kept by their raw arguments. It belongs inside an operator's
implementation, where M is a number; torch.compile traces only the operator's fake.

Tables are shipped in `tables/`, one file a GPU and Triton version; entries found on this machine lie in the user's
cache directory and come first (`table_file`). With COMPRESS_KERNEL_SEARCH=1 a key that no table holds exactly is
searched once, within seconds, and kept (`search`). Nothing is ever searched otherwise.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache, lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from compress.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAX_BUCKET = 4096
MANY_TOKENS = 64  # more than these
MAX_BUCKET_RATIO = 4
MAX_SHAPE_RATIO = 2
SEARCH_VARIABLE = "COMPRESS_KERNEL_SEARCH"
Config = TypeVar("Config", bound="DataclassInstance")
_FILL_THE_MACHINE = ("w4a16_decode", "w4a16_tiled", "w8a16_tiled")
_SAME_CHIP = {"H200": "H100"}


class Key(NamedTuple):
    """What a choice depends on. m is a bucket (`m_bucket`), scheme a label as `scheme_label` makes it."""

    gpu: str
    triton: str
    dtype: str
    scheme: str
    n: int
    k: int
    m: int


class Choice(NamedTuple):
    kernel: str
    config: Mapping[str, int]


class Entry(NamedTuple):
    """A measured choice. The kernel takes any N and K that n_multiple and k_multiple divide."""

    choice: Choice
    us: float
    n_multiple: int = 1
    k_multiple: int = 1


Table = Mapping[Key, Entry]
_searched: set[Product] = set()


def m_bucket(m: int) -> int:
    """The power of two at or above m, above MANY_TOKENS also those half-way, MAX_BUCKET at most: there a tile more
    or less of tokens decides.

    >>> [m_bucket(m) for m in (0, 1, 2, 3, 64, 65, 129, 193, 3000, 5000)]
    [1, 1, 2, 4, 64, 96, 192, 256, 3072, 4096]
    """
    if m <= 1:
        return 1
    power = 1 << (m - 1).bit_length()
    half_way = power * 3 // 4
    return min(half_way if MANY_TOKENS < m <= half_way else power, MAX_BUCKET)


def normalise_gpu(name: str) -> str:
    """A device's name without vendor, form factor and memory: what its clocks and multiprocessors hang on remains.

    >>> [normalise_gpu(f"NVIDIA {name}") for name in ("H100 80GB HBM3", "H200", "H100 PCIe", "A100-SXM4-40GB")]
    ['H100', 'H200', 'H100 PCIe', 'A100']
    """
    bare = re.sub(r"\b(NVIDIA|\d+GB|HBM\d\w*|SXM\d?)\b", " ", name.replace("-", " "))
    return " ".join(bare.split())


def scheme_label(bits: int, group_size: int, symmetric: bool, k: int, int8: bool = False) -> str:
    """`w4g128 sym`; a group as long as a row is `w4 channel sym`, whatever K; with int8 activations, `w8a8 ...`."""
    where = f"g{group_size}" if group_size < k else " channel"
    return f"w{bits}{'a8' if int8 else ''}{where} {'sym' if symmetric else 'asym'}"


def parse_scheme(label: str, k: int) -> tuple[int, int, bool, bool]:
    """(bits, group size, symmetric, int8) of a `scheme_label`."""
    found = re.fullmatch(r"w(\d)(a8)?(?:g(\d+)| channel) (sym|asym)", label)
    if found is None:
        raise ConfigError(f"scheme {label!r} is not of the form 'w4g128 sym', 'w4 channel asym' or 'w8a8 channel sym'")
    return int(found[1]), int(found[3] or k), found[4] == "sym", bool(found[2])


def nearest(key: Key, table: Table) -> tuple[Key, Entry] | None:
    """The entry that answers `key`, by the rules of the module docstring."""
    found = table.get(key)
    if found is not None:
        return key, found
    usable = [(other, entry) for other, entry in table.items() if _serves(entry, other, key)]
    return min(usable, key=lambda item: _distance(item[0], key), default=None)


def _serves(entry: Entry, other: Key, key: Key) -> bool:
    return (
        (other.gpu, other.triton, _width(other.scheme)) == (key.gpu, key.triton, _width(key.scheme))
        and key.m <= other.m <= key.m * MAX_BUCKET_RATIO
        and max(other.n, key.n) <= MAX_SHAPE_RATIO * min(other.n, key.n)
        and max(other.k, key.k) <= MAX_SHAPE_RATIO * min(other.k, key.k)
        and (entry.choice.kernel not in _FILL_THE_MACHINE or other._replace(dtype=key.dtype) == key)
        and key.n % entry.n_multiple == 0
        and key.k % entry.k_multiple == 0
    )


def _width(scheme: str) -> str:
    """Bits of weights, and of activations where they are rounded: "w4" or "w8a8"."""
    found = re.match(r"w\d(a8)?", scheme)
    return found[0] if found else scheme


def _distance(other: Key, key: Key) -> tuple[float, bool, bool, Key]:
    """Octaves of N and K first, then those of M; the key itself last, so that ties do not hang on a table's order."""
    shape = abs(math.log2(other.n / key.n)) + abs(math.log2(other.k / key.k))
    return shape + math.log2(other.m / key.m) / 64, other.scheme != key.scheme, other.dtype != key.dtype, other


def lookup(key: Key) -> Choice | None:
    """`nearest` in the tables of this machine: (kernel's name, its configuration), or None."""
    found = _find(key)
    return None if found is None else found[1].choice


def explain(key: Key) -> str:
    """Where the answer to `key` comes from, for reports."""
    found = _find(key)
    if found is None:
        return "no table: the kernel's own rule"
    other, entry = found
    if other == key:
        return f"measured: {entry.us:.1f} us"
    scheme = "" if other.scheme == key.scheme else f"{other.scheme}, "
    return f"measured at {other.n}x{other.k}, M={other.m}, {scheme}{other.dtype} on {other.gpu}: {entry.us:.1f} us"


def _find(key: Key) -> tuple[Key, Entry] | None:
    from compress.kernels import table_file

    for gpu in (key.gpu, _SAME_CHIP.get(key.gpu)):
        found = None if gpu is None else nearest(key._replace(gpu=gpu), table_file.load(gpu, key.triton))
        if found is not None:
            return found
    return None


@cache
def _gpu(device: torch.device) -> str:
    return normalise_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


@cache
def triton_version() -> str:
    """Major and minor version, or "none"."""
    try:
        import triton
    except ImportError:
        return "none"
    return ".".join(triton.__version__.split(".")[:2])


# what `choose` is asked, M in its bucket
Product = tuple[torch.device, torch.dtype, int, int, bool, int, int, int, bool]


def key_of(product: Product) -> Key:
    """The key that tables keep a product under."""
    device, dtype, bits, group_size, symmetric, n, k, m, int8 = product
    scheme = scheme_label(bits, group_size, symmetric, k, int8)
    return Key(_gpu(device), triton_version(), str(dtype).removeprefix("torch."), scheme, n, k, m)


@lru_cache(maxsize=8192)
def _kept(product: Product) -> Choice | None:
    return lookup(key_of(product))


def choose(
    device: torch.device,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    symmetric: bool,
    n: int,
    k: int,
    m: int,
    int8: bool = False,
) -> Choice | None:
    """What the tables say of x [m, k] of `dtype` on `device` and a weight [n, k], kept; a group_size of k or more is
    one scale a row. None: no table answers, and the caller's own rule decides."""
    product = (device, dtype, bits, group_size, symmetric, n, k, m_bucket(m), int8)
    if search_enabled() and device.type == "cuda" and product not in _searched:
        _search_once(product)
    return _kept(product)


def _search_once(product: Product) -> None:
    """Search what no table holds exactly, but not while a CUDA graph is captured, when nothing can be timed."""
    if torch.cuda.is_current_stream_capturing():
        return
    _searched.add(product)
    key = key_of(product)
    found = _find(key)
    if found is None or found[0] != key:
        from compress.kernels import search

        search.search(key, product[0])


def as_config(choice: Choice | None, kernel: str, config_type: type[Config]) -> Config | None:
    """The choice as `kernel`'s own configuration; None without one, or if it is another kernel's, or a later
    version's."""
    if choice is None or choice.kernel != kernel:
        return None
    return _built(config_type, tuple(choice.config.items()))


@lru_cache(maxsize=1024)
def _built(config_type: type[Config], values: tuple[tuple[str, int], ...]) -> Config | None:
    given = dict(values)
    known = {field.name: field.default for field in fields(config_type)}
    # a field that an entry is older than stands for what was before it
    complete = all(name in given or default is not MISSING for name, default in known.items())
    return config_type(**given) if complete and given.keys() <= known.keys() else None


def search_enabled() -> bool:
    return os.environ.get(SEARCH_VARIABLE) == "1"


def forget() -> None:
    """Drop every kept answer, because a table changed."""
    from compress.kernels import table_file

    _kept.cache_clear()
    table_file.load.cache_clear()
