"""Weights of the transformer in the format in which DeepSeek-V3 is published: safetensors, an entry for each expert.

Each rank reads the entries of its own layers and experts, and writes layers that no lower rank holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..comm.from_all import Value, from_all
from ..errors import CheckpointError, ConfigError, MissingExtraError
from ..schedule.aside import write_whole
from .block import DenseBlock, MoEBlock
from .config import MoEConfig
from .experts import Experts
from .safetensors_folder import INDEX, files_of
from .transformer import EMBEDDING, FinalNorm, Head, TokenEmbedding

if TYPE_CHECKING:
    from transformers import DeepseekV3Config

_ATTENTION = {
    "query": "q_proj",
    "query.0": "q_a_proj",
    "query.1": "q_a_layernorm",
    "query.2": "q_b_proj",
    "compress": "kv_a_proj_with_mqa",
    "norm": "kv_a_layernorm",
    "expand": "kv_b_proj",
    "out": "o_proj",
}
_BLOCK = {
    "norm1": ("input_layernorm",),
    "norm2": ("post_attention_layernorm",),
    **{f"attention.{own}": (f"self_attn.{theirs}",) for own, theirs in _ATTENTION.items()},
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
    "shared.up": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "shared.down": ("mlp.shared_experts.down_proj",),
    "router": ("mlp.gate",),
    "embedding_norm": ("enorm",),
    "hidden_norm": ("hnorm",),
    "project": ("eh_proj",),
    "out_norm": ("shared_head.norm",),
}
_ENDS = {"table": "model.embed_tokens.weight", "norm": "model.norm.weight", "out": "lm_head.weight"}
_EXPERT = {"up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


class Entry(NamedTuple):
    """One tensor of a layer, or one expert of it, and what it is made of.

    Args:
        own: name in the layer.
        expert: its number among all; None: the tensor is no expert's.
        names: entries of the files, which follow one another along the first dimension; those of experts are
            transposed.
    """

    own: str
    expert: int | None
    names: tuple[str, ...]


def numbered(module: nn.Module, config: MoEConfig) -> dict[int, nn.Module]:
    """The layers with weights of their own that a module holds, by their number in `layers(config)`.

    Args:
        module: a PipelineModule of these layers, or an `nn.Sequential` of all.
        config: they were made from it.

    Raises:
        ConfigError: the module is not one of these.
    """
    found: dict[int, nn.Module] = {
        int(n): part for n, part in module._modules.items() if n.isdigit() and part is not None
    }
    ties = getattr(module, "tied_modules", None)
    if ties is not None and EMBEDDING in ties:
        found[0] = ties[EMBEDDING]
    if config.mtp_depth:
        found.pop(config.blocks + 2, None)  # the embedding once more
    kinds = (TokenEmbedding, DenseBlock, MoEBlock, FinalNorm, Head)
    if not found or not all(isinstance(part, kinds) for part in found.values()):
        raise ConfigError("weights can be read and written of a module of the layers of dualpipe_engine.models only")
    return dict(sorted(found.items()))


def entries(names: Iterable[str], number: int, config: MoEConfig, experts: range) -> Iterator[Entry]:
    """What the tensors of a layer are made of.

    Args:
        names: of the tensors.
        number: of the layer in `layers(config)`.
        config: of the model.
        experts: those that are wanted, of all.

    Raises:
        KeyError: the layer is none of these.
    """
    later = number - config.blocks - 3  # behind the blocks stand the final norm and the embedding's second use
    if not (1 <= number <= config.blocks or 0 <= later < config.mtp_depth):
        for own in names:
            yield Entry(own, None, (_ENDS[own.split(".")[-2]],))
        return
    prefix = f"model.layers.{number - 3 if later >= 0 else number - 1}."
    for own in names:
        stem, kind = own.rsplit(".", 1)
        if stem == "experts":
            for expert in experts:
                parts = tuple(f"{prefix}mlp.experts.{expert}.{part}.weight" for part in _EXPERT[kind])
                yield Entry(own, expert, parts)
        elif kind == "bias":
            yield Entry(own, None, (f"{prefix}mlp.gate.e_score_correction_bias",))
        else:
            yield Entry(own, None, tuple(f"{prefix}{part}.weight" for part in _BLOCK[stem]))


def _entries_of(layer: nn.Module, number: int, config: MoEConfig) -> Iterator[Entry]:
    """Of a layer with the experts of this rank."""
    experts = range(0)
    if isinstance(layer, MoEBlock):
        first = layer.experts.rank * layer.experts.num_local
        experts = range(first, first + layer.experts.num_local)
    return entries(layer.state_dict(), number, config, experts)


@torch.no_grad()
def load(module: nn.Module, config: MoEConfig, folder: str | Path) -> None:
    """Fill a model from published weights, or from what `save` wrote.

    Args:
        module: a PipelineModule before `dualpipe_engine.initialize`, or an `nn.Sequential` of all layers.
        config: it was made from it.
        folder: of safetensors files.

    Raises:
        ConfigError: the engine has its copies of the weights already; an entry is missing, of another shape, or
            quantized.
        MissingExtraError: safetensors is not installed.
    """
    if hasattr(module, "dualpipe_placement"):
        raise ConfigError("load weights before dualpipe_engine.initialize: the optimizer has its own copies after it")
    opening = _safetensors().safe_open
    files = files_of(Path(folder))
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}

        def read(name: str) -> Tensor:
            if name not in files:
                raise ConfigError(
                    f"{folder} has no entry {name}: take a folder in the published format, which save_pretrained "
                    "writes, and a configuration that fits it"
                )
            if f"{name}_scale_inv" in files:
                raise ConfigError(f"{name} in {folder} is quantized: convert the folder to bf16 first")
            path = files[name]
            if path not in opened:
                opened[path] = stack.enter_context(opening(path, framework="pt"))
            found: Tensor = opened[path].get_tensor(name)
            return found

        for number, layer in numbered(module, config).items():
            _fill(layer, _entries_of(layer, number, config), read)


def _fill(layer: nn.Module, wanted: Iterator[Entry], read: Callable[[str], Tensor]) -> None:
    held = layer.state_dict(keep_vars=True)
    for entry in wanted:
        target: Tensor = held[entry.own]
        found = torch.cat([read(name) for name in entry.names])
        if entry.expert is not None:
            assert isinstance(layer.experts, Experts)
            target, found = target[entry.expert - layer.experts.rank * layer.experts.num_local], found.t()
        if target.shape != found.shape:
            raise ConfigError(
                f"{' and '.join(entry.names)} make {list(found.shape)}, and {entry.own} is {list(target.shape)}: the "
                "configuration is not that of these weights"
            )
        target.copy_(found)


@torch.no_grad()
def save(module: nn.Module, config: MoEConfig, folder: str | Path, hf_config: DeepseekV3Config | None = None) -> None:
    """Write a model in the published format, a file a layer. Collective over all ranks; the folder is shared by them.

    Args:
        module: `engine.module`, or as for `load`.
        config: it was made from it.
        folder: made if missing; `from_pretrained` of transformers loads it.
        hf_config: written as config.json, if given.

    Raises:
        CheckpointError: a file cannot be written, as on a full disk; on all ranks.
        MissingExtraError: safetensors is not installed.
    """
    safetensors = _safetensors()
    folder, mine = Path(folder), numbered(module, config)
    rank = dist.get_rank() if dist.is_initialized() else 0
    owner: dict[int, int] = {}
    for holder, theirs in enumerate(_of_all(list(mine))):
        for number in theirs:
            owner.setdefault(number, holder)
    order = sorted(owner)
    written: dict[str, str] = {}
    size, failure = 0, ""
    for number, layer in mine.items():
        with ExitStack() as stack:
            if isinstance(layer, MoEBlock):
                stack.enter_context(layer.experts.whole(owner[number] == rank))
            if owner[number] != rank or failure:
                continue
            tensors = published(layer.state_dict(), number, config)
            name = f"model-{order.index(number) + 1:05d}-of-{len(order):05d}.safetensors"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                safetensors.torch.save_file(tensors, folder / name, metadata={"format": "pt"})
            except (OSError, safetensors.SafetensorError) as error:
                failure = f"{folder / name} cannot be written ({error})"
            written |= dict.fromkeys(tensors, name)
            size += sum(tensor.nbytes for tensor in tensors.values())
    found = _of_all((written, size, failure))
    failure = next((said for _, _, said in found if said), "")
    if rank == 0 and not failure:
        weight_map = {name: file for part, _, _ in found for name, file in part.items()}
        index = {"metadata": {"total_size": sum(part for _, part, _ in found)}, "weight_map": weight_map}
        try:
            if hf_config is not None:
                hf_config.save_pretrained(folder)
            write_whole(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
        except OSError as error:
            failure = f"{folder / INDEX} cannot be written ({error})"
    if failure := _of_all(failure)[0]:
        raise CheckpointError(f"{failure}: the model is not saved, make room or name another folder", everywhere=True)


def _of_all(value: Value) -> list[Value]:
    return from_all(value) if dist.is_initialized() else [value]


def published(held: Mapping[str, Tensor], number: int, config: MoEConfig) -> dict[str, Tensor]:
    """The entries of a layer.

    Args:
        held: its tensors, experts whole.
        number: of the layer in `layers(config)`.
        config: of the model.

    Raises:
        KeyError: the layer is none of these.
    """
    found = dict[str, Tensor]()
    for own, expert, names in entries(held, number, config, range(config.experts)):
        tensor: Tensor = held[own] if expert is None else held[own][expert].t()
        # Tensors that share memory are refused, and so is memory with gaps.
        found |= {
            name: part.cpu().clone().contiguous() for name, part in zip(names, tensor.chunk(len(names)), strict=True)
        }
    for depth in range(config.mtp_depth):  # where each depth has names of its own for what it shares
        prefix = f"model.layers.{config.blocks + depth}."
        for shared, copy in (("model.embed_tokens", "embed_tokens"), ("lm_head", "shared_head.head")):
            if f"{shared}.weight" in found:
                found[f"{prefix}{copy}.weight"] = found[f"{shared}.weight"].clone()
    return found


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingExtraError("weights in files of safetensors need it: pip install 'dualpipe_engine[hf]'") from error
    return safetensors
