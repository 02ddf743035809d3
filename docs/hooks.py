"""MkDocs hook: docstrings use a few Sphinx forms that Markdown does not have."""

import re

ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|obj):<code>~?(?:[\w.]*\.)?(\w+)</code>")
TABLE = re.compile(r"<p>={5,}.*?</p>", re.DOTALL)


def on_page_content(html: str, page, **kwargs) -> str:
    """Show roles as the name of the object, ``::`` before a code block as ``:``, and no tables of docstrings.

    The tables (connectors, box formats) are part of the pages.
    """
    if not page.file.src_uri.startswith("reference/"):
        return html
    return TABLE.sub("", ROLE.sub(r"<code>\1</code>", html)).replace("::</p>", ":</p>")
