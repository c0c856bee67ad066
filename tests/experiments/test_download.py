"""Downloads from a server on the loopback address: whole, interrupted, damaged, and without a server."""

import hashlib
import http.server
import io
import re
import tarfile
import threading

import numpy as np
import pytest

from experiments.harness import data, download, files


class Server(http.server.ThreadingHTTPServer):
    """It sends `content` by path, as HTTP does, or broken as the test asks."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content: dict[str, bytes] = {}
        self.ranges = True  # whether it answers requests for a range
        self.most = None  # bytes after which it closes the connection
        self.asked: list[tuple[str, str | None]] = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers["Range"]
        server.asked.append((self.path, wanted))
        whole = server.content.get(self.path)
        if whole is None:
            return self.send_error(404)
        first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        if first and first >= len(whole):
            return self.send_error(416)
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(whole) - 1}/{len(whole)}")
        self.send_header("Content-Length", str(len(whole) - first))
        self.end_headers()
        self.wfile.write(whole[first:][: server.most])
        return None

    def log_message(self, *args):
        """Nothing on the terminal."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def offer(server, monkeypatch, name, content):
    """Make the server the source of a data set."""
    server.content = {f"/{file}": whole for file, whole in content.items()}
    sources = [
        download.Source(f"http://127.0.0.1:{server.server_port}/{file}", len(whole), hashlib.sha256(whole).hexdigest())
        for file, whole in content.items()
    ]
    monkeypatch.setitem(download.SOURCES, name, tuple(sources))


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.fixture
def mnist(server, monkeypatch, rng):
    """Four small files. The first one, of more than a chunk, is the one to interrupt."""
    arrays = [
        rng.integers(0, 256, (400, 28, 28), np.uint8),
        rng.integers(0, 10, 400, np.uint8),
        rng.integers(0, 256, (5, 28, 28), np.uint8),
        rng.integers(0, 10, 5, np.uint8),
    ]
    content = {file: idx(array) for file, array in zip(files.IDX_FILES, arrays, strict=True)}
    offer(server, monkeypatch, "mnist", content)
    return content


FIRST = f"/{files.IDX_FILES[0]}"


def assert_complete(folder, content):
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content


def test_fetch_downloads_every_file_once(server, mnist, tmp_path, capsys):
    folder = download.fetch("mnist")
    assert folder == tmp_path / "cache" / "bnjax" / "mnist"
    assert_complete(folder, mnist)
    assert server.asked == [(f"/{file}", None) for file in mnist]
    shown = capsys.readouterr().err
    assert all(f"{file}: 100%" in shown for file in mnist)
    assert download.fetch("mnist") == folder
    assert len(server.asked) == 4


def test_load_reads_what_it_downloads(mnist):
    dataset = data.load("mnist")
    assert (dataset.name, dataset.fixed_test) == ("MNIST", True)
    images = np.frombuffer(mnist[files.IDX_FILES[0]][16:], np.uint8).reshape(400, 28, 28)
    np.testing.assert_allclose(dataset.train_images * 255, images, rtol=1e-6)
    np.testing.assert_array_equal(dataset.test_labels, list(mnist[files.IDX_FILES[3]][8:]))


def test_fetch_replaces_a_damaged_file(server, mnist):
    folder = download.fetch("mnist")
    (folder / files.IDX_FILES[1]).write_bytes(b"damaged")
    assert_complete(download.fetch("mnist"), mnist)
    assert server.asked[4:] == [(f"/{files.IDX_FILES[1]}", None)]


def test_fetch_resumes_what_an_earlier_one_left(server, mnist):
    folder = download.cache() / "mnist"
    folder.mkdir(parents=True)
    (folder / f"{files.IDX_FILES[0]}.part").write_bytes(mnist[files.IDX_FILES[0]][:1000])
    assert_complete(download.fetch("mnist"), mnist)
    assert server.asked[0] == (FIRST, "bytes=1000-")


def test_fetch_resumes_while_something_comes(server, mnist):
    server.most = 100_000  # bytes, of 313,616 in the first file
    assert_complete(download.fetch("mnist"), mnist)
    ranges = [asked for path, asked in server.asked if path == FIRST]
    assert ranges == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]


def test_fetch_begins_again_if_the_server_ignores_ranges(server, mnist):
    server.ranges = False
    folder = download.cache() / "mnist"
    folder.mkdir(parents=True)
    (folder / f"{files.IDX_FILES[0]}.part").write_bytes(b"\xff" * 1000)
    assert_complete(download.fetch("mnist"), mnist)
    assert server.asked[0] == (FIRST, "bytes=1000-")


@pytest.mark.parametrize("more", [0, 5])
def test_fetch_checks_a_part_that_is_no_shorter_than_the_file(more, server, mnist):
    whole = mnist[files.IDX_FILES[0]]
    folder = download.cache() / "mnist"
    folder.mkdir(parents=True)
    (folder / f"{files.IDX_FILES[0]}.part").write_bytes(whole + b"\xff" * more)
    assert_complete(download.fetch("mnist"), mnist)
    # A complete part needs no request. A longer one is not a part of this file.
    assert ((FIRST, None) in server.asked) == (more > 0)


def test_fetch_gives_up_if_nothing_more_comes(server, mnist):
    server.ranges, server.most = False, 1000
    message = rf"{FIRST}: not downloaded \(.*\), expected 313616 bytes. The 1000 bytes received are kept.* --data-dir"
    with pytest.raises(data.InputError, match=message):
        download.fetch("mnist")
    assert [path.stat().st_size for path in (download.cache() / "mnist").iterdir()] == [1000]


@pytest.mark.parametrize("damage", [lambda b: b[:-1] + b"!", lambda b: b + b"more", lambda b: b[:-1]])
def test_fetch_rejects_another_file(damage, server, mnist):
    server.content[FIRST] = other = damage(mnist[files.IDX_FILES[0]])
    found, expected = (hashlib.sha256(each).hexdigest() for each in (other, mnist[files.IDX_FILES[0]]))
    with pytest.raises(data.InputError, match=f"{FIRST}: SHA-256 {found}, expected {expected}"):
        download.fetch("mnist")
    assert list((download.cache() / "mnist").iterdir()) == []


def test_fetch_names_the_status_of_a_missing_file(server, mnist):
    del server.content[FIRST]
    with pytest.raises(data.InputError, match=rf"{FIRST}: not downloaded \(status 404, Not Found\)"):
        download.fetch("mnist")


def test_fetch_without_a_network_says_what_to_do(server, mnist, monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    urls = [f"http://127.0.0.1:{port}/{file}" for file in mnist]
    monkeypatch.setitem(download.SOURCES, "mnist", tuple(download.Source(url, 10, "") for url in urls))
    message = (
        rf"{urls[0]}: not downloaded \(.*refused.*\).* fetch {', '.join(urls)} on another machine, and pass --data"
    )
    with pytest.raises(data.InputError, match=message):
        data.load("mnist")


def archive(members):
    """A gzipped tar archive of members, each with its content, or None for a symbolic link out of the folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc"
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content or b""))
    return buffer.getvalue()


@pytest.fixture
def batches(monkeypatch):
    """Six files of one record each: a label, and an image of one value."""
    monkeypatch.setattr(download, "ARCHIVE_SIZE", 3073)
    return {f"cifar-10-batches-bin/{name}": bytes([i] * 3073) for i, name in enumerate(files.CIFAR_FILES)}


def test_cifar_is_unpacked_once_and_only_its_images(server, monkeypatch, batches, tmp_path):
    strange = {"../../../outside": b"x", "cifar-10-batches-bin/link": None, "cifar-10-batches-bin/readme.html": b"x"}
    offer(server, monkeypatch, "cifar10", {"cifar-10-binary.tar.gz": archive(strange | batches)})
    dataset = data.load("cifar10")
    np.testing.assert_array_equal(dataset.train_labels, range(5))
    np.testing.assert_allclose(dataset.train_images[3], np.full((32, 32, 3), 3 / 255), rtol=1e-6)
    assert (dataset.name, dataset.test_labels.tolist()) == ("CIFAR-10", [5])
    found = {path.relative_to(tmp_path / "cache" / "bnjax" / "cifar10").as_posix() for path in tmp_path.rglob("*.*")}
    assert found == set(batches)
    data.load("cifar10")
    assert len(server.asked) == 1


@pytest.mark.parametrize("change", ["missing", "link", "short"])
def test_cifar_rejects_another_archive(change, server, monkeypatch, batches):
    name = "cifar-10-batches-bin/data_batch_2.bin"
    changed = batches | {name: {"missing": b"", "link": None, "short": b"x"}[change]}
    if change == "missing":
        del changed[name]
    offer(server, monkeypatch, "cifar10", {"cifar-10-binary.tar.gz": archive(changed)})
    with pytest.raises(data.InputError, match=r"cifar-10-binary.tar.gz: expected the files .* of 3073 bytes"):
        data.load("cifar10")


def test_the_cache_ignores_a_relative_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert download.cache() == tmp_path / ".cache" / "bnjax"


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_sources_are_well_formed(name):
    for source in download.SOURCES[name]:
        assert re.fullmatch("[0-9a-f]{64}", source.sha256)
    names = [source.name for source in download.SOURCES[name]]
    idx_files = [f"{file}.gz" for file in files.IDX_FILES]
    assert names == (["cifar-10-binary.tar.gz"] if name == "cifar10" else idx_files)
