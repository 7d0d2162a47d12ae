"""What is computed to be held of a block, from F to I and from I to W, is what it holds, with names and without."""

from __future__ import annotations

import re

import pytest

from dualpipe_engine.schedule.jobs.checkpointed import Keeping
from dualpipe_engine.schedule.jobs.flows import OWN_RECOMPUTED, Tiles, block_flow, head_flow
from dualpipe_engine.schedule.jobs.model_shape import LayerShape, ModelShape

torch = pytest.importorskip("torch")

TOKENS, BLOCKS = 64, 4
SIZES = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 200}
SIZES |= {"vocab_size": 100, "num_experts_per_tok": 2, "moe_intermediate_size": 72, "head_dim": 24}
LATENT = {"kv_lora_rank": 40, "q_lora_rank": 56, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 32}
LATENT |= {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}


def held_of(module, modules, run, x):
    """Bytes that `module` holds after its forward and after I, with these modules computed again; what `run(x)` returns
    and the gradient of `x` aside."""
    from dualpipe_engine.runtime.chunk import StageChunk
    from dualpipe_engine.runtime.held import HeldBytes
    from dualpipe_engine.runtime.recompute import Recompute
    from dualpipe_engine.runtime.weight_grad import DeferredWeightGrads, install

    store, recompute = DeferredWeightGrads(), Recompute(modules)
    install(module, store)
    recompute.install()
    chunk = StageChunk(recompute.within(run), 0, is_last=False, store=store)
    own = [*module.parameters(), *module.buffers(), x]
    with HeldBytes() as held:
        out = chunk.forward(0, x)
        kept = held.but([*own, out])
        chunk.input_backward(0, [torch.ones_like(out)])
        del out
        pending = held.but(own)
        chunk.weight_backward(0)
        assert held.but(own) == 0
    return kept, pending


def ours(dtype, experts):
    """Blocks, what runs all of them, and its input."""
    from dualpipe_engine.models.block import DenseBlock, MoEBlock
    from dualpipe_engine.models.config import MoEConfig

    torch.manual_seed(0)
    config = MoEConfig(hidden=96, heads=4, head=24, value_head=32, rotary=8, kv_rank=40, q_rank=56, dense_inner=200,
                       experts=4, top_k=2, expert_inner=72)  # fmt: skip
    kind = MoEBlock if experts else DenseBlock
    blocks = torch.nn.ModuleList(kind(config) for _ in range(BLOCKS)).to(dtype)

    def run(state):
        for block in blocks:
            state = block(state)
        return state

    return blocks, run, torch.randn(1, TOKENS, 96, dtype=dtype, requires_grad=True)


def found(block, names, prefix):
    """Name -> outermost module that names stand for."""
    hits = {}
    for name, part in block.named_modules():
        matches = any(re.search(each, name) or re.fullmatch(each, type(part).__name__) for each in names)
        if matches and not any(name.startswith(f"{outer}.") for outer in hits):
            hits[name] = part
    return {f"{prefix}.{name}": part for name, part in hits.items()}


@pytest.mark.parametrize("names", [(), ("norm",), ("activation",), OWN_RECOMPUTED, ("attention", "mlp|shared|experts")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("experts", [0, 4])
def test_blocks_of_ours(names, dtype, experts):
    blocks, run, x = ours(dtype, experts)
    modules = {name: part for index, block in enumerate(blocks) for name, part in found(block, names, index).items()}
    flow = block_flow(SIZES | LATENT, experts, True, dtype.itemsize)
    kept, pending = held_of(blocks, modules, run, x)
    assert kept == pytest.approx(TOKENS * BLOCKS * sum(flow.kept(names, dtype.itemsize).values()), rel=0.05)
    assert pending == pytest.approx(TOKENS * BLOCKS * flow.pending(dtype.itemsize), rel=0.05)


FAMILIES = [("Llama", SIZES), ("Qwen3", SIZES), ("Mixtral", SIZES | {"num_local_experts": 4})]
FAMILIES += [("DeepseekV3", SIZES | LATENT | {"first_k_dense_replace": 0, "head_dim": 8})]


@pytest.mark.parametrize(("experts", "interval"), [(0, 1), (0, 2), (0, 3), (4, 1), (4, 2)])
def test_blocks_under_activation_checkpointing(experts, interval):
    """Plain blocks in groups, as in DeepSpeed's PipelineModule; by phases each by itself."""
    from torch.utils.checkpoint import checkpoint

    from dualpipe_engine.runtime.chunk import StageChunk
    from dualpipe_engine.runtime.held import HeldBytes
    from dualpipe_engine.runtime.overlap import PhasedChunk, phases_of

    blocks, _, x = ours(torch.bfloat16, experts)

    def run(state):
        for start in range(0, BLOCKS, interval):
            state = checkpoint(torch.nn.Sequential(*blocks[start : start + interval]), state, use_reentrant=False)
        return state

    chunk = StageChunk(run, 0, is_last=False)
    if experts:
        chunk = PhasedChunk(blocks, 0, phases_of(list(blocks), lambda layer: True), 60.0, is_last=False)
    with HeldBytes() as held:
        out = chunk.forward(0, x)
        kept = held.but([*blocks.parameters(), *blocks.buffers(), out])
    flow = block_flow(SIZES | LATENT, experts, True, 2)
    layer = LayerShape("moe", 0, flows=(flow, flow), rows=96 if experts else 0, top_k=2)
    model = ModelShape("blocks", 96, (layer,) * BLOCKS, own=True)
    assert kept == pytest.approx(TOKENS * Keeping(2, interval=interval).of_stage(model, model.layers), rel=0.05)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("interval", [0, 1])
def test_head_and_loss(tiled, interval):
    from torch.utils.checkpoint import checkpoint

    from dualpipe_engine.models.config import MoEConfig
    from dualpipe_engine.models.transformer import Head, loss
    from dualpipe_engine.runtime import tiles
    from dualpipe_engine.runtime.chunk import StageChunk
    from dualpipe_engine.runtime.held import HeldBytes

    torch.manual_seed(0)
    config = MoEConfig(hidden=96, heads=4, head=24, vocabulary=3000, attention="grouped")
    head = Head(config).to(torch.bfloat16)
    x = torch.randn(1, TOKENS, 96, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(3000, (1, TOKENS))
    loss_fn = loss.tiled(tiles.Tiles(head.projection, 8)) if tiled else loss
    run = (lambda x: checkpoint(head, x, use_reentrant=False)) if interval else head
    chunk = StageChunk(run, 1, is_last=True, loss_fn=loss_fn)
    with HeldBytes() as held:
        chunk.forward(0, x, labels)
        kept = held.but([*head.parameters(), x, labels])
    flow = head_flow(96, 3000, 0, True, 2, Tiles(loss=tiled))
    layer = LayerShape("head", 0, flows=(flow, flow))
    expected = Keeping(2, interval=interval).of_stage(ModelShape("head", 96, (layer,), own=True), [layer])
    stream = 2 * 96 if interval else 0
    assert kept == pytest.approx(TOKENS * (expected - stream), rel=0.05)


@pytest.mark.parametrize("names", [(), ("norm",), ("attention", "norm2")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("experts", [0, 4])
def test_blocks_in_tiles(names, dtype, experts):
    from dualpipe_engine.runtime.tiles import TiledLayer

    blocks, run, x = ours(dtype, experts)
    for block in blocks:
        TiledLayer(block.shared if experts else block.mlp, "feed-forward", 4)
    modules = {name: part for index, block in enumerate(blocks) for name, part in found(block, names, index).items()}
    flow = block_flow(SIZES | LATENT, experts, True, dtype.itemsize, tiles=Tiles(mlp=True))
    kept, pending = held_of(blocks, modules, run, x)
    assert kept == pytest.approx(TOKENS * BLOCKS * sum(flow.kept(names, dtype.itemsize).values()), rel=0.07)
    assert pending == pytest.approx(TOKENS * BLOCKS * flow.pending(dtype.itemsize), rel=0.05)


@pytest.mark.parametrize("names", [(), ("norm",), ("act_fn",), ("norm", "act_fn"), ("self_attn", "mlp")])
@pytest.mark.parametrize(("kind", "sizes"), FAMILIES)
def test_blocks_of_transformers(names, kind, sizes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    experts = sizes.get("num_local_experts") or sizes.get("n_routed_experts") or 0
    held = []
    for count in (1, 3):
        config = getattr(transformers, f"{kind}Config")(**sizes, num_hidden_layers=count)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16)
        blocks = model.model.layers
        modules = {name: part for n, block in enumerate(blocks) for name, part in found(block, names, n).items()}
        x = torch.randn(1, TOKENS, 96, dtype=torch.bfloat16, requires_grad=True)
        held.append(held_of(model, modules, lambda x, model=model: model(inputs_embeds=x, use_cache=False).logits, x))
    flow = block_flow(sizes | {"model_type": config.model_type}, experts, False, 2)
    kept, pending = ((three - one) / 2 for one, three in zip(*held, strict=True))
    assert kept == pytest.approx(TOKENS * sum(flow.kept(names, 2).values()), rel=0.05)
    assert pending == pytest.approx(TOKENS * flow.pending(2), rel=0.05)
