"""Records of the schema itself."""

import json
from typing import Any

from idavlm.data.parsing import EVALUATION_FIELDS, FIELDS


def read_idavlm(record: Any, where: str) -> Any:
    """Return a record of the schema. Fields that the schema does not have are listed in ``unused_fields``.

    ``meta`` may be JSON text, because the columns of a table cannot hold free values.
    """
    known = (*FIELDS, *EVALUATION_FIELDS)
    if isinstance(record, dict) and isinstance(record.get("meta"), str):
        record = {**record, "meta": _from_json(record["meta"])}
    if not isinstance(record, dict) or record.keys() <= set(known):
        return record
    kept = {name: value for name, value in record.items() if name in known}
    return {**kept, "unused_fields": [str(name) for name in record if name not in known]}


def _from_json(text: str) -> Any:
    """The JSON object in a text; the text itself if there is none."""
    if not text.startswith("{"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
