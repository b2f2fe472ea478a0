"""Every command in README and docs is run, against real servers, and prints what the page shows.

What a fenced block holds is said by its language: `console` is a shell's transcript, `python` a program. The few
commands that cannot be run are in one table, with the reason, and are checked otherwise.
"""

import json
import re
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from commands import command_env, command_folder
from doc_pages import Shell, blocks, code_spans, steps
from lorasrv.cli.main import app
from lorasrv_bench import peers

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"console", "python", "toml", "json", "text", ""}
# The ports that pages name: a test takes free ones.
PORTS = ("8470", "8471")


def has_make_target(command: str) -> None:
    target = command.split("#")[0].split()[1]
    subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)


def has_environment(command: str) -> None:
    assert "BIN := .venv/bin" in (ROOT / "Makefile").read_text()


def has_options(command: str) -> None:
    words = command.split()
    module = words[words.index("-m") + 1]
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=100
    )
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[\w-]+", done.stdout)), command


def exists_with_its_options(command: str) -> None:
    check_options(command.split())


def names_our_material(command: str) -> None:
    """Paths are those that `lorasrv_bench.peers --write material` writes, or that a command of the page makes of it."""
    with tempfile.TemporaryDirectory() as folder:
        peers.written(Path(folder) / "material", peers.Setup(size="tiny"))
        paths = [path.replace("$n", "0") for path in re.findall(r"material/[\w./$-]+", command)]
        missing = [path for path in paths if not path.endswith(".gguf") and not (Path(folder) / path).exists()]
        assert not missing, missing


def is_outside_the_tree(command: str) -> None:
    assert not (ROOT / command.split()[-1]).exists()


# Commands that are not run here, by how they begin: why, and what is checked instead.
NOT_RUN: dict[str, tuple[str, Callable[[str], None]]] = {
    "make demo": ("installs; tests/test_end_to_end.py runs the demo's streams", has_make_target),
    "make test": ("runs this very test", has_make_target),
    "PYTHONPATH=.:kernels:adapters:benchmarks python3 -m lorasrv_bench.gpu": (
        "takes minutes; tests/test_gpu_bench.py runs it --quick",
        has_options,
    ),
    "PYTHONPATH=.:kernels:adapters:benchmarks python -m lorasrv_bench.economy": (
        "takes many minutes; tests/test_bench_economy.py runs a small one",
        has_options,
    ),
    "make bench": ("takes minutes; tests/test_cpu_bench.py runs it --quick", has_make_target),
    "PYTHONPATH=.:kernels:adapters:benchmarks python -m lorasrv_bench.peers": (
        "takes minutes; tests/test_cpu_bench.py runs a small one",
        has_options,
    ),
    "PYTHONPATH=.:kernels:adapters:benchmarks python -m lorasrv_bench.curves": (
        "takes minutes; tests/test_cpu_bench.py runs a small one",
        has_options,
    ),
    "cmake": ("builds another project", names_our_material),
    "PYTHONPATH=llama.cpp": ("another project's converter", names_our_material),
    "for n in 0 1 2 3": ("another project's converter", names_our_material),
    "llama.cpp/build": ("another project's server", names_our_material),
    "VLLM_CPU": ("another project's server", names_our_material),
    "lorasrv bench serve --openai": (
        "asks another project's server; tests/test_bench_serving.py runs a small one",
        exists_with_its_options,
    ),
    "lorasrv simulate --workload slora:n=10000": (
        "takes minutes; tests/test_simulate_command.py runs smaller ones",
        exists_with_its_options,
    ),
    "PYTHONPATH=.:kernels:adapters:benchmarks python3 -m lorasrv_bench.simulated": (
        "takes minutes; tests/test_sim_calibration.py runs it small",
        has_options,
    ),
    "git clone": ("fetches other projects' code, which is no part of this repository", is_outside_the_tree),
    ". .venv/bin/activate": ("the environment that make has made is active in this test", has_environment),
}


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    env = command_env(command_folder(tmp_path / "bin"), tmp_path)
    # `buf` is in the environment of this Python.
    env["PATH"] += f":{Path(sys.executable).parent}"
    ours = {}
    for number in PORTS:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ours[number] = str(probe.getsockname()[1])
    address = f"127.0.0.1:{ours[PORTS[0]]}"
    work = tmp_path / "work"
    work.mkdir()
    (work / "adapters").symlink_to(ROOT / "adapters")
    found = Shell(work, {**env, "LORASRV_URL": address, "LORASRV_LISTEN": address}, ours)
    yield found
    found.close()


@pytest.mark.timeout(300)  # three servers and four times torch
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_every_command_of_the_page_does_what_it_says(page: Path, shell: Shell) -> None:
    for block in blocks(page):
        if block.language == "python":
            shell.run(block)
        if block.language == "console":
            for step in steps(block):
                reason = next((key for key in NOT_RUN if step.command.startswith(key)), None)
                if reason is None:
                    shell.do(step)
                else:
                    NOT_RUN[reason][1](step.command)


def test_what_is_no_command_says_so_by_its_language() -> None:
    commands: list[str] = []
    for block in (block for page in PAGES for block in blocks(page)):
        assert block.language in LANGUAGES, block.place
        if block.language == "console":
            assert block.text.startswith("$ "), block.place
            commands += [step.command for step in steps(block)]
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language != "python":
            hidden = re.compile(r"(?m)^(\$ |lorasrv |make |pip |python |buf |docker )")
            assert not hidden.search(block.text), f"{block.place} holds commands that nothing runs"
    assert [key for key in NOT_RUN if not any(command.startswith(key) for command in commands)] == []


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The verb that the words name, and the words behind it."""
    found = typer.main.get_command(app)
    while words and words[0] in getattr(found, "commands", {}):
        found, words = found.commands[words[0]], words[1:]  # pyright: ignore[reportAttributeAccessIssue]
    return found, words


def check_options(words: list[str]) -> None:
    """Raise AssertionError for a verb or an option that there is not."""
    verb, rest = command_of(words[1:])
    assert not hasattr(verb, "commands") or rest == [] or rest[0].startswith("--"), f"{words}: there is no such verb"
    options = {option for parameter in verb.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in rest if word.startswith("--")} <= options | {"--help"}, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_sentences_exist(page: Path) -> None:
    for span in code_spans(page):
        words = span.split()
        if words[0] == "make" and len(words) == 2:
            has_make_target(span)
        if words[0] != "lorasrv" or len(words) < 2 or words[1] == "→":
            continue
        check_options(words)


def test_a_page_that_is_wrong_is_noticed(tmp_path: Path, shell: Shell) -> None:
    def page(text: str) -> Path:
        (tmp_path / "page.md").write_text(text)
        return tmp_path / "page.md"

    def do(text: str) -> None:
        for block in blocks(page(text)):
            shell.run(block)

    do("```console\n$ echo a b \\\n   c\na … c\n$ true\n```\n")
    do("```console\n$ (sleep 0.1; echo READY 8470) &\nREADY 8470\n```\n")
    with pytest.raises(AssertionError, match="the page shows"):
        do("```console\n$ echo a\nb\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:2: false"):
        do("\n```console\n$ false\n```\n")
    with pytest.raises(AssertionError, match="NameError"):
        do("```python\nundefined\n```\n")
