"""The converter: PyTorch checkpoints <-> orbax, one tensor at a time, with one table for both directions.

Each file imports only from those above it; `place.py`, `conversion.py` and `stages.py` also import the model.

regions.py           regions of arrays; blocks.py: fast copies between arrays of different order
rules.py             the table: names and rearrangements
readers.py           what a reader of PyTorch tensors is; safetensors_file.py, torch_bin.py: the two there are
tensors.py           which of them reads a directory
chunks.py            how an orbax checkpoint is cut; hosts.py: which process writes what
leaves.py            parameters that are read a region at a time, from PyTorch tensors or memory; from_orbax.py: from orbax
manifest.py          the small files of a checkpoint; digest.py: a hash of all its files
quantized.py         weights in 8 bits as leaves, written and read
opened.py            an open checkpoint; place.py: its parameters on a device or a mesh
progress.py          progress bars
to_hf.py             parameters -> safetensors shards; to_orbax.py: -> an orbax checkpoint
conversion.py        the `convert` command; verify.py, stages.py, report.py: the `verify` command; cli.py: their arguments
"""
