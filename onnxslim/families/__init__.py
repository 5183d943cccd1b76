"""Which slices of tensors can go together, and what they cost."""
