"""The base class of models."""

import os


class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image", "video"]  # noqa: RUF012

    def __init__(self):
        self.dump_image_func = None

    def use_custom_prompt(self, dataset):
        return False

    def set_dump_image(self, dump_image_func):
        self.dump_image_func = dump_image_func

    def generate(self, message, dataset=None):
        for part in message:
            is_file = os.path.isfile(part["value"])
            assert part["type"] in self.allowed_types
            assert is_file == (part["type"] != "text"), part
        return self.generate_inner(message, dataset)
