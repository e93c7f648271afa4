//! payment-svc from outside: its store's contract on every database, the role with the simulated provider, and the role
//! with a provider that says what a test tells it to.

mod role;
mod scripted;
mod simulated;
mod store;
