//! The whole mesh, by its public door.

// The futures of a whole mesh are deep.
#![recursion_limit = "256"]

mod kills;
mod operators;
mod replicas;
mod sale;
mod traces;
