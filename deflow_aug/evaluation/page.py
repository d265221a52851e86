"""One HTML page of tables and pictures that needs nothing else: no network, scripts or files."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from .tables import Table


@dataclass(frozen=True)
class Picture:
    """A PNG with what is said about it.

    Args:
        file: name for its file, without suffix.
        png: its bytes.
        caption: below it.
        full_size: whether it keeps its size, a pixel a pixel, and scrolls where it is too wide.
    """

    file: str
    png: bytes
    caption: str
    full_size: bool = False

    def to_html(self) -> str:
        """A ``figure`` that holds the picture itself, as a data URI."""
        data = base64.b64encode(self.png).decode("ascii")
        kind = "picture whole" if self.full_size else "picture"
        caption = html.escape(self.caption)
        return (
            f'<figure class="{kind}"><div class="scroll"><img alt="{caption}" '
            f'src="data:image/png;base64,{data}"></div><figcaption>{caption}</figcaption></figure>\n'
        )


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: Sequence[Table | Picture]

    def to_html(self) -> str:
        """A ``section``."""
        body = "".join(part.to_html() for part in self.parts)
        return f"<section>\n<h2>{html.escape(self.title)}</h2>\n{body}</section>\n"


def page(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    body = "".join(section.to_html() for section in sections)
    head, lead = html.escape(title), html.escape(introduction)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{head}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header>\n<h1>{head}</h1>\n<p class="lead">{lead}</p>\n</header>\n'
        f"{body}</main>\n</body>\n</html>\n"
    )


# Pictures stand on white in both colour schemes, since plots are drawn on white.
_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfb; --ink: #1c1d1f; --pale: #5d6167; --line: #d9dbdf; --stripe: #f3f4f5;
  --head: #e9ebee;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #17181a; --ink: #e4e5e7; --pale: #a0a4ab; --line: #36393e; --stripe: #1e2023;
    --head: #26292d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 78rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 {
  font-size: 1.35rem; margin: 3.2rem 0 1.2rem; padding-bottom: .35rem;
  border-bottom: 2px solid var(--line);
}
.lead, .note, figure.picture figcaption { max-width: 46rem; }
.lead { margin: 0; color: var(--pale); }
figure { margin: 0 0 2.4rem; }
figure.table > figcaption { font-weight: 600; font-size: 1.05rem; margin-bottom: .5rem; }
figure.picture > figcaption, .note { color: var(--pale); font-size: .86rem; margin: .55rem 0 0; }
.scroll { overflow-x: auto; }
table {
  border-collapse: collapse; font-size: .9rem; line-height: 1.3; min-width: 60%;
  font-variant-numeric: tabular-nums;
}
th, td { padding: .42rem .8rem; text-align: left; vertical-align: top; }
th.r, td.r { text-align: right; }
thead th { background: var(--head); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; white-space: nowrap; }
tbody tr { border-bottom: 1px solid var(--line); }
tbody tr:nth-child(even) { background: var(--stripe); }
td .interval { display: block; color: var(--pale); font-size: .82em; white-space: nowrap; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figure.whole img { max-width: none; }
@media print { main { max-width: none; padding: 0; } .scroll { overflow: visible; } }
"""
