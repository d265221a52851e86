"""Published checkpoints: parity with the released code's outputs, and what is refused."""

from __future__ import annotations

import gzip
import json
import math
import os
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_weights import tensor_for
from torch import Tensor

from deflow_aug.cli import main
from deflow_aug.conditioning import ConditioningNetwork, domain_invariant
from deflow_aug.config import ChannelStatistics, ConfigError, EncoderConfig, ModelConfig
from deflow_aug.convert import (
    ConversionError,
    Converted,
    convert_published,
    encoder_weights,
    load_checkpoint,
    published_statistics,
)
from deflow_aug.degrader import DeFlowDegrader
from deflow_aug.model import DeFlow

REFERENCE = Path(__file__).parent / "data" / "reference"

MAP_NAMES = {4.0: "fea_up4", 2.0: "fea_up2", 1.0: "fea_up1", 0.5: "fea_up0"}
"""What the released code calls the conditioning map of that many times the size of h(x)."""

FLOW = "flowUpsamplerNet.layers"


# ---- parity with the released code


@dataclass
class Case:
    """A published architecture with test weights, and what the released code made of them."""

    published: dict[str, Tensor]
    converted: Converted
    model: DeFlow
    reference: dict[str, Tensor]


variants = pytest.mark.parametrize("case", ["x4", "x8"], indirect=True)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    with gzip.open(REFERENCE / "state_shapes.json.gz") as file:
        shapes = json.load(file)[request.param]
    published = {n: torch.from_numpy(np.asarray(tensor_for(n, s))) for n, s in shapes.items()}
    converted = convert_published(published)
    model = DeFlow(converted.config)
    model.load_state_dict(converted.state)
    files = [np.load(REFERENCE / name) for name in ("inputs.npz", f"{request.param}.npz")]
    reference = {name: torch.from_numpy(file[name]) for file in files for name in file}
    return Case(published, converted, model, reference)


def outputs(model: DeFlow, reference: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Our version of all that the reference holds."""
    model = model.to(dtype)
    image, *noise = (reference[name].to(dtype) for name in ("hr", "noise0", "noise1"))
    result = {"lr": domain_invariant(image, model.config.scale)}
    with torch.no_grad():
        maps = [map_.dense() for map_ in model.conditioning(result["lr"])]
        for factor, feature in zip(model.conditioning.factors, maps, strict=True):
            result[f"{MAP_NAMES[factor]}_sum"] = feature.sum((2, 3))
            result[f"{MAP_NAMES[factor]}_patch"] = feature[:, :, :4, :4]
        features = model.features(image)
        latents, _ = model.encode(image, features)
        result["z0"], result["z1"] = latents
        result["decoded"] = model.decode(latents, features)
        for temperature, name in ((1.0, "degraded_t1"), (0.5, "degraded_t05")):
            tau = torch.tensor([temperature], dtype=dtype)
            degraded = model.degrade(latents, noise, ["degraded"], tau)
            result[name] = model.decode(degraded, features)
        restored = model.restore(latents, None, ["degraded"])
        result["restored_mean"] = model.decode(restored, features)
        for domain, name in (("clean", "nll_x"), ("degraded", "nll_y")):
            # theirs: bits per pixel position, without the constant of the dequantisation
            nats = model.log_prob(image, [domain], features)
            result[name] = -nats / (image.shape[2] * image.shape[3] * math.log(2))
    return result


def tolerance(name: str) -> float:
    """Allowed deviation, relative to the quantity's largest value."""
    if name.startswith(("fea", "lr", "nll")):
        return 1e-5
    return 1e-4 if name.startswith("z") else 1e-3


def deviations(case: Case, ours: dict[str, Tensor]) -> dict[str, float]:
    """Of every quantity, relative to its largest value."""
    assert set(ours) == set(case.reference) - {"hr", "noise0", "noise1"}
    result = {}
    for name, value in ours.items():
        expected = case.reference[name].to(value.dtype)
        assert value.shape == expected.shape, name
        result[name] = float((value - expected).abs().max() / expected.abs().max())
    return result


@variants
def test_parity(case: Case) -> None:
    found = deviations(case, outputs(case.model, case.reference, torch.float32))
    assert all(d < tolerance(name) for name, d in found.items()), found


@pytest.mark.parametrize("case", ["x4"], indirect=True)
def test_in_float64_what_remains_is_the_rounding_of_the_reference(case: Case) -> None:
    ours = outputs(case.model, case.reference, torch.float64)
    found = deviations(case, ours)
    assert all(d < tolerance(name) for name, d in found.items()), found
    image = case.reference["hr"]
    assert float((ours["decoded"] - image).abs().max()) < 1e-11
    assert float((case.reference["decoded"] - image).abs().max()) > 1e-5


@variants
def test_published_architectures(case: Case) -> None:
    scale = case.converted.config.scale
    hidden = {4: 64, 8: 128}[scale]
    assert case.converted.config == ModelConfig(
        scale=scale, hidden=hidden, dequantization_steps=32, shift_init=0.0
    )
    unused = f"upconv{scale.bit_length() - 1}"
    layers = [unused, "HRconv", "conv_last"]
    assert sorted(case.converted.dropped) == sorted(
        ["I", f"{FLOW}.19.I", "flowUpsamplerNet.f.0.weight", "flowUpsamplerNet.f.0.bias"]
        + [f"RRDB.{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")]
    )


@pytest.mark.parametrize("case", ["x4"], indirect=True)
def test_a_model_of_scale_2_needs_to_be_told(case: Case) -> None:
    config = convert_published(case.published, scale=2).config
    assert config == replace(case.converted.config, scale=2)


@pytest.mark.parametrize("case", ["x4"], indirect=True)
def test_a_strange_upsampling_convolution_decides_nothing(case: Case) -> None:
    """Unused as all of them are; by its number 2^99999999 would be the scale."""
    strange = "RRDB.upconv99999999.weight"
    published = {name: one for name, one in case.published.items() if "upconv2" not in name}
    converted = convert_published({**published, strange: torch.ones(1)})
    assert converted.config == case.converted.config
    assert strange in converted.dropped


# ---- small models, exported in the published naming


def small(**settings: object) -> ModelConfig:
    defaults: dict[str, object] = {
        "levels": 2,
        "steps": 2,
        "hidden": 6,
        "encoder": EncoderConfig(8, 4, 2, (0, 1)),
        "dequantization_steps": 32,
        "shift_init": 0.0,
    }
    return ModelConfig(**{**defaults, **settings})  # type: ignore[arg-type]


def randomized(config: ModelConfig) -> DeFlow:
    torch.manual_seed(0)
    model = DeFlow(config)
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, std=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("initialized"):
            buffer.fill_(True)
    return model


def export_layer(name: str, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A transition or flow step of ours, as the released code names and shapes its tensors."""

    def norm(theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
        for leaf in ("bias", "logs"):
            yield f"{theirs}.{leaf}", state[f"{ours}.{leaf}"].reshape(1, -1, 1, 1)

    yield from norm(f"{name}.actnorm", "0.affine")
    permutation = state["1.permutation"]
    yield f"{name}.invconv.p", torch.eye(len(permutation))[permutation]
    for theirs, ours in {"l": "lower", "u": "upper", "sign_s": "sign", "log_s": "log_s"}.items():
        yield f"{name}.invconv.{theirs}", state[f"1.{ours}"]
    for number, part in ((2, "affine.fAffine"), (3, "affine.fFeatures")):
        if f"{number}.net.last.logs" not in state:
            continue
        for index, conv in ((0, "first"), (2, "second")):
            yield f"{name}.{part}.{index}.weight", state[f"{number}.net.{conv}.conv.weight"]
            yield from norm(f"{name}.{part}.{index}.actnorm", f"{number}.net.{conv}.norm")
        yield f"{name}.{part}.4.weight", state[f"{number}.net.last.conv.weight"]
        yield f"{name}.{part}.4.bias", state[f"{number}.net.last.conv.bias"]
        yield f"{name}.{part}.4.logs", state[f"{number}.net.last.logs"].reshape(-1, 1, 1)


def export_shift(prefix: str, shift: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    state = shift.state_dict()
    yield f"{prefix}mean_shift", state["mean"][0]
    yield f"{prefix}cov_shift", state["factor"][0]
    yield f"{prefix}I", torch.eye(len(state["mean"][0]))


def export_encoder(network: ConditioningNetwork, name: Callable[[str], str]) -> dict[str, Tensor]:
    """All tensors of the network; ``name`` makes a layer's published name of ours."""
    result = {}
    for key, value in network.state_dict().items():
        layer, leaf = key.rsplit(".", 1)
        result[f"{name(layer)}.{leaf}"] = value
    return result


def esrgan(layer: str) -> str:
    if layer.startswith("upconvs"):
        return f"upconv{int(layer[-1]) + 1}"
    if match := re.fullmatch(r"trunk\.body\.(\d+)\.blocks\.(\d)\.convs\.(\d)", layer):
        return f"RRDB_trunk.{match[1]}.RDB{int(match[2]) + 1}.conv{int(match[3]) + 1}"
    return {"trunk.conv_first": "conv_first", "trunk.conv_body": "trunk_conv"}[layer]


def basicsr(layer: str) -> str:
    name = esrgan(layer).replace("upconv", "conv_up").replace("RRDB_trunk", "body")
    return name.replace("RDB", "rdb").replace("trunk_conv", "conv_body")


def first_release(layer: str) -> str:
    if layer.startswith("upconvs"):
        return f"model.{3 * int(layer[-1]) + 3}"
    if match := re.fullmatch(r"RRDB_trunk\.(\d+\.RDB\d\.conv\d)", esrgan(layer)):
        return f"model.1.sub.{match[1]}.0"
    return {"trunk.conv_first": "model.0", "trunk.conv_body": "model.1.sub.2"}[layer]


def export(model: DeFlow) -> dict[str, Tensor]:
    """The state of a model as the released code would save it."""
    config = model.config
    result = dict(export_shift("", model.shifts[-1]))
    encoder = export_encoder(model.conditioning, esrgan)
    width = config.encoder.channels
    kernel, bias = torch.zeros(width, width, 3, 3), torch.zeros(width)
    for i in range(max(2, int(math.log2(config.scale)))):  # the released code has at least two
        name = f"upconv{i + 1}"
        encoder.setdefault(f"{name}.weight", kernel)
        encoder.setdefault(f"{name}.bias", bias)
    encoder["conv_last.weight"] = kernel[:3]
    result.update({f"RRDB.{name}": tensor for name, tensor in encoder.items()})
    number, split = 0, 0
    for level, chain in enumerate(model.flow.levels, start=1):
        number += 1  # the squeeze
        for layer in list(chain.layers)[1:]:
            state = {k.removeprefix("layers."): v for k, v in layer.state_dict().items()}
            result.update(export_layer(f"{FLOW}.{number}", state))
            number += 1
        if level in (config.split_levels or ()):
            prior = model.flow.splits[str(level)].prior
            result.update(export_shift(f"{FLOW}.{number}.", model.shifts[split]))
            result[f"{FLOW}.{number}.conv.weight"] = prior.conv.weight.detach()
            result[f"{FLOW}.{number}.conv.bias"] = prior.conv.bias.detach()
            result[f"{FLOW}.{number}.conv.logs"] = prior.logs.detach().reshape(-1, 1, 1)
            number, split = number + 1, split + 1
    return result


@pytest.fixture
def published() -> dict[str, Tensor]:
    """The published state of a model of three levels with a split after the first."""
    return export(randomized(small(levels=3)))


@pytest.mark.parametrize(
    "config",
    [
        small(),
        small(levels=1, steps=1, scale=8),
        small(levels=3, steps=1, transition_steps=0, scale=16),
        small(levels=4, steps=3, transition_steps=1),
        small(levels=3, split_levels=()),
        small(levels=3, split_levels=(2,)),
        small(levels=3, split_levels=(1, 2), hidden=12),
        small(encoder=EncoderConfig(4, 2, 1, ())),
        small(encoder=EncoderConfig(4, 6, 3, (0, 1, 2))),
    ],
    ids=lambda c: f"L{c.levels}K{c.steps}T{c.transition_steps}s{c.scale}{c.split_levels}",
)
def test_other_architectures_are_read_off_the_tensors(config: ModelConfig) -> None:
    model = randomized(config)
    converted = convert_published(export(model))
    assert converted.config == config
    state = model.state_dict()
    assert set(converted.state) == set(state)
    for name, tensor in converted.state.items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name


def test_what_the_tensors_do_not_tell_is_asked_for() -> None:
    config = small(scale=2, encoder=EncoderConfig(8, 4, 3, (0, 2)))
    published = export(randomized(config))
    with pytest.raises(
        ConversionError, match=r"24 feature channels.*3 blocks of 8.*stacked_blocks"
    ):
        convert_published(published, scale=2)
    assert convert_published(published, scale=2, stacked_blocks=(0, 2)).config == config
    with pytest.raises(ConversionError, match="24 feature channels, but 8 channels with 1"):
        convert_published(published, stacked_blocks=(0,))
    with pytest.raises(ConfigError, match="block 3"):
        convert_published(published, stacked_blocks=(0, 3))
    with pytest.raises(ConfigError, match="power of two"):
        convert_published(published, scale=3, stacked_blocks=(0, 2))


def test_half_precision_becomes_float32(published: dict[str, Tensor]) -> None:
    state = convert_published({n: t.half() for n, t in published.items()}).state
    assert {t.dtype for t in state.values()} == {torch.float32, torch.int64, torch.bool}


@pytest.mark.parametrize(
    "name",
    [
        "mean_shift",
        "RRDB.conv_first.weight",
        "RRDB.RRDB_trunk.0.RDB1.conv1.weight",
        "RRDB.RRDB_trunk.1.RDB3.conv5.weight",
        "RRDB.trunk_conv.bias",
        "RRDB.upconv1.weight",
        f"{FLOW}.1.actnorm.bias",
        f"{FLOW}.4.actnorm.bias",
        f"{FLOW}.2.invconv.p",
        f"{FLOW}.3.affine.fAffine.0.weight",
        f"{FLOW}.3.affine.fFeatures.0.weight",
        f"{FLOW}.5.conv.weight",
        f"{FLOW}.5.cov_shift",
        f"{FLOW}.15.affine.fFeatures.4.logs",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "of another shape"])
def test_a_tensor_missing_or_misshapen_is_named(
    published: dict[str, Tensor], name: str, damage: str
) -> None:
    tensor = published.pop(name)
    if damage == "of another shape":
        published[name] = torch.cat([tensor, tensor], int(tensor.ndim > 1))
    with pytest.raises(ConversionError, match=rf"{damage}: {re.escape(name)}( |$)"):
        convert_published(published)


@pytest.mark.parametrize("number", [1, 3, 4, 5, 9, 15])
def test_a_whole_layer_missing_is_named(published: dict[str, Tensor], number: int) -> None:
    layer = f"{FLOW}.{number}."
    left = {name: tensor for name, tensor in published.items() if not name.startswith(layer)}
    with pytest.raises(ConversionError, match=f"missing: {re.escape(layer)}"):
        convert_published(left)


@pytest.mark.parametrize(
    "name",
    ["normalize.mean", f"{FLOW}.3.affine.fAffine.6.weight", f"{FLOW}.99.conv.bias", "RRDB.extra"],
)
def test_an_unknown_tensor_is_named(published: dict[str, Tensor], name: str) -> None:
    published[name] = torch.zeros(3)
    with pytest.raises(ConversionError, match=f"unknown: {re.escape(name)}$"):
        convert_published(published)


def test_a_long_list_of_problems_is_cut_short(published: dict[str, Tensor]) -> None:
    left = {name: tensor for name, tensor in published.items() if "RDB2" not in name}
    with pytest.raises(ConversionError, match=r"RDB2\.conv1\.weight, .* and 15 more$"):
        convert_published(left)


def test_values_that_no_checkpoint_has_are_named(published: dict[str, Tensor]) -> None:
    matrix, sign = f"{FLOW}.1.invconv.p", f"{FLOW}.2.invconv.sign_s"
    good = published[matrix]
    for bad in (good[[0, *range(11)]], 2 * good, good + 0.1):
        with pytest.raises(ConversionError, match=f"{re.escape(matrix)} is not a permutation"):
            convert_published({**published, matrix: bad})
    with pytest.raises(ConversionError, match=re.escape(sign)):
        convert_published({**published, sign: torch.zeros(12)})


def test_rrdb_weights_are_no_deflow_model(published: dict[str, Tensor]) -> None:
    rrdb = {name: tensor for name, tensor in published.items() if name.startswith("RRDB.")}
    for state in (rrdb, {}):
        with pytest.raises(ConversionError, match="no DeFlow model"):
            convert_published(state)


# ---- files


def test_checkpoint_files(tmp_path: Path) -> None:
    state = {"a.weight": torch.arange(3.0), "module_x": torch.ones(2)}
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    older = {name: torch.zeros(1) for name in state}
    contents = [
        state,
        prefixed,
        {"state_dict": state, "epoch": 3},
        {"params": prefixed},
        {"params": older, "params_ema": state},
    ]
    for content in contents:
        torch.save(content, tmp_path / "w.pth")
        loaded = load_checkpoint(tmp_path / "w.pth")
        assert list(loaded) == list(state)
        assert all(torch.equal(loaded[name], state[name]) for name in state)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert list(load_checkpoint(str(tmp_path / "old.pth"))) == list(state)


def test_published_file_with_prefixes(tmp_path: Path, published: dict[str, Tensor]) -> None:
    torch.save({f"module.{n}": t for n, t in published.items()}, tmp_path / "w.pth")
    state = convert_published(load_checkpoint(tmp_path / "w.pth")).state
    expected = convert_published(published).state
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([torch.ones(2)], "holds no tensors by name .* list"),
        (torch.ones(2), "holds no tensors by name .* Tensor"),
        ({}, "holds no tensors by name .* nothing"),
        ({"params": {}}, "holds no tensors by name .* nothing"),
        ({"epoch": 3, "a": torch.ones(1)}, "'epoch' is of type int"),
        ({3: torch.ones(1)}, "not a state dict: 3"),
        ({"a": torch.ones(1), "module.a": torch.ones(1)}, "has a twice"),
    ],
    ids=["list", "tensor", "empty", "empty-inside", "number", "unnamed", "twice"],
)
def test_files_that_hold_something_else(tmp_path: Path, content: object, problem: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ConversionError, match=problem) as caught:
        load_checkpoint(tmp_path / "w.pth")
    assert "w.pth" in str(caught.value)


class RunsCode:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, ("ran",)


def test_files_with_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1), "b": RunsCode()}, "new.pth")
    torch.save({"b": RunsCode()}, "old.pth", _use_new_zipfile_serialization=False)
    Path("bare.pth").write_bytes(pickle.dumps({"b": RunsCode()}, protocol=2))
    for name in ("new.pth", "old.pth", "bare.pth"):
        with pytest.raises(ConversionError, match=f"{name} is not a PyTorch file of plain weights"):
            load_checkpoint(name)
    assert not Path("ran").exists()
    pickle.loads(Path("bare.pth").read_bytes())  # it would have run
    assert Path("ran").exists()


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(1000)}, path)
    whole = path.read_bytes()
    noise = np.random.default_rng(0).bytes(3000)
    for content in (whole[:2000], b"", b"<html>404</html>", noise, b"PK\x03\x04" + noise):
        path.write_bytes(content)
        with pytest.raises(ConversionError, match="not a PyTorch file"):
            load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "absent.pth")


def test_a_file_whose_bytes_were_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.full((1000,), 0.25)}, path)
    whole = path.read_bytes()
    place = whole.index(np.full(10, 0.25, np.float32).tobytes()) + 400
    path.write_bytes(whole[:place] + b"\x01" + whole[place + 1 :])
    with pytest.raises(ConversionError, match=r"w\.pth is damaged: .*CRC-32"):
        load_checkpoint(path)
    path.write_bytes(whole)
    assert torch.equal(load_checkpoint(path)["a"], torch.full((1000,), 0.25))


# ---- RRDB weights

SCHEMES = {
    "esrgan": (esrgan, ("HRconv", "conv_last", "upconv2")),
    "basicsr": (basicsr, ("conv_hr", "conv_last", "conv_up2")),
    "first-release": (first_release, ("model.8", "model.10", "model.6")),
}


@pytest.mark.parametrize(("naming", "unused"), SCHEMES.values(), ids=SCHEMES)
def test_rrdb_weights_start_the_conditioning_network(
    naming: Callable[[str], str], unused: tuple[str, ...]
) -> None:
    config = small(scale=4)
    network = randomized(config).conditioning
    state = export_encoder(network, naming)
    for layer in unused:
        state |= {f"{layer}.weight": torch.zeros(8, 8, 3, 3), f"{layer}.bias": torch.zeros(8)}
    loaded = encoder_weights(state, config)
    ConditioningNetwork(config).load_state_dict(loaded, strict=True)
    assert all(torch.equal(loaded[n], tensor) for n, tensor in network.state_dict().items())

    for layer in ("trunk.conv_first", "trunk.body.1.blocks.2.convs.4", "upconvs.0"):
        name = f"{naming(layer)}.weight"
        less = {n: t for n, t in state.items() if n != name}
        with pytest.raises(ConversionError, match=f"missing: {re.escape(name)}$"):
            encoder_weights(less, config)
    with pytest.raises(ConversionError, match=r"unknown: attention\.weight$"):
        encoder_weights({**state, "attention.weight": torch.ones(1)}, config)


def test_rrdb_weights_of_another_architecture() -> None:
    config = small()
    state = export_encoder(randomized(config).conditioning, esrgan)
    deeper = replace(config, encoder=EncoderConfig(8, 4, 3, ()))
    with pytest.raises(ConversionError, match=r"have 2 blocks .* encoder\.blocks is 3"):
        encoder_weights(state, deeper)
    wider = replace(config, encoder=EncoderConfig(16, 4, 2, ()))
    shapes = re.escape("conv_first.weight ([8, 3, 3, 3] instead of [16, 3, 3, 3])")
    with pytest.raises(ConversionError, match=f"of another shape: {shapes}"):
        encoder_weights(state, wider)
    with pytest.raises(ConversionError, match=r"missing: upconv2\.weight, upconv2\.bias"):
        encoder_weights(state, replace(config, scale=8))
    with pytest.raises(ConversionError, match=r"not RRDB weights.* features\.0\.weight"):
        encoder_weights({"features.0.weight": torch.ones(1)}, config)


# ---- channel statistics

STATISTICS = ChannelStatistics(
    (102 / 255, 0.5, 0.4), (51 / 255, 0.3, 0.25), (0.4, 0.2, 0.6), (0.1, 0.25, 0.3)
)
PUBLISHED_YAML = """\
# as published: more than we need, an anchor, flow and block lists
name: &run AIM
path: {log: *run}
datasets:
  train:
    GT_size: 160
    normalize:
      std_clean_lr: [1, 1, 1]
      mean_clean_hr: [102, 127.5, 102.0]
      std_clean_hr: [51.0, 76.5, 63.75]
      mean_noisy_hr:
        - 102.0
        - 51.0
        - 153.0
      std_noisy_hr: [25.5, 63.75, 76.5]
"""


def yaml_file(folder: Path, text: str = PUBLISHED_YAML) -> Path:
    path = folder / "published.yml"
    path.write_text(text)
    return path


def test_statistics_of_a_published_file(tmp_path: Path) -> None:
    found = published_statistics(yaml_file(tmp_path))
    assert found == published_statistics(str(tmp_path / "published.yml"))
    for name in ("clean_mean", "clean_std", "degraded_mean", "degraded_std"):
        assert getattr(found, name) == pytest.approx(getattr(STATISTICS, name)), name


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (PUBLISHED_YAML, "", "no channel statistics: datasets is missing"),
        (PUBLISHED_YAML, "- 3", "no channel statistics: datasets is missing"),
        (PUBLISHED_YAML, "datasets: 3", r"datasets\.train is missing"),
        ("normalize:", "normalise:", r"datasets\.train\.normalize is missing.*need none"),
        ("mean_clean_hr", "mean", r"normalize\.mean_clean_hr must be .* got nothing"),
        ("25.5, 63.75, 76.5", "25.5, 63.75", r"std_noisy_hr must be .* got \[25\.5, 63\.75\]"),
        ("25.5, 63.75, 76.5", "a, b, c", r"std_noisy_hr must be .* got \['a', 'b', 'c'\]"),
        ("[25.5, 63.75, 76.5]", "25.5", r"std_noisy_hr must be .* got 25\.5"),
        ("25.5, 63.75, 76.5", "0, 1, 1", "degraded_std must be above 0 to 1, got 0"),
        ("[102, 127.5", "[256, 127.5", "clean_mean must be from 0 to 1, got 1.0"),
        ("[51.0", "[51.0]]", "not a YAML file of plain values: .*line 8"),
        ("GT_size: 160", "GT_size: !!python/name:os.system", "plain values: .*python/name"),
        ("GT_size: 160", "GT_size: !size 160", "plain values: .*!size"),
        ("GT_size: 160", "GT_size: *nobody", "plain values: .*nobody"),
    ],
)
def test_files_without_usable_statistics(tmp_path: Path, old: str, new: str, problem: str) -> None:
    path = yaml_file(tmp_path, PUBLISHED_YAML.replace(old, new))
    with pytest.raises(ConversionError, match=problem) as caught:
        published_statistics(path)
    assert "published.yml" in str(caught.value)


def test_binary_and_absent_files_have_no_statistics(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(np.random.default_rng(0).bytes(300))
    with pytest.raises(ConversionError, match=r"w\.pth is not a YAML file"):
        published_statistics(tmp_path / "w.pth")
    with pytest.raises(FileNotFoundError):
        published_statistics(tmp_path / "absent.yml")


# ---- on the command line


def checkpoint(folder: Path, config: ModelConfig, factor: float) -> Path:
    """A published file of gentle weights, whose M is ``factor`` times what is random."""
    model = randomized(config)
    for name, parameter in model.named_parameters():
        parameter.data *= factor if name.endswith(".factor") else 0.3
    torch.save(export(model), folder / "published.pth")
    return folder / "published.pth"


X8 = small(scale=8, levels=3)


def test_results_of_a_converted_model_get_its_statistics(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, X8, 0.1)
    convert = ["convert", str(file)]
    flags: list[str] = []
    for name in ("clean_mean", "clean_std", "degraded_mean", "degraded_std"):
        flags += [f"--{name}", *map(str, getattr(STATISTICS, name))]
    assert main([*convert, f"--output={tmp_path / 'plain'}"]) == 0
    yaml = f"--statistics={yaml_file(tmp_path)}"
    assert main([*convert, f"--output={tmp_path / 'yaml'}", yaml]) == 0
    assert main([*convert, f"--output={tmp_path / 'flags'}", *flags]) == 0
    config = json.loads((tmp_path / "flags" / "config.json").read_text())
    assert config["model"]["statistics"]["degraded"]["degraded_mean"] == [0.4, 0.2, 0.6]

    plain, by_yaml, by_flags = (
        DeFlowDegrader.from_pretrained(tmp_path / name, device="cpu", dequantize=True)
        for name in ("plain", "yaml", "flags")
    )
    assert plain.model.config == X8
    assert by_flags.model.config == replace(X8, statistics={"degraded": STATISTICS})
    image = 0.4 + 0.2 * torch.rand(2, 3, 13, 16, generator=torch.Generator().manual_seed(0))
    mean, std, to_mean, to_std = (
        torch.tensor(getattr(STATISTICS, name))[:, None, None]
        for name in ("clean_mean", "clean_std", "degraded_mean", "degraded_std")
    )
    for temperature in (0.0, 0.5, [1.0, 0.3]):
        decoded = plain.degrade(image, temperature, 2, seed=[1, 2])
        assert 0 < decoded.min() < decoded.max() < 1  # what is clamped does not tell
        expected = ((decoded - mean) / std * to_std + to_mean).clamp(0, 1)
        assert by_flags.degrade(image, temperature, 2, seed=[1, 2]).equal(expected)
        close = by_yaml.degrade(image, temperature, 2, seed=[1, 2])
        torch.testing.assert_close(close, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--statistics={yaml}", "--clean_mean", "0", "0", "0"], "not both"),
        (["--clean_mean", "0", "0", "0"], "missing: --clean_std, --degraded_mean, --degraded_std"),
        (["--statistics={none}"], "none.yml"),
        (["--statistics={pth}"], "not a YAML file"),
    ],
)
def test_statistics_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], problem: str
) -> None:
    file = checkpoint(tmp_path, X8, 0.0)
    places = {"yaml": yaml_file(tmp_path), "none": tmp_path / "none.yml", "pth": file}
    words = [word.format(**places) for word in more]
    assert main(["convert", str(file), f"--output={tmp_path / 'w'}", *words]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("factor", "note", "warned"),
    [
        (0.0, "Its M is zero: .*dequantize", True),
        (1e-3, "Its M is nearly zero .*Sigma.*dequantize", True),
        (1.0, r"Its M is not zero .*Sigma = M M\^T in each latent: 0\.\d+, ", False),
    ],
)
def test_the_card_and_info_tell_of_this_m(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    factor: float,
    note: str,
    warned: bool,
) -> None:
    file = checkpoint(tmp_path, X8, factor)
    assert main(["convert", str(file), f"--output={tmp_path / 'w'}"]) == 0
    assert re.search(note, (tmp_path / "w" / "README.md").read_text())
    capsys.readouterr()
    assert main(["info", str(tmp_path / "w")]) == 0
    told = capsys.readouterr().out
    warning = told.partition("warning: ")[2]
    assert bool(warning) == warned
    assert told.count("; collapsed") == 2 * warned
    if warned:
        words = ("dequantisation noise", "--dequantize", "dequantize=True", "train --from")
        assert all(word in warning for word in words)
