"""`slim()`, as callers of PyPI's OnnxSlim know it."""
