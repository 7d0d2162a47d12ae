"""From a PipelineModule to the stages of this rank: topology, cut, layers that move, parameter groups.

What is done with the stages afterwards stands elsewhere.
"""
