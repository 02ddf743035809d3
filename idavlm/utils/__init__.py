"""Layer 0: small helpers that every layer may use."""

from idavlm.utils.answer_text import contains_name, plain_answer
from idavlm.utils.checks import check_arguments, check_choice, check_positive, check_type
from idavlm.utils.compiling import mark_length_dynamic, outside_compile
from idavlm.utils.error_text import first_line
from idavlm.utils.files import append_lines, drop_torn_line, read_json_object, write_text
from idavlm.utils.ignore_index import IGNORE_INDEX
from idavlm.utils.image_roles import ImageRole
from idavlm.utils.locks import lock_file, lock_folder
from idavlm.utils.machine import describe_machine
from idavlm.utils.markdown import markdown_table

__all__ = [
    "IGNORE_INDEX",
    "ImageRole",
    "append_lines",
    "check_arguments",
    "check_choice",
    "check_positive",
    "check_type",
    "contains_name",
    "describe_machine",
    "drop_torn_line",
    "first_line",
    "lock_file",
    "lock_folder",
    "mark_length_dynamic",
    "markdown_table",
    "outside_compile",
    "plain_answer",
    "read_json_object",
    "write_text",
]
