"""The families of public checkpoints: how each is recognised, and which of its encoders is converted.

A family is recognised by the path of the table that holds the encoder, by the prefix of the encoder's names, by the
naming scheme, and by the names beside the encoder. The first row that fits is taken, so specific rows come before
general ones. `docs/converter.md` has the same table with caveats.

Prefixes and names are compared without wrappers such as `module.`.
"""

import re
from dataclasses import dataclass

from convert.containers import Container
from convert.naming import (
    CAFFE2,
    DETECTRON2,
    HAIKU,
    HUGGING_FACE,
    SEQUENTIAL,
    SEQUENTIAL_CIFAR,
    SIMCLR_V2,
    TORCHVISION,
    Scheme,
)

SAME_PADDING = (
    "trained with TensorFlow's SAME padding, which at stride 2 lies half a step from PyTorch's: the features "
    "differ from the original network's (linear accuracy 70 instead of 74.6 % without fine-tuning)"
)
NO_NORMALISATION = "trained on images in [0, 1], without mean and standard deviation"


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: of the family, as messages and the sidecar show it.
        container: regular expression for the path of the table that holds the encoder, joined by `/`.
        prefix: regular expression for the prefix without its last dot.
        beside: regular expressions, each of which has to be found in a name in the table, beside it or above it.
        scheme: how its tensors are named.
        preferred: regular expression for `container:prefix` of the encoder to convert, where the general order of
            preference is not right.
        pixels: statistics of its images: `imagenet`; `unit` (images in [0, 1]); `measured`, one of these two by the
            first layer's running means; `own`, `detectron2`, `caffe2`: as the file, one beside it or the project says.
        warning: a caveat for the user.
    """

    name: str
    container: str = ""
    prefix: str = ""
    beside: tuple[str, ...] = ()
    scheme: Scheme = TORCHVISION
    preferred: str = ""
    pixels: str = "imagenet"
    warning: str = ""

    def fits(self, container: Container, prefix: str, scheme: Scheme) -> bool:
        """Whether an encoder is of this family."""
        return (
            scheme is self.scheme
            and re.fullmatch(self.container, container.label) is not None
            and re.fullmatch(self.prefix, prefix) is not None
            and all(re.search(pattern, container.surroundings, re.MULTILINE) for pattern in self.beside)
        )


FAMILIES = (
    Family(
        "CorInfoMax (this project), pretraining",
        "model",
        "encoder",
        ("^format$", "^objective$"),
        pixels="own",
    ),
    Family("CorInfoMax (this project), fine-tuned", "model", "encoder", ("^format$", r"^head\."), pixels="own"),
    Family("CorInfoMax (this project), encoder", "", "", ("^metadata format=corinfomax-encoder$",), pixels="own"),
    Family("VISSL", "(.*/)?trunk|model_state_dict", r"(.*\.)?_feature_blocks"),
    Family("DINO, full", "teacher|student", "backbone", preferred="teacher:backbone"),
    Family("SlotCon", "model", "encoder_[qk]", (r"^grouping_[qk]\.",), preferred="model:encoder_k"),
    Family("PixPro", "model", "encoder(_k)?", (r"^projector_k\.", r"^encoder_k\.")),
    Family("MoCo v3", ".*", "base_encoder|momentum_encoder"),
    Family("DenseCL, full", "state_dict", r"backbone|encoder_[qk]\.0", ("^queue2$",)),
    Family("mmselfsup / OpenSelfSup, MoCo", "state_dict", r"backbone|encoder_[qk]\.0", (r"^encoder_q\.0\.",)),
    Family(
        "mmselfsup / OpenSelfSup, BYOL",
        "state_dict",
        r"backbone|(online|target)_net\.0",
        (r"^online_net\.0\.",),
    ),
    Family("mmselfsup / OpenSelfSup, extracted", "state_dict", "", ("^author$",)),
    Family("mmselfsup / OpenSelfSup", "state_dict", "backbone", ("^meta$",)),
    Family("MoCo v1/v2, PCL", ".*", "encoder_[qk]", ("^queue",)),
    Family("PIRL or InfoMin (PyContrast, jigsaw)", "model(_ema)?", "encoder", (r"^(head_)?jig", "^opt$")),
    Family("InsDis, MoCo or InfoMin (PyContrast)", "model(_ema)?", "encoder", ("^opt$",)),
    Family("SimSiam", "state_dict", "encoder", (r"^predictor\.",)),
    Family("VICRegL", "model", "backbone", (r"^(\w+_)?maps_projector\.",)),
    Family("Barlow Twins, full", "model", "backbone", (r"^bn\.running_mean$", r"^projector\.")),
    Family("VICReg, full", "model", "backbone", (r"^projector\.",)),
    Family("CorInfoMax (authors), full", "model_state_dict", "backbone", (r"^projector\.",)),
    Family("VICReg, CorInfoMax or Barlow Twins, fine-tuned", "model", "0", (r"^1\.weight$",)),
    Family(
        "lightly-train",
        ".*",
        r"(.*\.)?(wrapped_model|embedding_model)(\..*)?",
        ("lightly",),
        preferred=r".*teacher_embedding_model.*",  # the side that its export command writes
    ),
    Family(
        "lightly benchmark",
        "state_dict",
        "(query_|key_)?backbone",
        ("^(online_classifier|query_|projection_head)",),
    ),
    Family("lightly benchmark, student and teacher", "state_dict", ".*(student|teacher).*", ("lightning",)),
    Family("solo-learn", "state_dict", "(momentum_)?(backbone|encoder)", ("pytorch-lightning_version",)),
    Family(
        "solo-learn or another Lightning module",
        "state_dict",
        "backbone|encoder",
        (r"^(classifier|projector)\.",),
    ),
    Family("SwAV, DeepCluster v2 or SeLa v2", "(state_dict)?", "", (r"^(projection_head|prototypes)\d*\.",)),
    Family(
        "timm training checkpoint",
        "state_dict(_ema)?",
        "",
        ("^arch$", "^(args|version)$"),
        preferred="state_dict_ema:",
    ),
    Family("SimCLR v1, or torchvision names in state_dict", "state_dict", "", pixels="measured"),
    Family("torchvision names, flat", "", ""),
    Family("lightly", ".*", ".*", scheme=SEQUENTIAL),
    Family("lightly, CIFAR", ".*", ".*", scheme=SEQUENTIAL_CIFAR),
    Family("Hugging Face transformers", ".*", ".*", scheme=HUGGING_FACE),
    Family("SimCLR v2 (PyTorch)", ".*", ".*", scheme=SIMCLR_V2, pixels="unit", warning=NO_NORMALISATION),
    Family("BYOL (DeepMind)", ".*", ".*", scheme=HAIKU, preferred=".*online:.*", warning=SAME_PADDING),
    Family("Detectron2", ".*", ".*", scheme=DETECTRON2, pixels="detectron2"),
    Family("Caffe2 (Detectron, MSRA)", ".*", ".*", scheme=CAFFE2, pixels="caffe2"),
    Family("torchvision names, wrapped", ".*", ".*"),
)

# Order of preference between the encoders of a file, after the published transfer results: an extracted encoder, the
# plain backbone, the query side. The momentum side is taken only where a family prefers it.
_ORDER = (
    r"",
    r"(.*\.)?backbone",
    r"(.*\.)?encoder_q(\..*)?",
    r"(.*\.)?base_encoder",
    r"(.*\.)?encoder",
    r"online_net\.0",
)
_MOMENTUM = re.compile(r"(^|[/.:_])(encoder_k|momentum|target|teacher|ema|key|shadow)([/.:_]|$)")

# Parts beside an encoder that may be left out, by the first part of the name: heads, projectors, queues, prototypes,
# the other side of a Siamese pair, the other parts of a detector.
DROPPABLE = re.compile(
    r"\d+|encoder_q|fc\d*(_.*)?"
    r"|.*heads?\d*(_.*)?|.*classif.*|linear.*|logits|global_pool|avgpool|.*proj.*|.*pred.*|necks?|queue.*|proto.*"
    r"|momentum.*|.*_k|.*_ema|ema.*|.*teacher.*|.*student.*|target.*|online.*|key_.*|query_.*|centers?|criterion|.*loss.*"
    r"|objective|jig.*|contrast.*|memory.*|bank.*|grouping.*|slot.*|value_transform.*|maps_.*|bn|mean|std|normalize"
    r"|temperature|logit_scale|.*metric.*|.*acc(uracy)?|knn.*|anchor.*|rpn|roi_heads|proposal_generator|fpn.*|top_block"
    r"|n_averaged|steps|attacker|normali[sz]er|pixel_(mean|std)|aux.*|counter|fc1000_[wb]|pred_[wb]|jigsaw.*"
    r"|transform.*|mixer|embedding_model|wrapped_model"
)

# Networks other than ResNets, by the name of one of their tensors.
OTHER_NETWORKS = (
    (r"(^|\.)(patch_embed|patch_embeddings|conv_proj|cls_token|pos_embed)(\.|$)", "a vision transformer"),
    (r"encoder_layer_0|blocks\.0\.attn", "a vision transformer"),
    (r"(^|\.)conv_stem\.weight", "an EfficientNet or a MobileNet"),
    (r"downsample_layers\.0\.0\.weight|\.dwconv\.|\.conv_dw\.", "a ConvNeXt or another depthwise network"),
    (r"trunk_output\.block1|(^|\.)s1\.b1\.", "a RegNet"),
    (r"denseblock1|denselayer1", "a DenseNet"),
    (r"(^|\.)layer1\.0\.conv\d\.(conv|paths)", "a ResNet with selective kernels"),
    (r"(^|\.)stages\.0\.blocks\.0\.(norm1|conv1)\.weight", "a pre-activation ResNet (BiT, ResNet v2)"),
    (r"(^|\.)features\.0\.(0\.)?weight", "a VGG, AlexNet or MobileNet"),
    (r"_flat_param|flat_param_\d", "FSDP's flattened shards; gather them into a full state dict first"),
)  # fmt: skip


def find_family(container: Container, prefix: str, scheme: Scheme) -> Family:
    """The family of an encoder; the last row fits every encoder."""
    return next(family for family in FAMILIES if family.fits(container, prefix, scheme))


def preference(family: Family, container: Container, prefix: str) -> int:
    """The rank of an encoder among those of a file; the lowest is taken."""
    branch = f"{container.label}:{prefix}"
    if family.preferred and re.fullmatch(family.preferred, branch):
        return -1
    if _MOMENTUM.search(branch):
        return len(_ORDER) + 1
    return next((rank for rank, pattern in enumerate(_ORDER) if re.fullmatch(pattern, prefix)), len(_ORDER))


def name_other_network(names: list[str]) -> str | None:
    """The network in a file without a ResNet, if its names tell."""
    return next((what for pattern, what in OTHER_NETWORKS if any(re.search(pattern, name) for name in names)), None)
