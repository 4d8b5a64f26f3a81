"""Training and evaluation of one detector, as each process runs it.

Detectron2's default trainer, with: weights that land completely or not at all, a checkpoint that holds the
optimizer too, COCO's own evaluation, and errors instead of tracebacks where the loss diverges.
"""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

import detection.compat
import detection.roi_heads  # noqa: F401  registers the head that the C4 recipes name
from cli.errors import UserError
from detection import datasets, run_folder, weights
from detection.config import computes_in_bfloat16, for_one_process

# isort: split
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

logger = logging.getLogger(__name__)


class TransferTrainer(DefaultTrainer):
    """Fine-tunes a detector from a config. `test` evaluates on `DATASETS.TEST`."""

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the last checkpoint if asked to and there is one, else load `MODEL.WEIGHTS`.

        Raises:
            UserError: the weights do not fill the backbone.
        """
        if resume and self.checkpointer.has_checkpoint():
            super().resume_or_load(resume=True)
            logger.info("Resumed at iteration %d", self.start_iter)
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
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Endless batches of the chosen share of the training images."""
        return build_detection_train_loader(cfg, dataset=training_images(cfg))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """COCO AP of boxes, and of masks if the model has them; predictions go to `predictions/`."""
        tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        folder = Path(cfg.OUTPUT_DIR) / "predictions"
        return COCOEvaluator(dataset_name, tasks=tasks, output_dir=str(folder), use_fast_impl=False)

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Metrics of each task. Without any detection AP is 0, where Detectron2 has NaN."""
        results = super().test(cfg, model, evaluators)
        for metrics in results.values():
            if math.isnan(metrics["AP"]):
                metrics.update(AP=0.0, AP50=0.0, AP75=0.0)
        return results


def training_images(config: CfgNode) -> list[dict[str, Any]]:
    """Detectron2's records of the training images, or of `DATASETS.FRACTION` of them."""
    records = get_detection_dataset_dicts(
        config.DATASETS.TRAIN, filter_empty=config.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    if config.DATASETS.FRACTION == 1:
        return records
    chosen = datasets.subset(len(records), config.DATASETS.FRACTION, config.DATASETS.FRACTION_SEED)
    return [records[index] for index in chosen]


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
    _prepare(config)
    trainer = TransferTrainer(config)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    if comm.is_main_process():
        _finish(config, name, trainer._last_eval_results, config.SOLVER.MAX_ITER)


def evaluate(config: CfgNode, name: str) -> None:
    """Evaluate the whole detector in `MODEL.WEIGHTS`, or else in the folder's last checkpoint.

    Raises:
        UserError: there are no weights, or they do not fill the detector.
    """
    _prepare(config)
    model = TransferTrainer.build_model(config)
    path = config.MODEL.WEIGHTS or DetectionCheckpointer(model, config.OUTPUT_DIR).get_checkpoint_file()
    if not path:
        raise UserError(f"{config.OUTPUT_DIR} holds no checkpoint to evaluate; name one with --weights FILE")
    weights.load_detector(model, Path(path))
    results = TransferTrainer.test(config, model)
    if comm.is_main_process():
        _finish(config, name, results, 0)


def _prepare(config: CfgNode) -> None:
    # It warns of a CUDA compiler on a machine without GPU when Detectron2 lists the environment.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    folder = Path(config.OUTPUT_DIR)
    run_folder.start_logging(folder, comm.get_rank())
    if comm.is_main_process():
        run_folder.write_config(folder, config)
        logger.debug("Environment:\n%s", collect_env_info())
        logger.debug("Config:\n%s", config.dump())
    datasets.register((*config.DATASETS.TRAIN, *config.DATASETS.TEST))
    # Each process draws its own augmentations.
    seed_all_rng(None if config.SEED < 0 else config.SEED + comm.get_rank())
    torch.backends.cudnn.benchmark = config.CUDNN_BENCHMARK


def _finish(config: CfgNode, name: str, results: dict[str, Any], iterations: int) -> None:
    """Write `results.json`: what a report needs, besides the files that Detectron2 writes."""
    path = config.MODEL.WEIGHTS
    note = weights.read_sidecar(Path(path)) if path else {}
    metadata = MetadataCatalog.get(config.DATASETS.TEST[0])
    run_folder.write_results(
        Path(config.OUTPUT_DIR),
        {
            "kind": "detection",
            "config": name,
            "weights": path,
            "init": note.get("trained_by", Path(path).stem) if path else "random",
            "seed": config.SEED,
            "iterations": iterations,
            "train_images": len(training_images(config)) if iterations else 0,
            "dataset": {
                "name": config.DATASETS.TEST[0],
                "image_root": str(Path(metadata.image_root).resolve()),
                "annotations": str(Path(metadata.json_file).resolve()),
            },
            "results": results,
        },
    )
    logger.info("Results are in %s", Path(config.OUTPUT_DIR) / "results.json")


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
