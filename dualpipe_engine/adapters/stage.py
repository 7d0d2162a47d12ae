"""Stage: the modules of a piece of a model, under the names that they have in the model, and how they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from ..comm.nest import Nest
from ..errors import ConfigError
from ..runtime.phases import COMPUTE, Phase, Phased
from .families import family_of
from .loading import Weights, is_empty
from .losses import ModelConfig
from .phased_attention import PhasedAttention
from .runner import BlockRange, Runner
from .sequences import unshare_attention

EXPERTS = "experts"
"""Last name of the modules whose weights come last: transformers calls them so in all models."""


class StageSource(Protocol):
    """What a stage asks of the adapter that it is cut from (`ModelAdapter`)."""

    @property
    def weights(self) -> Weights | None: ...

    def modules_of(self, spans: tuple[BlockRange, ...]) -> dict[str, nn.Module]: ...

    def description(self) -> dict[str, object]: ...

    def runner(self, span: BlockRange, owned: dict[str, nn.Module]) -> Runner: ...


class Stage(nn.Module):
    """A piece of a model as a module of its own.

    Of a model on the meta device it gets its weights when it is first moved to a device, so that counting is cheap;
    those of experts when anything else is done with it. A rank that shares experts with others has taken its own by
    then (`share`), and none of them holds all.

    Args:
        adapter: of the model.
        spans: what it runs; `forward` runs the first, `finish` the second.

    Attributes:
        whole_model: what a checkpoint keeps of the model, for `dualpipe export`.
        cuts_inputs: where ranks share sequences, the first piece takes whole ones.
    """

    whole_model: dict[str, object]
    cuts_inputs = True
    _runners: list[Runner]
    _weights: Weights | None
    _pieces: PhasedAttention | None = None

    def __init__(self, adapter: StageSource, spans: tuple[BlockRange, ...]) -> None:
        super().__init__()
        owned = adapter.modules_of(spans)
        for name, module in owned.items():
            unshare_attention(module)
            self._place(name, module)
        self.__dict__["_weights"] = adapter.weights
        self._waiting: tuple[str, ...] = ()
        self._empty = adapter.weights is not None
        self.__dict__["whole_model"] = adapter.description()
        # The runners' models share these modules and hold stubs, so they are no submodules.
        self.__dict__["_runners"] = [adapter.runner(span, owned) for span in spans]

    def forward(self, message: Nest) -> Nest:
        """Run the piece.

        Args:
            message: the batch (main input, tuple or dict) for the first piece, else what the piece before returned.

        Returns:
            What the next piece takes: a hidden state, or (hidden state, inputs that all stages need). The last piece
            returns logits (or the last hidden state); the model's whole output if the batch is a dict with labels.
        """
        self.fill()
        return self._runners[0](message)

    def trial(self, message: Nest) -> Nest:
        """Run the piece as it is; one without weights needs `sketch.in_place`."""
        return self._runners[0](message)

    def finish(self, message: Nest) -> Nest:
        """Run the second range of a piece that holds both ends of the model."""
        self.fill()
        return self._runners[1](message)

    def share_sequences(self, group: dist.ProcessGroup) -> None:
        """Work on parts of sequences, of which each rank of `group` has one of equal length.

        Raises:
            ConfigError: the model is none whose outputs belong to single tokens, or one of its blocks cannot.
        """
        model = self._runners[0].model
        family = family_of(model)
        if family is None or not family.by_token:
            raise ConfigError(
                f"{type(model).__name__} is not known to give an output for each token, of which a rank has some "
                '("sequence_parallel_size"): take a language model of transformers, or name its family by '
                "register_family(Family(..., by_token=True))"
            )
        for runner in self._runners:
            runner.share_sequences(group)

    def offer_exchanges(self, group: dist.ProcessGroup) -> str | None:
        """Let the exchanges of attention be phases, of a piece of one block whose ranks share sequences. Collective.

        Args:
            group: the ranks that hold the same piece, those that share sequences with others among them.

        Returns:
            Why they cannot; None if they are, or there is no block.
        """
        found = self._runners[0].in_pieces(self, group)
        if found is None or isinstance(found, str):
            return found
        self.__dict__["_pieces"] = found
        if not isinstance(self, Phased):
            self.__dict__["phases"] = self._by_phases
        return None

    def exchanges(self) -> list[Phase]:
        """The piece up to the results of its attention, where their exchanges are phases."""
        return [] if self._pieces is None else self._pieces.phases()

    def run_on(self, state: Nest) -> Nest:
        """The rest of it, behind `exchanges`."""
        assert self._pieces is not None
        return self._pieces.run_on(state)

    def message_of(self, state: Nest) -> Nest:
        """What of the message goes past the block, as a message, behind `exchanges`."""
        assert self._pieces is not None
        return self._pieces.message_of(state)

    def resumed(self, carried: Nest, run: Callable[[], Nest]) -> Nest:
        """What the piece returns when `run` runs its block, and `carried` goes past it."""
        return self._runners[0].resumed(carried, run)

    def _by_phases(self) -> list[Phase]:
        return [*self.exchanges(), Phase("output", COMPUTE, self.run_on)]

    @property
    def beside_submodules(self) -> list[object]:
        """What else `share_sequences` changes: what runs the piece, and the model around its modules."""
        return [each for runner in self._runners for each in (runner, *runner.model.modules())]

    @property
    def config(self) -> ModelConfig:
        """The configuration of the model; None if it has none."""
        return getattr(self._runners[0].model, "config", None)

    @property
    def projection(self) -> nn.Module | None:
        """What makes logits in the last piece of a language model, for "tiled_loss"."""
        find = getattr(self._runners[-1].model, "get_output_embeddings", None)
        found: nn.Module | None = None if find is None else find()
        return found

    def carried(self, message: Nest, logits: list[torch.Tensor]) -> Nest:
        """What of a message, and of the `logits` of the block's router, goes past the block of a piece that has one."""
        return self._runners[0].carried(message, logits)

    def handed_on(self, hidden: torch.Tensor, carried: Nest) -> Nest:
        """What such a piece returns when its block returns `hidden`."""
        return self._runners[0].handed_on(hidden, carried)

    def train(self, mode: bool = True) -> Stage:
        super().train(mode)
        for runner in self._runners:
            runner.model.train(mode)
        return self

    def fill(self) -> None:
        """Give weights to what has none."""
        self._fill_but(())
        for path in self.unread:
            experts = self.get_submodule(path)
            device = next((param.device for param in self.parameters() if not is_empty(param)), torch.device("cpu"))
            assert self._weights is not None
            self._weights.fill_experts(experts, path)
            experts.to(device)
        self._waiting, self.__dict__["_weights"] = (), None

    @property
    def unread(self) -> list[str]:
        """Names of modules of experts that have no weights yet."""
        found = []
        for path in self._waiting:
            if any(is_empty(param) for param in self.get_submodule(path).parameters()):
                found.append(path)
        return found

    def share(self, path: str, names: Sequence[str], experts: range | None, total: int) -> dict[str, torch.Tensor]:
        """Weights of a module of experts that is `unread`; see `Weights.share`."""
        assert self._weights is not None
        held = {name: self.get_submodule(path).get_parameter(name).detach() for name in names}
        empty = [name for name, value in held.items() if is_empty(value)]  # others are as the user has made them
        read = self._weights.share(path, empty, experts, total)
        part = slice(None) if experts is None else slice(experts.start, experts.stop)
        return {name: read[name] if name in read else value[part] for name, value in held.items()}

    def _fill_but(self, without: tuple[str, ...]) -> None:
        if self._empty:
            assert self._weights is not None
            self._weights.fill(self, without, [runner.model for runner in self._runners])
            self._empty, self._waiting = False, without

    def _save_to_state_dict(self, *args: Any) -> None:
        if not self._empty:
            self.fill()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.fill()
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Stage:
        if not self._empty:
            self.fill()
        self._fill_but(tuple(name for name, part in self.named_modules() if _of_experts(name, part)))
        apart = [(self.get_submodule(path.rpartition(".")[0]), self.get_submodule(path)) for path in self._waiting]
        for parent, _ in apart:
            parent._modules[EXPERTS] = None
        try:
            return super()._apply(fn, recurse)
        finally:
            for parent, experts in apart:
                parent._modules[EXPERTS] = experts

    def _place(self, name: str, module: nn.Module) -> None:
        *path, last = name.split(".")
        place: nn.Module = self
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place._modules[part]  # type: ignore[assignment]
        place.add_module(last, module)


def _of_experts(name: str, module: nn.Module) -> bool:
    return name.rpartition(".")[2] == EXPERTS and next(module.parameters(), None) is not None
