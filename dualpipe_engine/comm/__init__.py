"""Transfers between ranks: edges of a pipeline, exchanges of experts, and the stream that both are posted on.

Nothing here knows a plan's order (only how far a rank has come, to say who is waited for) or a model.
"""
