"""Records to batches: schema, readers, chat labels, collation, packing, mixing and sampling. Uses no model."""

from idavlm.data.collator import Collator
from idavlm.data.dataset import RecordDataset, RecordStream
from idavlm.data.errors import DataError, ErrorLog
from idavlm.data.images import ImageStore, RecordImages, open_image
from idavlm.data.json_records import JsonRecords
from idavlm.data.messages import sample_to_messages
from idavlm.data.mixing import DualDataLoader
from idavlm.data.packing import PackingCollator
from idavlm.data.parsing import parse_sample
from idavlm.data.readers import READERS
from idavlm.data.rendering import RenderedChat, Segment, render_chat
from idavlm.data.sampling import (
    CurriculumSampler,
    CurriculumStage,
    LengthGroupedSampler,
    group_by_length,
    token_counts,
)
from idavlm.data.schema import SOURCES, TASK_TYPES, Box, Identity, Message, Part, Sample

__all__ = [
    "READERS",
    "SOURCES",
    "TASK_TYPES",
    "Box",
    "Collator",
    "CurriculumSampler",
    "CurriculumStage",
    "DataError",
    "DualDataLoader",
    "ErrorLog",
    "Identity",
    "ImageStore",
    "JsonRecords",
    "LengthGroupedSampler",
    "Message",
    "PackingCollator",
    "Part",
    "RecordDataset",
    "RecordImages",
    "RecordStream",
    "RenderedChat",
    "Sample",
    "Segment",
    "group_by_length",
    "open_image",
    "parse_sample",
    "render_chat",
    "sample_to_messages",
    "token_counts",
]
