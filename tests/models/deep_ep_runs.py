"""Blocks through stand-ins for DeepEP that take what its two interfaces document; run alone, prints a JSON."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import fake_device
import torch

from dualpipe_engine.comm.device import EventMoment
from dualpipe_engine.comm.tickets import Tickets
from dualpipe_engine.errors import PipelineRuntimeError
from dualpipe_engine.models import deep_ep
from dualpipe_engine.models.block import MoEBlock
from dualpipe_engine.models.config import MoEConfig
from dualpipe_engine.models.dispatch import AllToAll
from dualpipe_engine.models.experts import Sizes
from dualpipe_engine.runtime.overlap import PhasedChunk, phases_of

CONFIG = MoEConfig(hidden=16, heads=2, head=8, rotary=4, kv_rank=8, experts=4, expert_inner=8)


class Group:
    """Of one rank, which has all experts."""

    def size(self):
        return 1

    def rank(self):
        return 0


class Event:
    waits = 0

    def current_stream_wait(self):
        Event.waits += 1


def counted(topk_idx):
    """What DeepEP makes the host wait for."""
    fake_device.waits.append("deep_ep")
    return torch.bincount(topk_idx.raw.flatten(), minlength=CONFIG.experts).tolist()


class First:
    made = 0

    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0):
        First.made += 1
        assert num_nvl_bytes == 16 * 4 and num_rdma_bytes == 7

    @staticmethod
    def get_dispatch_config(num_ranks):
        return SimpleNamespace(
            get_nvl_buffer_size_hint=lambda size, ranks: size, get_rdma_buffer_size_hint=lambda *_: 7
        )

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx, num_experts, previous_event=None, async_finish=False):
        return "per rank", None, "per expert", "inside", None

    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
        async_finish=False,
    ):
        assert async_finish and x.is_contiguous()
        if handle is not None:
            assert handle == "handle" and topk_idx is None and topk_weights is None
            return x.clone(), None, None, None, None, Event()
        assert (num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank) == ("per rank", "per expert", "inside")
        return x.clone(), topk_idx.clone(), topk_weights.clone(), counted(topk_idx), "handle", Event()

    def combine(self, x, handle, topk_weights=None, async_finish=False):
        assert async_finish and handle == "handle"
        return x.clone(), None if topk_weights is None else topk_weights.clone(), Event()


class Second:
    made = 0

    def __init__(self, group, num_bytes=None, num_max_tokens_per_rank=0, hidden=0, num_topk=0, num_allocated_qps=0):
        Second.made += 1
        assert (num_max_tokens_per_rank, hidden, num_topk, num_allocated_qps) in ((6, 16, 2, 0), (9, 16, 2, 16))
        self.sms = 12 if num_allocated_qps else 0

    def dispatch(
        self,
        x,
        topk_idx=None,
        topk_weights=None,
        num_experts=None,
        num_sms=0,
        async_with_compute_stream=False,
        handle=None,
    ):
        assert async_with_compute_stream
        if handle is not None:
            assert topk_idx is None and num_sms == handle.num_sms
            return x.clone(), None, None, handle, Event()
        assert num_experts == CONFIG.experts and num_sms == self.sms
        handle = SimpleNamespace(num_recv_tokens_per_expert_list=counted(topk_idx), num_sms=24)
        return x.clone(), topk_idx.clone(), topk_weights.clone(), handle, Event()

    def combine(self, x, handle, topk_weights=None, num_sms=0, async_with_compute_stream=False):
        assert async_with_compute_stream and handle.num_sms == 24 and num_sms == self.sms
        return x.clone(), None if topk_weights is None else topk_weights.clone(), Event()


def run(dispatchers):
    """Forward and backward of two blocks; what came out, and the waits of the host."""
    torch.manual_seed(0)
    blocks = [fake_device.on_device(MoEBlock(CONFIG)) for _ in dispatchers]
    for block, dispatcher in zip(blocks, dispatchers, strict=True):
        block.dispatcher = dispatcher
    chunk = PhasedChunk(torch.nn.Sequential(*blocks), 0, phases_of(blocks), 60.0, is_last=False)
    x = fake_device.Tensor(torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))).requires_grad_()
    fake_device.waits.clear()
    out = chunk.forward(0, x)
    (back,) = chunk.backward(0, [fake_device.Tensor(torch.ones(2, 3, 16))])
    grads = [param.grad.raw for block in blocks for param in block.parameters()]
    return [out.raw, back.raw, *grads], list(fake_device.waits)


def arranged():
    """Rows by expert where tokens have experts elsewhere, too."""
    way = deep_ep._Way({})
    way.chosen = fake_device.Tensor(torch.tensor([[1, -1], [-1, -1], [0, 1], [-1, 0]]))
    way.sizes = [2, 2]
    rows = fake_device.Tensor(torch.arange(4.0).view(4, 1))
    dispatcher = deep_ep.DeepEP.__new__(deep_ep.DeepEP)
    dispatcher._num_local = 2
    fake_device.waits.clear()
    found, sizes = dispatcher.arrange({"rows": rows, "way": way})
    assert isinstance(sizes, Sizes) and not fake_device.waits
    return found.raw.flatten().tolist(), sizes.device.raw.tolist(), sizes.host()


def asked():
    """What a ticket answers while the device works, and after."""
    ticket = deep_ep._EventTicket(Event(), EventMoment(None), torch.Stream(fake_device.DEVICE), ())
    tickets, log = Tickets("dispatch", log := []), log
    tickets.add(ticket)
    answers = []
    for happened in (False, True):
        EventMoment.happened = lambda self, happened=happened: happened
        answers.append(ticket.done())
    tickets.wait(0.0)
    return answers, [moment is not None for moment in log[0].moments]


class Own(torch.nn.Module):
    """A decoder layer of transformers."""

    def __init__(self):
        super().__init__()
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

        sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "moe_intermediate_size": 8}
        sizes |= {"num_experts": CONFIG.experts, "num_experts_per_tok": 2, "hidden_size": 16}
        config = Qwen3MoeConfig(num_hidden_layers=1, attn_implementation="eager", **sizes)
        self.block = Qwen3MoeDecoderLayer(config, 0)

    def forward(self, x):
        ones = torch.ones(1, x.shape[1], 8)
        positions = tuple(
            fake_device.Tensor(part) if isinstance(x, fake_device.Tensor) else part for part in (ones, ones)
        )
        return self.block(x, position_embeddings=positions)


def autoep(score_apply, group):
    """Forward and backward of a layer with AutoEP's block, by DeepEP or, without a group, on one rank."""
    from dualpipe_engine.models.autoep import decoder
    from dualpipe_engine.models.autoep.find import find_blocks
    from dualpipe_engine.models.autoep.layer import SharedMoE
    from dualpipe_engine.models.autoep.section import read_section

    decoder.unchanged = lambda layer: nullcontext()  # the device has no random state to put back
    torch.manual_seed(0)
    layer = Own()
    for param in layer.parameters():
        torch.nn.init.normal_(param, std=0.5)
    pattern = {"moe_layer_pattern": r"model\.layers\.\d+\.block\.mlp", "use_grouped_mm": False}
    more = {"autoep_size": 2, "comm_backend": "deepep", "comm_max_tokens_per_rank": 9}
    section = read_section({"enabled": True, "score_apply": score_apply, **pattern, **more})
    (found,) = find_blocks(layer, 0, section)
    moe = layer.block.mlp = SharedMoE(found.spec, layer.block.mlp, 1, 0, found.config)
    if group is not None:
        moe.use_deep_ep(group)
    assert decoder.offer_phases(layer) is None, "the structure is looked at without DeepEP"
    layer = fake_device.on_device(layer)
    chunk = PhasedChunk(layer, 0, phases_of([layer]), 60.0, is_last=False)
    x = fake_device.Tensor(torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))).requires_grad_()
    out = chunk.forward(0, x)
    (back,) = chunk.backward(0, [fake_device.Tensor(torch.ones(2, 3, 16))])
    too_many = None
    if group is not None:
        try:
            moe.route(fake_device.Tensor(torch.ones(2, 5, 16)))
        except PipelineRuntimeError as error:
            too_many = str(error)
    return [out.raw, back.raw, *(param.grad.raw for param in layer.parameters())], too_many


def main():
    library = fake_device.setup()
    EventMoment.__init__ = lambda self, stream: None
    EventMoment.block = lambda self, stream: None
    deep_ep.on_stream = lambda stream: nullcontext()
    wanted, _ = run([AllToAll(None, CONFIG.experts) for _ in range(2)])
    found = {}
    for name, kind in (("Buffer", First), ("ElasticBuffer", Second), ("EPBuffer", Second)):
        kind.made = 0
        module = sys.modules["deep_ep"] = ModuleType("deep_ep")
        setattr(module, name, kind)
        group = Group()
        same, waits = run([deep_ep.DeepEP(group, CONFIG.experts) for _ in range(2)])
        for value, expected in zip(same, wanted, strict=True):
            torch.testing.assert_close(value, expected)
        found[name] = {"buffers": kind.made, "waits": waits}
    Second.made, sys.modules["deep_ep"] = 0, module
    for score_apply in ("post", "pre"):
        wanted, _ = autoep(score_apply, None)
        group = Group()
        same, too_many = autoep(score_apply, group)
        for value, expected in zip(same, wanted, strict=True):
            torch.testing.assert_close(value, expected)
        found[f"autoep {score_apply}"] = too_many
    found["autoep buffers"] = Second.made
    del library
    found["arranged"], found["asked"] = arranged(), asked()
    fake_device.answer(found)


if __name__ == "__main__":
    main()
