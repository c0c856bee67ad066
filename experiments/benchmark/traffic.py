"""The traffic of a compiled program, read from its text: bytes to and from main memory, collectives, conditionals.

Each instruction of the entry computation reads its operands and writes its result once; of an operand that a fusion
only takes slices of, it reads the slices. Instructions that only name or view an array are not counted, and neither are
arrays in on-chip memory (memory space S(1) of a TPU). For a conditional the cheapest branch counts, which is the usual
one; the body of a loop counts once.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_BYTES = {
    **{"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8},
    **{"f64": 8, "c64": 8, "c128": 16},
}
_VIEWS = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id", "iota"),
    "opt-barrier",
}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_OPENING = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")


@dataclass(frozen=True)
class Collective:
    """One collective operation: its kind, such as all-reduce, and the bytes of its result on one device."""

    kind: str
    bytes: int


class Program:
    """The text of a compiled program, `jax.stages.Compiled.as_text()`."""

    def __init__(self, text: str):
        self._lines: dict[str, list[str]] = {}
        self._entry = name = ""
        for line in text.splitlines():
            if opening := _OPENING.match(line):
                name = opening.group(2)
                self._lines[name] = []
                self._entry = name if opening.group(1) else self._entry
            elif line.startswith("}"):
                name = ""
            elif name:
                self._lines[name].append(line)

    @cached_property
    def bytes(self) -> int:
        """Bytes that the program reads from main memory and writes to it, on one device."""
        return self._moved(self._entry)

    @cached_property
    def collectives(self) -> list[Collective]:
        """Collectives that usually run."""
        return self._collectives(self._entry)

    @cached_property
    def conditionals(self) -> int:
        """Conditionals that usually run. The host of a GPU waits for the predicate of each."""
        return sum(operation == "conditional" for _, _, operation, _ in self._usual(self._entry))

    def _collectives(self, computation: str) -> list[Collective]:
        found = []
        for _, kind, operation, _ in self._usual(computation):
            if (name := operation.removesuffix("-start")) in _COLLECTIVES:
                sizes = [size for size, _ in _arrays(kind)]
                if operation == "all-gather-start":
                    del sizes[: len(sizes) // 2]  # the operands, which its type has before the results
                found.append(Collective(name, sum(sizes)))
        return found

    def _usual(self, computation: str) -> Iterator[tuple[str, str, str, str]]:
        """The instructions of a computation, each followed by the instructions of the computation that it calls."""
        for instruction in self._instructions(computation):
            yield instruction
            if called := self._called(*instruction[2:]):
                yield from self._usual(called)

    def _called(self, operation: str, rest: str) -> str | None:
        """The computation that an instruction calls; for a conditional, the cheapest branch."""
        if operation == "conditional":
            found = _BRANCHES.findall(rest)
            branches = [b.strip().lstrip("%") for many, one in found for b in (many or one).split(",")]
            # A branch whose arrays are all on the chip of a TPU moves nothing, but may have collectives.
            return min(branches, key=lambda b: (self._moved(b), sum(c.bytes for c in self._collectives(b))))
        if operation in ("call", "while"):
            called = re.search(r"(?:to_apply|body)=%?([\w.\-]+)", rest)
            assert called is not None, rest
            return called.group(1)
        return None

    def _instructions(self, computation: str) -> Iterator[tuple[str, str, str, str]]:
        """Name, type, operation and the rest of the line of each instruction."""
        for line in self._lines.get(computation, ()):
            if instruction := _INSTRUCTION.match(line):
                yield instruction.groups()  # pyright: ignore[reportReturnType]  the four groups all match

    def _moved(self, computation: str) -> int:
        sizes: dict[str, int] = {}
        total = 0
        for name, kind, operation, rest in self._instructions(computation):
            arrays = _arrays(kind)
            sizes[name] = sum(size for size, on_chip in arrays if not on_chip)
            if operation in _VIEWS or operation.endswith("-done"):
                continue
            if called := self._called(operation, rest):
                total += self._moved(called)
            elif operation in ("copy-start", "slice-start"):
                # Asynchronous: the type names source and destination. The bytes moved are those of the destination.
                (first, second) = arrays[:2]
                (size, to_chip), (_, from_chip) = (first, second) if operation == "copy-start" else (second, first)
                total += size * ((not to_chip) + (not from_chip))
            else:
                operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
                fused = re.search(r"calls=%?([\w.\-]+)", rest) if operation == "fusion" else None
                sliced = self._slices(fused.group(1)) if fused else {}
                read: dict[str, int] = {}
                for place, operand in enumerate(operands):
                    size = sizes.get(operand, 0)
                    read[operand] = max(read.get(operand, 0), min(size, sliced.get(place, size)))
                total += sizes[name] + sum(read.values())
        return total

    def _slices(self, computation: str) -> dict[int, int]:
        """By position of a parameter that a computation only takes slices of, the bytes of the slices."""
        places: dict[str, int] = {}
        slices: dict[int, int] = {}
        other: set[int] = set()
        for name, kind, operation, rest in self._instructions(computation):
            arguments = rest.split(")")[0]
            if operation == "parameter":
                places[name] = int(arguments)
            for operand in set(re.findall(r"%([\w.\-]+)", arguments)) & places.keys():
                place = places[operand]
                # The operands of a dynamic slice are the array and the scalars that say where it begins.
                if operation in ("slice", "dynamic-slice"):
                    slices[place] = slices.get(place, 0) + sum(size for size, _ in _arrays(kind))
                else:
                    other.add(place)
        return {place: size for place, size in slices.items() if place not in other}


def _arrays(kind: str) -> list[tuple[int, bool]]:
    """Bytes of each array that the text of a type names, and whether it lies in on-chip memory."""
    found = []
    for dtype, dimensions, layout in _ARRAY.findall(kind):
        size = _BYTES.get(dtype, 0)
        for dimension in filter(None, dimensions.split(",")):
            size *= int(dimension)
        found.append((size, "S(1)" in layout))
    return found
