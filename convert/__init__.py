"""Weights of any public self-supervised ResNet into Detectron2, and back; the commands are `to_d2` and `from_d2`.

The path of a file:

- It is read without running anything in it: `reader` (what kind of file), `archives` (PyTorch's two formats), `pickles`
  (the machine that reads a pickle), `stand_ins` (what the names in a pickle stand for), `tensors` (what comes out).
- `containers` finds its tables of tensors, `naming` and `families` recognise encoders by their names and surroundings,
  `architecture` says which ResNet it is, `selection` chooses one and accounts for everything beside it.
- `pixels` finds out what it expects of images. `export` and `writer` write it, `sidecar` describes it and says
  what a configuration has to set, and `verify` compares it with Detectron2's network.

`encoders` is for the other packages: the same path, with the result in memory. To add a family of checkpoints, add a
row to `families.FAMILIES`, and to `naming.SCHEMES` where its tensors are named in a way of their own.
"""
