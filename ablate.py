"""What is each part of the distillation worth? Pure students with one thing changed at a time, three seeds each.

    python distill.py --ablate            on the built-in task, into out/ablation; the same command again goes on

Reads   out/teacher
Writes  out/ablation/<variant>-<seed>/: a student as distill.py makes it, and ablation.json, its measurements
        out/ablation.json, out/ablation.md: the table, which is printed too

Every student has half the training of the main experiment (--scale multiplies it) and is judged on the same test problems:
the KL divergence from the teacher on their solutions, and how many of its own sampled answers are right.

Contents: the variants, measuring a student, many students at a time, the table.
"""
import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import torch

from data import load_task, load_tokenizer, prompt_template, read_json, solution_text, write_json
from distill import collate, distill, kl_loss, split_by_tokens, write_lines
from grade import extract_answer, is_correct, pass_at_k, table
from model import LM, fingerprint
from sample import generate, world

SCALE, SAMPLES = 0.5, 8  # of the main experiment's steps; answers per problem

# name: what its row says, and the options of distill.py in which it differs from the first one; attention: in how many layers
VARIANTS = {
    "mohawk": ("MOHAWK: forward KL, no attention, mamba2, state = head size", {}),
    "reverse-kl": ("reverse KL", dict(kl="reverse")),
    "no-orientation": ("without matrix orientation", dict(matrices_steps=0)),
    "no-alignment": ("without hidden-state alignment", dict(hidden_steps=0)),
    "kl-only": ("without either", dict(matrices_steps=0, hidden_steps=0)),
    "no-weights": ("without the weights of attention", dict(random_mixers=True)),
    "attention-1": ("attention kept in 1 layer", dict(attention=1)),
    "attention-2": ("attention kept in 2 layers", dict(attention=2)),
    "mamba-1": ("Mamba-1 mixer, without orientation", dict(mixer="mamba", matrices_steps=0)),
    "state-32": ("state 32, twice the head: not aligned", dict(d_state=32)),
}


# ------------------------------------------------------------------------------------------------ measuring a student
@torch.inference_mode()
def held_out_kl(lm, teacher, tokenizer, problems, template):
    """KL(teacher || student) per answer token, in nats, on the worked solutions of problems."""
    pairs = [(tokenizer.chat(template.replace("{question}", p.question)),
              tokenizer.encode(solution_text(p)) + tokenizer.eos_ids[:1]) for p in problems]
    total = count = 0
    for group in split_by_tokens(sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1])), 8192):
        tokens, labels, _ = (t.to(lm.device) for t in collate(group))
        answers = int((labels >= 0).sum())
        total += answers * float(kl_loss(lm(tokens), teacher(tokens), labels, "forward"))
        count += answers
    return total / count


def right_answers(lm, tokenizer, problems, template, args):
    """How many of SAMPLES answers to each problem are right: (problems,)."""
    prompts = [tokenizer.chat(template.replace("{question}", p.question)) for p in problems]
    right = np.zeros(len(problems), int)
    for c in generate(lm, prompts, num_samples=SAMPLES, max_new_tokens=args.data_max_new_tokens,
                      temperature=args.data_temperature, batch_size=args.data_batch_size, stop_ids=tokenizer.eos_ids):
        right[c.problem] += is_correct(extract_answer(tokenizer.decode(c.tokens)), problems[c.problem].answer)
    return right


def measure(folder, teacher_folder, args):
    """A model's entry: the KL from its teacher, pass@1 and coverage at SAMPLES."""
    lm, teacher = (LM.from_pretrained(f, args.device, torch.float32).eval() for f in (folder, teacher_folder))
    problems, template = load_task(args.task, "test")[:args.ablate_problems], prompt_template(args.task, args.prompt_file)
    tokenizer = load_tokenizer(folder)
    right = right_answers(lm, tokenizer, problems, template, args)
    return dict(kl=held_out_kl(lm, teacher, tokenizer, problems, template), params=lm.num_parameters(),
                pass_at_1=float(right.mean() / SAMPLES), problems=len(problems), samples=SAMPLES,
                coverage=float(np.mean([pass_at_k(SAMPLES, c, SAMPLES) for c in right.tolist()])))


# ------------------------------------------------------------------------------------------------ many at a time
def one_student(name, seed, teacher_folder, args):
    """Distil and measure one student, unless that is done; its entry."""
    options = dict(VARIANTS[name][1])
    if count := options.pop("attention", 0):
        layers = LM.from_pretrained(teacher_folder).config.n_layers
        options["attention_layers"] = range(1, layers, max(1, layers // count))  # 1, then 1 and 3 of 0 to 3
    args = argparse.Namespace(**vars(args) | dict(scale=SCALE * args.scale, seed=seed) | options)
    folder = f"{name}-{seed}"
    distill("pure", teacher_folder, args, folder)
    return measured(os.path.join(args.out, folder), teacher_folder, args)


def measured(folder, teacher_folder, args):
    """measure(folder, ...), kept under out/ablation/ and not measured again with the same settings."""
    path = os.path.join(args.out, os.path.basename(folder), "ablation.json")
    settings = dict(task=args.task, problems=args.ablate_problems, samples=SAMPLES, max_new_tokens=args.data_max_new_tokens,
                    temperature=args.data_temperature, weights=fingerprint(folder))
    entry = read_json(path) if os.path.exists(path) else {}
    if entry.get("settings") != settings:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        entry = dict(settings=settings, **measure(folder, teacher_folder, args))
        write_json(path, entry)
        print(f"{os.path.basename(folder)}: pass@1 {entry['pass_at_1']:.1%}, KL {entry['kl']:.3f}", flush=True)
    return entry


def ablate(teacher_folder, args):
    """All variants with all seeds, then the table. On a CPU one student per core, each on one thread."""
    if world() > 1:
        raise ValueError("--ablate makes many students side by side, each in one process: run it without torchrun")
    args = argparse.Namespace(**vars(args) | dict(out=os.path.join(args.out, "ablation")))
    workers = torch.get_num_threads() if args.device.type == "cpu" else 1
    jobs = [(name, seed) for seed in range(args.ablate_seeds) for name in VARIANTS]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) if workers > 1 else ThreadPoolExecutor(1) as pool:
        teacher = pool.submit(measured, teacher_folder, teacher_folder, args)
        futures = [pool.submit(one_student, *job, teacher_folder, args) for job in jobs]
        try:
            entries = {f"{name}-{seed}": future.result() for (name, seed), future in zip(jobs, futures)}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    results = dict(teacher=teacher.result(), seeds=args.ablate_seeds, scale=SCALE * args.scale, students=entries)
    write_json(args.out + ".json", results)
    write_lines(args.out + ".md", [report(results) + "\n"])
    print(f"\n{report(results)}\n\nwrote {args.out}.json and {args.out}.md")


# ------------------------------------------------------------------------------------------------ the table
def report(results):
    """Markdown: each variant's mean over seeds and, in brackets, its lowest and highest."""
    def cell(name, key, form):
        values = [results["students"][f"{name}-{seed}"][key] for seed in range(results["seeds"])]
        return f"{np.mean(values):{form}} [{min(values):{form}}, {max(values):{form}}]"

    keys = dict(kl=".3f", pass_at_1=".1%", coverage=".1%")
    lines = [[what, f"{results['students'][f'{name}-0']['params']:,}", *(cell(name, *key) for key in keys.items())]
             for name, (what, _) in VARIANTS.items()]
    teacher = results["teacher"]
    lines.append(["the teacher", f"{teacher['params']:,}", *(f"{teacher[key]:{form}}" for key, form in keys.items())])
    return table(["student", "parameters", "KL, nats per token", "pass@1", f"coverage@{teacher['samples']}"], lines)
