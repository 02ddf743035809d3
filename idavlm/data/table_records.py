"""Records of tables: parquet files and data sets of the library ``datasets``, which may hold images."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from PIL import Image

from idavlm.data.errors import DataError, quote, shorten

if TYPE_CHECKING:
    import datasets
    import pyarrow

SUFFIX = ".parquet"

_IMAGE_KEYS = {"bytes", "path"}
_CHECKED_AT_ONCE = 1000


def is_table_path(path: Path) -> bool:
    """Whether records are a parquet file or a folder of parquet files; otherwise they are JSON."""
    return path.suffix == SUFFIX or path.is_dir()


class TableRecords:
    """The records of a table, one per row, read on access.

    A ``datasets.Dataset`` is mapped into memory, so that all processes share it. A parquet file is converted to such a
    table once, in the cache of ``datasets``. Fields that are null are left out.

    Args:
        source: a ``datasets.Dataset``, a parquet file, or a folder of parquet files.

    Raises:
        DataError: of kind ``"json"``: the file does not exist or cannot be read.
        ImportError: ``datasets`` is not installed.
        ValueError: the data set has a transform.
    """

    def __init__(self, source: "datasets.Dataset | str | Path") -> None:
        datasets = import_datasets("parquet files and data sets")
        if isinstance(source, (str, Path)):
            self.path, table = Path(source), _from_parquet(datasets, Path(source))
        else:
            self.path, table = None, source
        if table.format["type"] == "custom":
            raise ValueError(
                "the data set has a transform (set_transform or with_transform), which would run for every check of a "
                "record; apply it with map(), or remove it with with_format(None)."
            )
        self._table = table.with_format("arrow", columns=table.format["columns"])

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return without_nulls(self._table[index].to_pylist()[0])

    def where(self, index: int) -> str:
        """File and row of a record."""
        return f"{self.path or 'dataset'}[{index}]"

    def decode_all(self) -> Iterator[dict[str, Any]]:
        """Yield every record, with empty bytes in place of those of its images, which are not read."""
        import pyarrow

        for start in range(0, len(self), _CHECKED_AT_ONCE):
            batch = self._table[start : start + _CHECKED_AT_ONCE]
            columns = [pyarrow.chunked_array(map(_without_bytes, column.chunks)) for column in batch.columns]
            for record in pyarrow.table(columns, names=batch.column_names).to_pylist():
                yield without_nulls(record)

    def write(self, path: Path, chosen: list[int]) -> None:
        """Write the chosen records into a parquet file, with their images."""
        self._table.select(chosen).to_parquet(path)

    @property
    def fingerprint(self) -> str:
        """Hash of the files, or the fingerprint of the data set."""
        if self.path is None:
            return f"fingerprint {self._table._fingerprint}"
        return f"file hash {hash_of_files(_parquet_files(self.path))}"


def import_datasets(purpose: str) -> Any:
    """Return the module ``datasets``.

    Raises:
        ImportError: it is not installed; ``purpose`` says what needs it.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{purpose} need the package datasets; install idavlm[data].") from error
    return datasets


def hash_of_files(files: list[Path]) -> str:
    """Hash of the content of files."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def take_images(record: Any) -> tuple[Any, dict[str, bytes | Image.Image]]:
    """Take the images out of a record that holds them.

    An image is bytes, a PIL image, or ``{"bytes", "path"}`` as ``datasets`` stores it. Its path takes its place: the
    stored one, or ``image 0``, ``image 1``, ... in the order in which the record holds them if it has none or several
    images have the same. An entry with a path but without bytes is a file, so only its path remains.

    Returns:
        The record, and the images by path.
    """
    found: list[tuple[str, Any]] = []
    _find_images(record, found)
    count = Counter(path for path, _ in found)
    paths = [path if path and count[path] == 1 else f"image {number}" for number, (path, _) in enumerate(found)]
    images = {path: image for path, (_, image) in zip(paths, found, strict=True)}
    return _with_paths(record, iter(paths)), images


def _find_images(value: Any, found: list[tuple[str, Any]]) -> None:
    image = _image_of(value)
    if image is not None:
        found.append(image)
    elif isinstance(value, (dict, list)):
        for entry in value.values() if isinstance(value, dict) else value:
            _find_images(entry, found)


def _with_paths(value: Any, paths: Iterator[str]) -> Any:
    if _image_of(value) is not None:
        return next(paths)
    if isinstance(value, dict):
        if value and value.keys() <= _IMAGE_KEYS and isinstance(value.get("path"), str):
            return value["path"]
        return {name: _with_paths(entry, paths) for name, entry in value.items()}
    return [_with_paths(entry, paths) for entry in value] if isinstance(value, list) else value


def _image_of(value: Any) -> tuple[str, bytes | Image.Image] | None:
    """Path (which may be empty) and image, if ``value`` holds one."""
    if isinstance(value, (bytes, Image.Image)):
        return "", value
    if isinstance(value, dict) and value.keys() <= _IMAGE_KEYS and isinstance(value.get("bytes"), bytes):
        path = value.get("path") or ""
        if not isinstance(path, str):
            return None
        parts = PureWindowsPath(path).parts
        if PurePosixPath(path).is_absolute() or PureWindowsPath(path).anchor or ".." in parts or "://" in path:
            path = parts[-1] if parts else ""  # of the machine on which the table was written
        return path, value["bytes"]
    return None


def without_nulls(value: Any) -> Any:
    """Leave out the fields that are null: Arrow fills the fields that another record has."""
    if isinstance(value, dict):
        return {name: without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _without_bytes(array: "pyarrow.Array") -> "pyarrow.Array":
    """Replace all bytes within an array by empty ones. The memory that holds them is not touched."""
    import pyarrow
    import pyarrow.compute

    kind = array.type
    if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
        return pyarrow.compute.if_else(array.is_valid(), pyarrow.scalar(b"", kind), pyarrow.scalar(None, kind))
    if pyarrow.types.is_struct(kind):
        fields = [_without_bytes(field) for field in array.flatten()]
        return pyarrow.StructArray.from_arrays(
            fields,
            fields=[pyarrow.field(kind.field(place).name, field.type) for place, field in enumerate(fields)],
            mask=array.is_null(),
        )
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        values = _without_bytes(array.flatten())
        lengths = pyarrow.compute.fill_null(array.value_lengths(), 0).to_numpy(zero_copy_only=False)
        offsets = [0, *lengths.cumsum().tolist()]
        make = pyarrow.ListArray if pyarrow.types.is_list(kind) else pyarrow.LargeListArray
        index = pyarrow.array(offsets, pyarrow.int32() if make is pyarrow.ListArray else pyarrow.int64())
        return make.from_arrays(index, values, mask=array.is_null())
    if isinstance(kind, pyarrow.ExtensionType):
        return _without_bytes(array.storage)
    return array


def _from_parquet(datasets: Any, path: Path) -> "datasets.Dataset":
    files = _parquet_files(path)
    if not files:
        raise DataError(f"{path} does not exist or holds no {SUFFIX} files; pass a file or a folder.", kind="json")
    try:
        return datasets.Dataset.from_parquet([str(file) for file in files])
    except MemoryError:
        raise
    except Exception as error:  # pyarrow and datasets raise many kinds on a damaged file
        problem = shorten(str(error.__cause__ or error))
        raise DataError(f"{path} cannot be read as parquet ({quote(problem)}); repair it.", kind="json") from error


def _parquet_files(path: Path) -> list[Path]:
    return sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path] if path.is_file() else []
