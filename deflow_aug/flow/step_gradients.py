"""A step of the flow, encoded with gradients that are computed by hand.

Kept are the step's input, what the coupling changed, both scales, and of both networks the first
hidden map, in place of the response to the features, which is as large. The second one is computed
again; the last convolutions, which take most of the time, are not: gradients need the scales alone
of what they predict. With z = x / scale - shift and log|det| = -sum(log(scale)),

    d/dx = g / scale,   d/dshift = -g,   d/dscale = -(g / scale * x + l) / scale

where g is the gradient of z and l that of log|det|.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deflow_aug.devices import full_precision
from deflow_aug.flow.base import pixels
from deflow_aug.flow.coupling import SCALE_EPS, ScaledNet, affine
from deflow_aug.flow.layers import FoldedMix, mix


@dataclass(frozen=True)
class ScaledStep:
    """A step whose networks are not folded yet."""

    mix: FoldedMix
    coupling: ScaledNet
    injector: ScaledNet

    def tensors(self) -> list[Tensor]:
        """All that gradients are computed of."""
        own = [self.mix.weight, self.mix.bias, self.mix.logdet]
        return [*own, *self.coupling.tensors(), *self.injector.tensors()]


def encode_with_gradients(
    step: ScaledStep, x: Tensor, responses: Sequence[Tensor], keep: bool = False
) -> tuple[Tensor, Tensor]:
    """z and log|det| of a step. Gradients of the gradients are refused.

    Args:
        responses: to the features, in the first layers of coupling and injector.
        keep: the second hidden maps as well, instead of computing them again.
    """
    z, logdet = _Encode.apply(step, keep, x, *responses, *step.tensors())  # type: ignore[no-untyped-call]
    return z, logdet


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        step: ScaledStep,
        keep: bool,
        x: Tensor,
        of_coupling: Tensor,
        of_injector: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        mixed, total = step.mix.encode(x)
        kept = mixed.shape[1] // 2
        a, b = mixed[:, :kept], mixed[:, kept:]
        coupling, injector = step.coupling.folded(), step.injector.folded()
        maps = coupling.hidden(of_coupling, a)
        shift, inner_scale = coupling.predict(maps[1])
        changed, inner = affine(b, shift, inner_scale)
        others = injector.hidden(of_injector)
        shift, scale = injector.predict(others[1])
        z, outer = affine(torch.cat([a, changed], 1), shift, scale)
        hidden = (*maps, *others) if keep else (maps[0], others[0])
        # Of which the backward pass takes no tensors: those it saved stand in for them.
        ctx.nets = step.coupling, step.injector
        ctx.save_for_backward(*tensors, x, changed, inner_scale, scale, *hidden)
        return z, total + inner + outer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, of_logdet: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        weight, bias, _ = islice(saved, 3)  # as ScaledStep.tensors() has them
        coupling, injector = (net.of(saved) for net in ctx.nets)
        x, changed, inner_scale, scale, *hidden = saved
        each = len(hidden) // 2
        with full_precision(x):
            mixed = mix(x, weight, bias)
            kept = mixed.shape[1] - changed.shape[1]
            a, b = mixed[:, :kept], mixed[:, kept:]
            both = torch.cat([a, changed], 1)
            inner, raw = _through_affine(grad, of_logdet, both, scale)
            del both
            of_injector, _, outer = _through_net(injector, hidden[each:], raw)
            of_a, of_changed = inner[:, :kept], inner[:, kept:]
            of_b, raw = _through_affine(of_changed, of_logdet, b, inner_scale)
            of_coupling, through, own = _through_net(coupling, hidden[:each], raw, a)
            assert through is not None
            of_mixed = torch.cat([of_a + through, of_b], 1)
            of_x, of_mix = _through_mix(weight, x, of_mixed, of_logdet)
        return (None, None, of_x, of_coupling, of_injector, *of_mix, *own, *outer)


def _through_affine(
    grad: Tensor, of_logdet: Tensor, x: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of what the network predicts: shift, and scale before its sigmoid."""
    of_x = grad / scale
    # of_scale = -(of_x * x + of_logdet) / scale; of it, times the derivative of the sigmoid,
    # s (1 - s), where s = scale - SCALE_EPS.
    raw = torch.addcmul(of_logdet[:, None, None, None], of_x, x).div_(scale)
    s = scale - SCALE_EPS
    raw.mul_(s).mul_(s.sub_(1))
    return of_x, torch.cat([grad.neg(), raw], 1)


def _through_net(
    scaled: ScaledNet, hidden: Sequence[Tensor], grad: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Gradients of the response, of the kept channels, and of :meth:`ScaledNet.tensors`.

    Args:
        hidden: the first map, and the second one if that is there.
        grad: of what the network predicts.
        kept: channels of the image that it sees, if any.
    """
    net = scaled.folded()
    first, second = hidden if len(hidden) == 2 else (hidden[0], net.second_hidden(hidden[0]))
    weight, _ = net.last
    of_hidden, of_weight = _convolution_backward(grad, second, weight)
    of_last = of_weight, grad.sum((0, 2, 3))
    of_hidden = _relu_backward(of_hidden, second)
    weight, _ = net.second
    of_second = _of_products(of_hidden, first)[:, :, None, None], of_hidden.sum((0, 2, 3))
    of_response = _relu_backward(F.conv2d(of_hidden, weight.transpose(0, 1)), first)
    if kept is None:
        return of_response, None, scaled.gradients([of_second, of_last])
    assert net.first is not None
    of_kept, of_first = _convolution_backward(of_response, kept, net.first)
    return of_response, of_kept, scaled.gradients([[of_first], of_second, of_last])


def _through_mix(
    weight: Tensor, x: Tensor, grad: Tensor, of_logdet: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of x, and of weight, bias and log|det| at each position."""
    of_x = mix(grad, weight.mT)
    own = [_of_products(grad, x), grad.sum((0, 2, 3)), of_logdet.sum() * pixels(x)]
    return of_x, own


def _of_products(grad: Tensor, x: Tensor) -> Tensor:
    """Of ``weight`` [O, C], where ``weight @ x`` at every position has this gradient."""
    images = [y.movedim(1, -1).reshape(len(y), -1, y.shape[1]) for y in (grad, x)]
    return torch.bmm(images[0].mT, images[1]).sum(0)


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight of ``conv2d(x, weight, padding=1)``."""
    settings = [0], [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, *settings, [True, True, False]
    )
    return of_x, of_weight


def _relu_backward(grad: Tensor, result: Tensor) -> Tensor:
    """Nothing where the result of a ReLU is nothing."""
    gradient: Tensor = torch.ops.aten.threshold_backward(grad, result, 0)
    return gradient
