"""DeFlowDegrader: degraded and restored versions of anyone's images."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
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
from deflow_aug.arguments import (
    Domains,
    Seed,
    degraded_domain,
    is_integer,
    per_image_domains,
    per_image_seeds,
    per_image_temperature,
    run_seed,
    temperature_range,
    whole,
)
from deflow_aug.card import model_card
from deflow_aug.devices import resolve
from deflow_aug.halo import measured_halo
from deflow_aug.image_rows import open_rows, png_writer
from deflow_aug.images import unpack
from deflow_aug.model import DeFlow, Domain, channels_last
from deflow_aug.pieces import extent
from deflow_aug.randomness import Stream
from deflow_aug.resize import bicubic_downscale
from deflow_aug.sampling import Request, image_seed, prepared
from deflow_aug.tiled import sample_image, sample_rows
from deflow_aug.tiling import Tile, most_pixels, plan

__all__ = ["EIGHT_BIT_STEPS", "DeFlowDegrader", "Images"]

Images = Image.Image | NDArray[Any] | Tensor

EIGHT_BIT_STEPS = 255


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
        self._halo: int | None = None
        self.to(device)

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        name = type(self).__name__
        return (
            f"{name}(domains={self.domains}, {count / 1e6:.2f} million parameters, {self.device})"
        )

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the degraded domains, as ``domain=`` takes them."""
        return self.model.config.domains

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
            repo_id, push_to_hub, push_to_hub_kwargs: as in ``huggingface_hub.ModelHubMixin``; what
                is sent are these three files as they are in the folder.
            config, model_card_kwargs: not used; the mixin's :meth:`push_to_hub` passes them.

        Returns:
            The commit on the Hub if it was pushed.

        Raises:
            ValueError: ``half``, and a weight is too large for float16.
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
        # Not the mixin's method, which saves anew: in float32, with a card of its own.
        return hub.push(folder, repo_id or folder.resolve().name, **push_to_hub_kwargs)

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
        degraded_domain(domain, self.domains, restoring=False)

    def degrade(
        self,
        img: Images,
        temperature: float | Sequence[float] | Tensor = 1.0,
        n_samples: int = 1,
        *,
        seed: Seed = None,
        domain: Domains = None,
        tile: int | str | None = "auto",
    ) -> Any:
        """Degraded versions of clean images: y = f^-1(f(x; h(x)) + tau u; h(x)) (eq. 3, 8, 40).

        Args:
            img: an image or a batch of images; see the class.
            temperature: tau, one for all or one for each image of the batch. 0 gives the input
                back, to within rounding, but with the colours of the degraded domain if the model
                knows its channel statistics; 1 is the learned degradation. Above 3 or so the
                latents are far outside of what training saw: results are clipped and discoloured
                rather than noisier.
            n_samples: number of samples of each image.
            seed: fixes the result of each image, whatever it is batched with. Images that share a
                seed share the latent noise: give a batch one seed for each image. None draws
                fresh seeds. No global random state is read or changed.
            domain: which of the model's degraded domains; may be left out if there is only one.
                "random": each image draws one, fixed by its seed, for each sample anew.
                {"low": 0.5, "vintage": 0.5}: a shift between domains, whose mean, covariance and
                channel statistics are the means of theirs with these weights, divided by their
                sum. A sequence: one of these for each image of the batch.
            tile: "auto" computes images one after another, and large ones in tiles, where memory
                (2.8 GB on a CPU, half of what is free on a GPU) does not suffice for all at once,
                and on a CPU where they have more than half a megapixel, which is quicker. A
                number: the side of tiles, in pixels. None or 0: everything at once. Noise belongs
                to positions of the image, and tiles see what is around them (:meth:`halo`): with
                tiles, results differ by less than 1/255. What is around them is computed with each
                of them: those smaller than twice the halo take many times the work.

        Returns:
            The kind of image that came in. For n_samples > 1 a list of PIL images, or an array or
            tensor with the samples as a new first axis.

        Raises:
            TypeError, ValueError: for images that are none of the above, values out of range, or
                arguments that do not fit the batch.
        """
        return self._sample(img, n_samples, seed, domain, temperature, tile)

    def restore(
        self,
        img: Images,
        n_samples: int = 1,
        *,
        seed: Seed = None,
        mean: bool = False,
        domain: Domains = None,
        tile: int | str | None = "auto",
    ) -> Any:
        """Clean versions of degraded images, drawn from p(x given y).

        Args:
            img, n_samples, seed, tile: as in :meth:`degrade`.
            domain: as in :meth:`degrade`, but not "random": which domain an image comes from is
                not to be drawn.
            mean: decode the mean of the posterior latents instead of a draw from them. Nothing
                is random then: no noise is added to anything, and ``seed`` has no effect.

        Returns:
            As :meth:`degrade`.
        """
        return self._sample(img, n_samples, seed, domain, 1.0, tile, restoring=True, mean=mean)

    def feed(
        self,
        gt: Tensor,
        scale: int = 4,
        temperature: float | Sequence[float] | Tensor = (0.5, 1.2),
        *,
        seed: int | None = None,
        step: int = 0,
        indices: Sequence[int] | NDArray[Any] | Tensor | None = None,
        domain: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Training pairs (lq, gt) of a batch of clean images: bicubic downscaling, degradation.

        One line for frameworks that degrade where a batch arrives, on the device:
        ``self.lq, self.gt = degrader.feed(data["gt"], scale=4)``.

        Args:
            gt: clean images [B, 3, H, W], uint8 or float in [0, 1], on any device.
            scale: of the downscaling, MATLAB's ``imresize``; it divides H and W.
            temperature: one for all, a range (low, high) that each image draws its own from, or
                a tensor or array [B], one for each image.
            seed: one for all; with it, what becomes of image i depends on (seed, step, indices[i])
                alone, whatever the batch. None draws anew. No global random state is read or
                changed.
            step: number of the iteration, or of the epoch if indices number the whole data.
            indices: numbers of the images, 0 ... B-1 unless given; a list, array or tensor.
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
        if not is_integer(scale) or scale < 1:
            raise ValueError(f"scale must be an integer of at least 1, got {scale!r}")
        if gt.shape[-2] % scale or gt.shape[-1] % scale:
            raise ValueError(
                f"scale {scale} does not divide the {gt.shape[-2]} x {gt.shape[-1]} pixels of the "
                f"clean images; crop them to a multiple of it"
            )
        numbers = [
            whole("an index", one) for one in (range(len(gt)) if indices is None else indices)
        ]
        if len(numbers) != len(gt):
            raise ValueError(f"expected {len(gt)} indices, one an image, got {len(numbers)}")
        seed, step = run_seed(seed), whole("step", step)
        run = randomness.fresh_seed() if seed is None else seed
        seeds = [image_seed(run, step, number) for number in numbers]
        if not isinstance(temperature, (Tensor, np.ndarray)):
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
        if not isinstance(domain, str):
            raise TypeError(f"log_prob takes the name of one domain, got {domain!r}")
        pixels = prepared(self.model, unpack(img).pixels)
        domains = [domain] * len(pixels)
        density = self.model.log_prob(self.model.match_colours(pixels, domains), domains)
        # Not the model's nll, which is of the bins of training.
        bits = density / (math.log(2) * pixels[0].numel()) - math.log2(EIGHT_BIT_STEPS)
        if isinstance(img, Tensor) and img.ndim == 4:
            return bits.to(img.device)
        if isinstance(img, np.ndarray) and img.ndim == 4:
            return bits.cpu().numpy()
        return float(bits)

    def degrade_file(
        self,
        source: str | os.PathLike[str],
        targets: Sequence[str | os.PathLike[str]],
        temperature: float = 1.0,
        *,
        seed: int | None = None,
        domain: Domain | None = None,
        tile: int | str | None = "auto",
    ) -> None:
        """Degraded versions of an image file, which need not fit into memory.

        They are computed and written by rows of tiles; of results no more is held. So are PNG
        files read, of any size; files of other formats are decoded whole, within Pillow's limit.
        The results are those of :meth:`degrade` for the image that ``read_image`` returns.

        Args:
            source: the image file.
            targets: a PNG file for each sample; their folders are made if need be.
            temperature, seed, domain, tile: as in :meth:`degrade`, for one image.

        Raises:
            deflow_aug.image_files.UnreadableImageError: (an OSError) if the image cannot be read.
            ValueError: for arguments that do not fit, or if PNG files cannot hold the image's mode.
            OSError: if the results cannot be written. What there is of them is removed.
        """
        if isinstance(targets, (str, os.PathLike)) or not targets:
            raise ValueError(f"expected a list of files to write, got {targets!r}")
        request = self._request(1, len(targets), seed, domain, temperature)
        with ExitStack() as files:
            photo = open_rows(source, files)
            tiles = self._tiles((1, photo.height, photo.width), len(targets), tile)
            writers = [files.enter_context(png_writer(path, photo.height)) for path in targets]
            sample_rows(self.model, photo, tiles, request, writers)

    def _sample(
        self,
        img: Images,
        n_samples: int,
        seed: Seed,
        domain: Domains,
        temperature: float | Sequence[float] | Tensor,
        tile: int | str | None,
        **way: bool,
    ) -> Any:
        """Samples of an image or a batch, tile by tile."""
        if not is_integer(n_samples) or n_samples < 1:
            raise ValueError(f"n_samples must be an integer of at least 1, got {n_samples!r}")
        size = extent(img)
        tiles = self._tiles(size, int(n_samples), tile)
        request = self._request(size[0], int(n_samples), seed, domain, temperature, **way)
        return sample_image(self.model, img, tiles, request)

    def _tiles(
        self, size: tuple[int, int, int], n_samples: int, tile: int | str | None
    ) -> list[Tile]:
        limit = most_pixels(self.model.config, n_samples, self.device, math.prod(size))
        return plan(size, tile, self.model.config.size_multiple, limit, self.halo)

    def _request(
        self,
        images: int,
        n_samples: int,
        seed: Seed,
        domain: Domains,
        temperature: float | Sequence[float] | Tensor,
        **way: bool,
    ) -> Request:
        """What callers ask for, checked."""
        known, restoring = self.domains, way.get("restoring", False)
        return Request(
            per_image_seeds(seed, images),
            per_image_temperature(temperature, images),
            per_image_domains(domain, images, known, restoring),
            n_samples,
            conditioning_noise=self.conditioning_noise,
            dequantize=self.dequantize,
            **way,
        )

    def halo(self) -> int:
        """Pixels around each tile that are computed with it; measured once for a model."""
        if self._halo is None:
            self._halo = measured_halo(self.model)
        return self._halo
