"""The base class of data sets."""

import os
from abc import ABCMeta, abstractmethod
from pathlib import Path


class ImageBaseDataset(metaclass=ABCMeta):
    MODALITY = "IMAGE"

    def __init__(self, dataset="MMBench", skip_noimg=True):
        self.dataset_name = dataset
        self.img_root = str(Path(os.environ["LMUData"]) / "images" / dataset)  # noqa: SIM112
        self.data = self.load_data(dataset)
        self.meta_only = "image" not in self.data

    def __len__(self):
        return len(self.data)

    def dump_image(self, line):
        raise NotImplementedError

    @abstractmethod
    def evaluate(self, eval_file, **judge_kwargs): ...
