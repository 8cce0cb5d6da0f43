import io

from engine.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, enabled: bool = True) -> str:
    with Progress(200, done_images=100, description="resnet", enabled=enabled, stream=stream) as progress:
        for _ in range(10):
            progress.update(10)
            progress.show(loss=1.25)
        progress.end_epoch(2, 2, {"loss": 1.25, "accuracy": 0.5, "sparsity": 0.98})
    return stream.getvalue()


def test_a_log_file_gets_one_line_per_epoch() -> None:
    text = run(io.StringIO())
    assert text.count("\n") == 1
    assert text.startswith("resnet: epoch 2/2, loss 1.25, accuracy 0.5, sparsity 0.98, ")
    assert "images/s, 00:00 left" in text


def test_a_terminal_gets_a_bar_with_rate_and_figures() -> None:
    text = run(Terminal())
    assert "100%" in text
    assert "images/s" in text
    assert "loss 1.25, accuracy 0.5, sparsity 0.98" in text


def test_other_processes_are_silent() -> None:
    assert run(io.StringIO(), enabled=False) == ""
    assert run(Terminal(), enabled=False) == ""
