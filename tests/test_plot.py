"""What plot.py promises: what can be drawn is drawn, for any models, in one colour per model;
lines, halos and matrices show the numbers of the files they come from."""
import json
import os
import warnings

import numpy as np
import pytest

import grade
import plot
from test_grade import run_main, write_model, write_scores

CURVES = {"accuracy.png", "coverage.png", "front.png", "results.md"}
SIX = ["teacher", "pure", "hybrid", "teacher-small", "pure-small", "hybrid-small"]
TOKENS = ["In", "\n", "$x$", " 7"]
HALVES = 0.5 ** np.subtract.outer(np.arange(4), np.arange(4))


def write_log(folder, stages):
    """A training log of ten lines a stage, and one more that was cut off by a kill."""
    steps = [(stage, step) for stage in stages for step in range(1, 11)]
    lines = [json.dumps(dict(stage=stage, tokens=1000 * (i + 1), loss=3 / step))
             for i, (stage, step) in enumerate(steps)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, lines[-1][:20]]))


def write_matrices(folder, stages):
    """Attention that halves with the distance; stage i has 10^-i of it, with the sign turned."""
    found = {"teacher": np.stack([np.tri(4) * HALVES] * 3)}
    for i, stage in enumerate(stages, 1):
        found[stage] = -found["teacher"] / 10 ** i
    found = {moment: matrices.astype(np.float16) for moment, matrices in found.items()}
    np.savez(folder / "matrices.npz", tokens=TOKENS, layer=2, **found)


def make_out(out, names, num_samples=4, chance=0.5, speed=1.0, scores=False):
    """All that the scripts before plot.py leave; a round of 5 problems takes `speed` seconds."""
    golds, seconds = "12345", [[speed * (s + 1) for s in range(num_samples)]] * 5
    for name in names:
        rng = np.random.default_rng(len(name))
        write_model(out, name, [[gold if luck < chance else "7" for luck in rng.random(num_samples)]
                                for gold in golds], golds, seconds)
        if scores:
            write_scores(out, name, rng.random((5, num_samples)), seconds)
        write_log(out / name, ["pretrain"] if name.startswith("teacher") else [
            "matrices", "a stage of my own", "kl"])
        if name in ("pure", "hybrid"):
            write_matrices(out / name, ["transfer", "orientation", "end"])
    return run_main(out)


def draw(out, *options):
    """Run plot.py, with warnings as errors; the names of the files that it wrote."""
    before = {*os.listdir(out)}
    with warnings.catch_warnings(action="error"):
        plot.main(["--out", str(out), "--dpi", "30", *options])
    return {*os.listdir(out)} - before


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    out = tmp_path_factory.mktemp("three")
    return out, make_out(out, SIX[:3], scores=True)


# ---- which files
def test_all_files_are_written_and_nothing_else(three):
    out, results = three
    written = draw(out, "--dpi", "150")
    assert written == CURVES | {"training.png", "matrices.png", "matrices-hybrid.png"}
    for path in out.glob("*.png"):  # large enough for a slide
        height, width, _ = plot.plt.imread(path).shape
        assert width >= 1200 and height >= 500, path
    assert (out / "results.md").read_text() == grade.report(results) + "\n"


@pytest.mark.parametrize("names, samples", [
    (["pure"], dict(num_samples=1)), (["teacher", "pure"], dict(chance=0.0, speed=0.0)),
    ([*SIX, "mine", "a-long-name-of-a-model"], dict(chance=1.0, scores=True))])
def test_any_set_of_models_is_drawn_without_warnings(names, samples, tmp_path):
    make_out(tmp_path, names, **samples)
    assert CURVES | {"training.png", "matrices.png"} <= draw(tmp_path)


def test_what_is_missing_is_left_out(tmp_path):
    """The first student that has matrices has matrices.png."""
    make_out(tmp_path, ["teacher", "pure"])
    (tmp_path / "pure" / "matrices.npz").unlink()
    for name in ("teacher", "pure"):
        (tmp_path / name / "metrics.jsonl").unlink()
    assert draw(tmp_path) == CURVES
    for name in ("mine", "hybrid"):
        (tmp_path / "more" / name).mkdir(parents=True)
        write_log(tmp_path / "more" / name, ["kl"])
        write_matrices(tmp_path / "more" / name, ["transfer"])
    assert draw(tmp_path / "more") == {"training.png", "matrices.png", "matrices-mine.png"}


# ---- what they show
def test_a_model_has_one_colour_and_a_small_one_is_dashed_and_hollow():
    look = plot.styles([*SIX, "mine", "other"])
    for kind in SIX[:3]:
        large, small = look[kind], look[f"{kind}-small"]
        assert (large["color"], large["marker"]) == plot.LOOKS[kind]
        assert small == large | dict(linestyle="--", linewidth=1.3, markerfacecolor="white")
    assert len({style["color"] for style in look.values()}) == 5
    assert plot.styles(["hybrid", "mine"])["hybrid"] == look["hybrid"]


@pytest.mark.parametrize("rules", [["coverage"], ["majority", "weighted", "best_of_n"]])
def test_curves_show_results_json_against_seconds_and_samples(rules, three):
    """A line per model and rule; scored rules have the time of scoring; the first has bands."""
    models = three[1]["models"]
    fig = plot.draw_rules(models, plot.styles(models), "Title", rules)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == [
        *models, *(rule.replace("_", " ") for rule in rules if rules[1:])]
    for ax, x in zip(fig.axes, ("seconds", "k")):
        lines = iter(line for line in ax.lines if len(line.get_xdata()))
        for (name, m), rule in ((item, rule) for item in models.items() for rule in rules):
            line, scored = next(lines), x == "seconds" and rule in ("weighted", "best_of_n")
            assert line.get_color() == plot.LOOKS[name][0]
            assert line.get_linestyle() == plot.RULES.get(rule, "-")
            np.testing.assert_array_equal(line.get_xdata(), m["seconds_scored" if scored else x])
            np.testing.assert_array_equal(line.get_ydata(), 100 * np.array(m[rule]))
        bands = [band.get_paths()[0].vertices[:, 1] for band in ax.collections]
        assert [(min(band), max(band)) for band in bands] == [
            (100 * min(m[f"{rules[0]}_low"]), 100 * max(m[f"{rules[0]}_high"]))
            for m in models.values()]


def test_the_front_has_all_models_at_each_budget_and_a_halo_for_the_best(three):
    fronts, look = three[1]["front"], plot.styles(three[1]["models"])
    for ax, rows in zip(plot.draw_front(fronts, look).axes, fronts.values()):
        for name, line, halo in zip(rows[-1]["models"], ax.lines[::2], ax.lines[1::2]):
            there = [row for row in rows if name in row["models"]]
            assert line.get_color() == halo.get_color() == look[name]["color"]
            np.testing.assert_allclose(line.get_xydata(), [
                (row["seconds"], 100 * row["models"][name]["value"]) for row in there])
            assert halo.get_markevery() == [row["model"] == name for row in there]


def test_training_has_a_panel_per_stage_and_a_line_per_model(three):
    """The log counts tokens on from stage to stage, a panel from 0. A torn line is left out."""
    logs = {name: plot.read_log(three[0] / name / "metrics.jsonl") for name in ("teacher", "pure")}
    fig = plot.draw_training(logs, plot.styles(logs))
    assert [(ax.get_title(), len(ax.lines)) for ax in fig.axes] == [
        ("pretrain", 1), ("matrices", 1), ("a stage of my own", 1), ("kl", 1)]
    for ax in fig.axes:
        np.testing.assert_allclose(ax.lines[0].get_xydata(), [
            (i / 1000, 3 / i) for i in range(1, 11)])


@pytest.mark.parametrize("moments", [[], ["transfer", "end"], ["transfer", "orientation", "end"]])
def test_matrices_show_magnitudes_tokens_and_distances(moments, tmp_path):
    """Rows are heads, columns the teacher and the moments that are there. By hand: T is -A / 10^i,
    so its distance to A is (1 + 10^-i) |A|; |A|^2 = 4 + 3/4 + 2/16 + 1/64 = 4.890625."""
    write_matrices(tmp_path, moments)
    fig = plot.draw_matrices("pure", plot.read_matrices(tmp_path / "matrices.npz"))
    big, *small = [ax for ax in fig.axes if ax.images]
    assert [label.get_text() for label in big.get_xticklabels()] == ["In", "\\n", "\\$x\\$", " 7"]
    columns = ["attention", *moments]
    assert [ax.get_title().split()[-1] for ax in small[:len(columns)]] == columns
    assert len(small) == 3 * len(columns)
    for i, ax in enumerate(small):
        power, image = i % len(columns), ax.images[0].get_array()
        expected = np.maximum(HALVES / 10 ** power, 1e-3)
        np.testing.assert_allclose(image.compressed(), expected[np.tri(4) > 0], rtol=1e-3)
        assert image.mask.tolist() == (np.tri(4) == 0).tolist()
        distance = (1 + 10.0 ** -power) * 4.890625 ** 0.5
        assert ax.get_xlabel() == (f"distance {distance:.2f}" if power else "")
        assert (ax.images[0].norm.vmin, ax.images[0].norm.vmax) == (1e-3, 1)


# ---- mistakes
@pytest.mark.parametrize("content", [
    b"", b"no npz", dict(tokens=TOKENS), dict(tokens=TOKENS, layer=0, teacher=np.zeros((3, 5, 5))),
    dict(tokens=np.array(TOKENS, dtype=object), layer=0, teacher=np.zeros((3, 4, 4)))])
def test_unreadable_matrices_and_pickles_which_could_run_code_are_named(content, tmp_path):
    path = tmp_path / "matrices.npz"
    path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)
    with pytest.raises(ValueError, match="matrices.npz was not written by this distill.py"):
        plot.read_matrices(path)


@pytest.mark.parametrize("old, new", [
    ('{', "["), ('"models": {', '"models": [], "front": {}, "": {'), ('"k": [', '"": ['),
    ('"coverage": [', '"coverage": [1e999, '), ('"k": [', '"k": ["a", '), ('"value": ', '"": ')])
def test_results_that_are_not_of_grade_py_are_named_and_nothing_is_drawn(old, new, tmp_path):
    make_out(tmp_path, ["teacher", "pure"])
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace(old, new, 1))
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="results.json (was not written by this|is not readable)"):
        draw(tmp_path)
    assert sorted(tmp_path.rglob("*")) == files


def test_a_folder_in_the_place_of_a_figure_is_named(tmp_path):
    make_out(tmp_path, ["pure"])
    (tmp_path / "front.png").mkdir()
    with pytest.raises(OSError, match="front.png'$"):
        draw(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
