"""A fused graph as a .tflite file, by TensorFlow's converter.

    python scripts/deploy/tflite.py GRAPH.npz FILE.tflite [--sparse]

TensorFlow and torch seldom agree on their dependencies, so this runs under a Python that has TensorFlow alone; the
graph arrives as `dump` wrote it. Maps are laid out as TensorFlow likes them, channels last; the input is not.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np


def dump(graph, path):
    """Write a `feather.deploy.graph.Graph`, for `main` under another Python."""
    from dataclasses import asdict

    arrays, ops = {}, []
    for op in graph.ops:
        fields = asdict(op)
        for key, value in list(fields.items()):
            if isinstance(value, np.ndarray):
                arrays[f"{len(ops)}.{key}"] = value
                del fields[key]
        ops.append({"kind": type(op).__name__, **fields})
    text = json.dumps({"input": graph.input, "output": graph.output, "shapes": graph.shapes, "ops": ops})
    np.savez(path, graph=np.array(text), **arrays)


def build(content):
    """The graph as a function of one image."""
    import tensorflow as tf

    graph = json.loads(str(content["graph"]))

    def activate(x, activation):
        if activation is None:
            return x
        if activation["kind"] == "hardswish":
            return x * tf.nn.relu6(x + 3) / 6
        low, high = activation["low"], activation["high"]
        if (low, high) == (0, 6):
            return tf.nn.relu6(x)
        return tf.nn.relu(x) if (low, high) == (0, float("inf")) else tf.clip_by_value(x, low, high)

    def padded(x, window, out, value=0.0):
        """Explicit padding in front, and behind as far as the last window reaches."""
        pads = [[0, 0]]
        for i in range(2):
            reach = (out[i] - 1) * window["stride"][i] + window["dilation"][i] * (window["kernel"][i] - 1) + 1
            front = window["padding"][i]
            pads.append([front, max(0, reach - x.shape[1 + i] - front)])
        return tf.pad(x, [*pads, [0, 0]], constant_values=value) if np.any(pads) else x

    def run(image):
        values = {graph["input"]: tf.transpose(image, (0, 2, 3, 1))}
        for i, op in enumerate(graph["ops"]):
            x, array = values[op["inputs"][0]], {k.split(".")[1]: content[k] for k in content if k.startswith(f"{i}.")}
            out, window = graph["shapes"][op["output"]][1:], op.get("window")
            if op["kind"] == "Conv":
                weight, groups = array["weight"].transpose(2, 3, 1, 0), op["groups"]
                around = zip(window["stride"], window["padding"], window["kernel"], strict=True)
                same = all(s == 1 and 2 * p == k - 1 for s, p, k in around)
                x, padding = (x, "SAME") if same else (padded(x, window, out), "VALID")
                if groups == x.shape[3] and weight.shape[2] == 1:
                    weight = array["weight"].transpose(2, 3, 0, 1)
                    x = tf.nn.depthwise_conv2d(x, weight, (1, *window["stride"], 1), padding)
                else:
                    x = tf.nn.conv2d(x, weight, window["stride"], padding, dilations=window["dilation"])
                x = x + array["bias"]
            elif op["kind"] == "Linear":
                x = tf.matmul(x, array["weight"], transpose_b=True) + array["bias"]
            elif op["kind"] == "Pointwise":
                x = x * array["scale"] + array["shift"]
                x = x + values[op["inputs"][1]] if len(op["inputs"]) > 1 else x
            elif op["kind"] == "MaxPool":
                x = padded(x, window, out, -3e38)
                x = tf.nn.max_pool2d(x, window["kernel"], window["stride"], "VALID")
            elif op["kind"] == "AvgPool":
                area = np.prod(window["kernel"])
                x = tf.nn.avg_pool2d(padded(x, window, out), window["kernel"], window["stride"], "VALID")
                if not (array["divisors"] == area).all():
                    x = x * (area / array["divisors"])[None, :, :, None].astype(np.float32)
            elif op["kind"] == "GlobalAvg":
                x = tf.reduce_mean(x, (1, 2))
            elif op["kind"] == "Concat":
                x = tf.concat([values[name] for name in op["inputs"]], 3)
            elif op["kind"] == "Flatten":
                x = tf.reshape(tf.transpose(x, (0, 3, 1, 2)), (1, -1))
            elif op["kind"] == "Softmax":
                x = tf.nn.softmax(x)
            if op.get("residual"):
                x = x + values[op["residual"]]
            values[op["output"]] = activate(x, op.get("activation"))
        return values[graph["output"]]

    shape = (1, *graph["shapes"][graph["input"]])
    return tf.function(run, input_signature=[tf.TensorSpec(shape, tf.float32)]).get_concrete_function()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("graph", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--sparse", action="store_true", help="keep the non-zeros alone, where the format can")
    args = parser.parse_args()
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_concrete_functions([build(np.load(args.graph))])
    if args.sparse:
        converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
    args.file.write_bytes(converter.convert())
    return 0


if __name__ == "__main__":
    sys.exit(main())
