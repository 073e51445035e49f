"""What --ablate and --sizes promise: one change at a time, everything measured the same way, an interrupted run goes on."""
import json
import os
import shutil

import pytest
import torch

import ablate
import distill
from data import load_task
from model import LM

QUICK = ["--ablate", "--ablate-seeds", "1", "--ablate-problems", "2", "--data-max-new-tokens", "6", "--matrices-steps", "2",
         "--hidden-steps", "1", "--kl-steps", "2"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Students are then made in this process; with more threads, side by side in others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ablation(tmp_path_factory, tiny_out, tiny_options):
    """out/ with a finished ablation of the tiny teacher, and its options."""
    out = tmp_path_factory.mktemp("ablate") / "out"
    shutil.copytree(tiny_out / "teacher", out / "teacher")
    options = [*tiny_options[:2], "--teacher", str(out / "teacher"), "--out", str(out), "--batch-tokens", "512",
               "--matrix-length", "16", "--device", "cpu", *QUICK]
    distill.main(options)
    return out, options


def test_each_variant_differs_from_the_first_in_one_thing(ablation):
    """By the settings that training.json keeps. Two variants drop a stage that their change rules out or is."""
    out, _ = ablation
    settings = {name: json.loads((out / "ablation" / f"{name}-0" / "training.json").read_text()) for name in ablate.VARIANTS}
    base = settings.pop("mohawk")
    differ = {name: {key for key in base if base[key] != of[key]} for name, of in settings.items()}
    assert differ == {"reverse-kl": {"kl"}, "no-orientation": {"steps"}, "no-alignment": {"steps"}, "kl-only": {"steps"},
                      "no-weights": {"random_mixers"}, "attention-1": {"mixers"}, "attention-2": {"mixers"},
                      "mamba-1": {"mixers", "steps"}, "state-32": {"d_state"}}
    assert settings["kl-only"]["steps"] == dict(matrices=0, hidden=0, kl=2, sft=0)
    assert settings["attention-1"]["mixers"] == ["mamba2", "attention"] and base["mixers"] == ["mamba2"] * 2


def test_the_table_has_a_row_per_variant_and_the_teacher(ablation):
    out, _ = ablation
    results = json.loads((out / "ablation.json").read_text())
    assert results["students"].keys() == {f"{name}-0" for name in ablate.VARIANTS} and results["teacher"]["kl"] == 0
    assert all(entry["kl"] > 0 and 0 <= entry["pass_at_1"] <= entry["coverage"] <= 1 for entry in results["students"].values())
    text = (out / "ablation.md").read_text()
    assert len(text.splitlines()) == 2 + len(ablate.VARIANTS) + 1
    assert all(what in text for what, _ in ablate.VARIANTS.values())


def test_the_same_command_goes_on_where_it_was(ablation, capfd):
    """A student that was killed and one that was not measured are made up for; the others are not touched."""
    out, options = ablation
    before = (out / "ablation.json").read_bytes()
    shutil.rmtree(out / "ablation" / "kl-only-0")
    os.remove(out / "ablation" / "no-weights-0" / "ablation.json")
    os.remove(out / "ablation.json")
    times = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    distill.main(options)
    assert (out / "ablation.json").read_bytes() == before
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    measured = [line for line in capfd.readouterr().out.splitlines() if "pass@1" in line and line[0] != "|"]
    assert sorted(line.split(":")[0] for line in measured) == ["kl-only-0", "no-weights-0"]


def test_held_out_kl_is_the_mean_over_all_answer_tokens(tiny_out, task_file):
    """Against a loop over problems, one at a time; it does not depend on how they are put into batches."""
    from data import load_tokenizer, solution_text
    lm, teacher = (LM.from_pretrained(tiny_out / name).eval() for name in ("pure", "teacher"))
    tokenizer, problems = load_tokenizer(str(tiny_out / "teacher")), load_task(task_file, "test")[:7]
    total = count = 0
    for problem in problems:
        prompt = tokenizer.chat(problem.question)
        answer = tokenizer.encode(solution_text(problem)) + tokenizer.eos_ids[:1]
        tokens = torch.tensor([prompt + answer])
        with torch.no_grad():
            q, p = (model(tokens)[0, len(prompt) - 1:-1].log_softmax(-1) for model in (lm, teacher))
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(answer)
    assert ablate.held_out_kl(lm, teacher, tokenizer, problems, "{question}") == pytest.approx(total / count, rel=1e-4)


# ------------------------------------------------------------------------------------------------ two sizes
def test_both_sizes_have_a_teacher_and_students(tmp_path, tiny_options):
    """The small teacher has two layers; every student has its own teacher's shape."""
    options = list(tiny_options)
    options[options.index("--n-layers") + 1] = "3"
    distill.main([*options, "--sizes", "small,base", "--out", str(tmp_path), "--pretrain-steps", "2", "--matrices-steps", "1",
                  "--hidden-steps", "1", "--kl-steps", "1"])
    layers = {folder.name: LM.from_pretrained(folder).config.mixers for folder in tmp_path.iterdir()}
    assert layers == {"teacher": ["attention"] * 3, "pure": ["mamba2"] * 3, "hybrid": ["mamba2", "attention", "mamba2"],
                      "teacher-small": ["attention"] * 2, "pure-small": ["mamba2"] * 2, "hybrid-small": ["mamba2", "attention"]}


def test_the_small_teacher_ships_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = distill.parse_args(["--sizes", "small"])
    assert args.sizes == ["small"] and distill.parse_args([]).sizes == ["base"]
    small, base = (LM.from_pretrained(distill.get_teacher(size, args)) for size in ("small", "base"))
    assert small.config.n_layers == 2 and small.num_parameters() < 0.6 * base.num_parameters()
    assert sorted(os.listdir("out")) == ["teacher", "teacher-small"]


@pytest.mark.parametrize("options, part", [(["--sizes", "huge"], "unknown size 'huge': choose from small, base"),
                                           (["--teacher", "somewhere", "--sizes", "small"], "leave it out with --teacher")])
def test_impossible_sizes_are_refused(options, part, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        distill.main(options)
    assert part in str(error.value) + capsys.readouterr().err
