"""Models as lists of layers for `deepspeed.pipe.PipelineModule`, with phases for overlap."""
