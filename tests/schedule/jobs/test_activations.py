"""What is computed to be held of a block, from F to I and from I to W, is what it holds, with names and without."""

from __future__ import annotations

import re

import pytest

from dualpipe_engine.schedule.jobs.flows import OWN_RECOMPUTED, block_flow

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
    from dualpipe_engine.models.block import DenseBlock, MoEBlock
    from dualpipe_engine.models.config import MoEConfig

    torch.manual_seed(0)
    config = MoEConfig(hidden=96, heads=4, head=24, value_head=32, rotary=8, kv_rank=40, q_rank=56, dense_inner=200,
                       experts=4, top_k=2, expert_inner=72)  # fmt: skip
    kind = MoEBlock if experts else DenseBlock
    blocks = torch.nn.ModuleList(kind(config) for _ in range(BLOCKS)).to(dtype)
    x = torch.randn(1, TOKENS, 96, dtype=dtype, requires_grad=True)

    def run(state):
        for block in blocks:
            state = block(state)
        return state

    modules = {name: part for index, block in enumerate(blocks) for name, part in found(block, names, index).items()}
    flow = block_flow(SIZES | LATENT, experts, True, dtype.itemsize)
    kept, pending = held_of(blocks, modules, run, x)
    assert kept == pytest.approx(TOKENS * BLOCKS * sum(flow.kept(names, dtype.itemsize).values()), rel=0.05)
    assert pending == pytest.approx(TOKENS * BLOCKS * flow.pending(dtype.itemsize), rel=0.05)


FAMILIES = [("Llama", SIZES), ("Qwen3", SIZES), ("Mixtral", SIZES | {"num_local_experts": 4})]
FAMILIES += [("DeepseekV3", SIZES | LATENT | {"first_k_dense_replace": 0, "head_dim": 8})]


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
