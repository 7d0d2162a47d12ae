"""What NVIDIA's apex offers here, found by importing each extension on its own.

Only two things of apex are of use to a pipeline: the weight gradient product that adds into fp32 `main_grad`, and
FusedAdam. The package called `apex` on PyPI is another project.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch

from .weight_grad_ops import FusedWgrad

_NONE = "NVIDIA apex is not installed; torch's own operations are used."
_UNRELATED = (
    "The installed package apex is PyPI's web toolkit, not NVIDIA apex: `pip uninstall apex`, then build "
    "https://github.com/NVIDIA/apex from source. torch's own operations are used."
)


@dataclass(frozen=True)
class ApexStatus:
    """Usable parts of apex.

    Args:
        wgrad: `wgrad(x, grad, total)` adds `grad.T @ x` to `total`: `x` [rows, in] and `grad` [rows, out] in half
            precision, `total` [out, in] fp32, contiguous, all on CUDA. None if not built. Give it to
            `DeferredWeightGrads(fused_wgrad=...)` for stages on CUDA.
        fused_adam: the class apex.optimizers.FusedAdam, or None.
        message: one sentence or two for a log.
    """

    wgrad: FusedWgrad | None
    fused_adam: type[torch.optim.Optimizer] | None
    message: str


def apex_status() -> ApexStatus:
    """Look for apex; never raises."""
    apex = _load("apex")
    wgrad = getattr(_load("fused_weight_gradient_mlp_cuda"), "wgrad_gemm_accum_fp32", None)
    optimizers = _load("apex.optimizers")
    fused_adam = getattr(optimizers, "FusedAdam", None) if _load("amp_C") is not None else None
    if apex is None and wgrad is None:
        return ApexStatus(None, None, _NONE)
    if wgrad is None and optimizers is None:
        return ApexStatus(None, None, _UNRELATED)
    found = {"fused weight gradient": wgrad, "FusedAdam": fused_adam}
    parts = (f"{name} {'available' if part else 'not built'}" for name, part in found.items())
    return ApexStatus(wgrad, fused_adam, f"NVIDIA apex: {', '.join(parts)}.")


def _load(name: str) -> ModuleType | None:
    """The module, or None if it is absent or fails while it loads, as an extension built for another torch does."""
    try:
        return importlib.import_module(name)
    except Exception:
        return None
