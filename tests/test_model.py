"""model.py: Llama is Hugging Face's, matrices are what mixers do, decoding equals one parallel pass
whatever else is in the batch, a student starts from its teacher, and a mixer of one's own fits."""
import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import decode_kernels
import distill
import model
from conftest import ROOT, assert_close
from decode_kernels import Products, prepare
from model import LM, Config, rope_frequencies, student_from

LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)


def random_tokens(*shape, seed=1, vocab=50):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def random_inputs(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- Llama
LLAMAS = {
    "tied, GQA": {},
    "untied": dict(tie_embeddings=False),
    "no GQA": dict(n_kv_heads=4),
    "one kv head": dict(n_kv_heads=1),
    "llama3 RoPE": dict(rope_scaling=LLAMA3, rope_theta=500.0),
    "wide heads": dict(head_dim=16, norm_eps=1e-3),  # n_heads x head_dim is not d_model
    "head_dim derived": dict(head_dim=None, max_length=64),
}


@pytest.fixture
def hugging_face():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.LlamaForCausalLM


@pytest.mark.parametrize("fields", LLAMAS.values(), ids=LLAMAS)
def test_what_we_save_is_the_same_llama_in_transformers(make_lm, hugging_face, tmp_path, fields):
    """Red for interleaved RoPE, kv heads tiled instead of repeated, eps or theta lost on the way,
    or a checkpoint that transformers would fill up with random weights."""
    lm = make_lm(**fields)
    lm.save_pretrained(tmp_path)
    hf, info = hugging_face.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    tokens = random_tokens(2, 40)  # longer than the original context of LLAMA3
    with torch.no_grad():
        assert_close(lm(tokens), hf(tokens).logits)


@pytest.mark.parametrize("layout", ["new", "rope_type", "type"])
@pytest.mark.parametrize("fields", [{}, dict(tie_embeddings=False, rope_scaling=LLAMA3)],
                         ids=["plain", "untied, llama3"])
def test_what_transformers_saves_is_the_same_llama_here(make_lm, hugging_face, tmp_path, fields,
                                                        layout):
    """In the layout of its version 5, and in the older ones that most repositories have."""
    make_lm(**fields, rope_theta=500.0, eos_ids=[3, 4]).save_pretrained(tmp_path / "ours")
    hf = hugging_face.from_pretrained(tmp_path / "ours")
    hf.save_pretrained(tmp_path / "theirs")
    if layout != "new":
        path = tmp_path / "theirs" / "config.json"
        config = json.loads(path.read_text())
        rope = config.pop("rope_parameters")
        theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
        scaling = rope | {layout: kind} if kind != "default" else None
        path.write_text(json.dumps(config | dict(rope_theta=theta, rope_scaling=scaling)))
    lm, tokens = LM.from_pretrained(str(tmp_path / "theirs")), random_tokens(2, 40)
    assert lm.config.eos_ids == [3, 4] and lm.config.rope_theta == 500.0
    with torch.no_grad():
        assert_close(lm(tokens), hf(tokens).logits)


def test_llama3_rope_of_a_released_size():
    """Llama-3.2-1B: of 32 pairs the 15 fastest keep their frequency, the 14 slowest get 1/32."""
    scaling = LLAMA3 | dict(factor=32.0, original_max_position_embeddings=8192)
    shape = dict(d_model=2048, n_heads=32, rope_theta=500000.0)
    found, plain = (rope_frequencies(Config(**shape, rope_scaling=s)) for s in (scaling, None))
    ratio = found / plain
    assert_close(ratio[:15], torch.ones(15))
    assert_close(ratio[18:], torch.full((14,), 1 / 32))
    assert (ratio[14:19].diff() < 0).all()


# ---- decoding
def decode(lm, tokens, splits, **options):
    """Logits of tokens (B, L) fed to a state in pieces of the given lengths."""
    state = lm.init_state(*tokens.shape, **options)
    return torch.cat([lm(piece, state) for piece in tokens.split(splits, dim=1)], dim=1)


def run_ragged(lm, state, rows, seed=50):
    """One pass over rows of any lengths, with rubbish behind their ends -> logits (B, V)."""
    counts = torch.tensor([len(row) for row in rows])
    tokens = random_tokens(len(rows), int(counts.max()), seed=seed)
    for padded, row in zip(tokens, rows):
        padded[:len(row)] = row
    return lm(tokens, state, counts)[:, 0]


def check_ragged(lm, lengths, splits=(1,) * 9):
    """Rows of these lengths in one pass, then 0 to 3 more tokens a row in a second one, then 9 more
    in pieces: all is as in one parallel pass over each row."""
    more = sum(splits)
    rows = [random_tokens(n + 3 + more, seed=i) for i, n in enumerate(lengths)]
    state = lm.init_state(len(rows), max(lengths) + 3 + more)
    wanted = [lm(row[None])[0] for row in rows]
    found = run_ragged(lm, state, [row[:n] for row, n in zip(rows, lengths)])
    for row, n in enumerate(lengths):
        assert_close(found[row], wanted[row][n - 1])
    ends = [n + i % 4 for i, n in enumerate(lengths)]
    run_ragged(lm, state, [row[n:end] for row, n, end in zip(rows, lengths, ends)], seed=60)
    assert state.lengths.tolist() == ends
    pieces = torch.stack([row[end:end + more] for row, end in zip(rows, ends)])
    found = torch.cat([lm(piece, state) for piece in pieces.split(splits, dim=1)], dim=1)
    for row, end in enumerate(ends):
        assert_close(found[row], wanted[row][end:end + more])


def test_rope_turns_pairs_by_position_times_frequency(make_lm):
    """Each pair (i, i + P/2) as a complex number, at positions of each row's own."""
    lm, x = make_lm(), torch.randn(2, 4, 3, 8)
    positions = torch.tensor([[0, 1, 2], [7, 8, 9]])
    angles = positions[:, None, :, None] * 10000 ** (-torch.arange(4).double() / 4)
    turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    wanted = torch.cat((turned.real, turned.imag), -1)
    assert_close(model.apply_rope(x, *lm.rope(positions)), wanted, torch.float32)


@pytest.mark.parametrize("splits", [[1] * 23, [22, 1], [5] + [1] * 18, [2, 1, 1, 7, 3, 9]],
                         ids=["1 by 1", "22+1", "5, 1s", "mix"])
def test_decoding_equals_one_parallel_pass(make_lm, pattern, splits):
    """Red if a cache is off by one column, a window holds the wrong tokens, a state loses
    precision, or what reads a cache records gradients (no no_grad here)."""
    lm, tokens = make_lm(pattern, rope_scaling=LLAMA3).requires_grad_(True), random_tokens(3, 23)
    found = decode(lm, tokens, splits)
    assert not found.requires_grad
    assert_close(found, lm(tokens).detach())


@pytest.mark.parametrize("lengths, splits", [
    ([3, 11, 1, 6], [1] * 9), ([3, 11, 1, 6], [4, 1, 4]), ([1 + 7 * i % 13 for i in range(37)],
                                                          [1] * 9)], ids=["1s", "4, 1, 4", "37"])
def test_ragged_rows_are_as_if_alone(make_lm, pattern, lengths, splits):
    """A row does not depend on its neighbours. Red if padding enters an attention, a convolution or
    a state, a window is taken at the end of the padding, or rows share positions. 37 rows: more
    than attention reads at a time."""
    check_ragged(make_lm(pattern), lengths, splits=splits)


@pytest.mark.parametrize("keep", [[2, 0, 3, 1], [3, 1], [1, 2, 3]], ids=str)
def test_rows_are_sorted_dropped_and_replaced(make_lm, pattern, keep):
    """select, then put two copies of another state's row into freed places: all go on alone."""
    lm = make_lm(pattern)
    rows = [random_tokens(length + 3, seed=i) for i, length in enumerate((3, 9, 1, 5))]
    state, source = lm.init_state(4, 20), lm.init_state(3, 7)
    run_ragged(lm, state, [row[:-3] for row in rows])
    state.select(torch.tensor(keep))
    rows = [rows[i] for i in keep]
    prompts = [random_tokens(length, seed=30 + length) for length in (7, 2, 4)]
    run_ragged(lm, source, prompts)
    state.put(torch.tensor([1, 0]), source, torch.tensor([1, 1]))
    rows[:2] = (torch.cat([prompts[1], random_tokens(3, seed=i)]) for i in range(2))
    assert state.lengths.tolist() == [len(row) - 3 for row in rows]
    pieces = torch.stack([row[-3:] for row in rows]).split(1, dim=1)
    found = torch.cat([lm(piece, state) for piece in pieces], dim=1)
    for row, logits in zip(rows, found):
        assert_close(logits, lm(row[None])[0, -3:])


def test_only_attention_pays_for_length(make_lm, pattern):
    """The point of the exercise; and a bfloat16 model's recurrent state is float32."""
    lm = make_lm(pattern).bfloat16()
    layers = [lm.init_state(2, length).layers for length in (10, 100)]
    for mixer, short, long in zip(pattern, *layers):
        sizes = [sum(tensor.nbytes for tensor in layer.values()) for layer in (short, long)]
        assert sizes[1] == (10 * sizes[0] if mixer == "attention" else sizes[0])
        assert mixer == "attention" or short["h"].dtype == torch.float32


def test_states_in_bfloat16_round_and_no_more(make_lm, pattern):
    """The state is rounded once a step; a step computes in float32 whatever it is."""
    lm, tokens = make_lm(pattern), random_tokens(3, 23)
    half = lm.init_state(1, 1, state_dtype=torch.bfloat16)
    assert all(layer["h"].dtype == torch.bfloat16 for layer in half.layers if "h" in layer)
    found = decode(lm, tokens, [9] + [1] * 14, state_dtype=torch.bfloat16)
    assert_close(found, lm(tokens), torch.bfloat16)
    if {"mamba", "mamba2"} & set(pattern):
        assert not torch.equal(found, decode(lm, tokens, [9] + [1] * 14))


def test_a_model_in_bfloat16_keeps_its_decays_and_stays_close(make_lm, pattern, tmp_path):
    """As on a GPU. Red if a mixer's `float32` is lost at loading, or dtypes meet in a product."""
    make_lm(pattern).save_pretrained(tmp_path)
    lm = LM.from_pretrained(str(tmp_path))
    half = LM.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        kept = re.search(r"\.mamba2?\.(A_log|A_log_bias|D|dt_proj\.bias)$", name)
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        for found in half(tokens), decode(half, tokens, [5, 1, 1, 5]):
            assert found.dtype == torch.bfloat16
            assert_close(found, lm(tokens), times=2)  # the residual stream is rounded 6 times


def test_decoding_as_on_a_gpu(make_lm, pattern, monkeypatch):
    """By the Triton kernels, interpreted: what a model takes on a GPU, and takes nowhere here."""
    if decode_kernels.INTERPRETED is None or torch.cuda.is_available():
        pytest.skip("Triton's interpreter runs on machines without a GPU")
    lm, tokens = make_lm(pattern), random_tokens(2, 8)
    wanted = lm(tokens)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    assert_close(decode(lm, tokens, [5, 1, 1, 1]), wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_what_the_cpu_does(make_lm, pattern):
    lm, tokens = make_lm(pattern), random_tokens(3, 23)
    wanted = lm(tokens)
    assert_close(decode(lm.cuda(), tokens.cuda(), [9] + [1] * 14).cpu(), wanted)


# ---- mixers
# Their formulas: test_hub.py runs what others released against literal loops.
@pytest.mark.parametrize("word", ["attention", "mamba2", "gla"])
def test_the_matrix_of_a_mixer_is_what_it_does(make_lm, gla, word):
    """Orientation is of no use unless y = T v is what the forward pass computes, causally. The
    check that whoever adds a mixer wants (gla: see the end)."""
    lm, u = make_lm([word]), random_inputs(2, 21, 32)
    mixer, rope = lm.layers[0].mixer, lm.rope(torch.arange(21)[None])
    T = mixer.mixing_matrix(u, rope)  # (B, H, L, L)
    assert T.dtype == torch.float32 and not T.triu(1).any()
    if word == "mamba2":
        v, *_, z, _ = mixer.project(u)
    else:
        v = mixer.v_proj(u).unflatten(-1, (-1, 8))
        v = v.repeat_interleave(4 // v.shape[2], dim=2)
    y = torch.einsum("bhts,bshp->bthp", T, v).flatten(2)
    y = mixer.gate(y, z) if word == "mamba2" else y
    assert_close(getattr(mixer, mixer.output)(y), mixer(u, rope))
    assert word != "attention" or (T.sum(-1) - 1).abs().max() < 1e-5


# ---- saving and loading
# What is missing, misshapen or unreadable is named: see test_hub.py.
@pytest.mark.parametrize("fields", [{}, dict(
    tie_embeddings=False, norm_eps=1e-3, rope_theta=77.0, eos_ids=[7], d_conv=3, d_state=4,
    dt_rank=5, max_length=99, rope_scaling=LLAMA3 | dict(rope_type="llama3"))],
    ids=["defaults", "no default"])
def test_saving_and_loading_is_the_identity(make_lm, pattern, tmp_path, fields):
    """Every bit and dtype, and the configuration; in bfloat16, too."""
    for dtype in torch.float32, torch.bfloat16:
        lm = model.cast(make_lm(pattern, **fields), "cpu", dtype)
        lm.save_pretrained(tmp_path)
        loaded = LM.from_pretrained(str(tmp_path))
        assert loaded.config == lm.config
        ours, theirs = lm.state_dict(), loaded.state_dict()
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype, name
        assert torch.equal(loaded(random_tokens(2, 9)), lm(random_tokens(2, 9)))
        assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_shards_are_the_files_that_the_index_names(make_lm, tmp_path):
    """Whatever their names: red if they are looked for elsewhere, or only some are read."""
    from safetensors.torch import load_file, save_file
    lm, index = make_lm(), {}
    lm.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for i, name in enumerate(("a.safetensors", "b.safetensors")):
        part = dict(list(tensors.items())[i::2])
        save_file(part, tmp_path / name)
        index |= dict.fromkeys(part, name)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(dict(weight_map=index)))
    loaded = LM.from_pretrained(str(tmp_path)).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in lm.state_dict().items())


def test_a_config_with_the_key_discrete_mamba2_still_loads(make_lm, tmp_path):
    """True is ignored, false means mamba2_step. Red if they are mixed up: other tensors."""
    for word, written in ("mamba2", True), ("mamba2_step", False):
        lm = make_lm([word, "attention"])
        lm.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text()) | dict(mixers=["mamba2", "attention"])
        path.write_text(json.dumps(config | dict(discrete_mamba2=written)))
        loaded = LM.from_pretrained(str(tmp_path))
        assert loaded.config.mixers == [word, "attention"]
        assert torch.equal(loaded(random_tokens(1, 9)), lm(random_tokens(1, 9)))


def test_a_loaded_model_can_be_sampled_and_trained(make_lm, tmp_path):
    """What is made under inference mode must not stay on the model. Red if weights want no
    gradient, or cached angles are tensors that autograd refuses."""
    make_lm().save_pretrained(tmp_path)
    lm = LM.from_pretrained(str(tmp_path))
    with torch.inference_mode():
        lm(random_tokens(1, 5))
    lm(random_tokens(1, 5)).sum().backward()
    assert all(parameter.grad is not None for parameter in lm.parameters())


LOAD = """
import sys, torch
from model import LM
def mb(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) / 1024
LM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)  # what is imported on the way
open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again from now
before = mb("VmRSS")
lm = LM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
assert mb("VmHWM") - before < sum(p.nbytes for p in lm.parameters()) / 2 ** 20 + 17, mb("VmHWM")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures by Linux's /proc")
def test_loading_needs_little_more_than_the_weights(make_lm, tmp_path):
    """Red if a model is first made with random weights, or cast only when all is loaded: then its
    22 MB are there two or three times. 17: its largest tensor as stored, 11 MB, and some."""
    make_lm(d_model=256, vocab_size=11_000, d_ff=4096).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], cwd=ROOT, timeout=120)
    assert done.returncode == 0


@pytest.mark.parametrize("fields, message", [
    (dict(n_layers=2, mixers=["attention"]), "mixers has 1 entries for n_layers = 2"),
    (dict(n_layers=1, mixers=["rwkv"]), r"unknown mixer \['rwkv'\].*attention, mamba, mamba2"),
    (dict(head_dim=15), "head_dim = 15 is odd"),
    (dict(n_heads=4, n_kv_heads=3), "n_heads = 4 .* n_kv_heads = 3"),
    (dict(rope_scaling=dict(rope_type="linear", factor=2.0)), "unsupported RoPE type 'linear'"),
    (dict(rope_scaling=dict(rope_type="llama3", factor=2.0)), "low_freq_factor is missing"),
])
def test_impossible_configs_are_refused_with_the_values(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_a_mixer_refuses_what_it_cannot_take_and_a_config_what_it_lacks():
    with pytest.raises(ValueError, match="d_state = 16 does not divide .* = 6"):
        LM(Config(n_layers=1, mixers=["mamba"], head_dim=6, n_kv_heads=1))
    with pytest.raises(TypeError, match="n_layer"):
        Config(n_layer=3)


# ---- prepare
def products(lm):
    return [module for module in lm.modules() if isinstance(module, Products)]


@pytest.mark.parametrize("tied", [True, False])
def test_prepare_joins_and_changes_no_logits(make_lm, pattern, tied):
    """Red if products are taken apart in another order than they were joined. Twice is once."""
    lm, tokens = make_lm(pattern, tie_embeddings=tied), random_tokens(3, 9)
    wanted = lm(tokens)
    joined = products(prepare(lm))
    assert prepare(lm) is lm and products(lm) == joined
    assert len(joined) == 3 + sum(mixer in ("attention", "mamba") for mixer in pattern)
    assert not any(product.packed for product in joined)  # all too small for it
    assert_close(lm(tokens), wanted)
    assert_close(decode(lm, tokens, [4, 1, 1, 3]), wanted)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_prepare_packs_large_weights(make_lm, dtype, tied):
    """All of 2**18 entries or more, the head's, tied or not, among them; at 1 row and at many."""
    mixers = ["attention", "mamba", "mamba2", "mamba2_step"]
    lm = make_lm(mixers, d_model=256, head_dim=64, d_ff=1024, vocab_size=1024, tie_embeddings=tied)
    lm, tokens = model.cast(lm, "cpu", dtype), random_tokens(3, 9, vocab=1024)
    wanted = lm(tokens)
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert not any(product.packed for product in products(prepare(lm)))
        return
    packed = products(prepare(lm))
    assert sum(product.packed for product in packed) == 4 * 2 + 2 + (not tied)  # MLPs and in_proj
    head = vars(lm).get("head")
    assert (head is not None) == tied
    assert products(prepare(lm)) == packed and vars(lm).get("head") is head  # twice is once
    assert_close(lm(tokens), wanted)
    assert_close(decode(lm, tokens, [4, 1, 1, 3]), wanted)
    assert_close(lm(tokens[:1, :1]), wanted[:1, :1])


# ---- teacher -> student
def repeat_heads(weight, times):
    """[k1, k2] -> [k1, k1, k2, k2] in heads of 8: query heads 0 and 1 share kv head 0."""
    return torch.cat([head for head in weight.split(8) for _ in range(times)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixers", [["mamba"] * 3, ["mamba2"] * 3,
                                    ["mamba2", "attention", "mamba"]], ids="+".join)
def test_a_student_copies_all_but_the_replaced_mixers(make_lm, mixers, dtype):
    """Embeddings, head, norms, MLPs, kept attention; in memory of its own; the teacher stays. All
    in the teacher's dtype but the new decays, and it runs."""
    teacher = make_lm(tie_embeddings=False).to(dtype)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = student_from(teacher, mixers)
    assert student.config == dataclasses.replace(teacher.config, mixers=mixers)
    shared = {name: tensor for name, tensor in student.state_dict().items() if name in before}
    assert len(shared) == 3 + 3 * 5 + 4 * mixers.count("attention")
    assert all(torch.equal(tensor, before[name]) for name, tensor in shared.items())
    for name, parameter in student.named_parameters():
        kept = name not in before and name.endswith(("A_log", "A_log_bias", ".D", "dt_proj.bias"))
        assert parameter.dtype == (torch.float32 if kept else dtype), name
    assert student(random_tokens(1, 5)).isfinite().all()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_goes_where_it_belongs(make_lm, kv_heads):
    """Q to C, K to B, V to x, O to out; in mamba (of d_state 8: 1 kv head has 8 channels) K and V
    keep their size. Red if kv heads are tiled or repeated row by row."""
    teacher = make_lm(n_kv_heads=kv_heads)
    students = [student_from(teacher, [word] * 3, d_state=8) for word in ("mamba", "mamba2")]
    for layer, mamba, mamba2 in zip(teacher.layers, *(student.layers for student in students)):
        attention, mamba, mamba2 = layer.self_attn, mamba.mamba, mamba2.mamba2
        q, k, v, o = (getattr(attention, f"{name}_proj").weight for name in "qkvo")
        k_all, v_all = (repeat_heads(weight, 4 // kv_heads) for weight in (k, v))
        x, B, C = mamba2.in_proj.weight[:96].split(32)
        pairs = [(x, v_all), (B, k_all), (C, q), (mamba2.out_proj.weight, o),
                 (mamba.in_proj_x.weight, v), (mamba.B_proj.weight, k), (mamba.C_proj.weight, q),
                 (mamba.out_proj.weight, o)]
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_without_transfer_only_projections_of_new_mixers_differ(make_lm, mixer):
    """What the transfer is worth is seen beside a student that differs in nothing else."""
    teacher, students = make_lm(), []
    for transfer in True, False:
        torch.manual_seed(1)
        students.append(student_from(teacher, [mixer] * 3, transfer=transfer).state_dict())
    moved = re.compile(r"\.mamba2?\.(in_proj|out_proj|C_proj|B_proj|in_proj_x)\.weight")
    for name, tensor in students[0].items():
        other = students[1][name]
        assert torch.equal(tensor, other) != bool(moved.search(name)), name
        if name.endswith("mamba2.in_proj.weight"):  # x, B and C, each of them
            pairs = zip(tensor[:96].split(32), other[:96].split(32))
            assert not any(torch.equal(a, b) for a, b in pairs)


def test_a_state_unlike_the_head_takes_x_and_out_only(make_lm):
    """d_state = 20 leaves mamba2 no place for q and k."""
    teacher = make_lm()
    attention = teacher.layers[0].self_attn
    mixer = student_from(teacher, ["mamba2"] * 3, d_state=20).layers[0].mamba2
    x, B, C = mixer.in_proj.weight[:32 + 2 * 80].split([32, 80, 80])
    assert torch.equal(x, repeat_heads(attention.v_proj.weight, 2))
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)
    assert B.std() > 0.1 and C.std() > 0.1


def test_a_student_starts_as_documented(make_lm):
    """Convolutions pass the current token; mamba2's gate is 1 for every input, its decays go from
    0.998 to 0.5, one a head, the same for every token, and it has no skip; mamba's A is -1 .. -16
    and its dt from 0.001 to 0.1."""
    mamba, mamba2 = (student_from(make_lm(), [word] * 3).layers[0].mixer
                     for word in ("mamba", "mamba2"))
    for conv in mamba.conv1d, mamba2.conv1d:
        assert not conv.weight[:, :, :-1].any() and not conv.bias.any()
        assert (conv.weight[:32, :, -1] == 1).all() and (conv.weight[32:, :, -1] == 1 / 8).all()
    *_, z, log_decay = mamba2.project(random_inputs(2, 9, 32))
    assert_close(F.silu(z + mamba2.z_bias), torch.ones_like(z))
    wanted = torch.sigmoid(torch.tensor([6.0, 4.0, 2.0, 0.0])).expand(2, 9, 4)
    assert_close(log_decay.exp(), wanted)
    assert not mamba2.D.any()
    assert_close(mamba.A_log.exp(), torch.arange(1.0, 17).expand(32, 16))
    dt = F.softplus(mamba.dt_proj.bias)
    assert 0.999e-3 < dt.min() and dt.max() < 0.1001 and dt.max() / dt.min() > 3


def test_a_student_can_be_a_teacher(make_lm):
    """Its Mamba layers are kept with their weights while attention is replaced; never back."""
    hybrid = make_lm(["mamba", "attention", "attention"])
    student = student_from(hybrid, ["mamba", "mamba2", "attention"]).state_dict()
    for name, tensor in hybrid.state_dict().items():
        if name.startswith(("model.layers.0.", "model.layers.2.")):
            assert torch.equal(student[name], tensor), name
    with pytest.raises(ValueError, match="layer 0 of the teacher is mamba: .* into attention"):
        student_from(hybrid, ["attention"] * 3)
    with pytest.raises(ValueError, match="layer 2 of the teacher is attention: .* mamba2_step"):
        student_from(hybrid, ["mamba", "attention", "mamba2_step"])
    with pytest.raises(ValueError, match="d_state = 4: a mixer that is kept"):
        student_from(hybrid, ["mamba", "mamba2", "mamba2"], d_state=4)
    with pytest.raises(ValueError, match="1 entries for n_layers = 3"):
        student_from(hybrid, ["mamba"])


# ---- a mixer of one's own
class GatedLinearAttention(nn.Module):
    """h_t = diag(a_t) h_{t-1} + k_t v_t^T, y_t = q_t h_t (Yang et al. 2024), as a plain loop."""
    key, output, float32 = "gla", "o_proj", ("decay_bias",)

    def __init__(self, config):
        super().__init__()
        self.n_heads, inner = config.n_heads, config.n_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.a_proj = (
            nn.Linear(config.d_model, inner, bias=False) for _ in range(4))
        self.decay_bias = nn.Parameter(torch.zeros(inner))
        self.o_proj = nn.Linear(inner, config.d_model, bias=False)

    def init_cache(self, batch, max_length, like, state_dtype):
        size = self.o_proj.in_features // self.n_heads
        return dict(h=like.new_zeros(batch, self.n_heads, size, size, dtype=state_dtype))

    def project(self, u):
        """q, k, v and the log decay, (B, L, H, P) float32."""
        q, k, v, a = (layer(u).float() for layer in
                      (self.q_proj, self.k_proj, self.v_proj, self.a_proj))
        log_decay = F.logsigmoid(a + self.decay_bias) / 16
        return (w.unflatten(-1, (self.n_heads, -1)) for w in (q, k, v, log_decay))

    def forward(self, u, rope, cache=None, reads=None):
        q, k, v, log_decay = self.project(u)
        if reads is not None and reads.valid is not None:  # padding: nothing enters or decays
            k, log_decay = (w * reads.valid[..., None, None] for w in (k, log_decay))
        h, ys = 0.0 if cache is None else cache["h"].float(), []  # (B, H, P, P)
        for t in range(u.shape[1]):
            h = log_decay[:, t, :, :, None].exp() * h + k[:, t, :, :, None] * v[:, t, :, None]
            ys.append((q[:, t, :, :, None] * h).sum(-2))  # (B, H, P)
        if cache is not None:
            cache["h"].copy_(h)
        return self.o_proj(torch.stack(ys, 1).flatten(2).to(u.dtype))

    def mixing_matrix(self, u, rope):
        q, k, _, log_decay = self.project(u)
        total = log_decay.cumsum(1)
        decay = (total[:, :, None] - total[:, None]).clamp(max=0).exp()  # (B, L, L, H, P)
        return torch.einsum("bthn,bshn,btshn->bhts", q, k, decay).tril()


def gla_from_attention(gla, attention, transfer):
    if transfer:
        repeats = attention.n_heads // attention.n_kv_heads
        gla.q_proj.weight.copy_(attention.q_proj.weight)
        gla.k_proj.weight.copy_(repeat_heads(attention.k_proj.weight, repeats))
        gla.v_proj.weight.copy_(repeat_heads(attention.v_proj.weight, repeats))
        gla.o_proj.weight.copy_(attention.o_proj.weight)


@pytest.fixture
def gla(monkeypatch):
    """Two entries, and nothing else in the repository, make the mixer known; the mixers' words."""
    monkeypatch.setitem(model.MIXERS, "gla", GatedLinearAttention)
    monkeypatch.setitem(model.FROM_ATTENTION, GatedLinearAttention, gla_from_attention)
    return ["gla", "attention", "gla"]


def test_a_mixer_of_ones_own_decodes_ragged_rows(make_lm, gla):
    """Also prepared (three joined products, one of them attention's), and from bfloat16 states."""
    lm, tokens = make_lm(gla), random_tokens(3, 12)
    check_ragged(lm, [3, 11, 1, 6])
    wanted = lm(tokens)
    half = decode(lm, tokens, [3] + [1] * 9, state_dtype=torch.bfloat16)
    assert_close(half, wanted, torch.bfloat16)
    assert len(products(prepare(lm))) == 6
    check_ragged(lm, [3, 11, 1, 6])
    assert_close(lm(tokens), wanted)


def test_a_mixer_of_ones_own_is_distilled_saved_and_loaded(make_lm, gla, tmp_path):
    """From attention's weights, through both losses of MOHAWK with gradients in all that they
    reach, to a folder and back, in bfloat16 with its float32 parameter."""
    teacher, tokens = make_lm(), random_tokens(2, 9)
    student = student_from(teacher, gla)
    for i in 0, 2:
        assert torch.equal(student.layers[i].gla.k_proj.weight,
                           repeat_heads(teacher.layers[i].self_attn.k_proj.weight, 2))
    without = student_from(teacher, gla, transfer=False).layers[0].gla
    assert not torch.equal(without.q_proj.weight, teacher.layers[0].self_attn.q_proj.weight)
    valid = torch.ones(2, 9, dtype=torch.bool)
    mixed = {"q_proj.weight", "k_proj.weight", "a_proj.weight", "decay_bias"}
    for loss, reached in ((distill.matrix_loss, mixed),
                          (distill.hidden_loss, mixed | {"v_proj.weight", "o_proj.weight"})):
        student.zero_grad()
        loss(student, teacher, tokens, valid).backward()
        found = {name for name, parameter in student.layers[2].gla.named_parameters()
                 if parameter.grad is not None and parameter.grad.abs().max() > 0}
        assert found == reached
    student.save_pretrained(tmp_path)
    loaded = LM.from_pretrained(str(tmp_path))
    assert loaded.config.mixers == gla and torch.equal(loaded(tokens), student(tokens))
    half = LM.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in half.layers[0].gla.named_parameters()}
    assert dtypes.pop("decay_bias") == torch.float32 and set(dtypes.values()) == {torch.bfloat16}
    with torch.no_grad():
        assert_close(half(tokens), student(tokens), times=2)  # as for the mixers of model.py
