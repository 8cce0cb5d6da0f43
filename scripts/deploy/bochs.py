"""AVX-512 code on a machine without AVX-512: Bochs emulates a whole PC, which runs the network and nothing else.

Needs Debian's packages bochs, bochsbios, vgabios, grub-pc-bin, grub-common, xorriso and mtools. Emulated time means
nothing, and is long: a dense ResNet-20 takes about a minute.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from feather.deploy.build import run_compiler
from feather.deploy.emit import Source
from feather.deploy.targets import TARGETS
from scripts.deploy.program import HERE, Floats, sizes

MACHINE = """\
megs: 1024
cpu: model=corei7_skylake_x, ips=50000000
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=disk.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=serial.txt
display_library: rfb, options="timeout=0"
log: bochs.txt
panic: action=fatal
"""
MENU = """\
set timeout=0
menuentry network {
  multiboot /network
  module /images
}
"""
LINK = (
    "-ffreestanding", "-nostdlib", "-static", "-no-pie",
    "-Wl,-e,start,--build-id=none,-z,max-page-size=4096,--section-start=.multiboot=0x100000,-Ttext=0x101000",
)  # fmt: skip
LIMIT_SECONDS = 3600


def available() -> bool:
    """Whether the emulator and the loader are installed."""
    return all(map(shutil.which, ("bochs", "grub-mkrescue", "xorriso")))


def run(source: Source, images: Floats, directory: Path) -> Floats:
    """Results of a network for the target avx512.

    Raises:
        RuntimeError: the machine stopped without results; its log's last lines are quoted.
    """
    info: dict[str, Any] = source.info
    disk = directory / "disk"
    (disk / "boot" / "grub").mkdir(parents=True, exist_ok=True)
    (directory / f"{info['name']}.c").write_text(source.c)
    (directory / f"{info['name']}.h").write_text(source.header)
    network = disk / "network"
    arguments = [str(HERE / "bare.c"), f"-I{directory}", *sizes(source), *LINK, "-o", str(network), "-lgcc"]
    run_compiler(directory / f"{info['name']}.c", TARGETS["avx512"], arguments)
    images.astype("<f4").tofile(disk / "images")
    (disk / "boot" / "grub" / "grub.cfg").write_text(MENU)
    image = ["grub-mkrescue", "-o", str(directory / "disk.iso"), str(disk)]
    subprocess.run(image, check=True, capture_output=True)
    (directory / "machine").write_text(MACHINE)
    (directory / "debugger").write_text("continue\n")  # Debian's Bochs starts in its debugger
    words = _boot(directory).split("RESULT ")[1].split()
    return np.frombuffer(bytes.fromhex(words[0]), "<f4").reshape(-1, *info["output_shape"])


def _boot(directory: Path) -> str:
    """What the machine wrote to its serial line."""
    serial = directory / "serial.txt"
    serial.unlink(missing_ok=True)
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    machine = subprocess.Popen(["bochs", "-q", "-f", "machine", "-rc", "debugger"], cwd=directory, **quiet)
    end = time.monotonic() + LIMIT_SECONDS
    text = ""
    try:
        while time.monotonic() < end and machine.poll() is None and "\nEND" not in text:
            time.sleep(1)
            text = serial.read_text() if serial.exists() else ""
    finally:
        machine.kill()
        machine.wait()
    if "\nEND" not in text:
        log = (directory / "bochs.txt").read_text().splitlines()[-3:]
        raise RuntimeError("The emulated machine stopped early: " + " | ".join(log))
    return text
