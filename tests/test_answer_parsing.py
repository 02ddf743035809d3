"""Parsing of unusual answers."""

import time

import pytest

from idavlm.evaluation import parse_image_number, parse_letter, parse_yes_no
from idavlm.models import BoxFormat

CHOICES = [
    ("In the picture a woman wears a hat.", None),
    ("In the picture I see Kate.", None),
    ("In the picture a woman, in image B Kate.", 2),
    ("image II", 2),
    ("Option I.", 1),
    ("I believe it is Image 2 because the hair matches, while Image 1, 3, and 4 show different people.", 2),
    ("Image 1: different person. Image 2: different. Image 3: same person. Image 4: different.\nSo Image 3.", 3),
    ("Image 1: no. Image 2: no. Image 3: yes. Image 4: no.", 3),
    ("The person in image 3 matches the reference image.", 3),
    ("Definitely image 4; images 1-3 are other people", 4),
    ("The correct answer is B) Image 2", 2),
    ("The answer is not image 2 but image 1", 1),
    ("Kate isn't in any image.", None),
    ("应该是第2张图片, 不是第1张", 2),
    ("3\ufe0f\u20e3", 3),
    ("\u2462", 3),
    ("Picture 3", 3),
    ("It is picture three.", 3),
    ("Image 4, not Image 1", 4),
    ("image4", 4),
    ("The photo #2 shows Kate", 2),
    ("It is #\n 2", 2),
    (" 2. ", 2),
    ("Picture 12", 12),
    ("She wears 2 hats", None),
    ("pictures", None),
    ("", None),
    ("The third image shows her.", 3),
    ("the 3rd of them", 3),
    ("Image one", 1),
    ("Option C", 3),
    ("(B)", 2),
    ("B.", 2),
    ("b", 2),
    ("D", 4),
    ("**Image 2**", 2),
    ("Not image 1, but image 3.", 3),
    ("It is not Image 1, 2 or 3 but Image 4.", 4),
    ("Image 1 is not Kate. Image 2 is.", 2),
    ("Images 1, 2 and 3 do not show her; image 4 does.", 4),
    ("Image 1 or 2", None),
    ("Image 1 and Image 3", None),
    ("图三", 3),
    ("第二张图片", 2),
    ("图片4", 4),
    ("答案是第四张。", 4),
    ("不是图一,而是图二", 2),
    ("图4不是图1", 4),
    ("图4不是凯特, 图1是", 1),
    ("Kate is in Image 2. Image 1 shows someone else.", 2),
    ("Image 1 shows another woman, Image 3 shows Kate.", 3),
    ("<think>Maybe image 1? No.</think>Image 2", 2),
    ("Looking at image 1 and image 2 ... The answer is: image 3", 3),
    ("Answer: 4", 4),
    ("Answer: D", 4),
    ("I think it is 3.", 3),
    ("I cannot tell.", None),
    ("None of the images show her.", None),
    ("Image 7", 7),
    ("Image #1.", 1),
    ("image_2", 2),
    ("Image number 4", 4),
    ("Kate is the woman in the second photo, with a red hat.", 2),
    ("Image 4", 4),
    ("2) Image 2", 2),
    ("The correct one is image two rather than image one.", 2),
    ("Image 3 (not 1, 2 or 4)", 3),
    ("Neither image 1 nor image 2; it's image 3.", 3),
    ("Picture Ⅲ", 3),
    ("A woman in a hat", None),
    ("I see four people.", None),
    ("In image 3, I can see Kate. She is not in image 4.", 3),
    ("Image 2 is the same person as the reference.", 2),
    ("The last one", None),
    ("Image 10% sure", None),
    ("It isn't image 4. It's image 1.", 1),
    ("She appears in 2 of the images, image 3 most clearly.", 3),
    ("Image 2", 2),
    ("3: the woman in red", 3),
    ("Kate is not in Image 1, Image 2, or Image 3, so she must be in Image 4.", 4),
]


@pytest.mark.parametrize(("text", "number"), CHOICES)
def test_choices(text, number):
    assert parse_image_number(text) == number


def test_choices_of_a_known_number_and_name():
    assert parse_image_number("Image 7", count=4) is None
    assert parse_image_number("Image 4", count=4) == 4
    several = "Image 1 shows Tom. Image 2 shows Kate. Image 3 shows a dog."
    assert parse_image_number(several, name="Kate") == 2
    assert parse_image_number(several, name="Mia") == 1
    assert parse_letter("The answer is (C).") == "C"
    assert parse_letter("E", count=4) is None
    assert parse_letter("Image 30") is None, "beyond Z"


SIZE = (500, 1000)  # height, width
KATE = [120, 40, 630, 490]
TOM = [700, 100, 900, 400]
BOXES = [
    ("[120, 40, 630, 490]", KATE),
    ("(120,40),(630,490)", KATE),
    ("<box>(120,40),(630,490)</box>", KATE),
    ("<ref>Kate</ref><box>(120,40),(630,490)</box>", KATE),
    ("<|box_start|>(120,40),(630,490)<|box_end|>", KATE),
    ("120, 40, 630, 490", KATE),
    ("120,40,630,490.", KATE),
    ("120 40 630 490", KATE),
    ("[120 40 630 490]", KATE),
    ("[[120, 40, 630, 490]]", KATE),
    ('{"bbox_2d": [120, 40, 630, 490], "label": "Kate"}', KATE),
    ('```json\n[{"bbox_2d": [120, 40, 630, 490]}]\n```', KATE),
    ('{"x1": 120, "y1": 40, "x2": 630, "y2": 490}', KATE),
    ("xmin=120, ymin=40, xmax=630, ymax=490", KATE),
    ("left: 120, top: 40, right: 630, bottom: 490", KATE),
    ("x: 120, y: 40, width: 510, height: 450", KATE),
    ("The top left corner is (120, 40) and the bottom right corner is (630, 490).", KATE),
    ("from (120, 40) to (630, 490)", KATE),
    ("Kate, who is 34, stands at [120, 40, 630, 490] beside 2 friends.", KATE),
    ("[630, 490, 120, 40]", KATE),
    ("[630, 40, 120, 490]", KATE),
    ("(630,490),(120,40)", KATE),
    ("[120.0, 40.0, 630.0, 490.0]", KATE),
    ("[120px, 40px, 630px, 490px]", KATE),
    ("[120,40,630,490", KATE),
    ("[120; 40; 630; 490]", KATE),
    ("\uff3b120\uff0c40\uff0c630\uff0c490\uff3d", KATE),
    ("[-30, -10, 630, 2000]", [0, 0, 630, 500]),
    ("[1200, 600, 1500, 900]", None),
    ("[120, 40, 120, 490]", None),
    ("Kate is at [120, 40, 630, 490], Tom at [700, 100, 900, 400].", KATE),
    ("Tom is at [700, 100, 900, 400], Kate at [120, 40, 630, 490].", KATE),
    ("<ref>Tom</ref><box>(700,100),(900,400)</box><ref>Kate</ref><box>(120,40),(630,490)</box>", KATE),
    ("[120, 40, 630, 490] or [700, 100, 900, 400]", KATE),
    ("not [700, 100, 900, 400] but [120, 40, 630, 490]", KATE),
    ("Perhaps [700, 100, 900, 400]? The answer is [120, 40, 630, 490].", KATE),
    ("<think>[700, 100, 900, 400]?</think>[120, 40, 630, 490]", KATE),
    ("She is on the left.", None),
    ("", None),
    ("[120, 40, 630]", None),
    ("[120, 40, 630, 490, 7]", None),
    ("There are 3 people, 2 of them women, 1 child and 4 dogs.", None),
    ("[0.12, 0.08, 0.63, 0.98]", None),
    ("<box></box> [120, 40, 630, 490]", None),
    ("[12%, 8%, 63%, 98%]", None),
    ("[700, 100, 900, 400]", TOM),
]


@pytest.mark.parametrize(("text", "box"), BOXES)
def test_boxes_in_pixels(text, box):
    assert BoxFormat("pixels").parse(text, SIZE, name="Kate") == box


@pytest.mark.parametrize("kind", ["qwen", "thousand"])
@pytest.mark.parametrize(("text", "box"), [one for one in BOXES if one[1] in (KATE, TOM)])
def test_the_same_in_thousandths(kind, text, box):
    """Only the meaning of numbers differs: in an image of 999 x 999 pixels, thousandths are pixels."""
    assert BoxFormat(kind).parse(text, (999, 999), name="Kate") == box


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("unit", "[305, 1, 535, 234]", "convention"), ("square", "[0, 0, 276, 235]", "convention"),
        ("thousand", "[0.1, 0.2, 0.5, 0.6]", "convention"), ("pixels", "[0.1, 0.2, 0.5, 0.6]", "convention"),
        ("unit", "null", "none"), ("unit", "[0.2, 0.2, 0.2, 0.5]", "empty"),
        ("square", "[0.1, 0.0, 0.2, 0.1]", "empty"),
    ],
)  # fmt: skip
def test_numbers_of_another_box_format_are_rejected(kind, text, reason):
    assert BoxFormat(kind).read(text, SIZE) == (None, reason)
    assert BoxFormat(kind).parse(text, SIZE) is None


def test_the_padded_square_of_inner_adaptors():
    assert BoxFormat("square").parse("[0.12, 0.29, 0.63, 0.74]", SIZE) == pytest.approx([120, 40, 630, 490])


def test_a_size_is_needed_unless_numbers_are_pixels():
    assert BoxFormat("pixels").parse("[120, 40, 2630, 490]", None) == [120, 40, 2630, 490]
    with pytest.raises(ValueError, match=r"image_size=None, but boxes of kind 'qwen'"):
        BoxFormat("qwen").parse("[1, 2, 3, 4]", None)


YES_NO = [
    ("Yes", True), ("yes.", True), ("YES!", True), ("Yes, that is Kate, not Tom.", True), ("No", False), ("no,", False),
    ("No, it is not.", False), ("Nope", False), ("The answer is yes.", True), ("The answer is: no", False),
    ("I don't see her.", False), ("She is not in the picture.", False), ("True", True), ("False", False),
    ("**Yes**", True), ("(yes)", True), ("是", True), ("是的。", True), ("不是", False), ("没有", False), ("否", False),
    ("It isn't her.", False), ("Correct.", True), ("Incorrect", False), ("<think>no?</think>Yes", True),
    ("No doubt? The answer is yes", True), ("Kate", None), ("", None), ("Maybe", None), ("eyes", None),
    ("Norway", None),
    ("I know nothing.", None), ("Yeah", True), ("Yes and no", True), ("It doesn't show Kate.", False),
    ("yes\nno", True),
    ("I cannot see Kate here", False), ("Answer: No.", False), ("\"Yes\"", True), ("Not her.", False),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), YES_NO)
def test_yes_and_no(text, said):
    assert parse_yes_no(text) is said


def test_enough_of_them():
    assert min(len(CHOICES), len(BOXES), len(YES_NO)) >= 40


@pytest.mark.parametrize("text", ["the f\u0131rst one", "\u0130mage s\u0131x", "FIRST f\u0130ve", "the n\u0131nth"])
def test_letters_that_count_as_an_i_without_case(text):
    assert parse_image_number(text) in (1, 5, 6, 9)


UNITS = ["[", "(1,2", "1,1,1,1%", "1", " ", "image ", "image 1 ", "#1", "not ", "the ", "is 1 ", "x1=1 ", "<box>", "1 "]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("before", "after"), [("", ""), ("image", "x"), ("1", "%"), ("the answer is 1", "not")])
def test_the_time_grows_with_the_length_of_the_answer(before, after, unit):
    """Each answer has 40,000 characters. Patterns that go back over it take minutes."""
    text = before + unit * (40_000 // len(unit)) + after
    start = time.perf_counter()
    parse_image_number(text, name="Kate")
    parse_yes_no(text)
    BoxFormat("bins32").parse(text, (30, 50), name="Kate")
    assert time.perf_counter() - start < 10
