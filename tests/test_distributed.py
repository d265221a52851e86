"""Several processes are one: two of them, on the CPU, by PyTorch's own launcher and gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from run_by_launcher import BOTH, MIXED, train, write
from safetensors.torch import load_file

from deflow_aug.training.loop import Progress
from deflow_aug.training.recipe import Recipe


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes have written to."""
    folder = tmp_path_factory.mktemp("launched")
    train(folder, folder / "none", MIXED)  # writes the data
    train(folder, folder / "none", BOTH, True)
    tests = Path(__file__).parent
    done = subprocess.run(
        # Standalone: it finds a free port.
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tests / "run_by_launcher.py"), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=tests.parent, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def result(folder: Path, name: str, rank: int) -> tuple[dict[str, torch.Tensor], list[Any]]:
    log = json.loads((folder / f"{name}-{rank}.json").read_text())
    return load_file(folder / f"{name}-{rank}.safetensors"), log


@pytest.mark.parametrize(
    ("name", "settings", "pairs"), [("mixed", MIXED, False), ("both", BOTH, True)]
)
def test_two_processes_train_as_one_does(
    launched: Path, tmp_path: Path, name: str, settings: Recipe, pairs: bool
) -> None:
    """Losses, gradient norms and weights to the rounding of float32; mixed domains, pairs."""
    log: list[Progress] = []
    run = train(launched, tmp_path / "run", settings, pairs)
    run.run(log.append)
    write(tmp_path, name, run, log)
    one, told = result(tmp_path, name, 0)
    two, told_by_two = result(launched, name, 0)
    for entry, other in zip(told, told_by_two, strict=True):
        assert entry["step"] == other["step"]
        assert other["bits"] == pytest.approx(entry["bits"], rel=1e-5)
        assert other["gradient_norm"] == pytest.approx(entry["gradient_norm"], rel=1e-4)
    assert set(told[0]["bits"]) == {"clean", "low", "vintage"} | ({"low|clean"} if pairs else set())
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=5e-6, msg=key)
    assert (run.recipe.model.statistics is not None) == pairs


@pytest.mark.parametrize("name", ["mixed", "both", "spoiled"])
def test_all_processes_have_the_same(launched: Path, name: str) -> None:
    """Bit by bit, and tell the same."""
    (one, told), (two, also) = (result(launched, name, rank) for rank in range(2))
    assert all(torch.equal(two[key], tensor) for key, tensor in one.items())
    keys = ("step", "bits", "gradient_norm", "lr", "skipped")
    for entry, other in zip(told, also, strict=True):
        assert [repr(entry[key]) for key in keys] == [repr(other[key]) for key in keys]


def test_the_main_process_alone_writes(launched: Path) -> None:
    lines = (launched / "mixed" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 7))


def test_what_happens_to_one_happens_to_all(launched: Path) -> None:
    """A loss that is not finite in the second process, and a signal that only it received."""
    for rank in range(2):
        _, log = result(launched, "spoiled", rank)
        assert [entry["skipped"] for entry in log] == [0, 0, 1, 1, 1]


def test_a_batch_that_cannot_be_shared_out_is_refused(launched: Path) -> None:
    for rank in range(2):
        assert "2 processes must divide" in (launched / f"error-{rank}.txt").read_text()
