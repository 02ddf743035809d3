"""The classes of data sets, and a data set by name."""

DATASET_CLASSES = []
SUPPORTED_DATASETS = []


def build_dataset(dataset_name, **kwargs):
    for cls in DATASET_CLASSES:
        if dataset_name in cls.supported_datasets():
            return cls(dataset=dataset_name)
    return None
