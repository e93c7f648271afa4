//! The contract: the .proto files' generated code, the ids, the money, the error table and the names on the bus.
//!
//! Knows no I/O. Everything here is what two services, or a service and a client, must agree on.

#![deny(missing_docs)]

pub mod error;
pub mod filter;
pub mod ids;
pub mod money;
pub mod subjects;

pub use error::{Error, Reason};
pub use ids::{BuyerId, OrderId, RequestId, SaleId};
pub use money::Money;

mod generated {
    #![allow(missing_docs, dead_code, clippy::all, reason = "generated from documented .proto files")]
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

/// The public API, package `seckill.v1`.
pub use generated::seckill::v1;

/// The services' own rpcs and the bus's messages, package `seckill.internal.v1`.
pub use generated::seckill::internal::v1 as internal;

/// The wire form of money; inside, use [`Money`].
pub use generated::google::r#type::Money as WireMoney;

/// The epoch of a sale's first permits: nothing of theirs was ever lost.
pub const FIRST_EPOCH: i64 = 1;

/// Unix milliseconds as the wire has them.
pub fn timestamp(unix_ms: i64) -> prost_types::Timestamp {
    // Below a thousand milliseconds' worth of nanoseconds: fits.
    prost_types::Timestamp { seconds: unix_ms.div_euclid(1_000), nanos: (unix_ms.rem_euclid(1_000) * 1_000_000) as i32 }
}

/// Encoded descriptors of every .proto file, annotations included: for reflection, JSON and the OpenAPI document.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
