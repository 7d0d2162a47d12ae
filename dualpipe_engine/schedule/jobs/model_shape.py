"""ModelShape: the sizes of a transformer, and what a token costs in each of its layers.

Read from a Hugging Face `config.json`; the shapes of some public models are built in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..plain_json import parse

#: Fields of the models' published configurations.
KNOWN: dict[str, dict[str, Any]] = {
    "deepseek-v3": {  # arXiv 2412.19437, section 4.2
        "hidden_size": 7168, "num_hidden_layers": 61, "first_k_dense_replace": 3, "num_attention_heads": 128,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "topk_group": 4, "vocab_size": 129280, "num_nextn_predict_layers": 1,
    },
    "qwen3-235b-a22b": {
        "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4,
        "head_dim": 128, "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8,
        "vocab_size": 151936,
    },
    "mixtral-8x7b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
    },
    "llama-3-70b": {
        "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 28672, "vocab_size": 128256,
    },
}  # fmt: skip


@dataclass(frozen=True)
class LayerShape:
    """One layer; costs are those of one token.

    Args:
        name: "dense", "moe", "embedding", "head", or "shared head": one whose weights are another layer's.
        dense: parameters that every token uses.
        experts: parameters of all routed experts.
        routed: parameters of the routed experts that a token uses.
        context: multiply-adds of the attention core for each token of context.
        moved: elements that go through memory outside of matrix products in a forward.
        kept: elements kept for the backward, where norms, up-projections and activation functions are computed again.
        rows: elements that a token sends to each node of its experts; 0: no experts.
        fan_out: the most nodes that a token is sent to.
    """

    name: str
    dense: int
    experts: int = 0
    routed: int = 0
    context: int = 0
    moved: int = 0
    kept: int = 0
    rows: int = 0
    fan_out: int = 0

    @property
    def held(self) -> int:
        """Parameters that exist for this layer."""
        return self.experts + (0 if self.name == "shared head" else self.dense)


@dataclass(frozen=True)
class ModelShape:
    """A transformer as a list of layers, the multi-token prediction module (if any) as one layer and one more head."""

    name: str
    hidden: int
    layers: tuple[LayerShape, ...]

    @property
    def parameters(self) -> int:
        return sum(layer.held for layer in self.layers)

    @property
    def active(self) -> int:
        """Parameters in matrix products of a token."""
        return sum(layer.dense + layer.routed for layer in self.layers if layer.name != "embedding")


def load_shape(model: str) -> ModelShape:
    """The shape of a built-in model, or of a Hugging Face `config.json`.

    Raises:
        ConfigError: the name is unknown, or the file is no such configuration.
    """
    if model in KNOWN:
        return shape_of(model, KNOWN[model])
    if not model.endswith(".json"):
        near = get_close_matches(model, KNOWN, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"unknown model {model!r}: did you mean {near!r}? There are {', '.join(KNOWN)}, or a config.json of "
            "Hugging Face"
        )
    try:
        config = parse(Path(model).read_text())
        return shape_of(Path(model).parent.name or model, config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{model} is no configuration of a transformer: {type(error).__name__} {error}") from None


def shape_of(name: str, config: Mapping[str, Any]) -> ModelShape:
    """The shape that the fields of a Hugging Face configuration describe."""
    hidden, count = int(config["hidden_size"]), int(config["num_hidden_layers"])
    attention, context, heads_moved, heads_kept = _attention(config)
    experts = _first(config, "n_routed_experts", "num_local_experts", "num_experts")
    dense_width = int(config.get("intermediate_size") or 0)
    first_moe = int(config.get("first_k_dense_replace") or 0) if experts else count
    dense = LayerShape(
        "dense",
        attention + 3 * hidden * dense_width,
        context=context,
        moved=10 * hidden + heads_moved + 4 * dense_width,
        kept=3 * hidden + heads_kept + 2 * dense_width,
    )
    blocks = [dense] * first_moe
    if experts:
        top_k = int(config["num_experts_per_tok"])
        shared = int(config.get("n_shared_experts") or 0)
        width = int(config.get("moe_intermediate_size") or dense_width)
        expert = 3 * hidden * width
        moe = LayerShape(
            "moe",
            attention + shared * expert + experts * hidden,
            experts=experts * expert,
            routed=top_k * expert,
            context=context,
            moved=10 * hidden + heads_moved + 4 * top_k * hidden + 4 * (top_k + shared) * width,
            kept=3 * hidden + heads_kept + top_k * hidden + 2 * (top_k + shared) * width,
            rows=hidden,
            fan_out=int(config.get("topk_group") or top_k),
        )
        blocks += [moe] * (count - first_moe)
    vocabulary = int(config["vocab_size"]) * hidden
    head = LayerShape("head", vocabulary, moved=2 * int(config["vocab_size"]), kept=hidden)
    shared_head = replace(head, name="shared head")
    extra = int(config.get("num_nextn_predict_layers") or 0)
    return ModelShape(
        name,
        hidden,
        (LayerShape("embedding", vocabulary, moved=2 * hidden), *blocks, head, *([blocks[-1], shared_head] * extra)),
    )


def _attention(config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Parameters, multiply-adds for each token of context, elements moved and elements kept of one attention."""
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    if rank := int(config.get("kv_lora_rank") or 0):  # multi-head latent attention
        nope, rope, value = (int(config[key]) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        query_rank = int(config.get("q_lora_rank") or 0)
        query = heads * (nope + rope)
        params = hidden * query_rank + query_rank * query if query_rank else hidden * query
        params += hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
        return (
            params,
            heads * (nope + rope + value),
            2 * heads * (nope + rope) * 2 + 2 * heads * value,
            (query_rank + rank + rope + heads * value),
        )
    size = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    params = hidden * size * (heads + 2 * kv_heads) + heads * size * hidden
    moved = 2 * size * (heads + 2 * kv_heads) + 2 * heads * size
    return params, 2 * heads * size, moved, size * (2 * heads + 2 * kv_heads)


def _first(config: Mapping[str, Any], *keys: str) -> int:
    return next((int(config[key]) for key in keys if config.get(key)), 0)
