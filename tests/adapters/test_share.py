"""Models from folders whose experts are read by share: what is read and held, and that it is the same model."""

from __future__ import annotations

import autoep_runs
import models
import pytest
import share_runs
import torch
import transformers
from torch import nn

from dualpipe_engine.adapters import get_model_adapter
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.models.autoep.find import find_blocks
from dualpipe_engine.models.autoep.layer import SharedMoE
from dualpipe_engine.models.autoep.section import read_section


def saved(name, folder, own_names=False):
    model = autoep_runs.skewed(models.model_of(autoep_runs.config_of(name)), name)
    model.save_pretrained(folder, max_shard_size="20KB", save_original_format=not own_names)
    return model


def spread(adapter):
    """A stage as a PipelineModule moves it to a device."""
    stage = adapter._stage(1, 2)
    return stage.to("cpu")


def shared(stage, rank, unread, section=None, filled=()):
    config = read_section({"enabled": True, "autoep_size": 2} | (section or {}))
    [(path, spec, completed)] = find_blocks(stage, 1, config)
    made = SharedMoE(spec, stage.get_submodule(path), 2, rank, completed)
    assert (f"{path}.{spec.experts_name}" in stage.unread) == unread
    if unread:
        assert all(p.isnan().all() for name, p in made.experts.named_parameters() if name not in filled)
        made.take(stage, f"{path}.{spec.experts_name}")
    return made


@pytest.mark.parametrize("source", ["published", "own names", "fresh"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_share_is_that_of_the_whole(name, source, tmp_path):
    if source == "fresh":
        given = {"config": autoep_runs.config_of(name)}
    else:
        saved(name, tmp_path, source == "own names")
        given = {"folder": str(tmp_path)}
    stage, whole = spread(get_model_adapter(**given)), get_model_adapter(**given).stage(1, 2)
    for rank in range(2):
        with share_runs.counted() as read:
            mine = shared(stage, rank, unread=True)
        theirs = shared(whole, rank, unread=False)
        for key, value in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[key], value), key
        experts = sum(param.nbytes for param in mine.experts.parameters())
        assert sum(read.values()) == (0 if source == "fresh" else experts)
    assert stage.unread, "a share changes nothing of the layer that it is taken from"
    held = whole.state_dict()
    assert all(torch.equal(value, held[key]) for key, value in stage.state_dict().items())
    assert not stage.unread


class Expert(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.w2 = nn.Linear(inner, hidden, bias=False)


class ListedConfig(transformers.MixtralConfig):
    model_type = "listed"


class ListedForCausalLM(transformers.MixtralForCausalLM):
    """Mixtral with a module for each expert."""

    config_class = ListedConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            inner = (config.hidden_size, config.intermediate_size)
            layer.mlp.experts = nn.ModuleList(Expert(*inner) for _ in range(config.num_local_experts))


LISTED = {"preset_model": "mixtral", "expert_w1": "w1", "expert_w2": "w2", "expert_w3": "w3"}


def test_experts_that_are_modules_are_read_one_by_one(tmp_path):
    config = ListedConfig(**(models.MOE | {"num_local_experts": 4, "num_hidden_layers": 2}))
    model = ListedForCausalLM(config)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = ListedForCausalLM(config)
    stage = spread(get_model_adapter(empty, folder=str(tmp_path)))
    for rank in range(2):
        with share_runs.counted() as read:
            mine = shared(stage, rank, True, LISTED)
        assert {int(name.split(".")[5]) for name in read} == {2 * rank, 2 * rank + 1}
        for number, expert in enumerate(model.model.layers[1].mlp.experts[2 * rank : 2 * rank + 2]):
            for key in ("w1", "w2", "w3"):
                assert torch.equal(getattr(mine.experts, key)[number], getattr(expert, key).weight)


def test_weights_beside_a_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="would not be read"):
        get_model_adapter(saved("mixtral", tmp_path), folder=str(tmp_path))


def test_what_is_done_to_experts_before_they_are_read(tmp_path):
    model = saved("mixtral", tmp_path)
    stage = spread(get_model_adapter(folder=str(tmp_path)))
    experts = stage.get_submodule("model.layers.1.mlp.experts")
    with pytest.raises(RuntimeError), torch.no_grad():
        experts.down_proj.normal_()
    with torch.no_grad():
        held = experts.down_proj.fill_(1.0)
    experts.gate_up_proj.requires_grad_(False)
    for rank in range(2):
        share = shared(stage, rank, True, filled=("w2",))
        assert torch.equal(share.experts.w2, torch.ones_like(share.experts.w2))
        assert not share.experts.w1.requires_grad and share.experts.w2.requires_grad
    stage.double()
    assert experts.down_proj is held and torch.equal(held, torch.ones(held.shape, dtype=torch.float64))
    assert torch.equal(experts.gate_up_proj, model.model.layers[1].mlp.experts.gate_up_proj.double())


@pytest.mark.parametrize("own_names", [False, pytest.param(True, marks=pytest.mark.all)])
def test_no_rank_reads_or_holds_more_than_its_share(ranks, tmp_path, own_names):
    model = saved("mixtral", tmp_path, own_names)
    found = ranks.run(4, share_runs.together, folder=str(tmp_path), name="mixtral")
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    experts = sum(param.nbytes for layer in model.model.layers for param in layer.mlp.experts.parameters())
    for rank in found:
        counts = rank["counts"]
        read = sum(counts["read"].values())
        assert counts["experts"] == experts // 4, "of half of the layers half of the experts"
        assert sum(n for name, n in counts["read"].items() if ".experts." in name) == counts["experts"]
        assert counts["before"] == read - counts["experts"]
        assert read < counts["own"] + 1024, "and buffers that are not in the files"
        assert counts["most"] < counts["own"] + 3 * counts["block"] + 8192
        assert rank["folder"] == rank["built"]
        assert rank["whole"] == pytest.approx(rank["built"], rel=1e-5)
    assert sum(sum(rank["counts"]["read"].values()) for rank in found) < 2 * size - experts + 1024
