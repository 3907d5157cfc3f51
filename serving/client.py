"""A typed client: one method for one picture, one for many in flight."""

from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import numpy as np

from engine.errors import OptionError, QualityError, RuntimeUnavailableError, VitrineError
from engine.images import Picture
from engine.postprocess import PostProcess
from engine.request import Request

DEFAULT_TIMEOUT_S = 300.0


class Client:
    """Pictures from a Vitrine server over gRPC; `url` is `host:port`. Safe to share by threads."""

    def __init__(self, url: str = "127.0.0.1:8001") -> None:
        try:
            import tritonclient.grpc as triton
        except ImportError as error:
            raise RuntimeUnavailableError(
                f"{error.name} is not installed; pip install 'vitrine[triton]'"
            ) from None
        self._triton, self._url = triton, url
        self._client = triton.InferenceServerClient(url)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; requests still in flight fail."""
        self._client.close()

    def generate(
        self,
        model: str,
        label: str | None = None,
        *,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        height: int | None = None,
        width: int | None = None,
        postprocess: PostProcess | str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Picture:
        """One picture, uint8 `[H, W, C]`; an option of None is the model's default.

        A model takes a `label` or a `prompt`; `postprocess` may be a text as on the command line,
        "sharpen=0.5,upscale=2". Raises OptionError for a request that is not
        allowed, RuntimeUnavailableError where no server answers within `timeout_s`.
        """
        return self.submit(
            model,
            label,
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            height=height,
            width=width,
            postprocess=postprocess,
            timeout_s=timeout_s,
        ).result()

    def submit(
        self,
        model: str,
        label: str | None = None,
        *,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        height: int | None = None,
        width: int | None = None,
        postprocess: PostProcess | str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> "Future[Picture]":
        """`generate` without waiting: the future holds the picture or the error.

        Cancelling the future cancels the request on the server at its next step. Raises
        OptionError at once for a value that no model takes.
        """
        if (label is None) == (prompt is None):
            raise OptionError(f"a request has a label or a prompt, got {label!r} and {prompt!r}")
        options = {
            "label": label,
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "seed": seed,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "sampler": sampler,
            "height": height,
            "width": width,
            "postprocess": postprocess,
        }
        request = Request.of({name: v for name, v in options.items() if v is not None})
        return self._send(model, request, timeout_s)

    def _send(self, model: str, request: Request, timeout_s: float) -> "Future[Picture]":
        future: Future[Picture] = Future()
        call = self._client.async_infer(
            model,
            [self._subject(request)],
            lambda result, error: self._complete(future, result, error),
            client_timeout=timeout_s,
            parameters=request.model_dump(exclude={"label", "prompt"}, exclude_none=True),
        )
        future.add_done_callback(lambda done: call.cancel() if done.cancelled() else None)
        return future

    def _subject(self, request: Request) -> Any:
        name, text = (
            ("label", request.label) if request.label is not None else ("prompt", request.prompt)
        )
        assert text is not None
        tensor = self._triton.InferInput(name, [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[text.encode()]], np.object_))
        return tensor

    def _complete(self, future: "Future[Picture]", result: Any, error: Any) -> None:
        if not future.set_running_or_notify_cancel():
            return
        if error is None:
            future.set_result(result.as_numpy("image")[0])
        else:
            future.set_exception(self._translated(error))

    def _translated(self, error: Any) -> VitrineError:
        """Triton's status as one of our errors."""
        message, status = error.message(), str(error.status())
        match status.removeprefix("StatusCode."):
            case "INVALID_ARGUMENT" | "NOT_FOUND":
                return OptionError(message)
            case "UNAVAILABLE":
                return RuntimeUnavailableError(
                    f"no server answers at {self._url} ({message}); start one: "
                    "vitrine serve ARTIFACT, or correct the port"
                )
            case "INTERNAL" if " is broken (" in message:
                return QualityError(message)
            case "DEADLINE_EXCEEDED":
                return RuntimeUnavailableError(
                    f"{self._url} did not answer in time; raise timeout_s or send fewer requests"
                )
            case _:
                return RuntimeUnavailableError(f"{self._url} failed: {message} ({status})")
