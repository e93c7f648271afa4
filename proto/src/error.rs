//! The error table: every reason, what it is called on gRPC and HTTP, and whether trying again helps.
//!
//! One error type travels everywhere. What the caller reads (`message`, `field`, `metadata`) and what we read
//! (`context`, for the log) are two fields, so that internals cannot leak by accident.

use std::{collections::BTreeMap, fmt, time::Duration};

use tonic::{Code, Status, metadata::MetadataValue};
use tonic_types::{ErrorDetails, StatusExt};

pub use crate::internal::Reason;
use crate::internal::Refusal;

/// The `domain` of every `google.rpc.ErrorInfo`.
pub const DOMAIN: &str = "seckill";

/// Tells a gRPC client when to try again, in milliseconds; -1 says never.
pub const RETRY_PUSHBACK: &str = "grpc-retry-pushback-ms";

/// When to come back, where the refusing code knows nothing better.
const DEFAULT_RETRY: Duration = Duration::from_millis(500);

impl Reason {
    /// The gRPC code.
    pub fn code(self) -> Code {
        use Reason::*;
        match self {
            SoldOut | SaleEnded | PurchaseLimitReached | SaleNotStarted | SalePaused | IllegalState
            | PaymentDeclined | PermitLapsed => Code::FailedPrecondition,
            AllHeld | RateLimited | BodyTooLarge => Code::ResourceExhausted,
            Overloaded | StockRebuilding | DependencyDown => Code::Unavailable,
            RequestIdReused | InvalidField => Code::InvalidArgument,
            NotFound => Code::NotFound,
            Unauthenticated => Code::Unauthenticated,
            PermissionDenied => Code::PermissionDenied,
            DeadlineExceeded => Code::DeadlineExceeded,
            Internal | Unspecified => Code::Internal,
        }
    }

    /// The HTTP status. Only a body that is too large differs from what its gRPC code says.
    pub fn http_status(self) -> http::StatusCode {
        use http::StatusCode;
        match (self, self.code()) {
            (Reason::BodyTooLarge, _) => StatusCode::PAYLOAD_TOO_LARGE,
            (_, code) => http_status(code),
        }
    }

    /// Whether the same request, with the same request_id, may succeed later.
    pub fn retryable(self) -> bool {
        use Reason::*;
        matches!(
            self,
            AllHeld
                | RateLimited
                | Overloaded
                | StockRebuilding
                | DependencyDown
                | SaleNotStarted
                | SalePaused
                | DeadlineExceeded
        )
    }

    /// Whether the answer is final, so that a gRPC client must not retry on its own.
    fn is_final(self) -> bool {
        matches!(self, Reason::SoldOut | Reason::SaleEnded | Reason::PurchaseLimitReached)
    }

    /// An answer of the business (sold out, declined …), as opposed to a fault: logged at debug, cheap to make.
    pub fn is_answer(self) -> bool {
        !matches!(self, Reason::Internal | Reason::Unspecified | Reason::DependencyDown)
    }
}

/// The HTTP status of a bare gRPC code, as google.rpc.Code documents it.
pub fn http_status(code: Code) -> http::StatusCode {
    use http::StatusCode;
    match code {
        Code::Ok => StatusCode::OK,
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => StatusCode::BAD_REQUEST,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::REQUEST_TIMEOUT),
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The name of a gRPC code as google.rpc.Code spells it.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// Why something was not done. See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// Which row of the table.
    pub reason: Reason,
    /// For the caller: lower case, no full stop, never internals.
    pub message: String,
    /// For the log only: what really happened.
    pub context: Option<String>,
    /// The request's field at fault, as its path in proto names.
    pub field: Option<String>,
    /// When trying again may help.
    pub retry_after: Option<Duration>,
    /// Further facts for clients, e.g. `state` of ILLEGAL_STATE.
    pub metadata: BTreeMap<String, String>,
}

/// What every fallible operation of the domain answers.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error with this reason. Reasons that are retryable get a default hint.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            context: None,
            field: None,
            retry_after: reason.retryable().then_some(DEFAULT_RETRY),
            metadata: BTreeMap::new(),
        }
    }

    /// A bad or missing field of the request, by its proto path.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        let field = field.into();
        let message = format!("{field}: {}", message.into());
        Self { field: Some(field), ..Self::new(Reason::InvalidField, message) }
    }

    /// Not there, or not the caller's: the two are told apart by nobody (I11).
    pub fn not_found(what: &str) -> Self {
        Self::new(Reason::NotFound, format!("{what} not found"))
    }

    /// Something we depend on did not answer. `context` goes to the log, not to the caller.
    pub fn dependency(what: &'static str, context: impl fmt::Display) -> Self {
        Self::new(Reason::DependencyDown, format!("{what} is not available")).with_context(context)
    }

    /// A bug or a broken record of ours. `context` goes to the log, not to the caller.
    pub fn internal(context: impl fmt::Display) -> Self {
        Self::new(Reason::Internal, "internal error").with_context(context)
    }

    /// An action that the state does not allow.
    pub fn illegal_state(state: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Reason::IllegalState, message).with_metadata("state", state)
    }

    /// Adds what the log should say.
    pub fn with_context(mut self, context: impl fmt::Display) -> Self {
        self.context = Some(context.to_string());
        self
    }

    /// Sets when to try again.
    pub fn with_retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// Adds a fact for clients.
    pub fn with_metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    /// The value of `grpc-retry-pushback-ms`: -1 for final answers, the hint for UNAVAILABLE.
    pub fn retry_pushback_ms(&self) -> Option<i64> {
        if self.reason.is_final() {
            Some(-1)
        } else if self.reason.code() == Code::Unavailable {
            Some(self.retry_after.unwrap_or(DEFAULT_RETRY).as_millis() as i64)
        } else {
            None
        }
    }

    /// The google.rpc details that go with it.
    pub fn details(&self) -> ErrorDetails {
        let metadata: std::collections::HashMap<_, _> =
            self.metadata.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        let mut details = ErrorDetails::with_error_info(self.reason.as_str_name(), DOMAIN, metadata);
        if let Some(after) = self.retry_after {
            details.set_retry_info(Some(after));
        }
        if let Some(field) = &self.field {
            details.add_bad_request_violation(field.clone(), self.message.clone());
        }
        if self.reason == Reason::RateLimited {
            details.add_quota_failure_violation("requests", self.message.clone());
        }
        details
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason.as_str_name(), self.message)?;
        if let Some(context) = &self.context {
            write!(f, " ({context})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let mut status = Status::with_error_details(error.reason.code(), error.message.clone(), error.details());
        if let Some(ms) = error.retry_pushback_ms() {
            status.metadata_mut().insert(RETRY_PUSHBACK, MetadataValue::from(ms));
        }
        status
    }
}

impl From<Status> for Error {
    /// Reads our own details back. A status without them came from the transport: whether the call took effect is
    /// then not known, and the caller must treat it so.
    fn from(status: Status) -> Self {
        let details = status.get_error_details();
        if let Some(info) = details.error_info().filter(|i| i.domain == DOMAIN)
            && let Some(reason) = Reason::from_str_name(&info.reason)
        {
            return Self {
                reason,
                message: status.message().to_owned(),
                context: None,
                field: details.bad_request().and_then(|b| b.field_violations.first()).map(|v| v.field.clone()),
                retry_after: details.retry_info().and_then(|r| r.retry_delay),
                metadata: info.metadata.clone().into_iter().collect(),
            };
        }
        let context = format!("{}: {}", code_name(status.code()), status.message());
        match status.code() {
            Code::DeadlineExceeded | Code::Cancelled => {
                Self::new(Reason::DeadlineExceeded, "deadline exceeded").with_context(context)
            }
            Code::Unavailable | Code::Unknown => Self::dependency("a service", context),
            Code::InvalidArgument => Self::new(Reason::InvalidField, status.message()),
            _ => Self::internal(context),
        }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal {
            reason: error.reason.into(),
            retry_after_ms: error.retry_after.map_or(0, |d| d.as_millis() as i64),
            message: error.message,
            metadata: error.metadata.into_iter().collect(),
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self {
            reason: refusal.reason(),
            retry_after: (refusal.retry_after_ms > 0).then(|| Duration::from_millis(refusal.retry_after_ms as u64)),
            message: refusal.message,
            context: None,
            field: None,
            metadata: refusal.metadata.into_iter().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of the public contract, row by row: reason, gRPC, HTTP.
    #[test]
    fn reasons_map_as_the_contract_says() {
        let rows = [
            (Reason::SoldOut, Code::FailedPrecondition, 400),
            (Reason::SaleEnded, Code::FailedPrecondition, 400),
            (Reason::PurchaseLimitReached, Code::FailedPrecondition, 400),
            (Reason::SaleNotStarted, Code::FailedPrecondition, 400),
            (Reason::SalePaused, Code::FailedPrecondition, 400),
            (Reason::IllegalState, Code::FailedPrecondition, 400),
            (Reason::AllHeld, Code::ResourceExhausted, 429),
            (Reason::RateLimited, Code::ResourceExhausted, 429),
            (Reason::Overloaded, Code::Unavailable, 503),
            (Reason::StockRebuilding, Code::Unavailable, 503),
            (Reason::DependencyDown, Code::Unavailable, 503),
            (Reason::PaymentDeclined, Code::FailedPrecondition, 400),
            (Reason::RequestIdReused, Code::InvalidArgument, 400),
            (Reason::InvalidField, Code::InvalidArgument, 400),
            (Reason::NotFound, Code::NotFound, 404),
            (Reason::Unauthenticated, Code::Unauthenticated, 401),
            (Reason::PermissionDenied, Code::PermissionDenied, 403),
            (Reason::BodyTooLarge, Code::ResourceExhausted, 413),
            (Reason::DeadlineExceeded, Code::DeadlineExceeded, 504),
            (Reason::Internal, Code::Internal, 500),
        ];
        for (reason, code, http) in rows {
            assert_eq!(reason.code(), code, "{reason:?}");
            assert_eq!(reason.http_status().as_u16(), http, "{reason:?}");
        }
    }

    #[test]
    fn status_carries_the_error_there_and_back_without_its_context() {
        let error = Error::illegal_state("EXPIRED", "an expired order cannot be paid").with_context("saga row 7");
        let status = Status::from(error.clone());
        assert!(!format!("{status:?}").contains("saga row 7"), "internals leak (I11)");
        assert_eq!(Error::from(status), Error { context: None, ..error });
    }

    #[test]
    fn final_answers_forbid_retries_and_busy_ones_say_when() {
        let pushback = |r| Error::new(r, "x").retry_pushback_ms();
        assert_eq!(pushback(Reason::SoldOut), Some(-1));
        assert_eq!(pushback(Reason::Overloaded), Some(500));
        assert_eq!(pushback(Reason::AllHeld), None);
    }
}
