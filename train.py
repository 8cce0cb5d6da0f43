"""Train one network: `python train.py`, see `python train.py --help`. Read from top to bottom."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from engine import cli
from engine.config import Config, ConfigError, prepare, register_schema

register_schema()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float:
    return cli.job(lambda: start(composed))


def start(composed: DictConfig) -> float:
    cfg, began = prepare(composed), time.monotonic()
    if cfg.run_dir is not None and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ConfigError("run_dir= names one directory and a sweep needs one per run: leave it out.")
    # torch is imported from here on, so that --help and mistakes answer at once
    from engine.checkpoint import CheckpointError
    from engine.data import DataError
    from engine.distributed import session
    from engine.errors import user_errors
    from engine.interruption import stopping_at_once
    from engine.lock import release
    from engine.numerics import with_rollbacks

    with ExitStack() as stack:
        stack.enter_context(stopping_at_once())
        with user_errors():
            ranks = stack.enter_context(session(cfg.trainer.device))
        stack.callback(release)
        with user_errors(CheckpointError, DataError, FloatingPointError, OSError):
            return with_rollbacks(lambda left_out: train(cfg, ranks, began, left_out))


def train(cfg: Config, ranks, command_began: float, left_out: list[int]) -> float:
    import torch
    from safetensors.torch import save as safetensors
    from torch.nn.parallel import DistributedDataParallel

    import feather
    from engine.captured import CapturedStep, recorder
    from engine.checkpoint import atomic_write, fitting, load_checkpoint, load_parts, save_checkpoint
    from engine.data import create_data
    from engine.distributed import all_reduce_sum, barrier, broadcast_object, gather_objects, main_first, meet_at
    from engine.errors import user_errors
    from engine.evaluate import evaluate
    from engine.interruption import EXIT_UNFINISHED, Interruption
    from engine.layout import choose_layout
    from engine.numerics import NumberGuard
    from engine.optimization import create_optimizer, learning_rate, set_learning_rate
    from engine.outcome import describe_result, sparsity_record
    from engine.precision import resolve_precision
    from engine.progress import Progress
    from engine.records import MetricsLog, environment, write_json
    from engine.rundir import open_run_directory
    from engine.seeding import rng_state, seed_everything, set_deterministic, set_rng_state
    from engine.step import TrainingStep
    from engine.tracking import create_tracker, labels, mirror_finished
    from models import create_model, load_weights

    def say(*words: object) -> None:
        if ranks.is_main:
            print(*words, flush=True)

    # ---- the run directory: finished, unfinished or new ----------------------------------------------------------
    run = broadcast_object(open_run_directory(cfg) if ranks.is_main else None)
    surroundings = environment()  # before the tree can change under a long run
    if run.result is not None:
        if ranks.is_main:
            mirror_finished(cfg, run)
        top1 = float(run.result["final_top1"])
        say(f"{run.path} is finished (top-1 {top1:.2f} %): nothing to do, overwrite=true runs it anew.")
        return top1

    # ---- data, network, optimizer, sparsifier ----------------------------------------------------------------------
    trainer, device = cfg.trainer, ranks.device
    set_deterministic(trainer.deterministic)
    seed_everything(cfg.seed)
    with user_errors():
        with main_first(ranks):
            data = create_data(
                cfg.dataset.name, root=cfg.dataset.root, download=cfg.dataset.download, seed=cfg.seed, device=device,
                image_size=cfg.dataset.image_size, validation=cfg.dataset.validation, augment=cfg.dataset.augment,
                workers=cfg.dataset.workers, batch_size=trainer.batch_size, eval_batch_size=trainer.eval_batch_size,
                rank=ranks.rank, world_size=ranks.world_size,
            )  # fmt: skip
        model = create_model(
            cfg.model.name, num_classes=data.num_classes, pretrained=cfg.model.pretrained, **cfg.model.options
        )
        if cfg.model.weights is not None:
            new_head = load_weights(model, cfg.model.weights)
            say(f"Started from {cfg.model.weights}" + (f", with a new {', '.join(new_head)}." if new_head else "."))
        layout, layout_name = choose_layout(trainer.channels_last, device, model)
        model.to(device, memory_format=layout)
        data.lay_out(layout)
        precision = resolve_precision(trainer.precision, device, model)
        steps_per_epoch = len(data.train)
        total_steps = min(trainer.epochs * steps_per_epoch, trainer.max_steps or sys.maxsize)
        epochs = -(-total_steps // steps_per_epoch)
        optimizer = create_optimizer(model, cfg.optimizer, captured=trainer.capture)
        sparsifier = feather.create(
            cfg.method.name, model, optimizer, sparsity=cfg.sparsity, total_steps=total_steps, p=cfg.method.p,
            theta=cfg.method.theta, framework=cfg.framework.name, framework_options=cfg.framework.options,
            schedule=cfg.sparsity_schedule.name, start_step=int(cfg.sparsity_schedule.start_fraction * total_steps),
            end_step=int(cfg.sparsity_schedule.end_fraction * total_steps),
            modifier=cfg.modifier, modifier_options=cfg.modifier_options, include=cfg.method.include,
            exclude=cfg.method.exclude,
        )  # fmt: skip
        records = recorder(ranks, precision) if trainer.capture else None
        if records is not None:
            sparsifier.make_recordable()
    if ranks.rank:  # dropout and the like draw differently in every process
        seed_everything((cfg.seed + 7919 * ranks.rank) % 2**32)
    scaler = precision.scaler()
    guard = NumberGuard(model, trainer.nonfinite, scaler, ranks, precision.autocast, left_out)
    network = torch.compile(model) if trainer.compile else model
    take = TrainingStep(
        DistributedDataParallel(network) if ranks.world_size > 1 else network, model, optimizer, scaler, guard,
        precision, accumulate=trainer.accumulate, label_smoothing=trainer.label_smoothing, clip=trainer.clip_grad_norm,
        world_size=ranks.world_size,
    )  # fmt: skip
    if records is not None:
        take = CapturedStep(take, sparsifier, records)

    # ---- go on where an earlier process stopped -------------------------------------------------------------------
    if ranks.is_main:
        run.create(cfg)
    cfg.overwrite = False  # what this very command has written stays, also after a rollback
    barrier()
    step, top1, best, seconds = 0, 0.0, 0.0, 0.0  # seconds: of training alone
    began = time.monotonic()
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # of the epoch: loss and images
    loaded = load_checkpoint(run.path, map_location=device)
    # reading sweeps half-written files away: nobody may write meanwhile
    meet_at(loaded[0]["step"] if loaded else 0, run.path)
    if loaded is not None:
        state, path = loaded
        with fitting(path):
            load_parts(state, model, optimizer, sparsifier=sparsifier, scaler=scaler, guard=guard)
            set_rng_state(state["rng"][ranks.rank % len(state["rng"])])
            step, best, seconds = state["step"], state["best"], state["seconds"]
            began -= state["wall_seconds"]
            totals.copy_(state["totals"] * ranks.is_main)
        say(f"Going on from {path} at step {step} of {total_steps}.")
    log = MetricsLog(run.path / "metrics.jsonl")
    with user_errors():
        history = log.restore(state if loaded is not None else None) if ranks.is_main else []
    tracker = create_tracker(
        cfg.logger.name if ranks.is_main else "none", directory=run.path, run_id=run.run_id, history=history,
        **labels(cfg, run),
    )  # fmt: skip
    say(f"{run.path}\n  {data.train.num_samples} training images, {steps_per_epoch} steps an epoch, {total_steps} in "
        f"all; {precision.reason}; {layout_name}, {'compiled' if trainer.compile else 'eager'}, "
        f"{'steps recorded as CUDA graphs, fused' if trainer.capture else 'foreach'} optimizer; "
        f"{ranks.world_size} x {device}; {sparsifier.report().prunable:,} prunable weights")  # fmt: skip
    if tracker.description:
        say(f"  {tracker.description}")

    def save() -> None:
        guard.settle()
        generators, sums = gather_objects(rng_state()), all_reduce_sum(totals.clone())
        if ranks.is_main:
            run.check()
            state = {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "sparsifier": sparsifier.state_dict(),
                "scaler": scaler.state_dict(), "rng": generators, "step": step, "best": best, "seconds": seconds,
                "wall_seconds": time.monotonic() - began, "totals": sums, "guard": guard.state_dict(),
                "metrics": log.content(),
            }  # fmt: skip
            save_checkpoint(run.path, state, step)

    def write(record: dict[str, object]) -> None:
        if ranks.is_main:
            run.check()
            log.append(record)
            tracker.log(record, step)

    def stop(where: str) -> NoReturn:
        barrier()
        tracker.finish()
        say(f"Stopped after {where}; the same command goes on from here.")
        sys.exit(EXIT_UNFINISHED)

    def images_until(steps: int) -> int:
        whole, rest = divmod(steps, steps_per_epoch)
        return whole * data.train.num_samples + rest * trainer.batch_size

    def mean_loss() -> float:
        guard.settle()
        loss_sum, images = all_reduce_sum(totals.clone()).tolist()
        return loss_sum / max(images, 1)  # of no image where every step so far was left out

    # ---- train -----------------------------------------------------------------------------------------------------
    progress = Progress(
        images_until(total_steps), done_images=images_until(step), enabled=ranks.is_main and trainer.progress,
        description=f"{cfg.model.name} {cfg.method.name} {cfg.sparsity:g}",
    )  # fmt: skip
    with Interruption(cfg.time_limit_minutes, ranks, since=command_began) as interruption, progress:
        while step < total_steps:
            epoch, first = divmod(step, steps_per_epoch)
            started, mask_change = time.perf_counter(), 0.0
            model.train()
            for images, labels, global_size in data.train.epoch(epoch, start_step=first):
                last_of_epoch = (step + 1) % steps_per_epoch == 0 or step + 1 == total_steps
                recorded = last_of_epoch or (step + 1) % trainer.log_every == 0
                lr = learning_rate(step, total_steps, steps_per_epoch, cfg.optimizer.lr, cfg.lr_schedule)
                set_learning_rate(optimizer, lr)
                masks = sparsifier.masks() if recorded else []
                losses = take(step, images, labels, global_size)
                if losses is not None:
                    totals[0] += losses
                    totals[1] += len(labels)
                step += 1
                progress.update(global_size)
                if recorded:
                    mask_change = sparsifier.mask_change(masks)
                    now = mean_loss()
                    progress.show(loss=now, accuracy=top1, sparsity=sparsifier.sparsity)
                    if not last_of_epoch:
                        write({
                            "step": step, "epoch": step / steps_per_epoch, "train/loss": now,
                            "train/lr": lr, "sparsity/target": sparsifier.sparsity,
                            "sparsity/mask_change": mask_change,
                        })  # fmt: skip
                if last_of_epoch or interruption.requested(step):
                    break
            seconds += time.perf_counter() - started

            if not last_of_epoch:
                save()
                stop(f"step {step} of {total_steps}: {interruption.reason}")

            # ---- the epoch's evaluation, record and checkpoint ------------------------------------------------------
            train_loss = mean_loss()
            eval_loss, top1 = evaluate(network, data.eval.epoch(0), autocast=precision.autocast, reduce=all_reduce_sum)
            best = max(best, top1)
            rate = images_until(step) / seconds
            write({
                "step": step, "epoch": step / steps_per_epoch, "train/loss": train_loss, "val/loss": eval_loss,
                "val/top1": top1, "train/lr": lr, "sparsity/target": sparsifier.sparsity,
                "sparsity/mask_change": mask_change, **sparsity_record(sparsifier.report()),
                "train/skipped_steps": guard.skipped, "train/overflows": guard.overflows,
                "perf/images_per_second": rate,
            })  # fmt: skip
            figures = {"loss": train_loss, "accuracy": top1, "sparsity": sparsifier.sparsity}
            progress.end_epoch(epoch + 1, epochs, figures)
            totals = torch.zeros_like(totals)
            if (epoch + 1) % trainer.checkpoint_every == 0 or step == total_steps or interruption.requested(0):
                save()
            if step < total_steps and interruption.requested(0):
                stop(f"epoch {epoch + 1} of {epochs}: {interruption.reason}")

    # ---- the final model and its result -----------------------------------------------------------------------------
    with user_errors(RuntimeError):
        # a step that was left out may be the one that the schedule lacks
        report = sparsifier.finalize(at_once=guard.skipped + guard.overflows > 0)
    eval_loss, top1 = evaluate(network, data.eval.epoch(0), autocast=precision.autocast, reduce=all_reduce_sum)
    if ranks.is_main:
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
        weights = atomic_write(run.path / "model.safetensors", safetensors(tensors))
        flops = feather.count_flops(model, torch.zeros(1, *data.image_shape, device=device))
        result = describe_result(
            cfg, config_hash=run.config_hash, report=report, flops=flops, device=device, surroundings=surroundings,
            precision=precision.name, parameters=sum(p.numel() for p in model.parameters()), epochs=epochs,
            world_size=ranks.world_size,
            final_top1=top1, best_top1=max(best, top1), final_loss=eval_loss, wall_seconds=time.monotonic() - began,
            images_per_second=images_until(step) / seconds, model_file=weights, eval_split=data.eval_split,
            theta=getattr(sparsifier.method, "theta", None), p=getattr(sparsifier.method, "p", None),
            skipped_steps=guard.skipped, overflows=guard.overflows,
        )  # fmt: skip
        tracker.summary(result)
        tracker.artifact(weights, f"{run.path.name}-model")
        tracker.finish()
        write_json(run.path / "result.json", result)  # last: from here on the run counts as finished
        say(f"{run.path}: top-1 {top1:.2f} % (best {best:.2f} %), {report.nonzeros:,} of {report.prunable:,} weights, "
            f"sparsity {100 * report.sparsity:.2f} %")  # fmt: skip
    barrier()
    return top1


if __name__ == "__main__":
    cli.run(main)
