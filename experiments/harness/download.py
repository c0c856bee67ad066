"""Downloads of MNIST, Fashion-MNIST and CIFAR-10, from the publisher or a maintained mirror, into a cache folder.

A file is written beside its place, under a name that ends in `.part`, and renamed when its SHA-256 is right. The part
received before an interruption is kept, and the next download asks the server for the rest only (RFC 9110, section
14.2).
The size and the checksum of each file were published by TensorFlow Datasets, among others.
"""

import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from experiments.harness.files import CIFAR_FILES, InputError

TIMEOUT = 30  # seconds without a byte, after which a connection counts as broken
CHUNK = 1 << 18  # bytes from one look at the progress bar to the next
ARCHIVE_FOLDER = "cifar-10-batches-bin"
ARCHIVE_SIZE = 30_730_000  # bytes of each file in CIFAR-10's archive: 10,000 records of 3073


class Source(NamedTuple):
    """A file on a server, with its size in bytes."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


# The publisher of MNIST no longer offers the files. PyTorch maintains this mirror.
MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"
# The publisher has no certificate for this address. The checksums make up for it.
FASHION_MNIST = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
CIFAR = "https://www.cs.toronto.edu/~kriz"

SOURCES: dict[str, tuple[Source, ...]] = {
    "mnist": (
        Source(
            f"{MNIST}/train-images-idx3-ubyte.gz",
            9_912_422,
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        Source(
            f"{MNIST}/train-labels-idx1-ubyte.gz",
            28_881,
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        Source(
            f"{MNIST}/t10k-images-idx3-ubyte.gz",
            1_648_877,
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        Source(
            f"{MNIST}/t10k-labels-idx1-ubyte.gz",
            4_542,
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "fashion-mnist": (
        Source(
            f"{FASHION_MNIST}/train-images-idx3-ubyte.gz",
            26_421_880,
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        Source(
            f"{FASHION_MNIST}/train-labels-idx1-ubyte.gz",
            29_515,
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        Source(
            f"{FASHION_MNIST}/t10k-images-idx3-ubyte.gz",
            4_422_102,
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        Source(
            f"{FASHION_MNIST}/t10k-labels-idx1-ubyte.gz",
            5_148,
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    "cifar10": (
        Source(
            f"{CIFAR}/cifar-10-binary.tar.gz",
            170_052_171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
}


def cache() -> Path:
    """The folder of all downloads: $XDG_CACHE_HOME/bnjax, by default ~/.cache/bnjax."""
    # The specification of XDG says to ignore a relative path.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "bnjax"


def fetch(name: str) -> Path:
    """The folder of a data set in the cache. Files that are missing or damaged are downloaded.

    Args:
      name: "mnist", "fashion-mnist" or "cifar10".

    Raises:
      InputError: if a server cannot be reached or sends an error, if the connection breaks and trying again gets no
        further, or if a file has another SHA-256.
    """
    folder = cache() / name
    folder.mkdir(parents=True, exist_ok=True)
    archived = name == "cifar10"
    if archived and _is_unpacked(folder):
        return folder
    for source in SOURCES[name]:
        path = folder / source.name
        if not path.is_file() or _sha256(path) != source.sha256:
            _download(source, path, name)
        if archived:
            _unpack(path)
    return folder


def _download(source: Source, path: Path, name: str) -> None:
    part = path.with_name(f"{path.name}.part")
    if _size(part) > source.size:  # not a part of this file
        part.unlink()
    size = _size(part)
    while size != source.size:
        before, problem = size, "the connection was closed early"
        try:
            _receive(source, part)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # the server's file ends before this part does, so it is another file
                break
            problem = f"status {error.code}, {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            problem = str(getattr(error, "reason", error))
        size = _size(part)
        if size > source.size:
            break
        if size <= before:  # a connection that breaks is made again as long as something comes
            raise InputError(_advice(source, name, size, problem))
    found = _sha256(part)
    if found != source.sha256:
        part.unlink()
        raise InputError(
            f"{path}: SHA-256 {found}, expected {source.sha256}. The file from {source.url} was damaged on its way, or "
            "is another one. It was removed. Run the same command again; if that does not help, pass another copy with "
            "--data-dir FOLDER."
        )
    part.replace(path)


def _receive(source: Source, part: Path) -> None:
    """Append the rest of a file, or write the whole file if the server does not send parts."""
    size = _size(part)
    request = urllib.request.Request(source.url, headers={"Range": f"bytes={size}-"} if size else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        # Status 200 announces the whole file, in place of the range that was asked for.
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {size}-")
        size = size if resumed else 0
        with (
            part.open("ab" if resumed else "wb") as file,
            tqdm(total=source.size, initial=size, unit="B", unit_scale=True, desc=source.name) as progress,
        ):
            while size <= source.size and (chunk := response.read(CHUNK)):
                size += file.write(chunk)
                progress.update(len(chunk))


def _advice(source: Source, name: str, size: int, problem: str) -> str:
    urls = ", ".join(each.url for each in SOURCES[name])
    kept = f" The {size} bytes received are kept, and the same command continues after them." if size else ""
    unpack = ", unpack it" if name == "cifar10" else ""
    return (
        f"{source.url}: not downloaded ({problem}), expected {source.size} bytes.{kept} Without a network, "
        f"fetch {urls} on another machine{unpack}, and pass --data-dir FOLDER, the folder with the files."
    )


def _unpack(archive: Path) -> None:
    """Unpack the images of CIFAR-10 and remove the archive. Members other than the expected ones are not touched."""
    folder = archive.parent / ARCHIVE_FOLDER
    part = archive.parent / f"{ARCHIVE_FOLDER}.part"
    shutil.rmtree(part, ignore_errors=True)
    members = {f"{ARCHIVE_FOLDER}/{name}" for name in CIFAR_FILES}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name in members and member.isreg():
                tar.extract(member, part, filter="data")
    if not _is_unpacked(part):
        raise InputError(f"{archive}: expected the files {', '.join(sorted(members))} of {ARCHIVE_SIZE} bytes in it.")
    shutil.rmtree(folder, ignore_errors=True)
    (part / ARCHIVE_FOLDER).replace(folder)
    part.rmdir()
    archive.unlink()


def _is_unpacked(folder: Path) -> bool:
    return all(_size(folder / ARCHIVE_FOLDER / name) == ARCHIVE_SIZE for name in CIFAR_FILES)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
