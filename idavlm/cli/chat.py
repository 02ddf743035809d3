"""``idavlm chat``: talk to a model in the terminal, about images and a cast of named identities."""

import argparse
import hashlib
import json
import shlex
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idavlm.cli.arguments import positive_int
from idavlm.cli.model_arguments import add_model_arguments, check_model_arguments, load_model

if TYPE_CHECKING:
    from idavlm.inference import BatchingEngine, GenerationOptions, NamedBox, Prompt

COMMANDS = {
    "/identity": ("NAME PHOTO...", "introduce an identity by photos"),
    "/forget": ("NAME", "remove an identity; its encoded photos are deleted"),
    "/identities": ("", "list the identities"),
    "/image": ("FILE...", "add images to the next question"),
    "/draw": ("FILE", "write the last image with the boxes of the last answer"),
    "/map": ("NAME FILE", "write the last image with the identity map of NAME"),
    "/workflow": ("[NAME]", "choose a workflow of a model with inner adaptors, or list them"),
    "/clear": ("", "begin a new conversation; the identities stay"),
    "/save": ("DIR", "append the conversation to the records in DIR/chat.jsonl, and copy its images to DIR/images"),
    "/help": ("", "list the commands"),
    "/quit": ("", "leave; so does Ctrl-D. Ctrl-C ends an answer"),
}
"""Command -> arguments and description. All else is a question."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model_arguments(parser)
    parser.add_argument("--max-new-tokens", type=positive_int, default=256, help="tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for greedy decoding (default)")
    parser.add_argument("--seed", type=int, help="seed of sampling")


def run(arguments: argparse.Namespace) -> None:
    """Load the model and read commands and questions until ``/quit`` or the end of the input."""
    try:
        import prompt_toolkit  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("idavlm chat needs prompt_toolkit; install it by pip install 'idavlm[chat]'.") from error
    check_model_arguments(arguments)
    from idavlm.inference import BatchingEngine, GenerationOptions

    options = GenerationOptions(
        max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature, seed=arguments.seed
    )
    model, processor = load_model(arguments)
    with BatchingEngine(model, processor) as engine:
        session = ChatSession(engine, options, write=_write)
        _write(f"{Path(arguments.model).name} on {model.device}. /help lists the commands.\n")
        for line in _terminal_lines(session) if sys.stdin.isatty() else map(str.strip, sys.stdin):
            try:
                if not session.handle(line):
                    return
            except (ValueError, OSError, KeyError) as error:
                _write(f"{error.args[0] if isinstance(error, KeyError) else error}\n")


class ChatSession:
    """One conversation and its cast.

    The photos of an identity are encoded once. Nothing is written to disk but by ``/save``, ``/draw`` and ``/map``.

    Args:
        engine: runs the model.
        options: how answers are generated.
        write: shows a piece of text.
    """

    def __init__(self, engine: "BatchingEngine", options: "GenerationOptions", *, write: Callable[[str], None]) -> None:
        from idavlm.inference import PromptEncoder
        from idavlm.models import IdentityBank

        self.engine = engine
        self.options = options
        self.write = write
        self.encoder = PromptEncoder(engine.processor)
        self.bank = IdentityBank(engine.model, engine.processor)
        self.photos: dict[str, list[Path]] = {}
        self.messages: list[dict[str, Any]] = []
        self.next_images: list[Path] = []
        self.last_prompt: Prompt | None = None
        self.last_boxes: tuple[NamedBox, ...] = ()

    def handle(self, line: str) -> bool:
        """Run a command or ask a question. Returns False at ``/quit``.

        Raises:
            ValueError, OSError, KeyError: what is wrong with the line; the conversation is as before.
        """
        if not line:
            return True
        if not line.startswith("/"):
            self.ask(line)
            return True
        command, *words = shlex.split(line)
        if command not in COMMANDS:
            raise ValueError(f"{command} is not known; /help lists the commands.")
        usage, _ = COMMANDS[command]
        required = [word for word in usage.split() if not word.startswith("[")]
        unlimited = usage.endswith("...")
        if len(words) < len(required) or (len(words) > len(usage.split()) and not unlimited):
            raise ValueError(f"usage: {command} {usage}".rstrip())
        if command == "/quit":
            return False
        getattr(self, command.removeprefix("/"))(*words)
        return True

    def ask(self, question: str) -> None:
        """Ask a question about the next images, and show the answer as it arrives."""
        from idavlm.inference import named_boxes

        content = [{"type": "image", "image": str(image)} for image in self.next_images]
        turn = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        bank = self.bank if len(self.bank) else None
        prompt = self.encoder.encode([*self.messages, turn], bank=bank)
        generation = self.engine.submit(prompt, self.options)
        try:
            for piece in generation:
                self.write(piece)
        except KeyboardInterrupt:
            generation.cancel()
            self.write("\n(interrupted; the question is not part of the conversation)\n")
            return
        self.write("\n")
        self.messages += [turn, {"role": "assistant", "content": generation.text}]
        self.next_images = []
        self.last_prompt, self.last_boxes = prompt, named_boxes(self.engine.processor, generation.text, prompt)
        for box in self.last_boxes:
            corners = ", ".join(f"{edge:.0f}" for edge in box.box)
            self.write(f"  box {f'of {box.name} ' if box.name else ''}[{corners}]; /draw FILE writes it\n")

    def identity(self, name: str, *photos: str) -> None:
        """Introduce an identity."""
        files = [_file(photo) for photo in photos]
        if name in self.bank:
            raise ValueError(f"{name} is introduced already; /forget {shlex.quote(name)} first.")
        self.engine.run(lambda: self.bank.add(name, files)).result()
        self.photos[name] = files
        self.write(f"{name}: {len(files)} photo{'s' * (len(files) > 1)}\n")

    def forget(self, name: str) -> None:
        """Remove an identity."""
        self.bank.remove(name)
        del self.photos[name]
        self.write(f"{name} is forgotten\n")

    def identities(self) -> None:
        """List the identities."""
        for introduced, files in self.photos.items():
            self.write(f"{introduced}: {', '.join(map(str, files))}\n")
        if not self.photos:
            self.write("no identity is introduced; /identity NAME PHOTO... introduces one\n")

    def image(self, *images: str) -> None:
        """Add images to the next question."""
        from idavlm.data.photos import PhotoLoader

        files = [_file(image) for image in images]
        loader = PhotoLoader(**self.engine.processor.image_limits)
        for file in files:
            loaded = loader.load(file, field="the image")
            self.write(f"{file}: {loaded.width} x {loaded.height}\n")
        self.next_images += files

    def draw(self, out: str) -> None:
        """Write the last image with the boxes of the last answer."""
        from idavlm.inference import draw_boxes

        if not self.last_boxes:
            raise ValueError("the last answer holds no box, so there is nothing to draw.")
        draw_boxes(self._last_image(), self.last_boxes, self.last_prompt.names).save(out)
        self.write(f"{out}\n")

    def map(self, name: str, out: str) -> None:
        """Write the last image with the identity map of one identity."""
        from idavlm.inference import draw_identity_map, identity_maps

        if self.last_prompt is None:
            raise ValueError("there is no answer yet; ask about an image first.")
        maps = self.engine.run(lambda: identity_maps(self.engine, self.last_prompt)).result()
        last = len(self.last_prompt.scene_sizes) - 1
        found = next((entry for entry in maps if entry.image == last), None)
        if found is None:
            raise ValueError("the tokens of the last image form no grid, so there is no map to draw.")
        draw_identity_map(self._last_image(), found, name).save(out)
        self.write(f"{out}\n")

    def workflow(self, name: str | None = None) -> None:
        """Choose a workflow, or list all."""
        from idavlm.utils import check_choice

        if not self.engine.workflows:
            raise ValueError("the model has no inner adaptors, so it has no workflows.")
        if name is None:
            self.write(f"workflows: {', '.join(self.engine.workflows)}\n")
            return
        check_choice("workflow", name, self.engine.workflows)
        self.options = replace(self.options, workflow=name)
        self.write(f"workflow {name}\n")

    def clear(self) -> None:
        """Begin a new conversation."""
        self.messages, self.next_images, self.last_prompt, self.last_boxes = [], [], None, ()
        self.write("new conversation\n")

    def save(self, out: str) -> None:
        """Append the conversation to a file as a record, with copies of its images."""
        from idavlm.utils import append_lines

        if not self.messages:
            raise ValueError("there is no answer yet, so there is nothing to save.")
        images = Path(out) / "images"
        images.mkdir(parents=True, exist_ok=True)
        identities = [
            {"name": name, "images": [_copied(file, images) for file in files]} for name, files in self.photos.items()
        ]
        messages = []
        for turn in self.messages:
            if turn["role"] == "user":
                content = [
                    {**part, "image": _copied(Path(part["image"]), images)} if part["type"] == "image" else part
                    for part in turn["content"]
                ]
                turn = {**turn, "content": content}
            messages.append(turn)
        record = {
            "id": f"chat-{uuid.uuid4().hex}",
            "source": "identity" if identities else "general",
            "identities": identities,
            "messages": messages,
        }
        append_lines(Path(out) / "chat.jsonl", [json.dumps(record, ensure_ascii=False)])
        self.write(f"{Path(out) / 'chat.jsonl'}\n")

    def help(self) -> None:
        """List the commands."""
        width = max(len(f"{command} {usage}") for command, (usage, _) in COMMANDS.items())
        for command, (usage, text) in COMMANDS.items():
            self.write(f"  {f'{command} {usage}':{width}}  {text}\n")
        self.write("All else is a question.\n")

    def _last_image(self):
        from idavlm.data.photos import PhotoLoader

        turns = (turn["content"] for turn in self.messages if turn["role"] == "user")
        images = [part["image"] for content in turns for part in content if part["type"] == "image"]
        if not images:
            raise ValueError("the conversation has no image; /image FILE adds one to the next question.")
        return PhotoLoader(**self.engine.processor.image_limits).load(images[-1], field="the image")


def _copied(file: Path, folder: Path) -> str:
    """Copy an image into a folder, under a name by its content, and return the name."""
    content = file.read_bytes()
    name = f"{hashlib.sha256(content).hexdigest()[:16]}{file.suffix.lower()}"
    (folder / name).write_bytes(content)
    return name


def _file(text: str) -> Path:
    file = Path(text).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"{text} does not exist or is not a file; pass the path of an image.")
    return file


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _terminal_lines(session: ChatSession) -> Iterator[str]:
    """Lines that a person types, with history, search and completion of commands, names and paths."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, PathCompleter, WordCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)
    commands = WordCompleter(
        list(COMMANDS), sentence=True, meta_dict={key: text for key, (_, text) in COMMANDS.items()}
    )

    class CommandCompleter(Completer):
        def get_completions(self, document, event):
            text = document.text_before_cursor
            if not text.startswith("/"):
                return
            command, space, rest = text.partition(" ")
            if not space:
                yield from commands.get_completions(document, event)
            elif command == "/workflow":
                yield from WordCompleter(list(session.engine.workflows)).get_completions(document, event)
            elif command in ("/forget", "/map") and " " not in rest:
                yield from WordCompleter(list(session.photos)).get_completions(document, event)
            elif command not in ("/identity", "/forget") or (command == "/identity" and " " in rest):
                word = rest.rpartition(" ")[2]
                yield from paths.get_completions(Document(word, len(word)), event)

    prompt = PromptSession(completer=CommandCompleter(), complete_while_typing=False)  # its history stays in memory
    while True:
        try:
            yield prompt.prompt("> ").strip()
        except KeyboardInterrupt:  # drops the line
            continue
        except EOFError:
            return
