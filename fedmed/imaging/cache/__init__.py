"""Decoded images, kept in memory-mapped files that all processes of a machine share.

What is kept of an image is found by the content of its file and by how it was read: a moved, copied or touched file
finds it, and an edited one does not. A folder holds

* `index.sqlite`: which content lies where (`index`), and the digest of every file seen, so that it is hashed once
  (`digests`);
* segments, `NAME.images.u1` and the like: bare arrays, each written by one process and then only read (`segments`).

A segment's bytes are on disk before the index speaks of them, so a process killed at any moment leaves at most bytes
that nobody refers to, and everything that it committed is used by the next. Two processes that decode the same image
write it twice, and both use the one that was committed first. Above its size the segments that were used longest ago
go, but never one that is in use (`upkeep`): every reader holds a shared lock for as long as it maps the file.

The folder is for its owner alone: it holds pixels. It holds no names: a path is kept as a keyed hash.
"""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where simulations keep decoded images: `$FEDMED_CACHE`, or `~/.fedmed/cache`."""
    return Path(os.environ.get("FEDMED_CACHE") or Path.home() / ".fedmed" / "cache")
