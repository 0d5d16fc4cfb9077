"""Many images made of a few, without what only tests need."""

import itertools
import os
import shutil
from pathlib import Path


def link_images(source: Path, folder: Path, num_images: int) -> Path:
    """A folder of `num_images` names, hard links to the images of `source` as far as possible."""
    folder.mkdir()
    originals = sorted(path for path in source.rglob("*") if path.is_file())
    for number, path in enumerate(itertools.islice(itertools.cycle(originals), num_images)):
        target = folder / f"{number:06d}{path.suffix}"
        try:
            os.link(path, target)
        except OSError:  # another file system
            shutil.copyfile(path, target)
    return folder
