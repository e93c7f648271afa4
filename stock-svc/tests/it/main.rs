//! stock-svc from outside: the permits' contract on every implementation, and the whole service on every database.

mod faults;
mod permits;
mod purchases;
mod sales;
mod world;
