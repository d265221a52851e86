"""The training loop: it learns, and nothing is lost when it is stopped."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_convert import esrgan, export_encoder
from test_data import write_noise

from deflow_aug.conditioning import ConditioningNetwork
from deflow_aug.config import ChannelStatistics, ConfigError, EncoderConfig, ModelConfig, to_dict
from deflow_aug.convert import ConversionError
from deflow_aug.data.unpaired import CropFolder, UnpairedBatches
from deflow_aug.training import checkpoints
from deflow_aug.training.loop import MAX_SKIPPED_IN_A_ROW, Progress, Trainer, TrainingError
from deflow_aug.training.recipe import Recipe

MODEL = ModelConfig(
    scale=2,
    levels=2,
    steps=1,
    hidden=4,
    encoder=EncoderConfig(channels=4, growth=4, blocks=1, stacked_blocks=(0,)),
)


def recipe(**changes: object) -> Recipe:
    settings: dict[str, object] = {
        "model": MODEL,
        "steps": 8,
        "batch_size": 2,
        "crop": 8,
        "checkpoint_every": 3,
        "warmup": 2,
    }
    return Recipe(**(settings | changes))  # type: ignore[arg-type]


@pytest.fixture
def batches(tmp_path: Path) -> UnpairedBatches:
    domains = {}
    for number, name in enumerate(("clean", "degraded")):
        write_noise(tmp_path / "data" / name / "a.png", 32, 32, seed=number)
        domains[name] = CropFolder(tmp_path / "data" / name, crop=8, align=2)
    return UnpairedBatches(domains, batch_size=2, seed=0)


def trainer(batches: UnpairedBatches, output: Path, settings: Recipe | None = None) -> Trainer:
    return Trainer(settings or recipe(), batches, output, torch.device("cpu"))


def ignore(progress: Progress) -> None:
    pass


class Stop(Exception):
    pass


def test_the_likelihood_rises(tmp_path: Path) -> None:
    """To that of the data: dark noise of 3 bits in one domain, brighter noise in the other."""
    domains = {}
    for number, name in enumerate(("clean", "degraded")):
        folder = tmp_path / name
        pixels = write_noise(folder / "a.png", 32, 32, seed=number) // 32 + 40 * number
        Image.fromarray(pixels).save(folder / "a.png")
        domains[name] = CropFolder(folder, crop=8, align=2)
    settings = recipe(steps=150, lr=5e-3, checkpoint_every=1000)
    bits: list[float] = []
    run = trainer(UnpairedBatches(domains, 2, seed=0), tmp_path / "run", settings)
    run.run(lambda progress: bits.append(sum(progress.bits.values()) / 2))
    assert sum(bits[-10:]) / 10 < sum(bits[:10]) / 10 - 0.5
    assert 3 < sum(bits[-10:]) / 10 < 5
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 151))
    assert set(json.loads(lines[0])["bits"]) == {"clean", "degraded"}


@pytest.mark.parametrize("at", [1, 3, 5, 7])
def test_a_stopped_run_ends_in_the_same_weights(
    batches: UnpairedBatches, tmp_path: Path, at: int
) -> None:
    whole = trainer(batches, tmp_path / "whole")
    whole.run(ignore)

    def stop(progress: Progress) -> None:
        if progress.step == at:
            raise Stop

    with pytest.raises(Stop):
        trainer(batches, tmp_path / "stopped").run(stop)
    again = trainer(batches, tmp_path / "stopped")
    assert again.step == at
    again.run(ignore)
    for mine, other in ((again.model, whole.model), (again.average, whole.average)):
        for name, tensor in mine.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("whole", "stopped")]
    bits = [[json.loads(line)["bits"] for line in log] for log in logs]
    assert bits[0] == bits[1]


def test_a_run_goes_back_to_its_last_checkpoint(batches: UnpairedBatches, tmp_path: Path) -> None:
    """As after a kill, when the log is ahead of the checkpoint."""
    trainer(batches, tmp_path / "run").run(ignore)
    newest = checkpoints.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    newest.unlink()
    again = trainer(batches, tmp_path / "run")
    assert again.step == 6
    again.run(ignore)
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_conditioning_can_start_from_rrdb_weights(
    batches: UnpairedBatches, tmp_path: Path, suffix: str
) -> None:
    network = ConditioningNetwork(MODEL)
    path = tmp_path / f"rrdb{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(export_encoder(network, esrgan), path)
    cpu, output = torch.device("cpu"), tmp_path / "run"
    run = Trainer(recipe(), batches, output, cpu, path)
    assert run.encoder == path.name
    for model in (run.model, run.average):
        for name, tensor in network.state_dict().items():
            assert torch.equal(model.conditioning.state_dict()[name], tensor), name
    # The actnorms were initialised with these features, not with those of a random network.
    ours, other = run.model.flow, trainer(batches, tmp_path / "other").model.flow
    norms = [name for name in ours.state_dict() if name.endswith("first.norm.logs")]
    assert norms
    assert all(not torch.equal(ours.state_dict()[n], other.state_dict()[n]) for n in norms)

    run.run(ignore)
    path.unlink()
    for given in (path, None):  # what a run started from is known without the file
        again = Trainer(recipe(), batches, output, cpu, given)
        assert (again.step, again.encoder) == (8, path.name)
        for name, tensor in run.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], tensor), name


def test_rrdb_weights_that_do_not_fit(batches: UnpairedBatches, tmp_path: Path) -> None:
    torch.save({"features.weight": torch.ones(1)}, tmp_path / "w.pth")
    (tmp_path / "w.safetensors").write_bytes(b"no tensors")
    for name, message in (
        ("w.pth", "not RRDB weights"),
        ("w.safetensors", r"w\.safetensors is not a readable safetensors file"),
    ):
        with pytest.raises(ConversionError, match=message):
            Trainer(recipe(), batches, tmp_path / "run", torch.device("cpu"), tmp_path / name)
    assert not (tmp_path / "run").exists()


def test_colours_are_matched_before_training(batches: UnpairedBatches, tmp_path: Path) -> None:
    statistics = ChannelStatistics((0.5,) * 3, (0.1,) * 3, (0.4,) * 3, (0.3,) * 3)
    model = replace(MODEL, statistics={"degraded": statistics})
    images, domains, *_ = trainer(batches, tmp_path / "plain")._batch(0)
    matched, *_ = trainer(batches, tmp_path / "run", recipe(model=model))._batch(0)
    assert sorted(domains) == ["clean", "degraded"]
    for image, result, domain in zip(images, matched, domains, strict=True):
        expected = (image - 0.4) / 3 + 0.5 if domain == "degraded" else image
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_a_checkpoint_from_before_a_setting_existed(
    batches: UnpairedBatches, tmp_path: Path
) -> None:
    run = trainer(batches, tmp_path / "run")
    older = to_dict(run.recipe)
    del older["model"]["statistics"]
    tensors = {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in run.average.state_dict().items()}
    checkpoints.save(tmp_path / "run" / "checkpoints", 2, tensors, older)
    assert trainer(batches, tmp_path / "run").step == 2


def test_actnorms_start_from_data(batches: UnpairedBatches, tmp_path: Path) -> None:
    run = trainer(batches, tmp_path / "run")
    states = run.model.state_dict()
    initialized = [tensor for name, tensor in states.items() if name.endswith("initialized")]
    assert initialized
    assert all(bool(tensor) for tensor in initialized)


def test_other_settings_do_not_take_up_a_checkpoint(
    batches: UnpairedBatches, tmp_path: Path
) -> None:
    trainer(batches, tmp_path / "run").run(ignore)
    with pytest.raises(checkpoints.CheckpointError, match="lr differ"):
        trainer(batches, tmp_path / "run", recipe(lr=1e-3))
    longer = trainer(batches, tmp_path / "run", recipe(steps=9))
    assert longer.step == 8


def test_a_damaged_checkpoint_is_named(batches: UnpairedBatches, tmp_path: Path) -> None:
    run = trainer(batches, tmp_path / "run")
    run.save()
    path = checkpoints.latest(tmp_path / "run" / "checkpoints")
    assert path is not None
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(checkpoints.CheckpointError, match="step-00000000"):
        trainer(batches, tmp_path / "run")


def test_a_failing_write_leaves_the_previous_checkpoint(
    batches: UnpairedBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(batches, tmp_path / "run")
    run.save()
    run.step = 1

    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        run.save()
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names == ["step-00000000.safetensors"]


def test_only_the_last_checkpoints_are_kept(batches: UnpairedBatches, tmp_path: Path) -> None:
    trainer(batches, tmp_path / "run", recipe(checkpoint_every=1)).run(ignore)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000007.safetensors", "step-00000008.safetensors"]


def test_a_step_that_is_not_finite_changes_nothing(
    batches: UnpairedBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(batches, tmp_path / "run", recipe(steps=3))
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    honest = run.model.nll

    def broken(*args: object, **kwargs: object) -> torch.Tensor:
        bits = honest(*args, **kwargs)  # type: ignore[arg-type]
        return bits * math.nan if run.step == 1 else bits

    monkeypatch.setattr(run.model, "nll", broken)
    skipped, states = [], []

    def watch(progress: Progress) -> None:
        skipped.append(progress.skipped)
        states.append({name: t.clone() for name, t in run.model.state_dict().items()})

    run.run(watch)
    assert skipped == [0, 1, 1]
    assert any(not torch.equal(states[0][name], before[name]) for name in before)
    assert all(torch.equal(states[1][name], states[0][name]) for name in before)
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in states[2].values())


def test_a_run_that_stays_not_finite_is_given_up(
    batches: UnpairedBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(batches, tmp_path / "run", recipe(steps=200))
    honest = run.model.nll
    monkeypatch.setattr(run.model, "nll", lambda *a, **k: honest(*a, **k) * math.inf)
    with pytest.raises(TrainingError, match="lower lr"):
        run.run(ignore)
    assert run.skipped == MAX_SKIPPED_IN_A_ROW + 1


def test_the_average_follows_the_weights(batches: UnpairedBatches, tmp_path: Path) -> None:
    """Against the recursion written out, with its short start."""
    run = trainer(batches, tmp_path / "run", recipe(average=0.5))
    mean = {name: value.detach().clone() for name, value in run.model.named_parameters()}

    def follow(progress: Progress) -> None:
        decay = min(0.5, progress.step / (9 + progress.step))
        for name, value in run.model.named_parameters():
            mean[name] = decay * mean[name] + (1 - decay) * value.detach()

    run.run(follow)
    for name, value in run.average.named_parameters():
        torch.testing.assert_close(value, mean[name], rtol=1e-5, atol=1e-7)


def test_the_learning_rate_is_halved_as_published() -> None:
    settings = Recipe(steps=1000, lr=1.0, warmup=0, halve_lr_at=(0.5, 0.75, 0.9, 0.95))
    assert [settings.learning_rate(s) for s in (0, 499, 500, 750, 900, 950, 999)] == [
        1,
        1,
        0.5,
        0.25,
        0.125,
        0.0625,
        0.0625,
    ]
    assert Recipe(lr=1.0, warmup=3).learning_rate(0) == 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": 10}, "multiple of 4"),
        ({"batch_size": 1}, "at least 2"),
        ({"steps": 0}, "steps"),
        ({"lr": 0.0}, "lr"),
        ({"average": 1.0}, "average"),
        ({"seed": -1}, "seed"),
    ],
)
def test_recipes_that_make_no_sense(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(**change)


def test_no_global_random_state_is_touched(batches: UnpairedBatches, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trainer(batches, tmp_path / "run").run(ignore)
    assert torch.equal(before, torch.get_rng_state())


def test_fine_tuning_starts_from_a_model_with_m_anew(
    batches: UnpairedBatches, tmp_path: Path
) -> None:
    """Also where M has collapsed, which would never move again."""
    first = trainer(batches, tmp_path / "first", recipe(steps=3))
    first.run(ignore)
    with torch.no_grad():
        for shift in first.average.domain_shifts():
            shift.factor.zero_()
    tuned = Trainer(
        recipe(steps=3, lr=1e-3), batches, tmp_path / "tuned", torch.device("cpu"),
        start=first.average,
    )  # fmt: skip
    for model in (tuned.model, tuned.average):
        for name, tensor in model.state_dict().items():
            if name.endswith(".factor"):
                assert torch.equal(tensor[0], MODEL.shift_init * torch.eye(tensor.shape[-1]))
            else:
                assert torch.equal(tensor, first.average.state_dict()[name]), name
    tuned.run(ignore)
    for shift in tuned.model.domain_shifts():
        assert not torch.equal(shift.factor[0], MODEL.shift_init * torch.eye(len(shift.factor[0])))
