"""What plot.py promises: all files for any set of models, one colour per model, titles and curves that say what
results.json says. The results are made by grade.py from made-up samples."""
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import grade
import plot

ROOT = Path(plot.__file__).parent
FILES = ["accuracy.png", "coverage.png", "front.png", "results.md", "training.png"]
MODELS = {"teacher": (0.4, 4.0), "pure": (0.3, 1.0), "hybrid": (0.35, 2.0), "sft": (0.1, 1.5), "long-name-of-a-model": (0.2, 1.2)}
SMALL = {"teacher-small": (0.3, 2.0), "pure-small": (0.2, 0.5), "hybrid-small": (0.25, 1.0)}
SIX = ["teacher", "pure", "hybrid", *SMALL]


def make_out(out, names, num_samples=8, num_problems=40, ability=1.0, scored=False):
    """Samples, training logs and results.json: a model is right with a probability and takes so many seconds a round. Scores
    know half of what is right, and take half a second a round."""
    for name in names:
        chance, speed = (MODELS | SMALL)[name]
        rng = np.random.default_rng(0)
        folder = Path(out) / name
        folder.mkdir(parents=True)
        with open(folder / "samples.jsonl", "w") as file, open(folder / "scores.jsonl", "w") as scores:
            for sample in range(num_samples):
                for problem in range(num_problems):
                    answer = 1000 + problem if rng.random() < chance * ability else 7
                    file.write(json.dumps({"problem": problem, "sample": sample, "question": "?", "gold": str(1000 + problem),
                                           "completion": f"#### {answer}", "num_tokens": 20, "finish": "stop",
                                           "seconds": speed * (sample + 1)}) + "\n")
                    scores.write(json.dumps({"problem": problem, "sample": sample, "seconds": (sample + 1) / 2,
                                             "score": rng.random() + (answer != 7) / 2}) + "\n")
        if not scored:
            (folder / "scores.jsonl").unlink()
        (folder / "samples.json").write_text(json.dumps({"settings": {"task": "arithmetic"}, "device": "cpu (test)",
                                                         "dtype": "float32", "params": 123456, "date": "2026-11-21"}))
        tokens = 0
        with open(folder / "metrics.jsonl", "w") as file:
            for stage in ["pretrain"] if name.startswith("teacher") else ["matrices", "a stage of my own", "kl"]:
                for step in range(1, 30):
                    tokens += 1000
                    file.write(json.dumps({"stage": stage, "step": step, "tokens": tokens, "loss": 3 / step}) + "\n")
            file.write('{"stage": "kl", "ste')  # killed while writing
    grade.main(["--out", str(out)])
    return json.loads((Path(out) / "results.json").read_text())


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    results = make_out(out, ["teacher", "pure", "hybrid"])
    plot.main(["--out", str(out)])
    return out, results


def test_all_files_are_written_and_nothing_else(three):
    out, results = three
    assert sorted(os.listdir(out)) == sorted(FILES + ["results.json", "teacher", "pure", "hybrid"])
    for name in FILES:
        if name.endswith("png"):
            height, width, _ = matplotlib.image.imread(out / name).shape
            assert width >= 1500 and height >= 500, f"{name} is {width} x {height}: too small for a slide"
    assert (out / "results.md").read_text() == grade.report(results) + "\n"


@pytest.mark.parametrize("names, num_samples, ability", [
    (["pure"], 1, 1), (["teacher", "pure"], 8, 0), (list(MODELS), 3, 9)])
def test_any_set_of_models_can_be_drawn_without_warnings(names, num_samples, ability, tmp_path):
    """One model, no teacher, one k only; nothing right; all right, more models than the default three."""
    make_out(tmp_path, names, num_samples, 5, ability)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.main(["--out", str(tmp_path)])
    assert set(FILES) - set(os.listdir(tmp_path)) == ({"front.png"} if len(names) == 1 else set())


def test_without_training_logs_there_is_no_training_figure(tmp_path):
    make_out(tmp_path, ["teacher"], 2, 2)
    (tmp_path / "teacher" / "metrics.jsonl").unlink()
    plot.main(["--out", str(tmp_path), "--dpi", "50"])
    assert not (tmp_path / "training.png").exists()
    assert matplotlib.image.imread(tmp_path / "coverage.png").shape[1] == 550


def test_every_figure_uses_the_models_colours_which_never_change(three):
    out, results = three
    models, colour = results["models"], plot.colours(results["models"])
    assert plot.colours(["sft", "hybrid", "x", "pure"])["pure"] == colour["pure"]
    assert len(set(plot.colours([*MODELS, "a", "b"]).values())) == 7
    logs = {name: plot.read_metrics(out / name / "metrics.jsonl") for name in models}
    for figure in (plot.draw_curves(models, "coverage"), plot.draw_curves(models, "majority"), plot.draw_front(results),
                   plot.draw_training(logs, colour)):
        assert {line.get_color() for ax in figure.axes for line in ax.lines} == set(colour.values())
        plot.plt.close(figure)


@pytest.mark.parametrize("kind", ["coverage", "majority"])
def test_lines_and_bars_show_the_numbers_of_results_json(kind, three):
    models = three[1]["models"]
    figure = plot.draw_curves(models, kind)
    for ax, x in zip(figure.axes, ("seconds", "k")):
        drawn = {line.get_color(): line.get_xydata() for line in ax.lines if line.get_marker() != "None"}
        for name, colour in plot.colours(models).items():
            np.testing.assert_allclose(drawn[colour], np.stack([models[name][x], 100 * np.array(models[name][kind])], 1))
    bars = [list(line.get_xdata()) for line in figure.axes[0].lines if line.get_linewidth() == 5]
    assert bars == [b for name in ("pure", "hybrid") for b in models[name]["ahead"]["budgets"] if kind == "coverage"]
    plot.plt.close(figure)


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    out = tmp_path_factory.mktemp("six")
    return out, make_out(out, SIX, scored=True)


def test_two_sizes_share_colours_and_the_small_one_is_dashed_and_hollow(six):
    models = six[1]["models"]
    colour = plot.colours(models)
    for kind in ("teacher", "pure", "hybrid"):
        base, small = plot.look(kind, colour[kind]), plot.look(f"{kind}-small", colour[f"{kind}-small"])
        assert base["color"] == small["color"] == plot.COLOURS[kind]
        assert (base["linestyle"], small["linestyle"]) == ("-", "--") and base["marker"] == small["marker"]
        assert (base["markerfacecolor"], small["markerfacecolor"]) == (colour[kind], "white")
    figure = plot.draw_curves(models, "coverage")  # six with their bands would be a muddle: front.png has them all
    assert sum(line.get_marker() not in ("None", "") for line in figure.axes[0].lines) == 3
    plot.plt.close(figure)
    figure = plot.draw_curves({name: models[name] for name in SMALL}, "coverage")
    assert sum(line.get_linestyle() == "--" for line in figure.axes[0].lines) == 3
    plot.plt.close(figure)


def test_all_figures_of_six_models_with_scores_are_drawn_without_warnings(six):
    out, _ = six
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.main(["--out", str(out), "--dpi", "40"])
    assert {*FILES, "selection.png"} <= set(os.listdir(out))


def test_the_front_is_drawn_as_the_staircase_of_results_json_behind_all_curves(six):
    """Votes by scores have the time of scoring in them."""
    results, colour = six[1], plot.colours(six[1]["models"])
    assert results["front_with_scoring"]
    figure = plot.draw_front(results)
    for ax, kind, clock in zip(figure.axes, ("coverage", "weighted"), ("seconds", "seconds_scored")):
        curves = [line for line in ax.lines if line.get_marker() not in ("None", "")]
        for (name, m), line in zip(results["models"].items(), curves, strict=True):
            assert line.get_color() == colour[name] and (line.get_linestyle() == "--") == name.endswith("-small")
            np.testing.assert_allclose(line.get_xydata(), np.stack([m[clock], 100 * np.array(m[kind])], 1))
        steps, bands = results["front_steps"][kind], [line for line in ax.lines if line.get_drawstyle() == "steps-post"]
        assert [line.get_color() for line in bands] == [colour[name] for name, _, _ in grade.stretches(steps)]
        drawn = {(x, y) for line in bands for x, y in line.get_xydata().tolist()}
        last = max(m[clock][-1] for m in results["models"].values())
        assert drawn == {(at, 100 * value) for at, _, _, value in steps} | {(last, 100 * steps[-1][3])}
    assert [ax.get_xlabel() for ax in figure.axes] == ["seconds since generation started", "seconds of generation and scoring"]
    plot.plt.close(figure)


def test_a_front_whose_model_has_drawn_all_its_samples_goes_on_to_the_end(tmp_path):
    results = make_out(tmp_path, ["pure", "sft"], 4, 20)
    assert [(name, end) for name, _, end in grade.stretches(results["front_steps"]["coverage"])] == [("pure", None)]
    figure = plot.draw_front(results)
    band, = [line for line in figure.axes[0].lines if line.get_drawstyle() == "steps-post"]
    assert band.get_xdata()[-2:].tolist() == [4.0, 6.0]  # pure's last round and sft's
    plot.plt.close(figure)


def test_without_scores_the_fronts_accuracy_is_that_of_the_majority(three):
    figure = plot.draw_front(three[1])
    assert [ax.get_ylabel() for ax in figure.axes] == ["problems with a right answer", "problems with a right majority"]
    assert figure.axes[1].get_xlabel() == "seconds since generation started"
    plot.plt.close(figure)


@pytest.mark.parametrize("changes, title", [
    ([(1, "pure")], "Coverage: pure leads at every budget"),
    ([(1, "pure"), (90, "teacher")], "Coverage: pure leads from 1.0 to 90 s, teacher from 90 s on"),
    ([(1, "a"), (2, "b"), (8, "a"), (9, "c")], "Coverage: b leads from 2.0 to 8.0 s, c from 9.0 s on"),
])
def test_the_fronts_title_follows_from_its_steps(changes, title):
    found = plot.front_title("coverage", [[at, name, 1, 0.5] for at, name in changes])
    assert found.replace("\N{NO-BREAK SPACE}", " ") == title


@pytest.mark.parametrize("names", [SIX, SIX[:1], SIX[:4]], ids=len)
def test_selection_shows_three_rules_per_model_against_samples_and_against_all_their_time(names, six):
    models = {name: six[1]["models"][name] for name in names}
    figure = plot.draw_selection(models)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert len(shown) == 2 * len(names) and [ax.get_title() for ax in shown if ax.get_title()] == names
    panels = {(ax.get_subplotspec().rowspan.start, ax.get_subplotspec().colspan.start): ax for ax in shown}
    for (row, column), above in [(place, ax) for place, ax in panels.items() if ax.get_title()]:
        m = models[above.get_title()]
        clocks = {"majority": m["seconds"], "best_of_n": m["seconds_scored"], "weighted": m["seconds_scored"]}
        for ax, xs in ((above, dict.fromkeys(clocks, m["k"])), (panels[row + 1, column], clocks)):
            for line, (rule, x) in zip(ax.lines, xs.items(), strict=True):
                assert line.get_color() == plot.RULE_COLOURS[rule]
                np.testing.assert_allclose(line.get_xydata(), np.stack([x, 100 * np.array(m[rule])], 1))
    plot.plt.close(figure)


@pytest.mark.parametrize("gains, by", [([4.4, -1.2], "-1 to +4"), ([3.0], "+3"), ([0.2, -0.1], "+0")])
def test_the_selection_figures_title_says_what_weighting_gains(gains, by):
    assert f": {by} points" in plot.selection_title({str(i): {"gain": [0, gain]} for i, gain in enumerate(gains)})


def test_stages_start_at_0_tokens_and_a_torn_line_is_left_out(tmp_path):
    """The log counts tokens on from stage to stage; a panel shows one stage."""
    lines = [("hidden", 10, 3.0), ("hidden", 20, 2.0), ("kl", 30, 1.9), ("kl", 40, 1.0)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(dict(stage=s, tokens=t, loss=x)) + "\n" for s, t, x in lines) + '{"st')
    assert plot.read_metrics(path) == {"hidden": [(10, 3.0), (20, 2.0)], "kl": [(10, 1.9), (20, 1.0)]}
    assert plot.read_metrics(tmp_path / "missing.jsonl") == {}


@pytest.mark.parametrize("lead, low, title", [
    (7.4, 2.0, "In the same time, pure covers up to 7 points more than teacher"),
    (7.4, -1.0, "In the same time, pure is not clearly ahead of teacher"),
    (-3.0, -5.0, "In the same time, pure is not clearly ahead of teacher"),
])
def test_titles_claim_only_what_the_numbers_show(lead, low, title):
    pure = {"coverage": [0.31], "teacher": "teacher", "ahead": {"best_lead": lead, "best_lead_low": low}}
    left, right = plot.coverage_titles({"teacher": {"coverage": [0.4]}, "pure": pure})
    assert left.replace("\N{NO-BREAK SPACE}", " ") == title
    assert right.replace("\N{NO-BREAK SPACE}", " ") == "Sample for sample, pure starts 9 points behind teacher"


def test_titles_are_neutral_without_a_comparison():
    late = {"coverage": [0.4], "ahead": {"best_lead": None}}
    assert plot.coverage_titles({"late": late}) == ("Coverage in the same time", "Coverage with as many samples")


@pytest.mark.parametrize("heights", [[90, 90.1, 89.9], [99, 99, 99, 99], [0, 0.5, 50], [50, 10, 90], [95]])
def test_labels_do_not_overlap_keep_their_order_and_move_only_if_they_must(heights):
    placed = plot.spread(heights, gap=5, top=100)
    assert np.argsort(placed, kind="stable").tolist() == np.argsort(heights, kind="stable").tolist()
    assert all(b - a >= 4.9 for a, b in zip(sorted(placed), sorted(placed)[1:]))
    assert max(placed) <= 100
    if min(np.diff(sorted(heights)), default=9) >= 5:
        assert placed == heights


@pytest.mark.parametrize("content, said", [
    (None, "run python grade.py first"),
    ("{", "results.json is not readable JSON"),
    ("[]", "was not written by this grade.py"),
    ('{"models": {"pure": {"k": [1]}}}', "was not written by this grade.py"),
])
def test_a_mistake_is_named_and_changes_nothing(content, said, tmp_path):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    (tmp_path / "coverage.png").write_text("earlier")
    with pytest.raises(ValueError, match=said):
        plot.main(["--out", str(tmp_path)])
    assert (tmp_path / "coverage.png").read_text() == "earlier" and not (tmp_path / "results.md").exists()


def test_without_results_the_command_says_what_to_run_in_one_line(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "plot.py")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "run python grade.py first" in done.stderr


def test_importing_plot_is_silent_and_needs_no_torch():
    code = "import sys, plot; assert not {'torch', 'triton'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
