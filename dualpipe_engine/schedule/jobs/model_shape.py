"""ModelShape: the sizes of a transformer, and what a token costs in each of its layers.

Read from a Hugging Face `config.json`; the shapes of some public models are built in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import ConfigError
from ..plain_json import parse, read_text
from .activations import Flow
from .flows import NORMED, WHOLE, Tiles, block_flow, head_flow, mtp_flow, norm_flow

#: Fields of the models' published configurations.
KNOWN: dict[str, dict[str, Any]] = {
    "deepseek-v3": {  # arXiv 2412.19437, section 4.2
        "hidden_size": 7168, "num_hidden_layers": 61, "first_k_dense_replace": 3, "num_attention_heads": 128,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "vocab_size": 129280, "num_nextn_predict_layers": 1,
    },
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe", "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64,
        "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 1536, "num_experts": 128,
        "num_experts_per_tok": 8, "vocab_size": 151936,
    },
    "mixtral-8x7b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
    },
    "mixtral-8x22b": {
        "hidden_size": 6144, "num_hidden_layers": 56, "num_attention_heads": 48, "num_key_value_heads": 8,
        "intermediate_size": 16384, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32768,
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
        name: "embedding", "dense", "moe", "head", and for multi-token prediction "norm", "ahead" and "mtp".
        params: parameters, those of routed experts aside.
        experts: parameters of all routed experts.
        num_experts: how many these are.
        tied: of `params`, those that the embedding has too: a rank that holds both has them once.
        dense: multiply-adds in matrix products, routed experts aside.
        routed: the same in the routed experts of a token.
        context: multiply-adds of the attention core for each token of context.
        moved: elements that go through memory outside of matrix products in a forward.
        flows: what autograd keeps of it tensor by tensor, with weights of two bytes and of four.
        rows: elements that a token sends to the rank of an expert; 0: no experts.
        top_k: experts of a token.
        groups: the most groups of experts, such as those of one node, that a token goes to; 0: any.
        heads: of queries in its attention, and of keys and values; 0: it has none.
        exchanged: elements of a token in the exchanges of a forward between ranks that share its sequence, before the
            attention core and behind it.
        with_next: whether it stays in one stage with the next layer, see `schedule.cuts.together`.
    """

    name: str
    params: int
    experts: int = 0
    num_experts: int = 0
    tied: int = 0
    dense: int = 0
    routed: int = 0
    context: int = 0
    moved: int = 0
    flows: tuple[Flow, Flow] = (Flow(), Flow())
    rows: int = 0
    top_k: int = 0
    groups: int = 0
    heads: tuple[int, int] = (0, 0)
    exchanged: int = 0
    with_next: bool = False

    def flow(self, width: int) -> Flow:
        """What autograd keeps, with weights of `width` bytes."""
        return self.flows[width == 4]


@dataclass(frozen=True)
class ModelShape:
    """A transformer as a list of layers, in the order of `dualpipe_engine.models.transformer.layers`.

    Args:
        name: for people.
        hidden: width of what passes between layers.
        layers: all of them.
        own: they are those of `dualpipe_engine.models`, not those of transformers.
        shared: ranks that share each sequence.
    """

    name: str
    hidden: int
    layers: tuple[LayerShape, ...]
    own: bool = False
    shared: int = 1

    @property
    def parameters(self) -> int:
        return sum(layer.params + layer.experts - layer.tied for layer in self.layers)

    @property
    def active(self) -> int:
        """Parameters in matrix products of a token, as often as they are used."""
        return sum(layer.dense + layer.routed for layer in self.layers)


def held_params(layers: Sequence[LayerShape]) -> int:
    """Parameters of a rank that holds these layers, routed experts aside; what is tied counts once."""
    tied = [layer.tied for layer in layers if layer.tied]
    own = sum(layer.params for layer in layers) - sum(tied)
    return own + (max(tied) if tied and all(layer.name != "embedding" for layer in layers) else 0)


def load_shape(model: str, own: bool = False, shared: int = 1, tiles: Tiles = WHOLE) -> ModelShape:
    """The shape of a built-in model, or of a Hugging Face `config.json` or the folder that has one.

    Args:
        model: name, file or folder.
        own: with the layers of `dualpipe_engine.models`, not those of transformers.
        shared: ranks that share each sequence. Layers of multi-token prediction, which look beyond the part of a rank,
            are left out then.
        tiles: what runs a piece of the sequence at a time.

    Raises:
        ConfigError: the name is unknown, the file is no such configuration, or `shared` is below 1.
    """
    if shared < 1:
        raise ConfigError(f"sequences are shared by 1 rank or more, not {shared}: choose --sequence-parallel")
    if model in KNOWN:
        return shape_of(model, KNOWN[model], own, shared, tiles)
    if Path(model).is_dir():
        model = str(Path(model) / "config.json")
    if not model.endswith(".json"):
        near = get_close_matches(model, KNOWN, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"unknown model {model!r}: did you mean {near!r}? There are {', '.join(KNOWN)}, or a config.json of "
            "Hugging Face, or its folder"
        )
    try:
        config = parse(read_text(model))
        return shape_of(Path(model).parent.name or model, config, own, shared, tiles)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{model} is no configuration of a transformer: {type(error).__name__} {error}") from None


def shape_of(
    name: str, config: Mapping[str, Any], own: bool = False, shared: int = 1, tiles: Tiles = WHOLE
) -> ModelShape:
    """The shape that the fields of a Hugging Face configuration describe; for the rest see `load_shape`."""
    if shared > 1:
        config = {**config, **dict.fromkeys(_AHEAD, 0)}
    hidden, count = int(config["hidden_size"]), int(config["num_hidden_layers"])
    dense, moe = _dense_block(config, own, shared, tiles), _moe_block(config, own, shared, tiles)
    blocks = [moe if moe is not None and _has_experts(config, number) else dense for number in range(count)]
    size = int(config["vocab_size"])
    table = size * hidden
    depth = _first(config, *_AHEAD)
    tied = table if config.get("tie_word_embeddings") else 0
    head = LayerShape(
        "head",
        table + (0 if depth else hidden),
        tied=tied,
        dense=(1 + depth) * table,
        moved=(1 + depth) * 2 * size,
        flows=(head_flow(hidden, size, depth, own, 2, tiles), head_flow(hidden, size, depth, own, 4, tiles)),
    )
    further: list[LayerShape] = []
    if depth:
        further.append(
            LayerShape(
                "norm",
                hidden,
                flows=(norm_flow(hidden, own, 2, tiles), norm_flow(hidden, own, 4, tiles)),
                with_next=True,
            )
        )
        further.append(LayerShape("ahead", table, tied=table, moved=2 * depth * hidden, with_next=True))
        further += [_mtp_block(blocks[-1], hidden)] * depth
    embedding = LayerShape("embedding", table, moved=2 * hidden)
    return ModelShape(name, hidden, (embedding, *blocks, *further, head), own, shared)


#: Keys of how many further tokens are predicted.
_AHEAD = ("num_mtp_layers", "num_nextn_predict_layers")


def _dense_block(config: Mapping[str, Any], own: bool, shared: int, tiles: Tiles) -> LayerShape:
    hidden, width = int(config["hidden_size"]), int(config.get("intermediate_size") or 0)
    attention = _attention(config, own, shared)
    product = 3 * hidden * width
    return LayerShape(
        "dense",
        attention.matrices + attention.vectors + product + 2 * hidden + (2 * width + hidden) * _on(config, "mlp_bias"),
        dense=attention.matrices + product,
        context=attention.context,
        moved=10 * hidden + attention.moved + 4 * width,
        flows=(block_flow(config, 0, own, 2, shared, tiles), block_flow(config, 0, own, 4, shared, tiles)),
        heads=attention.heads,
        exchanged=attention.exchanged,
    )


def _moe_block(config: Mapping[str, Any], own: bool, shared: int, tiles: Tiles) -> LayerShape | None:
    """A block with experts; None: the model has none."""
    hidden = int(config["hidden_size"])
    experts = _first(config, "n_routed_experts", "num_local_experts", "num_experts")
    if not experts:
        return None
    top_k, common = int(config["num_experts_per_tok"]), int(config.get("n_shared_experts") or 0)
    given = config.get("moe_intermediate_size") if config.get("model_type") != "mixtral" else None
    width = int(given or config.get("intermediate_size") or 0)
    expert, attention = 3 * hidden * width, _attention(config, own, shared)
    matrices = attention.matrices + common * expert + experts * hidden
    return LayerShape(
        "moe",
        matrices + attention.vectors + 2 * hidden,
        experts=experts * expert,
        num_experts=experts,
        dense=matrices,
        routed=top_k * expert,
        context=attention.context,
        moved=10 * hidden + attention.moved + 4 * top_k * hidden + 4 * (top_k + common) * width,
        flows=(
            block_flow(config, experts, own, 2, shared, tiles),
            block_flow(config, experts, own, 4, shared, tiles),
        ),
        heads=attention.heads,
        exchanged=attention.exchanged,
        rows=hidden,
        top_k=top_k,
        groups=int(config.get("topk_group") or 0) if int(config.get("n_group") or 1) > 1 else 0,
    )


def _has_experts(config: Mapping[str, Any], number: int) -> bool:
    """Whether block `number` is one with experts."""
    if number < int(config.get("first_k_dense_replace") or 0) or number in (config.get("mlp_only_layers") or ()):
        return False
    return (number + 1) % int(config.get("decoder_sparse_step") or 1) == 0


def _mtp_block(block: LayerShape, hidden: int) -> LayerShape:
    """A block that is entered from two streams, which are joined by a projection, and left by a norm of its own."""
    return replace(
        block,
        name="mtp",
        params=block.params + 2 * hidden * hidden + 3 * hidden,
        dense=block.dense + 2 * hidden * hidden,
        flows=(mtp_flow(block.flows[0], hidden, 2), mtp_flow(block.flows[1], hidden, 4)),
        with_next=True,
    )


class _Attention(NamedTuple):
    """Of one attention: parameters of matrices and of vectors; the rest as in `LayerShape`."""

    matrices: int
    vectors: int
    context: int
    moved: int
    heads: tuple[int, int]
    exchanged: int


def _attention(config: Mapping[str, Any], own: bool, shared: int) -> _Attention:
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    kind, biased = config.get("model_type"), _on(config, "attention_bias")
    if rank := int(config.get("kv_lora_rank") or 0):  # multi-head latent attention
        nope, rope, value = (int(config[key]) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        query_rank, query = int(config.get("q_lora_rank") or 0), heads * (nope + rope)
        matrices = hidden * query_rank + query_rank * query if query_rank else hidden * query
        matrices += hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
        # Ours exchange keys and values before they are put together with the one rotary key, which all ranks need.
        parts = [(heads, nope + value), (1, rope)] if own else [(heads, nope + rope), (heads, value)]
        exchanged = _exchanged([(heads, nope + rope), *parts], heads * value, shared)
        return _Attention(
            matrices,
            query_rank + rank + (query_rank + rank + rope + hidden) * biased,
            heads * (nope + rope + value),
            2 * heads * (nope + rope) * 2 + 2 * heads * value + _COPIES * exchanged,
            (heads, heads),
            exchanged,
        )
    size = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    queries, keys = heads * size, kv_heads * size
    vectors = (queries + 2 * keys) * max(biased, kind in _BIASED) + hidden * biased
    if kind in NORMED:
        vectors += 2 * size
    exchanged = _exchanged([(heads, size), (kv_heads, size), (kv_heads, size)], queries, shared)
    return _Attention(
        hidden * (queries + 2 * keys) + queries * hidden,
        vectors,
        2 * queries,
        2 * (queries + 2 * keys) + 2 * queries + _COPIES * exchanged,
        (heads, kv_heads),
        exchanged,
    )


#: Elements that packing and unpacking read and write for one that is exchanged.
_COPIES = 4


def _exchanged(parts: Sequence[tuple[int, int]], mixed: int, shared: int) -> int:
    """Elements of a token in two exchanges.

    Args:
        parts: heads, and width of each; fewer heads than ranks are repeated.
        mixed: what comes back.
        shared: ranks.
    """
    return sum(max(heads, shared) * width for heads, width in parts) + mixed if shared > 1 else 0


#: Models whose queries, keys and values have biases, whatever they say.
_BIASED = ("qwen2", "qwen2_moe")


def _on(config: Mapping[str, Any], key: str) -> int:
    return int(bool(config.get(key)))


def _first(config: Mapping[str, Any], *keys: str) -> int:
    return next((int(config[key]) for key in keys if config.get(key)), 0)
