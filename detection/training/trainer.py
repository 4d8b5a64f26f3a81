"""Training and evaluation of one detector, as each process runs it.

Detectron2's default trainer with these differences: initial weights are loaded completely or not at all; images,
augmentations and sampled regions are a function of the seed and the iteration, and checkpoints include the optimizer
and are verified when they are read, so that a killed run ends as an undisturbed one; each dataset has its own
evaluation; and a loss that diverges is one line instead of a traceback.
"""

import contextlib
import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import CommonMetricPrinter, EventStorage, TensorboardXWriter
from fvcore.common.config import CfgNode
from fvcore.nn.precise_bn import get_bn_modules
from PIL.Image import Image

from detection.data import datasets, loading, training_data
from detection.data.seeding import Stream, generator
from detection.evaluation import evaluators as evaluation
from detection.evaluation import pictures
from detection.training import checkpoints, optimizer, outcome, run_folder, scaling, show_data, weights
from detection.training import model as modeling
from detection.training.accumulation import AccumulatingTrainer
from detection.training.hooks import (
    PERIOD,
    Evaluation,
    HighestRate,
    Records,
    RepeatablePreciseBN,
    StopOnRequest,
    WeightAverage,
)
from detection.training.outcome import OF_AVERAGE, PREDICTIONS
from foundation import devices
from foundation.errors import UserError
from foundation.files import report_disk_errors
from foundation.images import UnreadableImage
from foundation.signals import StopRequest, end_workers_at_exit, leave_to_parent
from foundation.wandb_mirror import open_wandb

TIMES = ("time", "data_time", "eta_seconds")  # scalars that differ from run to run
logger = logging.getLogger(__name__)


class TransferTrainer(DefaultTrainer):
    """Fine-tunes a detector from a config that was scaled to the number of processes. `test` evaluates it.

    Args:
        config: of the run.
        request: of the signals that stop a run; without it none does.
    """

    iter: int

    def __init__(self, config: CfgNode, request: StopRequest | None = None) -> None:
        TrainerBase.__init__(self)  # DefaultTrainer's own would build its loader, its step and its checkpointer
        self.cfg, self.max_iter = config, config.SOLVER.MAX_ITER
        self.images = training_data.read(config)
        self.process_batch = loading.ProcessBatch(config.SOLVER.ACCUMULATION, comm.get_world_size(), comm.get_rank())
        model = self.build_model(config)
        updates = self.build_optimizer(config, model)
        self.scheduler = self.build_lr_scheduler(config, updates)
        batches = training_data.build_batches(
            config, self.images, self.process_batch, config.SEED, config.DATALOADER.NUM_WORKERS
        )
        place = [comm.get_local_rank()] if config.MODEL.DEVICE == "cuda" else None
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=place)
        self._trainer = AccumulatingTrainer(model, batches, updates, self.process_batch, config.SEED)
        self.checkpointer = checkpoints.SafeCheckpointer(
            model, config.OUTPUT_DIR, keep=config.SOLVER.KEEP_CHECKPOINTS, trainer=weakref.proxy(self)
        )
        self._scalars: dict[str, Any] = {}
        self._planned = self.max_iter
        self._request = request or StopRequest()
        self._precise_bn: RepeatablePreciseBN | None = None
        self._average: WeightAverage | None = None
        self._samples: pictures.Samples | None = None
        self._mirrors: list[Callable[[int, Mapping[str, Any]], None]] = []
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[hooks.HookBase]:
        """The hooks in Detectron2's order: batch norms are estimated before the model is saved or evaluated; see
        `detection.training.hooks` for the rest of it. Those that write files come later, in `resume_or_load`.
        """
        scheduler = HighestRate() if self.cfg.SOLVER.LAYER_DECAY != 1 else hooks.LRScheduler()
        own: list[hooks.HookBase] = [hooks.IterationTimer(), scheduler]
        if self.cfg.SOLVER.EMA:
            self._average = WeightAverage(_unwrapped(self.model), self.cfg.SOLVER.EMA)
            own.append(self._average)
        if self.cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model):
            # A different set of images than in training.
            seed = int(generator(self.cfg.SEED, Stream.PRECISE_BN).integers(2**31))
            batches = training_data.build_batches(self.cfg, self.images, self.process_batch, seed, workers=0)
            passes = self.cfg.TEST.PRECISE_BN.NUM_ITER * self.process_batch.passes
            self._precise_bn = RepeatablePreciseBN(self.cfg.TEST.EVAL_PERIOD, self.model, batches, passes)
            own.append(self._precise_bn)
        return own

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the newest intact checkpoint if asked to and there is one, else load `MODEL.WEIGHTS`.

        Raises:
            UserError: every checkpoint is damaged, or some machine does not see it, or it has more iterations than
                `SOLVER.MAX_ITER`, or the weights do not fill the backbone.
        """
        folder = Path(self.cfg.OUTPUT_DIR)
        if comm.is_main_process():
            checkpoints.remove_drafts(folder)
        found = checkpoints.newest_intact(folder) if resume and comm.is_main_process() else None
        path = comm.all_gather(found)[0]  # the first process has looked, for all
        if path:
            if not all(comm.all_gather(path.is_file())):
                raise UserError(
                    f"{path} does not exist on every machine: put {folder} on a disk that all of them share"
                )
            self.checkpointer.resume(path)
            self.start_iter = self.iter + 1
            if self.start_iter > self.max_iter:
                raise UserError(
                    f"{path} has {self.start_iter} iterations, more than SOLVER.MAX_ITER {self.max_iter}: raise it, or"
                    " choose another --output"
                )
            logger.info("Resumed from %s at iteration %d", path, self.start_iter)
            if comm.all_gather(run_folder.has_ended_early(folder, self.start_iter))[0]:
                logger.info("The training has ended early here (TEST.PATIENCE): it is only evaluated")
                self.max_iter = self.start_iter
        elif self.cfg.MODEL.WEIGHTS:
            left = weights.load_backbone(_unwrapped(self.model), Path(self.cfg.MODEL.WEIGHTS))
            logger.info("Backbone filled from %s; not used: %s", self.cfg.MODEL.WEIGHTS, left or "nothing")
        else:
            logger.info("The detector starts from random weights")
        self.register_hooks(self._recording_hooks())

    def train(self) -> None:
        """Run the iterations that are left, then evaluate.

        Raises:
            UserError: the loss is not finite; the weights in memory are of no use, the last checkpoint is intact.
            SystemExit: a signal has asked to stop; a checkpoint is saved (`hooks.StopOnRequest`).
        """
        logger.info("%s", scaling.describe(self.cfg, self.process_batch.processes, len(self.images.records)))
        self.iter = self.start_iter
        with EventStorage(self.start_iter) as self.storage:
            self._restore_scalars()
            if self.start_iter == 0 and self.cfg.LOG.PICTURES and comm.is_main_process():
                self._show("training_images", lambda: show_data.draw(self.cfg, self.images, self.cfg.LOG.PICTURES))
            self.before_train()
            self._finish_resumed()
            while self.iter < self.max_iter:  # which an evaluation may lower
                self.before_step()
                try:
                    self.run_step()
                except FloatingPointError as error:
                    raise UserError(
                        f"the loss is not finite at iteration {self.iter}: lower SOLVER.BASE_LR"
                        f" (now {self.cfg.SOLVER.BASE_LR}) or lengthen SOLVER.WARMUP_ITERS"
                        f" (now {self.cfg.SOLVER.WARMUP_ITERS}) in a new run, with another --output: --resume keeps"
                        f" both; {error}"
                    ) from error
                self.after_step()
                self.iter += 1
            self.iter = self.max_iter - 1  # the iteration that the checkpoint names
            self.checkpointer.save_final(self.iter)
            self.iter = self.max_iter  # by which the hooks see that training has come to its end
            self.after_train()

    def evaluate_average(self) -> dict[str, Any]:
        """Evaluate the average of the weights, by task with the suffix `_EMA`, and save it; empty where there is none.

        The batch norms' statistics are estimated for it as for the weights. The model is as before afterwards.
        """
        if self._average is None:
            return {}
        logger.info("Evaluating the average of the weights")
        model, folder = _unwrapped(self.model), Path(self.cfg.OUTPUT_DIR)
        before = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self._average.state_dict())
        if self._precise_bn:
            self._precise_bn.update_stats()
        if comm.is_main_process():
            state = {"model": model.state_dict(), "iteration": self.max_iter - 1}
            checkpoints.write(folder / checkpoints.AVERAGE, state)
        results = _test_average(self.cfg, self.model)
        model.load_state_dict(before)
        return results

    def state_dict(self) -> dict[str, Any]:
        """The iteration, the schedule, the optimizer (v0.6 leaves it out), the recent losses and the planned length."""
        return {
            **super().state_dict(),
            "_trainer": self._trainer.state_dict(),
            "scalars": self._recent_scalars(),
            "max_iter": self.cfg.SOLVER.MAX_ITER,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The reverse."""
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
        self._scalars = state_dict.get("scalars", {})  # earlier versions did not save these two
        self._planned = state_dict.get("max_iter", self.max_iter)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """As `SOLVER` says."""
        return optimizer.build(cfg, model)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
        """The model; its `forward` computes in `SOLVER.PRECISION`."""
        return modeling.build(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Detectron2's, with this project's image decoder."""
        mapper = training_data.evaluation_mapper(cfg)
        loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        loader.worker_init_fn = leave_to_parent
        end_workers_at_exit()
        return loader

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """The dataset's own; predictions go to `predictions/`."""
        return evaluation.build_evaluator(cfg, dataset_name, Path(cfg.OUTPUT_DIR) / PREDICTIONS)

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Metrics of each task; NaN where there is nothing to evaluate, which `results.json` has as null.

        The tasks of further evaluation sets are named `LABEL/TASK`, with the labels of `datasets.labels`.
        """
        if evaluators is None:
            evaluators = _evaluators(cfg, PREDICTIONS)
        try:
            results: dict[str, Any] = super().test(cfg, model, evaluators)
        except UserError as error:  # a worker puts its traceback before the message
            raise UserError(str(error).rpartition(f"{UserError.__name__}: ")[2].strip()) from error
        if len(cfg.DATASETS.TEST) > 1:
            first, *others = results.values()
            pairs = zip(datasets.labels(cfg.DATASETS.TEST)[1:], others, strict=True)
            results = first | {f"{label}/{task}": metrics for label, found in pairs for task, metrics in found.items()}
        for task, metrics in results.items():
            without = [name for name, value in metrics.items() if math.isnan(value)]
            if without:
                logger.info("%s: not evaluated, because there are no objects: %s", task, ", ".join(without))
        return results

    def _evaluate(self) -> dict[str, Any]:
        evaluators = _evaluators(self.cfg, PREDICTIONS)
        if self.cfg.LOG.PICTURES:
            if self._samples is None:
                self._samples = pictures.Samples(self.cfg, self.cfg.DATASETS.TEST[0], self.cfg.LOG.PICTURES)
            evaluators[0] = DatasetEvaluators([evaluators[0], self._samples])
        with self._request.evaluating():
            self.results = self.test(self.cfg, self.model, evaluators)
        if self._samples:
            self._show("evaluation_images", self._samples.draw)
        return self.results

    def _show(self, name: str, draw: Callable[[], Image | None]) -> None:
        """Put a picture into the records; without it, with a warning, where it cannot be drawn."""
        try:
            picture = draw()
        except (OSError, UnreadableImage) as error:
            logger.warning("%s cannot be drawn: %s", name, error)
            return
        if picture:
            self.storage.put_image(name, numpy.asarray(picture).transpose(2, 0, 1))
            for mirror in self._mirrors:
                mirror(self.storage.iter, {name: picture})

    def _recording_hooks(self) -> list[hooks.HookBase]:
        """Records, checkpoints and evaluations."""
        config, own, writers = self.cfg, [], []
        if comm.is_main_process():
            folder = Path(config.OUTPUT_DIR)
            if config.LOG.WANDB:
                self._mirrors = [open_wandb(config.LOG.WANDB, folder, yaml.safe_load(config.dump()))]
            writers = [
                CommonMetricPrinter(self.max_iter),
                run_folder.RecordWriter(folder, self.start_iter, PERIOD, self._mirrors),
                TensorboardXWriter(config.OUTPUT_DIR),
            ]
            own.append(Records(writers, config.TEST.EVAL_PERIOD))
            own.append(hooks.PeriodicCheckpointer(self.checkpointer, config.SOLVER.CHECKPOINT_PERIOD))
        own.append(StopOnRequest(self._request, writers))
        metric = config.TEST.BEST_METRIC or evaluation.main_metric(config)
        period, dataset = config.TEST.EVAL_PERIOD, datasets.measured_on(config.DATASETS.TEST, metric)
        self.evaluation = Evaluation(period, self._evaluate, metric, dataset, config.TEST.PATIENCE, writers)
        return [*own, self.evaluation]

    def _recent_scalars(self) -> dict[str, Any]:
        """By name, whether the records smooth it and its latest (value, iteration): what a resumed run needs to write
        the records of an undisturbed one.
        """
        hints = self.storage.smoothing_hints()
        return {
            name: [hints[name], history.values()[-PERIOD:]]
            for name, history in self.storage.histories().items()
            if history.values()[-1][1] == self.iter and name not in TIMES
        }

    def _restore_scalars(self) -> None:
        for name, (smoothed, values) in self._scalars.items():
            for value, iteration in values:
                self.storage.iter = iteration
                self.storage.put_scalar(name, value, smoothing_hint=smoothed)
        self.storage.iter = self.start_iter

    def _finish_resumed(self) -> None:
        """Where a run is resumed at its end, but was planned longer before: estimate the batch norms, as at its end."""
        if self.start_iter == self.cfg.SOLVER.MAX_ITER != self._planned:
            if self._precise_bn:
                self._precise_bn.update_stats()
            self.checkpointer.mark_changed()


def train(config: CfgNode, name: str, resume: bool, request: StopRequest) -> None:
    """Fine-tune as `config` says, in the folder `OUTPUT_DIR`.

    Runs in each process. Calls of all processes must have the same arguments.

    Args:
        config: of the run.
        name: of the recipe, for the results.
        resume: continue from the newest intact checkpoint, if there is one.
        request: of the signals that stop this process; one process that gets one is enough.

    Raises:
        SystemExit: with `STOPPED`: a signal has ended the run early, which --resume continues.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(report_disk_errors(Path(config.OUTPUT_DIR)))
        stack.enter_context(loading.report_dead_workers(config.DATALOADER.NUM_WORKERS))
        stack.enter_context(devices.report_out_of_memory(scaling.advise_on_memory(config, comm.get_world_size())))
        _prepare(config, (*config.DATASETS.TRAIN, *config.DATASETS.TEST))
        trainer = TransferTrainer(config, request)
        trainer.resume_or_load(resume=resume)
        if comm.is_main_process():  # not before it is known that the run in the folder goes on with this config
            run_folder.write_config(Path(config.OUTPUT_DIR), config, name)
        stack.enter_context(request.deferred())
        trainer.train()
        with request.evaluating():
            results = {**trainer.results, **_test_augmented(config, trainer.model), **trainer.evaluate_average()}
        request.finish()
        if comm.is_main_process():
            best = trainer.evaluation.best
            outcome.record(
                config,
                name,
                results,
                iterations=trainer.max_iter,
                train_images=len(trainer.images.records),
                stopped_early=trainer.max_iter < config.SOLVER.MAX_ITER,
                best=best and {"iterations": best[0] + 1, "metric": trainer.evaluation.metric, "value": best[1]},
            )


def evaluate(config: CfgNode, name: str, own: bool) -> None:
    """Evaluate a whole detector.

    Args:
        config: of the run.
        name: of the recipe, for the results.
        own: evaluate the run in the folder `OUTPUT_DIR`, whose results are replaced; else `MODEL.WEIGHTS`.

    Raises:
        UserError: there are no weights, or they do not fill the detector, or the results are not those expected.
    """
    folder = Path(config.OUTPUT_DIR)
    with report_disk_errors(folder), loading.report_dead_workers(config.DATALOADER.NUM_WORKERS):
        _prepare(config, config.DATASETS.TEST)
        if not own and comm.is_main_process():
            run_folder.write_config(folder, config, name)
        model = TransferTrainer.build_model(config)
        path = checkpoints.newest_intact(folder) if own else Path(config.MODEL.WEIGHTS)
        if not path:
            raise UserError(f"{folder} holds no checkpoint to evaluate; name one with --weights FILE")
        weights.load_detector(model, path)
        results = {**TransferTrainer.test(config, model), **_test_augmented(config, model)}
        if own and path.name == checkpoints.FINAL and (folder / checkpoints.AVERAGE).is_file():
            weights.load_detector(model, folder / checkpoints.AVERAGE)
            results |= _test_average(config, model)
        if not comm.is_main_process():
            return
        if own:
            evaluated = outcome.describe(config, results)
            if path.name != checkpoints.FINAL:  # of a run that goes on, or whose last checkpoint is damaged
                evaluated["iterations"] = checkpoints.iterations_of(path)
            run_folder.replace_results(config, evaluated)
            outcome.conclude(config, results)
        else:
            outcome.record(config, name, results, iterations=0, train_images=0)


def _test_augmented(config: CfgNode, model: torch.nn.Module) -> dict[str, Any]:
    """Results of test-time augmentation (`TEST.AUG`), by task with the suffix `_TTA`; empty where it is not enabled."""
    if not config.TEST.AUG.ENABLED:
        return {}
    logger.info("Evaluating with test-time augmentation")
    evaluators = _evaluators(config, "predictions_TTA")
    results = TransferTrainer.test(config, GeneralizedRCNNWithTTA(config, _unwrapped(model)), evaluators)
    return {f"{task}_TTA": metrics for task, metrics in results.items()}


def _test_average(config: CfgNode, model: torch.nn.Module) -> dict[str, Any]:
    """Results of a model that holds the average of the weights, by task with the suffix `_EMA`."""
    results = TransferTrainer.test(config, model, _evaluators(config, OF_AVERAGE))
    return {f"{task}_EMA": metrics for task, metrics in results.items()}


def _evaluators(config: CfgNode, folder: str) -> list[DatasetEvaluator]:
    """Of the datasets to evaluate on. Predictions go to `folder`, those of further datasets to `folder_LABEL`."""
    names = config.DATASETS.TEST
    folders = [folder, *(f"{folder}_{label}" for label in datasets.labels(names)[1:])]
    return [
        evaluation.build_evaluator(config, name, Path(config.OUTPUT_DIR) / own)
        for name, own in zip(names, folders, strict=True)
    ]


def _prepare(config: CfgNode, datasets_used: Sequence[str]) -> None:
    # It warns of a CUDA compiler on a machine without GPU when Detectron2 lists the environment.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    folder = Path(config.OUTPUT_DIR)
    run_folder.start_logging(folder, comm.get_rank())
    if comm.is_main_process():
        logger.debug("Environment:\n%s", collect_env_info())
        logger.debug("Config:\n%s", config.dump())
    datasets.register(datasets_used)
    seed_all_rng(config.SEED)  # of the initial weights
    torch.backends.cudnn.benchmark = config.CUDNN_BENCHMARK
    if config.get("FLOAT32_PRECISION"):  # a key of Detectron2's main branch
        torch.set_float32_matmul_precision(config.FLOAT32_PRECISION)


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
