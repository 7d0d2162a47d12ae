"""ModelAdapter: a whole model as pipeline stages or as the layers of a `deepspeed.pipe.PipelineModule`."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..comm.nest import Nest
from ..errors import ConfigError
from .chain import Chain, ancestors, find_chain, refuse_shared_weights
from .families import family_of, makes_loss_itself, own_loss
from .loading import Weights, empty_model
from .losses import LossFn, ModelConfig
from .messages import Inputs
from .registry import Adapter, added_adapter, refuse_unfit
from .result_check import check_result, has_loss
from .routed import RoutedRunner, RouterLoss
from .runner import BlockRange, Runner
from .sequences import unshare_attention
from .sketch import sketches
from .stage import Stage
from .stubs import shadow

if TYPE_CHECKING:
    from deepspeed.pipe import LayerSpec

EXTRAS = ("attention_mask", "position_ids", "token_type_ids")  #: what the probe need not have, after the main input
TIED = "ends"  #: key of the TiedLayerSpec of a model whose first and last piece share weights


def get_model_adapter(
    model: nn.Module | None = None,
    *,
    config: ModelConfig = None,
    folder: str | None = None,
    example_inputs: Nest = None,
) -> Adapter:
    """The adapter of a model.

    Args:
        model: a whole model, of transformers or any other whose blocks follow each other in a ModuleList or Sequential.
        config: instead, a transformers configuration: each stage gets fresh weights and no rank holds the whole model.
        folder: a folder with config.json and safetensors: each stage reads its own weights only. A `model` of
            transformers on the meta device gets its weights as one of a configuration does.
        example_inputs: for other than transformers models: the arguments of one small forward (tensor, tuple, dict).

    Raises:
        ConfigError: the model is no single chain; the message says why. Or it has weights, and a folder is given too.
        MissingExtraError: `config` or `folder` without transformers installed.
    """
    weights = None
    if model is None:
        model = empty_model(config, folder)
        weights = Weights(model, folder)
    elif hasattr(model, "_init_weights") and all(param.is_meta for param in model.parameters()):
        weights = Weights(model, folder)
    elif folder is not None:
        raise ConfigError(
            f"the model has weights, so those in {folder} would not be read: give the folder alone, or a model of "
            'transformers built under torch.device("meta")'
        )
    make = added_adapter(model)
    if make is not None:
        return make(model)
    return ModelAdapter(model, weights=weights, example_inputs=example_inputs)


class ModelAdapter:
    """Cuts a model into pieces that run the model's own forward.

    Args:
        model: the whole model; on the meta device with `weights`. Pieces share its modules, if it has weights.
        weights: fills pieces of a model on the meta device.
        example_inputs: see `get_model_adapter`.
        chain: of the model; None finds it by a probe forward.

    Raises:
        ConfigError: the model is no single chain.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weights: Weights | None = None,
        example_inputs: Nest = None,
        chain: Chain | None = None,
    ) -> None:
        refuse_unfit(model)
        unshare_attention(model)
        self.model, self.weights = model, weights
        self._inputs = _inputs(model)
        routed = getattr(getattr(model, "config", None), "output_router_logits", False)
        self._routing = RouterLoss(model) if routed else None
        probe = _probe(model, self._inputs, example_inputs)
        self.chain = chain or find_chain(model, probe)
        refuse_shared_weights(model, self.chain)
        self._loss_known = True
        self._shadows: dict[str, nn.Module] = {}
        above = ancestors((*self.chain.prologue, *self.chain.blocks, *self.chain.epilogue))
        self._kept, self._unused = self._rest(above)
        self._check(probe)
        self._inputs.only((*probe, *(name for name in self._inputs.names if name in EXTRAS), "inputs_embeds"))

    def _check(self, probe: dict[str, Nest]) -> None:
        """Compare the smallest stages with the model. Where they fail without the token ids, all get them."""
        meta = any(param.is_meta for param in self.model.parameters())
        forwards = sketches(self.model, self.chain.blocks) if meta else {}
        try:
            check_result(self.model, self._inputs, probe, self._parts, forwards)
        except ConfigError:
            if not self._inputs.embeds:
                raise
            self._inputs = self._inputs.with_ids()
            check_result(self.model, self._inputs, probe, self._parts, forwards)
        if makes_loss_itself(self.model):
            self._loss_known = has_loss(
                self.model, self._inputs, probe, forwards, lambda output, labels: own_loss(self.model)(output, labels)
            )

    def _parts(self) -> list[Stage]:
        """Prologue, each block and epilogue as stages of their own, not filled."""
        count = len(self.chain.blocks)
        blocks = [BlockRange(index, index + 1, False, False) for index in range(count)]
        spans = [BlockRange(0, 0, True, False), *blocks, BlockRange(count, count, False, True)]
        return [Stage(self, (span,)) for span in spans]

    @property
    def loss_fn(self) -> LossFn:
        """The model's own loss as `loss_fn(output, labels)`. With `output_router_logits` in the configuration an output
        is `(logits, auxiliary loss)`, and the loss is that of both.

        Raises:
            ConfigError: its class has none that is known.
        """
        return self.own_loss if self._routing is None else self._routing.with_loss(self.own_loss)

    @property
    def own_loss(self) -> LossFn:
        """The same without the auxiliary loss over routers, of the logits alone.

        Raises:
            ConfigError: its class has none that is known, or its forward makes another one.
        """
        if not self._loss_known:
            raise ConfigError(
                f"{type(self.model).__name__} makes another loss of its logits than models of such names do, such as "
                "one of labels that have been shifted before: give the PipelineModule a loss_fn(output, labels) of "
                "your own"
            )
        return own_loss(self.model)

    @property
    def auxiliary_weight(self) -> float | None:
        """Factor of the auxiliary loss over routers; None: outputs come without it."""
        return None if self._routing is None else self._routing.weight

    @property
    def tied(self) -> bool:
        """Whether prologue and epilogue share weights."""
        return bool(_ids(self.model, self.chain.prologue) & _ids(self.model, self.chain.epilogue))

    def partition(self, num_partitions: int) -> list[Stage]:
        """The model as stages: `output = stages[-1](...(stages[0](batch)))`.

        Args:
            num_partitions: stages, at most one a block.

        Raises:
            ConfigError: there are fewer blocks than stages.
        """
        return [self.stage(index, num_partitions) for index in range(num_partitions)]

    def stage(self, index: int, num_partitions: int) -> Stage:
        """One of the stages of `partition`; nothing is built or read for the others."""
        built = self._stage(index, num_partitions)
        built.fill()
        return built

    def _stage(self, index: int, num_partitions: int) -> Stage:
        """A stage whose weights are where the model has them."""
        blocks = len(self.chain.blocks)
        if not 1 <= num_partitions <= blocks:
            raise ConfigError(f"{blocks} blocks cannot fill {num_partitions} stages: use at most {blocks}")
        each, more = divmod(blocks, num_partitions)
        start = index * each + min(index, more)
        span = BlockRange(start, start + each + (index < more), index == 0, index == num_partitions - 1)
        return Stage(self, (span,))

    def to_layer_specs(self) -> list[LayerSpec]:
        """The layers for a PipelineModule: prologue, blocks, epilogue.

        Prologue and epilogue of a model with tied weights are one `TiedLayerSpec`: a rank at either end holds both, and
        their gradients are added up. The parameters of layer i are called `i.<name in the model>`. Layers keep the
        class names of the blocks, for `partition_method="type:..."`, between `Embedding` and `Head`.

        Use `loss_fn`, or one of your own over the last layer's logits, as the PipelineModule's.
        """
        from deepspeed.pipe import LayerSpec, TiedLayerSpec

        count = len(self.chain.blocks)
        begin, end = BlockRange(0, 0, True, False), BlockRange(count, count, False, True)
        names = [type(self.model.get_submodule(name)).__name__ for name in self.chain.blocks]
        kinds = {name: type(name, (Stage,), {}) for name in {*names, "Embedding", "Head", "EmbeddingAndHead"}}
        middle = [
            LayerSpec(kinds[name], self, (BlockRange(index, index + 1, False, False),))
            for index, name in enumerate(names)
        ]
        if not self.tied:
            return [LayerSpec(kinds["Embedding"], self, (begin,)), *middle, LayerSpec(kinds["Head"], self, (end,))]
        owned = self.names_of((begin, end))
        weights = [name for name, _ in self.model.named_parameters() if _within(name, owned)]
        both = (TIED, kinds["EmbeddingAndHead"], self, (begin, end))
        return [
            TiedLayerSpec(*both, tied_weight_attr=weights),
            *middle,
            TiedLayerSpec(*both, forward_fn=Stage.finish, tied_weight_attr=weights),
        ]

    def description(self) -> dict[str, object]:
        """The class of the model and, of a Hugging Face model, its config.json."""
        config: ModelConfig = getattr(self.model, "config", None)
        kind = type(self.model).__name__
        if not hasattr(config, "to_json_string"):
            return {"class": kind, "config": None}
        return {"class": kind, "config": json.loads(config.to_json_string()) | {"architectures": [kind]}}

    # -- for stages ----------------------------------------------------------------------------------------------

    def names_of(self, spans: tuple[BlockRange, ...]) -> list[str]:
        """The modules with weights that a stage owns, in the order of the model."""
        names: dict[str, None] = {}
        for span in spans:
            if span.first:
                names |= dict.fromkeys((*self.chain.prologue, *self._unused))
            names |= dict.fromkeys(self.chain.blocks[span.start : span.stop])
            if span.last:
                names |= dict.fromkeys(self.chain.epilogue)
        return [name for name, _ in self.model.named_modules(remove_duplicate=False) if name in names]

    def modules_of(self, spans: tuple[BlockRange, ...]) -> dict[str, nn.Module]:
        """Those modules, and copies of the modules without weights that every stage runs, by name."""
        memo: dict[int, object] = {}
        owned = {}
        for name in self.names_of(spans):
            module = self.model.get_submodule(name)
            owned[name] = module if self.weights is None else copy.deepcopy(module, memo)
        return owned | {
            name: copy.deepcopy(self.model.get_submodule(name), memo) for name in self._kept if name not in owned
        }

    def runner(self, span: BlockRange, owned: dict[str, nn.Module]) -> Runner:
        given = (self.model, self.chain, owned, self._shadow, self._inputs, span)
        return Runner(*given) if self._routing is None else RoutedRunner(self._routing, *given)

    def _shadow(self, name: str) -> nn.Module:
        if name not in self._shadows:
            self._shadows[name] = shadow(self.model.get_submodule(name))
        return self._shadows[name]

    def _rest(self, above: set[str]) -> tuple[list[str], list[str]]:
        """Names of what every stage runs, having no weights, and of what the probe did not run."""
        ends = (*self.chain.prologue, *self.chain.epilogue)
        kept = [name for name in ends if not _has_weights(self.model, name) and not _drops(self.model, name)]
        unused: list[str] = []
        known = {*ends, *self.chain.blocks}
        for name, _ in self.model.named_modules():
            if name and name not in above and not _within(name, known) and not _within(name, unused):
                unused.append(name)
        return [*kept, *(n for n in unused if not _has_weights(self.model, n))], [
            name for name in unused if _has_weights(self.model, name)
        ]


def _has_weights(model: nn.Module, name: str) -> bool:
    return next(model.get_submodule(name).parameters(), None) is not None


def _drops(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Dropout)


def _within(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _ids(model: nn.Module, names: tuple[str, ...]) -> set[int]:
    return {id(param) for name in names for param in model.get_submodule(name).parameters()}


def _inputs(model: nn.Module) -> Inputs:
    signature = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", None)
    if main is None:  # not of transformers
        names = tuple(name for name, param in signature.items() if param.kind is param.POSITIONAL_OR_KEYWORD)
        return Inputs(names, False, {})
    family = family_of(model)
    embeds = family is not None and family.embeds_only and "inputs_embeds" in signature
    # The auxiliary loss over routers is made by `RoutedRunner`.
    fixed = {name: False for name in ("use_cache", "output_router_logits") if name in signature}
    return Inputs((main, *(name for name in EXTRAS if name in signature)), embeds, fixed)


def _probe(model: nn.Module, inputs: Inputs, example: Nest) -> dict[str, Nest]:
    """Arguments of a small forward."""
    if example is not None:
        return inputs.read(example)[0]
    config = getattr(model, "config", None)
    main = inputs.names[0]
    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    if main == "input_ids" and config is not None:
        return inputs.read(torch.ones(1, 4, dtype=torch.long, device=device))[0]
    if main == "pixel_values" and config is not None:
        size = getattr(config, "image_size", getattr(getattr(config, "vision_config", None), "image_size", 64))
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return inputs.read(torch.zeros(1, getattr(config, "num_channels", 3), height, width, device=device))[0]
    raise ConfigError(
        f"{type(model).__name__}: the chain is found by one small forward, whose inputs are not known: pass "
        "example_inputs= (the arguments of its forward) to get_model_adapter"
    )
