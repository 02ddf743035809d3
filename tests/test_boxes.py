"""The text forms of boxes: written and read back within their resolution, junk read as nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idavlm.models import BoxFormat
from idavlm.models.boxes import smart_resize

KINDS = (*BoxFormat.KINDS, "bins32")
sizes = st.tuples(st.integers(1, 4000), st.integers(1, 4000))
fractions = st.floats(0, 1, allow_nan=False)


def resolution(kind: str, size: tuple[int, int]) -> tuple[float, float]:
    """Half a step across and down, in pixels, with some tolerance for rounding."""
    height, width = size
    steps = {"unit": 1000, "square": 1000, "bins32": 31, "norm1000": 1000, "gemini": 1000}.get(kind, 999)
    if kind == "resized":
        down, across = smart_resize(height, width, factor=28, min_pixels=3136, max_pixels=12845056)
        return (width / across / 2 + 1e-6 * width, height / down / 2 + 1e-6 * height)
    sides = (max(size),) * 2 if kind == "square" else (width, height)
    if kind == "pixels":
        return (0.5 + 1e-6 * width, 0.5 + 1e-6 * height)
    return tuple(side / steps / 2 + 1e-6 * side for side in sides)


@pytest.mark.parametrize("kind", KINDS)
@given(size=sizes, x=st.tuples(fractions, fractions), y=st.tuples(fractions, fractions))
def test_round_trip(kind, size, x, y):
    height, width = size
    box = [min(x) * width, min(y) * height, max(x) * width, max(y) * height]
    across, down = resolution(kind, size)
    found = BoxFormat(kind).parse("She is here: " + BoxFormat(kind).write("Kate", box, size) + ".", size)
    if found is None:  # too narrow for the steps of the format
        assert box[2] - box[0] <= 2 * across or box[3] - box[1] <= 2 * down
        return
    for value, expected, allowed in zip(found, box, (across, down) * 2, strict=True):
        assert abs(value - expected) <= allowed
    assert 0 <= found[0] < found[2] <= width
    assert 0 <= found[1] < found[3] <= height


EXAMPLES = {
    "qwen": "<ref>Kate</ref><box>(120,40),(630,980)</box>",
    "thousand": "[120, 40, 630, 980]",
    "unit": "[0.120, 0.040, 0.630, 0.980]",
    "square": "[0.120, 0.270, 0.630, 0.740]",
    "norm1000": "[120, 40, 630, 980]",
    "pixels": "[120, 40, 630, 490]",
    "resized": "[121, 40, 635, 494]",
    "gemini": "[40, 120, 980, 630]",
    "bins32": "4 1 20 30",
}


@pytest.mark.parametrize(("kind", "text"), EXAMPLES.items())
def test_the_forms_of_the_documentation(kind, text):
    height, width = 500, 1000
    steps = {"bins32": 31, "unit": 1, "square": 1, "norm1000": 1000, "gemini": 1000}.get(kind, 999)
    if kind == "resized":  # to 504 x 1008
        box = [121 / 1008 * 1000, 40 / 504 * 500, 635 / 1008 * 1000, 494 / 504 * 500]
    elif kind == "square":  # padded by 250 above and below
        box = [120, 20, 630, 490]
    elif kind == "pixels":
        box = [120, 40, 630, 490]
    else:
        numbers = {"bins32": (4, 1, 20, 30), "unit": (0.12, 0.04, 0.63, 0.98)}.get(kind, (120, 40, 630, 980))
        box = [n * side / steps for n, side in zip(numbers, (width, height) * 2, strict=True)]
    assert BoxFormat(kind).write("Kate", box, (height, width)) == text
    assert BoxFormat(kind).parse(text, (height, width)) == pytest.approx(box)


@pytest.mark.parametrize("kind", KINDS)
def test_corners_exchanged_are_put_right(kind):
    size = (400, 600)
    box = [60.0, 40.0, 300.0, 200.0]
    numbers = BoxFormat(kind).parse(BoxFormat(kind).write("Kate", box, size), size)
    exchanged = [*box[2:], *box[:2]]
    assert BoxFormat(kind).parse(BoxFormat(kind).write("Kate", exchanged, size), size) == numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["", "null", "[1, 2, 3]", "1 2 3", "Kate, 34, is here", "<box></box>", "(,),(,)"])
def test_junk_is_no_box(kind, text):
    assert BoxFormat(kind).parse(text, (100, 100)) is None


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(alphabet="0123456789.,- []()<>boxé٣", max_size=40))
def test_whatever_is_read_lies_in_the_image(kind, text):
    found = BoxFormat(kind).parse(text, (30, 50))
    if found is not None:
        assert 0 <= found[0] < found[2] <= 50
        assert 0 <= found[1] < found[3] <= 30


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("qwen", "<box>(-20,500),(1060,1050)</box>"),
        ("thousand", "[500, 500, 1001, 1090]"),
        ("norm1000", "[500, 500, 1001, 1090]"),
        ("unit", "[0.5, 0.5, 1.05, 1.1]"),
        ("pixels", "[50, 100, 101, 215]"),
        ("resized", "[56, 98, 115, 200]"),
        ("gemini", "[500, 500, 1090, 1001]"),
        ("bins32", "15 15 33 34"),
    ],
)
def test_what_leaves_the_image_is_clipped(kind, text):
    found = BoxFormat(kind).parse(text, (200, 100))
    assert found[2:] == [100, 200]
    assert found[0] == pytest.approx(0 if kind == "qwen" else 50, rel=0.05)
    assert found[1] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_beyond_the_image_is_written_clipped(kind):
    size = (100, 200)
    text = BoxFormat(kind).write("Kate", [-50, -50, 300, 300], size)
    assert BoxFormat(kind).parse(text, size) == pytest.approx([0, 0, 200, 100])


def test_square_counts_in_the_padded_image():
    tall = BoxFormat("square").write("Kate", [0, 0, 100, 400], (400, 100))
    assert tall == "[0.375, 0.000, 0.625, 1.000]"
    # In the padding alone there is nothing of the image.
    assert BoxFormat("square").parse("[0.0, 0.1, 0.3, 0.9]", (400, 100)) is None


def test_qwen_reads_behind_its_tag():
    text = "<ref>Kate 1,2,3,4</ref><box>(100,200),(300,400)</box>"
    assert BoxFormat("qwen").parse(text, (999, 999)) == [100, 200, 300, 400]
    assert BoxFormat("qwen").parse("(100,200),(300,400)", (999, 999)) == [100, 200, 300, 400]


@pytest.mark.parametrize("kind", ["xyxy", "pixels:factor=28", "bins1", "", None, 28])
def test_the_kind_is_checked(kind):
    with pytest.raises(ValueError, match=f"box_format={kind!r} is not known"):
        BoxFormat(kind)


@pytest.mark.parametrize("kind", ["resized:side=28", "resized:factor", "resized:factor=-1", "resized:factor=0"])
def test_the_settings_of_the_resized_image_are_checked(kind):
    with pytest.raises(ValueError, match=f"box_format='{kind}': '.*' is not a setting"):
        BoxFormat(kind)
    with pytest.raises(ValueError, match="resized_size is for box_format='resized'"):
        BoxFormat("pixels", resized_size=lambda height, width: (height, width))


@given(size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)), factor=st.sampled_from([28, 32]))
def test_the_resized_size_is_that_of_transformers(size, factor):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl")
    options = {"factor": factor, "min_pixels": 56 * 56, "max_pixels": 1003520}
    if max(size) <= 200 * min(size):
        assert smart_resize(*size, **options) == module.smart_resize(*size, **options)


def test_boxes_of_a_resized_image_are_scaled_exactly():
    """An image of 3000 x 4000 pixels reaches the model in 840 x 1148."""
    kind = "resized:min_pixels=3136,max_pixels=1003520"
    assert BoxFormat(kind).parse("[574, 420, 1148, 840]", (3000, 4000)) == pytest.approx([2000, 1500, 4000, 3000])
    assert BoxFormat(kind).write("Kate", [2000, 1500, 4000, 3000], (3000, 4000)) == "[574, 420, 1148, 840]"
    own = BoxFormat("resized", resized_size=lambda height, width: (height // 2, width // 2))
    assert own.parse("[10, 20, 30, 40]", (200, 100)) == [20, 40, 60, 80]
    assert BoxFormat("pixels").read("[3000, 20, 3900, 90]", (2000, 2000)) == (None, "convention")
