"""Command line of feather.deploy.

feather compile MODEL          C code and a library of a trained network; for the target wasm a web page
feather export MODEL           its weights as safetensors, as a compressed sparse file, as ONNX, or as C
feather classify LIBRARY IMAGE what a compiled network sees in an image

Exit status: 0; 2 with one sentence where something cannot be done.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from feather.deploy.errors import DeployError

FORMATS = ("safetensors", "bitmask", "onnx", "c")
SUFFIXES = {"safetensors": ".safetensors", "bitmask": ".feather", "onnx": ".onnx", "c": ".c"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except DeployError as error:
        print(f"feather: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # reading names its file itself
        reason = error.strerror or type(error).__name__
        print(f"feather: {error.filename} cannot be written ({reason}): name another with -o", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage of all options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"feather: {message}; {self.prog} --help lists what is right\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("feather", description="Trained sparse networks as C and as small files.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    compiling = commands.add_parser("compile", help="C code and a library of a trained network")
    _model_arguments(compiling)
    _c_arguments(compiling)
    compiling.add_argument("-o", "--output", type=Path, default=Path("."), help="directory (default: .)")
    compiling.add_argument("--threads", type=_count, default=1, help="OpenMP threads of the library (default: 1)")
    compiling.add_argument("--no-library", action="store_true", help="write the C file and its header alone")
    compiling.add_argument("--labels", type=Path, help="wasm: text file with the name of a class in each line")
    compiling.add_argument("--cc", help="C compiler (default: $CC, else cc, gcc or clang)")
    compiling.set_defaults(run=_compile)

    exporting = commands.add_parser("export", help="weights as a file")
    _model_arguments(exporting)
    _c_arguments(exporting)
    exporting.add_argument("--format", choices=FORMATS, required=True)
    exporting.add_argument("-o", "--output", type=Path, help="file (default: the model's name)")
    exporting.add_argument("--values", choices=("fp32", "fp16", "int8"), default="fp32", help="bitmask: of non-zeros")
    exporting.set_defaults(run=_export)

    classifying = commands.add_parser("classify", help="what a compiled network sees in images")
    classifying.add_argument("library", type=Path, help="what feather compile built (.so)")
    classifying.add_argument("images", type=Path, nargs="+", help="image files of any format that Pillow reads")
    classifying.add_argument("--labels", type=Path, help="text file with the name of a class in each line")
    classifying.add_argument("--top", type=_count, default=5, help="classes to show (default: 5)")
    classifying.set_defaults(run=_classify)
    return parser


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="MODEL", type=Path, help="run directory, file of weights, or .pt2 program")
    parser.add_argument("--model", help="network, such as resnet20 (default: the run's)")
    parser.add_argument("--num-classes", type=_count, help="classes of the network (default: the data set's)")
    parser.add_argument("--shape", type=_shape, help="of one input, such as 3,32,32 (default: the data set's)")
    parser.add_argument(
        "--option", action="append", default=[], type=_option, metavar="KEY=VALUE", help="of the network, as width=16"
    )


def _c_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="prefix of the C functions (default: the network's name)")
    parser.add_argument("--target", default="native", help="native, avx512, avx2, neon, wasm or c (default: native)")
    parser.add_argument("--weights", choices=("fp32", "int8"), default="fp32", help="of the C code (default: fp32)")
    parser.add_argument("--batch", type=_count, default=1, help="images per call (default: 1)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count: expected at least 1")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(_count(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: expected numbers such as 3,32,32") from None


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no option: expected KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _open(options: argparse.Namespace) -> Any:
    # Imported late: the parser's messages should not wait for torch.
    from feather.deploy.sources import open_model

    return open_model(
        options.path,
        model=options.model,
        num_classes=options.num_classes,
        shape=options.shape,
        options=dict(options.option),
    )


def _identifier(text: str) -> str:
    name = re.sub(r"\W", "_", text)
    return f"_{name}" if name[:1].isdigit() else name


def _compile(options: argparse.Namespace) -> None:
    from feather.deploy.compiler import compile_model

    subject = _open(options)
    done = compile_model(
        subject.model,
        subject.input_shape,
        options.output,
        name=options.name or _identifier(subject.name),
        target=options.target,
        batch=options.batch,
        threads=options.threads,
        library=not options.no_library,
        compiler=options.cc,
        weights=options.weights,
        normalization=subject.normalization,
    )
    written = [done.c, done.header, done.library]
    if done.library is not None and done.library.suffix == ".wasm":
        from feather.deploy.web import write_page

        written.append(write_page(done.library, done.info, _labels(options.labels)))
    for path in written:
        if path is not None:
            print(f"{path}  {path.stat().st_size:,} bytes")
    info = done.info
    print(f"target {info['target']}, batch {info['batch']}, workspace {info['workspace_bytes']:,} bytes")
    print(f"{info['nonzeros']:,} of {info['weights']:,} weights are not zero: {info['macs']:,} products per image")


def _export(options: argparse.Namespace) -> None:
    from torch.export import ExportedProgram

    subject = _open(options)
    path = options.output or Path(_identifier(subject.name) + SUFFIXES[options.format])
    model = subject.model
    tensors = model.state_dict if isinstance(model, ExportedProgram) else model.state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    if options.format == "safetensors":
        _save_safetensors(tensors, path)
    elif options.format == "bitmask":
        from feather.deploy import sparse_file

        print(sparse_file.save(tensors, path, values=options.values))
    elif options.format == "onnx":
        _save_onnx(subject, path)
    else:
        from feather.deploy.compiler import compile_model

        name = options.name or _identifier(path.stem)
        if path.name != f"{name}.c":
            raise DeployError(f"{path.name} is not {name}.c: C files are called by their prefix, change one of them")
        compile_model(
            model, subject.input_shape, path.parent, name=name, target=options.target, batch=options.batch,
            library=False, weights=options.weights, normalization=subject.normalization,
        )  # fmt: skip
    print(f"{path}  {path.stat().st_size:,} bytes")


def _save_safetensors(tensors: dict[str, Any], path: Path) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise DeployError("Writing safetensors needs the package safetensors: install it") from None
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path)


def _save_onnx(subject: Any, path: Path) -> None:
    from feather.deploy import onnx_file
    from feather.deploy.capture import capture
    from feather.deploy.fuse import fuse

    onnx_file.save(fuse(capture(subject.model, subject.input_shape)), path)
    weights = [array for array in onnx_file.weights(path).values() if array.ndim in (2, 4)]
    total, zeros = sum(w.size for w in weights), sum(int((w == 0).sum()) for w in weights)
    print(f"counted in the file: {zeros:,} of {total:,} weights are zero ({100 * zeros / max(total, 1):.2f} %)")


def _labels(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise DeployError(f"{path} cannot be read: give a text file with the name of a class in each line") from None


def _classify(options: argparse.Namespace) -> None:
    import numpy as np

    from feather.deploy.runtime import load

    try:
        from PIL import Image
    except ImportError:
        raise DeployError("Reading images needs the package pillow: install it") from None
    model = load(options.library)
    if len(model.input_shape) != 3 or model.input_shape[0] not in (1, 3) or len(model.output_shape) != 1:
        raise DeployError(f"{options.library} is no classifier of images: it maps {model.input_shape}")
    channels, height, width = model.input_shape
    labels = _labels(options.labels)
    mean, std = (np.asarray(model.info.get(key, default)) for key, default in (("mean", [0.0]), ("std", [1.0])))
    for path in options.images:
        try:
            image = Image.open(path).convert("RGB" if channels == 3 else "L")
        except OSError as error:
            reason = error.strerror or "of no format that Pillow knows"
            raise DeployError(f"{path} is no readable image ({reason})") from None
        factor = max(height / image.height, width / image.width)
        size = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32).reshape(height, width, -1)
        scores = model(((pixels / 255 - mean) / std).transpose(2, 0, 1)[None])[0].astype(np.float64)
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        print(path)
        for i in np.argsort(-shares)[: options.top]:
            print(f"  {100 * shares[i]:6.2f} %  {labels[i] if i < len(labels) else f'class {i}'}")
