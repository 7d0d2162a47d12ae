"""Sizes and choices of the mixture-of-experts transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .positions import Yarn

if TYPE_CHECKING:
    from transformers import DeepseekV3Config


#: Field -> the least whole number that it can be.
_WHOLE = {
    "vocabulary": 1,
    "hidden": 1,
    "blocks": 1,
    "dense_blocks": 0,
    "heads": 1,
    "kv_heads": 1,
    "head": 1,
    "value_head": 1,
    "rotary": 0,
    "kv_rank": 1,
    "q_rank": 1,
    "dense_inner": 1,
    "experts": 1,
    "top_k": 1,
    "shared_experts": 0,
    "expert_inner": 1,
    "expert_parallel": 1,
    "groups": 1,
    "kept_groups": 1,
    "mtp_depth": 0,
}
#: Field -> the least number that it can be.
_LEAST = {"theta": 1, "norm_eps": 0, "init_std": 0, "bias_rate": 0, "sequence_loss": 0, "loss_weight": 0}
#: Field -> what it goes along with: another field and its value.
_FOR = {
    "kv_heads": ("attention", "grouped"),
    "value_head": ("attention", "latent"),
    "q_rank": ("attention", "latent"),
    "bias_rate": ("balancing", "bias"),
    "sequence_loss": ("balancing", "bias"),
    "loss_weight": ("balancing", "loss"),
}


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A decoder-only transformer with experts, after DeepSeek-V3 (arXiv 2412.19437, section 2).

    Args:
        vocabulary: tokens.
        hidden: width of the residual stream.
        blocks: transformer blocks.
        dense_blocks: of these, the first that have a plain feed-forward layer in place of experts.
        heads: attention heads.
        attention: "latent" (multi-head latent attention) or "grouped" (grouped-query attention).
        kv_heads: key and value heads of "grouped"; None for as many as `heads`.
        head: width of a head (of "latent": of the part without position).
        value_head: width of a head's values, for "latent"; None for as wide as `head`.
        rotary: width of the part with position, for "latent".
        interleaved: whether neighbours are the pairs that rotary positions turn, as in published weights of
            DeepSeek-V3, or the first half is paired with the second.
        yarn: how positions reach beyond the length of pre-training; None: they do not.
        kv_rank: width of the compressed keys and values of "latent".
        q_rank: width of the compressed queries of "latent"; None leaves queries uncompressed.
        theta: base of the rotary frequencies.
        norm_eps: added to the mean square in the norms; None for torch's default, the machine epsilon.
        init_std: standard deviation of fresh matrices; None for that of each kind of layer.
        dense_inner: inner width of the plain feed-forward layers.
        experts: routed experts of a block.
        top_k: experts that a token goes to.
        shared_experts: experts that every token goes to.
        expert_inner: inner width of an expert.
        expert_parallel: ranks that share the experts of a block; a divisor of the pipeline's replicas.
        groups: groups of experts, such as those of one node; a token goes to experts of `kept_groups` of them only.
        kept_groups: the best groups of a token, by the sum of their two highest biased scores.
        balancing: "bias" (sigmoid gate, auxiliary-loss-free) or "loss" (softmax gate, auxiliary loss).
        bias_rate: what one step adds to or takes from a bias.
        sequence_loss: factor on the balance loss of single sequences that goes along with "bias".
        loss_weight: factor on the auxiliary loss of "loss".
        routed_scale: factor on the gate weights.
        normalised: whether the gate weights of a token add up to 1 before that; None: where it has more than one
            expert.
        mtp_depth: further tokens that each position predicts, by one more block each (multi-token prediction).

    Raises:
        ConfigError: a number is too small, sizes do not fit together, or a field could have no effect beside another.
    """

    vocabulary: int = 256
    hidden: int = 128
    blocks: int = 4
    dense_blocks: int = 0
    heads: int = 4
    attention: str = "latent"
    kv_heads: int | None = None
    head: int = 32
    value_head: int | None = None
    rotary: int = 16
    interleaved: bool = False
    yarn: Yarn | None = None
    kv_rank: int = 32
    q_rank: int | None = None
    theta: float = 10_000.0
    norm_eps: float | None = None
    init_std: float | None = None
    dense_inner: int = 512
    experts: int = 8
    top_k: int = 2
    shared_experts: int = 1
    expert_inner: int = 128
    expert_parallel: int = 1
    groups: int = 1
    kept_groups: int = 1
    balancing: str = "bias"
    bias_rate: float = 0.001
    sequence_loss: float = 0.0
    loss_weight: float = 0.01
    routed_scale: float = 1.0
    normalised: bool | None = None
    mtp_depth: int = 0

    def __post_init__(self) -> None:
        for name, known in (("attention", ("latent", "grouped")), ("balancing", ("bias", "loss"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        self._check_numbers()
        if self.experts % self.expert_parallel:
            raise ConfigError(f"{self.experts} experts cannot be shared by {self.expert_parallel} ranks evenly")
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(f"top_k must be from 1 to the {self.experts} experts, got {self.top_k}")
        if self.heads % (self.kv_heads or self.heads):
            raise ConfigError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        turning = "rotary" if self.attention == "latent" else "head"
        if getattr(self, turning) % 2:
            raise ConfigError(f"{turning} must be even, got {getattr(self, turning)}: rotary positions turn pairs")
        if self.dense_blocks > self.blocks:
            raise ConfigError(
                f"{self.dense_blocks} dense_blocks are more than the {self.blocks} blocks of which they are"
            )
        self._check_groups()

    def _check_numbers(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if value == field.default and type(value) is type(field.default):
                continue
            if name in _WHOLE and (not isinstance(value, Integral) or isinstance(value, bool) or value < _WHOLE[name]):
                raise ConfigError(f"{name} must be a whole number from {_WHOLE[name]}, got {value!r}")
            if name in _LEAST and (
                not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= _LEAST[name]
            ):
                raise ConfigError(f"{name} must be a number from {_LEAST[name]}, got {value!r}")
            if name in ("interleaved", "normalised") and not isinstance(value, bool):
                raise ConfigError(f"{name} must be true or false, got {value!r}")
            if value and name in _FOR and getattr(self, _FOR[name][0]) != _FOR[name][1]:
                beside, wanted = _FOR[name]
                raise ConfigError(f'{name} has no effect but with {beside} "{wanted}": leave it out, or set {beside}')

    def _check_groups(self) -> None:
        if self.groups == 1 and self.kept_groups == 1:
            return
        size, left = divmod(self.experts, max(self.groups, 1))
        if left or size < 2 or not 1 <= self.kept_groups <= self.groups:
            raise ConfigError(
                f"{self.groups} groups, of which {self.kept_groups} are kept, do not fit {self.experts} experts: "
                "groups are equal, have two experts or more, and kept_groups is from 1 to groups"
            )
        if self.balancing != "bias":
            raise ConfigError('groups are chosen by biased scores: balancing must be "bias"')
        if self.kept_groups * size < self.top_k:
            raise ConfigError(
                f"{self.kept_groups} groups of {size} experts are too few for top_k {self.top_k}: raise kept_groups"
            )

    @property
    def adds_loss(self) -> bool:
        """Whether an auxiliary loss travels down the pipeline."""
        return self.balancing == "loss" or self.sequence_loss > 0

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> MoEConfig:
        """From what `dataclasses.asdict` has made of one."""
        yarn = fields.get("yarn")
        return cls(**{**fields, "yarn": None if yarn is None else Yarn(**yarn)})

    @classmethod
    def from_hf(cls, config: DeepseekV3Config, **choices: Any) -> MoEConfig:
        """What a configuration of transformers' DeepSeek-V3 says.

        Args:
            config: the model's.
            choices: fields that it says nothing of, such as `expert_parallel` and `sequence_loss`, or that shall
                differ.

        Raises:
            ConfigError: it asks for something that these layers do not do; it is named.
        """
        from .hf_config import fields_of

        return cls(**(fields_of(config) | choices))
