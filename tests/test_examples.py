"""The examples: pairs in the training loops of other frameworks.

Each framework's interface is stood in for by a class that keeps what its ``feed_data`` keeps and
calls what its training and validation call, under the framework's own module names. BasicSR itself
is used where it can be imported.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clean_images import degrader, same, write
from torch import Tensor
from torch.utils.data import DataLoader

import deflow_aug
from deflow_aug import CleanCrops, DeFlowDegrader

FRAMEWORKS = Path(__file__).resolve().parents[1] / "examples" / "frameworks"
SCALE = 2


class Registry(dict[str, Any]):
    """``@REGISTRY.register()`` of BasicSR and its relatives."""

    def register(self, suffix: str | None = None) -> Callable[[Any], Any]:
        def add(one: Any) -> Any:
            assert one.__name__ not in self
            self[one.__name__] = one
            return one

        return add


class PairModel:
    """A model that trains on the pairs it is fed, as BasicSR's SRModel."""

    def __init__(self, opt: Any) -> None:
        self.opt, self.device = opt, torch.device("cpu")
        self.is_train = True

    def feed_data(self, data: dict[str, Any]) -> None:
        self.lq = data["lq"].to(self.device)
        if "gt" in data:
            self.gt = data["gt"].to(self.device)

    def nondist_validation(self, loader: Any, *rest: Any) -> None:
        for data in loader:
            self.feed_data(data)


class FlaggingModel(PairModel):
    """One that tells by ``is_train`` whether it validates, as neosr's and traiNNer-redux's."""

    def nondist_validation(self, loader: Any, *rest: Any) -> None:
        self.is_train = False
        super().nondist_validation(loader, *rest)
        self.is_train = True


class TwoStageModel(FlaggingModel):
    """One that degrades clean batches itself unless told otherwise, as Real-ESRGAN's."""

    def feed_data(self, data: dict[str, Any]) -> None:
        if self.is_train and self.opt.get("high_order_degradation", True):
            raise AssertionError("its own pipeline must not run")
        super().feed_data(data)
        self.gt_usm = self.gt


@pytest.fixture(autouse=True)
def small_weights(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tiny model in place of the weights; the names that were asked for."""
    asked: list[str] = []

    def from_pretrained(name: str, device: Any = "cpu") -> DeFlowDegrader:
        asked.append(name)
        return degrader().to(device)

    monkeypatch.setattr(deflow_aug.DeFlowDegrader, "from_pretrained", from_pretrained)
    return asked


@pytest.fixture
def framework(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Put modules in place of a framework's, and load an example that imports them."""

    def load(example: str, **modules: dict[str, Any]) -> Any:
        for name, content in modules.items():
            path = name.replace("__", ".")
            parts = path.split(".")
            for depth in range(1, len(parts) + 1):
                parent = ".".join(parts[:depth])
                if parent not in sys.modules:
                    monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
            for key, value in content.items():
                monkeypatch.setattr(sys.modules[path], key, value, raising=False)
        return load_example(example)

    return load


def load_example(example: str) -> Any:
    spec = importlib.util.spec_from_file_location(example, FRAMEWORKS / f"{example}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clean(tmp_path: Path) -> dict[str, Any]:
    """A training batch of clean images, and nothing else that a model needs."""
    write(tmp_path)
    batch: dict[str, Any] = next(iter(DataLoader(CleanCrops(tmp_path, 20, scale=SCALE), 3)))
    return batch


VALIDATION = {"lq": torch.full((1, 3, 9, 9), 0.25), "gt": torch.full((1, 3, 18, 18), 0.5)}


def check(model: Any, clean: dict[str, Any], side: int = 20) -> None:
    """Training batches are degraded, anew each time, with gt as it is; validation's are not."""
    expected = clean["gt"][..., :side, :side].float() / 255
    seen: list[Tensor] = []
    for _ in range(2):
        model.feed_data(dict(clean))
        assert torch.equal(model.gt, expected)
        assert model.lq.shape == (3, 3, side // SCALE, side // SCALE)
        seen.append(model.lq)
    assert not torch.equal(*seen)
    assert not model.lq.requires_grad
    # Training on it works: it is no tensor of inference mode.
    weight = torch.ones(1, requires_grad=True)
    (weight * model.lq).mean().backward()
    model.nondist_validation([VALIDATION], 1, None, False)
    assert same([model.lq, model.gt], [VALIDATION["lq"], VALIDATION["gt"]])
    model.feed_data(dict(clean))
    assert model.lq.shape == (3, 3, side // SCALE, side // SCALE)


def check_dataset(kind: Any, options: dict[str, Any], folder: Path) -> None:
    data = kind({"dataroot_gt": str(folder), "scale": SCALE, **options})
    assert data[0]["gt"].shape == (3, 16, 16)
    assert data[0]["gt_path"] == str(folder / "photo0.png")
    assert len({data[0]["gt"].numpy().tobytes() for _ in range(4)}) > 1  # its own draws each time


OPTIONS = {"scale": SCALE, "deflow": {"weights": "mine", "temperature": [0.9, 1.0]}}


def test_basicsr(
    framework: Any, clean: dict[str, Any], tmp_path: Path, small_weights: list[str]
) -> None:
    models, datasets = Registry(), Registry()
    example = framework(
        "basicsr_deflow_model",
        basicsr__models__sr_model={"SRModel": PairModel},
        basicsr__utils__registry={"MODEL_REGISTRY": models, "DATASET_REGISTRY": datasets},
    )
    assert models["DeFlowSRModel"] is example.DeFlowSRModel
    check(models["DeFlowSRModel"](OPTIONS), clean)
    check(models["DeFlowSRModel"]({"scale": SCALE}), clean)
    assert small_weights == ["mine", "camera-noise"]
    check_dataset(datasets["CleanImageDataset"], {"gt_size": 16}, tmp_path)


def test_real_esrgan(framework: Any, clean: dict[str, Any], small_weights: list[str]) -> None:
    models = Registry()
    framework(
        "realesrgan_deflow_model",
        realesrgan__models__realesrgan_model={"RealESRGANModel": TwoStageModel},
        basicsr__utils__registry={"MODEL_REGISTRY": models},
    )
    check(models["DeFlowRealESRGANModel"]({**OPTIONS, "gt_size": 16}), clean, side=16)
    assert small_weights == ["mine"]


def test_neosr(
    framework: Any, clean: dict[str, Any], tmp_path: Path, small_weights: list[str]
) -> None:
    models, datasets = Registry(), Registry()
    framework(
        "neosr_deflow_model",
        neosr__models__image={"image": FlaggingModel},
        neosr__utils__registry={"MODEL_REGISTRY": models, "DATASET_REGISTRY": datasets},
    )
    check(models["deflow"](OPTIONS), clean)
    # neosr makes the GPU torch's default device, where workers' data must not go. Another default,
    # which holds no data, shows that none does.
    with torch.device("meta"):
        check_dataset(datasets["clean"], {"patch_size": 8}, tmp_path)
    assert small_weights == ["mine"]


def test_trainner(
    framework: Any,
    clean: dict[str, Any],
    small_weights: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class SRModel(FlaggingModel):
        """traiNNer-redux's: its options are attributes."""

    example = framework("trainner_deflow", traiNNer__models__sr_model={"SRModel": SRModel})
    example.use("mine", temperature=(0.9, 1.0))
    check(SRModel(types.SimpleNamespace(scale=SCALE)), clean)
    assert small_weights == ["mine"]


def test_basicsr_itself(clean: dict[str, Any]) -> None:
    pytest.importorskip("basicsr", reason="BasicSR is not installed")
    example = load_example("basicsr_deflow_model")
    network = {"type": "SRVGGNetCompact", "num_feat": 4, "num_conv": 1, "upscale": SCALE}
    model = example.DeFlowSRModel(
        {
            **OPTIONS,
            "num_gpu": 0,
            "is_train": True,
            "dist": False,
            "rank": 0,
            "path": {},
            "network_g": network,
            "train": {
                "ema_decay": 0.9,
                "optim_g": {"type": "Adam", "lr": 1e-3},
                "scheduler": {"type": "MultiStepLR", "milestones": [10], "gamma": 0.5},
                "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
            },
        }
    )
    before = [parameter.clone() for parameter in model.net_g.parameters()]
    model.feed_data(dict(clean))
    model.optimize_parameters(1)
    assert not same(before, [*model.net_g.parameters()])
    assert model.lq.shape == (3, 3, 10, 10)
