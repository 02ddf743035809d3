"""The base class of tasks with chat messages, which holds a configuration and a data set."""


class ConfigurableMessagesTask:
    def __init__(self, data_dir=None, cache_dir=None, download_mode=None, config=None, model_name=None):
        self.config = config
        self.download(config.get("dataset_kwargs"))
