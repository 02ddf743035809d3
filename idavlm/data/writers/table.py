"""Records of the schema as a parquet file, which may hold the images themselves."""

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from idavlm.data.table_records import import_datasets

ROWS = 1000
ROWS_WITH_IMAGES = 64
"""Records of a row group."""


class TableWriter:
    """Writes records of the schema into a parquet file; use it in a ``with`` statement.

    The file appears when it is complete. ``meta`` is stored as JSON text, which the reader ``idavlm`` decodes. Numbers
    of boxes become floats.

    Args:
        path: the file.

    Raises:
        ImportError: the package ``datasets`` is not installed.
    """

    def __init__(self, path: Path) -> None:
        import_datasets("parquet files")  # installs pyarrow
        self.path = path
        self._part = path.with_name(f"{path.name}.part")
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None
        self._holds_images: bool | None = None

    def __enter__(self) -> "TableWriter":
        return self

    def write(self, record: dict[str, Any], image_bytes: Callable[[str], bytes] | None = None) -> None:
        """Add a record.

        Args:
            record: a record of the schema, whose contents are lists of parts.
            image_bytes: returns the bytes of an image file by its path, to store them in the table; None to store
                paths only. All records of a file store the same.
        """
        if self._holds_images is None:
            self._holds_images = image_bytes is not None
        self._rows.append(_row(record, image_bytes))
        if len(self._rows) >= (ROWS_WITH_IMAGES if self._holds_images else ROWS):
            self._flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
            if self._writer is not None:
                self._writer.close()
            if kind is None:
                self._part.replace(self.path)
        finally:
            self._part.unlink(missing_ok=True)

    def _flush(self) -> None:
        import pyarrow
        import pyarrow.parquet

        schema = _schema(bool(self._holds_images))
        if self._writer is None:
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pyarrow.parquet.ParquetWriter(self._part, schema)
        if self._rows:
            self._writer.write_table(pyarrow.Table.from_pylist(self._rows, schema=schema))
        self._rows = []


def _schema(holds_images: bool) -> Any:
    import pyarrow as pa

    text, box = pa.string(), pa.list_(pa.float64())
    image = pa.struct({"bytes": pa.binary(), "path": text}) if holds_images else text
    part = {"type": text, "text": text, "image": image, "name": text, "box": box, "relative": pa.bool_()}
    fields = {
        "id": text,
        "source": text,
        "type": text,
        "identities": pa.list_(pa.struct({"name": text, "images": pa.list_(image)})),
        "messages": pa.list_(pa.struct({"role": text, "content": pa.list_(pa.struct(part))})),
        "boxes": pa.list_(pa.struct({"name": text, "image": text, "box": box, "relative": pa.bool_(), "label": text})),
        "answer": text,
        "false_answers": pa.list_(text),
        "target": text,
        "meta": text,
    }
    return pa.schema(fields)


def _row(record: dict[str, Any], image_bytes: Callable[[str], bytes] | None) -> dict[str, Any]:
    held: set[str] = set()

    def image(path: str, *, is_box: bool = False) -> Any:
        if image_bytes is None:
            return path
        if is_box or path in held:  # an image is stored once; the reader finds it by its path
            return {"bytes": None, "path": path}
        held.add(path)
        return {"bytes": image_bytes(path), "path": path}

    row = dict(record)
    row["identities"] = [
        {"name": identity["name"], "images": [image(path) for path in identity["images"]]}
        for identity in record.get("identities", [])
    ]
    row["messages"] = [
        {
            "role": message["role"],
            "content": [
                part | ({"image": image(part["image"], is_box=part["type"] == "box")} if "image" in part else {})
                for part in message["content"]
            ],
        }
        for message in record["messages"]
    ]
    if "meta" in record:
        row["meta"] = json.dumps(record["meta"], ensure_ascii=False)
    return row
