"""Bad steps: skipped, counted, and left behind."""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import MODEL, assert_same_weights, ignore, recipe, trainer, unpaired

from deflow_aug.data.unpaired import UnpairedBatches
from deflow_aug.training import checkpoints, loop, tracking
from deflow_aug.training.loop import Progress, Trainer, TrainingError
from deflow_aug.training.safety import (
    ENOUGH,
    HISTORY,
    IN_A_ROW,
    IN_WINDOW,
    ROLLBACKS,
    WINDOW,
    Safety,
    Verdict,
)
from deflow_aug.training.samples import Crops, SampleSheet


@pytest.fixture
def batches(tmp_path: Path) -> UnpairedBatches:
    return unpaired(tmp_path / "data")


def spoil(run: Trainer, factor: Callable[[int], float]) -> None:
    """Multiply the loss of step 0, 1, ... by a factor."""
    honest = run.model.nll
    run.model.nll = lambda *a, **k: honest(*a, **k) * factor(run.step)  # type: ignore[method-assign]


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(
    batches: UnpairedBatches, tmp_path: Path, value: float
) -> None:
    run = trainer(batches, tmp_path / "run", recipe(steps=3))
    states, log = [weights(run)], []
    spoil(run, lambda step: value if step == 1 else 1.0)

    def watch(progress: Progress) -> None:
        log.append(progress)
        states.append(weights(run))

    run.run(watch)
    assert [(progress.skipped, progress.outliers) for progress in log] == [(0, 0), (1, 0), (1, 0)]
    assert not same(states[0], states[1])
    assert same(states[1], states[2])
    assert not same(states[2], states[3])
    assert all(bool(tensor.float().isfinite().all()) for tensor in states[3].values())
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    # JSON has no NaN.
    told = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert told[1]["bits"] == {"clean": None, "degraded": None}


def test_a_gradient_far_off_is_skipped(batches: UnpairedBatches, tmp_path: Path) -> None:
    run = trainer(batches, tmp_path / "run", recipe(steps=ENOUGH + 2))
    spoil(run, lambda step: 50.0 if step in (1, ENOUGH) else 1.0)
    log: list[Progress] = []
    before: list[dict[str, torch.Tensor]] = []

    def watch(progress: Progress) -> None:
        log.append(progress)
        before.append(weights(run))

    run.run(watch)
    # The first of the two came before it could be known what norms are usual.
    assert [p.step for p in log if p.outliers > (log[p.step - 2].outliers if p.step > 1 else 0)] \
        == [ENOUGH + 1]  # fmt: skip
    assert (log[-1].skipped, log[-1].outliers) == (1, 1)
    assert same(before[ENOUGH - 1], before[ENOUGH])


def judged(safety: Safety, norms: list[float]) -> list[Verdict]:
    return [safety.judge([8.0], norm) for norm in norms]


def test_outliers_are_told_by_the_median() -> None:
    safety = Safety(outlier_factor=10.0)
    usual = [1.0 + 0.1 * (n % 5) for n in range(ENOUGH)]
    assert judged(safety, [1e6, *usual[1:]]) == [Verdict.GOOD] * ENOUGH
    assert judged(safety, [11.9, 12.1, 1.0]) == [Verdict.GOOD, Verdict.OUTLIER, Verdict.GOOD]
    # Gradients that have grown for good are usual again once half of the history has them.
    grown = judged(safety, [100.0] * HISTORY)
    assert grown[0] is Verdict.OUTLIER
    assert grown[-1] is Verdict.GOOD
    assert judged(Safety(outlier_factor=0), [*usual, 1e30]) == [Verdict.GOOD] * (ENOUGH + 1)


def test_a_run_is_lost_after_bad_steps_in_a_row_or_many_in_a_while() -> None:
    safety = Safety(10.0)
    judged(safety, [math.nan] * (IN_A_ROW - 1))
    assert not safety.lost
    judged(safety, [1.0, math.nan])
    assert not safety.lost
    assert not safety.calm
    judged(safety, [1.0] * IN_A_ROW)
    assert safety.calm
    for _ in range(IN_A_ROW):
        safety.judge([math.inf], 1.0)
    assert safety.lost
    assert safety.skipped == 2 * IN_A_ROW

    often = Safety(10.0)
    judged(often, [math.nan if n % 4 == 0 else 1.0 for n in range(WINDOW - IN_A_ROW)])
    while sum(often.bad) < IN_WINDOW - 1:
        judged(often, [math.nan])
    assert not often.lost
    assert len(often.bad) < WINDOW
    judged(often, [math.nan])
    assert often.lost


def test_its_state_is_kept() -> None:
    safety = Safety(10.0)
    judged(safety, [0.1 * n for n in range(30)] + [math.nan, 1e9])
    safety.go_back([1.0, 2.0])
    judged(safety, [3.0, math.nan])
    again = Safety.restore(10.0, json.loads(json.dumps(safety.state())))
    assert again == safety
    assert again.lr_factor == 0.5


def test_bad_steps_that_do_not_end_send_a_run_back(
    batches: UnpairedBatches, tmp_path: Path
) -> None:
    """To the last good weights, with half the learning rate; and it gets over it."""
    settings = recipe(steps=24, checkpoint_every=4, warmup=0)
    run = trainer(batches, tmp_path / "run", settings)
    spoil(run, lambda step: math.nan if 6 <= step < 6 + IN_A_ROW else 1.0)
    log: list[Progress] = []
    states: list[dict[str, torch.Tensor]] = [weights(run)]

    def watch(progress: Progress) -> None:
        log.append(progress)
        states.append(weights(run))

    with pytest.warns(UserWarning, match="back to the weights of step 4, with half the learning"):
        run.run(watch)
    # Good checkpoints are of steps 0 and 4; at 8 and 12 steps had been bad.
    lost = 6 + IN_A_ROW
    assert [progress.step for progress in log] == list(range(1, 25))
    assert [progress.rolled_back for progress in log] == [0] * lost + [1] * (24 - lost)
    assert [progress.lr for progress in log] == [8e-4] * lost + [4e-4] * (24 - lost)
    assert log[-1].skipped == IN_A_ROW
    assert same(states[6], states[lost])
    after = checkpoints.load(tmp_path / "run" / "checkpoints" / f"step-{24:08d}.safetensors")
    assert after.state["went_back"] == [lost, 4]
    assert not same(states[4], states[24])


def test_what_it_goes_back_to(batches: UnpairedBatches, tmp_path: Path) -> None:
    """The weights, the average and the optimiser's memory, bit by bit."""
    settings = recipe(steps=6 + IN_A_ROW, checkpoint_every=4)
    run = trainer(batches, tmp_path / "run", settings)
    spoil(run, lambda step: math.nan if step >= 6 else 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.run(ignore)
    good = checkpoints.load(tmp_path / "run" / "checkpoints" / "step-00000004.safetensors")
    now = checkpoints.load(
        tmp_path / "run" / "checkpoints" / f"step-{6 + IN_A_ROW:08d}.safetensors"
    )
    assert same(dict(good.tensors), dict(now.tensors))
    assert now.state["safety"]["rollbacks"] == 1
    assert not now.state["good"]


@pytest.mark.filterwarnings("ignore:too many bad steps")
def test_a_second_time_it_goes_back_further(batches: UnpairedBatches, tmp_path: Path) -> None:
    """The weights of step 8 may be what is bad, if no good ones came of them."""
    settings = recipe(steps=10 + 3 * IN_A_ROW, checkpoint_every=4)
    run = trainer(batches, tmp_path / "run", settings)
    spoil(run, lambda step: math.nan if step >= 10 else 1.0)
    targets = []

    def watch(progress: Progress) -> None:
        if run.state.went_back != (-1, 0) and run.state.went_back not in targets:
            targets.append(run.state.went_back)

    run.run(watch)
    targets.append(run.state.went_back)
    assert targets == [(10 + n * IN_A_ROW, to) for n, to in ((1, 8), (2, 4), (3, 0))]


@pytest.mark.filterwarnings("ignore:too many bad steps")
def test_a_run_that_stays_bad_is_given_up(batches: UnpairedBatches, tmp_path: Path) -> None:
    run = trainer(batches, tmp_path / "run", recipe(steps=200))
    spoil(run, lambda step: math.inf)
    with pytest.raises(TrainingError, match=r"5 returns.*down to 2\.5e-05.*lower lr"):
        run.run(ignore)
    assert run.step == IN_A_ROW * (ROLLBACKS + 1)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert len(lines) == run.step


@pytest.mark.filterwarnings("ignore:too many bad steps")
def test_a_resumed_run_knows_that_it_went_back(batches: UnpairedBatches, tmp_path: Path) -> None:
    """Stopped before, between and after going back, it ends as one that was never stopped."""
    settings = recipe(steps=22, checkpoint_every=4)

    def bad(step: int) -> float:
        return math.nan if 6 <= step < 6 + IN_A_ROW else 1.0

    whole = trainer(batches, tmp_path / "whole", settings)
    spoil(whole, bad)
    logs: list[list[Progress]] = [[], []]
    whole.run(logs[0].append)

    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        logs[1].append(progress)
        if progress.step in (9, 16, 18):
            raise Stop

    for _ in range(3):
        part = trainer(batches, tmp_path / "parts", settings)
        spoil(part, bad)
        with pytest.raises(Stop):
            part.run(stop)
    last = trainer(batches, tmp_path / "parts", settings)
    spoil(last, bad)
    last.run(logs[1].append)
    assert_same_weights(last, whole)
    told = [[(p.step, p.lr, p.skipped, p.rolled_back, repr(p.bits)) for p in log] for log in logs]
    assert told[0] == told[1]


def test_a_run_that_is_wrecked_says_so(batches: UnpairedBatches, tmp_path: Path) -> None:
    """A good one, and one with an outlier at the end, do not."""
    run = trainer(batches, tmp_path / "run", recipe(steps=12))
    run.run(ignore)
    state = run.state
    assert state.wrecked is None
    state.safety.judge([math.nan], 1.0)
    assert state.wrecked is None
    state.add_loss(1e15)
    assert state.wrecked is None  # a single wild step, and over
    for _ in range(IN_A_ROW):
        state.add_loss(3e3)
    assert state.wrecked == "its loss is 3e+03 bits per dimension"
    state.first = 2e3  # as of pairs, whose likelihood starts there
    assert state.wrecked is None
    for _ in range(IN_A_ROW // 2):
        state.safety.judge([math.nan], 1.0)
    assert state.wrecked == "most of its last steps were bad and changed nothing"
    state.safety.bad.clear()
    for at, to in ((12, 8), (11, 2)):
        state.went_back = (at, to)
        assert state.wrecked == (
            f"at step {at} it went back to the weights of step {to}, after bad steps"
        )
    state.went_back = (11, 8)
    assert state.wrecked is None
    state.safety.skipped = 7
    assert state.wrecked == "7 of its 12 steps were bad and changed nothing"
    with torch.no_grad():
        next(run.average.parameters())[0] = math.nan
    assert state.wrecked == "its weights are not finite"
    with torch.no_grad():
        next(run.average.parameters())[0] = 0
    run.save()
    again = trainer(batches, tmp_path / "run", recipe(steps=12)).state
    assert (again.first, list(again.last)) == (2e3, list(state.last))


def test_a_factorisation_that_fails_is_a_bad_step(batches: UnpairedBatches, tmp_path: Path) -> None:
    """Not an exception, which would end the run."""
    run = trainer(batches, tmp_path / "run", recipe(steps=3))
    log: list[Progress] = []

    def watch(progress: Progress) -> None:
        log.append(progress)
        for shift in run.model.domain_shifts():
            shift.factor.data.fill_(1e30 if progress.step == 1 else 0.1)

    run.run(watch)
    assert [progress.skipped for progress in log] == [0, 1, 1]
    assert math.isnan(log[1].bits["degraded"])


def test_a_shift_that_cannot_be_fitted_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("not finite")

    monkeypatch.setattr(loop, "fit_shifts", fail)
    settings = recipe(steps=2, model=replace(MODEL, shift="fitted"))
    run = trainer(unpaired(tmp_path / "data"), tmp_path / "run", settings)
    with pytest.warns(UserWarning, match="no shift can be fitted: not finite"):
        assert run.run(ignore)
    assert run.state.wrecked == "no shift could be fitted to its latents"


def test_what_watches_a_run_does_not_end_it(
    batches: UnpairedBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are not finite in the middle and at the end, and a disk that is full."""
    crops = {"degraded": Crops(*np.zeros((2, 1, 8, 8, 3), np.uint8))}
    settings = recipe(steps=4, sample_every=2, average=0)
    run = trainer(batches, tmp_path / "run", settings)

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracking.curves, "available", lambda: True)
    monkeypatch.setattr(tracking.curves, "draw", full)
    watch = tracking.Watch(run, SampleSheet(crops, 0))
    watch.board = board = Board()  # type: ignore[assignment]

    def watching(progress: Progress) -> None:
        if progress.step >= 2:
            for parameter in run.average.parameters():
                parameter.data.fill_(math.nan)
        watch(progress)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run.run(watching)
        assert watch.finish() is None
        watch.close()
    told = [str(warning.message) for warning in caught]
    assert board.calls == 1
    for words, times in (
        ("no more is written to tensorboard/: broken", 1),
        ("no pictures of step 2: ", 1),
        ("no pictures of step 4: ", 1),
        ("no curves of step 4: [Errno 28]", 2),  # after the samples, and once more
    ):
        assert sum(words in text for text in told) == times, (words, told)


class Board:
    """A TensorBoard that cannot write."""

    calls = 0

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.calls += 1
        raise OSError("broken")
