"""What fuzzing.py reads: for each reader a function that makes a good file and returns one that reads others.

The returned function writes a mutated or forged file, made from a random generator, and reads it as a command would.
With a generator `mutations.Unchanged` the file is good.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import random
import shutil
import struct
import sys
import tarfile
import unittest.mock
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
import yaml
from mutations import EVIL, Unchanged, as_json, forged, mutated
from PIL import Image
from torch import Tensor

import fastgan
from fastgan import checkpoint
from fastgan.data.images import decode, inspect_image
from fastgan.errors import ArgumentError

Read = Callable[[random.Random], None]
TINY = "--variant dcgan --width 8 --max-width 8 --latent 4 --batch 8 --resolution 8 --kimg 0.016 --samples 1".split()


def _run(folder: Path) -> Path:
    """A small finished run."""
    from fastgan.cli import train

    with contextlib.redirect_stdout(io.StringIO()):
        assert train.main([*TINY, "--out", str(folder / "run")]) == 0
    return folder / "run"


def _restored(folder: Path, work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder, work)


def _safetensors(content: bytes, rng: random.Random) -> bytes:
    """A file whose header, tensors or bytes are changed."""
    if isinstance(rng, Unchanged):
        return content
    way, length = rng.randrange(3), int.from_bytes(content[:8], "little")
    if way == 0:
        return mutated(content, rng)
    body = bytearray(content[8 + length :])
    header = json.loads(content[8 : 8 + length])
    if way == 1:
        header = forged(header, rng)
    elif body:
        at = rng.randrange(len(body) // 4) * 4
        body[at : at + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), 1e30)))
    text = as_json(header)
    return len(text).to_bytes(8, "little") + text + bytes(body)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> Read:
    """Checkpoints with changed files, whose hashes are right in two cases of three: `fastgan.load`, `--resume`."""
    from fastgan.training.checkpoints.resume import require_fitting

    run = _run(folder)
    path = checkpoint.existing(run)[-1]
    for older in checkpoint.existing(run)[:-1]:
        shutil.rmtree(older)
    names = ("checkpoint.json", "generator.safetensors", "training.safetensors")
    good = {name: (path / name).read_bytes() for name in names}

    def read(rng: random.Random) -> None:
        files = dict(good)
        name = rng.choice(names)
        meta = json.loads(good["checkpoint.json"])
        if name == "checkpoint.json":
            meta = forged(meta, rng)
        else:
            files[name] = _safetensors(good[name], rng)
        if isinstance(meta, dict) and rng.random() < 0.67:
            for one in names[1:]:
                with contextlib.suppress(Exception):
                    digest = hashlib.sha256(files[one]).hexdigest()
                    meta["files"][one] = {"bytes": len(files[one]), "sha256": digest}
            meta.pop("sha256", None)
            meta["sha256"] = checkpoint._digest(meta)
        files["checkpoint.json"] = as_json(meta)
        if rng.random() < 0.1:
            files["checkpoint.json"] = mutated(files["checkpoint.json"], rng)
        for one, content in files.items():
            (path / one).write_bytes(content)
        with contextlib.suppress(ArgumentError):
            str(fastgan.load(run))
        stored = checkpoint.read(run, "--resume")
        stored.require("networks")
        require_fitting(stored)

    return read


# --- prepared sets ----------------------------------------------------------------------------------------------------


def prepared_sets(folder: Path) -> Read:
    """Sets with a forged manifest or a changed file: opened, and every image of every resolution read."""
    from fastgan.data import open_source
    from fastgan.data.preparation.prepare import prepare
    from fastgan.data.preparation.settings import Settings

    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        (folder / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "photos" / "ab"[i % 2] / f"{i}.png")
    whole = folder / "whole"
    made = prepare(str(folder / "photos"), whole, Settings(per_shard=2, cache_to=8), workers=1)
    names = ["manifest.json", *made.files]
    work = folder / "set"

    def read(rng: random.Random) -> None:
        _restored(whole, work)
        name = rng.choice(names) if rng.random() < 0.5 else "manifest.json"
        content = (work / name).read_bytes()
        if name == "manifest.json" and rng.random() < 0.7:
            changed = as_json(forged(json.loads(content), rng)).replace(b'"format":', b'"format": ')
        else:
            changed = mutated(content, rng)
            if name != "manifest.json" and rng.random() < 0.7:  # sizes are right
                changed = (changed + bytes(len(content)))[: len(content)]
        (work / name).write_bytes(changed)
        source = open_source(f"prepared:{work}", 16)
        for resolution in (4, 8, 16):
            source.arrays(resolution)
            for index in range(len(source)):
                assert source.read(index, resolution).shape[-1] == resolution
        list(source.manifest.names())  # type: ignore[attr-defined]
        source.manifest.classes()  # type: ignore[attr-defined]

    return read


# --- runs -------------------------------------------------------------------------------------------------------------


def runs(folder: Path) -> Read:
    """Runs with a changed config.yaml, metrics.jsonl or evaluation.jsonl: what `--resume` and `export` read of them."""
    from fastgan.cli import train
    from fastgan.export import model_card
    from fastgan.training import run_setup
    from fastgan.training.observability.metrics_log import MetricsLog

    run = _run(folder)
    row = {"kimg": 0.016, "metrics": {"fid": 3.0}, "images": {"generated": 5}, "features": "digits", "data": "digits"}
    (run / "evaluation.jsonl").write_text(json.dumps(row) + "\n")
    names = ("config.yaml", "metrics.jsonl", "evaluation.jsonl")
    good = {name: (run / name).read_bytes() for name in names}

    def read(rng: random.Random) -> None:
        for name, content in good.items():
            (run / name).write_bytes(content)
        name = rng.choice((*names, "config.yaml"))
        if rng.random() < 0.4:
            changed = mutated(good[name], rng)
        elif name == "config.yaml":
            changed = yaml.safe_dump(forged(yaml.safe_load(good[name]), rng)).encode(errors="replace")
        else:
            changed = b"".join(as_json(forged(json.loads(line), rng)) + b"\n" for line in good[name].splitlines())
        (run / name).write_bytes(changed)
        for one in model_card.evaluations(run, 16):
            model_card.render({"networks": {**NETWORKS}, "variant": "dcgan"}, ["model.onnx"], [one])
        run_setup._images_seen(run)
        with without_events():
            log = MetricsLog(run, active=True, total=1000, seen=16)
            log.evaluation(24, {"features": "digits", "metrics": {"frechet_distance": 1.0}})
            log.close()
        request = train.parse(["--resume", str(run)])
        run_setup.checkpoint_to_resume(request.resume, run, request.variant, request.config)

    return read


@contextlib.contextmanager
def without_events() -> Iterator[None]:
    """TensorBoard's writer starts a thread and a file for each log, and reads nothing."""
    stub = unittest.mock.MagicMock()
    with unittest.mock.patch.dict(sys.modules, {"torch.utils.tensorboard": stub}):
        yield


NETWORKS = {"model": "dcgan", "resolution": 8, "channels": 1, "latent": 4, "num_classes": 0}


# --- exported files ---------------------------------------------------------------------------------------------------


def zoo_state() -> dict[str, Tensor]:
    """Weights of a generator of 8 px, under the names that pytorch_GAN_zoo has."""
    shapes = {"formatLayer": (64, 4), "groupScale0.0": (4, 4, 3, 3)}
    shapes |= {f"scaleLayers.0.{i}": (4, 4, 3, 3) for i in range(2)}
    shapes |= {f"toRGBLayers.{i}": (3, 4, 1, 1) for i in range(2)}
    state = {f"{name}.module.weight": torch.ones(shape) for name, shape in shapes.items()}
    return state | {f"{name}.module.bias": torch.ones(shape[0]) for name, shape in shapes.items()}


def exports(folder: Path) -> Read:
    """Exported files of all formats, and pickles in the layout of pytorch_GAN_zoo."""
    import onnx

    from fastgan.export import formats, pytorch_gan_zoo
    from fastgan.models import build

    values = {**NETWORKS, "width": 4, "max_width": 4, "norm_g": "batch"}
    torch.manual_seed(0)
    generator = build(**values)[0].eval().requires_grad_(False)
    meta = {"networks": values, "variant": "dcgan", "images": 1000}
    good = {name: one.write(generator, meta, None) for name, one in formats.FORMATS.items()}
    pickle = io.BytesIO()
    torch.save({"config": {}, "netG": zoo_state()}, pickle)

    def onnx_forged(content: bytes, rng: random.Random) -> bytes:
        if isinstance(rng, Unchanged):
            return content
        model = formats._onnx_model(content)
        node = model.graph.node[rng.randrange(len(model.graph.node))]
        way = rng.randrange(7)
        if way == 0:
            node.op_type = rng.choice(("If", "Loop", "Scan", "Custom", "", "RandomNormal", "x" * 500))
        elif way == 1:
            node.domain = rng.choice(("com.evil", "ai.onnx.ml", "\x1b[31m"))
        elif way == 2:
            tensor = model.graph.initializer[0]
            tensor.data_location = 1
            tensor.external_data.add(key="location", value="/etc/passwd")
        elif way == 3:  # large tensors of few bytes
            shape = np.array([rng.choice((1, 2**10, 2**28, 2**40))], np.int64)
            model.graph.initializer.append(onnx.numpy_helper.from_array(shape, "much"))
            model.graph.node.insert(0, onnx.helper.make_node("ConstantOfShape", ["much"], ["large"]))
        elif way == 4:
            for attribute in node.attribute:
                attribute.ints[:] = [rng.choice((0, 1, 2, 1000, 2**20, 2**62)) for _ in attribute.ints]
        elif way == 5:
            for tensor in model.graph.initializer:
                if tensor.data_type == 7 and rng.random() < 0.5:
                    values = onnx.numpy_helper.to_array(tensor) * rng.choice((-1, 0, 2, 1000, 2**40))
                    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        else:
            model.metadata_props[0].value = as_json(forged(meta, rng)).decode()
        return model.SerializeToString()

    def read(rng: random.Random) -> None:
        if rng.random() < 0.15:
            (folder / "zoo.pt").write_bytes(mutated(pickle.getvalue(), rng))
            pytorch_gan_zoo.read(folder / "zoo.pt")
            return
        name = rng.choice([*good, "safetensors", "onnx"])
        content = good[name]
        if name == "safetensors" and rng.random() < 0.8:
            length = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + length])
            header["__metadata__"]["fastgan"] = json.dumps(forged(meta, rng))
            text = as_json(header)
            content = len(text).to_bytes(8, "little") + text + content[8 + length :]
            content = content if rng.random() < 0.5 else _safetensors(content, rng)
        elif name == "onnx" and rng.random() < 0.6:
            content = onnx_forged(content, rng)
        else:
            content = mutated(content, rng)
        file = folder / f"model{formats.FORMATS[name].suffix}"
        file.write_bytes(content)
        with contextlib.suppress(ArgumentError):
            formats.read_meta(file)
        trained = fastgan.load(file)
        str(trained)
        trained.sample(1)

    return read


# --- archives and images ----------------------------------------------------------------------------------------------


def _image_files() -> dict[str, bytes]:
    """A small image of every format that Pillow writes here, also EPS, which it reads by Ghostscript."""
    image, files = Image.effect_noise((40, 32), 60).convert("RGB"), {}
    Image.init()
    for kind in sorted(Image.SAVE):
        with contextlib.suppress(Exception):
            out = io.BytesIO()
            image.save(out, kind)
            files[kind] = out.getvalue()
    return {kind: content for kind, content in files.items() if kind not in ("PDF", "PALM")}


def images(folder: Path) -> Read:
    """Image files of all formats: inspected and decoded, with one verdict."""
    files = list(_image_files().values())

    def read(rng: random.Random) -> None:
        content = mutated(rng.choice(files), rng)
        info = inspect_image(lambda: io.BytesIO(content), "x")
        if info.problem:
            raise ArgumentError("--data", "x", info.problem)
        decode(content, 16, rng.choice((1, 3, 4)))

    return read


def archives(folder: Path) -> Read:
    """Zips and tars: listed, and every image inspected and decoded."""
    from fastgan.data.preparation.archives import TarCollection, ZipCollection

    files = list(_image_files().values())
    packed, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for i, method in enumerate((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)):
            archive.writestr(f"{'ab'[i % 2]}/{i}.png", files[i], method)
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        for i in range(4):
            for name, content in ((f"{i}.png", files[i]), (f"{i}.json", b'{"label": 1}')):
                member = tarfile.TarInfo(f"./x/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

    def read(rng: random.Random) -> None:
        zipped = rng.random() < 0.5
        file = folder / ("a.zip" if zipped else "a.tar")
        file.write_bytes(mutated(packed.getvalue() if zipped else tarred.getvalue(), rng))
        collection = ZipCollection(file) if zipped else TarCollection(file, [file])
        for image in collection.images():
            if not image.problem and not collection.inspect(image).problem:
                collection.pixels(image, 8, 3, False)

    return read


def labels(folder: Path) -> Read:
    """Folders with a changed dataset.json, and idx files in the layout of MNIST, packed or not."""
    from fastgan.data import open_source
    from fastgan.data.preparation.collection import FolderCollection

    photos, root = folder / "photos", folder / "mnist"
    for i in range(3):
        (photos / "00000").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 50 * i).save(photos / "00000" / f"img{i:08}.png")
    table = {"labels": [[f"00000/img{i:08}.png", i] for i in range(3)]}
    idx = {
        "train-images-idx3-ubyte": struct.pack(">4i", 0x803, 3, 8, 8) + bytes(3 * 64),
        "train-labels-idx1-ubyte": struct.pack(">2i", 0x801, 3) + bytes(range(3)),
    }

    def read(rng: random.Random) -> None:
        if rng.random() < 0.5:
            content = as_json(forged(table, rng)) if rng.random() < 0.6 else mutated(as_json(table), rng)
            (photos / "dataset.json").write_bytes(content)
            with contextlib.suppress(ArgumentError):
                list(FolderCollection(photos).images())
            open_source(str(photos), 8).read(0, 8)
            return
        _restored(photos, root)  # a folder without idx files
        changed, packed = rng.choice(list(idx)), rng.random() < 0.5
        for name, good in idx.items():
            content = mutated(good, rng) if name == changed else good
            content = gzip.compress(content) if packed else content
            if packed and name == changed and rng.random() < 0.5:
                content = mutated(content, rng)
            (root / (f"{name}.gz" if packed else name)).write_bytes(content)
        open_source(f"mnist:{root}", 8).read(0, 8)

    return read


# --- configurations ---------------------------------------------------------------------------------------------------


def configurations(folder: Path) -> Read:
    """YAML files of `--config` and hostfiles."""
    from fastgan.cli import train
    from fastgan.config import Config, to_dict
    from fastgan.training.resilience.supervisor import read_hostfile

    good, file = to_dict(Config()), folder / "config.yaml"

    def read(rng: random.Random) -> None:
        if rng.random() < 0.1:
            file.write_bytes(mutated(b"host1 slots=4\nhost2 slots=8\n", rng))
            read_hostfile(file)
            return
        values = forged(good, rng)
        if isinstance(values, dict) and rng.random() < 0.3 and not isinstance(rng, Unchanged):
            values[rng.choice(("variant", "preset", "schema"))] = rng.choice(EVIL)
        content = yaml.safe_dump(values, allow_unicode=True).encode(errors="replace")
        file.write_bytes(content if rng.random() < 0.6 else mutated(content, rng))
        train.parse(["--variant", "dcgan", "--config", str(file)])

    return read


# --- the page ---------------------------------------------------------------------------------------------------------


def page(folder: Path) -> Read:
    """Requests to the page of `fastgan explore`: forged calls of each of its functions, other paths and headers."""
    from starlette.testclient import TestClient

    from fastgan.explorer import page as explorer

    port = 7861
    app = explorer.application(fastgan.load(_run(folder)), port)
    client = TestClient(app, base_url=f"http://127.0.0.1:{port}", raise_server_exceptions=False)
    client.__enter__()
    file = {"path": str(folder / "run" / "config.yaml"), "meta": {"_type": "gradio.FileData"}}
    good = {"picture": [2, 0, 1, 0.5, 1.0, -1], "neighbors": [2, 0, 0, 0.1, 1.0, -1], "walk": [2, 0, 0, 1.0, -1]}
    addresses = ("/", "/config", "/gradio_api/info", "/theme.css", "/assets/../../x", "/static/img/logo.svg")
    addresses += ("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/run/picture", "/gradio_api/call/v2/walk")
    addresses += ("/gradio_api/file=/etc/passwd", "/file=../../etc/passwd", "/gradio_api/proxy=http://evil.example/")
    addresses += ("/gradio_api/file=http://evil.example/x.png", "/?deep_link=../../etc", "/gradio_api/deep_link")

    def refuse(answer: Any) -> None:
        """ArgumentError with the line of an answer that refuses a request."""
        assert answer.status_code < 500, answer.text[:300]
        if answer.status_code >= 400:
            raise ArgumentError("request", answer.status_code, answer.text.strip())

    def called(rng: random.Random) -> None:
        name = rng.choice(list(good))
        body = {"data": forged(good[name], rng), "session_hash": f"s{rng.random()}"[:12].replace(".", "")}
        if not isinstance(rng, Unchanged) and isinstance(body["data"], list) and body["data"] and rng.random() < 0.2:
            body["data"][rng.randrange(len(body["data"]))] = file
        body = forged(body, rng) if rng.random() < 0.3 else body
        join = rng.random() < 0.3
        if join and isinstance(body, dict):
            body["fn_index"] = list(good).index(name)
            if rng.random() < 0.2 and not isinstance(rng, Unchanged):
                body["fn_index"] = rng.choice(EVIL)
        content = mutated(as_json(body), rng) if rng.random() < 0.2 else as_json(body)
        address = f"/gradio_api/{'queue/join' if join else f'call/{name}'}"
        answer = client.post(address, content=content, headers={"Content-Type": "application/json"})
        refuse(answer)
        session = json.loads(content).get("session_hash") or answer.json()["event_id"]
        text = client.get("/gradio_api/queue/data", params={"session_hash": session}).text
        assert '"success":true' in text.replace(" ", ""), (body, text[-300:])

    def read(rng: random.Random) -> None:
        if rng.random() < 0.7:
            called(rng)
        elif isinstance(rng, Unchanged):
            for address in ("/", "/config", "/gradio_api/info", "/theme.css", "/static/img/logo.svg"):
                refuse(client.get(address))
        else:
            method, address = rng.choice(("GET", "POST", "PUT", "DELETE")), rng.choice(addresses)
            headers = {} if rng.random() < 0.7 else {"Origin": "http://evil.example"}
            body = mutated(as_json({"data": good["walk"], "fn_index": 2, "session_hash": "x"}), rng)
            address = mutated(address.encode(), rng).decode("latin-1") if rng.random() < 0.5 else address
            answer = client.request(method, quote(f"/{address.lstrip('/')}", "/=?:"), content=body, headers=headers)
            assert "root:" not in answer.text
            assert not headers or answer.status_code == 403
            refuse(answer)

    return read


READERS: dict[str, Callable[[Path], Read]] = {
    "checkpoint": checkpoints,
    "prepared": prepared_sets,
    "run": runs,
    "export": exports,
    "images": images,
    "archives": archives,
    "labels": labels,
    "config": configurations,
    "page": page,
}
