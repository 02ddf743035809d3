"""Batches of requests."""


class Collator:
    """Sorts and groups requests; :meth:`get_original` restores the order of their answers."""

    def __init__(self, arr, sort_fn, group_fn=lambda x: x[1], grouping=False):
        self.requests = list(enumerate(arr))
        self.sort_fn, self.group_fn, self.grouping = sort_fn, group_fn, grouping
        self.order = []

    def get_batched(self, n=1, batch_fn=None):
        groups = {}
        for number, request in self.requests:
            groups.setdefault(str(self.group_fn(request)) if self.grouping else "", []).append((number, request))
        for group in groups.values():
            ordered = sorted(group, key=lambda pair: self.sort_fn(pair[1]))
            self.order += [number for number, _ in ordered]
            for start in range(0, len(ordered), n):
                yield [request for _, request in ordered[start : start + n]]

    def get_original(self, newarr):
        answers = dict(zip(self.order, newarr, strict=True))
        return [answers[number] for number in range(len(answers))]
