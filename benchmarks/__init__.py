"""Measurements beside peers; each script prints a table and says in its docstring how to run it."""
