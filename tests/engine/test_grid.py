"""What an experiment declares beside what was run of it."""

from engine.config import Config, DatasetConfig, FrameworkConfig, MethodConfig, ModelConfig, OptimizerConfig
from engine.grid import experiment
from engine.results import find_runs, flatten, group_cells, read_runs, with_defaults
from tests.scripts.synthetic_runs import write_run


def planned(method="feather", sparsity=0.9, framework="auto", seed=0, lr=0.1):
    cfg = Config(
        dataset=DatasetConfig(name="cifar100"),
        model=ModelConfig(name="resnet20"),
        method=MethodConfig(name=method, p=3.0, theta="auto"),
        framework=FrameworkConfig(name=framework),
        optimizer=OptimizerConfig(name="sgd", lr=lr),
        sparsity=sparsity,
        seed=seed,
    )
    cfg.sparsity_schedule.name, cfg.lr_schedule.name, cfg.logger.name = "cubic", "cosine", "none"
    cfg.trainer.epochs, cfg.trainer.batch_size = 4, 128
    return [f"method={method}", f"sparsity={sparsity}"], cfg


def run(root, method="feather", sparsity=0.9, **settings):
    from dataclasses import asdict

    config = asdict(planned(method, sparsity)[1])
    config |= settings.pop("config", {}) | {"seed": settings.get("seed", 0), "framework": {"name": "global"}}
    write_run(root, method=method, sparsity=sparsity, config=config, **settings)


def put_together(root, jobs):
    runs, problems = read_runs(find_runs(root))
    assert not problems
    return experiment("table", group_cells(runs)[0], jobs, command="c", framework_of=lambda method: "global")


def test_a_declared_cell_is_not_run_until_any_seed_of_it_is(tmp_path):
    jobs = [planned(sparsity=s, seed=seed) for s in (0.9, 0.98) for seed in (0, 1)]
    run(tmp_path, sparsity=0.9, seed=5)
    found = put_together(tmp_path, jobs)
    (cell,), (missing,) = found.cells, found.not_run
    assert (cell.sparsity, missing.sparsity) == (0.9, 0.98)
    assert missing.setting == cell.setting  # one row of the table
    assert missing.command == "python train.py method=feather sparsity=0.98"
    assert found.declared == 2


def test_a_run_with_other_settings_does_not_stand_for_the_declared_one(tmp_path):
    run(tmp_path, config={"optimizer": {"name": "sgd", "lr": 0.5}})
    found = put_together(tmp_path, [planned()])
    (cell,), (missing,) = found.cells, found.not_run
    assert cell.setting != missing.setting
    assert "optimizer.lr=0.5" in cell.setting.options
    assert "optimizer.lr=0.1" in missing.setting.options


def test_a_schedule_is_named_shortly(tmp_path):
    jobs = [planned(), planned()]
    jobs[1][1].sparsity_schedule.name, jobs[1][1].sparsity_schedule.end_fraction = "linear", 0.25
    texts = {cell.setting.options for cell in put_together(tmp_path, jobs).not_run}
    assert texts == {"end_fraction=0.5, sparsity_schedule=cubic", "end_fraction=0.25, sparsity_schedule=linear"}


def test_the_framework_that_auto_stands_for_is_the_same_cell(tmp_path):
    run(tmp_path)
    assert put_together(tmp_path, [planned(framework="global")]).not_run == []
    assert len(put_together(tmp_path, [planned(framework="erk")]).not_run) == 1


def test_what_is_not_declared_is_shown_as_it_was_run(tmp_path):
    run(tmp_path)
    found = put_together(tmp_path, [])
    assert len(found.cells) == 1
    assert found.not_run == []


def test_evidence_older_than_a_key_has_its_default():
    old = with_defaults({"method": {"name": "feather"}, "seed": 3})
    assert old["modifier"] == "none"
    assert old["method.exclude"] == []
    assert old["seed"] == 3
    assert "dataset.name" not in old
    assert dict(flatten({"a": {"b": 1}, "c": 2})) == {"a.b": 1, "c": 2}
