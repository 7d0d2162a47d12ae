"""DualPipeTrainer beside the stock Trainer in one process: losses, norms, learning rates, evaluation, files."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trainer_kinds as kinds
import trainer_runs as runs
import transformers
from dualpipe_engine.integrations.optimizers import refuse_optimizer
from dualpipe_engine.integrations.transformers.batches import split_batch
from dualpipe_engine.integrations.transformers.loss import StandIn, TrainerLoss, with_weights
from dualpipe_engine.integrations.transformers.optimizer import rebuilt
from dualpipe_engine.integrations.transformers.refusals import refuse_arguments, refuse_hooks
from ranks import RankError

from dualpipe_engine.cli import main
from dualpipe_engine.compat import DualPipeTrainer
from dualpipe_engine.errors import ConfigError

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def start(command):
    """Run a command in processes where nothing has been imported or initialised."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def oracle(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    return {"folder": folder, **ranks.run(1, runs.train, folder=str(folder), stock=True)[0]}


def assert_same(ours, theirs):
    assert sorted(ours["steps"]) == list(range(1, 9))
    for step, (loss, norm, rate) in ours["steps"].items():
        assert loss == pytest.approx(theirs["steps"][step][0], abs=1e-6)
        assert norm == pytest.approx(theirs["steps"][step][1], rel=1e-4)
        assert rate == theirs["steps"][step][2]
    for step, (loss, accuracy) in ours["eval"].items():
        assert loss == pytest.approx(theirs["eval"][step][0], abs=1e-6)
        assert accuracy == theirs["eval"][step][1]


def test_trains_evaluates_saves_and_resumes_like_one_process(ranks, oracle, tmp_path):
    ours = ranks.run(2, runs.train, folder=str(tmp_path), num_chunks=4)
    assert_same(ours[0], oracle)
    assert ours[0] == ours[1] and ours[0]["seen"] == (8, 2)
    assert len({loss for loss, *_ in ours[0]["steps"].values()}) == 8
    resumed = ranks.run(2, runs.train, folder=str(tmp_path), num_chunks=4, resume=str(tmp_path / "checkpoint-4"))
    assert_same(resumed[0], oracle)
    for folder in ("final", "checkpoint-8"):
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict()
        expected = transformers.AutoModelForCausalLM.from_pretrained(oracle["folder"] / folder).state_dict()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.all
def test_replicas_share_the_batches(ranks, tmp_path):
    """Two pipelines of two stages with 4 rows each: the samples of a step differ from 8 rows in one process."""
    found = ranks.run(4, runs.train, folder=str(tmp_path), num_chunks=3, num_stages=2, schedule="dualpipev")
    assert all(each == found[0] for each in found)
    assert found[0]["steps"][8][0] < found[0]["steps"][1][0]


@pytest.mark.all
def test_stages_a_rank_are_a_key_of_the_configuration(ranks, oracle, tmp_path):
    options = {"num_chunks": 4, "schedule": "interleaved_zb"}
    options["deepspeed_config"] = {"pipeline": {"stages_per_rank": 2}}
    ours = ranks.run(2, runs.train, folder=str(tmp_path), **options)
    assert_same(ours[0], oracle)


@pytest.mark.all
def test_lora_trains_and_saves_the_adapter(ranks, tmp_path):
    import peft

    theirs = ranks.run(1, runs.train, folder=str(tmp_path / "stock"), stock=True, lora=True)[0]
    ours = ranks.run(2, runs.train, folder=str(tmp_path / "ours"), lora=True, num_chunks=4)[0]
    assert_same(ours, theirs)
    model = peft.PeftModel.from_pretrained(runs.make_model(), tmp_path / "ours" / "final")
    expected = peft.PeftModel.from_pretrained(runs.make_model(), tmp_path / "stock" / "final").state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


DEFAULT = ("masked", "own loss", "own optimizer and schedule")


def assert_kinds(ours, theirs, logits=2e-6):
    """Losses within 1e-6, and logits within `logits`: rounding in them grows with the learning rate and the steps."""
    for name, expected in theirs.items():
        for found in ours:
            for what in ("losses", "eval", "seen"):
                assert found[name][what] == pytest.approx(expected[what], abs=1e-6), f"{name}: {what}"
            assert found[name]["metrics"] == expected["metrics"], name
            assert found[name]["norms"] == pytest.approx(expected["norms"], rel=1e-4), name
            assert found[name]["rates"] == expected["rates"], name
            for what in {"logits", "bare"} & set(found[name]):
                gap = float((found[name][what] - expected[what]).abs().max())
                assert gap <= logits, f"{name}: {what}"


@pytest.mark.parametrize(
    "names", [DEFAULT, pytest.param(tuple(sorted(kinds.KINDS.keys() - {*DEFAULT})), marks=pytest.mark.all)]
)
def test_heads_losses_and_optimizers_are_those_of_the_trainer(ranks, tmp_path, names):
    theirs = ranks.run(1, kinds.run_kinds, names=names, folder=str(tmp_path / "stock"), stock=True)[0]
    assert_kinds(ranks.run(2, kinds.run_kinds, names=names, folder=str(tmp_path / "ours"), num_chunks=3), theirs)


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    """Twenty steps of every kind with a Trainer in one process, which has no launcher."""
    folder = tmp_path_factory.mktemp("twenty")
    start([sys.executable, kinds.__file__, str(folder), "20"])
    found = torch.load(folder / "0.pt")
    assert found.keys() == kinds.KINDS.keys() and all(len(each["losses"]) == 20 for each in found.values())
    return found


@pytest.mark.all
@pytest.mark.parametrize("world", [2, 4])
def test_twenty_steps_in_fresh_processes_are_those_of_one(twenty, tmp_path, world):
    start([*TORCHRUN, str(world), kinds.__file__, str(tmp_path), "20"])
    ours = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    assert all(each.keys() == twenty.keys() for each in ours)
    assert_kinds(ours, twenty, 5e-6)


@pytest.mark.all
def test_statistics_of_batches_are_those_of_one_process_where_batches_are_whole(ranks, tmp_path):
    job = {"names": ["statistics"], "num_chunks": 1}
    theirs = ranks.run(1, kinds.run_kinds, names=["statistics"], folder=str(tmp_path / "stock"), stock=True)[0]
    assert_kinds(ranks.run(2, kinds.run_kinds, folder=str(tmp_path / "ours"), schedule="dualpipev", **job), theirs)
    with pytest.raises(RankError, match="BatchNorm"):
        ranks.run(2, kinds.run_kinds, folder=str(tmp_path / "copies"), **job)


@pytest.mark.usefixtures("deepspeed_op")
def test_the_call_of_the_docs_starts_in_fresh_processes(tmp_path):
    """Under torchrun, where nothing has been initialised before."""
    folder = Path(runs.__file__).parent
    script = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); import trainer_runs; trainer_runs.short({str(tmp_path)!r})"
    )
    (tmp_path / "script.py").write_text(script)
    start([*TORCHRUN, "2", str(tmp_path / "script.py")])
    assert list(tmp_path.glob("checkpoint-3"))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 0


def arguments(**given):
    return transformers.TrainingArguments(output_dir="unused", report_to=[], use_cpu=True, **given)


@pytest.mark.parametrize(
    "given, match",
    [
        ({"torch_compile": True}, "torch_compile"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"torch_empty_cache_steps": 2}, "torch_empty_cache_steps"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen"),
        ({"optim_target_modules": ["mlp"]}, "optim_target_modules"),
        ({"bf16_full_eval": True}, "bf16_full_eval"),
        ({"gradient_accumulation_steps": 2}, "num_chunks"),
    ],
)
def test_arguments_without_an_effect_are_refused(given, match):
    plain = vars(arguments()) | given  # without the checks of what is installed
    refuse_arguments(SimpleNamespace(**vars(arguments())))
    with pytest.raises(ConfigError, match=match):
        refuse_arguments(SimpleNamespace(**plain))


def test_every_argument_is_in_the_table_of_the_docs():
    """An argument of a newer transformers is one that nobody has looked at; what is called refused is."""
    text = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text()
    rows = [row.split("|")[1:3] for row in text.partition("## Every argument")[2].partition("##")[0].splitlines()[4:]]
    rows = [(re.findall("`([a-z0-9_]+)`", names), what.strip()) for names, what in filter(None, rows)]
    told = [name for names, _ in rows for name in names]
    known = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert len(told) == len(set(told)) and known <= set(told), known - set(told)
    refused = [name for names, what in rows if what == "refused" for name in names]
    assert len(refused) > 10
    for name in set(refused) - {"torch_compile_backend", "torch_compile_mode"}:  # they turn torch_compile on
        with pytest.raises(ConfigError, match=name):
            refuse_arguments(SimpleNamespace(**vars(arguments()) | {name: "anything"}))
    assert arguments(torch_compile_mode="default").torch_compile


@pytest.mark.parametrize(
    "given, match",
    [
        ({"train_sampling_strategy": "batch_rebalance"}, "group_by_length"),
        ({"save_only_model": True, "load_best_model_at_end": True}, "the state of the engine"),
        ({"accelerator_config": SimpleNamespace(split_batches=True)}, "split_batches"),
        ({"accelerator_config": SimpleNamespace(dispatch_batches=True)}, "dispatch_batches"),
    ],
)
def test_values_without_an_effect_are_refused(given, match):
    refuse_arguments(SimpleNamespace(**vars(arguments())))
    with pytest.raises(ConfigError, match=match):
        refuse_arguments(SimpleNamespace(**vars(arguments()) | given))


@pytest.mark.all
def test_arguments_of_data_recomputation_and_evaluation(ranks, tmp_path):
    """Many of those that the table calls honoured, at once."""
    theirs = ranks.run(1, runs.many_arguments, folder=str(tmp_path / "stock"), stock=True)[0]
    for ours in ranks.run(2, runs.many_arguments, folder=str(tmp_path / "ours")):
        assert ours["given"] == theirs["given"] and ours["given"]["eval_rows"] == 8  # the rest is dropped
        assert ours["steps"] == sorted(set(ours["steps"])) == theirs["steps"]
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-6)
        assert ours["eval"] == pytest.approx(theirs["eval"], abs=1e-6) and len(ours["eval"]) == 3
        assert ours["recomputed"]


def test_hooks_without_an_effect_are_refused():
    import peft

    class Loop(DualPipeTrainer):
        def create_optimizer_and_scheduler(self, num_training_steps):
            pass

    class Loader(DualPipeTrainer):
        def get_train_dataloader(self):
            pass

    def trainer(kind=DualPipeTrainer, model=None, model_init=None):
        found = object.__new__(kind)
        found.model, found.model_init = model, model_init
        return found

    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    compiled, telling = runs.make_model(), runs.make_model()
    compiled.compile(backend="eager")
    telling.config.output_hidden_states = True
    refuse_hooks(trainer(model=runs.make_model()), 2)
    refuse_hooks(trainer(model=kinds.resnet()), 1)
    for given, match in (
        ({"model_init": runs.make_model}, "model_init"),
        ({"kind": Loop}, "create_scheduler"),
        ({"kind": Loader}, "_get_train_sampler"),
        ({"model": peft.get_peft_model(runs.make_model(), prompts)}, "prompt"),
        ({"model": kinds.resnet()}, "num_chunks=1"),
        ({"model": torch.compile(runs.make_model(), backend="eager")}, "compiled as a whole, .* on_train_begin"),
        ({"model": compiled}, "compiled as a whole"),
        ({"model": telling}, "output_hidden_states=True .* forward hooks on the blocks"),
    ):
        with pytest.raises(ConfigError, match=match):
            refuse_hooks(trainer(**given), 2)


def test_optimizers_that_would_give_other_numbers_are_refused():
    for name, in_parts in (("adamw_torch", True), ("Adafactor", False), ("adagrad", False), ("sgd", True)):
        refuse_optimizer(name, in_parts)
    for name, in_parts in (
        ("adafactor", True), ("paged_adamw_8bit", True), ("galore_adamw", False), ("adagrad", True), ("lomo", False)
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=name if name != "adagrad" else "Adagrad"):
            refuse_optimizer(name, in_parts)
    model = torch.nn.Linear(2, 2)
    used = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2)).sum().backward()
    used.step()
    with pytest.raises(ConfigError, match="stepped before"):
        rebuilt(used, model)


def test_batches_are_cut_into_rows():
    batch = {"input_ids": torch.arange(10).view(5, 2), "labels": torch.arange(5), "note": None}
    batch["position_ids"] = torch.arange(2).view(1, 2)
    micros = split_batch(batch, 2)
    assert [len(micro["labels"]) for micro in micros] == [3, 2]
    assert all(micro.keys() == {"input_ids", "labels", "position_ids"} for micro in micros)
    assert [len(micro["position_ids"]) for micro in micros] == [1, 1]
    assert len(split_batch(batch, 8)) == 5
    with pytest.raises(ConfigError, match=r"different numbers of rows \(x 2, labels 3\): let the data collator"):
        split_batch({"x": torch.ones(2), "labels": torch.ones(3)}, 2)


class Losses:
    """A trainer with a loss of one's own, which says what it is, or does not."""

    _row_blocks = 1

    def __init__(self, loss, scaled=None, looks=False):
        self.loss, self.loss_is_scaled_for_ga, self.looks = loss, scaled, looks

    def _looks_at_losses(self):
        return self.looks

    def _has_own_loss(self):
        return False

    def _shifted(self):
        return False

    def compute_loss(self, model, inputs, num_items_in_batch=None):
        return self.loss(model(x=inputs["x"]).logits, inputs["labels"], num_items_in_batch)

    _alone = compute_loss_context_manager = staticmethod(nullcontext)


@pytest.mark.parametrize(
    "scaled, items", [(None, None), (None, 15), (True, 15), (False, 15)], ids=["no items", "seen", "sum", "mean"]
)
@pytest.mark.parametrize("divides", [False, True])
def test_the_mean_over_uneven_micro_batches_is_the_loss_of_the_batch(scaled, items, divides):
    """Whether the loss divides by the number of items or is a mean; where the trainer does not say, it is seen."""
    if divides != scaled and scaled is not None:
        return
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    by_items = divides and items is not None

    def of(output, target, count):
        error = (output - target).square()
        return error.sum() / count if by_items else error.mean()

    loss = TrainerLoss(Losses(of, scaled), None, None)
    micros = with_weights(split_batch({"x": x, "labels": y}, 2), items)
    mean = torch.stack([loss(inputs["x"], needed) for inputs, needed in micros]).mean()
    torch.testing.assert_close(mean, torch.nn.functional.mse_loss(x, y).double(), check_dtype=False)


RAGGED = torch.tensor([[3, 1, 2], [1, -100, -100], [2, 0, -100], [0, 3, 1], [2, -100, -100]])


def each_token(output, labels):
    """Losses [rows, tokens], zero where there is no label."""
    return torch.nn.functional.cross_entropy(output.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def of_tokens(output, labels, count):
    return each_token(output, labels).sum() / labels.ne(-100).sum()


def of_items(output, labels, count):
    return each_token(output, labels).sum() / (labels.ne(-100).sum() if count is None else count)


def of_rows(output, labels, count):
    return (each_token(output, labels).sum(-1) / labels.ne(-100).sum(-1).clamp(1)).mean()


def of_places(output, labels, count):
    return each_token(output, labels).mean()


def of_classes(output, labels, count):
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    return torch.nn.functional.cross_entropy(output.flatten(0, 1), labels.flatten(), weights)


def contrast(output, labels, count):
    rows = output.flatten(1)
    return torch.nn.functional.cross_entropy(rows @ rows.t(), torch.arange(len(rows)))


def drawn(output, labels, count):
    return of_tokens(output, labels, count) * torch.rand(())


def losses_of(loss, parts, items=None):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(*RAGGED.shape, 4, generator=generator)
    found = TrainerLoss(Losses(loss, looks=True), None, None)
    micros = with_weights(split_batch({"x": logits, "labels": RAGGED}, parts), items)
    return torch.stack([found(inputs["x"], needed) for inputs, needed in micros]).mean(), loss(logits, RAGGED, items)


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("items", [None, int(RAGGED.ne(-100).sum())], ids=["no items", "items"])
@pytest.mark.parametrize("loss", [of_tokens, of_items, of_rows, of_places])
def test_what_a_loss_is_a_mean_of_is_seen(loss, items, parts):
    found, expected = losses_of(loss, parts, items)
    torch.testing.assert_close(found, expected, check_dtype=False)


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("loss", [of_classes, contrast])
def test_a_loss_that_is_no_mean_over_rows_or_labels_is_refused(loss, parts):
    with pytest.raises(ConfigError, match=r"Losses.compute_loss gives .* or use num_chunks=1"):
        losses_of(loss, parts)


def test_a_loss_that_draws_random_numbers_is_not_judged():
    losses_of(drawn, 2)


def test_tokens_are_weighted_by_labels_that_count():
    labels = torch.tensor([[-100, 1, 2], [-100, 1, -100], [3, -100, -100]])
    batch = {"x": torch.ones(3, 3), "labels": labels}
    shares = [needed[1][2].item() for _, needed in with_weights(split_batch(batch, 3), None)]
    assert shares == pytest.approx([3 * 2 / 4, 3 / 4, 3 / 4])
    shifted = [needed[1][2].item() for _, needed in with_weights(split_batch(batch, 3), None, shifted=True)]
    assert shifted == pytest.approx([3 * 2 / 3, 1.0, 0.0])


def test_a_micro_batch_without_labels_adds_nothing():
    """A mean over its labels would be NaN; so for the gradient."""
    labels = torch.tensor([[-100, -100], [1, 2], [-100, 0]])
    logits = torch.randn(3, 2, 4, requires_grad=True)

    def mean(output, target, count):
        return torch.nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())

    for items in (None, 3):
        loss = TrainerLoss(Losses(mean), None, None)
        micros = with_weights([{"x": logits[at : at + 1], "labels": labels[at : at + 1]} for at in range(3)], items)
        found = torch.stack([loss(inputs["x"], needed) for inputs, needed in micros]).mean()
        expected = mean(logits, labels, None)
        torch.testing.assert_close(found, expected, check_dtype=False)
        ours, theirs = (torch.autograd.grad(each, logits)[0] for each in (found, expected))
        torch.testing.assert_close(ours, theirs)
    rows = [{"x": torch.ones(1), "labels": torch.tensor([at])} for at in (-100, 2, 1)]
    assert [needed[1][2].item() for _, needed in with_weights(rows, None)] == [0, 1.5, 1.5]


def test_losses_that_micro_batches_cannot_make_are_refused():
    inputs = {"x": torch.ones(2, 2), "labels": torch.zeros(2, 2)}
    ((_, needed),) = with_weights([inputs], 4)
    odd = TrainerLoss(Losses(lambda output, target, count: output.sum() / count**0.5), None, None)
    with pytest.raises(ConfigError, match="num_items_in_batch"):
        odd(inputs["x"], needed)

    class Perturbed(Losses):
        def compute_loss(self, model, inputs, num_items_in_batch=None):
            return model(x=inputs["x"] + 1).logits.sum()

    with pytest.raises(ConfigError, match="data collator"):
        TrainerLoss(Perturbed(None), None, None)(inputs["x"], needed)
    with pytest.raises(ConfigError, match="compute_loss_func"):
        StandIn(torch.nn.Linear(1, 1), None, inputs["x"], inputs)(**inputs)


@pytest.mark.parametrize("world, options", [(2, {}), pytest.param(4, {"num_stages": 2}, marks=pytest.mark.all)])
def test_what_trains_in_bf16_is_saved_in_fp32(ranks, tmp_path, world, options):
    """As a Trainer saves it, which does not cast its weights; so steps below the precision of bf16 are not lost."""
    found = ranks.run(world, runs.in_bf16, folder=str(tmp_path), num_chunks=4, **options)
    assert all(dtypes == {torch.bfloat16} for dtypes in found)
    before = runs.make_model().bfloat16().state_dict()  # what DeepSpeed starts from
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.dtype == torch.float32
    for name, value in saved.state_dict().items():
        change = (value - before[name].float()).abs()
        assert 0 < float(change.max()) < 2.1e-5, name  # Adam's first steps are of the learning rate
    assert any(not torch.equal(value, value.bfloat16().float()) for value in saved.state_dict().values())


@pytest.mark.all
def test_a_model_in_bf16_is_saved_in_bf16(ranks, tmp_path):
    ranks.run(2, runs.in_bf16, folder=str(tmp_path), num_chunks=4, dtype=torch.bfloat16)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


@pytest.mark.all
@pytest.mark.parametrize("stage", [1, 0])
def test_resumes_on_other_ranks_and_another_schedule(ranks, oracle, tmp_path, stage):
    saved = str(tmp_path / "checkpoint-4")
    given = {"num_chunks": 4, "deepspeed_config": {"zero_optimization": {"stage": stage}}}
    ranks.run(2, runs.train, folder=str(tmp_path), **given)
    options = {"folder": str(tmp_path / "four"), "schedule": "zb1p", "resume": saved, **given}
    resumed = ranks.run(4, runs.train, resume_elsewhere=True, **options)
    assert_same(resumed[0], oracle)
    assert sorted(path.name for path in (tmp_path / "checkpoint-4").iterdir() if path.is_dir()) == ["engine"]
    if stage == 1:
        with pytest.raises(RankError, match="pass resume_elsewhere=True"):
            ranks.run(4, runs.train, **options)
