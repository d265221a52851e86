"""The model card of trained weights, from what is known of their training."""

from __future__ import annotations

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


def model_card(model: DeFlow, training: dict[str, Any]) -> str:
    """Markdown with the Hub's metadata header: what it is, how to use it, how it was trained.

    Args:
        training: JSON values; nested mappings become sub-lists. The entry "notes", a text, is
            set above them as a paragraph of its own.
    """
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        _HEADER,
        "# Learned image degradation (DeFlow)",
        "",
        "A conditional normalizing flow that turns clean images into degraded ones, as many "
        "different versions as you ask for; learned from unpaired images "
        "([DeFlow, CVPR 2021](https://arxiv.org/abs/2101.05796)).",
        "",
        "```python",
        "from deflow_aug import DeFlowDegrader",
        "",
        'degrader = DeFlowDegrader.from_pretrained("this folder, or its Hub id")',
        "degraded = degrader.degrade(image, temperature=1.0, n_samples=3, seed=0)",
        "```",
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
    notes = facts.pop("notes", None)
    if notes:
        lines += [str(notes), ""]
    lines += _items(facts) if facts else ["Not recorded."]
    return "\n".join(lines) + "\n"


def _items(facts: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}- {key}:", *_items(value, indent + "  ")]
        else:
            lines.append(f"{indent}- {key}: {value}")
    return lines
