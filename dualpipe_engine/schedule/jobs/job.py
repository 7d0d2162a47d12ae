"""Job: how a model is trained on a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from ...errors import ConfigError
from .model_shape import ModelShape


@dataclass(frozen=True)
class Job:
    """How a model is trained.

    Args:
        gpus: all of them.
        ranks: pipeline ranks; every group of so many GPUs is a replica.
        experts: expert-parallel ranks, which lie across replicas.
        micro_batches: micro-batches of one pipeline.
        sequences: sequences of a micro-batch.
        length: tokens of a sequence.
        fp8: matrix products and dispatched tokens in FP8, where the hardware has it.
        deep_ep: tokens travel by DeepEP, once to each rank or node of their experts; otherwise by all-to-all, in bf16,
            once for each expert.
        sequence_parallel: replicas that share each sequence.
    """

    gpus: int
    ranks: int
    experts: int
    micro_batches: int
    sequences: int = 1
    length: int = 4096
    fp8: bool = True
    deep_ep: bool = True
    sequence_parallel: int = 1

    def __post_init__(self) -> None:
        if min(self.gpus, self.ranks, self.experts, self.micro_batches, self.sequences, self.length) < 1:
            raise ConfigError(f"counts of a job must be at least 1: {self}")
        if self.gpus % self.ranks:
            raise ConfigError(f"{self.gpus} GPUs are no multiple of {self.ranks} pipeline ranks: choose --ranks")
        if self.replicas % self.experts:
            raise ConfigError(
                f"{self.gpus} GPUs and {self.ranks} pipeline ranks make {self.replicas} replicas, no multiple of "
                f"{self.experts} expert-parallel ranks: choose --expert-parallel"
            )
        check_parts(self.replicas, self.sequence_parallel, self.length)

    @property
    def replicas(self) -> int:
        return self.gpus // self.ranks

    @property
    def tokens(self) -> int:
        """Of a micro-batch, those of a rank."""
        return self.sequences * self.length // self.sequence_parallel

    @property
    def step_tokens(self) -> int:
        """Of a step, over all replicas."""
        return self.tokens * self.micro_batches * self.replicas


#: How models were trained: pipeline ranks, expert-parallel ranks, sequences of a batch, tokens of a sequence
#: (arXiv 2412.19437, sections 3.2 and 4.2).
PUBLISHED_JOBS = {"deepseek-v3": (16, 64, 15360, 4096)}
#: GPU-hours for 10^12 tokens that were published, with the hardware: arXiv 2412.19437, section 1.
PUBLISHED_HOURS = {("deepseek-v3", "h800"): 180e3}


def published_hours(model: ModelShape, job: Job, hardware: str) -> float | None:
    """Those of `PUBLISHED_HOURS` for sequences of this length; None: there are none."""
    known = PUBLISHED_JOBS.get(model.name)
    return PUBLISHED_HOURS.get((model.name, hardware)) if known and job.length == known[3] else None


def make_job(
    model: ModelShape,
    gpus: int,
    ranks: int | None = None,
    experts: int | None = None,
    micro_batches: int | None = None,
    sequences: int = 1,
    length: int | None = None,
    fp8: bool = True,
    deep_ep: bool = True,
) -> Job:
    """A job; what is None is taken from how the model was trained, where that was published.

    Raises:
        ConfigError: a count is missing, or they do not fit together.
    """
    if gpus < 1 or (ranks is not None and ranks < 1):
        raise ConfigError(f"counts must be at least 1, got {gpus} GPUs and {ranks} pipeline ranks")
    known = PUBLISHED_JOBS.get(model.name)
    if ranks is None and known:
        ranks = known[0]
    if ranks is None:
        raise ConfigError(f"say how many pipeline ranks {model.name} has: --ranks N")
    if experts is None:
        counts = [layer.num_experts for layer in model.layers if layer.experts]
        experts = known[1] if known else max(1, gcd(gpus // ranks, 8, *counts)) if counts else 1
    check_shared(model, experts)
    check_heads(model)
    length = length or (known[3] if known else 4096)
    if micro_batches is None and known:
        # The batch keeps its tokens, as the report's did at 128K (480 sequences, section 4.3).
        micro_batches = max(1, known[2] * known[3] * ranks * model.shared // (gpus * sequences * length))
    if micro_batches is None:
        raise ConfigError(f"say how many micro-batches a pipeline of {model.name} runs in a step: --micro-batches M")
    return Job(gpus, ranks, experts, micro_batches, sequences, length, fp8, deep_ep, model.shared)


def check_shared(model: ModelShape, experts: int) -> None:
    """Whether so many ranks can share the experts of each layer.

    Raises:
        ConfigError: they cannot.
    """
    counts = {layer.num_experts for layer in model.layers if layer.experts}
    if experts > 1 and not counts:
        raise ConfigError(f"{model.name} has no experts to share: leave --expert-parallel out")
    for count in counts:
        if count % experts:
            raise ConfigError(f"{experts} ranks cannot share {count} experts of {model.name}: choose --expert-parallel")


def check_parts(replicas: int, shared: int, length: int) -> None:
    """Whether so many of the replicas can share each sequence of so many tokens.

    Raises:
        ConfigError: they cannot.
    """
    if replicas % shared:
        raise ConfigError(
            f"sequences are shared by {shared} ranks, but the pipeline has {replicas} replicas: their number must be a "
            f"multiple of {shared}; choose --sequence-parallel"
        )
    if length % shared:
        raise ConfigError(f"{length} tokens cannot be cut into {shared} parts: choose --sequence-length")


def check_heads(model: ModelShape) -> None:
    """Whether the ranks that share each sequence can divide the heads of each layer.

    Raises:
        ConfigError: they cannot.
    """
    shared = model.shared
    for heads, kv_heads in {layer.heads for layer in model.layers if layer.context}:
        if heads % shared or (kv_heads % shared and shared % kv_heads):
            raise ConfigError(
                f"{shared} ranks cannot share sequences of {model.name}, which has {heads} heads of queries and "
                f"{kv_heads} of keys and values: choose --sequence-parallel"
            )
