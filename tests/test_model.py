"""The model of a time step: machine code is read as it is written, and cycles are those counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from bench import aot, model
from bench.machine_code import Code, parse
from bench.model import BARRIER, CHIPS, MATRIX, SETTING, Size, kind, simulated
from sire_fast import backends
from sire_fast.backends import gpu

H100 = CHIPS[90]

SASS = """
                Function : forward
        .headerflags @"EF_CUDA_SM90"
        /*0000*/                   S2R R0, SR_TID.X ;                       /* 0x0000000000007919 */
        /*0010*/                   MOV R9, c[0x0][0x28] ;                   /* 0x0000000000007919 */
        /*0020*/                   LDSM.16.M88.4 R4, [R0+UR4+0x6000] ;
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4.reuse, R12, R8 ;
        /*0050*/                   ISETP.NE.AND P0, PT, R1, RZ, PT ;
        /*0060*/               @P0 BRA 0xa0 ;
        /*0070*/                   LDG.E.64 R2, desc[UR6][R20.64+0x10] ;
        /*0080*/                   FADD R8, R8, -R2 ;
        /*0090*/                   STG.E.64 desc[UR6][R20.64], R8 ;
        /*00a0*/                   MUFU.TANH R8, |R8| ;
        /*00b0*/                   VIADD R3, R3, 0x2 ;
        /*00c0*/                   ISETP.GE.AND P1, PT, R3, 0x7, PT ;
        /*00d0*/              @!P1 BRA 0xa0 ;
        /*00e0*/                   STS.128 [R0], R8 ;
        /*00f0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0100*/               @P2 BRA 0x20 ;
        /*0110*/                   EXIT ;
        /*0120*/                   BRA 0x120;
                Function : other
        /*0000*/                   EXIT ;
"""


def trace(*lines: str):
    text = "Function : one\n" + "".join(f"/*{16 * n:04x}*/ {line} ;\n" for n, line in enumerate(lines))
    return parse(text)["one"]


def test_machine_code_is_read_as_it_is_written():
    functions = parse(SASS)
    assert {name: len(code) for name, code in functions.items()} == {"forward": 19, "other": 1}
    found = {i.address: i for i in functions["forward"]}
    assert found[0x20].reads == {"R0", "UR4"}
    assert found[0x20].writes == {"R4", "R5", "R6", "R7"}
    assert (found[0x30].op, found[0x30].reads) == ("NOP", set())
    assert found[0x40].reads == {*(f"R{n}" for n in (4, 5, 6, 7, 12, 13, 8, 9, 10, 11))}
    assert found[0x40].writes == {"R8", "R9", "R10", "R11"}
    assert (found[0x50].reads, found[0x50].writes, found[0x50].constant) == ({"R1"}, {"P0"}, None)
    assert (found[0x60].reads, found[0x60].target, found[0x60].goes_on) == ({"P0"}, 0xA0, True)
    assert (found[0x70].reads, found[0x70].writes) == ({"UR6", "R20", "R21"}, {"R2", "R3"})
    assert (found[0x90].reads, found[0x90].writes) == ({"UR6", "R20", "R21", "R8", "R9"}, set())
    assert found[0xC0].constant == 7
    jumps = trace("@P0 CALL.REL.NOINC 0x0", "CALL.REL.NOINC 0x0", "BRA.DIV ~URZ, 0x0", "@!P0 EXIT", "BRA UP0, 0x0")
    assert [(i.target, i.goes_on) for i in jumps] == [(0, True), (None, True), (0, True), (None, True), (0, True)]
    assert not found[0x110].goes_on
    assert not found[0x120].goes_on


def test_a_step_leaves_out_what_is_for_ends_and_repeats_what_is_counted():
    code = Code(parse(SASS)["forward"])
    begun, counted = ["LDSM", "NOP", "HMMA", "ISETP", "BRA"], ["MUFU", "VIADD", "ISETP", "BRA"]
    found = code.step(False, lambda depth, has_matrix: None)
    assert [i.op.split(".")[0] for i in found] == [*begun, *4 * counted, "STS", "BAR", "BRA"]
    told = code.step(False, lambda depth, has_matrix: 2)
    assert len(told) == len(found) - 2 * len(counted)
    elsewhere = SASS.replace("@!P1 BRA 0xa0 ;", "@P1 CALL.REL.NOINC 0xe0 ;\n /*00d8*/ BRA 0xa0 ;")
    found = Code(parse(elsewhere)["forward"]).step(False, lambda depth, has_matrix: None)
    assert [i.op for i in found].count("MUFU.TANH") == 4


@pytest.mark.parametrize(
    ("test", "guard"),
    [
        ("LOP3.LUT P3, RZ, R9, 0xf, RZ, 0xc0, !PT", "@P3"),
        ("ISETP.NE.AND P3, PT, R9, 0xf, PT", "@P3"),
        ("ISETP.EQ.AND P3, PT, R9, 0xf, PT", "@!P3"),
    ],
)
def test_what_happens_once_in_many_steps_is_left_out(test, guard):
    def ops(*lines):
        return [i.op.split(".")[0] for i in Code(trace(*lines)).step(False, lambda depth, has_matrix: None)]

    rest = ["STS [R0], R1", "HMMA.16816.F32.BF16 R20, R24, R28, R20", "VIADD R9, R9, 0x1", "@P0 BRA 0x10", "EXIT"]
    assert "STS" not in ops("NOP", test, f"{guard} BRA 0x40", *rest)
    assert "STS" in ops("NOP", test.replace("R9", "R8"), f"{guard} BRA 0x40", *rest)  # the same at all steps
    assert "STS" in ops("NOP", "LDS R9, [R9]", test, f"{guard} BRA 0x50", *rest)  # of what, nobody knows


@pytest.mark.parametrize(
    ("lines", "warps", "cycles"),
    [
        (["FADD R1, R1, R2"] * 5, 1, 5 * 4),  # each waits for the one before
        (["FADD R1, R1, R2"] * 5, 4, 5 * 4),  # and others come between
        (["FADD R1, R1, R2"] * 5, 6, 5 * 6),  # one is issued in a cycle
        (["FADD R1, R2, R3", "FADD R4, R5, R6"], 2, 4 + 2 - 2),
        (["LOP3.LUT R1, R2, R3, RZ, 0xc0, !PT"] * 3, 2, 3 * 5),
        ([f"LOP3.LUT R{n}, R20, R21, RZ, 0xc0, !PT" for n in range(9)], 2, 2 * 9 * 2),  # half a warp in a cycle
        (["HMMA.16816.F32.BF16 R0, R4, R8, R0"] * 8, 1, 8 * MATRIX),
        (["LDS.128 R0, [R4]", "FADD R4, R0, R1"], 1, H100.shared + 4),
        (["STS.128 [R4], R0"] * 3, 2, 3 * 2 * 4 * 4),  # four wavefronts, and four quarters share the unit
        (["FADD R1, R1, R2", "BAR.SYNC.DEFER_BLOCKING 0x0"], 1, 1 + BARRIER),
        (["LDGSTS.E.BYPASS.128 [R0], [R2.64]", "LDGDEPBAR", "DEPBAR.LE SB0, 0x0"], 1, H100.l2 + 1),
        # of two groups of copies one may be under way
        (["LDGSTS.E.BYPASS.128 [R0], [R2.64]", "LDGDEPBAR", *["FADD R1, R1, R2"] * 40, "DEPBAR.LE SB0, 0x1"], 1, 162),
    ],
)
def test_cycles_by_hand(lines, warps, cycles):
    assert simulated(trace(*lines), H100, warps).cycles == pytest.approx(cycles, abs=2)


def test_what_is_busy():
    busy = simulated(trace("STG.E.128 [R2.64], R4", "FADD R1, R2, R3", "BRA 0x0"), H100, 2).busy
    assert busy == {"issue": 6, "shared memory": 2 * 16, "l2": 2 * 4 * 512 / H100.l2_bytes, "float32": 2}
    assert simulated(trace("FADD R1, R2, R3"), CHIPS[80], 1).busy["float32"] == 2
    assert kind("HMMA.1688.F32.BF16", H100).busy == kind("HMMA.1688.F32.TF32", H100).busy / 2


def test_steps_behind_each_other_by_hand():
    # 64 sequences of 9 rows in tiles of 16: each its own tile, or, of 8 that run at once, 8 of them one after the other
    assert model.steps(16, 132) == 1
    assert model.steps(16, 4) == 9
    assert gpu.steps(100, 64, 8, 50, 16, 8, gpu.Plan(8, 1)) == 100 + math.ceil(8 * 7 / 16) * 50


def test_the_floor_is_that_of_products():
    size = Size(90, "gru", "bfloat16", "triton", 128)
    flops = model.work(SETTING, True).forward_flops
    assert model.floor(size)["forward"] == pytest.approx(1e6 * flops / 989e12 / 1000)
    assert model.floor(size)["backward"] == pytest.approx(2 * 1e6 * flops / 989e12 / 1000)
    barriers = model.floor(size._replace(hidden=1))
    assert barriers["forward"] == barriers["backward"] == pytest.approx(BARRIER / 1755)


def test_who_is_predicted_to_be_the_fastest_is_asked_first(monkeypatch):
    monkeypatch.setattr(gpu, "PREDICTED_HIDDEN", (32, 64))
    rows = {("gru", "bfloat16", "triton"): (1.0, 3.0), ("gru", "bfloat16", "cuda"): (2.0, 2.0)}
    monkeypatch.setattr(gpu, "PREDICTED", rows | {("lstm", "bfloat16", "cuda"): (1.0, math.inf)})
    call = {"cell": "gru", "dtype": torch.bfloat16, "hidden_size": 32}
    assert gpu.predicted(**call) == {"triton": 1.0, "cuda": 2.0}
    assert [*gpu.predicted(**call | {"hidden_size": 33, "dtype": torch.float16})] == ["cuda", "triton"]
    for other in ({"hidden_size": 65}, {"dtype": torch.float64}, {"cell": "rnn_relu"}):
        assert gpu.predicted(**call | other) == {}
    asked: list[str] = []
    monkeypatch.setattr(backends, "why_not", lambda name, **_: [asked.append(name)] and ["no"])
    for hidden, order in ((32, ["cpu", "triton", "cuda"]), (64, ["cpu", "triton", "cuda"])):
        assert backends.why_no_kernel(**call | {"hidden_size": hidden}, device="cpu") == ["no"] * 3
        assert asked == order
        asked.clear()
    for hidden, order in ((32, ["triton", "cuda", "cpu"]), (64, ["cuda", "triton", "cpu"])):
        assert backends.choose("auto", **call | {"hidden_size": hidden}, device="cuda") == "reference"
        assert asked == order
        asked.clear()
    monkeypatch.setattr(gpu, "fastest", lambda **_: "triton")
    assert backends.choose("auto", **call | {"hidden_size": 64}, device="cuda") == "reference"
    assert asked == ["triton", "cuda", "cpu"]


def test_the_table_is_complete():
    kinds = {(cell, dtype) for cell, dtype, _ in gpu.PREDICTED}
    assert kinds == {(cell, dtype) for cell in aot.CELLS for dtype in ("float32", "bfloat16")}
    assert {len(row) for row in gpu.PREDICTED.values()} == {len(gpu.PREDICTED_HIDDEN)}


def test_what_is_predicted_to_be_slower_than_cudnn(monkeypatch):
    monkeypatch.setattr(gpu, "PREDICTED_HIDDEN", (32, 64))
    monkeypatch.setattr(gpu, "PREDICTED", {("gru", "bfloat16", "cuda"): (gpu.CUDNN, 99.0)})
    call = {"cell": "gru", "dtype": torch.bfloat16}
    assert gpu.slower_than_torch("cuda", **call, hidden_size=32) == []
    (reason,) = gpu.slower_than_torch("cuda", **call, hidden_size=33)
    assert reason == "cuda: at H=33 a step is predicted to take 99 us, cuDNN's about 28"
    assert gpu.slower_than_torch("cuda", **call, hidden_size=65)
    assert gpu.slower_than_torch("triton", **call, hidden_size=32)
