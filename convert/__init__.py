"""Weights from any public self-supervised ResNet into Detectron2, and back; the commands are `to_d2` and `from_d2`.

A file is read without running it (`reader`, `archives`, `pickles`, `tensors`), its tables of tensors are found
(`containers`), encoders in them are recognised by their names and surroundings (`naming`, `formats`), checked against
the networks that Detectron2 can build (`architecture`), and one is chosen and everything else accounted for
(`selection`). What it expects of images is found out (`normalisation`), and it is written with a note (`export`,
`sidecar`, `writer`), if asked for only after a numeric proof (`verify`).
"""
