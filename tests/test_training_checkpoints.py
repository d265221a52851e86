"""Checkpoints: whole or not there, and the best one kept."""

import multiprocessing
import resource
import signal
from pathlib import Path

import pytest
import torch
from tiny_run import assert_same_weights, ignore, recipe, trainer, unpaired

from deflow_aug.config import to_dict
from deflow_aug.data.unpaired import UnpairedBatches
from deflow_aug.training import checkpoints
from deflow_aug.training.checkpoints import BEST, Checkpoint, CheckpointError
from deflow_aug.training.loop import Progress


@pytest.fixture
def batches(tmp_path: Path) -> UnpairedBatches:
    return unpaired(tmp_path / "data")


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def example(step: int, size: int = 3, **state: object) -> Checkpoint:
    tensors = {"a": torch.arange(float(size)), "b": torch.tensor(True)}
    return Checkpoint(step, tensors, {"lr": 0.1}, {"good": True, **state})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = example(7, value=[0.1, None, "x"])
    path = checkpoints.save(tmp_path, saved)
    loaded = checkpoints.load(path)
    assert (loaded.step, loaded.recipe, loaded.state) == (7, saved.recipe, saved.state)
    assert loaded.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype


def test_the_last_good_ones_and_the_newest_are_kept(tmp_path: Path) -> None:
    for step, good in ((0, True), (5, True), (7, True), (10, True), (15, False), (16, True)):
        checkpoints.save(tmp_path, example(step, good=good))
    (tmp_path / "step-00000020.partial").write_bytes(b"half")
    assert checkpoints.good(tmp_path, every=5) == [0, 5, 10]
    checkpoints.tidy(tmp_path, keep=2, every=5)
    assert checkpoints.steps(tmp_path) == [5, 10, 16]
    assert not list(tmp_path.glob("*.partial"))


def test_the_last_checkpoints_of_a_run_are_kept(batches: UnpairedBatches, tmp_path: Path) -> None:
    settings = recipe(checkpoint_every=1, keep_checkpoints=2)
    trainer(batches, tmp_path / "run", settings).run(ignore)
    assert names(tmp_path / "run") == [
        BEST, "step-00000007.safetensors", "step-00000008.safetensors",
    ]  # fmt: skip


def test_the_best_checkpoint_is_kept(batches: UnpairedBatches, tmp_path: Path) -> None:
    """The one with the lowest smoothed loss, though newer ones push the others out."""
    run = trainer(batches, tmp_path / "run", recipe(checkpoint_every=1, steps=6))
    honest, rises = run.model.nll, (0.0, -1.0, 3.0, 4.0, 5.0, 6.0)
    run.model.nll = lambda *a, **k: honest(*a, **k) + rises[run.step]  # type: ignore[method-assign]
    losses: list[float] = []
    run.run(lambda progress: losses.append(sum(progress.bits.values()) / 2))
    best = checkpoints.load(tmp_path / "run" / "checkpoints" / BEST)
    assert best.step == 2
    # Exponential weights, the oldest value the lightest, that sum to 1.
    expected = (0.99 * losses[0] + losses[1]) / 1.99
    assert best.state["best"] == [2, pytest.approx(expected)]
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [4, 5, 6]


def test_a_damaged_checkpoint_is_set_aside(batches: UnpairedBatches, tmp_path: Path) -> None:
    """And the one before it taken; the run ends in the same weights."""
    whole = trainer(batches, tmp_path / "run")
    whole.run(ignore)
    folder = tmp_path / "run" / "checkpoints"
    newest = checkpoints.latest(folder)
    assert newest is not None
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"step-00000008.*set aside as step-00000008\.damaged"):
        again = trainer(batches, tmp_path / "run")
    assert again.step == 6
    again.run(ignore)
    assert_same_weights(again, whole)
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 64, b"\x00" * 64, b"\x02" + b"\x00" * 7 + b"{}" + b"\x00" * 50],
    ids=["empty", "endless header", "zeros", "no metadata"],
)
def test_no_checkpoint_that_can_be_loaded(
    batches: UnpairedBatches, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    path = tmp_path / "run" / "checkpoints" / "step-00000003.safetensors"
    path.write_bytes(content)
    with (
        pytest.warns(UserWarning, match="step-00000003.safetensors is not a usable checkpoint"),
        pytest.raises(CheckpointError, match="none of the 1 checkpoints"),
    ):
        trainer(batches, tmp_path / "run")


def fill_the_disk(output: Path, data: Path) -> None:
    """Train in a process that may write no file as large as the second checkpoint."""
    run = trainer(unpaired(data), output)
    messages = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def watch(progress: Progress) -> None:
        if progress.step == 2:
            size = (output / "checkpoints" / "step-00000000.safetensors").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    try:
        run.run(watch)
    except CheckpointError as error:
        messages.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (output / "messages.txt").write_text("\n".join(messages))


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    """By a limit on the size of files, on which a write fails half-way as on a full disk."""
    process = multiprocessing.get_context("forkserver").Process(
        target=fill_the_disk, args=(tmp_path / "run", tmp_path / "data")
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0
    message = (tmp_path / "run" / "messages.txt").read_text()
    assert "step-00000003.safetensors cannot be written (File too large" in message
    assert "step-00000000.safetensors is untouched. Make room" in message
    assert names(tmp_path / "run") == ["step-00000000.safetensors"]
    again = trainer(unpaired(tmp_path / "data"), tmp_path / "run")
    assert again.step == 0
    again.run(ignore)
    whole = trainer(unpaired(tmp_path / "data"), tmp_path / "whole")
    whole.run(ignore)
    assert_same_weights(again, whole)


def test_other_settings_do_not_take_up_a_checkpoint(
    batches: UnpairedBatches, tmp_path: Path
) -> None:
    trainer(batches, tmp_path / "run").run(ignore)
    with pytest.raises(CheckpointError, match=r"other settings \(lr: 0\.001, was 0\.0008\)"):
        trainer(batches, tmp_path / "run", recipe(lr=1e-3))
    with pytest.raises(CheckpointError, match="beyond the 7 steps"):
        trainer(batches, tmp_path / "run", recipe(steps=7))
    longer = trainer(batches, tmp_path / "run", recipe(steps=9, workers=1, checkpoint_every=4))
    assert longer.step == 8


def test_a_checkpoint_from_before_a_setting_existed(
    batches: UnpairedBatches, tmp_path: Path
) -> None:
    run = trainer(batches, tmp_path / "run")
    run.save()
    folder = tmp_path / "run" / "checkpoints"
    saved = checkpoints.load(folder / "step-00000000.safetensors")
    older = to_dict(run.recipe)
    del older["model"]["statistics"], older["precision"]
    checkpoints.save(folder, Checkpoint(2, saved.tensors, older, saved.state))
    assert trainer(batches, tmp_path / "run").step == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(
    batches: UnpairedBatches, tmp_path: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    run = trainer(batches, tmp_path / "run")

    def stop(progress: Progress) -> None:
        if progress.step == 4:
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)

    with pytest.warns(UserWarning, match=f"{number.name}: saving and stopping"):
        assert not run.run(stop)
    # The step that was under way when the signal came is the last.
    assert run.step == 5
    assert signal.getsignal(number) is before
    again = trainer(batches, tmp_path / "run")
    assert again.step == 5
    assert again.run(ignore)


def test_a_second_signal_interrupts_at_once(batches: UnpairedBatches, tmp_path: Path) -> None:
    run = trainer(batches, tmp_path / "run")

    def stop(progress: Progress) -> None:
        if progress.step == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.warns(UserWarning, match="SIGINT"), pytest.raises(KeyboardInterrupt):
        run.run(stop)
    assert run.step == 4
    assert trainer(batches, tmp_path / "run").step == 4


def test_a_signal_that_interrupts_saving_loses_nothing(
    batches: UnpairedBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second Ctrl-C, which often comes just then."""
    honest, interrupted = checkpoints.save, []

    def save(folder: Path, checkpoint: Checkpoint) -> Path:
        if checkpoint.step == 3 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return honest(folder, checkpoint)

    monkeypatch.setattr(checkpoints, "save", save)
    with pytest.raises(KeyboardInterrupt):
        trainer(batches, tmp_path / "run").run(ignore)
    assert trainer(batches, tmp_path / "run").step == 3
