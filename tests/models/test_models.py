"""The parts of the mixture-of-experts transformer, in one process."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dualpipe_engine.errors import ConfigError
from dualpipe_engine.models import experts as experts_module
from dualpipe_engine.models.block import MoEBlock
from dualpipe_engine.models.config import MoEConfig
from dualpipe_engine.models.experts import Experts, Sizes, _grouped, has_grouped_mm
from dualpipe_engine.models.positions import Rotary, Yarn
from dualpipe_engine.models.routing import Router, rebalance
from dualpipe_engine.models.transformer import layers, loss
from dualpipe_engine.runtime.weight_grad import DeferredWeightGrads, install


def config(**changes):
    sizes = {"vocabulary": 11, "hidden": 16, "heads": 4, "head": 8, "rotary": 4, "kv_rank": 8, "expert_inner": 8}
    return MoEConfig(**(sizes | {"blocks": 2, "experts": 4} | changes))


def model(**changes):
    torch.manual_seed(0)
    return nn.Sequential(*[spec.build() for spec in layers(config(**changes))]).double()


@pytest.mark.parametrize(("interleaved", "yarn"), [(False, None), (True, Yarn(factor=40, length=8))])
def test_rotary_products_depend_on_distance_alone(interleaved, yarn):
    x, y = torch.randn(2, 6, dtype=torch.float64)
    rotary = Rotary(10_000.0, interleaved, yarn)
    turned_x, turned_y = (rotary(each.expand(1, 1, 9, 6))[0, 0] for each in (x, y))
    products = turned_x @ turned_y.T
    for distance in range(-8, 9):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))
    assert not torch.allclose(products[0, 0], products[0, 5])


@pytest.mark.parametrize(
    "changes",
    [{}, {"q_rank": 8}, {"attention": "grouped"}, {"attention": "grouped", "kv_heads": 2}, {"dense_blocks": 1}],
)
def test_no_token_sees_later_ones(changes):
    net = model(**changes)
    tokens = torch.randint(0, 11, (2, 7))
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 11
    before, after = net(tokens), net(other)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_each_token_gets_the_weighted_sum_of_its_experts():
    torch.manual_seed(0)
    block = MoEBlock(config(shared_experts=0, top_k=2)).double()
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    after = x + block.attention(block.norm1(x))
    rows = block.norm2(after).flatten(0, 1)
    routing = block.router(rows)
    wanted = after.flatten(0, 1).clone()
    for token, row in enumerate(rows):
        for expert, weight in zip(routing.experts[token], routing.weights[token], strict=True):
            gate, value = (row @ block.experts.up[expert]).chunk(2)
            wanted[token] += weight * ((nn.functional.silu(gate) * value) @ block.experts.down[expert])
    torch.testing.assert_close(block(x).flatten(0, 1), wanted)


def test_biases_choose_but_do_not_weigh():
    router = Router(config(top_k=2)).double()
    x = torch.randn(50, 16, dtype=torch.float64)
    router.bias[3] = 100.0
    routing = router(x)
    assert (routing.experts == 3).any(dim=1).all()
    torch.testing.assert_close(routing.weights.sum(dim=1), torch.ones(50, dtype=torch.float64))
    scores = nn.functional.linear(x, router.weight).sigmoid().gather(1, routing.experts)
    torch.testing.assert_close(routing.weights, scores / scores.sum(dim=1, keepdim=True))


def test_only_the_best_groups_are_chosen_from():
    torch.manual_seed(0)
    router = Router(config(experts=12, groups=4, kept_groups=2, top_k=4, init_std=0.5)).double()
    router.bias.copy_(torch.randn(12) * 0.2)
    x = torch.randn(50, 16, dtype=torch.float64)
    routing = router(x)
    scores = nn.functional.linear(x, router.weight).sigmoid()
    kept = set()
    for token in range(50):
        biased = (scores[token] + router.bias).tolist()
        groups = [biased[3 * group : 3 * group + 3] for group in range(4)]
        best = sorted(range(4), key=lambda group: -sum(sorted(groups[group])[1:]))[:2]
        among = sorted((e for e in range(12) if e // 3 in best), key=lambda e: -biased[e])[:4]
        assert sorted(routing.experts[token].tolist()) == sorted(among)
        kept.add(tuple(sorted(among)) == tuple(sorted(sorted(range(12), key=lambda e: -biased[e])[:4])))
    assert kept == {True, False}, "groups matter for some tokens, and not for all"
    every = Router(config(experts=12, groups=4, kept_groups=4, top_k=4)).double()
    every.load_state_dict(router.state_dict())
    torch.testing.assert_close(every(x).experts, (scores + router.bias).topk(4).indices)


def test_sequences_have_a_balance_loss_of_their_own():
    router = Router(config(top_k=2, sequence_loss=0.5, experts=5, init_std=1.0)).double()
    router.bias.copy_(torch.tensor([9.0, 0, 0, 0, 0]))
    x = torch.randn(12, 16, dtype=torch.float64)
    found, wanted = router(x, 3).loss, 0.0
    scores = nn.functional.linear(x, router.weight).sigmoid()
    for sequence in scores.split(4):
        for expert in range(5):
            often = sum(expert in token.topk(2).indices for token in sequence) * 5 / (2 * 4)
            wanted = wanted + often * (sequence[:, expert] / sequence.sum(dim=1)).mean() * 0.5 / 3
    torch.testing.assert_close(found, wanted.view(1))
    found.backward()
    assert router.weight.grad.any()
    assert not router.eval()(x, 3).loss.any()
    net = model(sequence_loss=0.5)
    tokens = torch.randint(0, 11, (2, 7))
    logits, auxiliary = net(tokens)
    assert auxiliary > 0
    torch.testing.assert_close(loss((logits, auxiliary), tokens), loss(logits, tokens) + auxiliary[0])


def test_biases_move_against_the_load():
    router = Router(config(top_k=1, bias_rate=0.5))
    router.counts.copy_(torch.tensor([9.0, 3.0, 0.0, 0.0]))
    rebalance(router, None)
    assert router.bias.tolist() == [-0.5, 0.0, 0.5, 0.5]
    assert router.load.tolist() == [9.0, 3.0, 0.0, 0.0] and not router.counts.any()


def test_recomputation_and_evaluation_count_nothing():
    router = Router(config(top_k=2))
    x = torch.randn(5, 16, requires_grad=True)
    checkpoint(lambda rows: router(rows).weights, x, use_reentrant=False).sum().backward()
    assert router.counts.sum() == 10
    router.eval()
    router(x)
    assert router.counts.sum() == 10


def test_auxiliary_loss_is_least_for_even_loads():
    router = Router(config(top_k=1, balancing="loss", loss_weight=2.0)).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(4, 16) * 50)
    even = router(torch.eye(4, 16, dtype=torch.float64))
    torch.testing.assert_close(even.loss, torch.full((1,), 2.0, dtype=torch.float64))
    skewed = router(torch.eye(1, 16, dtype=torch.float64).expand(4, -1))
    torch.testing.assert_close(skewed.loss, torch.full((1,), 8.0, dtype=torch.float64))
    assert router.eval()(torch.eye(4, 16, dtype=torch.float64)).loss.item() == 0


def test_the_loss_of_all_blocks_arrives_with_its_gradient():
    net = model(balancing="loss", loss_weight=1.0)
    tokens = torch.randint(0, 11, (2, 7))
    logits, auxiliary = net(tokens)
    loss((logits, auxiliary), tokens).backward()
    whole = [block.router.weight.grad.clone() for block in net[1:3]]
    net.zero_grad()
    loss((net(tokens)[0], None), tokens).backward()
    rest = [block.router.weight.grad for block in net[1:3]]
    net.zero_grad()
    net(tokens)[1].backward()
    for total, part, block in zip(whole, rest, net[1:3], strict=True):
        assert block.router.weight.grad.abs().max() > 0
        torch.testing.assert_close(total, part + block.router.weight.grad)


@pytest.mark.parametrize("sizes", [[3, 0, 4, 1], [0, 0, 8, 0], [0, 0, 0, 0]])
def test_grouped_products_equal_single_ones(sizes):
    rows, weight = torch.randn(sum(sizes), 8, requires_grad=True), torch.randn(4, 8, 12, requires_grad=True)
    assert has_grouped_mm(rows, weight) and not has_grouped_mm(rows.double(), weight.double())
    found = _grouped(rows, weight, Sizes(torch.tensor(sizes)))
    slow = _grouped(rows.double(), weight.double(), Sizes(torch.tensor(sizes)))
    torch.testing.assert_close(found, slow.float(), rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(found)
    grads = torch.autograd.grad(found, [rows, weight], upstream)
    for grad, wanted in zip(grads, torch.autograd.grad(slow, [rows, weight], upstream.double()), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_room_for_experts_without_rows_changes_nothing(monkeypatch, split):
    torch.manual_seed(0)
    layer = Experts(config(expert_inner=8), 0)
    rows, sizes = torch.randn(9, 16), torch.tensor([4, 0, 5, 0])
    found = []
    for spoils in (False, True):
        monkeypatch.setattr(experts_module, "_spoils_empty_groups", lambda rows, weight, spoils=spoils: spoils)
        layer.zero_grad()
        mine = rows.clone().requires_grad_()
        store = DeferredWeightGrads()
        install(layer, store)
        out = layer(mine, Sizes(sizes))
        with store.defer() if split else nullcontext():
            (out * torch.arange(16.0)).sum().backward()
        for closure in store.take():
            closure()
        found.append([out, mine.grad, layer.up.grad, layer.down.grad])
    for plain, apart in zip(*found, strict=True):
        torch.testing.assert_close(apart, plain)
    assert not layer.up.grad[1].any() and not layer.down.grad[3].any()


@pytest.mark.parametrize(
    ("capability", "dtype", "fits"),
    [
        ((8, 0), torch.bfloat16, False),  # one by one, after a wait
        ((9, 0), torch.bfloat16, True),
        ((10, 0), torch.bfloat16, True),
        ((12, 0), torch.bfloat16, False),
        ((9, 0), torch.float32, False),
    ],
)
def test_where_groups_are_multiplied_in_one_call(monkeypatch, capability, dtype, fits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    rows = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, element_size=lambda: dtype.itemsize)
    weight = torch.empty(4, 16, 32, device="meta")
    assert has_grouped_mm(rows, weight) == fits
    assert experts_module._spoils_empty_groups(rows, weight) == (fits and capability[0] == 10)


def test_weights_do_not_depend_on_who_holds_them():
    def make(parallel, rank):
        torch.manual_seed(5)
        return Experts(config(expert_parallel=parallel), rank)

    alone, shares = make(1, 0), [make(2, rank) for rank in range(2)]
    assert torch.equal(alone.up, torch.cat([share.up for share in shares]))
    assert not torch.equal(shares[0].up, shares[1].up)
    assert not hasattr(alone.up, "allreduce") and not shares[0].up.allreduce
    shares[0].load_state_dict(shares[1].state_dict())
    assert torch.equal(shares[0].up, shares[1].up), "a share loads as it is"
    shares[0].load_state_dict(alone.state_dict())
    assert torch.equal(shares[0].up, alone.up[:2]), "of the whole a rank takes its share"


def test_all_matrices_but_the_embedding_are_deferred():
    net = model().float()
    report = install(net, DeferredWeightGrads())
    net(torch.randint(0, 11, (2, 7)))
    assert {reason for _, reason in report.not_deferred} == {"embedding", "bias, norm or other vector"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 5, "expert_parallel": 2}, "cannot be shared"),
        ({"top_k": 9}, "top_k"),
        ({"attention": "full"}, "latent, grouped"),
        ({"kv_heads": 3, "attention": "grouped"}, "multiple of kv_heads"),
        ({"rotary": 3}, "rotary must be even"),
        ({"value_head": 4, "attention": "grouped"}, "value_head"),
        ({"sequence_loss": 0.1, "balancing": "loss"}, "sequence_loss"),
        ({"kv_heads": 1}, 'kv_heads has no effect but with attention "grouped"'),
        ({"q_rank": 8, "attention": "grouped"}, 'q_rank has no effect but with attention "latent"'),
        ({"loss_weight": 0.1}, 'loss_weight has no effect but with balancing "loss"'),
        ({"bias_rate": 0.1, "balancing": "loss"}, 'bias_rate has no effect but with balancing "bias"'),
        ({"mtp_depth": -1}, "mtp_depth must be a whole number from 0"),
        ({"expert_parallel": 0}, "expert_parallel must be a whole number from 1"),
        ({"heads": 2.0}, "heads must be a whole number"),
        ({"shared_experts": True}, "shared_experts must be a whole number"),
        ({"sequence_loss": -1}, "sequence_loss must be a number from 0"),
        ({"norm_eps": "small"}, "norm_eps must be a number"),
        ({"normalised": "no"}, "normalised must be true or false"),
        ({"dense_blocks": 3}, "3 dense_blocks are more than the 2 blocks"),
        ({"groups": 3, "kept_groups": 1}, "do not fit 4 experts"),
        ({"groups": 4, "kept_groups": 1}, "two experts or more"),
        ({"groups": 2, "kept_groups": 3}, "from 1 to groups"),
        ({"groups": 2, "kept_groups": 1, "balancing": "loss"}, "biased scores"),
        ({"groups": 2, "kept_groups": 1, "top_k": 3}, "too few for top_k 3"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_stretched_positions_need_a_length():
    with pytest.raises(ConfigError, match="1 or more"):
        Yarn(factor=0.5, length=4)
