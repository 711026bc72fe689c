"""Closed, full and deserted streams, in real processes with the redirections of a shell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

needs_full = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs /dev/full, which this system lacks"
)


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of sh in which `iddc` is this package."""
    script = f'iddc() {{ "{sys.executable}" -m iddc "$@"; }}; {line}'
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["recipes", "--version", "train --help", "help"])
def test_results_for_a_closed_stdout_are_dropped_without_a_word(command: str) -> None:
    process = shell(f"iddc {command} >&-")
    assert (process.returncode, process.stderr) == (0, "")


@needs_full
@pytest.mark.parametrize("command", ["recipes", "--version", "train --help", "help"])
def test_results_that_do_not_fit_on_the_disk_are_exit_4_and_one_sentence(command: str) -> None:
    process = shell(f"iddc {command} >/dev/full")
    assert process.returncode == 4
    assert process.stderr == (
        "error: The output could not be written: no space left on device. Files that the command "
        "wrote are complete. Make room, or send the output elsewhere.\n"
    )


@pytest.mark.parametrize("target", ["&-", pytest.param("/dev/full", marks=needs_full)])
@pytest.mark.parametrize(
    ("command", "code"),
    [("recipes", 0), ("nosuch", 2), ("train --nosuch", 2), ("train nowhere --out run", 3)],
)
def test_without_stderr_the_exit_code_is_the_same_and_stdout_gets_no_error(
    command: str, code: int, target: str
) -> None:
    process = shell(f"iddc {command} 2>{target}")
    assert process.returncode == code
    assert ("stego" in process.stdout) == (code == 0)
    assert "error" not in process.stdout


def test_without_any_stream_the_exit_code_is_the_same() -> None:
    assert shell("iddc nosuch <&- >&- 2>&-").returncode == 2


def test_a_file_that_is_written_does_not_get_what_is_printed(tmp_path: Path) -> None:
    # With the streams closed, the first file that is opened would be number 1.
    code = (
        "import sys; from iddc.cli.streams import guard_streams; guard_streams(); "
        f"file = open({str(tmp_path / 'x')!r}, 'w'); print('lost', flush=True); "
        "import os; os.write(1, b'lost'); os.write(2, b'lost'); file.write('kept')"
    )
    process = subprocess.run(["sh", "-c", f'"{sys.executable}" -c "{code}" >&- 2>&-'], check=False)
    assert process.returncode == 0
    assert (tmp_path / "x").read_text() == "kept"


def test_a_reader_of_stderr_that_goes_away_ends_nothing() -> None:
    process = shell("{ iddc recipes --json 2>&1 >&3 | true; } 3>&1")
    assert process.stdout.startswith("{")
