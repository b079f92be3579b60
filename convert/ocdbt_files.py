"""In which file of an orbax checkpoint the values of an array are, to name it in a message."""

from pathlib import Path
from urllib.parse import unquote

__all__ = ["value_files"]


def value_files(item: Path, name: str) -> list[str]:
    """The files that hold the values of one array.

    Args:
        item: the directory of the tree.
        name: of the array in it.

    Returns:
        Paths relative to the directory, in order.
    """
    if not (item / "manifest.ocdbt").is_file():
        return sorted(str(path.relative_to(item)) for path in (item / name).rglob("*") if path.is_file())
    import tensorstore as ts

    base = ts.KvStore.open({"driver": "file", "path": f"{item.absolute()}/"}).result()
    found, start = set(), f"{name}/".encode()

    def walk(node: str, prefix: bytes) -> None:
        for entry in ts.ocdbt.dump(base, node).result()["entries"]:
            if "location" in entry:
                walk(entry["location"], prefix + entry.get("subtree_common_prefix", b""))
            elif "indirect_value" in entry and (prefix + entry["key"]).startswith(start):
                # "value:DIRECTORY:FILE:offset:length"
                found.add("".join(unquote(part) for part in entry["indirect_value"].split(":")[1:3]))

    walk(ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"], b"")
    return sorted(found)
