import errno
import os
from pathlib import Path

import pytest

from batchclf.system.paths import nearest, unread


def test_what_is_not_there_is_told_with_what_is_spelt_most_like_it(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "phantoms.txt").touch()
    assert nearest(tmp_path / "phtos") == f"; did you mean {tmp_path / 'photos'}?"
    assert nearest(tmp_path / "quite other") == ""
    assert nearest(tmp_path / "photos") == "", "what is there is not meant otherwise"
    assert nearest(tmp_path / "nowhere" / "photos") == ""


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOENT, "name one that is there"),
        (errno.EISDIR, "name the file in it"),
        (errno.ENOTDIR, "leads through is a file"),
        (errno.EACCES, "let this user read it"),
        (errno.EIO, "mend what it lies on"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_with_what_to_do(number: int, advice: str) -> None:
    told = unread(Path("/x/labels.txt"), OSError(number, os.strerror(number)))
    assert told.startswith(f"{os.strerror(number)}; ")
    assert advice in told
