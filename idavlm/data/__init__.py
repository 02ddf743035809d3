"""Floor 1: the sample schema, readers, rendering, collating and mixing; knows no model."""

from idavlm.data.collator import Collator
from idavlm.data.dataset import RecordDataset
from idavlm.data.error_log import ErrorLog
from idavlm.data.errors import DataError
from idavlm.data.images import ImageStore, open_image
from idavlm.data.mixing import DualDataLoader
from idavlm.data.ordering import batches_of_like_length
from idavlm.data.parsing import parse_sample
from idavlm.data.readers import READERS
from idavlm.data.rendering import render_chat
from idavlm.data.schema import Box, Identity, Message, Part, Sample

__all__ = [
    "READERS",
    "Box",
    "Collator",
    "DataError",
    "DualDataLoader",
    "ErrorLog",
    "Identity",
    "ImageStore",
    "Message",
    "Part",
    "RecordDataset",
    "Sample",
    "batches_of_like_length",
    "open_image",
    "parse_sample",
    "render_chat",
]
