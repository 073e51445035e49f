"""What hub.py promises: what others released computes here what it computes there, ids are those of
the tokenizers library, and what would be wrong is refused by name. No network: random weights are
written in the released layouts, and the released forward passes literally, in float64."""
import base64
import copy
import json
import math
import os
import random
import re
import subprocess
import sys
import zlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import hub
from conftest import assert_close
from data import Tokenizer
from model import LM

LLAMA3_ROPE = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16)
D, H, K, P, LAYERS, VOCAB, FF = 32, 4, 2, 16, 3, 40, 24  # H P is not D: no size hides another
INNER, KV, RANK, TOKENS = H * P, K * P, 2, torch.arange(19) * 7 % VOCAB
LLAMA = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=VOCAB,
             hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=H, head_dim=P,
             num_key_value_heads=K, intermediate_size=FF, rms_norm_eps=1e-5, rope_theta=500.0,
             tie_word_embeddings=True, _name_or_path="meta-llama/Llama-3.2-3B-Instruct")


def random_weights(shapes):
    """No tensor at a value such as 0 or 1 that would hide a mistake in its use."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + 0.3 * t if "norm" in name else 0.5 * t if t.dim() == 1
            else t / math.prod(t.shape[1:]) ** 0.5 for name, t in tensors.items()}


def layer_shapes():
    return {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,),
            "mlp.gate_proj.weight": (FF, D), "mlp.up_proj.weight": (FF, D),
            "mlp.down_proj.weight": (D, FF)}


def attention_shapes():
    sizes = dict(q=INNER, k=KV, v=KV)
    return {f"self_attn.{n}_proj.weight": (rows, D) for n, rows in sizes.items()} | {
        "self_attn.o_proj.weight": (D, INNER)}


def llama_weights():
    shapes = {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,)}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{name}": shape
                   for name, shape in (layer_shapes() | attention_shapes()).items()}
    return random_weights(shapes)


def write(folder, tensors, weights="model.safetensors", **configs):
    """A folder with weights and JSON files; returns its path."""
    folder.mkdir(exist_ok=True)
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    (torch.save if weights.endswith(".bin") else save_file)(tensors, folder / weights)
    return str(folder)


# ------------------------------------------------------------------ released forward passes
def rms_norm(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def convolve(x, w):
    """Causal, depthwise: x (L, C)."""
    weight, bias = w["conv1d.weight"], w["conv1d.bias"]
    padded = torch.cat([x.new_zeros(3, x.shape[1]), x])
    return torch.stack([(padded[t:t + 4] * weight[:, 0].T).sum(0) for t in range(len(x))]) + bias


def repeat_groups(x, size):
    """repeat_kv of the release: groups of channels, each H / K times in a row. x (L, C)."""
    return torch.cat([group for group in x.split(size, 1) for _ in range(H // K)], 1)


def mamba1_release(w, u, size=16):
    """mamba/hybrid_mamba_layer.py: dt_proj adds its bias, and the scan adds it again. u (L, D)."""
    if "in_proj.weight" in w:
        z, x, B, C, low = (u @ w["in_proj.weight"].T).split([INNER, KV, KV, INNER, RANK], dim=1)
    else:
        names = ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")
        z, x, B, C, low = (u @ w[f"{name}.weight"].T for name in names)
    if len(w["conv1d.bias"]) == INNER:
        x = F.silu(convolve(repeat_groups(x, size), w))
    else:
        x = repeat_groups(F.silu(convolve(x, w)), size)
    B = repeat_groups(B, size)
    delta = low @ w["dt_proj.weight"].T + w["dt_proj.bias"]  # nn.Linear
    dt = F.softplus(delta + w["dt_proj.bias"])  # delta_bias of selective_scan_fn
    A, h, ys = -w["A_log"].exp(), torch.zeros(INNER, size, dtype=u.dtype), []
    for t in range(len(u)):
        B_t, C_t = (v[t].view(-1, size).repeat_interleave(size, 0) for v in (B, C))  # (INNER, N)
        h = (dt[t, :, None] * A).exp() * h + (dt[t] * x[t])[:, None] * B_t
        ys.append((h * C_t).sum(1) + w["D"] * x[t])
    return (torch.stack(ys) * F.silu(z)) @ w["out_proj.weight"].T


def ssd_release(x, B, C, decay, scale, D_skip):
    """h <- decay h + scale x B^T, y = h C + D x, head by head. x (L, H, P), decay (L, H)."""
    h, ys = 0, []
    for t in range(len(x)):
        h = decay[t, :, None, None] * h + torch.einsum("h,hp,hn->hpn", scale[t], x[t], B[t])
        ys.append(torch.einsum("hpn,hn->hp", h, C[t]) + D_skip[:, None] * x[t])
    return torch.stack(ys)


def mamba2_release(w, u):
    """mamba2/hybrid_mamba_layer.py: dt bias once, SiLU on x, B and C, a gated norm per head."""
    z, x, B, C, dt = (u @ w["in_proj.weight"].T).split([INNER, KV, KV, INNER, H], dim=1)
    repeated = len(w["conv1d.bias"]) == 3 * INNER  # repeat_kv_before_conv
    if repeated:
        x, B = repeat_groups(x, P), repeat_groups(B, P)
    xBC = F.silu(convolve(torch.cat([x, B, C], 1), w))
    x, B, C = xBC.split([x.shape[1], B.shape[1], INNER], dim=1)
    if not repeated:
        x, B = repeat_groups(x, P), repeat_groups(B, P)
    dt = F.softplus(dt + w["dt_bias"])
    x, B, C, decay = *(v.view(-1, H, P) for v in (x, B, C)), (-dt * w["A_log"].exp()).exp()
    y = ssd_release(x, B, C, decay, dt, w["D"])
    y = y * F.silu(z).view(-1, H, P)
    return rms_norm(y, w["norm.weight"].view(H, P)).flatten(1) @ w["out_proj.weight"].T


def llamba_release(w, u, n=6):
    """Llamba's discrete Mamba-2: rows x | B | C | z | A_log, no activation, no step size."""
    x, B, C, z, a = (u @ w["in_proj.weight"].T).split([D, H * n, H * n, D, H], dim=1)
    x, B, C = convolve(torch.cat([x, B, C], 1), w).split([D, H * n, H * n], dim=1)
    x, B, C = x.view(-1, H, D // H), B.view(-1, H, n), C.view(-1, H, n)
    y = ssd_release(x, B, C, (-F.softplus(a)).exp(), torch.ones_like(a), w["D"]).flatten(1)
    return (y * F.silu(z + w["z_bias"])) @ w["out_proj.weight"].T


def frequency(i, scaling):
    """Llama 3's RoPE, one channel pair: its low frequencies are divided by the factor."""
    f = 500.0 ** (-2 * i / P)
    if scaling is None:
        return f
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
    keep = min(1, max(0, (turns - low) / (high - low)))
    return keep * f + (1 - keep) * f / scaling["factor"]


def attention_release(w, u, scaling):
    """Hugging Face's Llama attention, one head at a time."""
    q, k, v = (u @ w[f"{n}_proj.weight"].T for n in "qkv")
    frequencies = torch.tensor([frequency(i, scaling) for i in range(P // 2)], dtype=u.dtype)
    angles = torch.arange(len(u))[:, None] * frequencies  # (L, P / 2)

    def rotate(x):  # (L, P)
        (a, b), cos, sin = x.chunk(2, dim=1), angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=1)

    heads = []
    for i in range(H):
        group = slice(i // (H // K) * P, i // (H // K) * P + P)
        scores = rotate(q[:, i * P:(i + 1) * P]) @ rotate(k[:, group]).T / P ** 0.5
        future = torch.ones_like(scores).triu(1).bool()
        heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, group])
    return torch.cat(heads, 1) @ w["o_proj.weight"].T


def part(tensors, prefix):
    return {name.removeprefix(prefix + "."): t for name, t in tensors.items()
            if name.startswith(prefix + ".")}


def released_logits(tensors, mixer, root="model", embedding="embed_tokens", norm="norm"):
    """Logits (L, V) in float64; mixer(the layer's tensors, u) is the layer's."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    x = w[f"{root}.{embedding}.weight"][TOKENS]
    for i in range(LAYERS):
        layer = part(w, f"{root}.layers.{i}")
        x = x + mixer(layer, rms_norm(x, layer["input_layernorm.weight"]))
        u = rms_norm(x, layer["post_attention_layernorm.weight"])
        gate, up = u @ layer["mlp.gate_proj.weight"].T, u @ layer["mlp.up_proj.weight"].T
        x = x + (F.silu(gate) * up) @ layer["mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w[f"{root}.{embedding}.weight"])
    return rms_norm(x, w[f"{root}.{norm}.weight"]) @ head.T


def assert_same_model(folder, expected, tmp_path):
    """Its logits are as expected, decoded or not; saved in our layout it is the same model."""
    lm = LM.from_pretrained(folder).eval().requires_grad_(False)
    assert_close(lm(TOKENS[None])[0], expected)
    state = lm.init_state(1, len(TOKENS))
    pieces = TOKENS.split([5] + [1] * (len(TOKENS) - 5))
    assert_close(torch.cat([lm(piece[None], state)[0] for piece in pieces]), expected)
    lm.save_pretrained(str(tmp_path / "again"))
    again = LM.from_pretrained(str(tmp_path / "again"))
    assert again.config == lm.config and again.state_dict().keys() == lm.state_dict().keys()
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in lm.state_dict().items())
    return lm


# ------------------------------------------------------------------ MambaInLlama, M1
MAMBA1 = dict(in_proj_x=(KV, D), B_proj=(KV, D), C_proj=(INNER, D), in_proj_z=(INNER, D),
              dt_proj_down=(RANK, D), dt_proj=(INNER, RANK), out_proj=(D, INNER))
FUSED = {"mamba.in_proj": [f"mamba.{n}" for n in
                           ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")],
         "mha.in_proj": [f"self_attn.{n}_proj" for n in "qkv"],
         "mha.out_proj": ["self_attn.o_proj"]}


def mixer_shapes(kind, conv_first):
    """Of a released layer; conv_first: the convolution runs before kv heads are repeated."""
    if kind == "mamba":
        channels = KV if conv_first else INNER
        shapes = {f"{n}.weight": shape for n, shape in MAMBA1.items()}
        shapes |= {"dt_proj.bias": (INNER,), "A_log": (INNER, 16), "D": (INNER,)}
    else:
        channels = INNER + 2 * KV if conv_first else 3 * INNER
        shapes = {"in_proj.weight": (2 * INNER + 2 * KV + H, D), "dt_bias": (H,), "A_log": (H,),
                  "D": (H,), "norm.weight": (INNER,), "out_proj.weight": (D, INNER)}
    shapes |= {"conv1d.weight": (channels, 1, 4), "conv1d.bias": (channels,)}
    return {f"mamba.{name}": shape for name, shape in shapes.items()}


def mamba_in_llama(kind="mamba", attention=(1,), conv_first=False, fused=False):
    """(tensors, mamba_config.json) of a MambaInLlama student of LLAMA, as released."""
    shapes = {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,)}
    for i in range(LAYERS):
        mixer = attention_shapes() if i in attention else mixer_shapes(kind, conv_first)
        shapes |= {f"model.layers.{i}.{n}": s for n, s in (layer_shapes() | mixer).items()}
    tensors = random_weights(shapes)
    for i in range(LAYERS) if fused else ():
        for whole, parts in FUSED.items():
            names = [f"model.layers.{i}.{name}.weight" for name in parts]
            if names[0] in tensors:
                rows = torch.cat([tensors.pop(name) for name in names])
                tensors[f"model.layers.{i}.{whole}.weight"] = rows
    ssm = dict(expand=1) if kind == "mamba" else dict(expand=1, ngroups=H, d_state=P)
    return tensors, dict(d_model=D, ssm_cfg=ssm, d_inner=INNER, d_xb=KV, n_layer=LAYERS,
                         attn_layers=list(attention), hidden_act="silu", vocab_size=None)


def mamba_in_llama_logits(tensors, kind, scaling):
    def mixer(layer, u):
        if "mamba.D" in layer:
            return (mamba1_release if kind == "mamba" else mamba2_release)(part(layer, "mamba"), u)
        attention = part(layer, "self_attn")
        if not attention:
            q, k, v = layer["mha.in_proj.weight"].split([INNER, KV, KV])
            names = zip("qkvo", (q, k, v, layer["mha.out_proj.weight"]))
            attention = {f"{n}_proj.weight": weight for n, weight in names}
        return attention_release(attention, u, scaling)
    return released_logits(tensors, mixer)


STEP = dict(mamba="mamba", mamba2="mamba2_step")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("conv_first", [False, True], ids=["repeat, conv", "conv, repeat"])
@pytest.mark.parametrize("kind", STEP)
def test_released_mamba_in_llama_computes_what_its_code_does(tmp_path, kind, conv_first, weights):
    """Red if Mamba-1's dt bias counts once or Mamba-2's twice, kv groups are tiled, rows of in_proj
    are taken for others, the norm is forgotten, or attention loses the base's scaled RoPE."""
    tensors, mamba_config = mamba_in_llama(kind, conv_first=conv_first)
    folder = write(tmp_path / "x", tensors, weights, mamba_config=mamba_config,
                   config=LLAMA | dict(rope_scaling=LLAMA3_ROPE))
    assert_same_model(folder, mamba_in_llama_logits(tensors, kind, LLAMA3_ROPE), tmp_path)
    assert hub.read_config(folder)["mixers"] == [STEP[kind], "attention", STEP[kind]]


@pytest.mark.parametrize("kind", STEP)
def test_m1s_fused_projections_are_taken_apart(tmp_path, kind):
    """z | x | B | C | dt and q | k | v. M1's attention knows no scaling, whatever its base has."""
    tensors, mamba_config = mamba_in_llama(kind, attention=(0, 2), fused=True)
    assert {"mha.in_proj.weight", "mamba.in_proj.weight"} <= {n.split(".", 3)[-1] for n in tensors}
    folder = write(tmp_path / "x", tensors, mamba_config=mamba_config,
                   config=LLAMA | dict(rope_scaling=LLAMA3_ROPE))
    assert_same_model(folder, mamba_in_llama_logits(tensors, kind, None), tmp_path)


def test_the_doubled_bias_is_folded_in_once(tmp_path):
    """Saving into the very folder of the release must not make the next load double it again."""
    tensors, mamba_config = mamba_in_llama()
    folder, name = write(tmp_path / "x", tensors, config=LLAMA, mamba_config=mamba_config), (
        "model.layers.0.mamba.dt_proj.bias")
    for _ in range(3):
        lm = LM.from_pretrained(folder)
        assert torch.equal(lm.state_dict()[name], 2 * tensors[name])
        lm.save_pretrained(folder)


@pytest.mark.parametrize("stored, asked", [(torch.float32, torch.bfloat16), (torch.bfloat16, None)])
@pytest.mark.parametrize("kind", STEP)
def test_a_released_student_in_bfloat16_keeps_its_decays(tmp_path, kind, stored, asked):
    """Decay rates and step biases stay float32 when the rest is bfloat16."""
    tensors, mamba_config = mamba_in_llama(kind)
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    folder = write(tmp_path / "x", tensors, config=LLAMA, mamba_config=mamba_config)
    found = part(LM.from_pretrained(folder, dtype=asked).state_dict(), "model.layers.0")
    released = {name: t.float() for name, t in part(tensors, "model.layers.0.mamba").items()}
    assert found[f"{kind}.out_proj.weight"].dtype == torch.bfloat16
    assert torch.equal(found[f"{kind}.A_log"], released["A_log"])
    if kind == "mamba":
        assert torch.equal(found["mamba.dt_proj.bias"], 2 * released["dt_proj.bias"])
    else:
        assert torch.equal(found["mamba2.A_log_bias"], released["dt_bias"])
        assert found["mamba2.z_bias"].dtype == torch.bfloat16 and not found["mamba2.z_bias"].any()


def without(values, key):
    return {name: value for name, value in values.items() if name != key}


@pytest.mark.parametrize("config, mamba_config, message", [
    (without(LLAMA, "hidden_size"), {}, "config.json lacks hidden_size .*meta-llama/Llama-3.2-3B"),
    (LLAMA, dict(attn_layers=None), "attn_layers = None"),
    (LLAMA, dict(attn_layers=[1, 3]), r"attn_layers = \[1, 3\], but layers are 0 .. 2"),
    (LLAMA, dict(ssm_cfg=dict(ngroups=H, d_state=8)), "d_state = 8, only 16"),
    (LLAMA, dict(ssm_cfg=dict(ngroups=2, d_state=P)), "ngroups = 2, only 4"),
    (LLAMA, dict(ssm_cfg=dict(norm_before_gate=True)), "ssm_cfg .*norm_before_gate"),
    (LLAMA, dict(ssm_cfg=dict(dt_rank=3)), r"has shape \(64, 2\), expected \(64, 3\)"),
    (LLAMA, dict(ssm_cfg=dict(d_state=8)), r"has shape \(64, 16\), expected \(64, 8\)"),
    (LLAMA, dict(attn_layers=[0, 1]), r"unexpected tensor model\.layers\.0\.mamba\.A_log"),
    (LLAMA | dict(num_key_value_heads=4), {},
     r"mamba\.B_proj\.weight has shape \(32, 32\), expected \(64, 32\)"),
])
def test_a_student_unlike_those_released_is_refused(tmp_path, config, mamba_config, message):
    """Red if a value is ignored that would make this model compute something else."""
    tensors, released = mamba_in_llama()
    folder = write(tmp_path / "x", tensors, config=config, mamba_config=released | mamba_config)
    with pytest.raises(ValueError, match=message):
        LM.from_pretrained(folder)


# ------------------------------------------------------------------ Llamba
def llamba(tied=True, n=6):
    """(tensors, config.json) of a Llamba, as released; its state size n is not its head dim."""
    channels = D + 2 * H * n
    mixer = {"in_proj.weight": (channels + D + H, D), "conv1d.weight": (channels, 1, 4),
             "conv1d.bias": (channels,), "z_bias": (D,), "D": (H,), "out_proj.weight": (D, D)}
    shapes = {"backbone.embedding.weight": (VOCAB, D), "backbone.final_layernorm.weight": (D,)}
    shapes |= {} if tied else {"lm_head.weight": (VOCAB, D)}
    for i in range(LAYERS):
        layer = layer_shapes() | {f"mixer.{name}": shape for name, shape in mixer.items()}
        shapes |= {f"backbone.layers.{i}.{name}": shape for name, shape in layer.items()}
    ssm = dict(d_state=n, n_v_heads=H, n_qk_heads=H, expand=1, chunk_size=128,
               activation="identity", bias=False)
    return random_weights(shapes), dict(
        model_type="llamba", vocab_size=VOCAB, tie_embeddings=tied, pad_vocab_size_multiple=8,
        lm_head_bias=False, d_model=D, n_layer=LAYERS, norm_epsilon=1e-5, ssm_cfg=ssm,
        mlp_cfg=dict(intermediate_size=FF, bias=False, act_fn="silu"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_released_llamba_computes_what_its_code_does(tmp_path, tied):
    """Red if a name goes elsewhere, z_bias is dropped, or the decay bias, which Llamba lacks,
    starts anywhere but at 0."""
    tensors, config = llamba(tied)
    expected = released_logits(tensors, lambda layer, u: llamba_release(part(layer, "mixer"), u),
                               "backbone", "embedding", "final_layernorm")
    lm = assert_same_model(write(tmp_path / "x", tensors, config=config), expected, tmp_path)
    assert not any(t.any() for name, t in lm.state_dict().items() if "A_log_bias" in name)


@pytest.mark.parametrize("where, changes, message", [
    ("ssm_cfg", dict(activation="silu"), "activation = 'silu'"),
    ("ssm_cfg", dict(n_qk_heads=2), "n_qk_heads = 2, only 4"),
    ("ssm_cfg", dict(bias=True), "bias = True"),
    ("ssm_cfg", dict(d_state=None), "lacks d_state"),
    ("mlp_cfg", dict(act_fn="gelu"), "act_fn = 'gelu'"),
    (None, dict(n_layer=None), "lacks n_layer"),
    (None, dict(n_layer=4), r"layers\.3\.\S+ is missing"),
    (None, dict(n_layer=2), r"unexpected tensor backbone\.layers\.2\.input_layernorm"),
    (None, dict(lm_head_bias=True), "lm_head_bias"),
])
def test_a_llamba_unlike_those_released_is_refused_by_name(tmp_path, where, changes, message):
    tensors, config = llamba()
    config = config | ({where: config[where] | changes} if where else changes)
    with pytest.raises(ValueError, match=message):
        LM.from_pretrained(write(tmp_path / "x", tensors, config=config))


# ------------------------------------------------------------------ other people's Llamas
FIELDS = {
    "3.2": dict(rope_parameters=LLAMA3_ROPE | dict(rope_theta=700.0), rope_theta=None),  # new
    "3.1": dict(rope_scaling=LLAMA3_ROPE | dict(factor=8.0), tie_word_embeddings=False),
    "bare": dict(rope_scaling=None, head_dim=None, num_key_value_heads=None, rms_norm_eps=None,
                 tie_word_embeddings=None),
    "all said": dict(rope_scaling=without(LLAMA3_ROPE, "rope_type") | dict(type="llama3"),
                     rope_interleaved=False, torch_dtype="float32", mlp_bias=None)}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("layout", ["model.safetensors", "model-{}.safetensors",
                                    "pytorch_model.bin", "pytorch_model-{}.bin"])
def test_a_llama_in_any_layout_equals_hugging_face(tmp_path, fields, layout):
    """Config and weights written by hand, as in repositories, not by our save. Red if a constant is
    assumed instead of read, or a shard is skipped."""
    transformers = pytest.importorskip("transformers")
    config = {key: value for key, value in (LLAMA | fields).items() if value is not None}
    torch.manual_seed(0)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    tensors = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    if config.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as in files of 2023
    if "{}" in layout:
        files = {name: layout.format(i % 3) for i, name in enumerate(sorted(tensors))}
        for file in set(files.values()):
            shard = {name: tensor for name, tensor in tensors.items() if files[name] == file}
            write(tmp_path, shard, file, config=config)
        index = tmp_path / (layout.replace("-{}", "") + ".index.json")
        index.write_text(json.dumps(dict(weight_map=files)))
    else:
        write(tmp_path, tensors, layout, config=config)
    with torch.no_grad():
        assert_close(LM.from_pretrained(str(tmp_path))(TOKENS[None]), hf(TOKENS[None]).logits)


def test_what_we_write_loads_in_transformers_and_here(tmp_path):
    """Red if a key of config.json is named or shaped other than transformers expects it."""
    transformers = pytest.importorskip("transformers")
    config = LLAMA | dict(rope_scaling=LLAMA3_ROPE, eos_token_id=[3, 5], max_position_embeddings=99)
    lm = LM.from_pretrained(write(tmp_path / "x", llama_weights(), config=config)).eval()
    lm.save_pretrained(str(tmp_path / "y"))
    hf = transformers.LlamaForCausalLM.from_pretrained(str(tmp_path / "y")).eval()
    with torch.no_grad():
        assert_close(hf(TOKENS[None]).logits, lm(TOKENS[None]))
    assert (hf.config.eos_token_id, hf.config.max_position_embeddings) == ([3, 5], 99)
    read = [hub.read_config(tmp_path / name) for name in "xy"]
    assert all(read[1][field] == value for field, value in read[0].items())
    assert sorted(os.listdir(tmp_path / "y")) == ["config.json", "model.safetensors"]
    fields = read[0] | dict(rope_scaling=without(LLAMA3_ROPE, "rope_type"))
    hub.write_checkpoint(tmp_path / "z", fields, lm.state_dict())
    assert hub.read_config(tmp_path / "z")["rope_scaling"] == LLAMA3_ROPE


@pytest.mark.parametrize("changes, message", [
    (dict(model_type="mistral"), "model_type = 'mistral'"),
    (dict(model_type=None), "lacks model_type"),
    (dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    (dict(hidden_act="gelu"), 'hidden_act = \'gelu\', only "silu"'),
    (dict(mlp_bias=True), "mlp_bias = True"),
    (dict(rope_interleaved=True), "rope_interleaved = True"),
    (dict(rope_parameters=dict(partial_rotary_factor=0.25)), "partial_rotary_factor = 0.25"),
    (dict(sliding_window=4096), "sliding_window = 4096"),
    (dict(quantization_config=dict(quant_method="gptq")), "quantization_config"),
    (dict(rope_scaling=dict(type="linear", factor=2.0)), "linear"),
    (dict(rope_scaling=7), "AttributeError|TypeError"),
    (dict(num_attention_heads=None), "lacks num_attention_heads"),
])
def test_what_the_model_would_get_wrong_is_refused_by_name(tmp_path, changes, message):
    """Each of these would load without it, and compute something else than its authors' model."""
    with pytest.raises(ValueError, match=message) as error:
        LM.from_pretrained(write(tmp_path / "x", llama_weights(), config=LLAMA | changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("written, read", [
    (None, "mamba2"), (True, "mamba2"), (False, "mamba2_step")])
def test_the_key_discrete_mamba2_that_we_wrote_once_is_understood(tmp_path, written, read):
    config = LLAMA | dict(mixers=["attention", "mamba2", "mamba"], discrete_mamba2=written)
    fields = hub.read_config(write(tmp_path / "x", {}, config=config))
    assert fields["mixers"] == ["attention", read, "mamba"] and "discrete_mamba2" not in fields


# ------------------------------------------------------------------ weight files
def identity(name, tensor):
    return tensor


def llama_folder(tmp_path, change):
    """A Llama's folder after `change` of its tensors, and the shapes that it should have."""
    tensors = llama_weights()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    change(tensors)
    return write(tmp_path / "x", tensors, config=LLAMA), shapes


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("model.norm.weight"), r"model.norm.weight is missing, expected shape \(32,\)"),
    (lambda w: w.update(extra=torch.ones(3)), r"unexpected tensor extra of shape \(3,\)"),
    (lambda w: w.update({"model.norm.weight": torch.ones(D + 1)}),
     r"model.norm.weight has shape \(33,\), expected \(32,\)"),
    (lambda w: w.update({"model.norm.weight": torch.ones(D, dtype=torch.int8)}),
     "model.norm.weight is of torch.int8"),
    (lambda w: w.update({"lm_head.weight": w[EMBEDDING][:9].clone()}),
     r"lm_head.weight has shape \(9, 32\), expected \(40, 32\)"),
    (lambda w: w.update({"lm_head.weight": -w[EMBEDDING]}), f"lm_head.weight is not {EMBEDDING}"),
], ids=["missing", "extra", "misshapen", "integer", "tied head's shape", "tied head"])
def test_a_wrong_tensor_is_named_with_its_shape(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        hub.read_tensors(*llama_folder(tmp_path, change), identity)


def test_tensors_are_cast_one_by_one_and_own_their_memory(tmp_path):
    """A tied head that is stored and equal is ignored. Red if a tensor still lies in the file: it
    would change with it, and a slice of a fused one would keep the whole."""
    folder, shapes = llama_folder(
        tmp_path, lambda w: w.update({"lm_head.weight": w[EMBEDDING].clone()}))
    found = hub.read_tensors(folder, shapes, identity)
    halves = hub.read_tensors(folder, shapes, lambda name, t: t.half() if "mlp" in name else t)
    with open(f"{folder}/model.safetensors", "r+b") as file:
        file.write(bytes(os.path.getsize(file.name)))
    for name, tensor in llama_weights().items():
        assert torch.equal(found[name], tensor)
        assert halves[name].dtype == (torch.half if "mlp" in name else torch.float32)
        assert found[name].untyped_storage().nbytes() == tensor.nbytes


def test_safetensors_come_first_and_a_stale_index_does_not_matter(tmp_path):
    """A folder that was sharded before we saved into it: what counts is what we saved."""
    folder, shapes = llama_folder(tmp_path, lambda w: None)
    (tmp_path / "x" / "pytorch_model.bin").write_bytes(b"not a model")
    (tmp_path / "x" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone"}}')
    assert hub.read_tensors(folder, shapes, identity).keys() == shapes.keys()


@pytest.mark.parametrize("index, message", [
    ({"a": "../x.safetensors"}, r"outside its folder.*\.\./x"),
    ({"a": "/etc/x.safetensors"}, "outside its folder.*/etc/x"),
    ({"a": 7}, "index.json cannot be used"), ([], "index.json cannot be used")])
def test_an_index_cannot_name_files_elsewhere(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=index)))
    with pytest.raises(ValueError, match=message):
        hub.checkpoint_folder(str(tmp_path))


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


@pytest.mark.parametrize("content", [b"", b"not a model", Exploit(), "text"],
                         ids=["empty", "garbage", "code", "no tensor"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_an_unreadable_file_is_named_and_never_executed(tmp_path, monkeypatch, name, content):
    """Red if weights_only is lost: a pickle may hold any code."""
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "x", {}, config=LLAMA)
    os.remove(f"{folder}/model.safetensors")
    if isinstance(content, bytes):
        (tmp_path / "x" / name).write_bytes(content)
    else:
        torch.save({"model.norm.weight": content}, f"{folder}/{name}")
    with pytest.raises(ValueError, match=f"{name} is not a readable weight file") as error:
        hub.read_tensors(folder, {}, identity)
    assert "\n" not in str(error.value) and not (tmp_path / "exploited").exists()


def test_what_is_not_there_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*config.json"):
        hub.read_config(tmp_path)
    folder = write(tmp_path / "x", {}, config=LLAMA)
    os.remove(f"{folder}/model.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file.*model.safetensors"):
        hub.read_tensors(folder, {}, identity)


MEASURE = """
import sys, torch, hub
def status(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) / 1024
shapes = {name: (50_000, 64) for name in ["model.embed_tokens.weight", *"abcdef"]}
for folder in sys.argv[1:]:
    for dtype in (torch.float32, torch.bfloat16):
        hub.read_tensors(folder, shapes, lambda name, t: t.to(dtype))  # what is imported on the way
        open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again from now
        before = status("VmRSS")
        found = hub.read_tensors(folder, shapes, lambda name, t: t.to(dtype))
        print(status("VmHWM") - before - sum(t.nbytes for t in found.values()) / 2 ** 20)
        del found
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures by Linux's /proc")
def test_loading_needs_one_tensor_more_than_the_weights(tmp_path):
    """Seven tensors of 12.2 MB each. Red if a file stays mapped while it is read."""
    tensors = {name: torch.ones(50_000, 64) for name in [EMBEDDING, *"abcdef"]}
    folders = [write(tmp_path / weights, tensors, weights, config=LLAMA)
               for weights in ("model.safetensors", "pytorch_model.bin")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *folders], capture_output=True, text=True,
                          timeout=120, cwd=os.path.dirname(hub.__file__))
    assert done.returncode == 0, done.stderr
    extra = [float(line) for line in done.stdout.split()]
    assert max(extra) < 2 * 12.2, f"MB beside the weights: {extra}"


def test_a_fingerprint_is_the_crc_of_all_weight_files(tmp_path):
    """Runs recorded with it must still match: red if its order or form changes."""
    files = {"b.safetensors": b"two", "a.safetensors": b"one", "c.bin": b"three", "d.json": b"no"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert hub.fingerprint(tmp_path) == f"{zlib.crc32(b'onetwothree'):08x}"


# ------------------------------------------------------------------ the Hub
@pytest.fixture
def snapshots(monkeypatch):
    """huggingface_hub whose snapshot_download does snapshots.answer(patterns)."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    fake = SimpleNamespace(asked=[], answer=None)

    def snapshot_download(name, allow_patterns):
        fake.asked.append((name, allow_patterns))
        return fake.answer(allow_patterns)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fake


def test_bin_files_are_downloaded_only_where_there_are_no_safetensors(snapshots, tmp_path):
    """Many repositories hold the weights twice."""
    def answer(patterns):
        name = "pytorch_model.bin" if "pytorch_model*.bin" in patterns else "README"
        (tmp_path / name).write_bytes(b"")
        return str(tmp_path)

    snapshots.answer = answer
    assert hub.checkpoint_folder("some-org/some.model-1B") == str(tmp_path)
    assert len(snapshots.asked) == 2 and snapshots.asked[0][0] == "some-org/some.model-1B"
    (tmp_path / "model.safetensors").write_bytes(b"")
    hub.checkpoint_folder("some-org/some.model-1B")
    hub.tokenizer_folder("some-org/some.model-1B")
    assert len(snapshots.asked) == 4
    assert not any("safetensors" in pattern or pattern == "*" for pattern in snapshots.asked[3][1])


@pytest.mark.parametrize("kind, message", [
    ("GatedRepoError", "GatedRepoError: 403.*hf auth login"),
    ("RepositoryNotFoundError", "RepositoryNotFoundError: 403"),
    ("LocalEntryNotFoundError", "LocalEntryNotFoundError: 403"), (None, "No space left on device")])
def test_a_repository_that_cannot_be_had_is_one_clear_line(snapshots, kind, message):
    """Raised as huggingface_hub raises it: most messages have several lines."""
    def answer(patterns):
        if kind is None:
            raise OSError(28, "No space left on device")
        errors = pytest.importorskip("huggingface_hub.errors")
        response = SimpleNamespace(status_code=403, headers={}, request=None, url="https://hub")
        arguments = {} if kind.startswith("Local") else dict(response=response)
        raise getattr(errors, kind)("403\nClient Error", **arguments)

    snapshots.answer = answer
    with pytest.raises(FileNotFoundError, match=f"no folder org/name; .*{message}") as error:
        hub.checkpoint_folder("org/name")
    assert "\n" not in str(error.value)


def test_without_huggingface_hub_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="org/name; .*pip install huggingface_hub"):
        hub.tokenizer_folder("org/name")


def test_only_what_looks_like_a_repository_is_looked_for(snapshots, tmp_path, monkeypatch):
    """Existing folders as they are; a missing out/teacher is no one's repository."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("org/name")
    os.mkdir("out")
    for name in ("org/name", "out/teacher", "teacher", "a/b/c", "/org/name", "./name", "../name",
                 "~/name", "org/", ""):
        assert hub.checkpoint_folder(name) == hub.tokenizer_folder(name) == name
    assert not snapshots.asked


# ------------------------------------------------------------------ tokenizers
BITS = [  # what a pre-tokenizer may stumble over; a fuzzed text is a few of them in a row
    " ", "  ", "    ", "\t", "\n", "\r\n", "\n\n", " \n", "\v", "\x85", "\xa0", "\u2003", "\u2028",
    "1", "12", "2024", "1,000", "3.14", "٣", "Ⅳ", "½", "²", "𝟘", "〇", "🤖", "👩‍👧", "e\u0301",
    "\u0301", "नम", "日本", "ſ", "K", "ﬁ", "'s", "'S", "'LL", "'ll", "'d", "’s", "'", "\x00", "\x7f",
    "\ufeff", "\U0010ffff", "<|im_end|>", "<|eot_id|>", "a", "the", " the", "Hello", "don", "!!!",
    "...", "$", "\\frac{1}{2}", "#### 42", "=", "-", "_"]
TEXT = "the other day there were 2048 hens and 12 ducks; they laid 365.\n  x's 'll\n"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *hub.LLAMA3_NAMES, "<|end_of_text|>"]
LEVEL = {use: dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=use)
         for use in (True, False)}
DIGITS = dict(type="Digits", individual_digits=True)
SPLIT = dict(type="Split", pattern=dict(Regex=hub.LLAMA3_PATTERN), behavior="Isolated",
             invert=False)


def steps(*pretokenizers):
    return dict(type="Sequence", pretokenizers=list(pretokenizers))


PRE_TOKENIZERS = {"GPT-2": LEVEL[True], "SmolLM2": steps(DIGITS, LEVEL[True]),
                  "Llama 3": steps(SPLIT, LEVEL[False])}


def fuzzed(count, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(BITS, k=rng.randint(1, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def trained():
    """A tokenizer.json: a byte-level BPE of 400 tokens, trained here by the tokenizers library."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.train_from_iterator([TEXT, *fuzzed(300, seed=1)], tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return json.loads(model.to_str())


def save_json(folder, content, **files):
    """A folder with a tokenizer.json and other JSON files; returns its path."""
    for name, value in {"tokenizer": content, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return str(folder)


def reference(content):
    """ids(text) by the tokenizers library, which is told to read special tokens as text."""
    import tokenizers
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    theirs.encode_special_tokens = True
    return lambda text: theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("steps", PRE_TOKENIZERS.values(), ids=PRE_TOKENIZERS)
def test_a_tokenizer_json_gives_the_ids_of_the_tokenizers_library(trained, steps, tmp_path):
    """Red if spaces before a digit are split as before a letter, or bytes are taken for others."""
    content = trained | dict(pre_tokenizer=steps)
    ours, theirs = Tokenizer(hub.read_tokenizer(save_json(tmp_path, content))), reference(content)
    for text in [TEXT, *fuzzed(1500)]:
        assert ours.encode(text) == theirs(text), repr(text)
        assert ours.decode(ours.encode(text)) == text


def broken(**changes):
    """A change of a tokenizer.json: of its model's keys, or of the file's if the model has none."""
    def apply(content):
        content = copy.deepcopy(content)
        for key, value in changes.items():
            old = content["model"].get(key)
            (content["model"] if key in content["model"] else content)[key] = (
                value(old) if callable(value) else value)
        return content
    return apply


@pytest.mark.parametrize("change, message", [
    (broken(type="Unigram"), "Unigram"), (broken(byte_fallback=True), "byte_fallback"),
    (broken(dropout=0.1), "dropout"), (broken(normalizer=dict(type="NFC")), "NFC"),
    (broken(pre_tokenizer=None), "pre-tokenizer"),
    (broken(pre_tokenizer=dict(type="Metaspace")), "Metaspace"),
    (broken(pre_tokenizer=LEVEL[True] | dict(add_prefix_space=True)), "add_prefix_space"),
    (broken(pre_tokenizer=LEVEL[False]), "use_regex"),
    (broken(pre_tokenizer=steps(LEVEL[True], DIGITS)), "Digits"),
    (broken(pre_tokenizer=steps(DIGITS | dict(individual_digits=False), LEVEL[True])), "Digits"),
    (broken(pre_tokenizer=steps(SPLIT | dict(invert=True), LEVEL[False])), "invert"),
    (broken(pre_tokenizer=steps(SPLIT | dict(pattern=dict(Regex="a")), LEVEL[False])), "Regex"),
    (broken(added_tokens=[dict(id=0, content="<|endoftext|>", special=False)]), "endoftext"),
    (broken(vocab=lambda vocab: vocab | {"▁a": 400}), "▁"),
    (broken(vocab=lambda vocab: vocab | {"aaa": 10 ** 12}), "to 1000000000000"),
    (broken(vocab=lambda vocab: vocab | {"aaa": -1}), "ids -1"),
    (broken(vocab=lambda vocab: vocab | {"aaa": 300}), "not one each"),
    (broken(vocab=lambda vocab: vocab | {"Ġqzj": 400}), "merges do not make"),
    (broken(merges=[]), "merges do not make"),
    (broken(merges=lambda merges: merges[:-5]), "merges do not make"),
    (broken(merges=lambda merges: merges[:-2] + merges[:-3:-1]), "in the order of the ids"),
    (broken(merges=[["a", "b"]] * 1_000_001), "1,000,001 merges"),
    (lambda content: {"model": {"type": "BPE"}}, "vocab"), (lambda content: [], "an object"),
])
def test_a_tokenizer_json_that_would_give_other_ids_is_refused(trained, change, message, tmp_path):
    """Other ids than a model was trained on give a model that babbles, without any error."""
    with pytest.raises(ValueError, match=message) as error:
        hub.read_tokenizer(save_json(tmp_path, change(trained)))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_token_that_merging_cannot_reach_needs_ignore_merges(trained, tmp_path):
    """Llama 3 has such tokens: a piece that is a token is taken whole, by tiktoken always."""
    content = broken(vocab=lambda vocab: vocab | {"Ġqzj": 400}, ignore_merges=True)(trained)
    ours = Tokenizer(hub.read_tokenizer(save_json(tmp_path, content)))
    ids = [content["model"]["vocab"]["x"], 400]
    assert ours.encode("x qzj") == reference(content)("x qzj") == ids


@pytest.fixture
def llama3(monkeypatch, tmp_path):
    """A folder with a tokenizer.model like Llama 3's, of 300 tokens."""
    words = ["in", " t", "he", " the", "\n\n", *map(str, range(961, 1000))]
    tokens = [bytes([byte]) for byte in range(256)] + [word.encode() for word in words]
    monkeypatch.setattr(hub, "LLAMA3_RANKS", len(tokens))
    (tmp_path / "tokenizer.model").write_bytes(
        b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)))
    return str(tmp_path)


def test_llama_3s_tokenizer_model_is_read(llama3):
    """Ids are line numbers, special tokens follow in Meta's order; three digits are one piece."""
    definition = hub.read_tokenizer(llama3)
    tokenizer, special = Tokenizer(definition), definition["special"]
    assert tokenizer.encode("in the") == [256, 259] and tokenizer.encode("9999") == [299, ord("9")]
    assert sorted(special.values()) == list(range(300, 556))
    assert [special[name] - 300 for name in definition["eos"]] == [9, 1, 8]
    assert tokenizer.decode(tokenizer.chat("\n What is {x}? ")) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
        "December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nWhat is {x}?<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n")
    os.mkdir(f"{llama3}/original")  # where Meta's repositories have it
    os.rename(f"{llama3}/tokenizer.model", f"{llama3}/original/tokenizer.model")
    assert hub.read_tokenizer(llama3) == definition


def test_which_of_several_tokenizers_counts(trained, llama3, tmp_path):
    """Llama 3's tokenizer.model; of Llama 2's, which has that name, nothing is read."""
    save_json(tmp_path, trained)
    assert len(hub.read_tokenizer(llama3)["ranks"]) == 300
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x18\x02" * 9)
    assert len(hub.read_tokenizer(llama3)["ranks"]) == 400
    os.remove(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="sentencepiece"):
        hub.read_tokenizer(llama3)
    os.remove(tmp_path / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match=re.escape(llama3)):
        hub.read_tokenizer(llama3)


@pytest.mark.parametrize("cut", [slice(-1), slice(1, None), slice(0, 1)])
def test_a_cut_off_tokenizer_model_is_refused(llama3, tmp_path, cut):
    path = tmp_path / "tokenizer.model"
    path.write_text("\n".join(path.read_text().splitlines()[cut]))
    with pytest.raises(ValueError, match=f"{re.escape(llama3)}.*300 lines"):
        hub.read_tokenizer(llama3)


# ------------------------------------------------------------------ chats
SMOLLM2_TEMPLATE = (  # the one in the repositories of SmolLM2
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}")
LLAMA3_TEMPLATE = (
    "<|begin_of_text|>{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
LLAMA31_TEMPLATE = LLAMA3_TEMPLATE.replace(  # without what it has for tools
    "<|begin_of_text|>", "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting "
    "Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>")


@pytest.mark.parametrize("place", ["chat_template.jinja", "one", "several"])
@pytest.mark.parametrize("template", [SMOLLM2_TEMPLATE, LLAMA3_TEMPLATE, LLAMA31_TEMPLATE],
                         ids=["SmolLM2", "Llama 3", "Llama 3.1"])
def test_a_chat_is_what_the_familys_template_renders(trained, template, place, tmp_path):
    """Rendered by Jinja and cut at the special tokens; the rest is encoded by tokenizers."""
    jinja2 = pytest.importorskip("jinja2")
    content = trained | dict(pre_tokenizer=PRE_TOKENIZERS["Llama 3"])
    several = [dict(name="tool_use", template="?"), dict(name="default", template=template)]
    files = dict(tokenizer_config=dict(chat_template=several if place == "several" else template))
    if place == "chat_template.jinja":  # counts before the other
        (tmp_path / place).write_text(template)
        files = dict(tokenizer_config=dict(chat_template="?"))
    tokenizer = Tokenizer(hub.read_tokenizer(save_json(tmp_path, content, **files)))
    for question in ("What is 2+2?", "  two", "\n\nlines\n", "", "7", " {{ x }} \\boxed{1}", "é🤖"):
        text, ids = jinja2.Template(template, keep_trailing_newline=True).render(
            messages=[dict(role="user", content=question)], add_generation_prompt=True), []
        for piece in re.split(rf"({'|'.join(map(re.escape, SPECIAL))})", text):
            ids += [SPECIAL.index(piece)] if piece in SPECIAL else reference(content)(piece)
        assert tokenizer.chat(question) == ids
    end = "<|im_end|>" if template == SMOLLM2_TEMPLATE else "<|eot_id|>"
    assert tokenizer.eos_ids[0] == SPECIAL.index(end)


@pytest.mark.parametrize("name, config, prompt", [
    ("tokenizer.json", None, "Cutting Knowledge"), ("tokenizer.json", {}, "Cutting Knowledge"),
    ("tokenizer.model", None, "Cutting Knowledge"),
    ("tokenizer.model", {}, "<|begin_of_text|>hi\n")])
def test_a_llama_3_without_a_template_is_instruct(trained, llama3, tmp_path, name, config, prompt):
    """But for a tokenizer.model whose tokenizer_config.json could have one: a base model's."""
    save_json(tmp_path, trained, **({} if config is None else dict(tokenizer_config=config)))
    os.remove(tmp_path / ("tokenizer.json" if name == "tokenizer.model" else "tokenizer.model"))
    tokenizer = Tokenizer(hub.read_tokenizer(llama3))
    assert prompt in tokenizer.decode(tokenizer.chat("hi"))


def test_a_base_models_prompt_is_the_text_and_its_end_is_its_configs(trained, tmp_path):
    """Without the special tokens of Llama 3 there is no guess at a chat."""
    content = broken(added_tokens=trained["added_tokens"][:3], vocab=lambda vocab: {
        token: i for token, i in vocab.items() if token not in SPECIAL[3:]})(trained)
    config = dict(config=dict(eos_token_id=0))
    tokenizer = Tokenizer(hub.read_tokenizer(save_json(tmp_path, content, **config)))
    assert tokenizer.chat("hi") == tokenizer.encode("hi\n") and tokenizer.eos_ids == [0]
    config |= dict(generation_config=dict(eos_token_id=[2, 0]))
    assert Tokenizer(hub.read_tokenizer(save_json(tmp_path, content, **config))).eos_ids == [0, 2]
    with pytest.raises(ValueError, match="eos_token_id, 77"):
        config = dict(generation_config=dict(eos_token_id=77))
        hub.read_tokenizer(save_json(tmp_path, content, **config))


def test_an_unknown_chat_template_is_refused(trained, tmp_path):
    """A guess would give a prompt that the model never saw in training."""
    template = dict(chat_template="{{ '<|im_start|>system\nYou are Qwen<|im_end|>' }}")
    with pytest.raises(ValueError, match="neither Llama 3's nor SmolLM2's"):
        hub.read_tokenizer(save_json(tmp_path, trained, tokenizer_config=template))


# ------------------------------------------------------------------ data sets
@pytest.fixture
def data_sets(monkeypatch):
    """A fake package `datasets` of 30 rows; the list of what was asked for and taken."""
    calls = []

    def load_dataset(repository, name=None, split=None, streaming=False):
        calls.append((repository, name, split, streaming))
        rows = [dict(row=i) for i in range(30)]
        return (calls.append(row["row"]) or row for row in rows) if streaming else rows
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_rows_come_whole_or_streamed_no_further_than_needed(data_sets):
    """OpenMathInstruct-2 has 14 million: red if all are downloaded first."""
    assert hub.dataset_rows("gsm8k", "test") == [dict(row=i) for i in range(30)]
    assert hub.dataset_rows("openmath2", "train", (3, 6)) == [dict(row=i) for i in (3, 4, 5)]
    assert data_sets == [("openai/gsm8k", "main", "test", False),
                         ("nvidia/OpenMathInstruct-2", None, "train", True), 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("task, split, rows, message", [
    ("math500", "train", None, "math500 has no train split: it has test"),
    ("openmath2", "test", None, "it has train"),
    ("openmath2", "train", (40, 50), "no rows 40 to 50")])
def test_what_a_data_set_does_not_have_is_an_error(data_sets, task, split, rows, message):
    with pytest.raises(ValueError, match=message):
        hub.dataset_rows(task, split, rows)


@pytest.mark.parametrize("fake, message", [
    (None, "pip install datasets"),
    (lambda *args, **kwargs: 1 / 0, "Hub.*ZeroDivisionError.*network"),
    (lambda *args, **kwargs: (1 / 0 for _ in "a"), "Hub.*ZeroDivisionError.*network")],
    ids=["no package", "no network", "lost while streaming"])
@pytest.mark.parametrize("rows", [None, (0, 2)])
def test_without_datasets_or_network_the_way_out_is_named(monkeypatch, fake, message, rows):
    package = fake and SimpleNamespace(load_dataset=fake)
    monkeypatch.setitem(sys.modules, "datasets", package)
    with pytest.raises(ValueError, match=message) as error:
        hub.dataset_rows("openmath2", "train", rows)
    assert ".jsonl" in str(error.value) and "\n" not in str(error.value)


def test_importing_it_brings_no_torch():
    """grade.py and plot.py do without."""
    code = "import sys, hub; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(hub.__file__))
    assert done.returncode == 0
