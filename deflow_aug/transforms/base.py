"""What every transform of this package is: a random draw, and its application to images."""

from __future__ import annotations

import importlib
import os
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten
from torch.utils.data import get_worker_info

from deflow_aug import randomness
from deflow_aug.images import unpack
from deflow_aug.randomness import Stream
from deflow_aug.transforms.checks import is_count, is_number
from deflow_aug.transforms.groups import Params, by_group
from deflow_aug.transforms.samples import count_images, leaves_of, resized_like

Key: TypeAlias = "int | Sequence[int] | None"


def _base_class() -> type[torch.nn.Module]:
    try:
        transform: type[torch.nn.Module]
        transform = importlib.import_module("torchvision.transforms.v2").Transform
    except Exception:  # not installed, or built for another PyTorch, which fails in many ways
        return torch.nn.Module
    return transform


if TYPE_CHECKING:
    _Base = torch.nn.Module
else:
    _Base = _base_class()


class ImageTransform(_Base):
    """A random change of images, whose random draw is apart from its application.

    Called with a sample (an image, or dicts, lists and tuples of anything, nested), it draws once
    and returns the sample with its images changed, each of the type, dtype, layout and device that
    came in. Which entries are images is torchvision's rule: all PIL images, ``tv_tensors.Image``
    and ``tv_tensors.Video``. Without any of these, one plain tensor or array is: the first with 3
    or 4 channels, those under an image's name (``image``, ``img``, ``gt``, ``hq``, ``lq``, ``lr``,
    ``hr``, ``input``, ``left_image``, ...) before others. A grey one (also (H, W)) is only under
    such a name, or without any name if nothing else could be an image: the sample itself, or
    (image, label). Everything else (masks, depth maps, matrices, boxes, points) passes through
    untouched, by identity, and so do images that the draw leaves alone. All images of a sample
    share the draw. Images of a batch, (B, C, H, W) or (B, H, W, C), have a draw each; the frames
    of a ``tv_tensors.Video`` share one.

    It is a ``torchvision.transforms.v2.Transform`` where torchvision can be imported, and a
    ``torch.nn.Module`` elsewhere. The same draw for another image or frame::

        params = transform.make_params(first)  # JSON values
        first, second = transform.transform(first, params), transform.transform(second, params)

    **Randomness.** Every draw has a name, made of integers, and depends on nothing else. No global
    generator is read or advanced.

    - With a ``seed``, ``transform(sample, key=index)`` is named (seed, epoch, index): it does not
      depend on workers, batches or what was drawn before. For a batch, give one key for each image.
    - With a ``seed`` and no key, draws are named (seed, epoch, worker, number of the call):
      a fresh transform with the same seed gives the same sequence. ``worker`` is the seed that a
      DataLoader gave its worker process, which is another in every worker and (unless workers are
      persistent) every epoch, and follows ``torch.manual_seed``.
    - Without a seed, the first two integers come from the operating system instead, once for
      each transform, copy and process: nothing is repeated.

    ``set_epoch`` starts the sequence of an epoch, whatever was drawn before. Persistent workers
    hold copies of the transform, which it does not reach. In distributed training, give each
    process its own seed, or use keys.

    Args:
        p: probability with which an image is changed.
        seed: a non-negative integer, or None.
    """

    def __init__(self, p: float = 1.0, *, seed: int | None = None) -> None:
        super().__init__()
        if not (is_number(p) and 0 <= p <= 1):
            raise ValueError(f"p is a probability, a number from 0 to 1, got {p!r}")
        if seed is not None and not is_count(seed):
            raise ValueError(f"seed must be None or an integer of at least 0, got {seed!r}")
        self.p = float(p)
        self.seed = None if seed is None else int(seed)
        self.epoch = 0
        self._start()

    def _start(self) -> None:
        self._calls = 0
        self._home = os.getpid()
        self._entropy = randomness.fresh_seed()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy with a seed goes on where the original was; one without gets its own draws.
        self.__dict__.update(state)
        calls = self._calls
        self._start()
        if self.seed is not None:
            self._calls = calls

    # -- what a transform has to provide -----------------------------------------------------

    @abstractmethod
    def _draw(self, *key: int) -> Params:
        """What is random about one image, as JSON values; it depends on the key alone."""

    @abstractmethod
    def _change(self, pixels: Tensor, params: Sequence[Params]) -> Tensor:
        """Change all images, each with its own draw; see :meth:`apply_to`."""

    # -- one draw an image, on pixels -----------------------------------------------------------

    def draw(self, *key: int) -> Params:
        """The draw with this name, for one image: JSON values; p, seed and epoch play no part
        but for the probability p itself. The building block of :meth:`make_params`."""
        gate = randomness.generator(*key, Stream.CHOICE).random()
        return {"apply": bool(gate < self.p), **self._draw(*key)}

    def changes(self, params: Params) -> bool:
        """Whether this draw, of one image, changes the image at all."""
        return bool(params["apply"])

    def apply_to(self, pixels: Tensor, params: Sequence[Params]) -> Tensor:
        """Apply draws to float images [B, 3, H, W] in [0, 1], ``params[i]`` to image i.

        Returns float images in [0, 1], of the same size except after :class:`Resize`; ``pixels``
        itself if no draw changes anything. No gradient flows through.
        """
        chosen = [i for i, one in enumerate(params) if self.changes(one)]
        return by_group(pixels, {0: chosen}, lambda _, x, own: self._change(x, own), params)

    # -- samples ---------------------------------------------------------------------------------

    def make_params(self, sample: Any, *, key: Key = None) -> dict[str, Any]:
        """A draw for this sample, to be given to :meth:`transform`.

        Args:
            sample: an image, or any sample with images (only their number plays a part).
            key: names the draw, together with seed and epoch; for a batch one key for each image.
                None: the next draw of the sequence.

        Returns:
            ``{"images": [draw, ...]}``, one draw for each image of a batch; JSON values.

        Raises:
            ValueError: for keys without a seed, or as many keys as there are no images.
        """
        leaves, _, wanted = leaves_of(sample)
        return self._make_params(_draws_needed(leaves, wanted), key)

    def _make_params(self, images: int, key: Key) -> dict[str, Any]:
        if key is not None:
            if self.seed is None:
                raise ValueError(
                    f"a key names a draw together with a seed: give seed= to {type(self).__name__}"
                )
            keys = _keys(key, images)
            return {"images": [self.draw(self.seed, self.epoch, *one) for one in keys]}
        worker = get_worker_info()
        # Without a seed the process is named too: forked processes share the entropy.
        root = (self._entropy, os.getpid()) if self.seed is None else (self.seed, self.epoch)
        name = (*root, 0 if worker is None else worker.seed, self._calls)
        self._calls += 1
        return {"images": [self.draw(*name, i) for i in range(images)]}

    @torch.no_grad()
    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Apply a draw to an image or a batch; see ``deflow_aug.images`` for what may come.

        Args:
            inpt: PIL image, array or tensor; it is not modified.
            params: from :meth:`make_params`: one draw for each image of the batch, or one for all.

        Raises:
            TypeError, ValueError: for anything that is no image, or a batch and draws of different
                lengths.
        """
        image = unpack(inpt)
        draws = params["images"]
        if len(draws) not in (1, len(image.pixels)):
            raise ValueError(
                f"a batch of {len(image.pixels)} images needs as many draws, or one for all, got "
                f"{len(draws)}; make the params from this batch"
            )
        each = list(draws) * (len(image.pixels) if len(draws) == 1 else 1)
        changed = [self.changes(one) for one in each]
        if not any(changed):
            return inpt
        pixels = self.apply_to(image.pixels, each)
        if pixels.shape != image.pixels.shape:
            image = unpack(resized_like(inpt, *pixels.shape[-2:]))
        result = image.pack(pixels[None])
        if not all(changed):  # bit for bit, also where float32 cannot hold the dtype
            for i, one in enumerate(changed):
                if not one:
                    result[i] = inpt[i]
        if isinstance(inpt, Tensor) and not isinstance(inpt, torch.nn.Parameter):
            return result.as_subclass(type(inpt))  # torchvision's lose their type when indexed
        return result

    def forward(self, *inputs: Any, key: Key = None) -> Any:
        """The sample with its images changed; several arguments come back as a tuple."""
        if not inputs:
            raise TypeError(f"{type(self).__name__} needs a sample")
        sample = inputs if len(inputs) > 1 else inputs[0]
        leaves, structure, wanted = leaves_of(sample)
        if not any(wanted):
            return sample
        params = self._make_params(_draws_needed(leaves, wanted), key)
        results = [
            self.transform(leaf, params) if is_image else leaf
            for leaf, is_image in zip(leaves, wanted, strict=True)
        ]
        return tree_unflatten(results, structure)

    def set_epoch(self, epoch: int) -> None:
        """Begin the draws of this epoch, as ``DistributedSampler.set_epoch``."""
        if not is_count(epoch):
            raise ValueError(f"epoch must be an integer of at least 0, got {epoch!r}")
        self.epoch, self._calls = int(epoch), 0

    def extra_repr(self) -> str:
        return f"p={self.p}, seed={self.seed}"


def _draws_needed(leaves: Sequence[Any], wanted: Sequence[bool]) -> int:
    """How many draws the images of a sample share: the length of their batches, or 1."""
    counts = {count_images(leaf) for leaf, is_image in zip(leaves, wanted, strict=True) if is_image}
    if len(counts) > 1:
        raise ValueError(
            f"all images of a sample share its draws, so batches in it must have one length, got "
            f"{sorted(counts)}; transform them one by one"
        )
    return counts.pop() if counts else 1


def _keys(key: Any, images: int) -> list[tuple[int, int]]:
    """The keys of the images: (key, its image's number if several share it)."""
    # Arrays and tensors become lists, and those without axes integers.
    given: Any = key.tolist() if isinstance(key, (np.ndarray, Tensor)) else key
    several = isinstance(given, (list, tuple))
    keys = np.asarray(given).tolist() if several else [given] * images
    if len(keys) != images:
        raise ValueError(f"expected one key, or {images} (one an image), got {len(keys)}")
    for one in keys:
        if not is_count(one):
            raise ValueError(f"a key is an integer of at least 0, got {one!r}")
    return [(int(one), 0 if several else i) for i, one in enumerate(keys)]
