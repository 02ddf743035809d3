"""The README and the pages of docs/: links, commands and Python blocks."""

import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
LOG = ROOT / "docs" / "research_log"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
USER_PAGES = [page for page in PAGES if LOG not in page.parents]
NOT_EXECUTED = re.compile(r"<!-- not executed: (\S.*) -->")
MOST_NOT_EXECUTED = 5


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str
    not_executed: str | None

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Fenced blocks, each with the reason of a ``not executed`` comment on the last line of text before it."""
    found, start, fence, language, before = [], None, "", "", ""
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        match = re.match(r"\s*(`{3,}|~{3,})\s*([\w-]*)", line)
        if start is None and match:
            start, fence, language = number, match[1], match[2]
        elif start is not None and line.strip() == fence:
            code = textwrap.dedent("\n".join(lines[start : number - 1])) + "\n"
            reason = NOT_EXECUTED.fullmatch(before)
            found.append(Block(page, start, language, code, reason and reason[1]))
            start, before = None, ""
        elif start is None and line.strip():
            before = line.strip()
    assert start is None, f"{name_of(page)}:{start}: this block does not end"
    return found


BLOCKS = [block for page in USER_PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language in ("python", "py")]


def prose(page: Path) -> str:
    """The text of a page without its fenced blocks."""
    return re.sub(r"^\s*(```|~~~).*?^\s*\1\s*$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as Python-Markdown and GitHub make them, and explicit ones."""
    found = set(re.findall(r"""(?:id|name)="([^"]+)"|\{ ?#([\w-]+)""", page.read_text()))
    found = {anchor for pair in found for anchor in pair if anchor}
    for heading in re.findall(r"^#+ (.*?)\s*(?:\{.*\})?$", prose(page), flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        text = re.sub(r"[^\w\s-]", "", text.replace("`", "")).strip().lower()
        found |= {re.sub(r"[-\s]+", "-", text), re.sub(r"\s", "-", text)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path = page.parent / target if target else page
        assert path.exists(), f"{name_of(page)} links to {target}, which does not exist"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{name_of(page)} links to {target}#{anchor}, which is no heading there"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_name_what_exists(page):
    from idavlm.cli.main import COMMANDS

    text = page.read_text()
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), f"{name_of(page)} names {module}"
    for script in re.findall(
        r"\b((?:examples|benchmarks|recipes|docs/figures|tests)/[\w/.-]+\.(?:py|ya?ml|json))", text
    ):
        assert (ROOT / script).exists(), f"{name_of(page)} names {script}"
    code = "\n".join([block.code for block in blocks(page)] + re.findall(r"`([^`\n]+)`", prose(page)))
    for command in re.findall(r"^\s*(?:\$ )?idavlm ([\w-]+)", code, flags=re.MULTILINE):
        assert command in COMMANDS, f"{name_of(page)} names idavlm {command}"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for target in re.findall(r"^\s*(?:\$ )?make ([a-z][\w-]*)", code, flags=re.MULTILINE):
        assert target in targets, f"{name_of(page)} names make {target}"


@pytest.mark.parametrize("page", USER_PAGES, ids=name_of)
def test_pages_use_the_public_api(page):
    """Commands are ``idavlm ...``, and no path names a private module or attribute.

    The exception stands for ``run.py`` of VLMEvalKit, whose arguments it takes.
    """
    command = r"python3? -m idavlm(?!\.evaluation\.vlmevalkit\b)[\w.]*"
    private = re.findall(command + r"|\bidavlm(?:\.\w+)*\._(?!_)\w+[\w.]*", page.read_text())
    assert not private, f"{name_of(page)} names {private}"


def test_few_blocks_are_not_executed():
    skipped = [f"{block}: {block.not_executed}" for block in PYTHON if block.not_executed]
    assert len(skipped) <= MOST_NOT_EXECUTED, skipped


@pytest.mark.parametrize("block", [block for block in PYTHON if not block.not_executed], ids=str)
def test_python_blocks_run(block, tmp_path, monkeypatch):
    """Each block alone, in an empty folder."""
    module = ModuleType("documentation_block")  # in sys.modules: dataclasses look up their module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["block.py"])
    random = torch.get_rng_state()
    try:
        # Lines of errors are those of the page.
        exec(compile("\n" * block.line + block.code, block.page, "exec"), module.__dict__)
    finally:
        torch.set_rng_state(random)
