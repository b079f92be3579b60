"""The converter: PyTorch checkpoints <-> orbax, one tensor at a time, with one table for both directions.

rules.py       the table: names and rearrangements
tensors.py     lazy reading of safetensors, one file or several; torch_bin.py: of pytorch_model*.bin
leaves.py      parameters that are read a region at a time, from PyTorch tensors or memory; from_orbax.py: from orbax
source.py      what a SOURCE is, and opening it
to_orbax.py    parameters -> an orbax checkpoint; chunks.py: how it is cut; hosts.py: which process writes what
to_hf.py       parameters -> safetensors shards
blocks.py      fast copies between arrays of different order
whole.py       a directory appears whole or not at all; manifest.py: what was converted from what; progress.py: bars
conversion.py  the `convert` command; verify.py, stages.py, report.py: the `verify` command; cli.py: their arguments
"""
