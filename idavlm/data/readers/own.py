"""Records of the schema itself."""

from typing import Any

from idavlm.data.parsing import EVALUATION_FIELDS, FIELDS


def read_idavlm(record: Any, where: str) -> Any:
    """Return a record of the schema. Fields that the schema does not have are listed in ``unused_fields``."""
    known = (*FIELDS, *EVALUATION_FIELDS)
    if not isinstance(record, dict) or record.keys() <= set(known):
        return record
    kept = {name: value for name, value in record.items() if name in known}
    return {**kept, "unused_fields": [str(name) for name in record if name not in known]}
