"""The base class of models."""

import abc


class CacheHook:
    def add_partial(self, attr, req, res):
        """Nothing is cached."""


class lmms(abc.ABC):
    is_simple = True

    def __init__(self):
        self._rank = 0
        self.cache_hook = CacheHook()
        self.task_dict = {}

    @property
    def rank(self):
        return self._rank

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...
