"""idavlm-tiny, the trained model of the package: its name, its files, and its scores on characters of this test."""

import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from idavlm import IDAVLMForConditionalGeneration, IDAVLMProcessor, RecordDataset
from idavlm.datasets import build_characters
from idavlm.evaluation import evaluate, load_checkpoint
from idavlm.models.pretrained import PRETRAINED, resolve_pretrained

FOLDER = Path(resolve_pretrained("idavlm-tiny"))


def test_a_name_stands_for_the_folder_in_the_package(monkeypatch, tmp_path):
    """Other names and paths are not touched, and a folder of the same name in the current folder comes first."""
    monkeypatch.chdir(tmp_path)
    assert FOLDER.is_dir()
    assert resolve_pretrained("idavlm-large") == "idavlm-large"
    assert resolve_pretrained(tmp_path) == tmp_path
    (tmp_path / "idavlm-tiny").mkdir()
    assert resolve_pretrained("idavlm-tiny") == "idavlm-tiny"
    with pytest.raises(OSError, match="idavlm-tiny"):
        IDAVLMForConditionalGeneration.from_pretrained("idavlm-tiny")


def test_all_loaders_give_the_same_model():
    """By name without a network; the Auto classes of transformers by folder."""
    first = IDAVLMForConditionalGeneration.from_pretrained("idavlm-tiny")
    second, processor = load_checkpoint("idavlm-tiny")
    third = AutoModelForImageTextToText.from_pretrained(FOLDER)
    for other in (second, third):
        for (name, mine), theirs in zip(first.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs), name
    for each in (processor, AutoProcessor.from_pretrained(FOLDER)):
        assert each.image_seq_length == IDAVLMProcessor.from_pretrained("idavlm-tiny").image_seq_length


def test_the_files_are_small_and_described():
    assert PRETRAINED == tuple(path.name for path in FOLDER.parent.iterdir() if path.is_dir() and path.name[0] != "_")
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 6 * 2**20
    card = (FOLDER / "README.md").read_text()
    for word in ("python examples/train_idformer.py", "matching", "location", "drawn characters"):
        assert word in card, word
