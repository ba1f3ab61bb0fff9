"""Shared code of the pages of ``spa3r demo`` and ``spa3r eval report``: a single HTML file without scripts."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from string import Template

from matplotlib.figure import Figure

from spa3r.vsi_bench.scoring import parse_prediction

TYPE_TITLES = {
    "object_counting": "How many",
    "object_abs_distance": "Distance",
    "object_size_estimation": "Object size",
    "room_size_estimation": "Room size",
    "object_rel_distance": "Which is nearest",
    "object_rel_direction_easy": "Direction, easy",
    "object_rel_direction_medium": "Direction, medium",
    "object_rel_direction_hard": "Direction, hard",
    "route_planning": "Route",
    "obj_appearance_order": "Order of appearance",
}
"""Short titles of VSI-Bench's question types."""


def make_page(
    heading: str, lead: str, facts: Mapping[str, str], sections: Sequence[str], note: str = "", command: str = ""
) -> str:
    """An HTML document with embedded pictures.

    Args:
        heading: Title of the page.
        lead: A summary in a few sentences.
        facts: Key facts by name.
        sections: Results of :func:`section`.
        note: A warning at the top, for example that the answers come from untrained weights.
        command: The command that creates the page again.
    """
    return _PAGE.substitute(
        title=escape(f"{heading[0].lower()}{heading[1:]}"),
        heading=escape(heading),
        lead=escape(lead),
        style=_STYLE,
        note=f'<p class="note" role="note">{escape(sentence(note))}</p>' if note else "",
        facts="".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items()),
        sections="\n".join(sections),
        command=f"<p>The same page again: <code>{escape(command)}</code></p>" if command else "",
    )


def section(title: str, content: str, name: str, css: str = "") -> str:
    kind = f' class="{css}"' if css else ""
    return f'<section id="{name}"{kind}><h2>{escape(title)}</h2><div class="content">{content}</div></section>'


def figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def image(content: bytes, description: str, kind: str = "png") -> str:
    data = base64.b64encode(content).decode("ascii")
    return f'<img src="data:image/{kind};base64,{data}" alt="{escape(description)}">'


def html_options(options: Sequence[str], truth: str) -> str:
    """Options of a choice as HTML, with the true one marked; empty without options."""
    marks = ["true" if _letter(option) == _letter(truth) else "false" for option in options]
    items = "".join(f'<li class="{mark}">{escape(option)}</li>' for mark, option in zip(marks, options))
    return f'<ul class="options">{items}</ul>' if items else ""


def _letter(option: str) -> str:
    return parse_prediction(option).upper()


def said(answer: str, choices: Sequence[str]) -> str:
    """An answer; for a letter, followed by its option."""
    if not answer.strip():
        return '<i class="hint">nothing</i>'
    meant = next((option[len(answer) :] for option in choices if option.startswith(f"{answer}.")), "")
    return f'<div class="said" title="{escape(answer)}"><b>{escape(answer)}</b>{escape(meant)}</div>'


def bar(share: float) -> str:
    return f'<span class="bar" aria-hidden="true"><span style="width:{100 * share:.0f}%"></span></span>'


def html_table(markdown: str) -> str:
    """A Markdown table as HTML; the first row of numbers is highlighted."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    if not rows:
        return ""
    head, _, *body = rows
    titles = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for first, *cells in body
    )
    return (
        f'<div class="wide"><table class="numbers"><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def png_of(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5c6b7a; --line: #dbe2e8; --page: #f4f6f8; --card: #fff;
  --with: #0b7f8f; --without: #94a1ad; --good: #1f7a3f; --good-soft: #e3f4e8; --warn: #8a4b00; --warn-soft: #fff1db; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --soft: #9aa8b5; --line: #2d3843; --page: #12181e;
  --card: #1a222a; --with: #35b5c6; --without: #6c7985; --good: #7dd79b; --good-soft: #17331f; --warn: #ffc978;
  --warn-soft: #3a2a10; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
h1 { margin: 0; font-size: 2.1rem; line-height: 1.15; letter-spacing: -0.02em; }
h2 { margin: 2.75rem 0 0.9rem; font-size: 1.3rem; letter-spacing: -0.01em; }
h3 { margin: 0; font-size: 0.95rem; }
p { margin: 0.5rem 0; }
.lead { max-width: 44rem; color: var(--soft); font-size: 1.08rem; }
.hint, figcaption, article header span, dt, footer { color: var(--soft); font-size: 0.85rem; }
.note { margin: 1.25rem 0; padding: 0.7rem 1rem; border-left: 4px solid var(--warn); border-radius: 0.4rem;
  background: var(--warn-soft); color: var(--warn); font-weight: 600; }
.facts { display: flex; flex-wrap: wrap; gap: 0.6rem 2rem; margin: 1.25rem 0 0; }
.facts dd { margin: 0; }
figure { margin: 0; padding: 1rem; border: 1px solid var(--line); border-radius: 0.8rem; background: var(--card); }
figcaption { margin-top: 0.6rem; }
figure > img { display: block; width: 100%; border-radius: 0.4rem; background: #fff; }
#room .content { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
.plan { display: block; width: 100%; max-height: 30rem; }
.plan .floor { fill: var(--page); stroke: var(--soft); stroke-width: 10; stroke-linejoin: round; }
.plan .fixture { stroke: #7db7dd; stroke-width: 8; }
.plan .object { fill-opacity: 0.85; stroke: var(--ink); stroke-width: 2; stroke-linejoin: round; }
.plan .walk { stroke: var(--with); stroke-width: 4; stroke-linejoin: round; }
.plan .camera { fill: var(--with); fill-opacity: 0.3; }
.plan .center { fill: var(--with); }
.plan text { font-weight: 600; text-anchor: middle; fill: var(--ink); stroke: var(--card);
  stroke-width: 0.3em; stroke-linejoin: round; paint-order: stroke; }
.views { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.1rem, 1fr)); gap: 0.5rem; margin: 0;
  padding: 0; list-style: none; }
.views li { position: relative; }
.views img { display: block; width: 100%; border-radius: 0.4rem; }
.views span { position: absolute; left: 0.3rem; top: 0.3rem; padding: 0 0.4rem; border-radius: 0.6rem;
  background: #0009; color: #fff; font-size: 0.72rem; }
.totals { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1rem; }
.total { display: grid; grid-template-columns: auto 1fr; gap: 0 0.7rem; align-items: baseline;
  padding: 0.9rem 1rem 1rem; border: 1px solid var(--line); border-radius: 0.8rem; background: var(--card); }
.total b { font-size: 2.2rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.total .bar { grid-column: 1 / -1; }
.total.with b { color: var(--with); }
.cards .content { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
  gap: 1rem; }
.cards .content > :not(article) { grid-column: 1 / -1; margin: 0; }
article { display: flex; flex-direction: column; padding: 0.9rem 1rem 0.7rem; border: 1px solid var(--line);
  border-radius: 0.8rem; background: var(--card); }
article header { display: flex; justify-content: space-between; gap: 1rem; align-items: baseline; }
.options { display: flex; flex-wrap: wrap; gap: 0.4rem; margin: 0.2rem 0 0.6rem; padding: 0; list-style: none; }
.options li { padding: 0.05rem 0.65rem; border: 1px solid var(--line); border-radius: 1rem; font-size: 0.9rem; }
.options .true { border-color: var(--good); background: var(--good-soft); color: var(--good); font-weight: 600; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.answers { width: 100%; margin-top: auto; table-layout: fixed; font-size: 0.92rem; }
.answers th { width: 6.2rem; font-weight: 500; text-align: left; }
.answers td, .answers th { padding: 0.25rem 0.3rem 0.25rem 0; border-top: 1px solid var(--line); }
.answers td:nth-child(3) { width: 26%; }
.answers td:nth-child(4) { width: 2.6rem; text-align: right; }
.said { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden;
  overflow-wrap: anywhere; }
.truth th, .truth td { color: var(--good); }
.bar { display: block; height: 0.5rem; border-radius: 0.25rem; background: var(--line); overflow: hidden; }
.bar span { display: block; height: 100%; border-radius: 0.25rem; background: var(--without); }
.with .bar span { background: var(--with); }
#field .content { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem; }
.wide { overflow-x: auto; padding: 0.4rem 1rem; border: 1px solid var(--line); border-radius: 0.8rem;
  background: var(--card); }
.numbers { width: 100%; font-size: 0.88rem; }
.numbers th, .numbers td { padding: 0.35rem 0.6rem 0.35rem 0; text-align: left; font-weight: 400; white-space: nowrap; }
.numbers thead th { color: var(--soft); }
.numbers tbody tr { border-top: 1px solid var(--line); }
.numbers tbody tr:first-child > * { color: var(--with); font-weight: 600; }
code { padding: 0.1rem 0.4rem; border-radius: 0.3rem; background: var(--line); overflow-wrap: anywhere; }
footer { margin-top: 2.5rem; }
"""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>spa3r: $title</title>
<style>$style</style>
</head>
<body>
<main>
<header>
<h1>$heading</h1>
<p class="lead">$lead</p>
$note
<dl class="facts">$facts</dl>
</header>
$sections
<footer>$command</footer>
</main>
</body>
</html>
""")
