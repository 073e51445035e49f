"""Draw the results: coverage and majority accuracy against time and against samples, the training curves, a table.

    python plot.py                # after python grade.py

reads   out/results.json          written by grade.py
        out/<name>/metrics.jsonl  the training log of each model, where there is one
writes  out/coverage.png          the figure: coverage against seconds, and against samples
        out/accuracy.png          the same for the majority vote
        out/training.png          loss against tokens, one panel per stage (only if there is a log)
        out/results.md            the tables, for a README

Contents:
    reading      read_results, read_metrics
    style        colours, axes in seconds and in samples, labels at the ends of lines
    figures      draw_curves (coverage.png, accuracy.png), draw_training
    tables       model_table, budget_table, equal_table
    all of it    main

A model has the same colour and marker in every figure. What a title says is computed from the results.
"""
import argparse
import io
import json
import math
import os
import textwrap

import matplotlib
matplotlib.use("Agg")                                        # files only, no window
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from grade import fail

# Okabe and Ito's colours, which remain apart with any colour blindness; the default names have theirs for good
TEACHER = "#0072B2", "o"
STYLES = {"pure": ("#D55E00", "s"), "hybrid": ("#009E73", "^")}
OTHERS = [("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X"), ("#999999", "*")]
INK, FAINT = "#333333", "#E2E2E2"
SIZE, DPI = (11, 4.9), 150                                   # inches, dots per inch
BAR = 0.04                                                   # height of one row of "ahead" bars, of the panel's
STAGES = {"pretrain": "pre-training", "matrices": "matrix orientation", "hidden": "hidden states",
          "kl": "distillation (KL)", "sft": "fine-tuning"}   # titles of panels; other stages go by their names
RC = {"font.size": 12, "axes.titlesize": 13.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
      "axes.labelsize": 12.5, "axes.edgecolor": "#888888", "axes.linewidth": 0.8, "axes.labelcolor": INK,
      "axes.titlecolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
      "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.7, "xtick.color": INK, "ytick.color": INK,
      "xtick.major.size": 3, "ytick.major.size": 0, "lines.linewidth": 2.2, "lines.markersize": 6.5}
NEEDED = ("k", "seconds", "coverage", "coverage_low", "coverage_high", "majority", "majority_low", "majority_high",
          "params", "tokens_per_second", "num_problems", "num_samples")


# --- reading ---

def read_results(out):
    path = os.path.join(out, "results.json")
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
    except FileNotFoundError:
        fail(f"no {path}: run python grade.py first, or name the folder with --out")
    except (ValueError, OSError) as error:
        fail(f"cannot read {path} ({error}); run python grade.py again")
    models = results.get("models") if isinstance(results, dict) else None
    if not isinstance(models, dict) or not models:
        fail(f"{path} holds no models; run python grade.py again")
    for name, model in models.items():
        missing = [key for key in NEEDED if not isinstance(model, dict) or key not in model]
        if missing:
            fail(f"{path}: model {name} lacks {', '.join(missing)}; run python grade.py again")
    return results


def read_metrics(path):
    """The training log as {stage: [(tokens, loss), ...]} in the order of the stages. Lines that are torn or lack a field
    are passed over: the log is for looking at. Where a resumed run wrote a step again, the later line counts."""
    stages = {}
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    point = float(record["tokens"]), float(record["loss"])
                    stages.setdefault(str(record["stage"]), {})[record["step"]] = point
                except (ValueError, KeyError, TypeError):
                    continue
    return {stage: [steps[s] for s in sorted(steps)] for stage, steps in stages.items()}


# --- style ---

def styles(names, teacher):
    """{name: (colour, marker)}, the same for a model whatever others are there."""
    others = iter(OTHERS * len(names))
    return {n: TEACHER if n == teacher else STYLES[n] if n in STYLES else next(others) for n in names}


def in_order(models, teacher):
    """The teacher first, then pure, hybrid, and the rest as they come."""
    first = [teacher, *STYLES]
    return sorted(models, key=lambda name: first.index(name) if name in first else len(first))


def time_text(seconds):
    """2.5 s, 40 s, 3 min, 2 h: short, with up to two digits."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def time_ticks(low, high):
    """Round numbers of seconds, minutes and hours between two times: as many as fit, at most seven."""
    for steps in ((1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 45), (1, 2, 5, 10, 20), (1, 3, 10, 30), (1, 10), (1,)):
        clock = [s * unit for unit in (1, 60) for s in steps] + [s * 3600 for s in steps if s <= 10]
        decades = [s * 10.0 ** e for e in range(-6, 0) for s in steps if s < 10]
        days = [s * 36000 * 10.0 ** e for e in range(1, 4) for s in steps if s < 10]
        ticks = [t for t in decades + clock + days if low <= t <= high]
        if len(ticks) <= 7:
            break
    return ticks


def time_axis(ax, low, high):
    if high < 2 * low:
        low, high = low / 2, high * 2
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.xaxis.set_major_locator(FixedLocator(time_ticks(low, high)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda t, _: time_text(t)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("time since generation started")


def samples_axis(ax, most):
    ax.set_xscale("log", base=2)
    ax.set_xlim(0.9, max(most, 2) * 1.1)
    ticks = [2 ** i for i in range(most.bit_length())]
    ax.xaxis.set_major_locator(FixedLocator(ticks if len(ticks) <= 8 else ticks[::2]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("samples per problem, k")


def spread(values, gap, low, high):
    """Values moved apart as little as possible (least squares) to be `gap` apart and within [low, high], in the same
    order: for labels that would overlap. Neighbours that are too close are pooled into a stack around their mean."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    stacks = []                                              # [mean of (value - gap * rank), how many]
    for rank, i in enumerate(order):
        stacks.append([values[i] - gap * rank, 1])
        while len(stacks) > 1 and stacks[-2][0] > stacks[-1][0]:
            (b, m), (a, n) = stacks.pop(), stacks.pop()
            stacks.append([(a * n + b * m) / (n + m), n + m])
    bases = [base for base, count in stacks for _ in range(count)]
    placed = {i: min(max(base, low), high - gap * (len(values) - 1)) + gap * rank
              for rank, (i, base) in enumerate(zip(order, bases))}
    return [placed[i] for i in range(len(values))]


def label_ends(ax, ends):
    """Each line's name in its colour at the right edge, at the height where the line ends: [(name, y, colour)]."""
    low, high = ax.get_ylim()
    height = ax.get_position().height * ax.figure.get_size_inches()[1] * 72               # points
    gap = 15 * (high - low) / height
    for (name, y, colour), at in zip(ends, spread([y for _, y, _ in ends], gap, low + gap / 2, high - gap / 2)):
        ax.annotate(name, (1, at), (7, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                    color=colour, va="center", fontweight="bold", annotation_clip=False)


# --- figures ---

def percents(values):
    return [100 * v for v in values]


def draw_lines(ax, models, look, x, kind):
    """One line with its 95% band per model, of `kind` ("coverage" or "majority") against x ("seconds" or "k")."""
    for name, model in models.items():
        colour, marker = look[name]
        ax.fill_between(model[x], percents(model[kind + "_low"]), percents(model[kind + "_high"]),
                        color=colour, alpha=0.11, linewidth=0)
        ax.plot(model[x], percents(model[kind]), color=colour, marker=marker, markeredgecolor="white",
                markeredgewidth=0.8, clip_on=False, zorder=3)


def hold_lines(ax, models, look, kind, until):
    """After its last sample a model stays where it is: dotted, up to the end of the slowest."""
    for name, model in models.items():
        ax.plot([model["seconds"][-1], until], [100 * model[kind][-1]] * 2, color=look[name][0], linestyle=(0, (1, 2)),
                linewidth=1.6, zorder=2)


def mark_ahead(ax, students, teacher, look):
    """A bar along the bottom for the budgets at which each student covers more than its teacher."""
    for row, (name, model) in enumerate(students.items()):
        for start, end in model["ahead"]["budgets"]:
            ax.plot([start, end], [0.03 + BAR * row] * 2, transform=ax.get_xaxis_transform(), color=look[name][0],
                    linewidth=5, alpha=0.8, solid_capstyle="butt", zorder=1)
    if students:
        ax.text(0.99, 0.04 + BAR * len(students), f"bars: ahead of {teacher}", transform=ax.transAxes, ha="right",
                va="bottom", fontsize=11.5, color=INK)


def careful_lead(model, kind):
    """A student's best lead over its teacher and the lower end of its interval, in points, among moments at which the
    teacher has just completed a round (where the stairs favour the teacher): (lead, low)."""
    entry = model["ahead"]
    if kind == "coverage":
        return entry["round_lead"], entry["round_lead_low"]
    rows = [(row["majority_lead"], row["majority_lead_low"]) for row in entry["table"] if row["majority_lead"] is not None]
    return max(rows, default=(0, 0))


def titles(models, teacher, kind):
    """What the two panels show, in words that follow from the numbers: (left, right)."""
    leads = {name: careful_lead(model, kind) for name, model in models.items() if "ahead" in model}
    if not leads:
        what = {"coverage": "Coverage", "majority": "Majority vote"}[kind]
        return f"{what} against time", f"{what} against samples"
    name = max(leads, key=leads.get)
    lead, low = leads[name]
    if low <= 0 or round(lead) < 1:
        left = f"In the same time, {name} is not clearly ahead of {teacher}"
    elif kind == "coverage":
        left = f"In the same time, {name} covers up to {points(lead)} more than {teacher}"
    else:
        left = f"In the same time, {name}'s majority is up to {points(lead)} better than {teacher}'s"
    behind = 100 * (models[teacher]["coverage"][0] - models[name]["coverage"][0])
    how = "level with" if round(behind) == 0 else points(abs(behind)) + (" behind" if behind > 0 else " ahead of")
    return left, f"Sample for sample, {name} starts {how} {teacher}"


def points(number):
    return f"{number:.0f}\N{NO-BREAK SPACE}point{'s' if round(number) != 1 else ''}"


def draw_curves(models, teacher, kind):
    """Two panels: `kind` against seconds (left) and against samples (right)."""
    look = styles(models, teacher)
    heads = [textwrap.fill(title, 40) for title in titles(models, teacher, kind)]
    fig, (left, right) = plt.subplots(1, 2, figsize=SIZE, sharey=True)
    margin = (0.11 * max(len(name) for name in models) + 0.25) / SIZE[0]      # room for the labels, as a share of the width
    width = (1 - 0.075 - 2 * margin) / 2
    top = 1 - (0.25 + 0.22 * max(head.count("\n") + 1 for head in heads)) / SIZE[1]
    fig.subplots_adjust(left=0.075, right=1 - margin, bottom=0.13, top=top, wspace=margin / width)
    end = max(m["seconds"][-1] for m in models.values())
    start = min(m["seconds"][0] for m in models.values())
    draw_lines(left, models, look, "seconds", kind)
    hold_lines(left, models, look, kind, end)
    draw_lines(right, models, look, "k", kind)
    lows, highs = [[v for m in models.values() for v in percents(m[kind + s])] for s in ("_low", "_high")]
    left.set_ylim(max(0, math.floor(min(lows) / 10) * 10 - 10), min(100, math.ceil(max(highs) / 10) * 10))
    time_axis(left, max(start, 1e-6) * 0.93, max(end, 2e-6))
    samples_axis(right, max(m["k"][-1] for m in models.values()))
    left.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    left.set_ylabel({"coverage": "problems with a right answer", "majority": "problems with a right majority"}[kind])
    for ax, head in zip((left, right), heads):
        ax.set_title(head, pad=10)
        label_ends(ax, [(name, 100 * m[kind][-1], look[name][0]) for name, m in models.items()])
    if kind == "coverage":
        mark_ahead(left, {n: m for n, m in models.items() if m.get("ahead", {}).get("budgets")}, teacher, look)
    return fig


def smooth(values, reach):
    """Mean over up to `reach` values on either side: what the eye should follow in a noisy loss."""
    windows = [values[max(0, i - reach):i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw_training(logs, look):
    """Loss against tokens: one panel per stage, in the order of training, one line per model."""
    stages = list(dict.fromkeys(stage for log in logs.values() for stage in log))
    columns = min(len(stages), 4 if len(stages) != 5 else 3)
    rows = -(-len(stages) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(max(2.9 * columns, 5), 0.6 + 3.3 * rows), squeeze=False,
                             layout="constrained")
    fig.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    for ax in axes.flat[len(stages):]:
        ax.set_visible(False)
    for stage, ax in zip(stages, axes.flat):
        for name, log in logs.items():
            if stage in log:
                tokens, losses = zip(*log[stage])
                tokens = [t / 1e6 for t in tokens]
                ax.plot(tokens, losses, color=look[name][0], alpha=0.3, linewidth=1)
                ax.plot(tokens, smooth(losses, len(losses) // 40), color=look[name][0], label=name)
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(4))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_title(STAGES.get(stage, stage))
        ax.set_xlabel("million tokens")
        ax.legend(frameon=False, fontsize=11, labelcolor="linecolor", handlelength=1.2)
    axes[0, 0].set_ylabel("loss")
    return fig


# --- tables ---

def percent(share):
    return "-" if share is None else f"{100 * share:.1f}"


def interval(model, kind, i):
    return f"{percent(model[kind][i])} [{percent(model[kind + '_low'][i])}, {percent(model[kind + '_high'][i])}]"


def table(header, rows):
    """A Markdown table; numbers to the right."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join([":--"] + ["--:"] * (len(header) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def model_table(models):
    n = max(m["num_samples"] for m in models.values())
    header = ["model", "parameters", "tokens/s", "pass@1 %", f"coverage@{n} %", f"majority@{n} %", "luck %",
              "seconds for all samples"]
    rows = []
    for name, m in models.items():
        note = "" if m["num_samples"] == n else f" (k = {m['num_samples']})"
        rows.append([name + note, f"{m['params']:,}" if m["params"] else "-", f"{m['tokens_per_second']:,.0f}",
                     percent(m["coverage"][0]), interval(m, "coverage", -1), interval(m, "majority", -1),
                     percent(m.get("luck")), f"{m['seconds'][-1]:.1f}"])
    return table(header, rows)


def budget_table(models, teacher, students):
    """Rows: the moments at which the teacher completes 1, 2, 4, ... samples of every problem."""
    header = ["seconds", f"{teacher}: k", "coverage %", "majority %"]
    for name in students:
        header += [f"{name}: k", "coverage %", "majority %", "lead in coverage, points"]
    rows = []
    for i, first in enumerate(models[students[0]]["ahead"]["table"]):
        row = [f"{first['seconds']:.2f}", str(first["teacher_k"]), percent(first["teacher_coverage"]),
               percent(first["teacher_majority"])]
        for name in students:
            r = models[name]["ahead"]["table"][i]
            lead = "-" if r["lead"] is None else f"{r['lead']:+.1f} [{r['lead_low']:+.1f}, {r['lead_high']:+.1f}]"
            row += [str(r["student_k"]), percent(r["student_coverage"]), percent(r["student_majority"]), lead]
        rows.append(row)
    return table(header, rows)


def equal_table(models, teacher, students):
    header = ["coverage %", f"{teacher}: k", "seconds"]
    for name in students:
        header += [f"{name}: k", "seconds", "times as fast"]
    rows = []
    for i, first in enumerate(models[students[0]]["ahead"]["equal_coverage"]):
        row = [percent(first["coverage"]), str(first["k"]), f"{first['teacher_seconds']:.2f}"]
        for name in students:
            r = models[name]["ahead"]["equal_coverage"][i]
            row += ["-", "-", "never"] if r["student_k"] is None else \
                [str(r["student_k"]), f"{r['student_seconds']:.2f}", "-" if r["ratio"] is None else f"{r['ratio']:.2f}"]
        rows.append(row)
    return table(header, rows)


def lead_line(name, teacher, a):
    if not a["budgets"]:
        return f"- **{name}** is at no time budget ahead of {teacher}."
    stretch = ", ".join(f"{time_text(start)} to {time_text(end)}" for start, end in a["budgets"])
    return (f"- **{name}** covers more problems than {teacher} at time budgets of {stretch}; among the moments at which "
            f"{teacher} has just completed a round, most at {time_text(a['round_lead_seconds'])}: {a['round_lead']:+.1f} points "
            f"[{a['round_lead_low']:+.1f}, {a['round_lead_high']:+.1f}].")


def made_with(models):
    """Machine, number format and date: one line, with the models named only where they differ."""
    lines = {}
    for name, m in models.items():
        facts = [m.get(key) or "?" for key in ("device", "dtype", "date")]
        what = f"{m['num_problems']} problems" + (f" of {m['task']}" if m.get("task") else "") + f" x {m['num_samples']} samples"
        lines.setdefault(f"{what}; sampled on {facts[0]}, {facts[1]}, {facts[2]}", []).append(name)
    if len(lines) == 1:
        return f"{next(iter(lines))}."
    return "; ".join(f"{', '.join(names)}: {line}" for line, names in lines.items()) + "."


def results_markdown(models, teacher):
    students = [name for name, model in models.items() if "ahead" in model]
    parts = [model_table(models), made_with(models) + " In brackets: 95% intervals, by bootstrap over problems. Luck: the share "
             "of problems whose neighbour's answer is among their samples."]
    if students:
        parts += ["\n".join(lead_line(name, teacher, models[name]["ahead"]) for name in students),
                  f"What each has when {teacher} completes 1, 2, 4, ... samples of every problem:",
                  budget_table(models, teacher, students),
                  "How long each takes to the same coverage:", equal_table(models, teacher, students)]
    return "\n\n".join(parts) + "\n"


# --- all of it ---

def png(fig):
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=DPI)
    plt.close(fig)
    return buffer.getvalue()


def write(path, data):
    """Write to a temporary name, then rename."""
    with open(path + ".tmp", "wb") as file:
        file.write(data)
    os.replace(path + ".tmp", path)
    print(f"wrote {path}")


def parse_arguments():
    parser = argparse.ArgumentParser(description="Draw out/results.json.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    parser.add_argument("--out", default="out", help="folder with results.json, and where the figures go")
    parser.add_argument("--teacher", help="the model that the others are compared with (None: as given to grade.py)")
    return parser.parse_args()


def main():
    args = parse_arguments()
    results = read_results(args.out)
    teacher = results.get("teacher")
    if args.teacher not in (None, teacher):
        fail(f"--teacher {args.teacher}: the results compare with {teacher}; run python grade.py --teacher {args.teacher} first")
    models = {name: results["models"][name] for name in in_order(results["models"], teacher)}
    logs = {name: read_metrics(os.path.join(args.out, name, "metrics.jsonl")) for name in models}
    logs = {name: log for name, log in logs.items() if log}
    files = {"results.md": results_markdown(models, teacher).encode()}
    with plt.rc_context(RC):
        files["coverage.png"] = png(draw_curves(models, teacher, "coverage"))
        files["accuracy.png"] = png(draw_curves(models, teacher, "majority"))
        if logs:
            files["training.png"] = png(draw_training(logs, styles(models, teacher)))
    for name, data in files.items():
        write(os.path.join(args.out, name), data)
    if not logs:
        print(f"no training logs ({args.out}/<name>/metrics.jsonl): no training.png")


if __name__ == "__main__":
    main()
