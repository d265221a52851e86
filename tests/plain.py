"""The plain computation of the flow: every layer on its own, every convolution on all channels.

It is what the library's own (shared feature convolutions, no upsampling, folded actnorms,
recomputed activations) is compared with, in tests and in benchmarks. It reads the parameters of
the library's modules and uses none of their methods, but for the domain shifts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deflow_aug.conditioning import domain_invariant
from deflow_aug.flow.coupling import SCALE_EPS, AffineCoupling, AffineInjector, AffineNet
from deflow_aug.flow.layers import ActNorm, Conv1x1, Squeeze
from deflow_aug.model import DeFlow


def features(model: DeFlow, x: Tensor, noise: Tensor | None = None) -> list[Tensor]:
    """The conditioning map of every level, all its channels at the level's size."""
    network, config = model.conditioning, model.config
    if noise is not None:
        noise = noise * config.conditioning_noise
    h = domain_invariant(x, config.scale, noise)
    trunk = network.trunk
    y, outputs = trunk.conv_first(h), []
    for block in trunk.body:
        start = y
        for dense in block.blocks:
            maps = [y]
            for conv in dense.convs[:4]:
                maps.append(F.leaky_relu(conv(torch.cat(maps, 1)), 0.2))
            y = y + 0.2 * dense.convs[4](torch.cat(maps, 1))
        y = start + 0.2 * y
        outputs.append(y)
    last = y + trunk.conv_body(y)
    by_factor = {1.0: last}
    for doubling, conv in enumerate(network.upconvs):
        upsampled = F.interpolate(by_factor[2.0**doubling], scale_factor=2, mode="nearest")
        by_factor[2.0 ** (doubling + 1)] = F.leaky_relu(conv(upsampled), 0.2)
    result = []
    for level in range(1, config.levels + 1):
        factor = config.scale / 2**level
        size = (x.shape[2] >> level, x.shape[3] >> level)
        if factor < 1:
            own = F.interpolate(last, size=size, mode="bilinear", align_corners=False)
        else:
            own = by_factor[factor]
        stacked = [
            F.interpolate(outputs[number], size=size, mode="nearest")
            for number in config.encoder.stacked_blocks
        ]
        result.append(torch.cat([own, *stacked], 1))
    return result


def encode(model: DeFlow, x: Tensor, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Latents and log-determinants."""
    latents, total = [], x.new_zeros(len(x))
    for level, feature in enumerate(features, start=1):
        for layer in _layers(model, level):
            x, logdet = _encode(layer, x, feature)
            total = total + logdet
        if str(level) in model.flow.splits:
            kept, leaving, mean, logs = _split(model, level, x)
            x = kept
            latents.append((leaving - mean) * torch.exp(-logs))
            total = total - logs.flatten(1).sum(1)
    return [*latents, x], total


def decode(model: DeFlow, latents: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
    """Images of latents."""
    *leaving, x = latents
    for level in range(len(features), 0, -1):
        if str(level) in model.flow.splits:
            _, _, mean, logs = _split(model, level, x)
            x = torch.cat([x, mean + torch.exp(logs) * leaving.pop()], 1)
        for layer in reversed(_layers(model, level)):
            x = _decode(layer, x, features[level - 1])
    return x


def nll(
    model: DeFlow,
    x: Tensor,
    domain: Sequence[str],
    dequantization: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Bits per dimension."""
    maps = features(model, x, noise)
    steps = model.config.dequantization_steps
    if dequantization is not None:
        x = x + dequantization / steps
    latents, total = encode(model, x, maps)
    number = model.domain_numbers(domain, x)
    for shift, z in zip(model.domain_shifts(), latents, strict=True):
        total = total + shift.log_prob(z, number)
    return -(total / x[0].numel() - math.log(steps)) / math.log(2)


def degrade(
    model: DeFlow, x: Tensor, draws: Sequence[Tensor], domain: str, noise: Tensor | None = None
) -> Tensor:
    """One sample at temperature 1."""
    maps = features(model, x, noise)
    latents, _ = encode(model, x, maps)
    shifted = model.degrade(latents, draws, [domain] * len(x), torch.ones(len(x)))
    return decode(model, shifted, maps)


def _layers(model: DeFlow, level: int) -> list[nn.Module]:
    """Squeeze, actnorms, 1x1 convolutions, couplings and injectors in encoding order."""
    result: list[nn.Module] = []
    for layer in model.flow.levels[level - 1].layers:
        result += [layer] if isinstance(layer, Squeeze) else list(layer.layers)
    return result


def _split(model: DeFlow, level: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    split = model.flow.splits[str(level)]
    kept, leaving = x[:, : split.kept], x[:, split.kept :]
    out = _zeros(split.prior, kept)
    return kept, leaving, out[:, 0::2], out[:, 1::2]


def _encode(layer: nn.Module, x: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
    positions = x.shape[2] * x.shape[3]
    if isinstance(layer, ActNorm):
        logdet = layer.affine.logs.sum() * positions
        return _norm(layer.affine, x), logdet.expand(len(x))
    if isinstance(layer, Conv1x1):
        logdet = layer.log_s.sum() * positions
        return torch.einsum("oc,bchw->bohw", layer.weight(), x), logdet.expand(len(x))
    if isinstance(layer, AffineCoupling):
        a, b = x[:, : layer.kept], x[:, layer.kept :]
        shift, scale = _net(layer.net, torch.cat([a, feature], 1))
        return torch.cat([a, b / scale - shift], 1), -scale.log().flatten(1).sum(1)
    if isinstance(layer, AffineInjector):
        shift, scale = _net(layer.net, feature)
        return x / scale - shift, -scale.log().flatten(1).sum(1)
    return F.pixel_unshuffle(x, 2), x.new_zeros(len(x))


def _decode(layer: nn.Module, z: Tensor, feature: Tensor) -> Tensor:
    if isinstance(layer, ActNorm):
        affine = layer.affine
        return z * torch.exp(-affine.logs)[:, None, None] - affine.bias[:, None, None]
    if isinstance(layer, Conv1x1):
        inverse = torch.linalg.inv(layer.weight().double()).to(z.dtype)
        return torch.einsum("oc,bchw->bohw", inverse, z)
    if isinstance(layer, AffineCoupling):
        a, b = z[:, : layer.kept], z[:, layer.kept :]
        shift, scale = _net(layer.net, torch.cat([a, feature], 1))
        return torch.cat([a, (b + shift) * scale], 1)
    if isinstance(layer, AffineInjector):
        shift, scale = _net(layer.net, feature)
        return (z + shift) * scale
    return F.pixel_shuffle(z, 2)


def _net(net: AffineNet, x: Tensor) -> tuple[Tensor, Tensor]:
    for layer in (net.first, net.second):
        conv = F.conv2d(x, layer.conv.weight, padding=layer.conv.padding)
        x = F.relu(_norm(layer.norm, conv))
    out = _zeros(net.last, x)
    return out[:, 0::2], torch.sigmoid(out[:, 1::2] + 2) + SCALE_EPS


def _norm(affine: nn.Module, x: Tensor) -> Tensor:
    return (x + affine.bias[:, None, None]) * torch.exp(affine.logs)[:, None, None]


def _zeros(layer: nn.Module, x: Tensor) -> Tensor:
    out = F.conv2d(x, layer.conv.weight, layer.conv.bias, padding=1)
    return out * torch.exp(3 * layer.logs)[:, None, None]
