"""Operators that tie a file to the machine it was saved on, which no pass can do anything with."""

from __future__ import annotations

from onnxslim.ir.graph import Node
from onnxslim.ops.contrib import DOMAIN

# Domains of operators whose tensors are laid out in blocks of channels, or with channels last.
_LAYOUTS = ("com.microsoft.nchwc", "com.ms.internal.nhwc")
# Operators beside others of a domain, of the same kind.
_LAID_OUT = ("NhwcConv", "NhwcFusedConv", "NhwcMaxPool", "QLinearConv")
_COMPILED = "EPContext"


def binding(node: Node) -> str | None:
    """What ties a node to a machine, and where to start from instead; None for most nodes."""
    if node.domain in _LAYOUTS or (node.domain == DOMAIN and node.op in _LAID_OUT):
        return (
            "is laid out for the processor that the file was saved on: start from the model that was "
            "optimized, or save that with ORT_ENABLE_EXTENDED at the most"
        )
    if node.domain == DOMAIN and node.op == _COMPILED:
        return "holds what was compiled for one device: start from the model that was compiled"
    return None
