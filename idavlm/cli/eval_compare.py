"""``idavlm eval compare A B``."""


def add_arguments(tasks) -> None:
    pass
