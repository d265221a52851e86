"""Weights on disk and on the Hub: what is written is read back, and what is wrong is named."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard, hf_hub_download
from safetensors.torch import load_file, save_file
from small import SMALL, small_model
from torch import Tensor

import deflow_aug
from deflow_aug import DeFlowDegrader, hub
from deflow_aug.hub import WeightsError

TRAINING = {"notes": "Made for a test.", "steps": 3, "data": {"clean": "photos", "images": 12}}
IMAGE = np.random.default_rng(0).integers(0, 256, (8, 12, 3)).astype(np.uint8)
REPO = "someone/tiny"


def make(seed: int = 0) -> DeFlowDegrader:
    return DeFlowDegrader(small_model(seed), training=TRAINING, device="cpu")


def load(name: str | Path, **arguments: Any) -> DeFlowDegrader:
    return DeFlowDegrader.from_pretrained(name, device="cpu", **arguments)


def result(degrader: DeFlowDegrader) -> bytes:
    """Tells models apart."""
    return degrader.degrade(IMAGE, seed=1).tobytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What save_pretrained writes."""
    folder = tmp_path_factory.mktemp("files") / "saved"
    make().save_pretrained(folder)
    return contents(folder)


@pytest.fixture
def folder(tmp_path: Path, files: dict[str, bytes]) -> Path:
    """A copy of it that may be damaged."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# -- saving and loading ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_what_was_saved_is_loaded_bit_for_bit(
    tmp_path: Path, kind: Callable[[Path], str | Path]
) -> None:
    original = make()
    assert original.save_pretrained(kind(tmp_path / "new" / "weights")) is None
    loaded = load(kind(tmp_path / "new" / "weights"))
    assert loaded.model.config == original.model.config == SMALL
    assert loaded.training_info == TRAINING
    state = original.model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert tensor.equal(state[name]), name
    floats = IMAGE.astype(np.float32) / 255
    for method in ("degrade", "restore"):
        pair = [getattr(one, method)(floats, seed=1) for one in (original, loaded)]
        assert np.array_equal(*pair)
    assert loaded.log_prob(IMAGE) == original.log_prob(IMAGE)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_settings_are_passed_on(folder: Path) -> None:
    degrader = load(folder, conditioning_noise=False, dequantize=True)
    assert not degrader.conditioning_noise
    assert degrader.dequantize
    assert load(folder).conditioning_noise
    assert not load(folder).dequantize
    assert degrader.device == torch.device("cpu")
    automatic = DeFlowDegrader.from_pretrained(folder).device.type
    assert automatic == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_folder_is_a_repository_of_the_hub(folder: Path) -> None:
    assert sorted(contents(folder)) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert sorted(config) == ["format_version", "library_version", "model", "training"]
    assert config["format_version"] == 1
    assert config["library_version"] == deflow_aug.__version__
    assert config["training"] == TRAINING
    names = set(load_file(folder / "model.safetensors"))
    assert names == set(small_model().state_dict())


def test_model_card_has_the_metadata_of_the_hub(folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "deflow_aug"
    assert card.data.pipeline_tag == "image-to-image"
    assert {"normalizing-flow", "data-augmentation"} <= set(card.data.tags)
    assert "from_pretrained" in card.text
    assert "Made for a test." in card.text
    assert "- data:\n  - clean: photos\n  - images: 12\n" in card.text
    assert "degraded domains: degraded" in card.text


def test_model_card_of_an_unknown_training() -> None:
    card = DeFlowDegrader(small_model(), device="cpu").generate_model_card()
    assert "Not recorded." in card.text


def test_a_model_card_that_is_there_stays(folder: Path) -> None:
    (folder / "README.md").write_text("Mine.")
    make(seed=1).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "Mine."
    assert result(load(folder)) == result(make(seed=1)) != result(make())


def test_tensors_of_another_precision_become_float32(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}, file)
    for name, tensor in load(folder).model.state_dict().items():
        assert tensor.dtype == tensors[name].dtype


def test_the_default_dtype_of_torch_does_not_matter(folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        degrader = load(folder)
        degraded, bits = result(degrader), degrader.log_prob(IMAGE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert degraded == result(make())
    assert bits == make().log_prob(IMAGE)


def test_two_domains_are_kept_in_order(tmp_path: Path) -> None:
    original = DeFlowDegrader(small_model(domains=("night", "day")), device="cpu")
    original.save_pretrained(tmp_path)
    for domain in ("night", "day"):
        expected = original.degrade(IMAGE, seed=1, domain=domain)
        assert np.array_equal(load(tmp_path).degrade(IMAGE, seed=1, domain=domain), expected)


# -- saving that fails -------------------------------------------------------------------------


def disk_is_full(path: Path, data: bytes) -> int:
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("reason", ["full disk", "training that is not JSON"])
def test_failing_save_leaves_what_was_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    before = contents(folder)
    training = TRAINING
    if reason == "full disk":
        monkeypatch.setattr(Path, "write_bytes", disk_is_full)
    else:
        training = {"path": tmp_path}
    other = DeFlowDegrader(small_model(1), training=training, device="cpu")
    for target in (folder, tmp_path / "new"):
        with pytest.raises((OSError, TypeError), match=r"No space left|not JSON serializable"):
            other.save_pretrained(target)
    assert contents(folder) == before
    assert result(load(folder)) == result(make())
    assert contents(tmp_path / "new") == {}


# -- damaged folders ---------------------------------------------------------------------------


def change(path: list[str], value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(["colour"], 1), "unknown setting colour"),
        (change(["model", "stepz"], 1), r"unknown setting model\.stepz; known are: .*steps"),
        (change(["model", "encoder", "depth"], 1), r"unknown setting model\.encoder\.depth"),
        (change(["model", "steps"], "2"), r"model\.steps must be of type int, got '2'"),
        (change(["model", "steps"], True), r"model\.steps must be of type int, got True"),
        (change(["model", "steps"], 0), "steps must be at least 1, got 0"),
        (change(["model", "domains"], "night"), r"model\.domains must be of type tuple"),
        (change(["model", "encoder"], 3), r"model\.encoder.: expected a mapping"),
        (change(["model"], None), "model.: expected a mapping of settings, got None"),
        (change(["training"], [1]), r"training must be a mapping, got \[1\]"),
        (change(["format_version"], 2), "format_version is 2, .* reads 1; update deflow_aug"),
        (change(["format_version"], None), "format_version is None"),
        (lambda config: config.pop("model"), "model.: expected a mapping of settings, got None"),
        (lambda config: config.clear(), "format_version is None"),
    ],
)
def test_wrong_settings_are_named(
    folder: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    damage(config)
    file.write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=message) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize("content", [b"", b'{"format_version": 1,', b"[1, 2]", b"7", b"\xff\xfe"])
def test_settings_that_are_no_json(folder: Path, content: bytes) -> None:
    file = folder / "config.json"
    file.write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{file}: ")


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    good = load_file(file)
    missing = {name: tensor for name, tensor in good.items() if name != "shifts.0.mean"}
    unknown = {**good, "shifts.9.mean": torch.zeros(2)}
    misshapen = {**good, "shifts.0.mean": torch.zeros(5)}
    for tensors, message in (
        (missing, "missing shifts.0.mean"),
        (unknown, "unknown shifts.9.mean"),
        (misshapen, "shifts.0.mean has shape [5], expected [1, 6]"),
    ):
        save_file(tensors, file)
        with pytest.raises(WeightsError) as caught:
            load(folder)
        expected = f"{file} does not fit the model's configuration: {message}"
        assert str(caught.value) == expected


def test_of_many_tensors_that_do_not_fit_some_are_named(folder: Path) -> None:
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    count = len(small_model().state_dict()) + 1
    with pytest.raises(WeightsError, match=f"missing .*; and {count - 10} more$") as caught:
        load(folder)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("ending", "change", "message"),
    [
        (".permutation", torch.zeros_like, "permutation is no permutation"),
        (".permutation", lambda values: values + 9, "permutation is no permutation"),
        (".upper", lambda values: values * math.nan, "upper has values that are not finite"),
        (".lower", lambda values: values + 1j, "lower has complex values"),
    ],
)
def test_values_that_no_model_has(
    folder: Path, ending: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(ending))
    save_file(tensors | {name: change(tensors[name])}, path)
    with pytest.raises(WeightsError, match=message):
        DeFlowDegrader.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("number", [10**400, "[" * 100000])
def test_settings_that_cannot_be_numbers(folder: Path, number: object) -> None:
    path = folder / "config.json"
    text = path.read_text().replace('"shift_init": 0.03', f'"shift_init": {number}')
    path.write_text(text)
    with pytest.raises(WeightsError, match=r"config\.json"):
        DeFlowDegrader.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("kept", [0, 7, 400, -1])
def test_damaged_tensors(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(WeightsError) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{file} is not a readable safetensors file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=f"{folder} holds no {name}: expected a folder that"):
        load(folder)


# -- names -------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose weights/ holds "fog" and "rain", besides what is no weights."""
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "checkout" / "deflow_aug" / "hub.py"))
    root = tmp_path / "checkout" / "weights"
    for name in ("rain", "fog"):
        (root / name).mkdir(parents=True)
        for file, content in files.items():
            (root / name / file).write_bytes(content)
    (root / "README.md").write_text("About these weights.")
    (root / "unfinished").mkdir()
    return root


def test_bundled_weights_are_found_in_a_checkout(bundle: Path) -> None:
    assert hub.bundled_weights() == {"fog": bundle / "fog", "rain": bundle / "rain"}
    assert list(hub.bundled_weights()) == ["fog", "rain"]
    assert result(load("fog")) == result(make())


def test_bundled_weights_are_found_in_an_installed_package(bundle: Path) -> None:
    installed = bundle.parent / "deflow_aug" / "weights"
    installed.parent.mkdir()
    bundle.rename(installed)
    assert hub.bundled_weights() == {"fog": installed / "fog", "rain": installed / "rain"}
    assert result(load("rain")) == result(make())


def test_without_bundled_weights(bundle: Path) -> None:
    bundle.rename(bundle.with_name("elsewhere"))
    assert hub.bundled_weights() == {}
    with pytest.raises(WeightsError, match=r"not among the bundled weights \(none\)"):
        load("fog")


@pytest.mark.parametrize("name", ["snow", "./snow", "../a/b", "a/b/c", "https://hf.co/a/b"])
def test_unknown_name_lists_the_bundled(bundle: Path, name: str) -> None:
    with pytest.raises(WeightsError, match=r"no weights .*bundled weights \(fog, rain\)") as caught:
        load(name)
    assert repr(name) in str(caught.value)


def test_a_file_is_no_weights(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is its path, which looks like one, taken for a Hub id."""
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    Path("checkpoints", "latest.pth").touch()
    with pytest.raises(WeightsError, match=r"latest\.pth is a file: .*deflow-aug convert"):
        load("checkpoints/latest.pth")


def test_a_folder_goes_before_bundled_weights_and_the_hub(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("fog", "someone/fog"):
        make(seed=1).save_pretrained(name)
        assert result(load(name)) == result(make(seed=1)) != result(make())


def test_only_the_hub_has_revisions(bundle: Path) -> None:
    for name in ("fog", bundle / "rain"):
        with pytest.raises(WeightsError, match=r"revision='main' was given for the local weights"):
            load(name, revision="main")


def test_default_weights_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    assert hub.DEFAULT_WEIGHTS in hub.bundled_weights()
    degrader = DeFlowDegrader.from_pretrained(device="cpu")
    assert np.array_equal(degrader.degrade(IMAGE, 0, seed=1), IMAGE)
    one, other = degrader.degrade(IMAGE, n_samples=2, seed=1).astype(float)
    assert np.abs(one - IMAGE).mean() > 0.5
    assert np.abs(one - other).mean() > 0.5
    assert degrader.training_info


# -- the Hub -----------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Answers instead of the Hub; only the address of the downloads is changed."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HubServer() as server:
        address = functools.partial(hf_hub_download, endpoint=server.url)
        monkeypatch.setattr(hub, "hf_hub_download", address)
        yield server


@pytest.fixture
def get(tmp_path: Path) -> Callable[..., DeFlowDegrader]:
    """Loads from the server, with a cache of the test's own."""
    return functools.partial(load, cache_dir=tmp_path / "cache", token=False)


def test_download_and_cache(
    server: HubServer, get: Callable[..., DeFlowDegrader], files: dict[str, bytes]
) -> None:
    server.add(REPO).commit({**files, "big.bin": b"not asked for"})
    assert result(get(REPO)) == result(make())
    assert server.sent == {"config.json": 1, "model.safetensors": 1}
    assert result(get(REPO)) == result(make())
    assert result(get(REPO, local_files_only=True)) == result(make())
    assert server.sent == {"config.json": 1, "model.safetensors": 1}
    get(REPO, force_download=True)
    assert server.sent == {"config.json": 2, "model.safetensors": 2}


def test_new_weights_on_the_hub_are_fetched(
    server: HubServer, get: Callable[..., DeFlowDegrader], files: dict[str, bytes], tmp_path: Path
) -> None:
    repository = server.add(REPO)
    repository.commit(files)
    get(REPO)
    make(seed=1).save_pretrained(tmp_path / "other")
    repository.commit(contents(tmp_path / "other"))
    assert result(get(REPO)) == result(make(seed=1)) != result(make())
    assert server.sent == {"config.json": 1, "model.safetensors": 2}, "config.json is unchanged"


def test_revision(
    server: HubServer, get: Callable[..., DeFlowDegrader], files: dict[str, bytes], tmp_path: Path
) -> None:
    make(seed=1).save_pretrained(tmp_path / "other")
    repository = server.add(REPO)
    first = repository.commit(contents(tmp_path / "other"))
    repository.commit(files)
    repository.commit(contents(tmp_path / "other"), branch="night")
    assert result(get(REPO)) == result(make())
    for revision in ("night", first):
        assert result(get(REPO, revision=revision)) == result(make(seed=1)) != result(make())


def test_what_is_not_on_the_hub(
    server: HubServer, get: Callable[..., DeFlowDegrader], files: dict[str, bytes]
) -> None:
    server.add(REPO).commit(files)
    server.add("someone/empty").commit({"README.md": b"Nothing yet."})
    server.add("someone/half").commit({"config.json": files["config.json"]})
    for name, revision, file, reason in (
        ("someone/other", None, "config.json", "Repository Not Found"),
        (REPO, "elsewhere", "config.json", "Revision Not Found"),
        (REPO, "0" * 40, "config.json", "Revision Not Found"),
        ("someone/empty", None, "config.json", "Entry Not Found"),
        ("someone/half", None, "model.safetensors", "Entry Not Found"),
        ("some--one/tiny", None, "config.json", "annot have -- or .."),
    ):
        with pytest.raises(WeightsError) as caught:
            get(name, revision=revision)
        message = str(caught.value)
        assert message.startswith(f"cannot get {file} of {name!r}: there is no such folder, and ")
        assert reason in message
        assert message.endswith("are you allowed to read it?")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The Hub's client waits before it tries again, up to half a minute in all; here, never."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def test_hub_that_is_down(
    server: HubServer,
    get: Callable[..., DeFlowDegrader],
    files: dict[str, bytes],
    no_waiting: list[float],
) -> None:
    server.add(REPO).commit(files)
    server.failure = 500
    with pytest.raises(WeightsError, match=r"(?s)cannot get config\.json of .*not reached.*500"):
        get(REPO)
    assert no_waiting, "it tries again"
    server.failure = 0
    get(REPO)
    server.failure = 500
    assert result(get(REPO)) == result(make()), "from the cache"


@pytest.mark.parametrize("fault", ["lost connection", "short file"])
def test_download_that_breaks_off(
    server: HubServer,
    get: Callable[..., DeFlowDegrader],
    files: dict[str, bytes],
    no_waiting: list[float],
    tmp_path: Path,
    fault: str,
) -> None:
    server.add(REPO).commit(files)
    if fault == "lost connection":
        server.cut = len(files["config.json"]) + 1  # config.json is smaller and gets through
    else:
        server.missing = 1
    with pytest.raises(WeightsError, match=r"the download of .* of 'someone/tiny' failed: "):
        get(REPO)
    assert not list(tmp_path.rglob("model.safetensors"))
    with pytest.raises(WeightsError, match="not in the cache"):
        get(REPO, local_files_only=True)
    server.cut, server.missing = -1, 0
    assert result(get(REPO)) == result(make())


def test_damaged_files_on_the_hub_are_named(
    server: HubServer, get: Callable[..., DeFlowDegrader], files: dict[str, bytes]
) -> None:
    server.add(REPO).commit({**files, "model.safetensors": files["model.safetensors"][:-9]})
    with pytest.raises(WeightsError, match=r"model\.safetensors is not a readable safetensors"):
        get(REPO)


def test_not_in_the_cache(get: Callable[..., DeFlowDegrader]) -> None:
    with pytest.raises(WeightsError, match=r"(?s)'someone/tiny'.* no such folder, .*the cache"):
        get(REPO, local_files_only=True)


SCRIPT = """
import hashlib, pathlib, sys, time
import numpy as np
from deflow_aug import DeFlowDegrader
from deflow_aug.hub import WeightsError

image = np.frombuffer(bytes.fromhex(sys.argv[1]), np.uint8).reshape(8, 12, 3)

def show(name):
    degrader = DeFlowDegrader.from_pretrained(name, device="cpu")
    print(hashlib.sha256(degrader.degrade(image, seed=1).tobytes()).hexdigest())
    return degrader
"""
ONLINE = """
degrader = show(sys.argv[2])
url = degrader.push_to_hub("someone/tiny", token="hf_secret", private=True)
print(url)
degrader.save_pretrained("tiny", push_to_hub=True, token="hf_secret", branch="second")
show("someone/tiny")
folder = pathlib.Path("own")
folder.mkdir()
(folder / "README.md").write_text("Mine.")
(folder / "run.yaml").write_text("private: true")
degrader.save_pretrained(
    folder, half=True, repo_id="someone/own", push_to_hub=True, token="hf_secret",
    commit_message="Halved.",
)
"""
OFFLINE = """
show("someone/tiny")
start = time.monotonic()
try:
    show("someone/other")
except WeightsError as error:
    print(" ".join(str(error).split()))
print(time.monotonic() - start)
"""


def python(script: str, *arguments: object, home: Path, **settings: str) -> list[str]:
    """Runs it in a fresh process, in the folder ``home``; the lines it prints."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGG"))}
    settings |= {
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "PYTHONPATH": str(Path(deflow_aug.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + script, IMAGE.tobytes().hex(), *map(str, arguments)],
        cwd=home,
        env={**kept, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_push_then_load_then_load_offline(folder: Path, tmp_path: Path) -> None:
    """As users do it: the environment's settings, two processes, one cache."""
    with HubServer() as server:
        lines = python(ONLINE, folder, home=tmp_path, HF_ENDPOINT=server.url)
        local, url, downloaded = lines
        repository, own = server.repositories[REPO], server.repositories["someone/own"]
    assert local == downloaded
    assert repository.private
    assert server.authorization == {"Bearer hf_secret"}
    assert url.startswith(f"{server.url}/{REPO}")
    pushed = repository.commits[repository.branches["main"]]
    assert pushed == contents(folder)
    assert server.sent == {"config.json": 1, "model.safetensors": 1}
    # What the folder holds of a model, not what saving it anew would give.
    sent = own.commits[own.branches["main"]]
    assert sorted(sent) == ["README.md", "config.json", "model.safetensors"]
    assert sent == {name: (tmp_path / "own" / name).read_bytes() for name in sent}
    assert sent["README.md"] == b"Mine."
    assert len(sent["model.safetensors"]) < len(pushed["model.safetensors"])
    # "tiny", the folder's name, is the id where none is given.
    assert (
        repository.commits[repository.branches["second"]] == pushed == contents(tmp_path / "tiny")
    )

    cached, message, seconds = python(
        OFFLINE, home=tmp_path, HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1"
    )
    assert cached == local
    assert message.startswith("cannot get config.json of 'someone/other': ")
    assert "HF_HUB_OFFLINE" in message
    assert float(seconds) < 5


def test_half_precision_halves_the_file_and_rounds(tmp_path: Path) -> None:
    degrader = DeFlowDegrader(small_model(0), device="cpu")
    degrader.save_pretrained(tmp_path / "full")
    degrader.save_pretrained(tmp_path / "half", half=True)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.75 * sizes[0]  # names and shapes take the same place in both
    loaded = DeFlowDegrader.from_pretrained(tmp_path / "half", device="cpu").model.state_dict()
    for name, tensor in degrader.model.state_dict().items():
        assert loaded[name].dtype == tensor.dtype
        expected = tensor.half().float() if tensor.is_floating_point() else tensor
        assert torch.equal(loaded[name], expected), name


def test_half_precision_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    degrader = DeFlowDegrader(small_model(0), device="cpu")
    with torch.no_grad():
        degrader.model.get_parameter("conditioning.trunk.conv_first.weight")[0] = 7e4
    with pytest.raises(ValueError, match=r"conv_first\.weight has values up to 7e\+04, .*65504"):
        degrader.save_pretrained(tmp_path / "half", half=True)
    assert not (tmp_path / "half").exists()
    degrader.save_pretrained(tmp_path / "full")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 10**9}, "tensors are too few for 1 levels of 1000000000 steps"),
        ({"transition_steps": 10**9}, "too few"),
        ({"encoder.blocks": 10**9}, "too few .* 1000000000 encoder.blocks"),
        ({"levels": 10**9}, "levels must be at most 16, got 1000000000"),
        ({"hidden": 10**10}, "no model has such a configuration"),
        ({"encoder.channels": 2**62}, "no model has such a configuration"),
    ],
)
def test_a_configuration_out_of_all_proportion_is_told_at_once(
    settings: dict[str, int], message: str, folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model"]["levels"], config["model"]["split_levels"] = 1, []
    for name, value in settings.items():
        *inside, last = name.split(".")
        part = config["model"]
        for key in inside:
            part = part[key]
        part[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    began = time.monotonic()
    with pytest.raises(WeightsError, match=message):
        DeFlowDegrader.from_pretrained(folder, device="cpu")
    assert time.monotonic() - began < 10


def test_photographs_in_a_folder_of_that_name_do_not_hide_bundled_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / hub.DEFAULT_WEIGHTS).mkdir()
    monkeypatch.chdir(tmp_path)
    config, _ = hub.find_weights(hub.DEFAULT_WEIGHTS)
    assert config.parent == hub.bundled_weights()[hub.DEFAULT_WEIGHTS]
