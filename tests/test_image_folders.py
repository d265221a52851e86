"""Image files in folders: which are found, and what is said of the others."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from PIL import Image

from deflow_aug import image_folders
from deflow_aug.cli import main
from deflow_aug.image_files import IMAGE_SUFFIXES, UNREAD_SUFFIXES, UnreadableImageError
from deflow_aug.image_folders import find_images


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_find_images(tmp_path: Path) -> None:
    listed = ["B.PNG", "a.jpg", "sub/d.webp", "sub/deeper/c.TIFF", "sub-x/e.jpeg"]
    left_out = ["notes.txt", "png", ".hidden.png", ".cache/f.png", "sub/.g.jpg", "x.png.tmp"]
    for name in listed + left_out:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert find_images(str(tmp_path)) == [tmp_path / name for name in listed]


def test_find_images_in_a_hidden_root(tmp_path: Path) -> None:
    (tmp_path / ".data").mkdir()
    assert find_images(tmp_path / ".data") == []
    (tmp_path / ".data" / "a.png").touch()
    assert find_images(tmp_path / ".data") == [tmp_path / ".data" / "a.png"]


def test_find_images_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        find_images(tmp_path / "missing")
    (tmp_path / "a.png").touch()
    with pytest.raises(NotADirectoryError, match=r"got a file: .*a\.png"):
        find_images(tmp_path / "a.png")


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    for folder in ("elsewhere", "photos/own"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "a.png")
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "own" / "circle").symlink_to(tmp_path / "photos")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos" / "own")
    found = [path.relative_to(tmp_path / "photos") for path in find_images(tmp_path / "photos")]
    assert len(found) == 2
    assert {path.resolve() for path in find_images(tmp_path / "photos")} == {
        tmp_path / "elsewhere" / "a.png",
        tmp_path / "photos" / "own" / "a.png",
    }


def test_photographs_that_are_not_read_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.HEIC", "c.nef", "sub/d.heic", ".e.heic", "f.txt", "sub/g.avi")
    expected = (
        rf"passed over 3 files in {tmp_path} of kinds that are not read: \.heic 2, \.nef 1; convert"
    )
    with pytest.warns(UserWarning, match=expected) as told:
        assert find_images(tmp_path) == [tmp_path / "a.png"]
    assert len(told) == 1


def test_it_is_said_once_of_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.heic")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        find_images(tmp_path)
        find_images(tmp_path)
    assert len(told) == 1


def test_nothing_is_said_where_all_are_read(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt", *(f"a{suffix}" for suffix in IMAGE_SUFFIXES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(find_images(tmp_path)) == len(IMAGE_SUFFIXES)


def test_a_folder_of_nothing_but_such_photographs(tmp_path: Path) -> None:
    touch(tmp_path, "a.heic", "b.dng", "c.dng")
    with pytest.raises(UnreadableImageError, match=r"\(\.dng 2, \.heic 1\); convert them to PNG"):
        find_images(tmp_path)


def test_avif_without_pillows_support(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.avif", "b.png")
    monkeypatch.setattr(image_folders, "IMAGE_SUFFIXES", IMAGE_SUFFIXES - {".avif"})
    monkeypatch.setattr(image_folders, "UNREAD_SUFFIXES", UNREAD_SUFFIXES | {".avif"})
    with pytest.warns(UserWarning, match=r"not read: \.avif 1;"):
        assert find_images(tmp_path) == [tmp_path / "b.png"]


@pytest.mark.usefixtures("locked")
def test_folders_that_cannot_be_searched(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "locked/b.png")
    with pytest.raises(OSError, match=r"folder .*locked: Permission denied; make it readable"):
        find_images(tmp_path)
    refused: list[OSError] = []
    assert find_images(tmp_path, refused.append) == [tmp_path / "a.png"]
    assert [error.filename for error in refused] == [str(tmp_path / "locked")]


@pytest.mark.parametrize(
    "command",
    [
        "degrade {}",
        "train --clean {} --degraded {}/sub",
        "train --clean {}/sub --degraded {}",
        "train --paired {}",
        "adapt --degraded {} --name a",
        "suggest --clean {} --degraded {}/sub",
        "evaluate --clean {} --degraded {}",
    ],
)
def test_every_command_tells_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    photos = tmp_path / "photos"
    touch(photos, "a.heic", "sub/b.heic")
    words = [word.format(photos) for word in command.split()]
    if words[0] != "evaluate":
        words.append(f"--output={tmp_path / 'out'}")
    assert main(words) == 2
    assert ".heic" in capsys.readouterr().err
