"""The commands of a Markdown page, and a shell that runs them as a reader would."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
# The first line of a program that is to be saved, and not yet run.
FILE_NAME = re.compile(r"# ([\w.-]+\.py)\n")
DEADLINE_S = 120.0
STOP_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block; `place` is for people."""

    language: str
    text: str
    place: str


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command, and what the page shows of its output; `…` stands for anything, and nothing shown means nothing."""

    command: str
    output: str
    place: str

    def shows(self, printed: str) -> bool:
        pattern = ".*".join(map(re.escape, self.output.strip().split("…")))
        return not self.output.strip() or re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(language=match[1], text=match[2], place=f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}")
        for match in FENCE.finditer(text)
    ]


def code_spans(page: Path) -> list[str]:
    """What stands between single backquotes, each on one line."""
    return [" ".join(span.split()) for span in CODE_SPAN.findall(FENCE.sub("", page.read_text()))]


def steps(block: Block) -> Iterator[Step]:
    """The commands of a console block: `$ ` begins one, a backslash at the end of a line goes on with it."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE):
        lines = part.splitlines()
        if not lines:
            continue
        length = next(number for number, line in enumerate(lines, start=1) if not line.endswith("\\"))
        command, output = "\n".join(lines[:length]), "\n".join(lines[length:])
        yield Step(command=command, output=output, place=block.place)


class Shell:
    """One bash for a page. `numbers` are the ports that its commands take instead of those that the page names."""

    def __init__(self, folder: Path, env: Mapping[str, str], numbers: Mapping[str, str]) -> None:
        self._folder = folder
        self._numbers = numbers
        self._errors = folder / "stderr.txt"
        self._output = folder / "stdout.txt"
        with self._errors.open("w") as errors, self._output.open("w") as output:
            self._process: Any = subprocess.Popen(
                ["bash", "--norc"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=errors,
                cwd=folder,
                env=env,
                text=True,
                start_new_session=True,
            )

    def close(self) -> None:
        """Servers are told to stop, and waited for; nothing is left, whatever a command did."""
        try:
            with suppress(BrokenPipeError):
                self._process.communicate("kill $(jobs -p); wait\n", timeout=STOP_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def run(self, block: Block) -> None:
        """A block as its language says; raises AssertionError for a command that fails, or shows something else."""
        if block.language == "console":
            for step in steps(block):
                self.do(step)
        elif (named := FILE_NAME.match(block.text)) is not None:
            (self._folder / named[1]).write_text(block.text)
        else:
            (self._folder / "block.py").write_text(self._local(block.text))
            self.do(Step(command="python block.py", output="", place=block.place))

    def do(self, step: Step) -> None:
        """A command that ends in `&` has done its work when it shows what it is to show."""
        before = len(self._output.read_text())
        expected = Step(command=step.command, output=self._local(step.output), place=step.place)
        done = self._folder / "done.txt"
        done.unlink(missing_ok=True)
        self._process.stdin.write(f"{self._local(step.command)}\necho $? > {done}.new; mv {done}.new {done}\n")
        self._process.stdin.flush()
        deadline = time.monotonic() + DEADLINE_S
        while not done.exists() or (step.command.endswith("&") and not expected.shows(self._since(before))):
            alive = self._process.poll() is None and time.monotonic() < deadline
            assert alive, f"{step.place}: {step.command}: not done\n{self._since(before)}\n{self._errors.read_text()}"
            time.sleep(0.01)
        said = f"{step.place}: {step.command}\n{self._since(before)}\n{self._errors.read_text()[-3000:]}"
        assert done.read_text() == "0\n", said
        assert expected.shows(self._since(before)), f"{said}\nthe page shows:\n{expected.output}"

    def _since(self, position: int) -> str:
        return self._output.read_text()[position:]

    def _local(self, text: str) -> str:
        for number, ours in self._numbers.items():
            text = text.replace(number, ours)
        return text
