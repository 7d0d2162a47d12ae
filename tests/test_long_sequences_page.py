"""docs/long_sequences.md: its job trains, on a smaller model."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from dualpipe_engine.cli.main import main

PAGE = (Path(__file__).parents[1] / "docs" / "long_sequences.md").read_text()
VOCABULARY, LENGTH, RANKS, SHARED, MICROS = 61, 32, 2, 2, 4


def test_its_bytes_are_those_of_its_keys(tmp_path, capsys):
    """A row that has no ranks, stock DeepSpeed's, is in the table, too."""
    (settings,) = re.findall(r"```json\n({.*?})\n```", PAGE, re.S)
    (command,) = (line for line in PAGE.splitlines() if line.startswith("dualpipe memory"))
    (tmp_path / "long.json").write_text(settings)
    command = command.replace("long.json", str(tmp_path / "long.json"))
    assert main(shlex.split(command)[1:]) == 0
    shown = capsys.readouterr().out
    assert "1f1b-deepspeed: DeepSpeed's own pipeline engine shares no sequences" in shown
    assert main([*shlex.split(command)[1:], "--format", "json"]) == 0
    rows = {row["schedule"]: row["ranks"] for row in json.loads(capsys.readouterr().out)["schedules"]}
    assert not rows["1f1b-deepspeed"] and max(rank["total"] for rank in rows["interleaved"]) < 80e9


@pytest.mark.all
def test_the_job_trains(tmp_path):
    """Two ranks of four stages each, two replicas that share each sequence; on one text, which they come to know."""
    *_, script = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (settings,) = (json.loads(text) for text in re.findall(r"```json\n({.*?})\n```", PAGE, re.S))
    assert settings["pipeline"]["tiled_loss"] and settings["pipeline"]["activation_checkpoint_interval"]
    settings |= {"sequence_parallel_size": SHARED, "gradient_accumulation_steps": MICROS}
    settings["optimizer"]["params"]["lr"] = 0.01
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=LENGTH, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    torch.save(torch.randint(1, VOCABULARY, (LENGTH,)).repeat(6 * MICROS), tmp_path / "tokens.pt")
    (tmp_path / "long.py").write_text(script)
    (tmp_path / "long.json").write_text(json.dumps(settings))
    command = f"-m torch.distributed.run --standalone --nproc-per-node {RANKS * SHARED} long.py model tokens.pt"
    done = subprocess.run(
        [sys.executable, *command.split(), str(LENGTH), str(RANKS)],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(text) for text in re.findall(r"step \d+: loss ([\d.]+)", done.stdout)]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.5
    assert (tmp_path / "checkpoints" / "latest").exists()
