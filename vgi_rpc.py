# /// script
# requires-python = ">=3.10"
# dependencies = ["pyarrow>=14.0.1"]
# ///
# SPDX-License-Identifier: MIT
"""vgi_rpc: one Python file that makes an Arrow service.

Copy this file into a project, ``pip install pyarrow``, write a Protocol class and an implementation. The same service is
then reached through typed proxies over an in-process pipe, a subprocess, a Unix socket, TCP or HTTP::

    from typing import Protocol
    import vgi_rpc

    class Calculator(Protocol):
        def add(self, a: float, b: float = 1.0) -> float: ...

    class CalculatorImpl:
        def add(self, a: float, b: float = 1.0) -> float:
            return a + b

    with vgi_rpc.serve_pipe(Calculator, CalculatorImpl()) as proxy:
        assert proxy.add(a=2.0, b=3.0) == 5.0

``python vgi_rpc.py serve module:CalculatorImpl`` serves it over HTTP; ``python vgi_rpc.py --help`` lists the other commands.

A method returns a value (unary) or a `Stream` whose state is a dataclass. On byte streams the state stays in memory; over
HTTP, which is stateless, it travels in a token signed with HMAC-SHA256 (signed, not encrypted: a client can read it).

Settings read from the environment: ``VGI_RPC_TOKEN_KEY`` (the key of the tokens, at least 16 bytes; several, separated by
commas, rotate: the first signs, all verify) and, for the command line, the ``VGI_RPC_*`` twins that ``serve --help`` names.

The file is read from top to bottom: a section uses only sections with a smaller number.
``grep -n '^# [0-9]*\\. [A-Z]' vgi_rpc.py`` prints the contents.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import contextvars
import dataclasses
import enum
import errno
import functools
import hashlib
import hmac
import inspect
import io
import json
import logging
import operator
import os
import re
import socket
import struct
import sys
import threading
import time
import traceback
import types
import typing
import zlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, Union, cast

import pyarrow as pa
from pyarrow import ipc

if typing.TYPE_CHECKING:
    import argparse
    import ssl
    import subprocess

__version__ = "0.1.0"

__all__ = [  # by kind of thing
    # errors
    "RpcError",
    "TransportError",
    "DeadlineExceededError",
    "AuthenticationError",
    "StatusError",
    "IPCError",
    "VersionError",
    "ProtocolVersionError",
    "ProtocolError",
    "ProtocolNotSpecifiedError",
    "ProtocolNotSupportedError",
    "MethodNotImplementedError",
    "TokenError",
    "RequestTooLargeError",
    "ResponseTooLargeError",
    "ServerDrainingError",
    "ParameterError",
    "Code",
    "BadRequest",
    "ErrorInfo",
    "FieldViolation",
    "Help",
    "HelpLink",
    "LocalizedMessage",
    "PreconditionFailure",
    "PreconditionViolation",
    "QuotaFailure",
    "QuotaViolation",
    "ResourceInfo",
    "RetryInfo",
    # data
    "AnnotatedBatch",
    "ArrowSerializableDataclass",
    "ArrowType",
    "Transient",
    "IpcValidation",
    # services
    "rpc_methods",
    "describe_rpc",
    "RpcMethodInfo",
    "MethodType",
    "idempotent",
    "no_side_effects",
    "deprecated",
    "RpcServer",
    "CallContext",
    "AuthContext",
    "current_auth",
    "CallStatistics",
    "ClientLog",
    "Level",
    "Message",
    "TransportKind",
    "ServeStartHook",
    "CallRecord",
    "DispatchHook",
    "configure_access_log",
    # streams
    "Stream",
    "StreamState",
    "ProducerState",
    "ExchangeState",
    "OutputCollector",
    "StreamSession",
    "resume",
    # serving
    "serve_pipe",
    "run_server",
    "serve_stdio",
    "serve_unix",
    "serve_tcp",
    "serve_http",
    "make_wsgi_app",
    "make_sync_client",
    "HttpOptions",
    "HttpServeOptions",
    "HttpRequest",
    "AuthFailure",
    "AuthReason",
    "bearer_authenticate",
    "bearer_authenticate_static",
    "chain_authenticate",
    # connecting
    "connect",
    "unix_connect",
    "tcp_connect",
    "http_connect",
    "with_options",
    "StderrMode",
    "RpcConnection",
    "make_pipe_pair",
    "PipeTransport",
    "SubprocessTransport",
    "http_capabilities",
    "HttpServerCapabilities",
    # introspection
    "introspect",
    "http_introspect",
    "list_protocols",
    "describe_protocol",
    "ServiceDescription",
    "MethodDescription",
]

_T = TypeVar("_T")
_P = TypeVar("_P")

logger = logging.getLogger("vgi_rpc")
_wire_log = logging.getLogger("vgi_rpc.wire")


# ============================================================================
# 1. CONSTANTS .......................................... uses nothing
# ============================================================================
# Every key on the wire, every header name and every default limit, each once.
# Peers of other languages depend on the spelling: none of it changes without a new wire version.

REQUEST_VERSION = b"1"
DESCRIBE_VERSION = "5"  # of the reflection answer, as the family numbers it

# Custom metadata of request batches.
METHOD_KEY = b"vgi_rpc.method"
REQUEST_VERSION_KEY = b"vgi_rpc.request_version"
PROTOCOL_KEY = b"vgi_rpc.protocol"
PROTOCOL_VERSION_KEY = b"vgi_rpc.protocol_version"
REQUEST_ID_KEY = b"vgi_rpc.request_id"
TIMEOUT_KEY = b"vgi_rpc.timeout_ms"  # ours: what is left of the caller's deadline, in ms; other servers ignore it
TRACE_KEYS = (b"traceparent", b"tracestate")
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
STATE_KEY = b"vgi_rpc.stream_state#b64"
CALL_STATE_KEY = b"vgi_rpc.call_state#b64"

RESERVED_PROTOCOL_PREFIX = "vgi_rpc."
REFLECTION_PROTOCOL = "vgi_rpc.Reflection.v1"
TRANSPORT_OPTIONS_METHOD = "__transport_options__"
PROTOCOL_NAME_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,254}")

# HTTP.
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

# Limits. Each is a default that the matching option overrides.
MIN_RESPONSE_BUDGET = 65_536  # the family's floor for VGI-Accept-Max-Response-Bytes
MAX_RESPONSE_BUDGET = 2**53 - 1  # the largest integer that JSON peers keep exact
CLIENT_MAX_RESPONSE_BYTES = 268_435_456  # what our HTTP client asks for and reads at most: 256 MiB
SERVER_MAX_REQUEST_BYTES = 268_435_456  # what an HTTP server reads of one body, encoded and decoded
MAX_METADATA_BYTES = 67_108_864  # one message's head; tokens live there, so it is large
MAX_COLUMNS = 4_096
MAX_NESTING = 64  # levels of list, map and struct in a foreign schema
FREE_ROWS = 1 << 24  # more rows than this must be paid for with at least one bit of body each
MAX_ERROR_MESSAGE_CHARS = 16_000
MAX_TRACEBACK_CHARS = 16_000
MAX_TRACEBACK_FRAMES = 5
MAX_ERROR_DETAILS_BYTES = 4_096  # above it the details are left out whole (the family's rule)
MAX_REQUEST_ID_CHARS = 128
MAX_HEAD_BYTES = 65_536  # request line or status line with all headers
MAX_HEADERS = 100
TOKEN_TTL_SECONDS = 3_600.0
TOKEN_CLOCK_SKEW_SECONDS = 60.0  # how far ahead of us another server's clock may run
READ_TIMEOUT_SECONDS = 30.0  # HTTP: between two bytes of one request
REQUEST_DEADLINE_SECONDS = 300.0  # HTTP: for the whole of one request, first byte to last
DRAIN_GRACE_SECONDS = 30.0
WORKER_EXIT_SECONDS = 5.0  # how long a worker may take to leave after its stdin closed
SMALL_BODY_BYTES = 65_536  # below: one bytes object; above: read in place, written without copying

EMPTY_SCHEMA = pa.schema([])


# ============================================================================
# 2. ERRORS ............................................. uses 1
# ============================================================================
# Every exception of this file, its code, kind and HTTP status. An exception of another library never reaches a user.
#
#   Exception
#   ├── RpcError                      the other side answered with an error, or could not be reached
#   │   ├── TransportError            no answer: connection refused, lost, or not speaking Arrow      UNAVAILABLE
#   │   │   └── DeadlineExceededError no answer in time                                             DEADLINE_EXCEEDED
#   │   └── AuthenticationError       HTTP 401                                                      UNAUTHENTICATED
#   ├── StatusError                   raised by a method that wants a code, a kind and details
#   ├── IPCError                      bytes that are not the Arrow they should be              400  INVALID_ARGUMENT
#   ├── VersionError                  wire version                                             400  FAILED_PRECONDITION
#   │   └── ProtocolVersionError      application protocol version                             400
#   ├── ProtocolError                 a request that breaks the rules of the wire              400  INVALID_ARGUMENT
#   │   ├── ProtocolNotSpecifiedError, ProtocolNotSupportedError (404), MethodNotImplementedError (404)
#   │   ├── TokenError                a state token that is not ours, not for this call, or too old   400
#   │   ├── RequestTooLargeError, ResponseTooLargeError                                        413, 200
#   │   └── ServerDrainingError       the server is about to stop                              503  UNAVAILABLE
#   ├── ParameterError (TypeError)    a parameter or result of the wrong type; its wire name is TypeError     400
#   └── AuthFailure (ValueError)      raised by an `authenticate` callback, with a reason      401


class Code(str, enum.Enum):
    """gRPC's sixteen error codes; the value is the name on the wire."""

    CANCELLED = "CANCELLED"
    UNKNOWN = "UNKNOWN"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    DATA_LOSS = "DATA_LOSS"
    UNAUTHENTICATED = "UNAUTHENTICATED"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def parse(cls, text: object) -> Code:
        """Return the code of that name; anything else is ``UNKNOWN``, as peers may be newer than we are."""
        try:
            return cls(text)
        except ValueError:
            return cls.UNKNOWN


class _Detail:
    """A typed error detail: a dataclass with the ``@type`` of the family's catalogue."""

    TYPE: ClassVar[str] = ""
    _ITEMS: ClassVar[dict[str, type]] = {}

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object, ``@type`` included."""
        return {"@type": self.TYPE, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_json(cls: type[_T], obj: Mapping[str, Any]) -> _T:
        """Read the JSON object; unknown members are ignored, as the catalogue may grow.

        Raises:
            ValueError: A member is absent that has no default.
        """
        names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        values = {k: v for k, v in obj.items() if k in names}
        try:
            for name, item in cls._ITEMS.items():  # type: ignore[attr-defined]
                known = {f.name for f in dataclasses.fields(item)}
                values[name] = tuple(item(**{k: v for k, v in i.items() if k in known}) for i in values.get(name, ()))
            return cls(**values)
        except (TypeError, AttributeError) as exc:
            raise ValueError(f"not a {cls.TYPE}: {exc}") from None  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ErrorInfo(_Detail):
    """Free key-value facts about the error."""

    TYPE: ClassVar[str] = "vgi_rpc.ErrorInfo"
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RetryInfo(_Detail):
    """When a retry may be worth it, in seconds from now."""

    TYPE: ClassVar[str] = "vgi_rpc.RetryInfo"
    retry_delay_seconds: float


@dataclass(frozen=True)
class FieldViolation:
    """One field of a bad request, by its path."""

    field: str
    description: str = ""


@dataclass(frozen=True)
class BadRequest(_Detail):
    """Which fields of the request were wrong."""

    TYPE: ClassVar[str] = "vgi_rpc.BadRequest"
    _ITEMS: ClassVar[dict[str, type]] = {"field_violations": FieldViolation}
    field_violations: Sequence[FieldViolation] = ()


@dataclass(frozen=True)
class PreconditionViolation:
    """One precondition that did not hold."""

    type: str
    subject: str = ""
    description: str = ""


@dataclass(frozen=True)
class PreconditionFailure(_Detail):
    """Which preconditions did not hold."""

    TYPE: ClassVar[str] = "vgi_rpc.PreconditionFailure"
    _ITEMS: ClassVar[dict[str, type]] = {"violations": PreconditionViolation}
    violations: Sequence[PreconditionViolation] = ()


@dataclass(frozen=True)
class QuotaViolation:
    """One quota that was used up."""

    subject: str
    description: str = ""


@dataclass(frozen=True)
class QuotaFailure(_Detail):
    """Which quotas were used up."""

    TYPE: ClassVar[str] = "vgi_rpc.QuotaFailure"
    _ITEMS: ClassVar[dict[str, type]] = {"violations": QuotaViolation}
    violations: Sequence[QuotaViolation] = ()


@dataclass(frozen=True)
class ResourceInfo(_Detail):
    """Which resource the error is about."""

    TYPE: ClassVar[str] = "vgi_rpc.ResourceInfo"
    resource_type: str = ""
    resource_name: str = ""
    owner: str = ""
    description: str = ""


@dataclass(frozen=True)
class HelpLink:
    """One link of a `Help`."""

    description: str
    url: str


@dataclass(frozen=True)
class Help(_Detail):
    """Where to read on."""

    TYPE: ClassVar[str] = "vgi_rpc.Help"
    _ITEMS: ClassVar[dict[str, type]] = {"links": HelpLink}
    links: Sequence[HelpLink] = ()


@dataclass(frozen=True)
class LocalizedMessage(_Detail):
    """The error for an end user, in the language that *locale* names (BCP 47)."""

    TYPE: ClassVar[str] = "vgi_rpc.LocalizedMessage"
    locale: str
    message: str


_DETAIL_TYPES: dict[str, type[_Detail]] = {
    t.TYPE: t
    for t in (ErrorInfo, RetryInfo, BadRequest, PreconditionFailure, QuotaFailure, ResourceInfo, Help, LocalizedMessage)
}


def _details_to_json(details: Iterable[object]) -> list[dict[str, Any]]:
    """Return details as JSON objects, each type once; raise `ValueError` for what the catalogue does not allow."""
    objects: list[dict[str, Any]] = []
    for detail in details:
        obj = detail.to_json() if isinstance(detail, _Detail) else detail
        kind = obj.get("@type") if isinstance(obj, Mapping) else None
        if not isinstance(kind, str) or not kind:
            raise ValueError(f"error detail: expected a detail of the catalogue or a mapping with '@type', got {detail!r}")
        if kind.startswith(RESERVED_PROTOCOL_PREFIX) and kind not in _DETAIL_TYPES:
            raise ValueError(f"error detail type {kind!r} is reserved; an application's types stand under its own name")
        if any(kind == o["@type"] for o in objects):
            raise ValueError(f"error detail {kind!r} given twice; each type may stand once")
        objects.append(dict(cast("Mapping[str, Any]", obj)))
    return objects


class StatusError(Exception):
    """Raised by a method that wants the client to see a code, a kind and typed details.

    Args:
        message: Text for a person.
        code: One of `Code`, or its name.
        kind: What clients branch on, an open set; ``None`` for none.
        details: Details of the catalogue, or mappings with an ``@type`` of the application's own; each type once.

    Raises:
        ValueError: A code or a detail that is not one.
    """

    def __init__(
        self, message: str, *, code: Code | str, kind: str | None = None, details: Iterable[_Detail | Mapping[str, Any]] = ()
    ) -> None:
        super().__init__(message)
        self.error_code = Code(code)
        self.error_kind = kind or ""
        self.error_details = _details_to_json(details)


class RpcError(Exception):
    """What a client sees when a call fails.

    Attributes:
        error_type: Name of the exception's class on the other side.
        error_message: Its text.
        remote_traceback: The other side's traceback, empty when the operator switched it off.
        request_id: Id of the call, as the server logs it.
        error_code: Name of a `Code`.
        error_kind: What to branch on, empty when the error has none.
        error_details: JSON objects with an ``@type`` each; `details` gives them typed.
    """

    def __init__(
        self,
        error_type: str,
        error_message: str,
        remote_traceback: str,
        *,
        request_id: str = "",
        error_code: str = "",
        error_kind: str = "",
        error_details: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(f"{error_type}: {error_message}")
        self.error_type = error_type
        self.error_message = error_message
        self.remote_traceback = remote_traceback
        self.request_id = request_id
        self.error_code = str(error_code)
        self.error_kind = error_kind
        self.error_details = error_details if error_details is not None else []

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild = functools.partial(
            type(self),
            request_id=self.request_id,
            error_code=self.error_code,
            error_kind=self.error_kind,
            error_details=self.error_details,
        )
        return rebuild, (self.error_type, self.error_message, self.remote_traceback)

    @property
    def code(self) -> Code:
        """The code, ``UNKNOWN`` when absent or not known here."""
        return Code.parse(self.error_code)

    def details(self) -> list[Any]:
        """Return the details of the catalogue as their dataclasses; others stay JSON objects."""
        typed: list[Any] = []
        for obj in self.error_details:
            known = _DETAIL_TYPES.get(str(obj.get("@type")))
            try:
                typed.append(known.from_json(obj) if known else obj)
            except ValueError:
                typed.append(obj)
        return typed

    def _detail(self, kind: type[_T]) -> _T | None:
        return next((d for d in self.details() if isinstance(d, kind)), None)

    def error_info(self) -> ErrorInfo | None:
        """Return the `ErrorInfo` detail, if there is one."""
        return self._detail(ErrorInfo)

    def retry_info(self) -> RetryInfo | None:
        """Return the `RetryInfo` detail, if there is one."""
        return self._detail(RetryInfo)

    def bad_request(self) -> BadRequest | None:
        """Return the `BadRequest` detail, if there is one."""
        return self._detail(BadRequest)

    def precondition_failure(self) -> PreconditionFailure | None:
        """Return the `PreconditionFailure` detail, if there is one."""
        return self._detail(PreconditionFailure)

    def quota_failure(self) -> QuotaFailure | None:
        """Return the `QuotaFailure` detail, if there is one."""
        return self._detail(QuotaFailure)

    def resource_info(self) -> ResourceInfo | None:
        """Return the `ResourceInfo` detail, if there is one."""
        return self._detail(ResourceInfo)

    def help(self) -> Help | None:
        """Return the `Help` detail, if there is one."""
        return self._detail(Help)

    def localized_message(self) -> LocalizedMessage | None:
        """Return the `LocalizedMessage` detail, if there is one."""
        return self._detail(LocalizedMessage)

    def is_retryable(self) -> bool:
        """Whether the same call may succeed later; clients never retry by themselves."""
        retry = self.code is Code.RESOURCE_EXHAUSTED and self.retry_info() is not None
        return self.code is Code.UNAVAILABLE or retry


class _LocalError(RpcError):
    """An `RpcError` made on the client's side: no remote traceback, the class name is the type."""

    error_code_default: ClassVar[Code] = Code.UNAVAILABLE

    def __init__(self, message: str, *, request_id: str = "", error_kind: str = "") -> None:
        code = self.error_code_default.value
        super().__init__(type(self).__name__, message, "", request_id=request_id, error_code=code, error_kind=error_kind)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.error_message,)


class TransportError(_LocalError):
    """No answer came: the peer could not be reached, went away, or does not speak Arrow IPC."""


class DeadlineExceededError(_LocalError):
    """The call's time ran out, here or on the server."""

    error_code_default = Code.DEADLINE_EXCEEDED


class AuthenticationError(_LocalError):
    """The server answered 401; `reason` is one of `AuthReason`.

    Attributes:
        reason: Why, from the body, else from the header ``VGI-Auth-Reason``, else ``unauthorized``.
    """

    error_code_default = Code.UNAUTHENTICATED

    def __init__(self, message: str, *, reason: AuthReason | None = None) -> None:
        super().__init__(message)
        self.reason = reason or AuthReason.UNAUTHORIZED


class _Refusal(Exception):
    """A request that is refused before a method runs; the attributes say how."""

    error_code: Any = Code.INVALID_ARGUMENT
    error_kind: Any = ""
    http_status = 400


class IPCError(_Refusal):
    """Bytes that are not the Arrow IPC they should be; the text says what was expected, what came and where."""


class VersionError(_Refusal):
    """The request's wire version is absent or not ours."""

    error_code = Code.FAILED_PRECONDITION


class ProtocolVersionError(VersionError):
    """Client and server speak incompatible versions of the application's protocol."""

    error_kind = "protocol_version_mismatch"

    def __init__(self, message: str = "", *, protocol: str = "", client_version: str = "", server_version: str = "") -> None:
        super().__init__(message)
        self.protocol = protocol
        self.client_version = client_version
        self.server_version = server_version

    @property
    def error_details(self) -> list[dict[str, Any]]:
        """The precondition that failed, as the family words it."""
        violation = PreconditionViolation("protocol_version", self.protocol, str(self))
        return [PreconditionFailure((violation,)).to_json()]


class ProtocolError(_Refusal):
    """A request that breaks a rule of the wire."""


class ProtocolNotSpecifiedError(ProtocolError):
    """The request names no protocol."""

    error_kind = "protocol_not_specified"


class ProtocolNotSupportedError(ProtocolError):
    """The server does not host that protocol."""

    error_kind = "protocol_not_supported"
    error_code = Code.UNIMPLEMENTED
    http_status = 404


class MethodNotImplementedError(ProtocolError):
    """The protocol has no such method."""

    error_kind = "method_not_implemented"
    error_code = Code.UNIMPLEMENTED
    http_status = 404


class TokenError(ProtocolError):
    """A state token that this server did not sign, not for this call, or that is too old."""


class RequestTooLargeError(ProtocolError):
    """A request above the server's limit."""

    error_code = Code.RESOURCE_EXHAUSTED
    http_status = 413


class ResponseTooLargeError(ProtocolError):
    """An answer above the smallest of the client's and the server's limits."""

    error_code = Code.RESOURCE_EXHAUSTED
    http_status = 200


class ServerDrainingError(ProtocolError):
    """The server is stopping and takes no new calls; another may."""

    error_kind = "server_draining"
    error_code = Code.UNAVAILABLE
    http_status = 503

    @property
    def error_details(self) -> list[dict[str, Any]]:
        """When to try again."""
        return [RetryInfo(1.0).to_json()]


class ParameterError(_Refusal, TypeError):
    """A parameter, field or result of the wrong type; on the wire it is a ``TypeError``."""

    error_type = "TypeError"


class AuthReason(str, enum.Enum):
    """Why a server answered 401: the closed set of the family."""

    MISSING_CREDENTIAL = "missing_credential"
    INVALID_CREDENTIAL = "invalid_credential"
    EXPIRED_CREDENTIAL = "expired_credential"
    INSUFFICIENT_SCOPE = "insufficient_scope"
    PROXY_REQUIRED = "proxy_required"
    UNAUTHORIZED = "unauthorized"

    def __str__(self) -> str:
        return self.value


class AuthFailure(ValueError):
    """Raised by an ``authenticate`` callback to say why a credential was refused."""

    def __init__(self, reason: AuthReason, detail: str = "") -> None:
        super().__init__(detail or str(reason))
        self.reason = AuthReason(reason)
        self.detail = detail


def _text_of(value: object) -> str:
    """``str(value)``, bounded and valid UTF-8, also when its ``__str__`` is broken."""
    try:
        text = str(value)
    except Exception as exc:
        text = f"<{type(value).__name__}: its __str__ raised {type(exc).__name__}>"
    if len(text) > MAX_ERROR_MESSAGE_CHARS:
        text = text[:MAX_ERROR_MESSAGE_CHARS] + "… <truncated>"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _suggest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for a near miss, else nothing."""
    import difflib

    near = difflib.get_close_matches(name[:255], list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


# ============================================================================
# 3. LOG MESSAGES ....................................... uses 1-2
# ============================================================================
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


class Message:
    """One log line from a server, or one error.

    Attributes:
        level: Severity.
        message: Text.
        extra: JSON-compatible facts, ``None`` when there are none.
    """

    __slots__ = ("extra", "level", "message")
    MAX_TRACEBACK_CHARS = MAX_TRACEBACK_CHARS
    MAX_TRACEBACK_FRAMES = MAX_TRACEBACK_FRAMES

    def __init__(self, level: Level, message: str, **kwargs: object) -> None:
        self.level = level
        self.message = message
        self.extra: dict[str, Any] | None = kwargs or None

    def __repr__(self) -> str:
        return f"Message({self.level.name}, {self.message!r}, extra={self.extra!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Message):
            return NotImplemented
        return (self.level, self.message, self.extra) == (other.level, other.message, other.extra)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def exception(cls, message: str, **kwargs: object) -> Message:
        """Make a message of level ``EXCEPTION``."""
        return cls(Level.EXCEPTION, message, **kwargs)

    @classmethod
    def error(cls, message: str, **kwargs: object) -> Message:
        """Make a message of level ``ERROR``."""
        return cls(Level.ERROR, message, **kwargs)

    @classmethod
    def warn(cls, message: str, **kwargs: object) -> Message:
        """Make a message of level ``WARN``."""
        return cls(Level.WARN, message, **kwargs)

    @classmethod
    def info(cls, message: str, **kwargs: object) -> Message:
        """Make a message of level ``INFO``."""
        return cls(Level.INFO, message, **kwargs)

    @classmethod
    def debug(cls, message: str, **kwargs: object) -> Message:
        """Make a message of level ``DEBUG``."""
        return cls(Level.DEBUG, message, **kwargs)

    @classmethod
    def trace(cls, message: str, **kwargs: object) -> Message:
        """Make a message of level ``TRACE``."""
        return cls(Level.TRACE, message, **kwargs)

    @classmethod
    def from_exception(cls, exc: BaseException, *, include_traceback: bool = True) -> Message:
        """Describe an exception: type, text, code, kind, details and, if asked, traceback and last frames.

        Never raises, whatever the exception's own methods do.
        """
        name, text = _error_type_of(exc), _text_of(exc)
        extra: dict[str, Any] = {"exception_type": name, "exception_message": text, "error_code": _error_code_of(exc).value}
        kind, details = _error_kind_of(exc), _error_details_of(exc)
        if kind:
            extra["error_kind"] = kind
        if details:
            extra["error_details"] = details
        if include_traceback:
            extra.update(_traceback_facts(exc))
        return cls(Level.EXCEPTION, f"{name}: {text}", **extra)

    def add_to_metadata(self, metadata: dict[str, str] | None = None) -> dict[str, str]:
        """Return *metadata* (a copy) with the keys of this message added."""
        out = dict(metadata or {})
        out[LOG_LEVEL_KEY.decode()] = self.level.value
        out[LOG_MESSAGE_KEY.decode()] = self.message
        if self.extra:
            out[LOG_EXTRA_KEY.decode()] = json.dumps(self.extra, default=_text_of)
        return out


def _error_type_of(exc: BaseException) -> str:
    declared = getattr(exc, "error_type", None) if isinstance(exc, _Refusal) else None
    return declared or type(exc).__name__


def _error_code_of(exc: BaseException) -> Code:
    return Code.parse(getattr(exc, "error_code", None))


def _error_kind_of(exc: BaseException) -> str:
    kind = getattr(exc, "error_kind", "")
    return kind if isinstance(kind, str) else ""


def _error_details_of(exc: BaseException) -> list[dict[str, Any]]:
    """The exception's details as JSON objects; an empty list when there are none, too many or unusable ones."""
    try:
        details = _details_to_json(getattr(exc, "error_details", None) or ())
        return details if len(json.dumps(details)) <= MAX_ERROR_DETAILS_BYTES else []
    except (TypeError, ValueError):
        return []


def _traceback_facts(exc: BaseException) -> dict[str, Any]:
    """``traceback``, ``frames`` (the last five), ``cause`` and ``context`` of an exception."""
    try:
        text = "".join(traceback.format_exception(type(exc), exc, exc.__traceback__))
        summary = traceback.extract_tb(exc.__traceback__)[-MAX_TRACEBACK_FRAMES:]
    except Exception:
        # A broken __str__ in the chain breaks the formatter too; the frames alone are still worth sending.
        text, summary = f"{type(exc).__name__}: <its traceback could not be formatted>\n", traceback.StackSummary()
    if len(text) > MAX_TRACEBACK_CHARS:
        text = text[:MAX_TRACEBACK_CHARS] + "\n… <traceback truncated>"
    frames = [{"file": f.filename, "line": f.lineno, "function": f.name, "code": f.line or ""} for f in summary]
    facts: dict[str, Any] = {"traceback": text.encode("utf-8", "backslashreplace").decode("utf-8"), "frames": frames}
    for name, other in (("cause", exc.__cause__), ("context", exc.__context__)):
        if other is not None:
            facts[name] = f"{type(other).__name__}: {_text_of(other)}"
    return facts


def _message_metadata(message: Message, server_id: str, request_id: str) -> dict[bytes, bytes]:
    """A message as metadata of a zero-row batch; for an error its code, kind and details also stand on their own."""
    metadata = {k.encode(): v.encode("utf-8", "backslashreplace") for k, v in message.add_to_metadata().items()}
    if message.level is Level.EXCEPTION:
        extra = message.extra or {}
        metadata[ERROR_CODE_KEY] = str(extra.get("error_code") or Code.UNKNOWN.value).encode()
        if extra.get("error_kind"):
            metadata[ERROR_KIND_KEY] = str(extra["error_kind"]).encode()
        if extra.get("error_details"):
            metadata[ERROR_DETAILS_KEY] = json.dumps(extra["error_details"]).encode()
    if server_id:
        metadata[SERVER_ID_KEY] = server_id.encode()
    if request_id:
        metadata[REQUEST_ID_KEY] = request_id.encode()
    return metadata


def _json_object(data: bytes | None) -> dict[str, Any]:
    """Parse *data* as a JSON object; anything else is an empty one (it comes from a peer and is only information)."""
    try:
        value = json.loads(data) if data else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _message_from_metadata(metadata: Mapping[bytes, bytes]) -> Message:
    """The reverse of `_message_metadata`, for logs; an unknown level reads as INFO."""
    name = metadata.get(LOG_LEVEL_KEY, b"").decode("utf-8", "replace")
    level = Level.__members__.get(name, Level.INFO)
    message = Message(level, metadata.get(LOG_MESSAGE_KEY, b"").decode("utf-8", "replace"))
    message.extra = _json_object(metadata.get(LOG_EXTRA_KEY)) or None
    return message


def _error_from_metadata(metadata: Mapping[bytes, bytes]) -> RpcError:
    """The `RpcError` of an error batch; code, kind and details from their own keys first, else from ``log_extra``."""
    extra = _json_object(metadata.get(LOG_EXTRA_KEY))
    text = metadata.get(LOG_MESSAGE_KEY, b"").decode("utf-8", "replace")

    def pick(key: bytes, name: str) -> str:
        value = metadata.get(key)
        return value.decode("utf-8", "replace") if value is not None else str(extra.get(name) or "")

    try:
        details = json.loads(metadata[ERROR_DETAILS_KEY])
    except (KeyError, ValueError, RecursionError):
        details = extra.get("error_details")
    details = [d for d in details if isinstance(d, dict)] if isinstance(details, list) else []
    kind = str(extra.get("exception_type") or text.partition(":")[0] or "Exception")
    code = pick(ERROR_CODE_KEY, "error_code")
    error = DeadlineExceededError if code == Code.DEADLINE_EXCEEDED and kind == "DeadlineExceededError" else RpcError
    made = RpcError.__new__(error)
    RpcError.__init__(
        made,
        kind,
        str(extra.get("exception_message") or text),
        str(extra.get("traceback") or ""),
        request_id=metadata.get(REQUEST_ID_KEY, b"").decode("utf-8", "replace"),
        error_code=code,
        error_kind=pick(ERROR_KIND_KEY, "error_kind"),
        error_details=details,
    )
    return made


# ============================================================================
# 4. BATCHES ............................................ uses 1-3
# ============================================================================
# Arrow IPC streams in and out, message by message: framing, bounds, validation, casting, telling batches apart.
# Law: nothing foreign reaches pyarrow's decoder before its head was read and its size, rows and buffers were found
# plausible; whatever pyarrow then raises leaves this section as IPCError.

_Buffer = Union[bytes, memoryview, pa.Buffer]
_Metadata = Mapping[bytes, bytes]

_CONTINUATION = b"\xff\xff\xff\xff"
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_SCHEMA_MESSAGE, _DICTIONARY_MESSAGE, _BATCH_MESSAGE = 1, 2, 3  # MessageHeader of Arrow's format/Message.fbs
_ARROW_FAILURES = (pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RecursionError)


class IpcValidation(enum.Enum):
    """How much of an incoming batch is checked before a method sees it."""

    NONE = "none"
    STANDARD = "standard"  # lengths and offsets: O(columns)
    FULL = "full"  # every value: offsets in order, valid UTF-8, dictionary indices in range


@dataclass(frozen=True)
class AnnotatedBatch:
    """A record batch with the custom metadata of its message.

    Attributes:
        batch: rows x columns; immutable, safe to share between threads.
        custom_metadata: Keys and values of the message, ``None`` when it carried none.
    """

    batch: pa.RecordBatch
    custom_metadata: pa.KeyValueMetadata | None = None

    @classmethod
    def from_pydict(cls, data: dict[str, Any], schema: pa.Schema | None = None) -> AnnotatedBatch:
        """Build from ``{column: values}``; types are inferred when *schema* is ``None``.

        Raises:
            TypeError: Values that do not fit, named by column.
        """
        return cls(_batch_from_pydict(data, schema, "from_pydict"))

    def release(self) -> None:
        """Give back what the batch stands on; nothing to do here, as batches own their memory."""


def _batch_from_pydict(data: Mapping[str, Any], schema: pa.Schema | None, where: str) -> pa.RecordBatch:
    """Columns by name to a batch; errors name *where*, the column, what was expected and what came."""
    if schema is None:
        try:
            return pa.RecordBatch.from_pydict(dict(data))
        except _ARROW_FAILURES as exc:
            raise ParameterError(f"{where}: {_text_of(exc)}") from None
    if list(data) != schema.names and set(data) != set(schema.names):
        raise ParameterError(f"{where}: expected columns {schema.names}, got {list(data)}")
    arrays = []
    for column in schema:
        values = data[column.name]
        try:
            arrays.append(values if isinstance(values, pa.Array) else pa.array(values, column.type))
            if not column.nullable and arrays[-1].null_count:
                raise ParameterError(f"{where}: column {column.name!r}: expected {column.type} without nulls, got a null")
        except _ARROW_FAILURES as exc:
            if isinstance(exc, ParameterError):
                raise
            raise ParameterError(f"{where}: column {column.name!r}: expected {column.type}, got {_text_of(exc)}") from None
    try:
        return pa.RecordBatch.from_arrays(arrays, schema=schema)
    except _ARROW_FAILURES as exc:
        raise ParameterError(f"{where}: {_text_of(exc)}") from None


@functools.lru_cache(maxsize=256)
def empty_batch(schema: pa.Schema) -> pa.RecordBatch:
    """Return the batch of 0 rows x the schema's columns that carries logs, errors, ticks and tokens."""
    return pa.RecordBatch.from_arrays([pa.nulls(0, f.type) for f in schema], schema=schema)


_TICK = pa.RecordBatch.from_arrays([], schema=EMPTY_SCHEMA)


class BatchKind(enum.Enum):
    """What a batch of a stream is (WIRE section 4): the only place that decides it is `batch_kind`."""

    DATA = "data"
    LOG = "log"
    ERROR = "error"
    LOCATION = "location"
    SHM = "shm"
    TOKEN = "token"


def batch_kind(num_rows: int, metadata: _Metadata | None) -> BatchKind:
    """Tell data from logs, errors, pointers and tokens; a zero-row batch without our keys is data."""
    if not metadata or num_rows:
        return BatchKind.DATA
    if LOG_LEVEL_KEY in metadata and LOG_MESSAGE_KEY in metadata:
        return BatchKind.ERROR if metadata[LOG_LEVEL_KEY] == b"EXCEPTION" else BatchKind.LOG
    for key, kind in ((LOCATION_KEY, BatchKind.LOCATION), (SHM_OFFSET_KEY, BatchKind.SHM), (STATE_KEY, BatchKind.TOKEN)):
        if key in metadata:
            return kind
    return BatchKind.DATA


class ByteSource:
    """Bytes in their order: what an `IpcReader` reads from."""

    def read(self, size: int) -> bytes:
        """Return the next *size* bytes, fewer only where the source ends."""
        raise io.UnsupportedOperation("read")

    def read_after(self, head: bytes, size: int) -> _Buffer:
        """Return *head* and the next *size* bytes in one piece of memory; shorter only where the source ends."""
        return head + self.read(size)


class BufferSource(ByteSource):
    """A source over bytes in memory.

    Attributes:
        position: Bytes read so far.
    """

    def __init__(self, data: _Buffer) -> None:
        self._buffer = data if isinstance(data, pa.Buffer) else pa.py_buffer(data)
        self._view = memoryview(self._buffer)
        self.position = 0

    def read(self, size: int) -> bytes:
        start = self.position
        piece = bytes(self._view[start : start + size])
        self.position = start + len(piece)
        return piece

    def read_after(self, head: bytes, size: int) -> _Buffer:
        start = self.position - len(head)
        self.position = min(self.position + size, len(self._view))
        return self._buffer.slice(start, self.position - start)

    @property
    def left(self) -> int:
        """How many bytes are still to be read."""
        return len(self._view) - self.position


@dataclass(frozen=True)
class IpcLimits:
    """What an `IpcReader` accepts of one message.

    Attributes:
        max_bytes: Decoded bytes of one message, ``None`` for what memory holds.
        max_rows: Rows of one batch, ``None`` for what its bytes pay for (see ``FREE_ROWS``).
    """

    max_bytes: int | None = None
    max_rows: int | None = None


_NO_LIMITS = IpcLimits()


class MessageHead(NamedTuple):
    """The head of one IPC message, as far as bounds, metadata and dictionaries need it (format/Message.fbs)."""

    kind: int
    body_length: int  # bytes
    metadata: dict[bytes, bytes] | None = None
    rows: int = 0
    buffers: tuple[tuple[int, int], ...] = ()  # (offset, length) in the body, bytes
    compressed: bool = False
    dictionary_id: int = 0
    is_delta: bool = False


class BatchMessage(NamedTuple):
    """A record batch's message: its head and all of its bytes, prefix included."""

    head: MessageHead
    data: _Buffer


class _Table:
    """One table of a flatbuffer: bounds-checked reads of its fields by number (flatbuffers' "internals")."""

    __slots__ = ("data", "position", "slots")

    def __init__(self, data: bytes, position: int) -> None:
        (back,) = struct.unpack_from("<i", data, self._inside(data, position))
        vtable = self._inside(data, position - back)
        (size,) = struct.unpack_from("<H", data, vtable)
        self.data, self.position = data, position
        self.slots = struct.unpack_from(f"<{max(size - 4, 0) // 2}H", data, vtable + 4)

    @staticmethod
    def _inside(data: bytes, position: int) -> int:
        if not 0 <= position < len(data):  # struct would count a negative offset from the end
            raise IndexError(position)
        return position

    def scalar(self, slot: int, code: str, default: int = 0) -> int:
        """Read a number; an absent field has its default."""
        if slot >= len(self.slots) or not self.slots[slot]:
            return default
        return int(struct.unpack_from(code, self.data, self.position + self.slots[slot])[0])

    def target(self, slot: int) -> int | None:
        """Follow an offset field to where it points."""
        if slot >= len(self.slots) or not self.slots[slot]:
            return None
        at = self.position + self.slots[slot]
        return self._inside(self.data, at + int(struct.unpack_from("<I", self.data, at)[0]))

    def table(self, slot: int) -> _Table | None:
        """Read a table field."""
        at = self.target(slot)
        return None if at is None else _Table(self.data, at)

    def vector(self, slot: int) -> tuple[int, int]:
        """Return (position of the first element, count) of a vector field."""
        at = self.target(slot)
        return (0, 0) if at is None else (at + 4, int(struct.unpack_from("<I", self.data, at)[0]))

    def text(self, slot: int) -> bytes:
        """Read a string field."""
        start, size = self.vector(slot)
        if start + size > len(self.data):
            raise IndexError(size)
        return self.data[start : start + size]


def parse_message_head(data: bytes) -> MessageHead:
    """Read the flatbuffer head of one IPC message.

    Raises:
        IPCError: It is not one.
    """
    try:
        (root,) = struct.unpack_from("<I", data, 0)
        message = _Table(data, root)
        kind, body_length = message.scalar(1, "<B"), message.scalar(3, "<q")
        metadata = _head_metadata(message)
        header = message.table(2)
        if header is None or kind not in (_SCHEMA_MESSAGE, _DICTIONARY_MESSAGE, _BATCH_MESSAGE) or body_length < 0:
            raise ValueError(f"message type {kind}, body of {body_length} bytes")
        if kind == _SCHEMA_MESSAGE:
            return MessageHead(kind, body_length, metadata)
        batch, dictionary_id, is_delta = header, 0, False
        if kind == _DICTIONARY_MESSAGE:
            dictionary_id, is_delta = header.scalar(0, "<q"), bool(header.scalar(2, "<B"))
            inner = header.table(1)
            if inner is None:
                raise ValueError("a dictionary without a batch")
            batch = inner
        start, count = batch.vector(2)
        flat = struct.unpack_from(f"<{2 * count}q", data, start) if count and count <= len(data) else ()
        if len(flat) != 2 * count:
            raise IndexError(count)
        buffers = tuple(zip(flat[::2], flat[1::2]))
        compressed = batch.target(3) is not None
        rows = batch.scalar(0, "<q")
        return MessageHead(kind, body_length, metadata, rows, buffers, compressed, dictionary_id, is_delta)
    except (struct.error, IndexError, ValueError, OverflowError, MemoryError) as exc:
        raise IPCError(f"not an Arrow IPC message: its head of {len(data)} bytes does not parse ({_text_of(exc)})") from None


def _head_metadata(message: _Table) -> dict[bytes, bytes] | None:
    start, count = message.vector(4)
    if count * 4 > len(message.data):
        raise IndexError(count)
    if not count:
        return None
    metadata = {}
    for at in range(start, start + 4 * count, 4):
        pair = _Table(message.data, at + int(struct.unpack_from("<I", message.data, at)[0]))
        metadata[pair.text(0)] = pair.text(1)
    return metadata


def _guard(what: str, call: Callable[..., _T], *args: Any) -> _T:
    """Call into pyarrow with foreign bytes: the one place where its exceptions become ours."""
    try:
        return call(*args)
    except IPCError:
        raise
    except _ARROW_FAILURES as exc:
        raise IPCError(f"{what}: {_text_of(exc)}") from None


def _nesting(kind: pa.DataType) -> int:
    return 1 + max((_nesting(kind.field(i).type) for i in range(kind.num_fields)), default=0)


def _has_dictionary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return True
    if isinstance(kind, pa.BaseExtensionType):
        return _has_dictionary(kind.storage_type)
    return any(_has_dictionary(kind.field(i).type) for i in range(kind.num_fields))


class SchemaFacts(NamedTuple):
    """A schema with what reading its batches needs to know."""

    schema: pa.Schema
    has_dictionary: bool
    message: bytes  # the encapsulated schema message


_schema_cache: dict[bytes, SchemaFacts] = {}


def _schema_facts(message: bytes) -> SchemaFacts:
    """Decode an encapsulated schema message; the same bytes are decoded once (bounded cache, safe between threads)."""
    facts = _schema_cache.get(message)
    if facts is None:
        schema = _guard("the schema message", ipc.read_schema, pa.py_buffer(message))
        if len(schema) > MAX_COLUMNS:
            raise IPCError(f"schema: expected at most {MAX_COLUMNS} columns, got {len(schema)}")
        if max(map(_nesting, schema.types), default=0) > MAX_NESTING:
            raise IPCError(f"schema: expected at most {MAX_NESTING} levels of nesting")
        facts = SchemaFacts(schema, any(map(_has_dictionary, schema.types)), message)
        if len(message) <= SMALL_BODY_BYTES:
            if len(_schema_cache) >= 256:
                _schema_cache.clear()
            _schema_cache[message] = facts
    return facts


class IpcReader:
    """Reads one Arrow IPC stream from a source, to its end marker and not a byte further.

    Not safe for use by several threads. The source stays open and belongs to the caller.

    Args:
        source: Where the bytes come from.
        limits: What one message may hold.
        validation: How much of each batch is checked.

    Attributes:
        schema: Schema of every batch; read at once.
        ended: Whether the end marker was read.

    Raises:
        EOFError: The source ended before the first byte.
        IPCError: What came is not an Arrow IPC stream.
    """

    def __init__(
        self, source: ByteSource, limits: IpcLimits = _NO_LIMITS, validation: IpcValidation = IpcValidation.FULL
    ) -> None:
        self._source, self._limits, self._validation = source, limits, validation
        self._dictionaries: dict[int, list[bytes]] = {}
        self.ended = False
        raw = self._read_head(first=True)
        if raw is None:
            raise IPCError("expected a schema message, got an end of stream")
        head = parse_message_head(raw[8:])
        if head.kind != _SCHEMA_MESSAGE or head.body_length:
            raise IPCError(f"expected a schema message first, got message type {head.kind}")
        self.facts = _schema_facts(raw)
        self.schema = self.facts.schema

    def _read_head(self, first: bool = False) -> bytes | None:
        """Read prefix and head of the next message; ``None`` at the end marker."""
        prefix = self._source.read(8)
        if len(prefix) < 8 or prefix[:4] != _CONTINUATION:
            if first and not prefix:
                raise EOFError("no more streams")
            shown = f"{prefix!r}" if prefix else "the end of the bytes"
            raise IPCError(f"not an Arrow IPC stream: expected a message (FF FF FF FF and a length), got {shown}")
        (size,) = struct.unpack("<i", prefix[4:])
        if size == 0:
            self.ended = True
            return None
        if not 0 < size <= MAX_METADATA_BYTES:
            raise IPCError(f"message head: expected 1 to {MAX_METADATA_BYTES} bytes, got {size}")
        head = self._source.read(size)
        if len(head) < size:
            raise IPCError(f"half a message: expected a head of {size} bytes, got {len(head)}")
        return prefix + head

    def next(self) -> tuple[pa.RecordBatch, dict[bytes, bytes] | None] | None:
        """Read the next batch and its metadata; ``None`` at the end marker.

        Raises:
            IPCError: Half a message, a bound exceeded, or values that do not validate.
        """
        message = self.next_message()
        return None if message is None else (self.decode(message), message.head.metadata)

    def next_message(self) -> BatchMessage | None:
        """Read the next batch's message without decoding it; ``None`` at the end marker. Raises as `next`."""
        while True:
            raw = None if self.ended else self._read_head()
            if raw is None:
                return None
            head = parse_message_head(raw[8:])
            if head.kind == _SCHEMA_MESSAGE:
                raise IPCError("expected a batch, got a second schema message")
            limit = self._limits.max_bytes
            if limit is not None and head.body_length > limit:
                raise RequestTooLargeError(f"message body: expected at most {limit} bytes, got {head.body_length}")
            message = _guard("the message body", self._source.read_after, raw, head.body_length)
            if len(message) < len(raw) + head.body_length:
                raise IPCError(
                    f"half a message: expected a body of {head.body_length} bytes, got {len(message) - len(raw)}"
                )
            self._check_bounds(head, memoryview(message)[len(raw) :])
            if head.kind == _DICTIONARY_MESSAGE:
                self._keep_dictionary(head, message)
                continue
            return BatchMessage(head, message)

    def _check_bounds(self, head: MessageHead, body: memoryview) -> None:
        """Refuse rows that no body pays for, buffers outside it, and compressed buffers that grow past the limit."""
        decoded = 0
        for offset, length in head.buffers:
            if offset < 0 or length < 0 or offset + length > head.body_length:
                raise IPCError(f"buffer at {offset}, {length} bytes: outside the body of {head.body_length} bytes")
            size = length
            if head.compressed and length >= 8:
                # BodyCompression: each buffer starts with its decoded length, -1 when it stands uncompressed.
                (size,) = struct.unpack_from("<q", body, offset)
                size = length if size == -1 else size
                if size < 0:
                    raise IPCError(f"compressed buffer at {offset}: a decoded length of {size} bytes")
            decoded += size
        limit, max_rows = self._limits.max_bytes, self._limits.max_rows
        if head.compressed and decoded > (limit if limit is not None else max(1 << 30, 1024 * head.body_length)):
            raise RequestTooLargeError(f"compressed buffers: expected at most {limit} decoded bytes, got {decoded}")
        if head.rows < 0 or (head.rows > FREE_ROWS and head.rows > 8 * decoded):
            raise IPCError(f"{head.rows} rows in a body of {decoded} bytes: more rows than bits")
        if max_rows is not None and head.rows > max_rows:
            raise RequestTooLargeError(f"expected at most {max_rows} rows in a batch, got {head.rows}")

    def _keep_dictionary(self, head: MessageHead, message: _Buffer) -> None:
        kept = self._dictionaries.pop(head.dictionary_id, []) if head.is_delta else []
        if not head.is_delta:
            self._dictionaries.pop(head.dictionary_id, None)
        kept.append(bytes(message))
        self._dictionaries[head.dictionary_id] = kept
        limit = self._limits.max_bytes
        if limit is not None and sum(map(len, kept)) > limit:
            raise RequestTooLargeError(f"dictionary: expected at most {limit} bytes")

    def decode(self, message: BatchMessage) -> pa.RecordBatch:
        """Decode a message of this stream; it must be the last one read when the schema has dictionaries.

        Raises:
            IPCError: It does not decode, or does not validate.
        """
        if self.facts.has_dictionary:
            batch = _guard("the batch", self._decode_with_dictionaries, message.data)
        else:
            batch = _guard("the batch", ipc.read_record_batch, pa.py_buffer(message.data), self.schema)
        if self._validation is not IpcValidation.NONE:
            _guard("the batch", functools.partial(batch.validate, full=self._validation is IpcValidation.FULL))
        return batch

    def _decode_with_dictionaries(self, message: _Buffer) -> pa.RecordBatch:
        # pyarrow takes dictionaries only from a whole stream: give it schema, dictionaries and this one batch.
        known = [m for messages in self._dictionaries.values() for m in messages]
        return ipc.open_stream(b"".join([self.facts.message, *known, message, END_OF_STREAM])).read_next_batch()

    def skip(self) -> None:
        """Read on to the end marker without decoding; used to leave a connection usable after a refusal.

        Raises:
            IPCError: The bytes are not an IPC stream.
        """
        while not self.ended:
            raw = self._read_head()
            if raw is None:
                return
            left = parse_message_head(raw[8:]).body_length
            while left:
                got = len(self._source.read(min(left, 1 << 20)))
                if not got:
                    raise IPCError(f"half a message: {left} bytes short")
                left -= got


class _Pieces:
    """The file-like object that collects what pyarrow's stream writer writes, without copying bodies."""

    closed = False

    def __init__(self) -> None:
        self.pieces: list[_Buffer] = []

    def write(self, data: _Buffer) -> int:
        self.pieces.append(data)
        return len(data)

    def take(self) -> list[_Buffer]:
        pieces, self.pieces = self.pieces, []
        return pieces

    def flush(self) -> None:
        """Nothing is kept back."""

    close = flush

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    seekable = readable


class IpcWriter:
    """Writes one Arrow IPC stream; each call hands whole messages to *write* at once.

    Not safe for use by several threads. The sink stays open and belongs to the caller.

    Args:
        write: Takes a list of buffers, to be written one after the other.
        schema: Schema of every batch.
    """

    def __init__(self, write: Callable[[list[_Buffer]], object], schema: pa.Schema) -> None:
        self.schema = schema
        self._write = write
        self._pieces = _Pieces()
        self._writer: ipc.RecordBatchStreamWriter | None = None

    def _open(self) -> ipc.RecordBatchStreamWriter:
        if self._writer is None:
            self._writer = ipc.new_stream(cast("Any", self._pieces), self.schema)
        return self._writer

    def write(self, batch: pa.RecordBatch, metadata: _Metadata | pa.KeyValueMetadata | None = None) -> None:
        """Write one batch (schema first, if this is the first); *metadata* becomes the message's own."""
        self.write_all([(batch, metadata)])

    def write_all(self, items: Iterable[tuple[pa.RecordBatch, Any]], *, close: bool = False) -> None:
        """Write several batches, and the end marker if *close*, in one call of the sink."""
        writer = self._open()
        for batch, metadata in items:
            writer.write_batch(batch, custom_metadata=metadata)
        if close:
            writer.close()
        pieces = self._pieces.take()
        if pieces:
            self._write(pieces)

    def close(self) -> None:
        """Write the end marker (after the schema, if nothing was written)."""
        self.write_all((), close=True)


def stream_bytes(schema: pa.Schema, items: Iterable[tuple[pa.RecordBatch, Any]]) -> bytes:
    """Return one whole IPC stream: schema, the batches with their metadata, end marker."""
    pieces: list[_Buffer] = []
    IpcWriter(pieces.extend, schema).write_all(items, close=True)
    return b"".join(pieces)


def _type_text(kind: pa.DataType) -> str:
    """An Arrow type as pyarrow's constructors spell it: ``float64``, where its own text says ``double``."""
    return re.sub(r"\b(double|halffloat|float|string)\b", lambda m: _TYPE_SPELLING[m[1]], str(kind))


_TYPE_SPELLING = {"double": "float64", "halffloat": "float16", "float": "float32", "string": "utf8"}


def _schema_text(schema: pa.Schema) -> str:
    """A schema on one line: ``(a: float64 not null, b: utf8)``."""
    return "(" + ", ".join(f"{f.name}: {_type_text(f.type)}{'' if f.nullable else ' not null'}" for f in schema) + ")"


def conform_batch(batch: object, schema: pa.Schema, where: str, *, cast_values: bool) -> pa.RecordBatch:
    """Return *batch* under *schema*: same names in the same order, no null where none is allowed.

    Args:
        batch: What came.
        schema: What was declared.
        where: Begins the error text.
        cast_values: Whether types may differ when every value survives a safe cast (exchange input) or not (output).

    Raises:
        ParameterError: Names, types or nulls differ; the text says what was expected and what came.
    """
    if not isinstance(batch, pa.RecordBatch):
        raise ParameterError(f"{where}: expected a pyarrow.RecordBatch, got {type(batch).__name__}")
    if batch.schema is schema or batch.schema.equals(schema):
        arrays = batch.columns if any(not f.nullable for f in schema) else []
    elif batch.schema.names != schema.names:
        raise ParameterError(f"{where}: expected columns {_schema_text(schema)}, got {_schema_text(batch.schema)}")
    else:
        arrays = [_conform_column(a, f, where, cast_values) for a, f in zip(batch.columns, schema)]
        batch = pa.RecordBatch.from_arrays(arrays, schema=schema) if arrays else batch
    for array_, column in zip(arrays, schema):
        if not column.nullable and array_.null_count:
            raise ParameterError(f"{where}: column {column.name!r}: expected {column.type} without nulls, got a null")
    return batch


def _conform_column(column: pa.Array, wanted: pa.Field, where: str, cast_values: bool) -> pa.Array:
    if column.type.equals(wanted.type):
        return column
    problem = f"{where}: column {wanted.name!r}: expected {_type_text(wanted.type)}, got {_type_text(column.type)}"
    if not cast_values:
        raise ParameterError(problem)
    try:
        return column.cast(wanted.type, safe=True)
    except _ARROW_FAILURES as exc:
        raise ParameterError(f"{problem} ({_text_of(exc)})") from None


# ============================================================================
# 5. TYPES .............................................. uses 1-4
# ============================================================================
# Annotation -> codec: the Arrow type, whether it is nullable, how a Python value becomes one and comes back (WIRE section 2).
# Law: a codec is built once per annotation and cached; a value that does not fit raises _Mismatch, to which each
# container on the way out adds its part of the path, so that the text reads `Order.lines[0].price: expected ..., got ...`.


@dataclass(frozen=True)
class ArrowType:
    """Says which Arrow type a field or parameter has: ``Annotated[int, ArrowType(pa.int32())]``.

    Attributes:
        arrow_type: Exactly this type goes on the wire.
        nullable: Overrides what the annotation says; ``None`` leaves it.
    """

    arrow_type: pa.DataType
    nullable: bool | None = None


@dataclass(frozen=True)
class Transient:
    """Marks a dataclass field that is not serialised: ``Annotated[T, Transient()]``; on reading it takes its default."""


class _Mismatch(Exception):
    """A value that does not fit its codec; containers prepend to *path* on the way out."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(expected, got)
        self.expected, self.got, self.path = expected, got, ""

    def under(self, step: str) -> _Mismatch:
        self.path = step + self.path
        return self

    def error(self, where: str) -> ParameterError:
        return ParameterError(f"{where}{self.path}: expected {self.expected}, got {self.got}")


def _got(value: object) -> str:
    return "None" if value is None else type(value).__name__


@dataclass(frozen=True)
class Codec:
    """How values of one annotation travel.

    Attributes:
        arrow_type: Type of the column.
        nullable: Whether ``None`` is a value.
        encode: Python value to what ``pa.array`` takes for `arrow_type`; raises `_Mismatch`.
        decode: What ``to_pylist`` gives to the Python value; raises `_Mismatch`.
        plain: Exact Python types on which `encode` changes nothing, so that a list of them is passed on as it is.
        decodes_plain: Whether `decode` changes nothing but to refuse ``None``.
        parts: Yields (step, codec, value) of a container's members; only used to find the one that failed.
    """

    arrow_type: pa.DataType
    nullable: bool
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    plain: frozenset[type] = frozenset()
    decodes_plain: bool = False
    parts: Callable[[Any], Iterable[tuple[str, Codec, Any]]] | None = None
    fixed_nullability: bool = False  # ArrowType(..., nullable=...) beats an Optional around it

    @property
    def expected(self) -> str:
        """What an error text says was expected."""
        return _type_text(self.arrow_type)

    def to_array(self, values: list[Any]) -> pa.Array:
        """Encode *values* into a column of len(values) rows; raises `_Mismatch` with the path to the first that fails."""
        encoded = list(map(self.encode, values))
        try:
            return pa.array(encoded, type=self.arrow_type)
        except _ARROW_FAILURES as exc:
            for value in values:
                self._find_failure(value)
            raise _Mismatch(self.expected, _text_of(exc)) from None

    def _find_failure(self, value: Any) -> None:
        for step, codec, member in self.parts(value) if self.parts and value is not None else ():
            try:
                codec._find_failure(member)
            except _Mismatch as exc:
                raise exc.under(step) from None
        try:
            pa.array([self.encode(value)], type=self.arrow_type)
        except _ARROW_FAILURES as exc:
            shown = repr(value) if isinstance(value, (int, float)) else _got(value)
            raise _Mismatch(self.expected, f"{shown} ({_text_of(exc)})") from None

    def from_array(self, column: pa.Array, row: int = 0) -> Any:
        """Decode one row of *column*; a column of another type is accepted when its value fits all the same."""
        value = self.decode(column.slice(row, 1).to_pylist()[0] if row or len(column) != 1 else column.to_pylist()[0])
        if column.type != self.arrow_type and not (value is None and self.nullable):
            self.to_array([value])
        return value


def _hints(owner: Any) -> dict[str, Any]:
    """The resolved annotations of a class or function; an unresolvable name is reported with its owner."""
    try:
        return typing.get_type_hints(owner, include_extras=True)
    except Exception as exc:
        name = getattr(owner, "__qualname__", owner)
        hint = " (define the types that annotations name at module level)" if isinstance(exc, NameError) else ""
        raise TypeError(f"{name}: its annotations do not resolve: {_text_of(exc)}{hint}") from exc


def _annotation_text(annotation: object) -> str:
    return annotation.__qualname__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)


def _split_optional(annotation: Any) -> tuple[Any, bool]:
    """``T | None`` -> (T, True); anything else -> (annotation, False)."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        members = typing.get_args(annotation)
        rest = [m for m in members if m is not type(None)]
        if len(rest) == 1 and len(rest) < len(members):
            return rest[0], True
    return annotation, False


def _unboxed(value: Any) -> Any:
    """A Python value out of a numpy or pyarrow scalar; anything else as it is."""
    module = type(value).__module__.partition(".")[0]
    if module == "numpy" and hasattr(value, "item"):
        return value.item()
    return value.as_py() if isinstance(value, pa.Scalar) else value


_SCALARS: dict[type, tuple[pa.DataType, tuple[type, ...], Callable[[Any], Any]]] = {
    # annotation: Arrow type, what is accepted, how an accepted value that is not exactly one becomes one
    bool: (pa.bool_(), (bool,), bool),
    int: (pa.int64(), (int,), int),
    float: (pa.float64(), (float, int), float),
    str: (pa.utf8(), (str,), str),
    bytes: (pa.binary(), (bytes, bytearray, memoryview), bytes),
}


def _scalar_codec(kind: type) -> Codec:
    arrow_type, accepted, convert = _SCALARS[kind]
    expected = _type_text(arrow_type)

    def encode(value: Any) -> Any:
        if type(value) is kind:
            return value
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            boxed, value = value, _unboxed(value)
            if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
                raise _Mismatch(expected, _got(boxed))
        try:
            return convert(value)
        except OverflowError:
            raise _Mismatch(expected, f"{value!r:.40} (out of range)") from None

    plain = frozenset({float, int}) if kind is float else frozenset({kind})
    return Codec(arrow_type, False, encode, _refuse_none(expected), plain, decodes_plain=True)


def _refuse_none(expected: str) -> Callable[[Any], Any]:
    def decode(value: Any) -> Any:
        if value is None:
            raise _Mismatch(expected, "None")
        return value

    return decode


def _each(function: Callable[[Any], Any], values: Iterable[Any]) -> list[Any]:
    """Apply *function* to every element; a mismatch says at which index."""
    out: list[Any] = []
    try:
        for value in values:
            out.append(function(value))
    except _Mismatch as exc:
        raise exc.under(f"[{len(out)}]") from None
    return out


def _list_codec(item: Codec, container: type) -> Codec:
    arrow_type = pa.list_(pa.field("item", item.arrow_type))
    accepted = {list: (list, tuple), set: (set, frozenset), frozenset: (set, frozenset)}[container]

    def encode(values: Any) -> Any:
        if not isinstance(values, accepted):
            raise _Mismatch(f"{container.__name__} of {item.expected}", _got(values))
        return list(values) if set(map(type, values)) <= item.plain else _each(item.encode, values)

    def decode(values: Any) -> Any:
        if values is None:
            raise _Mismatch(str(arrow_type), "None")
        plain = item.decodes_plain and (item.nullable or None not in values)
        members = values if plain else _each(item.decode, values)
        return members if container is list else container(members)

    def parts(values: Any) -> Iterable[tuple[str, Codec, Any]]:
        return ((f"[{i}]", item, v) for i, v in enumerate(values))

    return Codec(arrow_type, False, encode, decode, parts=parts)


def _dict_codec(key: Codec, value: Codec) -> Codec:
    arrow_type = pa.map_(key.arrow_type, value.arrow_type)

    def pairs(mapping: Any, one: Callable[[Codec], Callable[[Any], Any]]) -> list[tuple[Any, Any]]:
        out = []
        encode_key, encode_value = one(key), one(value)
        for k, v in mapping:
            try:
                out.append((encode_key(k), encode_value(v)))
            except _Mismatch as exc:
                raise exc.under(f"[{k!r:.40}]") from None
        return out

    def encode(mapping: Any) -> Any:
        if not isinstance(mapping, Mapping):
            raise _Mismatch(f"dict of {key.expected} to {value.expected}", _got(mapping))
        return pairs(mapping.items(), operator.attrgetter("encode"))

    def decode(entries: Any) -> Any:
        if entries is None:
            raise _Mismatch(str(arrow_type), "None")
        return dict(pairs(entries, operator.attrgetter("decode")))

    def parts(mapping: Any) -> Iterable[tuple[str, Codec, Any]]:
        for k, v in mapping.items():
            yield "<key>", key, k
            yield f"[{k!r:.40}]", value, v

    return Codec(arrow_type, False, encode, decode, parts=parts)


def _enum_codec(kind: type[enum.Enum]) -> Codec:
    members = kind.__members__
    expected = f"{kind.__name__} ({', '.join(list(members)[:8])}{', …' if len(members) > 8 else ''})"

    def encode(value: Any) -> Any:
        if not isinstance(value, kind):
            raise _Mismatch(expected, _got(value))
        return value.name

    def decode(name: Any) -> Any:
        try:
            return members[name]
        except (KeyError, TypeError):
            raise _Mismatch(expected, f"{name!r:.60}") from None

    return Codec(pa.dictionary(pa.int16(), pa.utf8()), False, encode, decode)


def _optional_codec(inner: Codec) -> Codec:
    if inner.fixed_nullability:
        return inner

    def encode(value: Any) -> Any:
        return None if value is None else inner.encode(value)

    def decode(value: Any) -> Any:
        return None if value is None else inner.decode(value)

    plain = inner.plain | {type(None)} if inner.plain else inner.plain
    return dataclasses.replace(inner, nullable=True, encode=encode, decode=decode, plain=plain)


def _exact_codec(annotation: Any, inner: Codec | None, exact: ArrowType) -> Codec:
    """``Annotated[T, ArrowType(t)]``: T's own conversions, where it has any, over exactly the type t."""
    nullable = exact.nullable if exact.nullable is not None else bool(inner and inner.nullable)
    if inner is None:
        base = Codec(exact.arrow_type, False, lambda v: v, lambda v: v, decodes_plain=True)
    else:
        base = dataclasses.replace(inner, arrow_type=exact.arrow_type)
    if nullable and not base.nullable:
        base = _optional_codec(base)
    if not nullable:
        strict, text = base.encode, str(exact.arrow_type)

        def encode(value: Any) -> Any:
            if value is None:
                raise _Mismatch(text, "None")
            return strict(value)

        decode = _refuse_none(text) if base.decodes_plain else base.decode
        base = dataclasses.replace(base, nullable=False, encode=encode, decode=decode)
    return dataclasses.replace(base, fixed_nullability=exact.nullable is not None)


def _batch_to_bytes(batch: Any) -> bytes:
    if not isinstance(batch, pa.RecordBatch):
        raise _Mismatch("pyarrow.RecordBatch", _got(batch))
    return stream_bytes(batch.schema, [(batch, None)])


def _batch_from_bytes(data: Any) -> pa.RecordBatch:
    if not data:
        return empty_batch(EMPTY_SCHEMA)
    reader = IpcReader(BufferSource(data))
    item = reader.next()
    return item[0] if item else empty_batch(reader.schema)


def _schema_to_bytes(schema: Any) -> bytes:
    if not isinstance(schema, pa.Schema):
        raise _Mismatch("pyarrow.Schema", _got(schema))
    return schema.serialize().to_pybytes()


def _schema_from_bytes(data: Any) -> pa.Schema:
    return _schema_facts(bytes(data)).schema if data else EMPTY_SCHEMA


def _binary_codec(encode: Callable[[Any], bytes], decode: Callable[[Any], Any]) -> Codec:
    """A value that travels as bytes: what is wrong inside them is said as a mismatch of the value."""

    def read(data: Any) -> Any:
        if data is None:
            raise _Mismatch("binary", "None")
        try:
            return decode(data)
        except (IPCError, EOFError) as exc:
            raise _Mismatch("an Arrow IPC stream", _text_of(exc)) from None

    return Codec(pa.binary(), False, encode, read)


class RowCodec:
    """Named codecs side by side: one row of a schema to values and back.

    Parameters, results, headers and dataclasses all travel as such a row.

    Attributes:
        names: Column names in order.
        codecs: A codec for each.
        schema: The Arrow schema, 1 row x len(names) columns on the wire.
    """

    def __init__(self, fields: Iterable[tuple[str, Codec]]) -> None:
        pairs = list(fields)
        self.names = tuple(name for name, _ in pairs)
        self.codecs = tuple(codec for _, codec in pairs)
        self.schema = pa.schema([pa.field(n, c.arrow_type, nullable=c.nullable) for n, c in pairs])

    def to_batch(self, values: Sequence[Any]) -> pa.RecordBatch:
        """Encode one row; raises `_Mismatch` whose path begins with ``.name``."""
        arrays = []
        for name, codec, value in zip(self.names, self.codecs, values):
            try:
                arrays.append(codec.to_array([value]))
            except _Mismatch as exc:
                raise exc.under(f".{name}") from None
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def from_batch(self, batch: pa.RecordBatch) -> list[Any]:
        """Decode the one row of a batch of this schema; raises `_Mismatch` whose path begins with ``.name``."""
        values = []
        for name, codec, column in zip(self.names, self.codecs, batch.columns):
            try:
                values.append(codec.from_array(column))
            except _Mismatch as exc:
                raise exc.under(f".{name}") from None
        return values


class DataclassCodec:
    """A dataclass as a row and as a struct; built by `dataclass_codec`.

    Attributes:
        cls: The class.
        fields: Its serialised fields; `Transient` ones are left out.
        row: One codec per field, in the order of the fields.
    """

    def __init__(self, cls: type) -> None:
        self.cls = cls
        hints = _hints(cls)
        # A state without fields need not be decorated; one with fields must, or they would be lost silently.
        own = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
        missed = [n for n in vars(cls).get("__annotations__", ()) if n not in {f.name for f in own}]
        if missed and "__dataclass_fields__" not in vars(cls) and not all(_is_classvar(hints.get(n)) for n in missed):
            raise TypeError(f"{cls.__qualname__} has fields ({', '.join(missed)}) but is not decorated with @dataclass")
        self.fields = [f for f in own if not _is_transient(hints[f.name])]
        transient = [f for f in own if _is_transient(hints[f.name]) and f.init and not _has_default(f)]
        if transient:
            raise TypeError(f"{cls.__qualname__}.{transient[0].name}: a Transient field needs a default to be read back to")
        codecs = []
        for f in self.fields:
            try:
                codecs.append((f.name, codec_for(hints[f.name])))
            except TypeError as exc:
                raise TypeError(f"{cls.__qualname__}.{f.name}: {exc}") from None
        self.row = RowCodec(codecs)
        self._get = operator.attrgetter(*self.row.names) if len(codecs) > 1 else None

    def values(self, instance: Any) -> Sequence[Any]:
        """Return the field values of *instance*, in the order of the row."""
        if not isinstance(instance, self.cls):
            raise _Mismatch(self.cls.__name__, _got(instance))
        if self._get is not None:
            return cast("Sequence[Any]", self._get(instance))
        return [getattr(instance, n) for n in self.row.names]

    def to_dict(self, instance: Any) -> dict[str, Any]:
        """Encode for a struct column."""
        out = {}
        for name, codec, value in zip(self.row.names, self.row.codecs, self.values(instance)):
            try:
                out[name] = codec.encode(value)
            except _Mismatch as exc:
                raise exc.under(f".{name}") from None
        return out

    def to_bytes(self, instance: Any) -> bytes:
        """Encode as a whole IPC stream of one row."""
        return stream_bytes(self.row.schema, [(self.row.to_batch(self.values(instance)), None)])

    def from_dict(self, entries: Any) -> Any:
        """Decode a struct: by name, unknown members ignored, absent ones take their default."""
        if entries is None:
            raise _Mismatch(self.cls.__name__, "None")
        return self._build(lambda name, codec: codec.decode(entries[name]), entries)

    def from_batch(self, batch: pa.RecordBatch) -> Any:
        """Decode the first row of a batch: by name, unknown columns ignored, absent ones take their default."""
        if batch.num_rows > 1:
            raise _Mismatch(f"{self.cls.__name__} (one row)", f"{batch.num_rows} rows")
        columns = dict(zip(batch.schema.names, batch.columns)) if batch.num_rows else {}
        return self._build(lambda name, codec: codec.from_array(columns[name]), columns)

    def from_bytes(self, data: _Buffer, validation: IpcValidation = IpcValidation.FULL) -> Any:
        """Decode an IPC stream of one row; no bytes, or no batch, is a row of defaults."""
        item = IpcReader(BufferSource(data), validation=validation).next() if len(data) else None
        return self.from_batch(item[0] if item else _TICK)

    def _build(self, read: Callable[[str, Codec], Any], present: Mapping[str, Any]) -> Any:
        values, late = {}, {}
        for f, codec in zip(self.fields, self.row.codecs):
            if f.name in present:
                try:
                    (values if f.init else late)[f.name] = read(f.name, codec)
                except _Mismatch as exc:
                    raise exc.under(f".{f.name}") from None
            elif f.init and not _has_default(f):
                raise _Mismatch(codec.expected, "no such field, and it has no default").under(f".{f.name}")
        instance = self.cls(**values)
        for name, value in late.items():
            object.__setattr__(instance, name, value)
        return instance

    def parts(self, instance: Any) -> Iterable[tuple[str, Codec, Any]]:
        """The members of an instance, for finding the one that failed."""
        return ((f".{n}", c, getattr(instance, n)) for n, c in zip(self.row.names, self.row.codecs))


def _is_transient(annotation: Any) -> bool:
    return any(isinstance(m, Transient) or m is Transient for m in getattr(annotation, "__metadata__", ()))


def _is_classvar(annotation: Any) -> bool:
    return annotation is ClassVar or typing.get_origin(annotation) is ClassVar


def _has_default(f: dataclasses.Field[Any]) -> bool:
    return f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING


_building: set[type] = set()
_codec_lock = threading.RLock()


@functools.lru_cache(maxsize=None)
def dataclass_codec(cls: type) -> DataclassCodec:
    """Return the codec of a dataclass; built once per class.

    Raises:
        TypeError: A field's annotation has no Arrow mapping, or the class contains itself.
    """
    with _codec_lock:
        if cls in _building:
            raise TypeError(f"{cls.__qualname__} contains itself; an Arrow struct has a fixed depth")
        _building.add(cls)
        try:
            return DataclassCodec(cls)
        finally:
            _building.discard(cls)


_MISSING_MAPPINGS = {  # what would work instead, by the name of the type
    "list": "list[T], for example list[int]",
    "dict": "dict[K, V], for example dict[str, float]",
    "set": "set[T]",
    "frozenset": "frozenset[T]",
    "tuple": "list[T], or a dataclass",
    "datetime": "Annotated[datetime, ArrowType(pa.timestamp('us'))]",
    "date": "Annotated[date, ArrowType(pa.date32())]",
    "time": "Annotated[time, ArrowType(pa.time64('us'))]",
    "timedelta": "Annotated[timedelta, ArrowType(pa.duration('us'))]",
    "Decimal": "Annotated[Decimal, ArrowType(pa.decimal128(20, 4))]",
    "UUID": "Annotated[bytes, ArrowType(pa.binary(16))]",
    "Table": "pa.RecordBatch, or a stream of batches",
}


def _no_mapping(annotation: Any) -> TypeError:
    name = getattr(typing.get_origin(annotation) or annotation, "__name__", "")
    instead = _MISSING_MAPPINGS.get(
        name, "str, bytes, int, float, bool, list, dict, set, Enum, a dataclass, or Annotated[T, ArrowType(...)]"
    )
    return TypeError(f"no Arrow type for {_annotation_text(annotation)}; use {instead}")


@functools.lru_cache(maxsize=None)
def codec_for(annotation: Any, *, whole: bool = False) -> Codec:
    """Return the codec of an annotation.

    Args:
        annotation: A type of WIRE section 2.
        whole: For parameters and results, where a dataclass travels as bytes, and not as a struct.

    Raises:
        TypeError: No mapping; the text says what would work.
    """
    if hasattr(annotation, "__supertype__"):  # NewType
        return codec_for(annotation.__supertype__, whole=whole)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _annotated_codec(annotation, whole)
    inner, optional = _split_optional(annotation)
    if optional:
        return _optional_codec(codec_for(inner, whole=whole))
    if annotation in _SCALARS:
        return _scalar_codec(annotation)
    if origin in (list, set, frozenset) and len(arguments) == 1:
        return _list_codec(codec_for(arguments[0]), origin)
    if origin is dict and len(arguments) == 2:
        return _dict_codec(codec_for(arguments[0]), codec_for(arguments[1]))
    if isinstance(annotation, type) and origin is None:
        if issubclass(annotation, enum.Enum):
            return _enum_codec(annotation)
        if issubclass(annotation, pa.RecordBatch):
            return _binary_codec(_batch_to_bytes, _batch_from_bytes)
        if issubclass(annotation, pa.Schema):
            return _binary_codec(_schema_to_bytes, _schema_from_bytes)
        if issubclass(annotation, ArrowSerializableDataclass) or dataclasses.is_dataclass(annotation):
            return _dataclass_value_codec(annotation, whole)
    raise _no_mapping(annotation)


def _dataclass_value_codec(cls: type, whole: bool) -> Codec:
    known = dataclass_codec(cls)
    if whole:
        return _binary_codec(known.to_bytes, known.from_bytes)
    return Codec(pa.struct(list(known.row.schema)), False, known.to_dict, known.from_dict, parts=known.parts)


def _annotated_codec(annotation: Any, whole: bool) -> Codec:
    inner = annotation.__origin__
    exact = next((m for m in annotation.__metadata__ if isinstance(m, ArrowType)), None)
    if exact is None:
        return codec_for(inner, whole=whole)
    try:
        return _exact_codec(annotation, codec_for(inner), exact)
    except TypeError:  # datetime and the like: pyarrow itself knows how to convert them
        base, optional = _split_optional(inner)
        codec = _exact_codec(annotation, None, exact)
        return _optional_codec(codec) if optional and not codec.nullable and exact.nullable is None else codec


class _SchemaDescriptor:
    """``ARROW_SCHEMA`` of a dataclass: made at first use, as annotations may name classes defined later."""

    def __get__(self, instance: object, owner: type) -> pa.Schema:
        return dataclass_codec(owner).row.schema


class ArrowSerializableDataclass:
    """Base of dataclasses that travel: parameters, results, headers and stream states.

    A subclass is decorated with ``@dataclass`` (frozen or not). Fields have the types of the README's table; a field
    ``Annotated[T, Transient()]`` is not serialised. Reading goes by field name: unknown columns are ignored, absent ones
    take the field's default.

    Attributes:
        ARROW_SCHEMA: The Arrow schema, one column per field.
    """

    ARROW_SCHEMA: ClassVar[Any] = _SchemaDescriptor()

    def serialize_to_bytes(self) -> bytes:
        """Return an Arrow IPC stream of 1 row x len(fields) columns.

        Raises:
            TypeError: A field's value does not have the declared type; the text gives the path to it.
        """
        try:
            return dataclass_codec(type(self)).to_bytes(self)
        except _Mismatch as exc:
            raise exc.error(type(self).__name__) from None

    def serialize(self, dest: typing.BinaryIO) -> None:
        """Write `serialize_to_bytes` to *dest*, which stays open."""
        dest.write(self.serialize_to_bytes())

    @classmethod
    def deserialize_from_bytes(cls: type[_T], data: bytes, ipc_validation: IpcValidation = IpcValidation.FULL) -> _T:
        """Read what `serialize_to_bytes` wrote.

        Raises:
            IPCError: Not an Arrow IPC stream.
            TypeError: A field is absent and has no default, or does not have the declared type.
        """
        try:
            return cast("_T", dataclass_codec(cls).from_bytes(data, ipc_validation))
        except EOFError:
            raise IPCError(f"{cls.__name__}: expected an Arrow IPC stream, got no bytes") from None
        except _Mismatch as exc:
            raise exc.error(cls.__name__) from None

    @classmethod
    def deserialize_from_batch(
        cls: type[_T],
        batch: pa.RecordBatch,
        custom_metadata: pa.KeyValueMetadata | None = None,
        *,
        ipc_validation: IpcValidation = IpcValidation.FULL,
    ) -> _T:
        """Read the one row of *batch* (1 x any columns); the metadata is not looked at.

        Raises:
            TypeError: As `deserialize_from_bytes`.
        """
        try:
            return cast("_T", dataclass_codec(cls).from_batch(batch))
        except _Mismatch as exc:
            raise exc.error(cls.__name__) from None


# ============================================================================
# 6. STREAM STATE ....................................... uses 1-5
# ============================================================================
# What a method's author holds in hand: the context of a call, the collector of one turn, the state that lives on
# between turns. Law: nothing here knows a transport; facts of one call travel in CallContext, never in globals.


class TransportKind(str, enum.Enum):
    """How a call came in."""

    PIPE = "pipe"
    UNIX = "unix"
    TCP = "tcp"
    HTTP = "http"

    def __str__(self) -> str:
        return self.value


class ServeStartHook(Protocol):
    """An implementation with this method hears, once per kind of transport, that serving begins."""

    def on_serve_start(self, kind: TransportKind) -> None:
        """Called before the first request; an exception refuses that request and the next one asks again."""


@dataclass(frozen=True)
class AuthContext:
    """Who is calling.

    Attributes:
        domain: The scheme or issuer that vouches, ``None`` for nobody.
        authenticated: Whether anybody vouches.
        principal: Name of the caller within the domain.
        claims: Further facts, as the authenticator found them.
    """

    domain: str | None
    authenticated: bool
    principal: str | None = None
    claims: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def anonymous(cls) -> AuthContext:
        """Return the caller of whom nothing is known."""
        return _ANONYMOUS

    def require_authenticated(self) -> None:
        """Raise `StatusError` (UNAUTHENTICATED) unless somebody vouches for the caller."""
        if not self.authenticated:
            raise StatusError("authentication required", code=Code.UNAUTHENTICATED)


_ANONYMOUS = AuthContext(None, False)
ClientLog = Callable[[Message], None]
_current_context: contextvars.ContextVar[CallContext | None] = contextvars.ContextVar("vgi_rpc_call", default=None)


def current_auth() -> AuthContext:
    """Return who calls the method that runs now; anonymous outside of one."""
    ctx = _current_context.get()
    return ctx.auth if ctx is not None else _ANONYMOUS


class CallContext:
    """What a method or state may ask about the call it serves: declare a parameter ``ctx: CallContext``.

    One object per call, used by the thread that runs the method.

    Attributes:
        auth: Who calls.
        emit_client_log: Sends a `Message` to the client's ``on_log``.
        transport_metadata: Facts of the transport: ``remote_addr``, ``traceparent``, ``tracestate`` where known.
        server_id: 12 hex characters, one per server.
        method_name: Name of the method.
        protocol_name: Name of the protocol.
        kind: Transport of the call.
        implementation: The object that serves the protocol.
        request_id: Id of the request, in the client's errors and in the access log.
        deadline: When the client stops waiting, in seconds of ``time.monotonic()``; ``None`` for never.
        response_limit_bytes: What the client and the server accept as one answer over HTTP; ``None`` for any size.
    """

    __slots__ = (
        "_gone",
        "auth",
        "deadline",
        "emit_client_log",
        "implementation",
        "kind",
        "method_name",
        "protocol_name",
        "request_id",
        "response_limit_bytes",
        "server_id",
        "transport_metadata",
    )

    def __init__(
        self,
        auth: AuthContext,
        emit_client_log: ClientLog,
        transport_metadata: Mapping[str, Any] | None = None,
        *,
        server_id: str = "",
        method_name: str = "",
        protocol_name: str = "",
        kind: TransportKind | None = None,
        implementation: Any = None,
    ) -> None:
        self.auth = auth
        self.emit_client_log = emit_client_log
        self.transport_metadata: Mapping[str, Any] = transport_metadata or {}
        self.server_id = server_id
        self.method_name = method_name
        self.protocol_name = protocol_name
        self.kind = kind
        self.implementation = implementation
        self.request_id = ""
        self.deadline: float | None = None
        self.response_limit_bytes: int | None = None
        self._gone: Callable[[], bool] | None = None

    def client_log(self, level: Level, message: str, **extra: str) -> None:
        """Send a log line to the client; it arrives before the answer of this turn."""
        self.emit_client_log(Message(level, message, **extra))

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more: the deadline has passed or the client has gone."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return True
        return self._gone is not None and self._gone()

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger ``vgi_rpc.method`` on the server's side, with request id and method in ``extra``."""
        facts = {"request_id": self.request_id, "protocol": self.protocol_name, "method": self.method_name}
        return logging.LoggerAdapter(logging.getLogger("vgi_rpc.method"), facts)


@dataclass
class CallStatistics:
    """What went through one call; bytes are those of the batches' buffers, not of the wire.

    Attributes:
        input_batches: Batches received.
        output_batches: Batches sent.
        input_rows: Rows received.
        output_rows: Rows sent.
        input_bytes: Bytes received.
        output_bytes: Bytes sent.
    """

    input_batches: int = 0
    output_batches: int = 0
    input_rows: int = 0
    output_rows: int = 0
    input_bytes: int = 0
    output_bytes: int = 0

    def record_input(self, batch: pa.RecordBatch) -> None:
        """Count a received batch."""
        self.input_batches += 1
        self.input_rows += batch.num_rows
        self.input_bytes += batch.nbytes

    def record_output(self, batch: pa.RecordBatch) -> None:
        """Count a sent batch."""
        self.output_batches += 1
        self.output_rows += batch.num_rows
        self.output_bytes += batch.nbytes


class OutputCollector:
    """Collects what one turn of a stream sends: any number of logs and exactly one data batch.

    Made by the server for each turn and used by one thread.

    Args:
        output_schema: Schema of the stream's output.
        producer_mode: Whether the stream may `finish` (a producer) or is ended by the client (an exchange).
    """

    def __init__(self, output_schema: pa.Schema, *, producer_mode: bool = True) -> None:
        self._schema = output_schema
        self._producer_mode = producer_mode
        self._data: pa.RecordBatch | None = None
        self._metadata: dict[bytes, bytes] | None = None
        self._finished = False
        self.messages: list[Message] = []

    @property
    def output_schema(self) -> pa.Schema:
        """Schema of the stream's output."""
        return self._schema

    @property
    def finished(self) -> bool:
        """Whether `finish` was called in this turn."""
        return self._finished

    @property
    def data_batch(self) -> AnnotatedBatch | None:
        """The data batch of this turn, once it was emitted."""
        if self._data is None:
            return None
        return AnnotatedBatch(self._data, pa.KeyValueMetadata(self._metadata) if self._metadata else None)

    def _may_emit(self) -> None:
        if self._finished:
            raise RuntimeError("emit after finish(): a finished stream sends nothing more")
        if self._data is not None:
            raise RuntimeError("emit called twice in one turn: a turn sends exactly one data batch")

    def emit(self, batch: pa.RecordBatch, metadata: Mapping[str, str] | None = None) -> None:
        """Send *batch* (any rows x the columns of the output schema) with its own metadata.

        Raises:
            RuntimeError: The second batch of this turn, or after `finish`.
            TypeError: Not a record batch of the output schema.
        """
        self._may_emit()
        self._data = conform_batch(batch, self._schema, "emit", cast_values=False)
        if metadata:
            self._metadata = {_as_bytes(k): _as_bytes(v) for k, v in dict(metadata).items()}

    def emit_arrays(self, arrays: Sequence[pa.Array], metadata: Mapping[str, str] | None = None) -> None:
        """Send columns, in the order of the output schema; raises as `emit`."""
        self._may_emit()
        if len(arrays) != len(self._schema):
            raise ParameterError(f"emit_arrays: expected {len(self._schema)} columns, got {len(arrays)}")
        batch = _batch_from_pydict(dict(zip(self._schema.names, arrays)), self._schema, "emit_arrays")
        self.emit(batch, metadata)

    def emit_pydict(self, data: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
        """Send ``{column: values}``; raises as `emit`."""
        self._may_emit()
        self.emit(_batch_from_pydict(data, self._schema, "emit_pydict"), metadata)

    def finish(self) -> None:
        """End a producer's stream after this turn; a batch emitted in the same turn is still sent.

        Raises:
            RuntimeError: In an exchange, which its client ends.
        """
        if not self._producer_mode:
            raise RuntimeError("finish() in an exchange: the client ends an exchange, by closing it")
        self._finished = True

    def client_log(self, level: Level, message: str, **extra: str) -> None:
        """Send a log line to the client's ``on_log``, before this turn's data."""
        self.messages.append(Message(level, message, **extra))

    def emit_client_log_message(self, msg: Message) -> None:
        """Send a ready-made log line."""
        self.messages.append(msg)

    def validate(self) -> None:
        """Raise `RuntimeError` when the turn broke the rule of one data batch."""
        if self._data is None and not self._finished:
            rule = "emit one data batch or call finish()" if self._producer_mode else "emit exactly one data batch"
            raise RuntimeError(f"nothing emitted: each turn must {rule}")


def _as_bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "backslashreplace")


class StreamState(ArrowSerializableDataclass):
    """What a stream remembers between turns: a dataclass whose fields are serialised over HTTP and stay put elsewhere.

    Attributes:
        CALL_STATE_TYPE: Dataclass of the part that never changes (``Stream(call_state=...)``): sent once, sealed on its own.
    """

    CALL_STATE_TYPE: ClassVar[type[ArrowSerializableDataclass] | None] = None

    def process(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        """Serve one turn: read *input* (a tick of 0 x 0 for producers), emit one batch or finish."""
        raise TypeError(f"{type(self).__name__} defines no process(); derive from ProducerState or ExchangeState or write one")

    def on_cancel(self, ctx: CallContext) -> None:
        """Called once when the client cancels; a failure is swallowed."""

    def rehydrate(self, implementation: Any) -> None:
        """Called on a state that was read back from a token: the place to find connections and caches again."""

    def bind_call_state(self, call_state: Any) -> None:
        """Called with the stream's call state before the first turn and after each reading back."""


class ProducerState(StreamState):
    """State of a stream that the server pushes: override `produce`."""

    def process(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        self.produce(out, ctx)

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        """Emit one batch, or call ``out.finish()``."""
        raise TypeError(f"{type(self).__name__} defines no produce()")


class ExchangeState(StreamState):
    """State of a stream in which each input batch is answered by one: override `exchange`."""

    def process(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        self.exchange(input, out, ctx)

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        """Answer *input* with exactly one batch."""
        raise TypeError(f"{type(self).__name__} defines no exchange()")


if typing.TYPE_CHECKING:
    import typing_extensions

    _S = typing_extensions.TypeVar("_S", bound=StreamState)
    _H = typing_extensions.TypeVar("_H", default=None)
else:
    _S = TypeVar("_S")
    _H = TypeVar("_H")


@dataclass
class Stream(Generic[_S, _H]):
    """What a streaming method returns: ``Stream[State]`` or ``Stream[State, Header]``.

    On the client the same annotation stands for a `StreamSession`, whose methods are declared here for type checkers.

    Attributes:
        output_schema: Schema of every batch sent; decided at call time.
        state: The state whose ``process`` serves each turn.
        input_schema: Schema of the client's batches; empty for a producer.
        header: Sent once, before the data, when the method declares one.
        call_state: The part of the state that never changes (see `StreamState`).
    """

    output_schema: pa.Schema
    state: _S
    input_schema: pa.Schema = EMPTY_SCHEMA
    header: _H | None = None
    call_state: Any = None

    if not typing.TYPE_CHECKING:

        def __class_getitem__(cls, parameters: Any) -> Any:
            return super().__class_getitem__(parameters if isinstance(parameters, tuple) else (parameters, type(None)))

    @property
    def is_producer(self) -> bool:
        """Whether turns run on ticks: nothing comes in, and the state is not an exchange's."""
        return not len(self.input_schema) and not isinstance(self.state, ExchangeState)

    def _client_side(self, *_: Any) -> Any:
        raise TypeError("a Stream is what a method returns; iterate or exchange on the session that a proxy returns")

    def __iter__(self) -> Iterator[AnnotatedBatch]:
        """See `StreamSession.__iter__`."""
        return cast("Iterator[AnnotatedBatch]", self._client_side())

    def __enter__(self) -> Stream[_S, _H]:
        """See `StreamSession`."""
        return cast("Stream[_S, _H]", self._client_side())

    def __exit__(self, *exc: object) -> None:
        """See `StreamSession`."""

    def exchange(self, input: AnnotatedBatch) -> AnnotatedBatch:
        """See `StreamSession.exchange`."""
        return cast("AnnotatedBatch", self._client_side())

    def tick(self, custom_metadata: pa.KeyValueMetadata | None = None) -> AnnotatedBatch:
        """See `StreamSession.tick`."""
        return cast("AnnotatedBatch", self._client_side())

    def typed_header(self, header_type: type[_T]) -> _T:
        """See `StreamSession.typed_header`."""
        return cast("_T", self._client_side())

    def close(self) -> None:
        """See `StreamSession.close`."""
        self._client_side()

    def cancel(self) -> None:
        """See `StreamSession.cancel`."""
        self._client_side()


# ============================================================================
# 7. METHODS ............................................ uses 1-6
# ============================================================================
# A Protocol class read once: every method with its schemas and codecs, and an implementation checked against it.
# Law: whatever is wrong with a service is said when it is built, all of it in one error.


class MethodType(enum.Enum):
    """Whether a method returns a value or a stream."""

    UNARY = "unary"
    STREAM = "stream"


@dataclass(frozen=True)
class RpcMethodInfo:
    """One method of a Protocol.

    Attributes:
        name: Its name.
        params_schema: 1 row x len(parameters) columns.
        result_schema: 1 row x 1 column ``result``; empty for ``-> None`` and for streams.
        result_type: The return annotation.
        method_type: Unary or stream.
        has_return: Whether a unary method returns something.
        doc: Its docstring.
        param_defaults: Defaults by parameter.
        param_types: Annotations by parameter.
        param_docs: The ``Args:`` of the docstring, by parameter.
        header_type: Dataclass of the stream's header.
        is_exchange: ``True`` or ``False`` where the annotation tells, else ``None``.
        protocol_name: The protocol's routing name.
        params: Codecs of the parameters.
        result: Codec of the result row.
        header: Codec of the header.
        idempotency: ``unknown``, ``idempotent`` or ``no_side_effects``.
        deprecation: ``None``, or why the method should not be used any more.
    """

    name: str
    params_schema: pa.Schema
    result_schema: pa.Schema
    result_type: Any
    method_type: MethodType
    has_return: bool
    doc: str | None
    param_defaults: dict[str, Any] = field(default_factory=dict)
    param_types: dict[str, Any] = field(default_factory=dict)
    param_docs: dict[str, str] = field(default_factory=dict)
    header_type: type | None = None
    is_exchange: bool | None = None
    protocol_name: str = ""
    params: RowCodec = field(default_factory=lambda: RowCodec(()), repr=False)
    result: RowCodec = field(default_factory=lambda: RowCodec(()), repr=False)
    header: DataclassCodec | None = field(default=None, repr=False)
    idempotency: str = "unknown"
    deprecation: str | None = None

    @property
    def kind(self) -> str:
        """One word for people: ``unary``, ``producer``, ``exchange`` or ``stream`` (where the annotation does not tell)."""
        if self.method_type is MethodType.UNARY:
            return "unary"
        return {True: "exchange", False: "producer", None: "stream"}[self.is_exchange]

    def signature(self) -> str:
        """Return the Python signature without ``self``, as a person would write it."""
        parts = []
        for name, annotation in self.param_types.items():
            default = f" = {self.param_defaults[name]!r}" if name in self.param_defaults else ""
            parts.append(f"{name}: {_annotation_text(annotation)}{default}")
        result = "None" if self.result_type in (None, type(None)) else _annotation_text(self.result_type)
        return f"{self.name}({', '.join(parts)}) -> {result.replace('vgi_rpc.', '').replace(', NoneType]', ']')}"


_Function = TypeVar("_Function", bound=Callable[..., Any])


def idempotent(function: _Function) -> _Function:
    """Mark a Protocol's method: calling it twice has the effect of calling it once. Shown by reflection."""
    function.__vgi_idempotency__ = "idempotent"  # type: ignore[attr-defined]
    return function


def no_side_effects(function: _Function) -> _Function:
    """Mark a Protocol's method: it changes nothing. Shown by reflection."""
    function.__vgi_idempotency__ = "no_side_effects"  # type: ignore[attr-defined]
    return function


def deprecated(message: str) -> Callable[[_Function], _Function]:
    """Mark a Protocol's method as one not to use any more; *message* says what to use instead. Shown by reflection."""

    def mark(function: _Function) -> _Function:
        function.__vgi_deprecated__ = message  # type: ignore[attr-defined]
        return function

    return mark


def protocol_name_of(protocol: type) -> str:
    """Return the routing name: the class's own ``protocol_name``, else the class name.

    Raises:
        ValueError: It does not match the grammar of WIRE section 1.
    """
    name = vars(protocol).get("protocol_name", protocol.__name__)
    if not isinstance(name, str) or not PROTOCOL_NAME_PATTERN.fullmatch(name):
        raise ValueError(f"protocol name {name!r}: expected letters, digits, '_' and '.', not beginning with a digit")
    return name


def _parse_version(text: str) -> tuple[int, int] | None:
    """``MAJOR.MINOR.PATCH`` -> (major, minor); ``None`` for anything else."""
    match = re.fullmatch(r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})", text)
    return (int(match[1]), int(match[2])) if match else None


def _public_functions(cls: type) -> dict[str, Any]:
    """Public methods of a class by name; those of object, Protocol and Generic are nobody's service."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__ not in ("builtins", "typing", "typing_extensions", "abc"):
            found.update({n: f for n, f in vars(base).items() if not n.startswith("_") and inspect.isfunction(f)})
    found.pop("on_serve_start", None)
    return found


def _is_context(name: str, annotation: Any) -> bool:
    return _split_optional(annotation)[0] is CallContext or (name == "ctx" and annotation is inspect.Parameter.empty)


def _doc_arguments(doc: str | None) -> dict[str, str]:
    """The ``Args:`` block of a Google docstring, by parameter."""
    match = re.search(r"^ *Args:\n((?:(?: +\S.*)?(?:\n|$))+)", inspect.cleandoc(doc or ""), re.M)
    found: dict[str, str] = {}
    current = ""
    for line in match[1].splitlines() if match else ():
        entry = re.match(r" {2,8}(\w+)(?: *\([^)]*\))?: *(.*)", line)
        if entry:
            current = entry[1]
            found[current] = entry[2]
        elif current and line.strip():
            found[current] += " " + line.strip()
    return found


def _stream_parts(annotation: Any) -> tuple[Any, type | None] | None:
    """``Stream[S, H]`` -> (S, H or None); ``None`` when the annotation is not a stream."""
    if annotation is Stream:
        return StreamState, None
    if typing.get_origin(annotation) is not Stream:
        return None
    state, header = typing.get_args(annotation)
    return state, (None if header in (None, type(None)) else header)


def _is_exchange(state: Any) -> bool | None:
    for base, answer in ((ExchangeState, True), (ProducerState, False)):
        if isinstance(state, type) and issubclass(state, base):
            return answer
    return None


def _method_info(protocol: str, name: str, function: Any) -> RpcMethodInfo:
    hints = _hints(function)
    types_: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    codecs = []
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        annotation = hints.get(parameter.name, inspect.Parameter.empty)
        if _is_context(parameter.name, annotation):
            continue
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"{name}() parameter {parameter}: expected a named parameter, got {parameter.kind.description}")
        if annotation is inspect.Parameter.empty:
            raise TypeError(f"{name}() parameter {parameter.name!r} has no annotation; the Arrow type comes from it")
        try:
            codecs.append((parameter.name, codec_for(annotation, whole=True)))
        except TypeError as exc:
            raise TypeError(f"{name}() parameter {parameter.name!r}: {exc}") from None
        types_[parameter.name] = annotation
        if parameter.default is not parameter.empty:
            defaults[parameter.name] = parameter.default
    if "return" not in hints:
        raise TypeError(f"{name}() has no return annotation; write '-> None' if it returns nothing")
    doc = inspect.getdoc(function)
    facts: dict[str, Any] = {
        "name": name,
        "result_type": hints["return"],
        "doc": doc,
        "param_defaults": defaults,
        "param_types": types_,
        "param_docs": _doc_arguments(doc),
        "protocol_name": protocol,
        "params": RowCodec(codecs),
        "idempotency": getattr(function, "__vgi_idempotency__", "unknown"),
        "deprecation": getattr(function, "__vgi_deprecated__", None),
    }
    try:
        facts.update(_result_facts(hints["return"]))
    except TypeError as exc:
        raise TypeError(f"{name}() result: {exc}") from None
    return RpcMethodInfo(params_schema=facts["params"].schema, **facts)


def _result_facts(annotation: Any) -> dict[str, Any]:
    """The fields of `RpcMethodInfo` that the return annotation decides."""
    stream = _stream_parts(annotation)
    if stream:
        state, header = stream
        return {
            "method_type": MethodType.STREAM,
            "has_return": False,
            "result_schema": EMPTY_SCHEMA,
            "header_type": header,
            "header": dataclass_codec(header) if header else None,
            "is_exchange": _is_exchange(state),
        }
    has_return = annotation not in (None, type(None))
    result = RowCodec([("result", codec_for(annotation, whole=True))] if has_return else ())
    return {"method_type": MethodType.UNARY, "has_return": has_return, "result": result, "result_schema": result.schema}


@functools.lru_cache(maxsize=256)
def rpc_methods(protocol: type) -> Mapping[str, RpcMethodInfo]:
    """Return the methods of a Protocol class, or of a plain class that serves as its own, by name.

    Raises:
        TypeError: Annotations that are missing or have no Arrow type; one error names them all.
    """
    protocol_name = protocol_name_of(protocol)
    infos, problems = {}, []
    for name, function in _public_functions(protocol).items():
        try:
            infos[name] = _method_info(protocol_name, name, function)
        except TypeError as exc:
            problems.append(f"{protocol.__qualname__}.{exc}")
    _raise_problems(f"{protocol.__qualname__} cannot be served", problems)
    return types.MappingProxyType(infos)


def _raise_problems(what: str, problems: list[str]) -> None:
    if problems:
        raise TypeError(f"{what}: " + (problems[0] if len(problems) == 1 else "\n  - ".join(["", *problems])))


def describe_rpc(protocol: type, *, methods: Mapping[str, RpcMethodInfo] | None = None) -> str:
    """Return a text for people: the protocol's methods with their signatures, schemas and docstrings."""
    infos = methods if methods is not None else rpc_methods(protocol)
    lines = [f"{protocol_name_of(protocol)}: {len(infos)} methods"]
    for info in infos.values():
        lines += ["", f"  {info.signature()}    [{info.kind}]", f"    parameters: {_schema_text(info.params_schema)}"]
        if info.has_return:
            lines.append(f"    result: {_schema_text(info.result_schema)}")
        if info.header is not None:
            lines.append(f"    header: {_schema_text(info.header.row.schema)}")
        lines += [f"    {line}".rstrip() for line in (info.doc or "").splitlines()]
    return "\n".join(lines)


class BoundMethod(NamedTuple):
    """A method of a hosted protocol with the function that serves it."""

    info: RpcMethodInfo
    hosted: HostedService
    function: Callable[..., Any]
    context_parameter: str | None
    state_types: tuple[type, ...]


@dataclass
class HostedService:
    """One protocol on a server.

    Attributes:
        name: Routing name.
        protocol: The Protocol class.
        version: ``MAJOR.MINOR.PATCH``, empty when the protocol declares none.
        implementation: The object that serves it.
        methods: Its methods by name.
        hash: The family's protocol hash (hex SHA-256), filled in by the server.
    """

    name: str
    protocol: type
    version: str
    implementation: Any
    methods: dict[str, BoundMethod]
    hash: str = ""


def bind_implementation(protocol: type, implementation: Any) -> HostedService:
    """Check *implementation* against *protocol* and bind its methods.

    Raises:
        TypeError: Whatever is missing or does not agree, all of it in one error.
    """
    name = protocol_name_of(protocol)
    version = getattr(protocol, "protocol_version", "") or ""
    if version and _parse_version(version) is None:
        raise ValueError(f"{name}.protocol_version: expected MAJOR.MINOR.PATCH, got {version!r}")
    if isinstance(implementation, type):
        raise TypeError(f"expected an instance of {implementation.__qualname__}, got the class; write {implementation.__qualname__}()")
    service = HostedService(name, protocol, version, implementation, {})
    problems: list[str] = []
    for info in rpc_methods(protocol).values():
        try:
            service.methods[info.name] = _bind_method(info, service)
        except TypeError as exc:
            problems.append(str(exc))
    _raise_problems(f"{type(implementation).__qualname__} does not implement {name}", problems)
    return service


def _bind_method(info: RpcMethodInfo, service: HostedService) -> BoundMethod:
    function = getattr(service.implementation, info.name, None)
    if not callable(function):
        raise TypeError(f"{info.name}() is missing" if function is None else f"{info.name} is not callable")
    parameters = inspect.signature(function).parameters
    try:
        hints = _hints(getattr(function, "__func__", function))
    except TypeError:
        hints = {}  # an implementation may annotate for its own eyes; the Protocol's annotations decide
    context = next((n for n in parameters if _is_context(n, hints.get(n, parameters[n].annotation)) or n == "ctx"), None)
    catch_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    problems = []
    for name in info.param_types:
        if name not in parameters and not catch_all:
            problems.append(f"takes no parameter {name!r}{_suggest(name, parameters)}")
    for name, parameter in parameters.items():
        if name in info.param_types or name == context or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.default is parameter.empty:
            problems.append(f"requires {name!r}, which the protocol does not have")
    state_types = _state_types(info, hints.get("return"), problems)
    if problems:
        raise TypeError("; ".join(f"{info.name}() {p}" for p in problems))
    return BoundMethod(info, service, function, context, state_types)


def _state_types(info: RpcMethodInfo, returned: Any, problems: list[str]) -> tuple[type, ...]:
    """The concrete state classes that the implementation's annotation names; their fields are checked here."""
    stream = _stream_parts(returned) if returned is not None else _stream_parts(info.result_type)
    if (stream is not None) != (info.method_type is MethodType.STREAM):
        if returned is not None:
            problems.append(f"returns {_annotation_text(returned)}, the protocol says {_annotation_text(info.result_type)}")
        return ()
    if stream is None:
        return ()
    state, _ = stream
    found = []
    for cls in typing.get_args(state) if typing.get_origin(state) in (Union, types.UnionType) else (state,):
        if not (isinstance(cls, type) and issubclass(cls, StreamState)):
            problems.append(f"returns a Stream of {_annotation_text(cls)}, expected a StreamState")
        elif cls not in (StreamState, ProducerState, ExchangeState):
            try:
                dataclass_codec(cls)
                if cls.CALL_STATE_TYPE is not None:
                    dataclass_codec(cls.CALL_STATE_TYPE)
                found.append(cls)
            except TypeError as exc:
                problems.append(f"has a state that cannot be serialised: {exc}")
    return tuple(found)


# ============================================================================
# 8. REQUESTS AND REPLIES ............................... uses 1-7
# ============================================================================
# A call's arguments to a request stream and back, a result to its batch and back (WIRE sections 1 and 3).
# Law: a request's schema equals the method's, name for name and type for type, before a single value is decoded.


def bind_arguments(info: RpcMethodInfo, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return one value per parameter, in order, defaults filled in.

    Raises:
        TypeError: An argument is missing, unknown, given twice, or one too many.
    """
    names = info.params.names
    if len(args) > len(names):
        raise ParameterError(f"{info.name}() takes {len(names)} arguments {list(names)}, got {len(args)}")
    values = list(args)
    used = len(args)
    for name in names[len(args) :]:
        if name in kwargs:
            values.append(kwargs[name])
            used += 1
        elif name in info.param_defaults:
            values.append(info.param_defaults[name])
        else:
            raise ParameterError(f"{info.name}() is missing argument {name!r}; signature: {info.signature()}")
    if used < len(args) + len(kwargs):
        for name in kwargs:
            if name not in names:
                raise ParameterError(f"{info.name}() has no parameter {name!r}{_suggest(name, names)}; it has {list(names)}")
            if name in names[: len(args)]:
                raise ParameterError(f"{info.name}() got {name!r} twice, by position and by name")
    return values


def request_batch(info: RpcMethodInfo, values: Sequence[Any]) -> pa.RecordBatch:
    """Encode the arguments: 1 row x len(parameters) columns.

    Raises:
        TypeError: A value of the wrong type; the text gives the parameter and the path inside it.
    """
    if not info.params.names:
        return _TICK
    try:
        return info.params.to_batch(values)
    except _Mismatch as exc:
        exc.path = exc.path[1:]
        raise exc.error(f"{info.name}() argument ") from None


def request_metadata(info: RpcMethodInfo, version: str, request_id: str, timeout: float | None) -> dict[bytes, bytes]:
    """The metadata of a request (WIRE section 1); *timeout* in seconds."""
    metadata = {
        METHOD_KEY: info.name.encode(),
        REQUEST_VERSION_KEY: REQUEST_VERSION,
        PROTOCOL_KEY: info.protocol_name.encode(),
        REQUEST_ID_KEY: request_id.encode(),
    }
    if version:
        metadata[PROTOCOL_VERSION_KEY] = version.encode()
    if timeout is not None:
        metadata[TIMEOUT_KEY] = str(max(1, int(timeout * 1000))).encode()
    return metadata


class Request:
    """One request as it came: metadata read, schema known, values not decoded yet.

    Attributes:
        schema: Its schema.
        metadata: Custom metadata of its batch.
        rows: Rows of its batch.
    """

    def __init__(self, reader: IpcReader) -> None:
        self._reader = reader
        self.schema = reader.schema
        message = reader.next_message()
        if message is None:
            raise IPCError("request: expected one batch, got a schema and no batch")
        self._message = message
        self.rows = message.head.rows
        self.metadata: dict[bytes, bytes] = message.head.metadata or {}
        extra = 0
        while reader.next_message() is not None:
            extra += 1
        if extra:
            raise ProtocolError(f"request: expected exactly one batch, got {extra + 1}")

    def text(self, key: bytes, what: str) -> str | None:
        """Return a metadata value as text, ``None`` when absent."""
        value = self.metadata.get(key)
        try:
            return None if value is None else value.decode("utf-8")
        except UnicodeDecodeError:
            raise ProtocolError(f"request: {what} ({key.decode()}) is not UTF-8: {value!r:.60}") from None

    @property
    def request_id(self) -> str:
        """The client's request id if it is printable ASCII of at most 128 characters, else empty."""
        return clean_request_id(self.metadata.get(REQUEST_ID_KEY, b"").decode("latin-1"))

    @property
    def timeout(self) -> float | None:
        """Seconds until the client stops waiting, ``None`` for no limit."""
        value = self.metadata.get(TIMEOUT_KEY, b"")
        return int(value) / 1000 if value.isdigit() and len(value) < 16 else None

    def batch(self) -> pa.RecordBatch:
        """Decode the batch, fully validated as the reader was told."""
        return self._reader.decode(self._message)


def clean_request_id(text: str | None) -> str:
    """Return *text* if it may be echoed and logged (1 to 128 visible ASCII characters), else an empty string."""
    if text and len(text) <= MAX_REQUEST_ID_CHARS and text.isascii() and text.isprintable() and " " not in text:
        return text
    return ""


def new_request_id() -> str:
    """Return 16 random hex characters."""
    return os.urandom(8).hex()


def read_arguments(info: RpcMethodInfo, request: Request) -> dict[str, Any]:
    """Check a request against the method and decode its parameters.

    Raises:
        ProtocolError: Not exactly one row.
        ParameterError: A parameter missing, extra, in another order, of another type or nullability, or null.
    """
    wanted, got = info.params_schema, request.schema
    if not got.equals(wanted):
        _refuse_schema(info, wanted, got)
    if not len(wanted):
        return {}
    if request.rows != 1:
        raise ProtocolError(f"{info.name}(): expected exactly 1 row of {_schema_text(wanted)}, got {request.rows} rows")
    try:
        return dict(zip(info.params.names, info.params.from_batch(request.batch())))
    except _Mismatch as exc:
        exc.path = exc.path[1:]
        raise exc.error(f"{info.name}() parameter ") from None


def _refuse_schema(info: RpcMethodInfo, wanted: pa.Schema, got: pa.Schema) -> None:
    """Raise for the first way in which a request's schema is not the method's."""
    where = f"{info.name}(): expected {_schema_text(wanted)}, got {_schema_text(got)[:2000]}"
    extra = [n for n in got.names if n not in wanted.names]
    if extra:
        raise ParameterError(f"{where}: no parameter {', '.join(map(repr, extra[:8]))}{_suggest(extra[0], wanted.names)}")
    missing = [n for n in wanted.names if n not in got.names]
    if missing:
        raise ParameterError(f"{where}: missing {', '.join(map(repr, missing))}")
    if got.names != wanted.names:
        raise ParameterError(f"{where}: the order of the parameters differs, or one stands twice")
    for g, w in zip(got, wanted):
        if not g.type.equals(w.type) or g.nullable != w.nullable:
            expected = f"{w.type}{'' if w.nullable else ' not null'}"
            raise ParameterError(f"{where}: parameter {w.name!r}: expected {expected}, got {g.type}{'' if g.nullable else ' not null'}")


def result_batch(info: RpcMethodInfo, value: Any) -> pa.RecordBatch:
    """Encode a unary result: 1 row x 1 column, or 0 x 0 for ``-> None``.

    Raises:
        TypeError: The method returned something else than it declares.
    """
    if not info.has_return:
        if value is not None:
            raise ParameterError(f"{info.name}() result: declared to return None, got {_got(value)}")
        return _TICK
    try:
        return info.result.to_batch([value])
    except _Mismatch as exc:
        exc.path = exc.path.removeprefix(".result")
        raise exc.error(f"{info.name}() result") from None


def read_result(info: RpcMethodInfo, batch: pa.RecordBatch) -> Any:
    """Decode a unary result.

    Raises:
        ParameterError: Not what the method declares; client and server disagree.
    """
    if not info.has_return:
        return None
    if batch.num_rows != 1 or batch.schema.names != ["result"]:
        got = f"{batch.num_rows} rows of {_schema_text(batch.schema)}"
        raise ParameterError(f"{info.name}() result: expected 1 row of {_schema_text(info.result_schema)}, got {got}")
    try:
        return info.result.from_batch(batch)[0]
    except _Mismatch as exc:
        exc.path = exc.path.removeprefix(".result")
        raise exc.error(f"{info.name}() result") from None


# ============================================================================
# 9. INTROSPECTION ...................................... uses 1-8
# ============================================================================
# What a server says of itself (WIRE section 7): the reflection protocol, its dataclasses, the protocol hash.
# Field names, their order and the tokens of the hash are the family's; a change here is a change of the wire.


@dataclass(frozen=True)
class ProtocolSummary(ArrowSerializableDataclass):
    """One hosted protocol, as `list_protocols` lists it."""

    protocol: str
    protocol_version: str
    protocol_hash: str
    deprecated: bool = False
    deprecation_message: str = ""
    features: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ProtocolList(ArrowSerializableDataclass):
    """Answer of ``Reflection.list_protocols``."""

    server_id: str
    server_version: str
    request_version: str
    protocols: list[ProtocolSummary]


@dataclass(frozen=True)
class MethodSummary(ArrowSerializableDataclass):
    """One method, as ``Reflection.describe`` describes it; schemas are serialised, empty where there is none."""

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


@dataclass(frozen=True)
class ProtocolDescription(ArrowSerializableDataclass):
    """Answer of ``Reflection.describe``."""

    protocol: str
    protocol_version: str
    protocol_hash: str
    deprecated: bool = False
    deprecation_message: str = ""
    features: list[str] = field(default_factory=list)
    methods: list[MethodSummary] = field(default_factory=list)


class Reflection(Protocol):
    """The protocol that every server hosts beside the application's."""

    protocol_name: ClassVar[str] = REFLECTION_PROTOCOL

    def list_protocols(self) -> ProtocolList:
        """List the hosted protocols, the application's first, in the order of registration."""

    def describe(self, protocol: str) -> ProtocolDescription:
        """Describe one protocol and its methods, sorted by name."""


_TYPE_TOKENS = {  # Arrow's own names, where Python's spelling of them differs
    pa.string(): "utf8",
    pa.large_string(): "large_utf8",
    pa.float16(): "float16",
    pa.float32(): "float32",
    pa.float64(): "float64",
    pa.date32(): "date32",
    pa.date64(): "date64",
    pa.bool_(): "bool",
}


def _type_token(kind: pa.DataType) -> str:
    """The spelling of a type in the protocol hash; raises `TypeError` for a type that has none."""
    if isinstance(kind, pa.BaseExtensionType):
        return f"extension({kind.extension_name})<{_type_token(kind.storage_type)}>"
    if kind in _TYPE_TOKENS:
        return _TYPE_TOKENS[kind]
    t = pa.types
    if t.is_timestamp(kind):
        return f"timestamp({kind.unit}{',tz=' + kind.tz if kind.tz else ''})"
    if t.is_time(kind) or t.is_duration(kind):
        return f"{'duration' if t.is_duration(kind) else f'time{kind.bit_width}'}({kind.unit})"
    if t.is_decimal(kind):
        return f"decimal{kind.bit_width}({kind.precision},{kind.scale})"
    if t.is_fixed_size_binary(kind):
        return f"fixed_size_binary({kind.byte_width})"
    if t.is_dictionary(kind):
        ordered = ",ordered" if kind.ordered else ""
        return f"dictionary<index:{_type_token(kind.index_type)},value:{_type_token(kind.value_type)}{ordered}>"
    if t.is_map(kind):
        sorted_ = ",keys_sorted" if kind.keys_sorted else ""
        return f"map<key:{_type_token(kind.key_type)},{_child_token('value', kind.item_field)}{sorted_}>"
    if t.is_struct(kind):
        return f"struct<{','.join(_child_token(kind.field(i).name, kind.field(i)) for i in range(kind.num_fields))}>"
    if t.is_fixed_size_list(kind):
        return f"fixed_size_list({kind.list_size})<{_child_token('item', kind.value_field)}>"
    if t.is_list(kind) or t.is_large_list(kind):
        return f"{'large_' if t.is_large_list(kind) else ''}list<{_child_token('item', kind.value_field)}>"
    if t.is_integer(kind) or t.is_binary(kind) or t.is_large_binary(kind) or t.is_null(kind):
        return str(kind)
    raise TypeError(f"the protocol hash has no token for {kind}")


def _child_token(name: str, child: pa.Field) -> str:
    return f"{name}{'?' if child.nullable else ''}:{_type_token(child.type)}"


def protocol_hash(protocol: str, infos: Iterable[RpcMethodInfo]) -> str:
    """Return the family's fingerprint of a protocol: hex SHA-256 over its methods' names and schemas (WIRE section 7).

    Raises:
        TypeError: A type without a token.
    """

    def fields(schema: pa.Schema) -> list[dict[str, Any]]:
        return [{"name": f.name, "nullable": f.nullable, "type": _type_token(f.type)} for f in schema]

    methods = []
    for info in sorted(infos, key=lambda i: i.name):
        facts: dict[str, Any] = {
            "name": info.name,
            "type": info.method_type.value,
            "has_return": info.has_return,
            "has_header": info.header is not None,
            "params": fields(info.params_schema),
        }
        if info.has_return:
            facts["result"] = fields(info.result_schema)
        if info.header is not None:
            facts["header"] = fields(info.header.row.schema)
        methods.append(facts)
    text = json.dumps({"protocol": protocol, "methods": methods}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(b"vgi_rpc.protocol_hash.v1|" + text.encode()).hexdigest()


def _serialized(schema: pa.Schema | None) -> bytes:
    return b"" if schema is None else schema.serialize().to_pybytes()


def describe_service(service: HostedService) -> ProtocolDescription:
    """Return the reflection answer for one hosted protocol."""
    methods = []
    for _, info in sorted((m.info.name, m.info) for m in service.methods.values()):
        bound = service.methods[info.name]
        kinds = {_is_exchange(s) for s in bound.state_types} or {info.is_exchange}
        exchange = kinds.pop() if len(kinds) == 1 else None
        stream = {True: "exchange", False: "producer", None: "unknown"}[exchange]
        methods.append(
            MethodSummary(
                name=info.name,
                method_type=info.method_type.value,
                has_return=info.has_return,
                has_header=info.header is not None,
                stream_kind=stream if info.method_type is MethodType.STREAM else "",
                params_schema_ipc=_serialized(info.params_schema),
                result_schema_ipc=_serialized(info.result_schema if info.has_return else None),
                header_schema_ipc=_serialized(info.header.row.schema if info.header else None),
                idempotency=info.idempotency,
                deprecated=info.deprecation is not None,
                deprecation_message=info.deprecation or "",
            )
        )
    return ProtocolDescription(service.name, service.version, service.hash, methods=methods)


@dataclass(frozen=True)
class MethodDescription:
    """One method of a server, as a client learns of it.

    Attributes:
        name: Its name.
        method_type: Unary or stream.
        has_return: Whether a unary method returns something.
        params_schema: 1 row x len(parameters) columns.
        result_schema: 1 row x 1 column, or empty.
        has_header: Whether its stream sends a header.
        header_schema: Schema of the header, ``None`` without one.
        is_exchange: ``None`` where the server does not say.
        idempotency: ``unknown``, ``idempotent`` or ``no_side_effects``.
        deprecation: ``None``, or why not to use it.
    """

    name: str
    method_type: MethodType
    has_return: bool
    params_schema: pa.Schema
    result_schema: pa.Schema
    has_header: bool = False
    header_schema: pa.Schema | None = None
    is_exchange: bool | None = None
    idempotency: str = "unknown"
    deprecation: str | None = None


@dataclass(frozen=True)
class ServiceDescription:
    """One protocol of a server, as a client learns of it.

    Attributes:
        protocol_name: Routing name.
        request_version: Wire version.
        describe_version: Version of the reflection answer.
        protocol_hash: The family's fingerprint.
        server_id: 12 hex characters.
        methods: Methods by name.
        protocol_version: ``MAJOR.MINOR.PATCH``, empty when it declares none.
    """

    protocol_name: str
    request_version: str
    describe_version: str
    protocol_hash: str
    server_id: str
    methods: Mapping[str, MethodDescription]
    protocol_version: str = ""


def _service_description(listed: ProtocolList, described: ProtocolDescription) -> ServiceDescription:
    methods = {}
    for m in described.methods:
        kinds = {"exchange": True, "producer": False}
        methods[m.name] = MethodDescription(
            name=m.name,
            method_type=MethodType.STREAM if m.method_type == "stream" else MethodType.UNARY,
            has_return=m.has_return,
            params_schema=_schema_from_bytes(m.params_schema_ipc),
            result_schema=_schema_from_bytes(m.result_schema_ipc),
            has_header=m.has_header,
            header_schema=_schema_from_bytes(m.header_schema_ipc) if m.has_header else None,
            is_exchange=kinds.get(m.stream_kind),
            idempotency=m.idempotency,
            deprecation=m.deprecation_message if m.deprecated else None,
        )
    return ServiceDescription(
        described.protocol,
        listed.request_version,
        DESCRIBE_VERSION,
        described.protocol_hash,
        listed.server_id,
        types.MappingProxyType(methods),
        described.protocol_version,
    )


# ============================================================================
# 10. TOKENS ............................................ uses 1-9
# ============================================================================
# Seals a stream's state so that only this service's own can come back (WIRE section 6). HMAC-SHA256 over half, binding,
# time and content; signed, not encrypted: a client can read what is inside.
# Law: nothing of a token is looked at before its seal was found good; every fault of a seal has the same answer.

_TOKEN_REFUSED = "state token refused: not issued by this service for this call; start the stream again"
_MAC_BYTES = 32
_STORED, _ZLIB, _ZSTD = 0, 1, 2
_COMPRESS_FROM_BYTES = 1_024
_MAX_STATE_BYTES = 1 << 28  # decoded state in one token: 256 MiB


@functools.lru_cache(maxsize=None)
def _zstd_available() -> bool:
    return bool(pa.Codec.is_available("zstd"))


def zstd_compress(data: _Buffer, level: int = 1) -> bytes:
    """Compress with pyarrow's own zstd codec."""
    return cast("bytes", pa.Codec("zstd", compression_level=level).compress(data, asbytes=True))


def zstd_decompress(data: _Buffer, limit: int) -> bytes:
    """Decompress at most *limit* bytes.

    Raises:
        RequestTooLargeError: More than *limit* would come out; nothing beyond it was decoded.
        IPCError: Not zstd, or cut off.
    """
    pieces, left = [], limit + 1
    try:
        with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as stream:
            while left > 0:
                piece = stream.read(min(left, 1 << 20))
                if not piece:
                    break
                pieces.append(piece)
                left -= len(piece)
    except _ARROW_FAILURES as exc:
        raise IPCError(f"zstd: {_text_of(exc)}") from None
    if left <= 0:
        raise RequestTooLargeError(f"zstd: expected at most {limit} decoded bytes, got more")
    if not pieces and len(data):
        raise IPCError("zstd: nothing to decode in it")
    return b"".join(pieces)


def gzip_decompress(data: _Buffer, limit: int, window: int = 31) -> bytes:
    """Decompress at most *limit* bytes of gzip (or zlib, with *window* 15); raises as `zstd_decompress`."""
    decoder = zlib.decompressobj(window)
    try:
        out = decoder.decompress(data, limit + 1)
    except zlib.error as exc:
        raise IPCError(f"gzip: {exc}") from None
    if len(out) > limit:
        raise RequestTooLargeError(f"gzip: expected at most {limit} decoded bytes, got more")
    if not decoder.eof or decoder.unused_data:
        raise IPCError("gzip: cut off" if not decoder.eof else "gzip: trailing bytes")
    return out


class TokenSealer:
    """Seals and opens state tokens. Safe for use by several threads.

    Args:
        keys: At least one key of 16 bytes or more; the first signs, all verify.
        ttl: How old a token may be, in seconds; 0 for any age.
        clock: Gives seconds since the epoch; passed in so that tests can turn it.

    Raises:
        ValueError: No key, or one that is too short.
    """

    def __init__(self, keys: Sequence[bytes], ttl: float = TOKEN_TTL_SECONDS, clock: Callable[[], float] = time.time) -> None:
        if not keys or any(len(k) < 16 for k in keys):
            raise ValueError(f"token key: expected at least 16 bytes, got {[len(k) for k in keys] or 'none'}")
        self._keys = [bytes(k) for k in keys]
        self.ttl = ttl
        self._clock = clock

    @staticmethod
    def _mac(key: bytes, half: bytes, binding: Sequence[bytes], sealed: bytes) -> bytes:
        # Every part is preceded by its length, so that no two bindings give the same bytes.
        mac = hmac.new(key, b"vgi_rpc.token.v1", hashlib.sha256)
        for part in (half, *binding):
            mac.update(struct.pack("<I", len(part)) + part)
        mac.update(sealed)
        return mac.digest()

    def seal(self, half: bytes, binding: Sequence[bytes], content: bytes) -> bytes:
        """Return *content* as a token (base64), bound to *half* and *binding*."""
        method = _STORED
        if len(content) >= _COMPRESS_FROM_BYTES:
            packed = zstd_compress(content) if _zstd_available() else zlib.compress(content, 1)
            if len(packed) < len(content):
                method, content = (_ZSTD if _zstd_available() else _ZLIB), packed
        sealed = struct.pack("<BBQ", 1, method, int(self._clock() * 1000)) + content
        return base64.b64encode(sealed + self._mac(self._keys[0], half, binding, sealed))

    def open(self, half: bytes, binding: Sequence[bytes], token: bytes | None, *, aged: bool = True) -> bytes:
        """Return the content of a token sealed for the same *half* and *binding*.

        Args:
            half: Which half of the state this is.
            binding: What it must be bound to.
            token: As it came.
            aged: Whether `ttl` applies.

        Raises:
            TokenError: Anything wrong with the seal, in one uniform text; or, the seal being good, too old or from the future.
        """
        try:
            raw = base64.b64decode(token or b"", validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        sealed, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
        good = False
        for key in self._keys:  # all keys, always: the time taken does not tell which one fits
            good |= hmac.compare_digest(self._mac(key, half, binding, sealed), mac)
        # Base64 has spare bits at its end; only the spelling that we would write is ours.
        if not good or len(sealed) < 10 or base64.b64encode(raw) != token:
            raise TokenError(_TOKEN_REFUSED)
        version, method, issued = struct.unpack_from("<BBQ", sealed)
        age = self._clock() - issued / 1000
        if version != 1 or age < -TOKEN_CLOCK_SKEW_SECONDS:
            raise TokenError("state token refused: issued in the future; check the servers' clocks" if version == 1 else _TOKEN_REFUSED)
        if aged and self.ttl and age > self.ttl:
            raise TokenError(f"token expired: {age:.0f} s old, at most {self.ttl:g} s are allowed; start the stream again")
        if method == _STORED:
            return sealed[10:]
        if method == _ZSTD:
            return zstd_decompress(sealed[10:], _MAX_STATE_BYTES)
        return gzip_decompress(sealed[10:], _MAX_STATE_BYTES, 15)


def pack_parts(parts: Sequence[bytes]) -> bytes:
    """Join byte strings so that `unpack_parts` gets them back."""
    return b"".join(struct.pack("<I", len(p)) + p for p in parts)


def unpack_parts(data: bytes, count: int) -> list[bytes]:
    """Split what `pack_parts` joined; the data comes out of a seal, so a fault in it is our own.

    Raises:
        TokenError: Another number of parts: written by another version of this file.
    """
    parts, at = [], 0
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, at)
        parts.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    if len(parts) != count or at != len(data):
        raise TokenError(_TOKEN_REFUSED)
    return parts


# ============================================================================
# 11. SERVER CORE ....................................... uses 1-10
# ============================================================================
# resolve -> begin -> turn -> end, for every transport: no socket, no thread, no file. A byte stream and an HTTP handler are
# thin shells around a `Call`. The rules of a turn (one data batch, logs before data, finish, the error batch, cancel)
# stand in Call and nowhere else. Law: a turn never raises the method's exception, it returns it.


@dataclass
class CallRecord:
    """The facts of one call, or of one HTTP request of a stream: what hooks and the access log see.

    Attributes:
        protocol: Routing name.
        protocol_hash: Its fingerprint.
        method: Method name.
        method_type: ``unary`` or ``stream``.
        request_id: Id of the request.
        kind: Transport.
        auth: Who calls.
        remote_addr: Peer address, empty for pipes.
        transport_metadata: ``traceparent``, ``tracestate`` and what else the transport knows.
        stream_id: The same for every request of one stream, empty for unary calls.
        request_schema: Schema of the parameters; ``None`` when this is a later request of a stream.
        request_rows: Rows of the request.
        http: ``http_status``, ``request_bytes``, ``response_bytes`` over HTTP.
        cancelled: Whether the client cancelled.
        statistics: Batches, rows and bytes in and out.
        duration_ms: Milliseconds, at the end.
    """

    protocol: str = ""
    protocol_hash: str = ""
    method: str = ""
    method_type: str = "unary"
    request_id: str = ""
    kind: TransportKind = TransportKind.PIPE
    auth: AuthContext = _ANONYMOUS
    remote_addr: str = ""
    transport_metadata: Mapping[str, Any] = field(default_factory=dict)
    stream_id: str = ""
    request_schema: pa.Schema | None = None
    request_rows: int = 0
    http: dict[str, int] = field(default_factory=dict)
    cancelled: bool = False
    statistics: CallStatistics = field(default_factory=CallStatistics)
    duration_ms: float = 0.0


class DispatchHook(Protocol):
    """Hears of the start and the end of each call: the door for tracing and metrics.

    Called by the thread that serves the call; what it raises is logged and otherwise ignored.
    """

    def on_dispatch_start(self, record: CallRecord) -> Any:
        """Called before the method; what it returns is handed to `on_dispatch_end`."""

    def on_dispatch_end(self, token: Any, record: CallRecord, error: BaseException | None) -> None:
        """Called after the last turn, with what the method raised."""


@dataclass(frozen=True)
class Caller:
    """What a transport knows of the other side of a call.

    Attributes:
        kind: Transport.
        auth: Who calls.
        remote_addr: Peer address, empty for pipes.
        metadata: Further facts for ``ctx.transport_metadata``.
        gone: Tells whether the client has left; ``None`` when the transport cannot know.
        response_limit_bytes: What the caller accepts as one answer.
    """

    kind: TransportKind = TransportKind.PIPE
    auth: AuthContext = _ANONYMOUS
    remote_addr: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    gone: Callable[[], bool] | None = None
    response_limit_bytes: int | None = None


_PIPE_CALLER = Caller()


class Turn(NamedTuple):
    """What one turn sends.

    Attributes:
        schema: Schema of the batches.
        items: Logs first, then data, then an error; each with its metadata.
        finished: Whether nothing follows.
        error: What was raised; its error batch is already the last of `items`.
        status: HTTP status of the answer.
    """

    schema: pa.Schema
    items: list[tuple[pa.RecordBatch, Any]]
    finished: bool
    error: BaseException | None = None
    status: int = 200

    @property
    def data_index(self) -> int | None:
        """Position of the data batch in `items`, ``None`` when the turn sent none."""
        last = len(self.items) - 1
        if self.error is not None or last < 0:
            return None
        batch, metadata = self.items[last]
        return last if batch_kind(batch.num_rows, metadata) is BatchKind.DATA else None


class Call:
    """One call being served: `begin`, then for a stream `turn` after `turn`, then `end`.

    Used by one thread at a time. None of its methods raises what the method raised.

    Attributes:
        bound: The method.
        context: What the method sees.
        record: What hooks and the access log see.
        stream: The stream, once `begin` returned one.
    """

    def __init__(self, server: ServerCore, bound: BoundMethod, caller: Caller, request: Request | None, request_id: str) -> None:
        info, hosted = bound.info, bound.hosted
        self.server, self.bound = server, bound
        self.stream: Stream[Any, Any] | None = None
        self._messages: list[Message] = []
        self._error: BaseException | None = None
        self._cancelled = False
        self._started = time.monotonic()
        metadata = dict(caller.metadata)
        for key in TRACE_KEYS if request is not None else ():
            if key in request.metadata:  # type: ignore[union-attr]
                metadata[key.decode()] = request.metadata[key].decode("utf-8", "replace")  # type: ignore[union-attr]
        if caller.remote_addr:
            metadata["remote_addr"] = caller.remote_addr
        self.context = CallContext(
            caller.auth,
            self._messages.append,
            metadata,
            server_id=server.server_id,
            method_name=info.name,
            protocol_name=hosted.name,
            kind=caller.kind,
            implementation=hosted.implementation,
        )
        self.context.request_id = request_id
        self.context.response_limit_bytes = caller.response_limit_bytes
        self.context._gone = caller.gone
        timeout = request.timeout if request is not None else None
        self.context.deadline = None if timeout is None else self._started + timeout
        self.record = CallRecord(
            hosted.name,
            hosted.hash,
            info.name,
            info.method_type.value,
            request_id,
            caller.kind,
            caller.auth,
            caller.remote_addr,
            metadata,
        )
        if request is not None:
            self.record.request_schema, self.record.request_rows = request.schema, request.rows
        if info.method_type is MethodType.STREAM:
            self.record.stream_id = os.urandom(16).hex()
        self._tokens = server._hooks_start(self.record)

    # -- the parts of a turn

    def _logs(self, schema: pa.Schema, messages: Iterable[Message] = ()) -> list[tuple[pa.RecordBatch, Any]]:
        """Pending log lines as batches; the list is emptied."""
        taken = [*self._messages, *messages]
        self._messages.clear()
        empty, request_id = empty_batch(schema), self.context.request_id
        return [(empty, _message_metadata(m, self.server.server_id, request_id)) for m in taken]

    def _failed(self, schema: pa.Schema, exc: BaseException, logs: Iterable[Message] = (), *, refused: bool = False) -> Turn:
        self._error = exc
        if not refused and not isinstance(exc, StatusError):
            logger.debug("%s.%s raised", self.record.protocol, self.record.method, exc_info=exc)
        items = self._logs(schema, logs)
        items.append(self.server.error_item(exc, schema, self.context.request_id))
        status = exc.http_status if refused and isinstance(exc, _Refusal) else 200
        return Turn(schema, items, True, exc, status)

    def _run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the application's code with this call as the current one; a deadline that has passed is an error."""
        token = _current_context.set(self.context)
        try:
            result = function(*args, **kwargs)
        finally:
            _current_context.reset(token)
        deadline = self.context.deadline
        if deadline is not None and time.monotonic() >= deadline:
            raise DeadlineExceededError(f"{self.record.method}(): the time that the client allowed has passed")
        return result

    # -- the life of a call

    def refuse(self, exc: BaseException) -> Turn:
        """Answer with an error without running the method."""
        return self._failed(EMPTY_SCHEMA if self.bound.info.header else self.bound.info.result_schema, exc, refused=True)

    def begin(self, arguments: dict[str, Any]) -> Turn:
        """Run the method.

        Returns:
            A unary method's whole answer. For a stream the header turn: logs and the header row on the header's schema,
            or no items and an empty schema when it declares none (its logs then go with the first turn).
        """
        info = self.bound.info
        if self.bound.context_parameter is not None:
            arguments = {**arguments, self.bound.context_parameter: self.context}
        try:
            if info.method_type is MethodType.UNARY:
                batch = result_batch(info, self._run(self.bound.function, **arguments))
                self.record.statistics.record_output(batch)
                return Turn(info.result_schema, [*self._logs(info.result_schema), (batch, None)], True)
            self.stream = self._checked_stream(self._run(self.bound.function, **arguments))
            if self.stream.call_state is not None:
                self._run(self.stream.state.bind_call_state, self.stream.call_state)
            if info.header is None:
                return Turn(EMPTY_SCHEMA, [], False)
            header = self._header_batch(info, self.stream.header)
            return Turn(header.schema, [*self._logs(header.schema), (header, None)], False)
        except BaseException as exc:  # SystemExit and KeyboardInterrupt raised by a method must not end the server
            self.stream = None
            return self._failed(info.result_schema, exc)

    def _checked_stream(self, value: Any) -> Stream[Any, Any]:
        info = self.bound.info
        if not isinstance(value, Stream):
            raise ParameterError(f"{info.name}() result: expected a Stream, got {_got(value)}")
        if not isinstance(value.state, StreamState):
            raise ParameterError(f"{info.name}() result: Stream.state: expected a StreamState, got {_got(value.state)}")
        for name in ("output_schema", "input_schema"):
            if not isinstance(getattr(value, name), pa.Schema):
                raise ParameterError(f"{info.name}() result: Stream.{name}: expected a pyarrow.Schema, got {_got(getattr(value, name))}")
        return value

    @staticmethod
    def _header_batch(info: RpcMethodInfo, header: Any) -> pa.RecordBatch:
        codec = cast("DataclassCodec", info.header)
        try:
            return codec.row.to_batch(codec.values(header))
        except _Mismatch as exc:
            raise exc.error(f"{info.name}() header") from None

    def turn(self, given: AnnotatedBatch) -> Turn:
        """Serve one turn of the stream on *given* (a tick for a producer)."""
        stream = cast("Stream[Any, Any]", self.stream)
        schema = stream.output_schema
        out = OutputCollector(schema, producer_mode=stream.is_producer)
        self.record.statistics.record_input(given.batch)
        try:
            if not stream.is_producer:
                batch = conform_batch(given.batch, stream.input_schema, f"{self.record.method}() input", cast_values=True)
                given = given if batch is given.batch else AnnotatedBatch(batch, given.custom_metadata)
            self._run(stream.state.process, given, out, self.context)
            out.validate()
        except BaseException as exc:  # as in begin
            return self._failed(schema, exc, out.messages)
        items = self._logs(schema, out.messages)
        if out._data is not None:
            self.record.statistics.record_output(out._data)
            items.append((out._data, out._metadata))
        return Turn(schema, items, out.finished)

    def cancel(self) -> None:
        """Tell the state, once, that the client has cancelled; what ``on_cancel`` raises is swallowed."""
        if self._cancelled or self.stream is None:
            return
        self._cancelled = self.record.cancelled = True
        try:
            self._run(self.stream.state.on_cancel, self.context)
        except BaseException as exc:
            logger.debug("on_cancel of %s raised", self.record.method, exc_info=exc)

    def end(self) -> None:
        """Report the call to the hooks and the access log."""
        self.record.duration_ms = (time.monotonic() - self._started) * 1000
        self.server._hooks_end(self._tokens, self.record, self._error)


class _ReflectionImpl:
    def __init__(self, server: ServerCore) -> None:
        self._server = server

    def list_protocols(self) -> ProtocolList:
        server = self._server
        hosted = [ProtocolSummary(s.name, s.version, s.hash) for s in server.services.values()]
        return ProtocolList(server.server_id, server.server_version, REQUEST_VERSION.decode(), hosted)

    def describe(self, protocol: str) -> ProtocolDescription:
        return describe_service(self._server.service(protocol))


class ServerCore:
    """What an `RpcServer` is before it has a transport: the hosted protocols and the rules of calling them.

    Fixed at construction and safe for use by several threads.
    """

    def __init__(
        self,
        protocol: type,
        implementation: Any,
        *,
        extra_protocols: Sequence[tuple[type, Any]] = (),
        server_id: str | None = None,
        server_version: str = "",
        enable_describe: bool = True,
        ipc_validation: IpcValidation | None = None,
        include_tracebacks: bool = True,
    ) -> None:
        self.server_id = server_id if server_id is not None else os.urandom(6).hex()
        self.server_version = server_version
        self.describe_enabled = enable_describe
        self.ipc_validation = ipc_validation or IpcValidation.FULL
        self.include_tracebacks = include_tracebacks
        self.services: dict[str, HostedService] = {}
        for cls, target in [(protocol, implementation), *extra_protocols]:
            service = bind_implementation(cls, target)
            if service.name.startswith(RESERVED_PROTOCOL_PREFIX):
                raise ValueError(f"protocol name {service.name!r}: the prefix {RESERVED_PROTOCOL_PREFIX!r} is reserved")
            if service.name in self.services:
                raise ValueError(f"protocol name {service.name!r} is given twice; names must be unique on a server")
            self.services[service.name] = service
        self.primary = next(iter(self.services.values()))
        if enable_describe:
            self.services[REFLECTION_PROTOCOL] = bind_implementation(Reflection, _ReflectionImpl(self))
        for service in self.services.values():
            service.hash = protocol_hash(service.name, [m.info for m in service.methods.values()])
        self._hooks: list[DispatchHook] = []
        self._started: set[TransportKind] = set()
        self._state = threading.Condition()
        self._active = 0
        self.draining = False

    # -- facts

    @property
    def protocol_name(self) -> str:
        """Routing name of the primary protocol."""
        return self.primary.name

    @property
    def protocol_version(self) -> str:
        """Version of the primary protocol, empty when it declares none."""
        return self.primary.version

    @property
    def protocol_hash(self) -> str:
        """Fingerprint of the primary protocol."""
        return self.primary.hash

    @property
    def implementation(self) -> Any:
        """The object that serves the primary protocol."""
        return self.primary.implementation

    @property
    def methods(self) -> Mapping[str, RpcMethodInfo]:
        """Methods of the primary protocol by name."""
        return {name: bound.info for name, bound in self.primary.methods.items()}

    def service(self, name: str) -> HostedService:
        """Return a hosted protocol.

        Raises:
            ProtocolNotSupportedError: It is not hosted, or the name is none (then it is not echoed).
        """
        service = self.services.get(name)
        if service is None:
            hosted = list(self.services)
            if not PROTOCOL_NAME_PATTERN.fullmatch(name):
                raise ProtocolNotSupportedError(f"the protocol key does not hold a protocol name; hosted: {hosted}")
            raise ProtocolNotSupportedError(f"protocol {name!r} is not hosted{_suggest(name, hosted)}; hosted: {hosted}")
        return service

    def method(self, service: HostedService, name: str) -> BoundMethod:
        """Return a method of a hosted protocol; raises `MethodNotImplementedError`, which lists those there are."""
        bound = service.methods.get(name)
        if bound is None:
            shown = name if len(name) <= 255 and name.isprintable() else "…"
            known = sorted(service.methods)
            raise MethodNotImplementedError(f"{service.name} has no method {shown!r}{_suggest(shown, known)}; it has {known}")
        return bound

    # -- resolve

    def resolve(self, request: Request, path: tuple[str, str] | None = None) -> BoundMethod:
        """Find the method that a request asks for, and check every version.

        Args:
            request: The request.
            path: (protocol, method) where a URL names them too: the request must agree.

        Raises:
            VersionError, ProtocolError: The request names no wire version, protocol or method, or not one of ours.
        """
        self.check_wire_version(request.metadata)
        protocol = request.text(PROTOCOL_KEY, "the protocol")
        name = request.text(METHOD_KEY, "the method name")
        if path is not None:
            service, bound = self.service(path[0]), self.method(self.service(path[0]), path[1])
            if protocol not in (None, path[0]):
                exc = ProtocolNotSupportedError(f"the path says protocol {path[0]!r}, the request says another one")
                exc.http_status = 400
                raise exc
            if name != path[1]:
                raise ProtocolError(f"the path says method {path[1]!r}, the request says {f'{name!r:.100}' if name else 'none'}")
        else:
            if not protocol:
                hosted = list(self.services)
                raise ProtocolNotSpecifiedError(f"the request has no {PROTOCOL_KEY.decode()!r} key; this server hosts {hosted}")
            service = self.service(protocol)
            if not name:
                raise ProtocolError(f"the request has no {METHOD_KEY.decode()!r} key: it must name its method")
            bound = self.method(service, name)
        self._check_protocol_version(service, request)
        return bound

    def check_wire_version(self, metadata: _Metadata) -> None:
        """Raise `VersionError` unless the request speaks our wire version."""
        version = metadata.get(REQUEST_VERSION_KEY)
        if version != REQUEST_VERSION:
            got = "none" if version is None else f"{version!r:.60}"
            raise VersionError(f"wire version: expected {REQUEST_VERSION!r} in {REQUEST_VERSION_KEY.decode()!r}, got {got}")

    @staticmethod
    def _check_protocol_version(service: HostedService, request: Request) -> None:
        if not service.version:
            return
        raw = request.metadata.get(PROTOCOL_VERSION_KEY, b"").decode("utf-8", "replace")
        wanted, got = _parse_version(service.version), _parse_version(raw)
        if got == wanted:
            return
        facts = {"protocol": service.name, "client_version": raw[:60], "server_version": service.version}
        speaks = f"protocol {service.name}: the server speaks {service.version}, the client"
        if got is None:
            named = f"sent {raw[:60]!r}, which is not MAJOR.MINOR.PATCH" if raw else "sent no version"
            raise ProtocolVersionError(f"{speaks} {named}; upgrade the client", **facts)
        side = "client" if got < cast("tuple[int, int]", wanted) else "server"
        raise ProtocolVersionError(f"{speaks} {raw}; upgrade the {side}", **facts)

    # -- begin and end

    def open_call(self, bound: BoundMethod, caller: Caller, request: Request | None, request_id: str) -> Call:
        """Start serving a call; raises `ServerDrainingError` while draining."""
        self.refuse_if_draining()
        return Call(self, bound, caller, request, request_id)

    def error_item(self, exc: BaseException, schema: pa.Schema, request_id: str) -> tuple[pa.RecordBatch, dict[bytes, bytes]]:
        """Return the error batch of an exception: the one place where an exception becomes bytes."""
        show = self.include_tracebacks and not (isinstance(exc, _Refusal) and exc.__traceback__ is None)
        message = Message.from_exception(exc, include_traceback=show)
        return empty_batch(schema), _message_metadata(message, self.server_id, request_id)

    def start(self, kind: TransportKind) -> None:
        """Call the implementations' ``on_serve_start`` once per kind of transport.

        Raises:
            StatusError: One of them failed (UNAVAILABLE); the next request asks again.
        """
        if kind in self._started:
            return
        with self._state:
            if kind in self._started:
                return
            for service in self.services.values():
                hook = getattr(service.implementation, "on_serve_start", None)
                if callable(hook):
                    try:
                        hook(kind)
                    except Exception as exc:
                        logger.exception("on_serve_start(%s) of %s raised", kind, service.name)
                        raise StatusError(f"{service.name} could not start: {_text_of(exc)}", code=Code.UNAVAILABLE) from exc
            self._started.add(kind)

    # -- draining

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Count the work inside as running, so that `drain` waits for it."""
        with self._state:
            self._active += 1
        try:
            yield
        finally:
            with self._state:
                self._active -= 1
                self._state.notify_all()

    def refuse_if_draining(self) -> None:
        """Raise `ServerDrainingError` once `drain` was called."""
        if self.draining:
            raise ServerDrainingError("the server is stopping and takes no new calls; try again, another server may answer")

    def drain(self, grace: float = DRAIN_GRACE_SECONDS) -> bool:
        """Refuse new calls and wait up to *grace* seconds for the running ones; return whether all have ended."""
        self.draining = True
        with self._state:
            return self._state.wait_for(lambda: not self._active, timeout=grace)

    # -- hooks

    def add_hook(self, hook: DispatchHook) -> None:
        """Have *hook* called at the start and the end of each call, after those added before it."""
        self._hooks.append(hook)

    def _hooks_start(self, record: CallRecord) -> list[Any]:
        tokens: list[Any] = []
        for hook in self._hooks:
            try:
                tokens.append(hook.on_dispatch_start(record))
            except Exception:
                logger.exception("on_dispatch_start of %r raised", hook)
                tokens.append(None)
        return tokens

    def _hooks_end(self, tokens: Sequence[Any], record: CallRecord, error: BaseException | None) -> None:
        for hook, token in zip(self._hooks, tokens):
            try:
                hook.on_dispatch_end(token, record, error)
            except Exception:
                logger.exception("on_dispatch_end of %r raised", hook)


class AccessLog:
    """A dispatch hook that writes one JSON line per call (WIRE section 11): never a payload, a value or a token.

    Args:
        server: Whose id goes into each line.
        stream: A text file, open for writing; lines are written whole, by any thread.
    """

    def __init__(self, server: ServerCore, stream: typing.TextIO) -> None:
        self._server, self._stream, self._lock = server, stream, threading.Lock()

    def on_dispatch_start(self, record: CallRecord) -> None:
        """Nothing is written before the end."""

    def on_dispatch_end(self, token: Any, record: CallRecord, error: BaseException | None) -> None:
        """Write the line."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
        line: dict[str, Any] = {
            "timestamp": stamp,
            "level": "INFO",
            "logger": "vgi_rpc.access",
            "message": f"{record.protocol}.{record.method} {'error' if error else 'ok'}",
            "server_id": self._server.server_id,
            "protocol": record.protocol,
            "protocol_hash": record.protocol_hash,
            "method": record.method,
            "method_type": record.method_type,
            "principal": record.auth.principal or "",
            "auth_domain": record.auth.domain or "",
            "authenticated": record.auth.authenticated,
            "remote_addr": record.remote_addr,
            "duration_ms": round(record.duration_ms, 3),
            "status": "error" if error else "ok",
            "error_type": _error_type_of(error) if error else "",
            "request_id": record.request_id,
            **record.http,
        }
        if error is not None:
            line["error_message"] = _text_of(error)[:1000]
            line["error_code"] = _error_code_of(error).value
        if record.stream_id:
            line["stream_id"] = record.stream_id
            if record.cancelled:
                line["cancelled"] = True
        if record.request_schema is not None:
            line["request_fields"] = [{"name": f.name, "type": str(f.type)} for f in record.request_schema]
            line["request_rows"] = record.request_rows
        line.update(dataclasses.asdict(record.statistics))
        text = json.dumps(line, ensure_ascii=False) + "\n"
        with self._lock:
            self._stream.write(text)
            self._stream.flush()


def configure_access_log(path: str, server: ServerCore) -> None:
    """Append one JSON line per call of *server* to *path*; ``-`` is standard error. The file stays open.

    Raises:
        OSError: The file cannot be opened.
    """
    stream = sys.stderr if path == "-" else open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    server.add_hook(AccessLog(server, stream))


# ============================================================================
# 12. BYTE TRANSPORTS ................................... uses 1-11
# ============================================================================
# Pipes and sockets as byte channels: exact reads, whole writes, deadlines, hang-up. The shells under which everything
# above runs. Law: a short read or write is continued, a failure leaves as TransportError, a deadline as DeadlineExceededError.

_RECEIVE_BYTES = 65_536
_MAX_PIECES = 512  # per writev(2); POSIX allows 1024 on every system we know


class ByteChannel(ByteSource):
    """One connection: bytes in, bytes out. Used by one thread at a time; `close` may come from any.

    Attributes:
        deadline: ``time.monotonic()`` seconds at which reads and writes give up; ``None`` for never.
        ended: Whether the peer has closed its side.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._at = 0
        self.deadline: float | None = None
        self.gap: float | None = None  # seconds that a single wait may take at most
        self.ended = False

    # What a kind of channel provides.

    def _receive(self, size: int) -> bytes:
        raise io.UnsupportedOperation("receive")

    def _receive_into(self, view: memoryview) -> int:
        piece = self._receive(len(view))
        view[: len(piece)] = piece
        return len(piece)

    def _send(self, pieces: list[memoryview]) -> int:
        raise io.UnsupportedOperation("send")

    def close(self) -> None:
        """Close both directions; may be called twice."""

    def peer_gone(self) -> bool:
        """Whether the other side has hung up."""
        return self.ended

    # What is made of it.

    def _time_left(self) -> float | None:
        """Seconds that a wait may take, ``None`` for any; raises `DeadlineExceededError` at the deadline."""
        if self.deadline is None:
            return self.gap
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceededError("no answer within the time allowed")
        return left if self.gap is None else min(left, self.gap)

    def _fill(self) -> bool:
        """Receive more into the buffer; ``False`` at the end."""
        piece = self._receive(_RECEIVE_BYTES)
        self._buffer = self._buffer[self._at :] + piece if self._at < len(self._buffer) else piece
        self._at = 0
        self.ended = self.ended or not piece
        return bool(piece)

    def read(self, size: int) -> bytes:
        end = self._at + size
        while end > len(self._buffer):
            if size > _RECEIVE_BYTES:
                return bytes(self.read_after(b"", size))
            if not self._fill():
                end = len(self._buffer)
                break
            end = self._at + size
        piece = self._buffer[self._at : end]
        self._at = end
        return piece

    def read_after(self, head: bytes, size: int) -> _Buffer:
        if size <= _RECEIVE_BYTES:
            return head + self.read(size)
        whole = pa.allocate_buffer(len(head) + size)  # not zeroed, and filled in place
        view = memoryview(whole).cast("B")
        rest = self._buffer[self._at : self._at + size]
        self._at += len(rest)
        filled = len(head) + len(rest)
        view[:filled] = head + rest
        while filled < len(view):
            got = self._receive_into(view[filled:])
            if not got:
                self.ended = True
                return whole.slice(0, filled)
            filled += got
        return whole

    def read_until(self, marker: bytes, limit: int) -> bytes | None:
        """Read to and with *marker*; ``None`` if the source ends or *limit* bytes pass before it comes."""
        seen = self._at
        while True:
            found = self._buffer.find(marker, max(self._at, seen - len(marker)))
            if found >= 0:
                return self.read(found + len(marker) - self._at)
            if len(self._buffer) - self._at >= limit:
                return None
            seen = len(self._buffer) - self._at
            if not self._fill():
                return None

    def peek(self) -> bytes:
        """Return what has been received and not read."""
        return self._buffer[self._at :]

    def write(self, pieces: Sequence[_Buffer]) -> None:
        """Write all of *pieces*, in order; large ones are not copied."""
        if len(pieces) > 1 and sum(map(len, pieces)) <= SMALL_BODY_BYTES:
            pieces = [b"".join(pieces)]
        views = [memoryview(p).cast("B") for p in pieces if len(p)]
        while views:
            sent = self._send(views[:_MAX_PIECES])
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]


def _lost(exc: BaseException) -> TransportError:
    return TransportError(f"connection lost: {exc.strerror if isinstance(exc, OSError) and exc.strerror else _text_of(exc)}")


class FdChannel(ByteChannel):
    """A channel over two file descriptors, which it owns."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        super().__init__()
        self._read_fd, self._write_fd = read_fd, write_fd
        self._blocking = True
        self._lock = threading.Lock()

    def _wait(self, fd: int, events: int) -> None:
        """Wait until *fd* is ready, when there is a limit on waiting; a plain blocking call needs no wait."""
        left = self._time_left()
        if left is None:
            if not self._blocking:
                self._set_blocking(True)
            return
        import select

        if self._blocking:
            self._set_blocking(False)
        poll = select.poll()
        poll.register(fd, events)
        if not poll.poll(max(1, int(left * 1000))):
            raise DeadlineExceededError("no answer within the time allowed")

    def _set_blocking(self, blocking: bool) -> None:
        self._blocking = blocking
        os.set_blocking(self._read_fd, blocking)
        os.set_blocking(self._write_fd, blocking)

    def _receive(self, size: int) -> bytes:
        while True:
            try:
                if self.deadline is not None or not self._blocking:
                    self._wait(self._read_fd, 1)  # POLLIN
                return os.read(self._read_fd, size)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise _lost(exc) from None

    def _receive_into(self, view: memoryview) -> int:
        while True:
            try:
                if self.deadline is not None or not self._blocking:
                    self._wait(self._read_fd, 1)
                return os.readv(self._read_fd, [view[: 1 << 30]])
            except BlockingIOError:
                continue
            except OSError as exc:
                raise _lost(exc) from None

    def _send(self, pieces: list[memoryview]) -> int:
        while True:
            try:
                if self.deadline is not None or not self._blocking:
                    self._wait(self._write_fd, 4)  # POLLOUT
                if len(pieces) == 1 or not hasattr(os, "writev"):
                    return os.write(self._write_fd, pieces[0][: 1 << 30])
                return os.writev(self._write_fd, pieces)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise _lost(exc) from None

    def peer_gone(self) -> bool:
        import select

        try:
            poll = select.poll()
            poll.register(self._read_fd, 0)  # POLLHUP is always reported
            return bool(poll.poll(0))
        except (OSError, ValueError, AttributeError):
            return True

    def close_write(self) -> None:
        """Close the sending direction: the peer reads the end."""
        with self._lock:
            fd, self._write_fd = self._write_fd, -1
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        self.close_write()
        with self._lock:
            fd, self._read_fd = self._read_fd, -1
        if fd >= 0:
            os.close(fd)


class FileChannel(ByteChannel):
    """A channel over two Python file objects that have no descriptor, which it does not own."""

    def __init__(self, reader: Any, writer: Any) -> None:
        super().__init__()
        self._reader, self._writer = reader, writer
        self._read_some = getattr(reader, "read1", None) or reader.read

    def _receive(self, size: int) -> bytes:
        try:
            return bytes(self._read_some(size) or b"")
        except (OSError, ValueError) as exc:
            raise _lost(exc) from None

    def _send(self, pieces: list[memoryview]) -> int:
        try:
            sent = self._writer.write(pieces[0])
            self._writer.flush()
        except (OSError, ValueError) as exc:
            raise _lost(exc) from None
        return len(pieces[0]) if sent is None else int(sent)


class SocketChannel(ByteChannel):
    """A channel over a connected stream socket, plain or TLS, which it owns."""

    def __init__(self, connected: socket.socket) -> None:
        super().__init__()
        self.socket = connected
        self._gather = not hasattr(connected, "pending") and hasattr(connected, "sendmsg")  # TLS sockets cannot gather
        self._timeout: float | None = connected.gettimeout()

    def _wait(self) -> None:
        left = self._time_left()
        if left is not None or self._timeout is not None:
            self._timeout = left
            self.socket.settimeout(left)

    def _io(self, call: Callable[..., _T], *args: Any) -> _T:
        try:
            self._wait()
            return call(*args)
        except (TimeoutError, socket.timeout):
            raise DeadlineExceededError("no answer within the time allowed") from None
        except (OSError, ValueError) as exc:
            raise _lost(exc) from None

    def _receive(self, size: int) -> bytes:
        return self._io(self.socket.recv, size)

    def _receive_into(self, view: memoryview) -> int:
        return self._io(self.socket.recv_into, view[: 1 << 30])

    def _send(self, pieces: list[memoryview]) -> int:
        if self._gather and len(pieces) > 1:
            return self._io(self.socket.sendmsg, pieces)
        return self._io(self.socket.send, pieces[0][: 1 << 30])

    def peer_gone(self) -> bool:
        import select

        try:
            poll = select.poll()
            poll.register(self.socket.fileno(), getattr(select, "POLLRDHUP", 0))
            return bool(poll.poll(0))
        except (OSError, ValueError, AttributeError):
            return True

    def stop_reading(self) -> None:
        """Make the reader see the end, from any thread: how an idle connection is told that its server stops."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.close()


class Transport:
    """A byte channel with a name and an owner: what `RpcConnection` and `RpcServer.serve` take.

    Attributes:
        channel: The bytes.
        kind: What the methods see as ``ctx.kind``.
    """

    def __init__(self, channel: ByteChannel, kind: TransportKind, remote_addr: str = "") -> None:
        self.channel = channel
        self.kind = kind
        self.remote_addr = remote_addr

    def obituary(self) -> str:
        """Say why no more bytes come, as far as is known here."""
        return "the connection was closed by the other side"

    def close(self) -> None:
        """Close the channel; may be called twice."""
        self.channel.close()

    def abort(self) -> None:
        """Close without waiting for the other side."""
        self.close()


class PipeTransport(Transport):
    """Two file objects: binary, one for reading, one for writing. Closing the transport closes both."""

    def __init__(self, reader: Any, writer: Any) -> None:
        self.reader, self.writer = reader, writer
        try:
            channel: ByteChannel = FdChannel(os.dup(reader.fileno()), os.dup(writer.fileno()))
        except (OSError, AttributeError, ValueError):
            channel = FileChannel(reader, writer)
        super().__init__(channel, TransportKind.PIPE)

    def close(self) -> None:
        super().close()
        for f in (self.writer, self.reader):
            with contextlib.suppress(OSError, ValueError):
                f.close()


def _fd_transport(read_fd: int, write_fd: int) -> Transport:
    return Transport(FdChannel(read_fd, write_fd), TransportKind.PIPE)


def make_pipe_pair() -> tuple[Transport, Transport]:
    """Return two connected transports over a pair of pipes; the caller closes both."""
    (client_read, server_write), (server_read, client_write) = os.pipe(), os.pipe()
    return _fd_transport(client_read, client_write), _fd_transport(server_read, server_write)


class StderrMode(enum.Enum):
    """Where a worker's standard error goes."""

    INHERIT = "inherit"  # to ours; the last lines are also kept for error texts
    PIPE = "pipe"  # to a logger
    DEVNULL = "devnull"


class SubprocessTransport(Transport):
    """Starts a worker and talks to it over its stdin and stdout.

    Args:
        cmd: Program and arguments; no shell is involved.
        stderr: Where the worker's standard error goes.
        stderr_logger: For ``StderrMode.PIPE``; default ``vgi_rpc.worker``.

    Raises:
        TransportError: The program cannot be started.
    """

    def __init__(
        self, cmd: Sequence[str], *, stderr: StderrMode = StderrMode.INHERIT, stderr_logger: logging.Logger | None = None
    ) -> None:
        import subprocess

        self.command = list(cmd)
        target = subprocess.DEVNULL if stderr is StderrMode.DEVNULL else subprocess.PIPE
        try:
            self.proc: subprocess.Popen[bytes] = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=target, bufsize=0
            )
        except (OSError, ValueError, IndexError, TypeError) as exc:
            raise TransportError(f"worker {self.command!r} cannot be started: {_text_of(exc)}") from None
        assert self.proc.stdin is not None and self.proc.stdout is not None
        read_fd, write_fd = os.dup(self.proc.stdout.fileno()), os.dup(self.proc.stdin.fileno())
        self.proc.stdout.close()
        self.proc.stdin.close()
        self._lines: deque[str] = deque(maxlen=20)
        self._pump: threading.Thread | None = None
        if self.proc.stderr is not None:
            log = (stderr_logger or logging.getLogger("vgi_rpc.worker")) if stderr is StderrMode.PIPE else None
            self._pump = threading.Thread(target=self._forward_stderr, args=(log,), daemon=True, name="vgi_rpc stderr")
            self._pump.start()
        super().__init__(FdChannel(read_fd, write_fd), TransportKind.PIPE)

    def _forward_stderr(self, log: logging.Logger | None) -> None:
        source = self.proc.stderr
        assert source is not None
        with contextlib.suppress(OSError, ValueError), source:
            for raw in io.BufferedReader(cast("Any", source)):
                line = raw.decode("utf-8", "replace")
                self._lines.append(line.rstrip())
                if log is not None:
                    log.info("%s", line.rstrip())
                else:
                    with contextlib.suppress(OSError, ValueError):
                        sys.stderr.write(line)
                        sys.stderr.flush()

    def obituary(self) -> str:
        import subprocess

        try:
            status = self.proc.wait(1.0)
            if self._pump is not None:
                self._pump.join(1.0)
            ending = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        except subprocess.TimeoutExpired:
            ending = "closed its stdout but still runs"
        said = "".join(f"\n  {line}" for line in list(self._lines)[-5:])
        return f"worker {self.command!r} {ending}" + (f"; its last lines on stderr:{said}" if said else "")

    def close(self) -> None:
        """Close the pipes and reap the worker: it has 5 s to leave by itself, then it is terminated, then killed."""
        self._reap(WORKER_EXIT_SECONDS)

    def abort(self) -> None:
        self._reap(0.0)

    def _reap(self, patience: float) -> None:
        import subprocess

        self.channel.close()
        for act, wait in ((lambda: None, patience), (self.proc.terminate, 2.0), (self.proc.kill, 10.0)):
            try:
                act()
                self.proc.wait(wait)
                break
            except subprocess.TimeoutExpired:
                continue
        if self._pump is not None:
            # A grandchild may hold the worker's stderr open for ever; the thread is a daemon and does not keep us.
            self._pump.join(1.0)


def connect_unix_socket(path: str, timeout: float | None = None) -> Transport:
    """Connect to a Unix socket; raises `TransportError`."""
    connected = socket.socket(socket.AF_UNIX)
    try:
        connected.settimeout(timeout)
        connected.connect(path)
        connected.settimeout(None)
    except OSError as exc:
        connected.close()
        raise TransportError(f"cannot connect to unix:{path}: {exc.strerror or exc}") from None
    return Transport(SocketChannel(connected), TransportKind.UNIX, f"unix:{path}")


def connect_tcp_socket(
    host: str,
    port: int,
    timeout: float | None = None,
    tls_context: ssl.SSLContext | None = None,
    server_hostname: str | None = None,
) -> socket.socket:
    """Connect to host and port, with TLS if there is a context; raises `TransportError`."""
    connected: socket.socket | None = None
    try:
        connected = socket.create_connection((host, port), timeout=timeout)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls_context is not None:
            connected = tls_context.wrap_socket(connected, server_hostname=server_hostname or host)
        connected.settimeout(None)
        return connected
    except (OSError, ValueError, OverflowError) as exc:
        if connected is not None:
            connected.close()
        raise TransportError(f"cannot connect to {host}:{port}: {_text_of(getattr(exc, 'strerror', None) or exc)}") from None


# ============================================================================
# 13. CLIENT ............................................ uses 1-12
# ============================================================================
# One proxy class and one StreamSession over a small interface with two implementations: byte streams here, HTTP in 16.
# Law: an argument that does not fit fails before a byte is sent; after any error that was an answer the connection
# serves the next call; after any other error it is closed, and says so.


@dataclass(frozen=True)
class CallOptions:
    """How one proxy calls.

    Attributes:
        on_log: Takes the server's log lines; ``None`` drops them.
        timeout: Seconds per call or turn, ``None`` for no limit.
        ipc_validation: How much of each answer is checked.
        version: The protocol's version, sent with each request.
    """

    on_log: Callable[[Message], None] | None = None
    timeout: float | None = None
    ipc_validation: IpcValidation = IpcValidation.FULL
    version: str = ""

    @property
    def deadline(self) -> float | None:
        """When a call that begins now must have ended."""
        return None if self.timeout is None else time.monotonic() + self.timeout


class ReplyItem(NamedTuple):
    """A batch of an answer that is not a log or an error."""

    kind: BatchKind
    batch: pa.RecordBatch
    metadata: dict[bytes, bytes] | None

    def annotated(self) -> AnnotatedBatch:
        """Return it as the user sees it: without the state tokens."""
        shown = {k: v for k, v in (self.metadata or {}).items() if k not in (STATE_KEY, CALL_STATE_KEY)}
        return AnnotatedBatch(self.batch, pa.KeyValueMetadata(shown) if shown else None)


def next_reply_item(reader: IpcReader, options: CallOptions) -> ReplyItem | None:
    """Read on to the next data or token batch, passing logs to ``on_log``; ``None`` at the end marker.

    Raises:
        RpcError: The answer is an error; the reader stands behind its batch.
        IPCError: The bytes are not an answer.
    """
    while True:
        message = reader.next_message()
        if message is None:
            return None
        metadata = message.head.metadata
        kind = batch_kind(message.head.rows, metadata)
        if kind is BatchKind.LOG:
            _deliver_log(options.on_log, metadata or {})
        elif kind is BatchKind.ERROR:
            raise _error_from_metadata(metadata or {})
        elif kind in (BatchKind.LOCATION, BatchKind.SHM):
            where = "external storage" if kind is BatchKind.LOCATION else "shared memory that this client did not offer"
            raise IPCError(f"the answer points to {where}, which this client does not read")
        else:
            return ReplyItem(kind, reader.decode(message), metadata)


def _deliver_log(on_log: Callable[[Message], None] | None, metadata: _Metadata) -> None:
    if on_log is not None:
        try:
            on_log(_message_from_metadata(metadata))
        except Exception:
            logger.exception("on_log raised; the call goes on")


class ClientStream:
    """One stream as a client holds it; the interface under `StreamSession`.

    Attributes:
        header: The header row's batch, ``None`` when the method declares none.
        done: Whether nothing more can be sent or read.
    """

    header: Any = None
    done = False

    def turn(self, given: AnnotatedBatch) -> AnnotatedBatch | None:
        """Send a batch, return the answer; ``None`` when the stream has finished."""
        raise io.UnsupportedOperation("turn")

    def close(self) -> None:
        """End the stream; the connection stays usable."""

    def cancel(self) -> None:
        """End the stream and have the state's ``on_cancel`` run."""

    def token(self) -> bytes:
        """Return what `resume` needs."""
        raise RpcError("ProtocolError", "only streams over HTTP can be resumed: elsewhere the state stays with the connection", "")

    def restore(self, token: bytes) -> None:
        """Take over what `token` saved."""
        self.token()


class ClientChannel:
    """How calls reach a server; the interface under a proxy."""

    def unary(self, info: RpcMethodInfo, batch: pa.RecordBatch, options: CallOptions) -> Any:
        """Call a unary method and return its result."""
        raise io.UnsupportedOperation("unary")

    def stream(self, info: RpcMethodInfo, batch: pa.RecordBatch, options: CallOptions) -> ClientStream:
        """Start a stream."""
        raise io.UnsupportedOperation("stream")

    def resume(self, info: RpcMethodInfo, token: bytes, options: CallOptions) -> ClientStream:
        """Go on with a stream from a saved token."""
        raise RpcError("ProtocolError", "only streams over HTTP can be resumed", "")

    def close(self) -> None:
        """Give back connections."""


class StreamSession:
    """A running stream, on the client: iterate over a producer, `exchange` with an exchange.

    Also a context manager, which closes the stream. Not for use by several threads at once.
    """

    def __init__(self, stream: ClientStream, info: RpcMethodInfo) -> None:
        self._stream, self._info = stream, info
        self._header = None
        if stream.header is not None:
            assert info.header is not None
            try:
                self._header = info.header.from_batch(stream.header)
            except _Mismatch as exc:
                self.close()
                raise exc.error(f"{info.name}() header") from None

    @property
    def header(self) -> Any:
        """The stream's header, ``None`` when the method declares none."""
        return self._header

    def typed_header(self, header_type: type[_T]) -> _T:
        """Return the header as *header_type*.

        Raises:
            TypeError: The stream has none, or one of another type.
        """
        if not isinstance(self._header, header_type):
            raise ParameterError(f"{self._info.name}() header: expected {header_type.__name__}, got {_got(self._header)}")
        return self._header

    def _turn(self, given: AnnotatedBatch) -> AnnotatedBatch | None:
        if self._stream.done:
            raise RpcError("ProtocolError", f"the stream of {self._info.name}() is closed", "")
        return self._stream.turn(given)

    def __iter__(self) -> Iterator[AnnotatedBatch]:
        """Yield each batch of a producer until it finishes.

        Raises:
            RpcError: A turn failed; the stream is over, the connection is not.
        """
        while not self._stream.done:
            answer = self._turn(_PLAIN_TICK)
            if answer is None:
                return
            yield answer

    def tick(self, custom_metadata: pa.KeyValueMetadata | Mapping[bytes, bytes] | None = None) -> AnnotatedBatch:
        """Ask a producer for one batch; the metadata reaches its state.

        Raises:
            StopIteration: The stream has finished.
            RpcError: The turn failed, or the stream is closed.
        """
        metadata = custom_metadata
        if metadata is not None and not isinstance(metadata, pa.KeyValueMetadata):
            metadata = pa.KeyValueMetadata(dict(metadata))
        answer = self._turn(AnnotatedBatch(_TICK, metadata))
        if answer is None:
            raise StopIteration
        return answer

    def exchange(self, input: AnnotatedBatch) -> AnnotatedBatch:
        """Send a batch and return the answer to it.

        Raises:
            RpcError: The turn failed, or the stream is closed.
            TypeError: *input* is not an `AnnotatedBatch`.
        """
        if not isinstance(input, AnnotatedBatch):
            got = _got(input)
            raise ParameterError(f"{self._info.name}() exchange: expected an AnnotatedBatch, got {got}; wrap it: AnnotatedBatch(batch)")
        answer = self._turn(input)
        if answer is None:
            raise RpcError("ProtocolError", f"{self._info.name}() finished instead of answering", "")
        return answer

    def token(self) -> bytes:
        """Return bytes from which `resume` goes on behind the last batch that was handed out; HTTP only.

        They hold the state, signed and readable: keep them as you would keep the data.
        """
        return self._stream.token()

    def next_with_token(
        self, custom_metadata: pa.KeyValueMetadata | None = None
    ) -> tuple[AnnotatedBatch | None, bytes | None]:
        """Ask a producer for one batch; return it with the `token` behind it. ``None`` stands for what there is not."""
        answer = None if self.closed else self._turn(AnnotatedBatch(_TICK, custom_metadata))
        try:
            return answer, self.token()
        except RpcError:
            return answer, None

    def seek_to_token(self, token: bytes) -> None:
        """Go on where *token* was taken; raises as `resume`."""
        self._stream.restore(token)

    @property
    def closed(self) -> bool:
        """Whether the stream has finished, failed, or was closed or cancelled."""
        return self._stream.done

    def close(self) -> None:
        """End the stream; may be called twice. The connection serves the next call."""
        if not self._stream.done:
            self._stream.close()

    def cancel(self) -> None:
        """End the stream and have the state's ``on_cancel`` run; may be called twice."""
        if not self._stream.done:
            self._stream.cancel()

    def __enter__(self) -> StreamSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


_PLAIN_TICK = AnnotatedBatch(_TICK)


class ByteClient(ClientChannel):
    """Calls over one byte stream, one at a time; safe for use by several threads, which take turns."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._channel = transport.channel
        self._lock = threading.RLock()
        self._open: _ByteClientStream | None = None
        self._broken = ""
        self._stray = False  # an input stream was sent that a refusing server may have taken for a request

    # -- one connection, shared by calls

    @contextlib.contextmanager
    def exclusive(self, deadline: float | None) -> Iterator[ByteChannel]:
        """Hold the connection; whatever is not an answer breaks it for good."""
        with self._lock:
            if self._broken:
                raise TransportError(f"the connection is closed: {self._broken}")
            self._channel.deadline = deadline
            try:
                yield self._channel
            except (EOFError, IPCError, _LocalError) as exc:
                raise self._break(exc) from None
            except BaseException as exc:
                if not isinstance(exc, (RpcError, ParameterError)):
                    self._break(exc)  # interrupted in the middle of an exchange: nobody knows where the bytes stand
                raise

    def _break(self, exc: BaseException) -> RpcError:
        deadline = isinstance(exc, DeadlineExceededError)
        stray = self._stray_text()
        if deadline:
            error: RpcError = cast("DeadlineExceededError", exc)
        elif stray:
            error = TransportError(f"expected Arrow IPC, got text: {stray!r} ({self._shown()} prints to the channel)")
        elif self._channel.ended or isinstance(exc, (EOFError, TransportError)):
            error = TransportError(self.transport.obituary())
        else:
            error = TransportError(f"not an answer: {_text_of(exc)}")
        self._broken = error.error_message.partition("\n")[0]
        if self._open is not None:
            self._open.done = True
        self.transport.abort()
        return error

    def _stray_text(self) -> str:
        """What a worker printed before it served, as text, when that is what came instead of Arrow."""
        seen = self._channel._buffer[:200]
        if not seen or seen[:4] == _CONTINUATION or not all(32 <= b < 127 or b in b"\r\n\t\x1b" for b in seen[:8]):
            return ""
        return seen.decode("utf-8", "replace").strip()

    def _shown(self) -> str:
        command = getattr(self.transport, "command", None)
        return f"worker {command!r}" if command else "the server"

    def open_reply(self, request_id: str, options: CallOptions) -> IpcReader:
        """Open the next answer, past the one that a refused stream's stray input may have earned."""
        reader = IpcReader(self._channel, validation=options.ipc_validation)
        while self._stray:
            self._stray = False
            message = reader.next_message()
            metadata = (message.head.metadata if message else None) or {}
            if message is None or batch_kind(message.head.rows, metadata) is not BatchKind.ERROR:
                return _Prepended(reader, message)
            if metadata.get(REQUEST_ID_KEY, request_id.encode()) == request_id.encode():
                return _Prepended(reader, message)
            reader.skip()
            reader = IpcReader(self._channel, validation=options.ipc_validation)
        return reader

    def _send_request(self, info: RpcMethodInfo, batch: pa.RecordBatch, options: CallOptions) -> str:
        if self._open is not None and not self._open.done:
            self._open.close()
        request_id = new_request_id()
        metadata = request_metadata(info, options.version, request_id, options.timeout)
        self._channel.write([stream_bytes(batch.schema, [(batch, metadata)])])
        return request_id

    def unary(self, info: RpcMethodInfo, batch: pa.RecordBatch, options: CallOptions) -> Any:
        with self.exclusive(options.deadline):
            request_id = self._send_request(info, batch, options)
            reader = self.open_reply(request_id, options)
            try:
                item = next_reply_item(reader, options)
            except RpcError as exc:
                if not isinstance(exc, TransportError):
                    reader.skip()
                raise
            reader.skip()
            if item is None:
                raise IPCError(f"{info.name}(): expected a result, got an end of stream")
        return read_result(info, item.batch)

    def stream(self, info: RpcMethodInfo, batch: pa.RecordBatch, options: CallOptions) -> ClientStream:
        with self.exclusive(options.deadline):
            request_id = self._send_request(info, batch, options)
            stream = _ByteClientStream(self, request_id, options)
            if info.header is not None:
                stream.read_header(info.name)
            self._open = stream
            return stream

    def close(self) -> None:
        with contextlib.suppress(RpcError, ParameterError):
            if self._open is not None and not self._open.done and not self._broken:
                self._open.options = dataclasses.replace(self._open.options, timeout=1.0)
                self._open.close()
        self.transport.close()
        self._broken = self._broken or "it was closed here"


class _Prepended(IpcReader):
    """A reader that hands out one message again that was already looked at."""

    def __init__(self, reader: IpcReader, message: BatchMessage | None) -> None:
        self.__dict__.update(vars(reader))
        self._again = message

    def next_message(self) -> BatchMessage | None:
        message, self._again = self._again, None
        return message if message is not None else super().next_message()


class _ByteClientStream(ClientStream):
    def __init__(self, client: ByteClient, request_id: str, options: CallOptions) -> None:
        self._client, self._request_id, self.options = client, request_id, options
        self._writer: IpcWriter | None = None
        self._reader: IpcReader | None = None

    def read_header(self, name: str) -> None:
        """Read the header stream that precedes the data; an error in its place ends the stream."""
        reader = self._client.open_reply(self._request_id, self.options)
        try:
            item = next_reply_item(reader, self.options)
        except RpcError as exc:
            if isinstance(exc, TransportError):
                raise
            reader.skip()
            self._fail()
            raise
        reader.skip()
        if item is None:
            raise IPCError(f"{name}(): expected a header, got an end of stream")
        self.header = item.batch

    def _input(self, schema: pa.Schema) -> IpcWriter:
        if self._writer is None:
            self._writer = IpcWriter(self._client.transport.channel.write, schema)
        return self._writer

    def _output(self) -> IpcReader:
        if self._reader is None:
            self._reader = self._client.open_reply(self._request_id, self.options)
        return self._reader

    def _fail(self) -> None:
        """After an error batch: end our input, which the server reads to its end or takes for a stray request."""
        self.done = True
        # The error of a turn comes on an output stream that a begun call opened; one before it may be a refusal.
        self._client._stray = True
        self._input(EMPTY_SCHEMA).close()

    def turn(self, given: AnnotatedBatch) -> AnnotatedBatch | None:
        with self._client.exclusive(self.options.deadline):
            writer = self._input(given.batch.schema)
            batch = given.batch
            if batch.schema is not writer.schema and not batch.schema.equals(writer.schema, check_metadata=True):
                batch = conform_batch(batch, writer.schema, "exchange input", cast_values=True)
            writer.write(batch, given.custom_metadata)
            try:
                item = next_reply_item(self._output(), self.options)
            except RpcError as exc:
                if not isinstance(exc, TransportError):
                    self._output().skip()
                    self._fail()
                raise
            if item is None:
                self.done = True
                writer.close()
                return None
            return item.annotated()

    def close(self) -> None:
        self.done = True
        with self._client.exclusive(self.options.deadline):
            self._input(EMPTY_SCHEMA).close()
            try:
                while next_reply_item(self._output(), self.options) is not None:
                    pass
            except RpcError as exc:  # nobody waits for the error of a stream that is being closed
                if isinstance(exc, TransportError):
                    raise
                self._output().skip()
                self._client._stray = True

    def cancel(self) -> None:
        with self._client.exclusive(self.options.deadline):
            writer = self._input(EMPTY_SCHEMA)
            writer.write(empty_batch(writer.schema), {CANCEL_KEY: b"1"})
        self.close()


class RpcConnection(Generic[_P]):
    """A connection as a context manager that gives the typed proxy.

    Args:
        protocol: The Protocol class.
        transport: A byte transport, or another `ClientChannel`; closed on leaving.
        on_log: Takes the server's log lines.
        timeout: Seconds per call or turn, ``None`` for no limit.
        ipc_validation: How much of each answer is checked.
    """

    def __init__(
        self,
        protocol: type[_P],
        transport: Transport | ClientChannel,
        on_log: Callable[[Message], None] | None = None,
        *,
        timeout: float | None = None,
        ipc_validation: IpcValidation = IpcValidation.FULL,
    ) -> None:
        self.channel = transport if isinstance(transport, ClientChannel) else ByteClient(transport)
        version = getattr(protocol, "protocol_version", "") or ""
        self._proxy = make_proxy(protocol, self.channel, CallOptions(on_log, timeout, ipc_validation, version))

    def __enter__(self) -> _P:
        return cast("_P", self._proxy)

    def __exit__(self, *exc: object) -> None:
        self.channel.close()


class RpcProxy:
    """Calls a Protocol's methods on a server; each is an attribute. Made by the ``connect`` functions."""

    _protocol: type
    _channel: ClientChannel
    _options: CallOptions

    def __repr__(self) -> str:
        return f"<proxy of {self._protocol.__qualname__} over {type(self._channel).__name__}>"

    def __getattr__(self, name: str) -> Any:
        known = rpc_methods(self._protocol)
        raise AttributeError(f"{self._protocol.__qualname__} has no method {name!r}{_suggest(name, known)}")

    def with_options(self, *, timeout: float | None = None, on_log: Callable[[Message], None] | None = None) -> Any:
        """Return a proxy on the same connection with another timeout (seconds per call or turn) or ``on_log``."""
        options = dataclasses.replace(self._options, timeout=timeout, on_log=on_log or self._options.on_log)
        return make_proxy(self._protocol, self._channel, options)


def make_proxy(protocol: type, channel: ClientChannel, options: CallOptions) -> RpcProxy:
    """Return a proxy of *protocol* over *channel*."""
    proxy = RpcProxy()
    proxy._protocol, proxy._channel, proxy._options = protocol, channel, options
    for info in rpc_methods(protocol).values():
        proxy.__dict__[info.name] = _proxy_method(info, channel, options)
    return proxy


def _proxy_method(info: RpcMethodInfo, channel: ClientChannel, options: CallOptions) -> Callable[..., Any]:
    if info.method_type is MethodType.UNARY:

        def call(*args: Any, **kwargs: Any) -> Any:
            return channel.unary(info, request_batch(info, bind_arguments(info, args, kwargs)), options)

    else:

        def call(*args: Any, **kwargs: Any) -> Any:
            batch = request_batch(info, bind_arguments(info, args, kwargs))
            return StreamSession(channel.stream(info, batch, options), info)

    call.__name__, call.__doc__ = info.name, info.doc
    return call


def with_options(proxy: _P, *, timeout: float | None = None, on_log: Callable[[Message], None] | None = None) -> _P:
    """Return a proxy on the same connection with another timeout (seconds per call or turn) or ``on_log``."""
    return cast("_P", RpcProxy.with_options(cast("RpcProxy", proxy), timeout=timeout, on_log=on_log))


def resume(proxy: Any, method: str, token: bytes) -> StreamSession:
    """Go on with a stream of *method* where `StreamSession.token` was taken; also in another process. HTTP only.

    Raises:
        RpcError: The token is not one, or the server refuses it.
    """
    info = rpc_methods(proxy._protocol).get(method)
    if info is None or info.method_type is not MethodType.STREAM:
        raise RpcError("ProtocolError", f"resume: {method!r} is not a stream of {proxy._protocol.__qualname__}", "")
    return StreamSession(proxy._channel.resume(info, token, proxy._options), info)


def _reflection(target: Any) -> Any:
    """A proxy of the reflection protocol on the connection of a proxy, a transport or a channel."""
    channel = getattr(target, "_channel", None) or target
    if isinstance(channel, Transport):
        channel = ByteClient(channel)
    if not isinstance(channel, ClientChannel):
        raise TypeError(f"expected a proxy, a transport or a URL, got {_got(target)}")
    options = getattr(target, "_options", None)
    timeout = options.timeout if options is not None else None
    return make_proxy(Reflection, channel, CallOptions(timeout=timeout))


def list_protocols(target: Any) -> list[ProtocolSummary]:
    """Return the protocols that the server behind a proxy or transport hosts, the application's first.

    Raises:
        RpcError: The server does not answer, or hosts no reflection.
    """
    return cast("ProtocolList", _reflection(target).list_protocols()).protocols


def describe_protocol(target: Any, name: str) -> ServiceDescription:
    """Return what the server behind a proxy or transport says of the protocol *name*; raises as `list_protocols`."""
    proxy = _reflection(target)
    return _service_description(proxy.list_protocols(), proxy.describe(protocol=name))


def introspect(
    transport: Any, ipc_validation: IpcValidation = IpcValidation.FULL, protocol: str | None = None
) -> ServiceDescription:
    """Return the description of *protocol*, by default the primary one; raises as `list_protocols`."""
    proxy = _reflection(transport)
    listed = cast("ProtocolList", proxy.list_protocols())
    if protocol is None:
        named = [p.protocol for p in listed.protocols if not p.protocol.startswith(RESERVED_PROTOCOL_PREFIX)]
        protocol = (named or [REFLECTION_PROTOCOL])[0]
    return _service_description(listed, proxy.describe(protocol=protocol))


# ============================================================================
# 14. BYTE SERVING ...................................... uses 1-13
# ============================================================================
# The loop that serves one byte stream, and the listeners that give each connection such a loop.
# Law: after any refusal whose bytes were well framed the connection serves the next request; else it is closed.


class RpcServer(ServerCore):
    """Hosts one or more protocols; any number of transports may serve it at the same time.

    Args:
        protocol: The Protocol class, or a plain class that serves as its own.
        implementation: The object that serves it.
        extra_protocols: Further (protocol, implementation) pairs, with unique names.
        server_id: 12 hex characters; made up by default.
        server_version: Free text, shown by reflection.
        enable_describe: Whether reflection and the pages answer.
        ipc_validation: How much of each incoming batch is checked; default: every value.
        include_tracebacks: Whether errors carry the server's traceback.

    Raises:
        TypeError: The implementation does not fit the protocol; one error names everything.
        ValueError: A protocol name that is reserved, given twice, or none.
    """

    def serve(self, transport: Transport, *, auth: AuthContext | None = None) -> None:
        """Serve one client until it leaves; *transport* stays open. Raises only what ``on_serve_start`` raises."""
        caller = Caller(transport.kind, auth or _ANONYMOUS, transport.remote_addr, gone=transport.channel.peer_gone)
        _ByteServing(self, transport.channel, caller).run()

    def serve_one(self, transport: Transport) -> None:
        """Serve one request; as `serve`."""
        caller = Caller(transport.kind, remote_addr=transport.remote_addr, gone=transport.channel.peer_gone)
        _ByteServing(self, transport.channel, caller).serve_next()


class _ByteServing:
    """Serves one byte channel, request after request."""

    def __init__(self, server: ServerCore, channel: ByteChannel, caller: Caller) -> None:
        self._server, self._channel, self._caller = server, channel, caller
        # After a refusal the client may still send the input stream of the stream it had asked for: it has no method
        # key, cannot be a request, and is passed over.
        self._orphan_expected = False

    def run(self) -> None:
        """Serve until the client leaves, the bytes make no sense any more, or the server drains."""
        while self.serve_next() and not self._server.draining:
            pass

    def serve_next(self) -> bool:
        """Serve one request; ``False`` when the connection is at its end."""
        try:
            self._channel.deadline = None
            reader = self._reader()
            with self._server.working():
                return self._serve_stream(reader)
        except (EOFError, TransportError):
            return False
        except IPCError as exc:
            logger.debug("connection closed: %s", exc)
            with contextlib.suppress(TransportError):
                self._answer(exc)
            return False

    def _reader(self) -> IpcReader:
        return IpcReader(self._channel, validation=self._server.ipc_validation)

    def _answer(self, exc: BaseException, request_id: str = "") -> None:
        item = self._server.error_item(exc, EMPTY_SCHEMA, request_id or new_request_id())
        self._channel.write([stream_bytes(EMPTY_SCHEMA, [item])])

    def _serve_stream(self, reader: IpcReader) -> bool:
        orphan_expected, self._orphan_expected = self._orphan_expected, False
        request_id = ""
        request = None
        try:
            request = Request(reader)
            if orphan_expected and not {METHOD_KEY, REQUEST_VERSION_KEY} & request.metadata.keys():
                return True
            request_id = request.request_id
            if request.metadata.get(METHOD_KEY) == TRANSPORT_OPTIONS_METHOD.encode():
                self._answer_options(request)
                return True
            self._server.start(self._caller.kind)
            self._serve_request(request, request_id or new_request_id())
        except (_Refusal, StatusError) as exc:
            reader.skip()  # raises when the bytes make no sense: then the connection is closed
            if request is not None or not orphan_expected:
                self._answer(exc, request_id)
                self._orphan_expected = True
        return True

    def _answer_options(self, request: Request) -> None:
        """`__transport_options__` (WIRE section 9): shared memory is not offered."""
        self._server.check_wire_version(request.metadata)
        metadata = {SHM_KEY: b"false", REQUEST_VERSION_KEY: REQUEST_VERSION, SERVER_ID_KEY: self._server.server_id.encode()}
        self._channel.write([stream_bytes(EMPTY_SCHEMA, [(_TICK, metadata)])])

    def _serve_request(self, request: Request, request_id: str) -> None:
        bound = self._server.resolve(request)
        call = self._server.open_call(bound, self._caller, request, request_id)
        try:
            try:
                arguments = read_arguments(bound.info, request)
            except _Refusal as exc:
                turn = call.refuse(exc)
            else:
                call.record.statistics.input_batches += 1
                call.record.statistics.input_rows += request.rows
                turn = call.begin(arguments)
            if call.stream is not None:
                if turn.items:
                    self._channel.write([stream_bytes(turn.schema, turn.items)])
                self._serve_turns(call, call.stream)
                return
            self._orphan_expected = bound.info.method_type is MethodType.STREAM
            schema = EMPTY_SCHEMA if turn.error is not None and bound.info.header is not None else turn.schema
            self._channel.write([stream_bytes(schema, turn.items)])
        finally:
            call.end()

    def _serve_turns(self, call: Call, stream: Stream[Any, Any]) -> None:
        """Lockstep: a batch comes, a turn answers, until either side ends (WIRE section 5)."""
        reader = self._reader()
        writer = IpcWriter(self._channel.write, stream.output_schema)
        while True:
            try:
                item = reader.next()
            except IPCError as exc:
                turn = call._failed(stream.output_schema, exc, refused=True)
            else:
                if item is None:
                    writer.close()
                    return
                batch, metadata = item
                if metadata and CANCEL_KEY in metadata:
                    call.cancel()
                    writer.close()
                    reader.skip()
                    return
                turn = call.turn(AnnotatedBatch(batch, pa.KeyValueMetadata(metadata) if metadata else None))
            writer.write_all(turn.items, close=turn.finished)
            if turn.finished:
                reader.skip()
                return


@contextlib.contextmanager
def _stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Have SIGTERM and SIGINT call *stop* while inside; only the main thread can, elsewhere nothing changes."""
    import signal

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {s: signal.signal(s, lambda *_: stop()) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def serve_stdio(server: RpcServer) -> None:
    """Serve the parent process on stdin and stdout until it closes them.

    While serving, descriptor 1 is standard error: whatever prints to stdout cannot break the channel. SIGTERM and SIGINT
    let the running call finish.
    """
    read_fd, write_fd = os.dup(0), os.dup(1)  # not inherited by children of the methods
    null = os.open(os.devnull, os.O_RDONLY)
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    os.dup2(null, 0)
    os.close(null)

    def stop() -> None:
        server.draining = True
        if not server._active:
            raise SystemExit(0)

    transport = _fd_transport(read_fd, write_fd)
    try:
        with _stop_signals(stop):
            server.serve(transport)
    except SystemExit as exc:
        if exc.code != 0 or not server.draining:
            raise
    finally:
        transport.close()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


class Listener:
    """Accepts connections and gives each to a handler, until told to stop or idle for too long.

    Args:
        listening: The bound socket, which it owns.
        handle: Serves one connection to its end.
        threaded: A thread for each connection, or one after the other.
        max_connections: At most so many at a time; further ones wait to be accepted.
        idle_timeout: Seconds without a connection after which `run` returns; ``None`` for never.
    """

    def __init__(
        self,
        listening: socket.socket,
        handle: Callable[[socket.socket, Any], None],
        *,
        threaded: bool = False,
        max_connections: int | None = None,
        idle_timeout: float | None = None,
    ) -> None:
        self._socket, self._handle, self._threaded = listening, handle, threaded
        self._max, self._idle = max_connections, idle_timeout
        self._wake_read, self._wake_write = socket.socketpair()
        self._stopping = False
        self._connections: set[socket.socket] = set()
        self._changed = threading.Condition()

    def stop(self) -> None:
        """Have `run` return; may be called from a signal handler or any thread."""
        self._stopping = True
        with contextlib.suppress(OSError):
            self._wake_write.send(b"x")

    def run(self) -> None:
        """Accept until stopped; connections that are still served stay open."""
        import selectors

        idle_since = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while not self._stopping:
                if self._connections:
                    idle_since = time.monotonic()
                wait = None if self._idle is None else max(0.05, min(self._idle, idle_since + self._idle - time.monotonic()))
                ready = selector.select(wait)
                if any(key.fileobj is self._socket for key, _ in ready):
                    self._accept()
                    idle_since = time.monotonic()
                elif self._idle is not None and not self._connections and time.monotonic() >= idle_since + self._idle:
                    return

    def _accept(self) -> None:
        try:
            connected, address = self._socket.accept()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.05)  # out of descriptors: let running connections give some back
            return
        with self._changed:
            self._connections.add(connected)
        if not self._threaded:
            self._serve(connected, address)
            return
        threading.Thread(target=self._serve, args=(connected, address), daemon=True, name="vgi_rpc connection").start()
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._max is None or len(self._connections) < self._max)

    def _serve(self, connected: socket.socket, address: Any) -> None:
        try:
            self._handle(connected, address)
        except Exception:
            logger.exception("a connection's handler raised")
        finally:
            with contextlib.suppress(OSError):
                connected.close()
            with self._changed:
                self._connections.discard(connected)
                self._changed.notify_all()

    def close(self) -> None:
        """Stop listening and hang up on the connections that are left."""
        self._socket.close()
        for connected in list(self._connections):
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)
        self._wake_read.close()
        self._wake_write.close()


def run_listener(server: ServerCore, listener: Listener, grace: float = DRAIN_GRACE_SECONDS) -> None:
    """Run *listener* until SIGTERM, SIGINT or its end; then let running calls finish for *grace* seconds, and close."""

    def stop() -> None:
        server.draining = True
        listener.stop()

    try:
        with _stop_signals(stop):
            listener.run()
            if server.draining:
                server.drain(grace)
    finally:
        listener.close()


def _serve_socket(server: RpcServer, kind: TransportKind, connected: socket.socket, address: str) -> None:
    server.serve(Transport(SocketChannel(connected), kind, address))


def serve_unix(
    server: RpcServer,
    path: str,
    *,
    threaded: bool = False,
    max_connections: int | None = None,
    idle_timeout: float | None = None,
    on_bound: Callable[[str], None] | None = None,
) -> None:
    """Serve on a Unix socket until SIGTERM, SIGINT or *idle_timeout* seconds without a connection.

    Args:
        server: What to serve.
        path: Where the socket is made, readable by its owner alone; a dead one is replaced, and it is removed at the end.
        threaded: A thread for each connection; otherwise one after the other.
        max_connections: At most so many at a time.
        idle_timeout: Seconds; ``None`` for never.
        on_bound: Called with the path once connections are accepted.

    Raises:
        OSError: The path is in use by a live server, or cannot be made.
    """
    listening = socket.socket(socket.AF_UNIX)
    try:
        _remove_dead_socket(path)
        old = os.umask(0o077)
        try:
            listening.bind(path)
        finally:
            os.umask(old)
        listening.listen(128)
    except OSError:
        listening.close()
        raise
    made = os.stat(path)
    handle = functools.partial(_serve_unix_connection, server, path)
    listener = Listener(listening, handle, threaded=threaded, max_connections=max_connections, idle_timeout=idle_timeout)
    try:
        if on_bound is not None:
            on_bound(path)
        run_listener(server, listener)
    finally:
        with contextlib.suppress(OSError):
            if os.stat(path).st_ino == made.st_ino:
                os.unlink(path)


def _serve_unix_connection(server: RpcServer, path: str, connected: socket.socket, address: Any) -> None:
    _serve_socket(server, TransportKind.UNIX, connected, f"unix:{path}")


def _remove_dead_socket(path: str) -> None:
    """Remove a socket file behind which nobody listens any more."""
    import stat

    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError:
        pass


def listen_tcp(host: str, port: int) -> socket.socket:
    """Bind and listen; *port* 0 takes a free one. Raises `OSError`."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(512)
    except BaseException:
        listening.close()
        raise
    return listening


def _start_tls(connected: socket.socket, tls_context: ssl.SSLContext | None) -> socket.socket:
    """Set up an accepted TCP connection; the TLS handshake runs here, in the connection's own thread, within 5 s."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tls_context is None:
        return connected
    connected.settimeout(5.0)
    wrapped = tls_context.wrap_socket(connected, server_side=True)
    wrapped.settimeout(None)
    return wrapped


def _address_text(address: Any) -> str:
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) and len(address) >= 2 else ""


def serve_tcp(
    server: RpcServer,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    threaded: bool = False,
    max_connections: int | None = None,
    idle_timeout: float | None = None,
    on_bound: Callable[[str, int], None] | None = None,
    tls_context: ssl.SSLContext | None = None,
) -> None:
    """Serve on TCP, as `serve_unix` does; there is no authentication but what *tls_context* asks of clients.

    Args:
        server: What to serve.
        host: Address to bind; by default only this machine reaches it.
        port: 0 takes a free one.
        threaded: A thread for each connection; otherwise one after the other.
        max_connections: At most so many at a time.
        idle_timeout: Seconds; ``None`` for never.
        on_bound: Called with host and port once connections are accepted.
        tls_context: Server-side context of the standard library's ``ssl``; ``None`` for plain TCP.

    Raises:
        OSError: The address is in use, or cannot be bound.
    """

    def handle(connected: socket.socket, address: Any) -> None:
        try:
            ready = _start_tls(connected, tls_context)
        except OSError as exc:
            logger.info("TLS handshake with %s failed: %s", _address_text(address), exc)
            return
        with ready:
            _serve_socket(server, TransportKind.TCP, ready, _address_text(address))

    listening = listen_tcp(host, port)
    listener = Listener(listening, handle, threaded=threaded, max_connections=max_connections, idle_timeout=idle_timeout)
    if on_bound is not None:
        on_bound(host, listening.getsockname()[1])
    run_listener(server, listener)


# ============================================================================
# 15. HTTP SERVING ...................................... uses 1-14
# ============================================================================
# One function from request to response (`HttpApp.__call__`) under both our own server and WSGI: routes, limits, codings,
# authentication, tokens. Above it a strict HTTP/1.1 reader: what the grammar does not allow is refused and the connection
# closed, so that no proxy in front can read a message differently than we do.


@dataclass
class HttpRequest:
    """A request as `HttpApp` and ``authenticate`` callbacks see it.

    Attributes:
        method: ``GET``, ``POST`` …
        path: Raw path, not decoded, without the query.
        headers: Values by lower-case name; repeated ones joined by ", ".
        remote_addr: Peer address.
        read_body: Reads the body, at most so many bytes; raises `RequestTooLargeError` beyond.
        repeated: Names that came more than once.
        gone: Tells whether the client has left; ``None`` when unknown.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    remote_addr: str = ""
    read_body: Callable[[int], bytes] = lambda limit: b""
    repeated: frozenset[str] = frozenset()
    gone: Callable[[], bool] | None = None

    def get_header(self, name: str, default: str | None = None) -> str | None:
        """Return a header's value by its name in any case."""
        return self.headers.get(name.lower(), default)


@dataclass
class HttpResponse:
    """A response: the shells add nothing but framing, ``Date`` and ``Connection``.

    Attributes:
        status: Status code.
        headers: (name, value) pairs.
        body: Bytes, or an iterator of pieces to be sent as they come.
        close: Whether the connection must not be used again.
    """

    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes | Iterator[bytes] = b""
    close: bool = False


Authenticate = Callable[[HttpRequest], AuthContext]


def bearer_authenticate(*, validate: Callable[[str], AuthContext]) -> Authenticate:
    """Return a callback that hands the bearer token of ``Authorization`` to *validate*.

    Args:
        validate: Returns who it is, or raises ``ValueError``; compare secrets with ``hmac.compare_digest``.
    """

    def authenticate(request: HttpRequest) -> AuthContext:
        scheme, _, token = (request.get_header("authorization") or "").partition(" ")
        if not scheme or scheme.lower() != "bearer":
            raise AuthFailure(AuthReason.MISSING_CREDENTIAL, "expected 'Authorization: Bearer <token>'")
        if not token or token != token.strip() or not token.isascii() or " " in token or len(token) > 16_384:
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "malformed bearer token")
        return validate(token)

    authenticate.challenge = "Bearer"  # type: ignore[attr-defined]
    return authenticate


def bearer_authenticate_static(*, tokens: Mapping[str, AuthContext]) -> Authenticate:
    """Return a callback that knows a fixed set of bearer tokens; compared in constant time, all of them each time."""
    known = [(token.encode(), auth) for token, auth in tokens.items()]

    def validate(token: str) -> AuthContext:
        found = None
        for secret, auth in known:
            if hmac.compare_digest(secret, token.encode()):
                found = auth
        if found is None:
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "unknown bearer token")
        return found

    return bearer_authenticate(validate=validate)


def chain_authenticate(*authenticators: Authenticate) -> Authenticate:
    """Return a callback that asks each in turn until one knows the caller; the last refusal stands.

    A ``ValueError`` passes the request on to the next; ``PermissionError`` and others end the search.
    """
    if not authenticators:
        raise ValueError("chain_authenticate: expected at least one authenticator")

    def authenticate(request: HttpRequest) -> AuthContext:
        refusal: ValueError | None = None
        for one in authenticators:
            try:
                return one(request)
            except ValueError as exc:
                # What is wrong with a credential that was sent says more than that another kind was not.
                missing = isinstance(exc, AuthFailure) and exc.reason is AuthReason.MISSING_CREDENTIAL
                refusal = exc if refusal is None or not missing else refusal
        raise cast("ValueError", refusal)

    challenges = [c for c in (getattr(a, "challenge", "") for a in authenticators) if c]
    authenticate.challenge = challenges[0] if challenges else ""  # type: ignore[attr-defined]
    return authenticate


@dataclass
class HttpOptions:
    """What an HTTP server can be told; `make_wsgi_app`, `serve_http` and `make_sync_client` take these as keywords.

    Attributes:
        prefix: Path under which everything is served, such as ``/api``.
        token_key: Key of the state tokens (16 bytes or more), or several, the first of which signs; default
            ``VGI_RPC_TOKEN_KEY``, else a random one with a warning.
        token_ttl: Seconds that a state token is good for; 0 for ever.
        authenticate: Callback from request to `AuthContext`; ``ValueError`` and ``PermissionError`` refuse (401).
        cors_origins: Origins whose pages may call, ``"*"`` for all; ``None`` for none.
        max_request_bytes: Largest body, encoded and decoded; ``None`` for the default of 256 MiB.
        max_response_bytes: Largest answer, decoded; ``None`` for any size.
        compression_level: zstd and gzip level of answers, 1 to 9; ``None`` switches compression off.
        call_state_cache_entries: Opened call tokens kept in memory; 0 for none.
        max_rows: Rows of one batch, ``None`` for what its bytes pay for.
        pages: Whether the pages for people are served (they need reflection as well).
        json: Whether calls in JSON are answered.
    """

    prefix: str = ""
    token_key: bytes | str | Sequence[bytes] | None = None
    token_ttl: float = TOKEN_TTL_SECONDS
    authenticate: Authenticate | None = None
    cors_origins: str | Iterable[str] | None = None
    max_request_bytes: int | None = None
    max_response_bytes: int | None = None
    compression_level: int | None = 1
    call_state_cache_entries: int = 4096
    max_rows: int | None = None
    pages: bool = True
    json: bool = True

    def __post_init__(self) -> None:
        self.prefix = "/" + self.prefix.strip("/") if self.prefix.strip("/") else ""
        if isinstance(self.cors_origins, str):
            self.cors_origins = [self.cors_origins]
        for name in ("max_request_bytes", "max_response_bytes", "max_rows"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value <= 0):
                raise ValueError(f"{name}: expected a positive integer or None, got {value!r}")

    def keys(self) -> list[bytes]:
        """The keys of the tokens: given, from the environment, or random with a warning."""
        given = self.token_key if self.token_key is not None else os.environ.get("VGI_RPC_TOKEN_KEY")
        if not given:
            logger.warning(
                "no token key: a random one is used, so streams do not survive a restart and other processes cannot go on "
                "with them; set VGI_RPC_TOKEN_KEY (or token_key=) to the same secret everywhere"
            )
            return [os.urandom(32)]
        if isinstance(given, str):
            return [k.strip().encode() for k in given.split(",") if k.strip()]
        return [bytes(given)] if isinstance(given, (bytes, bytearray)) else [bytes(k) for k in given]


def _takes_options(*kinds: type) -> Callable[[_Function], _Function]:
    """Give a function that takes ``**options`` the signature in which each option of *kinds* is a keyword."""

    def mark(function: _Function) -> _Function:
        signature = inspect.signature(function)
        kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        for f in (f for kind in kinds for f in dataclasses.fields(kind)):
            default = f.default if f.default is not dataclasses.MISSING else None
            kept.append(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=f.type))
        function.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return function

    return mark


def _split_options(options: dict[str, Any], *kinds: type) -> list[Any]:
    """Build one instance of each of *kinds* from keywords; an unknown keyword is a `TypeError` with a suggestion."""
    left = dict(options)
    made = []
    for kind in kinds:
        names = {f.name for f in dataclasses.fields(kind)}
        made.append(kind(**{n: left.pop(n) for n in list(left) if n in names}))
    if left:
        name = next(iter(left))
        known = [f.name for kind in kinds for f in dataclasses.fields(kind)]
        raise TypeError(f"no option {name!r}{_suggest(name, known)}; there are {', '.join(known)}")
    return made


_ENCODINGS = ("zstd", "gzip")


def supported_encodings() -> tuple[str, ...]:
    """Return the body codings that this machine can read and write, best first."""
    return tuple(e for e in _ENCODINGS if e != "zstd" or _zstd_available())


def compress_body(body: bytes, encoding: str, level: int) -> bytes:
    """Encode a body; *level* from 1 to 9."""
    if encoding == "zstd":
        return zstd_compress(body, level)
    encoder = zlib.compressobj(level, wbits=31)
    return encoder.compress(body) + encoder.flush()


def decompress_body(body: _Buffer, encoding: str, limit: int) -> bytes:
    """Decode a body to at most *limit* bytes; raises `IPCError` or `RequestTooLargeError`."""
    return zstd_decompress(body, limit) if encoding == "zstd" else gzip_decompress(body, limit)


def choose_encoding(headers: Mapping[str, str]) -> tuple[str, str]:
    """Choose the coding of an answer: (coding or empty, header that names it).

    The client's order decides; its private header beats the standard one, and a coding named only there is named in the
    private answer header. ``identity`` first, or ``q=0``, means none.
    """
    private, public = headers.get(ACCEPT_ENCODING_HEADER.lower()), headers.get("accept-encoding", "")
    for offer in (private if private is not None else public).split(","):
        name, _, parameters = offer.strip().lower().partition(";")
        name = name.strip()
        if re.search(r"q=0(\.0*)?\s*$", parameters):
            continue
        if name == "identity":
            return "", ""
        if name in supported_encodings():
            in_public = re.search(rf"(?:^|[,\s]){name}\b", public.lower()) is not None
            return name, "Content-Encoding" if in_public else CONTENT_ENCODING_HEADER
    return "", ""


class _HttpFailure(Exception):
    """Ends the handling of a request with a response that is not Arrow."""

    def __init__(self, response: HttpResponse) -> None:
        super().__init__(response.status)
        self.response = response


def json_response(status: int, value: Any, headers: Iterable[tuple[str, str]] = ()) -> HttpResponse:
    """Return a response with *value* as compact JSON."""
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_text_of).encode("utf-8", "backslashreplace")
    return HttpResponse(status, [("Content-Type", "application/json"), *headers], body)


class _OpenedCall(NamedTuple):
    """The half of a stream's state that never changes, as it was sealed at init."""

    call_id: bytes
    output_schema: pa.Schema
    input_schema: pa.Schema
    call_state: bytes
    stream_id: str
    limit: int | None


class HttpApp:
    """Answers requests for a server; safe for use by several threads. Made by `make_wsgi_app` and `serve_http`."""

    def __init__(self, server: ServerCore, options: HttpOptions | None = None) -> None:
        self.server = server
        self.options = options or HttpOptions()
        self.sealer = TokenSealer(self.options.keys(), self.options.token_ttl)
        self._limit = self.options.max_request_bytes or SERVER_MAX_REQUEST_BYTES
        self._opened: OrderedDict[Any, _OpenedCall] = OrderedDict()
        self._lock = threading.Lock()
        self._capabilities = self._capability_headers()

    def _capability_headers(self) -> list[tuple[str, str]]:
        """What every response says of this server (WIRE section 6); nothing of a feature that is off."""
        encodings = supported_encodings() if self.options.compression_level is not None else ()
        headers = [
            (SUPPORTED_ENCODINGS_HEADER, ", ".join(encodings)),
            (EXTERNALIZATION_HEADER, "false"),
            (ACCEPT_MAX_RESPONSE_BYTES_SUPPORT_HEADER, "true"),
        ]
        if self.options.max_request_bytes is not None:
            headers.append((MAX_REQUEST_BYTES_HEADER, str(self.options.max_request_bytes)))
        if self.options.max_response_bytes is not None:
            headers.append((MAX_RESPONSE_BYTES_HEADER, str(self.options.max_response_bytes)))
        return headers

    # -- one request

    def __call__(self, request: HttpRequest) -> HttpResponse:
        """Answer *request*; never raises."""
        request_id = clean_request_id(request.get_header(REQUEST_ID_HEADER)) or new_request_id()
        try:
            response = self._route(request, request_id)
        except _HttpFailure as exc:
            response = exc.response
        except (_Refusal, StatusError) as exc:
            response = self._arrow_error(exc, request_id, getattr(exc, "http_status", 200))
        except (TransportError, DeadlineExceededError) as exc:  # while the body was read
            response = json_response(408, {"error": "request_timeout", "detail": exc.error_message})
            response.close = True
        except Exception:
            logger.exception("request %s failed", request_id)
            response = json_response(500, {"error": "internal_error", "request_id": request_id})
        response.headers += [(REQUEST_ID_HEADER, request_id), *self._capabilities, *self._cors_headers(request)]
        return response

    def _cors_headers(self, request: HttpRequest) -> list[tuple[str, str]]:
        origin = request.get_header("origin")
        allowed = self.options.cors_origins
        if not allowed or origin is None or ("*" not in allowed and origin not in allowed):
            return []
        exposed = ["WWW-Authenticate", REQUEST_ID_HEADER, CONTENT_ENCODING_HEADER, RPC_ERROR_HEADER, AUTH_REASON_HEADER]
        exposed += [name for name, _ in self._capabilities]
        headers = [("Access-Control-Expose-Headers", ", ".join(exposed))]
        headers.append(("Access-Control-Allow-Origin", "*" if "*" in allowed else origin))
        if "*" not in allowed:
            headers.append(("Vary", "Origin"))
        return headers

    def _preflight(self, request: HttpRequest) -> HttpResponse:
        headers = [("Allow", "GET, HEAD, POST, OPTIONS"), ("Cache-Control", "public, max-age=300")]
        if self._cors_headers(request) and request.get_header("access-control-request-method"):
            asked = request.get_header("access-control-request-headers") or "Content-Type"
            headers += [
                ("Access-Control-Allow-Methods", "GET, POST, OPTIONS"),
                ("Access-Control-Allow-Headers", re.sub(r"[^A-Za-z0-9_, -]", "", asked)),
                ("Access-Control-Max-Age", "7200"),
            ]
        return HttpResponse(200, headers)

    def _route(self, request: HttpRequest, request_id: str) -> HttpResponse:
        path, prefix = request.path, self.options.prefix
        if not path.startswith(prefix) or (len(path) > len(prefix) and path[len(prefix)] != "/"):
            return self._not_found(request)
        path = path[len(prefix) :] or "/"
        if request.method == "OPTIONS":
            return self._preflight(request)
        if path == "/health":
            return self._health(request)
        if "%" in path or "//" in path or not path.isascii() or "authorization" in request.repeated:
            return self._not_found(request) if "authorization" not in request.repeated else self._bad("two Authorization headers")
        segments = path[1:].split("/")
        if request.method in ("GET", "HEAD"):
            return self._get(request, segments)
        is_call = len(segments) == 2 or (len(segments) == 3 and segments[2] in ("init", "exchange"))
        if not is_call or (len(segments) == 2 and segments[0] == ""):
            return self._not_found(request)
        if request.method != "POST":
            return self._method_not_allowed("POST")
        caller = self._caller(request, request_id)
        if len(segments) == 2 and segments[1] in ("init", "exchange") and segments[0].startswith("__"):
            self.server.service(segments[0])
        return self._post(request, request_id, caller, segments)

    def _post(self, request: HttpRequest, request_id: str, caller: Caller, segments: list[str]) -> HttpResponse:
        self._check_content_type(request)
        self.server.refuse_if_draining()
        self.server.start(TransportKind.HTTP)
        body = self._body(request)
        action = segments[2] if len(segments) == 3 else ""
        handler = {"": self._unary, "init": self._init, "exchange": self._exchange}[action]
        with self.server.working():
            return handler((segments[0], segments[1]), body, caller, request, request_id)

    # -- everything that is not a call

    def _bad(self, detail: str, status: int = 400) -> HttpResponse:
        return json_response(status, {"error": "bad_request", "detail": detail})

    def _not_found(self, request: HttpRequest) -> HttpResponse:
        return json_response(404, {"error": "not_found", "detail": "expected /{protocol}/{method}[/init|/exchange] or /health"})

    def _method_not_allowed(self, allowed: str) -> HttpResponse:
        return json_response(405, {"error": "method_not_allowed", "detail": f"expected {allowed}"}, [("Allow", allowed)])

    def _health(self, request: HttpRequest) -> HttpResponse:
        if request.method not in ("GET", "HEAD"):
            return self._method_not_allowed("GET, HEAD, OPTIONS")
        status = "draining" if self.server.draining else "ok"
        facts = {"status": status, "server_id": self.server.server_id, "protocol": self.server.protocol_name}
        return json_response(200, facts, [("Cache-Control", "no-store")])

    def _get(self, request: HttpRequest, segments: list[str]) -> HttpResponse:
        if 2 <= len(segments) <= 3 and segments[0] in self.server.services and segments[1] in self.server.services[segments[0]].methods:
            return self._method_not_allowed("POST")
        return self._not_found(request)

    # -- who calls, and what they sent

    def _caller(self, request: HttpRequest, request_id: str) -> Caller:
        auth = self._authenticated(request, request_id)
        limit = self._response_limit(request)
        metadata = {k.decode(): request.headers[k.decode()] for k in TRACE_KEYS if k.decode() in request.headers}
        return Caller(TransportKind.HTTP, auth, request.remote_addr, metadata, request.gone, limit)

    def _authenticated(self, request: HttpRequest, request_id: str) -> AuthContext:
        if self.options.authenticate is None:
            return _ANONYMOUS
        try:
            auth = self.options.authenticate(request)
        except (ValueError, PermissionError) as exc:
            raise _HttpFailure(self._unauthorized(request, exc)) from None
        except Exception:
            logger.exception("authenticate raised; request %s is refused", request_id)
            raise _HttpFailure(json_response(500, {"error": "internal_error", "request_id": request_id})) from None
        if not isinstance(auth, AuthContext):
            logger.error("authenticate returned %s, not an AuthContext; request %s is refused", _got(auth), request_id)
            raise _HttpFailure(json_response(500, {"error": "internal_error", "request_id": request_id}))
        return auth

    def _unauthorized(self, request: HttpRequest, exc: Exception) -> HttpResponse:
        reason = exc.reason if isinstance(exc, AuthFailure) else AuthReason.UNAUTHORIZED
        detail = _text_of(exc)[:1000]
        challenge = getattr(self.options.authenticate, "challenge", "") or "Bearer"
        headers = [(AUTH_REASON_HEADER, reason.value), ("Cache-Control", "no-store"), ("WWW-Authenticate", challenge)]
        if "text/html" in (request.get_header("accept") or ""):
            import html

            text = f"<!doctype html><title>401</title><h1>401 Unauthorized</h1><p>{html.escape(reason.value)}: {html.escape(detail)}</p>"
            return HttpResponse(401, [("Content-Type", "text/html; charset=utf-8"), *headers], text.encode())
        return json_response(401, {"error": "unauthorized", "reason": reason.value, "detail": detail}, headers)

    def _response_limit(self, request: HttpRequest) -> int | None:
        """The smallest of the client's budget and our own cap; a budget that is not one is refused."""
        name = ACCEPT_MAX_RESPONSE_BYTES_HEADER
        given, own = request.get_header(name), self.options.max_response_bytes
        if given is None:
            return own
        low, high = MIN_RESPONSE_BUDGET, MAX_RESPONSE_BUDGET
        digits = given.isascii() and given.isdigit() and (given == "0" or given[0] != "0") and len(given) <= 16
        if name.lower() in request.repeated or not digits or not low <= int(given) <= high:
            raise ProtocolError(f"{name}: expected one decimal from {low} to {high}, got {given[:40]!r}")
        return int(given) if own is None else min(int(given), own)

    def _check_content_type(self, request: HttpRequest) -> None:
        given = request.get_header("content-type") or ""
        if given.strip().lower() != ARROW_CONTENT_TYPE:
            exc = ProtocolError(f"Content-Type: expected {ARROW_CONTENT_TYPE}, got {given[:100]!r}")
            exc.http_status = 415
            raise exc

    def _body(self, request: HttpRequest) -> bytes:
        """Read and decode the body, within the limit before and after decoding."""
        encoding = (request.get_header(CONTENT_ENCODING_HEADER) or request.get_header("content-encoding") or "identity").strip().lower()
        if encoding != "identity" and encoding not in supported_encodings():
            known = ", ".join(supported_encodings())
            exc = ProtocolError(f"Content-Encoding: expected one of {known}, got {encoding[:60]!r}")
            exc.http_status = 415
            raise exc
        body = request.read_body(self._limit)
        return body if encoding == "identity" else decompress_body(body, encoding, self._limit)

    # -- calls

    def _reader(self, source: BufferSource) -> IpcReader:
        limits = IpcLimits(self._limit, self.options.max_rows)
        try:
            return IpcReader(source, limits, self.server.ipc_validation)
        except EOFError:
            raise IPCError("request: expected an Arrow IPC stream, got an empty body") from None

    def _open(
        self, path: tuple[str, str], body: bytes, caller: Caller, request_id: str, kind: MethodType
    ) -> tuple[Call, dict[str, Any], Request]:
        """Read a request that starts a call, resolve it, and decode its arguments."""
        service = self.server.service(path[0])
        bound = self.server.method(service, path[1])
        if bound.info.method_type is not kind:
            wanted = "is a stream; post to its /init" if kind is MethodType.UNARY else "is not a stream; post without /init"
            raise ProtocolError(f"{path[1]}() {wanted}")
        source = BufferSource(body)
        request = Request(self._reader(source))
        if source.left:
            raise IPCError(f"request: {source.left} bytes after the end of the stream")
        self.server.resolve(request, path)
        arguments = read_arguments(bound.info, request)
        call = self.server.open_call(bound, caller, request, request.request_id or request_id)
        call.record.http["request_bytes"] = len(body)
        return call, arguments, request

    def _unary(self, path: tuple[str, str], body: bytes, caller: Caller, request: HttpRequest, request_id: str) -> HttpResponse:
        call, arguments, _ = self._open(path, body, caller, request_id, MethodType.UNARY)
        try:
            turn = call.begin(arguments)
            return self._respond(call, request, stream_bytes(turn.schema, turn.items), turn)
        finally:
            call.end()

    def _init(self, path: tuple[str, str], body: bytes, caller: Caller, request: HttpRequest, request_id: str) -> HttpResponse:
        call, arguments, _ = self._open(path, body, caller, request_id, MethodType.STREAM)
        try:
            turn = call.begin(arguments)
            if call.stream is None:
                return self._respond(call, request, stream_bytes(turn.schema, turn.items), turn)
            header = stream_bytes(turn.schema, turn.items) if turn.items else b""
            stream, call_id = call.stream, os.urandom(16)
            call_token = self._seal_call(call, stream, call_id)
            if stream.is_producer:
                turn = call.turn(_PLAIN_TICK)
            else:
                turn = Turn(stream.output_schema, call._logs(stream.output_schema), False)
            turn = self._with_cursor(call, stream, call_id, turn, call_token)
            return self._respond(call, request, header + stream_bytes(turn.schema, turn.items), turn)
        finally:
            call.end()

    def _exchange(self, path: tuple[str, str], body: bytes, caller: Caller, request: HttpRequest, request_id: str) -> HttpResponse:
        bound = self.server.method(self.server.service(path[0]), path[1])
        if bound.info.method_type is not MethodType.STREAM:
            raise ProtocolError(f"{path[1]}() is not a stream; post without /exchange")
        source = BufferSource(body)
        reader = self._reader(source)
        item = reader.next()
        if item is None or reader.next_message() is not None or source.left:
            raise ProtocolError("exchange: expected one batch and the end of the stream, got " + ("none" if item is None else "more"))
        batch, metadata = item[0], item[1] or {}
        opened, state = self._open_tokens(bound, caller.auth, metadata)
        caller = dataclasses.replace(caller, response_limit_bytes=_smallest(caller.response_limit_bytes, opened.limit))
        own_id = clean_request_id(metadata.get(REQUEST_ID_KEY, b"").decode("latin-1"))
        call = self.server.open_call(bound, caller, None, own_id or request_id)
        timeout = metadata.get(TIMEOUT_KEY, b"")
        if timeout.isdigit() and len(timeout) < 16:
            call.context.deadline = time.monotonic() + int(timeout) / 1000
        call.record.stream_id, call.record.http["request_bytes"] = opened.stream_id, len(body)
        try:
            stream = self._revive(call, opened, state)
            if CANCEL_KEY in metadata:
                call.cancel()
                turn = Turn(stream.output_schema, call._logs(stream.output_schema), True)
            else:
                ours = (STATE_KEY, CALL_STATE_KEY, CANCEL_KEY, TIMEOUT_KEY, REQUEST_ID_KEY)
                shown = {k: v for k, v in metadata.items() if k not in ours}
                turn = call.turn(AnnotatedBatch(batch, pa.KeyValueMetadata(shown) if shown else None))
                turn = self._with_cursor(call, stream, opened.call_id, turn)
            return self._respond(call, request, stream_bytes(turn.schema, turn.items), turn)
        except Exception as exc:
            # rehydrate() and bind_call_state() are the application's: what they raise is an answer, too.
            failed = call._failed(opened.output_schema, exc)
            return self._respond(call, request, stream_bytes(failed.schema, failed.items), failed)
        finally:
            call.end()

    # -- the two halves of a stream's state

    @staticmethod
    def _binding(bound: BoundMethod, auth: AuthContext) -> tuple[bytes, ...]:
        who = (auth.domain or "", auth.principal or "") if auth.authenticated else ("", "")
        return (bound.hosted.name.encode(), bound.info.name.encode(), who[0].encode(), who[1].encode())

    def _seal_call(self, call: Call, stream: Stream[Any, Any], call_id: bytes) -> bytes:
        limit = call.context.response_limit_bytes
        call_state = stream.call_state.serialize_to_bytes() if stream.call_state is not None else b""
        parts = (
            call_id,
            _serialized(stream.output_schema),
            _serialized(stream.input_schema),
            call_state,
            call.record.stream_id.encode(),
            b"" if limit is None else str(limit).encode(),
        )
        return self.sealer.seal(b"call", (*self._binding(call.bound, call.context.auth), call_id), pack_parts(parts))

    def _with_cursor(
        self, call: Call, stream: Stream[Any, Any], call_id: bytes, turn: Turn, call_token: bytes | None = None
    ) -> Turn:
        """Add the fresh cursor to a turn that goes on; a state that cannot be sealed turns it into an error."""
        if turn.finished:
            return turn
        try:
            state_types = call.bound.state_types
            if type(stream.state) not in state_types:
                names = ", ".join(t.__name__ for t in state_types) or "no concrete class"
                raise ParameterError(
                    f"{call.bound.info.name}() state: expected {names} (from the implementation's return annotation), "
                    f"got {type(stream.state).__name__}; over HTTP the state is read back as the annotated class"
                )
            state = stream.state.serialize_to_bytes()
            content = pack_parts((call_id, bytes([state_types.index(type(stream.state))]), state))
            cursor = self.sealer.seal(b"state", self._binding(call.bound, call.context.auth), content)
        except Exception as exc:
            return call._failed(stream.output_schema, exc)
        tokens = {STATE_KEY: cursor}
        if call_token is not None:
            tokens[CALL_STATE_KEY] = call_token
        items, at = list(turn.items), turn.data_index
        if not stream.is_producer and at is not None:
            items[at] = (items[at][0], {**(items[at][1] or {}), **tokens})
        else:
            items.append((empty_batch(stream.output_schema), tokens))
        return turn._replace(items=items)

    def _open_tokens(self, bound: BoundMethod, auth: AuthContext, metadata: _Metadata) -> tuple[_OpenedCall, bytes]:
        """Open the cursor first, and the call half that belongs to the call id found inside it."""
        binding = self._binding(bound, auth)
        content = self.sealer.open(b"state", binding, metadata.get(STATE_KEY))
        call_id, index, state = unpack_parts(content, 3)
        token = metadata.get(CALL_STATE_KEY, b"")
        cache_key = (binding, call_id, token)
        with self._lock:
            opened = self._opened.get(cache_key)
            if opened is not None:
                self._opened.move_to_end(cache_key)
        if opened is None:
            content = self.sealer.open(b"call", (*binding, call_id), token, aged=False)
            _, output, input_, call_state, stream_id, limit = unpack_parts(content, 6)
            schemas = _schema_from_bytes(output), _schema_from_bytes(input_)
            opened = _OpenedCall(call_id, *schemas, call_state, stream_id.decode(), int(limit) if limit else None)
            with self._lock:
                if self.options.call_state_cache_entries > 0:
                    self._opened[cache_key] = opened
                while len(self._opened) > self.options.call_state_cache_entries:
                    self._opened.popitem(last=False)
        if len(index) != 1 or index[0] >= len(bound.state_types):
            raise TokenError(_TOKEN_REFUSED)  # sealed by a version of the service that had other states
        return opened, index + state

    def _revive(self, call: Call, opened: _OpenedCall, content: bytes) -> Stream[Any, Any]:
        cls = cast("type[StreamState]", call.bound.state_types[content[0]])
        state = cls.deserialize_from_bytes(content[1:], IpcValidation.NONE)  # our own bytes: the seal vouches for them
        call_state = None
        if opened.call_state:
            if cls.CALL_STATE_TYPE is None:
                raise ParameterError(f"{cls.__name__}: Stream(call_state=...) was given, but CALL_STATE_TYPE is not set")
            call_state = cls.CALL_STATE_TYPE.deserialize_from_bytes(opened.call_state, IpcValidation.NONE)
        stream: Stream[Any, Any] = Stream(opened.output_schema, state, opened.input_schema, call_state=call_state)
        call._run(state.rehydrate, call.context.implementation)
        if call_state is not None:
            call._run(state.bind_call_state, call_state)
        call.stream = stream
        return stream

    # -- answers

    def _arrow_error(self, exc: BaseException, request_id: str, status: int) -> HttpResponse:
        body = stream_bytes(EMPTY_SCHEMA, [self.server.error_item(exc, EMPTY_SCHEMA, request_id)])
        headers = [("Content-Type", ARROW_CONTENT_TYPE)]
        if status == 200:
            headers.append((RPC_ERROR_HEADER, "true"))
        if status == 503:
            headers.append(("Retry-After", "1"))
        return HttpResponse(status, headers, body)

    def _respond(self, call: Call, request: HttpRequest, body: bytes, turn: Turn) -> HttpResponse:
        """Put a turn's bytes into a response: budget first, then coding."""
        limit = call.context.response_limit_bytes
        if limit is not None and len(body) > limit:
            text = f"{call.record.method}(): the answer exceeds max_response_bytes ({len(body)} > {limit})"
            failed = call._failed(EMPTY_SCHEMA, ResponseTooLargeError(text))
            turn, body = failed, stream_bytes(failed.schema, failed.items)
        headers = [("Content-Type", ARROW_CONTENT_TYPE)]
        if turn.error is not None:
            headers.append((RPC_ERROR_HEADER, "true"))
        if self.options.compression_level is not None:
            encoding, header = choose_encoding(request.headers)
            if encoding:
                body = compress_body(body, encoding, self.options.compression_level)
                headers.append((header, encoding))
        call.record.http.update(http_status=turn.status, response_bytes=len(body))
        return HttpResponse(turn.status, headers, body)


def _smallest(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


_REASONS = {
    100: "Continue", 200: "OK", 204: "No Content", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden",
    404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict", 411: "Length Required",
    413: "Content Too Large", 414: "URI Too Long", 415: "Unsupported Media Type", 429: "Too Many Requests",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 501: "Not Implemented",
    503: "Service Unavailable", 504: "Gateway Timeout", 505: "HTTP Version Not Supported",
}  # fmt: skip


@_takes_options(HttpOptions)
def make_wsgi_app(server: RpcServer, **options: Any) -> Callable[..., Iterable[bytes]]:
    """Return a WSGI application (PEP 3333) for any WSGI server; the keywords are those of `HttpOptions`.

    Raises:
        TypeError: An option that does not exist.
        ValueError: An option's value is out of range.
    """
    (chosen,) = _split_options(options, HttpOptions)
    app = HttpApp(server, chosen)

    def wsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        response = app(_request_from_environ(environ))
        body = response.body
        if isinstance(body, bytes):
            response.headers.append(("Content-Length", str(len(body))))
            body = iter([body] if environ["REQUEST_METHOD"] != "HEAD" else [])
        start_response(f"{response.status} {_REASONS.get(response.status, 'Status')}", response.headers)
        return body

    wsgi.app = app  # type: ignore[attr-defined]
    return wsgi


def _request_from_environ(environ: dict[str, Any]) -> HttpRequest:
    headers = {k[5:].replace("_", "-").lower(): v for k, v in environ.items() if k.startswith("HTTP_")}
    for name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        if environ.get(name):
            headers[name.replace("_", "-").lower()] = environ[name]

    def read_body(limit: int) -> bytes:
        source, length = environ["wsgi.input"], environ.get("CONTENT_LENGTH") or ""
        if not length and environ.get("wsgi.input_terminated"):
            body = source.read(limit + 1)
            if len(body) > limit:
                raise RequestTooLargeError(f"request body: expected at most {limit} bytes (max_request_bytes), got more")
            return cast("bytes", body)
        size = _content_length(length, limit)
        body = source.read(size)
        if len(body) < size:
            raise IPCError(f"request body: expected {size} bytes, got {len(body)}")
        return cast("bytes", body)

    raw = environ.get("RAW_URI") or environ.get("REQUEST_URI") or ""
    path = raw.partition("?")[0] if raw.startswith("/") else environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    return HttpRequest(environ["REQUEST_METHOD"], path, headers, environ.get("REMOTE_ADDR", ""), read_body)


def _content_length(text: str, limit: int) -> int:
    """Parse a Content-Length strictly: ASCII digits only (RFC 9110 section 8.6), and within the limit."""
    if not text:
        exc: ProtocolError = ProtocolError("expected a Content-Length")
        exc.http_status = 411
        raise exc
    if not (text.isascii() and text.isdigit()):
        raise ProtocolError(f"Content-Length: expected decimal digits, got {text[:40]!r}")
    if len(text) > 18 or int(text) > limit:
        raise RequestTooLargeError(f"request body: expected at most {limit} bytes (max_request_bytes), got {text[:40]}")
    return int(text)


class HttpHead(NamedTuple):
    """A parsed message head.

    Attributes:
        start: The three parts of the request line or status line.
        headers: Values by lower-case name; repeated ones joined by ", ".
        repeated: Names that came more than once.
    """

    start: tuple[str, str, str]
    headers: dict[str, str]
    repeated: frozenset[str]


_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")


def parse_http_head(raw: bytes) -> HttpHead:
    """Parse a head that ends with an empty line, strictly by RFC 9112.

    Raises:
        ProtocolError: A rule is broken; the text names it.
    """
    lines = raw[:-4].split(b"\r\n")
    if len(lines) > MAX_HEADERS + 1:
        exc = ProtocolError(f"expected at most {MAX_HEADERS} headers, got {len(lines) - 1}")
        exc.http_status = 431
        raise exc
    if b"\n" in raw.replace(b"\r\n", b"") or b"\r" in raw.replace(b"\r\n", b""):
        raise ProtocolError("a bare CR or LF in the head")
    start = lines[0].decode("latin-1").split(" ", 2)
    if len(start) != 3:
        raise ProtocolError(f"expected a start line of three parts, got {lines[0][:80]!r}")
    headers: dict[str, str] = {}
    repeated = set()
    for line in lines[1:]:
        match = _HEADER_LINE.fullmatch(line)
        if match is None:
            folded = line[:1] in (b" ", b"\t")
            raise ProtocolError(f"{'a folded header line' if folded else 'not a header line'}: {line[:80]!r}")
        name, value = match[1].decode().lower(), match[2].decode("latin-1").rstrip(" \t")
        if name in headers:
            repeated.add(name)
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return HttpHead((start[0], start[1], start[2]), headers, frozenset(repeated))


def read_http_head(channel: ByteChannel) -> HttpHead | None:
    """Read one head; ``None`` when the channel ends before its first byte.

    Raises:
        ProtocolError: A rule of the grammar or a bound (64 KiB, 100 headers) is broken.
        TransportError: The channel ends in the middle.
    """
    raw = channel.read_until(b"\r\n\r\n", MAX_HEAD_BYTES)
    if raw is not None:
        return parse_http_head(raw)
    seen = channel.peek()
    if not seen:
        return None
    if len(seen) >= MAX_HEAD_BYTES:
        exc = ProtocolError(f"the head exceeds {MAX_HEAD_BYTES} bytes")
        exc.http_status = 414 if b"\r\n" not in seen else 431
        raise exc
    raise TransportError("the connection was closed in the middle of a head")


def read_chunked(channel: ByteChannel, limit: int) -> Iterator[bytes]:
    """Yield the pieces of a chunked body (RFC 9112 section 7.1); trailers are read and dropped.

    Raises:
        ProtocolError: The framing is wrong.
        RequestTooLargeError: More than *limit* bytes.
    """
    total = 0
    while True:
        line = channel.read_until(b"\r\n", 1024)
        match = re.fullmatch(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n", line or b"")
        if match is None:
            raise ProtocolError(f"chunk: expected a size in hexadecimal digits, got {(line or channel.peek())[:40]!r}")
        size = int(match[1], 16)
        total += size
        if total > limit:
            raise RequestTooLargeError(f"body: expected at most {limit} bytes, got at least {total}")
        if not size:
            break
        piece = channel.read(size)
        if len(piece) < size or channel.read(2) != b"\r\n":
            raise ProtocolError("chunk: its data is not followed by CR LF")
        yield piece
    for _ in range(MAX_HEADERS):
        line = channel.read_until(b"\r\n", 8192)
        if line == b"\r\n":
            return
        if line is None:
            break
    raise ProtocolError("chunk: trailers that do not end")


class _HttpConnection:
    """Serves the requests of one connection: reads strictly, answers, closes when the framing is in doubt."""

    def __init__(self, owner: HttpServing, channel: SocketChannel, remote_addr: str, only_health: bool) -> None:
        self._owner, self._channel, self._remote = owner, channel, remote_addr
        self._only_health = only_health

    def run(self) -> None:
        """Serve until either side closes."""
        with contextlib.suppress(TransportError, DeadlineExceededError):
            while self._serve_one():
                pass

    def _serve_one(self) -> bool:
        channel, options = self._channel, self._owner.options
        channel.gap = options.read_timeout
        channel.deadline = time.monotonic() + options.keep_alive_timeout
        if not channel.peek() and not channel._fill():
            return False
        started = time.monotonic()
        channel.deadline = started + options.read_timeout  # for the whole head: one byte a second does not pass
        head: HttpHead | None = None
        try:
            if not channel.peek()[:1].isalpha():
                raise ProtocolError("expected an HTTP request line")
            head = read_http_head(channel)
            if head is None:
                return False
            request = self._request(head, started + options.request_deadline)
            keep = self._keeps_alive(head)
        except ProtocolError as exc:
            response = json_response(exc.http_status, {"error": "bad_request", "detail": str(exc)})
            response.headers += [(REQUEST_ID_HEADER, new_request_id()), *self._owner.app._capabilities]
            self._send(response, head.start[0] if head else "GET", keep=False)
            return False
        if self._only_health and not request.path.endswith("/health"):
            response, keep = self._owner.busy_response(), False
        else:
            response = self._owner.app(request)
        if not self._body_was_read:
            # What was not read must not be taken for the next request.
            keep = keep and not self._has_body(head)
        channel.deadline = time.monotonic() + options.request_deadline
        keep = keep and not response.close and not self._owner.app.server.draining
        self._send(response, request.method, keep)
        return keep

    @staticmethod
    def _has_body(head: HttpHead) -> bool:
        return "transfer-encoding" in head.headers or head.headers.get("content-length", "0") != "0"

    @staticmethod
    def _keeps_alive(head: HttpHead) -> bool:
        tokens = [t.strip().lower() for t in head.headers.get("connection", "").split(",")]
        return "close" not in tokens and (head.start[2] == "HTTP/1.1" or "keep-alive" in tokens)

    def _request(self, head: HttpHead, deadline: float) -> HttpRequest:
        """Check what RFC 9112 asks of a request's head, and set up the reading of its body."""
        method, target, version = head.start
        if not re.fullmatch(r"HTTP/[0-9]\.[0-9]", version):
            raise ProtocolError(f"expected HTTP/1.1, got {version[:40]!r}")
        if version not in ("HTTP/1.1", "HTTP/1.0"):
            raise _with_status(ProtocolError(f"expected HTTP/1.1, got {version}"), 505)
        if not re.fullmatch(r"[A-Z]{1,20}", method):
            raise ProtocolError(f"not a method: {method[:40]!r}")
        if not target.startswith("/") and not (target == "*" and method == "OPTIONS"):
            raise ProtocolError("the request target must be a path")
        if len(target) > 8192:
            raise _with_status(ProtocolError("the request target exceeds 8192 bytes"), 414)
        if any(not 33 <= ord(c) < 127 and ord(c) < 128 for c in target):
            raise ProtocolError("a control character in the request target")
        for name in ("content-length", "host", "transfer-encoding", "content-type", "content-encoding", "authorization"):
            if name in head.repeated:
                raise ProtocolError(f"two {name} headers")
        if version == "HTTP/1.1" and "host" not in head.headers:
            raise ProtocolError("HTTP/1.1 requires a Host header")
        coding = head.headers.get("transfer-encoding")
        if coding is not None and "content-length" in head.headers:
            raise ProtocolError("both Transfer-Encoding and Content-Length")
        if coding is not None and coding.lower() != "chunked":
            raise _with_status(ProtocolError(f"Transfer-Encoding: expected chunked, got {coding[:40]!r}"), 501)
        length = head.headers.get("content-length")
        if length is not None and not (length.isascii() and length.isdigit()):
            raise ProtocolError(f"Content-Length: expected decimal digits, got {length[:40]!r}")
        if method == "POST" and coding is None and length is None:
            raise _with_status(ProtocolError("POST requires a Content-Length"), 411)
        path = target.partition("?")[0]
        self._body_was_read = False
        read = functools.partial(self._read_body, head, deadline)
        return HttpRequest(method, path, head.headers, self._remote, read, head.repeated, self._channel.peer_gone)

    def _read_body(self, head: HttpHead, deadline: float, limit: int) -> bytes:
        channel = self._channel
        channel.deadline = deadline
        chunked = "transfer-encoding" in head.headers
        size = 0 if chunked else _content_length(head.headers.get("content-length", ""), limit)
        if head.headers.get("expect", "").lower() == "100-continue":
            channel.write([b"HTTP/1.1 100 Continue\r\n\r\n"])
        if chunked:
            body = b"".join(read_chunked(channel, limit))
        else:
            body = cast("bytes", channel.read_after(b"", size)) if size > SMALL_BODY_BYTES else channel.read(size)
            if len(body) < size:
                raise TransportError(f"request body: expected {size} bytes, got {len(body)}")
        self._body_was_read = True
        return body

    def _send(self, response: HttpResponse, method: str, keep: bool) -> None:
        reason = _REASONS.get(response.status, "Status")
        lines = [f"HTTP/1.1 {response.status} {reason}"]
        lines += [f"{name}: {value}" for name, value in response.headers]
        lines.append(f"Date: {_http_date(int(time.time()))}")
        if not keep:
            lines.append("Connection: close")
        body = response.body
        if isinstance(body, bytes):
            lines.append(f"Content-Length: {len(body)}")
        else:
            lines.append("Transfer-Encoding: chunked")
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")
        if method == "HEAD" or isinstance(body, bytes):
            self._channel.write([head] if method == "HEAD" or not body else [head, cast("bytes", body)])
            return
        self._channel.write([head])
        for piece in body:
            if piece:
                self._channel.write([b"%x\r\n" % len(piece), piece, b"\r\n"])
        self._channel.write([b"0\r\n\r\n"])


def _with_status(exc: ProtocolError, status: int) -> ProtocolError:
    exc.http_status = status
    return exc


@functools.lru_cache(maxsize=2)
def _http_date(second: int) -> str:
    from email.utils import formatdate

    return formatdate(second, usegmt=True)


@dataclass
class HttpServeOptions:
    """What `serve_http` can be told beside `HttpOptions`.

    Attributes:
        tls_context: Server-side context of the standard library's ``ssl``; ``None`` for plain HTTP.
        max_connections: At most so many at a time; further ones are answered 503, except for health.
        read_timeout: Seconds for a head, and between two reads of a body.
        request_deadline: Seconds for reading one request, and for sending its answer.
        keep_alive_timeout: Seconds that an idle connection is kept.
        drain_grace_seconds: Seconds that running calls have to finish after SIGTERM or SIGINT.
        on_bound: Called with host and port once connections are accepted.
    """

    tls_context: Any = None
    max_connections: int = 512
    read_timeout: float = READ_TIMEOUT_SECONDS
    request_deadline: float = REQUEST_DEADLINE_SECONDS
    keep_alive_timeout: float = 75.0
    drain_grace_seconds: float = DRAIN_GRACE_SECONDS
    on_bound: Callable[[str, int], None] | None = None


class HttpServing:
    """An HTTP server on a bound socket: a thread per connection, a cap on them, a clean stop.

    Args:
        app: Answers the requests.
        host: Address to bind.
        port: 0 takes a free one.
        options: See `HttpServeOptions`.

    Attributes:
        port: The port that was bound.

    Raises:
        OSError: The address is in use, or cannot be bound.
    """

    _RESERVE = 16  # connections beyond the cap that may still ask for health

    def __init__(self, app: HttpApp, host: str, port: int, options: HttpServeOptions | None = None) -> None:
        self.app, self.host = app, host
        self.options = options or HttpServeOptions()
        listening = listen_tcp(host, port)
        self.port = listening.getsockname()[1]
        self.listener = Listener(listening, self._handle, threaded=True)

    def _handle(self, connected: socket.socket, address: Any) -> None:
        over = len(self.listener._connections) - self.options.max_connections
        try:
            if over > self._RESERVE:
                connected.settimeout(1.0)
                connected.sendall(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            ready = _start_tls(connected, self.options.tls_context)
        except OSError as exc:
            logger.debug("connection from %s: %s", _address_text(address), exc)
            return
        with ready:
            _HttpConnection(self, SocketChannel(ready), _address_text(address), over > 0).run()

    def busy_response(self) -> HttpResponse:
        """Return the answer to a connection beyond the cap."""
        facts = {"error": "too_many_connections", "detail": f"this server takes {self.options.max_connections} at a time"}
        return json_response(503, facts, [("Retry-After", "1"), *self.app._capabilities])

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or `stop`; then drain and close."""
        run_listener(self.app.server, self.listener, self.options.drain_grace_seconds)

    def stop(self) -> None:
        """Have `run` return; from any thread."""
        self.listener.stop()


@_takes_options(HttpOptions, HttpServeOptions)
def serve_http(server: RpcServer, *, host: str = "127.0.0.1", port: int = 0, **options: Any) -> None:
    """Serve over HTTP/1.1 until SIGTERM or SIGINT; the keywords are those of `HttpOptions` and `HttpServeOptions`.

    Raises:
        OSError: The address is in use, or cannot be bound.
        TypeError: An option that does not exist.
        ValueError: An option's value is out of range.
    """
    chosen, serving = _split_options(options, HttpOptions, HttpServeOptions)
    http = HttpServing(HttpApp(server, chosen), host, port, serving)
    if serving.on_bound is not None:
        serving.on_bound(host, http.port)
    http.run()


# ============================================================================
# 16. HTTP CLIENT ....................................... uses 1-15
# ============================================================================
# The HTTP channel: kept-alive connections, budgets, codings, redirects, the environment's proxies, as a ClientChannel.
# Law: what a server sends is bounded before it is kept; a call is sent once, never retried behind the caller's back.


@dataclass(frozen=True)
class HttpServerCapabilities:
    """What a server says of itself in its headers; sizes in bytes, ``None`` for no limit.

    Attributes:
        max_request_bytes: Largest request body.
        max_response_bytes: Largest answer.
        max_externalized_response_bytes: Largest answer by way of external storage.
        externalization_enabled: Whether it may answer with pointers to external storage.
        upload_url_support: Whether it hands out upload URLs.
        max_upload_bytes: Largest upload.
        supported_encodings: Body codings it reads and writes.
        accept_max_response_bytes_support: Whether it honours a client's budget.
    """

    max_request_bytes: int | None = None
    max_response_bytes: int | None = None
    max_externalized_response_bytes: int | None = None
    externalization_enabled: bool = False
    upload_url_support: bool = False
    max_upload_bytes: int | None = None
    supported_encodings: tuple[str, ...] = ()
    accept_max_response_bytes_support: bool = False

    @classmethod
    def from_headers(cls, headers: Mapping[str, str]) -> HttpServerCapabilities:
        """Read them from headers by lower-case name; what cannot be read counts as absent."""

        def number(name: str) -> int | None:
            text = headers.get(name.lower(), "")
            return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None

        def flag(name: str) -> bool:
            return headers.get(name.lower()) == "true"

        return cls(
            number(MAX_REQUEST_BYTES_HEADER),
            number(MAX_RESPONSE_BYTES_HEADER),
            number("VGI-Max-Externalized-Response-Bytes"),
            flag(EXTERNALIZATION_HEADER),
            flag("VGI-Upload-URL-Support"),
            number("VGI-Max-Upload-Bytes"),
            tuple(e.strip() for e in headers.get(SUPPORTED_ENCODINGS_HEADER.lower(), "").split(",") if e.strip()),
            flag(ACCEPT_MAX_RESPONSE_BYTES_SUPPORT_HEADER),
        )


class HttpReply(NamedTuple):
    """An HTTP answer: status, headers by lower-case name, body (decoded)."""

    status: int
    headers: dict[str, str]
    body: _Buffer


class HttpSender:
    """Sends one HTTP request and returns its answer: over sockets (`HttpConnections`), or into an app (`SyncClient`)."""

    def send(
        self, method: str, path: str, headers: Sequence[tuple[str, str]], body: bytes, deadline: float | None, limit: int
    ) -> HttpReply:
        """Send a request; raise `TransportError` when no answer comes, `ResponseTooLargeError` when it exceeds *limit*."""
        raise io.UnsupportedOperation("send")

    def close(self) -> None:
        """Give back connections."""


@dataclass(frozen=True)
class HttpTarget:
    """Where an HTTP client connects.

    Attributes:
        tls: Whether the scheme is https.
        host: Host name or address.
        port: Port.
        prefix: Path in front of every request, without a slash at its end.
        proxy: (host, port, ``Proxy-Authorization`` value or empty) from the environment, ``None`` for none.
    """

    tls: bool
    host: str
    port: int
    prefix: str
    proxy: tuple[str, int, str] | None = None

    @classmethod
    def parse(cls, url: str) -> HttpTarget:
        """Read a base URL, and the environment's proxy for it as urllib reads it.

        Raises:
            ValueError: Not an http(s) URL with a host.
        """
        from urllib.parse import urlsplit

        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as exc:
            raise ValueError(f"base URL {url!r}: {exc}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
            raise ValueError(f"base URL: expected http(s)://host[:port][/prefix], got {url!r}")
        if not re.fullmatch(r"[!-~]*", url):
            raise ValueError("base URL: a space or control character in it")
        tls = parts.scheme == "https"
        proxy = _environment_proxy(parts.scheme, parts.netloc, parts.hostname)
        return cls(tls, parts.hostname, port or (443 if tls else 80), parts.path.rstrip("/"), proxy)

    @property
    def authority(self) -> str:
        """Host and port as the Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


def _environment_proxy(scheme: str, netloc: str, host: str) -> tuple[str, int, str] | None:
    """The proxy that urllib would use; urllib itself is only loaded where there may be one."""
    if sys.platform not in ("darwin", "win32") and not any(k.lower().endswith("_proxy") for k in os.environ):
        return None
    from urllib.parse import unquote, urlsplit
    from urllib.request import getproxies, proxy_bypass

    url = getproxies().get(scheme)
    if not url or proxy_bypass(netloc) or proxy_bypass(host):
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if not parts.hostname:
        return None
    credentials = ""
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        credentials = "Basic " + base64.b64encode(pair.encode()).decode()
    return parts.hostname, parts.port or 80, credentials


class HttpConnections(HttpSender):
    """Kept-alive connections to one server; safe for use by several threads, each call on a connection of its own.

    Args:
        target: Where to.
        tls_context: For https; default ``ssl.create_default_context()``.
        connect_timeout: Seconds.
    """

    _MAX_IDLE = 8

    def __init__(self, target: HttpTarget, tls_context: ssl.SSLContext | None = None, connect_timeout: float = 10.0) -> None:
        self._target, self._timeout = target, connect_timeout
        if target.tls and tls_context is None:
            import ssl

            tls_context = ssl.create_default_context()
        self._tls = tls_context if target.tls else None
        self._idle: deque[SocketChannel] = deque()
        self._closed = False

    def _dial(self, deadline: float | None) -> SocketChannel:
        target = self._target
        timeout = self._timeout if deadline is None else max(0.001, min(self._timeout, deadline - time.monotonic()))
        if target.proxy is None:
            return SocketChannel(connect_tcp_socket(target.host, target.port, timeout, self._tls))
        host, port, credentials = target.proxy
        connected = connect_tcp_socket(host, port, timeout)
        if self._tls is None:
            return SocketChannel(connected)
        channel = SocketChannel(connected)
        channel.deadline = deadline
        authorization = f"Proxy-Authorization: {credentials}\r\n" if credentials else ""
        where = f"{target.host}:{target.port}"
        channel.write([f"CONNECT {where} HTTP/1.1\r\nHost: {where}\r\n{authorization}\r\n".encode("latin-1")])
        head = read_http_head(channel)
        if head is None or head.start[1] != "200":
            channel.close()
            raise TransportError(f"proxy {host}:{port} refused: {' '.join(head.start[1:]) if head else 'no answer'}")
        return SocketChannel(self._tls.wrap_socket(connected, server_hostname=target.host))

    def _take(self) -> SocketChannel | None:
        while True:
            try:
                channel = self._idle.pop()
            except IndexError:
                return None
            if not channel.peer_gone() and not channel.peek():
                return channel
            channel.close()

    def send(
        self, method: str, path: str, headers: Sequence[tuple[str, str]], body: bytes, deadline: float | None, limit: int
    ) -> HttpReply:
        if self._closed:
            raise TransportError("the connection is closed: it was closed here")
        message = self._message(method, path, headers, body)
        channel = self._take()
        if channel is not None:
            try:
                return self._exchange(channel, method, message, deadline, limit)
            except _NoAnswer:
                pass  # closed between two calls, and not a byte came back: the one case in which a request is sent again
        channel = self._dial(deadline)
        try:
            return self._exchange(channel, method, message, deadline, limit)
        except _NoAnswer as exc:
            raise TransportError(f"{self._target.authority} closed the connection without an answer: {exc}") from None

    def _message(self, method: str, path: str, headers: Sequence[tuple[str, str]], body: bytes) -> list[bytes]:
        target = self._target
        through = target.proxy is not None and not target.tls
        url = f"http://{target.authority}{path}" if through else path
        lines = [f"{method} {url} HTTP/1.1", f"Host: {target.authority}"]
        if through and target.proxy and target.proxy[2]:
            lines.append(f"Proxy-Authorization: {target.proxy[2]}")
        lines += [f"{name}: {value}" for name, value in headers]
        if body or method == "POST":
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join(lines)
        if "\r" in head.replace("\r\n", "") or "\n" in head.replace("\r\n", "") or "\0" in head or head.count("\r\n") != len(lines) - 1:
            raise ValueError("a header contains a line break")
        return [(head + "\r\n\r\n").encode("latin-1"), body]

    def _exchange(self, channel: SocketChannel, method: str, message: list[bytes], deadline: float | None, limit: int) -> HttpReply:
        try:
            channel.deadline = deadline
            try:
                channel.write(message)
                head = read_http_head(channel)
            except DeadlineExceededError:
                raise
            except TransportError as exc:
                if channel.peek():
                    raise
                raise _NoAnswer(exc.error_message) from None
            if head is None:
                raise _NoAnswer("connection closed")
            while head.start[1] == "100":
                head = read_http_head(channel)
                if head is None:
                    raise TransportError("the connection was closed in the middle of an answer")
            reply, keep = self._read_reply(channel, method, head, limit)
        except ProtocolError as exc:
            channel.close()
            if isinstance(exc, RequestTooLargeError):
                raise ResponseTooLargeError(f"the answer exceeds what this client accepts: {exc}") from None
            raise TransportError(f"{self._target.authority} does not speak HTTP as it should: {exc}") from None
        except BaseException:
            channel.close()
            raise
        if keep and len(self._idle) < self._MAX_IDLE and not self._closed:
            self._idle.append(channel)
        else:
            channel.close()
        return reply

    @staticmethod
    def _read_reply(channel: SocketChannel, method: str, head: HttpHead, limit: int) -> tuple[HttpReply, bool]:
        version, status, _ = head.start
        if not re.fullmatch(r"HTTP/1\.[01]", version) or not re.fullmatch(r"[1-5][0-9][0-9]", status):
            raise ProtocolError(f"expected a status line, got {' '.join(head.start)[:80]!r}")
        headers, code = head.headers, int(status)
        keep = version == "HTTP/1.1" and "close" not in headers.get("connection", "").lower()
        if "content-length" in head.repeated or ("content-length" in headers and "transfer-encoding" in headers):
            raise ProtocolError("an answer with two lengths")
        body: _Buffer
        if method == "HEAD" or code in (204, 304):
            body = b""
        elif "transfer-encoding" in headers:
            if headers["transfer-encoding"].lower() != "chunked":
                raise ProtocolError(f"Transfer-Encoding: expected chunked, got {headers['transfer-encoding'][:40]!r}")
            body = b"".join(read_chunked(channel, limit))
        elif "content-length" in headers:
            size = _content_length(headers["content-length"], limit)
            body = channel.read_after(b"", size)
            if len(body) < size:
                raise TransportError(f"half an answer: expected {size} bytes, got {len(body)}")
        else:
            keep, body = False, channel.read(limit + 1)
            if len(body) > limit:
                raise RequestTooLargeError(f"body: expected at most {limit} bytes, got more")
        encoding = headers.get(CONTENT_ENCODING_HEADER.lower()) or headers.get("content-encoding") or "identity"
        if encoding in supported_encodings():
            body = decompress_body(body, encoding, limit)
        elif encoding != "identity":
            raise ProtocolError(f"Content-Encoding: expected one of {', '.join(supported_encodings())}, got {encoding[:40]!r}")
        return HttpReply(code, headers, body), keep

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().close()


class _NoAnswer(Exception):
    """The connection ended before a byte of the answer."""


class SyncClient(HttpSender):
    """Calls an `HttpApp` in the same thread, without a socket: for tests. Made by `make_sync_client`."""

    def __init__(self, app: HttpApp) -> None:
        self.app = app
        self.prefix = app.options.prefix

    def send(
        self, method: str, path: str, headers: Sequence[tuple[str, str]], body: bytes, deadline: float | None, limit: int
    ) -> HttpReply:
        def read_body(most: int) -> bytes:
            _content_length(str(len(body)), most)
            return body

        request = HttpRequest(method, path, {k.lower(): v for k, v in headers}, "sync", read_body)
        response = self.app(request)
        answered = {k.lower(): v for k, v in response.headers}
        whole: _Buffer = response.body if isinstance(response.body, bytes) else b"".join(response.body)
        encoding = answered.get(CONTENT_ENCODING_HEADER.lower()) or answered.get("content-encoding")
        if encoding:
            whole = decompress_body(whole, encoding, limit)
        return HttpReply(response.status, answered, whole)


Headers = Union[Mapping[str, str], Callable[[], Mapping[str, str]]]


class HttpClient(ClientChannel):
    """The HTTP implementation of a `ClientChannel`; safe for use by several threads.

    Args:
        sender: Sends requests.
        prefix: Path in front of every request.
        headers: Further headers, or a function that gives them for each request (a bearer token that changes, say).
        compression_level: 1 to 9; ``None`` neither compresses nor asks for compressed answers.
        max_response_bytes: What is asked for and read at most, decoded; ``None`` for the largest that the wire knows.
    """

    def __init__(
        self,
        sender: HttpSender,
        prefix: str = "",
        headers: Headers | None = None,
        compression_level: int | None = 1,
        max_response_bytes: int | None = CLIENT_MAX_RESPONSE_BYTES,
    ) -> None:
        if max_response_bytes is not None and not MIN_RESPONSE_BUDGET <= max_response_bytes <= MAX_RESPONSE_BUDGET:
            raise ValueError(f"accepted_max_response_bytes: expected {MIN_RESPONSE_BUDGET} to 2**53-1, got {max_response_bytes}")
        self._sender, self._prefix, self._level = sender, prefix, compression_level
        self._headers = headers
        self._budget = max_response_bytes or MAX_RESPONSE_BUDGET
        self._capabilities: HttpServerCapabilities | None = None
        accept = ", ".join(supported_encodings()) if compression_level is not None else "identity"
        self._fixed = [
            ("Content-Type", ARROW_CONTENT_TYPE),
            ("Accept-Encoding", accept),
            (ACCEPT_MAX_RESPONSE_BYTES_HEADER, str(self._budget)),
        ]

    def _own_headers(self) -> list[tuple[str, str]]:
        given = self._headers() if callable(self._headers) else self._headers
        return list(given.items()) if given else []

    def capabilities(self, deadline: float | None = None) -> HttpServerCapabilities:
        """Ask ``HEAD /health`` once what the server can do.

        Raises:
            TransportError: It cannot be reached.
        """
        if self._capabilities is None:
            reply = self._sender.send("HEAD", f"{self._prefix}/health", self._own_headers(), b"", deadline, MAX_HEAD_BYTES)
            if reply.status == 401:
                raise self._unauthorized(reply)
            self._capabilities = HttpServerCapabilities.from_headers(reply.headers if reply.status < 300 else {})
        return self._capabilities

    def post(self, path: str, body: bytes, deadline: float | None) -> HttpReply:
        """Post Arrow, return an answer in Arrow.

        Raises:
            AuthenticationError: 401.
            TransportError: No answer, or one that is not Arrow.
            ResponseTooLargeError: More than the budget.
        """
        server = self.capabilities(deadline)
        headers = [*self._fixed, *self._own_headers()]
        if self._level is not None and len(body) >= _COMPRESS_FROM_BYTES:
            body, encoding = self._compressed(body, server)
            headers += [("Content-Encoding", encoding)] if encoding else []
        if server.max_request_bytes is not None and len(body) > server.max_request_bytes:
            raise RpcError(
                "RequestTooLargeError",
                f"the server takes requests of at most {server.max_request_bytes} bytes, this one has {len(body)}",
                "",
                error_code=Code.RESOURCE_EXHAUSTED,
            )
        path = self._prefix + path
        for _ in range(3):
            try:
                reply = self._sender.send("POST", path, headers, body, deadline, self._budget)
            except ResponseTooLargeError as exc:
                raise RpcError("ResponseTooLargeError", str(exc), "", error_code=Code.RESOURCE_EXHAUSTED) from None
            except IPCError as exc:
                raise TransportError(f"the answer does not decode: {exc}") from None
            if reply.status not in (307, 308):
                break
            path = self._redirected(reply, path)
        return self._checked(reply)

    @staticmethod
    def _redirected(reply: HttpReply, path: str) -> str:
        """Follow a redirect within the same server; one that leads elsewhere would carry the credentials there."""
        where = reply.headers.get("location", "")
        if not where.startswith("/") or where.startswith("//"):
            raise TransportError(f"the server redirects {path} to {where[:200]!r}; connect there instead")
        return where

    def _compressed(self, body: bytes, server: HttpServerCapabilities) -> tuple[bytes, str]:
        for encoding in supported_encodings():
            if encoding in server.supported_encodings:
                packed = compress_body(body, encoding, self._level or 1)
                return (packed, encoding) if len(packed) < len(body) else (body, "")
        return body, ""

    def _checked(self, reply: HttpReply) -> HttpReply:
        kind = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
        if reply.status == 401:
            raise self._unauthorized(reply)
        if kind != ARROW_CONTENT_TYPE:
            text = bytes(memoryview(reply.body)[:500]).decode("utf-8", "replace").strip()
            if reply.status in (408, 504):
                raise DeadlineExceededError(f"HTTP {reply.status}: {text}")
            raise TransportError(f"expected Arrow, got HTTP {reply.status} {kind or 'without a type'}: {text}")
        return reply

    @staticmethod
    def _unauthorized(reply: HttpReply) -> AuthenticationError:
        facts = _json_object(bytes(memoryview(reply.body)[:65_536]))
        named = facts.get("reason") or reply.headers.get(AUTH_REASON_HEADER.lower())
        try:
            reason = AuthReason(str(named))
        except ValueError:
            reason = AuthReason.UNAUTHORIZED
        return AuthenticationError(f"{reason}: {facts.get('detail') or 'HTTP 401'}", reason=reason)

    # -- calls

    def unary(self, info: RpcMethodInfo, batch: pa.RecordBatch, options: CallOptions) -> Any:
        body = _request_body(info, batch, options)
        reply = self.post(f"/{info.protocol_name}/{info.name}", body, options.deadline)
        item = next_reply_item(_open_answer(BufferSource(reply.body), options), options)
        if item is None:
            raise TransportError(f"{info.name}(): expected a result, got an end of stream")
        return read_result(info, item.batch)

    def stream(self, info: RpcMethodInfo, batch: pa.RecordBatch, options: CallOptions) -> ClientStream:
        path = f"/{info.protocol_name}/{info.name}"
        reply = self.post(f"{path}/init", _request_body(info, batch, options), options.deadline)
        stream = _HttpClientStream(self, info, options)
        source = BufferSource(reply.body)
        if info.header is not None:
            reader = _open_answer(source, options)
            item = _answer_item(reader, options)
            if item is None:
                raise TransportError(f"{info.name}(): expected a header, got an end of stream")
            stream.header = item.batch
            _answer_call(reader.skip)
        stream.take(source)
        return stream

    def resume(self, info: RpcMethodInfo, token: bytes, options: CallOptions) -> ClientStream:
        stream = _HttpClientStream(self, info, options)
        stream.restore(token)
        return stream

    def close(self) -> None:
        self._sender.close()


def _answer_call(call: Callable[..., _T], *args: Any) -> _T:
    """Read from an answer: bytes that are not Arrow are the transport's failure."""
    try:
        return call(*args)
    except (IPCError, EOFError) as exc:
        raise TransportError(f"the answer is not what it should be: {_text_of(exc) or 'it is empty'}") from None


def _open_answer(source: BufferSource, options: CallOptions) -> IpcReader:
    return _answer_call(functools.partial(IpcReader, source, validation=options.ipc_validation))


def _answer_item(reader: IpcReader, options: CallOptions) -> ReplyItem | None:
    return _answer_call(next_reply_item, reader, options)


def _request_body(info: RpcMethodInfo, batch: pa.RecordBatch, options: CallOptions) -> bytes:
    metadata = request_metadata(info, options.version, new_request_id(), options.timeout)
    return stream_bytes(batch.schema, [(batch, metadata)])


class _HttpClientStream(ClientStream):
    """A stream over HTTP: the tokens it was last given, and batches that came and were not handed out yet."""

    def __init__(self, client: HttpClient, info: RpcMethodInfo, options: CallOptions) -> None:
        self._client, self._info, self._options = client, info, options
        self._path = f"/{info.protocol_name}/{info.name}/exchange"
        self._call_token = b""
        self._cursor: bytes | None = None
        self._waiting: deque[AnnotatedBatch] = deque()
        self._handed_out = 0  # data batches handed out since the cursor that `token` would save
        self._saved: bytes | None = None  # the cursor from which the waiting batches were made

    def take(self, source: BufferSource) -> None:
        """Read an answer's output stream: data batches, and the tokens by their keys."""
        reader = _open_answer(source, self._options)
        self._cursor = None
        while True:
            item = _answer_item(reader, self._options)
            if item is None:
                return
            metadata = item.metadata or {}
            if CALL_STATE_KEY in metadata:
                self._call_token = metadata[CALL_STATE_KEY]
            if STATE_KEY in metadata:
                self._cursor = metadata[STATE_KEY]
            if item.kind is BatchKind.DATA:
                self._waiting.append(item.annotated())

    def _post(self, batch: pa.RecordBatch, metadata: Mapping[bytes, bytes]) -> HttpReply:
        tokens = {**metadata, STATE_KEY: self._cursor or b"", CALL_STATE_KEY: self._call_token}
        if self._options.timeout is not None:
            tokens[TIMEOUT_KEY] = str(max(1, int(self._options.timeout * 1000))).encode()
        return self._client.post(self._path, stream_bytes(batch.schema, [(batch, tokens)]), self._options.deadline)

    def turn(self, given: AnnotatedBatch) -> AnnotatedBatch | None:
        if self._waiting:
            self._handed_out += 1
            return self._waiting.popleft()
        if self._cursor is None:
            self.done = True
            return None
        try:
            self._saved, self._handed_out = self._cursor, 0
            reply = self._post(given.batch, dict(given.custom_metadata or {}))
            self.take(BufferSource(reply.body))
        except BaseException:
            self.done = True
            raise
        if not self._waiting:
            self.done = self._cursor is None
            return None if self.done else self.turn(given)
        self._handed_out = 1
        return self._waiting.popleft()

    def token(self) -> bytes:
        if self.done or (self._cursor is None and not self._waiting):
            raise RpcError("ProtocolError", f"the stream of {self._info.name}() is over: nothing to resume", "")
        cursor, skip = (self._saved, self._handed_out) if self._waiting else (self._cursor, 0)
        if cursor is None:
            raise RpcError("ProtocolError", "no token yet: read the batches that came with the start of the stream first", "")
        facts = {"method": self._info.name, "state": cursor.decode(), "call": self._call_token.decode(), "skip": skip}
        return json.dumps(facts).encode()

    def restore(self, token: bytes) -> None:
        """Take over what `token` saved."""
        facts = _json_object(token)
        if facts.get("method") != self._info.name or not isinstance(facts.get("state"), str) or not isinstance(facts.get("call"), str):
            raise RpcError("ProtocolError", f"resume: expected a token of {self._info.name}(), as session.token() gives it", "")
        self._cursor, self._call_token = facts["state"].encode(), facts["call"].encode()
        for _ in range(int(facts.get("skip") or 0)):
            if self.turn(_PLAIN_TICK) is None:
                return

    def close(self) -> None:
        """Nothing to tell the server: it keeps nothing of a stream between turns."""
        self.done = True
        self._waiting.clear()

    def cancel(self) -> None:
        self._waiting.clear()
        if self._cursor is not None:
            try:
                self._post(_TICK, {CANCEL_KEY: b"1"})
            except RpcError as exc:
                logger.debug("cancel of %s: %s", self._info.name, exc)
        self.done = True


# ============================================================================
# 17. ENTRY POINTS ...................................... uses 1-16
# ============================================================================
# What most programs call: one function per way to serve and per way to connect. Each connect function is a context
# manager that gives the typed proxy and closes the connection; the keywords mean the same everywhere.


@contextlib.contextmanager
def serve_pipe(
    protocol: type[_P],
    implementation: Any,
    *,
    on_log: Callable[[Message], None] | None = None,
    timeout: float | None = None,
    ipc_validation: IpcValidation | None = None,
) -> Iterator[_P]:
    """Serve *implementation* in a thread of this process, over a pair of pipes, and give a proxy to it.

    Args:
        protocol: The Protocol class.
        implementation: The object that serves it.
        on_log: Takes the server's log lines.
        timeout: Seconds per call or turn, ``None`` for no limit.
        ipc_validation: How much of each batch is checked, on both sides; default: every value.

    Raises:
        TypeError: The implementation does not fit the protocol.
    """
    server = RpcServer(protocol, implementation, ipc_validation=ipc_validation)
    client, serving = make_pipe_pair()

    def serve() -> None:
        try:
            server.serve(serving)
        finally:
            serving.close()

    thread = threading.Thread(target=serve, daemon=True, name="vgi_rpc serve_pipe")
    thread.start()
    try:
        options: dict[str, Any] = {"timeout": timeout, "ipc_validation": ipc_validation or IpcValidation.FULL}
        with RpcConnection(protocol, client, on_log, **options) as proxy:
            yield proxy
    finally:
        client.close()
        thread.join(WORKER_EXIT_SECONDS)


@contextlib.contextmanager
def connect(
    protocol: type[_P],
    cmd: Sequence[str],
    *,
    on_log: Callable[[Message], None] | None = None,
    stderr: StderrMode = StderrMode.INHERIT,
    stderr_logger: logging.Logger | None = None,
    timeout: float | None = None,
    ipc_validation: IpcValidation = IpcValidation.FULL,
) -> Iterator[_P]:
    """Start a worker and give a proxy to it; on leaving, its stdin is closed and it is reaped.

    Args:
        protocol: The Protocol class.
        cmd: Program and arguments; the program calls `run_server`.
        on_log: Takes the server's log lines.
        stderr: Where the worker's standard error goes.
        stderr_logger: For ``StderrMode.PIPE``.
        timeout: Seconds per call or turn; a worker that is deaf for longer is terminated.
        ipc_validation: How much of each answer is checked.

    Raises:
        TransportError: The program cannot be started; later, from a call: it has died.
    """
    transport = SubprocessTransport(cmd, stderr=stderr, stderr_logger=stderr_logger)
    try:
        with RpcConnection(protocol, transport, on_log, timeout=timeout, ipc_validation=ipc_validation) as proxy:
            yield proxy
    finally:
        transport.close()


@contextlib.contextmanager
def unix_connect(
    protocol: type[_P],
    path: str,
    *,
    on_log: Callable[[Message], None] | None = None,
    timeout: float | None = None,
    ipc_validation: IpcValidation = IpcValidation.FULL,
) -> Iterator[_P]:
    """Connect to a Unix socket and give a proxy; arguments as in `connect`.

    Raises:
        TransportError: Nobody listens there.
    """
    transport = connect_unix_socket(path, timeout)
    with RpcConnection(protocol, transport, on_log, timeout=timeout, ipc_validation=ipc_validation) as proxy:
        yield proxy


@contextlib.contextmanager
def tcp_connect(
    protocol: type[_P],
    host: str,
    port: int,
    *,
    connect_timeout: float | None = 5.0,
    tls_context: ssl.SSLContext | None = None,
    server_hostname: str | None = None,
    on_log: Callable[[Message], None] | None = None,
    timeout: float | None = None,
    ipc_validation: IpcValidation = IpcValidation.FULL,
) -> Iterator[_P]:
    """Connect over TCP and give a proxy; arguments as in `connect`.

    Args:
        protocol: The Protocol class.
        host: Host name or address.
        port: Port.
        connect_timeout: Seconds for connecting.
        tls_context: Client-side context of the standard library's ``ssl``; ``None`` for plain TCP.
        server_hostname: The name that the certificate must have, if it is not *host*.
        on_log: Takes the server's log lines.
        timeout: Seconds per call or turn, ``None`` for no limit.
        ipc_validation: How much of each answer is checked.

    Raises:
        TransportError: Nobody listens there, or TLS fails.
    """
    connected = connect_tcp_socket(host, port, connect_timeout, tls_context, server_hostname)
    transport = Transport(SocketChannel(connected), TransportKind.TCP, f"{host}:{port}")
    with RpcConnection(protocol, transport, on_log, timeout=timeout, ipc_validation=ipc_validation) as proxy:
        yield proxy


def _http_client(
    base_url: str | None,
    prefix: str | None,
    client: HttpSender | None,
    tls_context: ssl.SSLContext | None,
    **options: Any,
) -> HttpClient:
    if client is not None:
        return HttpClient(client, prefix if prefix is not None else getattr(client, "prefix", ""), **options)
    if base_url is None:
        raise ValueError("expected a base URL or a client")
    target = HttpTarget.parse(base_url)
    path = target.prefix + ("/" + prefix.strip("/") if prefix and prefix.strip("/") else "")
    return HttpClient(HttpConnections(target, tls_context), path, **options)


@contextlib.contextmanager
def http_connect(
    protocol: type[_P],
    base_url: str | None = None,
    *,
    prefix: str | None = None,
    on_log: Callable[[Message], None] | None = None,
    client: HttpSender | None = None,
    headers: Headers | None = None,
    timeout: float | None = None,
    tls_context: ssl.SSLContext | None = None,
    compression_level: int | None = 1,
    accepted_max_response_bytes: int | None = CLIENT_MAX_RESPONSE_BYTES,
    ipc_validation: IpcValidation = IpcValidation.FULL,
) -> Iterator[_P]:
    """Connect over HTTP and give a proxy, which several threads may use.

    Args:
        protocol: The Protocol class.
        base_url: ``http(s)://host[:port][/prefix]``.
        prefix: Further path, if it is not part of the URL.
        on_log: Takes the server's log lines.
        client: What `make_sync_client` gives, instead of a URL.
        headers: Further headers, such as ``{"Authorization": "Bearer …"}``, or a function that gives them for each request.
        timeout: Seconds per call or turn, ``None`` for no limit.
        tls_context: For https; default ``ssl.create_default_context()``.
        compression_level: 1 to 9; ``None`` neither compresses nor asks for compressed answers.
        accepted_max_response_bytes: Largest answer, decoded; a larger one is refused by the server or here.
        ipc_validation: How much of each answer is checked.

    Raises:
        ValueError: Not a URL.
        TransportError: From the first call: nobody answers there.
        AuthenticationError: From a call: 401.
    """
    channel = _http_client(
        base_url,
        prefix,
        client,
        tls_context,
        headers=headers,
        compression_level=compression_level,
        max_response_bytes=accepted_max_response_bytes,
    )
    with RpcConnection(protocol, channel, on_log, timeout=timeout, ipc_validation=ipc_validation) as proxy:
        yield proxy


@_takes_options(HttpOptions)
def make_sync_client(server: RpcServer, **options: Any) -> SyncClient:
    """Return a client for ``http_connect(P, client=...)`` that calls *server*'s HTTP side without a socket.

    The keywords are those of `HttpOptions`; without ``token_key`` a random one is used, silently.
    """
    options.setdefault("token_key", os.urandom(32))
    (chosen,) = _split_options(options, HttpOptions)
    return SyncClient(HttpApp(server, chosen))


def http_capabilities(
    base_url: str | None = None, *, prefix: str | None = None, client: HttpSender | None = None, timeout: float | None = None
) -> HttpServerCapabilities:
    """Ask a server's ``/health`` what it can do; raises `TransportError`."""
    channel = _http_client(base_url, prefix, client, None)
    try:
        return channel.capabilities(None if timeout is None else time.monotonic() + timeout)
    finally:
        if client is None:
            channel.close()


def http_introspect(
    base_url: str | None = None, *, prefix: str | None = None, client: HttpSender | None = None, protocol: str | None = None
) -> ServiceDescription:
    """Return what an HTTP server says of *protocol*, by default its primary one; raises as `list_protocols`."""
    channel = _http_client(base_url, prefix, client, None)
    try:
        return introspect(channel, protocol=protocol)
    finally:
        if client is None:
            channel.close()


def announce(line: str) -> None:
    """Print a discovery line (``PORT:…``, ``UNIX:…``, ``TCP:…``) on stdout for the program that started us."""
    print(line, flush=True)


def run_server(protocol_or_server: type | RpcServer, implementation: Any = None) -> None:
    """Be a worker: the ``main`` of a program that serves. Reads the program's own command line.

    Without arguments it serves stdin and stdout. ``--http [--host H] [--port N]``, ``--unix PATH`` and ``--tcp [HOST:]PORT``
    listen instead, and print one discovery line on stdout: ``PORT:<n>``, ``UNIX:<path>`` or ``TCP:<host>:<port>``.

    Args:
        protocol_or_server: A Protocol class, or a ready `RpcServer`.
        implementation: The object that serves the Protocol; ``None`` with a server, or to make one of a plain class.

    Raises:
        TypeError: The implementation does not fit the protocol.
        SystemExit: The command line is wrong, or ``--help`` was asked for.
    """
    import argparse

    if isinstance(protocol_or_server, RpcServer):
        server = protocol_or_server
    else:
        server = RpcServer(protocol_or_server, implementation if implementation is not None else protocol_or_server())
    parser = argparse.ArgumentParser(description=f"Serves {server.protocol_name} (vgi_rpc {__version__}).")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--http", action="store_true", help="serve HTTP; prints PORT:<n>")
    where.add_argument("--unix", metavar="PATH", help="serve a Unix socket; prints UNIX:<path>")
    where.add_argument("--tcp", metavar="[HOST:]PORT", help="serve TCP; prints TCP:<host>:<port>")
    parser.add_argument("--host", default="127.0.0.1", help="address for --http (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port for --http (default: a free one)")
    parser.add_argument("--idle-timeout", type=float, metavar="SECONDS", help="end after so long without a connection")
    parser.add_argument("--access-log", metavar="PATH", help="append a JSON line per call; - is stderr")
    args = parser.parse_args()
    if args.access_log:
        configure_access_log(args.access_log, server)
    if args.http:
        serve_http(server, host=args.host, port=args.port, on_bound=lambda _, port: announce(f"PORT:{port}"))
    elif args.unix:
        options: dict[str, Any] = {"threaded": True, "idle_timeout": args.idle_timeout}
        serve_unix(server, args.unix, on_bound=lambda path: announce(f"UNIX:{path}"), **options)
    elif args.tcp:
        host, _, port = args.tcp.rpartition(":")
        options = {"threaded": True, "idle_timeout": args.idle_timeout}
        serve_tcp(server, host or "127.0.0.1", int(port), on_bound=lambda h, p: announce(f"TCP:{h}:{p}"), **options)
    else:
        serve_stdio(server)


# ============================================================================
# 18. COMMAND LINE ...................................... uses 1-17
# ============================================================================
# `python vgi_rpc.py COMMAND`: answers go to stdout, everything said about them to stderr; stdin is read only where `-` stands.
# Law: nothing of this section runs on import; a failure is one line, a hint where there is one, and an exit code.

_OK, _FAILED, _USAGE, _UNREACHABLE, _REFUSED, _TIMEOUT, _INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
_RELOAD = 75  # sysexits' EX_TEMPFAIL: the child of `serve --reload` asks to be started again
_REFUSALS = (Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.RESOURCE_EXHAUSTED)
_TEXT_ROWS = 100  # of CSV and NDJSON in a turn, where nothing else says what a batch is
_CHUNK_BYTES = 1 << 20  # of a CSV or NDJSON file read at once; the types of its columns are those of the first chunk
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class CountdownHeader(ArrowSerializableDataclass):
    """What `Demo.countdown` says before its first number."""

    start: int
    batches: int


@dataclass
class CountdownState(ProducerState):
    """Where a countdown stands."""

    left: int
    pause: float

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        if self.left < 0:
            out.finish()
            return
        time.sleep(self.pause)
        out.emit_pydict({"n": [self.left]})
        self.left -= 1


@dataclass
class Tally:
    """Running statistics of one column; nulls are passed over, ``None`` stands for what no value has decided yet."""

    count: int = 0
    total: float = 0.0
    low: float | None = None
    high: float | None = None

    def add(self, column: pa.Array) -> dict[str, Any]:
        """Count the values of *column*, any number of rows, and return the statistics so far."""
        import pyarrow.compute as pc  # type: ignore[import-untyped]

        values = column.cast(pa.float64(), safe=False)
        self.count += len(values) - values.null_count
        self.total += pc.sum(values).as_py() or 0.0
        edges = pc.min_max(pa.concat_arrays([values, pa.array([self.low, self.high], pa.float64())])).as_py()
        self.low, self.high = edges["min"], edges["max"]
        return {"count": self.count, "mean": self.total / self.count if self.count else None, **edges}


@dataclass
class StatisticsState(ExchangeState):
    """The statistics so far, by column."""

    columns: dict[str, Tally]

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        out.emit_pydict({name: [tally.add(input.batch.column(name))] for name, tally in self.columns.items()})


class Demo(Protocol):
    """A small service with one method of each kind."""

    def add(self, a: float, b: float = 1.0) -> float:
        """Return a + b."""

    def countdown(self, start: int, pause: float | None = None) -> Stream[ProducerState, CountdownHeader]:
        """Count from start to 0, one number a batch; pause is for seconds before each."""

    def statistics(self, schema: pa.Schema) -> Stream[ExchangeState]:
        """Answer each batch of schema with count, mean, min and max of every numeric column so far."""


class DemoImpl:
    """Implements `Demo`."""

    def add(self, a: float, b: float = 1.0) -> float:
        """See `Demo.add`."""
        return a + b

    def countdown(self, start: int, pause: float | None = None) -> Stream[CountdownState, CountdownHeader]:
        """See `Demo.countdown`."""
        header = CountdownHeader(start, max(0, start + 1))
        return Stream(pa.schema([("n", pa.int64())]), CountdownState(start, pause or 0.0), header=header)

    def statistics(self, schema: pa.Schema) -> Stream[StatisticsState]:
        """See `Demo.statistics`."""
        t = pa.types
        names = [f.name for f in schema if t.is_integer(f.type) or t.is_floating(f.type) or t.is_decimal(f.type)]
        if not names or len(set(schema.names)) < len(schema):
            problem = f"expected numeric columns under unique names, got {_schema_text(schema)}"
            raise StatusError(problem, code=Code.INVALID_ARGUMENT)
        summary = pa.struct([("count", pa.int64()), ("mean", pa.float64()), ("min", pa.float64()), ("max", pa.float64())])
        state = StatisticsState({name: Tally() for name in names})
        return Stream(pa.schema([(name, summary) for name in names]), state, input_schema=schema)


class _CliError(Exception):
    """Ends a command with one line, a hint and an exit code."""

    def __init__(self, message: str, hint: str = "", code: int = _USAGE) -> None:
        super().__init__(message)
        self.hint, self.code = hint, code


def _paint(text: str, style: str, stream: Any = None) -> str:
    """Colour *text* when *stream* (stderr) is a terminal that may show it; ``NO_COLOR`` wins (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not (stream or sys.stderr).isatty()
    return text if plain else f"\x1b[{style}m{text}\x1b[0m"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _program() -> str:
    name = os.path.basename(sys.argv[0] or "vgi_rpc.py")
    return f"python {name}" if name.endswith(".py") else name


def _verdict(exc: Exception) -> tuple[int, str]:
    """The exit code of a failure, and a hint."""
    if isinstance(exc, _CliError):
        return exc.code, exc.hint
    if not isinstance(exc, RpcError):
        return _USAGE, ""
    if exc.code is Code.DEADLINE_EXCEEDED:
        return _TIMEOUT, ""
    if isinstance(exc, TransportError):
        refused = exc.error_message.startswith("cannot connect")
        return _UNREACHABLE, f"is the server running? {_program()} serve" if refused else ""
    if exc.code in _REFUSALS or "VersionError" in exc.error_type:
        unknown = isinstance(exc, AuthenticationError)
        return _REFUSED, "send credentials: --bearer-file FILE or -H 'Authorization: Bearer …'" if unknown else ""
    hidden = REFLECTION_PROTOCOL in exc.error_message
    return _FAILED, "a server with --no-describe does not say what it has, and cannot be called by name" if hidden else ""


def _report(exc: Exception, args: Any) -> int:
    """Say on stderr what failed, as the flags ask for it; return the exit code."""
    code, hint = _verdict(exc)
    remote = vars(exc) if isinstance(exc, RpcError) else {}
    trace = remote.get("remote_traceback", "").rstrip() if getattr(args, "verbose", False) else ""
    if getattr(args, "format", "") == "json":
        facts = {"error_type": type(exc).__name__.lstrip("_"), "error_message": _text_of(exc), **remote, "hint": hint}
        facts.update(remote_traceback=trace, exit_code=code)
        _say(json.dumps({"error": {k: v for k, v in facts.items() if v}}, default=str, ensure_ascii=False))
        return code
    text = f"{exc.filename or ''}: {exc.strerror}" if isinstance(exc, OSError) else getattr(exc, "error_message", exc)
    kind = f"{exc.error_type}: " if isinstance(exc, RpcError) and not isinstance(exc, _LocalError) else ""
    _say(f"{_paint('error:', '1;31')} {kind}{' '.join(_text_of(text).split())}")
    for line in (f"{_paint('hint:', '1;36')} {hint}" if hint else "", trace):
        if line:
            _say(line)
    return code


def _load_target(text: str) -> Any:
    """Import what ``module:Class``, ``path/to/file.py:Class`` or ``module:factory()`` names."""
    match = re.fullmatch(r"(.+?):([A-Za-z_][\w.]*)(\(\))?", text)
    if not match:
        wanted = "module:Class, path/to/file.py:Class or module:factory()"
        raise _CliError(f"target {text!r}: expected {wanted}", f"try {text}:NAME")
    module = _guarded(match[1], _import_module, match[1])
    try:
        found = functools.reduce(getattr, match[2].split("."), module)
    except AttributeError:
        own = [n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__ and n[0] != "_"]
        hint = f"it defines {', '.join(own) or 'nothing to serve'}"
        raise _CliError(f"{match[1]} has no {match[2]!r}{_suggest(match[2], own)}", hint) from None
    return _guarded(text, found) if match[3] else found


def _import_module(name: str) -> Any:
    import importlib.util

    if not name.endswith(".py"):
        sys.path.insert(0, os.getcwd())
        return importlib.import_module(name)
    path, stem = os.path.abspath(name), os.path.basename(name)[:-3]
    if not os.path.isfile(path):
        raise _CliError(f"no file {path}")
    sys.path.insert(0, os.path.dirname(path))
    spec = cast("Any", importlib.util.spec_from_file_location(stem, path))
    module = sys.modules[stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _guarded(what: str, call: Callable[..., Any], *args: Any) -> Any:
    """Run the user's code; what it raises becomes one line with its file and line."""
    try:
        return call(*args)
    except (_CliError, KeyboardInterrupt):
        raise
    except BaseException as exc:
        if isinstance(exc, ModuleNotFoundError) and exc.name and what.startswith(exc.name):
            raise _CliError(f"no module {exc.name!r}", "run from its folder, or give path/to/file.py:Class") from None
        last = traceback.extract_tb(exc.__traceback__)[-1]
        where = f"{exc.filename}:{exc.lineno}" if isinstance(exc, SyntaxError) else f"{last.filename}:{last.lineno}"
        raise _CliError(f"{where}: {type(exc).__name__}: {_text_of(exc)}", f"{what} must load without errors") from None


def _is_protocol(value: Any) -> bool:
    own = isinstance(value, type) and bool(vars(value).get("_is_protocol")) and not value.__module__.startswith("typing")
    return own and bool(_public_functions(value))


def _protocol_of(cls: type) -> type:
    """The Protocol that a class subclasses, names (``protocol = P``) or, alone in its module, fits; else the class itself."""
    named: list[Any] = [c for c in (vars(cls).get("protocol"), *cls.__mro__[1:]) if _is_protocol(c)]
    methods = _public_functions(cls).keys()
    around = dict.fromkeys(v for v in vars(sys.modules[cls.__module__]).values() if _is_protocol(v))
    fitting: list[Any] = named[:1] or [p for p in around if _public_functions(p).keys() <= methods]
    fitting = [p for p in fitting if cls.__name__.startswith(p.__name__)] or fitting
    if len(fitting) > 1:
        names = ", ".join(p.__name__ for p in fitting)
        raise _CliError(f"{cls.__name__} fits several protocols: {names}", "its body says which: protocol = NAME")
    return cast("type", (fitting or [cls])[0])


def _service_of(target: str | None) -> RpcServer:
    """Return the server for a target; the demo without one."""
    found = _load_target(target) if target else DemoImpl
    if isinstance(found, RpcServer):
        return found
    if inspect.isroutine(found) or _is_protocol(found):
        needed = f"{target}()" if inspect.isroutine(found) else "the class that implements it"
        raise _CliError(f"{target} is a {'function' if needed[-1] == ')' else 'Protocol'}", f"name {needed}")
    cls = found if isinstance(found, type) else type(found)
    protocol = _protocol_of(cls)
    try:
        rpc_methods(protocol)
        needs = [n for n, p in inspect.signature(cls).parameters.items() if p.default is p.empty and p.kind not in (2, 4)]
        if cls is found and needs:
            raise _CliError(f"{cls.__name__}() needs {', '.join(needs)}", "name a function that makes one: module:make()")
        return RpcServer(protocol, _guarded(str(target), cls) if cls is found else found)
    except (TypeError, ValueError) as exc:
        text = _text_of(exc)
        functions: list[Any] = [getattr(c, name, None) for name in re.findall(r"\b(\w+)\(\)", text) for c in (protocol, cls)]
        code = next((f.__code__ for f in functions if hasattr(f, "__code__")), None)
        where = f"{code.co_filename}:{code.co_firstlineno}: " if code else ""
        raise _CliError(where + text, "each parameter and result has an annotation with an Arrow type") from None


def _size(text: str) -> int:
    """``64M`` -> bytes; argparse names this function in its error text."""
    match = re.fullmatch(r"([0-9]+)([KMG]?)(i?B)?", text, re.I)
    if not match:
        raise ValueError(text)
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2].upper()]


def _words_of(path: str) -> list[list[str]]:
    """The words of each line of a file of secrets that is neither empty nor a comment."""
    with open(path, encoding="utf-8") as f:
        lines = [line.split() for line in f if line.strip() and not line.startswith("#")]
    if not lines:
        raise _CliError(f"{path}: expected a secret, got an empty file")
    return lines


def _http_options(args: Any) -> tuple[dict[str, Any], str]:
    """The options of `serve_http`, and what the banner says of the token key."""
    options: dict[str, Any] = {"pages": not args.no_describe, "json": not args.no_json, "request_deadline": args.timeout}
    for name in ("prefix", "token_ttl", "max_request_bytes", "max_response_bytes", "max_connections"):
        options[name] = getattr(args, name)
    if args.token_key_file:
        options["token_key"], key = [line[0].encode() for line in _words_of(args.token_key_file)], f"from {args.token_key_file}"
    elif os.environ.get("VGI_RPC_TOKEN_KEY"):
        key = "from VGI_RPC_TOKEN_KEY"
    else:
        options["token_key"] = os.urandom(32)
        key = "random: open streams end with this process; VGI_RPC_TOKEN_KEY or --token-key-file keeps them"
    if args.cors:
        options["cors_origins"] = [origin.strip() for origin in args.cors.split(",")]
    if args.bearer_file:
        lines = _words_of(args.bearer_file)
        tokens = {line[-1]: AuthContext("bearer", True, line[0] if line[1:] else "bearer") for line in lines}
        options["authenticate"] = bearer_authenticate_static(tokens=tokens)
    if args.tls_cert:
        import ssl

        options["tls_context"] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            options["tls_context"].load_cert_chain(args.tls_cert, args.tls_key)
        except OSError as exc:
            hint = "PEM files: the certificate chain, and its key"
            raise _CliError(f"--tls-cert {args.tls_cert}: {exc.strerror or exc}", hint) from None
    return {name: value for name, value in options.items() if value is not None}, key


def _serve(args: Any) -> int:
    if args.reload and not os.environ.get("VGI_RPC_RELOADED"):
        return _serve_reloading(args)
    changed = _watch(args.target) if args.reload else None
    try:
        server = _service_of(args.target)
        server.include_tracebacks &= not args.no_tracebacks
        if args.no_describe:
            server.services.pop(REFLECTION_PROTOCOL, None)
            server.describe_enabled = False
        options, key = _http_options(args)
        HttpApp(server, _split_options(options, HttpOptions, HttpServeOptions)[0])  # what is wrong with them is said now
        if args.check:
            print(describe_rpc(server.primary.protocol).replace("__main__.", ""))
            return _OK
        if args.access_log:
            configure_access_log(args.access_log, server)
        _listen(args, server, options, key)
    except (_CliError, OSError, ValueError) as exc:
        if changed is None:
            raise
        _report(exc, args)
        _say("waiting for a change …")
        changed.wait()
    return _RELOAD if changed is not None and changed.is_set() else _OK


def _listen(args: Any, server: RpcServer, options: dict[str, Any], key: str) -> None:
    """Serve where the flags say, until stopped; the banner comes once connections are accepted."""
    http = not (args.stdio or args.unix or args.tcp)
    if sum(map(bool, (args.stdio, args.unix, args.tcp))) > 1 or (args.bearer_file and not http):
        raise _CliError("--stdio, --unix, --tcp: one at a time, and --bearer-file with none of them")
    host, _, port = args.tcp.rpartition(":") if args.tcp else (args.host, "", args.port)
    host = host or "127.0.0.1"

    def bound(where: str, line: str) -> None:
        _say(f"{_paint(server.protocol_name, '1')} served by vgi_rpc {__version__}")
        for info in server.methods.values():
            _say(f"  {info.signature().replace('__main__.', '')}    {info.kind}")
        if not (args.unix or args.bearer_file or host.startswith("127.") or host in ("localhost", "::1")):
            everybody = "anybody who reaches this address can call: no authentication (--bearer-file FILE asks for a token)"
            _say(f"{_paint('warning:', '1;33')} {everybody}")
        _say((f"token key  {key}\n" if http else "") + f"address    {_paint(where, '1;36')}")
        _say(f"look       {_program()} describe {where}\nstop       Ctrl-C")
        if args.announce:
            announce(line)

    sockets: dict[str, Any] = {"threaded": True, "max_connections": args.max_connections}
    tls = options.get("tls_context")
    base = HttpOptions(args.prefix or "", b"").prefix
    try:
        if args.stdio:
            if sys.stdin.isatty():
                _say("serving Arrow on stdin and stdout, for a program that starts this one; stop with Ctrl-C")
            serve_stdio(server)
        elif args.unix:
            serve_unix(server, args.unix, on_bound=lambda path: bound(f"unix:{path}", f"UNIX:{path}"), **sockets)
        elif args.tcp:
            sockets["on_bound"] = lambda h, p: bound(f"tcp:{h}:{p}", f"TCP:{h}:{p}")
            serve_tcp(server, host, int(port), tls_context=tls, **sockets)
        else:
            url = f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}"
            serve_http(server, host=host, port=port, on_bound=lambda _, p: bound(f"{url}:{p}{base}", f"PORT:{p}"), **options)
    except KeyboardInterrupt:  # before the listener's own handlers stood
        return
    except OSError as exc:
        where = args.unix or f"{host}:{port}"
        hint = "another server runs there; port 0 takes a free one" if exc.errno == errno.EADDRINUSE else ""
        raise _CliError(f"cannot listen on {where}: {exc.strerror or exc}", hint, _UNREACHABLE) from None


def _serve_reloading(args: Any) -> int:
    """Keep a child serving: the same port and the same key in each of its lives, so that open streams go on."""
    import subprocess

    words = list(args.words)
    if not (args.stdio or args.unix or args.tcp or args.port):
        with listen_tcp(args.host, 0) as free:
            words += ["--port", str(free.getsockname()[1])]
    environment = {"VGI_RPC_TOKEN_KEY": os.urandom(32).hex(), **os.environ, "VGI_RPC_RELOADED": "1"}
    while True:
        child = subprocess.Popen([sys.executable, os.path.abspath(__file__), *words], env=environment)
        with _stop_signals(child.terminate):
            code = child.wait()
        if code != _RELOAD:
            return max(code, 0)
        _say("something changed: starting again")


def _watch(target: str | None) -> threading.Event:
    """Watch the files of all loaded modules; when one changes, set the event and have the server stop."""
    import signal

    changed, known = threading.Event(), dict[str, int]()

    def stale() -> bool:
        files = {getattr(m, "__file__", None) for m in list(sys.modules.values())} | {(target or "").rpartition(":")[0]}
        found = {path: os.stat(path).st_mtime_ns for path in files if path and os.path.isfile(path)}
        old = {path: known.get(path, stamp) for path, stamp in found.items()}
        known.update(found)
        return old != found

    def watch() -> None:
        while not stale():
            time.sleep(0.3)
        changed.set()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="vgi_rpc reload").start()
    return changed


@contextlib.contextmanager
def _connected(args: Any) -> Iterator[ClientChannel]:
    """The channel to WHERE: a URL, ``unix:PATH``, ``tcp:HOST:PORT`` or a command that is started."""
    pairs = [line.partition(":")[::2] for line in args.header]
    headers = {name.strip(): value.strip() for name, value in pairs}
    if args.bearer_file:
        headers["Authorization"] = f"Bearer {_words_of(args.bearer_file)[0][-1]}"
    if args.where.startswith(("http://", "https://")):
        target = HttpTarget.parse(args.where)
        channel: ClientChannel = HttpClient(HttpConnections(target), target.prefix, headers=headers)
    elif headers:
        raise _CliError("-H and --bearer-file are for HTTP")
    else:
        channel = ByteClient(_transport(args.where, args))
    try:
        yield channel
    finally:
        channel.close()


def _transport(where: str, args: Any) -> Transport:
    import shlex

    kind, _, rest = where.partition(":")
    if kind == "unix":
        return connect_unix_socket(rest, args.timeout)
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and port.isdigit():
        connected = connect_tcp_socket(host or "127.0.0.1", int(port), args.timeout or 10.0)
        return Transport(SocketChannel(connected), TransportKind.TCP, rest)
    if kind == "tcp" or not where or re.fullmatch(r"[\w.-]+:\d+(/.*)?", where):
        hint = f"http://{where.removeprefix('tcp:')}?" if where else ""
        raise _CliError(f"WHERE {where!r}: expected a URL, unix:PATH, tcp:HOST:PORT or a command", hint)
    return SubprocessTransport(shlex.split(where), stderr=StderrMode.INHERIT if args.verbose else StderrMode.PIPE)


def _options(args: Any, version: str = "") -> CallOptions:
    def on_log(message: Message) -> None:
        _say(_paint(f"[{message.level.value}] {message.message}", "2"))

    return CallOptions(on_log if args.verbose else None, args.timeout, version=version)


def _describe_live(channel: ClientChannel, args: Any) -> tuple[ServiceDescription, MethodDescription | None]:
    """What the server says of its service, and of ``method`` or ``Protocol.method`` if one is asked for."""
    protocol, _, name = (args.method or "").rpartition(".")
    service = introspect(make_proxy(Reflection, channel, _options(args)), protocol=protocol or None)
    if name and name not in service.methods:
        known = sorted(service.methods)
        raise _CliError(f"{service.protocol_name} has no method {name!r}{_suggest(name, known)}", f"it has {', '.join(known)}")
    return service, service.methods.get(name)


def _usage_of(method: MethodDescription) -> str:
    """One line that says how `call` wants a method."""
    words = [method.name]
    for f in method.params_schema:
        word = f"{f.name}={re.split('[<[]', _type_text(f.type))[0].upper()}"
        words.append(f"[{word}]" if f.nullable or (method.method_type is MethodType.STREAM and f.name == "schema") else word)
    return f"usage: {_program()} call WHERE {' '.join(words)}{' -i FILE' if method.is_exchange else ''}"


def _from_text(text: str, kind: pa.DataType) -> Any:
    """A word of the command line as ``pa.array`` takes it for *kind*; raises ``ValueError`` and the like."""
    import datetime
    import decimal

    t = pa.types
    for matches, convert in (
        (t.is_boolean, lambda word: _TRUTH[word.lower()]),
        (t.is_integer, int),
        (t.is_floating, float),
        (t.is_decimal, decimal.Decimal),
        (t.is_time, datetime.time.fromisoformat),
        (t.is_duration, int),
        (t.is_temporal, lambda word: pa.array([word]).cast(kind)[0].as_py()),
        (t.is_nested, lambda word: _from_json(json.loads(word), kind)),
        (t.is_binary, str.encode),
    ):
        if matches(kind):
            return convert(text)
    return text


def _from_json(value: Any, kind: pa.DataType) -> Any:
    """A JSON value as ``pa.array`` takes it for *kind*: bytes are base64, a dataclass is an object."""
    t = pa.types
    if isinstance(value, str) and (t.is_temporal(kind) or t.is_decimal(kind)):
        return _from_text(value, kind)
    if isinstance(value, str) and t.is_binary(kind):
        return base64.b64decode(value, validate=True)
    if isinstance(value, dict) and t.is_map(kind):
        return [(_from_text(k, kind.key_type), _from_json(v, kind.item_type)) for k, v in value.items()]
    if isinstance(value, dict) and t.is_struct(kind):
        return {k: _from_json(v, kind[kind.get_field_index(k)].type) for k, v in value.items()}
    if isinstance(value, list) and t.is_nested(kind):
        return [_from_json(v, kind.value_type) for v in value]
    if isinstance(value, (dict, list)) and t.is_binary(kind):  # a dataclass, or a batch, travels as a stream of its own
        batch = _rows_to_batch([value] if isinstance(value, dict) else value)
        return stream_bytes(batch.schema, [(batch, None)])
    return value


def _parsed_json(where: str, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as exc:
        raise _CliError(f"{where}: not JSON: {_text_of(exc)}") from None


def _read_file(path: str) -> bytes:
    if path == "-":
        return sys.stdin.buffer.read()
    with open(path, "rb") as f:
        return f.read()


def _arguments(args: Any, method: MethodDescription) -> dict[str, Any]:
    """The values that ``-j`` and ``k=v | k:=json | k=@file`` give, typed by the method's schema."""
    given: list[tuple[str, Any, Callable[[Any, pa.DataType], Any]]] = []
    if args.json:
        data = _parsed_json("-j", _read_file(args.json.lstrip("@")) if args.json[0] in "@-" else args.json)
        if not isinstance(data, dict):
            raise _CliError(f"-j: expected a JSON object, got {type(data).__name__}")
        given += [(name, value, _from_json) for name, value in data.items()]
    for word in args.parameters:
        name, equals, text = word.partition("=")
        if not equals:
            raise _CliError(f"parameter {word!r}: expected key=value, key:=json or key=@file", _usage_of(method))
        data = _read_file(text[1:]) if text.startswith("@") else text
        if name.endswith(":"):
            given.append((name[:-1], _parsed_json(word, data), _from_json))
        else:
            given.append((name, data, _from_text if data is text else _from_bytes))
    values: dict[str, Any] = {}
    for name, value, convert in given:
        names = method.params_schema.names
        if name not in names:
            raise _CliError(f"{method.name}() has no parameter {name!r}{_suggest(name, names)}", _usage_of(method))
        kind = method.params_schema.field(name).type
        try:
            values[name] = convert(value, kind)
        except _ARROW_FAILURES:
            problem = f"{method.name}() parameter {name!r}: expected {_type_text(kind)}, got {value!r:.80}"
            raise _CliError(problem, _usage_of(method)) from None
    return values


def _from_bytes(data: bytes, kind: pa.DataType) -> Any:
    return data if pa.types.is_binary(kind) else _from_text(data.decode("utf-8", "replace").rstrip("\r\n"), kind)


def _request(args: Any, info: RpcMethodInfo, method: MethodDescription, values: dict[str, Any]) -> pa.RecordBatch:
    """The request; the wire does not carry defaults, so that only a nullable parameter may be left out."""
    missing = [f.name for f in method.params_schema if f.name not in values and not f.nullable]
    if missing:
        raise _CliError(f"{method.name}() needs {', '.join(missing)} (a server does not tell its defaults)", _usage_of(method))
    try:
        return _traced(args, "> request", request_batch(info, [values.get(name) for name in method.params_schema.names]))
    except ParameterError as exc:
        raise _CliError(_text_of(exc), _usage_of(method)) from None


def _traced(args: Any, what: str, batch: pa.RecordBatch) -> pa.RecordBatch:
    if args.debug:
        _say(_paint(f"{what}: {batch.num_rows} rows of {_schema_text(batch.schema)}, {batch.nbytes} bytes", "2"))
    return batch


def _live_method(service: ServiceDescription, method: MethodDescription) -> RpcMethodInfo:
    """A method as the channels want it, from what the server says of it; values are what pyarrow makes of them."""

    def row(schema: pa.Schema) -> RowCodec:
        return RowCodec((f.name, codec_for(Annotated[object, ArrowType(f.type, f.nullable)])) for f in schema)

    result = row(method.result_schema if method.has_return else EMPTY_SCHEMA)
    header: Any = types.SimpleNamespace(from_batch=lambda batch: batch) if method.has_header else None
    same = ("name", "params_schema", "result_schema", "method_type", "has_return")
    facts: dict[str, Any] = {name: getattr(method, name) for name in same}
    facts.update(doc=None, result_type=None, protocol_name=service.protocol_name)
    return RpcMethodInfo(params=row(method.params_schema), result=result, header=header, **facts)



def _input_batches(path: str, rows: int | None) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow, NDJSON or CSV file, told apart by their first bytes; ``-`` is read as it comes."""
    with contextlib.ExitStack() as stack:
        file: Any = sys.stdin.buffer if path == "-" else stack.enter_context(open(path, "rb"))
        first = file.peek(8)[:6]
        if first == b"ARROW1":
            file.read(8)  # the file format is a stream between two magic words (Columnar.rst, "IPC File Format")
        elif first[:4] != _CONTINUATION:
            yield from _text_batches(file, rows, live=path == "-")
            return
        source = types.SimpleNamespace(read=file.read, read_after=lambda head, size: head + file.read(size))
        reader = IpcReader(cast("ByteSource", source))
        for batch, _ in iter(reader.next, None):
            for start in range(0, max(batch.num_rows, 1), rows or max(batch.num_rows, 1)):
                yield batch.slice(start, rows)


def _text_batches(file: Any, rows: int | None, live: bool) -> Iterator[pa.RecordBatch]:
    """Lines to batches. From a pipe, without a number of rows, a turn takes what has come; types are those of the beginning."""
    pending: list[bytes] = []
    head: bytes | None = None
    schema: pa.Schema | None = None
    size = rows or _TEXT_ROWS
    for lines in _line_groups(file, live):
        pending += lines
        if head is None and pending:
            head = b"" if pending[0].lstrip()[:1] == b"{" else pending.pop(0).removeprefix(b"\xef\xbb\xbf")
        while len(pending) >= size or (pending and (not lines or (live and rows is None))):
            if schema is None:
                schema = _parse_lines(head or b"", pending, None).schema
            yield _parse_lines(head or b"", pending[:size], schema)
            del pending[:size]


def _line_groups(file: Any, live: bool) -> Iterator[list[bytes]]:
    """Whole lines as they arrive (a line break in quotes does not end one), and an empty list at the end."""
    rest, data = b"", b"\n"
    while data:
        data = file.read1(_CHUNK_BYTES) if live else file.read(_CHUNK_BYTES)
        pieces, rest = (rest + (data or b"\n")).splitlines(keepends=True), b""
        lines: list[bytes] = []
        for piece in pieces:
            rest += piece
            if rest.endswith(b"\n") and (rest.count(b'"') % 2 == 0 or not data):
                lines, rest = [*lines, rest] if rest.strip() else lines, b""
        if lines:
            yield lines
    yield []


def _parse_lines(head: bytes, lines: list[bytes], schema: pa.Schema | None) -> pa.RecordBatch:
    if not head:
        return _rows_to_batch([_parsed_json(f"input {line[:60]!r}", line) for line in lines], schema)
    import pyarrow.csv  # type: ignore[import-untyped]

    converting = pyarrow.csv.ConvertOptions(column_types=schema, strings_can_be_null=True)
    parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
    try:
        table = pyarrow.csv.read_csv(io.BytesIO(head + b"".join(lines)), parse_options=parsing, convert_options=converting)
    except _ARROW_FAILURES as exc:
        raise _CliError(f"input: {_text_of(exc)}", "the types of a CSV's columns are those of its beginning") from None
    fields = [pa.field(f.name, pa.utf8() if pa.types.is_null(f.type) else f.type) for f in table.schema]
    return table.cast(pa.schema(fields)).combine_chunks().to_batches()[0]


def _rows_to_batch(rows: list[Any], schema: pa.Schema | None = None) -> pa.RecordBatch:
    if not all(isinstance(row, dict) for row in rows):
        raise _CliError("input: expected a JSON object for each row")
    names = schema.names if schema is not None else list(dict.fromkeys(name for row in rows for name in row))
    for name in {name for row in rows for name in row} - set(names):
        raise _CliError(f"input: column {name!r} is not in the rows before it: {', '.join(names)}")
    return _batch_from_pydict({name: [row.get(name) for row in rows] for name in names}, schema, "input")


def _json_ready(value: Any) -> Any:
    """A value of ``to_pylist`` as JSON has it: maps are objects, bytes base64, times ISO 8601, NaN and infinities null."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, list) and not (value and all(isinstance(v, tuple) for v in value)):
        return [_json_ready(v) for v in value]
    if isinstance(value, (dict, list)):
        return {str(k): _json_ready(v) for k, v in dict(value).items()}
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(getattr(value, "isoformat", lambda: value)())


def _to_json(value: Any) -> str:
    return json.dumps(_json_ready(value), ensure_ascii=False)


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    # Python's own datetime has no nanoseconds: such columns are shown as Arrow writes them.
    columns = [(c.cast(pa.utf8()) if "[ns" in str(c.type) else c).to_pylist() for c in batch.columns]
    return [dict(zip(batch.schema.names, row)) for row in zip(*columns)]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, dict):
        return " ".join(f"{k}={_cell(v)}" for k, v in value.items())
    return "" if value is None else value if isinstance(value, str) else _to_json(value).strip('"')


def _opened(value: Any) -> pa.RecordBatch | None:
    """The batch inside a binary result, where it is an IPC stream: a dataclass (one row) or a record batch."""
    if not isinstance(value, bytes) or value[:4] != _CONTINUATION:
        return None
    with contextlib.suppress(IPCError):
        item = IpcReader(BufferSource(value)).next()
        return item[0] if item else None
    return None


class _Output:
    """Writes a header, batches or one value to a binary file, each as it comes, in one of the formats."""

    def __init__(self, kind: str, file: Any) -> None:
        self.kind, self.file, self.begun = kind, file, False
        self.widths: list[int] = []
        self.arrow: IpcWriter | None = None

    def put(self, text: str) -> None:
        """Write text."""
        self.file.write(text.encode("utf-8", "backslashreplace"))

    def header(self, batch: pa.RecordBatch) -> None:
        """Write a stream's header ahead of its batches."""
        row = _rows(batch)[0] if len(batch.schema) else {}
        if self.kind == "arrow":
            self.file.write(stream_bytes(batch.schema, [(batch, None)]))
        elif self.kind == "table":
            lines = "".join(f"\n  {name:{max(map(len, row))}}  {_cell(value)}" for name, value in row.items())
            self.put(f"{_paint('Header:', '1', self.file)}{lines}\n")
        else:
            self.begun = self.kind == "json"
            start = {"json": "[\n", "csv": "# "}.get(self.kind, "")
            self.put(start + _to_json({"__header__": row}) + ("" if self.begun else "\n"))
        self.file.flush()

    def batch(self, batch: pa.RecordBatch, metadata: Any = None) -> None:
        """Write the rows of a batch."""
        if self.kind == "arrow":
            self.arrow = self.arrow or IpcWriter(lambda pieces: [self.file.write(piece) for piece in pieces], batch.schema)
            self.arrow.write(batch, metadata)
        elif self.kind == "ndjson":
            self.put("".join(_to_json(row) + "\n" for row in _rows(batch)))
        elif self.kind == "json":
            for row in _rows(batch):
                self.put((",\n" if self.begun else "[\n") + _to_json(row))
                self.begun = True
        elif self.kind == "csv":
            import csv

            writer = csv.writer(cast("Any", types.SimpleNamespace(write=self.put)), lineterminator="\n")
            rows = [] if self.begun else [batch.schema.names]
            writer.writerows(rows + [[v if isinstance(v, float) else _cell(v) for v in row.values()] for row in _rows(batch)])
            self.begun = True
        else:
            self._table(batch)
        self.file.flush()

    def _table(self, batch: pa.RecordBatch) -> None:
        t = pa.types
        sides = ["<>"[t.is_integer(f.type) or t.is_floating(f.type)] for f in batch.schema]
        rows = [[_cell(v) for v in row.values()] for row in _rows(batch)]
        lines = rows if self.begun else [batch.schema.names, *rows]
        self.widths = self.widths or [min(60, max(map(len, column))) for column in zip(*lines)]
        for row in lines:
            line = "  ".join(f"{c:{side}{width}}" for c, side, width in zip(row, sides, self.widths)).rstrip()
            self.put((line if self.begun else _paint(line, "1", self.file)) + "\n")
            self.begun = True

    def value(self, value: Any, schema: pa.Schema) -> None:
        """Write a unary result: a plain value as itself, a dataclass or a batch as rows."""
        opened = _opened(value)
        if self.kind in ("json", "ndjson") and (opened is None or opened.num_rows == 1):
            self.put(_to_json(value if opened is None else _rows(opened)[0]) + "\n")
        elif opened is None and self.kind == "table":
            self.put(_cell(value) + "\n" if value is not None else "")
        elif opened is not None or len(schema):
            self.batch(opened or pa.RecordBatch.from_arrays([pa.array([value], schema.field(0).type)], schema=schema))
            self.close()
        self.file.flush()

    def close(self) -> None:
        """Write what ends the format."""
        if self.kind == "json":
            self.put("\n]\n" if self.begun else "[]\n")
        if self.arrow is not None:
            self.arrow.close()
        self.file.flush()


@contextlib.contextmanager
def _output(args: Any) -> Iterator[_Output]:
    """Open where the answer goes, in the format that the flags, the file's name or the terminal decide."""
    ending = os.path.splitext(args.output or "")[1].lstrip(".")
    kind = args.format if args.format != "auto" else {"arrows": "arrow"}.get(ending, ending)
    if kind not in _FORMATS:
        kind = "table" if not args.output and sys.stdout.isatty() else "ndjson"
    with contextlib.ExitStack() as stack:
        mode = "ab" if args.resume and os.path.exists(args.resume) else "wb"
        yield _Output(kind, stack.enter_context(open(args.output, mode)) if args.output else sys.stdout.buffer)


def _bookmark(path: str | None, name: str) -> tuple[int, bytes]:
    """(input rows answered, token) as ``--resume`` left them; (0, nothing) at the beginning."""
    if not path or not os.path.exists(path):
        return 0, b""
    facts = _json_object(_read_file(path))
    if facts.get("method") != name or not isinstance(facts.get("token"), str) or not isinstance(facts.get("rows"), int):
        raise _CliError(f"{path}: not where a call of {name} stopped", "remove the file to start from the beginning")
    return facts["rows"], facts["token"].encode()


def _save_bookmark(path: str, name: str, rows: int, token: bytes) -> None:
    """Remember that all so far was written; the old file stays until the new one is whole. It is its owner's alone."""
    with open(f"{path}.new", "w", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)) as f:
        json.dump({"method": name, "rows": rows, "token": token.decode()}, f)
    os.replace(f"{path}.new", path)


def _call(args: Any) -> int:
    with _connected(args) as channel:
        service, method = _describe_live(channel, args)
        if method is None:
            raise _CliError("METHOD is missing", f"{service.protocol_name} has {', '.join(service.methods)}")
        stream = method.method_type is MethodType.STREAM
        if bool(args.input) != bool(method.is_exchange) and (not stream or method.is_exchange is not None):
            taken = "no input: it is no exchange" if args.input else "batches"
            raise _CliError(f"{method.name}() takes {taken}", _usage_of(method))
        if args.resume and not (stream and isinstance(channel, HttpClient)):
            raise _CliError("--resume is for streams over HTTP: elsewhere the state ends with the connection")
        info, options = _live_method(service, method), _options(args, service.protocol_version)
        values = _arguments(args, method)
        if stream:
            _call_stream(args, channel, info, method, options, values)
            return _OK
        value = channel.unary(info, _request(args, info, method, values), options)
        with _output(args) as output:
            output.value(value, method.result_schema)
    return _OK


def _call_stream(args: Any, channel: Any, info: Any, method: MethodDescription, options: CallOptions, values: Any) -> None:
    """Start a stream, or go on with the one that the bookmark remembers, and write what it answers."""
    name = f"{info.protocol_name}.{info.name}"
    answered, token = _bookmark(args.resume, name)
    batches = _input_batches(args.input, args.rows) if args.input else iter(())
    first = next(batches, None)
    if first is not None and "schema" in method.params_schema.names:
        values.setdefault("schema", _schema_to_bytes(first.schema))
    if token:
        stream = channel.resume(info, token, options)
    else:
        stream = channel.stream(info, _request(args, info, method, values), options)
    with StreamSession(stream, info) as session, _output(args) as output:
        if session.header is not None:
            output.header(_traced(args, "< header", session.header))
        given = (batch for part in ([first] if first is not None else [], batches) for batch in part)
        _write_turns(args, session, _turns(args, session, given, answered), output, name)


def _turns(args: Any, session: StreamSession, batches: Iterator[pa.RecordBatch], skip: int) -> Iterator[Any]:
    """(answer, input rows answered by then) of each turn; *skip* of them were answered before."""
    if not args.input:
        yield from ((answer, 0) for answer in session)
    rows = 0
    for batch in batches:
        fresh = batch.slice(min(batch.num_rows, max(0, skip - rows)))
        rows += batch.num_rows
        if fresh.num_rows or not batch.num_rows:
            yield session.exchange(AnnotatedBatch(_traced(args, "> input", fresh))), rows


def _write_turns(args: Any, session: StreamSession, turns: Any, output: _Output, name: str) -> None:
    """Write each answer as it comes, with a line of progress on a terminal from one second on."""
    counted, left, started = CallStatistics(), args.limit, time.monotonic()

    def show(text: str = "") -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    try:
        while left is None or left > 0:
            answer, rows = next(turns, (None, 0))
            show()
            if answer is None:
                if args.resume and os.path.exists(args.resume):
                    os.unlink(args.resume)
                break
            batch = _traced(args, "< answer", answer.batch)
            # A stream that may be resumed is cut between batches only: what its token stands behind was written whole.
            output.batch(batch if left is None or args.resume else batch.slice(0, left), answer.custom_metadata)
            if args.resume and not session.closed:
                _save_bookmark(args.resume, name, rows, session.token())
            left = None if left is None else left - batch.num_rows
            counted.record_output(batch)
            took = time.monotonic() - started
            if took >= 1:
                rate, size = counted.output_rows / took, counted.output_bytes / 1e6
                show(f"{counted.output_batches} batches, {counted.output_rows} rows, {size:.1f} MB, {rate:.0f} rows/s")
    finally:
        show()
        output.close()


def _describe(args: Any) -> int:
    with _connected(args) as channel:
        service, method = _describe_live(channel, args)
        service = service if method is None else dataclasses.replace(service, methods={method.name: method})
        limits = dataclasses.asdict(channel.capabilities(_options(args).deadline)) if isinstance(channel, HttpClient) else {}
    facts = {f.name: getattr(service, f.name) for f in dataclasses.fields(service) if f.name != "methods"}
    facts.update(limits={k: v for k, v in limits.items() if v}, methods=list(map(_facts_of, service.methods.values())))
    if args.format in ("text", "markdown"):
        print(_describe_text(facts, service, args.format == "markdown"))
    else:
        print(_describe_python(service) if args.format == "python" else json.dumps(facts, indent=2))
    return _OK


def _facts_of(method: MethodDescription) -> dict[str, Any]:
    """What there is to say about a method."""
    streams = {True: "exchange", False: "producer", None: "stream"}
    kind = streams[method.is_exchange] if method.method_type is MethodType.STREAM else "unary"
    facts: dict[str, Any] = {"name": method.name, "kind": kind}
    schemas = {"parameters": method.params_schema, "result": method.result_schema, "header": method.header_schema}
    for name, schema in schemas.items():
        if schema is not None and (name != "result" or method.has_return):
            facts[name] = [{"name": f.name, "type": _type_text(f.type), "nullable": f.nullable} for f in schema]
    extra = {"idempotency": method.idempotency, "deprecated": method.deprecation}
    return {**facts, **{k: v for k, v in extra.items() if v not in ("unknown", None)}, "usage": _usage_of(method)[7:]}


def _describe_text(facts: dict[str, Any], service: ServiceDescription, markdown: bool) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return ", ".join(map(shown, value)) or "none"
        return f"{value['name']}: {value['type']}{' | null' * value['nullable']}" if isinstance(value, dict) else str(value)

    item = "- {}: {}" if markdown else "  {}: {}"
    lines = [f"{'# ' * markdown}{service.protocol_name} {service.protocol_version}".rstrip()]
    for method in facts["methods"]:
        lines += ["", f"{'## ' * markdown}{method['name'] if markdown else _paint(method['name'], '1', sys.stdout)}"]
        lines += [item.format(name, shown(value)) for name, value in method.items() if name != "name"]
    rest = {**facts["limits"], "protocol_hash": service.protocol_hash, "server_id": service.server_id}
    return "\n".join([*lines, "", *(item.format(name.replace("_", " "), shown(value)) for name, value in rest.items())])


def _annotation_of(column: pa.Field) -> str:
    """Python source of an annotation that has exactly this Arrow type; what Python has no word for, in Arrow's own bytes."""
    known = {codec_for(t).arrow_type: t.__name__ for t in (bool, int, float, str, bytes)}
    known.update({pa.list_(t): f"list[{n}]" for t, n in list(known.items())})
    known.update({pa.map_(pa.utf8(), t): f"dict[str, {n}]" for t, n in list(known.items())})
    data = base64.b64encode(pa.schema([column.with_name("_")]).serialize().to_pybytes()).decode()
    text = known.get(column.type, f'Annotated[Any, vgi_rpc.ArrowType(_arrow("{data}"))]')
    return f"{text} | None" if column.nullable else text


_PYTHON_HEAD = '''"""{name}, as the server described itself to vgi_rpc {version}."""

import base64
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

import pyarrow as pa
import vgi_rpc


def _arrow(schema: str) -> pa.DataType:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(schema))).field(0).type
'''


def _describe_python(service: ServiceDescription) -> str:
    """A module with a typed Protocol of the service."""
    lines = _PYTHON_HEAD.format(name=service.protocol_name, version=__version__).splitlines()
    headers = {m.name: m.name.title().replace("_", "") + "Header" for m in service.methods.values() if m.has_header}
    for name, header in headers.items():
        fields = [f"    {f.name}: {_annotation_of(f)}" for f in service.methods[name].header_schema or ()] or ["    pass"]
        lines += ["", "", "@dataclass(frozen=True)", f"class {header}(vgi_rpc.ArrowSerializableDataclass):", *fields]
    lines += ["", "", f"class {service.protocol_name.replace('.', '_')}(Protocol):"]
    lines += [f"    protocol_name: ClassVar[str] = {service.protocol_name!r}"]
    lines += [f"    protocol_version: ClassVar[str] = {service.protocol_version!r}"] if service.protocol_version else []
    for method in service.methods.values():
        parameters = ", ".join(["self", *(f"{f.name}: {_annotation_of(f)}" for f in method.params_schema)])
        result = _annotation_of(method.result_schema.field(0)) if method.has_return else "None"
        if method.method_type is MethodType.STREAM:
            state = {True: "ExchangeState", False: "ProducerState"}.get(cast("bool", method.is_exchange), "StreamState")
            header = f", {headers[method.name]}" if method.has_header else ""
            result = f"vgi_rpc.Stream[vgi_rpc.{state}{header}]"
        lines += ["", f"    def {method.name}({parameters}) -> {result}: ..."]
    return "\n".join(lines)


def _ping(args: Any) -> int:
    times = []
    with _connected(args) as channel:
        proxy = make_proxy(Reflection, channel, _options(args))
        for _ in range(max(1, args.number) + 1):
            start = time.perf_counter()
            proxy.list_protocols()
            times.append((time.perf_counter() - start) * 1000)
    times = sorted(times[1:])  # the first one connects
    median, p99 = times[len(times) // 2], times[int((len(times) - 1) * 0.99)]
    print(f"{len(times)} round trips: min {times[0]:.3f} ms, median {median:.3f} ms, p99 {p99:.3f} ms")
    return _OK


def _versions() -> str:
    own = f"vgi_rpc {__version__} (wire {REQUEST_VERSION.decode()}, Python {sys.version.split()[0]}"
    return f"{own}, pyarrow {pa.__version__}, codecs {', '.join(supported_encodings())})"


@contextlib.contextmanager
def _served(kind: str, folder: str) -> Iterator[Any]:
    """A proxy of the demo over one kind of transport; what listens is a child."""
    import subprocess

    command = [sys.executable, os.path.abspath(__file__), "serve"]
    here: dict[str, Callable[[], Any]] = {
        "pipe": lambda: serve_pipe(Demo, DemoImpl()),
        "subprocess": lambda: connect(Demo, [*command, "--stdio"]),
        "wsgi": lambda: http_connect(Demo, client=make_sync_client(RpcServer(Demo, DemoImpl()))),
    }
    there: dict[str, tuple[str, Callable[[str, str], Any]]] = {
        "http": ("--port=0", lambda _, port: http_connect(Demo, f"http://127.0.0.1:{port}")),
        "tcp": ("--tcp=0", lambda host, port: tcp_connect(Demo, host, int(port))),
        "unix": (f"--unix={folder}/s", lambda _, path: unix_connect(Demo, path)),
    }
    with contextlib.ExitStack() as stack:
        if kind in there:
            flag, opened = there[kind]
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
            child: Any = stack.enter_context(subprocess.Popen([*command, flag, "--announce"], **pipes))
            stack.callback(child.terminate)
            host, _, port = child.stdout.readline().strip().partition(":")[2].rpartition(":")
            here[kind] = functools.partial(opened, host, port)
        yield stack.enter_context(here[kind]())


def _selfcheck(args: Any) -> int:
    import tempfile

    batch = pa.RecordBatch.from_pydict({"x": [1.0, None, 3.0]})

    def statistics(proxy: Any) -> Any:
        with proxy.statistics(schema=batch.schema) as session:
            return [session.exchange(AnnotatedBatch(batch)).batch.to_pylist()[0]["x"]["count"] for _ in range(2)]

    def countdown(proxy: Any) -> Any:
        session = proxy.countdown(start=2)
        return [session.header.batches, *(answer.batch.to_pylist()[0]["n"] for answer in session)]

    calls: tuple[Callable[[Any], Any], ...] = (lambda proxy: proxy.add(a=2.0), countdown, statistics)
    checks = dict(zip(("unary", "producer", "exchange"), zip(calls, (3.0, [3, 2, 1, 0], [2, 4]))))
    print(_versions() + f"\n{'ms':12}" + "".join(f"{name:>10}" for name in checks))
    code = _OK
    for kind in ("pipe", "subprocess", "wsgi", "http", "tcp", *(["unix"] if hasattr(socket, "AF_UNIX") else [])):
        line = f"{kind:12}"
        try:
            with tempfile.TemporaryDirectory() as folder, _served(kind, folder) as proxy:
                for call, wanted in checks.values():
                    start = time.perf_counter()
                    got = call(proxy)
                    if got != wanted:
                        raise ValueError(f"expected {wanted}, got {got}")
                    line += f"{(time.perf_counter() - start) * 1000:10.2f}"
            print(f"{line}  {_paint('ok', '32', sys.stdout)}", flush=True)
        except Exception as exc:
            code = _FAILED
            print(f"{line}  {_paint('FAILED', '1;31', sys.stdout)} {_text_of(exc)}", flush=True)
    return code


def _explain(args: Any) -> int:
    data = _read_file(args.file)
    if re.match(rb"HTTP/1|[A-Z]+ \S+ HTTP/1", data):
        head, _, data = data.partition(b"\r\n\r\n")
        print(re.sub(r"(?im)^((?:proxy-)?authorization|cookie): .*$", r"\1: …", head.decode("latin-1").replace("\r", "")))
    for magic, encoding in ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd")):
        if data.startswith(magic):
            print(f"{len(data)} bytes of {encoding}")
            data = decompress_body(data, encoding, CLIENT_MAX_RESPONSE_BYTES)
    source = BufferSource(data)
    try:
        while source.left:
            _explain_stream(source)
    except (IPCError, ProtocolError) as exc:
        raise _CliError(f"before byte {source.position} of {len(data)}: {_text_of(exc)}", code=_FAILED) from None
    return _OK


def _explain_stream(source: BufferSource) -> None:
    """Print one IPC stream, message by message."""
    start = source.position
    reader = IpcReader(source)
    print(f"stream at byte {start}: {_schema_text(reader.schema)}")
    for message in iter(reader.next_message, None):
        metadata = message.head.metadata or {}
        kind = "request" if METHOD_KEY in metadata else batch_kind(message.head.rows, metadata).value
        kind = "tick" if kind == "data" and not len(reader.schema) else kind
        print(f"  {kind}: {message.head.rows} rows, {len(message.data)} bytes")
        for key, value in metadata.items():
            token = key in (STATE_KEY, CALL_STATE_KEY)
            print(f"    {_as_text(key)} = {f'<{len(value)} bytes>' if token else _as_text(value)}")
        for row in _rows(reader.decode(message).slice(0, 3)):
            print(f"    {_to_json(row)[:200]}")
    print(f"  end at byte {source.position}")


def _as_text(data: bytes) -> str:
    return data[:500].decode("utf-8", "backslashreplace")


def _completion(args: Any) -> int:
    flags = {name: " ".join(w for a in c.arguments for w in a[0].split() if w[0] == "-") for name, c in _commands().items()}
    if args.shell == "fish":
        for name, words in flags.items():
            print(f"complete -c vgi-rpc -n __fish_use_subcommand -a {name}")
            print(f"complete -c vgi-rpc -n '__fish_seen_subcommand_from {name}' -a '{words}'")
        return _OK
    print("autoload -U +X bashcompinit && bashcompinit\n" * (args.shell == "zsh") + "_vgi_rpc() {")
    print(f"  local words='{' '.join(flags)} --version --help'\n  [ $COMP_CWORD -gt 1 ] && case ${{COMP_WORDS[1]}} in")
    print("\n".join(f"    {name}) words='{words}' ;;" for name, words in flags.items()))
    print('  esac\n  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))\n}')
    print("complete -o default -F _vgi_rpc vgi-rpc")
    return _OK


_FORMATS = ("auto", "json", "ndjson", "table", "csv", "arrow")


class _Command(NamedTuple):
    """A command: what runs it, what it is for, its arguments as argparse takes them, and examples."""

    run: Callable[[Any], int]
    summary: str
    arguments: list[tuple[str, dict[str, Any]]]
    examples: tuple[str, ...] = ("",)


def _commands() -> dict[str, _Command]:
    """Every command with everything it takes."""

    def value(flags: str, metavar: str | None, help: str, **more: Any) -> tuple[str, dict[str, Any]]:
        return flags, {"metavar": metavar, "help": help, **more}

    def flag(flags: str, help: str) -> tuple[str, dict[str, Any]]:
        return flags, {"action": "store_true", "help": help}

    where = value("where", "WHERE", "http(s)://HOST[:PORT][/PREFIX], unix:PATH, tcp:HOST:PORT, or a command in quotes")
    connecting = [
        value("-H --header", "'K: V'", "a further HTTP header; may be repeated", action="append", default=[]),
        value("--bearer-file", "FILE", "send the token that this file holds"),
        value("--timeout", "SECONDS", "give up on a call or a turn after so long", type=float),
        flag("-v --verbose", "the server's log lines, its stderr and its tracebacks, on stderr"),
    ]
    serve = [
        value("target", "TARGET", "module:Class, path/to/file.py:Class or module:factory(); default: a small demo", nargs="?"),
        value("--host", "HOST", "address to bind (default: %(default)s)", default="127.0.0.1"),
        value("--port", "PORT", "0 takes a free one (default: %(default)s)", type=int, default=8000),
        value("--unix", "PATH", "serve a Unix socket instead of HTTP"),
        value("--tcp", "[HOST:]PORT", "serve TCP instead of HTTP"),
        flag("--stdio", "serve stdin and stdout instead of HTTP"),
        value("--prefix", "/PATH", "serve HTTP under this path"),
        value("--token-key-file", "FILE", "keys of the state tokens, one a line: the first signs, all verify"),
        value("--bearer-file", "FILE", "ask for a bearer token; a line is TOKEN, or NAME TOKEN"),
        value("--cors", "ORIGINS", "origins whose pages may call, separated by commas; * for all"),
        value("--max-request-bytes", "SIZE", "largest request, such as 64M", type=_size),
        value("--max-response-bytes", "SIZE", "largest answer", type=_size),
        value("--max-connections", "N", "at most so many at a time", type=int),
        value("--timeout", "SECONDS", "for reading one request, and for sending its answer", type=float),
        value("--token-ttl", "SECONDS", "how long a state token is good for; 0 for ever", type=float),
        value("--tls-cert", "FILE", "serve TLS with this certificate chain (PEM)"),
        value("--tls-key", "FILE", "the certificate's key, when it is in a file of its own"),
        value("--access-log", "FILE", "append a JSON line per call; - is stderr"),
        flag("--no-describe", "no reflection and no pages"),
        flag("--no-json", "no calls in JSON"),
        flag("--no-tracebacks", "errors without the server's traceback"),
        flag("--announce", "print PORT:<n>, UNIX:<path> or TCP:<host>:<port> on stdout when listening"),
        flag("--check", "load the service, print what would be served, and exit"),
        flag("--reload", "start again when a loaded module changes; open streams go on"),
    ]
    for name, settings in serve:
        twin = "VGI_RPC_" + name.lstrip("-").replace("-", "_").upper()
        settings["help"] += f" [{twin}]"
        if os.environ.get(twin):
            given = os.environ[twin]
            settings["default"] = _TRUTH.get(given.lower(), False) if "action" in settings else given
    call = [
        where,
        value("method", "METHOD", "name of the method, or Protocol.method", nargs="?"),
        value("parameters", "KEY=VALUE", "key=value typed by the live schema, key:=json, key=@file", nargs="*"),
        value("-j --json", "JSON", "parameters as a JSON object; @file, or - for stdin"),
        value("-i --input", "FILE", "batches for an exchange: Arrow, NDJSON or CSV; - is stdin, read as it comes"),
        value("--rows", "N", "rows of the input per turn (default: Arrow's batches, 100 lines of text)", type=int),
        value("-f --format", None, "auto: a table on a terminal, else NDJSON", choices=_FORMATS, default="auto"),
        value("-o --output", "FILE", "write the answer there; its ending may say the format"),
        value("--limit", "N", "stop after so many rows", type=int),
        value("--resume", "FILE", "keep the stream's token there, and go on from it if it is there (HTTP)"),
        flag("--debug", "the shape of each batch on the wire, on stderr"),
        *connecting,
    ]
    method = value("method", "METHOD", "only this one", nargs="?")
    shapes = ("text", "json", "markdown", "python")
    formats = value("-f --format", None, "python: a typed Protocol that works", choices=shapes, default="text")
    number = value("-n --number", "N", "how many (default: %(default)s)", type=int, default=10)
    url, worker = "http://127.0.0.1:8000", f'"{_program()} serve --stdio"'
    demo = (f"{url} add a=1 b=2", f"{worker} countdown start=3 -f json", f"{url} statistics -i weather.csv --rows 500")
    serving = ("", "app.py:Calculator --port 0", "'app:make()' --check", "--unix /tmp/demo.sock")
    captured = value("file", "FILE", "- is stdin")
    shells = ("shell", {"choices": ("bash", "zsh", "fish")})
    return {
        "serve": _Command(_serve, "serve a class, over HTTP unless told otherwise", serve, serving),
        "call": _Command(_call, "call a method", call, demo),
        "describe": _Command(_describe, "show what a server offers", [where, method, formats, *connecting], (url,)),
        "ping": _Command(_ping, "measure round trips", [where, number, *connecting], (url, f"{worker} -n 100")),
        "selfcheck": _Command(_selfcheck, "call the demo over every transport of this machine", []),
        "explain": _Command(_explain, "print captured bytes of the wire as text", [captured], ("answer.bin",)),
        "completion": _Command(_completion, "print a completion script for a shell", [shells], ("bash",)),
    }


def _parse(words: list[str]) -> tuple[Callable[[Any], int], Any]:
    """Read the command line: what is to be run, and with which arguments."""
    import argparse

    commands, name = _commands(), words[0] if words else ""
    if name in ("--version", "--help", "-h", ""):
        lines = [f"usage: {_program()} COMMAND …", "", *(f"  {n:12}{c.summary}" for n, c in commands.items())]
        lines += ["", f"{_program()} COMMAND --help says what it takes, with examples; --version says the versions."]
        print(_versions() if name == "--version" else "\n".join(lines), file=sys.stdout if name else sys.stderr)
        return (lambda _: _OK if name else _USAGE), None
    if name not in commands:
        raise _CliError(f"no command {name!r}{_suggest(name, commands)}", f"there are {', '.join(commands)}")
    command, program = commands[name], f"{_program()} {name}"
    examples = "examples:\n" + "\n".join(f"  {program} {example}".rstrip() for example in command.examples)
    formatter, summary = argparse.RawDescriptionHelpFormatter, f"{command.summary[0].upper()}{command.summary[1:]}."
    parser = argparse.ArgumentParser(program, None, summary, examples, formatter_class=formatter, allow_abbrev=False)
    for flags, settings in command.arguments:
        parser.add_argument(*flags.split(), **settings)
    args = parser.parse_intermixed_args(words[1:])
    args.words = words
    return command.run, args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; *argv* is what stands behind the program's name."""
    args: Any = None
    try:
        run, args = _parse(list(sys.argv[1:] if argv is None else argv))
        code = run(args)
        sys.stdout.flush()
        return code
    except SystemExit as exc:  # argparse has said what it had to say
        return exc.code if isinstance(exc.code, int) else _OK
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our stdout has had enough; the interpreter's last flush must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _OK
    except (_CliError, RpcError, ParameterError, IPCError, ProtocolError, OSError, ValueError) as exc:
        return _report(exc, args)


if __name__ == "__main__":
    # A served module that does `import vgi_rpc` must see these very classes, and not a second copy of them.
    sys.modules.setdefault("vgi_rpc", sys.modules["__main__"])
    sys.exit(main())
