"""What a run was made with: git revision, versions of packages, machine."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from idavlm.utils import describe_machine

MAX_CHANGES = 500_000
"""Length of ``git diff`` up to which a run stores it."""


def git_state(folder: str | Path) -> dict[str, Any] | None:
    """Revision of the git checkout that ``folder`` is in, and the changes to its files that are not committed.

    Returns:
        ``{"revision", "dirty", "changes"}``, where ``changes`` is the text of ``git diff HEAD``; None outside of git.
    """
    revision = _git(folder, "rev-parse", "HEAD")
    if revision is None:
        return None
    changes = _git(folder, "diff", "HEAD") or ""
    untracked = _git(folder, "ls-files", "--others", "--exclude-standard", "--", "*.py") or ""
    return {"revision": revision.strip(), "dirty": bool(changes.strip() or untracked.strip()), "changes": changes}


def describe_environment(program: str) -> dict[str, Any]:
    """Git revisions of the program's and of idavlm's checkout, package versions and machine, as JSON values."""
    folders = {"program": Path(program).resolve().parent, "idavlm": Path(__file__).parent}
    states = {name: git_state(folder) for name, folder in folders.items()}
    return {
        "git": {name: state and {key: state[key] for key in ("revision", "dirty")} for name, state in states.items()},
        "changes": {name: _shortened(state["changes"]) for name, state in states.items() if state and state["changes"]},
        "packages": {found.name: found.version for found in sorted(metadata.distributions(), key=lambda d: d.name)},
        "python": platform.python_version(),
        "executable": sys.executable,
        "machine": describe_machine(),
    }


def _shortened(changes: str) -> str:
    """The text of a diff, unless it is too long to be stored with every run."""
    return changes if len(changes) <= MAX_CHANGES else f"{len(changes)} characters are not stored; commit the changes."


def _git(folder: str | Path, *arguments: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError:  # git is not installed
        return None
    return found.stdout if found.returncode == 0 else None
