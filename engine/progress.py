"""What a person sees while a run trains: a bar on a terminal, one line per epoch in a log file."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm


class Progress:
    """Progress of one run, counted in images. Use it as a context manager.

    On a terminal it is a bar with images/s, the time left and the figures of ``show``. Elsewhere (CI, a file) it is one
    line per epoch. Everything goes to standard error.

    Args:
        total_images: images of the whole run (epochs x images per epoch).
        done_images: images trained on before, by the run that this one resumes.
        description: the run's short name.
        enabled: False in all processes but the main one; nothing is printed then.
        stream: where to write, standard error by default.
    """

    def __init__(
        self,
        total_images: int,
        *,
        done_images: int = 0,
        description: str = "",
        enabled: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._enabled = enabled
        self._description = description
        self._total = total_images
        self._done = done_images
        self._initial = done_images
        self._started = time.monotonic()
        self._bar: Any = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=total_images,
                initial=done_images,
                desc=description,
                unit=" images",
                unit_scale=True,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}% |{bar:16}| {rate_fmt}, {remaining} left{postfix}",
                mininterval=0.2,
                file=self._stream,
            )

    def update(self, images: int) -> None:
        """Count one step's images; cheap enough for every step, reads nothing from the device."""
        self._done += images
        if self._bar is not None:
            self._bar.update(images)

    def show(self, **figures: float) -> None:
        """Show figures (``loss=``, ``accuracy=``, ``sparsity=``) beside the bar; nothing where there is no bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(_join(figures), refresh=False)

    def end_epoch(self, epoch: int, epochs: int, figures: Mapping[str, float]) -> None:
        """Show an epoch's figures: beside the bar, or as a line where there is no terminal."""
        if self._bar is not None:
            self._bar.set_postfix_str(_join(figures))
        elif self._enabled:
            rate = (self._done - self._initial) / max(time.monotonic() - self._started, 1e-9)
            left = (self._total - self._done) / rate if rate else 0.0
            head = f"{self._description}: " if self._description else ""
            speed = f"{rate:.0f} images/s, {tqdm.format_interval(left)} left"
            print(f"{head}epoch {epoch}/{epochs}, {_join(figures)}, {speed}", file=self._stream, flush=True)

    def close(self) -> None:
        """Finish the bar's line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _join(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
