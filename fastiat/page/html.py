"""The page of a report: its frame, style and tables. What is not `Safe` is escaped."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from fastiat.page.figures import COLOURS
from fastiat.system.errors import printable


class Safe(str):
    """HTML that is to stand as it is."""


def text(value: Any) -> Safe:
    """Return anything as HTML text, escaped unless it is `Safe`."""
    return value if isinstance(value, Safe) else Safe(escape(printable(value)))


def join(parts: Iterable[Any], between: str = "\n") -> Safe:
    """Join pieces, each escaped unless it is `Safe`."""
    return Safe(between.join(map(text, parts)))


def element(name: str, *content: Any, **attributes: str) -> Safe:
    """Return an element; `kind` is its class."""
    written = "".join(
        f' {"class" if key == "kind" else key}="{escape(value)}"'
        for key, value in attributes.items()
    )
    return Safe(f"<{name}{written}>{join(content, '')}</{name}>")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], kind: str = "numbers") -> Safe:
    """Return a table that scrolls sideways where it is too wide; first cells head their rows."""
    top = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = [
        element(
            "tr",
            element("th", first, scope="row"),
            *(element("td", cell) for cell in rest),
        )
        for first, *rest in rows
    ]
    shown = element("table", element("thead", top), element("tbody", *body), kind=kind)
    return element("div", shown, kind="wide", tabindex="0")


def section(title: str, name: str, *content: Any) -> Safe:
    """Return a section of the page with a heading, which the contents at its top lead to."""
    return element("section", element("h2", title), *content, id=name)


def page(title: str, lead: Any, sections: Sequence[tuple[str, str, Safe]], foot: Any) -> str:
    """Return the document; a section is its title, its name and its HTML."""
    links = [element("a", title, href=f"#{name}") for title, name, _ in sections]
    body = join(
        [
            element("header", element("h1", title), element("p", lead, kind="lead")),
            element("nav", *links) if len(links) > 1 else Safe(""),
            element("main", *(html for _, _, html in sections)),
            element("footer", foot),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _variables(theme: int) -> str:
    return "; ".join(f"--{name}: {colours[theme]}" for name, colours in COLOURS.items())


STYLE = f"""
:root {{ color-scheme: light dark; {_variables(0)}; --band: #f6f8fa; --link: #0550ae }}
@media (prefers-color-scheme: dark) {{
  :root {{ {_variables(1)}; --band: #161b22; --link: #79b8ff }}
}}
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }}
h1 {{ font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere }}
h2 {{ font-size: 1.3rem; margin: 3rem 0 .8rem; padding-top: .8rem;
  border-top: 1px solid var(--rule) }}
h3 {{ font-size: 1.05rem; margin: 1.8rem 0 .4rem; overflow-wrap: anywhere }}
p {{ max-width: 46rem; margin: .5rem 0 }}
.lead, .note, figcaption, footer {{ color: var(--soft) }}
.note, figcaption, footer {{ font-size: .875rem }}
nav {{ display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1rem 0 }}
a {{ color: var(--link) }}
.wide {{ overflow-x: auto; margin: .8rem 0 1.2rem }}
table {{ border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }}
th, td {{ padding: .4rem .7rem; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top }}
thead th {{ border-bottom: 2px solid var(--soft); vertical-align: bottom; font-weight: 600 }}
th:first-child {{ text-align: left; position: sticky; left: 0; background: var(--page);
  min-width: 8rem; max-width: 16rem; overflow-wrap: anywhere }}
tbody th {{ font-weight: 500 }}
small {{ display: block; color: var(--soft); font-weight: 400 }}
td small {{ white-space: nowrap }}
table.text td, table.text thead th {{ text-align: left }}
table.text td {{ min-width: 5rem; max-width: 26rem; overflow-wrap: anywhere }}
code, pre {{ font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  background: var(--band); border-radius: 4px }}
code {{ padding: .1rem .3rem; overflow-wrap: anywhere }}
pre {{ padding: .7rem .9rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid var(--rule) }}
figure {{ margin: 0 }}
.figures {{ display: grid; gap: 1.2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)) }}
.large {{ grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)) }}
svg {{ display: block; width: 100%; height: auto; stroke-linejoin: round; overflow: visible }}
.norms svg {{ min-width: 38rem; margin: 0 }}
.cards {{ display: grid; gap: .9rem;
  grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)) }}
.cards figure {{ display: grid; grid-template-columns: repeat(3, 1fr); gap: .3rem }}
.cards img {{ width: 100%; image-rendering: pixelated; border-radius: 3px; display: block }}
.cards figcaption {{ grid-column: 1 / -1; line-height: 1.35 }}
.pass, .warn, .fail, .not {{ font-weight: 600; white-space: nowrap }}
.pass {{ color: var(--c2) }}
.warn {{ color: var(--c7) }}
.fail {{ color: var(--c5) }}
.not {{ color: var(--soft) }}
details {{ margin: .6rem 0 }}
summary {{ cursor: pointer }}
footer {{ margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: 1rem }}
@media (max-width: 40rem) {{
  body {{ padding: 1.2rem .9rem 3rem }}
  th, td {{ padding: .35rem .5rem }}
  th:first-child {{ min-width: 6.5rem; max-width: 8rem }}
  table.text, .text tbody, .text tr, .text th, .text td {{ display: block; position: static;
    max-width: none; border: 0; padding: .1rem 0 }}
  table.text thead {{ display: none }}
  .text tr {{ border-bottom: 1px solid var(--rule); padding: .6rem 0 }}
}}
@media print {{ nav {{ display: none }} section {{ break-inside: avoid-page }} }}
"""
