"""finetune.py --export: names, shapes and layout against OpenPCDet's and torchvision's, numbers
against spconv, refusals."""
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50

import cmcr
import common
import data
import finetune
import simipu
from conftest import trained
from finetune import SMALL, Config, Detector

ROOT = Path(__file__).resolve().parent.parent
GRID = data.GRIDS["nuscenes", "small"]
WIDE = Config(preset="small", **{**SMALL, "width": 16})


def run_folder(folder, model, units, cfg=WIDE):
    """A run folder as `save` leaves it after step 7."""
    folder.mkdir()
    (folder / "provenance.json").write_text('[{"commit": "a1b2c3d"}]')
    common.save(replace(cfg, out=str(folder)), 7, model, [], units, GRID)
    return folder


@pytest.fixture(scope="module")
def lidar(tmp_path_factory):
    """A run that holds a LiDAR network of OpenPCDet's width, and that network."""
    torch.manual_seed(0)
    model = trained(common.VoxelResNet(GRID.low, GRID.high, GRID.voxel, 16))
    folder = tmp_path_factory.mktemp("lidar") / "run"
    return run_folder(folder, nn.ModuleDict({"lidar": model}), cmcr.UNITS), model


def export(run, project, out, **fields):
    finetune.export(replace(WIDE, export=project, init=str(run), out=str(out), **fields))
    return torch.load(out, map_location="cpu", weights_only=True)


def voxel_res_backbone_8x():
    """{name: shape} of OpenPCDet's VoxelResBackBone8x, without conv_out, from its constructor.

    For five features, under spconv 2.
    """
    shapes = {}

    def conv(name, inputs, outputs, bias):
        shapes[f"backbone_3d.{name}.weight"] = outputs, 3, 3, 3, inputs
        if bias:
            shapes[f"backbone_3d.{name}.bias"] = (outputs,)

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"backbone_3d.{name}.{part}"] = (channels,)
        shapes[f"backbone_3d.{name}.num_batches_tracked"] = ()

    conv("conv_input.0", 5, 16, bias=False)
    norm("conv_input.1", 16)
    stages = (
        ("conv1", 16, 16, (0, 1)),
        ("conv2", 16, 32, (1, 2)),
        ("conv3", 32, 64, (1, 2)),
        ("conv4", 64, 128, (1, 2)),
    )
    for stage, inputs, outputs, blocks in stages:
        if stage != "conv1":  # post_act_block: convolution, norm, ReLU
            conv(f"{stage}.0.0", inputs, outputs, bias=False)
            norm(f"{stage}.0.1", outputs)
        for block in blocks:  # SparseBasicBlock, whose convolutions have a bias
            for n in (1, 2):
                conv(f"{stage}.{block}.conv{n}", outputs, outputs, bias=True)
                norm(f"{stage}.{block}.bn{n}", outputs)
    return shapes


# ---- openpcdet -----------------------------------------------------------------------

def test_names_and_shapes_are_openpcdets(lidar, tmp_path, capsys):
    file = export(lidar[0], "openpcdet", tmp_path / "lidar.pth")
    printed = capsys.readouterr().out
    state = file["model_state"]
    expected = voxel_res_backbone_8x()
    assert len(expected) == 136
    assert {name: tuple(t.shape) for name, t in state.items()} == expected
    for name, t in state.items():
        counter = name.endswith("num_batches_tracked")
        assert t.is_contiguous() and t.dtype == (torch.int64 if counter else torch.float32)
    biases = [t for name, t in state.items() if name.endswith((".conv1.bias", ".conv2.bias"))]
    assert len(biases) == 16 and not any(t.any() for t in biases)
    assert file["epoch"] == 0 and file["it"] == 7 and file["optimizer_state"] is None
    assert "a1b2c3d" in file["version"]
    assert "conv_out" in printed and "step 7" in printed and "wide" not in printed
    assert not list(tmp_path.glob("*.part"))


def test_kernel_offsets_are_at_openpcdets_places(lidar, tmp_path):
    """Each number of a convolution, found again by its own indices."""
    state = export(lidar[0], "openpcdet", tmp_path / "lidar.pth")["model_state"]
    ours = lidar[1].state_dict()
    convolutions = (
        ("conv_input.0", "conv_input.conv"),
        ("conv1.1.conv2", "conv1.1.conv2"),
        ("conv3.0.0", "conv3.0.conv"),
        ("conv4.2.conv1", "conv4.2.conv1"),
    )
    for their_name, our_name in convolutions:
        weight = ours[f"{our_name}.weight"]
        exported = state[f"backbone_3d.{their_name}.weight"]
        for z, y, x in ((0, 0, 0), (0, 0, 2), (0, 2, 0), (2, 0, 0), (1, 0, 2), (2, 1, 0)):
            assert torch.equal(exported[:, z, y, x].T, weight[9 * z + 3 * y + x])
    norms = (
        ("conv_input.1", "conv_input.bn"),
        ("conv2.0.1", "conv2.0.bn"),
        ("conv4.1.bn2", "conv4.1.bn2"),
    )
    for their_name, our_name in norms:
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            exported = state[f"backbone_3d.{their_name}.{part}"]
            assert torch.equal(exported, ours[f"{our_name}.{part}"])


def test_another_width_is_exported_with_a_warning(tmp_path, capsys):
    lidar = common.VoxelResNet(GRID.low, GRID.high, GRID.voxel, 8)
    run = run_folder(tmp_path / "run", nn.ModuleDict({"lidar": lidar}), cmcr.UNITS)
    file = export(run, "openpcdet", tmp_path / "narrow.pth")
    weight = file["model_state"]["backbone_3d.conv4.0.0.weight"]
    assert weight.shape == (64, 3, 3, 3, 32)
    assert "This run is 8 wide, OpenPCDet's network 16" in capsys.readouterr().out


def spconv_backbone(spconv):
    """VoxelResBackBone8x without conv_out, built of spconv's modules with its arguments.

    forward: SparseConvTensor -> its x_conv1 to x_conv4.
    """
    norm = partial(nn.BatchNorm1d, eps=1e-3, momentum=0.01)

    def submanifold(width, key):
        return spconv.SubMConv3d(
            width, width, 3, stride=1, padding=1, bias=True, indice_key=key)

    class Block(spconv.SparseModule):
        def __init__(self, width, key):
            super().__init__()
            self.conv1 = submanifold(width, key)
            self.bn1 = norm(width)
            self.conv2 = submanifold(width, key)
            self.bn2 = norm(width)

        def forward(self, x):
            y = self.conv1(x)
            y = self.conv2(y.replace_feature(self.bn1(y.features).relu()))
            return y.replace_feature((self.bn2(y.features) + x.features).relu())

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            first = spconv.SubMConv3d(5, 16, 3, padding=1, bias=False, indice_key="subm1")
            self.conv_input = spconv.SparseSequential(first, norm(16), nn.ReLU())
            self.conv1 = spconv.SparseSequential(Block(16, "res1"), Block(16, "res1"))
            stages = ((2, 16, 32, 1), (3, 32, 64, 1), (4, 64, 128, (0, 1, 1)))
            for n, inputs, outputs, padding in stages:
                down = spconv.SparseConv3d(
                    inputs, outputs, 3, stride=2, padding=padding, bias=False,
                    indice_key=f"spconv{n}")
                down = spconv.SparseSequential(down, norm(outputs), nn.ReLU())
                one = Block(outputs, f"res{n}")
                two = Block(outputs, f"res{n}")
                setattr(self, f"conv{n}", spconv.SparseSequential(down, one, two))

        def forward(self, x):
            levels = []
            x = self.conv_input(x)
            for stage in (self.conv1, self.conv2, self.conv3, self.conv4):
                x = stage(x)
                levels.append(x)
            return levels

    return Backbone().eval()


def cloud():
    """Two frames of points -> points (N, 5), b (N,).

    Dense enough for neighbours in every direction, unlike in x, y and z, up to the range's faces.
    """
    low = torch.tensor(GRID.low)
    high = torch.tensor(GRID.high)
    anywhere = torch.rand(3000, 3) * (high - low) + low
    size = torch.tensor([6.0, 4.0, 2.0])
    patch = torch.rand(3000, 3) * size + torch.tensor([-20.0, 9.0, -2.0])
    xyz = torch.cat([anywhere, patch])
    points = torch.cat([xyz, torch.rand(6000, 1), torch.rand(6000, 1) / 2], 1)
    return points, torch.arange(6000) % 2


@torch.no_grad()
def test_spconv_gives_our_features(lidar, tmp_path):
    reason = "spconv does not import here; pip install spconv (a CPU will do)"
    spconv = pytest.importorskip("spconv.pytorch", reason=reason, exc_type=ImportError)
    torch.manual_seed(1)
    run, model = lidar
    points, b = cloud()
    threads = torch.get_num_threads()
    backbone = spconv_backbone(spconv)
    state = export(run, "openpcdet", tmp_path / "lidar.pth")["model_state"]
    backbone.load_state_dict(
        {name.removeprefix("backbone_3d."): t for name, t in state.items()})
    for module in backbone.modules():
        if isinstance(module, spconv.SubMConv3d) and module.bias is not None:
            assert not module.bias.any()
            module.bias = None  # spconv's CPU path takes none
    level = model.voxelise(points, b, 2)
    # OpenPCDet's sparse_shape: the grid's and one more in z
    assert level.cells.shape == (33, 512, 512)
    x = spconv.SparseConvTensor(level.features, level.coords.int(), level.cells.shape, 2)
    torch.set_num_threads(1)  # spconv's CPU sums race with more
    try:
        levels = backbone(x)
    finally:
        torch.set_num_threads(threads)
    for n, (ours, x) in enumerate(zip(model(points, b, 2), levels, strict=True)):
        assert list(x.spatial_shape) == list(ours.cells.shape)
        assert ours.features.std() > 0.1
        order = common.ravel(x.indices.long(), ours.cells.shape, 2).argsort()
        assert torch.equal(x.indices[order].long(), ours.coords)
        gap = (x.features[order] - ours.features).abs().max()
        print(f"x_conv{n + 1}: {len(order)} sites, largest difference {gap:.1e}, "
              f"largest feature {ours.features.max():.1f}")
        assert gap < 1e-5


# ---- torchvision ---------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision_gives_our_features(tmp_path, depth, capsys):
    torch.manual_seed(2)
    ours = trained(common.ResNet(depth))
    cfg = replace(WIDE, resnet=depth)
    run = run_folder(tmp_path / "run", nn.ModuleDict({"camera": ours}), simipu.UNITS, cfg)
    state = export(run, "torchvision", tmp_path / "resnet.pth")
    assert f"resnet{depth}" in capsys.readouterr().out
    resnet = {18: resnet18, 50: resnet50}[depth]()
    expected = resnet.state_dict()
    expected = {k: tuple(t.shape) for k, t in expected.items() if not k.startswith("fc.")}
    assert {name: tuple(t.shape) for name, t in state.items()} == expected
    for t in state.values():
        assert t.is_contiguous() and t.dtype in (torch.float32, torch.int64)
        assert t.device.type == "cpu"
    resnet.fc = nn.Identity()
    resnet.load_state_dict(state)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    mean = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
    stages = []
    for name in ("layer2", "layer3", "layer4"):
        layer = getattr(resnet, name)
        layer.register_forward_hook(lambda module, given, out: stages.append(out))
    resnet.eval()((images / 255 - mean) / std)
    for our_stage, stage in zip(ours.stages(images), stages, strict=True):
        assert our_stage.std() > 0.1
        atol = 1e-5 * float(our_stage.max())
        torch.testing.assert_close(stage, our_stage, rtol=1e-5, atol=atol)


# ---- the command, refusals -----------------------------------------------------------

def test_the_command_writes_the_file_and_nothing_else(lidar, tmp_path):
    out = tmp_path / "new" / "lidar.pth"
    command = [sys.executable, str(ROOT / "finetune.py"), "--export", "openpcdet",
               "--init", str(lidar[0]), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    begin = f"{out}: lidar of {lidar[0]}, step 7, for OpenPCDet's VoxelResBackBone8x"
    assert done.stdout.startswith(begin)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert [path.name for path in out.parent.iterdir()] == ["lidar.pth"]
    state = torch.load(out, weights_only=True)["model_state"]
    assert state.keys() == voxel_res_backbone_8x().keys()


TINY = replace(WIDE, width=4, bins=12)
NEW = "neck", "shared", "heads"


@pytest.mark.parametrize("modality, units, project, message", [
    ("fusion", cmcr.UNITS, "torchvision",
     "holds lidar; --export torchvision wants camera.resnet"),
    ("fusion", simipu.UNITS, "openpcdet",
     "holds camera.resnet; --export openpcdet wants lidar"),
    ("lidar", ("lidar", "fuse", *NEW), "torchvision",
     "holds lidar, fuse, neck, shared, heads; --export torchvision wants camera.resnet"),
    ("camera", ("camera.resnet", "camera.neck", "fuse", *NEW), "openpcdet",
     "holds camera.resnet, camera.neck, fuse, neck, shared, heads; --export openpcdet wants lidar"),
])
def test_a_unit_that_the_run_has_not_trained_is_refused(
        tmp_path, modality, units, project, message):
    model = Detector(replace(TINY, modality=modality), GRID)
    run = run_folder(tmp_path / "run", model, units, TINY)
    with pytest.raises(SystemExit, match=message):
        export(run, project, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("case, message", [
    ("none", "none/backbones.safetensors: no such file; --init names"),
    ("cut", "not a whole safetensors file"),
    ("folder", "expected a name that ends in .pth"),
    ("taken", "could not be written .*; then export again.$"),
])
def test_exports_that_cannot_work_are_refused(lidar, tmp_path, case, message):
    run = lidar[0]
    out = tmp_path / "out.pth"
    if case == "none":
        run = "none"
    if case == "cut":
        run = tmp_path / "cut"
        run.mkdir()
        weights = (lidar[0] / "backbones.safetensors").read_bytes()
        (run / "backbones.safetensors").write_bytes(weights[:5000])
    if case == "folder":
        out = tmp_path / "runs"
    if case == "taken":
        (out / "file").mkdir(parents=True)
    with pytest.raises(SystemExit, match=message):
        export(run, "openpcdet", out)
    assert not out.is_file() and not list(tmp_path.glob("*.part"))
