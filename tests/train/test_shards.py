"""Checkpoints of tensors that are spread over processes: every process a file, nobody the whole, and no pickle."""

import contextlib
import logging
import resource

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from restpoint.train.checkpoint import is_spread, pack, read_tree, write_tree
from restpoint.train.folder import RunFolder
from restpoint.train.parallel import Parallel
from restpoint.train.shards import Stored, missing, read_shards, write_shards
from restpoint.zoo import CheckpointError

ALONE = Parallel(0, 1, torch.device("cpu"), "fsdp")
WEIGHT, NARROW = torch.arange(15.0).view(5, 3), torch.arange(2, dtype=torch.bfloat16).view(1, 2)


@contextlib.contextmanager
def process(rank, world):
    """This process as one of several, which are not there: torch's fake group sends nothing."""
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=world)
    try:
        # Meshes of one name are one to DTensor's caches, whichever process they were first met in.
        yield init_device_mesh("cpu", (world,), mesh_dim_names=(f"rank_{rank}",))
    finally:
        dist.destroy_process_group()


def spread(whole, mesh):
    """The part of `whole` that this process holds, as FSDP cuts it; the last ones may get nothing."""
    rows = -(-len(whole) // mesh.size())
    part = whole[mesh.get_local_rank() * rows :][:rows].clone()
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def tree(mesh, step=1):
    weight = spread(WEIGHT + step, mesh)
    return {
        "step": step,
        "model": {"weight": weight, "tied": weight, "running": torch.tensor(0.5), "narrow": spread(NARROW, mesh)},
        "rates": [0.1, None],
    }


def write_parts(folder, world):
    folder.mkdir()
    for rank in range(world):
        with process(rank, world) as mesh:
            write_shards(folder, {"weight": spread(WEIGHT, mesh), "narrow": spread(NARROW, mesh)}, rank)


def stored(folder):
    return {
        "weight": Stored(folder, "weight", (5, 3), torch.float32),
        "narrow": Stored(folder, "narrow", (1, 2), torch.bfloat16),
    }


@pytest.mark.parametrize("before, after", [(1, 3), (3, 2), (2, 4), (4, 1)])
def test_parts_of_so_many_processes_are_read_by_so_many_others(before, after, tmp_path):
    write_parts(tmp_path / "parts", before)
    files = sorted((tmp_path / "parts").iterdir())
    assert [file.suffix for file in files] == [".safetensors"] * before
    rows = [len(safetensors.torch.load_file(file)["weight"]) for file in files]
    assert max(rows) == -(-5 // before), "no process writes more than its part"
    for rank in range(after):
        with process(rank, after) as mesh:
            templates = {"weight": spread(torch.zeros(5, 3), mesh), "narrow": spread(NARROW * 0, mesh)}
            found = read_shards(stored(tmp_path / "parts"), templates)
            for name, whole in (("weight", WEIGHT), ("narrow", NARROW)):
                assert found[name].to_local().equal(spread(whole, mesh).to_local())
                assert found[name].dtype == whole.dtype
    whole = read_shards(stored(tmp_path / "parts"), {})
    assert whole["weight"].equal(WEIGHT)
    assert not isinstance(whole["weight"], DTensor)


def test_a_part_that_is_not_there_is_missed(tmp_path):
    write_parts(tmp_path / "parts", 2)
    wanted = list(stored(tmp_path / "parts").values())
    assert missing(wanted) == ""
    next((tmp_path / "parts").glob("*00002-model*")).unlink()
    assert "holds 9 of the 15 numbers of weight" in missing(wanted)


def test_a_run_keeps_the_last_two_and_falls_back(tmp_path, caplog):
    with process(0, 1) as mesh, RunFolder(tmp_path) as folder:
        for step in (1, 2, 3):
            assert folder.save(tree(mesh, step), ALONE)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "lock", "previous"]
        back = folder.load()
        assert (back["step"], back["rates"], float(back["model"]["running"])) == (3, [0.1, None], 0.5)
        assert read_shards(back["model"] | {"running": back["model"]["weight"]}, {})["tied"].equal(WEIGHT + 3)

        part = next((tmp_path / "checkpoint" / "parts").iterdir())
        part.write_bytes(part.read_bytes()[:-1])
        with caplog.at_level(logging.WARNING):
            assert folder.load()["step"] == 2
        assert "not a whole checkpoint" in caplog.text
        assert "the checkpoint before, of step 2" in caplog.text
        # What is damaged never takes the place of what is whole.
        assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "lock", "previous"]
        assert folder.save(tree(mesh, 4), ALONE)
        assert [read_tree(tmp_path / name)["step"] for name in ("checkpoint", "previous")] == [4, 2]


def test_a_file_and_a_folder_take_turns(tmp_path):
    with process(0, 1) as mesh, RunFolder(tmp_path) as folder:
        assert folder.save({"step": 1}, ALONE)
        assert folder.save(tree(mesh, 2), ALONE)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "lock", "previous.safetensors"]
        assert folder.save({"step": 3}, ALONE)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "lock", "previous"]
        assert folder.load()["step"] == 3


def test_a_full_disk_leaves_what_was_there(tmp_path, caplog):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with process(0, 1) as mesh, RunFolder(tmp_path) as folder:
        assert folder.save(tree(mesh, 1), ALONE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, limit[1]))
            with caplog.at_level(logging.WARNING):
                assert not folder.save(tree(mesh, 2), ALONE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert "process 0: [Errno 27] File too large" in caplog.text
        assert "step 2 could not be written" in caplog.text
        assert folder.load()["step"] == 1
    # The next run clears away what this one left.
    with RunFolder(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "lock"]


def test_what_is_spread_goes_to_no_single_file(tmp_path):
    with process(0, 2) as mesh:
        held = DTensor.from_local(torch.ones(2), mesh, [Replicate()], run_check=False)
        assert is_spread({"a": [held]})
        assert not is_spread({"a": [torch.ones(2)]})
        with pytest.raises(CheckpointError, match="a is spread over processes"):
            pack({"a": held})
        with pytest.raises(CheckpointError):
            write_tree(tmp_path / "t", {"a": held})
    assert not list(tmp_path.iterdir())


def test_processes_that_do_not_share_the_folder_are_told(tmp_path):
    # Of two processes, only this one's parts are there.
    with process(0, 2) as mesh, RunFolder(tmp_path) as folder:
        with pytest.raises(CheckpointError, match="all processes must see the same run's folder"):
            folder.save(tree(mesh), ALONE)
        assert not folder.holds_run
