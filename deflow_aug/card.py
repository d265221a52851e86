"""The model card of trained weights, from what is known of their training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deflow_aug.model import DeFlow

_HEADER = """---
library_name: deflow_aug
pipeline_tag: image-to-image
tags:
- image-degradation
- data-augmentation
- normalizing-flow
- super-resolution
- model_hub_mixin
---
"""

_CAPTIONS = {
    "curves": "The training, step by step; pale: single steps. After the last one the shifts are "
    "corrected.",
    "samples": "Clean crops, samples from them at several temperatures, and real degraded crops. "
    "Below: their noise, and its statistics (standard deviation in 1/255, correlation of "
    "neighbours and of channels). These are pieces of the photographs that it was trained on: "
    "remove the picture if they must not be published.",
}


def model_card(
    model: DeFlow, training: Mapping[str, Any], *, pictures: Mapping[str, str] | None = None
) -> str:
    """Markdown with the Hub's metadata header: what it is, how to use it, how it was trained.

    Args:
        training: JSON values; nested mappings become sub-lists. The entry "notes", a text, is
            set above them as a paragraph of its own, and "data", facts by the name of a folder,
            as a table if each has several.
        pictures: paths, relative to the card, of "curves" and "samples".
    """
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        _HEADER,
        "# Learned image degradation (DeFlow)",
        "",
        "A conditional normalizing flow that turns clean images into degraded ones, as many "
        f"different versions as you ask for; learned from {_kind(training)} images "
        "([DeFlow, CVPR 2021](https://arxiv.org/abs/2101.05796)).",
        "",
        "## Use",
        "",
        *_usage(config.domains),
        "",
        "## Model",
        "",
        f"- {parameters / 1e6:.2f} million parameters; {config.levels} levels of {config.steps} "
        f"flow steps, {config.hidden} hidden channels; h(x) downscales by {config.scale}",
        f"- degraded domains: {', '.join(config.domains)}",
        *(
            f"- results in the domain {name} get its channel statistics (see config.json)"
            for name in config.statistics or ()
        ),
        "",
        "## Training",
        "",
    ]
    facts = dict(training)
    notes, data = facts.pop("notes", None), facts.get("data")
    tabular = isinstance(data, Mapping) and all(isinstance(f, Mapping) for f in data.values())
    if notes:
        lines += [str(notes), ""]
    if data and tabular:
        lines += [*_table(facts.pop("data")), ""]
    if facts or not data:
        lines += [*(_items(facts) if facts else ["Not recorded."]), ""]
    for name, path in (pictures or {}).items():
        lines += [f"![{name.capitalize()}]({path})", "", f"*{_CAPTIONS[name]}*", ""]
    return "\n".join(lines)


def _kind(training: Mapping[str, Any]) -> str:
    """Whether the images were pairs."""
    data = training.get("data")
    facts = data.values() if isinstance(data, Mapping) else ()
    paired = ["pairs" in fact for fact in facts if isinstance(fact, Mapping)]
    return "unpaired" if not any(paired) else "paired" if all(paired) else "unpaired and paired"


def _usage(domains: tuple[str, ...]) -> list[str]:
    """How to degrade with it."""
    several = len(domains) > 1
    named = f', domain="{domains[0]}"' if several else ""
    lines = [
        "```python",
        "from deflow_aug import DeFlowDegrader",
        "",
        'degrader = DeFlowDegrader.from_pretrained("this folder, or its Hub id")',
        f"degraded = degrader.degrade(image, temperature=1.0, n_samples=3, seed=0{named})",
        "```",
    ]
    if several:
        lines += ["", f"Its domains are {', '.join(f'`{name}`' for name in domains)}."]
    return lines


_COLUMNS = ("folder", "images", "megapixels", "left out", "sha256")


def _table(data: Mapping[str, Any]) -> list[str]:
    """The folders, one a row; facts that have no column of their own come last."""
    lines = [f"| data | {' | '.join(_COLUMNS)} | |", "|---|---|---:|---:|---:|---|---|"]
    for name, given in data.items():
        fact = dict(given)
        pairs = fact.pop("pairs", None)
        images = fact.pop("images", "") if pairs is None else f"{pairs} pairs"
        pixels, left_out = fact.pop("pixels", None), fact.pop("left_out", None)
        if isinstance(left_out, Mapping):
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
            left_out = reasons or 0
        cells = [
            name,
            fact.pop("folder", ""),
            images,
            "" if pixels is None else f"{pixels / 1e6:.1f}",
            "" if left_out is None else left_out,
            f"`{str(fact.pop('sha256', ''))[:16]}`".replace("``", ""),
            "; ".join(f"{key}: {_inline(value)}" for key, value in fact.items()),
        ]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return lines


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(_inline(item) for item in value)
    return str(value)


def _items(facts: Mapping[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}- {key}:", *_items(value, indent + "  ")]
        else:
            lines.append(f"{indent}- {key}: {value}")
    return lines
