"""What plot.py promises: what can be drawn is drawn, for any models, in one colour per model;
lines, halos and matrices show the numbers of the files they come from."""
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
CURVES = {"accuracy.png", "coverage.png", "front.png", "results.md"}
SIX = ["teacher", "pure", "hybrid", "teacher-small", "pure-small", "hybrid-small"]
TOKENS = ["In", "\n", "$x$", " 7"]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_samples(folder, num_samples=4, num_problems=5, chance=0.5, speed=1.0, scores=False):
    """Samples that are right with a chance; a round takes `speed` seconds, scoring it as many."""
    rng = np.random.default_rng(len(folder.name))
    pairs = [(s, p) for s in range(num_samples) for p in range(num_problems)]
    write_lines(folder / "samples.jsonl", [dict(
        problem=p, sample=s, question="?", gold=str(1000 + p), num_tokens=20, finish="stop",
        completion=f"#### {1000 + p if rng.random() < chance else 7}", seconds=speed * (s + 1))
        for s, p in pairs])
    if scores:
        write_lines(folder / "scores.jsonl", [dict(
            problem=p, sample=s, score=rng.random(), seconds=speed * (s + 1)) for s, p in pairs])


def write_log(folder, stages):
    """A training log of ten lines a stage, the last one of the file cut off by a kill."""
    steps = [(stage, step) for stage in stages for step in range(1, 11)]
    write_lines(folder / "metrics.jsonl", [dict(stage=stage, tokens=1000 * (i + 1), loss=3 / step)
                                           for i, (stage, step) in enumerate(steps)])
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"stage": "kl", "tok')


def write_matrices(folder, stages):
    """Attention that halves with the distance; stage i has 10^-i of it, with the sign turned."""
    distance = np.subtract.outer(np.arange(4), np.arange(4))
    teacher = np.stack([np.where(distance < 0, 0, 0.5 ** distance)] * 3)
    matrices = {stage: (-teacher / 10 ** (i + 1)).astype(np.float16)
                for i, stage in enumerate(stages)}
    np.savez(folder / "matrices.npz", tokens=np.array(TOKENS), layer=2,
             teacher=teacher.astype(np.float16), **matrices)


def make_out(out, names, **samples):
    """out/ with samples, logs, matrices of the students, and results.json made by grade.py."""
    for name in names:
        folder = Path(out) / name
        folder.mkdir(parents=True)
        write_samples(folder, **samples)
        if name.startswith("teacher"):
            write_log(folder, ["pretrain"])
        else:
            write_log(folder, ["matrices", "a stage of my own", "kl"])
        if name in ("pure", "hybrid"):
            write_matrices(folder, ["transfer", "orientation", "end"])
    grade.main(["--out", str(out)])
    return json.loads((Path(out) / "results.json").read_text())


def draw(out, *options):
    """Run plot.py, with warnings as errors; the names of the files that it wrote."""
    before = set(os.listdir(out))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.main(["--out", str(out), "--dpi", "30", *options])
    return set(os.listdir(out)) - before


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    out = tmp_path_factory.mktemp("three")
    return out, make_out(out, SIX[:3], scores=True)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plot.plt.close("all")


# ---------------------------------------------------------------------------- which files
def test_all_files_are_written_and_nothing_else(three):
    out, results = three
    written = draw(out, "--dpi", "150")
    assert written == CURVES | {"training.png", "matrices.png", "matrices-hybrid.png"}
    for name in [name for name in written if name.endswith("png")]:
        height, width, _ = matplotlib.image.imread(out / name).shape
        assert width >= 1200 and height >= 500, f"{name}: {width} x {height} is too small a slide"
    assert (out / "results.md").read_text() == grade.report(results) + "\n"


@pytest.mark.parametrize("names, samples", [
    (["pure"], dict(num_samples=1)),
    (["teacher", "pure"], dict(chance=0.0, speed=0.0)),
    ([*SIX, "mine", "a-long-name-of-a-model"], dict(chance=1.0, scores=True)),
], ids=["one model, one k", "nothing right, no time", "all right, eight models"])
def test_any_set_of_models_is_drawn_without_warnings(names, samples, tmp_path):
    make_out(tmp_path, names, **samples)
    assert CURVES | {"training.png", "matrices.png"} <= draw(tmp_path)


def test_what_is_missing_is_left_out_with_a_note(tmp_path, capsys):
    make_out(tmp_path, ["teacher", "pure"])
    (tmp_path / "pure" / "matrices.npz").unlink()
    for name in ("teacher", "pure"):
        (tmp_path / name / "metrics.jsonl").unlink()
    assert draw(tmp_path) == CURVES
    said = capsys.readouterr().out
    assert "metrics.jsonl: without training.png" in said
    assert "matrices.npz: without matrices.png" in said


def test_without_results_there_are_still_training_and_matrices(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    write_log(tmp_path / "mine", ["kl"])
    write_matrices(tmp_path / "mine", ["transfer"])
    assert draw(tmp_path) == {"training.png", "matrices.png"}
    assert "no " + str(tmp_path / "results.json") in capsys.readouterr().out


# ---------------------------------------------------------------------------- what they show
def test_a_model_has_one_colour_and_a_small_one_is_dashed_and_hollow():
    look = plot.styles([*SIX, "mine", "other"])
    for kind in SIX[:3]:
        large, small = look[kind], look[f"{kind}-small"]
        assert large["color"] == small["color"] == plot.COLOURS[kind]
        assert large["marker"] == small["marker"]
        assert (large["linestyle"], small["linestyle"]) == ("-", "--")
        assert small["markerfacecolor"] == "white" != large["markerfacecolor"]
    assert len({style["color"] for style in look.values()}) == 5
    assert plot.styles(["hybrid", "mine"])["hybrid"] == look["hybrid"]


def percent(m, rule):
    return 100 * np.array(m[rule])


def test_coverage_shows_the_numbers_of_results_json_against_seconds_and_samples(three):
    models = three[1]["models"]
    fig = plot.draw_rules(models, plot.styles(models), "Coverage", ["coverage"])
    for ax, x in zip(fig.axes, ("seconds", "k")):
        for line, (name, m) in zip(ax.lines, models.items(), strict=True):
            assert line.get_color() == plot.COLOURS[name]
            np.testing.assert_array_equal(line.get_xdata(), m[x])
            np.testing.assert_array_equal(line.get_ydata(), percent(m, "coverage"))
        bands = [band.get_paths()[0].vertices[:, 1] for band in ax.collections]
        assert [(min(band), max(band)) for band in bands] == [
            (min(percent(m, "coverage_low")), max(percent(m, "coverage_high")))
            for m in models.values()]
    legend = [text.get_text() for text in fig.legends[0].get_texts()]
    assert legend == list(models)


def test_accuracy_has_a_line_style_per_rule_and_scored_rules_have_the_time_of_scoring(three):
    models = three[1]["models"]
    fig = plot.draw_rules(models, plot.styles(models), "Accuracy", plot.RULES)
    lines = iter(fig.axes[0].lines)
    for name, m in models.items():
        for rule, style in plot.RULES.items():
            line = next(lines)
            assert (line.get_color(), line.get_linestyle()) == (plot.COLOURS[name], style)
            clock = m["seconds"] if rule == "majority" else m["seconds_scored"]
            np.testing.assert_array_equal(line.get_xdata(), clock)
            np.testing.assert_array_equal(line.get_ydata(), percent(m, rule))
    legend = [text.get_text() for text in fig.legends[0].get_texts()]
    assert legend == [*models, "majority", "weighted", "best of n"]


def test_the_front_has_all_models_at_each_budget_and_a_halo_for_the_best(three):
    fronts, look = three[1]["front"], plot.styles(three[1]["models"])
    fig = plot.draw_front(fronts, look)
    for ax, rows in zip(fig.axes, fronts.values()):
        for line, name in zip(ax.lines, rows[-1]["models"]):
            expected = [100 * row["models"][name]["value"] for row in rows if name in row["models"]]
            assert line.get_color() == look[name]["color"]
            np.testing.assert_allclose(line.get_ydata(), expected)
        halos = [line for line in ax.lines if line.get_markersize() == 18]
        assert [(*line.get_xydata()[0], line.get_color()) for line in halos] == [
            (row["seconds"], 100 * row["value"], look[row["model"]]["color"]) for row in rows]


def test_a_stage_begins_at_0_tokens_and_a_torn_line_is_left_out(tmp_path):
    """The log counts tokens on from stage to stage; a panel shows one stage."""
    write_log(tmp_path, ["hidden", "kl"])
    log = plot.read_log(tmp_path / "metrics.jsonl")
    assert list(log) == ["hidden", "kl"] and len(log["kl"]) == 10
    assert log["hidden"][:2] == log["kl"][:2] == [(1000, 3.0), (2000, 1.5)]
    assert plot.read_log(tmp_path / "missing.jsonl") == {}


def test_training_has_a_panel_per_stage_and_a_line_per_model(three):
    logs = {name: plot.read_log(three[0] / name / "metrics.jsonl") for name in ("teacher", "pure")}
    fig = plot.draw_training(logs, plot.styles(logs))
    assert [(ax.get_title(), len(ax.lines)) for ax in fig.axes] == [
        ("pre-training", 1), ("orientation", 1), ("a stage of my own", 1), ("KL", 1)]
    np.testing.assert_allclose(fig.axes[3].lines[0].get_xydata(), [
        (i / 1000, 3 / i) for i in range(1, 11)])


# ---------------------------------------------------------------------------- matrices
def panels(fig):
    """The images of a figure as {title or None: [masked array per row]}, big panel first."""
    return [(ax, ax.images[0].get_array()) for ax in fig.axes if ax.images]


def test_matrices_show_magnitudes_tokens_and_distances(tmp_path):
    """Rows are heads; columns the teacher, transfer, orientation and the last stage. By hand: T is
    -A / 10^i, so its distance to A is (1 + 10^-i) |A|; |A|^2 = 4 + 3/4 + 2/16 + 1/64 = 4.890625."""
    write_matrices(tmp_path, ["transfer", "orientation", "end"])
    found = plot.read_matrices(tmp_path / "matrices.npz")
    (big, attention), *small = panels(plot.draw_matrices("pure", found))
    assert len(small) == 3 * 4
    assert [label.get_text() for label in big.get_xticklabels()] == ["In", "\\n", "\\$x\\$", " 7"]
    assert [ax.get_title().split("\n")[1] for ax, _ in small[:4]] == [
        "attention", "transfer", "orientation", "the end"]
    for i, (ax, image) in enumerate(small):
        power = i % 4
        expected = np.tril(attention.filled(0)) / 10 ** power
        shown = ~attention.mask & (expected > 1e-3)
        np.testing.assert_allclose(image[shown], expected[shown], rtol=1e-3)  # float16
        assert image.mask.tolist() == np.triu(np.ones((4, 4), bool), 1).tolist()
        distance = (1 + 10.0 ** -power) * 4.890625 ** 0.5
        assert ax.get_xlabel() == (f"distance {distance:.2f}" if power else "")
    scales = {(ax.images[0].norm.vmin, ax.images[0].norm.vmax) for ax, _ in [(big, 0), *small]}
    assert len(scales) == 1 and attention.max() == 1


@pytest.mark.parametrize("moments", [[], ["transfer"], ["transfer", "end"],
                                     ["transfer", "orientation", "end"]])
def test_columns_are_the_moments_that_are_there(moments, tmp_path):
    write_matrices(tmp_path, moments)
    fig = plot.draw_matrices("pure", plot.read_matrices(tmp_path / "matrices.npz"))
    titles = [ax.get_title().split()[-1] for ax, _ in panels(fig)[1:len(moments) + 2]]
    assert titles == ["attention", *moments]


def test_the_first_student_has_matrices_png(tmp_path):
    """pure, if it has any; another one otherwise."""
    for name in ("hybrid", "mine", "pure"):
        (tmp_path / name).mkdir()
        write_matrices(tmp_path / name, ["transfer"])
    assert draw(tmp_path) == {"matrices.png", "matrices-hybrid.png", "matrices-mine.png"}
    (tmp_path / "pure" / "matrices.npz").unlink()
    found, _ = plot.drawings(lambda *parts: str(tmp_path.joinpath(*parts)), ["pure", "mine"])
    assert found["matrices"].args[0] == "mine"


@pytest.mark.parametrize("content", [
    b"", b"nonsense", dict(tokens=np.array(TOKENS)),
    dict(tokens=np.array(TOKENS), layer=0, teacher=np.zeros((3, 5, 5))),
    dict(tokens=np.array(TOKENS, dtype=object), layer=0, teacher=np.zeros((3, 4, 4)))],
    ids=["empty", "no npz", "no layer", "other lengths", "pickled objects"])
def test_unreadable_matrices_are_named(content, tmp_path):
    """A pickle could run code."""
    path = tmp_path / "matrices.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(ValueError, match="matrices.npz is not a matrices.npz of distill.py"):
        plot.read_matrices(str(path))


# ---------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize("content, said", [
    ("{", "results.json is not readable JSON"),
    ("{}", "was not written by this grade.py"),
    ('{"models": {"pure": {"k": [1]}}}', "was not written by this grade.py"),
    ('{"models": [], "front": {}}', "was not written by this grade.py"),
])
def test_a_mistake_is_named_and_changes_nothing(content, said, tmp_path):
    (tmp_path / "results.json").write_text(content)
    (tmp_path / "coverage.png").write_text("earlier")
    with pytest.raises(ValueError, match=said):
        plot.main(["--out", str(tmp_path)])
    assert (tmp_path / "coverage.png").read_text() == "earlier"
    assert not (tmp_path / "results.md").exists()


def test_with_nothing_to_draw_the_command_says_what_to_run_in_one_line(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "plot.py")], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "nothing to draw under out/" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "grade.py" in done.stderr


def test_importing_plot_is_silent_and_needs_no_torch():
    code = "import sys, plot; assert not {'torch', 'triton'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
