"""Adapter folders: PEFT loads ours and we load PEFT's, to the same logits; what cannot be
represented is refused; a folder is whole or absent."""

import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from conftest import adapted, merged, random_ids, torch_logits, torch_model, with_random_b
from flax import nnx
from marks import mostly_slow
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

import jgrpo
from jgrpo.config import PROJECTIONS
from jgrpo.errors import InputError
from jgrpo.policy import adapter as adapters
from jgrpo.policy.lora import split
from jgrpo.policy.weights import load_model

IDS = random_ids(2, 12)


def peft_adapter(base: Path, folder: Path, *, b_std=0.05, **options) -> torch.nn.Module:
    """An adapter with non-zero B, made and saved by PEFT."""
    options = {"r": 4, "lora_alpha": 32, "target_modules": list(PROJECTIONS)} | options
    torch.manual_seed(0)
    model = get_peft_model(torch_model(base), LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, b_std)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("rank", [1, 4])
def test_peft_loads_what_we_save_to_the_same_logits(checkpoint, tmp_path, rank):
    # With alpha 32 a scale of 1, of 32 or of 32 / sqrt(4) would be far off at rank 4.
    base = checkpoint("qwen3-tied")
    model = merged(*adapted(base, rank))
    jgrpo.save_adapter(model, tmp_path / "a")
    reference = torch_model(base)
    without = torch_logits(reference, IDS)
    expected = torch_logits(PeftModel.from_pretrained(reference, tmp_path / "a"), IDS)
    assert np.abs(expected - without).max() > 1
    assert np.abs(model(IDS) - expected).max() < 1e-4


def test_an_adapter_names_its_base_so_that_peft_finds_it(checkpoint, tmp_path):
    base = checkpoint("qwen3-tied")
    model = merged(*adapted(base, 2))
    jgrpo.save_adapter(model, tmp_path / "a")
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert np.abs(torch_logits(found.eval(), IDS) - model(IDS)).max() < 1e-4


def test_an_adapter_keeps_sglang_s_rules(checkpoint, tmp_path):
    """As its python/sglang/srt/lora reads them (not run): one rank and alpha, modules listed
    by their last names, tensors A [r, in] and B [out, r] by layer, and of what it stacks (q, k, v;
    gate, up) all."""
    jgrpo.save_adapter(merged(*adapted(checkpoint("qwen3-tied"), 4)), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not {"rank_pattern", "alpha_pattern", "use_dora", "modules_to_save"} & config.keys()
    assert config["bias"] == "none"
    stacked = [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}]
    assert {*config["target_modules"]} == {"o_proj", "down_proj"}.union(*stacked)
    weight = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])\.weight")
    arrays = load_file(tmp_path / "a" / "adapter_model.safetensors")
    found = {weight.fullmatch(name).groups(): x.shape for name, x in arrays.items()}
    assert len(found) == 3 * 7 * 2
    for (_, _, which), shape in found.items():
        assert shape[0 if which == "A" else 1] == config["r"] == 4


def test_peft_uses_every_tensor_that_we_save(checkpoint, tmp_path):
    base = checkpoint("qwen3-tied")
    model = merged(*adapted(base, 2))
    jgrpo.save_adapter(model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(torch_model(base), tmp_path / "a").state_dict()
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {x.dtype for x in saved.values()} == {np.dtype("float32")}
    names = {n.replace(".default", ""): x.numpy() for n, x in loaded.items() if "lora_" in n}
    assert names.keys() == saved.keys()
    jax.tree.map(np.testing.assert_array_equal, names, saved)


@pytest.mark.parametrize(
    "options",
    mostly_slow([
        {},
        {"r": 1},
        {"target_modules": ["q_proj", "v_proj"]},
        {"use_rslora": True},  # PEFT then scales by alpha / sqrt(r)
        {"lora_alpha": 3, "target_modules": ["down_proj", "k_proj", "o_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q_proj|down_proj)"},
        {"target_modules": r"model\.layers\.[02]\.self_attn\.(k|v)_proj"},  # two layers of three
        {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
        {"target_modules": ["model.layers.1.self_attn.o_proj", "layers.2.mlp.gate_proj"]},
        {"target_modules": "all-linear", "exclude_modules": ["up_proj", "k_proj"]},
        {"exclude_modules": r".*\.layers\.1\..*"},
        {"modules_to_save": []},
    ], short=3),
    ids=str,
)  # fmt: skip
def test_what_peft_saves_loads_to_the_same_logits(checkpoint, tmp_path, options):
    base = checkpoint("qwen3-tied")
    expected = torch_logits(peft_adapter(base, tmp_path, **options), IDS)
    assert np.abs(expected - torch_logits(torch_model(base), IDS)).max() > 0.1
    model = jgrpo.load_model(str(base), adapter=tmp_path)
    assert np.abs(model(IDS) - expected).max() < 1e-4


def test_an_adapter_survives_being_saved_and_loaded(checkpoint, tmp_path):
    graph, adapter, base = adapted(checkpoint("qwen3-tied"), 4, alpha=16)
    jgrpo.save_adapter(merged(graph, adapter, base), tmp_path / "a")
    again = jgrpo.load_model(str(checkpoint("qwen3-tied")), adapter=tmp_path / "a")
    assert (again.rank, again.alpha, set(again.target_modules)) == (4, 16, set(PROJECTIONS))
    jax.tree.map(np.testing.assert_array_equal, split(again)[1], adapter)
    jgrpo.save_adapter(again, tmp_path / "b")
    assert (
        load_file(tmp_path / "b" / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    )


# -- what does not fit --------------------------------------------------------------------------


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A good adapter of rank 2, to be damaged."""
    jgrpo.save_adapter(merged(*adapted(checkpoint("qwen3-tied"), 2)), tmp_path / "a")
    return tmp_path / "a"


def load(checkpoint, folder):
    return jgrpo.load_model(str(checkpoint("qwen3-tied")), adapter=folder)


def refusal(checkpoint, folder) -> str:
    with pytest.raises(InputError) as error:
        load(checkpoint, folder)
    assert str(folder) in str(error.value)
    return str(error.value)


def change_config(folder: Path, **fields) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def test_all_that_does_not_fit_is_named_in_one_error(checkpoint, folder):
    prefix = "base_model.model.model.layers."
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[f"{prefix}0.self_attn.q_proj.lora_A.weight"]
    tensors[f"{prefix}9.self_attn.q_proj.lora_A.weight"] = np.zeros((2, 32), np.float32)
    tensors[f"{prefix}1.mlp.up_proj.lora_B.weight"] = np.zeros((2, 48), np.float32)
    tensors[f"{prefix}2.mlp.up_proj.lora_B.weight"][3, 1] = np.nan
    tensors[f"{prefix}2.mlp.down_proj.lora_A.weight"][0, 0] = np.inf
    save_file(tensors, file)
    message = refusal(checkpoint, folder)
    assert f"{prefix}0.self_attn.q_proj.lora_A.weight is missing" in message
    assert f"{prefix}9.self_attn.q_proj.lora_A.weight belongs to no target" in message
    assert f"{prefix}1.mlp.up_proj.lora_B.weight is [2, 48], not [48, 2]" in message
    assert f"{prefix}2.mlp.up_proj.lora_B.weight is not finite" in message
    assert f"{prefix}2.mlp.down_proj.lora_A.weight is not finite" in message
    assert len(message.splitlines()) == 6


def test_a_rank_that_is_not_the_tensors_is_refused(checkpoint, folder):
    change_config(folder, r=1)
    assert "lora_A.weight is [2, 32], not [1, 32]" in refusal(checkpoint, folder)


def test_a_target_without_tensors_is_refused(checkpoint, folder):
    change_config(folder, target_modules=["q_proj"])
    assert "k_proj.lora_A.weight belongs to no target" in refusal(checkpoint, folder)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern="),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern="),
        ({"layers_to_transform": [0]}, "layers_to_transform="),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens="),
        ({"target_modules": 3}, "target_modules=3"),
        ({"target_modules": [["q_proj"]]}, "target_modules=[['q_proj']]"),
        ({"r": ...}, "is damaged: KeyError: 'r'"),
    ],
    ids=str,
)
def test_what_is_not_plain_lora_is_refused_by_name(checkpoint, folder, fields, named):
    change_config(folder, **fields)
    assert named in refusal(checkpoint, folder)


def test_half_an_adapter_is_refused_by_a_pattern_too(checkpoint, folder):
    change_config(folder, target_modules="all-linear")
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    del tensors[key]
    save_file(tensors, folder / "adapter_model.safetensors")
    assert f"{key} is missing" in refusal(checkpoint, folder)


def test_a_pattern_that_reaches_the_head_is_refused(checkpoint, tmp_path):
    base = checkpoint("qwen3-untied")
    peft_adapter(base, tmp_path, target_modules=r".*q_proj|lm_head")
    with pytest.raises(InputError, match=r"it adapts .'lm_head'.*none of q_proj"):
        jgrpo.load_model(str(base), adapter=tmp_path)


def test_a_pickle_alone_is_named_with_the_remedy(checkpoint, folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "adapter_model.bin is a pickle" in refusal(checkpoint, folder)
    assert "convert it with PEFT" in refusal(checkpoint, folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_damaged_config_is_called_so(checkpoint, folder, text):
    (folder / "adapter_config.json").write_text(text)
    assert "adapter_config.json is damaged" in refusal(checkpoint, folder)


def test_a_folder_without_config_is_no_adapter(checkpoint, tmp_path):
    assert "it has no adapter_config.json" in refusal(checkpoint, tmp_path)


@pytest.mark.parametrize("kept_bytes", [0, 100, -1])
def test_truncated_weights_are_refused(checkpoint, folder, kept_bytes):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    assert "cannot be read as safetensors" in refusal(checkpoint, folder)


def test_an_adapter_for_the_head_is_refused(checkpoint, tmp_path):
    # The head is never adapted; an adapter that needs it must not load without it.
    base = checkpoint("qwen3-untied")
    peft_adapter(base, tmp_path, target_modules=["q_proj", "lm_head"])
    with pytest.raises(InputError, match="lm_head"):
        jgrpo.load_model(str(base), adapter=tmp_path)


# -- writing ------------------------------------------------------------------------------------


def test_a_folder_is_never_written_twice(checkpoint, folder):
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    model = merged(*adapted(checkpoint("qwen3-tied"), 1))
    with pytest.raises(InputError, match="exists; an adapter's folder is never reused"):
        jgrpo.save_adapter(model, folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_a_write_that_fails_leaves_no_folder_and_can_be_repeated(checkpoint, tmp_path, monkeypatch):
    model, folder = merged(*adapted(checkpoint("qwen3-tied"), 1)), tmp_path / "step_000001"

    def full_disk(file, data):
        with open(file, "wb") as half:
            half.write(data[: len(data) // 2])
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(OSError, match="No space left"):
            jgrpo.save_adapter(model, folder)
    assert not folder.exists()
    jgrpo.save_adapter(model, folder)
    assert [f.name for f in tmp_path.iterdir()] == ["step_000001"]
    load(checkpoint, folder)


def test_files_have_the_permissions_that_the_umask_leaves(checkpoint, tmp_path):
    before = os.umask(0o027)
    try:
        jgrpo.save_adapter(merged(*adapted(checkpoint("qwen3-tied"), 1)), tmp_path / "a")
    finally:
        os.umask(before)
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "a").iterdir()} == {0o640}


def test_the_name_appears_when_the_folder_is_whole(checkpoint, tmp_path, monkeypatch):
    folder, renamed = tmp_path / "a", []
    rename = adapters.os.rename

    def spy(source, target):
        assert not folder.exists()
        assert sorted(f.name for f in Path(source).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        renamed.append(target)
        rename(source, target)

    monkeypatch.setattr(adapters.os, "rename", spy)
    jgrpo.save_adapter(merged(*adapted(checkpoint("qwen3-tied"), 1)), folder)
    assert renamed == [folder]


def test_a_model_without_adapter_has_nothing_to_save(checkpoint, tmp_path):
    model = jgrpo.load_model(str(checkpoint("qwen3-tied")))
    with pytest.raises(InputError, match="no adapter; load it with lora_r"):
        jgrpo.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_only_the_named_projections_get_an_adapter(checkpoint, tmp_path):
    model = load_model(checkpoint("qwen3-tied"), rank=2, target_modules=("v_proj", "up_proj"))
    graph, adapter, base = split(model)
    model = nnx.merge(graph, with_random_b(adapter), base)
    jgrpo.save_adapter(model, tmp_path / "a")
    names = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {name.split(".")[6] for name in names} == {"v_proj", "up_proj"}
    assert len(names) == 3 * 2 * 2  # layers, targets, A and B
    reference = PeftModel.from_pretrained(torch_model(checkpoint("qwen3-tied")), tmp_path / "a")
    assert np.abs(model(IDS) - torch_logits(reference, IDS)).max() < 1e-4
