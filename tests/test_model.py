"""What model.py promises: Llama is Hugging Face's Llama, the Mamba mixers are their formulas, decoding equals the parallel
forward pass whatever else is in the batch, and a student starts from its teacher's weights."""
import dataclasses
import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from conftest import TOLERANCE
import kernels
import model
from model import LM, Config, choose_device, rope_frequencies, student_from

LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)


def random_tokens(*shape, seed=1, vocab=50):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def assert_near(actual, expected, tolerance=TOLERANCE[torch.float32]):
    """Equal up to `tolerance` of the scale of what is expected."""
    assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


# ------------------------------------------------------------------------------------------------ Llama = Hugging Face's
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


@pytest.mark.parametrize("fields", LLAMAS.values(), ids=LLAMAS.keys())
def test_logits_equal_hugging_face(make_lm, hugging_face, tmp_path, fields):
    """The same folder in both. Red for interleaved instead of half-split RoPE, kv heads tiled instead of repeated, eps or
    theta lost on the way, or a checkpoint that transformers would fill up with random weights."""
    lm = make_lm(**fields)
    lm.save_pretrained(tmp_path)
    hf, info = hugging_face.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    tokens = random_tokens(2, 40)  # longer than the original context of LLAMA3
    with torch.no_grad():
        assert_near(lm(tokens), hf(tokens).logits, 1e-4)


def old_layout(config, kind):
    """rope_parameters as config.json had them before transformers 5."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope[kind] = rope.pop("rope_type")
    config["rope_scaling"] = rope if rope[kind] != "default" else None


@pytest.mark.parametrize("layout", ["rope_parameters", "rope_scaling", "rope_scaling, type", "sharded"])
@pytest.mark.parametrize("fields", [dict(), dict(tie_embeddings=False, rope_scaling=LLAMA3)], ids=["plain", "untied, llama3"])
def test_hugging_face_folders_load(make_lm, hugging_face, tmp_path, fields, layout):
    """Written by transformers, in the layout of its version 5 and in the older ones that most repositories still have."""
    (tmp_path / "ours").mkdir()
    make_lm(**fields, rope_theta=500.0, eos_ids=[3, 4]).save_pretrained(tmp_path / "ours")
    hf = hugging_face.from_pretrained(tmp_path / "ours")
    hf.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if layout == "sharded" else "1GB")
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    if layout.startswith("rope_scaling"):
        old_layout(config, "type" if "," in layout else "rope_type")
        path.write_text(json.dumps(config))
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (layout == "sharded")
    lm = LM.from_pretrained(str(tmp_path / "theirs"))
    assert lm.config.eos_ids == [3, 4] and lm.config.rope_theta == 500.0
    tokens = random_tokens(2, 40)
    with torch.no_grad():
        assert_near(lm(tokens), hf(tokens).logits, 1e-4)


def test_a_tied_head_that_is_stored_all_the_same_is_ignored(make_lm, tmp_path):
    lm = make_lm()
    lm.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    assert torch.equal(LM.from_pretrained(str(tmp_path))(random_tokens(1, 5)), lm(random_tokens(1, 5)))


def formula(config, s):
    """Llama 3's frequencies, pair by pair, as the release defines them: by wavelength w against the original context."""
    frequencies, kinds = [], []
    for i in range(config.head_dim // 2):
        f = config.rope_theta ** (-2 * i / config.head_dim)
        w, old = 2 * math.pi / f, s["original_max_position_embeddings"]
        m = (old / w - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        kind = "divided" if w > old / s["low_freq_factor"] else "kept" if w < old / s["high_freq_factor"] else "blended"
        frequencies.append({"divided": f / s["factor"], "kept": f, "blended": (1 - m) * f / s["factor"] + m * f}[kind])
        kinds.append(kind)
    return torch.tensor(frequencies, dtype=torch.float32), [kinds.count(kind) for kind in ("kept", "blended", "divided")]


@pytest.mark.parametrize("head_dim, factor, counts", [(64, 32.0, [15, 3, 14]), (128, 8.0, [29, 6, 29])])
def test_llama3_rope_frequencies(head_dim, factor, counts):
    """Llama-3.2-1B and Llama-3.1-8B: 15 of 32 pairs keep their frequency, 3 are blended, 14 are divided by the factor."""
    scaling = LLAMA3 | dict(factor=factor, original_max_position_embeddings=8192)
    config = Config(d_model=4 * head_dim, rope_theta=500000.0, rope_scaling=scaling)
    expected, found = formula(config, scaling)
    assert found == counts
    assert_close(rope_frequencies(config), expected, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------ decoding
def decode(lm, tokens, splits):
    """Logits of tokens (B, L) fed to a state in pieces of the given lengths."""
    assert sum(splits) == tokens.shape[1]
    state = lm.init_state(len(tokens), tokens.shape[1])
    return torch.cat([lm(piece, state) for piece in tokens.split(splits, dim=1)], dim=1)


@pytest.mark.parametrize("splits", [[1] * 23, [22, 1], [5] + [1] * 18, [2, 1, 1, 7, 3, 9]], ids=["1 by 1", "22+1", "5, 1s", "mix"])
def test_decoding_equals_one_forward_pass(make_lm, pattern, splits):
    """Red if a cache is off by one column, a convolution's window holds the wrong tokens, or a state loses precision."""
    lm, tokens = make_lm(pattern, rope_scaling=LLAMA3), random_tokens(3, 23)
    assert_near(decode(lm, tokens, splits), lm(tokens))


def test_packed_prompts_are_as_if_run_alone(make_lm, pattern):
    """Logits and every tensor of the state. Red if a prompt's attention, convolution or scan sees the prompt before it."""
    lm, prompts = make_lm(pattern, rope_scaling=LLAMA3), [random_tokens(n, seed=n).tolist() for n in (5, 1, 13, 2, 5)]
    states, logits = lm.prefill(prompts)
    for prompt, state, last in zip(prompts, states, logits, strict=True):
        alone = lm.init_state(1, len(prompt))
        assert_near(last, lm(torch.tensor([prompt]), alone)[0, -1])
        assert state.lengths.tolist() == alone.lengths.tolist() == [len(prompt)]
        for mine, theirs in zip(state.layers, alone.layers, strict=True):
            for name, tensor in theirs.items():
                assert mine[name].shape == tensor.shape
                assert_near(mine[name], tensor)


@pytest.mark.parametrize("in_kernels", [False, True])
def test_decoding_as_on_a_gpu(make_lm, pattern, monkeypatch, in_kernels):
    """Attention to the cache by the lengths on the device; by the interpreted Triton kernels too, with all of the others."""
    if in_kernels:
        pytest.importorskip("triton")
        monkeypatch.setattr(kernels, "_use_triton", lambda backend, *tensors: True)
    monkeypatch.setattr(model.CacheReads, "ON_DEVICE", ("cpu",))
    lm, tokens = make_lm(pattern), random_tokens(2, 8)
    assert_near(decode(lm, tokens, [5, 1, 1, 1]), lm(tokens))


def ragged_state(lm, prompts, room):
    """A batch whose row i has seen prompts[i]: prefilled one by one, then put side by side."""
    state = lm.init_state(len(prompts), max(map(len, prompts)) + room)
    for row, prompt in enumerate(prompts):
        alone = lm.init_state(1, len(prompt))
        lm(prompt[None], alone)
        state.put(row, alone)
    return state


@pytest.mark.parametrize("lengths", [[3, 11, 1, 6], [1 + 7 * i % 13 for i in range(70)]], ids=["4 rows", "70 rows"])
@pytest.mark.parametrize("splits", [[1] * 9, [4, 1, 4]], ids=["tokens", "pieces"])
def test_rows_of_different_lengths_decode_as_if_alone(make_lm, pattern, lengths, splits):
    """Prompts of 1 to 13 tokens in one batch, continued together. Red if positions, masks or windows are shared by rows
    (70 rows: more than attention reads at a time)."""
    lm = make_lm(pattern)
    rows = [random_tokens(length + 9, seed=i) for i, length in enumerate(lengths)]
    state = ragged_state(lm, [row[:-9] for row in rows], room=9)
    pieces = torch.stack([row[-9:] for row in rows]).split(splits, dim=1)
    logits = torch.cat([lm(piece, state) for piece in pieces], dim=1)
    for i in range(0, len(rows), 5 if len(rows) > 5 else 1):
        assert_near(logits[i], lm(rows[i][None])[0, -9:])
    assert state.lengths.tolist() == [len(row) for row in rows]


def test_a_row_does_not_depend_on_its_neighbours(make_lm, pattern):
    """Other neighbours, of other lengths: row 0 stays the same. Red if anything is normalised or masked batch-wide."""
    lm, mine = make_lm(pattern), random_tokens(6)
    results = []
    for seed, lengths in ((5, (3, 4, 5)), (6, (14, 1, 2))):
        others = [random_tokens(length, seed=seed + i) for i, length in enumerate(lengths)]
        state = ragged_state(lm, [mine[:4], *others], room=4)
        results.append([lm(torch.cat([mine[None, t:t + 1], random_tokens(3, 1, seed=seed + t)]), state)[0] for t in (4, 5)])
    for first, second in zip(*results):
        assert_near(first, second)
    others = lm(torch.stack([mine, random_tokens(6, seed=8)])), lm(torch.stack([mine, random_tokens(6, seed=9)]))
    assert_near(others[0][0], others[1][0])


def test_the_future_changes_nothing(make_lm, pattern):
    """Causality, for every token: changing token t leaves the logits before t as they were, and changes those at t."""
    lm, tokens = make_lm(pattern), random_tokens(1, 12)
    before = lm(tokens)
    for t in (1, 6, 11):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 50
        after = lm(changed)
        assert_near(after[:, :t], before[:, :t])
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


@pytest.mark.parametrize("keep", [[2, 0, 3, 1], [3, 1], [0], [1, 2, 3]], ids=str)
def test_selected_rows_go_on_as_before(make_lm, pattern, keep):
    """Sorting or shrinking a batch in the middle, then starting a new row in a freed place, changes no row's logits."""
    lm = make_lm(pattern)
    rows = [random_tokens(length + 6, seed=i) for i, length in enumerate((3, 9, 1, 5))]
    state = ragged_state(lm, [row[:-6] for row in rows], room=6)
    lm(torch.stack([row[-6:-3] for row in rows]), state)
    state.select(torch.tensor(keep))
    rows = [rows[i] for i in keep]
    assert state.lengths.tolist() == [len(row) - 3 for row in rows]
    if len(keep) == 3:
        rows[1] = random_tokens(5, seed=30)
        alone = lm.init_state(1, 2)
        lm(rows[1][None, :2], alone)
        state.put(1, alone)
    logits = torch.stack([lm(torch.stack([row[t:][:1] for row in rows]), state)[:, 0] for t in (-3, -2, -1)], dim=1)
    for row, found in zip(rows, logits):
        assert_near(found, lm(row[None])[0, -3:])


def test_two_states_of_one_model_do_not_meet(make_lm, pattern):
    """Interleaved decoding of two batches: red if a position, a cache or a mode lives on the modules."""
    lm, one, two = make_lm(pattern), random_tokens(2, 8), random_tokens(3, 8, seed=2)
    states = lm.init_state(2, 8), lm.init_state(3, 8)
    found = [(lm(one[:, t:t + 1], states[0])[:, 0], lm(two[:, t:t + 1], states[1])[:, 0]) for t in range(8)]
    assert_near(torch.stack([a for a, _ in found], 1), lm(one))
    assert_near(torch.stack([b for _, b in found], 1), lm(two))


def test_only_attention_pays_for_length(make_lm, pattern):
    """The point of the exercise: the memory of a Mamba layer does not grow with max_length, and its state is float32."""
    sizes = [[sum(t.numel() for t in layer.values()) for layer in make_lm(pattern).init_state(2, n).layers] for n in (10, 100)]
    for mixer, short, long in zip(pattern, *sizes):
        assert long == (10 * short if mixer == "attention" else short)
    for mixer, layer in zip(pattern, make_lm(pattern).bfloat16().init_state(2, 10).layers):
        assert mixer == "attention" or layer["h"].dtype == torch.float32


def test_decoding_needs_no_special_mode(make_lm, pattern):
    """As in the first lines of model.py: a state also works for a model whose parameters want gradients."""
    lm, tokens = make_lm(pattern).requires_grad_(True), random_tokens(2, 6)
    assert_near(decode(lm, tokens, [3, 1, 1, 1]).detach(), lm(tokens).detach())


def test_bfloat16_stays_close_to_float32(make_lm, pattern, tmp_path):
    """Loaded as bfloat16, as on a GPU: decay rates stay float32, and forward and decoding both work and stay close."""
    make_lm(pattern).save_pretrained(tmp_path)
    lm, half = LM.from_pretrained(str(tmp_path)), LM.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    dtypes = {name.rsplit(".", 1)[1] if "A_log" in name else name: p.dtype for name, p in half.named_parameters()}
    assert half.dtype == torch.bfloat16 and dtypes["model.norm.weight"] == torch.bfloat16
    assert dtypes.get("A_log", torch.float32) == dtypes.get("A_log_bias", torch.float32) == torch.float32
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        logits = lm(tokens)
        for found in (half(tokens), decode(half, tokens, [5, 1, 1, 5])):
            assert found.dtype == torch.bfloat16
            assert (found.float() - logits).norm() < 0.03 * logits.norm()


# ------------------------------------------------------------------------------------------------ fused weights
@pytest.mark.parametrize("packed", [False, True])
def test_fused_weights_give_the_same_logits(make_lm, pattern, monkeypatch, packed):
    """Red if joined layers are split in another order than they were joined. Fusing twice is fusing once."""
    monkeypatch.setattr(model, "PACK_FROM", 0 if packed else 2 ** 30)
    lm, tokens = make_lm(pattern), random_tokens(3, 9)
    expected, size = lm(tokens), lm.num_parameters()
    assert_near(lm.fuse().fuse()(tokens), expected)
    assert_near(decode(lm, tokens, [4, 1, 1, 3]), expected)
    assert lm.num_parameters() == size


def test_fused_weights_are_views_and_take_no_more_memory(make_lm, pattern):
    """What is saved stays what it was, name by name."""
    lm = make_lm(pattern, tie_embeddings=False)
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    after = lm.fuse().state_dict()
    assert after.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    joined = [module for module in lm.modules() if hasattr(module, "joined")]
    assert joined and all(layer.weight.data_ptr() == layer.joined.data_ptr() for layer in joined)
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in after.values()}
    assert sum(memory.values()) == sum(tensor.numel() * 4 for tensor in before.values())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_packed_weights_replace_the_plain_ones_but_the_tied_embedding(make_lm, monkeypatch):
    """The peak of memory is one copy of the weights; a model that can no longer be saved says so."""
    monkeypatch.setattr(model, "PACK_FROM", 0)
    lm = make_lm(["attention", "mamba", "mamba2"]).fuse()
    assert not lm.model.embed_tokens.weight.is_meta
    assert all(lm.get_parameter(name).is_meta for name in (
        "model.layers.0.self_attn.k_proj.weight", "model.layers.1.mamba.out_proj.weight", "model.layers.2.mlp.down_proj.weight"))


# ------------------------------------------------------------------------------------------------ mixers = their formulas
def literal_conv(x, conv):
    """Causal depthwise convolution, one multiplication at a time. x (L, D)."""
    width = conv.weight.shape[2]
    y = torch.zeros_like(x)
    for t in range(len(x)):
        y[t] = conv.bias.double()
        for k in range(width):
            if t - (width - 1) + k >= 0:
                y[t] += conv.weight[:, 0, k].double() * x[t - (width - 1) + k]
    return y


def literal_mamba(mixer, u, repeats):
    """The Mamba-1 mixer of MambaInLlama, channel by channel. u (L, d_model) float64."""
    def linear(name):
        return u @ getattr(mixer, name).weight.double().T

    def repeat(v):  # groups of N channels, each `repeats` times in a row
        return torch.cat([group for group in v.split(size, dim=-1) for _ in range(repeats)], dim=-1)

    size = mixer.A_log.shape[1]
    x, B, C = F.silu(literal_conv(repeat(linear("in_proj_x")), mixer.conv1d)), repeat(linear("B_proj")), linear("C_proj")
    dt = F.softplus(linear("dt_proj_down") @ mixer.dt_proj.weight.double().T + mixer.dt_proj.bias.double())
    A, y = -mixer.A_log.double().exp(), torch.zeros_like(x)
    for c in range(x.shape[1]):
        group, h = slice(c // size * size, c // size * size + size), torch.zeros(size, dtype=torch.float64)
        for t in range(len(x)):
            h = torch.exp(dt[t, c] * A[c]) * h + dt[t, c] * x[t, c] * B[t, group]
            y[t, c] = C[t, group] @ h + mixer.D[c].double() * x[t, c]
    return (y * F.silu(linear("in_proj_z"))) @ mixer.out_proj.weight.double().T


def literal_mamba2(mixer, u, n_heads, head_dim, d_state):
    """The discrete Mamba-2 mixer of Llamba, head by head: rows x | B | C | z | a of in_proj. u (L, d_model) float64."""
    inner, keys = n_heads * head_dim, n_heads * d_state
    x, B, C, z, a = (u @ mixer.in_proj.weight.double().T).split([inner, keys, keys, inner, n_heads], dim=-1)
    x, B, C = literal_conv(torch.cat([x, B, C], dim=-1), mixer.conv1d).split([inner, keys, keys], dim=-1)
    decay, y = torch.sigmoid(-(a + mixer.A_log_bias.double())), torch.zeros_like(x)
    for i in range(n_heads):
        rows, columns = slice(i * head_dim, (i + 1) * head_dim), slice(i * d_state, (i + 1) * d_state)
        h = torch.zeros(head_dim, d_state, dtype=torch.float64)
        for t in range(len(x)):
            h = decay[t, i] * h + torch.outer(x[t, rows], B[t, columns])
            y[t, rows] = h @ C[t, columns] + mixer.D[i].double() * x[t, rows]
    return (y * F.silu(z + mixer.z_bias.double())) @ mixer.out_proj.weight.double().T


@pytest.mark.parametrize("fields", [dict(head_dim=16), dict(n_kv_heads=4), dict(d_state=4)], ids=["GQA", "no GQA", "d_state 4"])
def test_mamba_equals_its_formulas(make_lm, fields):
    """Red if dt's bias counts twice, B or C goes through the convolution, D is forgotten, or groups are tiled."""
    lm = make_lm(["mamba"], **fields)
    mixer, repeats = lm.layers[0].mix(), 4 // lm.config.n_kv_heads
    u = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(3))
    expected = torch.stack([literal_mamba(mixer, row.double(), repeats) for row in u])
    assert_near(mixer(u, None).double(), expected)


@pytest.mark.parametrize("d_state", [None, 6], ids=["d_state = head_dim", "d_state 6"])
def test_mamba2_equals_its_formulas(make_lm, d_state):
    """Red if the rows of in_proj are in another order, decay has the wrong sign, or the gate comes before the skip."""
    mixer = make_lm(["mamba2"], d_state=d_state).layers[0].mix()
    u = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(3))
    expected = torch.stack([literal_mamba2(mixer, row.double(), 4, 8, d_state or 8) for row in u])
    assert_near(mixer(u, None).double(), expected)


def test_the_matrix_of_mamba2_is_what_the_mixer_does(make_lm):
    """Matrix orientation trains `matrix`; it is of no use unless y = T x is what the forward pass computes."""
    mixer = make_lm(["mamba2"]).layers[0].mix()
    u = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(3))
    x = (u @ mixer.in_proj.weight.T).split([32, 32, 32, 32, 4], dim=-1)
    conv = SimpleNamespace(weight=mixer.conv1d.weight[:32], bias=mixer.conv1d.bias[:32])
    values = torch.stack([literal_conv(row.double(), conv) for row in x[0]]).float()
    T = mixer.matrix(u, None)
    assert T.shape == (2, 4, 21, 21) and not T.triu(1).any()
    y = torch.einsum("bhts,bshp->bthp", T, values.unflatten(-1, (4, 8))).flatten(2)
    assert_near(mixer.out_proj(y * F.silu(x[3] + mixer.z_bias)), mixer(u, None))


def test_the_matrix_of_attention_is_what_attention_does(make_lm):
    """Causal, rows that sum to 1, and times the repeated values equal to the layer's output: the target of stage one."""
    lm = make_lm()
    attention = lm.layers[0].mix()
    u = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(3))
    rope = lm.rope(torch.arange(21)[None])
    T = attention.matrix(u, rope)
    assert_close(T.sum(-1), torch.ones(2, 4, 21))
    assert not T.triu(1).any()
    v = attention.v_proj(u).unflatten(-1, (2, 8)).repeat_interleave(2, dim=2)
    assert_near(attention.o_proj(torch.einsum("bhts,bshp->bthp", T, v).flatten(2)), attention(u, rope))


# ------------------------------------------------------------------------------------------------ saving and loading
def test_saving_and_loading_is_the_identity(make_lm, pattern, tmp_path):
    """Every bit of every tensor, and the configuration. Red if a field is not written, or a tensor is cast."""
    for i, fields in enumerate((dict(), dict(tie_embeddings=False, norm_eps=1e-3, rope_theta=77.0, eos_ids=[7], d_conv=3,
                                             d_state=4, dt_rank=5, max_length=99))):
        lm = make_lm(pattern, **fields)
        lm.save_pretrained(tmp_path / str(i))
        loaded = LM.from_pretrained(str(tmp_path / str(i)))
        assert loaded.config == lm.config
        ours, theirs = lm.state_dict(), loaded.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
        assert torch.equal(loaded(random_tokens(2, 9)), lm(random_tokens(2, 9)))
        assert sorted(os.listdir(tmp_path / str(i))) == ["config.json", "model.safetensors"]


def test_a_scaled_rope_survives_saving(make_lm, tmp_path):
    lm = make_lm(rope_scaling=LLAMA3)
    for _ in range(2):  # twice: what was added on the first way must not matter on the second
        lm.save_pretrained(tmp_path)
        lm = LM.from_pretrained(str(tmp_path))
    assert {key: lm.config.rope_scaling[key] for key in LLAMA3} == LLAMA3
    assert torch.equal(rope_frequencies(lm.config), rope_frequencies(make_lm(rope_scaling=LLAMA3).config))


def test_a_loaded_model_can_be_trained_and_sampled_alternately(make_lm, tmp_path):
    """Tensors made under inference mode must not stay behind on the model. Red if RoPE's angles are kept as such."""
    make_lm().save_pretrained(tmp_path)
    lm = LM.from_pretrained(str(tmp_path))
    with torch.inference_mode():
        lm(random_tokens(1, 5))
    lm(random_tokens(1, 5)).sum().backward()
    assert all(p.grad is not None for p in lm.parameters())


@pytest.fixture
def saved(make_lm, tmp_path):
    make_lm().save_pretrained(tmp_path)
    return tmp_path


def edit(folder, change):
    """Apply `change` to the dict of tensors in a saved folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(TENSOR), rf"{re.escape(TENSOR)} is missing.*\(48, 32\)"),
    (lambda t: t.update({"model.layers.1.mlp.odd.weight": torch.zeros(2, 3)}), r"model\.layers\.1\.mlp\.odd\.weight.*\(2, 3\)"),
    (lambda t: t.update({TENSOR: torch.zeros(32, 48)}), rf"{re.escape(TENSOR)} has shape \(32, 48\), expected \(48, 32\)"),
], ids=["missing", "extra", "misshapen"])
def test_a_wrong_tensor_is_named_with_its_shapes(saved, change, message):
    """Red if loading is lenient: a missing tensor would quietly stay random."""
    edit(saved, change)
    with pytest.raises(ValueError, match=message):
        LM.from_pretrained(str(saved))


@pytest.mark.parametrize("content", [b"", b"not a model", None], ids=["empty", "garbage", "cut in half"])
def test_an_unreadable_weight_file_is_named(saved, content):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2] if content is None else content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        LM.from_pretrained(str(saved))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", None])
def test_a_missing_file_or_folder_is_named(saved, name):
    shutil.rmtree(saved) if name is None else os.remove(saved / name)
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(str(saved))):
        LM.from_pretrained(str(saved))


def config_edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


@pytest.mark.parametrize("changes, message", [
    (dict(model_type="gpt2"), "model_type 'gpt2'"),
    (dict(model_type="absent"), "model_type"),
    (dict(attention_bias=True), "attention_bias"),
    (dict(rope_scaling=dict(rope_type="yarn", factor=2.0)), "RoPE type 'yarn'"),
    (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "RoPE type 'dynamic'"),
    (dict(rope_parameters=dict(rope_type="longrope", rope_theta=1e4)), "RoPE type 'longrope'"),
    (dict(hidden_size="absent"), "hidden_size"),
    (dict(mixers=["attention", "attention", "rwkv"]), "unknown mixer 'rwkv'"),
])
def test_an_unsupported_config_is_refused_by_name(saved, changes, message):
    config_edit(saved, **changes)
    with pytest.raises(ValueError, match=message):
        LM.from_pretrained(str(saved))


def test_an_unreadable_config_is_named(saved):
    (saved / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match=re.escape(str(saved / "config.json"))):
        LM.from_pretrained(str(saved))


def test_llama3_rope_without_its_factors_is_refused_by_name(saved):
    config_edit(saved, rope_scaling=dict(rope_type="llama3", factor=8.0))
    with pytest.raises(ValueError, match="low_freq_factor"):
        LM.from_pretrained(str(saved))


@pytest.mark.parametrize("fields, message", [
    (dict(n_layers=2, mixers=["attention"]), "mixers has 1 entries for n_layers = 2"),
    (dict(n_layers=1, mixers=["rwkv"]), "unknown mixer 'rwkv'.*attention, mamba, mamba2"),
    (dict(head_dim=15), "head_dim = 15 is odd"),
    (dict(n_heads=4, n_kv_heads=3), "n_heads = 4 .* n_kv_heads = 3"),
    (dict(rope_scaling=dict(rope_type="linear", factor=2.0)), "'linear'"),
    (dict(n_layers=1, mixers=["mamba"], head_dim=6, n_kv_heads=1), "d_state = 16"),
])
def test_impossible_configs_are_refused_with_the_values(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_unknown_config_fields_are_refused():
    with pytest.raises(TypeError, match="n_layer"):
        Config(n_layer=3)


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="--device cpu"):
        choose_device("cuda")


# ------------------------------------------------------------------------------------------------ teacher -> student
def weights(lm):
    return {name: tensor.clone() for name, tensor in lm.state_dict().items()}


STUDENTS = {"mamba": ["mamba"] * 3, "mamba2": ["mamba2"] * 3, "hybrid": ["mamba2", "attention", "mamba"]}


@pytest.mark.parametrize("mixers", STUDENTS.values(), ids=STUDENTS.keys())
def test_a_student_copies_everything_but_the_replaced_mixers(make_lm, mixers):
    """Embeddings, head, norms, MLPs and kept attention layers; in memory of its own; the teacher stays as it was."""
    teacher = make_lm(tie_embeddings=False)
    before = weights(teacher)
    student = student_from(teacher, mixers)
    assert student.config == dataclasses.replace(teacher.config, mixers=mixers)
    names = {"mamba": "mamba", "mamba2": "mamba2", "attention": "self_attn"}
    shared = 0
    for name, tensor in student.state_dict().items():
        layer = re.match(r"model\.layers\.(\d+)\.(\w+)", name)
        if layer is None or layer[2] != names[mixers[int(layer[1])]] or mixers[int(layer[1])] == "attention":
            assert torch.equal(tensor, before[name]), name
            shared += 1
    assert shared == 3 + 3 * 5 + 4 * mixers.count("attention")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_an_all_attention_student_is_its_teacher(make_lm):
    teacher = make_lm(n_kv_heads=1)
    assert torch.equal(student_from(teacher, ["attention"] * 3)(random_tokens(2, 9)), teacher(random_tokens(2, 9)))


def repeat_heads(weight, head_dim, times):
    """[k1, k2] -> [k1, k1, k2, k2]: whole heads, as query heads 0 and 1 share kv head 0."""
    return torch.cat([head for head in weight.split(head_dim) for _ in range(times)])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_weights_go_where_they_belong_in_mamba2(make_lm, kv_heads):
    """Q to C, K to B, V to x, O to out. Red if kv heads are tiled ([k1, k2, k1, k2]) or repeated row by row."""
    teacher = make_lm(n_kv_heads=kv_heads)
    student = student_from(teacher, ["mamba2"] * 3)
    for source, block in zip(teacher.layers, student.layers):
        attention, mixer = source.self_attn, block.mamba2
        x, B, C = mixer.in_proj.weight[:96].split(32)
        assert torch.equal(x, repeat_heads(attention.v_proj.weight, 8, 4 // kv_heads))
        assert torch.equal(B, repeat_heads(attention.k_proj.weight, 8, 4 // kv_heads))
        assert torch.equal(C, attention.q_proj.weight)
        assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_attention_weights_go_where_they_belong_in_mamba(make_lm, kv_heads):
    """K and V keep the size of the kv heads: the mixer repeats them itself."""
    teacher = make_lm(n_kv_heads=kv_heads)
    student = student_from(teacher, ["mamba"] * 3)
    for source, block in zip(teacher.layers, student.layers):
        attention, mixer = source.self_attn, block.mamba
        for theirs, mine in (("q_proj", "C_proj"), ("k_proj", "B_proj"), ("v_proj", "in_proj_x"), ("o_proj", "out_proj")):
            assert torch.equal(getattr(mixer, mine).weight, getattr(attention, theirs).weight), mine
        assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(32, 16))  # A = -1 .. -16 in every channel
        dt = F.softplus(mixer.dt_proj.bias)
        assert 0.9e-3 < dt.min() and dt.max() < 0.11


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_without_transfer_only_the_projections_of_new_mixers_differ(make_lm, mixer):
    """What the transfer is worth is seen against a student that differs in nothing else: gate, decays, taps start alike."""
    teacher = make_lm()
    torch.manual_seed(1)
    with_weights = weights(student_from(teacher, [mixer] * 3))
    torch.manual_seed(1)
    without = weights(student_from(teacher, [mixer] * 3, transfer=False))
    moved = ("in_proj.weight", "out_proj.weight", "C_proj.weight", "B_proj.weight", "in_proj_x.weight")
    for name, tensor in without.items():
        assert torch.equal(tensor, with_weights[name]) != name.endswith(moved), name
        if name.endswith("mamba2.in_proj.weight"):  # x, B and C, each of them
            assert not any(torch.equal(a, b) for a, b in zip(tensor[:96].split(32), with_weights[name][:96].split(32)))


def test_a_state_not_aligned_with_the_head_takes_x_and_out_only(make_lm):
    teacher = make_lm()
    mixer = student_from(teacher, ["mamba2"] * 3, d_state=20).layers[0].mamba2
    x, B, C = mixer.in_proj.weight[:32 + 2 * 4 * 20].split([32, 80, 80])
    assert torch.equal(x, repeat_heads(teacher.layers[0].self_attn.v_proj.weight, 8, 2))
    assert torch.equal(mixer.out_proj.weight, teacher.layers[0].self_attn.o_proj.weight)
    assert B.std() > 0.1 and C.std() > 0.1
    mamba = student_from(teacher, ["mamba"] * 3, d_state=4).layers[0].mamba
    assert torch.equal(mamba.C_proj.weight, teacher.layers[0].self_attn.q_proj.weight) and mamba.A_log.shape == (32, 4)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_the_convolution_starts_by_passing_the_current_token(make_lm, mixer):
    """Weight 1 on the current token for x, nothing on the tokens before. Red if the taps are in the other order."""
    conv = student_from(make_lm(), [mixer] * 3).layers[0].mix().conv1d
    assert not conv.weight[:, :, :-1].any() and not conv.bias.any()
    assert (conv.weight[:32, :, -1] == 1).all() and (conv.weight[32:, :, -1] > 0).all()


def test_the_gate_of_mamba2_starts_at_1_for_every_input(make_lm):
    mixer = student_from(make_lm(), ["mamba2"] * 3).layers[0].mix()
    z = torch.randn(5, 32) @ mixer.in_proj.weight[96:128].T
    assert_close(F.silu(z + mixer.z_bias), torch.ones(5, 32), rtol=0, atol=TOLERANCE[torch.float32])


def test_a_mamba2_student_starts_with_slow_decays_and_no_skip(make_lm):
    """A head that forgets within a few tokens gets no gradient for what it should have kept; attention has no skip."""
    mixer = student_from(make_lm(), ["mamba2"] * 3).layers[0].mix()
    log_decay = mixer.project(torch.randn(2, 9, 32))[2]
    assert (log_decay - log_decay[:1, :1]).abs().max() < TOLERANCE[torch.float32]  # the same for every token
    assert log_decay.exp().min() >= 0.5 - TOLERANCE[torch.float32] and log_decay.exp().max() > 0.99 and not mixer.D.any()


def test_a_student_can_be_a_teacher(make_lm):
    """A hybrid's Mamba layers are kept with their weights while its attention layers are replaced; never the other way."""
    hybrid = make_lm(["mamba", "attention", "attention"])
    student = student_from(hybrid, ["mamba", "mamba2", "attention"])
    kept = {k: v for k, v in hybrid.state_dict().items() if k.startswith(("model.layers.0.", "model.layers.2."))}
    assert all(torch.equal(student.state_dict()[name], tensor) for name, tensor in kept.items())
    with pytest.raises(ValueError, match="layer 0 .*mamba.*self_attn|layer 0 .*mamba.*attention"):
        student_from(hybrid, ["attention"] * 3)


@pytest.mark.parametrize("mixers, message", [(["mamba"], "1 entries for n_layers = 3"), (["rnn"] * 3, "'rnn'")])
def test_impossible_students_are_refused(make_lm, mixers, message):
    with pytest.raises(ValueError, match=message):
        student_from(make_lm(), mixers)
