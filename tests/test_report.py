"""The page about runs: what it shows, what it leaves out, and what it refuses to read."""

import html.parser
import io
import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image

from fastiat import cli, report
from fastiat.measuring.rows import write_rows
from fastiat.measuring.verdicts import DIAGNOSIS, Finding
from fastiat.page import charts, figures
from fastiat.page.figures import COLOURS, Series
from fastiat.paper import compare
from fastiat.paper.published import Cell
from fastiat.runs.directory import METRICS, Run
from fastiat.runs.results import add_results, read_results

VOID = {"meta", "img", "br"}


class Page(html.parser.HTMLParser):
    """Checks that elements nest, and collects what a page would load, its ids and its text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.source = file.read_text()
        self.feed(self.source)
        self.close()
        assert not self.open

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self._note(attributes)

    def handle_startendtag(self, tag, attributes):
        self._note(attributes)

    def _note(self, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


@pytest.fixture
def folder(run, tmp_path) -> Path:
    """A folder with names that need escaping, holding two runs and a table."""
    folder = tmp_path / "<runs>"
    for name in ("one", "two & <b>more $x$"):
        shutil.copytree(run, folder / name)
    line = compare.Line("Row <i>", "No attack, test", 5.0, 7.5, 6.0, 9.0, 3, 40)
    cited = compare.Line("Cited", "No attack, test", 4.8)
    compare.Comparison("table3", "A & B", "Scaled: <all>.", "fastiat x", (line, cited)).write(
        folder
    )
    return folder


def test_the_page_shows_errors_settings_and_curves_and_loads_nothing(run, capsys):
    assert cli.main(["report", str(run)]) == 0
    file = run / "report.html"
    assert capsys.readouterr().out == f"{file}\n"
    shown = Page(file)
    for row in Run.open(run).rows():
        if row["kind"] == "evaluation":
            low, high = row["interval_95_percent"]
            name = "no attack" if row["attack"] == "none" else row["attack"]
            assert f"test, {name}" in shown.text
            assert f"{row['error_percent']:.2f} {low:.1f} to {high:.1f}, n 40" in shown.text
    assert "arch mlp6" in shown.text and "fastiat train --arch mlp6 --width 16" in shown.text
    assert "training loss" in shown.text and "Examples" in shown.text
    picture = Image.open(io.BytesIO((run / "curves.png").read_bytes()))
    assert picture.size[0] > 600
    assert {file.name for file in (run / "figures").iterdir()} == {"tradeoff.png", "tradeoff.svg"}


def test_the_page_is_well_formed_escaped_and_refers_to_nothing_outside(folder):
    assert cli.main(["report", str(folder)]) == 0
    shown = Page(folder / "report.html")
    assert "http" not in shown.source and "//" not in re.sub(r"data:[^\"]*", "", shown.source)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in shown.links)
    assert {link[1:] for link in shown.links if link.startswith("#")} <= set(shown.ids)
    assert len(set(shown.ids)) == len(shown.ids)
    assert "<b>more" not in shown.source and "<i>" not in shown.source
    assert "two & <b>more $x$" in shown.text and "fastiat: <runs>" in shown.text
    assert "Row <i>" in shown.text and "Scaled: <all>." in shown.text


def test_a_comparison_shows_ours_the_papers_and_the_difference(folder):
    assert cli.main(["report", str(folder)]) == 0
    text = Page(folder / "report.html").text
    assert "7.50 6.00 to 9.00 paper 5.00 (+2.50)" in text
    assert "Cited not measured paper 4.80" in text and "fastiat x" in text


def test_the_page_goes_where_it_is_sent_with_its_figures(folder, tmp_path):
    out = tmp_path / "new" / "page.html"
    assert cli.main(["report", str(folder), "--out", str(out)]) == 0
    assert (out.parent / "figures" / "tradeoff.png").exists()
    assert not (folder / "report.html").exists()


def test_measurements_that_differ_in_the_attack_do_not_hide_each_other(run):
    real = next(e for e in read_results(run) if e["attack"] == "pgd-20")
    add_results(run, [real | {"norm": "l2", "error_percent": 12.34}])
    add_results(run, [real | {"loss": "margin", "error_percent": 23.45}])
    add_results(run, [real | {"restarts": 9, "error_percent": 34.56}])
    assert cli.main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert all(figure in text for figure in ("12.34", "23.45", "34.56"))
    assert "l2 eps 0.03" in text and "margin loss" in text and "9 restarts" in text


def test_worst_cases_of_different_attacks_have_columns_of_their_own(run):
    for attacks in (["--attacks", "fgsm"], ["--attacks", "pgd-2"]):
        argv = ["evaluate", str(run), "--worst", *attacks, "--limit", "20", "--device", "cpu"]
        assert cli.main(argv) == 0
    assert cli.main(["report", str(run)]) == 0
    shown = Page(run / "report.html").text
    assert "of none, fgsm" in shown and "of none, pgd-2" in shown


def test_the_command_can_be_pasted_whatever_the_folders_name(folder):
    assert cli.main(["report", str(folder)]) == 0
    shown = Page(folder / "report.html").text
    assert f"--out '{folder}/two & <b>more $x$'" in shown


@pytest.mark.parametrize("place", ["taken", "taken/page.html", "file/page.html"])
def test_a_place_for_the_page_that_cannot_be_gets_one_line(
    complaint, run, tmp_path, contents, place
):
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "page.html").mkdir(parents=True)
    before = contents(run)
    assert str(tmp_path / place.split("/p")[0]) in complaint(
        "report", run, "--out", tmp_path / place
    )
    assert str(tmp_path / "file") in complaint("norms", run, "--out", tmp_path / "file" / "x")
    assert contents(run) == before


def test_a_run_of_somebody_else_is_shown_and_not_written(run, tmp_path, contents, monkeypatch):
    before = contents(run)
    monkeypatch.setattr("os.access", lambda path, *_: Path(path) != run)
    assert cli.main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert {"runs", "examples"} <= set(Page(tmp_path / "page.html").ids)
    assert contents(run) == before


def test_sections_without_data_are_left_out(run):
    for name in (METRICS, "evaluation.json", "model.safetensors"):
        (run / name).unlink()
    assert cli.main(["report", str(run)]) == 0
    shown = Page(run / "report.html")
    assert "No epoch is finished yet" in shown.text and "Nothing is evaluated yet" in shown.text
    assert [name for name in shown.ids if len(name) > 2] == ["errors", "runs", "environment"]


def test_sweeps_norms_and_a_diagnosis_have_their_sections(run):
    real = next(e for e in read_results(run) if e["attack"] == "pgd-20")
    for eps in (0.01, 0.02, 0.05):
        add_results(run, [real | {"kind": "sweep", "eps": eps, "error_percent": 1000 * eps}])
    for steps in (5, 50):
        changed = {"kind": "sweep", "eps": 0.02, "attack": f"pgd-{steps}", "steps": steps}
        add_results(run, [real | changed])
    assert cli.main(["norms", str(run)]) == 0
    finding = Finding("more steps", "fail", {"error_percent": [1.5, 2.0]}, "It <breaks>.")
    write_rows(run / DIAGNOSIS, [finding])
    assert cli.main(["report", str(run)]) == 0
    shown = Page(run / "report.html")
    assert {"robustness", "norms", "diagnosis", "examples"} <= set(shown.ids)
    assert "more steps fail It <breaks>. error percent: 1.5, 2" in shown.text
    names = {file.stem for file in (run / "figures").glob("*.svg")}
    assert names == {"tradeoff", "by-eps", "by-steps", "norms-frobenius", "norms-spectral"}
    # In the order of steps: 5, 20 and 50 at eps 0.02.
    assert "eps 0.02, by PGD steps" in shown.text


def test_a_figure_of_the_page_takes_its_colours_from_the_theme():
    series = [
        Series("a & b", [(1.0, 2.0), (2.0, 3.0)], 1),
        Series("c", [(1.0, 5.0)], 2, paper=True),
    ]
    picture = figures.lines("name", "a <title>", series, "x")
    root = ET.fromstring(picture.svg)
    assert root.tag.endswith("svg") and Image.open(io.BytesIO(picture.png)).size[0] > 500
    inline = picture.inline("p")
    assert not re.search(r"#[0-9a-f]{6}\b", inline)
    assert "var(--c1)" in inline and "var(--ink)" in inline and "a &lt;title&gt;" in inline
    assert "fill: #ff" not in inline and "http" not in inline
    style = report.TEMPLATES.get_template("style.css").render(colours=COLOURS)
    for theme in range(2):
        for name, colours in COLOURS.items():
            assert f"--{name}: {colours[theme]}" in style


@pytest.mark.parametrize("theme", [0, 1])
def test_every_colour_stands_out_from_the_page(theme):
    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    paper = luminance(COLOURS["page"][theme])
    for name, colours in COLOURS.items():
        if name not in ("page", "rule"):
            dark, light = sorted((paper, luminance(colours[theme])))
            # WCAG 2's contrast ratio for text.
            assert (light + 0.05) / (dark + 0.05) >= 4.5, name


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "epoch", "epoch": 3},
        {"kind": "epoch", "clean_accuracy_percent": "x", "adv_accuracy_percent": None},
    ],
)
def test_a_row_of_another_program_is_refused_by_name(complaint, run: Path, row):
    with open(run / METRICS, "a") as file:
        file.write(json.dumps(row) + "\n")
    assert str(run / METRICS) in complaint("report", run)
    assert not (run / "report.html").exists()


def of_table(**figures: object) -> str:
    line = {"row": "r", "measure": "m", "paper": 1.0, "errors": 1, "n": 2}
    named = dict.fromkeys(("name", "title", "caption", "command"), "")
    return json.dumps(named | {"lines": [line | {"ours": 1.0, "low": 0.0, "high": 2.0} | figures]})


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"lines": [{"row": 1}]}', "[" * 5000),
        *(of_table(low=None), of_table(ours=math.nan), of_table(high=10**400)),
    ],
)
def test_a_table_of_another_program_is_refused_by_name(complaint, run, content):
    file = run / "table1.json"
    file.write_text(content)
    line = complaint("report", run)
    assert str(file) in line and "remove it, or run fastiat reproduce again" in line


def test_a_weak_measurement_does_not_take_the_place_of_the_real_one(run):
    """Each of these is measured after the real one, and has a column that says what differs."""
    real = next(e for e in read_results(run) if e["attack"] == "pgd-20")
    weak = {
        "alpha 1e-05": {"alpha": 1e-5},
        "no random start": {"random_start": False},
        "7 images": {"n": 7},
        "seed 3": {"seed": 3},
        "bf16": {"precision": "bf16"},
        "data 0123": {"data": "0123"},
        "svhn": {"dataset": "svhn"},
        "5 restarts": {"restarts": 5},
        "margin loss": {"loss": "margin"},
        "l2": {"norm": "l2"},
        "train, pgd-20": {"split": "train"},
    }
    for number, change in enumerate(weak.values()):
        add_results(run, [real | change | {"error_percent": (number + 1) / 100, "errors": 0}])
    assert cli.main(["report", str(run)]) == 0
    source = (run / "report.html").read_text(encoding="utf-8")
    table = re.findall(r"<table.*?</table>", source, re.S)[0]
    heads = re.findall(r'<th scope="col">(.*?)</th>', table, re.S)[1:]
    cells = re.findall(r"<td>(.*?)</td>", table, re.S)
    assert len(heads) == len(set(heads)) == len(cells)
    shown = dict(zip(heads, cells, strict=True))
    for number, (named, _) in enumerate(weak.items()):
        (cell,) = [cell for cell in cells if cell.startswith(f"{(number + 1) / 100:.2f}<")]
        (head,) = [head for head, of in shown.items() if of == cell]
        assert named in head
    (head,) = [h for h, cell in shown.items() if cell.startswith(f"{real['error_percent']:.2f}")
               and "pgd-20" in h]  # fmt: skip
    assert "alpha 0.0075" in head and "40 images" in head and "no random" not in head
    # The same measured again does take its place.
    add_results(run, [real | {"error_percent": 12.34}])
    assert cli.main(["report", str(run)]) == 0
    again = (run / "report.html").read_text(encoding="utf-8")
    assert len(re.findall('scope="col"', again)) == len(re.findall('scope="col"', source))
    assert "12.34" in again


def test_a_figure_draws_other_measurements_as_lines_of_their_own(run):
    real = next(e for e in read_results(run) if e["attack"] == "pgd-20")
    for eps in (0.01, 0.02, 0.05):
        for alpha, error in ((0.0075, 1000 * eps), (1e-5, 1.0)):
            row = {"kind": "sweep", "eps": eps, "alpha": alpha, "error_percent": error}
            add_results(run, [real | row])
    opened = Run.open(run)
    measured, labels = {run: read_results(run)}, charts.label([opened])
    _, curves = charts._best_curves([opened], measured, "eps")
    found = sorted(tuple(row["error_percent"] for row in of.values()) for of in curves.values())
    assert found[0] == (1.0, 1.0, 1.0) and found[1][:2] == (10.0, 20.0) and found[1][-1] == 50.0
    drawn = charts.sweeps([opened], measured, labels, ())[0].svg
    assert "alpha 1e-05" in drawn and "alpha 0.0075" in drawn
    measured[run] = [*(e for e in measured[run] if e["attack"] == "none"), real]
    (point,) = charts.tradeoff([opened], measured, labels, ())
    assert "random start" not in point.svg
    measured[run] += [real | {"random_start": False}]
    (point,) = charts.tradeoff([opened], measured, labels, ())
    assert ", random start" in point.svg and "no random start" in point.svg


def test_reproduce_takes_no_other_measurement_for_a_cell(run):
    real = next(e for e in read_results(run) if e["attack"] == "pgd-20")
    cell = Cell("pgd7", "pgd7", "test", "pgd-20", 0.03, 50.0)
    given = {"n": 40, "alpha": 0.0075, "dataset": "digits", "data": real["data"]}
    given |= {"run": run, "source": run, "precision": "fp32"}
    assert compare.find(cell, [real], **given) == real
    for change in (
        {"alpha": 1e-5}, {"random_start": False}, {"n": 39}, {"seed": 3}, {"precision": "bf16"},
        {"data": "0123"}, {"dataset": "svhn"}, {"restarts": 2}, {"loss": "margin"}, {"norm": "l2"},
        {"split": "train"}, {"eps": 0.02}, {"attack": "pgd-7"}, {"source": "other"},
    ):  # fmt: skip
        assert compare.find(cell, [real, real | change], **given) == real
        assert compare.find(cell, [real | change], **given) is None
