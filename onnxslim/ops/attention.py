"""Attention in one operator, and Einsum."""

from __future__ import annotations

import math

from onnxslim.ir.graph import Node
from onnxslim.ops.channels import attention
from onnxslim.ops.spec import Channels, OpSpec, Trait, register, sizes


def _einsum_macs(node: Node) -> int | None:
    """One product for every combination of the letters; of three or more operands, multiplied at once."""
    terms, _ = attention.parse(node.attrs["equation"])
    lengths: dict[str, int] = {}
    for term, tensor in zip(terms, node.inputs, strict=True):
        shape = sizes(tensor.shape)
        if shape is None or len(shape) != len(term):  # an ellipsis stands for any number of axes
            return None
        for letter, length in zip(term, shape, strict=True):
            lengths[letter] = max(lengths.get(letter, 1), length)
    return math.prod(lengths.values())


def _attention_macs(node: Node) -> int | None:
    """Products of queries and keys, and of what comes of them and values, of each head of queries."""
    query, key, value = (sizes(tensor.shape) for tensor in node.inputs[:3])
    cache = node.input(4)
    past = (0, 0, 0, 0) if cache is None else sizes(cache.shape)
    if query is None or key is None or value is None or past is None:
        return None
    if len(query) == 3:
        heads, shared = int(node.attrs["q_num_heads"]), int(node.attrs["kv_num_heads"])
        size, mixed = query[2] // heads, value[2] // shared
    else:
        heads, size, mixed = query[1], query[3], value[3]
    return query[0] * heads * query[-2] * (key[-2] + past[2]) * (size + mixed)


def _linear_attention_macs(node: Node) -> int | None:
    """Each step adds a product of key and value to the state, of each head, and multiplies it by queries; by
    keys, too, where the state is corrected."""
    query, state = (
        sizes(node.inputs[0].shape),
        sizes(node.outputs[1].shape) if len(node.outputs) > 1 else None,
    )
    if query is None or state is None:
        return None
    group = int(node.attrs["q_num_heads"]) // int(node.attrs["kv_num_heads"])
    corrected = "delta" in node.attrs.get("update_rule", "gated_delta")
    return math.prod(query[:2]) * math.prod(state[1:]) * (group + 1 + corrected)


register(
    OpSpec(
        "Attention",
        traits=Trait.COUNTS_OUTPUTS,
        macs=_attention_macs,
        channels=Channels(attention.attention, attention.cut_attention),
        example="""<ir_version: 10, opset_import: ["" : 23]>
g (float[N,3,8] q, float[N,5,4] k, float[N,5,4] v) => (float[N,3,8] y)
{ y = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v) }""",
    ),
    OpSpec(
        "RotaryEmbedding",
        channels=Channels(attention.rotary_embedding, attention.cut_rotary_embedding),
        example="""<ir_version: 10, opset_import: ["" : 23]>
g (float[N,3,8] x, float[N,3,1] c, float[N,3,1] s) => (float[N,3,8] y)
{ y = RotaryEmbedding<num_heads=4>(x, c, s) }""",
    ),
    OpSpec(
        "LinearAttention",
        channels=Channels(attention.linear_attention, attention.cut_attention),
        macs=_linear_attention_macs,
        example="""<ir_version: 12, opset_import: ["" : 27]>
g (float[N,3,8] q, float[N,3,4] k, float[N,3,6] v) => (float[N,3,12] y, float[N,2,2,3] s)
{ y, s = LinearAttention<q_num_heads=4, kv_num_heads=2, update_rule="linear">(q, k, v) }""",
    ),
    OpSpec(
        "Einsum",
        macs=_einsum_macs,
        channels=Channels(attention.einsum),
        example="""<ir_version: 8, opset_import: ["" : 17]>
g (float[N,3,4] x, float[4,5] w) => (float[N,3,5] y)
{ y = Einsum<equation="bij,jk->bik">(x, w) }""",
    ),
)
