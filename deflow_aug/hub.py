"""Weights on disk: a Hugging Face Hub repository, or the same files in a folder.

``config.json``        format version, architecture, and what is known of the training
``model.safetensors``  the tensors
``README.md``          the model card
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from deflow_aug.config import ConfigError, ModelConfig, from_dict, to_dict
from deflow_aug.model import DeFlow

DEFAULT_WEIGHTS = "camera-noise"
FORMAT_VERSION = 1


class WeightsError(OSError):
    """Weights cannot be found, fetched or used; the message says why and what to do."""


@dataclass
class Pretrained:
    """A model and what its ``config.json`` tells of its training (JSON values, free form)."""

    model: DeFlow
    training: dict[str, Any] = field(default_factory=dict)


def bundled_weights() -> dict[str, Path]:
    """Weights that come with the library: folder by name."""
    package = Path(__file__).parent
    # In a wheel they lie in the package; in a checkout at its top level.
    for root in (package / "weights", package.parent / "weights"):
        if root.is_dir():
            return {
                folder.name: folder
                for folder in sorted(root.iterdir())
                if (folder / CONFIG_NAME).is_file()
            }
    return {}


def find_weights(name: str | os.PathLike[str], **download: Any) -> tuple[Path, Path]:
    """The paths of ``config.json`` and ``model.safetensors``.

    Args:
        name: a folder, the name of bundled weights, or a Hub id ("user/model").
        download: arguments of ``huggingface_hub.hf_hub_download``, for Hub ids.

    Raises:
        WeightsError: if there are none by that name or they cannot be fetched.
    """
    text = os.fspath(name)
    bundled = bundled_weights()
    folder: Path | None = Path(text)
    # A folder of photographs that happens to have the name of bundled weights is not meant.
    if not Path(text).is_dir() or (text in bundled and not (Path(text) / CONFIG_NAME).is_file()):
        folder = bundled.get(text)
    if folder is not None:
        if download.get("revision") is not None:
            raise WeightsError(
                f"revision={download['revision']!r} was given for the local weights {text!r}; "
                "only weights on the Hub have revisions"
            )
        for file in (CONFIG_NAME, SAFETENSORS_SINGLE_FILE):
            if not (folder / file).is_file():
                raise WeightsError(
                    f"{folder} holds no {file}: expected a folder that save_pretrained or "
                    "'deflow-aug train' wrote"
                )
        return folder / CONFIG_NAME, folder / SAFETENSORS_SINGLE_FILE
    if Path(text).is_file():  # and, as folder/file, no Hub id
        raise WeightsError(
            f"{text} is a file: weights are a folder that save_pretrained, 'deflow-aug train' or, "
            "from a published .pth file, 'deflow-aug convert' wrote"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or text.startswith("."):
        raise WeightsError(
            f"no weights {text!r}: it is no folder, no Hub id ('user/model'), and not among the "
            f"bundled weights ({', '.join(bundled) or 'none'})"
        )
    return _download(text, CONFIG_NAME, download), _download(
        text, SAFETENSORS_SINGLE_FILE, download
    )


def _download(repo: str, file: str, download: Mapping[str, Any]) -> Path:
    try:
        return Path(hf_hub_download(repo, file, library_name="deflow_aug", **download))
    except LocalEntryNotFoundError as error:
        reason = f" ({error.__cause__})" if error.__cause__ else ""
        raise WeightsError(
            f"cannot get {file} of {repo!r}: there is no such folder, it is not in the cache, and "
            f"the Hub was not reached{reason}; check the name and the connection (and "
            "HF_HUB_OFFLINE)"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise WeightsError(
            f"cannot get {file} of {repo!r}: there is no such folder, and from the Hub: {error}; "
            "is the id right, is it a deflow_aug model, and are you allowed to read it?"
        ) from error
    except Exception as error:  # those of the HTTP library, which changes, come through as well
        raise WeightsError(f"the download of {file} of {repo!r} failed: {error}") from error


def load(config_path: Path, weights_path: Path) -> Pretrained:
    """Read a model, on the CPU, in evaluation mode.

    Raises:
        WeightsError: for files that are damaged or do not fit each other; the message names the
            setting or the tensors.
    """
    try:
        values = json.loads(config_path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ConfigError(f"expected a mapping of settings, got {values!r:.50}")
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"format_version is {version!r}, this version of deflow_aug reads "
                f"{FORMAT_VERSION}; update deflow_aug"
            )
        unknown = sorted(set(values) - {"format_version", "library_version", "model", "training"})
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}")
        training = values.get("training", {})
        if not isinstance(training, dict):
            raise ConfigError(f"training must be a mapping, got {training!r:.50}")
        settings: Any = values.get("model")
        config = from_dict(ModelConfig, settings, "model.")
    # ConfigError, JSONDecodeError and UnicodeDecodeError are ValueErrors.
    except (ValueError, OverflowError, RecursionError) as error:
        raise WeightsError(f"{config_path}: {error}") from error
    try:
        tensors = load_file(weights_path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{weights_path} is not a readable safetensors file: {error}") from error
    return Pretrained(build(config, tensors, weights_path), training)


def build(config: ModelConfig, tensors: Mapping[str, Tensor], source: object) -> DeFlow:
    """A model of these tensors, in evaluation mode.

    Raises:
        WeightsError: unless names and shapes agree, and the values are such as a model can have;
            the message names those that do not, and ``source``.
    """
    # Each of them has several tensors. To lay out a model of 10^9 steps would take forever.
    parts = config.levels * (config.steps + config.transition_steps) + config.encoder.blocks
    if parts > max(1000, len(tensors)):
        raise WeightsError(
            f"{source} does not fit the model's configuration: {len(tensors)} tensors are too few "
            f"for {config.levels} levels of {config.steps} steps and {config.transition_steps} "
            f"transition steps, and {config.encoder.blocks} encoder.blocks"
        )
    # On the meta device nothing is computed, and no random number drawn, for values that are
    # replaced at once.
    try:
        with torch.device("meta"):
            model = DeFlow(config).float()  # whatever torch's default dtype is
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes that no tensor can have
        raise WeightsError(f"{source}: no model has such a configuration: {error}") from error
    expected = model.state_dict()
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    problems += [
        f"{name} {wrong}"
        for name in expected
        if name in tensors and (wrong := _damage(name, tensors))
    ]
    if problems:
        shown = "; ".join(problems[:10])
        if len(problems) > 10:
            shown += f"; and {len(problems) - 10} more"
        raise WeightsError(f"{source} does not fit the model's configuration: {shown}")
    model.load_state_dict(
        {name: tensors[name].to(expected[name].dtype) for name in expected}, assign=True
    )
    return model.eval()


def _damage(name: str, tensors: Mapping[str, Tensor]) -> str:
    """What no model has in the tensor of this name, or nothing."""
    tensor = tensors[name]
    if tensor.is_complex():
        return "has complex values"
    if not bool(torch.isfinite(tensor).all()):
        return "has values that are not finite"
    if name.endswith(".permutation") and tensor.sort().values.tolist() != list(range(len(tensor))):
        return "is no permutation"
    return ""


def save(folder: Path, pretrained: Pretrained, library_version: str, *, half: bool = False) -> None:
    """Write ``config.json`` and ``model.safetensors``, each under a temporary name first.

    Args:
        half: store the weights in float16. The file is half as large, and what is loaded from it
            (always float32) differs by that rounding.

    Raises:
        ValueError: a weight is too large for float16.
    """
    values = {
        "format_version": FORMAT_VERSION,
        "library_version": library_version,
        "model": to_dict(pretrained.model.config),
        "training": pretrained.training,
    }
    tensors = {
        name: (_halved(name, tensor) if half and tensor.is_floating_point() else tensor)
        .detach()
        .cpu()
        .contiguous()
        for name, tensor in pretrained.model.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f".{SAFETENSORS_SINGLE_FILE}.partial"
    config = folder / f".{CONFIG_NAME}.partial"
    try:
        # Not save_file: killed, it leaves a temporary file with a name that nobody knows.
        weights.write_bytes(to_bytes(tensors, {"format": "pt"}))
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        os.replace(weights, folder / SAFETENSORS_SINGLE_FILE)
        os.replace(config, folder / CONFIG_NAME)
    finally:
        weights.unlink(missing_ok=True)
        config.unlink(missing_ok=True)


def _halved(name: str, tensor: Tensor) -> Tensor:
    half = tensor.half()
    if bool((half.isinf() & tensor.isfinite()).any()):
        raise ValueError(
            f"{name} has values up to {float(tensor.abs().max()):.3g}, float16 ends at "
            f"{torch.finfo(torch.float16).max:.0f}: save without half=True"
        )
    return half


def push(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Push model using deflow_aug.",
    **upload: Any,
) -> str:
    """Send what :func:`save` wrote, and the model card beside it, to the Hub.

    Args:
        folder: of which no other file is sent.
        upload: ``branch``, and further arguments of ``huggingface_hub.HfApi.upload_folder``.

    Returns:
        The commit.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
    upload.setdefault("allow_patterns", [CONFIG_NAME, SAFETENSORS_SINGLE_FILE, "README.md"])
    commit: str = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        revision=upload.pop("branch", None),
        **upload,
    )
    return commit
