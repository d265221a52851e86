"""benchmarks/degrading_cost.py: what is timed is what it says."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from clean_images import degrader
from torch import Tensor

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "degrading_cost.py"
TINY = ["--blocks", "1", "--channels", "4", "--growth", "2", "--batch", "2", "--patch", "16"]
GT = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 60 + 95).byte()


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("degrading_cost", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.DeFlowDegrader, "from_pretrained", lambda *_, **__: degrader())
    return module


def test_it_prints_a_row_for_every_way(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("kornia", reason="Kornia is not installed; the extra [test] brings it")
    seconds = benchmark.main([*TINY, "--device", "cpu", "--turns", "2", "--steps", "1"])
    assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())
    printed = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in printed.splitlines()[3:]] == [
        f"| {name}" for name in seconds
    ]
    assert len(seconds) == 6


def test_without_kornia_its_row_is_left_out(
    benchmark: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)
    seconds = benchmark.main([*TINY, "--device", "cpu", "--turns", "1", "--steps", "1"])
    assert not any("Kornia" in name for name in seconds)
    assert 'pip install "deflow-aug[kornia]"' in capsys.readouterr().out


def test_every_way_makes_pairs_of_its_kind(benchmark: Any) -> None:
    bicubic = benchmark.bicubic(GT.float() / 255)
    made = {}
    for name, way in benchmark.ways(degrader(), GT).items():
        pairs = list(way([GT, GT]))
        assert len(pairs) == 2
        for lq, gt in pairs:
            torch.testing.assert_close(gt, GT.float() / 255)
            assert lq.shape == (2, 3, 16, 16)
            assert 0 <= lq.min() < lq.max() <= 1
            assert not lq.requires_grad
        made[name] = [lq for lq, _ in pairs]
    for name in ("nothing", "bicubic downscaling"):
        assert torch.equal(torch.cat(made.pop(name)), torch.cat([bicubic, bicubic]))
    for lqs in made.values():  # random, and not bicubic downscaling alone
        assert not torch.equal(*lqs)
        assert (lqs[0] - bicubic).abs().mean() > 1e-3


def test_a_turn_times_as_many_steps_as_pairs_made(benchmark: Any) -> None:
    network = torch.nn.Upsample(scale_factor=4)
    network.weight = torch.nn.Parameter(torch.zeros(1))
    training = benchmark.Training(network, torch.device("cpu"))
    log: list[str] = []
    training.step = lambda lq, gt: log.append("step")

    def way(batches: Any) -> Any:
        for batch in batches:
            log.append("pair")
            yield batch, batch

    assert training.turn(way, GT, 3) > 0
    assert log == ["pair", *["step", "pair"] * 3, "pair"]


def test_a_step_trains_the_network(benchmark: Any) -> None:
    torch.manual_seed(0)
    network = benchmark.ESRGAN(4, 2, 1)
    training = benchmark.Training(network, torch.device("cpu"))
    gt = GT.float() / 255
    lq = benchmark.bicubic(gt)

    def loss() -> Tensor:
        with torch.no_grad():
            return (network(lq) - gt).abs().mean()

    before = loss()
    for _ in range(10):
        training.step(lq, gt)
    assert loss() < before


def test_the_network_is_the_published_one(benchmark: Any) -> None:
    with torch.device("meta"):
        network = benchmark.ESRGAN(64, 32, 23)
    # As many as the published files of ESRGAN hold.
    assert sum(weight.numel() for weight in network.parameters()) == 16_697_987


def test_shares_are_of_the_medians(benchmark: Any) -> None:
    seconds = {"nothing": [1.0, 0.8, 5.0], "other": [1.0, 1.25, 9.0]}
    assert statistics.median(seconds["nothing"]) == 1.0
    *_, nothing, other = benchmark.table(seconds).splitlines()
    assert nothing == "| nothing | 1000.0 (800.0 to 5000.0) | 1.000 | 0.0% |"
    assert other == "| other | 1250.0 (1000.0 to 9000.0) | 1.250 | 20.0% |"
