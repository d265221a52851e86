"""The trunk of ESRGAN: residual-in-residual dense blocks (Wang et al., 2018, section 3.1)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deflow_aug.dense import NEGATIVE_SLOPE, RESIDUAL_SCALE, DenseKernels, DenseMaps
from deflow_aug.dense_gradients import Workspace, rrdb_with_gradients
from deflow_aug.flow.convolution import convolve, in_tiles
from deflow_aug.flow.folding import Folding
from deflow_aug.flow.grid import Grid
from deflow_aug.flow.products import by_convolution
from deflow_aug.recompute import recomputed, recomputed_whole, worthwhile

DENSE_BLOCKS = 3

LEAST_TILES = 64
LEAST_GROWTH = 32
"""Of dense blocks computed in tiles; measured: of 64 and 32 channels 64 tiles take 0.8 to 1 of
the time, of 32 and 16 channels 128 tiles as long and fewer more."""

LEAST_GROWTH_BY_PRODUCTS = 16
"""The same without gradients where tiles are summed by matrix products
(:mod:`deflow_aug.flow.products`): of 32 and 16 channels they take 0.75 to 0.87 of the time."""


class ResidualDenseBlock(nn.Module):
    """Five densely connected 3x3 convolutions; the result is scaled and added to the input."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv2d(channels + i * growth, growth, 3, padding=1) for i in range(4)]
            + [nn.Conv2d(channels + 4 * growth, channels, 3, padding=1)]
        )

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.convs
        maps = [x]
        for conv in inner:
            maps.append(F.leaky_relu_(conv(torch.cat(maps, 1)), NEGATIVE_SLOPE))
        return torch.add(x, last(torch.cat(maps, 1)), alpha=RESIDUAL_SCALE)

    def weights_and_biases(self) -> list[Tensor]:
        """Of all convolutions the weights, then the biases."""
        convs = [cast(nn.Conv2d, conv) for conv in self.convs]
        return [*(conv.weight for conv in convs), *(cast(Tensor, conv.bias) for conv in convs)]


class RRDB(Folding):
    """Three residual dense blocks inside one more scaled residual."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.growth = growth
        self.blocks = nn.Sequential(
            *(ResidualDenseBlock(channels, growth) for _ in range(DENSE_BLOCKS))
        )

    def weights_and_biases(self) -> list[list[Tensor]]:
        """Of each dense block."""
        return [cast(ResidualDenseBlock, block).weights_and_biases() for block in self.blocks]

    def kernels(self, tiles: int) -> list[DenseKernels]:
        """Of each dense block, for about so many tiles at once."""
        return self.folded_once(
            "kernels",
            lambda: [DenseKernels.prepacked(own, tiles) for own in self.weights_and_biases()],
        )

    def forward(self, x: Tensor) -> Tensor:
        """Of ``x``, [B, C, H, W]."""
        y, _ = through([self], x)
        return y

    def directly(self, x: Tensor) -> Tensor:
        """By PyTorch's convolutions."""
        return torch.add(x, self.blocks(x), alpha=RESIDUAL_SCALE)


class RRDBTrunk(nn.Module):
    """First convolution, blocks, trunk convolution with a skip; no upsampling tail."""

    def __init__(self, channels: int, growth: int, blocks: int) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.ModuleList(RRDB(channels, growth) for _ in range(blocks))
        self.conv_body = nn.Conv2d(channels, channels, 3, padding=1)
        _shrink(self.body)

    def forward(self, x: Tensor, stacked: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """The trunk's output, and the outputs of the blocks numbered in ``stacked``."""
        y, outputs = through(
            [cast(RRDB, block) for block in self.body], self.conv_first(x), stacked
        )
        # The skip of the published DeFlow (and SRFlow) starts here, ESRGAN's before the blocks.
        return y + convolve_with(self.conv_body, y), outputs


def through(
    blocks: Sequence[RRDB], x: Tensor, wanted: Collection[int] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """The blocks one after the other: the last one's output, and those numbered in ``wanted``.

    Args:
        x: [B, C, H, W].
    """
    outputs = {}
    if not _worth_tiles(x, blocks[0].growth):
        for number, block in enumerate(blocks):
            x = outputs[number] = _directly(block, x, len(blocks))
    elif torch.is_grad_enabled():
        # Of each dense block input and maps.
        channels = DENSE_BLOCKS * (x.shape[1] + 4 * blocks[0].growth)
        keep = not worthwhile(len(blocks) * channels * (x.nbytes // x.shape[1]))
        workspace = Workspace()
        for number, block in enumerate(blocks):
            parameters = [tensor for own in block.weights_and_biases() for tensor in own]
            x = rrdb_with_gradients(x, parameters, workspace, keep)
            outputs[number] = x
        workspace.ahead = None
    else:
        maps = DenseMaps(x.movedim(1, -1), blocks[0].growth)
        for number, block in enumerate(blocks):
            maps.rrdb(block.kernels(maps.most))
            if number in wanted:
                outputs[number] = maps.pixels.clone().movedim(-1, 1)
        x = maps.pixels.movedim(-1, 1)
    return x, {number: outputs[number] for number in wanted}


def _worth_tiles(x: Tensor, growth: int) -> bool:
    """Whether tiles are faster: not for few, nor where each is transformed for few channels."""
    batch, _, height, width = x.shape
    least = LEAST_GROWTH
    if not torch.is_grad_enabled() and not by_convolution(x):
        least = min(least, LEAST_GROWTH_BY_PRODUCTS)
    enough = Grid(batch, height, width).tiles >= LEAST_TILES and growth >= least
    return enough and in_tiles(x)


def _directly(block: RRDB, x: Tensor, blocks: int) -> Tensor:
    """By PyTorch's convolutions, in a trunk of so many blocks."""
    if not in_tiles(x):
        return recomputed(block.directly, x)
    # Of each dense block the inputs of five convolutions, and four maps once more.
    channels = DENSE_BLOCKS * (5 * x.shape[1] + 14 * block.growth)
    saves = blocks * channels * (x.nbytes // x.shape[1])
    (y,) = recomputed_whole(lambda x: (block.directly(x),), block.parameters(), x, saves=saves)
    return y


def convolve_with(conv: nn.Conv2d, x: Tensor, repeats: int = 1) -> Tensor:
    """A padded 3x3 convolution of ``x`` upsampled ``repeats`` times (1, 2) by nearest neighbour."""
    assert conv.bias is not None
    if in_tiles(x):
        return convolve(x, conv.weight, conv.bias, repeats)
    if repeats > 1:
        x = F.interpolate(x, scale_factor=repeats, mode="nearest")
    result: Tensor = conv(x)
    return result


def _shrink(body: nn.Module) -> None:
    """Small residual branches at the start: ESRGAN's initialisation, He's times 0.1.

    Drawn uniformly: on the meta device, where weights to be loaded are laid out, a normal draw
    makes PyTorch import for a second.
    """
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=NEGATIVE_SLOPE)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
            with torch.no_grad():
                module.weight.mul_(0.1)
