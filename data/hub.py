"""Named checkpoints: presets resolve to a local directory, through the Hugging Face hub's own cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import errors, snapshot_download

from data.tasks import TINY

PRESETS = {
    "tiny": TINY / "model",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
}
# Configuration, tokenizer, safetensors: never a pickle, and not the `original/` copies of the Llama repositories
FILES = ["config.json", "tokenizer.json", "tokenizer.model", "model.safetensors*", "model-*.safetensors"]


def check_known(model: str) -> None:
    """Raises ValueError for what is neither a directory nor a preset.  Downloads nothing."""
    if model not in PRESETS and not Path(model).is_dir():
        raise ValueError(f"unknown model {model!r}: neither a directory nor one of {', '.join(PRESETS)}")


def resolve(model: str) -> Path:
    """A preset's name or a directory -> a directory on disk, downloading what the cache lacks.

    Progress, resume and offline mode are huggingface_hub's own.  Raises ValueError with what to do instead.
    """
    check_known(model)
    preset = PRESETS.get(model, Path(model))
    if isinstance(preset, Path):
        return preset
    instead = "or pass --model DIRECTORY with config.json, tokenizer and safetensors files"
    try:
        return Path(snapshot_download(preset, allow_patterns=FILES))
    except errors.GatedRepoError:
        raise ValueError(
            f"{preset} is gated: accept its licence at https://huggingface.co/{preset}, then `hf auth login`; {instead}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{preset} was not found on the hub, or needs `hf auth login`; {instead}") from None
    except (OSError, errors.HTTPError, RuntimeError) as error:  # a full disk; httpx's, as of a network; hf_xet's own
        raise ValueError(f"cannot download {preset}: {_first_line(error)}; free space, go online, {instead}") from None


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).strip().splitlines()[0]
