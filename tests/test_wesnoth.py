"""The Wesnoth data set: unit files, characters, palettes, images and records, on a fake game."""

import hashlib
import json
import shutil
import subprocess
from collections import Counter, defaultdict
from random import Random

import numpy as np
import pytest
from PIL import Image

from idavlm.data import parse_sample
from idavlm.datasets.wesnoth import build_wesnoth, package
from idavlm.datasets.wesnoth.backgrounds import cut, read_grounds
from idavlm.datasets.wesnoth.painting import paint
from idavlm.datasets.wesnoth.recolouring import RED, TEAM_SHADES, Recolouring, team_palette
from idavlm.datasets.wesnoth.sprites import activity_of, read_characters
from idavlm.datasets.wesnoth.units import expand_frames, parse_units, read_units
from tests import fake_wesnoth

OPTIONS = {
    "num_palettes": 3,
    "num_photos": 6,
    "num_train_scenes": 12,
    "num_test_scenes": 8,
    "num_general": 10,
    "num_train_records": 120,
    "num_test_records": 12,
    "size": 64,
}


@pytest.fixture(scope="module")
def game(tmp_path_factory):
    return fake_wesnoth.make(tmp_path_factory.mktemp("game"))


@pytest.fixture(scope="module")
def root(game, tmp_path_factory):
    return build_wesnoth(tmp_path_factory.mktemp("wesnoth") / "data", package=game, **OPTIONS)


def records(root, name):
    return [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]


def test_frame_sequences():
    assert expand_frames("bow-[1~3].png") == ["bow-1.png", "bow-2.png", "bow-3.png"]
    assert expand_frames("bow-[3~1,2*4].png") == ["bow-1.png", "bow-2.png", "bow-3.png"]
    assert expand_frames("bow-[08~10].png") == ["bow-08.png", "bow-09.png", "bow-10.png"]
    assert expand_frames("bow.png") == ["bow.png"]


def test_a_unit_file():
    (unit,) = parse_units(fake_wesnoth.unit_file(7))
    assert (unit.id, unit.name, unit.race) == ("Unit 7", "Unit Number 7", "clan1")
    assert unit.image == "units/clan/unit7.png"
    assert unit.profile == "portraits/clan/unit7.png"
    assert unit.description == "It is said of number 7:\nnothing."
    endings = ["", "-bow-attack1", "-bow-attack2", "-defend-1", "-defend-2", "-melee-1", "-melee-2"]
    assert list(unit.sprites) == sorted(f"units/clan/unit7{ending}.png" for ending in endings)


def test_macros_are_valid_until_undef_and_keys_of_nested_blocks_are_ignored():
    units = parse_units("""
#define PATH
units/a/#enddef
[unit_type]
    [attack]
        id=sword
        name=sword
        [specials]
            id=deep
        [/specials]
    [/attack]
    id=First
    image="{PATH}first.png"
[/unit_type]
#undef PATH
[unit_type]
    id=Second
    name=_"female^Second One" # a remark
    image="{PATH}second.png"
[/unit_type]
""")
    assert [(unit.id, unit.name, unit.image) for unit in units] == [
        ("First", "First", "units/a/first.png"),
        ("Second", "Second One", ""),
    ]


def test_a_macro_that_calls_itself_ends():
    assert parse_units("#define A\n{A}{A}\n#enddef\n[unit_type]\nid=x\n{A}\n[/unit_type]")[0].id == "x"


@pytest.mark.parametrize(
    ("file", "activity"),
    [
        ("units/elves/archer-bow-attack1.png", "shooting"),
        ("units/elves/archer-bow-defend.png", "defending"),
        ("units/elves/archer+female-sword-3.png", "fighting"),
        ("units/elves/archer-die2.png", "falling"),
        ("units/elves/archer-se-run4.png", "running"),
        ("units/elves/archer.png", "standing"),
        ("units/elves/archer-magic-1.png", "casting a spell"),
    ],
)
def test_activities_from_file_names(file, activity):
    assert activity_of(file, "units/elves/archer.png") == activity


def test_the_units_own_name_is_no_activity():
    assert activity_of("units/orcs/axe-thrower-throw.png", "units/orcs/axe-thrower.png") == "shooting"
    assert activity_of("units/elves/bow-sword.png", "units/elves/bow-sword.png") == "standing"


def test_characters_have_named_and_unnamed_frames(game):
    characters = read_characters(game, read_units(game))
    assert len(characters) == fake_wesnoth.NUM_UNITS
    assert all(len(character.frames) == len(fake_wesnoth.FRAMES) for character in characters), (
        "including idle frames, which no unit file names"
    )
    assert Counter(frame.activity for frame in characters[0].frames) == {
        "standing": 3,
        "shooting": 2,
        "defending": 2,
        "fighting": 2,
    }
    frame = next(frame for frame in characters[3].frames if frame.file.endswith("unit3.png"))
    assert (frame.pixels[..., 3] > 0).any(0).all()
    assert (frame.pixels[..., 3] > 0).any(1).all()


def test_units_that_share_a_sprite_are_one_character(tmp_path):
    """Sprites are shared by file name or by pixels. A file with a longer name is not shared."""
    data = fake_wesnoth.make(tmp_path, num_units=6)
    cfg = data / "core" / "units" / "clan"
    (cfg / "00.cfg").write_text((cfg / "00.cfg").read_text().replace("-defend-1.png", "-defend-1.png unit1.png", 1))
    (cfg / "00.cfg").write_text((cfg / "00.cfg").read_text().replace(" unit1.png", '" "units/clan/unit1.png', 1))
    sprites = data / "core" / "images" / "units" / "clan"
    shutil.copy(sprites / "unit4-melee-1.png", sprites / "unit3-melee-2.png")
    shutil.copy(sprites / "unit5.png", sprites / "unit2-bat.png")
    groups = read_characters(data, read_units(data))
    assert [character.name for character in groups] == [
        "Unit Number 0",
        "Unit Number 2",
        "Unit Number 3",
        "Unit Number 5",
    ]
    assert len(groups[0].frames) == 2 * len(fake_wesnoth.FRAMES)


def test_small_and_duplicate_frames_and_characters_with_few_frames_are_left_out(tmp_path):
    data = fake_wesnoth.make(tmp_path, num_units=3)
    sprites = data / "core" / "images" / "units" / "clan"
    Image.new("RGBA", (72, 72)).save(sprites / "unit0-idle-1.png")
    shutil.copy(sprites / "unit1-melee-1.png", sprites / "unit1-melee-2.png")
    cfg = data / "core" / "units" / "clan" / "01.cfg"
    cfg.write_text(
        cfg.read_text().replace("[variation]", '[frame]\nimage="units/clan/unit1-teleport.png"\n[/frame]\n[variation]')
    )
    fake_wesnoth.sprite(1, 12).save(sprites / "unit1-teleport.png")
    for ending in ("-idle-1", "-idle-2"):
        (sprites / f"unit2{ending}.png").unlink()
    found = read_characters(data, read_units(data))
    assert [(character.name, len(character.frames)) for character in found] == [
        ("Unit Number 0", 8),
        ("Unit Number 1", 8),
    ]


def test_team_colours():
    palette = dict(zip(TEAM_SHADES, team_palette(RED).tolist(), strict=True))
    assert palette["F49AC1"] == [255, 0, 0], "the base shade becomes the colour"
    assert palette["3F0016"][0] < 80
    assert palette["3F0016"][1:] == [0, 0]
    assert min(palette["FDE9F1"]) > 150, "bright shades are close to white"
    pixels = np.array([[[0xF4, 0x9A, 0xC1, 255], [10, 20, 30, 200]]], dtype=np.uint8)
    assert Recolouring().apply(pixels).tolist() == [[[255, 0, 0, 255], [10, 20, 30, 200]]]
    assert Recolouring(team=(0, 0, 255)).apply(pixels)[0, 0].tolist() == [0, 0, 255, 255]


def test_palettes_are_the_same_for_every_frame_keep_alpha_and_differ():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 4), dtype=np.uint8)
    palettes = [Recolouring.draw(Random(seed)) for seed in range(6)]
    coloured = [palette.apply(pixels) for palette in palettes]
    for palette, result in zip(palettes, coloured, strict=True):
        assert (result[..., 3] == pixels[..., 3]).all()
        assert (palette.apply(pixels[:4]) == result[:4]).all()
        assert np.abs(result[..., :3].astype(int) - pixels[..., :3]).mean() > 20
    assert len({result.tobytes() for result in coloured}) == 6


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_boxes_are_those_of_the_pixels_and_figures_are_in_order(count):
    """The figure is measured as the pixels that do not differ between a black and a grey background."""
    figures = [np.array(fake_wesnoth.sprite(number, 2)) for number in range(count)]
    figures = [figure[20:60, 20:56] for figure in figures]
    for seed in range(15):
        painted = [
            paint(figures, [1.0] * count, Image.new("RGB", (128, 128), (light,) * 3), Random(seed))
            for light in (0, 100)
        ]
        (black, boxes), (grey, again) = painted
        assert boxes == again
        # The background's share of each pixel, up to rounding.
        share = (np.asarray(grey).astype(float) - np.asarray(black))[..., 0]
        share /= share.max()
        sure, perhaps = share < 0.48, share < 0.52
        inside = np.zeros((128, 128), dtype=bool)
        for x1, y1, x2, y2 in boxes:
            assert 0 <= x1 < x2 <= 128
            assert 0 <= y1 < y2 <= 128
            inside[y1:y2, x1:x2] = True
            edges = (
                perhaps[y1, x1:x2],
                perhaps[y2 - 1, x1:x2],
                perhaps[y1:y2, x1],
                perhaps[y1:y2, x2 - 1],
            )
            assert all(edge.any() for edge in edges)
        assert not (sure & ~inside).any()
        centres = [(x1 + x2) / 2 for x1, _, x2, _ in boxes]
        assert centres == sorted(centres)


def test_grounds_and_landscapes(game):
    grounds = read_grounds(game, Random(0))
    assert [(ground.kind, ground.landscape) for ground in grounds] == [("grass", False), ("hills", True)]
    for ground in grounds:
        assert cut(ground, 48, Random(1)).size == (48, 48)
    assert cut(grounds[0], 48, Random(1)).getpixel((20, 20)) == (30, 120, 30)


def test_no_grounds_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no terrain"):
        read_grounds(tmp_path, Random(0))


def test_splits_are_of_different_characters(root):
    splits = json.loads((root / "dataset.json").read_text())["splits"]
    assert {split: len(members) for split, members in splits.items()} == {"test": 5, "validation": 5, "train": 14}
    assert len({member for members in splits.values() for member in members}) == fake_wesnoth.NUM_UNITS
    for split in splits:
        for record in records(root, split):
            paths = [path for identity in record["identities"] for path in identity["images"]]
            paths += [box["image"] for box in record["boxes"]]
            assert all(path.startswith(f"{split}/") for path in paths)
            shown = {path.split("/")[-1].rsplit("-", 2)[0] for path in paths if "/photos/" in path}
            assert shown <= set(splits[split])


def test_records_obey_the_schema_and_their_images_exist(root):
    for name in ("train", "general", "test", "validation"):
        for record in records(root, name):
            sample = parse_sample(record)
            assert all((root / "images" / path).is_file() for path in sample.images)
    with Image.open(root / "images" / "train" / "scenes" / "0.jpg") as image:
        assert (image.size, image.format) == ((64, 64), "JPEG")


def test_training_names_are_drawn_from_all_units_and_test_names_are_the_units_own(root):
    catalogue = {row["key"]: row for row in records(root, "characters")}
    names = [identity["name"] for record in records(root, "train") for identity in record["identities"]]
    assert set(names) == {row["name"] for row in catalogue.values()}
    namesakes = defaultdict(set)
    for record in records(root, "train"):
        for identity in record["identities"]:
            namesakes[identity["name"]].add(identity["images"][0].split("/")[-1].rsplit("-", 2)[0])
    assert all(len(looks) > 1 for looks in namesakes.values())
    for record in records(root, "test"):
        for identity in record["identities"]:
            key = identity["images"][0].split("/")[-1].rsplit("-", 2)[0]
            assert identity["name"] == catalogue[key]["name"]


def test_portraits_of_held_out_characters_are_in_no_general_image(root):
    """Each fake portrait has one shade of red: 9 times the number of the unit."""
    held_out = {9 * int(row["key"].split("-")[1]) for row in records(root, "characters") if row["split"] != "train"}
    for record in records(root, "general"):
        if record["messages"][1]["content"].startswith("Clan"):
            with Image.open(root / "images" / record["messages"][0]["content"][0]["image"]) as image:
                red = image.getpixel((5, 60))[0]
            assert min(abs(red - other) for other in held_out) > 3


def test_the_same_options_give_the_same_bytes(game, root, tmp_path):
    def digests(folder):
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).digest() for p in folder.rglob("*.*")}

    again = build_wesnoth(tmp_path / "again", package=game, **OPTIONS)
    assert digests(again) == digests(root)
    before = (root / "dataset.json").stat().st_mtime_ns
    assert build_wesnoth(root, package=tmp_path / "not needed any more", **OPTIONS) == root
    assert (root / "dataset.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(("option", "value"), [("num_photos", 3), ("size", 16), ("num_palettes", 0)])
def test_options_out_of_range(tmp_path, game, option, value):
    with pytest.raises(ValueError, match=f"{option}={value}"):
        build_wesnoth(tmp_path / "data", package=game, **(OPTIONS | {option: value}))


def test_too_few_characters(tmp_path):
    game = fake_wesnoth.make(tmp_path / "game", num_units=9)
    with pytest.raises(ValueError, match="has 2 characters for test"):
        build_wesnoth(tmp_path / "data", package=game, **OPTIONS)
    assert not (tmp_path / "data").exists()


def test_a_package_is_unpacked_into_the_cache(tmp_path, monkeypatch):
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb to make a package")
    monkeypatch.setenv("IDAVLM_CACHE", str(tmp_path / "cache"))
    fake_wesnoth.make(tmp_path / "tree", num_units=1)
    (tmp_path / "tree" / "DEBIAN").mkdir()
    control = "Package: fake\nVersion: 1\nArchitecture: all\nMaintainer: none\nDescription: fake\n"
    (tmp_path / "tree" / "DEBIAN" / "control").write_text(control)
    deb = tmp_path / "wesnoth-1.16-data_1_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(tmp_path / "tree"), str(deb)], check=True, capture_output=True)
    data = package.find_data(deb)
    assert data.is_relative_to(tmp_path / "cache")
    assert len(read_units(data)) == 1
    # Downloaded by apt-get: the same file, which is then found in the cache.
    monkeypatch.setattr(package, "_run", _apt_that_copies(deb, package._run))
    assert len(read_units(package.find_data())) == 1
    monkeypatch.setattr(package, "_run", None)
    assert len(read_units(package.find_data())) == 1


def _apt_that_copies(deb, run):
    def fake(command, folder):
        if command[0] == "apt-get":
            assert command == ["apt-get", "download", "wesnoth-1.16-data"]
            shutil.copy(deb, folder)
        else:
            run(command, folder)

    return fake


def test_what_to_do_without_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("IDAVLM_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"'apt-get' is not installed.*by hand.*package="):
        build_wesnoth(tmp_path / "data", **OPTIONS)


def test_a_program_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("IDAVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program = tmp_path / "apt-get"
    program.write_text("#!/bin/sh\necho no network >&2\nexit 100\n")
    program.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"no network.*by hand"):
        package.find_data()


def test_a_folder_or_file_that_is_no_package(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data of Wesnoth"):
        package.find_data(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        package.find_data(tmp_path / "missing.deb")
