"""A model of transformers as a PipelineModule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualpipe_engine.adapters import ModelAdapter

from .loss import TrainerLoss

if TYPE_CHECKING:
    from deepspeed.pipe import PipelineModule


def on_stages(adapter: ModelAdapter, loss: TrainerLoss, stages: int, replicas: int) -> PipelineModule:
    """The module that an engine is made of. Collective.

    Args:
        adapter: of the model, whose layers it takes as they are.
        loss: of the last stage.
        stages: ranks of a pipeline.
        replicas: pipelines.
    """
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    deepspeed.init_distributed(verbose=False)  # takes the process group that is there
    return PipelineModule(
        adapter.to_layer_specs(),
        topology=PipeDataParallelTopology(stages, replicas),
        loss_fn=loss,
        partition_method="parameters",
        dynamic_shape=True,
    )
