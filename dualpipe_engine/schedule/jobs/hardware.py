"""Hardware: what a GPU and its links can do, and which part of that a training step is taken to reach."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches

from ...errors import ConfigError
from ..plain_json import parse, read_text
from ..timing.costs import LEAST, MOST


@dataclass(frozen=True)
class Hardware:
    """One GPU in a cluster. Peaks are those of the data sheet (dense); the rest are assumptions, all of them printed.

    Args:
        name: of the GPU.
        bf16: peak FLOP/s of matrix products in bf16.
        fp8: the same in FP8; 0: matrix products run in bf16.
        bandwidth: bytes/s of device memory.
        memory: bytes of device memory.
        network: bytes/s that a GPU sends to other nodes.
        nvlink: bytes/s that a GPU sends to others of its node; 0: it does so over the network.
        gpus_per_node: GPUs of a node.
        sms: streaming multiprocessors.
        comm_sms: of them, those that communication kernels hold (20 in DeepSeek-V3's report, section 3.2.2).
        fp8_efficiency: part of the FP8 peak that fine-grained scaled matrix products of a layer sustain.
        bf16_efficiency: the same in bf16.
        attention_efficiency: part of the bf16 peak that the causal attention core sustains.
        memory_efficiency: part of the memory bandwidth that other kernels sustain.
        network_efficiency: part of the bandwidth of links that all-to-all, reductions and copies to the host sustain.
        pair_efficiency: part of a pair's time in which it computes, where communication hides under it (97.2 % in
            DeepSeek's published trace of DualPipe).
        imbalance: tokens of the busiest expert rank by those of the mean one.
        pcie: bytes/s of copies between device and host, each way.

    Raises:
        ConfigError: a field is no number above 0; `fp8`, `nvlink` and `comm_sms` may be 0.
    """

    name: str
    bf16: float
    fp8: float
    bandwidth: float
    memory: float
    network: float
    nvlink: float = 0.0
    gpus_per_node: int = 8
    sms: int = 132
    comm_sms: int = 20
    fp8_efficiency: float = 0.42
    bf16_efficiency: float = 0.65
    attention_efficiency: float = 0.45
    memory_efficiency: float = 0.75
    network_efficiency: float = 0.9
    pair_efficiency: float = 0.972
    imbalance: float = 1.1
    # PCIe Gen5 x16: the data sheets of H100 and H200 have 128 GB/s, both ways together; that of A100 (Gen4) 64 GB/s.
    pcie: float = 64e9

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name in ("fp8", "nvlink", "comm_sms") else LEAST
            if name != "name" and not (type(value) in (int, float) and least <= value <= MOST):
                raise ConfigError(f"{name!r} of hardware {self.name!r} must be a number above 0, got {value!r}")


KNOWN = {
    each.name: each
    for each in (
        Hardware("h800", 989e12, 1979e12, 3.35e12, 80e9, 50e9, 200e9),
        Hardware("h100", 989e12, 1979e12, 3.35e12, 80e9, 50e9, 450e9),
        Hardware("h200", 989e12, 1979e12, 4.8e12, 141e9, 50e9, 450e9),
        Hardware("a100", 312e12, 0.0, 2.0e12, 80e9, 25e9, 300e9, sms=108, pcie=32e9),
    )
}


def load_hardware(name: str) -> Hardware:
    """A built-in GPU, or a .json file with the fields of `Hardware`; with "like": "h800" it changes a built-in one.

    Raises:
        ConfigError: the name is unknown, or the file is wrong.
    """
    if name in KNOWN:
        return KNOWN[name]
    if not name.endswith(".json"):
        near = get_close_matches(name, KNOWN, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"unknown hardware {name!r}: did you mean {near!r}? There are {', '.join(KNOWN)}, or a .json file"
        )
    try:
        data = parse(read_text(name))
        if not isinstance(data, dict):
            raise ValueError("it holds no fields {...}")
        like = data.pop("like", None)
        unknown = data.keys() - {each.name for each in fields(Hardware)}
        if unknown:
            raise ConfigError(f"{name}: unknown field {sorted(unknown)[0]!r}")
        return Hardware(**{**(asdict(load_hardware(str(like))) if like else {}), **data})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name} does not describe hardware: {error}") from None
