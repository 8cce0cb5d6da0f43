"""What results/ and the README show is what the committed evidence says."""

from scripts import report


def test_committed_tables_figures_and_the_readmes_overview_are_fresh(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_an_edited_number_in_the_readme_is_noticed(tmp_path, monkeypatch, capsys):
    readme = report.ROOT / "README.md"
    copied = tmp_path / "README.md"
    copied.write_text(readme.read_text().replace(report.END, "| 99.99 (3) |\n" + report.END))
    (tmp_path / "results").mkdir()
    for source in (report.ROOT / "results").iterdir():
        (tmp_path / "results" / source.name).symlink_to(source)
    assert (
        report.main(["--check", "--runs", str(report.ROOT / "results/runs"), "--out", str(tmp_path / "results")]) == 1
    )
    assert f"{copied} is stale" in capsys.readouterr().err
