"""Export what `benchmarks/slim.py` simplifies besides trained models: twelve layers of ViT and BERT, a YOLO.

    pip install -e . torch==2.13.0 transformers onnxscript
    python benchmarks/untrained.py [NAME ...]

Weights are random, those of the YOLO with normalizations that keep activations in scale as after training.
Each is exported with both PyTorch exporters and a free batch, the ViT also with a fixed one, into the folder
`untrained` of the zoo's cache.
"""

# Calling an nn.Module returns Any, and without PyTorch installed the class itself is Any.
# mypy: warn-return-any=False, disallow-subclassing-any=False

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onnxslim.models import zoo

WIDTH, LAYERS, HEADS = 192, 12, 3


class Classifier(nn.Module):
    """The logits of an image classifier of transformers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return self.net(pixel_values=image).logits


class Encoder(nn.Module):
    """The token vectors of a BERT."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.net(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def vit() -> nn.Module:
    """ViT: ``image`` [batch, 3, 224, 224]."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=4 * WIDTH
    )
    return Classifier(ViTForImageClassification(config))


def bert() -> nn.Module:
    """BERT: token ids and mask [batch, tokens]."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
    )
    return Encoder(BertModel(config, add_pooling_layer=False))


# ------------------------------------------------------------------------------------ a detector like YOLOv8


class Block(nn.Module):
    """Convolution, batch normalization, SiLU."""

    def __init__(self, before: int, after: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two blocks, with a shortcut or not."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.first, self.second, self.add = (
            Block(channels, channels, 3),
            Block(channels, channels, 3),
            shortcut,
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return x + y if self.add else y


class C2f(nn.Module):
    """Halves of which one goes through bottlenecks, all results joined."""

    def __init__(self, before: int, after: int, count: int, shortcut: bool = False) -> None:
        super().__init__()
        self.half = after // 2
        self.start, self.end = Block(before, after), Block((2 + count) * self.half, after)
        self.steps = nn.ModuleList(Bottleneck(self.half, shortcut) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.start(x).split((self.half, self.half), 1))
        for step in self.steps:
            parts.append(step(parts[-1]))
        return self.end(torch.cat(parts, 1))


class SPPF(nn.Module):
    """Three poolings in a row, all results joined."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.start, self.end = Block(channels, channels // 2), Block(channels * 2, channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.start(x)]
        for _ in range(3):
            parts.append(nn.functional.max_pool2d(parts[-1], 5, 1, 2))
        return self.end(torch.cat(parts, 1))


class Detect(nn.Module):
    """Boxes from distributions of distances to anchor points, and class scores."""

    def __init__(self, channels: tuple[int, ...], classes: int = 20, bins: int = 16) -> None:
        super().__init__()
        self.classes, self.bins = classes, bins
        self.box = nn.ModuleList(
            nn.Sequential(Block(c, 64, 3), Block(64, 64, 3), nn.Conv2d(64, 4 * bins, 1)) for c in channels
        )
        self.score = nn.ModuleList(
            nn.Sequential(Block(c, 64, 3), Block(64, 64, 3), nn.Conv2d(64, classes, 1)) for c in channels
        )
        self.expect = nn.Conv2d(bins, 1, 1, bias=False)

    def forward(self, maps: list[Tensor]) -> Tensor:
        both = [
            torch.cat((box(x), score(x)), 1) for box, score, x in zip(self.box, self.score, maps, strict=True)
        ]
        points, strides = self.anchors(maps)
        flat = torch.cat([x.view(x.shape[0], 4 * self.bins + self.classes, -1) for x in both], 2)
        box, score = flat.split((4 * self.bins, self.classes), 1)
        spread = box.view(box.shape[0], 4, self.bins, box.shape[2]).transpose(2, 1).softmax(1)
        near, far = self.expect(spread).view(box.shape[0], 4, box.shape[2]).chunk(2, 1)
        low, high = points - near, points + far
        return torch.cat((torch.cat(((low + high) / 2, high - low), 1) * strides, score.sigmoid()), 1)

    @staticmethod
    def anchors(maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        points, strides = [], []
        for x, stride in zip(maps, (8.0, 16.0, 32.0), strict=True):
            height, width = x.shape[2:]
            y, z = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
            points.append(torch.stack((z, y), -1).view(-1, 2))
            strides.append(torch.full((height * width, 1), stride))
        return torch.cat(points).transpose(0, 1)[None], torch.cat(strides).transpose(0, 1)


class Detector(nn.Module):
    """Backbone, a pyramid up and down, and heads at three scales: ``image`` [batch, 3, 320, 320]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Block(3, 16, 3, 2), Block(16, 32, 3, 2), C2f(32, 32, 1, True))
        self.p3 = nn.Sequential(Block(32, 64, 3, 2), C2f(64, 64, 2, True))
        self.p4 = nn.Sequential(Block(64, 128, 3, 2), C2f(128, 128, 2, True))
        self.p5 = nn.Sequential(Block(128, 256, 3, 2), C2f(256, 256, 1, True), SPPF(256))
        self.up = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.up4, self.up3 = C2f(384, 128, 1), C2f(192, 64, 1)
        self.down3, self.down4 = Block(64, 64, 3, 2), Block(128, 128, 3, 2)
        self.out4, self.out5 = C2f(192, 128, 1), C2f(384, 256, 1)
        self.detect = Detect((64, 128, 256))

    def forward(self, image: Tensor) -> Tensor:
        p3 = self.p3(self.stem(image))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.up4(torch.cat((self.up(p5), p4), 1))
        n3 = self.up3(torch.cat((self.up(n4), p3), 1))
        o4 = self.out4(torch.cat((self.down3(n3), n4), 1))
        o5 = self.out5(torch.cat((self.down4(o4), p5), 1))
        return self.detect([n3, o4, o5])


# ----------------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class Network:
    """How to build a network, example inputs, and the names of free axes."""

    build: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    axes: dict[int, str] = field(default_factory=lambda: {0: "batch"})


IMAGE = {"image": torch.zeros(2, 3, 224, 224)}
TOKENS = torch.arange(24).reshape(2, 12)
NETWORKS = {
    "vit12": Network(vit, IMAGE),
    "vit12_fixed": Network(vit, {"image": torch.zeros(1, 3, 224, 224)}, {}),
    "bert12": Network(
        bert, {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}, {0: "batch", 1: "tokens"}
    ),
    "yolo": Network(Detector, {"image": torch.zeros(2, 3, 320, 320)}),
}
EXPORTERS = ("torchscript", "dynamo")


def folder() -> Path:
    """Where the models are."""
    return zoo.cache() / "untrained"


def _randomize(net: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Give batch normalizations something to do, and the statistics of what they see of random inputs."""
    norms = [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]
    for part in net.modules() if norms else ():
        if isinstance(part, nn.Conv2d) and part.weight.requires_grad:
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = None  # the plain average over batches
    net.train(bool(norms))
    with torch.no_grad():
        for _ in range(4 if norms else 0):
            net(**{name: torch.randn_like(value) for name, value in inputs.items()})
    net.eval()


def export(name: str, exporter: str) -> None:
    """Write one model, whole or not at all."""
    network = NETWORKS[name]
    torch.manual_seed(0)
    net = network.build().eval()
    _randomize(net, network.inputs)
    folder().mkdir(parents=True, exist_ok=True)
    target = folder() / f"{name}.{exporter}.onnx"
    temporary = target.with_suffix(f".{os.getpid()}")
    names = list(network.inputs)
    given: dict[str, Any] = {"input_names": names, "output_names": ["result"]}
    if exporter == "dynamo":
        free = {axis: torch.export.Dim(label) for axis, label in network.axes.items()}
        given |= {"dynamic_shapes": (free,) * len(names)} if free else {}
        torch.onnx.export(
            net, tuple(network.inputs.values()), temporary, dynamo=True, external_data=False, **given
        )
    else:
        axes = {**dict.fromkeys(names, network.axes), "result": {0: "batch"}} if network.axes else {}
        torch.onnx.export(
            net,
            tuple(network.inputs.values()),
            str(temporary),
            dynamo=False,
            opset_version=17,
            dynamic_axes=axes,
            **given,
        )
    os.replace(temporary, target)
    print(f"{target.name}: {target.stat().st_size} bytes")


def main() -> None:
    """Export the named networks, all by default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="*", choices=[*NETWORKS, []], help="all by default")
    for name in parser.parse_args().name or NETWORKS:
        for exporter in EXPORTERS:
            export(name, exporter)


if __name__ == "__main__":
    main()
