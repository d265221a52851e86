"""An evaluation as tables, and as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .compare import Evaluation, Figures
from .measured import BY_RESOLUTION
from .tables import Table, without_nan

MOST_MISSED = 0.05
"""Where more of the real values is left out of ``kld_noiseflow``, it stands in brackets."""

_MISSED = (
    "Left out: share of the real values in bins that the synthetic noise never reaches, which the "
    f"definition ignores; where it is more than {100 * MOST_MISSED:g} %, the figure is in round "
    "brackets and means nothing."
)
_AKLD = (
    "akld favours noise whose local variance scatters little: white noise of the right level "
    "comes out before a second shot of correlated noise. Read it beside the noise levels below."
)
_FLOORS = (
    "Floors are real noise against real noise. Same picture: of other places of the picture, with "
    "its camera and ISO, but another motif (halves; neighbouring patches for kld_srgb; local "
    "variances 16 pixels apart for akld). Other pictures: of all others together, and for what is "
    "pooled the mean of random halves of the pictures against each other. Neither is a limit: a "
    "degrader knows the motif, which the first has not, but not the ISO."
)


def tables(evaluation: Evaluation) -> list[Table]:
    """All figures, a row for each degrader and each floor."""
    first = next(iter(evaluation.methods))
    count = f"{len(evaluation.pairs)} pairs"
    if evaluation.scenes != len(evaluation.pairs):
        count += f" of {evaluation.scenes} scenes"
    found = [
        _table(
            evaluation,
            "Divergence from the real noise",
            {
                "kld_noiseflow": "kld_noiseflow",
                "pooled": "kld_pooled",
                "left out": "missed",
                "kld_srgb": "kld_srgb",
                "akld": "akld",
            },
            (
                f"In nats; 0 is best. Mean over {count}, {evaluation.draws} draws each, at "
                f"temperature {evaluation.temperature:g}; in square brackets the 95 % bootstrap "
                "interval over pictures, or scenes. kld_noiseflow: of each picture, summed over "
                "full, half and quarter resolution; pooled: the same of all pictures' noise "
                "together; kld_srgb: of patches of 32 x 32 pixels; akld: of local variances.",
                _MISSED,
                _AKLD,
                _FLOORS + " akld of the same picture: local variances 16 pixels apart; kld_srgb: "
                "neighbouring patches; kld_noiseflow: halves.",
            ),
        ),
        _table(
            evaluation,
            "kld_noiseflow by resolution",
            dict(zip(("full", "half", "quarter"), BY_RESOLUTION, strict=True)),
            ("The coarser ones see correlation between pixels, which the first cannot.",),
        ),
        _table(
            evaluation,
            "Structure and variety",
            {
                "level": "level",
                "autocorrelation": "correlation",
                "channels": "covariance",
                "spectrum": "spectrum",
                "variety": "variety",
            },
            (
                "Relative L2 errors of the curves of all pictures together, 0 is best, no noise at "
                "all has 1: noise level against intensity; autocorrelation for shifts of up to 8 "
                "pixels; covariance between the channels; amplitude by spatial frequency. Variety: "
                "variance between samples of one picture by that of the real noise; 1 is best, "
                "what gives the same each time has 0.",
            ),
        ),
    ]
    if evaluation.bits:
        found.append(_bits(evaluation))
    if evaluation.differences:
        columns = {"kld_noiseflow": "kld_noiseflow", "kld_srgb": "kld_srgb", "akld": "akld"}
        columns |= {"level": "level", "autocorrelation": "correlation", "spectrum": "spectrum"}
        found.append(
            Table(
                f"How much farther from the real noise than {first}",
                ("", *columns),
                tuple(
                    (name, *_cells(figures, columns.values(), evaluation.methods[name]))
                    for name, figures in evaluation.differences.items()
                ),
                (
                    f"Figures less those of {first}, resample by resample: where an interval lies "
                    f"above 0, {first} is nearer to the real noise.",
                ),
            )
        )
    return found


def to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """All figures with their intervals as plain numbers, for JSON."""
    groups = ("methods", "floors", "differences")
    return dict(
        without_nan(
            {
                "pairs": [pair.name for pair in evaluation.pairs],
                "scenes": evaluation.scenes,
                "temperature": evaluation.temperature,
                "draws": evaluation.draws,
                "seed": evaluation.seed,
                **{
                    group: {
                        name: {figure: asdict(i) for figure, i in figures.items()}
                        for name, figures in getattr(evaluation, group).items()
                    }
                    for group in groups
                },
                "bits": {name: asdict(bits) for name, bits in evaluation.bits.items()},
            }
        )
    )


def _table(
    evaluation: Evaluation, title: str, columns: Mapping[str, str], notes: Sequence[str]
) -> Table:
    rows = {**evaluation.methods, **evaluation.floors}
    cells = ((name, *_cells(f, columns.values(), f)) for name, f in rows.items())
    return Table(title, ("", *columns), tuple(cells), tuple(notes))


def _cells(figures: Figures, keys: Sequence[str] | Any, own: Figures) -> list[str]:
    """Cells of one row; ``own`` tells what ``kld_noiseflow`` of this row leaves out."""
    cells = []
    for key in keys:
        text = figures[key].text()
        if key.startswith(("kld_noiseflow", "kld_pooled")) and own["missed"].value > MOST_MISSED:
            text = f"({figures[key].value:.3f})"
        cells.append(text)
    return cells


def _bits(evaluation: Evaluation) -> Table:
    rows = tuple(
        (name, bits.degraded.text(), bits.clean.text(), bits.saved.text())
        for name, bits in evaluation.bits.items()
    )
    return Table(
        "Bits per dimension of the real degraded pictures",
        ("", "degraded domain", "clean domain", "difference"),
        rows,
        (
            "Negative log2-likelihood of the 8-bit pictures by their size (3 H W), as pictures of "
            "the degraded domain, and as if they were clean ones; lower is better. The density at "
            "the centres of 8-bit bins, without dequantisation noise, whatever noise the model was "
            "trained with: models that were trained with the same noise can be compared. Above 0, "
            "the difference says that the model takes them for degraded. The baselines have no "
            "density.",
        ),
    )
