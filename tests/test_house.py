"""The rules of the house, each kept by a tool: lint, format, types, direction of imports."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        pytest.param("ruff", ["check", "--no-cache"], id="lint"),
        pytest.param("ruff", ["format", "--check", "--diff", "--no-cache"], id="format"),
        pytest.param("mypy", [], id="types"),
        pytest.param("lint-imports", ["--no-cache"], id="imports"),
    ],
)
def test_tool_has_nothing_to_say(tool: str, arguments: list[str]) -> None:
    folders = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    program = shutil.which(tool, path=os.pathsep.join(folders))
    if program is None:
        if os.environ.get("CI"):
            pytest.fail(f"{tool} is not installed; the extra [test] brings it")
        pytest.skip(f"{tool} is not installed; the extra [test] brings it")
    done = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{tool} {' '.join(arguments)}\n{done.stdout}{done.stderr}"
