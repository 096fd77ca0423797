"""Machine code of NVIDIA's GPUs (SASS), as cuobjdump prints it: its instructions, loops, and the way through a loop."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import triton

Trips = Callable[[int, bool], "int | None"]  # depth in the loop over time, holds matrix instructions -> how often


class Instruction(NamedTuple):
    """Attributes:
    op: with all its suffixes.
    guard: the predicate, or its opposite ("!P0"), without which nothing happens; "" if there is none.
    reads, writes: registers and predicates.
    target: address to which it may jump.
    goes_on: whether the next instruction may follow.
    constant: its last one.
    """

    address: int
    op: str
    guard: str
    reads: frozenset[str]
    writes: frozenset[str]
    target: int | None
    goes_on: bool
    constant: int | None


def disassembled(cubin: str | Path) -> dict[str, list[Instruction]]:
    """Name of a function -> its machine code."""
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
    return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse(sass: str) -> dict[str, list[Instruction]]:
    functions = {}
    for function in re.split(r"Function : ", sass)[1:]:
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(?:@(!?U?P\w+) +)?([A-Z][\w.]*) *(.*?) *;", function)
        functions[function.split()[0]] = [_instruction(int(a, 16), guard, op, told) for a, guard, op, told in lines]
    return functions


def _instruction(address: int, guard: str, op: str, told: str) -> Instruction:
    if guard in ("!PT", "!UPT"):  # never executed
        guard, op, told = "", "NOP", ""
    operands = re.split(r", *(?![^\[]*\])", told)
    written = 0  # of the operands: predicates, and the register behind them with more predicates
    if not re.match(r"ST|RED|BRA|CALL|RET|BAR|LDGSTS|LDGDEPBAR|DEPBAR|MEMBAR|EXIT|BSSY|BSYNC|SYNCS|UCGABAR", op):
        kinds = "".join("p" if re.fullmatch(r"!?U?P[T\d]", operand) else "r" for operand in operands)
        written = re.match(r"p*" if re.search(r"SETP|PLOP3", op) else r"p*rp*", kinds + "r").end()
    wide = 4 if re.search(r"128|MMA|M88\.4", op) else 2 if re.search(r"\.64|WIDE|CS2R$|M88\.2", op) else 1
    reads, writes = {guard.lstrip("!")} - {""}, set()
    for n, operand in enumerate(operands):
        for name, number, pair in re.findall(r"\b(U?[RP])(\d+)(\.64)?", operand):
            data = name in ("R", "UR") and (n < written or "MMA" in op or (op.startswith("ST") and n == 1))
            width = (2 if "MMA" in op and n == 2 else wide) if data else 2 if pair else 1
            (writes if n < written else reads).update(f"{name}{int(number) + k}" for k in range(width))
    jumps = op.startswith("BRA") or (op.startswith("CALL") and guard)  # a call that not all make is a jump
    numbers = [int(number, 16) for number in re.findall(r"(?<!\[)\b0x([0-9a-f]+)", told)]
    always = re.match(r"BRA(?!\.DIV|\.CONV)|EXIT", op) and not guard and not re.search(r"P\d", told)
    return Instruction(
        address, op, guard, frozenset(reads), frozenset(writes), numbers[-1] if jumps else None, not always,
        numbers[-1] if numbers else None,
    )  # fmt: skip


class Loop(NamedTuple):
    head: int
    body: frozenset[int]


class Code:
    """The control flow of a function, by the positions of its instructions."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self.instructions = instructions
        at = {instruction.address: n for n, instruction in enumerate(instructions)}
        self.next = [[n + 1] * i.goes_on + [at[t] for t in [i.target] if t in at] for n, i in enumerate(instructions)]
        before: list[list[int]] = [[] for _ in range(len(instructions) + 1)]
        for n, follows in enumerate(self.next):
            for m in follows:
                before[m].append(n)
        bodies: dict[int, set[int]] = {}
        for n, head in ((n, m) for n, follows in enumerate(self.next) for m in follows if m <= n):
            body, todo = {head}, [n]
            while todo:
                m = todo.pop()
                if m not in body:
                    body.add(m)
                    todo += before[m]
            if 0 not in body:  # else the jump goes back to where others have been already
                bodies.setdefault(head, set()).update(body)
        self.loops = sorted((Loop(h, frozenset(b)) for h, b in bodies.items()), key=lambda loop: len(loop.body))

    def has_matrix(self, loop: Loop) -> bool:
        return any("MMA" in self.instructions[n].op for n in loop.body)

    def step(self, streamed: bool, trips: Trips) -> list[Instruction]:
        """What a warp executes in one repetition of the loop over time, in this order."""
        time = [loop for loop in self.loops if self.has_matrix(loop)][2 if streamed else 0]
        inner = [loop for loop in self.loops if loop.body < time.body]
        depth = {loop: sum(loop.body <= other.body for other in inner) for loop in inner}
        told = {loop: trips(depth[loop], self.has_matrix(loop)) for loop in inner}
        times = {loop: self._counted(loop) if told[loop] is None else told[loop] for loop in inner}
        worth = {n: self._worth(n) for n in time.body}
        for loop in inner:
            if any(times[other] > 1 for other in inner if other.body < loop.body) and told[loop] is None:
                times[loop] = 1  # rows take turns, each in one of them
            worth[loop.head] += 1e6 * bool(told[loop])
            if not times[loop]:
                worth |= dict.fromkeys(loop.body, -1e3)
        for seldom in filter(None, (self._once_in_many(n, time) for n in time.body)):
            worth[seldom] = -1e4
        best = self._best(time, inner, worth)

        trace, left, at = [], dict(times), time.head
        while at is not None:
            trace.append(self.instructions[at])
            again = [loop for loop in inner if loop.head in self.next[at] and at in loop.body and left[loop] > 1]
            if again:
                left |= {loop: times[loop] for loop in inner if loop.body < again[0].body}
                left[again[0]] -= 1
            at = again[0].head if again else best[at]
        return trace

    def _worth(self, n: int) -> float:
        """Of a way past an instruction: pieces of 16 bytes are fetched ahead, other loads from global memory are waited
        for."""
        if not re.match(r"LDG?\.|LDGSTS", self.instructions[n].op):
            return 1
        return 1e3 if re.match(r"LDGSTS.*128", self.instructions[n].op) else -1e3

    def _once_in_many(self, n: int, time: Loop) -> int | None:
        """Where a branch goes at every 16th step, say: its predicate compares what follows from the step's number alone
        with a constant, or tests some of its bits."""
        branch = self.instructions[n]
        if branch.target is None or not branch.guard:
            return None
        needed, test = {branch.guard.lstrip("!")}, None
        for i in reversed(self.instructions[time.head : n]):
            if i.writes & needed:
                test = test or i
                if not re.match(r"IADD|VIADD|SHF|LEA|LOP3|IMAD|MOV|ISETP", i.op):
                    return None
                needed = needed - i.writes | i.reads
        changes = frozenset().union(*(self.instructions[m].writes for m in time.body))
        if not test or not test.constant or not re.match(r"ISETP\.(NE|EQ)|LOP3", test.op) or not needed & changes:
            return None
        mostly_jumps = branch.guard.startswith("!") == test.op.startswith("ISETP.EQ")
        return self.next[n][0 if mostly_jumps else -1]

    def _counted(self, loop: Loop) -> int:
        """How often a loop runs that counts up to a constant by a constant; else once."""
        last = max((n for n in loop.body if {*self.next[n]} - loop.body), default=loop.head)  # where it may be left
        body = [self.instructions[n] for n in sorted(loop.body) if n <= last]
        test = next((i for i in reversed(body) if "ISETP" in i.op and i.writes & body[-1].reads), None)
        for step in body if test and test.constant else ():
            if re.match(r"VIADD|IADD3", step.op) and step.constant and step.writes & step.reads & test.reads:
                return -(-test.constant // step.constant)
        return 1

    def _best(self, time: Loop, inner: Sequence[Loop], worth: dict[int, float]) -> dict[int, int | None]:
        """Where to go on from each instruction, None behind the last, so that the way to the end of the step is worth
        the most, loops not repeated."""
        ways = {}
        for n in time.body:
            back = [loop for loop in (*inner, time) if loop.head in self.next[n] and n in loop.body]
            ways[n] = [m for m in self.next[n] if m in time.body and all(m != loop.head for loop in back)]
            if not ways[n]:  # the loop is left elsewhere
                ways[n] = [m for loop in back for k in loop.body for m in self.next[k] if m in time.body - loop.body]
        total: dict[int, float] = {}
        best: dict[int, int | None] = {}
        todo, begun = [time.head], set()
        while todo:
            n = todo[-1]
            if n not in begun:
                begun.add(n)
                todo += [m for m in ways[n] if m not in begun]
                continue
            todo.pop()
            ends = time.head in self.next[n]
            best[n] = None if ends else max((m for m in ways[n] if m in total), key=total.__getitem__, default=None)
            total[n] = worth[n] + (0 if ends else -1e9 if best[n] is None else total[best[n]])
        return best
