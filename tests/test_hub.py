"""What hub.py promises: what others released computes here what it computes there, ids are those of
the tokenizers library, and what would be wrong is refused by name. No network: random weights are
written in the released layouts, and the released mixers, in float64."""
import base64
import copy
import itertools
import json
import math
import os
import random
import re
import sys
import weakref
import zlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import hub
from conftest import assert_close
from data import Tokenizer
from kernels import selective_scan_ref, ssd_ref
from model import LM

LLAMA3_ROPE = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16)
D, H, K, P, LAYERS, VOCAB, FF = 32, 4, 2, 16, 3, 40, 24  # H P is not D: no size hides another
INNER, KV, RANK, TOKENS = H * P, K * P, 2, torch.arange(19) * 7 % VOCAB
LLAMA = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=VOCAB,
             hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=H, head_dim=P,
             num_key_value_heads=K, intermediate_size=FF, rms_norm_eps=1e-5, rope_theta=500.0,
             tie_word_embeddings=True)
MLP = {"input_layernorm": (D,), "post_attention_layernorm": (D,), "mlp.gate_proj": (FF, D),
       "mlp.up_proj": (FF, D), "mlp.down_proj": (D, FF)}
ATTENTION = {"self_attn.q_proj": (INNER, D), "self_attn.k_proj": (KV, D),
             "self_attn.v_proj": (KV, D), "self_attn.o_proj": (D, INNER)}


def random_weights(mixers, ends=("model.embed_tokens", "model.norm"), layers="model.layers"):
    """Tensors of a model whose layers have these mixers, {name: shape}. None is at a value such as
    0 or 1 that would hide a mistake in its use."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    shapes = {ends[0]: (VOCAB, D), ends[1]: (D,)} | {
        f"{layers}.{i}.{name}": shape for i, mixer in enumerate(mixers)
        for name, shape in (MLP | mixer).items()}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        full = name if name.endswith(("bias", "A_log", ".D")) else name + ".weight"
        tensors[full] = (1 + 0.3 * tensor if "norm" in name else 0.5 * tensor if len(shape) == 1
                         else tensor / math.prod(shape[1:]) ** 0.5)
    return tensors


def write(folder, tensors, weights="model.safetensors", **configs):
    """A folder with weights and JSON files; returns its path."""
    folder.mkdir(exist_ok=True)
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    (torch.save if weights.endswith(".bin") else save_file)(tensors, folder / weights)
    return str(folder)


# ---- released mixers: w, u (L, D)
def convolve(x, w):
    """Causal, depthwise: x (L, C)."""
    return F.conv1d(F.pad(x.T, (3, 0)), w["conv1d.weight"], w["conv1d.bias"], groups=x.shape[1]).T


def repeat_groups(x, size):
    """repeat_kv of the release: groups of channels, each H / K times in a row. x (L, C)."""
    return torch.cat([group for group in x.split(size, 1) for _ in range(H // K)], 1)


def mamba1_release(w, u, size=16):
    """mamba/hybrid_mamba_layer.py: dt_proj adds its bias, and the scan adds it again."""
    rows = w.get("in_proj.weight")
    if rows is None:
        rows = torch.cat([w[f"{name}.weight"] for name in (
            "in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")])
    z, x, B, C, low = (u @ rows.T).split([INNER, KV, KV, INNER, RANK], dim=1)
    first = len(w["conv1d.bias"]) == INNER  # repeat_kv_before_conv
    x = F.silu(convolve(repeat_groups(x, size) if first else x, w))
    x = x if first else repeat_groups(x, size)
    delta = low @ w["dt_proj.weight"].T + w["dt_proj.bias"]  # nn.Linear
    B, C = (v.view(1, len(u), -1, size) for v in (repeat_groups(B, size), C))  # (1, L, G, N)
    y, _ = selective_scan_ref(x[None], delta[None], -w["A_log"].exp(), B, C, w["D"], z[None],
                              w["dt_proj.bias"], dt_softplus=True)
    return y[0] @ w["out_proj.weight"].T


def ssd(x, B, C, log_decay, D_skip):
    """h <- decay h + x B^T, y = h C + D x, by heads: (L, H, P). x (L, H P), log_decay (L, H)."""
    x, B, C = (v.unflatten(1, (H, -1)) for v in (x, B, C))
    return ssd_ref(x[None], log_decay[None], B[None], C[None])[0][0] + D_skip[:, None] * x


def mamba2_release(w, u):
    """mamba2/hybrid_mamba_layer.py: dt bias once, SiLU on x, B and C, a gated norm per head."""
    z, x, B, C, dt = (u @ w["in_proj.weight"].T).split([INNER, KV, KV, INNER, H], dim=1)
    first = len(w["conv1d.bias"]) == 3 * INNER
    x, B = (repeat_groups(v, P) if first else v for v in (x, B))
    x, B, C = F.silu(convolve(torch.cat([x, B, C], 1), w)).split([x.shape[1], B.shape[1], INNER], 1)
    x, B = (v if first else repeat_groups(v, P) for v in (x, B))
    dt = F.softplus(dt + w["dt_bias"])  # (L, H)
    y = ssd(x, dt.repeat_interleave(P, 1) * B, C, -dt * w["A_log"].exp(), w["D"])
    y = y * F.silu(z).view(-1, H, P)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["norm.weight"].view(H, P)
    return y.flatten(1) @ w["out_proj.weight"].T


def llamba_release(w, u, n=6):
    """Llamba's discrete Mamba-2: rows x | B | C | z | A_log, no activation, no step size."""
    x, B, C, z, a = (u @ w["in_proj.weight"].T).split([D, H * n, H * n, D, H], dim=1)
    x, B, C = convolve(torch.cat([x, B, C], 1), w).split([D, H * n, H * n], dim=1)
    y = ssd(x, B, C, -F.softplus(a), w["D"]).flatten(1)
    return (y * F.silu(z + w["z_bias"])) @ w["out_proj.weight"].T


def part(tensors, prefix):
    return {name.removeprefix(prefix + "."): t for name, t in tensors.items()
            if name.startswith(prefix + ".")}


def assert_same_model(folder, tensors, release, mixers):
    """A model's mixers compute what was released, and its other weights are those released."""
    lm, u = LM.from_pretrained(folder).requires_grad_(False), torch.randn(19, D)
    ours = lm.state_dict()
    for name, tensor in tensors.items():
        if name.endswith("out_proj.weight") and "mha" not in name:
            w = {key: t.double() for key, t in part(tensors, name.rsplit(".", 2)[0]).items()}
            mixer = lm.layers[int(name.split(".")[2])].mixer
            assert_close(mixer(u[None], None)[0], release(w, u.double()))
        elif mixers not in name and "mha" not in name:
            name = {"backbone.embedding.weight": "model.embed_tokens.weight",
                    "backbone.final_layernorm.weight": "model.norm.weight"}.get(name, name)
            assert torch.equal(ours[name.replace("backbone.", "model.")], tensor)
    return ours


# ---- MambaInLlama, M1, Llamba
MAMBA1 = dict(in_proj_x=(KV, D), B_proj=(KV, D), C_proj=(INNER, D), in_proj_z=(INNER, D),
              dt_proj_down=(RANK, D), dt_proj=(INNER, RANK), out_proj=(D, INNER),
              A_log=(INNER, 16), D=(INNER,)) | {"dt_proj.bias": (INNER,)}
MAMBA2 = dict(in_proj=(2 * INNER + 2 * KV + H, D), dt_bias=(H,), A_log=(H,), D=(H,),
              norm=(INNER,), out_proj=(D, INNER))
STEP = dict(mamba="mamba", mamba2="mamba2_step")


def mamba_in_llama(kind="mamba", layout="repeat, conv"):
    """(tensors, mamba_config.json) of a MambaInLlama student of LLAMA, as released: the convolution
    runs before or after kv heads are repeated; M1's products are fused."""
    channels = dict(mamba=(INNER, KV), mamba2=(3 * INNER, INNER + 2 * KV))[kind]
    channels = channels[layout == "conv, repeat"]
    mixer = {f"mamba.{name}": shape for name, shape in (
        dict(mamba=MAMBA1, mamba2=MAMBA2)[kind]
        | {"conv1d": (channels, 1, 4), "conv1d.bias": (channels,)}).items()}
    tensors = random_weights([mixer, ATTENTION, mixer])
    for i, (whole, parts) in itertools.product(range(LAYERS), hub.FUSED.items()):
        names = [f"model.layers.{i}.{name}.weight" for name in parts.split()]
        if names[0] in tensors and layout == "M1":
            rows = torch.cat([tensors.pop(name) for name in names])
            tensors[f"model.layers.{i}.{whole}.weight"] = rows
    ssm = dict(expand=1) if kind == "mamba" else dict(expand=1, ngroups=H, d_state=P)
    return tensors, dict(d_model=D, ssm_cfg=ssm, d_inner=INNER, d_xb=KV, n_layer=LAYERS,
                         attn_layers=[1], hidden_act="silu", vocab_size=None)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("layout", ["repeat, conv", "conv, repeat", "M1"])
@pytest.mark.parametrize("kind", STEP)
def test_released_mamba_in_llama_computes_what_its_code_does(tmp_path, kind, layout, weights):
    """Red if Mamba-1's dt bias counts once or Mamba-2's twice, kv groups are tiled, rows of fused
    products are mixed up, the norm is forgotten, or M1 has the scaled RoPE of its base."""
    tensors, mamba_config = mamba_in_llama(kind, layout)
    folder = write(tmp_path / "x", tensors, weights, mamba_config=mamba_config,
                   config=LLAMA | dict(rope_scaling=LLAMA3_ROPE))
    release = mamba1_release if kind == "mamba" else mamba2_release
    ours = part(assert_same_model(folder, tensors, release, ".mamba."), "model.layers.1.self_attn")
    fields = hub.read_config(folder)
    assert fields["mixers"] == [STEP[kind], "attention", STEP[kind]]
    assert fields["rope_scaling"] == (None if layout == "M1" else LLAMA3_ROPE)
    if layout == "M1":
        for whole, parts in dict(in_proj="qkv", out_proj="o").items():
            rows = torch.cat([ours[f"{name}_proj.weight"] for name in parts])
            assert torch.equal(rows, tensors[f"model.layers.1.mha.{whole}.weight"])


@pytest.mark.parametrize("stored, asked", [(torch.float32, torch.bfloat16), (torch.bfloat16, None)])
@pytest.mark.parametrize("kind", STEP)
def test_a_released_student_in_bfloat16_keeps_its_decays(tmp_path, kind, stored, asked):
    """Decay rates and step biases stay float32 when the rest is bfloat16; Mamba-1's doubled bias is
    folded in once, also if we save into the folder of the release."""
    tensors, mamba_config = mamba_in_llama(kind)
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    folder = write(tmp_path / "x", tensors, config=LLAMA, mamba_config=mamba_config)
    released = {name: t.float() for name, t in part(tensors, "model.layers.0.mamba").items()}
    kept = (dict(A_log=released["A_log"], A_log_bias=released["dt_bias"]) if kind == "mamba2" else
            {"A_log": released["A_log"], "dt_proj.bias": 2 * released["dt_proj.bias"]})
    for _ in range(2):
        lm = LM.from_pretrained(folder, dtype=asked)
        found = part(lm.state_dict(), f"model.layers.0.{kind}")
        assert all(torch.equal(found[name], expected) for name, expected in kept.items())
        assert found["out_proj.weight"].dtype == torch.bfloat16
        assert kind == "mamba" or found["z_bias"].dtype == torch.bfloat16
        lm.save_pretrained(folder)


def llamba(tied=True, n=6):
    """(tensors, config.json) of a Llamba, as released; its state size n is not its head dim."""
    channels = D + 2 * H * n
    mixer = {"in_proj": (channels + D + H, D), "conv1d": (channels, 1, 4),
             "conv1d.bias": (channels,), "z_bias": (D,), "D": (H,), "out_proj": (D, D)}
    tensors = random_weights([{f"mixer.{name}": shape for name, shape in mixer.items()}] * LAYERS,
                             ("backbone.embedding", "backbone.final_layernorm"), "backbone.layers")
    if not tied:
        tensors["lm_head.weight"] = torch.randn(VOCAB, D)
    ssm = dict(d_state=n, n_v_heads=H, n_qk_heads=H, expand=1, chunk_size=128,
               activation="identity", bias=False)
    return tensors, dict(
        model_type="llamba", vocab_size=VOCAB, tie_embeddings=tied, pad_vocab_size_multiple=8,
        lm_head_bias=False, d_model=D, n_layer=LAYERS, norm_epsilon=1e-5, ssm_cfg=ssm,
        mlp_cfg=dict(intermediate_size=FF, bias=False, act_fn="silu"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_released_llamba_computes_what_its_code_does(tmp_path, tied):
    """Red if a name goes elsewhere, z_bias is dropped, or the decay bias, which is ours, not 0."""
    tensors, config = llamba(tied)
    folder = write(tmp_path / "x", tensors, config=config)
    ours = assert_same_model(folder, tensors, llamba_release, ".mixer.")
    assert ("lm_head.weight" in ours) != tied
    assert not any(t.any() for name, t in ours.items() if "A_log_bias" in name)


# ---- other people's Llamas
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
OLD_ROPE = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_type"}
FIELDS = {
    "3.2": dict(rope_parameters=LLAMA3_ROPE | dict(rope_theta=700.0), rope_theta=None),  # new
    "3.1": dict(rope_scaling=LLAMA3_ROPE | dict(factor=8.0), tie_word_embeddings=False),
    "bare": dict(rope_scaling=None, head_dim=None, num_key_value_heads=None, rms_norm_eps=None,
                 tie_word_embeddings=None),
    "old": dict(rope_scaling=OLD_ROPE | dict(type="llama3"), rope_interleaved=False, mlp_bias=None)}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("layout", ["model.safetensors", "part.{}.safetensors",
                                    "pytorch_model.bin", "any_{}.bin"])
def test_a_llama_in_any_layout_equals_hugging_face(tmp_path, fields, layout):
    """Config and weights written by hand, as in repositories, not by our save. Red if a constant is
    assumed instead of read, or a shard is skipped, which may have any name."""
    transformers = pytest.importorskip("transformers")
    config = {key: value for key, value in (LLAMA | fields).items() if value is not None}
    torch.manual_seed(0)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    tensors = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    if config.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    files = {name: layout.format(i % 3) for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        write(tmp_path, {name: tensors[name] for name in files if files[name] == file}, file,
              config=config)
    if "{}" in layout:
        whole = "pytorch_model.bin" if "bin" in layout else "model.safetensors"
        (tmp_path / f"{whole}.index.json").write_text(json.dumps(dict(weight_map=files)))
    with torch.no_grad():
        assert_close(LM.from_pretrained(str(tmp_path))(TOKENS[None]), hf(TOKENS[None]).logits)


def test_what_we_write_loads_in_transformers_and_here(tmp_path):
    """Red if a key of config.json is named or shaped other than transformers expects it, or
    discrete_mamba2, which we wrote once, is forgotten."""
    for written, found in (None, "mamba2"), (True, "mamba2"), (False, "mamba2_step"):
        config = LLAMA | dict(mixers=["attention", "mamba2", "mamba"], discrete_mamba2=written)
        fields = hub.read_config(write(tmp_path / "x", random_weights([{}]), config=config))
        assert fields["mixers"] == ["attention", found, "mamba"]
    transformers = pytest.importorskip("transformers")
    config = LLAMA | dict(rope_scaling=LLAMA3_ROPE, eos_token_id=[3, 5], max_position_embeddings=99)
    folder = write(tmp_path / "x", random_weights([ATTENTION] * LAYERS), config=config)
    lm = LM.from_pretrained(folder).eval()
    lm.save_pretrained(str(tmp_path / "y"))
    hf = transformers.LlamaForCausalLM.from_pretrained(str(tmp_path / "y")).eval()
    with torch.no_grad():
        assert_close(hf(TOKENS[None]).logits, lm(TOKENS[None]))
    assert (hf.config.eos_token_id, hf.config.max_position_embeddings) == ([3, 5], 99)
    fields, again = (hub.read_config(tmp_path / name) for name in "xy")
    assert all(again[field] == value for field, value in fields.items())
    assert sorted(os.listdir(tmp_path / "y")) == ["config.json", "model.safetensors"]
    hub.write_checkpoint(tmp_path / "z", fields | dict(rope_scaling=OLD_ROPE), lm.state_dict())
    assert hub.read_config(tmp_path / "z")["rope_scaling"] == LLAMA3_ROPE


@pytest.mark.parametrize("release, key, value, message", [
    ("llama", "model_type", "mistral", 'model_type is "mistral", expected "llama"'),
    ("llama", "hidden_act", "gelu", 'hidden_act is "gelu"'),
    ("llama", "num_hidden_layers", 10 ** 5, "layers is 100000, but there are 29 tensors"),
    ("llama", "vocab_size", 10 ** 7, r"\(40, 32\), .*expected \(10000000, 32\)"),
    ("llama", "mixers", ["mamba2"], "x/config.json .*mixers has 1 entries for n_layers = 3"),
    ("llama", "mlp_bias", True, "mlp_bias is true, expected false"),
    ("llama", "rope_interleaved", True, "rope_interleaved is true"),
    ("llama", "rope_parameters", dict(partial_rotary_factor=0.25), "partial_rotary_factor is 0.25"),
    ("llama", "rope_scaling", dict(type="linear", factor=2.0), "linear"),
    ("mamba", "num_key_value_heads", 4, r"0\.mamba\.B_proj.*\(32, 32\).*expected.*\(64, 32\)"),
    ("mamba", "attn_layers", None, "cannot be used: TypeError"),
    ("mamba", "attn_layers", [1, 3], r"attn_layers = \[1, 3\] of 3 layers"),
    ("mamba", "attn_layers", [0, 1], r"0\.mamba\.A_log.*expected no such tensor"),
    ("mamba", "ssm_cfg", dict(ngroups=H, d_state=8), "d_state is 8, expected 16"),
    ("mamba", "ssm_cfg", dict(ngroups=2, d_state=P), "ngroups is 2, expected 4"),
    ("mamba", "ssm_cfg", dict(norm_before_gate=True), "ssm_cfg .*norm_before_gate"),
    ("llamba", "activation", "silu", 'activation is "silu"'),
    ("llamba", "n_qk_heads", 2, "n_qk_heads is 2, expected 4"),
    ("llamba", "act_fn", "gelu", 'act_fn is "gelu"'),
    ("llamba", "n_layer", 4, r"missing.*layers\.3\."),
    ("llamba", "n_layer", 2, r"backbone\.layers\.2\.\S+, .*expected no such tensor"),
    ("llama", NORM, None, f"missing tensors: {NORM}"),
    ("llama", NORM, [1.0] * (D - 1) + [math.nan], f"tensor {NORM}, .* holds nan or inf"),
    ("llama", NORM, [1.0] * (D - 1) + [-math.inf], f"tensor {NORM}, .* holds nan or inf"),
    ("llama", "extra.weight", [1.0] * 3, r"extra.weight, .*\(3,\), cannot.* no such tensor"),
    ("llama", NORM, [1.0] * (D + 1), rf"{NORM}, .*\(33,\).* expected \(32,\)"),
    ("llama", NORM, [1] * D, f"{NORM}, torch.int64"),
    ("llama", "model.lm_head.weight", [[1.0] * D] * 9, r"d.weight, .*\(9, 32\).* no such tensor")])
def test_what_would_compute_something_else_is_refused(tmp_path, release, key, value, message):
    """Red if a value is ignored that its authors' code would heed, or if a config is believed that
    the weights do not fit: a hundred thousand layers hung."""
    tensors, config = dict(llama=(random_weights([ATTENTION] * LAYERS), LLAMA), llamba=llamba(),
                           mamba=mamba_in_llama())[release]
    files = copy.deepcopy(dict(config=LLAMA, mamba_config=config) if release == "mamba"
                          else dict(config=config))
    owners = [*files.values(), *(owner for file in files.values() for owner in file.values())]
    owner = next((owner for owner in owners if isinstance(owner, dict) and key in owner), None)
    if key.endswith(".weight"):
        tensors.pop(key, None)
        tensors |= {key: torch.tensor(value)} if value else {}
    else:
        (owner or files["config"])[key] = value
    with pytest.raises(ValueError, match=message) as error:
        LM.from_pretrained(write(tmp_path / "x", tensors, **files))
    assert "\n" not in str(error.value)


WRONG = [[], {}, "a", -1, 0, 1.5, True, 10 ** 30, 10 ** 400, {"end": 2}, ["mamba2", 3], [[]]]
RIGHT = dict(rope_theta=[1.5], rms_norm_eps=[1.5], factor=[1.5], tie_word_embeddings=[True],
             eos_token_id=[[], 0], mixers=[[]], rope_scaling=[{}, {"end": 2}],
             rope_parameters=[{}, {"end": 2}])


@pytest.mark.parametrize("key", [*hub.HF_KEYS.values(), "rope_parameters", "factor"])
def test_a_field_of_the_wrong_type_or_size_is_named(tmp_path, key):
    """It cost a traceback in the middle of a mixer, or the memory of the machine."""
    folder, right = write(tmp_path / "x", random_weights([ATTENTION] * LAYERS)), RIGHT.get(key, [])
    for value in (value for value in WRONG if repr(value) not in map(repr, right)):
        changes = dict(rope_scaling=LLAMA3_ROPE | {key: value}) if key == "factor" else {key: value}
        (tmp_path / "x" / "config.json").write_text(json.dumps(LLAMA | changes))
        field = key.replace("rope_parameters", "rope_scaling")
        with pytest.raises(ValueError, match=f"x.*config.json.*{field}") as error:
            LM.from_pretrained(folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


# ---- weight files
def test_a_model_does_not_lie_in_its_file(tmp_path):
    """A tied head that is stored is ignored; an index of shards beside what we saved is stale. Red
    if a tensor would change with the file, or a slice of a fused one kept the whole."""
    weights = random_weights([ATTENTION] * LAYERS)
    head = {"lm_head.weight": weights[EMBEDDING].clone()}
    folder = write(tmp_path / "x", weights | head, config=LLAMA)
    (tmp_path / "x" / "pytorch_model.bin").write_bytes(b"not a model")
    (tmp_path / "x" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    state = LM.from_pretrained(folder).state_dict()
    with open(f"{folder}/model.safetensors", "r+b") as file:
        file.write(bytes(os.path.getsize(file.name)))
    for name, tensor in weights.items():
        assert torch.equal(state[name], tensor)
        assert state[name].untyped_storage().nbytes() == tensor.nbytes


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


TWICE = b"{%s,%s}" % ((b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',) * 2)
WEIGHTS, INDEX = ["model.safetensors", "pytorch_model.bin"], "model.safetensors.index.json"


@pytest.mark.parametrize("name, content, message", [
    *itertools.product(WEIGHTS, [b"", b"not a model", Exploit(), "text"], [" cannot be used"]),
    (WEIGHTS[0], len(TWICE).to_bytes(8, "little") + TWICE + bytes(8), " cannot be used: .* twice"),
    *((INDEX, content.encode(), "") for content in (
        "[]", "null", "{}", *('{"weight_map": %s}' % weight_map for weight_map in (
            "3", "[]", "null", "{}", *('{"a": %s}' % name for name in (
                '"../x.safetensors"', '"/x.safetensors"', '"a/x.bin"', '""', '"."', '".."', "5",
                "null", '["x.bin"]', '"config.json"'))))))])
def test_an_unreadable_file_is_named_never_executed(tmp_path, monkeypatch, name, content, message):
    """Red if weights_only is lost: a pickle may hold any code. Readers differ in which of two
    tensors of one name counts. An index names nothing but files beside it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*config.json"):
        hub.read_config(tmp_path)
    folder = write(tmp_path / "x", {}, "y.safetensors", config=LLAMA)
    save_file({}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x/model.safetensors cannot be used: FileNotFoundError"):
        hub.read_tensors(folder, {}, None)
    if isinstance(content, bytes):
        (tmp_path / "x" / name).write_bytes(content)
    else:
        torch.save({"model.norm.weight": content}, f"{folder}/{name}")
    with pytest.raises(ValueError, match=f"x/{name}{message}") as error:
        hub.read_tensors(folder, {}, None)
    assert "\n" not in str(error.value) and not (tmp_path / "exploited").exists()


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_one_tensor_at_a_time_is_in_memory_twice(tmp_path, monkeypatch, weights):
    """Red if a file stays mapped while the next tensors are read: all of it would be."""
    tensors = {name: torch.ones(8) for name in [EMBEDDING, *"abc"]}
    folder = write(tmp_path / "x", tensors, weights, config=LLAMA)
    mapped, map_file = [], hub.map_file

    def watched(path, names=None):
        assert all(tensor() is None for some in mapped[:-1] for tensor in some)
        found = map_file(path, names)
        mapped.append([weakref.ref(tensor) for tensor in found.values()])
        return found

    monkeypatch.setattr(hub, "map_file", watched)
    found = hub.read_tensors(folder, dict.fromkeys(tensors, (8,)), lambda name, t: t.clone())
    assert found.keys() == tensors.keys()
    assert len(mapped) == 1 + len(tensors)


def test_a_fingerprint_is_the_crc_of_all_weight_files(tmp_path):
    """Runs recorded with it must still match: red if its order or form changes."""
    for file in "b.safetensors two", "a.safetensors one", "c.bin three", "d.json no":
        (tmp_path / file.split()[0]).write_text(file.split()[1])
    assert hub.fingerprint(tmp_path) == f"{zlib.crc32(b'onetwothree'):08x}"


# ---- the Hub
def test_a_repository_is_downloaded_without_weights_that_it_has_twice(monkeypatch, tmp_path):
    """.bin files only where there are no safetensors. What cannot be had is one clear line.
    Existing folders are taken as they are; a missing out/teacher is no one's repository."""
    asked, index = [], tmp_path / "model.safetensors.index.json"
    fake = SimpleNamespace(snapshot_download=lambda name, allow_patterns: (
        asked.append(allow_patterns), str(tmp_path))[1])
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    for weights in "pytorch_model.bin", "a.safetensors", "model.safetensors":
        assert hub.checkpoint_folder("org/name-1.5B") == str(tmp_path)
        assert asked[-2:] == [["*.json", "model.safetensors"], ["*.json", weights]]
        (tmp_path / "model.safetensors").touch() if index.exists() else index.write_text(
            '{"weight_map": {"x": "a.safetensors"}}')
    assert hub.tokenizer_folder("org/name") == str(tmp_path)
    assert not any("model*" in pattern or pattern == "*" for pattern in asked[-1])
    fake.snapshot_download = lambda name, allow_patterns: {}["403"]
    for package, reason in (fake, "403"), (None, "huggingface_hub"):
        monkeypatch.setitem(sys.modules, "huggingface_hub", package)
        with pytest.raises(ValueError, match=f"^no folder org/name.*hf auth login.*{reason}.*$"):
            hub.checkpoint_folder("org/name")
    monkeypatch.chdir(tmp_path)
    os.makedirs("org/name"), os.mkdir("out")
    for name in ("org/name", "out/teacher", "teacher", "a/b/c", "/org/name", "./name", "../name",
                 "~/name", "org/", ""):
        assert hub.checkpoint_folder(name) == hub.tokenizer_folder(name) == name


def test_rows_come_whole_or_streamed_no_further_than_needed(monkeypatch):
    """OpenMathInstruct-2 has 14 million: red if all are downloaded first. Without the package or a
    network, also while rows are streamed, the way out is named."""
    calls = []

    def load_dataset(repository, name=None, split=None, streaming=False):
        calls.append((repository, name, split, streaming))
        rows = [dict(row=i) for i in range(30)]
        return (calls.append(row["row"]) or row for row in rows) if streaming else rows
    package = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", package)
    assert hub.dataset_rows("gsm8k", "test") == [dict(row=i) for i in range(30)]
    assert hub.dataset_rows("openmath2", "train", 3, 6) == [dict(row=i) for i in (3, 4, 5)]
    assert calls == [("openai/gsm8k", "main", "test", False),
                     ("nvidia/OpenMathInstruct-2", None, "train", True), 0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="math500 has no train split: it has test"):
        hub.dataset_rows("math500", "train")
    with pytest.raises(ValueError, match="no rows 40 to 50"):
        hub.dataset_rows("openmath2", "train", 40, 50)
    for load in lambda: 1 / 0, lambda: (1 / 0 for _ in "a"), None:
        package.load_dataset = lambda *names, **options: load()
        monkeypatch.setitem(sys.modules, "datasets", load and package)
        with pytest.raises(ValueError, match="nvidia.*pass a .jsonl.*(datasets|division)"):
            hub.dataset_rows("openmath2", "train", 0, 2)


# ---- tokenizers
BITS = [  # what a pre-tokenizer may stumble over; a fuzzed text is a few of them in a row
    " ", "  ", "    ", "\t", "\n", "\r\n", "\n\n", " \n", "\v", "\x85", "\xa0", "\u2003", "\u2028",
    "1", "12", "2024", "1,000", "3.14", "٣", "Ⅳ", "½", "²", "𝟘", "〇", "🤖", "👩‍👧", "e\u0301",
    "\u0301", "नम", "日本", "ſ", "K", "ﬁ", "'s", "'S", "'LL", "'ll", "'d", "’s", "'", "\x00", "\x7f",
    "\ufeff", "\U0010ffff", "<|im_end|>", "<|eot_id|>", "a", "the", " the", "Hello", "don", "!!!",
    "...", "$", "\\frac{1}{2}", "#### 42", "=", "-", "_"]
TEXT = "the other day there were 2048 hens and 12 ducks; they laid 365.\n  x's 'll\n"
SPECIAL = ("<|endoftext|> <|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> "
           "<|end_header_id|> <|eot_id|> <|end_of_text|>").split()
GPT2, SMOLLM2, LLAMA3 = (dict(type="Sequence", pretokenizers=steps)
                         for steps, _ in hub.PRE_TOKENIZERS)


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


def read(folder, content, **files):
    """The Tokenizer of a folder with this tokenizer.json and other JSON files."""
    for name, value in {"tokenizer": content, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return Tokenizer(hub.read_tokenizer(str(folder)))


def reference(content):
    """ids(text) by the tokenizers library, which is told to read special tokens as text."""
    import tokenizers
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    theirs.encode_special_tokens = True
    return lambda text: theirs.encode(text, add_special_tokens=False).ids


def changed(content, **changes):
    """A tokenizer.json after changes of its model's keys, or of its own."""
    content = copy.deepcopy(content)
    for key, value in changes.items():
        owner = content["model"] if key in content["model"] else content
        owner[key] = value(owner[key]) if callable(value) else value
    return content


def edited(pre_tokenizer, **keys):
    """A change of the first step of a pre-tokenizer."""
    first, *others = pre_tokenizer["pretokenizers"]
    return dict(pre_tokenizer=pre_tokenizer | dict(pretokenizers=[first | keys, *others]))


@pytest.mark.parametrize("pre_tokenizer", [None, GPT2, SMOLLM2, LLAMA3])
def test_a_tokenizer_json_gives_the_ids_of_the_tokenizers_library(trained, pre_tokenizer, tmp_path):
    """Red if spaces before a digit are split as before a letter, or bytes are taken for others.
    Llama 3 has tokens that merging cannot reach: a piece that is a token is then taken whole."""
    content = trained | (dict(pre_tokenizer=pre_tokenizer) if pre_tokenizer else {})
    ours, theirs = read(tmp_path, content), reference(content)
    for text in [TEXT, *fuzzed(1500)]:
        assert ours.encode(text) == theirs(text), repr(text)
        assert ours.decode(ours.encode(text)) == text
    content = changed(content, vocab=lambda vocab: vocab | {"Ġqzj": 400}, ignore_merges=True)
    ids = [content["model"]["vocab"]["x"], 400]
    assert read(tmp_path, content).encode("x qzj") == reference(content)("x qzj") == ids


@pytest.mark.parametrize("change, message", [
    (dict(type="Unigram"), "Unigram"), (dict(byte_fallback=True), "byte_fallback"),
    (dict(dropout=0.1), "dropout"), (dict(normalizer=dict(type="NFC")), "NFC"),
    (dict(pre_tokenizer=None), "cannot be used"),
    (dict(pre_tokenizer=dict(type="Metaspace")), "Metaspace"),
    (edited(GPT2, add_prefix_space=True), "add_prefix_space"),
    (edited(GPT2, use_regex=False), "use_regex"), (edited(LLAMA3, invert=True), "invert"),
    (edited(LLAMA3, pattern=dict(Regex="a")), "Regex"),
    (dict(pre_tokenizer=SMOLLM2 | dict(pretokenizers=SMOLLM2["pretokenizers"][::-1])), "Digits"),
    (dict(added_tokens=[dict(id=0, content="<|endoftext|>", special=False)]), "not special"),
    (dict(vocab=lambda vocab: vocab | {"▁a": 400}, ignore_merges=True), "▁"),
    (dict(vocab=lambda vocab: vocab | {"aaa": 10 ** 12}), "to 1000000000000"),
    (dict(vocab=lambda vocab: vocab | {"aaa": -1}), "-1 to"),
    (dict(vocab=lambda vocab: vocab | {"aaa": 300}), "not one for each"),
    (dict(vocab=lambda vocab: vocab | {"Ġqzj": 400}), "merges do not make"),
    (dict(merges=[]), "merges do not make"), (dict(merges=lambda m: m[:-5]), "merges do not make"),
    (dict(merges=lambda m: m[:-2] + m[:-3:-1]), "in the order of the ids"),
    (dict(merges=[["a", "b"]] * 1_000_001), "merges do not make"), (dict(model=7), "cannot be")])
def test_a_tokenizer_json_that_would_give_other_ids_is_refused(trained, change, message, tmp_path):
    """Other ids than a model was trained on give a model that babbles, without any error."""
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, changed(trained, **change))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_llama_3s_tokenizer_model_counts_first_and_whole(trained, monkeypatch, tmp_path):
    """Ids are line numbers, special tokens follow in Meta's order; three digits are one piece; the
    chat is Instruct's. Meta has it in original/. Llama 2's, of that name, is refused."""
    words = ["in", " t", "he", " the", "\n\n", *map(str, range(961, 1000))]
    tokens = [bytes([byte]) for byte in range(256)] + [word.encode() for word in words]
    lines = [b"%s %d" % (base64.b64encode(token), i) for i, token in enumerate(tokens)]
    monkeypatch.setattr(hub, "LLAMA3_RANKS", len(tokens))
    path, folder = tmp_path / "original" / "tokenizer.model", str(tmp_path)
    path.parent.mkdir()
    path.write_bytes(b"\n".join(lines))
    definition, special = read(tmp_path, trained).definition, range(300, 556)
    tokenizer = Tokenizer(definition)
    assert tokenizer.encode("in the") == [256, 259] and tokenizer.encode("9999") == [299, ord("9")]
    assert sorted(definition["special"].values()) == list(special)
    assert [definition["special"][name] - 300 for name in definition["eos"]] == [9, 1, 8]
    assert tokenizer.decode(tokenizer.chat("hi"))[:34] == "<|begin_of_text|><|start_header_id"
    os.rename(path, path := tmp_path / "tokenizer.model")
    assert hub.read_tokenizer(folder) == definition
    for cut in lines[:-1], lines[1:], lines[:1], [b"\n\x0e\n\x05<unk>\x15\x00\x18\x02\xff" * 9]:
        path.write_bytes(b"\n".join(cut))
        with pytest.raises(ValueError, match=f"{re.escape(folder)}.*300 lines"):
            hub.read_tokenizer(folder)
    for name in "tokenizer.model", "tokenizer.json":
        os.remove(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=f"no tokenizer in {re.escape(folder)}"):
        hub.read_tokenizer(folder)


# ---- chats
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


@pytest.mark.parametrize("template", [SMOLLM2_TEMPLATE, LLAMA3_TEMPLATE, LLAMA31_TEMPLATE],
                         ids=["SmolLM2", "Llama 3", "Llama 3.1"])
def test_a_chat_is_what_the_familys_template_renders(trained, template, tmp_path):
    """Rendered by Jinja and cut at the special tokens; the rest is encoded by tokenizers. A file of
    its own counts before tokenizer_config.json, which may have several with names."""
    jinja2 = pytest.importorskip("jinja2")
    content = trained | dict(pre_tokenizer=LLAMA3)
    several = [dict(name="tool_use", template="?"), dict(name="default", template=template)]
    one, many = (read(tmp_path, content, tokenizer_config=dict(chat_template=place))
                 for place in (template, several))
    (tmp_path / "chat_template.jinja").write_text(template)
    file = read(tmp_path, content, tokenizer_config=dict(chat_template="?"))
    assert one.definition == many.definition == file.definition
    for question in ("What is 2+2?", "  two", "\n\nlines\n", "", "7", " {{ x }} \\boxed{1}", "é🤖"):
        text, ids = jinja2.Template(template, keep_trailing_newline=True).render(
            messages=[dict(role="user", content=question)], add_generation_prompt=True), []
        for piece in re.split(rf"({'|'.join(map(re.escape, SPECIAL))})", text):
            ids += [SPECIAL.index(piece)] if piece in SPECIAL else reference(content)(piece)
        assert one.chat(question) == ids
    assert SPECIAL[one.eos_ids[0]] == "<|%s|>" % ("im_end" if "im_end" in template else "eot_id")


def test_a_base_models_prompt_is_the_text_and_its_end_is_its_configs(trained, tmp_path):
    """Without the special tokens of Llama 3 there is no guess at a chat, as there is none for an
    unknown template: the model would get a prompt that it never saw in training."""
    content = changed(trained, added_tokens=trained["added_tokens"][:3], vocab=lambda vocab: {
        token: i for token, i in vocab.items() if token not in SPECIAL[3:]})
    config = dict(config=dict(eos_token_id=0))
    tokenizer = read(tmp_path, content, **config)
    assert tokenizer.chat("hi") == tokenizer.encode("hi\n") and tokenizer.eos_ids == [0]
    config |= dict(generation_config=dict(eos_token_id=[2, 0]))
    assert read(tmp_path, content, **config).eos_ids == [0, 2]
    with pytest.raises(ValueError, match=r"eos_token_id, \[77\]"):
        read(tmp_path, content, generation_config=dict(eos_token_id=77))
    with pytest.raises(ValueError, match="neither Llama 3's nor SmolLM2's"):
        read(tmp_path, trained, tokenizer_config=dict(
            chat_template="{{ '<|im_start|>system\nYou are Qwen<|im_end|>' }}"))
