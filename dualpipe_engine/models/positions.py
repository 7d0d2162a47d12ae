"""Rotary positions (RoFormer, arXiv 2104.09864), and YaRN, which stretches them (arXiv 2309.00071)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """How positions reach beyond the length of pre-training (DeepSeek-V3 report, section 4.3).

    Args:
        factor: how much longer sequences may be.
        length: longest sequence of pre-training, tokens.
        beta_fast: frequencies that turn at least that often within `length` stay.
        beta_slow: those that turn at most that often are divided by `factor`; between the two is a ramp.
        mscale: of the rotated parts, see `attention_factor`.
        mscale_all_dim: of the whole attention scores; 0: nothing.
        attention_factor: what the rotated parts are multiplied with; None: what follows from the two above.
        truncate: whether the ends of the ramp are whole numbers.

    Raises:
        ConfigError: the factor is below 1, or the length below 1.
    """

    factor: float
    length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.factor < 1 or self.length < 1:
            raise ConfigError(f"factor and length of yarn must be 1 or more, got {self.factor} and {self.length}")

    def _magnitude(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def rotary_scale(self) -> float:
        """What cosines and sines are multiplied with."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    def softmax_scale(self, width: int) -> float:
        """What the products of queries and keys of that width are multiplied with."""
        scale: float = width**-0.5
        return scale * self._magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else scale

    def stretched(self, frequency: Tensor, theta: float) -> Tensor:
        """The frequencies `[width / 2]`, those of slow turns divided by `factor`."""
        width = 2 * len(frequency)

        def dimension(turns: float) -> float:
            return width * math.log(self.length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        places = torch.arange(len(frequency), device=frequency.device, dtype=frequency.dtype)
        ramp = ((places - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        return frequency / self.factor * ramp + frequency * (1 - ramp)


class Rotary(nn.Module):
    """Turns pairs of values by angles that grow with the position.

    Args:
        theta: base of the frequencies.
        interleaved: whether neighbours are the pairs, or the first half is paired with the second.
        yarn: how positions reach beyond the length of pre-training; None: they do not.
    """

    def __init__(self, theta: float, interleaved: bool, yarn: Yarn | None) -> None:
        super().__init__()
        self.theta, self.interleaved, self.yarn = theta, interleaved, yarn

    def forward(self, x: Tensor) -> Tensor:
        """Turn `x [batch, heads, length, width]`; the first of each pair go before the second ones."""
        half = x.shape[-1] // 2
        precise = torch.promote_types(x.dtype, torch.float32)
        frequency = self.theta ** (-torch.arange(half, device=x.device, dtype=precise) / half)
        if self.yarn is not None:
            frequency = self.yarn.stretched(frequency, self.theta)
        angle = torch.arange(x.shape[-2], device=x.device, dtype=precise)[:, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        if self.yarn is not None:
            cos, sin = cos * self.yarn.rotary_scale, sin * self.yarn.rotary_scale
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        first, second = (x[..., 0::2], x[..., 1::2]) if self.interleaved else (x[..., :half], x[..., half:])
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
