"""A report as one HTML file that needs no other: its Markdown rendered, and its plots inside of it."""

import base64
import html
import re
from pathlib import Path

from markdown_it import MarkdownIt

from .data.output import write_atomically

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222;
       background: #fff; overflow-wrap: break-word }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: .25em .7em; text-align: left; vertical-align: top }
/* What a row is of stays in sight where its table scrolls. */
th:first-child, td:first-child { position: sticky; left: 0; background: #fff }
thead th { border-bottom: 2px solid #888 }
img { max-width: min(100%, 45em) }
pre { overflow-x: auto; background: #f6f6f6; padding: .7em }
"""


def write_html(markdown: Path) -> Path:
    """Write the page of a Markdown file beside it, with the images that it names by relative paths; returns the page's path.

    FileNotFoundError where an image is missing; UserError where the disk refuses.
    """
    text = markdown.read_text(encoding="utf-8")
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)

    def embedded(match: re.Match) -> str:
        image = markdown.parent / html.unescape(match[1])
        return f'src="data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"'

    body = re.sub(r'src="(?!data:)([^"]+)"', embedded, body)
    title = html.escape(next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), markdown.stem))
    page = markdown.with_suffix(".html")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{STYLE}</style>'
    write_atomically(page, f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n')
    return page
