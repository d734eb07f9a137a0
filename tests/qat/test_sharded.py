"""FSDP2: parameters are shards between the layers' calls, and the checkpoint is the same."""

import pytest
import torch
import torch.distributed as dist

from blockscale.qat import export
from tests import data
from tests.qat.models import checkpoints, prepared, train

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")


@pytest.fixture
def mesh():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(("recipe", "scales"), [("w4a8", "learned"), ("ue8m0", "dynamic")])
def test_a_sharded_model_trains_and_is_exported_alike(tmp_path, mesh, recipe, scales):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    source = checkpoints.make(tmp_path / "source", "deepseek_v3")
    whole, sharded = (prepared(source, recipe, scales) for _ in range(2))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert train(sharded, 2) == train(whole, 2)
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    export(sharded, tmp_path / "sharded", state_dict=state)
    export(whole, tmp_path / "whole")
    found, expected = (data.read(tmp_path / name) for name in ("sharded", "whole"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in found)
