"""The loss of a Trainer on the last stage: its own `compute_loss`, on a stand-in for the model.

The last stage has the output of the model and, in place of labels, all inputs of the micro-batch; so it calls
`compute_loss` as the stock Trainer does, overridden or not, with label smoothing and `compute_loss_func`. The model
that it is given returns what the stages have computed.

A batch travels as micro-batches, over whose losses the engine takes the mean; each is weighted so that this mean is
the loss of the whole batch. Losses are of two kinds: sums divided by `num_items_in_batch`, and means over what a
micro-batch holds. `loss_is_scaled_for_ga` of the Trainer says which; where it says nothing, the first loss is computed
for two numbers of items. What a loss of the user's own is a mean of, if of anything, is seen as well (`loss_kind.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.modeling_outputs import SequenceClassifierOutput

from dualpipe_engine.adapters.losses import TokenLoss
from dualpipe_engine.comm.nest import Nest
from dualpipe_engine.errors import ConfigError

from ..random_streams import undrawn
from .batches import Model
from .loss_kind import Piece, SumOfParts, counted, every_label, ignores_padding, rows_of_inputs

Micro = tuple[dict[str, Any], Any]
Loss = Callable[[Nest, Nest], torch.Tensor]
Computing: TypeAlias = Any
"""A `DualPipeTrainer`, whose module imports this one."""


def with_weights(
    micros: list[dict[str, Any]],
    items: torch.Tensor | int | None,
    replicas: int = 1,
    shifted: bool = False,
    for_the_loss: Sequence[str] = ("labels",),
) -> list[Micro]:
    """Micro-batches as pairs (inputs, what the loss needs).

    Args:
        micros: inputs, labels among them, of one replica.
        items: labels that count, over all replicas; None where the loss is a mean.
        replicas: of the pipeline, over which the engine takes the mean.
        shifted: the first label of a row counts for nothing, as in causal language models.
        for_the_loss: names of inputs that the stages do not need.
    """
    counts, rows = [counted(inputs, shifted) for inputs in micros], [rows_of_inputs(inputs) for inputs in micros]
    count, total = float("nan") if items is None else float(items), sum(counts)
    uneven = any(counted(inputs, False) < every_label(inputs) for inputs in micros)
    weighted = []
    for number, (inputs, own) in enumerate(zip(micros, counts, strict=True)):
        share = own * len(micros) / total if total else 1.0
        of_rows = rows[number] * len(micros) / sum(rows)
        numbers = [count, float(replicas * len(micros)), share, float(number), of_rows, float(uneven)]
        kept = {name: value for name, value in inputs.items() if name not in for_the_loss}
        weighted.append((kept, (inputs, torch.tensor(numbers, dtype=torch.float64))))
    return weighted


class TrainerLoss:
    """`loss(output, (inputs, numbers))` of a micro-batch; see the module and `with_weights`.

    Args:
        trainer: whose `compute_loss` it is.
        model: the whole model, whose attributes a loss may look at.
        own: the model's own loss of (output, labels); None: it is not known.
        stand_in: makes the model that `compute_loss` is given; as `StandIn`.
    """

    def __init__(
        self, trainer: Computing, model: Model, own: Loss | None, stand_in: Callable[..., StandIn] | None = None
    ) -> None:
        self._trainer, self._model, self._own = trainer, model, own
        self._stand_in = stand_in or StandIn
        self._is_sum: bool | None = trainer.loss_is_scaled_for_ga
        self._by_rows: bool | None = None
        self._is_unseen: bool = trainer._has_own_loss()
        self._parts: SumOfParts | None = None
        if trainer._looks_at_losses():
            self._parts = SumOfParts(f"{type(trainer).__name__}.compute_loss", trainer._row_blocks)
        self._labelled = True
        self._kept: dict[int, Nest] | None = None
        self._ignored: tuple[str, ...] = ()
        self._keep: Callable[[Nest, Mapping[str, Any]], Nest] | None = None

    @contextmanager
    def evaluating(
        self,
        labelled: bool,
        loss_only: bool,
        ignored: Sequence[str] | None = None,
        keep: Callable[[Nest, Mapping[str, Any]], Nest] | None = None,
    ) -> Iterator[dict[int, Nest]]:
        """Within, no gradients are wanted.

        Args:
            labelled: there are labels; without, losses are zero and `compute_loss` is not called.
            loss_only: nobody wants the logits.
            ignored: names of outputs that are no logits; None: those that the model's configuration names.
            keep: what is kept without labels, of an output and the inputs; None: the output.

        Yields:
            Logits of the micro-batches that end on this rank, by their numbers; filled as they end.
        """
        kept: dict[int, Nest] = {}
        if ignored is None:
            ignored = getattr(self._model.config, "keys_to_ignore_at_inference", ["cache"])
        self._labelled, self._kept, self._ignored = labelled, None if loss_only else kept, (*ignored, "loss")
        self._keep = keep
        try:
            yield kept
        finally:
            self._labelled, self._kept, self._keep = True, None, None

    def __call__(self, output: Nest, labels: tuple[dict[str, Any], torch.Tensor]) -> torch.Tensor:
        inputs, numbers = labels
        count, _, share, number, _, _ = numbers.tolist()
        if not self._labelled:
            if self._kept is not None:
                self._kept[int(number)] = output if self._keep is None else self._keep(output, inputs)
            return torch.zeros((), device=numbers.device)
        asks = self._is_sum is None and count == count and bool(share)
        looks = self._parts is not None and self._parts.goes_on
        if self._is_unseen or asks or looks:
            with undrawn():
                self._try(output, inputs, numbers)
        loss = self._of(output, inputs, None if count != count else count, int(number))
        factor = self._factor(numbers)
        return loss * factor if factor else self._without_labels(output)

    def _try(self, output: Nest, inputs: dict[str, Any], numbers: torch.Tensor) -> None:
        """Learn from losses of a first micro-batch what kind of loss it is."""
        count, _, share, _, _, uneven = numbers.tolist()
        if self._is_unseen:
            self._refuse_weights(output, inputs, None if count != count else count)
        if self._is_sum is None and count == count and share:
            self._is_sum = self._ask(output, inputs, count)
        if self._parts is not None:
            self._look(self._parts, output, inputs, count, bool(share and uneven))

    def _factor(self, numbers: torch.Tensor) -> float:
        """What the loss of a micro-batch is multiplied with; the engine divides by the number of them."""
        count, micros, share, _, of_rows, _ = numbers.tolist()
        if self._is_sum and count == count:
            return micros
        return of_rows if self._by_rows else share

    def _look(self, parts: SumOfParts, output: Nest, inputs: dict[str, Any], count: float, uneven: bool) -> None:
        """Whether micro-batches add up, and what a mean weighs them by; `uneven`: some labels do not count."""
        is_sum, items = self._is_sum and count == count, None if count != count else count

        def loss(piece: Piece) -> float:
            return self._asked(*piece, items)

        if self._by_rows is None and not is_sum and uneven:
            self._by_rows = not ignores_padding(loss, output, inputs)
        weigh = rows_of_inputs if self._by_rows else partial(counted, shifted=self._trainer._shifted())
        parts(loss, None if is_sum else weigh, (output, inputs))

    def _refuse_weights(self, output: Nest, inputs: dict[str, Any], count: float | None) -> None:
        """Refuse a loss of weights, of which this rank trains some and others may have been given back.

        Raises:
            ConfigError: the loss has a gradient for a weight besides that of the output.
        """
        with torch.enable_grad():
            loss = self._of(tree_map_only(torch.Tensor, torch.Tensor.detach, output), inputs, count)
        leaves = {id(leaf) for leaf in _leaves(loss)}
        name = next((name for name, param in self._model.named_parameters() if id(param) in leaves), None)
        if name is not None:
            raise ConfigError(
                f"compute_loss reads the weight {name}, but each process trains those of some stages only: make the "
                "loss of outputs and inputs, and regularize weights by the optimizer (weight_decay)"
            )
        self._is_unseen = False

    @torch.no_grad()
    def _asked(self, output: Nest, inputs: Mapping[str, Any], count: float | None) -> float:
        """The loss of rows, for another purpose than training; in fp32, as bf16 would not tell losses apart."""
        return float(self._of(tree_map_only(torch.Tensor, _precise, output), dict(inputs), count))

    def _of(self, output: Nest, inputs: dict[str, Any], count: float | None, number: int | None = None) -> torch.Tensor:
        trainer, stand_in = self._trainer, self._stand_in(self._model, self._own, output, inputs, number)
        kept = self._kept if number is not None else None
        options = {} if kept is None else {"return_outputs": True}
        with trainer._alone(), trainer.compute_loss_context_manager():
            found = trainer.compute_loss(stand_in, dict(inputs), num_items_in_batch=count, **options)
        if kept is None or number is None:
            return found
        loss, outputs = found
        kept[number] = self._logits(outputs)
        return loss

    def _without_labels(self, output: Nest) -> torch.Tensor:
        """Of a micro-batch in which no label counts; a mean over them is NaN."""
        return sum((leaf[:0].sum() for leaf in tree_leaves(output) if leaf.is_floating_point()), torch.zeros(()))

    def _logits(self, outputs: Nest) -> Nest:
        """What a Trainer takes for logits of the outputs that `compute_loss` returns beside the loss."""
        if isinstance(outputs, Mapping):
            found = tuple(value for name, value in outputs.items() if name not in self._ignored)
        else:
            found = tuple(outputs[1:])
        return found[0] if len(found) == 1 else found

    def _ask(self, output: Nest, inputs: dict[str, Any], count: float) -> bool | None:
        """Whether the loss is divided by the number of items; None: not seen, since it is zero."""
        once, twice = (self._asked(output, inputs, number) for number in (count, 2 * count))
        near = 1e-3 * abs(once)
        if abs(once - twice) <= near:
            return None if once == 0 else False
        if abs(once - 2 * twice) <= near:
            return True
        raise ConfigError(
            f"a loss of {once:.6g} for {count:g} items and of {twice:.6g} for twice as many is neither a mean over the "
            "micro-batch nor a sum divided by num_items_in_batch: micro-batches cannot add up to the batch"
        )


def _leaves(loss: torch.Tensor) -> Iterator[torch.Tensor]:
    """Tensors for which a backward from `loss` would give gradients."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [following for following, _ in node.next_functions]


def _precise(leaf: torch.Tensor) -> torch.Tensor:
    return leaf.float() if leaf.is_floating_point() else leaf


class StandIn:
    """What `compute_loss` takes for the model: a call returns what the stages have computed of these inputs.

    Args:
        model: whose attributes it has.
        own: the model's loss of (output, labels); None: it is not known.
        output: logits.
        inputs: of the micro-batch.
        number: of the micro-batch; None: its loss is computed for another purpose.

    Attributes:
        auxiliary: (weight, loss over routers), of which the loss with labels has the product; None: there is none.
    """

    auxiliary: tuple[float, torch.Tensor] | None = None

    def __init__(
        self, model: Model, own: Loss | None, output: Nest, inputs: Mapping[str, Any], number: int | None = None
    ) -> None:
        self._model, self._own, self._output, self._inputs, self._number = model, own, output, inputs, number

    def __call__(self, *args: object, **given: object) -> SequenceClassifierOutput:
        """
        Raises:
            ConfigError: the inputs are not those of the micro-batch.
        """
        known = {id(value) for value in self._inputs.values() if isinstance(value, torch.Tensor)}
        tensors = [*args, *given.values()]
        if any(isinstance(value, torch.Tensor) and id(value) not in known for value in tensors):
            raise ConfigError(
                "compute_loss calls the model on other tensors than those of the batch, which the stages have not "
                "computed: change the inputs in the data collator"
            )
        labels, loss = given.get("labels"), None
        if labels is not None:
            loss = self._loss(labels, given.get("num_items_in_batch"))
        found = SequenceClassifierOutput(loss=loss, logits=self._output)
        if self.auxiliary is not None:
            weight, found.aux_loss = self.auxiliary
            found.loss = None if loss is None else loss + weight * found.aux_loss
        return found

    def _loss(self, labels: Nest, items: object) -> torch.Tensor:
        if items is not None and isinstance(self._own, TokenLoss):
            return self._own.function(
                logits=self._output, labels=labels, vocab_size=self._own.vocabulary, num_items_in_batch=items
            )
        if self._own is None:
            name = type(self._model).__name__
            raise ConfigError(f"the loss of {name} is not known: override compute_loss, or give a compute_loss_func")
        return self._own(self._output, labels)

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)
