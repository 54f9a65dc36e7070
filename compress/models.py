"""A causal LM whose weights stay on disk: decoder blocks and linears found from the model itself.

The model is built on `meta` (parameters without storage; buffers such as rotary tables are real), weights are
mapped from safetensors, and `materialize` gives one module its values on the compute device. Nothing here
knows an architecture by name.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.errors import ConfigError, EnvironmentProblem, UnsupportedModel
from compress.naming import match_names
from compress.source import SourceCheckpoint, resolve

if TYPE_CHECKING:
    from compress.rotated import Rotation


@dataclass
class Block:
    """One decoder block: its place, its module, and the linears in it by name relative to the block."""

    name: str
    module: nn.Module
    linears: dict[str, nn.Module]


@dataclass
class LoadedModel:
    """A model on `meta` beside its source checkpoint."""

    model: nn.Module
    source: SourceCheckpoint
    blocks: list[Block]
    source_names: dict[str, str]  # parameter or buffer name -> tensor name in the checkpoint
    tied: dict[str, str]  # parameter name -> the parameter that holds its storage
    unused: dict[str, str]  # source tensor -> why the architecture does not read it
    dtype: torch.dtype
    block_returns_tuple: bool | None = None  # learnt from the first block that runs
    rotation: Rotation | None = None  # folded into the weights on their way from the source
    untied: dict[str, str] = field(default_factory=dict)  # ties of the source that were broken

    def tensor(self, name: str) -> Tensor:
        """Value of a parameter, on the CPU: its source tensor, or what a rotation makes of it (float32 for linears
        that will be quantized, otherwise the checkpoint's dtype)."""
        holder = self.tied.get(name, name)
        if self.rotation is not None and holder in self.rotation.changes:
            transposed = is_transposed(self.model.get_submodule(holder.rpartition(".")[0]))
            return self.rotation.tensor(holder, self.original, transposed)
        return self.original(name)

    def original(self, name: str) -> Tensor:
        """Source tensor of a parameter, on the CPU, in the checkpoint's dtype."""
        return self.source.tensor(self.source_names[(self.tied | self.untied).get(name, name)])

    def materialize(self, prefix: str, device: torch.device, dtype: torch.dtype) -> None:
        """Give every parameter below `prefix` (a module's name) its value on `device`."""
        for name, parameter in list(_submodule(self.model, prefix).named_parameters()):
            full = f"{prefix}.{name}" if prefix else name
            if parameter.device.type == "meta":
                set_parameter(self.model, full, self.tensor(full).to(device, dtype, copy=True))
        _move_buffers(_submodule(self.model, prefix), device)

    def release(self, prefix: str) -> None:
        """Return the parameters below `prefix` to meta."""
        for name, parameter in list(_submodule(self.model, prefix).named_parameters()):
            set_parameter(
                self.model, f"{prefix}.{name}" if prefix else name, torch.empty_like(parameter, device="meta")
            )

    def outside_blocks(self) -> list[str]:
        """Names of the parameters that belong to no decoder block."""
        inside = tuple(block.name + "." for block in self.blocks)
        names = (n for n, _ in self.model.named_parameters(remove_duplicate=False))
        return [n for n in names if not n.startswith(inside)]


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1` as a device that is really there.

    Raises:
        EnvironmentProblem: CUDA was asked for and is not usable.
        ConfigError: no such device name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name} is not a device; use auto, cpu, cuda or cuda:<index>") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise EnvironmentProblem(f"device={name} was asked for, but torch sees no CUDA device; use device=cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise EnvironmentProblem(f"device={name}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    elif device.type != "cpu":
        raise ConfigError(f"device={name} is not supported; use cpu or cuda")
    return device


def load_model(
    model: str, revision: str | None = None, trust_remote_code: bool = False, blocks_pattern: str | None = None
) -> LoadedModel:
    """Build the model on meta and account for every tensor of its checkpoint.

    Raises:
        ModelFileError: files missing or damaged, or shapes that do not fit the config.
        UnsupportedModel: no decoder blocks, weights this pipeline cannot quantize, tensors it cannot place.
    """
    path = resolve(model, revision)
    source = SourceCheckpoint.open(path)
    if "quantization_config" in source.config:
        method = source.config["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModel(f"{model} is already quantized ({method}); start from the original weights")
    return build_model(source, trust_remote_code, blocks_pattern)


def build_model(
    source: SourceCheckpoint, trust_remote_code: bool = False, blocks_pattern: str | None = None
) -> LoadedModel:
    """`load_model` after the files are found."""
    network, dtype = empty_network(source.path, trust_remote_code)
    blocks = find_blocks(network, blocks_pattern)
    # before names are matched: checkpoints store experts one by one, which would look like missing tensors
    _reject_unquantizable(blocks)
    names, tied, unused = match_names(network, source)
    return LoadedModel(network, source, blocks, names, tied, unused, dtype)


def empty_network(path: Path, trust_remote_code: bool = False) -> tuple[nn.Module, torch.dtype]:
    """The architecture of config.json with parameters on meta and real buffers, and the checkpoint's dtype."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        config.use_cache = True
        quantization = getattr(config, "quantization_config", None)
        if quantization is not None:  # our own reader unpacks; transformers must not build its quantizer
            del config.quantization_config
        with init_empty_weights(include_buffers=False):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModel(
            f"transformers cannot build a causal LM from {path / 'config.json'}: {reason}"
        ) from error
    dtype = getattr(config, "dtype", None) or torch.float32
    return network.eval(), dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))


def find_blocks(network: nn.Module, pattern: str | None = None) -> list[Block]:
    """Decoder blocks: the ModuleList with the most parameters in linears, each child holding at least one.

    Raises:
        UnsupportedModel: there is none.
        ConfigError: `pattern` names no such list.
    """
    lists = {n: m for n, m in network.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if pattern:
        lists = {n: m for n, m in lists.items() if fnmatch.fnmatchcase(n, pattern)}
        if not lists:
            raise ConfigError(f"quant.blocks={pattern} matches no ModuleList of {type(network).__name__}")
    best: list[Block] = []
    best_size = 0
    for name, modules in lists.items():
        blocks = [Block(f"{name}.{i}", child, find_linears(child)) for i, child in enumerate(modules)]
        # a list inside a block (experts, say) is smaller than the list of the blocks themselves
        size = sum(p.numel() for p in modules.parameters())
        if all(b.linears for b in blocks) and size > best_size:
            best, best_size = blocks, size
    if not best:
        raise UnsupportedModel(
            f"{type(network).__name__} has no list of decoder blocks with linears; quant.blocks can name one"
        )
    return best


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """GPT-2's Conv1D: a linear whose weight is stored [K, N]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def find_linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in module.named_modules() if is_linear(m)}


def linear_weight(module: nn.Module) -> Tensor:
    """Weight as [N, K], whatever way it is stored; a view."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if is_transposed(module) else weight


def set_linear_weight(module: nn.Module, weight: Tensor) -> None:
    """Put [N, K] values into the module's own layout, dtype and device."""
    with torch.no_grad():
        linear_weight(module).copy_(weight)


def _reject_unquantizable(blocks: list[Block]) -> None:
    for block in blocks:
        convolutions = {n for n, m in block.module.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)}
        for name, parameter in block.module.named_parameters():
            # the kernel of a convolution is small and stays as it is, like a norm
            if parameter.ndim == 3 and name.rpartition(".")[0] not in convolutions:
                raise UnsupportedModel(
                    f"{block.name}.{name} is a 3-D weight of shape {list(parameter.shape)} (fused experts, as a rule); "
                    "leaving it at full precision without a word would be wrong, and quantizing it is not supported yet"
                )


def set_parameter(network: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(_submodule(network, parent), leaf, nn.Parameter(value, requires_grad=False))


def _submodule(network: nn.Module, name: str) -> nn.Module:
    return network.get_submodule(name) if name else network


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for sub in module.modules():
        for key, buffer in sub._buffers.items():
            if buffer is not None:
                sub._buffers[key] = buffer.to(device)


def load_dense(loaded: LoadedModel, device: torch.device, dtype: torch.dtype) -> Any:
    """The whole unquantized model on `device`, ready to run. Consumes `loaded` (its parameters become real)."""
    for name in list(dict(loaded.model.named_parameters())):
        if name not in loaded.tied:
            set_parameter(loaded.model, name, loaded.tensor(name).to(device, dtype, copy=True))
    for name, _ in list(loaded.model.named_buffers()):
        if name in loaded.source_names:
            loaded.model.get_buffer(name).copy_(loaded.tensor(name))
    retie(loaded.model, loaded.tied)
    _move_buffers(loaded.model, device)
    return loaded.model


def head_name(loaded: LoadedModel) -> str:
    """Full name of the output head.

    Raises:
        UnsupportedModel: the model has none, or one that is no linear.
    """
    head = loaded.model.get_output_embeddings()  # type: ignore[operator]
    name = next((n for n, m in loaded.model.named_modules() if m is head), None)
    if name is None or not isinstance(head, nn.Linear):
        raise UnsupportedModel(f"{type(loaded.model).__name__} has no linear output head; leave quant.lm_head out")
    return name


def untie(loaded: LoadedModel) -> dict[str, str]:
    """Give the head a parameter of its own where it shares the embedding's; the broken ties, which `loaded.untied`
    remembers."""
    network = loaded.model
    ends = [network.get_input_embeddings(), network.get_output_embeddings()]  # type: ignore[operator]
    pair = {f"{name}.weight" for name, module in network.named_modules() if any(module is end for end in ends)}
    broken = {name: holder for name, holder in loaded.tied.items() if {name, holder} <= pair}
    for name, holder in broken.items():
        loaded.untied[name] = loaded.tied.pop(name)
        set_parameter(network, name, torch.empty_like(network.get_parameter(holder), device="meta"))
    return broken


def retie(network: nn.Module, tied: dict[str, str]) -> None:
    """Make tied parameters share storage again after their holder was replaced."""
    for name, holder in tied.items():
        parent, _, leaf = name.rpartition(".")
        setattr(_submodule(network, parent), leaf, network.get_parameter(holder))


def iter_meta(network: nn.Module) -> Iterator[str]:
    """Names of parameters still without storage: none may be left in a model that runs."""
    return (name for name, p in network.named_parameters() if p.device.type == "meta")
