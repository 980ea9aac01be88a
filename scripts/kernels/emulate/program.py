"""PTX text as a program: instructions with their operands, labels, declared registers and parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from emulate.faults import EmulationError, UnknownInstruction

STATEMENT = re.compile(r"[^;{}]*(?:\{[^{};]*\}[^;{}]*)*;|[{}]")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+")


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@guard name operands`."""

    name: str
    operands: tuple[str, ...]
    guard: str
    """The predicate that it is under, with "!" in front where it is negated; empty without."""
    text: str

    @property
    def operation(self) -> str:
        """Of `add.ftz.f32`, `add`."""
        return self.name.partition(".")[0]

    @property
    def type(self) -> str:
        """Of `add.ftz.f32`, `f32`."""
        return self.name.rpartition(".")[2]

    @property
    def modifiers(self) -> tuple[str, ...]:
        """Of `add.ftz.f32`, `ftz`."""
        return tuple(self.name.split(".")[1:-1])

    def only(self, known: Iterable[str]) -> None:
        """Refuse modifiers that are not among the known ones, since each changes what is computed.

        Raises:
            UnknownInstruction: there is another.
        """
        if unknown := sorted(set(self.modifiers) - set(known)):
            raise UnknownInstruction(self.text, f"the modifier {', '.join(unknown)}")


@dataclass
class Program:
    """One kernel."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    """Label -> number of the instruction behind it."""
    registers: dict[str, str] = field(default_factory=dict)
    """Name without its number ("%r") or whole -> type."""
    parameters: list[str] = field(default_factory=list)


def parse(text: str) -> Program:
    """The kernel of a PTX module.

    Raises:
        EmulationError: there is no kernel, or its end is not found.
    """
    entry = text.find(".entry")
    begin = text.find("\n{", entry)
    end = text.find("\n}\n", begin)
    if min(entry, begin, end) < 0:
        raise EmulationError(
            "the PTX has no '.entry' with a body between '{' and '}' at the beginning of lines"
        )
    program = Program(parameters=re.findall(r"\.param \.\w+[^\n]*?(\w+_param_\d+)", text[entry:begin]))
    body = re.sub(r"//[^\n]*", "", text[begin + 2 : end])
    body = re.sub(r"(?m)^\s*\.(loc|pragma|file|section)\b[^\n]*$", "", body)
    for statement in STATEMENT.findall(body):
        line = " ".join(statement.split()).rstrip(";").strip()
        while label := re.match(r"(\$\w+):\s*", line):
            program.labels[label[1]] = len(program.instructions)
            line = line[label.end() :]
        if line.startswith(".reg"):
            _declare(program, line)
        elif line and line not in "{}":
            program.instructions.append(instruction(line))
    if not program.instructions or program.instructions[-1].operation not in ("ret", "bra", "exit"):
        raise EmulationError("the PTX's last instruction is no return: its end was not found")
    return program


def _declare(program: Program, line: str) -> None:
    """`.reg .b32 %r<9>`, or with names of its own, as in inline assembly."""
    _, kind, names = line.split(maxsplit=2)
    for name in names.split(","):
        program.registers[name.strip().partition("<")[0]] = kind.lstrip(".")


def instruction(line: str) -> Instruction:
    """One line without its semicolon.

    Raises:
        UnknownInstruction: it is a directive.
    """
    found = re.match(r"(?:@(!?%?\w+)\s+)?([\w.:]+)\s*(.*)", line)
    if found is None or line.startswith("."):
        raise UnknownInstruction(line, "the directive")
    guard, name, rest = found.groups()
    if name.split(".")[0] in ("bra", "bar", "barrier", "ret", "exit") or not rest:
        operands = tuple(x.strip() for x in rest.split(",") if x.strip())
    else:
        operands = tuple(x.strip() for x in OPERAND.findall(rest) if x.strip())
    return Instruction(name, operands, guard or "", line)
