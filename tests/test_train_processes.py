"""Several processes train the model that one process trains with the same global batch."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn
from torch.multiprocessing.spawn import spawn
from train_support import FBS, assert_same_run, command, make_recipe, result, run, write_folder, write_teacher

from thrifty.train.recipe import Recipe
from thrifty.train.sync import GlobalBatchNorm2d, synchronise_batch_norm
from thrifty.train.trainer import Trainer

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    """Batch norm, gates with a schedule, average, teacher and clipping; no dropout, whose masks differ by process."""
    root = write_folder(tmp_path_factory.mktemp("photographs"))
    teacher = write_teacher(root / "teacher.safetensors")
    return make_recipe(
        root,
        epochs=2,
        method=FBS | {"init": "paper"},
        ema=0.7,
        distill={"teacher": str(teacher)},
        optimiser={"learning_rate": 0.02, "clip_norm": 1.0},
        checkpoint={"minutes": 1e-9},
    )


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("alone") / "run"
    threads = torch.get_num_threads()
    Trainer(recipe, directory).run()
    torch.set_num_threads(threads)
    return directory


@pytest.fixture(scope="module")
def together(recipe, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("together") / "run"
    done = run([*TORCHRUN, *command(recipe, directory)])
    assert done.stdout.count("processes 2") == 2, done.stdout
    assert done.stdout.count("finished 2") == 2, "every process returns the outcome"
    assert done.stdout.count("step 3\n") == 1, "only the main process reports"
    return directory


def assert_same_to_rounding(directory: Path, other: Path) -> None:
    (weights, rows), (expected, expected_rows) = result(directory), result(other)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(tensor, expected[name]), name
    assert len(rows) == len(expected_rows)
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row.keys() == expected_row.keys()
        for key, value in row.items():
            assert float(value) == pytest.approx(float(expected_row[key]), rel=1e-4), key


def test_two_processes_train_what_one_trains(together, alone):
    assert_same_to_rounding(together, alone)


def test_what_is_written_is_written_once(together, alone):
    def files(directory: Path) -> list[str]:
        return sorted(p.parent.name if "events" in p.name else p.name for p in directory.rglob("*") if p.is_file())

    assert files(together) == files(alone)
    assert len(list((together / "tensorboard").iterdir())) == 1


def test_accelerate_launch_trains_what_one_process_trains(recipe, alone, tmp_path):
    done = run([*ACCELERATE, *command(recipe, tmp_path / "run")])
    assert done.stdout.count("processes 2") == 2, done.stdout
    assert_same_to_rounding(tmp_path / "run", alone)


def test_two_processes_resume_bit_for_bit(recipe, together, tmp_path):
    run([*TORCHRUN, *command(recipe, tmp_path / "run", die_at=4)], status=None)
    run([*TORCHRUN, *command(recipe, tmp_path / "run", resume=True)])
    assert_same_run(tmp_path / "run", together)


def test_nan_stops_every_process_with_the_reason(recipe, tmp_path):
    wild = recipe.model_copy(update={"optimiser": recipe.optimiser.model_copy(update={"learning_rate": 1e38})})
    done = run([*TORCHRUN, *command(wild, tmp_path / "run")], status=None, timeout=120)
    assert "NonFiniteError" in done.stderr
    assert "finished" not in done.stdout
    assert not (tmp_path / "run" / "model.safetensors").exists()


# -------------------------------------------------------------------------------------------------- batch norm alone


def _norms() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    norms = nn.Sequential(
        nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6, momentum=None), nn.BatchNorm2d(6, affine=False)
    )
    norms.append(nn.BatchNorm2d(6, track_running_stats=False))
    norms.append(BatchNormAct2d(6))
    norms[0].weight.data.normal_()
    norms[2].weight.requires_grad_(False)
    return norms, torch.randn(8, 6, 5, 3) * 3 + 2, torch.randn(8, 6, 5, 3)


def _one_of_two(rank: int, port: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    norms, x, g = _norms()
    synchronise_batch_norm(norms)
    part = slice(4 * rank, 4 * rank + 4)
    x = x[part].clone().requires_grad_()
    for _ in range(2):
        y = norms(x)
    y.backward(g[part])
    grads = {name: p.grad for name, p in norms.named_parameters() if p.grad is not None}
    for grad in grads.values():
        dist.all_reduce(grad)
    norms.eval()
    torch.save((y.detach(), x.grad, grads, norms.state_dict(), norms[:4](x).detach()), f"{path}/{rank}.pt")
    dist.destroy_process_group()


def test_global_batch_norm_is_batch_norm_of_the_whole_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_one_of_two, (port, str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    norms, x, g = _norms()
    x.requires_grad_()
    for _ in range(2):
        y = norms(x)
    y.backward(g)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5)  # noqa: E731
    close(torch.cat([part[0] for part in parts]), y.detach())
    close(torch.cat([part[1] for part in parts]), x.grad)
    expected = {name: p.grad for name, p in norms.named_parameters() if p.grad is not None}
    norms.eval()
    for rank, part in enumerate(parts):
        assert part[2].keys() == expected.keys()
        close(part[2], expected)
        close(part[3], norms.state_dict())
        close(part[4], norms[:4](x[4 * rank : 4 * rank + 4]).detach())


def test_batch_norm_alone_is_torchs_own(tmp_path):
    norms, x, _ = _norms()
    expected = norms(x)
    norms, x, _ = _norms()
    synchronise_batch_norm(norms)
    assert [isinstance(norm, GlobalBatchNorm2d) for norm in norms].count(True) == 5
    assert torch.equal(norms(x), expected)
