"""Convolutional networks in small: the structure of the published ones, a few layers deep, random weights.

Widths are multiples of 16. ``benchmarks/architectures.py`` says which layers' outputs are the network's.
"""

# PyTorch's annotations are incomplete, and where it is not installed its classes are Any.
# mypy: warn-return-any=False, disallow-subclassing-any=False, disallow-untyped-calls=False

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
Activation = Callable[[], nn.Module]


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    act: Activation | None = nn.ReLU,
) -> nn.Sequential:
    """Convolution with "same" padding, batch normalization and an optional activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([act()] if act else []))


class Classifier(nn.Module):
    """Features, global average pool, linear head."""

    def __init__(self, features: nn.Module, channels: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.features(image), 1).flatten(1))


class Residual(nn.Module):
    """Body plus shortcut, which is projected where shapes differ, then ReLU."""

    def __init__(self, body: nn.Module, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = body
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def basic(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Two 3x3 convolutions (arXiv:1512.03385)."""
    body = nn.Sequential(conv_bn(inputs, outputs, 3, stride), conv_bn(outputs, outputs, act=None))
    return Residual(body, inputs, outputs, stride)


def bottleneck(inputs: int, width: int, outputs: int, stride: int, groups: int = 1) -> nn.Module:
    """1x1, 3x3 (grouped in ResNeXt, arXiv:1611.05431), 1x1."""
    middle = conv_bn(width, width, 3, stride, groups)
    body = nn.Sequential(conv_bn(inputs, width, 1), middle, conv_bn(width, outputs, 1, act=None))
    return Residual(body, inputs, outputs, stride)


def resnet() -> nn.Module:
    """Basic blocks, then bottlenecks, behind a stem with max pooling."""
    return Classifier(
        nn.Sequential(
            conv_bn(3, 64, 7, 2),
            nn.MaxPool2d(3, 2, 1),
            basic(64, 64, 1),
            basic(64, 128, 2),
            basic(128, 128, 1),
            bottleneck(128, 64, 256, 2),
            bottleneck(256, 64, 256, 1),
        ),
        256,
    )


def resnext() -> nn.Module:
    """Bottlenecks with 8 groups."""
    return Classifier(
        nn.Sequential(
            conv_bn(3, 64, 3, 2),
            bottleneck(64, 128, 256, 1, groups=8),
            bottleneck(256, 128, 256, 1, groups=8),
            bottleneck(256, 256, 512, 2, groups=8),
        ),
        512,
    )


class VGG(nn.Module):
    """Plain convolutions, flattened into two fully connected layers (arXiv:1409.1556)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 64, 64, 128, 128, 256)
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if number % 2 else []
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4))
        self.hidden = nn.Sequential(nn.Linear(256 * 16, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 128))
        self.head = nn.Linear(128, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(torch.flatten(self.features(image), 1))))


class SqueezeExcite(nn.Module):
    """Channel gate (arXiv:1709.01507)."""

    def __init__(self, channels: int, squeezed: int, act: Activation, gate: Activation) -> None:
        super().__init__()
        self.reduce, self.act = nn.Conv2d(channels, squeezed, 1), act()
        self.expand, self.gate = nn.Conv2d(squeezed, channels, 1), gate()

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.expand(self.act(self.reduce(pooled))))


class Inverted(nn.Module):
    """Expand, depthwise, gate, project; added to the input where shapes allow (arXiv:1801.04381)."""

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        stride: int,
        act: Activation,
        kernel: int = 3,
        gate: Activation | None = None,
    ) -> None:
        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        inner = nn.SiLU if act is nn.SiLU else nn.ReLU
        self.body = nn.Sequential(
            *([conv_bn(inputs, hidden, 1, act=act)] if hidden != inputs else []),
            conv_bn(hidden, hidden, kernel, stride, hidden, act),
            *([SqueezeExcite(hidden, max(16, hidden // 4), inner, gate)] if gate else []),
            conv_bn(hidden, outputs, 1, act=None),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y if self.residual else y


def mobilenetv2() -> nn.Module:
    """Inverted residuals with ReLU6, the first without expansion."""
    return Classifier(
        nn.Sequential(
            conv_bn(3, 32, 3, 2, act=nn.ReLU6),
            Inverted(32, 32, 32, 1, nn.ReLU6),
            Inverted(32, 128, 48, 2, nn.ReLU6),
            Inverted(48, 192, 48, 1, nn.ReLU6),
            Inverted(48, 192, 64, 2, nn.ReLU6),
            Inverted(64, 256, 64, 1, nn.ReLU6),
            conv_bn(64, 256, 1, act=nn.ReLU6),
        ),
        256,
    )


class MobileNetV3(nn.Module):
    """Inverted residuals with squeeze-excite and Hardswish, and a head of two layers (arXiv:1905.02244)."""

    def __init__(self) -> None:
        super().__init__()
        gate = nn.Hardsigmoid
        self.features = nn.Sequential(
            conv_bn(3, 32, 3, 2, act=nn.Hardswish),
            Inverted(32, 32, 32, 1, nn.ReLU, gate=gate),
            Inverted(32, 96, 48, 2, nn.ReLU),
            Inverted(48, 192, 64, 2, nn.Hardswish, 5, gate),
            Inverted(64, 256, 64, 1, nn.Hardswish, 5, gate),
            conv_bn(64, 256, 1, act=nn.Hardswish),
        )
        self.hidden = nn.Sequential(nn.Linear(256, 256), nn.Hardswish(), nn.Dropout(0.2))
        self.head = nn.Linear(256, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(image), 1)
        return self.head(self.hidden(torch.flatten(x, 1)))


def efficientnet() -> nn.Module:
    """Inverted residuals with squeeze-excite and SiLU (arXiv:1905.11946)."""
    gate = nn.Sigmoid
    return Classifier(
        nn.Sequential(
            conv_bn(3, 32, 3, 2, act=nn.SiLU),
            Inverted(32, 32, 32, 1, nn.SiLU, gate=gate),
            Inverted(32, 192, 48, 2, nn.SiLU, gate=gate),
            Inverted(48, 288, 48, 1, nn.SiLU, 5, gate),
            Inverted(48, 288, 80, 2, nn.SiLU, 3, gate),
            Inverted(80, 480, 80, 1, nn.SiLU, 3, gate),
            conv_bn(80, 320, 1, act=nn.SiLU),
        ),
        320,
    )


class DenseLayer(nn.Module):
    """Pre-activation bottleneck whose result is appended to its input (arXiv:1608.06993)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


class Transition(nn.Module):
    """Normalization before a halving convolution and average pooling."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


def densenet() -> nn.Module:
    """Two dense blocks of three layers."""
    return Classifier(
        nn.Sequential(
            conv_bn(3, 64, 3, 2),
            *(DenseLayer(64 + 32 * n, 32) for n in range(3)),
            Transition(160, 80),
            *(DenseLayer(80 + 32 * n, 32) for n in range(3)),
            nn.BatchNorm2d(176),
            nn.ReLU(),
        ),
        176,
    )


class Mixed(nn.Module):
    """Four branches, concatenated (arXiv:1409.4842)."""

    def __init__(self, inputs: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        first, second, third, pooled = widths
        self.branches = nn.ModuleList(
            [
                conv_bn(inputs, first, 1),
                nn.Sequential(conv_bn(inputs, second // 2, 1), conv_bn(second // 2, second)),
                nn.Sequential(conv_bn(inputs, 32, 1), conv_bn(32, third), conv_bn(third, third)),
                nn.Sequential(nn.AvgPool2d(3, 1, 1), conv_bn(inputs, pooled, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def inception() -> nn.Module:
    """Blocks of four branches."""
    blocks = (Mixed(64, (64, 96, 32, 32)), nn.MaxPool2d(2), Mixed(224, (96, 128, 48, 48)))
    return Classifier(nn.Sequential(conv_bn(3, 64, 3, 2), *blocks), 320)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels of all groups in turn (arXiv:1707.01083)."""
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width)
    return x.transpose(1, 2).contiguous().view(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """Half of the channels pass by, at stride 2 through a branch of their own; shuffle (arXiv:1807.11164)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        own = inputs if stride == 2 else half
        self.bypass = (
            nn.Sequential(conv_bn(own, own, 3, 2, own, None), conv_bn(own, half, 1)) if stride == 2 else None
        )
        self.body = nn.Sequential(
            conv_bn(own, half, 1), conv_bn(half, half, 3, stride, half, None), conv_bn(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.bypass is None:
            left, right = x.chunk(2, dim=1)
            return shuffle(torch.cat([left, self.body(right)], 1), 2)
        return shuffle(torch.cat([self.bypass(x), self.body(x)], 1), 2)


def shufflenetv2() -> nn.Module:
    """Two stages, each with one unit of stride 2 and units with a bypass."""
    return Classifier(
        nn.Sequential(
            conv_bn(3, 32, 3, 2),
            ShuffleUnit(32, 128, 2),
            ShuffleUnit(128, 128, 1),
            ShuffleUnit(128, 128, 1),
            ShuffleUnit(128, 256, 2),
            ShuffleUnit(256, 256, 1),
            conv_bn(256, 256, 1),
        ),
        256,
    )


class C2f(nn.Module):
    """YOLOv8's block: split, a chain of bottlenecks, everything concatenated."""

    def __init__(self, inputs: int, outputs: int, depth: int, shortcut: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.shortcut = shortcut
        self.cv1 = conv_bn(inputs, outputs, 1, act=nn.SiLU)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv_bn(half, half, act=nn.SiLU), conv_bn(half, half, act=nn.SiLU))
            for _ in range(depth)
        )
        self.cv2 = conv_bn((2 + depth) * half, outputs, 1, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.blocks:
            last = parts[-1]
            parts.append(last + block(last) if self.shortcut else block(last))
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    """Three max poolings in a row, concatenated with their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.cv1 = conv_bn(channels, half, 1, act=nn.SiLU)
        self.cv2 = conv_bn(4 * half, channels, 1, act=nn.SiLU)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y = self.pool(x)
        z = self.pool(y)
        return self.cv2(torch.cat([x, y, z, self.pool(z)], 1))


class Detect(nn.Module):
    """Anchor-free head: boxes as distributions over distances, and class scores, of all levels."""

    bins = 16

    def __init__(self, channels: tuple[int, ...], sizes: tuple[int, ...], stride: int) -> None:
        super().__init__()
        width = 64
        self.boxes, self.scores = (
            nn.ModuleList(
                nn.Sequential(
                    conv_bn(c, width, act=nn.SiLU), conv_bn(width, width, act=nn.SiLU), nn.Conv2d(width, o, 1)
                )
                for c in channels
            )
            for o in (4 * self.bins, CLASSES)
        )
        centres = [self._centres(size) * stride * 2**n for n, size in enumerate(sizes)]
        self.register_buffer("centres", torch.cat(centres, 1))
        scales = [torch.full((1, size * size), float(stride * 2**n)) for n, size in enumerate(sizes)]
        self.register_buffer("scales", torch.cat(scales, 1))
        self.mean = nn.Conv2d(self.bins, 1, 1, bias=False).requires_grad_(False)
        self.mean.weight.data = torch.arange(float(self.bins)).view(1, self.bins, 1, 1)

    @staticmethod
    def _centres(size: int) -> Tensor:
        grid = torch.arange(size) + 0.5
        return torch.stack([grid.repeat(size), grid.repeat_interleave(size)])

    def forward(self, levels: list[Tensor]) -> Tensor:
        rows = [
            torch.cat([box(x), score(x)], 1).flatten(2)
            for box, score, x in zip(self.boxes, self.scores, levels, strict=True)
        ]
        boxes, scores = torch.cat(rows, 2).split((4 * self.bins, CLASSES), 1)
        batch, _, anchors = boxes.shape
        share = boxes.view(batch, 4, self.bins, anchors).transpose(2, 1).softmax(1)
        first, second = (self.mean(share).view(batch, 4, anchors) * self.scales).chunk(2, 1)
        corners = torch.cat([self.centres - first, self.centres + second], 1)
        return torch.cat([corners, scores.sigmoid()], 1)


class YOLOv8(nn.Module):
    """Backbone, upsampling neck and detection head on two levels, for 64x64 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv_bn(3, 32, 3, 2, act=nn.SiLU), conv_bn(32, 64, 3, 2, act=nn.SiLU), C2f(64, 64, 1, True)
        )
        self.stage1 = nn.Sequential(conv_bn(64, 128, 3, 2, act=nn.SiLU), C2f(128, 128, 2, True))
        self.stage2 = nn.Sequential(conv_bn(128, 128, 3, 2, act=nn.SiLU), C2f(128, 128, 1, True), SPPF(128))
        self.up = C2f(256, 128, 1, False)
        self.down = conv_bn(128, 128, 3, 2, act=nn.SiLU)
        self.last = C2f(256, 128, 1, False)
        self.detect = Detect((128, 128), (8, 4), 8)

    def forward(self, image: Tensor) -> Tensor:
        first = self.stage1(self.stem(image))
        second = self.stage2(first)
        fine = self.up(torch.cat([F.interpolate(second, scale_factor=2.0), first], 1))
        coarse = self.last(torch.cat([self.down(fine), second], 1))
        return self.detect([fine, coarse])


Normalization = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.Module:
    """GroupNorm with 8 groups."""
    return nn.GroupNorm(8, channels)


class UNet(nn.Module):
    """Encoder and decoder with skip connections by concatenation (arXiv:1505.04597)."""

    def __init__(self, norm: Normalization, act: Activation) -> None:
        super().__init__()

        def double(inputs: int, outputs: int) -> nn.Module:
            layers: list[nn.Module] = []
            for width in (inputs, outputs):
                layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), norm(outputs), act()]
            return nn.Sequential(*layers)

        self.enter, self.down1, self.down2 = double(3, 32), double(32, 64), double(64, 128)
        self.up1, self.merge1 = nn.ConvTranspose2d(128, 64, 2, 2), double(128, 64)
        self.up2, self.merge2 = nn.ConvTranspose2d(64, 32, 2, 2), double(64, 32)
        self.head = nn.Conv2d(32, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        first = self.enter(image)
        second = self.down1(F.max_pool2d(first, 2))
        third = self.down2(F.max_pool2d(second, 2))
        second = self.merge1(torch.cat([second, self.up1(third)], 1))
        return self.head(self.merge2(torch.cat([first, self.up2(second)], 1)))


def unet_bn() -> nn.Module:
    """With batch normalization."""
    return UNet(nn.BatchNorm2d, nn.ReLU)


def unet_gn() -> nn.Module:
    """With group normalization and SiLU, as in diffusion models."""
    return UNet(group_norm, nn.SiLU)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of images, written out as in ConvNeXt's downsampling layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, then channels last: LayerNorm, MLP, layer scale (arXiv:2201.03545)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale = nn.Parameter(0.5 + torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return x + (self.scale * y).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Patch stem, two stages, LayerNorm after pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 4, 4),
            ChannelNorm(64),
            ConvNeXtBlock(64),
            ChannelNorm(64),
            nn.Conv2d(64, 128, 2, 2),
            ConvNeXtBlock(128),
            ConvNeXtBlock(128),
        )
        self.norm = nn.LayerNorm(128, eps=1e-6)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.features(image).mean([-2, -1])))


class SuperResolution(nn.Module):
    """Residual blocks between a pixel unshuffle and two pixel shuffles (arXiv:1609.05158)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3 * 4, 64, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
            for _ in range(3)
        )
        self.grow1, self.grow2 = nn.Conv2d(64, 256, 3, padding=1), nn.Conv2d(64, 256, 3, padding=1)
        self.head = nn.Conv2d(64, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = first = self.enter(F.pixel_unshuffle(image, 2))
        for block in self.blocks:
            x = x + 0.2 * block(x)
        x = F.leaky_relu(F.pixel_shuffle(self.grow1(x + first), 2), 0.1)
        x = F.leaky_relu(F.pixel_shuffle(self.grow2(x), 2), 0.1)
        return self.head(x)


class Fire(nn.Module):
    """Squeeze, then two expansions side by side (arXiv:1602.07360)."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.point, self.wide = nn.Conv2d(squeezed, expanded, 1), nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.point(x)), F.relu(self.wide(x))], 1)


class SqueezeNet(nn.Module):
    """Fire modules and a convolution as the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(64, 32, 64),
            Fire(128, 32, 64),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(128, 48, 96),
        )
        self.head = nn.Conv2d(192, CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.head(self.features(image)))
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)


class PReluBlock(nn.Module):
    """Batch normalization first, a slope per channel, as in face recognition networks (arXiv:1801.07698)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs
        self.shortcut = nn.MaxPool2d(1, stride) if same else conv_bn(inputs, outputs, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class PReluNet(nn.Module):
    """Residual blocks with PReLU, flattened through normalization into an embedding of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 64, act=None), nn.PReLU(64))
        self.blocks = nn.Sequential(PReluBlock(64, 64, 2), PReluBlock(64, 128, 2), PReluBlock(128, 128, 2))
        self.norm = nn.BatchNorm2d(128)
        self.hidden, self.act = nn.Linear(128 * 16, 128), nn.PReLU()
        self.head = nn.Linear(128, 32)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.flatten(self.norm(self.blocks(self.stem(image))), 1)
        return F.normalize(self.head(self.act(self.hidden(x))))
