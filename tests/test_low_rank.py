"""Low-rank corrections of a frozen trunk: what trains, what is saved, and that clipping is exact."""

import copy

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from toy import network as toy_network

from fedmed.config import ModelConfig
from fedmed.errors import ConfigError, ModelError
from fedmed.federated.simulation import check
from fedmed.models import build
from fedmed.models.low_rank import DOWN, UP, merged, require_trunk
from fedmed.training.clipping import GradientClipper
from fedmed.training.network import layout_of
from fedmed.training.predict.kept import kept_network

NETWORKS = [
    ("small-cnn", 4, "group", 2),
    ("small-cnn", 4, "batch", 3),
    ("unet", 4, "group", 2),
    ("cnn-lstm", 4, "group", 3),
]


def adapted(name: str, width: int = 4, norm: str = "group", dimensions: int = 2, rank: int = 2) -> torch.nn.Module:
    return build(
        ModelConfig(name=name, width=width, norm=norm, low_rank=rank), outputs=2, seed=3, dimensions=dimensions
    )


def moved(network: torch.nn.Module) -> torch.nn.Module:
    """The network with corrections as if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if f"{UP}." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize(("name", "width", "norm", "dimensions"), NETWORKS)
def test_the_merged_network_is_the_plain_one_with_the_same_output(name, width, norm, dimensions):
    network = adapted(name, width, norm, dimensions)
    plain = build(ModelConfig(name=name, width=width, norm=norm), outputs=2, seed=3, dimensions=dimensions).eval()
    images = torch.rand(2, 1, *[16] * dimensions, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network.eval()(images), plain(images)), "a correction begins as zero"
        expected = moved(network)(images)
        tensors = merged({key: value.numpy() for key, value in network.state_dict().items()})
        plain.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()}, strict=True)
        torch.testing.assert_close(plain(images), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, adapted(name, width, norm, dimensions).eval()(images))


def test_the_head_and_the_corrections_train_and_nothing_else():
    network = adapted("small-cnn", width=16)
    trained = [entry.name for entry in layout_of(network).parameters]
    assert all(name.startswith("classifier.") or DOWN in name or UP in name for name in trained)
    assert len(trained) == 2 + 2 * 4
    whole = build(ModelConfig(name="small-cnn", width=16), outputs=2, seed=3)
    assert layout_of(network).num_parameters < 0.1 * layout_of(whole).num_parameters
    assert layout_of(adapted("small-cnn")).hash == layout_of(adapted("small-cnn")).hash


@pytest.mark.parametrize(
    ("name", "norm", "dimensions"), [("small-cnn", "group", 2), ("small-cnn", "batch", 3), ("unet", "group", 2)]
)
def test_p06_a_patients_gradient_of_corrections_is_exact(name, norm, dimensions):
    network = moved(adapted(name, norm=norm, dimensions=dimensions)).double().train()
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(5, 1, *[16] * dimensions, generator=generator, dtype=torch.float64)
    patients = torch.tensor([0, 1, 1, 2, 0])

    def losses(outputs, targets):
        return outputs.flatten(1).square().mean(1)

    loop, trained = copy.deepcopy(network), [p for p in network.parameters() if p.requires_grad]
    expected = [torch.zeros_like(parameter) for parameter in trained]
    own = [parameter for parameter in loop.parameters() if parameter.requires_grad]
    for patient in range(3):
        loop.zero_grad()
        losses(loop(images[patients == patient]), None).sum().backward()
        norm_of = torch.cat([parameter.grad.flatten() for parameter in own]).norm()
        for total, parameter in zip(expected, own, strict=True):
            total += parameter.grad * min(1.0, 0.05 / float(norm_of))
    statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}
    clipper = GradientClipper(network, max_norm=0.05)
    clipper.accumulate_(losses, images, torch.zeros(5), patients)
    assert clipper.fallbacks == []
    for parameter, total in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.grad, total, rtol=1e-10, atol=1e-12)
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, statistics[name]), "frozen statistics stay as they were given"


@pytest.mark.simulation
@pytest.mark.parametrize("privacy", [{}, {"mode": "dp-sgd", "noise-multiplier": 1.0}])
def test_a_run_trains_corrections_of_given_weights_and_keeps_the_plain_network(privacy, toy_config, simulate, tmp_path):
    given = toy_network(in_channels=1, outputs=2, norm="group", width=0)
    save_file(given.state_dict(), tmp_path / "given.safetensors")
    config = toy_config(
        "a-40", "b-40", model={"low-rank": 2, "weights": str(tmp_path / "given.safetensors")}, privacy=privacy,
        server="server-40",
    )  # fmt: skip
    result, folder = simulate(config)
    assert result["status"] == "completed"
    kept, before = load_file(folder.path / "model.safetensors"), given.state_dict()
    assert kept.keys() == before.keys()
    change = kept["0.weight"] - before["0.weight"].numpy()
    assert 0 < np.linalg.matrix_rank(change.reshape(4, -1), tol=1e-6) <= 2
    assert np.array_equal(kept["1.weight"], before["1.weight"].numpy()), "the trunk's norm layer is frozen"
    assert not np.array_equal(kept["4.weight"], before["4.weight"].numpy())
    network, facts, _ = kept_network(folder.path)
    assert facts.model.low_rank == 0
    assert np.array_equal(dict(network.module.named_parameters())["0.weight"].detach().numpy(), kept["0.weight"])


def test_corrections_need_a_trunk_that_was_trained(toy_config):
    with pytest.raises(ConfigError, match=r"model\.weights"):
        check(toy_config("a-20", model={"low-rank": 2}))
    with pytest.raises(ConfigError, match=r"model\.freeze"):
        require_trunk(ModelConfig(low_rank=2, weights="w.safetensors", freeze="block1"))
    with pytest.raises(ModelError, match="trunk"):
        build(ModelConfig(name="kept_runs:outline", low_rank=2), outputs=1, seed=0)
