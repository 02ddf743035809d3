"""One thing has one name, in code and docs: words and names that were replaced do not come back."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("idavlm", "examples", "benchmarks", "recipes", "tests", "docs")
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".txt"}
FIXTURES = ROOT / "tests" / "fixtures"
PRETRAINED = ROOT / "idavlm" / "models" / "pretrained"  # vocabularies, written by tokenizers
FILES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in SUFFIXES
    and path != Path(__file__)
    and FIXTURES not in path.parents
    and not (path.suffix == ".json" and PRETRAINED in path.parents)
]
FILES += [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "mkdocs.yml")
]

# What replaces a word, and the pattern of the word. Patterns are matched against lower-case text.
WORDS = {
    "identity, null token": r"\b(some|no|every)body\b|nobody_",
    "image": r"\bpictures?\b(?! \d| \{|:)|num_pictures?|picture_slots?|_pictures?\b|\bpictures?_",
    "general image": r"\bplain[ _]images?\b|\bnum_plain\b|\bis_plain\b",
    "identity embedding": r"\bslots?\b(?!=true)|\w+_slots?\b|names_as_marks|\bname_marks\b|identity marks?\b",
    "identity pretraining, instruction tuning": r"\b(looking|reading)[ _]stages?\b|stage=['\"](looking|reading)['\"]",
    "teacher forcing, target_identity_map": r"\bwith_known\b|\bknown_map\b|\bknown=",
    "crop_box": r"\bshown[_ ]parts?\b",
    "token_identity_index": r"\bname_identity\b",
    "name_mask": r"\bis_name\b",
    "modules_to_copy": r"\bowned=|\bowned_(?!by\b)\w+|\w_owned\b|['\"]owned['\"]",
    "backends": r"attention_ways|ways_that_run",
    "layer": r"\bfloor \d|\bfloors\b",
    "pass": r"\bgive \w+=",
    "training data, train, supervise": r"\blessons?\b|\bteach(es|ing)?\b|\btaught\b",
    "token_position_embedding": r"(?<!\.)\btoken_(norm|positions)(=|: bool)",
    "contrastive_loss": r"\bcontrast_loss\w*",
    "stage": r"\bidentity_warmup_steps\b",
    "idavlm.experimental.muon": r"\bmuon_modules\b",
    "functools.lru_cache around load_image": r"\bimage_cache_size\b",
    "initial weights of output_proj": r"\bimage_token_scale\b",
    "identity_map_loss": r"\bidentity_attention_loss\b|\bidentity_supervision\b",
}
# Texts that are data: questions and answers of MM-ID and of the built-in data sets. They are removed before matching.
DATA_TEXTS = re.compile(
    r"which picture shows|in which picture is|who is in the pictures\?|what is in the picture\?|"
    r"describe the pictures?\.|\bin picture\b|the picture is"
)
# Files that recognise what models and annotators write, for example "In the picture", "somebody else" or "nobody".
FREE_TEXT = {
    "idavlm/data/introductions.py",
    "idavlm/utils/answer_parsing.py",
    "idavlm/evaluation/scoring.py",
    "idavlm/evaluation/tasks/pvit.py",
    "tests/test_answer_parsing.py",
    "tests/test_more_benchmarks.py",
}
FREE_TEXT_WORDS = {"identity, null token", "image"}
# The data sets describe drawings: an object behind another one, a figure at rest.
OUTSIDE_DATASETS = {"after": r"\bbehind\b", "frozen": r"\bat rest\b"}


@pytest.mark.parametrize("replacement", [*WORDS, *OUTSIDE_DATASETS])
def test_replaced_words_do_not_come_back(replacement):
    pattern = re.compile(WORDS.get(replacement) or OUTSIDE_DATASETS[replacement])
    found = []
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        if replacement in OUTSIDE_DATASETS and "datasets" in name:
            continue
        if replacement in FREE_TEXT_WORDS and name in FREE_TEXT:
            continue
        if pattern.search(path.stem):
            found.append(name)
        for number, line in enumerate(DATA_TEXTS.sub("", path.read_text().lower()).splitlines(), 1):
            found += [f"{name}:{number}: {match[0]}" for match in pattern.finditer(line)]
    listed = "\n".join(found)
    assert not found, f"write {replacement!r} instead, in {len(found)} places:\n{listed}"
