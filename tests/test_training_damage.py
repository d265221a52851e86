"""Checkpoints that are damaged, and data that have changed: what a run goes on with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import MODEL, assert_same_weights, ignore, recipe, trainer, unpaired, write_noise

from deflow_aug.data.unpaired import CropFolder, UnpairedBatches
from deflow_aug.training import checkpoints
from deflow_aug.training.checkpoints import BEST, Checkpoint, CheckpointError
from deflow_aug.training.feed import Feed


@pytest.fixture
def batches(tmp_path: Path) -> UnpairedBatches:
    return unpaired(tmp_path / "data")


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flip_a_bit(path: Path, at: int) -> None:
    """Of a file's contents, on a disk of its own: not in other names of the same file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.unlink()
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("where", ["a tensor", "the state"])
def test_a_flipped_bit_is_noticed(tmp_path: Path, where: str) -> None:
    """Which safetensors knows nothing of: a weight, or a number, that is another one."""
    saved = Checkpoint(7, {"a": torch.arange(3.0)}, {"lr": 0.1}, {"best": [123456, 0.5]})
    path = checkpoints.save(tmp_path, saved)
    at = len(path.read_bytes()) - 8 if where == "a tensor" else path.read_bytes().index(b"123456")
    flip_a_bit(path, at)
    with pytest.raises(checkpoints.DamagedError, match="checksum"):
        checkpoints.load(path)


def test_a_flipped_bit_sends_a_run_to_the_checkpoint_before(
    batches: UnpairedBatches, tmp_path: Path
) -> None:
    trainer(batches, tmp_path / "run").run(ignore)
    newest = checkpoints.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    flip_a_bit(newest, newest.stat().st_size - 50)
    with pytest.warns(UserWarning, match=r"checksum.*set aside as step-00000008\.damaged"):
        assert trainer(batches, tmp_path / "run").step == 6


@pytest.mark.filterwarnings("ignore:.*set aside")
def test_the_best_one_is_gone_on_from_if_all_others_are_damaged(
    batches: UnpairedBatches, tmp_path: Path
) -> None:
    whole = trainer(batches, tmp_path / "run")
    whole.run(ignore)
    folder = tmp_path / "run" / "checkpoints"
    best = checkpoints.load(folder / BEST)
    for step in checkpoints.steps(folder):
        path = checkpoints.path_of(folder, step)
        path.unlink()  # the best one is another name of one of them
        path.write_bytes(b"rot")
    with pytest.warns(UserWarning, match=f"going on from {BEST}, of step {best.step}"):
        again = trainer(batches, tmp_path / "run")
    assert again.step == best.step
    again.run(ignore)
    assert_same_weights(again, whole)
    assert (folder / BEST).exists()


def test_what_is_left_of_a_damaged_run_is_not_overwritten(
    batches: UnpairedBatches, tmp_path: Path
) -> None:
    """The second time as well, when damaged files have another name."""
    trainer(batches, tmp_path / "run").run(ignore)
    folder, log = tmp_path / "run" / "checkpoints", tmp_path / "run" / "log.jsonl"
    for path in list(folder.iterdir()):
        path.unlink()
        path.write_bytes(b"rot")
    before = log.read_bytes()
    with pytest.warns(UserWarning, match="set aside"), pytest.raises(CheckpointError, match="none"):
        trainer(batches, tmp_path / "run")
    for left in ("damaged", "the log"):
        with pytest.raises(CheckpointError, match=r"another (--)?output"):
            trainer(batches, tmp_path / "run")
        assert log.read_bytes() == before, left
        for path in folder.glob("*.damaged"):
            path.unlink()
    log.unlink()
    assert trainer(batches, tmp_path / "run").step == 0


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(
    batches: UnpairedBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network drive that is away comes back; an older checkpoint would cost steps."""
    trainer(batches, tmp_path / "run").run(ignore)
    before = names(tmp_path / "run")

    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_metadata", fail)
        with pytest.raises(CheckpointError, match=r"step-00000008.*cannot be read \(Input/output"):
            trainer(batches, tmp_path / "run")
    assert names(tmp_path / "run") == before
    assert trainer(batches, tmp_path / "run").step == 8


def test_settings_that_differ_are_named_down_to_the_last(
    batches: UnpairedBatches, tmp_path: Path
) -> None:
    trainer(batches, tmp_path / "run").run(ignore)
    other = recipe(model=replace(MODEL, hidden=6), lr=1e-3)
    with pytest.raises(CheckpointError) as raised:
        trainer(batches, tmp_path / "run", other)
    assert "(lr: 0.001, was 0.0008; model.hidden: 6, was 4)" in str(raised.value)


# -- data ----------------------------------------------------------------------------------


def test_all_data_that_a_run_has_had_are_remembered(
    batches: UnpairedBatches, tmp_path: Path
) -> None:
    run = trainer(batches, tmp_path / "run", recipe(steps=3))
    run.run(ignore)
    ((step, facts),) = run.history
    assert (step, facts) == (0, Feed(recipe(), batches, None, (0, 1)).facts())
    other = unpaired(tmp_path / "other")
    write_noise(tmp_path / "other" / "clean" / "b.png", 32, seed=9)
    other = unpaired(tmp_path / "other")
    with pytest.warns(UserWarning, match="are not those that the run was started with"):
        none = trainer(other, tmp_path / "run", recipe(steps=3))
    none.run(ignore)
    assert none.history == run.history  # no step was taken with the others
    with pytest.warns(UserWarning, match="are not those that the run was started with"):
        more = trainer(other, tmp_path / "run", recipe(steps=5))
    more.run(ignore)
    assert [step for step, _ in more.history] == [0, 3]
    assert [facts["clean"]["images"] for _, facts in more.history] == [1, 2]
    assert trainer(other, tmp_path / "run", recipe(steps=5)).history == more.history


def test_other_blur_kernels_are_other_data(batches: UnpairedBatches, tmp_path: Path) -> None:
    crops = [batches.domains["clean"]]
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        np.save(folder / "k.npy", np.eye(3) + number)
        crops.append(CropFolder(crops[0].folder, crop=8, align=2, kernels=folder))
    assert len({each.fingerprint() for each in crops}) == 3
    again = CropFolder(crops[0].folder, crop=8, align=2, kernels=folder)
    assert again.fingerprint() == crops[-1].fingerprint()
