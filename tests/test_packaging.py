"""What is shipped: the wheel's contents, and that it works alone, with the network off."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

NO_NETWORK = """\
import socket


def refuse(*args, **kwargs):
    raise OSError("the network is off in this test")


socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def run(command: list[str | Path], cwd: Path, **environment: str) -> str:
    """Run a command to its end, and return what it printed; fail with it if the command fails."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=kept | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from that sdist."""
    pytest.importorskip("build", reason="build is not installed; the extra [test] brings it")
    pytest.importorskip("hatchling", reason="hatchling is not installed; [test] brings it")
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT], cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """The names of the files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path, names: set[str]) -> Message:
    (name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(name).decode())


def test_wheel_has_every_module(names: set[str]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "deflow_aug").rglob("*.py")}
    assert modules <= names
    assert "deflow_aug/py.typed" in names


def test_wheel_has_nothing_beside_the_package(names: set[str]) -> None:
    top = {name.split("/")[0] for name in names}
    (information,) = (name for name in top if name.endswith(".dist-info"))
    assert top == {"deflow_aug", information}
    assert f"{information}/licenses/LICENSE" in names
    assert not [name for name in names if "__pycache__" in name]


def test_wheel_has_the_weights(names: set[str]) -> None:
    models = sorted(path.name for path in (ROOT / "weights").iterdir() if path.is_dir())
    assert "camera-noise" in models
    for model in models:
        for file in ("config.json", "model.safetensors", "README.md"):
            assert f"deflow_aug/weights/{model}/{file}" in names


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "deflow-aug"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def test_sdist_has_what_the_tests_need(distributions: Path) -> None:
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        inside = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {
        "LICENSE",
        "README.md",
        "constraints.txt",
        "examples/images/LICENSE",
        "examples/images/dog.png",
        "pyproject.toml",
        "setup.cfg",
        "tests/test_packaging.py",
        "weights/README.md",
    } <= inside


def test_constraints_pin_every_requirement(metadata: Message) -> None:
    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    for text in metadata.get_all("Requires-Dist", []):
        wanted = Requirement(text)
        if canonicalize_name(wanted.name) == "deflow-aug":
            continue
        for pin in pins[canonicalize_name(wanted.name)]:
            (exact,) = pin.specifier
            assert exact.operator == "=="
            assert wanted.specifier.contains(exact.version), f"{pin} is outside {wanted}"


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of a clean environment: the wheel installed, and no network.

    What the package depends on is borrowed from the environment that runs the tests.
    """
    home = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(home, with_pip=True)
    folder = home / ("Scripts" if os.name == "nt" else "bin")
    python = folder / "python"
    run([python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", wheel], cwd=home)
    # Only now, so that pip saw an empty environment. These paths come after the environment's
    # own, and the checkout is on none of them.
    site = Path(
        run([python, "-c", "import sysconfig as s; print(s.get_path('purelib'))"], home).strip()
    )
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "borrowed.pth").write_text("\n".join([*sorted(borrowed), "import no_network\n"]))
    (site / "no_network.py").write_text(NO_NETWORK)
    return folder


def test_clean_environment_imports_the_wheel_and_has_no_network(
    scripts: Path, tmp_path: Path
) -> None:
    where = run([scripts / "python", "-c", "import deflow_aug as d; print(d.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(scripts.parent)
    connect = (
        "import socket\n"
        "try: socket.create_connection(('127.0.0.1', 9))\n"
        "except OSError as error: print(error)"
    )
    assert "network is off" in run([scripts / "python", "-c", connect], tmp_path)


def test_installed_wheel_degrades_a_photograph(scripts: Path, tmp_path: Path) -> None:
    photograph = ROOT / "examples" / "images" / "dog.png"
    program = shutil.which("deflow-aug", path=str(scripts))
    assert program is not None
    output = tmp_path / "degraded"
    run(
        [program, "degrade", photograph, "--output", output],
        cwd=tmp_path,
        HOME=str(tmp_path),
        HF_HOME=str(tmp_path / "hub"),
        HF_HUB_OFFLINE="1",
    )
    (written,) = (path for path in output.iterdir() if path.suffix == ".png")
    with Image.open(photograph) as before, Image.open(written) as after:
        assert after.size == before.size
        assert after.mode == before.mode
        change = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    assert 0.5 < np.abs(change).mean() < 30
