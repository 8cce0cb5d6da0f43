"""results/index.html opened in a real Chromium: the numbers are read back from what a reader sees."""

import csv
import itertools
import json
import re
from pathlib import Path

import pytest

from scripts import report
from tests.scripts.synthetic_runs import write_comparison, write_run

MINUS = "\N{MINUS SIGN}"
LABEL = "proxy: </script><b>16x16</b> images /*DATA*/"  # what must stay text


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Three experiments: many methods at full scale and as a proxy, and ResNet-50 on ImageNet."""
    root = tmp_path_factory.mktemp("page")
    runs, out = root / "results/runs", root / "results"
    write_comparison(runs, "cifar")
    write_comparison(runs, "small_proxy", seeds=2, label=LABEL, config={"scale": "proxy"})
    for seed in range(3):
        settings = {"experiment": "imagenet", "model": "resnet50", "dataset": "imagenet", "epochs": 100}
        write_run(runs, sparsity=0.9, seed=seed, top1=76.0 + seed / 10, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.plan, "experiments", list)
        patch.setattr(report.figures, "plots", lambda name, cells: {})  # pictures have their own test
        report.declared.cache_clear()
        assert report.main(["--runs", str(runs), "--out", str(out)]) == 0
        report.declared.cache_clear()
    return out


class Page:
    """The page as its reader uses it."""

    def __init__(self, driver, path: Path, width=1280, scheme="light"):
        self.driver = driver
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        driver.get(path.as_uri())

    def script(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def choose(self, **filters):
        for name, value in filters.items():
            code = "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
            self.script(f"{code} s.dispatchEvent(new Event('change'))", name, str(value))
        return self

    def table(self, name):
        """Rows as dictionaries by column title."""
        head, *rows = self.script(
            "return [...document.getElementById(arguments[0]).rows].map(r => [...r.cells].map(c => c.textContent))",
            name,
        )
        return [dict(zip(head, row, strict=True)) for row in rows]

    def points(self, section):
        """Attributes and place of every point of a section's charts."""
        return self.script(
            """return [...document.querySelectorAll(`#${arguments[0]} .point`)].map(p => {
                 const [x, y] = p.getAttribute("transform").match(/[-\\d.]+/g).map(Number);
                 const published = !!p.closest(".published");
                 return {...p.dataset, x, y, label: p.getAttribute("aria-label"), published} })""",
            section,
        )

    def heights(self, section):
        """(place, value) of the grid lines of a section's first chart."""
        return self.script(
            """const svg = document.querySelector(`#${arguments[0]} svg`);
               const values = [...svg.querySelectorAll(".ytick")].map(t => Number(t.dataset.value));
               return [...svg.querySelectorAll(".grid")].map((l, i) => [Number(l.getAttribute("y1")), values[i]])""",
            section,
        )

    def click(self, selector):
        self.script("document.querySelector(arguments[0]).click()", selector)

    def background(self):
        return self.script("return getComputedStyle(document.body).backgroundColor")


def truth(results, experiment):
    with (results / "tables" / f"{experiment}.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_table_shows_every_cell_of_the_evidence(browser, results):
    shown = Page(browser, results / "index.html").choose(experiment="cifar").table("cells")
    expected = truth(results, "cifar")
    assert len(shown) == len(expected) == 33
    for row, cell in zip(shown, expected, strict=True):
        assert row["Top-1 (%)"] == f"{float(cell['final_top1_mean']):.2f} ± {float(cell['final_top1_std']):.2f}"
        assert (row["n"], row["Published (%)"]) == ("3", "unknown")
        assert row["Evidence"].split() == ["0", "1", "2"]
        assert row["Method"].split(",")[0] == cell["method"]


def test_links_lead_to_the_evidence(browser, results):
    page = Page(browser, results / "index.html").choose(experiment="cifar")
    links = page.script("return [...document.querySelectorAll('#cells a')].map(a => a.getAttribute('href'))")
    assert len(set(links)) == 99
    assert all((results / link).is_file() for link in links)


@pytest.mark.parametrize("section", ["by-sparsity", "by-flops"])
def test_points_stand_where_their_numbers_are(browser, results, section):
    page = Page(browser, results / "index.html").choose(experiment="cifar")
    points = [p for p in page.points(section) if p["row"] != "dense"]
    sparse = [cell for cell in truth(results, "cifar") if cell["method"] != "dense"]
    assert sorted(float(p["mean"]) for p in points) == sorted(round(float(c["final_top1_mean"]), 2) for c in sparse)
    (y0, v0), *_, (y1, v1) = page.heights(section)
    for p in points:
        assert v0 + (p["y"] - y0) * (v1 - v0) / (y1 - y0) == pytest.approx(float(p["mean"]), abs=0.02)
        assert f"{float(p['mean']):.2f} ± " in p["label"]
        assert "n = 3" in p["label"]
    order = [p["x"] for p in points if p["row"].startswith("ste")]
    assert order == sorted(order)


def test_at_one_target_the_methods_stand_side_by_side(browser, results):
    page = Page(browser, results / "index.html").choose(experiment="cifar", sparsity="0.98")
    places = sorted(p["x"] for p in page.points("by-sparsity") if p["row"] != "dense" and not p["published"])
    assert len(places) > 5
    assert min(after - before for before, after in itertools.pairwise(places)) > 10  # pixels


def test_layers_and_mask_changes_are_those_of_the_evidence(browser, results):
    page = Page(browser, results / "index.html").choose(experiment="cifar", sparsity="0.9")
    layers = [p for p in page.points("by-layer") if p["row"] == "gmp" and p["layer"] == "conv1"]
    assert [float(p["left"]) for p in layers] == [pytest.approx(1 - 388 / 864, rel=1e-5)]
    mask = [float(p["change"]) for p in page.points("by-mask") if p["row"] == "gmp"]
    assert mask == pytest.approx([1e-4 * 0.5**epoch for epoch in (1, 2, 3, 4)], rel=1e-5)


def test_published_figures_stand_beside_ours_with_difference_and_source(browser, results):
    page = Page(browser, results / "index.html").choose(experiment="imagenet")
    ours = next(row for row in page.table("cells") if row["Method"] == "feather" and row["n"] == "3")
    assert ours["Top-1 (%)"] == "76.10 ± 0.10"
    assert (ours["Published (%)"], ours["Difference"]) == ("76.93", f"{MINUS}0.83")
    assert ours["Source"] == "paperswithcode board of the paper"
    alone = next(row for row in page.table("cells") if row["Method"] == "optg" and row["Sparsity"] == "98 %")
    assert (alone["Top-1 (%)"], alone["Published (%)"], alone["Difference"]) == ("not run", "67.20", "-")
    published = {p["published"] for p in page.points("by-sparsity") if p["published"]}
    assert published
    labels = [p["label"] for p in page.points("by-sparsity") if p["label"].startswith("published: feather")]
    assert labels == ["published: feather, 90 %, top-1 76.93 %, paperswithcode board of the paper"]


def signed(text):
    return f"{float(text):+.2f}".replace("-", MINUS)


def test_comparisons_say_their_interval_or_that_the_seeds_are_too_few(browser, results):
    page = Page(browser, results / "index.html").choose(experiment="cifar")
    with (results / "tables/cifar_paired.csv").open() as file:
        expected = list(csv.DictReader(file))
    shown = page.table("paired")
    assert len(shown) == len(expected) == 28
    for row, comparison in zip(shown, expected, strict=True):
        assert row["Difference"] == signed(comparison["difference_mean"])
        assert row["95 % interval"] == f"{signed(comparison['interval_low'])} to {signed(comparison['interval_high'])}"
        assert row["Told"] == comparison["told"]
    assert {row["Told"] for row in page.choose(experiment="small_proxy").table("paired")} == {
        "n = 2: too few seeds to tell"
    }


def test_sorting_by_a_header(browser, results):
    page = Page(browser, results / "index.html").choose(experiment="imagenet")
    page.click("#cells th:nth-child(3) button")
    assert page.script("return document.querySelector('#cells th:nth-child(3)').ariaSort") == "ascending"
    page.choose(experiment="cifar")
    values = [float(row["Top-1 (%)"].split()[0]) for row in page.table("cells")]
    assert values == sorted(values)
    page.click("#cells th:nth-child(3) button")
    assert [float(row["Top-1 (%)"].split()[0]) for row in page.table("cells")] == sorted(values, reverse=True)
    assert page.script("return document.activeElement.closest('th').textContent") == "Top-1 (%)"
    page.choose(experiment="imagenet")
    assert page.table("cells")[0]["Top-1 (%)"] == "76.10 ± 0.10"  # what was not run stays below
    assert page.table("cells")[-1]["Top-1 (%)"] == "not run"


def test_filters(browser, results):
    page = Page(browser, results / "index.html").choose(experiment="cifar", sparsity="0.98")
    assert {row["Sparsity"] for row in page.table("cells")} == {"98 %"}
    assert len(page.table("cells")) == 8
    assert {p["sparsity"] for p in page.points("by-sparsity") if p["row"] != "dense"} == {"0.98"}
    page.click("#methods input[value=gmp]")
    assert len(page.table("cells")) == 7
    assert not any(
        p["row"] == "gmp"
        for section in ("by-sparsity", "by-flops", "by-layer", "by-mask")
        for p in page.points(section)
    )
    page.choose(experiment="all", scale="proxy", sparsity="all")
    assert {row["Experiment"] for row in page.table("cells")} == {"small_proxy (proxy)"}
    page.choose(dataset="imagenet")
    assert page.script("return document.querySelector('#cells tbody').textContent") == "Nothing matches these filters."


def test_a_proxy_says_so_and_its_label_stays_text(browser, results):
    page = Page(browser, results / "index.html").choose(experiment="small_proxy")
    notes = page.script("return document.getElementById('notes').textContent")
    assert notes.startswith("Proxy scale")
    assert "</script><b>16x16</b> images /*DATA*/" in notes
    assert all(
        "(proxy)" in title
        for title in page.script("return [...document.querySelectorAll('h3')].map(h => h.textContent)")
    )
    assert {row["Published (%)"] for row in page.table("cells")} == {"none"}


def test_a_point_tells_its_value_and_evidence_when_touched(browser, results):
    page = Page(browser, results / "index.html").choose(experiment="cifar")
    page.click("#theme")  # anything that is no point
    page.script(
        "arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))",
        page.driver.find_element("css selector", "#by-sparsity .point[data-row=gmp]"),
    )
    tip = page.script(
        "const t = document.getElementById('tip'); return [t.hidden, t.textContent, t.querySelectorAll('a').length]"
    )
    assert tip[0] is False
    assert re.search(r"gmp, 90 %top-1 [\d.]+ ± [\d.]+ %, n = 3", tip[1])
    assert tip[2] == 3
    page.script("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    assert page.script("return document.getElementById('tip').hidden") is True


def test_light_and_dark_follow_the_system_and_the_button(browser, results):
    light = Page(browser, results / "index.html")
    light.script("localStorage.clear()")
    light = Page(browser, results / "index.html")
    assert light.background() == "rgb(255, 255, 255)"
    stroke = "return getComputedStyle(document.querySelector('#by-sparsity .line')).stroke"
    colour = light.script(stroke)
    dark = Page(browser, results / "index.html", scheme="dark")
    assert dark.background() == "rgb(20, 23, 28)"
    assert dark.script(stroke) != colour
    dark.click("#theme")  # system -> light
    assert dark.background() == "rgb(255, 255, 255)"
    dark.click("#theme")
    light = Page(browser, results / "index.html")  # remembered
    assert light.background() == "rgb(20, 23, 28)"
    light.script("localStorage.clear()")


@pytest.mark.parametrize("experiment", ["cifar", "imagenet", "small_proxy", "all"])
def test_a_phone_never_scrolls_sideways(browser, results, experiment):
    page = Page(browser, results / "index.html", width=360).choose(experiment=experiment)
    assert page.script("return innerWidth") == 360
    assert page.script("return document.documentElement.scrollWidth") <= 360
    outside = """return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('#tip')
        && e.getBoundingClientRect().right > 361).map(e => e.outerHTML.slice(0, 90))"""
    assert page.script(outside) == []
    heights = "return [...document.querySelectorAll('.xtick')].map(t => t.getBoundingClientRect().height)"
    assert min(page.script(heights)) >= 10  # pixels: the charts are drawn for the width, not shrunk to it
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_is_one_file_and_without_errors(browser, results):
    browser.get_log("browser")  # other pages' entries
    Page(browser, results / "index.html").choose(experiment="all")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    text = (results / "index.html").read_text()
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//|@import|url\(""", text)
    assert str(results) not in text
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    assert len(data["experiments"]) == 3
