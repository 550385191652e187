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

import base64, binascii, contextlib, contextvars, copy, dataclasses, enum, errno, functools, hashlib, hmac
import inspect, io, itertools, json, logging, operator, os, re, socket, struct, sys, threading, time, traceback
import types, typing, zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, Union, cast

import pyarrow as pa
from pyarrow import ipc

if typing.TYPE_CHECKING:
    import ssl

__version__ = "0.1.0"

__all__ = [
    "RpcError", "TransportError", "DeadlineExceededError", "AuthenticationError", "StatusError", "IPCError",  # errors
    "VersionError", "ProtocolVersionError", "ProtocolError", "ProtocolNotSpecifiedError", "ProtocolNotSupportedError",
    "MethodNotImplementedError", "TokenError", "RequestTooLargeError", "ResponseTooLargeError", "ServerDrainingError",
    "ParameterError", "Code", "BadRequest", "ErrorInfo", "FieldViolation", "Help", "HelpLink", "LocalizedMessage",
    "PreconditionFailure", "PreconditionViolation", "QuotaFailure", "QuotaViolation", "ResourceInfo", "RetryInfo",
    "AnnotatedBatch", "ArrowSerializableDataclass", "ArrowType", "Transient", "IpcValidation",  # data
    "rpc_methods", "describe_rpc", "RpcMethodInfo", "MethodType", "idempotent", "no_side_effects", "deprecated",  # services
    "RpcServer", "CallContext", "AuthContext", "current_auth", "CallStatistics", "ClientLog", "Level", "Message",
    "TransportKind", "ServeStartHook", "CallRecord", "DispatchHook", "configure_access_log",
    "Stream", "StreamState", "ProducerState", "ExchangeState", "OutputCollector", "StreamSession", "resume",  # streams
    "serve_pipe", "run_server", "serve_stdio", "serve_unix", "serve_tcp", "serve_http", "make_wsgi_app",  # serving
    "make_sync_client", "HttpOptions", "HttpServeOptions", "HttpRequest", "AuthFailure", "AuthReason", "bearer_authenticate",
    "bearer_authenticate_static", "chain_authenticate",
    "connect", "unix_connect", "tcp_connect", "http_connect", "with_options", "StderrMode", "RpcConnection",  # connecting
    "make_pipe_pair", "PipeTransport", "SubprocessTransport", "WorkerPool", "PoolMetrics", "http_capabilities",
    "HttpServerCapabilities",
    "introspect", "http_introspect", "list_protocols", "describe_protocol", "ServiceDescription", "MethodDescription", "Limit",
]

_T = TypeVar("_T")
_P = TypeVar("_P")
logger = logging.getLogger("vgi_rpc")
_wire_read, _wire_write = (logging.getLogger(f"vgi_rpc.wire.{way}") for way in ("read", "write"))  # shapes, never values


# ============================================================================
# 1. CONSTANTS ......................................... uses nothing
# ============================================================================
# Every key on the wire, every header name and every default limit, each once.
# Peers of other languages depend on the spelling: none of it changes without a new wire version.

REQUEST_VERSION = b"1"
DESCRIBE_VERSION = "5"  # of the reflection answer, as the family numbers it

# Custom metadata of request batches.
METHOD_KEY, REQUEST_VERSION_KEY, REQUEST_ID_KEY = b"vgi_rpc.method", b"vgi_rpc.request_version", b"vgi_rpc.request_id"
PROTOCOL_KEY, PROTOCOL_VERSION_KEY = b"vgi_rpc.protocol", b"vgi_rpc.protocol_version"
TIMEOUT_KEY = b"vgi_rpc.timeout_ms"  # ours: what is left of the caller's deadline, in ms; other servers ignore it
TRACE_KEYS = (b"traceparent", b"tracestate")
CANCEL_KEY, SHM_KEY = b"vgi_rpc.cancel", b"vgi_rpc.transport.shm"

# Custom metadata of answers.
LOG_LEVEL_KEY, LOG_MESSAGE_KEY, LOG_EXTRA_KEY = b"vgi_rpc.log_level", b"vgi_rpc.log_message", b"vgi_rpc.log_extra"
SERVER_ID_KEY, ERROR_CODE_KEY, ERROR_KIND_KEY = b"vgi_rpc.server_id", b"vgi_rpc.error_code", b"vgi_rpc.error_kind"
ERROR_DETAILS_KEY, LOCATION_KEY, SHM_OFFSET_KEY = b"vgi_rpc.error_details", b"vgi_rpc.location", b"vgi_rpc.shm_offset"
STATE_KEY, CALL_STATE_KEY = b"vgi_rpc.stream_state#b64", b"vgi_rpc.call_state#b64"
DOC_KEY, DEFAULTS_KEY, PARAM_DOCS_KEY = b"vgi_rpc.doc", b"vgi_rpc.defaults", b"vgi_rpc.param_docs"  # ours: of schemas
LIMITS_KEY = b"vgi_rpc.limits"  # ours: of the schema of the first method's parameters

RESERVED_PROTOCOL_PREFIX = "vgi_rpc."
REFLECTION_PROTOCOL = "vgi_rpc.Reflection.v1"
TRANSPORT_OPTIONS_METHOD = "__transport_options__"
PROTOCOL_NAME_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,254}")

# HTTP.
ARROW_CONTENT_TYPE = "application/vnd.apache.arrow.stream"
REQUEST_ID_HEADER, RPC_ERROR_HEADER, AUTH_REASON_HEADER = "X-Request-ID", "X-VGI-RPC-Error", "VGI-Auth-Reason"
ACCEPT_ENCODING_HEADER, CONTENT_ENCODING_HEADER = "X-VGI-Accept-Encoding", "X-VGI-Content-Encoding"
ACCEPT_MAX_RESPONSE_BYTES_HEADER = "VGI-Accept-Max-Response-Bytes"
ACCEPT_MAX_RESPONSE_BYTES_SUPPORT_HEADER = "VGI-Accept-Max-Response-Bytes-Support"
SUPPORTED_ENCODINGS_HEADER, EXTERNALIZATION_HEADER = "VGI-Supported-Encodings", "VGI-Externalization-Enabled"
MAX_REQUEST_BYTES_HEADER, MAX_RESPONSE_BYTES_HEADER = "VGI-Max-Request-Bytes", "VGI-Max-Response-Bytes"
# Ours: how many turns of a producer the client takes in one answer, on the same tick. Other servers ignore it and answer one.
MAX_TURNS_HEADER = "VGI-Max-Turns"

# Limits. Each is a default that the matching option overrides.
MIN_RESPONSE_BUDGET = 65_536  # the family's floor for VGI-Accept-Max-Response-Bytes
MAX_RESPONSE_BUDGET = 2**53 - 1  # the largest integer that JSON peers keep exact
CLIENT_MAX_RESPONSE_BYTES = 268_435_456  # what our HTTP client asks for and reads at most: 256 MiB
SERVER_MAX_REQUEST_BYTES = 268_435_456  # what an HTTP server reads of one body, encoded and decoded
MAX_METADATA_BYTES = 67_108_864  # one message's head; tokens live there, so it is large
MAX_COLUMNS = 4_096
MAX_NESTING = 64  # levels of list, map and struct in a foreign schema
FREE_ROWS = 1 << 24  # more rows than this must be paid for with at least one bit of body each
FREE_DECODED_BYTES = 1 << 30  # of compressed buffers, or 1,024 times theirs; only where max_request_bytes is not set
MAX_ERROR_MESSAGE_CHARS, MAX_TRACEBACK_CHARS, MAX_TRACEBACK_FRAMES = 16_000, 16_000, 5
MAX_ERROR_DETAILS_BYTES = 4_096  # above it the details are left out whole (the family's rule)
MAX_ERROR_KIND_CHARS, MAX_REQUEST_ID_CHARS, MAX_HEADERS = 255, 128, 100
MAX_HEAD_BYTES = 131_072  # request line or status line with all headers; holds a bearer token of 100 KB
TOKEN_TTL_SECONDS = 3_600.0
TOKEN_CLOCK_SKEW_SECONDS = 60.0  # how far ahead of us another server's clock may run
READ_TIMEOUT_SECONDS = 30.0  # HTTP: between two bytes of one request
REQUEST_DEADLINE_SECONDS = 300.0  # HTTP: for the whole of one request, first byte to last
DRAIN_GRACE_SECONDS = 30.0
TLS_HANDSHAKE_SECONDS = 5.0
REAP_SECONDS = 1.0  # how long a worker that died while idle in a pool may stay a zombie
WORKER_EXIT_SECONDS = 5.0  # how long a worker may take to leave after its stdin closed
MAX_PREFETCH = 16  # ticks that a client sends ahead on a byte stream: together far less than any pipe's buffer
SLOW_TURN_SECONDS = 0.01  # a producer that takes longer is not asked ahead on a byte stream
SLOW_READER_SECONDS = 1.0  # a reader that takes longer for a batch gets one an answer: no answer waits half read
MAX_TURNS = 1_024  # turns of a producer in one HTTP answer
MAX_TURNS_SECONDS = 5.0  # after so long an answer of several turns ends, so that a server drains and a proxy passes it on
SMALL_DICTIONARY_BYTES = 1_024  # of a message that is kept, as read or as written, for the next batch with the same values
SMALL_BODY_BYTES = 65_536  # below: one bytes object; above: read in place, written without copying

EMPTY_SCHEMA = pa.schema([])


# ============================================================================
# 2. ERRORS ............................................ uses 1
# ============================================================================
# Every exception of this file, its code, kind and HTTP status. An exception of another library never reaches a user.
#
#   RpcError                         what a client sees: the other side's error, or
#   ├── TransportError               no answer                                                   UNAVAILABLE
#   ├── DeadlineExceededError        no answer in time                                           DEADLINE_EXCEEDED
#   └── AuthenticationError          HTTP 401                                                    UNAUTHENTICATED
#   StatusError                      raised by a method: its own code, kind and details
#   _Refusal                         a request that is not served                           400  INVALID_ARGUMENT
#   ├── IPCError                     bytes that are not the Arrow they should be
#   ├── ParameterError (TypeError)   a parameter or result that is not as declared
#   ├── VersionError                 wire version; ProtocolVersionError the application's        FAILED_PRECONDITION
#   └── ProtocolError                a rule of the wire is broken
#       ├── ProtocolNotSpecified-, ProtocolNotSupported-, MethodNotImplementedError        404  UNIMPLEMENTED
#       ├── TokenError               a state token that is not for this call, or too old
#       ├── RequestTooLargeError     413, ResponseTooLargeError 200                              RESOURCE_EXHAUSTED
#       └── ServerDrainingError      the server is about to stop                            503  UNAVAILABLE
#   AuthFailure (ValueError)         raised by an `authenticate` callback, with a reason    401


class Code(str, enum.Enum):
    """gRPC's sixteen error codes; the value is the name on the wire."""
    CANCELLED, UNKNOWN, INVALID_ARGUMENT, NOT_FOUND = "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "NOT_FOUND"
    DEADLINE_EXCEEDED, ALREADY_EXISTS, PERMISSION_DENIED = "DEADLINE_EXCEEDED", "ALREADY_EXISTS", "PERMISSION_DENIED"
    RESOURCE_EXHAUSTED, FAILED_PRECONDITION, ABORTED = "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED"
    OUT_OF_RANGE, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE"
    DATA_LOSS, UNAUTHENTICATED = "DATA_LOSS", "UNAUTHENTICATED"
    __str__ = str.__str__

    @classmethod
    def parse(cls, text: object) -> Code:
        """Return the code of that name; anything else is ``UNKNOWN``, as peers may be newer than we are."""
        return next((code for code in cls if code.value == text), cls.UNKNOWN)

_DETAIL_TYPES: dict[str, type[_Detail]] = {}

class _Detail:
    """A typed error detail: a dataclass of the family's catalogue, where its name is the ``@type``."""
    TYPE: ClassVar[str] = ""
    _ITEMS: ClassVar[dict[str, type]] = {}  # the dataclasses inside its sequences

    def __init_subclass__(cls) -> None:
        if not cls.TYPE:  # an application's subclass stays what it derives from
            cls.TYPE = RESERVED_PROTOCOL_PREFIX + cls.__name__
            _DETAIL_TYPES[cls.TYPE] = cls

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object, ``@type`` included."""
        return {"@type": self.TYPE, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_json(cls: type[_T], obj: Mapping[str, Any]) -> _T:
        """Read the JSON object, ignoring unknown members; raises `ValueError` when one is absent that has no default."""
        try:
            known = cls._ITEMS.items()  # type: ignore[attr-defined]
            items = {name: tuple(_from_members(kind, i) for i in obj.get(name, ())) for name, kind in known}
            return cast("_T", _from_members(cls, {**obj, **items}))
        except (TypeError, AttributeError) as exc:
            raise ValueError(f"not a {cls.TYPE}: {exc}") from None  # type: ignore[attr-defined]

def _from_members(cls: Any, obj: Mapping[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{k: v for k, v in obj.items() if k in names})

@dataclass(frozen=True)
class ErrorInfo(_Detail):
    """Free key-value facts about the error."""
    metadata: Mapping[str, str] = field(default_factory=dict)

@dataclass(frozen=True)
class RetryInfo(_Detail):
    """When a retry may be worth it, in seconds from now."""
    retry_delay_seconds: float

@dataclass(frozen=True)
class FieldViolation:
    """One field of a bad request, by its path."""
    field: str
    description: str = ""

@dataclass(frozen=True)
class BadRequest(_Detail):
    """Which fields of the request were wrong."""
    _ITEMS = {"field_violations": FieldViolation}
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
    _ITEMS = {"violations": PreconditionViolation}
    violations: Sequence[PreconditionViolation] = ()

@dataclass(frozen=True)
class QuotaViolation:
    """One quota that was used up."""
    subject: str
    description: str = ""

@dataclass(frozen=True)
class QuotaFailure(_Detail):
    """Which quotas were used up."""
    _ITEMS = {"violations": QuotaViolation}
    violations: Sequence[QuotaViolation] = ()

@dataclass(frozen=True)
class ResourceInfo(_Detail):
    """Which resource the error is about."""
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
    _ITEMS = {"links": HelpLink}
    links: Sequence[HelpLink] = ()

@dataclass(frozen=True)
class LocalizedMessage(_Detail):
    """The error for an end user, in the language that *locale* names (BCP 47)."""
    locale: str
    message: str

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
    """Raised by a method that wants the client to see a code, a kind to branch on (an open set) and typed details. The details
    are those of the catalogue, or mappings with an ``@type`` of the application's own; each type once. A code or a detail that
    is not one is a `ValueError`."""
    def __init__(self, message: str, *, code: Code | str, kind: str | None = None,
                 details: Iterable[_Detail | Mapping[str, Any]] = ()) -> None:
        super().__init__(message)
        self.error_code, self.error_kind, self.error_details = Code(code), kind or "", _details_to_json(details)

def _detail_reader(kind: type[_T]) -> Callable[[RpcError], _T | None]:
    def read(self: RpcError) -> _T | None:
        return next((d for d in self.details() if isinstance(d, kind)), None)
    read.__name__ = re.sub(r"\B[A-Z]", r"_\g<0>", kind.__name__).lower()
    read.__qualname__, read.__doc__ = f"RpcError.{read.__name__}", f"Return the `{kind.__name__}` detail, if there is one."
    read.__annotations__["return"] = f"{kind.__name__} | None"
    return read


class RpcError(Exception):
    """What a client sees when a call fails."""
    def __init__(self, error_type: str, error_message: str, remote_traceback: str, *, request_id: str = "",
                 error_code: str = "", error_kind: str = "", error_details: list[dict[str, Any]] | None = None) -> None:
        super().__init__(f"{error_type}: {error_message}")
        self.error_type = error_type  # name of the exception's class on the other side
        self.error_message = error_message  # its text
        self.remote_traceback = remote_traceback  # the other side's, empty when the operator switched it off
        self.request_id = request_id  # id of the call, as the server logs it
        self.error_code = str(error_code)  # name of a `Code`
        self.error_kind = error_kind  # what to branch on, empty when the error has none
        self.error_details = error_details if error_details is not None else []  # JSON objects with an @type each

    def __reduce__(self) -> tuple[Any, ...]:  # the constructors of the subclasses differ; the attributes do not
        return type(self).__new__, (type(self), *self.args), self.__dict__

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

    error_info, retry_info, help = _detail_reader(ErrorInfo), _detail_reader(RetryInfo), _detail_reader(Help)
    bad_request, quota_failure = _detail_reader(BadRequest), _detail_reader(QuotaFailure)
    precondition_failure, resource_info = _detail_reader(PreconditionFailure), _detail_reader(ResourceInfo)
    localized_message = _detail_reader(LocalizedMessage)

    def is_retryable(self) -> bool:
        """Whether the same call may succeed later; clients never retry by themselves."""
        return self.code is Code.UNAVAILABLE or (self.code is Code.RESOURCE_EXHAUSTED and self.retry_info() is not None)

class _LocalError(RpcError):
    """An `RpcError` made on the client's side: no remote traceback, the class name is the type."""
    error_code_default: ClassVar[Code] = Code.UNAVAILABLE

    def __init__(self, message: str, *, request_id: str = "", error_kind: str = "") -> None:
        code = self.error_code_default.value
        super().__init__(type(self).__name__, message, "", request_id=request_id, error_code=code, error_kind=error_kind)

class TransportError(_LocalError):
    """No answer came: the peer could not be reached, went away, or does not speak Arrow IPC."""

class DeadlineExceededError(_LocalError):
    """The call's time ran out, here or on the server."""
    error_code_default = Code.DEADLINE_EXCEEDED

class AuthenticationError(_LocalError):
    """The server answered 401; `reason` says why: from the body, else from ``VGI-Auth-Reason``, else ``UNAUTHORIZED``."""
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
        self.protocol, self.client_version, self.server_version = protocol, client_version, server_version
        self.error_details = [PreconditionFailure((PreconditionViolation("protocol_version", protocol, message),)).to_json()]

class ProtocolError(_Refusal):
    """A request that breaks a rule of the wire."""

class ProtocolNotSpecifiedError(ProtocolError):
    """The request names no protocol."""
    error_kind = "protocol_not_specified"

class ProtocolNotSupportedError(ProtocolError):
    """The server does not host that protocol."""
    error_kind, error_code, http_status = "protocol_not_supported", Code.UNIMPLEMENTED, 404

class MethodNotImplementedError(ProtocolError):
    """The protocol has no such method."""
    error_kind, error_code, http_status = "method_not_implemented", Code.UNIMPLEMENTED, 404

class TokenError(ProtocolError):
    """A state token that this server did not sign, not for this call, or that is too old."""

class RequestTooLargeError(ProtocolError):
    """A request above the server's limit."""
    error_code, http_status = Code.RESOURCE_EXHAUSTED, 413

class ResponseTooLargeError(ProtocolError):
    """An answer above the smallest of the client's and the server's limits."""
    error_code, http_status = Code.RESOURCE_EXHAUSTED, 200

class ServerDrainingError(ProtocolError):
    """The server is stopping and takes no new calls; another may."""
    error_kind, error_code, http_status = "server_draining", Code.UNAVAILABLE, 503
    error_details = (RetryInfo(1.0).to_json(),)

class ParameterError(_Refusal, TypeError):
    """A parameter, field or result of the wrong type; on the wire it is a ``TypeError``."""
    error_type = "TypeError"

class AuthReason(str, enum.Enum):
    """Why a server answered 401: the closed set of the family."""
    MISSING_CREDENTIAL, INVALID_CREDENTIAL = "missing_credential", "invalid_credential"
    EXPIRED_CREDENTIAL, INSUFFICIENT_SCOPE = "expired_credential", "insufficient_scope"
    PROXY_REQUIRED, UNAUTHORIZED = "proxy_required", "unauthorized"
    __str__ = str.__str__

class AuthFailure(ValueError):
    """Raised by an ``authenticate`` callback to say why a credential was refused."""
    def __init__(self, reason: AuthReason, detail: str = "") -> None:
        super().__init__(detail or str(reason))
        self.reason, self.detail = AuthReason(reason), detail

def _sendable(text: str, limit: int, mark: str) -> str:
    """*text*, at most *limit* characters and then *mark*, and valid UTF-8 also where it holds lone surrogates."""
    text = text[:limit] + mark if len(text) > limit else text
    return text.encode("utf-8", "backslashreplace").decode("utf-8")

def _text_of(value: object) -> str:
    """``str(value)``, bounded and valid UTF-8, also when its ``__str__`` is broken."""
    try:
        text = str(value)
    except BaseException as exc:  # it may be an exception that a method raised, and must not end the server
        text = f"<{type(value).__name__}: its __str__ raised {type(exc).__name__}>"
    return _sendable(text, MAX_ERROR_MESSAGE_CHARS, "… <truncated>")

def _suggest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for a near miss, else nothing."""
    import difflib
    near = difflib.get_close_matches(name[:255], list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


# ============================================================================
# 3. LOG MESSAGES ...................................... uses 1-2
# ============================================================================
# A log line or an error as it travels: level, text, extra. An error is a message of level EXCEPTION.
# The metadata of a message is the only form in which an exception leaves a process.

class Level(enum.Enum):
    """Severity of a `Message`, most severe first; the value is the name on the wire."""
    EXCEPTION, ERROR, WARN, INFO, DEBUG, TRACE = "EXCEPTION", "ERROR", "WARN", "INFO", "DEBUG", "TRACE"

def _message_maker(level: Level) -> classmethod[Message, typing.Concatenate[str, ...], Message]:
    def make(cls: type[Message], message: str, **kwargs: object) -> Message:
        return cls(level, message, **kwargs)
    make.__name__, make.__qualname__ = level.name.lower(), f"Message.{level.name.lower()}"
    make.__doc__ = f"Make a message of level ``{level.name}``."
    return classmethod(make)


@dataclass(init=False, slots=True)
class Message:
    """One log line from a server, or one error."""
    MAX_TRACEBACK_CHARS = MAX_TRACEBACK_CHARS
    MAX_TRACEBACK_FRAMES = MAX_TRACEBACK_FRAMES
    level: Level
    message: str
    extra: dict[str, Any] | None  # JSON-compatible facts

    def __init__(self, level: Level, message: str, **kwargs: object) -> None:
        if not isinstance(level, Level):
            raise TypeError(f"message level: expected a Level, got {level!r:.100}")
        self.level, self.message = level, message if isinstance(message, str) else _text_of(message)
        self.extra = kwargs or None

    exception, error, warn, info, debug, trace = map(_message_maker, Level)

    @classmethod
    def from_exception(cls, exc: BaseException, *, include_traceback: bool = True) -> Message:
        """Describe an exception, whatever its own methods do: type, text, code, kind, details, traceback and last frames."""
        name, text = _error_type_of(exc), _text_of(exc)
        extra: dict[str, Any] = {"exception_type": name, "exception_message": text, "error_code": _error_code_of(exc).value}
        kind, details = _attribute(exc, "error_kind"), _error_details_of(exc)
        if isinstance(kind, str) and kind:
            extra["error_kind"] = _sendable(kind, MAX_ERROR_KIND_CHARS, "…")
        if details:
            extra["error_details"] = details
        if include_traceback:
            extra.update(_traceback_facts(exc))
        return cls(Level.EXCEPTION, f"{name}: {text}", **extra)

    def add_to_metadata(self, metadata: dict[str, str] | None = None) -> dict[str, str]:
        """Return *metadata* (a copy) with the keys of this message added."""
        out = {**(metadata or {}), LOG_LEVEL_KEY.decode(): self.level.value, LOG_MESSAGE_KEY.decode(): self.message}
        if self.extra:
            try:
                text = json.dumps(self.extra, default=_text_of)
            except (TypeError, ValueError, RecursionError):  # keys that are no text, or a list that holds itself
                text = json.dumps({str(key): _text_of(value) for key, value in self.extra.items()})
            out[LOG_EXTRA_KEY.decode()] = text
        return out

def _attribute(exc: BaseException, name: str) -> Any:
    """An attribute of an exception that a method raised, ``None`` also when reading it fails."""
    try:
        return getattr(exc, name, None)
    except BaseException:
        return None

def _error_type_of(exc: BaseException) -> str:
    return exc.error_type if isinstance(exc, ParameterError) else type(exc).__name__

def _error_code_of(exc: BaseException) -> Code:
    code = _attribute(exc, "error_code")
    return Code.parse(code) if isinstance(code, str) else Code.UNKNOWN

def _error_details_of(exc: BaseException) -> list[dict[str, Any]]:
    """The exception's details as JSON objects; an empty list when there are none, too many or unusable ones."""
    try:
        details = _details_to_json(_attribute(exc, "error_details") or ())
        return details if len(json.dumps(details)) <= MAX_ERROR_DETAILS_BYTES else []
    except Exception:  # whatever an application's object does when it is looked at
        return []

def _traceback_facts(exc: BaseException) -> dict[str, Any]:
    """``traceback``, ``frames`` (the last five), ``cause`` and ``context`` of an exception."""
    try:
        text = "".join(traceback.format_exception(type(exc), exc, exc.__traceback__))
        summary = traceback.extract_tb(exc.__traceback__)[-MAX_TRACEBACK_FRAMES:]
    except BaseException:  # a broken __str__ in the chain; the error itself is still worth sending
        text, summary = f"{type(exc).__name__}: <its traceback could not be formatted>\n", traceback.StackSummary()
    frames = [{"file": f.filename, "line": f.lineno, "function": f.name, "code": f.line or ""} for f in summary]
    facts: dict[str, Any] = {"traceback": _sendable(text, MAX_TRACEBACK_CHARS, "\n… <traceback truncated>"), "frames": frames}
    for name, other in (("cause", exc.__cause__), ("context", exc.__context__)):
        if other is not None:
            facts[name] = f"{type(other).__name__}: {_text_of(other)}"
    return facts

def _message_metadata(message: Message, server_id: str, request_id: str) -> dict[bytes, bytes]:
    """A message as metadata of a zero-row batch; for an error its code, kind and details also stand on their own."""
    metadata = {k.encode(): v.encode("utf-8", "backslashreplace") for k, v in message.add_to_metadata().items()}
    facts: dict[bytes, Any] = {SERVER_ID_KEY: server_id, REQUEST_ID_KEY: request_id}
    if message.level is Level.EXCEPTION:
        extra = message.extra or {}
        details = extra.get("error_details")
        facts |= {ERROR_CODE_KEY: extra.get("error_code") or Code.UNKNOWN, ERROR_KIND_KEY: extra.get("error_kind")}
        facts[ERROR_DETAILS_KEY] = json.dumps(details) if details else None
    return metadata | {key: str(fact).encode("utf-8", "backslashreplace") for key, fact in facts.items() if fact}

def _json_object(data: bytes | None) -> dict[str, Any]:
    """Parse *data* as a JSON object; anything else is an empty one (it comes from a peer and is only information)."""
    try:
        value = json.loads(data) if data else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

def _metadata_text(metadata: Mapping[bytes, bytes], key: bytes, default: object = "") -> str:
    value = metadata.get(key)
    return value.decode("utf-8", "replace") if value is not None else str(default or "")

def _message_from_metadata(metadata: Mapping[bytes, bytes]) -> Message:
    """The reverse of `_message_metadata`, for logs; an unknown level reads as INFO."""
    level = Level.__members__.get(_metadata_text(metadata, LOG_LEVEL_KEY), Level.INFO)
    message = Message(level, _metadata_text(metadata, LOG_MESSAGE_KEY))
    message.extra = _json_object(metadata.get(LOG_EXTRA_KEY)) or None
    return message

def _error_from_metadata(metadata: Mapping[bytes, bytes]) -> RpcError:
    """The `RpcError` of an error batch; code, kind and details from their own keys first, else from ``log_extra``."""
    extra, text = _json_object(metadata.get(LOG_EXTRA_KEY)), _metadata_text(metadata, LOG_MESSAGE_KEY)
    try:
        details = json.loads(metadata[ERROR_DETAILS_KEY])
    except (KeyError, ValueError, RecursionError):
        details = extra.get("error_details")
    kind = str(extra.get("exception_type") or text.partition(":")[0] or "Exception")
    code = _metadata_text(metadata, ERROR_CODE_KEY, extra.get("error_code"))
    timed_out = code == Code.DEADLINE_EXCEEDED and kind == "DeadlineExceededError"
    error = RpcError.__new__(DeadlineExceededError if timed_out else RpcError)
    RpcError.__init__(
        error, kind, str(extra.get("exception_message") or text), str(extra.get("traceback") or ""), error_code=code,
        request_id=_metadata_text(metadata, REQUEST_ID_KEY),
        error_kind=_metadata_text(metadata, ERROR_KIND_KEY, extra.get("error_kind")),
        error_details=[d for d in details if isinstance(d, dict)] if isinstance(details, list) else [],
    )
    return error


# ============================================================================
# 4. BATCHES ........................................... uses 1-3
# ============================================================================
# Arrow IPC streams in and out, message by message: framing, bounds, validation, casting, telling batches apart.
# Law: nothing foreign reaches pyarrow's decoder before its head was read and its size, rows and buffers were found
# plausible; whatever pyarrow then raises leaves this section as IPCError.

_Buffer: typing.TypeAlias = bytes | memoryview | pa.Buffer
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
    """A record batch with the custom metadata of its message."""
    batch: pa.RecordBatch  # rows x columns; immutable, safe to share between threads
    custom_metadata: pa.KeyValueMetadata | None = None  # None when the message carried none

    @classmethod
    def from_pydict(cls, data: dict[str, Any], schema: pa.Schema | None = None) -> AnnotatedBatch:
        """Build from ``{column: values}``, types inferred without *schema*; `TypeError` names the column that does not fit."""
        return cls(_batch_from_pydict(data, schema, "from_pydict"))

    def release(self) -> None:
        """Give back what the batch stands on; nothing to do here, as batches own their memory."""

def _batch_from_pydict(data: Mapping[str, Any], schema: pa.Schema | None, where: str) -> pa.RecordBatch:
    """Columns by name to a batch; errors name *where*, the column, what was expected and what came."""
    if schema is not None and set(data) != set(schema.names):
        raise ParameterError(f"{where}: expected columns {schema.names}, got {list(data)}")
    try:
        if schema is None:
            return pa.RecordBatch.from_pydict(dict(data))
        return pa.RecordBatch.from_arrays([_column_from(data[f.name], f, where) for f in schema], schema=schema)
    except ParameterError:
        raise
    except _ARROW_FAILURES as exc:
        raise ParameterError(f"{where}: {_text_of(exc)}") from None

def _column_from(values: Any, column: pa.Field, where: str) -> pa.Array:
    try:
        array = values if isinstance(values, pa.Array) else pa.array(values, column.type)
    except _ARROW_FAILURES as exc:
        expected = _type_text(column.type)
        raise ParameterError(f"{where}: column {column.name!r}: expected {expected}, got {_text_of(exc)}") from None
    return _without_nulls(array, column, where)

def _without_nulls(array: pa.Array, column: pa.Field, where: str) -> pa.Array:
    if not column.nullable and array.null_count:
        expected = _type_text(column.type)
        raise ParameterError(f"{where}: column {column.name!r}: expected {expected} without nulls, got a null")
    return array

@functools.lru_cache(maxsize=256)
def empty_batch(schema: pa.Schema) -> pa.RecordBatch:
    """Return the batch of 0 rows x the schema's columns that carries logs, errors, ticks and tokens."""
    return pa.RecordBatch.from_arrays([pa.nulls(0, f.type) for f in schema], schema=schema)

_TICK = pa.RecordBatch.from_arrays([], schema=EMPTY_SCHEMA)

class BatchKind(enum.Enum):
    """What a batch of a stream is (WIRE section 4): the only place that decides it is `batch_kind`."""
    DATA, LOG, ERROR, LOCATION, SHM, TOKEN = "data", "log", "error", "location", "shm", "token"

def batch_kind(num_rows: int, metadata: _Metadata | None) -> BatchKind:
    """Tell data from logs, errors, pointers and tokens; a zero-row batch without our keys is data."""
    if not metadata or num_rows:
        return BatchKind.DATA
    if LOG_LEVEL_KEY in metadata and LOG_MESSAGE_KEY in metadata:
        return BatchKind.ERROR if metadata[LOG_LEVEL_KEY] == b"EXCEPTION" else BatchKind.LOG
    keys = ((LOCATION_KEY, BatchKind.LOCATION), (SHM_OFFSET_KEY, BatchKind.SHM), (STATE_KEY, BatchKind.TOKEN))
    return next((kind for key, kind in keys if key in metadata), BatchKind.DATA)

class ByteSource:
    """Bytes in their order: what an `IpcReader` reads from."""
    def read(self, size: int) -> bytes:
        """Return the next *size* bytes, fewer only where the source ends."""
        raise io.UnsupportedOperation("read")

    def read_after(self, head: bytes, size: int) -> _Buffer:
        """Return *head* and the next *size* bytes in one piece of memory; shorter only where the source ends."""
        return head + self.read(size)

    def read_known(self, head: bytes, size: int) -> _Buffer | None:
        """As `read_after`, if *head* comes next and is there already or with the next bytes that come; else read nothing."""
        return None

class BufferSource(ByteSource):
    """A source over bytes in memory; *head* of `read_after` was the last thing read, and what is large is not copied there."""
    def __init__(self, data: _Buffer) -> None:
        self._whole: Any = data if isinstance(data, bytes) and len(data) <= SMALL_BODY_BYTES else pa.py_buffer(data)
        self.position = 0  # how many bytes were read so far

    def read(self, size: int) -> bytes:
        start, self.position = self.position, min(self.position + size, len(self._whole))
        return bytes(self._whole[start : self.position])

    def read_after(self, head: bytes, size: int) -> _Buffer:
        start, self.position = self.position - len(head), min(self.position + size, len(self._whole))
        return cast("_Buffer", self._whole[start : self.position])

    @property
    def left(self) -> int:
        """How many bytes are still to be read."""
        return len(self._whole) - self.position

class IpcLimits(NamedTuple):
    """What an `IpcReader` accepts of one message."""
    max_bytes: int | None = None  # decoded bytes of one message, None for what memory holds
    max_rows: int | None = None  # rows of one batch, None for what its bytes pay for (see FREE_ROWS)

_ANY_SIZE = IpcLimits()

class MessageHead(NamedTuple):
    """The head of one IPC message, as far as bounds, metadata and dictionaries need it (format/Message.fbs)."""
    kind: int
    body_length: int  # bytes
    metadata: dict[bytes, bytes] | None = None
    rows: int = 0
    nodes: Sequence[int] = ()  # (length, null count) of each column and its children, flat
    buffers: Sequence[int] = ()  # (offset, length) in the body, bytes, flat
    compressed: bool = False
    dictionary_id: int = 0
    is_delta: bool = False

def are_inside(buffers: Sequence[int], body_length: int) -> bool:
    """Whether each (offset, length) lies in a body of that many bytes, at a multiple of 8."""
    offsets = buffers[::2]
    return (min(buffers, default=0) >= 0 and not functools.reduce(operator.or_, offsets, 0) & 7
            and max(map(operator.add, offsets, buffers[1::2]), default=0) <= body_length)

class BatchMessage(NamedTuple):
    """A record batch's message: its head and all of its bytes, prefix included."""
    head: MessageHead
    data: _Buffer

    def body(self) -> memoryview:
        """Return the bytes of the body."""
        return memoryview(self.data)[len(self.data) - self.head.body_length :]


class _Table:
    """One table of a flatbuffer: bounds-checked reads of its fields by number (flatbuffers' "internals"). *seen* collects
    (start, size) of what was read to find the way: bytes that decide where others stand."""
    __slots__ = ("data", "position", "seen", "slots")
    def __init__(self, data: bytes, position: int, seen: list[tuple[int, int]]) -> None:
        (back,) = struct.unpack_from("<i", data, _inside(data, position))
        vtable = _inside(data, position - back)
        (size,) = struct.unpack_from("<H", data, vtable)
        self.data, self.position, self.seen = data, position, seen
        seen += ((position, 4), (vtable, max(size, 4)))
        # A writer leaves absent fields off the end: no table that is read here has more than five.
        self.slots = (*struct.unpack_from(f"<{max(size - 4, 0) // 2}H", data, vtable + 4), 0, 0, 0, 0, 0)

    def scalar(self, slot: int, code: str) -> int:
        """Read a number; an absent field is 0."""
        at = self.position + self.slots[slot]
        self.seen.append((at, struct.calcsize(code)))
        return int(struct.unpack_from(code, self.data, at)[0]) if self.slots[slot] else 0

    def target(self, slot: int) -> int | None:
        """Follow an offset field to where it points."""
        offset = self.slots[slot]
        return _inside(self.data, self.position + offset + self.scalar(slot, "<I")) if offset else None

    def table(self, slot: int) -> _Table | None:
        at = self.target(slot)
        return None if at is None else _Table(self.data, at, self.seen)

    def vector(self, slot: int) -> tuple[int, int]:
        """Return (position of the first element, count) of a vector field."""
        at = self.target(slot)
        if at is None:
            return 0, 0
        self.seen.append((at, 4))
        return at + 4, int(struct.unpack_from("<I", self.data, at)[0])

    def text(self, slot: int) -> bytes:
        start, size = self.vector(slot)
        if start + size > len(self.data):
            raise IndexError(size)
        return self.data[start : start + size]

def _inside(data: bytes, position: int) -> int:
    if not 0 <= position < len(data):  # struct would count a negative offset from the end
        raise IndexError(position)
    return position

_Region = tuple[int, int, Any]  # (start, size, what stands there) in a head: the name of a number, or a metadata key

def _parse_head(data: bytes) -> tuple[MessageHead, list[_Region]]:
    """Read a head field by field; also return where it may differ from other heads of the same layout. There are no such
    places, and so no layout, when what may differ also decides how a head is read: a layout would then read other numbers than
    pyarrow does, and what it does not see it does not check."""
    regions: list[_Region] = []
    seen: list[tuple[int, int]] = [(0, 4)]
    def number(table: _Table, slot: int, name: str) -> int:
        if not table.slots[slot]:
            return 0
        at = table.position + table.slots[slot]
        regions.append((at, 8, name))
        return int(struct.unpack_from("<q", data, at)[0])
    def numbers(table: _Table, slot: int, name: str) -> Sequence[int]:
        start, count = table.vector(slot)
        if count > len(data):
            raise IndexError(count)
        if count:
            regions.append((start, 16 * count, name))
        return struct.unpack_from(f"<{2 * count}q", data, start)
    message = _Table(data, struct.unpack_from("<I", data, 0)[0], seen)
    if message.scalar(0, "<h") not in (3, 4):  # V4 and V5 of MetadataVersion: those that pyarrow reads
        raise ValueError(f"metadata version {message.scalar(0, '<h') + 1}")
    kind, body_length = message.scalar(1, "<B"), number(message, 3, "body_length")
    batch, metadata = message.table(2), _head_metadata(message, regions)
    if batch is None or kind not in (_SCHEMA_MESSAGE, _DICTIONARY_MESSAGE, _BATCH_MESSAGE) or body_length < 0:
        raise ValueError(f"message type {kind}, body of {body_length} bytes")
    head = MessageHead(kind, body_length, metadata)
    if kind != _SCHEMA_MESSAGE:
        dictionary_id, is_delta = 0, False
        if kind == _DICTIONARY_MESSAGE:
            dictionary_id, is_delta, batch = batch.scalar(0, "<q"), bool(batch.scalar(2, "<B")), batch.table(1)
            if batch is None:
                raise ValueError("a dictionary without a batch")
        rows, nodes, buffers = number(batch, 0, "rows"), numbers(batch, 1, "nodes"), numbers(batch, 2, "buffers")
        compressed = batch.target(3) is not None
        head = MessageHead(kind, body_length, metadata, rows, nodes, buffers, compressed, dictionary_id, is_delta)
    decisive, spans = bytearray(len(data)), sorted((start, start + size) for start, size, _ in regions)
    for start, size in seen:
        decisive[start : start + size] = b"\1" * size
    apart = all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    once = len({name for _, _, name in regions}) == len(regions)
    return head, regions if apart and once and not any(1 in decisive[a:b] for a, b in spans) else []

def _head_metadata(message: _Table, regions: list[_Region]) -> dict[bytes, bytes] | None:
    start, count = message.vector(4)
    if not count:
        return None
    if count * 4 > len(message.data):
        raise IndexError(count)
    metadata: dict[bytes, bytes] = {}
    message.seen.append((start, 4 * count))
    for i, offset in enumerate(struct.unpack_from(f"<{count}I", message.data, start)):
        pair = _Table(message.data, start + 4 * i + offset, message.seen)
        key, value = pair.text(0), pair.text(1)
        message.seen.append((pair.vector(0)[0], len(key)))
        if value or key in metadata:  # a key that comes twice leaves two regions of one name
            regions.append((pair.vector(1)[0], len(value), key))
        metadata[key] = value
    return metadata


_Hole = tuple[int, str, Any]  # (start, `struct` code, name) of a place in bytes that are otherwise always the same

class _Layout:
    """Bytes that differ from one another only in *holes*: one `struct` call reads or writes them all."""
    __slots__ = ("_fixed", "_fixed_of", "_parts", "_slots", "_struct")
    def __init__(self, example: bytes, holes: Iterable[_Hole]) -> None:
        codes, fixed, at, count = ["<"], [], 0, 0
        self._slots: dict[Any, slice] = {}  # by name: its part, or parts, among those that the struct reads
        for start, code, name in [*sorted(holes, key=operator.itemgetter(0)), (len(example), "", None)]:
            width = 1 if code.endswith("s") else int(code[:-1] or 1)
            codes += (f"{start - at}s", code)
            fixed.append(count)
            self._slots[name] = slice(count + 1, count + 1 + width)
            count, at = count + 1 + width, start + struct.calcsize("<" + code)
        self._struct = struct.Struct("".join(codes))
        self._parts = list(self._struct.unpack(example))
        self._fixed_of = operator.itemgetter(*fixed)
        self._fixed = self._fixed_of(self._parts)

def _holes(regions: Iterable[_Region], first: int = 0) -> list[_Hole]:
    """The regions of a head that begins at *first*, as holes of a layout."""
    return [(first + at, f"{size}s" if isinstance(name, bytes) else f"{size // 8}q", name) for at, size, name in regions]


class HeadLayout(_Layout):
    """Where the numbers and metadata values of a head stand. Heads of one schema whose metadata values have the same lengths
    differ nowhere else. Learned from heads that `_parse_head` has accepted; others are not of this layout."""
    __slots__ = ("_head", "_keys", "_numbers")
    def __init__(self, data: bytes, head: MessageHead, regions: list[_Region]) -> None:
        super().__init__(data, _holes(regions))
        self._keys = [(key, self._slots[key].start) for key in head.metadata or () if key in self._slots]
        self._numbers = [self._slots.get(name) for name in ("body_length", "rows", "nodes", "buffers")]
        self._head = head

    def read(self, data: bytes) -> MessageHead | None:
        """Read a head of the same length; ``None`` when it is not of this layout."""
        parts = self._struct.unpack(data)
        if self._fixed_of(parts) != self._fixed:
            return None
        known, (body, rows, nodes, buffers) = self._head, self._numbers
        metadata = known.metadata and known.metadata.copy()
        for key, index in self._keys if metadata else ():
            metadata[key] = parts[index]  # type: ignore[index]
        return MessageHead(known.kind, parts[body.start] if body else 0, metadata, parts[rows.start] if rows else 0,
                           parts[nodes] if nodes else (), parts[buffers] if buffers else (), *known[6:])

    def message(self, rows: int, nodes: Sequence[int], buffers: Sequence[int], body: bytes,
                metadata: _Metadata | None) -> bytes:
        """Return the whole message of a batch of this layout."""
        parts = self._parts.copy()
        for slot, numbers in zip(self._numbers, ((len(body),), (rows,), nodes, buffers)):
            if slot:
                parts[slot] = numbers
        for key, index in self._keys if metadata else ():
            parts[index] = metadata[key]  # type: ignore[index]
        return b"".join((_CONTINUATION, struct.pack("<i", self._struct.size), self._struct.pack(*parts), body))

_layouts: dict[int, list[HeadLayout]] = {}  # by length of the head

def parse_message_head(data: bytes) -> MessageHead:
    """Read the flatbuffer head of one IPC message; raises `IPCError` when it is not one."""
    layouts = _layouts.get(len(data), [])
    for layout in layouts:
        known = layout.read(data)
        if known is not None and known.body_length >= 0:
            return known
    try:
        head, regions = _parse_head(data)
    except (struct.error, IndexError, ValueError, OverflowError, MemoryError) as exc:
        raise IPCError(f"not an Arrow IPC message: its head of {len(data)} bytes does not parse ({_text_of(exc)})") from None
    if regions and len(data) <= 16_384 and len(layouts) < 8:
        if len(_layouts) * len(data) >= 1 << 21:
            _layouts.clear()
        _layouts[len(data)] = [*layouts, HeadLayout(data, head, regions)]
    return head

def _guard(what: str, call: Callable[..., _T], *args: Any) -> _T:
    """Call into pyarrow with foreign bytes: the one place where its exceptions become ours."""
    try:
        return call(*args)
    except IPCError:
        raise
    except _ARROW_FAILURES as exc:
        raise IPCError(f"{what}: {_text_of(exc)}") from None

def _nesting(fields: Iterable[pa.Field]) -> int:
    """Levels of types below *fields*; a name that is not UTF-8 is a `UnicodeDecodeError` here, not at some later look."""
    return max((1 + _nesting(_children(f.type)) for f in fields if f.name is not None), default=0)

def _children(kind: pa.DataType) -> list[pa.Field]:
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if pa.types.is_dictionary(kind):
        return [pa.field("", kind.value_type)]
    return [kind.field(i) for i in range(kind.num_fields)]

def _count_dictionaries(kind: pa.DataType) -> int:
    if isinstance(kind, pa.BaseExtensionType):
        return _count_dictionaries(kind.storage_type)
    return int(pa.types.is_dictionary(kind)) + sum(_count_dictionaries(f.type) for f in _children(kind))

class SchemaFacts:
    """A schema with what reading and writing its batches needs to know; safe for use by several threads."""
    __slots__ = ("_shapes", "bare", "dictionaries", "dictionary_count", "message", "plan", "required", "schema", "seen")
    def __init__(self, schema: pa.Schema, message: bytes) -> None:
        self.schema, self.message = schema, message  # the encapsulated schema message
        self.dictionary_count = sum(map(_count_dictionaries, schema.types))
        self.required = tuple([i for i, f in enumerate(schema) if not f.nullable])  # columns that take no nulls
        self.plan: Any = False  # how its short batches travel without pyarrow: `plain_plan` fills it in
        self._shapes: dict[Any, tuple[list[HeadLayout], HeadLayout]] = {}
        self.bare: tuple[list[HeadLayout], HeadLayout] | None = None  # see `_bare_layouts`
        self.seen: tuple[BatchMessage, ...] = ()  # short dictionary messages, as read: see `PlainPlan.read_stream`
        self.dictionaries: dict[tuple[HeadLayout, tuple[str, ...]], bytes] = {}  # messages of short ones, as written

    def layouts(self, example: Any, metadata: _Metadata | None, has_body: bool) -> tuple[list[HeadLayout], HeadLayout]:
        """Return the layouts of dictionary messages and of the batch's message, as pyarrow writes *example*. Learned once for
        the same lengths of metadata; heads leave out numbers that are 0, so *has_body* matters too."""
        shape = (example.num_rows > 0, has_body, tuple([(k, len(v)) for k, v in metadata.items()]) if metadata else None)
        known = self._shapes.get(shape)
        if known is None:
            known = self.learn(example if isinstance(example, pa.RecordBatch) else example.to_record_batch(), metadata)
            if len(self._shapes) >= 64:
                self._shapes.clear()
            if sum(map(len, (metadata or {}).values())) <= SMALL_BODY_BYTES:
                self._shapes[shape] = known
        return known

    def learn(self, example: pa.RecordBatch, metadata: _Metadata | None) -> tuple[list[HeadLayout], HeadLayout]:
        """As `layouts`, but nothing is kept."""
        file = io.BytesIO()
        with ipc.new_stream(file, self.schema) as writer:
            writer.write_batch(example, custom_metadata=metadata)
        _, *messages = ipc.MessageReader.open_stream(file.getvalue())
        *dictionaries, layout = [HeadLayout(head, *_parse_head(head)) for head in (m.metadata.to_pybytes() for m in messages)]
        return dictionaries, layout

def _decode_schema(message: bytes) -> SchemaFacts:
    head = parse_message_head(message[8:])
    if head.kind != _SCHEMA_MESSAGE or head.body_length:
        raise IPCError(f"expected a schema message first, got message type {head.kind}")
    schema = _guard("the schema message", ipc.read_schema, pa.py_buffer(message))
    if len(schema) > MAX_COLUMNS:
        raise IPCError(f"schema: expected at most {MAX_COLUMNS} columns, got {len(schema)}")
    if _guard("the schema", _nesting, schema) > MAX_NESTING:
        raise IPCError(f"schema: expected at most {MAX_NESTING} levels of nesting")
    return SchemaFacts(schema, message)

_cached_schema = functools.lru_cache(maxsize=256)(_decode_schema)

def _schema_facts(message: bytes) -> SchemaFacts:
    """Decode an encapsulated schema message; the same bytes are decoded once, unless they are too large to be kept."""
    return _cached_schema(message) if len(message) <= SMALL_BODY_BYTES else _decode_schema(message)

_facts_by_id: dict[int, tuple[pa.Schema, SchemaFacts]] = {}  # the schema is kept, so that its id stays its own

def schema_facts(schema: pa.Schema) -> SchemaFacts:
    """Return the facts of a schema; the same object is looked at once (bounded cache, safe between threads)."""
    known = _facts_by_id.get(id(schema))
    if known is None:
        if len(_facts_by_id) >= 512:
            _facts_by_id.clear()
        known = _facts_by_id[id(schema)] = schema, _schema_facts(schema.serialize().to_pybytes())
    return known[1]

_VALIDATE = {v: operator.methodcaller("validate", full=v is IpcValidation.FULL) for v in IpcValidation}

class IpcReader:
    """Reads one Arrow IPC stream from *source*, to its end marker and not a byte further; the schema at once. Not safe for use
    by several threads. The source stays open and belongs to the caller. Raises `EOFError` where the source ends before the
    first byte, and `IPCError` for what is not an Arrow IPC stream."""
    def __init__(self, source: ByteSource, limits: IpcLimits = _ANY_SIZE,
                 validation: IpcValidation = IpcValidation.FULL) -> None:
        self._source, self._limits, self._validation = source, limits, validation
        self._dictionaries: dict[int, list[BatchMessage]] = {}
        self._last: tuple[bytes, MessageHead] = (b"", MessageHead(0, 0))  # turns of a stream often have the very same head
        self.ended = False  # whether the end marker was read
        self._unread = 0  # bytes of a refused message's body
        raw = self._read_head(first=True)
        if raw is None:
            raise IPCError("expected a schema message, got an end of stream")
        self.facts = _schema_facts(raw)
        self.schema = self.facts.schema  # of every batch
        if _wire_read.isEnabledFor(logging.DEBUG):
            _wire_read.debug("schema %s", _schema_text(self.schema))

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
        """Read the next batch and its metadata; ``None`` at the end marker. Raises as `next_message` and `decode`."""
        message = self.next_message()
        return None if message is None else (self.decode(message), message.head.metadata)

    def next_message(self) -> BatchMessage | None:
        """Read the next batch's message without decoding it; ``None`` at the end marker. Raises `IPCError` for half a message
        or a head that cannot be true, `RequestTooLargeError` above a limit."""
        while not self.ended:
            raw, head = self._last
            message = _guard("the message body", self._source.read_known, raw, head.body_length) if raw else None
            known = message is not None
            if message is None:
                if (read := self._read_head()) is None:
                    return None
                raw, head = read, parse_message_head(read[8:])
                if head.kind == _SCHEMA_MESSAGE:
                    raise IPCError("expected a batch, got a second schema message")
                size, limit = head.body_length, self._limits.max_bytes
                if limit is not None and size > limit:
                    self._unread = size
                    raise RequestTooLargeError(f"message body: expected at most {limit} bytes, got {size}")
                message = _guard("the message body", self._source.read_after, raw, size) if size else raw
            if len(message) < len(raw) + head.body_length:
                got = len(message) - len(raw)
                raise IPCError(f"half a message: expected a body of {head.body_length} bytes, got {got}")
            if not known:
                self._check_bounds(head, memoryview(message)[len(raw) :])
            if head.kind == _BATCH_MESSAGE:
                if _wire_read.isEnabledFor(logging.DEBUG):
                    size, keys = head.body_length, sorted(head.metadata or ())
                    _wire_read.debug("batch of %d rows, %d bytes, metadata %s", head.rows, size, keys)
                if not known and not head.compressed:  # else the bounds stand in the body
                    self._last = raw, head
                return BatchMessage(head, message)
            self._keep_dictionary(BatchMessage(head, message))
            if len(message) <= SMALL_DICTIONARY_BYTES and not head.compressed and len(self.facts.seen) < 16:
                self.facts.seen = (*self.facts.seen, BatchMessage(head, bytes(message)))
        return None

    def _check_bounds(self, head: MessageHead, body: memoryview) -> None:
        """Refuse rows that no body pays for, buffers outside it, and compressed buffers that grow past the limit."""
        limit, max_rows, decoded = self._limits.max_bytes, self._limits.max_rows, 0
        plain = not head.compressed and 0 <= head.rows <= FREE_ROWS >= max(head.nodes, default=0)
        if plain and max_rows is None and are_inside(head.buffers, head.body_length):
            return  # nearly all; what is wrong with the others is found out below
        for offset, length in zip(head.buffers[::2], head.buffers[1::2]):
            if offset < 0 or length < 0 or offset + length > head.body_length:
                raise IPCError(f"buffer at {offset}, {length} bytes: outside the body of {head.body_length} bytes")
            if length and offset % 8:
                raise IPCError(f"buffer at {offset}: expected a multiple of 8")
            size = -1
            if head.compressed and length >= 8:
                # BodyCompression: each buffer starts with its decoded length, -1 when it stands uncompressed.
                (size,) = struct.unpack_from("<q", body, offset)
                if size < -1:
                    raise IPCError(f"compressed buffer at {offset}: a decoded length of {size} bytes")
            decoded += length if size == -1 else size
        limit = max(FREE_DECODED_BYTES, 1024 * head.body_length) if limit is None else limit
        if head.compressed and decoded > limit:
            raise RequestTooLargeError(f"compressed buffers: expected at most {limit} decoded bytes, got {decoded}")
        longest = max(head.rows, *head.nodes[::2], 0)  # a child may be longer than its parent: one list of a trillion nulls
        if head.rows < 0 or (longest > FREE_ROWS and longest > 8 * decoded):
            raise IPCError(f"{head.rows if head.rows < 0 else longest} rows in a body of {decoded} bytes: more rows than bits")
        if max_rows is not None and head.rows > max_rows:
            raise RequestTooLargeError(f"expected at most {max_rows} rows in a batch, got {head.rows}")

    def _keep_dictionary(self, message: BatchMessage) -> None:
        head = message.head
        before = self._dictionaries.pop(head.dictionary_id, [])  # its new place is the last: it may build on those before
        kept = self._dictionaries[head.dictionary_id] = before if head.is_delta else []
        kept.append(message)
        limit = self._limits.max_bytes
        if limit is not None and sum(len(m.data) for all_of_one in self._dictionaries.values() for m in all_of_one) > limit:
            raise RequestTooLargeError(f"dictionary: expected at most {limit} bytes")

    def decode(self, message: BatchMessage) -> pa.RecordBatch:
        """Decode a message of this stream, the last one read if the schema has dictionaries; `IPCError` if it is not valid."""
        if not message.head.rows and not len(self.schema):
            return _TICK
        if self.facts.dictionary_count:
            batch = _guard("the batch", self._decode_with_dictionaries, message.data)
        else:
            batch = _guard("the batch", ipc.read_record_batch, pa.py_buffer(message.data), self.schema)
        if self._validation is not IpcValidation.NONE:
            _guard("the batch", _VALIDATE[self._validation], batch)
        return batch

    def _decode_with_dictionaries(self, message: _Buffer) -> pa.RecordBatch:
        # pyarrow takes dictionaries only from a whole stream: give it schema, dictionaries and this one batch.
        known = [m.data for messages in self._dictionaries.values() for m in messages]
        return ipc.open_stream(b"".join([self.facts.message, *known, message, END_OF_STREAM])).read_next_batch()

    def dictionaries(self) -> list[BatchMessage]:
        """Return the dictionary messages in force, in the order of their ids."""
        return [m for _, messages in sorted(self._dictionaries.items()) for m in messages]

    def read_to_end(self) -> None:
        """Read on to the end marker without decoding, which leaves a connection usable after a refusal; raises `IPCError`."""
        while self._unread or not self.ended:
            left, self._unread = self._unread, 0
            raw = None if left else self._read_head()
            left = parse_message_head(raw[8:]).body_length if raw else left
            while left:
                got = len(self._source.read(min(left, 1 << 20)))
                if not got:
                    raise IPCError(f"half a message: {left} bytes short")
                left -= got

@functools.cache  # at first use: pyarrow's memory pool takes 4 MiB at once
def _tick_message() -> bytes:
    return cast("bytes", _TICK.serialize().to_pybytes())

class _Pieces(list["_Buffer"]):
    """The file that collects what pyarrow's stream writer writes, without copying bodies."""
    closed, write = False, list.append


class IpcWriter:
    """Writes one Arrow IPC stream of *schema*: each call hands whole messages, a list of buffers, to *write* at once. Not safe
    for use by several threads. The sink stays open and belongs to the caller."""
    def __init__(self, write: Callable[[list[_Buffer]], object], schema: pa.Schema) -> None:
        self.schema = schema
        self._facts = schema_facts(schema)
        self._write, self._begun = write, False
        self._file = _Pieces()
        self._writer: ipc.RecordBatchStreamWriter | None = None  # pyarrow's, once there was a batch for it

    def write(self, batch: pa.RecordBatch, metadata: Any = None) -> None:
        """Write one batch (schema first, if this is the first); *metadata* becomes the message's own."""
        self.write_all([(batch, metadata)])

    def write_all(self, items: Iterable[tuple[Any, Any]], *, close: bool = False) -> None:
        """Write several batches, and the end marker if *close*, in one call of the sink; a `PlainBatch` counts as a batch."""
        out: list[_Buffer] = [] if self._begun else [self._facts.message]
        self._begun = True
        for batch, metadata in items:
            out += self._messages(batch, dict(metadata) if metadata else None)
        if close:
            out.append(END_OF_STREAM)
        if out:
            if _wire_write.isEnabledFor(logging.DEBUG):
                _wire_write.debug("%d messages of %s, %d bytes", len(out), _schema_text(self.schema), sum(map(len, out)))
            self._write(out)

    def _messages(self, batch: Any, metadata: dict[bytes, bytes] | None) -> list[_Buffer]:
        if not isinstance(batch, pa.RecordBatch):
            if self._writer is None or not self._facts.dictionary_count:
                return cast("list[_Buffer]", batch.messages(metadata))
            batch = batch.to_record_batch()
        if batch is _TICK and metadata is None:
            return [_tick_message()]
        if self._facts.dictionary_count or batch.get_total_buffer_size() > SMALL_BODY_BYTES:
            return self._by_pyarrow(batch, metadata)
        raw = batch.serialize().to_pybytes()
        if metadata is None:
            return [raw]
        size = 8 + struct.unpack_from("<i", raw, 4)[0]
        head, body = parse_message_head(raw[8:size]), raw[size:]
        _, layout = self._facts.layouts(batch, metadata, bool(body))
        return [layout.message(head.rows, head.nodes, head.buffers, body, metadata)]

    def _by_pyarrow(self, batch: pa.RecordBatch, metadata: dict[bytes, bytes] | None) -> list[_Buffer]:
        schema_left = 0
        if self._writer is None:  # kept: it is dear to make, and knows which dictionaries it has sent
            self._writer, schema_left = ipc.new_stream(self._file, self.schema), len(self._facts.message)
        try:
            self._writer.write_batch(batch, custom_metadata=metadata)
        finally:
            pieces = self._file.copy()
            self._file.clear()
        while schema_left > 0:  # written already
            schema_left -= len(pieces.pop(0))
        return pieces

    def close(self) -> None:
        """Write the end marker (after the schema, if nothing was written)."""
        self.write_all((), close=True)

def write_stream(write: Callable[[list[_Buffer]], object], schema: pa.Schema, items: Sequence[tuple[Any, Any]]) -> None:
    """Write one whole IPC stream in one call of the sink: schema, the batches with their metadata, end marker."""
    if len(items) == 1 and not isinstance(items[0][0], pa.RecordBatch) and not _wire_write.isEnabledFor(logging.DEBUG):
        batch, metadata = items[0]  # a `PlainBatch` needs no writer
        write([schema_facts(schema).message, *batch.messages(metadata), END_OF_STREAM])
    else:
        IpcWriter(write, schema).write_all(items, close=True)

def stream_bytes(schema: pa.Schema, items: Sequence[tuple[Any, Any]]) -> bytes:
    """Return one whole IPC stream, as `write_stream` writes it."""
    pieces: list[_Buffer] = []
    write_stream(pieces.extend, schema, items)
    return b"".join(pieces)

_TYPE_SPELLING = {"double": "float64", "halffloat": "float16", "float": "float32", "string": "utf8"}

def _type_text(kind: pa.DataType) -> str:
    """An Arrow type as pyarrow's constructors spell it: ``float64``, where its own text says ``double``."""
    return re.sub(r"\b(double|halffloat|float|string)\b", lambda m: _TYPE_SPELLING[m[1]], str(kind))

def _schema_text(schema: pa.Schema) -> str:
    """A schema on one line: ``(a: float64 not null, b: utf8)``."""
    return "(" + ", ".join(f"{f.name}: {_type_text(f.type)}{'' if f.nullable else ' not null'}" for f in schema) + ")"

def conform_batch(batch: Any, schema: pa.Schema, where: str, *, cast_values: bool) -> pa.RecordBatch:
    """Return *batch* under *schema*: same names in the same order, no null where none is allowed. With *cast_values* types may
    differ where every value survives a safe cast (exchange input), else they may not (output). `ParameterError` begins with
    *where* and says what was expected and what came."""
    if not isinstance(batch, pa.RecordBatch):
        raise ParameterError(f"{where}: expected a pyarrow.RecordBatch, got {type(batch).__name__}")
    if not (batch.schema is schema or batch.schema.equals(schema)):
        if batch.schema.names != schema.names:
            raise ParameterError(f"{where}: expected columns {_schema_text(schema)}, got {_schema_text(batch.schema)}")
        arrays = [_conform_column(a, f, where, cast_values) for a, f in zip(batch.columns, schema)]
        batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    for i in schema_facts(schema).required:
        if batch.column(i).null_count:
            _without_nulls(batch.column(i), schema.field(i), where)
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
# 5. PLAIN ROWS ........................................ uses 1-4
# ============================================================================
# Short columns of everyday types between Python values and message bytes, without pyarrow, whose calls cost more than a
# small message is worth; and whole streams of one such row, the requests and results of a method, by one layout of all their
# bytes (StreamLayout). Law: this section only saves time. It writes the bytes that pyarrow would write, from a layout
# learned of pyarrow's own; what it does not know, or what looks odd, it leaves to the ordinary way (_NotPlain, or None of a
# StreamLayout). A reader who skips it loses nothing but speed.

_PLAIN_BYTES = 1 << 20  # above this pyarrow is the faster one, also for numbers
_NUMBERS = {
    pa.int8(): "b", pa.int16(): "h", pa.int32(): "i", pa.int64(): "q", pa.float64(): "d",
    pa.uint8(): "B", pa.uint16(): "H", pa.uint32(): "I", pa.uint64(): "Q",
}  # fmt: skip

class _NotPlain(Exception):
    """Not for this section: the ordinary way decides, and words the error if there is one."""


class _Body:
    """Nodes and buffers of one message, in the order of Arrow's pre-order walk over the columns."""
    __slots__ = ("buffers", "checked", "dictionaries", "nodes", "pieces", "size")
    def __init__(self, checked: bool = True) -> None:
        self.checked = checked  # whether codecs have looked at the values already
        self.nodes: list[int] = []  # (length, null count), flat
        self.buffers: list[int] = []  # (offset, length), flat
        self.pieces: list[bytes] = []  # the buffers, each padded to 8 bytes …
        self.size = 0  # … and their length together
        self.dictionaries: list[tuple[str, ...]] = []  # distinct values of each dictionary column

    def add(self, *buffers: bytes) -> None:
        """Add buffers."""
        for data in buffers:
            size = len(data)
            self.buffers += (self.size, size)
            self.pieces += (data, _PADDING[size & 7])
            self.size += size + 7 & -8

_PADDING = tuple(bytes(-n % 8) for n in range(8))

class _Parts:
    """What a `_Body` becomes on the other side."""
    __slots__ = ("body", "buffers", "dictionaries", "nodes")
    def __init__(self, nodes: Sequence[int], buffers: Sequence[int], body: bytes,
                 dictionaries: Iterable[Sequence[str]] = ()) -> None:
        self.nodes, self.buffers, self.body = nodes, buffers, body  # it is known that the buffers lie inside the body
        self.dictionaries = iter(dictionaries)


class _Place:
    """Where one column's node and buffers stand among those of its schema, which is the same in all batches."""
    __slots__ = ("first", "node")
    def __init__(self, node: int, first: int) -> None:
        self.node, self.first = node, first  # indices of its node, and of its bitmap's buffer

    def start(self, parts: _Parts, length: int) -> int:
        """Return the index of the buffer behind the bitmap's; raises `_NotPlain` unless there are *length* values."""
        if parts.nodes[self.node] != length:
            raise _NotPlain
        return self.first + 2

    def one(self, parts: _Parts, length: int) -> tuple[int, int] | None:
        """Return both offsets of a column of one value that is not null, ``None`` for another column."""
        node, at = self.node, self.first + 2
        if length == 1 and parts.nodes[node] == 1 and not parts.nodes[node + 1] and parts.buffers[at + 1] >= 8:
            return _TWO_OFFSETS.unpack_from(parts.body, parts.buffers[at])
        return None

    def with_nulls(self, values: list[Any], parts: _Parts) -> list[Any]:
        """Return *values* with ``None`` where the bitmap says so."""
        if not (nulls := parts.nodes[self.node + 1]):
            return values
        at, length = parts.buffers[self.first], len(values)
        bits = parts.body[at : at + parts.buffers[self.first + 1]]
        present = int.from_bytes(bits, "little") & ((1 << length) - 1)
        if nulls < 0 or len(bits) * 8 < length or bin(present).count("1") != length - nulls:
            raise _NotPlain
        return [v if bits[i >> 3] >> (i & 7) & 1 else None for i, v in enumerate(values)]

class _Places:
    """Hands out places in Arrow's pre-order walk over the columns."""
    def __init__(self) -> None:
        self.nodes = self.buffers = 0  # numbers that were handed out: two of each node and of each buffer

    def take(self, buffers: int) -> _Place:
        """Return the place of the next column, which has so many buffers of its own."""
        place = _Place(self.nodes, self.buffers)
        self.nodes, self.buffers = self.nodes + 2, self.buffers + 2 * buffers
        return place

def _numbers(parts: _Parts, at: int, count: int, code: str, size: int) -> tuple[Any, ...]:
    """Read *count* numbers of *size* bytes at the beginning of a buffer; *at* is its place in ``parts.buffers``."""
    if parts.buffers[at + 1] < count * size:
        raise _NotPlain
    return struct.unpack_from(f"<{count}{code}", parts.body, parts.buffers[at])

def _offsets(parts: _Parts, at: int, length: int, limit: int) -> tuple[int, ...]:
    """Read length + 1 offsets, each at least as large as the one before, the last at most *limit*."""
    found = _numbers(parts, at, length + 1, "i", 4)
    if found[0] < 0 or found[-1] > limit or any(map(operator.gt, found, found[1:])):
        raise _NotPlain
    return found

_ONE, _TWO_OFFSETS = (1, 0), struct.Struct("<ii")
_Write = Callable[[Sequence[Any], _Body], None]
_Read = Callable[[int, _Parts], list[Any]]
# Each writer and reader looks first for the one value of a row, which is what most messages hold.

def _bitmap(bits: Iterable[Any]) -> bytes:
    """Pack truth values, the first into the lowest bit."""
    text = "".join("1" if b else "0" for b in bits)[::-1]
    return int(text or "0", 2).to_bytes((len(text) + 7) // 8, "little")

def _write_node(values: Sequence[Any], body: _Body, kind: type | None = None) -> bool:
    """Add node and validity of a column; return whether it has nulls. Raises `_NotPlain` for values not of type *kind*."""
    if kind and not body.checked and not set(map(type, values)) <= {kind, type(None)}:
        raise _NotPlain
    nulls = values.count(None) if None in values else 0
    body.nodes += (len(values), nulls)
    body.add(_bitmap([v is not None for v in values]) if nulls else b"")
    return nulls > 0

def _accepted(code: str) -> set[type]:
    return {float if code == "d" else int}  # an int may be one that no float64 holds

def _number_column(place: _Place, code: str) -> tuple[_Write, _Read]:
    size, accepted = struct.calcsize(code), _accepted(code)
    one = struct.Struct(f"<{code}{8 - size}x")
    def write(values: Sequence[Any], body: _Body) -> None:
        if len(values) == 1 and body.checked and values[0] is not None:
            at = body.size
            body.nodes += _ONE
            body.buffers += (at, 0, at, size)
            body.pieces.append(one.pack(values[0]))
            body.size = at + 8
            return
        form = f"<{len(values)}{code}"
        try:  # a look for nulls takes twice as long as this
            data = struct.pack(form, *values)
            body.nodes += (len(values), 0)
            body.add(b"")
        except struct.error:
            _write_node(values, body)
            values = [0 if v is None else v for v in values]
            data = struct.pack(form, *values)
        if not body.checked and not set(map(type, values)) <= accepted:
            raise _NotPlain
        body.add(data)
    def read(length: int, parts: _Parts) -> list[Any]:
        found = list(_numbers(parts, place.start(parts, length), length, code, size))
        return place.with_nulls(found, parts) if parts.nodes[place.node + 1] else found
    return write, read

def _bool_column(place: _Place) -> tuple[_Write, _Read]:
    def write(values: Sequence[Any], body: _Body) -> None:
        _write_node(values, body, bool)
        body.add(_bitmap(values))
    def read(length: int, parts: _Parts) -> list[Any]:
        bits = _numbers(parts, place.start(parts, length), (length + 7) // 8, "B", 1)
        return place.with_nulls([bool(bits[i >> 3] >> (i & 7) & 1) for i in range(length)], parts)
    return write, read

def _text_column(place: _Place, kind: type) -> tuple[_Write, _Read]:
    def write(values: Sequence[Any], body: _Body) -> None:
        if len(values) == 1 and body.checked and values[0] is not None:
            piece, at = values[0].encode() if kind is str else values[0], body.size
            size = len(piece)
            body.nodes += _ONE
            body.buffers += (at, 0, at, 8, at + 8, size)
            body.pieces += (_TWO_OFFSETS.pack(0, size), piece, _PADDING[size & 7])
            body.size = at + 8 + (size + 7 & -8)
            return
        _write_node(values, body, kind)
        pieces = [v.encode() if v else b"" for v in values] if kind is str else [v or b"" for v in values]
        offsets = [0, *itertools.accumulate(map(len, pieces))]
        if offsets[-1] > _PLAIN_BYTES:
            raise _NotPlain
        body.add(struct.pack(f"<{len(offsets)}i", *offsets), b"".join(pieces))
    def read(length: int, parts: _Parts) -> list[Any]:
        start, size, body = parts.buffers[place.first + 4], parts.buffers[place.first + 5], parts.body
        if (found := place.one(parts, length)) is not None and 0 <= found[0] <= found[1] <= size:
            piece = body[start + found[0] : start + found[1]]
            return [piece.decode() if kind is str else piece]
        offsets = _offsets(parts, place.start(parts, length), length, size)
        pieces: list[Any] = [body[start + a : start + b] for a, b in itertools.pairwise(offsets)]
        return place.with_nulls([p.decode() for p in pieces] if kind is str else pieces, parts)
    return write, read

def _list_column(place: _Place, item: tuple[_Write, _Read]) -> tuple[_Write, _Read]:
    write_item, read_item = item
    def write(values: Sequence[Any], body: _Body) -> None:
        if len(values) == 1 and body.checked and type(values[0]) is list:
            flat, at = values[0], body.size
            body.nodes += _ONE
            body.buffers += (at, 0, at, 8)
            body.pieces.append(_TWO_OFFSETS.pack(0, len(flat)))
            body.size = at + 8
        else:
            _write_node(values, body, list)
            offsets = [0, *itertools.accumulate(len(v or ()) for v in values)]
            flat = list(itertools.chain.from_iterable(v or () for v in values))
            body.add(struct.pack(f"<{len(offsets)}i", *offsets))
        write_item(flat, body)
    def read(length: int, parts: _Parts) -> list[Any]:
        if (found := place.one(parts, length)) is not None and 0 == found[0] <= found[1] <= _PLAIN_BYTES:
            return [read_item(found[1], parts)]
        offsets = _offsets(parts, place.start(parts, length), length, _PLAIN_BYTES)
        flat = read_item(offsets[-1], parts)
        return place.with_nulls([flat[a:b] for a, b in itertools.pairwise(offsets)], parts)
    return write, read

def _struct_column(place: _Place, names: Sequence[str], columns: Sequence[tuple[_Write, _Read]],
                   row: type) -> tuple[_Write, _Read]:
    """A struct of dicts, or (for the entries of a map, *row* being tuple) of pairs."""
    members_of = [operator.itemgetter(key) for key in (names if row is dict else range(len(names)))]
    def write(values: Sequence[Any], body: _Body) -> None:
        nulls = _write_node(values, body, row)
        for member, (write_one, _) in zip(members_of, columns):
            write_one([None if v is None else member(v) for v in values] if nulls else list(map(member, values)), body)
    def read(length: int, parts: _Parts) -> list[Any]:
        place.start(parts, length)
        members = [read_one(length, parts) for _, read_one in columns]
        rows: list[Any] = list(zip(*members)) if members else [()] * length
        return place.with_nulls([dict(zip(names, r)) for r in rows] if row is dict else rows, parts)
    return write, read

def _enum_column(place: _Place) -> tuple[_Write, _Read]:
    """``dictionary<int16, utf8>``: the distinct values go into a dictionary message of their own."""
    def write(values: Sequence[Any], body: _Body) -> None:
        if len(values) == 1 and body.checked and values[0] is not None:
            body.dictionaries.append((values[0],))
            body.nodes += _ONE
            body.buffers += (body.size, 0, body.size, 2)
            body.pieces.append(bytes(8))
            body.size += 8
            return
        _write_node(values, body, str)
        distinct = tuple(dict.fromkeys(v for v in values if v is not None))
        if not distinct:
            raise _NotPlain
        index = {v: i for i, v in enumerate(distinct)}
        body.dictionaries.append(distinct)
        body.add(struct.pack(f"<{len(values)}h", *[index.get(v, 0) for v in values]))
    def read(length: int, parts: _Parts) -> list[Any]:
        found, known = _numbers(parts, place.start(parts, length), length, "h", 2), next(parts.dictionaries)
        indices = place.with_nulls(list(found), parts)
        if any(i is not None and not 0 <= i < len(known) for i in indices):
            raise _NotPlain
        return [None if i is None else known[i] for i in indices]
    return write, read

_ENUM_TYPE = pa.dictionary(pa.int16(), pa.utf8())
_UTF8_COLUMN = _text_column(_Place(0, 0), str)

def _plain_column(kind: pa.DataType, places: _Places) -> tuple[_Write, _Read]:
    """Writer and reader of a column; raises `_NotPlain` for a type that is not plain."""
    if kind in _NUMBERS:
        return _number_column(places.take(2), _NUMBERS[kind])
    if kind == _ENUM_TYPE:
        return _enum_column(places.take(2))
    if pa.types.is_boolean(kind):
        return _bool_column(places.take(2))
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return _text_column(places.take(3), str if pa.types.is_string(kind) else bytes)
    if pa.types.is_map(kind):
        place, entries = places.take(2), places.take(1)
        columns = [_plain_column(kind.key_type, places), _plain_column(kind.item_type, places)]
        return _list_column(place, _struct_column(entries, ("key", "value"), columns, tuple))
    if pa.types.is_list(kind):
        return _list_column(places.take(2), _plain_column(kind.value_type, places))
    if pa.types.is_struct(kind):
        place, members = places.take(1), list(kind)
        return _struct_column(place, [m.name for m in members], [_plain_column(m.type, places) for m in members], dict)
    raise _NotPlain


class PlainPlan:
    """How short batches of one schema are written and read here; shared between threads."""
    def __init__(self, facts: SchemaFacts) -> None:
        self.facts = facts
        self._places = _Places()
        self._columns = [_plain_column(t, self._places) for t in facts.schema.types]
        self._nullable = [f.nullable for f in facts.schema]
        self.names = frozenset(facts.schema.names)
        codes = [_NUMBERS.get(t, "") for t in facts.schema.types]
        self._row = struct.Struct("<" + "".join(f"{c}{8 - struct.calcsize(c)}x" for c in codes)) if all(codes) else None
        # Whether rows have no parts of their own: however long their values are, heads of one row differ in buffers alone.
        self.even = self._places.nodes == 2 * len(codes) and not facts.dictionary_count
        self._accepted = [_accepted(c) for c in codes]
        # Of a message of one row of numbers without nulls and without metadata, which are always the same: buffers and head.
        self._numbers_like: tuple[Sequence[int], bytes] | None = None

    def write(self, columns: Sequence[Sequence[Any]], checked: bool = False) -> PlainBatch:
        """Encode columns of equal length, of which codecs have *checked* the values or not; raises `_NotPlain`."""
        if self._numbers_like is not None and (batch := self._row_of_numbers(columns, checked)) is not None:
            return batch
        body, length = _Body(checked), len(columns[0])
        try:
            for values, (write, _), nullable in zip(columns, self._columns, self._nullable):
                if len(values) != length or (not nullable and None in values):
                    raise _NotPlain
                write(values, body)
        except (struct.error, OverflowError, TypeError, ValueError, LookupError, AttributeError):
            raise _NotPlain from None
        if not length or not 0 < body.size <= _PLAIN_BYTES:
            raise _NotPlain
        batch = PlainBatch(self.facts, columns, body.nodes, body.dictionaries, body.buffers, b"".join(body.pieces))
        if self._row is not None and length == 1 and not any(body.nodes[1::2]):
            (message,) = batch.messages(None)
            self._numbers_like = body.buffers, bytes(message[: -batch.nbytes])
        return batch

    def _row_of_numbers(self, columns: Sequence[Sequence[Any]], checked: bool) -> PlainBatch | None:
        """Encode one row of numbers without nulls, with the head that such a row always has; ``None`` for other columns."""
        try:
            row = [value for (value,) in columns]
            if not checked and not all(map(operator.contains, self._accepted, map(type, row))):
                return None
            data = cast("struct.Struct", self._row).pack(*row)
        except (struct.error, OverflowError, ValueError, TypeError):
            return None
        buffers, head = cast("tuple[Sequence[int], bytes]", self._numbers_like)
        return PlainBatch(self.facts, columns, _ONE * len(columns), (), buffers, data, head)

    def read(self, reader: IpcReader, message: BatchMessage) -> list[list[Any]]:
        """Decode a message of this schema to a list of values per column, as fully checked as pyarrow's; raises `_NotPlain`."""
        return self._read(message.head, message.body(), reader.dictionaries())

    def read_stream(self, data: bytes) -> list[Any]:
        """Decode a whole stream of one row as `stream_bytes` writes it, its dictionaries such as were read before; raises
        `_NotPlain`."""
        facts, at = self.facts, len(self.facts.message)
        found = []
        for known in facts.seen:
            if data.startswith(cast("bytes", known.data), at):
                found.append(known)
                at += len(known.data)
        start = at + 8 + (struct.unpack_from("<i", data, at + 4)[0] if len(data) >= at + 8 else 0)
        if not data.startswith(facts.message) or not data.startswith(_CONTINUATION, at) or not at + 8 < start < len(data):
            raise _NotPlain
        try:
            head = parse_message_head(data[at + 8 : start])
        except IPCError:
            raise _NotPlain from None
        end = start + head.body_length
        if head.kind != _BATCH_MESSAGE or head.rows != 1 or not data.startswith(END_OF_STREAM, end) \
                or not are_inside(head.buffers, head.body_length):
            raise _NotPlain
        return [column[0] for column in self._read(head, data[start:end], found)]

    def _read(self, head: MessageHead, body: bytes | memoryview, dictionaries: Sequence[BatchMessage]) -> list[list[Any]]:
        if head.compressed or len(body) > _PLAIN_BYTES or not 0 < head.rows <= _PLAIN_BYTES:
            raise _NotPlain
        if [m.head.dictionary_id for m in dictionaries] != list(range(self.facts.dictionary_count)):  # as pyarrow numbers them
            raise _NotPlain
        return self.decode(head.rows, _Parts(head.nodes, head.buffers, bytes(body), map(_read_dictionary, dictionaries)))

    def decode(self, length: int, parts: _Parts) -> list[list[Any]]:
        """Decode rows whose buffers are known to lie inside the body; raises `_NotPlain`."""
        if len(parts.nodes) != self._places.nodes or len(parts.buffers) != self._places.buffers:
            raise _NotPlain
        try:
            return [read(length, parts) for _, read in self._columns]
        except (struct.error, UnicodeDecodeError, LookupError, OverflowError, ValueError):
            raise _NotPlain from None

def plain_plan(schema: pa.Schema) -> PlainPlan | None:
    """Return the plan of a schema, ``None`` when it has a type that is not plain or no columns at all."""
    facts = schema_facts(schema)
    if facts.plan is False:
        try:
            facts.plan = PlainPlan(facts) if len(schema) else None
        except _NotPlain:
            facts.plan = None
    return cast("PlainPlan | None", facts.plan)

def _filler(kind: pa.DataType) -> Any:
    """A value without nulls, which puts an entry into every dictionary of *kind*."""
    if pa.types.is_struct(kind):
        return {f.name: _filler(f.type) for f in kind}
    if pa.types.is_map(kind):
        return [(_filler(kind.key_type), _filler(kind.item_type))]
    if kind.num_fields:
        return [_filler(kind.value_type)]
    leaf = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.Array.from_buffers(leaf, 1, [None, *[pa.py_buffer(bytes(64))] * (leaf.num_buffers - 1)])[0].as_py()

def _bare_layouts(facts: SchemaFacts) -> tuple[list[HeadLayout], HeadLayout]:
    """Return the layouts of a `PlainBatch` without metadata; learned of any row, not of one whose columns its owner may change."""
    if facts.bare is None:
        arrays = [pa.array([_filler(t)], t) for t in facts.schema.types]
        facts.bare = facts.learn(pa.RecordBatch.from_arrays(arrays, schema=facts.schema), None)
    return facts.bare

def _read_dictionary(message: BatchMessage) -> Sequence[str]:
    head = message.head
    if head.compressed or head.is_delta or len(message.data) > _PLAIN_BYTES or head.rows > _PLAIN_BYTES:
        raise _NotPlain
    return _UTF8_COLUMN[1](head.rows, _Parts(head.nodes, head.buffers, bytes(message.body())))


class PlainBatch:
    """A short batch, encoded here: stands in for a record batch until somebody wants to look at one."""
    __slots__ = ("_columns", "_dictionaries", "_facts", "_head", "data", "nbytes", "nodes", "num_rows", "offsets", "schema")
    def __init__(self, facts: SchemaFacts, columns: Sequence[Sequence[Any]], nodes: Sequence[int],
                 dictionaries: Sequence[tuple[str, ...]], offsets: Sequence[int], data: bytes, head: bytes = b"") -> None:
        self._facts, self._columns, self.nodes, self._dictionaries = facts, columns, nodes, dictionaries
        self.offsets, self.data, self._head = offsets, data, head
        self.schema, self.num_rows, self.nbytes = facts.schema, len(columns[0]), len(data)  # nbytes: of its buffers

    def to_record_batch(self) -> pa.RecordBatch:
        """Read back the record batch that this stands in for."""
        stream = b"".join([self._facts.message, *self.messages(None), END_OF_STREAM])
        return cast("Any", IpcReader(BufferSource(stream), validation=IpcValidation.NONE).next())[0]

    def row(self) -> list[Any]:
        """Return the values of its first row, encoded as codecs do."""
        return [column[0] for column in self._columns]

    def messages(self, metadata: _Metadata | None) -> list[_Buffer]:
        """Return the messages that carry it: dictionaries first."""
        if self._head and not metadata:
            return [self._head + self.data]
        of_dictionaries, layout = self._facts.layouts(self, metadata, True) if metadata else _bare_layouts(self._facts)
        out: list[_Buffer] = []
        for one, names in zip(of_dictionaries, self._dictionaries):
            known = self._facts.dictionaries
            if (message := known.get((one, names))) is None:
                body = _Body()
                _UTF8_COLUMN[0](names, body)
                message = one.message(len(names), body.nodes, body.buffers, b"".join(body.pieces), None)
                if len(known) >= 64:
                    known.clear()
                if len(message) <= SMALL_DICTIONARY_BYTES:
                    known[one, names] = message
            out.append(message)
        out.append(layout.message(self.num_rows, self.nodes, self.offsets, self.data, metadata))
        return out


_LEARNED_BYTES = 8_192  # of a stream's fixed part: peers may have a server learn thousands of layouts

class StreamLayout(_Layout):
    """Whole streams of one row, or of no columns, that differ in its values and in a few metadata values alone, as the calls of
    one method do: the layout has all of the stream, or all but the body where that has no fixed length. Learned from a stream
    that went the ordinary way, so what was decided there on the fixed bytes holds for every stream of this layout."""
    __slots__ = ("_nodes", "_plan", "keys", "rows")
    def __init__(self, example: bytes, holes: Iterable[_Hole], head: MessageHead, plan: PlainPlan | None) -> None:
        super().__init__(example, holes)
        self.keys = tuple(name for name in self._slots if isinstance(name, bytes))  # of the metadata values that may differ
        self.rows, self._nodes, self._plan = head.rows, head.nodes, plan  # no plan: the body is part of the layout

    @property
    def shape(self) -> tuple[object, ...]:
        """What tells it from other layouts."""
        return self._struct.format, self._fixed

    @classmethod
    def learn(cls, facts: SchemaFacts, message: BatchMessage, keys: Sequence[bytes] = ()) -> StreamLayout | None:
        """Learn from the one batch of a stream; the metadata values of *keys* may differ. ``None`` for columns whose values
        have parts of their own, and where what may differ also decides how a head is read."""
        head, plan, types_ = message.head, plain_plan(facts.schema), facts.schema.types
        if head.compressed or len(message.data) > SMALL_BODY_BYTES or (types_ and not (plan and plan.even and head.rows == 1)):
            return None
        data = bytes(message.data)
        first, body_at, example = len(facts.message), len(data) - head.body_length, facts.message + data
        numbers = all(t in _NUMBERS for t in types_) and not any(head.nodes[1::2])
        if first + (len(data) if numbers else body_at) > _LEARNED_BYTES:
            return None
        wanted = {*[key for key in keys if (head.metadata or {}).get(key)], *(() if numbers else ("body_length", "buffers"))}
        holes = _holes([region for region in _parse_head(data[8:body_at])[1] if region[2] in wanted], first + 8)
        if len(holes) < len(wanted):
            return None
        if not numbers:
            return cls(example[: first + body_at], holes, head, plan)
        starts = [first + body_at + offset for offset in head.buffers[2::4]]
        if any(b - a < 8 for a, b in itertools.pairwise([*starts, len(example)])):  # in another order, or sharing their bytes
            return None
        holes += [(at, _NUMBERS[t], at) for at, t in zip(starts, types_)]
        return cls(example + END_OF_STREAM, holes, head, None)

    def read(self, data: bytes, at: int) -> tuple[Sequence[Any], int] | None:
        """Return the values of `keys`, then of the row, and where the stream ends; ``None`` when what stands in *data* from
        *at* on is not of this layout, or not there to its end."""
        end = at + self._struct.size
        if len(data) < end or _wire_read.isEnabledFor(logging.DEBUG):  # the ordinary way logs what it reads
            return None
        parts = self._struct.unpack_from(data, at)
        if self._fixed_of(parts) != self._fixed:
            return None
        if self._plan is None:
            return parts[1::2], end
        size, buffers = parts[self._slots["body_length"].start], parts[self._slots["buffers"]]
        body, end = data[end : end + size], end + size
        if len(body) != size or not are_inside(buffers, size) or not data.startswith(END_OF_STREAM, end):
            return None
        try:
            row = self._plan.decode(1, _Parts(self._nodes, buffers, body))
        except _NotPlain:
            return None
        return [*[parts[self._slots[key].start] for key in self.keys], *[column[0] for column in row]], end + 8

    def write(self, values: Mapping[bytes, bytes], batch: Any) -> bytes | None:
        """Return the stream of a `PlainBatch` or tick with these values of `keys`; ``None`` for a batch of another layout."""
        if _wire_write.isEnabledFor(logging.DEBUG):
            return None
        if batch is not _TICK and (not isinstance(batch, PlainBatch) or tuple(batch.nodes) != self._nodes):
            return None
        parts = self._parts.copy()
        for key in self.keys:
            parts[self._slots[key].start] = values[key]
        if self._plan is None:
            parts[2 * len(self.keys) + 1 :: 2] = () if batch is _TICK else batch.row()
            return self._struct.pack(*parts)
        parts[self._slots["body_length"].start], parts[self._slots["buffers"]] = len(batch.data), batch.offsets
        return b"".join((self._struct.pack(*parts), batch.data, END_OF_STREAM))


# ============================================================================
# 6. TYPES ............................................. uses 1-5
# ============================================================================
# Annotation -> codec: the Arrow type, whether it is nullable, how a Python value becomes one and comes back (WIRE section 2).
# Law: a codec is built once per annotation and cached; a value that does not fit raises _Mismatch, to which each
# container on the way out adds its part of the path, so that the text reads `Order.lines[0].price: expected ..., got ...`.

@dataclass(frozen=True)
class ArrowType:
    """Says which Arrow type a field or parameter has: ``Annotated[int, ArrowType(pa.int32())]``."""
    arrow_type: pa.DataType  # exactly this type goes on the wire
    nullable: bool | None = None  # overrides what the annotation says; None leaves it

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

def _expect(value: object, accepted: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(value, accepted):
        raise _Mismatch(expected, _got(value))

def _of_field(name: str, convert: Callable[[Any], Any], value: Any) -> Any:
    try:
        return convert(value)
    except _Mismatch as exc:
        raise exc.under(f".{name}") from None
    except (_Refusal, StatusError):
        raise
    except Exception as exc:  # a date beyond Python's calendar, a __post_init__ that does not like its values
        raise _Mismatch("a valid value", f"{type(exc).__name__}: {_text_of(exc)}").under(f".{name}") from exc

def _located(where: str, prefix: str, convert: Callable[[Any], _T], value: Any) -> _T:
    """Return ``convert(value)``; a mismatch becomes a `ParameterError` that says *where*, its path without *prefix*."""
    try:
        return convert(value)
    except _Mismatch as exc:
        exc.path = exc.path.removeprefix(prefix)
        raise exc.error(where) from None

class Codec(NamedTuple):
    """How values of one annotation travel; encoding and decoding raise `_Mismatch`."""
    arrow_type: pa.DataType
    nullable: bool  # whether None is a value
    encode: Callable[[Any], Any]  # Python value to what pa.array takes for arrow_type
    decode: Callable[[Any], Any]  # what to_pylist gives to the Python value
    plain: frozenset[type] = frozenset()  # types that encode leaves as they are: a list of them is passed on whole
    decodes_plain: bool = False  # decode changes nothing, and refuses None at most
    fixed_nullability: bool = False  # ArrowType(..., nullable=...) beats an Optional around it

    @property
    def expected(self) -> str:
        return _type_text(self.arrow_type)

    def to_array(self, values: list[Any]) -> pa.Array:
        """Encode *values* into a column of len(values) rows; raises `_Mismatch` with the path to the first that fails."""
        encoded = list(map(self.encode, values))
        try:
            return _array(encoded, self.arrow_type)
        except _ARROW_FAILURES as exc:
            found = filter(None, (_failure(value, self.arrow_type) for value in encoded))
            raise next(found, _Mismatch(self.expected, _text_of(exc))) from None

    def from_array(self, column: pa.Array) -> Any:
        """Decode a column of one row; one of another type is accepted when its value fits all the same."""
        value = self.decode(column.to_pylist()[0])
        if column.type != self.arrow_type and not (value is None and self.nullable):
            self.to_array([value])
        return value

def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if len(values) == 1 and type(values[0]) is bytes and pa.types.is_binary(kind) and SMALL_BODY_BYTES < len(values[0]) < 1 << 31:
        offsets = pa.py_buffer(struct.pack("<ii", 0, len(values[0])))
        return pa.Array.from_buffers(kind, 1, [None, offsets, pa.py_buffer(values[0])])  # not copied
    array_ = pa.array(values, type=kind)
    if kind.num_fields and _count_dictionaries(kind):
        try:
            array_.validate(full=True)
        except pa.ArrowInvalid:
            # Under a null struct pyarrow writes dictionary index 0, also where the dictionary is empty; readers refuse that.
            array_ = pa.array([*values, _filler(kind)], type=kind).slice(0, len(values))
    return array_

def _failure(value: Any, kind: pa.DataType) -> _Mismatch | None:
    """Find the innermost part of an encoded value that pyarrow does not take for its type; ``None`` when it takes all."""
    members: list[tuple[str, Any, pa.DataType]] = []
    if isinstance(value, list) and pa.types.is_list(kind):
        members = [(f"[{i}]", v, kind.value_type) for i, v in enumerate(value)]
    elif isinstance(value, list) and pa.types.is_map(kind):
        members = [m for k, v in value for m in (("<key>", k, kind.key_type), (f"[{k!r:.40}]", v, kind.item_type))]
    elif isinstance(value, dict) and pa.types.is_struct(kind):
        members = [(f".{f.name}", value.get(f.name), f.type) for f in kind]
    for step, member, member_kind in members:
        if found := _failure(member, member_kind):
            return found.under(step)
    try:
        pa.array([value], type=kind)
    except _ARROW_FAILURES as exc:
        shown = repr(value) if isinstance(value, (int, float)) else _got(value)
        return _Mismatch(_type_text(kind), f"{shown} ({_text_of(exc)})")
    return None

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
    rest = [m for m in typing.get_args(annotation) if m is not type(None)]
    optional = typing.get_origin(annotation) in (Union, types.UnionType) and len(rest) == 1
    return (rest[0] if optional else annotation), optional

def _unboxed(value: Any) -> Any:
    """A Python value out of a numpy or pyarrow scalar; anything else as it is."""
    if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "item"):
        return value.item()
    return value.as_py() if isinstance(value, pa.Scalar) else value

_SCALARS: dict[Any, tuple[pa.DataType, tuple[type, ...]]] = {  # annotation: Arrow type, what is accepted
    bool: (pa.bool_(), (bool,)), int: (pa.int64(), (int,)), float: (pa.float64(), (float, int)), str: (pa.utf8(), (str,)),
    bytes: (pa.binary(), (bytes, bytearray, memoryview)),
}

def _scalar_codec(kind: Callable[[Any], Any]) -> Codec:
    arrow_type, accepted = _SCALARS[kind]
    expected = _type_text(arrow_type)
    def encode(value: Any) -> Any:
        if type(value) is kind:
            return value
        unboxed = _unboxed(value)
        if not isinstance(unboxed, accepted) or (isinstance(unboxed, bool) and kind is not bool):
            raise _Mismatch(expected, _got(value))
        try:
            return kind(unboxed)
        except OverflowError:
            raise _Mismatch(expected, f"{unboxed!r:.40} (out of range)") from None
    plain = frozenset(accepted) if kind is float else frozenset({accepted[0]})
    return Codec(arrow_type, False, encode, _not_none(expected, _same), plain, decodes_plain=True)

def _same(value: Any) -> Any:
    return value

def _not_none(expected: str, convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return *convert* with a refusal of ``None`` in front."""
    def checked(value: Any) -> Any:
        if value is None:
            raise _Mismatch(expected, "None")
        return convert(value)
    return checked

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
    accepted = (list, tuple) if container is list else (set, frozenset)
    expected = f"{container.__name__} of {item.expected}"
    def encode(values: Any) -> Any:
        _expect(values, accepted, expected)
        kinds = list(map(type, values))
        # To count one type takes half as long as to collect them all.
        alike = kinds and kinds[0] in item.plain and kinds.count(kinds[0]) == len(kinds)
        if not alike and not set(kinds) <= item.plain:
            return _each(item.encode, values)
        return values if type(values) is list else list(values)
    def decode(values: Any) -> Any:
        plain = item.decodes_plain and (item.nullable or None not in values)
        members = values if plain else _each(item.decode, values)
        return members if container is list else container(members)
    return Codec(arrow_type, False, encode, _not_none(_type_text(arrow_type), decode))

def _dict_codec(key: Codec, value: Codec) -> Codec:
    arrow_type = pa.map_(key.arrow_type, value.arrow_type)
    expected = f"dict of {key.expected} to {value.expected}"
    def pairs(items: Any, of_key: Callable[[Any], Any], of_value: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
        for k, v in items:
            try:
                yield of_key(k), of_value(v)
            except _Mismatch as exc:
                raise exc.under(f"[{k!r:.40}]") from None
    def encode(mapping: Any) -> Any:
        _expect(mapping, Mapping, expected)
        if set(map(type, mapping)) <= key.plain and set(map(type, mapping.values())) <= value.plain:
            return list(mapping.items())
        return list(pairs(mapping.items(), key.encode, value.encode))
    def decode(entries: Any) -> Any:
        if key.decodes_plain and value.decodes_plain and not any(None in pair for pair in entries):
            return dict(entries)
        return dict(pairs(entries, key.decode, value.decode))
    return Codec(arrow_type, False, encode, _not_none(_type_text(arrow_type), decode))

def _enum_codec(kind: type[enum.Enum]) -> Codec:
    members = kind.__members__
    expected = f"{kind.__name__} ({', '.join(list(members)[:8])}{', …' if len(members) > 8 else ''})"
    def encode(value: Any) -> Any:
        _expect(value, kind, expected)
        return value.name
    def decode(name: Any) -> Any:
        try:
            return members[name]
        except (KeyError, TypeError):
            raise _Mismatch(expected, f"{name!r:.60}") from None
    return Codec(_ENUM_TYPE, False, encode, decode)

def _optional_codec(inner: Codec) -> Codec:
    if inner.fixed_nullability:
        return inner
    def or_none(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda value: None if value is None else convert(value)
    plain = inner.plain | {type(None)} if inner.plain else inner.plain
    return inner._replace(nullable=True, encode=or_none(inner.encode), decode=or_none(inner.decode), plain=plain)

def _annotated_codec(annotation: Any, whole: bool) -> Codec:
    """``Annotated[T, ArrowType(t)]``: T's own conversions, where it has any, over exactly the type t."""
    inner = annotation.__origin__
    exact = next((m for m in annotation.__metadata__ if isinstance(m, ArrowType)), None)
    if exact is None:
        return codec_for(inner, whole=whole)
    try:
        base = codec_for(inner)
    except TypeError:  # datetime and the like: pyarrow itself knows how to convert them
        base = Codec(exact.arrow_type, _split_optional(inner)[1], _same, _same, decodes_plain=True)
    if exact.nullable is False or not (exact.nullable or base.nullable):
        encode, decode = (_not_none(_type_text(exact.arrow_type), convert) for convert in (base.encode, base.decode))
        base = base._replace(nullable=False, encode=encode, decode=decode, plain=base.plain - {type(None)})
    elif not base.nullable:
        base = _optional_codec(base)
    return base._replace(arrow_type=exact.arrow_type, fixed_nullability=exact.nullable is not None)

def _batch_to_bytes(batch: Any) -> bytes:
    _expect(batch, pa.RecordBatch, "pyarrow.RecordBatch")
    return stream_bytes(batch.schema, [(batch, None)])

def _batch_from_bytes(data: Any) -> pa.RecordBatch:
    if not data:
        return empty_batch(EMPTY_SCHEMA)
    reader = IpcReader(BufferSource(data), _inner_limits(data))
    item = reader.next()
    return item[0] if item else empty_batch(reader.schema)

def _inner_limits(data: _Buffer) -> IpcLimits:
    """What a stream inside a value may grow to when it is decompressed: it must not evade the limits on what is around it."""
    return IpcLimits(max(1 << 24, 16 * len(data)))

def _schema_to_bytes(schema: Any) -> bytes:
    _expect(schema, pa.Schema, "pyarrow.Schema")
    return cast("bytes", schema.serialize().to_pybytes())

def _schema_from_bytes(data: Any) -> pa.Schema:
    return _schema_facts(bytes(data)).schema if data else EMPTY_SCHEMA

def _binary_codec(encode: Callable[[Any], bytes], decode: Callable[[Any], Any]) -> Codec:
    """A value that travels as bytes: what is wrong inside them is said as a mismatch of the value."""
    def read(data: Any) -> Any:
        _expect(data, bytes, "binary")
        try:
            return decode(data)
        except (IPCError, EOFError, RequestTooLargeError) as exc:
            raise _Mismatch("an Arrow IPC stream", _text_of(exc)) from None
    return Codec(pa.binary(), False, encode, _not_none("binary", read))


class RowCodec:
    """Named codecs side by side: one row of `schema` to values and back, as parameters, results and dataclasses travel."""
    def __init__(self, fields: Iterable[tuple[str, Codec]]) -> None:
        pairs = list(fields)
        self.names = tuple(name for name, _ in pairs)
        self.name_set = frozenset(self.names)
        self.codecs = tuple(codec for _, codec in pairs)
        self.schema = pa.schema([pa.field(n, c.arrow_type, nullable=c.nullable) for n, c in pairs])
        self.decodes_plain = all(c.decodes_plain for c in self.codecs)

    @functools.cached_property
    def plan(self) -> PlainPlan | None:
        """How the row travels without pyarrow, ``None`` when it cannot; made at first use."""
        return plain_plan(self.schema)

    def to_batch(self, values: Sequence[Any]) -> pa.RecordBatch | PlainBatch:
        """Encode one row; raises `_Mismatch` whose path begins with ``.name``."""
        plan = self.plan
        if plan is not None:
            encoded = [v if type(v) in c.plain else _of_field(n, c.encode, v) for n, c, v in zip(self.names, self.codecs, values)]
            try:
                return plan.write([[v] for v in encoded], checked=True)
            except _NotPlain:
                pass
        arrays = [_of_field(n, c.to_array, [v]) for n, c, v in zip(self.names, self.codecs, values)]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def decode(self, values: Sequence[Any]) -> list[Any]:
        """Decode one row as `PlainPlan.read` or ``to_pylist`` gave it; raises as `from_batch`."""
        return [v if c.decodes_plain and v is not None else _of_field(n, c.decode, v)
                for n, c, v in zip(self.names, self.codecs, values)]

    def from_batch(self, batch: pa.RecordBatch) -> list[Any]:
        """Decode the one row of a batch of this schema; raises `_Mismatch` whose path begins with ``.name``."""
        return [_of_field(n, c.from_array, column) for n, c, column in zip(self.names, self.codecs, batch.columns)]

    def from_message(self, reader: IpcReader, message: BatchMessage) -> list[Any]:
        """Decode the one row of a message of this schema; raises as `from_batch`, or `IPCError`."""
        plan = self.plan
        if plan is not None and reader.facts is plan.facts:
            with contextlib.suppress(_NotPlain):
                return self.decode([column[0] for column in plan.read(reader, message)])
        return self.from_batch(reader.decode(message))


class DataclassCodec:
    """A dataclass as a row and as a struct; built by `dataclass_codec`."""
    def __init__(self, cls: type) -> None:
        self.cls = cls
        hints = _hints(cls)
        own = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()  # a state without fields need not be decorated
        missed = [n for n in inspect.get_annotations(cls) if n not in {f.name for f in own}]
        lost = [n for n in missed if hints.get(n) is not ClassVar and typing.get_origin(hints.get(n)) is not ClassVar]
        if lost and "__dataclass_fields__" not in vars(cls):
            raise TypeError(f"{cls.__qualname__} has fields ({', '.join(missed)}) but is not decorated with @dataclass")
        self.fields, codecs = [], []  # the serialised ones
        for f in own:
            where = f"{cls.__qualname__}.{f.name}"
            if any(isinstance(m, Transient) or m is Transient for m in getattr(hints[f.name], "__metadata__", ())):
                if f.init and not _has_default(f):
                    raise TypeError(f"{where}: a Transient field needs a default to be read back to")
                continue
            self.fields.append(f)
            try:
                codecs.append((f.name, codec_for(hints[f.name])))
            except TypeError as exc:
                raise TypeError(f"{where}: {exc}") from None
        self.row = RowCodec(codecs)  # in the order of the fields
        self.names = frozenset(self.row.names)
        self._all_init = all(f.init for f in self.fields)

    def values(self, instance: Any) -> Sequence[Any]:
        _expect(instance, self.cls, self.cls.__name__)
        return [getattr(instance, n) for n in self.row.names]

    def to_dict(self, instance: Any) -> dict[str, Any]:
        """Encode for a struct column."""
        row = self.row
        return {n: _of_field(n, c.encode, v) for n, c, v in zip(row.names, row.codecs, self.values(instance))}

    def to_bytes(self, instance: Any) -> bytes:
        """Encode as a whole IPC stream of one row."""
        return stream_bytes(self.row.schema, [(self.row.to_batch(self.values(instance)), None)])

    def from_dict(self, entries: Any) -> Any:
        """Decode a struct: by name, unknown members ignored, absent ones take their default."""
        return self._build(lambda codec: codec.decode, entries)

    def from_batch(self, batch: pa.RecordBatch) -> Any:
        """Decode the first row of a batch: by name, unknown columns ignored, absent ones take their default."""
        if batch.num_rows > 1:
            raise _Mismatch(f"{self.cls.__name__} (one row)", f"{batch.num_rows} rows")
        columns = dict(zip(batch.schema.names, batch.columns)) if batch.num_rows else {}
        return self._build(lambda codec: codec.from_array, columns)

    def from_bytes(self, data: _Buffer, validation: IpcValidation = IpcValidation.FULL) -> Any:
        """Decode an IPC stream of one row; no bytes, or no batch, is a row of defaults."""
        plan = self.row.plan
        if plan is not None and isinstance(data, bytes) and len(data) <= _PLAIN_BYTES:
            try:
                return self._from_row(plan.read_stream(data))
            except _NotPlain:
                pass
        reader = IpcReader(BufferSource(data), _inner_limits(data), validation) if len(data) else None
        message = reader.next_message() if reader else None
        if reader is None or message is None:
            return self.from_batch(_TICK)
        if plan is not None and reader.facts is plan.facts and message.head.rows == 1:
            with contextlib.suppress(_NotPlain):
                return self._from_row([column[0] for column in plan.read(reader, message)])
        return self.from_batch(reader.decode(message))

    def _from_row(self, values: Sequence[Any]) -> Any:
        if self._all_init:
            return self.cls(**dict(zip(self.row.names, self.row.decode(values))))
        return self._build(lambda codec: codec.decode, dict(zip(self.row.names, values)))

    def _build(self, reader: Callable[[Codec], Callable[[Any], Any]], present: Mapping[str, Any]) -> Any:
        values: dict[str, Any] = {}
        late: dict[str, Any] = {}
        for f, codec in zip(self.fields, self.row.codecs):
            if f.name in present:
                (values if f.init else late)[f.name] = _of_field(f.name, reader(codec), present[f.name])
            elif f.init and not _has_default(f):
                raise _Mismatch(codec.expected, "no such field, and it has no default").under(f".{f.name}")
        instance = self.cls(**values)
        for name, value in late.items():
            object.__setattr__(instance, name, value)
        return instance

def _has_default(f: dataclasses.Field[Any]) -> bool:
    return f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING

_building: set[type] = set()
_codec_lock = threading.RLock()

def _make_dataclass_codec(cls: Any) -> DataclassCodec:
    """Return the codec of a class, built once; `TypeError`: a field has no Arrow mapping, or the class contains itself."""
    with _codec_lock:
        if cls in _building:
            raise TypeError(f"{cls.__qualname__} contains itself; an Arrow struct has a fixed depth")
        _building.add(cls)
        try:
            return DataclassCodec(cls)
        finally:
            _building.discard(cls)

dataclass_codec: Callable[[Any], DataclassCodec] = functools.cache(_make_dataclass_codec)

_INSTEAD = {  # what would work, by the name of the type that has no mapping
    "list": "list[T], for example list[int]", "dict": "dict[K, V], for example dict[str, float]", "set": "set[T]",
    "frozenset": "frozenset[T]", "tuple": "list[T], or a dataclass", "Table": "pa.RecordBatch, or a stream of batches",
    "UUID": "Annotated[bytes, ArrowType(pa.binary(16))]", "date": "Annotated[date, ArrowType(pa.date32())]",
    "datetime": "Annotated[datetime, ArrowType(pa.timestamp('us'))]", "time": "Annotated[time, ArrowType(pa.time64('us'))]",
    "timedelta": "Annotated[timedelta, ArrowType(pa.duration('us'))]",
    "Decimal": "Annotated[Decimal, ArrowType(pa.decimal128(20, 4))]",
}
_MAPPED = "str, bytes, int, float, bool, list, dict, set, Enum, a dataclass, or Annotated[T, ArrowType(...)]"

@functools.cache
def codec_for(annotation: Any, *, whole: bool = False) -> Codec:
    """Return the codec of an annotation; without a mapping a `TypeError` says what would work. *whole* is for parameters and
    results, where a dataclass travels as bytes, and not as a struct."""
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
            known = dataclass_codec(cast("Any", annotation))
            if whole:
                return _binary_codec(known.to_bytes, known.from_bytes)
            decode = _not_none(annotation.__name__, known.from_dict)
            return Codec(pa.struct(list(known.row.schema)), False, known.to_dict, decode)
    instead = _INSTEAD.get(getattr(origin or annotation, "__name__", ""), _MAPPED)
    raise TypeError(f"no Arrow type for {_annotation_text(annotation)}; use {instead}")

class _SchemaDescriptor:
    """``ARROW_SCHEMA`` of a dataclass: made at first use, as annotations may name classes defined later."""
    def __get__(self, instance: object, owner: type) -> pa.Schema:
        return dataclass_codec(owner).row.schema


class ArrowSerializableDataclass:
    """Base of dataclasses that travel: parameters, results, headers and stream states. A subclass is decorated with
    ``@dataclass`` (frozen or not). Fields have the types of the README's table; a field ``Annotated[T, Transient()]`` is not
    serialised. Reading goes by field name: unknown columns are ignored, absent ones take the field's default. An absent field
    without one, and a value not of its field's type, are a `TypeError` with the path."""
    ARROW_SCHEMA: ClassVar[Any] = _SchemaDescriptor()  # one column per field

    def serialize_to_bytes(self) -> bytes:
        """Return an Arrow IPC stream of 1 row x len(fields) columns."""
        return _located(type(self).__name__, "", dataclass_codec(type(self)).to_bytes, self)

    def serialize(self, dest: typing.BinaryIO) -> None:
        """Write `serialize_to_bytes` to *dest*, which stays open."""
        dest.write(self.serialize_to_bytes())

    @classmethod
    def deserialize_from_bytes(cls: type[_T], data: bytes, ipc_validation: IpcValidation = IpcValidation.FULL) -> _T:
        """Read what `serialize_to_bytes` wrote; `IPCError` when it is no Arrow IPC stream."""
        read = functools.partial(dataclass_codec(cls).from_bytes, validation=ipc_validation)
        return cast("_T", _located(cls.__name__, "", read, data))

    @classmethod
    def deserialize_from_batch(cls: type[_T], batch: pa.RecordBatch, custom_metadata: pa.KeyValueMetadata | None = None, *,
                               ipc_validation: IpcValidation = IpcValidation.FULL) -> _T:
        """Read the one row of *batch* (1 x any columns), without a look at the metadata; raises as `deserialize_from_bytes`."""
        return cast("_T", _located(cls.__name__, "", dataclass_codec(cls).from_batch, batch))


# ============================================================================
# 7. STREAM STATE ...................................... uses 1-6
# ============================================================================
# What a method's author holds in hand: the context of a call, the collector of one turn, the state that lives on
# between turns. Law: nothing here knows a transport; facts of one call travel in CallContext, never in globals.

class TransportKind(str, enum.Enum):
    """How a call came in."""
    PIPE, UNIX, TCP, HTTP = "pipe", "unix", "tcp", "http"
    __str__ = str.__str__

class ServeStartHook(Protocol):
    """An implementation with this method hears, once per kind of transport, that serving begins."""
    def on_serve_start(self, kind: TransportKind) -> None:
        """Called before the first request; an exception refuses that request and the next one asks again."""


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
        return _ANONYMOUS

    def require_authenticated(self) -> None:
        """Raise `StatusError` (UNAUTHENTICATED) unless somebody vouches for the caller."""
        if not self.authenticated:
            raise StatusError("authentication required", code=Code.UNAUTHENTICATED)

_ANONYMOUS = AuthContext(None, False)
ClientLog = Callable[[Message], None]
_current_auth: contextvars.ContextVar[AuthContext] = contextvars.ContextVar("vgi_rpc_auth", default=_ANONYMOUS)

def current_auth() -> AuthContext:
    """Return who calls the method that runs now; anonymous outside of one."""
    return _current_auth.get()


@dataclass(eq=False, repr=False, slots=True)
class CallContext:
    """What a method may ask about its call, by a parameter ``ctx: CallContext``; used by the thread that runs the method."""
    auth: AuthContext  # who calls
    emit_client_log: ClientLog  # sends a Message to the client's on_log
    transport_metadata: Mapping[str, Any] = None  # type: ignore[assignment]  # remote_addr, traceparent, tracestate
    _: dataclasses.KW_ONLY
    server_id: str = ""  # 12 hex characters, one per server
    method_name: str = ""
    protocol_name: str = ""
    kind: TransportKind | None = None  # transport of the call
    implementation: Any = None  # the object that serves the protocol
    request_id: str = ""  # in the client's errors and in the access log
    deadline: float | None = None  # when the client stops waiting, seconds of time.monotonic(); None for never
    response_limit_bytes: int | None = None  # what client and server accept as one answer over HTTP; None for any size
    _gone: Callable[[], bool] | None = None
    _limits: Mapping[str, Any] = None  # type: ignore[assignment]  # as `describe` tells them

    def __post_init__(self) -> None:
        self.transport_metadata = self.transport_metadata or {}

    def client_log(self, level: Level, message: str, **extra: str) -> None:
        """Send a log line to the client; it arrives before the answer of this turn."""
        self.emit_client_log(Message(level, message, **extra))

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more: the deadline has passed or the client has gone."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return late or (self._gone is not None and self._gone())

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger ``vgi_rpc.method`` on the server's side, with request id and method in ``extra``."""
        facts = {"request_id": self.request_id, "protocol": self.protocol_name, "method": self.method_name}
        return logging.LoggerAdapter(logging.getLogger("vgi_rpc.method"), facts)


@dataclass
class CallStatistics:
    """Batches, rows and bytes received and sent in one call; bytes are those of the batches' buffers, not of the wire."""
    input_batches: int = 0
    output_batches: int = 0
    input_rows: int = 0
    output_rows: int = 0
    input_bytes: int = 0
    output_bytes: int = 0

    def record_input(self, batch: pa.RecordBatch) -> None:
        """Count a received batch."""
        self.input_batches += 1
        if batch is not _TICK:
            self.input_rows += batch.num_rows
            self.input_bytes += batch.nbytes

    def record_output(self, batch: pa.RecordBatch) -> None:
        """Count a sent batch."""
        self.output_batches += 1
        self.output_rows += batch.num_rows
        self.output_bytes += batch.nbytes


class OutputCollector:
    """Collects what one turn of a stream sends: any number of logs and exactly one data batch. For one thread. *producer_mode*
    tells whether the stream may `finish` (a producer) or is ended by the client (an exchange)."""
    def __init__(self, output_schema: pa.Schema, *, producer_mode: bool = True) -> None:
        self.output_schema, self._producer_mode = output_schema, producer_mode
        self.finished = False  # whether `finish` was called in this turn
        self.messages: list[Message] = []
        self._data: pa.RecordBatch | PlainBatch | None = None
        self._metadata: dict[bytes, bytes] | None = None

    @property
    def data_batch(self) -> AnnotatedBatch | None:
        """The data batch of this turn, once it was emitted."""
        if self._data is None:
            return None
        batch = self._data if isinstance(self._data, pa.RecordBatch) else self._data.to_record_batch()
        return AnnotatedBatch(batch, pa.KeyValueMetadata(self._metadata) if self._metadata else None)

    def emit(self, batch: pa.RecordBatch, metadata: Mapping[str, str] | None = None) -> None:
        """Send *batch* (any rows x the columns of the output schema) with its own metadata. Raises `RuntimeError` for a second
        batch in this turn or one after `finish`, `TypeError` for another schema."""
        if self.finished:
            raise RuntimeError("emit after finish(): a finished stream sends nothing more")
        if self._data is not None:
            raise RuntimeError("emit called twice in one turn: a turn sends exactly one data batch")
        plain = isinstance(batch, PlainBatch)  # made by emit_pydict, of our schema
        self._data = batch if plain else conform_batch(batch, self.output_schema, "emit", cast_values=False)
        self._metadata = {_as_bytes(k): _as_bytes(v) for k, v in dict(metadata).items()} if metadata else None

    def emit_arrays(self, arrays: Sequence[pa.Array], metadata: Mapping[str, str] | None = None) -> None:
        """Send columns, in the order of the output schema; raises as `emit`."""
        schema = self.output_schema
        if len(arrays) != len(schema):
            raise ParameterError(f"emit_arrays: expected {len(schema)} columns, got {len(arrays)}")
        self.emit(_batch_from_pydict(dict(zip(schema.names, arrays)), schema, "emit_arrays"), metadata)

    def emit_pydict(self, data: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
        """Send ``{column: values}``; raises as `emit`."""
        plan, schema = plain_plan(self.output_schema), self.output_schema
        batch: Any = None
        if plan is not None and data.keys() == plan.names:
            try:
                batch = plan.write([data[name] for name in schema.names])
            except _NotPlain:
                pass
        self.emit(_batch_from_pydict(data, schema, "emit_pydict") if batch is None else batch, metadata)

    def finish(self) -> None:
        """End a producer's stream after this turn, whose batch is still sent; raises `RuntimeError` in an exchange."""
        if not self._producer_mode:
            raise RuntimeError("finish() in an exchange: the client ends an exchange, by closing it")
        self.finished = True

    def client_log(self, level: Level, message: str, **extra: str) -> None:
        """Send a log line to the client's ``on_log``, before this turn's data."""
        self.messages.append(Message(level, message, **extra))

    def emit_client_log_message(self, msg: Message) -> None:
        """Send a ready-made log line."""
        self.messages.append(msg)

    def validate(self) -> None:
        """Raise `RuntimeError` when the turn broke the rule of one data batch."""
        if self._data is None and not self.finished:
            rule = "emit one data batch or call finish()" if self._producer_mode else "emit exactly one data batch"
            raise RuntimeError(f"nothing emitted: each turn must {rule}")

def _as_bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "backslashreplace")


class StreamState(ArrowSerializableDataclass):
    """What a stream remembers between turns: a dataclass whose fields are serialised over HTTP and stay put elsewhere."""
    # Dataclass of the part that never changes (Stream(call_state=...)): sent once, sealed on its own.
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
    _S = TypeVar("_S", bound=StreamState)
    _H = TypeVar("_H", default=None)  # Python's own takes it from 3.13 on, mypy for every version
else:
    _S, _H = TypeVar("_S"), TypeVar("_H")


@dataclass
class Stream(Generic[_S, _H]):
    """What a streaming method returns: ``Stream[State]`` or ``Stream[State, Header]``; a client gets a `StreamSession`."""
    output_schema: pa.Schema  # of every batch sent; decided at call time
    state: _S  # whose process() serves each turn
    input_schema: pa.Schema = EMPTY_SCHEMA  # of the client's batches; empty for a producer
    header: _H | None = None  # sent once, before the data, when the method declares one
    call_state: Any = None  # the part of the state that never changes, see StreamState

    @property
    def is_producer(self) -> bool:
        """Whether turns run on ticks: nothing comes in, and the state is not an exchange's."""
        return (self.input_schema is EMPTY_SCHEMA or not len(self.input_schema)) and not isinstance(self.state, ExchangeState)

    if typing.TYPE_CHECKING:  # to a client's type checker a Stream is the StreamSession that the proxy returns
        def __iter__(self) -> Iterator[AnnotatedBatch]: ...
        def __enter__(self) -> Stream[_S, _H]: ...
        def __exit__(self, *exc: object) -> None: ...
        def exchange(self, input: AnnotatedBatch) -> AnnotatedBatch: ...
        def tick(self, custom_metadata: pa.KeyValueMetadata | None = None) -> AnnotatedBatch: ...
        def typed_header(self, header_type: type[_T]) -> _T: ...
        def close(self) -> None: ...
        def cancel(self) -> None: ...
    else:
        def __class_getitem__(cls, parameters):
            return super().__class_getitem__(parameters if isinstance(parameters, tuple) else (parameters, type(None)))

        def _client_side(self, *_, **__):
            """See the method of this name in `StreamSession`; a server's `Stream` has none and raises `TypeError`."""
            raise TypeError("a Stream is what a method returns; iterate or exchange on the session that a proxy returns")

        __iter__ = __enter__ = __exit__ = exchange = tick = typed_header = close = cancel = _client_side


# ============================================================================
# 8. METHODS ........................................... uses 1-7
# ============================================================================
# A Protocol class read once: every method with its schemas and codecs, and an implementation checked against it.
# Law: whatever is wrong with a service is said when it is built, all of it in one error.

class MethodType(enum.Enum):
    """Whether a method returns a value or a stream."""
    UNARY, STREAM = "unary", "stream"


@dataclass(frozen=True)
class RpcMethodInfo:
    """One method of a Protocol."""
    name: str
    params_schema: pa.Schema  # 1 row x len(parameters) columns
    result_schema: pa.Schema  # 1 row x 1 column "result"; empty for "-> None" and for streams
    result_type: Any  # the return annotation
    method_type: MethodType
    has_return: bool  # whether a unary method returns something
    doc: str | None
    param_defaults: dict[str, Any] = field(default_factory=dict)
    param_types: dict[str, Any] = field(default_factory=dict)  # annotations by parameter
    param_docs: dict[str, str] = field(default_factory=dict)  # the "Args:" of the docstring, by parameter
    header_type: type | None = None  # dataclass of the stream's header
    is_exchange: bool | None = None  # None where the annotation does not tell
    protocol_name: str = ""  # the protocol's routing name
    params: RowCodec = field(default_factory=lambda: RowCodec(()), repr=False)
    result: RowCodec = field(default_factory=lambda: RowCodec(()), repr=False)
    header: DataclassCodec | None = field(default=None, repr=False)
    idempotency: str = "unknown"  # or "idempotent" or "no_side_effects"
    deprecation: str | None = None  # why the method should not be used any more
    layouts: dict[Any, StreamLayout | None] = field(default_factory=dict, repr=False, compare=False)  # of its requests and results

    @property
    def kind(self) -> str:
        """One word for people: ``unary``, ``producer``, ``exchange`` or ``stream`` (where the annotation does not tell)."""
        if self.method_type is MethodType.UNARY:
            return "unary"
        return {True: "exchange", False: "producer", None: "stream"}[self.is_exchange]

    def signature(self) -> str:
        """Return the Python signature without ``self``, as a person would write it."""
        defaults = {name: f" = {value!r}" for name, value in self.param_defaults.items()}
        parts = [f"{name}: {_annotation_text(hint)}{defaults.get(name, '')}" for name, hint in self.param_types.items()]
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
    """Return the class's own ``protocol_name``, else its name; raises `ValueError` unless it suits WIRE section 1."""
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
    bases = [b for b in reversed(cls.__mro__) if b.__module__ not in ("builtins", "typing", "typing_extensions", "abc")]
    found = {n: f for base in bases for n, f in vars(base).items() if not n.startswith("_") and inspect.isfunction(f)}
    return {n: f for n, f in found.items() if n != "on_serve_start"}

def _is_context(name: str, annotation: Any) -> bool:
    return _split_optional(annotation)[0] is CallContext or (name == "ctx" and annotation is inspect.Parameter.empty)

def _doc_arguments(doc: str | None) -> dict[str, str]:
    """The ``Args:`` block of a Google docstring, by parameter."""
    block = re.search(r"^ *Args:\n((?:(?: +\S.*)?(?:\n|$))+)", inspect.cleandoc(doc or ""), re.M)
    entries = re.split(r"^ {2,8}(\w+)(?: *\([^)]*\))?:", block[1] if block else "", flags=re.M)[1:]
    return {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2])}

def _stream_parts(annotation: Any) -> tuple[Any, type | None] | None:
    """``Stream[S, H]`` -> (S, H or None); ``None`` when the annotation is not a stream."""
    if typing.get_origin(annotation) is not Stream:
        return (StreamState, None) if annotation is Stream else None
    state, header = typing.get_args(annotation)
    return state, (None if header in (None, type(None)) else header)

def _is_exchange(state: Any) -> bool | None:
    if not isinstance(state, type):
        return None
    return True if issubclass(state, ExchangeState) else False if issubclass(state, ProducerState) else None

def _method_info(protocol: str, name: str, function: Any) -> RpcMethodInfo:
    hints = _hints(function)
    types_, defaults, codecs = {}, {}, []
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        annotation = hints.get(parameter.name, parameter.empty)
        if _is_context(parameter.name, annotation):
            continue
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"{name}() parameter {parameter}: expected a named parameter, got {parameter.kind.description}")
        if annotation is parameter.empty:
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
    try:
        result_facts = _result_facts(hints["return"])
    except TypeError as exc:
        raise TypeError(f"{name}() result: {exc}") from None
    doc, params = inspect.getdoc(function), RowCodec(codecs)
    return RpcMethodInfo(
        name=name, protocol_name=protocol, doc=doc, params_schema=params.schema, params=params, param_defaults=defaults,
        param_types=types_, param_docs=_doc_arguments(doc), result_type=hints["return"], **result_facts,
        idempotency=getattr(function, "__vgi_idempotency__", "unknown"),
        deprecation=getattr(function, "__vgi_deprecated__", None))

def _result_facts(annotation: Any) -> dict[str, Any]:
    """The fields of `RpcMethodInfo` that the return annotation decides."""
    stream = _stream_parts(annotation)
    if stream:
        state, header = stream
        return {"method_type": MethodType.STREAM, "has_return": False, "result_schema": EMPTY_SCHEMA, "header_type": header,
                "header": dataclass_codec(header) if header else None, "is_exchange": _is_exchange(state)}
    has_return = annotation not in (None, type(None))
    result = RowCodec([("result", codec_for(annotation, whole=True))] if has_return else ())
    return {"method_type": MethodType.UNARY, "has_return": has_return, "result": result, "result_schema": result.schema}

@functools.lru_cache(maxsize=256)
def rpc_methods(protocol: type) -> Mapping[str, RpcMethodInfo]:
    """Return the methods of a Protocol class, or of a plain class that serves as its own, by name. Raises one `TypeError` that
    names every annotation that is missing or has no Arrow type."""
    make = functools.partial(_method_info, protocol_name_of(protocol))
    what, where = f"{protocol.__qualname__} cannot be served", f"{protocol.__qualname__}."
    return types.MappingProxyType(_make_all(what, where, make, _public_functions(protocol)))

def _make_all(what: str, where: str, make: Callable[[str, Any], _T], items: Mapping[str, Any]) -> dict[str, _T]:
    """Return ``{name: make(name, item)}``; the `TypeError` of each that fails becomes part of one, *where* in front of it."""
    made, problems = {}, []
    for name, item in items.items():
        try:
            made[name] = make(name, item)
        except TypeError as exc:
            problems.append(f"{where}{exc}")
    if problems:
        raise TypeError(f"{what}: " + (problems[0] if len(problems) == 1 else "\n  - ".join(["", *problems])))
    return made

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
    context_parameter: str | None  # which parameter gets the CallContext
    state_types: tuple[type, ...]  # the concrete state classes that the implementation's annotation names

@dataclass
class HostedService:
    """One protocol on a server."""
    name: str  # routing name
    protocol: type
    version: str  # MAJOR.MINOR.PATCH, empty when the protocol declares none
    implementation: Any
    methods: dict[str, BoundMethod]
    hash: str = ""  # the family's protocol hash (hex SHA-256), filled in by the server

def bind_implementation(protocol: type, implementation: Any) -> HostedService:
    """Check *implementation* against *protocol* and bind its methods. Raises one `TypeError` for all that is missing or does
    not agree, `ValueError` for a malformed name or version."""
    name = protocol_name_of(protocol)
    version = getattr(protocol, "protocol_version", "") or ""
    if version and _parse_version(version) is None:
        raise ValueError(f"{name}.protocol_version: expected MAJOR.MINOR.PATCH, got {version!r}")
    if isinstance(implementation, type):
        wanted = implementation.__qualname__
        raise TypeError(f"expected an instance of {wanted}, got the class; write {wanted}()")
    service = HostedService(name, protocol, version, implementation, {})
    what = f"{type(implementation).__qualname__} does not implement {name}"
    service.methods |= _make_all(what, "", lambda _, info: _bind_method(info, service), rpc_methods(protocol))
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
    problems = []
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        problems = [f"takes no parameter {n!r}{_suggest(n, parameters)}" for n in info.param_types if n not in parameters]
    for name, p in parameters.items():
        expected = name in info.param_types or name == context or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if not expected and p.default is p.empty:
            problems.append(f"requires {name!r}, which the protocol does not have")
    state_types = _state_types(info, hints.get("return"), problems)
    if problems:
        raise TypeError("; ".join(f"{info.name}() {p}" for p in problems))
    return BoundMethod(info, service, function, context, state_types)

def _state_types(info: RpcMethodInfo, returned: Any, problems: list[str]) -> tuple[type, ...]:
    """The concrete state classes that the implementation's annotation names; their fields are checked here."""
    stream = _stream_parts(returned) if returned is not None else _stream_parts(info.result_type)
    if returned is not None and (stream is not None) != (info.method_type is MethodType.STREAM):
        problems.append(f"returns {_annotation_text(returned)}, the protocol says {_annotation_text(info.result_type)}")
    if stream is None or info.method_type is MethodType.UNARY:
        return ()
    state, found = stream[0], []
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
# 9. REQUESTS AND REPLIES .............................. uses 1-8
# ============================================================================
# A call's arguments to a request stream and back, a result to its batch and back (WIRE sections 1 and 3).
# Law: a request's schema equals the method's, name for name and type for type, before a single value is decoded.

def bind_arguments(info: RpcMethodInfo, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return one value per parameter, in order, defaults filled in; raises `TypeError` where the call does not fit."""
    names = info.params.names
    if not args and kwargs.keys() == info.params.name_set:
        return [kwargs[name] for name in names]
    if len(args) > len(names):
        raise ParameterError(f"{info.name}() takes {len(names)} arguments {list(names)}, got {len(args)}")
    for name in kwargs:
        if name not in names:
            raise ParameterError(f"{info.name}() has no parameter {name!r}{_suggest(name, names)}; it has {list(names)}")
        if name in names[: len(args)]:
            raise ParameterError(f"{info.name}() got {name!r} twice, by position and by name")
    given = {**info.param_defaults, **dict(zip(names, args)), **kwargs}
    try:
        return [given[name] for name in names]
    except KeyError as exc:
        raise ParameterError(f"{info.name}() is missing argument {exc}; signature: {info.signature()}") from None

def request_batch(info: RpcMethodInfo, values: Sequence[Any]) -> pa.RecordBatch | PlainBatch:
    """Encode the arguments, 1 row x len(parameters) columns; a `TypeError` gives the parameter and the path inside it."""
    return _located(f"{info.name}() argument ", ".", info.params.to_batch, values) if info.params.names else _TICK

def request_stream(info: RpcMethodInfo, batch: pa.RecordBatch | PlainBatch, version: str, request_id: str,
                   timeout: float | None) -> list[_Buffer]:
    """Return the pieces of a whole request (WIRE section 1): *batch* is that of `request_batch`, *timeout* in seconds."""
    varying = {REQUEST_ID_KEY: request_id.encode()}
    if timeout is not None:
        varying[TIMEOUT_KEY] = b"%015d" % max(1, int(timeout * 1000))  # always as long, see StreamLayout
    shape = version, len(request_id), len(varying)
    layout = info.layouts.get(shape)
    if layout is not None and (stream := layout.write(varying, batch)) is not None:
        return [stream]
    metadata = {METHOD_KEY: info.name.encode(), REQUEST_VERSION_KEY: REQUEST_VERSION,
                PROTOCOL_KEY: info.protocol_name.encode(), **varying}
    if version:
        metadata[PROTOCOL_VERSION_KEY] = version.encode()
    pieces: list[_Buffer] = []
    write_stream(pieces.extend, batch.schema, [(batch, metadata)])
    if shape not in info.layouts and len(info.layouts) < 8 and sum(map(len, pieces)) <= SMALL_BODY_BYTES:
        reader = IpcReader(BufferSource(b"".join(pieces)))
        message = cast("BatchMessage", reader.next_message())
        info.layouts[shape] = StreamLayout.learn(reader.facts, message, list(varying))
    return pieces


class Request:
    """One request as it came: metadata read, schema known, values not decoded yet."""
    def __init__(self, reader: IpcReader) -> None:
        self._reader, self.schema, message = reader, reader.schema, reader.next_message()
        self.schema_message = reader.facts.message  # which told its schema
        if message is None:
            raise IPCError("request: expected one batch, got a schema and no batch")
        self._message, self.rows = message, message.head.rows
        self.metadata: dict[bytes, bytes] = message.head.metadata or {}
        if reader.next_message() is not None:
            got = 2 + sum(1 for _ in iter(reader.next_message, None))
            raise ProtocolError(f"request: expected exactly one batch, got {got}")

    def layout(self) -> StreamLayout | None:
        """Learn how requests look that differ from this one in request id, time limit and the values of their row alone."""
        if not self.metadata.keys() <= _EVERYDAY_KEYS or PROTOCOL_KEY not in self.metadata:
            return None  # a trace, say, is another one in each request; and only over HTTP a request need not name its protocol
        return StreamLayout.learn(self._reader.facts, self._message, (REQUEST_ID_KEY, TIMEOUT_KEY))

    def text(self, key: bytes, what: str) -> str | None:
        """Return a metadata value as text, ``None`` when absent; raises `ProtocolError` when it is not UTF-8."""
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
        return read_timeout(self.metadata)

    def has_schema(self, row: RowCodec) -> bool:
        """Whether the request has exactly the schema of *row*."""
        return bool(self.schema.equals(row.schema))

    def values(self, row: RowCodec) -> Sequence[Any]:
        """Decode its one row, validated as the reader was told; raises `_Mismatch`, `IPCError`."""
        return row.from_message(self._reader, self._message)


class KnownRequest(Request):
    """A request of a layout that was learned from one before it: it has its schema and as many rows."""
    def __init__(self, bound: BoundMethod, layout: StreamLayout, found: Sequence[Any]) -> None:
        self.schema, self.rows = bound.info.params_schema, layout.rows
        self.metadata = dict(zip(layout.keys, found))
        self._values = found[len(layout.keys) :]

    def has_schema(self, row: RowCodec) -> bool:
        return True

    def values(self, row: RowCodec) -> Sequence[Any]:
        return row.decode(self._values)

def read_timeout(metadata: _Metadata) -> float | None:
    """Return the time limit of a request or turn in seconds, ``None`` for no limit."""
    value = metadata.get(TIMEOUT_KEY, b"")
    return int(value) / 1000 if value.isdigit() and len(value) < 16 else None

def clean_request_id(text: str | None) -> str:
    """Return *text* if it may be echoed and logged (1 to 128 visible ASCII characters), else an empty string."""
    fits = text and len(text) <= MAX_REQUEST_ID_CHARS and text.isascii() and text.isprintable() and " " not in text
    return text if text and fits else ""

_EVERYDAY_KEYS = {METHOD_KEY, REQUEST_VERSION_KEY, REQUEST_ID_KEY, PROTOCOL_KEY, PROTOCOL_VERSION_KEY, TIMEOUT_KEY}

_request_ids: list[str] = []  # made many at a time: asking the system for each takes longer than a call's other parts
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_request_ids.clear)

def new_request_id() -> str:
    """Return 16 random hex characters."""
    while True:
        try:
            return _request_ids.pop()
        except IndexError:
            text = os.urandom(1024).hex()
            _request_ids.extend([text[at : at + 16] for at in range(0, len(text), 16)])

def read_arguments(info: RpcMethodInfo, request: Request) -> dict[str, Any]:
    """Check a request against the method and decode its parameters. Raises `ParameterError` for one missing, extra, null or not
    as declared, `ProtocolError` unless there is one row."""
    if not request.has_schema(info.params):
        _refuse_schema(info, info.params_schema, request.schema)
    if not info.params.names:
        return {}
    if request.rows != 1:
        wanted = _schema_text(info.params_schema)
        raise ProtocolError(f"{info.name}(): expected exactly 1 row of {wanted}, got {request.rows} rows")
    return dict(zip(info.params.names, _located(f"{info.name}() parameter ", ".", request.values, info.params)))

def _refuse_schema(info: RpcMethodInfo, wanted: pa.Schema, got: pa.Schema) -> None:
    """Raise for the first way in which a request's schema is not the method's."""
    where = f"{info.name}(): expected {_schema_text(wanted)}, got {_schema_text(got)[:2000]}"
    extra, missing = ([n for n in x.names if n not in y.names] for x, y in ((got, wanted), (wanted, got)))
    if extra:
        raise ParameterError(f"{where}: no parameter {', '.join(map(repr, extra[:8]))}{_suggest(extra[0], wanted.names)}")
    if missing:
        raise ParameterError(f"{where}: missing {', '.join(map(repr, missing))}")
    if got.names != wanted.names:
        raise ParameterError(f"{where}: the order of the parameters differs, or one stands twice")
    for g, w in zip(got, wanted):
        if not g.type.equals(w.type) or g.nullable != w.nullable:
            shown, expected = (f"{f.type}{'' if f.nullable else ' not null'}" for f in (g, w))
            raise ParameterError(f"{where}: parameter {w.name!r}: expected {expected}, got {shown}")

def result_batch(info: RpcMethodInfo, value: Any) -> pa.RecordBatch | PlainBatch:
    """Encode a unary result: 1 row x 1 column, or 0 x 0 for ``-> None``; raises `TypeError` for a value not as declared."""
    if not info.has_return:
        if value is not None:
            raise ParameterError(f"{info.name}() result: declared to return None, got {_got(value)}")
        return _TICK
    return _located(f"{info.name}() result", ".result", info.result.to_batch, [value])

def header_batch(info: RpcMethodInfo, header: Any) -> pa.RecordBatch | PlainBatch:
    """Encode a stream's header, 1 row x the fields of its dataclass; raises `TypeError` for a value not as declared."""
    codec = cast("DataclassCodec", info.header)
    return _located(f"{info.name}() header", "", lambda value: codec.row.to_batch(codec.values(value)), header)

def read_result(info: RpcMethodInfo, reader: IpcReader, message: BatchMessage) -> Any:
    """Decode a unary result; raises `ParameterError` when it is not what the method declares: client and server disagree."""
    if not info.has_return:
        return None
    if message.head.rows != 1 or reader.schema.names != ["result"]:
        got = f"{message.head.rows} rows of {_schema_text(reader.schema)}"
        raise ParameterError(f"{info.name}() result: expected 1 row of {_schema_text(info.result_schema)}, got {got}")
    value = _located(f"{info.name}() result", ".result", functools.partial(info.result.from_message, reader), message)[0]
    if "result" not in info.layouts and reader.schema.equals(info.result_schema):
        info.layouts["result"] = StreamLayout.learn(reader.facts, message)
    return value

def recall_result(info: RpcMethodInfo, data: bytes, at: int) -> tuple[Sequence[Any], int] | None:
    """Read a result that stands in *data* from *at* on; return its row and where it ends. ``None`` when it does not look like
    the first one that the method returned, or is not there to its end: then it goes the ordinary way."""
    layout = info.layouts.get("result")
    return None if layout is None else layout.read(data, at)

def decode_result(info: RpcMethodInfo, row: Sequence[Any]) -> Any:
    """Decode the row of a result; raises as `read_result`."""
    return _located(f"{info.name}() result", ".result", info.result.decode, row)[0] if row else None


# ============================================================================
# 10. INTROSPECTION .................................... uses 1-9
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

_LEAF_TOKENS = (  # how the hash spells a type without children
    (pa.types.is_string, "utf8"), (pa.types.is_large_string, "large_utf8"),
    (pa.types.is_float16, "float16"), (pa.types.is_float32, "float32"), (pa.types.is_float64, "float64"),
    (pa.types.is_date32, "date32"), (pa.types.is_date64, "date64"), (pa.types.is_time, "time{0.bit_width}({0.unit})"),
    (pa.types.is_duration, "duration({0.unit})"), (pa.types.is_decimal, "decimal{0.bit_width}({0.precision},{0.scale})"),
    (pa.types.is_fixed_size_binary, "fixed_size_binary({0.byte_width})"), (pa.types.is_boolean, "bool"),
    (pa.types.is_binary, "binary"), (pa.types.is_large_binary, "large_binary"), (pa.types.is_null, "null"),
    (pa.types.is_integer, "{0}"),
)

def _type_token(kind: pa.DataType) -> str:
    """The spelling of a type in the protocol hash; raises `TypeError` for a type that has none."""
    if isinstance(kind, pa.BaseExtensionType):
        return f"extension({kind.extension_name})<{_type_token(kind.storage_type)}>"
    for is_kind, token in _LEAF_TOKENS:
        if is_kind(kind):
            return token.format(kind)
    t = pa.types
    if t.is_timestamp(kind):
        return f"timestamp({kind.unit}{',tz=' + kind.tz if kind.tz else ''})"
    if t.is_dictionary(kind):
        ordered = ",ordered" if kind.ordered else ""
        return f"dictionary<index:{_type_token(kind.index_type)},value:{_type_token(kind.value_type)}{ordered}>"
    if t.is_map(kind):
        sorted_ = ",keys_sorted" if kind.keys_sorted else ""
        return f"map<key:{_type_token(kind.key_type)},{_child_token('value', kind.item_field)}{sorted_}>"
    if t.is_struct(kind):
        return f"struct<{','.join(_child_token(f.name, f) for f in kind)}>"
    if t.is_fixed_size_list(kind):
        return f"fixed_size_list({kind.list_size})<{_child_token('item', kind.value_field)}>"
    if t.is_list(kind) or t.is_large_list(kind):
        return f"{'large_' if t.is_large_list(kind) else ''}list<{_child_token('item', kind.value_field)}>"
    raise TypeError(f"the protocol hash has no token for {kind}")

def _child_token(name: str, child: pa.Field) -> str:
    return f"{name}{'?' if child.nullable else ''}:{_type_token(child.type)}"

def protocol_hash(protocol: str, infos: Iterable[RpcMethodInfo]) -> str:
    """Return the family's fingerprint of a protocol (WIRE section 7), hex SHA-256; raises `TypeError` for a tokenless type."""
    methods = []
    for info in sorted(infos, key=operator.attrgetter("name")):
        schemas = {"params": info.params_schema, "result": info.result_schema if info.has_return else None,
                   "header": info.header and info.header.row.schema}
        facts = {"name": info.name, "type": info.method_type.value, "has_return": info.has_return}
        facts |= {"has_header": info.header is not None}
        methods.append(facts | {
            key: [{"name": f.name, "nullable": f.nullable, "type": _type_token(f.type)} for f in schema]
            for key, schema in schemas.items() if schema is not None})
    text = json.dumps({"protocol": protocol, "methods": methods}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(b"vgi_rpc.protocol_hash.v1|" + text.encode()).hexdigest()

def _serialized(schema: pa.Schema | None) -> bytes:
    return b"" if schema is None else schema.serialize().to_pybytes()

class Limit(NamedTuple):
    """One cap of a server."""
    value: float | None  # None for none
    unit: str  # bytes, rows, seconds …

    def __str__(self) -> str:
        shown = f"{self.value:,}" if isinstance(self.value, int) else f"{self.value or 0:,g}"
        return "none" if self.value is None else f"{shown} {self.unit}"

_LIMITS: dict[str, tuple[str, float | None]] = {  # all that a server may have: unit, and the value where no option changes it
    "max_request_bytes": ("bytes", None), "max_json_request_bytes": ("bytes", None), "max_response_bytes": ("bytes", None),
    "max_decoded_bytes": ("bytes", None), "free_decoded_bytes": ("bytes, or 1,024 times the compressed ones", None),
    "max_rows": ("rows", None), "free_rows": ("rows, or 8 for each byte of the batch", FREE_ROWS),
    "max_columns": ("columns", MAX_COLUMNS), "max_nesting": ("levels", MAX_NESTING),
    "max_metadata_bytes": ("bytes", MAX_METADATA_BYTES), "max_error_message_chars": ("characters", MAX_ERROR_MESSAGE_CHARS),
    "max_traceback_chars": ("characters", MAX_TRACEBACK_CHARS), "max_error_details_bytes": ("bytes", MAX_ERROR_DETAILS_BYTES),
    "max_request_id_chars": ("characters", MAX_REQUEST_ID_CHARS), "max_turns": ("turns", None),
    "max_turns_seconds": ("seconds", None), "token_ttl": ("seconds", None), "token_clock_skew": ("seconds", None),
    "max_state_bytes": ("bytes", None), "call_state_cache_entries": ("tokens", None), "max_head_bytes": ("bytes", None),
    "max_headers": ("headers", None), "max_connections": ("connections", None), "tls_handshake_timeout": ("seconds", None),
    "read_timeout": ("seconds", None), "request_deadline": ("seconds", None), "keep_alive_timeout": ("seconds", None),
    "idle_timeout": ("seconds", None), "drain_grace_seconds": ("seconds", None),
}

def limits_of(transport: Mapping[str, Any]) -> dict[str, Limit]:
    """Return the limits of a server: the fixed ones, and those that *transport* gives by name."""
    named = ((name, unit, transport.get(name, fixed)) for name, (unit, fixed) in _LIMITS.items() if fixed or name in transport)
    return {name: Limit(value, unit) for name, unit, value in named}

def _limits_told(description: ProtocolDescription) -> dict[str, Limit]:
    """The limits that came with a description; what is not as we would tell it is passed over."""
    schemas = (_schema_from_bytes(m.params_schema_ipc) for m in description.methods[:1])
    told = next((_json_object((schema.metadata or {}).get(LIMITS_KEY)) for schema in schemas), {})
    good = (types.NoneType, str), (int, str), (float, str)
    return {k: Limit(*v) for k, v in told.items() if isinstance(v, list) and tuple(map(type, v)) in good}

def describe_service(service: HostedService, limits: Mapping[str, Limit]) -> ProtocolDescription:
    """Return the reflection answer for one hosted protocol; the *limits* travel with its first method."""
    more = itertools.chain([{LIMITS_KEY: json.dumps(limits).encode()}], itertools.repeat({}))
    methods = [_method_summary(bound, told) for (_, bound), told in zip(sorted(service.methods.items()), more)]
    return ProtocolDescription(service.name, service.version, service.hash, methods=methods)

def _method_summary(bound: BoundMethod, more: Mapping[bytes, bytes]) -> MethodSummary:
    info, stream = bound.info, ""
    if info.method_type is MethodType.STREAM:
        kinds = {_is_exchange(s) for s in bound.state_types} or {info.is_exchange}
        stream = {True: "exchange", False: "producer", None: "unknown"}[kinds.pop() if len(kinds) == 1 else None]
    return MethodSummary(
        info.name, info.method_type.value, info.has_return, info.header is not None, stream,
        params_schema_ipc=_serialized(info.params_schema.with_metadata({**_told(info), **more})),
        result_schema_ipc=_serialized(info.result_schema if info.has_return else None),
        header_schema_ipc=_serialized(info.header.row.schema if info.header else None),
        idempotency=info.idempotency, deprecated=info.deprecation is not None, deprecation_message=info.deprecation or "",
    )

def _told(info: RpcMethodInfo) -> dict[bytes, bytes]:
    """What reflection's own fields have no room for, as metadata of the parameters' schema: other peers pass over it."""
    defaults = {}
    for name, value in info.param_defaults.items():
        with contextlib.suppress(TypeError, ValueError):  # a default that JSON cannot say is not told
            defaults[name] = json.loads(json.dumps(value.name if isinstance(value, enum.Enum) else value, allow_nan=False))
    facts = {DOC_KEY: info.doc or "", DEFAULTS_KEY: json.dumps(defaults), PARAM_DOCS_KEY: json.dumps(info.param_docs)}
    return {key: text.encode("utf-8", "backslashreplace") for key, text in facts.items()}

@dataclass(frozen=True)
class MethodDescription:
    """One method of a server, as a client learns of it."""
    name: str
    method_type: MethodType
    has_return: bool  # whether a unary method returns something
    params_schema: pa.Schema  # 1 row x len(parameters) columns
    result_schema: pa.Schema  # 1 row x 1 column, or empty
    has_header: bool = False  # whether its stream sends a header
    header_schema: pa.Schema | None = None
    is_exchange: bool | None = None  # None where the server does not say
    idempotency: str = "unknown"  # or "idempotent" or "no_side_effects"
    deprecation: str | None = None  # why not to use it
    doc: str = ""  # this, defaults and their like are told by our own servers only
    param_defaults: Mapping[str, Any] = field(default_factory=dict)  # as JSON says them, by parameter
    param_docs: Mapping[str, str] = field(default_factory=dict)

@dataclass(frozen=True)
class ServiceDescription:
    """One protocol of a server, as a client learns of it."""
    protocol_name: str  # routing name
    request_version: str  # of the wire
    describe_version: str  # of the reflection answer
    protocol_hash: str  # the family's fingerprint
    server_id: str  # 12 hex characters
    methods: Mapping[str, MethodDescription]
    protocol_version: str = ""  # MAJOR.MINOR.PATCH, empty when it declares none
    limits: Mapping[str, Limit] = field(default_factory=dict)  # by name; told by our own servers only

def _service_description(listed: ProtocolList, described: ProtocolDescription) -> ServiceDescription:
    methods = types.MappingProxyType({m.name: _method_description(m) for m in described.methods})
    return ServiceDescription(described.protocol, listed.request_version, DESCRIBE_VERSION, described.protocol_hash,
                              listed.server_id, methods, described.protocol_version, _limits_told(described))

def _method_description(m: MethodSummary) -> MethodDescription:
    params = _schema_from_bytes(m.params_schema_ipc)
    told = params.metadata or {}
    return MethodDescription(
        m.name, MethodType.STREAM if m.method_type == "stream" else MethodType.UNARY, m.has_return,
        params.remove_metadata(), _schema_from_bytes(m.result_schema_ipc), m.has_header,
        _schema_from_bytes(m.header_schema_ipc) if m.has_header else None,
        {"exchange": True, "producer": False}.get(m.stream_kind), m.idempotency,
        m.deprecation_message if m.deprecated else None, told.get(DOC_KEY, b"").decode("utf-8", "replace"),
        _json_object(told.get(DEFAULTS_KEY)), _json_object(told.get(PARAM_DOCS_KEY)))


# ============================================================================
# 11. TOKENS ........................................... uses 1-10
# ============================================================================
# Seals a stream's state so that only this service's own can come back (WIRE section 6). HMAC-SHA256 over half, binding,
# time and content; signed, not encrypted: a client can read what is inside.
# Law: nothing of a token is looked at before its seal was found good; every fault of a seal has the same answer.

_TOKEN_REFUSED = "state token refused: not issued by this service for this call; start the stream again"
_MAC_BYTES = 32
_STORED, _ZLIB, _ZSTD = 0, 1, 2
_SAMPLE_BYTES, _WORTH = 4_096, 0.7
# What fits into the first flight of a TCP connection (ten segments, RFC 6928) arrives no sooner for being shorter, and packing
# takes longer than all else that is done with it. A token grows by a third in base64.
_COMPRESS_BODY_FROM_BYTES, _COMPRESS_STATE_FROM_BYTES = 14_000, 10_000
_MAX_STATE_BYTES = 1 << 28  # decoded state in one token: 256 MiB

@functools.cache
def _zstd_available() -> bool:
    return bool(pa.Codec.is_available("zstd"))

def zstd_compress(data: _Buffer, level: int = 1) -> bytes:
    """Compress with pyarrow's own zstd codec."""
    return cast("bytes", pa.Codec("zstd", compression_level=level).compress(data, asbytes=True))

def _zstd_size(data: _Buffer) -> int:
    """The decoded size that a zstd frame's header gives (RFC 8878 section 3.1.1.1), -1 when it gives none."""
    head = bytes(memoryview(data)[:18])
    if len(head) < 6 or head[:4] != b"\x28\xb5\x2f\xfd":
        return -1
    single, code = head[4] >> 5 & 1, head[4] >> 6
    start, width = 5 + (not single) + (0, 1, 2, 4)[head[4] & 3], (single, 2, 4, 8)[code]
    return int.from_bytes(head[start : start + width], "little") + (256 if code == 1 else 0) if width else -1

def zstd_decompress(data: _Buffer, limit: int) -> bytes:
    """Decompress at most *limit* bytes, else `RequestTooLargeError` with no more decoded; `IPCError` unless it is whole."""
    size = _zstd_size(data)
    if 0 < size <= min(limit, 64 * len(data)):  # one call instead of a stream; a header that lies is left to the stream
        with contextlib.suppress(*_ARROW_FAILURES):
            whole = cast("bytes", pa.Codec("zstd").decompress(data, size, asbytes=True))
            if len(whole) == size:
                return whole
    pieces, left, room = [], limit + 1, memoryview(bytearray(min(max(8 * len(data), 1 << 12), 1 << 20)))
    try:
        with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as stream:
            # Not read(): pyarrow loses the bytes object that it has made when the data turn out to be bad.
            while left > 0 and (got := stream.readinto(room[:left])):
                pieces.append(bytes(room[:got]))
                left -= got
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
    """Seals and opens state tokens. Safe for use by several threads. The first of *keys* signs, all verify; none, or one under
    16 bytes, is a `ValueError`. *ttl* is how old a token may be, in seconds, 0 for any age. *clock* gives seconds since the
    epoch and can be turned by tests."""
    def __init__(self, keys: Sequence[bytes], ttl: float = TOKEN_TTL_SECONDS, clock: Callable[[], float] = time.time) -> None:
        if not keys or any(len(k) < 16 for k in keys):
            raise ValueError(f"token key: expected at least 16 bytes, got {[len(k) for k in keys] or 'none'}")
        self._begun, self.ttl, self.clock = [hmac.new(k, digestmod="sha256") for k in keys], ttl, clock

    @staticmethod
    def _mac(begun: hmac.HMAC, half: bytes, binding: Sequence[bytes], sealed: bytes) -> bytes:
        mac = begun.copy()
        mac.update(_bound_to(half, *binding))
        mac.update(sealed)
        return mac.digest()

    def seal(self, half: bytes, binding: Sequence[bytes], content: bytes) -> bytes:
        """Return *content* as a token (base64), bound to *half* (which half of the state it is) and *binding*."""
        method = _STORED
        if len(content) >= _COMPRESS_STATE_FROM_BYTES:
            packed = zstd_compress(content) if _zstd_available() else zlib.compress(content, 1)
            if len(packed) < len(content):
                method, content = (_ZSTD if _zstd_available() else _ZLIB), packed
        sealed = struct.pack("<BBQ", 1, method, int(self.clock() * 1000)) + content
        return binascii.b2a_base64(sealed + self._mac(self._begun[0], half, binding, sealed), newline=False)

    def open(self, half: bytes, binding: Sequence[bytes], token: bytes | None, *, aged: bool = True) -> bytes:
        """Return the content of a token that was sealed for the same *half* and *binding*; `ttl` applies if *aged*.
        Raises `TokenError`: any fault of the seal in one uniform text; or, the seal being good, too old or from the future."""
        try:
            raw = base64.b64decode(token or b"", validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        sealed, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
        # All keys, always: the time taken does not tell which one fits.
        good = sum([hmac.compare_digest(self._mac(key, half, binding, sealed), mac) for key in self._begun])
        # Base64 has spare bits at its end; only the spelling that we would write is ours, and only version 1 is.
        if not good or len(sealed) < 10 or binascii.b2a_base64(raw, newline=False) != token or sealed[0] != 1:
            raise TokenError(_TOKEN_REFUSED)
        method, issued = struct.unpack_from("<BQ", sealed, 1)
        self.check_age(issued / 1000, aged)
        packed = sealed[10:]
        if method == _ZSTD:
            return zstd_decompress(packed, _MAX_STATE_BYTES)
        return packed if method == _STORED else gzip_decompress(packed, _MAX_STATE_BYTES, 15)

    def check_age(self, issued: float, aged: bool = True) -> None:
        """Raise `TokenError` for a token of that time (of the clock) that is too old, if *aged*, or from the future."""
        age = self.clock() - issued
        if age < -TOKEN_CLOCK_SKEW_SECONDS:
            raise TokenError("state token refused: issued in the future; check the servers' clocks")
        if aged and self.ttl and age > self.ttl:
            raise TokenError(f"token expired: {age:.0f} s old, at most {self.ttl:g} s are allowed; start the stream again")

def pack_parts(parts: Sequence[bytes]) -> bytes:
    """Join byte strings so that `unpack_parts` gets them back: each is preceded by its length."""
    return b"".join([piece for part in parts for piece in (_LENGTH(len(part)), part)])

_LENGTH = struct.Struct("<I").pack

@functools.lru_cache(maxsize=256)
def _bound_to(*binding: bytes) -> bytes:
    """What a seal covers in front of the content; no two bindings give the same bytes."""
    return b"vgi_rpc.token.v1" + pack_parts(binding)

def unpack_parts(data: bytes, count: int) -> list[bytes]:
    """Split what `pack_parts` joined and was sealed; `TokenError` for other than *count* parts: another version wrote it."""
    parts, at = [], 0
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, at)
        parts.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    if len(parts) != count or at != len(data):
        raise TokenError(_TOKEN_REFUSED)
    return parts


# ============================================================================
# 12. SERVER CORE ...................................... uses 1-11
# ============================================================================
# resolve -> begin -> turn -> end, for every transport: no socket, no thread, no file. A byte stream and an HTTP handler are
# thin shells around a `Call`. The rules of a turn (one data batch, logs before data, finish, the error batch, cancel)
# stand in Call and nowhere else. Law: a turn never raises the method's exception, it returns it.


@dataclass
class CallRecord:
    """The facts of one call, or of one HTTP request of a stream: what hooks and the access log see."""
    protocol: str = ""  # routing name
    protocol_hash: str = ""  # its fingerprint
    method: str = ""
    method_type: str = "unary"  # or "stream"
    request_id: str = ""
    kind: TransportKind = TransportKind.PIPE
    auth: AuthContext = _ANONYMOUS  # who calls
    remote_addr: str = ""  # peer address, empty for pipes
    transport_metadata: Mapping[str, Any] = field(default_factory=dict)  # traceparent, tracestate and what else is known
    stream_id: str = ""  # the same for every request of one stream, empty for unary calls
    request_schema: pa.Schema | None = None  # of the parameters; None when this is a later request of a stream
    request_rows: int = 0
    http: dict[str, int] = field(default_factory=dict)  # over HTTP: http_status, request_bytes, response_bytes
    cancelled: bool = False  # by the client
    statistics: CallStatistics = field(default_factory=CallStatistics)
    duration_ms: float = 0.0  # set at the end

class DispatchHook(Protocol):
    """Hears of each call, on the thread that serves it, for tracing and metrics; what it raises is logged and ignored."""
    def on_dispatch_start(self, record: CallRecord) -> Any:
        """Called before the method; what it returns is handed to `on_dispatch_end`."""

    def on_dispatch_end(self, token: Any, record: CallRecord, error: BaseException | None) -> None:
        """Called after the last turn, with what the method raised."""

def _tell(hook: DispatchHook, event: str, *facts: Any) -> Any:
    try:
        return getattr(hook, event)(*facts)
    except BaseException:  # SystemExit too: a hook must not end the server
        logger.exception("%s of %r raised", event, hook)
        return None

class Caller(NamedTuple):
    """What a transport knows of the other side of a call."""
    kind: TransportKind = TransportKind.PIPE
    auth: AuthContext = _ANONYMOUS  # who calls
    remote_addr: str = ""  # peer address, empty for pipes
    metadata: Mapping[str, Any] = types.MappingProxyType({})  # further facts for ctx.transport_metadata
    gone: Callable[[], bool] | None = None  # whether the client has left; None when the transport cannot know
    response_limit_bytes: int | None = None  # what the caller accepts as one answer
    limits: Mapping[str, Limit] = types.MappingProxyType({})  # of server and transport, by name

class Turn(NamedTuple):
    """What one turn sends."""
    schema: pa.Schema  # of the batches
    items: list[tuple[pa.RecordBatch, Any]]  # logs, then data (also a `PlainBatch`), then an error; each with its metadata
    finished: bool  # whether nothing follows
    error: BaseException | None = None  # what was raised; its error batch is already the last of the items
    status: int = 200  # HTTP status of the answer

    @property
    def data_index(self) -> int | None:
        """Position of the data batch in `items`, ``None`` when the turn sent none."""
        if self.error is not None or not self.items:
            return None
        batch, metadata = self.items[-1]
        return len(self.items) - 1 if batch_kind(batch.num_rows, metadata) is BatchKind.DATA else None


class Call:
    """One call being served: `begin`, for a stream `turn` after `turn`, then `end`; used by one thread at a time."""
    def __init__(self, server: ServerCore, bound: BoundMethod, caller: Caller, request: Request | None,
                 request_id: str) -> None:
        self.server, self.bound, self.caller, self.request_id = server, bound, caller, request_id
        self.started, self._request = time.monotonic(), request
        self.stream: Stream[Any, Any] | None = None  # once `begin` returned one
        self.cancelled = False  # by the client
        self._messages: list[Message] = []
        self._error: BaseException | None = None
        timeout = request.timeout if request is not None else None
        # When the client stops waiting, in seconds of ``time.monotonic()``; over HTTP it is another one for each turn.
        self.deadline = None if timeout is None else self.started + timeout
        self._tokens = [_tell(hook, "on_dispatch_start", self.record) for hook in server._hooks]

    # Most calls have no hook that wants the record and no method that asks for the context: both are made when asked for.

    @functools.cached_property
    def context(self) -> CallContext:
        """What the method may ask."""
        info, hosted, caller = self.bound.info, self.bound.hosted, self.caller
        return CallContext(
            caller.auth, self._messages.append, self._transport_metadata, server_id=self.server.server_id,
            method_name=info.name, protocol_name=hosted.name, kind=caller.kind, implementation=hosted.implementation,
            request_id=self.request_id, deadline=self.deadline, response_limit_bytes=caller.response_limit_bytes,
            _gone=caller.gone, _limits=caller.limits)

    @functools.cached_property
    def record(self) -> CallRecord:
        """What hooks and the access log see."""
        info, hosted, caller, request = self.bound.info, self.bound.hosted, self.caller, self._request
        return CallRecord(
            hosted.name, hosted.hash, info.name, info.method_type.value, self.request_id, caller.kind, caller.auth,
            caller.remote_addr, self._transport_metadata, self.stream_id,
            request.schema if request is not None else None, request.rows if request is not None else 0)

    @functools.cached_property
    def _transport_metadata(self) -> dict[str, Any]:
        sent, where = self._request.metadata if self._request is not None else {}, self.caller.remote_addr
        traces = {key.decode(): sent[key].decode("utf-8", "replace") for key in TRACE_KEYS if key in sent}
        return {**self.caller.metadata, **traces, **({"remote_addr": where} if where else {})}

    @functools.cached_property
    def stream_id(self) -> str:
        """What all requests of one stream have in common in the access log."""
        return os.urandom(16).hex() if self.bound.info.method_type is MethodType.STREAM else ""

    def note(self, stream_id: str = "", **http: int) -> None:
        """Keep facts for the record: those of HTTP, and the id of a stream that other requests began."""
        self.stream_id = stream_id or self.stream_id
        if self._tokens:
            self.record.stream_id = self.stream_id
            self.record.http.update(http)

    def _logs(self, schema: pa.Schema, messages: Iterable[Message] = ()) -> list[tuple[pa.RecordBatch, Any]]:
        """Pending log lines as batches; the list is emptied."""
        taken = [*self._messages, *messages]
        if not taken:
            return []
        self._messages.clear()
        empty, request_id = empty_batch(schema), self.request_id
        return [(empty, _message_metadata(m, self.server.server_id, request_id)) for m in taken]

    def _failed(self, schema: pa.Schema, exc: BaseException, logs: Iterable[Message] = (), *, refused: bool = False) -> Turn:
        self._error = exc
        if not refused and not isinstance(exc, StatusError):
            logger.debug("%s.%s raised", self.bound.hosted.name, self.bound.info.name, exc_info=exc)
        items = [*self._logs(schema, logs), self.server.error_item(exc, schema, self.request_id)]
        return Turn(schema, items, True, exc, exc.http_status if refused and isinstance(exc, _Refusal) else 200)

    def _run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the application's code with this call as the current one; a deadline that has passed is an error."""
        token = _current_auth.set(self.caller.auth)
        try:
            result = function(*args, **kwargs)
        finally:
            _current_auth.reset(token)
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise DeadlineExceededError(f"{self.bound.info.name}(): the time that the client allowed has passed")
        return result

    def refuse(self, exc: BaseException) -> Turn:
        """Answer with an error without running the method."""
        return self._failed(EMPTY_SCHEMA if self.bound.info.header else self.bound.info.result_schema, exc, refused=True)

    def begin(self, arguments: dict[str, Any]) -> Turn:
        """Run the method and return a unary method's whole answer, or the header turn of a stream. That is logs and the header
        row; without a header no items and an empty schema, and the logs go with the first turn."""
        info, request = self.bound.info, self._request
        if type(request) is Request:
            self.server.remember(self.bound, request)
        if self._tokens and request is not None:
            self.record.statistics.input_batches += 1
            self.record.statistics.input_rows += request.rows
        if self.bound.context_parameter is not None:
            arguments = {**arguments, self.bound.context_parameter: self.context}
        try:
            result = self._run(self.bound.function, **arguments)
            if info.method_type is MethodType.UNARY:
                batch = result_batch(info, result)
                if self._tokens:
                    self.record.statistics.record_output(batch)
                return Turn(info.result_schema, [*self._logs(info.result_schema), (batch, None)], True)
            self.stream = self._checked_stream(result)
            if self.stream.call_state is not None:
                self._run(self.stream.state.bind_call_state, self.stream.call_state)
            if info.header is None:
                return Turn(EMPTY_SCHEMA, [], False)
            header = header_batch(info, self.stream.header)
            return Turn(header.schema, [*self._logs(header.schema), (header, None)], False)
        except BaseException as exc:  # SystemExit and KeyboardInterrupt raised by a method must not end the server
            self.stream = None
            return self._failed(info.result_schema, exc)

    def _checked_stream(self, value: Any) -> Stream[Any, Any]:
        where = f"{self.bound.info.name}() result: "
        if not isinstance(value, Stream):
            raise ParameterError(f"{where}expected a Stream, got {_got(value)}")
        for name, expected in (("state", StreamState), ("output_schema", pa.Schema), ("input_schema", pa.Schema)):
            if not isinstance(getattr(value, name), expected):
                raise ParameterError(f"{where}Stream.{name}: expected a {expected.__name__}, got {_got(getattr(value, name))}")
        return value

    def turn(self, given: AnnotatedBatch, *, conforms: bool = False) -> Turn:
        """Serve one turn of the stream on *given* (a tick for a producer), of which it may be known that it *conforms*."""
        stream = cast("Stream[Any, Any]", self.stream)
        schema, producer = stream.output_schema, stream.is_producer
        out = OutputCollector(schema, producer_mode=producer)
        if self._tokens:
            self.record.statistics.record_input(given.batch)
        try:
            if not producer and not conforms:
                batch = conform_batch(given.batch, stream.input_schema, f"{self.bound.info.name}() input", cast_values=True)
                given = given if batch is given.batch else AnnotatedBatch(batch, given.custom_metadata)
            context = self.context
            context.deadline = self.deadline
            self._run(stream.state.process, given, out, context)
            out.validate()
        except BaseException as exc:  # as in begin
            return self._failed(schema, exc, out.messages)
        items = self._logs(schema, out.messages)
        if out._data is not None:
            if self._tokens:
                self.record.statistics.record_output(out._data)
            items.append((out._data, out._metadata))
        return Turn(schema, items, out.finished)

    def cancel(self) -> None:
        """Tell the state, once, that the client has cancelled; what ``on_cancel`` raises is swallowed."""
        if self.cancelled or self.stream is None:
            return
        self.cancelled = True
        try:
            self._run(self.stream.state.on_cancel, self.context)
        except BaseException as exc:
            logger.debug("on_cancel of %s raised", self.bound.info.name, exc_info=exc)

    def end(self) -> None:
        """Report the call to the hooks and the access log."""
        if self._tokens:
            self.record.duration_ms, self.record.cancelled = (time.monotonic() - self.started) * 1000, self.cancelled
        for hook, token in zip(self.server._hooks, self._tokens):
            _tell(hook, "on_dispatch_end", token, self.record, self._error)


class ServerCore:
    """What an `RpcServer` is before it has a transport: the hosted protocols and the rules of calling them. Fixed at
    construction and safe for use by several threads. `protocol_name`, `protocol_version` (empty when there is none),
    `protocol_hash`, `implementation` and `methods` (by name) are those of the primary protocol."""
    def __init__(self, protocol: type, implementation: Any, *, extra_protocols: Sequence[tuple[type, Any]] = (),
                 server_id: str | None = None, server_version: str = "", enable_describe: bool = True,
                 ipc_validation: IpcValidation | None = None, include_tracebacks: bool = True,
                 max_request_bytes: int | None = None, max_rows: int | None = None) -> None:
        self.limits = IpcLimits(max_request_bytes, max_rows)
        self.server_id = server_id if server_id is not None else os.urandom(6).hex()
        self.server_version, self.describe_enabled = server_version, enable_describe
        self.ipc_validation, self.include_tracebacks = ipc_validation or IpcValidation.FULL, include_tracebacks
        self.services: dict[str, HostedService] = {}
        for cls, target in [(protocol, implementation), *extra_protocols]:
            service = bind_implementation(cls, target)
            if service.name.startswith(RESERVED_PROTOCOL_PREFIX):
                raise ValueError(f"protocol name {service.name!r}: the prefix {RESERVED_PROTOCOL_PREFIX!r} is reserved")
            if service.name in self.services:
                raise ValueError(f"protocol name {service.name!r} is given twice; names must be unique on a server")
            self.services[service.name] = service
        if enable_describe:
            self.services[REFLECTION_PROTOCOL] = bind_implementation(Reflection, self)
        for service in self.services.values():
            service.hash = protocol_hash(service.name, [m.info for m in service.methods.values()])
        self.primary = primary = next(iter(self.services.values()))
        self.protocol_name, self.protocol_version, self.protocol_hash = primary.name, primary.version, primary.hash
        self.implementation: Any = primary.implementation
        self.methods: Mapping[str, RpcMethodInfo] = {name: bound.info for name, bound in primary.methods.items()}
        self._hooks: list[DispatchHook] = []
        self._started: set[TransportKind] = set()
        self._known: dict[bytes, list[tuple[StreamLayout, BoundMethod]]] = {}  # by schema message: requests that were served
        self._lock, self._active, self.draining = threading.RLock(), 0, False
        self._state = threading.Condition(self._lock)

    def list_protocols(self) -> ProtocolList:
        """What reflection answers to ``list_protocols``."""
        hosted = [ProtocolSummary(s.name, s.version, s.hash) for s in self.services.values()]
        return ProtocolList(self.server_id, self.server_version, REQUEST_VERSION.decode(), hosted)

    def describe(self, protocol: str, ctx: CallContext) -> ProtocolDescription:
        """What reflection answers to ``describe``."""
        return describe_service(self.service(protocol), ctx._limits)

    def service(self, name: str) -> HostedService:
        """Return a hosted protocol; raises `ProtocolNotSupportedError`, which echoes *name* only if it may be a name."""
        if name not in self.services:
            text = "the protocol key does not hold a protocol name"
            if PROTOCOL_NAME_PATTERN.fullmatch(name):
                text = f"protocol {name!r} is not hosted{_suggest(name, self.services)}"
            raise ProtocolNotSupportedError(f"{text}; hosted: {list(self.services)}")
        return self.services[name]

    def method(self, service: HostedService, name: str) -> BoundMethod:
        """Return a method of a hosted protocol; raises `MethodNotImplementedError`, which lists those there are."""
        if name not in service.methods:
            shown, known = name if len(name) <= 255 and name.isprintable() else "…", sorted(service.methods)
            raise MethodNotImplementedError(f"{service.name} has no method {shown!r}{_suggest(shown, known)}; it has {known}")
        return service.methods[name]

    def resolve(self, request: Request, path: tuple[str, str] | None = None) -> BoundMethod:
        """Find the method that a request asks for; *path* is (protocol, method) where a URL names them, too. Raises
        `VersionError` or `ProtocolError` for a version, protocol or method that is absent, not ours, or not the path's."""
        self.check_wire_version(request.metadata)
        protocol, name = request.text(PROTOCOL_KEY, "the protocol"), request.text(METHOD_KEY, "the method name")
        if path is not None:
            if protocol not in (None, path[0]):
                exc = ProtocolNotSupportedError(f"the path says protocol {path[0]!r}, the request says another one")
                exc.http_status = 400
                raise exc
            if name != path[1]:
                got = f"{name!r:.100}" if name else "none"
                raise ProtocolError(f"the path says method {path[1]!r}, the request says {got}")
            protocol = path[0]
        if not protocol:
            hosted = list(self.services)
            raise ProtocolNotSpecifiedError(f"the request has no {PROTOCOL_KEY.decode()!r} key; this server hosts {hosted}")
        service = self.service(protocol)
        if not name:
            raise ProtocolError(f"the request has no {METHOD_KEY.decode()!r} key: it must name its method")
        bound = self.method(service, name)
        self._check_protocol_version(service, request)
        return bound

    def remember(self, bound: BoundMethod, request: Request) -> None:
        """Recognise requests like this one, which was found good, from now on. Bounded; safe between threads."""
        known = self._known.get(request.schema_message, [])
        layout = request.layout() if len(known) < 16 else None
        # One that is known comes here, too, when it was not there as a whole or is too long to be looked for.
        if layout is not None and all(layout.shape != other.shape for other, _ in known):
            if len(self._known) >= 512:
                self._known.clear()
            self._known[request.schema_message] = [(layout, bound), *known]

    def recall(self, data: bytes, at: int) -> tuple[BoundMethod, KnownRequest, int] | None:
        """Read a request that stands in *data* from *at* on; return its method, the request and where it ends. ``None`` when
        none like it was served, or it is not there to its end: then it goes the ordinary way."""
        if len(data) - at < 8:
            return None
        schema_message = data[at : at + 8 + struct.unpack_from("<i", data, at + 4)[0]]
        most = self.limits.max_bytes
        for layout, bound in self._known.get(schema_message, ()):
            found = layout.read(data, at)
            if found is not None and (most is None or found[1] - at <= most):
                return bound, KnownRequest(bound, layout, found[0]), found[1]
        return None

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
        if wanted is None or got == wanted:
            return
        said = raw if got else f"sent {raw[:60]!r}, which is not MAJOR.MINOR.PATCH" if raw else "sent no version"
        text = f"protocol {service.name}: the server speaks {service.version}, the client {said}; upgrade the "
        text += "server" if got and got > wanted else "client"
        raise ProtocolVersionError(text, protocol=service.name, client_version=raw[:60], server_version=service.version)

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
        """Call the implementations' ``on_serve_start`` once per kind of transport. Raises `StatusError` (UNAVAILABLE) when one
        fails; the next request asks again."""
        if kind in self._started:
            return
        with self._state:
            for service in self.services.values() if kind not in self._started else ():
                hook = getattr(service.implementation, "on_serve_start", None)
                try:
                    if callable(hook):
                        hook(kind)
                except BaseException as exc:
                    logger.exception("on_serve_start(%s) of %s raised", kind, service.name)
                    raise StatusError(f"{service.name} could not start: {_text_of(exc)}", code=Code.UNAVAILABLE) from exc
            self._started.add(kind)

    def __enter__(self) -> ServerCore:
        """Count the work inside ``with server`` as running, so that `drain` waits for it."""
        with self._lock:
            self._active += 1
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._active -= 1
            if self.draining:
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

    def add_hook(self, hook: DispatchHook) -> None:
        """Have *hook* called at the start and the end of each call, after those added before it."""
        self._hooks.append(hook)


class AccessLog:
    """A dispatch hook that writes one JSON line per call (WIRE section 11) to a text file: never a payload, value or token.
    Lines are written whole, by any thread."""
    def __init__(self, server: ServerCore, stream: typing.TextIO) -> None:
        self._server, self._stream, self._lock = server, stream, threading.Lock()

    def on_dispatch_start(self, record: CallRecord) -> None:
        """Nothing is written before the end."""

    def on_dispatch_end(self, token: Any, record: CallRecord, error: BaseException | None) -> None:
        """Write the line."""
        text = json.dumps(self._line(record, error), ensure_ascii=False) + "\n"
        with self._lock:
            self._stream.write(text)
            self._stream.flush()

    def _line(self, record: CallRecord, error: BaseException | None) -> dict[str, Any]:
        now, status = time.time(), "error" if error else "ok"
        line: dict[str, Any] = {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z",
            "level": "INFO", "logger": "vgi_rpc.access", "message": f"{record.protocol}.{record.method} {status}",
            "server_id": self._server.server_id, "protocol": record.protocol, "protocol_hash": record.protocol_hash,
            "method": record.method, "method_type": record.method_type,
            "principal": record.auth.principal or "", "auth_domain": record.auth.domain or "",
            "authenticated": record.auth.authenticated, "remote_addr": record.remote_addr,
            "duration_ms": round(record.duration_ms, 3), "status": status,
            "error_type": _error_type_of(error) if error else "", "request_id": record.request_id, **record.http,
        }
        if error is not None:
            line.update(error_message=_text_of(error)[:1000], error_code=_error_code_of(error).value)
        if record.stream_id:
            line["stream_id"] = record.stream_id
            line.update({"cancelled": True} if record.cancelled else {})
        if record.request_schema is not None:
            line["request_fields"] = [{"name": f.name, "type": str(f.type)} for f in record.request_schema]
            line["request_rows"] = record.request_rows
        return {**line, **dataclasses.asdict(record.statistics)}

def configure_access_log(path: str, server: ServerCore) -> None:
    """Append one JSON line per call of *server* to *path* (else `OSError`); ``-`` is standard error. The file stays open."""
    stream = sys.stderr if path == "-" else open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    server.add_hook(AccessLog(server, stream))


# ============================================================================
# 13. BYTE TRANSPORTS .................................. uses 1-12
# ============================================================================
# Pipes and sockets as byte channels: exact reads, whole writes, deadlines, hang-up. The shells under which everything
# above runs. Law: a short read or write is continued, a failure leaves as TransportError, a deadline as DeadlineExceededError.

_RECEIVE_BYTES = 65_536
_PIPE_BYTES = 262_144  # of a pipe's buffer, where we may choose: more than that falls out of the processor's cache
_MAX_PIECES = 512  # per writev(2); POSIX allows 1024 on every system we know
_MAX_IO_BYTES = 1 << 30  # per system call: some systems, and TLS, refuse 2 GiB and more
_MAX_POLL_SECONDS = 1e6  # poll(2) counts milliseconds in an int
_TOO_LATE = "no answer within the time allowed"

def _ready(fd: int, event: str, seconds: float = 0.0) -> bool:
    """Whether the poll(2) *event*, a hang-up or a failure comes within *seconds*."""
    import select
    poll = select.poll()
    poll.register(fd, getattr(select, event, 0))
    return bool(poll.poll(int(min(seconds, _MAX_POLL_SECONDS) * 1000)))


class ByteChannel(ByteSource):
    """One connection: bytes in, bytes out. Used by one thread at a time; `close` may come from any."""
    def __init__(self) -> None:
        self._buffer, self._at = b"", 0
        self.deadline: float | None = None  # ``time.monotonic()`` seconds at which reads and writes give up
        self.gap: float | None = None  # seconds that a single wait may take at most
        self.ended = False  # whether the peer has closed its side
        self._watch: Any = None  # for `peer_gone`, made when it is first asked

    # Seconds that a reader of a large body rests after a short read, once there were many: one that is as fast as its writer
    # is waked for every few pages of it, and on a virtual machine that takes ten times as long as to copy them.
    _pause = 0.0

    # What a kind of channel provides.
    fileno: Callable[[], int]  # the descriptor that is read from, -1 once closed
    close: Callable[[], None]  # both directions; may be called twice
    _receive: Callable[[int], bytes]
    _receive_into: Callable[[memoryview], int]
    _send: Callable[[Sequence[_Buffer]], int]

    def peer_gone(self) -> bool:
        """Whether the other side has hung up; may be asked by any thread."""
        try:
            if self._watch is None:
                import select
                self._watch = select.poll()
                self._watch.register(self.fileno(), select.POLLRDHUP)
            return self.fileno() < 0 or bool(self._watch.poll(0))
        except RuntimeError:  # another thread asks at this moment, and will know
            return False
        except (OSError, ValueError, AttributeError):
            return True

    def _time_left(self) -> float | None:
        """Seconds that a wait may take, ``None`` for any; raises `DeadlineExceededError` at the deadline."""
        if self.deadline is None:
            return self.gap
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceededError(_TOO_LATE)
        return left if self.gap is None else min(left, self.gap)

    def _fill(self, size: int = _RECEIVE_BYTES) -> bool:
        """Receive up to *size* more bytes into the buffer; ``False`` at the end."""
        piece = self._receive(size)
        self._buffer, self._at = self._buffer[self._at :] + piece, 0
        self.ended = self.ended or not piece
        return bool(piece)

    def read(self, size: int) -> bytes:
        if size > _RECEIVE_BYTES:
            return bytes(self.read_after(b"", size))
        while self._at + size > len(self._buffer) and self._fill():
            pass
        piece = self._buffer[self._at : self._at + size]
        self._at += len(piece)
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
        short = 0
        while filled < len(view):
            got = self._receive_into(view[filled : filled + _MAX_IO_BYTES])
            if not got:
                self.ended = True
                return whole.slice(0, filled)
            filled += got
            short += got < SMALL_BODY_BYTES
            if short > 16 and got < SMALL_BODY_BYTES and self._pause:
                time.sleep(self._pause)
        return whole

    def read_known(self, head: bytes, size: int) -> _Buffer | None:
        if self._at == len(self._buffer):  # without a large body, which is then received in its place
            self._fill(_RECEIVE_BYTES if size <= _RECEIVE_BYTES else len(head))
        if not self._buffer.startswith(head, self._at):
            return None
        start, self._at = self._at, self._at + len(head)
        if self._at + size > len(self._buffer):
            return self.read_after(head, size)
        self._at += size
        return self._buffer[start : self._at]

    def read_some(self, size: int) -> bytes:
        """Read 1 to *size* bytes, as they come; none only where the source ends."""
        if self._at == len(self._buffer) and not self._fill():
            return b""
        piece = self._buffer[self._at : self._at + size]
        self._at += len(piece)
        return piece

    def read_into(self, view: memoryview) -> int:
        """As `read_some`, into the beginning of *view*; return how many came."""
        if self._at == len(self._buffer):
            return self._receive_into(view)
        piece = self.read_some(len(view))
        view[: len(piece)] = piece
        return len(piece)

    def read_until(self, marker: bytes, limit: int, size: int = _RECEIVE_BYTES) -> bytes | None:
        """Read to and with *marker*; ``None`` if the source ends or *limit* bytes pass before it comes. Up to *size* bytes are
        received at a time."""
        seen = self._at
        while True:
            found = self._buffer.find(marker, max(self._at, seen - len(marker)))
            if found >= 0:
                return self.read(found + len(marker) - self._at)
            seen = len(self._buffer) - self._at
            if seen >= limit or not self._fill(size):
                return None

    def peek(self) -> bytes:
        """Return what has been received and not read."""
        return self._buffer[self._at :]

    def received(self) -> tuple[bytes, int]:
        """Wait until there is something to read, or the end; return what was received, and where its unread part begins."""
        if self._at == len(self._buffer):
            self._fill()
        return self._buffer, self._at

    def skip_to(self, end: int) -> None:
        """Count what `received` returned as read up to *end*."""
        self._at = end

    def write(self, pieces: Sequence[_Buffer]) -> None:
        """Write all of *pieces*, in order; large ones are not copied."""
        size = len(pieces[0]) if len(pieces) == 1 else sum(map(len, pieces))
        if size <= SMALL_BODY_BYTES and len(pieces) > 1:
            pieces = [b"".join(pieces)]
        sent = self._send(pieces[:_MAX_PIECES]) if 0 < size <= _MAX_IO_BYTES else 0
        views = [memoryview(p).cast("B") for p in pieces if len(p)] if sent < size else []
        while views:
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if views:
                views[0] = views[0][sent:]
                sent = self._send(views[:_MAX_PIECES])

def _lost(exc: BaseException) -> TransportError:
    return TransportError(f"connection lost: {getattr(exc, 'strerror', None) or _text_of(exc)}")


class FdChannel(ByteChannel):
    """A channel over two file descriptors, which it owns."""
    _pause = 2e-4

    def __init__(self, read_fd: int, write_fd: int) -> None:
        super().__init__()
        self.read_fd, self.write_fd = read_fd, write_fd  # -1 once closed: the number may then be somebody else's
        if sys.platform == "linux":
            import fcntl
            with contextlib.suppress(OSError, ValueError):  # not a pipe, or the user's share of pipe memory is used up
                fcntl.fcntl(write_fd, 1031, _PIPE_BYTES)  # F_SETPIPE_SZ, which Python 3.10 does not name
        self._blocking = True
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self.read_fd

    def _io(self, side: str, call: Callable[..., _T], argument: Any) -> _T:
        while True:
            try:
                if self.deadline is not None or not self._blocking:
                    self._wait(side)
                return call(getattr(self, side), argument)
            except BlockingIOError:
                continue
            except (OSError, ValueError) as exc:
                raise _lost(exc) from None

    def _wait(self, side: str) -> None:
        """Wait until one side is ready, when there is a limit on waiting; a plain blocking call needs no wait."""
        left = self._time_left()
        if self._blocking != (left is None):
            self._blocking = left is None
            for fd in (self.read_fd, self.write_fd):
                os.set_blocking(fd, self._blocking)
        event = "POLLIN" if side == "read_fd" else "POLLOUT"
        if left is not None and not _ready(getattr(self, side), event, max(0.001, left)):
            raise DeadlineExceededError(_TOO_LATE)

    def _receive(self, size: int) -> bytes:
        return self._io("read_fd", os.read, size)

    def _receive_into(self, view: memoryview) -> int:
        return self._io("read_fd", os.readv, [view])

    def _send(self, pieces: Sequence[_Buffer]) -> int:
        if len(pieces) == 1 or not hasattr(os, "writev"):
            return self._io("write_fd", os.write, pieces[0][:_MAX_IO_BYTES])
        return self._io("write_fd", os.writev, pieces)

    def close(self) -> None:
        with self._lock:
            fds, self.read_fd, self.write_fd = {self.write_fd, self.read_fd}, -1, -1
        for fd in fds - {-1}:
            os.close(fd)


class SocketChannel(ByteChannel):
    """A channel over a connected stream socket, plain or TLS, which it owns."""
    def __init__(self, connected: socket.socket) -> None:
        super().__init__()
        self.socket = connected
        self._gather = not hasattr(connected, "pending") and hasattr(connected, "sendmsg")  # TLS sockets cannot gather
        self._timeout: float | None = connected.gettimeout()
        with contextlib.suppress(OSError):  # the peer has gone already
            if connected.family != getattr(socket, "AF_UNIX", None) and connected.getpeername()[0] in ("127.0.0.1", "::1"):
                # Buffers of megabytes are for long ways; within one machine they only fall out of the processor's cache.
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PIPE_BYTES // 2)  # which Linux doubles

    def fileno(self) -> int:
        return self.socket.fileno()

    def _io(self, call: Callable[..., _T], argument: Any) -> _T:
        try:
            left = self._time_left()
            if left is not None or self._timeout is not None:
                self._timeout = left
                self.socket.settimeout(left)
            return call(argument)
        except (OSError, ValueError) as exc:
            if isinstance(exc, TimeoutError) and exc.errno is None:  # with an errno it is the network's: a lost connection
                raise DeadlineExceededError(_TOO_LATE) from None
            raise _lost(exc) from None

    def _receive(self, size: int) -> bytes:
        return self._io(self.socket.recv, size)

    def _receive_into(self, view: memoryview) -> int:
        return self._io(self.socket.recv_into, view)

    def _send(self, pieces: Sequence[_Buffer]) -> int:
        if self._gather and len(pieces) > 1:
            return self._io(self.socket.sendmsg, pieces)
        return self._io(self.socket.send, pieces[0][:_MAX_IO_BYTES])

    def close(self) -> None:
        with contextlib.suppress(OSError), self.socket:
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits in it, which close alone does not


class Transport:
    """A byte channel with a name and an owner: what `RpcConnection` and `RpcServer.serve` take."""
    peer = "the server"  # how error texts call the other side
    stray = False  # an input stream was sent that a refusing server may have taken for a request

    def __init__(self, channel: ByteChannel, kind: TransportKind, remote_addr: str = "", **limits: float | None) -> None:
        self.channel, self.kind, self.remote_addr = channel, kind, remote_addr
        self.limits = limits  # of the listener that it came by, as `describe` shows them

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
    """Two binary file objects that have a descriptor each and nothing buffered; closing the transport closes both."""
    def __init__(self, reader: Any, writer: Any) -> None:
        self.reader, self.writer = reader, writer
        fds = reader.fileno(), writer.fileno()
        super().__init__(FdChannel(*map(os.dup, fds)), TransportKind.PIPE)

    def close(self) -> None:
        super().close()
        for f in (self.writer, self.reader):
            with contextlib.suppress(OSError, ValueError):
                f.close()

def _channel_pair() -> tuple[FdChannel, FdChannel]:
    """Two channels, each of which reads what the other writes. The second one writes, as a worker to its stdout, to a socket:
    Linux copies through one with less ado than through a pipe. A worker's stdin stays a pipe; a shell looks for that."""
    reads, writes = socket.socketpair()
    with reads, writes:  # unless they are detached
        with contextlib.suppress(OSError):
            writes.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PIPE_BYTES // 2)  # which Linux doubles
        far_end, near_end = os.pipe()
        return FdChannel(reads.detach(), near_end), FdChannel(far_end, writes.detach())

def make_pipe_pair() -> tuple[Transport, Transport]:
    """Return two connected transports over a pair of pipes; the caller closes both."""
    near, far = (Transport(channel, TransportKind.PIPE) for channel in _channel_pair())
    return near, far

class StderrMode(enum.Enum):
    """Where a worker's standard error goes."""
    INHERIT = "inherit"  # to ours; the last lines are also kept for error texts
    PIPE = "pipe"  # to a logger
    DEVNULL = "devnull"


class SubprocessTransport(Transport):
    """Starts a worker, without a shell, and talks to it over its stdin and stdout. *stderr_logger* is for ``StderrMode.PIPE``;
    default ``vgi_rpc.worker``. Raises `TransportError` when the program cannot be started, `TypeError` when *cmd* is one
    string."""
    idle_since = 0.0  # of `time.monotonic`, for a `WorkerPool`

    def __init__(self, cmd: Sequence[str], *, stderr: StderrMode = StderrMode.INHERIT,
                 stderr_logger: logging.Logger | None = None) -> None:
        import subprocess
        if isinstance(cmd, (str, bytes)):
            raise ParameterError(f"cmd: expected a list of program and arguments, got {cmd!r}; shlex.split makes one of it")
        self.command = list(cmd)
        self.peer = f"worker {self.command!r}"
        self._lines: deque[str] = deque(maxlen=20)
        log = (stderr_logger or logging.getLogger("vgi_rpc.worker")) if stderr is StderrMode.PIPE else None
        self._pump = threading.Thread(target=self._forward_stderr, args=(log,), daemon=True, name="vgi_rpc stderr")
        target = subprocess.DEVNULL if stderr is StderrMode.DEVNULL else subprocess.PIPE
        channel, theirs = _channel_pair()
        super().__init__(channel, TransportKind.PIPE)
        with _opening(f"{self.peer} cannot be started", IndexError, TypeError) as opened:
            opened.callback(channel.close)
            with contextlib.closing(theirs):
                self.proc = subprocess.Popen(self.command, stdin=theirs.read_fd, stdout=theirs.write_fd, stderr=target)
            opened.callback(self.abort)
            self._pump.start()

    def _forward_stderr(self, log: logging.Logger | None) -> None:
        source = self.proc.stderr
        if source is None:
            return
        with contextlib.suppress(OSError, ValueError), source:
            for raw in iter(lambda: source.readline(_RECEIVE_BYTES), b""):
                line = raw.decode("utf-8", "replace")
                self._lines.append(line.rstrip())
                if log is not None:
                    log.info("%s", line.rstrip())
                    continue
                with contextlib.suppress(OSError, ValueError, AttributeError):  # a program may have no stderr
                    sys.stderr.write(line)
                    sys.stderr.flush()

    def obituary(self) -> str:
        import subprocess
        try:
            status = self.proc.wait(1.0)
            self._pump.join(1.0)
            ending = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        except subprocess.TimeoutExpired:
            ending = "closed its stdout but still runs"
        said = "".join(f"\n  {line}" for line in list(self._lines)[-5:])
        return f"{self.peer} {ending}" + (f"; its last lines on stderr:{said}" if said else "")

    def close(self, patience: float = WORKER_EXIT_SECONDS) -> None:
        """Close the pipes and reap the worker: it has *patience* seconds to leave, then it is terminated, then killed."""
        import subprocess
        self.channel.close()
        for act, wait in ((self.proc.poll, patience), (self.proc.terminate, 1.0), (self.proc.kill, 10.0)):
            act()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.proc.wait(wait)
                break
        if self._pump.ident is not None:
            self._pump.join(1.0)  # not for ever: a grandchild may hold the worker's stderr open

    def abort(self) -> None:
        self.close(0.0)

@contextlib.contextmanager
def _opening(failure: str, *errors: type[Exception]) -> Iterator[contextlib.ExitStack]:
    """Turn failures, also the further *errors*, into `TransportError`, and close what the stack was given."""
    failures: tuple[type[Exception], ...] = (OSError, ValueError, OverflowError, *errors)
    with contextlib.ExitStack() as opened:
        try:
            yield opened
        except failures as exc:
            raise TransportError(f"{failure}: {_text_of(getattr(exc, 'strerror', None) or exc)}") from None
        opened.pop_all()

def connect_unix_socket(path: str, timeout: float | None = None) -> Transport:
    """Connect to a Unix socket; *timeout* in seconds. Raises `TransportError`."""
    with _opening(f"cannot connect to unix:{path}") as opened:
        connected = opened.enter_context(socket.socket(socket.AF_UNIX))
        connected.settimeout(timeout)
        connected.connect(path)
        connected.settimeout(None)
    return Transport(SocketChannel(connected), TransportKind.UNIX, f"unix:{path}")

def connect_tcp_socket(host: str, port: int, timeout: float | None = None, tls_context: ssl.SSLContext | None = None,
                       server_hostname: str | None = None) -> socket.socket:
    """Connect to host and port, with TLS if there is a context; *timeout* in seconds. Raises `TransportError`."""
    with _opening(f"cannot connect to {host}:{port}") as opened:
        connected = opened.enter_context(socket.create_connection((host, port), timeout=timeout))
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls_context is not None:
            connected = opened.enter_context(tls_context.wrap_socket(connected, server_hostname=server_hostname or host))
        connected.settimeout(None)
    return connected


# ============================================================================
# 14. CLIENT ........................................... uses 1-13
# ============================================================================
# One proxy class and one StreamSession over a small interface with two implementations: byte streams here, HTTP in 17.
# Law: an argument that does not fit fails before a byte is sent; after any error that was an answer the connection
# serves the next call; after any other error it is closed, and says so.


@dataclass(frozen=True)
class CallOptions:
    """How one proxy calls. Raises `ValueError` for a timeout or prefetch that is none."""
    on_log: ClientLog | None = None  # takes the server's log lines; ``None`` drops them
    timeout: float | None = None  # seconds per call or turn, ``None`` for no limit
    ipc_validation: IpcValidation = IpcValidation.FULL  # how much of each answer is checked
    version: str = ""  # the protocol's, sent with each request
    prefetch: int | None = None  # turns that iteration asks for at a time; 1 for lockstep, None for what suits the transport

    def __post_init__(self) -> None:
        if self.prefetch is not None and self.prefetch < 1:
            raise ValueError(f"prefetch: expected 1 or more, or None for the default, got {self.prefetch!r}")
        if self.timeout is not None and not 0 < self.timeout <= threading.TIMEOUT_MAX:
            raise ValueError(f"timeout: expected seconds above 0, or None for no limit, got {self.timeout!r}")

    @property
    def deadline(self) -> float | None:
        """When a call that begins now must have ended."""
        return None if self.timeout is None else time.monotonic() + self.timeout


class ReplyItem(NamedTuple):
    """A batch of an answer that is not a log or an error."""
    kind: BatchKind
    reader: IpcReader
    message: BatchMessage

    @property
    def metadata(self) -> dict[bytes, bytes]:
        """Metadata of its message."""
        return self.message.head.metadata or {}

    def annotated(self) -> AnnotatedBatch:
        """Return it as the user sees it: decoded, without the state tokens."""
        batch, shown = self.reader.decode(self.message), self.message.head.metadata
        if shown:
            shown = {k: v for k, v in shown.items() if k not in (STATE_KEY, CALL_STATE_KEY)}
        return AnnotatedBatch(batch, pa.KeyValueMetadata(shown) if shown else None)

def next_reply_item(reader: IpcReader, options: CallOptions) -> ReplyItem | None:
    """Read on to the next data or token batch, passing logs to ``on_log``; ``None`` at the end marker. Raises the `RpcError`
    that the answer is, with the reader behind its batch; `IPCError` when the bytes are no answer."""
    while (message := reader.next_message()) is not None:
        metadata = message.head.metadata or {}
        kind = batch_kind(message.head.rows, message.head.metadata)
        if kind is BatchKind.ERROR:
            raise _error_from_metadata(metadata)
        if kind in (BatchKind.LOCATION, BatchKind.SHM):
            where = "external storage" if kind is BatchKind.LOCATION else "shared memory that this client did not offer"
            raise IPCError(f"the answer points to {where}, which this client does not read")
        if kind is not BatchKind.LOG:
            return ReplyItem(kind, reader, message)
        if options.on_log is not None:
            try:
                options.on_log(_message_from_metadata(metadata))
            except Exception:
                logger.exception("on_log raised; the call goes on")
    return None

def answer_call(call: Callable[..., _T], *args: Any) -> _T:
    """Read from an answer that is there as a whole: bytes in it that are not Arrow are the transport's failure."""
    try:
        return call(*args)
    except (IPCError, EOFError) as exc:
        raise TransportError(f"the answer is not what it should be: {_text_of(exc) or 'it is empty'}") from None

class ClientStream:
    """One stream as a client holds it; the interface under `StreamSession`."""
    header: Any = None  # the header row's batch, ``None`` when the method declares none
    done = False  # whether nothing more can be sent or read
    cut_off = ""  # why it ended, when that was neither its own end nor asked for

    turn: Callable[[AnnotatedBatch], AnnotatedBatch | None]  # sends a batch for an answer; ``None``: the stream has finished
    close: Callable[[], None]  # ends the stream; the connection stays usable
    cancel: Callable[[], None]  # as `close`, and has the state's ``on_cancel`` run

    def next(self) -> AnnotatedBatch | None:
        """Return the answer to a tick without metadata, which may have been asked for ahead; else as `turn`."""
        return self.turn(_PLAIN_TICK)

    def token(self) -> bytes:
        """Return what `resume` needs."""
        raise RpcError("ProtocolError", "only streams over HTTP can be resumed: else the state stays with the connection", "")

    def restore(self, token: bytes) -> None:
        """Take over what `token` saved."""
        self.token()

class ClientChannel:
    """How calls reach a server; the interface under a proxy."""
    unary: Callable[[RpcMethodInfo, pa.RecordBatch, CallOptions], Any]  # calls a method and returns its result
    stream: Callable[[RpcMethodInfo, pa.RecordBatch, CallOptions], ClientStream]
    close: Callable[[], None]  # gives back connections

    def resume(self, info: RpcMethodInfo, token: bytes, options: CallOptions) -> ClientStream:
        """Go on with a stream from a saved token."""
        raise RpcError("ProtocolError", "only streams over HTTP can be resumed", "")

_PLAIN_TICK = AnnotatedBatch(_TICK)

def _tick(metadata: pa.KeyValueMetadata | Mapping[bytes, bytes] | None) -> AnnotatedBatch:
    if metadata is not None and not isinstance(metadata, pa.KeyValueMetadata):
        metadata = pa.KeyValueMetadata(dict(metadata))
    return AnnotatedBatch(_TICK, metadata)


class StreamSession:
    """A running stream, on the client: iterate over a producer, `exchange` with an exchange. Also a context manager, which
    closes the stream. Not for use by several threads at once."""
    def __init__(self, stream: ClientStream, info: RpcMethodInfo) -> None:
        self._stream, self._info = stream, info
        self.header: Any = None  # ``None`` when the method declares none
        if stream.header is not None and info.header is not None:
            try:
                self.header = info.header.from_batch(stream.header)
            except _Mismatch as exc:
                self.close()
                raise exc.error(f"{info.name}() header") from None

    def typed_header(self, header_type: type[_T]) -> _T:
        """Return the header as *header_type*; raises `TypeError` when there is none, or one of another type."""
        if not isinstance(self.header, header_type):
            raise ParameterError(f"{self._info.name}() header: expected {header_type.__name__}, got {_got(self.header)}")
        return self.header

    def _turn(self, given: AnnotatedBatch | None) -> AnnotatedBatch | None:
        if self._stream.done:
            raise RpcError("ProtocolError", f"the stream of {self._info.name}() {self._stream.cut_off or 'is closed'}", "")
        return self._stream.next() if given is None else self._stream.turn(given)

    def __iter__(self) -> Iterator[AnnotatedBatch]:
        """Yield each batch of a producer until it finishes. While batches come quickly, some are asked for ahead: a producer
        then runs further than was read, by at most `MAX_PREFETCH` turns on a byte stream and `MAX_TURNS` over HTTP.
        ``with_options(proxy, prefetch=1)`` switches that off, for a producer with side effects. `tick` and `exchange` never ask
        ahead; a `tick` after an iteration first gets the batches that this one had asked for, and its metadata reaches the
        state on the turn behind them. Raises `RpcError` when a turn failed, or another call ended the stream; the connection
        serves the next call."""
        while (not self._stream.done or self._stream.cut_off) and (answer := self._turn(None)) is not None:
            yield answer

    def tick(self, custom_metadata: pa.KeyValueMetadata | Mapping[bytes, bytes] | None = None) -> AnnotatedBatch:
        """Ask a producer for one batch; its state sees the metadata. Raises `StopIteration` at the end, `RpcError`."""
        if (answer := self._turn(_tick(custom_metadata))) is None:
            raise StopIteration
        return answer

    def exchange(self, input: AnnotatedBatch) -> AnnotatedBatch:
        """Send a batch and return the answer. Raises `RpcError`; `TypeError` for what is no batch."""
        where = f"{self._info.name}() exchange: expected"
        if not isinstance(input, AnnotatedBatch):
            raise ParameterError(f"{where} an AnnotatedBatch, got {_got(input)}; wrap it: AnnotatedBatch(batch)")
        if not isinstance(input.batch, pa.RecordBatch):
            raise ParameterError(f"{where} a pyarrow.RecordBatch in the AnnotatedBatch, got {_got(input.batch)}")
        if (answer := self._turn(input)) is None:
            raise RpcError("ProtocolError", f"{self._info.name}() finished instead of answering", "")
        return answer

    def token(self) -> bytes:
        """Return what `resume` needs to go on behind the last batch handed out; HTTP only. It is signed, and readable."""
        return self._stream.token()

    def next_with_token(self, custom_metadata: pa.KeyValueMetadata | None = None) -> tuple[AnnotatedBatch | None, bytes | None]:
        """Ask a producer for one batch; return it with the `token` behind it. ``None`` stands for what there is not."""
        answer = None if self.closed else self._turn(_tick(custom_metadata))
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

def _was_answer(exc: RpcError) -> bool:
    """Whether the server sent this error: one made on this side is local and has no request id."""
    return not isinstance(exc, _LocalError) or bool(exc.request_id)


class ByteClient(ClientChannel):
    """Calls over one byte stream, one at a time; safe for use by several threads, which take turns."""
    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._lock = threading.RLock()  # knows whose it is; `exclusive` does not let a thread take it twice
        self._caller = 0  # the thread that holds the lock
        self._open: _ByteClientStream | None = None
        self._broken = ""  # why the connection is closed
        self._between = False  # whether a stream is expected next: what comes else is text that something printed

    def exclusive(self, deadline: float | None) -> ByteClient:
        """Take the connection for a ``with`` block; in it, whatever is not an answer breaks the connection for good. Raises
        `DeadlineExceededError` when other threads held it for too long (it stays usable), `RpcError` when this thread holds it:
        ``on_log`` calls back."""
        me = threading.get_ident()
        if self._caller == me:
            raise RpcError("ProtocolError", "a call is running on this connection: on_log cannot make another one on it", "")
        left = -1.0 if deadline is None else min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
        try:
            if not self._lock.acquire(timeout=left):
                raise DeadlineExceededError(f"{_TOO_LATE}: calls of other threads use the connection")
            if self._broken:
                raise TransportError(f"the connection is closed: {self._broken}")
            self._caller, self.transport.channel.deadline = me, deadline
            return self
        except BaseException:  # an interrupt, too, which may come when the lock was taken and nothing after it was done
            if self._lock._is_owned():  # type: ignore[attr-defined]
                self._caller = 0
                self._lock.release()
            raise

    # The connection was taken by `exclusive` already. Not of Python's making: a signal is not handled before the block is entered.
    __enter__ = bool

    def __exit__(self, kind: Any, exc: BaseException | None, trace: object) -> None:
        try:
            if exc is None or isinstance(exc, ParameterError) or (isinstance(exc, RpcError) and _was_answer(exc)):
                return  # before a byte was sent, or after a whole answer
            lost = self._break(exc)
            if isinstance(exc, (EOFError, _Refusal, RpcError)):
                raise lost from None
            # Else it was interrupted in the middle of an exchange: nobody knows where the bytes stand.
        finally:
            self._caller = 0
            self._lock.release()

    def _break(self, exc: BaseException) -> RpcError:
        stray = self._stray_text(isinstance(exc, TransportError))
        if isinstance(exc, DeadlineExceededError):
            error: RpcError = exc
        elif stray:
            error = TransportError(f"expected Arrow IPC, got text: {stray!r} ({self.transport.peer} prints to the channel)")
        elif isinstance(exc, (EOFError, TransportError)) or (self.transport.channel.ended and isinstance(exc, _Refusal)):
            error = TransportError(self.transport.obituary())
        elif isinstance(exc, _Refusal):
            error = TransportError(f"not an answer: {_text_of(exc)}")
        else:
            error = TransportError(f"a call was interrupted by {type(exc).__name__}")
        self._broken = self._broken or error.error_message.partition("\n")[0]
        if self._open is not None and not self._open.done:
            self._open.done, self._open.cut_off = True, f"was cut off: {self._broken}"
        self.transport.abort()
        return error

    def _end_open(self, why: str) -> None:
        """End the stream that was left open, if one was."""
        if self._open is not None and not self._open.done:
            self._open.cut_off = why
            self._open.finish()
        self._open = None

    def _stray_text(self, lost: bool) -> str:
        """What a worker printed, as text, when that is what came instead of a stream."""
        channel = self.transport.channel
        if not self._between:
            return ""
        if lost:  # it may have gone before our request was written, and left its text in the pipe
            channel.deadline = time.monotonic() + 1.0
            with contextlib.suppress(RpcError):
                channel._fill()
        start = max(0, channel._at - 8)  # eight bytes were taken for the prefix of a message
        seen = channel._buffer[start : start + 200]
        printed = all(32 <= b < 127 or b in b"\r\n\t\x1b" for b in seen[:8])
        return seen.decode("utf-8", "replace").strip() if printed else ""

    def open_reply(self, request_id: str, options: CallOptions) -> tuple[IpcReader, ReplyItem | None]:
        """Open the next answer and read its first item, past the answer that a refused stream's input may have earned. Raises
        the `RpcError` that the answer is, which was then read to its end."""
        while True:
            reader = IpcReader(self.transport.channel, validation=options.ipc_validation)
            self._between = False
            stray, self.transport.stray = self.transport.stray, False
            try:
                return reader, next_reply_item(reader, options)
            except RpcError as exc:
                if not _was_answer(exc):
                    raise
                reader.read_to_end()
                if not stray or exc.request_id in ("", request_id):
                    raise
                self._between = True

    def _send_request(self, info: RpcMethodInfo, batch: pa.RecordBatch, options: CallOptions) -> str:
        self._end_open("was ended by another call on its connection; read it to its end first, or connect twice")
        request_id, self._between = new_request_id(), True
        request = request_stream(info, batch, options.version, request_id, options.timeout)
        self.transport.channel.write(request)
        return request_id

    def unary(self, info: RpcMethodInfo, batch: pa.RecordBatch, options: CallOptions) -> Any:
        with self.exclusive(options.deadline):
            request_id, channel = self._send_request(info, batch, options), self.transport.channel
            known = None if self.transport.stray else recall_result(info, *channel.received())
            if known is not None:
                channel.skip_to(known[1])
                self._between = False
            else:
                reader, item = self.open_reply(request_id, options)
                reader.read_to_end()
                if item is None:
                    raise IPCError(f"{info.name}(): expected a result, got an end of stream")
        if known is not None:
            return answer_call(decode_result, info, known[0])
        return answer_call(read_result, info, reader, cast("ReplyItem", item).message)

    def stream(self, info: RpcMethodInfo, batch: pa.RecordBatch, options: CallOptions) -> ClientStream:
        with self.exclusive(options.deadline):
            stream = _ByteClientStream(self, self._send_request(info, batch, options), options)
            if info.header is not None:
                stream.read_header(info.name)
            self._open = stream
            return stream

    def release(self) -> bool:
        """End an open stream and refuse further calls; return whether the transport may serve another client."""
        fit = False
        with contextlib.suppress(RpcError), self.exclusive(time.monotonic() + 1.0):
            self._end_open("was ended with its connection")
            fit = True
        self._broken = self._broken or "it was closed here"
        return fit

    def close(self) -> None:
        self.release()
        self.transport.close()


class _ByteClientStream(ClientStream):
    def __init__(self, client: ByteClient, request_id: str, options: CallOptions) -> None:
        self._client, self._request_id, self._options = client, request_id, options
        self._writer: IpcWriter | None = None
        self._reader: IpcReader | None = None
        self._in_flight = 0  # ticks sent whose answers were not read
        self._ahead = 1  # how many to have in flight, as things go
        self._older = 0  # answers still to come that were asked for before the last write of ticks

    def read_header(self, name: str) -> None:
        """Read the header stream that precedes the data; an error in its place ends the stream."""
        if (item := self._next()) is None:
            raise IPCError(f"{name}(): expected a header, got an end of stream")
        self.header, self._reader = item.annotated().batch, None
        item.reader.read_to_end()

    def _input(self, schema: pa.Schema) -> IpcWriter:
        if self._writer is None:
            self._writer = IpcWriter(self._client.transport.channel.write, schema)
        return self._writer

    def _end_input(self) -> None:
        self.done = True
        self._input(EMPTY_SCHEMA).close()

    def _next(self) -> ReplyItem | None:
        """Read to the next item of the answer. The server's error ends the stream, not the connection."""
        try:
            if self._reader is not None:
                return next_reply_item(self._reader, self._options)
            self._reader, item = self._client.open_reply(self._request_id, self._options)
            return item
        except RpcError as exc:
            if _was_answer(exc):
                if self._reader is not None:
                    self._reader.read_to_end()
                if not self.done:
                    self._end_input()
                # A begun call reads our input to its end; a server that refused the call may take it for a request.
                self._client.transport.stray = True
            raise

    def _check_open(self) -> None:
        if self.done:  # another thread's call ended it while this one waited for the connection
            raise RpcError("ProtocolError", f"the stream {self.cut_off or 'is closed'}", "")

    def turn(self, given: AnnotatedBatch) -> AnnotatedBatch | None:
        with self._client.exclusive(self._options.deadline):
            self._check_open()
            batch, writer = given.batch, self._input(given.batch.schema)
            if self._in_flight and batch is not _TICK:
                raise RpcError("ProtocolError", "exchange() on a stream whose iteration has asked for batches ahead", "")
            if batch.schema is not writer.schema and not batch.schema.equals(writer.schema, check_metadata=True):
                batch = conform_batch(batch, writer.schema, "exchange input", cast_values=True)
            if given.custom_metadata is not None or not self._in_flight:
                writer.write(batch, given.custom_metadata)
                self._in_flight += 1
            return self._given(self._next())

    def next(self) -> AnnotatedBatch | None:
        # The server may block on writing while we do not read, and we never do while it does not: all the ticks that can
        # be unread (MAX_PREFETCH) fit into the smallest buffer between two processes many times over.
        with self._client.exclusive(self._options.deadline):
            self._check_open()
            missing = self._ahead - self._in_flight
            if missing > 0 and 2 * missing >= self._ahead:
                self._input(EMPTY_SCHEMA).write_all([(_TICK, None)] * missing)
                self._older, self._in_flight = self._in_flight, self._in_flight + missing
            started, self._older = time.monotonic(), self._older - 1
            item = self._next()
            # Only an answer that was asked for together with the one before it tells the producer's time from the way's.
            slow = self._older < -1 and time.monotonic() - started > SLOW_TURN_SECONDS
            large = item is not None and len(item.message.data) > SMALL_BODY_BYTES
            most = 2 if large else MAX_PREFETCH
            self._ahead = 1 if slow else min(2 * self._ahead, most, self._options.prefetch or most)
            return self._given(item)

    def _given(self, item: ReplyItem | None) -> AnnotatedBatch | None:
        if item is None:
            self._end_input()
            return None
        self._in_flight -= 1
        return item.annotated()

    def finish(self) -> None:
        """End both directions; the caller holds the connection."""
        self._end_input()
        try:
            while self._next() is not None:
                pass
        except RpcError as exc:
            if not _was_answer(exc):  # nobody waits for the server's error on a stream that is being closed
                raise

    def close(self) -> None:
        with self._client.exclusive(self._options.deadline):
            if not self.done:
                self.finish()

    def cancel(self) -> None:
        with self._client.exclusive(self._options.deadline):
            if not self.done:
                writer = self._input(EMPTY_SCHEMA)
                writer.write(empty_batch(writer.schema), {CANCEL_KEY: b"1"})
                self.finish()


class RpcConnection(Generic[_P]):
    """A connection as a context manager that gives the typed proxy of *protocol*; the options are those of `CallOptions`.
    *transport*, which may also be another `ClientChannel`, is closed on leaving, and when *protocol* has mistakes."""
    def __init__(self, protocol: type[_P], transport: Transport | ClientChannel, on_log: ClientLog | None = None, *,
                 timeout: float | None = None, ipc_validation: IpcValidation = IpcValidation.FULL) -> None:
        self.channel = transport if isinstance(transport, ClientChannel) else ByteClient(transport)
        version = getattr(protocol, "protocol_version", "") or ""
        try:
            self._proxy = RpcProxy(protocol, self.channel, CallOptions(on_log, timeout, ipc_validation, version))
        except BaseException:
            self.channel.close()
            raise

    def __enter__(self) -> _P:
        return cast("_P", self._proxy)

    def __exit__(self, *exc: object) -> None:
        self.channel.close()


class RpcProxy:
    """Calls a Protocol's methods on a server; each is an attribute. Made by the ``connect`` functions."""
    def __init__(self, protocol: type, channel: ClientChannel, options: CallOptions) -> None:
        self._protocol, self._channel, self._options = protocol, channel, options
        self.__dict__.update({i.name: _proxy_method(i, channel, options) for i in rpc_methods(protocol).values()})

    def __repr__(self) -> str:
        return f"<proxy of {self._protocol.__qualname__} over {type(self._channel).__name__}>"

    def with_options(self, **options: Any) -> Any:
        """Return a proxy on the same connection with other options; those that are not given stay as they are. They are
        *timeout* (seconds per call or turn, ``None`` for none), *on_log*, *ipc_validation*, and *prefetch*: 1 has iteration ask
        for one batch at a time (see `StreamSession.__iter__`), more for so many at most. Raises `TypeError` for an option that
        is none of these."""
        known = ("timeout", "on_log", "ipc_validation", "prefetch")
        if not options.keys() <= set(known):
            raise TypeError(f"with_options: expected {', '.join(known)}, got {', '.join(sorted(options))}")
        return RpcProxy(self._protocol, self._channel, dataclasses.replace(self._options, **options))

    def __getattr__(self, name: str) -> Any:
        close = _suggest(name, rpc_methods(self._protocol))
        raise AttributeError(f"{self._protocol.__qualname__} has no method {name!r}{close}")

def _proxy_method(info: RpcMethodInfo, channel: ClientChannel, options: CallOptions) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        batch = request_batch(info, bind_arguments(info, args, kwargs))
        if info.method_type is MethodType.UNARY:
            return channel.unary(info, batch, options)
        return StreamSession(channel.stream(info, batch, options), info)
    call.__name__, call.__doc__ = info.name, info.doc
    return call

def with_options(proxy: _P, **options: Any) -> _P:
    """Return ``proxy.with_options(...)`` with the proxy's own type, for type checkers; see `RpcProxy.with_options`."""
    return cast("_P", RpcProxy.with_options(cast("RpcProxy", proxy), **options))

def resume(proxy: Any, method: str, token: bytes) -> StreamSession:
    """Go on with a stream where its `token` was taken, also in another process; HTTP only. Raises `RpcError` if refused."""
    info = rpc_methods(proxy._protocol).get(method)
    if info is None or info.method_type is not MethodType.STREAM:
        raise RpcError("ProtocolError", f"resume: {method!r} is not a stream of {proxy._protocol.__qualname__}", "")
    return StreamSession(proxy._channel.resume(info, token, proxy._options), info)

def _reflection(target: Any, ipc_validation: IpcValidation = IpcValidation.FULL) -> Any:
    """A proxy of the reflection protocol on the connection of a proxy, a transport or a channel."""
    options, channel = (target._options, target._channel) if isinstance(target, RpcProxy) else (CallOptions(), target)
    channel = ByteClient(channel) if isinstance(channel, Transport) else channel
    if not isinstance(channel, ClientChannel):
        raise TypeError(f"expected a proxy, a transport or a channel, got {_got(target)}")
    return RpcProxy(Reflection, channel, CallOptions(timeout=options.timeout, ipc_validation=ipc_validation))

def list_protocols(target: Any) -> list[ProtocolSummary]:
    """Return what the server behind a proxy or transport hosts, the application's first; `RpcError` if it does not tell."""
    return cast("ProtocolList", _reflection(target).list_protocols()).protocols

def describe_protocol(target: Any, name: str) -> ServiceDescription:
    """Return what the server behind a proxy or transport says of the protocol *name*; raises as `list_protocols`."""
    return introspect(target, protocol=name)

def introspect(transport: Any, ipc_validation: IpcValidation = IpcValidation.FULL,
               protocol: str | None = None) -> ServiceDescription:
    """Return the description of *protocol*, by default the primary one; raises as `list_protocols`."""
    proxy = _reflection(transport, ipc_validation)
    listed = cast("ProtocolList", proxy.list_protocols())
    named = (p.protocol for p in listed.protocols if not p.protocol.startswith(RESERVED_PROTOCOL_PREFIX))
    name = next(named, REFLECTION_PROTOCOL) if protocol is None else protocol
    return _service_description(listed, proxy.describe(protocol=name))

@dataclass(frozen=True)
class PoolMetrics:
    """What a `WorkerPool` has done so far, and what it holds: counts of workers."""
    borrows: int = 0  # times that `connect` was entered
    spawns: int = 0  # workers started for it …
    reuses: int = 0  # … or taken from the idle ones
    returns: int = 0  # workers that came back fit to be used again
    discards: int = 0  # workers ended because they were not, or the pool was closed
    evictions_idle: int = 0  # workers ended because nobody wanted them for `idle_timeout`
    evictions_max: int = 0  # workers ended because there were more than `max_idle`
    idle: int = 0
    active: int = 0

def _is_quiet(worker: SubprocessTransport) -> bool:
    """Whether a worker lives, has not hung up, and has sent nothing that nobody asked for."""
    channel = worker.channel
    alive = worker.proc.poll() is None and channel.fileno() >= 0
    return alive and not channel.peek() and not _ready(channel.fileno(), "POLLIN")


class WorkerPool:
    """Keeps workers between connections, so that the next one of the same command does not wait for a start. A worker serves
    one connection at a time and is checked before each: one that died, hung up, printed to the channel or was left in the
    middle of a call is ended instead. Safe for use by several threads; a context manager, which closes it. At most *max_idle*
    workers wait (0 keeps none), whatever their commands, each for *idle_timeout* seconds; the longest idle one goes first, and
    one that dies is reaped within a second. *stderr* and *stderr_logger* are as in `connect`. *shm_size* is accepted for code
    written for other implementations, and without effect: shared memory is not offered to workers."""
    def __init__(self, max_idle: int = 4, idle_timeout: float = 60.0, stderr: StderrMode = StderrMode.INHERIT,
                 stderr_logger: logging.Logger | None = None, shm_size: int | None = None) -> None:
        if max_idle < 0 or not 0 < idle_timeout <= threading.TIMEOUT_MAX:
            raise ValueError(f"expected max_idle of 0 or more and idle_timeout above 0, got {max_idle!r} and {idle_timeout!r}")
        if shm_size is not None and (not isinstance(shm_size, int) or shm_size <= 0):
            raise ValueError(f"shm_size: expected a positive number of bytes or None, got {shm_size!r}")
        self.max_idle, self.idle_timeout = max_idle, idle_timeout
        self._start = functools.partial(SubprocessTransport, stderr=stderr, stderr_logger=stderr_logger)
        self._changed = threading.Condition()
        self._idle: list[SubprocessTransport] = []  # the longest idle one first
        self._evictor: threading.Thread | None = None  # lives only while somebody is idle
        self._counts, self._closed = dataclasses.asdict(PoolMetrics()), False

    @property
    def metrics(self) -> PoolMetrics:
        """The counts as they are now."""
        with self._changed:
            return PoolMetrics(**{**self._counts, "idle": len(self._idle)})

    idle_count = property(lambda self: self.metrics.idle, doc="Workers that wait.")
    active_count = property(lambda self: self.metrics.active, doc="Workers that serve a connection.")

    def _count(self, **changes: int) -> None:
        with self._changed:
            for name, change in changes.items():
                self._counts[name] += change

    @contextlib.contextmanager
    def connect(self, protocol: type[_P], cmd: Sequence[str], *, on_log: ClientLog | None = None, timeout: float | None = None,
                ipc_validation: IpcValidation = IpcValidation.FULL) -> Iterator[_P]:
        """Give a proxy to a worker of that command; on leaving, an open stream is ended and the worker goes back. Raises
        `TransportError` on entering when the program cannot be started or the pool is closed, from a call when it died."""
        worker, fit = self._borrow(cmd), False
        client = ByteClient(worker)
        try:
            yield cast("_P", RpcConnection(protocol, client, on_log, timeout=timeout, ipc_validation=ipc_validation)._proxy)
        finally:
            try:
                fit = client.release() and _is_quiet(worker)
            finally:
                self._give_back(worker, fit)

    def _borrow(self, cmd: Sequence[str]) -> SubprocessTransport:
        self._count(borrows=1)
        while True:
            with self._changed:
                if self._closed:
                    raise TransportError("the pool is closed")
                idle = next((w for w in reversed(self._idle) if w.command == list(cmd)), None)
                if idle is not None:
                    self._idle.remove(idle)
            if idle is None or _is_quiet(idle):
                worker = idle or self._start(cmd)
                self._count(active=1, spawns=idle is None, reuses=idle is not None)
                return worker
            self._count(discards=1)
            idle.abort()

    def _give_back(self, worker: SubprocessTransport, fit: bool) -> None:
        with self._changed:
            kept, worker.idle_since = fit and not self._closed, time.monotonic()
            self._idle += [worker] if kept else []
            surplus = [self._idle.pop(0)] if len(self._idle) > self.max_idle else []
            self._count(active=-1, returns=kept, discards=not kept, evictions_max=len(surplus))
            if self._idle and self._evictor is None:
                self._evictor = threading.Thread(target=self._evict, daemon=True, name="vgi_rpc pool")
                self._evictor.start()
        if not kept:
            worker.abort()
        for one in surplus:
            one.close()

    def _evict(self) -> None:
        """End workers as their time comes, and reap those that died; return once nobody is idle."""
        while True:
            with self._changed:
                if not self._idle:
                    self._evictor = None
                    return
                died = [w for w in self._idle if w.proc.poll() is not None]
                left = self._idle[0].idle_since + self.idle_timeout - time.monotonic()
                if left > 0 and not died:
                    self._changed.wait(min(left, REAP_SECONDS))
                    continue
                old = (died or self._idle)[0]
                self._idle.remove(old)
                self._count(discards=bool(died), evictions_idle=not died)
            old.close()

    def close(self) -> None:
        """End the idle workers; those that are in use follow when they come back. May be called twice."""
        with self._changed:
            self._closed = True
            idle, self._idle, evictor = self._idle, [], self._evictor
            self._count(discards=len(idle))
            self._changed.notify_all()
        for worker in idle:
            worker.channel.close()  # all of them leave at the same time
        for worker in idle:
            worker.close()
        if evictor is not None:
            evictor.join()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# ============================================================================
# 15. BYTE SERVING ..................................... uses 1-14
# ============================================================================
# The loop that serves one byte stream, and the listeners that give each connection such a loop.
# Law: after any refusal whose bytes were well framed the connection serves the next request; else it is closed.


class RpcServer(ServerCore):
    """Hosts one or more protocols; any number of transports may serve it at the same time.

    Args:
        protocol: The Protocol class, or a plain class that serves as its own.
        implementation: The object that serves it.
        extra_protocols: Further (protocol, implementation) pairs, with unique names.
        server_id, server_version: 12 hex characters, made up by default; free text, shown by reflection.
        enable_describe, include_tracebacks: Whether reflection and the pages answer; whether errors carry tracebacks.
        ipc_validation: How much of each incoming batch is checked; default: every value.
        max_request_bytes: Largest message on byte streams, before and after decompression; HTTP has an option of its own.
        max_rows: Most rows in one batch on byte streams.

    Raises `TypeError` when the implementation does not fit the protocol (one error names everything), `ValueError` for a
    protocol name that is reserved, given twice, or none.
    """

    def serve(self, transport: Transport, *, auth: AuthContext | None = None) -> None:
        """Serve one client until it leaves, or the server drains; *transport* stays open."""
        serving = _ByteServing(self, transport, auth or _ANONYMOUS)
        # While draining, a connection in a thread of its own answers with refusals until the listener hangs up; the main
        # thread, which nobody could wake from its next read, leaves.
        while serving.serve_next() and not (self.draining and threading.current_thread() is threading.main_thread()):
            pass

    def serve_one(self, transport: Transport) -> None:
        """Serve one request; as `serve`."""
        _ByteServing(self, transport, _ANONYMOUS).serve_next()


class _ByteServing:
    """Serves one byte channel, request after request."""
    def __init__(self, server: ServerCore, transport: Transport, auth: AuthContext) -> None:
        self._server, self._channel = server, transport.channel
        most, rows = server.limits.max_bytes, server.limits.max_rows
        decoded = {"free_decoded_bytes": FREE_DECODED_BYTES} if most is None else {"max_decoded_bytes": most}
        limits = limits_of({"max_request_bytes": most, "max_rows": rows, **decoded, **transport.limits})
        self._caller = Caller(transport.kind, auth, transport.remote_addr, gone=transport.channel.peer_gone, limits=limits)
        # After a refusal the client may still send the input stream of the stream it had asked for: it has no method
        # key, cannot be a request, and is passed over.
        self._orphan_expected = False

    def serve_next(self) -> bool:
        """Serve one request; ``False`` when the connection is at its end."""
        try:
            self._channel.deadline = None
            known = self._server.recall(*self._channel.received())
            reader = self._reader() if known is None else None  # which waits: nothing is running yet
            with self._server:
                self._serve_call(known, reader)
            return True
        except IPCError as exc:
            logger.debug("connection closed: %s", exc)
            with contextlib.suppress(TransportError):
                self._answer(exc)
        except (EOFError, TransportError):
            pass
        return False

    def _reader(self) -> IpcReader:
        return IpcReader(self._channel, self._server.limits, self._server.ipc_validation)

    def _write(self, schema: pa.Schema, items: Sequence[tuple[pa.RecordBatch, Any]]) -> None:
        write_stream(self._channel.write, schema, items)

    def _answer(self, exc: BaseException, request_id: str = "") -> None:
        self._write(EMPTY_SCHEMA, [self._server.error_item(exc, EMPTY_SCHEMA, request_id or new_request_id())])

    def _serve_call(self, known: tuple[BoundMethod, Request, int] | None, reader: IpcReader | None) -> None:
        """Serve a request that was recognised, or else that which *reader* gives."""
        orphan_expected, self._orphan_expected = self._orphan_expected, False
        request_id, request = "", None
        try:
            if known is not None:
                bound, request, end = known
                self._channel.skip_to(end)
            else:
                request = Request(cast("IpcReader", reader))
                if orphan_expected and not {METHOD_KEY, REQUEST_VERSION_KEY} & request.metadata.keys():
                    return
            request_id = request.request_id
            if request.metadata.get(METHOD_KEY) == TRANSPORT_OPTIONS_METHOD.encode():
                self._answer_options(request)
                return
            self._server.start(self._caller.kind)
            if known is None:
                bound = self._server.resolve(request)
            self._serve_request(bound, request, request_id or new_request_id())
        except (_Refusal, StatusError) as exc:
            if reader is not None:
                reader.read_to_end()  # raises when the bytes make no sense: then the connection is closed
            if request is not None or not orphan_expected:
                self._answer(exc, request_id)
                self._orphan_expected = True

    def _answer_options(self, request: Request) -> None:
        """`__transport_options__` (WIRE section 9): shared memory is not offered."""
        self._server.check_wire_version(request.metadata)
        metadata = {SHM_KEY: b"false", REQUEST_VERSION_KEY: REQUEST_VERSION, SERVER_ID_KEY: self._server.server_id.encode()}
        self._write(EMPTY_SCHEMA, [(_TICK, metadata)])

    def _serve_request(self, bound: BoundMethod, request: Request, request_id: str) -> None:
        call = self._server.open_call(bound, self._caller, request, request_id)
        try:
            try:
                arguments = read_arguments(bound.info, request)
            except _Refusal as exc:
                turn = call.refuse(exc)
            else:
                turn = call.begin(arguments)
            if call.stream is None:
                self._orphan_expected = bound.info.method_type is MethodType.STREAM
                bare = turn.error is not None and bound.info.header is not None
                self._write(EMPTY_SCHEMA if bare else turn.schema, turn.items)
                return
            if turn.items:
                self._write(turn.schema, turn.items)
            self._serve_turns(call, call.stream)
        finally:
            call.end()

    def _serve_turns(self, call: Call, stream: Stream[Any, Any]) -> None:
        """Lockstep: a batch comes, a turn answers, until either side ends (WIRE section 5)."""
        reader, writer = self._reader(), IpcWriter(self._channel.write, stream.output_schema)
        alike, finished = reader.facts is schema_facts(stream.input_schema), False
        while not finished:
            try:
                message = reader.next_message()
                batch = None if message is None else reader.decode(message)
            except _Refusal as exc:
                turn = call._failed(stream.output_schema, exc, refused=True)
            else:
                metadata = message.head.metadata if message is not None else None
                if message is None or CANCEL_KEY in (metadata or ()):
                    if message is not None:
                        call.cancel()
                    writer.close()
                    break
                if batch is _TICK and not metadata:
                    turn = call.turn(_PLAIN_TICK)
                else:
                    given = AnnotatedBatch(batch, pa.KeyValueMetadata(metadata) if metadata else None)
                    turn = call.turn(given, conforms=alike and not any(message.head.nodes[1::2]))
            finished = turn.finished
            writer.write_all(turn.items, close=finished)
        reader.read_to_end()

@contextlib.contextmanager
def _stop_signals(server: ServerCore, grace: float = DRAIN_GRACE_SECONDS,
                  wake: Callable[[], object] = lambda: None, wake_fd: int = -1) -> Iterator[None]:
    """Have SIGTERM and SIGINT end what is inside: an idle server at once, else after the running calls or *grace* seconds. The
    first signal drains the server and calls *wake*; a second one does not wait. A signal that comes just before the main thread
    blocks is handled when something can be read at the other end of *wake_fd*. Only the main thread gets signals: in another
    thread nothing changes."""
    import signal
    waiting = threading.main_thread()
    if threading.current_thread() is not waiting:
        yield
        return
    # A thread that is blocked in a read between two turns of a stream can only be waked by another signal.
    timer = threading.Timer(grace, lambda: signal.pthread_kill(cast("int", waiting.ident), signal.SIGTERM))
    timer.daemon, stopping = True, False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        again, stopping, server.draining = stopping, True, True
        if again or not server._active:
            raise SystemExit(0)
        timer.start()
        wake()

    old = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    old_fd = signal.set_wakeup_fd(wake_fd, warn_on_full_buffer=False)
    try:
        yield
    except SystemExit:
        if not stopping:
            raise
    finally:
        timer.cancel()
        signal.set_wakeup_fd(old_fd)
        for number, handler in old.items():
            signal.signal(number, handler or signal.SIG_DFL)

def serve_stdio(server: RpcServer) -> None:
    """Serve the parent process on stdin and stdout until it closes them; SIGTERM and SIGINT let the running call finish. While
    serving, descriptor 1 is standard error: whatever prints to stdout cannot break the channel."""
    write_fd = os.dup(1)
    channel = FdChannel(os.dup(0), write_fd)  # not inherited by children of the methods
    transport = Transport(channel, TransportKind.PIPE, drain_grace_seconds=DRAIN_GRACE_SECONDS)
    try:
        with open(os.devnull, "rb") as null:
            os.dup2(null.fileno(), 0)
        os.dup2(2, 1)
        _flush_stdout()  # now, so that what the program printed before it served goes to standard error too
        with _stop_signals(server):
            server.serve(transport)
    finally:
        _flush_stdout()
        os.dup2(write_fd, 1)
        transport.close()

def _flush_stdout() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none at all
        sys.stdout.flush()

class Listener:
    """Accepts connections on a bound socket, which it owns, and has each served to its end, until stopped or idle too long.
    *threaded*: a thread for each connection, else one after the other. At most *max_connections* at a time, further ones wait.
    `run` returns after *idle_timeout* seconds without a connection; ``None`` for never."""
    def __init__(self, listening: socket.socket, handle: Callable[[socket.socket, Any], None], *, threaded: bool = False,
                 max_connections: int | None = None, idle_timeout: float | None = None) -> None:
        self._socket, self._handle, self._threaded = listening, handle, threaded
        self._max, self._idle = max_connections, idle_timeout
        self.limits = {"max_connections": max_connections, "idle_timeout": idle_timeout,
                       "drain_grace_seconds": DRAIN_GRACE_SECONDS}  # for its transports, which tell
        self._wake_read, self._wake_write = socket.socketpair()
        self.wake_fd = self._wake_write.fileno()  # a byte written there has `run` look again
        for ours in (listening, self._wake_read, self._wake_write):
            ours.setblocking(False)  # a connection may vanish between select and accept
        self._stopping = False
        self._free_since = time.monotonic()
        self._connections: dict[socket.socket, socket.socket] = {}  # as accepted, and as used: TLS makes it another one

    def stop(self) -> None:
        """Have `run` return; may be called from a signal handler or any thread."""
        self._stopping = True
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_write.send(b"x")

    def run(self) -> None:
        """Accept until stopped; connections that are still served stay open."""
        while not self._stopping:
            if self._connections:
                self._free_since = time.monotonic()
            left = None if self._idle is None else self._free_since + self._idle - time.monotonic()
            if left is not None and left <= 0:
                return
            if self._wait(left):
                self._accept()

    def run_while(self, work: Callable[[], object]) -> None:
        """Do *work* in another thread and accept until it is done: who connects meanwhile gets a refusal, not silence. Only
        where connections have threads of their own; else *work* is done here."""
        if not self._threaded:
            work()
            return

        def finish() -> None:
            work()
            self.stop()

        self._stopping, self._idle = False, None
        worker = threading.Thread(target=finish, daemon=True, name="vgi_rpc drain")
        worker.start()
        self.run()
        worker.join()

    def _wait(self, seconds: float | None) -> bool:
        """Wait for a connection to accept, a wake-up or the end of *seconds*; return whether it is a connection."""
        import selectors
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            if self._max is None or len(self._connections) < self._max:
                selector.register(self._socket, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select(seconds)]
        if self._wake_read in ready:
            self._wake_read.recv(4096)
        return self._socket in ready and not self._stopping

    def _accept(self) -> None:
        try:
            connected, address = self._socket.accept()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.05)  # out of descriptors: let running connections give some back
            return
        connected.setblocking(True)
        self._connections[connected] = connected
        if not self._threaded:
            self._serve(connected, address)
            return
        try:
            threading.Thread(target=self._serve, args=(connected, address), daemon=True, name="vgi_rpc connection").start()
        except RuntimeError as exc:
            logger.error("connection refused: %s", exc)
            self._forget(connected)

    def _serve(self, connected: socket.socket, address: Any) -> None:
        try:
            self._handle(connected, address)
        except Exception:
            logger.exception("a connection's handler raised")
        finally:
            self._forget(connected)

    def _forget(self, connected: socket.socket) -> None:
        connected.close()
        self._free_since = time.monotonic()
        del self._connections[connected]
        if self._max is not None:
            self._wake()

    def close(self) -> None:
        """Stop listening and hang up on the connections that are left."""
        self._socket.close()
        for connected in list(self._connections.values()):
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)
        self._wake_read.close()
        self._wake_write.close()

def run_listener(server: ServerCore, listener: Listener, grace: float = DRAIN_GRACE_SECONDS,
                 on_bound: Callable[..., object] | None = None, *address: Any) -> None:
    """Run *listener* until SIGTERM, SIGINT or its end; then let running calls finish for *grace* seconds, and close. *on_bound*
    is called with the address once signals are handled: who is told of it may stop us."""
    try:
        with _stop_signals(server, grace, listener.stop, listener.wake_fd):
            if on_bound is not None:
                on_bound(*address)
            listener.run()
            if server.draining:
                listener.run_while(lambda: server.drain(grace))
    finally:
        listener.close()

def serve_unix(server: RpcServer, path: str, *, threaded: bool = False, max_connections: int | None = None,
               idle_timeout: float | None = None, on_bound: Callable[[str], None] | None = None) -> None:
    """Serve on a Unix socket until SIGTERM, SIGINT or *idle_timeout* seconds (``None`` for never) without a connection. *path*
    is readable by its owner alone; a dead socket there is replaced, and ours removed at the end. *on_bound* is called with it
    once connections are accepted. For *threaded* and *max_connections* see `Listener`. Raises `OSError` when the path is in use
    by a live server, or cannot be made."""
    def handle(connected: socket.socket, address: Any) -> None:
        server.serve(Transport(SocketChannel(connected), TransportKind.UNIX, f"unix:{path}", **listener.limits))

    with socket.socket(socket.AF_UNIX) as listening:
        _remove_dead_socket(path)
        old = os.umask(0o077)
        try:
            listening.bind(path)
        finally:
            os.umask(old)
        made = os.stat(path).st_ino
        listening.listen(128)
        listener = Listener(listening, handle, threaded=threaded, max_connections=max_connections, idle_timeout=idle_timeout)
        try:
            run_listener(server, listener, DRAIN_GRACE_SECONDS, on_bound, path)
        finally:
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == made:
                    os.unlink(path)

def _remove_dead_socket(path: str) -> None:
    """Remove a socket file behind which nobody listens any more."""
    import stat
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
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
    both = family is socket.AF_INET6 and socket.has_dualstack_ipv6()  # "::" takes IPv4 too
    return socket.create_server((host, port), family=family, backlog=512, dualstack_ipv6=both)

def _start_tls(connected: socket.socket, tls_context: ssl.SSLContext | None) -> socket.socket:
    """Set up an accepted TCP connection; the TLS handshake runs here, in the connection's own thread, within 5 s."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tls_context is None:
        return connected
    connected.settimeout(TLS_HANDSHAKE_SECONDS)
    wrapped = tls_context.wrap_socket(connected, server_side=True)
    wrapped.settimeout(None)
    return wrapped

def _address_text(address: Any) -> str:
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) and len(address) >= 2 else ""

def serve_tcp(server: RpcServer, host: str = "127.0.0.1", port: int = 0, *, threaded: bool = False,
              max_connections: int | None = None, idle_timeout: float | None = None,
              on_bound: Callable[[str, int], None] | None = None, tls_context: ssl.SSLContext | None = None) -> None:
    """Serve on TCP; what is not said here is as in `serve_unix`. Only *tls_context* can authenticate clients. By default only
    this machine reaches *host*; *port* 0 takes a free one. *on_bound* is called with host and port. *tls_context* is a
    server-side context of the standard library's ``ssl``; ``None`` for plain TCP. Raises `OSError` when the address is in use,
    or cannot be bound."""
    def handle(connected: socket.socket, address: Any) -> None:
        where = _address_text(address)
        try:
            ready = _start_tls(connected, tls_context)
        except OSError as exc:
            logger.info("TLS handshake with %s failed: %s", where, exc)
            return
        listener._connections[connected] = ready
        with ready:
            server.serve(Transport(SocketChannel(ready), TransportKind.TCP, where, **listener.limits, **tls_limit))

    tls_limit = {"tls_handshake_timeout": TLS_HANDSHAKE_SECONDS} if tls_context is not None else {}
    listening = listen_tcp(host, port)
    listener = Listener(listening, handle, threaded=threaded, max_connections=max_connections, idle_timeout=idle_timeout)
    run_listener(server, listener, DRAIN_GRACE_SECONDS, on_bound, host, listening.getsockname()[1])


# ============================================================================
# 16. HTTP SERVING ..................................... uses 1-15
# ============================================================================
# One function from request to response (`HttpApp.__call__`) under both our own server and WSGI: routes, limits, codings,
# authentication, tokens. Above it a strict HTTP/1.1 reader: what the grammar does not allow is refused and the connection
# closed, so that no proxy in front can read a message differently than we do.

@dataclass
class HttpRequest:
    """A request as `HttpApp` and ``authenticate`` callbacks see it."""
    method: str  # GET, POST …
    path: str  # as it came: not decoded, without the query
    headers: Mapping[str, str]  # by lower-case name; the values of a repeated one are joined by ", "
    remote_addr: str = ""
    read_body: Callable[[int], bytes] = lambda limit: b""  # reads at most so many bytes; RequestTooLargeError beyond
    repeated: frozenset[str] = frozenset()  # names of the headers that came more than once
    gone: Callable[[], bool] | None = None  # whether the client has left; None when that cannot be known
    multiprocess: bool = False  # whether the next request may come to another process
    memory: dict[str, Any] = field(default_factory=dict)  # what was found out of its head, see `HttpHead`

    def get_header(self, name: str, default: str | None = None) -> str | None:
        """Return a header's value by its name in any case."""
        return self.headers.get(name.lower(), default)

@dataclass
class HttpResponse:
    """A response: the shells add nothing but framing, ``Date`` and ``Connection``."""
    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    # Several pieces, where joining them would cost more than sending; a generator's are sent as they come, and it is closed
    # when the client leaves.
    body: bytes | list[_Buffer] | Iterator[Any] = b""
    close: bool = False  # the connection must not be used again

Authenticate = Callable[[HttpRequest], AuthContext]

def bearer_authenticate(*, validate: Callable[[str], AuthContext]) -> Authenticate:
    """Return a callback that hands the bearer token of ``Authorization`` to *validate*, which returns who it is, or raises
    ``ValueError``; let it compare secrets with ``hmac.compare_digest``."""
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
    """Return a callback that knows a fixed set of bearer tokens; compared in constant time, all of them each time."""
    known = [(token.encode(), auth) for token, auth in tokens.items()]
    def validate(token: str) -> AuthContext:
        found = [auth for secret, auth in known if hmac.compare_digest(secret, token.encode())]
        if not found:
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "unknown bearer token")
        return found[0]
    return bearer_authenticate(validate=validate)

def chain_authenticate(*authenticators: Authenticate) -> Authenticate:
    """Return a callback that asks each in turn until one knows the caller; the last refusal stands. A ``ValueError`` passes
    the request on to the next; ``PermissionError`` and others end the search."""
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
    authenticate.challenge = next(filter(None, (getattr(one, "challenge", "") for one in authenticators)), "")  # type: ignore
    return authenticate


@dataclass
class HttpOptions:
    """What an HTTP server can be told; `make_wsgi_app`, `serve_http` and `make_sync_client` take these as keywords."""
    prefix: str = ""  # path under which everything is served, such as /api
    # Key of the state tokens (16 bytes or more), or several: the first signs. By default VGI_RPC_TOKEN_KEY, else random.
    token_key: bytes | str | Sequence[bytes] | None = None
    token_ttl: float = TOKEN_TTL_SECONDS  # seconds that a state token is good for; 0 for ever
    authenticate: Authenticate | None = None  # gives the AuthContext; ValueError and PermissionError refuse (401)
    cors_origins: str | Iterable[str] | None = None  # origins whose pages may call, "*" for all; None for none
    max_request_bytes: int | None = None  # largest body, encoded and decoded; None for the default of 256 MiB
    max_response_bytes: int | None = None  # largest answer, decoded; None for any size
    compression_level: int | None = 1  # zstd and gzip level of answers, 1 to 9; None switches compression off
    call_state_cache_entries: int = 4096  # opened call tokens kept in memory; 0 for none
    max_rows: int | None = None  # rows of one batch; None for what its bytes pay for
    pages: bool = True  # serve the pages for people (they need reflection as well)
    json: bool = True  # answer calls in JSON

    def __post_init__(self) -> None:
        self.prefix = "/" + self.prefix.strip("/") if self.prefix.strip("/") else ""
        if self.cors_origins is not None:
            self.cors_origins = [self.cors_origins] if isinstance(self.cors_origins, str) else list(self.cors_origins)
        for name in ("max_request_bytes", "max_response_bytes", "max_rows"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value <= 0):
                raise ValueError(f"{name}: expected a positive integer or None, got {value!r}")

    def keys(self) -> list[bytes]:
        """The keys of the tokens as given, here or in the environment; empty when there are none."""
        given = self.token_key if self.token_key is not None else os.environ.get("VGI_RPC_TOKEN_KEY")
        if not given:
            return []
        if isinstance(given, str):
            return [k.strip().encode() for k in given.split(",") if k.strip()] or [b""]  # refused: it holds no key
        return [bytes(given)] if isinstance(given, (bytes, bytearray)) else [bytes(k) for k in given]

def _takes_options(*kinds: type) -> Callable[[_Function], _Function]:
    """Give a function that takes ``**options`` the signature in which each option of *kinds* is a keyword."""
    def mark(function: _Function) -> _Function:
        signature = inspect.signature(function)
        kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        kept += [p.replace(kind=p.KEYWORD_ONLY) for kind in kinds for p in inspect.signature(kind).parameters.values()]
        function.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return function
    return mark

def _split_options(options: dict[str, Any], *kinds: type) -> list[Any]:
    """Build one instance of each of *kinds* from keywords; an unknown keyword is a `TypeError` with a suggestion."""
    known = [f.name for kind in kinds for f in dataclasses.fields(kind)]
    for name in options:
        if name not in known:
            raise TypeError(f"no option {name!r}{_suggest(name, known)}; there are {', '.join(known)}")
    return [kind(**{f.name: options[f.name] for f in dataclasses.fields(kind) if f.name in options}) for kind in kinds]

def supported_encodings() -> tuple[str, ...]:
    """Return the body codings that this machine can read and write, best first."""
    return ("zstd", "gzip") if _zstd_available() else ("gzip",)

def compress_body(body: bytes, encoding: str, level: int) -> bytes:
    """Encode a body; *level* from 1 to 9."""
    if encoding == "zstd":
        return zstd_compress(body, level)
    encoder = zlib.compressobj(level, wbits=31)
    return encoder.compress(body) + encoder.flush()

def _total(pieces: Iterable[_Buffer]) -> int:
    return sum(map(len, pieces))

def compress_if_worth(pieces: Sequence[_Buffer], encoding: str, level: int, packed_bytes: int = 0) -> bytes | None:
    """Encode a body, if that makes it a good deal smaller; ``None`` if it is short (without those of its bytes that are packed
    already) or, by a sample of its largest piece, does not compress."""
    if _total(pieces) - packed_bytes < _COMPRESS_BODY_FROM_BYTES:
        return None
    largest = memoryview(max(pieces, key=len))
    sample = bytes(largest[len(largest) // 2 :][:_SAMPLE_BYTES])
    if len(compress_body(sample, encoding, level)) > _WORTH * len(sample):
        return None
    packed = compress_body(b"".join(pieces), encoding, level)
    return packed if len(packed) <= _WORTH * _total(pieces) else None

def decompress_body(body: _Buffer, encoding: str, limit: int) -> bytes:
    """Decode a body to at most *limit* bytes; raises `IPCError` or `RequestTooLargeError`."""
    return (zstd_decompress if encoding == "zstd" else gzip_decompress)(body, limit)

def _coding_of(headers: Mapping[str, str]) -> str:
    """The coding that a body's headers name (our private header first); empty for none."""
    coding = (headers.get(CONTENT_ENCODING_HEADER.lower()) or headers.get("content-encoding") or "").strip().lower()
    return "" if coding == "identity" else coding

def _decoded_body(coding: str, read: Callable[[int], _Buffer], limit: int) -> _Buffer:
    """Read a body and undo its *coding*, both up to *limit* bytes; a coding that we do not know is a 415."""
    if not coding:
        return read(limit)
    if coding not in supported_encodings():
        text = f"Content-Encoding: expected one of {', '.join(supported_encodings())}, got {coding[:60]!r}"
        raise _protocol_error(text, 415)
    return decompress_body(read(limit), coding, limit)

@functools.lru_cache(maxsize=256)
def choose_encoding(private: str | None, public: str) -> tuple[str, str, bool]:
    """Choose the coding of an answer: (coding or empty, header that names it, whether to leave it out is as welcome).
    The client's order decides; its private header (``None`` when absent) beats the standard one, and a coding named only
    there is named in the private answer header. ``identity`` first, or ``q=0``, means none; anywhere else it says that an
    answer may stay as it is where coding it is not worth the time."""
    chosen, identity = "", False
    for offer in (public if private is None else private).lower().split(","):
        name, _, parameters = offer.partition(";")
        name = name.strip()
        if re.search(r"q=0(\.0*)?\s*$", parameters):
            continue
        identity = identity or name == "identity"
        if not chosen and not identity and name in supported_encodings():
            chosen = name
    in_public = re.search(rf"(?:^|[,\s]){chosen}\b", public.lower()) is not None
    return chosen, "Content-Encoding" if in_public else CONTENT_ENCODING_HEADER, identity

def _protocol_error(text: str, status: int, code: Code = Code.INVALID_ARGUMENT) -> ProtocolError:
    """A refusal with another HTTP status than 400."""
    exc = ProtocolError(text)
    exc.http_status, exc.error_code = status, code
    return exc

class _HttpFailure(Exception):
    """Ends the handling of a request with its argument, a response that is not Arrow."""

def _json_bytes(value: Any) -> bytes:
    """One line of JSON in UTF-8; NaN and the infinities, which JSON does not have, become null."""
    dump = functools.partial(json.dumps, ensure_ascii=False, separators=(",", ":"), default=_text_of)
    try:
        text = dump(value, allow_nan=False)
    except ValueError:
        text = dump(json.loads(dump(value), parse_constant=lambda name: None))
    return (text + "\n").encode("utf-8", "backslashreplace")

def json_response(status: int, value: Any, headers: Iterable[tuple[str, str]] = ()) -> HttpResponse:
    """Return a response with *value* as a line of JSON."""
    return HttpResponse(status, [("Content-Type", _JSON), *headers], _json_bytes(value))

def _refusal(status: int, error: str, detail: str, *headers: tuple[str, str]) -> HttpResponse:
    return json_response(status, {"error": error, "detail": detail}, headers)

def _method_not_allowed(allowed: str) -> HttpResponse:
    return _refusal(405, "method_not_allowed", f"expected {allowed}", ("Allow", allowed))

def _internal_error(request_id: str) -> HttpResponse:
    """What went wrong stands in the server's log under the id; its text is not the client's business."""
    return json_response(500, {"error": "internal_error", "request_id": request_id})

_MAX_LIVE_STATES, _MAX_LIVE_BYTES = 256, 1 << 20  # states that are kept between turns, and their size
_MAC_TEXT_BYTES = 44  # of a cursor, its end: what tells it from all others, and is hashed sooner than the whole
_IMMUTABLE = frozenset({int, float, bool, str, bytes, type(None)})

class _CallHead(NamedTuple):
    """What the head of a POST says of the call."""
    path: list[str]  # protocol, method and, for a stream, init or exchange
    json: str  # its media type if it is to be answered in JSON, else empty
    coding: str  # of its body
    answer_coding: tuple[str, str, bool]  # see `choose_encoding`
    turns: int  # that one answer may have
    caller: Caller  # but for who it is

_OUR_KEYS = frozenset({STATE_KEY, CALL_STATE_KEY, CANCEL_KEY, TIMEOUT_KEY, REQUEST_ID_KEY})  # not the state's business

class _OpenedCall(NamedTuple):
    """The half of a stream's state that never changes, as it was sealed at init."""
    binding: tuple[bytes, ...]  # to the method and who calls it
    call_id: bytes
    output_schema: pa.Schema
    input_schema: pa.Schema
    call_state: bytes
    stream_id: str
    limit: int | None

class _LiveState(NamedTuple):
    """A state that need not be read back from its cursor."""
    cursor: bytes
    binding: tuple[bytes, ...]
    issued: float
    call_id: bytes
    state: StreamState

    def copy(self) -> StreamState:
        """Each turn has an object of its own."""
        copied = object.__new__(type(self.state))
        copied.__dict__.update(self.state.__dict__)
        return copied

class _Joined(Iterator[bytes]):
    """A body that is made as it is sent, for those who take bytes alone."""
    def __init__(self, body: Any) -> None:
        self._body, self.close = body, body.close

    def __next__(self) -> bytes:
        return b"".join(next(self._body))

class _StreamAnswer(NamedTuple):
    """What the turns of one answer have in common."""
    call: Call
    binding: tuple[bytes, ...]
    call_id: bytes
    given: AnnotatedBatch  # what each of them is served on
    header: bytes = b""  # header stream that precedes them
    call_token: bytes = b""  # when the client does not have it yet


class HttpApp:
    """Answers requests for a server; safe for use by several threads. Made by `make_wsgi_app` and `serve_http`."""
    scheme = "http"  # of the URLs that pages show

    def __init__(self, server: ServerCore, options: HttpOptions | None = None) -> None:
        self.server, self.options = server, options or HttpOptions()
        keys = self.options.keys()
        self._own_key = not keys
        if self._own_key:
            logger.warning("no token key: a random one is used, so streams do not survive a restart and other processes cannot "
                           "go on with them; set VGI_RPC_TOKEN_KEY (or token_key=) to the same secret everywhere")
        self.sealer = TokenSealer(keys or [os.urandom(32)], self.options.token_ttl)
        given = self.options.max_request_bytes
        self._limit = most = given or SERVER_MAX_REQUEST_BYTES
        in_json = {"max_json_request_bytes": given or _JSON_MAX_REQUEST_BYTES} if self.options.json else {}
        self.limits = limits_of({
            **vars(self.options), **in_json, "max_request_bytes": most, "max_decoded_bytes": most, "max_turns": MAX_TURNS,
            "max_turns_seconds": MAX_TURNS_SECONDS, "max_state_bytes": _MAX_STATE_BYTES,
            "token_clock_skew": TOKEN_CLOCK_SKEW_SECONDS, "token_ttl": self.sealer.ttl or None})
        self._open_call = functools.lru_cache(self.options.call_state_cache_entries)(self._open_call_token)
        self._live: OrderedDict[bytes, _LiveState] = OrderedDict()  # by the end of the cursor that holds the same
        self._lock = threading.Lock()
        self._pages, self._capabilities = self.options.pages and server.describe_enabled, self._capability_headers()

    def _capability_headers(self) -> list[tuple[str, str]]:
        """What every response says of this server (WIRE section 6); nothing of a feature that is off."""
        options = self.options
        encodings = supported_encodings() if options.compression_level is not None else ()
        sizes = ((MAX_REQUEST_BYTES_HEADER, options.max_request_bytes), (MAX_RESPONSE_BYTES_HEADER, options.max_response_bytes))
        return [(SUPPORTED_ENCODINGS_HEADER, ", ".join(encodings)), (EXTERNALIZATION_HEADER, "false"),
                (ACCEPT_MAX_RESPONSE_BYTES_SUPPORT_HEADER, "true"), *((n, str(size)) for n, size in sizes if size is not None)]

    # -- one request
    def __call__(self, request: HttpRequest) -> HttpResponse:
        """Answer *request*; never raises."""
        with self.server:
            response = self.respond(request)
        if not isinstance(response.body, bytes):
            response.body = b"".join(response.body) if isinstance(response.body, list) else _Joined(response.body)
        return response

    def respond(self, request: HttpRequest) -> HttpResponse:
        """Answer *request*, which the caller has counted as running until its answer is out. A body that is made as it is sent
        comes as lists of buffers, which are not joined."""
        request_id = clean_request_id(request.get_header(REQUEST_ID_HEADER)) or new_request_id()
        try:
            response = self._route(request, request_id)
        except _HttpFailure as exc:
            response = cast("HttpResponse", exc.args[0])
        except (_Refusal, StatusError) as exc:
            response = (_json_failure if _json_type(self, request) else _arrow_failure)(self, exc, request_id)
        except (TransportError, DeadlineExceededError) as exc:  # while the body was read
            response = dataclasses.replace(_refusal(408, "request_timeout", exc.error_message), close=True)
        except Exception:
            logger.exception("request %s failed", request_id)
            response = _internal_error(request_id)
        response.headers += [*self._capabilities, *self._cors_headers(request), (REQUEST_ID_HEADER, request_id)]
        return response

    def _cors_headers(self, request: HttpRequest) -> list[tuple[str, str]]:
        if not (allowed := self.options.cors_origins) or (origin := request.get_header("origin")) is None:
            return []
        if not (everyone := "*" in allowed) and origin not in allowed:
            return []
        exposed = ["WWW-Authenticate", REQUEST_ID_HEADER, CONTENT_ENCODING_HEADER, RPC_ERROR_HEADER, AUTH_REASON_HEADER]
        names = ", ".join([*exposed, *dict(self._capabilities)])
        headers = [("Access-Control-Expose-Headers", names), ("Access-Control-Allow-Origin", "*" if everyone else origin)]
        return headers if everyone else [*headers, ("Vary", "Origin")]

    def _preflight(self, request: HttpRequest) -> HttpResponse:
        headers = [("Allow", "GET, HEAD, POST, OPTIONS"), ("Cache-Control", "public, max-age=300")]
        if self._cors_headers(request) and request.get_header("access-control-request-method"):
            asked = request.get_header("access-control-request-headers") or "Content-Type"
            headers += [("Access-Control-Allow-Methods", "GET, POST, OPTIONS"), ("Access-Control-Max-Age", "7200"),
                        ("Access-Control-Allow-Headers", re.sub(r"[^A-Za-z0-9_, -]", "", asked))]
        return HttpResponse(200, [*headers, ("Content-Type", "text/plain")])

    def _route(self, request: HttpRequest, request_id: str) -> HttpResponse:
        if "call" in request.memory:
            return self._post(request, request_id, request.memory["call"].path)
        path, prefix = request.path, self.options.prefix
        if prefix and not f"{path}/".startswith(f"{prefix}/"):
            return self._not_found(request)
        path = path[len(prefix) :] or "/"
        if request.method == "OPTIONS":
            return self._preflight(request)
        if path == "/health":
            return self._health(request)
        if "%" in path or "//" in path or not path.isascii():
            return self._not_found(request)
        segments = path[1:].split("/")
        of_call = len(segments) > 1 and segments[0] and segments[2:] in ([], ["init"], ["exchange"])
        if request.method in ("GET", "HEAD"):
            service = self.server.services.get(segments[0])
            if of_call and service is not None and segments[1] in service.methods:
                return _method_not_allowed("POST")
            return _page_at(self, request, request_id, segments) or self._not_found(request)
        if not of_call:
            return self._not_found(request)
        return self._post(request, request_id, segments) if request.method == "POST" else _method_not_allowed("POST")

    def _post(self, request: HttpRequest, request_id: str, path: list[str]) -> HttpResponse:
        auth = self._authenticated(request, request_id)  # asked each time: what it decides may end, or depend on more
        head: _CallHead = request.memory.get("call") or self._head_of_call(request, path)
        caller = head.caller if head.caller.auth is auth else head.caller._replace(auth=auth)
        self.server.refuse_if_draining()
        self.server.start(TransportKind.HTTP)
        if request.multiprocess and self._own_key and len(path) == 3:
            text = "streams need one token key in all worker processes: set VGI_RPC_TOKEN_KEY or token_key="
            raise _protocol_error(text, 500, Code.FAILED_PRECONDITION)
        body: Any = _decoded_body(head.coding, request.read_body, self._limit)
        bound, step = self.server.method(self.server.service(path[0]), path[1]), path[2] if len(path) > 2 else ""
        streams = bound.info.method_type is MethodType.STREAM
        if (step and not streams) or (streams and not step and not head.json):
            hint = "not a stream; post without /" + step if step else "a stream; post to its /init"
            raise ProtocolError(f"{path[1]}() is {hint}")
        if head.json:
            return _post_json(self, bound, step, body, caller, head, request_id)
        return (self._exchange if step == "exchange" else self._begin)(bound, body, caller, head, request_id)

    def _head_of_call(self, request: HttpRequest, path: list[str]) -> _CallHead:
        """Check the head of a POST."""
        name, low, high = ACCEPT_MAX_RESPONSE_BYTES_HEADER, MIN_RESPONSE_BUDGET, MAX_RESPONSE_BUDGET
        given, limit = request.get_header(name), self.options.max_response_bytes
        if given is not None:
            fits = re.fullmatch("[1-9][0-9]{0,15}", given) and low <= int(given) <= high
            if name.lower() in request.repeated or not fits:
                raise ProtocolError(f"{name}: expected one decimal from {low} to {high}, got {given[:40]!r}")
            limit = _smallest(int(given), limit)
        if path[0].startswith("__"):
            self.server.service(path[0])  # a feature of other servers: what is wrong is that it is not there
        content_type, json_type = request.get_header("content-type") or "", _json_type(self, request)
        if not json_type and content_type.strip().lower() != ARROW_CONTENT_TYPE:
            raise _protocol_error(f"Content-Type: expected {ARROW_CONTENT_TYPE}, got {content_type[:100]!r}", 415)
        headers, asked = request.headers, request.get_header(MAX_TURNS_HEADER) or ""
        metadata = {k.decode(): headers[k.decode()] for k in TRACE_KEYS if k.decode() in headers}
        caller = Caller(TransportKind.HTTP, _ANONYMOUS, request.remote_addr, metadata, request.gone, limit, self.limits)
        coding = choose_encoding(headers.get(ACCEPT_ENCODING_HEADER.lower()), headers.get("accept-encoding", "")[:1000])
        turns = min(int(asked), MAX_TURNS) if re.fullmatch("[1-9][0-9]{0,8}", asked) else 1
        request.memory["call"] = head = _CallHead(path, json_type, _coding_of(headers), coding, turns, caller)
        return head

    # -- everything that is not a call
    def _not_found(self, request: HttpRequest) -> HttpResponse:
        if self._pages and "text/html" in (request.get_header("accept") or ""):
            there = f"This is an Arrow RPC server at {_text(self.options.prefix)}/"
            return _page(self, "404 Not Found", [f"<p>{there} and what you asked for is not there: see the links.</p>"], 404)
        return _refusal(404, "not_found", "expected /{protocol}/{method}[/init|/exchange] or /health")

    def _health(self, request: HttpRequest) -> HttpResponse:
        if request.method not in ("GET", "HEAD"):
            return _method_not_allowed("GET, HEAD, OPTIONS")
        facts = {"status": "draining" if self.server.draining else "ok", "server_id": self.server.server_id}
        return json_response(200, {**facts, "protocol": self.server.protocol_name}, [("Cache-Control", "no-store")])

    # -- who calls
    def _authenticated(self, request: HttpRequest, request_id: str) -> AuthContext:
        if self.options.authenticate is None:
            return _ANONYMOUS
        try:
            auth = self.options.authenticate(request)
            if not isinstance(auth, AuthContext):
                raise TypeError(f"authenticate: expected an AuthContext, got {_got(auth)}")
            return auth
        except (ValueError, PermissionError) as exc:
            raise _HttpFailure(self._unauthorized(request, exc)) from None
        except BaseException:
            logger.exception("authenticate raised; request %s is refused", request_id)
            raise _HttpFailure(_internal_error(request_id)) from None

    def _unauthorized(self, request: HttpRequest, exc: Exception) -> HttpResponse:
        reason = exc.reason if isinstance(exc, AuthFailure) else AuthReason.UNAUTHORIZED
        detail = _text_of(exc)[:1000]
        challenge = getattr(self.options.authenticate, "challenge", "") or "Bearer"
        headers = [(AUTH_REASON_HEADER, reason.value), ("Cache-Control", "no-store"), ("WWW-Authenticate", challenge)]
        if "text/html" in (request.get_header("accept") or ""):
            page = f"<!doctype html><title>401</title><h1>401 Unauthorized</h1><p>{_text(f'{reason}: {detail}')}</p>"
            return HttpResponse(401, [("Content-Type", "text/html; charset=utf-8"), *headers], page.encode())
        return json_response(401, {"error": "unauthorized", "reason": reason.value, "detail": detail}, headers)

    # -- calls
    def _reader(self, source: BufferSource) -> IpcReader:
        try:
            return IpcReader(source, IpcLimits(self._limit, self.options.max_rows), self.server.ipc_validation)
        except EOFError:
            raise IPCError("request: expected an Arrow IPC stream, got an empty body") from None

    def _read_request(self, bound: BoundMethod, body: bytes) -> Request:
        """Read the request that begins a call of *bound*."""
        known = self.server.recall(body, 0) if isinstance(body, bytes) else None
        if known is not None and known[0] is bound and known[2] == len(body):
            return known[1]
        source = BufferSource(body)
        request = Request(self._reader(source))
        if source.left:
            raise IPCError(f"request: {source.left} bytes after the end of the stream")
        self.server.resolve(request, (bound.hosted.name, bound.info.name))
        return request

    def _begin(self, bound: BoundMethod, body: bytes, caller: Caller, head: _CallHead, request_id: str) -> HttpResponse:
        """Serve a unary call, or the start of a stream."""
        request = self._read_request(bound, body)
        arguments = read_arguments(bound.info, request)
        call = self.server.open_call(bound, caller, request, request.request_id or request_id)
        call.note(request_bytes=len(body))
        def answer() -> HttpResponse:
            turn = call.begin(arguments)
            if call.stream is None:
                return self._respond(call, head, turn)
            header = stream_bytes(turn.schema, turn.items) if turn.items else b""
            return self._respond_turns(*self._first_turn(call, call.stream, header), head)
        return self._ending(call, answer)

    def _first_turn(self, call: Call, stream: Stream[Any, Any], header: bytes = b"") -> tuple[_StreamAnswer, Turn]:
        """Seal what does not change of a stream, then run a producer's first turn."""
        schema = stream.output_schema
        answer = _StreamAnswer(call, self._binding(call.bound, call.caller.auth), os.urandom(16), _PLAIN_TICK, header)
        try:
            answer = answer._replace(call_token=self._seal_call(answer, stream))
        except Exception as exc:  # before the producer runs: a stream that cannot go on does not start
            return answer, call._failed(schema, exc)
        return answer, call.turn(_PLAIN_TICK) if stream.is_producer else Turn(schema, call._logs(schema), False)

    def _exchange(self, bound: BoundMethod, body: bytes, caller: Caller, head: _CallHead, request_id: str) -> HttpResponse:
        """Serve one turn of a stream, or its end, from the tokens that come with the input."""
        source = BufferSource(body)
        reader = self._reader(source)
        item = reader.next()
        if item is None or reader.next_message() is not None or source.left:
            raise ProtocolError(f"exchange: expected one batch and the end of the stream, got {'more' if item else 'none'}")
        batch, metadata = item[0], item[1] or {}
        opened, state = self._open_tokens(bound, caller.auth, metadata)
        own_id = clean_request_id(metadata.get(REQUEST_ID_KEY, b"").decode("latin-1"))
        call = self._go_on(bound, caller, opened, own_id or request_id)
        if (timeout := read_timeout(metadata)) is not None:
            call.deadline = time.monotonic() + timeout
        call.note(request_bytes=len(body))
        shown = {k: v for k, v in metadata.items() if k not in _OUR_KEYS}
        given = AnnotatedBatch(batch, pa.KeyValueMetadata(shown) if shown else None)
        turn = functools.partial(self._next_turn, call, opened, state, given, CANCEL_KEY in metadata)
        return self._ending(call, lambda: self._respond_turns(*turn(), head))

    @staticmethod
    def _ending(call: Call, answer: Callable[[], HttpResponse]) -> HttpResponse:
        """Return an answer and end the call, unless the answer's body is still to be made, and ends it."""
        whole = True
        try:
            response = answer()
            whole = isinstance(response.body, (bytes, list))
            return response
        finally:
            if whole:
                call.end()

    def _go_on(self, bound: BoundMethod, caller: Caller, opened: _OpenedCall, request_id: str) -> Call:
        if opened.limit is not None and opened.limit != caller.response_limit_bytes:
            caller = caller._replace(response_limit_bytes=_smallest(caller.response_limit_bytes, opened.limit))
        call = self.server.open_call(bound, caller, None, request_id)
        call.note(opened.stream_id)
        return call

    def _next_turn(self, call: Call, opened: _OpenedCall, state: Callable[[], StreamState], given: AnnotatedBatch,
                   cancel: bool) -> tuple[_StreamAnswer, Turn]:
        answer, schema = _StreamAnswer(call, opened.binding, opened.call_id, given), opened.output_schema
        try:
            self._revive(call, opened, state)
        except BaseException as exc:  # rehydrate() and bind_call_state() are the application's: what they raise is an answer
            return answer, call._failed(schema, exc, refused=isinstance(exc, TokenError))
        if cancel:
            call.cancel()
            return answer, Turn(schema, call._logs(schema), True)
        return answer, call.turn(given)

    def _respond_turns(self, answer: _StreamAnswer, turn: Turn, head: _CallHead) -> HttpResponse:
        """Answer with a turn and, if the client takes several of a producer, with those that follow; these end the call."""
        if head.turns == 1 or turn.finished or not cast("Stream[Any, Any]", answer.call.stream).is_producer:
            return self._respond(answer.call, head, self._with_cursor(answer, turn), answer.header)
        body = self._several(answer, turn, head.turns)
        next(body)  # has taken over: from here on closing it ends the call
        return HttpResponse(200, [("Content-Type", ARROW_CONTENT_TYPE), ("X-Accel-Buffering", "no")], body)  # for nginx

    def _several(self, answer: _StreamAnswer, turn: Turn, most: int) -> Iterator[list[_Buffer]]:
        """Yield nothing, then each turn as it is made, and the token at the end: within the budget, *most* and a time."""
        call, data, sent, state = answer.call, list[_Buffer]([answer.header]), 0, None
        writer, limit = IpcWriter(lambda pieces: data.extend(pieces), turn.schema), call.caller.response_limit_bytes
        until, allowed = time.monotonic() + MAX_TURNS_SECONDS, call.deadline and call.deadline - call.started
        with contextlib.ExitStack() as ending, self.server:
            ending.callback(call.end)
            yield []
            for left in reversed(range(most)):
                before, size, close = state, 0, False
                writer.write_all(turn.items, close=turn.finished)
                try:
                    state = None if turn.finished else self._remember(answer)
                    close = not left or self.server.draining or time.monotonic() > until
                    if (limit is not None and 4 * (sent + _total(data)) > limit) or not before or close:
                        size = 4096 + len(answer.call_token) + 2 * len(state()) if state else 0
                except Exception as exc:
                    turn, state = call._failed(turn.schema, exc), None
                    writer.write_all(turn.items, close=True)
                full = limit is not None and sent + _total(data) + size > limit
                if full and before:  # it will be the first of the next answer, made again
                    data, state = [], before
                if state and (full or close):
                    turn = self._cursor_turn(answer, state)
                    writer.write_all(turn.items, close=True)
                if limit is not None and sent + _total(data) > limit:
                    turn = _answer_too_large(call, _total(data), limit)
                    data = [stream_bytes(turn.schema, turn.items)]
                sent += _total(data)
                call.note(http_status=200, response_bytes=sent)
                yield data
                if turn.finished:
                    return
                data, call.deadline = [], allowed and time.monotonic() + allowed
                turn = call.turn(answer.given)

    def _remember(self, answer: _StreamAnswer) -> Callable[[], bytes]:
        """Return what gives the cursor's content for the state as it is now; where a copy will do, nothing is written yet."""
        state = cast("Stream[Any, Any]", answer.call.stream).state
        if {type(v) for v in dataclass_codec(cast("Any", type(state))).values(state)} <= _IMMUTABLE:
            return functools.partial(self._state_content, answer, copy.copy(state))
        content = self._state_content(answer, state)
        return lambda: content

    # -- the two halves of a stream's state
    @staticmethod
    def _binding(bound: BoundMethod, auth: AuthContext) -> tuple[bytes, ...]:
        who = (auth.domain or "", auth.principal or "") if auth.authenticated else ("", "")
        return _encoded(bound.hosted.name, bound.info.name, *who)

    def _seal_call(self, answer: _StreamAnswer, stream: Stream[Any, Any]) -> bytes:
        limit, fixed, kind = answer.call.caller.response_limit_bytes, stream.call_state, stream.state.CALL_STATE_TYPE
        if fixed is not None and (kind is None or not isinstance(fixed, kind)):
            wanted = "CALL_STATE_TYPE, which is not set" if kind is None else kind.__name__
            raise ParameterError(f"{type(stream.state).__name__}: Stream(call_state=...): expected {wanted}, got {_got(fixed)}")
        call_state = fixed.serialize_to_bytes() if fixed is not None else b""
        schemas = _serialized(stream.output_schema), _serialized(stream.input_schema)
        rest = call_state, answer.call.stream_id.encode(), b"" if limit is None else str(limit).encode()
        return self.sealer.seal(b"call", (*answer.binding, answer.call_id), pack_parts((answer.call_id, *schemas, *rest)))

    @staticmethod
    def _state_content(answer: _StreamAnswer, state: Any) -> bytes:
        """What a cursor seals; raises what the state's serialisation does."""
        bound = answer.call.bound
        if type(state) not in bound.state_types:
            names = ", ".join(t.__name__ for t in bound.state_types) or "no concrete class"
            text = f"expected {names} (from the implementation's return annotation), got {type(state).__name__}"
            raise ParameterError(f"{bound.info.name}() state: {text}; over HTTP the state is read back as the annotated class")
        return pack_parts((answer.call_id, bytes([bound.state_types.index(type(state))]), state.serialize_to_bytes()))

    def _tokens(self, answer: _StreamAnswer, content: bytes) -> dict[bytes, bytes]:
        tokens = {STATE_KEY: self.sealer.seal(b"state", answer.binding, content)}
        return {**tokens, CALL_STATE_KEY: answer.call_token} if answer.call_token else tokens

    def _cursor_turn(self, answer: _StreamAnswer, content: Callable[[], bytes]) -> Turn:
        """What ends an answer whose stream goes on; an error if its state cannot be sealed."""
        schema = cast("Stream[Any, Any]", answer.call.stream).output_schema
        try:
            return Turn(schema, [(empty_batch(schema), self._tokens(answer, content()))], True)
        except Exception as exc:
            return answer.call._failed(schema, exc)

    def _with_cursor(self, answer: _StreamAnswer, turn: Turn) -> Turn:
        """Add the fresh cursor to a turn that goes on; a state that cannot be sealed turns it into an error."""
        if turn.finished:
            return turn
        stream: Any = answer.call.stream
        try:
            tokens = self._tokens(answer, content := self._state_content(answer, stream.state))
        except Exception as exc:
            return answer.call._failed(stream.output_schema, exc)
        # Kept, so that its next turn in this process need not read it back; only a state that is nothing but its serialised
        # fields, of types that hold every value (float32, say, does not): it cannot differ from what reading back would give.
        cursor, state, codec = tokens[STATE_KEY], stream.state, dataclass_codec(type(stream.state))
        alike = codec.row.plan is not None and getattr(state, "__dict__", {}).keys() == codec.names
        if alike and len(content) <= _MAX_LIVE_BYTES:  # a cursor may be packed
            live = _LiveState(cursor, answer.binding, self.sealer.clock(), answer.call_id, state)
            with self._lock:
                self._live[cursor[-_MAC_TEXT_BYTES:]] = live
                if len(self._live) > _MAX_LIVE_STATES:
                    self._live.popitem(last=False)
        if stream.is_producer or turn.data_index is None:
            return Turn(turn.schema, [*turn.items, (empty_batch(stream.output_schema), tokens)], False)
        *logs, (batch, metadata) = turn.items
        return Turn(turn.schema, [*logs, (batch, {**(metadata or {}), **tokens})], False)

    def _open_tokens(self, bound: BoundMethod, auth: AuthContext,
                     metadata: _Metadata) -> tuple[_OpenedCall, Callable[[], StreamState]]:
        """Open the cursor, then the call half whose id it holds; return that and what gives the state."""
        binding, cursor = self._binding(bound, auth), metadata.get(STATE_KEY, b"")
        with self._lock:
            live = self._live.pop(cursor[-_MAC_TEXT_BYTES:], None)  # for one turn only: the next one may change it
        state: Callable[[], StreamState]
        if live is not None and live.cursor == cursor and live.binding == binding:  # what we have sealed, to the last byte
            self.sealer.check_age(live.issued)
            call_id, state = live.call_id, live.copy
        else:
            call_id, index, content = unpack_parts(self.sealer.open(b"state", binding, cursor), 3)
            if len(index) != 1 or index[0] >= len(bound.state_types):
                raise TokenError(_TOKEN_REFUSED)  # sealed by a version of the service that had other states
            read = cast("type[StreamState]", bound.state_types[index[0]]).deserialize_from_bytes
            state = functools.partial(read, content, IpcValidation.NONE)  # our own bytes: the seal vouches for them
        return self._open_call(binding, call_id, metadata.get(CALL_STATE_KEY, b"")), state

    def _open_call_token(self, binding: tuple[bytes, ...], call_id: bytes, token: bytes) -> _OpenedCall:
        content = self.sealer.open(b"call", (*binding, call_id), token, aged=False)
        _, output, input_, call_state, stream_id, limit = unpack_parts(content, 6)
        schemas = _schema_from_bytes(output), _schema_from_bytes(input_)
        return _OpenedCall(binding, call_id, *schemas, call_state, stream_id.decode(), int(limit) if limit else None)

    def _revive(self, call: Call, opened: _OpenedCall, read: Callable[[], StreamState]) -> None:
        call_state = None
        try:
            state = read()
            if opened.call_state:
                if state.CALL_STATE_TYPE is None:
                    raise TokenError(_TOKEN_REFUSED)
                call_state = state.CALL_STATE_TYPE.deserialize_from_bytes(opened.call_state, IpcValidation.NONE)
        except _Refusal as exc:  # sealed by a version of the service whose state was another
            raise TokenError(_TOKEN_REFUSED) from exc
        if type(state).rehydrate is not StreamState.rehydrate:
            call._run(state.rehydrate, call.bound.hosted.implementation)
        if call_state is not None:
            call._run(state.bind_call_state, call_state)
        call.stream = Stream(opened.output_schema, state, opened.input_schema, call_state=call_state)

    def _respond(self, call: Call, head: _CallHead, turn: Turn, lead: bytes = b"") -> HttpResponse:
        """Put *lead* and a turn's bytes into a response: budget first, then coding."""
        limit, pieces = call.caller.response_limit_bytes, list[_Buffer]([lead])
        write_stream(pieces.extend, turn.schema, turn.items)
        size = _total(pieces)
        if limit is not None and size > limit:
            turn = _answer_too_large(call, size, limit)
            pieces = [stream_bytes(turn.schema, turn.items)]
        headers = [("Content-Type", ARROW_CONTENT_TYPE), *([(RPC_ERROR_HEADER, "true")] if turn.error is not None else [])]
        encoding, header, identity = head.answer_coding
        if encoding and (level := self.options.compression_level) is not None:
            token = (turn.items[-1][1] or {}).get(STATE_KEY, b"") if identity and turn.items else b""
            if identity:
                packed = compress_if_worth(pieces, encoding, level, len(token))
            else:
                packed = compress_body(b"".join(pieces), encoding, level)
            if packed is not None:
                pieces = [packed]
                headers.append((header, encoding))
        size = _total(pieces)
        call.note(http_status=turn.status, response_bytes=size)
        return HttpResponse(turn.status, headers, pieces if size > SMALL_BODY_BYTES else b"".join(pieces))

@functools.lru_cache(maxsize=1024)
def _encoded(*texts: str) -> tuple[bytes, ...]:
    return tuple([text.encode() for text in texts])

def _arrow_failure(app: HttpApp, exc: BaseException, request_id: str) -> HttpResponse:
    body = stream_bytes(EMPTY_SCHEMA, [app.server.error_item(exc, EMPTY_SCHEMA, request_id)])
    status = getattr(exc, "http_status", 200)
    further = {200: [(RPC_ERROR_HEADER, "true")], 503: [("Retry-After", "1")]}.get(status, [])
    return HttpResponse(status, [("Content-Type", ARROW_CONTENT_TYPE), *further], body)

def _answer_too_large(call: Call, size: int, limit: int) -> Turn:
    text = f"{call.bound.info.name}(): the answer exceeds max_response_bytes ({size} > {limit})"
    return call._failed(EMPTY_SCHEMA, ResponseTooLargeError(text))

def _smallest(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)

_REASONS = {
    100: "Continue", 200: "OK", 204: "No Content", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict", 411: "Length Required", 413: "Content Too Large",
    414: "URI Too Long", 415: "Unsupported Media Type", 429: "Too Many Requests", 431: "Request Header Fields Too Large",
    500: "Internal Server Error", 501: "Not Implemented", 503: "Service Unavailable", 505: "HTTP Version Not Supported",
}  # fmt: skip

@_takes_options(HttpOptions)
def make_wsgi_app(server: RpcServer, **options: Any) -> Callable[..., Iterable[bytes]]:
    """Return a WSGI application (PEP 3333) for any WSGI server; the keywords are those of `HttpOptions`. Raises ``TypeError``
    for an option that does not exist, ``ValueError`` for one that is out of range."""
    app = HttpApp(server, *_split_options(options, HttpOptions))
    def wsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        app.scheme = environ.get("wsgi.url_scheme", "http")
        response = app(_request_from_environ(environ))
        body: Any = response.body
        if isinstance(body, bytes):
            response.headers.append(("Content-Length", str(len(body))))
            body = iter([body] if environ["REQUEST_METHOD"] != "HEAD" else [])
        start_response(f"{response.status} {_REASONS.get(response.status, 'Status')}", response.headers)
        return cast("Iterable[bytes]", body)
    wsgi.app = app  # type: ignore[attr-defined]
    return wsgi

def _request_from_environ(environ: dict[str, Any]) -> HttpRequest:
    given = {k.removeprefix("HTTP_"): v for k, v in environ.items() if k.startswith("HTTP_")}
    given |= {k: environ[k] for k in ("CONTENT_TYPE", "CONTENT_LENGTH") if environ.get(k)}
    headers = {k.replace("_", "-").lower(): v for k, v in given.items()}
    def read_body(limit: int) -> bytes:
        length = environ.get("CONTENT_LENGTH") or ""
        unknown = not length and environ.get("wsgi.input_terminated")  # chunked, decoded by the server under us
        size = limit + 1 if unknown else _content_length(length, limit)
        body: bytes = environ["wsgi.input"].read(size)
        if unknown and len(body) > limit:
            raise _too_large(limit, "more")
        if not unknown and len(body) < size:
            raise IPCError(f"request body: expected {size} bytes, got {len(body)}")
        return body
    raw = environ.get("RAW_URI") or environ.get("REQUEST_URI") or ""
    path = raw.partition("?")[0] if raw.startswith("/") else environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    remote, several = environ.get("REMOTE_ADDR", ""), bool(environ.get("wsgi.multiprocess"))
    return HttpRequest(environ["REQUEST_METHOD"], path, headers, remote, read_body, multiprocess=several)

def _too_large(limit: int, got: object, rule: str = "max_request_bytes") -> RequestTooLargeError:
    return RequestTooLargeError(f"body: expected at most {limit} bytes ({rule}), got {got}")

def _content_length(text: str, limit: int, rule: str = "max_request_bytes") -> int:
    """Parse a Content-Length strictly: ASCII digits only (RFC 9110 section 8.6), and within the limit that *rule* names."""
    if not text:
        raise _protocol_error("expected a Content-Length", 411)
    if not (text.isascii() and text.isdigit()):
        raise ProtocolError(f"Content-Length: expected decimal digits, got {text[:40]!r}")
    if len(text) > 18 or int(text) > limit:
        raise _too_large(limit, text[:40], rule)
    return int(text)

class HttpHead(NamedTuple):
    """A parsed message head."""
    start: tuple[str, str, str]  # the three parts of the request line or status line
    headers: dict[str, str]  # by lower-case name; the values of a repeated one are joined by ", "
    repeated: frozenset[str]  # names that came more than once
    memory: dict[str, Any]  # what was found out of it; `HeadReader` hands it on to heads that differ in `_VARYING` alone

_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")

def _header(line: bytes) -> tuple[str, str]:
    """One header line as (lower-case name, value)."""
    match = _HEADER_LINE.fullmatch(line)
    if match is None:
        raise ProtocolError(f"{'a folded header line' if line[:1] in (b' ', bytes([9])) else 'not a header line'}: {line[:80]!r}")
    return match[1].decode().lower(), match[2].decode("latin-1").rstrip(" \t")

_short_header = functools.lru_cache(maxsize=512)(_header)

def parse_http_head(raw: bytes) -> HttpHead:
    """Parse a head that ends with an empty line, strictly by RFC 9112; raises `ProtocolError`, which names the broken rule."""
    lines = raw[:-4].split(b"\r\n")
    if len(lines) > MAX_HEADERS + 1:
        raise _protocol_error(f"expected at most {MAX_HEADERS} headers, got {len(lines) - 1}", 431)
    if not raw.count(b"\r\n") == raw.count(b"\n") == raw.count(b"\r"):
        raise ProtocolError("a bare CR or LF in the head")
    start = lines[0].decode("latin-1").split(" ", 2)
    if len(start) != 3:
        raise ProtocolError(f"expected a start line of three parts, got {lines[0][:80]!r}")
    headers, repeated = dict[str, str](), set[str]()
    for line in lines[1:]:
        # The same lines come again and again; what may be a secret is not kept.
        short = len(line) < 100 and not line.lower().startswith((b"auth", b"proxy-auth", b"cookie", b"x-"))
        name, value = (_short_header if short else _header)(line)
        if name in headers:
            repeated.add(name)
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return HttpHead((start[0], start[1], start[2]), headers, frozenset(repeated), {})

# How the heads of one connection end, ours and many others; what is in front of it stays the same from call to call.
_VARYING = re.compile(
    rb"(?<=\r\n)(?:X-Request-ID: ([!-~]{1,128})\r\n)?(?:Date: ([A-Z][ -~]{1,40}[A-Z])\r\n)?Content-Length: ([0-9]{1,18})\r\n\r\n"
)
_VARYING_NAMES = ("x-request-id", "date", "content-length")
_KEPT_HEAD_BYTES = 8_192  # of each connection, at most


class HeadReader:
    """Reads the heads of the messages on *channel*."""
    def __init__(self, channel: SocketChannel) -> None:
        self.channel = channel
        self._lead, self._known = b"\n", HttpHead(("", "", ""), {}, frozenset(), {})  # of the last head; at first of none
        self._last: tuple[bytes, HttpHead] = b"", self._known

    def read(self) -> HttpHead | None:
        """Read one head; ``None`` when the channel ends before its first byte, `TransportError` when it ends in the middle.
        Raises `ProtocolError` when a rule of the grammar or a bound (``MAX_HEAD_BYTES``, ``MAX_HEADERS``) is broken."""
        raw = self.channel.read_until(b"\r\n\r\n", MAX_HEAD_BYTES)
        if raw is None and not (seen := self.channel.peek()):
            return None
        if raw is None and len(seen) >= MAX_HEAD_BYTES:
            raise _protocol_error(f"the head exceeds {MAX_HEAD_BYTES} bytes", 414 if b"\r\n" not in seen else 431)
        if raw is None:
            raise TransportError("the connection was closed in the middle of a head")
        if raw != self._last[0]:
            varying = _VARYING.fullmatch(raw, len(self._lead)) if raw.startswith(self._lead) else None
            head = self._parsed(raw) if varying is None else self._changed(varying)
            self._last = raw if len(raw) <= _KEPT_HEAD_BYTES else b"", head
        return self._last[1]

    def _changed(self, varying: re.Match[bytes]) -> HttpHead:
        start, fixed, repeated, memory = self._known
        request_id, date, length = varying.groups()
        headers = {**fixed, "content-length": length.decode()}
        if request_id is not None:
            headers["x-request-id"] = request_id.decode()
        if date is not None:
            headers["date"] = date.decode()
        return HttpHead(start, headers, repeated, memory)

    def _parsed(self, raw: bytes) -> HttpHead:
        head, varying = parse_http_head(raw), _VARYING.search(raw)
        fixed = {n: v for n, v in head.headers.items() if n not in _VARYING_NAMES}
        lines = raw.count(b"\n") - 2
        # No line in front of the varying ones has their names, and there is room for all of these.
        alone = varying is not None and len(fixed) + sum(v is not None for v in varying.groups()) == lines
        if varying and alone and lines < MAX_HEADERS - 2 and len(raw) <= _KEPT_HEAD_BYTES:
            self._lead, self._known = raw[: varying.start()], head._replace(headers=fixed)
        return head

def read_chunked(channel: ByteChannel, limit: int, rule: str = "max_request_bytes") -> Generator[Any, memoryview | None, None]:
    """Yield the pieces of a chunked body (RFC 9112 section 7.1); trailers are read and dropped. When it was sent a memoryview,
    the next piece goes there, and its length is yielded.
    Raises `ProtocolError` for wrong framing, `RequestTooLargeError` beyond *limit* bytes, which *rule* names."""
    total, at_once, view = 0, _RECEIVE_BYTES, None
    while True:
        line = channel.read_until(b"\r\n", 1024, at_once)
        match = re.fullmatch(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n", line or b"")
        if match is None:
            raise ProtocolError(f"chunk: expected a size in hexadecimal digits, got {(line or channel.peek())[:40]!r}")
        size = int(match[1], 16)
        total += size
        if total > limit:
            raise _too_large(limit, f"at least {total}", rule)
        if not size:
            break
        at_once = 1024 if size > _RECEIVE_BYTES else _RECEIVE_BYTES  # the next large chunk's data is received in its place
        while size:
            piece = channel.read_some(size) if view is None else channel.read_into(view[:size])
            got = len(piece) if isinstance(piece, bytes) else piece
            if not got:
                raise ProtocolError("chunk: it ends before its data")
            size -= got
            view = yield piece
        if channel.read_until(b"\n", 2, at_once) != b"\r\n":
            raise ProtocolError("chunk: its data is not followed by CR LF")
    trailers = (channel.read_until(b"\r\n", 8192) for _ in range(MAX_HEADERS))
    if next((line for line in trailers if line in (b"\r\n", None)), None):
        return
    raise ProtocolError("chunk: trailers that do not end")

def _gathered(pieces: Iterable[bytes]) -> bytes:
    """Join pieces at the cost of their bytes alone: a body in chunks of one byte must not cost an object for each."""
    whole = io.BytesIO()
    whole.writelines(pieces)
    return whole.getvalue()

def _read_sized(channel: ByteChannel, size: int) -> bytes:
    body = channel.read_after(b"", size)
    if len(body) < size:
        raise TransportError(f"half a body: expected {size} bytes, got {len(body)}")
    return cast("bytes", body)


class _HttpConnection:
    """Serves the requests of one connection: reads strictly, answers, closes when the framing is in doubt."""
    def __init__(self, owner: HttpServing, channel: SocketChannel, remote_addr: str, only_health: bool) -> None:
        self._app, self._options, self._channel, self._remote = owner.app, owner.options, channel, remote_addr
        self._heads, self._only_health = HeadReader(channel), only_health  # beyond the cap: one request, and soon
        self._wait = _OVER_CAP_WAIT_SECONDS if only_health else self._options.read_timeout
        self._unread = False  # of the current request, a body that must not be taken for the next one

    def run(self) -> None:
        """Serve until either side closes."""
        try:
            while self._wait_for_request() and self._serve_one():
                self._wait = self._options.keep_alive_timeout
            if self._unread:
                self._linger()
        except (TransportError, DeadlineExceededError) as exc:
            logger.info("connection from %s ended early: %s", self._remote, exc.error_message)

    def _wait_for_request(self) -> bool:
        self._channel.gap, self._channel.deadline = None, time.monotonic() + self._wait
        try:
            return bool(self._channel.peek()) or self._channel._fill()
        except (TransportError, DeadlineExceededError):
            return False  # between two requests, leaving is nobody's fault

    def _serve_one(self) -> bool:
        channel, options, started = self._channel, self._options, time.monotonic()
        channel.gap = options.read_timeout
        channel.deadline = started + min(self._wait, options.read_timeout)  # for the whole head: a byte a second does not pass
        head: HttpHead | None = None
        self._unread = True
        try:
            if not channel.peek()[:1].isalpha():
                raise ProtocolError("expected an HTTP request line")
            head = self._heads.read()
            if head is None:
                return False
            path, keep = head.memory.get("asked") or self._check(head)
        except ProtocolError as exc:
            further = [(REQUEST_ID_HEADER, new_request_id()), *self._app._capabilities]
            response = _refusal(exc.http_status, "bad_request", str(exc), *further)
            self._send(response, head.start[0] if head else "GET", keep=False)
            return False
        self._unread = "transfer-encoding" in head.headers or head.headers.get("content-length", "0") != "0"
        read = functools.partial(self._read_body, head.headers, started + options.request_deadline)
        headers = head.headers.copy()  # the next head may be the same one
        method, gone = head.start[0], channel.peer_gone
        request = HttpRequest(method, path, headers, self._remote, read, head.repeated, gone, memory=head.memory)
        with self._app.server:  # until the answer is out: a server that drains must not exit before
            return self._answer(request, keep, head.start[2] == "HTTP/1.1")

    def _answer(self, request: HttpRequest, keep: bool, takes_chunks: bool) -> bool:
        """Answer one request; return whether the connection goes on, which it may if *keep*."""
        options = self._options
        if self._only_health and not request.path.endswith("/health"):
            text = f"this server takes {options.max_connections} at a time"
            response = _refusal(503, "too_many_connections", text, ("Retry-After", "1"), *self._app._capabilities)
        else:
            response = self._app.respond(request)
        self._channel.deadline = time.monotonic() + options.request_deadline
        keep = keep and not (self._unread or self._only_health or response.close or self._app.server.draining)
        if not takes_chunks and not isinstance(response.body, (bytes, list)):
            response.body = b"".join(_Joined(response.body))
        self._send(response, request.method, keep)
        return keep

    def _linger(self) -> None:
        """Read on for a moment before closing: closing on unread bytes resets the connection, and the answer is lost."""
        self._channel.deadline = time.monotonic() + _LINGER_SECONDS
        with contextlib.suppress(OSError, TransportError, DeadlineExceededError):
            self._channel.socket.shutdown(socket.SHUT_WR)
            while self._channel._fill():
                pass

    @staticmethod
    def _check(head: HttpHead) -> tuple[str, bool]:
        """Check what RFC 9112 asks of a request's head; return its path, and whether the connection may be kept."""
        (method, target, version), headers, newest = head.start, head.headers, head.start[2] == "HTTP/1.1"
        coding, length = headers.get("transfer-encoding", ""), headers.get("content-length", "0")
        coded, sized = "transfer-encoding" in headers, "content-length" in headers
        twice = " and ".join(sorted(head.repeated & {"content-length", "host", "transfer-encoding", "authorization"}))
        for wrong, status, text in (
            (not re.fullmatch(r"HTTP/[0-9](\.[0-9])?", version), 400, f"expected HTTP/1.1, got {version[:40]!r}"),
            (version not in ("HTTP/1.1", "HTTP/1.0"), 505, f"expected HTTP/1.1, got {version[:40]!r}"),
            (not re.fullmatch(r"[A-Z]{1,20}", method), 400, f"not a method: {method[:40]!r}"),
            (target[0:1] != "/" and (target, method) != ("*", "OPTIONS"), 400, "the request target must be a path"),
            (len(target) > 8192, 414, "the request target exceeds 8192 bytes"),
            (re.search(r"[\x00-\x20\x7f]", target), 400, "a control character in the request target"),
            (twice, 400, f"two {twice} headers"),
            (newest and "host" not in headers, 400, "HTTP/1.1 requires a Host header"),
            (coded and sized, 400, "both Transfer-Encoding and Content-Length"),
            (coded and not newest, 400, "both Transfer-Encoding and HTTP/1.0"),
            (coded and coding.lower() != "chunked", 501, f"Transfer-Encoding: expected chunked, got {coding[:40]!r}"),
            (not (length.isascii() and length.isdigit()), 400, f"Content-Length: expected decimal digits, got {length[:40]!r}"),
            (method == "POST" and not coded and not sized, 411, "POST requires a Content-Length"),
        ):
            if wrong:
                raise _protocol_error(text, status)
        tokens = [t.strip().lower() for t in headers.get("connection", "").split(",")]
        head.memory["asked"] = asked = target.partition("?")[0], "close" not in tokens and (newest or "keep-alive" in tokens)
        return asked

    def _read_body(self, headers: Mapping[str, str], deadline: float, limit: int) -> bytes:
        channel, chunked = self._channel, "transfer-encoding" in headers
        channel.deadline = deadline
        size = 0 if chunked else _content_length(headers.get("content-length", ""), limit)
        if "expect" in headers and headers["expect"].lower() == "100-continue":
            channel.write([b"HTTP/1.1 100 Continue\r\n\r\n"])
        body = _gathered(read_chunked(channel, limit)) if chunked else _read_sized(channel, size)
        self._unread = False
        return body

    def _send(self, response: HttpResponse, method: str, keep: bool) -> None:
        body = [response.body] if isinstance(response.body, bytes) else response.body
        lines = [f"HTTP/1.1 {response.status} {_REASONS.get(response.status, 'Status')}"]
        lines += [] if keep else ["Connection: close"]
        lines += [f"{name}: {value}" for name, value in response.headers]
        lines.append(f"Date: {_http_date(int(time.time()))}")
        lines.append(f"Content-Length: {_total(body)}" if isinstance(body, list) else "Transfer-Encoding: chunked")
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")
        if method == "HEAD" or isinstance(body, list):
            self._channel.write([head] if method == "HEAD" else [head, *cast("list[_Buffer]", body)])
        else:
            with contextlib.closing(cast("Any", body)):
                for piece in filter(None, body):
                    self._channel.deadline = time.monotonic() + self._options.request_deadline  # making it took its own time
                    self._channel.write([head, b"%x\r\n" % _total(piece), *piece, b"\r\n"])
                    head = b""
                self._channel.write([head, b"0\r\n\r\n"])

@functools.lru_cache(maxsize=2)
def _http_date(second: int) -> str:
    t = time.gmtime(second)  # by hand, as strftime speaks the locale's language, and email.utils takes 10 ms to import
    day, month = "MonTueWedThuFriSatSun"[3 * t.tm_wday :][:3], "JanFebMarAprMayJunJulAugSepOctNovDec"[3 * t.tm_mon - 3 :][:3]
    return f"{day}, {t.tm_mday:02} {month} {t.tm_year} {t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02} GMT"

@dataclass
class HttpServeOptions:
    """What `serve_http` can be told beside `HttpOptions`; times in seconds."""
    tls_context: Any = None  # server-side context of the standard library's ssl; None for plain HTTP
    max_connections: int = 512  # at most so many at a time; further ones are answered 503, except for health
    read_timeout: float = READ_TIMEOUT_SECONDS  # for a head, and between two reads of a body
    request_deadline: float = REQUEST_DEADLINE_SECONDS  # for reading one request, and for sending its answer
    keep_alive_timeout: float = 75.0  # how long a connection is kept between two requests
    drain_grace_seconds: float = DRAIN_GRACE_SECONDS  # how long running calls may take after SIGTERM or SIGINT
    idle_timeout: float | None = None  # without a connection for so long, it ends; None for never
    on_bound: Callable[[str, int], None] | None = None  # called with host and port once connections are accepted

_OVER_CAP_CONNECTIONS, _OVER_CAP_WAIT_SECONDS = 512, 1.0  # so many beyond the cap may still ask for health, if this soon
_LINGER_SECONDS = 1.0
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class HttpServing:
    """An HTTP server on a bound socket (`port`): a thread per connection, a cap on them, a clean stop; raises ``OSError``."""
    def __init__(self, app: HttpApp, host: str, port: int, options: HttpServeOptions | None = None) -> None:
        self.app, self.host, self.options = app, host, options or HttpServeOptions()
        app.scheme = "https" if self.options.tls_context is not None else "http"
        tls = {"tls_handshake_timeout": TLS_HANDSHAKE_SECONDS} if app.scheme == "https" else {}
        app.limits |= limits_of({**vars(self.options), **tls, "max_head_bytes": MAX_HEAD_BYTES, "max_headers": MAX_HEADERS})
        listening = listen_tcp(host, port)
        self.port = listening.getsockname()[1]
        self.listener = Listener(listening, self._handle, threaded=True, idle_timeout=self.options.idle_timeout)
        if app.options.authenticate is None and not re.fullmatch(r"localhost|127\..*|::1", host):
            logger.warning("serving HTTP on %s port %d without authentication: whoever reaches it may call it", host, self.port)

    def _handle(self, connected: socket.socket, address: Any) -> None:
        over = len(self.listener._connections) - self.options.max_connections
        try:
            if over > _OVER_CAP_CONNECTIONS:
                connected.settimeout(_OVER_CAP_WAIT_SECONDS)
                connected.sendall(_BUSY)
                return
            ready = _start_tls(connected, self.options.tls_context)
        except OSError as exc:
            logger.debug("connection from %s: %s", _address_text(address), exc)
            return
        with ready:
            _HttpConnection(self, SocketChannel(ready), _address_text(address), over > 0).run()

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or `stop`; then drain and close."""
        options = self.options
        run_listener(self.app.server, self.listener, options.drain_grace_seconds, options.on_bound, self.host, self.port)

    def stop(self) -> None:
        """Have `run` return; from any thread."""
        self.listener.stop()

@_takes_options(HttpOptions, HttpServeOptions)
def serve_http(server: RpcServer, *, host: str = "127.0.0.1", port: int = 0, **options: Any) -> None:
    """Serve over HTTP/1.1 until SIGTERM or SIGINT; the keywords are those of `HttpOptions` and `HttpServeOptions`. Raises
    ``OSError`` when the address cannot be bound; for options as `make_wsgi_app`."""
    chosen, serving = _split_options(options, HttpOptions, HttpServeOptions)
    HttpServing(HttpApp(server, chosen), host, port, serving).run()

# What people and plain HTTP clients see of an `HttpApp`: calls in JSON on the URLs of the Arrow ones, and pages in HTML.
_JSON_STATUS = {
    "CANCELLED": 499, "INVALID_ARGUMENT": 400, "DEADLINE_EXCEEDED": 504, "NOT_FOUND": 404, "ALREADY_EXISTS": 409,
    "ABORTED": 409, "PERMISSION_DENIED": 403, "RESOURCE_EXHAUSTED": 429, "FAILED_PRECONDITION": 400, "OUT_OF_RANGE": 400,
    "UNIMPLEMENTED": 404, "UNAVAILABLE": 503, "UNAUTHENTICATED": 401,
}  # fmt: skip
_JSON, _NDJSON = "application/json", "application/x-ndjson"
_JSON_MAX_REQUEST_BYTES = 1 << 24  # parsed JSON takes some thirty times its size; max_request_bytes overrides
_NOT_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}

def _json_type(app: HttpApp, request: HttpRequest) -> str:
    """The media type of a request that is to be answered in JSON, else nothing."""
    given = (request.get_header("content-type") or "").lower()
    match = re.fullmatch(r'(application/(?:json|x-ndjson))(?:\s*;\s*charset="?utf-8"?)?', given)
    return match[1] if app.options.json and match else ""

def _parse_json(body: bytes) -> dict[str, Any]:
    """Read one JSON object, strictly by RFC 8259; raises `ProtocolError`."""
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a key stands twice among {[k for k, _ in pairs][:20]}")
        return dict(pairs)
    def finite(text: str) -> float:
        if float(text) - float(text) != 0:
            raise ValueError(f"{text[:40]} is not a number of JSON")
        return float(text)
    try:
        value = json.loads(str(body, "utf-8"), object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
        if isinstance(value, dict):
            return value
        raise ValueError(f"expected an object, got {_got(value)}")
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"request: not a JSON object: {_text_of(exc)}") from None

def _json_in(value: Any, kind: pa.DataType, step: str = "") -> Any:
    """Turn parsed JSON into what ``to_pylist`` gives for *kind*: bytes from base64, times, dates and decimals from text."""
    import datetime
    import decimal
    t = pa.types
    kind = kind.value_type if t.is_dictionary(kind) else getattr(kind, "storage_type", kind)
    try:
        if value is None:
            return None
        if t.is_struct(kind) and isinstance(value, dict):
            members = {f.name: f.type for f in kind}
            for name in value.keys() - members.keys():
                raise _Mismatch(f"one of {list(members)}", f"{name!r:.60}{_suggest(name, members)}")
            return {k: _json_in(v, members[k], f".{k}") for k, v in value.items()}
        if t.is_map(kind) and isinstance(value, dict):
            number = t.is_integer(kind.key_type) or t.is_floating(kind.key_type) or t.is_boolean(kind.key_type)
            number = number and all(re.fullmatch(r"-?[1-9]\d*(\.\d+)?|0|true|false", k) for k in value)
            value = [[json.loads(k) if number else k, v] for k, v in value.items()]
        if t.is_map(kind) and isinstance(value, list) and all(isinstance(p, list) and len(p) == 2 for p in value):
            return [(_json_in(k, kind.key_type, "<key>"), _json_in(v, kind.item_type, f"[{k!r:.40}]")) for k, v in value]
        if (t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind)) and isinstance(value, list):
            return [_json_in(v, kind.value_type, f"[{i}]") for i, v in enumerate(value)]
        for matches, accepted, convert in (
            (t.is_boolean(kind), (bool,), bool),
            (t.is_integer(kind), (int,), int),
            (t.is_floating(kind), (int, float), float),
            (t.is_floating(kind), (str,), _NOT_FINITE.__getitem__),
            (t.is_string(kind) or t.is_large_string(kind), (str,), str),
            ("binary" in str(kind), (str,), functools.partial(base64.b64decode, validate=True)),
            (t.is_decimal(kind), (str, int, float), lambda v: decimal.Decimal(str(v))),
            (t.is_duration(kind), (int, float), lambda v: datetime.timedelta(seconds=v)),
            (t.is_time(kind), (str,), datetime.time.fromisoformat),
            (t.is_temporal(kind), (str,), lambda v: pa.scalar(v).cast(kind).as_py()),
        ):
            if matches and type(value) in accepted:
                return convert(value)
        raise _Mismatch(_type_text(kind), _got(value))
    except _Mismatch as exc:
        raise exc.under(step) from None
    except _ARROW_FAILURES:
        raise _Mismatch(_type_text(kind), f"{value!r:.60}").under(step) from None

def _json_out(value: Any, kind: pa.DataType) -> Any:
    """The way back from `_json_in`; a map becomes an object, a duration its seconds."""
    kind = getattr(kind, "storage_type", kind)
    if value is not None and pa.types.is_map(kind):
        pairs = [(_json_out(k, kind.key_type), _json_out(v, kind.item_type)) for k, v in value]
        return {k if isinstance(k, str) else json.dumps(k): v for k, v in pairs}
    if isinstance(value, dict):
        return {k: _json_out(v, kind.field(k).type) for k, v in value.items()}
    if isinstance(value, list):
        return [_json_out(v, kind.value_type) for v in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return value.total_seconds() if pa.types.is_duration(kind) else getattr(value, "isoformat", value.__str__)()

def _json_rows(batch: pa.RecordBatch | PlainBatch) -> list[dict[str, Any]]:
    batch, columns = batch.to_record_batch() if isinstance(batch, PlainBatch) else batch, []
    for column in batch.columns:
        try:
            columns.append([_json_out(v, column.type) for v in column.to_pylist()])
        except ValueError:  # nanoseconds, which Python's own datetime does not have
            columns.append(column.cast(pa.utf8()).to_pylist())
    return [dict(zip(batch.schema.names, row)) for row in zip(*columns)] if columns else [{}] * batch.num_rows

def _turn_rows(turn: Turn) -> list[dict[str, Any]]:
    return [row for batch, _ in turn.items[-1:] for row in _json_rows(batch)]  # logs and errors have no rows

def _json_arguments(info: RpcMethodInfo, given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters in JSON as the method takes them; a batch may be a list of rows, a schema an object of types by name."""
    arguments = dict(zip(info.params.names, bind_arguments(info, (), given)))
    for name, value in given.items():
        kind, where = _split_optional(info.param_types[name])[0], f"{info.name}() parameter {name}"
        try:
            if kind is pa.RecordBatch and isinstance(value, list):
                arguments[name] = pa.RecordBatch.from_pylist(value)
            elif kind is pa.Schema and isinstance(value, dict):
                arguments[name] = pa.schema([(n, pa.type_for_alias(t)) for n, t in value.items()])
            else:
                codec = codec_for(info.param_types[name])
                arguments[name] = codec.decode(_json_in(value, codec.arrow_type))
                codec.to_array([arguments[name]])  # ranges, and nulls inside
        except _Mismatch as exc:
            raise exc.error(where) from None
        except (pa.ArrowException, ValueError, AttributeError) as exc:
            raise ParameterError(f"{where}: {_text_of(exc)}") from None
    return arguments

def _json_result(info: RpcMethodInfo, batch: pa.RecordBatch | PlainBatch) -> Any:
    batch = batch.to_record_batch() if isinstance(batch, PlainBatch) else batch
    value = info.result.codecs[0].from_array(batch.column(0)) if info.has_return else None
    if isinstance(value, pa.RecordBatch):
        return _json_rows(value)
    if isinstance(value, pa.Schema):
        return {f.name: _type_text(f.type) for f in value}
    column = codec_for(info.result_type).to_array([value]) if info.has_return else pa.nulls(1)
    return _json_rows(pa.RecordBatch.from_arrays([column], ["result"]))[0]["result"]

def _json_failure(app: HttpApp, exc: BaseException, request_id: str, key: str = "error") -> HttpResponse:
    """An error as JSON; its own status where it has one, else that of its code."""
    error = _error_from_metadata(app.server.error_item(exc, EMPTY_SCHEMA, request_id)[1])
    facts = {"type": error.error_type, "message": error.error_message, "code": error.error_code, "kind": error.error_kind,
             "details": error.error_details, "request_id": request_id}
    facts |= {"traceback": error.remote_traceback} if error.remote_traceback else {}
    own = getattr(exc, "http_status", 200)
    status = own if own not in (200, 400) else _JSON_STATUS.get(error.error_code, 500)
    return json_response(status, {key: facts}, [("Retry-After", "1")] if status == 503 else ())

def _turn_json(app: HttpApp, call: Call, turn: Turn, render: Callable[[], Iterable[Any]], sent: int = 0) -> HttpResponse:
    """The lines that *render* makes of a turn, or its error, or that of *render*; *sent* bytes went out before."""
    error, body, limit = turn.error, b"", call.caller.response_limit_bytes
    try:
        body = b"".join(map(_json_bytes, render())) if error is None else b""
    except Exception as exc:
        error = call._failed(turn.schema, exc).error
    if limit is not None and sent + len(body) > limit:
        error = _answer_too_large(call, sent + len(body), limit).error
    response = HttpResponse(200, [("Content-Type", _JSON)], body)
    if error is not None:
        response = _json_failure(app, error, call.request_id, "__error__" if sent else "error")
    call.record.http.setdefault("http_status", 200 if sent else response.status)
    call.record.http["response_bytes"] = sent + len(cast("bytes", response.body))
    return response

def _call_json(app: HttpApp, call: Call, arguments: dict[str, Any]) -> Iterator[HttpResponse]:
    """Run a call: one answer, or for a producer one for each turn."""
    over, sent, lead = True, 0, list[Any]()
    try:
        with app.server:
            turn = call.begin(arguments)
            stream, header = call.stream, _turn_rows(turn) if call.stream is not None else []
            if stream is None:
                yield _turn_json(app, call, turn, lambda: [{"result": _json_result(call.bound.info, turn.items[-1][0])}])
            elif not stream.is_producer:
                turn = app._with_cursor(*app._first_turn(call, stream))
                yield _turn_json(app, call, turn, lambda: [{**dict(zip(["header"], header)), "token": _json_token(turn)}])
            else:
                lead, over = [{"__header__": row} for row in header], False
            while not over and not (sent and call.context.cancelled):
                turn = call.turn(_PLAIN_TICK)
                answer = _turn_json(app, call, turn, lambda: [*lead, *_turn_rows(turn)], sent)  # noqa: B023 (used at once)
                lead, over, sent = [], turn.finished or call._error is not None, sent + (len(cast("bytes", answer.body)) or 1)
                yield answer
    finally:
        if not over:
            call.cancel()
        call.end()

def _json_token(turn: Turn, call_token: bytes = b"") -> str:
    """Both halves of a stream's state in one text."""
    tokens = turn.items[-1][1]
    return f"{tokens[STATE_KEY].decode()}.{tokens.get(CALL_STATE_KEY, call_token).decode()}"

def _exchange_json(app: HttpApp, bound: BoundMethod, entry: dict[str, Any], caller: Caller, own_id: str) -> HttpResponse:
    """Serve one turn on ``{"token": …, "rows": […]}``, or end the stream on ``{"token": …, "cancel": true}``."""
    where = f"{bound.info.name}() input"
    if entry.keys() - {"token", "rows", "cancel"} or not entry.keys() & {"rows", "cancel"}:
        raise ParameterError(f"{where}: expected token, and rows or cancel, got {', '.join(entry)[:200] or 'nothing'}")
    cursor, _, fixed = str(entry.get("token")).encode("utf-8", "replace").partition(b".")
    tokens = {STATE_KEY: cursor, CALL_STATE_KEY: fixed, **({CANCEL_KEY: b"1"} if entry.get("cancel") else {})}
    opened, state = app._open_tokens(bound, caller.auth, tokens)
    schema = opened.input_schema
    rows = _located(where, "", lambda rows: _json_in(rows, pa.list_(pa.struct(list(schema)))), entry.get("rows")) or []
    batch = _batch_from_pydict({n: [(row or {}).get(n) for row in rows] for n in schema.names}, schema, where)
    call = app._go_on(bound, caller, opened, own_id)
    def answer() -> HttpResponse:
        turn = app._with_cursor(*app._next_turn(call, opened, state, AnnotatedBatch(batch), CANCEL_KEY in tokens))
        token = {} if turn.finished else {"token": _json_token(turn, fixed)}
        return _turn_json(app, call, turn, lambda: [{"rows": _turn_rows(turn), **token}])
    return app._ending(call, answer)

def _post_json(app: HttpApp, bound: BoundMethod, step: str, body: bytes, caller: Caller, head: _CallHead,
               own_id: str) -> HttpResponse:
    """Answer a call in JSON: ``{"result": …}``, the rows of a producer as NDJSON, or the token that begins an exchange."""
    if app.options.max_request_bytes is None and len(body) > _JSON_MAX_REQUEST_BYTES:
        raise RequestTooLargeError(f"request body: expected at most {_JSON_MAX_REQUEST_BYTES} bytes of JSON, got {len(body)}")
    if step == "exchange":
        in_lines = head.json == _NDJSON  # the token, then a row a line
        entry, *rows = map(_parse_json, bytes(body).strip().splitlines() or [b""] if in_lines else [body])
        return _exchange_json(app, bound, {**entry, "rows": rows} if in_lines else entry, caller, own_id)
    arguments = _json_arguments(bound.info, _parse_json(body))
    call = app.server.open_call(bound, caller, None, own_id)
    call.record.request_schema, call.record.request_rows = bound.info.params_schema, 1
    call.record.http["request_bytes"], answers = len(body), _call_json(app, call, arguments)
    first = next(answers)
    if first.status != 200 or call.stream is None or not call.stream.is_producer:
        return first
    pieces = ([answer.body] for some in ([first], answers) for answer in some)
    return HttpResponse(200, [("Content-Type", _NDJSON)], pieces)

_PAGE_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--dim:#5a6675;--page:#f6f7f9;--card:#fff;--line:#dde2e8;--code:#f0f2f5;
--link:#0b5cad}@media(prefers-color-scheme:dark){:root{--ink:#e4e8ee;--dim:#9aa7b6;--page:#12161c;--card:#1b2129;
--line:#313a45;--code:#12171d;--link:#7cb8ff}}body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}a{color:var(--link)}main{max-width:56rem;margin:auto;
padding:1.5rem 1rem 3rem}h1{font-size:1.7rem;line-height:1.2;margin:.4rem 0}h3,p{margin:.5rem 0}h2{font-size:1.2rem;
margin:2rem 0 .6rem}h3{font-size:1rem}h4{font-size:.85rem;margin:.9rem 0 .2rem;color:var(--dim)}article{
background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.5rem 1rem;margin:.7rem 0;
scroll-margin-top:1rem}code,pre{font:.87rem/1.5 ui-monospace,monospace;white-space:pre-wrap}pre{background:var(--code);
border-radius:6px;padding:.6rem .8rem;margin:.4rem 0}b{font-size:.72rem;font-weight:600;border:1px solid var(--line);
border-radius:99px;padding:.1rem .5rem;color:var(--dim)}small,dt{color:var(--dim)}dl{display:grid;
grid-template-columns:minmax(6rem,max-content) 1fr;gap:.15rem 1rem;margin:.2rem 0 .6rem}dd{margin:0}small{display:block}
"""

def _text(value: object) -> str:
    import html
    return html.escape(_text_of(value))

def _page(app: HttpApp, title: str, body: Iterable[str], status: int = 200) -> HttpResponse:
    """A page on its own: no script, nothing loaded, only the style that its policy knows by hash."""
    digest = base64.b64encode(hashlib.sha256(_PAGE_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    headers = [("Content-Type", "text/html; charset=utf-8"), ("Content-Security-Policy", policy), ("Cache-Control", "no-store")]
    headers += [("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")]
    places = (("", "Overview"), ("describe", "All methods"), ("health", "Health"))
    links = " · ".join(f'<a href="{_text(app.options.prefix)}/{to}">{name}</a>' for to, name in places)
    text = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{_text(title)}</title><style>{_PAGE_STYLE}</style><main><nav>{links}</nav><h1>{_text(title)}</h1>"
    )
    return HttpResponse(status, headers, f"{text}{''.join(body)}</main></html>".encode())

def _page_at(app: HttpApp, request: HttpRequest, request_id: str, segments: list[str]) -> HttpResponse | None:
    """The page at a path, ``None`` when there is none; it asks for the same authentication as calls do."""
    server = app.server
    if not app._pages or segments not in ([""], ["describe"]):
        return None
    app._authenticated(request, request_id)
    body, shown = ([], _method_card) if segments == ["describe"] else ([*_call_lines(app, request)], _method_line)
    for service in server.services.values():
        body.append(f"<h2>{_text(service.name)} {_text(service.version)}</h2>")
        for m in describe_service(service, {}).methods:
            body.append(shown(app, service.methods[m.name].info, m.stream_kind.replace("unknown", "stream") or "unary"))
    python, wire = sys.version.split()[0], REQUEST_VERSION.decode()
    software = f"vgi_rpc {__version__}, wire {wire}, Python {python}, pyarrow {pa.__version__}"
    facts = {"Health": "draining, takes no calls" if server.draining else "ok", "Server": server.server_id,
             "Version": server.server_version or "not given", "Protocol hash": server.protocol_hash, "Made with": software}
    body.append(f"<h2>This server</h2><article>{_definitions(facts)}<h4>Limits</h4>{_limit_list(app)}</article>")
    return _page(app, server.protocol_name, body)

def _definitions(facts: Mapping[str, object]) -> str:
    return "<dl>" + "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items()) + "</dl>"

def _limit_list(app: HttpApp, names: Iterable[str] = _LIMITS) -> str:
    return _definitions({k.replace("_", " "): v for k, v in app.limits.items() if k in names})

def _call_lines(app: HttpApp, request: HttpRequest) -> Iterator[str]:
    """How to call the first method, a unary one where there is one, from each of three places."""
    import shlex
    service, file, host = app.server.primary, os.path.basename(__file__), request.get_header("host") or ""
    infos = [m.info for m in service.methods.values()]
    infos.sort(key=lambda i: (i.method_type is not MethodType.UNARY, not {*i.param_types.values()} <= {int, float, str, bool}))
    known = host if re.fullmatch(r"[A-Za-z0-9.:_\[\]-]+", host) else "HOST"
    url = f"{app.scheme}://{known}{app.options.prefix}"
    for info in infos[:1]:
        values = {n: _example(_split_optional(a)[0]) for n, a in info.param_types.items() if n not in info.param_defaults}
        words = [f"{n}={v}" if type(v) in (str, int, float) else f"{n}:={json.dumps(v)}" for n, v in values.items()]
        asks = app.options.authenticate is not None
        bearer, header = (" --bearer-file TOKEN_FILE", ", headers={'Authorization': f'Bearer {token}'}") if asks else ("", "")
        lines = {"Command line": f"python {file} call {shlex.join([url, info.name, *words])}{bearer}"}
        call = f"proxy.{info.name}({', '.join(f'{n}={v!r}' for n, v in values.items())})"
        dial = f"{file.removesuffix('.py')}.http_connect({service.protocol.__name__}, {url!r}{header})"
        lines["Python"] = f"with {dial} as proxy: print({call})"
        if app.options.json:
            bearer = ' -H "Authorization: Bearer $TOKEN"' if asks else ""
            target = f"{url}/{service.name}/{info.name} -H 'Content-Type: application/json'{bearer}"
            lines["curl"] = f"curl {target} -d {shlex.quote(json.dumps(values))}"
        yield "<p>An Arrow RPC server: typed methods and streams of record batches, over HTTP.</p><article>"
        yield from (f"<h4>{title}</h4><pre>{_text(line)}</pre>" for title, line in lines.items())
        yield "</article>"

def _example(kind: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return next(iter(kind.__members__), "")
    return {int: 1, float: 1.5, str: "text", bool: True, bytes: "AA=="}.get(kind, {} if typing.get_origin(kind) is dict else [])

def _method_line(app: HttpApp, info: RpcMethodInfo, kind: str) -> str:
    link = _text(f"{app.options.prefix}/describe#{info.protocol_name}.{info.name}")
    summary = f"<small>{_text(info.doc.splitlines()[0])}</small>" if info.doc else ""
    return f'<article><a href="{link}"><code>{_text(info.signature())}</code></a> <b>{kind}</b>{summary}</article>'

def _method_card(app: HttpApp, info: RpcMethodInfo, kind: str) -> str:
    """All that is known of a method: its schemas, header, documentation and limits."""
    anchor = _text(f"{info.protocol_name}.{info.name}")
    marks = [kind, *([info.idempotency.replace("_", " ")] if info.idempotency != "unknown" else [])]
    marks += [f"deprecated: {info.deprecation}"] if info.deprecation is not None else []
    badges = "".join(f" <b>{_text(m)}</b>" for m in marks)
    card = f'<article id="{anchor}"><h3><a href="#{anchor}">{_text(info.name)}</a>{badges}</h3>'
    card += f"<code>{_text(info.signature())}</code>" + (f"<pre>{_text(info.doc)}</pre>" if info.doc else "")
    header = info.header and info.header.row.schema
    for title, schema in (("Parameters", info.params_schema), ("Header", header), ("Result", info.result_schema)):
        rows = {f.name: f"{_type_text(f.type)}{' or null' if f.nullable else ''}" for f in schema or ()}
        for name in info.param_defaults if title == "Parameters" else ():
            rows[name] += f", default {info.param_defaults[name]!r}"
        streamed = title == "Result" and kind != "unary"
        rows = rows or {"none" if not streamed else "batches": "" if not streamed else "of a schema that the call decides"}
        card += f"<h4>{title}</h4>{_definitions(rows)}" if schema is not None else ""
    names = ["max_request_bytes", "max_response_bytes", "max_rows", *(["token_ttl"] if kind != "unary" else [])]
    return f"{card}<h4>Limits</h4>{_limit_list(app, names)}</article>"


# ============================================================================
# 17. HTTP CLIENT ...................................... uses 1-16
# ============================================================================
# The HTTP channel: kept-alive connections, budgets, codings, redirects, the environment's proxies, as a ClientChannel.
# Law: what a server sends is bounded before it is kept; a call is sent once, never retried behind the caller's back.


@dataclass(frozen=True)
class HttpServerCapabilities:
    """What a server says of itself in its headers; sizes in bytes, ``None`` for no limit."""
    max_request_bytes: int | None = None
    max_response_bytes: int | None = None
    max_externalized_response_bytes: int | None = None  # of an answer by way of external storage
    externalization_enabled: bool = False  # it may answer with pointers to external storage
    upload_url_support: bool = False  # it hands out upload URLs
    max_upload_bytes: int | None = None
    supported_encodings: tuple[str, ...] = ()  # body codings it reads and writes
    accept_max_response_bytes_support: bool = False  # it honours a client's budget

    @classmethod
    def from_headers(cls, headers: Mapping[str, str]) -> HttpServerCapabilities:
        """Read them from headers by lower-case name; what cannot be read counts as absent."""
        sizes = (MAX_REQUEST_BYTES_HEADER, MAX_RESPONSE_BYTES_HEADER, "VGI-Max-Externalized-Response-Bytes", "VGI-Max-Upload-Bytes")
        texts = [headers.get(name.lower(), "") for name in sizes]
        request, response, external, upload = (int(t) if re.fullmatch("[0-9]{1,18}", t) else None for t in texts)
        switches = (EXTERNALIZATION_HEADER, "VGI-Upload-URL-Support", ACCEPT_MAX_RESPONSE_BYTES_SUPPORT_HEADER)
        externalizes, uploads, budget = (headers.get(name.lower()) == "true" for name in switches)
        encodings = tuple(e.strip() for e in headers.get(SUPPORTED_ENCODINGS_HEADER.lower(), "").split(",") if e.strip())
        return cls(request, response, external, externalizes, uploads, upload, encodings, budget)

class HttpReply(NamedTuple):
    """An HTTP answer: status, headers by lower-case name, body (decoded)."""
    status: int
    headers: dict[str, str]
    body: Any  # bytes, memoryview or Buffer; of `HttpSender.open` also an `HttpBody`, to be read as it comes


class HttpBody(ByteChannel):
    """A body that is read as its *pieces* come, over *channel* if there is one; read it to its end, or close it."""
    def __init__(self, pieces: Iterator[bytes], channel: ByteChannel | None = None) -> None:
        super().__init__()
        self.pieces, self.channel = pieces, channel
        self.close = getattr(pieces, "close", lambda: None)  # a generator's; it closes the channel

    def _receive(self, size: int) -> bytes:
        return next(self.pieces, b"")

    def _receive_into(self, view: memoryview) -> int:
        if self.channel is not None and 0 < len(self._buffer) == self._at:  # read_chunked takes a view once it has begun
            with contextlib.suppress(StopIteration):
                return cast("int", cast("Any", self.pieces).send(view))
            return 0
        piece = self.read_some(len(view))
        view[: len(piece)] = piece
        return len(piece)

_BUDGET_RULE = "accepted_max_response_bytes"
_HeaderList = Sequence[tuple[str, str]]
Headers = Mapping[str, str] | Callable[[], Mapping[str, str]]

class HttpSender:
    """Sends one HTTP request and returns its answer: over sockets (`HttpConnections`), or into an app (`SyncClient`)."""
    def open(self, method: str, path: str, headers: _HeaderList, body: bytes, deadline: float | None, limit: int) -> HttpReply:
        """Send a request. A chunked body may be left to be read as it comes. This, and reading it, raises `TransportError` when
        no answer comes, `ResponseTooLargeError` when it exceeds *limit*."""
        raise io.UnsupportedOperation("open")

    def send(self, *request: Any) -> HttpReply:
        """As `open`, but the body is whole."""
        reply = self.open(*request)
        return reply._replace(body=_gathered(reply.body.pieces)) if isinstance(reply.body, HttpBody) else reply

    def close(self) -> None:
        """Give back connections."""


class HttpTarget(NamedTuple):
    """Where an HTTP client connects."""
    tls: bool
    host: str
    port: int
    prefix: str  # path in front of every request, without a slash at its end
    proxy: tuple[str, int, str] | None = None  # host, port, Proxy-Authorization or empty; None for a direct connection

    @classmethod
    def parse(cls, url: str) -> HttpTarget:
        """Read a base URL, and the environment's proxy for it as urllib reads it; raises ``ValueError``."""
        from urllib.parse import urlsplit
        shown, default = re.sub("//[^/]*@", "//…@", url), {"http": 80, "https": 443}
        try:
            parts = urlsplit(url)
            port = parts.port or default.get(parts.scheme)
        except ValueError as exc:
            raise ValueError(f"base URL {shown!r}: {exc}") from None
        if port is None or not parts.hostname or parts.scheme not in default or parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError(f"base URL: expected http(s)://host[:port][/prefix], got {shown!r}")
        if not re.fullmatch(r"[!-~]*", url):
            raise ValueError("base URL: a space or control character in it")
        proxy = _environment_proxy(parts.scheme, parts.netloc, parts.hostname)
        return cls(parts.scheme == "https", parts.hostname, port, parts.path.rstrip("/"), proxy)

    @property
    def address(self) -> str:
        """Host and port, as CONNECT wants them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def authority(self) -> str:
        """Host and port as the Host header has them: without the scheme's own port."""
        return self.address.removesuffix(":443" if self.tls else ":80")

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
    pair = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    credentials = "Basic " + base64.b64encode(pair.encode()).decode() if parts.username is not None else ""
    return parts.hostname, parts.port or 80, credentials

class _NotSent(Exception):
    """The connection was closed before the whole request was handed over, and not a byte came back."""


class HttpConnections(HttpSender):
    """Kept-alive connections to one server; safe for use by several threads, each call on a connection of its own.
    For https *tls_context* defaults to ``ssl.create_default_context()``; *connect_timeout* is in seconds."""
    _MAX_IDLE, _MAX_INTERIM = 8, 16  # connections that are kept, and 1xx answers before the one that counts

    def __init__(self, target: HttpTarget, tls_context: ssl.SSLContext | None = None, connect_timeout: float = 10.0) -> None:
        self._target, self._timeout = target, connect_timeout
        if target.tls and tls_context is None:
            import ssl
            tls_context = ssl.create_default_context()
        self._tls = tls_context if target.tls else None
        self._idle: deque[HeadReader] = deque()
        self._leads: dict[tuple[str, str], tuple[_HeaderList, bytes]] = {}  # by method and path: how the last head began
        self._closed = False

    def _dial(self, deadline: float | None) -> SocketChannel:
        target = self._target
        timeout = self._timeout if deadline is None else max(0.001, min(self._timeout, deadline - time.monotonic()))
        if target.proxy is None:
            return SocketChannel(connect_tcp_socket(target.host, target.port, timeout, self._tls))
        host, port, credentials = target.proxy
        connected = connect_tcp_socket(host, port, timeout)
        try:
            return self._tunnel(connected, timeout, credentials) if self._tls else SocketChannel(connected)
        except (OSError, ProtocolError, _LocalError) as exc:
            connected.close()
            raise TransportError(f"no way to {target.address} through proxy {host}:{port}: {_text_of(exc)}") from None

    def _tunnel(self, connected: socket.socket, timeout: float, credentials: str) -> SocketChannel:
        channel, where = SocketChannel(connected), self._target.address
        channel.deadline = time.monotonic() + timeout
        authorization = f"Proxy-Authorization: {credentials}\r\n" if credentials else ""
        channel.write([f"CONNECT {where} HTTP/1.1\r\nHost: {where}\r\n{authorization}\r\n".encode("latin-1")])
        head = HeadReader(channel).read()
        if head is None or head.start[1] != "200":
            raise TransportError(f"it refused: {' '.join(head.start[1:])}" if head else "it gave no answer")
        wrapped = cast("ssl.SSLContext", self._tls).wrap_socket(connected, server_hostname=self._target.host)
        wrapped.settimeout(None)
        return SocketChannel(wrapped)

    def _take(self) -> HeadReader | None:
        with contextlib.suppress(IndexError):
            while (kept := self._idle.pop()).channel.peer_gone() or kept.channel.peek():
                kept.channel.close()
            return kept
        return None

    def open(self, method: str, path: str, headers: _HeaderList, body: bytes, deadline: float | None, limit: int) -> HttpReply:
        message = self._message(method, path, headers, body)
        if self._closed:
            raise TransportError("the connection is closed: it was closed here")
        if kept := self._take():
            # Closed by the server between two calls: the one case in which a request is sent again, as it never got there.
            with contextlib.suppress(_NotSent):
                return self._exchange(kept, method, message, deadline, limit)
        try:
            return self._exchange(HeadReader(self._dial(deadline)), method, message, deadline, limit)
        except _NotSent as exc:
            raise TransportError(f"{self._target.authority} closed the connection without an answer: {exc}") from None

    def _message(self, method: str, path: str, headers: _HeaderList, body: bytes) -> list[bytes]:
        given, lead = self._leads.get((method, path), (None, b""))
        if given != headers:
            lead = self._lead(method, path, headers)
            if len(self._leads) >= 64:
                self._leads.clear()
            self._leads[method, path] = list(headers), lead
        return [lead + (b"Content-Length: %d\r\n\r\n" % len(body) if body or method == "POST" else b"\r\n"), body]

    def _lead(self, method: str, path: str, headers: _HeaderList) -> bytes:
        """A request's head up to its length."""
        target = self._target
        lines = [f"{method} {path} HTTP/1.1", f"Host: {target.authority}"]
        if target.proxy is not None and not target.tls:
            lines[0] = f"{method} http://{target.authority}{path} HTTP/1.1"
            lines += [f"Proxy-Authorization: {target.proxy[2]}"] if target.proxy[2] else []
        lines += [f"{name}: {value}" for name, value in headers]
        if any(c in line for line in lines for c in "\r\n\0"):
            raise ValueError("a header contains a line break")
        return ("\r\n".join(lines) + "\r\n").encode("latin-1")

    def _exchange(self, heads: HeadReader, method: str, message: list[bytes], deadline: float | None, limit: int) -> HttpReply:
        heads.channel.deadline = deadline
        try:
            head = self._head_of_answer(heads, message)
            reply = self._read_reply(heads, method, head, limit)
        except BaseException as exc:
            raise self._ended(heads.channel, exc) from None
        if not isinstance(reply.body, HttpBody):
            self._give_back(heads, head)
        return reply

    def _ended(self, channel: SocketChannel, exc: BaseException) -> BaseException:
        """Close a connection whose answer could not be read; return what to raise for it."""
        channel.close()
        if isinstance(exc, RequestTooLargeError):
            return ResponseTooLargeError(f"the answer exceeds what this client accepts: {exc}")
        if isinstance(exc, ProtocolError):
            text = "closed the connection within an answer" if channel.ended else "does not speak HTTP as it should"
            return TransportError(f"{self._target.authority} {text}: {exc}")
        return exc

    def _give_back(self, heads: HeadReader, head: HttpHead) -> None:
        keep = head.start[0] == "HTTP/1.1" and "close" not in head.headers.get("connection", "").lower()
        if keep and not heads.channel.ended and len(self._idle) < self._MAX_IDLE and not self._closed:
            self._idle.append(heads)
        else:
            heads.channel.close()

    def _pieces(self, heads: HeadReader, head: HttpHead, limit: int) -> Iterator[bytes]:
        try:
            yield from read_chunked(heads.channel, limit, _BUDGET_RULE)
        except BaseException as exc:
            raise self._ended(heads.channel, exc) from None
        self._give_back(heads, head)

    def _head_of_answer(self, heads: HeadReader, message: list[bytes]) -> HttpHead:
        unsent: TransportError | None = None
        try:
            heads.channel.write(message)
        except TransportError as exc:
            unsent = exc  # a server that refuses a large body early may have answered before it hung up
        for _ in range(self._MAX_INTERIM):
            try:
                head = heads.read()
                if head is None:
                    raise TransportError(f"{self._target.authority} closed the connection without an answer")
            except TransportError as exc:
                if unsent and not heads.channel.peek():
                    raise _NotSent(unsent.error_message) from None
                raise exc
            if not head.start[1].startswith("1"):
                return head
        raise ProtocolError(f"more than {self._MAX_INTERIM} interim answers")

    def _read_reply(self, heads: HeadReader, method: str, head: HttpHead, limit: int) -> HttpReply:
        (version, status, _), headers, channel = head.start, head.headers, heads.channel
        if "sized" in head.memory and method != "HEAD":
            return HttpReply(200, headers, _read_sized(channel, _content_length(headers["content-length"], limit, _BUDGET_RULE)))
        def read(limit: int) -> _Buffer:
            if "content-length" in headers:
                return _read_sized(channel, _content_length(headers["content-length"], limit, _BUDGET_RULE))
            return _gathered((read_chunked if "transfer-encoding" in headers else _read_to_end)(channel, limit, _BUDGET_RULE))
        if not re.fullmatch(r"HTTP/1\.[01]", version) or not re.fullmatch(r"[2-5][0-9][0-9]", status):
            raise ProtocolError(f"expected a status line, got {' '.join(head.start)[:80]!r}")
        if "content-length" in head.repeated or ("content-length" in headers and "transfer-encoding" in headers):
            raise ProtocolError("an answer with two lengths")
        bodiless, framing = method == "HEAD" or status in ("204", "304"), headers.get("transfer-encoding")
        if framing is not None and framing.lower() != "chunked" and not bodiless:
            raise ProtocolError(f"Transfer-Encoding: expected chunked, got {framing[:40]!r}")
        coding = _coding_of(headers)
        if status == "200" and headers.get("content-type") == ARROW_CONTENT_TYPE and not coding and not bodiless:
            if framing is not None:
                return HttpReply(200, headers, HttpBody(self._pieces(heads, head, limit), channel))
            if "content-length" in headers:
                head.memory["sized"] = True  # all of the above holds for the next one that looks the same
        return HttpReply(int(status), headers, b"" if bodiless else _decoded_body(coding, read, limit))

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().channel.close()

def _read_to_end(channel: ByteChannel, limit: int, rule: str) -> Iterator[bytes]:
    total = 0
    while piece := channel.read(SMALL_BODY_BYTES):
        total += len(piece)
        if total > limit:
            raise _too_large(limit, "more", rule)
        yield piece


class SyncClient(HttpSender):
    """Calls an `HttpApp` in the same thread, without a socket: for tests. Made by `make_sync_client`."""
    def __init__(self, app: HttpApp) -> None:
        self.app, self.prefix = app, app.options.prefix

    def open(self, method: str, path: str, headers: _HeaderList, body: bytes, deadline: float | None, limit: int) -> HttpReply:
        def read_body(most: int) -> bytes:
            _content_length(str(len(body)), most)
            return body
        response = self.app(HttpRequest(method, path, {k.lower(): v for k, v in headers}, "sync", read_body))
        answered, given = {k.lower(): v for k, v in response.headers}, response.body
        if not isinstance(given, bytes):
            return HttpReply(response.status, answered, HttpBody(cast("Any", given)))
        return HttpReply(response.status, answered, _decoded_body(_coding_of(answered), lambda _: given, limit))

def _over_budget(exc: ResponseTooLargeError) -> RpcError:
    return RpcError("ResponseTooLargeError", str(exc), "", error_code=Code.RESOURCE_EXHAUSTED)


class HttpClient(ClientChannel):
    """The HTTP implementation of a `ClientChannel`; safe for use by several threads.
    The arguments are those of `http_connect`; *max_response_bytes* ``None`` stands for the largest that the wire knows."""
    def __init__(self, sender: HttpSender, prefix: str = "", headers: Headers | None = None, compression_level: int | None = 1,
                 max_response_bytes: int | None = CLIENT_MAX_RESPONSE_BYTES) -> None:
        least, most = MIN_RESPONSE_BUDGET, MAX_RESPONSE_BUDGET
        if max_response_bytes is not None and not least <= max_response_bytes <= most:
            raise ValueError(f"accepted_max_response_bytes: expected {least} to {most}, got {max_response_bytes}")
        self._sender, self._prefix, self._level, self._headers = sender, prefix, compression_level, headers
        self._budget = max_response_bytes or most
        self._capabilities: HttpServerCapabilities | None = None
        accept = ", ".join((*supported_encodings(), "identity")) if compression_level is not None else "identity"
        self._fixed = (("Content-Type", ARROW_CONTENT_TYPE), ("Accept-Encoding", accept),
                       (ACCEPT_MAX_RESPONSE_BYTES_HEADER, str(self._budget)))

    def _own_headers(self) -> list[tuple[str, str]]:
        given = self._headers() if callable(self._headers) else self._headers
        return list(given.items()) if given else []

    def capabilities(self, deadline: float | None = None) -> HttpServerCapabilities:
        """Ask ``HEAD /health`` once what the server can do; raises `TransportError`."""
        if self._capabilities is None:
            reply = self._sender.send("HEAD", f"{self._prefix}/health", self._own_headers(), b"", deadline, MAX_HEAD_BYTES)
            if reply.status == 401:
                raise self._unauthorized(reply)
            self._capabilities = HttpServerCapabilities.from_headers(reply.headers if reply.status < 300 else {})
        return self._capabilities

    def post(self, path: str, body: bytes, deadline: float | None, turns: int = 1, packed_bytes: int = 0) -> HttpReply:
        """Post Arrow, return an answer in Arrow; with several *turns* of a producer it may come piece by piece. Of *body* so
        many bytes do not compress.
        Raises `AuthenticationError` for a 401, `TransportError` when no answer comes or one that is not Arrow, `RpcError` when
        the body or the answer is larger than the server or the budget allows."""
        server, headers = self.capabilities(deadline), [*self._fixed, *self._own_headers()]
        if self._level is not None and len(body) >= _COMPRESS_BODY_FROM_BYTES:
            encoding = next((e for e in supported_encodings() if e in server.supported_encodings), "")
            packed = compress_if_worth([body], encoding, self._level, packed_bytes) if encoding else None
            if packed is not None:
                body = packed
                headers.append(("Content-Encoding", encoding))
        path, most = self._prefix + path, server.max_request_bytes
        if most is not None and len(body) > most:
            text = f"the server takes requests of at most {most} bytes, this one has {len(body)}"
            raise RpcError("RequestTooLargeError", text, "", error_code=Code.RESOURCE_EXHAUSTED)
        send = self._sender.send
        if turns > 1:
            headers.append((MAX_TURNS_HEADER, str(turns)))
            send = getattr(self._sender, "open", send)
        for _ in range(3):
            try:
                reply = send("POST", path, headers, body, deadline, self._budget)
            except ResponseTooLargeError as exc:
                raise _over_budget(exc) from None
            except IPCError as exc:
                raise TransportError(f"the answer does not decode: {exc}") from None
            if reply.status not in (307, 308):
                break
            where = reply.headers.get("location", "")
            if not re.fullmatch("/(?!/)[!-~]*", where):  # one to another server would carry the credentials there
                raise TransportError(f"the server redirects {path} to {where[:200]!r}; connect there instead")
            path = where
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
        named = str(facts.get("reason") or reply.headers.get(AUTH_REASON_HEADER.lower()))
        reason = AuthReason(named) if named in [r.value for r in AuthReason] else AuthReason.UNAUTHORIZED
        return AuthenticationError(f"{reason}: {facts.get('detail') or 'HTTP 401'}", reason=reason)

    # -- calls
    def unary(self, info: RpcMethodInfo, batch: pa.RecordBatch, options: CallOptions) -> Any:
        reply = self.post(f"/{info.protocol_name}/{info.name}", _request_body(info, batch, options), options.deadline)
        known = recall_result(info, reply.body, 0) if isinstance(reply.body, bytes) else None
        if known is not None and known[1] == len(reply.body):
            return decode_result(info, known[0])
        item = _answer_item(_open_answer(BufferSource(reply.body), options), info, options, "a result")
        return answer_call(read_result, info, item.reader, item.message)

    def stream(self, info: RpcMethodInfo, batch: pa.RecordBatch, options: CallOptions) -> ClientStream:
        reply = self.post(f"/{info.protocol_name}/{info.name}/init", _request_body(info, batch, options), options.deadline)
        stream, source = _HttpClientStream(self, info, options), BufferSource(reply.body)
        if info.header is not None:
            reader = _open_answer(source, options)
            stream.header = answer_call(_answer_item(reader, info, options, "a header").annotated).batch
            answer_call(reader.read_to_end)
        stream.take(source)
        return stream

    def resume(self, info: RpcMethodInfo, token: bytes, options: CallOptions) -> ClientStream:
        stream = _HttpClientStream(self, info, options)
        stream.restore(token)
        return stream

    def close(self) -> None:
        self._sender.close()

def _open_answer(source: ByteSource, options: CallOptions) -> IpcReader:
    return answer_call(functools.partial(IpcReader, source, validation=options.ipc_validation))

def _answer_item(reader: IpcReader, info: RpcMethodInfo, options: CallOptions, what: str) -> ReplyItem:
    item = answer_call(next_reply_item, reader, options)
    if item is None:
        raise TransportError(f"{info.name}(): expected {what}, got an end of stream")
    return item

def _request_body(info: RpcMethodInfo, batch: pa.RecordBatch, options: CallOptions) -> bytes:
    return b"".join(request_stream(info, batch, options.version, new_request_id(), options.timeout))


class _HttpClientStream(ClientStream):
    """A stream over HTTP: the tokens it was last given, and batches that came and were not handed out yet."""
    def __init__(self, client: HttpClient, info: RpcMethodInfo, options: CallOptions) -> None:
        self._client, self._info, self._options = client, info, options
        self._path = f"/{info.protocol_name}/{info.name}/exchange"
        self._call_token, self._waiting = b"", deque[AnnotatedBatch]()
        self._cursor: bytes | None = None
        self._saved: bytes | None = None  # the cursor from which the waiting batches were made
        self._handed_out = 0  # data batches handed out since then
        self._reader: IpcReader | None = None  # of the answer that is being read
        self._rest: HttpBody | None = None  # its body, if that is still coming
        self._metadata: Any = None  # of a tick that came while an answer to earlier ones was being read
        self._handed_at = time.monotonic()

    def take(self, source: BufferSource) -> None:
        """Read an answer's output stream whole."""
        self._open(source)
        self._waiting.extend(iter(self._read, None))

    def _open(self, source: ByteSource) -> None:
        self._cursor, self._reader = None, _open_answer(source, self._options)

    def _read(self) -> AnnotatedBatch | None:
        """Read on in the answer to the next data batch, ``None`` at its end; tokens are known by their keys."""
        while (item := answer_call(next_reply_item, cast("IpcReader", self._reader), self._options)) is not None:
            self._call_token = item.metadata.get(CALL_STATE_KEY, self._call_token)
            self._cursor = item.metadata.get(STATE_KEY, self._cursor)
            if item.kind is BatchKind.DATA:
                return answer_call(item.annotated)
        self._reader = None
        return None

    def _read_on(self) -> None:
        """Read one more batch of an answer that is still coming."""
        rest = cast("HttpBody", self._rest)
        if rest.channel is not None:
            rest.channel.deadline = self._options.deadline
        try:
            batch = self._read()
        except ResponseTooLargeError as exc:
            raise _over_budget(exc) from None
        if batch is not None:
            self._waiting.append(batch)
            return
        with contextlib.suppress(RpcError):  # all that counts has come
            rest.read(1)  # the end of the body, which gives the connection back
        self._leave()

    def _leave(self) -> None:
        """Read no more of the answer that is still coming, and forget what it brought."""
        if self._rest is not None:
            self._rest.close()
        self._reader = self._rest = None
        self._waiting.clear()

    def _post(self, batch: pa.RecordBatch, metadata: Mapping[bytes, bytes], turns: int = 1) -> HttpReply:
        tokens = {**metadata, STATE_KEY: self._cursor or b"", CALL_STATE_KEY: self._call_token}
        if self._options.timeout is not None:
            tokens[TIMEOUT_KEY] = str(max(1, int(self._options.timeout * 1000))).encode()
        body = stream_bytes(batch.schema, [(batch, tokens)])
        return self._client.post(self._path, body, self._options.deadline, turns, len(tokens[STATE_KEY]))

    def _ask(self, given: AnnotatedBatch, turns: int) -> None:
        metadata, self._metadata = dict(given.custom_metadata or self._metadata or {}), None
        self._saved, self._handed_out = self._cursor, 0
        body = self._post(given.batch, metadata, 1 if metadata else turns).body
        if isinstance(body, HttpBody):
            self._rest = body
            self._open(body)
        else:
            self.take(BufferSource(body))
        if self._rest is None and not self._waiting and self._cursor is not None and given.batch.num_columns:
            raise TransportError(f"{self._info.name}(): expected a data batch, got a token and none")

    def turn(self, given: AnnotatedBatch) -> AnnotatedBatch | None:
        if self._rest is not None:
            self._metadata = given.custom_metadata or self._metadata
        return self._advance(given, 1)

    def next(self) -> AnnotatedBatch | None:
        quick = time.monotonic() - self._handed_at < SLOW_READER_SECONDS
        answer = self._advance(_PLAIN_TICK, (self._options.prefetch or MAX_TURNS) if quick else 1)
        self._handed_at = time.monotonic()
        return answer

    def _advance(self, given: AnnotatedBatch, turns: int) -> AnnotatedBatch | None:
        while not self._waiting:
            if self._cursor is None and self._rest is None:
                self.done = True
                return None
            try:
                self._ask(given, turns) if self._rest is None else self._read_on()
            except BaseException as exc:
                self.done = True
                if isinstance(exc, RpcError) and not _was_answer(exc):
                    self.cut_off = f"was cut off: {exc.error_message}"
                self._leave()
                raise
        self._handed_out += 1
        return self._waiting.popleft()

    def token(self) -> bytes:
        between = bool(self._waiting or self._rest is not None or self.cut_off)
        if (self.done and not self.cut_off) or (self._cursor is None and not between):
            raise RpcError("ProtocolError", f"the stream of {self._info.name}() is over: nothing to resume", "")
        cursor, skip = (self._saved, self._handed_out) if between else (self._cursor, 0)
        if cursor is None:
            raise RpcError("ProtocolError", "no token yet: read the batches that came with the start of the stream first", "")
        tokens = {"state": cursor.decode("latin-1"), "call": self._call_token.decode("latin-1")}
        return json.dumps({"method": self._info.name, **tokens, "skip": skip}).encode()

    def restore(self, token: bytes) -> None:
        """Take over what `token` saved."""
        facts = _json_object(token)
        types = {key: type(facts.get(key)) for key in ("state", "call", "skip")}
        if facts.get("method") != self._info.name or types != {"state": str, "call": str, "skip": int}:
            raise RpcError("ProtocolError", f"resume: expected a token of {self._info.name}(), as session.token() gives it", "")
        self._leave()
        self._cursor, self._call_token = facts["state"].encode("latin-1", "replace"), facts["call"].encode("latin-1", "replace")
        for left in range(facts["skip"], 0, -1):
            if self._advance(_PLAIN_TICK, left) is None:
                return

    def close(self) -> None:
        """Nothing to tell the server: it keeps nothing of a stream between turns."""
        self.done = True
        self._leave()

    def cancel(self) -> None:
        if self._rest is not None:
            self._cursor = self._cursor or self._saved
        self.close()
        if self._cursor is not None:
            try:
                self._post(_TICK, {CANCEL_KEY: b"1"})
            except RpcError as exc:
                logger.debug("cancel of %s: %s", self._info.name, exc)


# ============================================================================
# 18. ENTRY POINTS ..................................... uses 1-17
# ============================================================================
# What most programs call: one function per way to serve and per way to connect. Each connect function returns a context
# manager that gives the typed proxy and closes the connection; it connects on entering. Keywords mean the same everywhere:
# `on_log` takes the server's log lines, `timeout` is seconds per call or turn (None for no limit), `ipc_validation` says
# how much of each answer is checked.

@contextlib.contextmanager
def _connected(dial: Callable[[], Transport | ClientChannel], protocol: type[_P], on_log: ClientLog | None,
               timeout: float | None, ipc_validation: IpcValidation) -> Iterator[_P]:
    with RpcConnection(protocol, dial(), on_log, timeout=timeout, ipc_validation=ipc_validation) as proxy:
        yield proxy

@contextlib.contextmanager
def serve_pipe(protocol: type[_P], implementation: Any, *, on_log: ClientLog | None = None, timeout: float | None = None,
               ipc_validation: IpcValidation | None = None) -> Iterator[_P]:
    """Serve *implementation* in a thread of this process, over a pair of pipes, and give a proxy to it. *ipc_validation* holds
    for both sides; default: every value. ``TypeError``: the implementation does not fit the protocol."""
    server = RpcServer(protocol, implementation, ipc_validation=ipc_validation)
    client, serving = make_pipe_pair()
    def serve() -> None:
        with contextlib.closing(serving):
            server.serve(serving)
    thread = threading.Thread(target=serve, daemon=True, name="vgi_rpc serve_pipe")
    thread.start()
    try:
        with _connected(lambda: client, protocol, on_log, timeout, ipc_validation or IpcValidation.FULL) as proxy:
            yield proxy
    finally:
        thread.join(WORKER_EXIT_SECONDS)

def connect(protocol: type[_P], cmd: Sequence[str], *, on_log: ClientLog | None = None,
            stderr: StderrMode = StderrMode.INHERIT, stderr_logger: logging.Logger | None = None, timeout: float | None = None,
            ipc_validation: IpcValidation = IpcValidation.FULL) -> contextlib.AbstractContextManager[_P]:
    """Start a worker and give a proxy to it; on leaving, its stdin is closed and it is reaped. *cmd* is a program that calls
    `run_server`, with its arguments; one that is deaf for longer than *timeout* is terminated. *stderr* says where its standard
    error goes, *stderr_logger* is for ``StderrMode.PIPE``. Raises `TransportError`, on entering when the program cannot be
    started, from a call when it has died."""
    dial = functools.partial(SubprocessTransport, cmd, stderr=stderr, stderr_logger=stderr_logger)
    return _connected(dial, protocol, on_log, timeout, ipc_validation)

def unix_connect(protocol: type[_P], path: str, *, on_log: ClientLog | None = None, timeout: float | None = None,
                 ipc_validation: IpcValidation = IpcValidation.FULL) -> contextlib.AbstractContextManager[_P]:
    """Connect to a Unix socket and give a proxy; on entering raises `TransportError` when nobody listens there."""
    return _connected(lambda: connect_unix_socket(path, timeout), protocol, on_log, timeout, ipc_validation)

def tcp_connect(protocol: type[_P], host: str, port: int, *, connect_timeout: float | None = 5.0,
                tls_context: ssl.SSLContext | None = None, server_hostname: str | None = None, on_log: ClientLog | None = None,
                timeout: float | None = None, ipc_validation: IpcValidation = IpcValidation.FULL,
                ) -> contextlib.AbstractContextManager[_P]:
    """Connect over TCP and give a proxy; on entering raises `TransportError` when nobody listens there, or TLS fails. With
    *tls_context*, a client-side context of the standard library's ``ssl``, over TLS; the certificate must be for
    *server_hostname*, by default for *host*. *connect_timeout* is in seconds."""
    def dial() -> Transport:
        connected = connect_tcp_socket(host, port, connect_timeout, tls_context, server_hostname)
        return Transport(SocketChannel(connected), TransportKind.TCP, f"{host}:{port}")
    return _connected(dial, protocol, on_log, timeout, ipc_validation)

def _http_client(base_url: str | None, prefix: str | None, client: HttpSender | None, tls: ssl.SSLContext | None = None,
                 **options: Any) -> HttpClient:
    if client is not None:
        return HttpClient(client, prefix if prefix is not None else getattr(client, "prefix", ""), **options)
    if base_url is None:
        raise ValueError("expected a base URL or a client")
    target = HttpTarget.parse(base_url)
    path = f"{target.prefix}/{(prefix or '').strip('/')}".rstrip("/")
    return HttpClient(HttpConnections(target, tls), path, **options)

def http_connect(
    protocol: type[_P], base_url: str | None = None, *, prefix: str | None = None, on_log: ClientLog | None = None,
    client: HttpSender | None = None, headers: Headers | None = None, timeout: float | None = None,
    tls_context: ssl.SSLContext | None = None, compression_level: int | None = 1,
    accepted_max_response_bytes: int | None = CLIENT_MAX_RESPONSE_BYTES, ipc_validation: IpcValidation = IpcValidation.FULL,
) -> contextlib.AbstractContextManager[_P]:
    """Connect over HTTP and give a proxy, which several threads may use.

    Args:
        base_url: ``http(s)://host[:port][/prefix]``; *prefix* is further path. ``ValueError`` on entering when it is no URL.
        client: What `make_sync_client` gives, instead of a URL.
        headers: Further headers, such as ``{"Authorization": "Bearer …"}``, or a function that gives them for each request.
        tls_context: For https; default ``ssl.create_default_context()``.
        compression_level: 1 to 9; ``None`` neither compresses nor asks for compressed answers.
        accepted_max_response_bytes: Largest answer, decoded; a larger one is refused by the server or here.

    A call raises `TransportError` when nobody answers there, `AuthenticationError` for a 401.
    """
    options = {"headers": headers, "compression_level": compression_level, "max_response_bytes": accepted_max_response_bytes}
    dial = functools.partial(_http_client, base_url, prefix, client, tls_context, **options)
    return _connected(dial, protocol, on_log, timeout, ipc_validation)

@_takes_options(HttpOptions)
def make_sync_client(server: RpcServer, **options: Any) -> SyncClient:
    """Return a client for ``http_connect(P, client=...)`` that calls *server*'s HTTP side without a socket. The keywords are
    those of `HttpOptions`; without ``token_key`` a random one is used, silently."""
    options.setdefault("token_key", os.urandom(32))
    return SyncClient(HttpApp(server, *_split_options(options, HttpOptions)))

def http_capabilities(base_url: str | None = None, *, prefix: str | None = None, client: HttpSender | None = None,
                      timeout: float | None = None) -> HttpServerCapabilities:
    """Ask a server's ``/health`` what it can do; raises `TransportError`. A *client* that was given stays open."""
    channel = _http_client(base_url, prefix, client)
    with contextlib.nullcontext() if client is not None else contextlib.closing(channel):
        return channel.capabilities(None if timeout is None else time.monotonic() + timeout)

def http_introspect(base_url: str | None = None, *, prefix: str | None = None, client: HttpSender | None = None,
                    protocol: str | None = None) -> ServiceDescription:
    """Return what an HTTP server says of *protocol*, by default its primary one; raises as `list_protocols`."""
    channel = _http_client(base_url, prefix, client)
    with contextlib.nullcontext() if client is not None else contextlib.closing(channel):
        return introspect(channel, protocol=protocol)

def announce(line: str) -> None:
    """Print a discovery line (``PORT:…``, ``UNIX:…``, ``TCP:…``) on stdout for the program that started us."""
    print(line, flush=True)

def _host_and_port(text: str) -> tuple[str, int]:
    """Read ``[HOST:]PORT``; the host may stand in brackets, as IPv6 addresses do."""
    import argparse
    host, _, port = text.rpartition(":")
    if not re.fullmatch("[0-9]{1,5}", port):
        raise argparse.ArgumentTypeError(f"expected [HOST:]PORT, got {text!r}")
    return host.strip("[]") or "127.0.0.1", int(port)

def run_server(protocol_or_server: type | RpcServer, implementation: Any = None) -> None:
    """Be a worker: the ``main`` of a program that serves, which reads the program's own command line. Without arguments it
    serves stdin and stdout. ``--http [--host H] [--port N]``, ``--unix PATH`` and ``--tcp [HOST:]PORT`` listen instead, and
    print one discovery line on stdout: ``PORT:<n>``, ``UNIX:<path>`` or ``TCP:<host>:<port>``.

    *implementation* is ``None`` with a ready server, or to make one of a plain class. Raises ``TypeError`` when it does not
    fit the protocol, ``SystemExit`` when the command line is wrong or asks for help."""
    server = protocol_or_server
    if not isinstance(server, RpcServer):
        server = RpcServer(server, implementation if implementation is not None else server())
    if not sys.argv[1:]:  # a worker's start need not wait for argparse
        serve_stdio(server)
        return
    import argparse
    parser = argparse.ArgumentParser(description=f"Serves {server.protocol_name} (vgi_rpc {__version__}).")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--http", action="store_true", help="serve HTTP; prints PORT:<n>")
    where.add_argument("--unix", metavar="PATH", help="serve a Unix socket; prints UNIX:<path>")
    where.add_argument("--tcp", metavar="[HOST:]PORT", type=_host_and_port, help="serve TCP; prints TCP:<host>:<port>")
    parser.add_argument("--host", default="127.0.0.1", help="address for --http (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port for --http (default: a free one)")
    parser.add_argument("--idle-timeout", type=float, metavar="SECONDS", help="end after so long without a connection")
    parser.add_argument("--access-log", metavar="PATH", help="append a JSON line per call; - is stderr")
    args = parser.parse_args()
    idle = args.idle_timeout
    if args.access_log:
        configure_access_log(args.access_log, server)
    if args.http:
        serve_http(server, host=args.host, port=args.port, idle_timeout=idle, on_bound=lambda _, port: announce(f"PORT:{port}"))
    elif args.unix:
        serve_unix(server, args.unix, threaded=True, idle_timeout=idle, on_bound=lambda path: announce(f"UNIX:{path}"))
    elif args.tcp:
        serve_tcp(server, *args.tcp, threaded=True, idle_timeout=idle, on_bound=lambda h, p: announce(f"TCP:{h}:{p}"))
    else:
        serve_stdio(server)


# ============================================================================
# 19. COMMAND LINE ..................................... uses 1-18
# ============================================================================
# `python vgi_rpc.py COMMAND`: answers go to stdout, everything said about them to stderr; stdin is read only where `-` stands.
# Law: nothing of this section runs on import; a failure is one line, a hint where there is one, and an exit code.

_OK, _FAILED, _USAGE, _UNREACHABLE, _REFUSED, _TIMEOUT, _INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
_REFUSALS = (Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.RESOURCE_EXHAUSTED)
_TEXT_ROWS = 100  # of CSV and NDJSON in a turn, where nothing else says what a batch is
_CHUNK_BYTES = 1 << 20  # of a CSV or NDJSON file read at once; the types of its columns are those of the first chunk
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))

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
class StatisticsState(ExchangeState):
    """What is known so far: count, sum, min and max of each column; nulls are passed over, and decide nothing."""
    columns: dict[str, list[float | None]]

    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        import pyarrow.compute as pc
        answer: dict[str, Any] = {}
        known: dict[str, Any] = self.columns
        for name, (count, total, *edges) in known.items():
            values = input.batch.column(name).cast(pa.float64(), safe=False)
            count += len(values) - values.null_count
            total += pc.sum(values).as_py() or 0.0
            found = pc.min_max(pa.concat_arrays([values, pa.array(edges, pa.float64())])).as_py()
            known[name] = [count, total, *found.values()]
            answer[name] = [{"count": int(count), "mean": total / count if count else None, **found}]
        out.emit_pydict(answer)


class Demo:
    """A small service with one method of each kind."""
    def add(self, a: float, b: float = 1.0) -> float:
        """Return a + b."""
        return a + b

    def countdown(self, start: int, pause: float | None = None) -> Stream[CountdownState, CountdownHeader]:
        """Count from start to 0, one number a batch; pause is for seconds before each."""
        header = CountdownHeader(start, max(0, start + 1))
        return Stream(pa.schema([("n", pa.int64())]), CountdownState(start, pause or 0.0), header=header)

    def statistics(self, schema: pa.Schema) -> Stream[StatisticsState]:
        """Answer each batch of schema with count, mean, min and max of every numeric column so far."""
        names = [f.name for f in schema if _is_number(f.type) or pa.types.is_decimal(f.type)]
        if not names or len(set(schema.names)) < len(schema):
            problem = f"expected numeric columns under unique names, got {_schema_text(schema)}"
            raise StatusError(problem, code=Code.INVALID_ARGUMENT)
        summary = pa.struct([("count", pa.int64()), ("mean", pa.float64()), ("min", pa.float64()), ("max", pa.float64())])
        state = StatisticsState({name: [0.0, 0.0, None, None] for name in names})
        return Stream(pa.schema([(name, summary) for name in names]), state, input_schema=schema)

DemoImpl = Demo  # for code that names the class that serves apart from the protocol

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
    if not isinstance(exc, RpcError):
        return (exc.code, exc.hint) if isinstance(exc, _CliError) else (_USAGE, "")
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
    first = f"{_paint('error:', '1;31')} {kind}{' '.join(_text_of(text).split())}"
    _say("\n".join(filter(None, (first, hint and f"{_paint('hint:', '1;36')} {hint}", trace))))
    return code

def _load_target(text: str) -> Any:
    """Import what ``module:Class``, ``path/to/file.py:Class`` or ``module:factory()`` names."""
    match = re.fullmatch(r"(.+?):([A-Za-z_][\w.]*)(\(\))?", text)
    if not match:
        raise _CliError(f"target {text!r}: expected module:Class, path/to/file.py:Class or module:factory()", f"try {text}:NAME")
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
    spec: Any = importlib.util.spec_from_file_location(stem, path)
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
    return isinstance(value, type) and bool(vars(value).get("_is_protocol") and _public_functions(value))

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
    found = _load_target(target) if target else Demo
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
    [(number, unit)] = re.findall(r"^([0-9]+)([KMG]?)(?:i?B)?\Z", text, re.I)
    return int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit.upper()]

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
    options |= {n: getattr(args, n) for n in ("prefix", "token_ttl", "max_request_bytes", "max_response_bytes", "max_connections")}
    key = f"from {args.token_key_file or 'VGI_RPC_TOKEN_KEY'}"
    if args.token_key_file:
        options["token_key"] = [line[0].encode() for line in _words_of(args.token_key_file)]
    elif not os.environ.get("VGI_RPC_TOKEN_KEY"):
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

def _serve_once(args: Any) -> int:
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
    return _OK

def _serve(args: Any) -> int:
    """Serve; with ``--reload``, when a module's file changes begin anew: same port and same key, so that open streams go on."""
    import signal
    if not args.reload:
        return _serve_once(args)
    os.environ.setdefault("VGI_RPC_TOKEN_KEY", os.urandom(32).hex())
    if not (args.stdio or args.unix or args.tcp or args.port):
        with listen_tcp(args.host, 0) as free:
            args.port = free.getsockname()[1]
        args.words += ["--port", str(args.port)]
    changed = threading.Event()
    threading.Thread(target=_watch, args=(args.target, changed), daemon=True, name="vgi_rpc reload").start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # where no server has handlers of its own
    try:
        code = _serve_once(args)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except (_CliError, OSError, ValueError) as exc:
        code = _report(exc, args)
        with contextlib.suppress(KeyboardInterrupt):
            _say("waiting for a change …")
            changed.wait()
            time.sleep(1)  # the signal of `_watch`, which follows at once, must not hit what comes next
    if changed.is_set():
        _say("something changed: starting again")
        os.execv(sys.executable, [sys.executable, os.path.abspath(__file__), *args.words])
    return code

def _watch(target: str | None, changed: threading.Event) -> None:
    """Wait until the file of a loaded module changes, then set the event and have the server stop."""
    import signal
    known: dict[str, int] = {}
    while True:
        files = {getattr(m, "__file__", None) for m in list(sys.modules.values())} | {(target or "").rpartition(":")[0]}
        found = {path: os.stat(path).st_mtime_ns for path in files if path and os.path.isfile(path)}
        if any(known.get(path, stamp) != stamp for path, stamp in found.items()):
            break
        known.update(found)
        time.sleep(0.3)
    changed.set()
    os.kill(os.getpid(), signal.SIGTERM)

def _listen(args: Any, server: RpcServer, options: dict[str, Any], key: str) -> None:
    """Serve where the flags say, until stopped; the banner comes once connections are accepted."""
    http = not (args.stdio or args.unix or args.tcp)
    if sum(map(bool, (args.stdio, args.unix, args.tcp))) > 1 or (args.bearer_file and not http):
        raise _CliError("--stdio, --unix, --tcp: one at a time, and --bearer-file with none of them")
    host, port = args.tcp or (args.host, args.port)

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
    tls, base = options.get("tls_context"), HttpOptions(args.prefix or "", b"").prefix
    try:
        if args.stdio:
            if sys.stdin.isatty():
                _say("serving Arrow on stdin and stdout, for a program that starts this one; stop with Ctrl-C")
            serve_stdio(server)
        elif args.unix:
            serve_unix(server, args.unix, on_bound=lambda path: bound(f"unix:{path}", f"UNIX:{path}"), **sockets)
        elif args.tcp:
            sockets["on_bound"] = lambda h, p: bound(f"tcp:{h}:{p}", f"TCP:{h}:{p}")
            serve_tcp(server, host, port, tls_context=tls, **sockets)
        else:
            url = f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}"
            serve_http(server, host=host, port=port, on_bound=lambda _, p: bound(f"{url}:{p}{base}", f"PORT:{p}"), **options)
    except KeyboardInterrupt:  # before the listener's own handlers stood
        return
    except OSError as exc:
        hint = "another server runs there; port 0 takes a free one" if exc.errno == errno.EADDRINUSE else ""
        reason = os.strerror(exc.errno) if isinstance(exc.errno, int) and exc.errno > 0 else exc
        raise _CliError(f"cannot listen on {args.unix or f'{host}:{port}'}: {reason}", hint, _UNREACHABLE) from None

def _channel_to(args: Any) -> ClientChannel:
    """The channel to WHERE: a URL, ``unix:PATH``, ``tcp:HOST:PORT`` or a command that is started; to be closed."""
    import shlex
    headers = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in args.header)}
    if args.bearer_file:
        headers["Authorization"] = f"Bearer {_words_of(args.bearer_file)[0][-1]}"
    where = args.where
    if where.startswith(("http://", "https://")):
        return _http_client(where, None, None, headers=headers)
    if headers:
        raise _CliError("-H and --bearer-file are for HTTP")
    kind, _, rest = where.partition(":")
    host, _, port = rest.rpartition(":")
    if kind == "unix":
        return ByteClient(connect_unix_socket(rest, args.timeout))
    if kind == "tcp" and port.isdigit():
        connected = connect_tcp_socket(host or "127.0.0.1", int(port), args.timeout or 10.0)
        return ByteClient(Transport(SocketChannel(connected), TransportKind.TCP, rest))
    if kind == "tcp" or not where or re.fullmatch(r"[\w.-]+:\d+(/.*)?", where):
        hint = f"http://{where.removeprefix('tcp:')}?" if where else ""
        raise _CliError(f"WHERE {where!r}: expected a URL, unix:PATH, tcp:HOST:PORT or a command", hint)
    stderr = StderrMode.INHERIT if args.verbose else StderrMode.PIPE
    return ByteClient(SubprocessTransport(shlex.split(where), stderr=stderr))

def _options(args: Any, version: str = "") -> CallOptions:
    def on_log(message: Message) -> None:
        _say(_paint(f"[{message.level.value}] {message.message}", "2"))

    return CallOptions(on_log if args.verbose else None, args.timeout, version=version)

def _describe_live(channel: ClientChannel, args: Any) -> tuple[ServiceDescription, MethodDescription | None]:
    """What the server says of its service, and of ``method`` or ``Protocol.method`` if one is asked for."""
    protocol, _, name = (args.method or "").rpartition(".")
    service = introspect(RpcProxy(Reflection, channel, _options(args)), protocol=protocol or None)
    if name and name not in (known := sorted(service.methods)):
        raise _CliError(f"{service.protocol_name} has no method {name!r}{_suggest(name, known)}", f"it has {', '.join(known)}")
    return service, service.methods.get(name)

def _usage_of(method: MethodDescription) -> str:
    """One line that says how `call` wants a method."""
    words = [method.name]
    for f in method.params_schema:
        word = f"{f.name}={re.split('[<[]', _type_text(f.type))[0].upper()}"
        told = method.method_type is MethodType.STREAM and f.name == "schema"  # by the input
        words.append(f"[{word}]" if told or f.nullable or f.name in method.param_defaults else word)
    return f"usage: {_program()} call WHERE {' '.join(words)}{' -i FILE' if method.is_exchange else ''}"

def _from_text(text: str | bytes, kind: pa.DataType) -> Any:
    """A word, or a file, as ``pa.array`` takes it for *kind*; raises as `_json_in`, and ``ValueError`` and the like."""
    t = pa.types
    if t.is_binary(kind) or t.is_large_binary(kind) or t.is_fixed_size_binary(kind):
        return text if isinstance(text, bytes) else text.encode()
    word = text if isinstance(text, str) else text.decode("utf-8", "replace").rstrip("\r\n")
    known = {t.is_boolean: lambda word: _TRUTH[word.lower()], t.is_integer: int, t.is_floating: float, t.is_duration: float}
    convert: Any = next((c for matches, c in {**known, t.is_nested: json.loads}.items() if matches(kind)), str)
    return _from_json(convert(word), kind)

def _from_json(value: Any, kind: pa.DataType) -> Any:
    """A JSON value as ``pa.array`` takes it for *kind*; a dataclass (an object) or a batch is a stream of its own."""
    if not isinstance(value, (dict, list)) or not pa.types.is_binary(kind):
        return _json_in(value, kind)
    batch = _rows_to_batch([value] if isinstance(value, dict) else value)
    return stream_bytes(batch.schema, [(batch, None)])

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
    """The values that the server's defaults, ``-j`` and ``k=v | k:=json | k=@file`` give, typed by the method's schema."""
    names = method.params_schema.names
    given: list[tuple[str, Any, Callable[[Any, pa.DataType], Any]]]
    given = [(name, value, _from_json) for name, value in method.param_defaults.items() if name in names]
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
        given.append((name[:-1], _parsed_json(word, data), _from_json) if name[-1:] == ":" else (name, data, _from_text))
    values: dict[str, Any] = {}
    for name, value, convert in given:
        if name not in names:
            raise _CliError(f"{method.name}() has no parameter {name!r}{_suggest(name, names)}", _usage_of(method))
        kind = method.params_schema.field(name).type
        try:
            values[name] = convert(value, kind)
        except _Mismatch as exc:
            exc.got = exc.got if exc.path else f"{_got(value)} {value!r:.60}"
            raise _CliError(_text_of(exc.error(f"{method.name}() argument {name}")), _usage_of(method)) from None
        except _ARROW_FAILURES:
            problem = f"{method.name}() parameter {name!r}: expected {_type_text(kind)}, got {value!r:.80}"
            raise _CliError(problem, _usage_of(method)) from None
    return values

def _request(args: Any, info: RpcMethodInfo, method: MethodDescription, values: dict[str, Any]) -> pa.RecordBatch:
    """The request; what neither the caller nor the server's defaults give is null where that is a value."""
    missing = [f.name for f in method.params_schema if f.name not in values and not f.nullable]
    if missing:
        raise _CliError(f"{method.name}() needs {', '.join(missing)}", _usage_of(method))
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
    params, result = (
        RowCodec((f.name, codec_for(Annotated[object, ArrowType(f.type, f.nullable)])) for f in schema)
        for schema in (method.params_schema, method.result_schema if method.has_return else EMPTY_SCHEMA))
    header: Any = types.SimpleNamespace(from_batch=lambda batch: batch) if method.has_header else None
    return RpcMethodInfo(
        method.name, method.params_schema, method.result_schema, None, method.method_type, method.has_return, None,
        protocol_name=service.protocol_name, params=params, header=header, result=result)

def _input_batches(path: str, rows: int | None) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow, NDJSON or CSV file, told apart by their first bytes; ``-`` is read as it comes."""
    with contextlib.nullcontext(cast("Any", sys.stdin.buffer)) if path == "-" else open(path, "rb") as file:
        first = file.peek(8)[:6]
        if first == b"ARROW1":
            file.read(8)  # the file format is a stream between two magic words (Columnar.rst, "IPC File Format")
        elif first[:4] != _CONTINUATION:
            yield from _text_batches(file, rows, path == "-", first.lstrip()[:1] != b"{")
            return
        source: Any = ByteSource()
        source.read = file.read
        for batch, _ in iter(IpcReader(source).next, None):
            for start in range(0, max(batch.num_rows, 1), rows or max(batch.num_rows, 1)):
                yield batch.slice(start, rows)

def _text_rows(file: Any, live: bool, is_csv: bool) -> Iterator[list[bytes]]:
    """The lines that hold something, as they come; an empty list ends them. A line break in quotes does not end one of CSV."""
    rest, data = b"", b"\n"
    while data:
        data = file.read1(_CHUNK_BYTES) if live else file.read(_CHUNK_BYTES)
        pieces, rest, lines = (rest + (data or b"\n")).splitlines(keepends=True), b"", list[bytes]()
        for piece in pieces:
            rest += piece
            if rest.endswith(b"\n") and not (is_csv and data and rest.count(b'"') % 2):
                lines += [rest] if rest.strip() else []
                rest = b""
        if lines:
            yield lines
    yield []

def _text_batches(file: Any, rows: int | None, live: bool, is_csv: bool) -> Iterator[pa.RecordBatch]:
    """Lines to batches. From a pipe, without a number of rows, a turn takes what has come; types are those of the beginning."""
    head, pending, schema, size = b"", list[bytes](), None, rows or _TEXT_ROWS
    for lines in _text_rows(file, live, is_csv):
        pending += lines
        if is_csv and not head and pending:
            head = pending.pop(0).removeprefix(b"\xef\xbb\xbf")
        while len(pending) >= size or (pending and (not lines or (live and rows is None))):
            schema = schema or _parse_lines(head, pending, None).schema
            yield _parse_lines(head, pending[:size], schema)
            del pending[:size]

def _parse_lines(head: bytes, lines: list[bytes], schema: pa.Schema | None) -> pa.RecordBatch:
    if not head:
        return _rows_to_batch([_parsed_json(f"input {line[:60]!r}", line) for line in lines], schema)
    import pyarrow.csv
    converting = pyarrow.csv.ConvertOptions(column_types=schema, strings_can_be_null=True)
    options = {"parse_options": pyarrow.csv.ParseOptions(newlines_in_values=True), "convert_options": converting}
    alone = pyarrow.csv.ReadOptions(use_threads=False)  # threads that still run at the interpreter's end abort it
    try:
        table = pyarrow.csv.read_csv(io.BytesIO(head + b"".join(lines)), alone, **options)
    except _ARROW_FAILURES as exc:
        raise _CliError(f"input: {_text_of(exc)}", "the types of a CSV's columns are those of its beginning") from None
    fields = [pa.field(f.name, pa.utf8() if pa.types.is_null(f.type) else f.type) for f in table.schema]
    return table.cast(pa.schema(fields)).combine_chunks().to_batches()[0]

def _rows_to_batch(rows: list[Any], schema: pa.Schema | None = None) -> pa.RecordBatch:
    if not all(isinstance(row, dict) for row in rows):
        raise _CliError("input: expected a JSON object for each row")
    names = dict.fromkeys([*(schema.names if schema is not None else ()), *(name for row in rows for name in row)])
    return _batch_from_pydict({name: [row.get(name) for row in rows] for name in names}, schema, "input")

def _to_json(value: Any) -> str:
    """What `_json_rows` and `_json_out` give as text; NaN and the infinities are null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return _to_json(json.loads(_json_bytes(value)))

def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, dict):
        return " ".join(f"{k}={_cell(v)}" for k, v in value.items())
    return "" if value is None else value if isinstance(value, str) else _to_json(value).strip('"')


class _Output:
    """Writes a header, batches or one value to a binary file, each as it comes, in one of the formats."""
    def __init__(self, kind: str, file: Any) -> None:
        self.kind, self.file, self.begun = kind, file, False
        self.widths: list[int] = []
        self.arrow: IpcWriter | None = None

    def put(self, text: str) -> None:
        self.file.write(text.encode("utf-8", "backslashreplace"))

    def header(self, batch: pa.RecordBatch) -> None:
        row = _json_rows(batch)[0]
        if self.kind == "arrow":
            self.file.write(stream_bytes(batch.schema, [(batch, None)]))
        elif self.kind == "table":
            lines = "".join(f"\n  {name:{max(map(len, row))}}  {_cell(value)}" for name, value in row.items())
            self.put(f"{_paint('Header:', '1', self.file)}{lines}\n")
        else:
            self.put("# " if self.kind == "csv" else "")
            self._json([{"__header__": row}])
        self.file.flush()

    def batch(self, batch: pa.RecordBatch, metadata: Any = None) -> None:
        if self.kind == "arrow":
            self.arrow = self.arrow or IpcWriter(lambda pieces: [self.file.write(piece) for piece in pieces], batch.schema)
            self.arrow.write(batch, metadata)
        elif self.kind in ("json", "ndjson"):
            self._json(_json_rows(batch))
        elif self.kind == "csv":
            import csv
            rows = [[v if isinstance(v, float) else _cell(v) for v in row.values()] for row in _json_rows(batch)]
            writer = csv.writer(cast("Any", types.SimpleNamespace(write=self.put)), lineterminator="\n")
            writer.writerows(rows if self.begun else [batch.schema.names, *rows])
            self.begun = True
        else:
            self._table(batch)
        self.file.flush()

    def _json(self, rows: list[Any]) -> None:
        for row in rows:
            self.put(("," if self.begun else "[") + f"\n{_to_json(row)}" if self.kind == "json" else f"{_to_json(row)}\n")
            self.begun = self.kind == "json"

    def _table(self, batch: pa.RecordBatch) -> None:
        sides = ["<>"[_is_number(f.type)] for f in batch.schema]
        rows = [[_cell(v) for v in row.values()] for row in _json_rows(batch)]
        lines = rows if self.begun else [batch.schema.names, *rows]
        self.widths = self.widths or [min(60, max(map(len, column))) for column in zip(*lines)]
        for row in lines:
            line = "  ".join(f"{c:{side}{width}}" for c, side, width in zip(row, sides, self.widths)).rstrip()
            self.put((line if self.begun else _paint(line, "1", self.file)) + "\n")
            self.begun = True

    def value(self, value: Any, schema: pa.Schema) -> None:
        """Write a unary result: a plain value as itself, a dataclass or a batch as rows."""
        batch: pa.RecordBatch | None = None
        if isinstance(value, bytes) and value[:4] == _CONTINUATION:  # a stream: of a dataclass (one row) or of a record batch
            with contextlib.suppress(IPCError):
                batch = (IpcReader(BufferSource(value)).next() or (None,))[0]
        if batch is None and self.kind in ("json", "ndjson", "table"):
            shown = _json_out(value, schema.field(0).type) if len(schema) else None
            text = _cell(shown) if self.kind == "table" else _to_json(shown)
            self.put("" if shown is None and self.kind == "table" else text + "\n")
        elif batch is not None and batch.num_rows == 1 and self.kind == "json":
            self.put(_to_json(_json_rows(batch)[0]) + "\n")
        elif batch is not None or len(schema):
            columns = [pa.array([value], f.type) for f in schema]
            self.batch(pa.RecordBatch.from_arrays(columns, schema=schema) if batch is None else batch)
            self.close()

    def close(self) -> None:
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
    mode = "ab" if args.resume and os.path.exists(args.resume) else "wb"
    with open(args.output, mode) if args.output else contextlib.nullcontext(sys.stdout.buffer) as file:
        yield _Output(kind, file)

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

def _call(args: Any) -> None:
    with contextlib.closing(_channel_to(args)) as channel:
        service, method = _describe_live(channel, args)
        if method is None:
            raise _CliError("METHOD is missing", f"{service.protocol_name} has {', '.join(service.methods)}")
        stream = method.method_type is MethodType.STREAM
        if bool(args.input) != bool(method.is_exchange) and (not stream or method.is_exchange is not None):
            raise _CliError(f"{method.name}() takes {'no input: it is no exchange' if args.input else 'batches'}", _usage_of(method))
        if args.resume and not (stream and isinstance(channel, HttpClient)):
            raise _CliError("--resume is for streams over HTTP: elsewhere the state ends with the connection")
        info, options = _live_method(service, method), _options(args, service.protocol_version)
        values = _arguments(args, method)
        if stream:
            _call_stream(args, channel, info, method, options, values)
        else:
            value = channel.unary(info, _request(args, info, method, values), options)
            with _output(args) as output:
                output.value(value, method.result_schema)

def _call_stream(args: Any, channel: Any, info: Any, method: MethodDescription, options: CallOptions, values: Any) -> None:
    """Start a stream, or go on with the one that the bookmark remembers, and write what it answers."""
    name = f"{info.protocol_name}.{info.name}"
    answered, token = _bookmark(args.resume, name)
    batches = _input_batches(args.input, args.rows) if args.input else iter(())
    first = next(batches, None)
    if first is not None and "schema" in method.params_schema.names and values.get("schema") is None:
        values["schema"] = _schema_to_bytes(first.schema)
    start = channel.resume if token else channel.stream
    stream = start(info, token or _request(args, info, method, values), options)
    with StreamSession(stream, info) as session, _output(args) as output:
        if session.header is not None:
            output.header(_traced(args, "< header", session.header))
        given = itertools.chain([first] if first is not None else [], batches)
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
            if (took := time.monotonic() - started) >= 1:
                rate, size = counted.output_rows / took, counted.output_bytes / 1e6
                show(f"{counted.output_batches} batches, {counted.output_rows} rows, {size:.1f} MB, {rate:.0f} rows/s")
    finally:
        show()
        output.close()

def _describe(args: Any) -> None:
    with contextlib.closing(_channel_to(args)) as channel:
        service, method = _describe_live(channel, args)
        service = service if method is None else dataclasses.replace(service, methods={method.name: method})
        told = dataclasses.asdict(channel.capabilities(_options(args).deadline)) if isinstance(channel, HttpClient) else {}
    limits = service.limits or {k: Limit(v, "bytes") for k, v in told.items() if type(v) is int}  # another implementation's
    facts = {f.name: getattr(service, f.name) for f in dataclasses.fields(service) if f.name != "methods"}
    facts.update(limits={k: v._asdict() for k, v in limits.items()}, capabilities={k: v for k, v in told.items() if v},
                 methods=list(map(_facts_of, service.methods.values())))
    if args.format == "json":
        print(json.dumps(facts, indent=2))
    else:
        print(_describe_python(service) if args.format == "python" else _describe_text(facts, service, args.format == "markdown"))

def _facts_of(method: MethodDescription) -> dict[str, Any]:
    """What there is to say about a method."""
    streams = {True: "exchange", False: "producer", None: "stream"}
    kind = streams[method.is_exchange] if method.method_type is MethodType.STREAM else "unary"
    facts: dict[str, Any] = {"name": method.name, "kind": kind, **({"doc": method.doc} if method.doc else {})}
    schemas = {"parameters": method.params_schema, "result": method.result_schema, "header": method.header_schema}
    for name, schema in schemas.items():
        if schema is not None and (name != "result" or method.has_return):
            facts[name] = [{"name": f.name, "type": _type_text(f.type), "nullable": f.nullable} for f in schema]
    for entry in facts["parameters"]:
        told = {"default": method.param_defaults, "doc": method.param_docs}
        entry.update({key: by_name[entry["name"]] for key, by_name in told.items() if entry["name"] in by_name})
    extra = {"idempotency": method.idempotency, "deprecated": method.deprecation}
    return {**facts, **{k: v for k, v in extra.items() if v not in ("unknown", None)}, "usage": _usage_of(method)[7:]}

def _describe_text(facts: dict[str, Any], service: ServiceDescription, markdown: bool) -> str:
    def shown(value: Any) -> str:
        if type(value) in (list, tuple):
            return ", ".join(map(shown, value)) or "none"
        if not isinstance(value, dict):
            return str(value).replace("\n", "\n    ")
        default = f" = {json.dumps(value['default'])}" if "default" in value else ""
        doc = f" ({value['doc']})" if "doc" in value else ""
        return f"{value['name']}: {value['type']}{' | null' * value['nullable']}{default}{doc}"

    item = "- {}: {}" if markdown else "  {}: {}"
    lines = [f"{'# ' * markdown}{service.protocol_name} {service.protocol_version}".rstrip()]
    for method in facts["methods"]:
        lines += ["", f"{'## ' * markdown}{method['name'] if markdown else _paint(method['name'], '1', sys.stdout)}"]
        lines += [item.format(name, shown(value)) for name, value in method.items() if name != "name"]
    limits = {name: Limit(**limit) for name, limit in facts["limits"].items()}
    rest = {**facts["capabilities"], **limits, "protocol_hash": service.protocol_hash, "server_id": service.server_id}
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
        told = {k: f" = {v!r}" for k, v in method.param_defaults.items() if isinstance(v, (int, float, str, type(None)))}
        parameters = ", ".join(["self", *(f"{f.name}: {_annotation_of(f)}{told.get(f.name, '')}" for f in method.params_schema)])
        result = _annotation_of(method.result_schema.field(0)) if method.has_return else "None"
        if method.method_type is MethodType.STREAM:
            state = {True: "ExchangeState", False: "ProducerState"}.get(cast("bool", method.is_exchange), "StreamState")
            header = f", {headers[method.name]}" if method.has_header else ""
            result = f"vgi_rpc.Stream[vgi_rpc.{state}{header}]"
        lines += ["", f"    def {method.name}({parameters}) -> {result}:", f"        {(method.doc or method.name)!r}"]
    return "\n".join(lines)

def _ping(args: Any) -> None:
    with contextlib.closing(_channel_to(args)) as channel:
        proxy, stamps = RpcProxy(Reflection, channel, _options(args)), []
        for _ in range(max(1, args.number) + 1):
            proxy.list_protocols()  # the first one connects
            stamps.append(time.perf_counter() * 1000)
    times = sorted(later - earlier for earlier, later in itertools.pairwise(stamps))
    median, p99 = times[len(times) // 2], times[int((len(times) - 1) * 0.99)]
    print(f"{len(times)} round trips: min {times[0]:.3f} ms, median {median:.3f} ms, p99 {p99:.3f} ms")

def _versions() -> str:
    own = f"vgi_rpc {__version__} (wire {REQUEST_VERSION.decode()}, Python {sys.version.split()[0]}"
    return f"{own}, pyarrow {pa.__version__}, codecs {', '.join(supported_encodings())})"

@contextlib.contextmanager
def _served(kind: str, folder: str) -> Iterator[Any]:
    """A proxy of the demo over one kind of transport; what listens is a child."""
    import subprocess
    command = [sys.executable, os.path.abspath(__file__), "serve"]
    flag = {"http": "--port=0", "tcp": "--tcp=0", "unix": f"--unix={folder}/s"}.get(kind)
    with contextlib.ExitStack() as stack:
        line = ""
        if flag:
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
            child: Any = stack.enter_context(subprocess.Popen([*command, flag, "--announce"], **pipes))
            stack.callback(child.terminate)
            line = child.stdout.readline().strip()
        host, _, port = line.partition(":")[2].rpartition(":")
        dial: dict[str, Callable[[], Any]] = {
            "pipe": lambda: serve_pipe(Demo, Demo()),
            "subprocess": lambda: connect(Demo, [*command, "--stdio"]),
            "wsgi": lambda: http_connect(Demo, client=make_sync_client(RpcServer(Demo, Demo()))),
            "http": lambda: http_connect(Demo, f"http://127.0.0.1:{port}"),
            "tcp": lambda: tcp_connect(Demo, host, int(port)),
            "unix": lambda: unix_connect(Demo, port),
        }
        yield stack.enter_context(dial[kind]())

def _selfcheck(args: Any) -> int:
    import tempfile
    given = AnnotatedBatch.from_pydict({"x": [1.0, None, 3.0]})

    def statistics(proxy: Any) -> Any:
        with proxy.statistics(schema=given.batch.schema) as session:
            return [session.exchange(given).batch.to_pylist()[0]["x"]["count"] for _ in range(2)]

    def countdown(proxy: Any) -> Any:
        session = proxy.countdown(start=2)
        return [session.header.batches, *(answer.batch.to_pylist()[0]["n"] for answer in session)]

    checks: dict[str, tuple[Callable[[Any], Any], Any]] = {"unary": (lambda proxy: proxy.add(a=2.0), 3.0)}
    checks.update(producer=(countdown, [3, 2, 1, 0]), exchange=(statistics, [2, 4]))
    print(_versions() + f"\n{'ms':12}" + "".join(f"{name:>10}" for name in checks))
    code = _OK
    for kind in ("pipe", "subprocess", "wsgi", "http", "tcp", *(["unix"] if hasattr(socket, "AF_UNIX") else [])):
        line, end = f"{kind:12}", _paint("ok", "32", sys.stdout)
        try:
            with tempfile.TemporaryDirectory() as folder, _served(kind, folder) as proxy:
                for call, wanted in checks.values():
                    start = time.perf_counter()
                    got = call(proxy)
                    if got != wanted:
                        raise ValueError(f"expected {wanted}, got {got}")
                    line += f"{(time.perf_counter() - start) * 1000:10.2f}"
        except Exception as exc:
            code, end = _FAILED, f"{_paint('FAILED', '1;31', sys.stdout)} {_text_of(exc)}"
        print(f"{line}  {end}", flush=True)
    return code

def _explain(args: Any) -> None:
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
            shown = b"<%d bytes>" % len(value) if key in (STATE_KEY, CALL_STATE_KEY) else value[:500]
            print(f"    {(key[:500] + b' = ' + shown).decode('utf-8', 'backslashreplace')}")
        for row in _json_rows(reader.decode(message).slice(0, 3)):
            print(f"    {_to_json(row)[:200]}")
    print(f"  end at byte {source.position}")

def _completion(args: Any) -> None:
    flags = {name: " ".join(w for a in c.arguments for w in a[0].split() if w[0] == "-") for name, c in _commands().items()}
    if args.shell == "fish":
        for name, words in flags.items():
            print(f"complete -c vgi-rpc -n __fish_use_subcommand -a {name}")
            print(f"complete -c vgi-rpc -n '__fish_seen_subcommand_from {name}' -a '{words}'")
        return
    print("autoload -U +X bashcompinit && bashcompinit\n" * (args.shell == "zsh") + "_vgi_rpc() {")
    print(f"  local words='{' '.join(flags)} --version --help'\n  [ $COMP_CWORD -gt 1 ] && case ${{COMP_WORDS[1]}} in")
    print("\n".join(f"    {name}) words='{words}' ;;" for name, words in flags.items()))
    print('  esac\n  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))\n}')
    print("complete -o default -F _vgi_rpc vgi-rpc")

_FORMATS = ("auto", "json", "ndjson", "table", "csv", "arrow")

class _Command(NamedTuple):
    """A command: what runs it, what it is for, its arguments as argparse takes them, and examples."""
    run: Callable[[Any], int | None]  # gives the exit code, where it is not 0
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
        value("--tcp", "[HOST:]PORT", "serve TCP instead of HTTP", type=_host_and_port),
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
        if given := os.environ.get(twin):
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
    shells = ("shell", {"choices": ("bash", "zsh", "fish")})
    return {
        "serve": _Command(_serve, "serve a class, over HTTP unless told otherwise", serve, serving),
        "call": _Command(_call, "call a method", call, demo),
        "describe": _Command(_describe, "show what a server offers", [where, method, formats, *connecting], (url,)),
        "ping": _Command(_ping, "measure round trips", [where, number, *connecting], (url, f"{worker} -n 100")),
        "selfcheck": _Command(_selfcheck, "call the demo over every transport of this machine", []),
        "explain": _Command(_explain, "print captured bytes of the wire as text", [value("file", "FILE", "- is stdin")], ("answer.bin",)),
        "completion": _Command(_completion, "print a completion script for a shell", [shells], ("bash",)),
    }

def _parse(words: list[str]) -> tuple[Callable[[Any], int | None], Any]:
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
    args = None
    try:
        run, args = _parse(list(sys.argv[1:] if argv is None else argv))
        code = run(args)
        sys.stdout.flush()
        return code or _OK
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
