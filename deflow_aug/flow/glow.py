"""The multi-scale conditional flow f(. ; features) (paper, section 4.1; Glow; SRFlow)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from deflow_aug.config import ModelConfig
from deflow_aug.flow.base import Chain, Invertible
from deflow_aug.flow.convolution import Kernels
from deflow_aug.flow.coupling import AffineCoupling, AffineInjector, FoldedNet
from deflow_aug.flow.features import FeatureKernel, FeatureMap
from deflow_aug.flow.layers import ActNorm, Conv1x1, FoldedMix, Squeeze
from deflow_aug.flow.split import Split
from deflow_aug.flow.step_gradients import ScaledStep, encode_with_gradients
from deflow_aug.recompute import recomputed_whole, worthwhile

TOGETHER = 6
"""Flow steps whose responses get their gradients together, where memory counts."""

AT_ONCE = 2**25
"""Values of the responses that one convolution may have, 128 MB in float32 (and as much again on
the way): of more, each step's convolution alone is large enough."""


USED = object()
"""In place of what was let go of."""


@dataclass(frozen=True)
class Prepared:
    """What the steps of each level computed from the features.

    Args:
        steps: for each step of each level what it prepared, or the responses to the features and
            the coupling's weight of the kept channels.
        later: whether it is the latter, of which each step prepares what it needs whenever it
            needs it.
        responses: bytes of these.
        once: see :meth:`for_one_pass`.
    """

    steps: list[list[Any]]
    later: bool
    responses: int = 0
    once: bool = False

    def for_one_pass(self) -> Prepared:
        """The same for one encoding, which lets go of each part as soon as it is used.

        No other pass can be made of it or of what it was made of. With gradients this is worth as
        much memory as the responses take: the backward pass keeps other maps, which are as large.
        """
        return replace(self, once=True)

    def of_step(self, level: int, number: int) -> Any:
        """What a step prepared, which can be asked for once if this is for one pass.

        Args:
            level: from 1.
            number: of the step in it, from 0.

        Raises:
            RuntimeError: if it has been let go of.
        """
        own = self.steps[level - 1]
        given = own[number]
        if given is USED:
            raise RuntimeError(
                "these features were for one pass, which has been made; compute them again, or "
                "without for_one_pass"
            )
        if self.once:
            own[number] = USED
        return given


@dataclass(frozen=True)
class FoldedStep:
    """What the layers of a step are computed as."""

    mix: FoldedMix
    coupling: FoldedNet
    injector: FoldedNet

    def prepacked(self, like: Tensor) -> FoldedStep:
        """The same for many maps of about this size."""
        nets = (net.prepacked(like) for net in (self.coupling, self.injector))
        return FoldedStep(self.mix, *nets)


class MixingStep(Chain):
    """Actnorm and 1x1 convolution, computed as one matrix, then further layers."""

    def __init__(self, channels: int, *further: Invertible) -> None:
        super().__init__([ActNorm(channels), Conv1x1(channels), *further])

    def prepare(self, features: FeatureMap) -> list[Any]:
        return [self.folded_once("mix", self.mix)]

    @property
    def initializing(self) -> bool:
        """Whether its actnorm is about to be initialised."""
        return cast(ActNorm, self.layers[0]).affine.initializing

    def mix(self) -> FoldedMix:
        """Of actnorm and 1x1 convolution."""
        actnorm, conv = self.layers[:2]
        mix = FoldedMix(cast(ActNorm, actnorm), cast(Conv1x1, conv))
        return mix if self.training else mix.settled()

    def encode(self, x: Tensor, prepared: Any = None) -> tuple[Tensor, Tensor]:
        mix, *others = prepared
        actnorm, conv, *further = (cast(Invertible, layer) for layer in self.layers)
        if self.initializing:
            # What was folded is the actnorm as it was.
            x, _ = actnorm.encode(x)
            x, _ = conv.encode(x)
            total = x.new_zeros(x.shape[0])
        else:
            x, total = mix.encode(x)
        for layer, own in zip(further, others, strict=True):
            x, logdet = layer.encode(x, own)
            total = total + logdet
        return x, total

    def decode(self, z: Tensor, prepared: Any = None) -> Tensor:
        mix, *others = prepared
        for layer, own in zip(reversed(self.layers[2:]), reversed(others), strict=True):
            z = cast(Invertible, layer).decode(z, own)
        return mix.decode(z)


class TransitionStep(MixingStep):
    """Actnorm and 1x1 convolution, without conditioning."""


class FlowStep(MixingStep):
    """Actnorm, 1x1 convolution, conditional affine coupling, affine injector."""

    def __init__(self, channels: int, feature_channels: int, hidden: int) -> None:
        super().__init__(
            channels,
            AffineCoupling(channels, feature_channels, hidden),
            AffineInjector(channels, feature_channels, hidden),
        )
        self.hidden = hidden

    def prepare(self, features: FeatureMap) -> list[Any]:
        kernel, folded = self.folded_once(
            "step", lambda: (FeatureKernel(self.kernels), self.fold().prepacked(features.fine))
        )
        return self.prepare_responses(folded, features.convolve(kernel))

    def prepare_responses(self, folded: FoldedStep, responses: Sequence[Tensor]) -> list[Any]:
        """What its layers prepare, of :meth:`fold` and of what responds to the features."""
        (coupling, injector), (of_coupling, of_injector) = self._conditional(), responses
        return [
            folded.mix,
            coupling.prepare_response(of_coupling, folded.coupling),
            injector.prepare_response(of_injector, folded.injector),
        ]

    def fold(self) -> FoldedStep:
        """What its layers are computed as."""
        coupling, injector = (layer.net for layer in self._conditional())
        return FoldedStep(self.mix(), coupling.fold(), injector.fold())

    def scaled(self, kept: Tensor | None = None) -> ScaledStep:
        """What its layers are computed as with gradients.

        Args:
            kept: the coupling's own of :meth:`first_weights`, if that is known.
        """
        coupling, injector = (layer.net for layer in self._conditional())
        return ScaledStep(self.mix(), coupling.scaled(kept), injector.scaled())

    def first_weights(self) -> tuple[Tensor, list[Tensor]]:
        """Of the coupling's first layer the kept channels' weight, and the features' of both."""
        coupling, injector = (layer.net.first_weights() for layer in self._conditional())
        return coupling[0], [coupling[1], injector[1]]

    def kernels(self, weights: Sequence[Tensor | None] = (None, None)) -> Kernels:
        """Of the features in the first layers of coupling and injector.

        Args:
            weights: the features' of :meth:`first_weights`, if they are known.
        """
        nets = [layer.net for layer in self._conditional()]
        return Kernels.together(
            [net.feature_kernel(own) for net, own in zip(nets, weights, strict=True)]
        )

    def _conditional(self) -> tuple[AffineCoupling, AffineInjector]:
        coupling, injector = self.layers[2:]
        return cast(AffineCoupling, coupling), cast(AffineInjector, injector)


class Level(Chain):
    """Squeeze, transition steps, flow steps."""

    def prepare(self, features: FeatureMap) -> list[Any]:
        """What the steps, all of one hidden size, prepare: of one convolution of the features
        where its results are few, and it is not computed in tiles, of which all that is worth
        sharing is shared anyway."""
        flow_steps = [step for step in _steps(self) if isinstance(step, FlowStep)]
        values = _responses(flow_steps, features)
        if features.in_tiles or torch.is_grad_enabled() or values > AT_ONCE:
            return super().prepare(features)
        kernel, folded = self.folded_once(
            "level",
            lambda: (
                FeatureKernel(lambda: Kernels.together([step.kernels() for step in flow_steps])),
                [step.fold().prepacked(features.fine) for step in flow_steps],
            ),
        )
        responses = features.convolve(kernel)
        pairs = zip(responses[0::2], responses[1::2], strict=True)
        prepared: dict[Invertible, Any] = {
            step: step.prepare_responses(own, pair)
            for step, own, pair in zip(flow_steps, folded, pairs, strict=True)
        }
        return [
            prepared[step] if step in prepared else step.prepare(features) for step in _steps(self)
        ]


class ConditionalGlow(nn.Module):
    """L levels of squeeze, transition steps, flow steps, and on some levels a split."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        feature_channels = config.encoder.feature_channels
        self.levels = nn.ModuleList()
        self.splits = nn.ModuleDict()
        for level, channels in enumerate(config.level_channels, start=1):
            steps: list[Invertible] = [Squeeze()]
            steps += [TransitionStep(channels) for _ in range(config.transition_steps)]
            steps += [
                FlowStep(channels, feature_channels, config.hidden) for _ in range(config.steps)
            ]
            self.levels.append(Level(steps))
            if level in (config.split_levels or ()):
                self.splits[str(level)] = Split(channels)

    def prepare(self, features: Sequence[FeatureMap]) -> Prepared:
        """What ``encode`` and ``decode`` take, computed once for any number of passes.

        Where gradients are recorded no more is computed yet than what responds to the features:
        each step will do the rest itself, and again in the backward pass, so that what it computes
        is not kept in between.

        Args:
            features: the conditioning map of each level, at 1/2, 1/4, ... of the image's size.
        """
        later, levels = torch.is_grad_enabled(), list(zip(self.levels, features, strict=True))
        # The backward pass begins with what came last: with the gradients of the largest level's
        # responses, which are those that take most memory as long as they wait. Without gradients
        # it is what the largest level computes on the way that takes most: before all the others.
        order = reversed(levels) if later else levels
        # What convolutions of a map share is kept in it, and goes with this copy of it.
        steps = [
            _begin(level, replace(own)) if later else cast(Chain, level).prepare(replace(own))
            for level, own in order
        ]
        if later:
            steps.reverse()
        given = [each for own in steps for each in own if later and isinstance(each, tuple)]
        taken = sum(response.nbytes for *responses, _ in given for response in responses)
        return Prepared(steps, later, taken)

    def encode(self, x: Tensor, prepared: Prepared) -> tuple[list[Tensor], Tensor]:
        """Latents (splits first, the last level's last) and log|det| [B] in nats.

        Args:
            x: images, [B, 3, H, W].
        """
        latents = []
        total = x.new_zeros(x.shape[0])
        for level, chain in enumerate(self.levels, start=1):
            for number, step in enumerate(_steps(chain)):
                x, logdet = _encode(step, x, prepared.of_step(level, number), prepared)
                total = total + logdet
            if str(level) in self.splits:
                x, latent, logdet = cast(Split, self.splits[str(level)]).encode(x)
                latents.append(latent)
                total = total + logdet
        return [*latents, x], total

    def decode(self, latents: Sequence[Tensor], prepared: Prepared) -> Tensor:
        """The images whose latents these are, [B, 3, H, W]; the exact inverse of encode."""
        *split_latents, x = latents
        for level in range(len(self.levels), 0, -1):
            if str(level) in self.splits:
                x = cast(Split, self.splits[str(level)]).decode(x, split_latents.pop())
            steps = _steps(self.levels[level - 1])
            for number in reversed(range(len(steps))):
                given = prepared.of_step(level, number)
                x = _decode(steps[number], x, given, prepared)
        return x


def _steps(chain: nn.Module) -> list[Invertible]:
    return [cast(Invertible, step) for step in cast(Chain, chain).layers]


def _responses(steps: Sequence[Invertible], features: FeatureMap) -> int:
    """How many values respond to the features, in coupling and injector of all flow steps."""
    hidden = sum(step.hidden for step in steps if isinstance(step, FlowStep))
    return 2 * hidden * features.fine[:, 0].numel()


def _begin(level: nn.Module, features: FeatureMap) -> list[Any]:
    """For each flow step the responses to the features and :meth:`FlowStep.first_weights` of the
    kept channels; for other steps the features."""
    steps = _steps(level)
    kept, kernels = [], []
    for step in steps:
        if isinstance(step, FlowStep):
            own, weights = step.first_weights()
            kept.append(own)
            kernels.append(FeatureKernel(partial(step.kernels, weights)))
    # Of the kernels of a call gradients are there at the same time: not of too many.
    few = not worthwhile(_responses(steps, features) * features.fine.element_size())
    each = max(1, len(kernels)) if few else TOGETHER
    calls = [kernels[start : start + each] for start in range(0, len(kernels), each)]
    responses = [one for call in calls for one in features.convolve_all(call)]
    given = iter([(*one, own) for one, own in zip(responses, kept, strict=True)])
    return [next(given) if isinstance(step, FlowStep) else features for step in steps]


def _encode(step: Invertible, x: Tensor, given: Any, prepared: Prepared) -> tuple[Tensor, Tensor]:
    if not prepared.later:
        return step.encode(x, given)
    if not isinstance(step, FlowStep):  # linear: its gradients need its input alone
        return step.encode(x, step.prepare(given))
    *responses, kept = given
    if step.initializing:  # which what is folded knows nothing of
        return step.encode(x, step.prepare_responses(step.fold(), responses))
    # The second hidden maps, which are as large.
    keep = not worthwhile(prepared.responses)
    return encode_with_gradients(step.scaled(kept), x, responses, keep)


def _decode(step: Invertible, z: Tensor, given: Any, prepared: Prepared) -> Tensor:
    if not prepared.later:
        return step.decode(z, given)
    if not isinstance(step, FlowStep):
        return step.decode(z, step.prepare(given))
    *responses, _ = given
    (x,) = recomputed_whole(
        lambda z, *responses: (step.decode(z, step.prepare_responses(step.fold(), responses)),),
        step.parameters(),
        z,
        *responses,
        saves=2 * prepared.responses,  # as much as the hidden maps take
    )
    return x
