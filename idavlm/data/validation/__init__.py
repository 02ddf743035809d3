"""Checks of whole files of records: texts, boxes, images, and what training and held-out records share."""

from idavlm.data.validation.problems import CHECKS, Problem, ValidationReport
from idavlm.data.validation.sources import RecordSource
from idavlm.data.validation.validate import validate_records

__all__ = ["CHECKS", "Problem", "RecordSource", "ValidationReport", "validate_records"]
