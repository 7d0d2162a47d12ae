"""DeepSpeed's engine on a plan: configuration, topology, stages, data, training step, checkpoints."""
