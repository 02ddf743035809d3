"""``idavlm chat``: commands, streamed answers, boxes in a file; a terminal that tmux types into."""

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from idavlm import RecordDataset, ask
from idavlm.cli.chat import COMMANDS, ChatSession
from idavlm.cli.main import main
from idavlm.inference import BatchingEngine, GenerationOptions, NamedBox
from tests.small_models import answering_model, small_processor

pytest.importorskip("prompt_toolkit", reason="idavlm chat needs the extra chat")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def small():
    processor = small_processor()
    model = answering_model(processor)
    return model, processor


@pytest.fixture(scope="module")
def checkpoint(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for part in small:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(small):
    with BatchingEngine(*small) as engine:
        yield engine


@pytest.fixture
def shown():
    return []


@pytest.fixture
def session(engine, shown):
    return ChatSession(engine, GenerationOptions(max_new_tokens=8), write=shown.append)


def test_a_conversation_about_a_cast(session, shown, small, root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    cast = {"Kate": [root / "kate.png", root / "other.png"], "Tom Jones": [root / "tom.png"]}
    assert session.handle("/identity Kate kate.png other.png")
    assert session.handle('/identity "Tom Jones" tom.png')
    session.handle("/image scene.png")
    del shown[:]
    session.handle("Where is Kate?")
    expected = ask(*small, "Where is Kate?", images=[root / "scene.png"], identities=cast, max_new_tokens=8)
    text = "".join(shown)
    assert text.startswith(f"{expected}\n")
    assert len(shown) > 2, "the answer arrives in pieces"
    session.handle("And Tom?")
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2
    assert session.messages[1]["content"] == expected
    assert session.messages[2]["content"] == [{"type": "text", "text": "And Tom?"}], "the image is asked about once"
    session.handle(f"/save {tmp_path / 'saved'}")
    (sample,) = RecordDataset(tmp_path / "saved" / "chat.jsonl")
    assert [identity.name for identity in sample.identities] == ["Kate", "Tom Jones"]
    assert len(sample.messages) == 4
    for saved, image in ((sample.identities[1].images[0], "tom.png"), (sample.message_images[0], "scene.png")):
        assert (tmp_path / "saved" / "images" / saved).read_bytes() == (root / image).read_bytes()
    session.handle("/forget Kate")
    session.handle("/identities")
    assert shown[-1].startswith("Tom Jones: ")
    session.handle("/clear")
    assert session.messages == []
    assert session.handle("") is True
    assert session.handle("/quit") is False


def test_boxes_and_maps_are_written(session, root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    session.handle("/identity Kate kate.png")
    session.handle("/image tom.png scene.png")
    session.handle("Where is Kate?")
    session.last_boxes = (NamedBox((10.0, 10.0, 40.0, 40.0), "Kate"),)
    for line in (f"/draw {tmp_path / 'boxes.png'}", f"/map Kate {tmp_path / 'map.png'}"):
        session.handle(line)
    scene = Image.open("scene.png")
    for name in ("boxes.png", "map.png"):
        with Image.open(tmp_path / name) as drawn:
            assert drawn.size == scene.size
            assert drawn.convert("RGB").tobytes() != scene.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nothing", "/nothing is not known; /help lists"),
        ("/identity Kate", "usage: /identity NAME PHOTO..."),
        ("/identity Kate nowhere.png", "nowhere.png does not exist"),
        ("/identity 'Ka te", "No closing quotation"),
        ("/image nowhere.png", "nowhere.png does not exist"),
        ("/image chat.txt", "is not an image"),
        ("/draw out.png", "the last answer holds no box"),
        ("/map Kate out.png", "there is no answer yet"),
        ("/save out", "there is no answer yet"),
        ("/workflow grounding", "no inner adaptors"),
        ("/clear now", "usage: /clear"),
        ("/forget Bob", "name='Bob' is not in the bank"),
        ("<image>", "placeholder"),
    ],
)
def test_mistakes_leave_the_conversation_as_it_is(session, root, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.txt").write_text("no image")
    with pytest.raises((ValueError, KeyError), match=message):
        session.handle(line)
    assert session.messages == []
    assert not (tmp_path / "out.png").exists()


def test_ctrl_c_ends_an_answer_but_not_the_chat(small, shown):
    model, processor = small
    with BatchingEngine(model, processor) as engine:
        session = ChatSession(engine, GenerationOptions(max_new_tokens=4000, temperature=2.0), write=shown.append)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)

        def interrupt():
            while not shown:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        try:
            thread = threading.Thread(target=interrupt)
            thread.start()
            session.handle("Tell me everything.")
        finally:
            thread.join()
            signal.signal(signal.SIGINT, before)
        assert "interrupted" in shown[-1]
        assert session.messages == []
        session.options = GenerationOptions(max_new_tokens=2)
        session.handle("What?")
        assert len(session.messages) == 2


def test_lines_from_a_file(checkpoint, root, monkeypatch, capsys):
    lines = ["/help", f"/image {root / 'scene.png'}", "What is that?", "/nothing", "/quit", "never asked"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", "--model", str(checkpoint), "--max-new-tokens", "4"]) == 0
    out = capsys.readouterr().out
    for command in COMMANDS:
        assert command in out
    assert "80 x 60" in out
    assert "/nothing is not known" in out
    assert "never asked" not in out


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_a_person_types_in_a_terminal(checkpoint, root, tmp_path):
    """Editing, completion, history and an answer, as a terminal of 100 x 30 characters shows them."""
    command = [sys.executable, "-m", "idavlm.cli.main", "chat", "--model", str(checkpoint), "--max-new-tokens", "6"]
    tmux = ["tmux", "-S", str(tmp_path / "socket")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}

    def screen() -> str:
        return subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, text=True, check=True).stdout

    def wait_for(text: str, count: int = 1, *, last: str = "\n>") -> str:
        """Wait until the text is there, and ``last``, by default the prompt, is at the end of the screen."""
        end = time.monotonic() + 300  # of a machine with other work
        while (found := screen()).count(text) < count or not found.rstrip().endswith(last):
            assert time.monotonic() < end, found
            time.sleep(0.05)
        return found

    def type_keys(*keys: str) -> None:
        subprocess.run([*tmux, "send-keys", *keys], check=True)

    subprocess.run(
        [*tmux, "new-session", "-d", "-x", "100", "-y", "30", "-c", str(root), *command], check=True, env=environment
    )
    try:
        wait_for("/help lists the commands")
        type_keys("/identity Kate kate.png", "Enter")
        wait_for("Kate: 1 photo")
        type_keys("/imag", "Tab")
        wait_for("> /image", last="> /image")  # completions are found by a thread
        type_keys(" scene.png", "Enter")
        wait_for("80 x 60")
        type_keys("Where is Kate?", "Enter")
        wait_for("> Where is Kate?")
        type_keys("Up", "Enter")  # the same question again
        found = wait_for("> Where is Kate?", count=2)
        type_keys("C-d")
        end = time.monotonic() + 30
        while subprocess.run([*tmux, "has-session"], capture_output=True, check=False).returncode == 0:
            assert time.monotonic() < end, screen()
            time.sleep(0.05)
    finally:
        subprocess.run([*tmux, "kill-server"], capture_output=True, check=False)
    assert "> /image scene.png" in found
