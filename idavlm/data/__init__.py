"""Records to batches: the sample schema, readers, chat labels, collation, mixing and sampling. Uses no model."""

from idavlm.data.collator import Collator
from idavlm.data.dataset import RecordDataset, RecordStream
from idavlm.data.errors import DataError, ErrorLog
from idavlm.data.images import ImageStore, RecordImages, open_image
from idavlm.data.json_records import JsonRecords
from idavlm.data.messages import sample_to_messages
from idavlm.data.mixing import DualDataLoader
from idavlm.data.parsing import parse_sample
from idavlm.data.readers import READERS
from idavlm.data.rendering import RenderedChat, Segment, render_chat
from idavlm.data.sampling import CurriculumSampler, CurriculumStage, group_by_length
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
    "Message",
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
]
