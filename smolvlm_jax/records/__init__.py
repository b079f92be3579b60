"""Records: what a line, a row or a file asks for, read in one way by batch jobs and training. Imports no jax.

conversations.py   a decoded record -> messages in the chat format
record.py          a record of a batch job: id, messages, sampling arguments of its own
sources/           files, directories and globs -> records; arrow.py: pyarrow, where it is installed
"""
