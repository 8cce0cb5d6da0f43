import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, resource
from engine.allocation import keep_freed_memory, return_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        memory = bytearray(48 << 20)
        del memory
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = [faults()]
keep_freed_memory()
faults()
found.append(faults())
return_freed_memory()
found.append(faults())
print(json.dumps(found))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_in_place_for_the_next_step() -> None:
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True, check=True).stdout
    before, kept, returned = json.loads(out)
    assert kept < 100
    assert min(before, returned) > 10 * 100
