"""What goes into a batch and what comes out: loaders, the feed of micro-batches, evaluation, losses."""
