"""The examples run as their docstrings say."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dualpipe_engine.cli import main

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def quick_start(ranks, chunks):
    """What a process of the quick start does, on a rank that is there already."""
    path = EXAMPLES / "example.py"
    spec = importlib.util.spec_from_file_location("example", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.set_default_dtype(torch.float64)
    return [example.run(name, dist.get_rank(), ranks, chunks) for name in ("DualPipe", "DualPipeV")]


def test_quick_start_on_ranks(ranks):
    assert all(max(errors) < 1e-13 for errors in ranks.run(2, quick_start, ranks=2, chunks=5))


@pytest.mark.all
def test_quick_start():
    command = [sys.executable, str(EXAMPLES / "example.py"), "--ranks", "2", "--chunks", "5"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["DualPipe", "DualPipeV"]
    assert all("5 micro-batches: losses and outputs bit-equal to one process, gradients to" in line for line in lines)


@pytest.mark.all
def test_lightning(tmp_path):
    """And the page of its run."""
    pytest.importorskip("lightning")
    pytest.importorskip("plotly")
    command = [sys.executable, str(EXAMPLES / "lightning_example.py"), "--num-gpus", "2", "--steps", "12"]
    result = subprocess.run(
        [*command, "--folder", str(tmp_path), "--profile"], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("version_*/checkpoints/*.ckpt"))) == 1
    assert "val_loss" in result.stdout
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 0
    assert "<h2>Loss and learning rate</h2>" in (tmp_path / "report.html").read_text()


@pytest.mark.all
def test_transformer():
    pytest.importorskip("transformers")
    command = [sys.executable, str(EXAMPLES / "transformer_example.py"), "--num-gpus", "2", "--steps", "3"]
    result = subprocess.run([*command, "--blocks", "2"], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "loss" in result.stdout


@pytest.mark.all
@pytest.mark.parametrize("name", ["moe", "qwen3_moe"])
def test_models_with_experts_report_their_load(tmp_path, name):
    pytest.importorskip("plotly")
    settings = json.loads((EXAMPLES / f"{name}.json").read_text())
    assert settings["pipeline"]["load_report_steps"] == 10
    settings["pipeline"]["load_report_steps"] = 2
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += [str(EXAMPLES / f"pretrain_{name}.py"), "--deepspeed_config", str(tmp_path / "ds.json")]
    result = subprocess.run(
        [*command, "--steps", "2", "--blocks", "3", "--name", "run"],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    first, second = map(json.loads, (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines())
    loads = [value for key, value in second.items() if key.endswith("max_over_mean")]
    assert len(loads) == 3 and min(loads) >= 1 and not any(key.startswith("expert_load") for key in first)
    assert '<section id="experts">' in (tmp_path / "runs" / "run" / "report.html").read_text()
