"""What autograd keeps of a layer, tensor by tensor, and what is left of it when named modules are computed again.

A tensor lies within the module that makes it. Of a module that is computed again neither what it saves nor its output
is kept, but its input, unless that lies within another such module (`runtime.recompute`). Where I and W run apart, the
inputs of matrix products live on until W, also those that were computed again, with the gradients that I has made.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Names = tuple[str, ...]
"""Of "recompute": regular expressions."""


class Made(NamedTuple):
    """A tensor of a forward, for one token.

    Args:
        part: what it is, for people: "norm", "attention", ...
        elements: of it.
        owner: the module that makes it, by its name within the layer; "": the layer itself.
        into: modules that take it as an input.
        saved: whether autograd keeps it where nothing is computed again.
        width: bytes of an element; 0: as wide as the weights.
        product: whether it is an input of a matrix product with weights, so that W needs it.
    """

    part: str
    elements: int
    owner: str = ""
    into: tuple[str, ...] = ()
    saved: bool = True
    width: int = 0
    product: bool = False


class Module(NamedTuple):
    """A module of a layer.

    Args:
        name: within the layer.
        kind: its class.
        products: of a projection up from a latent, multiply-adds for one token; 0: it is another.
    """

    name: str
    kind: str = "Linear"
    products: int = 0


@dataclass(frozen=True)
class Flow:
    """The tensors and modules of a layer.

    Args:
        made: tensors.
        modules: those that can be computed again; one within another has its name as a prefix.
        gradients: elements of gradients that I leaves for W.
    """

    made: tuple[Made, ...] = ()
    modules: tuple[Module, ...] = ()
    gradients: int = 0

    def again(self, names: Names) -> frozenset[str]:
        """The modules that names stand for, those within them too."""
        hit = [
            module.name
            for module in self.modules
            if any(re.search(each, module.name) or re.fullmatch(each, module.kind) for each in names)
        ]
        return frozenset(
            module.name
            for module in self.modules
            if any(module.name == each or module.name.startswith(f"{each}.") for each in hit)
        )

    def kept(self, names: Names, width: int, fp8: bool = False) -> dict[str, int]:
        """Bytes of a token that are kept from F to the backward, by parts.

        Args:
            names: of what is computed again.
            width: bytes of an element of the weights.
            fp8: inputs of matrix products are kept in one byte.
        """
        again, sizes = self.again(names), Counter[str]()
        for each in self.made:
            if each.owner not in again and (each.saved or again.intersection(each.into)):
                sizes[each.part] += _bytes(each, width, fp8)
        return dict(sizes)

    def repeated(self, names: Names, width: int, fp8: bool = False) -> tuple[int, int]:
        """What it takes to compute norms, activation functions and projections up from a latent once more, for a token:
        multiply-adds, and bytes that are read and written.

        Args: see `kept`.
        """
        again = self.again(names)
        written = sum(_bytes(each, width, fp8) for each in self.made if each.owner in again)
        read = sum(_bytes(each, width, fp8) for each in self.made if again.intersection(each.into))
        return sum(module.products for module in self.modules if module.name in again), written + read

    def pending(self, width: int, fp8: bool = False) -> int:
        """Bytes of a token that are left from I to W; the arguments are those of `kept`."""
        inputs = sum(_bytes(each, width, fp8) for each in self.made if each.product)
        return inputs + self.gradients * width


def _bytes(made: Made, width: int, fp8: bool) -> int:
    return made.elements * (1 if fp8 and made.product else made.width or width)


def unknown_names(flows: Sequence[Flow], names: Names) -> list[str]:
    """Those of `names` that match no module of any layer."""
    return [name for name in names if not any(flow.again((name,)) for flow in flows)]
