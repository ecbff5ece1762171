"""Model directories on disk: strict reading of safetensors into stores, one tensor at a time, and atomic writing.

Nothing is ever unpickled, and nothing outside the directory is read or written.  Imports quant, and of runtime
json_files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from quant import FLOATS, FORMATS, RESIDUALS, Store, check_format, encode, from_tensors, tensor_specs
from runtime.json_files import check_no_pointer, read_object, shown


def find_tensors(
    directory: Path, stem: str = "model", ignorable: Callable[[str], bool] = lambda name: False
) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it: stem.safetensors, or its index and shards.

    Raises ValueError for a directory without either, a broken file, an index that names a missing file or one
    outside the directory, and shards that hold other tensors than the index says, but for ignorable ones.
    """
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file():
        return dict.fromkeys(_names(single), single)
    if not index.is_file():
        raise ValueError(f"{directory} has no {single.name}{_pickle_advice(directory)}")
    shards = _read_index(index, ignorable)
    held = {(name, shard) for shard in set(shards.values()) for name in _names(directory / shard)}
    differing = {name for name, _ in held ^ set(shards.items())}  # pairs, as two shards may hold one name
    wrong = sorted(name for name in differing if not ignorable(name))
    if wrong:
        raise ValueError(f"{index} and its shards disagree about {first_names(wrong)}")
    return {name: directory / shard for name, shard in sorted(held)}


def _pickle_advice(directory: Path) -> str:
    pickles = sorted(p.name for p in (*directory.glob("*.bin"), *directory.glob("*.pt*")))
    if not pickles:
        return ""
    return (
        f", only {pickles[0]}: pickles can run code and are never loaded; convert it once, somewhere you trust it, "
        "with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
    )


def _read_index(index: Path, ignorable: Callable[[str], bool]) -> dict[str, str]:
    """Tensor name -> shard file name, each a plain name of a file beside the index; ignorable ones may have none."""
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{index} is not a safetensors index: its weight_map is {shown(shards)}")
    for shard in sorted(set(shards.values())):
        odd = shard in ("", ".", "..") or "\\" in shard or "\0" in shard or len(os.fsencode(shard)) > 255
        if odd or shard != os.path.basename(shard):
            raise ValueError(f"{index} names {shown(shard, 300)}, which is not a plain file name in its own directory")
        if not (index.parent / shard).is_file():
            if not all(ignorable(name) for name in shards if shards[name] == shard):
                raise ValueError(f"{index} names {first_names([shard])}, which is not in {index.parent}")
            shards = {name: other for name, other in shards.items() if other != shard}
    return shards


def _names(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        if path.is_file():  # a pipe could be waited for without end
            check_no_pointer(path)
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from None


def first_names(names: list[str]) -> str:
    first = ", ".join(shown(name)[1:-1] for name in names[:3])
    return first + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_names(directory: Path, found: set[str], wanted: set[str], ignorable: Callable[[str], bool]) -> None:
    """Raises ValueError with the names that are missing or unexpected."""
    missing = sorted(wanted - found)
    unexpected = sorted(n for n in found - wanted if not ignorable(n))
    if missing or unexpected:
        kinds = (("missing", missing), ("unexpected", unexpected))
        problems = [f"{kind}: {first_names(names)}" for kind, names in kinds if names]
        raise ValueError(f"{directory}: {'; '.join(problems)}")


def read_tensors(
    files: dict[str, Path], shapes: dict[str, torch.Size], device: str | torch.device = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """The tensors named in shapes, one at a time: name, tensor on the device; on a CPU it is mapped from its file."""
    device, tensors = torch.device(device), _mapped(files, shapes)
    return tensors if device.type == "cpu" else staged(tensors, device)


def _mapped(files: dict[str, Path], shapes: dict[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(set(files.values())):
        with _open(path) as file:
            for name in (n for n in shapes if files[n] == path):
                found = torch.Size(file.get_slice(name).get_shape())
                if found != shapes[name]:
                    raise ValueError(f"{path}: {name} is {list(found)}, config.json makes it {list(shapes[name])}")
                yield name, file.get_tensor(name)


BUFFERS, BUFFER_BYTES = 4, 2**24  # all the host memory that loading to a GPU needs besides the page cache


def staged(tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Mapped tensors, each copied to a GPU piece by piece through a few pinned buffers.

    Out of pinned memory a GPU copies by itself: it copies and encodes while the next pieces are read from the file, and
    the host waits for it only where a buffer's last copy is not yet done.  Nothing is pinned for other devices.
    """
    gpu = device.type == "cuda"
    ring = deque((torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=gpu), None) for _ in range(BUFFERS))
    for name, tensor in tensors:
        moved = torch.empty_like(tensor, device=device)
        for piece, place in zip(_pieces(tensor), _pieces(moved), strict=True):
            buffer, copied = ring.popleft()
            if copied is not None:
                copied.synchronize()
            filled = buffer[: len(piece)].copy_(piece)  # here the file is read
            place.copy_(filled, non_blocking=gpu)
            ring.append((buffer, torch.cuda.current_stream(device).record_event() if gpu else None))
        yield name, moved


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor's bytes, as many at a time as a buffer holds."""
    return tensor.view(-1).view(torch.uint8).split(BUFFER_BYTES)


# ---------------------------------------------------------------- from files to stores

CODES = "codes"  # a file name of their own, so that no other program takes codes for weights; and a config key


def load_weights(
    directory: Path, raw_config: dict, shapes: dict[str, torch.Size], ignorable: Callable[[str], bool],
    device: torch.device, weights: str, residual: int = 0, oracle: bool = False,
    stored_as: dict[str, str] | None = None,
) -> dict[str, Store]:  # fmt: skip
    """The stores of a checkpoint's tensors, in the order of `shapes`; its codes, where it holds codes.

    stored_as: a tensor's name in the files, where that is another one.

    Raises ValueError for anything missing, unexpected (and not ignorable), wrongly shaped, not finite or corrupt.
    """
    check_format(weights, residual, oracle)
    torch.empty(31 * 2**20, dtype=torch.uint8)  # freed at once: glibc then keeps the memory that forwards free (NOTES)
    if holds_codes(directory):
        _check_same_codes(directory, raw_config.get(CODES), weights, residual)
        return _load_codes(directory, shapes, device, weights, residual, oracle)
    files, stores, finite = find_tensors(directory, ignorable=ignorable), {}, {}
    names = {name: name for name in shapes} | (stored_as or {})
    in_files = {names[name]: shape for name, shape in shapes.items()}
    check_names(directory, set(files), set(in_files), ignorable)
    for name, tensor in read_tensors(files, in_files, device):
        finite[name] = _is_finite(files[name], name, tensor)
        stores[name] = encode(tensor, weights, residual, oracle)
    _check_finite(files, finite)
    return {name: stores[names[name]] for name in shapes}


def holds_codes(directory: Path) -> bool:
    return any(directory.glob(f"{CODES}*.safetensors"))


def stored_format(raw_config: dict) -> tuple[str, int]:
    """How a directory's matrices are stored: weights and residual of codes, or the floats that it has."""
    held = raw_config.get(CODES)
    if _names_a_format(held):
        return held["weights"], held["residual"]
    return "bf16" if (raw_config.get("dtype") or raw_config.get("torch_dtype")) == "bfloat16" else "fp32", 0


def _names_a_format(held: object) -> bool:
    """Whether a config's CODES say of which format and residual they are; lists compare, where sets would hash."""
    if not isinstance(held, dict) or held.keys() != {"weights", "residual"}:
        return False
    return held["weights"] in list(FORMATS) and type(held["residual"]) is int and held["residual"] in RESIDUALS


def _is_finite(file: Path, name: str, tensor: Tensor) -> Tensor:
    """A bool on the tensor's device: to ask for its value would make the host wait for a GPU.

    Raises ValueError for a type that no checkpoint has.
    """
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):  # float8 has scales
        raise ValueError(f"{file}: {name} is {tensor.dtype}, expected floating point of 16 bits or more")
    ends = torch.stack(tensor.aminmax())  # both are NaN where any element is; isfinite would make copies
    return ends.float().isfinite().all()  # as float32, where 1e300 is infinite


def _check_finite(files: dict[str, Path], finite: dict[str, Tensor]) -> None:
    for name, verdict in finite.items():
        if not verdict:
            raise ValueError(f"{files[name]}: {name} holds NaN or infinity")


def _check_same_codes(directory: Path, held: object, weights: str, residual: int) -> None:
    if held == {"weights": weights, "residual": residual}:
        return
    if not _names_a_format(held):
        raise ValueError(f"{directory / 'config.json'} must say what the codes are, got {CODES} {shown(held)}")
    raise ValueError(
        f"{directory} holds {held['weights']} codes with {held['residual']} residual bits; load it with weights "
        f"{held['weights']} and residual {held['residual']}, got {weights} and {residual}"
    )


def _load_codes(
    directory: Path, shapes: dict[str, torch.Size], device: torch.device, weights: str, residual: int, oracle: bool
) -> dict[str, Store]:
    """The inverse of save_stored for codes."""
    files = find_tensors(directory, CODES)
    specs = {name: tensor_specs(shape, weights, residual) for name, shape in shapes.items()}
    expected = {name + suffix: shape for name, spec in specs.items() for suffix, (_, shape) in spec.items()}
    check_names(directory, set(files), set(expected), lambda name: False)
    read = read_tensors(files, expected, device)
    tensors = {name: tensor.clone() for name, tensor in read}  # on a CPU they are mapped from their files
    stores, finite = {}, {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            finite[name] = _is_finite(files[name], name, tensors[name])
        parts = {suffix: tensors.pop(name + suffix) for suffix in specs[name]}
        try:
            stores[name] = from_tensors(parts, shape, weights, residual, oracle)
        except ValueError as error:
            raise ValueError(f"{files[name]}: {name}{error}") from None
    _check_finite(files, finite)
    return stores


# ---------------------------------------------------------------- from stores to files


def save_dense(directory: Path, raw_config: dict, format: str, weights: dict[str, Store], files: list[Path]) -> None:
    """Write a directory that transformers.from_pretrained loads: bf16 as it is, codes as the fp32 they stand for."""
    tensors = ((name, stored.dequantise().view(stored.shape)) for name, stored in weights.items())
    configs = _tokenizer_config(files) | {"config.json": _plain_config(raw_config, format)}
    write_directory(directory, configs, files, tensors)


def _tokenizer_config(files: list[Path]) -> dict[str, dict]:
    """What transformers must be told of a tokenizer.model that came alone: without its class no space would go before
    a text, and without add_bos_token no begin token."""
    found = {file.name: file for file in files}
    if "tokenizer.model" not in found or found.keys() & {"tokenizer.json", "tokenizer_config.json"}:
        return {}
    try:
        pieces = SentencePieceProcessor(model_file=str(found["tokenizer.model"]))
    except RuntimeError:  # it is no tokenizer, goes along as it is, and whoever reads it is told
        return {}
    special = {"bos": pieces.bos_id(), "eos": pieces.eos_id(), "unk": pieces.unk_id()}
    config = {f"{name}_token": pieces.id_to_piece(i) for name, i in special.items() if i >= 0}
    config |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": "bos_token" in config}
    return {"tokenizer_config.json": config}


def save_stored(
    directory: Path, raw_config: dict, format: str, residual: int, weights: dict[str, Store], files: list[Path]
) -> None:
    """Write the weights as they are stored, codes and scales, for `load` with the same `weights` and `residual`."""
    tensors = ((name + suffix, t) for name, stored in weights.items() for suffix, t in stored.tensors().items())
    coded = format not in FLOATS
    config = _plain_config(raw_config, format) | ({CODES: {"weights": format, "residual": residual}} if coded else {})
    write_directory(directory, {"config.json": config}, files, tensors, CODES if coded else "model")


def _plain_config(raw_config: dict, format: str) -> dict:
    """A config without the dtype's older name, and without a quantisation of which nothing is left in the files."""
    kept = {key: value for key, value in raw_config.items() if key not in ("torch_dtype", "quantization_config", CODES)}
    return kept | {"dtype": "bfloat16" if format == "bf16" else "float32"}


def weights_sha256(weights: dict[str, Store]) -> str:
    """Hash of every stored bit: name, dtype, shape and bytes of each tensor, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        for suffix, tensor in weights[name].tensors().items():
            digest.update(f"{name}{suffix} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Files that a saved model takes along from the directory that it was loaded from
COMPANIONS = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def companion_files(directory: Path) -> list[Path]:
    return [directory / name for name in COMPANIONS if (directory / name).is_file()]


SHARD_BYTES = 2**31  # a file holds at most this, so saving needs no second copy of the model in memory


# The files of a saved model; a directory that holds others is not replaced
OURS = re.compile(
    "|".join(map(re.escape, COMPANIONS)) + r"|config\.json|tokenizer.*|.*\.safetensors(\.index\.json)?|.*\.tmp"
)
LEFT = re.compile(r"\.tmp\w{6}")  # by a kill: safetensors writes to a file of such a name and renames it


def write_directory(
    directory: Path, configs: dict[str, dict], other_files: list[Path], tensors: Iterable[tuple[str, Tensor]],
    stem: str = "model", ours: re.Pattern = OURS,
) -> None:  # fmt: skip
    """Write JSON files (name: contents), copies of other files, and the tensors.  ours: the names that it may replace.

    Everything is written beside the target and renamed at the end, so that a killed process leaves the old
    directory or the new one; the old one is called NAME.old for the instant between the two renames.
    """
    partial, old = (directory.with_name(directory.name + suffix) for suffix in (".partial", ".old"))
    for path in (directory, partial, old):
        _refuse_foreign(path, ours)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, config in configs.items():
        (partial / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    mode = (partial / name).stat().st_mode
    for file in other_files:
        shutil.copyfile(file, partial / file.name)
    _write_shards(partial, tensors, stem)
    for file in partial.iterdir():  # save_file lets only their owner read its files
        file.chmod(mode)
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)  # from a process killed before it could
        os.replace(directory, old)
    os.replace(partial, directory)
    shutil.rmtree(old, ignore_errors=True)  # also one that was left where there was no directory any more


def _refuse_foreign(path: Path, ours: re.Pattern) -> None:
    """Raises ValueError for a place that holds more than what was saved there: replacing it would delete that."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"cannot save to {path}: it is a {'link' if path.is_symlink() else 'file'}")
    inside = path.iterdir() if path.exists() else ()
    foreign = sorted(p.name for p in inside if p.is_dir() or not (ours.fullmatch(p.name) or LEFT.fullmatch(p.name)))
    if foreign:
        raise ValueError(f"saving would delete {first_names(foreign)} in {path}; give a new directory")


def _write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], stem: str) -> None:
    """stem.safetensors, or stem-0000i-of-0000n.safetensors with an index where one file would be too large."""
    shards, shard, size, total = [], {}, 0, 0

    def flush() -> None:
        save_file(shard, directory / f"{stem}-{len(shards)}.tmp", {"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if shard and size + nbytes > SHARD_BYTES:
            flush()
            size = 0
        shard[name] = tensor.cpu().contiguous()
        size, total = size + nbytes, total + nbytes
    flush()
    if len(shards) == 1:
        os.replace(directory / f"{stem}-0.tmp", directory / f"{stem}.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors"
        os.replace(directory / f"{stem}-{i}.tmp", directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
