"""Named checkpoints: presets resolve to a local directory, through the Hugging Face hub's own cache."""

from __future__ import annotations

from pathlib import Path

from data.tasks import TINY
from runtime.json_files import read_object

PRESETS = {
    "tiny": TINY / "model",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
}


def _llama(D: int, F: int, layers: int, heads: int, kv_heads: int, V: int = 32000) -> dict:
    return {
        "model_type": "llama", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": V,
    }  # fmt: skip


def _roberta(D: int, F: int, layers: int, heads: int) -> dict:
    return {
        "model_type": "roberta", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": layers,
        "num_attention_heads": heads, "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
    }  # fmt: skip


SHAPES = {  # what config.json says about sizes, so that --dry-run needs no download
    "llama2-7b": _llama(4096, 11008, 32, 32, 32),
    "llama2-13b": _llama(5120, 13824, 40, 40, 40),
    "llama3-8b": _llama(4096, 14336, 32, 32, 8, V=128256),
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4),
    "roberta-base": _roberta(768, 3072, 12, 12),
    "roberta-large": _roberta(1024, 4096, 24, 16),
}
# Configuration, tokenizer, safetensors: never a pickle, and not the `original/` copies of the Llama repositories
FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "model.safetensors*", "model-*.safetensors",
]  # fmt: skip


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
    from huggingface_hub import errors, snapshot_download  # a fifth of a second, where nothing is to be fetched

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


def raw_config(model: str) -> dict:
    """A preset's sizes, or the contents of a directory's config.json.  Downloads nothing."""
    check_known(model)
    if model in SHAPES:
        return SHAPES[model]
    return read_object((PRESETS[model] if model in PRESETS else Path(model)) / "config.json")


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).strip().splitlines()[0]
