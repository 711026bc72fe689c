"""Checkpoints of other authors: what loads predicts what their formula says, the rest is refused.

The layouts are written down again here from the methods' formulas and the names in their code; the
tensors are small and random.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from iddc.backbones import Backbone, load_backbone, save_backbone, untrained_backbone
from iddc.cli import main
from iddc.config import Experiment
from iddc.errors import DataError
from iddc.importing import LAYOUTS, import_checkpoint
from iddc.network import Network
from iddc.segmenter import Segmenter

WIDTH, CLUSTERS = 32, 5
Tensors = dict[str, Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.3


def conv(name: str, out: int, inside: int = WIDTH, side: int = 1) -> Tensors:
    return {f"{name}.weight": random(out, inside, side, side), f"{name}.bias": random(out)}


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of another seed than that of the checkpoints: its architecture counts."""
    torch.manual_seed(99)
    path = tmp_path_factory.mktemp("architecture")
    options = {"embed_dim": WIDTH, "depth": 1, "num_heads": 2}
    save_backbone(untrained_backbone("vit_tiny_patch16_224", options=options), path)
    return path


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    """The backbone inside the checkpoints."""
    torch.manual_seed(1)
    made = load_backbone(str(folder))
    with torch.no_grad():
        for value in made.net.state_dict().values():
            value.add_(torch.randn_like(value) * 0.1)
    return made


def iddc(vit: Tensors) -> tuple[list[Any], Callable[[Tensor], Tensor]]:
    head = {**conv("0", WIDTH, side=3), **conv("2", WIDTH)}
    last = conv("x", CLUSTERS)
    last = {"weight": last["x.weight"], "bias": last["x.bias"]}
    saved = {"classifier": last, "head_nonlinear": head, "backbone": under("model.", vit)}

    def logits(u: Tensor) -> Tensor:
        hidden = functional.conv2d(u, head["0.weight"], head["0.bias"], padding=1).relu()
        hidden = functional.conv2d(hidden, head["2.weight"], head["2.bias"]).relu()
        return functional.conv2d(hidden, last["weight"], last["bias"])

    return [saved], logits


def code_head(dim: int, activation: Callable[[Tensor], Tensor]) -> tuple[Tensors, Any]:
    """The head S under STEGO's names, and z of u."""
    head = {
        **conv("cluster1.0", dim),
        **conv("cluster2.0", WIDTH),
        **conv("cluster2.2", dim),
    }

    def code(u: Tensor) -> Tensor:
        flat = u.permute(0, 2, 3, 1)

        def linear(x: Tensor, name: str) -> Tensor:
            return x @ head[f"{name}.weight"][:, :, 0, 0].T + head[f"{name}.bias"]

        hidden = activation(linear(flat, "cluster2.0"))
        return linear(flat, "cluster1.0") + linear(hidden, "cluster2.2")

    return head, code


def cosines(code: Callable[[Tensor], Tensor], centroids: Tensor) -> Callable[[Tensor], Tensor]:
    """Twice the cosines, as STEGO scores them."""

    def logits(u: Tensor) -> Tensor:
        z = code(u)
        unit = z / z.norm(dim=-1, keepdim=True)
        rows = centroids / centroids.norm(dim=1, keepdim=True)
        return 2 * (unit @ rows.T).permute(0, 3, 1, 2)

    return logits


def stego(vit: Tensors) -> tuple[list[Any], Callable[[Tensor], Tensor]]:
    head, code = code_head(70, torch.relu)
    centroids = random(CLUSTERS, 70)
    state = {
        **under("net.model.", vit),
        **under("net.", head),
        "train_cluster_probe.clusters": random(3, 70),
        "cluster_probe.clusters": centroids,
        **conv("linear_probe", 3, 70),
        **conv("decoder", WIDTH, 70),
    }
    saved = {"epoch": 3, "global_step": 5000, "state_dict": state, "optimizer_states": [{"a": 1}]}
    return [saved], cosines(code, centroids)


def hp(vit: Tensors) -> tuple[list[Any], Callable[[Tensor], Tensor]]:
    head, code = code_head(512, torch.relu)
    centroids = random(CLUSTERS, 512)
    ema, _ = code_head(512, torch.relu)
    ema = {name.replace("cluster", "ema_model"): value for name, value in ema.items()}
    saved = {
        "epoch": 2,
        "best": 24.6,
        "net_model_state_dict": {**under("model.", vit), **head, **ema},
        "linear_model_state_dict": {"weight": random(3, 512, 1, 1), "bias": random(3)},
        "cluster_model_state_dict": {"clusters": centroids},
        "net_optimizer_state_dict": None,
    }
    return [saved], cosines(code, centroids)


def smooseg(vit: Tensors) -> tuple[list[Any], Callable[[Tensor], Tensor]]:
    head, code = code_head(64, lambda x: x * torch.sigmoid(x))
    teacher = random(CLUSTERS, 64)
    state = {
        **under("net.model.", vit),
        **under("projection.", head),
        "prediction.local_clusters": random(CLUSTERS, 64),
        "prediction.global_clusters": teacher,
    }
    return [{"state_dict": state}], cosines(code, teacher)


def primaps(vit: Tensors) -> tuple[list[Any], Callable[[Tensor], Tensor]]:
    g, v = random(CLUSTERS, 1, 1, 1).abs() + 0.1, random(CLUSTERS, WIDTH, 1, 1)
    state = {
        **under("net.model.", vit),
        "cluster_probe.ema_model.weight_g": g,
        "cluster_probe.ema_model.weight_v": v,
        "cluster_probe.online_model.weight_g": random(CLUSTERS, 1, 1, 1),
        "cluster_probe.online_model.weight_v": random(CLUSTERS, WIDTH, 1, 1),
        "cluster_probe.initted": torch.ones(1),
        "cluster_probe.step": torch.tensor([4]),
        "seghead.weight_g": random(CLUSTERS, 1, 1, 1),
        "seghead.weight_v": random(CLUSTERS, WIDTH, 1, 1),
        **conv("linear_probe", 3),
    }

    def logits(u: Tensor) -> Tensor:
        rows = torch.stack([g[k, 0, 0, 0] * v[k].flatten() / v[k].norm() for k in range(CLUSTERS)])
        return torch.einsum("kd,bdhw->bkhw", rows, u)

    return [{"state_dict": state}], logits


def cause(vit: Tensors) -> tuple[list[Any], Callable[[Tensor], Tensor]]:
    del vit  # its files have no backbone
    head, code = code_head(90, torch.relu)
    ema = {
        name.replace("cluster1.0", "f1").replace("cluster2", "f2"): value
        for name, value in head.items()
    }
    centroids = random(CLUSTERS, 90)
    segment = {
        **under("head_ema.", ema),
        **under("head.", {name: value + 1 for name, value in ema.items()}),
        **conv("projection_head.f", 16, 90),
        **conv("projection_head_ema.f", 16, 90),
        **conv("linear.f", 3, 90),
    }
    return [segment, {"codebook": random(8, WIDTH), "cluster_probe": centroids}], cosines(
        code, centroids
    )


RELEASED = {
    "iddc": iddc,
    "stego": stego,
    "hp": hp,
    "smooseg": smooseg,
    "primaps": primaps,
    "cause-mlp": cause,
}


def written(parts: list[Any], path: Path) -> list[Path]:
    files = [path / f"{index}.pth" for index in range(len(parts))]
    for part, file in zip(parts, files, strict=True):
        torch.save(part, file)
    return files


def experiment(folder: Path, clusters: int = CLUSTERS) -> Experiment:
    return Experiment(backbone=str(folder), num_clusters=clusters)


def test_every_layout_is_tested() -> None:
    assert {layout.name for layout in LAYOUTS} == {*RELEASED}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_head_predicts_what_its_formula_says(
    name: str, folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    vit = dict(backbone.net.state_dict())
    parts, formula = RELEASED[name](vit)
    found = import_checkpoint(written(parts, tmp_path), experiment(folder))
    assert found.layout == name
    network = found.segmenter.network
    assert isinstance(network, Network)
    images = torch.rand(2, 3, 96, 64)
    own = load_backbone(str(folder)) if name == "cause-mlp" else backbone
    with torch.no_grad():
        u = own(images)
        torch.testing.assert_close(network(images), formula(u), rtol=1e-4, atol=1e-5)
    # Saved and read again it is the same network.
    found.segmenter.save(tmp_path / "run")
    again = Segmenter.load(tmp_path / "run", "cpu").network
    assert isinstance(again, Network)
    with torch.no_grad():
        assert torch.equal(again(images), network(images))


def test_what_prediction_does_not_need_is_named(
    folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    parts, _ = stego(dict(backbone.net.state_dict()))
    found = import_checkpoint(written(parts, tmp_path), experiment(folder))
    assert found.unused == (
        *("decoder.bias", "decoder.weight", "linear_probe.bias", "linear_probe.weight"),
        "train_cluster_probe.clusters",
    )


@pytest.mark.parametrize("name", RELEASED)
def test_a_tensor_without_a_place_refuses_the_whole_checkpoint_and_is_named(
    name: str, folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    parts, _ = RELEASED[name](dict(backbone.net.state_dict()))
    inner = parts[0].get("state_dict", parts[0])
    inner["surprise"] = {"weight": random(2)} if name in ("iddc", "hp") else random(2)
    with pytest.raises(DataError, match=r"1 tensors that have no place in its network: surprise"):
        import_checkpoint(written(parts, tmp_path), experiment(folder))


def test_another_number_of_clusters_is_refused_with_both_shapes(
    folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    parts, _ = iddc(dict(backbone.net.state_dict()))
    with pytest.raises(DataError, match=r"classifier.weight is \(5, 32, 1, 1\) instead of \(6, 32"):
        import_checkpoint(written(parts, tmp_path), experiment(folder, 6))


def test_another_backbone_is_refused_with_the_names_that_do_not_fit(
    backbone: Backbone, tmp_path: Path
) -> None:
    options = {"embed_dim": WIDTH, "depth": 2, "num_heads": 2}
    save_backbone(untrained_backbone("vit_tiny_patch16_224", options=options), tmp_path / "deep")
    parts, _ = iddc(dict(backbone.net.state_dict()))
    with pytest.raises(DataError, match=r"missing: blocks\.1\..*Give the --recipe or --backbone"):
        import_checkpoint(written(parts, tmp_path), experiment(tmp_path / "deep"))


def test_an_unknown_checkpoint_is_refused_with_the_list_of_its_keys(
    folder: Path, tmp_path: Path
) -> None:
    files = written([{"encoder.weight": random(2), "decoder": {"bias": random(3)}}], tmp_path)
    with pytest.raises(DataError, match=r"2 tensors: decoder\.bias, encoder\.weight"):
        import_checkpoint(files, experiment(folder))


def test_a_checkpoint_with_numbers_of_another_kind_is_refused(
    folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    parts, _ = iddc(dict(backbone.net.state_dict()))
    parts[0]["classifier"]["bias"][0] = torch.nan
    with pytest.raises(DataError, match="bias holds NaN or infinity"):
        import_checkpoint(written(parts, tmp_path), experiment(folder))


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("pwned"),))


def test_a_pickle_is_never_executed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"classifier": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(DataError, match="no PyTorch file"):
            import_checkpoint([tmp_path / name], experiment(folder))
    assert not (tmp_path / "pwned").exists()


def test_objects_beside_the_tensors_are_named(folder: Path, tmp_path: Path) -> None:
    files = written([{"state_dict": {"a": random(1)}, "cfg": "no tensor"}], tmp_path)
    with pytest.raises(DataError, match=r"holds more than tensors by name, or none: cfg\."):
        import_checkpoint(files, experiment(folder))


def test_the_command_writes_a_run_that_predicts(
    folder: Path, backbone: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, _ = iddc(dict(backbone.net.state_dict()))
    (file,) = written(parts, tmp_path)
    out = tmp_path / "run"
    words = ["import", str(file), "--recipe", "cocostuff27-vits16", "--out", str(out)]
    words += ["--backbone", str(folder), "--num-clusters", str(CLUSTERS)]
    assert main(words) == 0
    assert "a checkpoint of iddc" in capsys.readouterr().out
    record = json.loads((out / "model.json").read_text())
    assert record["experiment"]["recipe"] == "cocostuff27-vits16"
    assert record["network"]["head"] == "conv"
    assert Segmenter.load(out, "cpu").num_clusters == CLUSTERS
    # A second time it does not replace the run.
    assert main(words) == 2


def test_a_checkpoint_that_does_not_fit_leaves_nothing_behind(
    folder: Path, backbone: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, _ = iddc(dict(backbone.net.state_dict()))
    (file,) = written(parts, tmp_path)
    out = tmp_path / "run"
    words = ["import", str(file), "--out", str(out), "--backbone", str(folder)]
    assert main([*words, "--num-clusters", "9"]) == 3
    assert "instead of (9, 32, 1, 1)" in capsys.readouterr().err
    assert not out.exists()


def test_safetensors_are_read_too(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    vit = dict(backbone.net.state_dict())
    parts, formula = smooseg(vit)
    save_file(
        {k: v.contiguous() for k, v in parts[0]["state_dict"].items()}, tmp_path / "a.safetensors"
    )
    found = import_checkpoint([tmp_path / "a.safetensors"], experiment(folder))
    images = torch.rand(1, 3, 64, 64)
    assert isinstance(found.segmenter.network, Network)
    with torch.no_grad():
        torch.testing.assert_close(found.segmenter.network(images), formula(backbone(images)))
