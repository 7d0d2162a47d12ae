"""Experts: the feed-forward layers of one rank's share, computed together over rows sorted by expert."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ConfigError
from .config import MoEConfig


class Sizes:
    """Rows of each expert of this rank.

    Args:
        device: [experts] int64.
        known: the same on the host; None: nobody has read them yet.
    """

    def __init__(self, device: Tensor, known: list[int] | None = None) -> None:
        self.device, self.known = device, known

    def host(self) -> list[int]:
        """The sizes on the host, which waits for the device unless they are known."""
        if self.known is None:
            self.known = self.device.tolist()
        return self.known


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202) on `[..., hidden]`."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, 2 * inner, bias=False)
        self.activation = Gated()
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.activation(self.up(x)))
        return out


class Gated(nn.Module):
    """The activation function of SwiGLU, `[..., 2 * inner]` to `[..., inner]`."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return functional.silu(gate) * value


class Experts(nn.Module):
    """The routed experts of one rank, of `experts / expert_parallel`.

    Each expert is drawn from a random state of its own, so that the weights do not depend on who holds them. A state
    dict is that of this rank, unless the layer is `whole`; one of all experts is cut when it is loaded.

    Args:
        config: sizes.
        rank: of the ranks that share the experts, the number of this one.

    Attributes:
        group: the ranks that share the experts; None before `connect` and where one rank has all.
        multiply_adds: of a token, for estimates.
    """

    def __init__(self, config: MoEConfig, rank: int) -> None:
        super().__init__()
        self.num_experts, self.ep_size, self.rank = config.experts, config.expert_parallel, rank
        self.num_local = config.experts // config.expert_parallel
        self.expert_group_name = f"ep_size_{self.ep_size}"
        self.group: dist.ProcessGroup | None = None
        self.multiply_adds = config.top_k * 3 * config.hidden * config.expert_inner
        self._whole: dict[str, Tensor] = {}
        self.activation = Gated()
        self.up = nn.Parameter(torch.empty(self.num_local, config.hidden, 2 * config.expert_inner))
        self.down = nn.Parameter(torch.empty(self.num_local, config.expert_inner, config.hidden))
        seed = int(torch.randint(1 << 40, ()))
        for local in range(self.num_local):
            generator = torch.Generator().manual_seed(seed + rank * self.num_local + local)
            for param in (self.up, self.down):
                std = param.shape[1] ** -0.5 if config.init_std is None else config.init_std
                drawn = torch.randn(param.shape[1:], generator=generator) * std
                param.data[local].copy_(drawn)
        if self.ep_size > 1:
            for param in (self.up, self.down):  # what DeepSpeed knows experts by
                param.allreduce, param.group_name = False, self.expert_group_name  # type: ignore[attr-defined]

    def connect(self, group: dist.ProcessGroup) -> None:
        """Take the ranks that share the experts; raises what `check` does."""
        self.check(group)
        self.group = group

    def check(self, group: dist.ProcessGroup) -> None:
        """Compare the share with the place of this rank in `group`.

        Raises:
            ConfigError: this rank holds the share of another.
        """
        if dist.get_rank(group) != self.rank:
            raise ConfigError(
                f"rank {dist.get_rank()} is number {dist.get_rank(group)} of the {self.ep_size} ranks that share the "
                f"experts, but was built as number {self.rank}: pass its data-parallel rank as `replica` to layers()"
            )

    def forward(self, rows: Tensor, sizes: Sizes) -> Tensor:
        """Apply the experts.

        Args:
            rows: [sum of sizes, hidden], those of the first expert first.
            sizes: rows of each expert of this rank.
        """
        if not len(rows) or not _spoils_empty_groups(rows, self.up):
            return self._feed(rows, sizes)
        places, roomy = _apart(sizes, len(rows))
        padded = rows.new_zeros(len(rows) + self.num_local, rows.shape[1]).index_copy(0, places, rows)
        return self._feed(padded, roomy).index_select(0, places)

    def _feed(self, rows: Tensor, sizes: Sizes) -> Tensor:
        return _grouped(self.activation(_grouped(rows, self.up, sizes)), self.down, sizes)

    @contextmanager
    def whole(self, keep: bool) -> Iterator[None]:
        """Let `state_dict` hold all experts, `[num_experts, ...]` in host memory. Collective over `group`.

        Args:
            keep: whether this rank needs them.
        """
        for name, param in self.named_parameters() if self.group is not None else ():
            parts = [torch.empty_like(param) for _ in range(self.ep_size)]
            dist.all_gather(parts, param.detach().contiguous(), group=self.group)
            if keep:
                self._whole[name] = torch.cat([part.cpu() for part in parts])
        try:
            yield
        finally:
            self._whole.clear()

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._whole.items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name, _ in self.named_parameters():
            given = state_dict.get(prefix + name)
            if given is not None and len(given) == self.num_experts:
                state_dict[prefix + name] = given[self.rank * self.num_local :][: self.num_local]
        super()._load_from_state_dict(state_dict, prefix, *args)


def _grouped(rows: Tensor, weight: Tensor, sizes: Sizes) -> Tensor:
    """`rows [n, in]`, of which `sizes` belong to each expert, times `weight [experts, in, out]`."""
    if len(rows) and has_grouped_mm(rows, weight):
        return torch._grouped_mm(rows, weight, offs=sizes.device.cumsum(0).to(torch.int32))
    parts = [part @ weight[index] for index, part in enumerate(rows.split(sizes.host()))]
    return torch.cat(parts)


def _apart(sizes: Sizes, count: int) -> tuple[Tensor, Sizes]:
    """Room for a row of zeros behind the rows of each expert: where the `count` rows go (int64), and the sizes then."""
    here = sizes.device
    expert = torch.arange(len(here), device=here.device).repeat_interleave(here, output_size=count)
    known = None if sizes.known is None else [size + 1 for size in sizes.known]
    return torch.arange(count, device=here.device) + expert, Sizes(here + 1, known)


def has_grouped_mm(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies groups of rows in one call here, without reading their sizes on the host.

    With rows of a multiple of 16 bytes these are bf16 on CUDA, of compute capability 9 and 10; others are multiplied
    one by one after a wait. On the CPU floats of 2 and 4 bytes.
    """
    if any(size * rows.element_size() % 16 for size in weight.shape[1:]):
        return False
    if rows.device.type == "cpu":
        return rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if rows.device.type != "cuda" or rows.dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(rows.device)[0] in (9, 10)


def _spoils_empty_groups(rows: Tensor, weight: Tensor) -> bool:
    """Whether the weight gradient of an expert without rows may be anything but zero (pytorch issue 172439)."""
    if rows.device.type != "cuda" or not has_grouped_mm(rows, weight):
        return False
    return torch.cuda.get_device_capability(rows.device)[0] == 10
