# /// script
# requires-python = ">=3.10"
# dependencies = ["pyarrow>=14.0.1"]
# ///
# SPDX-License-Identifier: MIT
"""vgi_rpc: one Python file that makes an Arrow service.

Write a Protocol class and an implementation. The same service is then reached through typed proxies over an
in-process pipe, a subprocess, a Unix socket, TCP or HTTP::

    from typing import Protocol
    import vgi_rpc

    class Calculator(Protocol):
        def add(self, a: float, b: float = 1.0) -> float: ...

    class CalculatorImpl:
        def add(self, a: float, b: float = 1.0) -> float:
            return a + b

    with vgi_rpc.serve_pipe(Calculator, CalculatorImpl()) as proxy:
        assert proxy.add(a=2.0, b=3.0) == 5.0

A method returns a value (unary) or a `Stream` whose state is a dataclass. On byte streams the state stays in
the server's memory; over HTTP, which is stateless, it travels in a token: signed (HMAC-SHA256), not encrypted.

To vendor it, copy this file into a project or a package, under any name, and ``pip install pyarrow``. Nothing
is registered outside of the file but the loggers ``vgi_rpc`` and ``vgi_rpc.*``. ``python vgi_rpc.py serve
module:CalculatorImpl`` (or ``python -m package.vgi_rpc …``) serves a class over HTTP; ``--help`` tells more.

``VGI_RPC_TOKEN_KEY`` in the environment is the key of the tokens, at least 16 bytes; of several, separated by
commas, the first one signs and all verify. ``serve --help`` names the variables of the other options.

The file is read from top to bottom: a section uses only sections with a smaller number.
``grep -n '^# [0-9]*\\. [A-Z]' vgi_rpc.py`` prints the contents.
"""

from __future__ import annotations

import binascii
import contextvars
import copy
import copyreg
import dataclasses
import datetime
import decimal
import enum
import errno
import inspect
import io
import itertools
import logging
import operator
import os
import re
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import types
import typing
import uuid
import weakref
from collections import deque, namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache, partial, update_wrapper
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar, Union
from typing import cast, get_args, get_origin

import pyarrow as pa
from pyarrow import ipc

if typing.TYPE_CHECKING:  # what only some uses need is imported by the functions that need it
    import hmac
    import http.client
    import http.server
    import ssl
    import urllib.request

__version__ = "0.2.0"

# fmt: off
__all__ = [
    # Errors, as a client sees them, a server raises them, and their typed details
    "RpcError", "TransportError", "DeadlineExceededError", "AuthenticationError", "StatusError", "Code",
    "IPCError", "ParameterError", "VersionError", "ProtocolVersionError", "ProtocolError",
    "ProtocolNotSpecifiedError", "ProtocolNotSupportedError", "MethodNotImplementedError", "TokenError",
    "RequestTooLargeError", "ResponseTooLargeError", "ServerDrainingError", "AuthFailure", "AuthReason",
    "BadRequest", "ErrorInfo", "FieldViolation", "Help", "HelpLink", "LocalizedMessage", "PreconditionFailure",
    "PreconditionViolation", "QuotaFailure", "QuotaViolation", "ResourceInfo", "RetryInfo",
    # Values and batches
    "ArrowSerializableDataclass", "ArrowType", "Transient", "AnnotatedBatch", "IpcValidation",
    # Services and what their methods use
    "RpcServer", "CallContext", "AuthContext", "current_auth", "CallStatistics", "ClientLog", "Level",
    "Message", "TransportKind", "ServeStartHook", "CallRecord", "DispatchHook", "configure_access_log",
    "idempotent", "no_side_effects", "deprecated", "rpc_methods", "describe_rpc", "RpcMethodInfo", "MethodType",
    # Streams
    "Stream", "StreamState", "ProducerState", "ExchangeState", "OutputCollector", "StreamSession", "resume",
    # Serving
    "serve_pipe", "run_server", "serve_stdio", "serve_unix", "serve_tcp", "serve_http", "make_wsgi_app",
    "make_sync_client", "HttpOptions", "HttpServeOptions", "HttpRequest", "bearer_authenticate",
    "bearer_authenticate_static", "chain_authenticate",
    # Connecting
    "connect", "unix_connect", "tcp_connect", "http_connect", "with_options", "RpcConnection", "StderrMode",
    "make_pipe_pair", "PipeTransport", "SubprocessTransport", "WorkerPool", "PoolMetrics",
    # Asking a server what it is
    "introspect", "http_introspect", "list_protocols", "describe_protocol", "ServiceDescription",
    "MethodDescription", "http_capabilities", "HttpServerCapabilities",
]
# fmt: on

T = TypeVar("T")
P = TypeVar("P")  # what a service looks like to its callers
ProtocolClass: TypeAlias = Callable[..., P]  # a class; checkers take no Protocol as type[P]
logger = logging.getLogger("vgi_rpc")
wire_read = logging.getLogger("vgi_rpc.wire.read")  # shapes of what comes and goes at DEBUG, never values
wire_write = logging.getLogger("vgi_rpc.wire.write")


# ====================
# 1. CONSTANTS ... uses nothing
# Every key on the wire, header name and default limit, once. The family, which is all ``vgi-rpc`` packages that
# speak this protocol, in any language, depends on the spelling.

REQUEST_VERSION = b"1"
DESCRIBE_VERSION = "5"  # of the reflection answer, as the family numbers it

# Custom metadata of request batches.
METHOD_KEY = b"vgi_rpc.method"
PROTOCOL_KEY = b"vgi_rpc.protocol"
PROTOCOL_VERSION_KEY = b"vgi_rpc.protocol_version"
REQUEST_VERSION_KEY = b"vgi_rpc.request_version"
REQUEST_ID_KEY = b"vgi_rpc.request_id"
TIMEOUT_KEY = b"vgi_rpc.timeout_ms"  # ours: what is left of the caller's deadline, ms; others ignore it
TRACE_KEYS = (b"traceparent", b"tracestate")  # W3C trace context, handed through
CANCEL_KEY = b"vgi_rpc.cancel"
SHM_KEY = b"vgi_rpc.transport.shm"

# Custom metadata of answers.
LOG_LEVEL_KEY = b"vgi_rpc.log_level"
LOG_MESSAGE_KEY = b"vgi_rpc.log_message"
LOG_EXTRA_KEY = b"vgi_rpc.log_extra"
SERVER_ID_KEY = b"vgi_rpc.server_id"
ERROR_CODE_KEY = b"vgi_rpc.error_code"
ERROR_KIND_KEY = b"vgi_rpc.error_kind"
ERROR_DETAILS_KEY = b"vgi_rpc.error_details"
LOCATION_KEY = b"vgi_rpc.location"
SHM_OFFSET_KEY = b"vgi_rpc.shm_offset"
STATE_KEY = b"vgi_rpc.stream_state#b64"  # the cursor: the advancing state
CALL_STATE_KEY = b"vgi_rpc.call_state#b64"  # the call token: the fixed half

# Metadata of the schemas that our reflection answers with (section 10).
DOC_KEY = b"vgi_rpc.doc"  # of a method's parameters, or of the class of one field
SIGNATURE_KEY = b"vgi_rpc.signature"  # of a method's parameters
PARAM_DOCS_KEY = b"vgi_rpc.param_docs"
TYPE_KEY = b"vgi_rpc.type"  # of a field: its type as a person writes it
STRUCT_KEY = b"vgi_rpc.struct"  # of a binary field: the schema of the dataclass inside, serialised
ENUM_KEY = b"vgi_rpc.enum"  # of a field: the names of the enum's members, one a line
DEFAULT_KEY = b"vgi_rpc.default"  # of a parameter or field: its default, an IPC stream of one value
DEFAULT_TEXT_KEY = b"vgi_rpc.default_text"  # of a parameter or field: its default as a person writes it

RESERVED_PROTOCOL_PREFIX = "vgi_rpc."
REFLECTION_PROTOCOL = "vgi_rpc.Reflection.v1"
TRANSPORT_OPTIONS_METHOD = "__transport_options__"
PROTOCOL_NAME_PATTERN = r"[A-Za-z_][A-Za-z0-9_.]{0,254}"

# HTTP headers.
ARROW_CONTENT_TYPE = "application/vnd.apache.arrow.stream"
REQUEST_ID_HEADER = "X-Request-ID"
RPC_ERROR_HEADER = "X-VGI-RPC-Error"
AUTH_REASON_HEADER = "VGI-Auth-Reason"
ACCEPT_ENCODING_HEADER = "X-VGI-Accept-Encoding"
CONTENT_ENCODING_HEADER = "X-VGI-Content-Encoding"
ACCEPT_MAX_RESPONSE_BYTES_HEADER = "VGI-Accept-Max-Response-Bytes"
ACCEPT_MAX_RESPONSE_BYTES_SUPPORT_HEADER = "VGI-Accept-Max-Response-Bytes-Support"
SUPPORTED_ENCODINGS_HEADER = "VGI-Supported-Encodings"
EXTERNALIZATION_HEADER = "VGI-Externalization-Enabled"
MAX_REQUEST_BYTES_HEADER = "VGI-Max-Request-Bytes"
MAX_RESPONSE_BYTES_HEADER = "VGI-Max-Response-Bytes"
MAX_TURNS_HEADER = "VGI-Max-Turns"  # ours: turns of a producer that the client takes in one answer; else one
CONNECT_TIMEOUT_HEADER = "Connect-Timeout-Ms"  # of the Connect protocol, whose JSON the JSON door speaks
CONNECT_VERSION_HEADER = "Connect-Protocol-Version"

# Limits of what a peer may send. Each is a default where an option has the same name.
MIN_RESPONSE_BUDGET = 65_536  # the family's floor for VGI-Accept-Max-Response-Bytes
MAX_RESPONSE_BUDGET = 2**53 - 1  # the largest integer that JSON peers keep exact
CLIENT_MAX_RESPONSE_BYTES = 268_435_456  # what our HTTP client asks for and reads at most: 256 MiB
SERVER_MAX_REQUEST_BYTES = 268_435_456  # what an HTTP server reads of one body, encoded and decoded
JSON_MAX_REQUEST_BYTES = 1 << 20  # of a JSON body: what the parser and the conversion do in about a second
MAX_METADATA_BYTES = 67_108_864  # one message's head; tokens live there, so it is large
MAX_HEAD_ENTRIES = 512  # metadata pairs and the like of one message head: each costs more than its bytes
MAX_COLUMNS = 4_096
MAX_BUFFERS = 65_536  # of one batch, and its columns with what is nested in them; columns of views have many
MAX_NESTING = 64  # levels of list, map and struct in a foreign schema
MAX_DICTIONARY_MESSAGES = 1_024  # of a dictionary since it was replaced: a delta costs all that is there
MAX_BODY_BYTES = 1 << 40  # of one message where there is no other limit: a larger body is no body
MAX_DRAINED_BYTES = 1 << 30  # of a body that was refused and is read over, so that its connection can go on
FREE_ROWS = 1 << 24  # more rows than this must be paid for with at least one bit of body each
FREE_DECODED_BYTES = 1 << 30  # of compressed buffers, or 1,024 times theirs; unless max_request_bytes is set
MAX_REQUEST_ID_CHARS = 128
MAX_HEADERS = 100
MAX_HEAD_BYTES = 131_072  # request line or status line with all headers; holds a bearer token of 100 KB
MAX_CONNECTIONS = 512  # of one listener at a time; each has a thread
MAX_OPEN_TOKENS = 4_096  # call tokens kept opened
MAX_STATE_BYTES = 1 << 28  # decoded state in one token: 256 MiB

# Limits of what we send.
MAX_ERROR_MESSAGE_CHARS = 16_000
MAX_TRACEBACK_CHARS = 16_000
MAX_TRACEBACK_FRAMES = 5
MAX_ERROR_DETAILS_BYTES = 4_096  # above it the details are left out whole (the family's rule)
MAX_ERROR_KIND_CHARS = 255
MAX_PREFETCH = 16  # ticks that a client sends ahead on a byte stream: far less than any pipe holds
MAX_TURNS = 1_024  # turns of a producer in one HTTP answer, within the bytes and the time that follow
MAX_TURNS_BYTES = 8 << 20  # four times the speed of 1 MiB where a batch has as much
MAX_TURNS_SECONDS = 0.05  # a slow producer is answered turn by turn, and a server that drains is done soon

# Seconds; see `HttpServeOptions` for those of HTTP.
TOKEN_TTL_SECONDS = 3_600.0
TOKEN_CLOCK_SKEW_SECONDS = 60.0  # how far ahead of us another server's clock may run
READ_TIMEOUT_SECONDS = 30.0
REQUEST_DEADLINE_SECONDS = 300.0
KEEP_ALIVE_SECONDS = 75.0
DRAIN_GRACE_SECONDS = 30.0
TLS_HANDSHAKE_SECONDS = 5.0
REAP_SECONDS = 1.0  # how long a worker that died while idle in a pool may stay a zombie
WORKER_EXIT_SECONDS = 5.0  # how long a worker may take to leave after its stdin closed

Time: TypeAlias = float | None  # of ``time.monotonic()``, in seconds: a deadline; None for never
SMALL_BODY_BYTES = 65_536  # below: one bytes object; above: read in place, written without copying


# ====================
# 2. ERRORS ... uses 1
# Every exception of this file, its code, kind and HTTP status; those of other libraries reach no user.
#
#   RpcError                         what a client sees: the other side's error, or (LocalError) one noticed here
#   ├── TransportError               no answer                                                UNAVAILABLE
#   ├── DeadlineExceededError        no answer in time                                        DEADLINE_EXCEEDED
#   └── AuthenticationError          HTTP 401                                                 UNAUTHENTICATED
#   StatusError                      raised by a method: its own code, kind and details
#   Refusal                          a request that is not served                        400  INVALID_ARGUMENT
#   ├── IPCError                     bytes that are not the Arrow they should be
#   ├── ParameterError (TypeError)   a parameter or result that is not as declared
#   ├── VersionError                 wire version; ProtocolVersionError the application's     FAILED_PRECONDITION
#   └── ProtocolError                a rule of the wire is broken
#       ├── ProtocolNotSpecified-, ProtocolNotSupported-, MethodNotImplementedError     404  UNIMPLEMENTED
#       ├── TokenError               a state token that is not for this call, or too old
#       ├── RequestTooLargeError     413, ResponseTooLargeError 200                           RESOURCE_EXHAUSTED
#       └── ServerDrainingError      the server is about to stop                         503  UNAVAILABLE
#   AuthFailure (ValueError)         raised by an `authenticate` callback, with a reason 401  UNAUTHENTICATED


class Code(str, enum.Enum):
    """gRPC's sixteen error codes: the value is the name on the wire; beside it, Connect's HTTP status."""

    CANCELLED = "CANCELLED", 499
    UNKNOWN = "UNKNOWN", 500
    INVALID_ARGUMENT = "INVALID_ARGUMENT", 400
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED", 504
    NOT_FOUND = "NOT_FOUND", 404
    ALREADY_EXISTS = "ALREADY_EXISTS", 409
    PERMISSION_DENIED = "PERMISSION_DENIED", 403
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED", 429
    FAILED_PRECONDITION = "FAILED_PRECONDITION", 400
    ABORTED = "ABORTED", 409
    OUT_OF_RANGE = "OUT_OF_RANGE", 400
    UNIMPLEMENTED = "UNIMPLEMENTED", 501
    INTERNAL = "INTERNAL", 500
    UNAVAILABLE = "UNAVAILABLE", 503
    DATA_LOSS = "DATA_LOSS", 500
    UNAUTHENTICATED = "UNAUTHENTICATED", 401

    http_status: int
    __str__ = str.__str__

    def __new__(cls, value: str, http_status: int = 0) -> Code:
        code = str.__new__(cls, value)
        code._value_ = value
        code.http_status = http_status
        return code


class AuthReason(str, enum.Enum):
    """Why a server answered 401: the closed set of the family."""

    MISSING_CREDENTIAL = "missing_credential"
    INVALID_CREDENTIAL = "invalid_credential"
    EXPIRED_CREDENTIAL = "expired_credential"
    INSUFFICIENT_SCOPE = "insufficient_scope"
    PROXY_REQUIRED = "proxy_required"
    UNAUTHORIZED = "unauthorized"
    __str__ = str.__str__


# The typed details of an error: the family's catalogue. A detail with a sequence holds the type
# in front of it. Named tuples, since a dataclass costs every import ten times as much.

FieldViolation = namedtuple("FieldViolation", "field description", defaults=("",))
FieldViolation.__doc__ = "One field of a bad request, by its path."
BadRequest = NamedTuple("BadRequest", [("field_violations", Sequence[FieldViolation])])
BadRequest.__doc__ = "Which fields of the request were wrong."
PreconditionViolation = namedtuple("PreconditionViolation", "type subject description", defaults=("", ""))
PreconditionViolation.__doc__ = "One precondition that did not hold."
PreconditionFailure = NamedTuple("PreconditionFailure", [("violations", Sequence[PreconditionViolation])])
PreconditionFailure.__doc__ = "Which preconditions did not hold."
QuotaViolation = namedtuple("QuotaViolation", "subject description", defaults=("",))
QuotaViolation.__doc__ = "One quota that was used up."
QuotaFailure = NamedTuple("QuotaFailure", [("violations", Sequence[QuotaViolation])])
QuotaFailure.__doc__ = "Which quotas were used up."
HelpLink = NamedTuple("HelpLink", [("description", str), ("url", str)])
HelpLink.__doc__ = "One link of a `Help`."
Help = NamedTuple("Help", [("links", Sequence[HelpLink])])
Help.__doc__ = "Where to read on."
ErrorInfo = NamedTuple("ErrorInfo", [("metadata", Mapping[str, str])])
ErrorInfo.__doc__ = "Free key-value facts about the error."
RetryInfo = NamedTuple("RetryInfo", [("retry_delay_seconds", float)])
RetryInfo.__doc__ = "When a retry may be worth it, in seconds from now."
ResourceInfo = namedtuple(
    "ResourceInfo", "resource_type resource_name owner description", defaults=("", "", "", "")
)
ResourceInfo.__doc__ = "Which resource the error is about."
LocalizedMessage = NamedTuple("LocalizedMessage", [("locale", str), ("message", str)])
LocalizedMessage.__doc__ = "The error for an end user, in the language that *locale* names (BCP 47)."

_DETAIL_ITEMS: dict[Any, Any] = {BadRequest: FieldViolation, PreconditionFailure: PreconditionViolation}
_DETAIL_ITEMS |= {QuotaFailure: QuotaViolation, Help: HelpLink}
_DETAIL_TYPES: list[Any] = [ErrorInfo, RetryInfo, ResourceInfo, LocalizedMessage, *_DETAIL_ITEMS]
_DETAILS = {f"vgi_rpc.{cls.__name__}": cls for cls in _DETAIL_TYPES}


def _details_to_json(details: Iterable[Any]) -> list[dict[str, Any]]:
    """Return details as JSON objects; raise `ValueError` for what the catalogue does not allow."""
    objects: dict[str, dict[str, Any]] = {}
    for detail in details:
        obj: Any = detail
        if type(detail) in _DETAIL_TYPES:
            obj = {"@type": f"vgi_rpc.{type(detail).__name__}", **detail._asdict()}
            if type(detail) in _DETAIL_ITEMS:
                obj[detail._fields[0]] = [item._asdict() for item in detail[0]]
        name = obj.get("@type") if isinstance(obj, Mapping) else ""
        if not name or not isinstance(name, str):
            raise ValueError(f"error detail: expected one of ours or a mapping with '@type', got {detail!r}")
        if name.startswith(RESERVED_PROTOCOL_PREFIX) and name not in _DETAILS:
            raise ValueError(f"error detail type {name!r} is reserved; name yours after your application")
        if name in objects:
            raise ValueError(f"error detail {name!r} given twice; each type may stand once")
        objects[name] = dict(obj)
    return list(objects.values())


def _detail_of(cls: Any, obj: Any) -> Any:
    """Read a detail or an item of one, less what is not known here; `TypeError` when a member is missing."""
    members = {name: obj[name] for name in cls._fields if name in obj}
    for name in members if cls in _DETAIL_ITEMS else ():
        members[name] = tuple(_detail_of(_DETAIL_ITEMS[cls], item) for item in members[name])
    return cls(**members)


class _Error(Exception):
    """It survives pickle and copy, whatever its constructor takes; keywords of the class are attributes."""

    def __init_subclass__(cls, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(cls, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr(copyreg, "__newobj__"), (type(self), *self.args), self.__dict__


class StatusError(_Error):
    """Raised by a method that wants the client to see a code, a kind to branch on, and typed details.

    Details are of the catalogue, or mappings with an ``@type`` of your application; each type may stand once.
    Raises ``ValueError`` for others, and for a code that there is not.
    """

    def __init__(
        self, message: str, *, code: Code | str, kind: str | None = None, details: Iterable[Any] = ()
    ) -> None:
        super().__init__(message)
        self.error_code = Code(code)
        self.error_kind = kind or ""
        self.error_details = _details_to_json(details)


def _reader(cls: type[T]) -> Callable[[RpcError], T | None]:
    def read(self: RpcError) -> T | None:
        """Return the detail of this kind, if there is one."""
        return next((detail for detail in self.details() if isinstance(detail, cls)), None)

    return read


@dataclass(eq=False, repr=False)
class RpcError(_Error):
    """What a client sees when a call fails. Where Python has notes, the remote traceback is one."""

    error_type: str  # name of the exception's class on the other side
    error_message: str  # its text
    remote_traceback: str  # the other side's, empty when the operator switched it off
    request_id: str = ""  # id of the call, as the server logs it
    error_code: str = ""  # name of a `Code`
    error_kind: str = ""  # what to branch on, empty when the error has none
    error_details: list[dict[str, Any]] = field(default_factory=list)  # JSON objects with an @type each

    def __post_init__(self) -> None:
        prefix = f"{self.error_type}: "
        super().__init__(prefix + self.error_message.removeprefix(prefix))
        if self.remote_traceback and hasattr(self, "add_note"):  # since Python 3.11
            note = sendable(self.remote_traceback, MAX_TRACEBACK_CHARS).rstrip()
            self.add_note(f"On the other side:\n{note}")

    @property
    def code(self) -> Code:
        """The code, ``UNKNOWN`` when absent or not known here, as peers may be newer than we are."""
        return Code.__members__.get(self.error_code, Code.UNKNOWN)

    def details(self) -> list[Any]:
        """Return the details of the catalogue as their types; others stay JSON objects."""
        typed: list[Any] = list(self.error_details)
        for at, obj in enumerate(typed):
            with suppress(KeyError, TypeError):  # not of the catalogue, or not what it says
                typed[at] = _detail_of(_DETAILS[obj["@type"]], obj)
        return typed

    error_info = _reader(ErrorInfo)
    retry_info = _reader(RetryInfo)
    bad_request = _reader(BadRequest)
    precondition_failure = _reader(PreconditionFailure)
    quota_failure = _reader(QuotaFailure)
    resource_info = _reader(ResourceInfo)
    help = _reader(Help)
    localized_message = _reader(LocalizedMessage)

    def is_retryable(self) -> bool:
        """Whether the same call may succeed later; clients never retry by themselves."""
        spent = self.code is Code.RESOURCE_EXHAUSTED and self.retry_info() is not None
        return spent or self.code is Code.UNAVAILABLE


class LocalError(RpcError):
    """An `RpcError` whose type is its class: noticed on this side, unless `was_answer` tells otherwise."""

    error_code: str = Code.UNAVAILABLE

    def __init__(self, message: str, *, remote_traceback: str = "", request_id: str = "") -> None:
        cls = type(self)
        text = message.removeprefix(f"{cls.__name__}: ")
        super().__init__(cls.__name__, text, remote_traceback, request_id, str(cls.error_code))

    def __str__(self) -> str:  # Python and whoever reports an error put the name of the class in front
        return self.error_message


class TransportError(LocalError):
    """No answer came: the peer could not be reached, went away, or does not speak Arrow IPC."""


class DeadlineExceededError(LocalError, error_code=Code.DEADLINE_EXCEEDED):
    """The call's time ran out, here or on the server."""


class AuthenticationError(LocalError, error_code=Code.UNAUTHENTICATED):
    """The server answered 401; `reason` says why, as far as the server said it."""

    def __init__(self, message: str, *, reason: AuthReason = AuthReason.UNAUTHORIZED) -> None:
        super().__init__(message)
        self.reason = reason


def was_answer(exc: RpcError) -> bool:
    """Whether the other side sent this error; otherwise it was made here, and no answer came."""
    return bool(exc.request_id) or not isinstance(exc, LocalError)


class AuthFailure(_Error, ValueError, error_code=Code.UNAUTHENTICATED):
    """Raised by an ``authenticate`` callback to say why a credential was refused."""

    def __init__(self, reason: AuthReason, detail: str = "") -> None:
        super().__init__(detail or str(reason))
        self.reason = AuthReason(reason)
        self.detail = detail


class Refusal(_Error):
    """A request that is refused before a method runs; the attributes say how."""

    error_code: Code = Code.INVALID_ARGUMENT
    error_kind: str = ""
    error_details: Sequence[Mapping[str, Any]] = ()
    http_status: int = 400


class IPCError(Refusal):
    """Bytes that are not the Arrow IPC they should be: what was expected, what came, and where."""


class ParameterError(Refusal, TypeError):
    """A parameter, field or result of the wrong type; on the wire it is a ``TypeError``."""


class VersionError(Refusal, error_code=Code.FAILED_PRECONDITION):
    """The request's wire version is absent or not ours."""


class ProtocolVersionError(VersionError, error_kind="protocol_version_mismatch"):
    """Client and server speak incompatible versions of the application's protocol."""

    def __init__(self, message: str = "", *, protocol: str = "") -> None:
        super().__init__(message)
        violation = PreconditionViolation("protocol_version", protocol, message)
        self.error_details = _details_to_json([PreconditionFailure([violation])])


class ProtocolError(Refusal):
    """A request that breaks a rule of the wire."""


class ProtocolNotSpecifiedError(ProtocolError, error_kind="protocol_not_specified"):
    """The request names no protocol."""


class _NotHere(ProtocolError, error_code=Code.UNIMPLEMENTED, http_status=404):
    """What was asked for is not hosted."""


class ProtocolNotSupportedError(_NotHere, error_kind="protocol_not_supported"):
    """The server does not host that protocol."""


class MethodNotImplementedError(_NotHere, error_kind="method_not_implemented"):
    """The protocol has no such method."""


class TokenError(ProtocolError):
    """A state token that this server did not sign, not for this call, or that is too old."""


class RequestTooLargeError(ProtocolError, error_code=Code.RESOURCE_EXHAUSTED, http_status=413):
    """A request above the server's limit."""


class ResponseTooLargeError(ProtocolError, error_code=Code.RESOURCE_EXHAUSTED, http_status=200):
    """An answer above the smallest of the client's and the server's limits; 200, since the method ran."""


class ServerDrainingError(ProtocolError, error_code=Code.UNAVAILABLE, error_kind="server_draining"):
    """The server is stopping and takes no new calls; another may."""

    error_details = _details_to_json([RetryInfo(1.0)])
    http_status = 503


def sendable(text: str, limit: int, mark: str = "…") -> str:
    """*text*, at most *limit* characters and then *mark*, and valid UTF-8 whatever it holds."""
    if len(text) > limit:
        text = text[:limit] + mark
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def text_of(value: object) -> str:
    """``str(value)``, bounded and valid UTF-8, also when its ``__str__`` is broken."""
    try:
        text = repr(value) if isinstance(value, bytes) else str(value)  # which `python -bb` does not take
    except BaseException as exc:  # it may be an exception that a method raised, and must not end the server
        text = f"<{type(value).__name__}: its __str__ raised {type(exc).__name__}>"
    return sendable(text, MAX_ERROR_MESSAGE_CHARS, "… <truncated>")


def to_json(value: Any, **options: Any) -> str:
    """``json.dumps``: who needs `json` loads it, here and below, as that takes 2 ms."""
    import json

    return json.dumps(value, **options)


def from_json(text: str | bytes, **options: Any) -> Any:
    """``json.loads``."""
    import json

    return json.loads(text, **options)


def suggest(name: str, candidates: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for a near miss, else nothing."""
    import difflib

    near = difflib.get_close_matches(name[:255], list(candidates), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def error_fields(exc: BaseException) -> dict[str, Any]:
    """What is told of any exception: type, text and code; kind and details where any may travel."""
    fields: dict[str, Any] = {"exception_type": type(exc).__name__, "exception_message": text_of(exc)}
    if isinstance(exc, ParameterError):
        fields["exception_type"] = "TypeError"
    code = kind = details = None
    with suppress(BaseException):  # whatever an application's exception does when looked at
        code = getattr(exc, "error_code", None)
        kind = getattr(exc, "error_kind", None)
        details = getattr(exc, "error_details", None)
    fields["error_code"] = Code.__members__.get(text_of(code), Code.UNKNOWN).value
    if isinstance(kind, str) and kind:
        fields["error_kind"] = sendable(kind, MAX_ERROR_KIND_CHARS)
    with suppress(Exception):
        objects = _details_to_json(details or ())
        if objects and len(to_json(objects, allow_nan=False)) <= MAX_ERROR_DETAILS_BYTES:
            fields["error_details"] = objects
    return fields


def http_status_of(exc: BaseException) -> int:
    """The HTTP status of an error that is answered in JSON, by Connect's table."""
    if isinstance(exc, Refusal) and not isinstance(exc, ResponseTooLargeError):
        return exc.http_status
    return Code(error_fields(exc)["error_code"]).http_status


def error_as_json(exc: BaseException, *, request_id: str = "", trace: str = "") -> dict[str, Any]:
    """Return the one JSON object that an error has: Connect's code, message and details, and what we add.

    A detail has Connect's ``value`` (base64 of its JSON, for want of protobuf), and itself as ``debug``.
    """
    fields = error_fields(exc)
    obj = {"code": fields["error_code"].lower().replace("cancelled", "canceled")}
    obj |= {"message": fields["exception_message"], "type": fields["exception_type"], "details": []}
    for detail in fields.get("error_details", ()):
        value = binascii.b2a_base64(to_json(detail).encode(), newline=False).decode().rstrip("=")
        obj["details"].append({"type": detail["@type"], "value": value, "debug": detail})
    obj |= {"kind": fields.get("error_kind"), "request_id": request_id, "traceback": trace}
    return {name: value for name, value in obj.items() if value or name == "message"}


# ====================
# 3. LOG MESSAGES ... uses 1-2
# A log line or an error as it travels: level, text, extra. An error is a message of level EXCEPTION.
# The metadata of a message is the only form in which an exception leaves a process.


class Level(enum.Enum):
    """Severity of a `Message`, most severe first; the value is the name on the wire."""

    EXCEPTION = "EXCEPTION"
    ERROR = "ERROR"
    WARN = "WARN"
    INFO = "INFO"
    DEBUG = "DEBUG"
    TRACE = "TRACE"


def _maker(level: Level) -> Callable[..., Message]:
    def make(message: str, **kwargs: object) -> Message:
        """Make a message of this level; keywords are its `extra`. For the client, EXCEPTION is an error."""
        return Message(level, message, **kwargs)

    return make


@dataclass(init=False)
class Message:
    """One log line from a server, or one error."""

    level: Level
    message: str
    extra: dict[str, Any] | None  # facts that JSON can say

    def __init__(self, level: Level, message: str, **kwargs: object) -> None:
        if not isinstance(level, Level):
            raise TypeError(f"message level: expected a Level, got {level!r:.100}")
        self.level = level
        self.message = str.__str__(message) if isinstance(message, str) else text_of(message)
        self.extra = kwargs or None

    exception = staticmethod(_maker(Level.EXCEPTION))
    error = staticmethod(_maker(Level.ERROR))
    warn = staticmethod(_maker(Level.WARN))
    info = staticmethod(_maker(Level.INFO))
    debug = staticmethod(_maker(Level.DEBUG))
    trace = staticmethod(_maker(Level.TRACE))

    @classmethod
    def from_exception(cls, exc: BaseException, *, include_traceback: bool = True) -> Message:
        """Describe an exception, whatever its own methods do, with its code, kind, details and traceback."""
        extra = error_fields(exc)
        text = f"{extra['exception_type']}: {extra['exception_message']}"
        if not include_traceback:
            return cls(Level.EXCEPTION, text, **extra)
        frames = []
        try:
            trace = "".join(traceback.format_exception(type(exc), exc, exc.__traceback__))
            for f in traceback.extract_tb(exc.__traceback__)[-MAX_TRACEBACK_FRAMES:]:
                frame = {"file": f.filename, "line": f.lineno, "function": f.name, "code": f.line or ""}
                frames.append(frame)
        except BaseException:  # a broken __str__ in the chain; the error itself is still worth sending
            trace = f"{type(exc).__name__}: <its traceback could not be formatted>\n"
        extra["traceback"] = sendable(trace, MAX_TRACEBACK_CHARS, "\n… <traceback truncated>")
        extra["frames"] = frames
        for name in ("cause", "context"):
            other = getattr(exc, f"__{name}__")
            if other is not None:
                extra[name] = f"{type(other).__name__}: {text_of(other)}"
        return cls(Level.EXCEPTION, text, **extra)


def message_metadata(message: Message, server_id: str, request_id: str) -> dict[bytes, bytes]:
    """A message as metadata of a zero-row batch; an error's code, kind and details stand there twice."""
    extra = message.extra or {}
    metadata: dict[bytes, Any] = {SERVER_ID_KEY: server_id, REQUEST_ID_KEY: request_id}
    if extra:
        try:
            metadata[LOG_EXTRA_KEY] = to_json(extra, default=text_of)
        except (TypeError, ValueError, RecursionError):  # keys that are no text, or a list that holds itself
            metadata[LOG_EXTRA_KEY] = to_json({key: text_of(value) for key, value in extra.items()})
    if message.level is Level.EXCEPTION:
        metadata[ERROR_CODE_KEY] = extra.get("error_code") or Code.UNKNOWN
        metadata[ERROR_KIND_KEY] = extra.get("error_kind")
        if details := extra.get("error_details"):
            metadata[ERROR_DETAILS_KEY] = to_json(details, default=text_of)
    metadata = {key: value for key, value in metadata.items() if value}
    metadata.update({LOG_LEVEL_KEY: message.level.value, LOG_MESSAGE_KEY: message.message})
    return {key: str(value).encode("utf-8", "backslashreplace") for key, value in metadata.items()}


def json_object(data: bytes | str | None) -> dict[str, Any]:
    """Parse *data* as a JSON object; anything else is an empty one: it comes from a peer and only informs."""
    with suppress(ValueError, RecursionError):
        value = from_json(data or b"")
        if isinstance(value, dict):
            return value
    return {}


def metadata_text(metadata: Mapping[bytes, bytes], key: bytes, default: object = "") -> str:
    """The text of one key; *default*, or nothing, where it is absent."""
    if key in metadata:
        return metadata[key].decode("utf-8", "replace")
    return str(default or "")


def message_from_metadata(metadata: Mapping[bytes, bytes]) -> Message:
    """The reverse of `message_metadata`, for logs; an unknown level reads as INFO."""
    level = Level.__members__.get(metadata_text(metadata, LOG_LEVEL_KEY), Level.INFO)
    message = Message(level, metadata_text(metadata, LOG_MESSAGE_KEY))
    message.extra = json_object(metadata.get(LOG_EXTRA_KEY)) or None
    return message


def error_from_metadata(metadata: Mapping[bytes, bytes]) -> RpcError:
    """The `RpcError` of an error batch: its own keys decide, and ``log_extra`` where one is absent."""
    extra = json_object(metadata.get(LOG_EXTRA_KEY))
    text = metadata_text(metadata, LOG_MESSAGE_KEY)
    name = str(extra.get("exception_type") or text.partition(":")[0] or "Exception")
    text = str(extra.get("exception_message") or text)
    trace = str(extra.get("traceback") or "")
    request_id = metadata_text(metadata, REQUEST_ID_KEY)
    code = metadata_text(metadata, ERROR_CODE_KEY, extra.get("error_code"))
    error = RpcError(name, text, trace, request_id, code)
    if (code, name) == (Code.DEADLINE_EXCEEDED, DeadlineExceededError.__name__):
        error = DeadlineExceededError(text, remote_traceback=trace, request_id=request_id)
    error.error_kind = metadata_text(metadata, ERROR_KIND_KEY, extra.get("error_kind"))
    details = extra.get("error_details")
    with suppress(KeyError, ValueError, RecursionError):
        details = from_json(metadata[ERROR_DETAILS_KEY])
    if isinstance(details, list):
        error.error_details = [detail for detail in details if isinstance(detail, dict)]
    return error


# ====================
# 4. BATCHES ... uses 1-3
# Arrow IPC streams in and out, message by message.
# Law: nothing foreign reaches pyarrow's decoder before its head was read and its sizes were found plausible, and what
# pyarrow raises leaves as one of our errors. What a head names many times is counted each time.

Buffer: TypeAlias = bytes | memoryview | pa.Buffer
Metadata: TypeAlias = Mapping[bytes, bytes]
# Bytes: a batch message, ready to be sent. In a tuple it is one of `WireSchema.plain_message`.
Item: TypeAlias = tuple[pa.RecordBatch | bytes, Metadata | None] | bytes
_SHAPE = "%s rows, %d bytes, metadata %s: %s"
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
SCHEMA_MESSAGE = 1  # these three: MessageHeader of Arrow's format/Message.fbs
DICTIONARY_MESSAGE = 2
BATCH_MESSAGE = 3
_PYTHON_FAILURES = (OSError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RecursionError)
ARROW_FAILURES = (pa.ArrowException, *_PYTHON_FAILURES)  # what pyarrow raises on bad bytes or values
# What pyarrow, `struct` and `FlatHead` raise on bytes of a peer.
_FOREIGN_FAILURES = (struct.error, StopIteration, *ARROW_FAILURES)


class IpcValidation(enum.Enum):
    """How much of an incoming batch is checked before a method sees it."""

    NONE = "none"
    STANDARD = "standard"  # lengths and offsets: O(columns)
    FULL = "full"  # every value: offsets in order, valid UTF-8, dictionary indices in range


class AnnotatedBatch(NamedTuple):
    """A record batch (immutable, safe between threads) with the custom metadata of its message, if it had some."""

    batch: pa.RecordBatch
    custom_metadata: pa.KeyValueMetadata | None = None

    @classmethod
    def from_pydict(cls, data: Mapping[str, Any], schema: pa.Schema | None = None) -> AnnotatedBatch:
        """Build from ``{column: values}``; types are inferred without *schema*. `TypeError` says what does not fit."""
        return cls(batch_from_pydict(data, schema, "from_pydict"))

    def release(self) -> None:
        """Do nothing: batches own their memory. The family's have something to give back."""


def batch_role(num_rows: int, metadata: Metadata | None) -> str:
    """Return data, log, error, location, shm or token; whether a token is data too, an exchange's reader knows."""
    if num_rows or not metadata:
        return "data"
    if LOG_LEVEL_KEY in metadata and LOG_MESSAGE_KEY in metadata:
        return "error" if metadata[LOG_LEVEL_KEY] == b"EXCEPTION" else "log"
    roles = {LOCATION_KEY: "location", SHM_OFFSET_KEY: "shm", STATE_KEY: "token"}
    return next((role for key, role in roles.items() if key in metadata), "data")


class ByteSource:
    """Bytes in their order, what an `IpcReader` reads from: *data*, and whatever a subclass receives."""

    def __init__(self, data: Buffer = b"") -> None:
        self._buffer: Any = data if isinstance(data, bytes) else memoryview(data).cast("B")
        self.at = 0  # how much of the buffer was read; who reads what `received` returns sets it

    def _fill(self) -> bool:
        """Receive more into the buffer; tell whether something came."""
        return False

    def read(self, size: int) -> bytes:
        """Return the next *size* bytes, fewer only where the source ends."""
        if size > SMALL_BODY_BYTES:  # each filling of the buffer copies what is in it
            return bytes(self.read_after(b"", size))
        while self.at + size > len(self._buffer) and self._fill():
            pass
        piece = self._buffer[self.at : self.at + size]
        self.at += len(piece)
        return bytes(piece)

    def read_after(self, head: bytes, size: int) -> Buffer:
        """Return *head*, the last thing read, and the next *size* bytes in one piece; shorter only at the end."""
        start = self.at - len(head)
        self.at = min(self.at + size, len(self._buffer))
        return cast("Buffer", self._buffer[start : self.at])

    def received(self) -> tuple[bytes, int]:
        """Wait for something to read, or the end; return what was received, and where its unread part begins."""
        if self.at == len(self._buffer):
            self._fill()
        return self._buffer, self.at


class IpcLimits(NamedTuple):
    """What an `IpcReader` accepts of one message, and of all dictionaries of a stream together."""

    max_bytes: int | None = None  # head and decoded body; None for what memory holds (see FREE_DECODED_BYTES)
    max_rows: int | None = None  # rows of one batch; None for what its bytes pay for (see FREE_ROWS)


_U16 = struct.Struct("<H").unpack_from
_I32 = struct.Struct("<i").unpack_from
_U32 = struct.Struct("<I").unpack_from
_I64 = struct.Struct("<q").unpack_from
_SLOTS = {count: struct.Struct(f"<{count}H").unpack_from for count in range(8)}


class FlatHead:
    """The head of a message, a flatbuffer by Arrow's format/Message.fbs and Schema.fbs. A field is where it stands.

    Absent fields stand in eight zero bytes that are put behind, which makes them 0 or empty. Tables and texts may be
    shared: a kilobyte can describe millions of fields. So each look at a vector is counted, and the head's own bytes
    must pay for all. What leads astray raises, or pyarrow refuses it, which verifies a flatbuffer before it decodes.
    """

    def __init__(self, head: bytes) -> None:
        self.data = head + bytes(8)
        self.absent = len(head)
        self._left = 65_536 + 4 * self.absent  # some writers share equal texts
        try:
            version, type_at, self.content, self.length, self.entries = self.table(8, 5)  # behind the prefix
            self.type = self.data[type_at]
            self.body_length = _I64(self.data, self.length)[0]
            self.metadata = self.pairs(self.entries)
            if _U16(self.data, version)[0] not in (3, 4) or not 1 <= self.type <= 3 or self.body_length < 0:
                raise ValueError(f"not of metadata version 4 or 5, or of type {self.type}")
        except _FOREIGN_FAILURES as exc:
            raise IPCError(f"not an Arrow IPC message: {text_of(exc)}") from None

    def table(self, field: int, count: int) -> list[int]:
        """Return the first *count* fields of the table to which *field* refers."""
        at = field + _U32(self.data, field)[0]
        vtable = at - _I32(self.data, at)[0]
        present = min(count, _U16(self.data, vtable)[0] // 2 - 2)
        absent = self.absent
        fields = [at + slot if slot else absent for slot in _SLOTS[present](self.data, vtable + 4)]
        return fields if present == count else fields + [absent] * (count - present)

    def vector(self, field: int, width: int, most: int) -> tuple[int, int]:
        """Return where the vector to which *field* refers begins and ends; its elements have *width* bytes."""
        start = field + _U32(self.data, field)[0] + 4
        count = _U32(self.data, start - 4)[0]
        end = start + width * count
        self._left -= 16 + width * count
        if count > most or end > len(self.data) or self._left < 0:
            text = f"expected at most {most} entries, all paid for by {self.absent} bytes, got {count}"
            raise IPCError(f"message head: {text}")
        return start, end

    def tables(self, field: int, most: int) -> range:
        """Return the fields that a vector of tables consists of."""
        return range(*self.vector(field, 4, most), 4)

    def text(self, field: int) -> bytes:
        """Return the bytes of a text."""
        start, end = self.vector(field, 1, self.absent)
        return self.data[start:end]

    def longs(self, field: int, width: int) -> Sequence[int]:
        """Return a vector of structs of *width* int64, flat."""
        start, end = self.vector(field, 8 * width, MAX_BUFFERS)
        return struct.unpack_from(f"<{(end - start) // 8}q", self.data, start)

    def pairs(self, field: int) -> dict[bytes, bytes]:
        """Return a vector of key-value tables."""
        pairs = {}
        for pair in self.tables(field, MAX_HEAD_ENTRIES):
            key, value = self.table(pair, 2)
            pairs[self.text(key)] = self.text(value)
        return pairs

    def dictionaries(self) -> int:
        """Return how many fields of a schema, at any depth, are dictionaries; refuse what would cost too much."""
        endianness, columns, metadata = self.table(self.content, 3)
        if _U16(self.data, endianness)[0]:
            raise IPCError("schema: expected little-endian numbers, got big-endian ones")
        self.pairs(metadata)
        dictionaries = 0
        fields = [(1, column) for column in self.tables(columns, MAX_COLUMNS)]
        for level, column in fields:  # which grows
            name, _, type_id, parameters, dictionary, children, metadata = self.table(column, 7)
            self.text(name).decode()  # fails here, not at some later look at the schema
            if self.data[type_id] in (10, 14):  # a timestamp has a zone's text, a union a list of codes
                self.text(self.table(parameters, 2)[1]).decode()
            self.pairs(metadata)
            dictionaries += dictionary != self.absent
            fields += [(level + 1, child) for child in self.tables(children, MAX_COLUMNS)]
            if level > MAX_NESTING:
                raise IPCError(f"schema: expected at most {MAX_NESTING} levels of nesting")
        return dictionaries


class WireSchema:
    """A schema with what its streams need; safe between threads. Cheaper to keep than to make."""

    def __init__(self, schema: pa.Schema | bytes, message: bytes = b"") -> None:
        if not message:
            message = schema if isinstance(schema, bytes) else schema.serialize().to_pybytes()
        self.message = message  # encapsulated: with it each of its streams begins
        head = FlatHead(self.message)
        if head.type != SCHEMA_MESSAGE or head.body_length:
            raise IPCError(f"expected a schema message first, got message type {head.type}")
        try:
            self.dictionaries = head.dictionaries()
            self.schema: pa.Schema = schema
            if isinstance(schema, bytes):
                self.schema = ipc.read_schema(pa.py_buffer(schema))
        except _FOREIGN_FAILURES as exc:
            raise IPCError(f"the schema: {text_of(exc)}") from None
        self.names = self.schema.names
        # In a column of nothing else.
        self.hides_nulls = pa.null() in [getattr(kind, "storage_type", kind) for kind in self.schema.types]
        self.required = [i for i, column in enumerate(self.schema) if not column.nullable]

    @cached_property
    def empty(self) -> pa.RecordBatch:
        """The batch of 0 rows that carries logs, errors, ticks and tokens."""
        columns = [pa.nulls(0, arrow_type) for arrow_type in self.schema.types]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    @cached_property
    def empty_message(self) -> bytes:
        """The message of that batch; not for a schema with dictionaries, which go ahead of it."""
        return cast("bytes", self.empty.serialize().to_pybytes())

    @cached_property
    def _nodes(self) -> int:
        """How many numbers, rows and nulls of each column and what is in it, end a message's head; 0 if they do not."""
        head = FlatHead(self.empty_message[: 8 + _I32(self.empty_message, 4)[0]])
        start, end = head.vector(head.table(head.content, 2)[1], 16, MAX_BUFFERS)
        return (end - start) // 8 * (end == head.absent)

    def small_message(self, batch: pa.RecordBatch) -> bytes | None:
        """Return the message of a small batch of this schema; ``None`` of another, or one with dictionaries."""
        is_small = not self.dictionaries and batch.schema.equals(self.schema)
        if not is_small or batch.get_total_buffer_size() > SMALL_BODY_BYTES:
            return None
        return cast("bytes", batch.serialize().to_pybytes()) if batch.num_rows else self.empty_message

    def plain_message(self, batch: object) -> bytes | None:
        """Return the `small_message` of a batch without nulls, which costs a tenth of a turn less than to ask columns."""
        message = self.small_message(batch) if isinstance(batch, pa.RecordBatch) and batch.num_rows else None
        if message is None or not self._nodes:
            return None
        nodes = struct.unpack_from(f"<{self._nodes}q", message, 8 + _I32(message, 4)[0] - 8 * self._nodes)
        return None if any(nodes[1::2]) else message


# As pyarrow writes it, whose memory pool takes 4 MiB at its first use; to import this file is none.
_EMPTY = "/////zAAAAAQAAAAAAAKAAwABgAFAAgACgAAAAABBAAMAAAACAAIAAAABAAIAAAABAAAAAAAAAA="
EMPTY = WireSchema(pa.schema([]), binascii.a2b_base64(_EMPTY))
TICK: pa.RecordBatch = EMPTY.empty
_read_schema = lru_cache(maxsize=64)(WireSchema)  # by message; strangers fill it


@dataclass(eq=False, slots=True)
class BatchMessage:
    """A batch that was not decoded yet."""

    rows: int
    metadata: dict[bytes, bytes]
    data: Buffer  # prefix, head and body
    has_nulls: bool = True  # whether there are any, in columns or in what is in them


class IpcReader:
    """Reads one Arrow IPC stream from *source*, to its end marker and not a byte further; the schema at once.

    Where some schemas are *expected*, dictionaries of another one are not decoded. Not for use by several threads. What
    the source raises passes through. All methods, this one too, raise `IPCError` for what is no such stream,
    `RequestTooLargeError` above *limits*; here `EOFError`: not a byte came.
    """

    def __init__(
        self,
        source: ByteSource,
        limits: IpcLimits = IpcLimits(),
        validation: IpcValidation = IpcValidation.FULL,
        *,
        expected: Sequence[WireSchema] | Mapping[bytes, WireSchema] = (),
    ) -> None:
        self._source = source
        self._limits = limits
        self._validation = validation
        self._unread: int | None = None  # bytes of a body that were not read yet; None: nobody knows
        self.ended = False  # whether the end marker was read
        self.dictionaries: dict[int, list[tuple[int, Buffer]]] = {}  # by id: decoded bytes, message
        self._dictionary_bytes = 0
        # Head and size of the last message, if it is not compressed: the next often has another body only.
        self._last: tuple[bytes, int, BatchMessage | None] = (b"", 0, None)
        if not isinstance(expected, Mapping):
            expected = {wire.message: wire for wire in expected}
        self._expected = expected
        raw = self._read_head(first=True)
        if not raw:
            raise IPCError("expected a schema message, got an end of stream")
        read_schema = _read_schema if len(raw) <= SMALL_BODY_BYTES else WireSchema
        self.wire = expected.get(raw) or read_schema(raw)
        self.schema = self.wire.schema  # of every batch
        self._unread = 0

    def _read_head(self, first: bool = False) -> bytes:
        """Return prefix and head of the next message; nothing at the end marker."""
        self._unread = None
        prefix = self._source.read(8)
        if first and not prefix:
            raise EOFError("no more streams")
        size = int.from_bytes(prefix[4:], "little")
        if len(prefix) < 8 or prefix[:4] != END_OF_STREAM[:4] or size > MAX_METADATA_BYTES:
            expected = "expected FF FF FF FF and the length of a message head"
            raise IPCError(f"not an Arrow IPC stream: {expected}, got {prefix!r}")
        if size:
            self._check_size("message head", size)
            return bytes(prefix + _whole(self._source.read(size), size))
        self.ended = True
        self._unread = 0
        return b""

    def _check_size(self, what: str, size: int, free: int = MAX_BODY_BYTES) -> None:
        """Refuse what is above the limit, or above *free* bytes where there is none."""
        limit = self._limits.max_bytes or free
        if size > limit:
            raise RequestTooLargeError(f"{what}: expected at most {limit} bytes, got {size}")

    def next(self) -> tuple[pa.RecordBatch, dict[bytes, bytes]] | None:
        """Read the next batch and its metadata; ``None`` at the end marker."""
        message = self.next_message()
        if message is None:
            return None
        return self.decode(message), message.metadata

    def next_message(self) -> BatchMessage | None:
        """Read the next batch's message without decoding it; ``None`` at the end marker."""
        if self.ended:
            return None
        raw, size, last = self._last
        if last is not None:
            received, at = self._source.received()
            data: Any = received[at : at + size]
            if len(data) == size and data[: len(raw)] == raw:
                self._source.at = at + size
                return BatchMessage(last.rows, last.metadata, data, last.has_nulls)
        while raw := self._read_head():
            head = FlatHead(raw)
            self._unread = head.body_length
            if head.type == SCHEMA_MESSAGE:
                raise IPCError("expected a batch, got a second schema message")
            size = len(raw) + head.body_length
            self._check_size("message", size)  # before anything is allocated
            self._unread = None
            try:
                data = raw
                if head.body_length:
                    data = _whole(self._source.read_after(raw, head.body_length), size)
            except MemoryError:
                raise IPCError(f"message: no memory for {size} bytes") from None
            self._unread = 0
            try:
                if head.type == DICTIONARY_MESSAGE:
                    self._keep_dictionary(head, data)
                    continue
                rows, _, is_compressed, has_nulls = self._measure(head, head.content, data)
            except _FOREIGN_FAILURES as exc:
                raise IPCError(f"the message: {text_of(exc)}") from None
            message = BatchMessage(rows, head.metadata, data, has_nulls)
            if not is_compressed and size <= SMALL_BODY_BYTES:
                self._last = (raw, size, message)
            if wire_read.isEnabledFor(logging.DEBUG):
                wire_read.debug(_SHAPE, rows, size, list(head.metadata), self.schema)
            return message
        return None

    def _measure(self, head: FlatHead, batch: int, data: Buffer) -> tuple[int, int, bool, bool]:
        """Return a batch's rows and decoded bytes, whether it is compressed and has nulls; refuse what nothing pays for."""
        rows_at, nodes, buffers, compression, views_at = head.table(batch, 5)
        rows = _I64(head.data, rows_at)[0]
        start, end = head.vector(buffers, 16, MAX_BUFFERS)  # of (offset, length)
        if views_at != head.absent:
            views = head.longs(views_at, 1)
            # How many buffers each column of views has. Older releases of pyarrow allocate whatever is said here.
            if min(views, default=0) < 0 or 32 * sum(views) > end - start:
                raise IPCError("counts of variadic buffers")
        decoded = size = len(data) - head.absent
        # The second was a metadata key before the format had a field for it, and pyarrow still obeys it.
        is_compressed = compression != head.absent or b"ARROW:experimental_compression" in head.metadata
        if is_compressed:
            decoded = 0
            body = memoryview(data)[head.absent :]
            for offset, length in struct.iter_unpack("<2q", head.data[start:end]):
                # BodyCompression: each buffer begins with its decoded length, -1 when it stands as it is.
                claim = _I64(body, offset)[0] if length else 0
                if claim < -1:
                    raise IPCError(f"compressed buffer at {offset}: a decoded length of {claim} bytes")
                decoded += length if claim == -1 else claim
            self._check_size("compressed buffers, decoded", decoded, max(FREE_DECODED_BYTES, 1024 * size))
        lengths = head.longs(nodes, 2)  # each followed by the number of nulls
        longest = max(rows, *lengths[::2], 0)  # a list of one row may have a trillion null items
        if rows < 0 or (longest > FREE_ROWS and longest > 8 * decoded):
            raise IPCError(f"{min(rows, 0) or longest} rows in {decoded} bytes: more rows than bits")
        most = self._limits.max_rows
        if most is not None and rows > most:
            raise RequestTooLargeError(f"expected at most {most} rows in a batch, got {rows}")
        return rows, decoded, is_compressed, self.wire.hides_nulls or any(lengths[1::2])

    def _keep_dictionary(self, head: FlatHead, data: Buffer) -> None:
        """Keep a dictionary message for the batches that come, in place of those that it replaces."""
        number_at, batch, is_delta = head.table(head.content, 3)
        number = _I64(head.data, number_at)[0]
        size = head.absent + self._measure(head, batch, data)[1]
        messages = self.dictionaries.setdefault(number, [])
        if not head.data[is_delta]:
            self._dictionary_bytes -= sum(before for before, _ in messages)
            messages.clear()
        messages.append((size, data))
        self._dictionary_bytes += size
        self._check_size("dictionaries", self._dictionary_bytes, FREE_DECODED_BYTES)
        if len(self.dictionaries) > self.wire.dictionaries:
            raise IPCError(f"dictionary {number}: the schema has {self.wire.dictionaries} dictionaries")
        if len(messages) > MAX_DICTIONARY_MESSAGES:
            raise RequestTooLargeError(f"dictionary {number}: more than {MAX_DICTIONARY_MESSAGES} messages")

    def decode(self, message: BatchMessage) -> pa.RecordBatch:
        """Decode a message of this stream: the last one read, if the schema has dictionaries."""
        if not message.rows:
            return self.wire.empty  # there is nothing to decode, and most of them are logs, ticks and tokens
        try:
            if not self.wire.dictionaries:
                batch = ipc.read_record_batch(message.data, self.schema)
            elif not self._expected or self.schema in [wire.schema for wire in self._expected.values()]:
                # pyarrow keeps dictionaries only in a stream of its own.
                ahead = [data for messages in self.dictionaries.values() for _, data in messages]
                batch = ipc.open_stream(b"".join([self.wire.message, *ahead, message.data])).read_next_batch()
            else:
                raise IPCError(f"the batch: dictionaries that are not expected, {schema_text(self.schema)}")
            if self._validation is not IpcValidation.NONE:
                batch.validate(full=self._validation is IpcValidation.FULL)
            return batch
        except _FOREIGN_FAILURES as exc:
            raise IPCError(f"the batch: {text_of(exc)}") from None

    def read_to_end(self) -> None:
        """Read over what is left after a refusal; where that raises `IPCError`, the connection must be closed."""
        while not self.ended:
            if self._unread is None or self._unread > MAX_DRAINED_BYTES:
                raise IPCError(f"of a message that was refused {self._unread or 'unknown'} bytes are left")
            while self._unread:
                piece = self._source.read(min(self._unread, 1 << 20))
                self._unread -= len(piece or _whole(piece, self._unread))
            try:
                raw = self._read_head()
            except RequestTooLargeError as exc:  # what is behind it cannot be known
                raise IPCError(text_of(exc)) from None
            if raw:
                self._unread = FlatHead(raw).body_length


def _whole(data: Buffer, size: int) -> Any:
    if len(data) < size:
        raise IPCError(f"half a message: expected {size} bytes, got {len(data)}")
    return data


# A table begins with the way back to its vtable: both sizes, then at which byte of the table its fields stand, those of
# a Message (format/Message.fbs): version, header_type, header, bodyLength, custom_metadata; of a KeyValue: key, value.
# All other references lead forward, from where they stand: that of the header from 8 + 20 + 12.
_MESSAGE = struct.pack("<I7H2xi", 20, 14, 24, 20, 22, 12, 4, 16, 16)  # reference to the table, vtable, way
_KEY_VALUE = struct.pack("<4Hi", 8, 12, 4, 8, 8)
_FRONT = struct.Struct(f"<4si{len(_MESSAGE)}sqIIHBxI")  # prefix, size; Message's fields; how many pairs
_PAIR = struct.Struct(f"<{len(_KEY_VALUE)}sIII")  # KeyValue's fields, the length of the key
_V5 = 4


def with_metadata(message: bytes, metadata: Mapping[Any, Any]) -> bytes:
    """Return a batch message that pyarrow serialised without metadata, with *metadata*.

    What its Message table refers to can stay as it is behind another one, if its bytes stay at multiples of 8.
    """
    table = 8 + _U32(message, 8)[0]
    header = table + _U16(message, table - _I32(message, table)[0] + 8)[0]
    batch = header + _U32(message, header)[0]
    # Before this, where the RecordBatch or its vtable begins, stands only the old Message table.
    rest = min(batch, batch - _I32(message, batch)[0]) & -8
    body = 8 + _I32(message, 4)[0]
    at = 8 + 4 * len(metadata)  # from the vector's first element to the next table
    places: list[int] = []
    pairs: list[bytes] = []
    for pair in metadata.items():
        key, value = [text.encode() if isinstance(text, str) else text for text in pair]
        size = len(key) + 4 & -4  # a text ends with a zero byte
        places.append(at - 4 * len(places))
        pairs += (_PAIR.pack(_KEY_VALUE, 8, 8 + size, len(key)), key.ljust(size, b"\0"))
        pairs += (len(value).to_bytes(4, "little"), value.ljust(len(value) + 4 & -4, b"\0"))
        at += _PAIR.size + size + 4 + len(pairs[-1])
    padding = bytes(-(at + _FRONT.size - 8) % 8)
    end = at + _FRONT.size - 8 + len(padding)
    fields = (len(message) - body, end + batch - rest - 40, 8, _V5, BATCH_MESSAGE)
    front = _FRONT.pack(message[:4], end + body - rest - 8, _MESSAGE, *fields, len(places))
    front += struct.pack(f"<{len(places)}I", *places)
    return b"".join([front, *pairs, padding, message[rest:]])


_OPTIONS = ipc.IpcWriteOptions()


class _Pieces(list[Any]):
    """The file that collects what pyarrow's stream writer writes, without copying bodies."""

    closed = False
    write = list.append


def batch_of(item: Item, wire: WireSchema) -> pa.RecordBatch:
    """Return the batch of an item."""
    batch = item if isinstance(item, bytes) else item[0]
    return ipc.read_record_batch(batch, wire.schema) if isinstance(batch, bytes) else batch


class IpcWriter:
    """Writes one Arrow IPC stream: each call hands whole messages, a list of buffers, to *write* at once.

    Not for use by several threads. The sink stays open and belongs to the caller; what it raises passes through.
    """

    def __init__(self, write: Callable[[list[Buffer]], object], wire: WireSchema) -> None:
        self.wire = wire
        self._write = write
        self._begun = False
        self._file: list[Buffer] = _Pieces()
        self._writer: Any = None  # pyarrow's: kept, as it knows which dictionaries it has sent

    def write_all(self, items: Iterable[Item] = (), *, close: bool = False) -> None:
        """Write batches (behind the schema, if they are the first), and the end marker if *close*."""
        pieces: list[Buffer] = [] if self._begun else [self.wire.message]
        for item in items:
            if isinstance(item, bytes):
                pieces.append(item)
                self._writer = None  # which does not know of the dictionaries that the item may bring
            else:
                pieces += self._messages(item[0], item[1] or {})
        if close:
            pieces.append(END_OF_STREAM)
        self._begun = True
        if pieces:
            self._write(pieces)

    def _messages(self, batch: pa.RecordBatch | bytes, metadata: Mapping[Any, Any]) -> list[Buffer]:
        """Return the messages of one batch. pyarrow's writer, which is slow, makes those of dictionaries and large ones."""
        most = MAX_METADATA_BYTES // 2
        if metadata and (len(metadata) > MAX_HEAD_ENTRIES or sum(map(len, metadata.values())) > most):
            raise ParameterError(f"metadata: expected at most {MAX_HEAD_ENTRIES} entries and {most} bytes")
        wire = self.wire
        pieces = self._file
        schema_left = 0
        try:
            message = batch if isinstance(batch, bytes) else wire.small_message(batch)
            if message is not None:
                pieces = [with_metadata(message, metadata) if metadata else message]
            else:
                pieces.clear()
                if self._writer is None:
                    self._writer = ipc.RecordBatchStreamWriter(pieces, wire.schema, options=_OPTIONS)
                    schema_left = len(wire.message)  # it writes that again with its first batch
                self._writer.write_batch(batch, custom_metadata=metadata or None)
        except ARROW_FAILURES as exc:
            raise IPCError(f"a batch cannot be written: {text_of(exc)}") from None
        while schema_left > 0:
            schema_left -= len(pieces.pop(0))
        if wire_write.isEnabledFor(logging.DEBUG):
            rows = getattr(batch, "num_rows", "some")
            wire_write.debug(_SHAPE, rows, total_size(pieces), list(metadata), wire.schema)
        return pieces


def stream_pieces(wire: WireSchema, items: Sequence[Item]) -> list[Buffer]:
    """Return one whole IPC stream in pieces; those of large bodies are not copied."""
    if len(items) == 1 and isinstance(items[0], bytes):  # the answer to most calls
        return [wire.message + items[0] + END_OF_STREAM]
    pieces: list[Buffer] = []
    IpcWriter(pieces.extend, wire).write_all(items, close=True)
    return pieces


def stream_bytes(wire: WireSchema, items: Sequence[Item]) -> bytes:
    """Return one whole IPC stream."""
    return b"".join(stream_pieces(wire, items))


def total_size(pieces: Iterable[Buffer]) -> int:
    """Return how many bytes *pieces* have together."""
    return sum(map(len, pieces))


_TYPE_SPELLING = {"double": "float64", "halffloat": "float16", "float": "float32", "string": "utf8"}


def type_text(arrow_type: pa.DataType) -> str:
    """Return an Arrow type as pyarrow's constructors spell it: ``float64``, where its own text says ``double``."""
    return re.sub(r"\b(double|halffloat|float|string)\b", lambda m: _TYPE_SPELLING[m[1]], str(arrow_type))


def schema_text(schema: pa.Schema) -> str:
    """Return a schema on one line: ``(a: float64 not null, b: utf8)``."""
    columns = [f"{c.name}: {type_text(c.type)}{' not null' * (not c.nullable)}" for c in schema]
    return f"({', '.join(columns)})"


def batch_of_table(table: pa.Table, where: str) -> pa.RecordBatch:
    """Return all rows of *table* as one batch; `ParameterError` when one batch cannot hold them."""
    batches = table.combine_chunks().to_batches() or [WireSchema(table.schema).empty]
    if len(batches) != 1:  # a column of text or bytes counts its bytes with 32 bits, if it is no large one
        raise ParameterError(f"{where}: a table of {table.nbytes} bytes is too large for one batch; slice it")
    return batches[0]


def conform_batch(batch: Any, wire: WireSchema, where: str, *, cast_values: bool) -> pa.RecordBatch:
    """Return *batch* under a schema: same names in the same order, no null where none is allowed.

    With *cast_values* columns go by name, and types may differ where a cast keeps the values. `ParameterError` says
    what was expected and what came.
    """
    if isinstance(batch, pa.Table):
        batch = batch_of_table(batch, where)
    if not isinstance(batch, pa.RecordBatch):
        raise ParameterError(f"{where}: expected a pyarrow.RecordBatch, got {type(batch).__name__}")
    schema = wire.schema
    if not batch.schema.equals(schema):
        unique = len(set(schema.names)) == len(schema)
        if cast_values and unique and sorted(batch.schema.names) == sorted(schema.names):
            batch = batch.select(schema.names)
        if batch.schema.names != schema.names:
            received = schema_text(batch.schema)
            raise ParameterError(f"{where}: expected columns {schema_text(schema)}, got {received}")
        columns = [_conform(*pair, where, cast_values) for pair in zip(batch.columns, schema)]
        batch = pa.RecordBatch.from_arrays(columns, schema=schema)
    for i in wire.required:
        if batch.column(i).null_count:
            _conform(batch.column(i), schema.field(i), where, False)
    return batch


def _conform(values: Any, column: pa.Field, where: str, cast_values: bool) -> pa.Array:
    """Return *values*, an array or what makes one, as the array of a column."""
    received = values
    fitted = None
    problem = ""
    try:
        if not isinstance(values, pa.Array):
            if not hasattr(values, "__len__"):
                values = list(values)  # an iterator, which is read twice
            fitted = pa.array(values, column.type)
            if not _is_exact(column.type, values):
                with suppress(*ARROW_FAILURES):  # pairs make a map, but no type of their own
                    received = pa.array(values)
        elif values.type.equals(column.type):
            fitted = values
        elif cast_values and not _is_shared(values):
            fitted = values.cast(column.type, safe=True)
        if fitted is not None and isinstance(received, pa.Array) and not _is_kept(received, fitted):
            raise ValueError("values would be changed")
    except ARROW_FAILURES as exc:
        fitted = None
        problem = f" ({text_of(exc)})"
    if fitted is not None and (column.nullable or not fitted.null_count):
        return fitted
    expected = type_text(column.type)
    got_text = type(values).__name__
    if fitted is not None:
        expected += " without nulls"
        got_text = "a null"
    elif isinstance(received, pa.Array):
        got_text = type_text(received.type)
    raise ParameterError(f"{where}: column {column.name!r}: expected {expected}, got {got_text}{problem}")


def _is_exact(arrow_type: pa.DataType, values: Sequence[Any]) -> bool:
    """Whether `pa.array` cannot change *values* on the way to *arrow_type*: to infer their type takes four times as long."""
    plain = pa.types.is_integer(arrow_type) and {int, type(None)}.issuperset(map(type, values))
    return plain or arrow_type in (pa.float64(), pa.bool_(), pa.utf8(), pa.binary())


_MOMENT = r"(timestamp|date)?(time)?(duration)?\d*\[\w+(, tz)?"  # midnight may stand for its date


def _moment_parts(arrow_type: pa.DataType) -> list[bool] | None:
    """Which of date, time of day, length and zone a type of moments lacks; ``None`` for other types."""
    match = re.match(_MOMENT, str(arrow_type))
    return match and [part is None for part in match.groups()]


def _is_kept(values: pa.Array, fitted: pa.Array) -> bool:
    """Tell whether values are what they were, but for the rounding that a type of floats declares; text may be read.

    pyarrow finds it safe to cut a fraction or hours off, to drop zones and members, and to take 5 for a moment.
    """
    before = values.type
    after = fitted.type
    if before == after or re.match("null|(large_)?string", str(before)):
        return True
    if pa.types.is_struct(before) and pa.types.is_struct(after):
        pairs = [(values.field(part.name), after.get_field_index(part.name)) for part in before]
        return all(at >= 0 and _is_kept(part, fitted.field(at)) for part, at in pairs)
    if pa.types.is_nested(before) and hasattr(values, "flatten") and hasattr(fitted, "flatten"):
        return _is_kept(values.flatten(), fitted.flatten())
    if pa.types.is_floating(after):
        from pyarrow import compute

        return not pa.types.is_floating(before) or compute.is_inf(fitted) == compute.is_inf(values)
    return _moment_parts(before) == _moment_parts(after) and fitted.cast(before, safe=False) == values


def _is_shared(values: pa.Array) -> bool:
    """Tell whether values may be named a million times, each of which a cast would write out."""
    if str(values.type) in ("string_view", "binary_view"):  # of their 16 bytes the first 4 are the length
        return sum(memoryview(values.buffers()[1]).cast("i")[::4]) > FREE_DECODED_BYTES
    return re.search(r"(string|binary|list)_view|run_end_encoded", str(values.type)) is not None


def batch_from_pydict(data: Mapping[str, Any], schema: pa.Schema | None, where: str) -> pa.RecordBatch:
    """Make a batch of columns by name; without *schema* types are inferred. `ParameterError` as `conform_batch`."""
    try:
        data = dict(data)
        for name, values in data.items():  # pyarrow takes a text apart
            if isinstance(values, (str, bytes, bytearray, Mapping)) or not hasattr(values, "__iter__"):
                text = f"column {name!r}: expected a list or array of values, got {type(values).__name__}"
                raise ParameterError(f"{where}: {text}")
        if schema is None:
            return pa.RecordBatch.from_pydict(data)
        if set(data) != set(schema.names):
            raise ParameterError(f"{where}: expected columns {schema.names}, got {list(data)}")
        columns = [_conform(data[column.name], column, where, False) for column in schema]
        return pa.RecordBatch.from_arrays(columns, schema=schema)
    except ParameterError:
        raise
    except ARROW_FAILURES as exc:
        raise ParameterError(f"{where}: {text_of(exc)}") from None


# ====================
# 5. ROW TEMPLATES ... uses 1-4
# Streams of one row without pyarrow, whose calls cost more than a small message is worth: a template is made of a stream
# that section 4 wrote for an example row. Law: `read` accepts only what `write` would have written. All else goes the
# ordinary way, with the same result.

_INTEGERS = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
# By a type's text, as it may have no hash: exact Python type of encoded values, what `struct` calls its numbers.
_FLAT: dict[str, tuple[type, str]] = {str(it): (int, code) for it, code in zip(_INTEGERS, "bhiqBHIQ")}
_FLAT |= {"double": (float, "d"), "float": (float, "f"), "bool": (bool, ""), "string": (str, "")}
_FLAT |= {"binary": (bytes, ""), str(pa.dictionary(pa.int16(), pa.utf8())): (str, "h")}


_PADDING = [bytes(-at & 7) for at in range(8)]


class NotPlain(ValueError):
    """A type or value for which the ordinary way is the right one; it words the error, if there is one."""


# What values that are not plain raise here, and bytes that nothing here would have written.
_NOT_PLAIN = (ValueError, TypeError, LookupError, OverflowError, StopIteration, struct.error)


def _body(buffers: Sequence[bytes]) -> tuple[bytes, list[int], list[int]]:
    """Return the body of a message with these buffers, at which byte each begins, and their lengths."""
    starts: list[int] = []
    pieces: list[bytes] = []
    at = 0
    for data in buffers:
        starts.append(at)
        if data:
            pieces.append(data)
            at += len(data)
            if at & 7:
                pieces.append(_PADDING[at & 7])
                at = at + 7 & -8
    return b"".join(pieces), starts, [*map(len, buffers)]


def _pack_bits(bits: Sequence[bool]) -> bytes:
    """Pack truth values, the first into the lowest bit."""
    digits = "".join("01"[bit] for bit in reversed(bits))
    return int(digits or "0", 2).to_bytes((len(bits) + 7) // 8, "little")


def _unpack_bits(data: bytes, count: int) -> list[bool]:
    return [data[i >> 3] >> (i & 7) & 1 == 1 for i in range(count)]


class _Column:
    """Writes and reads columns of one type. Values are what codecs encode to, of exactly one Python type, or None."""

    def __init__(self, column: pa.Field, of_structs: type = dict) -> None:
        arrow_type = column.type
        self.nullable = column.nullable
        self.children: dict[Any, _Column] = {}  # of a struct by name, of the pairs in a map by number
        self.item: _Column | None = None  # of a list or map
        self.kind, self.code = _FLAT.get(str(arrow_type), (list, ""))
        self.one = struct.Struct("<" + self.code)
        self.is_enum = (self.kind, self.code) == (str, "h")
        # What pyarrow writes where a value is null. In a null struct an enum has an index without a name: `NotPlain`.
        self.filler: Any = NotPlain if self.is_enum else self.kind()
        if pa.types.is_map(arrow_type):
            pairs = pa.struct([arrow_type.key_field, arrow_type.item_field])
            self.item = _Column(pa.field("", pairs, nullable=False), tuple)
        elif pa.types.is_list(arrow_type):
            self.item = _Column(arrow_type.value_field)
        elif pa.types.is_struct(arrow_type):
            self.kind = of_structs
            keys = itertools.count() if of_structs is tuple else [f.name for f in arrow_type]
            self.children = dict(zip(keys, map(_Column, arrow_type)))
            self.filler = {name: child.filler for name, child in self.children.items()}
        inner = [self.item] if self.item else self.children.values()
        if self.kind in (list, dict, tuple) and len(inner) < max(arrow_type.num_fields, 1):
            raise NotPlain(f"{type_text(arrow_type)} is not plain, or has two fields of one name")
        # Bits behind the last one, a NaN of another form: whether they would be written is seen by writing them.
        self.is_doubtful: bool = self.kind is bool or self.code == "f" or any(c.is_doubtful for c in inner)

    def write(self, values: Sequence[Any], nodes: list[int], buffers: list[bytes], names: list[Any]) -> None:
        """Append what the values become, in the order of Arrow's walk over columns, or raise one of the failures above.

        *nodes* are (length, null count), flat; *names*, of each enum, those in the dictionary message ahead.
        """
        bitmap = b""
        classes = [*map(type, values)]
        count = len(classes)
        nulls = count - classes.count(self.kind)
        if nulls:
            if not self.nullable or classes.count(type(None)) < nulls:
                raise NotPlain
            bitmap = _pack_bits([value is not None for value in values])
            values = [self.filler if value is None else value for value in values]
        nodes += (count, nulls)
        if self.children:
            if set(map(len, values)) - {len(self.children)}:
                raise NotPlain
            buffers.append(bitmap)
            for name, child in self.children.items():
                child.write([value[name] for value in values], nodes, buffers, names)
        elif self.kind is bool:
            buffers += (bitmap, _pack_bits(values))
        elif self.code:
            if self.is_enum:
                used = list(dict.fromkeys(value for value in values if value is not NotPlain))
                if not used:
                    raise NotPlain  # an empty dictionary has another form
                names.append(used)
                places = {name: place for place, name in enumerate(used)}
                values = [places.get(value, 0) for value in values]
            layout = self.one if count == 1 else struct.Struct(f"<{count}{self.code}")
            buffers += (bitmap, layout.pack(*values))
        else:
            if self.kind is str:
                values = [value.encode() for value in values]
            elif self.item is not None:
                values = [[*value] for value in values]  # which another thread may change meanwhile
            if count == 1:
                items = values[0]
                buffers += (bitmap, _ONE_OFFSET.pack(0, len(items)))
            else:
                items = b"".join(values) if self.item is None else [*itertools.chain.from_iterable(values)]
                offsets = itertools.accumulate(map(len, values), initial=0)
                buffers += (bitmap, struct.pack(f"<{count + 1}i", *offsets))
            if self.item is None:
                buffers.append(items)
            else:
                self.item.write(items, nodes, buffers, names)

    def read(self, count: int, nodes: Any, buffers: Iterator[bytes], names: Iterator[Any]) -> list[Any]:
        """Read the next *count* values, in the same order; a failure where others would be written."""
        length, nulls = next(nodes)
        bitmap = next(buffers)
        if length != count or bool(nulls) != bool(bitmap) or (bitmap and not self.nullable):
            raise NotPlain
        values: list[Any]
        if self.children:
            rows = zip(*[child.read(count, nodes, buffers, names) for child in self.children.values()])
            values = [*rows] if self.kind is tuple else [dict(zip(self.children, row)) for row in rows]
        elif self.kind is bool:
            values = _unpack_bits(next(buffers), count)
        elif self.code:
            layout = self.one if count == 1 else struct.Struct(f"<{count}{self.code}")
            values = [*layout.unpack(next(buffers))]
            if self.is_enum:
                used = next(names)
                if not values or min(values) < 0:
                    raise NotPlain
                values = [used[place] for place in values]
                if [*dict.fromkeys(values)] != used:
                    raise NotPlain
        else:
            offsets = struct.unpack(f"<{count + 1}i", next(buffers))
            items: Any
            if self.item is None:
                items = next(buffers)
            else:
                items = self.item.read(offsets[-1], nodes, buffers, names)
            if offsets[0] or offsets[-1] != len(items) or (count > 1 and [*offsets] != sorted(offsets)):
                raise NotPlain
            values = [items]
            if count != 1:
                values = [items[start:end] for start, end in itertools.pairwise(offsets)]
            if self.kind is str:
                values = [value.decode() for value in values]
        if bitmap:
            values = [value if bit else None for value, bit in zip(values, _unpack_bits(bitmap, count))]
        return values

    def example(self, size: int) -> Any:
        """Return an example: for size 1 an everyday one, for 3 a longer one with nulls in it, for 0 the emptiest."""
        if not size and self.nullable:
            return None
        if self.children:
            values = {name: child.example(size) for name, child in self.children.items()}
            return tuple(values.values()) if self.kind is tuple else values
        if self.item is not None:
            return [self.item.example(n) for n in range(size, -(size > 1), -1)]
        return self.kind(size) if size else self.kind()


_ONE_OFFSET = struct.Struct("<2i")
_NAMES = [_Column(pa.field("", pa.utf8(), nullable=False))]


class _Layout:
    """Bytes that differ from *example* only in holes, (start, `struct` code): one call reads or writes them all, in order."""

    def __init__(self, example: bytes, holes: Iterable[tuple[int, str]]) -> None:
        self.size = len(example)
        at = 0
        codes = ""
        for start, code in sorted(holes):
            codes += f"{start - at}s{code}"
            at = start + struct.calcsize("<" + code)
        self._struct = struct.Struct(f"<{codes}{self.size - at}s")
        self._parts = self._struct.unpack(example)
        self._fixed = self._parts[::2]

    def fill(self, values: Sequence[Any]) -> bytes:
        """Return the bytes with these values in the holes."""
        parts = [*self._parts]
        parts[1::2] = values
        return self._struct.pack(*parts)

    def match(self, data: bytes, at: int) -> list[Any] | None:
        """Return what stands in the holes; ``None`` when the other bytes are not these."""
        parts = self._struct.unpack_from(data, at)
        return [*parts[1::2]] if parts[::2] == self._fixed else None


class _MessageTemplate:
    """The message of a dictionary or batch like *message*. Some metadata varies too: key -> length of the value."""

    def __init__(self, message: bytes, columns: Sequence[_Column], varying: Mapping[bytes, int]) -> None:
        head = FlatHead(message[: 8 + int.from_bytes(message[4:8], "little")])
        content = head.table(head.content, 2)[1] if head.type == DICTIONARY_MESSAGE else head.content
        rows, *vectors = head.table(content, 3)
        fields = [head.table(pair, 2) for pair in head.tables(head.entries, MAX_HEAD_ENTRIES)]
        texts = {head.text(key): head.vector(value, 1, head.absent)[0] for key, value in fields}
        holes = [(texts[key], f"{size}s") for key, size in varying.items()]
        self._columns = columns
        self._is_doubtful = any(column.is_doubtful for column in columns)
        self.numbers: Any = None  # the holes of the whole message, if nothing but numbers differs
        # A float32 may be a NaN of another form. Each number has eight bytes of the body.
        if all(column.kind in (int, float) and column.code != "f" for column in columns):
            self.numbers = holes + [(head.absent + 8 * i, column.code) for i, column in enumerate(columns)]
        if columns:
            spans = [head.vector(field, 16, MAX_BUFFERS) for field in vectors]
            self._nodes, self._places = [struct.Struct(f"<{(end - start) // 8}q") for start, end in spans]
            holes += [(head.length, "q"), (rows, "q"), *[(start, f"{end - start}s") for start, end in spans]]
            self._layout = _Layout(message[: head.absent], holes)
            # In which order the holes stand, and where the values of each stand then.
            order = sorted(range(len(holes)), key=holes.__getitem__)
            self._ordered = operator.itemgetter(*order)
            self._listed = operator.itemgetter(*sorted(order, key=order.__getitem__))

    def write(self, columns: Sequence[Any], values: Sequence[bytes]) -> tuple[bytes, list[list[str]]]:
        """Return the message of these columns, and the names of each enum in them."""
        nodes: list[int] = []
        buffers: list[bytes] = []
        names: list[Any] = []
        for column, items in zip(self._columns, columns):
            column.write(items, nodes, buffers, names)
        if sum(map(len, buffers)) > 4 * SMALL_BODY_BYTES:
            raise NotPlain  # the ordinary way does not copy it
        body, starts, lengths = _body(buffers)
        places = itertools.chain.from_iterable(zip(starts, lengths))
        longs = (self._nodes.pack(*nodes), self._places.pack(*places))
        return self._layout.fill(self._ordered((*values, len(body), nodes[0], *longs))) + body, names

    def read(self, data: bytes, at: int, names: list[Any]) -> tuple[list[Any], list[bytes], int, bool]:
        """Read a message: columns, metadata values, where it ends, whether `write` would surely write it so."""
        holes = self._layout.match(data, at)
        if holes is None:
            raise NotPlain
        *values, size, rows, packed_nodes, packed_places = self._listed(holes)
        nodes = self._nodes.unpack(packed_nodes)
        places = self._places.unpack(packed_places)
        nulls = nodes[1::2]
        starts = [*places[::2]]
        lengths = [*places[1::2]]
        start = at + self._layout.size
        body = data[start : start + size]
        buffers = [body[begin : begin + length] for begin, length in zip(starts, lengths)]
        is_so = _body(buffers) == (body, starts, lengths)  # padding too
        if not is_so or rows != nodes[0] or not len(body) == size <= 4 * SMALL_BODY_BYTES:
            raise NotPlain
        rest = (zip(nodes[::2], nulls), iter(buffers), iter(names))
        columns = [column.read(rows, *rest) for column in self._columns]
        return columns, values, start + size, not (any(nulls) or self._is_doubtful)


class RowTemplate:
    """Streams of one row whose metadata differs in *varying* alone: key -> length of its value in bytes.

    Rows hold encoded values, as codecs make them; without columns there is no row. The columns *strict* are those of
    the schema with fewer nulls. Thread-safe. `ValueError`: a column that is not plain, or section 4 writes other bytes.
    """

    def __init__(
        self,
        schema: pa.Schema,
        metadata: Metadata,
        varying: Mapping[bytes, int],
        strict: Sequence[pa.Field] = (),
    ) -> None:
        wire = WireSchema(schema)
        self.schema_message = wire.message
        columns = [_Column(column) for column in strict or schema]
        self._kinds = [column.kind for column in columns]
        self._lengths = [*varying.values()]
        values = [b"%c" % (97 + i) * length for i, length in enumerate(self._lengths)]
        examples = []
        for size in (1, 3, 0):
            row = [column.example(size) for column in columns]
            arrays = [pa.array([value], column.type) for value, column in zip(row, schema)]
            batch = pa.RecordBatch.from_arrays(arrays, schema=schema) if row else wire.empty
            examples.append((row, stream_bytes(wire, [(batch, {**metadata, **dict(zip(varying, values))})])))
        self.opening = examples[0][1][: len(wire.message) + 8]  # with the size of the head behind the schema
        reader = IpcReader(ByteSource(examples[0][1]))
        message = bytes(cast("BatchMessage", reader.next_message()).data)
        messages = reader.dictionaries.values()
        self._dictionaries = [_MessageTemplate(bytes(data), _NAMES, {}) for [(_, data)] in messages]
        self._batch = _MessageTemplate(message, columns, varying)
        self._stream: _Layout | None = None  # of the whole stream, where nothing but numbers differs
        if self._batch.numbers is not None:
            start = len(wire.message)
            self._stream = _Layout(examples[0][1], [(start + at, code) for at, code in self._batch.numbers])
        for row, stream in examples:
            with suppress(NotPlain):  # nulls may be refused, but nothing may be written wrongly
                if self.write(row, values) != stream or self.read(stream) != (row, values, len(stream)):
                    raise ValueError(f"a row of {schema_text(schema)} is not written as expected")

    def message(self, row: Sequence[Any], values: Sequence[bytes] = ()) -> bytes:
        """Return the message of the batch (behind those of its dictionaries), an item of a longer stream; as `write`."""
        return self.write(row, values)[len(self.schema_message) : -len(END_OF_STREAM)]

    def write(self, row: Sequence[Any], values: Sequence[bytes] = ()) -> bytes:
        """Return the whole stream; *values* are those of `varying`. `NotPlain` for what the ordinary way must write."""
        if (values or self._lengths) and [*map(len, values)] != self._lengths:
            raise NotPlain
        try:
            if self._stream is not None and [*map(type, row)] == self._kinds:
                return self._stream.fill([*values, *row])
            if len(row) != len(self._kinds):
                raise NotPlain
            message, names = self._batch.write([[value] for value in row], values)
            ahead = [one.write([used], ())[0] for one, used in zip(self._dictionaries, names)]
            return b"".join([self.schema_message, *ahead, message, END_OF_STREAM])
        except _NOT_PLAIN as exc:
            raise NotPlain(str(exc)) from None

    def read(self, data: bytes, at: int = 0) -> tuple[list[Any], list[bytes], int] | None:
        """Read a stream at *at*: its row, the values of `varying`, where it ends. ``None``: not written by `write`."""
        try:
            if self._stream is not None and (holes := self._stream.match(data, at)) is not None:
                count = len(self._lengths)
                return holes[count:], holes[:count], at + self._stream.size
            if not self._kinds or not data.startswith(self.schema_message, at):
                return None
            end = at + len(self.schema_message)
            names = []
            for dictionary in self._dictionaries:
                [column], _, end, _ = dictionary.read(data, end, [])
                names.append(column)
            columns, values, end, proven = self._batch.read(data, end, names)
            row = [value for [value] in columns]
            end += len(END_OF_STREAM)
            is_so = proven or self.write(row, values) == data[at:end]
            return (row, values, end) if is_so and data.startswith(END_OF_STREAM, end - 8) else None
        except _NOT_PLAIN:
            return None


def row_template(
    schema: pa.Schema,
    metadata: Metadata | None = None,
    varying: Mapping[bytes, int] | None = None,
    *,
    strict: Sequence[pa.Field] = (),
) -> RowTemplate | None:
    """Return the template of these streams; ``None`` when the schema is not plain."""
    with suppress(ValueError):
        return RowTemplate(schema, metadata or {}, varying or {}, strict)
    return None


# ====================
# 6. TYPES ... uses 1-5
# Annotation -> codec: the Arrow type, how a Python value is encoded for it, and how it comes back.
# Law: what arrives is what was sent, or it is refused before it is sent. pyarrow converts with loss where types
# differ, so what it gives back is compared, unless the Python type is exactly that of the Arrow type.


class ArrowType(NamedTuple):
    """Says which Arrow type a field, parameter or result has: ``Annotated[int, ArrowType(pa.int32())]``."""

    arrow_type: pa.DataType  # exactly this type goes on the wire
    nullable: bool | None = None  # overrides what the annotation says, also an Optional; None leaves it

    def __hash__(self) -> int:  # as pyarrow hashes types, but for extension types
        return hash(str(self.arrow_type))


class Transient:
    """Marks a field that does not travel: ``Annotated[T, Transient()]``; it is read as its default."""


class Mismatch(ParameterError):
    """``Mismatch(expected, got)``: a value does not fit its codec. Containers put their step in front of `path`: `a.b[0]`."""

    path = ""

    def under(self, step: str) -> Mismatch:
        """Put *step* (``.name``, ``[3]``, ``['key']``) in front of the path; return this exception."""
        self.path = step + self.path
        return self

    def __str__(self) -> str:
        return f"{self.path}: expected {self.args[0]}, got {self.args[1]}"


def got(value: object) -> str:
    """Return what errors call a value: the name of its type."""
    return "None" if value is None else type(value).__name__


def _expect(value: Any, accepted: Any, expected: str) -> Any:
    if not isinstance(value, accepted):
        raise Mismatch(expected, got(value))
    return value


def with_field(name: str, convert: Callable[[Any], T], value: Any) -> T:
    """Return ``convert(value)``; what it raises becomes a `Mismatch` whose path begins with ``.name``."""
    try:
        return convert(value)
    except Mismatch as exc:
        raise exc.under(f".{name}") from None
    except (Refusal, StatusError):  # a __post_init__ raised it on purpose
        raise
    except Exception as exc:  # a property, a __repr__ or a __post_init__ of the value may raise anything
        raise Mismatch("a valid value", f"{type(exc).__name__}: {text_of(exc)}").under(f".{name}") from exc


def located(where: str, convert: Callable[[Any], T], value: Any) -> T:
    """Return ``convert(value)``; what it raises is a `ParameterError` at *where*, and the path behind it."""
    try:
        return with_field("", convert, value)
    except Mismatch as exc:
        # Without the "." of the empty name, and behind a space that of the field: "f() argument " and "a[0]".
        exc.path = exc.path[1 + where.endswith(" ") :]
        raise ParameterError(f"{where}{exc}") from exc.__cause__


class Codec(NamedTuple):
    """How the values of one annotation travel; made by `codec_for`. What does not fit is a `Mismatch`.

    Encoded values are what ``pa.array`` takes and ``to_pylist`` gives back, in exact types: a dict for a struct,
    pairs for a map, an enum's name.
    """

    kind: Any  # a type of `_SCALARS`, list, dict, Mapping: a struct, object: any, None: write and read do it all
    arrow_type: pa.DataType
    expected: str  # what errors say was wanted
    write: Callable[[Any], Any] = lambda value: value  # goes before the conversion to Arrow
    read: Callable[[Any], Any] = lambda value: value  # goes behind the conversion from Arrow
    parts: Mapping[str, Codec] = {}  # of a list: item; of a dict: key, value; of a struct: its members
    plain: frozenset[type] = frozenset()  # exact types that stay as they are both ways, alone and in lists
    zoned: bool | None = None  # of datetimes and times, where microseconds are held: whether they have a zone
    nullable: bool = False  # None is a value
    dataclass: DataclassCodec | None = None
    annotation: Any = None

    def is_read_back(self) -> bool:
        """Whether what was encoded is sure to be decoded: plain types, dataclasses that run no code."""
        if self.dataclass is not None:
            return self.dataclass.is_read_back
        return bool(self.plain or self.parts) and all(part.is_read_back() for part in self.parts.values())

    def encode(self, value: Any) -> Any:
        """Return what travels for *value*."""
        if value is None and self.nullable:
            return None
        value = self.write(value)
        if type(value) in self.plain:
            return value
        if self.kind in (list, dict, Mapping):
            return self._members(value, Codec.encode)
        return value if self.kind is None else self._held(value)

    def decode(self, encoded: Any) -> Any:
        """Return the Python value that *encoded* stands for."""
        if (encoded is None and self.nullable) or type(encoded) in self.plain:
            return encoded
        if self.kind in (list, dict, Mapping):
            _expect(encoded, dict if self.kind is Mapping else list, self.expected)
            encoded = self._members(encoded, Codec.decode)
        elif self.kind is not None and type(encoded) is not self.kind:
            encoded = self._held(encoded)
        return self.read(encoded)

    def strict_list(self) -> pa.DataType | None:
        """Return the type of lists of nothing but plain values, None only where it may stand; else ``None``."""
        if not (self.kind is self.read is list and pa.types.is_list(self.arrow_type)):
            return None
        item = self.parts["item"]
        inner = item.arrow_type if item.plain else item.strict_list()
        if inner is not None:
            inner = pa.list_(pa.field("item", inner, item.nullable))
        return inner

    def of_encoded(self) -> Codec:
        """Return the codec of what this one encodes to: it changes nothing, and has pyarrow try each part."""
        parts = {name: part.of_encoded() for name, part in self.parts.items()}
        return Codec(self.kind, self.arrow_type, self.expected, parts=parts, nullable=self.nullable)

    def _members(self, value: Any, convert: Callable[..., Any]) -> Any:
        """Convert what is in a list, a map or a struct, by its codec."""
        if self.kind is list:
            return self.parts["item"]._each(value, range(len(value)), convert)
        if self.kind is Mapping:  # what there is of them
            members = {name: member for name, member in value.items() if name in self.parts}
            for name, member in members.items():
                part = self.parts[name]
                if type(member) not in part.plain:
                    members[name] = with_field(name, partial(convert, part), member)
            return members
        keys, values = map(list, zip(*value) if value else ((), ()))
        values = self.parts["value"]._each(values, keys, convert)
        return list(zip(self.parts["key"]._each(keys, keys, convert), values))

    def _each(self, values: Any, steps: Sequence[Any], convert: Callable[..., Any]) -> list[Any]:
        """Convert values of this codec; a mismatch says at which of *steps*."""
        classes = list(map(type, values))
        # To count one type takes half as long as to collect them all.
        alike = classes and classes[0] in self.plain and classes.count(classes[0]) == len(classes)
        if alike or self.plain.issuperset(classes):
            return values if type(values) is list else list(values)
        out: list[Any] = []
        try:
            for value in values:
                out.append(convert(self, value))
        except Mismatch as exc:
            raise exc.under(f"[{steps[len(out)]!r:.40}]") from None
        return out

    def _held(self, value: Any) -> Any:
        """Return what Arrow holds of a value, in an exact type, if that is equal."""
        if type(value) is int and float in self.plain and abs(value) <= 1 << 53:
            return float(value)  # pyarrow takes longer, here and below
        has_zone = getattr(value, "tzinfo", None) is not None
        if type(value) is self.kind and self.zoned is has_zone:
            return value
        held: Any = None
        try:
            held = pa.array([value], self.arrow_type)[0].as_py()
            reason = f"it would arrive as {text_of(held):.60}"
        except ARROW_FAILURES as exc:
            reason = f"{text_of(exc):.200}"
        # Whoever declares a narrow float wants it rounded; NaN is equal to nothing, and no two zones in the hour
        # that comes twice.
        is_instant = has_zone and getattr(held, "tzinfo", None) and not held - value
        is_rounded = isinstance(held, float) and isinstance(value, float) and abs(held) != float("inf")
        is_text = isinstance(held, bytes) and isinstance(value, str)  # `python -bb` does not compare them
        is_same = held is not None and not is_text and (is_rounded or is_instant or held == value)
        if is_same and isinstance(held, bool) >= isinstance(value, bool):
            return value if type(value) is type(held) is datetime.datetime else held  # not in another zone
        received = got(value)
        if not isinstance(value, (str, bytes, type(None))):
            received = f"{received} {value!s:.60}"
        zone = ""
        if has_zone and not getattr(self.arrow_type, "tz", None):
            zone = " without a zone (Annotated[datetime, ArrowType(pa.timestamp('us', tz='UTC'))] has one)"
        raise Mismatch(f"{self.expected}{zone}", f"{received} ({reason})")

    def to_array(self, encoded: Any) -> pa.Array:
        """Return the column of one encoded value."""
        arrow_type = self.arrow_type
        is_bytes = type(encoded) is bytes and pa.types.is_binary(arrow_type)
        if is_bytes and SMALL_BODY_BYTES < len(encoded) < 1 << 31:
            offsets = pa.py_buffer(struct.pack("<ii", 0, len(encoded)))
            return pa.Array.from_buffers(arrow_type, 1, [None, offsets, pa.py_buffer(encoded)])  # not copied
        try:
            array = pa.array([encoded], arrow_type)
            array.validate(full=arrow_type.num_fields > 0)
        except ARROW_FAILURES:
            self.of_encoded().encode(encoded)
            # Under a null struct pyarrow writes index 0, also into an empty dictionary; readers refuse that.
            array = pa.array([encoded, _filled(arrow_type)], arrow_type).slice(0, 1)
        return array


def _filled(arrow_type: pa.DataType) -> Any:
    """Return an encoded value that puts an entry into every dictionary of texts in *arrow_type*."""
    if pa.types.is_map(arrow_type):
        return [(_filled(arrow_type.key_type), _filled(arrow_type.item_type))]
    if pa.types.is_struct(arrow_type):
        return {member.name: _filled(member.type) for member in arrow_type}
    if pa.types.is_nested(arrow_type):
        return [_filled(arrow_type.value_type)] * getattr(arrow_type, "list_size", 1)
    return 0 if pa.types.is_integer(arrow_type) else ""


_DAY = datetime.datetime(2000, 1, 1)
_EXAMPLES = (True, 0, 0.0, "", b"", decimal.Decimal(), _DAY, _DAY.date(), _DAY.time(), _DAY - _DAY)
_SCALARS = {type(example): example for example in _EXAMPLES}  # the Python types that travel as they are
_NARROW = r"\b(half)?float\b|decimal|time|\[[mn]?s|fixed"  # Arrow types that hold less than these


def hints_of(owner: Any) -> dict[str, Any]:
    """Return the resolved annotations of a class or function; `TypeError` names it and what is not there."""
    for base in getattr(owner, "__mro__", ()):
        own = vars(base).get("__annotations__", {})
        # Python 3.10 does not resolve the word alone: the class itself gets what it stands for.
        own.update({name: ClassVar for name, hint in own.items() if hint in ("ClassVar", "typing.ClassVar")})
    try:
        return typing.get_type_hints(owner, include_extras=True)
    except Exception as exc:
        text = f"{getattr(owner, '__qualname__', owner)}: its annotations do not resolve: {text_of(exc)}"
        raise TypeError(f"{text} (define the types that annotations name at module level)") from exc


def unwrapped(annotation: Any) -> tuple[Any, pa.DataType | None, bool | None]:
    """Return an annotation without Optional, Annotated, Final and aliases; its Arrow type; whether None fits."""
    origin = get_origin(annotation)
    rest = [member for member in get_args(annotation) if member is not type(None)]
    inner = getattr(annotation, "__supertype__", getattr(annotation, "__value__", None))
    if origin is Annotated:
        inner = annotation.__origin__
    elif len(rest) == 1 and origin in (*_UNIONS, typing.Final):
        inner = rest[0]
    if inner is None:
        return annotation, None, None
    bare, exact, nullable = unwrapped(inner)
    if origin is Annotated:  # the outermost goes first; other metadata is passed over, hashable or not
        own = next((it for it in annotation.__metadata__ if isinstance(it, ArrowType)), ArrowType(exact))
        return bare, own.arrow_type, nullable if own.nullable is None else own.nullable
    # What an ArrowType says of None goes before an Optional around it.
    return bare, exact, nullable or (nullable is None and origin in _UNIONS)


_UNIONS = (Union, types.UnionType)


def annotation_text(annotation: Any) -> str:
    """Return an annotation as a person writes it: ``list[int]``, ``date | None``, ``Decimal(20, 4)``."""
    origin = get_origin(annotation)
    words = [repr(it) if origin is Literal else annotation_text(it) for it in get_args(annotation)]
    if origin in _UNIONS:
        return " | ".join(sorted(words, key="None".__eq__))  # None comes last, the others stay in their order
    if origin is Annotated:
        bare, exact, nullable = unwrapped(annotation)
        # Of an Arrow type is said what a caller has to know, and no more.
        if exact is None:
            return words[0]
        text = re.sub(r"decimal\d+", "Decimal", type_text(exact))
        text = re.sub(r"timestamp\[\w+, tz=", "datetime[", text)
        known = bare in (int, float) and exact == pa.scalar(bare()).type
        if known or (text == type_text(exact) and bare not in (object, Any, int, float)):
            text = annotation_text(bare)
        return text + " | None" * bool(nullable)
    if annotation in (None, type(None)):
        return "None"
    name = getattr(origin or annotation, "__name__", None) or re.sub(r"(\w+\.)+(?=\w)", "", str(annotation))
    return f"{name}[{', '.join(words)}]" if words else str(name)


def codec_for(annotation: Any, exact: pa.DataType | None = None, *, whole: bool = False) -> Codec:
    """Return the codec of a resolved annotation; `TypeError` says what would work where there is none.

    *exact*: the Arrow type that is named around it. *whole*, for parameters and results: a dataclass travels as the
    bytes of an IPC stream of its own; inside other values it is a struct.
    """
    bare, named, nullable = unwrapped(annotation)
    exact = named if exact is None else exact
    cls = get_origin(bare) or bare
    arguments = get_args(bare)
    loose = cls in (object, Any) or (cls in (list, dict) and not arguments)
    if exact is not None and (loose or (cls is dict and pa.types.is_struct(exact))):
        codec = Codec(object, exact, type_text(exact))
        if pa.types.is_map(exact):
            codec = codec._replace(write=lambda it: list(_expect(it, Mapping, "dict").items()), read=_dict)
    elif cls in (list, set, frozenset, dict) and arguments:
        codec = _container_codec(bare, cls, exact)
    elif cls in _SCALARS and (exact is not None or cls is not decimal.Decimal):
        codec = _scalar_codec(bare, cls, exact)
    elif cls is Literal or isinstance(cls, type):
        codec = _class_codec(bare, cls, exact, whole)
        nullable = nullable or None in arguments
    else:
        raise _no_mapping(bare)
    if nullable:
        codec = codec._replace(nullable=True, plain=codec.plain and codec.plain | {type(None)})
    return codec._replace(annotation=annotation)


def _scalar_codec(annotation: Any, cls: Any, exact: pa.DataType | None) -> Codec:
    example: Any = _SCALARS[cls]
    exact = pa.scalar(example).type if exact is None else exact
    zoned = getattr(exact, "tz", None) is not None
    natural = None
    if pa.types.is_fixed_size_binary(exact):
        example = bytes(exact.byte_width)
    if cls is datetime.datetime and zoned:
        example = example.astimezone(datetime.timezone.utc)
        natural = pa.timestamp("us", exact.tz)
    codec = Codec(cls, exact, type_text(exact))
    try:
        held = codec._held(example)
    except Mismatch:
        raise TypeError(f"{annotation_text(annotation)} does not go into {codec.expected}") from None
    if type(held) is not cls:  # another number, or a moment of pandas: equal after the way back, too
        return codec._replace(read=codec_for(cls, natural).decode)
    if re.match(r"time(stamp|64)\[us", str(exact)):
        return codec._replace(zoned=zoned)
    return codec if re.search(_NARROW, str(exact)) else codec._replace(plain=frozenset({cls}))


def _container_codec(annotation: Any, cls: Any, exact: pa.DataType | None) -> Codec:
    """list (which takes a tuple too), set, frozenset, and dict over a map."""
    inner: list[Any] = [None, None]
    if exact is not None:
        if not hasattr(exact, "key_type" if cls is dict else "value_type"):
            raise TypeError(f"{annotation_text(annotation)} does not go into {type_text(exact)}")
        inner = [exact.key_type, exact.item_type] if cls is dict else [exact.value_type]
    members = list(map(codec_for, get_args(annotation), inner))
    expected = f"{cls.__name__} of {' to '.join(member.expected for member in members)}"
    if cls is dict:
        if members[0].nullable:
            raise TypeError(f"{expected}: in Arrow a key is never None; use dict[K, V]")
        exact = exact or pa.map_(members[0].arrow_type, members[1].arrow_type)
        parts = dict(zip(("key", "value"), members))
        return Codec(
            dict, exact, expected, lambda it: list(_expect(it, Mapping, expected).items()), _dict, parts
        )
    exact = exact or pa.list_(pa.field("item", members[0].arrow_type))
    accepted = (list, tuple) if cls is list else (set, frozenset)
    write = partial(_expect, accepted=accepted, expected=expected)
    return Codec(list, exact, expected, write, cls, {"item": members[0]})


def _dict(pairs: list[Any]) -> dict[Any, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise Mismatch("keys that differ", f"{len(pairs)} entries with {len(unique)} keys")
    return unique


def _inner_reader(data: Buffer, checks: IpcValidation = IpcValidation.FULL, known: Any = ()) -> IpcReader:
    """Return a reader of bytes inside a value: compressed, they must not evade limits on what is around."""
    return IpcReader(ByteSource(data), IpcLimits(max(1 << 24, 16 * len(data))), checks, expected=known)


def _batch_from_bytes(data: bytes) -> pa.RecordBatch:
    reader = _inner_reader(data or stream_bytes(EMPTY, ()))  # no bytes are an empty batch
    item = reader.next()
    return item[0] if item else reader.wire.empty


_IN_BYTES: dict[Any, tuple[Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    pa.RecordBatch: (lambda it: stream_bytes(WireSchema(it.schema), [(it, None)]), _batch_from_bytes),
    pa.Schema: (lambda it: bytes(it.serialize()), lambda data: _inner_reader(data or EMPTY.message).schema),
    uuid.UUID: (operator.attrgetter("bytes"), lambda data: uuid.UUID(bytes=data)),
}


def _class_codec(annotation: Any, cls: Any, exact: pa.DataType | None, whole: bool) -> Codec:
    """Literal, Enum, dataclass, and what travels as bytes: record batch, schema, UUID, dataclass as parameter."""
    if cls is Literal or issubclass(cls, enum.Enum):
        return _named_codec(annotation, cls, exact)
    if issubclass(cls, ArrowSerializableDataclass) or dataclasses.is_dataclass(cls):
        # Box[int] cannot be hashed where it holds Annotated[int, {...}].
        inner = dataclass_codec(cls) if annotation is cls else DataclassCodec(annotation)
        if exact == inner.arrow_type or (exact is None and not whole):
            codec = Codec(Mapping, inner.arrow_type, inner.name, inner.to_dict, inner.build, inner.row.parts)
        else:
            codec = _bytes_codec(annotation, cls, exact, inner.to_bytes, inner.from_bytes)
        return codec._replace(dataclass=inner)
    if cls not in _IN_BYTES:
        raise _no_mapping(annotation)
    if cls is uuid.UUID and exact is None:
        exact = pa.binary(16)
    return _bytes_codec(annotation, cls, exact, *_IN_BYTES[cls])


def _named_codec(annotation: Any, cls: Any, exact: pa.DataType | None) -> Codec:
    """A Literal or an Enum, for whose members their texts, ints or names travel."""
    expected = annotation_text(annotation)
    encoded_type: type = str
    if cls is Literal:
        members = {member: member for member in get_args(annotation) if member is not None}
        classes = set(map(type, get_args(annotation))) - {type(None)}
        if classes not in ({str}, {int}):
            raise TypeError(f"{expected}: Literal takes texts or ints, all of one kind; or use an Enum")
        encoded_type = classes.pop()
        expected = " or ".join(map(repr, members))
    else:
        if issubclass(cls, enum.Flag):
            raise TypeError(f"{expected}: a Flag is not an Enum of single members; use int")
        members = cls.__members__
        exact = pa.dictionary(pa.int16(), pa.utf8()) if exact is None else exact
        expected = f"{expected} ({', '.join(list(members)[:8])}{', …' * (len(members) > 8)})"
    base = _scalar_codec(annotation, encoded_type, exact)

    def encode(value: Any) -> Any:
        # .name may be another thing of an Enum's own.
        return decode(base.encode(value)) if cls is Literal else _expect(value, cls, expected)._name_

    def decode(encoded: Any) -> Any:
        if type(encoded) is not encoded_type:  # True is no 1
            raise Mismatch(expected, got(encoded))
        if encoded not in members:
            raise Mismatch(expected, f"{encoded!r:.60}{suggest(str(encoded), map(str, members))}")
        return members[encoded]

    return Codec(None, base.arrow_type, expected, encode, decode)


def _bytes_codec(annotation: Any, cls: type, exact: pa.DataType | None, write: Any, read: Any) -> Codec:
    """What *write* makes bytes of, and *read* reads from them."""
    expected = annotation_text(annotation)

    def decode(encoded: Any) -> Any:
        try:
            return read(_expect(encoded, bytes, expected))
        except (IPCError, RequestTooLargeError) as exc:
            raise Mismatch("an Arrow IPC stream", text_of(exc)) from None

    arrow_type = _scalar_codec(annotation, bytes, exact).arrow_type
    return Codec(None, arrow_type, expected, lambda value: write(_expect(value, cls, expected)), decode)


_INSTEAD = {  # what would work, by the names of types that have no mapping
    "list Sequence Collection deque": "list[T], for example list[int]",
    "set frozenset Set": "set[T]",
    "dict Mapping defaultdict OrderedDict": "dict[K, V], for example dict[str, float]",
    "tuple": "list[T], or a dataclass",
    "Iterable Iterator Generator AsyncIterator AsyncGenerator": "list[T], or a method that returns a Stream",
    "Table DataFrame RecordBatchReader": "pa.RecordBatch, or a stream of batches",
    "ndarray": "list[float], or pa.RecordBatch",
    "bytearray memoryview": "bytes",
    "Path": "str",
    "complex": "a dataclass of two floats",
    "Decimal": "Annotated[Decimal, ArrowType(pa.decimal128(20, 4))], which names its digits",
    "object Any": "Annotated[object, ArrowType(...)]",
    "Union UnionType": "one type, T | None, or a dataclass with optional fields",
    "TypeVar": "a class that says what it stands for, as Box[int] does for the T of Box[T]",
}


def _no_mapping(annotation: Any) -> TypeError:
    """Say what would work in place of an annotation: by its name, by what it nearly is, or all there is."""
    cls = get_origin(annotation) or annotation
    names = {getattr(cls, "__name__", str(cls)), type(annotation).__name__}
    bases = [base.__name__ for base in getattr(cls, "__mro__", ()) if base in _SCALARS]
    instead = "str, bytes, int, float, bool, date, time, datetime, timedelta, UUID, Literal, Enum, list, dict"
    instead = f"{instead}, set, a dataclass, or Annotated[T, ArrowType(...)]"
    if bases:
        instead = f"{bases[0]}, or NewType({cls.__name__!r}, {bases[0]})"
    elif getattr(cls, "__annotations__", None):
        instead = f"@dataclass before class {cls.__name__}"
    instead = next((text for words, text in _INSTEAD.items() if names & set(words.split())), instead)
    return TypeError(f"no Arrow type for {annotation_text(annotation)}; use {instead}")


def _only_value(column: pa.Array) -> Any:
    """Return the value of a column of one row. Where nothing validated it, an index may lead out of its dictionary."""
    if pa.types.is_nested(column.type) or pa.types.is_dictionary(column.type):
        column.validate(full=True)
    return column.to_pylist()[0]


class RowCodec:
    """Codecs of one row of `schema`, as parameters, results and dataclasses travel; paths begin with ``.name``."""

    def __init__(self, fields: Iterable[tuple[str, Codec]]) -> None:
        self.parts = dict(fields)
        self.names = tuple(self.parts)
        self._plain = [part.plain for part in self.parts.values()]
        self._kinds = [_FLAT.get(str(part.arrow_type), (object, ""))[0] for part in self.parts.values()]
        # Whether a row that a template has read is what `decode` would return: all of its columns are plain.
        self.is_flat = all(map(frozenset.__contains__, self._plain, self._kinds))
        # Where a template looks at each item of a list of plain values, this need not: it took a tenth of a turn.
        self._strict = [part.strict_list() for part in self.parts.values()]
        lists: list[list[type]] = [[list] * (strict is not None) for strict in self._strict]
        self._seen = [*map(frozenset.union, self._plain, lists)]
        members = [pa.field(name, part.arrow_type, part.nullable) for name, part in self.parts.items()]
        self.schema = pa.schema(members)

    # Of its streams; the template writes and reads them without pyarrow, where its types are plain.
    wire = cached_property(lambda self: WireSchema(self.schema))

    @cached_property
    def template(self) -> RowTemplate | None:
        pairs = zip(self._strict, self.schema)
        columns = [pa.field("", strict or member.type, member.nullable) for strict, member in pairs]
        return row_template(self.schema, strict=columns)

    def is_plain(self, values: Iterable[Any]) -> bool:
        """Whether `encode` would return *values*: those of most small calls, which need no longer way."""
        return self.is_flat and [*map(type, values)] == self._kinds

    def encode(self, values: Iterable[Any]) -> list[Any]:
        """Return one encoded value for each name, which row templates and `to_batch` take."""
        return self._converted([*values], Codec.encode, self._plain)

    def decode(self, encoded: Iterable[Any]) -> list[Any]:
        """Return the Python values of one encoded row."""
        return self._converted([*encoded], Codec.decode, self._plain)

    def _converted(
        self, values: list[Any], convert: Callable[..., Any], plain: list[frozenset[type]]
    ) -> list[Any]:
        if not all(map(frozenset.__contains__, plain, map(type, values))):
            values = [*values]
            for at, known, (name, part) in zip(range(len(values)), plain, self.parts.items()):
                if type(values[at]) not in known:
                    values[at] = with_field(name, partial(convert, part), values[at])
        return values

    def to_batch(self, encoded: Iterable[Any]) -> pa.RecordBatch:
        """Return the batch of one encoded row; integers out of range and lone surrogates are found here."""
        rows = zip(self.parts.items(), encoded)
        arrays = [with_field(name, part.to_array, value) for (name, part), value in rows]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def to_bytes(self, values: Iterable[Any]) -> bytes:
        """Return the stream of one row."""
        values = [*values]
        if self.template is not None:
            with suppress(ValueError, Mismatch):  # a value that is not plain, or does not fit
                return self.template.write(self._converted(values, Codec.encode, self._seen))
        return stream_bytes(self.wire, [(self.to_batch(self.encode(values)), None)])

    def from_template(self, data: bytes) -> list[Any] | None:
        """Return the Python values of the stream of one row; ``None`` where the template does not read it."""
        row = None if self.template is None else self.template.read(data)
        return None if row is None else self._converted(row[0], Codec.decode, self._seen)

    def from_batch(self, batch: pa.RecordBatch) -> list[Any]:
        """Return the Python values of a batch of one row, column by column."""
        values = self.decode(map(with_field, self.names, itertools.repeat(_only_value), batch.columns))
        if batch.schema.types == self.schema.types:
            return values
        return self.from_batch(self.to_batch(self.encode(values)))  # what could have been sent from Python


def _field_annotations(annotation: Any) -> dict[str, Any]:
    """Return the resolved annotations of a dataclass and its bases, with types in place of type variables."""
    cls = get_origin(annotation) or annotation
    hints: dict[str, Any] = {}
    for base in reversed(vars(cls).get("__orig_bases__", cls.__bases__)):
        hints.update(_field_annotations(base))
    own = inspect.get_annotations(cls)
    if own:
        hints.update({name: hint for name, hint in hints_of(cls).items() if name in own})
    variables = dict(zip(getattr(cls, "__parameters__", ()), get_args(annotation)))
    for name, hint in hints.items():
        parameters = getattr(hint, "__parameters__", ())
        if isinstance(hint, TypeVar):
            hints[name] = variables.get(hint, hint)
        elif parameters and get_origin(hint) is not None:
            hints[name] = hint[tuple(variables.get(one, one) for one in parameters)]
    return hints


class DataclassCodec:
    """A dataclass, or ``Box[int]``, as a row and as a struct in other rows; no bytes, and no row, mean all defaults.

    `TypeError` where a field has no Arrow type, and where the fields that travel do not build an instance.
    """

    _building: ClassVar[list[tuple[int, Any]]] = []  # in which threads which classes' codecs are being made

    def __init__(self, annotation: Any) -> None:
        self.cls = get_origin(annotation) or annotation
        self.name = annotation_text(annotation)
        hints = _field_annotations(annotation)
        own = getattr(self.cls, "__dataclass_fields__", {}) and dataclasses.fields(self.cls)
        marks = {f.name: map(type, getattr(hints[f.name], "__metadata__", ())) for f in own}
        fields = [f for f in own if Transient not in marks[f.name]]
        self._check_decorated(hints)
        try:
            inspect.signature(self.cls).bind(**{f.name: None for f in fields if f.init})
        except TypeError as exc:
            needed = "what does not travel (Transient, InitVar) needs a default to be read back to"
            raise TypeError(f"{self.name}: {needed}: {exc}") from None
        codecs = self._codecs(annotation, {f.name: hints[f.name] for f in fields})
        self.row = RowCodec(codecs.items())
        self.arrow_type = pa.struct(list(self.row.schema))
        factories = [f for f in own if f not in fields and f.default_factory is not dataclasses.MISSING]
        hooks = ("__post_init__", "__setattr__", "__new__")
        own_hooks = [n for n in hooks if getattr(self.cls, n, None) is not getattr(object, n, None)]
        bases = [vars(base) for base in self.cls.__mro__ if base is not ArrowSerializableDataclass]
        serializers = ("serialize_to_bytes", "deserialize_from_bytes")
        own_hooks += [n for n in serializers if any(n in base for base in bases)]
        self.is_read_back = not (factories or own_hooks) and all(map(Codec.is_read_back, codecs.values()))
        self._all_names = {f.name for f in own}
        self._required = [f.name for f in fields if f.init and f.default is f.default_factory]  # both MISSING
        self._late = [f.name for f in fields if not f.init]  # set behind the constructor
        self.defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
        empty = [f for f in fields if f.default_factory in (list, dict, set)]
        self.defaults |= {f.name: cast("Any", f.default_factory)() for f in empty}

    def _check_decorated(self, hints: Mapping[str, Any]) -> None:
        """Refuse a class with annotations, or a base with an ``__init__``, that @dataclass did not see."""
        lost = [n for n in inspect.get_annotations(self.cls) if "typing.ClassVar" not in str(hints[n])]
        owner = next(base for base in self.cls.__mro__ if "__init__" in vars(base))
        for cls, parts in ((self.cls, lost), (owner, ["an __init__ of its own"] * (owner is not object))):
            if parts and "__dataclass_fields__" not in vars(cls):
                text = f"{cls.__qualname__} has {', '.join(parts)}"
                raise TypeError(f"{text}, but is not decorated with @dataclass")

    def _codecs(self, annotation: Any, hints: Mapping[str, Any]) -> dict[str, Codec]:
        """Return the codecs of fields; `TypeError` names the one without, or a class inside itself."""
        mark = (threading.get_ident(), annotation)
        if mark in self._building:
            raise TypeError(f"{self.name} contains itself; an Arrow struct has a fixed depth")
        self._building.append(mark)
        codecs = {}
        try:
            for name, hint in hints.items():
                codecs[name] = codec_for(hint)
            return codecs
        except TypeError as exc:
            raise TypeError(f"{self.cls.__qualname__}.{name}: {exc}") from None
        finally:
            self._building.remove(mark)

    def to_dict(self, instance: Any) -> dict[str, Any]:
        """Return the values of the fields that travel; refuses an instance that holds more than they tell."""
        if type(instance) is not self.cls or not self._all_names:
            # A subclass with the same fields is taken, and read as this class.
            held: Any = getattr(_expect(instance, self.cls, self.name), "__dict__", ())
            if dataclasses.is_dataclass(instance):
                held = [f.name for f in dataclasses.fields(instance)]
            more = sorted(set(held) - self._all_names)
            if more:
                raise Mismatch(self.name, f"{got(instance)}, which has more fields ({', '.join(more)})")
        return dict(zip(self.row.names, map(getattr, itertools.repeat(instance), self.row.names)))

    def to_bytes(self, instance: Any) -> bytes:
        """Encode as an IPC stream of 1 row x len(names) columns."""
        return self.row.to_bytes(self.to_dict(instance).values())

    def from_bytes(self, data: Buffer, validation: IpcValidation = IpcValidation.FULL) -> Any:
        """Decode an IPC stream of one row, or of none; raises `IPCError` when it is no such stream."""
        data = bytes(data)
        row = self.row
        if (values := row.from_template(data)) is not None:
            return self.build(dict(zip(row.names, values)))
        # Another schema is fine, too: of a newer or an older version of the class.
        known = [row.wire] * data.startswith(row.wire.message)
        item = data and _inner_reader(data, validation, known).next()
        return self.from_batch(item[0]) if item else self.build({})

    def from_batch(self, batch: pa.RecordBatch) -> Any:
        """Decode a batch of one row, or of none."""
        if batch.num_rows > 1:
            raise Mismatch(f"{self.name} (one row)", f"{batch.num_rows} rows")
        row = self.row
        there = [part for part in row.parts.items() if part[0] in batch.schema.names]
        if len(there) < len(row.names) or not batch.num_rows:
            row = RowCodec(there * batch.num_rows)
        return self.build(dict(zip(row.names, row.from_batch(batch.select(row.names)))))

    def build(self, values: dict[str, Any]) -> Any:
        """Make an instance of the decoded values that there are."""
        for name in itertools.filterfalse(values.__contains__, self._required):
            raise Mismatch("a value", "no such field, and it has no default").under(f".{name}")
        late = {name: values.pop(name) for name in self._late if name in values}
        instance = self.cls(**values)
        for name, value in late.items():
            object.__setattr__(instance, name, value)  # also where the class is frozen
        return instance


dataclass_codec: Callable[[Any], DataclassCodec] = cache(DataclassCodec)


class _SchemaDescriptor:
    """``ARROW_SCHEMA`` of a dataclass: made at first use, as annotations may name classes defined later."""

    def __get__(self, instance: object, owner: type) -> pa.Schema:
        return dataclass_codec(owner).row.schema


class ArrowSerializableDataclass:
    """Base of dataclasses that travel: parameters, results, headers and stream states.

    A subclass is decorated with ``@dataclass`` (frozen or not); README's table has the types of fields. Reading goes
    by field name: unknown columns are ignored, absent ones take the field's default. An absent field without one, and
    a value that is not of its field's type, are a `TypeError` with the path.
    """

    ARROW_SCHEMA: ClassVar[Any] = _SchemaDescriptor()  # one column per field

    def serialize_to_bytes(self) -> bytes:
        """Return an Arrow IPC stream of 1 row x len(fields) columns."""
        return located(type(self).__name__, dataclass_codec(type(self)).to_bytes, self)

    def serialize(self, dest: typing.BinaryIO) -> None:
        """Write `serialize_to_bytes` to *dest*, which stays open."""
        dest.write(self.serialize_to_bytes())

    @classmethod
    def deserialize_from_bytes(
        cls: type[T], data: bytes, ipc_validation: IpcValidation = IpcValidation.FULL
    ) -> T:
        """Read what `serialize_to_bytes` wrote; `IPCError` when it is no Arrow IPC stream."""
        read = partial(dataclass_codec(cls).from_bytes, validation=ipc_validation)
        return cast("T", located(cls.__name__, read, data))

    @classmethod
    def deserialize_from_batch(cls: type[T], batch: pa.RecordBatch) -> T:
        """Read the one row of *batch* (1 x any columns); raises as above."""
        return cast("T", located(cls.__name__, dataclass_codec(cls).from_batch, batch))


# ====================
# 7. STREAM STATE ... uses 1-6
# What the author of a method holds in hand: the context of a call, the collector of one turn, the state that
# lives on between turns. Law: nothing here knows a transport; what is known of a call is in its CallContext.


class TransportKind(str, enum.Enum):
    """How a call came in."""

    PIPE = "pipe"
    UNIX = "unix"
    TCP = "tcp"
    HTTP = "http"

    __str__ = str.__str__


class ServeStartHook(Protocol):
    """An implementation with this method hears, once per kind of transport, that serving begins."""

    def on_serve_start(self, kind: TransportKind) -> None:
        """Prepare for the first request; an exception refuses it, and the next request asks again."""


@dataclass(frozen=True)
class AuthContext:
    """Who is calling."""

    domain: str | None  # the scheme or issuer that vouches, None for nobody
    authenticated: bool  # whether anybody vouches
    principal: str | None = None  # name of the caller within the domain
    claims: Mapping[str, Any] = field(default_factory=dict)  # further facts, as the authenticator found them

    @classmethod
    def anonymous(cls) -> AuthContext:
        """Return the caller of whom nothing is known."""
        return ANONYMOUS

    def require_authenticated(self) -> None:
        """Raise `StatusError` (UNAUTHENTICATED) unless somebody vouches for the caller."""
        if not self.authenticated:
            raise StatusError("authentication required", code=Code.UNAUTHENTICATED)


ANONYMOUS = AuthContext(None, False)
ClientLog = Callable[[Message], None]  # takes the log lines that methods send to their callers
current_auth_var = contextvars.ContextVar("vgi_rpc_auth", default=ANONYMOUS)


def current_auth() -> AuthContext:
    """Return who calls the method that runs now; anonymous outside of one."""
    return current_auth_var.get()


@dataclass(eq=False, repr=False)
class CallContext:
    """What a method may ask about its call, by a parameter ``ctx: CallContext``. For the method's thread."""

    auth: AuthContext  # who calls
    emit_client_log: ClientLog  # sends a Message to the client's on_log
    # What the transport tells of the caller: remote_addr, traceparent, tracestate.
    transport_metadata: Mapping[str, Any] = field(default_factory=dict)
    _: dataclasses.KW_ONLY
    server_id: str = ""  # 12 hex characters, one per server
    method_name: str = ""
    protocol_name: str = ""
    kind: TransportKind | None = None  # transport of the call
    implementation: Any = None  # the object that serves the protocol
    request_id: str = ""  # in the client's errors and in the access log
    deadline: float | None = None  # when the client stops waiting, by time.monotonic(); None for never
    response_limit_bytes: int | None = None  # what both sides accept as one answer over HTTP; None: any size
    gone: Callable[[], bool] | None = None  # tells whether the client has left; None where nobody can know

    def client_log(self, level: Level, message: str, **extra: str) -> None:
        """Send a log line to the client; it arrives before the answer of this turn."""
        self.emit_client_log(Message(level, message, **extra))

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more: the deadline has passed or the client has gone."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return late or (self.gone is not None and self.gone())

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """The server's logger ``vgi_rpc.method``, with request id, protocol and method in ``extra``."""
        extra = {"request_id": self.request_id, "protocol": self.protocol_name, "method": self.method_name}
        return logging.LoggerAdapter(logging.getLogger("vgi_rpc.method"), extra)


@dataclass
class CallStatistics:
    """Batches, rows and bytes of one call. Bytes are those of the batches' buffers, not of the wire."""

    input_batches: int = 0
    output_batches: int = 0
    input_rows: int = 0
    output_rows: int = 0
    input_bytes: int = 0
    output_bytes: int = 0

    def record(self, way: str, batch: pa.RecordBatch) -> None:
        """Count a batch; *way* is ``input`` or ``output``."""
        for unit, count in (("batches", 1), ("rows", batch.num_rows), ("bytes", batch.nbytes)):
            setattr(self, f"{way}_{unit}", getattr(self, f"{way}_{unit}") + count)


class OutputCollector:
    """Collects what one turn of a stream sends: log lines and exactly one data batch. For one thread.

    A producer may `finish`; an exchange, with ``producer_mode=False``, is ended by the client.
    """

    def __init__(self, output_schema: pa.Schema | WireSchema, *, producer_mode: bool = True) -> None:
        if isinstance(output_schema, pa.Schema):
            output_schema = WireSchema(output_schema)
        self.output_schema = output_schema.schema
        self.item: Item | None = None  # what the turn sends after its log lines
        self.finished = False  # whether `finish` was called in this turn
        self.messages: list[Message] = []  # the log lines, in order
        self.emit_client_log_message = self.messages.append  # takes what is a `Message` already
        self._wire = output_schema
        self._producer_mode = producer_mode
        self.template: RowTemplate | None = None  # the server's: it writes a batch of one row without pyarrow

    @property
    def data_batch(self) -> AnnotatedBatch | None:
        """The data batch of this turn, once it was emitted."""
        if self.item is None:
            return None
        own = None if isinstance(self.item, bytes) else self.item[1]
        return AnnotatedBatch(batch_of(self.item, self._wire), own and pa.KeyValueMetadata(own))

    def emit(self, batch: pa.RecordBatch | pa.Table, metadata: Mapping[str, str] | None = None) -> None:
        """Send *batch*, any rows x the columns of the output schema; a table is sent as one batch.

        Arrow data is not copied: a batch over a buffer that is written to later changes until it is sent.
        Raises `RuntimeError` when a batch was sent in this turn already or the stream is finished, `TypeError`
        for another schema and for a null where none is allowed.
        """
        if self.finished:
            raise RuntimeError("emit after finish(): a finished stream sends nothing more")
        if self.item is not None:
            raise RuntimeError("emit called twice in one turn: a turn sends exactly one data batch")
        self.item = None if metadata else self._wire.plain_message(batch)
        if self.item is not None:
            return
        batch = conform_batch(batch, self._wire, "emit", cast_values=False)
        own = dict(pa.KeyValueMetadata(dict(metadata))) if metadata else None
        if own and (CALL_STATE_KEY in own or batch_role(0, own) != "data"):
            raise ParameterError(f"emit: metadata {list(own)}: with keys of our own no client would see data")
        self.item = (batch, own)

    def emit_arrays(self, arrays: Sequence[pa.Array], metadata: Mapping[str, str] | None = None) -> None:
        """Send columns, in the order of the output schema; raises as `emit`."""
        columns = dict(zip([*self._wire.names, "one too many"], arrays))
        self.emit(batch_from_pydict(columns, self.output_schema, "emit_arrays"), metadata)

    def emit_pydict(self, data: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
        """Send ``{column: values}``; raises as `emit`. The values are copied."""
        # The short way: lists of one value each, in order, which a template takes. All else is pyarrow's to judge.
        is_plain = [*data] == self._wire.names and {*map(type, data.values())} == {list}
        if is_plain and self.template and not (self.item or self.finished or metadata):
            try:
                self.item = self.template.message([value for [value] in data.values()])
                return
            except ValueError:
                pass
        own = dict(data)
        for name, column in data.items():  # pyarrow would wrap numpy's and pandas', which may change later
            if hasattr(column, "__array__") and not isinstance(column, (pa.Array, pa.ChunkedArray)):
                own[name] = copy.copy(column)
        self.emit(batch_from_pydict(own, self.output_schema, "emit_pydict"), metadata)

    def finish(self) -> None:
        """End a producer's stream behind this turn's batch, if it has one; `RuntimeError` in an exchange."""
        if not self._producer_mode:
            raise RuntimeError("finish() in an exchange: the client ends an exchange, by closing it")
        self.finished = True

    def client_log(self, level: Level, message: str, **extra: str) -> None:
        """Send a log line to the client's ``on_log``, before this turn's data."""
        self.messages.append(Message(level, message, **extra))

    def validate(self) -> None:
        """Raise `RuntimeError` when the turn broke the rule of one data batch."""
        if self.item is None and not self.finished:
            may_finish = " or call finish()" * self._producer_mode
            raise RuntimeError(f"nothing emitted: each turn must emit exactly one data batch{may_finish}")


class StreamState(ArrowSerializableDataclass):
    """What a stream remembers between turns: a dataclass, kept in a token over HTTP, in memory elsewhere."""

    # The dataclass of the part that never changes (Stream(call_state=...)): sent once, in a token of its own.
    CALL_STATE_TYPE: ClassVar[type[ArrowSerializableDataclass] | None] = None

    def process(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        """Serve one turn: read *input* (0 rows x 0 columns for a producer), then emit one batch or finish."""
        raise TypeError(f"{type(self).__name__} has no process(), and is no ProducerState or ExchangeState")

    def on_cancel(self, ctx: CallContext) -> None:
        """Clean up: called once when the client cancels. A failure is swallowed."""

    def rehydrate(self, implementation: Any) -> None:
        """Find connections and caches again: called on a state that was read back from a token."""

    def bind_call_state(self, call_state: Any) -> None:
        """Keep the stream's call state: called before the first turn and after each reading back."""


class ProducerState(StreamState):
    """State of a stream that the server pushes: override `produce`."""

    def process(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        self.produce(out, ctx)

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        """Emit one batch, or call ``out.finish()``, or both."""
        raise TypeError(f"{type(self).__name__} defines no produce()")


class ExchangeState(StreamState):
    """State of a stream in which each input batch is answered by one batch: override `exchange`."""

    def process(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        self.exchange(input, out, ctx)

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        """Answer *input*, which has the stream's input schema, with exactly one batch."""
        raise TypeError(f"{type(self).__name__} defines no exchange()")


_NO_INPUT = pa.schema([])  # tells an input schema that was not given from one that is empty on purpose
_S = TypeVar("_S", bound=StreamState)
if typing.TYPE_CHECKING:
    _H = TypeVar("_H", default=None)  # Python takes a default from 3.13 on, type checkers always
    _ClientSide: TypeAlias = "StreamSession"
else:
    _H = TypeVar("_H")
    _ClientSide = object


@dataclass(eq=False, repr=False)
class Stream(Generic[_S, _H], _ClientSide):
    """What a streaming method returns: ``Stream[State]`` or ``Stream[State, Header]``.

    A client gets a `StreamSession` in its place, so type checkers, which read the method's annotation, see its
    methods here as well. On the server's side there are none.
    """

    output_schema: pa.Schema  # of every batch that is sent
    state: _S  # whose process() serves each turn
    input_schema: pa.Schema = _NO_INPUT  # of the client's batches; a producer has none
    header: _H | None = None  # sent once, before the data, when the method declares one
    call_state: Any = None  # the part of the state that never changes, see StreamState

    def __post_init__(self) -> None:
        name = type(self.state).__name__
        if isinstance(self.state, ExchangeState) and self.input_schema is _NO_INPUT:
            raise TypeError(f"Stream: input_schema is missing, which the exchange of {name} needs")
        if isinstance(self.state, ProducerState) and len(self.input_schema):
            raise TypeError(f"Stream: input_schema is for an exchange, and {name} is a producer")

    @cached_property
    def is_producer(self) -> bool:
        """Whether turns run on ticks: nothing comes in, and the state is not an exchange's."""
        return not len(self.input_schema) and not isinstance(self.state, ExchangeState)

    if not typing.TYPE_CHECKING:

        def __class_getitem__(cls, parts):
            return super().__class_getitem__(parts if isinstance(parts, tuple) else (parts, None))


# ====================
# 8. METHODS ... uses 1-7
# A Protocol class read once: every method with its schemas and codecs, and an implementation checked against
# it. Law: whatever is wrong with a service is said when its server is made, all of it in one error.


REQUEST_ID_BYTES = 16  # hex characters of the ids that we make
STREAM_KINDS: dict[bool | None, str] = {True: "exchange", False: "producer"}  # by `is_exchange`
TIMEOUT_DIGITS = 15  # of a time limit in milliseconds, with leading zeros: row templates want one length


class MethodType(enum.Enum):
    """Whether a method returns a value or a stream."""

    UNARY = "unary"
    STREAM = "stream"


@dataclass(eq=False, repr=False)
class RpcMethodInfo:
    """One method of a Protocol. `rpc_methods` makes it once for all that use the class: do not change it."""

    name: str
    protocol_name: str  # the protocol's routing name
    protocol_version: str  # MAJOR.MINOR.PATCH, empty when the protocol declares none
    method_type: MethodType
    params: RowCodec
    result: RowCodec  # one column "result"; none for "-> None" and for streams
    result_type: Any  # the return annotation
    header: DataclassCodec | None  # of the stream's header
    is_exchange: bool | None  # None where the annotation does not tell
    doc: str | None
    param_docs: dict[str, str] = field(default_factory=dict)  # the "Args:" of the docstring, by parameter
    param_defaults: dict[str, Any] = field(default_factory=dict)
    idempotency: str = "unknown"  # or "idempotent" or "no_side_effects"
    deprecation: str | None = None  # why the method should not be used any more
    described: Mapping[str, pa.Schema] | None = None  # what `described_schemas` has made

    params_schema = property(operator.attrgetter("params.schema"))  # of batches of one row
    result_schema = property(operator.attrgetter("result.schema"))
    has_return = property(lambda self: bool(self.result.names))
    header_type = property(lambda self: self.header and self.header.cls)  # the dataclass

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.signature()})"

    @property
    def param_types(self) -> dict[str, Any]:
        """Annotations by parameter."""
        return {name: codec.annotation for name, codec in self.params.parts.items()}

    @property
    def kind(self) -> str:
        """One word for people: ``unary``, ``producer``, ``exchange``; ``stream`` where nothing tells."""
        if self.method_type is MethodType.UNARY:
            return "unary"
        return STREAM_KINDS.get(self.is_exchange, "stream")

    def signature(self) -> str:
        """Return the Python signature without ``self``, as a person would write it."""
        defaults = {name: f" = {default_text(value)}" for name, value in self.param_defaults.items()}
        hints = self.param_types.items()
        parts = [f"{name}: {annotation_text(hint)}{defaults.get(name, '')}" for name, hint in hints]
        return f"{self.name}({', '.join(parts)}) -> {_result_text(self.result_type)}"

    @cached_property
    def request_metadata(self) -> dict[bytes, bytes]:
        """What the metadata of each request to this method begins with."""
        texts = {METHOD_KEY: self.name, PROTOCOL_KEY: self.protocol_name}
        texts[PROTOCOL_VERSION_KEY] = self.protocol_version
        metadata = {key: text.encode() for key, text in texts.items() if text}
        return {REQUEST_VERSION_KEY: REQUEST_VERSION, **metadata}

    @cached_property
    def request_templates(self) -> list[RowTemplate | None]:
        """What writes and reads requests without pyarrow: those without a time limit, and those with one."""
        untimed = {REQUEST_ID_KEY: REQUEST_ID_BYTES}
        both = (untimed, {**untimed, TIMEOUT_KEY: TIMEOUT_DIGITS})
        return [row_template(self.params.schema, self.request_metadata, varying) for varying in both]


def default_text(value: object) -> str:
    """Return a default as a person would write it: ``Unit.C``, ``datetime(2024, 1, 31, 0, 0)``."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value._name_}"  # .name may be another thing of its own
    text = "…"
    with suppress(Exception):  # a __repr__ may raise anything: that hides no service
        text = repr(value)
    text = re.sub(r"\bdatetime\.(?=[a-z]+\()|[\w.]+\.<locals>\.", "", text)
    return re.sub(r"<([\w.]+): [^<>]*>", r"\1", text)  # members of enums inside


def _result_text(annotation: Any) -> str:
    return annotation_text(annotation).replace(", None]", "]")  # a Stream that declares no header


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _marking(name: str, value: str) -> Callable[[_Function], _Function]:
    def mark(function: _Function) -> _Function:
        """Mark a Protocol's method, which reflection shows."""
        setattr(function, name, value)
        return function

    return mark


idempotent = _marking("__vgi_idempotency__", "idempotent")  # calling it twice is as calling it once
no_side_effects = _marking("__vgi_idempotency__", "no_side_effects")  # it changes nothing


def deprecated(message: str) -> Callable[[_Function], _Function]:
    """Mark a Protocol's method as one not to use any more; *message* says what to use instead."""
    return _marking("__vgi_deprecated__", message)


def parse_version(text: str) -> tuple[int, int] | None:
    """``MAJOR.MINOR.PATCH`` -> (major, minor); ``None`` for anything else."""
    match = re.fullmatch(r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})", text)
    return match and (int(match[1]), int(match[2]))


def _identity(protocol: Any) -> tuple[str, str]:
    """Return a class's routing name and version, as ``protocol_name`` and ``protocol_version`` say or by default."""
    name = vars(protocol).get("protocol_name", protocol.__name__)  # an inherited one names another
    if not isinstance(name, str) or not re.fullmatch(PROTOCOL_NAME_PATTERN, name):
        raise ValueError(f"protocol name {name!r}: expected letters, digits, '_' and '.', no digit first")
    version = getattr(protocol, "protocol_version", "") or ""
    if version and not (isinstance(version, str) and parse_version(version)):
        raise ValueError(f"{name}.protocol_version: expected MAJOR.MINOR.PATCH, got {version!r}")
    return name, version


@contextmanager
def _noting(mistakes: list[str], where: str) -> Iterator[None]:
    """Keep what a `TypeError` says, behind *where*, so that one error tells all that is wrong with a service."""
    try:
        yield
    except TypeError as exc:
        mistakes.append(f"{where}{exc}")


def _plain_function(function: Any) -> tuple[Any, inspect.Signature]:
    """Return what is inside of a bound method, lru_cache and the like, and its signature; `TypeError` if unfit."""

    def is_plain(each: Any) -> bool:
        return inspect.isfunction(each) or hasattr(each, "register")

    plain = inspect.unwrap(getattr(function, "__func__", function), stop=is_plain)
    name = getattr(plain, "__name__", type(plain).__name__)
    for code in (plain, plain.__call__):
        if inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code):
            raise TypeError(f"{name} is 'async def', but runs in a thread: use 'def' and asyncio.run()")
        if inspect.isgeneratorfunction(code):
            raise TypeError(f"{name} is a generator function: return a Stream, whose state emits")
    if hasattr(plain, "register"):
        raise TypeError(f"{name} dispatches on a positional argument, but is called with named ones")
    try:
        return plain, inspect.signature(function)
    except ValueError as exc:  # a function of C, or a method without parameters
        raise TypeError(f"{exc}; a method takes 'self', or is marked with @staticmethod") from None


def _is_context(name: str, annotation: Any) -> bool:
    """Whether a parameter takes the `CallContext`; *annotation* is ``None`` where there is none."""
    return (name == "ctx" and annotation is None) or unwrapped(annotation)[0] is CallContext


def _stream_parts(annotation: Any) -> tuple[list[Any], Any, bool | None]:
    """``Stream[S | T, H]`` -> ([S, T], H, whether they are exchanges); no states where it is no stream."""
    if annotation is Stream:
        return [StreamState], type(None), None
    if get_origin(annotation) is not Stream:
        return [], type(None), None
    state, header = get_args(annotation)
    states = [state]
    if get_origin(state) in _UNIONS:
        states = list(get_args(state))
    for base in (ExchangeState, ProducerState):
        if all(isinstance(cls, type) and issubclass(cls, base) for cls in states):
            return states, header, base is ExchangeState
    return states, header, None


def _read_method(protocol: type, name: str, where: str) -> RpcMethodInfo:
    """Return a method of a Protocol; one `TypeError` tells all that is wrong with it, each but the first at *where*."""
    declared = inspect.getattr_static(protocol, name)
    function: Any = declared
    if hasattr(declared, "__get__") and not isinstance(declared, partial):  # it will have one
        function = declared.__get__(object(), protocol)  # as an instance gives it
    plain, signature = _plain_function(function)
    if not inspect.isfunction(plain):
        raise TypeError(f"expected a function, got {got(plain)}")
    hints = hints_of(plain)
    mistakes: list[str] = []
    codecs = {}
    defaults = {}
    for param, parameter in signature.parameters.items():
        if _is_context(param, hints.get(param)):
            continue
        with _noting(mistakes, f"parameter {param!r}: "):
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise TypeError(f"expected a named parameter, got {parameter.kind.description}")
            if param not in hints:
                raise TypeError("no annotation, from which its Arrow type would come")
            codecs[param] = codec_for(hints[param], whole=True)
            if parameter.default is not parameter.empty:
                defaults[param] = parameter.default
                located("its default", codecs[param].encode, parameter.default)
    result = RowCodec(())
    header = None
    returned = hints.get("return")
    states, header_type, is_exchange = _stream_parts(returned)
    with _noting(mistakes, "result: "):
        if returned is None:
            raise TypeError("no return annotation; write '-> None' if it returns nothing")
        if states and header_type is not type(None):
            header = codec_for(header_type, whole=True).dataclass
            if header is None:
                raise TypeError(f"the header of a Stream is a dataclass, got {annotation_text(header_type)}")
        elif not states and returned is not type(None):
            result = RowCodec([("result", codec_for(returned, whole=True))])
    if mistakes:
        raise TypeError(f"\n  - {where}".join(mistakes))
    doc = inspect.getdoc(plain)
    # The "Args:" of a Google docstring.
    block = re.search(r"^ *Args:\n((?:(?: +\S.*)?(?:\n|$))+)", doc or "", re.M)
    docs = re.split(r"^ {2,8}(\w+)(?: *\([^)]*\))?:", block[1], flags=re.M)[1:] if block else []
    method_type = MethodType.STREAM if states else MethodType.UNARY
    params = RowCodec(codecs.items())
    names = (name, *_identity(protocol))
    info = RpcMethodInfo(*names, method_type, params, result, returned, header, is_exchange, doc)
    info.param_docs = {param: " ".join(text.split()) for param, text in zip(docs[::2], docs[1::2])}
    info.param_defaults = defaults
    marks = {**vars(plain), **vars(declared)}  # a staticmethod may be marked itself, or what is inside it
    info.idempotency = marks.get("__vgi_idempotency__", "unknown")
    info.deprecation = marks.get("__vgi_deprecated__")
    return info


@lru_cache(maxsize=256)
def read_protocol(protocol: type) -> tuple[Mapping[str, RpcMethodInfo], list[str]]:
    """Return the methods of a class that are right, by name, and what is wrong with the others."""
    foreign = ("builtins", "typing", "typing_extensions", "abc")
    bases = [base for base in reversed(protocol.__mro__) if base.__module__ not in foreign]
    methods = {}
    mistakes: list[str] = []
    for name in dict.fromkeys(name for base in bases for name in vars(base)):
        value = getattr(protocol, name, None)
        # Nested classes and annotations that are kept as attributes can be called, too.
        is_type = isinstance(value, type) or get_origin(value) or hasattr(value, "__supertype__")
        if callable(value) and not is_type and not name.startswith("_") and name != "on_serve_start":
            where = f"{protocol.__qualname__}.{name}(): "
            with _noting(mistakes, where):
                methods[name] = _read_method(protocol, name, where)
    return types.MappingProxyType(methods), mistakes


def rpc_methods(protocol: type) -> Mapping[str, RpcMethodInfo]:
    """Return the methods of a Protocol class, or of a plain class that serves as its own, by name.

    Raises one `TypeError` for all that is wrong with them, `ValueError` for a malformed name or version.
    """
    if not isinstance(protocol, type):
        raise TypeError(f"expected a Protocol class, got {got(protocol)}")
    methods, mistakes = read_protocol(protocol)
    if mistakes:
        raise TypeError("\n  - ".join([f"{protocol.__qualname__} cannot be served:", *mistakes]))
    return methods


def describe_rpc(protocol: type, *, methods: Mapping[str, RpcMethodInfo] | None = None) -> str:
    """Return a text for people: the protocol's methods with their signatures, schemas and docstrings."""
    methods = methods or rpc_methods(protocol)
    lines = [f"{_identity(protocol)[0]}: {len(methods)} methods"]
    for info in methods.values():
        lines += ["", f"  {info.signature()}    [{info.kind}]"]
        rows = {"parameters": info.params, "result": info.result, "header": info.header and info.header.row}
        lines += [f"    {what}: {schema_text(row.schema)}" for what, row in rows.items() if row and row.names]
        lines += [f"    {line}".rstrip() for line in (info.doc or "").splitlines()]
    return "\n".join(lines)


class HostedService:
    """One protocol on a server: made by `bind_implementation`."""

    def __init__(self, protocol: type, implementation: Any) -> None:
        self.name, self.version = _identity(protocol)  # routing name; MAJOR.MINOR.PATCH, empty for none
        self.protocol = protocol
        self.implementation = implementation
        self.methods: dict[str, BoundMethod] = {}  # by name
        self.hash = ""  # the family's protocol hash (hex SHA-256), filled in by the server


class BoundMethod(NamedTuple):
    """A method of a hosted protocol with the function that serves it."""

    info: RpcMethodInfo
    service: HostedService
    function: Callable[..., Any]
    context_parameter: str | None  # which parameter gets the CallContext
    state_types: tuple[type, ...]  # the concrete state classes that the implementation's annotation names
    is_exchange: bool | None  # as the Protocol says, else as the state classes do; None where neither tells


def bind_implementation(protocol: type, implementation: Any) -> HostedService:
    """Check *implementation* against *protocol* and bind its methods; raises as `rpc_methods`, for both together."""
    if not isinstance(protocol, type) or isinstance(implementation, (type, types.CoroutineType, type(None))):
        both = (protocol, implementation)
        received = [f"the class {x.__qualname__}" if isinstance(x, type) else f"a {got(x)}" for x in both]
        text = "expected a Protocol class and an instance that serves it, got"
        raise TypeError(f"{text} {' and '.join(received)}")
    service = HostedService(protocol, implementation)
    infos, of_protocol = read_protocol(protocol)
    mistakes = list(of_protocol)
    for name, info in infos.items():
        with _noting(mistakes, f"{name}(): "):
            service.methods[name] = _bind_method(info, service)
    if not infos and not mistakes:
        mistakes.append("there are no methods (a name with a leading '_' is not served)")
    if mistakes:
        what = f"{type(implementation).__qualname__} does not implement {service.name}:"
        if type(implementation) is protocol:
            what = f"{protocol.__qualname__} cannot be served:"
        raise TypeError("\n  - ".join([what, *mistakes]))
    return service


def _bind_method(info: RpcMethodInfo, service: HostedService) -> BoundMethod:
    """Bind the function that serves a method; one `TypeError` tells all in which the two disagree."""
    function: Any = getattr(service.implementation, info.name, None)
    if not callable(function):
        raise TypeError(f"expected a method, got {got(function)}")
    plain, signature = _plain_function(function)
    is_stream = info.method_type is MethodType.STREAM
    mistakes: list[str] = []
    hints: dict[str, Any] = {}
    # An implementation may annotate for its own eyes, but its states are found by its annotations alone.
    with _noting(mistakes if is_stream else [], ""):
        hints = hints_of(plain)
    called = dict.fromkeys(info.param_types)
    context = None
    for name in signature.parameters.keys() - called.keys():
        if name == "ctx" or _is_context(name, hints.get(name)):
            context = name
            called[name] = None
    with _noting(mistakes, f"called with {list(called)}: "):
        signature.bind(**called)
    returned = hints.get("return", info.result_type)
    states, _, is_exchange = _stream_parts(returned)
    if bool(states) != is_stream:
        expected = _result_text(info.result_type)
        mistakes.append(f"returns {_result_text(returned)}, the protocol says {expected}")
    for cls in states:  # it is written to a token, read back, and run
        with _noting(mistakes, f"returns a Stream of {annotation_text(cls)}: "):
            if not isinstance(cls, type) or not issubclass(cls, StreamState):
                raise TypeError("expected a StreamState")
            if issubclass(cls, {True: ProducerState, False: ExchangeState, None: ()}[info.is_exchange]):
                raise TypeError(f"the protocol says {info.kind}")
            for part in (cls, cls.CALL_STATE_TYPE or cls):
                if codec_for(part).dataclass is None:
                    raise TypeError(f"CALL_STATE_TYPE: expected a dataclass, got {annotation_text(part)}")
            for hook in ("process", "produce", "exchange", "on_cancel", "rehydrate", "bind_call_state"):
                _plain_function(getattr(cls, hook, cls.process))
    if mistakes:
        raise TypeError(f"\n  - {info.name}(): ".join(mistakes))
    if info.is_exchange is not None:
        is_exchange = info.is_exchange
    concrete = tuple(cls for cls in states if cls not in (StreamState, ProducerState, ExchangeState))
    return BoundMethod(info, service, function, context, concrete, is_exchange)


# ====================
# 9. REQUESTS AND RESULTS ... uses 1-8
# A call's arguments to a request stream and back, a result to its batch and back.
# Law: a request's schema equals the method's, name for name, type for type, before a single value is decoded.


def bind_arguments(info: RpcMethodInfo, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return one value per parameter, in order, with defaults; `ParameterError` where the call does not fit."""
    names = info.params.names
    if len(args) <= len(names) and tuple(kwargs) == names[len(args) :]:  # all of them, in order
        return [*args, *kwargs.values()]
    if len(args) > len(names):
        raise ParameterError(f"{info.name}() takes {len(names)} arguments {list(names)}, got {len(args)}")
    for name in kwargs:
        if name in names[: len(args)]:
            raise ParameterError(f"{info.name}() got {name!r} twice, by position and by name")
        if name not in names:
            near = suggest(name, names)
            raise ParameterError(f"{info.name}() has no parameter {name!r}{near}; it has {list(names)}")
    values = {**info.param_defaults, **dict(zip(names, args)), **kwargs}
    try:
        return [values[name] for name in names]
    except KeyError as exc:
        raise ParameterError(f"{info.name}() is missing argument {exc}; it is {info.signature()}") from None


def encode_arguments(info: RpcMethodInfo, values: list[Any]) -> list[Any]:
    """Encode the values of `bind_arguments`; a `ParameterError` gives the path to what does not fit."""
    if info.params.is_plain(values):
        return values
    return located(f"{info.name}() argument ", info.params.encode, values)


def decode_arguments(info: RpcMethodInfo, row: Sequence[Any]) -> dict[str, Any]:
    """Return what the method is called with; raises `ParameterError` for a null and the like."""
    return dict(zip(info.params.names, located(f"{info.name}() parameter ", info.params.decode, row)))


def request_pieces(
    info: RpcMethodInfo, row: list[Any], request_id: str, timeout: float | None
) -> list[Buffer]:
    """Return the bytes of a whole request: *row* as `encode_arguments` gives it, *timeout* in seconds."""
    varying = [request_id.encode()]
    if timeout is not None:
        varying.append(b"%0*d" % (TIMEOUT_DIGITS, max(1, int(timeout * 1000))))
    template = info.request_templates[timeout is not None]
    if template is not None:
        try:
            return [template.write(row, varying)]
        except ValueError:
            pass  # a large or unusual value: pyarrow writes it, or words the error
    batch = located(f"{info.name}() argument ", info.params.to_batch, row)
    metadata = {**info.request_metadata, **dict(zip((REQUEST_ID_KEY, TIMEOUT_KEY), varying))}
    return stream_pieces(info.params.wire, [(batch, metadata)])


def new_request_id() -> str:
    """Return 16 random hex characters."""
    return os.urandom(REQUEST_ID_BYTES // 2).hex()


def clean_request_id(text: str) -> str:
    """Return *text* if it may be echoed and logged (at most 128 visible ASCII characters), else no text."""
    fits = len(text) <= MAX_REQUEST_ID_CHARS and text.isascii() and text.isprintable() and " " not in text
    return text if fits else ""


def read_timeout(metadata: Metadata) -> float | None:
    """Return the time limit of a request or turn in seconds, ``None`` for no limit."""
    value = metadata.get(TIMEOUT_KEY, b"")
    return int(value) / 1000 if value.isdigit() and len(value) <= TIMEOUT_DIGITS else None


@dataclass(eq=False, slots=True)
class Request:
    """One request as it came: its metadata is read, its schema is known, its values are not decoded yet."""

    wire: WireSchema
    rows: int
    metadata: Mapping[bytes, bytes]
    decode: Callable[[RowCodec], list[Any]]  # by the codec of the method's parameters
    row: Sequence[Any] | None = None  # what it decodes, where the method's template has read it

    def text(self, key: bytes) -> str | None:
        """Return a metadata value as text, ``None`` when absent; `ProtocolError` when it is not UTF-8."""
        value = self.metadata.get(key)
        try:
            return None if value is None else value.decode("utf-8")
        except UnicodeDecodeError:
            raise ProtocolError(f"request: {key.decode()} is not UTF-8: {value!r:.60}") from None

    @property
    def request_id(self) -> str:
        """The client's request id if it may be echoed, else empty."""
        return clean_request_id(self.metadata.get(REQUEST_ID_KEY, b"").decode("latin-1"))

    def arguments(self, info: RpcMethodInfo) -> dict[str, Any]:
        """Check the request against a method and decode its parameters.

        Raises `ParameterError` for parameters not as declared, `ProtocolError` when there is not exactly one row,
        `IPCError` when its bytes are damaged.
        """
        if self.row is not None and info.params.is_flat:
            return dict(zip(info.params.names, self.row))
        expected = info.params_schema
        received = self.wire.schema
        if self.wire is not info.params.wire and not received.equals(expected):
            extra = [name for name in received.names if name not in expected.names]
            missing = [name for name in expected.names if name not in received.names]
            reason = "the order of the parameters differs, or one stands twice"
            if extra:
                reason = f"no parameter {', '.join(map(repr, extra[:8]))}{suggest(extra[0], expected.names)}"
            elif missing:
                reason = f"missing {', '.join(map(repr, missing))}"
            elif received.names == expected.names:
                pair = next(pair for pair in zip(expected, received) if not pair[0].equals(pair[1]))
                texts = [schema_text([column])[1:-1] for column in pair]
                reason = f"parameter {pair[0].name!r}: expected {texts[0]}, got {texts[1]}"
            where = f"{info.name}(): expected {schema_text(expected)}, got {schema_text(received)[:2000]}"
            raise ParameterError(f"{where}: {reason}")
        if not info.params.names:
            return {}
        if self.rows != 1:
            raise ProtocolError(f"{info.name}(): expected exactly 1 row of parameters, got {self.rows} rows")
        values = located(f"{info.name}() parameter ", self.decode, info.params)
        return dict(zip(info.params.names, values))


def read_request(reader: IpcReader) -> Request:
    """Read a request: one batch, of a stream that ends behind it.

    Raises `IPCError` for bytes that are none, `ProtocolError` when the reader stands behind a second batch.
    """
    message = reader.next_message()
    if message is None:
        raise IPCError("request: expected one batch, got a schema and no batch")
    batch = None
    if reader.wire.dictionaries:  # they may be replaced behind the batch, which is then decoded too late
        batch = reader.decode(message)
    if reader.next_message() is not None:
        raise ProtocolError("request: expected exactly one batch, got another one behind it")

    def decode(codec: RowCodec) -> list[Any]:
        return codec.from_batch(reader.decode(message) if batch is None else batch)

    return Request(reader.wire, message.rows, message.metadata, decode)


class RequestTable:
    """Tells by their bytes for which of a server's methods requests of our own clients are. Safe between threads.

    It holds the methods' templates, and nothing that a peer decides.
    """

    def __init__(self) -> None:
        # By schema message, and the prefix of the next: with a time limit or another name its head has another size.
        self._methods: dict[bytes, dict[RowTemplate, BoundMethod]] = {}

    def add(self, bound: BoundMethod) -> None:
        """Recognise requests to a method from now on; may be called again."""
        for template in bound.info.request_templates:
            if template is not None:
                others = self._methods.get(template.opening, {})
                self._methods[template.opening] = {**others, template: bound}  # whole, as others look at it

    def read(
        self, data: bytes, at: int = 0, limit: int | None = None
    ) -> tuple[BoundMethod, Request, int] | None:
        """Read the request that begins at *at*; return its method, the request and where it ends.

        ``None`` when it is longer than *limit* bytes or not as our clients write it: then `read_request` decides.
        """
        opening = data[at : at + 16 + int.from_bytes(data[at + 4 : at + 8], "little")]
        for template, bound in self._methods.get(opening, {}).items():
            match = template.read(data, at)
            if match is not None and (limit is None or match[2] - at <= limit):
                row, values, end = match
                metadata = dict(bound.info.request_metadata)
                metadata.update(zip((REQUEST_ID_KEY, TIMEOUT_KEY), values))
                decode = operator.methodcaller("decode", row)
                return bound, Request(bound.info.params.wire, min(1, len(row)), metadata, decode, row), end
        return None


def result_item(info: RpcMethodInfo, value: Any) -> Item:
    """Encode a unary result: 1 row x 1 column, or 0 x 0 for ``-> None``; `ParameterError` for one not as declared."""
    if value is not None and not info.result.names:
        raise ParameterError(f"{info.name}() result: declared to return None, got {got(value)}")
    row = [value]
    if not info.result.is_plain(row):
        row = located(f"{info.name}() ", info.result.encode, row)
    if info.result.template is not None:
        try:
            return info.result.template.message(row)
        except ValueError:
            pass  # as in request_pieces
    return located(f"{info.name}() ", info.result.to_batch, row), None


def read_result(info: RpcMethodInfo, data: bytes, at: int = 0) -> tuple[Any, int] | None:
    """Read the answer that begins at *at*, if it is a result alone; return the value and where it ends.

    ``None`` when it is not, not there to its end, or not as declared: then it goes the ordinary way.
    """
    match = info.result.template and info.result.template.read(data, at)
    if not match:
        return None
    row, _, end = match
    try:
        if not info.result.is_flat:
            row = info.result.decode(row)
        return (row or [None])[0], end
    except Exception:  # the ordinary way raises it, once the answer was read to its end
        return None


def decode_result(info: RpcMethodInfo, batch: pa.RecordBatch) -> Any:
    """Decode a unary result; `ParameterError` when it is not as declared: client and server disagree."""
    if not info.has_return:
        return None
    if batch.num_rows != 1 or batch.schema.names != ["result"]:
        received = f"{batch.num_rows} rows of {schema_text(batch.schema)}"
        expected = schema_text(info.result_schema)
        raise ParameterError(f"{info.name}() result: expected 1 row of {expected}, got {received}")
    return located(f"{info.name}() ", info.result.from_batch, batch)[0]


def header_batch(info: RpcMethodInfo, header: Any) -> pa.RecordBatch:
    """Encode a stream's header, 1 row x the fields of its dataclass; `TypeError` if it is not as declared."""
    codec = cast("DataclassCodec", info.header)
    where = f"{info.name}() header"
    row = located(where, lambda value: codec.row.encode(codec.to_dict(value).values()), header)
    return located(where, codec.row.to_batch, row)


# ====================
# 10. REFLECTION ... uses 1-9
# What a server says of itself: the reflection protocol, its dataclasses, the protocol hash.
# Field names, their order and the tokens of the hash are the family's; a change here is a change of the wire.
# What reflection has no field for (docs, defaults, what is inside of a binary parameter) travels in the
# metadata of the schemas that describe answers with. Other peers pass over it, and so does Schema.equals.


@dataclass(eq=False)
class ProtocolSummary(ArrowSerializableDataclass):
    """One hosted protocol, as `list_protocols` lists it."""

    protocol: str
    protocol_version: str
    protocol_hash: str
    deprecated: bool = False
    deprecation_message: str = ""
    features: list[str] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class ProtocolList(ArrowSerializableDataclass):
    """Answer of ``Reflection.list_protocols``."""

    server_id: str
    server_version: str
    request_version: str
    protocols: list[ProtocolSummary]


@dataclass(eq=False, repr=False)
class MethodSummary(ArrowSerializableDataclass):
    """One method, as ``Reflection.describe`` tells it; schemas are serialised, empty where there is none."""

    name: str
    method_type: str
    has_return: bool
    has_header: bool
    stream_kind: str
    params_schema_ipc: bytes
    result_schema_ipc: bytes
    header_schema_ipc: bytes
    idempotency: str = "unknown"
    deprecated: bool = False
    deprecation_message: str = ""


@dataclass(eq=False, repr=False)
class ProtocolDescription(ProtocolSummary):
    """Answer of ``Reflection.describe``: the summary and the methods, sorted by name."""

    methods: list[MethodSummary] = field(default_factory=list)


class Reflection(Protocol):
    """The protocol that every server hosts beside the application's."""

    protocol_name: ClassVar[str] = REFLECTION_PROTOCOL

    def list_protocols(self) -> ProtocolList:
        """List the hosted protocols, the application's first, in the order of registration."""

    def describe(self, protocol: str) -> ProtocolDescription:
        """Describe one protocol and its methods, sorted by name."""


_LEAF_TOKEN = (  # of types without children
    r"u?int(8|16|32|64)|float(16|32|64)|bool|null|(large_)?(utf8|binary)|fixed_size_binary\(\d+\)|date(32|64)"
    r"|decimal\d+\(\d+,-?\d+\)|(time32|time64|duration)\((s|ms|us|ns)\)|timestamp\((s|ms|us|ns)(,tz=.+)?\)"
)


def _type_token(arrow_type: pa.DataType) -> str:
    """The spelling of a type in the protocol hash; `TypeError` for a type that has none."""
    if isinstance(arrow_type, pa.BaseExtensionType):
        return f"extension({arrow_type.extension_name})<{_type_token(arrow_type.storage_type)}>"
    name = str(arrow_type).partition("<")[0]
    more = ""
    if name == "dictionary":
        members = [("index", arrow_type.index_type), ("value", arrow_type.value_type)]
        more = ",ordered" * arrow_type.ordered
    elif name == "map":
        value = "value" + "?" * arrow_type.item_field.nullable
        members = [("key", arrow_type.key_type), (value, arrow_type.item_type)]
        more = ",keys_sorted" * arrow_type.keys_sorted
    elif name == "struct":
        members = [(member.name + "?" * member.nullable, member.type) for member in arrow_type]
    elif name in ("list", "large_list", "fixed_size_list"):
        members = [("item" + "?" * arrow_type.value_field.nullable, arrow_type.value_type)]
        if name == "fixed_size_list":
            name = f"{name}({arrow_type.list_size})"
    else:
        text = re.sub(r"(?<=^date..)\[.*", "", type_text(arrow_type)).replace("large_string", "large_utf8")
        text = text.translate(str.maketrans("[]", "()", " "))
        if not re.fullmatch(_LEAF_TOKEN, text):
            raise TypeError(f"the protocol hash has no token for {arrow_type}")
        return text
    return f"{name}<{','.join(f'{part}:{_type_token(inner)}' for part, inner in members)}{more}>"


def protocol_hash(protocol: str, infos: Iterable[RpcMethodInfo]) -> str:
    """Return the family's fingerprint of a protocol, hex SHA-256; `TypeError` for a type without a token."""
    methods = []
    for info in sorted(infos, key=operator.attrgetter("name")):
        method: dict[str, Any] = {"name": info.name, "type": info.method_type.value}
        method.update(has_return=info.has_return, has_header=info.header is not None)
        schemas = {"params": info.params_schema}
        if info.has_return:
            schemas["result"] = info.result_schema
        if info.header is not None:
            schemas["header"] = info.header.row.schema
        for key, schema in schemas.items():
            method[key] = [
                {"name": f.name, "nullable": f.nullable, "type": _type_token(f.type)} for f in schema
            ]
        methods.append(method)
    listed = {"protocol": protocol, "methods": methods}
    text = to_json(listed, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    import hashlib

    return hashlib.sha256(b"vgi_rpc.protocol_hash.v1|" + text.encode()).hexdigest()


def described_schemas(info: RpcMethodInfo) -> Mapping[str, pa.Schema]:
    """``params``, ``result`` and ``header`` with all that is told of them; made once, kept at the method."""
    if info.described is None:
        docs = {DOC_KEY: text_of(info.doc or ""), SIGNATURE_KEY: info.signature()}
        docs[PARAM_DOCS_KEY] = to_json(info.param_docs)
        header = info.header and _described_fields(info.header.row, info.header.defaults)
        info.described = {  # whole, as other threads look at it
            "params": pa.schema(_described_fields(info.params, info.param_defaults), metadata=docs),
            "result": pa.schema(_described_fields(info.result, {})),
            "header": pa.schema(header or []),
        }
    return info.described


def _described_fields(row: RowCodec, defaults: Mapping[str, Any]) -> list[pa.Field]:
    fields = list(map(_described_field, row.schema, row.parts.values()))
    for at, (name, codec) in enumerate(row.parts.items()):
        if name in defaults:
            told: dict[Any, Any] = {DEFAULT_TEXT_KEY: sendable(text_of(default_text(defaults[name])), 200)}
            with suppress(Mismatch):  # one that no caller may send
                batch = RowCodec([("default", codec)]).to_batch([codec.encode(defaults[name])])
                told[DEFAULT_KEY] = stream_bytes(WireSchema(batch.schema), [(batch, None)])
            fields[at] = fields[at].with_metadata({**fields[at].metadata, **told})
    return fields


def default_batch(member: pa.Field) -> pa.RecordBatch | None:
    """Return the described default of a field, 1 row x 1 column; ``None`` where there is none that can be read."""
    # TypeError and LookupError where it is no stream of one value.
    with suppress(IPCError, EOFError, RequestTooLargeError, TypeError, LookupError):
        source = ByteSource((member.metadata or {})[DEFAULT_KEY])
        batch, _ = cast("Any", IpcReader(source, IpcLimits(max_rows=1)).next())
        return cast("pa.RecordBatch", batch)
    return None


def _described_field(member: pa.Field, codec: Codec) -> pa.Field:
    """A field with what its annotation tells; fields inside its type likewise."""
    metadata: dict[bytes, Any] = {TYPE_KEY: annotation_text(codec.annotation)}
    cls: Any = unwrapped(codec.annotation)[0]
    arrow_type = member.type
    parts = codec.parts.values()
    if codec.dataclass is not None:
        cls = codec.dataclass.cls
        fields = _described_fields(codec.dataclass.row, codec.dataclass.defaults)
        if pa.types.is_struct(arrow_type):
            arrow_type = pa.struct(fields)
        else:
            metadata[STRUCT_KEY] = pa.schema(fields).serialize().to_pybytes()
    elif isinstance(cls, type) and issubclass(cls, enum.Enum):
        metadata[ENUM_KEY] = "\n".join(cls.__members__)
    elif pa.types.is_map(arrow_type) and parts:
        inner = map(_described_field, (arrow_type.key_field, arrow_type.item_field), parts)
        arrow_type = pa.map_(*inner, keys_sorted=arrow_type.keys_sorted)
    elif pa.types.is_list(arrow_type) or pa.types.is_fixed_size_list(arrow_type):
        for item in parts:
            size = getattr(arrow_type, "list_size", -1)
            arrow_type = pa.list_(_described_field(arrow_type.value_field, item), size)
    if codec.dataclass is not None or ENUM_KEY in metadata:
        doc = vars(cls).get("__doc__")
        by_python = doc == "An enumeration." or str(doc).partition("(")[0] == cls.__name__
        if isinstance(doc, str) and not by_python:
            metadata[DOC_KEY] = text_of(inspect.cleandoc(doc))
    return member.with_type(arrow_type).with_metadata(metadata)


def field_text(member: pa.Field | pa.Schema, key: bytes) -> str:
    """What the metadata of a described field or schema says under *key*; empty where it says nothing."""
    return metadata_text(member.metadata or {}, key)


def type_of(member: pa.Field) -> str:
    """The type of a described field as a person writes it, else its Arrow type."""
    return field_text(member, TYPE_KEY) or type_text(member.type)


def struct_schema(member: pa.Field) -> pa.Schema | None:
    """The schema of the dataclass in a described binary field; ``None`` where none is told."""
    with suppress(EOFError, IPCError):
        return IpcReader(ByteSource((member.metadata or {}).get(STRUCT_KEY, b""))).schema
    return None


def describe_service(service: HostedService) -> ProtocolDescription:
    """Return the reflection answer for one hosted protocol."""
    methods = []
    for name, bound in sorted(service.methods.items()):
        info = bound.info
        stream_kind = ""
        if info.method_type is MethodType.STREAM:
            stream_kind = STREAM_KINDS.get(bound.is_exchange, "unknown")
        schemas = described_schemas(info).values()
        data = [s.serialize().to_pybytes() * bool(s.names or s.metadata) for s in schemas]
        has_header = info.header is not None
        summary = MethodSummary(name, info.method_type.value, info.has_return, has_header, stream_kind, *data)
        summary.idempotency = info.idempotency
        summary.deprecated = info.deprecation is not None
        summary.deprecation_message = info.deprecation or ""
        methods.append(summary)
    return ProtocolDescription(service.name, service.version, service.hash, methods=methods)


def _row_described(schema: pa.Schema) -> RowCodec:
    """The codecs of a described schema, by its Arrow types."""
    codecs = [codec_for(Annotated[object, ArrowType(member.type, member.nullable)]) for member in schema]
    named = [codec._replace(annotation=type_of(member)) for codec, member in zip(codecs, schema)]
    return RowCodec(zip(schema.names, named))


def _described_defaults(schema: pa.Schema, params: RowCodec) -> Iterator[tuple[str, Any]]:
    """Yield the defaults that can be read."""
    for member, codec in zip(schema, params.parts.values()):
        batch = default_batch(member)
        with suppress(ParameterError, LookupError):  # of another type, or without a column
            if batch is not None:
                yield member.name, RowCodec([(member.name, codec)]).from_batch(batch)[0]


class _BatchHeader(DataclassCodec):
    """The header of a stream whose dataclass is not here: it stays a batch."""

    cls = pa.RecordBatch

    def __init__(self, row: RowCodec) -> None:
        self.row = row

    def from_batch(self, batch: pa.RecordBatch) -> Any:
        return batch


class MethodDescription(RpcMethodInfo):
    """One method of a server, as a client learns of it, and can call it without the Protocol class.

    Its values are those of pyarrow: bytes for a dataclass as parameter or result, a dict for one inside of
    other values, an enum's member by its name. Docs and defaults are told by our own servers only.
    """

    def __init__(self, summary: MethodSummary, service: ProtocolSummary) -> None:
        self._made_from = (summary, service)
        ipc_schemas = (summary.params_schema_ipc, summary.result_schema_ipc, summary.header_schema_ipc)
        schemas = [IpcReader(ByteSource(data)).schema if data else EMPTY.schema for data in ipc_schemas]
        params, result, header = map(_row_described, schemas)
        names = (summary.name, service.protocol, service.protocol_version)
        method_type = MethodType.UNARY
        returned = next(map(type_of, schemas[1]), None)
        if summary.method_type == "stream":
            method_type = MethodType.STREAM
            returned = "Stream"
        if not summary.has_return:
            result = RowCodec(())
        codec = _BatchHeader(header) if summary.has_header else None
        is_exchange = {"exchange": True, "producer": False}.get(summary.stream_kind)
        doc = field_text(schemas[0], DOC_KEY)
        super().__init__(*names, method_type, params, result, returned, codec, is_exchange, doc)
        self.described = dict(zip(("params", "result", "header"), schemas))
        self.param_docs = json_object(field_text(schemas[0], PARAM_DOCS_KEY))
        self.param_defaults = dict(_described_defaults(schemas[0], params))
        self.idempotency = summary.idempotency
        if summary.deprecated:
            self.deprecation = summary.deprecation_message

    params_schema = property(lambda self: described_schemas(self)["params"])
    result_schema = property(lambda self: described_schemas(self)["result"])
    header_schema = property(lambda self: described_schemas(self)["header"] if self.has_header else None)
    has_header = property(lambda self: self.header is not None)  # whether its stream sends a header

    def signature(self) -> str:
        """Return the signature as the server tells it, else with Arrow's types."""
        return field_text(self.params_schema, SIGNATURE_KEY) or super().signature()

    def __reduce__(self) -> Any:
        return type(self), self._made_from


class ServiceDescription(NamedTuple):
    """One protocol of a server, as a client learns of it."""

    protocol_name: str  # routing name
    request_version: str  # of the wire
    describe_version: str  # of the reflection answer
    protocol_hash: str  # the family's fingerprint
    server_id: str  # 12 hex characters
    methods: Mapping[str, MethodDescription]
    protocol_version: str = ""  # MAJOR.MINOR.PATCH, empty when it declares none


def service_description(listed: ProtocolList, answer: ProtocolDescription) -> ServiceDescription:
    """Return what a client shows of a server's two answers; raises `IPCError` for a broken schema."""
    methods = {summary.name: MethodDescription(summary, answer) for summary in answer.methods}
    ids = (answer.protocol, listed.request_version, DESCRIBE_VERSION, answer.protocol_hash, listed.server_id)
    return ServiceDescription(*ids, methods, answer.protocol_version)


# ====================
# 11. TOKENS ... uses 1-10
# Seals a stream's state so that only this service's own can come back: HMAC-SHA256 over
# half, binding, time and content. It is signed, not encrypted: a client can read what is inside. Law: nothing
# of a token is looked at before its seal was found good; every fault of a seal has the same answer.
#
#   token = text · base64(HMAC of the text: 32 bytes)
#   text = base64(version 4: u8 · bytes of filler: u8 · time in ms: u64 · size: u64, or 0 · content · filler)
#
# The filler makes the text end without padding. Where a size is given, the content is packed by zstd, to which it
# grows again.

TOKEN_REFUSED = "state token refused: not issued by this service for this call; start the stream again"
TOKEN_OUTDATED = "state token refused: issued by another version of the service; start the stream again"
_FRAME = struct.Struct("<BBQQ")
_TOKEN_VERSION = 4
_MAC_TEXT_BYTES = 44
_PACK_FROM_BYTES = 10_000  # base64 is read at 250 MB/s: what packing takes is less than what it spares


def token_keys(option: bytes | str | Sequence[bytes]) -> list[bytes]:
    """Read the option ``token_key``: the first key signs, all of them verify.

    A line end behind a key, which an editor leaves there, is no part of it. Raises ``TypeError`` for what is no
    bytes, sequence of them or text, ``ValueError`` for no key or one under 16 bytes.
    """
    keys: list[Any] = [option]
    if isinstance(option, str):
        keys = [key.strip().encode() for key in option.split(",") if key.strip()]
    elif isinstance(option, Iterable) and not isinstance(option, bytes):
        keys = list(option)
    for at, key in enumerate(keys):
        if not isinstance(key, bytes):
            expected = "bytes, a sequence of bytes, or text with keys separated by commas"
            received = f"{type(key).__name__} in {type(option).__name__}"
            raise TypeError(f"token_key: expected {expected}, got {received}")
        if re.fullmatch(rb"[ -~]+\r?\n", key):  # not of random bytes, which may end so
            keys[at] = key.rstrip(b"\r\n")
    if not keys or min(map(len, keys)) < 16:
        sizes = ", ".join(str(len(key)) for key in keys) or "no key"
        raise ValueError(f"token_key: expected at least 16 bytes, got {sizes}")
    return keys


class TokenSealer:
    """Seals and opens state tokens, good for *ttl* seconds (0: for ever). Several threads may use it."""

    def __init__(self, keys: Sequence[bytes], ttl: float = TOKEN_TTL_SECONDS, clock: Any = time.time) -> None:
        import hmac

        # To copy it costs half of what the key does. The label is of the MAC alone; what is sealed has `_TOKEN_VERSION`.
        self._keyed = [hmac.new(key, b"vgi_rpc.token.v2", "sha256") for key in token_keys(keys)]
        self._ttl = ttl
        self._clock = clock

    def check_size(self, content: bytes) -> None:
        """Raise `ResponseTooLargeError` for a content that `open` would refuse: above 256 MiB."""
        if len(content) > MAX_STATE_BYTES:
            text = f"stream state: expected at most {MAX_STATE_BYTES} bytes, got {len(content)}"
            raise ResponseTooLargeError(f"{text}; keep what is large elsewhere, and in the state where it is")

    def seal(self, half: bytes, binding: Sequence[bytes], content: bytes) -> bytes:
        """Return *content* as a token, bound to *half* (which half of the state it is) and *binding*."""
        self.check_size(content)
        size = 0
        if len(content) >= _PACK_FROM_BYTES and pa.Codec.is_available("zstd"):
            size = len(content)
            content = pa.compress(content, "zstd", asbytes=True)
        filler = -(_FRAME.size + len(content)) % 3
        frame = _FRAME.pack(_TOKEN_VERSION, filler, int(self._clock() * 1000), size)
        text = binascii.b2a_base64(b"".join((frame, content, bytes(filler))), newline=False)
        return text + self._mac(self._keyed[0], half, binding, text)

    def open(self, half: bytes, binding: Sequence[bytes], token: bytes | None, *, aged: bool = True) -> bytes:
        """Return the content of a token that was sealed for the same *half* and *binding*.

        Raises `TokenError`: for any fault of the seal; else for one from the future or, if *aged*, too old.
        """
        token = token or b""
        text = token[:-_MAC_TEXT_BYTES]
        mac = token[-_MAC_TEXT_BYTES:]
        import hmac

        # All keys, always: the time taken does not tell which one fits.
        macs = [self._mac(keyed, half, binding, text) for keyed in self._keyed]
        if not sum([hmac.compare_digest(own, mac) for own in macs]):
            raise TokenError(TOKEN_REFUSED)
        sealed = binascii.a2b_base64(text)
        if sealed[0] != _TOKEN_VERSION:
            raise TokenError(TOKEN_OUTDATED)
        _, filler, issued, size = _FRAME.unpack_from(sealed)
        age = self._clock() - issued / 1000
        if age < -TOKEN_CLOCK_SKEW_SECONDS:
            raise TokenError("state token refused: issued in the future; check the servers' clocks")
        if aged and self._ttl and age > self._ttl:
            limit = f"at most {self._ttl:g} s are allowed"
            raise TokenError(f"token expired: {age:.0f} s old, {limit}; start the stream again")
        content = sealed[_FRAME.size : len(sealed) - filler]
        return pa.decompress(content, size, "zstd", asbytes=True) if size else content

    @staticmethod
    def _mac(keyed: hmac.HMAC, half: bytes, binding: Sequence[bytes], text: bytes) -> bytes:
        mac = keyed.copy()
        mac.update(pack_parts((half, *binding)))
        mac.update(text)
        return binascii.b2a_base64(mac.digest(), newline=False)


def pack_parts(parts: Sequence[bytes]) -> bytes:
    """Join byte strings behind their number and lengths, so that no two lists give the same bytes."""
    return b"".join([struct.pack(f"<{1 + len(parts)}I", len(parts), *map(len, parts)), *parts])


def unpack_parts(data: bytes, count: int) -> list[bytes]:
    """Split what `pack_parts` joined and was sealed; `TokenError` unless it is *count* parts."""
    start = 4 + 4 * count
    number, *sizes = struct.unpack(f"<{1 + count}I", data[:start].ljust(start, b"\0"))
    ends = list(itertools.accumulate(sizes, initial=start))
    if number != count or ends[-1] != len(data):
        raise TokenError(TOKEN_OUTDATED)
    return [data[begin:end] for begin, end in itertools.pairwise(ends)]


# ====================
# 12. BYTE CHANNELS ... uses 1-11
# Sockets and pipes as channels of bytes, and the worker processes behind some of them. Law: a short read or write is
# continued; a connection belongs to the process that opened it.

_RECEIVE_BYTES = 65_536
_MAX_IO_BYTES = 1 << 30  # per system call: some systems, and TLS, refuse 2 GiB and more
_TOO_LATE = "no answer within the time allowed"
open_files: weakref.WeakSet[Any] = weakref.WeakSet()  # of connections and listeners
handlers_before: dict[int, Any] = {}  # who handled the signals that we handle now
this_process = [os.getpid()]  # its id, for which each call would have to ask the system several times


@cache  # at the first connection
def watch_forks() -> None:
    """Have a forked child begin without our files and our signal handlers."""
    this_process[0] = os.getpid()  # a child that was forked before the first connection begins here
    masks = threading.local()

    def before() -> None:  # a signal that comes before the child runs would be lost to the system's handlers
        blocked = [number for number, handler in handlers_before.items() if not callable(handler)]
        masks.mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)

    def after() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.mask)

    def after_in_child() -> None:
        this_process[0] = os.getpid()
        for file in list(open_files):  # a copy keeps open what its owner has closed: a worker would not leave
            with suppress(OSError):
                file.close()
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
        handlers_before.clear()
        after()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=after, after_in_child=after_in_child)


def _is_ready(file: Any, writing: bool = False, timeout: float = 0.0) -> bool:
    """Whether *file* can be read (or written) now or within *timeout*, or fails at once, as a closed one does."""
    try:
        if not hasattr(select, "poll"):
            return any(select.select([] if writing else [file], [file] if writing else [], [], timeout))
        waiting = select.poll()
        waiting.register(file.fileno(), select.POLLOUT if writing else select.POLLIN)
        return bool(waiting.poll(min(timeout, 1e6) * 1000))  # it counts milliseconds in an int
    except ValueError:
        return True


class ByteChannel(ByteSource):
    """Bytes in, bytes out over a connected stream socket, plain or TLS, which it owns.

    For one thread at a time; `close` and `peer_gone` are for any. Reading and writing raise `TransportError` when the
    peer went away, `DeadlineExceededError` at the `deadline`.
    """

    def __init__(self, connected: Any) -> None:
        super().__init__()
        self.deadline: Time = None  # at which reads and writes give up
        self.ended = False  # whether the peer has closed its side
        self.source = connected
        self.writer = connected
        self._receive = getattr(connected, "recv", None) or connected.read
        self._read_into = getattr(connected, "recv_into", None) or connected.readinto
        self._send: Any = getattr(connected, "send", None)
        self._timeout: float | None = -1.0  # of the socket; not known
        watch_forks()
        open_files.add(connected)

    def _seconds_left(self) -> float:
        left = cast("float", self.deadline) - time.monotonic()
        if left <= 0:
            raise DeadlineExceededError(_TOO_LATE)
        return left

    def _allowed(self, data: Any, writing: bool) -> Any:
        """See to it that the next system call ends by the deadline; return what of *data* it may be given."""
        left = None if self.deadline is None else self._seconds_left()
        # About right will do, as the clock is looked at each time: to set it takes a system call.
        if left is None or self._timeout is None or not 0.9 * self._timeout <= left <= self._timeout:
            self._timeout = left and 1.05 * left
            self.source.settimeout(self._timeout)
        return data

    def _io(self, operation: Callable[[Any], T | None], data: Any, writing: bool = False) -> T:
        try:
            if self.deadline is not None or self._timeout is not None:
                data = self._allowed(data, writing)
            while (result := operation(data)) is None:  # of a file that does not block
                _is_ready(self.writer if writing else self.source, writing, 1.0)
            return result
        except (OSError, ValueError) as exc:  # ValueError: it was closed here
            if isinstance(exc, TimeoutError) and exc.errno is None:  # one with a number is the network's
                raise DeadlineExceededError(_TOO_LATE) from None
            raise TransportError(f"connection lost: {getattr(exc, 'strerror', None) or exc}") from None

    def peer_gone(self) -> bool:
        """Whether the other side has hung up, as far as it can be known."""
        try:  # the method of the plain class, as a TLS socket refuses to peek
            return _is_ready(self.source) and not socket.socket.recv(self.source, 1, socket.MSG_PEEK)
        except OSError as exc:
            return not isinstance(exc, BlockingIOError)  # another thread took the byte

    def close(self) -> None:
        """Close both directions; may be called twice."""
        with suppress(OSError), self.source:
            self.source.shutdown(socket.SHUT_RDWR)  # which wakes a thread that waits in it; closing does not

    def _fill(self) -> bool:
        received = self._io(self._receive, _RECEIVE_BYTES)
        self._buffer = self._buffer[self.at :] + received
        self.at = 0
        self.ended = not received
        return not self.ended

    def read_after(self, head: bytes, size: int) -> Buffer:
        if size <= _RECEIVE_BYTES:
            return head + self.read(size)
        whole = pa.allocate_buffer(len(head) + size)  # not zeroed, and filled in place
        view = memoryview(whole).cast("B")
        start = head + self._buffer[self.at : self.at + size]
        self.at += len(start) - len(head)
        view[: len(start)] = start
        filled = len(start)
        while filled < len(view) and not self.ended:
            count = self._io(self._read_into, view[filled : filled + _MAX_IO_BYTES])
            self.ended = not count
            filled += count
        return whole.slice(0, filled)

    def is_quiet(self) -> bool:
        """Whether the peer is there and has sent nothing that was not read."""
        return self.at == len(self._buffer) and not _is_ready(self.source)

    def write(self, pieces: Sequence[Buffer]) -> None:
        """Write all of *pieces*, in order: small ones in one system call, large ones without copying them."""
        if len(pieces) > 1 and total_size(pieces) <= SMALL_BODY_BYTES:
            pieces = [b"".join(pieces)]
        elif len(pieces) > 1:
            runs = itertools.groupby(pieces, lambda piece: len(piece) > SMALL_BODY_BYTES)
            pieces = [piece for is_large, run in runs for piece in (run if is_large else [b"".join(run)])]
        for piece in pieces:
            sent = self._io(self._send, piece[:_MAX_IO_BYTES], True)
            while sent < len(piece):
                sent += self._io(self._send, memoryview(piece)[sent : sent + _MAX_IO_BYTES], True)


class FdChannel(ByteChannel):
    """The same over two files without buffers, such as the ends of pipes."""

    def __init__(self, reader: Any, writer: Any) -> None:
        super().__init__(reader)
        self.writer = writer
        open_files.add(writer)
        self._send = writer.write
        self._timeout = None

    def _allowed(self, data: Any, writing: bool) -> Any:
        file = self.writer if writing else self.source
        while not _is_ready(file, writing, self._seconds_left()):
            pass
        # So much a pipe takes at once when it is ready; more may wait.
        return data[: getattr(select, "PIPE_BUF", 512)] if writing else data

    def peer_gone(self) -> bool:
        if self.source.closed or not hasattr(select, "poll"):
            return bool(self.source.closed)
        watched = select.poll()
        watched.register(self.source.fileno(), 0)  # a hang-up is told unasked
        return bool(watched.poll(0))

    def close(self) -> None:
        self.writer.close()
        self.source.close()


class Transport:
    """A byte channel with a name and an owner: what `RpcConnection` and `RpcServer.serve` take."""

    peer = "the server"  # how error texts call the other side

    def __init__(self, channel: ByteChannel, kind: TransportKind, remote_addr: str = "") -> None:
        self.channel = channel
        self.kind = kind
        self.remote_addr = remote_addr
        self.process_id = this_process[0]  # of the process that opened it

    def check_process(self) -> None:
        """Raise `TransportError` in another process than the one that opened the connection."""
        if this_process[0] != self.process_id:
            raise TransportError("the connection belongs to the process that opened it; connect again here")

    def obituary(self) -> str:
        """Say why no more bytes come, as far as is known here."""
        return "the connection was closed by the other side"

    def close(self, patience: float = WORKER_EXIT_SECONDS) -> None:
        """Close the channel; may be called twice. A worker has *patience* seconds to leave."""
        self.channel.close()


class PipeTransport(Transport):
    """Two binary file objects with nothing buffered, such as those of pipes; it closes both."""

    def __init__(self, reader: Any, writer: Any) -> None:
        channel = FdChannel(getattr(reader, "raw", reader), getattr(writer, "raw", writer))
        super().__init__(channel, TransportKind.PIPE)


def make_pipe_pair() -> tuple[Transport, Transport]:
    """Return two connected transports within this process; the caller closes both."""
    near, far = map(ByteChannel, socket.socketpair())
    return Transport(near, TransportKind.PIPE), Transport(far, TransportKind.PIPE)


class StderrMode(enum.Enum):
    """Where a worker's standard error goes."""

    INHERIT = "inherit"  # to ours; the last lines are also kept for error texts
    PIPE = "pipe"  # to a logger
    DEVNULL = "devnull"


def failure_text(exc: Any) -> str:
    """Say why a connection cannot be had, in the system's words."""
    text = text_of(getattr(exc, "strerror", None) or exc)
    if getattr(exc, "reason", None) in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):  # as OpenSSL calls it
        text += " (the server does not speak TLS: connect without it, to http:// instead of https://)"
    return text


@contextmanager
def opening(failure: str) -> Iterator[ExitStack]:
    """Turn what the system refuses while connecting into `TransportError`; after any failure close the stack.

    What a wrong argument raises stays what it is.
    """
    with ExitStack() as opened:
        try:
            yield opened
        except (OSError, RuntimeError) as exc:  # RuntimeError: no thread for it
            raise TransportError(f"{failure}: {failure_text(exc)}") from None
        except (ValueError, OverflowError) as exc:
            raise ValueError(f"{failure}: {text_of(exc)}") from None
        opened.pop_all()


def join_thread(thread: threading.Thread, timeout: float) -> None:
    """Wait for a thread's end, unless it never began, is this one, or the interpreter is about to exit."""
    with suppress(RuntimeError):  # which Python says of the three
        thread.join(timeout)


class SubprocessTransport(Transport):
    """Starts a worker, without a shell, and talks to it over its stdin and stdout.

    *stderr_logger* is for ``StderrMode.PIPE``; default ``vgi_rpc.worker``. Raises `TransportError` when the program
    cannot be started, `TypeError` when *cmd*, program and arguments, is one string or empty.
    """

    def __init__(
        self, cmd: Sequence[str], *, stderr: StderrMode = StderrMode.INHERIT, stderr_logger: Any = None
    ) -> None:
        import subprocess

        if isinstance(cmd, (str, bytes)) or not cmd:
            raise ParameterError(f"cmd: expected a list of texts, got {cmd!r}; shlex.split makes one of it")
        self._timed_out = subprocess.TimeoutExpired  # nothing can be imported while the interpreter exits
        self.command = list(cmd)
        self.peer = f"worker {self.command!r}"
        self._lines: deque[str] = deque(maxlen=5)  # the last ones on its standard error
        self._log = None
        if stderr is StderrMode.PIPE:
            self._log = stderr_logger or logging.getLogger("vgi_rpc.worker")
        self._pump = threading.Thread(target=self._forward_stderr, daemon=True)
        errors = subprocess.DEVNULL if stderr is StderrMode.DEVNULL else subprocess.PIPE
        with opening(f"{self.peer} cannot be started") as opened:
            ends = []
            for _ in range(2):  # each end is in safety before the next pipe is made
                ends += [opened.enter_context(io.FileIO(fd, m)) for fd, m in zip(os.pipe(), ("rb", "wb"))]
            stdin, to_worker, from_worker, stdout = ends
            super().__init__(FdChannel(from_worker, to_worker), TransportKind.PIPE)
            with stdin, stdout:
                self.proc = subprocess.Popen(self.command, stdin=stdin, stdout=stdout, stderr=errors)
            opened.callback(self.close, 0.0)
            if self.proc.stderr is not None:
                opened.enter_context(self.proc.stderr)  # else the thread closes it
                self._pump.start()

    def _forward_stderr(self) -> None:
        source = cast("io.BufferedReader", self.proc.stderr)
        with suppress(OSError, ValueError), source:
            for line in iter(partial(source.readline, _RECEIVE_BYTES), b""):
                text = line.decode("utf-8", "replace").rstrip()
                self._lines.append(text)
                if self._log is not None:
                    self._log.info("%s", text)
                elif sys.stderr is not None:  # a program may have none
                    print(text, file=sys.stderr, flush=True)

    def _await_end(self, timeout: float) -> int | None:
        """Wait for the worker's end, and for its last words; return its exit status."""
        with suppress(self._timed_out):
            self.proc.wait(timeout)
            end = time.monotonic() + 1.0
            is_read = False  # a grandchild may hold the worker's stderr open, and be silent or talk for ever
            while not is_read and self._pump.is_alive() and time.monotonic() < end:
                is_read = not _is_ready(self.proc.stderr)
                join_thread(self._pump, 0.02)
        return self.proc.returncode

    def obituary(self) -> str:
        status = self._await_end(1.0)
        ending = f"exited with status {status}"
        if status is None:
            ending = "closed its stdout but still runs"
        elif status < 0:
            ending = f"was killed by signal {-status}"
        if self._lines:
            ending += "; its last lines on stderr:"
        return "\n  ".join([f"{self.peer} {ending}", *self._lines])

    def close(self, patience: float = WORKER_EXIT_SECONDS) -> None:
        self.channel.close()
        if os.getpid() == self.process_id:  # else the worker is another process's child
            steps = ((self.proc.poll, patience), (self.proc.terminate, 1.0), (self.proc.kill, 10.0))
            for act, timeout in steps:
                act()
                if self._await_end(timeout) is not None:
                    break


def connect_unix_socket(path: str, timeout: float | None = None) -> Transport:
    """Connect to a Unix socket; *timeout* in seconds. Raises `TransportError`."""
    with opening(f"cannot connect to unix:{path}") as opened:
        connected = opened.enter_context(socket.socket(getattr(socket, "AF_UNIX", -2)))  # -2: no such family
        connected.settimeout(timeout)
        connected.connect(path)
        return Transport(ByteChannel(connected), TransportKind.UNIX, f"unix:{path}")


def check_tls_context(context: Any) -> None:
    """Raise `TypeError` for what is no `ssl.SSLContext`, such as a file's name."""
    if context is not None and not hasattr(context, "wrap_socket"):
        raise TypeError(f"tls_context: expected an ssl.SSLContext, got {got(context)}")


def connect_tcp_socket(
    host: str, port: int, timeout: float | None = None, tls_context: Any = None, server_hostname: str = ""
) -> Transport:
    """Connect to host and port; *timeout* in seconds. Raises `TransportError`, `ValueError` for what is neither.

    With an `ssl.SSLContext` over TLS; the certificate must be for *server_hostname*, by default for *host*.
    """
    check_tls_context(tls_context)
    with opening(f"cannot connect to {host}:{port}") as opened:
        if not 0 <= int(port) <= 65_535:
            raise ValueError("expected a port of 0 to 65535")
        connected = opened.enter_context(socket.create_connection((host, port), timeout=timeout))
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls_context is not None:
            secured = tls_context.wrap_socket(connected, server_hostname=server_hostname or host)
            connected = opened.enter_context(secured)
        return Transport(ByteChannel(connected), TransportKind.TCP, f"{host}:{port}")


# ====================
# 13. SERVER CORE ... uses 1-12
# resolve -> begin -> turn -> end, for every transport: a byte stream, an HTTP request and its JSON door are thin shells
# around a `Call`. The rules of a turn (logs before data, one data batch, its deadline, cancel, the error batch, an
# answer that is too large) stand in Call and nowhere else. Law: a turn never raises what the method raised, it returns
# it. Law of a connection: after a refusal whose bytes were well framed it serves the next request.


@dataclass(eq=False)
class CallRecord:
    """The facts of one call, of one HTTP request of a stream, or of a request that was refused before its call.

    A transport fills in the first ones, which tell of the other side.
    """

    kind: TransportKind = TransportKind.PIPE
    auth: AuthContext = ANONYMOUS  # who calls
    remote_addr: str = ""  # peer address, empty for pipes
    transport_metadata: dict[str, Any] = field(default_factory=dict)  # traceparent, tracestate, remote_addr …
    gone: Callable[[], bool] | None = None  # as in `CallContext`
    response_limit_bytes: int | None = None  # what the caller accepts as one answer
    protocol: str = ""  # routing name
    method: str = ""
    request_id: str = ""
    protocol_hash: str = ""
    method_type: str = "unary"  # or "stream"
    stream_id: str = ""  # the same for every request of one stream, empty for unary calls
    request_schema: pa.Schema | None = None  # of the parameters; None for a later request of a stream
    request_rows: int = 0
    cancelled: bool = False  # by the client
    http: dict[str, Any] = field(default_factory=dict)  # http_status, request_bytes, response_bytes, path
    statistics: CallStatistics = field(default_factory=CallStatistics)
    duration_ms: float = 0.0  # set at the end


class DispatchHook(Protocol):
    """Hears of each call, on the thread that serves it: for tracing and metrics. What it raises is logged."""

    def on_dispatch_start(self, record: CallRecord) -> Any:
        """Called before the method; what it returns is handed to `on_dispatch_end`."""

    def on_dispatch_end(self, token: Any, record: CallRecord, error: BaseException | None) -> None:
        """Called after the last turn, with what the method raised."""


def log_quietly(level: int, text: str, *args: object, exc_info: Any = True) -> None:
    """Log; a handler of the application's that fails must end neither the call nor the server."""
    with suppress(Exception):
        logger.log(level, text, *args, exc_info=exc_info)


def _call_hook(hook: Any, event: str, *arguments: Any) -> Any:
    try:
        return getattr(hook, event)(*arguments)
    except BaseException:  # SystemExit too
        return log_quietly(logging.ERROR, "%s of %r raised", event, hook)


class StreamWires(NamedTuple):
    """The schemas of one stream."""

    output: WireSchema
    input: WireSchema
    template: RowTemplate | None  # of output batches of one row


@lru_cache(maxsize=256)  # a template takes as long as several turns
def stream_wires(output: pa.Schema, input: pa.Schema) -> StreamWires:
    """Return the schemas of a stream, with the row template of what it sends."""
    input_wire = WireSchema(input) if len(input) else EMPTY
    wire = WireSchema(output)
    return StreamWires(wire, input_wire, None if wire.dictionaries else row_template(output))


@dataclass(eq=False, slots=True)
class Turn:
    """What one turn sends."""

    wire: WireSchema  # of the batches
    items: list[Item]  # logs, then data, then an error
    finished: bool  # whether nothing follows
    error: BaseException | None = None  # what was raised; its error batch is the last of the items
    refused: bool = False  # whether the method was not to blame

    @property
    def http_status(self) -> int:
        """Status of an Arrow answer: 200 also for what a method raised."""
        return self.error.http_status if self.refused and isinstance(self.error, Refusal) else 200

    def last_batch(self) -> pa.RecordBatch:
        """Return the batch of the last item."""
        return batch_of(self.items[-1], self.wire)


_PLAIN_TICK = AnnotatedBatch(TICK)
# Ours in the metadata of an input batch: they concern the call, and do not reach the state.
_OWN_KEYS = frozenset({STATE_KEY, CALL_STATE_KEY, CANCEL_KEY, TIMEOUT_KEY, REQUEST_ID_KEY})


class Call(CallRecord):
    """One call being served: `begin`, for a stream `turn` after `turn`, then `end`; used by one thread at a time.

    Over HTTP each request of a stream has a call of its own, to which its `stream` is given. What the application's code
    raises stands in the turn that is returned. Making one raises `ServerDrainingError` while the server drains.
    """

    stream: Stream[Any, Any] | None = None  # once `begin` returned one, or its cursor was read
    wires: StreamWires | None = None  # of the stream
    call_state = b""  # what a stream that has begun remembers for good, encoded
    error: BaseException | None = None  # what ended it
    deadline: Time = None  # of the turn that runs
    _context: CallContext | None = None  # not made for nothing: most methods do not ask for it

    def __init__(
        self,
        server: RpcServer,
        bound: BoundMethod,
        caller: CallRecord,
        request_id: str,
        metadata: Metadata,  # of the request's batch: trace context, and the seconds that each turn may take
        request: Request | None = None,  # that began the call; None for a later one of a stream
        stream_id: str = "",  # what the requests of a stream have in common; made up when it is not known yet
    ) -> None:
        if server.draining:
            raise ServerDrainingError("the server is stopping; try again, another server may answer")
        vars(self).update(vars(caller))
        info = bound.info
        self.server = server
        self.bound = bound
        self.protocol = bound.service.name
        self.method = info.name
        self.request_id = request_id
        self.stream_id = stream_id
        self.http = {}
        self._messages: list[Message] = []
        self._timeout = None
        if TIMEOUT_KEY in metadata:
            self._timeout = read_timeout(metadata)
            self._start_clock(self._timeout)
        if not stream_id and info.method_type is MethodType.STREAM:
            self.stream_id = os.urandom(16).hex()
        if self.remote_addr or TRACE_KEYS[0] in metadata:
            extra = {key.decode(): metadata_text(metadata, key) for key in TRACE_KEYS if key in metadata}
            if self.remote_addr:
                extra["remote_addr"] = self.remote_addr
            self.transport_metadata = {**self.transport_metadata, **extra}
        self._watched = bool(server.hooks or server.access_log)
        if self._watched:
            self._started = time.monotonic()
            self.protocol_hash = bound.service.hash
            self.method_type = info.method_type.value
            self.statistics = CallStatistics()
            if request is not None:
                self.request_schema = info.params_schema
                self.request_rows = self.statistics.input_rows = request.rows
                self.statistics.input_batches = 1
            self._tokens = [_call_hook(hook, "on_dispatch_start", self) for hook in server.hooks]

    @property
    def stream_wire(self) -> WireSchema:
        """Schema of what the stream sends; of an error's batch while there is no stream."""
        if self.wires is not None:
            return self.wires.output
        return self.bound.info.result.wire if self.bound.info.method_type is MethodType.UNARY else EMPTY

    @property
    def context(self) -> CallContext:
        """What the method may ask."""
        if self._context is None:
            names = ("kind", "request_id", "response_limit_bytes", "gone")
            fields: dict[str, Any] = {name: getattr(self, name) for name in names}
            fields.update(method_name=self.method, protocol_name=self.protocol)
            fields.update(server_id=self.server.server_id, implementation=self.bound.service.implementation)
            self._context = CallContext(self.auth, self._messages.append, self.transport_metadata, **fields)
        self._context.deadline = self.deadline
        return self._context

    def _start_clock(self, timeout: float | None) -> None:
        """Set the deadline of the turn that begins now: each turn has the whole time."""
        self.deadline = None if timeout is None else time.monotonic() + timeout

    def run(self, function: Callable[..., T], args: Iterable[Any], named: Mapping[str, Any] = {}) -> T:
        """Run the application's code as the caller's; raises what it does, and when it took longer than allowed."""
        token = current_auth_var.set(self.auth)
        process = this_process[0]
        try:
            result = function(*args, **named)
        finally:
            current_auth_var.reset(token)
            if this_process[0] != process:  # a child that was forked there and has left: it serves nobody
                status = getattr(sys.exc_info()[1], "code", sys.exc_info()[1])
                os._exit(status if isinstance(status, int) else status is not None)
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise DeadlineExceededError(f"{self.method}(): the time that was allowed has passed")
        return result

    def logs(self, wire: WireSchema) -> list[Item]:
        """Take the log lines so far as batches."""
        taken = self._messages.copy()
        self._messages.clear()  # the context goes on adding to it
        return [(wire.empty, message_metadata(m, self.server.server_id, self.request_id)) for m in taken]

    def failed(self, exc: BaseException, *, refused: bool = False) -> Turn:
        """Return the turn that ends the call with *exc*, behind the log lines so far.

        *refused* tells an error that the method is not to blame for: over HTTP it has a status of its own.
        """
        self.error = exc
        if not refused and not isinstance(exc, StatusError):
            log_quietly(logging.DEBUG, "%s() raised", self.method, exc_info=exc)
        wire = self.stream_wire
        error_item = self.server.error_item(exc, wire, self.request_id)
        return Turn(wire, [*self.logs(wire), error_item], True, exc, refused)

    def begin(self, decode: Callable[[RpcMethodInfo], dict[str, Any]]) -> Turn:
        """Run the method on the arguments that *decode* gives: the whole answer of a unary one, or a stream's header turn.

        A header turn has the header's row, or no items where the method declares no header; the logs so far then
        go with the first turn. `stream` tells whether the call goes on.
        """
        info = self.bound.info
        try:
            arguments = decode(info)
        except (Refusal, StatusError) as exc:
            return self.failed(exc, refused=True)
        if self.bound.context_parameter is not None:
            arguments[self.bound.context_parameter] = self.context
        try:
            result = self.run(self.bound.function, (), arguments)
            if info.method_type is MethodType.STREAM:
                return self._begin_stream(result)
            return self._answered(info.result.wire, result_item(info, result), True)
        except BaseException as exc:  # SystemExit and KeyboardInterrupt of a method must not end the server
            self.stream = None
            self.wires = None
            return self.failed(exc)

    def _answered(self, wire: WireSchema, item: Item | None, over: bool) -> Turn:
        items = self.logs(wire) if self._messages else []
        if item is not None:
            items.append(item)
        turn = Turn(wire, items, over)
        if item is not None and self._watched:
            self.statistics.record("output", turn.last_batch())
        return turn

    def _begin_stream(self, value: Any) -> Turn:
        where = f"{self.method}() result"
        if not isinstance(value, Stream):
            raise ParameterError(f"{where}: expected a Stream, got {got(value)}")
        for part, cls in (("state", StreamState), ("output_schema", pa.Schema), ("input_schema", pa.Schema)):
            member = getattr(value, part)
            if not isinstance(member, cls):
                raise ParameterError(f"{where}: Stream.{part}: expected a {cls.__name__}, got {got(member)}")
        turn = Turn(EMPTY, [], False)
        if self.bound.info.header is not None:
            wire = self.bound.info.header.row.wire
            header = header_batch(self.bound.info, value.header)
            turn = Turn(wire, [*self.logs(wire), (header, None)], False)
        if value.call_state is not None:
            cls = value.state.CALL_STATE_TYPE
            if cls is None:
                raise ParameterError(f"{where}: {type(value.state).__name__} has no CALL_STATE_TYPE")
            encode = dataclass_codec(cls).to_bytes
            self.call_state = located(f"{where}: Stream.call_state", encode, value.call_state)
            self.run(value.state.bind_call_state, [value.call_state])
        self.stream = value
        self.wires = stream_wires(value.output_schema, value.input_schema)
        return turn

    def turn(
        self, batch: pa.RecordBatch = TICK, metadata: Metadata | None = None, fits: bool = False
    ) -> Turn:
        """Serve one turn on an input as it came, which may be a cancel; *fits*: of the input schema, and without nulls."""
        stream: Any = self.stream
        wires: Any = self.wires
        timeout = self._timeout
        received = _PLAIN_TICK
        is_producer = stream.is_producer
        if metadata:
            if CANCEL_KEY in metadata:
                return self.cancel()
            if TIMEOUT_KEY in metadata:
                timeout = read_timeout(metadata)
        self._start_clock(timeout)
        if self._watched:
            self.statistics.record("input", batch)
        out = OutputCollector(wires.output, producer_mode=is_producer)
        out.template = wires.template
        try:
            if not is_producer and not fits:
                batch = conform_batch(batch, wires.input, f"{self.method}() input", cast_values=True)
            if metadata or batch is not TICK:
                visible = {key: value for key, value in (metadata or {}).items() if key not in _OWN_KEYS}
                received = AnnotatedBatch(batch, pa.KeyValueMetadata(visible) if visible else None)
            self.run(stream.state.process, (received, out, self.context))
            out.validate()
        except BaseException as exc:  # as in begin
            self._messages += out.messages
            return self.failed(exc)
        self._messages += out.messages
        return self._answered(wires.output, out.item, out.finished)

    def cancel(self) -> Turn:
        """Tell the state, once, that the client has cancelled; return the end of the stream with its logs."""
        if not self.cancelled and self.stream is not None:
            self.cancelled = True
            self._start_clock(self._timeout)
            try:
                self.run(self.stream.state.on_cancel, [self.context])
            except BaseException as exc:  # the client is not interested any more
                log_quietly(logging.DEBUG, "on_cancel of %s raised", self.method, exc_info=exc)
        return Turn(self.stream_wire, self.logs(self.stream_wire), True)

    def end(self) -> None:
        """Report the call to the hooks and the access log."""
        if self._watched:
            self.duration_ms = (time.monotonic() - self._started) * 1000
            for hook, token in zip(self.server.hooks, self._tokens):
                _call_hook(hook, "on_dispatch_end", token, self, self.error)
            self.server.log_answer(self, self.error)


def too_large(call: Call, size: int, limit: int) -> Turn:
    """Return what takes the place of an answer of *size* bytes where at most *limit* are accepted."""
    text = f"{call.method}(): the answer exceeds max_response_bytes ({size} > {limit})"
    return call.failed(ResponseTooLargeError(text), refused=True)


def configure_access_log(path: str, server: RpcServer) -> None:
    """Append one line of JSON per answered request of *server* to the file *path*; ``-`` is standard error.

    The file stays open. Raises `OSError` when it cannot be opened.
    """
    server.access_log = sys.stderr if path == "-" else open(path, "a")


def check_limits(**limits: int | None) -> None:
    """Raise ``ValueError`` for an option that is neither a positive integer nor None."""
    for name, value in limits.items():
        if value is not None and (type(value) is not int or value <= 0):
            raise ValueError(f"{name}: expected a positive integer or None, got {value!r}")


class RpcServer:
    """Hosts one or more protocols; any number of transports and threads may serve it at the same time.

    `protocol_name`, `protocol_version` (empty when there is none), `protocol_hash`, `implementation` and `methods`
    (by name) are those of the primary protocol. Raises `TypeError` when an implementation does not fit its protocol
    (one error names everything), `ValueError` for a protocol's name that is reserved, given twice, or none.
    """

    def __init__(
        self,
        protocol: type,  # or a plain class that serves as its own protocol
        implementation: Any = None,  # the object that serves it
        *,
        extra_protocols: Sequence[tuple[type, Any]] = (),  # further pairs of these two
        server_id: str | None = None,  # 12 hex characters; made up by default
        server_version: str = "",  # free text, shown by reflection
        enable_describe: bool = True,  # whether reflection and the pages answer
        ipc_validation: IpcValidation | None = None,  # of each incoming batch; None for FULL
        include_tracebacks: bool = True,  # whether errors carry tracebacks
        max_request_bytes: int | None = None,  # of a message on byte streams; HTTP has an option of its own
        max_rows: int | None = None,  # of one batch on byte streams
    ) -> None:
        check_limits(max_request_bytes=max_request_bytes, max_rows=max_rows)
        watch_forks()
        self.limits = IpcLimits(max_request_bytes, max_rows)
        self.server_id = server_id or os.urandom(6).hex()
        self.server_version = server_version
        self.describe_enabled = enable_describe
        self.ipc_validation = ipc_validation or IpcValidation.FULL
        self.include_tracebacks = include_tracebacks
        self.services: dict[str, HostedService] = {}
        for cls, target in [(protocol, implementation), *extra_protocols]:
            service = bind_implementation(cls, target)
            if service.name in self.services or service.name.startswith(RESERVED_PROTOCOL_PREFIX):
                problem = "is given twice" if service.name in self.services else "is reserved"
                raise ValueError(f"protocol name {service.name!r} {problem}")
            self.services[service.name] = service
        if enable_describe:
            self.services[REFLECTION_PROTOCOL] = bind_implementation(Reflection, self)
        for service in self.services.values():
            service.hash = protocol_hash(service.name, [m.info for m in service.methods.values()])
        self.primary = next(iter(self.services.values()))
        self.protocol_name = self.primary.name
        self.protocol_version = self.primary.version
        self.protocol_hash = self.primary.hash
        self.implementation: Any = self.primary.implementation
        self.methods: Mapping[str, RpcMethodInfo] = {n: m.info for n, m in self.primary.methods.items()}
        self.hooks: list[DispatchHook] = []
        self.access_log: typing.TextIO | None = None  # see `configure_access_log`
        self.request_table = RequestTable()  # of methods that were called, see `resolve`
        self.draining = False
        self._running: list[None] = []  # one for each: what changes it takes no lock
        self._started: set[TransportKind] = set()
        self._lock = threading.RLock()  # of what begins once, and of the access log
        self._ended = threading.Condition(self._lock)

    def list_protocols(self) -> ProtocolList:
        """What reflection answers to ``list_protocols``: the server implements `Reflection` itself."""
        hosted = [ProtocolSummary(s.name, s.version, s.hash) for s in self.services.values()]
        return ProtocolList(self.server_id, self.server_version, REQUEST_VERSION.decode(), hosted)

    def describe(self, protocol: str) -> ProtocolDescription:
        """What reflection answers to ``describe``."""
        return describe_service(self.service(protocol))

    @cached_property
    def request_schemas(self) -> Mapping[bytes, WireSchema]:
        """The schemas that requests may have, by schema message: what an `IpcReader` of requests expects."""
        wires = [bound.info.params.wire for s in self.services.values() for bound in s.methods.values()]
        return {wire.message: wire for wire in wires}

    def service(self, name: str) -> HostedService:
        """Return a hosted protocol; `ProtocolNotSupportedError` echoes *name* only if it may be a name."""
        if name not in self.services:
            text = f"protocol {name!r} is not hosted{suggest(name, self.services)}"
            if not re.fullmatch(PROTOCOL_NAME_PATTERN, name):
                text = "the protocol key does not hold a protocol name"
            raise ProtocolNotSupportedError(f"{text}; hosted: {list(self.services)}")
        return self.services[name]

    def method(self, service: HostedService, name: str) -> BoundMethod:
        """Return a method of a hosted protocol; `MethodNotImplementedError` lists those there are."""
        if name not in service.methods:
            safe = name if len(name) <= 255 and name.isprintable() else "…"
            text = f"{service.name} has no method {safe!r}{suggest(safe, service.methods)}"
            raise MethodNotImplementedError(f"{text}; it has {sorted(service.methods)}")
        return service.methods[name]

    def resolve(self, request: Request, path: tuple[str, str] | None = None) -> BoundMethod:
        """Find the method that a request asks for; *path* is (protocol, method) where a URL names them, too.

        Raises `VersionError` when the wire's or the protocol's version is absent or not ours, `ProtocolError` when
        protocol or method is absent, not here, or not the path's.
        """
        version = request.metadata.get(REQUEST_VERSION_KEY, b"none")
        if version != REQUEST_VERSION:
            raise VersionError(f"vgi_rpc.request_version: expected {REQUEST_VERSION!r}, got {version!r:.60}")
        protocol = request.text(PROTOCOL_KEY)
        name = request.text(METHOD_KEY)
        if path is not None:
            if protocol not in (None, path[0]):
                refusal = ProtocolNotSupportedError(f"the path says {path[0]!r}, the request another one")
                refusal.http_status = 400
                raise refusal
            if name != path[1]:
                received = f"{name or 'none'!r:.100}"
                raise ProtocolError(f"the path says method {path[1]!r}, the request says {received}")
            protocol = path[0]
        if not protocol:
            text = f"the request has no 'vgi_rpc.protocol' key; this server hosts {list(self.services)}"
            raise ProtocolNotSpecifiedError(text)
        service = self.service(protocol)
        if not name:
            raise ProtocolError("the request has no 'vgi_rpc.method' key: it must name its method")
        bound = self.method(service, name)
        ours = parse_version(service.version)
        sent = metadata_text(request.metadata, PROTOCOL_VERSION_KEY)[:60]
        theirs = parse_version(sent)
        if ours is not None and theirs != ours:  # a protocol that declares none is not checked
            older = "server" if theirs is not None and theirs > ours else "client"
            if theirs is None:
                sent = f"{sent!r}, which is not MAJOR.MINOR.PATCH" if sent else "no version"
            text = f"protocol {protocol}: the server speaks {service.version}, the client sent {sent}"
            raise ProtocolVersionError(f"{text}; upgrade the {older}", protocol=protocol)
        self.request_table.add(bound)  # not before a method is called: a server starts faster so
        return bound

    def error_item(self, exc: BaseException, wire: WireSchema, request_id: str) -> Item:
        """Return the error batch of an exception: the one place where an exception becomes bytes."""
        was_raised = exc.__traceback__ is not None or not isinstance(exc, Refusal)
        message = Message.from_exception(exc, include_traceback=self.include_tracebacks and was_raised)
        return wire.empty, message_metadata(message, self.server_id, request_id)

    def start(self, kind: TransportKind) -> None:
        """Call the implementations' ``on_serve_start`` once per kind of transport.

        Raises `StatusError` (UNAVAILABLE) when one fails; the next request asks again.
        """
        if kind in self._started:
            return
        with self._lock:
            for service in self.services.values():
                try:
                    if kind not in self._started and hasattr(service.implementation, "on_serve_start"):
                        service.implementation.on_serve_start(kind)
                except BaseException as exc:
                    log_quietly(logging.ERROR, "on_serve_start(%s) of %s raised", kind, service.name)
                    text = f"{service.name} could not start: {text_of(exc)}"
                    raise StatusError(text, code=Code.UNAVAILABLE) from exc
            self._started.add(kind)

    @property
    def running(self) -> int:
        """How many requests are being answered."""
        return len(self._running)

    def __enter__(self) -> RpcServer:
        """Count the work inside ``with server`` as running, so that `drain` waits for it."""
        self._running.append(None)
        return self

    def __exit__(self, *exc: object) -> None:
        self._running.pop()
        if self.draining:
            with self._ended:
                self._ended.notify_all()

    def drain(self, grace: float = DRAIN_GRACE_SECONDS) -> bool:
        """Refuse new calls and wait up to *grace* seconds for the running ones; return whether all have ended."""
        self.draining = True
        with self._ended:
            return self._ended.wait_for(lambda: not self._running, timeout=grace)

    def add_hook(self, hook: DispatchHook) -> None:
        """Have *hook* called at the start and the end of each call, after those added before it."""
        self.hooks.append(hook)

    def log_answer(self, record: CallRecord, error: BaseException | None) -> None:
        """Write the access log's line of an answered request: never a payload, a value or a token."""
        if self.access_log is None:
            return
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        status = "ok" if error is None and record.http.get("http_status", 200) < 400 else "error"
        names = ("protocol", "protocol_hash", "method", "method_type", "remote_addr", "request_id")
        line: dict[str, Any] = {"timestamp": now[:-6] + "Z", "level": "INFO", "logger": "vgi_rpc.access"}
        line |= {name: getattr(record, name) for name in names}
        line |= {"server_id": self.server_id, "status": status, "error_type": ""}
        line["message"] = f"{record.protocol}.{record.method} {status}"
        line |= {"principal": record.auth.principal or "", "auth_domain": record.auth.domain or ""}
        line |= {"authenticated": record.auth.authenticated, "duration_ms": round(record.duration_ms, 3)}
        line |= {**record.http, **vars(record.statistics)}
        if error is not None:
            fields = error_fields(error)
            # The text of these shows what came instead of what was expected: the caller's data.
            shows = isinstance(error, (ParameterError, IPCError))
            line["error_type"] = fields["exception_type"]
            line["error_code"] = fields["error_code"]
            line["error_message"] = "(not logged: it may show values)" if shows else text_of(error)[:1000]
        optional = {"stream_id": record.stream_id, "cancelled": record.cancelled}
        line |= {name: value for name, value in optional.items() if value}
        if record.request_schema is not None:
            line["request_fields"] = [{"name": f.name, "type": str(f.type)} for f in record.request_schema]
            line["request_rows"] = record.request_rows
        text = to_json(line, default=text_of)  # in ASCII: a lone surrogate is an escape like any other
        try:
            with self._lock:
                print(text, file=self.access_log, flush=True)
        except Exception:  # full, or closed: the call has been answered all the same
            log_quietly(logging.ERROR, "the access log cannot be written")

    def serve(self, transport: Transport, *, auth: AuthContext | None = None) -> None:
        """Serve one client of a byte stream until it leaves, or the server drains; *transport* stays open."""
        serving = _ByteServing(self, transport, auth or ANONYMOUS)
        while serving.serve_next():
            # While draining, a connection in a thread of its own answers with refusals until the listener hangs
            # up; the main thread, which nobody could wake from its next read, leaves.
            if self.draining and threading.current_thread() is threading.main_thread():
                break

    def serve_one(self, transport: Transport) -> None:
        """Serve one request; otherwise as `serve`."""
        _ByteServing(self, transport, ANONYMOUS).serve_next()


def check_server(server: object) -> None:
    """Raise `TypeError` for what is no server, such as an implementation."""
    if not isinstance(server, RpcServer):
        raise TypeError(f"expected RpcServer(Protocol, implementation), got {got(server)}")


class _ByteServing:
    """Serves one byte stream, request after request."""

    def __init__(self, server: RpcServer, transport: Transport, auth: AuthContext) -> None:
        self._server = server
        self._channel = transport.channel
        gone = transport.channel.peer_gone
        self._caller = CallRecord(transport.kind, auth, transport.remote_addr, gone=gone)
        # An orphan is an input stream whose call was refused: the client had begun to send it, or does not know yet.
        # It has no method key, so it cannot be a request; one that may come is passed over.
        self._orphan_possible = False

    def serve_next(self) -> bool:
        """Serve one request; ``False`` when the connection is at its end."""
        server = self._server
        orphan_possible = self._orphan_possible
        self._orphan_possible = False
        request: Any = None
        reader = None
        try:
            data, at = self._channel.received()
            ready = server.request_table.read(data, at, server.limits.max_bytes)
            try:
                if ready is not None:
                    bound, request, self._channel.at = ready
                else:
                    reader = self._reader(server.request_schemas)
                    request = read_request(reader)
                    keys = request.metadata.keys()
                    if orphan_possible and METHOD_KEY not in keys and REQUEST_VERSION_KEY not in keys:
                        return True
                    if request.metadata.get(METHOD_KEY) == TRANSPORT_OPTIONS_METHOD.encode():
                        self._answer(None, request)
                        return True
                    bound = server.resolve(request)
                with server:  # from here on: a client that stalls within its request holds up no drain
                    server.start(self._caller.kind)
                    request_id = request.request_id or new_request_id()
                    call = Call(server, bound, self._caller, request_id, request.metadata, request, "")
                    self._serve_call(call, request)
                    return True
            except (Refusal, StatusError) as exc:  # before the call, which raises neither
                framed = ready is not None or (reader is not None and _read_over(reader))
                if request is not None or not orphan_possible:
                    self._answer(exc, request)
                    self._orphan_possible = True
                return framed
        except (EOFError, TransportError):
            return False

    def _reader(self, expected: Mapping[bytes, WireSchema] | Sequence[WireSchema]) -> IpcReader:
        return IpcReader(self._channel, self._server.limits, self._server.ipc_validation, expected=expected)

    def _answer(self, error: BaseException | None, request: Request | None) -> None:
        """Answer a request that does not become a call: a refusal, or ``__transport_options__``."""
        metadata: Metadata = {} if request is None else request.metadata
        record = copy.copy(self._caller)
        record.request_id = (request and request.request_id) or new_request_id()
        record.protocol = metadata_text(metadata, PROTOCOL_KEY)[:255]
        record.method = metadata_text(metadata, METHOD_KEY)[:255]
        server_id = self._server.server_id.encode()
        options = {SHM_KEY: b"false", REQUEST_VERSION_KEY: REQUEST_VERSION, SERVER_ID_KEY: server_id}
        item: Item = (TICK, options)  # shared memory is not offered
        if error is not None:
            item = self._server.error_item(error, EMPTY, record.request_id)
        try:
            IpcWriter(self._channel.write, EMPTY).write_all([item], close=True)
        finally:
            self._server.log_answer(record, error)

    def _serve_call(self, call: Call, request: Request) -> None:
        try:
            turn = call.begin(request.arguments)
            if turn.items:
                self._write(call, turn, lambda t: self._channel.write(stream_pieces(t.wire, t.items)))
            if call.wires is not None:
                self._serve_turns(call, call.wires)
            else:
                self._orphan_possible = bool(call.stream_id)
        except (EOFError, TransportError) as exc:  # the client went away
            call.error = call.error or exc
            raise
        finally:
            call.end()

    def _write(self, call: Call, turn: Turn, send: Callable[[Turn], None]) -> bool:
        """Send a turn, or the error that it cannot be written; return whether the stream is over."""
        try:
            send(turn)
        except Refusal as exc:
            call.wires = None
            call.error = exc
            turn = Turn(turn.wire, [self._server.error_item(exc, turn.wire, call.request_id)], True)
            send(turn)
        return turn.finished

    def _serve_turns(self, call: Call, wires: StreamWires) -> None:
        """Lockstep: a batch comes, a turn answers, until either side ends."""
        channel = self._channel
        writer = IpcWriter(channel.write, wires.output)
        reader = None
        finished = False
        tick = EMPTY.empty_message  # as our own clients write it
        while not finished:
            try:
                reader = reader or self._reader((wires.input, EMPTY))
                item: Any = ()
                if reader.wire is EMPTY and channel.received()[0].startswith(tick, channel.at):
                    channel.at += len(tick)
                else:
                    message = reader.next_message()
                    fits = message is not None and reader.wire is wires.input and not message.has_nulls
                    item = message and (reader.decode(message), message.metadata, fits)
                # None: the client has closed its side
                turn = Turn(wires.output, [], True) if item is None else call.turn(*item)
            except Refusal as exc:  # of the input: a turn raises nothing
                turn = call.failed(exc, refused=True)
            finished = self._write(call, turn, lambda t: writer.write_all(t.items, close=t.finished))
        if reader is None or not _read_over(reader):
            raise EOFError("where the next request begins is not known")


def _read_over(reader: IpcReader) -> bool:
    """Read to the end of a stream; ``False`` when its bytes make no sense, so that nobody knows where it ends."""
    try:
        reader.read_to_end()
        return True
    except IPCError as exc:
        log_quietly(logging.DEBUG, "connection closed: %s", exc, exc_info=False)
        return False


# ====================
# 14. CLIENT ... uses 1-13
# One proxy and one StreamSession over a small interface with two implementations: byte streams here, HTTP in 19.
# Law: an argument that does not fit fails before a byte is sent. After an answer, an error included, the connection
# serves the next call; after anything else it is closed, and says so to every thread.
#
# A stream, as its client sees it:             A byte stream's connection:
#   OPEN -- our input is at its end --> ENDING   READY ---- something is about to be written -----> CALLING
#   ENDING -- both directions are ----> DONE     CALLING -- the answer to it was read whole ------> READY
#   any --- lost, or another call ----> CUT      CALLING -- anything else, interrupts included ---> CLOSED
StreamPhase = enum.Enum("StreamPhase", "OPEN ENDING DONE CUT")
ConnectionPhase = enum.Enum("ConnectionPhase", "READY CALLING CLOSED")
_SLOW_TURN_SECONDS = 0.01  # of a producer
_PRINTED = rb"[\t\n\r\x1b -\xfe]{1,200}"  # text before an answer, which begins with FF


@dataclass(eq=False, repr=False)
class CallOptions:
    """How one proxy calls. Raises `ValueError` for a timeout or a prefetch that is none."""

    on_log: ClientLog | None = None  # takes the server's log lines, None drops them
    timeout: float | None = None  # seconds per call or turn, None for no limit
    ipc_validation: IpcValidation = IpcValidation.FULL  # how much of each answer is checked
    prefetch: int | None = None  # turns that iteration asks for at a time; None for what suits the transport

    def __post_init__(self) -> None:
        if self.prefetch is not None and self.prefetch < 1:
            raise ValueError(f"prefetch: expected 1 or more, or None for the default, got {self.prefetch!r}")
        if self.timeout is not None and not 0 < self.timeout <= threading.TIMEOUT_MAX:
            raise ValueError(f"timeout: expected seconds above 0, or None for no limit, got {self.timeout!r}")

    @property
    def deadline(self) -> Time:
        """When a call or turn that begins now must have ended."""
        return None if self.timeout is None else time.monotonic() + self.timeout

    def turn_metadata(self, metadata: Metadata | None) -> dict[bytes, bytes]:
        """Return the metadata of a turn's input: *metadata*, and how long the turn may take."""
        own = {} if self.timeout is None else {TIMEOUT_KEY: b"%d" % max(1, int(self.timeout * 1000))}
        return {**metadata, **own} if metadata else own


def local_error(text: str) -> RpcError:
    """Return the error for a wrong use of a proxy or session, for which nothing was sent."""
    return RpcError("ProtocolError", text, "")


def next_reply(reader: IpcReader, options: CallOptions) -> BatchMessage | None:
    """Read on to an answer's next batch of data or tokens, ``None`` at the end; log lines go to ``on_log``.

    Raises the `RpcError` that the answer is, with the reader behind its batch; `IPCError` for what is no answer.
    """
    while True:
        message = reader.next_message()
        if message is None or not message.metadata:
            return message
        role = batch_role(message.rows, message.metadata)
        if role == "data" or role == "token":
            return message
        if role == "error":
            raise error_from_metadata(message.metadata)
        if role != "log":
            raise IPCError("the answer points to external storage or shared memory, which is not read here")
        try:
            if options.on_log is not None:
                options.on_log(message_from_metadata(message.metadata))
        except Exception:
            logger.exception("on_log raised; the call goes on")


def only_batch(info: RpcMethodInfo, reader: IpcReader, message: BatchMessage | None) -> pa.RecordBatch:
    """Decode a result or a header, and read its stream to the end."""
    if message is None:
        raise IPCError(f"{info.name}(): expected a result or header, got an end of stream")
    batch = reader.decode(message)
    reader.read_to_end()
    return batch


def reply_batch(reader: IpcReader, message: BatchMessage) -> AnnotatedBatch:
    """Decode a batch of an answer, without the state tokens."""
    batch = reader.decode(message)
    visible = {k: value for k, value in message.metadata.items() if k not in (STATE_KEY, CALL_STATE_KEY)}
    return AnnotatedBatch(batch, pa.KeyValueMetadata(visible) if visible else None)


class StreamSession:
    """A running stream, on the client; a context manager, which closes it. Not for use by several threads at once.

    A producer is iterated over, or read as a whole: `to_table`, `reader`, and by whatever takes Arrow streams
    (``pa.table(session)``, ``polars.DataFrame(session)``). An exchange is asked by `exchange` or `exchange_all`.
    After an error of the server the stream is over, and the connection serves the next call.
    """

    header_batch: pa.RecordBatch | None = None  # one row; None when the method declares no header

    def __init__(self, info: RpcMethodInfo, options: CallOptions) -> None:
        self.info = info
        self.options = options
        self.phase = StreamPhase.OPEN
        self._over = "is closed"  # or what else became of it, once it is over
        self._schema: pa.Schema | None = None  # of the batches that come, once an answer has told it
        self._input: WireSchema | None = None  # of the first input
        self._waiting: deque[AnnotatedBatch] = deque()  # batches that came and were not handed out
        self._in_flight = 0  # inputs whose answers were not read

    def _fetch(self, sent: tuple[pa.RecordBatch | bytes, Any] | None) -> None:
        """Send an input and its metadata, or (``None``) a tick that others may follow; what is answered waits."""
        raise NotImplementedError

    def _end(self, cancels: bool) -> None:
        raise NotImplementedError

    def _turn(self, sent: tuple[pa.RecordBatch | bytes, Any] | None) -> AnnotatedBatch | None:
        self._fetch(sent)
        if self._waiting:
            return self._waiting.popleft()
        self.phase = StreamPhase.DONE
        return None

    def _cut(self, reason: str) -> None:
        self.phase = StreamPhase.CUT
        self._over = reason

    def _check_open(self) -> None:
        if self.closed:
            raise local_error(f"the stream of {self.info.name}() {self._over}")

    def _check_kind(self, is_exchange: bool, use: str) -> None:
        takes_input = self._input is not None or self.info.is_exchange
        if takes_input is not None and takes_input is not is_exchange:
            text = "an exchange: call exchange(batch)" if takes_input else "a producer without input: iterate"
            raise ParameterError(f"{self.info.name}() is {text} instead of {use}")

    @cached_property
    def header(self) -> Any:
        """The header, ``None`` when the method declares none; `TypeError` if it is not what the method declares."""
        if self.header_batch is None or self.info.header is None:
            return None
        return located(f"{self.info.name}() header", self.info.header.from_batch, self.header_batch)

    def typed_header(self, header_type: type[T]) -> T:
        """Return the header as *header_type*; `TypeError` when there is none, or one of another type."""
        if isinstance(self.header, header_type):
            return self.header
        expected = f"{self.info.name}() header: expected {header_type.__name__}"
        raise ParameterError(f"{expected}, got {got(self.header)}")

    @property
    def schema(self) -> pa.Schema:
        """What each batch looks like. A producer may have to be asked for its first one, which is kept; that of an
        exchange comes with its first answer (`RpcError` before), over HTTP with the stream."""
        if self._schema is None:
            if self.info.is_exchange:
                raise local_error(f"{self.info.name}(): the schema comes with the first answer")
            self._fetch(None)
        return self._schema

    def __iter__(self) -> Iterator[AnnotatedBatch]:
        """Yield each batch of a producer until it finishes; `RpcError` when a turn failed or another call ended it.

        While batches come quickly, some are asked for ahead: the producer then runs further than was read, by at most
        `MAX_PREFETCH` turns on a byte stream and `MAX_TURNS` over HTTP, unless ``with_options(proxy, prefetch=1)``.
        `tick` asks for none ahead, but first gets those that were asked for; its metadata is for the turn behind them.
        """
        self._check_kind(False, "iterating")
        while self.phase is not StreamPhase.DONE and (answer := self._turn(None)) is not None:
            yield answer

    def tick(self, custom_metadata: Metadata | None = None) -> AnnotatedBatch:
        """Ask a producer for one batch; its state sees the metadata. `StopIteration` at the end, else as iteration."""
        self._check_kind(False, "tick()")
        metadata = pa.KeyValueMetadata(dict(custom_metadata)) if custom_metadata else None
        answer = self._turn((TICK, metadata))
        if answer is None:
            raise StopIteration
        return answer

    def to_table(self) -> pa.Table:
        """Return the batches that are still to come as one table, without their metadata; raises as iteration."""
        return self.reader().read_all()

    def reader(self) -> pa.RecordBatchReader:
        """Return a reader of the batches that are still to come, without metadata, each read when it is needed."""
        self._check_kind(False, "reading")
        return pa.RecordBatchReader.from_batches(self.schema, (item.batch for item in self))

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Hand the batches to another library (the Arrow PyCapsule interface); as `reader`."""
        return self.reader().__arrow_c_stream__(requested_schema)

    def exchange(
        self, input: AnnotatedBatch | pa.RecordBatch | pa.Table | Mapping[str, Any]
    ) -> AnnotatedBatch:
        """Send a batch and return its answer, any rows x the columns of `schema`.

        *input* is a batch, with metadata or without, a table, which goes as one batch, or ``{column: values}``. The
        server casts it where that is safe; so are later inputs to the types of the first one. Raises `RpcError` when
        the turn failed or the stream is closed, `TypeError` for another input and for a producer.
        """
        self._check_kind(True, "exchange()")
        if self._in_flight or self._waiting:
            raise local_error("exchange() on a stream that was asked for batches ahead, as by iteration")
        where = f"{self.info.name}() exchange"
        batch = input.batch if isinstance(input, AnnotatedBatch) else input
        if not isinstance(batch, (pa.RecordBatch, pa.Table)):
            if not isinstance(batch, Mapping):
                expected = "expected a batch, table or {column: values}"
                raise ParameterError(f"{where}: {expected}, got {got(batch)}")
            # Of types that are inferred, and cast below: pyarrow would cut 2.5 for a column of integers.
            batch = batch_from_pydict(batch, None, where)
        self._input = self._input or WireSchema(batch.schema)
        where += ", as in its first input"
        batch = self._input.plain_message(batch) or conform_batch(batch, self._input, where, cast_values=True)
        answer = self._turn((batch, getattr(input, "custom_metadata", None)))
        if answer is None:
            raise local_error(f"{self.info.name}() finished instead of answering")
        return answer

    def exchange_all(self, batches: Any) -> pa.RecordBatchReader:
        """Send each of *batches* (an iterable of what `exchange` takes, a reader, a table, another session) and return
        a reader of the answers, without metadata. Each turn runs when its answer is read, the first one at once. The
        stream stays open, unless there is no input and only closing it tells its schema. Raises as `exchange`."""
        self._check_kind(True, "exchange_all()")
        if isinstance(batches, (AnnotatedBatch, pa.RecordBatch, Mapping)):
            raise ParameterError(f"exchange_all(): expected an iterable of batches, got one {got(batches)}")
        inputs = batches.to_batches() if isinstance(batches, pa.Table) else batches
        answers = (self.exchange(batch).batch for batch in inputs)
        for first in answers:
            return pa.RecordBatchReader.from_batches(first.schema, itertools.chain([first], answers))
        if self._schema is None:
            self.close()
        return pa.RecordBatchReader.from_batches(self.schema, [])

    def token(self) -> bytes:
        """Return what `resume` needs to go on behind the last batch handed out; `RpcError` once nothing follows. HTTP only."""
        raise local_error("only streams over HTTP can be resumed: elsewhere the connection keeps the state")

    def seek_to_token(self, token: bytes) -> None:
        """Go on where *token* was taken; raises as `resume`."""
        self.token()

    def next_with_token(self, custom_metadata: Any = None) -> tuple[AnnotatedBatch | None, bytes | None]:
        """Ask a producer for one batch; return it with the `token` behind it. ``None`` stands for what there is not."""
        answer = token = None
        with suppress(StopIteration):
            answer = None if self.closed else self.tick(custom_metadata)
        with suppress(RpcError):
            token = self.token()
        return answer, token

    @property
    def closed(self) -> bool:
        """Whether the stream has finished, failed, or was closed or cancelled."""
        return self.phase is StreamPhase.DONE or self.phase is StreamPhase.CUT

    def close(self) -> None:
        """End the stream; may be called twice. The connection serves the next call."""
        self._end(False)

    def cancel(self) -> None:
        """End the stream and have the state's ``on_cancel`` run; may be called twice."""
        self._end(True)

    def __enter__(self) -> StreamSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class ClientChannel:
    """How calls reach a server: the interface under a proxy. *row* is that of `encode_arguments`."""

    def call(self, info: RpcMethodInfo, row: list[Any], options: CallOptions) -> Any:
        """Call a method; return its decoded result, or the `StreamSession` that it has started."""
        raise NotImplementedError

    def resume(self, info: RpcMethodInfo, token: bytes, options: CallOptions) -> StreamSession:
        """Go on with a stream from a saved token."""
        raise local_error("only streams over HTTP can be resumed")

    def close(self) -> None:
        """Give back connections; calls are refused afterwards."""
        raise NotImplementedError


class ByteClient(ClientChannel):
    """Calls over one byte stream, closed with it, one at a time; threads take turns. A call ends an open stream.

    Only the thread that holds the connection changes its phase. One that takes it and finds CALLING knows that the
    thread before it left in the middle of a call, however that happened.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.channel = transport.channel
        self.phase = ConnectionPhase.READY
        self.stream: _ByteSession | None = None  # the one that is open
        self._orphan_possible = False  # what was sent last may be an orphan (section 13)
        self._closed_because = ""
        self._lock = threading.RLock()  # since only this kind knows whether it is ours, see `_leave`
        self._owner = 0  # the thread that holds it

    def own(self, options: CallOptions, step: Callable[..., T], *arguments: Any) -> T:
        """Run *step* with the connection to itself, within the time that *options* give it."""
        self.transport.check_process()
        me = threading.get_ident()
        if self._owner == me:
            raise local_error("a call is running on this connection: on_log cannot make another one on it")
        deadline = options.timeout and options.deadline
        # Left twice, as an interrupt may come while it is left: no way out may keep the lock.
        try:
            try:
                if not self._lock.acquire(True, options.timeout or -1):
                    raise DeadlineExceededError("no answer in time: other threads use the connection")
                self._owner = me
                if self._closed_because or self.phase is not ConnectionPhase.READY:
                    self._closed_because = self._closed_because or "a call was interrupted"
                    raise TransportError(f"the connection is closed: {self._closed_because}")
                self.channel.deadline = deadline
                result = step(*arguments)
                self.phase = ConnectionPhase.READY
                return result
            except BaseException as exc:
                if self._owner == me and self.phase is ConnectionPhase.CALLING:
                    raise self._lost(exc) from None  # else nothing was sent, or the answer was read whole
                raise
            finally:
                self._leave(me)
        except BaseException:
            self._leave(me)
            raise

    def _leave(self, me: int) -> None:
        if self._owner == me:
            self._owner = 0
        try:
            self._lock.release()
        except RuntimeError:  # not ours: it was never taken, or is given back already
            pass

    def _lost(self, exc: BaseException) -> BaseException:
        """Close the connection, which nobody can use after *exc*; return what the caller is to see."""
        reason = f"a call was interrupted by {type(exc).__name__}"
        if isinstance(exc, DeadlineExceededError):
            reason = exc.error_message
        elif isinstance(exc, (EOFError, Refusal, RpcError)):
            reason = f"not an answer: {text_of(exc)}"
            if self._closed_because:  # in the middle of the call, by another thread
                reason = f"the connection is closed: {self._closed_because}"
            elif isinstance(exc, (EOFError, TransportError)) or self.channel.ended:
                reason = self.transport.obituary()
            exc = TransportError(reason)
        self._closed_because = self._closed_because or reason.partition("\n")[0]
        self.phase = ConnectionPhase.CLOSED
        if self.stream is not None:
            self.stream._cut(f"was cut off: {self._closed_because}")
        self.transport.close(0.0)
        return exc

    def call(self, info: RpcMethodInfo, row: list[Any], options: CallOptions) -> Any:
        return self.own(options, self._call, info, row, options)

    def _call(self, info: RpcMethodInfo, row: list[Any], options: CallOptions) -> Any:
        request_id = new_request_id()
        request = request_pieces(info, row, request_id, options.timeout)
        if self.stream is not None:
            self._end_stream("was ended by another call on its connection; read it first, or connect twice")
        self.phase = ConnectionPhase.CALLING
        try:
            self.channel.write(request)
        except TransportError:  # a worker that has gone may have left its last words in the pipe
            self.channel.deadline = time.monotonic() + 1.0
        if info.method_type is MethodType.STREAM:
            self.stream = _ByteSession(self, info, options, request_id)
            if info.header is not None:
                header = self.read(None, request_id, options, info.header.row.wire)
                self.stream.header_batch = only_batch(info, *header)
            return self.stream
        ready = read_result(info, *self.channel.received())
        if ready is not None:
            self.channel.at = ready[1]
            self._orphan_possible = False
            return ready[0]
        batch = only_batch(info, *self.read(None, request_id, options, info.result.wire))
        self.phase = ConnectionPhase.READY
        return decode_result(info, batch)

    def _end_stream(self, why: str) -> None:
        stream = cast("_ByteSession", self.stream)
        stream.finish()
        stream._cut(why)

    def read(
        self, reader: IpcReader | None, request_id: str, options: CallOptions, *expected: WireSchema
    ) -> tuple[IpcReader, BatchMessage | None]:
        """Read on to the next batch of an answer; without *reader* it is opened, and that to an orphan passed over.

        Raises the `RpcError` that the answer is, which was then read to its end and has ended the stream.
        """
        opens = reader is None
        orphan_possible = self._orphan_possible
        self._orphan_possible = False
        while True:
            if reader is None:
                data, at = self.channel.received()
                printed = re.match(_PRINTED, data[at : at + 200])
                if printed:
                    text = printed[0].decode("utf-8", "replace").strip()
                    who = f"{self.transport.peer} prints to the channel"
                    self._closed_because = f"expected Arrow IPC, got text: {text!r} ({who})"
                    raise EOFError
                reader = IpcReader(self.channel, validation=options.ipc_validation, expected=expected)
            try:
                return reader, next_reply(reader, options)
            except RpcError as exc:
                if not was_answer(exc):
                    raise
                reader.read_to_end()
                if not orphan_possible or exc.request_id in ("", request_id):
                    if self.stream is not None:
                        self.stream.finish(read=False)
                        # A call that was begun reads our input to its end; one that was refused does not.
                        self._orphan_possible = opens
                    self.phase = ConnectionPhase.READY
                    raise
            orphan_possible = False
            reader = None

    def release(self) -> bool:
        """End an open stream and refuse further calls; return whether the transport may serve another client."""
        fit = False
        with suppress(RpcError):
            fit = self.own(CallOptions(timeout=1.0), self._retire)
        self._closed_because = self._closed_because or "it was closed here"
        return fit

    def _retire(self) -> bool:
        if self.stream is not None:
            self._end_stream("was ended with its connection")
        self._closed_because = "it was closed here"
        return not self._orphan_possible

    def close(self) -> None:
        self.release()
        self.transport.close()


class _ByteSession(StreamSession):
    """A stream on a `ByteClient`, one IPC stream each way. That of the inputs is opened with the schema of the first
    one; closing an unused stream opens it on the empty schema."""

    def __init__(self, client: ByteClient, info: RpcMethodInfo, options: CallOptions, request: str) -> None:
        super().__init__(info, options)
        self._client = client
        self._request_id = request
        self._writer: IpcWriter | None = None
        self._reader: IpcReader | None = None
        self._ahead = 1  # how many ticks to have in flight, as things go

    def _write(self, items: Sequence[Item], close: bool = False) -> None:
        self._writer = self._writer or IpcWriter(self._client.channel.write, self._input or EMPTY)
        self._writer.write_all(items, close=close)

    def _read(self) -> BatchMessage | None:
        self._reader, message = self._client.read(self._reader, self._request_id, self.options)
        self._schema = self._reader.schema
        return message

    def finish(self, cancels: bool = False, read: bool = True) -> None:
        """End our side, and then the other one: its end is *read*."""
        if self.closed:  # another thread's call ended it while this one waited for the connection
            return
        if self.phase is StreamPhase.OPEN:
            self._client.phase = ConnectionPhase.CALLING
            self.phase = StreamPhase.ENDING
            empty = (self._input or EMPTY).empty
            self._write([(empty, {CANCEL_KEY: b"1"})] if cancels else [], close=True)
        try:
            while read and self._read() is not None:
                pass
        except RpcError as exc:
            if not was_answer(exc):  # nobody waits for the server's error on a stream that is being closed
                raise
        self.phase = StreamPhase.DONE
        self._client.stream = None

    def _end(self, cancels: bool) -> None:
        if not self.closed:
            self._client.own(self.options, self.finish, cancels)

    def _fetch(self, sent: tuple[pa.RecordBatch | bytes, Any] | None) -> None:
        self._client.own(self.options, self._ask, sent)

    def _ask(self, sent: tuple[pa.RecordBatch | bytes, Any] | None) -> None:
        self._check_open()
        unread = self._in_flight + len(self._waiting)
        count = 0
        if sent is None:
            # The server may block on writing while we do not read, but we never do while it does not: all the ticks
            # that can be unread (MAX_PREFETCH) fit many times over into the smallest buffer between two processes.
            sent = (TICK, None)
            if 2 * unread <= self._ahead:
                count = self._ahead - unread
        elif not unread or sent[1] is not None:
            count = 1
        self._client.phase = ConnectionPhase.CALLING
        if count:
            item: Item = (sent[0], self.options.turn_metadata(sent[1]))
            self._write([item if item[1] or item[0] is not TICK else EMPTY.empty_message] * count)
            self._in_flight += count
        if not self._waiting:
            started = time.monotonic()
            message = self._read()
            if message is None or self._reader is None:
                self.finish()
                return
            # Large batches fill the buffers between us: to ask for more would not help. A slow producer is not asked
            # ahead: its work may not be wanted, and close() would wait for it.
            most = 2 if len(message.data) > SMALL_BODY_BYTES else MAX_PREFETCH
            is_slow = time.monotonic() - started > _SLOW_TURN_SECONDS
            self._ahead = 1 if is_slow else min(2 * self._ahead, most, self.options.prefetch or most)
            self._in_flight -= 1
            self._waiting.append(reply_batch(self._reader, message))


class RpcConnection(Generic[P]):
    """A connection and the typed proxy of *protocol* in one: each of its methods is an attribute.

    Leaving ``with`` closes it; without ``with``, `close` does. Within ``with``, and on what `with_options` returns, a
    method of the service that is itself called ``close`` is that method. *transport* is a transport or another
    `ClientChannel`, or a function that returns one, called on entering or at the first use. It is closed with the
    connection, and when *protocol* has mistakes: a `TypeError` that names all of them. The other arguments are those
    of `with_options`.
    """

    def __init__(
        self,
        protocol: ProtocolClass[P],
        transport: Transport | ClientChannel | Callable[[], Transport | ClientChannel],
        on_log: ClientLog | None = None,
        *,
        timeout: float | None = None,
        ipc_validation: IpcValidation = IpcValidation.FULL,
    ) -> None:
        self._transport = transport
        self._lock = threading.Lock()  # threads that use it first together dial once
        self._opened: ClientChannel | None = None
        try:
            self._protocol = cast("type", protocol)
            self._options = CallOptions(on_log, timeout, ipc_validation)
            self._methods = rpc_methods(self._protocol)
        except BaseException:
            if not callable(transport):
                transport.close()
            raise
        if not callable(transport):
            self._open()

    def _open(self) -> ClientChannel:
        """Return the channel; the first time, dial."""
        with self._lock:
            if self._opened is None:
                dial = self._transport
                transport = dial() if callable(dial) else dial
                if isinstance(transport, Transport):
                    transport = ByteClient(transport)
                if not isinstance(transport, ClientChannel):
                    raise TypeError(f"expected a transport, got {got(transport)}")
                self._opened = transport
                if self._transport is not dial:  # closed meanwhile
                    RpcConnection.close(self)
                    self._transport()  # type: ignore[operator]
            return self._opened

    @property
    def _channel(self) -> ClientChannel:
        return self._opened or self._open()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        info = self._methods.get(name)
        if info is None:
            near = suggest(name, self._methods)
            raise AttributeError(f"{self._protocol.__qualname__} has no method {name!r}{near}")
        call = self._channel.call
        options = self._options

        def method(*args: Any, **kwargs: Any) -> Any:
            return call(info, encode_arguments(info, bind_arguments(info, args, kwargs)), options)

        declared = getattr(self._protocol, name)
        signature = inspect.signature(declared)
        own = [signature.parameters[parameter] for parameter in info.param_types]
        update_wrapper(method, declared)
        method.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        self.__dict__[name] = method  # where Python finds it from now on
        return method

    def close(self) -> None:
        """Close it; may be called twice."""

        def closed() -> Transport:
            raise TransportError("the connection is closed: it was closed here")

        self._transport = closed
        if self._opened is not None:
            self._opened.close()

    def __enter__(self) -> P:
        self._open()
        if "close" in self._methods:
            self.__getattr__("close")
        return cast("P", self)

    def __exit__(self, *exc: object) -> None:
        RpcConnection.close(self)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._methods})

    def __repr__(self) -> str:
        over = type(self._opened).__name__ if self._opened else "no connection yet"
        return f"<proxy of {self._protocol.__qualname__} over {over}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"{self!r} holds a connection and cannot be copied or pickled; connect again instead")


def _connection(target: Any, what: str) -> RpcConnection[Any]:
    if not isinstance(target, RpcConnection):
        raise TypeError(f"{what}: expected a proxy, got {got(target)}")
    return target


_SAME: Any = object()  # an option that stays as it is


def with_options(
    proxy: P,
    *,
    timeout: float | None = _SAME,
    on_log: ClientLog | None = _SAME,
    ipc_validation: IpcValidation = _SAME,
    prefetch: int | None = _SAME,
) -> P:
    """Return a proxy on the same connection with other options; those that are not given stay as they are.

    *timeout* is seconds per call or turn, ``None`` for no limit; *on_log* takes the server's log lines; *prefetch* is
    how many turns iteration asks for at a time, 1 for lockstep; *ipc_validation* is how much of an answer is checked.
    """
    options = {"timeout": timeout, "on_log": on_log, "ipc_validation": ipc_validation, "prefetch": prefetch}
    old = _connection(proxy, "with_options")
    new: RpcConnection[P] = RpcConnection(cast("ProtocolClass[P]", old._protocol), old._channel)
    changes: dict[str, Any] = {name: value for name, value in options.items() if value is not _SAME}
    new._options = dataclasses.replace(old._options, **changes)
    return new.__enter__()


def resume(proxy: Any, method: str, token: bytes) -> StreamSession:
    """Go on with a stream where its `StreamSession.token` was taken, also in another process; HTTP only.

    Raises `RpcError` when *method* is not a stream of the proxy, or *token* not one of its tokens. Whether the server
    takes it shows at the next turn.
    """
    connection = _connection(proxy, "resume")
    info = connection._methods.get(method)
    if info is None or info.method_type is not MethodType.STREAM:
        raise local_error(f"resume: {method!r} is not a stream of {connection._protocol.__qualname__}")
    return connection._channel.resume(info, token, connection._options)


def list_protocols(target: Any) -> list[ProtocolSummary]:
    """Return what the server behind a proxy or transport hosts, the application's first; raises `RpcError`."""
    listed: ProtocolList = _reflection(target).list_protocols()
    return listed.protocols


def describe_protocol(target: Any, name: str) -> ServiceDescription:
    """Return what the server behind a proxy or transport says of the protocol *name*; raises `RpcError`."""
    return introspect(target, protocol=name)


def introspect(target: Any, *, protocol: str | None = None) -> ServiceDescription:
    """Return the description of *protocol*, by default the server's primary one; raises `RpcError`."""
    proxy = _reflection(target)
    listed: ProtocolList = proxy.list_protocols()
    names = [summary.protocol for summary in listed.protocols]
    names.sort(key=lambda name: name.startswith(RESERVED_PROTOCOL_PREFIX))
    return service_description(listed, proxy.describe(protocol or names[0]))


def _reflection(target: Any) -> Any:
    """A proxy of the reflection protocol on the connection of a proxy, a transport or a channel."""
    if isinstance(target, (Transport, ClientChannel)):
        return RpcConnection(Reflection, target)
    proxy = _connection(target, "introspection")
    return RpcConnection(Reflection, proxy._channel, timeout=proxy._options.timeout)


class PoolMetrics(NamedTuple):
    """What a `WorkerPool` has done so far, and what it holds: counts of workers."""

    borrows: int = 0  # times that `WorkerPool.connect` was entered
    spawns: int = 0  # workers started for it …
    reuses: int = 0  # … or taken from the idle ones
    returns: int = 0  # workers that came back fit to be used again
    discards: int = 0  # workers ended because they were not, or the pool was closed
    evictions_idle: int = 0  # workers ended because nobody wanted them for `idle_timeout`
    evictions_max: int = 0  # workers ended because there were more than `max_idle`
    idle: int = 0
    active: int = 0


class WorkerPool:
    """Keeps workers between connections, so that the next one of the same command does not wait for a start.

    A worker serves one connection at a time and is checked before each: one that died, hung up, printed to the
    channel or was left in the middle of a call is ended instead. At most *max_idle* workers wait, whatever their
    commands, for *idle_timeout* seconds; the longest idle one goes first, and one that dies is reaped within a
    second. Safe for use by several threads. A forked child begins with an empty pool. Also a context manager.
    """

    def __init__(
        self,
        max_idle: int = 4,
        idle_timeout: float = 60.0,
        stderr: StderrMode = StderrMode.INHERIT,
        stderr_logger: logging.Logger | None = None,
    ) -> None:
        if max_idle < 0:
            raise ValueError(f"max_idle: expected 0 or more, got {max_idle!r}")
        if not 0 < idle_timeout <= threading.TIMEOUT_MAX:
            raise ValueError(f"idle_timeout: expected seconds above 0, got {idle_timeout!r}")
        self.max_idle = max_idle
        self.idle_timeout = idle_timeout
        self._start = partial(SubprocessTransport, stderr=stderr, stderr_logger=stderr_logger)
        self._closed = False
        self._process = 0  # whose the workers are
        self._locked()  # here, where no other thread asks for it

    def _locked(self) -> threading.Condition:
        """Return the lock, in a forked child one of its own: another thread may have held its parent's."""
        if self._process != os.getpid():
            self._changed = threading.Condition()
            self._idle: dict[SubprocessTransport, float] = {}  # since when, the longest idle one first
            self._active: set[SubprocessTransport] = set()
            self._counts = dict.fromkeys(PoolMetrics._fields, 0)
            self._sweeper: threading.Thread | None = None  # sweeps while somebody is idle
            self._process = os.getpid()  # last: who sees it finds all the others
        return self._changed

    @property
    def metrics(self) -> PoolMetrics:
        """The counts as they are now."""
        with self._locked():
            return PoolMetrics(**{**self._counts, "idle": len(self._idle), "active": len(self._active)})

    idle_count = property(operator.attrgetter("metrics.idle"), doc="How many workers wait.")
    active_count = property(operator.attrgetter("metrics.active"), doc="How many workers serve a connection.")

    @contextmanager
    def connect(
        self,
        protocol: ProtocolClass[P],
        cmd: Sequence[str],
        *,
        on_log: ClientLog | None = None,
        timeout: float | None = None,
        ipc_validation: IpcValidation = IpcValidation.FULL,
    ) -> Iterator[P]:
        """Give a proxy to a worker of that command; on leaving, an open stream is ended, and it goes back. Both may
        wait some seconds for idle workers that are to end.

        Raises `TransportError` on entering, when the program cannot be started or the pool is closed.
        """
        self._sweep()
        with self._locked():
            self._counts["borrows"] += 1
            if self._closed:
                raise TransportError("the pool is closed")
            # The one that waited least: others may reach their time.
            worker = next((idle for idle in reversed(self._idle) if idle.command == list(cmd)), None)
            self._idle.pop(cast("SubprocessTransport", worker), None)
        origin = "reuses" if worker else "spawns"
        worker = worker or self._start(cmd)
        with self._locked():
            self._counts[origin] += 1
            self._active.add(worker)
        client = ByteClient(worker)
        try:
            proxy = RpcConnection(protocol, client, on_log, timeout=timeout, ipc_validation=ipc_validation)
            yield proxy.__enter__()
        finally:
            self._give_back(worker, client.release() and not sys.is_finalizing())

    def _give_back(self, worker: SubprocessTransport, fit: bool) -> None:
        with self._locked():
            if worker not in self._active:  # it was borrowed before a fork, and is the parent's
                return
            self._active.remove(worker)
            fit = fit and not self._closed
            self._counts["returns" if fit else "discards"] += 1
            if fit:
                self._idle[worker] = time.monotonic()
                if self._sweeper is None:
                    self._sweeper = threading.Thread(target=self._evict, daemon=True, name="vgi_rpc pool")
                    self._sweeper.start()
        if not fit:
            worker.close(0.0)
        self._sweep()

    def _sweep(self) -> None:
        """End the idle workers that are not fit, waited for too long or are too many; all if the pool is closed."""
        with self._locked():
            ended: list[SubprocessTransport] = []
            latest = time.monotonic() - self.idle_timeout
            for worker, since in self._idle.items():
                unfit = self._closed or worker.proc.poll() is not None or not worker.channel.is_quiet()
                if unfit or since <= latest or len(self._idle) - len(ended) > self.max_idle:
                    other = "evictions_idle" if since <= latest else "evictions_max"
                    self._counts["discards" if unfit else other] += 1
                    ended.append(worker)
            for worker in ended:
                del self._idle[worker]
        for worker in ended:  # without the lock: it takes time
            worker.close()

    def _evict(self) -> None:
        while True:
            self._sweep()
            with self._changed:
                if not self._idle:
                    self._sweeper = None
                    return
                self._changed.wait(min(self.idle_timeout, REAP_SECONDS))

    def close(self) -> None:
        """End the idle workers; those that are in use follow when they come back. May be called twice."""
        self._closed = True
        self._sweep()
        with self._locked():
            self._changed.notify_all()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# ====================
# 15. LISTENERS ... uses 1-14
# Who gives byte streams to the loop of section 13 (stdin and stdout, Unix sockets, TCP), and what a listening server
# needs, HTTP as well. Law: nothing that accept, memory or threads refuse ends a listener. A signal ends a server in the
# process that set the handlers alone, after the running calls or its grace.

_BACKLOG = 512  # connections that the system holds for us until we accept them
LOOPBACK_HOST = r"localhost|127\.[0-9.]+|\[?::1\]?"
_POLL_SECONDS = 0.1  # how soon an idle listener notices that it should stop; its rest after a refusal, too

_Server: Any = object  # socketserver's, which is not loaded before something listens


class ListenerMixin(_Server):  # type: ignore[misc]
    """What a `socketserver.TCPServer` with threads needs to be a server: a cap, idle time, an orderly end.

    *listening* is bound, and owned from here on; *rpc* tells whose running calls are waited for at the end. The others
    are options of `serve_unix`.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self, listening: socket.socket, handler: Any, rpc: RpcServer, threaded: bool, most: Any, idle: Any
    ) -> None:
        import socketserver

        # Not the constructor of TCPServer, which would make and bind a socket of its own.
        socketserver.BaseServer.__init__(self, listening.getsockname(), handler)
        listening.settimeout(_POLL_SECONDS)  # of `handle_request`
        self.socket = listening
        open_files.add(listening)
        self.rpc = rpc
        self.connections: dict[Any, Any] = {}  # sockets as accepted -> as used: TLS makes it another one
        self.stopping = False  # whether it ends as soon as no call is running
        self._process = super().process_request if threaded else self.process_request_thread
        self._most = most or sys.maxsize
        self._idle_seconds = threading.TIMEOUT_MAX if idle is None else idle
        self._idle_since = time.monotonic()
        self._freed = threading.Event()  # a connection has ended
        self._complained = False

    def run(self, grace: float, on_bound: Any, *where: Any) -> None:
        """Serve until SIGTERM, SIGINT or the idle time, then close, and hang up on the connections that are left.

        After a signal it takes *grace* seconds at most; who connects meanwhile gets a refusal, not silence. *on_bound* is
        called with *where* once signals are handled: who is told of it may stop us.
        """
        try:
            with closing(self.socket), _stop_signals(self.rpc, grace, self):
                if on_bound is not None:
                    on_bound(*where)
                while self.rpc.running or not self.stopping:
                    if not self.connections and time.monotonic() - self._idle_since >= self._idle_seconds:
                        break
                    try:
                        self.handle_request()
                    except (OSError, MemoryError) as exc:
                        self._complain(exc)
        finally:
            for connected in list(self.connections.values()):
                with suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)

    def get_request(self) -> tuple[socket.socket, Any]:
        if len(self.connections) >= self._most:
            self._freed.clear()
            self._freed.wait(_POLL_SECONDS)
            raise BlockingIOError
        try:
            connected, address = self.socket.accept()
        except OSError as exc:  # many mean that the client has gone already
            if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._complain(exc)
            raise
        self.connections[connected] = connected
        return connected, address

    def _complain(self, exc: BaseException) -> None:
        """Log what the system refuses, once until it gives again; and rest, as it will not give at once."""
        if not self._complained:
            log_quietly(logging.ERROR, "no room for new connections: %s", exc, exc_info=False)
        self._complained = True
        time.sleep(_POLL_SECONDS)

    def process_request(self, request: Any, client_address: Any) -> None:
        try:
            self._process(request, client_address)
            self._complained = False
        except (RuntimeError, MemoryError) as exc:  # no thread for it
            self._complain(exc)
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.connections.pop(request, None)
        self._idle_since = time.monotonic()
        self._freed.set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a handler raised, where the base class prints it."""
        refused = isinstance(sys.exc_info()[1], OSError)  # TLS that failed, say
        level = logging.INFO if refused else logging.ERROR
        log_quietly(level, "the handler of a connection from %s raised", address_text(client_address))


@contextmanager
def _stop_signals(server: RpcServer, grace: float, listener: Any, ignored: int = 0) -> Iterator[None]:
    """Have SIGTERM and SIGINT end what is inside: an idle server at once, else after the running calls.

    The first signal drains the server and stops *listener*. A second one, and the end of *grace* seconds, do not wait.
    The signal *ignored* does nothing. Only the main thread gets signals: in another thread nothing changes.
    """
    check_server(server)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    import _thread

    waiting = False
    over = False

    def end_of_grace() -> None:
        time.sleep(grace)
        if not over:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_signal(number: int, frame: object) -> None:
        nonlocal waiting
        if number != ignored:
            server.draining = True
            if waiting or not server.running:
                raise SystemExit(0)
            waiting = True
            if listener is not None:
                listener.stopping = True
            # Not threading.Thread, whose start takes a lock that this very thread may hold.
            _thread.start_new_thread(end_of_grace, ())

    previous = {int(n): signal.getsignal(n) or signal.SIG_DFL for n in (signal.SIGTERM, signal.SIGINT)}
    is_outermost = not handlers_before
    try:
        watch_forks()
        handlers_before.update(previous if is_outermost else {})
        for number in previous:
            signal.signal(number, on_signal)
        yield
    except SystemExit:
        if not server.draining:
            raise
    finally:
        over = True
        for number, handler in previous.items():
            signal.signal(number, handler)
        if is_outermost:
            handlers_before.clear()


def serve_stdio(server: RpcServer) -> None:
    """Serve the parent process on stdin and stdout until it closes them; SIGTERM lets the running call finish.

    While serving, descriptor 1 is standard error: whatever prints to stdout cannot break the channel. SIGINT counts
    only where stdin is a terminal: else it was meant for the parent, of the same terminal. Raises `OSError` when stdin
    or stdout is closed.
    """
    try:
        os.fstat(0)  # both first: a copy of the one would take the place of the other
        os.fstat(1)
        null = os.open(os.devnull, os.O_RDWR)  # takes the place of a standard error that is closed
        channel = FdChannel(io.FileIO(os.dup(0), "rb"), io.FileIO(os.dup(1), "wb"))  # no child inherits it
    except OSError as exc:
        raise OSError(exc.errno, "serve_stdio: stdin or stdout is closed; connect() opens both") from None
    ignored = 0 if os.isatty(0) else int(signal.SIGINT)
    try:
        os.dup2(null, 0)
        os.dup2(2, 1)
        if null > 2:
            os.close(null)
        _flush_stdout()  # now, so that what was printed before goes to standard error too
        with _stop_signals(server, DRAIN_GRACE_SECONDS, None, ignored):
            server.serve(Transport(channel, TransportKind.PIPE))
    finally:
        _flush_stdout()
        with suppress(OSError, ValueError):  # closed, in a forked child
            os.dup2(channel.writer.fileno(), 1)
        channel.close()


def _flush_stdout() -> None:
    with suppress(OSError, ValueError, AttributeError):  # closed, or none at all
        sys.stdout.flush()


def _serve_bytes(
    server: RpcServer, listening: socket.socket, tls_context: Any, options: Any, on_bound: Any, *where: Any
) -> None:
    import socketserver

    class ByteListener(ListenerMixin, socketserver.ThreadingMixIn, socketserver.TCPServer):
        def finish_request(self, request: Any, client_address: Any) -> None:
            kind = TransportKind.UNIX
            peer = address_text(client_address)
            if peer:
                kind = TransportKind.TCP
                request = set_up_tcp(self, request, tls_context)
            transport = Transport(ByteChannel(request), kind, peer or f"unix:{self.server_address}")
            with closing(transport):
                server.serve(transport)

    ByteListener(listening, None, server, *options).run(DRAIN_GRACE_SECONDS, on_bound, *where)


def serve_unix(
    server: RpcServer,
    path: str,
    *,
    threaded: bool = False,  # a thread for each connection; else one is served to its end, then the next
    max_connections: int | None = None,  # at a time; further ones wait
    idle_timeout: float | None = None,  # seconds without a connection after which it ends
    on_bound: Callable[[str], None] | None = None,  # called with path once connections are accepted
) -> None:
    """Serve on a Unix socket, which its owner alone can reach, until SIGTERM or SIGINT.

    A socket at *path* behind which nobody listens is replaced; ours is removed at the end. Raises `OSError` when *path*
    is in use by a live server, too long, or cannot be made.
    """
    import stat

    with socket.socket(getattr(socket, "AF_UNIX", -2)) as listening:  # -2: no such family
        old = os.umask(0o177)
        try:
            with suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1.0)
                is_socket = stat.S_ISSOCK(os.stat(path).st_mode)  # ValueError: a NUL, where bind would stop
                if is_socket and probe.connect_ex(path) == errno.ECONNREFUSED:  # nobody listens there
                    os.unlink(path)
            listening.bind(path)
            listening.listen(_BACKLOG)
        except (OSError, ValueError) as exc:
            text = f"cannot listen on the Unix socket {path!r}: {getattr(exc, 'strerror', None) or exc}"
            raise OSError(getattr(exc, "errno", None) or errno.EINVAL, text) from None
        finally:
            os.umask(old)
        made = os.stat(path).st_ino
        try:
            options = (threaded, max_connections, idle_timeout)
            _serve_bytes(server, listening, None, options, on_bound, path)
        finally:
            with suppress(OSError):
                if os.stat(path).st_ino == made:
                    os.unlink(path)


def listen_tcp(host: str, port: int, asks: bool = False) -> socket.socket:
    """Bind and listen; *port* 0 takes a free one, and ``::`` takes IPv4 too. Raises `OSError`.

    *asks* tells that callers are authenticated; else a warning tells of an open address.
    """
    if not 0 <= port <= 65_535 or max(map(len, host.split("."))) > 63:
        raise OSError(errno.EINVAL, f"expected a host and a port of 0 to 65535, got {host!r:.100} and {port}")
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    both = family is socket.AF_INET6 and socket.has_dualstack_ipv6()
    listening = socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    if not asks and not re.fullmatch(LOOPBACK_HOST, host):
        logger.warning("listening on %s without authentication: whoever reaches it may call", host)
    return listening


def address_text(address: Any) -> str:
    """A TCP peer as ``host:port``; empty for others, which have no address."""
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) and len(address) >= 2 else ""


def set_up_tcp(listener: ListenerMixin, connected: socket.socket, tls_context: Any) -> socket.socket:
    """Set up an accepted connection and return what to use: with TLS another socket, which the caller closes.

    The handshake runs here, in the connection's own thread, so that a slow client stops nobody else. Raises `OSError`
    when it fails or takes longer than `TLS_HANDSHAKE_SECONDS`.
    """
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tls_context is not None:
        connected.settimeout(TLS_HANDSHAKE_SECONDS)
        listener.connections[connected] = tls_context.wrap_socket(connected, server_side=True)
        listener.connections[connected].settimeout(None)
    return cast("socket.socket", listener.connections[connected])


def serve_tcp(
    server: RpcServer,
    host: str = "127.0.0.1",  # by default only this machine reaches it
    port: int = 0,  # 0 takes a free one
    *,
    threaded: bool = False,
    max_connections: int | None = None,
    idle_timeout: float | None = None,
    on_bound: Callable[[str, int], None] | None = None,  # called with host and port
    tls_context: ssl.SSLContext | None = None,  # a server-side one, which alone can tell who calls
) -> None:
    """Serve on TCP until SIGTERM or SIGINT; as `serve_unix`. Raises `OSError` if the address cannot be bound."""
    check_tls_context(tls_context)
    listening = listen_tcp(host, port, bool(tls_context and tls_context.verify_mode))
    options = (threaded, max_connections, idle_timeout)
    _serve_bytes(server, listening, tls_context, options, on_bound, host, listening.getsockname()[1])


# ====================
# 16. HTTP MESSAGES ... uses 1-12
# One grammar for both sides (RFC 9110, RFC 9112): heads, lengths, chunks, codings of bodies.
# Law: what it does not allow is refused and never repaired, so that no proxy in front can read a message
# differently than we do; and nothing is read or decoded beyond a limit that the caller gives.

_TEXT = r"[^\x00-\x08\x0a-\x1f\x7f]*"
_FIELD_LINE = rf"[!#$%&'*+.^_`|~0-9A-Za-z-]+:{_TEXT}\r\n"
# No two neighbours match the same character: text that does not match costs no more than text that does.
_HEAD = re.compile(rf"([^\x00-\x20\x7f]+) ([^\x00-\x20\x7f]+) ({_TEXT})\r\n((?:{_FIELD_LINE})*)\r\n")
_FIELD = re.compile(r"([^:\r\n]+):[ \t]*((?:[^\r\n]*[^ \t\r\n])?)[ \t]*\r\n")  # in lines that are field lines
_NO_HEAD = re.compile(rb"\A[^A-Za-z]|(?<!\r)\n")  # what can no longer become a head
_CHUNK_LINE = rf"([0-9A-Fa-f]{{1,15}})(?:[ \t]*;{_TEXT})?\r\n".encode()
_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]{0,5})?"
_ABSOLUTE_TARGET = r"(?i:https?)://([^/?#]+)(/[^?#]*)?(?:\?.*)?"
_ONCE = frozenset(("content-length", "host", "transfer-encoding", "authorization"))  # headers, at most
_MAX_LINE_BYTES = 8_192  # of a request target, a chunk's size or a trailer
_SAMPLE_BYTES = 4_096  # random bytes show in so many
COMPRESS_BODY_FROM = 14_000  # what a connection's first flight carries (RFC 6928) is no sooner there for less


@dataclass(eq=False, repr=False)
class HttpRequest:
    """A request as `HttpApp` and the ``authenticate`` callbacks see it."""

    method: str  # GET, POST and so on
    path: str  # as it came: not decoded, without the query
    headers: Mapping[str, str]  # by lower-case name; the values of a repeated one are joined by ", "
    remote_addr: str = ""
    # Gives the body, of at most so many bytes; raises a `Refusal`.
    read_body: Callable[[int], Buffer] = field(default_factory=lambda: lambda limit: b"")
    gone: Callable[[], bool] | None = None  # as in `CallContext`
    multiprocess: bool = False  # whether the next request may come to another process
    mount: str = ""  # where a WSGI server has put the application: for links, `path` does not begin with it
    request_id: str = ""  # under which it is answered and logged, once that is known
    scheme: str = ""  # of its URL, where a WSGI server tells it

    def get_header(self, name: str, default: str | None = None) -> str | None:
        """Return a header's value by its name in any case."""
        return self.headers.get(name.lower(), default)


@dataclass(eq=False, repr=False)
class HttpResponse:
    """An answer; who sends it adds the framing, ``Date`` and ``Connection``."""

    status: int
    headers: list[tuple[str, str]]
    body: Any = b""  # bytes; a list of buffers; or an iterator of bytes, made as it is sent, to be closed


def http_refusal(status: int, text: str, code: Code = Code.INVALID_ARGUMENT) -> ProtocolError:
    exc = ProtocolError(text)
    exc.http_status = status
    exc.error_code = code
    return exc


def body_too_large(limit: int, size: object, rule: str = "max_request_bytes") -> RequestTooLargeError:
    return RequestTooLargeError(f"body: expected at most {limit} bytes ({rule}), got {size}")


class HttpHead(NamedTuple):
    start: tuple[str, str, str]  # the three parts of the request line or status line
    headers: dict[str, str]  # as in `HttpRequest`


def parse_http_head(raw: bytes) -> HttpHead:
    """Parse a head with its empty line by RFC 9112; raises `ProtocolError`, which names the broken rule."""
    text = raw.decode("latin-1")
    match = _HEAD.fullmatch(text)
    if match is None or text.count("\n") > MAX_HEADERS + 2:
        start, *lines = text.removesuffix("\r\n\r\n").split("\r\n")
        wrong = next((line for line in lines if not re.fullmatch(_FIELD_LINE, line + "\r\n")), None)
        if len(lines) > MAX_HEADERS:
            raise http_refusal(431, f"expected at most {MAX_HEADERS} headers, got {len(lines)}")
        if not text.count("\r\n") == text.count("\n") == text.count("\r"):
            raise ProtocolError("a bare CR or LF in the head")
        if wrong is not None:
            raise ProtocolError(f"not a header line (or a folded one): {wrong[:80]!r}")
        raise ProtocolError(f"expected a start line of three parts, got {start[:80]!r}")
    headers: dict[str, str] = {}
    for name, value in _FIELD.findall(text, match.start(4)):
        name = name.lower()
        if name in headers:
            if name in _ONCE:
                raise ProtocolError(f"two {name} headers")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return HttpHead((match[1], match[2], match[3]), headers)


def header_has(headers: Mapping[str, str], name: str, token: str) -> bool:
    """Whether the list in a header holds *token*, in any case."""
    return token in [part.strip().lower() for part in headers.get(name, "").split(",")]


def is_arrow(headers: Mapping[str, str]) -> bool:
    return headers.get("content-type", "").lower() == ARROW_CONTENT_TYPE


def check_request_head(head: HttpHead) -> tuple[str, str]:
    """Check what RFC 9112 asks of a request; raises `ProtocolError` with the broken rule's HTTP status.

    Returns path (without the query, not decoded) and host: of a target in absolute form, else of the header.
    """
    (method, target, version), headers = head
    host = headers.get("host")
    coding = headers.get("transfer-encoding")
    length = headers.get("content-length")
    is_old = version == "HTTP/1.0"
    is_length = length is None or (length.isascii() and length.isdigit())
    doubtful = coding is not None and (is_old or length is not None)
    not_ours = coding is not None and coding.lower() != "chunked"
    absolute = None
    path = target.partition("?")[0]
    if path[:1] != "/" and (method, target) != ("OPTIONS", "*"):
        absolute = re.fullmatch(_ABSOLUTE_TARGET, target)  # as clients of a proxy send it (section 3.2.2)
        path = absolute[2] or "/" if absolute else ""
    if absolute:
        host = absolute[1]
    # An Arrow request is never empty, so its length was forgotten. Others without a length have no body.
    forgotten = coding is length is None and method == "POST" and is_arrow(headers)
    is_other = not is_old and version != "HTTP/1.1"
    status = 505 if is_other and re.fullmatch(r"HTTP/[0-9](\.[0-9])?", version) else 400
    is_method = method.isascii() and method.isalpha() and method.isupper()
    for broken, code, text, received in (
        (is_other, status, "expected HTTP/1.1, got", version),
        (not is_method, 400, "not a method:", method),
        (len(target) > _MAX_LINE_BYTES, 414, "the request target exceeds so many bytes:", _MAX_LINE_BYTES),
        (host is None and not is_old, 400, "HTTP/1.1 requires a Host header", None),
        (not path, 400, "the request target must be a path or an http URL, got", target),
        (host and not re.fullmatch(_HOST, host), 400, "Host: expected host[:port], got", host),
        (doubtful, 400, "Transfer-Encoding with a Content-Length, or in HTTP/1.0", None),
        (not_ours, 501, "Transfer-Encoding: expected chunked, got", coding),
        (not is_length, 400, "Content-Length: expected decimal digits, got", length),
        (forgotten, 411, "POST of Arrow requires a Content-Length", None),
    ):
        if broken:
            raise http_refusal(code, f"{text} {received!r:.80}" if received is not None else text)
    return path, host or ""


def check_answer_head(head: HttpHead, method: str) -> tuple[int, str]:
    """Check what RFC 9112 asks of an answer to *method*; raises `ProtocolError`.

    Returns the status and how the body is framed: ``"none"``, ``"sized"``, ``"chunked"`` or ``"to close"``.
    """
    (version, status, _), headers = head
    coding = headers.get("transfer-encoding")
    sized = "content-length" in headers
    if version not in ("HTTP/1.1", "HTTP/1.0") or not re.fullmatch("[1-5][0-9][0-9]", status):
        raise ProtocolError(f"expected a status line of HTTP/1.1, got {' '.join(head.start)[:80]!r}")
    if sized and coding is not None:
        raise ProtocolError("an answer with two lengths")
    if method == "HEAD" or status in ("204", "304") or status[0] == "1":
        return int(status), "none"
    if coding is None:
        return int(status), "sized" if sized else "to close"
    if coding.lower() != "chunked":
        raise ProtocolError(f"Transfer-Encoding: expected chunked, got {coding[:40]!r}")
    return int(status), "chunked"


def content_length(text: str, limit: int, rule: str = "max_request_bytes") -> int:
    """Parse a Content-Length: ASCII digits only (RFC 9110 section 8.6), within the limit that *rule* sets."""
    if not (text.isascii() and text.isdigit()):
        raise ProtocolError(f"Content-Length: expected decimal digits, got {text[:40]!r}")
    if len(text) > 18 or int(text) > limit:
        raise body_too_large(limit, text[:40], rule)
    return int(text)


class HttpReader:
    """Reads messages from *channel*; raises `ProtocolError`, and `TransportError` where one ends in its middle.

    Where *patience* is given, the channel's deadline is for the wait between two messages. What has begun and is
    not here yet then has *patience* seconds for a head, a line and each MiB of a body, in all *longest*.
    """

    def __init__(self, channel: ByteChannel, patience: float | None = None, longest: float = 0.0) -> None:
        self._channel = channel
        self._patience = patience
        self._longest = longest
        self._here = 0  # bytes that have been received already
        self.deadline: Time = None  # of the message that has begun; None for a new one

    def allow(self, size: int) -> None:
        """Set the channel's deadline for the next *size* bytes of a message, which come or go."""
        if self._patience is not None:
            now = time.monotonic()
            self.deadline = self.deadline or now + self._longest
            self._channel.deadline = min(self.deadline, now + self._patience * (1 + size / (1 << 20)))

    def _until(self, mark: bytes, most: int, wrong: re.Pattern[bytes] | None = None) -> bytes:
        """Bytes to *mark* and with it; without it at the end, after *most*, and when they match *wrong*."""
        whole = b""
        while True:
            data, at = self._channel.received()
            before = len(whole)
            whole += data[at:]
            end = whole.find(mark, max(0, before - len(mark) + 1)) + len(mark)
            is_here = end >= len(mark)  # nearly always at once
            end = end if is_here else len(whole)
            self._channel.at = at + end - before
            self._here = len(whole) - end
            hopeless = not is_here and wrong and wrong.search(whole, max(0, before - 1))
            if is_here or at == len(data) or end > most or hopeless:
                return whole[:end]
            self.allow(0)

    def head(self) -> bytes:
        """One head with its empty line, empty when the connection ends before it."""
        head = self._until(b"\r\n\r\n", MAX_HEAD_BYTES, _NO_HEAD)
        if len(head) > MAX_HEAD_BYTES:
            raise http_refusal(431 if b"\n" in head else 414, f"the head exceeds {MAX_HEAD_BYTES} bytes")
        if head.endswith(b"\r\n\r\n") or not head:
            return head
        if _NO_HEAD.search(head):
            raise ProtocolError("expected an HTTP message, whose lines end with CR LF")
        raise TransportError("the connection was closed within a head")

    def exactly(self, size: int) -> Buffer:
        if self._here < size:
            self.allow(size)
        self._here = 0
        body = self._channel.read_after(b"", size)
        if len(body) < size:
            raise TransportError(f"half a body: expected {size} bytes, got {len(body)}")
        return body

    def body(
        self, framing: str, headers: Mapping[str, str], limit: int, rule: str = "max_request_bytes"
    ) -> Buffer:
        """A body of at most *limit* bytes, which *rule* sets; *framing* is one of `check_answer_head`'s."""
        if framing == "sized":
            return self.exactly(content_length(headers.get("content-length", "0"), limit, rule))
        whole = bytearray()
        if framing == "chunked":
            self._read_chunks(whole, limit, rule)
        while framing == "to close":
            data, at = self._channel.received()
            if at == len(data):
                break
            whole += data[at:]
            self._channel.at = len(data)
            if len(whole) > limit:
                raise body_too_large(limit, "more", rule)
        return bytes(whole)

    def _read_chunks(self, whole: bytearray, limit: int, rule: str) -> None:
        """Read a chunked body (RFC 9112 section 7.1); trailers are only checked."""
        size = 1
        while size:
            line = self._until(b"\n", _MAX_LINE_BYTES)
            match = re.fullmatch(_CHUNK_LINE, line)
            if match is None:
                raise ProtocolError(f"chunk: expected a size in hexadecimal digits, got {line[:40]!r}")
            size = int(match[1], 16)
            if len(whole) + size > limit:
                raise body_too_large(limit, f"at least {len(whole) + size}", rule)
            whole += self.exactly(size)
            if size and self._until(b"\n", 2) != b"\r\n":
                raise ProtocolError("chunk: its data is not followed by CR LF")
        for _ in range(MAX_HEADERS + 1):
            line = self._until(b"\n", _MAX_LINE_BYTES)
            if line == b"\r\n":
                return
            if not re.fullmatch(_FIELD_LINE, line.decode("latin-1")):
                raise ProtocolError(f"chunk: not a trailer line: {line[:80]!r}")
        raise ProtocolError(f"chunk: expected at most {MAX_HEADERS} trailers")


@cache
def supported_encodings() -> tuple[str, ...]:
    """Return the body codings that this machine can read and write, best first."""
    return tuple(name for name in ("zstd", "gzip") if pa.Codec.is_available(name))


def compress_body(pieces: Sequence[Buffer], encoding: str, level: int) -> bytes:
    """Encode a body; *level* from 1 to 9."""
    codec = pa.Codec(encoding, compression_level=level)
    return cast("bytes", codec.compress(pieces[0] if len(pieces) == 1 else b"".join(pieces), asbytes=True))


def is_worth_packing(pieces: Sequence[Buffer], encoding: str, level: int, token_bytes: int = 0) -> bool:
    """Whether a body becomes a good deal smaller, by the look of its largest piece, and is not short anyway.

    Of tokens nothing is expected: to look at one took 5 % of a turn.
    """
    if total_size(pieces) - token_bytes < COMPRESS_BODY_FROM:
        return False
    sample = memoryview(max(pieces, key=len)).cast("B")[:_SAMPLE_BYTES]
    return len(compress_body([sample], encoding, level)) <= 0.7 * len(sample)


def decompress_body(body: Buffer, encoding: str, limit: int) -> Buffer:
    """Decode a body to at most *limit* bytes, else `RequestTooLargeError`; `IPCError` unless it is whole."""
    if not encoding:
        return body
    whole = bytearray()
    room = memoryview(bytearray(max(4_096, min(8 * len(body), limit, 1 << 20))))
    try:
        with pa.CompressedInputStream(pa.BufferReader(body), encoding) as stream:
            # Not read(): pyarrow loses the bytes object that it has made when the data turn out to be bad.
            while len(whole) <= limit and (count := stream.readinto(room)):
                whole += room[:count]
    except ARROW_FAILURES as exc:
        raise IPCError(f"{encoding}: {text_of(exc)}") from None
    if not whole and len(body):
        raise IPCError(f"{encoding}: nothing to decode in it")
    if len(whole) > limit:
        raise RequestTooLargeError(f"{encoding}: expected at most {limit} decoded bytes, got more")
    return bytes(whole)


def coding_of(headers: Mapping[str, str]) -> str:
    """Return the coding of a body, by our private header first, empty for none; 415 if it is not ours."""
    coding = headers.get(CONTENT_ENCODING_HEADER.lower()) or headers.get("content-encoding")
    if not coding:
        return ""
    coding = coding.strip().lower()
    if coding not in ("identity", *supported_encodings()):
        expected = " or ".join(supported_encodings())
        raise http_refusal(415, f"Content-Encoding: expected {expected}, got {coding[:60]!r}")
    return coding.removeprefix("identity")


@lru_cache(maxsize=64)
def choose_encoding(private: str | None, public: str) -> tuple[str, str, bool]:
    """Choose the coding of an answer by the client's own order, in which ``q=0`` and ``identity`` first mean none.

    The private header (``None`` when absent) beats the standard one, and a coding named only there is named there in
    the answer. Returns coding or nothing, the header that names it, and whether ``identity`` is taken as well.
    """
    names = []
    for offer in (public if private is None else private).lower().split(","):
        name, _, parameters = offer.replace(" ", "").partition(";")
        if not re.fullmatch(r"q=0(\.0*)?", parameters):
            names.append(name)
    wanted = names[: (*names, "identity").index("identity")]
    chosen = next((name for name in wanted if name in supported_encodings()), "")
    in_public = re.search(rf"(?:^|[,\s]){chosen}\b", public.lower())
    return chosen, "Content-Encoding" if in_public else CONTENT_ENCODING_HEADER, "identity" in names


# ====================
# 17. JSON AND PAGES ... uses 1-16
# What people and their tools see of a service: values as JSON, errors as JSON, pages of HTML.
# Law: one conversion leads from JSON to values of an Arrow field, and one back. The JSON door, the command line
# and the pages use these two, so that a value means the same in all of them. What a page shows is escaped.

JSON_TYPE = "application/json"
NDJSON_TYPE = "application/x-ndjson"
_NUMBER = r"-?[0-9]+(\.[0-9]+)?([eE][-+]?0*[0-9]{1,4})?"
_NOT_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": -float("inf")}


def exact_number(text: str) -> decimal.Decimal:
    """Read a number that a float holds too, with all its digits; `ValueError` for anything else."""
    # The exponent is bounded: pyarrow 14 to 26 end the process on Decimal("1e-999999999").
    if not re.fullmatch(_NUMBER, text) or abs(float(text)) == float("inf"):
        raise ValueError(f"{text[:40]!r} is no number here")
    return decimal.Decimal(text)


def parse_json(data: str | Buffer, where: str = "request", **numbers: Callable[[str], Any]) -> Any:
    """Parse strictly by RFC 8259, fractions and exponents to `decimal.Decimal`; `ProtocolError` for anything else.

    *numbers* are other readers of them: ``parse_int``, ``parse_float``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a key stands twice among {[key for key, _ in pairs][:20]}")
        return dict(pairs)

    try:
        text = data if isinstance(data, str) else str(data, "utf-8")
        hooks: dict[str, Any] = {"parse_float": exact_number, "parse_constant": exact_number, **numbers}
        return from_json(text, object_pairs_hook=unique, **hooks)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"{where}: not JSON: {text_of(exc)}") from None


def value_from_json(value: Any, member: pa.Field, step: str = "") -> Any:
    """Convert a value of `parse_json` to an encoded value of the type of *member*, as ``pa.array`` takes it.

    Bytes come from base64, times and dates from RFC 3339 text, durations from seconds (1.5 or "1.5s"), decimals from
    numbers or text, enums from names, maps from objects or arrays of pairs, NaN and the infinities from text. A
    binary field that holds a dataclass, as reflection describes it, takes an object. A member that an object leaves
    out has its default, or stays out. Here null fits every type, and any integer its type. Raises `Mismatch`, *step* in
    front of its path.
    """
    arrow_type = getattr(member.type, "storage_type", member.type)
    try:
        if value is None:
            return None
        if pa.types.is_struct(arrow_type) and isinstance(value, dict):
            members = {part.name: part for part in arrow_type}
            for name in value.keys() - members:
                raise Mismatch(f"one of {', '.join(members)}", f"{name!r:.60}{suggest(name, members)}")
            row = {name: value_from_json(part, members[name], f".{name}") for name, part in value.items()}
            for name in members.keys() - row:
                default = default_batch(members[name])
                if default is not None and default.num_columns and default.num_rows:
                    row[name] = default.column(0).to_pylist()[0]
            return row
        if pa.types.is_map(arrow_type):
            if isinstance(value, dict):  # its keys are words as on the command line
                value = [(json_of_word(key, arrow_type.key_type), part) for key, part in value.items()]
            steps = [(f"[{key!r:.40}]", key, part) for key, part in value]
            keys = [value_from_json(key, arrow_type.key_field, at) for at, key, _ in steps]
            values = [value_from_json(part, arrow_type.item_field, at) for at, _, part in steps]
            return list(zip(keys, values))
        if hasattr(arrow_type, "value_field") and isinstance(value, list):
            return [value_from_json(part, arrow_type.value_field, f"[{i}]") for i, part in enumerate(value)]
        if isinstance(value, (dict, list)) and str(arrow_type).endswith("binary"):
            return _stream_from_json(value, member)
        cls, _, codec = _leaf(arrow_type)
        return codec.encode(_read_leaf(cls, value))
    except Mismatch as exc:
        if not pa.types.is_fixed_size_binary(
            arrow_type
        ):  # of another length, which is not what a caller wrote
            raise exc.under(step) from None
    except ARROW_FAILURES:
        pass  # said below in the words of the type
    is_written = pa.types.is_nested(arrow_type) or "binary" in str(arrow_type)  # there Arrow's type says less
    expected = type_of(member) if is_written else type_text(arrow_type)
    raise Mismatch(expected, f"{to_json(value, default=float):.60}").under(step)


def _stream_from_json(value: Any, member: pa.Field) -> bytes:
    """What a binary parameter holds: a dataclass or a schema from an object, a record batch from an array of rows."""

    def present(arrow_type: pa.DataType, row: Any) -> pa.DataType:
        # Members that an object leaves out are no columns: whoever reads them by name fills in the defaults.
        if not isinstance(row, dict):
            return arrow_type
        members = [part for part in arrow_type if part.name in row]
        return pa.struct([part.with_type(present(part.type, row[part.name])) for part in members])

    described = struct_schema(member)
    if described is not None:
        arrow_type = pa.struct(list(described))
        row = value_from_json(value, member.with_type(arrow_type))
        batch = pa.RecordBatch.from_struct_array(pa.array([row], present(arrow_type, row)))
    elif "Schema" in type_of(member):
        schema = pa.schema([(name, pa.type_for_alias(alias)) for name, alias in value.items()])
        return cast("bytes", schema.serialize().to_pybytes())
    else:  # pyarrow guesses the types, also those of a dataclass that the server does not describe
        rows = [value] if isinstance(value, dict) else value
        batch = pa.RecordBatch.from_pylist(from_json(to_json(rows, default=float)))
    return stream_bytes(WireSchema(batch.schema), [(batch, None)])


def json_of_word(word: str | bytes, arrow_type: pa.DataType = pa.utf8()) -> Any:
    """What a word, the content of a file or a key is in JSON for *arrow_type*; text where nothing else fits."""
    is_binary = re.match("(large_|fixed_size_)?binary", str(arrow_type))
    if isinstance(word, bytes):
        if is_binary:
            return binascii.b2a_base64(word, newline=False).decode()
        word = word.decode("utf-8", "replace").rstrip("\r\n")
    if re.match("(large_)?string|dictionary", str(arrow_type)) or (is_binary and word[:1] not in ("{", "[")):
        return word
    with suppress(ProtocolError):
        return parse_json(word)
    return word


def word_of(value: Any) -> str:
    """A value of `value_to_json` as a word; the way back of `json_of_word`."""
    return value if isinstance(value, str) else json_text(value)


# Arrow types without members; the classes of their values; examples in JSON.
_LEAVES: list[tuple[str, type, Any]] = [
    ("bool", bool, True),
    ("u?int", int, 1),
    (".*float|double", float, 1.5),
    ("(large_)?string", str, "text"),
    ("(large_|fixed_size_)?binary", bytes, "AAH/"),
    ("decimal", decimal.Decimal, "1"),
    ("date", datetime.date, "2024-01-31"),
    ("time[36]", datetime.time, "12:30:00"),
    ("timestamp.*tz", datetime.datetime, "2024-01-31T12:30:00Z"),
    ("timestamp", datetime.datetime, "2024-01-31T12:30:00"),
    ("duration", datetime.timedelta, "60s"),
]


@lru_cache(maxsize=256)
def _leaf(arrow_type: pa.DataType) -> tuple[Any, Any, Codec]:
    if pa.types.is_dictionary(arrow_type):
        return _leaf(arrow_type.value_type)
    for pattern, cls, example in _LEAVES:
        if re.match(pattern, str(arrow_type)):
            return cls, example, codec_for(Annotated[object, ArrowType(arrow_type)])
    raise ValueError


def _read_leaf(cls: Any, value: Any) -> Any:
    """Read a value of *cls* from its form in JSON; raises one of `ARROW_FAILURES` for what is none."""
    if cls in (bool, int, str) or isinstance(value, bool):
        if type(value) is not cls:
            raise TypeError
        return value
    if cls is float:
        return _NOT_FINITE[value] if isinstance(value, str) else float(value)
    if cls is decimal.Decimal:
        return exact_number(str(value))
    if cls is datetime.timedelta:
        exact = decimal.Context(40, traps=[decimal.Inexact])
        microseconds = exact.to_integral_exact(exact_number(str(value).removesuffix("s")) * 1_000_000)
        return datetime.timedelta(microseconds=int(microseconds))
    if cls is bytes:
        import base64

        is_uuid = len(value) == 36 and value.count("-") == 4  # base64 has no "-"
        return uuid.UUID(value).bytes if is_uuid else base64.b64decode(value, validate=True)
    # RFC 3339, of which these classes know less before Python 3.11.
    if re.search(r"\.[0-9]{6}0*[1-9]", value):  # below microseconds, which newer Pythons cut off
        raise ValueError
    text = re.sub(r"\.([0-9]{1,6})[0-9]*", lambda match: "." + match[1].ljust(6, "0"), value)
    return cls.fromisoformat(re.sub("[Zz]$", "+00:00", text))


def value_to_json(value: Any, member: pa.Field) -> Any:
    """Convert what ``to_pylist`` or a codec gives for *member* to JSON; the way back of `value_from_json`."""
    arrow_type = getattr(member.type, "storage_type", member.type)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(str(value), value)
    if isinstance(value, bytes):
        members = struct_schema(member)
        if type_of(member).startswith("UUID"):
            return str(uuid.UUID(bytes=value))
        if members is None and "RecordBatch" not in type_of(member):
            return binascii.b2a_base64(value, newline=False).decode()
        batches = iter(IpcReader(ByteSource(value)).next, None)
        rows = [row for batch, _ in batches for row in batch_rows(batch, members)]
        return rows if members is None else rows[0]
    if pa.types.is_map(arrow_type):  # an object whose keys are words; pairs where they are nested or twice
        pairs = value.items() if isinstance(value, dict) else value
        keys = [value_to_json(key, arrow_type.key_field) for key, _ in pairs]
        parts = [value_to_json(part, arrow_type.item_field) for _, part in pairs]
        words = list(map(word_of, keys))
        nested = pa.types.is_nested(arrow_type.key_type) or len(set(words)) < len(words)
        return list(map(list, zip(keys, parts))) if nested else dict(zip(words, parts))
    if isinstance(value, dict):
        return {part.name: value_to_json(value[part.name], part) for part in arrow_type if part.name in value}
    if isinstance(value, list):
        return [value_to_json(part, arrow_type.value_field) for part in value]
    if isinstance(value, datetime.timedelta):
        value = decimal.Decimal(value // datetime.timedelta(microseconds=1)).scaleb(-6).normalize()
        return f"{value:f}s"
    if isinstance(value, decimal.Decimal):
        return f"{value:f}"
    return getattr(value, "isoformat", value.__str__)()


def batch_rows(batch: pa.RecordBatch, described: pa.Schema | None = None) -> list[dict[str, Any]]:
    """The rows of *batch* as JSON has them; *described* has what reflection says of its fields, by name."""
    members = {member.name: member for member in described or batch.schema}
    rows: list[dict[str, Any]] = [{} for _ in range(batch.num_rows)]
    for member, column in zip(batch.schema, batch.columns):
        try:
            values = column.to_pylist()
        except (ValueError, OverflowError):  # nanoseconds, or a year that Python does not have
            values = column.cast(pa.utf8()).to_pylist()
        for row, value in zip(rows, values):
            row[member.name] = value_to_json(value, members.get(member.name, member))
    return rows


def json_text(value: Any) -> str:
    """*value* as one line of JSON; NaN in somebody's details, which JSON does not have, is null."""
    try:
        return to_json(value, ensure_ascii=False, allow_nan=False, default=text_of)
    except ValueError:
        return json_text(from_json(to_json(value, default=text_of), parse_constant=lambda name: None))


def json_bytes(value: Any) -> bytes:
    """*value* as a line of JSON in UTF-8."""
    return f"{json_text(value)}\n".encode("utf-8", "backslashreplace")


def json_response(status: int, value: Any, headers: Iterable[tuple[str, str]] = ()) -> HttpResponse:
    """An answer with *value* as its JSON body."""
    return HttpResponse(status, [("Content-Type", JSON_TYPE), *headers], json_bytes(value))


def arguments_from_json(info: RpcMethodInfo, arguments: Any) -> list[Any]:
    """Read the arguments of a call from a JSON object: encoded values in order; `ParameterError` says what is wrong."""
    if not isinstance(arguments, dict):
        received = json_text(arguments)
        raise ParameterError(f"{info.name}(): expected an object of parameters, got {received:.60}")
    row = []
    where = f"{info.name}() parameter "
    values = bind_arguments(info, (), arguments)  # refuses unknown and missing names, fills in defaults
    for member, codec, value in zip(described_schemas(info)["params"], info.params.parts.values(), values):
        convert: Callable[[Any], Any] = codec.encode
        if member.name in arguments:
            convert = partial(value_from_json, member=member)
        row.append(located(f"{where}{member.name}", convert, value))
    if row:  # what is out of range, and texts that Arrow cannot say
        located(where, info.params.to_batch, row)
    return row


def result_to_json(info: RpcMethodInfo, batch: pa.RecordBatch) -> Any:
    """The value of a unary result, 1 row x 1 column, as JSON has it; None for ``-> None``."""
    rows = batch_rows(batch, described_schemas(info)["result"])
    return rows[0]["result"] if rows else None


def members_of(member: pa.Field) -> list[pa.Field]:
    """What is nested in a described field: the members of a dataclass or struct, also of those in lists and maps."""
    inner = getattr(member.type, "item_field", None) or getattr(member.type, "value_field", None)
    if inner is not None:
        return members_of(inner)
    if pa.types.is_struct(member.type):
        return list(member.type)
    return list(struct_schema(member) or ())


def described_rows(members: Iterable[pa.Field], indent: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, type with members and default, doc) of described fields, each before what is nested in it, which is indented."""
    docs = json_object(field_text(members, PARAM_DOCS_KEY)) if isinstance(members, pa.Schema) else {}
    for member in members:
        text = type_of(member)
        if names := field_text(getattr(member.type, "value_field", member), ENUM_KEY):
            text += f" ({', '.join(names.splitlines())})"
        if default := field_text(member, DEFAULT_TEXT_KEY):
            text += f" = {default}"
        yield indent + member.name, text, text_of(docs.get(member.name) or field_text(member, DOC_KEY))
        yield from described_rows(members_of(member), indent + "  ")


def example_of(member: pa.Field) -> Any:
    """A value in JSON that a described field takes."""
    arrow_type = getattr(member.type, "storage_type", member.type)
    if names := field_text(member, ENUM_KEY):
        return names.splitlines()[0]
    if literal := re.match(r"""Literal\[(['"]?)(.*?)\1[],]""", type_of(member)):
        return json_of_word(literal[2], arrow_type)
    if pa.types.is_map(arrow_type):
        return {word_of(example_of(arrow_type.key_field)): example_of(arrow_type.item_field)}
    if pa.types.is_nested(arrow_type) and hasattr(arrow_type, "value_field"):
        return [example_of(arrow_type.value_field)] * getattr(arrow_type, "list_size", 1)
    if members_of(member):
        return {part.name: example_of(part) for part in members_of(member)}
    if pa.types.is_fixed_size_binary(arrow_type):
        return value_to_json(bytes(arrow_type.byte_width), member)
    examples = {"RecordBatch": [{"x": 1.5}], "Schema": {"x": "float64"}}
    return examples.get(type_of(member).partition(" ")[0].removeprefix("pa."), _leaf(arrow_type)[1])


def example_words(members: Iterable[pa.Field], defaults: Mapping[str, Any]) -> dict[str, str]:
    """How the command line takes each parameter's default, else an example: ``name=value`` or ``name:=json``."""
    import shlex

    words = {}
    for member in members:
        default = member.name in defaults
        value = value_to_json(defaults[member.name], member) if default else example_of(member)
        colon = ":" * (value is None or isinstance(value, (dict, list)))
        words[member.name] = shlex.quote(f"{member.name}{colon}={word_of(value)}")
    return words


def import_name(module: str) -> str:
    """The name by which others import *module*, also where Python runs it as ``__main__``."""
    if module != "__main__":
        return module
    main: Any = sys.modules["__main__"]
    if getattr(main, "__spec__", None) is not None:
        return cast("str", main.__spec__.name)
    folder, name = os.path.split(os.path.abspath(getattr(main, "__file__", "service.py")))
    names = [os.path.splitext(name)[0]]
    while os.path.isfile(os.path.join(folder, "__init__.py")):
        folder, name = os.path.split(folder)
        names.insert(0, name)
    return ".".join(names)


# No script, nothing loaded, only this style, which the pages' policy knows by its hash.
_STYLE = """
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:auto;padding:1rem;
overflow-wrap:anywhere}details,pre{background:#8882;border-radius:8px;padding:.6rem 1rem;margin:.7rem 0}pre{margin:0}
h4{margin:.8rem 0 .2rem}h4,b,small{opacity:.75}b,small,table{font-size:.85rem}small{display:block}table{width:100%;
border-collapse:collapse}td{padding:.2rem .8rem .2rem 0;vertical-align:top;border-bottom:1px solid #8885}
code,pre{font:.87rem/1.5 ui-monospace,monospace;white-space:pre-wrap}td:first-child code{white-space:pre}
"""


def tag(name: str, text: object) -> str:
    """An element of HTML around a text."""
    import html

    return f"<{name}>{html.escape(text_of(text))}</{name}>"


def root_of(path: str, prefix: str) -> str:
    """The relative link from the page at *path* to the root below *prefix*, right below any proxy's prefix too."""
    if path.startswith(f"{prefix}/"):
        return "../" * (path.count("/", len(prefix)) - 1) or "./"
    return "../" * (path.count("/") - 1) + f".{prefix}/"


def page(title: str, body: str, root: str, status: int = 200) -> HttpResponse:
    """A page; *body* is HTML, *root* the relative link to where the service begins."""
    import hashlib

    digest = binascii.b2a_base64(hashlib.sha256(_STYLE.encode()).digest(), newline=False).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    headers = [("Content-Type", "text/html; charset=utf-8"), ("Cache-Control", "no-store")]
    headers += [("Content-Security-Policy", policy), ("X-Content-Type-Options", "nosniff")]
    headers += [("Referrer-Policy", "no-referrer")]
    places = {"": "Overview", "describe": "All methods", "health": "Health"}
    links = [f'<a href="{root}{at}">{name}</a>' for at, name in places.items()]
    text = f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
{tag("title", title)}<style>{_STYLE}</style><main><nav>{" · ".join(links)}</nav>{tag("h1", title)}{body}</main></html>
"""
    return HttpResponse(status, headers, text.encode())


def page_at(
    server: RpcServer, options: HttpOptions, request: HttpRequest, segments: list[str], scheme: str = "http"
) -> HttpResponse | None:
    """A card of each method, closed at the root and open at ``describe``, else None. It asks for no credential."""
    if segments not in ([], [""], ["describe"]):
        return None
    host = request.get_header("host") or ""
    if not re.fullmatch(r"[A-Za-z0-9.:_\[\]-]+", host):
        host = "HOST"  # it stands in lines that people copy into a shell
    if request.get_header("x-forwarded-proto") == "https":
        scheme = "https"
    url = f"{scheme}://{host}{request.mount}{options.prefix}"
    opened = " open" * (segments == ["describe"])
    body = ""
    for service in server.services.values():
        body += tag("h2", f"{service.name} {service.version}")
        for _, bound in sorted(service.methods.items()):
            info = bound.info
            marks = [STREAM_KINDS.get(bound.is_exchange, info.kind)]
            marks += [info.idempotency] * (info.idempotency != "unknown")
            marks += [f"deprecated: {info.deprecation}"] * (info.deprecation is not None)
            summary = f"{tag('code', info.signature())} {tag('b', ', '.join(marks))}"
            summary += tag("small", (info.doc or "").partition("\n")[0])
            # Names, so there is nothing to escape in what is linked to.
            body += f'<details id="{service.name}.{info.name}"{opened}><summary>{summary}</summary>'
            body += f"{_method_card(bound, url, options)}</details>"
    lines = ["Health: " + ("ok", "draining, takes no calls")[server.draining]]
    lines.append(f"requests of at most {options.max_request_bytes or SERVER_MAX_REQUEST_BYTES:,} bytes")
    lines.append(f"vgi_rpc {__version__}, Python {sys.version.split()[0]}, pyarrow {pa.__version__}")
    lines.append(f"server {server.server_id} {server.server_version}, protocol hash {server.protocol_hash}")
    body += tag("h2", "This server") + tag("small", "; ".join(lines))
    return page(server.protocol_name, body, root_of(request.path, options.prefix))


def _method_card(bound: BoundMethod, url: str, options: HttpOptions) -> str:
    """What a method does, what it takes and gives, how to call it: lines that can be pasted."""
    import shlex

    info = bound.info
    schemas = described_schemas(info)
    card = tag("pre", info.doc) * ("\n" in (info.doc or ""))
    for title, key in (("Parameters", "params"), ("Header", "header"), ("Result", "result")):
        rows = ""
        for name, typed, doc in described_rows(schemas[key]):
            rows += f"<tr><td>{tag('code', name)}<td>{tag('code', typed)}{tag('td', doc)}"
        if rows:
            card += f"<h4>{title}</h4><table>{rows}</table>"
    asks = options.authenticate is not None
    needed = [member for member in schemas["params"] if member.name not in info.param_defaults]
    arguments = {member.name: example_of(member) for member in needed}
    words = [f"python {os.path.basename(__file__)} call {url} {info.protocol_name}.{info.name}"]
    words += [*example_words(needed, {}).values(), *["-i FILE"] * bool(bound.is_exchange)]
    lines = {"Command line": " ".join(words + ["--bearer-file FILE"] * asks)}
    if options.json and not bound.is_exchange:
        bearer = ' -H "Authorization: Bearer $TOKEN"' * asks
        head = f"curl {url}/{info.protocol_name}/{info.name} -H 'Content-Type: {JSON_TYPE}'{bearer}"
        lines["curl"] = f"{head} -d {shlex.quote(json_text(arguments))}"
    bearer = ', headers={"Authorization": "Bearer TOKEN"}' * asks
    lines["Python"] = _python_block(bound, url, arguments, bearer)
    return card + "".join(tag("h4", title) + tag("pre", line) for title, line in lines.items())


def _python_block(bound: BoundMethod, url: str, arguments: dict[str, Any], more: str) -> str:
    """Lines of Python that call a method with the arguments *arguments* in JSON, imports and all."""
    info = bound.info
    values = arguments
    with suppress(ParameterError):  # of a class of the application's, which has its own checks
        values = decode_arguments(info, arguments_from_json(info, arguments))
    call = f"proxy.{info.name}({', '.join(f'{name}={_source(values[name])}' for name in arguments)})"
    use = f"print({call})"
    if bound.is_exchange:
        use = f'with {call} as session:\n        print(session.exchange({{"value": [1.5]}}).batch)  # the columns of your input'
    elif info.method_type is MethodType.STREAM:
        use = f"for answer in {call}:\n        print(answer.batch)"
    own = import_name(__name__)
    protocol = bound.service.protocol
    block = f'with {own}.http_connect({protocol.__name__}, "{url}"{more}) as proxy:\n    {use}'
    imports = {"datetime.": "import datetime", f"{own}.": f"import {own}"}
    imports |= {"Decimal(": "from decimal import Decimal", "UUID(": "from uuid import UUID"}
    imports |= {"pa.": "import pyarrow as pa"}
    known = vars(sys.modules[protocol.__module__]).keys() - {"Decimal", "UUID"}
    names = sorted(known.intersection(re.findall(r"\b[A-Z]\w*", block)))
    lines = [line for word, line in imports.items() if word in block]
    lines.append(f"from {import_name(protocol.__module__)} import {', '.join(names)}\n\n{block}")
    return "\n".join(lines)


def _source(value: Any) -> str:
    if isinstance(value, pa.Schema):
        return 'pa.schema([("x", "float64")])'
    if isinstance(value, pa.RecordBatch):
        return f"pa.RecordBatch.from_pydict({value.to_pydict()})"
    return re.sub(r"<([\w.]+): [^>]*>", r"\1", repr(value))  # the members of enums


# ====================
# 18. HTTP SERVING ... uses 1-17
# One function leads from a request to its answer (`HttpApp.respond`): for WSGI, for http.server and for tests
# without a socket. Laws: it never raises; who may not call learns nothing; a stream's state lives in its two
# tokens and nowhere else, and every turn runs on a state that was read back.

Authenticate = Callable[[HttpRequest], AuthContext]


def bearer_authenticate(*, validate: Callable[[str], AuthContext]) -> Authenticate:
    """Return a callback that hands the bearer token of ``Authorization`` to *validate*.

    That returns who it is, or raises ``ValueError``; let it compare secrets with ``hmac.compare_digest``.
    """

    def authenticate(request: HttpRequest) -> AuthContext:
        scheme, _, token = (request.get_header("authorization") or "").partition(" ")
        if scheme.lower() != "bearer":
            raise AuthFailure(AuthReason.MISSING_CREDENTIAL, "expected 'Authorization: Bearer <token>'")
        if not re.fullmatch(r"[!-~]{1,16384}", token):
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "malformed bearer token")
        return validate(token)

    authenticate.challenge = "Bearer"  # type: ignore[attr-defined]
    return authenticate


def bearer_authenticate_static(*, tokens: Mapping[str, AuthContext]) -> Authenticate:
    """Return a callback that knows a fixed set of bearer tokens, all of them compared, in constant time."""

    def validate(token: str) -> AuthContext:
        import hmac

        matches = [tokens[known] for known in tokens if hmac.compare_digest(known.encode(), token.encode())]
        if not matches:
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "unknown bearer token")
        return matches[0]

    return bearer_authenticate(validate=validate)


def chain_authenticate(*authenticators: Authenticate) -> Authenticate:
    """Return a callback that asks each in turn until one knows the caller; the last refusal stands.

    A ``ValueError`` passes the request on to the next one; ``PermissionError`` and others end the search.
    """
    if not authenticators:
        raise ValueError("chain_authenticate: expected at least one authenticator")

    def authenticate(request: HttpRequest) -> AuthContext:
        refusal: Any = None
        for authenticator in authenticators:
            try:
                return authenticator(request)
            except ValueError as exc:
                # What is wrong with a credential that was sent says more than that another kind was not.
                if refusal is None or getattr(exc, "reason", None) is not AuthReason.MISSING_CREDENTIAL:
                    refusal = exc
        raise refusal

    challenges = [getattr(authenticator, "challenge", "") for authenticator in authenticators]
    authenticate.challenge = next(filter(None, challenges), "")  # type: ignore[attr-defined]
    return authenticate


@dataclass(eq=False, repr=False)
class HttpOptions:
    """What an HTTP server can be told; the keywords of `make_wsgi_app`, `serve_http` and `make_sync_client`."""

    prefix: str = ""  # path under which everything is served, such as /api
    # Key of the state tokens, 16 bytes or more; of several the first one signs. Default: VGI_RPC_TOKEN_KEY.
    token_key: bytes | str | Sequence[bytes] | None = None
    token_ttl: float = TOKEN_TTL_SECONDS  # seconds that a state token is good for; 0 for ever
    authenticate: Authenticate | None = None  # gives the AuthContext; ValueError, PermissionError: 401
    cors_origins: str | Iterable[str] | None = None  # origins whose pages may call, "*" for all
    max_request_bytes: int | None = None  # largest body, encoded and decoded; else 256 MiB, of JSON 1 MiB
    max_response_bytes: int | None = None  # largest answer, decoded; None for any size
    compression_level: int | None = 1  # of answers in zstd and gzip, 1 to 9; None for no compression
    call_state_cache_entries: int = MAX_OPEN_TOKENS  # opened call tokens kept in memory; 0 for none
    max_rows: int | None = None  # rows of one batch; None for what its bytes pay for
    pages: bool = True  # serve the pages for people (they need reflection as well)
    json: bool = True  # answer calls in JSON
    # Names that the Host header may have, "*" for any. None: any. But a server that is bound to a loopback
    # address takes localhost, 127.0.0.1 and [::1] alone, and always these beside the names given.
    allowed_hosts: str | Iterable[str] | None = None

    def __post_init__(self) -> None:
        """Check what was given; ``ValueError`` for what is out of range."""
        self.prefix = f"/{self.prefix.strip('/')}".rstrip("/")
        for name in ("cors_origins", "allowed_hosts"):
            names = getattr(self, name) or ()
            names = names.split(",") if isinstance(names, str) else names
            setattr(self, name, [entry.strip() for entry in names])
        names = ("max_request_bytes", "max_response_bytes", "max_rows")
        check_limits(**{name: getattr(self, name) for name in names})
        if self.compression_level not in (None, *range(1, 10)):
            raise ValueError(f"compression_level: expected 1 to 9 or None, got {self.compression_level!r}")


@dataclass(eq=False, repr=False)
class HttpServeOptions(HttpOptions):
    """What `serve_http` can be told beside these; times in seconds."""

    host: str = "127.0.0.1"
    port: int = 0  # 0 takes a free one
    tls_context: Any = None  # server-side ssl.SSLContext; None for plain HTTP
    max_connections: int = MAX_CONNECTIONS  # at a time; as many again are answered 503, but for health
    read_timeout: float = READ_TIMEOUT_SECONDS  # for a head, and for each MiB of a body or an answer
    request_deadline: float = REQUEST_DEADLINE_SECONDS  # for one request as a whole, and for its answer
    keep_alive_timeout: float = KEEP_ALIVE_SECONDS  # between two requests of a connection
    drain_grace_seconds: float = DRAIN_GRACE_SECONDS  # for running calls after SIGTERM or SIGINT
    idle_timeout: float | None = None  # without a connection, then it ends; None for never
    on_bound: Callable[[str, int], None] | None = None  # called with host and port once it accepts


class FixedHalf(NamedTuple):
    """The half of a stream's state that never changes, as its call token seals it."""

    call_id: bytes
    wires: StreamWires
    call_state: bytes
    stream_id: str
    limit: int | None  # bytes of one answer, as the request that began the stream said


# -- requests


class _Unauthorized(ProtocolError, error_code=Code.UNAUTHENTICATED, http_status=401):
    def __init__(self, cause: Exception) -> None:
        self.reason = str(getattr(cause, "reason", AuthReason.UNAUTHORIZED))
        self.detail = text_of(cause)[:1000]  # for the caller; not logged: it may hold a credential
        super().__init__(self.reason)


_CALL_ID_BYTES = 16
_DECIMAL = "0|[1-9][0-9]{0,15}"
_JSON_CONTENT = r'(?i)application/json(?:\s*;\s*charset="?utf-8"?)?'
_TRACE_HEADERS = tuple(key.decode() for key in TRACE_KEYS)
_HOST_PORT = r"(?s)(.*?)(?::([0-9]*))?"
_FORWARDED = frozenset(("forwarded", *(f"x-forwarded-{what}" for what in ("for", "host", "prefix", "proto"))))


class HttpApp:
    """Answers the requests of an HTTP server; safe for use by several threads."""

    scheme = "http"  # of the URLs that pages show
    loopback_port = 0  # where a server that is bound to a loopback address listens

    def __init__(self, server: RpcServer, options: HttpOptions | None = None) -> None:
        check_server(server)
        self.server = server
        self.options = options = options or HttpOptions()
        key = options.token_key
        if key is None:
            key = os.environ.get("VGI_RPC_TOKEN_KEY") or None
        self.own_key = key is None  # one that no other process has
        if self.own_key:
            text = "no token key: a random one is used; no stream survives a restart or goes on in another process"
            logger.warning("%s; set VGI_RPC_TOKEN_KEY (or token_key=) to one secret everywhere", text)
        self.sealer = TokenSealer(token_keys(key or os.urandom(32)), options.token_ttl)
        # An opened call token never changes. Strangers, whose tokens do not open, fill nothing here.
        self.open_half = lru_cache(options.call_state_cache_entries)(self._open_half)
        self.max_request_bytes = options.max_request_bytes or SERVER_MAX_REQUEST_BYTES
        self.limits = IpcLimits(self.max_request_bytes, options.max_rows)
        # One look-up leads from a path, prefix and all, to its method. What is not here is a page or refused.
        self._routes: dict[str, tuple[BoundMethod, str]] = {}
        for service in server.services.values():
            for name, bound in service.methods.items():
                for step in ("", "/init", "/exchange"):
                    self._routes[f"{options.prefix}/{service.name}/{name}{step}"] = bound, step[1:]
        self._hosts = frozenset(host.lower() for host in options.allowed_hosts or ())
        codings = supported_encodings() if options.compression_level is not None else ()
        headers = {  # by every answer; nothing of a feature that is off
            SUPPORTED_ENCODINGS_HEADER: ", ".join(codings),
            EXTERNALIZATION_HEADER: "false",
            ACCEPT_MAX_RESPONSE_BYTES_SUPPORT_HEADER: "true",
            MAX_REQUEST_BYTES_HEADER: options.max_request_bytes,
            MAX_RESPONSE_BYTES_HEADER: options.max_response_bytes,
        }
        self.capabilities = [(name, str(value)) for name, value in headers.items() if value is not None]

    def _open_half(self, binding: tuple[bytes, ...], call_id: bytes, token: bytes) -> FixedHalf:
        content = self.sealer.open(b"call", (*binding, call_id), token, aged=False)
        *messages, call_state, stream_id, limit = unpack_parts(content, 5)
        wires = stream_wires(*[ipc.read_schema(pa.py_buffer(message)) for message in messages])
        return FixedHalf(call_id, wires, call_state, stream_id.decode(), int(limit or 0) or None)

    def __call__(self, request: HttpRequest) -> HttpResponse:
        """Answer *request* with a body of bytes, or one that is an iterator of bytes; never raises."""
        with self.server:
            response = self.respond(request)
        if isinstance(response.body, list):
            response.body = b"".join(response.body)
        return response

    def respond(self, request: HttpRequest, fault: Exception | None = None) -> HttpResponse:
        """Answer *request*, with a refusal if there is a *fault* in it; never raises.

        Whoever asks counts the request as running until its answer is out.
        """
        started = time.monotonic()
        request.request_id = clean_request_id(request.headers.get(REQUEST_ID_HEADER.lower(), ""))
        try:
            if fault is not None:
                raise fault
            response = self._route(request)
        except Exception as exc:
            request.request_id = request.request_id or new_request_id()
            response = self._refuse(request, exc, started)
        allowed = cast("list[str]", self.options.cors_origins)
        origin = request.headers.get("origin")
        if origin is not None and ("*" in allowed or origin in allowed):
            exposed = [REQUEST_ID_HEADER, CONTENT_ENCODING_HEADER, RPC_ERROR_HEADER, AUTH_REASON_HEADER]
            exposed += ["WWW-Authenticate", *(name for name, _ in self.capabilities)]
            response.headers += [
                ("Access-Control-Expose-Headers", ", ".join(exposed)),
                ("Access-Control-Allow-Origin", "*" if "*" in allowed else origin),
                ("Cross-Origin-Resource-Policy", "cross-origin"),
                ("Vary", "Origin"),
            ]
        response.headers += [(REQUEST_ID_HEADER, request.request_id or new_request_id()), *self.capabilities]
        return response

    def _is_for_us(self, host: str, headers: Mapping[str, str]) -> bool:
        """Whether a request with this Host header is meant for this server."""
        hosts = self._hosts
        if not host or "*" in hosts or not (hosts or self.loopback_port):
            return True
        name, port = cast("re.Match[str]", re.fullmatch(_HOST_PORT, host.lower())).groups()
        is_local = self.loopback_port and re.fullmatch(LOOPBACK_HOST, name)
        if is_local or name in hosts or host.lower() in hosts:
            return True
        # A page of the web whose name leads to this machine (DNS rebinding) can send any header, but its browser
        # dials our port, and must name it in Host. Who is sent on by a proxy, which says so, has dialled another.
        dialled = {int(port)} if port else {80, 443}
        return not hosts and self.loopback_port not in dialled and not _FORWARDED.isdisjoint(headers)

    def _route(self, request: HttpRequest) -> HttpResponse:
        method = request.method
        path = request.path
        host = request.headers.get("host", "")
        if not self._is_for_us(host, request.headers):
            text = f"Host {host[:255]!r} is not served here; the option allowed_hosts (--allowed-hosts) adds names"
            raise http_refusal(421, text, Code.PERMISSION_DENIED)
        route = self._routes.get(path)
        if route is not None and method == "POST":
            return _PostedCall(self, request, *route).answer()
        if method == "OPTIONS":
            headers = [("Content-Type", "text/plain"), ("Allow", "GET, HEAD, POST, OPTIONS")]
            if self.options.cors_origins and "access-control-request-method" in request.headers:
                asked = request.headers.get("access-control-request-headers", "Content-Type")
                headers.append(("Access-Control-Allow-Headers", re.sub(r"[^A-Za-z0-9_, -]", "", asked)))
                headers.append(("Access-Control-Allow-Methods", "GET, POST, OPTIONS"))
                headers.append(("Access-Control-Max-Age", "7200"))
            return HttpResponse(200, headers)
        reads = method in ("GET", "HEAD")
        prefix = self.options.prefix
        if path == f"{prefix}/health":
            if not reads:
                raise http_refusal(405, "expected GET, HEAD or OPTIONS", Code.UNIMPLEMENTED)
            said = {"status": "draining" if self.server.draining else "ok"}
            said |= {"server_id": self.server.server_id, "protocol": self.server.protocol_name}
            return json_response(200, said, [("Cache-Control", "no-store")])
        self.authenticate(request)  # before anything that tells which names there are
        if route is not None:
            raise http_refusal(405, "expected POST", Code.UNIMPLEMENTED)
        segments = path[len(prefix) + 1 :].split("/")
        if f"{path}/".startswith(f"{prefix}/") and "%" not in path:
            if reads and self.options.pages and self.server.describe_enabled:
                scheme = request.scheme or self.scheme
                if response := page_at(self.server, self.options, request, segments, scheme):
                    return response
            of_call = len(segments) > 1 and all(segments) and segments[2:] in ([], ["init"], ["exchange"])
            if method == "POST" and of_call:
                self.server.method(self.server.service(segments[0]), segments[1])  # says what there is
        text = f"expected /{{protocol}}/{{method}}[/init|/exchange] or /health below {prefix or '/'}"
        raise http_refusal(404, f"{text}, got {path[:255]!r}", Code.UNIMPLEMENTED)

    def authenticate(self, request: HttpRequest) -> AuthContext:
        """Return who sent *request*. It is asked of each: what it decides may end, or depend on more."""
        if self.options.authenticate is None:
            return ANONYMOUS
        try:
            auth = self.options.authenticate(request)
        except (ValueError, PermissionError) as exc:
            raise _Unauthorized(exc) from None
        except BaseException as exc:  # SystemExit too; what it says is not the client's business
            raise RuntimeError("authenticate raised") from exc
        if not isinstance(auth, AuthContext):
            raise TypeError(f"authenticate: expected an AuthContext, got {got(auth)}")
        return auth

    def _refuse(self, request: HttpRequest, exc: Exception, started: float) -> HttpResponse:
        """Answer a request that does not become a call: in Arrow to Arrow, by a page to a browser, else in JSON."""
        if isinstance(exc, LocalError):  # while the body was read
            exc = http_refusal(408, exc.error_message, Code.DEADLINE_EXCEEDED)
        elif not isinstance(exc, (Refusal, StatusError)):
            log_quietly(logging.ERROR, "request %s failed", request.request_id, exc_info=exc)
            text = f"the server failed; its log says why, at request id {request.request_id}"
            exc = StatusError(text, code=Code.INTERNAL)
        status = getattr(exc, "http_status", 500)  # 500: on_serve_start() raised, or we have failed
        said = error_as_json(exc, request_id=request.request_id)
        text = "There is nothing here; see the links above."
        headers: list[tuple[str, str]] = []
        if isinstance(exc, _Unauthorized):
            challenge = getattr(self.options.authenticate, "challenge", "") or "Bearer"
            headers = [("WWW-Authenticate", challenge), (AUTH_REASON_HEADER, exc.reason)]
            text = f"{exc.reason}: {exc.detail}"
            said.update(error="unauthorized", reason=exc.reason, detail=exc.detail, message=exc.detail)
        elif status == 405:
            headers = [("Allow", "GET, HEAD, OPTIONS" if request.path.endswith("/health") else "POST")]
        elif status == 413 and self.options.max_request_bytes is None:
            headers = [(MAX_REQUEST_BYTES_HEADER, str(self.max_request_bytes))]
        elif status == 503:
            headers = [("Retry-After", "1")]
        if request.method == "POST" and is_arrow(request.headers) and status != 401:
            body = stream_bytes(EMPTY, [self.server.error_item(exc, EMPTY, request.request_id)])
            response = HttpResponse(status, [("Content-Type", ARROW_CONTENT_TYPE)], body)
        elif status in (401, 404) and "text/html" in request.headers.get("accept", ""):
            title = _status_line(status)
            response = page(title, tag("p", text), root_of(request.path, self.options.prefix), status)
        else:
            response = json_response(status, said, [("Cache-Control", "no-store")])
        response.headers += headers
        protocol, method, *_ = [*request.path.removeprefix(self.options.prefix)[1:].split("/"), ""]
        record = CallRecord(TransportKind.HTTP, protocol=protocol, method=method)
        record.remote_addr = request.remote_addr
        record.request_id = request.request_id
        record.duration_ms = (time.monotonic() - started) * 1000
        record.http = {"http_status": status, "path": request.path[:1000]}
        self.server.log_answer(record, exc)
        return response


def _int_of(headers: Mapping[str, str], name: str, least: int, most: int) -> int | None:
    text = headers.get(name.lower())
    if text is None:
        return None
    if not re.fullmatch(_DECIMAL, text) or not least <= int(text) <= most:
        raise ProtocolError(f"{name}: expected one decimal from {least} to {most}, got {text[:40]!r}")
    return int(text)


class _PostedCall:
    """One request to a method: a unary call, the start of a stream, its next turns, or a call in JSON."""

    _call: Call  # once it has begun
    _half: FixedHalf  # of a stream

    def __init__(self, app: HttpApp, request: HttpRequest, bound: BoundMethod, step: str) -> None:
        auth = app.authenticate(request)
        app.server.start(TransportKind.HTTP)
        self._app = app
        self._request = request
        self._headers = headers = request.headers
        self._bound = bound
        self._step = step
        self._pieces: list[Buffer] = []  # of the answer, before it is encoded
        self._tokens = 0  # bytes of tokens in them
        traces = {}
        if "traceparent" in headers:
            traces = {name: headers[name] for name in _TRACE_HEADERS if name in headers}
        budget = _int_of(headers, ACCEPT_MAX_RESPONSE_BYTES_HEADER, MIN_RESPONSE_BUDGET, MAX_RESPONSE_BUDGET)
        limit = min(filter(None, (app.options.max_response_bytes, budget)), default=None)
        self._caller = CallRecord(TransportKind.HTTP, auth, request.remote_addr, traces, request.gone, limit)

    @cached_property
    def _binding(self) -> tuple[bytes, ...]:
        """What a token is good for. An authenticated caller without a name is not the same as nobody."""
        auth = self._caller.auth
        names = [self._bound.service.name, self._bound.info.name]
        if auth.authenticated:
            names += ["authenticated", auth.domain or "", auth.principal or ""]
        return tuple([name.encode("utf-8", "surrogatepass") for name in names])

    def answer(self) -> HttpResponse:
        """Serve it."""
        is_stream = self._bound.info.method_type is MethodType.STREAM
        if not is_arrow(self._headers):
            return self._answer_json()
        if is_stream != bool(self._step):
            wrong = "is a stream; post to its /init"
            if not is_stream:
                wrong = f"is no stream; post without /{self._step}"
            raise ProtocolError(f"{self._bound.info.name}() {wrong}")
        if is_stream and self._request.multiprocess and self._app.own_key:
            text = "streams need one token key in all worker processes: set VGI_RPC_TOKEN_KEY or token_key="
            raise http_refusal(500, text, Code.FAILED_PRECONDITION)
        body = self._read_body(self._app.max_request_bytes)
        if not len(body):
            raise IPCError("request: expected an Arrow IPC stream, got an empty body")
        try:
            turn = self._go_on(body) if self._step == "exchange" else self._begin(body)
            return self._response(turn, len(body))
        finally:
            if hasattr(self, "_call"):
                self._call.end()

    def _read_body(self, limit: int) -> Buffer:
        coding = coding_of(self._headers)  # one that is not ours is refused before the body is read
        return decompress_body(self._request.read_body(limit), coding, limit)

    def _reader(self, source: ByteSource, expected: Any) -> IpcReader:
        return IpcReader(source, self._app.limits, self._app.server.ipc_validation, expected=expected)

    def _open_call(self, metadata: Metadata, request: Request | None = None, stream_id: str = "") -> Call:
        """Begin a call, or go on with the stream *stream_id*; it is answered under the id that it has itself."""
        asked = self._request
        own = clean_request_id(metadata_text(metadata, REQUEST_ID_KEY))
        own = own or asked.request_id or new_request_id()
        asked.request_id = asked.request_id or own
        self._call = Call(self._app.server, self._bound, self._caller, own, metadata, request, stream_id)
        return self._call

    def _begin(self, body: Buffer) -> Turn:
        """Serve a unary call, or the start of a stream; return the last turn."""
        server = self._app.server
        info = self._bound.info
        ready = server.request_table.read(body) if isinstance(body, bytes) else None
        if ready is not None and ready[0] is self._bound and ready[2] == len(body):
            request: Request = ready[1]
        else:
            source = ByteSource(body)
            request = read_request(self._reader(source, server.request_schemas))
            if source.at < len(body):
                raise IPCError(f"request: {len(body) - source.at} bytes after the end of the stream")
            server.resolve(request, (info.protocol_name, info.name))
        call = self._open_call(request.metadata, request)
        turn = call.begin(request.arguments)
        if turn.items:  # a stream without a header has none
            self._pieces = stream_pieces(turn.wire, turn.items)
        if call.stream is None:
            return turn
        return self._turns(() if call.stream.is_producer else None, begins=True)

    def _begin_stream(self) -> bytes:
        """Set the fixed half of a stream, and return its token."""
        call = self._call
        wires = cast("StreamWires", call.wires)
        limit = call.response_limit_bytes
        self._half = FixedHalf(os.urandom(_CALL_ID_BYTES), wires, call.call_state, call.stream_id, limit)
        rest = [call.call_state, call.stream_id.encode(), str(limit or "").encode()]
        content = pack_parts([wires.output.message, wires.input.message, *rest])
        return self._app.sealer.seal(b"call", (*self._binding, self._half.call_id), content)

    def _content(self) -> bytes:
        """Return what the cursor of the present state seals; a refusal names what cannot be written.

        It holds the id of the call, the class of the state and its bytes.
        """
        state = cast("Stream[Any, Any]", self._call.stream).state
        classes = self._bound.state_types
        if type(state) not in classes:
            names = ", ".join(cls.__name__ for cls in classes) or "no concrete class"
            text = f"{names} (the implementation's return annotation), got {type(state).__name__}"
            text += "; over HTTP the state is read back as the annotated class"
            raise ParameterError(f"{self._bound.info.name}() state: expected {text}")
        index = bytes([classes.index(type(state))])
        content = self._half.call_id + index + cast("bytes", state.serialize_to_bytes())
        self._app.sealer.check_size(content)  # which sealing does too: but here a further turn may run first
        return content

    def _state_in(self, content: bytes) -> Any:
        cls: Any = self._bound.state_types[content[_CALL_ID_BYTES]]
        fields = content[_CALL_ID_BYTES + 1 :]
        return cls.deserialize_from_bytes(fields, IpcValidation.NONE)  # the seal vouches for the bytes

    def _revive(self, content: bytes) -> None:
        """Have the call go on with the state that a cursor's *content* holds.

        Raises `TokenError` when the state fits its class no more, and what the state's own hooks raise.
        """
        half = self._half
        call = self._call
        call_state: Any = None
        try:
            state = self._state_in(content)
            if half.call_state:
                codec = dataclass_codec(state.CALL_STATE_TYPE)
                call_state = codec.from_bytes(half.call_state, IpcValidation.NONE)
        except (Refusal, IndexError, TypeError) as exc:
            if call.stream is not None:  # a turn in this request has left it so
                raise
            raise TokenError(TOKEN_OUTDATED) from exc
        if type(state).rehydrate is not StreamState.rehydrate:
            call.run(state.rehydrate, [self._bound.service.implementation])
        if call_state is not None:
            call.run(state.bind_call_state, [call_state])
        output, input_, _ = half.wires
        call.stream = call.stream or Stream(output.schema, state, input_.schema)
        vars(call.stream).update(state=state, call_state=call_state)
        call.wires = half.wires

    def _go_on(self, body: Buffer) -> Turn:
        """Serve the next turn of a stream, or its end, from the tokens that come with the input."""
        source = ByteSource(body)
        reader = self._reader(source, ())
        message = reader.next_message()
        if message is None:
            raise ProtocolError("exchange: expected one batch, got none")
        metadata = message.metadata
        # The cursor is opened first, and only the call id in it is trusted.
        content = self._app.sealer.open(b"state", self._binding, metadata.get(STATE_KEY))
        ids = (self._binding, content[:_CALL_ID_BYTES])
        self._half = half = self._app.open_half(*ids, metadata.get(CALL_STATE_KEY, b""))
        wanted = half.wires.input.schema
        if reader.wire.dictionaries and not reader.schema.equals(wanted):  # before one of them is decoded
            text = f"expected {schema_text(wanted)}, got {schema_text(reader.schema)}"
            raise ParameterError(f"{self._bound.info.name}() input: {text}")
        batch = reader.decode(message)
        if source.read(len(END_OF_STREAM) + 1) != END_OF_STREAM:
            raise ProtocolError("exchange: expected one batch and the end of the stream, got something else")
        limits = (self._caller.response_limit_bytes, half.limit)
        self._caller.response_limit_bytes = min(filter(None, limits), default=None)
        call = self._open_call(metadata, stream_id=half.stream_id)
        try:
            self._revive(content)
        except BaseException as exc:  # of the state's own hooks, too
            turn = call.failed(exc, refused=isinstance(exc, TokenError))
            self._pieces = stream_pieces(turn.wire, turn.items)
            return turn
        return self._turns((batch, metadata))

    def _turns(self, turn_input: tuple[Any, ...] | None, begins: bool = False) -> Turn:
        """Run a turn on *turn_input*, of a producer several if the client takes them; with None an exchange only begins.

        Returns the last one. The output stream ends with the fresh cursor, beside the call token if the stream *begins*.
        """
        call: Any = self._call
        wire = call.wires.output
        writer = IpcWriter(self._pieces.extend, wire)
        turn = Turn(wire, [], False)
        items: list[Item] = []  # which end the answer
        sealed = {}
        try:
            if begins:  # before anything runs: a stream that cannot go on does not start
                sealed[CALL_STATE_KEY] = self._begin_stream()
            if turn_input is None:
                items = call.logs(wire)
                content = self._content()
            elif call.stream.is_producer:
                turn, content = self._produce(writer, turn_input, len(sealed.get(CALL_STATE_KEY, b"")))
            else:
                turn = call.turn(*turn_input)
                items = turn.items
                content = b"" if turn.finished else self._content()
            if not turn.finished:
                if not dataclass_codec(type(call.stream.state)).is_read_back:
                    self._state_in(content)  # else refused here
                sealed[STATE_KEY] = self._app.sealer.seal(b"state", self._binding, content)
                self._tokens = len(sealed[STATE_KEY])
                # That of an exchange rides on the data batch of its turn, also where that has no rows.
                item: Item = items.pop() if items and turn.items else (wire.empty, None)
                if isinstance(item, bytes):
                    item = with_metadata(item, sealed)
                else:
                    item = item[0], {**(item[1] or {}), **sealed}
                items.append(item)
        except BaseException as exc:  # the state cannot be written or sealed, or its own hooks raised
            turn = call.failed(exc)
            items = turn.items
        writer.write_all(items, close=True)
        return turn

    def _produce(self, writer: IpcWriter, tick: tuple[Any, ...], token_bytes: int) -> tuple[Turn, bytes]:
        """Run and write turns of a producer, as many as the client takes and have room beside a call token.

        Returns the last one, and the content of the cursor behind it.
        """
        call = self._call
        limit = call.response_limit_bytes or sys.maxsize
        size = total_size(self._pieces)
        deadline = time.monotonic() + MAX_TURNS_SECONDS
        left = min(_int_of(self._headers, MAX_TURNS_HEADER, 1, MAX_RESPONSE_BUDGET) or 1, MAX_TURNS)
        content = b""
        while True:
            before = content
            mark = len(self._pieces)
            turn = call.turn(*tick)
            content = b"" if turn.finished else self._content()
            writer.write_all(turn.items)
            size += total_size(self._pieces[mark:])
            # What the batch that ends the answer takes, with the tokens in it.
            room = 4_096 + 2 * len(content) + token_bytes
            if before and size + room > limit:
                # The turn is not lost: it is run again, from the cursor before it, by the next request.
                del self._pieces[mark:]
                call.error = None
                return Turn(writer.wire, [], False), before
            left -= 1
            full = size > min(MAX_TURNS_BYTES, limit - 2 * room)
            if turn.finished or full or not left or time.monotonic() > deadline or call.server.draining:
                return turn, content
            self._revive(content)

    def _response(self, turn: Turn, request_bytes: int) -> HttpResponse:
        """Put the answer's bytes, whose last turn is *turn*, into a response: budget first, then coding."""
        call = self._call
        pieces = self._pieces
        size = total_size(pieces)
        if call.response_limit_bytes is not None and size > call.response_limit_bytes:
            turn = too_large(call, size, call.response_limit_bytes)
            pieces = stream_pieces(turn.wire, turn.items)
        headers = [("Content-Type", ARROW_CONTENT_TYPE)]
        if turn.error is not None:
            headers.append((RPC_ERROR_HEADER, "true"))
        public = self._headers.get("accept-encoding", "")[:1000]
        private = self._headers.get(ACCEPT_ENCODING_HEADER.lower())
        encoding, header, identity = choose_encoding(private, public)
        level = self._app.options.compression_level
        if encoding and level and (not identity or is_worth_packing(pieces, encoding, level, self._tokens)):
            headers.append((header, encoding))
            pieces = [compress_body(pieces, encoding, level)]
        size = total_size(pieces)
        call.http.update(http_status=turn.http_status, request_bytes=request_bytes, response_bytes=size)
        return HttpResponse(turn.http_status, headers, pieces)

    def _answer_json(self) -> HttpResponse:
        info = self._bound.info
        options = self._app.options
        empty = self._headers.get("content-length", "0") == "0" and "transfer-encoding" not in self._headers
        media = self._headers.get("content-type", JSON_TYPE if empty else "")
        if not options.json or not re.fullmatch(_JSON_CONTENT, media):
            hint = f" or {JSON_TYPE} (curl: -H 'Content-Type: {JSON_TYPE}')" if options.json else ""
            raise http_refusal(415, f"Content-Type: expected {ARROW_CONTENT_TYPE}{hint}, got {media[:100]!r}")
        if self._step or self._bound.is_exchange:
            text = f"{info.name}(): JSON has no batches; expected Content-Type: {ARROW_CONTENT_TYPE}"
            raise http_refusal(415, text, Code.UNIMPLEMENTED)
        _int_of(self._headers, CONNECT_VERSION_HEADER, 1, 1)
        milliseconds = _int_of(self._headers, CONNECT_TIMEOUT_HEADER, 0, 10**10 - 1)
        metadata = {} if milliseconds is None else {TIMEOUT_KEY: b"%d" % milliseconds}
        body = self._read_body(options.max_request_bytes or JSON_MAX_REQUEST_BYTES)
        arguments = parse_json(body) if len(body) else {}
        call = self._open_call(metadata)
        turn = call.begin(lambda info: decode_arguments(info, arguments_from_json(info, arguments)))
        call.http.update(http_status=200, request_bytes=len(body))
        if call.stream is not None:
            header = [{"__header__": row} for row in _rows_of(turn, described_schemas(info)["header"])]
            turn = call.turn()  # whose error decides the status
            if turn.error is None:
                rows = _json_rows(call, header, turn)
                next(rows)  # which says nothing yet: from here on, closing it ends the call
                return HttpResponse(200, [("Content-Type", NDJSON_TYPE)], rows)
        elif turn.error is None:
            try:
                response = json_response(200, {"result": result_to_json(info, turn.last_batch())})
                size = len(response.body)
                if size > (call.response_limit_bytes or size):
                    turn = too_large(call, size, call.response_limit_bytes or 0)
            except Exception as exc:  # a value that Python, and so JSON, does not have
                turn = call.failed(exc)
        if turn.error is not None:
            response = json_response(http_status_of(turn.error), _error_json(call, turn.error))
        call.http.update(http_status=response.status, response_bytes=len(response.body))
        call.end()
        return response


def _json_rows(call: Call, rows: list[dict[str, Any]], turn: Turn) -> Iterator[bytes]:
    """Yield nothing, and then *rows* and, from *turn* on, those of a producer as lines of JSON, made as they are sent.

    A turn that fails is a last line ``{"__error__": …}``. The call ends with it.
    """
    sent = 0
    limit = call.response_limit_bytes or sys.maxsize
    try:
        with call.server:  # until the rows are out
            yield b""
            while True:
                lines = b""
                try:
                    lines = b"".join(map(json_bytes, rows + _rows_of(turn)))
                except Exception as exc:  # a value that Python does not hold
                    turn = call.failed(exc)
                if sent + len(lines) > limit:
                    turn = too_large(call, sent + len(lines), limit)
                if turn.error is not None:
                    lines = json_bytes({"__error__": _error_json(call, turn.error)})
                sent += len(lines)
                if lines:
                    yield lines
                if turn.finished:
                    break
                rows = []
                turn = call.turn()
    finally:
        if not turn.finished:  # the client left
            call.cancel()
        call.http.update(response_bytes=sent)
        call.end()


def _rows_of(turn: Turn, described: pa.Schema | None = None) -> list[dict[str, Any]]:
    return batch_rows(turn.last_batch(), described) if turn.items else []


def _error_json(call: Call, error: BaseException) -> dict[str, Any]:
    """An error in JSON; what a method raised has its traceback, where the server shows it."""
    trace = ""
    if call.server.include_tracebacks and not isinstance(error, Refusal):
        trace = str((Message.from_exception(error).extra or {}).get("traceback", ""))
    return error_as_json(error, request_id=call.request_id, trace=trace)


# -- WSGI


@cache
def _status_line(status: int) -> str:
    from http import HTTPStatus  # whoever serves HTTP has loaded it

    return f"{status} {HTTPStatus(status).phrase}"


def make_wsgi_app(
    server: RpcServer,
    *,
    prefix: str = "",
    token_key: bytes | str | Sequence[bytes] | None = None,
    token_ttl: float = TOKEN_TTL_SECONDS,
    authenticate: Authenticate | None = None,
    cors_origins: str | Iterable[str] | None = None,
    max_request_bytes: int | None = None,
    max_response_bytes: int | None = None,
    compression_level: int | None = 1,
    call_state_cache_entries: int = MAX_OPEN_TOKENS,
    max_rows: int | None = None,
    pages: bool = True,
    json: bool = True,
    allowed_hosts: str | Iterable[str] | None = None,
) -> Callable[..., Iterable[bytes]]:
    """Return a WSGI application (PEP 3333) for any WSGI server; the keywords are the fields of `HttpOptions`.

    Raises ``ValueError`` and ``TypeError`` for an option that is out of range.
    """
    options = locals()
    app = HttpApp(options.pop("server"), HttpOptions(**options))

    def wsgi(environ: dict[str, Any], start_response: Any = None, *more: Any) -> Iterable[bytes]:
        if more or not callable(start_response):
            text = "an ASGI server needs an adapter, such as a2wsgi.WSGIMiddleware(app)"
            raise TypeError(f"this is a WSGI application; {text}")
        response = app(_request_from_environ(environ))
        body: Any = response.body
        if isinstance(body, bytes):
            response.headers.append(("Content-Length", str(len(body))))
            body = iter([body] if environ["REQUEST_METHOD"] != "HEAD" else [])
        start_response(_status_line(response.status), response.headers)
        return cast("Iterable[bytes]", body)

    return wsgi


def _request_from_environ(environ: dict[str, Any]) -> HttpRequest:
    named = {key[5:]: value for key, value in environ.items() if key.startswith("HTTP_")}
    named.update({key: environ[key] for key in ("CONTENT_TYPE", "CONTENT_LENGTH") if environ.get(key)})
    headers = {key.replace("_", "-").lower(): value for key, value in named.items()}
    path = environ.get("PATH_INFO", "")
    raw = (environ.get("RAW_URI") or environ.get("REQUEST_URI") or "").partition("?")[0]
    if "%" in raw and not raw.endswith(path):
        path += "%"  # it was encoded, which no name of ours needs: so it is not there

    def read_body(limit: int) -> bytes:
        length = headers.get("content-length")
        chunked = length is None and environ.get("wsgi.input_terminated")  # the server under us decodes them
        if length is None and not chunked and (is_arrow(headers) or "transfer-encoding" in headers):
            raise http_refusal(411, "POST requires a Content-Length")
        size = limit + 1 if chunked else content_length(length or "0", limit)
        body: bytes = environ["wsgi.input"].read(size)
        if len(body) > limit:
            raise body_too_large(limit, "more")
        if len(body) < size and not chunked:
            raise IPCError(f"request body: expected {size} bytes, got {len(body)}")
        return body

    request = HttpRequest(environ["REQUEST_METHOD"], path, headers, environ.get("REMOTE_ADDR", ""), read_body)
    request.multiprocess = bool(environ.get("wsgi.multiprocess"))
    request.mount = environ.get("SCRIPT_NAME", "")
    request.scheme = environ.get("wsgi.url_scheme", "")
    return request


# -- http.server


_OVER_CAP_SECONDS = 1.0  # in which a connection beyond the cap may ask for health
_LINGER_SECONDS = 1.0
_CLOSE = "Connection: close\r\n"
if typing.TYPE_CHECKING:
    _Handler = http.server.BaseHTTPRequestHandler
else:
    _Handler = object


class HttpHandler(_Handler):
    """One connection to `serve_http`: reads strictly, answers, and hangs up where the framing is in doubt."""

    app: HttpApp
    options: HttpServeOptions

    def setup(self) -> None:
        listener = cast("ListenerMixin", self.server)
        self.request = set_up_tcp(listener, self.request, self.options.tls_context)
        self._remote = address_text(self.client_address)
        self._over_cap = len(listener.connections) > self.options.max_connections
        self._channel = ByteChannel(self.request)
        self._patience = _OVER_CAP_SECONDS if self._over_cap else self.options.read_timeout
        self._wait = self._patience  # for the next request
        self._reader = HttpReader(self._channel, self._patience, self.options.request_deadline)
        self._unread = False  # whether there is a body, not to be taken for the next request: then it closes

    def finish(self) -> None:
        self.request.close()

    def handle_one_request(self) -> None:
        """Serve one request, and decide whether the connection goes on."""
        self.close_connection = True
        try:
            self._reader.deadline = None
            self._channel.deadline = time.monotonic() + self._wait
            self._wait = self.options.keep_alive_timeout
            self.close_connection = not self._serve()
        except LocalError as exc:  # the client has left, or does neither send nor read
            log_quietly(logging.DEBUG, "connection from %s: %s", self._remote, exc, exc_info=False)
        if self._unread:
            with suppress(OSError, LocalError):
                # Read on for a moment before hanging up: closing on unread bytes resets the connection.
                self.request.shutdown(socket.SHUT_WR)
                self._channel.deadline = time.monotonic() + _LINGER_SECONDS
                while self._channel.read(SMALL_BODY_BYTES):
                    pass

    def _serve(self) -> bool:
        keep = False
        version = "HTTP/1.1"
        fault = None
        request = HttpRequest("GET", "", {}, self._remote)
        try:
            raw = self._reader.head()
            if not raw:
                return False
            self._unread = True
            head = parse_http_head(raw)
            path, host = check_request_head(head)
            method, _, version = head.start
            headers = {**head.headers, "host": host}
            body = partial(self._read_body, headers, version)
            request = HttpRequest(method, path, headers, self._remote, body, self._channel.peer_gone)
            self._unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
            closes = "connection" in headers and header_has(headers, "connection", "close")
            keep = version == "HTTP/1.1" and not closes
            if self._over_cap and not path.endswith("/health"):
                text = f"this server takes {self.options.max_connections} connections at a time"
                fault = http_refusal(503, text, Code.UNAVAILABLE)
        except ProtocolError as exc:  # of the head: where this request ends is not known
            fault = exc
        with self.app.server:  # until the answer is out
            response = self.app.respond(request, fault)
            keep = keep and not (self._unread or self._over_cap or self.app.server.draining)
            self._send(response, request.method, version, keep)
        return keep

    def _read_body(self, headers: Mapping[str, str], version: str, limit: int) -> Buffer:
        content_length(headers.get("content-length", "0"), limit)  # a body that is refused is not asked for
        if version == "HTTP/1.1" and headers.get("expect", "").lower() == "100-continue":
            self._channel.write([b"HTTP/1.1 100 Continue\r\n\r\n"])
        body = self._reader.body("chunked" if "transfer-encoding" in headers else "sized", headers, limit)
        self._unread = False
        return body

    def _send(self, response: HttpResponse, method: str, version: str, keep: bool) -> None:
        body: Any = response.body
        pieces = [body] if isinstance(body, bytes) else body
        framing = ""  # of rows as they are made, for HTTP/1.0: they end where the connection does
        if isinstance(pieces, list):
            framing = f"Content-Length: {total_size(pieces)}\r\n"
        elif version == "HTTP/1.1":
            framing = "Transfer-Encoding: chunked\r\n"
        lines = "".join([f"{name}: {value}\r\n" for name, value in response.headers])
        head = (
            f"HTTP/1.1 {_status_line(response.status)}\r\n{'' if keep else _CLOSE}{lines}"
            f"Date: {_http_date(int(time.time()))}\r\n{framing}\r\n"
        ).encode("latin-1", "replace")
        if isinstance(pieces, list):
            self._write([head] if method == "HEAD" else [head, *pieces])
            return
        with closing(body):
            self._write([head])
            for piece in body:
                self._write([b"%x\r\n" % len(piece), piece, b"\r\n"] if framing else [piece])
            self._write([b"0\r\n\r\n"] if framing else [])

    def _write(self, pieces: list[Buffer]) -> None:
        size = total_size(pieces)
        left = cast("float", self._channel.deadline) - time.monotonic()
        # A small answer has what is left of the wait for its request: setting a timeout is a system call.
        if size > SMALL_BODY_BYTES or left < self._patience:
            self._reader.deadline = None
            self._reader.allow(size)
        self._channel.write(pieces)


@lru_cache(maxsize=2)  # made anew it takes 3 % of a small call
def _http_date(second: int) -> str:
    from email.utils import formatdate  # http.server has loaded it

    return formatdate(second, usegmt=True)


def serve_http(
    server: RpcServer,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    prefix: str = "",
    token_key: bytes | str | Sequence[bytes] | None = None,
    token_ttl: float = TOKEN_TTL_SECONDS,
    authenticate: Authenticate | None = None,
    cors_origins: str | Iterable[str] | None = None,
    max_request_bytes: int | None = None,
    max_response_bytes: int | None = None,
    compression_level: int | None = 1,
    call_state_cache_entries: int = MAX_OPEN_TOKENS,
    max_rows: int | None = None,
    pages: bool = True,
    json: bool = True,
    allowed_hosts: str | Iterable[str] | None = None,
    tls_context: ssl.SSLContext | None = None,
    max_connections: int = MAX_CONNECTIONS,
    read_timeout: float = READ_TIMEOUT_SECONDS,
    request_deadline: float = REQUEST_DEADLINE_SECONDS,
    keep_alive_timeout: float = KEEP_ALIVE_SECONDS,
    drain_grace_seconds: float = DRAIN_GRACE_SECONDS,
    idle_timeout: float | None = None,
    on_bound: Callable[[str, int], None] | None = None,
) -> None:
    """Serve over HTTP/1.1 until SIGTERM or SIGINT; see `HttpOptions` and `HttpServeOptions` for the keywords.

    Raises ``OSError`` when the address cannot be bound, ``ValueError`` and ``TypeError`` for an option that is out
    of range.
    """
    options = locals()
    import http.server  # by those alone who serve with it

    check_tls_context(tls_context)
    app = HttpApp(options.pop("server"), HttpServeOptions(**options))
    listening = listen_tcp(host, port, authenticate is not None)
    bound_port = listening.getsockname()[1]
    if tls_context is not None:
        app.scheme = "https"
    if re.fullmatch(LOOPBACK_HOST, host):
        app.loopback_port = bound_port
    base = http.server.BaseHTTPRequestHandler
    handler = type("Handler", (HttpHandler, base), {"app": app, "options": app.options})
    Listener: Any = type("HttpListener", (ListenerMixin, http.server.ThreadingHTTPServer), {})
    # Twice as many, who may ask for health.
    listener = Listener(listening, handler, server, True, 2 * max_connections, idle_timeout)
    listener.run(drain_grace_seconds, on_bound, host, bound_port)


# ====================
# 19. HTTP CLIENT ... uses 1-18
# The HTTP side of the client: what a server can do, one request and its answer by three senders, and streams by tokens.
# Law: a call is sent once, never retried behind the caller's back; what a server sends is bounded before it is kept;
# an answer that came in the server's place (a proxy's, a gateway's) is said to be one.

Headers: TypeAlias = Mapping[str, str] | Callable[[], Mapping[str, str]]
Pair: TypeAlias = tuple[str, str]
Pairs: TypeAlias = tuple[Pair, ...]
Read: TypeAlias = Callable[[Buffer], Any]
Body: TypeAlias = list[Buffer]
_BUDGET_OPTION = "accepted_max_response_bytes"
_MAX_IDLE = 8  # connections that are kept between calls
_MAX_INTERIM = 16  # 1xx answers before the one that counts
_CONNECT_SECONDS = 10.0
_BASE_URL = r"(?ai)(https?)://(\[[0-9A-F:.]+\]|[^][\s/?#@:]+)(?::([0-9]{1,5}))?((?:/[^\s?#]*)?)"
# How gRPC maps what a gateway answers in the server's place.
_GATEWAY_CODES = dict.fromkeys((408, 429, 502, 503, 504), Code.UNAVAILABLE)
_GATEWAY_CODES |= {2: Code.INTERNAL, 3: Code.UNIMPLEMENTED, 400: Code.INTERNAL}  # 2xx, 3xx
_GATEWAY_CODES |= {403: Code.PERMISSION_DENIED, 404: Code.UNIMPLEMENTED, 413: Code.RESOURCE_EXHAUSTED}


class HttpServerCapabilities(NamedTuple):
    """What a server says of itself, each in the header of that name; sizes in bytes, ``None`` for no limit."""

    max_request_bytes: int | None = None
    max_response_bytes: int | None = None
    max_externalized_response_bytes: int | None = None  # of an answer by way of external storage
    externalization_enabled: bool = False  # it may answer with pointers to external storage
    upload_url_support: bool = False  # it hands out upload URLs
    max_upload_bytes: int | None = None
    supported_encodings: tuple[str, ...] = ()  # body codings that it reads and writes
    accept_max_response_bytes_support: bool = False  # it honours a client's budget

    @classmethod
    def from_headers(cls, headers: Mapping[str, str]) -> HttpServerCapabilities:
        """Read them from headers by lower-case name; what cannot be read counts as absent."""
        fields: dict[str, Any] = {}
        for name, default in cls._field_defaults.items():
            text = headers.get(f"vgi-{name.replace('_', '-')}", "")
            if isinstance(default, bool):
                fields[name] = text == "true"
            elif isinstance(default, tuple):
                fields[name] = tuple(re.findall(r"[^\s,]+", text))
            elif re.fullmatch("[0-9]{1,18}", text):
                fields[name] = int(text)
        return cls(**fields)


class HttpReply(NamedTuple):
    """An HTTP answer: headers by lower-case name, the body decoded."""

    status: int
    headers: Mapping[str, str]
    body: Buffer

    def decoded(self, most: int) -> HttpReply:
        """Decode the body to at most *most* bytes; raises as `decompress_body` and `coding_of`."""
        return self._replace(body=decompress_body(self.body, coding_of(self.headers), most))


class HttpSender:
    """Sends one HTTP request and returns its answer; safe for use by several threads."""

    prefix = ""  # path that belongs to the server itself

    def send(self, verb: str, path: str, headers: Pairs, body: Body, deadline: Time, most: int) -> HttpReply:
        """Send a request and return the answer, of at most *most* bytes, else `RequestTooLargeError`. `TransportError`
        when none comes, or one that is not HTTP; `DeadlineExceededError` when it is not there at the *deadline*."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back connections."""


class HttpTarget(NamedTuple):
    """Where an HTTP client connects."""

    scheme: str
    host: str
    port: int
    prefix: str  # path in front of every request, without a slash at its end

    @classmethod
    def parse(cls, url: str) -> HttpTarget:
        """Read a base URL; raises ``ValueError``."""
        match = re.fullmatch(_BASE_URL, url)
        if match is None or int(match[3] or 0) > 65_535 or not url.isascii():
            safe = re.sub("//[^/]*@", "//…@", url)
            raise ValueError(f"base URL: expected http(s)://host[:port][/prefix], got {safe!r}")
        scheme = match[1].lower()
        port = int(match[3] or {"http": 80, "https": 443}[scheme])
        return cls(scheme, match[2].strip("[]"), port, match[4].rstrip("/"))

    @property
    def authority(self) -> str:
        """Host and port as the Host header has them: without the scheme's own port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}".removesuffix({"http": ":80", "https": ":443"}[self.scheme])


@lru_cache(maxsize=64)  # a client sends the same few heads again and again
def _head(authority: str, verb: str, path: str, headers: Pairs) -> bytes:
    lines = [f"{verb} {path} HTTP/1.1", f"Host: {authority}"]
    lines += [f"{name}: {value}" for name, value in headers]
    for line in lines[1:]:  # without its value, which may be a secret
        if not re.fullmatch(_FIELD_LINE, f"{line}\r\n") or max(line) > "\xff":
            name = line.partition(":")[0]
            raise ValueError(f"header {name!r}: expected a name, and a value of Latin-1 without a line break")
    return "".join([f"{line}\r\n" for line in lines]).encode("latin-1")


class HttpConnections(HttpSender):
    """Kept-alive connections to one server, each call on one of its own. A forked child's copies are closed, see section 12."""

    def __init__(self, target: HttpTarget, tls_context: ssl.SSLContext | None = None) -> None:
        self._target = target
        self._tls: ssl.SSLContext | None = None
        if target.scheme == "https":
            import ssl

            self._tls = tls_context or ssl.create_default_context()
        self._idle: list[ByteChannel] = []
        self._closed = False

    def _connection(self, deadline: Time) -> ByteChannel:
        """Take a kept connection; one that was closed, or on which something came unasked, is closed here too."""
        while self._idle:
            with suppress(IndexError):  # another thread took the last one
                channel = self._idle.pop()
                if channel.is_quiet():
                    return channel
                channel.close()
        timeout = _CONNECT_SECONDS
        if deadline is not None:
            timeout = min(timeout, max(0.001, deadline - time.monotonic()))
        return connect_tcp_socket(self._target.host, self._target.port, timeout, self._tls).channel

    def send(self, verb: str, path: str, headers: Pairs, body: Body, deadline: Time, most: int) -> HttpReply:
        authority = self._target.authority
        length = b"Content-Length: %d\r\n\r\n" % total_size(body) if verb == "POST" else b"\r\n"
        request = [_head(authority, verb, path, headers) + length, *body]
        if self._closed:
            raise TransportError("the connection is closed: it was closed here")
        channel = self._connection(deadline)
        channel.deadline = deadline
        try:
            # Who refuses a large body may have answered before hanging up.
            with suppress(TransportError):
                channel.write(request)
            with suppress(TransportError):  # of a reset, behind which is the end
                channel.received()
            data, at = channel.received()
            if data.startswith(b"\x15\x03", at):  # an alert of TLS
                raise TransportError(f"{authority} speaks TLS: connect to https://")
            reader = HttpReader(channel)
            for _ in range(_MAX_INTERIM + 1):
                raw = reader.head()
                if not raw:
                    hint = " (if it speaks TLS, connect to https://)" * (self._tls is None and verb == "HEAD")
                    raise TransportError(f"{authority} closed the connection without an answer{hint}")
                head = parse_http_head(raw)
                status, framing = check_answer_head(head, verb)
                if status >= 200:
                    break
            else:
                raise ProtocolError(f"more than {_MAX_INTERIM} interim answers")
            whole = reader.body(framing, head.headers, most, _BUDGET_OPTION)
        except BaseException as exc:
            channel.close()
            if isinstance(exc, RequestTooLargeError) or not isinstance(exc, Refusal):
                raise
            fault = "closed the connection within an answer" if channel.ended else "speaks no HTTP"
            raise TransportError(f"{authority} {fault}: {text_of(exc)}") from None
        is_last = framing == "to close" or head.start[0] != "HTTP/1.1" or len(self._idle) >= _MAX_IDLE
        if is_last or header_has(head.headers, "connection", "close"):
            channel.close()
        else:
            self._idle.append(channel)
            if self._closed:  # meanwhile, by another thread
                self.close()
        return HttpReply(status, head.headers, whole).decoded(most)

    def close(self) -> None:
        self._closed = True
        with suppress(IndexError):  # none is left
            while True:
                self._idle.pop().close()


class OpenerSender(HttpSender):
    """Sends by an opener of ``urllib.request``: proxies, client certificates, handlers of one's own. Each request is one
    ``opener.open``, which by itself keeps no connection."""

    def __init__(self, opener: urllib.request.OpenerDirector, target: HttpTarget, way: str = "") -> None:
        self._opener = opener
        self._root = f"{target.scheme}://{target.authority}"
        self._way = way  # for error texts

    def send(self, verb: str, path: str, headers: Pairs, body: Body, deadline: Time, most: int) -> HttpReply:
        from http.client import HTTPException
        from urllib.error import HTTPError
        from urllib.request import Request

        _head(self._root, verb, path, headers)  # which refuses what is no header
        data = b"".join(body) if verb == "POST" else None
        request = Request(self._root + path, data, dict(headers), method=verb)
        timeout = None if deadline is None else max(0.001, deadline - time.monotonic())
        whole = bytearray()
        try:
            try:
                response: Any = self._opener.open(request, timeout=timeout)
            except HTTPError as exc:  # an answer like any other
                response = exc
            with response:
                if response.geturl() != request.full_url:
                    text = f"redirected from {path} to {response.geturl()}; connect there instead"
                    raise TransportError(text)
                while piece := response.read(SMALL_BODY_BYTES):
                    whole += piece
                    if len(whole) > most:
                        raise body_too_large(most, "more", _BUDGET_OPTION)
                    if deadline is not None and time.monotonic() > deadline:
                        raise TimeoutError
                answered = {name.lower(): value for name, value in response.headers.items()}
                return HttpReply(response.status, answered, bytes(whole)).decoded(most)
        except (OSError, ValueError, HTTPException) as exc:
            reason = getattr(exc, "reason", exc)
            if isinstance(reason, TimeoutError):
                raise DeadlineExceededError(_TOO_LATE) from None
            raise TransportError(f"no answer from {self._root}{self._way}: {failure_text(reason)}") from None


def http_sender(target: HttpTarget, tls_context: ssl.SSLContext | None = None) -> HttpSender:
    """Return what sends to *target*: kept connections, or urllib where the environment names a proxy for it."""
    # urllib.request is only loaded where there may be a proxy.
    if sys.platform in ("darwin", "win32") or any(name.lower().endswith("_proxy") for name in os.environ):
        from urllib import request

        proxy = request.getproxies().get(target.scheme)
        if proxy and not request.proxy_bypass(target.authority):
            opener = request.OpenerDirector()  # without what follows redirects
            opener.add_handler(request.ProxyHandler())
            opener.add_handler(request.HTTPHandler())
            opener.add_handler(request.HTTPSHandler(context=tls_context))
            safe = proxy.rpartition("@")[2].rpartition("/")[2]
            return OpenerSender(opener, target, f" through the proxy of the environment, {safe}")
    return HttpConnections(target, tls_context)


class SyncClient(HttpSender):
    """Calls an `HttpApp` in the same thread, without a socket: for tests. Made by `make_sync_client`."""

    def __init__(self, app: HttpApp) -> None:
        self.app = app
        self.prefix = app.options.prefix

    def send(self, verb: str, path: str, headers: Pairs, body: Body, deadline: Time, most: int) -> HttpReply:
        def read_body(limit: int) -> bytes:
            content_length(str(total_size(body)), limit)
            return b"".join(body)

        lowered = {name.lower(): value for name, value in headers}
        response = self.app(HttpRequest(verb, path, lowered, "sync", read_body))
        whole = response.body if isinstance(response.body, bytes) else b"".join(response.body)
        answered = {name.lower(): value for name, value in response.headers}
        return HttpReply(response.status, answered, whole).decoded(most)


class HttpClient(ClientChannel):
    """Calls over HTTP; safe for use by several threads. The sender is closed with it; the arguments are `http_connect`'s."""

    def __init__(
        self,
        sender: HttpSender,
        prefix: str = "",
        headers: Headers | None = None,
        compression_level: int | None = 1,
        max_response_bytes: int | None = CLIENT_MAX_RESPONSE_BYTES,
    ) -> None:
        budget = MAX_RESPONSE_BUDGET if max_response_bytes is None else max_response_bytes
        if not MIN_RESPONSE_BUDGET <= budget <= MAX_RESPONSE_BUDGET:
            wanted = f"{MIN_RESPONSE_BUDGET} to {MAX_RESPONSE_BUDGET}"
            raise ValueError(f"{_BUDGET_OPTION}: expected {wanted}, got {budget}")
        self._sender = sender
        self._prefix = prefix
        self._headers = headers
        self._level = compression_level
        self._budget = budget
        self._capabilities: HttpServerCapabilities | None = None
        codings = () if compression_level is None else supported_encodings()
        self._fixed: Pairs = (
            ("Content-Type", ARROW_CONTENT_TYPE),
            ("Accept-Encoding", ", ".join((*codings, "identity"))),
            (ACCEPT_MAX_RESPONSE_BYTES_HEADER, str(budget)),
        )

    def _send(self, verb: str, path: str, headers: Pairs, body: Body, deadline: Time, most: int) -> HttpReply:
        own = self._headers() if callable(self._headers) else self._headers
        headers += tuple((own or {}).items())
        try:
            reply = self._sender.send(verb, self._prefix + path, headers, body, deadline, most)
        except RequestTooLargeError as exc:
            text = f"the answer exceeds what this client accepts: {exc}"
            raise RpcError("ResponseTooLargeError", text, "", error_code=Code.RESOURCE_EXHAUSTED) from None
        except Refusal as exc:
            raise TransportError(f"the answer does not decode: {exc}") from None
        if reply.status == 401:  # its reason is in the body, else in a header
            fields = json_object(bytes(memoryview(reply.body)[:65_536]))
            named = fields.get("reason") or reply.headers.get(AUTH_REASON_HEADER.lower())
            reason = next((known for known in AuthReason if known.value == named), AuthReason.UNAUTHORIZED)
            raise AuthenticationError(f"{reason.value}: {fields.get('detail') or 'HTTP 401'}", reason=reason)
        return reply

    def capabilities(self, deadline: Time = None) -> HttpServerCapabilities:
        """Ask ``HEAD /health``, once, what the server can do; raises `TransportError`, `AuthenticationError`."""
        if self._capabilities is None:
            reply = self._send("HEAD", "/health", (), [], deadline, MAX_HEAD_BYTES)
            answered = reply.headers if reply.status < 300 else {}
            self._capabilities = HttpServerCapabilities.from_headers(answered)
        return self._capabilities

    def post(self, path: str, body: Body, deadline: Time, read: Read, *headers: Pair, tokens: int = 0) -> Any:
        """Post Arrow, and return what *read* makes of the answer. Raises `AuthenticationError` for a 401, `TransportError`
        when no answer comes or one that is not Arrow, `RpcError` when body or answer are larger than server or budget allow."""
        server = self.capabilities(deadline)
        coding = next((name for name in supported_encodings() if name in server.supported_encodings), "")
        if self._level is not None and coding and is_worth_packing(body, coding, self._level, tokens):
            body = [compress_body(body, coding, self._level)]
            headers += (("Content-Encoding", coding),)
        size = total_size(body)
        most = server.max_request_bytes
        if most is not None and size > most:
            text = f"the server takes requests of at most {most} bytes, this one has {size}"
            raise RpcError("RequestTooLargeError", text, "", error_code=Code.RESOURCE_EXHAUSTED)
        reply = self._send("POST", path, self._fixed + headers, body, deadline, self._budget)
        content_type = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != ARROW_CONTENT_TYPE or 300 <= reply.status < 400:
            raise _not_an_answer(reply, self._prefix + path, content_type)
        try:
            return read(reply.body)
        except EOFError:
            raise TransportError("the answer is empty") from None
        except (IPCError, RequestTooLargeError) as exc:
            raise TransportError(f"the answer is not what it should be: {text_of(exc)}") from None

    def call(self, info: RpcMethodInfo, row: list[Any], options: CallOptions) -> Any:
        request = request_pieces(info, row, new_request_id(), options.timeout)
        path = f"/{info.protocol_name}/{info.name}"
        if info.method_type is MethodType.STREAM:
            stream = _HttpSession(self, info, options)
            self.post(f"{path}/init", request, options.deadline, stream.begin)
            return stream

        def read(body: Buffer) -> Any:
            ready = read_result(info, body) if isinstance(body, bytes) else None
            if ready is not None and ready[1] == len(body):
                return ready[0]
            wire = info.result.wire
            reader = IpcReader(ByteSource(body), validation=options.ipc_validation, expected=[wire])
            return decode_result(info, only_batch(info, reader, next_reply(reader, options)))

        return self.post(path, request, options.deadline, read)

    def resume(self, info: RpcMethodInfo, token: bytes, options: CallOptions) -> StreamSession:
        stream = _HttpSession(self, info, options)
        stream.seek_to_token(token)
        return stream

    def close(self) -> None:
        self._sender.close()


def _not_an_answer(reply: HttpReply, path: str, content_type: str) -> TransportError:
    """Return the error for an answer that is somebody else's, or the server's to a URL that is not its own."""
    where = reply.headers.get("location", "")
    said = bytes(memoryview(reply.body)[:500]).decode("utf-8", "replace").strip()
    text = f"expected Arrow, got HTTP {reply.status} {content_type or 'without a type'}: {said}"
    if where and reply.status // 100 == 3:
        text = f"the server redirects {path} to {where[:200]!r}; connect there instead"
    elif reply.status == 404:
        text += f"\n(nothing is served at {path}: is the path of the base URL right?)"
    error = TransportError(text)
    code = _GATEWAY_CODES.get(reply.status) or _GATEWAY_CODES.get(reply.status // 100, Code.UNKNOWN)
    error.error_code = code.value
    return error


class _HttpSession(StreamSession):
    """A stream over HTTP. The reader's place is told by the cursor that the last answer was made from, and how many of its
    batches were handed out: what `token` saves is exact between any two batches."""

    def __init__(self, client: HttpClient, info: RpcMethodInfo, options: CallOptions) -> None:
        super().__init__(info, options)
        self._client = client
        self._call_token = b""
        self._cursor: bytes | None = None  # behind the last answer; None when the server has finished
        self._made_from: bytes | None = None  # the cursor before it; None for what came with the start
        self._came = 0  # batches with it
        self._metadata: Metadata | None = None  # of the next tick that is sent

    def begin(self, body: Buffer) -> None:
        """Read what comes with the start of a stream."""
        source = ByteSource(body)
        if self.info.header is not None:
            wire = self.info.header.row.wire
            reader = IpcReader(source, validation=self.options.ipc_validation, expected=[wire])
            self.header_batch = only_batch(self.info, reader, next_reply(reader, self.options))
        self._take(memoryview(body)[source.at :], True)

    def _take(self, body: Buffer, begins: bool = False) -> None:
        """Read an answer's output stream whole. Its batches are decoded at once, as each may replace dictionaries."""
        reader = IpcReader(ByteSource(body), validation=self.options.ipc_validation)
        batches: deque[AnnotatedBatch] = deque()
        cursor = None
        token = None
        while message := next_reply(reader, self.options):
            self._call_token = message.metadata.get(CALL_STATE_KEY, self._call_token)
            cursor = message.metadata.get(STATE_KEY, cursor)
            if batch_role(message.rows, message.metadata) == "token":
                token = message
            else:
                batches.append(reply_batch(reader, message))
        if token is not None and not batches and not begins:
            # It rides on the turn's own batch, which has no rows.
            batches.append(reply_batch(reader, token))
        self._schema = reader.schema
        self._made_from = self._cursor
        self._cursor = cursor
        self._came = len(batches)
        self._waiting = batches

    def _post(self, batch: pa.RecordBatch | bytes, turns: int) -> None:
        headers = []
        deadline = self.options.deadline
        if turns > 1 and not self._metadata:  # which belongs to one turn
            headers.append((MAX_TURNS_HEADER, str(turns)))
            if deadline is not None:  # the server may begin further turns for so long
                deadline += MAX_TURNS_SECONDS
        metadata = self.options.turn_metadata(self._metadata)
        cursor = self._cursor or b""
        metadata |= {STATE_KEY: cursor, CALL_STATE_KEY: self._call_token}
        self._metadata = None
        wire = EMPTY if batch is TICK or self._input is None else self._input
        path = f"/{self.info.protocol_name}/{self.info.name}/exchange"
        pieces = stream_pieces(wire, [(batch, metadata)])
        self._client.post(path, pieces, deadline, self._take, *headers, tokens=len(cursor))

    def _fetch(self, sent: tuple[pa.RecordBatch | bytes, Any] | None) -> None:
        self._check_open()
        turns = 1 if sent else self.options.prefetch or MAX_TURNS
        batch, metadata = sent or (TICK, None)
        self._metadata = metadata or self._metadata
        if not self._waiting and self._cursor is not None:
            try:
                self._post(batch, turns)
            except BaseException as exc:
                if not isinstance(exc, RpcError) or not was_answer(exc):
                    self._cut(f"was cut off: {text_of(exc)}")
                elif exc.error_kind != ServerDrainingError.error_kind:  # after that another server may go on
                    self.phase = StreamPhase.DONE
                raise

    def token(self) -> bytes:
        cursor = self._cursor
        skip = 0
        if self._waiting:
            cursor = self._made_from
            skip = self._came - len(self._waiting)
            if cursor is None:
                raise local_error("no token yet: read what came with the start of the stream first")
        if cursor is None or self.phase is StreamPhase.DONE:
            raise local_error(f"the stream of {self.info.name}() is over: nothing to resume")
        fields = {"method": self.info.name, "state": cursor.decode("latin-1"), "skip": skip}
        return to_json({**fields, "call": self._call_token.decode("latin-1")}).encode()

    def seek_to_token(self, token: bytes) -> None:
        fields = json_object(token)
        classes = [type(fields.get(key)) for key in ("state", "call", "skip")]
        if fields.get("method") != self.info.name or classes != [str, str, int]:
            raise local_error(f"resume: expected a token of {self.info.name}(), as session.token() gives it")
        self.phase = StreamPhase.OPEN
        self._schema = None
        self._waiting.clear()
        self._cursor = fields["state"].encode("latin-1", "replace")
        self._call_token = fields["call"].encode("latin-1", "replace")
        for _ in range(fields["skip"]):
            if self._turn(None) is None:
                break

    def _end(self, cancels: bool) -> None:
        # The server, which keeps nothing of a stream between turns, is told of a cancel alone.
        is_told = cancels and self._cursor is not None and not self.closed
        self.phase = StreamPhase.DONE
        self._waiting.clear()
        if is_told:
            self._metadata = {CANCEL_KEY: b"1"}
            try:
                self._post(TICK, 1)
            except RpcError as exc:
                logger.debug("cancel of %s: %s", self.info.name, exc)


# ====================
# 20. ENTRY POINTS ... uses 1-19
# What most programs call. Each connect function returns an `RpcConnection`: a proxy to be closed. Nobody there is a
# `TransportError`, over HTTP from the first call, a wrong argument a `TypeError` or `ValueError`. Keywords are those of
# `with_options`.


class _ServedPipe(Transport):
    """The near end of a pipe whose far end a thread of this process serves."""

    def __init__(self, server: RpcServer) -> None:
        def serve() -> None:
            with closing(far):
                server.serve(far)

        with opening("cannot serve a pipe") as opened:
            near, far = [opened.enter_context(closing(end)) for end in make_pipe_pair()]
            super().__init__(near.channel, near.kind)
            self._thread = threading.Thread(target=serve, daemon=True, name="vgi_rpc serve_pipe")
            self._thread.start()

    def check_process(self) -> None:
        super().check_process()
        if sys.is_finalizing():  # when daemon threads run no more
            raise TransportError("the connection is closed: the interpreter exits")

    def close(self, patience: float = WORKER_EXIT_SECONDS) -> None:
        """Close, and wait *patience* seconds for the method that is still running."""
        super().close()
        join_thread(self._thread, patience)


def serve_pipe(
    protocol: ProtocolClass[P],
    implementation: Any,
    *,
    on_log: ClientLog | None = None,
    timeout: float | None = None,
    ipc_validation: IpcValidation | None = None,
) -> RpcConnection[P]:
    """Serve *implementation* in a thread of this process, and connect; *ipc_validation* is for both sides.

    Raises ``TypeError`` when the implementation does not fit the protocol.
    """
    server = RpcServer(cast("type", protocol), implementation, ipc_validation=ipc_validation)
    pipe = _ServedPipe(server)
    return RpcConnection(protocol, pipe, on_log, timeout=timeout, ipc_validation=server.ipc_validation)


def connect(
    protocol: ProtocolClass[P],
    cmd: Sequence[str],
    *,
    on_log: ClientLog | None = None,
    stderr: StderrMode = StderrMode.INHERIT,
    stderr_logger: logging.Logger | None = None,
    timeout: float | None = None,
    ipc_validation: IpcValidation = IpcValidation.FULL,
) -> RpcConnection[P]:
    """Start *cmd*, a program that calls `run_server`, with its arguments; closing closes its stdin and reaps it.

    *stderr* says where its standard error goes; with ``StderrMode.PIPE``, line by line to *stderr_logger*.
    """
    worker = partial(SubprocessTransport, cmd, stderr=stderr, stderr_logger=stderr_logger)
    return RpcConnection(protocol, worker, on_log, timeout=timeout, ipc_validation=ipc_validation)


def unix_connect(
    protocol: ProtocolClass[P],
    path: str,
    *,
    on_log: ClientLog | None = None,
    timeout: float | None = None,
    ipc_validation: IpcValidation = IpcValidation.FULL,
) -> RpcConnection[P]:
    """Connect to a Unix socket."""
    dial = partial(connect_unix_socket, path, timeout)
    return RpcConnection(protocol, dial, on_log, timeout=timeout, ipc_validation=ipc_validation)


def tcp_connect(
    protocol: ProtocolClass[P],
    host: str,
    port: int,
    *,
    connect_timeout: float | None = 5.0,
    tls_context: ssl.SSLContext | None = None,
    server_hostname: str = "",
    on_log: ClientLog | None = None,
    timeout: float | None = None,
    ipc_validation: IpcValidation = IpcValidation.FULL,
) -> RpcConnection[P]:
    """Connect over TCP within *connect_timeout* seconds, with a client-side ``ssl.SSLContext`` over TLS.

    The server must have the certificate of *server_hostname*, by default of *host*.
    """
    dial = partial(connect_tcp_socket, host, port, connect_timeout, tls_context, server_hostname)
    return RpcConnection(protocol, dial, on_log, timeout=timeout, ipc_validation=ipc_validation)


def http_connect(
    protocol: ProtocolClass[P],
    base_url: str | None = None,
    *,
    prefix: str | None = None,
    client: HttpSender | None = None,
    opener: urllib.request.OpenerDirector | None = None,
    headers: Headers | None = None,
    tls_context: ssl.SSLContext | None = None,
    compression_level: int | None = 1,
    accepted_max_response_bytes: int | None = CLIENT_MAX_RESPONSE_BYTES,
    on_log: ClientLog | None = None,
    timeout: float | None = None,
    ipc_validation: IpcValidation = IpcValidation.FULL,
) -> RpcConnection[P]:
    """Connect over HTTP; several threads may use the proxy. Raises ``ValueError`` for a wrong URL or option.

    Args:
        base_url: ``http(s)://host[:port][/prefix]``; *prefix* is further path.
        client: What `make_sync_client` gives, instead of a URL.
        opener: Sends each request by this opener of ``urllib.request``, on a connection of its own.
        headers: Such as ``{"Authorization": "Bearer …"}``, or a function that gives them for each request.
        tls_context: For https; default ``ssl.create_default_context()``.
        compression_level: 1 to 9; ``None`` neither compresses nor asks for compressed answers.
        accepted_max_response_bytes: Largest answer, decoded; a larger one is refused by the server or here.
    """
    sender, path = _sender_and_path(base_url, prefix, client, opener, tls_context)
    channel = HttpClient(sender, path, headers, compression_level, accepted_max_response_bytes)
    return RpcConnection(protocol, channel, on_log, timeout=timeout, ipc_validation=ipc_validation)


def _sender_and_path(
    url: Any, prefix: str | None, client: Any, opener: Any = None, tls_context: Any = None
) -> tuple[HttpSender, str]:
    """What `HttpClient` begins with: how requests get to the server, and the path in front of each."""
    if client is not None:
        if not isinstance(client, HttpSender):
            raise TypeError(f"client: expected what make_sync_client gives, got {got(client)}")
        return client, prefix or client.prefix
    if not url:
        raise ValueError("expected a base URL or a client")
    target = HttpTarget.parse("/".join(filter(None, (str(url).rstrip("/"), (prefix or "").strip("/")))))
    if opener is None:
        check_tls_context(tls_context)
        return http_sender(target, tls_context), target.prefix
    if tls_context is not None:
        raise ValueError("an opener has its own tls_context: give it to its HTTPSHandler(context=...)")
    if not hasattr(opener, "open"):
        raise TypeError(f"opener: expected a urllib.request.OpenerDirector, got {got(opener)}")
    return OpenerSender(opener, target), target.prefix


def make_sync_client(server: RpcServer, **options: Any) -> SyncClient:
    """Return a client for ``http_connect(P, client=...)`` that calls *server*'s HTTP side without a socket.

    The *options* are the fields of `HttpOptions`; without *token_key* a random one is used, silently.
    """
    options.setdefault("token_key", os.urandom(32))
    return SyncClient(HttpApp(server, HttpOptions(**options)))


def http_capabilities(
    base_url: str = "", *, prefix: str = "", client: HttpSender | None = None, timeout: float | None = None
) -> HttpServerCapabilities:
    """Ask a server's ``/health`` what it can do; raises `TransportError`."""
    with closing(HttpClient(*_sender_and_path(base_url, prefix, client))) as channel:
        return channel.capabilities(CallOptions(timeout=timeout).deadline)


def http_introspect(
    base_url: str = "", *, prefix: str = "", client: HttpSender | None = None, protocol: str | None = None
) -> ServiceDescription:
    """Return what a server says of *protocol*, by default its primary one; raises as `list_protocols`."""
    with closing(HttpClient(*_sender_and_path(base_url, prefix, client))) as channel:
        return introspect(channel, protocol=protocol)


# ====================
# 21. COMMAND LINE ... uses 1-20
# `python vgi_rpc.py COMMAND`: answers go to stdout, everything said about them to stderr; stdin is read only where
# `-` stands. Law: nothing of this section runs on import; a failure is one line, a hint and an exit code: 1 the server
# answered with an error, 2 the command line or a file is wrong, 3 no server was reached, 4 it refused the caller,
# 5 the time was over, 130 Ctrl-C.


@dataclass(eq=False, repr=False)
class CountdownHeader(ArrowSerializableDataclass):
    """What `Demo.countdown` says before its first number."""

    start: int
    batches: int


@dataclass(eq=False, repr=False)
class CountdownState(ProducerState):
    """Where a countdown stands."""

    left: int
    pause: float

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        """Emit the next number."""
        if self.left < 0:
            out.finish()
            return
        time.sleep(self.pause)
        out.emit_pydict({"n": [self.left]})
        self.left -= 1


@dataclass
class StatisticsState(ExchangeState):
    """How many values there were, nulls passed over, and their sum."""

    count: int = 0
    total: float = 0.0

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        """Answer a batch with the statistics."""
        values = input.batch.column("value").drop_null().to_pylist()
        self.count += len(values)
        self.total += sum(values)
        out.emit_pydict({"count": [self.count], "mean": [self.total / (self.count or 1)]})


class Demo:
    """A small service with one method of each kind."""

    def add(self, a: float, b: float = 1.0) -> float:
        """Return a + b."""
        return a + b

    def countdown(self, start: int, pause: float | None = None) -> Stream[CountdownState, CountdownHeader]:
        """Count from start to 0, one number a batch; pause is for seconds before each."""
        header = CountdownHeader(start, max(0, start + 1))
        return Stream(pa.schema([("n", pa.int64())]), CountdownState(start, pause or 0.0), header=header)

    def statistics(self) -> Stream[StatisticsState]:
        """Answer each batch of a column "value" with count and mean of all values so far."""
        answer = pa.schema([("count", pa.int64()), ("mean", pa.float64())])
        return Stream(answer, StatisticsState(), input_schema=pa.schema([("value", pa.float64())]))


class _CliError(Exception):
    """Ends a command."""

    def __init__(self, text: str, hint: str = "", exit_code: int = 2) -> None:
        super().__init__(text)
        self.hint = hint
        self.exit_code = exit_code


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # a stderr that is closed or full ends nothing
        print(text, file=sys.stderr, flush=True)


def _program() -> str:
    """The words that start this program again."""
    import shlex

    spec = getattr(sys.modules["__main__"], "__spec__", None)
    words = ["-m", spec.name.removesuffix(".__main__")] if spec and spec.name != "__main__" else sys.argv[:1]
    return shlex.join([sys.executable, *words])


def _report(exc: Exception, verbose: bool) -> int:
    """Say on stderr what failed, with a hint where there is one; return the exit code."""
    text = text_of(exc)
    hint = ""
    code = 2
    if isinstance(exc, _CliError):
        hint = exc.hint
        code = exc.exit_code
    elif isinstance(exc, OSError):
        text = ": ".join(str(part) for part in (exc.filename, exc.strerror or exc) if part)
    elif isinstance(exc, RpcError):
        refused = exc.code in (Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.RESOURCE_EXHAUSTED)
        code = 1
        if exc.code is Code.DEADLINE_EXCEEDED:
            code = 5
        elif isinstance(exc, TransportError) or exc.error_kind == ServerDrainingError.error_kind:
            code = 3
        elif refused or "VersionError" in exc.error_type:
            code = 4
        hints = {
            "cannot connect": f"is the server running? {_program()} serve",
            "AuthenticationError": "send credentials: --bearer-file FILE or -H 'Authorization: Bearer …'",
            f"protocol {REFLECTION_PROTOCOL!r}": "a server with --no-describe does not say what it has",
        }
        hint = next((hint for word, hint in hints.items() if word in f"{type(exc).__name__} {text}"), "")
    _say(f"error: {' '.join(text.split())}" + f"\nhint: {hint}" * bool(hint))
    if verbose and isinstance(exc, RpcError) and exc.remote_traceback:
        _say(exc.remote_traceback.rstrip())
    return code


# -- options

# What stands for numbers in help: type, least, largest, in words.
_NUMBERS: dict[str, tuple[Any, float, float, str]] = {
    "N": (int, 1, 10**15, "a number above 0"),
    "SIZE": (int, 1, 10**15, "a size such as 64M"),
    "SECONDS": (float, 1e-6, 10**9, "seconds above 0"),
    "AGE": (float, 0, 10**9, "seconds, 0 for ever"),
    "PORT": (int, 0, 65_535, "a port, 0 to 65535"),
}


def _read_value(metavar: str, text: str) -> Any:
    """Read the value of an option, by what stands for it in help; argparse's own error says what is wrong with it."""
    import argparse

    if metavar == "[HOST:]PORT":  # the host may stand in brackets, as IPv6 addresses do
        host, _, port = text.rpartition(":")
        return host.strip("[]") or "127.0.0.1", _read_value("PORT", port)
    if metavar not in _NUMBERS and ("|" not in metavar or text in metavar.split("|")):
        return text
    cast_to, least, most, expected = _NUMBERS.get(metavar, (float, 0, 0, metavar))
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)([KMG]?)(?:i?B)?", text, re.I | re.A)
    if match and metavar in _NUMBERS and (metavar == "SIZE" or not match[2]):
        number = float(match[1]) * 1024 ** "_KMG".index(match[2].upper() or "_")
        if least <= number <= most and cast_to(number) == number:
            return cast_to(number)
    raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")


def _read_options(parser: Any, table: str, words: list[str], twins: bool = False) -> Any:
    """Read a command line with an ``ArgumentParser`` and a *table*: ``-s,--long VALUE := default | help``, a line each.

    ``VALUE?`` and ``VALUE*`` are nargs of a positional, ``VALUE+`` may be repeated, ``a|b`` takes one of these; without
    a value it is a switch. With *twins* ``VGI_RPC_LONG`` in the environment goes before the default.
    """
    counts = {"?": {"nargs": "?"}, "*": {"nargs": "*"}, "+": {"action": "append"}}
    for line in table.splitlines():
        option, _, text = line.partition(" | ")
        option, _, default = option.partition(" := ")
        names, _, metavar = option.partition(" ")
        flags = names.split(",")
        text += f" (default: {default})" * bool(default)
        if twins:
            twin = f"VGI_RPC_{flags[-1].lstrip('-').replace('-', '_').upper()}"
            text += f" [{twin}]"
            default = os.environ.get(twin) or default
        settings: dict[str, Any] = {"action": "store_true"}
        settings["default"] = default.lower() in ("1", "true", "yes")
        if metavar:
            settings = {"metavar": metavar.rstrip("?*+"), "default": default or None}
            settings.update(type=partial(_read_value, metavar), **counts.get(metavar[-1], {}))
        parser.add_argument(*flags, help=text, **settings)
    args = parser.parse_intermixed_args(words)
    ways = [name for name in ("http", "stdio", "unix", "tcp") if getattr(args, name, None)]
    if len(ways) > 1:
        parser.error(f"--{', --'.join(ways)}: one at a time")
    return args


# -- serve


def _service_of(target: str) -> RpcServer:
    """The server for ``module:Class``, ``path/to/file.py:Class`` or ``module:factory()``.

    A class serves the Protocol that it derives from, or one of its module that it fits, best by name; else itself.
    """
    import importlib
    import pkgutil

    def names(cls: Any) -> set[str]:
        return {name for name in dir(cls) if not name.startswith("_") and callable(getattr(cls, name, None))}

    wanted = "a target is module:Class, path/to/file.py:Class or module:factory(), and loads without errors"
    path, _, name = target.rpartition(":")
    if not path or not re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", name):
        raise _CliError(f"target {target!r} has no NAME; try {target}:NAME", wanted)
    try:
        folder = os.getcwd()
        package, _, stem = import_name(__name__).rpartition(".")
        if path.endswith(".py"):
            os.stat(path)
            folder, path = os.path.split(os.path.abspath(path[:-3]))
            package = ""
        sys.path.insert(0, folder)
        if package:  # as if it had been imported, this module is an attribute of its package
            setattr(importlib.import_module(package), stem, sys.modules[__name__])
        loaded: Any = pkgutil.resolve_name(f"{path}:{name.removesuffix('()')}")
        if getattr(loaded, "_is_protocol", False):
            raise TypeError("a Protocol says what there is; name the class that implements it")
        if name.endswith("()") or isinstance(loaded, type):
            loaded = loaded()
    except Exception as exc:
        last = traceback.extract_tb(exc.__traceback__)[-1]
        own = last.filename == __file__ or re.search("importlib|pkgutil", last.filename)
        where = f"{last.filename}:{last.lineno}: " * (not own)
        raise _CliError(f"{where}{type(exc).__name__}: {text_of(exc)}", wanted) from None
    if isinstance(loaded, RpcServer):
        return loaded
    if inspect.isroutine(loaded):
        raise _CliError(f"{target} is a function", "name the class, or write module:make()")
    cls = type(loaded)
    around: list[Any] = [*cls.__mro__[1:], *vars(sys.modules[cls.__module__]).values()]
    around = [each for each in around if isinstance(each, type) and getattr(each, "_is_protocol", False)]
    fitting = [each for each in around if set() < names(each) <= names(cls)]
    fitting.sort(key=lambda each: not cls.__name__.startswith(each.__name__))
    try:
        return RpcServer([*fitting, cls][0], loaded)
    except TypeError as exc:
        raise _CliError(text_of(exc)) from None


def _secrets(path: str) -> list[list[str]]:
    """The words of each line of a file that is neither empty nor a comment."""
    with open(path, encoding="utf-8") as file:
        lines = [line.split() for line in file if line.strip() and not line.startswith("#")]
    if not lines:
        raise _CliError(f"{path}: expected a secret, got an empty file")
    return lines


def _serve(args: Any) -> None:
    """Serve a class, over HTTP unless told otherwise."""
    server = args.server
    if server is None:
        args.http = args.http or not (args.stdio or args.unix or args.tcp)
        server = RpcServer(Demo, Demo())
        if args.target:
            server = _service_of(args.target)
    if args.bearer_file and not args.http:
        raise _CliError("--bearer-file is for HTTP")
    server.include_tracebacks = server.include_tracebacks and not args.no_tracebacks
    if args.no_describe:
        server.services.pop(REFLECTION_PROTOCOL, None)
        server.describe_enabled = False
    known = HttpOptions.__dataclass_fields__
    options = {name: value for name, value in vars(args).items() if name in known and value is not None}
    options.update(pages=not args.no_describe, json=not args.no_json, cors_origins=args.cors)
    if args.token_key_file:
        options["token_key"] = [words[0].encode() for words in _secrets(args.token_key_file)]
    if args.bearer_file:
        lines = _secrets(args.bearer_file)
        callers = {words[-1]: AuthContext("bearer", True, [*words[:-1], "bearer"][0]) for words in lines}
        options["authenticate"] = bearer_authenticate_static(tokens=callers)
    prefix = HttpOptions(**options).prefix
    token_keys(options.get("token_key") or os.environ.get("VGI_RPC_TOKEN_KEY") or os.urandom(32))
    if args.check:
        print(describe_rpc(server.primary.protocol))
        return
    if args.timeout is not None:
        options["request_deadline"] = args.timeout
    if args.access_log:
        configure_access_log(args.access_log, server)

    def bound(label: str, *place: object) -> None:
        where = ":".join(map(str, [label.lower(), *place]))
        if label == "PORT":
            where = f"http://{re.sub('(.*:.*)', '[' + args.host + ']', args.host)}:{place[0]}{prefix}"
        lines = [f"{server.protocol_name} served by vgi_rpc {__version__}"]
        for info in server.methods.values():
            lines.append(f"  {info.signature()}    {info.kind}")
        lines += [f"address    {where}", f"look       {_program()} describe {where}", "stop       Ctrl-C"]
        if args.server is None:
            _say("\n".join(lines))
        if args.server is not None or args.announce:
            with suppress(OSError, ValueError):  # closed, or nobody reads it: that stops no server
                print(label, *place, sep=":", flush=True)

    more: dict[str, Any] = {"idle_timeout": args.idle_timeout, "max_connections": args.max_connections}
    try:
        if args.http:
            options.update(more, host=args.host, port=args.port)
            serve_http(server, on_bound=lambda _, port: bound("PORT", port), **options)
        elif args.unix:
            serve_unix(server, args.unix, threaded=True, on_bound=partial(bound, "UNIX"), **more)
        elif args.tcp:
            serve_tcp(server, *args.tcp, threaded=True, on_bound=partial(bound, "TCP"), **more)
        else:
            serve_stdio(server)
    except OSError as exc:
        where = args.unix or args.tcp or f"{args.host}:{args.port}"
        hint = "if another server runs there: port 0 takes a free one"
        raise _CliError(f"cannot listen on {where}: {exc.strerror or exc}", hint, 3) from None


# -- call: where to, and with which arguments


@contextmanager
def _connected(args: Any) -> Iterator[tuple[RpcConnection[Any], ServiceDescription, Any]]:
    """Connect to WHERE, and ask what the server says of its service, and of the method if one is named."""
    import shlex

    parts = [line.partition(":") for line in args.header or ()]
    headers = {name.strip(): value.strip() for name, _, value in parts}
    if args.bearer_file:
        headers["Authorization"] = f"Bearer {_secrets(args.bearer_file)[0][-1]}"
    scheme, _, rest = args.where.partition(":")
    options: dict[str, Any] = {"timeout": args.timeout}
    if args.verbose:
        options["on_log"] = lambda log: _say(f"[{log.level.value}] {log.message}")
    connection: RpcConnection[Any]
    if scheme.lower() in ("http", "https"):
        connection = http_connect(Reflection, args.where, headers=headers, **options)
    elif headers:
        raise _CliError("-H and --bearer-file are for HTTP")
    elif scheme == "unix":
        connection = unix_connect(Reflection, rest, **options)
    elif scheme == "tcp" and re.fullmatch("(.*:)?[0-9]{1,5}", rest):
        host, _, port = rest.rpartition(":")
        connection = tcp_connect(Reflection, host.strip("[]") or "127.0.0.1", int(port), **options)
    elif not args.where or re.fullmatch(r"[\w.-]+:[\w:.]+(/.*)?", args.where):
        text = f"WHERE {args.where!r}: expected a URL, unix:PATH, tcp:HOST:PORT or a command"
        raise _CliError(text, f"http://{args.where}?" * (scheme != "tcp"))
    else:
        stderr = StderrMode.INHERIT if args.verbose else StderrMode.PIPE
        connection = connect(Reflection, shlex.split(args.where), stderr=stderr, **options)
    with connection:
        protocol, _, name = (args.method or "").rpartition(".")
        service = introspect(connection, protocol=protocol or None)
        if name and name not in service.methods:
            text = f"{service.protocol_name} has no method {name!r}{suggest(name, service.methods)}"
            raise _CliError(text, f"it has {', '.join(sorted(service.methods))}")
        yield connection, service, service.methods.get(name)


def _usage_of(method: MethodDescription) -> str:
    """One line that calls a method, with example values; what may be left out stands in brackets."""
    words = [f"usage: {_program()} call WHERE {method.name}"]
    for name, word in example_words(method.params_schema, method.param_defaults).items():
        optional = name in method.param_defaults or method.params_schema.field(name).nullable
        words.append(f"[{word}]" if optional else word)
    return " ".join(words + ["-i FILE"] * bool(method.is_exchange))


def _arguments(args: Any, method: MethodDescription) -> Any:
    """What ``-j`` and ``k=v | k:=json | k=@file | k.field=v`` give, as one JSON object."""

    def content(text: str) -> str | bytes:
        if not text.startswith("@"):
            return text
        with open(text[1:], "rb") as file:
            return file.read()

    arguments = parse_json(sys.stdin.buffer.read() if args.json == "-" else content(args.json or "{}"), "-j")
    for word in args.parameters:
        name, equals, text = word.partition("=")
        *outer, last = name.removesuffix(":").split(".")
        inside = arguments
        members = list(method.params_schema)
        for step in outer:
            inside = inside.setdefault(step, {}) if isinstance(inside, dict) else None
            members = [part for member in members if member.name == step for part in members_of(member)]
        if not equals or not isinstance(inside, dict):
            raise _CliError(f"parameter {word!r}: expected key=value or key:=json", _usage_of(method))
        data = content(text)
        members = [member for member in members if member.name == last]
        brace: Any = "{" if isinstance(data, str) else b"{"
        if any(map(members_of, members)) and data.lstrip()[:1] == brace:
            name = "json:"  # of a dataclass; else a file has what bytes are
        kinds = [member.type for member in members]
        inside[last] = parse_json(data, word) if name.endswith(":") else json_of_word(data, *kinds)
    return arguments


# -- call: what an exchange is given


class _FileSource(ByteSource):
    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file = file

    def read(self, size: int) -> bytes:
        return cast("bytes", self._file.read(size))

    def read_after(self, head: bytes, size: int) -> Buffer:
        return head + self.read(size)


def _input_batches(args: Any, skip: int) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The batches of an Arrow, NDJSON or CSV file, told apart by its first bytes; ``-`` is read as it comes.

    Without the first *skip* rows; each with the number of rows up to its end.
    """
    opened: Any = nullcontext(sys.stdin.buffer) if args.input == "-" else open(args.input, "rb")
    with opened as file:
        first = file.peek(8)[:6]
        batches = _text_batches(file, is_csv=first.lstrip()[:1] not in (b"{", b"["))
        size = args.rows or 100
        if first == b"ARROW1":
            file.read(8)  # this format is a stream between two magic words (Columnar.rst, "IPC File Format")
        if first == b"ARROW1" or first[:4] == END_OF_STREAM[:4]:
            batches = (batch for batch, _ in iter(IpcReader(_FileSource(file)).next, None))
            size = args.rows or sys.maxsize
        if args.rows:
            batches = _joined(batches, args.rows)
        rows = 0
        for batch in batches:
            for at in range(0, max(batch.num_rows, 1), size):
                part = batch.slice(at, size)
                rows += part.num_rows
                if rows > skip or not part.num_rows:
                    yield part.slice(max(0, part.num_rows + skip - rows)), rows


def _joined(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.RecordBatch]:
    """Batches of multiples of *size* rows, and then the rest."""
    held: list[pa.RecordBatch] = []
    for batch in itertools.chain(batches, [None]):
        held += [batch] * (batch is not None)
        rows = sum(each.num_rows for each in held)
        if held and (batch is None or rows >= size):
            whole = batch_of_table(pa.Table.from_batches(held), "input")
            end = rows if batch is None else rows - rows % size
            yield whole.slice(0, end)
            held = [whole.slice(end)] * (rows > end)


def _text_batches(file: Any, is_csv: bool) -> Iterator[pa.RecordBatch]:
    """Batches of CSV or NDJSON, of as many rows as a read brings.

    Numbers stay texts, as all of CSV: the server, which alone knows the types, casts them, and no digit is lost.
    """
    schema = None
    rest = b""
    for data in itertools.chain(iter(partial(file.read1, 1 << 20), b""), [b""]):
        rest += data or b"\n"
        end = rest.rfind(b"\n") + 1
        while data and is_csv and rest.count(b'"', 0, end) % 2:  # within a cell
            end = rest.rfind(b"\n", 0, end - 1) + 1
        if rest[:end].strip():
            try:
                batch = (_read_csv if is_csv else _read_ndjson)(rest[:end], schema)
            except ARROW_FAILURES as exc:
                raise _CliError(f"input: {text_of(exc)}") from None
            schema = batch.schema
            if batch.num_rows:
                yield batch
        rest = rest[end:]


def _read_csv(text: bytes, schema: pa.Schema | None) -> pa.RecordBatch:
    """Lines of CSV, all texts, null where nothing stands, not even quotes. Without *schema* the first is a head."""
    from pyarrow import csv

    reading = csv.ReadOptions(use_threads=False, block_size=len(text) + 1)
    parsing = csv.ParseOptions(newlines_in_values=True)
    if schema is None:
        names = csv.read_csv(io.BytesIO(text), reading, parsing).column_names
    else:
        reading.column_names = names = schema.names
    cells = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.utf8()), null_values=[""])
    cells.strings_can_be_null = True
    cells.quoted_strings_can_be_null = False
    return batch_of_table(csv.read_csv(io.BytesIO(text), reading, parsing, cells), "input")


def _read_ndjson(text: bytes, schema: pa.Schema | None) -> pa.RecordBatch:
    """Lines of NDJSON. Without *schema* they decide on the columns and types of all that follow."""
    lines = filter(bytes.strip, text.split(b"\n"))
    rows = [parse_json(line, f"input {line[:60]!r}", parse_int=str, parse_float=str) for line in lines]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a JSON object for each row")
    known = {column.name: column.type for column in schema or ()}
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(itertools.chain(known, *rows)):
        if known and name not in known:
            raise ValueError(f"column {name}: the first rows have no such column, and they decide")
        columns[name] = pa.array([row.get(name) for row in rows], known.get(name))
        if pa.types.is_null(columns[name].type):
            columns[name] = columns[name].cast(pa.utf8())
    return pa.RecordBatch.from_pydict(columns)


# -- call: what comes back


_ENDINGS = {"": "ndjson", ".ndjson": "ndjson", ".jsonl": "ndjson", ".json": "json", ".txt": "table"}
_ENDINGS |= {".table": "table", ".arrow": "arrow", ".arrows": "arrow"}


class _Output:
    """Writes a header, batches or one value to FILE or stdout, each as it comes, in one of the formats."""

    def __init__(self, args: Any) -> None:
        terminal = not args.output and sys.stdout.isatty()
        adds = bool(args.resume and os.path.exists(args.resume))
        self.format = args.format
        if args.format == "auto":
            self.format = "table" if terminal else _ENDINGS.get(os.path.splitext(args.output or "")[1])
        if self.format is None:
            text = f"-o {args.output}: expected an ending of {', '.join(filter(None, _ENDINGS))}"
            raise _CliError(text, "-f says the format")
        if self.format == "arrow" and (terminal or (adds and os.path.exists(args.output or ""))):
            raise _CliError("-f arrow: neither for a terminal nor to be added to a file", "-o A_NEW_FILE")
        self._path = args.output
        self._file: Any = sys.stdout.buffer
        if args.output:
            self._file = open(args.output, "wa"[adds] + "b")
        self._begun = False  # whether there was a row
        self._end = "[]\n" * (self.format == "json")
        self._arrow: IpcWriter | None = None

    def _put(self, text: str) -> None:
        self._file.write(text.encode("utf-8", "backslashreplace"))
        self._file.flush()

    def rows(self, rows: list[dict[str, Any]]) -> None:
        """Write rows of JSON values: as lines, as part of one array, or as cells of a least width."""
        text = ""
        for row in rows:
            if self.format == "table":
                lines = [list(row)] * (not self._begun) + [list(map(word_of, row.values()))]
                widths = [max(12, len(name)) for name in row]
                text += "".join("  ".join(map(str.ljust, cells, widths)).rstrip() + "\n" for cells in lines)
            elif self.format == "json":
                text += ("[\n", ",\n")[self._begun] + json_text(row)
                self._end = "\n]\n"
            else:
                text += json_text(row) + "\n"
            self._begun = True
        self._put(text)

    def header(self, batch: pa.RecordBatch, described: pa.Schema) -> None:
        """Write a stream's header. In Arrow it is a stream of its own: in ``FILE.header``, or in front on a pipe."""
        [row] = batch_rows(batch, described)
        if self.format == "arrow":
            to: Any = open(f"{self._path}.header", "wb") if self._path else nullcontext(self._file)
            with to as file:
                file.write(stream_bytes(WireSchema(batch.schema), [(batch, None)]))
        elif self.format == "table":
            self._put(f"Header: {word_of(row)}\n")
        else:
            self.rows([{"__header__": row}])

    def batch(self, batch: pa.RecordBatch, metadata: Any = None) -> None:
        """Write the rows of a batch."""
        if self.format == "arrow":
            self._arrow = self._arrow or IpcWriter(self._file.writelines, WireSchema(batch.schema))
            self._arrow.write_all([(batch, metadata)])
            self._file.flush()
        else:
            self.rows(batch_rows(batch))

    def value(self, value: Any, info: RpcMethodInfo) -> None:
        """Write a unary result; a dataclass or a record batch, which is a stream inside of bytes, as rows."""
        whole = info.result.to_batch(info.result.encode([value][: info.has_return]))
        value_json = result_to_json(info, whole)
        batches = []
        if isinstance(value, bytes) and value[:4] == END_OF_STREAM[:4]:
            with suppress(IPCError, EOFError):
                batches = [batch for batch, _ in iter(IpcReader(ByteSource(value)).next, None)]
        if batches and isinstance(value_json, str):  # a server that does not tell what is inside
            value_json = [row for batch in batches for row in batch_rows(batch)]
        if self.format == "arrow":
            for batch in batches or [whole]:
                self.batch(batch)
        elif batches and self.format != "json":
            self.rows(value_json if isinstance(value_json, list) else [value_json])
        else:
            self._end = (json_text, word_of)[self.format == "table"](value_json) + "\n"
        self.close()

    def close(self) -> None:
        """End what needs an end: an array of rows, a stream, a file."""
        if self._arrow is not None:
            self._arrow.write_all(close=True)
        self._put(self._end)
        if self._path:
            self._file.close()


def _call(args: Any) -> None:
    """Call a method."""
    with _connected(args) as (connection, service, method):
        if method is None:
            raise _CliError("METHOD is missing", f"{service.protocol_name} has {', '.join(service.methods)}")
        is_stream = method.method_type is MethodType.STREAM
        if args.input and (not is_stream or method.is_exchange is False):
            raise _CliError(f"{method.name}() takes no input: it is no exchange", _usage_of(method))
        if method.is_exchange and not args.input:
            raise _CliError(f"{method.name}() takes batches", _usage_of(method))
        if args.resume and not (is_stream and isinstance(connection._channel, HttpClient)):
            raise _CliError("--resume is for streams over HTTP: elsewhere the state ends with the connection")
        try:
            arguments = _arguments(args, method)
            if is_stream:
                _call_stream(args, connection, method, arguments)
            else:
                row = arguments_from_json(method, arguments)
                _Output(args).value(connection._channel.call(method, row, connection._options), method)
        except (ParameterError, ProtocolError) as exc:
            raise _CliError(text_of(exc), _usage_of(method)) from None


def _call_stream(args: Any, connection: RpcConnection[Any], info: RpcMethodInfo, arguments: Any) -> None:
    """Start a stream, or go on with the one that ``--resume FILE`` remembers, and write each answer as it comes.

    The file holds the method, how many rows of the input were answered, and the token behind them.
    """
    method = f"{info.protocol_name}.{info.name}"
    mark: dict[str, Any] = {}
    if args.resume and os.path.exists(args.resume):
        with open(args.resume, "rb") as file:
            mark = json_object(file.read())
        if mark.get("method") != method or not isinstance(mark.get("token"), str):
            raise _CliError(f"{args.resume}: not where a call of {method} stopped")
    channel: Any = connection._channel
    if mark:
        opened = channel.resume(info, mark["token"].encode(), connection._options)
    else:
        opened = channel.call(info, arguments_from_json(info, arguments), connection._options)
    show: Any = partial(print, "\r\x1b[K", sep="", end="", file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        show = str
    turn = written = 0
    with opened as session:
        output = _Output(args)
        if session.header_batch is not None:
            output.header(session.header_batch, described_schemas(info)["header"])
        answers: Iterable[tuple[AnnotatedBatch, int]] = ((answer, 0) for answer in session)
        if args.input:
            inputs = _input_batches(args, mark.get("rows", 0))
            answers = ((session.exchange(batch), rows) for batch, rows in inputs)
        for answer, rows in answers:
            batch = answer.batch
            if args.limit is not None and not args.resume:
                batch = batch.slice(0, args.limit - written)
            show("")
            output.batch(batch, answer.custom_metadata)
            turn += 1
            written += batch.num_rows
            if args.resume and not session.closed:
                with suppress(RpcError):  # there is no token behind the last batch
                    mark = {"method": method, "rows": rows, "token": session.token().decode()}
                    # All so far was written. The old file stays until the new one is whole; it is its owner's alone.
                    descriptor = os.open(f"{args.resume}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                    with open(descriptor, "wb") as new:
                        new.write(json_bytes(mark))
                    os.replace(f"{args.resume}.new", args.resume)
            show(f"{turn} batches, {written} rows")
            if args.limit is not None and written >= args.limit:
                break
        else:
            if args.resume and os.path.exists(args.resume):
                os.unlink(args.resume)
            if not turn and output.format == "arrow":  # a stream without rows has a schema too
                output.batch(pa.RecordBatch.from_pylist([], session.schema))
        show("")
        output.close()


# -- describe, selfcheck


def _describe(args: Any) -> None:
    """Show what a server offers."""
    with _connected(args) as (connection, service, method):
        ids = {"protocol_hash": service.protocol_hash, "server_id": service.server_id}
        if args.verbose and isinstance(connection._channel, HttpClient):
            ids.update(connection._channel.capabilities(connection._options.deadline)._asdict())
    texts = [f"{service.protocol_name} {service.protocol_version}".rstrip()] * (method is None)
    for each in (method and [method]) or service.methods.values():
        lines = [f"{each.signature()}    {each.kind}"]
        lines += [f"    {line}".rstrip() for line in (each.doc or "").splitlines()]
        lines += [f"  deprecated: {each.deprecation}"] * (each.deprecation is not None)
        for title, schema in described_schemas(each).items():
            rows = list(described_rows(schema))
            if len(rows) > len(schema) or title == "header" or any(" (" in typed for _, typed, _ in rows):
                width = max((len(name) for name, _, _ in rows), default=0)
                lines += [f"  {title}"] * bool(rows)
                lines += [f"    {name:{width}}  {typed}" for name, typed, _ in rows]
        texts.append("\n".join([*lines, f"  {_usage_of(each)}"]))
    if args.verbose:
        told = {name.replace("_", " "): "not told" if value is None else value for name, value in ids.items()}
        texts.append("\n".join(f"{name}: {value}" for name, value in told.items()))
    print("\n\n".join(texts))


def _versions() -> str:
    python = f"Python {sys.version.split()[0]}, pyarrow {pa.__version__}, codecs {', '.join(supported_encodings())}"
    return f"vgi_rpc {__version__} (wire {REQUEST_VERSION.decode()}, {python})"


def _selfcheck(args: Any) -> int:
    """Call the demo in this process, in a worker and over HTTP."""
    import concurrent.futures

    place, file = os.path.split(os.path.abspath(__file__))  # the place may be a zip archive
    start = f"import sys; sys.path.insert(0, {place!r}); import {file[:-3]} as m; sys.exit(m.main())"
    words = [place] if file == "__main__.py" else ["-c", start]
    bound: Any = concurrent.futures.Future()
    more = {"token_key": os.urandom(32), "on_bound": lambda _, port: bound.set_result(port)}
    threading.Thread(target=serve_http, args=[RpcServer(Demo, Demo())], kwargs=more, daemon=True).start()
    ways: dict[str, Callable[[], Any]] = {
        "pipe": lambda: serve_pipe(Demo, Demo()),
        "worker": lambda: connect(Demo, [sys.executable, *words, "serve", "--stdio"]),
        "http": lambda: http_connect(Demo, f"http://127.0.0.1:{bound.result(10)}"),
    }
    print(_versions())
    failed = 0
    for name, way in ways.items():
        text = "ok"
        try:
            with way() as proxy:
                results = [proxy.add(a=2.0), *proxy.countdown(start=2).to_table().column("n").to_pylist()]
                with proxy.statistics() as session:
                    answers = [session.exchange({"value": [1.0, None, 3.0]}).batch for _ in range(2)]
            results += answers[1].to_pylist()
            if results != [3.0, 2, 1, 0, {"count": 4, "mean": 2.0}]:
                raise ValueError(f"wrong answers: {results}")
        except Exception as exc:
            failed = 1
            text = f"FAILED {type(exc).__name__}: {text_of(exc)}"
        print(f"{name:12}{text}", flush=True)
    return failed


# -- the commands, and the options of each (see `_read_options`)

_CLIENT = """\
where WHERE | http(s)://HOST[:PORT][/PREFIX], unix:PATH, tcp:HOST:PORT, or a command in quotes
method METHOD? | name of the method, or Protocol.method
-H,--header NAME:VALUE+ | a further HTTP header; may be repeated
--bearer-file FILE | send the token that this file holds
--timeout SECONDS | give up on a call or a turn after so long
-v,--verbose | more: ids and limits, the server's log lines, its stderr and its tracebacks
"""
_CALL = """\
parameters KEY=VALUE* | typed by the live schema; key:=json, key=@file, key.field=value
-j,--json JSON | parameters as a JSON object; @file, or - for stdin
-i,--input FILE | batches for an exchange: Arrow, NDJSON or CSV; - is stdin, read as it comes
--rows N | most rows of the input per turn (default: Arrow's batches, 100 lines of text)
-f,--format auto|json|ndjson|table|arrow := auto | auto: a table on a terminal, else NDJSON
-o,--output FILE | write the answer there; its ending may say the format
--limit N | stop after so many rows
--resume FILE | keep the stream's token there, and go on from it if it is there (HTTP)
"""
_SERVE = """\
target TARGET? | module:Class, path/to/file.py:Class or module:factory(); default: a small demo
--http | serve HTTP
--stdio | serve stdin and stdout
--unix PATH | serve a Unix socket
--tcp [HOST:]PORT | serve TCP
--host HOST := 127.0.0.1 | address for HTTP
--port PORT := 8000 | port for HTTP; 0 takes a free one
--max-connections N := 512 | at most so many at a time
--idle-timeout SECONDS | end after so long without a connection
--access-log PATH | append a JSON line for each call; - is stderr
--prefix /PATH | serve HTTP under this path
--token-key-file FILE | keys of the state tokens, one a line: the first signs, all verify
--bearer-file FILE | ask for a bearer token; a line is TOKEN, or NAME TOKEN
--cors ORIGINS | origins whose pages may call, separated by commas; * for all
--allowed-hosts HOSTS | names that the Host header may have, separated by commas; * for any
--max-request-bytes SIZE | largest request, such as 64M
--max-response-bytes SIZE | largest answer
--timeout SECONDS | for reading one request, and for sending its answer
--token-ttl AGE | how many seconds a state token is good for; 0 for ever
--no-describe | no reflection and no pages
--no-json | no calls in JSON
--no-tracebacks | errors without the server's traceback
--announce | print PORT:<n>, UNIX:<path> or TCP:<host>:<port> on stdout when listening
--check | load the service, print what would be served, and exit
"""
_COMMANDS: dict[str, tuple[Any, str]] = {
    "serve": (_serve, _SERVE),
    "call": (_call, _CLIENT + _CALL),
    "describe": (_describe, _CLIENT),
    "selfcheck": (_selfcheck, ""),
}


def _run(words: list[str], server: RpcServer | None = None) -> int:
    """Run a command line, *server* in the place of serve's target, and return the exit code."""
    import argparse

    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, or a program without a console
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))
    name = (words or ["--help"])[0]
    program = _program() + f" {name}" * (server is None)
    verbose = False
    code = 0

    def refuse(message: str) -> typing.NoReturn:
        raise _CliError(message.removeprefix("argument "), f"{program} --help")

    try:
        if name in ("--version", "--help", "-h"):
            lines = [f"  {command:12}{run.__doc__}" for command, (run, _) in _COMMANDS.items()]
            lines = [f"usage: {_program()} COMMAND …", *lines, "COMMAND --help says what it takes."]
            if name == "--version":
                lines = [_versions()]
            print("\n".join(lines))
            code = 2 * (not words)
        elif name not in _COMMANDS:
            text = f"no command {name!r}{suggest(name, _COMMANDS)}"
            raise _CliError(text, f"there are {', '.join(_COMMANDS)}")
        else:
            run, table = _COMMANDS[name]
            about = run.__doc__
            if server is not None:
                table = table.partition("\n")[2].replace(":= 8000", ":= 0")
                about = f"Serves {server.protocol_name} (vgi_rpc {__version__}), by default on stdio."
            parser: Any = argparse.ArgumentParser(program, description=about, allow_abbrev=False)
            parser.error = refuse
            parser.set_defaults(server=server, verbose=False)
            args = _read_options(parser, table, words[1:], twins=name == "serve")
            verbose = args.verbose
            code = run(args) or 0
    except SystemExit as exc:  # argparse has printed its help
        code = cast("int", exc.code)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # whoever read our stdout has had enough
        pass
    except (_CliError, RpcError, Refusal, OSError, ValueError, EOFError) as exc:
        code = _report(exc, verbose)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # full or closed: the interpreter's own last flush goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; *argv* is what stands behind the program's name."""
    return _run(list(sys.argv[1:] if argv is None else argv))


def run_server(protocol_or_server: type | RpcServer, implementation: Any = None) -> None:
    """Be a worker: the ``main`` of a program that serves, which reads the program's own command line.

    Without arguments it serves stdin and stdout. ``--http [--host H] [--port N]``, ``--unix PATH`` and
    ``--tcp [HOST:]PORT`` listen instead, and print ``PORT:<n>``, ``UNIX:<path>`` or ``TCP:<host>:<port>``; further
    options are those of ``serve``. A plain class serves as its own protocol; where no *implementation* is given, one
    is made.

    Raises ``TypeError`` when the implementation does not fit, ``SystemExit`` for a wrong command line.
    """
    server = protocol_or_server
    if not isinstance(server, RpcServer):
        if implementation is None and isinstance(server, type) and not getattr(server, "_is_protocol", False):
            implementation = server()
        server = RpcServer(server, implementation)
    elif implementation is not None:
        raise TypeError("run_server: expected a server alone, got an implementation beside it")
    if not sys.argv[1:]:  # a worker's start waits for no argparse
        serve_stdio(server)
    elif code := _run(["serve", *sys.argv[1:]], server):
        raise SystemExit(code)


if __name__ == "__main__":
    # A served module that imports this file must see these very classes, not a second copy.
    sys.modules.setdefault(import_name(__name__), sys.modules["__main__"])
    sys.exit(main())
