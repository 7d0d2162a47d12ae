"""Models on the meta device: built from a configuration, and each stage's weights made or read on its own."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, MissingExtraError
from ..models.safetensors_folder import files_of
from .conversion import Read, sources_of
from .losses import ModelConfig, PretrainedModel


def empty_model(config: ModelConfig, folder: str | None) -> nn.Module:
    """The model of a transformers configuration on the meta device.

    Raises:
        MissingExtraError: transformers is not installed.
        ConfigError: neither a configuration nor a folder is given, the model's class is not known, or the folder's
            weights are quantized.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "building from a configuration needs transformers: pip install 'dualpipe_engine[hf]'"
        ) from error
    if config is None:
        if folder is None:
            raise ConfigError("get_model_adapter needs a model, a config or a folder")
        config = transformers.AutoConfig.from_pretrained(folder)
    if folder is not None and getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"the weights in {folder} are quantized, and stages read plain ones: load the model with "
            "from_pretrained(dtype=...) and its own dequantization, and save that"
        )
    names = config.architectures or []
    kind: Any = getattr(transformers, names[0], None) if names else transformers.AutoModelForCausalLM
    if kind is None:
        raise ConfigError(f"transformers has no class {names[0]}, which the configuration names in architectures")
    if not names and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"{type(config).__name__} does not say which model it is of, and there is no causal language model of it: "
            'set config.architectures = ["NameOfTheModel"]'
        )
    dtype = getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        if names:
            return kind._from_config(config, dtype=dtype)
        return kind.from_config(config, dtype=dtype)


class Weights:
    """Fills stages of a model on the meta device.

    Args:
        model: the model, on the meta device.
        folder: of safetensors files; None makes fresh weights, as the model's own initialization does. Those of a
            module depend on `torch.initial_seed()` and the module's name alone, so every cut starts with the same
            model.
    """

    def __init__(self, model: nn.Module, folder: str | None) -> None:
        self._model = model
        self._files: dict[str, Path] | None = None if folder is None else files_of(Path(folder))
        self._sources = sources_of(model, self._files or ())

    def fill(self, stage: nn.Module, without: Collection[str] = (), models: Sequence[nn.Module] = ()) -> None:
        """Give storage and values to the parameters and buffers of a stage, on the CPU.

        Args:
            stage: on the meta device, its modules under their names in the model.
            without: names of modules that get stand-ins only (`stand_in`).
            models: of its runners, in which the modules around those of the stage are of the model's classes.

        Raises:
            ConfigError: the folder lacks a weight.
        """
        for name in without:
            stand_in(stage.get_submodule(name))
        materialize(stage, torch.device("cpu"))
        above = [name for name, part in stage.named_modules() if part is stage or type(part) is nn.Module]
        around = [(name, model.get_submodule(name)) for model in models for name in above]
        self._give_values(stage, "", tuple(f"{name}." for name in without), around)

    def fill_experts(self, experts: nn.Module, path: str) -> None:
        """Give values to a module with stand-ins, on the CPU; parameters stay the objects that they are.

        Args:
            experts: the module; what the user has put into it stays.
            path: its name in the model.

        Raises:
            ConfigError: the folder lacks a weight.
        """
        kept = [(param, param.data.contiguous()) for param in experts.parameters() if not is_empty(param)]
        for param in experts.parameters():
            param.data = _unwritten(param, torch.device("cpu"))
        self._give_values(experts, f"{path}.")
        for param, data in kept:
            param.data = data

    def _give_values(
        self,
        module: nn.Module,
        before: str,
        without: tuple[str, ...] = (),
        around: Sequence[tuple[str, nn.Module]] = (),
    ) -> None:
        """Draw or read a module with storage, whose name comes with `before`, but for names that start as `without`;
        what is `around` it draws some of it again."""
        seed = torch.initial_seed()
        inside = [((before + name).rstrip("."), inner) for name, inner in module.named_modules()]
        with torch.random.fork_rng(devices=[]):
            for name, inner in (*reversed(inside), *reversed(around)):  # children first, as transformers does
                if not f"{name}.".startswith(without):
                    self._draw(name, inner, seed)
        held = module.state_dict(keep_vars=True, prefix=before)
        read = {name: tensor for name, tensor in held.items() if not name.startswith(without)}
        if self._files is None:
            read = {}
            self._draw_ties(module, before, without)
        self._refuse_unwritten(module, before, without, {id(tensor) for tensor in read.values()})
        if read:
            self._read(read)

    def _draw(self, name: str, module: nn.Module, seed: int) -> None:
        """Values that the model gives the weights of a module, which depend on its name."""
        torch.manual_seed((seed + _number(name)) % 2**63)
        self._owner(name)._init_weights(module)
        _reset(module)

    def _draw_ties(self, module: nn.Module, before: str, without: tuple[str, ...]) -> None:
        """Give weights that are tied to those of a module that is not here what that one draws."""
        first: dict[int, str] = {}
        for name, param in self._model.named_parameters(remove_duplicate=False):
            first.setdefault(id(param), name)
        here = {before + name: param for name, param in module.named_parameters(remove_duplicate=False)}
        for name, param in here.items():
            source = first[id(self._model.get_parameter(name))]
            if source in here or name.startswith(without):
                continue
            path = self._around(source)
            other = copy.deepcopy(self._model.get_submodule(path))
            materialize(other, torch.device("cpu"))
            seed = torch.initial_seed()
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                for inner_name, inner in reversed(list(other.named_modules())):
                    self._draw(f"{path}.{inner_name}".rstrip("."), inner, seed)
                param.copy_(other.get_parameter(source.removeprefix(f"{path}.")))

    def _around(self, param: str) -> str:
        """The outermost module around a weight that has no blocks: it may draw the weight again."""
        path = param.rpartition(".")[0]
        while up := path.rpartition(".")[0]:
            if any(isinstance(part, nn.ModuleList) for part in self._model.get_submodule(up).modules()):
                break
            path = up
        return path

    def _owner(self, name: str) -> PretrainedModel:
        """The innermost model of transformers around a module: it knows how the module begins."""
        owner: Any = self._model
        around = self._model
        for part in name.split(".") if name else ():
            if part not in around._modules:
                break
            around = around.get_submodule(part)
            owner = around if hasattr(around, "_init_weights") else owner
        return owner

    def _refuse_unwritten(self, module: nn.Module, before: str, without: tuple[str, ...], read: set[int]) -> None:
        """Refuse what no initialization has written and no file will.

        Raises:
            ConfigError: there is such a weight or buffer.
        """
        for name, tensor in (*module.named_parameters(prefix=before[:-1]), *module.named_buffers(prefix=before[:-1])):
            if not name.startswith(without) and id(tensor) not in read and _is_unwritten(tensor):
                raise ConfigError(
                    f"{type(self._model).__name__}: {name} gets its values where the model is built, which a model "
                    "without weights passes by: build the model whole, or load it with from_pretrained, and pass it"
                )

    def share(self, path: str, names: Sequence[str], experts: range | None, total: int) -> dict[str, torch.Tensor]:
        """Weights of a module of experts, or of stacked ones those of some experts alone, on the CPU.

        Args:
            path: name of the module in the model.
            names: of weights in it.
            experts: of `[total, ...]` these; None: the whole of each.
            total: experts in all.

        Raises:
            ConfigError: the folder lacks a weight.
        """
        if self._files is None:  # drawn as one, whoever holds them
            module = copy.deepcopy(self._model.get_submodule(path))
            stand_in(module)
            self.fill_experts(module, path)
            drawn = {name: module.get_parameter(name).detach() for name in names}
            part = slice(None) if experts is None else slice(experts.start, experts.stop)
            return {name: value[part].clone() for name, value in drawn.items()}
        made: dict[str, torch.Tensor] = {}
        with self._opened() as read:
            for name in names:
                full = f"{path}.{name}"
                source = self._sources[self._known(full)]
                if full not in made:
                    made |= (
                        source.weights(self._model, read)
                        if experts is None
                        else source.share(self._model, read, experts, total)
                    )
        return {name: made[f"{path}.{name}"] for name in names}

    def _read(self, held: Mapping[str, torch.Tensor]) -> None:
        wanted: dict[int, tuple[str, torch.Tensor]] = {}
        for name, tensor in sorted(held.items(), key=lambda each: each[0] not in self._sources):
            if id(tensor) not in wanted:  # else tied to one that has a source
                wanted[id(tensor)] = self._known(name), tensor
        made: dict[str, torch.Tensor] = {}
        with self._opened() as read, torch.no_grad():
            for known, tensor in wanted.values():
                if known not in made:
                    made |= self._sources[known].weights(self._model, read)
                tensor.copy_(made.pop(known))

    @contextmanager
    def _opened(self) -> Iterator[Read]:
        """What reads entries; files that it has opened are closed at the end."""
        from safetensors import safe_open

        assert self._files is not None
        files = self._files
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}

            def read(entry: str, experts: range | None) -> torch.Tensor:
                path = files[entry]
                if path not in opened:
                    opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                found: torch.Tensor = (
                    opened[path].get_tensor(entry)
                    if experts is None
                    else opened[path].get_slice(entry)[experts.start : experts.stop]
                )
                return found

            yield read

    def _known(self, name: str) -> str:
        """The weight, or one that is tied to it, that the files have."""
        known = name if name in self._sources else self._tie_of(name)
        if known is None or known not in self._sources:
            raise ConfigError(
                f"the safetensors files have nothing that becomes {name}: load the model whole with "
                "from_pretrained and pass it, or save it in its own names with save_pretrained(..., "
                "save_original_format=False)"
            )
        return known

    def _tie_of(self, name: str) -> str | None:
        """Another name of the same parameter in the model."""
        names = dict(self._model.named_parameters(remove_duplicate=False))
        return next((other for other, param in names.items() if param is names.get(name) and other != name), None)


def _number(name: str) -> int:
    import zlib

    return zlib.crc32(name.encode())


def materialize(module: nn.Module, device: torch.device) -> None:
    """Give storage to everything of `module` that is on the meta device, keeping ties between its parts."""
    seen: dict[int, torch.Tensor] = {}
    for part in module.modules():
        tables: list[dict[str, Any]] = [part._parameters, part._buffers]  # type: ignore[list-item]
        for held in tables:
            for key, tensor in held.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in seen:
                    made = _unwritten(tensor, device)
                    if isinstance(tensor, nn.Parameter):
                        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                    seen[id(tensor)] = made
                held[key] = seen[id(tensor)]


def _unwritten(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """As large a tensor that shows whether it has been written: NaN, or the least integer."""
    if tensor.is_floating_point():
        return torch.full_like(tensor, torch.nan, device=device, requires_grad=False)
    if tensor.dtype in (torch.int32, torch.int64):
        return torch.full_like(tensor, torch.iinfo(tensor.dtype).min, device=device)
    return torch.empty_like(tensor, device=device)


def _is_unwritten(tensor: torch.Tensor) -> bool:
    if is_empty(tensor):
        return False  # a stand-in, which has its turn
    if tensor.is_floating_point():
        return bool(tensor.isnan().any())
    if tensor.dtype in (torch.int32, torch.int64):
        return bool((tensor == torch.iinfo(tensor.dtype).min).any())
    return False


def _reset(module: nn.Module) -> None:
    """Values as torch draws them for what the model's own initialization leaves alone."""
    own = list(module.parameters(recurse=False))
    drawn = [(param, param.detach().clone()) for param in own if not _is_unwritten(param)]
    if len(drawn) < len(own) and hasattr(module, "reset_parameters"):
        module.reset_parameters()  # type: ignore[operator]
        with torch.no_grad():
            for param, value in drawn:
                param.copy_(value)


def stand_in(module: nn.Module) -> None:
    """Let parameters of `module` that are on the meta device be on the CPU without room for their values: all are one
    NaN. Filling them with one value works, other writing is an error of torch."""
    for part in module.modules():
        for key, param in part._parameters.items():
            if param is not None and param.is_meta:
                nothing = torch.full((), torch.nan, dtype=param.dtype).expand(param.shape)
                part._parameters[key] = nn.Parameter(nothing, requires_grad=param.requires_grad)


def is_empty(param: torch.Tensor) -> bool:
    """Whether a parameter has no values: on the meta device, or as `stand_in` makes it."""
    if param.is_meta:
        return True
    return param.dim() > 0 and not any(param.stride()) and bool(param[(0,) * param.dim()].isnan())
