"""Files of data sets: where a name is looked for, and downloads from a server on this machine, good ones and bad."""

from __future__ import annotations

import gzip
import hashlib
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal import files, shakespeare
from shoal.cli import app
from shoal.errors import DataError

CONTENT = b"FIRST:\nSo shaken as we are, so wan with care.\n\nSECOND:\nFind we a time.\n" * 50
PLACES = {
    "/plain": CONTENT,
    "/good.gz": gzip.compress(CONTENT),
    "/cut.gz": gzip.compress(CONTENT)[:-40],
    "/page.gz": b"<html>please log in</html>",
    "/other": CONTENT[::-1],
    "/long": bytes(1 << 20),
    "/bomb.gz": gzip.compress(bytes(1 << 20)),
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = PLACES.get(self.path.removeprefix("/short"))
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:-9] if self.path.startswith("/short") else body)  # a connection that ends early

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def remote(url: str, name: str = "text", size: int = len(CONTENT)) -> files.Remote:
    digest = hashlib.sha256(CONTENT).hexdigest()
    return files.Remote(name, url, size, lambda raw, where: files.check_sum(raw, digest, where, "the text's"))


@pytest.mark.parametrize(("place", "kept"), [("/plain", "text"), ("/good.gz", "text.gz")])
def test_what_is_fetched_is_kept_and_not_fetched_again(address, tmp_path, place, kept):
    there = tmp_path / "new" / "folder"
    assert files.fetch(there, [remote(address + place)]) == [there / kept]
    assert files.read(files.find(there, "text")) == CONTENT
    assert [path.name for path in there.iterdir()] == [kept]
    assert files.fetch(there, [remote("http://127.0.0.1:9/nobody")]) == []


@pytest.mark.parametrize(
    ("place", "word"),
    [
        ("/other", "not the text's bytes"),
        ("/cut.gz", "cut off"),
        ("/page.gz", "no gzip archive"),
        ("/bomb.gz", "not the text's bytes"),
        ("/long", "more than"),
        ("/short/plain", "not the text's bytes"),
        ("/nothing", "404"),
    ],
)
def test_what_is_not_the_file_is_not_kept(address, tmp_path, place, word):
    size = len(CONTENT) if place != "/long" else 100
    with pytest.raises(DataError, match=word) as error:
        files.fetch(tmp_path, [remote(address + place, size=size)])
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_one_line_says_what_to_put_where(address, tmp_path):
    port = int(address.rpartition(":")[2])
    refused = f"http://127.0.0.1:{port + 1 if port < 65535 else port - 1}/text.gz"
    with pytest.raises(DataError, match=r"refused.*without a network, put that file into .* as text\.gz") as error:
        files.fetch(tmp_path, [remote(refused)])
    assert "\n" not in str(error.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        files.fetch(tmp_path / "file" / "folder", [remote(address + "/plain")])


def test_a_name_is_looked_for_in_order(address, tmp_path, monkeypatch):
    shared, cache = tmp_path / "shared", tmp_path / "cache"
    monkeypatch.setenv("SHOAL_DATA", str(shared))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    held = lambda place: files.find(place, "text") is not None  # noqa: E731
    found = partial(files.folder, name="plays", complete=held, remotes=[remote(address + "/plain")])
    assert found("./plays") == Path("plays"), "a path is taken as it is"
    assert found("plays") == cache / "shoal" / "plays", "downloaded, since it is nowhere"
    assert files.find(cache / "shoal" / "plays", "text") is not None
    (shared / "plays").mkdir(parents=True)
    (shared / "plays" / "text").write_bytes(CONTENT)
    assert found("plays") == shared / "plays"
    monkeypatch.delenv("SHOAL_DATA")
    assert found("plays") == cache / "shoal" / "plays"


def test_the_command_line_downloads_by_name_and_fails_in_one_line(address, tmp_path, monkeypatch):
    monkeypatch.delenv("SHOAL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shakespeare, "URL", address + "/nothing")
    words = ["run", "shakespeare", "GD()", "--rounds", "1", "--step", "0.1", "--out", str(tmp_path / "out")]
    failed = CliRunner().invoke(app, [*words, "--data", "tinyshakespeare"])
    assert isinstance(failed.exception, DataError)
    assert "put that file into" in str(failed.exception)
    monkeypatch.setattr(shakespeare, "URL", address + "/plain")
    monkeypatch.setattr(shakespeare, "SIZE", len(CONTENT))
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    done = CliRunner().invoke(app, [*words, "--data", "tinyshakespeare", "--rows", "2"])
    assert done.exit_code == 0, done.output
    assert files.find(tmp_path / "shoal" / "tinyshakespeare", shakespeare.FILE) is not None
