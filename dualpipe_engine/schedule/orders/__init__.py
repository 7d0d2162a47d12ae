"""One file a schedule: the order of F, I, W and B on every rank, and the registry that names them.

No sends and receives (`passes.lower` adds them), no measured costs, no choice between schedules.
"""
