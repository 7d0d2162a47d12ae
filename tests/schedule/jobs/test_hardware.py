import json

import pytest

from dualpipe_engine.errors import ConfigError
from dualpipe_engine.schedule.jobs.hardware import KNOWN, load_hardware


def test_a_file_changes_a_known_gpu(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"like": "h800", "network": 25e9}))
    found = load_hardware(str(path))
    assert (found.network, found.bf16) == (25e9, KNOWN["h800"].bf16)


@pytest.mark.parametrize(
    ("data", "reason"),
    [({"like": "h8000"}, "did you mean 'h800'"), ({"gpus": 1}, "'gpus'"), ([], "describe"), ({}, "missing")],
)
def test_wrong_files_are_refused(tmp_path, data, reason):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=reason):
        load_hardware(str(path))
