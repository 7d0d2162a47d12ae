from types import SimpleNamespace

import pytest
import ties_runs
import torch
import training
from deepspeed.pipe import LayerSpec, TiedLayerSpec

from dualpipe_engine.engine.checkpoint.ties import name_in_tie, named_as_saved, with_own, without_own

MODULE = SimpleNamespace(
    _layer_specs=[TiedLayerSpec("e", training.Embed), LayerSpec(training.Block)] * 2, tied_modules={}
)


def test_what_layers_have_of_their_own_has_a_name_in_the_tie():
    names = ["tied_modules.e.place", "1.up.weight", "2.table.weight", "3.up.bias"]
    assert [name_in_tie(MODULE, name) for name in names] == [None, None, "tied_modules.e.table.weight", None]


def test_names_are_those_of_the_checkpoint(tmp_path):
    one, two, three = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    names = {one: "2.place", two: "2.own", three: "1.up.weight"}
    for name in ("tied_modules.e.place", "2.own", "tied_modules.e.own"):
        (tmp_path / "zero" / name).mkdir(parents=True)
    with named_as_saved(MODULE, names, tmp_path):
        assert names == {one: "tied_modules.e.place", two: "2.own", three: "1.up.weight"}
    assert names == {one: "2.place", two: "2.own", three: "1.up.weight"}


def test_a_state_keeps_its_parameters_where_others_come_between():
    shape = torch.Size([2])
    layout = [[("1.a", shape), ("2.place", shape), ("3.a", shape)], [("2.bias", shape), ("3.b", shape)]]
    less = without_own(MODULE, layout)
    assert [[name for name, _ in group] for group in less] == [["1.a", "3.a"], ["3.b"]]
    groups = [{"lr": 0.1, "params": [0, 1]}, {"lr": 0.2, "params": [2]}]
    state = {"param_groups": groups, "state": {0: "of 1.a", 1: "of 3.a", 2: "of 3.b"}}
    assert with_own(MODULE, state, layout) == {
        "param_groups": [{"lr": 0.1, "params": [0, 1, 2]}, {"lr": 0.2, "params": [3, 4]}],
        "state": {0: "of 1.a", 2: "of 3.a", 4: "of 3.b"},
    }


def test_a_universal_checkpoint_without_what_tied_layers_have_of_their_own_loads(ranks, tmp_path):
    for there, here in ranks.run(2, ties_runs.through_universal, folder=str(tmp_path)):
        assert here == pytest.approx(there, rel=1e-5)


@pytest.mark.all
def test_a_checkpoint_without_zero_and_without_what_tied_layers_have_of_their_own_loads(ranks, tmp_path):
    for there, here in ranks.run(2, ties_runs.of_shared, folder=str(tmp_path)):
        assert here == there
