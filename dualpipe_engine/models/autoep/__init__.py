"""MoE blocks of others shared by ranks: DeepSpeed's AutoEP, the "expert_parallel" of its JSON, within a pipeline.

DeepSpeed's parser finds the blocks and its layers, routers and experts take their place; here are what the section may
hold, the layer in steps that can be phases, and the phases of the decoder layer around it.
"""
