"""The documentation's site: `sphinx-build -W -n docs docs/_build/html`, with the extra `docs`.

The pages are plain Markdown that a forge shows as it is. Comments in them say what the site has
instead:

- `<!-- site: autofunction checkpoints.get_metrics -->`, up to `<!-- site: end -->`, is replaced by
  what autodoc makes of the object; what stands between is the same for those who read the file;
- `<!-- site: include ../CHANGELOG.md -->`, up to `<!-- site: end -->`, by that file;
- `<!-- site` alone on its line, up to `-->`, is MyST for the site only, such as a `toctree`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pygments.lexers.sql import PostgresLexer

import checkpoints
from checkpoints import embedded, migrations, runtime, testing

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "checkpoints"
author = "the authors of checkpoints"
project_copyright = "the authors of checkpoints"
version = release = re.search(
    r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M
).group(1)

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True
# What stands outside of this site is not looked up: the build needs no network.
nitpick_ignore_regex = [
    (r"py:.*", r"(sqlalchemy|alembic|datetime|pathlib|collections)\..*"),
    # Imported for the type checker only.
    (r"py:.*", r"AsyncConnection|AsyncEngine|AsyncSession|async_scoped_session"),
    # Names for the type checker: the pages say in words what they hold.
    (r"py:.*", r"(checkpoints\.[\w.]+\.)?(ConsumerOptions|_Answer_co|AsyncRead|Read|Op)"),
]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_type_aliases = {
    "JSONValue": "checkpoints.JSONValue",
    "Handler": "checkpoints.runtime.Handler",
    "AsyncHandler": "checkpoints.runtime.AsyncHandler",
}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"checkpoints {release}"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "native"
copybutton_exclude = ".linenos, .gp, .go"

# Public names, and the modules that they are documented in.
_MODULES = (runtime, embedded, migrations, testing, checkpoints)
PUBLIC = {name: module.__name__ for module in _MODULES for name in module.__all__}


def for_the_site(page: str, text: str) -> str:
    """A page's Markdown with what its comments say for the site."""
    text = re.sub(
        r"<!-- site: (auto\w+|py:type|py:data) (\S+) -->.*?<!-- site: end -->",
        r"```{eval-rst}\n.. \1:: \2\n```",
        text,
        flags=re.S,
    )
    text = re.sub(
        r"<!-- site: include (\S+) -->.*?<!-- site: end -->",
        lambda match: _included(DOCS / page, match[1]),
        text,
        flags=re.S,
    )
    text = re.sub(r"^<!-- site\n(.*?)^-->$", r"\1", text, flags=re.S | re.M)
    # What lies elsewhere in the repository has another place here, or is only named.
    text = re.sub(r"\]\(((?:\.\./)*)\.\./README\.md\)", r"](\1quickstart.md)", text)
    text = re.sub(r"\]\(((?:\.\./)*)\.\./CHANGELOG\.md\)", r"](\1changelog.md)", text)
    text = re.sub(r"\]\(((?:\.\./)*examples/)(\w+)\.py\)", r"](\1index.md#\2py)", text)
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+(tests/[\w/]+\.md)\)", r"`\2`", text)


def _included(page: Path, target: str) -> str:
    """A file of the repository without its title, its links as from the page."""
    text = (page.parent / target).read_text().partition("\n")[2]
    text = text.replace("](docs/", "](").replace("](CHANGELOG.md)", "](changelog.md)")
    return text.replace("](LICENSE)", "](../LICENSE)")


def _read(_app: Any, page: str, source: list[str]) -> None:
    source[0] = for_the_site(page, source[0])


def _literal(match: re.Match[str]) -> str:
    name = match[1]
    if name in PUBLIC:
        return f":py:obj:`{name} <{PUBLIC[name]}.{name}>`"
    return f"``{name}``"


def _docstring(
    _app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]
) -> None:
    """Backticks mark code, as in Markdown; those of public names are links."""
    text = re.sub(r"(?<![`:])`([^`]+)`(?!`)", _literal, "\n".join(lines))
    lines[:] = text.split("\n")


def _signature(
    _app: Any,
    _what: str,
    _name: str,
    _object: Any,
    _options: Any,
    given: str | None,
    answer: str | None,
) -> tuple[str, str] | None:
    """A method of the executing layer answers what its `Call` makes of the rows.

    Within a type that has parameters, autodoc writes an alias as the object that it stands in for.
    """
    if given is None:
        return None
    given, answer = (
        re.sub(r"(?:~?[\w.]+\.)?TypeAliasForwardRef\('([\w.]+)'\)", r"~\1", text or "")
        for text in (given, answer)
    )
    called = re.fullmatch(r"~?checkpoints\._calls\.Call\[(.*)\]", answer)
    return given, called[1] if called else answer


def setup(app: Any) -> dict[str, bool]:
    """Register what stands here with Sphinx."""
    app.connect("source-read", _read)
    # Before napoleon, which has the priority 500 and makes roles of its own.
    app.connect("autodoc-process-docstring", _docstring, priority=400)
    app.connect("autodoc-process-signature", _signature)
    # Statements are PostgreSQL's.
    app.add_lexer("sql", PostgresLexer)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
