"""Bad directories stop with one line that names what is wrong; good ones are written atomically.

The oracle of a refusal is the value that was planted: it must be in the message.
"""

import json
import pickle
import shutil
import struct
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import through_buffers, tiny_llama, tiny_roberta
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import checkpoint
import model
from model import create, load
from quant import FORMATS, encode

LLAMA, ROBERTA = create(tiny_llama()), create(tiny_roberta())
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def directory(tmp_path) -> Path:
    LLAMA.save(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path, monkeypatch) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SHARD_BYTES", 45_000)
        LLAMA.save(tmp_path / "m")
    return tmp_path / "m"


def refused(directory: Path, *values: str, weights: str = "fp32") -> str:
    """Loading raises ValueError in one line that holds every value, and the same one on a GPU's way."""
    messages = []
    for way in (nullcontext(), through_buffers()):
        with way, pytest.raises(ValueError) as caught:
            load(directory, weights=weights)
        assert type(caught.value) is ValueError  # no subclass such as JSONDecodeError either
        messages.append(str(caught.value))
    message = messages[0]
    assert message == messages[1] and "\n" not in message
    assert all(value in message for value in values), message
    return message


def change_tensors(directory: Path, drop=(), **added: torch.Tensor) -> None:
    path = directory / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if name not in drop}
    save_file(kept | added, path)


def change_index(directory: Path, change) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


# ---------------------------------------------------------------- config.json


def test_no_config(directory):
    (directory / "config.json").unlink()
    refused(directory, str(directory), "has no config.json", "preset")


def test_no_directory(tmp_path):
    refused(tmp_path / "nowhere", "nowhere has no config.json")


@pytest.mark.parametrize("text", ["", "{", "not JSON", "[1, 2]", "null", "3", '"llama"', "\udcff"], ids=repr)
def test_a_config_that_is_not_a_json_object(directory, text):
    (directory / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(directory, str(directory / "config.json"))


@pytest.mark.parametrize("lm, field", [(LLAMA, "hidden_size"), (LLAMA, "vocab_size"), (LLAMA, "num_attention_heads"),
                                       (ROBERTA, "hidden_size"), (ROBERTA, "max_position_embeddings")])  # fmt: skip
def test_a_config_without_a_field(lm, field, tmp_path):
    lm.save(tmp_path / "m")
    raw = {name: value for name, value in lm.raw_config.items() if name != field}
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    refused(tmp_path / "m", "config.json", repr(field))


# ---------------------------------------------------------------- which files


def test_no_weights_at_all(directory):
    (directory / "model.safetensors").unlink()
    assert "pickle" not in refused(directory, str(directory), "has no model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_weights_in_a_pickle_are_refused_with_the_way_to_convert_them(directory, name):
    (directory / "model.safetensors").rename(directory / name)
    refused(directory, name, "never loaded", "convert it", "save_pretrained")


class Bomb:
    """Unpickling it makes a directory."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.mkdir, (self.mark,)


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "model.safetensors", "model.safetensors.index.json", "codes.safetensors", "config.json",
     "tokenizer.model"],
)  # fmt: skip
def test_nothing_is_unpickled(directory, tmp_path, name):
    mark = tmp_path / "the bomb went off"
    if name == "pytorch_model.bin" or name.endswith("index.json"):
        (directory / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb(mark)}, directory / name)
    if name == "tokenizer.model":
        load(directory)
    else:
        refused(directory, str(directory))
    assert not mark.exists()
    shutil.copy(directory / name, tmp_path / "bomb.pt")
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert mark.exists(), "this bomb could not have gone off"


def test_a_bare_pickle_named_safetensors_is_not_unpickled(directory, tmp_path):
    mark = tmp_path / "the bomb went off"
    (directory / "model.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    refused(directory, "model.safetensors is truncated or not a safetensors file")
    assert not mark.exists()


# ---------------------------------------------------------------- broken safetensors


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1], ids="{} bytes".format)
def test_a_truncated_file(directory, kept):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(directory, str(path), "truncated or not a safetensors file")


@pytest.mark.parametrize("header", [b"{", b"[]", b"\xff" * 8, b'{"a": 1}', b""], ids=repr)
def test_a_corrupt_header(directory, header):
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    refused(directory, "model.safetensors")


@pytest.mark.parametrize("length", [2**63, 2**40, 99_999_999], ids=str)
def test_a_header_longer_than_the_file(directory, length):
    path = directory / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(directory, str(path))


def test_bytes_after_the_tensors(directory):
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"more")
    refused(directory, "model.safetensors")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 2000), byte=st.integers(0, 255))
def test_one_wrong_byte_in_a_header_gives_a_value_error_or_a_model(directory, at, byte):
    """Any other exception is a bug.  A byte can be harmless: a space in the JSON, or the bit of a name's metadata."""
    path = directory / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:at] + bytes([byte]) + good[at + 1 :])
    try:
        load(directory)
    except ValueError as error:
        assert str(directory) in str(error)
    finally:
        path.write_bytes(good)


# ---------------------------------------------------------------- index and shards


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"weight_map": null}', '{"weight_map": ["a"]}',
                                  '{"weight_map": "model"}', '{"weight_map": 3}'])  # fmt: skip
def test_a_broken_index(sharded, text):
    path = sharded / "model.safetensors.index.json"
    path.write_text(text)
    refused(sharded, str(path), "is not a safetensors index")


def test_an_empty_index(sharded):
    change_index(sharded, dict.clear)
    refused(sharded, "missing", "lm_head.weight", "more")


def test_an_index_that_names_a_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, "index.json", "model-00002-of-00003.safetensors", str(sharded))


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\\x", 3])
def test_an_index_that_names_a_file_elsewhere(sharded, shard):
    """The file named is there, and holds the tensor, so only the path can be the reason."""
    for place in (sharded.parent, sharded / "sub"):
        place.mkdir(exist_ok=True)
        save_file({Q_PROJ: torch.zeros(32, 32)}, place / "x.safetensors")
    change_index(sharded, lambda weight_map: weight_map.update({Q_PROJ: shard}))
    refused(sharded, "index.json", repr(shard) if isinstance(shard, str) else "3")


def test_an_absolute_path_to_a_shard_of_the_directory_itself_is_refused_too(sharded):
    absolute = str(sharded / "model-00001-of-00003.safetensors")
    change_index(sharded, lambda weight_map: weight_map.update({Q_PROJ: absolute}))
    refused(sharded, "index.json", absolute, "not a plain file name")


def test_an_index_that_puts_a_tensor_in_the_wrong_shard(sharded):
    change_index(sharded, lambda weight_map: weight_map.update({Q_PROJ: "model-00003-of-00003.safetensors"}))
    refused(sharded, "index.json and its shards disagree", Q_PROJ)


def test_an_index_that_lacks_a_tensor_of_a_shard(sharded):
    change_index(sharded, lambda weight_map: weight_map.pop(Q_PROJ))
    refused(sharded, "index.json and its shards disagree", Q_PROJ)


def test_an_index_that_names_a_tensor_of_no_shard(sharded):
    change_index(sharded, lambda weight_map: weight_map.update(spare="model-00001-of-00003.safetensors"))
    refused(sharded, "index.json and its shards disagree", "spare")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_tensor_in_two_shards(sharded, number):
    """Whichever of the two is read last: the index names one, and which copy is meant is unknown."""
    home = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name, shard in home.items() if not shard.startswith(f"model-0000{number}"))
    path = sharded / f"model-0000{number}-of-00003.safetensors"
    save_file(load_file(path) | {name: torch.ones(2)}, path)
    refused(sharded, "index.json and its shards disagree", name)


def test_a_truncated_shard(sharded):
    path = sharded / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(sharded, str(path), "truncated")


def test_a_link_to_a_file_elsewhere_is_followed(directory):
    """The hub's cache is made of such links; they are the user's own, unlike paths inside a downloaded index."""
    (directory / "model.safetensors").rename(directory.parent / "blob")
    (directory / "model.safetensors").symlink_to(directory.parent / "blob")
    assert load(directory).sha256() == LLAMA.sha256()


# ---------------------------------------------------------------- tensors


def test_a_missing_tensor(directory):
    change_tensors(directory, drop=[Q_PROJ])
    refused(directory, str(directory), f"missing: {Q_PROJ}")


def test_an_unexpected_tensor(directory):
    change_tensors(directory, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})
    refused(directory, str(directory), "unexpected: model.layers.0.self_attn.q_proj.bias")


def test_a_layer_more_than_the_config_says(directory):
    change_tensors(directory, **{"model.layers.2.mlp.up_proj.weight": torch.zeros(56, 32)})
    refused(directory, "unexpected: model.layers.2.mlp.up_proj.weight")


def test_another_models_weights(directory, tmp_path):
    ROBERTA.save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", directory)
    refused(directory, "missing: lm_head.weight, ", "unexpected: lm_head.bias, ", "more")


@pytest.mark.parametrize("shape", [(32, 31), (31, 32), (32,), (32, 32, 1), (0, 32), (64, 16)], ids=str)
def test_a_tensor_of_the_wrong_shape(directory, shape):
    change_tensors(directory, **{Q_PROJ: torch.zeros(shape)})
    refused(directory, Q_PROJ, str(list(shape)), "[32, 32]")


NOT_WEIGHTS = (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", NOT_WEIGHTS, ids=str)
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_a_tensor_of_a_type_that_no_checkpoint_has(directory, dtype, weights):
    """float8 comes with scales of its own, without which it means nothing."""
    change_tensors(directory, **{Q_PROJ: torch.ones(32, 32).to(dtype)})
    refused(directory, Q_PROJ, str(dtype), weights=weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name, weights", [(Q_PROJ, "fp32"), (Q_PROJ, "int8"), ("model.norm.weight", "bf16")])
def test_a_number_that_is_not_finite(directory, value, name, weights):
    tensor = LLAMA.store[name].value.clone()
    tensor.view(-1)[-1] = value
    change_tensors(directory, **{name: tensor})
    refused(directory, name, "NaN or infinity", weights=weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_floating_point_widths_are_converted(directory, dtype):
    change_tensors(directory, **{Q_PROJ: LLAMA.store[Q_PROJ].value.to(dtype)})
    assert torch.equal(load(directory).store[Q_PROJ].value, LLAMA.store[Q_PROJ].value.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_one_number_that_is_not_finite_is_seen_in_every_place(value, dtype):
    """Also by the parts of a reduction that take several numbers at a time, and beside the largest finite ones."""
    top = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).max
    good = torch.linspace(-1, 1, 131, dtype=dtype).index_fill(0, torch.tensor([3, 70]), top)
    assert model._is_finite(Path(), "w", good) and model._is_finite(Path(), "w", -good)
    for place in range(131):
        bad = good.clone()
        bad[place] = value
        assert not model._is_finite(Path(), "w", bad), place


def test_a_float64_that_is_infinite_in_float32_is_refused(directory):
    change_tensors(directory, **{Q_PROJ: torch.full((32, 32), 1e300, dtype=torch.float64)})
    refused(directory, Q_PROJ, "NaN or infinity")


@pytest.mark.parametrize("lm, name", [
    (LLAMA, "model.layers.1.self_attn.rotary_emb.inv_freq"),
    (create(tiny_llama(tie_word_embeddings=True)), "lm_head.weight"),
    (ROBERTA, "roberta.embeddings.position_ids"),
    (ROBERTA, "roberta.pooler.dense.weight"),
    (ROBERTA, "lm_head.decoder.weight"),
    (ROBERTA, "lm_head.decoder.bias"),
    (create(tiny_roberta(tie_word_embeddings=False)), "lm_head.bias"),
])  # fmt: skip
def test_tensors_that_mean_nothing_here_are_ignored(lm, name, tmp_path):
    lm.save(tmp_path / "m")
    change_tensors(tmp_path / "m", **{name: torch.arange(4)})
    assert load(tmp_path / "m").sha256() == lm.sha256()


@pytest.mark.parametrize("lm, name", [
    (LLAMA, "lm_head.bias"),
    (LLAMA, "roberta.embeddings.word_embeddings.weight"),
    (LLAMA, "model.layers.1.inv_freq"),
    (ROBERTA, "lm_head.weight.scale"),
])  # fmt: skip
def test_tensors_with_names_near_those_are_not(lm, name, tmp_path):
    lm.save(tmp_path / "m")
    change_tensors(tmp_path / "m", **{name: torch.zeros(4)})
    refused(tmp_path / "m", f"unexpected: {name}")


# ---------------------------------------------------------------- a GPU's way, on the CPU


KINDS = [(w, r, o) for w in FORMATS for r in ((0, 4, 8) if w.startswith("int") else (0,)) for o in (False, True)
         if w.startswith("int") or not o]  # fmt: skip


@pytest.mark.parametrize("weights, residual, oracle", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_ways_give_what_encode_gives(dtype, weights, residual, oracle, directory):
    path = directory / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    for way in (nullcontext(), through_buffers()):
        with way:
            store = load(directory, weights=weights, residual=residual, oracle=oracle).store
        for name, stored in store.items():
            wanted = encode(tensors[name], weights, residual, oracle).parts()
            for suffix, part in stored.parts().items():
                assert part.dtype == wanted[suffix].dtype, name + suffix
                assert torch.equal(part.view(torch.uint8), wanted[suffix].view(torch.uint8)), name + suffix


@pytest.mark.parametrize("size", [1, 7, 4096, 4097, 2**20], ids="{} bytes".format)
def test_buffers_of_any_size_hand_over_every_byte(size, sharded):
    files, shapes = checkpoint.find_tensors(sharded), model.expected_shapes(LLAMA.config)
    mapped = dict(checkpoint.read_tensors(files, shapes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "BUFFER_BYTES", size)
        moved = dict(checkpoint.staged(iter(mapped.items()), torch.device("cpu")))
    assert list(moved) == list(mapped)
    assert all(torch.equal(moved[name], mapped[name]) for name in shapes)
    assert not {t.data_ptr() for t in moved.values()} & {t.data_ptr() for t in mapped.values()}


def test_the_buffers_are_all_that_is_allocated_on_the_host(directory, monkeypatch):
    """However many tensors there are and however large: the bound on host memory is by construction."""
    files, shapes = checkpoint.find_tensors(directory), model.expected_shapes(LLAMA.config)
    real, buffers = torch.empty, []

    def empty(*size, **options):
        buffers.append(real(*size, **options))
        return buffers[-1]

    monkeypatch.setattr(torch, "empty", empty)
    for _ in checkpoint.staged(checkpoint.read_tensors(files, shapes), torch.device("meta")):
        pass
    assert [buffer.nbytes for buffer in buffers] == [checkpoint.BUFFER_BYTES] * checkpoint.BUFFERS
    assert sum(buffer.nbytes for buffer in buffers) <= 2**27


def test_loading_to_a_cpu_stages_nothing(codes, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "staged", stop)
    LLAMA.save(tmp_path / "dense")
    load(codes, weights="int8")
    load(tmp_path / "dense", weights="int8")


# ---------------------------------------------------------------- int8 codes


@pytest.fixture
def codes(directory) -> Path:
    load(directory, weights="int8").save_stored(directory)
    return directory


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_codes_load_as_codes_only(codes, weights):
    refused(codes, str(codes), "holds int8 codes", weights, weights=weights)


@pytest.mark.parametrize("name, tensor", [
    (Q_PROJ, torch.zeros(32, 32)),
    (Q_PROJ, torch.zeros(32, 32, dtype=torch.uint8)),
    (Q_PROJ, torch.full((32, 32), -128, dtype=torch.int8)),
    (Q_PROJ + ".scale", torch.zeros(32, 1)),
    (Q_PROJ + ".scale", torch.full((32, 1), float("nan"))),
    (Q_PROJ + ".scale", torch.full((32, 1), float("inf"))),
    (Q_PROJ + ".scale", torch.full((32, 1), -1.0)),
    (Q_PROJ + ".scale", torch.ones(32, 1, dtype=torch.int64)),
    (Q_PROJ + ".scale", torch.ones(32)),
    ("model.norm.weight", torch.full((32,), float("nan"))),
    ("model.norm.weight", torch.ones(32, dtype=torch.int8)),
    ("spare", torch.zeros(2)),
])  # fmt: skip
def test_codes_that_no_int8_store_holds(codes, name, tensor):
    path = codes / "codes.safetensors"
    save_file(load_file(path) | {name: tensor}, path)
    refused(codes, name, weights="int8")


def test_codes_come_through_buffers_to_the_bit(codes):
    plain = load(codes, weights="int8").sha256()
    with through_buffers():
        assert load(codes, weights="int8").sha256() == plain


def test_codes_without_a_scale(codes):
    path = codes / "codes.safetensors"
    save_file({name: t for name, t in load_file(path).items() if name != Q_PROJ + ".scale"}, path)
    refused(codes, f"missing: {Q_PROJ}.scale", weights="int8")


# ---------------------------------------------------------------- writing


class Stop(Exception):
    """Stands for a full disk or a kill."""


def stop(*args, **kwargs):
    raise Stop


@pytest.mark.parametrize("where", ["save_file", "_write_shards", "json.dumps", "shutil.copyfile"])
@pytest.mark.parametrize("there", [True, False], ids=["over a directory", "new"])
def test_a_failure_while_writing_leaves_what_was_there(where, there, tmp_path, monkeypatch):
    target, other = tmp_path / "m", create(tiny_llama(), seed=1)
    if there:
        LLAMA.save(target)
        before = {path.name: path.read_bytes() for path in target.iterdir()}
    (tmp_path / "tokenizer.json").write_text("{}")
    other.other_files = [tmp_path / "tokenizer.json"]
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(f"checkpoint.{where}", stop)
        other.save(target)
    if there:
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before
        assert load(target).sha256() == LLAMA.sha256()
    else:
        assert not target.exists()
    other.save(target)
    assert load(target).sha256() == other.sha256()
    assert {path.name for path in tmp_path.iterdir()} == {"m", "tokenizer.json"}  # nothing left beside it


def test_a_failure_in_a_later_shard_leaves_what_was_there(directory, monkeypatch):
    """And the two shards that were written before it are not in the directory that the next save writes."""
    calls = []

    def third_fails(*args):
        calls.append(args)
        return stop() if len(calls) == 3 else save_file(*args)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(checkpoint, "SHARD_BYTES", 20_000)
        patch.setattr(checkpoint, "save_file", third_fails)
        create(tiny_llama(), seed=1).save(directory)
    assert load(directory).sha256() == LLAMA.sha256()
    LLAMA.save(directory)
    assert {path.name for path in directory.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("step", [1, 2, "cleanup"])
def test_a_kill_while_directories_are_exchanged_loses_neither_and_does_not_block_the_next_save(
    step, directory, monkeypatch
):
    """Two renames cannot be one on POSIX: between them the old directory is complete beside the target."""
    real, calls, other = checkpoint.os.replace, [], create(tiny_llama(), seed=1)

    def replace(source, target):
        if Path(source).is_dir():
            calls.append(source)
            if len(calls) == step:
                stop()
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        if step == "cleanup":
            real_rmtree = shutil.rmtree
            patch.setattr(
                checkpoint.shutil,
                "rmtree",
                lambda path, **options: stop() if len(calls) == 2 else real_rmtree(path, **options),
            )
        patch.setattr(checkpoint.os, "replace", replace)
        other.save(directory)
    old = directory.with_name(directory.name + ".old")
    left = {load(path).sha256() for path in (directory, old) if path.exists()}
    assert left == {1: {LLAMA.sha256()}, 2: {LLAMA.sha256()}, "cleanup": {LLAMA.sha256(), other.sha256()}}[step]
    for _ in range(2):
        other.save(directory)
    assert load(directory).sha256() == other.sha256()


def test_saving_replaces_what_an_earlier_save_left(sharded):
    """No shard or index of the old directory may survive: with both, a reader could take either."""
    other = create(tiny_llama(), seed=1)
    other.save(sharded)
    assert {path.name for path in sharded.iterdir()} == {"config.json", "model.safetensors"}
    assert load(sharded).sha256() == other.sha256()


@pytest.mark.parametrize("where", ["m", "m.old", "m.partial"])
def test_saving_never_deletes_what_is_not_a_model(where, tmp_path):
    """The directory itself, and the two places beside it that a save passes through."""
    (tmp_path / where).mkdir()
    (tmp_path / where / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="would delete thesis.txt"):
        LLAMA.save(tmp_path / "m")
    assert (tmp_path / where / "thesis.txt").read_text() == "years"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="it is a file"):
        LLAMA.save(tmp_path / "file")


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "codes"])
def test_loaded_weights_do_not_live_in_the_file(weights, tmp_path):
    """safetensors hands out tensors that are mapped from the file: what overwrites it would reach into a run."""
    lm = load(save_as(weights, tmp_path / "m"), weights="int8" if weights == "codes" else weights)
    before = lm.sha256()
    for file in (tmp_path / "m").glob("*.safetensors"):
        with open(file, "r+b") as raw:
            raw.seek(-1000, 2)
            raw.write(b"\xff" * 1000)
    assert lm.sha256() == before


def save_as(weights: str, directory: Path) -> Path:
    """A checkpoint that needs no conversion on its way into a store of these weights."""
    LLAMA.save(directory)
    if weights in ("bf16", "codes"):
        load(directory, weights="int8" if weights == "codes" else weights).save_stored(directory)
    return directory
