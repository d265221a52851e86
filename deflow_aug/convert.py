"""Published checkpoints into the state of our modules: DeFlow itself, and RRDB (ESRGAN) weights.

Files are read by ``torch.load(weights_only=True)``, safetensors and ``yaml.safe_load``, and nothing
else: no code in them ever runs.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import yaml  # type: ignore[import-untyped]
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deflow_aug.config import ChannelStatistics, ConfigError, EncoderConfig, ModelConfig

PUBLISHED_DEQUANTIZATION_STEPS = 32
PUBLISHED_CONDITIONING_NOISE = 0.03
PUBLISHED_STACKED_BLOCKS = (1, 8, 15, 22)
"""Of a trunk of 23 blocks."""

DOMAIN = "degraded"
"""Name that the one degraded domain of a published model gets."""

WRAPPERS = ("state_dict", "params_ema", "params")
"""Keys under which training programs wrap a state dict, the preferred one first."""

STATISTICS_PATH = ("datasets", "train", "normalize")
"""Where the published YAML files have the channel statistics, of values from 0 to 255."""

STATISTICS_NAMES = {
    "clean_mean": "mean_clean_hr",
    "clean_std": "std_clean_hr",
    "degraded_mean": "mean_noisy_hr",
    "degraded_std": "std_noisy_hr",
}

NAMES_SHOWN = 5

FLOW = "flowUpsamplerNet.layers."


class ConversionError(ValueError):
    """A file or a set of tensors is not what it should be; the message names what."""


@dataclass(frozen=True)
class Converted:
    """A published model in our terms.

    Args:
        config: its architecture.
        state: loads strictly into ``deflow_aug.model.DeFlow(config)``; float tensors are float32.
        dropped: names of the published tensors that have no part in the model.
    """

    config: ModelConfig
    state: dict[str, Tensor]
    dropped: list[str]


@dataclass(frozen=True)
class _Entry:
    """One tensor: its name in the checkpoint, its name with us, its shape in the checkpoint."""

    source: str
    target: str
    shape: tuple[int, ...]


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a ``.pth`` or ``.safetensors`` file by name, on the CPU.

    A state dict wrapped under ``state_dict``, ``params_ema`` or ``params`` is unwrapped, and a
    ``module.`` before a name is cut off.

    Raises:
        OSError: the file cannot be read.
        ConversionError: it is not a PyTorch file of plain tensors (or damaged, for safetensors).
            One that holds anything else than plain values and tensors is refused unread.
    """
    content: object
    try:
        if os.fspath(path).endswith(".safetensors"):
            content = load_file(path)
        else:
            if zipfile.is_zipfile(path):
                _check_zip(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ConversionError):
        raise
    except SafetensorError as error:
        raise ConversionError(
            f"{os.fspath(path)} is not a readable safetensors file: {error}"
        ) from error
    except Exception as error:  # whatever a damaged or foreign file makes the unpickler trip over
        raise ConversionError(
            f"{os.fspath(path)} is not a PyTorch file of plain weights: it is damaged, of another "
            "format, or holds objects whose loading could run code, which is never allowed"
        ) from error
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(
            f"{os.fspath(path)} holds no tensors by name (a state dict), but "
            f"{'nothing' if content == {} else type(content).__name__}"
        )
    state: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ConversionError(
                f"{os.fspath(path)} is not a state dict: {key!r} is of type "
                f"{type(value).__name__}, not a tensor"
            )
        name = key.removeprefix("module.")
        if name in state:
            raise ConversionError(
                f"{os.fspath(path)} has {name} twice, with and without 'module.' before it"
            )
        state[name] = value
    return state


def _check_zip(path: str | os.PathLike[str]) -> None:
    """The sums that a PyTorch file keeps of its contents, which ``torch.load`` does not look at."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ConversionError(
            f"{os.fspath(path)} is damaged: {damaged} in it does not have the CRC-32 that was "
            "saved with it; fetch the file again (or, if it was saved without CRC-32, load it and "
            "save it with PyTorch's default)"
        )


def convert_published(
    state: Mapping[str, Tensor],
    *,
    scale: int | None = None,
    stacked_blocks: Iterable[int] | None = None,
    statistics: ChannelStatistics | None = None,
) -> Converted:
    """Turn the state dict of a published DeFlow model into ours.

    The architecture is read off the tensors' names and shapes. Levels, steps, splits and widths
    follow from them alone. The scale follows from the number of upsampling convolutions, n for
    s = 2^n; but models of s = 2 have two like those of s = 4, and need ``scale``. How many blocks
    are stacked follows from the feature channels; which, is known for the published 4 of 23, for
    none and for all, and otherwise needs ``stacked_blocks``.

    Args:
        state: the tensors by name, as :func:`load_checkpoint` returns them.
        scale: the downsampling factor s of h(x), where it is not the one deduced.
        stacked_blocks: 0-based numbers of the blocks whose outputs the features include.
        statistics: the channel statistics that its training used, if it did; no tensor tells.

    Raises:
        ConversionError: a tensor is missing, unknown or misshapen (the message names it), or the
            architecture does not follow from what is there.
        ConfigError: there can be no such ``scale`` or ``stacked_blocks``.
    """
    config = _published_config(state, scale, stacked_blocks)
    if statistics is not None:
        config = replace(config, statistics={DOMAIN: statistics})
    expected = list(_published_entries(config))
    dropped = _check(state, expected, _PUBLISHED_UNUSED)
    result: dict[str, Tensor] = {}
    for entry in expected:
        tensor = state[entry.source]
        if entry.target.endswith(".permutation"):
            result[entry.target] = _permutation(entry.source, tensor)
            continue
        if entry.target.endswith(".sign") and not bool((tensor.abs() == 1).all()):
            raise ConversionError(f"{entry.source} has values other than 1 and -1")
        if entry.target.endswith((".mean", ".factor")):
            tensor = tensor[None]  # of the one degraded domain
        flat = entry.target.endswith((".bias", ".logs"))  # there [1, C, 1, 1] or [C, 1, 1]
        result[entry.target] = _plain(tensor.flatten() if flat else tensor)
        if entry.target.endswith((".norm.bias", ".affine.bias")):
            result[f"{entry.target.removesuffix('bias')}initialized"] = torch.tensor(True)
    return Converted(config, result, dropped)


def published_statistics(path: str | os.PathLike[str]) -> ChannelStatistics:
    """The channel statistics in the YAML file that comes with a published checkpoint.

    Four lists of three numbers from 0 to 255, under ``datasets: train: normalize:``.

    Raises:
        OSError: the file cannot be read.
        ConversionError: it is no YAML file of plain values, or has no usable statistics; the
            message names the key.
    """
    file = os.fspath(path)
    try:
        with open(path, "rb") as stream:
            content = yaml.safe_load(stream)
    except (yaml.YAMLError, UnicodeError) as error:
        reason = " ".join(str(error).split())
        raise ConversionError(f"{file} is not a YAML file of plain values: {reason}") from error
    where = ""
    for key in STATISTICS_PATH:
        if not isinstance(content, Mapping) or key not in content:
            raise ConversionError(
                f"{file} has no channel statistics: {where}{key} is missing (expected at "
                f"{'.'.join(STATISTICS_PATH)}); models trained without them need none"
            )
        content, where = content[key], f"{where}{key}."
    result = {}
    for ours, theirs in STATISTICS_NAMES.items():
        values = content.get(theirs) if isinstance(content, Mapping) else None
        if (
            not isinstance(values, list)
            or len(values) != 3
            or not all(type(value) in (int, float) for value in values)
        ):
            raise ConversionError(
                f"{file}: {where}{theirs} must be a list of three numbers from 0 to 255, "
                f"got {'nothing' if values is None else repr(values)}"
            )
        result[ours] = tuple(value / 255 for value in values)
    try:
        return ChannelStatistics(**result)
    except ConfigError as error:
        raise ConversionError(f"{file}: {where.rstrip('.')}, divided by 255: {error}") from error


def encoder_weights(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """RRDB (ESRGAN) weights as the start of the conditioning network of a model.

    Three naming schemes are understood: ``RRDB_trunk.0.RDB1.conv1`` (ESRGAN), ``body.0.rdb1.conv1``
    (BasicSR) and ``model.1.sub.0.RDB1.conv1.0`` (ESRGAN's first release). The high-resolution
    tail and the upsampling convolutions that no level reads are left out.

    Args:
        state: the tensors by name, as :func:`load_checkpoint` returns them.
        config: the model; its ``encoder`` must have the width, growth and blocks of the weights.

    Returns:
        The state of ``deflow_aug.conditioning.ConditioningNetwork(config)``, complete, float32.

    Raises:
        ConversionError: the weights are of another architecture, or a tensor is missing, unknown
            or misshapen; the message names it.
    """
    scheme = next((s for s in _SCHEMES if any(map(s.block_number, state))), None)
    if scheme is None:
        known = ", ".join(s.block.format(0, 1, 1) for s in _SCHEMES)
        raise ConversionError(
            f"these are not RRDB weights: none of their names is like {known}, ...; "
            f"they have {_listed(state)}"
        )
    blocks = scheme.blocks(state)
    if blocks != config.encoder.blocks:
        raise ConversionError(
            f"the weights have {blocks} blocks ({scheme.block.format(blocks - 1, 1, 1)} is of the "
            f"last one), but encoder.blocks is {config.encoder.blocks}"
        )
    expected = list(scheme.entries(config.encoder, _upconvs(config), "", ""))
    _check(state, expected, scheme.unused)
    return {entry.target: _plain(state[entry.source]) for entry in expected}


@dataclass(frozen=True)
class _Scheme:
    """How one family of RRDB checkpoints names its tensors (without .weight and .bias)."""

    first: str
    block: str
    trunk: str
    upconv: str
    unused: str
    upconv_step: int = 1

    def block_number(self, name: str) -> re.Match[str] | None:
        pattern = re.escape(self.block).replace(r"\{\}", r"(\d+)")
        return re.fullmatch(pattern + r"\.(weight|bias)", name)

    def blocks(self, state: Iterable[str]) -> int:
        """Number of blocks, by the highest number in use; 0 without any."""
        matches = (self.block_number(name) for name in state)
        return max((int(match[1]) + 1 for match in matches if match), default=0)

    def entries(
        self, encoder: EncoderConfig, upconvs: int, source: str, target: str
    ) -> Iterator[_Entry]:
        """All tensors that a conditioning network reads, their names after these prefixes."""
        width, growth = encoder.channels, encoder.growth

        def conv(theirs: str, ours: str, inputs: int, outputs: int) -> Iterator[_Entry]:
            shapes = {"weight": (outputs, inputs, 3, 3), "bias": (outputs,)}
            for leaf, shape in shapes.items():
                yield _Entry(f"{source}{theirs}.{leaf}", f"{target}{ours}.{leaf}", shape)

        yield from conv(self.first, "trunk.conv_first", 3, width)
        for block in range(encoder.blocks):
            for dense in range(3):
                for i in range(5):
                    yield from conv(
                        self.block.format(block, dense + 1, i + 1),
                        f"trunk.body.{block}.blocks.{dense}.convs.{i}",
                        width + i * growth,
                        growth if i < 4 else width,
                    )
        yield from conv(self.trunk.format(encoder.blocks), "trunk.conv_body", width, width)
        for i in range(upconvs):
            theirs = self.upconv.format((i + 1) * self.upconv_step)
            yield from conv(theirs, f"upconvs.{i}", width, width)


_ESRGAN = _Scheme(
    first="conv_first",
    block="RRDB_trunk.{}.RDB{}.conv{}",
    trunk="trunk_conv",
    upconv="upconv{}",
    unused=r"(upconv\d+|HRconv|conv_last)\.(weight|bias)",
)
_BASICSR = _Scheme(
    first="conv_first",
    block="body.{}.rdb{}.conv{}",
    trunk="conv_body",
    upconv="conv_up{}",
    unused=r"(conv_up\d+|conv_hr|conv_last)\.(weight|bias)",
)
_FIRST_RELEASE = _Scheme(  # one nn.Sequential: upsample, convolution, activation; three a doubling
    first="model.0",
    block="model.1.sub.{}.RDB{}.conv{}.0",
    trunk="model.1.sub.{}",
    upconv="model.{}",
    unused=r"model\.\d+\.(weight|bias)",
    upconv_step=3,
)
_SCHEMES = (_ESRGAN, _BASICSR, _FIRST_RELEASE)

_UPCONV = re.compile(r"upconv(\d+)\.(weight|bias)")
_PUBLISHED_UNUSED = (
    rf"I|{re.escape(FLOW)}\d+\.I|flowUpsamplerNet\.f\.\d+\.(weight|bias)|RRDB\.({_ESRGAN.unused})"
)


def _upconvs(config: ModelConfig) -> int:
    """Upsampling convolutions that the first level's features, s/2 times h(x), take."""
    return max(0, config.scale.bit_length() - 2)


def _published_config(
    state: Mapping[str, Tensor], scale: int | None, stacked_blocks: Iterable[int] | None
) -> ModelConfig:
    """The architecture. Single wrong tensors are outvoted here; the comparison then names them."""
    layers = _flow_layers(state)
    level_channels, split_levels = _walk_levels(layers)
    per_level = [[x for x in layers if x.channels == c] for c in level_channels]
    transitions = _vote(sum(not x.conditional for x in level) for level in per_level)
    steps = max(1, _vote(sum(x.conditional for x in level) for level in per_level))
    pattern = rf"{re.escape(FLOW)}\d+\.affine\.fFeatures\.0\.weight"
    example = f"{FLOW}{1 + transitions}.affine.fFeatures.0.weight"
    hidden = _voted_size(state, pattern, 0, example)
    feature_channels = _voted_size(state, pattern, 1, example)

    pattern, example = r"RRDB\.RRDB_trunk\.\d+\.RDB\d\.conv", "RRDB.RRDB_trunk.0.RDB1.conv"
    growth = _voted_size(state, rf"{pattern}1\.weight", 0, f"{example}1.weight")
    width = _voted_size(state, rf"{pattern}5\.weight", 0, f"{example}5.weight")
    trunk = [name.removeprefix("RRDB.") for name in state if name.startswith("RRDB.")]
    blocks = _ESRGAN.blocks(trunk)
    if scale is None:
        # Their number, not their numbers: a strange one should not decide.
        upconvs = {match[1] for name in trunk if (match := _UPCONV.fullmatch(name))}
        scale = 2 ** max(2, len(upconvs))
    if stacked_blocks is None:
        stacked_blocks = _stacked_blocks(feature_channels, width, blocks)
    encoder = EncoderConfig(width, growth, blocks, tuple(stacked_blocks))
    if encoder.feature_channels != feature_channels:
        raise ConversionError(
            f"the flow's networks read {feature_channels} feature channels, but {width} "
            f"channels with {len(encoder.stacked_blocks)} stacked blocks are "
            f"{encoder.feature_channels}"
        )
    return ModelConfig(
        scale=scale,
        levels=len(level_channels),
        steps=steps,
        transition_steps=transitions,
        split_levels=split_levels,
        hidden=hidden,
        encoder=encoder,
        conditioning_noise=PUBLISHED_CONDITIONING_NOISE,
        dequantization_steps=PUBLISHED_DEQUANTIZATION_STEPS,
        shift_init=0.0,
        domains=(DOMAIN,),
    )


@dataclass(frozen=True)
class _FlowLayer:
    channels: int
    conditional: bool


def _flow_layers(state: Mapping[str, Tensor]) -> list[_FlowLayer]:
    """The layers with an actnorm, that is transition and flow steps, in encoding order."""
    pattern = re.compile(rf"{re.escape(FLOW)}(\d+)\.(.+)")
    channels: dict[int, int] = {}
    conditional = set()
    for name, tensor in state.items():
        if match := pattern.fullmatch(name):
            number, rest = int(match[1]), match[2]
            if rest == "actnorm.bias" and tensor.ndim == 4:
                channels[number] = tensor.shape[1]
            if rest.startswith("affine."):
                conditional.add(number)
    return [_FlowLayer(channels[n], n in conditional) for n in sorted(channels)]


def _walk_levels(layers: list[_FlowLayer]) -> tuple[list[int], tuple[int, ...]]:
    """Channels of each level, and which levels end in a split.

    A squeeze makes C channels 4 C, or 2 C after a split, which lets half of them go.
    """
    present = {layer.channels for layer in layers}
    if 12 not in present:
        raise ConversionError(
            f"this is no DeFlow model: {FLOW}1.actnorm.bias is missing or not of shape "
            "[1, 12, 1, 1]"
        )
    level_channels, splits = [12], []
    while True:
        last = level_channels[-1]
        if 2 * last in present:
            splits.append(len(level_channels))
            level_channels.append(2 * last)
        elif 4 * last in present:
            level_channels.append(4 * last)
        else:
            return level_channels, tuple(splits)


def _stacked_blocks(feature_channels: int, channels: int, blocks: int) -> tuple[int, ...]:
    count, rest = divmod(feature_channels - channels, channels)
    if count == 0 and rest == 0:
        return ()
    if count == blocks and rest == 0:
        return tuple(range(blocks))
    if count == len(PUBLISHED_STACKED_BLOCKS) and rest == 0 and blocks == 23:
        return PUBLISHED_STACKED_BLOCKS
    raise ConversionError(
        f"the flow's networks read {feature_channels} feature channels, the encoder has {blocks} "
        f"blocks of {channels}: which blocks are stacked does not follow (the published models "
        f"stack 4 of 23); pass stacked_blocks"
    )


def _published_entries(config: ModelConfig) -> Iterator[_Entry]:
    """All tensors of a published model that have a part in it."""
    yield from _ESRGAN.entries(config.encoder, _upconvs(config), "RRDB.", "conditioning.")
    features, hidden = config.encoder.feature_channels, config.hidden
    latents = 0
    number = 0  # of the layer in encoding order, squeezes included
    for level, channels in enumerate(config.level_channels, start=1):
        half = channels // 2
        for step in range(1, 1 + config.transition_steps + config.steps):
            theirs = f"{FLOW}{number + step}"
            ours = f"flow.levels.{level - 1}.layers.{step}.layers"
            yield from _unconditional(theirs, ours, channels)
            if step > config.transition_steps:
                coupling, injector = f"{theirs}.affine.fAffine", f"{theirs}.affine.fFeatures"
                yield from _network(coupling, f"{ours}.2.net", half + features, hidden, half)
                yield from _network(injector, f"{ours}.3.net", features, hidden, channels)
        number += 1 + config.transition_steps + config.steps
        if level in (config.split_levels or ()):
            theirs = f"{FLOW}{number}"
            yield from _zeros(f"{theirs}.conv", f"flow.splits.{level}.prior", half, channels)
            yield from _shift(f"{theirs}.", f"shifts.{latents}", half)
            number += 1
            latents += 1
    yield from _shift("", f"shifts.{latents}", config.latent_channels[-1])


def _unconditional(theirs: str, ours: str, channels: int) -> Iterator[_Entry]:
    """Actnorm and 1x1 convolution."""
    yield from _norm(f"{theirs}.actnorm", f"{ours}.0.affine", channels)
    names = {"p": "permutation", "l": "lower", "u": "upper", "sign_s": "sign", "log_s": "log_s"}
    for leaf, target in names.items():
        shape = (channels,) if leaf.endswith("_s") else (channels, channels)
        yield _Entry(f"{theirs}.invconv.{leaf}", f"{ours}.1.{target}", shape)


def _network(theirs: str, ours: str, inputs: int, hidden: int, outputs: int) -> Iterator[_Entry]:
    """An AffineNet."""
    yield _Entry(f"{theirs}.0.weight", f"{ours}.first.conv.weight", (hidden, inputs, 3, 3))
    yield from _norm(f"{theirs}.0.actnorm", f"{ours}.first.norm", hidden)
    yield _Entry(f"{theirs}.2.weight", f"{ours}.second.conv.weight", (hidden, hidden, 1, 1))
    yield from _norm(f"{theirs}.2.actnorm", f"{ours}.second.norm", hidden)
    yield from _zeros(f"{theirs}.4", f"{ours}.last", hidden, 2 * outputs)


def _norm(theirs: str, ours: str, channels: int) -> Iterator[_Entry]:
    for leaf in ("bias", "logs"):
        yield _Entry(f"{theirs}.{leaf}", f"{ours}.{leaf}", (1, channels, 1, 1))


def _zeros(theirs: str, ours: str, inputs: int, outputs: int) -> Iterator[_Entry]:
    """A ConvZeros."""
    yield _Entry(f"{theirs}.weight", f"{ours}.conv.weight", (outputs, inputs, 3, 3))
    yield _Entry(f"{theirs}.bias", f"{ours}.conv.bias", (outputs,))
    yield _Entry(f"{theirs}.logs", f"{ours}.logs", (outputs, 1, 1))


def _shift(theirs: str, ours: str, channels: int) -> Iterator[_Entry]:
    yield _Entry(f"{theirs}mean_shift", f"{ours}.mean", (channels,))
    yield _Entry(f"{theirs}cov_shift", f"{ours}.factor", (channels, channels))


def _check(state: Mapping[str, Tensor], expected: Iterable[_Entry], unused: str) -> list[str]:
    """Compare names and shapes; the names of the tensors that match ``unused`` and are left over.

    Raises:
        ConversionError: something is missing, unknown or misshapen.
    """
    shapes = {entry.source: entry.shape for entry in expected}
    missing = [name for name in shapes if name not in state]
    misshapen = [
        f"{name} ({list(state[name].shape)} instead of {list(shape)})"
        for name, shape in shapes.items()
        if name in state and state[name].shape != shape
    ]
    rest = [name for name in state if name not in shapes]
    unknown = [name for name in rest if not re.fullmatch(unused, name)]
    found = {"missing": missing, "of another shape": misshapen, "unknown": unknown}
    if any(found.values()):
        problems = "; ".join(f"{what}: {_listed(names)}" for what, names in found.items() if names)
        raise ConversionError(f"the checkpoint's tensors do not fit the model. {problems}")
    return rest


def _permutation(name: str, matrix: Tensor) -> Tensor:
    """The index with (P A) = A[index], int64 [C], of a permutation matrix P."""
    index = matrix.argmax(1)
    identity = torch.eye(len(index), dtype=matrix.dtype, device=matrix.device)
    if len(index.unique()) != len(index) or not torch.equal(identity[index], matrix):
        raise ConversionError(f"{name} is not a permutation matrix")
    return index


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def _voted_size(state: Mapping[str, Tensor], pattern: str, axis: int, example: str) -> int:
    """The most frequent size along ``axis`` of the kernels whose names match ``pattern``.

    Raises:
        ConversionError: there are none; ``example`` is the one that the message names.
    """
    kernels = [t for name, t in state.items() if t.ndim == 4 and re.fullmatch(pattern, name)]
    if not kernels:
        raise ConversionError(f"{example} is missing")
    return _vote(kernel.shape[axis] for kernel in kernels)


def _vote(values: Iterable[int]) -> int:
    """The most frequent value; of equally frequent ones the largest."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
