"""Files that are there whole or not at all, and checkpoints that are read only if they are sound."""

import errno
import io
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_model
from lightning.fabric.plugins import TorchCheckpointIO

from slm.durable import replace_file, sweep
from slm.errors import InputError, NotWrittenError
from slm.run.checkpoint import open_checkpoint, read_checkpoint
from slm.run.checkpoint_io import DurableCheckpointIO


class Malicious:
    """Makes a file `ran` when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def content(step: int = 1) -> dict[str, Any]:
    model = small_model()
    state = {name: value + step for name, value in model.state_dict().items()}
    return {"hyper_parameters": dict(model.hparams), "state_dict": state, "global_step": step, "optimizer_states": []}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["state_dict"].keys() == b["state_dict"].keys() and all(
        torch.equal(value, b["state_dict"][name]) for name, value in a["state_dict"].items()
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The order in which a file is written, made durable and named."""
    made: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        is_folder = os.path.isdir(f"/proc/self/fd/{descriptor}")
        made.append("fsync folder" if is_folder else "fsync file")
        fsync(descriptor)

    def noting_replace(source: Path, target: Path) -> None:
        assert source.parent == target.parent
        made.append(f"replace {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    return made


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux to tell a folder from a file")
def test_a_file_is_durable_before_it_gets_its_name_and_the_name_after(workdir: Path, calls: list[str]) -> None:
    replace_file(workdir / "file", b"new")
    assert calls == ["fsync file", "replace file", "fsync folder"]
    assert (workdir / "file").read_bytes() == b"new"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_is_an_error_and_leaves_the_old_content_and_nothing_else(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    (workdir / "file").write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(NotWrittenError, match=r"file cannot be written: No space left on device"):
        replace_file(workdir / "file", b"new")
    assert [path.name for path in workdir.iterdir()] == ["file"]
    assert (workdir / "file").read_bytes() == b"old"


def test_what_a_kill_left_is_swept_and_nothing_else(workdir: Path) -> None:
    for name in ("last.ckpt", "last.ckpt.unfinished", "notes.tmp"):
        (workdir / name).touch()
    (workdir / "mine.unfinished").mkdir()
    sweep(workdir)
    assert sorted(path.name for path in workdir.iterdir()) == ["last.ckpt", "mine.unfinished", "notes.tmp"]


def test_a_checkpoint_is_written_beside_its_place_and_not_in_the_folder_for_temporary_files(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(workdir / "there is no such folder"))
    DurableCheckpointIO().save_checkpoint(content(), workdir / "deep/last.ckpt")
    assert [path.name for path in (workdir / "deep").iterdir()] == ["last.ckpt"]
    assert same(DurableCheckpointIO().load_checkpoint(workdir / "deep/last.ckpt"), content())


def test_a_url_is_left_to_lightnings_own_writer(workdir: Path) -> None:
    DurableCheckpointIO().save_checkpoint(content(), "memory://folder/last.ckpt")
    assert same(DurableCheckpointIO().load_checkpoint("memory://folder/last.ckpt"), content())
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize("place", ["last.ckpt", "memory://bad/last.ckpt"])
def test_nothing_makes_the_reader_run_code(workdir: Path, place: str) -> None:
    TorchCheckpointIO().save_checkpoint({**content(), "more": Malicious()}, place)
    with pytest.raises(Exception, match=r"run code|Weights only load failed"):
        DurableCheckpointIO().load_checkpoint(place, weights_only=False)
    assert not Path("ran").exists()


def test_a_flipped_bit_is_refused_or_changes_nothing(workdir: Path) -> None:
    buffer = io.BytesIO()
    torch.save(content(), buffer)
    sound, rng, refused = buffer.getvalue(), random.Random(0), []
    for _ in range(300):
        damaged = bytearray(sound)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        Path("damaged.ckpt").write_bytes(damaged)
        try:
            assert same(read_checkpoint(Path("damaged.ckpt")), content())
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert all(message.startswith("damaged.ckpt is") for message in refused)


def test_the_crc_is_what_refuses_a_changed_weight(workdir: Path) -> None:
    torch.save(content(), "sound.ckpt")
    damaged = bytearray(Path("sound.ckpt").read_bytes())
    weight = content()["state_dict"]["transformer.final_norm.weight"].numpy().tobytes()
    damaged[damaged.index(weight) + 2] ^= 1
    Path("damaged.ckpt").write_bytes(damaged)
    assert not same(torch.load("damaged.ckpt", weights_only=True), content())
    with pytest.raises(InputError, match=r"damaged.ckpt is damaged .* CRC-32"):
        read_checkpoint(Path("damaged.ckpt"))


def kept(step: int, name: str, **changes: Any) -> Path:
    path = Path("runs/version_0/checkpoints") / name
    DurableCheckpointIO().save_checkpoint({**content(step), **changes}, path)
    return path


def test_last_falls_back_to_the_furthest_sound_checkpoint_of_the_run_and_says_so(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept(3, "best.ckpt")
    expected = kept(7, "mine.ckpt")
    kept(9, "last.ckpt").write_bytes(b"damaged")
    kept(8, "other.ckpt").write_bytes(b"damaged")
    path, found = open_checkpoint("last")
    assert (path, found["global_step"]) == (expected, 7)
    said = capsys.readouterr().err
    assert "last.ckpt is damaged" in said
    assert "mine.ckpt, of step 7, is taken in its place" in said


@pytest.mark.parametrize("asked", ["best", "runs/version_0/checkpoints/last.ckpt"])
def test_a_damaged_checkpoint_that_was_named_is_refused(workdir: Path, asked: str) -> None:
    kept(1, "best.ckpt").write_bytes(b"damaged")
    kept(2, "last.ckpt").write_bytes(b"damaged")
    kept(3, "mine.ckpt")
    with pytest.raises(InputError, match=r"(best|last)\.ckpt is damaged"):
        open_checkpoint(asked)


def test_last_falls_back_where_it_is_missing_and_the_best_is_damaged(workdir: Path) -> None:
    kept(3, "best.ckpt").write_bytes(b"damaged")
    expected = kept(2, "mine.ckpt")
    assert open_checkpoint("last")[0] == expected


def test_where_none_is_sound_the_last_one_is_refused(workdir: Path) -> None:
    kept(2, "last.ckpt").write_bytes(b"")
    with pytest.raises(InputError, match=r"last\.ckpt is damaged"):
        open_checkpoint("last")
