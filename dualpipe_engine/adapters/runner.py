"""Runner: the model's own forward, over a range of its blocks.

The model around the blocks is rebuilt for each range, with stubs for what others own. Masks, rotary embeddings and
whatever else the forward computes without weights are computed by every runner, so a block gets the arguments that it
gets in the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..comm.nest import Nest
from ..errors import ConfigError
from ..models.trial import hidden_state
from .chain import Chain, ancestors
from .messages import Inputs
from .phased_attention import Layer, PhasedAttention, phased_attention
from .sequences import Part, PartViews, check_shared, share_attention
from .stubs import Changed, End, Inject, Stub, Taken, first_tensor, placeholder


class BlockRange(NamedTuple):
    """Blocks `start` to `stop - 1`, with prologue or epilogue where `first` or `last` is set."""

    start: int
    stop: int
    first: bool
    last: bool


class Runner:
    """Runs a span of a model.

    Args:
        model: the whole model, for the structure around the blocks.
        chain: of the model.
        owned: the modules that run, by name, and those without weights that every stage runs.
        shadows: makes the shadow of a module by name.
        inputs: reads batches and messages.
        span: what runs.
    """

    def __init__(
        self,
        model: nn.Module,
        chain: Chain,
        owned: Mapping[str, nn.Module],
        shadows: Callable[[str], nn.Module],
        inputs: Inputs,
        span: BlockRange,
    ) -> None:
        self._chain, self._shadows, self._inputs = chain, shadows, inputs
        self._start, self._stop, self._first, self._last = span
        self._ends = span.stop == len(chain.blocks) > span.start and not span.last
        self._hidden: torch.Tensor | None = None
        self._shared: Part | None = None
        self._attention: list[nn.Module] = []
        self._length = 0  # of whole sequences, where a rank has a part of them
        self._blocks = [owned[path] for path in chain.blocks[span.start : span.stop]]
        above = ancestors((*chain.prologue, *chain.blocks, *chain.epilogue, *owned))
        self.model = self._rebuilt(model, "", above, owned)

    def __call__(self, message: Nest) -> Nest:
        check_shared(self._attention)
        if self._first:
            kwargs, travel = self._inputs.read(message)
            self._begin(kwargs)
        else:
            self._hidden, travel = self._inputs.unpack(message)
            kwargs = self._inputs.stand_in(self._whole(self._hidden), travel)
        try:
            with self._views():
                output = self.model(**kwargs)
        except Taken as taken:
            return self._inputs.pack(self._cut(taken.hidden), travel)
        finally:
            self._hidden = None
        return self._inputs.result(output, travel)

    def share_sequences(self, group: dist.ProcessGroup) -> None:
        """Run the blocks on parts of sequences; messages have the hidden state of a part, and whole inputs.

        Raises:
            ConfigError: a block cannot.
        """
        self._shared = Part(group)
        for path in self._chain.blocks[self._start : self._stop]:
            block = self.model.get_submodule(path)
            self._attention += share_attention(block, self.model, group)
            above, _, name = path.rpartition(".")
            self.model.get_submodule(above)._modules[name] = Changed(block, self._cut)

    def in_pieces(self, layer: Layer, group: dist.ProcessGroup) -> PhasedAttention | str | None:
        """The span of a `layer` in pieces around its attention, or why there are none; None where no block shares
        sequences. Collective over the ranks that hold it, `group`."""
        if self._shared is None or not self._attention:
            return None
        if len(self._blocks) != 1 or self._first or self._last:
            return "it has more than one block of the model"
        block = self._blocks[0]
        width = getattr(getattr(self.model, "config", None), "hidden_size", None)
        if not isinstance(width, int):
            return "its configuration has no hidden_size"
        hidden = hidden_state(block, width)
        ids = torch.ones(len(hidden), hidden.shape[1] * self._shared.size, dtype=torch.long, device=hidden.device)
        message = self._inputs.pack(hidden, {} if self._inputs.embeds else {self._inputs.names[0]: ids})
        return phased_attention(layer, block, message, group)

    def _begin(self, kwargs: Mapping[str, Nest]) -> None:
        """Note the length of the sequences that the model is given."""
        if self._shared is None:
            return
        if "labels" in kwargs:
            raise ConfigError(
                'with "sequence_parallel_size" labels among the inputs would be those of other tokens than a rank has: '
                "let the loader give pairs (inputs, labels), and the adapter's loss_fn to the PipelineModule"
            )
        self._length = first_tensor(kwargs.get("inputs_embeds"), kwargs.get(self._inputs.names[0])).shape[1]
        if self._length % self._shared.size:
            raise ConfigError(
                f'inputs of {self._length} tokens cannot be cut by "sequence_parallel_size": {self._shared.size}: pad '
                f"them to a multiple of {self._shared.size}"
            )

    def _whole(self, hidden: torch.Tensor) -> torch.Tensor:
        """A hidden state of the length of whole sequences, without values of theirs where it is longer."""
        if self._shared is None:
            return hidden
        self._length = hidden.shape[1] * self._shared.size
        return hidden.new_zeros(()).expand(len(hidden), self._length, *hidden.shape[2:])

    def _views(self) -> AbstractContextManager[object]:
        if self._shared is None or not self._last:
            return nullcontext()
        return PartViews(self._length // self._shared.size, self._length)

    def _cut(self, given: Nest) -> Nest:
        return given if self._shared is None else self._shared.cut(given, self._length)

    def carried(self, message: Nest, logits: list[torch.Tensor]) -> Nest:
        """What goes past the block of a span of one, neither first nor last; see `Stage.carried`."""
        return self._inputs.unpack(message)[1]

    def resumed(self, carried: Nest, run: Callable[[], Nest]) -> Nest:
        """The message behind a block that `run` runs."""
        return self.handed_on(first_tensor(run()), carried)

    def handed_on(self, hidden: torch.Tensor, carried: dict[str, Nest]) -> Nest:
        """The message with the `hidden` state that the block returns."""
        return self._inputs.pack(hidden, carried)

    def _received(self) -> torch.Tensor:
        assert self._hidden is not None
        return self._hidden

    def _rebuilt(self, module: nn.Module, name: str, above: set[str], owned: Mapping[str, nn.Module]) -> nn.Module:
        """A copy of `module` that holds owned modules and stubs."""
        shell = copy.copy(module)
        shell._parameters, shell._buffers = dict(module._parameters), dict(module._buffers)
        shell._modules = {}
        for key, child in module._modules.items():
            path = f"{name}.{key}" if name else key
            shell._modules[key] = self._part(path, child, above, owned)
        return shell

    def _part(
        self, path: str, child: nn.Module | None, above: set[str], owned: Mapping[str, nn.Module]
    ) -> nn.Module | None:
        if child is None:
            return None
        if path in owned:
            if path == self._chain.blocks[0] and not self._first:
                return Inject(owned[path], self._received)
            return End(owned[path]) if path == self._chain.blocks[-1] and self._ends else owned[path]
        if path in above:
            return self._rebuilt(child, path, above, owned)
        return Stub(self._shadows(path), self._behaviour(path))

    def _behaviour(self, path: str) -> Callable[..., Nest]:
        if path not in self._chain.blocks:
            return partial(self._outside, path)
        number = self._chain.blocks.index(path)
        if number >= self._stop:
            return self._take
        length = self._chain.outputs[number]
        return partial(self._pass, length, inject=number == self._start - 1)

    def _outside(self, path: str, *args: Nest, **kwargs: Nest) -> Nest:
        hidden = self._hidden if self._hidden is not None else first_tensor(*args, **kwargs)
        return placeholder(self._shadows(path), hidden, *args, **kwargs)

    def _pass(self, length: int, *args: Nest, inject: bool, **kwargs: Nest) -> Nest:
        hidden = self._received() if inject else first_tensor(*args, **kwargs)
        return (hidden, *[None] * (length - 1)) if length else hidden

    def _take(self, *args: Nest, **kwargs: Nest) -> Nest:
        raise Taken(first_tensor(*args, **kwargs))
