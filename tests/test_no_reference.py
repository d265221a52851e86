"""NIQE, BRISQUE and PIQE: the wrapper around pyiqa, with a stand-in for it.

pyiqa needs a torchvision that fits torch, and NIQE and BRISQUE downloads, so that the tests of
every machine cannot have it; the last test runs where it is installed.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from importlib.util import find_spec
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from deflow_aug.evaluation import no_reference


def flat(level: int, side: int = 192) -> np.ndarray[Any, Any]:
    return np.full((side, side + 8, 3), level, np.uint8)


def stand_in(monkeypatch: pytest.MonkeyPatch, create: Any) -> None:
    module = types.ModuleType("pyiqa")
    module.__spec__ = importlib.machinery.ModuleSpec("pyiqa", None)
    module.create_metric = create  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyiqa", module)


def mean_level(metric: str, device: torch.device) -> Any:
    """A score that is the mean level, other for every metric, of what pyiqa's metrics take."""

    def score(images: Tensor) -> Tensor:
        assert images.shape == (1, 3, 192, 200)
        assert images.dtype == torch.float32
        assert 0 <= images.min() <= images.max() <= 1
        return images.mean((1, 2, 3)) * 255 + len(metric)

    return score


def test_scores_are_means_with_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, mean_level)
    table = no_reference.compare([flat(10), flat(30)], {"white": [flat(50)]})
    assert table is not None
    assert table.columns == ("", "NIQE", "95 %", "BRISQUE", "95 %", "PIQE", "95 %")
    real, white = table.rows
    # Standard error 10 of 10 and 30.
    assert real[:3] == ("real", "24.00", "4.40 to 43.60")
    assert real[3] == "27.00"
    assert white == ("white", "54.00", "-", "57.00", "-", "54.00", "-")


def test_a_score_that_cannot_be_made_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(metric: str, device: torch.device) -> Any:
        if metric != "piqe":
            raise URLError("no network")
        return mean_level(metric, device)

    stand_in(monkeypatch, offline)
    table = no_reference.compare([flat(10), flat(30)], {})
    assert table is not None
    assert table.columns == ("", "PIQE", "95 %")
    assert "NIQE is left out" in table.notes[1]
    assert "no network" in table.notes[1]


def test_without_any_score_the_table_is_empty_and_tells_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(metric: str, device: torch.device) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    stand_in(monkeypatch, broken)
    table = no_reference.compare([flat(10)], {})
    assert table is not None
    assert table.rows == ()
    assert sum("torchvision::nms" in note for note in table.notes) == 3


def test_without_pyiqa_there_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(no_reference, "find_spec", lambda name: None)
    assert no_reference.compare([flat(10)], {}) is None


def test_small_pictures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, mean_level)
    with pytest.raises(ValueError, match=r"got \(100, 108, 3\) among white"):
        no_reference.compare([flat(10)], {"white": [flat(10, side=100)]})


@pytest.mark.skipif(find_spec("pyiqa") is None, reason="pyiqa is not installed")
def test_the_real_piqe_scores_noise_worse() -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(60, 190, (12, 12, 3), np.uint8))
    clean = np.asarray(coarse.resize((240, 240), Image.Resampling.BICUBIC))
    # Without any noise it has no active block, which PIQE takes for the worst.
    little, much = (
        (clean + sigma * rng.standard_normal(clean.shape)).round().clip(0, 255).astype(np.uint8)
        for sigma in (5, 30)
    )
    table = no_reference.compare([little], {"noisy": [much]})
    assert table is not None
    column = table.columns.index("PIQE")
    assert float(table.rows[1][column]) > float(table.rows[0][column]) + 20
