"""What must hold on all ranks, compared: configuration and layers, copies, finite values, written buffers.

A check reports or refuses; it changes nothing.
"""
