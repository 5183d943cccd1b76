"""Weights as codes into tables of values: what they are, and how a graph holds them."""
