"""Lines that introduce identities, in records and in prompts."""

import pytest

from idavlm.data import READERS, parse_sample
from idavlm.data.introductions import read_introduction, reads_as_name
from idavlm.models.chat_rendering import references_in_text


def read(question):
    """Names with their images, and the rest of the question with ``[image]`` for images."""
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": "A."}]
    sample = parse_sample(READERS["qwen_vl"]({"conversations": turns}, "f:1"), where="f:1")
    text = "".join(part.text or f"[{part.image}]" for part in sample.messages[0].content)
    return {identity.name: identity.images for identity in sample.identities}, text


LINES = {
    "Kate is <img>a</img>": {"Kate": ["a"]},
    "<sks> is <img>a</img>": {"<sks>": ["a"]},
    "the <sks> dog is <img>a</img>": {"the <sks> dog": ["a"]},
    "Kate is <img>a</img>\r": {"Kate": ["a"]},
    "Kate is <img>a</img>, Tom is <img>b</img>.": {"Kate": ["a"], "Tom": ["b"]},
    "Kate is <img>a</img> Tom is <img>b</img>": {"Kate": ["a"], "Tom": ["b"]},
    "Kate is <img>a</img>; Tom is <img>b</img>; Ann is <img>c</img>": {"Kate": ["a"], "Tom": ["b"], "Ann": ["c"]},
    "Kate is <img>a</img> and Tom is <img>b</img>": {"Kate": ["a"], "Tom": ["b"]},
    "Kate is <img>a</img>, and Tom is <img>b</img>!": {"Kate": ["a"], "Tom": ["b"]},
    "Kate is <img>a</img><img>b</img>": {"Kate": ["a", "b"]},
    "Kate is <img>a</img>, <img>b</img> and <img>c</img>.": {"Kate": ["a", "b", "c"]},
    "Kate is <img>a</img> <img>b</img>, Tom is <img>c</img>": {"Kate": ["a", "b"], "Tom": ["c"]},
    "小明是<img>a</img>": {"小明": ["a"]},
    "小明是<img>a</img>，小红是<img>b</img>。": {"小明": ["a"], "小红": ["b"]},  # noqa: RUF001
    "小明是<img>a</img>和小红是<img>b</img>": {"小明": ["a"], "小红": ["b"]},
    "小明是<img>a</img>，和珅是<img>b</img>": {"小明": ["a"], "和珅": ["b"]},  # noqa: RUF001
    "小明 是 <img>a</img>": {"小明": ["a"]},
    "那英是<img>a</img>": {"那英": ["a"]},
    "哪吒是<img>a</img>": {"哪吒": ["a"]},
    "Dr. J. Watson is <img>a</img>": {"Dr. J. Watson": ["a"]},
    "Kate's father is <img>a</img>": {"Kate's father": ["a"]},
    "The reference vehicle is <img>a</img>": {"The reference vehicle": ["a"]},
    "Person 1 is <img>a</img>": {"Person 1": ["a"]},
    ", Tom is <img>a</img>": {"Tom": ["a"]},
    "Cathedral,_Mexico is <img>a</img>": {"Cathedral,_Mexico": ["a"]},
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_introduces_identities_and_is_removed(line):
    assert read(f"{line}\nWho is [this]?") == (LINES[line], "Who is [this]?")


@pytest.mark.parametrize(
    ("line", "names", "rest"),
    [
        ("Given some people, Kate is <img>a</img>", {"Kate": ["a"]}, "Given some people,"),
        ("Look: Kate is <img>a</img>, Tom is <img>b</img>", {"Kate": ["a"], "Tom": ["b"]}, "Look:"),
        ("Hello there. Kate is <img>a</img>", {"Kate": ["a"]}, "Hello there."),
        ("请看，小明是<img>a</img>", {"小明": ["a"]}, "请看，"),  # noqa: RUF001
    ],
)
def test_text_before_an_introduction_stays(line, names, rest):
    assert read(f"{line}\r\nWho?") == (names, f"{rest}\r\nWho?")


@pytest.mark.parametrize(
    "line",
    [
        "This person is <img>a</img>",
        "That man is <img>a</img>",
        "The person is <img>a</img>",
        "A woman is <img>a</img>",
        "This is <img>a</img>",
        "Who is <img>a</img>",
        "The second image is <img>a</img>",
        "Picture 1 is <img>a</img>",
        "In the scene, this boy is <img>a</img>",
        "In the next scene, the answer is <img>a</img>",
        "这是<img>a</img>",
        "这个人是<img>a</img>",
        "那位是<img>a</img>",
        "他是<img>a</img>",
        "图片1是<img>a</img>",
        "第一张图是<img>a</img>",
        "是<img>a</img>",
        "Paris<img>a</img>",
        "Kate is in <img>a</img>",
        "Kate is <img>a</img> in winter",
        "Kate is <img>a</img>. Where is she in <img>b</img>?",
        "<img>a</img> is <img>b</img>",
        "<ref>Kate</ref> is <img>a</img>",
        "One sunny day in May the old friend of Kate is <img>a</img>",
    ],
)
def test_other_lines_stay(line):
    names, text = read(f"{line}\nWho?")
    assert names == {}
    assert text == line.replace("<img>", "[").replace("</img>", "]") + "\nWho?"


def test_names():
    for text in ("Kate", "Person 1", "the <sks> dog", "It's Me", "Thistle", "Whoopi", "The Doctor", "user"):
        assert reads_as_name(text), text
    for text in ("", " ", "it", "This", "this dog", "The image", "photo 3", "the person", "这", "他们"):
        assert not reads_as_name(text), text


def test_a_prompt_is_read_like_a_record():
    def names(text, **options):
        options = {"header": "", "special": ["<|im_start|>", "<|im_end|>"], **options}
        return references_in_text(text, "<image>", "<image>", **options)

    assert names("Kate is <image>, Tom is <image>\n<image> Who?") == ["Kate", "Tom", None]
    assert names("小明是<image>\n这个人是<image>") == ["小明", None]
    assert names("<|im_start|>user\nKate is <image>\r\nWho?") == ["Kate"]
    assert names("USER: Kate is <image><image>", header="USER: ") == ["Kate", "Kate"]
    assert names("<|im_end|>Kate is <image>") == ["Kate"]
    assert names("Kate is <image>\nIs Kate in <image>, <image>?") == ["Kate", None, None]


def test_a_line_without_images_is_no_introduction():
    assert read_introduction(["Kate is"]) is None
