"""The tensors that autograd keeps of known layers: transformers' families, and the layers of `dualpipe_engine.models`.

Attention is memory-efficient, loads of experts are even, norms are made of single operations as on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .activations import Flow, Made, Module

#: What `"recompute": true` stands for in our layers; transformers' list nothing.
OWN_RECOMPUTED = ("norm", "activation", r"attention\.(expand|turn|query\.[12])")

#: The same of transformers' layers.
TRANSFORMERS_RECOMPUTED = ("norm", "act_fn", "(q|kv)_b_proj")


OF_LOSS = "loss"  #: the part that the loss keeps: logits, or with tiles what is projected to them

#: Models whose queries and keys have norms of their own.
NORMED = ("qwen3", "qwen3_moe")


class Tiles(NamedTuple):
    """What runs a piece of the sequence at a time, and is computed again: of each piece only the input is kept, and W
    has nothing left to do (`runtime.tiles`).

    Args:
        loss: the projection to the vocabulary, with the loss.
        mlp: feed-forward layers that send no tokens to experts.
    """

    loss: bool = False
    mlp: bool = False


WHOLE = Tiles()


class Names(NamedTuple):
    """What modules are called."""

    norms: tuple[str, str]
    attention: str
    feed: str
    experts: str
    shared: str
    router: str


TRANSFORMERS = Names(
    ("input_layernorm", "post_attention_layernorm"),
    "self_attn",
    "mlp",
    "mlp.experts",
    "mlp.shared_experts",
    "mlp.gate",
)
OWN = Names(("norm1", "norm2"), "attention", "mlp", "experts", "shared", "router")


def block_flow(
    config: Mapping[str, Any], experts: int, own: bool, width: int, shared: int = 1, tiles: Tiles = WHOLE
) -> Flow:
    """A block.

    Args:
        config: a Hugging Face configuration.
        experts: routed ones; 0: a plain feed-forward layer.
        own: a block of `dualpipe_engine.models`.
        width: bytes of an element of the weights; fp32 makes no copies for norms.
        shared: ranks that share each sequence; a token is then one of the rank's part.
        tiles: what runs in pieces.
    """
    names, hidden = OWN if own else TRANSFORMERS, int(config["hidden_size"])
    attention = _latent if config.get("kv_lora_rank") else _grouped
    first, second = names.norms
    entries = names.attention, *(f"{names.attention}.{each}" for each in _ENTRIES[own])
    feed = _experts(config, experts, names, own, width, tiles) if experts else _feed(config, names, own, tiles)
    stream = [Made("stream", hidden, into=(name,), saved=width == 4) for name in names.norms]
    inner = attention(config, names, own, width, shared)
    return Flow(
        (
            *stream,
            *norm(first, hidden, entries, own, width),
            *norm(second, hidden, _into(names, experts, own), own, width, product=bool(experts) or not tiles.mlp),
            *inner.made,
            *feed.made,
        ),
        (_norm_module(first), _norm_module(second), *inner.modules, *feed.modules),
        inner.gradients + feed.gradients,
    )


def norm_flow(hidden: int, own: bool, width: int, tiles: Tiles = WHOLE) -> Flow:
    """The norm before the head as a layer; the arguments are those of `block_flow`."""
    stream = Made("stream", hidden, into=("norm",), saved=width == 4)
    return Flow((stream, *norm("norm", hidden, (), own, width, product=not tiles.loss)), (_norm_module("norm"),))


def head_flow(hidden: int, vocabulary: int, depth: int, own: bool, width: int, tiles: Tiles = WHOLE) -> Flow:
    """The head and the loss, with `depth` of multi-token prediction, where the norm is a layer before it."""
    count = (1 + depth) * vocabulary
    before = Flow((Made("stream", depth * hidden, product=True),)) if depth else norm_flow(hidden, own, width)
    if not tiles.loss:
        return Flow((*before.made, Made(OF_LOSS, count, width=4)), before.modules, count)
    *made, out = before.made
    return Flow((*made, Made(OF_LOSS, out.elements)), before.modules)


def mtp_flow(block: Flow, hidden: int, width: int) -> Flow:
    """A block of multi-token prediction of ours: entered from two streams, which a projection joins, left by a norm."""
    names = ("embedding_norm", "hidden_norm", "out_norm")
    made = [each for name in names for each in norm(name, hidden, (), True, width)[:2]]
    stream = [Made("stream", hidden, into=(name,), saved=width == 4) for name in names]
    joined = Made("stream", 2 * hidden, product=True)
    modules = *block.modules, *(_norm_module(name) for name in names)
    return Flow((*block.made, *stream, *made, joined), modules, block.gradients + hidden)


_ENTRIES = {
    True: ("query", "query.0", "key", "value", "compress"),
    False: ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"),
}


def _into(names: Names, experts: int, own: bool) -> tuple[str, ...]:
    """What takes the second norm's output."""
    inner = ("up",) if own else ("gate_proj", "up_proj")
    if not experts:
        return names.feed, *(f"{names.feed}.{each}" for each in inner)
    whole = () if own else (names.feed,)
    return *whole, names.router, names.shared, *(f"{names.shared}.{each}" for each in inner)


def norm(name: str, size: int, into: tuple[str, ...], own: bool, width: int, product: bool = True) -> tuple[Made, ...]:
    """What a norm keeps beside its input, and its output, which a matrix product takes."""
    return (
        Made("norm", (size if width != 4 else 0) + 1, name, width=4),
        Made("norm", size, name, width=4 if own else 0),
        Made("norm", size, name, into, product=product),
    )


def _norm_module(name: str) -> Module:
    return Module(name, "RMSNorm")


def _grouped(config: Mapping[str, Any], names: Names, own: bool, width: int, shared: int) -> Flow:
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    size = int(config.get("head_dim") or hidden // heads)
    kv = int(config.get("num_key_value_heads") or heads)
    at, queries, keys = names.attention, heads * size, kv * size
    repeated = max(kv, shared) * size if shared > 1 else keys
    linear = ("query", "key", "value", "out") if own else ("q_proj", "k_proj", "v_proj", "o_proj")
    query, key, value, out = (f"{at}.{each}" for each in linear)
    made = [
        Made("attention", queries, at),
        Made("attention", repeated, at),
        Made("attention", repeated, value if shared == 1 else at),
        Made("attention", heads, at, width=4),
        Made("attention", queries, at, (out,), product=True),
    ]
    modules = [
        *_repeatable(at, "Attention", own, shared),
        Module(query),
        Module(key),
        Module(value),
        Module(out),
    ]
    if own:
        made += _copies(at, queries, 2 * size * shared, at)
    if not own and config.get("model_type") in NORMED:
        for name, source, wide, count in (("q_norm", query, queries, heads), ("k_norm", key, keys, kv)):
            place = f"{at}.{name}"
            made += [
                Made("attention", wide, source, (place,), saved=width == 4),
                Made("norm", (wide if width != 4 else 0) + count, place, width=4),
                Made("norm", wide, place),
            ]
            modules.append(_norm_module(place))
    return Flow(tuple(made), tuple(modules), queries + 2 * keys + hidden)


def _repeatable(at: str, kind: str, own: bool, shared: int) -> list[Module]:
    """The attention, unless it offers phases, with transfers that are not to be repeated."""
    return [] if own and shared > 1 else [Module(at, kind)]


def _copies(at: str, mixed: int, angles: int, turn: str) -> list[Made]:
    """What attention keeps beside: its result in the order of heads, and the angles of positions of its own, which are
    those of whole sequences."""
    return [Made("attention", mixed, at), Made("attention", angles, turn)]


def _latent(config: Mapping[str, Any], names: Names, own: bool, width: int, shared: int) -> Flow:
    hidden, heads, rank = (int(config[key]) for key in ("hidden_size", "num_attention_heads", "kv_lora_rank"))
    nope, rope, value = (int(config[key]) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    query_rank, at = int(config.get("q_lora_rank") or 0), names.attention
    queries, expanded = heads * (nope + rope), heads * (nope + value)
    if own:
        down, middle, up = f"{at}.query.0", f"{at}.query.1", f"{at}.query.2" if query_rank else f"{at}.query"
        compress, inner, expand, turn, out = (f"{at}.{each}" for each in ("compress", "norm", "expand", "turn", "out"))
    else:
        down, middle = f"{at}.q_a_proj", f"{at}.q_a_layernorm"
        up = f"{at}.q_b_proj" if query_rank else f"{at}.q_proj"
        linear = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
        compress, inner, expand, out = (f"{at}.{each}" for each in linear)
        turn = at
    apart = own and shared > 1  # what the exchange delivers lies in no module that can be computed again
    into = (turn,) if own else ()
    made = [
        Made("latent", rank + rope, compress, (inner,) if apart else (inner, turn), saved=width == 4),
        *norm(inner, rank, (expand,), own, width),
        Made("expanded", queries, at if apart else up, into, saved=False),
        Made("expanded", expanded, at if apart else expand, into),
        Made("expanded", 2 * queries, turn),
        Made("attention", heads, at, width=4),
        Made("attention", heads * value, at, (out,), product=True),
    ]
    modules = [
        *_repeatable(at, "LatentAttention", own, shared),
        Module(compress),
        _norm_module(inner),
        Module(expand, products=rank * expanded),
        Module(up, products=(query_rank or hidden) * queries),
        Module(out),
    ]
    made += _copies(at, heads * value, 2 * rope * shared if own else 0, turn)
    if apart:
        made.append(Made("latent", shared * rope, at, into, saved=False))
    if own:
        modules.append(Module(turn, "Turned"))
    if query_rank:
        made += [
            Made("latent", query_rank, down, (middle,), saved=width == 4),
            *norm(middle, query_rank, (up,), own, width),
        ]
        modules += [Module(down), _norm_module(middle)]
    return Flow(tuple(made), tuple(modules), queries + query_rank + rank + rope + expanded + hidden)


def _feed(config: Mapping[str, Any], names: Names, own: bool, tiles: Tiles) -> Flow:
    hidden, inner = int(config["hidden_size"]), int(config.get("intermediate_size") or 0)
    return _gated(names.feed, hidden, inner, own, "feed-forward", tiles)


def _gated(at: str, hidden: int, inner: int, own: bool, part: str, tiles: Tiles) -> Flow:
    """A SwiGLU layer: gate and value, the activation function, and its product with the value."""
    if tiles.mlp:
        return Flow(modules=_gated(at, hidden, inner, own, part, WHOLE).modules)
    module = Module(at, "FeedForward")
    if own:
        up, activation, down = f"{at}.up", f"{at}.activation", f"{at}.down"
        made = (
            Made(part, 2 * inner, up, (activation,)),
            Made("activation", inner, activation),
            Made("activation", inner, activation, (down,), product=True),
        )
        parts = (Module(up), Module(activation, "Gated"))
        return Flow(made, (module, *parts, Module(down)), 2 * inner + hidden)
    gate, value, activation, down = (f"{at}.{each}" for each in ("gate_proj", "up_proj", "act_fn", "down_proj"))
    apart = (
        Made(part, inner, gate, (activation,)),
        Made(part, inner, value),
        Made("activation", inner, activation),
        Made("activation", inner, at, (down,), product=True),
    )
    linear = tuple(Module(name) for name in (gate, value, down))
    return Flow(apart, (module, *linear, Module(activation, "SiLUActivation")), 2 * inner + hidden)


def _experts(config: Mapping[str, Any], experts: int, names: Names, own: bool, width: int, tiles: Tiles) -> Flow:
    """Router, rows to experts and back, and what experts and shared ones keep."""
    hidden, top_k = int(config["hidden_size"]), int(config["num_experts_per_tok"])
    own_width = config.get("moe_intermediate_size") if config.get("model_type") != "mixtral" else None
    inner = int(own_width or config.get("intermediate_size") or 0)
    at, outer = names.experts, "" if own else names.feed
    activation = f"{at}.activation" if own else f"{at}.act_fn"
    made = [
        Made("router", experts + 9 * top_k, names.router, width=4),
        Made("experts", top_k * hidden, outer, (at,), product=True),
        Made("experts", 2 * top_k * inner, at, (activation,)),
        Made("activation", top_k * inner, activation),
        Made("activation", top_k * inner, activation if own else at, product=True),
        Made("experts", top_k * hidden, at if own else outer),
    ]
    if own:  # what the weights of a token's experts have made of the rows
        made.append(Made("experts", top_k * hidden))
    if width != 4 and (own or config.get("n_routed_experts")):  # scores are computed in fp32
        made.append(Made("router", hidden, names.router, width=4, product=True))
    modules = [
        Module(at, "Experts"),
        Module(activation, "Gated" if own else "SiLUActivation"),
        Module(names.router, "Router"),
    ]
    if not own:
        modules.append(Module(names.feed, "MoE"))
    gradients = top_k * (2 * inner + hidden) + experts
    if shared := int(config.get("n_shared_experts") or 0):
        both = _gated(names.shared, hidden, shared * inner, own, "feed-forward", tiles)
        made, modules, gradients = made + list(both.made), modules + list(both.modules), gradients + both.gradients
    return Flow(tuple(made), tuple(modules), gradients)
