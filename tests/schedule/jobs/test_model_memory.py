import json

import pytest

from dualpipe_engine.cli.main import main
from dualpipe_engine.engine.section import DualPipeConfig
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.schedule.jobs.memory import training_of
from dualpipe_engine.schedule.jobs.model_memory import Shape, model_memory, stages_memory
from dualpipe_engine.schedule.jobs.model_shape import KNOWN, held_params, load_shape
from dualpipe_engine.schedule.orders.registry import SCHEDULES, STOCK
from dualpipe_engine.schedule.placement import BIDIRECTIONAL, LINEAR, Placement

MIXTRAL = load_shape("mixtral-8x7b")
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}}
HOST = BF16 | {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize("name", [LINEAR, BIDIRECTIONAL])
def test_experts_and_their_optimizer_state_are_shared(name):
    """2 bytes of weights and 4 of gradients for a rank's share; 12 of Adam by the copies of it."""
    placement, bounds = Placement(name, 2), [0, 17, 34]
    shape = Shape(2, 4, replicas=8, experts=4)
    found = stages_memory(MIXTRAL, bounds, placement, training_of(BF16), shape, [7, 7])
    layers = MIXTRAL.layers if name == BIDIRECTIONAL else MIXTRAL.layers[:17]
    dense, routed = held_params(layers), sum(layer.experts for layer in layers) // 4
    copies = 8 * placement.num_directions
    assert found[0].weights == 2 * (dense + routed) and found[0].gradients == 4 * (dense + routed)
    assert found[0].optimizer == 12 * dense // copies + 12 * routed // (copies // 4)
    assert found[0].activations == 7 and found[0].host == 0


def test_offloaded_state_is_in_host_memory():
    """With the gradients in fp32 that the host steps on."""
    shape = Shape(2, 4, replicas=2, experts=2)
    both = [model_memory(MIXTRAL, training_of(config), shape) for config in (BF16, HOST)]
    here, there = ({row.schedule: row.ranks for row in rows} for rows in both)
    for schedule, ranks in here.items():
        for rank, offloaded in zip(ranks, there[schedule], strict=True):
            assert offloaded.optimizer == 0 and offloaded.total == rank.total - rank.optimizer
            assert offloaded.host == pytest.approx(rank.optimizer * 16 / 12, rel=1e-6)


def test_the_command_reads_the_configurations_of_both(tmp_path, capsys):
    config, folder = tmp_path / "ds.json", tmp_path / "model"
    section = {"enabled": True, "autoep_size": 4}
    text = HOST | {"gradient_accumulation_steps": 8, "train_micro_batch_size_per_gpu": 2, "expert_parallel": section}
    config.write_text(json.dumps(text))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(KNOWN["mixtral-8x7b"]))
    base = ["memory", "--config", str(config), "--ranks", "4", "--replicas", "4", "--model", str(folder)]
    assert main([*base, "--sequence-length", "128", "--format", "json"]) == 0
    rows = {row["schedule"]: row["ranks"] for row in json.loads(capsys.readouterr().out)["schedules"]}
    wanted = model_memory(MIXTRAL, training_of(text), Shape(4, 8, 4, 4, 2, 128))
    assert {row.schedule: [rank.total for rank in row.ranks] for row in wanted} == {
        name: [rank["total"] for rank in ranks] for name, ranks in rows.items()
    }
    assert rows[STOCK][0]["activations"] < rows["interleaved"][0]["activations"]
    assert main(base) == 0
    assert "on the host" in capsys.readouterr().out


def rows_of(tmp_path, capsys, section, *more):
    """Bytes of activations on each rank, by schedule, of the command with a "pipeline" section."""
    config = tmp_path / "ds.json"
    config.write_text(json.dumps(BF16 | {"gradient_accumulation_steps": 8, "pipeline": section}))
    base = ["memory", "--config", str(config), "--ranks", "4", "--model", "llama-3-70b", "--length", "512"]
    assert main([*base, *more, "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["schedules"]
    return {row["schedule"]: [rank["activations"] for rank in row["ranks"]] for row in rows}


#: Keys of the section that change no bytes of what the command counts.
ELSEWHERE = {
    "schedule", "optimize", "costs", "overlap", "p2p_timeout_s", "check_twins", "check_finite", "load_report_steps",
    "layer_costs", "save_on_signal", "save_folder",
}  # fmt: skip


def test_each_key_of_the_section_has_its_effect(tmp_path, capsys):
    """Each changes the schedules that it is for, and stock 1F1B by what DeepSpeed reads itself."""
    plain = rows_of(tmp_path, capsys, {})
    changed = {
        "stages_per_rank": (4, {"interleaved", "interleaved_zb"}),
        "activation_cap": (3, {"zbv", "vhalf", "vmin"}),
        "split_backward": (False, {"zb1p"}),
        "offload_activations": (1, set(SCHEDULES)),
        "recompute": (["mlp"], set(SCHEDULES)),
        "tiled_mlp": (4, set(SCHEDULES)),
        "tiled_loss": (4, {"1f1b", "zb1p", "dualpipe"}),
        "activation_checkpoint_interval": (1, {*SCHEDULES, STOCK}),
        "partition_method": ("25,20,20,17", {"1f1b", "zb1p", "dualpipe", STOCK}),
    }
    assert changed.keys() - {"activation_checkpoint_interval"} == DualPipeConfig.model_fields.keys() - ELSEWHERE
    for key, (value, wanted) in changed.items():
        found = rows_of(tmp_path, capsys, {key: value})
        assert wanted <= {name for name in plain if found[name] != plain[name]}, key
        assert STOCK in wanted or found[STOCK] == plain[STOCK], key
        if key not in ("stages_per_rank", "partition_method"):
            feasible = [name for name in wanted if found[name]]
            assert all(sum(found[name]) < sum(plain[name]) for name in feasible), key
    by_option = rows_of(tmp_path, capsys, {}, "--stages-per-rank", "4")
    assert by_option == rows_of(tmp_path, capsys, {"stages_per_rank": 4})


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"recompute": ["norm"]}, '"recompute" changes what a layer keeps, which --activation-bytes has to say'),
        ({"activation_checkpoint_interval": 1}, '"activation_checkpoint_interval" changes what a layer keeps'),
        ({"tiled_mlp": 4}, '"tiled_mlp" changes what a layer keeps'),
        ({"tiled_mpl": 4}, 'did you mean "tiled_mlp"?'),
        ({"activation_checkpoint_interval": -1}, "a whole number from 0, got -1"),
        ({"partition_method": "uniform"}, '"uniform" needs the layers themselves'),
        ({"activation_checkpoint_interval": 1, "offload_activations": 1}, "leave one out"),
    ],
)
def test_a_section_that_cannot_be_counted_is_one_sentence(tmp_path, capsys, section, reason):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps(BF16 | {"gradient_accumulation_steps": 8, "pipeline": section}))
    given = ["--params-per-stage", "1e9"] if "changes what a layer keeps" in reason else ["--model", "llama-3-70b"]
    assert main(["memory", "--config", str(config), "--ranks", "4", *given]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--model", "mixtral-8x7b", "--activation-bytes", "1"], "--activation-bytes: no effect with --model"),
        (["--params-per-stage", "1", "--expert-parallel", "2"], "--expert-parallel: no effect without --model"),
        (["--model", "mixtral-8x7b", "--expert-parallel", "3", "--replicas", "3"], "cannot share 8 experts"),
        (["--model", "mixtral-8x7b", "--expert-parallel", "2"], "--replicas"),
        (["--model", "llama-3-70b", "--expert-parallel", "2", "--replicas", "2"], "no experts to share"),
        ([], "--params-per-stage P, or --model"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, capsys, more, reason):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps(BF16 | {"gradient_accumulation_steps": 8}))
    assert main(["memory", "--config", str(config), "--ranks", "4", *more]) == 2
    assert reason in capsys.readouterr().err


def test_counts_start_at_one():
    with pytest.raises(ConfigError, match="at least 1"):
        Shape(2, 0)
