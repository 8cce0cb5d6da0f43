"""The page that `feather compile --target wasm` writes, opened in a real Chromium."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from feather.deploy import DeployError, compile_model
from feather.deploy.web import write_page
from models import create_model
from tests.deploy.tools import digits, reference, settle, sparsify

NORMALIZATION = ((0.3058,) * 3, (0.3190,) * 3)
LABELS = ["</script>zero", *["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]]


def needs_wasm() -> None:
    for tool in ("clang", "wasm-ld"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed (Debian: apt-get install clang lld)")


def network() -> tuple[nn.Module, Tensor]:
    """A sparse network, and one picture of its size as bytes, ``(16, 16, 3)``."""
    torch.manual_seed(0)
    images = digits(8, 16)
    model = settle(sparsify(create_model("resnet20", num_classes=10, width=4), 0.9), images)
    return model, ((images[3] * 0.3190 + 0.3058) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


def test_the_page_classifies_a_picture(browser: Any, tmp_path: Path) -> None:
    needs_wasm()
    from PIL import Image
    from selenium.webdriver.support.ui import WebDriverWait

    model, pixels = network()
    done = compile_model(model, (3, 16, 16), tmp_path, target="wasm", normalization=NORMALIZATION)
    assert done.library is not None
    page = write_page(done.library, done.info, LABELS)
    Image.fromarray(pixels.numpy()).save(tmp_path / "digit.png")
    browser.get(page.as_uri())
    browser.find_element("id", "file").send_keys(str(tmp_path / "digit.png"))
    WebDriverWait(browser, 30).until(lambda page: page.find_element("id", "facts").text)

    scores = reference(model, ((pixels.permute(2, 0, 1) / 255 - 0.3058) / 0.3190)[None])[0]
    shares = torch.from_numpy(scores).softmax(0)
    rows = [row.text for row in browser.find_elements("css selector", "#classes tr")]
    assert rows == [f"{LABELS[i]} {100 * shares[i]:.2f} %" for i in shares.argsort(descending=True)[:5]]
    facts = browser.find_element("id", "facts").text
    assert re.match(r"\d+\.\d\d ms per image on one thread; network \d+ KiB, ", facts)
    assert f"{done.info['nonzeros']:,} of {done.info['weights']:,} weights" in facts

    (tmp_path / "text.png").write_text("no picture")
    browser.find_element("id", "file").send_keys(str(tmp_path / "text.png"))
    WebDriverWait(browser, 30).until(lambda page: page.find_element("id", "problem").text == "text.png is no picture")


def test_the_page_is_for_pictures(tmp_path: Path) -> None:
    info = {"name": "net", "title": "net", "input_shape": [8], "output_shape": [2], "batch": 1}
    with pytest.raises(DeployError, match="a page needs one picture"):
        write_page(tmp_path / "net.wasm", info)
