"""Files of JSON records: a record that is not valid JSON does not affect the others."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idavlm.data import DataError, JsonRecords

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('ab"\\[]{},: \n é\u2028'), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('k"]', max_size=2), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def records(tmp_path):
    """Function from the text of a file to its records."""

    def read(text):
        (tmp_path / "r.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        return JsonRecords(tmp_path / "r.json")

    return read


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("records") / "r.json"


@given(values=st.lists(VALUES, max_size=5), indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans())
def test_a_list_is_split_into_its_elements(file, values, indent, ascii_only):
    file.write_text("\ufeff \n" + json.dumps(values, indent=indent, ensure_ascii=ascii_only) + "\n")
    records = JsonRecords(file)
    assert [records[index] for index in range(len(records))] == values
    assert list(records.decode_all()) == values


@given(values=st.lists(VALUES.filter(lambda value: not isinstance(value, list)), min_size=1, max_size=5))
def test_lines_are_records(file, values):
    file.write_text("\n\n".join(json.dumps(value) for value in values) + "\n")
    records = JsonRecords(file)
    assert [records[index] for index in range(len(records))] == values
    assert records.where(len(values) - 1) == f"{file}:{2 * len(values) - 1}"


FAULTY = {
    '{"a": }': "Expecting value",
    '{"a": 1 "b": 2}': "Expecting",
    '{"a": 1, "b": 2, "a": 3}': "the key 'a' occurs 2 times in one object",
    '{"b": [{"a": 1, "a": 1, "a": 1}]}': "the key 'a' occurs 3 times in one object",
    f'{{"a": {"9" * 5000}}}': "Exceeds the limit",
    f'{{"a": {"[" * 100_000}{"]" * 100_000}}}': "it is nested too deeply",
    '{"a": "\\ud83"}': "Invalid",
    "nul": "Expecting value",
}


@pytest.mark.parametrize("faulty", FAULTY, ids=range(len(FAULTY)))
@pytest.mark.parametrize("is_list", [True, False], ids=["list", "lines"])
def test_a_faulty_record_is_an_error_of_that_record(records, faulty, is_list):
    texts = ['{"a": "[,]}"}', faulty, '{"a": 2}']
    data = records("[" + ",\n".join(texts) + "]" if is_list else "\n".join(texts))
    assert len(data) == 3
    assert [data[0], data[2]] == [{"a": "[,]}"}, {"a": 2}]
    where = r"r\.json\[1\]" if is_list else r"r\.json:2"
    with pytest.raises(DataError, match=rf"{where}: invalid JSON \(.*{re.escape(FAULTY[faulty])}.*\): ") as caught:
        data[1]
    assert caught.value.kind == "json"
    assert len(str(caught.value)) < 600
    first, error, last = data.decode_all()
    assert (first, str(error), last) == (data[0], str(caught.value), data[2])


def test_invalid_utf8_is_an_error_of_its_record(records):
    data = records(b'[{"a": "\xff"}, {"a": "\xc3\xa9"}]')
    assert data[1] == {"a": "é"}
    with pytest.raises(DataError, match=r"r\.json\[0\]: invalid JSON \('utf-8' codec"):
        data[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1, 2", "it is not closed"),
        ('[1, "2]', "it is not closed"),
        ('[{"a": [1}, 2', "it is not closed"),
        ("[", "it is not closed"),
        ('[1] {"b": 2}', "b'{\"b\": 2}' follows its end"),
        ('["' + '\\"' * 50_000, "it is not closed"),
        ("[" * 100_000, "it is not closed"),
    ],
)
def test_a_list_that_does_not_end_is_an_error_of_the_file(records, text, problem):
    with pytest.raises(DataError, match=rf"r\.json: invalid JSON list \({re.escape(problem)}") as caught:
        records(text)
    assert caught.value.kind == "json"


def test_empty_lists_and_files(records):
    assert len(records("[ \n ]")) == len(records("")) == len(records("\n \n")) == 0
