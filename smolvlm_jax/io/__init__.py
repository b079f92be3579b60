"""Files on disk: written whole or not at all, read with errors that name them. Imports neither jax nor numpy.

files.py         locks, unique names, atomic files
text.py          text and JSON
directories.py   atomic directories, free space
companions.py    the small files that accompany the weights of a checkpoint
"""

from .companions import COMPANIONS, companion_files, copy_companions
from .directories import check_free_space, say, temporary_directory, whole_directory
from .files import HOST, lock, remove_dead, sync_directory, try_lock, unique_name, whole_file
from .text import MAX_TEXT, create_json, parse_json, read_json, read_text, to_json, write_json, write_text

__all__ = [
    "COMPANIONS",
    "HOST",
    "MAX_TEXT",
    "check_free_space",
    "companion_files",
    "copy_companions",
    "create_json",
    "lock",
    "parse_json",
    "read_json",
    "read_text",
    "remove_dead",
    "say",
    "sync_directory",
    "temporary_directory",
    "to_json",
    "try_lock",
    "unique_name",
    "whole_directory",
    "whole_file",
    "write_json",
    "write_text",
]
