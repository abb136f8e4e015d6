"""The page about runs: what it shows, and what it refuses to read."""

import base64
import html.parser
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from fastiat import cli
from fastiat.run import METRICS, Run


class Links(html.parser.HTMLParser):
    """Collects what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href")]


def test_the_page_shows_errors_settings_and_curves_and_loads_nothing(run, capsys):
    assert cli.main(["report", str(run)]) == 0
    page = run / "report.html"
    assert capsys.readouterr().out == f"{page}\n"
    text = page.read_text()
    links = Links()
    links.feed(text)
    (picture,) = links.found
    content = base64.b64decode(picture.removeprefix("data:image/png;base64,"))
    assert content == (run / "curves.png").read_bytes()
    assert Image.open(io.BytesIO(content)).size[0] > 600
    for row in Run.open(run).rows():
        if row["kind"] == "evaluation":
            low, high = row["interval_95_percent"]
            figure = f"{row['error_percent']:.2f}<br><small>{low:.1f} to {high:.1f}, n 40"
            assert figure in text and f"test, {row['attack']}" in text
    assert "arch <code>mlp6</code>" in text


def test_a_folder_of_runs_makes_one_table(run, tmp_path):
    folder = tmp_path / "<runs>"
    for name in ("one", "two & more"):
        shutil.copytree(run, folder / name)
    out = tmp_path / "new" / "page.html"
    assert cli.main(["report", str(folder), "--out", str(out)]) == 0
    text = out.read_text()
    assert re.findall("<h2>(.*)</h2>", text) == ["one", "two &amp; more"]
    assert "<title>fastiat: &lt;runs&gt;" in text
    assert len(re.findall("<tr>", text)) == 3


def test_measurements_that_differ_in_the_attack_do_not_hide_each_other(run):
    common = {"split": "test", "attack": "pgd-7", "eps": 0.03, "n": 1, "restarts": 1}
    common |= {"interval_95_percent": [0.0, 1.0], "loss": "ce"}
    opened = Run.open(run)
    opened.log("evaluation", **common, norm="l2", error_percent=12.34)
    opened.log("evaluation", **common | {"loss": "margin"}, norm="linf", error_percent=23.45)
    opened.log("evaluation", **common | {"restarts": 9}, norm="linf", error_percent=34.56)
    assert cli.main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert all(figure in text for figure in ("12.34", "23.45", "34.56"))
    assert "l2 eps 0.03" in text and "margin loss" in text and "9 restarts" in text


def test_a_run_without_an_epoch_or_an_evaluation_says_so(run):
    (run / METRICS).unlink()
    assert cli.main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "No epoch is finished yet" in text and "Nothing is evaluated yet" in text


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "evaluation"},
        {"kind": "evaluation", "split": [], "attack": {}, "eps": "x", "norm": 1},
        {"kind": "epoch", "epoch": 3},
        {"kind": "epoch", "clean_accuracy_percent": "x", "adv_accuracy_percent": None},
    ],
)
def test_a_row_of_another_program_is_refused_by_name(complaint, run: Path, row):
    with open(run / METRICS, "a") as file:
        file.write(json.dumps(row) + "\n")
    assert str(run / METRICS) in complaint("report", run)
    assert not (run / "report.html").exists()
