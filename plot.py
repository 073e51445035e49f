"""Draw the results: who solves how many problems when, and how attention turns into a Mamba.

    python plot.py        after python grade.py

Reads   out/results.json (grade.py), out/<name>/metrics.jsonl and matrices.npz (distill.py)
Writes  out/coverage.png, accuracy.png, front.png, results.md; training.png; matrices.png
What is not there to be read is left out, with a note. A model has one colour in all figures, the
small size of it thin dashes and hollow markers. Bands are 95% intervals.

Contents: style, curves, attention as a Mamba; the front, training, files and options.
"""
import functools
import os
import zipfile

import matplotlib
matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from common import Parser, number, read_json, read_jsonl, replace_file, run, write_bytes
from grade import SCORED, in_order, report

# dark grey and colours of Okabe and Ito, which remain apart with any colour blindness
COLOURS = {"teacher": "#444444", "pure": "#D55E00", "hybrid": "#0072B2"}
MORE_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # of models with other names
MARKERS = {"teacher": "o", "pure": "s", "hybrid": "^"}
RULES = {"majority": "-", "weighted": "--", "best_of_n": ":"}  # in accuracy.png
STAGES = {"pretrain": "pre-training", "matrices": "orientation", "hidden": "hidden states",
          "kl": "KL", "sft": "fine-tuning"}
MOMENTS = {"transfer": "T after\ntransfer", "orientation": "T after\norientation",
           "end": "T at\nthe end"}  # in matrices.npz
STYLE = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "axes.axisbelow": True, "axes.edgecolor": "#888888", "grid.color": "#E4E4E4",
         "legend.frameon": False, "figure.constrained_layout.use": True}


def styles(names):
    """{name: how its lines are drawn}: colour and marker by what it is, dashes by its size."""
    others, found = [name for name in names if name.split("-")[0] not in COLOURS], {}
    for name in names:
        kind, small = name.split("-")[0], name.endswith("-small")
        colour = COLOURS.get(kind) or MORE_COLOURS[others.index(name) % len(MORE_COLOURS)]
        found[name] = dict(color=colour, marker=MARKERS.get(kind, "D"), markersize=5,
                           markerfacecolor="white" if small else colour,
                           linestyle="--" if small else "-", linewidth=1.3 if small else 2.2)
    return found


def log_axis(axis, label):
    """A logarithmic axis with ticks at 1, 2, 5, 10, ..., or powers of ten if those are many."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
    axis.set_label_text(label)


# ---------------------------------------------------------------------------- curves
def draw_rules(models, look, title, rules):
    """Two panels: what models reach against seconds (left) and against samples (right).

    Of several rules each is a line style; those with scores take the time of scoring, too.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    rules = [rule for rule in rules if any(rule in m for m in models.values())]
    for name, rule in ((name, rule) for name in models for rule in rules if rule in models[name]):
        m, style = models[name], look[name] | (dict(linestyle=RULES[rule]) if rules[1:] else {})
        middle, low, high = (100 * np.array(m[rule + end]) for end in ("", "_low", "_high"))
        seconds = m["seconds_scored" if rule in SCORED else "seconds"]
        for ax, x in ((left, np.maximum(seconds, 1e-3)), (right, m["k"])):  # 0 has no logarithm
            ax.plot(x, middle, **style)
            if rule == rules[0] and look[name]["linestyle"] == "-":  # more would be a muddle
                ax.fill_between(x, low, high, color=style["color"], alpha=0.1, linewidth=0)
    log_axis(left.xaxis, "seconds of sampling" + (" and scoring" if rules[1:] else ""))
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:g}")
    right.set(title=f"{title} against samples", xlabel="samples of each problem")
    left.set(title=f"{title} against time", ylabel="percent of the problems")
    lines = [Line2D([], [], label=name, **look[name]) for name in models]
    lines += [Line2D([], [], label=rule.replace("_", " "), ls=RULES[rule], color="black")
              for rule in rules if rules[1:]]
    fig.legend(handles=lines, loc="outside lower center", ncols=5)
    return fig


# ---------------------------------------------------------------------------- attention as a Mamba
def draw_matrix(ax, matrix):
    """The magnitudes of a matrix (L, L), on one scale for all panels; the future is left empty."""
    ax.grid(False)
    ax.set(xticks=[], yticks=[])
    future = np.triu(np.ones(matrix.shape), 1)
    magnitude = np.ma.array(np.maximum(np.abs(matrix), 1e-3), mask=future)
    return ax.imshow(magnitude, norm=LogNorm(1e-3, 1), interpolation="nearest")


def draw_matrices(name, found):
    """A student's mixing matrices beside its teacher's attention, for three heads of one layer.

    Attention is y = A v with A (L, L) lower-triangular, each row a softmax. A Mamba is y = T v with
    T[t, s] = C_t . (decay from s to t) B_s (Dao and Gu 2024, section 3). Left A of the first head,
    with the text; then a row per head, a column per moment, and the distance |T - A| (Frobenius).
    """
    moments = [moment for moment in MOMENTS if moment in found]
    fig = plt.figure(figsize=(13, 5.8))
    grid = fig.add_gridspec(len(found["teacher"]), 4 + len(moments))
    big = fig.add_subplot(grid[:, :3])
    draw_matrix(big, found["teacher"][0])
    places = range(0, len(found["tokens"]), -(-len(found["tokens"]) // 64))  # 64 are readable
    tokens = [str(found["tokens"][i]).replace("\n", "\\n").replace("$", "\\$") for i in places]
    size = min(7, 275 / len(places))  # points
    big.set_xticks(places, tokens, rotation=90, fontsize=size)
    big.set_yticks(places, tokens, fontsize=size)
    big.set_title("attention of head 1: which tokens read which")
    for row, attention in enumerate(found["teacher"]):
        for column, moment in enumerate(["teacher", *moments]):
            ax = fig.add_subplot(grid[row, 3 + column])
            image = draw_matrix(ax, found[moment][row])
            if moment == "teacher":
                ax.set_ylabel(f"head {row + 1}")
            else:
                ax.set_xlabel(f"distance {np.linalg.norm(found[moment][row] - attention):.2f}")
            if row == 0:
                ax.set_title(MOMENTS.get(moment, "teacher's\nattention"))
    fig.suptitle(f"{name}, layer {found['layer']}: attention turns into a Mamba")
    fig.colorbar(image, ax=fig.axes, extend="both", aspect=40, pad=0.01, label="magnitude")
    return fig


# ---- first reading ends here: the front, training curves, files, options ----
def draw_front(fronts, look):
    """Two panels, coverage and accuracy: all models at each time budget, a halo for the best."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.6))
    for ax, (kind, rows) in zip(axes, fronts.items()):
        budgets = np.maximum([row["seconds"] for row in rows], 1e-3)
        for name in rows[-1]["models"]:
            there = [(budget, 100 * row["models"][name]["value"])
                     for budget, row in zip(budgets, rows) if name in row["models"]]
            ax.plot(*zip(*there), label=name, **look[name])
        for budget, row in zip(budgets, rows):
            ax.plot(budget, 100 * row["value"], "o", color=look[row["model"]]["color"],
                    markersize=18, alpha=0.3, markeredgewidth=0)
        log_axis(ax.xaxis, "seconds of sampling")
        ax.set(title=f"{kind.capitalize()} at each time budget", ylabel="percent of the problems")
    lines = [*axes[0].lines[:len(rows[-1]["models"])], Line2D(
        [], [], marker="o", linestyle="", color="grey", markersize=14, alpha=0.3, label="the best")]
    fig.legend(handles=lines, loc="outside lower center", ncols=5)
    return fig


def draw_training(logs, look):
    """Loss against tokens: a panel per stage in the order of training, a line per model."""
    stages = list(dict.fromkeys(stage for log in logs.values() for stage in log))
    width = max(2.75 * len(stages), 5)
    fig, axes = plt.subplots(1, len(stages), figsize=(width, 3.4), squeeze=False)
    for stage, ax in zip(stages, axes.flat):
        for name in [name for name in logs if stage in logs[name]]:
            tokens, losses = zip(*logs[name][stage])
            ax.plot(np.array(tokens) / 1e6, np.maximum(losses, 1e-9), label=name,
                    **look[name] | dict(marker="." if len(losses) == 1 else ""))
        log_axis(ax.yaxis, "loss" if stage == stages[0] else "")
        ax.set(title=STAGES.get(stage, stage), xlabel="million tokens", xlim=(0, None))
        ax.legend()
    return fig


def read_results(path):
    """results.json; None, with a note, if there is none. ValueError if it is not of grade.py."""
    if not os.path.exists(path):
        print(f"no {path}: without coverage, accuracy, front and results.md (python grade.py)")
        return None
    results = read_json(path)
    try:
        report(results)  # uses most of what we draw
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} was not written by this grade.py ({error!r}): "
                         f"run python grade.py again") from None
    return results


def read_log(path):
    """A training log as {stage: [(tokens since the stage began, loss), ...]}; {} without one."""
    stages, start, tokens = {}, 0, 0
    for record in read_jsonl(path, dict(stage=str, tokens=int, loss=float), torn=True):
        if record["stage"] not in stages:
            start = tokens  # the log counts on from stage to stage
        tokens = record["tokens"]
        stages.setdefault(record["stage"], []).append((tokens - start, record["loss"]))
    return stages


def read_matrices(path):
    """What draw_matrices needs: L tokens, a layer, {moment: (heads, L, L)}; {} without a file."""
    if not os.path.exists(path):
        return {}
    try:
        with np.load(path) as file:  # without pickles: a file is data, not code
            keys = [key for key in ("tokens", "layer", "teacher", *MOMENTS) if key in file]
            found = {key: file[key] for key in keys}
        found["layer"], (length,) = int(found["layer"]), found["tokens"].shape
        for key in found.keys() - {"tokens", "layer"}:
            found[key] = found[key].astype(np.float64).reshape(3, length, length)
        return found if "teacher" in found else {}
    except (ValueError, LookupError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a matrices.npz of distill.py: {error!r}") from None


def drawings(path, names):
    """{file name: a function that draws it} of all that there is to draw; results or None."""
    results, draw = read_results(path("results.json")), {}
    models = results["models"] if results else {}
    look = styles(in_order({*names, *models}))
    if results:
        draw["coverage"] = functools.partial(draw_rules, models, look, "Coverage", ["coverage"])
        draw["accuracy"] = functools.partial(draw_rules, models, look, "Accuracy", RULES)
        draw["front"] = functools.partial(draw_front, results["front"], look)
    logs = {name: read_log(path(name, "metrics.jsonl")) for name in names}
    logs = {name: log for name, log in logs.items() if log}
    if logs:
        draw["training"] = functools.partial(draw_training, logs, look)
    found = {name: read_matrices(path(name, "matrices.npz")) for name in names}
    for name in [name for name in names if found[name]]:
        file = f"matrices-{name}" if "matrices" in draw else "matrices"
        draw[file] = functools.partial(draw_matrices, name, found[name])
    for file, source in (("training", "metrics.jsonl"), ("matrices", "matrices.npz")):
        if file not in draw:
            print(f"no {path('*', source)}: without {file}.png (python distill.py)")
    return draw, results


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--out", default="out", help="folder of the models and of the figures")
    parser.add_argument("--dpi", type=number(20, 600), default=150, help="pixels per inch")
    args = parser.parse_args(argv)
    path = functools.partial(os.path.join, args.out)
    names = os.listdir(args.out) if os.path.isdir(args.out) else []
    draw, results = drawings(path, in_order(n for n in names if os.path.isdir(path(n))))
    if not draw:
        raise ValueError(f"nothing to draw under {args.out}/: run python distill.py, sample.py "
                         f"and grade.py first, or name another --out")
    with plt.rc_context(STYLE):
        for file, function in draw.items():
            fig = function()
            replace_file(path(f"{file}.png"),
                         lambda to: fig.savefig(to, format="png", dpi=args.dpi))
            plt.close(fig)
            print(f"wrote {path(file)}.png")
    if results:
        write_bytes(path("results.md"), (report(results) + "\n").encode())
        print(f"wrote {path('results.md')}")


if __name__ == "__main__":
    run(main, resumes=False)
