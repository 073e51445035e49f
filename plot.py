"""Draw the results: who solves how many problems when, and how attention turns into a Mamba.

    python plot.py        after python grade.py

Reads   out/results.json (grade.py), out/<name>/metrics.jsonl and matrices.npz (distill.py)
Writes  out/coverage.png, accuracy.png, front.png, results.md; training.png; matrices.png
        (those whose sources are there)
"""
import itertools
import json
from pathlib import Path

from common import (Parser, naming, number, optional_json, read_jsonl, replace_file, require, run,
                    write_bytes)

import matplotlib
matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator

from grade import SCORED, in_order, report

# colours of Okabe and Ito, for any colour blindness; markers
LOOKS = {"teacher": ("#444444", "o"), "pure": ("#D55E00", "s"), "hybrid": ("#0072B2", "^")}
MORE_COLOURS = "#009E73", "#CC79A7", "#E69F00", "#56B4E9"  # of models with other names
RULES = {"majority": "-", "weighted": "--", "best_of_n": ":"}  # of accuracy
MOMENTS = {"teacher": "teacher's\nattention", "transfer": "T after\ntransfer",
           "orientation": "T after\norientation", "end": "T at\nthe end"}  # in matrices.npz
STYLE = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "axes.axisbelow": True, "axes.edgecolor": "#888888", "grid.color": "#E4E4E4",
         "legend.frameon": False, "figure.constrained_layout.use": True}


def styles(names):
    """{name: how its lines are drawn}, the same in all figures; small models thin and dashed."""
    found, more = {}, itertools.cycle(MORE_COLOURS)
    for name in names:
        colour, marker = LOOKS.get(name.split("-")[0]) or (next(more), "D")
        found[name] = dict(color=colour, marker=marker, markersize=5, linewidth=2.2)
        if name.endswith("-small"):
            found[name] |= dict(linestyle="--", linewidth=1.3, markerfacecolor="white")
    return found


def log_axis(axis, label):
    """Make an axis logarithmic, with ticks at 1, 2, 5, 10, ... or, if those are many, 1, 10, ..."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.axes.minorticks_off()
    axis.set_label_text(label)


# ---- curves
def draw_rules(models, look, title, rules):
    """What models reach against seconds (left) and samples (right), with bands of 95% intervals.
    Of several rules each is a line style; those with scores take the time of scoring, too."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    rules = [rule for rule in rules if all(rule in m for m in models.values())]
    dashes = {rule: dict(linestyle=RULES[rule]) for rule in rules if rules[1:]}
    for name, m in models.items():
        left.plot([], [], label=name, **look[name])
        for rule in rules:
            middle, low, high = (100 * np.array(m[rule + end]) for end in ("", "_low", "_high"))
            seconds = m["seconds_scored" if rule in SCORED else "seconds"]
            for ax, x in ((left, np.maximum(seconds, 1e-3)), (right, m["k"])):  # 0 has no logarithm
                ax.plot(x, middle, **look[name] | dashes.get(rule, {}))
                if rule == rules[0] and not name.endswith("-small"):
                    ax.fill_between(x, low, high, color=look[name]["color"], alpha=0.1, linewidth=0)
    for rule, style in dashes.items():
        left.plot([], [], label=rule.replace("_", " "), color="black", **style)
    log_axis(left.xaxis, "seconds of sampling" + (" and scoring" if dashes else ""))
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:g}")
    right.set(title=f"{title} against samples", xlabel="samples of each problem")
    left.set(title=f"{title} against time", ylabel="percent of problems")
    fig.legend(loc="outside lower center", ncols=5)
    return fig


# ---- attention as a Mamba
def draw_matrix(ax, matrix):
    """Draw the magnitudes of a matrix (L, L) without the future, all on one scale: the image."""
    ax.grid(False)
    ax.set(xticks=[], yticks=[])
    magnitude = np.where(np.tri(len(matrix)), np.maximum(np.abs(matrix), 1e-3), np.nan)
    return ax.imshow(magnitude, norm="log", vmin=1e-3, vmax=1, interpolation="nearest")


def draw_matrices(name, found):
    """A student's mixing matrices beside its teacher's attention, for three heads of one layer.

    Attention is y = A v, each row of A (L, L) a softmax; a Mamba is y = T v with T[t, s] = C_t .
    (decay from s to t) B_s (Dao and Gu 2024, section 3). Left A of the first head; then a row per
    head, a column per moment, and the distance |T - A| (Frobenius).
    """
    moments = [moment for moment in MOMENTS if moment in found]
    fig = plt.figure(figsize=(13, 5.8))
    grid = fig.add_gridspec(len(found["teacher"]), 3 + len(moments))
    big = fig.add_subplot(grid[:, :3])
    draw_matrix(big, found["teacher"][0])
    tokens = [str(token).replace("\n", "\\n").replace("$", "\\$") for token in found["tokens"]]
    step = -(-len(tokens) // 64)  # 64 are readable
    for axis, rotation in ((big.xaxis, 90), (big.yaxis, 0)):
        axis.set_ticks(range(0, len(tokens), step), tokens[::step], rotation=rotation,
                       fontsize=min(7, 275 / len(tokens[::step])))
    big.set_title("attention of head 1: which tokens read which")
    for row, attention in enumerate(found["teacher"]):
        for column, moment in enumerate(moments):
            ax = fig.add_subplot(grid[row, 3 + column])
            image = draw_matrix(ax, found[moment][row])
            distance = np.linalg.norm(found[moment][row] - attention)
            ax.set(xlabel=f"distance {distance:.2f}" if column else "",
                   ylabel="" if column else f"head {row + 1}", title="" if row else MOMENTS[moment])
    fig.suptitle(f"{name}, layer {found['layer']}: attention turns into a Mamba")
    fig.colorbar(image, ax=fig.axes, extend="both", aspect=40, pad=0.01, label="magnitude")
    return fig


# ---- first reading ends here: the front, training curves, files, options ----
def draw_front(fronts, look):
    """Coverage (left) and accuracy (right) at each time budget; the best model has a halo."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.6))
    halo = dict(marker="o", markersize=18, markeredgewidth=0, linestyle="", alpha=0.3)
    for ax, (kind, rows) in zip(axes, fronts.items()):
        for name in rows[-1]["models"]:
            there = [row for row in rows if name in row["models"]]
            seconds = np.maximum([row["seconds"] for row in there], 1e-3)
            percent = [100 * row["models"][name]["value"] for row in there]
            best = [row["model"] == name for row in there]
            ax.plot(seconds, percent, label=name, **look[name])
            ax.plot(seconds, percent, color=look[name]["color"], markevery=best, **halo)
        log_axis(ax.xaxis, "seconds of sampling")
        ax.set(title=f"{kind.capitalize()} at each time budget", ylabel="percent of problems")
    ax.plot([], [], label="the best", color="grey", **halo)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return fig


def draw_training(logs, look):
    """Loss against tokens: a panel per stage in the order of training, a line per model."""
    stages = list(dict.fromkeys(stage for log in logs.values() for stage in log))
    fig = plt.figure(figsize=(max(2.75 * len(stages), 5), 3.4))
    for stage, ax in zip(stages, fig.subplots(1, len(stages), squeeze=False).flat):
        for name, log in logs.items():
            if stage in log:
                tokens, losses = np.transpose(log[stage])
                style = look[name] | dict(marker="." if len(losses) == 1 else "")
                ax.plot(tokens / 1e6, np.maximum(losses, 1e-9), label=name, **style)
        log_axis(ax.yaxis, "loss" if stage == stages[0] else "")
        ax.set(title=stage, xlabel="million tokens", xlim=(0, None))
        ax.legend()
    return fig


FOREIGN = "was not written by this {0} (run python {0} again)"


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
    if not path.exists():
        return {}
    with naming(path, FOREIGN.format("distill.py")), np.load(path) as file:  # it takes no pickles
        length = len(file["tokens"])
        return dict(tokens=file["tokens"], layer=int(file["layer"]), **{
            moment: file[moment].astype(np.float64).reshape(-1, length, length)
            for moment in MOMENTS if moment in file or moment == "teacher"})


def figures(out):
    """Yield (file name, figure or text) of all that there is to draw under `out`."""
    path, names = out / "results.json", in_order(folder.name for folder in out.glob("*/"))
    results = optional_json(path)
    logs = {name: log for name in names if (log := read_log(out / name / "metrics.jsonl"))}
    matrices = {name: m for name in names if (m := read_matrices(out / name / "matrices.npz"))}
    require(results or logs or matrices, f"nothing to draw under {out}/: run python distill.py, "
            "sample.py and grade.py first, or name another --out")
    with naming(path, FOREIGN.format("grade.py")):
        json.dumps(results, allow_nan=False)  # 1e999 was read as infinity
        models = results["models"] if results else {}
        look = styles(in_order({*logs, *matrices, *models}))
        drawn = results and {"coverage.png": draw_rules(models, look, "Coverage", ["coverage"]),
                             "accuracy.png": draw_rules(models, look, "Accuracy", RULES),
                             "front.png": draw_front(results["front"], look),
                             "results.md": report(results) + "\n"}
    yield from drawn.items()
    if logs:
        yield "training.png", draw_training(logs, look)
    for i, name in enumerate(matrices):
        yield f"matrices{f'-{name}' if i else ''}.png", draw_matrices(name, matrices[name])


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default="out", help="folder of models and figures")
    parser.add_argument("--dpi", type=number(20, 600), default=150, help="pixels per inch")
    args = parser.parse_args(argv)
    with plt.rc_context(STYLE):
        for name, drawn in figures(args.out):
            if isinstance(drawn, str):
                write_bytes(args.out / name, drawn.encode())
            else:
                replace_file(args.out / name, lambda temporary: drawn.savefig(
                    temporary, format="png", dpi=args.dpi))
                plt.close(drawn)
            print(f"wrote {args.out / name}")


if __name__ == "__main__":
    run(main, resumes=False)
