"""Packaging of CorInfoMax: pretraining, conversion and detection transfer.

Packages are listed by hand, because a search would ship the tests as a top-level package.
"""

from pathlib import Path

from setuptools import Extension, setup

DETECTION = [
    # What Detectron2's Python tree imports. Detectron2 itself: python -m detection.install
    "pycocotools>=2.0.6",
    "faster-coco-eval>=1.6",
    "shapely>=2.0",  # cuts polygons where training images are cropped
    "omegaconf>=2.1,<2.4",
    "hydra-core>=1.1",
    "cloudpickle",
    "termcolor>=1.1",
    "tabulate",
    "packaging",
]

setup(
    name="corinfomax",
    version="0.1.0",
    description="Self-supervised pretraining with CorInfoMax, and its transfer to detection and segmentation",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    url="https://arxiv.org/abs/2209.07999",
    classifiers=["Operating System :: POSIX :: Linux", "Programming Language :: Python :: 3.11"],
    python_requires=">=3.11",
    packages=[
        "configs",
        "convert",
        "detection",
        *(f"detection.{room}" for room in ("checks", "data", "evaluation", "training")),
        "foundation",
        "pretrain",
        *(f"pretrain.{room}" for room in ("batches", "distributed", "evaluation", "images", "runs", "training")),
        "reporting",
        "shapes",
    ],
    # Not a Python module: pretrain/batches/resizing.py loads it, and does without it where there is no C compiler.
    ext_modules=[
        Extension(
            "pretrain.batches._resizing",
            ["pretrain/batches/resizing.c"],
            extra_compile_args=["-O3"],
            optional=True,
        )
    ],
    package_data={"configs": ["*.yaml", "*/*.yaml", "*/*.txt"], "reporting": ["templates/*.html"]},
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy>=1.26",
        "pillow>=11",
        "simplejpeg>=1.7",
        "fvcore",
        "iopath",
        "yacs",
        "PyYAML",
        "jinja2",
        "tabulate",
        "safetensors",
        "tensorboard",
        "tqdm",
        "matplotlib",
        "scikit-learn",
        "filelock",
    ],
    extras_require={
        "detection": DETECTION,
        "lvis": ["lvis"],
        "cityscapes": ["cityscapesscripts", "shapely"],
        "baselines": ["lightly>=1.5"],
        "wandb": ["wandb"],
        "onnx": ["onnx", "onnxruntime", "onnxscript"],  # detection/export.py --output detector.onnx
        "video": ["av"],  # detection/predict.py
        "remote": ["fsspec", "s3fs", "gcsfs"],  # DATA.ROOT s3://... and gs://...
        "dev": [
            *DETECTION,
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "mypy",
            "import-linter",
            "types-PyYAML",
            "types-tqdm",
            "timm",
        ],
    },
    entry_points={
        "console_scripts": [
            "corinfomax-pretrain = pretrain.train:cli",
            "corinfomax-linear = pretrain.linear:cli",
            "corinfomax-finetune = pretrain.finetune:cli",
            "corinfomax-transfer = pretrain.transfer:cli",
            "corinfomax-sweep = pretrain.sweep:cli",
            "corinfomax-figures = pretrain.figures:cli",
            "corinfomax-embed = pretrain.embed:cli",
            "corinfomax-pack = pretrain.pack:cli",
            "corinfomax-to-d2 = convert.to_d2:cli",
            "corinfomax-from-d2 = convert.from_d2:cli",
            "corinfomax-detect = detection.train_net:cli",
            "corinfomax-predict = detection.predict:cli",
            "corinfomax-export = detection.export:cli",
            "corinfomax-report = detection.report:cli",
        ]
    },
)
