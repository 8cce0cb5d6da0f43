"""The configuration's schema, what makes one valid, and the run directory that follows from it.

Hydra composes ``conf/`` into these dataclasses, so a misspelt key or a value of the wrong type fails at launch. This
module imports neither torch nor W&B: ``train.py --help`` must answer at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import CompactHydraException
from omegaconf import MISSING, OmegaConf


class ConfigError(CompactHydraException):
    """What the user asked for cannot be done; Hydra prints the sentence without a traceback."""


@dataclass
class DatasetConfig:
    name: str = MISSING  # digits, cifar10, cifar100 or imagenet (any ImageFolder tree)
    root: str = "data"  # folder that holds (or receives) the data set
    download: bool = True  # fetch what is missing, where the data set allows it
    image_size: int | None = None  # pixels a side; null: the data set's own
    validation: float = 0.0  # fraction of the training images held out and evaluated instead of the test set
    augment: bool = True  # random crops and flips
    workers: int = 0  # decoding processes per rank, for data sets that are streamed


@dataclass
class ModelConfig:
    name: str = MISSING  # resnet20, mobilenet_v1, densenet40_24, or any torchvision or timm name
    pretrained: bool = False  # start from the published weights (torchvision, timm)
    weights: str | None = None  # start from the dense weights in this file (.safetensors, .pt)
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the model


@dataclass
class MethodConfig:
    name: str = MISSING
    p: float | None = None  # order of the thresholding operator, in [1, inf]
    theta: Any = None  # scale of pruned weights' gradients, in [0, 1], or auto
    include: list[str] | None = None  # patterns of weights to prune; null: every Conv, Linear and MultiheadAttention
    exclude: list[str] = field(default_factory=list)  # patterns of weights to leave dense


@dataclass
class FrameworkConfig:
    name: str = MISSING  # where thresholds come from; auto: what the method's paper uses
    options: dict[str, Any] = field(default_factory=dict)  # choices that the framework leaves open


@dataclass
class SparsityScheduleConfig:
    name: str = MISSING
    start_fraction: float = 0.0  # of all optimizer steps
    end_fraction: float = 0.5


@dataclass
class OptimizerConfig:
    name: str = MISSING
    lr: float = MISSING
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4  # on weights only; biases and normalisation layers have none


@dataclass
class LRScheduleConfig:
    name: str = MISSING
    warmup_epochs: float = 0.0
    authors_lag: bool = False  # the authors' scheduler steps late: the first two steps share one learning rate


@dataclass
class TrainerConfig:
    epochs: int = MISSING
    batch_size: int = MISSING  # images per optimizer step, over all processes
    eval_batch_size: int = 500
    accumulate: int = 1  # micro batches per optimizer step
    clip_grad_norm: float | None = 3.0
    label_smoothing: float = 0.0
    precision: str = "auto"  # auto, fp32, bf16, fp16
    compile: bool = False
    capture: bool = False  # record whole training steps as CUDA graphs and replay them
    channels_last: bool = True
    device: str = "auto"  # auto, cpu, cuda
    deterministic: bool = False
    nonfinite: str = "raise"  # raise, skip or rollback: what follows a loss or gradient that is not finite
    max_steps: int | None = None  # stop the whole run, schedules included, after so many optimizer steps
    log_every: int = 50  # steps between two records in metrics.jsonl; every epoch has one anyhow
    checkpoint_every: int = 1  # epochs
    progress: bool = True


@dataclass
class LoggerConfig:
    name: str = MISSING  # wandb, wandb_offline, none
    project: str = "feather"


@dataclass
class Config:
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    framework: FrameworkConfig = field(default_factory=FrameworkConfig)
    modifier: str = "none"  # none or ham, which combines with any method
    modifier_options: dict[str, Any] = field(default_factory=dict)  # its alpha, beta; of no meaning without one
    sparsity_schedule: SparsityScheduleConfig = field(default_factory=SparsityScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    sparsity: float = 0.9  # fraction of prunable weights that are zero at the end; 0 trains the dense network
    seed: int = 0
    experiment_name: str = "default"  # groups runs in runs/, in W&B and in tables
    scale: str = "full"  # full or proxy, the experiment shrunk to a CPU (conf/scale)
    label: str = ""  # shown beside the results, such as "shortened: 8 of 160 epochs"
    run_dir: str | None = None  # null: derived from the configuration
    overwrite: bool = False  # start anew in a run directory that is in use
    time_limit_minutes: float | None = None  # save and stop cleanly after so long


def register_schema(arguments: Sequence[str] | None = None) -> None:
    """Make the schema known to Hydra; ``arguments`` is the command line, ``sys.argv[1:]`` by default."""
    store = ConfigStore.instance()
    schema = OmegaConf.structured(Config)
    OmegaConf.set_struct(schema.model.options, False)  # each network has its own: model.options.width=16
    OmegaConf.set_struct(schema.framework.options, False)
    OmegaConf.set_struct(schema.modifier_options, False)
    store.store(name="schema", node=schema)
    for arg in sys.argv[1:] if arguments is None else arguments:
        # every torchvision and timm name is a choice of the model group, without a file of its own
        if arg.startswith("model="):
            for name in arg.removeprefix("model=").split(","):
                if name and not (Path(__file__).parents[1] / "conf" / "model" / f"{name}.yaml").exists():
                    store.store(group="model", name=name, node={"name": name})


# Where and how a run is executed, not what it computes; what a scale changes is in the hash by itself.
NOT_HASHED = {
    "run_dir", "overwrite", "time_limit_minutes", "logger", "label", "scale",
    "dataset.root", "dataset.download", "dataset.workers",
    "trainer.device", "trainer.progress", "trainer.log_every", "trainer.checkpoint_every", "trainer.eval_batch_size",
}  # fmt: skip


def config_hash(cfg: Config) -> str:
    """Eight hex digits that two configurations share exactly when they describe the same computation."""
    plain = asdict(cfg)
    for key in NOT_HASHED:
        *path, last = key.split(".")
        node: Any = plain
        for part in path:
            node = node[part]
        node.pop(last)
    if plain["modifier"] == "none":  # younger than the first runs, which keep their directories
        del plain["modifier"], plain["modifier_options"]
    if not plain["framework"]["options"]:
        plain["framework"].pop("options")  # younger too
    if plain["trainer"]["nonfinite"] == "raise":
        del plain["trainer"]["nonfinite"]  # younger too
    if not plain["trainer"]["capture"]:
        del plain["trainer"]["capture"]  # younger too
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]


def run_directory(cfg: Config) -> Path:
    """``runs/<experiment>/<model>-<dataset>-<method>-<sparsity>-<seed>-<hash>``, or ``run_dir`` where it is set."""
    if cfg.run_dir is not None:
        return Path(cfg.run_dir)
    parts = (cfg.model.name, cfg.dataset.name, cfg.method.name, f"{cfg.sparsity:g}", str(cfg.seed), config_hash(cfg))
    return Path("runs") / cfg.experiment_name / "-".join(part.replace("/", "_") for part in parts)


def prepare(cfg: Any) -> Config:
    """The composed configuration as typed objects, checked and in canonical form.

    Raises:
        ConfigError: a value is out of range or a combination is inconsistent.
    """
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        raise ConfigError(
            f"The configuration has no value for {', '.join(sorted(missing))}: set it on the command line."
        )
    unknown = _unknown(OmegaConf.to_container(cfg), _schema())
    if unknown:
        raise ConfigError(f"{unknown} is not an option, although a plus sign adds it: see --cfg job for all.")
    config: Config = OmegaConf.to_object(cfg)
    for key, text in _strings(asdict(config)):
        if not text.isprintable():
            raise ConfigError(f"{key}={text!r} holds a character that cannot be printed: leave it out.")
    _validate(config)
    if config.scale == "proxy" and not config.experiment_name.endswith("_proxy"):
        config.experiment_name += "_proxy"  # never in one table, W&B group or directory with runs at full scale
    if config.modifier == "none":  # what a recipe would give one
        config.modifier_options = {}
    if config.sparsity == 0:  # one dense run, whatever method it was asked through
        config.method = MethodConfig(name="dense")
        config.framework = FrameworkConfig(name="auto")
        config.sparsity_schedule = SparsityScheduleConfig(name="cubic")
    return config


@cache
def _schema() -> Any:
    return OmegaConf.to_container(OmegaConf.structured(Config))


def _validate(cfg: Config) -> None:
    def require(condition: bool, key: str, value: object, allowed: str) -> None:
        if not condition:
            raise ConfigError(f"{key}={value} is out of range: it must be {allowed}.")

    trainer, optimizer, schedule = cfg.trainer, cfg.optimizer, cfg.sparsity_schedule
    require(cfg.scale in ("full", "proxy"), "scale", cfg.scale, "full or proxy")
    if cfg.scale == "proxy" and (cfg.dataset.name, cfg.model.name) != ("cifar100", "resnet20"):
        raise ConfigError(
            f"scale=proxy is ResNet-20 on CIFAR-100, not {cfg.model.name} on {cfg.dataset.name}: "
            "add dataset=cifar100 model=resnet20, or leave scale out."
        )
    if cfg.method.name == "dense" and cfg.sparsity != 0:
        raise ConfigError(f"method=dense prunes nothing, but sparsity={cfg.sparsity:g}: leave one of them out.")
    name = PurePosixPath(cfg.experiment_name)
    inside = bool(cfg.experiment_name.strip("./ ")) and not name.is_absolute() and ".." not in name.parts
    require(inside, "experiment_name", cfg.experiment_name, "a name, which becomes a folder in runs/")
    require(0 <= cfg.sparsity < 1, "sparsity", cfg.sparsity, "in [0, 1), the fraction of weights that are zero")
    require(0 <= cfg.seed < 2**32, "seed", cfg.seed, "an integer in [0, 2^32)")
    require(trainer.epochs >= 1, "trainer.epochs", trainer.epochs, "at least 1")
    require(trainer.batch_size >= 1, "trainer.batch_size", trainer.batch_size, "at least 1")
    require(trainer.eval_batch_size >= 1, "trainer.eval_batch_size", trainer.eval_batch_size, "at least 1")
    require(
        1 <= trainer.accumulate <= trainer.batch_size, "trainer.accumulate", trainer.accumulate, "in [1, batch_size]"
    )
    require(trainer.max_steps is None or trainer.max_steps >= 1, "trainer.max_steps", trainer.max_steps, "at least 1")
    require(trainer.log_every >= 1, "trainer.log_every", trainer.log_every, "at least 1")
    require(trainer.checkpoint_every >= 1, "trainer.checkpoint_every", trainer.checkpoint_every, "at least 1")
    require(0 <= trainer.label_smoothing < 1, "trainer.label_smoothing", trainer.label_smoothing, "in [0, 1)")
    clip = trainer.clip_grad_norm
    require(clip is None or clip > 0, "trainer.clip_grad_norm", clip, "greater than 0, or null")
    for key, value, choices in (
        ("trainer.precision", trainer.precision, ("auto", "fp32", "bf16", "fp16")),
        ("trainer.device", trainer.device, ("auto", "cpu", "cuda")),
        ("trainer.nonfinite", trainer.nonfinite, ("raise", "skip", "rollback")),
        ("optimizer.name", optimizer.name, ("sgd", "adamw")),
        ("modifier", cfg.modifier, ("none", "ham")),
        ("lr_schedule.name", cfg.lr_schedule.name, ("cosine", "constant")),
        ("logger.name", cfg.logger.name, ("wandb", "wandb_offline", "none")),
    ):
        require(value in choices, key, value, f"one of {', '.join(choices)}")
    require(_finite(optimizer.lr) and optimizer.lr > 0, "optimizer.lr", optimizer.lr, "greater than 0")
    require(0 <= optimizer.momentum < 1, "optimizer.momentum", optimizer.momentum, "in [0, 1)")
    require(_finite(optimizer.weight_decay) and optimizer.weight_decay >= 0, "optimizer.weight_decay",
            optimizer.weight_decay, "at least 0")  # fmt: skip
    require(
        cfg.lr_schedule.warmup_epochs >= 0, "lr_schedule.warmup_epochs", cfg.lr_schedule.warmup_epochs, "at least 0"
    )
    require(0 <= cfg.dataset.validation < 1, "dataset.validation", cfg.dataset.validation, "in [0, 1)")
    require(cfg.dataset.workers >= 0, "dataset.workers", cfg.dataset.workers, "at least 0")
    size = cfg.dataset.image_size
    require(size is None or size >= 1, "dataset.image_size", size, "at least 1 pixel, or null")
    fractions = (schedule.start_fraction, schedule.end_fraction)
    require(0 <= schedule.start_fraction <= 1, "sparsity_schedule.start_fraction", fractions[0], "in [0, 1]")
    require(fractions[0] <= fractions[1] <= 1, "sparsity_schedule.end_fraction", fractions[1], "in [start_fraction, 1]")
    limit = cfg.time_limit_minutes
    require(limit is None or limit > 0, "time_limit_minutes", limit, "greater than 0, or null")
    if cfg.model.pretrained and cfg.model.weights is not None:
        raise ConfigError("model.pretrained=true and model.weights both say where to start from: set one of them.")
    if trainer.capture and trainer.nonfinite == "skip":
        raise ConfigError(
            "trainer.nonfinite=skip looks at the gradients before they are used, which trainer.capture=true cannot: "
            "choose trainer.nonfinite=raise or rollback, or leave capture out."
        )
    if optimizer.nesterov and optimizer.momentum == 0:
        raise ConfigError("optimizer.nesterov=true needs optimizer.momentum greater than 0.")
    theta = cfg.method.theta
    if theta is not None and theta != "auto":
        number = isinstance(theta, (int, float)) and not isinstance(theta, bool)
        require(number and 0 <= theta <= 1, "method.theta", theta, "a number in [0, 1] or auto")
        cfg.method.theta = float(theta)  # 1 and 1.0 are one configuration
    require(cfg.method.p is None or cfg.method.p >= 1, "method.p", cfg.method.p, "a number in [1, inf]")


def _strings(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every string in the configuration, keys of open dicts included, with the path that leads to it."""
    if isinstance(node, str):
        yield prefix, node
    elif isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            path = f"{prefix}.{key}" if prefix else str(key)
            yield from _strings(str(key), path)
            yield from _strings(value, path)


def _unknown(given: dict[str, Any], schema: dict[str, Any], prefix: str = "") -> str | None:
    """The first key of ``given`` that the schema lacks; the schema's empty dicts may hold anything."""
    for key, value in given.items():
        if key not in schema:
            return prefix + key
        inner = schema[key]
        if isinstance(inner, dict) and inner and (found := _unknown(value, inner, f"{prefix}{key}.")):
            return found
    return None


def _finite(value: float) -> bool:
    return math.isfinite(value)
