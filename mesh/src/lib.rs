//! The plumbing of the mesh: how roles live, talk, batch, store and are watched.
//!
//! Knows no business: nothing in here says order, stock or payment. Services build on it; it builds on [`proto`] alone.

#![deny(missing_docs)]

pub mod admin;
pub mod batch;
pub mod bus;
pub mod chance;
pub mod clock;
pub mod duration;
pub mod identity;
pub mod layers;
pub mod lifecycle;
pub mod link;
pub mod readiness;
pub mod serve;
pub mod sql;
pub mod telemetry;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
