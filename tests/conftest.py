"""Fixtures: a tiny embedded world, the real frames where there are any."""
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch loads OpenMP: threads that spin starve the other processes of a shared machine
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or writes the user's caches."""
    os.environ["LIDAR_CAMERA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(min(torch.get_num_threads(), 2))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Root of an embedded world of 2 + 1 scenes x 3 keyframes."""
    import synthetic
    root = tmp_path_factory.mktemp("world") / "world"
    synthetic.write(root, train=2, val=1, frames=3)
    return root


@pytest.fixture(scope="session")
def nuscenes_root():
    """Real nuScenes frames: $NUSCENES, or shared/real/nuscenes beside the checkout."""
    named = os.environ.get("NUSCENES")
    root = Path(named) if named else ROOT.parent / "shared" / "real" / "nuscenes"
    if not root.is_dir():
        pytest.skip(f"no real nuScenes frames: NUSCENES names no folder and {root} does not exist")
    return root
