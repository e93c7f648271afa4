//! The whole mesh, by its public door.

mod kills;
mod sale;
