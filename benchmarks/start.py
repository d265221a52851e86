"""How long it takes until there is a degrader.

    python benchmarks/start.py

Each is the least of some runs, in processes of their own: a module once imported is not again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

PROGRAM = """
import sys, time
{before}
start = time.perf_counter()
{timed}
print(time.perf_counter() - start)
{after}
"""

PARTS = {
    "import deflow_aug": {
        "before": "",
        "timed": "import deflow_aug",
        "after": "assert 'torch' not in sys.modules",
    },
    "import torch": {"before": "", "timed": "import torch", "after": ""},
    "from_pretrained, after torch is imported": {
        "before": "import torch",
        "timed": "from deflow_aug import DeFlowDegrader; DeFlowDegrader.from_pretrained()",
        "after": "",
    },
}


def seconds(part: dict[str, str]) -> float:
    command = [sys.executable, "-c", PROGRAM.format(**part)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    for name, part in PARTS.items():
        least = min(seconds(part) for _ in range(repeat))
        print(f"{name}: {least:.3f} s, the least of {repeat}", flush=True)


if __name__ == "__main__":
    main()
