"""Tables in Markdown."""

from collections.abc import Sequence


def markdown_table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Render a Markdown table. Vertical bars in cells are escaped, line breaks become spaces.

    Args:
        header: column titles.
        rows: cells of each row; anything that ``str`` accepts.
    """

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])
