"""What model.py reads besides its own files: other people's Llamas, the students that MambaInLlama, M1 and Llamba released,
files in shards or as pytorch_model.bin, repositories of the Hugging Face Hub. None of them needs the network or a large file
here: random weights are written in the released layouts, and the released forward passes are written out, literally."""
import json
import math
import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import model
from model import LM, Config, hub_folder

LLAMA3 = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
D, H, K, P, LAYERS, VOCAB, FF = 32, 4, 2, 16, 3, 40, 24  # d_model, heads, kv heads, head_dim, ...; H P is not D
INNER, KV, RANK = H * P, K * P, 2
LLAMA = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=VOCAB, hidden_size=D,
             num_hidden_layers=LAYERS, num_attention_heads=H, num_key_value_heads=K, head_dim=P, intermediate_size=FF,
             rms_norm_eps=1e-5, rope_theta=500.0, tie_word_embeddings=True, _name_or_path="meta-llama/Llama-3.2-3B-Instruct")


def random_tokens(*shape, seed=1, vocab=VOCAB):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def random_weights(shapes):
    """No tensor at a value such as 0 or 1 that would hide a mistake in its use."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + 0.3 * t if "norm" in name else 0.5 * t if t.dim() == 1 else t / math.prod(t.shape[1:]) ** 0.5
            for name, t in tensors.items()}


def write(folder, tensors, weights="model.safetensors", **configs):
    folder.mkdir(exist_ok=True)
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    (torch.save if weights.endswith(".bin") else save_file)(tensors, folder / weights)
    return str(folder)


# ------------------------------------------------------------------------------------------------ released forward passes
def rms_norm(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def convolve(x, weight, bias):
    """Causal, depthwise: x (L, C), weight (C, 1, W)."""
    width = weight.shape[2]
    padded = torch.cat([x.new_zeros(width - 1, x.shape[1]), x])
    return torch.stack([(padded[t:t + width] * weight[:, 0].T).sum(0) for t in range(len(x))]) + bias


def repeat_groups(x, size, times):
    """repeat_kv of the release: groups of channels, each `times` times in a row. x (L, C)."""
    return torch.cat([x[:, i:i + size] for i in range(0, x.shape[1], size) for _ in range(times)], dim=1)


def mamba1_release(w, u, size=16):
    """MambaInLlama's mamba/hybrid_mamba_layer.py: dt_proj adds its bias, and the scan adds it again. u (L, d_model)."""
    if "in_proj.weight" in w:
        z, x, B, C, low = (u @ w["in_proj.weight"].T).split([INNER, KV, KV, INNER, RANK], dim=1)
    else:
        z, x, B, C, low = (u @ w[f"{n}.weight"].T for n in ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down"))
    if len(w["conv1d.bias"]) == INNER:
        x = F.silu(convolve(repeat_groups(x, size, H // K), w["conv1d.weight"], w["conv1d.bias"]))
    else:
        x = repeat_groups(F.silu(convolve(x, w["conv1d.weight"], w["conv1d.bias"])), size, H // K)
    B = repeat_groups(B, size, H // K)
    delta = low @ w["dt_proj.weight"].T + w["dt_proj.bias"]  # nn.Linear
    dt = F.softplus(delta + w["dt_proj.bias"])  # delta_bias of selective_scan_fn
    A, h, ys = -w["A_log"].exp(), torch.zeros(INNER, size, dtype=u.dtype), []
    for t in range(len(u)):
        channels_B, channels_C = (v[t].view(-1, size).repeat_interleave(size, 0) for v in (B, C))  # (D, N)
        h = (dt[t, :, None] * A).exp() * h + (dt[t] * x[t])[:, None] * channels_B
        ys.append((h * channels_C).sum(1) + w["D"] * x[t])
    return (torch.stack(ys) * F.silu(z)) @ w["out_proj.weight"].T


def mamba2_release(w, u):
    """MambaInLlama's mamba2/hybrid_mamba_layer.py: dt bias once, SiLU on x, B and C, a gated norm per head."""
    z, x, B, C, dt = (u @ w["in_proj.weight"].T).split([INNER, KV, KV, INNER, H], dim=1)
    if len(w["conv1d.bias"]) == 3 * INNER:  # repeat_kv_before_conv
        x, B = repeat_groups(x, P, H // K), repeat_groups(B, P, H // K)
    xBC = F.silu(convolve(torch.cat([x, B, C], 1), w["conv1d.weight"], w["conv1d.bias"]))
    x, B, C = xBC.split([x.shape[1], B.shape[1], INNER], dim=1)
    if x.shape[1] == KV:
        x, B = repeat_groups(x, P, H // K), repeat_groups(B, P, H // K)
    x, B, C = (v.view(-1, H, P) for v in (x, B, C))
    dt = F.softplus(dt + w["dt_bias"])
    A, h, ys = -w["A_log"].exp(), torch.zeros(H, P, P, dtype=u.dtype), []
    for t in range(len(u)):
        h = (dt[t] * A).exp()[:, None, None] * h + torch.einsum("h,hp,hn->hpn", dt[t], x[t], B[t])
        ys.append(torch.einsum("hpn,hn->hp", h, C[t]) + w["D"][:, None] * x[t])
    y = (torch.stack(ys).flatten(1) * F.silu(z)).view(-1, H, P)
    return rms_norm(y, w["norm.weight"].view(H, P)).flatten(1) @ w["out_proj.weight"].T


def llamba_release(w, u, n):
    """Llamba's discrete Mamba-2: rows x | B | C | z | A_log of in_proj, no activation, no step size."""
    x, B, C, z, a = (u @ w["in_proj.weight"].T).split([D, H * n, H * n, D, H], dim=1)
    x, B, C = convolve(torch.cat([x, B, C], 1), w["conv1d.weight"], w["conv1d.bias"]).split([D, H * n, H * n], dim=1)
    x, B, C, h, ys = x.view(-1, H, D // H), B.view(-1, H, n), C.view(-1, H, n), torch.zeros(H, D // H, n, dtype=u.dtype), []
    for t in range(len(u)):
        h = (-F.softplus(a[t])).exp()[:, None, None] * h + torch.einsum("hp,hn->hpn", x[t], B[t])
        ys.append(torch.einsum("hpn,hn->hp", h, C[t]) + w["D"][:, None] * x[t])
    return (torch.stack(ys).flatten(1) * F.silu(z + w["z_bias"])) @ w["out_proj.weight"].T


def attention_release(w, u, scaling):
    """Hugging Face's Llama attention, one head and one query at a time."""
    q, k, v = (u @ w[f"{n}_proj.weight"].T for n in "qkv")
    def rotate(x):  # (L, P)
        for t in range(len(x)):
            x = x.clone()
            for i in range(P // 2):
                f = 500.0 ** (-2 * i / P)
                if scaling:
                    turns, low = scaling["original_max_position_embeddings"] * f / (2 * math.pi), scaling["low_freq_factor"]
                    keep = min(1, max(0, (turns - low) / (scaling["high_freq_factor"] - low)))
                    f = keep * f + (1 - keep) * f / scaling["factor"]
                a, b, c, s = x[t, i].item(), x[t, i + P // 2].item(), math.cos(t * f), math.sin(t * f)
                x[t, i], x[t, i + P // 2] = a * c - b * s, b * c + a * s
        return x
    heads = []
    for i in range(H):
        group = slice(i // (H // K) * P, i // (H // K) * P + P)
        scores = rotate(q[:, i * P:(i + 1) * P]) @ rotate(k[:, group]).T / P ** 0.5
        heads.append(scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf).softmax(-1) @ v[:, group])
    return torch.cat(heads, 1) @ w["o_proj.weight"].T


def release_logits(tensors, tokens, mixer, names):
    """Logits (L, V) float64 of a released model; mixer(layer, its tensors, u) is the layer's, names are the release's."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    x = w[names.embedding][tokens]
    for i in range(LAYERS):
        layer = part(w, f"{names.layers}.{i}")
        x = x + mixer(i, layer, rms_norm(x, layer["input_layernorm.weight"]))
        u = rms_norm(x, layer["post_attention_layernorm.weight"])
        gate, up = u @ layer["mlp.gate_proj.weight"].T, u @ layer["mlp.up_proj.weight"].T
        x = x + (F.silu(gate) * up) @ layer["mlp.down_proj.weight"].T
    return rms_norm(x, w[names.norm]) @ w.get("lm_head.weight", w[names.embedding]).T


def part(layer, prefix):
    return {name.removeprefix(prefix + "."): tensor for name, tensor in layer.items() if name.startswith(prefix + ".")}


def assert_same_model(folder, expected, tokens, tmp_path):
    """Loaded, its logits are as expected, decoded or not; saved in our layout and loaded again it is the same model."""
    lm = LM.from_pretrained(folder).eval().requires_grad_(False)
    scale = expected.abs().max().item()
    assert_close(lm(tokens[None])[0].double(), expected, rtol=0, atol=1e-5 * scale)
    state = lm.init_state(1, len(tokens))
    decoded = torch.cat([lm(piece[None], state)[0] for piece in tokens.split([5] + [1] * (len(tokens) - 5))])
    assert_close(decoded.double(), expected, rtol=0, atol=1e-5 * scale)
    lm.save_pretrained(tmp_path / "again")
    again = LM.from_pretrained(str(tmp_path / "again"))
    assert again.config == lm.config and again.state_dict().keys() == lm.state_dict().keys()
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in lm.state_dict().items())
    return lm


# ------------------------------------------------------------------------------------------------ MambaInLlama, M1
HF_NAMES = SimpleNamespace(embedding="model.embed_tokens.weight", layers="model.layers", norm="model.norm.weight")
MAMBA1 = dict(in_proj_x=(KV, D), B_proj=(KV, D), C_proj=(INNER, D), in_proj_z=(INNER, D), dt_proj_down=(RANK, D),
              dt_proj=(INNER, RANK), out_proj=(D, INNER))


def mamba_in_llama(kind="mamba", attention=(1,), conv_first=False, fused=False):
    """(tensors, mamba_config.json) of a MambaInLlama student of the Llama above, as released."""
    shapes = {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,)}
    for i in range(LAYERS):
        layer = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,), "mlp.gate_proj.weight": (FF, D),
                 "mlp.up_proj.weight": (FF, D), "mlp.down_proj.weight": (D, FF)}
        if i in attention:
            layer |= {f"self_attn.{n}_proj.weight": (INNER if n == "q" else KV, D) for n in "qkv"}
            layer |= {"self_attn.o_proj.weight": (D, INNER)}
        elif kind == "mamba":
            channels = KV if conv_first else INNER
            layer |= {f"mamba.{n}.weight": shape for n, shape in MAMBA1.items()}
            layer |= {"mamba.dt_proj.bias": (INNER,), "mamba.A_log": (INNER, 16), "mamba.D": (INNER,)}
        else:
            channels = INNER + 2 * KV if conv_first else 3 * INNER
            layer |= {"mamba.in_proj.weight": (2 * INNER + 2 * KV + H, D), "mamba.dt_bias": (H,), "mamba.A_log": (H,),
                      "mamba.D": (H,), "mamba.norm.weight": (INNER,), "mamba.out_proj.weight": (D, INNER)}
        if i not in attention:
            layer |= {"mamba.conv1d.weight": (channels, 1, 4), "mamba.conv1d.bias": (channels,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    tensors = random_weights(shapes)
    for i in range(LAYERS) if fused else ():
        for whole, parts in (
                ("mamba.in_proj", [f"mamba.{n}" for n in ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")]),
                ("mha.in_proj", [f"self_attn.{n}_proj" for n in "qkv"]), ("mha.out_proj", ["self_attn.o_proj"])):
            names = [f"model.layers.{i}.{name}.weight" for name in parts]
            if names[0] in tensors:
                tensors[f"model.layers.{i}.{whole}.weight"] = torch.cat([tensors.pop(name) for name in names])
    ssm = dict(expand=1) if kind == "mamba" else dict(expand=1, ngroups=H, d_state=P)
    return tensors, dict(d_model=D, ssm_cfg=ssm, rms_norm_eps=1e-5, vocab_size=None, d_inner=INNER, d_xb=KV,
                         intermediate_size=FF, hidden_act="silu", n_layer=LAYERS, attn_layers=list(attention))


def mamba_in_llama_logits(tensors, tokens, kind, scaling):
    def mixer(i, layer, u):
        if "mha.in_proj.weight" in layer:
            q, k, v = layer["mha.in_proj.weight"].split([INNER, KV, KV])
            layer = {"self_attn.q_proj.weight": q, "self_attn.k_proj.weight": k, "self_attn.v_proj.weight": v,
                     "self_attn.o_proj.weight": layer["mha.out_proj.weight"]}
        if "self_attn.q_proj.weight" in layer:
            return attention_release(part(layer, "self_attn"), u, scaling)
        return (mamba1_release if kind == "mamba" else mamba2_release)(part(layer, "mamba"), u)
    return release_logits(tensors, tokens, mixer, HF_NAMES)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("conv_first", [False, True], ids=["repeat, conv", "conv, repeat"])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_released_mamba_in_llama_computes_what_its_code_does(tmp_path, kind, conv_first, weights):
    """Red if Mamba-1's dt bias counts once or Mamba-2's twice, kv groups are tiled, rows of in_proj are taken for others,
    the norm is forgotten, or attention layers lose the base's scaled RoPE."""
    tensors, mamba_config = mamba_in_llama(kind, conv_first=conv_first)
    folder = write(tmp_path / "x", tensors, weights, config=LLAMA | dict(rope_scaling=LLAMA3), mamba_config=mamba_config)
    tokens = random_tokens(19)
    lm = assert_same_model(folder, mamba_in_llama_logits(tensors, tokens, kind, LLAMA3), tokens, tmp_path)
    assert lm.config.mixers == [kind, "attention", kind]


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_fused_projections_are_taken_apart(tmp_path, kind):
    """As M1 stores them: z | x | B | C | dt and q | k | v. Its attention layers know no scaling, whatever the base has."""
    tensors, mamba_config = mamba_in_llama(kind, attention=(0, 2), fused=True)
    assert "model.layers.0.mha.in_proj.weight" in tensors and "model.layers.1.mamba.in_proj.weight" in tensors
    folder = write(tmp_path / "x", tensors, config=LLAMA | dict(rope_scaling=LLAMA3), mamba_config=mamba_config)
    tokens = random_tokens(19)
    assert_same_model(folder, mamba_in_llama_logits(tensors, tokens, kind, None), tokens, tmp_path)


def test_the_doubled_bias_is_folded_in_once(tmp_path):
    """Saving into the very folder of the release must not make the next load double it again."""
    tensors, mamba_config = mamba_in_llama()
    folder = write(tmp_path / "x", tensors, config=LLAMA, mamba_config=mamba_config)
    for _ in range(3):
        lm = LM.from_pretrained(folder)
        assert torch.equal(lm.layers[0].mamba.dt_proj.bias.data, 2 * tensors["model.layers.0.mamba.dt_proj.bias"])
        lm.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_released_student_in_bfloat16_keeps_its_decays(tmp_path, kind):
    """Decay rates and step biases stay float32, doubled in float32, when the rest is loaded as bfloat16."""
    tensors, mamba_config = mamba_in_llama(kind)
    folder = write(tmp_path / "x", tensors, config=LLAMA, mamba_config=mamba_config)
    mixer = LM.from_pretrained(folder, dtype=torch.bfloat16).layers[0].mix()
    assert mixer.out_proj.weight.dtype == torch.bfloat16
    assert torch.equal(mixer.A_log.data, tensors["model.layers.0.mamba.A_log"])
    if kind == "mamba":
        assert torch.equal(mixer.dt_proj.bias.data, 2 * tensors["model.layers.0.mamba.dt_proj.bias"])
    else:
        assert torch.equal(mixer.A_log_bias.data, tensors["model.layers.0.mamba.dt_bias"])
        assert mixer.z_bias.dtype == torch.bfloat16


def test_the_matrix_of_continuous_mamba2_is_what_the_mixer_does():
    """Matrix orientation would train it: y = T x before gate and norm, dt in T. Red if the matrix forgets dt or SiLU."""
    torch.manual_seed(0)
    config = Config(n_layers=1, mixers=["mamba2"], n_heads=2, head_dim=8, d_model=16, discrete_mamba2=False)
    mixer = LM(config).layers[0].mix().requires_grad_(False)
    mixer.A_log.normal_(), mixer.A_log_bias.normal_(), mixer.D.normal_()
    u = torch.randn(1, 9, 16)
    xBC, z, *_ = mixer.project(u)
    x, _, _ = mixer.split(model.kernels.causal_conv(xBC, mixer.conv1d.weight, mixer.conv1d.bias)[0])
    y = torch.einsum("bhts,bshp->bthp", mixer.matrix(u, None), x).flatten(2)
    assert_close(mixer.out_proj(mixer.gate(y, z)), mixer(u, None))


def without(values, key):
    return {name: value for name, value in values.items() if name != key}


@pytest.mark.parametrize("config, mamba_config, message", [
    (without(LLAMA, "hidden_size"), {}, "config.json lacks hidden_size .*meta-llama/Llama-3.2-3B-Instruct"),
    (LLAMA, dict(attn_layers=None), "attn_layers = None"),
    (LLAMA, dict(attn_layers=[1, 3]), r"attn_layers = \[1, 3\], but layers are 0 .. 2"),
    (LLAMA, dict(d_xb=8), "d_xb = 8, but config.json implies 32"),
    (LLAMA, dict(d_inner=None), "d_inner = 32, but config.json implies 64"),
    (LLAMA, dict(n_layer=2), "n_layer = 2, but config.json implies 3"),
    (LLAMA, dict(ssm_cfg=dict(ngroups=H, d_state=8)), "d_state = 8, but config.json implies 16"),
    (LLAMA, dict(ssm_cfg=dict(expand=1, norm_before_gate=True)), "ssm_cfg .*norm_before_gate"),
    (LLAMA, dict(attn_layers=[]), r"model\.layers\.1\.mamba\.A_log is missing, expected shape \(64, 16\)"),
])
def test_a_student_unlike_those_released_is_refused_by_name(tmp_path, config, mamba_config, message):
    """Red if a value is ignored that would make this model compute something else."""
    tensors, released = mamba_in_llama()
    with pytest.raises(ValueError, match=message):
        LM.from_pretrained(write(tmp_path / "x", tensors, config=config, mamba_config=released | mamba_config))


# ------------------------------------------------------------------------------------------------ Llamba
LLAMBA_NAMES = SimpleNamespace(embedding="backbone.embedding.weight", layers="backbone.layers",
                               norm="backbone.final_layernorm.weight")


def llamba(tied=True, n=6):
    """(tensors, config.json) of a Llamba, as released; the state size n is not the head dim D / H = 8."""
    channels = D + 2 * H * n
    shapes = {"backbone.embedding.weight": (VOCAB, D), "backbone.final_layernorm.weight": (D,)}
    shapes |= {} if tied else {"lm_head.weight": (VOCAB, D)}
    for i in range(LAYERS):
        layer = {"mixer.in_proj.weight": (channels + D + H, D), "mixer.conv1d.weight": (channels, 1, 4),
                 "mixer.z_bias": (D,), "mixer.conv1d.bias": (channels,), "mixer.D": (H,), "mixer.out_proj.weight": (D, D),
                 "input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,), "mlp.gate_proj.weight": (FF, D),
                 "mlp.up_proj.weight": (FF, D), "mlp.down_proj.weight": (D, FF)}
        shapes |= {f"backbone.layers.{i}.{name}": shape for name, shape in layer.items()}
    ssm = dict(d_state=n, n_v_heads=H, n_qk_heads=H, expand=1, chunk_size=128, activation="identity", bias=False)
    return random_weights(shapes), dict(
        model_type="llamba", vocab_size=VOCAB, tie_embeddings=tied, pad_vocab_size_multiple=8, lm_head_bias=False, d_model=D,
        n_layer=LAYERS, resid_dropout=0.0, norm_epsilon=1e-5, ssm_cfg=ssm,
        mlp_cfg=dict(intermediate_size=FF, bias=False, act_fn="silu"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_released_llamba_computes_what_its_code_does(tmp_path, tied):
    """Red if a name goes elsewhere, z_bias is dropped, or the decay bias, which Llamba lacks, starts anywhere but at 0."""
    tensors, config = llamba(tied)
    tokens = random_tokens(19)
    expected = release_logits(tensors, tokens, lambda i, layer, u: llamba_release(part(layer, "mixer"), u, 6), LLAMBA_NAMES)
    lm = assert_same_model(write(tmp_path / "x", tensors, config=config), expected, tokens, tmp_path)
    assert not any(layer.mix().A_log_bias.any() for layer in lm.layers)


@pytest.mark.parametrize("where, changes, message", [
    ("ssm_cfg", dict(activation="silu"), "activation = 'silu'"),
    ("ssm_cfg", dict(n_qk_heads=2), "n_qk_heads = 2, only 4"),
    ("ssm_cfg", dict(bias=True), "bias = True"),
    ("ssm_cfg", dict(d_state=None), "lacks d_state"),
    ("mlp_cfg", dict(act_fn="gelu"), "act_fn = 'gelu'"),
    (None, dict(n_layer=None), "lacks n_layer"),
    (None, dict(n_layer=4), r"backbone\.layers\.3\.\S+ is missing"),
    (None, dict(lm_head_bias=True), "lm_head_bias"),
])
def test_a_llamba_unlike_those_released_is_refused_by_name(tmp_path, where, changes, message):
    tensors, config = llamba()
    config = config | {where: config[where] | changes} if where else config | changes
    with pytest.raises(ValueError, match=message):
        LM.from_pretrained(write(tmp_path / "x", tensors, config=config))


# ------------------------------------------------------------------------------------------------ other people's Llamas
@pytest.mark.parametrize("fields", [
    dict(rope_parameters=LLAMA3 | dict(rope_theta=500.0)),  # Llama 3.2's factor, layout of transformers 5
    dict(rope_scaling=LLAMA3 | dict(factor=8.0), tie_word_embeddings=False),  # Llama 3.1's
    dict(rope_scaling=None, head_dim=None, num_key_value_heads=None, dtype="float32"),
    dict(rope_scaling=LLAMA3, rope_interleaved=False, torch_dtype="float32", mlp_bias=None, num_key_value_heads=4),
], ids=["3.2", "3.1", "bare", "all said"])
@pytest.mark.parametrize("layout", ["model.safetensors", "shards", "pytorch_model.bin", "bin shards"])
def test_a_llama_in_any_layout_equals_hugging_face(tmp_path, fields, layout):
    """Config and weights written by hand, as in repositories, not by our save. Red if a constant of the RoPE or a head count
    is assumed instead of read, or a shard is skipped."""
    transformers = pytest.importorskip("transformers")
    config = without(LLAMA | fields, "_name_or_path")
    config = {key: value for key, value in config.items() if value is not None}
    if "rope_parameters" in config:
        config.pop("rope_theta")
    torch.manual_seed(0)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    tensors = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as in files of 2023
    if "shards" in layout:
        names, kind = sorted(tensors), ("pytorch_model-{}.bin" if "bin" in layout else "model-{}.safetensors")
        shards = {kind.format(i): {name: tensors[name] for name in names[i::3]} for i in range(3)}
        index = "pytorch_model.bin.index" if "bin" in layout else "model.safetensors.index"
        for file, shard in shards.items():
            write(tmp_path, shard, file, config=config)
        (tmp_path / f"{index}.json").write_text(json.dumps(dict(weight_map={n: f for f, s in shards.items() for n in s})))
    else:
        write(tmp_path, tensors, layout, config=config)
    tokens = random_tokens(2, 40)
    with torch.no_grad():
        expected = hf(tokens).logits
        assert_close(LM.from_pretrained(str(tmp_path))(tokens), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("changes, message", [
    (dict(model_type="mistral"), "model_type 'mistral'"),
    (dict(architectures=["LlamaForSequenceClassification"]), "architecture LlamaForSequenceClassification"),
    (dict(hidden_act="gelu"), 'hidden_act = \'gelu\', only "silu"'),
    (dict(mlp_bias=True), "mlp_bias = True"),
    (dict(rope_interleaved=True), "rope_interleaved = True"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
    (dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.25)), "partial_rotary_factor = 0.25"),
    (dict(sliding_window=4096), "sliding_window = 4096"),
    (dict(quantization_config=dict(quant_method="gptq")), "quantization_config"),
    (dict(rope_scaling=dict(type="linear", factor=2.0)), "RoPE type 'linear'"),
    (dict(num_attention_heads=None), "lacks num_attention_heads"),
])
def test_what_the_model_would_get_wrong_is_refused_by_name(make_lm, tmp_path, changes, message):
    """Each of these loads without it, and computes something else than the model's authors did."""
    make_lm().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        LM.from_pretrained(str(tmp_path))


def test_a_tied_head_that_differs_is_refused(make_lm, tmp_path):
    """A head that is stored and equal is ignored (test_model.py); dropping one that differs would change the model."""
    make_lm().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[49, 31] += 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight is not model.embed_tokens.weight"):
        LM.from_pretrained(str(tmp_path))
    save_file(tensors | {"lm_head.weight": head[:40].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(40, 32\), expected \(50, 32\)"):
        LM.from_pretrained(str(tmp_path))


# ------------------------------------------------------------------------------------------------ files
def test_safetensors_come_first_and_a_stale_index_does_not_matter(make_lm, tmp_path):
    """A folder that was sharded before we saved into it: what counts is what we saved."""
    lm = make_lm()
    lm.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a model")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert torch.equal(LM.from_pretrained(str(tmp_path))(random_tokens(1, 5)), lm(random_tokens(1, 5)))


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


@pytest.mark.parametrize("content", [b"", b"not a model", Exploit()], ids=["empty", "garbage", "code"])
def test_a_bin_file_is_never_executed_and_named_if_unreadable(make_lm, tmp_path, monkeypatch, content):
    """Red if weights_only is lost: a pickle may hold any code."""
    monkeypatch.chdir(tmp_path)
    make_lm().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save({"model.norm.weight": content}, path)
    with pytest.raises(ValueError, match="pytorch_model.bin is not a readable weight file") as error:
        LM.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value) and not (tmp_path / "exploited").exists()


@pytest.mark.parametrize("block", [4, 100, 1000, 10 ** 9])
def test_reading_in_pieces_changes_nothing(make_lm, tmp_path, monkeypatch, block):
    """Pieces of one row, of several, of a whole tensor. Red if the last piece is lost or a piece goes to the wrong rows."""
    lm = make_lm(["mamba", "mamba2", "attention"], tie_embeddings=False)
    lm.save_pretrained(tmp_path)
    monkeypatch.setattr(model, "BLOCK", block)
    loaded = LM.from_pretrained(str(tmp_path)).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in lm.state_dict().items())


def test_loading_leaves_initialisation_as_it_was(make_lm, tmp_path):
    """The model is made without initialising it, which must end with the load, also with one that fails."""
    make_lm().save_pretrained(tmp_path)
    loaded = LM.from_pretrained(str(tmp_path))
    assert not any(t.is_meta for t in loaded.state_dict().values()) and not list(loaded.buffers())
    with pytest.raises(RuntimeError, match="stop"), model.shapes_only():
        raise RuntimeError("stop")
    embedding = LM(Config()).model.embed_tokens.weight
    assert embedding.device.type == "cpu" and 0.9 < embedding.std() * 64 ** 0.5 < 1.1


MEASURE = """
import sys
import torch
from model import LM
def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024
LM.from_pretrained(sys.argv[1])  # what is imported on the way
for folder, dtype in ((sys.argv[2], "float32"), (sys.argv[2], "bfloat16"), (sys.argv[3], "bfloat16")):
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again from now
    before = status("VmRSS")
    lm = LM.from_pretrained(folder, dtype=getattr(torch, dtype))
    size = sum(p.numel() * p.element_size() for p in lm.parameters())
    print((status("VmHWM") - before - size) / 2 ** 20)
    del lm
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures memory by Linux's /proc")
def test_loading_needs_little_more_memory_than_the_model(make_lm, tmp_path):
    """100 MB in float32, most of it one tensor; two blocks and some. Red if the file stays mapped while it is read, if a
    whole tensor is cast at once, or if the model is initialised first. A .bin is read in larger blocks: half of it here."""
    lm = make_lm(vocab_size=250_000, d_model=96, d_ff=96)
    lm.save_pretrained(tmp_path / "large")
    write(tmp_path / "bin", load_file(tmp_path / "large" / "model.safetensors"), "pytorch_model.bin",
          config=json.loads((tmp_path / "large" / "config.json").read_text()))
    make_lm().save_pretrained(tmp_path / "small")
    done = subprocess.run([sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in ("small", "large", "bin"))],
                          capture_output=True, text=True, timeout=120, cwd=os.path.dirname(model.__file__))
    assert done.returncode == 0, done.stderr
    extra = [float(line) for line in done.stdout.split()]
    assert extra[0] < 20 and extra[1] < 20 and extra[2] < 80, f"MB beside the model: {extra}"


# ------------------------------------------------------------------------------------------------ the Hub
@pytest.fixture
def hub(monkeypatch):
    """huggingface_hub whose snapshot_download does hub.answer(name, patterns); what was asked is in hub.asked."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    hub = SimpleNamespace(asked=[], errors=importlib.import_module("huggingface_hub.errors"), answer=None)

    def snapshot_download(name, allow_patterns):
        hub.asked.append((name, allow_patterns))
        return hub.answer(name, allow_patterns)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return hub


def test_a_repository_is_downloaded_and_loaded(hub, make_lm, tmp_path):
    lm = make_lm()
    lm.save_pretrained(tmp_path)
    hub.answer = lambda name, patterns: str(tmp_path)
    assert torch.equal(LM.from_pretrained("some-org/some.model-1B")(random_tokens(1, 5)), lm(random_tokens(1, 5)))
    assert [name for name, _ in hub.asked] == ["some-org/some.model-1B"]
    assert not any("bin" in pattern for pattern in hub.asked[0][1])


def test_bin_files_are_downloaded_only_where_there_are_no_safetensors(hub, make_lm, tmp_path):
    """Many repositories hold the weights twice."""
    make_lm().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()

    def answer(name, patterns):
        if any("bin" in pattern for pattern in patterns):
            torch.save(tensors, tmp_path / "pytorch_model.bin")
        return str(tmp_path)

    hub.answer = answer
    assert torch.equal(LM.from_pretrained("org/name").model.norm.weight, tensors["model.norm.weight"])
    assert len(hub.asked) == 2


def response(status):
    return SimpleNamespace(status_code=status, headers={}, request=None, url="https://hub")


@pytest.mark.parametrize("make, message", [
    (lambda e: e.GatedRepoError("Access\nis restricted", response=response(403)), "gated.*hf auth login.*HF_TOKEN"),
    (lambda e: e.RepositoryNotFoundError("404\nClient Error", response=response(404)), "no Hugging Face repository"),
    (lambda e: e.LocalEntryNotFoundError("Cannot find\nsnapshot"), "cannot be reached and there is no downloaded copy"),
    (lambda e: e.HfHubHTTPError("500\nServer Error", response=response(500)), "HfHubHTTPError: 500"),
    (lambda e: OSError(28, "No space left on device"), "No space left on device"),
], ids=["gated", "no such repository", "offline", "server", "disk"])
def test_a_repository_that_cannot_be_had_is_one_clear_line(hub, make, message):
    """Raised as huggingface_hub raises it: gated is a kind of not found, and most messages have several lines."""
    def answer(name, patterns):
        raise make(hub.errors)

    hub.answer = answer
    with pytest.raises(FileNotFoundError, match=f"no folder org/name; .*{message}") as error:
        LM.from_pretrained("org/name")
    assert "\n" not in str(error.value)


def test_without_huggingface_hub_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="no folder org/name; .*pip install huggingface_hub"):
        hub_folder("org/name", ["*.json"])


def test_only_what_looks_like_a_repository_is_looked_for(hub, tmp_path, monkeypatch):
    """Existing folders as they are; a missing out/teacher is a missing folder, not somebody's repository."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("org/name")
    os.mkdir("out")
    for name in ("org/name", "out/teacher", "teacher", "a/b/c", "/org/name", "./name", "../name", "~/name", "org/", ""):
        assert hub_folder(name, ["*"]) == name
    with pytest.raises(FileNotFoundError, match="no checkpoint in out/teacher: expected config.json"):
        LM.from_pretrained("out/teacher")
    assert not hub.asked
