"""Saved models in the Hub's layout: the two files of `checkpoint` and a README card.

The format is that of resunet_fast/checkpoint.py and no other: safetensors and a checked
config.json, never a pickle. Folders are read and written without a network connection.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from .checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    ModelConfig,
    SavedModel,
    load,
    save,
)
from .frozen import FrozenResUNet
from .sentences import first_line

try:
    from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
except ModuleNotFoundError as error:
    raise ImportError(
        "save_pretrained and from_pretrained need the package 'huggingface_hub', which is not"
        ' installed: pip install "resunet_fast[hub]"'
    ) from error


class HubModel(
    ModelHubMixin,
    library_name="resunet_fast",
    pipeline_tag="image-segmentation",
    tags=["image-segmentation", "unet"],
):
    """A saved model with the mixin's save_pretrained, from_pretrained and push_to_hub.

    Args:
        network: in evaluation mode.
        config: from which `config.build()` gives this network's class.
    """

    def __init__(self, network: nn.Module, config: ModelConfig) -> None:
        self.saved = SavedModel(network, config)

    def _save_pretrained(self, save_directory: Path) -> None:
        save(save_directory, self.saved.network, self.saved.config)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        device: str = "cpu",
        **_: Any,
    ) -> HubModel:
        directory = Path(model_id)
        if not directory.is_dir():
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                file = hf_hub_download(
                    model_id,
                    name,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            directory = Path(file).parent
        saved = load(directory, device)
        return cls(saved.network, saved.config)

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """Return the README: how to use the model, what it is, and the facts of its training."""
        data = self._hub_mixin_info.model_card_data.to_yaml()
        return ModelCard(f"---\n{data}\n---\n\n{_card(self.saved)}")


def save_pretrained(
    model: SavedModel, directory: str | Path, *, repo_id: str | None = None, **keywords: Any
) -> str | None:
    """Write a saved model in the Hub's layout: model.safetensors, config.json, README.md.

    Args:
        model: what `checkpoint.load` or :func:`from_pretrained` returned.
        directory: created if need be; a README that is there already is kept.
        repo_id: "user/name", to push it there as well.
        keywords: of the mixin's `push_to_hub`.

    Returns:
        The address of the commit if it was pushed, else None.

    Raises:
        OSError: the directory cannot be written.
    """
    hub = HubModel(model.network, model.config)
    return hub.save_pretrained(
        directory, repo_id=repo_id, push_to_hub=repo_id is not None, **keywords
    )


def from_pretrained(name: str | Path, *, device: str = "cpu", **keywords: Any) -> SavedModel:
    """Read a model from a folder or from the Hub.

    Args:
        name: a directory, or "user/name" on the Hub.
        device: where the network is put.
        keywords: of the mixin: revision, cache_dir, force_download, local_files_only, token.

    Returns:
        The network in evaluation mode, with its configuration.

    Raises:
        CheckpointError: it is not there, is damaged, or is no model of this library.
    """
    if Path(name).is_dir():
        return load(name, device)
    try:
        return HubModel.from_pretrained(name, device=device, **keywords).saved
    except CheckpointError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        # The mixin reads config.json as well, and takes any JSON for an object.
        raise CheckpointError(
            f"{name} is neither a folder nor readable on the Hub: {first_line(error)}"
        ) from error


def _card(saved: SavedModel) -> str:
    config = saved.config
    network = saved.network
    # A frozen network has no parameters, but tensors of its own; its batch norms are folded.
    frozen = isinstance(network, FrozenResUNet)
    tensors = network.state_dict().values() if frozen else network.parameters()
    facts = {
        "network": config.name,
        "parameters": f"{sum(tensor.numel() for tensor in tensors):,}",
        "input": f"{config.in_channels} channels in [0, 1], any size",
        "output": f"{config.num_classes} logit per pixel ({config.task})",
        **{key: _short(value) for key, value in config.arguments.items()},
        **{key: _short(value) for key, value in asdict(config.normalisation).items()},
    }
    training = {key: _short(value) for key, value in config.training.items()}
    return "\n".join(
        [
            f"# {config.name} for {config.task.replace('_', ' ')}",
            "",
            "```python",
            "import resunet_fast as rf",
            "",
            'model = rf.from_pretrained("this folder or repository")',
            'mask = rf.segment(model, "image.png").mask',
            "```",
            "",
            *_table("model", facts),
            "",
            *(
                _table("training", training)
                if training
                else ["How it was trained is not recorded."]
            ),
            "",
        ]
    )


def _table(title: str, facts: dict[str, str]) -> list[str]:
    return [
        f"| {title} | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts.items()),
    ]


def _short(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value)).replace("|", "\\|")
