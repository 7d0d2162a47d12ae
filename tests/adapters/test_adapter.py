"""Stages chained in one process against the whole model, bit for bit."""

from __future__ import annotations

import models
import pytest
import torch
import transformers
from torch import nn

from dualpipe_engine.adapters import ModelAdapter, conversion, get_model_adapter, register_adapter
from dualpipe_engine.errors import ConfigError


def batch_of(model):
    torch.manual_seed(9)
    if model.main_input_name == "pixel_values":
        config = model.config
        size = config.image_size if isinstance(getattr(config, "image_size", None), int) else 64
        return {"pixel_values": torch.randn(2, config.num_channels, size, size)}, torch.tensor([1, 0])
    inputs, labels = next(models.stream())
    return inputs, labels


def run(forward, model, inputs, labels, loss_fn):
    """Output, loss and gradients."""
    model.zero_grad()
    torch.manual_seed(0)
    logits = forward(inputs)
    loss = loss_fn(logits, labels)
    loss.backward()
    return (
        logits,
        loss,
        {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None},
    )


def chained(stages):
    def forward(inputs):
        for stage in stages:
            inputs = stage(inputs)
        return inputs

    return forward


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0]), "logits"
    assert torch.equal(found[1], expected[1]), "loss"
    assert found[2].keys() == expected[2].keys()
    for name, grad in found[2].items():
        assert torch.equal(grad, expected[2][name]), name


@pytest.mark.parametrize("name", models.NAMES)
def test_stages_equal_the_whole_model(name):
    model = models.model_of(models.config_of(name)).eval()
    adapter = get_model_adapter(model)
    inputs, labels = batch_of(model)
    loss_fn = adapter.loss_fn
    whole = run(lambda x: model(**x).logits, model, inputs, labels, loss_fn)
    assert torch.equal(whole[1], model(**inputs, labels=labels).loss), "the adapter's loss is the model's"
    count = len(adapter.chain.blocks)
    for partitions in sorted({min(2, count), min(4, count)}):
        stages = adapter.partition(num_partitions=partitions)
        assert_same(run(chained(stages), model, inputs, labels, loss_fn), whole)
        names = {key for stage in stages for key in stage.state_dict()}
        assert names == model.state_dict().keys()


def test_labels_in_the_batch_give_the_loss():
    model = models.model_of(models.config_of("llama")).eval()
    inputs, labels = batch_of(model)
    output = chained(get_model_adapter(model).partition(2))(inputs | {"labels": labels})
    assert torch.equal(output.loss, model(**inputs, labels=labels).loss)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "qwen3_moe"])
def test_auxiliary_loss_of_routers(name, masked):
    config = models.config_of(name + models.ROUTERS)
    config.router_aux_loss_coef = 0.5
    model = models.model_of(config).eval()
    inputs, labels = batch_of(model)
    inputs = inputs if masked else {"input_ids": inputs["input_ids"]}

    def whole(given):
        output = model(**given)
        return torch.stack([output.aux_loss, model(**given, labels=labels).loss]), output.logits

    adapter = get_model_adapter(model)
    tokens_alone = adapter.own_loss
    expected = run(whole, model, inputs, labels, lambda both, _: both[0][1])
    without = run(lambda x: model(**x).logits, model, inputs, labels, tokens_alone)
    assert any(not torch.equal(grad, without[2][key]) for key, grad in expected[2].items()), "the routers' loss counts"
    for partitions in (1, 3):
        stages = adapter.partition(num_partitions=partitions)
        found = run(chained(stages), model, inputs, labels, adapter.loss_fn)
        torch.testing.assert_close(found[0][1], expected[0][0][0], rtol=1e-6, atol=1e-7)
        assert torch.equal(found[0][0], expected[0][1])
        torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-7)
        assert found[2].keys() == expected[2].keys()
        for key, grad in found[2].items():
            torch.testing.assert_close(grad, expected[2][key], rtol=1e-5, atol=1e-7, msg=lambda m, k=key: k + m)
        output = chained(stages)(inputs | {"labels": labels})
        torch.testing.assert_close(output.loss, expected[1], rtol=1e-6, atol=1e-7)


def plain():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def test_plain_sequential():
    model, x, y = plain(), torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    whole = run(model, model, x, y, nn.functional.cross_entropy)
    stages = get_model_adapter(model, example_inputs=x).partition(num_partitions=4)
    assert_same(run(chained(stages), model, x, y, nn.functional.cross_entropy), whole)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 3)
        self.rows = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x, scale):
        x = self.enter(x) * scale
        for row in self.rows:
            x = row(x)
        return self.leave(x).tanh()


def test_any_model_with_a_row_of_blocks():
    model, x, y = Net(), (torch.randn(4, 6), torch.tensor(2.0)), torch.tensor([0, 1, 2, 0])
    whole = run(lambda given: model(*given), model, x, y, nn.functional.cross_entropy)
    stages = get_model_adapter(model, example_inputs=x).partition(num_partitions=2)
    assert_same(run(chained(stages), model, x, y, nn.functional.cross_entropy), whole)


class Dropping(Net):
    """Asks itself, not a module, whether it is trained."""

    def forward(self, x, scale):
        return nn.functional.dropout(super().forward(x, scale), 0.5, self.training)


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_of_a_stage_is_that_of_the_model(mode):
    torch.manual_seed(0)
    model = Dropping().train(not mode)
    x = (torch.randn(4, 6), torch.tensor(2.0))
    stages = [stage.train(mode) for stage in get_model_adapter(model, example_inputs=x).partition(2)]
    model.train(mode)
    with torch.random.fork_rng():
        wanted = model(*x)
    assert torch.equal(chained(stages)(x), wanted)
    assert bool((wanted == 0).any()) == mode


class Shared(Net):
    def forward(self, x):
        x = self.enter(x)
        for row in self.rows:
            x = row(x) + self.leave.weight.sum()
        return self.leave(x)


def test_refusals_name_the_reason():
    config = transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    with pytest.raises(ConfigError, match=r"T5ForConditionalGeneration.*encoder-decoder"):
        get_model_adapter(transformers.T5ForConditionalGeneration(config))
    with pytest.raises(ConfigError, match="no single chain"):
        get_model_adapter(Shared(), example_inputs=torch.randn(1, 6))
    with pytest.raises(ConfigError, match="example_inputs"):
        get_model_adapter(plain())
    routed = models.config_of("deepseek_v3")
    routed.output_router_logits = True
    with pytest.raises(ConfigError, match="output_router_logits=False"):
        get_model_adapter(models.model_of(routed))
    with pytest.raises(ConfigError, match="pass the model itself"):
        get_model_adapter(config=transformers.CTRLConfig(n_embd=32, dff=48, n_layer=4, n_head=4, vocab_size=61))
    with pytest.raises(ConfigError, match="use at most 5"):
        get_model_adapter(plain(), example_inputs=torch.randn(1, 6)).partition(6)


class Registered(Net):
    pass


def test_blocks_that_train_one_weight_are_refused():
    """Each stage would train a copy of its own; one that rests is the same everywhere."""
    model = models.model_of(models.config_of("llama"))
    first, *_, last = model.model.layers
    last.mlp.up_proj.weight = first.mlp.up_proj.weight
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj\.weight and .* are one weight"):
        get_model_adapter(model)
    first.mlp.up_proj.weight.requires_grad_(False)
    assert len(get_model_adapter(model).partition(2)) == 2


def test_register_adapter():
    example = (torch.randn(1, 6), torch.tensor(1.0))
    register_adapter(Registered, lambda model: ModelAdapter(model, example_inputs=example))
    assert len(get_model_adapter(Registered()).chain.blocks) == 4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_stages_read_their_own_weights_only(name, tmp_path):
    model = models.model_of(models.config_of(name)).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    adapter = get_model_adapter(folder=str(tmp_path))
    assert all(param.is_meta for param in adapter.model.parameters())
    inputs, _ = batch_of(model)
    stages = [adapter.stage(index, 3).eval() for index in range(3)]
    assert torch.equal(chained(stages)(inputs), model(**inputs).logits)
    assert all(param.is_meta for param in adapter.model.parameters())


PUBLISHED = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "gpt_neox", "vit", "dinov2", "llama_tied", "bert"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_stages_read_published_files(name, tmp_path):
    """save_pretrained writes the names and shapes in which the models are published."""
    model = models.model_of(models.config_of(name)).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    expected = model.state_dict()
    adapter = get_model_adapter(folder=str(tmp_path))
    found = {}
    for index in range(3):
        found |= adapter.stage(index, 3).state_dict()
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key


def test_a_stage_opens_the_entries_of_its_own_weights_only(tmp_path, monkeypatch):
    model = models.model_of(models.config_of("mixtral"))
    model.save_pretrained(tmp_path)
    adapter, read = get_model_adapter(folder=str(tmp_path)), set()
    weights = conversion.Source.weights

    def counted(self, *args):
        read.update(name for name, _ in self.entries)
        return weights(self, *args)

    monkeypatch.setattr(conversion.Source, "weights", counted)
    adapter.stage(1, 5)
    assert read and all(name.startswith("model.layers.1.") for name in read)
    assert sum(".experts." in name for name in read) == 3 * 4, "each expert has three entries"


def test_missing_weights_are_named(tmp_path):
    model = models.model_of(models.config_of("llama"))
    state = {key: value for key, value in model.state_dict().items() if "layers.3" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    adapter = get_model_adapter(folder=str(tmp_path))
    adapter.stage(0, 5)
    with pytest.raises(ConfigError, match=r"nothing that becomes model\.layers\.3"):
        adapter.stage(3, 5)


def test_quantized_weights_are_refused(tmp_path):
    config = models.config_of("deepseek_v3")
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="are quantized"):
        get_model_adapter(folder=str(tmp_path))


def test_fresh_weights_do_not_depend_on_the_cut():
    config = models.config_of("llama")
    weights = []
    for partitions in (2, 4):
        torch.manual_seed(11)
        stages = get_model_adapter(config=config).partition(partitions)
        weights.append({name: value for stage in stages for name, value in stage.state_dict().items()})
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    first, second = (weights[0][f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)
    assert first.std() == pytest.approx(config.initializer_range, rel=0.1)


class Around(nn.Module):
    """`inplace` changes the hidden state before the blocks; `beside` passes a value around them."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(2)
        self.kind = kind
        self.table = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        x = self.table(tokens)
        kept = x.detach()
        if self.kind == "inplace":
            x = x.clone().mul_(2.0)
        for block in self.blocks:
            x = block(x)
        if self.kind == "beside":
            x = x + kept
        return self.head(x)


def test_what_passes_around_the_blocks_is_refused():
    tokens = torch.tensor([[1, 2, 3]])
    for kind in ("plain", "inplace"):
        assert len(get_model_adapter(Around(kind), example_inputs=(tokens,)).chain.blocks) == 4
    with pytest.raises(
        ConfigError, match=r"Around cannot be cut: tensor 0 .*\[1, 3, 3\], differs .* around the blocks"
    ):
        get_model_adapter(Around("beside"), example_inputs=(tokens,))


def test_a_probe_that_fails_says_what_to_pass():
    class Picky(Around):
        def forward(self, tokens):
            return super().forward(tokens["deep"])

    with pytest.raises(ConfigError, match="example_inputs"):
        get_model_adapter(Picky("plain"), example_inputs=(torch.tensor([[1]]),))


def test_fresh_weights_are_drawn_as_the_model_draws_them():
    """A block draws some of its children's weights again: GPT-2 scales the projections that end a residual path."""
    config = transformers.GPT2Config(vocab_size=61, n_embd=64, n_layer=8, n_head=4, n_positions=32)
    stage = get_model_adapter(config=config).stage(0, 2)
    attention = stage.get_submodule("transformer.h.0.attn")
    expected = config.initializer_range / (2 * config.n_layer) ** 0.5
    assert attention.c_proj.weight.std().item() == pytest.approx(expected, rel=0.1)
    assert attention.c_attn.weight.std().item() == pytest.approx(config.initializer_range, rel=0.1)
