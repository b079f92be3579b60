"""Records: what a line, a row or a file asks for, read in one way by batch jobs and training. Imports no jax.

conversations.py   a decoded record -> messages in the chat format
columns.py         which columns are read, and what becomes of others; layouts.py: what they mean as messages
places.py          pictures in columns beside messages -> their places in them
request.py         the body of a line of an OpenAI batch
record.py          a record of a batch job: id, messages, sampling arguments of its own
values.py          values of tables as what they were meant to be; values that cannot be read
sources/           files, directories and globs -> records; kinds.py: endings of pictures and videos
arrow.py           pyarrow, where it is installed
"""
