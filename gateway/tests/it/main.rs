//! The gateway as its clients see it: over a socket, with fakes where the other services are.

mod door;
mod fakes;
mod input;
mod orders;
mod overload;
mod tools;
mod watching;
