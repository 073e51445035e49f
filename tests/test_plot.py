"""What plot.py promises: all files for any set of models, one colour per model, titles and tables that say what
results.json says. The results are made by grade.py from made-up samples."""
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import grade
import plot

FILES = ["accuracy.png", "coverage.png", "results.md", "training.png"]
MODELS = {"teacher": (0.4, 4.0), "pure": (0.3, 1.0), "hybrid": (0.35, 2.0), "sft": (0.1, 1.5), "long-name-of-a-model": (0.2, 1.2)}


def make_out(out, names, num_samples=8, num_problems=40):
    """Samples, training logs and results.json: a model is right with a probability and takes so many seconds a round."""
    for name in names:
        chance, speed = MODELS[name]
        rng = np.random.default_rng(0)
        folder = Path(out) / name
        folder.mkdir(parents=True)
        with open(folder / "samples.jsonl", "w") as file:
            for sample in range(num_samples):
                for problem in range(num_problems):
                    answer = 1000 + problem if rng.random() < chance else 7
                    file.write(json.dumps({"problem": problem, "sample": sample, "question": "?", "gold": str(1000 + problem),
                                           "completion": f"#### {answer}", "num_tokens": 20, "finish": "stop",
                                           "seconds": speed * (sample + 1)}) + "\n")
        (folder / "samples.json").write_text(json.dumps({"settings": {"task": "arithmetic"}, "device": "cpu (test)",
                                                         "dtype": "float32", "params": 123456, "date": "2026-11-21"}))
        stages = ["pretrain"] if name == "teacher" else ["matrices", "a stage of my own", "kl"]
        with open(folder / "metrics.jsonl", "w") as file:
            for stage in stages:
                for step in range(1, 30):
                    file.write(json.dumps({"stage": stage, "step": step, "tokens": step * 1000, "loss": 3 / step}) + "\n")
            file.write('{"stage": "kl", "ste')                            # killed while writing
    run(grade, out)
    return json.loads((Path(out) / "results.json").read_text())


def run(script, out, *arguments):
    argv, sys.argv = sys.argv, [script.__name__, "--out", str(out), *arguments]
    try:
        script.main()
    finally:
        sys.argv = argv


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    results = make_out(out, ["teacher", "pure", "hybrid"])
    run(plot, out)
    return out, results


def test_all_files_are_written_and_nothing_else(three):
    out, _ = three
    assert sorted(os.listdir(out)) == sorted(FILES + ["results.json", "teacher", "pure", "hybrid"])
    for name in FILES:
        if name.endswith("png"):
            height, width, _ = matplotlib.image.imread(out / name).shape
            assert width >= 1500 and height >= 500, f"{name} is {width} x {height}: too small for a slide"


@pytest.mark.parametrize("names, num_samples", [
    (["teacher"], 8), (["pure"], 1), (["pure", "hybrid"], 8), (["teacher", "pure"], 1), (list(MODELS), 3)])
def test_any_set_of_models_can_be_drawn(names, num_samples, tmp_path):
    """One model, no teacher, one k only, more models than the default three: no figure depends on there being three."""
    make_out(tmp_path, names, num_samples, num_problems=5)
    run(plot, tmp_path)
    assert set(FILES) <= set(os.listdir(tmp_path))


def test_without_training_logs_there_is_no_training_figure(tmp_path, capsys):
    make_out(tmp_path, ["teacher"])
    (tmp_path / "teacher" / "metrics.jsonl").unlink()
    run(plot, tmp_path)
    assert not (tmp_path / "training.png").exists() and "no training logs" in capsys.readouterr().out


def test_a_model_keeps_its_colour_whatever_others_there_are():
    everyone = plot.styles(["teacher", "pure", "hybrid", "sft"], "teacher")
    assert plot.styles(["teacher", "hybrid"], "teacher")["hybrid"] == everyone["hybrid"]
    assert plot.styles(["pure"], None)["pure"] == everyone["pure"]
    assert len(set(everyone.values())) == 4
    many = plot.styles([f"model {i}" for i in range(12)], None)           # more models than colours: they come round
    assert len(many) == 12


def test_every_figure_uses_the_models_colour(three):
    out, results = three
    models, look = results["models"], plot.styles(results["models"], "teacher")
    logs = {name: plot.read_metrics(out / name / "metrics.jsonl") for name in models}
    figures = [plot.draw_curves(models, "teacher", "coverage"), plot.draw_curves(models, "teacher", "majority"),
               plot.draw_training(logs, look)]
    for figure in figures:
        colours = {line.get_color() for ax in figure.axes for line in ax.lines}
        assert colours == {colour for colour, _ in look.values()}
        plot.plt.close(figure)


def test_lines_show_the_numbers_of_results_json(three):
    _, results = three
    figure = plot.draw_curves(results["models"], "teacher", "majority")
    for ax, x in zip(figure.axes, ("seconds", "k")):
        drawn = {line.get_color(): line.get_xydata() for line in ax.lines if line.get_marker() != "None"}
        for name, (colour, _) in plot.styles(results["models"], "teacher").items():
            model = results["models"][name]
            np.testing.assert_allclose(drawn[colour], np.stack([model[x], 100 * np.array(model["majority"])], 1))
    plot.plt.close(figure)


def test_bars_mark_the_budgets_at_which_a_student_is_ahead(three):
    _, results = three
    figure = plot.draw_curves(results["models"], "teacher", "coverage")
    bars = {tuple(line.get_xdata()) for line in figure.axes[0].lines if line.get_linewidth() == 5}
    assert bars == {tuple(budget) for name in ("pure", "hybrid") for budget in results["models"][name]["ahead"]["budgets"]}
    plot.plt.close(figure)


def cells(markdown, first_cell):
    """The rows of the Markdown tables whose first cell is this one, as lists of cells."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")]
    return [row for row in rows if row[0] == first_cell]


def test_results_md_has_the_numbers_of_results_json(three):
    out, results = three
    text = (out / "results.md").read_text()
    for name, m in results["models"].items():
        row, = cells(text, name)
        assert row[1:4] == ["123,456", f"{m['tokens_per_second']:,.0f}", f"{100 * m['coverage'][0]:.1f}"]
        for cell, curve in zip(row[4:6], ("coverage", "majority")):
            numbers = [100 * m[curve + suffix][-1] for suffix in ("", "_low", "_high")]
            assert cell == "{:.1f} [{:.1f}, {:.1f}]".format(*numbers)
        assert row[-1] == f"{m['seconds'][-1]:.1f}"
    first = results["models"]["pure"]["ahead"]["table"][0]
    row, = cells(text, f"{first['seconds']:.2f}")
    assert row[:3] == ["4.00", "1", f"{100 * first['teacher_coverage']:.1f}"]
    assert row[4:6] == [str(first["student_k"]), f"{100 * first['student_coverage']:.1f}"]
    assert row[7] == "{lead:+.1f} [{lead_low:+.1f}, {lead_high:+.1f}]".format(**first)
    assert "40 problems of arithmetic x 8 samples; sampled on cpu (test), float32, 2026-11-21" in text


def model(lead, low, pass_1):
    return {"coverage": [pass_1], "ahead": {"round_lead": lead, "round_lead_low": low, "table": []}}


@pytest.mark.parametrize("lead, low, title", [
    (7.4, 2.0, "In the same time, pure covers up to 7 points more than teacher"),
    (7.4, -1.0, "In the same time, pure is not clearly ahead of teacher"),
    (-3.0, -5.0, "In the same time, pure is not clearly ahead of teacher"),
])
def test_titles_claim_only_what_the_numbers_show(lead, low, title):
    left, right = plot.titles({"teacher": {"coverage": [0.4]}, "pure": model(lead, low, 0.31)}, "teacher", "coverage")
    assert left.replace("\N{NO-BREAK SPACE}", " ") == title
    assert right.replace("\N{NO-BREAK SPACE}", " ") == "Sample for sample, pure starts 9 points behind teacher"


def test_titles_are_neutral_without_a_comparison():
    assert plot.titles({"pure": {"coverage": [0.4]}}, None, "coverage") == ("Coverage against time", "Coverage against samples")


@pytest.mark.parametrize("values", [[90, 90.1, 89.9], [99, 99, 99, 99], [0, 0.5, 50], [50, 10, 90], [95]])
def test_labels_do_not_overlap_keep_their_order_and_move_only_if_they_must(values):
    placed = plot.spread(values, gap=5, low=2, high=98)
    assert all(2 <= y <= 98 for y in placed)
    assert np.argsort(placed, kind="stable").tolist() == np.argsort(values, kind="stable").tolist()
    assert all(b - a >= 5 - 1e-9 for a, b in zip(sorted(placed), sorted(placed)[1:]))
    if min(np.diff(sorted(values)), default=9) >= 5:
        assert placed == values


@pytest.mark.parametrize("seconds, text", [(0.02, "0.02 s"), (1, "1 s"), (45, "45 s"), (90, "1.5 min"), (600, "10 min"),
                                           (3600, "1 h"), (36000, "10 h")])
def test_times_read_as_a_person_says_them(seconds, text):
    assert plot.time_text(seconds) == text


@pytest.mark.parametrize("low, high", [(0.001, 0.02), (0.5, 100), (1, 1e5), (10, 40), (60, 200), (0.01, 1e4)])
def test_time_axis_has_a_readable_number_of_ticks(low, high):
    ticks = plot.time_ticks(low, high)
    assert 2 <= len(ticks) <= 7 and all(low <= t <= high for t in ticks) and ticks == sorted(ticks)
    assert len({plot.time_text(t) for t in ticks}) == len(ticks)


def test_metrics_of_a_resumed_run_count_once(tmp_path):
    lines = [{"stage": "kl", "step": s, "tokens": 10 * s, "loss": x} for s, x in ((1, 3.0), (2, 2.0), (2, 1.9), (3, 1.0))]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "kl", "step": 4}\n{"st')
    assert plot.read_metrics(path) == {"kl": [(10, 3.0), (20, 1.9), (30, 1.0)]}
    assert plot.read_metrics(tmp_path / "missing.jsonl") == {}


@pytest.mark.parametrize("content, arguments, said", [
    (None, [], "run python grade.py first"),
    ("{", [], "cannot read"),
    ("[]", [], "holds no models"),
    ('{"models": {}}', [], "holds no models"),
    ('{"models": {"pure": {"k": [1]}}}', [], "model pure lacks seconds, coverage"),
    ("valid", ["--teacher", "llama"], "run python grade.py --teacher llama first"),
    ("valid", ["--bogus"], "unrecognized arguments: --bogus"),
])
def test_a_mistake_is_one_line_and_exit_code_2_and_changes_nothing(content, arguments, said, three, tmp_path, capsys):
    if content == "valid":
        content = (three[0] / "results.json").read_text()
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    (tmp_path / "coverage.png").write_text("earlier")
    with pytest.raises(SystemExit) as exit:
        run(plot, tmp_path, *arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and len(error.splitlines()) == 1 and said in error
    assert (tmp_path / "coverage.png").read_text() == "earlier" and not (tmp_path / "results.md").exists()


def test_importing_plot_is_silent_and_needs_no_torch():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import plot; assert not {'torch', 'triton'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
