"""Sizes and choices of the mixture-of-experts transformer."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A decoder-only transformer with experts, after DeepSeek-V3 (arXiv 2412.19437, section 2.1).

    Args:
        vocabulary: tokens.
        hidden: width of the residual stream.
        blocks: transformer blocks.
        dense_blocks: of these, the first that have a plain feed-forward layer in place of experts.
        heads: attention heads.
        attention: "latent" (multi-head latent attention) or "grouped" (grouped-query attention).
        kv_heads: key and value heads of "grouped"; None for as many as `heads`.
        head: width of a head (of "latent": of the part without position).
        rotary: width of the part with position, for "latent".
        kv_rank: width of the compressed keys and values of "latent".
        q_rank: width of the compressed queries of "latent"; None leaves queries uncompressed.
        theta: base of the rotary frequencies.
        dense_inner: inner width of the plain feed-forward layers.
        experts: routed experts of a block.
        top_k: experts that a token goes to.
        shared_experts: experts that every token goes to.
        expert_inner: inner width of an expert.
        expert_parallel: ranks that share the experts of a block; a divisor of the pipeline's replicas.
        balancing: "bias" (sigmoid gate, auxiliary-loss-free) or "loss" (softmax gate, auxiliary loss).
        bias_rate: what one step adds to or takes from a bias.
        loss_weight: factor on the auxiliary loss.
        routed_scale: factor on the gate weights.

    Raises:
        ConfigError: sizes do not fit together.
    """

    vocabulary: int = 256
    hidden: int = 128
    blocks: int = 4
    dense_blocks: int = 0
    heads: int = 4
    attention: str = "latent"
    kv_heads: int | None = None
    head: int = 32
    rotary: int = 16
    kv_rank: int = 32
    q_rank: int | None = None
    theta: float = 10_000.0
    dense_inner: int = 512
    experts: int = 8
    top_k: int = 2
    shared_experts: int = 1
    expert_inner: int = 128
    expert_parallel: int = 1
    balancing: str = "bias"
    bias_rate: float = 0.001
    loss_weight: float = 0.01
    routed_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (("attention", ("latent", "grouped")), ("balancing", ("bias", "loss"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.experts % self.expert_parallel:
            raise ConfigError(f"{self.experts} experts cannot be shared by {self.expert_parallel} ranks evenly")
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(f"top_k must be from 1 to the {self.experts} experts, got {self.top_k}")
        if self.heads % (self.kv_heads or self.heads):
            raise ConfigError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        turning = "rotary" if self.attention == "latent" else "head"
        if getattr(self, turning) % 2:
            raise ConfigError(f"{turning} must be even, got {getattr(self, turning)}: rotary positions turn pairs")
