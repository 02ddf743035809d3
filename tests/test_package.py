"""What a user meets before any tensor: the import, the public names, the README."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import idavlm

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize("code", ["import idavlm", "from idavlm import IDFormer, cross_attention, build_connector"])
def test_import_pulls_in_neither_transformers_nor_triton(code):
    loaded = run(f"{code}; import sys; print(*sys.modules)").split()
    assert not {"transformers", "triton", "timm", "peft", "deepspeed", "flash_attn", "torch._dynamo"} & set(loaded)
    assert ("torch" in loaded) is ("from" in code), "the bare import costs nothing"


def test_public_names_are_there_and_documented():
    assert set(idavlm._HOME_OF) | {"__version__"} == set(idavlm.__all__)
    for name, home in idavlm._HOME_OF.items():
        public = getattr(idavlm, name)
        assert public is getattr(importlib.import_module(home), name)
        assert public.__doc__, name
    with pytest.raises(AttributeError, match=r"no attribute 'IDFomer'; it offers .*IDFormer"):
        _ = idavlm.IDFomer


def test_readme_snippet_runs_as_pasted():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert snippets
    for snippet in snippets:
        run(snippet)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_in_docs_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_docs_name_files_that_exist(page):
    text = page.read_text()
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), f"{page.name} names {module}"
    for script in re.findall(r"python ((?:examples|docs)/[\w/]+\.py)", text):
        assert (ROOT / script).exists(), f"{page.name} names {script}"
