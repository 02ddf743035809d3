"""Tables in Markdown."""

from collections.abc import Iterable


def markdown_table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Render a Markdown table of cells that ``str`` accepts; escape vertical bars, replace line breaks by spaces."""

    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    header = list(header)
    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])
