"""Tell what weights are: settings, size, training data, health of the latent shift."""

from __future__ import annotations

import json

from jsonargparse import ArgumentParser, Namespace

from deflow_aug import hub
from deflow_aug.config import to_dict
from deflow_aug.latent import ShiftHealth

KINDS = {
    "full": "any Sigma",
    "diagonal": "diagonal Sigma",
    "zero": "Sigma fixed at zero",
    "fitted": "fitted to the latents after training",
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "weights",
        nargs="?",
        type=str,
        default=hub.DEFAULT_WEIGHTS,
        help="name of bundled weights, a folder, or a Hugging Face Hub id",
    )


def run(arguments: Namespace) -> int:
    config_path, weights_path = hub.find_weights(arguments.weights)
    pretrained = hub.load(config_path, weights_path)
    model = pretrained.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"weights   {weights_path.parent}")
    print(
        f"size      {parameters / 1e6:.2f} million parameters, "
        f"{weights_path.stat().st_size / 1e6:.2f} MB on disk"
    )
    for title, values in (("model", to_dict(model.config)), ("training", pretrained.training)):
        print(title)
        for key, value in values.items():
            print(f"  {key}: {value if isinstance(value, str) else json.dumps(value)}")
    print(f"latent shift u ~ N(mu, Sigma), {KINDS[model.config.shift]}")
    collapsed = []
    for index, domain in enumerate(model.config.domains, start=1):
        healths = [ShiftHealth.of(shift, index) for shift in model.domain_shifts()]
        for number, health in enumerate(healths):
            note = "; collapsed" * health.collapsed
            print(f"  {domain}, latent {number}: {health}{note}")
        if all(health.collapsed for health in healths):
            collapsed.append(domain)
    if collapsed:
        print(
            f"warning: Sigma has collapsed ({', '.join(collapsed)}): M is zero or nearly so, "
            "and the latents of every image are shifted by the same amount. Samples of one image "
            "differ only by dequantisation noise, and without that hardly at all. To switch it on: "
            "'deflow-aug degrade --dequantize', or "
            "DeFlowDegrader.from_pretrained(..., dequantize=True). To learn real randomness: "
            "fine-tune from it, 'deflow-aug train --from', which starts M anew; or fit a new "
            "domain to degraded photographs, 'deflow-aug adapt'."
        )
    return 0
