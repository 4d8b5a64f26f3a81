"""The commands: outputs, refusals, determinism, ways back, cost."""

import fcntl
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision

from convert import from_d2, to_d2
from convert.sidecar_files import read_sidecar
from convert.writer import write_together
from foundation.errors import UserError
from foundation.files import sha256_of
from tests.convert.checkpoints import LINEAR, moco, own, own_finetuned, under
from tests.convert.conftest import assert_holds, detectron2_name, encoder_of, load_pickle, tiny_resnet, values_of

ROOT = Path(__file__).parents[2]


def command(*arguments, cwd, **options):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, **options)


def test_script_and_module_from_any_folder(query, tmp_path):
    torch.save(encoder_of(query), tmp_path / "in.pth")
    done = command(ROOT / "convert" / "to_d2.py", "in.pth", "out.pkl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "265 tensors" in done.stdout
    assert_holds(tmp_path / "out.pkl", values_of(query))
    again = command(ROOT / "convert" / "to_d2.py", "in.pth", "out.pkl", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.startswith("error: out.")
    assert again.stderr.count("\n") == 1
    assert again.stdout == ""


def test_neither_pytorch_nor_detectron2_is_imported(query, tmp_path):
    """Start-up is most of the time of a conversion: PyTorch alone takes two seconds and 600 MB."""
    torch.save(encoder_of(query), tmp_path / "in.pth")
    code = (
        "import sys; from convert.to_d2 import main; main(['in.pth', 'out.pkl']);"
        "sys.exit(', '.join({'torch', 'torchvision', 'detectron2', 'detection'} & sys.modules.keys()) or 0)"
    )
    done = command("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_cost_of_a_resnet50(tmp_path):
    """Below 3 s with start-up, and below three times the file in memory."""
    network = torchvision.models.resnet50(weights=None)
    torch.save(network.state_dict(), tmp_path / "in.pth")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = (
        "from convert.to_d2 import main; main(['in.pth', 'out.pkl']);"
        "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    )
    done = command("-c", code, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    processor_time = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert processor_time < 3.0
    peak = 1024 * int(done.stdout.split()[-1])
    assert peak < 3 * (tmp_path / "in.pth").stat().st_size
    assert_holds(tmp_path / "out.pkl", values_of(network))


def test_same_input_same_bytes(query, key, convert, tmp_path):
    content = moco(query, key)
    first = convert(content)
    sidecar = first.with_suffix(".json").read_bytes()
    data = first.read_bytes()
    content["state_dict"] = dict(reversed(list(content["state_dict"].items())))
    second = convert(content, "--overwrite")
    assert second.read_bytes() == data
    assert {**json.loads(sidecar), "sha256": 0} == {**json.loads(second.with_suffix(".json").read_text()), "sha256": 0}
    for target, suffix in (("torchvision", ".pth"), ("timm", ".safetensors")):
        network = {"state_dict": torchvision.models.resnet18(weights=None).state_dict()}
        made = [convert(network, "--to", target, output=f"{part}-{target}{suffix}").read_bytes() for part in ("a", "b")]
        assert made[0] == made[1]


def test_pickle_is_one_that_every_numpy_reads(query, convert):
    data = convert(encoder_of(query)).read_bytes()
    assert b"numpy._core" not in data
    content = pickle.loads(data)
    assert content["matching_heuristics"] is True
    assert content["__author__"].startswith("corinfomax")
    assert all(array.flags.writeable for array in content["model"].values())


def test_nothing_is_left_when_writing_fails(query, convert, tmp_path, monkeypatch):
    output = convert(encoder_of(query))
    old = output.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device \(\d+ MB free\)"):
        convert(own(query, query), "--overwrite")
    assert output.read_bytes() == old
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_one_line_although_closing_the_file_fails_too(tmp_path, files_up_to):
    with files_up_to(10), pytest.raises(UserError, match="a cannot be written: File too large"):
        write_together({tmp_path / "a": lambda file: file.write(b"more than ten bytes, all in the buffer")})
    assert not list(tmp_path.iterdir())


def test_a_failing_check_leaves_every_path(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    paths[0].write_bytes(b"old")

    def refuse(aside):
        assert {path.read_bytes() for path in aside.values()} == {b"new"}
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        write_together({path: lambda file: file.write(b"new") for path in paths}, refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert paths[0].read_bytes() == b"old"


def test_sidecar_and_weights_belong_together(query, key, convert, tmp_path, monkeypatch):
    """A conversion that is killed between the two renames leaves the sidecar of one and the weights of another."""
    output = convert(encoder_of(query))
    assert read_sidecar(output)["weights_sha256"] == sha256_of(output)
    replace = os.replace

    def killed(source, target):
        if Path(target) == output:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(encoder_of(key), "--overwrite")
    monkeypatch.undo()
    assert_holds(output, values_of(query))
    with pytest.raises(UserError, match=r"out\.json does not belong to .*out\.pkl.*--overwrite"):
        read_sidecar(output)
    with pytest.raises(UserError, match="does not belong"):
        from_d2.main([str(output), str(tmp_path / "back.safetensors"), "--to", "safetensors"])
    assert read_sidecar(convert(encoder_of(key), "--overwrite"))["sha256"]


@pytest.mark.slow
def test_conversions_killed_at_random_moments(query, key, tmp_path):
    """The output is one conversion or the other, and a sidecar of the other one is noticed."""
    rng = random.Random(0)
    sources = {"a.pth": encoder_of(query), "b.pth": encoder_of(key)}
    for name, state in sources.items():
        torch.save(state, tmp_path / name)
    to_d2.main([str(tmp_path / "a.pth"), str(tmp_path / "out.pkl")])
    program = "from convert.to_d2 import main; print(flush=True); main(['{}', 'out.pkl', '--overwrite'])"
    for round_ in range(30):
        code = program.format("ab"[round_ % 2] + ".pth")
        process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        first = load_pickle(tmp_path / "out.pkl")["model"]["stem.conv1.weight"]
        whose = [name for name, state in sources.items() if np.array_equal(first, state["conv1.weight"].numpy())]
        assert len(whose) == 1
        assert_holds(tmp_path / "out.pkl", values_of(query if whose == ["a.pth"] else key))
        try:
            assert read_sidecar(tmp_path / "out.pkl")["source"] == whose[0]
        except UserError as error:
            assert "does not belong" in str(error)  # noqa: PT017
    to_d2.main([str(tmp_path / "b.pth"), str(tmp_path / "out.pkl"), "--overwrite"])
    assert not list(tmp_path.glob(".*.partial*"))


def test_sidecars_of_earlier_versions_have_no_digest(query, convert):
    output = convert(encoder_of(query))
    fields = json.loads(output.with_suffix(".json").read_text())
    del fields["weights_sha256"]
    output.with_suffix(".json").write_text(json.dumps(fields))
    assert read_sidecar(output) == fields


def test_files_of_killed_conversions_are_removed(query, convert, tmp_path):
    """Not those of a conversion that is still at work, nor those of other outputs."""
    abandoned, other, busy = (tmp_path / f".{name}.partial.pkl" for name in ("out.99999", "other.99999", "out.88888"))
    for path in (abandoned, other, busy):
        path.write_bytes(b"part")
    with busy.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        convert(encoder_of(query))
    assert (abandoned.exists(), other.exists(), busy.exists()) == (False, True, True)


@pytest.mark.parametrize(("epoch", "steps", "finished"), [(1, 0, False), (2, 0, True), (1, 4, True), (1, 5, False)])
def test_an_unfinished_run_is_converted_with_a_warning(epoch, steps, finished, query, convert, capsys):
    content = own(query, query)
    content["position"] = {"epoch": epoch, "step": 4}
    content["config"]["TRAIN"] = {"EPOCHS": 2, "MAX_STEPS": steps}
    output = convert(content)
    expected = [] if finished else ["the run was not finished: this is its state after 1 of 2 epochs"]
    assert read_sidecar(output)["warnings"] == expected
    assert ("warning: the run was not finished" in capsys.readouterr().out) is not finished


def test_the_folder_of_a_run_is_taken(query, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"not that of a run: there is no encoder\.safetensors or"):
        to_d2.main([str(tmp_path / "run"), str(tmp_path / "out.pkl")])
    torch.save(own(query, query), tmp_path / "run/checkpoints/last.pt")
    to_d2.main([str(tmp_path / "run"), str(tmp_path / "out.pkl")])
    assert_holds(tmp_path / "out.pkl", values_of(query))


@pytest.mark.parametrize("command", [to_d2, from_d2], ids=["to_d2", "from_d2"])
def test_the_checkpoint_in_a_run_folder_is_not_replaced(command, query, tmp_path):
    """The detector's heads would be lost."""
    model = {f"backbone.{detectron2_name(name)}": torch.from_numpy(value) for name, value in values_of(query).items()}
    path = tmp_path / "model_final.pth"
    torch.save({"model": model}, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"model_final\.pth is the input itself"):
        command.main([str(tmp_path), str(path), "--to", "torchvision", "--overwrite"])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in.pth"], "--list"),
        (["in.pth", "out.pth"], r"end in \.pkl"),
        (["in.pth", "out.pkl", "--to", "timm"], r"end in \.pth"),
        (["in.pth", "nowhere/out.pkl"], "does not exist; create it first"),
        (["in.pth", "folder.pkl"], "is a folder"),
        (["in.pth", "out.pth", "--to", "torchvision", "--verify"], "--to d2"),
        (["in.pth", "out.pkl", "--to", "onnx"], "invalid choice"),
        (["in.pkl", "in.pkl", "--overwrite"], "is the input itself"),
        (["in.pth", "x.pth", "--to", "torchvision"], "no network called resnet50_stem8"),
    ],
)
def test_refusals(arguments, message, query, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(encoder_of(query), "in.pth")
    torch.save(encoder_of(query), "in.pkl")
    Path("folder.pkl").mkdir()
    before = sorted(os.listdir())
    with pytest.raises(UserError, match=message):
        to_d2.main(arguments)
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_values_that_are_not_finite(value, query, convert):
    state = {name: tensor.double() for name, tensor in encoder_of(query).items()}
    state["layer2.1.bn2.bias"][3] = value
    with pytest.raises(UserError, match=r"res3\.1\.conv2\.norm\.bias holds NaN or infinite"):
        convert(state)


def test_list_shows_what_is_there(query, key, tmp_path, capsys):
    torch.save(moco(query, key), tmp_path / "moco.pth.tar")
    to_d2.main([str(tmp_path / "moco.pth.tar"), "--list"])
    text = capsys.readouterr().out
    assert text.index("state_dict:encoder_q  [MoCo v1/v2, PCL]") < text.index("state_dict:encoder_k")
    assert "265 tensors" in text
    torch.save({"model": {"cls_token": torch.ones(3)}}, tmp_path / "vit.pth")
    to_d2.main([str(tmp_path / "vit.pth"), "--list"])
    assert "none" in capsys.readouterr().out


def test_back_to_torchvision_is_exact(convert, tmp_path):
    network = torchvision.models.resnet18(weights=None)
    converted = convert(network.state_dict())
    for name in ("back.pth", "back.safetensors"):
        from_d2.main([str(converted), str(tmp_path / name), "--overwrite"])
        load = torch.load if name.endswith(".pth") else safetensors.torch.load_file
        state = load(tmp_path / name)
        other = torchvision.models.resnet18(weights=None)
        missing, unexpected = other.load_state_dict(state, strict=False)
        assert [part for part in missing if "num_batches" not in part] == ["fc.weight", "fc.bias"]
        assert unexpected == []
        for part, value in values_of(network).items():
            np.testing.assert_array_equal(other.state_dict()[part].numpy(), value)
    again = convert(None, name="back.pth", output="again.pkl")
    assert again.read_bytes() == converted.read_bytes()


def test_from_a_trained_detector(convert, tmp_path):
    """C4 keeps res5 in its head, with the extra norm after it; FPN has its lateral layers. The run says its pixels."""
    network = tiny_resnet(4, width=64)
    model = load_pickle(convert(network.state_dict()))["model"]
    short = {name: torch.from_numpy(value) for name, value in model.items()}
    heads = under("proposal_generator.rpn_head.conv.", LINEAR) | under("roi_heads.box_predictor.cls_score.", LINEAR)
    c4 = {("roi_heads." if name.startswith("res5") else "backbone.") + name: value for name, value in short.items()}
    c4 |= heads | under("roi_heads.res5.norm.", torch.nn.BatchNorm2d(3).state_dict())
    fpn = under("backbone.bottom_up.", short) | heads | {"backbone.fpn_lateral2.weight": torch.ones(3)}
    (tmp_path / "config.yaml").write_text(
        "INPUT: {FORMAT: RGB}\n"
        "MODEL:\n"
        "  PIXEL_MEAN: [123.675, 116.28, 103.53]\n"
        "  PIXEL_STD: [58.395, 57.12, 57.375]\n"
        "  RESNETS: {STRIDE_IN_1X1: false}\n"
    )
    for index, state in enumerate((c4, fpn)):
        torch.save({"model": state, "optimizer": {}, "iteration": 99}, tmp_path / f"model_final{index}.pth")
        from_d2.main([str(tmp_path / f"model_final{index}.pth"), str(tmp_path / f"back{index}.pth")])
        back = torch.load(tmp_path / f"back{index}.pth")
        assert back.keys() == values_of(network).keys()
        for name, value in values_of(network).items():
            np.testing.assert_array_equal(back[name].numpy(), value)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"BGR images.*config\.yaml"):
        from_d2.main([str(tmp_path / "model_final0.pth"), str(tmp_path / "x.pth")])
    with pytest.raises(UserError, match="not one of Detectron2's"):
        from_d2.main([str(tmp_path / "back0.pth"), str(tmp_path / "x.pth")])


@pytest.mark.parametrize("name", ["model.backbone.bottom_up.stages", "model.backbone.stages"], ids=["FPN", "C4"])
def test_a_lazy_config_says_what_its_detector_takes(name, query, tmp_path):
    """As `default_setup` writes it for `lazyconfig_train_net.py`."""
    model = {f"backbone.{detectron2_name(name)}": torch.from_numpy(value) for name, value in values_of(query).items()}
    torch.save({"model": model}, tmp_path / "model_final.pth")
    stages = {"_target_": "detectron2.modeling.ResNet.make_default_stages", "stride_in_1x1": False}
    config = {"pixel_mean": [1.0, 2.0, 3.0], "pixel_std": [4.0, 5.0, 6.0], "input_format": "RGB"}
    backbone = {"bottom_up": {"stages": stages}} if "bottom_up" in name else {"stages": stages}
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {**config, "backbone": backbone}}))
    from_d2.main([str(tmp_path), str(tmp_path / "back.safetensors"), "--to", "safetensors"])
    sidecar = read_sidecar(tmp_path / "back.safetensors")
    assert (sidecar["pixel_mean"], sidecar["pixel_std"]) == ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert (sidecar["format"], sidecar["stride_in_1x1"]) == ("RGB", False)


def test_a_second_conversion_knows_what_the_first_knew(query, convert, tmp_path):
    """A state dict of torchvision's has neither the statistics nor the objective; the sidecar beside it has both."""
    first = convert(own(query, query), output="first.pkl")
    assert read_sidecar(convert(None, name="first.pkl", output="second.pkl"))["trained_by"] == "corinfomax"
    path = tmp_path / "first.pth"
    torch.save(encoder_of(query), path)
    known = json.loads(first.with_suffix(".json").read_text()) | {"weights_sha256": sha256_of(path)}
    (tmp_path / "first.pth.json").write_text(json.dumps(known))
    sidecar = read_sidecar(convert(None, name="first.pth", output="third.pkl"))
    assert (sidecar["pixel_mean"], sidecar["trained_by"]) == ([127.5, 102.0, 76.5], "corinfomax")
    torch.save(encoder_of(query) | {"fc.weight": torch.ones(3)}, path)
    with pytest.raises(UserError, match="does not belong to"):
        convert(None, name="first.pth", output="fourth.pkl")


def test_encoder_file_of_this_project(query, convert):
    """What `--to safetensors` writes is what pretraining writes, and reads back with its own statistics."""
    output = convert(own(query, query), "--to", "safetensors", output="encoder.safetensors")
    with safetensors.safe_open(output, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "corinfomax-encoder"
    assert (metadata["mean"], metadata["std"], metadata["stem"]) == ("0.5,0.4,0.3", "0.2,0.2,0.1", "imagenet")
    again = convert(None, name="encoder.safetensors", output="again.pkl")
    assert_holds(again, values_of(query))
    sidecar = json.loads(again.with_suffix(".json").read_text())
    assert sidecar["pixel_mean"] == [127.5, 102.0, 76.5]
    assert (sidecar["family"], sidecar["trained_by"]) == ("CorInfoMax (this project), encoder", "corinfomax")


@pytest.mark.parametrize(
    ("content", "trained_by"),
    [
        (own, "corinfomax"),
        (own_finetuned, "supervised"),
        (lambda query, key: {**own_finetuned(query, key), "trained_by": None}, "CorInfoMax (this project), fine-tuned"),
        (moco, "MoCo v1/v2, PCL"),
    ],
)
def test_sidecar_says_what_trained_the_encoder(query, convert, content, trained_by):
    output = convert(content(query, query), output="whole.pkl")
    assert json.loads(output.with_suffix(".json").read_text())["trained_by"] == trained_by


@pytest.mark.parametrize("begun_from", ["", "imagenet.pth"])
def test_sidecar_says_what_the_training_began_from(query, convert, begun_from):
    content = own(query, query)
    content["config"]["ENCODER"] = {**content["config"]["ENCODER"], "WEIGHTS": begun_from}
    output = convert(content, output="whole.pkl")
    assert json.loads(output.with_suffix(".json").read_text())["begun_from"] == begun_from
    encoder = convert(content, "--to", "safetensors", output="encoder.safetensors")
    with safetensors.safe_open(encoder, framework="pt") as file:
        assert file.metadata().get("begun_from", "") == begun_from


def test_names_that_are_not_utf8_are_escaped(query, convert):
    content = own(query, query)
    content["config"]["ENCODER"] = {**content["config"]["ENCODER"], "WEIGHTS": "w\udcff.pth"}
    output = convert(content, output="whole\udcff.pkl")
    assert json.loads(output.with_suffix(".json").read_text())["begun_from"] == "w\\udcff.pth"
    encoder = convert(content, "--to", "safetensors", output="encoder.safetensors")
    with safetensors.safe_open(encoder, framework="pt") as file:
        assert file.metadata()["begun_from"] == "w\\udcff.pth"


def test_timm_loads_what_is_written_for_it(convert):
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet18", pretrained=False)
    converted = convert(network.state_dict())
    output = convert(network.state_dict(), "--to", "timm", output="timm.safetensors")
    other = timm.create_model("resnet18", pretrained=False, num_classes=0, checkpoint_path=str(output)).eval()
    image = torch.rand(1, 3, 64, 64)
    network.reset_classifier(0)
    assert torch.equal(other(image), network.eval()(image))
    assert len(load_pickle(converted)["model"]) == 100
