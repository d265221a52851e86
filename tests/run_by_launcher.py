"""What test_distributed.py has a launcher start in two processes: a few short runs."""

from __future__ import annotations

import json
import math
import signal
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_run import MODEL, paired, recipe, unpaired
from torch.nn.parallel import DistributedDataParallel

from deflow_aug.config import ConfigError
from deflow_aug.training.loop import Progress, Trainer
from deflow_aug.training.recipe import Recipe

DOMAINS = ("low", "vintage")
MIXED = recipe(model=replace(MODEL, domains=DOMAINS), batch_size=6, steps=6)
BOTH = replace(MIXED, batch_size=8, paired_share=0.25, match_statistics=True)


def train(folder: Path, output: Path, settings: Recipe, pairs: bool = False) -> Trainer:
    """A trainer of these settings on the test's data; pairs are of the first domain."""
    singles, couples = settings.batch_sizes(paired=pairs)
    return Trainer(
        settings,
        unpaired(folder / "data", DOMAINS, singles),
        output,
        accelerator=torch.device("cpu"),
        paired=paired(folder / "pairs", DOMAINS[0], couples) if pairs else None,
    )


def write(folder: Path, name: str, run: Trainer, log: list[Progress]) -> None:
    """What this process has got."""
    states = {f"model.{k}": v for k, v in run.model.state_dict().items()}
    states |= {f"average.{k}": v for k, v in run.average.state_dict().items()}
    rank = run.processes.part[0]
    save_file({k: v.contiguous() for k, v in states.items()}, folder / f"{name}-{rank}.safetensors")
    (folder / f"{name}-{rank}.json").write_text(json.dumps([asdict(entry) for entry in log]))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, settings, pairs in (("mixed", MIXED, False), ("both", BOTH, True)):
        # In two parts, so that the second one resumes.
        half: list[Progress] = []
        train(folder, folder / name, replace(settings, steps=4), pairs).run(half.append)
        run = train(folder, folder / name, settings, pairs)
        assert run.step == 4
        assert isinstance(run.objective, DistributedDataParallel)
        assert run.processes.count == 2
        run.run(half.append)
        write(folder, name, run, half)

    run = train(folder, folder / "spoiled", MIXED)
    rank = run.processes.part[0]
    honest = run.model.nll
    spoil = {2} if rank == 1 else {}
    run.model.nll = (  # type: ignore[method-assign]
        lambda *a, **k: honest(*a, **k) * (math.nan if run.step in spoil else 1.0)
    )
    log: list[Progress] = []

    def stop(progress: Progress) -> None:
        log.append(progress)
        if progress.step == 4 and rank == 1:
            signal.raise_signal(signal.SIGTERM)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not run.run(stop)
    write(folder, "spoiled", run, log)

    try:
        train(folder, folder / "odd", replace(MIXED, batch_size=7))
    except ConfigError as error:
        (folder / f"error-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
