"""One yaml per published recipe, a folder per command: `pretrain/`, `linear/`, `finetune/`, `detection/`."""
