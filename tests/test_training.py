"""The training loop: it learns, from unpaired and paired data, and starts from what it is given."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_convert import esrgan, export_encoder
from tiny_run import MODEL, assert_same_weights, ignore, paired, recipe, trainer, unpaired
from torch.testing import assert_close

from deflow_aug import recompute
from deflow_aug.conditioning import ConditioningNetwork
from deflow_aug.config import ChannelStatistics, ConfigError
from deflow_aug.convert import ConversionError
from deflow_aug.data.unpaired import CropFolder, UnpairedBatches
from deflow_aug.model import DeFlow
from deflow_aug.training.loop import Progress, Trainer, TrainingError
from deflow_aug.training.objective import Objective, inputs, pairs
from deflow_aug.training.processes import Processes, accelerator

CPU = torch.device("cpu")


@pytest.fixture
def batches(tmp_path: Path) -> UnpairedBatches:
    return unpaired(tmp_path / "data")


def dim_noise(folder: Path, level: int, bits: int, seed: int) -> None:
    """A picture of noise of so many bits, from this level on."""
    folder.mkdir(parents=True)
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 2**bits, (32, 32, 3), generator=rng) + level
    Image.fromarray(pixels.byte().numpy()).save(folder / "a.png")


def test_the_likelihood_rises(tmp_path: Path) -> None:
    """To that of the data: dark noise of 3 bits in one domain, brighter noise in the other."""
    domains = {}
    for number, name in enumerate(("clean", "degraded")):
        dim_noise(tmp_path / name, 40 * number, bits=3, seed=number)
        domains[name] = CropFolder(tmp_path / name, crop=8, align=2)
    settings = recipe(steps=60, lr=1e-2, checkpoint_every=1000)
    bits: list[float] = []
    run = trainer(UnpairedBatches(domains, 2, seed=0), tmp_path / "run", settings)
    assert run.run(lambda progress: bits.append(sum(progress.bits.values()) / 2))
    assert sum(bits[-10:]) / 10 < sum(bits[:10]) / 10 - 0.5
    assert 3 < sum(bits[-10:]) / 10 < 5
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 61))
    assert set(json.loads(lines[0])["bits"]) == {"clean", "degraded"}


@pytest.mark.parametrize("share", [None, 0.5], ids=["pairs alone", "mixed"])
def test_paired_data_are_learned(tmp_path: Path, share: float | None) -> None:
    """The degraded image given the clean one: another one like it, 40 levels brighter."""
    for half, level in (("clean", 0), ("degraded", 40)):
        dim_noise(tmp_path / "pairs" / half, level, bits=5, seed=level)
    settings = recipe(
        steps=40, lr=1e-2, batch_size=4 if share else 2, paired_share=share or 0.5,
        checkpoint_every=1000,
    )  # fmt: skip
    log: list[Progress] = []
    run = Trainer(
        settings, unpaired(tmp_path / "data") if share else None, tmp_path / "run",
        accelerator=CPU, paired=paired(tmp_path / "pairs"),
    )  # fmt: skip
    run.run(log.append)
    assert log[-1].skipped == 0
    assert set(log[0].bits) == {"degraded|clean"} | ({"clean", "degraded"} if share else set())
    bits = [progress.bits["degraded|clean"] for progress in log]
    assert sum(bits[-10:]) / 10 < sum(bits[:10]) / 10 - 0.5


def test_the_loss_of_pairs_is_eq_5(tmp_path: Path) -> None:
    run = Trainer(
        recipe(), None, tmp_path / "run", accelerator=CPU, paired=paired(tmp_path / "pairs")
    )
    batch = paired(tmp_path / "pairs").batch(3)
    two = pairs(batch, run.model, 0, CPU)
    assert torch.equal(two.degraded.images, batch.images / 255)
    assert batch.clean is not None
    assert torch.equal(two.clean.images, batch.clean / 255)
    # Both halves have the same h: what differs between their latents is then the degradation.
    assert torch.equal(two.clean.noise, two.degraded.noise)
    assert not torch.equal(two.clean.dequantization, two.degraded.dequantization)
    expected = run.model.paired_nll(
        two.degraded.images,
        two.clean.images,
        batch.domains,
        dequantization=(two.degraded.dequantization, two.clean.dequantization),
        noise=(two.degraded.noise, two.clean.noise),
    )
    assert torch.equal(Objective(run.model, "float32")(None, two), expected)


def test_activations_are_kept_where_that_is_asked_for(
    tmp_path: Path, batches: UnpairedBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them, and what is learned is the same."""
    monkeypatch.setattr(recompute, "LEAST_SAVED", 0)
    kept, weights, forward = {}, {}, Objective.forward
    for keep in (False, True):
        run = trainer(batches, tmp_path / str(keep), recipe(steps=2, keep_activations=keep))
        sizes: list[int] = []  # of what the forward passes alone keep

        def noted(own: Objective, *args: object, sizes: list[int] = sizes) -> torch.Tensor:
            parameters = {parameter.data_ptr() for parameter in own.parameters()}

            def note(tensor: torch.Tensor) -> torch.Tensor:
                if tensor.data_ptr() not in parameters:
                    sizes.append(tensor.nbytes)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                return forward(own, *args)

        monkeypatch.setattr(Objective, "forward", noted)
        run.run(ignore)
        kept[keep], weights[keep] = sum(sizes), run.model.state_dict()
    assert kept[True] > kept[False]
    for name, value in weights[True].items():
        assert_close(value, weights[False][name], rtol=1e-4, atol=1e-5)


def test_the_noise_of_an_item_is_its_own(tmp_path: Path, batches: UnpairedBatches) -> None:
    """Whichever process makes it."""
    model = trainer(batches, tmp_path / "run").model
    whole = inputs(batches.batch(5), model, 0, CPU)
    for number in range(2):
        part = inputs(batches.batch(5, (number, 2)), model, 0, CPU)
        for mine, all_ in zip(part, whole, strict=True):
            assert torch.equal(mine[0], all_[number])
    for other in (inputs(batches.batch(6), model, 0, CPU), inputs(batches.batch(5), model, 1, CPU)):
        assert not torch.equal(other.noise, whole.noise)
        assert not torch.equal(other.dequantization, whole.dequantization)


def test_several_degraded_domains_in_one_run(tmp_path: Path) -> None:
    names = ("low", "vintage")
    settings = recipe(model=replace(MODEL, domains=names), batch_size=4, steps=6)
    log: list[Progress] = []
    run = trainer(unpaired(tmp_path / "data", names, 4), tmp_path / "run", settings)
    run.run(log.append)
    assert set(log[0].bits) == {"clean", *names}
    for shift in run.model.domain_shifts():
        for mean in shift.means()[1:]:
            assert mean.abs().max() > 0


@pytest.mark.parametrize(
    "change", [{"shift": "diagonal"}, {"shift": "zero"}, {"conditioned": False}]
)
def test_variants_train(
    batches: UnpairedBatches, tmp_path: Path, change: dict[str, object]
) -> None:
    """Those of the paper's ablation: every weight that can move does."""
    run = trainer(batches, tmp_path / "run", recipe(model=replace(MODEL, **change), lr=1e-2))
    before = {name: value.detach().clone() for name, value in run.model.named_parameters()}
    run.run(ignore)
    still = [n for n, value in run.model.named_parameters() if torch.equal(value, before[n])]
    # Without h(x) all that the conditioning network tells is its biases.
    assert all(n.endswith("weight") and not run.model.config.conditioned for n in still), still
    kind = str(run.model.config.shift)
    for shift in run.model.domain_shifts():
        factor = shift.factors()[1]
        off = factor - factor.diagonal().diag()
        assert bool(factor.any()) == (kind != "zero")
        assert bool(off.any()) == (kind == "full")


def test_a_shift_that_is_fitted_after_training(tmp_path: Path) -> None:
    """It is N(0, I) for both domains up to the last step, and what the latents tell after it."""
    for name, level in (("clean", 0), ("degraded", 60)):
        dim_noise(tmp_path / name, level, bits=3, seed=level)
    domains = {n: CropFolder(tmp_path / n, crop=8, align=2) for n in ("clean", "degraded")}
    settings = recipe(model=replace(MODEL, shift="fitted"))
    run = trainer(UnpairedBatches(domains, 2, seed=0), tmp_path / "run", settings)
    seen: list[float] = []

    def largest() -> float:
        return max(float(s.means().abs().max()) for s in run.average.domain_shifts())

    run.run(lambda progress: seen.append(largest()))
    assert seen == [0.0] * 8
    assert largest() > 0
    again = trainer(UnpairedBatches(domains, 2, seed=0), tmp_path / "run", settings)
    assert_same_weights(again, run)
    # Degraded images are as likely under the fitted shift as under none, or more so.
    batch = UnpairedBatches(domains, 32, seed=1).batch(0)
    one = inputs(batch, run.average, 0, CPU)
    bits = [
        model.nll(one.images, one.domains, dequantization=one.dequantization, noise=one.noise)
        for model in (run.average, fitted_away(run))
    ]
    chosen = one.domains == 1
    assert bits[0][chosen].mean() < bits[1][chosen].mean()

    with pytest.raises(ConfigError, match="Sigma"):
        Trainer(settings, None, tmp_path / "no", accelerator=CPU, paired=paired(tmp_path / "p"))


def fitted_away(run: Trainer) -> DeFlow:
    """The average as it would be without its shift."""
    model = copy.deepcopy(run.average)
    for shift in model.domain_shifts():
        shift.assign(1, torch.zeros_like(shift.mean[0]), torch.zeros_like(shift.factor[0]))
    return model


def test_bfloat16_is_for_the_conditioning_alone(batches: UnpairedBatches, tmp_path: Path) -> None:
    log: list[Progress] = []
    half = trainer(batches, tmp_path / "half", recipe(precision="bf16"))
    seen: dict[str, torch.dtype] = {}
    for name, module in half.model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda _, __, result, name=name: seen.update({name: result.dtype})
            )
    half.run(log.append)
    assert {seen[name] for name in seen if name.startswith("conditioning")} == {torch.bfloat16}
    full: list[Progress] = []
    trainer(batches, tmp_path / "full").run(full.append)
    for one, other in zip(log, full, strict=True):
        assert one.bits == pytest.approx(other.bits, abs=0.1)
    assert log != full
    assert all(p.dtype == torch.float32 for p in half.model.parameters())


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


def test_actnorms_start_from_data(batches: UnpairedBatches, tmp_path: Path) -> None:
    run = trainer(batches, tmp_path / "run")
    states = run.model.state_dict()
    initialized = [tensor for name, tensor in states.items() if name.endswith("initialized")]
    assert initialized
    assert all(bool(tensor) for tensor in initialized)


def test_colours_are_matched_before_training(batches: UnpairedBatches, tmp_path: Path) -> None:
    statistics = ChannelStatistics((0.5,) * 3, (0.1,) * 3, (0.4,) * 3, (0.3,) * 3)
    model = replace(MODEL, statistics={"degraded": statistics})
    run = trainer(batches, tmp_path / "run", recipe(model=model))
    batch = batches.batch(0)
    assert sorted(batch.domains) == ["clean", "degraded"]
    matched = inputs(batch, run.model, 0, CPU).images
    for image, result, domain in zip(batch.images / 255, matched, batch.domains, strict=True):
        expected = (image - 0.4) / 3 + 0.5 if domain == "degraded" else image
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_statistics_are_measured_on_request(tmp_path: Path) -> None:
    for name, level in (("clean", 100), ("degraded", 20)):
        dim_noise(tmp_path / name, level, bits=5, seed=level)
    domains = {n: CropFolder(tmp_path / n, crop=8, align=2) for n in ("clean", "degraded")}
    batches = UnpairedBatches(domains, 2, seed=0)
    settings = recipe(match_statistics=True)
    run = trainer(batches, tmp_path / "run", settings)
    assert run.recipe.model.statistics is not None
    measured = run.model.config.statistics["degraded"]
    for mean, level in ((measured.clean_mean, 100), (measured.degraded_mean, 20)):
        assert mean == pytest.approx([(level + 15.5) / 255] * 3, abs=0.005)
    for std in (measured.clean_std, measured.degraded_std):
        assert std == pytest.approx([9.23 / 255] * 3, rel=0.05)
    run.run(ignore)
    # Resumed, the run keeps what it measured, also where the images have changed since.
    Image.new("RGB", (32, 32)).save(tmp_path / "degraded" / "b.png")
    changed = domains | {"degraded": CropFolder(tmp_path / "degraded", crop=8, align=2)}
    with pytest.warns(UserWarning, match="the images are not those"):
        again = trainer(UnpairedBatches(changed, 2, seed=0), tmp_path / "run", settings)
    assert again.step == 8
    assert again.recipe.model.statistics == run.recipe.model.statistics

    with pytest.raises(ConfigError, match="match_statistics needs unpaired data"):
        Trainer(settings, None, tmp_path / "pairs", accelerator=CPU, paired=paired(tmp_path / "p"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_conditioning_can_start_from_rrdb_weights(
    batches: UnpairedBatches, tmp_path: Path, suffix: str
) -> None:
    network = ConditioningNetwork(MODEL)
    path = tmp_path / f"rrdb{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(export_encoder(network, esrgan), path)
    output = tmp_path / "run"
    run = Trainer(recipe(), batches, output, accelerator=CPU, encoder=path)
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
        again = Trainer(recipe(), batches, output, accelerator=CPU, encoder=given)
        assert (again.step, again.encoder) == (8, path.name)
        assert_same_weights(again, run)


def test_rrdb_weights_that_do_not_fit(batches: UnpairedBatches, tmp_path: Path) -> None:
    torch.save({"features.weight": torch.ones(1)}, tmp_path / "w.pth")
    (tmp_path / "w.safetensors").write_bytes(b"no tensors")
    for name, message in (
        ("w.pth", "not RRDB weights"),
        ("w.safetensors", r"w\.safetensors is not a readable safetensors file"),
    ):
        with pytest.raises(ConversionError, match=message):
            Trainer(recipe(), batches, tmp_path / "run", accelerator=CPU, encoder=tmp_path / name)
    assert not (tmp_path / "run").exists()


def test_fine_tuning_goes_on_from_a_model(batches: UnpairedBatches, tmp_path: Path) -> None:
    """Also where M has collapsed, which would never move again."""
    first = trainer(batches, tmp_path / "first", recipe(steps=3))
    first.run(ignore)
    learned = {name: tensor.clone() for name, tensor in first.average.state_dict().items()}
    collapsed = first.average.domain_shifts()[0]
    with torch.no_grad():
        collapsed.factor.zero_()
    tuned = Trainer(
        recipe(steps=3, lr=1e-3), batches, tmp_path / "tuned", accelerator=CPU,
        start=first.average,
    )  # fmt: skip
    for model in (tuned.model, tuned.average):
        for name, tensor in model.state_dict().items():
            if name == "shifts.0.factor":
                assert torch.equal(tensor[0], MODEL.shift_init * torch.eye(tensor.shape[-1]))
            else:
                assert torch.equal(tensor, learned[name]), name
    tuned.run(ignore)
    for shift in tuned.model.domain_shifts():
        assert not torch.equal(shift.factor[0], MODEL.shift_init * torch.eye(len(shift.factor[0])))


def test_fine_tuning_matches_domains_by_name(tmp_path: Path) -> None:
    old = recipe(model=replace(MODEL, domains=("low", "vintage")), batch_size=3, steps=3)
    start = trainer(unpaired(tmp_path / "old", ("low", "vintage"), 3), tmp_path / "first", old)
    start.run(ignore)
    new = recipe(model=replace(MODEL, domains=("vintage", "phone")), batch_size=3)
    batches = unpaired(tmp_path / "new", ("vintage", "phone"), 3)
    tuned = Trainer(new, batches, tmp_path / "tuned", accelerator=CPU, start=start.model)
    for mine, theirs in zip(tuned.model.domain_shifts(), start.model.domain_shifts(), strict=True):
        assert torch.equal(mine.means()[1], theirs.means()[2])
        assert torch.equal(mine.factors()[1], theirs.factors()[2])
        assert not mine.means()[2].any()

    wider = replace(MODEL, hidden=8)
    with pytest.raises(ConfigError, match="another architecture"):
        Trainer(
            recipe(model=wider), unpaired(tmp_path / "data"), tmp_path / "no", accelerator=CPU,
            start=start.model,
        )  # fmt: skip


def test_an_unpaired_model_is_fine_tuned_on_pairs(batches: UnpairedBatches, tmp_path: Path) -> None:
    first = trainer(batches, tmp_path / "first")
    first.run(ignore)
    tuned = Trainer(
        recipe(), None, tmp_path / "tuned", accelerator=CPU, start=first.average,
        paired=paired(tmp_path / "pairs"),
    )  # fmt: skip
    log: list[Progress] = []
    tuned.run(log.append)
    assert [list(progress.bits) for progress in log] == [["degraded|clean"]] * 8


def test_no_global_random_state_is_touched(batches: UnpairedBatches, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trainer(batches, tmp_path / "run").run(ignore)
    assert torch.equal(before, torch.get_rng_state())


def test_workers_change_nothing(batches: UnpairedBatches, tmp_path: Path) -> None:
    alone = trainer(batches, tmp_path / "alone", recipe(steps=3))
    alone.run(ignore)
    helped = trainer(unpaired(tmp_path / "data"), tmp_path / "helped", recipe(steps=3, workers=1))
    helped.run(ignore)
    assert_same_weights(alone, helped)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 4}, "asks for 4 unpaired items a step, .* batch_size=2"),
        ({"model": replace(MODEL, domains=("low",))}, "unpaired data of 'degraded'"),
    ],
)
def test_data_that_do_not_fit_the_recipe(
    batches: UnpairedBatches, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(batches, tmp_path / "run", recipe(**changes))


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither unpaired nor paired data"):
        Trainer(recipe(), None, tmp_path / "run", accelerator=CPU)


def test_accelerate_is_asked_for_where_it_is_missing(
    batches: UnpairedBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install 'deflow-aug\[train\]'"):
        trainer(batches, tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "precision", "message"),
    [
        ("FSDP", "no", "configured for FSDP, which shards the weights"),
        ("MULTI_GPU", "fp16", "mixed_precision='fp16', which would reach the flow"),
    ],
)
def test_launches_that_do_not_fit(kind: str, precision: str, message: str) -> None:
    given = SimpleNamespace(distributed_type=SimpleNamespace(value=kind), mixed_precision=precision)
    with pytest.raises(TrainingError, match=message):
        Processes(given)  # type: ignore[arg-type]


def test_an_accelerator_may_be_given(batches: UnpairedBatches, tmp_path: Path) -> None:
    given = accelerator(CPU)
    run = Trainer(recipe(steps=1), batches, tmp_path / "run", accelerator=given)
    assert run.accelerator is given
    assert run.run(ignore)
