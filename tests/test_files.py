"""Writing files: the old content or the new one, whatever happens."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from thrifty.errors import ThriftyError
from thrifty.files import check_writable, clear_partial, make_directory, replacing, sha256, write_text


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_new_content_replaces_old_and_directories_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "old")
    write_text(path, "neu: ä")
    assert path.read_text(encoding="utf-8") == "neu: ä"
    assert names(path.parent) == ["file.txt"]


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    link, path = tmp_path / "link", tmp_path / "other" / "file.txt"
    link.symlink_to(path)
    for text in ("first", "second"):
        write_text(link, text)
        assert link.is_symlink()
        assert path.read_text() == text
    assert names(tmp_path) == ["link", "other"]
    assert names(path.parent) == ["file.txt"]


def test_what_is_no_regular_file_is_left_alone(tmp_path):
    pipe, circle = tmp_path / "pipe", tmp_path / "circle"
    os.mkfifo(pipe)
    circle.symlink_to(circle)
    for path in (pipe, tmp_path, circle, tmp_path / "a\0b", tmp_path / ("x" * 300)):
        for write in (check_writable, lambda path: write_text(path, "text")):
            with pytest.raises(ThriftyError, match=r"^cannot write .* Choose another place\.$"):
                write(path)
    assert names(tmp_path) == ["circle", "pipe"]
    assert pipe.is_fifo()


def test_a_place_can_be_tried_without_writing(tmp_path):
    path = tmp_path / "file.txt"
    check_writable(path)
    assert names(tmp_path) == []
    write_text(path, "old")
    check_writable(path)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_leaves_the_old_content(tmp_path, error):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_kill_inside_leaves_the_old_content_and_a_part_that_can_be_cleared(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    write_text(tmp_path / "file.txt.other", "stays")
    code = (
        "import os, sys; from thrifty.files import replacing\n"
        "with replacing(sys.argv[1]) as part: part.write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(names(tmp_path)) == 3
    clear_partial(path)
    assert names(tmp_path) == ["file.txt", "file.txt.other"]


def test_a_full_disk_is_one_error_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ThriftyError, match=r"cannot write .*file\.txt: No space left on device\. Free some space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


@pytest.fixture
def small_files_only():
    """Files of this process may have 20,000 bytes."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files_only")
def test_a_file_that_grows_too_large_is_one_error(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(3)}, path)
    with (
        pytest.raises(ThriftyError, match=r"cannot write .*weights\.safetensors: .*File too large"),
        replacing(path) as temporary,
    ):
        save_file({"a": torch.zeros(100_000)}, temporary)
    assert torch.equal(load_file(path)["a"], torch.ones(3))
    with pytest.raises(ThriftyError, match="File too large"):
        write_text(tmp_path / "text", "x" * 100_000)
    assert names(tmp_path) == ["weights.safetensors"]


@pytest.mark.parametrize("place", ["file/below", "directory"])
def test_places_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "directory").mkdir()
    with pytest.raises(ThriftyError, match=f"cannot write .*{place}.*\\. Choose another place"):
        write_text(tmp_path / place, "text")
    assert names(tmp_path) == ["directory", "file"]
    assert not names(tmp_path / "directory")


def test_directories_are_made_or_the_reason_is_told(tmp_path):
    for _ in range(2):
        make_directory(tmp_path / "a" / "b")
    write_text(tmp_path / "a" / "file", "text")
    for place in ("file", "file/below"):
        with pytest.raises(ThriftyError, match=r"cannot make the directory .*Choose another place"):
            make_directory(tmp_path / "a" / place)


def test_permissions_are_those_of_the_old_file_or_the_usual_ones(tmp_path):
    path = tmp_path / "file"
    mask = os.umask(0o027)
    try:
        write_text(path, "a")
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o604)
        write_text(path, "b")
        assert path.stat().st_mode & 0o777 == 0o604
    finally:
        os.umask(mask)


def test_sha256(tmp_path):
    path = tmp_path / "file"
    content = bytes(range(256)) * 10_000
    path.write_bytes(content)
    assert sha256(path) == hashlib.sha256(content).hexdigest()
