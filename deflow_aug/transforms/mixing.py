"""Several degradations: one after another, in any order, or one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from deflow_aug import randomness
from deflow_aug.degrader import DeFlowDegrader
from deflow_aug.randomness import Stream
from deflow_aug.transforms.base import ImageTransform
from deflow_aug.transforms.checks import checked_weights
from deflow_aug.transforms.groups import Params, by_group
from deflow_aug.transforms.random_deflow import RandomDeFlow, pick

Step = ImageTransform | DeFlowDegrader


class _Steps(ImageTransform):
    """Steps that are drawn together. Their own seeds play no part."""

    def __init__(self, steps: Sequence[Step], p: float, seed: int | None) -> None:
        super().__init__(p, seed=seed)
        self.steps = [_as_transform(step) for step in steps]
        if not self.steps:
            raise ValueError(f"{type(self).__name__} needs at least one step, got none")

    def _draw(self, *key: int) -> Params:
        return {"steps": [step.draw(*key, number) for number, step in enumerate(self.steps)]}

    def changes(self, params: Params) -> bool:
        parts = zip(self.steps, params["steps"], strict=True)
        return bool(params["apply"]) and any(step.changes(own) for step, own in parts)

    def _in_order(self, order: Sequence[int], pixels: Tensor, params: Sequence[Params]) -> Tensor:
        for number in order:
            pixels = self.steps[number].apply_to(pixels, [one["steps"][number] for one in params])
        return pixels

    def extra_repr(self) -> str:
        steps = "".join(f"    {line}\n" for step in self.steps for line in repr(step).split("\n"))
        return f"{steps}{super().extra_repr()}"


class Chain(_Steps):
    """Steps one after another, such as ``Chain([RandomBlur(), RandomDeFlow(d), RandomJPEG()])``.

    Between the steps images stay in floating point: only the result is rounded to the dtype that
    came in. For other libraries' transforms in between, use torchvision's ``Compose``.

    Args:
        steps: transforms of this package; a bare degrader means ``RandomDeFlow(degrader)``.
        p, seed: see :class:`~deflow_aug.transforms.ImageTransform`.
    """

    def __init__(self, steps: Sequence[Step], p: float = 1.0, *, seed: int | None = None) -> None:
        super().__init__(steps, p, seed)

    def _change(self, pixels: Tensor, params: Sequence[Params]) -> Tensor:
        return self._in_order(range(len(self.steps)), pixels, params)


class RandomOrder(_Steps):
    """As :class:`Chain`, in an order that is drawn for each image."""

    def __init__(self, steps: Sequence[Step], p: float = 1.0, *, seed: int | None = None) -> None:
        super().__init__(steps, p, seed)

    def _draw(self, *key: int) -> Params:
        order = randomness.generator(*key, Stream.CHOICE, 1).permutation(len(self.steps))
        return {"order": order.tolist(), **super()._draw(*key)}

    def _change(self, pixels: Tensor, params: Sequence[Params]) -> Tensor:
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, one in enumerate(params):
            groups.setdefault(tuple(one["order"]), []).append(i)
        return by_group(pixels, groups, self._in_order, params)


class MixedDegradation(ImageTransform):
    """One of several degradations, drawn for each image.

    ``MixedDegradation([(phone, 0.7), (Chain([camera, RandomJPEG()]), 0.3)])``.

    Args:
        choices: pairs of a degradation and its weight, positive, of any sum. A degradation is a
            transform of this package, or a degrader, which means ``RandomDeFlow(degrader)``.
        p, seed: see :class:`~deflow_aug.transforms.ImageTransform`.
    """

    def __init__(
        self,
        choices: Sequence[tuple[Step, float]],
        p: float = 1.0,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__(p, seed=seed)
        pairs = list(choices)
        if not pairs or not all(
            isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs
        ):
            raise ValueError(f"MixedDegradation needs pairs (degradation, weight), got {choices!r}")
        self.choices = [_as_transform(choice) for choice, _ in pairs]
        self.weights = checked_weights([weight for _, weight in pairs])

    def _draw(self, *key: int) -> Params:
        choice = pick(self.weights, *key)
        return {"choice": choice, "chosen": self.choices[choice].draw(*key, choice)}

    def changes(self, params: Params) -> bool:
        return bool(params["apply"]) and self.choices[params["choice"]].changes(params["chosen"])

    def _change(self, pixels: Tensor, params: Sequence[Params]) -> Tensor:
        groups: dict[int, list[int]] = {}
        for i, one in enumerate(params):
            groups.setdefault(one["choice"], []).append(i)
        return by_group(pixels, groups, self._chosen, params)

    def _chosen(self, choice: int, pixels: Tensor, params: Sequence[Params]) -> Tensor:
        return self.choices[choice].apply_to(pixels, [one["chosen"] for one in params])

    def extra_repr(self) -> str:
        pairs = zip(self.choices, self.weights, strict=True)
        return "".join(f"    {weight:g} {choice!r}\n" for choice, weight in pairs) + (
            super().extra_repr()
        )


def _as_transform(step: Any) -> ImageTransform:
    if isinstance(step, ImageTransform):
        return step
    if isinstance(step, DeFlowDegrader):
        return RandomDeFlow(step)
    raise TypeError(
        f"a step must be a transform of deflow_aug.transforms or a DeFlowDegrader, got "
        f"{type(step).__qualname__}; other libraries' transforms go around it, in a Compose"
    )
