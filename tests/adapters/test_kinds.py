"""Many kinds of models: stages give the whole model's numbers to the last bit, or a ConfigError says why not."""

from __future__ import annotations

import inspect

import kinds
import models
import pytest
import torch
import transformers
from test_adapter import assert_same, chained, run

from dualpipe_engine.adapters import get_model_adapter
from dualpipe_engine.errors import ConfigError

#: name -> why there is no adapter of a model, with weights or without.
REFUSED = {
    "albert": "more than once",
    "bart": "encoder-decoder",
    "bart_classes": "encoder-decoder",
    "clip": "logit_scale outside of any module",
    "deberta_v2": "second tensor that depends on parameters",
    "funnel": "its forward fails on the inputs of the probe",
    "gemma3n": "no single chain",
    "mpnet": "second tensor that depends on parameters",
    "openai_gpt": "do not run by themselves",
    "opt_layerdrop": "layerdrop=0.0",
    "qwen2_vl_images": "do not run by themselves",
    "qwen3_vl_images": "differs from the model's",
    "roformer": "differs from the model's",
    "sam": "the chain of SamModel cannot be found",
    "swinv2": "do not run by themselves",
    "t5": "encoder-decoder",
    "t5_encoder": "second tensor that depends on parameters",
    "t5_tokens": "second tensor that depends on parameters",
    "vit_mae": "differs from the model's",
    "wav2vec2_layerdrop": "layerdrop=0.0",
    "whisper": "encoder-decoder",
    "xlm": "differs from the model's",
    "xlnet": "mask_emb outside of any module",
}
#: name -> why there is none of a configuration or folder, though there is of the model.
WITHOUT_WEIGHTS = {"ctrl": "cannot be found without weights", "poolformer": "cannot be found without weights"}
#: name -> why fresh weights cannot be drawn, though a folder's can be read.
FRESH = dict.fromkeys(("hubert", "wav2vec2"), "gets its values where the model is built")
QUICK = ("ctrl", "electra", "falcon", "mamba", "openai_gpt", "opt_350m", "opt_layerdrop", "vit_mae", "whisper_classes")


def given_to(name, model):
    """`example_inputs` where they are needed."""
    return {"example_inputs": kinds.batch_of(name, model)[0]} if kinds.KINDS[name].example else {}


def output_of(model, inputs):
    """As in training: keys that go through a cache lie differently in memory, and other kernels take them."""
    without = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    output = model(**inputs, **without)
    found = [getattr(output, each, None) for each in ("logits", "prediction_logits", "last_hidden_state")]
    return next((each for each in found if each is not None), output[0])


def some_loss(output, labels):
    """Depends on every place of the output."""
    return (output.float() * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum()


def compare_with_weights(name, model):
    adapter = get_model_adapter(model, **given_to(name, model))
    inputs, labels = kinds.batch_of(name, model)
    try:
        loss_fn = adapter.loss_fn
    except ConfigError:
        loss_fn = some_loss
    whole = run(lambda x: output_of(model, x), model, inputs, labels, loss_fn)
    if loss_fn is not some_loss:
        assert torch.equal(whole[1], model(**inputs, labels=labels).loss), "the adapter's loss is the model's"
    count = len(adapter.chain.blocks)
    for partitions in sorted({2, count}):
        stages = adapter.partition(partitions)
        assert_same(run(chained(stages), model, inputs, labels, loss_fn), whole)
        assert {key for stage in stages for key in stage.state_dict()} == model.state_dict().keys()
    with torch.no_grad():  # other kernels than with a graph
        return inputs, output_of(model, inputs)


def compare_without_weights(name, model, inputs, output, folder):
    """Of a folder: the model's weights and output. Of a configuration: weights drawn as the model draws them."""
    model.save_pretrained(folder)
    adapter = get_model_adapter(folder=str(folder), **given_to(name, model))
    stages = [stage.eval() for stage in adapter.partition(2)]
    found = {key: value for stage in stages for key, value in stage.state_dict().items()}
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert not [key for key, value in found.items() if not torch.equal(value, expected[key])]
    with torch.no_grad():
        assert torch.equal(chained(stages)(inputs), output)

    adapter = get_model_adapter(config=kinds.config_of(name), **given_to(name, model))
    if name in FRESH:
        with pytest.raises(ConfigError, match=FRESH[name]):
            adapter.partition(2)
        return
    stages = [stage.eval() for stage in adapter.partition(2)]
    with torch.no_grad():
        assert chained(stages)(inputs).isfinite().all()
    found = {key: value.float() for stage in stages for key, value in stage.state_dict().items()}
    for key, value in expected.items():
        tied = next(other for other, same in expected.items() if same.data_ptr() == value.data_ptr())
        assert torch.equal(found[key], found[tied]), f"{key} is tied to {tied}"
        spread = value.float().std() if value.numel() > 64 else None
        if spread is not None and spread > 0:
            assert 0.5 < found[key].std() / spread < 2, key
        elif value.numel() > 1 and value.float().std() == 0:
            assert torch.equal(found[key], value.float()), key


def cases():
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.all) for name in sorted(kinds.KINDS)]


@pytest.mark.parametrize("name", cases())
def test_a_kind_is_equal_or_refused(name, tmp_path):
    config = kinds.config_of(name)
    model = models.model_of(config).eval()
    if name in REFUSED:
        for source in ({"model": model}, {"config": kinds.config_of(name)}):
            with pytest.raises(ConfigError) as refusal:
                get_model_adapter(**source, **given_to(name, model))
            if "model" in source:
                assert REFUSED[name] in str(refusal.value)
        return
    inputs, output = compare_with_weights(name, model)
    if name in WITHOUT_WEIGHTS:
        with pytest.raises(ConfigError, match=WITHOUT_WEIGHTS[name]):
            get_model_adapter(config=kinds.config_of(name), **given_to(name, model))
        return
    compare_without_weights(name, model, inputs, output, tmp_path)


def test_the_table_is_large():
    assert len(kinds.KINDS) >= 80
    assert len(kinds.KINDS.keys() - REFUSED.keys()) >= 60
    assert REFUSED.keys() | WITHOUT_WEIGHTS.keys() | FRESH.keys() | set(QUICK) <= kinds.KINDS.keys()


def test_tensors_that_the_stages_were_not_tried_with_are_refused():
    model = models.model_of(kinds.config_of("qwen2_vl"))
    stage = get_model_adapter(model).stage(0, 2)
    images, _ = kinds.batch_of("qwen2_vl_images", model)
    with pytest.raises(ConfigError, match=r"not tried with pixel_values.*example_inputs="):
        stage(images)


def test_layerdrop_is_refused_with_its_remedy():
    config = transformers.OPTConfig(**kinds.KINDS["opt_layerdrop"].settings)
    config.layerdrop = 0.0
    get_model_adapter(config=config)


DECODER = {key: value for key, value in kinds.BART.items() if not key.startswith("encoder")}


@pytest.mark.parametrize("name", ["Bart", "Marian", "TrOCR"])
@pytest.mark.parametrize("weights", [True, False])
def test_the_loss_of_a_model_that_makes_another_one_is_refused(name, weights):
    """Decoders that stand alone take labels that have been shifted before."""
    settings = DECODER | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
    config = getattr(transformers, f"{name}Config")(**settings, architectures=[f"{name}ForCausalLM"])
    adapter = get_model_adapter(models.model_of(config)) if weights else get_model_adapter(config=config)
    with pytest.raises(
        ConfigError, match=rf"{name}ForCausalLM makes another loss.*loss_fn\(output, labels\) of your own"
    ):
        adapter.loss_fn  # noqa: B018


def test_a_trial_of_the_loss_leaves_the_kind_of_labels_open():
    model = models.model_of(kinds.config_of("llama_classes"))
    adapter = get_model_adapter(model)
    assert model.config.problem_type is None
    logits, several = torch.randn(2, 3), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, several)
    assert torch.equal(adapter.loss_fn(logits, several), expected)


def test_a_configuration_that_does_not_name_its_model():
    with pytest.raises(ConfigError, match=r"config.architectures"):
        get_model_adapter(config=transformers.ModernBertConfig())
