"""Tell what weights are: settings, size, training data, health of the latent shift."""

from __future__ import annotations

import json

from jsonargparse import ArgumentParser, Namespace

from deflow_aug import hub
from deflow_aug.config import to_dict
from deflow_aug.latent import ShiftHealth


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
    print("latent shift u ~ N(mu, Sigma)")
    collapsed = False
    for number, shift in enumerate(model.domain_shifts()):
        for index, domain in enumerate(model.config.domains, start=1):
            health = ShiftHealth.of(shift, index)
            collapsed |= health.collapsed
            print(f"  {domain}, latent {number}: {health}")
    if collapsed:
        print(
            "warning: Sigma has collapsed: u is a constant, so samples of one image differ only "
            "by dequantisation noise (if that is switched on). Train with shift_init > 0."
        )
    return 0
