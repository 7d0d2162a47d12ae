"""DeepSpeed's engine on a plan.

Here: what a user meets (`initialize`, the engine, its configuration and the tables of keys and methods), the plan that
all ranks agree on, and measured timelines. A mechanism of its own has a folder.
"""
