"""The site that `make docs` builds."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastiat import cli

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the site, and what MkDocs printed."""
    site = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return site, done.stdout + done.stderr


def test_the_site_builds_without_a_warning(built):
    _, printed = built
    assert "Documentation built" in printed
    assert not re.search("warn|error", printed, re.IGNORECASE), printed


def test_pages_load_nothing_from_other_servers(built):
    site, _ = built
    pages = "\n".join(page.read_text() for page in site.rglob("*.html"))
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(?:https?:)?//[^>]*>", pages)


def test_the_navigation_leads_to_every_page_but_the_two_epoch_results(built):
    site, _ = built
    linked = set(re.findall(r'href="([^"#:]+\.html)', (site / "index.html").read_text()))
    pages = {str(page.relative_to(site)) for page in site.rglob("*.html")} - {"404.html"}
    results = {page for page in pages if page.startswith("results/")}
    assert results and linked | {"search.html"} == (pages - results) | {"search.html"}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_command_line_reference_is_what_help_prints(built, capsys, monkeypatch, name):
    site, _ = built
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit):
        cli.parse([name, "--help"])
    shown = html.unescape(re.sub(r"<[^>]+>", "", (site / "commands.html").read_text()))
    assert capsys.readouterr().out.strip() in shown


def test_arguments_of_a_function_are_a_list(built):
    site, _ = built
    text = (site / "reference.html").read_text()
    pgd = text[text.index('id="fastiat.attack.pgd"') : text.index('id="fastiat.attack.PGD"')]
    items = re.findall(r"<li><strong>([\w, ]+)</strong>: ", pgd)
    assert items[:4] == ["model", "x", "y", "eps, alpha"]
