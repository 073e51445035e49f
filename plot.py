"""Draw the results: coverage and accuracy against time and against samples, who is in front when, the training curves.

    python plot.py                after python grade.py

Reads   out/results.json (grade.py), out/<name>/metrics.jsonl (distill.py), where there is one,
        out/bench.jsonl (sample.py --bench), if there is one: then out/bench.png too, or alone if there are no results
Writes  out/coverage.png, out/accuracy.png (the majority vote), out/front.png (two models or more), out/selection.png
        (only with scores of a reward model), out/training.png (only if there is a log), out/results.md

A model has the same colour in every figure; the small size of it is dashed, with hollow markers. What a title says is
computed from the results. Points are measured, the lines between them guide the eye; bands are 95% intervals.

Contents: reading, style, coverage and accuracy, the front, selection, training, decoding speed, the script.
"""
import itertools
import math
import os
import textwrap

import matplotlib
matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from data import Parser, read_json, run
from grade import RULES, read_records, report, stretches

INK = "#333333"
# Okabe and Ito's colours, which remain apart with any colour blindness; the first three have theirs for good
COLOURS = {"teacher": "#0072B2", "pure": "#D55E00", "hybrid": "#009E73"}
MORE_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = {"#0072B2": "o", "#D55E00": "s", "#009E73": "^"}  # others: a diamond
RULE_COLOURS = {"majority": INK, "best_of_n": "#CC79A7", "weighted": "#E69F00"}
RIGHT = {"coverage": "problems with a right answer", "majority": "problems with a right majority",
         "weighted": "problems with a right weighted vote"}  # labels of the vertical axes
METRIC = dict(stage=str, tokens=int, loss=(int, float))  # what we read of a line of metrics.jsonl
STAGES = {"pretrain": "pre-training", "matrices": "matrix orientation", "hidden": "hidden states",
          "kl": "distillation (KL)", "sft": "fine-tuning"}  # titles of panels; other stages go by their names
STYLE = {"font.size": 12, "axes.titlesize": 13.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
         "axes.titlecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
         "axes.edgecolor": "#888888", "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True,
         "grid.color": "#E2E2E2", "grid.linewidth": 0.7, "ytick.major.size": 0, "lines.linewidth": 2.2,
         "figure.constrained_layout.use": True, "figure.constrained_layout.w_pad": 0.1,
         "figure.constrained_layout.h_pad": 0.1}


# ------------------------------------------------------------------------------------------------ reading
def read_results(out):
    path = os.path.join(out, "results.json")
    if not os.path.exists(path):
        raise ValueError(f"no {path}: run python grade.py first, or name the folder with --out")
    results = read_json(path)
    try:
        report(results)  # uses all that we draw
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} was not written by this grade.py ({error!r}): run python grade.py again") from None
    return results


def read_metrics(path):
    """A training log as {stage: [(tokens since the stage began, loss), ...]}; empty without a log."""
    stages, start, tokens = {}, 0, 0
    for record in read_records(path, METRIC) if os.path.exists(path) else []:
        if record["stage"] not in stages:
            start = tokens  # the log counts on from stage to stage
        tokens = record["tokens"]
        stages.setdefault(record["stage"], []).append((tokens - start, record["loss"]))
    return stages


# ------------------------------------------------------------------------------------------------ style
def colours(names):
    """{name: colour}, always the same for the default names, in either size."""
    more = itertools.cycle(MORE_COLOURS)
    return {name: COLOURS.get(name.removesuffix("-small")) or next(more) for name in names}


def look(name, colour):
    """How a model's points and the lines between them are drawn."""
    small = name.endswith("-small")
    return dict(color=colour, marker=MARKERS.get(colour, "D"), linestyle="--" if small else "-", markersize=6 if small else 6.5,
                markerfacecolor="white" if small else colour, markeredgecolor=colour if small else "white",
                markeredgewidth=1.4 if small else 0.8, clip_on=False, zorder=3)


def log_axis(axis, low, high):
    """Ticks at 1, 2, 5, 10, ... as plain numbers; at powers of ten if there would be many."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def percent_axis(ax):
    """Whole percents, so that no tick is rounded."""
    ax.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
    ax.yaxis.set_major_formatter("{x:.0f}%")


def spread(heights, gap, top):
    """Heights moved as little as possible until they are `gap` apart and below `top`, for labels that would overlap."""
    order, placed = sorted(range(len(heights)), key=heights.__getitem__), list(heights)
    for _ in range(100):
        for below, above in itertools.pairwise(order):
            push = max(0, gap - (placed[above] - placed[below])) / 2
            placed[below] -= push
            placed[above] += push
        placed[order[-1]] = min(placed[order[-1]], top)
    return placed


def label_ends(ax, ends, gap=0.055):
    """Each line's name at the right edge, at the height where the line ends: {name: (height, colour)}, `gap` of the panel's
    height apart. A thin line leads to a name that had to move."""
    low, high = ax.get_ylim()
    heights = spread([height for height, _ in ends.values()], gap * (high - low), high)
    for (name, (height, colour)), at in zip(ends.items(), heights):
        line = dict(arrowstyle="-", color=colour, linewidth=0.8, shrinkA=2, shrinkB=0, relpos=(0, 0.5))
        ax.annotate(name, (1.01, height), (1.04, at), xycoords=("axes fraction", "data"), color=colour, va="center",
                    fontweight="bold", annotation_clip=False, arrowprops=line if abs(at - height) > 0.01 * (high - low) else None)


# ------------------------------------------------------------------------------------------------ coverage and accuracy
def points(number):
    return f"{number:.0f}\N{NO-BREAK SPACE}point{'' if round(number) == 1 else 's'}"


def coverage_titles(models):
    """What the two panels show, in words that follow from the numbers."""
    leads = {name: m["ahead"] for name, m in models.items() if m.get("ahead", {}).get("best_lead") is not None}
    if not leads:
        return "Coverage in the same time", "Coverage with as many samples"
    name = max(leads, key=lambda name: leads[name]["best_lead"])
    teacher = models[name]["teacher"]
    if leads[name]["best_lead_low"] > 0 and round(leads[name]["best_lead"]) >= 1:
        left = f"In the same time, {name} covers up to {points(leads[name]['best_lead'])} more than {teacher}"
    else:
        left = f"In the same time, {name} is not clearly ahead of {teacher}"
    behind = 100 * (models[teacher]["coverage"][0] - models[name]["coverage"][0])
    how = "level with" if round(behind) == 0 else points(abs(behind)) + (" behind" if behind > 0 else " ahead of")
    return left, f"Sample for sample, {name} starts {how} {teacher}"


def majority_titles(models):
    best = max(models, key=lambda name: models[name]["majority"][-1])
    return "Majority vote in the same time", f"With all samples, the majority of {best} is right most often: " \
                                             f"{models[best]['majority'][-1]:.0%}"


def draw_lines(ax, models, colour, x, kind):
    """A line with its 95% band per model: `kind` (coverage or majority) in percent against x (seconds or k)."""
    for name, m in models.items():
        mean, low, high = ([100 * value for value in m[kind + suffix]] for suffix in ("", "_low", "_high"))
        ax.fill_between(m[x], low, high, color=colour[name], alpha=0.11, linewidth=0)
        ax.plot(m[x], mean, **look(name, colour[name]))
    percent_axis(ax)


def mark_ahead(ax, models, colour):
    """A bar along the bottom for the time budgets at which each student covers more than its teacher."""
    students = [name for name in models if models[name].get("ahead", {}).get("budgets")]
    for row, name in enumerate(students):
        for start, end in models[name]["ahead"]["budgets"]:
            ax.plot([start, end], [0.03 + 0.04 * row] * 2, transform=ax.get_xaxis_transform(), color=colour[name],
                    linewidth=5, alpha=0.8, zorder=1)
    if students:
        teachers = dict.fromkeys(models[name]["teacher"] for name in students)
        ax.text(0.99, 0.03 + 0.04 * len(students), f"bars: ahead of {' or '.join(teachers)}", transform=ax.transAxes, ha="right",
                fontsize=11.5, color=INK)


def time_axis(ax, start, end):
    ax.set_xscale("log")
    ax.set_xlim(start / 1.1, max(end, 3 * start))
    log_axis(ax.xaxis, *ax.get_xlim())
    ax.set_xlabel("seconds since generation started")


def samples_axis(ax):
    ax.set_xscale("log", base=2)
    ax.set_xlim(0.9, None)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("samples per problem, k")


def draw_curves(models, kind):
    """Two panels: `kind` against seconds (left) and against samples per problem (right), of the full size if there is one."""
    colour = colours(models)
    models = {name: m for name, m in models.items() if not name.endswith("-small")} or models
    titles = coverage_titles(models) if kind == "coverage" else majority_titles(models)
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.9), sharey=True)
    draw_lines(left, models, colour, "seconds", kind)
    draw_lines(right, models, colour, "k", kind)
    start, end = min(m["seconds"][0] for m in models.values()), max(m["seconds"][-1] for m in models.values())
    for name, m in models.items():  # after its last sample a model stays where it is
        left.plot([m["seconds"][-1], end], [100 * m[kind][-1]] * 2, color=colour[name], linestyle=":", linewidth=1.6)
    time_axis(left, start, end)
    samples_axis(right)
    bottom = 10 * math.floor(10 * min(min(m[kind + "_low"]) for m in models.values()))
    top = 10 * math.ceil(10 * max(max(m[kind + "_high"]) for m in models.values()) - 1e-6)
    left.set_ylim(max(0, bottom - 10), max(top, 10))  # leaves room for the bars
    left.set_ylabel(RIGHT[kind])
    for ax, title in zip((left, right), titles):
        ax.set_title(textwrap.fill(title, 40), pad=10)
        label_ends(ax, {name: (100 * m[kind][-1], colour[name]) for name, m in models.items()})
    if kind == "coverage":
        mark_ahead(left, models, colour)
    return fig


# ------------------------------------------------------------------------------------------------ the front
def moment(seconds):
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}"


def front_title(kind, steps):
    """Who is in front longest, by the ratio of times, before the one who is in the end."""
    *earlier, (last, since, _) = stretches(steps)
    title = {"coverage": "Coverage", "majority": "Majority vote", "weighted": "Weighted vote"}[kind]
    if not earlier:
        return f"{title}: {last} leads at every budget"
    name, start, end = max(earlier, key=lambda stretch: stretch[2] / stretch[1])
    return f"{title}: {name} leads from {moment(start)} to {moment(end)}\N{NO-BREAK SPACE}s, {last} from {moment(since)}\N{NO-BREAK SPACE}s on"


def draw_front(results):
    """Two panels against seconds: coverage, and the accuracy of the weighted vote, without scores that of the majority. The
    front is the broad staircase behind the curves, in the colour of the model that is on it."""
    models = {name: results["models"][name] for name in results["front_models"]}
    colour = colours(results["models"])
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.9))
    for ax, kind in zip(axes, ("coverage", "weighted" if "weighted" in results["front"] else "majority")):
        steps = results["front_steps"][kind]
        scored = kind == "weighted" and results["front_with_scoring"]
        seconds = {name: m["seconds_scored" if scored else "seconds"] for name, m in models.items()}
        end = max(moments[-1] for moments in seconds.values())
        for name, start, stop in stretches(steps):
            held = [(at, 100 * value) for at, _, _, value in steps if start <= at <= (stop or end)]  # to the next one's first
            held += [] if stop else [(end, held[-1][1])]
            ax.plot(*zip(*held), color=colour[name], linewidth=9, alpha=0.3, drawstyle="steps-post", solid_capstyle="butt",
                    solid_joinstyle="miter", zorder=1)
        for name, m in models.items():
            percent = [100 * value for value in m[kind]]
            ax.plot(seconds[name], percent, **look(name, colour[name]) | dict(linewidth=1.3, markersize=5))
            ax.plot([seconds[name][-1], end], [percent[-1]] * 2, color=colour[name], linestyle=":", linewidth=1.2)
        time_axis(ax, min(moments[0] for moments in seconds.values()), end)
        if scored:
            ax.set_xlabel("seconds of generation and scoring")
        percent_axis(ax)
        ax.set_ylabel(RIGHT[kind])
        ax.set_title(textwrap.fill(front_title(kind, steps), 40), pad=10)
        label_ends(ax, {name: (100 * m[kind][-1], colour[name]) for name, m in models.items()})
    return fig


# ------------------------------------------------------------------------------------------------ selection
def selection_title(models):
    gains = sorted(round(m["gain"][-1]) for m in models.values())
    by = f"{gains[0]:+d}" if gains[0] == gains[-1] else f"{gains[0]:+d} to {gains[-1]:+d}"
    return f"Votes weighted by scores against plain majority, all samples: {by} points"


def draw_selection(models):
    """Per model two panels, one below the other: three ways to choose one answer against samples and against seconds."""
    columns = min(len(models), 3)
    rows = 2 * math.ceil(len(models) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(max(3.7 * columns, 7), 0.7 + 2.6 * rows), sharey=True, squeeze=False)
    fig.suptitle(textwrap.fill(selection_title(models), int(8.5 * fig.get_figwidth())), x=0.01, ha="left", fontsize=13.5,
                 fontweight="bold", color=INK)
    clocks = {name: m["seconds_scored"] or m["seconds"] for name, m in models.items()}
    start, end = min(m["seconds"][0] for m in models.values()), max(clock[-1] for clock in clocks.values())
    for ax in axes.flat:
        ax.set_visible(False)
    panels = {name: axes[i // columns * 2:, i % columns][:2] for i, name in enumerate(models)}
    for name, m in models.items():
        for ax, by in zip(panels[name], ("k", "seconds")):
            ax.set_visible(True)
            for rule, colour in RULE_COLOURS.items():
                x = clocks[name] if by == "seconds" and rule != "majority" else m[by]
                ax.plot(x, [100 * value for value in m[rule]], color=colour, marker="o", markersize=4, linewidth=1.8)
        above, below = panels[name]
        above.set_title(name)
        samples_axis(above)
        time_axis(below, start, 1.1 * end)
        below.set_xlabel("seconds, scoring included" if m["seconds_scored"] else "seconds without scoring")
    for name in list(models)[columns - 1::columns]:  # the last column
        for ax in panels[name]:
            label_ends(ax, {RULES[rule]: (100 * models[name][rule][-1], colour) for rule, colour in RULE_COLOURS.items()}, 0.1)
    for ax in axes[:, 0]:
        percent_axis(ax)
        ax.set_ylabel("right choice")
    return fig


# ------------------------------------------------------------------------------------------------ training
def draw_training(logs, colour):
    """Loss against tokens: one panel per stage, in the order of training, one line per model."""
    stages = list(dict.fromkeys(itertools.chain(*logs.values())))
    columns = min(len(stages), 4)
    rows = math.ceil(len(stages) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(max(2.9 * columns, 5), 0.6 + 3.3 * rows), squeeze=False)
    for ax in axes.flat[len(stages):]:
        ax.set_visible(False)
    for stage, ax in zip(stages, axes.flat):
        for name, log in logs.items():
            if stage in log:
                tokens, losses = zip(*log[stage])
                ax.plot([count / 1e6 for count in tokens], losses, color=colour[name], label=name,
                        linestyle=look(name, colour[name])["linestyle"], marker="." if len(losses) < 10 else "")
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        log_axis(ax.yaxis, low, high)
        if high < 5 * low:
            ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.set_xlim(0, None)
        ax.set_title(STAGES.get(stage, stage))
        ax.set_xlabel("million tokens")
        ax.legend(frameon=False, fontsize=11, labelcolor="linecolor", handlelength=1.9)
    axes[0, 0].set_ylabel("loss")
    return fig


# ------------------------------------------------------------------------------------------------ decoding speed
BENCH = dict(shape=str, pattern=str, device=str, dtype=str, batch=int, prompt=int, generate=int)  # what tells lines apart
MEASURED = dict(oom=bool, ratio=(int, float, type(None)), contexts=(list, type(None)), ms_at_contexts=(list, type(None)))
BENCH_COLOURS = {"transformer": COLOURS["teacher"], "pure": COLOURS["pure"], "hybrid": COLOURS["hybrid"]}


def read_bench(path):
    """The lines of bench.jsonl that can be drawn together: of one machine, dtype and prompt length, those of the last line.
    Of lines of the same settings the last one counts."""
    rows = read_records(path, BENCH | MEASURED) if os.path.exists(path) else []
    alike = [row for row in rows if all(row[key] == rows[-1][key] for key in ("device", "dtype", "prompt"))]
    return list({tuple(row[key] for key in BENCH): row for row in alike}.values())


def most_compared(rows, key, other):
    """The value of `key` at which students are compared with the Transformer at most values of `other`; of these the largest."""
    count = {}
    for row in rows:
        if row["ratio"] is not None:
            count.setdefault(row[key], set()).add(row[other])
    return max(count, key=lambda value: (len(count[value]), value), default=max(row[key] for row in rows))


def draw_speedup(ax, rows, x, fixed):
    """How many times as fast as the Transformer, against `x` (batch or generate), at the one value of the other that `fixed`
    gives; a cross where the Transformer is out of memory. Returns a title, which says what the best is."""
    rows = sorted((row for row in rows if all(row[key] == value for key, value in fixed.items())), key=lambda row: row[x])
    best = None
    for pattern in [name for name in BENCH_COLOURS if name != "transformer"]:
        line = [row for row in rows if row["pattern"] == pattern and row["ratio"] is not None]
        if line:
            ax.plot([row[x] for row in line], [row["ratio"] for row in line], color=BENCH_COLOURS[pattern], label=pattern,
                    marker=MARKERS[BENCH_COLOURS[pattern]], markersize=6.5, markeredgecolor="white", markeredgewidth=0.8)
            best = max([best, line[-1]] if best else [line[-1]], key=lambda row: row["ratio"])
    ax.axhline(1, color=BENCH_COLOURS["transformer"], label="transformer")
    full = [row[x] for row in rows if row["pattern"] == "transformer" and row["oom"]]
    ax.plot(full, [1] * len(full), "x", color=INK, markersize=9, markeredgewidth=2.2, label="out of memory" if full else None)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted({row[x] for row in rows}), labels=[f"{value:,}" for value in sorted({row[x] for row in rows})])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_ylim(0, None)
    if x == "batch":  # the panel beside it has the same lines
        ax.legend(frameon=False, fontsize=11, labelcolor="linecolor", handlelength=1.2)
    if not best:
        return "Nothing to compare with the Transformer"
    what = {"batch": "rows", "generate": "new tokens"}[x]
    return f"With {best[x]:,} {what}, {best['pattern']} decodes {best['ratio']:.1f} times as fast as the Transformer"


def draw_steps(ax, rows, batch):
    """Milliseconds per step against the tokens in the context, of each pattern's longest run at this batch. Returns a title
    that says how they grow."""
    growth = {}
    for pattern, colour in BENCH_COLOURS.items():
        lines = [row for row in rows if row["pattern"] == pattern and row["batch"] == batch and not row["oom"]]
        if lines:
            row = max(lines, key=lambda row: row["generate"])
            ax.plot(row["contexts"], row["ms_at_contexts"], color=colour, label=pattern, marker=MARKERS[colour], markersize=6.5,
                    markeredgecolor="white", markeredgewidth=0.8)
            growth[pattern] = row["ms_at_contexts"][-1] / row["ms_at_contexts"][0]
    if not growth:
        return "No model fits at this batch"
    ax.set_xlim(0, None)
    ax.set_ylim(0, None)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.legend(frameon=False, fontsize=11, labelcolor="linecolor", handlelength=1.2)
    return "A step's time grows: " + ", ".join(f"{pattern} x{times:.1f}" for pattern, times in growth.items())


def draw_bench(rows):
    """A row of panels per shape: speed-up against batch and against length, and a step's time against the context."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    fig, axes = plt.subplots(len(shapes), 3, figsize=(14, 0.6 + 4.3 * len(shapes)), squeeze=False)
    for shape, (left, middle, right) in zip(shapes, axes):
        ours = [row for row in rows if row["shape"] == shape]
        length, batch = most_compared(ours, "generate", "batch"), most_compared(ours, "batch", "generate")
        titles = (draw_speedup(left, ours, "batch", dict(generate=length)),
                  draw_speedup(middle, ours, "generate", dict(batch=batch)), draw_steps(right, ours, batch))
        for ax, title in zip((left, middle, right), titles):
            ax.set_title(textwrap.fill(title, 36), pad=10)
        left.set_ylabel(f"{shape}\ntimes as fast as the Transformer")
        left.set_xlabel(f"rows decoded at a time, {ours[0]['prompt']:,} + {length:,} tokens")
        middle.set_xlabel(f"new tokens, {batch:,} rows")
        right.set_xlabel(f"tokens in the context, {batch:,} rows")
        right.set_ylabel("milliseconds per step")
    fig.supxlabel(f"{rows[0]['device']}, {rows[0]['dtype']}, random weights", fontsize=11, color=INK)
    return fig


# ------------------------------------------------------------------------------------------------ the script
def save(fig, path, dpi):
    """Write under a temporary name, then rename."""
    fig.savefig(path + ".tmp", format="png", dpi=dpi)
    plt.close(fig)
    os.replace(path + ".tmp", path)
    print(f"wrote {path}")


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--out", default="out", help="folder with results.json, and where the figures go")
    parser.add_argument("--dpi", type=int, default=150, help="pixels per inch of the figures, some 11 inches wide")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if bench := read_bench(os.path.join(args.out, "bench.jsonl")):
        with plt.rc_context(STYLE):
            save(draw_bench(bench), os.path.join(args.out, "bench.png"), args.dpi)
        if not os.path.exists(os.path.join(args.out, "results.json")):
            return
    results = read_results(args.out)
    models = results["models"]
    scored = {name: m for name, m in models.items() if "weighted" in m}
    logs = {name: read_metrics(os.path.join(args.out, name, "metrics.jsonl")) for name in models}
    logs = {name: log for name, log in logs.items() if log}
    with plt.rc_context(STYLE):
        save(draw_curves(models, "coverage"), os.path.join(args.out, "coverage.png"), args.dpi)
        save(draw_curves(models, "majority"), os.path.join(args.out, "accuracy.png"), args.dpi)
        if results["front"]:
            save(draw_front(results), os.path.join(args.out, "front.png"), args.dpi)
        if scored:
            save(draw_selection(scored), os.path.join(args.out, "selection.png"), args.dpi)
        if logs:
            save(draw_training(logs, colours(models)), os.path.join(args.out, "training.png"), args.dpi)
    path = os.path.join(args.out, "results.md")
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(report(results) + "\n")
    os.replace(path + ".tmp", path)
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
