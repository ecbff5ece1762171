"""The benchmarks' official archives: fetched once, compared with their SHA-256, and unpacked into a cache folder.

A file is unpacked only where a task asks for it, and to the place that the task names; an archive with a path or a
link that leads anywhere else is refused as a whole.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import stat
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data.tasks import Task

LOCAL = Path("datasets")  # where files are looked for before anything is fetched
LARGEST_MEMBER = 2 * 2**30  # bytes, unpacked; MNLI's largest file has 0.3 GB


class Archive(NamedTuple):
    url: str  # of a .zip, or of a plain file
    sha256: str
    size: int  # bytes


def _super_glue(name: str, sha256: str, size: int) -> tuple[Archive, ...]:
    return (Archive(f"https://dl.fbaipublicfiles.com/glue/superglue/data/v2/{name}.zip", sha256, size),)


GLUE, SQUAD = "https://dl.fbaipublicfiles.com/glue/data", "https://rajpurkar.github.io/SQuAD-explorer/dataset"
# SHA-256 and sizes: those that Hugging Face's `datasets` recorded of the same addresses
ARCHIVES = {
    "sst2": (
        Archive(f"{GLUE}/SST-2.zip", "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa", 7439277),
    ),
    "mnli": (
        Archive(f"{GLUE}/MNLI.zip", "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633", 312783507),
    ),
    "boolq": _super_glue("BoolQ", "853fbe7922f70c59629f06a39e8d9ca440c3d740e760fd3b87a5ddf3dcba2436", 4118001),
    "cb": _super_glue("CB", "8d641383298d54554066ba1c93f56ae7410af75df621b90c63028806bbbbb535", 75482),
    "copa": _super_glue("COPA", "405906cddac74bc1e1ce8220f1107d1025b66a25ef10149d91b10bb30651125f", 43986),
    "multirc": _super_glue("MultiRC", "b3cd440856e72eb166b2edcd37b798455f1ebd51f2c3de64c0c2a4e1971d2737", 1116225),
    "record": _super_glue("ReCoRD", "30c7b651ab21b8bf8fab986495cd1084333010e040548f861b839eec0044ac18", 51757880),
    "rte": _super_glue("RTE", "6310aab3f000424c9d0318a1ff20692e07c7f4aa15e8f17a5972ea0a35c398b9", 750920),
    "wic": _super_glue("WiC", "ee7e67f4ae9eafbf533780faa198e62167f3cda54256cdf261877be3c0e90900", 396213),
    "wsc": _super_glue("WSC", "2ed6dfa94556b4a128ff0441efe365b2e883124e7e6aa00fb8d3a6cb1fd520a9", 32751),
    "squad": (
        Archive(
            f"{SQUAD}/train-v1.1.json", "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955", 30288272
        ),
        Archive(f"{SQUAD}/dev-v1.1.json", "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9", 4854279),
    ),
    "drop": (
        Archive(
            "https://s3-us-west-2.amazonaws.com/allennlp/datasets/drop/drop_dataset.zip",
            "39d2278a29fd729de301b111a45f434c24834f40df8f4ff116d864589e3249d6", 8308692,
        ),
    ),
}  # fmt: skip
# sst5, snli, trec: of their archive no SHA-256 is published
LM_BFF_HAS = "its files are in https://nlp.cs.princeton.edu/projects/lm-bff/datasets.tar, to be unpacked by hand"


def local_folder(task: Task) -> Path | None:
    """datasets/ if it has a folder of the task's, else the cache if all of the task's files are there, else None."""
    folders = [Path(path).parent for path in task.files.values()]
    folders += [Path(path).parent.parent for path in task.k_shot.values()]  # of the splits
    if any((LOCAL / folder).is_dir() for folder in folders):
        return LOCAL
    return cache() if all((cache() / path).is_file() for path in task.files.values()) else None


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quzo" / "datasets"


def data_folder(task: Task) -> Path:
    """What --data-dir is where it is not said: a local folder, or the cache, into which the archives are fetched.

    Raises ValueError, with the addresses, where the files cannot be had.
    """
    folder = local_folder(task)
    if folder is not None:
        return folder
    wanted, archives = [cache() / path for path in task.files.values()], ARCHIVES.get(task.name, ())
    for archive in archives:
        fetch(archive, wanted)
    missing = [path.name for path in wanted if not path.is_file()]
    if missing:
        told = f"{' and '.join(archive.url for archive in archives)} hold no {missing[0]}" if archives else LM_BFF_HAS
        raise ValueError(f"task {task.name}: {told}; say --data-dir FOLDER, with {', '.join(task.files.values())}")
    return cache()


def fetch(archive: Archive, wanted: list[Path]) -> None:
    """Put those of the wanted files in their places that the archive holds.

    Raises ValueError for what cannot be fetched, is not what it should be, or would write elsewhere.
    """
    name = archive.url.rpartition("/")[2]
    folder = wanted[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / f"{name}.{os.getpid()}.partial"
    try:
        _download(archive, whole)
        if not name.endswith(".zip"):
            place = next(path for path in wanted if path.name == name)
            os.replace(whole, place)
            return
        with zipfile.ZipFile(whole) as opened:
            for path, member in _members(opened, wanted, archive.url).items():
                partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
                with opened.open(member) as source, partial.open("wb") as target:
                    shutil.copyfileobj(source, target)
                os.replace(partial, path)
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise ValueError(f"{archive.url} is no .zip file that can be read: {error}") from None
    finally:
        for partial in folder.glob(f"*.{os.getpid()}.partial"):
            partial.unlink()


def _download(archive: Archive, path: Path) -> None:
    digest, size = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(archive.url, timeout=30) as answer, path.open("wb") as file:
            while size <= archive.size and (part := answer.read(2**20)):
                digest.update(part)
                size += len(part)
                file.write(part)
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise ValueError(f"cannot fetch {archive.url}: {error}; go online, or unpack it yourself and say where with "
                         "--data-dir") from None  # fmt: skip
    if size != archive.size or digest.hexdigest() != archive.sha256:
        got = f"{size:,} bytes, SHA-256 {digest.hexdigest()}" if size <= archive.size else f"more than {size - 1:,}"
        raise ValueError(f"{archive.url} is not the published file of {archive.size:,} bytes, SHA-256 "
                         f"{archive.sha256}: got {got}")  # fmt: skip


def _members(opened: zipfile.ZipFile, wanted: list[Path], url: str) -> dict[Path, zipfile.ZipInfo]:
    """The wanted files that the archive holds, in its only folder or outside of any."""
    found = {}
    for member in opened.infolist():
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or path.parts[:1] and ":" in path.parts[0]:
            raise ValueError(f"{url} holds {member.filename!r}, which leads out of its folder; nothing was unpacked")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ValueError(f"{url} holds a link, {member.filename!r}; nothing was unpacked")
        if member.file_size > LARGEST_MEMBER:
            raise ValueError(f"{url} holds {member.filename!r} of {member.file_size / 2**30:.1f} GB; at most "
                             f"{LARGEST_MEMBER >> 30} are unpacked")  # fmt: skip
        place = next((place for place in wanted if place.name == path.name), None)
        if place is not None and len(path.parts) <= 2 and not member.is_dir():
            found[place] = member
    return found
