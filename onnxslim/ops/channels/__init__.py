"""Which slices of their tensors operators tie together, and what changes in them when slices are removed.

`trace` functions visit a node in the order of the graph and label its outputs; `cut` functions bring
attributes and constants in line with what was removed.
"""
