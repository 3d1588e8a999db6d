"""The report as one HTML page: whole in itself, and what a browser makes of it."""

import base64
import io
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch import report as command
from tests.unit.trainer.report.test_report import realistic, write_lines
from trainer.errors import UserError
from trainer.report.loss_curve import Curve, loss_figure, moving_mean
from trainer.report.report import read_run, run_figures, write_page
from trainer.report.training_plots import draw_optimizer

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
MARKUP = "<script>alert(1)</script> & <img src=x>"


class Page(HTMLParser):
    """What a page refers to, and its texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        for key, value in attributes:
            if key in ("src", "href", "srcset", "data", "action"):
                self.references.append(value)
            elif key == "id":
                self.ids.add(value)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of WeightLoRA with evaluations and generated answers."""
    made = realistic(tmp_path_factory.mktemp("page") / "a <run>", "weightlora", steps=40)
    lines = [json.loads(line) for line in (made / "metrics.jsonl").open()]
    for line in lines:
        if "loss" in line:
            line["grad_norm"] = 0.5 + 20 * (line["step"] == 9)
    write_lines(made / "metrics.jsonl", lines)
    write_lines(made / "predictions.jsonl", [
        {"step": 40, "record": 0, "prompt": "2 + 3 =", "text": MARKUP, "reference": "5", "exact": 0.0}
    ])  # fmt: skip
    return made


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    file = folder.parent / "out/report.html"
    write_page(folder, file)
    return file


def test_the_page_needs_nothing_else(folder: Path, file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    outside = [r for r in page.references if not r.startswith(("data:image/png;base64,", "#"))]
    assert outside == [] and "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text
    assert {r[1:] for r in page.references if r.startswith("#")} <= page.ids
    assert not {"script", "link", "iframe"} & set(page.tags)
    images = [r for r in page.references if r.startswith("data:")]
    names = ["loss", *(name for name, _ in run_figures(read_run(folder)))]
    assert names == ["loss", "optimizer", "ranks", "ranks_by_type", "survivors", "omega"]
    assert len(images) == len(names)
    for image in images:
        opened = Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2])))
        assert len(np.unique(np.asarray(opened))) > 10, "an empty figure"


def test_samples_metrics_and_configuration_are_in_it(file: Path) -> None:
    page = Page(file.read_text(encoding="utf-8"))
    for text in ("a <run>", MARKUP, "Samples", "Evaluations", "1.5", "method.kind", "weightlora"):
        assert text in page.texts
    rows = page.tags.count("tr")
    assert rows > 2 + 2 + 40, "every logged step of so short a run has a row"


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command.main([str(folder), "--html", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.html'}\n"
    for more in ([str(folder)], ["--out", str(tmp_path)]):
        with pytest.raises(UserError, match="--html: given with --out or several runs"):
            command.main([str(folder), *more, "--html", str(tmp_path / "b.html")])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--html .*: cannot be written"):
        write_page(folder, tmp_path / "file/a.html")


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_a_browser_shows_it(file: Path, tmp_path: Path) -> None:
    shot = tmp_path / "report.png"
    subprocess.run(
        [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--user-data-dir={tmp_path}/profile", f"--screenshot={shot}", "--window-size=1100,4200",
         file.as_uri()],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    print(f"screenshot: {shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert pixels.shape == (4200, 1100, 3)
    drawn = (pixels < 250).any(axis=2)
    assert drawn[:300].mean() > 0.01, "no heading"
    dark_blue = (np.abs(pixels.astype(int) - [8, 48, 107]) < 8).all(axis=2)
    assert dark_blue.sum() > 5000, "no survivors"


def test_late_differences_fill_the_second_panel() -> None:
    steps = np.arange(1, 101)
    curves = [
        Curve(name, steps, 1 + 8 * np.exp(-steps / 5) + late, np.array([100]), np.array([1 + late]))
        for name, late in (("a", 0.00), ("b", 0.01))
    ]
    whole, half = loss_figure(curves).axes
    assert half.get_xlim()[0] == 50
    low, high = half.get_ylim()
    assert low < 1 < 1.01 < high < 1.02
    assert whole.get_ylim()[0] == 0 and whole.get_ylim()[1] > 5
    short = [Curve("a", steps[:4], steps[:4] / 1.0, np.array([]), np.array([]))]
    assert len(loss_figure(short).axes) == 1


def test_moving_mean() -> None:
    values = np.array([1.0, 2.0, 6.0, 3.0])
    assert moving_mean(values, 1).tolist() == values.tolist()
    assert moving_mean(values, 3).tolist() == [1.5, 3.0, 11 / 3, 4.5]


def test_a_spike_does_not_flatten_the_gradient_norm(folder: Path) -> None:
    figure = draw_optimizer(read_run(folder).metrics, "a")
    assert figure is not None
    rate, norm = figure.axes
    assert norm.get_yscale() == "log" and rate.get_yscale() == "linear"
    assert max(norm.lines[0].get_ydata()) == 20.5
    assert draw_optimizer([{"step": 1, "loss": 2.0}], "a") is None
