"""finetune.py --export: names, shapes and layout against OpenPCDet's and torchvision's, numbers against spconv, refusals."""
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


def leave(folder, model, units, cfg=WIDE):
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
    return leave(tmp_path_factory.mktemp("lidar") / "run", nn.ModuleDict({"lidar": model}), cmcr.UNITS), model


def export(run, project, out, **fields):
    finetune.export(replace(WIDE, export=project, init=str(run), out=str(out), **fields))
    return torch.load(out, map_location="cpu", weights_only=True)


def voxel_res_backbone_8x():
    """{name: shape} of OpenPCDet's VoxelResBackBone8x for five features under spconv 2, without conv_out, from its constructor."""
    shapes = {}

    def conv(name, inputs, outputs, bias):
        shapes[f"backbone_3d.{name}.weight"] = outputs, 3, 3, 3, inputs
        if bias:
            shapes[f"backbone_3d.{name}.bias"] = (outputs,)

    def norm(name, channels):
        shapes.update({f"backbone_3d.{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"backbone_3d.{name}.num_batches_tracked"] = ()

    conv("conv_input.0", 5, 16, bias=False)
    norm("conv_input.1", 16)
    for stage, inputs, outputs, blocks in (("conv1", 16, 16, (0, 1)), ("conv2", 16, 32, (1, 2)), ("conv3", 32, 64, (1, 2)), ("conv4", 64, 128, (1, 2))):
        if stage != "conv1":                                        # post_act_block: convolution, norm, ReLU
            conv(f"{stage}.0.0", inputs, outputs, bias=False)
            norm(f"{stage}.0.1", outputs)
        for block in blocks:                                        # SparseBasicBlock, whose convolutions have a bias
            for n in (1, 2):
                conv(f"{stage}.{block}.conv{n}", outputs, outputs, bias=True)
                norm(f"{stage}.{block}.bn{n}", outputs)
    return shapes


# ---- openpcdet ----

def test_openpcdets_names_and_shapes(lidar, tmp_path, capsys):
    file = export(lidar[0], "openpcdet", tmp_path / "lidar.pth")
    told = capsys.readouterr().out
    state, expected = file["model_state"], voxel_res_backbone_8x()
    assert len(expected) == 136 and {name: tuple(t.shape) for name, t in state.items()} == expected
    assert all(t.is_contiguous() and t.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32) for name, t in state.items())
    biases = [t for name, t in state.items() if name.endswith((".conv1.bias", ".conv2.bias"))]
    assert len(biases) == 16 and not any(t.any() for t in biases)
    assert file["epoch"] == 0 and file["it"] == 7 and file["optimizer_state"] is None and "a1b2c3d" in file["version"]
    assert "conv_out" in told and "step 7" in told and "wide" not in told and not list(tmp_path.glob("*.part"))


def test_offsets_are_in_their_places(lidar, tmp_path):
    """Each number of a convolution, found again by its own indices."""
    state, own = export(lidar[0], "openpcdet", tmp_path / "lidar.pth")["model_state"], lidar[1].state_dict()
    for theirs, mine in (("conv_input.0", "conv_input.conv"), ("conv1.1.conv2", "conv1.1.conv2"), ("conv3.0.0", "conv3.0.conv"), ("conv4.2.conv1", "conv4.2.conv1")):
        weight, found = own[f"{mine}.weight"], state[f"backbone_3d.{theirs}.weight"]
        for z, y, x in ((0, 0, 0), (0, 0, 2), (0, 2, 0), (2, 0, 0), (1, 0, 2), (2, 1, 0)):
            assert torch.equal(found[:, z, y, x].T, weight[9 * z + 3 * y + x])
    for theirs, mine in (("conv_input.1", "conv_input.bn"), ("conv2.0.1", "conv2.0.bn"), ("conv4.1.bn2", "conv4.1.bn2")):
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(state[f"backbone_3d.{theirs}.{part}"], own[f"{mine}.{part}"])


def test_a_run_of_another_width_says_that_openpcdet_would_leave_it_out(tmp_path, capsys):
    narrow = nn.ModuleDict({"lidar": common.VoxelResNet(GRID.low, GRID.high, GRID.voxel, 8)})
    file = export(leave(tmp_path / "run", narrow, cmcr.UNITS), "openpcdet", tmp_path / "narrow.pth")
    assert file["model_state"]["backbone_3d.conv4.0.0.weight"].shape == (64, 3, 3, 3, 32)
    assert "This run is 8 wide, OpenPCDet's network 16" in capsys.readouterr().out


def spconv_backbone(spconv):
    """VoxelResBackBone8x without conv_out, built of spconv's modules with its arguments. forward: SparseConvTensor -> its x_conv1 to x_conv4."""
    norm = partial(nn.BatchNorm1d, eps=1e-3, momentum=0.01)

    class Block(spconv.SparseModule):
        def __init__(self, width, key):
            super().__init__()
            self.conv1, self.bn1 = spconv.SubMConv3d(width, width, 3, stride=1, padding=1, bias=True, indice_key=key), norm(width)
            self.conv2, self.bn2 = spconv.SubMConv3d(width, width, 3, stride=1, padding=1, bias=True, indice_key=key), norm(width)

        def forward(self, x):
            y = self.conv1(x)
            y = self.conv2(y.replace_feature(self.bn1(y.features).relu()))
            return y.replace_feature((self.bn2(y.features) + x.features).relu())

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_input = spconv.SparseSequential(spconv.SubMConv3d(5, 16, 3, padding=1, bias=False, indice_key="subm1"), norm(16), nn.ReLU())
            self.conv1 = spconv.SparseSequential(Block(16, "res1"), Block(16, "res1"))
            for n, inputs, outputs, padding in ((2, 16, 32, 1), (3, 32, 64, 1), (4, 64, 128, (0, 1, 1))):
                down = spconv.SparseConv3d(inputs, outputs, 3, stride=2, padding=padding, bias=False, indice_key=f"spconv{n}")
                block = spconv.SparseSequential(down, norm(outputs), nn.ReLU())
                setattr(self, f"conv{n}", spconv.SparseSequential(block, Block(outputs, f"res{n}"), Block(outputs, f"res{n}")))

        def forward(self, x):
            out, x = [], self.conv_input(x)
            for stage in (self.conv1, self.conv2, self.conv3, self.conv4):
                x = stage(x)
                out.append(x)
            return out

    return Backbone().eval()


def cloud():
    """Two frames of points, dense enough for neighbours in every direction, unlike in x, y and z, up to the range's faces. -> points (N, 5), b (N,)."""
    low, high = torch.tensor(GRID.low), torch.tensor(GRID.high)
    anywhere = torch.rand(3000, 3) * (high - low) + low
    patch = torch.rand(3000, 3) * torch.tensor([6., 4., 2.]) + torch.tensor([-20., 9., -2.])
    points = torch.cat([torch.cat([anywhere, patch]), torch.rand(6000, 1), torch.rand(6000, 1) / 2], 1)
    return points, torch.arange(6000) % 2


@torch.no_grad()
def test_spconv_gives_our_features(lidar, tmp_path):
    spconv = pytest.importorskip("spconv.pytorch", reason="spconv does not import here; pip install spconv (a CPU will do)", exc_type=ImportError)
    torch.manual_seed(1)
    (run, model), (points, b), threads = lidar, cloud(), torch.get_num_threads()
    theirs = spconv_backbone(spconv)
    state = export(run, "openpcdet", tmp_path / "lidar.pth")["model_state"]
    theirs.load_state_dict({name.removeprefix("backbone_3d."): t for name, t in state.items()})
    for module in theirs.modules():
        if isinstance(module, spconv.SubMConv3d) and module.bias is not None:
            assert not module.bias.any()
            module.bias = None                                      # spconv's CPU path takes none
    level = model.voxelise(points, b)
    assert level.cells.shape == (33, 512, 512)                      # OpenPCDet's sparse_shape: the grid's and one more in z
    torch.set_num_threads(1)                                        # spconv's CPU sums race with more
    try:
        found = theirs(spconv.SparseConvTensor(level.features, level.coords.int(), level.cells.shape, 2))
    finally:
        torch.set_num_threads(threads)
    for n, (ours, x) in enumerate(zip(model(points, b), found, strict=True)):
        assert list(x.spatial_shape) == list(ours.cells.shape) and ours.features.std() > 0.1
        order = common.ravel(x.indices.long(), ours.cells.shape).argsort()
        assert torch.equal(x.indices[order].long(), ours.coords)
        gap = (x.features[order] - ours.features).abs().max()
        print(f"x_conv{n + 1}: {len(order)} sites, largest difference {gap:.1e}, largest feature {ours.features.max():.1f}")
        assert gap < 1e-5


# ---- torchvision ----

@torch.no_grad()
@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision_gives_our_features(tmp_path, depth, capsys):
    torch.manual_seed(2)
    ours = trained(common.ResNet(depth))
    run = leave(tmp_path / "run", nn.ModuleDict({"camera": ours}), simipu.UNITS, replace(WIDE, resnet=depth))
    state = export(run, "torchvision", tmp_path / "resnet.pth")
    assert f"resnet{depth}" in capsys.readouterr().out
    theirs = {18: resnet18, 50: resnet50}[depth]()
    expected = {name: tuple(t.shape) for name, t in theirs.state_dict().items() if not name.startswith("fc.")}
    assert {name: tuple(t.shape) for name, t in state.items()} == expected
    assert all(t.is_contiguous() and t.dtype in (torch.float32, torch.int64) and t.device.type == "cpu" for t in state.values())
    theirs.fc = nn.Identity()
    theirs.load_state_dict(state)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x, stages = (images / 255 - mean) / std, []
    for name in ("layer2", "layer3", "layer4"):
        getattr(theirs, name).register_forward_hook(lambda module, given, out: stages.append(out))
    theirs.eval()(x)
    for mine, found in zip(ours.stages(images), stages, strict=True):
        assert mine.std() > 0.1
        torch.testing.assert_close(found, mine, rtol=1e-5, atol=1e-5 * float(mine.max()))


# ---- the command, refusals ----

def test_the_command_writes_the_file_and_nothing_else(lidar, tmp_path):
    out = tmp_path / "new" / "lidar.pth"
    done = subprocess.run([sys.executable, str(ROOT / "finetune.py"), "--export", "openpcdet", "--init", str(lidar[0]), "--out", str(out)],
                          capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"{out}: lidar of {lidar[0]}, step 7, for OpenPCDet's VoxelResBackBone8x")
    assert [p.name for p in tmp_path.iterdir()] == ["new"] and [p.name for p in out.parent.iterdir()] == ["lidar.pth"]
    assert torch.load(out, weights_only=True)["model_state"].keys() == voxel_res_backbone_8x().keys()


def test_what_a_run_has_not_trained_is_refused(tmp_path):
    tiny = replace(WIDE, width=4, bins=12)
    whole = Detector(tiny, GRID)
    heads = "neck", "shared", "heads"
    for folder, model, units, project, told in (
            ("cmcr", whole, cmcr.UNITS, "torchvision", "holds lidar; --export torchvision wants camera.resnet"),
            ("simipu", whole, simipu.UNITS, "openpcdet", "holds camera.resnet; --export openpcdet wants lidar"),
            ("tuned", Detector(replace(tiny, modality="lidar"), GRID), ("lidar", "fuse", *heads), "torchvision",
             "holds lidar, fuse, neck, shared, heads; --export torchvision wants camera.resnet"),
            ("seen", Detector(replace(tiny, modality="camera"), GRID), ("camera.resnet", "camera.neck", "fuse", *heads), "openpcdet",
             "holds camera.resnet, camera.neck, fuse, neck, shared, heads; --export openpcdet wants lidar")):
        run = leave(tmp_path / folder, model, units, tiny)
        with pytest.raises(SystemExit, match=told):
            export(run, project, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("case, told", [("none", "none/backbones.safetensors: no such file; --init names"), ("cut", "not a whole safetensors file"),
                                        ("folder", "expected a name that ends in .pth"), ("there", "could not be written")])
def test_what_cannot_work_is_refused(lidar, tmp_path, case, told):
    run, out = lidar[0], tmp_path / "out.pth"
    if case == "none":
        run = "none"
    if case == "cut":
        run = tmp_path / "cut"
        run.mkdir()
        (run / "backbones.safetensors").write_bytes((lidar[0] / "backbones.safetensors").read_bytes()[:5000])
    if case == "folder":
        out = tmp_path / "runs"
    if case == "there":
        (out / "kept").mkdir(parents=True)
    with pytest.raises(SystemExit, match=told):
        export(run, "openpcdet", out)
    assert not out.is_file() and not list(tmp_path.glob("*.part"))
