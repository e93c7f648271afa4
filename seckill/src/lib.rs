//! The mesh, assembled: which roles run here, on which backends, and the verbs around them.
//!
//! The all-in-one, the single roles, the demo and the tests all go through [`assembly`], so that what is tested is
//! what runs.

#![deny(missing_docs)]

pub mod assembly;
pub mod audit;
pub mod backends;
pub mod banner;
pub mod cli;
pub mod config;
pub mod demo;
pub mod ops;
pub mod tools;
