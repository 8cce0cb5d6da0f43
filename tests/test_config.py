"""The schema holds every key, every choice composes, and the run directory follows from the configuration alone."""

import pytest

from engine import config
from engine.cli import _keys
from engine.config import Config, ConfigError
from tests.train_helpers import CONF, compose, directory

CHOICES = [
    f"{group.name}={choice.stem}"
    for group in sorted(CONF.iterdir())
    if group.is_dir() and group.name != "sweep"  # of W&B, not of Hydra
    for choice in sorted(group.glob("*.yaml"))
]


def test_the_schema_and_the_composed_configuration_have_the_same_keys() -> None:
    def keys(node, prefix=""):
        for key, value in node.items():
            yield prefix + key
            if hasattr(value, "items"):
                yield from keys(value, f"{prefix}{key}.")

    assert sorted(keys(compose())) == sorted(_keys(Config))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_every_group_is_a_valid_configuration(choice: str) -> None:
    cfg = config.prepare(compose(choice, *(["dataset=cifar100"] if choice == "scale=proxy" else [])))
    group, _, name = choice.partition("=")
    found = getattr(cfg, group, None)
    assert found is None or group in ("trainer", "method") or getattr(found, "name", found) == name


@pytest.mark.parametrize(
    "same",
    [
        "logger=wandb", "trainer.device=auto", "dataset.root=elsewhere", "dataset.workers=3", "dataset.download=false",
        "overwrite=true", "time_limit_minutes=5", "label=text", "trainer.log_every=1", "trainer.progress=false",
        "trainer.checkpoint_every=2", "trainer.eval_batch_size=7", "method.p=3.0",
    ],
)  # fmt: skip
def test_where_and_how_a_run_is_executed_does_not_change_its_directory(same: str) -> None:
    assert directory(same) == directory()


@pytest.mark.parametrize(
    "other",
    [
        "seed=1", "sparsity=0.95", "optimizer.lr=0.2", "method.theta=0.5", "method=gmp", "model.options.width=8",
        "trainer.batch_size=64", "trainer.precision=bf16", "trainer=deterministic", "lr_schedule.authors_lag=true",
        "sparsity_schedule=linear", "dataset.validation=0.1", "trainer.max_steps=3", "method.include=[layer1*]",
        "framework.options.gradient=hard", "modifier=ham",
    ],
)  # fmt: skip
def test_what_a_run_computes_changes_its_directory(other: str) -> None:
    assert directory(other) != directory()


def test_the_directory_tells_what_the_run_is() -> None:
    assert directory("sparsity=0.95", "seed=7", "run_dir=here").as_posix() == "here"
    path = directory("sparsity=0.95", "seed=7", "experiment_name=table")
    assert path.parent.as_posix() == "runs/table"
    assert path.name.rpartition("-")[0] == "resnet20-digits-feather-0.95-7"


@pytest.mark.parametrize("method", ["method=feather", "method=dense", "method=gmp", "method.p=1"])
def test_sparsity_0_is_one_dense_run_whatever_the_method(method: str) -> None:
    assert directory(method, "sparsity=0", "sparsity_schedule=linear") == directory("method=dense", "sparsity=0")
    assert "-dense-0-" in directory(method, "sparsity=0.0").name


def test_equal_numbers_are_one_configuration() -> None:
    assert directory("method.theta=1") == directory("method.theta=1.0")


def test_the_recipe_goes_with_the_data_set_and_gives_way_to_what_is_typed() -> None:
    cifar = config.prepare(compose("dataset=cifar100"))
    assert (cifar.trainer.epochs, cifar.trainer.batch_size, cifar.trainer.precision) == (160, 128, "fp32")
    assert (cifar.optimizer.lr, cifar.optimizer.momentum, cifar.optimizer.nesterov) == (0.1, 0.9, False)
    assert (cifar.optimizer.weight_decay, cifar.trainer.clip_grad_norm) == (5e-4, 3.0)
    assert (cifar.sparsity_schedule.start_fraction, cifar.sparsity_schedule.end_fraction) == (0.0, 0.5)
    imagenet = config.prepare(compose("experiment=imagenet_resnet50", "trainer.epochs=3"))
    assert (imagenet.trainer.epochs, imagenet.lr_schedule.warmup_epochs) == (3, 5)
    assert "inferred" in imagenet.label


def test_another_optimizer_keeps_its_own_learning_rate() -> None:
    for dataset in ("digits", "cifar100", "imagenet"):
        adamw = config.prepare(compose(f"dataset={dataset}", "optimizer=adamw")).optimizer
        assert (adamw.lr, adamw.weight_decay) == (1e-3, 0.05)


def test_a_network_without_a_file_of_its_own_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "model=resnet18,vit_tiny_patch16_224"])
    config.register_schema()
    for name in ("resnet18", "vit_tiny_patch16_224", "resnet20"):
        assert config.prepare(compose(f"model={name}")).model.name == name


def test_dense_with_a_sparsity_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method=dense prunes nothing, but sparsity=0\.9: leave one of them out\."):
        config.prepare(compose("method=dense", "sparsity=0.9"))


def test_proxy_scale_shrinks_an_experiment_and_keeps_it_apart() -> None:
    cfg = config.prepare(compose("experiment=cifar100_table", "scale=proxy", "sparsity=0.98"))
    assert (cfg.dataset.image_size, cfg.model.options["width"], cfg.trainer.epochs) == (16, 16, 10)
    assert cfg.experiment_name == "cifar100_table_proxy"
    assert cfg.label == "proxy: 16x16 images, ResNet-20 of width 16, 10 epochs, bf16"
    changed = config.prepare(compose("scale=proxy", "dataset=cifar100", "trainer.precision=fp32", "trainer.epochs=30"))
    assert changed.label.endswith("30 epochs, fp32")
    assert config.prepare(compose("experiment=cifar100_table")).experiment_name == "cifar100_table"
    assert config.prepare(compose("experiment=cifar100_table", "scale=proxy", "trainer.epochs=30")).trainer.epochs == 30


@pytest.mark.parametrize("other", [["dataset=digits"], ["dataset=cifar100", "model=mobilenet_v1"]])
def test_proxy_scale_has_one_network_and_data_set(other: list[str]) -> None:
    with pytest.raises(ConfigError, match="scale=proxy is ResNet-20 on CIFAR-100"):
        config.prepare(compose("scale=proxy", *other))


def test_directories_of_earlier_versions_stay() -> None:
    """Their runs would start anew otherwise."""
    assert directory("dataset.image_size=null").name == "resnet20-digits-feather-0.6-0-ad2f50db"


def test_a_recipe_has_hams_beta_for_its_data_set() -> None:
    assert config.prepare(compose("dataset=cifar100", "modifier=ham")).modifier_options == {"beta": 0.016}
    assert config.prepare(compose("dataset=cifar100")).modifier_options == {}
    other = directory("dataset=cifar100", "modifier=ham", "modifier_options.beta=0.01")
    assert other != directory("dataset=cifar100", "modifier=ham")
