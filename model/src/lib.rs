//! Exhaustive checks: every interleaving within small bounds, with the services' own functions deciding each step.
//!
//! [`stock`] plays everybody around the stock protocol: buyers who retry, the funnel, the sweep, the relay that
//! duplicates and reorders, expiry, payment, lost permits, rebuilders that overtake each other, reconciliation.
//! [`saga`] plays everybody around one order: its buyer, the clock, the provider, two coordinators that may die
//! between any two steps. Neither knows what is right in a step; they know what must never be seen afterwards.
//!
//! [`search`] is a breadth-first search: what it finds first is the shortest way to it.

#![deny(missing_docs)]

pub mod saga;
pub mod search;
pub mod stock;
