"""DeFlowDegrader: degraded and restored versions of anyone's images."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelHubMixin
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import deflow_aug
from deflow_aug import hub, randomness
from deflow_aug.card import model_card
from deflow_aug.config import CLEAN
from deflow_aug.devices import resolve
from deflow_aug.images import unpack
from deflow_aug.latent import normalized_weights
from deflow_aug.model import DeFlow, Domain, channels_last
from deflow_aug.randomness import Stream
from deflow_aug.resize import bicubic_downscale, pad_to_multiple

Images = Image.Image | NDArray[Any] | Tensor
Seed = int | Sequence[int] | None
Domains = Domain | Sequence[Domain] | None

EIGHT_BIT_STEPS = 255

RANDOM = "random"
"""In place of a domain's name: one of the model's degraded domains, drawn for each image."""


class DeFlowDegrader(ModelHubMixin):
    """Samples of a learned degradation, p(y given x), and of its inverse, p(x given y).

    Images may be

    - a PIL image of any mode;
    - a NumPy array (H, W), (H, W, C) or (B, H, W, C), uint8, uint16 or float in [0, 1];
    - a tensor (C, H, W) or (B, C, H, W), uint8, uint16 or float in [0, 1], on any device;

    with grey (1), grey + alpha (2), RGB (3) or RGBA (4) channels, of any size. What comes back has
    the same type, dtype, size, layout and device; alpha is carried through untouched.

    Args:
        model: the trained model.
        training: what is known of its training, as JSON values; for the model card.
        device: "auto" (a CUDA GPU if there is one, else the CPU), "cpu", "cuda", "cuda:1", ...
        conditioning_noise: whether h(x) gets its seeded noise, as in training.
        dequantize: whether images get seeded dequantisation noise, times the temperature (at most
            1), before they are encoded, as in training; each sample its own. Published models,
            whose M is zero, draw nearly all of their randomness from it.

    A model may know channel statistics of its degraded domain (``model.config.statistics``; those
    that 'deflow-aug convert' was given): ``degrade`` maps its results from the clean statistics to
    the degraded ones, whatever the temperature, and ``restore`` and ``log_prob`` map degraded
    images the other way before anything else, clamped to [0, 1], as training did.
    """

    def __init__(
        self,
        model: DeFlow,
        *,
        training: dict[str, Any] | None = None,
        device: str | torch.device = "auto",
        conditioning_noise: bool = True,
        dequantize: bool = False,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.training_info = dict(training or {})
        self.conditioning_noise, self.dequantize = conditioning_noise, dequantize
        self.to(device)

    # -- weights ---------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] = hub.DEFAULT_WEIGHTS,
        *,
        revision: str | None = None,
        device: str | torch.device = "auto",
        conditioning_noise: bool = True,
        dequantize: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> DeFlowDegrader:
        """Load weights that are bundled, in a folder, or on the Hugging Face Hub.

        Bundled weights and folders need no network.

        Args:
            pretrained_model_name_or_path: name of bundled weights, a folder that
                :meth:`save_pretrained` or ``deflow-aug train`` wrote, or a Hub id ("user/model").
            revision: branch, tag or commit on the Hub.
            device, conditioning_noise, dequantize: see the class.
            cache_dir, token, force_download, local_files_only: as in ``huggingface_hub``.

        Raises:
            deflow_aug.hub.WeightsError: (an OSError) if there are no such weights, they cannot be
                fetched, or they are damaged; it names unknown settings and misshapen tensors.
        """
        files = hub.find_weights(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        pretrained = hub.load(*files)
        return cls(
            pretrained.model,
            training=pretrained.training,
            device=device,
            conditioning_noise=conditioning_noise,
            dequantize=dequantize,
        )

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        half: bool = False,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        config: None = None,
        model_card_kwargs: None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write ``config.json``, ``model.safetensors`` and, if there is none, ``README.md``.

        If it fails, what the folder held before can still be loaded.

        Args:
            save_directory: the folder; it is made if need be.
            half: store the weights in float16: half the size, and a little rounding. Loaded, they
                are float32 again.
            repo_id, push_to_hub, push_to_hub_kwargs: as in ``huggingface_hub.ModelHubMixin``.
            config, model_card_kwargs: not used; the mixin's :meth:`push_to_hub` passes them.

        Returns:
            The commit on the Hub if it was pushed.
        """
        # In place of the mixin's method, which deletes the old config.json before it saves.
        folder = Path(save_directory)
        pretrained = hub.Pretrained(self.model, self.training_info)
        hub.save(folder, pretrained, deflow_aug.__version__, half=half)
        card = folder / "README.md"
        if not card.exists():
            self.generate_model_card().save(card)
        if not push_to_hub:
            return None
        url: str = self.push_to_hub(repo_id or folder.resolve().name, **push_to_hub_kwargs)
        return url

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card that ``save_pretrained`` writes where there is none yet."""
        return ModelCard(model_card(self.model, self.training_info))

    # -- device ----------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> DeFlowDegrader:
        """Move the model; returns itself."""
        channels_last(self.model).to(resolve(device))
        return self

    # -- sampling --------------------------------------------------------------------------

    def check_domain(self, domain: Domain | None) -> None:
        """Raise, as :meth:`degrade` would, unless that takes this domain for every image."""
        self._degraded_domain(domain, restoring=False)

    def degrade(
        self,
        img: Images,
        temperature: float | Sequence[float] | Tensor = 1.0,
        n_samples: int = 1,
        *,
        seed: Seed = None,
        domain: Domains = None,
    ) -> Any:
        """Degraded versions of clean images: y = f^-1(f(x; h(x)) + tau u; h(x)) (eq. 3, 8, 40).

        Args:
            img: an image or a batch of images; see the class.
            temperature: tau, one for all or one for each image of the batch. 0 gives the input
                back, to within rounding, but with the colours of the degraded domain if the model
                knows its channel statistics; 1 is the learned degradation.
            n_samples: number of samples of each image.
            seed: fixes the result of each image, whatever it is batched with. Images that share a
                seed share the latent noise: give a batch one seed for each image. None draws
                fresh seeds. No global random state is read or changed.
            domain: which of the model's degraded domains; may be left out if there is only one.
                "random": each image draws one, fixed by its seed, for each sample anew.
                {"low": 0.5, "vintage": 0.5}: a shift between domains, whose mean, covariance and
                channel statistics are the means of theirs with these weights, divided by their
                sum. A sequence: one of these for each image of the batch.

        Returns:
            The kind of image that came in. For n_samples > 1 a list of PIL images, or an array or
            tensor with the samples as a new first axis.

        Raises:
            TypeError, ValueError: for images that are none of the above, values out of range, or
                arguments that do not fit the batch.
        """

        def latents(
            z: Sequence[Tensor], noise: Sequence[Tensor], tau: Tensor, drawn: Sequence[Domain]
        ) -> list[Tensor]:
            return self.model.degrade(z, noise, drawn, tau)

        return self._sample(img, latents, domain, temperature, n_samples, seed)

    def restore(
        self,
        img: Images,
        n_samples: int = 1,
        *,
        seed: Seed = None,
        mean: bool = False,
        domain: Domains = None,
    ) -> Any:
        """Clean versions of degraded images, drawn from p(x given y).

        Args:
            img, n_samples, seed: as in :meth:`degrade`.
            domain: as in :meth:`degrade`, but not "random": which domain an image comes from is
                not to be drawn.
            mean: decode the mean of the posterior latents instead of a draw from them. Nothing
                is random then: no noise is added to anything, and ``seed`` has no effect.

        Returns:
            As :meth:`degrade`.
        """

        def latents(
            z: Sequence[Tensor], noise: Sequence[Tensor], tau: Tensor, drawn: Sequence[Domain]
        ) -> list[Tensor]:
            return self.model.restore(z, None if mean else noise, drawn)

        return self._sample(
            img, latents, domain, 1.0, n_samples, seed, noisy=not mean, restoring=True
        )

    def feed(
        self,
        gt: Tensor,
        scale: int = 4,
        temperature: float | Sequence[float] | Tensor = (0.5, 1.2),
        *,
        seed: int | None = None,
        step: int = 0,
        indices: Sequence[int] | None = None,
        domain: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Training pairs (lq, gt) of a batch of clean images: bicubic downscaling, degradation.

        One line for frameworks that degrade where a batch arrives, on the device:
        ``self.lq, self.gt = degrader.feed(data["gt"], scale=4)``.

        Args:
            gt: clean images [B, 3, H, W], uint8 or float in [0, 1], on any device.
            scale: of the downscaling, MATLAB's ``imresize``; it divides H and W.
            temperature: one for all, a range (low, high) that each image draws its own from, or
                a tensor [B], one for each image.
            seed: with it, what becomes of image i depends on (seed, step, indices[i]) alone,
                whatever the batch. None draws anew. No global random state is read or changed.
            step: number of the iteration, or of the epoch if indices number the whole data.
            indices: numbers of the images, 0 ... B-1 unless given.
            domain: as in :meth:`degrade`.

        Returns:
            lq [B, 3, H / scale, W / scale], in the values of 8-bit images, and gt; float32 in
            [0, 1], on the device of the degrader.

        Raises:
            TypeError, ValueError: for images or arguments that do not fit.
        """
        if not isinstance(gt, Tensor) or gt.ndim != 4 or gt.shape[1] != 3:
            given = tuple(gt.shape) if isinstance(gt, Tensor) else type(gt).__qualname__
            raise ValueError(f"expected a batch of clean images, [B, 3, H, W], got {given}")
        if not _is_integer(scale) or scale < 1:
            raise ValueError(f"scale must be an integer of at least 1, got {scale!r}")
        if gt.shape[-2] % scale or gt.shape[-1] % scale:
            raise ValueError(
                f"scale {scale} does not divide the {gt.shape[-2]} x {gt.shape[-1]} pixels of the "
                f"clean images; crop them to a multiple of it"
            )
        numbers = list(range(len(gt)) if indices is None else indices)
        if len(numbers) != len(gt):
            raise ValueError(f"expected {len(gt)} indices, one an image, got {len(numbers)}")
        run = randomness.fresh_seed() if seed is None else seed
        seeds = [image_seed(run, step, number) for number in numbers]
        if isinstance(temperature, Sequence):
            low, high = temperature_range(temperature)
            draws = [randomness.generator(one, Stream.TEMPERATURE) for one in seeds]
            temperature = [float(draw.uniform(low, high)) for draw in draws]
        pixels = unpack(gt.to(self.device, non_blocking=True)).pixels
        small = bicubic_downscale(pixels, scale).clamp(0, 1)
        lq = self.degrade(small, temperature, seed=seeds, domain=domain)
        return (lq * EIGHT_BIT_STEPS).round() / EIGHT_BIT_STEPS, pixels

    @torch.no_grad()  # not inference_mode, whose tensors autograd refuses
    def log_prob(self, img: Images, domain: str = "clean") -> Any:
        """log2-probability of images per dimension (3 H W), given h(x) without noise.

        The probability is that of an 8-bit image: the density at the centre of its bin times the
        bin's width, 1/255, whatever noise the model was trained with. An image whose sides are not
        multiples of ``model.config.size_multiple`` is padded, and its padding counts. Of a domain
        with channel statistics, it is the probability of the image in matched colours.

        Args:
            img: an image or a batch; see the class.
            domain: "clean", or the name of a degraded domain.

        Returns:
            A float for a single image; for a batch, a tensor or array of shape (B,). Minus this is
            the usual negative log-likelihood in bits per dimension.
        """
        pixels = self._prepare(unpack(img).pixels)
        domains = [domain] * len(pixels)
        bits = -self.model.nll(self.model.match_colours(pixels, domains), domains)
        # nll is of the bins of training.
        bits = bits + math.log2(self.model.config.dequantization_steps / EIGHT_BIT_STEPS)
        if isinstance(img, Tensor) and img.ndim == 4:
            return bits.to(img.device)
        if isinstance(img, np.ndarray) and img.ndim == 4:
            return bits.cpu().numpy()
        return float(bits)

    @torch.inference_mode()
    def _sample(
        self,
        img: Images,
        latents: Callable[
            [Sequence[Tensor], Sequence[Tensor], Tensor, Sequence[Domain]], list[Tensor]
        ],
        domain: Domains,
        temperature: float | Sequence[float] | Tensor,
        n_samples: int,
        seed: Seed,
        noisy: bool = True,
        restoring: bool = False,
    ) -> Any:
        """Samples of ``latents`` of the image's latents: to the degraded domain, or from it."""
        if not _is_integer(n_samples) or n_samples < 1:
            raise ValueError(f"n_samples must be an integer of at least 1, got {n_samples!r}")
        unpacked = unpack(img)
        height, width = unpacked.pixels.shape[-2:]
        x = self._prepare(unpacked.pixels)
        domains, clean = self._degraded_domains(domain, len(x), restoring), [CLEAN] * len(x)
        x = self.model.match_colours(x, domains if restoring else clean)
        seeds = _per_image_seeds(seed, len(x))
        tau = _per_image_temperature(temperature, len(x)).to(self.device)

        noise = None
        if noisy and self.conditioning_noise:
            scale = self.model.config.scale
            small = (3, x.shape[-2] // scale, x.shape[-1] // scale)
            noise = self._noise([small], seeds, Stream.CONDITIONING)[0]
        features = self.model.features(x, noise)
        dequantize = noisy and self.dequantize
        z: list[Tensor] = []
        shapes = self.model.latent_shapes(*x.shape[-2:])
        samples = []
        for number in range(n_samples):
            if dequantize:
                z, _ = self.model.encode(x + self._dequantization(x, seeds, tau, number), features)
            elif not z:  # the same for all samples
                z, _ = self.model.encode(x, features)
            draw = self._noise(shapes, seeds, Stream.LATENT, number)
            drawn = self._drawn(domains, seeds, number)
            y = self.model.decode(latents(z, draw, tau, drawn), features)
            y = self.model.unmatch_colours(y, clean if restoring else drawn)
            samples.append(y[..., :height, :width])
        return unpacked.pack(torch.stack(samples), stack=n_samples > 1)

    def _prepare(self, pixels: Tensor) -> Tensor:
        padded = pad_to_multiple(pixels.to(self.device), self.model.config.size_multiple)
        return padded.contiguous(memory_format=torch.channels_last)

    def _dequantization(self, x: Tensor, seeds: Sequence[int], tau: Tensor, number: int) -> Tensor:
        """Dequantisation noise like ``x`` of the sample with this number."""
        shape = tuple(x.shape[1:])
        draws = [randomness.uniform(shape, seed, Stream.DEQUANTIZATION, number) for seed in seeds]
        width_of_bin = tau.clamp(max=1) / self.model.config.dequantization_steps
        return width_of_bin[:, None, None, None] * torch.stack(draws).to(x.device)

    def _noise(
        self, shapes: Sequence[tuple[int, ...]], seeds: Sequence[int], *key: int
    ) -> list[Tensor]:
        """Standard normal draws [B, *shape] for each shape; those of an image from its seed."""
        return [
            torch.stack([randomness.normal(shape, seed, *key, i) for seed in seeds]).to(self.device)
            for i, shape in enumerate(shapes)
        ]

    def _drawn(
        self, domains: Sequence[Domain], seeds: Sequence[int], number: int
    ) -> Sequence[Domain]:
        """The domains of the sample with this number: "random" drawn, from each image's seed."""
        known = self.model.config.domains
        if RANDOM in known:
            return domains
        return [
            known[randomness.generator(seed, Stream.CHOICE, number).integers(len(known))]
            if one == RANDOM
            else one
            for one, seed in zip(domains, seeds, strict=True)
        ]

    def _degraded_domains(self, domain: Domains, images: int, restoring: bool) -> list[Domain]:
        """The degraded domain of each image, checked: a name, a mix, or "random"."""
        if domain is None or isinstance(domain, (str, Mapping)):
            return [self._degraded_domain(domain, restoring)] * images
        if not isinstance(domain, (Sequence, np.ndarray)):
            raise TypeError(
                f"domain must be a name, {{name: weight}}, or one of these for each image, "
                f"got {domain!r}"
            )
        if len(domain) != images:
            raise ValueError(f"expected one domain, or {images} (one an image), got {len(domain)}")
        return [self._degraded_domain(one, restoring) for one in domain]

    def _degraded_domain(self, domain: Domain | None, restoring: bool) -> Domain:
        known = self.model.config.domains
        if domain is None and len(known) == 1:
            return known[0]
        if isinstance(domain, Mapping):
            weights = normalized_weights(domain, known)
            return weights if len(weights) > 1 else next(iter(weights))
        if domain in known:
            return domain
        if domain == RANDOM and not restoring:
            return RANDOM
        if domain == RANDOM:
            raise ValueError(
                f'domain="random" is for degrade: name the domain that the images come from '
                f"({', '.join(known)}), or give a mix {{name: weight}}"
            )
        raise ValueError(
            f"domain must be one of this model's degraded domains ({', '.join(known)}), "
            f"got {domain!r}"
        )


def image_seed(seed: int, step: int, index: int) -> int:
    """The seed of image ``index`` in step or epoch ``step`` of what ``seed`` began."""
    # The key without its last integer names the crop of the same image.
    return int(randomness.generator(seed, Stream.CROP, step, index, 1).integers(2**63))


def temperature_range(temperature: Sequence[float]) -> tuple[float, float]:
    """The two ends of a range of temperatures, checked."""
    ends = tuple(temperature)
    if len(ends) != 2 or not (0 <= ends[0] <= ends[1] < math.inf):
        raise ValueError(
            f"a range of temperatures is (low, high) with 0 <= low <= high, got {temperature!r}; "
            f"pass a tensor for one temperature an image"
        )
    return float(ends[0]), float(ends[1])


def _per_image_seeds(seed: Seed, images: int) -> list[int]:
    if seed is None:
        return [randomness.fresh_seed() for _ in range(images)]
    seeds = list(seed) if isinstance(seed, (Sequence, np.ndarray)) else [seed] * images
    if len(seeds) != images:
        raise ValueError(f"expected one seed, or {images} (one an image), got {len(seeds)}")
    for one in seeds:
        if not _is_integer(one) or one < 0:
            raise ValueError(f"a seed is an integer of at least 0, got {one!r}")
    return [int(one) for one in seeds]


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _per_image_temperature(temperature: float | Sequence[float] | Tensor, images: int) -> Tensor:
    try:
        tau = torch.as_tensor(temperature, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"temperature must be a number, or one for each image, got {temperature!r}"
        ) from error
    if tau.ndim == 0:
        tau = tau.expand(images)
    if tau.shape != (images,):
        raise ValueError(
            f"temperature must be a number, or {images} numbers (one an image), "
            f"got shape {tuple(tau.shape)}"
        )
    if not bool((torch.isfinite(tau) & (tau >= 0)).all()):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    return tau
