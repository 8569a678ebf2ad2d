"""The verb completion: what Tab completes in bash."""

import subprocess
import sys
from pathlib import Path

import pytest

from guided_distill import cli

ROOT = Path(__file__).parents[1]

# What bash does at a Tab: it calls the function that is registered for the program.
TABS = """
eval "$(guided-distill completion bash)"
while IFS= read -r COMP_LINE; do
    COMP_POINT=${#COMP_LINE} COMP_TYPE=9 COMPREPLY=()
    _python_argcomplete guided-distill
    echo "${COMPREPLY[*]}"
done
"""


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """f(lines): the completions of each line, by a bash that starts this package's code."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "guided-distill"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m guided_distill.cli "$@"\n')
    script.chmod(0o755)

    def complete(*lines):
        done = subprocess.run(
            ["bash", "-c", f'PATH="{folder}:$PATH"\n{TABS}'],
            input="".join(f"{line}\n" for line in lines),
            cwd=ROOT,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
            text=True,
        )
        return [line.split() for line in done.stdout.splitlines()]

    return complete


def test_tab_in_bash(complete, tmp_path):
    for stage in ("teacher", "halving_ddim_2", "halving_ddim_1"):
        (tmp_path / stage / "checkpoints").mkdir(parents=True)
    (tmp_path / "samples").mkdir()
    of_run = f"--workdir {tmp_path}"
    expected = {
        "guided-distill tr": ["train", "transfer"],
        "guided-distill config sh": ["show"],
        "guided-distill sample --num_": ["--num_steps"],
        "guided-distill plan --optimization_level ": ["O0", "O1", "O2", "O3"],
        "guided-distill train --config configs/dig": ["configs/digits.py"],
        "guided-distill config show configs/dig": ["configs/digits.py"],
        f"guided-distill sample {of_run} --stage h": ["halving_ddim_1", "halving_ddim_2"],
        f"guided-distill export {of_run} --stages teacher,t": ["teacher,teacher"],
        # A value that is refused, and a workdir that isn't there.
        f"guided-distill sample {of_run} --w x --stage t": [],
        f"guided-distill sample {of_run}/none --stage t": [],
    }
    assert dict(zip(expected, complete(*expected), strict=True)) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    assert "guided-distill" in capsys.readouterr().out


def test_without_argcomplete_it_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert cli.main(["completion", "bash"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("pip install argcomplete (the extra `completion`)")


def test_another_shell_is_one_sentence(capsys):
    assert cli.main(["completion", "tcsh"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "tcsh" in line
    assert "fish" in line
