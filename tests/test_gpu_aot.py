"""benchmarks/gpu_aot.py reads an optimised program: a small one, counted by hand."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HLO = """\
HloModule program, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%product (p0: bf16[4,8,16], p1: s32[], p2: bf16[2,8]) -> bf16[2,16] {
  %p0 = bf16[4,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = bf16[2,8]{1,0} parameter(2)
  %one = bf16[1,8,16]{2,1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,8,16}
  %kernel = bf16[8,16]{1,0} bitcast(%one)
  ROOT %dot = bf16[2,16]{1,0} dot(%p2, %kernel), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%kept (q0: bf16[4,2,16], q1: bf16[2,16], q2: s32[]) -> bf16[4,2,16] {
  %q0 = bf16[4,2,16]{2,1,0} parameter(0)
  %q1 = bf16[2,16]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %new = bf16[1,2,16]{2,1,0} bitcast(%q1)
  ROOT %put = bf16[4,2,16]{2,1,0} dynamic-update-slice(%q0, %new, %q2)
}

%layer (s: (s32[], bf16[4,8,16], bf16[2,8], bf16[4,2,16])) -> (s32[], bf16[4,8,16]) {
  %s = (s32[], bf16[4,8,16]{2,1,0}, bf16[2,8]{1,0}, /*index=3*/bf16[4,2,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %stack = bf16[4,8,16]{2,1,0} get-tuple-element(%s), index=1
  %x = bf16[2,8]{1,0} get-tuple-element(%s), index=2
  %tape = bf16[4,2,16]{2,1,0} get-tuple-element(%s), index=3
  %y = bf16[2,16]{1,0} fusion(%stack, %i, %x), kind=kCustom, calls=%product
  %t = bf16[4,2,16]{2,1,0} fusion(%tape, %y, %i), kind=kLoop, calls=%kept
  ROOT %out = (s32[], bf16[4,8,16]{2,1,0}) tuple(%i, %stack)
}

%batch (u: (s32[], f32[6], s32[3,1])) -> (s32[], f32[6]) {
  %u = (s32[], f32[6]{0}, s32[3,1]{1,0}) parameter(0)
  %total = f32[6]{0} get-tuple-element(%u), index=1
  %which = s32[3,1]{1,0} get-tuple-element(%u), index=2
  %layers = (s32[], bf16[4,8,16]{2,1,0}) while(%u), condition=%add, body=%layer, \
backend_config={"known_trip_count":{"n":"4"}}
  %more = f32[3]{0} copy(%total)
  %to = f32[6]{0} scatter(%total, %which, %more), update_window_dims={}, UNIQUE to_apply=%add
  ROOT %o = (s32[], f32[6]{0}) tuple(%i, %to)
}

ENTRY %main (g: f32[6]) -> f32[6] {
  %g = (s32[], f32[6]{0}, s32[3,1]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[6]{0}) while(%g), condition=%add, body=%batch
}
"""


@pytest.fixture(scope="module")
def gpu_aot():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "")  # it is changed, and is as it was afterwards
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import gpu_aot

        yield gpu_aot
    for name in ("gpu_aot", "scale_aot", "gpu", "speed"):
        sys.modules.pop(name, None)


def test_kernels_of_a_small_program(gpu_aot):
    program = gpu_aot.Program(HLO, [3])
    found = {k.op.name: k for k in program.kernels()}
    assert list(found) == ["y", "t", "more", "to"]
    assert {name: k.times for name, k in found.items()} == {"y": 12, "t": 12, "more": 3, "to": 3}
    y, t, _, _ = found.values()
    assert y.flops == 2 * 2 * 16 * 8
    assert y.n_bytes == 2 * (8 * 16 + 2 * 8 + 2 * 16) + 4  # of the stack one layer; the index
    assert t.n_bytes == 2 * (2 * 16 + 2 * 16) + 4  # in place
    assert all(k.in_loop for k in found.values())
    assert y.seconds((1e3, 1e9)) == 12 * y.flops / 1e3
    assert y.seconds((1e9, 1e3)) == 12 * y.n_bytes / 1e3


@pytest.mark.parametrize(("attribute", "n"), [("", 1), ("unique_indices=true,", 0)])
def test_adds_by_index(gpu_aot, attribute, n):
    program = gpu_aot.Program(HLO.replace("UNIQUE", attribute), [3])
    assert program.added_by_index() == n
