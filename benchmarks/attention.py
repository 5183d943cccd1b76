"""Attention and recurrent networks in small: the structure of the published ones, random weights.

An attention module says in ``num_heads_of()`` how many heads its projections have, and reads the width of a
head off its layers in ``refit()``: after pruning in PyTorch, both are the user's business.
"""

# PyTorch's annotations are incomplete, and where it is not installed its classes are Any.
# mypy: warn-return-any=False, disallow-subclassing-any=False, disallow-untyped-calls=False

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
VOCABULARY = 112


def mlp(width: int, hidden: int) -> nn.Sequential:
    """Two layers around a GELU."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class PackedAttention(nn.Module):
    """Self-attention with one projection for queries, keys and values, as in timm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def num_heads_of(self) -> dict[nn.Module, int]:
        return {self.qkv: self.num_heads}

    def refit(self) -> None:
        self.head_dim = self.qkv.out_features // (3 * self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))


class Encoder(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, attention: nn.Module, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), attention
        self.norm2, self.mlp = nn.LayerNorm(width), mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches, class token, positions, encoders, classifier on the class token (arXiv:2010.11929)."""

    extra = 1

    def __init__(self, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 16 + self.extra, width))
        blocks = (Encoder(PackedAttention(width, heads), width, 4 * width) for _ in range(2))
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.head(self.norm(self.blocks(x + self.position))[:, 0])


class DeiT(ViT):
    """A distillation token beside the class token, each with a head of its own (arXiv:2012.12877)."""

    extra = 2

    def __init__(self) -> None:
        super().__init__()
        self.distilled = nn.Parameter(0.02 * torch.randn(1, 1, 128))
        self.head_dist = nn.Linear(128, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        batch = x.shape[0]
        x = torch.cat([self.token.expand(batch, -1, -1), self.distilled.expand(batch, -1, -1), x], dim=1)
        x = self.norm(self.blocks(x + self.position))
        return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2


class BertAttention(nn.Module):
    """Three projections, scores written out, additive mask; residual and LayerNorm after it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def num_heads_of(self) -> dict[nn.Module, int]:
        return dict.fromkeys((self.query, self.key, self.value), self.num_heads)

    def refit(self) -> None:
        self.head_dim = self.query.out_features // self.num_heads

    def split(self, x: Tensor) -> Tensor:
        return x.view((*x.shape[:-1], self.num_heads, self.head_dim)).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.head_dim) + mask
        y = torch.matmul(scores.softmax(-1), v).permute(0, 2, 1, 3).contiguous()
        y = y.view((*y.shape[:-2], self.num_heads * self.head_dim))
        return self.norm(self.dense(y) + x)


class BertLayer(nn.Module):
    """Attention and feed-forward, normalized after the sum (arXiv:1810.04805)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = BertAttention(width, heads)
        self.mlp, self.norm = mlp(width, 4 * width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention(x, mask)
        return self.norm(self.mlp(x) + x)


class Bert(nn.Module):
    """Word, position and type embeddings, layers, pooler on the first token."""

    def __init__(self, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width, padding_idx=0)
        self.positions, self.types = nn.Embedding(64, width), nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(BertLayer(width, heads) for _ in range(2))
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, CLASSES)
        self.register_buffer("ids", torch.arange(64)[None])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        types = torch.zeros_like(input_ids)
        positions = self.positions(self.ids[:, : input_ids.shape[1]])
        x = self.norm(self.words(input_ids) + self.types(types) + positions)
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(torch.tanh(self.pooler(x[:, 0])))


class WindowAttention(nn.Module):
    """Attention in 4x4 windows with relative position bias and the mask of shifted windows."""

    window = 4

    def __init__(self, width: int, heads: int, size: int, shift: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.size, self.shift = heads, width // heads, size, shift
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias_table = nn.Parameter(0.02 * torch.randn((2 * self.window - 1) ** 2, heads))
        grid = torch.cartesian_prod(torch.arange(self.window), torch.arange(self.window))
        offset = grid[:, None] - grid[None] + self.window - 1
        self.register_buffer("bias_index", offset[..., 0] * (2 * self.window - 1) + offset[..., 1])
        self.register_buffer("mask", self._mask() if shift else None)

    def _mask(self) -> Tensor:
        """[windows, tokens, tokens]: -100 where tokens were no neighbours before the shift."""
        area = torch.zeros(1, self.size, self.size, 1)
        cuts = (slice(0, -self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
        for number, (rows, columns) in enumerate((a, b) for a in cuts for b in cuts):
            area[:, rows, columns] = number
        windows = self.partition(area).squeeze(-1)
        return (windows[:, None] != windows[:, :, None]) * -100.0

    def num_heads_of(self) -> dict[nn.Module, int]:
        return {self.qkv: self.num_heads}

    def refit(self) -> None:
        self.head_dim = self.qkv.out_features // (3 * self.num_heads)

    def partition(self, x: Tensor) -> Tensor:
        """[batch, size, size, width] to [batch * windows, tokens, width]."""
        batch, _, _, width = x.shape
        count, window = self.size // self.window, self.window
        x = x.view(batch, count, window, count, window, width)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, width)

    def merge(self, x: Tensor) -> Tensor:
        """The inverse of `partition`."""
        count, window, width = self.size // self.window, self.window, x.shape[-1]
        x = x.view(-1, count, count, window, window, width)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.size, self.size, width)

    def attend(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.head_dim**-0.5, qkv[1], qkv[2]
        bias = self.bias_table[self.bias_index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
        scores = q @ k.transpose(-2, -1) + bias.contiguous().unsqueeze(0)
        if self.mask is not None:
            count = self.mask.shape[0]
            scores = scores.view(-1, count, self.num_heads, tokens, tokens) + self.mask[:, None]
            scores = scores.view(-1, self.num_heads, tokens, tokens)
        y = (scores.softmax(-1) @ v).transpose(1, 2)
        return self.proj(y.reshape(rows, tokens, self.num_heads * self.head_dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = self.merge(self.attend(self.partition(x)))
        return torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x


class PatchMerging(nn.Module):
    """Every 2x2 tokens side by side, normalized and reduced to twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class Swin(nn.Module):
    """Windows, shifted windows, patch merging, one window (arXiv:2103.14030)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 64, 4, 4), nn.LayerNorm(64)
        self.layers = nn.Sequential(
            Encoder(WindowAttention(64, 4, 8, 0), 64, 256),
            Encoder(WindowAttention(64, 4, 8, 2), 64, 256),
            PatchMerging(64),
            Encoder(WindowAttention(128, 8, 4, 0), 128, 512),
        )
        self.last, self.head = nn.LayerNorm(128), nn.Linear(128, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.patch(image).permute(0, 2, 3, 1))
        return self.head(self.last(self.layers(x)).mean((1, 2)))


class RMSNorm(nn.Module):
    """Root mean square normalization, written out as in Llama (arXiv:1910.07467)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding of [batch, heads, tokens, dim], halves paired (arXiv:2104.09864)."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cosine + turned * sine


class GroupedAttention(nn.Module):
    """Causal grouped-query attention with rotary positions (arXiv:2305.13245)."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.num_heads, self.groups, self.head_dim = heads, groups, width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, groups * self.head_dim, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width, bias=False)

    def num_heads_of(self) -> dict[nn.Module, int]:
        return {self.query: self.num_heads, self.key: self.groups, self.value: self.groups}

    def refit(self) -> None:
        self.head_dim = self.query.out_features // self.num_heads

    def repeat(self, x: Tensor) -> Tensor:
        """Every key or value head once per query head that reads it."""
        batch, groups, tokens, dim = x.shape
        count = self.num_heads // self.groups
        return x[:, :, None].expand(batch, groups, count, tokens, dim).reshape(batch, -1, tokens, dim)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, mask: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.query(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        k = self.key(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        v = self.value(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        y = F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v), attn_mask=mask)
        return self.out(y.transpose(1, 2).contiguous().view(batch, tokens, -1))


class GatedMLP(nn.Module):
    """SiLU-gated feed-forward of Llama (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nn.Module):
    """Attention and gated feed-forward behind RMSNorm."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.attention = RMSNorm(width), GroupedAttention(width, heads, groups)
        self.norm2, self.mlp = RMSNorm(width), GatedMLP(width, 3 * width)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cosine, sine, mask)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Language model: embeddings shared with the output, RMSNorm, GQA, rotary positions, SwiGLU."""

    def __init__(self, width: int = 128, heads: int = 8, groups: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, groups) for _ in range(2))
        self.norm, self.head = RMSNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.words.weight
        dim = width // heads
        angles = torch.outer(torch.arange(64.0), 10000 ** (-torch.arange(0, dim, 2) / dim))
        self.register_buffer("cosine", angles.cos().repeat(1, 2))
        self.register_buffer("sine", angles.sin().repeat(1, 2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x, tokens = self.words(input_ids), input_ids.shape[1]
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        mask = torch.zeros(tokens, tokens).masked_fill(future, float("-inf"))
        for layer in self.layers:
            x = layer(x, self.cosine[:tokens], self.sine[:tokens], mask)
        return self.head(self.norm(x))


class EinsumAttention(nn.Module):
    """Attention written in Einsums over weights of shape [width, heads, dim]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        dim = width // heads
        self.query, self.key, self.value = (
            nn.Parameter(torch.randn(width, heads, dim) / math.sqrt(width)) for _ in range(3)
        )
        self.out = nn.Parameter(torch.randn(heads, dim, width) / math.sqrt(width))
        self.scale = dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        q = torch.einsum("btw,whd->bthd", x, self.query)
        k = torch.einsum("btw,whd->bthd", x, self.key)
        v = torch.einsum("btw,whd->bthd", x, self.value)
        share = torch.einsum("bqhd,bkhd->bhqk", q * self.scale, k).softmax(-1)
        return torch.einsum("bhqk,bkhd,hdw->bqw", share, v, self.out)


class EinsumNet(nn.Module):
    """Two encoders with Einsum attention over a sequence of features."""

    def __init__(self, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.enter = nn.Linear(48, width)
        blocks = (Encoder(EinsumAttention(width, heads), width, 3 * width) for _ in range(2))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.blocks(self.enter(features)).mean(1))


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention` from queries to memory, with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return x + self.attention(self.norm(x), memory, memory, need_weights=False)[0]


class Detr(nn.Module):
    """Convolutional features, learned queries, PyTorch's own attention, boxes and classes."""

    def __init__(self, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 64, 3, 4, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, width, 3, 2, 1)
        )
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.queries = nn.Parameter(0.02 * torch.randn(1, 8, width))
        self.encoder = CrossAttention(width, heads)
        self.decoder = nn.ModuleList(CrossAttention(width, heads) for _ in range(2))
        self.mlps = nn.ModuleList(mlp(width, 3 * width) for _ in range(2))
        self.boxes, self.classes = mlp(width, width), nn.Linear(width, CLASSES)
        self.corners = nn.Linear(width, 4)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.backbone(image).flatten(2).permute(0, 2, 1) + self.position
        memory = self.encoder(memory, memory)
        x = self.queries.repeat(image.shape[0], 1, 1)
        for layer, hidden in zip(self.decoder, self.mlps, strict=True):
            x = layer(x, memory)
            x = x + hidden(x)
        return self.corners(F.relu(self.boxes(x))).sigmoid(), self.classes(x)


class Recurrent(nn.Module):
    """A projection, two bidirectional LSTM layers, classifier on the mean over time."""

    def __init__(self, width: int = 64, hidden: int = 96) -> None:
        super().__init__()
        self.enter = nn.Linear(40, width)
        self.lstm = nn.LSTM(width, hidden, 2, batch_first=True, bidirectional=True)
        self.hidden, self.head = nn.Linear(2 * hidden, 128), nn.Linear(128, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        x, _ = self.lstm(F.relu(self.enter(features)))
        return self.head(F.relu(self.hidden(x.mean(1))))


class GatedRecurrent(nn.Module):
    """Embedded tokens through a GRU whose last state is classified."""

    def __init__(self, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.gru = nn.GRU(width, hidden, batch_first=True)
        self.hidden, self.head = nn.Linear(hidden, hidden), nn.Linear(hidden, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        _, state = self.gru(self.words(input_ids))
        return self.head(torch.tanh(self.hidden(state[-1])))


class GatedBlock(nn.Module):
    """A gated linear unit with a residual."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.enter, self.leave = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * hidden),
            nn.Linear(hidden, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leave(F.glu(self.enter(self.norm(x)), dim=-1))


class SharedNet(nn.Module):
    """One gated block used three times over, then the mean of the positions that the mask allows."""

    def __init__(self, width: int = 128, hidden: int = 256) -> None:
        super().__init__()
        self.enter, self.block = nn.Linear(48, width), GatedBlock(width, hidden)
        self.hidden, self.head = nn.Linear(width, 128), nn.Linear(128, CLASSES)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        x = self.enter(features)
        for _ in range(3):
            x = self.block(x)
        weight = mask.unsqueeze(-1)
        x = (x * weight).sum(1) / weight.sum(1).clamp(min=1e-6)
        return self.head(F.relu(self.hidden(x)))


class MixerBlock(nn.Module):
    """An MLP across tokens, then one across channels (arXiv:2105.01601)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.across = nn.LayerNorm(width), mlp(tokens, 64)
        self.norm2, self.within = nn.LayerNorm(width), mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norm2(x))


class Mixer(nn.Module):
    """Patches, mixer blocks, mean over tokens."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.Sequential(MixerBlock(16, width), MixerBlock(16, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))
