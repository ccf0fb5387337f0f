"""What the processes of a server say to each other: typed, limited in size, never pickled.

HTTP process <-> supervisor <-> ranks, each over a Unix socket in a folder that only their user can enter. A frame is
its length (4 bytes, big endian) and a MessagePack map with the message's type in it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import msgspec
from msgspec import Struct

MAX_FRAME_BYTES = 8 << 20
"""Pictures lie in files; the largest message is a receipt, or a preview."""
_LENGTH = struct.Struct("!I")


class Item(Struct, frozen=True, kw_only=True):
    """One job's part in a call."""

    job: str
    prompt: str
    negative_prompt: str | None = None
    seed: int
    num_outputs: int = 1
    """Pictures, or videos."""


class Adapter(Struct, frozen=True, kw_only=True):
    """A LoRA of the server's folder."""

    name: str
    scale: float = 1.0


class Coding(Struct, frozen=True, kw_only=True):
    """What is asked of the model's autoencoder alone: latents to pixels, or pixels to latents."""

    task: str
    """decode, encode."""
    shape: tuple[int, ...] = ()
    """Of the tensor that came: latents (B, C, H, W), (B, C, F, H, W) or packed (B, tokens, 4 C); pixels (B, C, H, W) or
    (B, C, F, H, W). Empty for a picture."""
    dtype: str = ""
    """float16, bfloat16, float32: of that tensor, whose file has its values in their order and nothing else."""
    height: int | None = None
    """Of the picture that packed latents are of, in pixels."""
    width: int | None = None
    own_scaling: bool = False
    """Latents are scaled and shifted as the model's own pipeline does it."""
    scaling_factor: float | None = None
    shift_factor: float | None = None
    gives: str = "raw"
    """raw: what the autoencoder gives; unit: from 0 to 1, (N, C, H, W); bytes: uint8, (N, H, W, C); picture; video."""
    max_pixels: int
    """Of a picture, and frames of a video: what a rank holds it to that knows sizes which the server did not."""
    max_frames: int


class Paint(Struct, frozen=True, kw_only=True, tag=True):
    """Supervisor -> the feeding rank -> all ranks: one call of the pipeline, for jobs with the same settings; or of its
    autoencoder alone, for one job."""

    call: str
    """Names this attempt, and no other."""
    items: tuple[Item, ...]
    settings: dict[str, Any] = {}
    """Keywords of the pipeline's call as JSON has them: sizes, steps, guidance, frames."""
    images: dict[str, tuple[str, ...]] = {}
    """Keyword of the pipeline's call (image, mask_image, control_image) -> files that the server has checked. For the
    autoencoder: `image`, a picture, or `tensor`."""
    coding: Coding | None = None
    """None: a call of the pipeline."""
    lora: tuple[Adapter, ...] = ()
    cache: bool = True
    """False: without the cache that the server was started with."""
    previews: int = 0
    """How many pictures of what is being painted to send, spread over the steps."""
    folder: str = ""
    """Where to write the outputs to: an empty folder of this attempt's own. Empty: nowhere (a probe)."""
    format: str = "png"
    """png, jpeg, webp; of videos mp4; of tensors safetensors."""
    frames_per_second: int = 16


class Stop(Struct, frozen=True, kw_only=True, tag=True):
    """Supervisor -> the feeding rank: leave the call at a step boundary, all ranks together."""

    call: str
    reason: str


class End(Struct, frozen=True, kw_only=True, tag=True):
    """Supervisor -> the feeding rank: all ranks close the engine and end."""


class Hello(Struct, frozen=True, kw_only=True, tag=True):
    """Rank -> supervisor, first of all."""

    rank: int
    local_rank: int
    pid: int
    world_size: int
    feeds: bool
    """Whether this rank is given the calls."""
    generation: str
    """Which start of the group it belongs to."""


class Beat(Struct, frozen=True, kw_only=True, tag=True):
    """Rank -> supervisor, twice a second, from a thread of its own; what its main thread does is in it."""

    rank: int
    phase: str
    """loading, compiling, idle, encoding, denoising, decoding, writing."""
    call: str = ""
    step: int = 0
    moves: int
    """Grows whenever the main thread gets on: a rank that beats and does not move is stalled."""
    last_step_age_s: float | None = None
    """Since its last real denoising step; None before the first."""
    memory_bytes: int = 0
    """Of its device (of the host's, on a CPU): what is allocated now."""
    peak_bytes: int = 0


class Stepped(Struct, frozen=True, kw_only=True, tag=True):
    """The feeding rank -> supervisor, after each step."""

    call: str
    step: int
    """From 1."""
    num_steps: int
    seconds: float
    """This step's."""
    previews: tuple[bytes, ...] = ()
    """PNG (one for each item), where one was asked for at this step."""


class Painted(Struct, frozen=True, kw_only=True, tag=True):
    """The feeding rank -> supervisor: the outputs are written."""

    call: str
    files: tuple[tuple[str, ...], ...]
    """Names in the call's folder, for each item."""
    receipt: str
    """JSON. Of several items what they have in common, with nobody's prompt or seed."""
    receipts: tuple[str, ...] = ()
    """JSON, for each item: with its own prompt and seed, and nobody else's."""
    seconds: float
    """Of the whole call."""
    phases_s: dict[str, float] = {}
    """encoding, denoising, decoding, writing."""
    cache_hits: int = 0
    cache_calls: int = 0


class Failed(Struct, frozen=True, kw_only=True, tag=True):
    """The feeding rank -> supervisor: the call failed on all ranks, and the next one may come."""

    call: str
    kind: str
    """invalid, memory, unsupported, stopped, internal."""
    message: str
    """One line for the client."""
    details: str = ""
    """A traceback, for the log only."""


ToRank = Paint | Stop | End
FromRank = Hello | Beat | Stepped | Painted | Failed


class Wake(Struct, frozen=True, kw_only=True, tag=True):
    """HTTP process -> supervisor: there are new jobs, or cancels, in the store."""


class JobEvent(Struct, frozen=True, kw_only=True, tag=True):
    """Supervisor -> HTTP process: what a client that watches is told. The store alone says how a job ended."""

    job: str
    state: str
    """running, done, failed, cancelled, queued (again)."""
    step: int = 0
    num_steps: int = 0
    preview: bytes = b""
    """PNG."""


class RankStatus(Struct, frozen=True, kw_only=True):
    rank: int
    pid: int
    phase: str
    beat_age_s: float
    last_step_age_s: float | None
    memory_bytes: int
    peak_bytes: int


class Status(Struct, frozen=True, kw_only=True, tag=True):
    """Supervisor -> HTTP process, twice a second: what health and metrics are made of."""

    state: str
    """starting, ready, restarting, broken, draining."""
    why: str = ""
    """Where it is not ready: one line."""
    ranks: tuple[RankStatus, ...] = ()
    restarts: dict[str, int] = {}
    """Cause (died, stalled, failed) -> how often so far."""
    put_aside: tuple[str, ...] = ()
    """Devices that failed again and again."""
    call: str = ""
    step: int = 0
    num_steps: int = 0
    call_left_s: float = 0.0
    """What the running call is expected to take from now on."""
    totals: dict[str, float] = {}
    """Counters since the supervisor began, for metrics: steps, calls, cache_hits, cache_calls, seconds of phases."""


class Estimate(Struct, frozen=True, kw_only=True, tag=True):
    """HTTP process -> supervisor: what would this take? Answered by Estimated with the same number."""

    number: int
    settings: dict[str, Any]
    num_outputs: int = 1
    images: int = 0
    """Pictures that come with the request."""
    loras: int = 0
    cache: bool = True
    needs_seconds: bool = False
    """There is a deadline, or a quota: an answer without seconds decides nothing."""
    patience_s: float = 0.5
    """How long the answer may take, where it decides something and has to be predicted first."""


class Estimated(Struct, frozen=True, kw_only=True, tag=True):
    """Supervisor -> HTTP process."""

    number: int
    seconds: float | None
    """Of the whole call; None: not known yet."""
    peak_bytes: int | None = None
    capacity_bytes: int | None = None
    source: str = ""
    """measured, or predicted."""


class CallTimes(Struct, frozen=True, kw_only=True, tag=True):
    """Supervisor -> HTTP process: a call has ended well. For metrics."""

    kind: str
    """Of its jobs."""
    phases_s: dict[str, float]
    """encoding, denoising, decoding, writing; and total."""


ToSupervisor = Wake | Estimate
FromSupervisor = JobEvent | Status | Estimated | CallTimes
Message = ToRank | FromRank | ToSupervisor | FromSupervisor

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Message)


class FrameError(ValueError):
    """What came is no frame of ours: too long, cut off, or of unknown type."""


def encode(message: Message) -> bytes:
    """A frame. Raises FrameError for one that is too long."""
    body = _ENCODER.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"{type(message).__name__}: {len(body)} bytes; at most {MAX_FRAME_BYTES} go into a message.")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Message:
    """The message of a frame's body. Raises FrameError."""
    try:
        return _DECODER.decode(body)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise FrameError(f"a message that is none: {error}") from error


def decode_frame(frame: bytes) -> Message:
    """The message of a whole frame, as `encode` made it. Raises FrameError."""
    return decode(frame[_LENGTH.size :])


def _checked(length: int) -> int:
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a message of {length} bytes; at most {MAX_FRAME_BYTES}.")
    return length


async def read(reader: asyncio.StreamReader) -> Message | None:
    """The next message; None where the other side has gone. Raises FrameError."""
    try:
        length = _checked(_LENGTH.unpack(await reader.readexactly(_LENGTH.size))[0])
        return decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def receive(connection: socket.socket) -> Message | None:
    """The same from a blocking socket."""
    head = _exactly(connection, _LENGTH.size)
    if head is None:
        return None
    body = _exactly(connection, _checked(_LENGTH.unpack(head)[0]))
    return None if body is None else decode(body)


def _exactly(connection: socket.socket, number: int) -> bytes | None:
    data = bytearray()
    while len(data) < number:
        try:
            piece = connection.recv(number - len(data))
        except ConnectionError:
            return None
        if not piece:
            return None
        data += piece
    return bytes(data)
