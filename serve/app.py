"""Scoring as a service: texts in over HTTP, what each brings to a finished run out.

An ingress checks requests and a scorer holds the model: the same `FeatureExtractor` as the batch pipeline, so a text
scores here as it does there. Requests that wait are measured together. (Annotations must stay real objects in this
module: Serve reads them to turn the config file's `args` into `AppArgs`.)
"""

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException as AnyHTTPException

from fac_ray.scoring import load_finished_run, score_sample, score_together
from serve.gate import Gate
from serve.requests import Sample, ScoreRequest, TooLarge

if TYPE_CHECKING:
    from fac_ray.features.extractor import SampleFeatures

BATCH_SAMPLES = 64
"""Samples that are measured together, of as many requests as it takes."""
BATCH_WAIT_S = 0.02
RETRY_AFTER_S = "1"
"""What a client is told to wait when the queue is full."""


class AppArgs(BaseModel):
    """`args` of the application in a Serve config file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    """Folder of a run that has its gaps."""
    max_samples: int = Field(default=32, ge=1, le=BATCH_SAMPLES)
    """Texts or chats in one request."""
    max_characters: int = Field(default=50_000, ge=1)
    """Length of one text, or of a chat's contents."""


def build(args: AppArgs) -> serve.Application:
    """The application, for `import_path: serve.app:build`."""
    refusal = {"status_code": 429, "retry_after_s": float(RETRY_AFTER_S)}
    scorer = serve.deployment(max_ongoing_requests=32, max_queued_requests=64, backpressure_config=refusal)(Scorer)
    return serve.deployment(max_ongoing_requests=256)(Ingress).bind(args, scorer.bind(args.run))


def num_samples(requests: list[list[Sample]]) -> int:
    """Size of a batch of requests, in samples."""
    return sum(len(samples) for samples in requests)


class Scorer:
    """Holds the model and the sets of the finished run. Scale this one, and give it the GPU."""

    def __init__(self, run_folder: str) -> None:
        from fac_ray.features.extractor import FeatureExtractor  # the ingress needs no torch

        self._run = load_finished_run(run_folder)
        config = self._run.config
        self._extractor = FeatureExtractor(config.model, config.sae, config.measure)

    async def score(self, samples: list[Sample]) -> dict[str, Any]:
        """Scores of checked samples, in their order, and of all of them together."""
        scores = [score_sample(self._run, features) for features in await self._measure(samples)]
        return {**self._run.identity, "items": scores, "together": score_together(self._run, scores)}

    async def gaps(self, offset: int, limit: int) -> dict[str, Any]:
        """A page of the missing features, the most wanted first."""
        return {**self._run.identity, "gaps": self._run.gaps.slice(offset, limit).to_pylist()}

    @serve.batch(max_batch_size=BATCH_SAMPLES, batch_wait_timeout_s=BATCH_WAIT_S, batch_size_fn=num_samples)
    async def _measure(self, requests: list[list[Sample]]) -> "list[list[SampleFeatures]]":
        flat = [sample for samples in requests for sample in samples]
        measured = iter(await asyncio.to_thread(self._extractor.extract, flat))
        return [[next(measured) for _ in samples] for samples in requests]


app = FastAPI(title="fac-ray", description="What a text covers of a finished run, and which gaps it closes.")
app.add_middleware(Gate)


@app.exception_handler(RequestValidationError)
async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """Every refusal has one shape: {"error": reason}."""
    problems = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors()]
    return JSONResponse({"error": "; ".join(problems)}, 422)


@app.exception_handler(AnyHTTPException)
async def refused(_: Request, error: AnyHTTPException) -> JSONResponse:
    """Every refusal has one shape: {"error": reason}."""
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def answered(response: Any) -> Any:
    """The scorer's answer, or 429 if its queue is full: come back later, rather than wait in a line without end."""
    try:
        return await response
    except BackPressureError as error:
        raise HTTPException(error.status_code, "the queue is full", {"Retry-After": RETRY_AFTER_S}) from error


@serve.ingress(app)
class Ingress:
    """Checks requests and passes them on; holds no model."""

    def __init__(self, args: AppArgs, scorer: DeploymentHandle) -> None:
        self._args = args
        self._scorer = scorer

    @app.post("/v1/score")
    async def score(self, request: ScoreRequest) -> dict[str, Any]:
        """What each text or chat covers of the run's relevant features, and which missing ones it switches on.

        An item that could not be measured has "error" in its place; the others stand.
        """
        try:
            samples = request.samples(self._args.max_samples, self._args.max_characters)
        except TooLarge as error:
            raise HTTPException(413, str(error)) from error
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        return await answered(self._scorer.score.remote(samples))

    @app.get("/v1/gaps")
    async def gaps(
        self, offset: Annotated[int, Query(ge=0)] = 0, limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> dict[str, Any]:
        """The run's missing features, the most wanted first, with their exemplars."""
        return await answered(self._scorer.gaps.remote(offset, limit))

    @app.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """Whether the ingress answers."""
        return {"status": "ok"}
