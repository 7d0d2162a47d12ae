"""Adapters: a whole model, of Hugging Face transformers or plain torch, cut into pipeline stages.

from dualpipe_engine.adapters import get_model_adapter
adapter = get_model_adapter(model)
stages = adapter.partition(num_partitions=4)
module = PipelineModule(adapter.to_layer_specs(), num_stages=4, loss_fn=adapter.loss_fn)
"""

from .adapter import ModelAdapter, get_model_adapter
from .families import Family, register_family
from .gather import gather_state_dict
from .registry import register_adapter

__all__ = [
    "Family",
    "ModelAdapter",
    "gather_state_dict",
    "get_model_adapter",
    "register_adapter",
    "register_family",
]
