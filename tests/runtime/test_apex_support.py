"""apex detection, with fake modules in the place of what may be installed."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from dualpipe_engine.runtime.apex_support import apex_status

NAMES = ("apex", "apex.optimizers", "amp_C", "fused_weight_gradient_mlp_cuda")


class FusedAdam(torch.optim.Optimizer):
    pass


def wgrad(x: Any, grad: Any, total: Any) -> None:
    raise AssertionError("detection must not call it")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`installed(name={attribute: value})` makes exactly these modules importable."""

    def put(**modules: dict[str, Any]) -> None:
        for name in NAMES:
            module = None
            if name.replace(".", "_") in modules:
                module = ModuleType(name)
                module.__path__ = []
                vars(module).update(modules[name.replace(".", "_")])
            monkeypatch.setitem(sys.modules, name, module)

    return put


def test_nothing_installed(installed: Any) -> None:
    installed()
    status = apex_status()
    assert (status.wgrad, status.fused_adam) == (None, None)
    assert "not installed" in status.message


def test_unrelated_package_is_named(installed: Any) -> None:
    installed(apex={})
    status = apex_status()
    assert (status.wgrad, status.fused_adam) == (None, None)
    assert "PyPI" in status.message and "NVIDIA/apex" in status.message


def test_everything(installed: Any) -> None:
    installed(
        apex={},
        apex_optimizers={"FusedAdam": FusedAdam},
        amp_C={},
        fused_weight_gradient_mlp_cuda={"wgrad_gemm_accum_fp32": wgrad},
    )
    status = apex_status()
    assert status.wgrad is wgrad and status.fused_adam is FusedAdam
    assert "weight gradient available" in status.message and "FusedAdam available" in status.message


def test_python_only_build(installed: Any) -> None:
    installed(apex={}, apex_optimizers={"FusedAdam": FusedAdam})
    status = apex_status()
    assert (status.wgrad, status.fused_adam) == (None, None)
    assert "weight gradient not built" in status.message and "FusedAdam not built" in status.message


def test_extension_without_the_optimizers(installed: Any) -> None:
    installed(apex={}, fused_weight_gradient_mlp_cuda={"wgrad_gemm_accum_fp32": wgrad})
    status = apex_status()
    assert status.wgrad is wgrad and status.fused_adam is None


def test_extension_that_cannot_load(installed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    installed(apex={}, apex_optimizers={})
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fused_weight_gradient_mlp_cuda")
    assert apex_status().wgrad is None
