"""Inference for many callers: batching, prompts with banks, answers with boxes and identity maps, banks on disk."""

from idavlm.inference.answer_overlay import draw_boxes, draw_identity_map
from idavlm.inference.bank_store import BankStore, StoredBank, TooManyBanks
from idavlm.inference.batching import (
    BatchingEngine,
    BatchReport,
    Cancelled,
    DeadlineExceeded,
    EngineClosed,
    Generation,
)
from idavlm.inference.generation_options import GenerationOptions
from idavlm.inference.identity_answer import (
    IdentityAnswer,
    IdentityMap,
    NamedBox,
    answer_question,
    identity_maps,
    named_boxes,
)
from idavlm.inference.prompts import Prompt, PromptEncoder, PromptTooLong

__all__ = [
    "BankStore",
    "BatchReport",
    "BatchingEngine",
    "Cancelled",
    "DeadlineExceeded",
    "EngineClosed",
    "Generation",
    "GenerationOptions",
    "IdentityAnswer",
    "IdentityMap",
    "NamedBox",
    "Prompt",
    "PromptEncoder",
    "PromptTooLong",
    "StoredBank",
    "TooManyBanks",
    "answer_question",
    "draw_boxes",
    "draw_identity_map",
    "identity_maps",
    "named_boxes",
]
