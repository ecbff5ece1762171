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
from oracles import same_bits
from safetensors.torch import load_file, save_file

from model import create, expected_shapes, load
from quant import FORMATS, encode
from runtime import checkpoints
from runtime.checkpoints import save_stored, weights_sha256

LLAMA, ROBERTA = create(tiny_llama()), create(tiny_roberta())
TIED = create(tiny_llama(tie_word_embeddings=True, num_hidden_layers=3))
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"
NAN, INF = float("nan"), float("inf")


def sha256(directory, **options) -> str:
    return weights_sha256(load(directory, **options).weights)


def save_codes(directory: Path, weights: str = "int8") -> None:
    lm = create(tiny_llama(), weights=weights)
    save_stored(directory, lm.raw_config, weights, 0, lm.weights, [])


def save_shards(directory: Path, lm=LLAMA) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "SHARD_BYTES", 45_000)
        lm.save(directory)


FORMS = {"llama": LLAMA.save, "roberta": ROBERTA.save, "shards": save_shards, "codes": save_codes}


@pytest.fixture
def directory(tmp_path) -> Path:
    LLAMA.save(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path) -> Path:
    save_shards(tmp_path / "m")
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
    assert all(value in message for value in (str(directory), *values)), message
    return message


# ---------------------------------------------------------------- damage, and what the line must say of it


def remove(name: str):
    return lambda d: (d / name).unlink()


def write(name: str, content: bytes | str):
    return lambda d: (d / name).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(name: str, kept: int):
    return lambda d: (d / name).write_bytes((d / name).read_bytes()[:kept])


def config_without(field: str):
    def change(d: Path) -> None:
        raw = json.loads((d / "config.json").read_text())
        (d / "config.json").write_text(json.dumps({name: value for name, value in raw.items() if name != field}))

    return change


def tensors(added: dict | None = None, drop: str = "", file: str = "model.safetensors"):
    def change(d: Path) -> None:
        kept = {name: tensor for name, tensor in load_file(d / file).items() if name != drop}
        save_file(kept | (added or {}), d / file)

    return change


def index(changes: dict):
    """Its weight map, with None for what goes."""

    def change(d: Path) -> None:
        weight_map = json.loads((d / INDEX).read_text())["weight_map"] | changes
        (d / INDEX).write_text(json.dumps({"weight_map": {k: v for k, v in weight_map.items() if v is not None}}))

    return change


def header(length: int, text: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + text + bytes(64)


def ones(dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(32, 32).to(dtype)


SHARD_2, UP_2 = "model-00002-of-00003.safetensors", "model.layers.2.mlp.up_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 269060552\n"
DISAGREE = "index.json and its shards disagree"
ROBERTA_TENSORS = {name: stored.value for name, stored in ROBERTA.weights.items()}
DAMAGE = [  # form, damage, what the line holds beside the directory
    ("llama", remove("config.json"), ["has no config.json", "preset"]),
    ("llama", shutil.rmtree, ["has no config.json"]),
    *(("llama", write("config.json", text), ["config.json"])
      for text in ("", "{", "not JSON", "[1, 2]", "null", '"llama"', b"\xff", "[" * 10_000)),
    *((form, config_without(field), ["config.json", repr(field)]) for form, field in (
        ("llama", "hidden_size"), ("llama", "num_attention_heads"), ("roberta", "max_position_embeddings"))),
    # broken safetensors
    *(("llama", cut("model.safetensors", n), ["model.safetensors is truncated or not a safetensors file"])
      for n in (0, 4, 8, 100, -1)),
    *(("llama", write("model.safetensors", header(len(text), text)), ["model.safetensors"])
      for text in (b"{", b"[]", b"\xff" * 8, b'{"a": 1}', b"")),
    *(("llama", write("model.safetensors", header(n)), ["model.safetensors"]) for n in (2**63, 2**40, 99_999_999)),
    ("llama", lambda d: write("model.safetensors", (d / "model.safetensors").read_bytes() + b"more")(d), ["truncated"]),
    *((form, write(name, POINTER), [name, "is a git-lfs pointer", "git lfs pull"])
      for form, name in (("llama", "model.safetensors"), ("shards", SHARD_2))),
    # index and shards
    *(("shards", write(INDEX, text), [INDEX, "is not a JSON object"]) for text in ("", "{", "[]", "3")),
    *(("shards", write(INDEX, text), [INDEX, "is not a safetensors index"]) for text in
      ("{}", *(f'{{"weight_map": {value}}}' for value in ("null", '["a"]', '"model"', "3")))),
    ("shards", write(INDEX, '{"weight_map": {}}'), ["missing", "lm_head.weight", "more"]),
    ("shards", remove(SHARD_2), [INDEX, SHARD_2]),
    ("shards", cut(SHARD_2, -1), [SHARD_2, "truncated"]),
    ("shards", index({Q_PROJ: "model-00003-of-00003.safetensors"}), [DISAGREE, Q_PROJ]),
    ("shards", index({Q_PROJ: None}), [DISAGREE, Q_PROJ]),
    ("shards", index({"spare": SHARD_2}), [DISAGREE, "spare"]),
    # a tensor in two shards: whichever is read last, which copy is meant is unknown
    *(("shards", tensors({name: torch.ones(2)}, file=f"model-0000{n}-of-00003.safetensors"), [DISAGREE, name])
      for n, name in ((1, "model.norm.weight"), (2, "model.embed_tokens.weight"), (3, Q_PROJ))),
    # names, shapes, types, numbers
    ("llama", tensors(drop=Q_PROJ), [f"missing: {Q_PROJ}"]),
    ("llama", tensors({Q_PROJ[:-6] + "bias": torch.zeros(32)}), [f"unexpected: {Q_PROJ[:-6]}bias"]),
    ("llama", tensors({UP_2: torch.zeros(56, 32)}), [f"unexpected: {UP_2}"]),  # a layer more than the config says
    ("llama", lambda d: save_file(ROBERTA_TENSORS, d / "model.safetensors"),
     ["missing: lm_head.weight, ", "unexpected: lm_head.bias, ", "more"]),
    *(("llama", tensors({name: torch.zeros(4)}), [f"unexpected: {name}"]) for name in
      ("lm_head.bias", "roberta.embeddings.word_embeddings.weight", "model.layers.1.inv_freq")),
    ("roberta", tensors({"lm_head.weight.scale": torch.zeros(4)}), ["unexpected: lm_head.weight.scale"]),
    *(("llama", tensors({Q_PROJ: torch.zeros(shape)}), [Q_PROJ, str(list(shape)), "[32, 32]"])
      for shape in ((32, 31), (31, 32), (32,), (32, 32, 1), (0, 32), (64, 16))),
    *(("llama", tensors({Q_PROJ: ones(dtype)}), [Q_PROJ, str(dtype)]) for dtype in  # float8 has scales of its own
      (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)),
    *(("llama", tensors({name: torch.full(shape, 1.0).index_fill(0, torch.tensor([31]), value)}), [name, "NaN or inf"])
      for name, shape in ((Q_PROJ, (32, 32)), ("model.norm.weight", (32,))) for value in (NAN, INF, -INF)),
    ("llama", tensors({Q_PROJ: ones(torch.float64) * 1e300}), [Q_PROJ, "NaN or infinity"]),  # infinite in float32
    # codes
    ("codes", lambda d: None, ["holds int8 codes", "got fp32"]),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(DAMAGE)), ids=lambda i: f"{DAMAGE[i][0]}-{DAMAGE[i][2][0]}")
def test_a_damaged_directory_is_refused_in_one_line(case, tmp_path):
    form, damage, values = DAMAGE[case]
    FORMS[form](tmp_path / "m")
    damage(tmp_path / "m")
    line = refused(tmp_path / "m", *values)
    assert form == "codes" or line == refused(tmp_path / "m", weights="int8")


@pytest.mark.parametrize("name, tensor", [
    (Q_PROJ, torch.zeros(32, 32)), (Q_PROJ, torch.zeros(32, 32, dtype=torch.uint8)),
    (Q_PROJ, torch.full((32, 32), -128, dtype=torch.int8)),
    *((f"{Q_PROJ}.scale", torch.full((32, 1), value)) for value in (0.0, NAN, INF, -1.0)),
    (f"{Q_PROJ}.scale", torch.ones(32, 1, dtype=torch.int64)), (f"{Q_PROJ}.scale", torch.ones(32)),
    ("model.norm.weight", torch.full((32,), NAN)), ("model.norm.weight", torch.ones(32, dtype=torch.int8)),
    ("spare", torch.zeros(2)), (f"{Q_PROJ}.scale", None),
])  # fmt: skip
def test_codes_that_no_int8_store_holds(name, tensor, tmp_path):
    save_codes(tmp_path / "m")
    tensors({} if tensor is None else {name: tensor}, drop=name, file="codes.safetensors")(tmp_path / "m")
    refused(tmp_path / "m", name, weights="int8")


@pytest.mark.parametrize("shard", ["../x.safetensors", "sub/x.safetensors", "..", ".", "", "a\\x", 3, "absolute"])
def test_an_index_that_names_a_file_elsewhere(sharded, shard):
    """The file named is there, and holds the tensor, so only the path can be the reason.  An absolute path is refused
    even where it leads into the directory itself."""
    for place in (sharded.parent, sharded / "sub"):
        place.mkdir(exist_ok=True)
        save_file({Q_PROJ: torch.zeros(32, 32)}, place / "x.safetensors")
    shard = str(sharded / "model-00001-of-00003.safetensors") if shard == "absolute" else shard
    index({Q_PROJ: shard})(sharded)
    refused(sharded, "index.json", repr(shard) if isinstance(shard, str) else "3")


def test_a_link_to_a_file_elsewhere_is_followed(directory):
    """The hub's cache is made of such links; they are the user's own, unlike paths inside a downloaded index."""
    (directory / "model.safetensors").rename(directory.parent / "blob")
    (directory / "model.safetensors").symlink_to(directory.parent / "blob")
    assert sha256(directory) == weights_sha256(LLAMA.weights)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_floating_point_widths_are_converted(directory, dtype):
    tensors({Q_PROJ: LLAMA.weights[Q_PROJ].value.to(dtype)})(directory)
    assert torch.equal(load(directory).weights[Q_PROJ].value, LLAMA.weights[Q_PROJ].value.to(dtype).float())


@pytest.mark.full
@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_number_that_is_not_finite_is_seen_in_every_place(dtype, tmp_path):
    """Also by the parts of a reduction that take several numbers at a time, and beside the largest finite ones."""
    lm = create(tiny_llama(vocab_size=131, hidden_size=1, head_dim=2, num_hidden_layers=1))
    lm.save(tmp_path / "m")
    top = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).max
    good = torch.linspace(-1, 1, 131, dtype=dtype)[:, None].index_fill(0, torch.tensor([3, 70]), top)
    for plant in (good, -good):
        tensors({lm.embedding: plant})(tmp_path / "m")
        load(tmp_path / "m")
    for place in range(131):
        for value in (NAN, INF, -INF):
            tensors({lm.embedding: good.index_fill(0, torch.tensor(place), value)})(tmp_path / "m")
            with pytest.raises(ValueError, match="holds NaN or infinity"):
                load(tmp_path / "m")


@pytest.mark.parametrize("lm, name", [
    (LLAMA, "model.layers.1.self_attn.rotary_emb.inv_freq"),
    (ROBERTA, "roberta.embeddings.position_ids"),
    (ROBERTA, "roberta.pooler.dense.weight"),
    (create(tiny_roberta(tie_word_embeddings=False)), "lm_head.bias"),
])  # fmt: skip
def test_tensors_that_mean_nothing_here_are_ignored(lm, name, tmp_path):
    lm.save(tmp_path / "m")
    tensors({name: torch.arange(4)})(tmp_path / "m")
    assert sha256(tmp_path / "m") == weights_sha256(lm.weights)


def test_stale_entries_of_an_index_that_mean_nothing_are_ignored(sharded):
    """Old conversions list buffers that are in no shard, or in a shard that was not kept, and shards hold others that
    are not listed; a place elsewhere is refused all the same."""
    buffer = "model.layers.{}.self_attn.rotary_emb.inv_freq".format
    index({buffer(0): SHARD_2, buffer(1): "model-00009-of-00009.safetensors"})(sharded)
    tensors({buffer(2): torch.ones(4)}, file=SHARD_2)(sharded)
    assert sha256(sharded) == weights_sha256(LLAMA.weights)
    index({buffer(1): "../x.safetensors"})(sharded)
    refused(sharded, "'../x.safetensors'")
    index({buffer(1): SHARD_2, Q_PROJ: "model-00009-of-00009.safetensors"})(sharded)
    refused(sharded, "model-00009-of-00009.safetensors")
    save_shards(sharded, TIED)
    index({"lm_head.weight": SHARD_2})(sharded)  # which is the embedding, and was not kept
    assert sha256(sharded) == weights_sha256(TIED.weights)


# ---------------------------------------------------------------- pickles


class Bomb:
    """Unpickling it makes a directory."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.mkdir, (self.mark,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", INDEX, "codes.safetensors", "config.json",
                                  "tokenizer.model", "bare"])  # fmt: skip
def test_nothing_is_unpickled(directory, tmp_path, name):
    """Neither torch's format nor a bare pickle."""
    mark = tmp_path / "the bomb went off"
    if name in ("pytorch_model.bin", INDEX):
        (directory / "model.safetensors").unlink()
    if name == "bare":
        (directory / "model.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    else:
        torch.save({"model.norm.weight": Bomb(mark)}, directory / name)
        shutil.copy(directory / name, tmp_path / "bomb.pt")
    if name == "tokenizer.model":
        load(directory)
    else:
        refused(directory)
    assert not mark.exists()
    if name != "bare":
        torch.load(tmp_path / "bomb.pt", weights_only=False)
        assert mark.exists(), "this bomb could not have gone off"


def test_weights_in_a_pickle_are_refused_with_the_way_to_convert_them(directory):
    path = directory / "model.safetensors"
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"):
        path = path.rename(directory / name)
        refused(directory, name, "never loaded", "convert it", "save_pretrained")
    path.unlink()
    assert "never loaded" not in refused(directory, "has no model.safetensors")


# ---------------------------------------------------------------- a GPU's way, on the CPU

KINDS = [(w, r, o) for w in FORMATS for r in ((0, 4, 8) if w.startswith("int") else (0,)) for o in (False, True)
         if w.startswith("int") or not o]  # fmt: skip


@pytest.mark.parametrize("weights, residual, oracle", KINDS)
def test_both_ways_give_what_encode_gives(weights, residual, oracle, directory):
    path = directory / "model.safetensors"
    for dtype in (torch.float32, torch.bfloat16):
        written = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
        save_file(written, path)
        for way in (nullcontext(), through_buffers()):
            with way:
                stores = load(directory, weights=weights, residual=residual, oracle=oracle).weights
            for name, stored in stores.items():
                wanted = encode(written[name], weights, residual, oracle).tensors()
                for suffix, tensor in stored.tensors().items():
                    assert same_bits(tensor, wanted[suffix]), name + suffix


def test_codes_come_through_buffers_to_the_bit(tmp_path):
    save_codes(tmp_path / "m", "int4")
    with through_buffers():
        buffered = sha256(tmp_path / "m", weights="int4")
    assert buffered == sha256(tmp_path / "m", weights="int4")


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.full), 7, 4096, 4097, 2**20], ids="{} bytes".format)
def test_buffers_of_any_size_hand_over_every_byte(size, sharded, monkeypatch):
    files, shapes = checkpoints.find_tensors(sharded), expected_shapes(LLAMA.config)
    mapped = dict(checkpoints.read_tensors(files, shapes))
    monkeypatch.setattr(checkpoints, "BUFFER_BYTES", size)
    moved = dict(checkpoints.staged(iter(mapped.items()), torch.device("cpu")))
    assert list(moved) == list(mapped)
    assert all(torch.equal(moved[name], mapped[name]) for name in shapes)
    assert not {t.data_ptr() for t in moved.values()} & {t.data_ptr() for t in mapped.values()}


def test_the_buffers_are_all_that_is_allocated_on_the_host(directory, monkeypatch):
    """However many tensors there are and however large: the bound on host memory is by construction."""
    files, shapes = checkpoints.find_tensors(directory), expected_shapes(LLAMA.config)
    real, buffers = torch.empty, []

    def empty(*size, **options):
        buffers.append(real(*size, **options))
        return buffers[-1]

    monkeypatch.setattr(torch, "empty", empty)
    for _ in checkpoints.staged(checkpoints.read_tensors(files, shapes), torch.device("meta")):
        pass
    assert [buffer.nbytes for buffer in buffers] == [checkpoints.BUFFER_BYTES] * checkpoints.BUFFERS
    assert sum(buffer.nbytes for buffer in buffers) <= 2**27


def test_loading_to_a_cpu_stages_nothing(directory, tmp_path, monkeypatch):
    save_codes(tmp_path / "codes")
    monkeypatch.setattr(checkpoints, "staged", stop)
    for path in (directory, tmp_path / "codes"):
        load(path, weights="int8")


# ---------------------------------------------------------------- writing


class Stop(Exception):
    """Stands for a full disk or a kill."""


def stop(*args, **kwargs):
    raise Stop


@pytest.mark.parametrize("where", ["save_file", "json.dumps", "shutil.copyfile"])
@pytest.mark.parametrize("there", [True, False], ids=["over a directory", "new"])
def test_a_failure_while_writing_leaves_what_was_there(where, there, tmp_path, monkeypatch):
    target, other = tmp_path / "m", create(tiny_llama(), seed=1)
    if there:
        LLAMA.save(target)
    before = {path.name: path.read_bytes() for path in target.iterdir()} if there else None
    (tmp_path / "tokenizer.json").write_text("{}")
    other.other_files = [tmp_path / "tokenizer.json"]
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(f"runtime.checkpoints.{where}", stop)
        other.save(target)
    assert before == ({path.name: path.read_bytes() for path in target.iterdir()} if target.exists() else None)
    other.save(target)
    assert sha256(target) == weights_sha256(other.weights)
    assert {path.name for path in tmp_path.iterdir()} == {"m", "tokenizer.json"}  # nothing left beside it


def test_a_failure_in_a_later_shard_leaves_what_was_there(directory, monkeypatch):
    """And the two shards that were written before it are not in the directory that the next save writes."""
    calls = []

    def third_fails(*args):
        calls.append(args)
        return stop() if len(calls) == 3 else save_file(*args)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(checkpoints, "SHARD_BYTES", 20_000)
        patch.setattr(checkpoints, "save_file", third_fails)
        create(tiny_llama(), seed=1).save(directory)
    assert sha256(directory) == weights_sha256(LLAMA.weights)
    LLAMA.save(directory)
    assert {path.name for path in directory.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("step", [1, 2, "cleanup"])
def test_a_kill_while_directories_are_exchanged_loses_neither(step, directory, monkeypatch):
    """Two renames cannot be one on POSIX: between them the old directory is complete beside the target.  Nor does what
    is left block the next save."""
    real, real_rmtree, calls, other = checkpoints.os.replace, shutil.rmtree, [], create(tiny_llama(), seed=1)

    def replace(source, target):
        if Path(source).is_dir():
            calls.append(source)
            if len(calls) == step:
                stop()
        real(source, target)

    def rmtree(path, **options):
        return stop() if step == "cleanup" and len(calls) == 2 else real_rmtree(path, **options)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(checkpoints.shutil, "rmtree", rmtree)
        patch.setattr(checkpoints.os, "replace", replace)
        other.save(directory)
    old = directory.with_name(directory.name + ".old")
    left = {sha256(path) for path in (directory, old) if path.exists()}
    before, after = weights_sha256(LLAMA.weights), weights_sha256(other.weights)
    assert left == {1: {before}, 2: {before}, "cleanup": {before, after}}[step]
    for _ in range(2):
        other.save(directory)
    assert sha256(directory) == after


def test_saving_replaces_what_an_earlier_save_left(sharded):
    """No shard or index of the old directory may survive: with both, a reader could take either."""
    other = create(tiny_llama(), seed=1)
    other.save(sharded)
    assert {path.name for path in sharded.iterdir()} == {"config.json", "model.safetensors"}
    assert sha256(sharded) == weights_sha256(other.weights)


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
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="it is a link"):
        LLAMA.save(tmp_path / "link")
    assert not any((tmp_path / "elsewhere").iterdir())


def test_saving_passes_over_what_a_killed_save_left(tmp_path):
    """safetensors' own temporary file, found by killing: the run could not be taken up again."""
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / ".tmp55nve4").write_bytes(b"half")
    LLAMA.save(tmp_path / "m")
    assert {path.name for path in tmp_path.iterdir()} == {"m"}
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"config.json", "model.safetensors"}


def test_saving_over_links_leaves_what_they_lead_to(directory, tmp_path):
    """As in the hub's cache, whose directories hold links."""
    (tmp_path / "blobs").mkdir()
    for path in list(directory.iterdir()):
        path.symlink_to(path.rename(tmp_path / "blobs" / path.name))
    create(tiny_llama(), seed=1).save(directory)
    assert sha256(tmp_path / "blobs") == weights_sha256(LLAMA.weights) != sha256(directory)
    assert not [path for path in directory.iterdir() if path.is_symlink()]


@pytest.mark.parametrize("form, weights", [("dense", "fp32"), ("dense", "int8"), ("bf16", "bf16"), ("int8", "int8")])
def test_loaded_weights_do_not_live_in_the_file(form, weights, tmp_path):
    """safetensors hands out tensors that are mapped from the file: what overwrites it would reach into a run."""
    LLAMA.save(tmp_path / "m") if form == "dense" else save_codes(tmp_path / "m", form)
    weights = load(tmp_path / "m", weights=weights).weights
    before = weights_sha256(weights)
    for file in (tmp_path / "m").glob("*.safetensors"):
        with open(file, "r+b") as raw:
            raw.seek(-1000, 2)
            raw.write(b"\xff" * 1000)
    assert weights_sha256(weights) == before
