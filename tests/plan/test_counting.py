"""Reading compiled programs: shapes, loops, fusions, collectives, kernels; the schedules of kernels."""

import jax
import jax.numpy as jnp
import pytest

from smolvlm_jax.plan.counting import count
from smolvlm_jax.plan.flops import flops
from smolvlm_jax.plan.hlo import hbm_bytes, parse
from smolvlm_jax.plan.kernels import read_dump, schedule

IN_PLACE = "output_to_operand_aliasing={{}: (0, {})}, "
PROGRAM = """HloModule jit_f, is_scheduled=true

%fused_slice (p0: f32[64,128], p1: s32[]) -> f32[1,128] {
  %p0 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,128]{1,0:T(1,128)} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,128}
}

%fused_write (p2: f32[64,128], p3: f32[1,128], p4: s32[]) -> f32[64,128] {
  %p2 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %p3 = f32[1,128]{1,0:T(1,128)} parameter(1)
  %p4 = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %write = f32[64,128]{1,0:T(8,128)} dynamic-update-slice(%p2, %p3, %p4, %none)
}

%body (arg: (s32[], f32[64,128])) -> (s32[], f32[64,128]) {
  %arg = (s32[], f32[64,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[64,128]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %row = f32[1,128]{1,0:T(1,128)} fusion(%x, %i), kind=kLoop, calls=%fused_slice, backend_config={"estimated_cycles":"10"}
  %sum = f32[1,128]{1,0:T(1,128)} all-reduce(%row), replica_groups={}, to_apply=%add, backend_config={"estimated_cycles":"7"}
  %y = f32[64,128]{1,0:T(8,128)} fusion(%x, %sum, %i), kind=kLoop, calls=%fused_write, backend_config={"estimated_cycles":"30"}
  ROOT %out = (s32[], f32[64,128]{1,0:T(8,128)}) tuple(%i, %y)
}

%condition (arg.1: (s32[], f32[64,128])) -> pred[] {
  %arg.1 = (s32[], f32[64,128]{1,0:T(8,128)}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: f32[64,128]) -> f32[64,128] {
  %a = f32[64,128]{1,0:T(8,128)} parameter(0)
  %start = s32[] constant(0)
  %kernel.7 = f32[64,128]{1,0:T(8,128)} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"cost":1}
  %gemm = f32[64,128]{1,0} custom-call(%a), custom_call_target="__cublas$gemm"
  %first = (s32[], f32[64,128]{1,0:T(8,128)}) tuple(%start, %kernel.7)
  %loop = (s32[], /*index=1*/f32[64,128]{1,0:T(8,128)}) while(%first), condition=%condition, body=%body, CONFIG
  ROOT %last = f32[64,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""
ARRAY, ROW = 64 * 128 * 4, 128 * 4


def test_what_a_library_works_in_is_not_moved():
    """cuBLAS and cuDNN return room to work in beside their result."""
    call = '%gemm = (f32[64,128]{1,0}, s8[33554432]{0}) custom-call(%a), custom_call_target="__cublas$lt$matmul"'
    lines = ["ENTRY %main (a: f32[64,128]) -> f32[64,128] {", "  %a = f32[64,128]{1,0} parameter(0)", f"  {call}", "}"]
    found = count(parse("\n".join(lines)))
    assert found.bytes == 2 * ARRAY and found.libraries == {"__cublas$lt$matmul": 1} and found.launches == 1


def test_a_loop_counts_as_often_as_it_runs():
    found = count(parse(PROGRAM.replace("CONFIG", 'backend_config={"known_trip_count":{"n":"5"}}')))
    assert found.cycles == 5 * 47 and found.loops == 0 and found.step is None
    assert found.collectives == {"all-reduce": 5} and found.collective_bytes == {"all-reduce": 5 * ROW}
    assert found.calls == {"kernel.7": 1} and found.libraries == {"__cublas$gemm": 1}
    # A slice reads what it returns, an update in place moves what it writes; a counter of four bytes beside each.
    assert found.bytes == 2 * 2 * ARRAY + 5 * ((2 * ROW + 4) + 2 * ROW + (2 * ROW + 4))
    assert found.kernel_bytes == 2 * ARRAY and found.launches == 2 + 5 * 3


def test_a_loop_of_unknown_length_is_one_step_and_told_apart():
    found = count(parse(PROGRAM.replace("CONFIG", "metadata={}")))
    assert found.loops == 1 and found.cycles == 47
    assert found.step is not None and found.step.cycles == 47 and not found.step.calls


def test_an_array_written_in_place_in_another_tiling_is_not_copied():
    """As caches in 8 bits are: the fusion inside would be a whole copy, if its result did not take its operand's place."""
    copied = """%retiled (p5: f32[64,128]) -> f32[64,128] {
  %p5 = f32[64,128]{1,0:T(8,128)} parameter(0)
  ROOT %copy = f32[64,128]{1,0:T(4,128)} copy(%p5)
}

%fused_write"""
    inside = f"  %p6 = f32[64,128]{{1,0:T(4,128)}} fusion(%p2), kind=kLoop, {IN_PLACE}calls=%retiled\n  ROOT %write"
    program = PROGRAM.replace("CONFIG", "metadata={}").replace("%fused_write", copied, 1).replace("-slice(%p2", "-slice(%p6")
    plain = count(parse(PROGRAM.replace("CONFIG", "metadata={}"))).bytes
    assert count(parse(program.replace("  ROOT %write", inside))).bytes == plain
    assert count(parse(program.replace("  ROOT %write", inside.replace(IN_PLACE, "")))).bytes == plain - ROW + 2 * ARRAY


def test_a_part_fetched_into_the_cores_memory_is_read():
    """An asynchronous slice names its whole operand; the part alone is read, and nothing is written to main memory."""
    text = """ENTRY %main (a: bf16[64,128]) -> bf16[16,128] {
  %a = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %s = ((bf16[64,128]{1,0:T(8,128)(2,1)}), bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:16]}
  ROOT %d = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} slice-done(%s)
}
"""
    assert count(parse(text)).bytes == 16 * 128 * 2


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[3,100]{1,0}", 600),
        ("bf16[3,100]{1,0:T(8,128)(2,1)}", 8 * 128 * 2),
        ("f32[100,3]{0,1:T(8,128)}", 8 * 128 * 4),  # the first dimension varies fastest
        ("pred[7]{0:T(1024)}", 1024),
        ("s4[10]{0}", 5),
        ("f32[]", 4),
        ("bf16[16,128]{1,0:T(8,128)(2,1)S(1)}", 0),  # in the core's own memory
        ("(f32[2]{0}, /*index=1*/s32[])", 12),
        ("token[]", 0),
    ],
)
def test_what_arrays_take(shape, size):
    assert hbm_bytes(shape) == size


def test_a_compiled_program_of_jax_is_read():
    """The real text of a program with a loop: as many products as the loop has steps."""

    def f(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=6)[0]

    arrays = [jax.ShapeDtypeStruct((32, 32), jnp.float32)] * 2
    module = parse(jax.jit(f).lower(*arrays).compile().as_text())
    assert module.entry in module.computations and len(module.by_name) > 10
    found = count(module)
    assert found.bytes >= 6 * 3 * 32 * 32 * 4 and found.loops == 0


def test_flops_are_those_of_the_formulas():
    def f(x, w):
        x = jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=6)[0]
        return jax.checkpoint(lambda x: jnp.einsum("ab,cb->ac", x, w))(x)

    arrays = [jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)]
    assert flops(f, *arrays) == 7 * 2 * 8 * 16 * 16
    image, kernel = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((4, 4, 3, 5), jnp.float32)
    patches = lambda x, w: jax.lax.conv_general_dilated(x, w, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert flops(patches, image, kernel) == 2 * (2 * 2 * 2 * 5) * (4 * 4 * 3)


def bundles(*lines: str) -> str:
    return "\n".join(f"     0x{n:x}   :  {line}" for n, line in enumerate(lines))


PRODUCT = "vmatmul.mubr.bf16.gmra.mxu0 %v1"
EXIT = "%p9 = scmp.ge.s32.totalorder %s8, {} /* loop exit test */"
# Two bundles; a grid of 4 with three bundles of its own, around a loop of 10 with two, and one of unknown length with one.
KERNEL = bundles(
    "{ %a = sld }",
    f"> {{ {EXIT.format(6)} }}",
    f"> {{ {PRODUCT} }}",
    f"> > {{ {EXIT.format(10)} ;; {PRODUCT} }}",
    f"> > {{ {PRODUCT} ;; vmatmul.mubr.bf16.gmra.mxu1 %v2 }}",
    "> { %b = nop }",
    "{ %c = halt }",
    "> { %p1 = scmp.ge.s32.totalorder %s8, %s9 }",
)


def test_a_schedule_counts_each_bundle_as_often_as_it_runs():
    found = schedule(KERNEL)
    assert found.bundles == 2 + 4 * (3 + 10 * 2 + 1) and found.products == 4 * (1 + 10 * 2) and found.unknown_loops == 0
    unknown = schedule(bundles("> { %a = nop }", "> > { %b = nop }"), dynamic_trips=5)
    assert (unknown.bundles, unknown.unknown_loops) == (5 * 2, 2), "of loops of unknown length the outermost is dynamic"
    assert found.cycles(1) == found.bundles and found.cycles(16) == 16 * found.products


def test_parts_of_the_grids_loop_run_as_often_as_the_part_with_its_exit_test():
    text = bundles(f"> {{ {PRODUCT} }}", "{ %a = nop }", f"> {{ {EXIT.format(18)} }}", "{ %b = halt }")
    found = schedule(text, dynamic_trips=3)
    assert (found.bundles, found.products, found.unknown_loops) == (2 + 16 + 16, 16, 0)


def test_a_loop_goes_on_behind_a_branch_until_another_one_begins():
    """Of two loops one has a known length; bundles that a branch leaves empty interrupt the other."""
    known = f"     0x0 LB: > {{ {EXIT.format(18)} }}\n"
    text = known + "     0x1 LB: > { %a = nop }\n     0x2   :  {}\n     0x3 PF: > { %b = nop }"
    found = schedule(text, dynamic_trips=5)
    assert (found.bundles, found.unknown_loops) == (16 + 5 * 2 + 1, 1)


def test_schedules_are_found_by_the_names_of_calls(tmp_path):
    (tmp_path / "0123-kernel.4-77-final_bundles.txt").write_text(KERNEL)
    (tmp_path / "0124-fusion-78-final_bundles.txt").write_text("")
    found = read_dump(str(tmp_path), ["kernel.4", "kernel.9", "other.1"])
    assert found.keys() == {"kernel.4", "kernel.9"} and found["kernel.4"] == found["kernel.9"] == schedule(KERNEL)
