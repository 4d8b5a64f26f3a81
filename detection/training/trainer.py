"""Training and evaluation of one detector, as each process runs it.

Detectron2's default trainer, with: weights that land completely or not at all; images, augmentations and regions that
are a function of the seed and the iteration, and checkpoints that hold the optimizer too and are checked when read, so
that a killed run ends as an undisturbed one; the evaluation that belongs to the dataset; and errors instead of
tracebacks where the loss diverges.
"""

import logging
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from fvcore.common.config import CfgNode
from fvcore.nn.precise_bn import get_bn_modules

import detection.roi_heads  # registers the head that the C4 recipes name
import detection.training.semantic  # noqa: F401  and the one for labels of pixels
from detection.config import computes_in_bfloat16, for_one_process
from detection.data import datasets, loading, training_data
from detection.data.seeding import Use, generator, seed_libraries
from detection.evaluation import evaluators as evaluation
from detection.training import checkpoints, run_folder, scaling, weights
from detection.training.accumulation import AccumulatingTrainer
from foundation import devices
from foundation.errors import UserError

logger = logging.getLogger(__name__)


class TransferTrainer(DefaultTrainer):
    """Fine-tunes a detector from a config that was scaled to the number of processes. `test` evaluates it."""

    iter: int

    def __init__(self, config: CfgNode) -> None:
        TrainerBase.__init__(self)  # DefaultTrainer's own would build its loader, its step and its checkpointer
        self.cfg, self.max_iter = config, config.SOLVER.MAX_ITER
        self.images = training_data.read(config)
        self.share = loading.Share(config.SOLVER.ACCUMULATION, comm.get_world_size(), comm.get_rank())
        model = self.build_model(config)
        optimizer = self.build_optimizer(config, model)
        self.scheduler = self.build_lr_scheduler(config, optimizer)
        batches = training_data.build_batches(
            config, self.images, self.share, config.SEED, config.DATALOADER.NUM_WORKERS
        )
        place = [comm.get_local_rank()] if config.MODEL.DEVICE == "cuda" else None
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=place)
        self._trainer = AccumulatingTrainer(model, batches, optimizer, self.share, config.SEED)
        self.checkpointer = checkpoints.SafeCheckpointer(
            model, config.OUTPUT_DIR, keep=config.SOLVER.KEEP_CHECKPOINTS, trainer=weakref.proxy(self)
        )
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[hooks.HookBase]:
        """Detectron2's, in its order: the batch norms are estimated before the model is saved or evaluated."""
        config, main = self.cfg, comm.is_main_process()
        own: list[hooks.HookBase] = [hooks.IterationTimer(), hooks.LRScheduler()]
        if config.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model):
            seed = int(generator(config.SEED, Use.PRECISE_BN).integers(2**31))  # other images than in training
            batches = training_data.build_batches(config, self.images, self.share, seed, workers=0)
            passes = config.TEST.PRECISE_BN.NUM_ITER * self.share.passes
            own.append(RepeatablePreciseBN(config.TEST.EVAL_PERIOD, self.model, batches, passes))
        if main:
            own.append(hooks.PeriodicCheckpointer(self.checkpointer, config.SOLVER.CHECKPOINT_PERIOD))
        own.append(hooks.EvalHook(config.TEST.EVAL_PERIOD, self._evaluate))
        if main:
            own.append(hooks.PeriodicWriter(self.build_writers(), period=20))
        return own

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the newest intact checkpoint if asked to and there is one, else load `MODEL.WEIGHTS`.

        Raises:
            UserError: every checkpoint is damaged, or some machine does not see it, or the weights do not fill the
                backbone.
        """
        folder = Path(self.cfg.OUTPUT_DIR)
        found = checkpoints.newest_intact(folder) if resume and comm.is_main_process() else None
        path = comm.all_gather(found)[0]  # the first process has looked, for all
        if path:
            if not all(comm.all_gather(path.is_file())):
                raise UserError(f"{path} is not there on every machine: {folder} must be a folder that all of them see")
            self.checkpointer.load(str(path))
            self.start_iter = self.iter + 1
            logger.info("Resumed from %s at iteration %d", path, self.start_iter)
        elif self.cfg.MODEL.WEIGHTS:
            left = weights.load_backbone(_unwrapped(self.model), Path(self.cfg.MODEL.WEIGHTS))
            logger.info("Backbone filled from %s; without a place: %s", self.cfg.MODEL.WEIGHTS, left or "none")
        else:
            logger.info("The detector starts from random weights")

    def train(self) -> None:
        """Run the iterations that are left, then evaluate.

        Raises:
            UserError: the loss is not finite; the last step was not taken.
        """
        logger.info("%s", scaling.describe(self.cfg, self.share.processes, len(self.images.records)))
        self.iter = self.start_iter
        with EventStorage(self.start_iter) as self.storage:
            self.before_train()
            for iteration in range(self.start_iter, self.max_iter):
                self.iter = iteration
                self.before_step()
                try:
                    self.run_step()
                except FloatingPointError as error:
                    raise UserError(
                        f"the loss is not finite at iteration {iteration}: lower SOLVER.BASE_LR"
                        f" (now {self.cfg.SOLVER.BASE_LR}) or lengthen SOLVER.WARMUP_ITERS"
                        f" (now {self.cfg.SOLVER.WARMUP_ITERS}); {error}"
                    ) from error
                self.after_step()
            self.iter = self.max_iter  # the hooks see by this that training has come to its end
            self.after_train()

    def state_dict(self) -> dict[str, Any]:
        """The iteration, the schedule, and (v0.6 forgets it) the optimizer."""
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The reverse."""
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
        """The model, described in the log file only; its `forward` computes in the precision asked for."""
        model = build_model(cfg)
        logger.debug("Model:\n%s", model)
        if computes_in_bfloat16(cfg):
            logger.info("The model computes in bfloat16")
            model.forward = torch.autocast(cfg.MODEL.DEVICE, torch.bfloat16)(model.forward)
        return model

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """The dataset's own; predictions go to `predictions/`."""
        return evaluation.build_evaluator(cfg, dataset_name, Path(cfg.OUTPUT_DIR) / "predictions")

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Metrics of each task. Without any detection AP is 0, where Detectron2 has NaN."""
        results = super().test(cfg, model, evaluators)
        for metrics in results.values():
            metrics.update({name: 0.0 for name in ("AP", "AP50", "AP75") if math.isnan(metrics.get(name, 0.0))})
        return results

    def _evaluate(self) -> dict[str, Any]:
        self.results = self.test(self.cfg, self.model)
        return self.results


class RepeatablePreciseBN(hooks.PreciseBN):
    """Detectron2's estimate of the batch norms' statistics, from the same images each time: a resumed run would
    otherwise find others than an undisturbed one. `data_loader` are the `TrainingBatches`.
    """

    def update_stats(self) -> None:
        """Estimate and set the statistics."""
        seed_libraries(self.trainer.cfg.SEED, Use.PRECISE_BN, comm.get_rank())
        self._data_iter = None  # from the first image
        super().update_stats()


def check_weights(config: CfgNode, whole: bool) -> None:
    """See that `MODEL.WEIGHTS` fit the config, on a model that is thrown away, before a run leaves a trace.

    Args:
        config: of the run.
        whole: the file has to fill the whole detector, not only its backbone.

    Raises:
        UserError: they do not fit, or the converter's note beside them disagrees with the config.
    """
    path = Path(config.MODEL.WEIGHTS)
    weights.check_sidecar(path, config)
    trial, _ = for_one_process(config)
    trial.MODEL.DEVICE = "cpu"
    model = build_model(trial)
    if whole:
        weights.load_detector(model, path)
    else:
        weights.load_backbone(model, path)


def train(config: CfgNode, name: str, resume: bool) -> None:
    """Fine-tune as `config` says, in the folder `OUTPUT_DIR`; `name` is the recipe's, for the results.

    Runs in each process. Calls of all processes must have the same arguments.
    """
    _prepare(config, (*config.DATASETS.TRAIN, *config.DATASETS.TEST))
    trainer = TransferTrainer(config)
    trainer.resume_or_load(resume=resume)
    with devices.report_out_of_memory(scaling.advise_on_memory(config, trainer.share.processes)):
        trainer.train()
    if comm.is_main_process():
        _finish(config, name, trainer.results, config.SOLVER.MAX_ITER, len(trainer.images.records))


def evaluate(config: CfgNode, name: str) -> None:
    """Evaluate the whole detector in `MODEL.WEIGHTS`, or else the run in the folder, whose record stays but for the
    metrics.

    Raises:
        UserError: there are no weights, or they do not fill the detector.
    """
    _prepare(config, config.DATASETS.TEST, evaluation_only=True)
    model = TransferTrainer.build_model(config)
    path = config.MODEL.WEIGHTS or checkpoints.newest_intact(Path(config.OUTPUT_DIR))
    if not path:
        raise UserError(f"{config.OUTPUT_DIR} holds no checkpoint to evaluate; name one with --weights FILE")
    weights.load_detector(model, Path(path))
    results = TransferTrainer.test(config, model)
    if comm.is_main_process() and config.MODEL.WEIGHTS:
        _finish(config, name, results, iterations=0, train_images=0)
    elif comm.is_main_process():
        run_folder.replace_results(config, results)


def _prepare(config: CfgNode, names: Sequence[str], evaluation_only: bool = False) -> None:
    # It warns of a CUDA compiler on a machine without GPU when Detectron2 lists the environment.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    folder = Path(config.OUTPUT_DIR)
    run_folder.start_logging(folder, comm.get_rank())
    if comm.is_main_process():
        if config.MODEL.WEIGHTS or not evaluation_only:
            run_folder.write_config(folder, config)
        logger.debug("Environment:\n%s", collect_env_info())
        logger.debug("Config:\n%s", config.dump())
    datasets.register(names)
    seed_all_rng(config.SEED)  # of the initial weights
    torch.backends.cudnn.benchmark = config.CUDNN_BENCHMARK
    if config.get("FLOAT32_PRECISION"):  # a key of Detectron2's main branch
        torch.set_float32_matmul_precision(config.FLOAT32_PRECISION)


def _finish(config: CfgNode, name: str, results: dict[str, Any], iterations: int, train_images: int) -> None:
    """Write `results.json`: what a report needs, besides the files that Detectron2 writes."""
    path = config.MODEL.WEIGHTS
    note = weights.read_sidecar(Path(path)) if path else {}
    target = Path(config.OUTPUT_DIR) / "results.json"
    run_folder.write_json(
        target,
        {
            "kind": "detection",
            "config": name,
            "weights": path,
            "init": note.get("trained_by", Path(path).stem) if path else "random",
            "seed": config.SEED,
            "iterations": iterations,
            "train_images": train_images,
            "config_sha256": run_folder.digest(config),
            "dataset": {"name": config.DATASETS.TEST[0], **datasets.sources(config.DATASETS.TEST[0])},
            "results": results,
        },
    )
    logger.info("Results are in %s", target)


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
