"""What XLA makes of our programs for one H100 or H200 that is not there: time, traffic, memory.

    JAX_PLATFORMS=cpu python benchmarks/gpu_aot.py [--card h100] [--gemm cublas] [--top 10]

Compiles the programs in the shape of Qwen3-1.7B (bfloat16, rank 1) for a device that is only
described, as `scale_aot.py` does, and reads the optimised program: each kernel that is launched,
as often as the loops around it turn, with its operations and the bytes that it moves. Nothing runs:
times are a model's, of each kernel the longer of its operations at 75 % of the card's rate and its
bytes at 85 % of its bandwidth (`RATES`). Launch gaps, caches and the host are not in it, nor what
the autotuner would choose: products are Triton's in its default tiles, or cuBLAS's (--gemm cublas).

"update" is that of the whole rollout of `gpu.py` (54,255 trained tokens), as many micro-batches as
it has; "decode" is one token of 32 x 8 rows with --capacity tokens of room; "prefill" the 32
prompts; "apply" the optimizer's step. The last column counts arrays that are added up by index,
which a GPU does in no fixed order. Last line: one JSON document.

Wants jax[cuda13], no card and no driver. --attn xla wants no more; --attn cudnn has cuDNN plan
attention, for which it must load and be told of a card:
- `pip install --no-deps nvidia-cudnn-cu13==9.19.0.56`: newer ones ask XLA what it does not say;
- a libcuda.so.1 in which each function of cuda.h, and of those that cuDNN's libraries name, only
  returns an error (100: no device), but cuDriverGetVersion, which says 13000;
- in place of libcudart.so.13 one that passes all on to the real one, but cudaGetDevice and
  cudaGetDeviceProperties, which say one H100 (compute capability 9.0, 132 multiprocessors);
- LD_LIBRARY_PATH with the folders of these, of cuDNN and of CUDA; CUDA_VISIBLE_DEVICES=-1.
"""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from gpu import Args as GpuArgs
from gpu import rollout_of
from scale_aot import apply_program, described, policy_shapes, sampler_programs

from jgrpo.config import Config
from jgrpo.policy.batch import Rows
from jgrpo.policy.logprobs import _chunks
from jgrpo.policy.mesh import make_mesh
from jgrpo.update.learner import batches_of, parts_of, update_of

RATES = {"h100": (0.75 * 790e12, 0.85 * 3.0e12), "h200": (0.75 * 790e12, 0.85 * 4.3e12)}
"""Operations and bytes a second: shares of what such cards were measured to do, 790 TFLOP/s in
large products."""
CUDNN = "9.19.0"
SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
"""What is no kernel."""
ProgramName = Literal["update", "decode", "prefill", "apply"]


@dataclass
class Args:
    """Compile for one card that is only described, and model the time."""

    card: Literal["h100", "h200"] = "h200"
    programs: tuple[ProgramName, ...] = ("update", "decode", "prefill", "apply")
    lengths: Literal["realistic", "full"] = "realistic"
    """Of the rollout: that of gpu.py, or 32 x 8 completions as long as rank1.py lets them be."""
    micro_batch_size: int = 8
    attn: Literal["cudnn", "xla"] = "cudnn"
    gemm: Literal["triton", "cublas"] = "triton"
    members: int = 1
    """Rank-1 adapters side by side."""
    capacity: int = 1024
    """Tokens that a decoded row has room for."""
    checkpoint: bool = False
    """Recompute layers in the backward pass."""
    top: int = 0
    """List so many kernels that take the most."""
    out: Path | None = None
    """File for the JSON document as well."""


# -- the optimised program, read -------------------------------------------------------------------


@dataclass
class Op:
    """An instruction of HLO."""

    name: str
    shape: str
    kind: str
    text: str
    """All after the opening bracket: operands and attributes."""
    is_root: bool

    @cached_property
    def given(self) -> list[str]:
        """The operands' names."""
        return re.findall(r"%([\w.\-]+)", re.split(r"\)(?:, [a-z_]+=|$)", self.text, maxsplit=1)[0])

    @cached_property
    def arrays(self) -> list[tuple[int, list[int]]]:
        """Bytes of a number, and shape, of each array that it gives."""
        found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", self.shape)
        return [(SIZES.get(d, 0), [int(n) for n in s.split(",") if n]) for d, s in found]

    @cached_property
    def n_bytes(self) -> int:
        arrays = self.arrays[:1] if self.is_call_of("cublas") else self.arrays  # no workspace
        return sum(size * prod(shape) for size, shape in arrays)

    def attribute(self, pattern: str) -> str:
        found = re.search(pattern, self.text)
        return found[1] if found else ""

    @cached_property
    def callee(self) -> str:
        return self.attribute(r"(?:calls|to_apply|body)=%([\w.\-]+)")

    def is_call_of(self, library: str) -> bool:
        return self.kind == "custom-call" and library in self.attribute(r'_target="([^"]*)"')


Ops = dict[str, Op]
"""A computation: its instructions by name."""


class Kernel(NamedTuple):
    """Something that is launched `times` times, and what one launch does."""

    op: Op
    times: float
    flops: float
    n_bytes: float
    in_loop: bool
    """Within a loop of which only the device knows how often it turns."""

    def seconds(self, rates: tuple[float, float]) -> float:
        """Of all launches, as modelled."""
        return self.times * max(self.flops / rates[0], self.n_bytes / rates[1])


@dataclass
class Program:
    """An optimised module. `turns`: of loops whose turns are not known to the compiler, the
    outermost first."""

    text: str
    turns: list[float]
    computations: dict[str, Ops] = field(default_factory=dict)

    def __post_init__(self) -> None:
        line_of = re.compile(
            r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z\-]*)\((.*)", re.ASCII
        )
        for line in self.text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                ops = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else getattr(self, "entry", "")
            elif found := line_of.match(line):
                root, name, shape, kind, rest = found.groups()
                kind = "fusion" if kind == "fusion-start" else kind
                ops[name] = Op(name, shape, kind, rest, bool(root))

    def kernels(self) -> list[Kernel]:
        return [*self._walk(self.entry, 1, 0)]

    def _walk(self, name: str, times: float, depth: int) -> Iterator[Kernel]:
        ops = self.computations[name]
        for op in ops.values():
            if op.kind == "while":
                known = op.attribute(r'known_trip_count":\{"n":"(\d+)"')
                n = int(known) if known else self.turns[min(depth, len(self.turns) - 1)]
                yield from self._walk(op.callee, times * n, depth + (not known))
            elif op.kind in ("call", "async-start"):
                yield from self._walk(op.callee, times, depth)
            elif op.kind == "conditional":
                raise NotImplementedError(f"{op.name}: which branch is taken is not known")
            elif op.kind not in NOTHING and not op.kind.endswith(("-start", "-done")):
                read = sum(self._taken(op, k, ops) for k in range(len(op.given)))
                moved = read + self._written(op, ops)
                yield Kernel(op, times, self._flops(op, ops), moved, depth > 0)

    def _taken(self, op: Op, k: int, ops: Ops) -> int:
        """Bytes that an instruction reads of its k-th operand."""
        whole = ops[op.given[k]].n_bytes
        if k == 0 and op.kind in ("dynamic-slice", "slice", "gather"):
            return min(whole, op.n_bytes)
        if k == 0 and op.kind == "dynamic-update-slice":
            return 0  # it is written in place
        if op.kind in ("bitcast", "reshape") and not op.is_root:
            return self._read(op.name, ops)
        if op.kind == "fusion":
            inner = self.computations[op.callee]
            is_kth = lambda o: o.kind == "parameter" and o.text.startswith(f"{k})")  # noqa: E731
            return self._read(next(o.name for o in inner.values() if is_kth(o)), inner)
        return whole

    def _read(self, name: str, ops: Ops) -> int:
        """Bytes that are read of a value by those that use it: it is read once."""
        taken = (
            self._taken(user, k, ops)
            for user in ops.values()
            for k, given in enumerate(user.given)
            if given == name
        )
        return min(ops[name].n_bytes, sum(taken))

    def _written(self, op: Op, ops: Ops) -> int:
        if op.kind == "tuple":
            return sum(self._written(ops[name], ops) for name in op.given)
        if op.kind == "bitcast":
            return self._written(ops[op.given[0]], ops)
        if op.kind == "dynamic-update-slice":
            return ops[op.given[1]].n_bytes
        if op.kind == "fusion":
            inner = self.computations[op.callee]
            return self._written(next(o for o in inner.values() if o.is_root), inner)
        return op.n_bytes

    def _flops(self, op: Op, ops: Ops) -> float:
        """Of matrix products alone. cuDNN's attention is counted as if all saw all."""
        if op.kind == "fusion":
            inner = self.computations[op.callee]
            return sum(self._flops(o, inner) for o in inner.values())
        if op.kind == "dot" or op.is_call_of("cublas"):
            contracted = op.attribute(r'lhs_contracting_dim\w+"?[=:]([\[{][\d",]*)')
            (_, lhs), (_, result) = ops[op.given[0]].arrays[0], op.arrays[0]
            return 2 * prod(result) * prod(lhs[int(d)] for d in re.findall(r"\d+", contracted))
        if op.is_call_of("fmha"):
            scores = op.attribute(r'intermediate_tensor_shape".*?"dimensions": ?(\[[^\]]*\])')
            n_scores, width = prod(map(int, json.loads(scores))), ops[op.given[0]].arrays[0][1][-1]
            return 4 * n_scores * width * (2.5 if op.is_call_of("Backward") else 1)
        return 0

    def added_by_index(self) -> int:
        """Scatters that add up what may have the same index."""
        return sum(
            op.kind == "select-and-scatter"
            or (op.kind == "scatter" and "unique_indices=true" not in op.text
                and any(o.kind == "add" for o in self.computations[op.callee].values()))
            for ops in self.computations.values()
            for op in ops.values()
        )  # fmt: skip


# -- our programs ----------------------------------------------------------------------------------


def longest(config: Config) -> tuple[Config, Rows]:
    """rank1.py's config, and a rollout of which all is as long as it may be."""
    names = ("n_prompts_per_step", "group_size", "max_prompt_tokens", "max_tokens")
    config = replace(config, **{name: getattr(Config(), name) for name in names})
    n, c = config.n_completions_per_step, config
    prompts = [[i // c.group_size] * c.max_prompt_tokens for i in range(n)]
    logprobs = [[0.0] * c.max_tokens] * n
    return c, Rows(prompts, [[0] * c.max_tokens] * n, logprobs, np.ones(n, np.float32))


def lowered(args: Args, device: jax.Device) -> dict[str, tuple[Callable, list[float]]]:
    """Of each program how it is compiled, and the turns of its loops."""
    changes = {"micro_batch_size": args.micro_batch_size, "attn_implementation": args.attn,
               "gradient_checkpointing": args.checkpoint}  # fmt: skip
    config, rows = rollout_of(GpuArgs(out=Path()), **changes)
    if args.lengths == "full":
        config, rows = longest(config)
    shape, graph, adapters, base = policy_shapes("1.7b", config, args.members)
    mesh = make_mesh(1, [device])
    update = update_of([config] * args.members, graph, adapters, base, mesh=mesh)
    batches = batches_of(config, rows, parts_of(config, rows)[0].index)
    one = batches[0]
    chunk, _ = _chunks(min(len(one.places), one.rows.size), shape.vocab_size)
    n_chunks = float(np.mean([ceil(b.mask.sum() / chunk) for b in batches]))
    print(f"{len(batches)} micro-batches of {one.prompts.shape} prompt and {one.rows.shape} "
          f"completion tokens, {one.places.size} of them computed; {n_chunks:.2f} chunks of {chunk}"
          f" tokens in the head; {sum(b.mask.sum() for b in batches):.0f} tokens trained\n",
          flush=True)  # fmt: skip
    config = replace(config, max_tokens=args.capacity)
    sampler = lambda: sampler_programs(graph, adapters, base, mesh, config, shape.vocab_size)  # noqa: E731
    return {
        "update": (lambda: update.compiled(adapters, base, one), [len(batches), n_chunks]),
        "decode": (lambda: sampler()[1].compile(), [1]),
        "prefill": (lambda: sampler()[0].compile(), [1]),
        "apply": (lambda: apply_program(update, adapters).compile(), [1]),
    }


def measure(name: str, args: Args, compile_it: Callable, turns: list[float]) -> dict[str, Any]:
    """A program's row; lists its kernels where that is asked for."""
    start = time.perf_counter()
    compiled = compile_it()
    compiled_s = time.perf_counter() - start
    program, rates = Program(compiled.as_text(), turns), RATES[args.card]
    kernels = [k for k in program.kernels() if k.in_loop or name != "decode"]  # a token's
    row = {
        "program": name,
        "seconds": sum(k.seconds(rates) for k in kernels),
        "bytes": sum(k.times * k.n_bytes for k in kernels),
        "flops": sum(k.times * k.flops for k in kernels),
        "products_s": sum(k.seconds(rates) for k in kernels if k.flops),
        "launches": sum(k.times for k in kernels),
        "peak_bytes": compiled.memory_analysis().peak_memory_in_bytes,
        "added_by_index": program.added_by_index(),
        "compiled_s": compiled_s,
    }
    alike: Counter = Counter()
    for k in kernels:
        what = k.op.attribute(r'_target="([^"]*)"') or k.op.attribute(r'"kind":"(\w+)"')
        where = k.op.attribute(r'op_name="([^"]*)"')
        alike[what or k.op.kind, k.op.shape[:60], where[-60:]] += k.seconds(rates)
    row["top"] = [[seconds, *words] for words, seconds in alike.most_common(args.top)]
    return row


def main() -> None:
    args = tyro.cli(Args)
    flags = [os.environ["XLA_FLAGS"]]  # scale_aot's: without autotuning
    if args.attn == "cudnn":
        mode = "CUDNN_DEVICELESS_COMPILATION_AUTO"
        flags.append(f"--xla_gpu_cudnn_deviceless_compilation_mode={mode}")
    if args.gemm == "cublas":
        flags.append("--xla_gpu_enable_triton_gemm=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    (device,) = described(args.card, 1, CUDNN if args.attn == "cudnn" else "")
    programs, rows = lowered(args, device), []
    print("| program | model s | GB moved | TFLOP | launches | peak GiB | added by index |\n"
          "|---|---|---|---|---|---|---|")  # fmt: skip
    for name in args.programs:
        row = measure(name, args, *programs[name])
        rows.append(row)
        print(f"| {name} | {row['seconds']:#.4g} | {row['bytes'] / 1e9:,.1f} "
              f"| {row['flops'] / 1e12:,.1f} | {row['launches']:,.0f} "
              f"| {row['peak_bytes'] / 2**30:.1f} | {row['added_by_index'] or 'none'} |",
              flush=True)  # fmt: skip
    for row in rows if args.top else []:
        print(f"\n{row['program']}, what takes most:")
        for seconds, *words in row["top"]:
            print(f"  {1e3 * seconds:9.3f} ms  {'  '.join(words)}")
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    document = json.dumps({"arguments": arguments, "jax": jax.__version__, "rows": rows})
    if args.out:
        args.out.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
