"""Tables in Markdown."""

from collections.abc import Iterable


def markdown_table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Render a Markdown table. Vertical bars in cells are escaped, line breaks become spaces.

    Args:
        header: column titles.
        rows: cells of each row; anything that ``str`` accepts.
    """

    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    header = list(header)
    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])
