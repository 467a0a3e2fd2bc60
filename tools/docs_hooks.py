"""What MkDocs asks while it builds the site: numbers, tables and pictures in place of marks, pages made of other files.

Marks in a page: `{{ value suite | case | provider | metric }}`, `{{ table suite | metric }}`, `{{ plot name }}`,
`{{ support }}` and `{{ everything }}`. A mark without a number fails the build.
"""

import re

from tools import support
from tools.results import ROOT, Results, find, load, shown, table, value

MARK = re.compile(r"\{\{ (\w+)(?: ([^}]*?))? \}\}")
COPIED = {"migration.md": "MIGRATION_GUIDE.md", "design.md": "DESIGN.md", "changelog.md": "CHANGELOG.md"}


def _value(arguments: list[str], files: list[Results]) -> str:
    number, unit = value(*arguments, files)
    return f"{shown(number)} {unit}"


def _table(arguments: list[str], files: list[Results]) -> str:
    suite, metric = arguments
    results = find(suite, metric, files)
    return "\n".join([*table(results, suite, [metric]), "", f"{results.origin()}."])


def _plot(arguments: list[str], files: list[Results]) -> str:
    (name,) = arguments
    marks = (f"![{name}](assets/{name}-{scheme}.svg#only-{scheme})" for scheme in ("light", "dark"))
    return "\n".join(marks)


def _support(arguments: list[str], files: list[Results]) -> str:
    return "\n".join(support.table())


def _everything(arguments: list[str], files: list[Results]) -> str:
    """Every table of every file."""
    lines = []
    for results in files:
        lines += ["", f"## {results.path.name}", "", f"{results.origin()}."]
        for unit in dict.fromkeys(row.unit for row in results.rows):
            alike = results._replace(rows=[row for row in results.rows if row.unit == unit])
            for suite, metric in alike.kinds():
                lines += ["", f'??? note "{suite}, {metric} ({unit})"', ""]
                lines += [f"    {line}" for line in table(alike, suite, [metric])]
    return "\n".join(lines)


MARKS = {
    "value": _value, "table": _table, "plot": _plot, "support": _support, "everything": _everything,
}  # fmt: skip


def filled(markdown: str, files: list[Results]) -> str:
    """A page with its marks replaced; raises KeyError for a mark or a number that there is not."""

    def replace(found: re.Match) -> str:
        name, text = found.groups()
        return MARKS[name]([word.strip() for word in (text or "").split("|") if word.strip()], files)

    return MARK.sub(replace, markdown)


def copied(name: str) -> str:
    """A file of the repository's root as a page, its links to other files led to their pages."""
    text = (ROOT / COPIED[name]).read_text(encoding="utf-8")
    for page, source in COPIED.items():
        text = text.replace(f"]({source}", f"]({page}")
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)(?!\w+\.md)[^)]*\)|\[([^\]]*)\]\([A-Z_]+\.md[^)]*\)", r"\1\2", text)


def on_page_markdown(markdown: str, **_) -> str:
    """MkDocs: a page before it is rendered."""
    return filled(markdown, load())


def on_page_content(html: str, **_) -> str:
    """MkDocs: a rendered page. A returned value without a name is introduced by a lone dash, which goes."""
    return re.sub(r'(<li class="doc-section-item field-body">)\s*\u2013\s', r"\1", html)


def on_files(files, config):
    """MkDocs: add pages and pictures that are made now."""
    from mkdocs.structure.files import File

    from tools import plots

    for name in COPIED:
        files.append(File.generated(config, name, content=copied(name)))
    results = load()
    for name in plots.PICTURES:
        for scheme in plots.INKS:
            files.append(
                File.generated(config, f"assets/{name}-{scheme}.svg", content=plots.draw(name, scheme, results))
            )
    return files
