"""A script whose reader goes away ends without complaint."""

import subprocess
import sys

import pytest

PROGRAM = """
from engine import script
def main():
    for number in range({lines}):
        print(number)
    return {status}
script.run(main)
"""


def ended(lines, status, reader_leaves):
    program = [sys.executable, "-c", PROGRAM.format(lines=lines, status=status)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        if reader_leaves:
            process.stdout.close()
        else:
            process.stdout.read()
        errors = process.stderr.read()
    return first, errors, process.returncode


def test_a_reader_that_leaves_ends_the_script_as_a_shell_expects():
    assert ended(100_000, 0, True) == ("0\n", "", 141)


def test_another_pipe_that_breaks_is_an_error():
    program = "from engine import script\ndef main():\n    print('x'); raise BrokenPipeError\nscript.run(main)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("x\n", 1)
    assert done.stderr.endswith("BrokenPipeError\n")


@pytest.mark.parametrize("status", [0, 2, None])
def test_the_status_is_that_of_main(status):
    assert ended(5, status, False) == ("0\n", "", status or 0)
