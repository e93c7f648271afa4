//! The public rpcs, each implemented once: over HTTP they are reached through [`crate::transcode`].
//!
//! Every handler is three moves: who asks and for what, checked; a call of one of our services; its answer or its
//! refusal. What all of them share is here.

use std::sync::Arc;

use http::{HeaderValue, header};
use mesh::identity::{Identity, Verifier};
use proto::{BuyerId, Error, Reason, SaleId};
use tonic::{Response, Status, metadata::MetadataMap};

pub mod actions;
pub mod operations;
pub mod orders;
pub mod sales;

/// Entries of one page, at most, and when the request does not say.
const LARGEST_PAGE: i32 = 100;
const USUAL_PAGE: i32 = 50;
/// Of what operators write and look for, in bytes.
const LONGEST_TEXT: usize = 256;

/// Tells who calls.
#[derive(Clone, Debug)]
pub struct Callers(Arc<Verifier>);

impl Callers {
    /// By this verifier.
    pub fn new(verifier: Arc<Verifier>) -> Self {
        Self(verifier)
    }

    /// Whoever has a good token.
    fn known(&self, metadata: &MetadataMap) -> Result<Identity, Error> {
        self.named(metadata.as_ref().get(header::AUTHORIZATION))
    }

    /// The same, by the header.
    fn named(&self, authorization: Option<&HeaderValue>) -> Result<Identity, Error> {
        self.0.verify(authorization.and_then(|value| value.to_str().ok()).unwrap_or_default())
    }

    /// Anyone. Who brings a token wants to be known by it, so a bad one is refused even here.
    fn anyone(&self, metadata: &MetadataMap) -> Result<(), Error> {
        if metadata.contains_key("authorization") { self.known(metadata).map(drop) } else { Ok(()) }
    }

    fn buyer(&self, metadata: &MetadataMap) -> Result<BuyerId, Error> {
        self.known(metadata)?.require_buyer().cloned()
    }

    fn operator(&self, metadata: &MetadataMap) -> Result<Identity, Error> {
        let identity = self.known(metadata)?;
        identity.require_operator()?;
        Ok(identity)
    }
}

/// A handler's result as tonic wants it. The context stays here, in the log.
fn answer<T>(result: Result<T, Error>) -> Result<Response<T>, Status> {
    result.map(Response::new).map_err(refuse)
}

fn refuse(error: Error) -> Status {
    if error.reason == Reason::Internal {
        tracing::error!(%error, "failed");
    } else {
        tracing::debug!(%error, "refused");
    }
    error.into()
}

/// One of our services' answer to a call that was handed on as it was.
fn handed_on<T>(answered: Result<Response<T>, Status>) -> Result<T, Error> {
    // Its headers are between us; only the message goes on.
    answered.map(Response::into_inner).map_err(Error::from)
}

/// The results of a batch call, one per item. A call that failed as a whole fails each item, its effect unknown.
fn each<T, R>(
    count: usize,
    answered: Result<Vec<T>, Status>,
    read: impl Fn(T) -> Result<R, Error>,
) -> Vec<Result<R, Error>> {
    let error = match answered {
        Ok(results) if results.len() == count => return results.into_iter().map(read).collect(),
        Ok(results) => Error::internal(format_args!("{} results for {count} items", results.len())),
        Err(status) => Error::from(status),
    };
    // Once a batch, and not once an item.
    tracing::warn!(%error, items = count, "a batch failed");
    (0..count).map(|_| Err(error.clone())).collect()
}

/// A sale's id in its bare form, checked.
fn sale(text: &str) -> Result<String, Error> {
    SaleId::parse("sale", text).map(|id| id.as_str().to_owned())
}

fn page_size(asked: i32) -> Result<i32, Error> {
    match asked {
        0 => Ok(USUAL_PAGE),
        1..=LARGEST_PAGE => Ok(asked),
        _ => Err(Error::invalid("page_size", format!("must be from 1 to {LARGEST_PAGE}"))),
    }
}

/// A field that must be there, and is [`plain`].
fn given(field: &str, text: &str) -> Result<(), Error> {
    if text.is_empty() { Err(Error::invalid(field, "must be given")) } else { plain(field, text) }
}

/// Text that is not absurdly long and that every database takes: some have no place for a NUL, and would seem to be down.
fn plain(field: &str, text: &str) -> Result<(), Error> {
    if text.len() > LONGEST_TEXT {
        return Err(Error::invalid(field, format!("must be at most {LONGEST_TEXT} bytes")));
    }
    if text.chars().any(char::is_control) {
        return Err(Error::invalid(field, "must not contain control characters"));
    }
    Ok(())
}

fn shutting_down() -> Error {
    Error::new(Reason::DependencyDown, "shutting down; watch again")
}
