"""What MkDocs builds beside the pages of docs/: the command-line reference, and RECORDS.md.

mkdocs.yml names this file as a hook of MkDocs and as an extension of griffe, which reads the
docstrings.
"""

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from fastiat import cli

ROOT = Path(__file__).parents[1]
COMMANDS_HEAD = """# Command line

The output of `fastiat COMMAND --help`, made when this page was built. A number may be written as a
fraction, such as `8/255`.
"""
ARGUMENT = re.compile(r"^(\w+(?:, \w+)*)(: )", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of docs/."""
    files.append(File.generated(config, "commands.md", content=commands()))
    files.append(File.generated(config, "RECORDS.md", content=(ROOT / "RECORDS.md").read_text()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links to RECORDS.md, which is above docs/, lead to its page."""
    return re.sub(r"\]\(((?:\.\./)*)\.\./RECORDS\.md", r"](\1RECORDS.md", markdown).replace(
        "](docs/", "]("
    )


def commands() -> str:
    """Return the page of the command-line reference."""
    parts = [COMMANDS_HEAD, "```text", help_of(), "```"]
    for name in cli.COMMANDS:
        parts += [f"\n## fastiat {name}\n", "```text", help_of(name), "```"]
    return "\n".join(parts) + "\n"


def help_of(*command: str) -> str:
    """Return the output of `fastiat COMMAND --help`, without a command of `fastiat --help`."""
    out = io.StringIO()
    # argparse fits its lines to the width of the terminal.
    with (
        mock.patch.dict(os.environ, COLUMNS="90", NO_COLOR="1"),
        contextlib.redirect_stdout(out),
        contextlib.suppress(SystemExit),
    ):
        cli.parse([*command, "--help"])
    return out.getvalue().strip()


class ArgumentLists(griffe.Extension):
    """Turn the paragraphs `name: text` of a docstring, one for each argument, into a list."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one class, function, module or attribute."""
        if obj.docstring is not None and obj.is_function | obj.is_class:
            obj.docstring.value = ARGUMENT.sub(r"- **\1**\2", obj.docstring.value)
