"""Locks, appended lines and replaced files: what a killed or a second process can do to them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from idavlm.utils import append_lines, drop_torn_line, lock_file, lock_folder, read_json_object, write_text

HOLD = """
import sys, time
from idavlm.utils import lock_folder
with lock_folder(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    """A process that holds the lock of ``tmp_path / "out"``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_at_once_and_told_the_first(tmp_path, owner):
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"out is in use by process {owner.pid}; wait until it ends, or choose"):
        lock_folder(tmp_path / "out").__enter__()
    assert time.monotonic() - start < 1


def test_the_lock_of_a_killed_process_blocks_nothing(tmp_path, owner):
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert (tmp_path / "out" / ".lock").exists()
    with lock_folder(tmp_path / "out"):
        assert (tmp_path / "out" / ".lock").read_text() == f"{os.getpid()}\n"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_lock_is_released_by_an_error_and_can_be_taken_again(tmp_path):
    def work() -> None:
        with lock_folder(tmp_path / "new" / "out"):
            with pytest.raises(ValueError, match="in use by process"):
                lock_folder(tmp_path / "new" / "out").__enter__()
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            work()
    assert not (tmp_path / "new" / "out").exists(), "a new folder that stayed empty is removed"
    with lock_folder(tmp_path / "new" / "out"):
        (tmp_path / "new" / "out" / "kept").touch()
    assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == ["kept"]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; pass a folder"), lock_folder(tmp_path / "file"):
        pass


def test_only_one_of_many_processes_works_at_a_time(tmp_path):
    """Each child enters the lock as soon as it can; two at a time would both see an odd counter."""
    counter = tmp_path / "counter"
    counter.write_text("0")

    def work() -> None:
        done = 0
        while done < 5:
            try:
                with lock_file(tmp_path / "lock", "counter"):
                    value = int(counter.read_text())
                    counter.write_text(str(value + 1))
                    time.sleep(0.001)
                    assert int(counter.read_text()) == value + 1
                    counter.write_text(str(value + 2))
                    done += 1
            except ValueError:
                time.sleep(0.0005)

    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            status = 1
            try:
                work()
                status = 0
            finally:
                os._exit(status)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert counter.read_text() == "40"


def test_appended_lines_are_never_torn(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    append_lines(path, ["one", "zwei ä"])
    with path.open("a") as file:
        file.write('{"torn')
    drop_torn_line(path)
    append_lines(path, [])
    append_lines(path, ["three"])
    assert path.read_text().splitlines() == ["one", "zwei ä", "three"]


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = write_text(tmp_path / "new" / "scores.json", "old")

    def full(self, text, encoding):
        self.write_bytes(text.encode()[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new content")
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["scores.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"), (b"{", "is not valid JSON"), (b"[1]", "holds a JSON list, expected an object"),
        (b'"\xff"', "is not valid JSON"), (b"null", "holds a JSON NoneType"), (b"[" * 99999, "is not valid JSON"),
        (rb'{"a": ["x\ud800"]}', "holds half a surrogate pair"), (rb'{"\uDFFF": 1}', "holds half a surrogate pair"),
    ],
)  # fmt: skip
def test_a_broken_json_file_is_named(tmp_path, content, message):
    (tmp_path / "facts.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"facts\.json {message}"):
        read_json_object(tmp_path / "facts.json")


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    (tmp_path / "facts.json").write_bytes(rb'{"a": "\ud83d\ude00 \\ud800"}')
    assert read_json_object(tmp_path / "facts.json") == {"a": "\U0001f600 \\ud800"}
