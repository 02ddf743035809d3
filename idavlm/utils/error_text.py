"""How an error of another library appears in a message of this one."""


def first_line(error: BaseException, limit: int = 400) -> str:
    """First line of an error message, with the next one if it ends in a colon; at most ``limit`` characters.

    An error without a message is named by its type.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if len(text) <= limit else text[:limit] + "..."
